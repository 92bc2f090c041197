"""Continual backpropagation against a loop in NumPy: which units are replaced when, and what is remembered of them."""

from __future__ import annotations

import fractions
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from unit_cases import CASES, flat, state_of, touched

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import SurgeryFunctionError
from flax_surgery_hooks.surgeries import ContinualBackprop
from flax_surgery_hooks.units import Units

SHAPES = {"a/kernel": (3, 8), "a/bias": (8,), "b/kernel": (8, 2), "b/bias": (2,)}
GROUP = Units("h", {"a/kernel": 1, "a/bias": 0}, {"b/kernel": 0})
STEPS = 40


def init(key):
    keys = dict(zip(SHAPES, jax.random.split(key, 4), strict=True))
    made = {path: 0.5 * jax.random.normal(keys[path], shape) for path, shape in SHAPES.items()}
    return {one: {leaf: made[f"{one}/{leaf}"] for leaf in ("kernel", "bias")} for one in "ab"}


def start(tx=None):
    return state_of(init(jax.random.key(3)), tx or optax.sgd(0.1)).replace(step=jnp.int32(0))


def done_at(step, units=8):
    """What the units do at a step: some more than others, and most of them some of the time."""
    rng = np.random.default_rng(step)
    return np.maximum(0, rng.normal(size=(5, 4, units)) + np.linspace(-1, 1, units)).astype(np.float32)


def drift_at(step):
    """What training adds to the outgoing kernel, so that a unit that was replaced becomes of use."""
    return np.random.default_rng(1_000 + step).normal(size=(8, 2)).astype(np.float32) / 4


def moved(state, step):
    kernel = state.params["b"]["kernel"] + jnp.asarray(drift_at(step))
    params = {**state.params, "b": {**state.params["b"], "kernel": kernel}}
    return state.replace(step=jnp.int32(step), params=params)


def key_at(step, seed=5):
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (zlib.crc32(b"cbp"), step):
        key = jax.random.fold_in(key, number)
    return key


def run(surgery, steps=STEPS, state=None, way="host", quick=True):
    """States after each step, in which the outgoing kernel drifts and the hook fires, and the hooks."""
    hooks = fsh.SurgeryHooks(seed=5)
    hooks.add("cbp", surgery, params="**", when=fsh.every(1), **({"guard": "off", "figures": False} if quick else {}))
    state = hooks.init(start() if state is None else state, **({"fires": 0} if way == "host" else {}))
    inside = jax.jit(lambda state, done: hooks.in_graph(state, activations=done))
    states = [state]
    for step in range(1, steps + 1):
        state, done = moved(state, step), {"h": jnp.asarray(done_at(step))}
        state = hooks(step, state, activations=done) if way == "host" else inside(state, done)
        states.append(state)
    hooks.collect(states[-1])
    hooks.flush()
    return states, hooks


def simulate(*, rate, maturity, decay, compensate=False, steps=STEPS, forget=False):
    """The algorithm in a loop, one unit at a time: leaves and memory after each step, and who was replaced when."""
    leaves = {path: leaf.astype(np.float64) for path, leaf in flat(start().params).items()}
    utility, mean, age, owed = np.zeros(8), np.zeros(8), np.zeros(8, int), fractions.Fraction(0)
    history, told = [], []
    for step in range(1, steps + 1):
        h = done_at(step).astype(np.float64).reshape(-1, 8)
        leaves["b/kernel"] += drift_at(step)
        for unit in range(8):
            age[unit] += 1
            use = np.abs(h[:, unit]).mean() * np.abs(leaves["b/kernel"][unit]).sum()
            utility[unit] = decay * utility[unit] + (1 - decay) * use
            mean[unit] = decay * mean[unit] + (1 - decay) * h[:, unit].mean()
        mature = [unit for unit in range(8) if age[unit] > maturity]
        owed += fractions.Fraction(str(rate)) * len(mature)
        count, owed = divmod(owed, 1)
        worst = sorted(mature, key=lambda unit: (utility[unit] / (1 - decay ** age[unit]), unit))[:count]
        drawn = flat(init(key_at(step)))
        for unit in worst:
            if compensate:
                leaves["b/bias"] += (0 if forget else mean[unit] / (1 - decay ** age[unit])) * leaves["b/kernel"][unit]
            leaves["a/kernel"][:, unit] = drawn["a/kernel"][:, unit]
            leaves["a/bias"][unit] = drawn["a/bias"][unit]
            leaves["b/kernel"][unit] = 0
            utility[unit] = mean[unit] = age[unit] = 0
        told.append(worst)
        history.append(({path: leaf.copy() for path, leaf in leaves.items()}, utility.copy(), mean.copy(), age.copy()))
    return history, told


SETTINGS = {
    "usual": {"rate": 0.1, "maturity": 5, "decay": 0.9},
    "compensated": {"rate": 0.1, "maturity": 5, "decay": 0.9, "compensate": True},
    "many at once": {"rate": 0.35, "maturity": 3, "decay": 0.99},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_step_is_that_of_the_loop(name):
    history, told = simulate(**SETTINGS[name])
    assert sum(map(len, told)) >= 8
    assert len({unit for worst in told for unit in worst}) >= 3, "the case is one: several units take turns"
    states, _ = run(ContinualBackprop(GROUP, init, **SETTINGS[name]))
    for state, (leaves, utility, mean, age) in zip(states[1:], history, strict=True):
        memory = state.surgery["memory"]["cbp"]["h"]
        np.testing.assert_array_equal(memory["age"], age)
        np.testing.assert_allclose(memory["utility"], utility, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(memory["mean"], mean, rtol=1e-5, atol=1e-7)
        for path, leaf in flat(state.params).items():
            np.testing.assert_allclose(leaf, leaves[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_unit_is_safe_until_it_is_mature():
    _, told = simulate(**SETTINGS["many at once"])
    states, _ = run(ContinualBackprop(GROUP, init, **SETTINGS["many at once"]))
    ages = np.stack([state.surgery["memory"]["cbp"]["h"]["age"] for state in states])
    born = [(step, unit) for step, unit in zip(*np.nonzero(ages[1:] == 0), strict=True)]
    assert born == sorted((step, unit) for step, worst in enumerate(told) for unit in worst)
    for unit in range(8):
        steps = [step for step, one in born if one == unit]
        assert all(later - earlier > 3 for earlier, later in itertools.pairwise(steps))
    assert min(step for step, _ in born) == 3, "the fourth fire is the first with mature units"


@pytest.mark.parametrize("rate", [0.1, 0.03, 1e-2])
def test_as_many_are_replaced_as_the_rate_says_to_the_unit(rate):
    """At each of 200 steps floor(rate * n * T), where adding up float32 shares would be one off somewhere."""
    surgery = ContinualBackprop(GROUP, init, rate=rate, maturity=0)
    leaves = {path: jnp.asarray(leaf) for path, leaf in flat(start().params).items()}
    memory = surgery.init_memory(leaves)

    def fire(memory, done):
        found = surgery.derived["replaced"](leaves, memory, {"h": done})["h"]
        return {"h": found["memory"]}, jnp.sum(found["chosen"])

    done = jnp.stack([jnp.asarray(done_at(step)) for step in range(200)])
    counts = np.cumsum(jax.lax.scan(fire, memory, done)[1])
    exact = fractions.Fraction(str(rate)) * 8
    np.testing.assert_array_equal(counts, [int(exact * fires) for fires in range(1, 201)])
    if rate == 0.1:
        owed, one = np.float32(0), np.float32(0.1) * np.float32(8)
        floats = []
        for _ in range(200):
            owed += one
            floats.append(int(owed))
        assert (np.array(floats) != counts).any() or owed != 160


def test_a_rate_is_exact_where_what_is_owed_fits_and_near_where_not():
    surgery = ContinualBackprop(GROUP, init, rate=1e-4)
    for units in (1, 512, 4096, 2**17):
        assert surgery._fraction(units) == (1, 10_000)
    part, whole = ContinualBackprop(GROUP, init, rate=0.123457)._fraction(2**17)
    assert part / whole == pytest.approx(0.123457, rel=1e-4)
    assert part * 2**17 + whole < 2**31


def test_what_the_next_layer_gets_stays_on_average():
    """With averages of one batch, exactly; a mean that is forgotten before it is used, as in the reference, shows."""
    surgery = ContinualBackprop(GROUP, init, rate=0.25, maturity=0, decay=0.0, compensate=True)
    (before, after), _ = run(surgery, steps=1)
    h = done_at(1).astype(np.float64).reshape(-1, 8)
    old, new = flat(moved(before, 1).params), flat(after.params)
    replaced = np.flatnonzero(after.surgery["memory"]["cbp"]["h"]["age"] == 0)
    assert len(replaced) == 2
    wanted = (h @ old["b/kernel"] + old["b/bias"]).mean(0)
    np.testing.assert_allclose((h @ new["b/kernel"] + new["b/bias"]).mean(0), wanted, rtol=1e-5)
    assert np.abs((h @ new["b/kernel"] + old["b/bias"]).mean(0) - wanted).max() > 1e-2
    forgotten = simulate(rate=0.25, maturity=0, decay=0.0, compensate=True, steps=1, forget=True)[0][0][0]
    np.testing.assert_array_equal(forgotten["b/bias"], old["b/bias"])


@pytest.mark.parametrize("name", ["cnn", "channels_first", "scanned"])
def test_compensation_through_a_flattened_convolution_and_in_a_stack(name):
    """The bias takes over the sum of outgoing * mean, in loops over indices."""
    case = CASES[name]
    (group,) = case.units
    state = state_of(case.params(), optax.sgd(0.1))
    h = case.run(state.params)[1]
    surgery = ContinualBackprop(group, case.init, lambda state: h, rate=0.25, maturity=0, decay=0.0, compensate=True)
    after, _ = fsh.operate(state, surgery, key=jax.random.key(1))
    old, new = flat(state.params), flat(after.params)
    h = np.asarray(h[group.activation], np.float64)
    mean = h.mean(axis=tuple(range(int(group.stacked), h.ndim - 1)))
    ((path, place),) = group.outgoing.items()
    bias = path.replace("kernel", "bias")
    expected = old[bias].astype(np.float64)
    chosen = ~new[next(iter(group.outgoing))].any(axis=-1)
    axis, order = (place, "tile") if isinstance(place, int) else place
    n, times = mean.shape[-1], old[path].shape[axis] // mean.shape[-1]
    for index in np.ndindex(old[path].shape):
        unit = index[axis] % n if order == "tile" else index[axis] // times
        if chosen[index[:-1]]:
            at = (index[0], index[-1]) if group.stacked else (index[-1],)
            expected[at] += old[path][index] * mean[(index[0], unit) if group.stacked else unit]
    np.testing.assert_allclose(new[bias], expected, rtol=1e-4, atol=1e-5)
    assert (new[bias] != old[bias]).any()


def test_only_what_is_replaced_changes_and_starts_anew():
    name = "scanned"
    case = CASES[name]
    state = state_of(case.params())
    made = case.run(state.params)[1]
    surgery = ContinualBackprop(case.units, case.init, lambda state: made, rate=0.25, maturity=0)
    after, record = fsh.operate(state, surgery, key=jax.random.key(1), fresh="init")
    old, new = flat(state.params), flat(after.params)
    chosen = {}
    for group in case.units:
        h = np.abs(np.asarray(made[group.activation], np.float64))
        size = h.mean(axis=tuple(range(int(group.stacked), h.ndim - 1)))
        ((path, _),) = group.outgoing.items()
        use = size * np.abs(old[path]).sum(axis=-1)
        count = use.shape[-1] // 4
        chosen[group.activation] = use.argsort(axis=-1).argsort(axis=-1) < count
        assert float(record.figures[f"units/replaced/{group.activation}"]) == chosen[group.activation].sum() > 0
        assert float(record.figures[f"units/mature/{group.activation}"]) == use.size
    drawn = flat(case.init(jax.random.key(1)))
    for path, mark in touched(name, chosen).items():
        expected = np.where(mark == 2, 0, np.where(mark == 1, drawn[path], old[path]))
        np.testing.assert_array_equal(new[path], expected, err_msg=path)
        for slot in ("mu", "nu"):
            before, now = (flat(getattr(one.opt_state[0], slot))[path] for one in (state, after))
            np.testing.assert_array_equal(now, np.where(mark > 0, 0, before), err_msg=path)


def test_the_host_and_the_graph_do_the_same():
    surgery = ContinualBackprop(GROUP, init, rate=0.05, maturity=2)
    tx = optax.sgd(0.1, momentum=0.9)
    host, _ = run(surgery, 12, start(tx), quick=False)
    graph, _ = run(surgery, 12, start(tx), way="graph", quick=False)
    for one, other in zip(host, graph, strict=True):
        ages = (state.surgery["memory"]["cbp"]["h"]["age"] for state in (one, other))
        np.testing.assert_array_equal(*ages)
        for of in (lambda s: s.params, lambda s: s.opt_state, lambda s: s.surgery["memory"]):
            # Some releases of XLA sum over the batch in another order within a condition.
            for a, b in zip(jax.tree.leaves(of(one)), jax.tree.leaves(of(other)), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8)
    assert (np.asarray(host[-1].surgery["memory"]["cbp"]["h"]["age"]) < 12).any()


@pytest.mark.parametrize("way", ["host", "graph"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_same_units_are_replaced(kind, way):
    """Units lie on eight devices, one on each."""
    mesh = jax.make_mesh((8,), ("units",), axis_types=(kind,))
    specs = {"a/kernel": P(None, "units"), "a/bias": P("units"), "b/kernel": P("units", None), "b/bias": P()}
    surgery = ContinualBackprop(GROUP, init, rate=0.1, maturity=2, decay=0.9)
    alone = start(optax.sgd(0.1, momentum=0.9))

    def place(keys, leaf):
        path = "/".join(key.key for key in keys[-2:] if hasattr(key, "key"))
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(path, P())))

    spread = jax.tree_util.tree_map_with_path(place, alone)
    one, _ = run(surgery, 12, alone, way=way, quick=False)
    other, _ = run(surgery, 12, spread, way=way, quick=False)
    np.testing.assert_array_equal(*(states[-1].surgery["memory"]["cbp"]["h"]["age"] for states in (one, other)))
    assert (np.asarray(one[-1].surgery["memory"]["cbp"]["h"]["age"]) < 12).any()
    for a, b, was in zip(*map(jax.tree.leaves, (one[-1].params, other[-1].params, spread.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert b.sharding.is_equivalent_to(was.sharding, b.ndim)


WRONG = {
    "rate": ({"rate": 1.5}, r"ContinualBackprop\(rate=...\) must be a number, from 0 to 1. Found: 1.5"),
    "decay": ({"decay": 1}, r"decay=1\) would never learn"),
    "maturity": ({"maturity": 1.5}, r"\(maturity=...\) is a number of fires. Found: 1.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_made(name):
    options, says = WRONG[name]
    with pytest.raises(SurgeryFunctionError, match=says):
        ContinualBackprop(GROUP, init, **options)


def test_compensation_needs_a_bias():
    hooks = fsh.SurgeryHooks()
    hooks.add("cbp", ContinualBackprop(GROUP, init, compensate=True), params="**", exclude="b/bias", when=fsh.every(1))
    with pytest.raises(SurgeryFunctionError, match=r"needs a bias beside each outgoing kernel.*Found: no b/bias"):
        hooks(1, hooks.init(start().replace(step=1)), activations={"h": jnp.asarray(done_at(1))})
