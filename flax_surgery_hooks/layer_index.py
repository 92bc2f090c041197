"""The index at the end of a glob, `kernel[3]` or `kernel[2:4]`, which takes layers of stacked leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from flax_surgery_hooks.errors import SelectionError, quoted
from flax_surgery_hooks.layers import Layer, axis_of
from flax_surgery_hooks.paths import Leaves

# No leading zeros: what stands between brackets in `Dense_[01]` is no index.
_INTEGER = r"(?:0|-?[1-9]\d*)"
_INDEX = re.compile(rf"{_INTEGER}|{_INTEGER}?:{_INTEGER}?(?::(?:-?[1-9]\d*)?)?")
_TRAILING = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]", re.DOTALL)


@dataclass(frozen=True)
class LayerIndex:
    """An integer or a slice as Python has them, over the layers of a leaf.

    Attributes:
      text: as written between the brackets.
    """

    text: str

    def __str__(self) -> str:
        return f"[{self.text}]"

    def of(self, leaves: Leaves, place: int) -> tuple[Layer, ...]:
        """The layers that it takes of a leaf, at least one.

        Raises:
          SelectionError: the leaf has no axes, or no such layer.
        """
        shape, path = np.shape(leaves.values[place]), leaves.paths[place]
        if not shape:
            raise SelectionError(
                f"The index {self} takes layers, and a leaf without axes has none.",
                path=path,
                found="a scalar",
                write="a pattern that matches stacked leaves alone, such as 'layers/**/kernel[3]'",
            )
        axis = axis_of(leaves, place)
        indices = self._indices(shape[axis])
        if not indices:
            raise SelectionError(
                f"The index {self} takes none of the {shape[axis]} layers of this leaf.",
                path=path,
                found=f"shape {list(shape)}, layers along axis {axis}",
                write=f"an index from {-shape[axis]} to {shape[axis] - 1}, or a pattern that matches other leaves"
                if shape[axis]
                else "a pattern that matches other leaves",
            )
        return tuple(Layer(axis, index) for index in indices)

    def _indices(self, size: int) -> tuple[int, ...]:
        """Which of so many layers, in their order.

        >>> LayerIndex("-1")._indices(4), LayerIndex("::-2")._indices(4), LayerIndex("4")._indices(4)
        ((3,), (1, 3), ())
        """
        parts = [int(part) if part else None for part in self.text.split(":")]
        if len(parts) > 1:
            return tuple(sorted(range(size)[slice(*parts)]))
        index = parts[0]
        assert index is not None
        return (range(size)[index],) if -size <= index < size else ()


def without_index(pattern: str) -> tuple[str, LayerIndex | None]:
    """A glob without the index at its end, and that index, if it has one.

    Raises:
      SelectionError: brackets that are no such index.

    >>> without_index("layers/**/kernel[2:4]")
    ('layers/**/kernel', LayerIndex(text='2:4'))
    """
    if "[" not in pattern:
        return pattern, None
    found = _TRAILING.fullmatch(pattern)
    if found is None or found[1].endswith("/") or not _INDEX.fullmatch(found[2]):
        raise SelectionError(
            "Brackets are not part of a glob, but for an index at its very end, which takes layers of a stacked leaf.",
            found=quoted(pattern),
            write="for layers 'layers/**/kernel[3]' or 'kernel[2:4]'; for a character class 're:Dense_[0-3]/kernel'",
        )
    return found[1], LayerIndex(found[2])
