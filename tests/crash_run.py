"""Kills runs a hundred times and more, and tells where: `python tests/crash_run.py --kills=100`.

Ends with 1, and says what differs, if a run has left anything else than it would have left without kills.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from crash_harness import AIMED, Aim, Kill, Run, killed, uncut
from crash_verdict import differences
from tqdm import tqdm

SHARES = {"mlp": 0.76, "mlp x 2": 0.08, "digits": 0.08, "lm": 0.04, "lm x 2": 0.04}
"""Which part of the kills each run takes; "x 2" is of two processes."""
KILLS_OF_A_RUN = {"mlp": 12}
ROW = "{:10}" + " {:>8}" * (len(AIMED) + 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="how many there are at least, over all runs")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and the kills")
    parser.add_argument("--runs", nargs="+", choices=SHARES, default=list(SHARES), help="which runs")
    parser.add_argument("--workdir", type=pathlib.Path, default=None, help="where they work; by default a new one")
    given = parser.parse_args()
    workdir = given.workdir or pathlib.Path(tempfile.mkdtemp(prefix="crashes-"))
    total = sum(SHARES[name] for name in given.runs)
    bad = 0
    kills: dict[str, list[Kill]] = collections.defaultdict(list)
    with tqdm(total=given.kills, desc="kills", unit="kill", smoothing=0) as bar:
        for name in given.runs:
            wanted = round(given.kills * SHARES[name] / total)
            bad += _many(name, workdir / name.replace(" ", ""), wanted, given.seed, kills[name], bar)
    print(table(kills))
    (workdir / "kills.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kills)))
    print(f"{bad} runs differ from those that were not killed. See {workdir}.")
    return bool(bad)


def _many(name: str, workdir: pathlib.Path, wanted: int, seed: int, kills: list[Kill], bar: tqdm) -> int:
    """Kills one sort of run until it has had enough, and returns how many runs differ."""
    kind, _, processes = name.partition(" x ")
    plain = Run(kind, workdir / "uncut", workdir / "cache", seed, int(processes or 1))
    started = time.monotonic()
    uncut(plain)
    tqdm.write(f"{name}: {time.monotonic() - started:.0f} s without a kill")
    aims, bad = itertools.cycle(map(Aim, AIMED)), 0
    for number in itertools.count():
        if len(kills) >= wanted:
            return bad
        many = min(KILLS_OF_A_RUN.get(name, 6), wanted - len(kills))
        run = plain._replace(workdir=workdir / f"run-{number}")
        rng = np.random.default_rng((seed, number))

        def note(kill: Kill) -> None:
            kills.append(kill)
            bar.update()
            inside = ", ".join(sorted(kill.inside))
            tqdm.write(f"{name}: killed in {kill.aim} at step {kill.step} ({inside})")

        killed(run, itertools.islice(aims, many), rng, note)
        told = differences(run.workdir, plain.workdir)
        bad += bool(told)
        for line in told[:8]:
            tqdm.write(f"{run.workdir}: {line[:300]}")


def rows(kills: dict[str, list[Kill]]) -> list[dict[str, object]]:
    return [
        {"run": name, "aim": one.aim, "inside": sorted(one.inside), "step": one.step, "rank": one.rank}
        for name, of_run in kills.items()
        for one in of_run
    ]


def table(kills: dict[str, list[Kill]]) -> str:
    """Kills by run and by the phase in which they landed."""

    def row(name: str, of: Sequence[Kill]) -> str:
        landed = [sum(kill.landed and kill.aim == aim for kill in of) for aim in AIMED]
        early = sum(kill.step <= 1 for kill in of)
        return ROW.format(name, *landed, sum(landed), len(of), early)

    head = ROW.format("run", *AIMED, "landed", "kills", "step 1")
    rows_of = [row(name, of) for name, of in kills.items()]
    return "\n".join([head, *rows_of, row("all", [*itertools.chain(*kills.values())])])


if __name__ == "__main__":
    sys.exit(main())
