"""Runs that are killed in a train step, a fire, a save, a write of the ledger or a restore end as those that are not.

A dozen kills; `python tests/crash_run.py --kills=100` makes as many as are wanted, of the language model too.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import pytest
from crash_harness import AIMED, Aim, Kill, Run, killed, uncut
from crash_phases import Phases
from crash_verdict import differences

FIFTH_FIRE = [Aim("fire", 5)]
"""The growth, with records that no checkpoint knows; a checkpoint there is, as each save waits for the one before."""
ONE = [*FIFTH_FIRE, Aim("restore", 1), Aim("save", 1), Aim("ledger", 4), Aim("step", 3)]
ONE += [Aim("restore", 1), Aim("save", 2), Aim("fire", 2)]


class Outcome(NamedTuple):
    """What became of a killed run, beside one that was not."""

    kills: list[Kill]
    ours: pathlib.Path
    uncut: pathlib.Path

    @property
    def differences(self) -> list[str]:
        return differences(self.ours, self.uncut)


def chain(workdir: pathlib.Path, kind: str, processes: int, cuts: dict[str, Any]) -> dict[str, Outcome]:
    """A run without kills, and some with them, by name; the one named after a mistake makes it."""
    plain = Run(kind, workdir / "uncut", workdir / "cache", processes=processes)
    uncut(plain)
    told = {}
    for seed, (name, aims) in enumerate(cuts.items()):
        wrong = name if name == "forgetful" else None
        run = plain._replace(workdir=workdir / name, wrong=wrong)
        told[name] = Outcome(killed(run, aims, np.random.default_rng(seed)), run.workdir, plain.workdir)
    return told


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Outcome]]:
    """The outcome of a run by its name; two kinds of runs go on at a time, and wait for whom they must."""
    root = tmp_path_factory.mktemp("crashes")
    cuts = {"one": ONE, "forgetful": FIFTH_FIRE}
    with pytest.MonkeyPatch.context() as patch, futures.ThreadPoolExecutor(2) as pool:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they compile for longer than they run
        mlp = pool.submit(chain, root / "mlp", "mlp", 1, cuts)
        two = pool.submit(chain, root / "two", "mlp", 2, {"two": [Aim("save", 3)]})
        digits = pool.submit(chain, root / "digits", "digits", 1, {"digits": [Aim("fire", 6)]})
        of = {**dict.fromkeys(cuts, mlp), "two": two, "digits": digits}
        yield lambda name: of[name].result()[name]


@pytest.mark.parametrize("name", ["one", "two", "digits"])
def test_a_killed_run_leaves_what_one_leaves_that_was_not(ran, name):
    outcome = ran(name)
    assert outcome.differences == []
    assert len(outcome.kills) >= {"one": len(ONE) - 2}.get(name, 1)  # on a busy machine an aim may be missed to the end


def test_kills_land_in_every_phase(ran):
    kills = [kill for name in ("one", "two", "digits") for kill in ran(name).kills]
    assert all(kill.landed for kill in kills)
    assert {kill.aim for kill in kills} == {"restore", *AIMED}
    starts = [json.loads(line)["step"] for line in (ran("one").ours / "restored.jsonl").read_text().splitlines()]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert starts[-1] > 0


def test_a_run_that_forgets_the_past_is_found_out(ran):
    assert any("recorded 2 times" in told for told in ran("forgetful").differences)


def of_arrays(workdir: pathlib.Path) -> None:
    path = workdir / "final-0.npz"
    arrays = dict(np.load(path))
    name = next(name for name in arrays if "trace" in name and arrays[name].size > 8)
    np.savez(path, **arrays | {name: np.nextafter(arrays[name], np.float32(9))})


def of_records(workdir: pathlib.Path) -> None:
    path = workdir / "ledger.jsonl"
    path.write_text(path.read_text().replace('"std": 0.01', '"std": 0.02', 1))


def of_order(workdir: pathlib.Path) -> None:
    path = workdir / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2] + lines[:-3:-1]))


def of_metrics(workdir: pathlib.Path) -> None:
    max((workdir / "metrics").iterdir()).unlink()


def of_tails(workdir: pathlib.Path) -> None:
    tails = sorted(workdir.glob("ledger.jsonl.tail-*"))
    first = (workdir / "ledger.jsonl").read_text().splitlines(keepends=True)[0]
    tails[-1].write_text(first + tails[-1].read_text())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_arrays, "final-0.npz"),
        (of_records, "record "),
        (of_order, "record "),
        (of_metrics, "metric "),
        (of_tails, "tail "),
    ],
)
def test_the_verdict_finds_a_change(ran, tmp_path, change, told):
    outcome = ran("one")
    ours = tmp_path / "ours"
    shutil.copytree(outcome.ours, ours)
    change(ours)
    found = differences(ours, outcome.uncut)
    assert found
    assert all(one.startswith(told) for one in found)


def test_marks_can_be_read_beside_the_process(tmp_path):
    ours = Phases.begin(tmp_path / "marks")
    theirs = Phases(tmp_path / "marks")
    assert theirs.inside() == frozenset()
    ours.step = 7
    with ours.during("save"):
        with ours.during("step"):
            assert theirs.inside() == {"save", "step"}
        assert (theirs.inside(), theirs.count("step"), theirs.step) == ({"save"}, 1, 7)
    assert theirs.inside() == frozenset()
    assert theirs.secs("save") > 0
