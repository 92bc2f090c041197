"""Ratios of things run in turn in one process: machines are noisy, their noise is shared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax


class Ratio(NamedTuple):
    """How many times as long A takes as B.

    Attributes:
      median: of the ratios pair by pair.
      low: the first quartile.
      high: the third quartile.
      seconds: median of B, for scale only.
    """

    median: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def ratio(a: Callable[[], object], b: Callable[[], object], pairs: int) -> Ratio:
    """Runs A and B in turn, in alternating order, after one run of each that does not count."""
    jax.block_until_ready((a(), b()))
    ratios, of_b = [], []
    for i in range(pairs):
        first, second = (a, b) if i % 2 else (b, a)
        times = {first: seconds(first), second: seconds(second)}
        ratios.append(times[a] / times[b])
        of_b.append(times[b])
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, statistics.median(of_b))
