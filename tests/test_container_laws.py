"""The laws of edits hold whatever holds the params: exact moments, carried and kept slots, stability, refusal, records.

The oracle is `mlp`: moments rebuilt from recorded steps in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlp
import numpy as np
import optax
import pytest
from containers import (
    ALL,
    MLP,
    NO_STEP,
    POOL,
    STATES,
    TX,
    Change,
    Flat,
    cast,
    expected_paths,
    flat_of,
    make_state,
    moments_of,
    name_of,
    network_of,
)

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import RefusedError, UnequalCopiesError

# Exactness, in float64.


@dataclasses.dataclass(frozen=True)
class Preserving:
    """An edit of a network as a surgery, whatever the paths of its leaves."""

    edit: Callable[[Flat], Flat]
    preserves = "function"

    def __call__(self, leaves: Flat) -> Flat:
        return by_name(self.edit, leaves)


@dataclasses.dataclass(frozen=True)
class Folding(Preserving):
    back: Callable[[Flat], Flat] = dict

    def fold_back(self, leaves: Flat) -> Flat:
        return by_name(self.back, leaves)


def by_name(function: Callable[[Flat], Flat], leaves: Flat) -> Flat:
    new = function({path.rpartition("/")[2]: leaf for path, leaf in leaves.items()})
    return {path: new[path.rpartition("/")[2]] for path in leaves}


def surgery_of(change: Change) -> Preserving:
    return Preserving(change.edit) if change.fold_back is None else Folding(change.edit, change.fold_back)


@functools.cache
def recorded(is_pool: bool) -> tuple[Flat, mlp.Run]:
    """Params after some steps of Adam, and what each step saw."""
    network = POOL if is_pool else MLP
    params, points, batches = network.params(), [], mlp.batches()
    opt_state = TX.init(params)
    for batch in batches:
        points.append(params)
        updates, opt_state = TX.update(network.gradient(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, mlp.Run(points, batches)


@functools.cache
def rebuilt(is_pool: bool, change: str | None) -> tuple[Flat, Flat]:
    network = POOL if is_pool else MLP
    edit = dict if change is None else network.changes[change].edit
    return mlp.rebuilt(recorded(is_pool)[1], edit, network.gradient)


def error(found: Flat, expected: Flat) -> float:
    """Largest difference, relative to the largest value of each leaf."""
    assert found.keys() == expected.keys()
    return max(np.abs(found[n] - expected[n]).max() / max(np.abs(expected[n]).max(), 1e-300) for n in expected)


@functools.cache
def gradients(is_pool: bool, change: str | None) -> tuple[Flat, Flat]:
    """A gradient and its squares, at the params as they are now or as they are after an edit."""
    network = POOL if is_pool else MLP
    params, run = recorded(is_pool)
    edited = params if change is None else network.changes[change].edit(params)
    grads = {name: np.asarray(leaf) for name, leaf in network.gradient(edited, run.batches[0]).items()}
    return grads, {name: leaf**2 for name, leaf in grads.items()}


OTHER_PATHS = {"flat_dict": ("scale",), "variables": ("split",), "list": ("scale",), "tuple": ("scale",)}
"""Containers with paths of their own, for which programs are compiled anew: one edit does."""
EXACT = [
    (container, change) for container in STATES for change in OTHER_PATHS.get(container, network_of(container).changes)
]


@pytest.mark.parametrize(("container", "change"), EXACT)
def test_transported_moments_are_those_of_the_edited_network(container, change, x64):
    network, is_pool = network_of(container), container.startswith("bare")
    params, _ = recorded(is_pool)
    the_change, names = network.changes[change], params.keys()
    surgery, paths = surgery_of(the_change), expected_paths(container, names)
    where = "**" if is_pool else list(paths)
    for moments in (rebuilt, gradients):
        state = make_state(container, params, *moments(is_pool, None))
        new, record = fsh.operate(state, surgery, params=where, fresh="init")
        expected = moments(is_pool, change)
        for found, wanted in zip(moments_of(new, names), expected, strict=True):
            assert {leaf.dtype for leaf in found.values()} == {np.dtype("float64")}
            assert error(found, wanted) < 1e-12
        edited = {name: np.asarray(leaf) for name, leaf in the_change.edit(params).items()}
        assert error({n: np.asarray(x) for n, x in flat_of(new.params, names).items()}, edited) < 1e-15
        assert record.paths == paths


WRONG = [(container, change) for container in ("dict", "bare") for change in network_of(container).changes]


@pytest.mark.parametrize(("container", "change"), WRONG)
def test_a_wrong_rule_breaks_the_law_of_moments(container, change, x64):
    """What the moments are compared with is the same for every container."""
    network, is_pool = network_of(container), container.startswith("bare")
    params, _ = recorded(is_pool)
    surgery, rule = surgery_of(network.changes[change]), network.changes[change].wrong
    for moments in (rebuilt, gradients):
        state = make_state(container, params, *moments(is_pool, None))
        where = "**" if is_pool else list(expected_paths(container, params.keys()))
        wrong = fsh.operate(state, surgery, params=where, fresh="init", opt_state=rule)[0]
        for found, wanted in zip(moments_of(wrong, params.keys()), moments(is_pool, change), strict=True):
            assert error(found, wanted) > 1e-2


@pytest.mark.parametrize("container", ["dict", "partitioned", "nnx_state", "bound_nnx", "bare"])
def test_unequal_copies_need_a_fold_back(container, x64):
    is_pool = container.startswith("bare")
    params, _ = recorded(is_pool)
    state = make_state(container, params, *gradients(is_pool, None))
    paths = expected_paths(container, params.keys())
    with pytest.raises(UnequalCopiesError) as caught:
        fsh.operate(state, Preserving(network_of(container).changes["split"].edit))
    assert set(caught.value.path.split(", ")) <= set(paths)


# The other laws, in the dtypes that trainers have.


@functools.cache
def numbers(is_pool: bool) -> tuple[Flat, Flat, Flat]:
    """Params and moments without meaning, in float32; all elements of a leaf are distinct."""
    shapes = {name: leaf.shape for name, leaf in (POOL if is_pool else MLP).params().items()}
    trees = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        trees.append({name: jnp.asarray(rng.uniform(0.1, 1, shape), jnp.float32) for name, shape in shapes.items()})
    return trees[0], trees[1], trees[2]


def given(container: str) -> Any:
    return make_state(container, *numbers(container.startswith("bare")))


def chosen(container: str) -> tuple[str, tuple[str, ...]]:
    """A pattern for kernels, and the names of those."""
    names = numbers(container.startswith("bare"))[0].keys()
    kernels = tuple(name for name in names if name.startswith("w") or not name)
    return ("**" if container.startswith("bare") else "**/w*"), kernels


def reverse(kernel: jax.Array) -> jax.Array:
    return 3 * kernel[::-1]


def clip(kernel: jax.Array) -> jax.Array:
    return jnp.clip(kernel, 0.3, 0.6)


def spoil(kernel: jax.Array) -> jax.Array:
    return kernel.at[0, 0].set(jnp.nan)


@pytest.mark.parametrize("container", ALL)
def test_carried_slots_are_the_same_values_at_new_places(container):
    state, (pattern, names) = given(container), chosen(container)
    new, _ = fsh.operate(state, reverse, params=pattern)
    for before, after in zip(moments_of(state, names), moments_of(new, names), strict=True):
        for name in names:
            assert before[name].dtype == after[name].dtype
            np.testing.assert_array_equal(after[name], before[name][::-1])
            assert not np.array_equal(after[name], before[name])
    params = flat_of(new.params, names)
    for name, leaf in flat_of(state.params, names).items():
        expected = (3 * jnp.asarray(leaf, jnp.float32)[::-1]).astype(leaf.dtype)
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(expected))


@pytest.mark.parametrize("container", ALL)
def test_kept_slots_are_the_same_objects_and_reset_ones_start_anew(container):
    state, (pattern, names) = given(container), chosen(container)
    kept, _ = fsh.operate(state, reverse, params=pattern, opt_state="keep")
    reset, _ = fsh.operate(state, reverse, params=pattern, opt_state="reset")
    for old, same in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(kept.opt_state), strict=True):
        assert old is same or container == "bound_nnx"
        np.testing.assert_array_equal(raw(old), raw(same))
    for before, after in zip(moments_of(state, names), moments_of(reset, names), strict=True):
        for name in names:
            np.testing.assert_array_equal(after[name], np.zeros_like(before[name]))
            assert after[name].dtype == before[name].dtype
    assert int(reset.opt_state[0].count) == mlp.STEPS
    others = [name for name in numbers(container.startswith("bare"))[0] if name not in names]
    for before, after in zip(moments_of(state, others), moments_of(reset, others), strict=True):
        for name in others:
            np.testing.assert_array_equal(after[name], before[name])


def raw(leaf: Any) -> Any:
    is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else np.asarray(leaf)


def types_of(tree: Any) -> list[type]:
    """The classes of all containers of a tree, from the outside in; JAX's structures do not tell a subclass apart."""
    inner = [each for each in jax.tree.leaves(tree, is_leaf=lambda node: node is not tree) if each is not tree]
    return [type(tree), *(kind for each in inner for kind in types_of(each))] if inner else []


RULES = ("carry", "transport", "reset", "keep")


@pytest.mark.parametrize("container", ALL)
def test_nothing_but_the_edited_leaves_changes(container):
    state, (pattern, names) = given(container), chosen(container)
    before = jax.tree.leaves(state)
    adam = state.opt_state[0]
    touched = {id(leaf) for tree in (state.params, adam.mu, adam.nu) for leaf in flat_of(tree, names).values()}
    for rule in RULES:
        new, _ = fsh.operate(state, reverse, params=pattern, opt_state=rule)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert types_of(new.params) == types_of(state.params)
        assert types_of(new.opt_state) == types_of(state.opt_state)
        assert type(new) is type(state)
        assert new.tx is state.tx
        assert getattr(new, "apply_fn", None) is getattr(state, "apply_fn", None)
        changed = 0
        for old, leaf in zip(before, jax.tree.leaves(new), strict=True):
            assert jnp.result_type(old) == jnp.result_type(leaf)
            assert getattr(old, "weak_type", False) == getattr(leaf, "weak_type", False)
            assert np.shape(old) == np.shape(leaf)
            assert leaf is old or id(old) in touched
            changed += leaf is not old
        assert changed == len(names) * (1 if rule == "keep" else 3)


def make_step(container: str, traces: list[int]) -> Callable[[Any, Any], Any]:
    """A jitted train step; where optax cannot train a leaf, one that touches all floats."""
    network = network_of(container)
    names = numbers(container.startswith("bare"))[0].keys()

    def step(state: Any, batch: Any) -> Any:
        traces.append(1)
        if container in NO_STEP:
            return jax.tree.map(lambda x: x * 2 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, state)
        grads = network.gradient(cast(flat_of(state.params, names), jnp.float32), batch)
        grads = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: grads[name_of(keys)].astype(leaf.dtype) if name_of(keys) in names else leaf * 0,
            state.params,
        )
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    return jax.jit(step)


def other_dtype(leaf):
    return leaf.astype({"float32": "bfloat16"}.get(str(leaf.dtype), "float32")) if leaf.ndim else leaf


@pytest.mark.parametrize("container", ALL)
def test_the_train_step_is_not_traced_again(container):
    traces: list[int] = []
    state, (pattern, _), batch = given(container), chosen(container), mlp.batches()[0]
    step = make_step(container, traces)
    for _ in range(2):  # a trainer's own second trace, if there is one, is not ours
        state = step(state, batch)
    before = len(traces), step._cache_size()
    for rule in RULES:
        state = step(fsh.operate(state, lambda kernel: kernel[::-1], params=pattern, opt_state=rule)[0], batch)
    assert (len(traces), step._cache_size()) == before
    wrong = jax.tree.map(other_dtype, state.params)
    step.lower(state.replace(params=wrong), batch)
    assert len(traces) > before[0], "the count of traces notices another dtype"


@pytest.mark.parametrize("rule", ["carry", "transport"])
@pytest.mark.parametrize("container", ALL)
def test_the_second_fire_of_an_idempotent_edit_changes_nothing(container, rule):
    state, (pattern, names) = given(container), chosen(container)
    once, first = fsh.operate(state, clip, params=pattern, opt_state=rule)
    twice, second = fsh.operate(once, clip, params=pattern, opt_state=rule)
    assert float(first.figures["params/changed"]) > 0
    assert float(second.figures["params/changed"]) == 0
    for before, after in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        assert raw(before).tobytes() == raw(after).tobytes()
    assert moments_of(once, names)[1].keys() == set(names)


@pytest.mark.parametrize("container", ALL)
def test_a_refused_edit_leaves_every_bit(container):
    state, (pattern, names) = given(container), chosen(container)
    before = [raw(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    with pytest.raises(RefusedError):
        fsh.operate(state, spoil, params=pattern)
    assert [raw(leaf).tobytes() for leaf in jax.tree.leaves(state)] == before
    spoiled = fsh.operate(state, spoil, params=pattern, guard="off")[0]
    assert all(np.isnan(np.asarray(x, np.float32)).sum() == 1 for x in flat_of(spoiled.params, names).values())


@pytest.mark.parametrize("container", ALL)
def test_hooks_do_what_operate_does_and_refuse_what_it_refuses(container):
    """On one leaf: the programs of hooks are compiled for each container anew."""
    pattern = "**" if container.startswith("bare") else "**/w2"
    hooks = fsh.SurgeryHooks(on_error="skip")
    hooks.add("reverse", reverse, params=pattern, when=fsh.at(0))
    hooks.add("spoil", spoil, params=pattern, when=fsh.at(1))
    expected = fsh.operate(given(container), reverse, params=pattern)[0]
    state = given(container)
    structure = jax.tree.structure(state)
    for step in (0, 1):
        state = hooks.fire(hooks.names[step], state, step)
        assert jax.tree.structure(state) == structure
        for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert raw(found).tobytes() == raw(wanted).tobytes()
    hooks.flush()
    assert [record.event for record in hooks.ledger.records] == ["fired", "fired", "settled", "refused"]


@pytest.mark.parametrize("container", ALL)
def test_records_list_the_same_paths(container):
    state, (pattern, names) = given(container), chosen(container)
    assert fsh.operate(state, reverse, params=pattern)[1].paths == expected_paths(container, names)
    seen: list[str] = []

    def look(leaves: Flat) -> Flat:
        seen.extend(leaves)
        return leaves

    abstract = jax.eval_shape(lambda: state) if container not in NO_STEP else state
    _, record = fsh.operate(abstract, look, params=pattern, opt_state="keep")
    assert record.paths == expected_paths(container, names)
    assert set(seen) == set(record.paths)
