"""Pages of Markdown whose tables and sentences come from the numbers that examples have kept."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import results


def fill(text: str, made: Mapping[str, str]) -> str:
    """A Markdown text with what was measured in its places, which comments `<!-- measured: NAME -->` mark."""

    def one(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- measured: (\w+) -->).*?<!-- end -->", one, text, flags=re.DOTALL)


def versions(found: Mapping[str, Any]) -> str:
    """What a measurement was made with."""
    return ", ".join(f"{name} {version}" for name, version in found["versions"].items() if "surgery" not in name)


def comparison(
    runs: Mapping[str, Sequence[results.Run]], what: str, names: Sequence[str], scale: float, digits: int
) -> str:
    """A table of what methods end with; the first is the control.

    Args:
      runs: method -> runs.
      what: which curve of theirs.
      names: heads of the columns: the value, its range over seeds, and, if it is wanted, the difference to the control.
      scale: what values are multiplied by.
      digits: behind the point.
    """
    control = next(iter(runs))
    rows = [["", *names]]
    for name, ones in runs.items():
        last = [scale * value for value in results.last(ones, what)]
        beside = "" if name == control else results.apart(ones, runs[control], what, scale, digits)
        span = f"{min(last):.{digits}f} to {max(last):.{digits}f}"
        rows.append([name, f"{results.mean(last):.{digits}f}", span, beside][: len(rows[0])])
    return table(rows)


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph, in lines."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def bullets(*texts: str) -> str:
    """A list."""
    return "\n".join(wrapped(f"- {text}", "  ") for text in texts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])
