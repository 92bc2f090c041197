"""The k largest elements of arrays, exactly, as masks: without a sort, a gather, or anything kept of their size.

The k-th largest value is found by counting how many elements lie above each of several thresholds, pass after pass
over the data; a sample says where the first pass looks. Elements that equal it are then cut by their index, likewise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks import bisection, counting, reductions
from flax_surgery_hooks.errors import SelectionError, quoted, shorten, typed

_SAMPLED_LOG2 = 20
_SAMPLE_LOG2 = 14
_LIMIT = 1 << 31


def top_k_mask(scores: jax.Array, k: Any) -> jax.Array:
    """Marks the k largest elements of an array; see `top_k_masks`.

    >>> import jax.numpy as jnp
    >>> top_k_mask(jnp.array([3.0, 1.0, 4.0, 1.0, 5.0]), 2).tolist()
    [False, False, True, False, True]
    """
    return top_k_masks({"": scores}, k)[""]


def top_k_masks(scores: Mapping[str, jax.Array], k: Any) -> dict[str, jax.Array]:
    """Marks the k largest elements of many arrays together.

    NaN counts as the largest value, and -0.0 as 0.0. Of elements that equal the smallest marked one, those of the
    arrays first in the sorted order of their names are marked, and within an array those of the lowest row-major index:
    always exactly k, and the same ones however the arrays are sharded.

    Args:
      scores: name -> array of any shape; float16, bfloat16, float32 or float64, which may be mixed.
      k: how many, an int or integer scalar; one that is traced is clipped to what there is.

    Returns:
      name -> bool array of the shape of its scores.

    Raises:
      SelectionError: `k` is no integer, negative or more than there are elements; scores are not floats, or 2**31
        and more elements.

    >>> import jax.numpy as jnp
    >>> masks = top_k_masks({"b": jnp.array([1.0, 2.0]), "a": jnp.array([[2.0], [2.0]])}, 2)
    >>> masks["b"].tolist(), masks["a"].tolist()
    ([False, False], [[True], [True]])
    """
    names = sorted(scores)
    return _by_name(scores, names, [0] * len(names), [k] if names else [])


def top_k_masks_each(scores: Mapping[str, jax.Array], ks: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Marks the k largest elements of each of many arrays, each with a k of its own, in one loop for all.

    Args:
      scores: as for `top_k_masks`.
      ks: name -> how many, for every name in `scores`.

    Returns:
      name -> bool array of the shape of its scores.

    Raises:
      SelectionError: as for `top_k_masks`, or the names differ.

    >>> import jax.numpy as jnp
    >>> masks = top_k_masks_each({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}, {"a": 1, "b": 2})
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([False, True], [True, True])
    """
    if differing := sorted(set(scores) ^ set(ks)):
        raise SelectionError(
            "Scores and numbers to select are of different arrays.",
            found=f"{shorten(', '.join(differing))} in one of them only",
            write="a number in ks for each of the scores, under its name",
        )
    names = sorted(scores)
    return _by_name(scores, names, list(range(len(names))), [ks[name] for name in names])


def _by_name(
    scores: Mapping[str, jax.Array], names: Sequence[str], groups: Sequence[int], ks: Sequence[Any]
) -> dict[str, jax.Array]:
    """The masks of scores, of which those at the same number in `groups` are selected from together."""
    leaves = [_checked(name, scores[name]) for name in names]
    sizes = [sum(leaf.size for leaf, of in zip(leaves, groups, strict=True) if of == group) for group in range(len(ks))]
    numbers = [_number(k, size) for k, size in zip(ks, sizes, strict=True)]
    masks = [jnp.zeros(leaf.shape if leaf.size == 0 else (), bool) for leaf in leaves]
    if members := [i for i, leaf in enumerate(leaves) if leaf.size]:
        flat = tuple(leaves[i].reshape(1) if leaves[i].ndim == 0 else leaves[i] for i in members)
        places = tuple(reductions.known_places().items())
        found = _masks(flat, jnp.stack(numbers), tuple(groups[i] for i in members), places)
        for i, mask in zip(members, found, strict=True):
            masks[i] = mask.reshape(leaves[i].shape) if leaves[i].ndim == 0 else mask
    by_name = dict(zip(names, masks, strict=True))
    return {name: by_name[name] for name in scores}


def _checked(name: str, leaf: Any) -> jax.Array:
    leaf = jax.lax.stop_gradient(jnp.asarray(leaf))
    if leaf.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise SelectionError(
            "Scores are of a type that has no order here.",
            path=name or None,
            found=leaf.dtype,
            write="float16, bfloat16, float32 or float64, as by scores.astype(jnp.float32)",
        )
    return leaf


def _number(k: Any, size: int) -> jax.Array:
    """How many to select from so many elements, int32."""
    if size >= _LIMIT:
        raise SelectionError(
            "There are more elements than int32 can count.",
            found=f"{size:,}",
            write="selections from fewer than 2**31 elements each, as of each layer by itself",
        )
    dtype = k.dtype if hasattr(k, "dtype") else np.result_type(type(k)) if isinstance(k, int | float) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or np.ndim(k) or isinstance(k, bool):
        raise SelectionError(
            "The number of elements to select is no integer.", found=typed(k), write="an int, as by int(0.1 * size)"
        )
    if isinstance(k, jax.core.Tracer):
        return jnp.clip(k, 0, min(size, int(jnp.iinfo(dtype).max))).astype(jnp.int32)
    if not 0 <= int(k) <= size:
        raise SelectionError(
            "There are not so many elements to select.", found=quoted(int(k)), write=f"a number from 0 to {size}"
        )
    return jnp.int32(int(k))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _masks(
    leaves: tuple[jax.Array, ...], ks: jax.Array, groups: tuple[int, ...], places: tuple[Any, ...]
) -> list[jax.Array]:
    """The masks of leaves that have elements and axes.

    Args:
      leaves: the scores, in the order in which ties go.
      ks: how many of each group, int32 [groups].
      groups: of which group each leaf is.
      places: items of `reductions.Places`.
    """
    with reductions.across(dict(places)):
        pool = Pool(leaves, groups, len(ks))
        cuts, wanting = _cuts(pool, ks)
        lasts = _lasts(pool, cuts, wanting)
        # With a value that is not known to XLA, or it would fold what depends on constants alone.
        leaves, cuts, lasts = jax.lax.optimization_barrier((leaves, cuts, lasts))
        return [
            _mask(pool.ordered(leaf), cuts[group], last)
            for leaf, group, last in zip(leaves, groups, lasts, strict=True)
        ]


def _mask(values: jax.Array, cut: jax.Array, last: jax.Array) -> jax.Array:
    """What is above the cut, and of what equals it all up to an index."""
    return (values > cut) | ((values == cut) & (reductions.Piece().indices(values) <= last))


class Pool(NamedTuple):
    """What is selected from.

    Attributes:
      leaves: arrays with elements and axes.
      groups: of which group each leaf is.
      size: the number of groups.
    """

    leaves: Sequence[jax.Array]
    groups: Sequence[int]
    size: int

    @property
    def dtype(self) -> Any:
        """In which all elements can be compared."""
        return jnp.result_type(*self.leaves)

    def ordered(self, leaf: jax.Array) -> jax.Array:
        """Its elements as integers."""
        return counting.ordered(leaf.astype(self.dtype))

    def sizes(self) -> list[int]:
        """How many elements each group has."""
        return [
            sum(leaf.size for leaf, of in zip(self.leaves, self.groups, strict=True) if of == group)
            for group in range(self.size)
        ]

    def by_group(self, rows: Sequence[jax.Array]) -> jax.Array:
        """The sums over the leaves of each group, [groups, ...]."""
        none = jnp.zeros_like(rows[0])
        return jnp.stack(
            [
                sum((row for row, of in zip(rows, self.groups, strict=True) if of == group), none)
                for group in range(self.size)
            ]
        )


def _cuts(pool: Pool, ks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A value of each group above which all is selected, and how many are wanting, of those that equal it."""
    top = jnp.full(ks.shape, counting.highest(pool.dtype), counting.integers(pool.dtype))
    bracket = bisection.whole(-top, top, jnp.array(pool.sizes(), jnp.int32))
    if sum(pool.sizes()) >> _SAMPLED_LOG2:
        start, stop = jax.lax.platform_dependent(
            ks, bracket, cpu=functools.partial(_near, pool), default=lambda ks, bracket: (bracket.low, bracket.high)
        )
        bracket = bracket._replace(start=start, stop=stop)
    return bisection.search(lambda thresholds: pool.by_group(_above(pool, thresholds)), ks, bracket).found(ks)


def _above(pool: Pool, thresholds: jax.Array) -> list[jax.Array]:
    """How many elements of each leaf are above its group's thresholds [groups, ...]."""

    def one(leaf: jax.Array, piece: reductions.Piece, thresholds: jax.Array) -> jax.Array:
        # Or XLA would keep the leaf's integers from pass to pass, and fold those of constants.
        leaf, thresholds = jax.lax.optimization_barrier((leaf, thresholds))
        return counting.above(leaf, pool.ordered, thresholds[pool.groups[piece.item]], piece.local)

    rows = reductions.added_with(one, pool.leaves, thresholds.reshape(pool.size, -1))
    return [row.reshape(thresholds.shape[1:]) for row in rows]


def _near(pool: Pool, ks: jax.Array, bracket: bisection.Bracket) -> tuple[jax.Array, jax.Array]:
    """Between which integers the cuts of all groups are likely to be, by a sample of evenly spaced elements.

    A sample's rank, scaled up, is off by at most sqrt(spacing * size) / 2 in standard deviation.
    """
    spacing = sum(pool.sizes()) >> _SAMPLE_LOG2
    margins = jnp.array([2 * int(math.sqrt(spacing * size)) for size in pool.sizes()], jnp.int32)
    more, fewer = jnp.minimum(margins, bracket.above_low - ks), jnp.minimum(margins, ks)
    aims = jnp.stack([ks + more, ks - fewer], axis=-1)
    both = bisection.Bracket(*(jnp.broadcast_to(each[:, None], aims.shape) for each in bracket))
    ends, _ = bisection.search(functools.partial(_above_in_sample, pool, spacing), aims, both).found(aims)
    return jnp.maximum(ends[:, 0] - 1, bracket.low), jnp.minimum(ends[:, 1] + 1, bracket.high)


def _above_in_sample(pool: Pool, spacing: int, thresholds: jax.Array) -> jax.Array:
    """About how many elements of each group are above its thresholds, [groups, ...]."""

    def one(leaf: jax.Array, piece: reductions.Piece, thresholds: jax.Array) -> jax.Array:
        sample, step = counting.sampled(leaf, spacing, piece.local)
        return step * counting.few_above(sample, pool.ordered, thresholds[pool.groups[piece.item]])

    rows = reductions.added_with(one, pool.leaves, thresholds.reshape(pool.size, -1))
    return pool.by_group([row.reshape(thresholds.shape[1:]) for row in rows])


def _lasts(pool: Pool, cuts: jax.Array, wanting: jax.Array) -> jax.Array:
    """The last index of each leaf at which what equals the cut is selected; -1 for none."""
    none = jnp.full(len(pool.leaves), -1, jnp.int32)
    return jax.lax.cond(jnp.any(wanting > 0), functools.partial(_last_ties, pool), lambda *_: none, cuts, wanting)


def _last_ties(pool: Pool, cuts: jax.Array, wanting: jax.Array) -> jax.Array:
    above = jnp.stack(_above(pool, jnp.stack([cuts - 1, cuts], axis=-1)))
    ties = above[:, 0] - above[:, 1]
    groups = np.array(pool.groups)
    earlier = np.tril(groups[:, None] == groups[None], -1)
    before = jnp.where(earlier, ties[None], 0).sum(axis=1, dtype=jnp.int32)
    wanted = jnp.where(groups[:, None] == np.arange(pool.size)[None], wanting[None], 0).sum(axis=1, dtype=jnp.int32)
    taken = jnp.clip(wanted - before, 0, ties)
    sizes = jnp.array([leaf.size for leaf in pool.leaves], jnp.int32)
    bracket = bisection.whole(-sizes - 1, jnp.full_like(sizes, -1), ties)
    ends, _ = bisection.search(functools.partial(_ties_above, pool, cuts), taken, bracket).found(taken)
    return -2 - ends


def _ties_above(pool: Pool, cuts: jax.Array, thresholds: jax.Array) -> jax.Array:
    """How many elements of each leaf that equal its cut have an index i of -1 - i above thresholds, [leaves, ...]."""
    lowest = jnp.iinfo(jnp.int32).min

    def one(leaf: jax.Array, piece: reductions.Piece, common: tuple[jax.Array, jax.Array]) -> jax.Array:
        leaf, (cuts, thresholds), zero = jax.lax.optimization_barrier((leaf, common, jnp.zeros((), jnp.int32)))

        def ordered(leaf: jax.Array) -> jax.Array:
            equal = pool.ordered(leaf) == cuts[pool.groups[piece.item]]
            return jnp.where(equal, -1 - piece.indices(leaf, zero), lowest)

        return counting.above(leaf, ordered, thresholds[piece.item], piece.local)

    return jnp.stack(reductions.added_with(one, pool.leaves, (cuts, thresholds)))
