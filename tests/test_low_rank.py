"""MergeLora and ReLoRA: the model computes the same, and slots are those of a run on gradients of the merged model."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from raised import Case
from tiny import MOMENTUM, assert_bitwise_equal, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import MergeLora, ReLoRA, Rewarm
from flax_surgery_hooks.testing import streams

RNG = np.random.default_rng(0)
S = 0.5
X, Y = RNG.normal(size=(16, 6)), RNG.normal(size=(16, 5))
KEY = jax.random.key(3)


def adapted(layers=(), rank=2):
    return {
        "kernel": RNG.normal(size=(*layers, 6, 5)),
        "lora_a": RNG.normal(size=(*layers, 6, rank)),
        "lora_b": RNG.normal(size=(*layers, rank, 5)),
    }


def forward(d, x=X):
    return x @ d["kernel"] + S * (x @ d["lora_a"]) @ d["lora_b"]


def gradient(params, t):
    return jax.grad(lambda p: jnp.mean((forward(p["d"], X * (1 + 0.1 * t)) - Y) ** 2))(params)


@pytest.fixture
def x64():
    with streams.enable_x64(True):
        yield


@functools.cache
def trained(tx):
    """A state after some steps, and the parameters at each."""
    with streams.enable_x64(True):
        state, seen = make_state(0, tx, d=jax.tree.map(jnp.asarray, adapted())), []
        for t in range(4):
            seen.append(state.params)
            state = state.apply_gradients(grads=gradient(state.params, t))
        return state, seen


def merged(d):
    return {"kernel": d["kernel"] + S * d["lora_a"] @ d["lora_b"], "lora_a": d["lora_a"], "lora_b": 0 * d["lora_b"]}


ADAM = optax.adam(0.1, eps=0, eps_root=0)


def test_slots_are_those_of_a_run_on_gradients_of_the_merged_model(x64):
    """The oracle merges by hand at each step, and takes the gradients there: of A they are zero."""
    state, seen = trained(ADAM)
    after, record = fsh.operate(state, MergeLora(S), fresh="init")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-14), after.params, {"d": merged(state.params["d"])}
    )
    np.testing.assert_allclose(forward(after.params["d"]), forward(state.params["d"]), rtol=1e-10)
    np.testing.assert_array_equal(after.params["d"]["lora_b"], 0)
    rebuilt = ADAM.init(seen[0])
    for t, params in enumerate(seen):
        at_merged = {"d": merged(params["d"])}
        _, rebuilt = ADAM.update(gradient(at_merged, t), rebuilt, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-13), after.opt_state, rebuilt)
    moments = after.opt_state[0][-1]["d"]
    np.testing.assert_array_equal(moments["lora_a"], 0)
    for name in ("kernel", "lora_b"):
        np.testing.assert_array_equal(moments[name], state.opt_state[0][-1]["d"][name])
    assert np.abs(state.opt_state[0][-1]["d"]["lora_a"]).max() > 0  # keep, in its place, would be wrong
    assert record.rule == "transport"


def test_second_moments_of_a_start_from_the_mean_before(x64):
    state, _ = trained(ADAM)
    after, _ = fsh.operate(state, MergeLora(S))
    nu, old = (one.opt_state[0].nu["d"]["lora_a"] for one in (after, state))
    np.testing.assert_allclose(nu, old.mean(), rtol=1e-6)


def test_without_the_scale_the_output_would_change(x64):
    state, _ = trained(ADAM)
    wrong, _ = fsh.operate(state, MergeLora(1.0))
    assert np.abs(forward(wrong.params["d"]) - forward(state.params["d"])).max() > 0.1


@pytest.mark.parametrize("names", [("kernel", "lora_a", "lora_b"), ("base_module/kernel", "lora_a", "lora_b"),
                                   ("kernel", "lora/lora_a", "lora/lora_b")])  # fmt: skip
@pytest.mark.parametrize("layers", [(), (3,)])
def test_layouts_of_flax_and_scanned_layers(names, layers):
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapted(layers))
    tree = {}
    for name, leaf in zip(names, d.values(), strict=True):
        *parents, last = name.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[last] = leaf
    after, _ = fsh.operate(make_state(0, net=tree), MergeLora(S, *names))
    new = dict(zip(*fsh.paths.flatten(after.params)[::2], strict=True))
    expected = d["kernel"] + S * np.einsum("...ir,...ro->...io", d["lora_a"], d["lora_b"])
    np.testing.assert_allclose(new[f"net/{names[0]}"], expected, rtol=1e-5, atol=1e-6)


def test_kernels_with_an_axis_for_heads():
    a, b = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((6, 2), (2, 4, 3)))
    after, _ = fsh.operate(make_state(0, kernel=jnp.ones((6, 4, 3)), lora_a=a, lora_b=b), MergeLora())
    np.testing.assert_allclose(after.params["kernel"], 1 + np.einsum("ir,rhf->ihf", a, b), rtol=1e-5)


def test_the_adapter_of_nnx():
    net = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    params["lora"]["lora_b"] = jnp.asarray(RNG.normal(size=(2, 5)), jnp.float32)
    nnx.update(net, params)
    surgery = MergeLora(a="lora/lora_a", b="lora/lora_b")
    after, _ = fsh.operate(make_state(0, **params), surgery, params=["kernel", "lora/*"])
    x = X.astype(np.float32)
    before = net(x)
    nnx.update(net, after.params)
    np.testing.assert_allclose(net(x), before, rtol=1e-5, atol=1e-5)
    assert not np.asarray(after.params["lora"]["lora_b"]).any()


def test_a_frozen_kernel_without_slots():
    labels = {"d": {"kernel": "frozen", "lora_a": "lora", "lora_b": "lora"}}
    tx = optax.multi_transform({"lora": optax.sgd(0.1, momentum=0.9), "frozen": optax.set_to_zero()}, labels)
    state = make_state(0, tx, d=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapted()))
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    after, _ = fsh.operate(state, MergeLora(S))
    np.testing.assert_allclose(after.params["d"]["kernel"], merged(state.params["d"])["kernel"], rtol=1e-5, atol=1e-6)
    (a, b) = sorted(leaf.shape for leaf in jax.tree.leaves(after.opt_state))
    assert (a, b) == ((2, 5), (6, 2))
    assert sorted(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(after.opt_state)) == [0, 1]


def test_bfloat16_is_rounded_once():
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), adapted())
    after, _ = fsh.operate(make_state(0, d=d), MergeLora(S))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), d)
    expected = jnp.asarray(wide["kernel"] + np.float32(S) * (wide["lora_a"] @ wide["lora_b"])).astype(jnp.bfloat16)
    off = np.asarray(after.params["d"]["kernel"] != expected)
    assert off.mean() < 0.1  # ties in the last bit of float32 at most


def test_relora_merges_draws_a_and_keeps_the_output(x64):
    state, _ = trained(ADAM)
    after, record = fsh.operate(state, ReLoRA(S), key=KEY)
    np.testing.assert_allclose(forward(after.params["d"]), forward(state.params["d"]), rtol=1e-10)
    own = jax.random.fold_in(KEY, zlib.crc32(b"d/lora_a"))
    np.testing.assert_array_equal(
        after.params["d"]["lora_a"], jax.random.uniform(own, (6, 2), jnp.float64, -(6**-0.5), 6**-0.5)
    )
    np.testing.assert_array_equal(after.params["d"]["lora_b"], 0)
    assert np.abs(gradient(after.params, 0)["d"]["lora_b"]).max() > 1e-3  # alive at once
    np.testing.assert_array_equal(after.opt_state[0].mu["d"]["kernel"], state.opt_state[0].mu["d"]["kernel"])
    assert int(after.opt_state[0].count) == 4
    assert record.rule == "transport"


def test_one_mask_for_all_slots_of_an_adapter():
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapted(rank=50))
    state = make_state(0, optax.adam(0.1), d=d)
    state = state.apply_gradients(grads=jax.tree.map(lambda x: jnp.sin(x) + 2, state.params))
    after, record = fsh.operate(state, ReLoRA(S, reset=0.7), key=KEY, fresh="init")
    share = 0.0
    for name in ("lora_a", "lora_b"):
        mu, nu = (np.asarray(getattr(after.opt_state[0], field)["d"][name]) for field in ("mu", "nu"))
        np.testing.assert_array_equal(mu == 0, nu == 0)
        kept = mu != 0
        for field, now in (("mu", mu), ("nu", nu)):
            np.testing.assert_array_equal(now[kept], np.asarray(getattr(state.opt_state[0], field)["d"][name])[kept])
        share += kept.mean() / 2
    assert 0.25 < share < 0.35
    lost = [(np.asarray(after.opt_state[0].mu["d"][name]) == 0).sum() for name in ("lora_a", "lora_b")]
    assert float(record.figures["params/fresh"]) == sum(lost)
    mean, _ = fsh.operate(state, ReLoRA(S, reset=1.0), key=KEY)
    mu, nu = (np.asarray(getattr(mean.opt_state[0], field)["d"]["lora_a"]) for field in ("mu", "nu"))
    assert nu.min() > 0 == np.abs(mu).max()


def test_the_sum_of_two_cycles_has_twice_the_rank(x64):
    state, _ = trained(ADAM)
    first = np.asarray(state.params["d"]["kernel"])
    ranks = []
    for cycle, surgery in enumerate((ReLoRA(S), ReLoRA(S))):
        state = fsh.operate(state, surgery, key=jax.random.fold_in(KEY, cycle))[0]
        ranks.append(np.linalg.matrix_rank(np.asarray(state.params["d"]["kernel"]) - first, tol=1e-9))
        d = state.params["d"]
        state = state.replace(
            params={"d": {**d, "lora_b": d["lora_b"] - 0.1 * gradient(state.params, 0)["d"]["lora_b"]}}
        )
    assert ranks == [2, 4]


def test_layers_are_drawn_by_themselves_and_by_the_given_initializer():
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapted((3,), rank=40))
    after, _ = fsh.operate(make_state(0, d=d), ReLoRA(S, initializer=jax.nn.initializers.lecun_normal()), key=KEY)
    a = np.asarray(after.params["d"]["lora_a"])
    assert a.std() == pytest.approx(6**-0.5, rel=0.15)  # of 6 inputs; of 3 * 6 it would be half
    assert np.abs(a[0] - a[1]).max() > 0.1


def test_host_graph_and_eight_devices_do_the_same():
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapted((2,), rank=4))
    state = make_state(1, MOMENTUM, d=d)
    hooks = make_hooks(ReLoRA(S), params="**", options={}, seed=1)
    host = make_hooks(ReLoRA(S), params="**", options={}, seed=1)(1, state)
    graph = jax.jit(hooks.in_graph)(hooks.init(state))
    assert_bitwise_equal((host.params, host.opt_state), (graph.params, graph.opt_state))
    place = NamedSharding(jax.make_mesh((2, 4), ("x", "y")), PartitionSpec("x", None, None))
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, place if jnp.ndim(leaf) == 3 else None), state)
    after = make_hooks(ReLoRA(S), params="**", options={}, seed=1)(1, spread)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), after.params, host.params)
    assert after.params["d"]["kernel"].sharding.spec == place.spec


def test_with_rewarm_the_learning_rate_is_the_jagged_cosine():
    """After each merge from zero back onto the cosine, which it meets without a jump."""
    period, warm, total = 20, 5, 60
    cosine = optax.cosine_decay_schedule(1.0, total)
    tx = optax.chain(optax.scale_by_schedule(lambda count: -cosine(count)), fsh.optax.rewarm(warm))
    state = make_state(0, tx, kernel=jnp.zeros((1, 1)), lora_a=jnp.zeros((1, 1)), lora_b=jnp.zeros((1, 1)))
    hooks = fsh.SurgeryHooks()
    often = fsh.at(period, 2 * period)
    hooks.add("relora", ReLoRA(), params="**", when=often, figures=False)
    hooks.add("rewarm", Rewarm(), params="**", when=often)
    grads = jax.tree.map(jnp.ones_like, state.params)
    update, rates = jax.jit(lambda state: state.apply_gradients(grads=grads)), []
    for step in range(1, total + 1):
        new = update(state)
        rates.append(float(state.params["kernel"][0, 0] - new.params["kernel"][0, 0]))
        state = hooks(step, new)
    expected = [float(cosine(t)) * (min(1, (t % period) / warm) if t >= period else 1) for t in range(total)]
    np.testing.assert_allclose(rates, expected, atol=1e-4)  # differences of float32 numbers up to 30
    assert rates[period] == 0 != rates[period - 1]


def on(surgery, where="**", **params):
    good = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapted())
    return lambda: fsh.operate(make_state(0, **{**good, **params}), surgery, params=where)


FUNCTION = e.SurgeryFunctionError
CASES = {
    "scale": Case(lambda: MergeLora("2"), FUNCTION, ("MergeLora(scale=...) must be a finite", "Found: '2'")),
    "scale_of_relora": Case(lambda: ReLoRA(float("nan")), FUNCTION, ("ReLoRA(scale=...) must be a finite",)),
    "reset": Case(lambda: ReLoRA(reset=2), FUNCTION, ("ReLoRA(reset=...) must be", "Found: 2")),
    "shapes": Case(on(MergeLora(), lora_b=jnp.ones((3, 5))), FUNCTION,
                   ("do not multiply to its kernel", "A [6, 2], B [3, 5], kernel [6, 5]"), {"path": "kernel"}),
    "alone": Case(on(MergeLora(), where=["kernel", "lora_a"]), FUNCTION, ("no 'lora_b' to go with", "kernel, lora_a")),
    "bias": Case(on(ReLoRA(), bias=jnp.ones(5)), e.InputError, ("key",)),
    "stranger": Case(on(MergeLora(), bias=jnp.ones(5)), FUNCTION, ("none that MergeLora works on",), {"path": "bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    case = CASES[name]
    with pytest.raises(case.error) as caught:
        case.run()
    assert [part for part in case.says if part not in str(caught.value)] == [], str(caught.value)
    assert {"path": caught.value.path} == {"path": None, **case.fields}
