"""Surgeries that add and remove leaves: moments rebuilt from recorded steps, containers, and hooks in a loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import mlp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import RefusedError, SelectionError, StructureError
from flax_surgery_hooks.paths import flatten

# A layer split in two, another two leaves joined into one: other paths, the same function.


def regroup(leaves: dict[str, Any]) -> dict[str, Any]:
    """`w2` by its columns, one half scaled up and the weights that it feeds scaled down; `w1` and `b1` as one leaf."""
    left, right = jnp.split(leaves["w2"], 2, axis=1)
    return {
        "two/left": 4 * left,
        "two/right": right,
        "one": jnp.concatenate([leaves["w1"], leaves["b1"][None]]),
        "b2": leaves["b2"] * jnp.array([4.0, 4, 4, 1, 1, 1]),
        "w3": leaves["w3"] / jnp.array([4.0, 4, 4, 1, 1, 1])[:, None],
    }


def ungroup(leaves: dict[str, Any]) -> dict[str, Any]:
    return {
        "w1": leaves["one"][:-1],
        "b1": leaves["one"][-1],
        "w2": jnp.concatenate([leaves["two/left"], leaves["two/right"]], 1),
        **{name: leaves[name] for name in ("b2", "w3", "b3")},
    }


@jax.jit
def regrouped_gradient(leaves: dict[str, Any], batch: Any) -> Any:
    return jax.grad(lambda leaves: mlp.loss(ungroup(leaves), batch))(leaves)


@dataclasses.dataclass(frozen=True)
class Regroup:
    preserves = "function"

    def __call__(self, leaves):
        return regroup(leaves)


@dataclasses.dataclass(frozen=True)
class SplitWithFold:
    """Unit 0 of the first layer in unequal parts, its columns as leaves of their own; B is known only to the model."""

    share: float = 0.7
    preserves = "function"

    def __call__(self, leaves):
        w1, b1, w2 = leaves["w1"], leaves["b1"], leaves["w2"]
        return {
            "in/twin": w1[:, :1],
            "in/rest": w1,
            "b/twin": b1[:1],
            "b/rest": b1,
            "out/twin": (1 - self.share) * w2[:1],
            "out/rest": w2 * jnp.array([self.share, 1, 1, 1])[:, None],
        }

    def fold_back(self, leaves):
        first = jnp.array([1.0, 0, 0, 0])
        share = jnp.array([self.share, 1, 1, 1])
        return {
            "w1": leaves["in/rest"] * share[None] + (1 - self.share) * leaves["in/twin"] * first[None],
            "b1": leaves["b/rest"] * share + (1 - self.share) * leaves["b/twin"] * first,
            "w2": leaves["out/rest"] + leaves["out/twin"] * first[:, None],
        }


@jax.jit
def twin_gradient(leaves: dict[str, Any], batch: Any) -> Any:
    def loss(leaves):
        wide = {
            "w1": jnp.concatenate([leaves["in/rest"], leaves["in/twin"]], 1),
            "b1": jnp.concatenate([leaves["b/rest"], leaves["b/twin"]]),
            "w2": jnp.concatenate([leaves["out/rest"], leaves["out/twin"]]),
        }
        return mlp.loss(wide | {name: leaves[name] for name in ("b2", "w3", "b3")}, batch)

    return jax.grad(loss)(leaves)


EDITS = {
    "regroup": (Regroup(), "w1|b1|w2|b2|w3", regroup, regrouped_gradient),
    "unequal twin": (SplitWithFold(), "w1|b1|w2", SplitWithFold(), twin_gradient),
}


def recorded() -> tuple[mlp.Run, Any]:
    """Some steps along a line of parameters, and the state with Adam's moments of their gradients."""
    batches = mlp.batches()
    start = mlp.make_params()
    points = [jax.tree.map(lambda x, t=t: x * (1 - 0.01 * t), start) for t in range(mlp.STEPS)]
    run = mlp.Run(points, batches)
    mu, nu = mlp.rebuilt(run, lambda params: params)
    state = fsh.TrainState.create(apply_fn=None, params=points[-1], tx=optax.adam(1e-3, b1=mlp.B1, b2=mlp.B2))
    adam = state.opt_state[0]._replace(mu=jax.tree.map(jnp.asarray, mu), nu=jax.tree.map(jnp.asarray, nu))
    return run, state.replace(opt_state=(adam, *state.opt_state[1:]))


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in keys): np.asarray(leaf) for keys, leaf in leaves}


@pytest.mark.parametrize("name", EDITS)
def test_moments_are_those_of_a_network_that_always_had_the_other_paths(name, x64):
    surgery, names, edit, gradient = EDITS[name]
    run, state = recorded()
    touched = names.split("|")

    def edited(params):
        return edit({n: params[n] for n in touched}) | {n: x for n, x in params.items() if n not in touched}

    mu, nu = mlp.rebuilt(run, edited, gradient)
    new, record = fsh.operate(state, surgery, params=touched, fresh="init")
    assert record.rule == "transport"
    assert flat(new.params).keys() == mu.keys()
    for slots, expected in ((new.opt_state[0].mu, mu), (new.opt_state[0].nu, nu)):
        for path, value in flat(slots).items():
            np.testing.assert_allclose(value, expected[path], rtol=1e-11, atol=1e-13, err_msg=path)
    carried = (
        fsh.operate(state, lambda leaves: surgery(leaves), params=touched, opt_state="carry")[0]
        if name == "regroup"
        else fsh.operate(state, surgery, params=touched, opt_state="reset")[0]
    )
    wrong = [
        path for path, value in flat(carried.opt_state[0].mu).items() if not np.allclose(value, mu[path], rtol=1e-6)
    ]
    assert wrong, "another rule must not pass"


# What becomes of leaves, slots and containers.


def make_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "attention": {"qkv": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "out": jnp.ones((2, 4))},
        "head": {"kernel": jnp.ones((4, 2))},
    }


def split(leaves: dict[str, Any]) -> dict[str, Any]:
    (path,) = leaves
    q, k, v = jnp.split(leaves[path], 3, axis=1)
    return {"attention/q": q, "attention/k": k, "attention/v": v, "attention/bias": jnp.zeros(2)}


def decays(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


TX = {
    "adam": optax.adam(1e-2),
    "clipped adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 100))),
    "masked": optax.chain(optax.masked(optax.trace(0.9), decays), optax.scale(-0.1)),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 2),
    "lion": optax.lion(1e-3),
    "copies": optax.contrib.schedule_free_adamw(1e-2),
}


def trained(tx: Any, params: Any) -> Any:
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)
    for seed in range(3):
        draws = iter(np.random.default_rng(seed).normal(size=1000))
        grads = jax.tree.map(lambda w: jnp.full(jnp.shape(w), next(draws), w.dtype) + 0.1 * w, params)  # noqa: B023
        state = state.apply_gradients(grads=grads)
    return state


@pytest.mark.parametrize("name", TX)
def test_every_slot_follows_its_elements_to_the_other_paths(name):
    tx = TX[name]
    state = trained(tx, make_params())
    new, record = fsh.operate(state, split, params="attention/qkv")
    assert record.added == ("attention/bias", "attention/k", "attention/q", "attention/v")
    assert record.removed == ("attention/qkv",)
    fitting = jax.eval_shape(tx.init, new.params)
    assert jax.tree.structure(fitting) == jax.tree.structure(new.opt_state)
    old_slots = {
        jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    checked = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(new.opt_state):
        key = jax.tree_util.keystr(keys)
        part = next((part for part in "qkv" if f"['{part}']" in key), None)
        if part is not None:
            source = old_slots[key.replace(f"['{part}']", "['qkv']")]
            i = "qkv".index(part)
            np.testing.assert_array_equal(leaf, source[:, 2 * i : 2 * i + 2])
            checked += 1
        elif "['bias']" in key:
            source = old_slots[key.replace("['bias']", "['qkv']")]
            start = {".nu": source.mean(), ".z": 0.0}.get(next((f for f in (".nu", ".z") if f in key), ""), 0.0)
            np.testing.assert_allclose(leaf, start, rtol=1e-6)
        else:
            assert leaf is old_slots[key], key
    assert checked == 3 * sum("qkv" in key for key in old_slots) > 0
    grads = jax.tree.map(jnp.ones_like, new.params)
    jax.block_until_ready(new.apply_gradients(grads=grads).params)


def test_a_slot_that_a_new_leaf_has_and_its_source_had_not_starts_afresh():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.full(3, 2.0)}  # `masked` gives kernels a slot, biases none
    state = trained(TX["masked"], params)
    join = lambda leaves: {"both": jnp.concatenate([leaves["kernel"], leaves["bias"][None]])}  # noqa: E731
    new, record = fsh.operate(state, join, params="**")
    before, after = state.opt_state[0].inner_state.trace["kernel"], new.opt_state[0].inner_state.trace["both"]
    np.testing.assert_array_equal(after[:2], before)
    np.testing.assert_array_equal(after[2], 0)
    assert record.figures["slots/fresh"] == 3


def test_second_moments_of_a_new_leaf_start_from_the_mean_of_leaves_of_its_name():
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.full(3, 2.0)}}
    state = trained(optax.adam(1e-2), params)
    grow = lambda leaves: {**leaves, "b/kernel": jnp.zeros((3, 3)), "b/scale": jnp.ones(3)}  # noqa: E731
    nu, old = fsh.operate(state, grow, params="a/*")[0].opt_state[0].nu, state.opt_state[0].nu["a"]
    np.testing.assert_allclose(nu["b"]["kernel"], old["kernel"].mean(), rtol=1e-6)
    both = (old["kernel"].sum() + old["bias"].sum()) / 9
    np.testing.assert_allclose(nu["b"]["scale"], both, rtol=1e-6)
    assert not np.isclose(both, old["kernel"].mean(), rtol=1e-2)
    started = fsh.operate(state, grow, params="a/*", fresh="init")[0].opt_state[0].nu["b"]
    np.testing.assert_array_equal(started["kernel"], 0)


def test_slots_of_different_dtypes_change_places_exactly():
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.full((2, 3), 2.0)}
    state = trained(optax.adam(1e-2), params)
    new, _ = fsh.operate(state, lambda leaves: {"a": leaves["b"], "b": leaves["a"]})
    mu, old = new.opt_state[0].mu, state.opt_state[0].mu
    np.testing.assert_array_equal(mu["b"], old["a"].astype(jnp.float32))
    np.testing.assert_array_equal(mu["a"], old["b"].astype(jnp.bfloat16))


def test_an_added_leaf_is_stored_as_short_as_those_beside_it():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    new, _ = fsh.operate(trained(TX["adam"], params), split, params="attention/qkv")
    assert {leaf.dtype for leaf in jax.tree.leaves((new.params, new.opt_state[0].mu))} == {jnp.dtype(jnp.bfloat16)}


def test_a_function_rule_gets_the_slot_of_a_new_leaf_as_it_starts():
    seen = {}

    def rule(slot, *, kind, path, old, new, key):
        seen[path, kind] = (slot.shape, old)
        return jnp.full(new.shape, 7.0)

    new, _ = fsh.operate(trained(TX["adam"], make_params()), split, params="attention/qkv", opt_state=rule)
    assert seen["attention/q", "grad"] == ((4, 2), None)
    np.testing.assert_array_equal(new.opt_state[0].nu["attention"]["bias"], 7.0)


def boxed(params: Any) -> Any:
    return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), params)


CONTAINERS = {
    "dict": (lambda params: params, ""),
    "FrozenDict": (FrozenDict, ""),
    "boxes": (boxed, ""),
    "nnx.State": (nnx.State, ""),
    "variables": (lambda params: {"params": params}, "params/"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_keep_their_type(name):
    wrap, prefix = CONTAINERS[name]
    state = trained(TX["adam"], wrap(make_params()))

    def regroup(leaves):
        return {prefix + path: leaf for path, leaf in split(leaves).items()} | {prefix + "new/deep/w": jnp.ones(2)}

    new, _ = fsh.operate(state, regroup, params=f"{prefix}attention/qkv")
    assert type(new.params) is type(state.params)
    assert f"{prefix}new/deep/w" in flatten(new.params).paths
    inner, old = (tree["params"] if prefix else tree for tree in (new.params, state.params))
    assert type(inner["attention"]) is type(old["attention"])
    assert isinstance(inner["attention"]["out"], nn.Partitioned) == (name == "boxes")
    before = nn.unbox(old["attention"]["qkv"])
    np.testing.assert_array_equal(inner["attention"]["q"], before[:, :2])
    assert jax.tree.structure(jax.eval_shape(state.tx.init, new.params)) == jax.tree.structure(new.opt_state)


def test_numbered_layers_of_nnx_are_added_as_such():
    params = nnx.State({"layers": {0: {"w": jnp.ones(2)}, 1: {"w": jnp.ones(2)}}})
    grow = lambda leaves: {**leaves, "layers/2/w": leaves["layers/1/w"] * 1}  # noqa: E731
    new, _ = fsh.operate(trained(TX["adam"], params), grow, params="layers/1/w", opt_state="carry")
    assert set(new.params["layers"]) == {0, 1, 2}


def test_a_container_that_is_left_empty_goes():
    state = trained(TX["adam"], make_params())
    new, _ = fsh.operate(state, lambda leaves: {"head/kernel": leaves["head/kernel"]}, params=["attention/*", "head/*"])
    assert set(new.params) == {"head"}


def test_traced_and_abstract_states_get_the_same_paths():
    state = trained(TX["adam"], make_params())

    def edit(state):
        return fsh.operate(state, split, params="attention/qkv")[0]

    host = edit(state)
    assert_bitwise_equal(jax.jit(edit)(state).params, host.params)
    abstract = jax.eval_shape(edit, state)
    assert jax.tree.structure(abstract.params) == jax.tree.structure(host.params)


# In the loop.


class Layers(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = x + nn.Dense(4, name=f"layer_{i}", use_bias=False)(x)
        return x


BATCH = np.asarray(np.random.default_rng(1).normal(size=(8, 4)), np.float32)


def deepen(leaves: dict[str, Any]) -> dict[str, Any]:
    return {**leaves, "layer_2/kernel": jnp.zeros((4, 4))}


def make_state() -> Any:
    params = Layers(2).init(jax.random.key(0), BATCH)["params"]
    return fsh.TrainState.create(apply_fn=Layers(2).apply, params=params, tx=optax.adam(1e-2))


@jax.jit
def train_step(state: Any) -> Any:
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, BATCH) - 1) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def growing(**kwargs: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks()
    hooks.add("deepen", deepen, params="layer_*/kernel", when=fsh.at(2), **kwargs)
    return hooks


def run(hooks: fsh.SurgeryHooks, steps: int) -> Any:
    state = make_state()
    for step in range(1, steps + 1):
        state = hooks(step, train_step(state))
    return state


def test_a_layer_is_added_while_training_and_trains_on():
    records = []
    hooks = growing(apply_fn=Layers(3).apply, on_reshape=lambda state, record: records.append(record))
    hooks.add("halve", lambda w: w / 2, params="layer_*/kernel", when=fsh.at(5))
    state = run(hooks, 5)
    (record,) = records
    assert (record.added, record.removed, record.step) == (("layer_2/kernel",), (), 2)
    assert record.to_json().count('"added": ["layer_2/kernel"]') == 1
    assert float(jnp.abs(state.params["layer_2"]["kernel"]).max()) > 1e-3
    assert hooks.ledger.records[-1].paths == ("layer_0/kernel", "layer_1/kernel", "layer_2/kernel")
    hooks.flush()


def test_a_preview_shows_the_paths_and_changes_nothing():
    hooks = growing(apply_fn=Layers(3).apply)
    state = make_state().replace(step=1)
    record = hooks.preview("deepen", state)
    assert record.added == ("layer_2/kernel",)
    assert len(record.leaves) == len(record.paths) == 3
    assert set(state.params) == {"layer_0", "layer_1"}


def test_a_hook_that_brings_nothing_for_other_paths_is_an_error_at_the_first_call():
    hooks, state = growing(), make_state()
    with pytest.raises(StructureError, match=r"adds or removes leaves.*adds layer_2/kernel.*apply_fn="):
        hooks(1, state.replace(step=1))


def test_a_later_hook_whose_leaves_will_be_gone_is_an_error_at_the_first_call():
    hooks = fsh.SurgeryHooks()
    merge = lambda leaves: {"layer_0/kernel": leaves["layer_0/kernel"]}  # noqa: E731
    hooks.add("merge", merge, params="layer_*/kernel", when=fsh.at(2), apply_fn=Layers(1).apply)
    hooks.add("halve", lambda w: w / 2, params="layer_1/kernel", when=fsh.every(3))
    with pytest.raises(SelectionError, match="layer_1/kernel") as caught:
        hooks(1, make_state().replace(step=1))
    assert caught.value.hook == "halve"


def test_a_refused_fire_keeps_the_paths():
    hooks = fsh.SurgeryHooks(on_error="raise")
    spoil = lambda leaves: {**deepen(leaves), "layer_0/kernel": leaves["layer_0/kernel"] / 0}  # noqa: E731
    hooks.add("spoil", spoil, params="layer_*/kernel", when=fsh.at(1), apply_fn=Layers(3).apply, opt_state="carry")
    state = make_state().replace(step=1)
    assert_bitwise_equal(hooks(1, state).params, state.params)
    with pytest.raises(RefusedError):
        hooks.flush()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_an_added_leaf_lies_on_the_mesh_of_those_beside_it(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    copied = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(make_state().replace(step=jnp.int32(2)), copied)
    grown = growing(apply_fn=Layers(3).apply)(2, state)
    assert grown.params["layer_2"]["kernel"].sharding.is_equivalent_to(copied, 2)
    assert grown.opt_state[0].mu["layer_2"]["kernel"].sharding.is_equivalent_to(copied, 2)
    assert jax.tree.leaves(train_step(grown).params)[0].sharding.mesh == mesh
