"""ClipNorm of the spectral norm against NumPy's singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import MOMENTUM, QUICK, assert_bitwise_equal, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import ClipNorm
from flax_surgery_hooks.surgeries.norms import _spectral
from flax_surgery_hooks.testing import streams

RNG = np.random.default_rng(0)
CLIP = ClipNorm(0.7, norm="spectral")
LAYERS = ClipNorm(0.7, axis=(-2, -1), norm="spectral")
estimate = jax.jit(_spectral, static_argnums=(1, 2))


def matrix(values, rows=40):
    """A matrix of these singular values, float32."""
    left, _ = np.linalg.qr(RNG.normal(size=(rows, len(values))))
    right, _ = np.linalg.qr(RNG.normal(size=(len(values), len(values))))
    return jnp.asarray(left * values @ right.T, jnp.float32)


SPECTRA = {
    "stands out": [3.0, *np.linspace(1, 0.1, 23)],
    "pair": [1.0, 0.999, *np.linspace(0.9, 0.1, 22)],
    "flat": np.ones(24),
    "linear": np.linspace(1, 0.01, 24),
    "crowded": 1 - np.linspace(0, 1, 24) ** 2,
    "rank one": [1.0] + [0.0] * 23,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_estimate_never_exceeds_the_norm_and_keeps_its_bound(name):
    true = float(np.max(SPECTRA[name]))
    for iterations in (4, 16, 64):
        found = [float(estimate(matrix(np.asarray(SPECTRA[name])), None, iterations)[0, 0]) for _ in range(3)]
        assert max(found) <= true * (1 + 1e-5)
        assert 1 - np.mean(found) / true <= 0.44 * np.log(24) / (iterations - 1) + 1e-5
    if name == "stands out":
        np.testing.assert_allclose(found, true, rtol=1e-5)


def test_the_bound_is_no_idle_one():
    """A few steps do not find the norm of a crowded spectrum: a clip by them would show."""
    assert float(estimate(matrix(np.linspace(1, 0.9, 24)), None, 1)[0, 0]) < 0.99


def test_a_matrix_comes_to_the_norm_and_one_within_it_stays(x64):
    for shape in ((1, 5), (9, 4)):
        w = jnp.asarray(RNG.normal(size=shape))
        sigma = np.linalg.norm(np.asarray(w), 2)
        after, _ = fsh.operate(make_state(0, w=w), ClipNorm(0.5 * sigma, norm="spectral", iterations=400))
        np.testing.assert_allclose(after.params["w"], 0.5 * w, rtol=1e-9)
    still, _ = fsh.operate(make_state(0, w=w), ClipNorm(1.01 * sigma, norm="spectral"))
    np.testing.assert_array_equal(still.params["w"], w)


@pytest.fixture
def x64():
    with streams.enable_x64(True):
        yield


def test_conv_kernels_are_matrices_and_layers_have_norms_of_their_own(x64):
    conv = RNG.normal(size=(3, 3, 2, 5))
    after, _ = fsh.operate(make_state(0, w=jnp.asarray(conv)), ClipNorm(0.7, norm="spectral", iterations=300))
    np.testing.assert_allclose(np.linalg.norm(np.asarray(after.params["w"]).reshape(-1, 5), 2), 0.7, rtol=1e-9)
    stack = RNG.normal(size=(3, 6, 4)) * np.array([3, 0.05, 1])[:, None, None]
    surgery = ClipNorm(0.7, axis=(-2, -1), norm="spectral", iterations=300)
    after, _ = fsh.operate(make_state(0, w=jnp.asarray(stack)), surgery)
    sizes = np.linalg.norm(stack, 2, axis=(1, 2))
    np.testing.assert_allclose(after.params["w"], stack * np.minimum(1, 0.7 / sizes)[:, None, None], rtol=1e-8)
    np.testing.assert_array_equal(after.params["w"][1], stack[1])


@pytest.mark.parametrize("seed", range(2))
def test_a_second_clip_changes_no_slot(seed):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 17, 5)), jnp.float32)
    state = make_state(0, MOMENTUM, w=w)
    once, _ = fsh.operate(state, LAYERS)
    twice, record = fsh.operate(once, LAYERS)
    assert_bitwise_equal(once, twice)
    assert float(record.figures["slots/changed"]) == 0


def test_zeros_stay_zeros():
    after, _ = fsh.operate(make_state(0, MOMENTUM, w=jnp.zeros((4, 3))), CLIP)
    assert not np.asarray(after.params["w"]).any()


def test_in_graph_it_is_the_same():
    state = make_state(1, MOMENTUM, w=jnp.asarray(RNG.normal(size=(2, 8, 4)), jnp.float32))
    hooks = make_hooks(LAYERS, params="w")
    host = make_hooks(LAYERS, params="w")(1, state)
    graph = jax.jit(hooks.in_graph)(hooks.init(state))
    assert_bitwise_equal((host.params, host.opt_state), (graph.params, graph.opt_state))


@pytest.mark.parametrize("spec", [(None, "x", "y"), ("x", None, "y"), (None, ("x", "y"), None)])
def test_sharded_it_is_the_same_and_the_leaf_is_not_gathered(spec):
    place = NamedSharding(jax.make_mesh((2, 4), ("x", "y")), PartitionSpec(*spec))
    w = jnp.asarray(RNG.normal(size=(2, 64, 16)), jnp.float32)
    state = make_state(1, w=jax.device_put(w, place))
    hooks = make_hooks(LAYERS, params="w", options=QUICK)
    after = hooks(1, state)
    np.testing.assert_allclose(after.params["w"], fsh.operate(make_state(1, w=w), LAYERS)[0].params["w"], rtol=1e-5)
    assert after.params["w"].sharding == place
    (program,) = [one for one in hooks.programs("a") if one.edit_collectives]
    assert max(one.bytes for one in program.edit_collectives) <= 4 * 2 * 64 < 4 * w.size // 8
