"""Surgeries that remember: a running average and a mask, kept in the train state, updated inside the train step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import RefusedError

DECAY = 0.75


@dataclass(frozen=True)
class Average:
    """Remembers a running average of the leaf, and puts it in its place when it fires."""

    decay: float = DECAY
    bad: float = 0.0

    def init_memory(self, leaf):
        return {"average": leaf, "count": jnp.zeros((), jnp.int32)}

    def observe(self, leaf, memory):
        average = self.decay * memory["average"] + (1 - self.decay) * leaf
        return leaf, {"average": average, "count": memory["count"] + 1}

    def __call__(self, leaf, memory):
        del leaf
        return memory["average"], {"average": memory["average"] + self.bad, "count": memory["count"] * 0}


@dataclass(frozen=True)
class Mask:
    """Draws a mask when it fires, and enforces it at every step."""

    rate: float = 0.5

    def init_memory(self, leaves):
        return {path: jnp.ones(leaf.shape, bool) for path, leaf in leaves.items()}

    def observe(self, leaves, memory):
        return {path: leaf * memory[path] for path, leaf in leaves.items()}, memory

    def __call__(self, leaves, memory, key):
        drawn = {p: jax.random.bernoulli(fsh.key_for(key, p), self.rate, leaf.shape) for p, leaf in leaves.items()}
        return {path: leaf * drawn[path] for path, leaf in leaves.items()}, drawn


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(8)(x))
        return nn.Dense(2)(hidden)


BATCH = np.asarray(np.random.default_rng(0).normal(size=(4, 3)), np.float32)


def make_state(cls: Any = fsh.TrainState, dtype: Any = jnp.float32, **fields: Any) -> Any:
    params = jax.tree.map(lambda x: x.astype(dtype), Model().init(jax.random.key(0), BATCH)["params"])
    state = cls.create(apply_fn=Model().apply, params=params, tx=optax.adam(1e-2), **fields)
    return state.replace(step=jnp.int32(0))


def make_step(hooks: fsh.SurgeryHooks, **jit: Any) -> Any:
    def step(state: Any) -> Any:
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, BATCH) - 1) ** 2)

        return hooks.observe(state.apply_gradients(grads=jax.grad(loss)(state.params)))

    return jax.jit(step, **jit)


def averaging(when: Any = None, **kwargs: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks()
    hooks.add("average", Average(**kwargs), params="*/kernel", when=when or fsh.at(1_000))
    return hooks


def kernel(tree: Any) -> np.ndarray:
    return np.asarray(tree["Dense_0"]["kernel"], np.float64)


def remembered(state: Any, hook: str = "average", path: str = "Dense_0/kernel") -> Any:
    return state.surgery["memory"][hook][path]


def test_a_running_average_is_that_of_every_step_and_fires_into_the_leaf():
    hooks = averaging(fsh.at(4))
    state = hooks.init(make_state())
    step = make_step(hooks)
    expected = kernel(state.params)
    for i in range(1, 7):
        state = step(state)
        expected = DECAY * expected + (1 - DECAY) * kernel(state.params)
        np.testing.assert_allclose(remembered(state)["average"], expected, rtol=1e-5)
        assert not np.allclose(remembered(state)["average"], kernel(state.params), rtol=1e-3)
        state = hooks(i, state)
        if i == 4:
            np.testing.assert_array_equal(state.params["Dense_0"]["kernel"], remembered(state)["average"])
            assert remembered(state)["count"] == 0
    assert remembered(state)["count"] == 2
    assert [(r.event, r.step) for r in hooks.ledger.records[1:]] == [("fired", 4)]
    hooks.flush()
    assert hooks.ledger.records[-1].event == "settled"


def test_neither_observing_nor_a_fire_compiles_the_step_again():
    hooks = averaging(fsh.at(2))
    state, step = hooks.init(make_state()), make_step(hooks)
    for i in range(1, 6):
        state = hooks(i, step(state))
    assert step._cache_size() == 1


def test_scanned_steps_observe_as_single_ones_do():
    hooks = averaging()
    state, step = hooks.init(make_state()), make_step(hooks)
    scanned = jax.jit(lambda s: jax.lax.scan(lambda s, _: (step(s), None), s, length=3)[0])(state)
    for _ in range(3):
        state = step(state)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_whole_state_may_be_donated():
    hooks = averaging(fsh.every(2))
    state, step = hooks.init(make_state()), make_step(hooks, donate_argnums=0)
    for i in range(1, 6):
        state = hooks(i, step(state))
    hooks.flush()
    assert np.isfinite(kernel(state.params)).all()


def test_a_mask_is_enforced_at_every_step_and_leaves_the_slots_alone():
    hooks = fsh.SurgeryHooks(seed=3)
    hooks.add("mask", Mask(), params="*/kernel", when=fsh.at(1), opt_state="keep")
    state, step = hooks.init(make_state()), make_step(hooks)
    bare = make_step(fsh.SurgeryHooks())
    for i in range(1, 4):
        state = hooks(i, step(state))
    mask = np.asarray(state.surgery["memory"]["mask"]["Dense_0/kernel"])
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(kernel(state.params)[~mask], 0)
    assert (kernel(state.params)[mask] != 0).all()
    assert_bitwise_equal(step(state).opt_state, bare(state).opt_state)


def test_without_an_observe_the_same_state_comes_back():
    hooks = fsh.SurgeryHooks()
    hooks.add("halve", fsh.surgeries.Scale(0.5), params="**", when=fsh.every(2))
    state = make_state()
    assert hooks.observe(state) is state
    assert hooks.init(state, fires=0) is state


def test_leaves_that_are_not_observed_are_the_same_objects():
    hooks = averaging()
    state = hooks.init(make_state())
    after = hooks.observe(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True))
    assert after.opt_state is state.opt_state


def test_a_memory_from_a_checkpoint_is_kept(tmp_path):
    hooks = averaging()
    state, step = hooks.init(make_state()), make_step(hooks)
    state = step(step(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": state.params, "surgery": state.surgery})
        checkpointer.wait_until_finished()
        template = jax.eval_shape(averaging().init, make_state())
        held = checkpointer.restore(tmp_path / "state", {"params": template.params, "surgery": template.surgery})
    again = averaging().init(make_state().replace(**held))
    assert_bitwise_equal(again.surgery, state.surgery)
    assert_bitwise_equal(make_step(averaging())(state.replace(step=2)).surgery, step(again.replace(
        opt_state=state.opt_state, step=2)).surgery)  # fmt: skip


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_memory_lies_where_its_leaf_lies(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    state = make_state()
    sharding = NamedSharding(mesh, PartitionSpec(None, "d"))

    def place(leaf):
        return jax.device_put(leaf, sharding if leaf.shape == (3, 8) else NamedSharding(mesh, PartitionSpec()))

    state = jax.tree.map(place, state)
    hooks = averaging(fsh.at(0))
    state = hooks.init(state)
    assert remembered(state)["average"].sharding == sharding
    assert remembered(state)["count"].sharding == NamedSharding(mesh, PartitionSpec())
    fired = hooks(0, state)
    assert remembered(fired)["average"].sharding == sharding
    np.testing.assert_array_equal(fired.params["Dense_0"]["kernel"], remembered(state)["average"])
    assert fired.params["Dense_0"]["kernel"].sharding == sharding


def test_short_floats_are_remembered_as_float32():
    hooks = averaging(fsh.at(0))
    state = hooks.init(make_state(dtype=jnp.bfloat16))
    assert remembered(state)["average"].dtype == jnp.float32
    after = jax.jit(hooks.observe)(state)
    assert remembered(after)["average"].dtype == jnp.float32
    assert hooks(0, after).params["Dense_0"]["kernel"].dtype == jnp.bfloat16


def test_a_refused_fire_leaves_the_memory_as_it_was():
    hooks = averaging(fsh.at(1), bad=float("nan"))
    state = hooks.init(make_state()).replace(step=1)
    after = hooks(1, state)
    assert_bitwise_equal(after.surgery, state.surgery)
    assert_bitwise_equal(after.params, state.params)
    with pytest.raises(RefusedError):
        hooks.flush()


def test_starting_values_may_be_drawn_and_know_their_path():
    class Drawn:
        def init_memory(self, leaf, key, path):
            return jax.random.normal(key, leaf.shape) + (100.0 if "Dense_1" in path else 0.0)

        def observe(self, leaf, memory):
            return leaf, memory

        def __call__(self, leaf):
            return leaf

    def drawn(seed):
        hooks = fsh.SurgeryHooks(seed=seed)
        hooks.add("drawn", Drawn(), params="*/kernel", when=fsh.at(9))
        return hooks.init(make_state()).surgery["memory"]["drawn"]

    assert_bitwise_equal(drawn(1), drawn(1))
    assert not np.array_equal(drawn(1)["Dense_0/kernel"], drawn(2)["Dense_0/kernel"])
    assert drawn(1)["Dense_1/kernel"].min() > 50 > drawn(1)["Dense_0/kernel"].max()


def test_what_an_observe_asks_for_comes_from_the_train_step():
    class Loudest:
        def init_memory(self, leaf):
            return jnp.zeros(())

        def observe(self, leaf, memory, step, loss, key):
            draw = jax.random.uniform(key, ())
            return leaf, jnp.where(step > 2, memory, jnp.maximum(memory, loss)) + 0 * draw

        def __call__(self, leaf, memory):
            return leaf * memory, memory

    hooks = fsh.SurgeryHooks()
    hooks.add("loudest", Loudest(), params="Dense_0/bias", when=fsh.at(9))
    state = hooks.init(make_state())
    for step, loss in ((1, 2.0), (2, 5.0), (3, 7.0)):
        state = jax.jit(hooks.observe)(state.replace(step=jnp.int32(step)), loss=loss)
    assert remembered(state, "loudest", "Dense_0/bias") == 5.0


def test_loose_parts_keep_a_memory_beside_them():
    hooks, tx = averaging(fsh.at(1)), optax.adam(1e-2)
    params = make_state().params
    bound = hooks.init(fsh.bind(params=params, opt_state=tx.init(params), tx=tx))
    surgery = hooks.observe(bound.replace(params=jax.tree.map(lambda x: x + 1, params))).surgery
    bound = hooks(1, fsh.bind(params=params, opt_state=tx.init(params), tx=tx, surgery=surgery))
    np.testing.assert_allclose(kernel(bound.params), kernel(params) + (1 - DECAY), rtol=1e-5)


def test_an_nnx_optimizer_keeps_a_memory_as_its_attribute():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    hooks = fsh.SurgeryHooks()
    hooks.add("average", Average(), params="kernel", when=fsh.at(3))
    hooks.init(fsh.bind_nnx(model, optimizer))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(BATCH) - 1) ** 2))(model)
        optimizer.update(model, grads)
        hooks.observe(fsh.bind_nnx(model, optimizer))

    expected = np.asarray(model.kernel[...])
    for i in range(1, 4):
        step(model, optimizer)
        expected = DECAY * expected + (1 - DECAY) * np.asarray(model.kernel[...])
        hooks(i, fsh.bind_nnx(model, optimizer))
    np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5)
    assert optimizer.surgery["memory"]["average"]["kernel"]["count"][...] == 0


def test_a_memory_is_made_anew_where_another_hook_changes_the_shape():
    hooks = averaging()
    cut = lambda w: w[:, :4]  # noqa: E731
    hooks.add("cut", cut, params="Dense_0/kernel", when=fsh.at(0), on_reshape=lambda state, record: None)
    state = hooks.init(make_state())
    untouched = remembered(state, path="Dense_1/kernel")["average"]
    state = hooks(0, state)
    np.testing.assert_array_equal(remembered(state)["average"], state.params["Dense_0"]["kernel"])
    assert remembered(state, path="Dense_1/kernel")["average"] is untouched
