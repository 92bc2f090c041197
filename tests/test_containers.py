"""Whatever holds the params, an edit does what it does to a dict; and what becomes of leaves that are no floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.jax_utils
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training import dynamic_scale, train_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import StateError
from flax_surgery_hooks.paths import flatten

TX = optax.adam(1e-2)
VALUES = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate({"a/bias": (4,), "a/kernel": (4, 4), "b/bias": (4,), "b/kernel": (4, 4)}.items())
}


def plain(leaf: Callable[[Any], Any] = jnp.asarray) -> dict[str, Any]:
    return {layer: {name: leaf(VALUES[f"{layer}/{name}"]) for name in ("bias", "kernel")} for layer in "ab"}


class Model(nnx.Module):
    """Two layers with the values above."""

    def __init__(self):
        self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.stats = nnx.BatchStat(jnp.ones(4))
        nnx.update(self, plain())


class BigState(train_state.TrainState):
    """A state with what real trainers add."""

    batch_stats: Any = None
    dynamic_scale: Any = None
    ema_params: Any = None


def moments(params: Any, state: Any) -> Any:
    """The state with moments that can be told apart: mu = w / 10, nu = w^2."""

    def fill(function):
        return lambda w, slot: function(jnp.asarray(w)) if jnp.issubdtype(jnp.result_type(w), jnp.floating) else slot

    adam, *rest = state.opt_state
    mu = jax.tree.map(fill(lambda w: w / 10), params, adam.mu)
    nu = jax.tree.map(fill(lambda w: w * w), params, adam.nu)
    return state.replace(opt_state=(adam._replace(mu=mu, nu=nu, count=jnp.int32(5)), *rest))


def create(params: Any, cls: Any = fsh.TrainState, **fields: Any) -> Any:
    return moments(params, cls.create(apply_fn=None, params=params, tx=TX, **fields))


def bound(params: Any) -> Any:
    return moments(params, fsh.bind(params=params, opt_state=TX.init(params), tx=TX))


def bound_nnx() -> Any:
    model = Model()
    view = fsh.bind_nnx(model, nnx.Optimizer(model, TX, wrt=nnx.Param))
    return moments(view.params, view).write_back()


def boxed(box: Any) -> Any:
    return jax.tree.map(lambda leaf: box(leaf, names=(None,) * leaf.ndim), plain())


BESIDE = {"batch_stats": {"mean": 0.5}, "dynamic_scale": dynamic_scale.DynamicScale(), "ema_params": plain()}
CONTAINERS: dict[str, Callable[[], Any]] = {
    "dict": lambda: create(plain()),
    "flax_state": lambda: create(plain(), train_state.TrainState),
    "frozen": lambda: create(FrozenDict(plain())),
    "partitioned": lambda: create(boxed(nn.Partitioned)),
    "logically": lambda: create(boxed(nn.LogicallyPartitioned)),
    "nnx_state": lambda: create(nnx.state(Model(), nnx.Param)),
    "nnx_pure_dict": lambda: create(nnx.to_pure_dict(nnx.state(Model(), nnx.Param))),
    "variables": lambda: create({"params": plain(), "batch_stats": {"mean": jnp.ones(4), "count": jnp.int32(3)}}),
    "none": lambda: create({**plain(), "c": None}),
    "int_bool": lambda: create({**plain(), "n": jnp.arange(3), "m": jnp.array([True, False])}),
    "keys": lambda: create({**plain(), "key": jax.random.key(0), "raw": jax.random.PRNGKey(0)}),
    "numpy": lambda: create(plain(np.asarray)),
    "scalars": lambda: create({**plain(), "scale": 2.0, "n": 3}),
    "big_state": lambda: create(plain(), BigState, **BESIDE),
    "bound": lambda: bound(plain()),
    "bound_nnx": bound_nnx,
}


def reverse(leaves):
    return {path: leaf[:, ::-1] for path, leaf in leaves.items()}


def halve(kernel):
    return kernel / 2


SURGERIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "normalize": (fsh.surgeries.Normalize(), {}),
    "transport": (halve, {"opt_state": "transport"}),
    "leaves": (reverse, {}),
}


def edit(state: Any, name: str) -> Any:
    surgery, options = SURGERIES[name]
    return fsh.operate(state, surgery, params="**/kernel", **options)


def kernels(tree: Any) -> dict[str, np.ndarray]:
    leaves = flatten(tree)
    items = zip(leaves.paths, leaves.values, strict=True)
    return {path.removeprefix("params/"): np.asarray(x) for path, x in items if path.endswith("kernel")}


@pytest.fixture(scope="module")
def of_a_dict() -> dict[str, Any]:
    return {name: edit(CONTAINERS["dict"](), name)[0] for name in SURGERIES}


def assert_leaves_kept(old: Any, new: Any) -> int:
    """Structure and dtypes are the same, and all but kernels the same objects; the number of new leaves."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    before, after = jax.tree_util.tree_flatten_with_path(old)[0], jax.tree.leaves(new)
    changed = 0
    for (keys, a), b in zip(before, after, strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        assert getattr(a, "weak_type", False) == getattr(b, "weak_type", False)
        changed += a is not b
        assert a is b or "kernel" in jax.tree_util.keystr(keys)
    return changed


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_edit_does_what_it_does_to_a_dict(container, of_a_dict):
    state = CONTAINERS[container]()
    for name in SURGERIES:
        new, record = edit(state, name)
        for tree, expected in (
            (new.params, of_a_dict[name].params),
            (new.opt_state[0].mu, of_a_dict[name].opt_state[0].mu),
            (new.opt_state[0].nu, of_a_dict[name].opt_state[0].nu),
        ):
            found, wanted = kernels(tree), kernels(expected)
            assert found.keys() == wanted.keys()
            for path in wanted:
                np.testing.assert_array_equal(found[path], wanted[path])
        prefix = "params/" if container == "variables" else ""
        assert record.paths == (f"{prefix}a/kernel", f"{prefix}b/kernel")
        assert new.tx is state.tx
        if container != "numpy":
            moves_slots = name != "normalize"
            assert assert_leaves_kept(state, new) == 2 + 4 * moves_slots or not moves_slots


def test_moments_differ_between_the_surgeries(of_a_dict):
    """The law above would hold for an edit that does nothing."""
    before = CONTAINERS["dict"]()
    after = of_a_dict["transport"].opt_state[0]
    np.testing.assert_allclose(after.mu["a"]["kernel"], 2 * before.opt_state[0].mu["a"]["kernel"])
    np.testing.assert_allclose(after.nu["a"]["kernel"], 4 * before.opt_state[0].nu["a"]["kernel"])
    reversed_ = of_a_dict["leaves"].opt_state[0].mu["b"]["kernel"]
    np.testing.assert_array_equal(reversed_, before.opt_state[0].mu["b"]["kernel"][:, ::-1])


BARE = {
    "array": lambda leaf: leaf,
    "numpy": np.asarray,
    "box": lambda leaf: nn.Partitioned(leaf, names=(None, None)),
    "variable": nnx.Param,
}


@pytest.mark.parametrize("wrap", BARE)
def test_params_may_be_one_bare_leaf(wrap):
    params = BARE[wrap](jnp.asarray(VALUES["a/kernel"]))
    state = bound(params)
    for surgery in (halve, lambda leaves: {path: leaf / 2 for path, leaf in leaves.items()}):
        new, record = fsh.operate(state, surgery, opt_state="transport")
        assert record.paths == ("",)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        np.testing.assert_array_equal(jax.tree.leaves(new.params)[0], VALUES["a/kernel"] / 2)
        np.testing.assert_allclose(jax.tree.leaves(new.opt_state[0].nu)[0], 4 * VALUES["a/kernel"] ** 2, rtol=1e-6)


# Leaves that are no float32 arrays of JAX.


@pytest.mark.parametrize(
    ("leaf", "function", "expected"),
    [
        pytest.param(lambda: jnp.arange(3), lambda n: n + 1, [1, 2, 3], id="int"),
        pytest.param(lambda: np.arange(3, dtype=np.int32), lambda n: n * 2, [0, 2, 4], id="numpy_int"),
        pytest.param(lambda: jnp.array([True, False]), lambda m: ~m, [False, True], id="bool"),
        pytest.param(lambda: 3, lambda n: n + 1, 4, id="python_int"),
        pytest.param(lambda: 3.0, lambda x: x / 2, 1.5, id="python_float"),
        pytest.param(lambda: np.float32(3), lambda x: x / 2, 1.5, id="numpy_scalar"),
        pytest.param(lambda: np.array([3.0, 4.0]), lambda x: x / 2, [1.5, 2.0], id="float64"),
        pytest.param(lambda: jnp.array([1.5, 3], jnp.bfloat16), lambda x: x / 2, [0.75, 1.5], id="bfloat16"),
        pytest.param(lambda: jnp.array([1.5, 3], jnp.float16), lambda x: x / 2, [0.75, 1.5], id="float16"),
    ],
)
def test_every_kind_of_number_is_edited_in_its_own_dtype(leaf, function, expected):
    """As the train step would take it: a Python float is a weak float32, a float64 of numpy a float32."""
    old = leaf()
    state = fsh.bind(params={"x": old, "w": jnp.ones(2)}, opt_state=optax.EmptyState(), tx=optax.identity())
    new = fsh.operate(state, function, params="x")[0].params["x"]
    assert isinstance(new, jax.Array)
    assert new.tolist() == expected
    seen = jax.eval_shape(lambda x: x, old)
    assert (new.shape, new.dtype, new.weak_type) == (seen.shape, seen.dtype, seen.weak_type)


def test_numpy_leaves_are_jax_arrays_after_an_edit_and_themselves_without():
    state = CONTAINERS["numpy"]()
    new, _ = edit(state, "normalize")
    assert isinstance(new.params["a"]["kernel"], jax.Array)
    assert not new.params["a"]["kernel"].committed
    assert new.params["a"]["bias"] is state.params["a"]["bias"]
    assert isinstance(state.params["a"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(state.params["a"]["kernel"], VALUES["a/kernel"])  # not written into


def test_float64_of_numpy_has_slots_like_any_other():
    params = plain(lambda leaf: leaf.astype(np.float64))
    new, _ = edit(create(params), "transport")
    assert new.params["a"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(new.opt_state[0].mu["a"]["kernel"], new.params["a"]["kernel"] * 4 / 10)


def test_none_is_no_leaf():
    state = create({**plain(), "c": None})
    new, record = fsh.operate(state, halve)
    assert record.paths == tuple(VALUES)
    assert new.params["c"] is None


def test_what_stands_beside_params_is_left_alone():
    state = CONTAINERS["big_state"]()
    new, _ = edit(state, "transport")
    for name in ("batch_stats", "dynamic_scale", "ema_params", "step", "tx", "apply_fn"):
        assert getattr(new, name) is getattr(state, name)


# States replicated for pmap.


def replicated(state: Any) -> Any:
    return flax.jax_utils.replicate(state, jax.local_devices()[:2])


CALLS = {
    "call": lambda hooks, state: hooks(0, state),
    "fire": lambda hooks, state: hooks.fire("a", state, 0),
    "fire_at_its_step": lambda hooks, state: hooks.fire("a", state),
    "preview": lambda hooks, state: hooks.preview("a", state, 0),
    "operate": lambda hooks, state: fsh.operate(state, halve),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_replicated_state_is_refused_everywhere(call):
    hooks = fsh.SurgeryHooks()
    hooks.add("a", halve, params="**", when=fsh.every(1))
    params = {"w": jnp.ones((2, 2))}
    flax_state = replicated(fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1)))
    apart = replicated(fsh.bind(params=params, opt_state=optax.sgd(0.1).init(params), tx=optax.sgd(0.1), step=0))
    for state in (flax_state, apart):
        with pytest.raises(StateError, match="replicated for pmap") as caught:
            CALLS[call](hooks, state)
        assert caught.value.found == "state.step of shape [2]"
        assert "unreplicate" in caught.value.write


def test_a_replicated_state_without_step_is_known_by_the_optimizers_count():
    state = replicated(bound(plain()))
    with pytest.raises(StateError, match="replicated for pmap") as caught:
        fsh.operate(state, halve)
    assert caught.value.found == "opt_state[0].count [2] instead of []"
    new, _ = fsh.operate(flax.jax_utils.unreplicate(state), halve)
    np.testing.assert_array_equal(new.params["a"]["kernel"], VALUES["a/kernel"] / 2)


def test_an_optimizer_state_of_other_shapes_is_named():
    state = create(plain())
    adam, *rest = state.opt_state
    mu = {**adam.mu, "a": {**adam.mu["a"], "kernel": jnp.ones((2, 4))}}
    with pytest.raises(StateError, match=r"not what `tx.init` makes") as caught:
        edit(state.replace(opt_state=(adam._replace(mu=mu), *rest)), "normalize")
    assert caught.value.found == "opt_state[0].mu['a']['kernel'] [2, 4] instead of [4, 4]"
