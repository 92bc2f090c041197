"""Markdown tables of what fires did."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

HEAD = ("Name", "Shape", "Dtype", "Size", "Norm before", "Norm after", "Change", "Changed", "Fresh", "Zeros")
LEFT = 3
"""Columns of text; the others hold numbers."""


def leaf_table(
    paths: Sequence[str],
    leaves: Sequence[tuple[tuple[int, ...], str]],
    added: Sequence[str],
    removed: Sequence[str],
    figures: Any,
    limit: int | None = None,
) -> str:
    """The leaves of a fire, one row each.

    Args:
      paths: leaves after the fire.
      leaves: their shapes and dtypes.
      added: those of them that were not there before.
      removed: leaves that are gone.
      figures: `metrics.COLUMNS` of all these, [leaves, columns]; None leaves the numbers out.
      limit: how many rows to show at most; what more there are is counted in a last one.
    """
    shown = [
        (f"{path} (added)" if path in added else path, str(tuple(shape)), dtype)
        for path, (shape, dtype) in zip(paths, leaves, strict=True)
    ]
    shown += [(f"{path} (removed)", "", "") for path in removed]
    if figures is None:
        return table(HEAD[:LEFT], _limited(shown, limit), left=LEFT)
    is_new = [path in added for path in paths] + [False] * len(removed)
    rows = [(*texts, *_numbers(row, new)) for texts, row, new in zip(shown, figures, is_new, strict=True)]
    return table(HEAD, _limited(rows, limit), left=LEFT)


def _limited(rows: Sequence[tuple[str, ...]], limit: int | None) -> Sequence[tuple[str, ...]]:
    if limit is None or len(rows) <= limit:
        return rows
    return [*rows[:limit], (f"and {len(rows) - limit:,} more", *[""] * (len(rows[0]) - 1))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    r"""A Markdown table, its first `left` columns aligned to the left and the others to the right.

    >>> print(table(("a", "b"), [("x|y", "1")], left=1))
    | a | b |
    |:--|--:|
    | x\|y | 1 |
    """
    rules = [":--"] * left + ["--:"] * (len(head) - left)
    lines = [_line(head), "|" + "|".join(rules) + "|"]
    return "\n".join([*lines, *map(_line, rows)])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int]) -> str:
    """The same for a terminal: columns are as wide as their widest cell; those of the numbers `right` end in line.

    >>> print(aligned(("step", "hook"), [("5", "a"), ("100", "bc")], right=(0,)))
    | step | hook |
    |-----:|:-----|
    |    5 | a    |
    |  100 | bc   |
    """
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rules = ["-" * (width + 1) + ":" if i in right else ":" + "-" * (width + 1) for i, width in enumerate(widths)]
    columns = [
        [cell.rjust(width) if i in right else cell.ljust(width) for cell in column]
        for i, (column, width) in enumerate(zip(zip(*lines, strict=True), widths, strict=True))
    ]
    written = ["| " + " | ".join(line) + " |" for line in zip(*columns, strict=True)]
    return "\n".join([written[0], "|" + "|".join(rules) + "|", *written[1:]])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _numbers(row: Any, new: bool) -> list[str]:
    size, before, after, change, changed, fresh, sparsity = (float(value) for value in row)
    if not size:  # a removed leaf
        return ["0", f"{before:.4g}", *[""] * 5]
    shares = (changed / size, fresh / size, sparsity)
    compared = ("", f"{after:.4g}", "") if new else (f"{before:.4g}", f"{after:.4g}", f"{change:.3g}")
    return [f"{size:,.0f}", *compared, *(f"{100 * share:.3g} %" for share in shares)]
