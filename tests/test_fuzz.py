"""Generated inputs are accepted and run, or refused by a typed error: nothing else escapes. `fuzz_long.py` has more."""

import os
import pathlib
import subprocess
import sys
import time

import fuzz_calls
import fuzz_inputs
import fuzz_ledgers
import fuzz_runs
import hypothesis
import pytest
from fuzz_long import TARGETS, cached
from fuzz_runs import Tally, judged

import flax_surgery_hooks as fsh
from flax_surgery_hooks import config_registry

# Target -> how many inputs, and which part of them is accepted and does something at least.
SIZES = {
    "configs": (160, 0.3),
    "calls": (120, 0.3),
    "schedules": (300, 0.1),
    "selections": (300, 0.1),
    "round trips": (300, 1.0),
    "lines": (400, 0.3),
    "ledgers": (200, 0.3),
    "saved": (100, 0.2),
}


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    """Programs that are the same are compiled once: most of the time goes into that."""
    with cached(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(autouse=True)
def _surgeries(monkeypatch):
    monkeypatch.setattr(config_registry, "_registered", {**config_registry._registered, **fuzz_inputs.REGISTERED})


def test_every_target_is_run():
    assert SIZES.keys() == TARGETS.keys()


@pytest.mark.parametrize("target", SIZES)
def test_nothing_but_a_typed_error_escapes(target):
    examples, least = SIZES[target]
    strategy, run = TARGETS[target]
    tally = Tally()

    @hypothesis.settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                         phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(strategy)
    def check(given):
        outcome = judged(lambda: run(given))
        tally.add(outcome, given)
        if outcome.kind == "escaped":
            raise AssertionError(outcome.what) from outcome.error

    check()
    assert tally.total >= 0.9 * examples, str(tally)
    assert tally.fired >= least * tally.total, str(tally)
    assert tally.kinds["refused"] or target == "round trips", str(tally)


# The judge.


def test_another_exception_is_an_escape():
    def by_the_library():
        return fsh.Ledger.read(3)  # type: ignore[arg-type]

    assert judged(lambda: 1 // 0).what == "ZeroDivisionError at nowhere"
    assert judged(by_the_library).kind == "refused"
    assert judged(lambda: fsh.at()).what == "ScheduleError"
    assert judged(lambda: 3) == ("accepted", "", 3, None)


def test_a_message_that_cannot_be_shown_is_an_escape():
    class Blank:
        def __str__(self):
            raise ValueError("no luck")

    def refuse(problem):
        raise fsh.SurgeryError(problem)

    assert judged(lambda: refuse(Blank())).kind == "escaped"
    assert judged(lambda: refuse("x" * 30_000)).kind == "escaped"
    assert judged(lambda: refuse("x")).kind == "refused"


def test_a_call_that_does_not_come_back_is_an_escape(monkeypatch):
    monkeypatch.setattr(fuzz_runs, "LIMIT_SECS", 1)
    assert judged(lambda: time.sleep(9) or 0).what.startswith("Hung")


def test_what_others_refuse_is_told_apart():
    given = fuzz_inputs.Input("shell", {"a": {"surgery": "scale", "params": "**", "factor": 1.0, "every": 2}},
                              (("every", "two"),), {}, {}, "sgd", "host", (1,))  # fmt: skip
    outcome = judged(lambda: fuzz_runs.run_config(given))
    assert (outcome.kind, outcome.what) == ("foreign", "IllegalFlagValueError")


# The inputs.


def test_a_damaged_ledger_is_another_one():
    whole = fuzz_ledgers.damaged_bytes(([("none", 0, 0)], "", b""))
    for kind in ("truncate", "flip", "duplicate", "swap", "drop", "replace", "odd", "bytes", "join", "crlf"):
        assert fuzz_ledgers.damaged_bytes(([(kind, 1, 3)], "odd", b"\xff")) != whole, kind
    assert fuzz_ledgers.run_damaged(([("none", 0, 0)], "", b"")) == len(fuzz_ledgers.real_lines())


def test_calls_are_made_as_they_are_written():
    call = fuzz_calls.Call("|", (fuzz_calls.Call("at", (3,)), fuzz_calls.Call("every", (5,), {"stop": 10})))
    assert fuzz_calls.made(call) == fsh.at(3) | fsh.every(5, stop=10)
    assert fuzz_calls.run_schedule((call, 0, 0)) == 3


def test_the_long_run_says_what_became_of_the_inputs():
    script = pathlib.Path(__file__).with_name("fuzz_long.py")
    path = os.pathsep.join([str(pathlib.Path(fsh.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), "--examples", "20", "--only", "lines"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lines: 20 inputs" in done.stdout
