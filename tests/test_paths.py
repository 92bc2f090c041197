"""Joined paths against `flax.traverse_util.flatten_dict`, for every container that params come in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

from flax_surgery_hooks import paths
from flax_surgery_hooks.errors import SelectionError

PLAIN = {
    "embed": {"embedding": np.ones((5, 3))},
    "Dense_10": {"kernel": np.ones((3, 4)), "bias": np.ones(4)},
    "Dense_2": {"kernel": np.ones((4, 2)), "mu": {"kernel": np.zeros(2)}},
    "scale": np.ones(()),
}


class Boxed(nn.Module):
    box: type = nn.Partitioned

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        boxed = {nn.Partitioned: nn.with_partitioning, nn.LogicallyPartitioned: nn.with_logical_partitioning}[self.box]
        x = nn.Dense(4, kernel_init=boxed(init, (None, "model")))(x)
        return nn.Dense(2, name="head")(nn.relu(x))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(2, 3, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def boxed_params(box):
    return Boxed(box).init(jax.random.key(0), jnp.ones((1, 3)))["params"]


def flax_paths(params):
    """What `flatten_dict(sep="/")` gives; it refuses the integer keys of an `nnx.List`."""
    return {"/".join(map(str, keys)) for keys in flatten_dict(params)}


CONTAINERS = {
    "dict": lambda: (PLAIN, PLAIN),
    "FrozenDict": lambda: (FrozenDict(PLAIN), PLAIN),
    "Partitioned": lambda: (boxed_params(nn.Partitioned),) * 2,
    "LogicallyPartitioned": lambda: (boxed_params(nn.LogicallyPartitioned),) * 2,
    "FrozenDict of boxes": lambda: (FrozenDict(boxed_params(nn.Partitioned)), boxed_params(nn.Partitioned)),
    "nnx.State": lambda: (s := nnx.state(Net(nnx.Rngs(0)), nnx.Param), nnx.to_pure_dict(s)),
    "nnx pure dict": lambda: (nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(0)), nnx.Param)),) * 2,
    "abstract": lambda: (jax.eval_shape(lambda: PLAIN), PLAIN),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_flatten_agrees_with_flax(container):
    params, as_dict = CONTAINERS[container]()
    leaves = paths.flatten(params)
    assert set(leaves.paths) == flax_paths(as_dict)
    assert len(leaves.paths) == len(leaves.keys) == len(leaves.values) == len(set(leaves.paths))


@pytest.mark.parametrize("container", CONTAINERS)
def test_flatten_keeps_tree_order_and_rebuilds(container):
    params, _ = CONTAINERS[container]()
    leaves = paths.flatten(params)
    expected, treedef = jax.tree_util.tree_flatten(params)
    assert all(found is leaf for found, leaf in zip(leaves.values, expected, strict=True))
    assert leaves.treedef == treedef
    assert jax.tree_util.tree_structure(leaves.treedef.unflatten(leaves.values)) == treedef
    assert leaves.keys == tuple(keys for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0])


def test_each_path_leads_to_its_own_leaf():
    flat = flatten_dict(PLAIN, sep="/")
    leaves = paths.flatten(PLAIN)
    assert all(flat[path] is leaf for path, leaf in zip(leaves.paths, leaves.values, strict=True))


def test_naive_joins_would_disagree():
    """The comparison is no tautology: `keystr` puts `.value` into paths, and quotes."""
    params = boxed_params(nn.Partitioned)
    naive = {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in jax.tree.leaves_with_path(params)}
    assert naive != flax_paths(params)


@pytest.mark.parametrize(
    "bare",
    [np.ones(3), nn.Partitioned(np.ones(3), ("model",)), nnx.Param(jnp.ones(3)), jax.ShapeDtypeStruct((3,), "float32")],
    ids=lambda bare: type(bare).__name__,
)
def test_a_bare_array_has_the_empty_path(bare):
    assert paths.flatten(bare).paths == ("",)


def test_other_containers():
    @struct.dataclass
    class Weights:
        kernel: np.ndarray
        value: np.ndarray

    assert paths.flatten(Weights(np.ones(1), np.ones(2))).paths == ("kernel", "value")
    assert paths.flatten([np.ones(1), {"a": np.ones(2)}]).paths == ("0", "1/a")
    assert paths.flatten({}).paths == ()
    assert paths.flatten({"a": None, "b": 1.0}).paths == ("b",)
    assert paths.flatten({"value": np.ones(1)}).paths == ("value",)
    assert paths.flatten({"a": {"value": np.ones(1), "names": np.ones(1)}}).paths == ("a/names", "a/value")


def test_join_of_an_unknown_key():
    class Key:
        def __str__(self):
            return "own"

    assert paths.join((jax.tree_util.DictKey("a"), Key())) == "a/own"


@pytest.mark.parametrize(
    ("params", "twice"),
    [
        ({"a/b": 1.0, "a": {"b": 2.0}}, ["a/b"]),
        ({"a": {"b/c": {"d": 1.0}, "b": {"c/d": 2.0, "c": {"d": 3.0}}}, "e": 4.0}, ["a/b/c/d"]),
        ({"a": [1.0, 2.0], "a/0": 3.0, "a/1": 4.0, "x": 1.0}, ["a/0", "a/1"]),
    ],
    ids=["two", "three", "list"],
)
def test_colliding_paths_are_refused(params, twice):
    with pytest.raises(SelectionError, match="Two parameters have the same joined path") as caught:
        paths.flatten(params)
    assert caught.value.found == twice
    assert caught.value.write == "parameter names without '/'"


def test_a_slash_that_collides_with_nothing_is_a_path():
    assert paths.flatten({"a/b": 1.0, "a": {"c": 2.0}}).paths == ("a/c", "a/b")


def test_close_matches_come_best_first():
    known = ["Dense_1/kernel", "Dense_1/bias", "Dense_2/kernel", "Conv_0/scale"]
    assert paths.close_matches("Dense_1/kernal", known)[0] == "Dense_1/kernel"
    assert paths.close_matches("Dense_1/bia", known, count=1) == ["Dense_1/bias"]
    assert paths.close_matches("zzz", known) == []


def test_listed_says_how_many_more():
    assert paths.listed(["a", "b"]) == "a, b"
    assert paths.listed(str(i) for i in range(15)) == ", ".join(map(str, range(12))) + " and 3 more"
    assert paths.listed("abc", limit=3) == "a, b, c"
    assert paths.listed(["x" * 200]) == "x" * 38 + "..." + "x" * 38
