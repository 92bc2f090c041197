"""Prune: which weights are kept, how many at each step, and that nothing else is touched."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from config_cases import parse
from flax import nnx
from sparse_cases import (
    PATHS,
    SHAPE,
    SIZE,
    assert_masks,
    best,
    best_each,
    best_of_all,
    differ,
    drawn,
    kernels,
    magnitude,
    make_state,
    masks_in,
    numbers,
    on_device,
    tree_of,
    within,
)
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import ScheduleError, SurgeryError
from flax_surgery_hooks.surgeries import Prune

W, TIED, G = numbers(0), numbers(1, tied=True), numbers(2)
LEAVES, TIED_LEAVES, GRADS = on_device(W), on_device(TIED), on_device(G)


# Scores and scopes.


@pytest.mark.parametrize("values", [W, TIED], ids=["", "tied"])
@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 96), (0.75, 24), (0.9, 10), (1.0, 1)])
def test_the_largest_weights_of_each_leaf_are_kept(values, sparsity, kept):
    assert_masks(Prune(sparsity).masks(on_device(values)), best_each(magnitude(values), kept))


@pytest.mark.parametrize("values", [W, TIED], ids=["", "tied"])
def test_under_global_scope_all_weights_compete(values):
    scaled = {"a/kernel": values["a/kernel"], "b/kernel": 2 * values["b/kernel"]}
    found = Prune(0.75, scope="global").masks(on_device(scaled))
    assert_masks(found, best_of_all(magnitude(scaled), 48))
    counts = {path: int(mask.sum()) for path, mask in found.items()}
    assert values is TIED or counts["b/kernel"] > counts["a/kernel"] > 0


def normed(scores: Any) -> dict[str, np.ndarray]:
    """Scores of a leaf over their norm."""
    return {path: score / np.linalg.norm(score.astype(np.float64)) for path, score in scores.items()}


def test_normalized_scores_know_no_scale():
    scaled = {"a/kernel": W["a/kernel"], "b/kernel": 3 * W["b/kernel"]}
    found = Prune(0.75, scope="global", normalize=True).masks(on_device(scaled))
    assert_masks(found, best_of_all(normed(magnitude(scaled)), 48))
    assert differ(found, best_of_all(magnitude(scaled), 48))


def test_normalized_scores_are_those_of_the_weights_that_are_left():
    held = best_each({path: -np.abs(value) for path, value in W.items()}, {"a/kernel": 30, "b/kernel": 90})
    found = Prune(0.75, scope="global", normalize=True).masks(LEAVES, held=on_device(held))
    left = {path: np.where(mask, np.abs(W[path]), 0) for path, mask in held.items()}
    assert_masks(found, best_of_all(within(normed(left), held), 48))


def test_random_masks_are_the_draw_of_the_key_and_nested():
    first, second = jax.random.key(3), jax.random.key(4)
    half = Prune(0.5, score="random").masks(LEAVES, key=first)
    assert_masks(half, best_each({path: drawn(first, path) for path in PATHS}, 48))
    found = Prune(0.75, score="random").masks(LEAVES, key=second, held=half)
    held = {path: np.asarray(mask) for path, mask in half.items()}
    assert_masks(found, best_each(within({path: drawn(second, path) for path in PATHS}, held), 24))
    assert differ(found, Prune(0.75, score="random").masks(LEAVES, key=first, held=half))
    assert all((held[path] | ~np.asarray(mask)).all() for path, mask in found.items())


def test_saliency_is_the_weight_times_its_gradient():
    found = Prune(0.75, score="saliency").masks(LEAVES, grads=tree_of(GRADS))
    expected = {path: np.abs(W[path] * G[path]) for path in PATHS}
    assert_masks(found, best_each(expected, 24))
    assert differ(found, best_each(magnitude(W), 24))
    assert_masks(Prune(0.75, score="saliency").masks(LEAVES, grads=GRADS), best_each(expected, 24))


def test_a_score_of_ones_own_is_given_what_it_asks_for():
    key, seen = jax.random.key(5), []

    def score(leaf, path, key, grad, step, bonus=0.0):
        seen.append((path, int(step), bonus))
        return jnp.abs(leaf) * (path == "a/kernel") + jnp.abs(grad) * step + jax.random.uniform(key, leaf.shape)

    found = Prune(0.75, score=score).masks(LEAVES, step=2, key=key, grads=tree_of(GRADS))
    scores = {path: np.abs(G[path]) * np.float32(2) + drawn(key, path) for path in PATHS}
    scores["a/kernel"] = np.abs(W["a/kernel"]) + np.abs(G["a/kernel"]) * np.float32(2) + drawn(key, "a/kernel")
    assert_masks(found, best_each(scores, 24))
    assert seen == [("a/kernel", 2, 0.0), ("b/kernel", 2, 0.0)]
    assert_masks(Prune(0.75, score=lambda leaf: -jnp.abs(leaf)).masks(LEAVES), best_each(
        {path: -value for path, value in magnitude(W).items()}, 24))  # fmt: skip


# Distributions and structures.


def test_sparsities_of_leaves():
    by_map = Prune({"a/*": 0.5, "**": 0.75}).masks(LEAVES)
    assert_masks(by_map, best_each(magnitude(W), {"a/kernel": 48, "b/kernel": 24}))
    other = {"a/kernel": W["a/kernel"], "b/kernel": W["b/kernel"][:4, :6]}
    # eps * (20 + 10) = 60, half of the 120 weights.
    erk = Prune(0.5, distribution="erk").masks(on_device(other))
    assert_masks(erk, best_each(magnitude(other), {"a/kernel": 40, "b/kernel": 20}))
    uniform = Prune(0.5).masks(on_device(other))
    assert_masks(uniform, best_each(magnitude(other), {"a/kernel": 48, "b/kernel": 12}))


def two_of_four(scores: np.ndarray) -> np.ndarray:
    """Of each four consecutive rows the two highest."""
    mask = np.zeros(scores.shape, bool)
    for row in range(0, scores.shape[0], 4):
        for column in range(scores.shape[1]):
            mask[row : row + 4, column] = best(scores[row : row + 4, column], 2)
    return mask


def blocks(scores: np.ndarray, kept: int) -> np.ndarray:
    means = np.zeros((4, 6))
    for row, column in np.ndindex(4, 6):
        means[row, column] = scores[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(np.float64).mean()
    return np.kron(best(means, kept), np.ones((2, 2), bool))


def channels(scores: np.ndarray, kept: int) -> np.ndarray:
    return np.tile(best(scores.astype(np.float64).mean(0), kept), (8, 1))


@pytest.mark.parametrize("values", [W, TIED], ids=["", "tied"])
def test_structures(values):
    leaves, size = on_device(values), magnitude(values)
    assert_masks(Prune(structure="2:4").masks(leaves), {path: two_of_four(size[path]) for path in PATHS})
    assert_masks(Prune(0.75, structure="block:2x2").masks(leaves), {path: blocks(size[path], 6) for path in PATHS})
    assert_masks(Prune(0.75, structure="channel").masks(leaves), {path: channels(size[path], 3) for path in PATHS})


def test_several_structures_in_one_hook():
    found = Prune(0.75, structure={"a/*": "2:4", "**": "block:2x2"}).masks(LEAVES)
    size = magnitude(W)
    assert_masks(found, {"a/kernel": two_of_four(size["a/kernel"]), "b/kernel": blocks(size["b/kernel"], 6)})


def test_several_hooks_of_one_run_prune_by_different_structures():
    hooks = fsh.SurgeryHooks()
    for name, structure in (("a", "2:4"), ("b", "channel")):
        surgery = Prune(None if name == "a" else 0.75, structure=structure)
        hooks.add(name, surgery, params=f"{name}/kernel", when=fsh.at(1))
    state = hooks(1, hooks.init(make_state(W), fires=0).replace(step=1))
    expected = {"a/kernel": two_of_four(np.abs(W["a/kernel"])), "b/kernel": channels(np.abs(W["b/kernel"]), 3)}
    assert_masks(masks_in(state, "a") | masks_in(state, "b"), expected)
    for path, weights in kernels(state.params).items():
        np.testing.assert_array_equal(weights, np.where(expected[path], W[path], 0))


# Schedules: how many are kept at each update. The tables are by hand.

CUBIC = {4: 96, 5: 96, 6: 81, 9: 48, 10: 41, 12: 31, 15: 25, 17: 24, 18: 24, 30: 24}
"""From 96 to 24 over steps 5 to 18: 96 - 72 * (1 - ((18 - step) / 13) ** 3), to the nearest."""


def test_the_table_is_the_cubic():
    exact = {step: 96 - 72 * (1 - (min(max(18 - step, 0), 13) / 13) ** 3) for step in CUBIC}
    assert {step: round(value) for step, value in exact.items()} == CUBIC
    assert all(abs(value - math.floor(value) - 0.5) > 0.01 for value in exact.values())


def counts(masks: Any) -> set[int]:
    return {int(np.sum(mask)) for mask in masks.values()}


def test_at_each_step_as_many_are_kept_as_the_ramp_says():
    surgery, held = Prune(0.75, begin=5, end=18), None
    for step, kept in CUBIC.items():
        masks = surgery.masks(LEAVES, step=step, held=held)
        assert counts(masks) == {kept}, step
        traced = surgery.masks(LEAVES, step=jnp.int32(step), held=held)
        assert_masks(masks, traced)
        assert held is None or all((held[path] | ~masks[path]).all() for path in PATHS)
        held = masks


def test_ramps_of_other_kinds():
    def all_counts(surgery, steps):
        return [counts(surgery.masks(LEAVES, step=step)).pop() for step in steps]

    assert all_counts(Prune(0.75), (0, 7)) == [24, 24]
    assert all_counts(Prune(0.75, end=8, power=1, initial=0.25), (0, 2, 4, 8)) == [72, 60, 48, 24]
    assert all_counts(Prune(0.75, schedule=lambda step: step / 4), (0, 1, 2, 3, 4, 9)) == [96, 78, 60, 42, 24, 24]
    # 4, 3, 2 of each 4, in 24 groups; 12, 6, 3 channels of 8 weights.
    ramp = {"schedule": lambda step: step / 3}
    assert all_counts(Prune(structure="2:4", **ramp), (0, 2, 3)) == [96, 72, 48]
    assert all_counts(Prune(0.75, structure="channel", **ramp), (0, 2, 3)) == [96, 48, 24]


@pytest.mark.parametrize(("end", "when"), [(18, fsh.every(5)), (8, fsh.every(4)), (8, fsh.at(8)), (8, fsh.at(2, 9))])
def test_schedules_that_reach_the_target(end, when):
    assert when.planned.next_step(end - 1) is not None
    fsh.SurgeryHooks().add("prune", Prune(0.5, end=end), params="**", when=when)


@pytest.mark.parametrize(
    ("end", "when", "says"),
    [
        (18, fsh.every(5, stop=17), ("last due at 15, and end=18", "due at step 18 or later, or end=15")),
        (8, fsh.at(2, 7), ("last due at 7, and end=8", "or end=7")),
        (2, fsh.every(1, max_fires=1), ("last due at 1", "or end=1")),
    ],
)
def test_schedules_that_end_before_the_target_are_refused(end, when, says):
    hooks = fsh.SurgeryHooks()
    with pytest.raises(ScheduleError, match="before the sparsity has reached its target") as caught:
        hooks.add("prune", Prune(0.5, end=end), params="**", when=when)
    assert [part for part in says if part not in str(caught.value)] == []
    assert caught.value.hook == "prune"
    hooks.add("prune", Prune(0.5), params="**", when=when)


# Runs: weights that are dropped stay at zero, and nothing else is touched.

ADAM, MOMENTUM = optax.adam(0.05), optax.sgd(0.05, momentum=0.9)
STEPS = 12
FIRES = {3: 96, 6: 42, 9: 25, 12: 24}
"""Kept at each fire of a ramp over steps 3 to 11: 24 + 72 * ((11 - step) / 8) ** 3, and the target after its end."""


def update(state: Any) -> Any:
    """A step of the optimizer on gradients that are zero nowhere."""
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params))


bare = jax.jit(update)


def pruning(surgery: Any = None, **options: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=1, writer=options.pop("writer", None))
    surgery = Prune(0.75, begin=3, end=11) if surgery is None else surgery
    hooks.add("prune", surgery, params="*/kernel", when=fsh.every(3), **options)
    return hooks


class Writer:
    """Remembers what is written."""

    def __init__(self) -> None:
        self.scalars: dict[int, dict[str, float]] = {}

    def write_scalars(self, step: int, scalars: Any) -> None:
        self.scalars.setdefault(step, {}).update({name: float(value) for name, value in scalars.items()})

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Run:
    """A run of 12 steps: states after each, those the optimizer alone made of the ones before, and what was told."""

    def __init__(self, way: str, tx: Any) -> None:
        self.writer = Writer()
        self.hooks = pruning(writer=self.writer)
        state = self.hooks.init(make_state(W, tx), **({"fires": 0} if way == "host" else {}))
        self.states, self.updated, self.fired = [state], [], []
        if way == "scan":
            step = lambda state, _: (self.hooks.in_graph(update(state)), None)  # noqa: E731
            state = jax.jit(lambda state: jax.lax.scan(step, state, length=STEPS)[0])(state)
            self.states.append(state)
            self.hooks.collect(state)
            return
        inside = self.hooks.observe if way == "host" else self.hooks.in_graph
        step = jax.jit(lambda state: inside(update(state)))
        for i in range(1, STEPS + 1):
            self.updated.append(bare(state))
            before = step(state)
            state = self.hooks(i, before)
            self.fired.append((before, state))
            self.states.append(state)
        self.hooks.collect(state)
        self.hooks.flush()


_run = functools.cache(Run)


def run(way: str, tx: Any = ADAM) -> Run:
    return _run(way, tx)


@pytest.fixture(params=[("host", ADAM), ("host", MOMENTUM), ("graph", ADAM)], ids=["host", "host momentum", "graph"])
def each(request: Any) -> Run:
    return run(*request.param)


def test_dropped_weights_are_zero_after_every_step_and_the_others_are_not(each):
    kept = 96
    for step, state in enumerate(each.states):
        kept = FIRES.get(step, kept)
        weights, masks = kernels(state.params), masks_in(state)
        for path in PATHS:
            assert masks[path].sum() == kept, step
            np.testing.assert_array_equal(weights[path] != 0, masks[path], err_msg=f"{path} at {step}")
            assert not np.signbit(weights[path][~masks[path]]).any()
        np.testing.assert_array_equal(state.params["a"]["bias"] != 1, step > 0)


def test_masks_are_those_of_the_weights_at_each_fire_and_nested(each):
    for step in FIRES:
        size = magnitude(kernels(each.updated[step - 1].params))
        held = masks_in(each.states[step - 1])
        found = masks_in(each.states[step])
        assert_masks(found, best_each(within(size, held), FIRES[step]))
        assert all((held[path] | ~found[path]).all() for path in PATHS)


def test_what_is_kept_is_what_the_optimizer_made_of_it(each):
    for before, updated in zip(each.states[1:], each.updated, strict=True):
        weights, wanted, masks = kernels(before.params), kernels(updated.params), masks_in(before)
        for path in PATHS:
            np.testing.assert_array_equal(weights[path], np.where(masks[path], wanted[path], 0))


def test_slots_are_those_of_the_optimizer_alone(each):
    for state, updated in zip(each.states[1:], each.updated, strict=True):
        assert_bitwise_equal(state.opt_state, updated.opt_state)


def test_a_fire_on_the_host_touches_no_slot():
    for before, after in run("host").fired:
        assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (before.opt_state, after.opt_state))))
        assert before.params["a"]["bias"] is after.params["a"]["bias"]


def test_the_dense_run_is_another():
    state = make_state(W, ADAM)
    for _ in range(STEPS):
        state = bare(state)
    pruned, masks = kernels(run("host").states[-1].params), masks_in(run("host").states[-1])
    for path, weights in kernels(state.params).items():
        assert (weights != 0).all()
        # The gradients of these runs are of each weight by itself.
        np.testing.assert_array_equal(pruned[path], np.where(masks[path], weights, 0))


@pytest.mark.parametrize("way", ["graph", "scan"])
def test_runs_in_graph_are_those_of_the_host(way):
    expected, found = run("host").states[-1], run(way).states[-1]
    assert_bitwise_equal((found.params, found.opt_state), (expected.params, expected.opt_state))
    assert_masks(masks_in(found), masks_in(expected))


# Figures.


def told(masks: Any, held: Any) -> dict[str, float]:
    """Sparsity and overlap, of all leaves and of each."""
    pairs = {"": (np.stack(list(masks.values())), np.stack(list(held.values())))}
    pairs |= {f"/{path}": (masks[path], held[path]) for path in PATHS}
    found = {}
    for name, (mask, before) in pairs.items():
        found[f"masks/sparsity{name}"] = 1 - mask.sum() / mask.size
        found[f"masks/overlap{name}"] = (mask & before).sum() / mask.sum()
    return found


@pytest.mark.parametrize("way", ["host", "graph", "scan"])
def test_the_ledger_and_the_writer_tell_of_sparsity_and_overlap(way):
    states = run("host").states
    settled = {record.step: record for record in run(way).hooks.ledger.records if record.event == "settled"}
    assert sorted(settled) == list(FIRES)
    for step in FIRES:
        expected = told(masks_in(states[step]), masks_in(states[step - 1]))
        figures = {name: value for name, value in settled[step].figures.items() if name.startswith("masks/")}
        assert figures == pytest.approx(expected, rel=1e-6)
        assert expected["masks/sparsity/a/kernel"] == pytest.approx(1 - FIRES[step] / SIZE)
        written = {name: value for name, value in run(way).writer.scalars[step].items() if "masks/" in name}
        assert written == pytest.approx({f"surgery/prune/{name}": value for name, value in expected.items()}, rel=1e-6)


def test_figures_are_the_same_bits_on_both_ways():
    def figures(way):
        records = [record for record in run(way).hooks.ledger.records if record.event == "settled"]
        return [{k: v for k, v in record.figures.items() if k.startswith("masks/")} for record in records]

    assert figures("graph") == figures("host") == figures("scan")


def test_a_preview_tells_the_figures_and_changes_nothing():
    state, hooks = run("host").fired[5][0], run("host").hooks
    record = hooks.preview("prune", state)
    expected = told(masks_in(run("host").states[6]), masks_in(state))
    assert {name: record.figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert_masks(masks_in(state), masks_in(run("host").states[5]))


# Masks alone.


def test_without_enforcement_weights_are_left_alone_and_masks_follow_them():
    hooks = fsh.SurgeryHooks()
    hooks.add("prune", Prune(0.75, enforce=False), params="*/kernel", when=fsh.every(1))
    state = hooks.init(make_state(W), fires=0)
    fired = hooks(1, state.replace(step=1))
    assert_bitwise_equal(fired.params, state.params)
    assert_masks(masks_in(fired), best_each(magnitude(W), 24))
    observed = jax.jit(hooks.observe)(fired)
    assert_bitwise_equal((observed.params, observed.surgery), (fired.params, fired.surgery))
    # Weights that were the smallest are the largest now: their masks come back.
    turned = {path: 1 / W[path] for path in PATHS}
    again = hooks(2, fired.replace(params=make_state(turned).params, step=2))
    assert_masks(masks_in(again), best_each(magnitude(turned), 24))
    assert not any((masks_in(again)[path] & masks_in(fired)[path]).any() for path in PATHS)
    assert_bitwise_equal(kernels(again.params), turned)


def test_slots_that_are_carried_stay_too():
    state = bare(make_state(W, ADAM))
    carried, _ = fsh.operate(state, Prune(0.75), params="*/kernel", opt_state="carry")
    assert_bitwise_equal(carried.opt_state, state.opt_state)
    assert_masks({p: w != 0 for p, w in kernels(carried.params).items()}, best_each(
        magnitude(kernels(state.params)), 24))  # fmt: skip


# Gradients that the surgery makes, or the loop passes.


def loss(params: Any, batch: Any) -> Any:
    return sum(jnp.vdot(batch[path], params[path[0]]["kernel"] ** 2) for path in PATHS)


def test_gradients_are_computed_of_the_state_and_a_batch_or_passed():
    batch = {path: np.abs(G[path]) for path in PATHS}
    # The gradient of batch * w**2 is 2 * batch * w.
    expected = best_each({path: np.abs(2 * batch[path] * W[path].astype(np.float64) ** 2) for path in PATHS}, 24)
    assert differ(expected, best_each(magnitude(W), 24))
    state = make_state(W, step=1)
    grads = tree_of({path: 2 * batch[path] * W[path] for path in PATHS})
    for options, given in (
        ({"grads": lambda state, batch: jax.grad(loss)(state.params, batch)}, {"batch": on_device(batch)}),
        ({}, {"grads": grads}),
    ):
        hooks = fsh.SurgeryHooks()
        surgery = Prune(0.75, score="saliency", **options)
        hooks.add("prune", surgery, params="*/kernel", when=fsh.at(1))
        assert_masks(masks_in(hooks(1, hooks.init(state, fires=0), **given)), expected)


# Configs.


def test_a_config_with_overrides_and_back():
    def built(*over: str) -> Any:
        config = fsh.config.hook("prune", sparsity=0.9, end=1000, every=100, params="**/kernel")
        [spec] = fsh.config.build(parse({"prune": config}, *(f"prune.{one}" for one in over)))
        return spec

    spec = built()
    assert (spec.surgery, spec.when, spec.params) == (Prune(0.9, end=1000), fsh.every(100), "**/kernel")
    over = ("sparsity=0.8", "scope=global", "normalize=True", "enforce=False", "begin=50", "power=1")
    assert built(*over).surgery == Prune(0.8, 1000, 50, power=1, scope="global", normalize=True, enforce=False)
    over = ("structure=block:4x4", "score=random", "distribution=erk")
    assert built(*over).surgery == Prune(0.9, 1000, structure="block:4x4", score="random", distribution="erk")
    for given in (
        Prune(0.9, end=1000),
        Prune({"a/*": 0.5, "**": 0.9}, structure={"b/*": "channel@0", "**": "block:2x2:max"}),
        Prune(None, structure="2:4", enforce=False),
    ):
        hooks = fsh.SurgeryHooks()
        hooks.add("prune", given, params="**/kernel", when=fsh.every(100))
        again = fsh.SurgeryHooks.from_config(hooks.to_config())
        assert [one.operation.edit.function for one in again._ordered()] == [given]
        assert again.to_config() == hooks.to_config()


def test_a_config_whose_schedule_ends_too_soon_is_refused():
    config = fsh.config.hook("prune", sparsity=0.9, end=1000, every=300, stop=900, params="**/kernel")
    with pytest.raises(SurgeryError, match="before the sparsity has reached its target"):
        fsh.SurgeryHooks.from_config({"prune": config})


# Parameters of other kinds.


def test_short_floats_are_scored_as_they_are():
    state = make_state(W)
    short = state.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params))
    values = {path: np.asarray(weights, np.float32) for path, weights in kernels(short.params).items()}
    hooks = pruning()
    found = hooks(12, hooks.init(short, fires=0).replace(step=12))
    assert_masks(masks_in(found), best_each(magnitude(values), 24))
    assert all(weights.dtype == jnp.bfloat16 for weights in kernels(found.params).values())
    observed = hooks.observe(found.replace(params=short.params))
    assert_bitwise_equal(observed.params, found.params)


def boxed(params: Any) -> Any:
    return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), params)


@pytest.mark.parametrize("wrap", [flax.core.freeze, boxed], ids=["FrozenDict", "boxed"])
def test_parameters_in_other_containers(wrap):
    plain = make_state(W)
    hooks = pruning(Prune(0.75))
    state = hooks.init(plain.replace(params=wrap(plain.params), opt_state=plain.tx.init(wrap(plain.params))), fires=0)
    found = hooks.observe(hooks(3, state.replace(step=3)))
    assert type(found.params) is type(state.params)
    assert jax.tree.structure(found.params) == jax.tree.structure(state.params)
    assert_masks(masks_in(found), best_each(magnitude(W), 24))
    weights = kernels(nn.meta.unbox(found.params))
    assert_masks({path: weights[path] != 0 for path in PATHS}, best_each(magnitude(W), 24))


def test_an_nnx_model():
    model = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    hooks = fsh.SurgeryHooks()
    hooks.add("prune", Prune(0.75), params="kernel", when=fsh.at(0))
    hooks.init(fsh.bind_nnx(model, optimizer), fires=0)
    weights = np.asarray(model.kernel[...])
    hooks(0, fsh.bind_nnx(model, optimizer))
    mask = best(np.abs(weights), 24)
    np.testing.assert_array_equal(optimizer.surgery["memory"]["prune"]["kernel"][...], mask)
    np.testing.assert_array_equal(model.kernel[...], np.where(mask, weights, 0))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 8)))))(model))
        hooks.observe(fsh.bind_nnx(model, optimizer))

    step(model, optimizer)
    np.testing.assert_array_equal(np.asarray(model.kernel[...]) != 0, mask)


def test_layers_of_a_stacked_leaf_are_leaves():
    stack = np.stack([W["a/kernel"], 10 * W["b/kernel"]])
    params = {"layers": {"mlp": {"kernel": jnp.asarray(stack)}}}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=ADAM).replace(step=jnp.int32(1))
    hooks = fsh.SurgeryHooks()
    hooks.add("prune", Prune(0.75, score="saliency"), params="layers/**/kernel[:]", when=fsh.at(1))
    grads = {"layers": {"mlp": {"kernel": jnp.asarray(np.stack([G["a/kernel"], G["b/kernel"]]))}}}
    found = hooks.observe(hooks(1, hooks.init(state, fires=0), grads=grads))
    masks = [best(np.abs(stack[layer] * G[path]), 24) for layer, path in enumerate(PATHS)]
    named = {f"layers/mlp/kernel[{layer}]": mask for layer, mask in enumerate(masks)}
    assert_masks(masks_in(found), named)
    np.testing.assert_array_equal(found.params["layers"]["mlp"]["kernel"], np.where(np.stack(masks), stack, 0))
    masked = fsh.sparsity.apply_masks(params, fsh.sparsity.masks_of(found, "prune"))
    assert_bitwise_equal(masked, found.params)


# JaxPruner's published rules, written again: its masks are ours where no scores are equal.


def ones_of(score: np.ndarray, sparsity: float) -> np.ndarray:
    """The mask of `max(1, round(size * (1 - sparsity)))` ones at the highest scores."""
    ones = max(1, int(np.round(np.float32(score.size) * np.float32(1 - sparsity))))
    return score >= np.sort(score.ravel())[-ones]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.95, 0.999])
def test_masks_of_jaxpruner(sparsity):
    size, key = magnitude(W), jax.random.key(9)
    saliency = {path: np.abs(W[path] * G[path]) for path in PATHS}
    draws = {path: drawn(key, path) for path in PATHS}
    assert_masks(Prune(sparsity).masks(LEAVES), {path: ones_of(size[path], sparsity) for path in PATHS})
    found = Prune(sparsity, score="saliency").masks(LEAVES, grads=GRADS)
    assert_masks(found, {path: ones_of(saliency[path], sparsity) for path in PATHS})
    found = Prune(sparsity, score="random").masks(LEAVES, key=key)
    assert_masks(found, {path: ones_of(draws[path], sparsity) for path in PATHS})
    # Global pruning there: scores over their norm, all in one vector.
    flat = np.concatenate([(size[path] / (np.linalg.norm(size[path]) + 1e-8)).ravel() for path in PATHS])
    mask = ones_of(flat, sparsity).reshape(2, *SHAPE)
    found = Prune(sparsity, scope="global", normalize=True).masks(LEAVES)
    assert_masks(found, dict(zip(PATHS, mask, strict=True)))


def test_straight_through_masks_of_jaxpruner():
    """There the mask of each forward pass is of the dense weights at that step, which no mask has touched."""
    surgery, params = Prune(0.75, enforce=False), make_state(W).params

    def masked(params: Any) -> Any:
        return fsh.sparsity.ste(params, surgery.masks({path: params[path[0]]["kernel"] for path in PATHS}))

    value, pull = jax.vjp(jax.jit(masked), params)
    mask = {path: ones_of(np.abs(W[path]), 0.75) for path in PATHS}
    assert_bitwise_equal(kernels(value), {path: np.where(mask[path], W[path], np.float32(0)) for path in PATHS})
    assert_bitwise_equal(kernels(pull(tree_of(GRADS) | {})[0]), G)
