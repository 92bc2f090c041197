"""Holds docs/values.md to what its examples found, and runs these as a person would, for few steps."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import matplotlib.image
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "values.md").read_text()
FOUND = json.loads((ROOT / "docs" / "values.json").read_text())
BLOCK = re.compile(r"<!-- measured: (\w+) -->.*?<!-- end -->", re.DOTALL)
EXAMPLES = {name: f"{name}_digits.py" for name in ("spikes", "relora", "plasticity", "averages")} | {"qk": "qk_lm.py"}
"""Name of a measurement -> the example that makes it."""


@pytest.fixture(scope="module")
def report() -> Any:
    """The script as a module."""
    folders = [str(ROOT / "docs"), str(ROOT / "examples")]
    sys.path[:0] = folders
    try:
        return importlib.import_module("values_report")
    finally:
        for folder in folders:
            sys.path.remove(folder)


def scores(name: str, method: str, what: str = "accuracies") -> np.ndarray:
    return np.array([run[what][-1] for run in FOUND[name]["runs"][method]])


def test_every_measured_figure_on_the_page_is_that_of_the_json(report):
    assert report.fill(PAGE, report.blocks(FOUND)) == PAGE, "run: PYTHONPATH=examples python docs/values_report.py"
    assert sorted(BLOCK.findall(PAGE)) == sorted(report.blocks(FOUND)) == sorted(EXAMPLES)


def test_a_figure_that_was_changed_by_hand_is_noticed(report):
    tampered = PAGE.replace(f"{100 * scores('spikes', 'nothing done').mean():.2f}", "12.34")
    assert tampered != PAGE
    assert report.fill(tampered, report.blocks(FOUND)) != tampered


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_the_page_names_is_there(name):
    assert f"examples/{EXAMPLES[name]}" in PAGE
    [picture] = re.findall(rf"\(images/{name}\.png\)", PAGE)
    assert matplotlib.image.imread(ROOT / "docs" / "images" / f"{name}.png").std() > 0, picture
    assert all(len(runs) == len(next(iter(FOUND[name]["runs"].values()))) >= 3 for runs in FOUND[name]["runs"].values())


def test_spikes_cost_much_and_resets_bring_most_of_it_back():
    clean, spiked, reset = (scores("spikes", name) for name in ("no spikes", "nothing done", "resets, re-warmed"))
    assert (clean - spiked).mean() > 10 * (clean - reset).mean() > 0
    assert (reset > spiked).all()


def test_ranks_add_up_over_merges_and_bring_accuracy():
    full, never, alone, relora = (scores("relora", name) for name in FOUND["relora"]["runs"])
    assert (full > relora).all()
    assert (relora > alone).all()
    assert alone.mean() > never.mean()
    ranks = {name: {rank for run in runs for rank in run["ranks"]} for name, runs in FOUND["relora"]["runs"].items()}
    assert ranks["never merged"] == {1}
    assert min(ranks["ReLoRA"]) > 5


def test_units_drawn_anew_hold_what_plain_training_loses():
    def lost(method: str) -> np.ndarray:
        runs = FOUND["plasticity"]["runs"][method]
        return np.array([run["accuracies"][0] - run["accuracies"][-1] for run in runs])

    assert lost("plain").min() > 0.25
    assert max(lost("RecycleDormant").mean(), lost("ContinualBackprop").mean()) < 0.01


def test_averages_are_steadier_than_the_last_weights():
    def jumps(kind: str) -> float:
        curves = np.array([run["accuracies"] for run in FOUND["averages"]["runs"][kind]])
        return float(np.abs(np.diff(curves[:, curves.shape[1] // 2 :])).mean())

    last, *averages = FOUND["averages"]["runs"]
    assert 2 * max(map(jumps, averages)) < jumps(last)
    assert all(scores("averages", kind).mean() > scores("averages", last).mean() for kind in averages)


def test_bounded_logits_let_the_language_model_learn_where_it_hardly_does_without():
    def logits(method: str) -> np.ndarray:
        return np.array([run["logits"] for run in FOUND["qk"]["runs"][method]])

    without, loose, tight = (scores("qk", name, "bits") for name in ("no bound", "QKClip(100)", "QKClip(20)"))
    assert (without - loose).min() > 0.2
    assert (without - tight).min() > 0.5
    assert logits("no bound")[:, -1].min() > 5_000
    # Those of a step are from before its update, which the fire of the step before did not know.
    assert logits("QKClip(100)").max() < 2 * 100
    assert logits("QKClip(20)").max() < 5 * 20


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_keeps_and_draws_all_runs(name, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    results, picture = tmp_path / "values.json", tmp_path / "curves.png"
    results.write_text('{"other": 1}\n')
    command = [sys.executable, f"examples/{EXAMPLES[name]}", f"--results={results}", f"--picture={picture}", "--fast"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4_000:]
    kept = json.loads(results.read_text())
    printed = re.findall(rf"^{name}, (.+?): -?\d+\.\d+, 1 seeds", done.stdout, re.MULTILINE)
    assert printed == list(kept[name]["runs"]) == list(FOUND[name]["runs"])
    assert kept["other"] == 1
    assert matplotlib.image.imread(picture).std() > 0
