"""QKClip: logits computed anew, by NumPy, are what it says; what has to stay as it is keeps its bits."""

import functools

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
from flax_surgery_hooks.surgeries import QKClip
from flax_surgery_hooks.surgeries.qk_clip import max_logits
from flax_surgery_hooks.testing import streams

WIDTH, FEATURES = 6, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, WIDTH))
SIZES = np.array([3.0, 0.1, 2.0, 0.2])
"""What makes the logits of heads 0 and 2 large."""


def attention(heads=4, key_heads=4, layers=()):
    """Parameters of an attention with biases, float64."""
    sizes = SIZES[:heads, None]
    return {
        "query": {"kernel": RNG.normal(size=(*layers, WIDTH, heads, FEATURES)) * sizes,
                  "bias": RNG.normal(size=(*layers, heads, FEATURES)) * sizes},
        "key": {"kernel": RNG.normal(size=(*layers, WIDTH, key_heads, FEATURES)),
                "bias": RNG.normal(size=(*layers, key_heads, FEATURES))},
        "value": {"kernel": RNG.normal(size=(*layers, WIDTH, key_heads, FEATURES))},
        "out": {"kernel": RNG.normal(size=(*layers, heads, FEATURES, WIDTH))},
    }  # fmt: skip


def logits(params):
    """Of each head, over batch and positions: [heads, ...]; head h looks at key head h // group."""
    query = np.einsum("btd,dhf->hbtf", X, np.asarray(params["query"]["kernel"])) + _bias(params["query"])
    key = np.einsum("btd,dhf->hbtf", X, np.asarray(params["key"]["kernel"])) + _bias(params["key"])
    group = len(query) // len(key)
    return np.stack([query[h] @ key[h // group].transpose(0, 2, 1) for h in range(len(query))]) / FEATURES**0.5


def _bias(module):
    return np.asarray(module["bias"])[:, None, None, :]


def largest(params):
    return logits(params).max(axis=(1, 2, 3))


def clipped(params, surgery, tau_logits, tx=MOMENTUM, params_=("**/query/*", "**/key/*")):
    state = make_state(1, tx, **jax.tree.map(jnp.asarray, params))
    return state, *fsh.operate(state, surgery, params=list(params_), inputs={"max_logits": tau_logits})


@pytest.fixture
def x64():
    with streams.enable_x64(True):
        yield


@pytest.mark.parametrize(("alpha", "key_heads"), [(0.5, 4), (0.2, 4), (0.2, 2), (0.5, 1), (0.0, 2), (1.0, 2)])
def test_clipped_heads_come_to_tau_and_the_others_keep_their_logits(x64, alpha, key_heads):
    params = {"attention": attention(key_heads=key_heads)}
    before = largest(params["attention"])
    tau = 0.5 * before[[0, 2]].min()
    assert (before > tau).tolist() == [True, False, True, False]
    state, after, record = clipped(params, QKClip(tau, alpha), before)
    new = after.params["attention"]
    gamma = np.where(before > tau, tau / before, 1)
    np.testing.assert_allclose(logits(new), logits(params["attention"]) * gamma[:, None, None, None], rtol=1e-12)
    np.testing.assert_allclose(largest(new)[[0, 2]], tau, rtol=1e-12)
    for path in ("value", "out"):
        assert_bitwise_equal(new[path], state.params["attention"][path])
    shared = np.repeat(gamma.reshape(key_heads, -1).max(1) ** (1 - alpha), 4 // key_heads)
    for name in ("kernel", "bias"):
        old = np.asarray(params["attention"]["query"][name])
        np.testing.assert_allclose(new["query"][name], old * (gamma / shared)[:, None], rtol=1e-12)
        np.testing.assert_array_equal(new["query"][name][..., [1, 3], :], old[..., [1, 3], :])
        if key_heads == 4:
            np.testing.assert_array_equal(
                new["key"][name][..., [1, 3], :], params["attention"]["key"][name][..., [1, 3], :]
            )
    assert_bitwise_equal(after.opt_state, state.opt_state)
    assert record.rule == "keep"
    told = {name: float(record.figures[name]) for name in QKClip().figure_names(())}
    assert told == pytest.approx({"qk/clipped_heads": 2, "qk/max_logit": before.max(), "qk/min_gamma": gamma.min()})


def test_what_a_wrong_clip_would_do_shows(x64):
    params = attention(key_heads=2)
    before = largest(params)
    tau = 0.5 * before[[0, 2]].min()
    gamma = np.where(before > tau, tau / before, 1)
    right = clipped(params, QKClip(tau), before)[1].params

    def off(query, key, bias=True):
        wrong = {**params, "query": dict(params["query"]), "key": dict(params["key"])}
        for name in ("kernel", "bias") if bias else ("kernel",):
            wrong["query"][name] = params["query"][name] * query[:, None]
            wrong["key"][name] = params["key"][name] * key[:, None]
        return np.abs(logits(wrong) - logits(right)).max() / np.abs(logits(right)).max()

    pairs = gamma.reshape(2, 2)
    shared = pairs.max(1) ** 0.5
    assert off(gamma / np.repeat(shared, 2), shared) < 1e-12
    assert off(gamma / np.repeat(shared, 2), shared, bias=False) > 1e-3
    assert off(gamma**0.5, pairs.min(1) ** 0.5) > 1e-3  # the strongest of a group, without a remainder
    assert off(np.full(4, gamma.min() ** 0.5), np.full(2, gamma.min() ** 0.5)) > 1e-3  # the whole layer


def test_a_second_clip_changes_nothing_at_all():
    params = jax.tree.map(np.float32, attention())
    tau = 0.3 * largest(params).max()
    _, once, _ = clipped(params, QKClip(tau), largest(params).astype(np.float32))
    again = max_logits(*(jnp.einsum("btd,dhf->bthf", X.astype(np.float32), once.params[name]["kernel"])
                         + once.params[name]["bias"][None, None] for name in ("query", "key")))  # fmt: skip
    np.testing.assert_allclose(again.max(), tau, rtol=1e-5)
    twice, record = fsh.operate(once, QKClip(tau), params=["query/*", "key/*"], inputs={"max_logits": again})
    assert_bitwise_equal(once, twice)
    assert float(record.figures["params/changed"]) == float(record.figures["qk/clipped_heads"]) == 0
    stale, _ = fsh.operate(once, QKClip(tau), params=["query/*", "key/*"], inputs={"max_logits": 2 * again})
    assert float(jnp.abs(stale.params["query"]["kernel"] - once.params["query"]["kernel"]).max()) > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e9])
def test_logits_that_say_nothing_or_are_negative_clip_nothing(bad):
    state, after, _ = clipped(attention(), QKClip(1.0), np.full(4, bad))
    assert_bitwise_equal(after.params, state.params)


@pytest.mark.parametrize("own", [False, True], ids=["one kernel", "own projection"])
def test_mla_scales_content_by_shares_and_the_rotary_query_by_gamma(x64, own):
    """Features 0-2 of a head are content, 3 is rotary (query) or value (key); the rotary key is not touched."""
    content = 3
    query, key = RNG.normal(size=(WIDTH, 4, FEATURES)), RNG.normal(size=(WIDTH, 4, FEATURES))
    rope = query[..., content:]
    params = {"q": {"kernel": query[..., :content] if own else query}, "kv": {"kernel": key}, "k_rope": np.ones(WIDTH)}
    params |= {"q_rope": {"kernel": rope}} if own else {}
    surgery = QKClip(10.0, query="q", key="kv", content=content, query_rope="q_rope" if own else None)
    paths = ("q/kernel", "kv/kernel", *(["q_rope/kernel"] if own else []))
    state, after, _ = clipped(params, surgery, np.array([40.0, 5.0, 10.0, 90.0]), params_=paths)
    gamma = np.array([0.25, 1, 1, 1 / 9])[:, None]
    new = jax.tree.map(np.asarray, after.params)
    np.testing.assert_allclose(new["q"]["kernel"][..., :content], query[..., :content] * gamma**0.5, rtol=1e-14)
    np.testing.assert_allclose(new["kv"]["kernel"][..., :content], key[..., :content] * gamma**0.5, rtol=1e-14)
    np.testing.assert_array_equal(new["kv"]["kernel"][..., content:], key[..., content:])
    new_rope = new["q_rope"]["kernel"] if own else new["q"]["kernel"][..., content:]
    np.testing.assert_allclose(new_rope, rope * gamma, rtol=1e-14)
    np.testing.assert_array_equal(new["k_rope"], state.params["k_rope"])


@pytest.mark.parametrize("key_heads", [2, 1])
def test_kernels_without_an_axis_for_heads_do_as_those_with_one(key_heads):
    """Heads of queries and keys have as many features as they have: in MLA values lie behind the keys."""
    query, key = RNG.normal(size=(WIDTH, 2, 5)), RNG.normal(size=(WIDTH, key_heads, 7))
    bias = RNG.normal(size=(2, 5))
    wide = {"a": {"query": {"kernel": query, "bias": bias}, "key": {"kernel": key}}}
    flat = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-2], -1), wide)
    surgery = functools.partial(QKClip, 1.0, 0.3, content=3)
    expected = clipped(wide, surgery(), np.array([4.0, 2.0]))[1].params
    after = clipped(flat, surgery(heads=2, key_heads=key_heads), np.array([4.0, 2.0]))[1].params
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.reshape(x.shape)), after, expected)


LAYERS, HEADS = 3, 2
STACK = {"blocks": {"attention": {
    name: {"kernel": jnp.asarray(RNG.normal(size=(LAYERS, WIDTH, HEADS, FEATURES)), jnp.float32)}
    for name in ("query", "key")}}}  # fmt: skip


def of_model(state, batch):
    """What the user's own forward pass gives, as `sow` leaves it."""
    query, key = (jnp.einsum("btd,ldhf->lbthf", batch, state.params["blocks"]["attention"][name]["kernel"])
                  for name in ("query", "key"))  # fmt: skip
    return {"blocks": {"attention": {"max_logits": (jax.vmap(max_logits)(query, key),)}}}


BATCH = jnp.asarray(X, jnp.float32)
WHERE = {"params": ["**/query/*", "**/key/*"], "options": {}}


@functools.cache
def stacked(way):
    state = make_state(1, MOMENTUM, **STACK)
    hooks = make_hooks(QKClip(12.0, max_logits=of_model), **WHERE)
    if way == "host":
        return state, hooks(1, state, batch=BATCH)
    state = hooks.init(state)
    return state, jax.jit(lambda state: hooks.in_graph(state, batch=BATCH))(state)


def test_scanned_layers_are_clipped_head_by_head():
    state, after = stacked("host")
    before, now = (np.asarray(*jax.tree.leaves(of_model(one, BATCH))) for one in (state, after))
    assert 0 < (before <= 12).sum() < before.size
    np.testing.assert_allclose(now, np.minimum(before, 12), rtol=1e-5)
    np.testing.assert_array_equal(now[before <= 12], before[before <= 12])


def test_in_graph_it_is_the_same():
    assert_bitwise_equal(stacked("host")[1].params, stacked("graph")[1].params)


def test_one_layer_of_a_stack():
    state = make_state(1, MOMENTUM, **STACK)
    where = ["**/query/kernel[1]", "**/key/kernel[1]"]
    after, _ = fsh.operate(state, QKClip(12.0), params=where, inputs={"max_logits": of_model(state, BATCH)})
    whole = stacked("host")[1]
    for name in ("query", "key"):
        new, old, all_of = (one.params["blocks"]["attention"][name]["kernel"] for one in (after, state, whole))
        np.testing.assert_array_equal(new[1], all_of[1])
        np.testing.assert_array_equal(new[jnp.array([0, 2])], old[jnp.array([0, 2])])


def test_on_eight_devices_it_is_the_same():
    mesh = jax.make_mesh((2, 4), ("heads", "features"))
    place = NamedSharding(mesh, PartitionSpec(None, None, "heads", "features"))
    state = make_state(1, MOMENTUM, **STACK)
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, place if jnp.ndim(leaf) == 4 else None), state)
    inputs = {"max_logits": of_model(state, BATCH)}
    after = fsh.operate(spread, QKClip(12.0), inputs=inputs)[0]
    assert after.params["blocks"]["attention"]["query"]["kernel"].sharding == place
    assert_bitwise_equal(after.params, fsh.operate(state, QKClip(12.0), inputs=inputs)[0].params)


def test_max_logits_against_numpy():
    query, key = RNG.normal(size=(2, 5, 4, 3)).astype(np.float32), RNG.normal(size=(2, 5, 2, 3)).astype(np.float32)
    mask = np.tril(np.ones((5, 5), bool))
    every = np.einsum("bqhf,bkhf->bhqk", query, np.repeat(key, 2, axis=2))
    np.testing.assert_allclose(max_logits(query, key, scale=2.0), 2 * every.max((0, 2, 3)), rtol=1e-5)
    causal = np.where(mask, every, -np.inf).max((0, 2, 3)) / 3**0.5
    np.testing.assert_allclose(max_logits(query, key, mask=mask), causal, rtol=1e-5)
    assert (causal < every.max((0, 2, 3)) / 3**0.5).any()


def on(params, surgery=None, given=None, where="**"):
    """A call on these parameters, with logits of four heads for the attention at "a"."""
    given = {"a": jnp.ones(4)} if given is None else given
    state = make_state(1, **params)
    return lambda: fsh.operate(state, surgery or QKClip(), params=where, inputs={"max_logits": given})


KERNEL = jnp.ones((2, 4, 3))
GOOD = {"query": {"kernel": KERNEL}, "key": {"kernel": KERNEL}}
CASES = {
    "tau": Case(lambda: QKClip(0), e.SurgeryFunctionError, ("QKClip(tau=...) must be", "Found: 0")),
    "alpha": Case(lambda: QKClip(alpha=2), e.SurgeryFunctionError, ("from 0 to 1", "Found: 2")),
    "features": Case(lambda: QKClip(heads=0), e.SurgeryFunctionError, ("QKClip(heads=...)",)),
    "norm": Case(on({"a": {**GOOD, "query_ln": {"scale": jnp.ones(3)}}}, where=["**/query/*", "**/key/*"]),
                 e.SurgeryFunctionError, ("would undo QKClip", "a/query_ln/scale"), {"path": "a/query_ln/scale"}),
    "stranger": Case(on({"a": {**GOOD, "value": {"kernel": KERNEL}}}), e.SurgeryFunctionError,
                     ("none that QKClip works on", "no 'query' or 'key' in the path"), {"path": "a/value/kernel"}),
    "alone": Case(on({"a": {"query": {"kernel": KERNEL}}}), e.SurgeryFunctionError,
                  ("has no 'key' to go with", "only query"), {"path": "a"}),
    "heads": Case(on({"a": {**GOOD, "key": {"kernel": jnp.ones((2, 3, 3))}}}), e.SurgeryFunctionError,
                  ("no heads that fit", "[2, 4, 3], [2, 3, 3]"), {"path": "a"}),
    "flat_heads": Case(on({"a": GOOD}, QKClip(heads=2)), e.SurgeryFunctionError, ("no heads that fit", "heads=2"),
                       {"path": "a"}),
    "logits": Case(on({"a": GOOD}, given={"a": jnp.ones(3), "b": jnp.ones(2)}), e.InputError,
                   ("one array for 4 heads below 'a'", "a [3], b [2]", "{'a': logits} of shape [4]"), {"path": "a"}),
    "one_array_for_two": Case(on({"a": GOOD, "b": GOOD}, given=jnp.ones(4)), e.InputError, ("array [4]",),
                              {"path": "a"}),
    "bias_left_out": Case(on({"a": {**GOOD, "key": {"kernel": KERNEL, "bias": jnp.ones((4, 3))}}}, where="**/kernel"),
                          e.SurgeryFunctionError, ("a part of a projection only", "a/key/kernel", '"**/query/*"'),
                          {"path": "a/key/bias"}),
    "layers": Case(on({"a": GOOD}, given={"a": jnp.ones((3, 4))}), e.SurgeryFunctionError,
                   ("layers and heads of its logits", "[2, 4, 3] for layers [3]"), {"path": "a/query/kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    CASES[name].check()


def beside(name):
    """A fire of an attention that has a leaf of this name too."""
    tree = jax.tree.map(jnp.asarray, {"query": dict(GOOD["query"]), "key": dict(GOOD["key"])})
    functools.reduce(lambda node, part: node.setdefault(part, {}), name.split("/"), tree)["scale"] = jnp.ones(3)
    leaves = {f"b/{part}/kernel": KERNEL for part in GOOD}
    return QKClip(0.25)(leaves, jnp.ones(4), QKClip()._beside(make_state(1, b=tree)))


@pytest.mark.parametrize("name", ["q_norm", "_key_norm", "k_layernorm", "qk_norm", "query_ln", "key/rms_norm"])
def test_norms_of_many_names_are_known(name):
    with pytest.raises(e.SurgeryFunctionError, match="would undo QKClip") as caught:
        beside(name)
    assert caught.value.path == f"b/{name}/scale"


@pytest.mark.parametrize("name", ["attention_norm", "query_scale", "out_norm", "quality_norm", "kernel_norm", "ln"])
def test_other_norms_are_none_of_queries_and_keys(name):
    assert float(beside(name)["b/query/kernel"].max()) == 0.5


def test_a_norm_in_another_attention_does_not_matter():
    state = make_state(1, a=GOOD, b={**GOOD, "q_norm": jnp.ones(3)})
    after, _ = fsh.operate(state, QKClip(0.25, 0.0), params="a/*/kernel", inputs={"max_logits": jnp.ones(4)})
    assert float(after.params["a"]["key"]["kernel"].max()) == 0.25


def test_with_adam_and_bfloat16():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), GOOD)
    _, after, _ = clipped({"a": params}, QKClip(1.0), jnp.full(4, 4, jnp.bfloat16), optax.adam(0.1))
    assert after.params["a"]["query"]["kernel"].dtype == jnp.bfloat16
    assert set(np.asarray(after.params["a"]["query"]["kernel"], np.float32).ravel()) == {0.5}
