"""Surgeries that say themselves what becomes of a leaf's optimizer slots, in place of a rule.

Such a surgery is a class with a method `edit_slots(slots)` beside `__call__(leaf)`, which then mostly returns the leaf
as it is. `slots` maps the name of each slot of the leaf, such as "ScaleByAdamState.mu", to a `SlotValue`; a dict from
the same names to arrays of the same shapes comes back. Further parameters are filled by name: `leaf` (after the edit),
`path`, `key` (the leaf's own), `step`, and the trainer's inputs. Values come as float32 where they are stored in fewer
bits, and go back to their dtype. It runs, is measured, guarded and placed with the edit of the leaf.
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
from flax_surgery_hooks.slots import Slot
from flax_surgery_hooks.surgery import LEAF, Method


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
    method: Method, unit: Unit, leaf: jax.Array, slots: Sequence[Any], fire: Fire, inputs: Mapping[str, Any]
) -> tuple[jax.Array, ...]:
    """The slots of a leaf as `edit_slots` returns them, in their own dtypes; a leaf without slots has nothing to edit.

    Raises:
      UserCodeError: it raised.
      SurgeryFunctionError: it returned other names, shapes or kinds of number.
    """
    if not slots:
        return ()
    path = unit.paths[0]
    names = _names(unit.slots)
    given = {
        name: SlotValue(_wide(value), slot.kind, slot.init)
        for name, slot, value in zip(names, unit.slots, slots, strict=True)
    }
    ready = {"path": path, "step": fire.step, **inputs, LEAF: leaf}
    if fire.key is not None:
        ready["key"] = jax.random.fold_in(fire.key, fire.hashes[0])
    with located(path=path):
        try:
            result = method.function(dict(given), **method.fill(ready))
        except SurgeryError:
            raise
        except Exception as error:
            raise UserCodeError(f"{method.name} raised {type(error).__name__}: {shorten(error)}") from error
        _check(method.name, given, result)
    return tuple(like(result[name], old) for name, old in zip(names, slots, strict=True))


def _names(slots: Sequence[Slot]) -> tuple[str, ...]:
    """A name for each slot of a leaf: class and field, and where two are alike the place in the state too."""
    counts = Counter(slot.name for slot in slots)
    return tuple(slot.name if counts[slot.name] == 1 else f"{slot.name} at {slot.group}" for slot in slots)


def _wide(value: Any) -> jax.Array:
    array = jnp.asarray(value)
    return array.astype(compute_dtype(array.dtype))


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
