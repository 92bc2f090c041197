"""How a sparsity is shared out among leaves, and how many units each of them keeps."""

from __future__ import annotations

import math
import numbers
import re
import sys
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from flax_surgery_hooks.errors import SelectionError, SurgeryFunctionError, located, quoted, typed
from flax_surgery_hooks.globs import compile_glob, terminated
from flax_surgery_hooks.layer_index import without_index
from flax_surgery_hooks.paths import close_matches, listed

Shapes = Mapping[str, tuple[int, ...]]
V = TypeVar("V")

REST = "**"
"""The pattern that is for all the leaves which no other one matches."""

_LAYER = re.compile(r"(.*)\[(\d+)\]", re.DOTALL)


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same sparsity for every leaf.

    Args:
      shapes: path -> shape.
      sparsity: which part of the elements is zero, from 0 to 1.

    Raises:
      SurgeryFunctionError: the sparsity is not from 0 to 1.

    >>> uniform({"a": (3, 4), "b": (5, 5)}, 0.9)
    {'a': 0.9, 'b': 0.9}
    """
    exact(sparsity)
    return dict.fromkeys(shapes, float(sparsity))


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: the larger a leaf, the sparser, and all together as sparse as it says.

    The density of a leaf is `eps * sum(dims) / prod(dims)`, with one eps for all leaves. Leaves for which that would
    be more than 1 stay dense, and eps is solved again for the others. Layers of a stacked leaf are leaves when they are
    selected as layers; a leaf that holds them as an axis counts that axis as one more dimension.

    Args:
      shapes: path -> shape.
      sparsity: of all elements together, from 0 to 1.

    Returns:
      Path -> sparsity. `kept` of these adds up to `(1 - sparsity)` of all elements, up to the rounding in each leaf.

    Raises:
      SurgeryFunctionError: the sparsity is not from 0 to 1.

    Source: RigL, Evci et al. 2020, arXiv 1911.11134, section 3 and appendix.

    >>> {path: round(sparsity, 4) for path, sparsity in erk({"a": (10, 10), "b": (10, 40), "c": (2, 2)}, 0.5).items()}
    {'a': 0.2914, 'b': 0.5571, 'c': 0.0}
    """
    kept_in_all = (1 - exact(sparsity)) * sum(map(math.prod, shapes.values()))
    dense = {path for path, shape in shapes.items() if not math.prod(shape)}
    while True:
        free = {path: shape for path, shape in shapes.items() if path not in dense}
        left = kept_in_all - sum(math.prod(shapes[path]) for path in dense)
        # A leaf has prod(dims) elements, so eps * sum(dims) of them are kept; a scalar has one dimension of size 1.
        eps = Fraction(left, sum(sum(shape or (1,)) for shape in free.values())) if free else Fraction(0)
        density = {path: eps * sum(shape or (1,)) / math.prod(shape) for path, shape in free.items()}
        # All at once: a leaf that is pinned needs less than its share, so eps rises, and no other comes back below 1.
        full = {path for path, value in density.items() if value > 1}
        if not full:
            return {path: float(1 - density.get(path, 1)) for path in shapes}
        dense |= full


def from_map(shapes: Shapes, sparsities: Mapping[str, float]) -> dict[str, float]:
    """The sparsity that a pattern says for each leaf.

    Args:
      shapes: path -> shape.
      sparsities: pattern -> sparsity from 0 to 1; see `by_pattern`.

    Raises:
      SelectionError: as for `by_pattern`.
      SurgeryFunctionError: a sparsity is not from 0 to 1; its `path` is the pattern.

    >>> from_map({"a": (3, 4), "b": (5, 5), "head": (5, 2)}, {"**": 0.9, "head": 0.5})
    {'a': 0.9, 'b': 0.9, 'head': 0.5}
    """
    for pattern, sparsity in sparsities.items():
        with located(path=pattern):
            exact(sparsity)
    return {path: float(one) for path, one in by_pattern(shapes, sparsities, "sparsity=").items()}


def by_pattern(paths: Iterable[str], values: Mapping[str, V], what: str) -> dict[str, V]:
    """The value for each path, from patterns of which exactly one matches it; their order does not matter.

    `**` alone is for all the rest: the paths that no other pattern matches, should there be any.

    Args:
      paths: of leaves, or of layers as `layers/kernel[3]`.
      values: pattern -> value. A pattern is a glob or a `re:` pattern, as for `select`; a glob without an index matches
        every layer of a leaf, one with an index, which counts from the front, only these.
      what: what is so given, as the caller writes it, for messages: "sparsity=".

    Returns:
      Path -> value, in the order of `paths`.

    Raises:
      SelectionError: a path that no pattern matches, or several; a pattern that matches no path, or is malformed.

    >>> by_pattern(["a/kernel", "b/kernel", "b/scale"], {"**": "2:4", "**/scale": "unstructured"}, "structure=")
    {'a/kernel': '2:4', 'b/kernel': '2:4', 'b/scale': 'unstructured'}
    """
    paths = list(paths)
    matched = {pattern: {path for path in paths if _matches(pattern, path)} for pattern in values if pattern != REST}
    for pattern, found in matched.items():
        if not found:
            raise SelectionError(
                f"The pattern {pattern!r} of {what} matches none of the {len(paths)} selected leaves.",
                found=listed(map(repr, paths)) or "no leaves at all",
                write=" or ".join(map(repr, close_matches(pattern, paths))) or None,
            )
    return {path: values[_only([one for one in matched if path in matched[one]], path, values, what)] for path in paths}


def _only(patterns: list[str], path: str, values: Mapping[str, Any], what: str) -> str:
    """The one pattern of a path: one of those that match it, or the one for the rest."""
    if len(patterns) > 1:
        raise SelectionError(
            f"Several patterns of {what} match this leaf.",
            path=path,
            found=" and ".join(map(repr, patterns)),
            write=f"patterns of which one alone matches each leaf; {REST!r} is for all the rest",
        )
    if not patterns and REST not in values:
        raise SelectionError(
            f"No pattern of {what} matches this leaf.",
            path=path,
            found=listed(map(repr, values)) or "no patterns at all",
            write=f"a pattern that does, or {REST!r} for all the rest",
        )
    return patterns[0] if patterns else REST


def _matches(pattern: Any, path: str) -> bool:
    if not isinstance(pattern, str):
        raise SelectionError("A pattern is a glob or a 're:' pattern.", found=typed(pattern), write="'**/kernel'")
    if pattern.startswith("re:"):
        return _regex(pattern).fullmatch(path) is not None
    stem, index = without_index(pattern)
    layer = _LAYER.fullmatch(path)
    leaf = layer[1] if layer else path
    if not compile_glob(stem).fullmatch(terminated(leaf)):
        return False
    return index is None or (layer is not None and int(layer[2]) in _layers(index.text, pattern))


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise SelectionError(
            f"Not a regular expression: {error}.", found=quoted(pattern), write="'re:Dense_[0-3]/kernel'"
        ) from error


def _layers(index: str, pattern: str) -> range:
    """The layers of an index: of a path alone it is not known how many there are, to count from the end."""
    parts = [int(part) if part else None for part in index.split(":")]
    if any(part is not None and part < 0 for part in parts):
        raise SelectionError(
            "Here an index counts from the front.", found=quoted(pattern), write="an index of 0 or more, as kernel[3]"
        )
    start = parts[0]
    return range(sys.maxsize)[slice(*parts)] if len(parts) > 1 else range(start or 0, (start or 0) + 1)


def kept(units: int, sparsity: float) -> int:
    """How many of so many units a sparsity keeps: at least one, where there is one.

    The decimal counts that was written: `1 - 0.9` is less than 0.1 in floating point, and `1 - 0.7` more than 0.3.

    Args:
      units: how many there are.
      sparsity: which part of them goes, from 0 to 1.

    Returns:
      `(1 - sparsity) * units` to the nearest integer, a half to the even one.

    Raises:
      SurgeryFunctionError: the sparsity is not from 0 to 1.

    >>> kept(1000, 0.9), kept(10, 0.7), kept(10, 1.0)
    (100, 3, 1)
    """
    return min(units, max(1, round((1 - exact(sparsity)) * units)))


def exact(sparsity: Any) -> Fraction:
    """A sparsity as the decimal that was written.

    Raises:
      SurgeryFunctionError: it is no number from 0 to 1.

    >>> exact(0.9)
    Fraction(9, 10)
    """
    is_number = isinstance(sparsity, numbers.Real) and not isinstance(sparsity, bool)
    if not is_number or not 0 <= sparsity <= 1:  # NaN is not
        raise SurgeryFunctionError(
            "A sparsity is a number from 0 to 1, the part of the weights that is zero.",
            found=typed(sparsity),
            write="0.9 for nine in ten",
        )
    return Fraction(str(sparsity))
