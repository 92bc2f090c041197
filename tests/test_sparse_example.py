"""Runs the example of sparse training as a person would, for few steps, and looks at what it left."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import matplotlib.image
import pytest

from flax_surgery_hooks.sparsity import erk

ROOT = pathlib.Path(__file__).parents[1]
SHAPES = {
    "Conv_0/kernel": (3, 3, 1, 32), "Conv_1/kernel": (3, 3, 32, 64),
    "Dense_0/kernel": (256, 256), "Dense_1/kernel": (256, 10),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], pathlib.Path]:
    """What the fast variant prints, keeps and draws."""
    folder = tmp_path_factory.mktemp("sparse")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    results, picture = folder / "results.json", folder / "sparse.png"
    results.write_text('{"other": 1}\n')
    command = [sys.executable, "examples/sparse_digits.py", f"--results={results}", f"--picture={picture}", "--fast"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4_000:]
    return done.stdout, json.loads(results.read_text()), picture


def test_it_prints_keeps_and_draws_all_runs(found):
    printed, kept, picture = found
    named = re.findall(r"^(\w+), ([\w-]+): \d+\.\d\d, 1 seeds", printed, re.MULTILINE)
    assert named == [(group, name) for group, runs in kept["digits"]["runs"].items() for name in runs]
    assert len(named) == 7
    assert kept["other"] == 1
    assert matplotlib.image.imread(picture).std() > 0
    conditions = kept["digits"]["conditions"]
    assert conditions["kernels"] == {path: math.prod(shape) for path, shape in SHAPES.items()}


def test_every_method_ends_as_sparse_as_it_should(found):
    digits = found[1]["digits"]
    asked = digits["conditions"]["sparsity"]
    for group, runs in digits["runs"].items():
        for name, [run] in runs.items():
            if name == "dense":
                assert sum(run["zeros"].values()) == 0
                continue
            shares = erk(SHAPES, asked[group]) if group == "sparse" else dict.fromkeys(SHAPES, asked[group])
            kept = {path: round(math.prod(shape) * (1 - shares[path])) for path, shape in SHAPES.items()}
            zeros = {path: math.prod(shape) - kept[path] for path, shape in SHAPES.items()}
            # A weight that is grown is zero until its gradient is not, so there may be more.
            exact = name in ("pruned", "enforced", "straight-through", "static")
            assert run["zeros"] == zeros if exact else all(run["zeros"][path] >= zeros[path] for path in zeros)
            share = sum(zeros.values()) / sum(map(math.prod, SHAPES.values()))
            assert run["fires"][-1]["sparsity"] == pytest.approx(share, abs=1e-5)


def test_masks_move_as_their_method_says(found):
    runs = found[1]["digits"]["runs"]
    overlaps = {name: [fire["overlap"] for fire in runs["sparse"][name][0]["fires"]] for name in runs["sparse"]}
    assert set(overlaps["static"]) == {1.0}
    assert all(0.6 < moved[0] < 0.8 and moved[-1] == 1.0 for moved in (overlaps["SET"], overlaps["RigL"]))
    ramp = [fire["sparsity"] for fire in runs["pruned"]["pruned"][0]["fires"]]
    assert ramp == sorted(ramp)
    assert ramp[0] == 0 < ramp[1]
    assert runs["pruned"]["dense"][0]["fires"] == []
