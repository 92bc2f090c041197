"""Sparse runs are the same on every layout, by the host and in graph, and after they were cut off anywhere."""

from __future__ import annotations

import functools
import tempfile

import jax
import numpy as np
import pytest
import sparse_run
from resumed import assert_same, open_manager

import flax_surgery_hooks as fsh


@functools.cache
def uncut(form: str, placed: str):
    """The state and the hooks of a run that saves at every step and is never cut off, and its directory."""
    directory, hooks = tempfile.mkdtemp(), sparse_run.make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        state = sparse_run.run(hooks, sparse_run.initial(hooks, placed)(), sparse_run.STEPS, form, manager)
    hooks.flush()
    return state, hooks, directory


def equal(leaf, other):
    return bool((np.asarray(leaf) == np.asarray(other)).all())


def without_figures(state):
    """The state without the room for figures of fires in graph, of which those that are read start anew."""
    return state.replace(surgery=state.surgery["memory"])


def fired(hooks):
    """What fires have done: figures of the host and of one program in graph may differ in the last bit."""
    settled = [record for record in hooks.ledger.records if record.event == "settled"]
    return sorted((one.hook, one.step, one.figures["masks/sparsity"], one.figures["masks/overlap"]) for one in settled)


def test_a_run_prunes_and_regrows():
    state, hooks, _ = uncut("host", "one")
    assert sparse_run.counts(state) == {name: (kept, kept) for name, kept in sparse_run.KEPT.items()}
    overlaps = {name: [overlap for hook, _, _, overlap in fired(hooks) if hook == name] for name in hooks.names}
    assert set(overlaps["prune"]) == {1.0}
    assert max(min(overlaps["rigl"]), *overlaps["evolve"]) < 1


@pytest.mark.parametrize(("form", "placed"), [("host", "auto"), ("graph", "auto"), ("graph", "explicit")])
def test_masks_are_the_same_wherever_leaves_lie(form, placed):
    """The weights are so up to the last bit: XLA's sine of a shard rounds otherwise than that of a whole leaf."""
    state, hooks, _ = uncut(form, placed)
    reference, known, _ = uncut("host", "one")
    assert jax.tree.all(jax.tree.map(equal, state.surgery["memory"], reference.surgery["memory"]))
    for name, leaf in state.params.items():
        np.testing.assert_allclose(leaf["kernel"], reference.params[name]["kernel"], rtol=1e-5, atol=1e-7)
    assert fired(hooks) == fired(known)
    for path, mask in state.surgery["memory"]["prune"].items():
        leaf = state.params[path.split("/")[0]]["kernel"]
        assert mask.sharding.is_equivalent_to(leaf.sharding, 2), path


@pytest.mark.parametrize(("form", "at"), [("host", 3), ("graph", 7)])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(form, at):
    expected, reference, directory = uncut(form, "auto")
    hooks = sparse_run.make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        state = fsh.checkpoint.restore(manager, sparse_run.initial(hooks, "auto"), hooks, step=at)
    assert int(state.step) == at
    state = sparse_run.run(hooks, state, sparse_run.STEPS, form)
    hooks.flush()
    assert_same(without_figures(state), without_figures(expected))
    assert fired(hooks) == fired(reference)


def test_masks_are_found_without_gathering_a_leaf():
    """What the choice of weights says to other devices is counts; the cut among equal scores as well."""
    _, hooks, _ = uncut("host", "auto")
    for name in hooks.names:
        (made,) = [program for program in hooks.programs(name) if program.derives == "masks"]
        assert {one.kind for one in made.measure_collectives} <= {"all-reduce"}, str(made)
        assert sum(one.bytes for one in made.measure_collectives) < 2_000
        assert made.served > 2
        assert "makes 'masks'" in str(made)


def test_a_run_that_forgets_its_masks_is_told_apart():
    """The check above would see it: SET and RigL would start from other masks."""
    expected, _, directory = uncut("host", "one")
    hooks = sparse_run.make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        state = fsh.checkpoint.restore(manager, sparse_run.initial(hooks), hooks, step=4)
    lost = sparse_run.initial(sparse_run.make_hooks())().surgery
    state = sparse_run.run(hooks, state.replace(surgery=lost), sparse_run.STEPS, "host")
    with pytest.raises(AssertionError):
        assert_same(state, expected)


def test_masks_are_saved_and_restored_onto_another_mesh():
    expected, _, directory = uncut("host", "auto")
    hooks = sparse_run.make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        state = fsh.checkpoint.restore(manager, sparse_run.initial(hooks), hooks)
    assert_same(state, expected)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(state.surgery))
    assert {name: kept for name, (kept, _) in sparse_run.counts(state).items()} == sparse_run.KEPT
