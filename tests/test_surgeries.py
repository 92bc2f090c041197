"""Every built-in surgery against NumPy, and what becomes of the slots."""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import MOMENTUM, assert_bitwise_equal, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import Assign, ClipNorm, Noise, Normalize, Reinit, Scale

W = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
COLUMNS = np.linalg.norm(W, axis=0, keepdims=True)
NORM = np.linalg.norm(W)
KEY = jax.random.key(11)


def own_key(path):
    return jax.random.fold_in(KEY, zlib.crc32(path.encode()))


NORMAL = np.asarray(jax.random.normal(own_key("w"), (4, 3)))


def state_with(tx=MOMENTUM, **params):
    state = make_state(0, tx, **({"w": jnp.asarray(W)} | params))
    rng = np.random.default_rng(2)
    fill = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), state.opt_state)
    return state.replace(opt_state=fill)


KEEPS_HISTORY = {
    "scale": (Scale(-0.25), W * -0.25),
    "normalize": (Normalize(), W / NORM),
    "normalize_to": (Normalize(to=3), 3 * W / NORM),
    "normalize_units": (Normalize(axis=0), W / COLUMNS),
    "normalize_last": (Normalize(axis=-1), W / np.linalg.norm(W, axis=1, keepdims=True)),
    "normalize_both": (Normalize(axis=(0, 1), to=2.0), 2 * W / NORM),
    "clip": (ClipNorm(1.5), W * 1.5 / NORM),
    "clip_nothing": (ClipNorm(1e3), W),
    "clip_units": (ClipNorm(1.5, axis=0), W * np.minimum(1, 1.5 / COLUMNS)),
    "noise": (Noise(0.1), W + 0.1 * np.sqrt(np.mean(W**2)) * NORMAL),
    "noise_absolute": (Noise(2, relative=False), W + 2 * NORMAL),
    "no_noise": (Noise(0.0), W),
}
FRESH = {
    "assign": (Assign(3), np.full_like(W, 3)),
    "assign_row": (Assign(np.arange(3.0)), np.broadcast_to(np.arange(3.0), (4, 3))),
    "assign_by_path": (Assign({"w": W.T.reshape(4, 3), "other": 0}), W.T.reshape(4, 3)),
    "reinit": (Reinit(initializer=jax.nn.initializers.lecun_normal()),
               jax.nn.initializers.lecun_normal()(own_key("w"), (4, 3))),
    "reinit_zeros": (Reinit(initializer=jax.nn.initializers.zeros), np.zeros_like(W)),
    "reinit_all": (Reinit(init=lambda key: {"w": jax.random.uniform(key, (4, 3))}), jax.random.uniform(KEY, (4, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", [*KEEPS_HISTORY, *FRESH])
def test_values_are_those_of_numpy_and_slots_stay_or_start_anew(name):
    surgery, expected = (KEEPS_HISTORY | FRESH)[name]
    state = state_with()
    after, record = fsh.operate(state, surgery, params="w", key=KEY)
    np.testing.assert_allclose(after.params["w"], expected, rtol=1e-6)
    trace = np.asarray(state.opt_state[0].trace["w"])
    np.testing.assert_array_equal(after.opt_state[0].trace["w"], trace if name in KEEPS_HISTORY else np.zeros_like(W))
    assert float(record.figures["params/fresh"]) == (0 if name in KEEPS_HISTORY else W.size)
    assert (record.rule, record.in_place) == ("carry", ())


@pytest.mark.parametrize("surgery", [Normalize(), Normalize(axis=0), ClipNorm(1.0), ClipNorm(1.0, axis=1)])
def test_zeros_stay_zeros(surgery):
    after, _ = fsh.operate(state_with(w=jnp.zeros((4, 3))), surgery, params="w", opt_state="keep")
    assert not after.params["w"].any()
    half = jnp.asarray(W).at[:, 1].set(0).at[2].set(0)
    assert jnp.isfinite(fsh.operate(state_with(w=half), surgery, params="w")[0].params["w"]).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_a_second_clip_changes_nothing_at_all(axis, seed):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(17, 5)), jnp.float32)
    state = state_with(optax.adam(0.1), w=w)
    clip = ClipNorm(0.7, axis=axis)
    once, _ = fsh.operate(state, clip)
    norms = np.linalg.norm(np.asarray(once.params["w"]), axis=axis)
    assert norms.max() <= 0.7 * (1 + 1e-5)
    twice, record = fsh.operate(once, clip)
    assert_bitwise_equal(once, twice)
    assert float(record.figures["params/changed"]) == float(record.figures["slots/changed"]) == 0


@pytest.mark.parametrize("operator", [jnp.clip, lambda w, low, high: jnp.maximum(jnp.minimum(w, high), low)])
@pytest.mark.parametrize("rule", ["carry", "transport"])
def test_ties_of_a_second_clip_of_values_change_no_slot(operator, rule):
    def clip(w):
        return operator(w, -0.5, 0.5)

    state = state_with(optax.adam(0.1))
    once, _ = fsh.operate(state, clip, opt_state=rule)
    assert (np.abs(once.params["w"]) == 0.5).sum() == (np.abs(W) > 0.5).sum() > 3
    twice, record = fsh.operate(once, clip, opt_state=rule)
    assert_bitwise_equal(once, twice)
    assert float(record.figures["slots/changed"]) == 0


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(3)(x)))


def init(key):
    return Net().init(key, jnp.ones((1, 4)))["params"]


def test_reinit_draws_what_the_model_draws_under_the_documented_key():
    shapes = jax.eval_shape(init, KEY)
    state = make_state(0, **jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes))
    hooks = make_hooks(Reinit(init), params="Dense_1/*", name="reborn", seed=5, options={})
    after = hooks(3, state.replace(step=3))
    key = jax.random.key(5, impl="threefry2x32")
    for number in (zlib.crc32(b"reborn"), 3):
        key = jax.random.fold_in(key, number)
    expected = init(key)
    np.testing.assert_array_equal(after.params["Dense_1"]["kernel"], expected["Dense_1"]["kernel"])
    assert after.params["Dense_0"]["kernel"] is state.params["Dense_0"]["kernel"]
    by_hand, _ = fsh.operate(state, Reinit(init), params="Dense_1/*", key=key)
    np.testing.assert_array_equal(by_hand.params["Dense_1"]["kernel"], expected["Dense_1"]["kernel"])


def test_reinit_by_an_initializer_gives_each_leaf_its_own_draw():
    state = make_state(0, x=jnp.zeros((2, 3)), y=jnp.zeros((2, 3)))
    after, _ = fsh.operate(state, Reinit(initializer=jax.nn.initializers.normal(1.0)), key=KEY)
    for path in "xy":
        np.testing.assert_array_equal(after.params[path], jax.nn.initializers.normal(1.0)(own_key(path), (2, 3)))


def test_assign_of_several_leaves():
    state = make_state(0, x=jnp.zeros(2), y=jnp.zeros((2, 2)))
    after, _ = fsh.operate(state, Assign({"x": 1, "y": np.eye(2)}))
    assert (after.params["x"].tolist(), after.params["y"].tolist()) == ([1, 1], [[1, 0], [0, 1]])


def test_assign_puts_in_the_array_it_was_given():
    """Not one that it was given before, though compiled programs are kept and arrays compare elementwise."""
    state, buffer = make_state(), np.zeros(2, np.float32)
    for value in (0.0, 1.0):
        buffer[:] = value
        assert fsh.operate(state, Assign(buffer))[0].params["w"].tolist() == [value] * 2
        assert fsh.operate(state, Assign(np.full(2, value)))[0].params["w"].tolist() == [value] * 2
