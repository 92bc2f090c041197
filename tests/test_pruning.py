"""Prune: which weights are kept, and how many at each step; its masks by themselves."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_cases import (
    PATHS,
    SHAPE,
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
from flax_surgery_hooks.errors import ScheduleError
from flax_surgery_hooks.surgeries import Prune

W, TIED, G = numbers(0), numbers(1, tied=True), numbers(2)
LEAVES, GRADS = on_device(W), on_device(G)


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
