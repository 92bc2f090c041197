"""Runs the NNX example as a person would."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_the_nnx_example_trains_fires_and_reads_well():
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "examples/nnx_digits.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    fired = re.findall(r"^(\w+) fired at step (\d+): .*, changed by ([\d.]+)%$", result.stdout, re.MULTILINE)
    assert {int(step) for name, step, _ in fired if name == "head_norm"} == {60, 120, 180, 240, 300, 360}
    assert [int(step) for name, step, _ in fired if name == "recycle"] == [200]
    assert all(0 < float(change) < 100 for *_, change in fired)
    [accuracy] = re.findall(r"^held-out accuracy ([\d.]+)%$", result.stdout, re.MULTILINE)
    assert float(accuracy) > 95
