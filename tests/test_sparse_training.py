"""SET and RigL: which weights give way to which, how many, and where the new ones start from."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from config_cases import parse
from sparse_cases import (
    PATHS,
    SHAPE,
    assert_masks,
    best,
    best_each,
    drawn,
    kernels,
    magnitude,
    make_state,
    masks_in,
    numbers,
    on_device,
    within,
)
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import SurgeryError
from flax_surgery_hooks.surgeries import SET, RigL

W, TIED, G = numbers(0), numbers(1, tied=True), numbers(2)
HELD = best_each(numbers(3), 24)


def exchanged(values: Any, held: Any, growth: Any, moved: int) -> tuple[Any, Any, Any]:
    """The masks after a fire, what stays of the old ones, and what grows."""
    kept = {path: int(mask.sum()) - moved for path, mask in held.items()}
    stay = best_each(within(magnitude(values), held), kept)
    grown = best_each(within(growth, {path: ~mask for path, mask in stay.items()}), moved)
    return {path: stay[path] | grown[path] for path in stay}, stay, grown


# Which.

FALLING = {0: 7, 25: 6, 50: 4, 75: 1, 99: 0, 100: 0, 170: 0}
"""Of 24 weights: 24 * 0.15 * (1 + cos(pi * step / 100)), to the nearest."""


def test_the_table_is_the_cosine():
    assert {step: round(24 * 0.15 * (1 + np.cos(np.pi * min(step, 100) / 100))) for step in FALLING} == FALLING


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_the_smallest_weights_give_way_to_the_largest_growth_scores(tied, distribution):
    values = TIED if tied else W
    growth = {path: np.abs(numbers(4, tied=True)[path] if tied else G[path]) for path in PATHS}
    surgery = RigL(0.75, end=100, distribution=distribution)
    leaves, held, scores = on_device(values), on_device(HELD), on_device(growth)
    for step, moved in FALLING.items():
        found = surgery.masks(leaves, held, scores, step=step)
        expected, stay, grown = exchanged(values, HELD, growth, moved)
        assert_masks(found, expected)
        assert_masks(surgery.masks(leaves, held, scores, step=jnp.int32(step)), expected)
        for path in PATHS:
            assert (found[path].sum(), stay[path].sum(), grown[path].sum()) == (24, 24 - moved, moved)
            others = ~stay[path] & ~grown[path]
            assert not moved or growth[path][grown[path]].min() >= growth[path][others].max()
        assert moved or all(np.array_equal(found[path], HELD[path]) for path in PATHS)


def test_what_is_dropped_can_grow_again_at_once():
    """The weights that are kept have the largest gradients of all: nothing moves."""
    growth = {path: np.abs(G[path]) + 10 * HELD[path] for path in PATHS}
    found = SET(0.75, fraction=0.5, anneal="constant").masks(
        on_device(W), on_device(HELD), on_device(growth), step=3
    )  # fmt: skip
    assert_masks(found, HELD)


@pytest.mark.parametrize(("end", "step", "moved"), [(None, 10**6, 12), (9, 8, 12), (9, 9, 0)])
def test_a_constant_fraction(end, step, moved):
    growth = {path: np.where(HELD[path], 0, np.abs(G[path]) + 1) for path in PATHS}
    surgery = SET(0.75, end=end, fraction=0.5, anneal="constant")
    found = surgery.masks(on_device(W), on_device(HELD), on_device(growth), step=step)
    assert_masks(found, exchanged(W, HELD, growth, moved)[0])
    assert {int((found[path] & ~HELD[path]).sum()) for path in PATHS} == {moved}


def test_sparsities_of_leaves():
    leaves = {"a/kernel": jnp.ones(SHAPE), "b/kernel": jnp.ones((4, 6))}
    key = jax.random.key(0)

    def counts(*sparsity, **options):
        return [int(mask.sum()) for mask in SET(*sparsity, end=1, **options).init_memory(leaves, key).values()]

    # eps * (20 + 10) = 60, half of the 120 weights.
    assert counts(0.5) == [40, 20]
    assert counts(0.5, distribution="uniform") == [48, 12]
    assert counts({"a/*": 0.75, "**": 0.5}) == [24, 12]
    assert counts() == [8, 4]  # 12 of 120


def ones_of(score: np.ndarray, sparsity: Any) -> np.ndarray:
    """The mask of `max(1, round(size * (1 - sparsity)))` ones at the highest scores."""
    ones = max(1, int(np.round(np.float32(score.size) * (1 - np.float32(sparsity)))))
    return score >= np.sort(score.ravel())[-ones]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.7])
def test_updates_of_jaxpruner(fraction):
    """Its rule written again: drop by magnitude among the active, then fill up by growth scores."""
    expected = {}
    for path in PATHS:
        size, score, mask = np.abs(W[path]), np.abs(G[path]), HELD[path]
        density = mask.mean(dtype=np.float32)
        left = ones_of(np.where(mask, size, size.min() - 1), 1 - density * (1 - np.float32(fraction)))
        expected[path] = ones_of(np.where(left, score.max() + 1, score), 1 - density)
    growth = on_device(magnitude(G))
    for surgery in (SET, RigL):
        made = surgery(0.75, fraction=fraction, anneal="constant")
        assert_masks(made.masks(on_device(W), on_device(HELD), growth, step=0), expected)


# Runs.

STEPS = 10
MOVED = {3: 9, 6: 3, 9: 0}
"""Of 24: 24 * 0.25 * (1 + cos(pi * step / 9)), to the nearest."""
ADAM, SGD = optax.adam(0.05), optax.sgd(0.05)
A = PATHS[0]
"""The one kernel of these runs that is sparse."""


def update(state: Any) -> Any:
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.cos(3 * leaf), state.params))


bare = jax.jit(update)


def gradients(state: Any, batch: Any) -> Any:
    """Other ones at each step: a fire is given those of its own."""
    return {"a": {"kernel": (1 + jnp.asarray(state.step) % 2 * jnp.flip(batch)) * batch}}


def growth_of(step: int) -> np.ndarray:
    return np.abs((1 + np.float32(step % 2) * np.flip(G[A])) * G[A])


SURGERIES = {
    "rigl": RigL(0.75, end=9, fraction=0.5, grads=gradients),
    "set": SET(0.75, end=9, fraction=0.5),
    "static": SET(0.75, fraction=0.0, anneal="constant"),
}


class Run:
    """A run of 10 steps: states after each, and those before and after each call of the hooks."""

    def __init__(self, name: str, way: str, fresh: str, tx: Any) -> None:
        self.hooks = fsh.SurgeryHooks(seed=11)
        self.hooks.add(name, SURGERIES[name], params=A, when=fsh.every(3), fresh=fresh)
        given = {"batch": jnp.asarray(G[A])} if name == "rigl" else {}
        state = self.hooks.init(make_state(W, tx), **({"fires": 0} if way == "host" else {}))
        state = self.hooks.observe(state)
        self.states, self.updated, self.fired = [state], [], {}
        if way == "host":
            step = jax.jit(lambda state, given: self.hooks.observe(update(state)))
        else:
            step = jax.jit(lambda state, given: self.hooks.in_graph(update(state), **given))
        for i in range(1, STEPS + 1):
            self.updated.append(bare(state))
            before = step(state, given)
            state = self.hooks(i, before, **given)
            self.fired[i] = (before, state)
            self.states.append(state)
        self.hooks.collect(state)
        self.hooks.flush()


_run = functools.cache(Run)


def run(name: str, way: str = "host", fresh: str = "mean", tx: Any = ADAM) -> Run:
    return _run(name, way, fresh, tx)


@pytest.fixture(params=["rigl host mean", "rigl graph mean", "set graph init"])
def each(request: Any) -> tuple[str, str, Run]:
    name, way, fresh = request.param.split()
    return name, fresh, run(name, way, fresh)


def folded(key: Any, *values: Any) -> Any:
    for value in values:
        key = jax.random.fold_in(key, np.uint32(zlib.crc32(value.encode()) if isinstance(value, str) else value))
    return key


def kernel(tree: Any) -> np.ndarray:
    return kernels(tree)[A]


def mask_in(state: Any, name: str) -> np.ndarray:
    assert list(masks_in(state, name)) == [A]
    return masks_in(state, name)[A]


def test_the_first_masks_are_drawn_at_random():
    start = run("rigl").states[0]
    expected = best(drawn(folded(jax.random.key(11), "rigl"), A), 24)
    np.testing.assert_array_equal(mask_in(start, "rigl"), expected)
    np.testing.assert_array_equal(kernel(start.params), np.where(expected, W[A], 0))
    np.testing.assert_array_equal(kernels(start.params)["b/kernel"], W["b/kernel"])


def test_masks_are_exchanged_at_each_fire_and_nowhere_else(each):
    name, _, ran = each
    for step in range(1, STEPS + 1):
        held, found = (mask_in(ran.states[i], name) for i in (step - 1, step))
        if step not in MOVED:
            np.testing.assert_array_equal(found, held)
            continue
        growth = growth_of(step) if name == "rigl" else drawn(folded(jax.random.key(11), "set", step), A)
        weights = np.where(held, kernel(ran.updated[step - 1].params), 0)
        expected, *_ = exchanged({A: weights}, {A: held}, {A: growth}, MOVED[step])
        np.testing.assert_array_equal(found, expected[A])
        assert found.sum() == 24
        assert (found != held).any() == (MOVED[step] > 0)


def test_weights_are_zero_outside_the_mask_and_where_they_are_grown(each):
    name, _, ran = each
    for step in range(1, STEPS + 1):
        held, found = (mask_in(ran.states[i], name) for i in (step - 1, step))
        weights = kernel(ran.states[step].params)
        np.testing.assert_array_equal(
            weights, np.where(held & found, kernel(ran.updated[step - 1].params), 0)
        )  # fmt: skip
        assert not np.signbit(weights[~(held & found)]).any()


def test_a_static_mask_stays():
    ran = run("static", "host", "mean", SGD)
    first = mask_in(ran.states[0], "static")
    assert first.sum() == 24
    for state, updated in zip(ran.states[1:], ran.updated, strict=True):
        np.testing.assert_array_equal(mask_in(state, "static"), first)
        np.testing.assert_array_equal(kernel(state.params), np.where(first, kernel(updated.params), 0))


def test_runs_in_graph_are_those_of_the_host():
    for found, expected in zip(run("rigl", "graph").states, run("rigl").states, strict=True):
        assert_bitwise_equal((found.params, found.opt_state), (expected.params, expected.opt_state))
        np.testing.assert_array_equal(mask_in(found, "rigl"), mask_in(expected, "rigl"))


@pytest.mark.parametrize("way", ["host", "graph"])
def test_figures(way):
    states = run("rigl").states
    records = {record.step: record for record in run("rigl", way).hooks.ledger.records if record.event == "settled"}
    assert sorted(records) == list(MOVED)
    for step, record in records.items():
        both = int((mask_in(states[step - 1], "rigl") & mask_in(states[step], "rigl")).sum())
        expected = {f"masks/{name}": value for name, value in (("sparsity", 0.75), ("overlap", both / 24))}
        expected |= {f"{name}/{A}": value for name, value in expected.items()}
        found = {name: value for name, value in record.figures.items() if name.startswith("masks/")}
        assert found == pytest.approx(expected, rel=1e-6)
        assert (both < 24) == (MOVED[step] > 0)


# Where grown weights start from.


def moments(state: Any) -> tuple[np.ndarray, np.ndarray]:
    return kernel(state.opt_state[0].mu), kernel(state.opt_state[0].nu)


def started(nu: np.ndarray, grown: np.ndarray, fresh: str) -> np.ndarray:
    """Second moments of what has grown: 0, or the mean of the others in their column."""
    others = np.where(grown, 0, nu.astype(np.float64)).sum(0) / (~grown).sum(0)
    return np.where(grown, 0.0 if fresh == "init" else np.broadcast_to(others, nu.shape), nu)


def complaints(before: Any, after: Any, grown: np.ndarray, fresh: str) -> list[str]:
    """What is wrong with Adam's moments (mu, nu) after a fire."""
    found = []
    (mu, nu), (new_mu, new_nu) = before, after
    if (mu[~grown].tobytes(), nu[~grown].tobytes()) != (new_mu[~grown].tobytes(), new_nu[~grown].tobytes()):
        found.append("others have changed")
    if new_mu[grown].any():
        found.append("first moments of what has grown")
    if not np.allclose(new_nu, started(nu, grown, fresh), rtol=1e-6, atol=0):
        found.append("second moments of what has grown")
    return found


def test_grown_weights_have_no_history_and_all_others_keep_theirs(each):
    name, fresh, ran = each
    for step in range(1, STEPS + 1):
        # The slots before the fire are those of the optimizer alone.
        before, after = moments(ran.updated[step - 1]), moments(ran.states[step])
        held, found = (mask_in(ran.states[i], name) for i in (step - 1, step))
        grown, lost = found & ~held, held & ~found
        assert complaints(before, after, grown, fresh) == []
        if not MOVED.get(step):
            assert_bitwise_equal(before, after)
            continue
        # What wrong ones do, it must see.
        other = "init" if fresh == "mean" else "mean"
        assert complaints(before, after, grown, other) == ["second moments of what has grown"]
        assert complaints(before, before, grown, fresh), "none start anew"
        both = tuple(np.where(lost, 0, moment) for moment in after)
        assert complaints(before, both, grown, fresh)[0] == "others have changed", "those of dropped ones do, too"
        assert complaints(before, after, lost, fresh), "others than those"


def fired(state: Any, batch: np.ndarray) -> Any:
    """A fire of the run's hooks by hand, with these gradients; at step 0, where 12 of 24 move."""
    return run("rigl").hooks.fire("rigl", state.replace(step=0), 0, batch=jnp.asarray(batch, jnp.float32))


def test_dropped_and_regrown_weights_keep_their_value_and_moments():
    state = run("rigl").fired[3][0]
    mask = mask_in(state, "rigl")
    after = fired(state, np.where(mask, 9, 1))
    assert_bitwise_equal((after.params, after.opt_state), (state.params, state.opt_state))
    np.testing.assert_array_equal(mask_in(after, "rigl"), mask)
    # And where gradients are largest elsewhere, all that are dropped give way.
    after = mask_in(fired(state, np.where(mask, 1, 9)), "rigl")
    assert ((after & ~mask).sum(), (after & mask).sum()) == (12, 12)


def test_growth_alone_leaves_the_output_as_it_is():
    """The smallest weights are zero already, so that what is dropped changes nothing, nor what is grown."""
    inputs = jnp.asarray(numbers(8)[A].T)
    output = jax.jit(lambda params: jnp.tanh(inputs @ params["a"]["kernel"]) @ params["b"]["kernel"].T)
    state = run("rigl").fired[3][0]
    mask, weights = mask_in(state, "rigl"), kernel(state.params)
    small = best(np.where(mask, -np.abs(weights), -np.inf), 12)
    params = {**state.params, "a": {**state.params["a"], "kernel": jnp.asarray(np.where(small, 0, weights))}}
    state = state.replace(params=params)
    after = fired(state, np.where(mask, 1, 9))
    assert (mask_in(after, "rigl") & ~mask).sum() == 12
    assert_bitwise_equal(after.params, params)
    assert_bitwise_equal(output(after.params), output(params))
    before, after = run("rigl").fired[3]
    assert not np.array_equal(output(before.params), output(after.params)), "dropping does change it"


def test_by_operate_others_grow_than_were_drawn_at_first():
    surgery = SET(0.75, fraction=0.5, anneal="constant")
    state, record = fsh.operate(make_state(W), surgery, params=A, key=jax.random.key(1))
    assert 0.5 <= record.figures["masks/overlap"] < 1
    assert (kernel(state.params) != 0).sum() == round(24 * float(record.figures["masks/overlap"]))


def test_layers_of_a_stacked_leaf_are_leaves():
    stack = jnp.asarray(np.stack([W["a/kernel"], 10 * W["b/kernel"]]))
    params = {"layers": {"mlp": {"kernel": stack}}}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.05, momentum=0.9))
    trace = jax.tree.map(lambda leaf: leaf + 1, state.opt_state)
    hooks = fsh.SurgeryHooks()
    surgery = RigL(0.75, fraction=0.5, anneal="constant")
    hooks.add("rigl", surgery, params="layers/**/kernel[:]", when=fsh.at(1))
    state = hooks.observe(hooks.init(state.replace(step=1, opt_state=trace), fires=0))
    held = masks_in(state, "rigl")
    fired = hooks(1, state, grads={"layers": {"mlp": {"kernel": jnp.asarray(np.stack([G[path] for path in PATHS]))}}})
    found = masks_in(fired, "rigl")
    names = [f"layers/mlp/kernel[{layer}]" for layer in (0, 1)]
    assert list(found) == names
    for layer, (name, path) in enumerate(zip(names, PATHS, strict=True)):
        old = np.asarray(state.params["layers"]["mlp"]["kernel"][layer])
        size = {name: np.abs(G[path])}
        assert_masks({name: found[name]}, exchanged({name: old}, {name: held[name]}, size, 12)[0])
        grown = found[name] & ~held[name]
        moved = fired.opt_state[0].trace["layers"]["mlp"]["kernel"][layer]
        np.testing.assert_array_equal(moved, np.where(grown, 0, trace[0].trace["layers"]["mlp"]["kernel"][layer]))


def test_configs():
    rigl = fsh.config.hook("rigl", end=75_000, every=100, stop=75_000, params="**/kernel")
    small = fsh.config.hook("set", end=50, every=10, params="**/kernel", fresh="init")
    [spec, other] = fsh.config.build(parse({"a": rigl, "b": small}, "a.sparsity=0.8", "b.anneal=constant"))
    assert (spec.surgery, other.surgery) == (RigL(0.8, 75_000), SET(0.9, 50, anneal="constant"))
    assert other.fresh == "init"
    hooks = fsh.SurgeryHooks.from_config({"a": rigl, "b": small})
    assert fsh.SurgeryHooks.from_config(hooks.to_config()).to_config() == hooks.to_config()
    with pytest.raises(SurgeryError, match="A cosine falls to 0 at some step"):
        fsh.SurgeryHooks.from_config({"a": fsh.config.hook("rigl", every=100, params="**")})
