"""Surgeries that say themselves what becomes of a leaf's optimizer slots, in place of a rule.

Such a surgery is a class with a method `edit_slots(slots)` beside `__call__(leaf)`, which then mostly returns the leaf
as it is. `slots` maps the name of each slot of the leaf, such as "ScaleByAdamState.mu", to a `SlotValue`; a dict from
the same names to arrays of the same shapes comes back. Further parameters are filled by name: `leaf` (after the edit),
`path`, `key` (the leaf's own), `step`, and the trainer's inputs. Values come as float32 where they are stored in fewer
bits, and go back to their dtype. It runs, is measured, guarded and placed with the edit of the leaf.

Of a surgery that takes all leaves at once, `slots` maps each path to such a dict, `leaves` (after the edit) takes the
place of `leaf` and `path`, and `key` is that of the fire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import SurgeryError, SurgeryFunctionError, UserCodeError, located, shorten
from flax_surgery_hooks.operation import Fire, Unit, compute_dtype, like
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.surgery import LEAF, LEAVES, Edit, Method


class SlotValue(NamedTuple):
    """One optimizer slot of a leaf, as `edit_slots` sees it.

    Attributes:
      value: its array.
      kind: what it holds, see `rules.KINDS`.
      init: the constant that `tx.init` fills it with, or None if that is no constant.
    """

    value: jax.Array
    kind: str
    init: float | None


def edited_slots(
    edit: Edit, unit: Unit, leaves: Mapping[str, jax.Array], slots: Sequence[Any], fire: Fire, inputs: Mapping[str, Any]
) -> tuple[jax.Array, ...]:
    """The slots of a unit as `edit_slots` returns them, in their own dtypes; where there are none is nothing to edit.

    Raises:
      UserCodeError: it raised.
      SurgeryFunctionError: it returned other names, shapes or kinds of number.
    """
    if not slots:
        return ()
    method = edit.edit_slots
    assert method is not None
    names = _names(unit)
    given: dict[str, dict[str, SlotValue]] = {path: {} for path in unit.paths}
    for (path, name), slot, value in zip(names, unit.slots, slots, strict=True):
        given[path][name] = SlotValue(_wide(value), slot.kind, slot.init)
    if edit.many:
        result = _called(method, given, {"step": fire.step, **inputs, LEAVES: dict(leaves), "key": fire.key})
        _check_paths(method.name, given, result)
    else:
        [path] = unit.paths
        key = None if fire.key is None else jax.random.fold_in(fire.key, fire.hashes[0])
        with located(path=path):
            ready = {"path": path, "step": fire.step, **inputs, LEAF: leaves[path], "key": key}
            result = {path: _called(method, given[path], ready)}
    for path in unit.paths:
        with located(path=path):
            _check(method.name, given[path], result[path])
    return tuple(like(result[path][name], old) for (path, name), old in zip(names, slots, strict=True))


def _called(method: Method, given: Any, ready: Mapping[str, Any]) -> Any:
    ready = {name: value for name, value in ready.items() if name != "key" or value is not None}
    try:
        return method.function(dict(given), **method.fill(ready))
    except SurgeryError:
        raise
    except Exception as error:
        raise UserCodeError(f"{method.name} raised {type(error).__name__}: {shorten(error)}") from error


def _names(unit: Unit) -> tuple[tuple[str, str], ...]:
    """Path and name of each slot: class and field, and where two of a leaf are alike the place in the state too."""
    plain = [(unit.path(slot), slot.name) for slot in unit.slots]
    counts = Counter(plain)
    return tuple(
        (path, name if counts[path, name] == 1 else f"{name} at {slot.group}")
        for (path, name), slot in zip(plain, unit.slots, strict=True)
    )


def _wide(value: Any) -> jax.Array:
    array = jnp.asarray(value)
    return array.astype(compute_dtype(array.dtype))


def _check_paths(name: str, given: Mapping[str, Any], result: Any) -> None:
    if not isinstance(result, Mapping) or set(result) != set(given):
        raise SurgeryFunctionError(
            f"{name} must return a dict with the paths it was given: {listed(given)}.",
            found=listed(map(repr, result)) or "no paths" if isinstance(result, Mapping) else type(result).__name__,
            write="{path: {name: slot.value for name, slot in of.items()} for path, of in slots.items()}, some edited",
        )


def _check(name: str, given: Mapping[str, SlotValue], result: Any) -> None:
    if not isinstance(result, Mapping) or set(result) != set(given):
        raise SurgeryFunctionError(
            f"{name} must return a dict with the slots it was given: {listed(given)}.",
            found=listed(map(repr, result)) or "no slots" if isinstance(result, Mapping) else type(result).__name__,
            write="{name: slot.value for name, slot in slots.items()}, with some of them edited",
        )
    for slot, old in given.items():
        new = result[slot]
        if not hasattr(new, "dtype") or new.shape != old.value.shape or _is_float(new) != _is_float(old.value):
            raise SurgeryFunctionError(
                f"{name} must return an array like {slot}.",
                found=new if hasattr(new, "dtype") else type(new).__name__,
                write=f"{old.value.dtype} of shape {list(old.value.shape)}",
            )


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
