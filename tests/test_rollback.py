"""What is kept of fires and put back: by a metric, by `undo`, on meshes, and across a checkpoint."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from raised import Case, fail
from tiny import MOMENTUM, assert_bitwise_equal, events, halve, make_hooks, make_state, w_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks import kept_leaves
from flax_surgery_hooks.rollback import Band
from flax_surgery_hooks.watching import WATCHING

LOSS = fsh.Rollback(20, metric="loss", above=5.0, lag=1)
ADAM = optax.adam(0.1)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state):
    """Takes the memory of the state that it is given, as training does."""
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf.astype(jnp.float32)).astype(leaf.dtype), state.params)
    return state.apply_gradients(grads=grads)


def fresh(step=0, tx=ADAM, **params):
    params = params or {"v": jnp.linspace(1, 2, 6), "w": jnp.linspace(-1, 1, 8).reshape(2, 4)}
    return make_state(jnp.int32(step), tx, **params)


def numpy_of(state):
    return jax.tree.map(np.array, (state.params, state.opt_state))


def train(hooks, state, steps, loss=lambda step: 1.0, seen=None):
    """Trains; what the state was at the call of each step, and after it, goes to `seen`."""
    for step in steps:
        state = train_step(state)
        before = numpy_of(state) if seen is not None else None
        state = hooks(step, state, metrics={"loss": loss(step)})
        if seen is not None:
            seen[step] = before, numpy_of(state)
    return state


def leaf_and_slots(tree, path="w"):
    params, opt_state = tree
    return params[path], opt_state[0].mu[path], opt_state[0].nu[path]


def others(tree):
    """All but `w` and its slots."""
    params, opt_state = tree
    without = [{k: v for k, v in one.items() if k != "w"} for one in (params, opt_state[0].mu, opt_state[0].nu)]
    return without, opt_state[0].count, opt_state[1:]


def when_left(step):
    return 9.0 if step == 6 else 1.0


# A metric that leaves its band.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opt_state": "keep"},
        {"opt_state": {"grad": "keep", "grad_sq": "keep"}},
        {"opt_state": "reset"},
        {"guard": "off", "figures": False},
    ],
)
@pytest.mark.parametrize("to", ["device", "host"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_and_slots_are_put_back_bitwise_and_nothing_else(to, dtype, options):
    """Fires at 3; the loss of step 6 is read in the call of step 7."""
    rollback = fsh.Rollback(20, metric="loss", above=5.0, lag=1, to=to)
    hooks = make_hooks(halve, fsh.at(3), options={"rollback": rollback, **options}, donate="always")
    seen = {}
    state = fresh(v=jnp.ones(6, dtype), w=jnp.linspace(-1, 1, 8, dtype=dtype).reshape(2, 4))
    state = train(hooks, state, range(1, 10), when_left, seen)
    before, after = seen[7]
    assert_bitwise_equal(leaf_and_slots(after), leaf_and_slots(seen[3][0]))
    assert_bitwise_equal(others(after), others(before))
    for wrong in (seen[3][1], before):  # after the fire, and where training has brought it
        with pytest.raises(AssertionError):
            assert_bitwise_equal(leaf_and_slots(after), leaf_and_slots(wrong))
    [record] = [record for record in hooks.ledger.records if record.event == "rolled_back"]
    [fired] = [record for record in hooks.ledger.records if record.event == "fired"]
    assert (record.hook, record.step, record.id, record.paths) == ("a", 7, fired.id, ("w",))
    assert (record.triggers[0].step, record.triggers[0].value, record.triggers[0].limit) == (6, 9.0, 5.0)
    assert json.loads(record.to_json())["detail"] == {"fired": 3}
    assert not fired.donated
    assert state.params["w"].dtype == dtype
    assert hooks._wake != WATCHING


def losses(outside):
    return lambda step: 9.0 if step in outside else 1.0


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("outside", [(2, 3), (4,), (5, 6), (4, 6, 7), (8, 9), (10, 11), ()])
def test_when_it_is_put_back(lag, patience, outside):
    """Kept from step 3 for 6 steps: values of the steps from 4 on count that are read by step 9."""
    rollback = fsh.Rollback(6, metric="loss", above=5.0, lag=lag, patience=patience)
    hooks = make_hooks(halve, fsh.at(3), options={"rollback": rollback})
    state = make_state(0)
    for step in range(1, 14):
        state = hooks(step, state.replace(step=step), metrics={"loss": losses(outside)(step)})
    expected, run = [], 0
    for step in range(4, 10 - lag):
        run = run + 1 if step in outside else 0
        if run == patience:
            expected = [step + lag]
            break
    assert [step for _, _, step in events(hooks, "rolled_back")] == expected
    assert w_of(state) == ([1, 1] if expected else [0.5, 0.5])


@pytest.mark.parametrize(
    ("value", "band", "leaves"),
    [(5.0, {"above": 5.0}, False), (5.1, {"above": 5.0}, True), (1.0, {"below": 1.0}, False),
     (0.9, {"below": 1.0}, True), (3.0, {"below": 1.0, "above": 5.0}, False), (float("nan"), {"above": 5.0}, True),
     (float("-inf"), {"above": 5.0}, True), (float("nan"), {}, True), (1e30, {}, False)],
)  # fmt: skip
def test_what_lies_outside(value, band, leaves):
    schedule = Band(fsh.Rollback(20, metric="loss", **band), after=2)
    assert schedule.observe(schedule.begin(), 2, value)[1] is None
    assert (schedule.observe(schedule.begin(), 3, value)[1] is not None) == leaves


def test_a_metric_on_the_device_and_a_missing_one():
    hooks = make_hooks(halve, fsh.at(2), options={"rollback": LOSS})
    state = make_state(1)
    with pytest.raises(e.InputError, match="A schedule looks at 'metrics/loss'") as caught:
        hooks(1, state)
    assert caught.value.hook == "a"
    for step in range(1, 6):
        state = hooks(step, state.replace(step=step), metrics={"loss": jnp.float32(9.0 if step == 3 else 1.0)})
    assert events(hooks, "rolled_back") == [("rolled_back", "a", 4)]
    state = make_hooks(halve, fsh.at(1), options={"rollback": LOSS})
    after = state(1, make_state(1), metrics={"loss": 1.0})
    with pytest.raises(e.InputError, match="rollback of fire 0"):
        state(2, after.replace(step=2), metrics={})


def test_nothing_is_watched_or_kept_any_more_when_the_steps_are_over():
    hooks = make_hooks(halve, fsh.at(2), options={"rollback": fsh.Rollback(5, metric="loss", above=5.0, lag=1)})
    state, wakes = make_state(0), {}
    for step in range(1, 12):
        state = hooks(step, state.replace(step=step), metrics={"loss": 1.0})
        wakes[step] = hooks._wake
    assert [step for step, wake in wakes.items() if wake == WATCHING] == [2, 3, 4, 5, 6]
    assert hooks._keeper.fires == ()
    idle = make_hooks(halve, fsh.at(2))
    state = make_state(0)
    for step in range(1, 12):
        state = idle(step, state.replace(step=step))
    assert idle._wake == wakes[11]  # as if there had been no rollback


def test_without_a_metric_calls_stay_idle():
    hooks = make_hooks(halve, fsh.at(2), options={"rollback": fsh.Rollback(50)}, settle_after=1)
    state = make_state(0)
    for step in range(1, 9):
        state = hooks(step, state.replace(step=step))
    assert hooks._wake == 52
    assert hooks(9, state) is state


# By hand.


def test_undo_goes_back_fire_by_fire():
    hooks = make_hooks(halve, fsh.at(2, 4), options={"rollback": fsh.Rollback(100)})
    hooks.add("b", lambda v: v * 3, params="v", when=fsh.at(3), rollback=fsh.Rollback(100, to="host"))
    seen = {}
    state = train(hooks, fresh(), range(1, 6), seen=seen)
    for fired, path in ((4, "w"), (3, "v"), (2, "w")):
        before = numpy_of(state)
        state = hooks.undo(state)
        assert_bitwise_equal(leaf_and_slots(numpy_of(state), path), leaf_and_slots(seen[fired][0], path))
        other = "v" if path == "w" else "w"
        assert_bitwise_equal(leaf_and_slots(numpy_of(state), other), leaf_and_slots(before, other))
    assert [(r.hook, r.step, json.loads(r.detail)) for r in hooks.ledger.records if r.event == "undone"] == [
        ("a", 5, {"fired": 4}), ("b", 5, {"fired": 3}), ("a", 5, {"fired": 2})]  # fmt: skip
    with pytest.raises(e.HookError, match="No fire is kept that could be undone"):
        hooks.undo(state)
    train(hooks, state, range(6, 9))  # all is well with it


def test_a_fire_by_hand_can_be_undone():
    hooks = make_hooks(halve, fsh.at(100), options={"rollback": fsh.Rollback(10)})
    state = fresh(3)
    after = hooks.undo(hooks.fire("a", state))
    assert_bitwise_equal(numpy_of(after), numpy_of(state))
    assert after.params["w"] is state.params["w"]  # no copy: the very array


def test_a_preview_keeps_nothing():
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(10)})
    hooks.preview("a", make_state(1))
    assert hooks._keeper.fires == ()


def test_what_fired_on_the_same_leaves_since_forbids_to_undo():
    hooks = make_hooks(halve, fsh.at(1), options={"rollback": fsh.Rollback(100)})
    hooks.add("b", halve, params="w", when=fsh.at(2))
    state = train(hooks, fresh(), range(1, 4))
    with pytest.raises(e.HookError, match="Another fire has touched the same leaves since") as caught:
        hooks.undo(state)
    assert (caught.value.hook, caught.value.step, caught.value.found) == ("a", 1, "hook 'b' at step 2")
    other = make_hooks(halve, fsh.at(1), options={"rollback": fsh.Rollback(100)})
    other.add("b", halve, params="v", when=fsh.at(2))
    assert events(other, "undone") == []
    other.undo(train(other, fresh(), range(1, 4)))
    assert events(other, "undone") == [("undone", "a", 3)]


def test_a_metric_takes_with_it_what_fired_since():
    """`b` halves the same leaf at 4 and keeps it too; the metric of `a` alone is out at 6."""
    hooks = make_hooks(halve, fsh.at(3), options={"rollback": LOSS})
    hooks.add("b", halve, params="w", when=fsh.at(4), rollback=fsh.Rollback(50))
    seen = {}
    train(hooks, fresh(), range(1, 9), when_left, seen)
    assert_bitwise_equal(leaf_and_slots(seen[7][1]), leaf_and_slots(seen[3][0]))
    [record] = [record for record in hooks.ledger.records if record.event == "rolled_back"]
    assert json.loads(record.detail) == {"fired": 3, "with": [1]}
    assert hooks._keeper.fires == ()


def test_of_two_fires_on_the_same_leaves_the_last_goes_first():
    """Fires at 3 and 5; outside at 6 and at 10: read at 7, which undoes the second, and at 11, which undoes the first.

    The value of step 7 is outside too, but the first fire's band looks at those after its rollback only.
    """
    hooks = make_hooks(halve, fsh.at(3, 5), options={"rollback": LOSS})
    seen = {}
    train(hooks, fresh(), range(1, 13), losses((6, 7, 10)), seen)
    assert [step for _, _, step in events(hooks, "rolled_back")] == [7, 11]
    assert_bitwise_equal(leaf_and_slots(seen[7][1]), leaf_and_slots(seen[5][0]))
    assert_bitwise_equal(leaf_and_slots(seen[11][1]), leaf_and_slots(seen[3][0]))


def test_fires_on_other_leaves_are_rolled_back_together():
    hooks = make_hooks(halve, fsh.at(3), options={"rollback": LOSS})
    hooks.add("b", halve, params="v", when=fsh.at(4), rollback=LOSS)
    seen = {}
    train(hooks, fresh(), range(1, 9), when_left, seen)
    assert events(hooks, "rolled_back") == [("rolled_back", "b", 7), ("rolled_back", "a", 7)]
    assert_bitwise_equal(leaf_and_slots(seen[7][1], "w"), leaf_and_slots(seen[3][0], "w"))
    assert_bitwise_equal(leaf_and_slots(seen[7][1], "v"), leaf_and_slots(seen[4][0], "v"))


@pytest.mark.parametrize("settle_after", [1, 10])
def test_a_refused_fire_is_not_put_back(settle_after):
    """Nothing happened that could be undone, and the train steps since are not to be lost."""
    hooks = make_hooks(lambda w: w / 0, fsh.at(3), options={"rollback": LOSS}, on_error="skip",
                       settle_after=settle_after)  # fmt: skip
    seen = {}
    state = train(hooks, fresh(), range(1, 9), when_left, seen)
    assert events(hooks, "rolled_back") == []
    assert_bitwise_equal(seen[7][1], seen[7][0])
    with pytest.raises(e.HookError, match="No fire is kept"):
        hooks.undo(state)


def test_a_fire_that_changes_shapes_lets_go_of_everything(caplog):
    hooks = make_hooks(halve, fsh.at(1), options={"rollback": fsh.Rollback(100)})
    hooks.add("grow", lambda w: jnp.tile(w, (1, 2)), params="w", when=fsh.at(2), on_reshape=lambda state, record: None)
    state = train(hooks, fresh(), range(1, 4))
    assert "can not be put back: hook grow changed the structure" in caplog.text
    with pytest.raises(e.HookError, match="No fire is kept"):
        hooks.undo(state)


def test_when_a_later_hook_fails_the_rollback_happens_in_the_call_that_tries_again():
    broken = [True]

    def fragile(v, mode="fine"):
        if mode == "broken" and broken[0]:
            raise ValueError
        return v

    hooks = make_hooks(halve, fsh.at(2), options={"rollback": LOSS})
    hooks.add("b", fragile, params="v", when=fsh.at(5))
    state = make_state(0, w=jnp.ones(2), v=jnp.ones(3))
    for step in range(1, 5):
        state = hooks(step, state.replace(step=step), metrics={"loss": 9.0 if step == 4 else 1.0})
    recorded = list(hooks.ledger.records)
    with pytest.raises(e.UserCodeError):
        hooks(5, state.replace(step=5), metrics={"loss": 1.0}, mode="broken")
    assert hooks.ledger.records[: len(recorded)] == recorded
    assert events(hooks, "rolled_back") == []
    broken[0] = False
    assert w_of(hooks(5, state.replace(step=5), metrics={"loss": 1.0}, mode="broken")) == [1, 1]
    assert events(hooks, "rolled_back") == [("rolled_back", "a", 5)]


def test_a_hook_with_rollback_stays_on_the_host():
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(3)})
    with pytest.raises(e.HookError, match="a: what it keeps for a rollback lies outside of the train state"):
        jax.jit(hooks.in_graph)(hooks.init(make_state(jnp.int32(0))))


def test_a_removed_hook_keeps_nothing():
    hooks = make_hooks(halve, fsh.at(1), options={"rollback": LOSS})
    state = train(hooks, fresh(), range(1, 3))
    hooks.remove("a")
    assert (hooks._keeper.fires, hooks._watching._watches) == ((), {})
    assert hooks(3, state) is state


# Where leaves lie, and what else they are.


def devices(kind):
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("to", ["device", "host"])
def test_shardings_stay(kind, to):
    mesh = devices(kind)
    places = {"v": PartitionSpec("b"), "w": PartitionSpec("b", "a")}
    with jax.set_mesh(mesh):
        state = jax.device_put(fresh(), NamedSharding(mesh, PartitionSpec()))
        place = {path: NamedSharding(mesh, spec) for path, spec in places.items()}
        params = jax.tree.map(jax.device_put, state.params, place)
        mu, nu = (jax.tree.map(jax.device_put, tree, place) for tree in (state.opt_state[0].mu, state.opt_state[0].nu))
        adam = state.opt_state[0]._replace(mu=mu, nu=nu)
        state = state.replace(params=params, opt_state=(adam, *state.opt_state[1:]))
        hooks = make_hooks(
            halve, fsh.at(2), options={"rollback": fsh.Rollback(20, metric="loss", above=5.0, lag=1, to=to)}
        )
        seen = {}
        state = train(hooks, state, range(1, 4), when_left, seen)
        before = jax.tree.map(lambda leaf: (leaf.sharding, leaf.committed), state)
        for step in range(4, 8):
            state = train_step(state)
            state = hooks(step, state, metrics={"loss": when_left(step)})
        assert events(hooks, "rolled_back") == [("rolled_back", "a", 7)]
        assert_bitwise_equal(leaf_and_slots(numpy_of(state)), leaf_and_slots(seen[2][0]))
        assert jax.tree.map(lambda leaf: (leaf.sharding, leaf.committed), state) == before


def test_committedness_is_that_of_the_leaf_now():
    loose = fresh(1)
    held = jax.device_put(loose, jax.devices()[0])
    for state, committed in ((loose, False), (held, True)):
        for to in ("device", "host"):
            hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9, to=to)})
            after = hooks.undo(hooks(1, state))
            assert after.params["w"].committed == after.opt_state[0].mu["w"].committed == committed
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    after = hooks.undo(jax.device_put(hooks(1, loose), jax.devices()[1]))
    assert after.params["w"].devices() == {jax.devices()[1]}


def test_a_rollback_compiles_the_train_step_not_anew():
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return state.apply_gradients(grads=state.params)

    hooks = make_hooks(halve, fsh.at(4), params="*", options={"rollback": LOSS})
    state = fresh(w=jnp.ones((2, 4)), x=jnp.asarray(2.0))  # a number, which loses its weak type in three steps
    counts = []
    for number in range(1, 10):
        state = hooks(number, step(state), metrics={"loss": when_left(number)})
        counts.append(len(traces))
    assert events(hooks, "rolled_back") == [("rolled_back", "a", 7)]
    assert counts[3:] == counts[2:3] * 6


def test_boxes_stay():
    boxed = {"w": nn.Partitioned(jnp.arange(4.0), names=("a",)), "v": jnp.ones(2)}
    state = make_state(1, ADAM, **boxed)
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    after = hooks(1, state)
    assert isinstance(hooks.undo(after).params["w"], meta.Partitioned)
    assert_bitwise_equal(hooks._keeper.fires, ())
    again = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    assert_bitwise_equal(again.undo(again(1, state)), state)


def rolled_back_in_training(state, surgery, params, **options):
    """The state before a fire, before its undo, and after; two donating train steps lie between."""
    hooks = make_hooks(surgery, fsh.at(2), params=params, options={"rollback": fsh.Rollback(9), **options})
    state = hooks.init(state) if hasattr(surgery, "init_memory") else state
    state = hooks(1, train_step(state))
    state = train_step(state)
    before = jax.tree.map(np.array, state)
    state = hooks(2, state)
    state = train_step(train_step(state))
    late = jax.tree.map(np.array, state)
    return before, late, jax.tree.map(np.array, hooks.undo(state))


def test_a_layer_is_put_back_and_the_others_are_not():
    state = fresh(layers=jnp.arange(12.0).reshape(4, 3) / 7)
    before, late, after = rolled_back_in_training(state, halve, "layers[1:3]")
    for tree in range(3):
        old, new, now = (
            [one.params["layers"], one.opt_state[0].mu["layers"], one.opt_state[0].nu["layers"]][tree]
            for one in (before, late, after)
        )
        np.testing.assert_array_equal(now[1:3], old[1:3])
        np.testing.assert_array_equal(now[[0, 3]], new[[0, 3]])
        assert (old != new).any(axis=1).all()


def test_memory_is_put_back():
    class Average:
        def init_memory(self, leaf):
            return jnp.zeros_like(leaf)

        def __call__(self, leaf, memory):
            return leaf / 2, memory + leaf

    before, late, after = rolled_back_in_training(fresh().replace(surgery=None), Average(), "w")
    memory = [one.surgery["memory"]["a"]["w"] for one in (before, late, after)]
    np.testing.assert_array_equal(memory[2], memory[0])
    assert (memory[1] != memory[0]).all()
    np.testing.assert_array_equal(after.params["w"], before.params["w"])


def test_slots_in_one_vector_and_restarts_are_put_back():
    """L-BFGS forgets its memory at an edit: that belongs to no leaf, and comes back with the rest."""
    before, late, after = rolled_back_in_training(fresh(tx=optax.flatten(optax.adam(0.1))), halve, "w")
    mu = [one.opt_state[0].mu for one in (before, late, after)]
    np.testing.assert_array_equal(mu[2][6:], mu[0][6:])  # v has six elements, w comes after it
    np.testing.assert_array_equal(mu[2][:6], mu[1][:6])
    apart = jax.tree.map(jnp.copy, fresh(tx=optax.scale_by_lbfgs(memory_size=2)))  # `init` makes one array for two
    before, late, after = rolled_back_in_training(apart, halve, "w")
    old, new, now = (one.opt_state for one in (before, late, after))
    np.testing.assert_array_equal(now.weights_memory, old.weights_memory)
    np.testing.assert_array_equal(now.diff_params_memory["w"], old.diff_params_memory["w"])
    np.testing.assert_array_equal(now.diff_params_memory["v"], new.diff_params_memory["v"])


def test_mirrors_are_put_back():
    class WithAverage(fsh.TrainState):
        ema: dict = None

    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    ema = {"w": jnp.arange(3.0), "v": jnp.arange(2.0)}
    state = WithAverage.create(apply_fn=None, params=params, tx=ADAM, ema=ema).replace(step=1)
    hooks = make_hooks(lambda w: -w[::-1], options={"rollback": fsh.Rollback(9)}, mirrors={"ema": "param"})
    after = hooks(1, state)
    assert after.ema["w"].tolist() == [-2, -1, 0]
    changed = after.replace(ema={"w": after.ema["w"] + 1, "v": after.ema["v"] + 1})
    undone = hooks.undo(changed)
    assert (undone.ema["w"].tolist(), undone.ema["v"].tolist()) == ([0, 1, 2], [1, 2])


def test_what_the_new_state_still_holds_is_copied():
    """Slots that a fire leaves alone, and copies of the parameters that share their memory: a train step takes both."""
    w = jnp.arange(4.0)
    alias = jax.device_put(w, w.sharding)
    state = make_state(1, w=w).replace(opt_state={"start": {"w": alias}})
    assert alias is not w
    site = kept_leaves.site_of(make_hooks(halve)._hooks["a"].operation, make_state(1, w=w), "a")
    [kept] = kept_leaves.kept_of(site, state.replace(params={"w": w / 2}), host=False)
    assert kept.unsafe_buffer_pointer() != w.unsafe_buffer_pointer()
    [same] = kept_leaves.kept_of(site, make_state(1, w=w / 2), host=False)
    assert same is w


def test_a_fire_waits_for_nothing():
    """The train step takes long; the host is through with the fire before it."""

    @jax.jit
    def slow(state):
        w = jax.lax.fori_loop(0, 400, lambda i, w: jnp.sin(w @ w * 1e-3), state.params["w"])
        return state.replace(params={"w": w})

    hooks = make_hooks(halve, fsh.every(1), options={"rollback": fsh.Rollback(2)})
    state = make_state(jnp.int32(0), ADAM, w=jnp.ones((300, 300)))
    for step in (1, 2, 3):
        state = slow(state)
        was_ready = state.params["w"].is_ready()
        state = hooks(step, state.replace(step=step))
    assert not was_ready
    assert not state.params["w"].is_ready()


def test_a_leaf_of_numpy_is_kept_as_it_was():
    w = np.ones(3, np.float32)
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    after = hooks(1, make_state(1, w=w))
    w[:] = 7
    assert w_of(hooks.undo(after)) == [1, 1, 1]


# Across a checkpoint.


def make_watched(to="device"):
    hooks = make_hooks(halve, fsh.at(3), options={"rollback": fsh.Rollback(20, metric="loss", above=5.0, lag=3, to=to,
                                                                          patience=2)})  # fmt: skip
    hooks.add("b", lambda leaves: {k: v * 2 for k, v in leaves.items()}, params="*", when=fsh.at(4),
              rollback=fsh.Rollback(30, to=to))  # fmt: skip
    return hooks


@pytest.mark.parametrize("to", ["device", "host"])
@pytest.mark.parametrize("cut", [4, 5, 6, 7, 8])
def test_what_is_kept_goes_on_after_a_checkpoint(cut, to):
    """Outside at 5 and 6, which is read at 9: before and after the cut."""
    whole, first, second = make_watched(to), make_watched(to), make_watched(to)
    expected = train(whole, fresh(), range(1, 12), losses((5, 6)))
    state = train(first, fresh(), range(1, cut + 1), losses((5, 6)))
    first.flush()
    facts = json.loads(json.dumps(first._keeper.to_json()))
    arrays = first._keeper.arrays()
    abstract = second._keeper.abstract(facts, jax.eval_shape(lambda: state))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), arrays
    )
    saved = jax.tree.map(np.array, arrays)
    second._settler.from_json(first._settler.to_json())
    second._keeper.restored(facts, jax.tree.map(jnp.asarray, saved))
    second._begin(cut)
    second._unchecked.clear()
    after = train(second, state, range(cut + 1, 12), losses((5, 6)))
    assert_bitwise_equal(numpy_of(after), numpy_of(expected))
    told = [[(r.event, r.hook, r.step, r.id, r.triggers, r.detail) for r in hooks.ledger.records
             if r.event == "rolled_back"] for hooks in (second, whole)]  # fmt: skip
    assert told[0] == told[1]
    assert [(hook, step) for _, hook, step, *_ in told[0]] == [("a", 9)]
    assert json.loads(told[0][0][-1]) == {"fired": 3, "with": [1]}


def test_abstract_arrays_lie_as_the_leaves_do():
    mesh = devices(AxisType.Auto)
    over = NamedSharding(mesh, PartitionSpec("a", "b"))
    w = jax.device_put(jnp.ones((4, 2)), over)
    hooks = make_hooks(halve, fsh.at(1), params="w", options={"rollback": fsh.Rollback(9)})
    hooks.add("b", halve, params="w[1]", when=fsh.at(1), rollback=fsh.Rollback(9))
    state = hooks(1, make_state(1, ADAM, w=w))
    facts = hooks._keeper.to_json()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
    seen = jax.eval_shape(lambda: state).replace(params=shapes, opt_state=jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.opt_state))  # fmt: skip
    for one in (state, seen):
        abstract = hooks._keeper.abstract(facts, one)
        assert [leaf.sharding for leaf in abstract["0"].values()] == [over] * 3
        assert [leaf.sharding for leaf in abstract["1"].values()] == [NamedSharding(mesh, PartitionSpec("b"))] * 3
    hooks.remove("b")  # it is in the checkpoint all the same
    assert {leaf.shape for leaf in hooks._keeper.abstract(facts, state)["1"].values()} == {(2,)}


# Errors.


def kept(**options):
    return lambda: make_hooks(halve, options={"rollback": fsh.Rollback(9), **options})


def undo_elsewhere():
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    hooks(1, make_state(1))
    hooks.undo(make_state(1, w=jnp.ones(3)))


def undo_deleted():
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    state = make_state(1)
    after = hooks(1, state)
    state.params["w"].delete()
    hooks.undo(after)


def restored(facts, arrays):
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    hooks._keeper.restored(facts, arrays)


def abstract_of(state):
    hooks = make_hooks(halve, options={"rollback": fsh.Rollback(9)})
    hooks(1, make_state(1))
    hooks._keeper.abstract(hooks._keeper.to_json(), state)


HOOK, STATE = e.HookError, e.StateError
CASES = {
    "steps": Case(lambda: fsh.Rollback(0), HOOK, ("`steps` of `Rollback`", "at least 1", "Found: int 0")),
    "steps_float": Case(lambda: fsh.Rollback(1.5), HOOK, ("`steps` of `Rollback`", "Found: float 1.5")),
    "patience": Case(lambda: fsh.Rollback(9, patience=0), HOOK, ("`patience` of `Rollback`",)),
    "lag": Case(lambda: fsh.Rollback(9, lag=-1), HOOK, ("`lag` of `Rollback`", "at least 0")),
    "to": Case(lambda: fsh.Rollback(9, to="disk"), HOOK, ("where leaves are kept", "'disk'", "to='host'")),
    "no_metric": Case(lambda: fsh.Rollback(9, above=1.0), HOOK, ("needs a name", "metric=None")),
    "metric": Case(lambda: fsh.Rollback(9, metric=3), HOOK, ("needs a name", "metric=3")),
    "bound": Case(lambda: fsh.Rollback(9, metric="loss", above="5"), HOOK, ("`above` of `Rollback`", "Found: str 5")),
    "infinite": Case(lambda: fsh.Rollback(9, metric="loss", below=float("inf")), HOOK, ("must be a finite number",)),
    "empty": Case(lambda: fsh.Rollback(9, metric="loss", above=1, below=2), HOOK, ("is empty", "from 2.0 to 1.0")),
    "short": Case(lambda: fsh.Rollback(4, metric="loss"), HOOK, ("only after the leaves are let go", "lag=4")),
    "no_rollback": Case(kept(rollback=100), HOOK, ("is no `fsh.Rollback`", "Found: int 100", "steps=200")),
    "reshape": Case(kept(apply_fn=fail), HOOK, ("may change the structure", "Found: apply_fn=", "checkpoint")),
    "optimizer": Case(lambda: make_hooks(fsh.surgeries.SwitchOptimizer(MOMENTUM), params="**",
                                         options={"rollback": fsh.Rollback(9)}), HOOK,
                      ("SwitchOptimizer, which edits the optimizer",)),
    "undeclared": Case(lambda: make_hooks(lambda w: jnp.tile(w, 2), options={"rollback": fsh.Rollback(9)})(
        1, make_state(1)), e.StructureError, ("changes the shape of a leaf",)),
    "other_leaves": Case(undo_elsewhere, STATE, ("does not fit the state any more", "or of other shapes")),
    "deleted": Case(undo_deleted, STATE, ("has been deleted", "donated", "to='host'")),
    "saved": Case(lambda: restored([{"hook": "a"}], {}), STATE, ("not what was saved of the fires that are kept",)),
    "saved_arrays": Case(lambda: restored([], {"3": {}}), STATE, ("not what was saved", "['3']")),
    "abstract": Case(lambda: abstract_of(make_state(1, w=jnp.ones(3))), STATE,
                     ("not what the hook selects in this state", "1 arrays saved, 1 selected")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    with pytest.raises(e.SurgeryError) as caught:
        CASES[name].run()
    assert type(caught.value) is CASES[name].error
    assert [part for part in CASES[name].says if part not in str(caught.value)] == [], str(caught.value)
    assert len(str(caught.value)) < 1000


def test_layers_overlap_with_their_leaf_and_with_themselves():
    paths = ["a/k", "a/k[0]", "a/k[1]", "b", "a/kk"]
    expected = {("a/k", "a/k[0]"), ("a/k", "a/k[1]")}
    for one in paths:
        for other in paths:
            touch = one == other or (one, other) in expected or (other, one) in expected
            assert kept_leaves.overlap((one,), (other,)) == touch
