"""Bytes of the Python standard library's own sources, split by file, as batches that depend on seed and step alone.

A document is a file: a zero byte, then its bytes. An epoch lays all documents end to end in an order of its own, cuts
them into windows and shuffles these. Every batch is computed from its step, so that resuming is asking for it, and each
process reads from disk only the rows that its devices hold.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

SEPARATOR = b"\0"
"""The byte before each document; sources do not contain it."""
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
"""Folders that are left out: tests, installed packages, and tables of characters."""


class File(NamedTuple):
    """A source file: its path relative to the root, with slashes, and its size in bytes."""

    path: str
    size: int


def hash_of(text: str) -> float:
    """A number in [0, 1) that is the same on every machine and in every run.

    >>> round(hash_of("json/decoder.py"), 4)
    0.2312
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def list_files(root: pathlib.Path | None = None, max_files: int | None = None) -> list[File]:
    """The Python sources below `root` (the standard library's by default), sorted by path.

    Args:
      root: a folder.
      max_files: how many to take, those with the smallest hashes; None takes all.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    files = [File(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths if path.is_file()]
    return sorted(sorted(files, key=lambda file: hash_of("order " + file.path))[:max_files])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, read from disk when they are asked for.

    Attributes:
      root: the folder that the paths are relative to.
      files: the documents.
    """

    root: pathlib.Path
    files: tuple[File, ...]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each document, its separator included, int64 [documents]."""
        return np.array([file.size + 1 for file in self.files], np.int64)

    def read(self, document: int, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a document, of which byte 0 is the separator.

        Raises:
          OSError: the file is not as long as it was.
        """
        file = self.files[document]
        with (self.root / file.path).open("rb") as opened:
            opened.seek(max(start - 1, 0))
            wanted = stop - max(start, 1)
            found = opened.read(wanted)
        if len(found) != wanted:
            raise OSError(f"{file.path} had {file.size} bytes when it was listed, and has fewer now.")
        return (SEPARATOR if start == 0 else b"") + found

    def stream(self) -> np.ndarray:
        """All documents end to end, in the order of their paths, uint8 [bytes]."""
        parts = [self.read(i, 0, int(length)) for i, length in enumerate(self.lengths)]
        return np.frombuffer(b"".join(parts), np.uint8)


def split(
    root: pathlib.Path | None = None, held_out: float = 0.05, max_files: int | None = None
) -> tuple[Corpus, Corpus]:
    """The train and the held-out corpus: a file is in one of them by the hash of its path.

    Args:
      root: a folder, the standard library by default.
      held_out: the expected part of the files that is held out.
      max_files: as for `list_files`.

    Raises:
      ValueError: one of the two is empty.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib")) if root is None else root
    files = list_files(root, max_files)
    test = tuple(file for file in files if hash_of("split " + file.path) < held_out)
    train = tuple(file for file in files if file not in set(test))
    if not test or not train:
        raise ValueError(f"{len(files)} files in {root} give {len(train)} to train on and {len(test)} held out.")
    return Corpus(root, train), Corpus(root, test)


class Epoch(NamedTuple):
    """How an epoch lays out the documents.

    Attributes:
      order: the documents, int64 [documents].
      starts: where each begins in the stream, and the stream's end, int64 [documents + 1].
      offset: where the first window begins.
      windows: the windows in the order in which they are seen, int64 [windows].
    """

    order: np.ndarray
    starts: np.ndarray
    offset: int
    windows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of windows; a value without state.

    Attributes:
      corpus: the documents.
      seed: seed of the orders and offsets of all epochs.
      batch_size: windows of one batch.
      length: bytes that a window predicts; it has one more.

    Raises:
      ValueError: the corpus is shorter than two windows.
    """

    corpus: Corpus
    seed: int
    batch_size: int
    length: int

    def __post_init__(self):
        if self.windows_per_epoch < 1:
            raise ValueError(f"{int(self.corpus.lengths.sum())} bytes are too few for windows of {self.length}.")

    @property
    def windows_per_epoch(self) -> int:
        """Windows of an epoch, whatever its offset."""
        return (int(self.corpus.lengths.sum()) - self.length - 1) // self.length

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a batch lies in two epochs at most, mostly; the loader lives as long as the run
    def epoch(self, number: int) -> Epoch:
        """The layout of an epoch, from the seed and its number alone."""
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.corpus.files))
        starts = np.concatenate([[0], np.cumsum(self.corpus.lengths[order])])
        return Epoch(order, starts, int(rng.integers(self.length)), rng.permutation(self.windows_per_epoch))

    def window(self, number: int) -> np.ndarray:
        """The window seen as the `number`-th of the run, uint8 [length + 1]."""
        epoch = self.epoch(number // self.windows_per_epoch)
        start = epoch.offset + int(epoch.windows[number % self.windows_per_epoch]) * self.length
        stop = start + self.length + 1
        parts = []
        place = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        while start < stop:
            begin, end = int(epoch.starts[place]), min(int(epoch.starts[place + 1]), stop)
            parts.append(self.corpus.read(int(epoch.order[place]), start - begin, end - begin))
            start, place = end, place + 1
        return np.frombuffer(b"".join(parts), np.uint8)

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some windows of the batch that a step trains on.

        Args:
          step: train steps applied before it.
          start: the first window.
          stop: the window after the last one; None for the end of the batch.

        Returns:
          int32 [stop - start, length + 1].
        """
        first = step * self.batch_size
        chosen = range(first + start, first + (self.batch_size if stop is None else stop))
        return np.stack([self.window(number) for number in chosen]).astype(np.int32)

    def batch(self, step: int, sharding: NamedSharding, parts: int = 1) -> jax.Array:
        """The batch as an array of all processes, of which each reads what its devices hold.

        Args:
          step: train steps applied before it.
          sharding: how [parts, batch_size / parts, length + 1] lies on the mesh; the last axis is whole.
          parts: into how many microbatches it is cut, for the accumulation of gradients.

        Returns:
          int32 [parts, batch_size / parts, length + 1].
        """
        size = self.batch_size // parts
        shape = (parts, size, self.length + 1)

        @functools.cache  # devices that hold the same rows read them once
        def read(start: int, stop: int) -> np.ndarray:
            return np.stack([self.rows(step, part * size + start, part * size + stop) for part in range(parts)])

        def shard(index: Any) -> np.ndarray:
            return read(*index[1].indices(size)[:2])

        return jax.make_array_from_callback(shape, sharding, shard)


def held_out_windows(stream: np.ndarray, length: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Windows of a stream that predict each byte once, and which bytes these are.

    Args:
      stream: uint8 [bytes].
      length: bytes that a window predicts.
      count: how many windows to take, evenly spread; None takes all.

    Returns:
      int32 [windows, length + 1], and the predicted places in the stream, int64 [windows, length].
    """
    starts = np.arange((len(stream) - 1) // length) * length
    if count is not None and count < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]
    places = starts[:, None] + np.arange(length + 1)
    return stream[places].astype(np.int32), places[:, 1:]
