"""What of a leaf is kept or dropped together: single elements, N of each M, blocks, or whole channels."""

from __future__ import annotations

import abc
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_surgery_hooks.counting import ordered
from flax_surgery_hooks.errors import SurgeryFunctionError, quoted, typed
from flax_surgery_hooks.top_k import top_k_masks_each

Shape = tuple[int, ...]

FORMS = "'unstructured', '2:4' or '2:4@-2', 'block:4x4' or 'block:4x4:max', 'channel' or 'channel@-1'"


@dataclass(frozen=True)
class Structure(abc.ABC):
    """How the elements of a leaf are kept or dropped together. It is written as a text, the same everywhere.

    - "unstructured": every element by itself.
    - "2:4": N:M, two of each four elements in a row along an axis (Mishra et al. 2021, arXiv 2104.08378). The axis has
      to be the one that a matrix product sums over: -2 in the kernels of Flax's `Dense` and `Conv`, `[..., in, out]`,
      and that is the default. Elsewhere say so: "2:4@0" for the kernel `[embed, heads, head_dim]` of an attention's
      query, key and value.
    - "block:4x4": blocks of the last two axes, apart along all others. A block counts with the mean score of its
      elements, with "block:4x4:max" with the largest; one that the end of an axis cuts off, with what it has.
    - "channel": whole slices along an axis, by default the last, the weights into a unit in Flax's kernels; "channel@0"
      for another. A channel counts with its mean score. Of a stacked leaf, such as `nn.scan` makes, a channel goes
      through all layers; select the layers (`kernel[:]`) for channels of each.

    >>> str(Structure.parse("2:4@-2")), str(Structure.parse("block:4x4:max")), Structure.parse("channel@0")
    ('2:4', 'block:4x4:max', Channel(axis=0))
    """

    @property
    def fixed(self) -> int | None:
        """How many units the text itself says to keep, N of N:M; None where that is for a sparsity to say."""
        return None

    @staticmethod
    def parse(text: str | Structure) -> Structure:
        """The structure that a text says; a structure is given back as it is.

        Raises:
          SurgeryFunctionError: the text is none of the forms, or its numbers cannot be.
        """
        if isinstance(text, Structure):
            return text
        if not isinstance(text, str):
            raise SurgeryFunctionError(
                "A structure is a text, in quotes where a file of configs would read a number.",
                found=typed(text),
                write=FORMS,
            )
        for form, make in _FORMS:
            if match := form.fullmatch(text.strip()):
                return make(**{name: part for name, part in match.groupdict().items() if part is not None})
        raise SurgeryFunctionError("There is no structure of this name.", found=quoted(text), write=FORMS)

    @abc.abstractmethod
    def __str__(self) -> str:
        """The text, without what is default."""

    @abc.abstractmethod
    def units(self, shape: Shape) -> int:
        """How many units a leaf of this shape has, to which a number that is kept refers; for N:M the size of a group.

        >>> [Structure.parse(text).units((6, 8)) for text in ("unstructured", "1:2", "block:4x4", "channel")]
        [48, 2, 4, 8]
        """

    def check(self, path: str, shape: Shape) -> None:
        """Raises unless a leaf of this shape has such units.

        Raises:
          SurgeryFunctionError: an axis that the leaf has not, a size that M does not divide, a block on fewer than two
            axes, or a leaf without elements.
        """
        if not math.prod(shape):
            self._refuse("A leaf without elements has nothing to keep.", path, shape, "a pattern that leaves it out")

    def _refuse(self, problem: str, path: str, shape: Shape, write: str) -> None:
        raise SurgeryFunctionError(
            problem, path=path, found=f"structure {str(self)!r} for shape {list(shape)}", write=write
        )

    def _check_axis(self, axis: int, path: str, shape: Shape) -> None:
        if not -len(shape) <= axis < len(shape):
            self._refuse(f"The leaf has no axis {axis}.", path, shape, _axis_to_write(str(self), shape))


@dataclass(frozen=True)
class Scored(Structure):
    """A structure whose units compete with each other for the places of the leaf."""

    @abc.abstractmethod
    def scores(self, scores: jax.Array) -> jax.Array:
        """The score of each unit, from those of the elements, at least in float32 where it is a mean."""

    @abc.abstractmethod
    def spread(self, kept: jax.Array, shape: Shape) -> jax.Array:
        """Which elements are kept, from which units are."""


@dataclass(frozen=True)
class Unstructured(Scored):
    """Every element by itself."""

    def __str__(self) -> str:
        return "unstructured"

    def units(self, shape: Shape) -> int:
        """The elements."""
        return math.prod(shape)

    def scores(self, scores: jax.Array) -> jax.Array:
        """As they are."""
        return scores

    def spread(self, kept: jax.Array, shape: Shape) -> jax.Array:
        """As they are."""
        return kept


@dataclass(frozen=True)
class Channel(Scored):
    """Whole slices along one axis.

    Attributes:
      axis: of which each index is a channel.
    """

    axis: int = -1

    def __post_init__(self):
        object.__setattr__(self, "axis", int(self.axis))

    def __str__(self) -> str:
        return "channel" if self.axis == -1 else f"channel@{self.axis}"

    def units(self, shape: Shape) -> int:
        """The size of the axis."""
        return shape[self.axis]

    def check(self, path: str, shape: Shape) -> None:
        """Raises unless the leaf has the axis."""
        self._check_axis(self.axis, path, shape)
        super().check(path, shape)

    def scores(self, scores: jax.Array) -> jax.Array:
        """The means over all other axes."""
        others = tuple(axis for axis in range(scores.ndim) if axis != self.axis % scores.ndim)
        return jnp.mean(_wide(scores), axis=others)

    def spread(self, kept: jax.Array, shape: Shape) -> jax.Array:
        """Each channel to all its elements."""
        return lax.broadcast_in_dim(kept, shape, (self.axis % len(shape),))


@dataclass(frozen=True)
class Block(Scored):
    """Blocks of the last two axes.

    Attributes:
      rows: how many elements a block has along the axis before the last.
      columns: how many along the last.
      pool: how a block's score comes of those of its elements, "mean" or "max".
    """

    rows: int
    columns: int
    pool: str = "mean"

    def __post_init__(self):
        object.__setattr__(self, "rows", int(self.rows))
        object.__setattr__(self, "columns", int(self.columns))
        if min(self.rows, self.columns) < 1 or self.rows * self.columns == 1:
            raise SurgeryFunctionError(
                "A block has at least two elements.", found=quoted(str(self)), write="'block:4x4', or 'unstructured'"
            )

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}" + ("" if self.pool == "mean" else f":{self.pool}")

    def units(self, shape: Shape) -> int:
        """The blocks, those that are cut off counted too."""
        return math.prod(self._grid(shape))

    def check(self, path: str, shape: Shape) -> None:
        """Raises unless the leaf has two axes."""
        if len(shape) < 2:
            write = "'unstructured' for this leaf, or a pattern that leaves it out"
            self._refuse("A block is of two axes, and the leaf has fewer.", path, shape, write)
        super().check(path, shape)

    def scores(self, scores: jax.Array) -> jax.Array:
        """One for each block, in a grid `[..., rows of blocks, columns of blocks]`."""
        if self.pool == "max":
            return jnp.max(self._blocks(scores, _lowest(scores.dtype)), axis=(-3, -1))
        # Counts are known from the shape alone, and XLA folds them: no second sum over the leaf.
        counts = jnp.sum(self._blocks(jnp.ones(scores.shape, jnp.float32), 0), axis=(-3, -1))
        sums = jnp.sum(self._blocks(_wide(scores), 0), axis=(-3, -1))
        return sums / counts.astype(sums.dtype)

    def spread(self, kept: jax.Array, shape: Shape) -> jax.Array:
        """Each block to all its elements."""
        *others, rows, columns = self._grid(shape)
        blocks = (*others, rows, self.rows, columns, self.columns)
        whole = (*others, rows * self.rows, columns * self.columns)
        axes = (*range(len(others)), len(others), len(others) + 2)
        spread = lax.broadcast_in_dim(kept, blocks, axes).reshape(whole)
        return spread if whole == shape else spread[..., : shape[-2], : shape[-1]]

    def _grid(self, shape: Shape) -> Shape:
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // self.columns))

    def _blocks(self, leaf: jax.Array, fill: Any) -> jax.Array:
        """`[..., rows of blocks, rows, columns of blocks, columns]`, filled up where the leaf ends."""
        *others, rows, columns = self._grid(leaf.shape)
        missing = (rows * self.rows - leaf.shape[-2], columns * self.columns - leaf.shape[-1])
        if any(missing):
            pad = [(0, 0)] * len(others) + [(0, one) for one in missing]
            leaf = jnp.pad(leaf, pad, constant_values=fill)
        return leaf.reshape(*others, rows, self.rows, columns, self.columns)


@dataclass(frozen=True)
class NOfM(Structure):
    """N of each M consecutive elements along an axis.

    Attributes:
      n: how many are kept, of a schedule at its end.
      m: the size of a group.
      axis: along which a group lies.
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self):
        for name in ("n", "m", "axis"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if not 0 < self.n < self.m:
            raise SurgeryFunctionError(
                "N:M keeps N of each M elements, at least one and fewer than M.", found=quoted(str(self)), write="'2:4'"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.axis == -2 else f"{self.n}:{self.m}@{self.axis}"

    @property
    def fixed(self) -> int:
        """N."""
        return self.n

    def units(self, shape: Shape) -> int:
        """M, the size of a group."""
        return self.m

    def check(self, path: str, shape: Shape) -> None:
        """Raises unless M divides the axis."""
        self._check_axis(self.axis, path, shape)
        if shape[self.axis] % self.m:
            write = f"another axis ('{self.n}:{self.m}@0'), or a pattern that leaves this leaf out"
            problem = f"Axis {self.axis} has size {shape[self.axis]}, which groups of {self.m} do not divide."
            self._refuse(problem, path, shape, write)
        super().check(path, shape)

    def mask(self, scores: jax.Array, n: Any) -> jax.Array:
        """The `n` largest of each group, an int or a traced one; of equal ones those before, and NaN is the largest."""
        return _largest_of_groups(scores, n, self.m, self.axis % scores.ndim)


_AXIS = r"(?:@(?P<axis>-?\d{1,3}))?"
_FORMS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"unstructured"), Unstructured),
    (re.compile(r"(?P<n>\d{1,6}):(?P<m>\d{1,6})" + _AXIS), NOfM),
    (re.compile(r"block:(?P<rows>\d{1,6})x(?P<columns>\d{1,6})(?::(?P<pool>mean|max))?"), Block),
    (re.compile(r"channel" + _AXIS), Channel),
)


def masks(
    scores: Mapping[str, jax.Array], structures: Mapping[str, Structure], kept: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Which elements of each leaf are kept: its highest units, as many as it is told.

    Can be traced. No leaf is sorted or gathered: N:M compares within groups, which says nothing to other devices as
    long as no group crosses shards; all other leaves share one `top_k_masks_each`.

    Args:
      scores: path -> score of each element, floats. NaN counts as the largest; of equal units the earlier
        ones, in row-major order, are kept.
      structures: path -> structure, which fits its leaf (`Structure.check`).
      kept: path -> how many units are kept, an int or a traced int32: elements, blocks or channels of the leaf; for N:M
        elements of each group.

    Returns:
      Path -> bool mask of the leaf's shape, in the order of `scores`.

    >>> scores = {"a": jnp.array([[1.0, 4.0], [2.0, 3.0]]), "b": jnp.array([[5.0, 5.0], [6.0, 5.0]])}
    >>> structures = {"a": Structure.parse("channel"), "b": Structure.parse("1:2")}
    >>> {path: mask.tolist() for path, mask in masks(scores, structures, {"a": 1, "b": 1}).items()}
    {'a': [[False, True], [False, True]], 'b': [[False, True], [True, False]]}
    """
    found = {}
    units = {}
    for path, leaf in scores.items():
        structure = structures[path]
        if isinstance(structure, NOfM):
            found[path] = structure.mask(leaf, kept[path])
        else:
            assert isinstance(structure, Scored)
            units[path] = structure.scores(leaf)
    if units:
        top = top_k_masks_each(units, {path: kept[path] for path in units})
        found |= {path: structures[path].spread(top[path], scores[path].shape) for path in units}  # type: ignore[attr-defined]  # all are `Scored`
    return {path: found[path] for path in scores}


@functools.partial(jax.jit, static_argnums=(2, 3))
def _largest_of_groups(scores: jax.Array, n: Any, m: int, axis: int) -> jax.Array:
    shape = scores.shape
    scores = scores.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    place = lax.broadcasted_iota(jnp.int32, tuple(m if i == axis + 1 else 1 for i in range(scores.ndim)), axis + 1)
    # Integers of the same order as in top-k: between floats a NaN is not larger, and subnormals can all be equal. Taken
    # of each slice anew: of integers that are made once XLA keeps a leaf, and of one comparison of all pairs m leaves.
    own = ordered(scores)
    before = jnp.zeros(scores.shape, jnp.int32)
    for j in range(m):
        other = ordered(lax.slice_in_dim(scores, j, j + 1, axis=axis + 1))
        before += jnp.where(j < place, other >= own, other > own)
    return (before < n).reshape(shape)


def _wide(scores: jax.Array) -> jax.Array:
    """Scores as a sum of many needs them."""
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def _lowest(dtype: Any) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _axis_to_write(text: str, shape: Shape) -> str:
    if not shape:
        return "a pattern that leaves scalars out"
    return f"an axis from {-len(shape)} to {len(shape) - 1}, as '{text.split('@')[0]}@{-len(shape)}'"
