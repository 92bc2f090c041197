"""Runs the digits example as a person would, and looks at everything it leaves behind."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
from typing import Any

import event_files
import matplotlib.colors
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
HEAD_NORM_STEPS = [200, 400, 600]


def run(workdir: pathlib.Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The fast variant in a process of its own, on one device as for a user."""
    command = [sys.executable, "examples/digits.py", "--config=configs/digits.py:fast", f"--workdir={workdir}"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [*command, *overrides], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def read_ledger(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]


def steps_of(workdir: pathlib.Path, hook: str, event: str = "fired") -> list[int]:
    return [record["step"] for record in read_ledger(workdir) if record["event"] == event and record["hook"] == hook]


@pytest.fixture(scope="module")
def digits() -> Any:
    """The example as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module("digits")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """Work directory and printed text of a finished run."""
    workdir = tmp_path_factory.mktemp("digits")
    result = run(workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


class TestArtefacts:
    """What one finished run leaves; a class, so that pytest-xdist keeps its tests on the worker that ran it."""

    def test_ledger_holds_every_fire_with_its_figures(self, done):
        workdir, _ = done
        records = read_ledger(workdir)
        assert records[0]["event"] == "run"
        for event in ("fired", "settled"):
            assert steps_of(workdir, "head_norm", event) == HEAD_NORM_STEPS
            assert steps_of(workdir, "reinit", event) == [300]
            assert steps_of(workdir, "drop_small", event) == [500]
        fired = {record["id"]: record for record in records if record["event"] == "fired"}
        settled = {record["id"]: record for record in records if record["event"] == "settled"}
        assert fired.keys() == settled.keys()
        for record in settled.values():
            assert 0 < record["figures"]["params/relative_change"] < np.inf
            assert record["figures"]["params/nonfinite"] == 0
        [reinit] = [record for record in fired.values() if record["hook"] == "reinit"]
        assert reinit["paths"] == ["Dense_0/bias", "Dense_0/kernel"]
        [drop] = [record for record in settled.values() if record["hook"] == "drop_small"]
        assert drop["figures"]["params/sparsity"] > 0.05
        norms = [r["figures"]["params/norm_after"] for r in settled.values() if r["hook"] == "head_norm"]
        np.testing.assert_allclose(norms, 1.0, rtol=1e-5)

    def test_every_fire_has_its_line_and_its_row(self, done):
        _, printed = done
        number = r"\d+\.\d{3}"
        line = re.compile(rf"step +(\d+) +(\w+) +(\d+) lea(?:f|ves) +params {number} +optimizer {number} +\d+ ms")
        lines = [match.groups() for match in map(line.fullmatch, printed.splitlines()) if match]
        expected = [(str(step), "head_norm", "1") for step in HEAD_NORM_STEPS]
        expected += [("300", "reinit", "2"), ("500", "drop_small", "2")]
        assert sorted(lines) == sorted(expected)
        table = printed[printed.index("Surgeries of this run") :]
        rows = re.findall(rf"^ +(\d+) +(\w+) +(\d+) lea(?:f|ves) +{number} +{number} +\d+ ms *$", table, re.MULTILINE)
        assert sorted(rows) == sorted(expected)

    def test_metrics_hold_the_figures_and_the_accuracy(self, done):
        workdir, printed = done
        scalars = event_files.read_scalars(workdir)
        for hook, steps in {"head_norm": HEAD_NORM_STEPS, "reinit": [300], "drop_small": [500]}.items():
            assert [step for step, _ in scalars[f"surgery/{hook}/params/relative_change"]] == steps
            assert [step for step, _ in scalars[f"surgery/{hook}/slots/relative_change"]] == steps
        accuracies = dict(scalars["test/accuracy"])
        assert list(accuracies) == list(range(25, 751, 25))
        assert accuracies[750] >= 0.97
        assert f"Held-out accuracy {accuracies[750]:.1%} after 750 steps" in printed

    def test_checkpoint_restores_to_the_accuracy_of_the_run(self, done, digits):
        workdir, _ = done
        config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("fast")
        init_fn, hooks = digits.for_surgery(config)
        with ocp.CheckpointManager(workdir / "checkpoints") as manager:
            assert manager.latest_step() == 750
            restored = fsh.checkpoint.restore(manager, init_fn, hooks)
        assert int(restored.step) == 750
        assert [record.step for record in hooks.ledger.records if record.event == "fired"] == [200, 300, 400, 500, 600]
        step, recorded = event_files.read_scalars(workdir)["test/accuracy"][-1]
        assert step == 750
        _, accuracy = digits.evaluate(restored, digits.load_data()[1])
        assert float(accuracy) == pytest.approx(recorded, abs=1e-6)

    def test_picture_shows_each_hook_in_its_colour(self, done, digits):
        workdir, _ = done
        picture = matplotlib.image.imread(workdir / "digits.png")[..., :3]
        assert picture.shape[0] > 900
        assert picture.shape[1] > 1200
        pixels = (picture * 255).round().astype(int).reshape(-1, 3)
        for colour in digits.plots.COLOURS[:3]:
            wanted = (np.array(matplotlib.colors.to_rgb(colour)) * 255).round().astype(int)
            assert (pixels == wanted).all(-1).sum() > 100, colour


def test_config_fields_are_overridden_from_the_shell(tmp_path):
    result = run(
        tmp_path,
        "--config.surgery.head_norm.every=50",
        "--config.surgery.reinit.at=(100,)",
        "--config.num_steps=160",
        "--config.threshold_at=120",
    )
    assert result.returncode == 0, result.stderr
    assert steps_of(tmp_path, "head_norm") == [50, 100, 150]
    assert steps_of(tmp_path, "reinit") == [100]
    assert steps_of(tmp_path, "drop_small") == [120]


def test_a_hook_is_disabled_from_the_shell_and_a_used_workdir_is_refused(tmp_path):
    disabled = "--config.surgery.head_norm.enabled=False"
    result = run(tmp_path, disabled, "--config.surgery.reinit.at=(60,)", "--config.num_steps=110")
    assert result.returncode == 0, result.stderr
    assert steps_of(tmp_path, "head_norm") == []
    assert steps_of(tmp_path, "reinit") == [60]
    assert not [name for name in event_files.read_scalars(tmp_path) if "head_norm" in name]
    before = (tmp_path / "ledger.jsonl").read_bytes()
    again = run(tmp_path, disabled)
    assert again.returncode != 0
    assert "holds a run already. Give another --workdir" in again.stdout + again.stderr
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_mistyped_config_says_what_is_wrong_before_training(tmp_path):
    result = run(tmp_path, "--config.surgery.head_norm.guard=finit")
    assert result.returncode != 0
    assert "surgery.head_norm.guard" in result.stderr
    assert "finite" in result.stderr
    assert not (tmp_path / "checkpoints").exists()
