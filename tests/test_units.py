"""Units: their wiring is found as it is written by hand, and every other wiring is refused."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unit_cases import CASES, LAYER_NORM, dense

from flax_surgery_hooks import units
from flax_surgery_hooks.errors import UnitsError
from flax_surgery_hooks.units import Units

ONE = {"into": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)


def run_one(params):
    h = jnp.tanh(X @ params["into"])
    return h @ params["out"], {"h": h}


@functools.cache
def found(name):
    return units.find(CASES[name].run, CASES[name].params(), stacked=CASES[name].stacked)


@pytest.mark.parametrize("name", CASES)
def test_found_is_what_is_written_by_hand(name):
    assert found(name) == CASES[name].units


@pytest.mark.parametrize("name", CASES)
def test_the_right_wiring_is_let_through(name):
    units.check(CASES[name].units, CASES[name].output, CASES[name].params())


def changed(name, place=0, *, incoming=None, outgoing=None):
    """The units of a case with other places; None takes a path out."""
    group = CASES[name].units[place]
    new = {"incoming": {**group.incoming, **(incoming or {})}, "outgoing": {**group.outgoing, **(outgoing or {})}}
    kept = {field: {path: at for path, at in places.items() if at is not None} for field, places in new.items()}
    return dataclasses.replace(group, **kept)


READ, MADE = "still move the output", "are still read"
WRONG = {
    "repeat for tile": ("cnn", changed("cnn", outgoing={"Dense_0/kernel": (0, "repeat")}), READ),
    "tile for repeat": ("channels_first", changed("channels_first", outgoing={"Dense_0/kernel": 0}), READ),
    "no bias": ("mlp", changed("mlp", incoming={"Dense_0/bias": None}), MADE),
    "half of a gate": ("gated", changed("gated", incoming={"gate/bias": None, "up/bias": None}), MADE),
    "no scale": ("normed", changed("normed", incoming={"LayerNorm_0/bias": None}), MADE),
    "another reader": ("gated", changed("gated", outgoing={"down/kernel": None, "gate/kernel": 1}), READ),
    "too many readers": ("mlp", Units("h", dense("Dense_0"), {"Dense_1/kernel": 0, "Dense_2/kernel": 0}), "multiple"),
    "the other axis": ("scanned", changed("scanned", incoming={"layers/up/kernel": 1}), "multiple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_wiring_is_refused(name):
    case, group, says = WRONG[name]
    with pytest.raises(UnitsError, match=says):
        units.check(group, CASES[case].output, CASES[case].params())


def test_square_kernels_are_told_apart_by_their_axis():
    params = {"a": jnp.eye(4), "b": jnp.eye(4), "c": jnp.ones((4, 2))}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)

    def run(params):
        h = jnp.tanh(x @ params["a"])
        k = jnp.tanh(h @ params["b"])
        return k @ params["c"], {"h": h, "k": k}

    assert units.find(run, params) == (Units("h", {"a": 1}, {"b": 0}), Units("k", {"b": 1}, {"c": 0}))
    with pytest.raises(UnitsError, match=READ):
        units.check(Units("h", {"a": 0}, {"b": 1}), lambda params: run(params)[0], params)


def test_a_norm_over_the_units_is_told_of():
    with pytest.raises(UnitsError, match=r"a norm mixes them.*LayerNorm_0/bias, LayerNorm_0/scale"):
        units.find(LAYER_NORM.run, LAYER_NORM.params())
    with pytest.raises(UnitsError, match=r"still move the output.*no norm may mix the units"):
        units.check(LAYER_NORM.units, LAYER_NORM.output, LAYER_NORM.params())


def test_units_that_nothing_reads_alone():
    with pytest.raises(UnitsError, match=r"No leaf reads each of the units 'out'.*made by out"):
        units.find(lambda params: (run_one(params)[0], {"out": run_one(params)[0]}), ONE)


def test_two_names_of_the_same_units():
    def run(params):
        before = X @ params["into"]
        return jnp.tanh(before) @ params["out"], {"before": before, "h": jnp.tanh(before)}

    with pytest.raises(UnitsError, match=r"Two names are of the same units.*before and h, both made by into"):
        units.find(run, ONE)


def test_a_leaf_wired_twice():
    """Tied along both axes: each unit is made by a row and by a column."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)

    def run(params):
        h = jnp.tanh(jnp.sum(x) * jnp.diag(params["w"]))[None]
        return h @ params["out"], {"h": h}

    with pytest.raises(UnitsError, match=r"wired to the units 'h' in several ways.*along 0, 1") as caught:
        units.find(run, {"w": jnp.eye(4), "out": jnp.ones((4, 2))})
    assert caught.value.path == "w"


@pytest.mark.parametrize(
    ("find", "says"),
    [
        (lambda: units.find(run_one, ONE, stacked=("g",)), r"no such activations. Found: g. Write instead: h \[5, 4\]"),
        (lambda: units.find(lambda params: (run_one(params)[0], {}), ONE), r"There are no activations. Found: {}"),
        (lambda: units.find(lambda p: (run_one(p)[0], {"h": X[:, 0]}), ONE), r"no axis of several units.*h \[5\]"),
    ],
)
def test_activations_that_are_not_there(find, says):
    with pytest.raises(UnitsError, match=says):
        find()


def test_a_leaf_without_a_part_in_the_output():
    with pytest.raises(UnitsError, match=r"no part in the output. Found: idle"):
        units.check(
            Units("h", {"into": 1, "idle": 0}, {"out": 0}), lambda p: run_one(p)[0], ONE | {"idle": jnp.ones(4)}
        )


DESCRIBED = {
    "no mapping": (lambda: Units("h", "into", {}), r"Units\(incoming=...\) is a mapping.*'into'"),
    "no axis": (lambda: Units("h", {}, {"out": "0"}), r"Units\(outgoing=...\) is a mapping"),
    "no order": (lambda: Units("h", {}, {"out": (0, "stack")}), r"Units\(outgoing=...\) is a mapping"),
    "nothing": (lambda: Units("h", {}, {}), r"have no leaves.*incoming=\{\} and outgoing=\{\}"),
    "not selected": (lambda: Units("h", {"intoo": 1}, {}).extent(ONE), r"path 'intoo'.*not selected.*instead: into"),
    "no such axis": (lambda: Units("h", {"into": 2}, {}).extent(ONE), r"path 'into'.*axis 2 of shape \[3, 4\]"),
    "the layers": (lambda: Units("h", {"into": -2}, {}, True).extent(ONE), r"axis -2 of shape \[3, 4\]"),
    "lengths": (lambda: Units("h", {"into": 0}, {"out": 0}).extent(ONE), r"are 3 along one leaf.*4 along out"),
    "stacks": (lambda: Units("h", {"into": 1}, {"out": 1}, True).extent({**ONE, "out": jnp.ones((4, 4))}),
               r"different numbers of layers. Found: 3, 4"),
    "no units": (lambda: units.check([], lambda p: p, ONE), r"`units` are a `fsh.units.Units`"),
    "no group": (lambda: units.check(["h"], lambda p: p, ONE), r"`units` are a `fsh.units.Units`"),
    "one name": (lambda: units.check([Units("h", {"into": 1}, {})] * 2, lambda p: p, ONE), "have one activation"),
    "unnamed": (lambda: Units("g", {"into": 1}, {}).activity(ONE, {"h": X}), r"no activations named 'g'. Found: h"),
    "no names": (lambda: Units("g", {"into": 1}, {}).activity(ONE, X), r"no activations named 'g'. Found: Array"),
    "of others": (lambda: Units("h", {"into": 1}, {}).activity(ONE, {"h": X}), r"of other units.*shape \[5, 3\] for 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_description_that_cannot_be(name):
    make, says = DESCRIBED[name]
    with pytest.raises(UnitsError, match=says):
        make()


class Silent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            self.sow("intermediates", "h", x)
        return nn.Dense(2)(x)


@pytest.mark.parametrize(("model", "says"), [(Silent(), "sows no intermediates. Found: Silent"),
                                             (Twice(), "one name several times in a call. Found: h")])  # fmt: skip
def test_what_cannot_be_captured(model, says):
    params = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(UnitsError, match=says):
        units.capture(model, {"params": params}, X)


def test_equal_descriptions_are_one_key():
    assert len({Units("h", dense("a"), {}), Units("h", dense("a"), {}), Units("h", dense("b"), {})}) == 2
