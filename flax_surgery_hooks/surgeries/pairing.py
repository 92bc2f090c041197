"""How surgeries on several leaves of one module find them: by names below a common parent."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted
from flax_surgery_hooks.paths import listed


class Part(NamedTuple):
    """Where a leaf lies.

    Attributes:
      parent: path of what holds the named module; leaves of one parent belong together.
      layer: "[3]" for a layer of a stack, else "".
      rest: what follows the name in the path, such as "kernel".
    """

    parent: str
    layer: str
    rest: str

    @property
    def group(self) -> str:
        """Equal for leaves that belong together."""
        return self.parent + self.layer


def part_of(path: str, name: str) -> Part | None:
    """How a path goes through a name (the last place of it counts), or None if it does not.

    >>> part_of("block_0/attention/query/kernel", "query")
    Part(parent='block_0/attention', layer='', rest='kernel')
    >>> part_of("blocks/mlp/up/kernel[3]", "mlp/up").group
    'blocks[3]'
    """
    stem, layer = re.fullmatch(r"(.*?)((?:\[\d+\])?)", path, re.DOTALL).groups()  # type: ignore[union-attr]
    parent, found, rest = f"/{stem}/".rpartition(f"/{name}/")
    return Part(parent[1:], layer, rest[:-1]) if found else None


def grouped(surgery: str, paths: Iterable[str], names: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """The selected leaves by what they belong to.

    Args:
      surgery: for messages.
      paths: of all selected leaves.
      names: of the modules or leaves that the surgery works on; the name that stands deepest in a path is its.

    Returns:
      Group -> name -> rest -> path.

    Raises:
      SurgeryFunctionError: a selected leaf goes through none of the names.

    >>> grouped("Twice", ["a/up/kernel", "a/down/kernel"], ["up", "down"])
    {'a': {'up': {'kernel': 'a/up/kernel'}, 'down': {'kernel': 'a/down/kernel'}}}
    """
    names = tuple(names)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for path in paths:
        parts = {name: part for name in names if (part := part_of(path, name)) is not None}
        if not parts:
            raise SurgeryFunctionError(
                f"A selected leaf is none that {surgery} works on.",
                path=path,
                found=f"no {' or '.join(map(quoted, names))} in the path",
                write="params= with these leaves alone, or the names that they have in this model",
            )
        name = min(parts, key=lambda name: len(parts[name].rest))
        found.setdefault(parts[name].group, {}).setdefault(name, {})[parts[name].rest] = path
    return found


def whole(surgery: str, group: str, found: dict[str, Any], names: Iterable[str]) -> None:
    """Checks that each of the names has a leaf in a group.

    Raises:
      SurgeryFunctionError: one has none.
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise SurgeryFunctionError(
            f"{surgery} has no {quoted(missing[0])} to go with a selected leaf.",
            path=group or None,
            found=f"only {listed(found)}",
            write="params= that selects both, or the names that they have in this model",
        )
