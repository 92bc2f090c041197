"""Hooks on layers of stacked leaves: meshes, programs, donation, memory, records, and fires in graph."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_surgery_hooks as fsh
from flax_surgery_hooks import layers
from flax_surgery_hooks.collectives import collectives
from flax_surgery_hooks.layers import Layer, taken
from flax_surgery_hooks.placement import auto_axes, relabelled
from flax_surgery_hooks.surgeries import Normalize, Scale

LAYERS = 8
MESHES = [AxisType.Auto, AxisType.Explicit]
SPECS = [P("fsdp", None, "tensor"), P(None, "fsdp", "tensor"), P()]


def make_state(tx: Any = None, place: Any = None, steps: int = 2) -> Any:
    random = np.random.default_rng(0)
    stacked = {"kernel": random.normal(size=(LAYERS, 4, 6)), "bias": random.normal(size=(LAYERS, 6))}
    params = {"layers": stacked, "head": random.normal(size=(6, 2))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx or optax.adamw(1e-2))
    state = state.replace(step=jnp.int32(0))
    for _ in range(steps):
        state = update(state)
    return state if place is None else jax.tree.map(place, state)


def update(state: Any) -> Any:
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params))


def placing(kind: AxisType, spec: P) -> Any:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))

    def place(leaf: Any) -> Any:
        own = () if jnp.shape(leaf)[:1] != (LAYERS,) else spec if leaf.ndim == 3 else spec[:1]
        if kind == AxisType.Explicit:  # as a step returns it
            own = (*own, *[None] * (jnp.ndim(leaf) - len(own)))
        return jax.device_put(leaf, NamedSharding(mesh, P(*own)))

    return place


def make_hooks(surgery: Any = None, params: Any = "layers/**[2:5]", when: Any = None, **options: Any) -> Any:
    constructor = {name: options.pop(name) for name in ("donate", "on_error", "seed") if name in options}
    hooks = fsh.SurgeryHooks(**constructor)
    hooks.add("a", surgery or Normalize(), params=params, when=when or fsh.every(1), **options)
    return hooks


def fired(state: Any, **options: Any) -> tuple[Any, Any]:
    hooks = make_hooks(**{"when": fsh.at(2), **options})
    after = hooks(2, state)
    hooks.flush()
    return after, hooks


def values(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def roll(leaf):
    """Not elementwise: indexing along a sharded axis too."""
    return leaf[..., ::-1] * 0.5


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_a_sharded_leaf_keeps_its_sharding_and_its_other_layers(kind, spec):
    place = placing(kind, spec)
    state = make_state(place=place)
    expected, _ = fired(make_state(), surgery=roll, opt_state="transport")
    after, hooks = fired(state, surgery=roll, opt_state="transport")
    for a, b in zip(
        values((after.params, after.opt_state)), values((expected.params, expected.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for old, new in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert new.sharding is old.sharding or new.sharding == old.sharding
        assert new.committed == old.committed
    wrong, _ = fired(state, surgery=roll, opt_state="transport", params="layers/**[1:4]")
    assert not np.array_equal(wrong.params["layers"]["kernel"], expected.params["layers"]["kernel"])
    programs = hooks.programs("a")
    assert sorted(one.leaves[0][0] for one in programs) == [(4, 6), (6,)]
    assert [one.served for one in programs] == [3, 3]
    norms = next(record for record in hooks.ledger.records if record.event == "settled").per_leaf
    assert np.shape(norms)[0] == 6


def test_uncommitted_leaves_stay_so_and_a_train_step_is_not_compiled_again():
    state = make_state()
    step = jax.jit(update)
    state = step(step(state)).replace(step=jnp.int32(2))
    after, _ = fired(state, surgery=Scale(0.5))
    step(after)
    assert step._cache_size() == 1
    assert not any(leaf.committed for leaf in jax.tree.leaves(after.params))
    assert after.params["head"] is state.params["head"]


def test_leaves_of_numpy_and_of_a_weak_type():
    state = make_state(optax.sgd(0.1), steps=0)
    kernel = np.asarray(state.params["layers"]["kernel"])
    weak = jnp.broadcast_to(2.0, (LAYERS, 6))
    assert weak.weak_type
    state = state.replace(params={**state.params, "layers": {"kernel": kernel, "bias": weak}})
    after, _ = fired(state.replace(step=2), surgery=Scale(0.5))
    np.testing.assert_array_equal(after.params["layers"]["kernel"][2:5], kernel[2:5] / 2)
    np.testing.assert_array_equal(after.params["layers"]["kernel"][5:], kernel[5:])
    assert after.params["layers"]["bias"].weak_type


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_a_layer_of_a_leaf_whose_layers_lie_apart_is_taken_bit_by_bit_and_without_a_gather(kind, dtype):
    width = jnp.dtype(dtype).itemsize * 8
    bits = np.random.default_rng(1).integers(0, 2**width, size=(LAYERS, 4, 6), dtype=f"uint{width}")
    bits[3, 0, 0] = 1 << (width - 1)  # a negative zero
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    leaf = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)
    leaf = jax.device_put(leaf, NamedSharding(mesh, SPECS[0]))
    for index in (0, 3, LAYERS - 1):
        layer = Layer(0, index)
        value = taken(leaf, layer)
        assert value.sharding == NamedSharding(mesh, P(None, "tensor"))
        np.testing.assert_array_equal(np.asarray(value).view(bits.dtype), bits[index])
    taker = layers._taker(0, auto_axes(value.sharding), True)
    said = collectives(taker.lower(*relabelled((leaf, np.int32(3)))).compile())
    assert [one.kind for one in said] == ["all-reduce"]
    assert said[0].bytes <= 4 * 6 // 2 * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_layers_keep_their_bits_in_short_floats(dtype):
    bits = np.random.default_rng(1).integers(0, 2**16, size=(LAYERS, 4, 6), dtype=np.uint16)
    leaf = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)  # NaNs with payloads too
    leaf = leaf.at[0].set(1)
    state = fsh.TrainState.create(apply_fn=None, params={"k": leaf}, tx=optax.sgd(0.1))
    after, _ = fsh.operate(state, Scale(0.5), params="k[0]")
    new = np.asarray(jax.lax.bitcast_convert_type(after.params["k"], jnp.uint16))
    np.testing.assert_array_equal(new[1:], np.asarray(jax.lax.bitcast_convert_type(leaf, jnp.uint16))[1:])
    np.testing.assert_array_equal(after.params["k"][0].astype(jnp.float32), np.full((4, 6), 0.5))


def test_the_axis_that_a_box_names():
    kernel = jnp.arange(24.0).reshape(2, 3, 4)
    params = {"k": nn.Partitioned(kernel, names=("embed", "layers", "mlp"))}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    after, record = fsh.operate(state, Scale(0.5), params="k[1]", opt_state="transport")
    old, new = state.params["k"].value, after.params["k"].value
    np.testing.assert_array_equal(new, old.at[:, 1].mul(0.5))
    old, new = state.opt_state[0].mu["k"].value, after.opt_state[0].mu["k"].value
    np.testing.assert_array_equal(new, old.at[:, 1].mul(2))
    assert (record.paths, record.leaves) == (("k[1]",), (((2, 4), "float32"),))
    assert after.params["k"].names == ("embed", "layers", "mlp")


@pytest.mark.parametrize("place", [None, placing(AxisType.Explicit, SPECS[0])])
def test_donation_takes_the_stacked_leaf_and_does_the_same(place):
    expected, _ = fired(make_state(place=place), surgery=roll, donate="never")
    state = jax.tree.map(jnp.copy, make_state(place=place))
    after, hooks = fired(state, surgery=roll, donate="always", params="layers/**[2:5]")
    for a, b in zip(
        values((after.params, after.opt_state)), values((expected.params, expected.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    adam = state.opt_state[0]
    gone = (state.params["layers"], adam.mu["layers"], adam.nu["layers"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(gone))
    assert not state.params["head"].is_deleted()
    assert hooks.ledger.records[-1].donated


def test_whole_leaves_are_donated_beside_layers():
    patterns = ["layers/kernel[1]", "head"]
    expected, _ = fired(make_state(), surgery=roll, params=patterns)
    state = make_state()
    after, _ = fired(state, surgery=roll, params=patterns, donate="always")
    for a, b in zip(
        values((after.params, after.opt_state)), values((expected.params, expected.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert [state.params["head"].is_deleted(), state.params["layers"]["kernel"].is_deleted()] == [True, True]


def test_a_shared_buffer_is_not_donated():
    class Averaging(fsh.TrainState):
        ema: Any = None

    state = make_state(optax.sgd(0.1))
    state = Averaging(**{name: getattr(state, name) for name in ("step", "apply_fn", "params", "tx", "opt_state")},
                      ema=state.params)  # fmt: skip
    after, _ = fired(state, donate="always")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.ema))
    assert not np.array_equal(after.params["layers"]["kernel"], state.ema["layers"]["kernel"])


class Tally:
    """Remembers a running mean of a layer, and puts it in its place."""

    def init_memory(self, leaf):
        return leaf

    def observe(self, leaf, memory):
        return leaf, 0.5 * memory + 0.5 * leaf

    def __call__(self, leaf, memory):
        return memory, 0 * memory


class Floor:
    """Edits at every step."""

    def observe(self, leaf):
        return jnp.maximum(leaf, -0.25)

    def __call__(self, leaf):
        return leaf


@pytest.mark.parametrize("place", [None, placing(AxisType.Explicit, SPECS[0]), placing(AxisType.Auto, SPECS[0])])
def test_memory_and_observe_are_per_layer(place):
    hooks = make_hooks(Tally(), "layers/kernel[1:3]", fsh.at(3))
    hooks.add("floor", Floor(), params="layers/bias[-1]", when=fsh.at(99))
    state = hooks.init(make_state(place=place), fires=0)
    memory = state.surgery["memory"]["a"]
    assert {path: leaf.shape for path, leaf in memory.items()} == {
        "layers/kernel[1]": (4, 6), "layers/kernel[2]": (4, 6)
    }  # fmt: skip
    observed = jax.jit(hooks.observe)(update(state))
    bias, before = (np.array(one.params["layers"]["bias"]) for one in (observed, update(state)))
    np.testing.assert_array_equal(bias[-1], np.maximum(before[-1], -0.25))
    np.testing.assert_array_equal(bias[:-1], before[:-1])
    assert np.any(before[:-1] < -0.25)
    mean = 0.5 * np.asarray(state.params["layers"]["kernel"]) + 0.5 * np.asarray(observed.params["layers"]["kernel"])
    np.testing.assert_allclose(observed.surgery["memory"]["a"]["layers/kernel[1]"], mean[1], rtol=1e-6)
    after = hooks(3, observed)
    kernel, before = (np.asarray(one.params["layers"]["kernel"]) for one in (after, observed))
    np.testing.assert_allclose(kernel[1:3], mean[1:3], rtol=1e-6)
    np.testing.assert_array_equal(kernel[3:], before[3:])
    assert not np.any(after.surgery["memory"]["a"]["layers/kernel[2]"])


def test_the_record_has_figures_and_histograms_per_layer():
    state = make_state()
    _, hooks = fired(state, surgery=Scale(0.5), params="layers/kernel[::4]", histograms=True)
    record = hooks.ledger.records[-1]
    assert record.paths == ("layers/kernel[0]", "layers/kernel[4]")
    rows = record.table().splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| layers/kernel[0]", "(4, 6)"],
        ["| layers/kernel[4]", "(4, 6)"],
    ]
    norms = np.linalg.norm(np.asarray(state.params["layers"]["kernel"]).reshape(LAYERS, -1), axis=1)
    np.testing.assert_allclose(np.asarray(record.per_leaf)[:, 1], norms[::4], rtol=1e-5)


def test_histograms_are_of_the_layers(monkeypatch):
    written: dict[str, np.ndarray] = {}

    class Writer:
        def write_scalars(self, step, scalars): ...
        def write_texts(self, step, texts): ...
        def write_hparams(self, hparams): ...
        def flush(self): ...

        def write_histograms(self, step, arrays, num_buckets=None):
            written.update({name: np.asarray(array) for name, array in arrays.items()})

    state = make_state()
    hooks = fsh.SurgeryHooks(writer=Writer())
    hooks.add("a", Scale(0.5), params="layers/bias[2]", when=fsh.at(2), histograms=True)
    hooks(2, state)
    hooks.flush()
    old = np.asarray(state.params["layers"]["bias"][2])
    (before,) = [array for name, array in written.items() if "before" in name]
    (after,) = [array for name, array in written.items() if "after" in name]
    np.testing.assert_array_equal(np.sort(before), np.sort(old))
    np.testing.assert_array_equal(np.sort(after), np.sort(old / 2))


def test_from_a_config():
    config = fsh.config.hook("scale", factor=0.5, params="layers/**/kernel[3]", at=(2,))
    hooks = fsh.SurgeryHooks.from_config({"a": config})
    state = make_state()
    after = hooks(2, state)
    kernel = state.params["layers"]["kernel"]
    np.testing.assert_array_equal(after.params["layers"]["kernel"], kernel.at[3].mul(0.5))


# In graph.


def many_hooks(**options: Any) -> Any:
    hooks = fsh.SurgeryHooks(seed=3, **options)
    hooks.add("norm", Normalize(), params="layers/kernel[1:3]", when=fsh.every(3))
    hooks.add("roll", roll, params="layers/**[-1]", when=fsh.every(4), opt_state="transport")
    hooks.add("noise", lambda leaf, key: leaf + jax.random.normal(key, leaf.shape), params="**/kernel",
              exclude="**/kernel[0]", when=fsh.every(5))  # fmt: skip
    hooks.add("all", lambda leaves: {path: 0.9 * leaf for path, leaf in leaves.items()},
              params=["layers/bias[2:5]", "head"], when=fsh.every(7), guard="off")  # fmt: skip
    hooks.add("tally", Tally(), params="layers/kernel[5]", when=fsh.at(11))
    return hooks


@pytest.mark.parametrize(
    "place", [None, placing(AxisType.Auto, SPECS[0]), placing(AxisType.Explicit, SPECS[0])], ids=["one", "auto", "expl"]
)
def test_fires_in_graph_are_bitwise_those_of_the_host(place):
    host, graph = many_hooks(), many_hooks()
    state = host.init(make_state(place=place, steps=0), fires=0)
    step = jax.jit(lambda state: host.observe(update(state)))
    for i in range(1, 13):
        state = host(i, step(state))
    host.flush()
    inside = graph.init(make_state(place=place, steps=0))
    step = jax.jit(lambda state: graph.in_graph(update(state)), donate_argnums=0)
    for i in range(1, 13):
        inside = graph(i, step(inside))
    graph.flush()
    assert step._cache_size() == 1
    for a, b in zip(*(jax.tree.leaves((one.params, one.opt_state)) for one in (state, inside)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding

    def told(hooks):
        records = [record for record in hooks.ledger.records if record.event == "settled"]
        return sorted((r.step, r.hook, r.paths, r.leaves) for r in records), {
            (r.step, r.hook): [*r.figures.values(), *np.ravel(r.per_leaf)] for r in records
        }

    facts, figures = zip(told(host), told(graph), strict=True)
    assert facts[0] == facts[1]
    assert len(facts[0]) == 4 + 3 + 2 + 1 + 1
    for at in figures[0]:
        np.testing.assert_allclose(figures[0][at], figures[1][at], rtol=1e-5)


# Other states.


class Scanned(fsh.TrainState):
    ema: Any = None
    batch_stats: Any = None


def test_mirrors_and_fields_have_layers_too():
    state = make_state()
    state = Scanned.create(apply_fn=None, params=state.params, tx=state.tx,
                           ema=jax.tree.map(lambda leaf: leaf + 1, state.params),
                           batch_stats={"layers": {"mean": jnp.ones((LAYERS, 3))}})  # fmt: skip
    options: dict[str, Any] = {"mirrors": {"ema": "param"}, "fields": ("batch_stats",)}
    patterns = ["layers/kernel[1]", "batch_stats/layers/mean[2]"]
    after, record = fsh.operate(state, roll, params=patterns, opt_state="transport", **options)
    assert record.paths == ("batch_stats/layers/mean[2]", "layers/kernel[1]")
    old, new = (np.array(one.ema["layers"]["kernel"]) for one in (state, after))
    old[1] = old[1, :, ::-1] * np.float32(0.5)
    np.testing.assert_array_equal(new, old)
    assert after.batch_stats["layers"]["mean"][:, 0].tolist() == [1, 1, 0.5, 1, 1, 1, 1, 1]
    assert after.ema["head"] is state.ema["head"]


def test_a_model_of_nnx_with_layers_made_by_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    model = make(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = np.asarray(model.kernel[...])
    hooks = make_hooks(Scale(0.5), "kernel[1]", fsh.at(1))
    hooks(0, fsh.bind_nnx(model, optimizer))
    optimizer.step[...] = jnp.uint32(1)
    hooks(1, fsh.bind_nnx(model, optimizer))
    np.testing.assert_array_equal(model.kernel[...][1], before[1] / 2)
    np.testing.assert_array_equal(model.kernel[...][::2], before[::2])


@pytest.mark.parametrize("kind", MESHES, ids=str)
def test_operate_under_jit_on_a_mesh(kind):
    state = make_state(place=placing(kind, SPECS[0]))
    edit = jax.jit(lambda state: fsh.operate(state, Scale(0.5), params="layers/**[2:5]", opt_state="transport")[0])
    after, expected = edit(state), fsh.operate(make_state(), Scale(0.5), params="layers/**[2:5]", opt_state="transport")
    for a, b in zip(values((after.params, after.opt_state)), values((expected[0].params, expected[0].opt_state)),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    assert after.params["layers"]["kernel"].sharding == state.params["layers"]["kernel"].sharding
