"""A byte n-gram model with back-off, the baseline that the language model has to beat.

    python examples/lm_ngram.py [--order=5]

Interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1998), with its three discounts per order. Prints held-out
bits per byte of the standard library's sources.
"""

from __future__ import annotations

import argparse
import dataclasses

import lm_data
import numpy as np

MAX_ORDER = 8
"""So many bytes fit a uint64."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The n-grams of one length.

    Attributes:
      keys: the n-grams as numbers, oldest byte first, sorted, uint64 [n-grams].
      counts: how often each occurs or, below the highest order, after how many different bytes, int64 [n-grams].
      discounts: what is taken off counts of 1, of 2, and of 3 or more.
    """

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray

    def interpolate(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of the last bytes of `keys` after their others.

        Args:
          keys: n-grams, uint64 [queries].
          lower: their probabilities by the next lower order, float64 [queries].
        """
        contexts, first = np.unique(self.keys >> np.uint64(8), return_index=True)
        taken = self.discounts[np.minimum(self.counts, 3) - 1]
        totals = np.add.reduceat(self.counts, first).astype(np.float64)
        spare = np.add.reduceat(taken, first)
        kept = _lookup(self.keys, self.counts - taken, keys)
        total = _lookup(contexts, totals, keys >> np.uint64(8))
        rest = _lookup(contexts, spare, keys >> np.uint64(8))
        seen = total > 0
        return np.where(seen, (kept + rest * lower) / np.where(seen, total, 1), lower)


@dataclasses.dataclass(frozen=True)
class NGram:
    """An n-gram model of bytes.

    Attributes:
      tables: those of order 1, 2, ...
    """

    tables: tuple[Table, ...]

    @classmethod
    def fit(cls, stream: np.ndarray, order: int = 5) -> NGram:
        """Counts the n-grams of a stream.

        Args:
          stream: uint8 [bytes].
          order: length of the longest n-grams, 1 to 8.

        Raises:
          ValueError: another order.
        """
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"The order is 1 to {MAX_ORDER}, not {order}.")
        keys, counts = np.unique(_grams(stream, order), return_counts=True)
        tables = [Table(keys, counts, discounts(counts))]
        for length in range(order - 1, 0, -1):
            keys, counts = np.unique(tables[-1].keys & _mask(length), return_counts=True)
            tables.append(Table(keys, counts, discounts(counts)))
        return cls(tuple(reversed(tables)))

    def bits(self, stream: np.ndarray) -> np.ndarray:
        """Bits that the model needs for each byte of a stream, float64 [bytes]."""
        grams = _grams(stream, len(self.tables))
        probabilities = np.full(len(stream), 1 / 256)
        for length, table in enumerate(self.tables, start=1):
            probabilities = table.interpolate(grams & _mask(length), probabilities)
        return -np.log2(probabilities)


def discounts(counts: np.ndarray) -> np.ndarray:
    """What modified Kneser-Ney takes off counts of 1, of 2, and of 3 or more, from how many there are of 1 to 4.

    Where one of these is missing, as it is in a table with few n-grams, half a count and no more than the count.
    """
    ones, twos, threes, fours = (float((counts == count).sum()) for count in (1, 2, 3, 4))
    if not ones or not twos or not threes:
        return np.array([0.5, 0.5, 0.5])
    ratio = ones / (ones + 2 * twos)
    found = np.array([1 - 2 * ratio * twos / ones, 2 - 3 * ratio * threes / twos, 3 - 4 * ratio * fours / threes])
    return np.clip(found, 0.0, [1.0, 2.0, 3.0])


def _grams(stream: np.ndarray, order: int) -> np.ndarray:
    """The `order` bytes that end at each place, as numbers; before the stream are zeros. uint64 [bytes]."""
    padded = np.concatenate([np.zeros(order - 1, np.uint64), stream.astype(np.uint64)])
    keys = np.zeros(len(stream), np.uint64)
    for i in range(order):
        keys = keys << np.uint64(8) | padded[i : i + len(stream)]
    return keys


def _mask(length: int) -> np.uint64:
    """Keeps the `length` newest bytes of a key."""
    return np.uint64(2 ** (8 * length) - 1)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at the places of the wanted keys, 0 where a key is not there; float64."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0.0)


def main(order: int) -> float:
    """Prints and returns held-out bits per byte."""
    train, held_out = lm_data.split()
    stream = held_out.stream()
    bits = float(NGram.fit(train.stream(), order).bits(stream).mean())
    print(f"{order}-gram: {bits:.4f} bits per byte on {len(stream):,} bytes of {len(held_out.files)} held-out files")
    return bits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--order", type=int, default=5, help="bytes of the longest n-grams, 1 to 8")
    main(parser.parse_args().order)
