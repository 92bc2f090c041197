"""The table of edits, each with the law of its parameters, gradients and places written out in NumPy.

An edit is known by four arrays shaped like the new leaf: which old element each new one takes (`source`), with what
coefficient (`factor`), what share of its gradient it has if the model computes the same as before (`share`), and what
it holds where it takes none (`constant`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

SMALL, LARGE = (3, 4), (6, 4)
"""The two shapes of kernels: two alone, since every further one costs a compilation of everything."""
FRESH = -1
"""The source of an element that has none."""


@dataclass(frozen=True, eq=False)
class EditRow:
    """An edit of one leaf that the laws are checked on.

    Attributes:
      name: of the row, unique.
      surgery: what `fsh.operate` is given.
      before: shape of the leaf that it takes.
      source: int array, per new element the flat index of the old one, or -1 if it has none.
      factor: float array, the coefficient with which it takes it; anything where it has none.
      share: float array, its gradient over that of its source, where the model computes the same as before.
      wrong: (source, share) of a mistake that the laws must reject.
      constant: float array, what elements without source hold.
      offset: float array, what is added to the others as a constant, of which slots know nothing.
      like: name of the edit of the table whose laws hold after it; its own, if it is of the table.
    """

    name: str
    surgery: Any
    before: tuple[int, ...]
    source: np.ndarray
    factor: np.ndarray
    share: np.ndarray
    wrong: tuple[np.ndarray, np.ndarray]
    constant: np.ndarray
    offset: np.ndarray
    like: str

    @property
    def fresh(self) -> np.ndarray:
        """Which new elements have no source."""
        return self.source == FRESH

    def gather(self, values: Any, source: np.ndarray | None = None) -> np.ndarray:
        """What lies at each new element's source, 0 where there is none."""
        source = self.source if source is None else source
        flat = np.asarray(values).reshape(-1)
        return np.where(source == FRESH, 0, flat[np.maximum(source, 0)])

    def params(self, old: Any) -> np.ndarray:
        """The new leaf."""
        return np.where(self.fresh, self.constant, self.factor * self.gather(old) + self.offset)

    def gradient(self, old: Any, *, wrong: bool = False) -> np.ndarray:
        """The gradient of the new leaf where the model computes the same as before, 0 for fresh elements."""
        source, share = self.wrong if wrong else (self.source, self.share)
        return share * self.gather(old, source)


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape)


def row(
    name: str,
    surgery: Any,
    source: Any,
    *,
    factor: Any = 1.0,
    share: Any = 1.0,
    wrong_share: Any = None,
    wrong_source: Any = None,
    before: tuple[int, ...] = SMALL,
    constant: Any = 0.0,
    offset: Any = 0.0,
    like: str = "",
) -> EditRow:
    """An `EditRow` whose arrays may be given as what broadcasts to the new leaf.

    Args:
      name: of the row.
      surgery: the edit.
      source: see `EditRow`.
      factor: see `EditRow`.
      share: see `EditRow`.
      wrong_share: shares of a mistake, by default the right ones.
      wrong_source: sources of a mistake, by default the right ones.
      before: shape of the old leaf.
      constant: see `EditRow`.
      offset: see `EditRow`.
      like: see `EditRow`.
    """
    source = np.asarray(source)

    def full(value: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, np.float64), source.shape)

    wrong = (source if wrong_source is None else wrong_source, full(share if wrong_share is None else wrong_share))
    return EditRow(
        name, surgery, before, source, full(factor), full(share), wrong, full(constant), full(offset), like or name
    )


class UnequalCopies:
    """Duplicates the rows of a leaf; the copies share its gradient 7 to 3."""

    preserves = "function"

    def __call__(self, kernel: Any) -> Any:
        """Both copies."""
        return jnp.concatenate([kernel, kernel])

    def fold_back(self, kernel: Any) -> Any:
        """What a change of the copies amounts to."""
        first, second = jnp.split(kernel, 2)
        return 0.7 * first + 0.3 * second


_ROWS = np.array([[0.5], [2.0], [-4.0]])
_ELEMENTS = np.array([[0.3, -1.7, 2.0, 1.0], [1.0, 5.0, -0.1, 0.7], [-3.0, 0.25, 1.0, 9.0]])
_MASK = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1]], bool)
"""A column of it is empty: the mean of its survivors is that of the leaf."""
_AGAIN = np.array([[0, 1, 0, 0]] * 3, bool) | ~_MASK
_VALUES = 0.01 * np.arange(1.0, 13.0).reshape(SMALL)
_ORDER = np.array([2, 0, 1]), np.array([3, 1, 0, 2])


def _all_edits() -> list[EditRow]:
    still = _numbers(SMALL)
    moved = still[_ORDER[0]][:, _ORDER[1]]
    masked = np.where(_MASK, still, FRESH)
    again = np.where(_AGAIN, FRESH, still)
    padded = np.concatenate([still, np.full((3, 4), FRESH)])
    twice = np.concatenate([still, still])
    halves = np.repeat([[0.7], [0.3]], 3, axis=0)
    sliced = _numbers(LARGE)[::2]
    rolled: Callable[[np.ndarray], np.ndarray] = lambda source: np.roll(source, 1, axis=1)  # noqa: E731
    return [
        row("scale", lambda kernel: -0.5 * kernel, still, factor=-0.5, share=-2.0, wrong_share=-0.5),
        row("scale_rows", lambda kernel: _ROWS * kernel, still, factor=_ROWS, share=1 / _ROWS, wrong_share=_ROWS),
        row("scale_elements", lambda kernel: _ELEMENTS * kernel, still, factor=_ELEMENTS, share=1 / _ELEMENTS,
            wrong_share=_ELEMENTS),
        row("permute", lambda kernel: kernel[_ORDER[0]][:, _ORDER[1]], moved, wrong_source=still),
        row("mask", lambda kernel: jnp.where(_MASK, kernel, 0), masked, wrong_source=rolled(masked)),
        row("reinitialise", lambda kernel: jnp.where(_AGAIN, _VALUES, kernel), again, wrong_source=rolled(again),
            constant=_VALUES),
        row("pad", lambda kernel: jnp.concatenate([kernel, jnp.zeros_like(kernel)]), padded,
            wrong_source=np.roll(padded[::-1], 1, axis=1)),
        row("slice", lambda kernel: kernel[::2], sliced, before=LARGE, wrong_source=sliced + 4),
        row("duplicate_in", lambda kernel: jnp.concatenate([kernel, kernel]), twice, share=0.5, wrong_share=1.0),
        row("duplicate_out", lambda kernel: jnp.concatenate([kernel, kernel]) / 2, twice, factor=0.5,
            wrong_share=0.5),
        row("duplicate_unequal", UnequalCopies(), twice, share=halves, wrong_share=0.5),
    ]  # fmt: skip


EDITS: dict[str, EditRow] = {edit.name: edit for edit in _all_edits()}
"""The rows by name."""
