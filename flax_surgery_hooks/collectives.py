"""What a compiled program says to other devices: which collectives it has, and how many bytes they move."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

KINDS = (
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip

_INSTRUCTION = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+[0-9]*\w*)\[(?P<sizes>[0-9,]*)\]")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: one of `KINDS`, as XLA names it.
      shapes: dtype and shape of each array that comes out of it on one device, as "f32[3,32]".
      bytes: the size of these.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        return f"{self.kind} of {', '.join(self.shapes)} ({self.bytes:,} B)"


def collectives(program: Any) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order of its text; those of a branch that is not taken too.

    Args:
      program: what `jax.jit(...).lower(...).compile()` gives, or its text (`as_text()`).

    >>> import jax, jax.numpy as jnp
    >>> collectives(jax.jit(jnp.sum).lower(jnp.ones(8)).compile())
    ()
    >>> text = "%x = f32[3,32]{1,0} all-reduce(%y), to_apply=%add"
    >>> [str(one) for one in collectives(text)]
    ['all-reduce of f32[3,32] (384 B)']
    """
    text = program if isinstance(program, str) else program.as_text()
    return tuple(_read(match) for match in _INSTRUCTION.finditer(text))


def _read(match: re.Match[str]) -> Collective:
    arrays = list(_ARRAY.finditer(match["shape"]))
    shapes = tuple(f"{array['dtype']}[{array['sizes']}]" for array in arrays)
    return Collective(match["kind"], shapes, sum(map(_bytes, arrays)))


def _bytes(array: re.Match[str]) -> int:
    """The bytes of an array; predicates, and what has fewer than eight bits, take one for each element."""
    bits = _BITS.search(array["dtype"])
    each = max(int(bits[0]) // 8, 1) if bits else 1
    return each * math.prod(int(size) for size in array["sizes"].split(",") if size)
