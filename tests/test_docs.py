"""Holds docs/rules.md to what docs/measure_rules.py found, and runs a small part of that measurement."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import pathlib
import re
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rules.md").read_text()
FIGURES = json.loads((ROOT / "docs" / "rules.json").read_text())
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"<!-- measured: (\w+) -->.*?<!-- end -->", re.DOTALL)


@pytest.fixture(scope="module")
def rules() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("measure_rules")
    finally:
        sys.path.remove(str(ROOT / "docs"))


class Small(nn.Module):
    """A network that compiles fast, its initialisers included."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, kernel_init=nn.initializers.uniform())(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, kernel_init=nn.initializers.uniform())(x)


def median(case: str, rule: str, figure: str) -> float:
    return FIGURES["normalize"][case][rule][figure]["median"]


def test_every_measured_figure_on_the_page_is_that_of_the_json(rules):
    assert rules.report.fill(PAGE, FIGURES) == PAGE
    assert sorted(BLOCK.findall(PAGE)) == sorted(rules.report.blocks(FIGURES))


def test_a_figure_that_was_changed_by_hand_is_noticed(rules):
    found = rules.report.number(median("head_adam", "carry", "next"))
    tampered = PAGE.replace(found, "0.01")
    assert tampered != PAGE
    assert rules.report.fill(tampered, FIGURES) != tampered


def test_the_text_between_quotes_no_figures_of_its_own():
    prose = re.sub(r"```.*?```|`[^`\n]*`|\(\S+\)", "", BLOCK.sub("", PAGE), flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+|\d+ ?%", prose) == []


def test_the_figures_are_those_of_the_digits_run_as_it_is_now(rules):
    assert FIGURES["conditions"] == rules.conditions(rules.Plan())
    assert FIGURES["normalize"].keys() == rules.CASES.keys()


@pytest.mark.parametrize("case", ["head", "head_adam"])
def test_carry_recovers_faster_where_the_function_changed_as_the_page_says(case):
    assert FIGURES["normalize"][case]["transport"]["seeds_below_carry"]["next"] == 0
    assert median(case, "reset", "next") < median(case, "carry", "next") < median(case, "transport", "next")
    assert median(case, "transport", "size") < median(case, "carry", "size") < median(case, "reset", "size")
    assert median(case, "transport", "norm") < median(case, "carry", "norm")


@pytest.mark.parametrize("case", ["norm", "norm_unclipped", "norm_adam"])
def test_transport_recovers_faster_before_a_norm_as_the_page_says(case):
    assert median(case, "transport", "next") < median(case, "carry", "next") < median(case, "reset", "next")


def test_the_order_at_the_end_is_as_the_page_says():
    assert median("head", "transport", "end") < median("head", "carry", "end") < 0.01
    assert median("head_adam", "carry", "end") < median("head_adam", "transport", "end")
    next_gap, end_gap = (
        median("head_adam", "transport", figure) / median("head_adam", "carry", figure) for figure in ("next", "end")
    )
    assert end_gap > next_gap
    for by_rule in FIGURES["normalize"].values():
        assert by_rule["carry"] == by_rule["keep"]


def test_fresh_second_moments_do_what_the_page_says():
    for case, by_fresh in FIGURES["reinit"].items():
        mean, init = by_fresh["mean"], by_fresh["init"]
        assert init["within"] < 0.01, case
        assert init["next"]["median"] < mean["next"]["median"], case
        below = mean["fresh"]["median"] < mean["untouched"]["median"]
        assert below == (case != "head/Dense_1"), case


def test_the_page_shows_the_picture():
    assert "](images/rules.png)" in PAGE
    picture = matplotlib.image.imread(ROOT / "docs" / "images" / "rules.png")
    assert min(picture.shape[:2]) > 1_000


def test_the_code_on_the_page_does_what_it_says():
    params = {"Dense_1": {"kernel": jax.random.normal(jax.random.key(0), (3, 2))}}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    names = {"fsh": fsh, "jax": jax, "jnp": jnp, "state": state}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    said: list[str] = []
    for block in re.findall(r"^```pycon\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        runner.run(doctest.DocTestParser().get_doctest(block, names, "rules.md", None, 0), out=said.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(said)


def test_numbers_are_written_as_the_examples_say(rules):
    assert doctest.testmod(rules.report, optionflags=FLAGS).failed == 0


def test_the_picture_is_drawn_from_any_curves(rules, tmp_path):
    noise = np.random.default_rng(0)
    curves: dict[tuple[str, ...], Any] = {
        (case, rule, "loss"): noise.uniform(0.1, 1, (2, 30))
        for case in rules.CASES
        for rule in FIGURES["normalize"][case]
    }
    for fresh, (what, length) in itertools.product(("mean", "init"), (("loss", 9), ("fresh", 5), ("untouched", 5))):
        curves["head", "Dense_0", fresh, what] = noise.uniform(0.1, 1, (2, length))
    rules.picture.draw(tmp_path / "rules.png", curves, every=10, window=5)
    assert matplotlib.image.imread(tmp_path / "rules.png").std() > 0


def test_a_small_measurement_runs(rules):
    plan = rules.Plan(num_steps=12, every=4, reinit_at=(6, 6), window=2, tail=3, seeds=1)
    case = rules.Case(Small(), rules.PLAIN_ADAM, "Dense_1/kernel", ("Dense_1",))
    figures, curves = rules.measure(plan, {"head_adam": case})
    found = figures["normalize"]["head_adam"]
    assert found.keys() == {rules.NO_EDIT, *rules.RULES}
    losses = {rule: np.asarray(curves["head_adam", rule, "loss"]) for rule in found}
    assert all(curve.shape == (1, 12) and np.isfinite(curve).all() for curve in losses.values())
    for rule in rules.RULES:
        np.testing.assert_array_equal(losses[rule][0, :4], losses[rules.NO_EDIT][0, :4])
        assert losses[rule][0, 4] != losses[rules.NO_EDIT][0, 4]
        assert losses[rule][0, 4] == losses["carry"][0, 4]
    np.testing.assert_array_equal(losses["carry"], losses["keep"])
    assert not np.array_equal(losses["carry"], losses["transport"])
    fresh = figures["reinit"]["head_adam/Dense_1"]
    assert fresh["init"]["fresh"]["median"] > fresh["mean"]["fresh"]["median"]
    assert json.loads(rules.report.dump(figures)) == figures
