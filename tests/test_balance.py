"""Balance: norms of both sides equal, outputs the same, moments those of a run of the balanced model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from raised import Case
from tiny import MOMENTUM, assert_bitwise_equal, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import Balance
from flax_surgery_hooks.testing import streams

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(7, 4)), RNG.normal(size=(7, 3))
ADAM = optax.adam(0.1, eps=0, eps_root=0)


def mlp(units=5):
    return {
        "a": {"kernel": 3 * RNG.normal(size=(4, units)), "bias": 0.5 * RNG.normal(size=units)},
        "b": {"kernel": RNG.normal(size=(units, 3)), "bias": RNG.normal(size=3)},
    }


def forward(params, x=X, activation=jax.nn.relu):
    hidden = activation(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"][None]


def gradient(params, t):
    return jax.grad(lambda p: jnp.mean((forward(p, X * (1 + 0.1 * t)) - Y) ** 2))(params)


@pytest.fixture
def x64():
    with streams.enable_x64(True):
        yield


def balanced(params):
    """Written out: the new parameters, and the factors."""
    c = np.sqrt(np.linalg.norm(params["b"]["kernel"], axis=1) / np.linalg.norm(params["a"]["kernel"], axis=0))
    a, b = params["a"], params["b"]
    new = {"a": {"kernel": a["kernel"] * c, "bias": a["bias"] * c}, "b": {**b, "kernel": b["kernel"] / c[:, None]}}
    return new, c


def test_moments_are_those_of_a_run_on_gradients_of_the_balanced_model(x64):
    """The parameters are balanced by hand at each step, and the gradients taken there: no factor is told."""
    state = make_state(0, ADAM, **jax.tree.map(jnp.asarray, mlp()))
    seen = []
    for t in range(4):
        seen.append(state.params)
        state = state.apply_gradients(grads=gradient(state.params, t))
    after, record = fsh.operate(state, Balance("a", "b"), params=["a/*", "b/kernel"])
    expected, c = balanced(jax.tree.map(np.asarray, state.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), after.params, expected)
    np.testing.assert_allclose(forward(after.params), forward(state.params), rtol=1e-12)
    by_gelu = [np.asarray(forward(one.params, activation=jax.nn.gelu)) for one in (after, state)]
    assert np.abs(by_gelu[0] - by_gelu[1]).max() > 1e-2

    def mapped(params):
        return {"a": {"kernel": params["a"]["kernel"] * c[None], "bias": params["a"]["bias"] * c},
                "b": {**params["b"], "kernel": params["b"]["kernel"] / c[:, None]}}  # fmt: skip

    rebuilt = ADAM.init(mapped(seen[0]))
    for t, params in enumerate(seen):
        _, rebuilt = ADAM.update(gradient(mapped(params), t), rebuilt, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14), after.opt_state, rebuilt)
    carried, _ = fsh.operate(state, Balance("a", "b"), params=["a/*", "b/kernel"], opt_state="carry")
    moments = [np.asarray(one.opt_state[0][-1]["a"]["kernel"]) for one in (carried, after)]
    assert np.abs(moments[0] / moments[1] - 1).max() > 0.1
    assert record.rule == "transport"


def test_a_second_time_changes_nothing_at_all():
    state = make_state(0, MOMENTUM, **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), mlp(40)))
    state = state.apply_gradients(grads=gradient(state.params, 0))
    once, _ = fsh.operate(state, Balance("a", "b"), params=["a/*", "b/kernel"])
    twice, record = fsh.operate(once, Balance("a", "b"), params=["a/*", "b/kernel"])
    assert_bitwise_equal(once, twice)
    assert float(record.figures["params/changed"]) == 0


@pytest.mark.parametrize("zeroed", [("a", (slice(None), 2)), ("b", (2, slice(None)))], ids=["incoming", "outgoing"])
def test_a_unit_of_zero_norm_stays_as_it_is(zeroed):
    name, where = zeroed
    params = mlp()
    params[name]["kernel"][where] = 0
    state = make_state(0, MOMENTUM, **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    after, _ = fsh.operate(state, Balance("a", "b"), params=["a/*", "b/kernel"])
    same = [np.asarray(one) for one in (after.params["a"]["kernel"][:, 2], after.params["b"]["kernel"][2])]
    np.testing.assert_array_equal(same[0], state.params["a"]["kernel"][:, 2])
    np.testing.assert_array_equal(same[1], state.params["b"]["kernel"][2])
    assert after.params["a"]["bias"][2] == state.params["a"]["bias"][2]
    assert (after.params["a"]["bias"] != state.params["a"]["bias"]).sum() == 4


def test_powers_of_two_leave_outputs_bitwise_as_they_were():
    state = make_state(0, MOMENTUM, **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), mlp(40)))
    surgery = Balance("a", "b", powers_of_two=True)
    after, _ = fsh.operate(state, surgery, params=["a/*", "b/kernel"])
    x = X.astype(np.float32)
    np.testing.assert_array_equal(forward(after.params, x), forward(state.params, x))
    ratio = np.linalg.norm(after.params["a"]["kernel"], axis=0) / np.linalg.norm(after.params["b"]["kernel"], axis=1)
    assert 0.5 <= ratio.min() < 0.9
    assert 1.1 < ratio.max() <= 2.0
    assert_bitwise_equal(after, fsh.operate(after, surgery, params=["a/*", "b/kernel"])[0])


class Convs(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(2, (3, 3), name="b")(nn.max_pool(nn.leaky_relu(nn.Conv(6, (3, 3), name="a")(x)), (2, 2)))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.silu(nn.Dense(6, name="gate")(x)) * nn.Dense(6, name="up")(x))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=3, name="attn")(x)


MODELS = {
    "convs": (Convs(), (2, 8, 8, 3), Balance("a", "b"), ["a/*", "b/kernel"]),
    "gated": (Gated(), (2, 4), Balance("up", "down"), ["up/*", "down/kernel"]),
    "attention": (Attention(), (2, 5, 4), Balance("value", "out", (-2, -1), (-3, -2)),
                  ["**/value/*", "**/out/kernel"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(x64, name):
    model, shape, surgery, where = MODELS[name]
    x = RNG.normal(size=shape)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape)), model.init(jax.random.key(0), x)["params"]
    )
    after, record = fsh.operate(make_state(0, **params), surgery, params=where)
    before, now = (jax.jit(model.apply)({"params": each}, x) for each in (params, after.params))
    np.testing.assert_allclose(now, before, rtol=1e-9, atol=1e-12)
    assert float(record.figures["params/changed"]) > 0


STACK = {"blocks": {"up": {"kernel": RNG.normal(size=(3, 4, 8)), "bias": RNG.normal(size=(3, 8))},
                    "down": {"kernel": RNG.normal(size=(3, 8, 4))}}}  # fmt: skip
SCANNED = Balance("up", "down", (0, -1), (0, -2))


def stack():
    return make_state(1, MOMENTUM, **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), STACK))


def test_scanned_layers_have_units_of_their_own():
    after, _ = fsh.operate(stack(), SCANNED)
    for i in range(3):
        one = jax.tree.map(lambda leaf: leaf[i], STACK["blocks"])  # noqa: B023
        expected = balanced({"a": one["up"], "b": one["down"]})[0]
        for new, old in (("up", "a"), ("down", "b")):
            got = jax.tree.map(lambda leaf: leaf[i], after.params["blocks"][new])  # noqa: B023
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, expected[old])
    one_layer, _ = fsh.operate(stack(), Balance("up", "down"), params="blocks/*/*[1]")
    new, old = (one.params["blocks"]["up"]["kernel"] for one in (one_layer, stack()))
    np.testing.assert_array_equal(new[jnp.array([0, 2])], old[jnp.array([0, 2])])
    np.testing.assert_allclose(new[1], after.params["blocks"]["up"]["kernel"][1], rtol=1e-6)


def test_in_graph_and_on_eight_devices_it_is_the_same():
    hooks = make_hooks(SCANNED, params="**", options={})
    host = make_hooks(SCANNED, params="**", options={})(1, stack())
    graph = jax.jit(hooks.in_graph)(hooks.init(stack()))
    assert_bitwise_equal((host.params, host.opt_state), (graph.params, graph.opt_state))
    mesh = jax.make_mesh((2, 4), ("x", "units"))
    places = {(3, 4, 8): PartitionSpec(None, "x", "units"), (3, 8, 4): PartitionSpec(None, "units", "x")}
    spread = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, places.get(jnp.shape(leaf), PartitionSpec()))), stack()
    )
    after = fsh.operate(spread, SCANNED)[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), after.params, host.params)
    assert after.params["blocks"]["up"]["kernel"].sharding.spec == places[3, 4, 8]


def on(surgery, where=("a/*", "b/kernel"), **params):
    state = make_state(0, **(mlp_f32() | params))
    return lambda: fsh.operate(state, surgery, params=list(where))


def mlp_f32():
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), mlp())


FUNCTION = e.SurgeryFunctionError
CASES = {
    "itself": Case(lambda: Balance("a", "a"), FUNCTION, ("between two modules", "'a' and 'a'")),
    "no_kernel": Case(on(Balance("a", "b"), ["a/bias", "b/kernel"]), FUNCTION, ("needs the kernel of 'a'", "a/bias")),
    "units": Case(on(Balance("a", "b", outgoing_axes=-1)), FUNCTION, ("not the same units", "[5] of a/kernel, [3]")),
    "axes": Case(on(Balance("a", "b", incoming_axes=2)), FUNCTION, ("different axes of the kernel", "(2,) for shape"),
                 {"path": "a/kernel"}),
    "axes_twice": Case(on(Balance("a", "b", (-1, 1))), FUNCTION, ("different axes", "(-1, 1)"), {"path": "a/kernel"}),
    "no_bias": Case(on(Balance("a", "b"), a={"kernel": jnp.ones((4, 5)), "gain": jnp.ones(4)}), FUNCTION,
                    ("no bias of its units", "[4] for units [5]"), {"path": "a/gain"}),
    "one": Case(on(Balance("a", "b"), ["a/*"]), FUNCTION, ("no 'b' to go with",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    CASES[name].check()
