"""Runs the example of a network that gets deeper, with a running average, as a person would."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_the_deeper_example_adds_leaves_averages_and_draws(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    picture = tmp_path / "deeper.png"
    command = [sys.executable, "examples/deeper_digits.py", f"--picture={picture}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    fired = re.findall(r"^(\w+) fired at step (\d+): (\d+) leaves, (\d+) added$", result.stdout, re.MULTILINE)
    assert fired == [("deepen", "200", "8", "4"), ("average", "400", "12", "0")]
    accuracies = dict(re.findall(r"^held-out accuracy, ([\w ]+): ([\d.]+)%$", result.stdout, re.MULTILINE))
    assert float(accuracies["last step"]) > 94
    assert float(accuracies["running average"]) > 97
    assert picture.stat().st_size > 10_000
