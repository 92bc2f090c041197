"""How optimizer slots follow an edit: lineage and chain rule, kind by kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.lineage import Lineage, Tree, gradient_share, ones_like, safe_divide
from flax_surgery_hooks.reductions import sums, totals

SECOND_MOMENTS = ("grad_sq", "grad_abs")


@dataclass(frozen=True)
class Follow:
    """What slots need to know of one edit.

    Attributes:
      lineage: the edit's derivative.
      share: the factor b of each new element's gradient, or None where no slot is transported.
      fold: B^T, from slots of old leaves to slots of new ones, or None.
      in_place: the edit mixes but keeps its shape, and slots stay where they are.
    """

    lineage: Lineage
    share: Tree | None
    fold: Callable[[Tree], Tree] | None
    in_place: bool

    def fresh(self, path: str, rule: str, held: Collection[str] | None = None) -> jax.Array:
        """Which elements of a new leaf have no history, as booleans.

        Args:
          path: of the new leaf.
          rule: "transport" or "carry".
          held: the old leaves whose history there is, by default all: elements of others arrive without.
        """
        coefficient = self.lineage.coefficient[path]
        if self.in_place:
            return jnp.zeros(coefficient.shape, bool)
        if held is None or len(held) >= len(self.lineage.old):
            weights = None  # a tree of ones for each slot of each leaf would take long to trace
        else:
            ones = ones_like(self.lineage.old)
            weights = {old: one if old in held else jnp.zeros_like(one) for old, one in ones.items()}
        if rule == "transport" and self.fold is not None:
            assert self.share is not None
            return (self.share if weights is None else self.fold(weights))[path] == 0
        return (coefficient if weights is None else self.lineage.push(weights)[path]) == 0


def follow(
    lineage: Lineage,
    *,
    transports: bool,
    fold: Callable[[Tree], Tree] | None,
    in_place: bool,
    name: str,
) -> Follow:
    """Prepares what the slots of an edit follow.

    Args:
      lineage: the edit's derivative.
      transports: whether any slot follows by the chain rule.
      fold: the transpose of the surgery's `fold_back`, or None.
      in_place: whether slots stay where they are because the edit mixes.
      name: the surgery, for errors.

    Raises:
      DifferentiationError: the chain rule is asked for and the edit has no transpose.
    """
    share = None
    if transports:
        share = fold(ones_like(lineage.old)) if fold is not None else gradient_share(lineage, name)
    return Follow(lineage, share, fold, in_place)


def move(how: Follow, rule: str, kind: str, slots: Tree, paths: Sequence[str]) -> Tree:
    """The slots of one kind at the new elements; fresh elements hold 0, or the new value for copies of parameters.

    Args:
      how: the edit.
      rule: "transport" or "carry".
      kind: see `rules.KINDS`.
      slots: path -> slot, shaped like the old leaf. A leaf without a slot of this sort has no entry.
      paths: the new leaves that have such a slot.

    Returns:
      path -> slot, shaped like the new leaf; all in the widest dtype of `slots`, if they differ.
    """
    if how.in_place and kind != "param":
        return {path: slots[path] for path in paths}
    slots = _of_one_dtype(slots)
    if kind == "param":
        return _move_copies(how, slots, paths)
    if rule == "transport" and how.fold is not None:
        return _fold(how, kind, slots, paths)
    gathered = how.lineage.gather(slots, paths)
    if rule == "carry":
        return gathered
    assert how.share is not None
    return {path: _scaled(gathered[path], kind, how.share[path], how.lineage.coefficient[path]) for path in paths}


def _of_one_dtype(slots: Tree) -> Tree:
    """Slots of which any may take the place of any other: widening is exact, and so is the way back."""
    dtypes = {slot.dtype for slot in slots.values()}
    if len(dtypes) <= 1:
        return slots
    wide = jnp.result_type(*dtypes)
    return {path: slot.astype(wide) for path, slot in slots.items()}


def _scaled(slot: jax.Array, kind: str, share: jax.Array, coefficient: jax.Array) -> jax.Array:
    wide = slot.astype(jnp.promote_types(slot.dtype, share.dtype))
    match kind:
        case "grad":
            wide = share * wide
        case "grad_sq":
            wide = share * (share * wide)  # never share^2: it under- and overflows where the product does not
        case "grad_abs":
            wide = jnp.abs(share) * wide
        case "update":
            wide = jnp.sign(share) * wide
        case "param_diff":
            wide = coefficient * wide
    return wide.astype(slot.dtype)


def _fold(how: Follow, kind: str, slots: Tree, paths: Sequence[str]) -> Tree:
    """Slots by the transpose of `fold_back`: exact for copies that share unequally, and for the zeros between
    copies.
    """
    assert how.fold is not None
    assert how.share is not None
    wide = {
        path: slots[path].astype(leaf.dtype) if path in slots else jnp.zeros_like(leaf)
        for path, leaf in how.lineage.old.items()
    }
    folded = how.lineage.push(wide) if kind == "param_diff" else how.fold(wide)
    moved = {}
    for path in paths:
        share, value = how.share[path], folded[path]
        match kind:
            case "grad_sq":
                value = share * value
            case "grad_abs":
                value = jnp.sign(share) * value
            case "update":
                value = safe_divide(value, jnp.abs(share))
            case "invariant":
                value = safe_divide(value, share)
        moved[path] = value.astype(_dtype(slots, value))
    return moved


def _dtype(slots: Tree, value: jax.Array) -> Any:
    return next((slot.dtype for slot in slots.values()), value.dtype)


def _move_copies(how: Follow, slots: Tree, paths: Sequence[str]) -> Tree:
    """`new + J (slot - old)`: where a copy of the parameters lies after the edit; bitwise still where nothing
    changed.
    """
    old, new = how.lineage.old, how.lineage.new
    offsets = {
        path: slots[path].astype(leaf.dtype) - leaf if path in slots else jnp.zeros_like(leaf)
        for path, leaf in old.items()
    }
    pushed = how.lineage.push(offsets)
    moved = {}
    for path in paths:
        value = (new[path] + pushed[path]).astype(_dtype(slots, new[path]))
        if path in slots and new[path].shape == old[path].shape:
            still = (new[path] == old[path]) & (how.lineage.coefficient[path] == 1)
            value = jnp.where(still, slots[path], value)
        moved[path] = value
    return moved


def fill_fresh(moved: jax.Array, fresh: jax.Array, kind: str, seed: jax.Array | float) -> jax.Array:
    """Puts the starting value into the fresh elements of a moved slot.

    Args:
      moved: the slot after `move`.
      fresh: which elements have no history.
      kind: see `rules.KINDS`.
      seed: what second moments and invariants start from; broadcasts against the slot.
    """
    if kind == "param":
        return moved
    start = jnp.asarray(seed if kind in (*SECOND_MOMENTS, "invariant") else 0.0).astype(moved.dtype)
    return jnp.where(fresh, start, moved)


def mean_of_survivors(moved: jax.Array, fresh: jax.Array, old: jax.Array, init: float) -> jax.Array:
    """What second moments of fresh elements start from, per index of the last axis.

    The mean over the elements with history that share the last index (the output unit of a kernel), else over those of
    the leaf, else, where nothing survives, over the old leaf; `init` if that is empty too. Zero, as the papers have it,
    would be a trap: optax counts steps once for all elements, so a zeroed second moment is never bias-corrected.

    Args:
      moved: the moved slot.
      fresh: which elements of it have no history.
      old: the slot before the edit.
      init: what `tx.init` puts there.

    Returns:
      A float32 array that broadcasts against `moved`.
    """
    alive = jnp.where(fresh, 0.0, 1.0)
    over = range(moved.ndim - 1)

    def mean(count: jax.Array, total: jax.Array, before: jax.Array) -> jax.Array:
        everywhere = before.sum() / float(old.size) if old.size else jnp.asarray(init, jnp.float32)
        whole = jnp.where(count.sum() > 0, total.sum() / jnp.maximum(count.sum(), 1), everywhere)
        return jnp.where(count > 0, total / jnp.maximum(count, 1), whole)

    if old.shape == moved.shape:
        return sums([alive, moved * alive, old], over, mean)
    count, total = sums([alive, moved * alive], over, lambda *both: jnp.stack(both))
    return mean(count, total, totals([old])[0])


def mean_if_any_fresh(
    how: Follow, rule: str, kind: str, path: str, moved: jax.Array, fresh: jax.Array, old: jax.Array, init: float
) -> jax.Array:
    """`mean_of_survivors`, without a pass over the slot where it is cheap to see that every element has history.

    Cheap is a coefficient that is the same all along an axis. Elements that stay in place are moved once more for the
    mean rather than taken from `moved`, which XLA would have to store for it.
    """
    diagonal = how.lineage.diagonal if how.fold is None and not how.in_place else None
    if diagonal is None:
        return mean_of_survivors(moved, fresh, old, init)
    lost = diagonal.coefficient[path] == 0

    def mean() -> jax.Array:
        again = move(how, rule, kind, {path: jax.lax.optimization_barrier(old)}, [path])[path]
        return mean_of_survivors(again, jnp.broadcast_to(lost, old.shape), old, init)

    if lost.size * 8 > old.size:
        return mean()
    shape = jax.eval_shape(mean)
    return jax.lax.cond(jnp.any(lost), mean, lambda: jnp.full(shape.shape, init, shape.dtype))


def uses_seed(kind: str) -> bool:
    """Whether fresh elements of this kind of slot start from a value that has to be computed."""
    return kind in SECOND_MOMENTS
