"""Freezing and thawing leaves in the middle of a run of AdamW: what stays, what goes on, and that nothing retraces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import MOMENTUM, assert_bitwise_equal, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import Freeze, Thaw

TX = fsh.optax.freezable(optax.adamw(0.05, weight_decay=0.1))
FREEZE_AT, THAW_AT, STEPS = 5, 25, 30


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["in"]["kernel"] + params["in"]["bias"][None])
    return jnp.mean((hidden @ params["out"]["kernel"] - jnp.sin(batch[:, :1])) ** 2)


def make(tx=TX):
    keys = jax.random.split(jax.random.key(0))
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (3, 4)), "bias": jnp.full(4, -0.0, jnp.float32)},
        "out": {"kernel": jax.random.normal(keys[1], (4, 1))},
    }
    return fsh.TrainState.create(apply_fn=None, params=params, tx=tx)


def history(first_moments="keep", freeze=True):
    """A copy of the state after each step and its hooks, and how often the step was traced."""
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        traces.append(1)
        return state.apply_gradients(grads=jax.grad(loss)(state.params, batch))

    hooks = fsh.SurgeryHooks()
    if freeze:
        hooks.add("freeze", Freeze(), params="in/**", when=fsh.at(FREEZE_AT))
        hooks.add("thaw", Thaw(first_moments), params="in/**", when=fsh.at(THAW_AT))
    state, states = make(), []
    for step in range(1, STEPS + 1):
        batch = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (8, 3))
        state = hooks(step, train_step(state, batch))
        states.append(jax.device_get(state))
    return states, len(traces)


@functools.cache
def thawed(first_moments):
    return history(first_moments)


def adam(state):
    return state.opt_state.inner_state[0]


def test_frozen_leaves_and_their_slots_stay_bit_for_bit_and_the_others_move():
    states, traces = thawed("keep")
    assert traces == 1
    frozen = states[FREEZE_AT - 1]
    for before, state in zip(states[FREEZE_AT - 1 : THAW_AT], states[FREEZE_AT:THAW_AT], strict=False):
        for tree in (lambda s: s.params, lambda s: adam(s).mu, lambda s: adam(s).nu):
            assert_bitwise_equal(tree(state)["in"], tree(frozen)["in"])
            assert (tree(state)["out"]["kernel"] != tree(before)["out"]["kernel"]).all()
        assert adam(state).count == adam(before).count + 1
    assert (adam(frozen).mu["in"]["kernel"] != 0).all()


def test_up_to_the_freeze_the_run_is_that_without_it():
    alone, _ = history(freeze=False)
    assert_bitwise_equal(thawed("keep")[0][FREEZE_AT - 2], alone[FREEZE_AT - 2])


def test_thawed_leaves_go_on_with_the_slots_they_had():
    states, _ = thawed("keep")
    held, after = states[THAW_AT - 1], states[THAW_AT]
    batch = jax.random.normal(jax.random.fold_in(jax.random.key(1), THAW_AT + 1), (8, 3))
    grads = jax.grad(loss)(held.params, batch)
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, adam(held).mu, grads)
    np.testing.assert_allclose(adam(after).mu["in"]["kernel"], mu["in"]["kernel"], rtol=1e-4)
    assert (after.params["in"]["kernel"] != held.params["in"]["kernel"]).all()
    assert not any(np.asarray(flag).any() for flag in jax.tree.leaves(held.opt_state.frozen))


def test_reset_zeroes_the_first_moments_of_thawed_leaves_alone():
    kept, reset = thawed("keep")[0][THAW_AT - 1], thawed("reset")[0][THAW_AT - 1]
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(adam(reset).mu["in"]))
    assert_bitwise_equal(adam(reset).mu["out"], adam(kept).mu["out"])
    assert_bitwise_equal(adam(reset).nu, adam(kept).nu)
    assert_bitwise_equal(reset.params, kept.params)
    assert thawed("reset")[1] == 1


def test_slots_of_order_zero_are_first_moments_too():
    tx = fsh.optax.freezable(optax.chain(optax.scale_by_rms(), optax.trace(0.9)))
    state = make_state(0, tx, w=jnp.ones(3), v=jnp.ones(2)).apply_gradients(grads={"w": jnp.ones(3), "v": jnp.ones(2)})
    new, _ = fsh.operate(state, Thaw("reset"), params="w")
    rms, trace = new.opt_state.inner_state
    assert trace.trace["w"].tolist() == [0, 0, 0]
    assert trace.trace["v"] is state.opt_state.inner_state[1].trace["v"]
    assert rms.nu["w"] is state.opt_state.inner_state[0].nu["w"]


def test_in_a_vector_of_all_slots_only_those_of_the_leaf_are_reset():
    state = make_state(0, fsh.optax.freezable(optax.flatten(MOMENTUM)), w=jnp.ones(3), v=jnp.ones(2))
    state = state.apply_gradients(grads={"w": jnp.full(3, 2.0), "v": jnp.ones(2)})
    assert state.opt_state.inner_state[0].trace.tolist() == [1, 1, 2, 2, 2]
    new, _ = fsh.operate(state, Thaw("reset"), params="v")
    assert new.opt_state.inner_state[0].trace.tolist() == [0, 0, 2, 2, 2]


def test_all_leaves_of_one_fire_and_a_second_freeze_adds_to_the_first():
    state, _ = fsh.operate(make(), Freeze(), params="in/kernel")
    state, _ = fsh.operate(state, Freeze(), params="out/**")
    assert jax.tree.map(bool, state.opt_state.frozen) == {
        "in": {"kernel": True, "bias": False},
        "out": {"kernel": True},
    }
    state, _ = fsh.operate(state, Thaw())
    assert not any(map(bool, jax.tree.leaves(state.opt_state.frozen)))


def test_errors():
    with pytest.raises(e.SurgeryFunctionError, match=r"unknown\. Found: 'zero'\. Write instead: \"keep\" or \"reset\""):
        Thaw("zero")
    with pytest.raises(e.StateError, match="Thaw writes into a FreezableState, and the optimizer state has none"):
        fsh.operate(make(MOMENTUM), Thaw())

    def shifted(params):
        return optax.TraceState(jax.tree.map(lambda p: jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), params))

    odd = fsh.optax.freezable(optax.trace(0.9)._replace(init=shifted))
    with pytest.raises(e.SlotError, match=r"fills TraceState.trace with no constant.*first_moments=\"keep\"") as caught:
        fsh.operate(make_state(0, odd, w=jnp.ones(3)), Thaw("reset"))
    assert caught.value.path == "w"
