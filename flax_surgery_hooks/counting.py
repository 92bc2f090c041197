"""How many elements of an array lie above each of several thresholds, in one pass that keeps nothing of its size.

Elements are compared as integers of the same order, so that no flush of subnormals, no sign of zero and no NaN
can make two passes disagree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

_FEW = 1 << 12
_ROW = 1 << 12
_SHARDS_LOG2 = 3
_ROW_LOG2 = 8
_NARROW = 64

Ordered = Callable[[jax.Array], jax.Array]
"""From an array to integers of its shape, elementwise."""


def integers(dtype: jnp.dtype) -> jnp.dtype:
    """The type of `ordered` values."""
    return jnp.dtype(jnp.int64 if jnp.dtype(dtype).itemsize == 8 else jnp.int32)


def highest(dtype: jnp.dtype) -> int:
    """What `ordered` makes of NaN; the lowest value, -inf, is one more than its negative."""
    return _bits_of_inf(dtype) + 1


def ordered(values: jax.Array) -> jax.Array:
    """Integers in the order of floats: those of equal floats are equal, and of every NaN the highest.

    Args:
      values: float array.

    Returns:
      int32, for float64 int64.

    >>> import jax.numpy as jnp
    >>> ordered(jnp.array([0.0, -0.0, 1e-45, -1e-45, -jnp.inf])).tolist()
    [0, 0, 1, -1, -2139095040]
    >>> [int(ordered(jnp.array(value))) == highest(jnp.float32) for value in (jnp.nan, -jnp.nan, jnp.inf)]
    [True, True, False]
    """
    size = values.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(values, jnp.dtype(f"int{8 * size}")).astype(integers(values.dtype))
    magnitude = bits & jnp.array(np.iinfo(f"int{8 * size}").max, bits.dtype)
    signed = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > _bits_of_inf(values.dtype), jnp.array(highest(values.dtype), bits.dtype), signed)


def _bits_of_inf(dtype: jnp.dtype) -> int:
    return int(np.array(np.inf, dtype).view(f"int{8 * jnp.dtype(dtype).itemsize}"))


def above(leaf: jax.Array, ordered: Ordered, thresholds: jax.Array, local: bool) -> jax.Array:
    """How many elements lie above each threshold; int32, of the shape of `thresholds`.

    One reduction of many operands is what XLA on CPU fuses with what makes them: of 16M float32 and 7 thresholds 14 ms
    on two cores with JAX 0.10, against 30 ms for each threshold by itself, which keeps a copy of the leaf besides.
    Other platforms, on which nothing was measured, get plain sums, to fuse side by side.

    Args:
      leaf: array of at least one axis, without elements or with.
      ordered: makes integers of it.
      thresholds: integers of that type, a vector.
      local: whether the leaf may be reshaped at will.
    """
    if leaf.size <= _FEW:
        return few_above(leaf, ordered, thresholds)
    together = functools.partial(_together, ordered, rows_of(leaf.shape, local))
    return jax.lax.platform_dependent(leaf, thresholds, cpu=together, default=functools.partial(_one_by_one, ordered))


def few_above(leaf: jax.Array, ordered: Ordered, thresholds: jax.Array) -> jax.Array:
    """`above` of a small array, for which XLA compiles less: it keeps an integer per element and threshold."""
    each = ordered(leaf)[..., None] > thresholds.reshape((1,) * leaf.ndim + (-1,))
    return jnp.sum(each, axis=tuple(range(leaf.ndim)), dtype=jnp.int32)


def _together(ordered: Ordered, shape: tuple[int, ...], leaf: jax.Array, thresholds: jax.Array) -> jax.Array:
    rows = ordered(leaf).reshape(shape)
    flags = [(rows > threshold).astype(jnp.int32) for threshold in thresholds]
    zeros = [jnp.zeros((), jnp.int32)] * len(flags)
    counts = jax.lax.reduce(flags, zeros, _add_all, (len(shape) - 1,))
    # One operand, which XLA's partitioner adds up where it lies; it would gather many.
    return jnp.stack(counts).sum(axis=tuple(range(1, len(shape))), dtype=jnp.int32)


def _one_by_one(ordered: Ordered, leaf: jax.Array, thresholds: jax.Array) -> jax.Array:
    values = ordered(leaf)
    return jnp.stack([jnp.sum(values > threshold, dtype=jnp.int32) for threshold in thresholds])


def _add_all(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> list[jax.Array]:
    return [a + b for a, b in zip(left, right, strict=True)]


def rows_of(shape: tuple[int, ...], local: bool) -> tuple[int, ...]:
    """The shape in which the last axis of an array is one to reduce by itself: not sharded, and not short.

    Where it is not known how the array lies, a last axis too short to give one is supposed to be whole on each device.

    >>> rows_of((4096, 4096), local=False), rows_of((1024, 1001), local=False), rows_of((3, 3, 512, 4), local=False)
    ((4096, 16, 256), (1024, 1, 1001), (3, 3, 8, 256))
    >>> rows_of((16, 3001), local=True)
    (16, 3001)
    """
    if local:
        size = math.prod(shape)
        row = next(row for row in range(min(size, _ROW), 0, -1) if size % row == 0)
        return (size // row, row) if row > 1 else (1, size)
    tail, lead = 1, list(shape)
    while len(lead) > 1 and tail * lead[-1] < _NARROW:
        tail *= lead.pop()
    shards, rest = _unsharded(lead.pop())
    return (*lead, shards, rest * tail)


def _unsharded(axis: int) -> tuple[int, int]:
    """An axis as shards of it, and what is whole on each device: its odd part, and twos beyond eight shards."""
    twos = (axis & -axis).bit_length() - 1
    shards = 1 << (twos - min(_ROW_LOG2, max(0, twos - _SHARDS_LOG2)))
    return shards, axis // shards


def sampled(leaf: jax.Array, spacing: int, local: bool) -> tuple[jax.Array, int]:
    """About one of so many elements, evenly spaced, and how many elements each stands for.

    >>> import jax.numpy as jnp
    >>> sample, each = sampled(jnp.zeros((1024, 96)), 50, local=False)
    >>> sample.size, each
    (2048, 48)
    """
    shape = rows_of(leaf.shape, True) if local else leaf.shape
    split = [(1, axis) if local else _unsharded(axis) for axis in shape]
    slices: list[slice] = []
    each = 1
    for _, rest in reversed(split):
        step = next(step for step in range(min(spacing // each, rest), 0, -1) if rest % step == 0)
        slices = [slice(None), slice(None, None, step), *slices]
        each *= step
    return leaf.reshape([size for pair in split for size in pair])[tuple(slices)], each
