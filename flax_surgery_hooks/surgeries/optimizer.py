"""Surgeries on what the optimizer remembers of leaves; the leaves stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import InputError, SlotError, SurgeryFunctionError, quoted
from flax_surgery_hooks.paths import close_matches, listed
from flax_surgery_hooks.rules import KINDS
from flax_surgery_hooks.slot_edits import SlotValue

FIRST = ("grad", "update", "grad_sq", "grad_abs")
"""Kinds whose size says how much history an element has, the first moment before all."""


@dataclass(frozen=True)
class ResetMoments:
    """Puts optimizer slots of a leaf back to what `tx.init` fills them with, wholly or in part; counts stay.

    In part, one mask serves all slots of a leaf. Second moments of zero beside a count that stays make Adam's next
    updates several times the learning rate: `kinds=("grad",)` leaves them, and `fsh.optax.rewarm` with `Rewarm` lets
    the updates grow again from small ones.

    Args:
      kinds: kinds of slots to reset, see `rules.KINDS`; None for all but copies of the parameters. Such a copy
        ("param") is reset to the leaf.
      fraction: the part of the elements to reset, from 0 to 1: exactly `round(fraction * size)` of each leaf.
      by: which: "all" (then `fraction` is 1), "magnitude": those with the smallest first moment by absolute value (the
        smallest second moment, where there is no first), equal ones from the front; or "random", drawn by the key.

    Source: ReLoRA, Lialin et al. 2023 (arXiv 2307.05695), whose released code draws a mask for each moment: an element
    that keeps its first and loses its second moment then moves by hundreds of learning rates.

    >>> import optax, flax_surgery_hooks as fsh
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(4)}, tx=optax.sgd(0.1, momentum=0.9))
    >>> state = state.apply_gradients(grads={"w": jnp.array([4.0, -3.0, 2.0, 1.0])})
    >>> state, _ = fsh.operate(state, ResetMoments(fraction=0.5, by="magnitude"))
    >>> state.opt_state[0].trace["w"].tolist()
    [4.0, -3.0, 0.0, 0.0]
    """

    kinds: tuple[str, ...] | None = None
    fraction: float = 1.0
    by: Literal["all", "magnitude", "random"] = "all"
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        for kind in self.kinds if self.kinds is not None else ():
            if kind not in KINDS[:-1]:
                raise SurgeryFunctionError(
                    "ResetMoments(kinds=...) names a kind of slot that does not exist.",
                    found=quoted(kind),
                    write=listed(close_matches(str(kind), KINDS[:-1])) or f"some of {', '.join(KINDS[:-1])}",
                )
        fraction = self.fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise SurgeryFunctionError(
                "ResetMoments(fraction=...) is a number from 0 to 1.", found=quoted(fraction), write="fraction=0.9"
            )
        if self.by not in ("all", "magnitude", "random") or (self.by == "all" and fraction < 1):
            raise SurgeryFunctionError(
                "ResetMoments(by=...) says which elements to reset, where `fraction` says how many.",
                found=f"by={self.by!r}, fraction={fraction}",
                write='by="magnitude" or by="random"; by="all" with fraction=1.0',
            )

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """The leaf as it is."""
        return leaf

    def edit_slots(
        self, slots: Mapping[str, SlotValue], /, leaf: jax.Array, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The slots after it."""
        chosen = [name for name, slot in slots.items() if self._resets(slot.kind)]
        if not chosen:
            raise SlotError(
                "ResetMoments finds no slot of these kinds.",
                found=", ".join(f"{name}: {slot.kind}" for name, slot in slots.items()),
                write=f"kinds= with one of these, or exclude= with this path; asked for {listed(self.kinds or KINDS)}",
            )
        new = {name: slot.value for name, slot in slots.items()}
        mask = None if self.fraction == 1 else self._mask(slots, leaf, key)
        for name in chosen:
            start = start_of(name, slots[name], leaf)
            new[name] = start if mask is None else _masked(name, mask, start, new[name])
        return new

    def _resets(self, kind: str) -> bool:
        return kind not in ("param", "none") if self.kinds is None else kind in self.kinds

    def _mask(self, slots: Mapping[str, SlotValue], leaf: jax.Array, key: jax.Array | None) -> jax.Array:
        """Which elements are reset."""
        count = round(self.fraction * leaf.size)
        if self.by == "random":
            if key is None:
                raise InputError("ResetMoments(by='random') draws random numbers.", write="key=jax.random.key(0)")
            return smallest(jax.random.bits(key, leaf.shape), count)
        sizes = [slot.value for kind in FIRST for slot in slots.values() if slot.kind == kind]
        sizes = [value for value in sizes if value.shape == leaf.shape]
        if not sizes:
            raise SlotError(
                "ResetMoments(by='magnitude') finds no moments of the leaf's shape to go by.",
                found=", ".join(f"{name}: {slot.kind}" for name, slot in slots.items()),
                write='by="random"',
            )
        return smallest(_bits(jnp.abs(sizes[0])), count)


def start_of(name: str, slot: SlotValue, leaf: jax.Array) -> jax.Array:
    """What `tx.init` makes of a slot."""
    if slot.kind == "param" and slot.value.shape == leaf.shape:
        return leaf.astype(slot.value.dtype)
    if slot.kind == "param" or slot.init is None:
        raise SlotError(
            f"`tx.init` fills {name} with no constant, so that it cannot be reset.",
            found=f"a slot of kind {slot.kind}",
            write=f"kinds= without {slot.kind!r}, or exclude= with this path",
        )
    return jnp.full(slot.value.shape, slot.init, slot.value.dtype)


def _masked(name: str, mask: jax.Array, start: jax.Array, old: jax.Array) -> jax.Array:
    if old.shape != mask.shape:
        raise SlotError(
            f"{name} has another shape than its parameter, so that no part of it can be reset.",
            found=f"{list(old.shape)} for {list(mask.shape)}",
            write="fraction=1.0, kinds= without it, or exclude= with this path",
        )
    return jnp.where(mask, start, old)


def _bits(sizes: jax.Array) -> jax.Array:
    """Unsigned integers in the order of these non-negative floats; NaN is the largest."""
    return jax.lax.bitcast_convert_type(sizes, jnp.uint64 if sizes.dtype.itemsize == 8 else jnp.uint32)


def smallest(values: jax.Array, count: int) -> jax.Array:
    """Which are the `count` smallest of some unsigned integers; of equal ones those that come first.

    Found by counting, bit for bit, over the values and then over the places of the equal ones: to sort the places of a
    large leaf takes several times as long, and would gather a sharded one.

    Args:
      values: unsigned integers, fewer than 2**32.
      count: how many.

    Returns:
      Booleans of the same shape, `count` of them True.

    >>> smallest(jnp.array([3, 1, 2, 1], jnp.uint32), 1).tolist()
    [False, True, False, False]
    """
    if count == 0 or count == values.size:
        return jnp.full(values.shape, count > 0)
    last = _rank(values, jnp.ones(values.shape, bool), count)
    less, equal = values < last, values == last
    rest = count - _count(less)
    among_equal = functools.partial(_first, equal, rest)
    return less | jax.lax.cond(rest == _count(equal), lambda: equal, among_equal)


def _first(flags: jax.Array, count: jax.Array) -> jax.Array:
    """The first `count` of some elements."""
    place = jnp.zeros(flags.shape, jnp.uint32)
    for axis, size in enumerate(flags.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, flags.shape, axis)
    return flags & (place <= _rank(place, flags, count))


def _rank(values: jax.Array, among: jax.Array, count: jax.Array | int) -> jax.Array:
    """The largest of the `count` smallest values among some."""
    bits = values.dtype.itemsize * 8
    wanted = jnp.asarray(count, jnp.uint32)

    def settle(i: jax.Array, known: jax.Array) -> jax.Array:
        bit = jnp.left_shift(jnp.ones((), values.dtype), (bits - 1 - i).astype(values.dtype))
        # With this bit unset too few lie at or below: then it is set.
        return jnp.where(_count(among & (values < (known | bit))) < wanted, known | bit, known)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros((), values.dtype))


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.uint32)
