"""How far a sparsity has come, and how many weights that leaves, at a step.

A number that is kept decides which weights live, so it must not depend on how XLA fuses: inside a train step and by
itself a float may differ in its last bit, for a product and a sum become one rounding or two. Everything here is
integer arithmetic in units of 2**-24, which float32 holds exactly; what a float shows is never rounded again.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import ScheduleError, quoted

_BITS = 24
_ONE = 1 << _BITS
_HALF_BITS = _BITS // 2
_LOW = (1 << _HALF_BITS) - 1
# The division shifts a remainder by four bits, which int32 has to hold.
_MAX_STEPS = 1 << 27
# Of (1 - cos(pi y / 2)) / 2 as a series in y ** 2, alternating, from its highest power; the next would add 3e-9.
_COSINE = tuple(round((math.pi / 2) ** n / math.factorial(n) / 2 * _ONE) for n in (12, 10, 8, 6, 4, 2))


def progress(step: Any, begin: int, end: int, power: float = 3.0) -> Any:
    """How much of the way a ramp has gone: `1 - (1 - u) ** power`, where u goes from 0 at `begin` to 1 at `end`.

    With power 3, the ramp of Zhu & Gupta 2017 (arXiv 1710.01878): a sparsity that falls quickly where there is much to
    drop, and slowly at its end. Exactly 0 up to `begin` and exactly 1 from `end` on; it never falls.

    Args:
      step: value of `state.step`, an int or an int32 array, concrete or traced.
      begin: the last step of no progress.
      end: the first step of full progress, at most 2**27 after `begin`.
      power: 1 for a straight line, 3 for the cubic; a whole number, so that it is multiplications alone.

    Returns:
      A multiple of 2**-24: a float for an int, else a float32 scalar. Both are the same number.

    Raises:
      ScheduleError: the ramp ends before it begins, is too long, or another power.

    >>> [progress(step, 0, 1000) for step in (0, 500, 1000)]
    [0.0, 0.875, 1.0]
    """
    _check_ramp(begin, end, power)
    # A ramp that ends where it begins is a jump at this step.
    left = _ONE - _fraction(step, min(begin, end - 1), end)
    return _as_float(_ONE - functools.reduce(_product, [left] * int(power)))


def share(count: Any, fraction: Any) -> Any:
    """`count * fraction` to the nearest integer, the same wherever it is computed.

    Args:
      count: not negative, an int or an int32 array, concrete or traced.
      fraction: from 0 to 1; what is finer than 2**-24 is rounded.

    Returns:
      An int where both are Python's, else an int32 scalar; 0 of fraction 0, `count` of fraction 1.

    >>> share(10, 0.25), int(share(jnp.int32(1000), 0.271))
    (3, 271)
    """
    parts = _as_parts(fraction)
    # Whole multiples of 2**24 apart from the rest, whose product with a fraction is all that has to be rounded.
    return (count >> _BITS) * parts + _product(count & (_ONE - 1), parts)


def kept_at(progress: Any, *, first: int, last: int) -> Any:
    """How many units are kept, on the way from `first` to `last`.

    Args:
      progress: from 0 to 1, as `progress` gives it.
      first: the number at 0.
      last: the number at 1, larger or smaller.

    Returns:
      The nearest integer: exactly `first` and `last` at the ends, and between them as monotone as the progress. An int
      for a float, else an int32 scalar.

    >>> [kept_at(progress(step, 0, 1000), first=1000, last=100) for step in (0, 100, 500, 1000)]
    [1000, 756, 212, 100]
    """
    gone = share(abs(last - first), progress)
    return first + gone if last >= first else first - gone


def drop_fraction(
    step: Any, fraction: float, end: int | None = None, anneal: Literal["cosine", "constant"] = "cosine"
) -> Any:
    """Which fraction of the kept weights gives way to others at a step of sparse training.

    "cosine" is the annealing of RigL (Evci et al. 2020, arXiv 1911.11134): `fraction / 2 * (1 + cos(pi * step / end))`.

    Args:
      step: value of `state.step`, an int or an int32 array, concrete or traced.
      fraction: at step 0, from 0 to 1.
      end: the first step at which nothing gives way; None for never, which "cosine" does not know.
      anneal: "cosine" or "constant".

    Returns:
      A multiple of 2**-24, for `share`: a float for an int, else a float32 scalar. Both are the same number.

    Raises:
      ScheduleError: a fraction that is none, an annealing of another name, or "cosine" without an end.

    >>> [round(drop_fraction(step, 0.3, 100), 4) for step in (0, 50, 99, 100)]
    [0.3, 0.15, 0.0001, 0.0]
    """
    _check_drop(fraction, end, anneal)
    whole = round(fraction * _ONE)
    if end is None:
        return _as_float(whole + 0 * _as_step(step))
    if anneal == "cosine":
        return _as_float(_product(whole, _half_cosine(_fraction(step, 0, end))))
    return _as_float(whole * (_as_step(step) < end))


def _half_cosine(u: Any) -> Any:
    """(1 + cos(pi u)) / 2, in parts: exact at 0 and 1, and within 2e-7."""
    # The second half is the mirror image of the first, in which the series is good.
    late = u > _ONE // 2
    y = 2 * (_ONE - u if late else u) if isinstance(u, int) else 2 * jnp.where(late, _ONE - u, u)
    square = _product(y, y)
    fallen = functools.reduce(lambda tail, term: _product(square, term - tail), _COSINE, 0)
    return late * fallen + (1 - late) * (_ONE - fallen)


def _fraction(step: Any, begin: int, end: int) -> Any:
    """How much of the way from `begin` to `end` is gone at a step, in parts, rounded down."""
    size = end - begin
    gone = _as_step(step) - begin
    if isinstance(gone, int):
        return (min(max(gone, 0), size) << _BITS) // size
    # Division on paper: int32 cannot hold the numerator.
    rest, parts = jnp.clip(gone, 0, size), jnp.zeros((), jnp.int32)
    for _ in range(0, _BITS, 4):
        parts, rest = (parts << 4) + (rest << 4) // size, (rest << 4) % size
    return parts


def _product(a: Any, b: Any) -> Any:
    """a * b / 2**24 to the nearest integer, for a and b from 0 to 2**24: no term reaches 2**31."""
    a_high, a_low, b_high, b_low = a >> _HALF_BITS, a & _LOW, b >> _HALF_BITS, b & _LOW
    middle = a_high * b_low + a_low * b_high + (a_low * b_low >> _HALF_BITS)
    return a_high * b_high + (middle + (1 << (_HALF_BITS - 1)) >> _HALF_BITS)


def _as_step(step: Any) -> Any:
    return int(step) if isinstance(step, int | np.integer) else jnp.asarray(step, jnp.int32)


def _as_parts(fraction: Any) -> Any:
    """A fraction in parts; multiplication by a power of two loses nothing."""
    if isinstance(fraction, int | float | np.floating):
        return round(float(fraction) * _ONE)
    return jnp.round(jnp.asarray(fraction, jnp.float32) * _ONE).astype(jnp.int32)


def _as_float(parts: Any) -> Any:
    return parts / _ONE if isinstance(parts, int) else parts.astype(jnp.float32) / _ONE


def _check_ramp(begin: int, end: int, power: float) -> None:
    if end < begin or end - begin >= _MAX_STEPS:
        raise ScheduleError(
            "A ramp ends at or after the step at which it begins, and is shorter than 2**27 steps.",
            found=f"begin {begin}, end {end}",
            write="begin=0, end=10_000",
        )
    if isinstance(power, bool) or power != power or power not in range(1, 33):
        raise ScheduleError(
            "The power of a ramp is a whole number from 1 to 32.", found=quoted(power), write="power=3, or 1 for a line"
        )


def _check_drop(fraction: Any, end: int | None, anneal: str) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise ScheduleError(
            "The fraction that is dropped is from 0 to 1.", found=quoted(fraction), write="fraction=0.3"
        )
    if anneal not in ("cosine", "constant"):
        raise ScheduleError("No annealing of this name.", found=quoted(anneal), write="'cosine' or 'constant'")
    if end is None and anneal == "cosine":
        raise ScheduleError(
            "A cosine falls to 0 at some step.", found="end=None", write="end=75_000, or anneal='constant'"
        )
    if end is not None and not 0 < end < _MAX_STEPS:
        raise ScheduleError(
            "The end of an annealing is a step from 1 to 2**27 - 1.", found=quoted(end), write="end=75_000"
        )
