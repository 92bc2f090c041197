"""Holds docs/sparsity.md to what the examples of sparse training found, and runs its code."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import math
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sparsity.md").read_text()
FOUND = json.loads((ROOT / "docs" / "sparsity.json").read_text())
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"<!-- measured: (\w+) -->.*?<!-- end -->", re.DOTALL)


@pytest.fixture(scope="module")
def report() -> Any:
    """The script as a module."""
    folders = [str(ROOT / "docs"), str(ROOT / "examples")]
    sys.path[:0] = folders
    try:
        importlib.import_module("curves")
        return importlib.import_module("sparsity_report")
    finally:
        for folder in folders:
            sys.path.remove(folder)


def scores(group: str, name: str, what: str = "accuracies") -> np.ndarray:
    return np.array([run[what][-1] for run in FOUND["digits"]["runs"][group][name]])


def bits(sparsity: str, name: str) -> np.ndarray:
    return np.array([run["bits"][-1] for run in FOUND[f"lm_{sparsity}"]["runs"][name]])


def test_every_measured_figure_on_the_page_is_that_of_the_json(report):
    assert report.fill(PAGE, report.blocks(FOUND)) == PAGE, "run: PYTHONPATH=examples python docs/sparsity_report.py"
    assert sorted(BLOCK.findall(PAGE)) == sorted(report.blocks(FOUND))


def test_a_figure_that_was_changed_by_hand_is_noticed(report):
    found = f"{100 * scores('pruned', 'pruned').mean():.2f}"
    tampered = PAGE.replace(found, "12.34")
    assert tampered != PAGE
    assert report.fill(tampered, report.blocks(FOUND)) != tampered


def test_the_text_between_quotes_no_figures_of_its_own():
    prose = re.sub(
        r"```.*?```|`[^`\n]*`|\(\S+\)|arXiv \d+\.\d+|95 % interval", "", BLOCK.sub("", PAGE), flags=re.DOTALL
    )
    assert re.findall(r"\d+\.\d+|\d+ ?%", prose) == []


def test_the_intervals_are_those_of_the_t_distribution(report):
    from scipy import stats

    for freedom, quantile in report.results.T_95.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)
    values = [0.1, 0.5, 0.2, 0.9]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert report.results.interval(values) == pytest.approx((high - low) / 2, rel=1e-3)


def test_the_figures_are_those_of_the_example_as_it_is_now(report):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        example = importlib.import_module("sparse_digits")
    finally:
        sys.path.remove(str(ROOT / "examples"))
    assert FOUND["digits"]["conditions"] == example.conditions(example.Plan())
    assert {group: list(runs) for group, runs in FOUND["digits"]["runs"].items()} == {
        group: list(methods) for group, methods in example.GROUPS.items()
    }


def test_every_kept_run_is_as_sparse_as_it_was_asked_to_be():
    asked, kernels = FOUND["digits"]["conditions"]["sparsity"], FOUND["digits"]["conditions"]["kernels"]
    for group, runs in FOUND["digits"]["runs"].items():
        for run in (run for name, ones in runs.items() if name != "dense" for run in ones):
            assert run["fires"][-1]["sparsity"] == pytest.approx(asked[group], abs=1e-3)
            assert sum(run["zeros"].values()) >= math.floor(asked[group] * sum(kernels.values())) - len(kernels)


def test_what_the_page_says_of_the_figures_holds(report):
    dense, pruned = scores("pruned", "dense"), scores("pruned", "pruned")
    assert dense.mean() - pruned.mean() < report.AIM
    through = np.array([run["accuracies"] for run in FOUND["digits"]["runs"]["pruned"]["pruned"]]).mean(0)
    assert through[len(through) // 3 : -5].min() < through[-1] - 0.1
    static, drawn, grown = (scores("sparse", name) for name in ("static", "SET", "RigL"))
    assert static.mean() < drawn.mean() < grown.mean()
    assert np.ptp(static) > max(np.ptp(drawn), np.ptp(grown))
    apart = scores("masked", "straight-through") - scores("masked", "enforced")
    assert abs(apart.mean()) < report.results.interval(list(apart))
    for sparsity, name in itertools.product(("0.9", "0.95"), ("RigL", "SET")):
        gained = bits(sparsity, "static") - bits(sparsity, name)
        ahead = gained.mean() > report.results.interval(list(gained))
        assert ahead == ((sparsity, name) == ("0.9", "RigL"))
        assert bits(sparsity, "dense").mean() < bits(sparsity, name).mean() - 0.1


def test_the_pictures_are_there_and_shown():
    for name in ("sparse", "sparse_lm"):
        assert f"](images/{name}.png)" in PAGE
        assert min(matplotlib.image.imread(ROOT / "docs" / "images" / f"{name}.png").shape[:2]) > 800


def test_the_code_on_the_page_does_what_it_says():
    key = jax.random.key(0)
    params = {
        "hidden": {"kernel": jax.random.normal(key, (8, 16))},
        "head": {"kernel": jax.random.normal(jax.random.key(1), (16, 4))},
    }

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(batch @ params["hidden"]["kernel"]) @ params["head"]["kernel"]) ** 2)

    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-2)).replace(step=jnp.int32(0))
    names = {"fsh": fsh, "jax": jax, "jnp": jnp, "state": state, "loss": loss, "batch": jax.random.normal(key, (32, 8))}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    said: list[str] = []
    for block in re.findall(r"^```pycon\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        runner.run(doctest.DocTestParser().get_doctest(block, names, "sparsity.md", None, 0), out=said.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(said)


def test_what_the_modules_say_of_themselves_holds(report):
    for module in (report, report.results, importlib.import_module("curves")):
        assert doctest.testmod(module, optionflags=FLAGS).failed == 0
