"""Holds what README.md and docs/lm.md say of the language model to the files, to each other, and to the baseline."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import runpy
import shlex
import sys

import matplotlib.image
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "lm.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]
BASELINE = r"5-gram[^.|]*? needs (\d\.\d{3})"
TRAINED = {"files": 568, "bytes": 10_169_129}  # of the standard library that the figures are of


def measured(text: str, pattern: str) -> list[float]:
    found = [float(number) for number in re.findall(pattern, text)]
    assert found, pattern
    return found


def test_both_pages_tell_the_same_figures_and_the_model_wins():
    [model], [other] = (set(measured(text, r"\*\*(\d\.\d{3})\*\* bits per byte")) for text in (README, PAGE))
    [baseline], [same] = (set(measured(text, BASELINE)) for text in (README, PAGE))
    assert (model, baseline) == (other, same)
    assert 1.2 < model < baseline - 0.05
    assert "2026-11-23" in README
    assert "2026-11-23" in PAGE


def test_the_baseline_is_what_is_said_where_the_sources_are_the_same():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        lm_data, lm_ngram = (importlib.import_module(name) for name in ("lm_data", "lm_ngram"))
    finally:
        sys.path.remove(str(ROOT / "examples"))
    train, held_out = lm_data.split()
    if {"files": len(train.files), "bytes": int(train.lengths.sum())} != TRAINED:
        pytest.skip("another standard library")
    stream = held_out.stream()
    _, places = lm_data.held_out_windows(stream, 256)
    bits = lm_ngram.NGram.fit(train.stream(), 5).bits(stream)[places].mean()
    assert round(float(bits), 3) == measured(PAGE, BASELINE)[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_files_that_exist_and_fields_of_the_config(command):
    words = [word for word in shlex.split(command) if not word.startswith("XLA_FLAGS=")]
    assert words[0] == "python"
    for word in words:
        path = word.removeprefix("--config=").partition(":")[0]
        if path.endswith(".py"):
            assert (ROOT / path).is_file(), path
    config = json.loads(runpy.run_path(str(ROOT / "configs" / "lm.py"))["get_config"]("small").to_json_best_effort())
    for field in re.findall(r"--config\.([\w.]+)=", command):
        value = config
        for name in field.split("."):
            value = value[name]


def test_the_picture_is_there_and_linked():
    assert "](docs/images/lm.png)" in README
    assert "](images/lm.png)" in PAGE
    assert matplotlib.image.imread(ROOT / "docs" / "images" / "lm.png").shape[:2] > (500, 1_000)
