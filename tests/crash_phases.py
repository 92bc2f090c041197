"""What a process is doing, in memory that outlives it: a small file, mapped by the process and by who watches it."""

from __future__ import annotations

import contextlib
import mmap
import pathlib
import threading
import time
from collections.abc import Iterator

PHASES = ("restore", "step", "fire", "save", "ledger")
"""Of a process: reading its checkpoint, a train step, a call of the hooks at which some are due, a save from the call
to its commit in the background, and a record on its way into the ledger's file."""

_COUNT, _INSIDE, _MICROS = range(3)
_AT = 3 * len(PHASES)
_SIZE = 4 * (_AT + 1)


class Phases:
    """Marks of one process, as it makes them or as another reads them, also after its death.

    Args:
      path: the file; made anew by `begin`.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        with path.open("r+b") as file:
            self._cells = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("I")
        self._lock = threading.Lock()
        self._since: dict[str, float] = {}

    @classmethod
    def begin(cls, path: pathlib.Path) -> Phases:
        """Marks of a process that has done nothing yet."""
        path.write_bytes(bytes(_SIZE))
        return cls(path)

    def _cell(self, phase: str, which: int) -> int:
        return 3 * PHASES.index(phase) + which

    def enter(self, phase: str) -> None:
        with self._lock:  # a save ends on a thread of its own
            self._since[phase] = time.perf_counter()
            self._cells[self._cell(phase, _INSIDE)] += 1
            self._cells[self._cell(phase, _COUNT)] += 1

    def leave(self, phase: str) -> None:
        with self._lock:
            self._cells[self._cell(phase, _INSIDE)] -= 1
            micros = int(1e6 * (time.perf_counter() - self._since[phase]))
            self._cells[self._cell(phase, _MICROS)] = min(micros, 2**32 - 1)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        self.enter(phase)
        try:
            yield
        finally:
            self.leave(phase)

    def count(self, phase: str) -> int:
        """How often the phase has begun."""
        return self._cells[self._cell(phase, _COUNT)]

    def secs(self, phase: str) -> float:
        """How long it took when it last ended."""
        return 1e-6 * self._cells[self._cell(phase, _MICROS)]

    def inside(self) -> frozenset[str]:
        """The phases that have begun and not ended; a save may go on under a train step."""
        return frozenset(phase for phase in PHASES if self._cells[self._cell(phase, _INSIDE)])

    @property
    def step(self) -> int:
        """The train step that is being made, or was made last."""
        return self._cells[_AT]

    @step.setter
    def step(self, step: int) -> None:
        self._cells[_AT] = step
