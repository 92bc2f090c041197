"""Runs that prune: what is dropped stays at zero, nothing else is touched; what is told of it; configs, containers."""

from __future__ import annotations

import functools
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
    SIZE,
    assert_masks,
    best,
    best_each,
    differ,
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
from flax_surgery_hooks.errors import SurgeryError
from flax_surgery_hooks.surgeries import Prune

W, G = numbers(0), numbers(2)


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
    carried, _ = fsh.operate(state, Prune(0.75), params="a/kernel", opt_state="carry")
    assert_bitwise_equal(carried.opt_state, state.opt_state)
    weights, before = kernels(carried.params), kernels(state.params)
    np.testing.assert_array_equal(weights["a/kernel"] != 0, best(np.abs(before["a/kernel"]), 24))
    np.testing.assert_array_equal(weights["b/kernel"], before["b/kernel"])


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
