"""Slots of other layouts after an edit: lifted to their parameter, moved, lowered back; and where fresh ones start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks import transport
from flax_surgery_hooks.layouts import Laid
from flax_surgery_hooks.operation import FOLLOWING, NOTHING, Operation, Side, Unit
from flax_surgery_hooks.reductions import totals
from flax_surgery_hooks.slots import Slot


class _Bundle(NamedTuple):
    """The slots of one leaf that are lifted together: their indices, in order."""

    slots: tuple[Slot, ...]
    members: tuple[int, ...]

    @property
    def laid(self) -> Laid:
        laid = self.slots[0].laid
        assert laid is not None
        return laid


def move_laid(
    operation: Operation,
    unit: Unit,
    how: transport.Follow | None,
    values: Sequence[jax.Array],
    shapes: Mapping[str, tuple[int, ...]],
    seeds: Sequence[jax.Array] | None,
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """The slots of other layouts that follow an edit.

    Args:
      operation: the surgery and its rules.
      unit: its leaves.
      how: what slots need to know of the edit, None if nothing follows it.
      values: the slots before.
      shapes: path -> shape of the leaf after the edit.
      seeds: what fresh second moments start from, from an earlier pass, or None to compute them.

    Returns:
      Index among the slots after the edit -> new slot, and the seed that was used.
    """
    moved: dict[int, tuple[jax.Array, jax.Array]] = {}
    before = _bundles(unit)
    for (name, kind), bundles in _bundles(unit.after).items():
        rule = operation.rules.rule(kind)
        if rule not in FOLLOWING or how is None:
            continue
        held = before.get((name, kind), {})
        old = {path: [values[i] for i in bundle.members] for path, bundle in held.items()}
        moving = [path for path, bundle in bundles.items() if bundle.laid.action(rule, shapes[path]) == "move"]
        if moving:
            moved |= _moved(operation, how, {path: bundles[path] for path in moving}, held, old, shapes, seeds)
        for path in (path for path in bundles if path not in moving):
            keeps = path in old and bundles[path].laid.action(rule, shapes[path]) == "keep"
            for place, (slot, i) in enumerate(zip(*bundles[path], strict=True)):
                part = old[path][place] if path in old else None
                value = part if keeps and part is not None else _restarted(operation, slot, part, shapes[path])
                moved[i] = (value, jnp.zeros((), jnp.float32))
    return moved


def _bundles(side: Side) -> dict[tuple[str, str], dict[str, _Bundle]]:
    """Bundle and kind -> path -> its slots."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for i, slot in enumerate(side.slots):
        if slot.laid is not None:
            found.setdefault((slot.laid.bundle, slot.kind), {}).setdefault(side.path(slot), []).append(i)
    return {
        key: {path: _Bundle(tuple(side.slots[i] for i in places), tuple(places)) for path, places in by_path.items()}
        for key, by_path in found.items()
    }


def _moved(
    operation: Operation,
    how: transport.Follow,
    bundles: Mapping[str, _Bundle],
    held: Mapping[str, _Bundle],
    old: Mapping[str, Sequence[jax.Array]],
    shapes: Mapping[str, tuple[int, ...]],
    seeds: Sequence[jax.Array] | None,
) -> dict[int, tuple[jax.Array, jax.Array]]:
    first = next(iter(bundles.values())).slots[0]
    rule, kind = str(operation.rules.rule(first.kind)), first.kind
    lifted = {path: _lifted(bundle.laid, old[path]) for path, bundle in held.items()}
    stacked = bundles[next(iter(bundles))].laid.layout.stacked

    def move(slots: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return transport.move(how, rule, kind, slots, list(bundles))

    arrived = jax.vmap(move)(lifted) if stacked else move(lifted)
    moved = {}
    for path, bundle in bundles.items():
        slot, seed_at = bundle.slots[0], bundle.members[0]
        fresh = how.fresh(path, rule, tuple(held))
        start = lifted[path] if path in lifted else of_neighbours(lifted, path)
        given = (arrived[path], fresh, start)
        seed = seeds[seed_at] if seeds is not None else seed_of(operation, slot, *given, how, path)
        filled = transport.fill_fresh(arrived[path], fresh, kind, seed)
        parts = bundle.laid.layout.lower(filled, [one.shape(shapes[path]) for one in bundle.slots])
        if path in lifted and lifted[path].shape == filled.shape:
            # What has not moved stays bitwise, which lifting and lowering does not promise.
            still = jnp.all(filled == lifted[path])
            parts = [
                jnp.where(still, part, after) if part.shape == after.shape else after
                for part, after in zip(old[path], parts, strict=True)
            ]
        for i, part in zip(bundle.members, parts, strict=True):
            moved[i] = (part, seed)
    return moved


def _lifted(laid: Laid, parts: Sequence[jax.Array]) -> jax.Array:
    wide = [part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in parts]
    return laid.layout.lift(wide, laid.leaf)


def _restarted(operation: Operation, slot: Slot, old: jax.Array | None, leaf: tuple[int, ...]) -> jax.Array:
    """A slot that cannot be moved: as `tx.init` makes it, but second moments from the mean of the old ones."""
    dtype = jnp.float32 if old is None else old.dtype
    start: Any = slot.init or 0.0
    if old is not None and old.size and transport.uses_seed(slot.kind) and operation.fresh == "mean":
        start = (totals([old.astype(jnp.float32)])[0] / float(old.size)).astype(dtype)
    return jnp.full(slot.shape(leaf), start, dtype)


def restarted(operation: Operation, unit: Unit, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The slots that a fire could not move and made anew, as "Class.field path"; arguments as for `move_laid`."""
    return tuple(
        f"{slot.name} {unit.after.path(slot)}"
        for slot in unit.after.slots
        if slot.laid is not None
        and operation.rules.rule(slot.kind) in FOLLOWING
        and slot.laid.action(operation.rules.rule(slot.kind), shapes[unit.after.path(slot)]) == "restart"
    )


def seed_of(
    operation: Operation,
    slot: Slot,
    moved: jax.Array,
    fresh: jax.Array,
    old: jax.Array,
    how: transport.Follow,
    path: str,
) -> jax.Array:
    """What the fresh elements of a moved slot start from, broadcast against it."""
    init = 0.0 if slot.init is None else slot.init
    if not transport.uses_seed(slot.kind) or operation.fresh == "init" or slot.counted:
        return jnp.asarray(init, jnp.float32)
    rule = str(operation.rules.rule(slot.kind))
    return transport.mean_if_any_fresh(how, rule, slot.kind, path, moved, fresh, old, init)


def of_neighbours(held: Mapping[str, jax.Array], path: str) -> jax.Array:
    """What stands for the old slot of a leaf that is new, to take a mean of: one element, the mean of its neighbours'.

    Neighbours are the leaves that the surgery was given under the same last name (kernels of a kernel), else all. With
    nothing there second moments would start from zero, which optax never bias-corrects in the middle of a run.
    """
    held = {other: value for other, value in held.items() if value.size}
    alike = [value for other, value in held.items() if other.split("/")[-1] == path.split("/")[-1]]
    chosen = alike or list(held.values())
    if not chosen:
        return jnp.asarray(NOTHING)
    total = sum(totals([value.astype(jnp.float32)])[0] for value in chosen)
    return jnp.reshape(total / float(sum(value.size for value in chosen)), (1,))
