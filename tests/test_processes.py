"""Two real processes over one mesh: they hold the same hooks or say so, and what they do is what one process does."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_run
from process_worker import Wordy
from tiny import halve, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import agreement
from flax_surgery_hooks.errors import AgreementError, HookError
from flax_surgery_hooks.fingerprint import stable

HERE = pathlib.Path(__file__).parent
LIMIT_SECS = 400  # for what hangs; a busy machine may take minutes to compile for two processes


class Run(NamedTuple):
    """What became of some processes: what each told, how it ended and what it logged, and how long all took."""

    told: list[Any]
    codes: list[int]
    errors: list[str]
    secs: float
    out: pathlib.Path


def started(scenario, out, port, rank, count, source=""):
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(paths)}
    environment["PYTHONHASHSEED"] = str(rank + 1)  # nothing may depend on it
    environment["SOURCE"] = str(source)
    command = [sys.executable, str(HERE / "process_worker.py"), scenario, out, port, rank, count]
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def once(scenario, out, count, source):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    runs = [started(scenario, out, port, rank, count, source) for rank in range(count)]
    try:
        done = [run.communicate(timeout=LIMIT_SECS) for run in runs]
    finally:
        for run in runs:
            run.kill()
    told = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in done]
    told = [lines[-1] if lines else None for lines in told]  # Gloo prints too
    return Run(told, [run.returncode for run in runs], [errors for _, errors in done], time.monotonic() - start, out)


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """A scenario with so many processes; each runs once."""

    @functools.cache
    def run(scenario, count=2, source=""):
        for attempt in range(3):
            result = once(scenario, tmp_path_factory.mktemp(f"{scenario}{attempt}"), count, source)
            if not any("address already in use" in errors.lower() for errors in result.errors):
                break  # else another program took the port between our look and JAX's
        return result

    return run


def finished(run):
    assert set(run.codes) == {0}, "\n".join(errors[-3000:] for errors in run.errors)
    return run


def leaves(run):
    """Path -> shards of a run, by what of the leaf they are; those that several processes hold must be equal."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for rank in range(len(run.codes)):
        with np.load(run.out / f"{rank}.npz") as shards:
            for name, value in shards.items():
                path, _, index = name.rpartition("|")
                held = found.setdefault(path, {}).setdefault(index, value)
                assert held.tobytes() == value.tobytes(), name
    return found


@pytest.fixture(scope="module")
def two(ran):
    return finished(ran("slow"))


@pytest.fixture(scope="module")
def single(ran):
    return finished(ran("train", 1))


def test_both_processes_hold_the_same_and_what_one_process_would(two, single):
    ours, reference = leaves(two), leaves(single)
    assert {path: set(shards) for path, shards in ours.items()} == {path: set(each) for path, each in reference.items()}
    assert ours["['params']['exact']['grown']"].keys() == {f"[({i}, {i + 4}), (0, 4)]" for i in range(0, 32, 4)}
    for path, shards in ours.items():
        for index, value in shards.items():
            other = reference[path][index]
            if "['mlp']" in path:  # sums over devices of two processes, in another order
                np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-6, err_msg=path)
            else:
                assert value.tobytes() == other.tobytes(), path


def test_replicas_on_both_processes_are_compared(two):
    with np.load(two.out / "0.npz") as first, np.load(two.out / "1.npz") as second:
        shared = set(first) & set(second)
        assert {name.rpartition("|")[0] for name in shared} >= {"['params']['mlp']['b1']", "['opt_state'][0].count"}
        assert "['params']['exact']['noisy']|[(0, 2), (0, 4)]" in set(first) - shared


def test_records_are_the_same_on_both_and_those_of_one_process(two, single):
    first, second = two.told
    assert first["records"] == second["records"]
    reference = single.told[0]["records"]
    assert [each[:3] for each in first["records"]] == [each[:3] for each in reference]
    fired = {(hook, step) for event, hook, step, _ in reference if event == "fired"}
    assert {hook for hook, _ in fired} == {
        "norm", "clip", "scale", "noise", "reset", "grow", "average", "traced", "metric", "count"}  # fmt: skip
    assert {step for hook, step in fired if hook == "count"} == {4, 7, 10}
    for ours, theirs in zip(first["records"], reference, strict=True):
        assert ours[3] == pytest.approx(theirs[3], rel=1e-4, abs=1e-6)


def test_what_is_kept_is_put_back_on_every_process(ran):
    first, second = finished(ran("put_back")).told
    assert first == second
    assert first.pop("events") == [
        ["fired", "plain", 2], ["fired", "scaled", 2], ["fired", "reset", 3], ["fired", "noisy", 3],
        ["rolled_back", "scaled", 5], ["rolled_back", "plain", 5],
        ["settled", "plain", 2], ["settled", "scaled", 2], ["undone", "reset", 6],
        ["settled", "reset", 3], ["refused", "noisy", 3],
    ]  # fmt: skip
    assert first == {"rolled_back": [True, True], "others": [True, True], "undone": True, "refused": True, "arrays": []}


def test_the_first_process_alone_writes(two):
    assert [(two.out / f"{rank}.jsonl").exists() for rank in (0, 1)] == [True, False]
    lines = [json.loads(line) for line in (two.out / "0.jsonl").read_text().splitlines()]
    assert [[line["event"], line.get("hook", ""), line["step"]] for line in lines] == [
        each[:3] for each in two.told[0]["records"]
    ]
    first, second = two.told
    assert first["writer"]["write_histograms"] == 3 + 4 + 1 + 2 + 1  # of norm, clip, scale, noise and reset
    assert set(first["writer"]) == {"write_hparams", "write_scalars", "write_texts", "write_histograms", "flush"}
    assert second["writer"] == {}
    assert any("Hook early was due at 0, before the first call" in line for line in first["logged"])
    assert not any("Hook" in line for line in second["logged"])


@pytest.fixture(scope="module")
def differing(ran):
    return finished(ran("disagree")).told


DIFFERENCES = {
    "seed": "settings, seed: 0 on process 0, 1 on process 1",
    "schedule": "hook 'a', when: every(2) on process 0, every(3) on process 1",
    "field": "hook 'a', surgery.factor: 1.0 on process 0, 2.0 on process 1",
    "closure": "hook 'a', surgery.closure.rate: 1.0 on process 0, 2.0 on process 1",
    "code": "hook 'a', surgery.code: ",
    "setting": "settings, donate: auto on process 0, never on process 1",
    "mirror": "settings, mirrors.ema: nothing on process 0, param on process 1",
    "further": "hook 'b': nothing on process 0, registered on process 1",
    "order": 'order: ["a", "b"] on process 0, ["b", "a"] on process 1',
    "added": "hook 'b', when: at(8) on process 0, at(9) on process 1",
    "step": "call, step: 2 on process 0, 3 on process 1",
    "state": "state 'params/w': float32[8, 2] P",
    "part": "state 'params/w': float32[8, 2] on 4 of this process's devices on process 0, float32[8, 2] on devices",
    "call": "call, is: hooks(step, state) on process 0, hooks.fire('a') on process 1",
    "init": "settings, seed: 0 on process 0, 1 on process 1",
    "graph": "settings, seed: 0 on process 0, 1 on process 1",
    "ledger": "settings, ledger: The ledger cannot be wri",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_an_error_on_both_that_names_it(differing, name):
    for told in (each[name] for each in differing):
        assert told["error"] == "AgreementError"
        assert any(one.startswith(DIFFERENCES[name]) for one in told["differences"]), told["differences"]
        assert told["hook"] == (DIFFERENCES[name].split("'")[1] if DIFFERENCES[name].startswith("hook") else None)
        assert "Write instead: the same hooks, seed, calls and state on every process" in told["text"]
        assert told["missing"] == []
        assert told["secs"] < 30
    assert differing[0][name]["text"] == differing[1][name]["text"]


def test_what_is_alike_passes_and_is_compared_once(differing):
    for told in differing:
        assert [told[name]["error"] for name in ("alike", "again", "slow")] == [None] * 3
    assert differing[0]["slow"]["secs"] > 1  # it waited for the other


def test_who_comes_too_late_is_an_error_on_both(differing):
    early, late = (told["late"] for told in differing)
    assert early["error"] == late["error"] == "AgreementError"
    assert (early["missing"], late["missing"]) == ([1], [])
    assert "Not all processes came within 0.5 s" in early["text"]
    assert "nothing from process 1" in early["text"]
    assert "agree_secs= if one of them is slower" in early["text"]
    assert "too late for those that gave up" in late["text"]
    assert early["secs"] < 2.9


def test_hooks_changed_on_one_process_alone_are_an_error_there(differing):
    alone = differing[1]["alone"]
    assert (alone["error"], alone["missing"]) == ("AgreementError", [0])
    assert alone["secs"] < 10


def test_without_the_store_collectives_say_the_same_within_the_limit(differing):
    expected = {"0": "from 0", "1": "from 1from 1"}
    assert [told["gathered"] for told in differing] == [expected, expected]
    early = differing[0]["gathered late"]
    assert (early["error"], early["missing"]) == ("AgreementError", [1])
    assert early["secs"] < 2.9


def test_one_that_dies_before_the_first_call_is_a_typed_error_on_the_other(ran):
    run = ran("dies_first")
    assert run.codes == [0, 3], run.errors[0][-3000:]
    dead = run.told[0]["dead"]
    assert (dead["error"], dead["missing"]) == ("AgreementError", [1])
    assert "Not all processes came within 3 s" in dead["text"]
    assert dead["secs"] < 15


def test_one_that_dies_between_two_fires_does_not_leave_the_other_waiting(ran):
    run = ran("dies_later")
    assert (run.codes[1], run.told[0]) == (3, None)
    assert run.codes[0] != 0  # by the error of the collective, or by JAX, which misses the heartbeat
    assert run.secs < 60


# A checkpoint of one process, restored by two.


def test_a_sparse_run_on_two_processes_is_that_of_one_and_goes_on_bit_for_bit(ran):
    """Its scores, thresholds and draws are over all shards; the run of one process is in test_sparse_resume."""
    two = finished(ran("sparse"))
    assert [told["same"] for told in two.told] == [True, True]
    assert min(told["compared"] for told in two.told) > 4
    hooks = sparse_run.make_hooks(only=("rigl",))
    alone = sparse_run.run(hooks, sparse_run.initial(hooks)(), 7, "host")
    ours = leaves(two)
    for hook, masks in alone.surgery["memory"].items():
        for path, mask in masks.items():
            shards = ours[f"['masks']['{hook}']['{path}']"]
            assert len(shards) == 8, (path, sorted(shards))
            for index, part in shards.items():
                rows = tuple(slice(*bounds) for bounds in json.loads(index.replace("(", "[").replace(")", "]")))
                assert part.tobytes() == np.asarray(mask)[rows].tobytes(), (path, index)


def test_a_grown_state_goes_from_one_process_to_two(ran):
    one = finished(ran("grow_and_save", 1))
    two = finished(ran("go_on", 2, one.out))
    ours, reference = leaves(two), leaves(one)
    assert ours.keys() == reference.keys()
    for path, shards in reference.items():
        assert shards.keys() == ours[path].keys()
        for index, value in shards.items():
            np.testing.assert_array_equal(ours[path][index], value, err_msg=path)
    assert [told["records"] for told in two.told] == [one.told[0]["records"]] * 2
    assert (two.out / "ledger.jsonl").exists()
    first, second = two.told
    assert (first["error"], second["error"]) == ("LedgerError", "AgreementError")
    assert "another run" in first["says"]
    assert "Process 0 could not do what all wait for. Found: path" in second["says"]


# What is compared, in one process.


def scaled_by(rate):
    def scale(w, by=2.0):
        return w * rate * by

    return scale


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled_by(1.0), scaled_by(2.0)),
        (optax.sgd(0.1), optax.sgd(0.2)),
        (functools.partial(halve, x=1), functools.partial(halve, x=2)),
        (Wordy(start=np.arange(3.0)), Wordy(start=np.arange(3.0) + 1)),
        (jax.jit(scaled_by(1.0)), jax.jit(scaled_by(2.0))),
        (Wordy(thing=scaled_by(1.0)).__call__, Wordy(thing=scaled_by(2.0)).__call__),
        (jax.random.key(0), jax.random.key(1)),
        (jnp.zeros(2), jnp.zeros(2, jnp.bfloat16)),
        (lambda w: w in {1, 2}, lambda w: w in {1, 3}),
    ],
)
def test_what_differs_is_told_apart_and_what_is_equal_is_not(one, other):
    assert stable(one) != stable(other)
    assert json.dumps(stable(one)) == json.dumps(stable(one))
    assert " at 0x" not in json.dumps([stable(one), stable(other)])


def test_descriptions_end():
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    assert stable(cycle) == {"self": "<builtins.dict>"}
    assert stable({"inf": float("inf")}) == {"inf": "inf"}


def test_what_is_pending_after_which_call():
    hooks = make_hooks(halve, fsh.at(5))
    assert hooks._agreement.pending
    state = hooks(1, make_state(1))
    assert not hooks._agreement.pending
    hooks.add("b", halve, params="w", when=fsh.at(9))
    assert hooks._agreement.pending == {"hooks", "state", "step"}
    hooks.init(state)
    assert hooks._agreement.pending == {"step"}


def test_a_hook_of_one_process_alone_is_told_once():
    told = {0: {"hook": {"a": {"when": "at(1)", "priority": 0}}}, 1: {"hook": {}}, 2: {"hook": {}}}
    error = agreement._disagreement(agreement.compared(told))
    assert isinstance(error, AgreementError)
    assert [str(one) for one in error.differences] == ["hook 'a': registered on process 0, nothing on process 1"]


@pytest.mark.parametrize("secs", [0, -1, "300", True, None])
def test_the_limit_is_a_time(secs):
    with pytest.raises(HookError, match=r"agree_secs= is a time in seconds.*Write instead: agree_secs=300"):
        fsh.SurgeryHooks(agree_secs=secs)
