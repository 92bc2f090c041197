"""Starts a run as processes of its own, kills them with SIGKILL while they do a given thing, and starts them again.

A kill is aimed at a phase (see crash_phases.py): after some occurrences of it, and a random part of its duration, the
process is stopped (SIGSTOP), and killed if its marks say that it is in that phase; else it goes on until the next one.
So where a kill has landed is known, and nothing in the process waits to be killed.

Compiled programs are kept in JAX's cache on disk, which makes restarts cheap and can hide no difference: the run that
is not killed compiles all of them itself, as it begins with an empty cache, and what it leaves is compared with what
programs from the cache leave.
"""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from crash_phases import Phases

HERE = pathlib.Path(__file__).parent
AIMED = ("step", "fire", "save", "ledger")
LIMIT_SECS = 600
_LATEST = {"restore": 1, "step": 9, "fire": 5, "save": 4, "ledger": 12}
"""A kill comes at one of so many first occurrences, so that most starts reach a checkpoint or two and some none."""
_FIRST_SECS = {"restore": 0.3}
"""How long a phase may take that has not ended yet in this process."""


class Run(NamedTuple):
    """What is run.

    Attributes:
      kind: one of crash_trainings.TRAININGS.
      workdir: its directory.
      cache: where compiled programs are kept.
      seed: of the model, its data and its hooks.
      processes: how many train together.
      wrong: "forgetful" for a worker that makes a mistake, see `Worker.restored`.
    """

    kind: str
    workdir: pathlib.Path
    cache: pathlib.Path
    seed: int = 0
    processes: int = 1
    wrong: str | None = None


class Aim(NamedTuple):
    """Where a kill is to land: in a phase, at its n-th occurrence or, by default, at one drawn at random."""

    phase: str
    nth: int | None = None


class Kill(NamedTuple):
    """A kill.

    Attributes:
      aim: the phase it was aimed at.
      inside: the phases in which the process was when it died.
      step: its train step then; 0 before the first.
      rank: which of the processes.
    """

    aim: str
    inside: frozenset[str]
    step: int
    rank: int

    @property
    def landed(self) -> bool:
        """Whether the process died in the phase aimed at."""
        return self.aim in self.inside


class Failed(Exception):
    """A worker ended by itself, and not well."""


class Session:
    """The processes of a run, from a start to a death or the end. They import all they need before `go`."""

    def __init__(self, run: Run):
        self._run = run
        run.workdir.mkdir(parents=True, exist_ok=True)
        run.cache.mkdir(parents=True, exist_ok=True)
        self.processes = [self._started(rank) for rank in range(run.processes)]

    def _started(self, rank: int) -> subprocess.Popen[str]:
        run = self._run
        flags = {"kind": run.kind, "workdir": run.workdir, "seed": run.seed, "cache": run.cache, "wrong": run.wrong}
        if run.processes > 1:
            flags |= {"num_processes": run.processes, "process_id": rank}
        command = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(paths)}
        with (run.workdir / f"output-{rank}.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, str(HERE / "crash_worker.py"), *command],
                env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True,
            )  # fmt: skip

    def go(self) -> list[Phases]:
        """Lets them begin, and returns their marks."""
        paths = [self._run.workdir / f"phases-{rank}" for rank in range(len(self.processes))]
        for path in paths:
            path.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{port}\n")
            process.stdin.close()
        while not all(path.exists() and path.stat().st_size for path in paths):
            self.check()
            time.sleep(0.002)
        return [Phases(path) for path in paths]

    def check(self) -> bool:
        """Whether all have ended well.

        Raises:
          Failed: one has not.
        """
        codes = [process.poll() for process in self.processes]
        for rank, code in enumerate(codes):
            if code:
                self.end()
                output = (self._run.workdir / f"output-{rank}.txt").read_text()
                raise Failed(f"process {rank} of {self._run.workdir} ended with {code}:\n{output[-4000:]}")
        return None not in codes

    def wait(self) -> None:
        """Waits until all have ended well."""
        end = time.monotonic() + LIMIT_SECS
        while not self.check():
            if time.monotonic() > end:
                self.end()
                raise Failed(f"{self._run.workdir} takes longer than {LIMIT_SECS} s")
            time.sleep(0.01)

    def end(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def uncut(run: Run) -> None:
    """Runs to the end."""
    with Session(run) as session:
        session.go()
        session.wait()


def killed(
    run: Run, aims: Iterable[Aim], rng: np.random.Generator, on_kill: Callable[[Kill], object] = lambda kill: None
) -> list[Kill]:
    """Runs to the end with a kill for each aim, or fewer where the end comes first.

    The processes of the next start are made ready while those before them train.
    """
    kills: list[Kill] = []
    following = Session(run)
    try:
        for aim in aims:
            with following as session:
                following = Session(run)
                kill = _killed(session, aim, rng)
            if kill is None:
                return kills
            kills.append(kill)
            on_kill(kill)
        following.go()
        following.wait()
        return kills
    finally:
        following.end()


def _killed(session: Session, given: Aim, rng: np.random.Generator) -> Kill | None:
    """Kills a session within a phase; None if it came to its end."""
    marks, aim = session.go(), given.phase
    rank = int(rng.integers(len(marks)))
    if aim == "ledger":
        rank = 0  # which alone writes it
    process, mark = session.processes[rank], marks[rank]
    wanted = given.nth or int(rng.integers(1, _LATEST[aim] + 1))
    end = time.monotonic() + LIMIT_SECS
    while time.monotonic() < end:
        if session.check():
            return None
        if mark.count(aim) < wanted:
            time.sleep(0.0005)
            continue
        time.sleep(rng.uniform(0, mark.secs(aim) or _FIRST_SECS.get(aim, 0.02)))
        if _stopped(process):
            inside = mark.inside()
            if aim in inside:
                process.kill()
                process.wait()
                if len(marks) > 1:
                    time.sleep(rng.uniform(0, 0.3))  # until a launcher sees it, and ends the others
                return Kill(aim, inside, mark.step, rank)
            os.kill(process.pid, signal.SIGCONT)
            wanted = mark.count(aim) + 1
    raise Failed(f"never in phase {aim} at its occurrence {wanted}")


def _stopped(process: subprocess.Popen[str]) -> bool:
    """Stops a process with all its threads; False if it has ended."""
    if process.poll() is not None:
        return False
    os.kill(process.pid, signal.SIGSTOP)
    told = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return told is not None and told.si_code == os.CLD_STOPPED
