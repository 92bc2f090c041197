"""The slots of a unit after an edit, each by its rule."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks import transport
from flax_surgery_hooks.errors import RuleError, SlotError, UserCodeError, located, shorten
from flax_surgery_hooks.operation import FOLLOWING, Fire, Operation, Unit, like
from flax_surgery_hooks.relaid import move_laid, of_neighbours, seed_of
from flax_surgery_hooks.slots import Slot
from flax_surgery_hooks.surgery import path_hash


def move_slots(
    operation: Operation,
    unit: Unit,
    how: transport.Follow | None,
    params: Sequence[Any],
    new: Sequence[jax.Array],
    slots: Sequence[Any],
    fire: Fire,
    seeds: Sequence[jax.Array] | None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...], tuple[jax.Array, ...]]:
    """New slots, which of their elements are fresh, and the seeds that were used."""
    values = [jnp.asarray(slot) for slot in slots]
    gathered = _gather_all(operation, unit, how, values)
    shapes = {path: leaf.shape for path, leaf in zip(unit.after.paths, new, strict=True)}
    moved = move_laid(operation, unit, how, values, shapes, seeds)
    old = dict(zip(unit.paths, params, strict=True))
    results, flags, used = [], [], []
    for i, (slot, origin) in enumerate(zip(unit.after.slots, unit.origins(), strict=True)):
        position = unit.after.position(slot)
        path, rule = unit.after.paths[position], operation.rules.rule(slot.kind)
        seed = jnp.zeros((), jnp.float32)
        fresh = None
        with located(path=path):
            value = values[origin] if origin is not None else _started(unit, i, slot, new[position])
            if i in moved:
                result, seed = moved[i]
            elif i in gathered:
                assert how is not None
                fresh = how.fresh(path, str(rule), tuple(_held(unit, values, slot.group, slot.kind)))
                before = value if origin is not None else _of_neighbours(unit, values, slot, path)
                seed = (
                    seeds[i] if seeds is not None else seed_of(operation, slot, gathered[i], fresh, before, how, path)
                )
                result = transport.fill_fresh(gathered[i], fresh, slot.kind, seed)
            elif callable(rule):
                hashed = fire.hashes[unit.paths.index(path)] if path in old else path_hash(path)
                result = _call_rule(rule, slot, path, value, old.get(path), new[position], fire.key, hashed)
            elif rule == "reset":
                result = _reset(slot, value, new[position])
                fresh = jnp.ones(result.shape, bool)
            else:
                result = _keep(slot, value, old.get(path), new[position])
        results.append(like(result, slots[origin]) if origin is not None else result.astype(value.dtype))
        flags.append(fresh)
        used.append(seed)
    return tuple(results), tuple(flags), tuple(used)


def _started(unit: Unit, place: int, slot: Slot, new: jax.Array) -> jax.Array:
    """The slot of a new leaf as `tx.init` makes it."""
    dtype = unit.after.dtypes[1][place]
    return new.astype(dtype) if slot.kind == "param" else jnp.full(slot.shape(new.shape), slot.init or 0.0, dtype)


def _of_neighbours(unit: Unit, values: Sequence[jax.Array], slot: Slot, path: str) -> jax.Array:
    """What stands for the old slot of a leaf that is new, to take a mean of."""
    return of_neighbours({p: value for p, (_, value) in _held(unit, values, slot.group, slot.kind).items()}, path)


def _gather_all(
    operation: Operation, unit: Unit, how: transport.Follow | None, values: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """The moved slots by their index after the edit; the slots of one field and kind move together through the edit."""
    if how is None:
        return {}
    moved: dict[int, jax.Array] = {}
    for (group, kind), members in _together(operation, unit).items():
        held = _held(unit, values, group, kind)
        for path, (slot, value) in held.items():
            _check_layout(slot, value, how.lineage.old[path], path)
        slots = {path: value for path, (_, value) in held.items()}
        arrived = transport.move(how, str(operation.rules.rule(kind)), kind, slots, list(members))
        moved.update({i: arrived[path] for path, i in members.items()})
    return moved


def _held(unit: Unit, values: Sequence[jax.Array], group: str, kind: str) -> dict[str, tuple[Slot, jax.Array]]:
    """Path -> slot and value before the edit, of one field and kind."""
    return {
        unit.path(slot): (slot, value)
        for slot, value in zip(unit.slots, values, strict=True)
        if (slot.group, slot.kind) == (group, kind)
    }


def _together(operation: Operation, unit: Unit) -> dict[tuple[str, str], dict[str, int]]:
    """Field and kind -> path -> index of the slot after the edit, for those that follow the edit."""
    together: dict[tuple[str, str], dict[str, int]] = {}
    for i, slot in enumerate(unit.after.slots):
        if operation.rules.rule(slot.kind) in FOLLOWING and slot.laid is None:
            together.setdefault((slot.group, slot.kind), {})[unit.after.path(slot)] = i
    return together


def _check_layout(slot: Slot, value: jax.Array, old: jax.Array, path: str) -> None:
    if value.shape != old.shape:
        raise SlotError(
            f"{slot.name} is shaped {list(value.shape)} for a parameter shaped {list(old.shape)}; slots of another "
            "layout cannot be moved.",
            path=path,
            write=f'opt_state={{"{slot.kind}": "keep"}} for an edit that keeps the shape',
        )


def _reset(slot: Slot, value: jax.Array, new: jax.Array) -> jax.Array:
    if slot.kind == "param":
        return new.astype(value.dtype)
    return jnp.full(slot.shape(new.shape), 0.0 if slot.init is None else slot.init, value.dtype)


def _keep(slot: Slot, value: jax.Array, old: Any, new: jax.Array) -> jax.Array:
    if old is None or new.shape != jnp.shape(old):
        raise RuleError(
            f"{slot.name} cannot be kept: "
            + ("there is none, as the edit adds the leaf." if old is None else "the edit changes the leaf's shape."),
            found=None if old is None else f"{list(jnp.shape(old))} -> {list(new.shape)}",
            write="opt_state='carry', 'transport' or 'reset'",
        )
    return value


def _call_rule(
    rule: Any, slot: Slot, path: str, value: jax.Array, old: Any, new: jax.Array, key: Any, hashed: Any
) -> jax.Array:
    own = None
    if key is not None:
        own = jax.random.fold_in(jax.random.fold_in(key, hashed), zlib.crc32(slot.group.encode()))
    name = getattr(rule, "__name__", type(rule).__name__)
    try:
        before = None if old is None else jnp.asarray(old)
        result = rule(value, kind=slot.kind, path=path, old=before, new=new, key=own)
    except Exception as error:
        raise UserCodeError(
            f"The opt_state function {name} raised {type(error).__name__} on {slot.name}: {shorten(error)}",
            write="def fn(slot, *, kind, path, old, new, key): return slot",
        ) from error
    shape = slot.shape(new.shape)
    if not hasattr(result, "shape") or result.shape != shape:
        raise RuleError(
            f"The opt_state function {name} must return an array of the slot's new shape for {slot.name}.",
            found=list(result.shape) if hasattr(result, "shape") else type(result).__name__,
            write=f"an array of shape {list(shape)}",
        )
    return result
