"""Several searches at once, in one loop, for integers above which so many elements lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

THRESHOLDS = 7
"""In one pass: a whole search takes as long with 15 on two cores, and compiles longer. Not measured elsewhere."""

Count = Callable[[jax.Array], jax.Array]
"""From thresholds [..., `THRESHOLDS`] to how many elements lie above each, int32 of that shape."""

_SHRINKS = 8


class Bracket(NamedTuple):
    """What searches know so far; arrays of one shape, an element for each search.

    Attributes:
      low: an integer above which at least as many elements lie as are searched for.
      high: one above which at most so many lie.
      above_low: how many lie above `low`, int32.
      above_high: how many lie above `high`, int32.
      start: where the thresholds of the next pass begin, from `low` on.
      stop: where they end, up to `high`.
    """

    low: jax.Array
    high: jax.Array
    above_low: jax.Array
    above_high: jax.Array
    start: jax.Array
    stop: jax.Array

    def found(self, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The integers above which all elements are taken, and how many of those equal to them are wanting to `k`."""
        cut = jnp.where(self.above_low == k, self.low, self.high)
        return cut, k - jnp.where(self.above_low == k, k, self.above_high)


def whole(low: jax.Array, high: jax.Array, above_low: jax.Array) -> Bracket:
    """The bracket of searches that know nothing yet; no element lies above `high`."""
    return Bracket(low, high, above_low, jnp.zeros_like(above_low), low, high)


def search(count: Count, k: jax.Array, bracket: Bracket) -> Bracket:
    """Narrows brackets until above one end lie exactly k elements, or nothing is left between the ends.

    Args:
      count: counts the elements of each search.
      k: how many are searched for, int32; between `above_high` and `above_low`.
      bracket: where to begin.
    """

    def goes_on(bracket: Bracket) -> jax.Array:
        found = (bracket.above_low == k) | (bracket.above_high == k) | (_between(bracket.low, bracket.high) <= 1)
        return jnp.any(~found)

    return jax.lax.while_loop(goes_on, lambda bracket: _narrowed(count, k, bracket), bracket)


def _narrowed(count: Count, k: jax.Array, old: Bracket) -> Bracket:
    """One pass. Some of its thresholds lie between the ends whenever two passes before it gained nothing."""
    thresholds = _spread(old.start, old.stop)
    above = count(thresholds)
    low, high, k_ = old.low[..., None], old.high[..., None], k[..., None]
    enough = above >= k_
    new = Bracket(
        jnp.where(enough, thresholds, low).max(-1),
        jnp.where(enough, high, thresholds).min(-1),
        jnp.where(enough, above, old.above_low[..., None]).min(-1),
        jnp.where(enough, old.above_high[..., None], above).max(-1),
        old.start,
        old.stop,
    )
    shrunk = _between(new.low, new.high) <= _between(old.low, old.high) // _SHRINKS
    start, stop = _likely(new, k)
    return new._replace(start=jnp.where(shrunk, start, new.low), stop=jnp.where(shrunk, stop, new.high))


def _spread(start: jax.Array, stop: jax.Array) -> jax.Array:
    """Integers that divide intervals evenly, [..., `THRESHOLDS`]; one lies strictly inside, where there is room."""
    between = _between(start, stop)[..., None]
    parts = jnp.array(THRESHOLDS + 1, between.dtype)
    steps = jnp.arange(1, THRESHOLDS + 1).astype(between.dtype).reshape((1,) * start.ndim + (-1,))
    return _plus(start[..., None], between // parts * steps + between % parts * steps // parts)


def _likely(bracket: Bracket, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the sought integers lie, nine times out of ten or more, if elements are spread evenly in their bracket.

    Of n such elements the one of a given rank has a standard deviation of at most sqrt(n) / 2 ranks; here are four to
    each side.
    """
    held = jnp.maximum(bracket.above_low - bracket.above_high, 1).astype(jnp.float32)
    at = (bracket.above_low - k).astype(jnp.float32) / held
    around = 2 / jnp.sqrt(held)
    between = _between(bracket.low, bracket.high)

    def part(fraction: jax.Array) -> jax.Array:
        inside = jnp.clip(fraction, 0, 1 - 2**-23) * between.astype(jnp.float32)  # not to round to 2**32
        return _plus(bracket.low, jnp.minimum(inside.astype(between.dtype), between))

    return part(at - around), part(at + around)


def _between(low: jax.Array, high: jax.Array) -> jax.Array:
    """high - low, which may be more than their type holds."""
    return jax.lax.bitcast_convert_type(high - low, jnp.dtype(f"u{low.dtype.name}"))


def _plus(low: jax.Array, offset: jax.Array) -> jax.Array:
    return low + jax.lax.bitcast_convert_type(offset, low.dtype)
