"""Runs the example of an optimizer that changes on the way, as a person would, for few steps."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
FIRED = [("switch", "100", "6"), ("switch", "100", "6"), ("freeze", "100", "2"), ("thaw", "200", "2"),
         ("reset", "200", "6"), ("reset", "200", "6"), ("rewarm", "200", "6")]  # fmt: skip


def test_the_optimizers_example_fires_and_draws(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    picture = tmp_path / "optimizers.png"
    command = [sys.executable, "examples/optimizers_digits.py", f"--picture={picture}", "--steps=215"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.findall(r": (\w+) fired at step (\d+), (\d+) leaves$", result.stdout, re.MULTILINE) == FIRED
    number = r"(\d+\.\d+)"
    found = re.findall(rf"^held-out loss, .*, ([\w, -]+): {number} at last, {number} at", result.stdout, re.MULTILINE)
    assert len(found) == 8
    assert all(float(last) < 0.25 for _, last, _ in found)
    worst = {name: float(worst) for name, _, worst in found}
    assert worst["reset alone"] > 1.15 * worst["reset and re-warmed"]
    assert picture.stat().st_size > 10_000
