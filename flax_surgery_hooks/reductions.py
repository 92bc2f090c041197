"""Several sums over the same arrays in one pass.

XLA on CPU runs one loop over the data for each sum, and keeps what several of them share as whole arrays. One reduction
of many operands is one loop, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

_LONG = 1 << 12


def sums(values: Sequence[jax.Array], over: Iterable[int]) -> tuple[jax.Array, ...]:
    """The sums of several arrays of one shape over the same axes, which stay as axes of length 1; float32."""
    axes = tuple(over)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(values[0].shape))
    # A sum that XLA could fold: of a leaf of constants, at compile time, it would take minutes.
    zeros = (jax.lax.optimization_barrier(jnp.zeros((), jnp.float32)),) * len(values)
    wide = tuple(value.astype(jnp.float32) for value in values)
    reduced = jax.lax.reduce(wide, zeros, _add_all, axes) if axes else wide
    return tuple(value.reshape(shape) for value in reduced)


def totals(values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The sums of all elements of several arrays of one shape, as float32 scalars.

    They run along the last axis first, so that a count beyond 2**24 does not stall in float32.

    >>> [float(total) for total in totals([jnp.ones((2, 3)), jnp.arange(6.0).reshape(2, 3)])]
    [6.0, 15.0]
    """
    if values[0].ndim == 1 and values[0].size > _LONG and values[0].size % _LONG == 0:
        values = [value.reshape(-1, _LONG) for value in values]
    while values[0].ndim:
        last = values[0].ndim - 1
        values = [value.squeeze(last) for value in sums(values, [last])]
    return tuple(value.astype(jnp.float32) for value in values)


def _add_all(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
