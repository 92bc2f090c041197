"""Runs the language-model example as a person would: on one device, on eight, in two processes, and after a stop."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import event_files
import jax
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flax_surgery_hooks.ledger import HOST_FACTS

ROOT = pathlib.Path(__file__).parents[1]
FIRES = [
    (3, "calm"), (6, "calm"), (6, "perturb"), (6, "shrink"), (8, "even"), (9, "calm"), (10, "forget"), (12, "calm"),
]  # fmt: skip
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
TWO_PROCESSES = """
import pathlib, sys
sys.path.insert(0, {examples!r})
import jax, lm, numpy as np
from absl import app, flags

def whole(leaf):
    found = np.full(leaf.shape, np.nan, leaf.dtype)  # what no device of this process holds would stay so
    for shard in leaf.addressable_shards:
        found[shard.index] = shard.data
    return found

def main(argv):
    workdir = lm.start(argv)
    assert jax.process_count() == 2 and jax.local_device_count() == 4
    state, _ = lm.train(lm.CONFIG.value, workdir)
    np.savez(workdir / f"process_{{jax.process_index()}}.npz", *map(whole, jax.tree.leaves(state.params)))

flags.mark_flag_as_required("config")
app.run(main)
"""


def environment(devices: int) -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def run(workdir: pathlib.Path, *overrides: str, devices: int = 1) -> str:
    """What the tiny variant prints."""
    command = [sys.executable, "examples/lm.py", "--config=configs/lm.py:tiny", f"--workdir={workdir}", *overrides]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4_000:]
    return result.stdout


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(path: pathlib.Path) -> list[dict[str, Any]]:
    """What a ledger tells, but for facts of the host."""
    records = [record for record in read_lines(path) if record["event"] != "run"]
    return [{name: value for name, value in one.items() if name not in HOST_FACTS} for one in records]


def read_checkpoint(workdir: pathlib.Path, step: int) -> Any:
    """The arrays of a checkpoint, on the host."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        path = workdir / "checkpoints" / str(step) / "state"
        metadata = checkpointer.metadata(path)
        tree = getattr(metadata, "item_metadata", metadata).tree  # older Orbax gives the item's own
        return checkpointer.restore(path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree))


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(found: Any, expected: Any) -> None:
    """Equal but for the order of sums; Adam turns a tiny difference of a tiny gradient into a larger one."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """Work directory and printed text of a finished run on one device."""
    workdir = tmp_path_factory.mktemp("lm")
    return workdir, run(workdir)


class TestRuns:
    """Beside one finished run; a class, so that pytest-xdist keeps its tests on the worker that ran it."""

    def test_it_leaves_ledger_curve_scores_metrics_checkpoints_and_a_picture(self, done):
        workdir, printed = done
        settled = [record for record in read_lines(workdir / "ledger.jsonl") if record["event"] == "settled"]
        assert sorted((record["step"], record["hook"]) for record in settled) == FIRES
        curve, scores = read_lines(workdir / "curve.jsonl"), json.loads((workdir / "scores.json").read_text())
        assert [row["step"] for row in curve] == [4, 8, 12]
        assert curve[-1]["held_out"] < curve[0]["held_out"] < 8.5
        assert scores["lm/sample"] == curve[-1]["held_out"]
        assert 1 < scores["ngram/held_out"] < 4
        metrics = event_files.read_scalars(workdir)
        assert [step for step, _ in metrics["held_out/bits"]] == [4, 8, 12]
        assert [step for step, _ in metrics["surgery/shrink/params/relative_change"]] == [6]
        assert metrics["surgery/shrink/params/relative_change"][0][1] == pytest.approx(0.2, abs=1e-3)
        assert matplotlib.image.imread(workdir / "lm.png").shape[:2] > (500, 1_000)
        line = re.search(r"^Held-out bits per byte (\S+) after 12 steps; 5-gram (\S+)\. ", printed, re.MULTILINE)
        assert line is not None
        assert line.groups() == (f"{scores['lm/held_out']:.4f}", f"{scores['ngram/held_out']:.4f}")
        assert len(re.findall(r"^step +\d+  \w+ +\d lea(?:f|ves)  params \d\.\d{3}$", printed, re.MULTILINE)) == len(
            FIRES
        )

    def test_a_run_that_was_cut_off_goes_on_bit_for_bit(self, done, tmp_path):
        workdir, _ = done
        again = tmp_path / "again"
        shutil.copytree(workdir, again)
        for step in (8, 12):  # as if it had been stopped between these; the noise of step 6 is drawn again
            shutil.rmtree(again / "checkpoints" / str(step))
        for name in ("scores.json", "lm.png"):
            (again / name).unlink()
        run(again)
        assert read_lines(again / "curve.jsonl") == read_lines(workdir / "curve.jsonl")
        assert json.loads((again / "scores.json").read_text()) == json.loads((workdir / "scores.json").read_text())
        assert_same(read_checkpoint(again, 12), read_checkpoint(workdir, 12))
        first, second = (told(folder / "ledger.jsonl") for folder in (workdir, again))
        assert second == first
        tail = told(again / "ledger.jsonl.tail-1")  # of the run that was cut off
        assert {record["step"] for record in tail} == {fire[0] for fire in FIRES if fire[0] > 4}

    def test_eight_devices_end_where_one_does(self, done, tmp_path):
        workdir, _ = done
        assert "on 8 devices" in run(tmp_path, *MESH, devices=8)
        assert_close(read_checkpoint(tmp_path, 12), read_checkpoint(workdir, 12))
        assert_close(read_lines(tmp_path / "curve.jsonl"), read_lines(workdir / "curve.jsonl"))

    def test_two_processes_end_bitwise_alike_and_where_one_does(self, done, tmp_path):
        workdir, _ = done
        program = tmp_path / "two.py"
        program.write_text(TWO_PROCESSES.format(examples=str(ROOT / "examples")))
        launcher = [sys.executable, "examples/launch.py", "--processes=2", "--devices=4", "--timeout=240", "--"]
        command = [*launcher, str(program), "--config=configs/lm.py:tiny", f"--workdir={tmp_path}", *MESH]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-4_000:] + result.stderr
        first, second = (np.load(tmp_path / f"process_{i}.npz") for i in range(2))
        assert first.files == second.files
        for name in first.files:
            assert np.isfinite(first[name]).all()  # with the axis "data" across them, each process holds all of it
            np.testing.assert_array_equal(first[name], second[name])
        expected = read_checkpoint(workdir, 12)
        assert_close([first[name] for name in first.files], jax.tree.leaves(expected["params"]))
        assert_close(read_checkpoint(tmp_path, 12), expected)
        settled = [record for record in read_lines(tmp_path / "ledger.jsonl") if record["event"] == "settled"]
        assert sorted((record["step"], record["hook"]) for record in settled) == FIRES
        assert len(list(tmp_path.glob("events.out.*"))) == 1  # the first process alone writes
        assert not re.search(r"^\[1\] step ", result.stdout, re.MULTILINE)
        assert len(re.findall(r"^\[0\] step ", result.stdout, re.MULTILINE)) == len(FIRES)


def test_no_hooks_and_the_other_choices_run_from_the_shell(tmp_path):
    printed = run(
        tmp_path,
        *(f"--config.surgery.{name}.enabled=False" for name in ("calm", "shrink", "perturb", "even", "forget")),
        "--config.model.dtype=bfloat16",
        "--config.model.tied=True",
        "--config.model.positions=learned",
        "--config.model.scan_layers=False",
        "--config.accumulation=2",
        "--config.ngram_order=0",
        "--config.num_steps=5",
    )
    assert "after 5 steps. " in printed
    assert (tmp_path / "checkpoints" / "5").is_dir()
    assert [record["event"] for record in read_lines(tmp_path / "ledger.jsonl")] == ["run"]
    assert json.loads((tmp_path / "scores.json").read_text()).keys() == {"lm/held_out", "lm/sample"}
