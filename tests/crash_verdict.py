"""Whether a run that was killed, perhaps often, has left what one has left that was not; as a list of differences."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import event_files
import numpy as np

from flax_surgery_hooks.ledger import HOST_FACTS, Ledger, Record


def differences(ours: pathlib.Path, uncut: pathlib.Path) -> list[str]:
    """What the work directory of a killed run has otherwise than that of the other, and what in it cannot be."""
    checks = (_arrays, _records, _metrics)
    return [told for check in checks for told in check(ours, uncut)] + _twice(ours) + _tails(ours)


def _arrays(ours: pathlib.Path, uncut: pathlib.Path) -> list[str]:
    """Step, parameters, optimizer state and memory: the same names, dtypes and bytes."""
    told = []
    for path in sorted(uncut.glob("final-*.npz")):
        found, wanted = dict(np.load(ours / path.name)), dict(np.load(path))
        if found.keys() != wanted.keys():
            told.append(f"{path.name}: other arrays: {sorted(found.keys() ^ wanted.keys())}")
            continue
        same = {name: _bytes(found[name]) == _bytes(wanted[name]) for name in wanted}
        told += [f"{path.name}: {name} differs" for name in wanted if not same[name]]
    return told


def _bytes(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()


def facts(record: Record) -> dict[str, Any]:
    """What a record tells, but for facts of the host."""
    return {name: value for name, value in json.loads(record.to_json()).items() if name not in HOST_FACTS}


def _records(ours: pathlib.Path, uncut: pathlib.Path) -> list[str]:
    """The ledgers' files, record by record, but for those that say when a process began."""
    found, wanted = ([facts(one) for one in _ledger(path) if one.event != "run"] for path in (ours, uncut))
    told = [f"record {i} is {a}, not {b}" for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
    return told + ([f"{len(found)} records, not {len(wanted)}"] if len(found) != len(wanted) else [])


def _ledger(workdir: pathlib.Path) -> tuple[Record, ...]:
    return Ledger.read(workdir / "ledger.jsonl")


def _twice(ours: pathlib.Path) -> list[str]:
    """Fires that are recorded more than once; in these runs no hook fires twice at a step."""
    fires = [(one.step, one.hook) for one in _ledger(ours) if one.event == "fired"]
    ids = [one.id for one in _ledger(ours) if one.event == "fired"]
    told = [f"{fire} is recorded {count} times" for fire, count in collections.Counter(fires).items() if count > 1]
    return told + ([] if ids == list(range(len(ids))) else [f"the fires are numbered {ids}"])


def _metrics(ours: pathlib.Path, uncut: pathlib.Path) -> list[str]:
    """The last value of each tag at each step, in all event files of a run; and the hyperparameters."""
    found, wanted = _last_values(ours / "metrics"), _last_values(uncut / "metrics")
    told = [f"metric {key} is {found.get(key)}, not {wanted.get(key)}" for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)]  # fmt: skip
    return told + ([] if _hparams(ours) == _hparams(uncut) else ["the hyperparameters differ"])


def _hparams(workdir: pathlib.Path) -> bytes:
    _, last = event_files.read_session_starts(workdir / "metrics")[-1]
    last.ClearField("start_time_secs")
    return last.SerializeToString(deterministic=True)


def _last_values(logdir: pathlib.Path) -> dict[tuple[str, int], bytes]:
    values = event_files.read_values(logdir).items()
    return {
        (tag, step): value.SerializeToString(deterministic=True)
        for tag, series in values
        for step, value in series
        if not tag.startswith("_hparams_")
    }


def _tails(ours: pathlib.Path) -> list[str]:
    """Files kept beside the ledger: whole records of steps after the checkpoint that the run went on from, and at most
    one line cut off.
    """
    told = []
    starts = [json.loads(line) for line in (ours / "restored.jsonl").read_text().splitlines()]
    known = 0
    for start in starts:
        for number in range(known + 1, start["tails"] + 1):
            text = (ours / f"ledger.jsonl.tail-{number}").read_text()
            steps = [Record.from_json(line).step for line in text.splitlines(keepends=True) if line.endswith("\n")]
            told += [f"tail {number} has a record of step {step}, and the run went on from {start['step']}"
                     for step in steps if step is None or step <= start["step"]]  # fmt: skip
        known = start["tails"]
    return told + ([] if known == len(list(ours.glob("ledger.jsonl.tail-*"))) else ["a tail came from nowhere"])
