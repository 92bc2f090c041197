"""What a fire must leave alone: other leaves, structure, dtypes, placement, the compiled train step, and idle steps."""

from __future__ import annotations

import logging
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_surgery_hooks as fsh

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_params(seed: int = 0) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "Dense_0": {"bias": jnp.zeros(16), "kernel": jax.random.normal(keys[0], (8, 16))},
        "Dense_1": {"bias": jnp.zeros(8), "kernel": jax.random.normal(keys[1], (16, 8))},
    }


def loss(params: Any, batch: jax.Array) -> jax.Array:
    params = nn.meta.unbox(params)
    hidden = jax.nn.relu(batch @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return jnp.mean((hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None] - 1) ** 2)


def apply(state: Any, batch: jax.Array) -> Any:
    return state.apply_gradients(grads=jax.grad(loss)(state.params, batch))


BATCH = np.asarray(np.random.default_rng(0).normal(size=(8, 8)), np.float32)


def make_state(params: Any = None, steps: int = 3) -> Any:
    state = fsh.TrainState.create(apply_fn=None, params=params if params is not None else make_params(), tx=TX)
    step = jax.jit(apply)
    for _ in range(steps):
        state = step(state, BATCH)
    return state


def exactly_normed(state: Any) -> Any:
    """The state with a kernel whose norm, 8, is exact in whatever order its squares are added: compilers choose that
    order for each program and machine, so that of other kernels the last bit is theirs.
    """
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.repeat(np.float32([0, 0.5, 1]), [16, 64, 48]))
    kernel = jnp.asarray((sizes * rng.choice(np.float32([-1, 1]), 128)).reshape(16, 8))
    return state.replace(params=state.params | {"Dense_1": state.params["Dense_1"] | {"kernel": kernel}})


def guide(state: Any) -> Any:
    """The surgery of Flax's guide, by hand: flatten, edit, unflatten; params and moments alike are left in their
    places.
    """
    flat = flax.traverse_util.flatten_dict(state.params, sep="/")
    flat["Dense_1/kernel"] = flat["Dense_1/kernel"] / jnp.linalg.norm(flat["Dense_1/kernel"])
    return state.replace(params=flax.traverse_util.unflatten_dict(flat, sep="/"))


@pytest.mark.parametrize("rule", ["keep", "carry"])
@pytest.mark.parametrize(
    "surgery",
    [
        pytest.param(fsh.surgeries.Normalize(), id="Normalize"),
        pytest.param(lambda kernel: kernel / jnp.linalg.norm(kernel), id="as_in_the_guide"),
    ],
)
def test_normalize_is_the_guides_surgery_bit_for_bit(surgery, rule):
    state = exactly_normed(make_state())
    new, _ = fsh.operate(state, surgery, params="Dense_1/kernel", opt_state=rule)
    assert_trees_equal(new, guide(state))
    wrong, _ = fsh.operate(state, surgery, params="Dense_1/kernel", opt_state="reset")
    with pytest.raises(AssertionError):
        assert_trees_equal(wrong, guide(state))


def test_moments_edited_by_hand_as_in_the_guide_equal_a_rule_that_says_so():
    """The guide divides `mu` and `nu` too, if one asks it to: here a rule of the user's own."""
    state = exactly_normed(make_state())
    norm = jnp.linalg.norm(state.params["Dense_1"]["kernel"])
    clip, (adam, *rest) = state.opt_state
    moments = []
    for tree in (adam.mu, adam.nu):
        flat = flax.traverse_util.flatten_dict(tree, sep="/")
        flat["Dense_1/kernel"] = flat["Dense_1/kernel"] / norm
        moments.append(flax.traverse_util.unflatten_dict(flat, sep="/"))
    by_hand = guide(state).replace(opt_state=(clip, (adam._replace(mu=moments[0], nu=moments[1]), *rest)))

    def divided(slot, *, kind, path, old, new, key):
        return slot / jnp.linalg.norm(old)

    new, _ = fsh.operate(state, fsh.surgeries.Normalize(), params="Dense_1/kernel", opt_state=divided)
    assert_trees_equal(new, by_hand)


def assert_trees_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


SURGERIES = {
    "normalize": fsh.surgeries.Normalize(),
    "scale": fsh.surgeries.Scale(0.3),
    "clip_norm": fsh.surgeries.ClipNorm(0.5),
    "noise": fsh.surgeries.Noise(0.1),
    "assign": fsh.surgeries.Assign(0.25),
    "reinit": fsh.surgeries.Reinit(initializer=jax.nn.initializers.lecun_normal()),
    "sort": lambda leaf: jnp.sort(leaf, 0),
    "take": lambda leaf: leaf[jnp.argsort(leaf[:, 0])],
    "swap": lambda leaves: dict(zip(leaves, [x[:, ::-1] for x in leaves.values()], strict=True)),
}
RULES = ("carry", "transport", "keep", "reset")


def fire(state: Any, name: str) -> Any:
    return fsh.operate(state, SURGERIES[name], params="**/kernel", key=jax.random.key(0))[0]


@pytest.mark.parametrize("name", SURGERIES)
def test_untouched_leaves_are_the_same_objects_and_nothing_else_changes(name):
    state = make_state()
    new = fire(state, name)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert new.tx is state.tx
    assert new.step is state.step
    touched = 0
    before = jax.tree_util.tree_flatten_with_path(state)[0]
    for (keys, old), leaf in zip(before, jax.tree.leaves(new), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.weak_type) == (old.shape, old.dtype, old.weak_type)
        assert (leaf.sharding, leaf.committed) == (old.sharding, old.committed)
        if "kernel" in jax.tree_util.keystr(keys):
            touched += leaf is not old
        else:
            assert leaf is old
    assert touched


def test_weak_types_are_kept():
    params = {"w": jnp.full((4, 4), 0.5), "b": jnp.full((4,), 0.5)}
    assert params["w"].weak_type
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9))
    new, _ = fsh.operate(state, lambda w: w * jnp.float32(2), params="w")
    assert new.params["w"].weak_type
    assert new.opt_state[0].trace["w"].weak_type == state.opt_state[0].trace["w"].weak_type


def mesh_of(kinds: tuple[AxisType, ...]) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)


MESHES = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Auto, AxisType.Explicit),
}


def sharded(state: Any, mesh: Mesh) -> Any:
    def put(leaf: jax.Array) -> jax.Array:
        spec = P("data", "model") if leaf.ndim == 2 else P("model") if leaf.ndim == 1 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, state)


@pytest.mark.parametrize("kinds", MESHES)
@pytest.mark.parametrize("name", ["normalize", "reinit", "sort", "take", "swap"])
def test_sharded_leaves_keep_their_shardings_and_values(name, kinds):
    state = make_state()
    alone, spread = fire(state, name), fire(sharded(state, mesh_of(MESHES[kinds])), name)
    placed = sharded(state, mesh_of(MESHES[kinds]))
    for found, expected, before in zip(*map(jax.tree.leaves, (spread, alone, placed)), strict=True):
        assert found.sharding == before.sharding
        assert found.committed
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_leaves_on_different_devices_keep_their_places():
    state = make_state()
    here, there = jax.devices()[2], jax.devices()[5]
    flat = flax.traverse_util.flatten_dict(state.params, sep="/")
    flat["Dense_0/kernel"] = jax.device_put(flat["Dense_0/kernel"], here)
    flat["Dense_1/kernel"] = jax.device_put(flat["Dense_1/kernel"], there)
    state = state.replace(params=flax.traverse_util.unflatten_dict(flat, sep="/"))
    state = state.replace(opt_state=TX.init(state.params))
    new = fire(state, "scale")
    assert new.params["Dense_0"]["kernel"].devices() == {here}
    assert new.params["Dense_1"]["kernel"].devices() == {there}
    np.testing.assert_array_equal(new.params["Dense_1"]["kernel"], np.float32(0.3) * np.asarray(flat["Dense_1/kernel"]))


class Compilations(logging.Handler):
    """Names of what JAX compiles."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Compiling "):
            self.names.append(record.getMessage().split()[1])


@pytest.fixture
def compilations():
    handler, logger = Compilations(), logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    before = logger.propagate, jax.config.jax_log_compiles
    logger.propagate = False
    jax.config.update("jax_log_compiles", True)
    yield handler.names
    jax.config.update("jax_log_compiles", before[1])
    logger.propagate = before[0]
    logger.removeHandler(handler)


def test_the_compilation_log_is_heard(compilations):
    jax.jit(lambda x: x * 3.5)(jnp.ones(3)).block_until_ready()
    assert compilations


@pytest.mark.parametrize("placement", ["single", "auto", "explicit"])
def test_no_value_edit_retraces_the_train_step(placement):
    traces = []

    def step(state: Any, batch: jax.Array) -> Any:
        traces.append(1)
        return apply(state, batch)

    state = make_state(steps=0)
    state = state.replace(step=jnp.int32(0))
    train_step = jax.jit(step, donate_argnums=0)
    if placement != "single":
        state = sharded(state, mesh_of(MESHES["auto"]))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        train_step = jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=shardings)
    hooks = fsh.SurgeryHooks()
    for i, name in enumerate(SURGERIES):
        hooks.add(name, SURGERIES[name], params="**/kernel", when=fsh.every(4, start=4 + i), opt_state=RULES[i % 4])
    for i in range(3):  # a trainer's own second compilation, if it has one, is not ours
        state = hooks(i + 1, train_step(state, BATCH))
    before = len(traces), train_step._cache_size()
    for i in range(3, 20):
        state = hooks(i + 1, train_step(state, BATCH))
    assert (len(traces), train_step._cache_size()) == before
    assert sum(record.event == "fired" for record in hooks.ledger.records) > len(SURGERIES)


def test_idle_calls_compile_nothing_and_touch_no_device(compilations):
    hooks = fsh.SurgeryHooks()
    hooks.add("norm", SURGERIES["normalize"], params="**/kernel", when=fsh.every(5_000))
    state = make_state()
    state = state.replace(step=jnp.int32(1))
    hooks(1, state)
    compilations.clear()
    with jax.transfer_guard("disallow"):
        assert all(hooks(step, state) is state for step in range(2, 1_002))
    assert not compilations


def test_a_second_fire_compiles_nothing(compilations):
    hooks = fsh.SurgeryHooks()
    for name in ("normalize", "reinit", "noise"):
        hooks.add(name, SURGERIES[name], params="**/kernel", when=fsh.every(2))
    state = make_state()
    state = hooks.fire("normalize", state, step=1)
    for name in ("reinit", "noise"):
        state = hooks.fire(name, state, step=1)
    hooks.flush()
    compilations.clear()
    for name in ("reinit", "normalize", "noise"):
        state = hooks.fire(name, state, step=2)
    assert not compilations


def test_leaves_of_one_signature_share_a_program(compilations):
    params = {f"layer_{i}": {"kernel": jnp.full((6, 6), float(i + 1)) + jnp.eye(6)} for i in range(12)}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    hooks = fsh.SurgeryHooks()
    hooks.add("norm", SURGERIES["normalize"], params="**/kernel", when=fsh.at(1))
    hooks.fire("norm", state, step=1)
    (programs,) = hooks._programs["norm"].values()
    (passes,) = programs.compiled.values()
    assert [one._cache_size() for one in (passes.first, passes.second)] == [1, 1]


@pytest.mark.parametrize("name", ["normalize", "swap"])
def test_containers_of_params_are_kept(name):
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), make_params())
    for params in (FrozenDict(make_params()), boxed):
        state = make_state(params)
        new = fire(state, name)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        plain = fire(make_state(), name)
        for found, expected in zip(jax.tree.leaves(new), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_moments_and_params_of_different_dtypes_keep_them():
    tx = optax.adam(0.1, mu_dtype=jnp.bfloat16)
    params = {"a": jnp.ones((4, 4), jnp.bfloat16), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 4), jnp.float16)}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)
    seen = []

    def edit(leaf):
        seen.append(leaf.dtype)
        return leaf * 0.5

    new, _ = fsh.operate(state, edit)
    assert set(seen) == {jnp.dtype("float32")}
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert jnp.result_type(before) == jnp.result_type(after)
    assert new.params["a"].dtype == jnp.bfloat16
