"""Slots of other layouts in NumPy: lifted to the shape of their leaf, and lowered back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Parts = Sequence[np.ndarray]


def lift(layout: str, parts: Parts, leaf: tuple[int, ...]) -> np.ndarray:
    """What the slots of a leaf say of each of its elements.

    Args:
      layout: its name, such as "factored".
      parts: the slots, in the order of their fields.
      leaf: shape of the leaf, a matrix.
    """
    if layout == "factored":
        row, column, whole = parts
        if whole.shape == leaf:
            return whole
        of_rows, of_columns = (row, column) if row.shape == leaf[:1] else (column, row)
        return np.outer(of_rows, of_columns) / of_rows.mean()
    if layout == "per axis":
        return np.minimum(parts[0][:, None], parts[1][None, :])
    if layout == "per leaf":
        return np.full(leaf, parts[0] / np.prod(leaf))
    raise ValueError(f"unknown layout {layout!r}")


def lower(layout: str, moved: np.ndarray, parts: Parts) -> list[np.ndarray]:
    """The slots of what has moved; `parts` are slots of the new shapes, whatever they hold."""
    if layout == "factored":
        if parts[2].shape == moved.shape:
            return [np.zeros_like(parts[0]), np.zeros_like(parts[1]), moved]
        of_rows, of_columns = moved.mean(axis=1), moved.mean(axis=0)
        first = parts[0].shape == of_rows.shape and _factors_rows_first(moved.shape)
        return [*((of_rows, of_columns) if first else (of_columns, of_rows)), np.zeros_like(parts[2])]
    if layout == "per axis":
        return [moved.max(axis=1), moved.max(axis=0)]
    if layout == "per leaf":
        return [moved.sum()]
    raise ValueError(f"unknown layout {layout!r}")


def _factors_rows_first(shape: tuple[int, ...]) -> bool:
    """Whether `v_row` has one number per row: the mean goes over the larger axis, the last of equal ones."""
    return shape[0] <= shape[1]
