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
from flax_surgery_hooks.slots import Slot


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
    results, flags, used = [], [], []
    for i, slot in enumerate(unit.slots):
        position = unit.position(slot)
        path, rule = unit.paths[position], operation.rules.rule(slot.kind)
        seed = jnp.zeros((), jnp.float32)
        fresh = None
        with located(path=path):
            if i in gathered:
                assert how is not None
                fresh = how.fresh(path, str(rule))
                seed = (
                    seeds[i] if seeds is not None else _seed(operation, slot, gathered[i], fresh, values[i], how, path)
                )
                result = transport.fill_fresh(gathered[i], fresh, slot.kind, seed)
            elif callable(rule):
                result = _call_rule(rule, slot, path, values[i], params[position], new[position], fire, position)
            elif rule == "reset":
                result = _reset(slot, values[i], new[position])
                fresh = jnp.ones(result.shape, bool)
            else:
                result = _keep(slot, values[i], params[position], new[position])
        results.append(like(result, slots[i]))
        flags.append(fresh)
        used.append(seed)
    return tuple(results), tuple(flags), tuple(used)


def _gather_all(
    operation: Operation, unit: Unit, how: transport.Follow | None, values: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """The moved slots by their index; the slots of one field and kind move together through the edit."""
    if how is None:
        return {}
    together: dict[tuple[str, str], list[int]] = {}
    for i, slot in enumerate(unit.slots):
        if operation.rules.rule(slot.kind) in FOLLOWING:
            together.setdefault((slot.group, slot.kind), []).append(i)
    moved: dict[int, jax.Array] = {}
    for (_, kind), members in together.items():
        owners = {unit.paths[unit.position(unit.slots[i])]: i for i in members}
        for path, i in owners.items():
            _check_layout(unit.slots[i], values[i], how.lineage.old[path], path)
        rule = str(operation.rules.rule(kind))
        arrived = transport.move(how, rule, kind, {path: values[i] for path, i in owners.items()})
        moved.update({i: arrived[path] for path, i in owners.items()})
    return moved


def _check_layout(slot: Slot, value: jax.Array, old: jax.Array, path: str) -> None:
    if value.shape != old.shape:
        raise SlotError(
            f"{slot.name} is shaped {list(value.shape)} for a parameter shaped {list(old.shape)}; slots of another "
            "layout cannot be moved.",
            path=path,
            write=f'opt_state={{"{slot.kind}": "keep"}} for an edit that keeps the shape',
        )


def _seed(
    operation: Operation,
    slot: Slot,
    moved: jax.Array,
    fresh: jax.Array,
    old: jax.Array,
    how: transport.Follow,
    path: str,
) -> jax.Array:
    init = 0.0 if slot.init is None else slot.init
    if not transport.uses_seed(slot.kind) or operation.fresh == "init":
        return jnp.asarray(init, jnp.float32)
    rule = str(operation.rules.rule(slot.kind))
    return transport.mean_if_any_fresh(how, rule, slot.kind, path, moved, fresh, old, init)


def _reset(slot: Slot, value: jax.Array, new: jax.Array) -> jax.Array:
    if slot.kind == "param":
        return new.astype(value.dtype)
    return jnp.full(new.shape, 0.0 if slot.init is None else slot.init, value.dtype)


def _keep(slot: Slot, value: jax.Array, old: Any, new: jax.Array) -> jax.Array:
    if new.shape != jnp.shape(old):
        raise RuleError(
            f"{slot.name} cannot be kept: the edit changes the leaf's shape.",
            found=f"{list(jnp.shape(old))} -> {list(new.shape)}",
            write="opt_state='carry', 'transport' or 'reset'",
        )
    return value


def _call_rule(
    rule: Any, slot: Slot, path: str, value: jax.Array, old: Any, new: jax.Array, fire: Fire, position: int
) -> jax.Array:
    own = None
    if fire.key is not None:
        own = jax.random.fold_in(jax.random.fold_in(fire.key, fire.hashes[position]), zlib.crc32(slot.group.encode()))
    name = getattr(rule, "__name__", type(rule).__name__)
    try:
        result = rule(value, kind=slot.kind, path=path, old=jnp.asarray(old), new=new, key=own)
    except Exception as error:
        raise UserCodeError(
            f"The opt_state function {name} raised {type(error).__name__} on {slot.name}: {shorten(error)}",
            write="def fn(slot, *, kind, path, old, new, key): return slot",
        ) from error
    if not hasattr(result, "shape") or result.shape != new.shape:
        raise RuleError(
            f"The opt_state function {name} must return an array shaped like the new leaf for {slot.name}.",
            found=list(result.shape) if hasattr(result, "shape") else type(result).__name__,
            write=f"an array of shape {list(new.shape)}",
        )
    return result
