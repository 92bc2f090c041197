"""What it costs to mark the k largest elements: against a sort, and against finding the threshold on the host.

python benchmarks/selection.py [--fast]
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

if __name__ == "__main__":  # the rows of one device are of as many threads with eight of them as with one
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from paired import Ratio, ratio, seconds

import flax_surgery_hooks as fsh
from flax_surgery_hooks.top_k import top_k_masks, top_k_masks_each

PART = 4
"""One element in so many is marked."""


def leaves_of(count: int, size: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), count)
    return {f"leaf_{i}": jax.random.normal(key, (size,)) for i, key in enumerate(keys)}


def sorted_masks(scores: dict[str, jax.Array], k: Any) -> dict[str, jax.Array]:
    """All that is as large as the k-th largest, by a sort, as pruners do it; ties are all kept."""
    flat = jnp.sort(jnp.concatenate([leaf.ravel() for leaf in scores.values()]))
    return {name: leaf >= flat[flat.size - k] for name, leaf in scores.items()}


class Selection:
    """A compiled selection from leaves on one device, and what it is compared with."""

    def __init__(self, count: int, size: int, *, each: bool = False):
        self._scores = leaves_of(count, size)
        self._flat = np.concatenate([np.asarray(leaf).ravel() for leaf in self._scores.values()])
        self._k = jnp.int32(self._flat.size // PART)
        if each:
            one = jnp.int32(size // PART)
            self._program = (
                jax.jit(lambda scores, k: top_k_masks_each(scores, dict.fromkeys(scores, one)))
                .lower(self._scores, self._k)
                .compile()
            )
        else:
            self._program = jax.jit(top_k_masks).lower(self._scores, self._k).compile()

    def __call__(self) -> Any:
        return self._program(self._scores, self._k)

    def on_host(self) -> float:
        """The threshold alone, by NumPy."""
        return np.partition(self._flat, self._flat.size - int(self._k))[self._flat.size - int(self._k)]

    def over_host(self, pairs: int) -> Ratio:
        return ratio(self, self.on_host, pairs)

    def sort_over(self, repeats: int) -> float:
        """How many times as long one sort takes as the fastest of some selections."""
        by_sort = jax.jit(sorted_masks).lower(self._scores, self._k).compile()
        self()
        return seconds(lambda: by_sort(self._scores, self._k)) / min(seconds(self) for _ in range(repeats))

    def temporaries(self) -> float:
        """What the program allocates beside its arrays, over the bytes of the scores."""
        return self._program.memory_analysis().temp_size_in_bytes / self._flat.nbytes


def said(side: int) -> int:
    """Bytes that a program for one leaf over eight devices says to other devices in one trip of each of its loops."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    leaf = jax.ShapeDtypeStruct((side, side), jnp.float32, sharding=sharding)
    program = jax.jit(top_k_masks).lower({"leaf": leaf}, jnp.int32(0)).compile()
    return sum(one.bytes for one in fsh.collectives(program))


def rows(fast: bool) -> list[tuple[str, str, str]]:
    """Name, figure and bound of every measurement."""
    log, pairs = (18, 3) if fast else (24, 11)
    table = []
    for name, count, each in (("one leaf", 1, False), ("16 leaves together", 16, False), ("16 leaves, each", 16, True)):
        selection = Selection(count, 2**log // count, each=each)
        what = f"of {name}, 2**{log} float32"
        table.append((f"sort / top-k {what}", f"{selection.sort_over(pairs):.1f}", "-"))
        table.append((f"top-k {what} / threshold by numpy.partition", str(selection.over_host(pairs)), "3"))
        table.append((f"temporaries of top-k {what} / bytes of scores", f"{selection.temporaries():.4f}", "1"))
    if len(jax.devices()) >= 8:
        table.append(("bytes that top-k says over 8 devices, a trip", str(said(256 if fast else 4096)), "1024"))
    return table


def main() -> None:
    """Prints the rows as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="small arrays, few pairs")
    print("| what | figure: median (quartiles) | wanted at most |\n|---|---|---|")
    for row in rows(parser.parse_args().fast):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
