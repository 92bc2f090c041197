"""Vocabularies and heads of another size: what models predict, moments, meshes, mistakes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from raised import Case
from resumed import mesh_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import InputError, SurgeryFunctionError
from flax_surgery_hooks.surgeries import GrowVocab, ReplaceHead

TOKENS, WIDTH = 11, 6
AXES = {"embed/embedding": 0, "head/kernel": 1, "head/bias": 0}


class Model(nn.Module):
    """Predicts the next token from the last one alone."""

    tokens: int = TOKENS
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.tokens, WIDTH, name="embed")
        x = nn.tanh(nn.Dense(WIDTH, name="body")(embed(tokens)))
        return embed.attend(x) if self.tied else nn.Dense(self.tokens, name="head")(x)


def make_state(tied: bool = False, tx: Any = None) -> fsh.TrainState:
    model = Model(tied=tied)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: 3 * leaf + 0.1, params)
    state = fsh.TrainState.create(apply_fn=model.apply, params=params, tx=tx or optax.adam(0.01))
    for seed in range(3):
        tokens = jax.random.randint(jax.random.key(seed), (16,), 0, TOKENS)
        loss = lambda params, tokens=tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)  # noqa: E731
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    return state


def predicted(state: fsh.TrainState, tokens: int, tied: bool) -> np.ndarray:
    """Of each old token, the logarithms of the probabilities of each next one, float64."""
    logits = np.float64(Model(tokens, tied).apply({"params": state.params}, jnp.arange(TOKENS)))
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(state: fsh.TrainState, after: fsh.TrainState, tokens: int, tied: bool) -> float:
    old, new = predicted(state, TOKENS, tied), predicted(after, tokens, tied)[:, :TOKENS]
    return float((np.exp(old) * (old - new)).sum(-1).max())


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_take_little_of_what_is_predicted(tied):
    axes = {"embed/embedding": 0} if tied else AXES
    state = make_state(tied)
    after, _ = fsh.operate(state, GrowVocab(axes, to=13, multiple=8))
    wide = Model(16, tied).apply({"params": after.params}, jnp.arange(TOKENS))
    narrow = Model(TOKENS, tied).apply({"params": state.params}, jnp.arange(TOKENS))
    np.testing.assert_allclose(wide[:, :TOKENS], narrow, rtol=1e-5, atol=1e-6)
    assert 0 < divergence(state, after, 16, tied) <= np.log(1 + 5 / TOKENS) + 1e-6
    # Rows of noise, as large as trained ones may be, are beyond it.
    path = "embed/embedding" if tied else "head/kernel"
    name, leaf = path.split("/")
    shape = [-1 if axis == axes[path] else 1 for axis in (0, 1)]
    rows = jnp.where(np.arange(16).reshape(shape) < TOKENS, after.params[name][leaf], 25.0)
    wild = {**after.params, name: {**after.params[name], leaf: rows}}
    assert divergence(state, after.replace(params=wild), 16, tied) > np.log(1 + 5 / TOKENS)


@pytest.mark.parametrize("fresh", ["mean", "init"])
def test_old_rows_keep_values_and_moments_and_new_ones_are_the_mean(fresh):
    state = make_state()
    after, record = fsh.operate(state, GrowVocab(AXES, to=13), params=["embed/*", "head/*"], fresh=fresh)
    for path, axis in AXES.items():
        one, two = path.split("/")
        for slot in ("params", "mu", "nu"):
            old, new = (
                np.asarray((held.params if slot == "params" else getattr(held.opt_state[0], slot))[one][two])
                for held in (state, after)
            )
            np.testing.assert_array_equal(np.take(new, range(TOKENS), axis=axis), old)
            rows = np.take(new, [11, 12], axis=axis)
            if slot == "params":
                np.testing.assert_allclose(rows, np.broadcast_to(old.mean(axis, keepdims=True), rows.shape), rtol=1e-5)
            elif slot == "mu" or fresh == "init":
                assert not rows.any()
            else:
                assert (rows > 0).all()
    for one in ("kernel", "bias"):
        assert after.params["body"][one] is state.params["body"][one]
        assert after.opt_state[0].mu["body"][one] is state.opt_state[0].mu["body"][one]
    assert int(after.opt_state[0].count) == int(state.opt_state[0].count)
    assert record.surgery.startswith('{"name": "GrowVocab"')


def test_it_shrinks_too_and_back_is_what_there_was():
    state = make_state()
    grown, _ = fsh.operate(state, GrowVocab(AXES, to=16))
    back, _ = fsh.operate(grown, GrowVocab(AXES, to=TOKENS))
    pairs = zip(*(jax.tree.leaves((one.params, one.opt_state)) for one in (back, state)), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    small, _ = fsh.operate(state, GrowVocab(AXES, to=7))
    np.testing.assert_array_equal(small.params["head"]["kernel"], state.params["head"]["kernel"][:, :7])


def test_noise_tells_new_tokens_apart():
    state = make_state()
    after, _ = fsh.operate(state, GrowVocab(AXES, to=13, noise=0.1), key=jax.random.key(0))
    old, new = (np.asarray(one.params["embed"]["embedding"]) for one in (state, after))
    spread = 0.1 * old.std(0)
    apart = np.abs(new[11:] - old.mean(0))
    assert (apart > 0).all()
    assert (apart < 5 * spread).all()
    assert (new[11] != new[12]).all()


def test_a_run_grows_its_vocabulary_with_an_average():
    state = make_state()
    hooks = fsh.SurgeryHooks()
    hooks.add("ema", fsh.surgeries.Ema(0.5), params="**", when=fsh.at(1_000_000))
    hooks.add("more", GrowVocab(AXES, to=16), params="**", when=fsh.at(2), apply_fn=Model(16).apply)
    state = hooks.init(state.replace(step=jnp.int32(0)))

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean(state.apply_fn({"params": params}, jnp.arange(TOKENS)) ** 2)  # noqa: E731
        return hooks.observe(state.apply_gradients(grads=jax.grad(loss)(state.params)))

    for at in range(1, 4):
        state = hooks(at, step(state))
    assert state.apply_fn({"params": state.params}, jnp.arange(16)).shape == (16, 16)
    assert fsh.average_of(state, "ema")["head"]["kernel"].shape == (WIDTH, 16)


@pytest.mark.parametrize("placed", ["auto", "explicit"])
def test_a_multiple_keeps_the_vocabulary_on_the_mesh(placed):
    mesh = mesh_of(placed)
    params = {"embedding": jnp.arange(16.0).reshape(8, 2)}
    alone = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, rows) if jnp.ndim(leaf) == 2 else leaf, alone)
    surgery = GrowVocab({"embedding": 0}, to=9, multiple=4)
    after, expected = (fsh.operate(one, surgery)[0] for one in (state, alone))
    assert after.params["embedding"].shape == (12, 2)
    for leaf, other in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6)
        assert jnp.ndim(leaf) != 2 or leaf.sharding.is_equivalent_to(rows, 2)


def test_a_head_for_other_classes_is_fresh_and_the_body_goes_on():
    state = make_state()
    new = Model(5)
    init = lambda key: new.init(key, jnp.zeros((1, 1), jnp.int32))["params"]  # noqa: E731
    hooks = fsh.SurgeryHooks(seed=2)
    hooks.add("head", ReplaceHead(init), params="head/*", when=fsh.at(3), apply_fn=new.apply)
    after = hooks(3, state)
    assert (after.params["head"]["kernel"].shape, after.params["head"]["bias"].shape) == ((WIDTH, 5), (5,))
    mu, nu = after.opt_state[0].mu["head"]["kernel"], after.opt_state[0].nu["head"]["kernel"]
    assert not np.any(mu)
    np.testing.assert_allclose(nu, np.mean(state.opt_state[0].nu["head"]["kernel"]), rtol=1e-5)
    assert after.params["body"]["kernel"] is state.params["body"]["kernel"]
    grads = jax.grad(lambda params: jnp.mean(after.apply_fn({"params": params}, jnp.arange(5)) ** 2))(
        {**after.params, "embed": {"embedding": after.params["embed"]["embedding"][:5]}}
    )
    assert np.any(grads["head"]["kernel"])


STATE = make_state()
KEY = jax.random.key(0)
HEAD = ReplaceHead(lambda key: {"params": STATE.params})
MISTAKES = {
    "axes": (lambda: GrowVocab({}, 12), ("GrowVocab(axes=...) maps paths", "{}", "head/kernel")),
    "to": (lambda: GrowVocab(AXES, 0), ("GrowVocab(to=...) is a whole number", "0", "to=128")),
    "multiple": (lambda: GrowVocab(AXES, 12, multiple=1.5), ("GrowVocab(multiple=...)", "1.5")),
    "noise": (lambda: GrowVocab(AXES, 12, noise=-1), ("GrowVocab(noise=...)", "-1")),
    "another leaf": (
        lambda: fsh.operate(STATE, GrowVocab({"embed/embeding": 0}, 12)),
        ("names a leaf that is not there", "embed/embedding"),
        {"path": "embed/embeding"},
    ),
    "another axis": (
        lambda: fsh.operate(STATE, GrowVocab({"head/bias": 1}, 12)),
        ("names an axis that the leaf has not", "axis 1 of shape [11]", "axis 0"),
        {"path": "head/bias"},
    ),
    "other lengths": (
        lambda: fsh.operate(STATE, GrowVocab({"head/kernel": 0, "head/bias": 0}, 12)),
        ("different numbers of tokens", "6 in head/kernel, 11 in head/bias"),
    ),
    "no init": (lambda: ReplaceHead(3), ("ReplaceHead(init=...) is a function", "3", "new.init")),
    "no such head": (
        lambda: fsh.operate(STATE, HEAD, params="head/*", key=KEY),
        ("returned no such parameter", "params/head/bias", '["params"]'),
        {"path": "head/bias"},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    run, *rest = MISTAKES[name]
    Case(run, SurgeryFunctionError, *rest).check()


def test_noise_needs_a_key():
    run = lambda: fsh.operate(STATE, GrowVocab(AXES, 12, noise=0.1))  # noqa: E731
    Case(run, InputError, ("GrowVocab draws random numbers", "key=")).check()


def test_configs_name_them():
    config = ml_collections.ConfigDict()
    config.more = fsh.config.hook("grow_vocab", params="**", to=50_304, multiple=128, at=(100,))
    config.head = fsh.config.hook("replace_head", params="head/*", at=(1,))
    hooks = fsh.SurgeryHooks.from_config(config, objects={"axes": AXES, "init": lambda key: {}})
    assert hooks.hparams()["surgery/more/surgery.multiple"] == 128
