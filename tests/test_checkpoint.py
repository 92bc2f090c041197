"""A run that is saved, and goes on elsewhere from its checkpoint, ends as one that was never cut off."""

from __future__ import annotations

import functools
import json
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from resumed import (
    HIDDEN,
    STEPS,
    Mlp,
    assert_same,
    create,
    double,
    facts,
    initial,
    make_hooks,
    mesh_of,
    momentum,
    open_manager,
    run,
)  # fmt: skip

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import HookError, ResumeError, StepError, StructureError


@functools.cache
def uncut(placed: str = "one", every: int = 1):
    """The state and the hooks of a run that saves but is never cut off, and its directory."""
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


@functools.cache
def saved_on_eight(placed: str) -> tuple[Any, Any]:
    """A directory with a checkpoint of a state that has grown, saved on eight devices, and that state."""
    directory = tempfile.mkdtemp()
    hooks = make_hooks(leave_out=("switch",))
    with open_manager(f"{directory}/checkpoints") as manager:
        state = run(hooks, initial(hooks, mesh_of(placed))(), 8, placed=placed)
        fsh.checkpoint.save(manager, 8, state, hooks)
    return directory, state


@pytest.mark.parametrize(("placed", "count"), [("auto", 8), ("auto", 4), ("auto", 1), ("explicit", 8), ("explicit", 2)])
def test_a_grown_state_goes_onto_another_mesh(placed, count):
    directory, state = saved_on_eight(placed)
    hooks = make_hooks(leave_out=("switch",))
    mesh = mesh_of(placed, count)
    with open_manager(f"{directory}/checkpoints") as manager:
        again = fsh.checkpoint.restore(manager, initial(hooks, mesh), hooks)
    assert_same(again, state)
    assert again.apply_fn.__self__ == state.apply_fn.__self__ == Mlp(16)
    for leaf, old in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.mesh == mesh
        want = NamedSharding(mesh, old.sharding.spec)
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (leaf.sharding, want)
    assert int(run(hooks, again, 10, placed=placed).step) == 10


def test_a_grown_state_goes_onto_one_device_from_many():
    directory, state = saved_on_eight("auto")
    hooks = make_hooks(leave_out=("switch",))
    with open_manager(f"{directory}/checkpoints") as manager:
        again = fsh.checkpoint.restore(manager, initial(hooks), hooks)
    assert_same(again, state)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(again)} == {1}


def test_sizes_that_do_not_divide_the_mesh_of_today_are_told():
    directory, _ = saved_on_eight("auto")
    hooks = make_hooks(leave_out=("switch",))
    devices = np.array(jax.devices()[:3])
    mesh = jax.sharding.Mesh(devices.reshape(3, 1), ("data", "tensor"))
    make = functools.partial(create, hooks)
    shapes = jax.eval_shape(make)
    whole = NamedSharding(mesh, PartitionSpec())
    odd = NamedSharding(mesh, PartitionSpec(None, "data"))
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    placed.params["Dense_0"]["kernel"] = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=odd)
    with (
        open_manager(f"{directory}/checkpoints") as manager,
        pytest.raises(
            StructureError, match=r"Dense_0/kernel.*does not divide.*axis 1 of size 16 over 'data', 3 shards"
        ),
    ):
        fsh.checkpoint.restore(manager, placed, hooks)


def test_nothing_is_there_yet(tmp_path):
    hooks = make_hooks()
    with open_manager(tmp_path / "none") as manager:
        state = fsh.checkpoint.restore(manager, initial(hooks), hooks)
        assert int(state.step) == 0
        assert set(state.surgery["memory"]) == {"pull"}
        assert fsh.checkpoint.save(manager, 0, state, hooks)


def test_a_rollback_comes_after_a_restore():
    """Cut off at 16, between the fire and its rollback: what was kept of it is in the checkpoint."""
    _, reference, directory = uncut()
    told = [(one.event, one.step) for one in reference.ledger.records if one.hook == "careful"]
    assert [event for event, _ in told] == ["fired", "settled", "rolled_back"]
    assert told[-1][1] > 16
    hooks = make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        fsh.checkpoint.restore(manager, initial(hooks), hooks, step=16)
        saved = manager.restore(16, args=ocp.args.Composite(surgery=ocp.args.JsonRestore()))["surgery"]["hooks"]
    assert set(hooks.kept_arrays) == {str(one["id"]) for one in saved["kept"]} != set()
    assert "careful" in {one["hook"] for one in saved["kept"]}


def test_items_of_the_trainer_are_in_the_same_commit(tmp_path):
    hooks = make_hooks()
    with open_manager(tmp_path / "checkpoints") as manager:
        state = run(hooks, create(hooks), 1)
        items = {"data": ocp.args.JsonSave({"position": 7})}
        assert fsh.checkpoint.save(manager, 1, state, hooks, items=items, metrics={"loss": 1.0})
        manager.wait_until_finished()
        again = make_hooks()
        assert_same(fsh.checkpoint.restore(manager, initial(again), again), state)
        assert manager.restore(1, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"] == {"position": 7}


def test_a_save_comes_after_the_call_of_its_step(tmp_path):
    hooks = make_hooks()
    with open_manager(tmp_path / "checkpoints") as manager:
        state = run(hooks, create(hooks), 2)
        with pytest.raises(StepError, match=r"after the call of the same step.*last call was at 2.*hooks\(3, state\)"):
            fsh.checkpoint.save(manager, 3, state, hooks)


def test_a_call_at_the_saved_step_fires_nothing(tmp_path):
    _, _, directory = uncut()
    hooks = make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        state = fsh.checkpoint.restore(manager, initial(hooks), hooks, step=9)
    known = len(hooks.ledger.records)
    assert hooks(9, state, metrics={"loss": 1.0}) is state
    assert [record.event for record in hooks.ledger.records[known:]] == ["run"]


def test_the_hooks_knowledge_and_the_state_belong_together():
    hooks = make_hooks()
    state = run(hooks, create(hooks), 4)
    saved = json.loads(json.dumps(hooks.state_dict()))
    again = make_hooks()
    again.load_state_dict(saved)
    with pytest.raises(StepError, match=r"older than what the hooks.*step 3, hooks saved at 4"):
        again(3, state.replace(step=jnp.int32(3)), metrics={"loss": 1.0})
    with pytest.raises(HookError, match="before they are first called"):
        hooks.load_state_dict(saved)
    with pytest.raises(HookError, match="allow_changes= takes names"):
        make_hooks().load_state_dict(saved, allow_changes="grow")


def test_what_is_saved_knows_of_fires_that_come_and_go(tmp_path):
    """The wrong variant: a state without its hooks fires again what it has in it, and grows again."""
    expected, _, directory = uncut()
    hooks = make_hooks()
    with open_manager(f"{directory}/checkpoints") as manager:
        state = fsh.checkpoint.restore(manager, initial(hooks), hooks, step=9)
    forgetful = make_hooks()
    end = run(forgetful, state, STEPS)
    with pytest.raises(AssertionError):
        assert_same(end, expected)


# Other hooks than those saved


def restored(hooks, at=9, **kwargs):
    _, _, directory = uncut()
    with open_manager(f"{directory}/checkpoints") as manager:
        return fsh.checkpoint.restore(manager, initial(hooks), hooks, step=at, **kwargs)


def report(hooks, at=9, **kwargs):
    _, _, directory = uncut()
    with open_manager(f"{directory}/checkpoints") as manager:
        saved = manager.restore(at, args=ocp.args.Composite(surgery=ocp.args.JsonRestore()))["surgery"]["hooks"]
    return {change.hook: change for change in hooks.check_state_dict(saved, **kwargs).changes}


def test_hooks_that_are_the_same_are_no_change():
    assert report(make_hooks()) == {}


def test_a_changed_schedule_concerns_the_future(caplog):
    hooks = make_hooks(leave_out=("noise",))
    hooks.add("noise", fsh.surgeries.Noise(0.01), params="**/kernel", when=fsh.every(4))
    (change,) = report(hooks).values()
    assert (change.kind, change.fires, change.falsifies) == ("changed", (3, 6, 9), False)
    assert change.fields == {"when": ("every(3)", "every(4)")}
    state = restored(hooks)
    assert (
        "hook 'noise' is changed; when: every(3) -> every(4); its 3 recorded fires stay (steps 3, 6, 9)" in caplog.text
    )
    run(hooks, state, 12)
    assert [one.step for one in hooks.ledger.records if (one.hook, one.event) == ("noise", "fired")] == [3, 6, 9, 12]


def test_a_change_that_is_allowed_is_not_told_of(caplog):
    hooks = make_hooks(leave_out=("noise",))
    restored(hooks, allow_changes=("noise",))
    assert "noise" not in caplog.text


def test_a_hook_that_is_new_or_gone(caplog):
    hooks = make_hooks(leave_out=("pull",))
    hooks.add("extra", fsh.surgeries.Scale(0.5), params="Dense_0/bias", when=fsh.at(4, 10))
    changes = report(hooks)
    assert {name: change.kind for name, change in changes.items()} == {"pull": "gone", "extra": "new"}
    state = restored(hooks)
    assert "hook 'pull' is gone; its 2 recorded fires stay (steps 5, 9)" in caplog.text
    assert set(state.surgery["memory"]) == {"pull"}  # it stays in the state, should the hook come back
    run(hooks, state, 10)
    told = [(one.event, one.step, one.passed) for one in hooks.ledger.records if one.hook == "extra"]
    assert told[:2] == [("passed", 10, (4,)), ("fired", 10, ())]


def other_double(leaves, key):
    return {path: jnp.concatenate([leaf, leaf], 0) for path, leaf in double(leaves, key).items()}


@pytest.mark.parametrize("surgery", [None, other_double])
def test_a_growth_that_is_gone_or_another_is_an_error(surgery):
    hooks = make_hooks(leave_out=("grow",))
    if surgery is not None:
        hooks.add("grow", surgery, params=HIDDEN, when=fsh.at(7), opt_state="carry", apply_fn=Mlp(16).apply)
    with pytest.raises(ResumeError, match=r"hook 'grow' is (gone|changed).*has changed shapes.*allow_changes="):
        restored(hooks)
    assert restored(hooks, at=6) is not None  # before the growth there is nothing to falsify


def test_a_growth_may_change_for_the_future_if_one_says_so():
    hooks = make_hooks(leave_out=("grow",))
    hooks.add("grow", other_double, params=HIDDEN, when=fsh.at(7), opt_state="carry", apply_fn=Mlp(16).apply)
    state = restored(hooks, allow_changes=("grow",))
    assert state.params["Dense_0"]["kernel"].shape == (4, 16)


def test_a_growth_that_today_makes_other_shapes_is_found_by_a_replay():
    """Its fields are the same as they were; what it closes over is beyond any fingerprint."""
    _, reference, _ = uncut()
    hooks = make_hooks(leave_out=("grow",))
    hooks.add("grow", other_double, params=HIDDEN, when=fsh.at(7), opt_state="carry", apply_fn=Mlp(16).apply)
    with pytest.raises(ResumeError, match=r"makes other leaves today.*recorded \[16\], today \[32\]"):
        hooks.abstract_state(create(hooks), reference.ledger)


def test_without_the_optimizer_of_the_past_the_state_has_no_place(tmp_path):
    hooks = make_hooks(leave_out=("switch",))
    with pytest.raises(ResumeError, match="switch"):
        restored(hooks, at=14)
    with pytest.raises(ResumeError, match="optimizer makes another state"):
        restored(hooks, at=14, allow_changes=("switch",))


def test_the_abstract_state_is_that_of_the_run():
    expected, reference, _ = uncut()
    abstract = reference.abstract_state(jax.eval_shape(functools.partial(create, make_hooks())))
    assert jax.tree.structure(abstract.params) == jax.tree.structure(expected.params)
    for ours, theirs in zip(jax.tree.leaves(abstract), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert abstract.tx is momentum()
    assert reference.abstract_state(expected).params["Dense_0"]["kernel"].shape == (4, 16)  # it is grown already


def test_a_trainer_may_keep_checkpoints_of_its_own():
    expected, reference, _ = uncut()
    hooks = make_hooks()
    state = run(hooks, create(hooks), 9)
    saved = json.dumps(hooks.state_dict())
    again = make_hooks()
    assert again.load_state_dict(json.loads(saved)).step == 9
    end = run(again, state, STEPS)
    assert_same(end, expected)
    flushed = [fact for fact in facts(again) if fact["event"] == "fired"]
    assert flushed == [fact for fact in facts(reference) if fact["event"] == "fired"]


# In graph


def traced_hooks():
    hooks = fsh.SurgeryHooks(seed=5)
    hooks.add("scale", fsh.surgeries.Scale(0.5), params="**/kernel", when=fsh.every(3))
    hooks.add("noise", fsh.surgeries.Noise(0.1), params="**/bias", when=fsh.every(5))
    return hooks


def scan(hooks, state, upto, manager=None):
    def one(state, _):
        grads = jax.tree.map(jnp.sin, state.params)
        return hooks.in_graph(state.apply_gradients(grads=grads)), None

    four = jax.jit(lambda state: jax.lax.scan(one, state, length=4)[0])
    for step in range(int(state.step) + 4, upto + 1, 4):
        state = four(state)
        hooks.collect(state)
        if manager is not None:
            fsh.checkpoint.save(manager, step, state, hooks)
    return state


def test_a_scanned_run_goes_on(tmp_path):
    def make(hooks):
        return hooks.init(create(fsh.SurgeryHooks()))

    hooks = traced_hooks()
    with open_manager(tmp_path / "checkpoints") as manager:
        expected = scan(hooks, make(hooks), 16, manager)
        again = traced_hooks()
        manager.wait_until_finished()
        state = fsh.checkpoint.restore(manager, lambda: make(again), again, step=8)
    end = scan(again, state, 16)
    assert_same(end, expected)
    assert facts(again) == facts(hooks)


def test_a_run_cut_off_before_its_first_checkpoint_begins_its_ledger_anew(tmp_path):
    """Found by kills in the first save: the file had records that no checkpoint knew, and the next start refused it."""
    ledger = tmp_path / "ledger.jsonl"

    def begun():
        return tiny.make_hooks(tiny.halve, ledger=ledger)

    lost = begun()
    lost(2, lost(1, tiny.make_state(1)).replace(step=2))
    held = ledger.read_bytes()
    with open_manager(tmp_path / "checkpoints") as manager:
        hooks = begun()
        state = fsh.checkpoint.restore(manager, tiny.make_state(0), hooks)
        assert (tmp_path / "ledger.jsonl.tail-1").read_bytes() == held
        state = hooks(1, state.replace(step=1))
        fsh.checkpoint.save(manager, 1, state, hooks)
        manager.wait_until_finished()
        again = begun()
        state = fsh.checkpoint.restore(manager, tiny.make_state(0), again)
    again(2, state.replace(step=2))
    again.flush()
    fired = [record.step for record in fsh.Ledger.read(ledger) if record.event == "fired"]
    assert fired == [1, 2]
