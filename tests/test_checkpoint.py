"""A run that is saved, and goes on elsewhere from its checkpoint, ends as one that was never cut off."""

from __future__ import annotations

import functools

import pytest
from resumed import STEPS, assert_same, facts, initial, make_hooks, mesh_of, open_manager, run

import flax_surgery_hooks as fsh


@functools.cache
def uncut(placed: str = "one", every: int = 1):
    """The state and the hooks of a run that saves but is never cut off, and its directory."""
    import tempfile

    directory = tempfile.mkdtemp()
    hooks = make_hooks(f"{directory}/ledger.jsonl")
    mesh = None if placed == "one" else mesh_of(placed)
    with open_manager(f"{directory}/checkpoints") as manager:
        state = run(hooks, initial(hooks, mesh)(), STEPS, manager, every, placed)
    return state, hooks, directory


@pytest.mark.parametrize("at", [2, 7, 13, 16])  # before anything, at the growth, at the switch, while values wait
def test_a_run_goes_on_from_its_checkpoint(at, tmp_path):
    expected, reference, directory = uncut()
    hooks = make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        state = fsh.checkpoint.restore(manager, initial(hooks), hooks, step=at)
    assert int(state.step) == at
    with open_manager(tmp_path / "checkpoints") as manager:
        state = run(hooks, state, STEPS, manager)
    assert_same(state, expected)
    assert facts(hooks) == facts(reference)
