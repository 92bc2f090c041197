"""What benchmarks/fresh.py measures, on a network that compiles fast; docs/fresh.md is what it found."""

import importlib
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = json.loads((ROOT / "docs" / "fresh.json").read_text())
UNITS = {"into": 1, "out": 0}


@pytest.fixture(scope="module")
def fresh():
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("fresh")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def init(key):
    into, out = jax.random.split(key)
    return {"into": jax.random.normal(into, (5, 8)), "out": jax.random.normal(out, (8, 3)), "bias": jnp.zeros(3)}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["into"]) @ params["out"] + params["bias"].reshape(1, 3) - 1) ** 2)


def batches(seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(16, 5)).astype(np.float32) for _ in itertools.count())


@pytest.fixture(scope="module")
def found(fresh):
    """Late in a long run, so that the count says that the moments are complete."""
    plan = fresh.Plan(before=5, window=12, tail=14, seeds=2, counted=100_000)
    case = fresh.Case(init, loss, batches, next(batches(9)), UNITS)
    return fresh.measure(plan, {"small": lambda: case}, (0.999,))["runs"]["small/0.999"]


def test_zeroed_moments_overshoot_and_those_that_count_anew_do_not(fresh, found):
    first = {variant: np.asarray(figures["fresh/max"])[:, 0] for variant, figures in found.items()}
    np.testing.assert_allclose(first[fresh.INIT], 0.1 / np.sqrt(0.001), rtol=1e-3)  # whatever the gradient
    np.testing.assert_allclose(np.asarray(found[fresh.INIT]["fresh/p99"])[:, 0], first[fresh.INIT], rtol=1e-3)
    np.testing.assert_allclose(first[fresh.PER_ELEMENT], 1, rtol=1e-3)
    assert np.max(found[fresh.INIT]["fresh/max"]) > 1.5 * first[fresh.INIT].max()  # and more in the steps that follow
    assert np.max(found[fresh.PER_ELEMENT]["fresh/max"]) < 1.5


def test_all_variants_start_from_the_same_params_and_last_as_long(fresh, found):
    assert tuple(found) == fresh.report.VARIANTS
    losses = {variant: np.asarray(figures["loss"]) for variant, figures in found.items()}
    assert {curve.shape for curve in losses.values()} == {(2, 3)}
    right_after = {variant: tuple(curve[:, 0]) for variant, curve in losses.items()}
    assert right_after[fresh.MEAN] == right_after[fresh.INIT] == right_after[fresh.PER_ELEMENT]
    assert right_after[fresh.NO_EDIT] != right_after[fresh.MEAN]
    assert {np.shape(figures["untouched/p99"]) for figures in found.values()} == {(2, 12)}


def test_a_quarter_of_the_units_starts_anew_and_nothing_else(fresh):
    case = fresh.Case(init, loss, batches, None, UNITS)
    params = init(jax.random.key(0))
    state = fresh.fsh.bind(params=params, opt_state=optax.adam(0.1).init(params), tx=optax.adam(0.1))
    after, _ = fresh.fsh.operate(state, fresh.restart(case), params=list(UNITS), key=jax.random.key(1))
    changed = jax.tree.map(lambda a, b: np.asarray(a != b), params, after.params)
    assert not changed["bias"].any()
    for name, axis in UNITS.items():
        np.testing.assert_array_equal(changed[name], fresh.mask(changed[name].shape, axis))
        assert changed[name].mean() == 0.25


def test_without_an_edit_adam_per_element_goes_on_as_adam(fresh):
    one = fresh.Runs(fresh.Plan(), fresh.Case(init, loss, batches, None, UNITS), 0.95, None)
    params, batch = init(jax.random.key(0)), next(batches(0))
    state = one.adam.init(params)
    for _ in range(3):
        params, state, _ = one.step(one.adam, params, state, batch)
    *_, expected = one.step(one.adam, params, state, batch)
    *_, updates = one.step(one.per_element, params, fresh.with_ages(state), batch)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_the_byte_model_sees_no_later_byte(fresh):
    case = fresh.text_case(length=6, batch_size=2)
    params = case.init(jax.random.key(0))
    text = next(case.batches(0))
    assert (text.shape, text.dtype) == ((2, 7), np.uint8)
    logits = fresh.ByteModel().apply({"params": params}, text[:, :6])
    later = text.copy()
    later[:, 4] += 1
    changed = np.asarray(fresh.ByteModel().apply({"params": params}, later[:, :6]) != logits).any((0, 2))
    np.testing.assert_array_equal(changed, [False] * 4 + [True] * 2)
    assert np.log(256) - 1 < case.loss(params, text) < np.log(256) + 1


def test_the_page_is_that_of_the_figures(fresh):
    assert FIGURES["conditions"] == json.loads(json.dumps(fresh.conditions(fresh.Plan())))
    assert fresh.report.dump(FIGURES) == (ROOT / "docs" / "fresh.json").read_text()
    assert fresh.report.page(FIGURES) == (ROOT / "docs" / "fresh.md").read_text()


def test_what_the_page_concludes_is_what_was_found(fresh):
    report = fresh.report
    slow, fast = ([f"{name}/{b2}" for name in fresh.CASES] for b2 in fresh.B2S)

    def highest(runs, variant, what="fresh/p99"):
        return [report.highest(FIGURES, run, variant, what) for run in runs]

    assert list(FIGURES["runs"]) == [run for pair in zip(slow, fast, strict=True) for run in pair]
    assert min(highest(slow, fresh.INIT)) > 3 * max(highest(slow, fresh.MEAN))  # a burst, and none
    assert report.above(FIGURES, slow[1], fresh.MEAN) > 0.3  # not always below the rest
    assert highest(slow, fresh.MEAN)[1] > highest(slow, fresh.MEAN, "untouched/p99")[1]
    assert max(highest(slow + fast, fresh.PER_ELEMENT, "fresh/max")) < 1.02
    for run in fast:
        assert report.first(FIGURES, run, fresh.PER_ELEMENT) > report.first(FIGURES, run, fresh.INIT)
    assert max(highest(fast, fresh.INIT) + highest(fast, fresh.MEAN)) < 1
    for run, place in itertools.product(slow + fast, (1, 2)):
        losses = [report.curves(FIGURES, run, one, "loss")[:, place] for one in report.VARIANTS[1:]]
        assert np.ptp([np.median(loss) for loss in losses]) < min(map(np.ptp, losses)), "less than seeds differ"


def test_the_picture_is_drawn(fresh, tmp_path):
    fresh.report.draw(tmp_path / "fresh.png", FIGURES)
    assert (tmp_path / "fresh.png").stat().st_size > 10_000
