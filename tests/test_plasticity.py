"""Units drawn anew and weights shrunk: which, to what values, and what becomes of the slots, against NumPy."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import assert_bitwise_equal
from unit_cases import CASES, DEAD, flags, flat, killed, state_of, touched

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import SurgeryFunctionError, UnitsError
from flax_surgery_hooks.surgeries import RecycleDormant, Reinit, ShrinkAndPerturb
from flax_surgery_hooks.units import Units

KEY = jax.random.key(11)
SGD, ADAM = optax.sgd(0.1), optax.adam(0.01)
WITH_MOMENTS = ("cnn", "scanned")


def captured(name):
    return lambda state: CASES[name].run(state.params)[1]


@functools.cache
def output(name):
    return jax.jit(CASES[name].output)


@functools.cache
def recycled(name, fresh="mean"):
    """A state with dead units, and what becomes of it when exactly dead units are recycled."""
    state = state_of(killed(name), ADAM if name in WITH_MOMENTS else SGD)
    surgery = RecycleDormant(CASES[name].units, CASES[name].init, captured(name), tau=0)
    return state, *fsh.operate(state, surgery, key=KEY, fresh=fresh)


def assert_same_output(name, one, other):
    a, b = (np.asarray(output(name)(params)) for params in (one, other))
    assert a.tobytes() == b.tobytes()


# Exactly dead units.


@pytest.mark.parametrize("name", CASES)
def test_recycling_exactly_dead_units_leaves_the_output_as_it_is_bit_for_bit(name):
    state, after, _ = recycled(name)
    made = CASES[name].run(state.params)[1]
    for group in CASES[name].units:  # the case is one: these units are dead, and no others
        h = np.abs(np.asarray(made[group.activation]))
        axes = tuple(range(int(group.stacked), h.ndim - 1))
        np.testing.assert_array_equal(h.max(axes) == 0, flags(name, group.activation))
    assert_same_output(name, state.params, after.params)
    assert any((flat(after.params)[path] != leaf).any() for path, leaf in flat(state.params).items())


@pytest.mark.parametrize("name", CASES)
def test_what_makes_dead_units_is_drawn_by_the_model_and_what_reads_them_is_zero(name):
    state, after, record = recycled(name)
    drawn, old, new = flat(CASES[name].init(KEY)), flat(state.params), flat(after.params)
    for path, mark in touched(name).items():
        expected = np.where(mark == 2, 0, np.where(mark == 1, drawn[path], old[path]))
        np.testing.assert_array_equal(new[path], expected, err_msg=path)
    fresh = sum((mark > 0).sum() for mark in touched(name).values())
    assert float(record.figures["params/fresh"]) == (fresh if name in WITH_MOMENTS else 0)  # without slots no history
    for group in CASES[name].units:
        dead = flags(name, group.activation)
        assert float(record.figures[f"dormant/recycled/{group.activation}"]) == dead.sum() > 0
        np.testing.assert_allclose(record.figures[f"dormant/share/{group.activation}"], dead.mean(), rtol=1e-6)


@pytest.mark.parametrize(("name", "fresh"), [*((name, "mean") for name in WITH_MOMENTS), ("cnn", "init")])
def test_slots_start_anew_where_elements_do_and_nowhere_else_biases_too(name, fresh):
    state, after, _ = recycled(name, fresh)
    for slot in ("mu", "nu"):
        old, new = (flat(getattr(one.opt_state[0], slot)) for one in (state, after))
        for path, mark in touched(name).items():
            assert (old[path] > 0).all()
            if slot == "mu" or fresh == "init":
                np.testing.assert_array_equal(new[path], np.where(mark > 0, 0, old[path]), err_msg=path)
            else:
                np.testing.assert_array_equal(new[path] != old[path], mark > 0, err_msg=path)
    assert_bitwise_equal(state.opt_state[0].count, after.opt_state[0].count)


def test_second_moments_start_from_the_mean_of_the_survivors():
    """Of the same output unit, where it has any; else of the leaf."""
    state, after, _ = recycled("cnn")
    old, new = (flat(one.opt_state[0].nu) for one in (state, after))
    for path, mark in touched("cnn").items():
        if path.endswith("kernel"):
            survivors = np.where(mark > 0, np.nan, old[path].astype(np.float64))
            unit = np.array([np.nanmean(survivors if np.isnan(column).all() else column) for column in survivors.T])
            np.testing.assert_allclose(new[path], np.where(mark > 0, unit, old[path]), rtol=1e-6, err_msg=path)


def test_the_other_order_of_a_flattened_convolution_changes_the_output():
    """A control: what dopamine's reference does, `repeat` where `tile` is due, shows."""
    name = "cnn"
    (group,) = CASES[name].units
    wrong = Units(group.activation, group.incoming, {"Dense_0/kernel": (0, "repeat")})
    state = state_of(killed(name), SGD)
    after, _ = fsh.operate(state, RecycleDormant(wrong, CASES[name].init, captured(name), tau=0), key=KEY)
    a, b = output(name)(state.params), output(name)(after.params)
    assert np.abs(a - b).max() > 1e-3


def test_without_the_bias_a_dead_unit_stays_dead():
    (group, other) = CASES["mlp"].units
    partial = Units("h", {"Dense_0/kernel": 1}, group.outgoing)
    state = state_of(killed("mlp"), SGD)
    surgery = RecycleDormant((partial, other), CASES["mlp"].init, captured("mlp"), tau=0)
    after, _ = fsh.operate(state, surgery, key=KEY)
    for unit in DEAD["mlp"]["h"]:
        assert not np.asarray(CASES["mlp"].run(after.params)[1]["h"])[:, unit].any()
        assert np.asarray(CASES["mlp"].run(recycled("mlp")[1].params)[1]["h"])[:, unit].any()


# Scores.

TINY = {"a/kernel": (3, 8), "a/bias": (8,), "b/kernel": (8, 2), "b/bias": (2,)}
GROUP = Units("h", {"a/kernel": 1, "a/bias": 0}, {"b/kernel": 0})


def tiny_init(key):
    keys = dict(zip(TINY, jax.random.split(key, 4), strict=True))
    made = {path: 0.5 * jax.random.normal(keys[path], shape) for path, shape in TINY.items()}
    return {one: {leaf: made[f"{one}/{leaf}"] for leaf in ("kernel", "bias")} for one in "ab"}


def tiny_state(tx=None):
    return state_of(tiny_init(jax.random.key(3)), tx)


def dormant_in(scores, **options):
    """Which units are recycled, read off the new outgoing kernel, and the record."""
    surgery = RecycleDormant(GROUP, tiny_init, lambda state: {"h": jnp.asarray(scores)}, **options)
    after, record = fsh.operate(tiny_state(optax.sgd(0.1)), surgery, key=KEY)
    return ~np.asarray(after.params["b"]["kernel"]).any(axis=1), record


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 1.0])
def test_a_unit_is_dormant_by_its_share_of_the_mean_activity(tau):
    h = np.random.default_rng(4).normal(size=(6, 5, 8)) * np.array([0, 0.05, 0.2, 0.4, 0.6, 1.2, 2, 3])
    size = np.abs(h).mean(axis=(0, 1))
    expected = size / size.mean() <= tau
    assert expected.sum() == {0.0: 1, 0.1: 2, 0.5: 4, 1.0: 5}[tau]
    found, record = dormant_in(h.astype(np.float32), tau=tau)
    np.testing.assert_array_equal(found, expected)
    assert float(record.figures["dormant/recycled/h"]) == expected.sum()
    signed = np.abs(h.mean(axis=(0, 1)))  # a control: the size of the mean is another score than the mean size
    assert tau in (0.0, 1.0) or ((signed / signed.mean() <= tau) != expected).any()


def test_scores_are_those_of_each_layer_of_a_stack():
    case = CASES["scanned"]
    h = np.random.default_rng(4).uniform(0.1, 1.0, size=(3, 16, 6)) * np.array([1e-3, 1.0, 1e3])[:, None, None]
    h[1, :, 2] *= 1e-4
    size = np.abs(h).mean(axis=1)
    expected = size / size.mean(axis=1, keepdims=True) <= 0.025
    assert expected.sum() == 1
    assert (size / size.mean() <= 0.025).sum() > 6, "a control: over all layers together"
    surgery = RecycleDormant(case.units, case.init, lambda state: {"layers/h": jnp.asarray(h, jnp.float32)})
    state = state_of(case.params(), SGD)
    after, _ = fsh.operate(state, surgery, key=KEY)
    old, new, drawn = (flat(one) for one in (state.params, after.params, case.init(KEY)))
    for path, mark in touched("scanned", {"layers/h": expected}).items():
        np.testing.assert_array_equal(new[path], np.where(mark == 2, 0, np.where(mark == 1, drawn[path], old[path])))


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_a_layer_without_any_activity_is_left_alone_unless_it_is_asked_for(tau):
    kept, record = dormant_in(np.zeros((4, 8), np.float32), tau=tau)
    assert not kept.any()
    assert (float(record.figures["dormant/share/h"]), float(record.figures["dormant/recycled/h"])) == (1, 0)
    renewed, record = dormant_in(np.zeros((4, 8), np.float32), tau=tau, dead_layers="recycle")
    assert renewed.all()
    assert float(record.figures["dormant/recycled/h"]) == 8


def test_activities_that_are_no_numbers_recycle_nothing():
    assert not dormant_in(np.full((4, 8), np.nan, np.float32))[0].any()


# Runs.


def tiny_activations(state, batch):
    return {"h": jax.nn.relu(batch @ state.params["a"]["kernel"] + state.params["a"]["bias"].reshape(1, -1))}


def batch_at(step):
    return jnp.asarray(np.random.default_rng(step).normal(size=(8, 3)), jnp.float32)


RECYCLE = RecycleDormant(GROUP, tiny_init, tiny_activations, tau=0.6)


def recycling(surgery=RECYCLE, when=None):
    hooks = fsh.SurgeryHooks(seed=5)
    hooks.add("redo", surgery, params="**", when=when or fsh.every(2))
    return hooks


def test_the_host_and_the_graph_do_the_same():
    host, graph = recycling(), recycling()
    one = other = tiny_state(optax.sgd(0.1, momentum=0.9)).replace(step=jnp.int32(0))
    inside = jax.jit(lambda state, batch: graph.in_graph(state, batch=batch))
    other = graph.init(other)
    for step in range(1, 5):
        one, other = (state.replace(step=jnp.int32(step)) for state in (one, other))
        one, other = host(step, one, batch=batch_at(step)), inside(other, batch_at(step))
    assert_bitwise_equal((one.params, one.opt_state), (other.params, other.opt_state))
    graph.collect(other)
    told = [
        [record.figures["dormant/recycled/h"] for record in hooks.ledger.records if record.event == "settled"]
        for hooks in (host, graph)
        if hooks.flush() is None
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 2
    assert all(0 < float(count) < 8 for count in told[0])


def test_activations_are_computed_only_when_the_hook_is_due():
    traced = []

    def activations(state, batch):
        traced.append(batch.shape)
        return tiny_activations(state, batch)

    hooks = recycling(RecycleDormant(GROUP, tiny_init, activations), fsh.at(3))
    state = tiny_state().replace(step=1)
    state = hooks(1, state, batch=batch_at(1))
    looked = len(traced)
    assert hooks(2, state.replace(step=2), batch=batch_at(2)).params is state.params
    assert len(traced) == looked


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_same_units_are_recycled(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    alone, batch = tiny_state(), batch_at(1)
    units = {"a/kernel": P(None, "data"), "a/bias": P("data"), "b/kernel": P("data", None), "b/bias": P()}
    spread = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: place(leaf, next((s for p, s in units.items() if p == "/".join(
            key.key for key in keys[-2:] if hasattr(key, "key"))), P())), alone
    )  # fmt: skip

    def activations(state, batch):
        if kind is AxisType.Explicit:  # a user's own model says how its contractions lie
            whole = NamedSharding(mesh, P())
            gathered = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, whole), state.params["a"])
            state = state.replace(params={**state.params, "a": gathered})
        return tiny_activations(state, batch)

    surgery = RecycleDormant(GROUP, tiny_init, activations, tau=0.6)
    one, _ = fsh.operate(
        alone, dataclasses.replace(surgery, activations=tiny_activations), key=KEY, inputs={"batch": batch}
    )
    other, _ = fsh.operate(spread, surgery, key=KEY, inputs={"batch": place(batch, P("data", None))})
    for a, b, was in zip(*map(jax.tree.leaves, (one.params, other.params, spread.params)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.sharding.is_equivalent_to(was.sharding, b.ndim)
    assert not np.asarray(one.params["b"]["kernel"]).all()


# The sizes of updates.


def long_run():
    """A state as it is late in a run: complete moments, and a count that says so."""
    tx = optax.adam(1e-3)
    state = fsh.TrainState.create(apply_fn=None, params=tiny_init(jax.random.key(3)), tx=tx)
    state, _ = trained(state, 400)
    adam = state.opt_state[0]
    complete = jax.tree.map(lambda nu: nu / (1 - 0.999**400), adam.nu)
    return state.replace(opt_state=(adam._replace(nu=complete, count=jnp.int32(100_000)), *state.opt_state[1:]))


@functools.partial(jax.jit, static_argnums=1)
def trained(state, steps):
    def loss(params, x, y):
        return jnp.mean((tiny_activations(state.replace(params=params), x)["h"] @ params["b"]["kernel"] - y) ** 2)

    def step(state, key):
        x, y = jax.random.normal(key, (8, 3)), jax.random.normal(jax.random.fold_in(key, 1), (8, 2))
        new = state.apply_gradients(grads=jax.grad(loss)(state.params, x, y))
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b) / 1e-3, new.params, state.params)
        return new, moved

    return jax.lax.scan(step, state, jax.random.split(jax.random.key(8), steps))


def test_the_first_updates_of_recycled_elements_are_small_unless_moments_are_zero():
    """The hazard of a shared step count at b2 = 0.999: 3.2 learning rates at once, if both moments are zero."""
    state, highest = long_run(), {}
    surgery = RecycleDormant(GROUP, tiny_init, lambda state: {"h": jnp.where(jnp.arange(8) < 2, 0.0, 1.0)[None]})
    for fresh in ("mean", "init"):
        after, _ = fsh.operate(state, surgery, key=KEY, fresh=fresh)
        moved = trained(after, 50)[1]
        sizes = np.concatenate([np.asarray(moved["a"]["kernel"])[:, :, :2].reshape(50, -1),
                                np.asarray(moved["a"]["bias"])[:, :2],
                                np.asarray(moved["b"]["kernel"])[:, :2].reshape(50, -1)], axis=1)  # fmt: skip
        highest[fresh] = np.percentile(sizes, 99, axis=1).max()
        assert not after.params["b"]["kernel"][:2].any()
    assert highest["init"] > 3
    assert highest["mean"] < highest["init"] / 2


# Shrink and perturb, and resets on a period.


def test_shrink_and_perturb_by_a_hook_with_norms_left_out():
    case = CASES["normed"]
    state = state_of(case.params())
    hooks = fsh.SurgeryHooks(seed=5)
    hooks.add("warm", ShrinkAndPerturb(case.init, 0.25, 0.5), params="**", exclude="**/scale", when=fsh.at(3))
    after = hooks(3, state.replace(step=3))
    drawn, old, new = flat(case.init(key_of("warm", 3))), flat(state.params), flat(after.params)
    for path, leaf in old.items():
        expected = leaf if path.endswith("scale") else 0.25 * leaf + 0.5 * drawn[path]
        np.testing.assert_allclose(new[path], expected, rtol=1e-6, atol=1e-7, err_msg=path)
    assert_bitwise_equal(state.opt_state, after.opt_state)


def key_of(hook, step, seed=5):
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (zlib.crc32(hook.encode()), step):
        key = jax.random.fold_in(key, number)
    return key


def test_resets_of_the_last_layer_on_a_period_leave_the_others_and_their_slots_alone():
    """As against the primacy bias: nothing of what is kept changes, and each reset is another draw."""
    case = CASES["mlp"]
    state = state_of(case.params())
    hooks = fsh.SurgeryHooks(seed=5)
    hooks.add("reset", Reinit(case.init), params="Dense_2/*", when=fsh.every(3), fresh="init")
    train = jax.jit(
        lambda state: state.apply_gradients(grads=jax.grad(lambda p: jnp.mean(case.output(p) ** 2))(state.params))
    )
    drawn = []
    for step in range(1, 8):
        before = train(state)
        state = hooks(step, before.replace(step=step))
        if step % 3:
            assert state.params is before.params
            continue
        expected = case.init(key_of("reset", step))["Dense_2"]
        assert_bitwise_equal(state.params["Dense_2"], expected)
        drawn.append(np.asarray(expected["kernel"]))
        kept = lambda tree: {name: tree[name] for name in ("Dense_0", "Dense_1")}  # noqa: E731
        assert_bitwise_equal(kept(state.params), kept(before.params))
        for slot in ("mu", "nu"):
            old, new = (getattr(one.opt_state[0], slot) for one in (before, state))
            assert_bitwise_equal(kept(new), kept(old))
            assert not any(leaf.any() for leaf in jax.tree.leaves(new["Dense_2"]))
        assert_bitwise_equal(state.opt_state[0].count, before.opt_state[0].count)
    assert (drawn[0] != drawn[1]).all()


# Errors.

WRONG = {
    "no init": (lambda: RecycleDormant(GROUP, None), r"RecycleDormant\(init=...\) is the model's init.*None"),
    "tau": (lambda: RecycleDormant(GROUP, tiny_init, tau=-0.1), r"\(tau=...\) must be a number, at least 0.*-0.1"),
    "no tau": (lambda: RecycleDormant(GROUP, tiny_init, tau=True), r"\(tau=...\) must be a number"),
    "dead": (lambda: RecycleDormant(GROUP, tiny_init, dead_layers="keeps"), r"unknown. Found: 'keeps'"),
    "shrink": (lambda: ShrinkAndPerturb(tiny_init, shrink=1.5), r"\(shrink=...\) must be a number, from 0 to 1"),
    "perturb": (lambda: ShrinkAndPerturb(tiny_init, perturb=float("inf")), r"\(perturb=...\) must be a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_made(name):
    make, says = WRONG[name]
    with pytest.raises(SurgeryFunctionError, match=says):
        make()


def test_units_are_checked_at_the_first_call():
    hooks = fsh.SurgeryHooks()
    hooks.add("redo", RECYCLE, params="*/kernel", when=fsh.at(1_000))
    with pytest.raises(UnitsError, match=r"hook 'redo', path 'a/bias'.*not selected"):
        hooks(1, tiny_state().replace(step=1), batch=batch_at(1))
    with pytest.raises(UnitsError, match=r"have one activation"):
        RecycleDormant((GROUP, GROUP), tiny_init)


def test_a_draw_of_another_model_is_refused():
    surgery = RecycleDormant(GROUP, lambda key: {"a": {"kernel": jnp.ones((3, 8))}}, tiny_activations)
    with pytest.raises(
        SurgeryFunctionError, match=r"path 'a/bias': RecycleDormant\(init=...\) returned no such"
    ) as caught:
        fsh.operate(tiny_state(), surgery, key=KEY, inputs={"batch": batch_at(1)})
    assert caught.value.path == "a/bias"
