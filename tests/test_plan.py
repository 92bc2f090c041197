"""A plan says what fires; here it is held against what then does."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny import QUICK, assert_bitwise_equal, events, halve, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e


def none(state, record):
    """An `on_reshape=` that has nothing to do."""


class Grow:
    """Every hidden unit twice."""

    preserves = "function"

    def __call__(self, leaves):
        return {
            "in/kernel": jnp.tile(leaves["in/kernel"], (1, 2)),
            "in/bias": jnp.tile(leaves["in/bias"], 2),
            "out/kernel": jnp.tile(leaves["out/kernel"], (2, 1)) / 2,
        }


class Halves:
    """Two leaves in the place of one; they remember their sum."""

    def __call__(self, leaves):
        left, right = jnp.split(leaves["side/kernel"], 2, axis=1)
        return {"left/kernel": left, "right/kernel": right}


class Average:
    def init_memory(self, leaf):
        return leaf

    def observe(self, leaf, memory):
        return leaf, (memory + leaf) / 2

    def __call__(self, leaf, memory):
        return memory, memory


def params(width=4):
    return {
        "in": {"kernel": jnp.ones((3, width)), "bias": jnp.ones(width, jnp.bfloat16)},
        "out": {"kernel": jnp.ones((width, 2))},
        "side": {"kernel": jnp.ones((4, 6))},
    }


def state_of(tx=None, **kwargs):
    return make_state(tx=tx or optax.adam(0.1), **params(**kwargs))


def busy_hooks(**kwargs):
    """Hooks of every sort, some of which meet the shapes that others leave."""
    hooks = fsh.SurgeryHooks(**kwargs)
    grown = {"params": ["in/*", "out/kernel"], "on_reshape": none, **QUICK}
    hooks.add("shrink", fsh.surgeries.Scale(0.5), params="**/kernel", when=fsh.every(3), **QUICK)
    hooks.add("grow", Grow(), when=fsh.at(6, 11), priority=1, **grown)
    hooks.add("halves", Halves(), params="side/kernel", when=fsh.at(9), on_reshape=none, **QUICK)
    switch = fsh.surgeries.SwitchOptimizer(optax.sgd(0.1, momentum=0.9))
    hooks.add("switch", switch, params="**", when=fsh.at(12))
    hooks.add("average", Average(), params="in/kernel", when=fsh.at(6, 13), **QUICK)
    hooks.add("noise", fsh.surgeries.Noise(0.1), params="in/*", when=fsh.at(6), priority=2, **QUICK)
    return hooks


def run(hooks, state, num_steps):
    """A loop whose train step changes nothing but the step."""
    for step in range(1, num_steps + 1):
        state = hooks(step, state.replace(step=step))
    return state


def size(tree):
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def test_what_was_planned_is_what_fires():
    hooks = busy_hooks()
    state = hooks.init(state_of())
    plan = hooks.plan(state, 14)
    after = run(hooks, state, 14)
    fired = [record for record in hooks.ledger.records if record.event == "fired"]
    planned = plan.fires()
    assert [(fire.step, fire.hook) for fire in planned] == [(record.step, record.hook) for record in fired]
    assert len(fired) == 11
    for fire, record in zip(planned, fired, strict=True):
        held = {leaf.path: (leaf.after.shape, leaf.after.dtype) for leaf in fire.row.leaves if leaf.after}
        assert held == dict(zip(record.paths, record.leaves, strict=True)), fire
        gone = {leaf.path for leaf in fire.row.leaves if leaf.after is None}
        assert gone == set(record.removed)
        assert {leaf.path for leaf in fire.row.leaves if leaf.before is None} == set(record.added)
        if record.hook != "switch":  # which tells by itself what becomes of slots
            assert fire.row.rule == record.rule
    assert plan.params == (size(state.params), size(after.params))
    assert plan.opt_state == (size(state.opt_state), size(after.opt_state))


def test_slots_have_the_shapes_and_dtypes_that_they_get():
    """With moments in another dtype than their leaves, and a leaf in fewer bits."""
    hooks = make_hooks(Grow(), fsh.at(2), params=["in/*", "out/kernel"], options={"on_reshape": none, **QUICK})
    state = state_of(optax.adam(0.1, mu_dtype=jnp.bfloat16))
    [fire] = hooks.plan(state, 2).fires()
    after = run(hooks, state, 2)
    planned = {(leaf.path, slot.name): slot.after for leaf in fire.row.leaves for slot in leaf.slots}
    assert len(planned) == 6
    for name, tree in (("mu", after.opt_state[0].mu), ("nu", after.opt_state[0].nu)):
        for path in ("in/kernel", "in/bias", "out/kernel"):
            leaf = tree[path.split("/")[0]][path.split("/")[1]]
            slot = planned[path, f"ScaleByAdamState.{name}"]
            assert (slot.shape, slot.dtype) == (leaf.shape, str(leaf.dtype))
    assert {slot.rule for leaf in fire.row.leaves for slot in leaf.slots} == {"transport"}


def test_a_fire_meets_the_shapes_left_by_those_before_it_at_the_same_step():
    plan = busy_hooks().plan(state_of(), 6)
    assert [fire.hook for fire in plan.fires()][-4:] == ["noise", "grow", "shrink", "average"]
    widths = {
        fire.hook: next(leaf.before.shape[-1] for leaf in fire.row.leaves if leaf.path == "in/kernel")
        for fire in plan.fires()
        if fire.step == 6
    }
    assert widths == {"noise": 4, "grow": 4, "shrink": 8, "average": 8}


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """What XLA compiles meanwhile."""
    events: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.clear_event_listeners()


def test_nothing_is_allocated_or_compiled():
    """On leaves of which no machine could hold one; a smaller plan before it has probed the optimizer."""
    hooks = busy_hooks()
    hooks.remove("switch")  # which measures two optimizers of each structure, on two elements
    hooks.plan(state_of(), 14)
    vast = jax.eval_shape(lambda: state_of(width=4 * 10**11))
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    with compiled() as programs:
        plan = hooks.plan(vast, 14)
        gc.collect()
        assert {id(array) for array in jax.live_arrays()} <= before
        assert not programs
        jax.jit(lambda x: x + len(programs))(jnp.ones(3))  # the listener hears what is compiled
        assert programs
    assert plan.params[1] > 4 * plan.params[0] - 100 > 10**12


def test_a_plan_leaves_no_trace_in_hooks():
    def noisy():
        return make_hooks(fsh.surgeries.Noise(0.1), fsh.every(2))

    hooks, other = noisy(), noisy()
    hooks.plan(make_state(), 14)
    assert not hooks.ledger.records
    assert hooks.programs("a") == []
    first, expected = run(hooks, make_state(), 2), run(other, make_state(), 4)
    assert [fire.step for fire in hooks.plan(first, 4).fires()] == [4]
    for step in (3, 4):
        first = hooks(step, first.replace(step=step))
    assert_bitwise_equal(first.params, expected.params)
    assert events(hooks, "fired") == events(other, "fired")


def test_thousands_of_fires_are_foreseen_once_per_structure():
    seen: list[int] = []

    def grow(leaves):
        return {"w": jnp.concatenate([leaves["w"]] * 2)}

    def note(w):
        seen.append(w.shape[0])
        return w

    def calls(num_steps):
        seen.clear()
        hooks = make_hooks(note, fsh.every(1))
        hooks.add("same", lambda w: w + 1, params="w", when=fsh.every(2), on_reshape=none, **QUICK)
        hooks.add("grow", grow, params="w", when=fsh.at(3, 5), on_reshape=none, **QUICK)
        plan = hooks.plan(make_state(), num_steps)
        assert len(plan.fires("a")) == num_steps
        return list(seen)

    few, many = calls(10), calls(20_000)
    assert few == many
    assert sorted(set(few)) == [2, 4, 8]


def test_rows_count_fires_between_changes_of_structure():
    hooks = busy_hooks()
    plan = hooks.plan(state_of(), 3_000)
    assert [row.steps[:2] for row in plan.rows if row.hook == "shrink"] == [(3,), (6, 9), (12,), (15, 18)]
    assert len(plan.rows) < 20
    assert [fire.step for fire in plan.fires("shrink")] == list(range(3, 3_001, 3))


class TestStart:
    def test_the_step_of_the_state_is_over(self):
        hooks = make_hooks(halve, fsh.every(2))
        assert [fire.step for fire in hooks.plan(make_state(4), 8).fires()] == [6, 8]
        assert hooks.plan(make_state(jnp.int32(4)), 8).start == 4

    def test_an_abstract_step_is_0_unless_it_is_said(self):
        hooks, abstract = make_hooks(halve, fsh.every(2)), jax.eval_shape(lambda: make_state(jnp.int32(4)))
        assert [fire.step for fire in hooks.plan(abstract, 4).fires()] == [2, 4]
        assert [fire.step for fire in hooks.plan(abstract, 4, step=2).fires()] == [4]

    def test_step_0_is_planned_until_the_hooks_were_called(self):
        hooks = make_hooks(halve, fsh.at(0, 1))
        plan = hooks.plan(make_state(), 1)
        assert [fire.step for fire in plan.fires()] == [0, 1]
        assert "a: step 0 is before training: it fires in hooks(0, state)" in str(plan)
        state = hooks(0, make_state())
        assert [fire.step for fire in hooks.plan(state, 1).fires()] == [1]

    def test_a_state_without_a_step(self):
        bound = fsh.bind(
            params={"w": jnp.ones(2)}, opt_state=optax.sgd(0.1).init({"w": jnp.ones(2)}), tx=optax.sgd(0.1)
        )
        assert [fire.step for fire in make_hooks(halve, fsh.every(2)).plan(bound, 4).fires()] == [2, 4]


class TestValuesDecide:
    spike = fsh.on_metric("loss", spike=3.0)

    def test_it_is_listed_beside_the_steps_that_are_known(self):
        plan = make_hooks(halve, self.spike | fsh.at(4)).plan(make_state(), 10)
        planned, watched = plan.rows
        assert (planned.steps, planned.watched, planned.when) == ((4,), False, "at(4)")
        assert (watched.steps, watched.watched, watched.span) == ((), True, (0, 10))
        assert "0 to 10, when on_metric('loss', spike=3.0)" in str(plan)
        assert [fire.step for fire in plan.fires()] == [4]

    def test_it_is_listed_for_each_of_the_shapes_that_it_may_meet(self):
        hooks = make_hooks(halve, self.spike)
        hooks.add("grow", Twofold(), params="w", when=fsh.at(5), on_reshape=none, **QUICK)  # after `a`, at one step
        rows = [row for row in hooks.plan(make_state(), 10).rows if row.watched]
        assert [(row.span, row.leaves[0].before.shape) for row in rows] == [((0, 5), (2,)), ((6, 10), (4,))]

    def test_what_it_would_change_is_not_taken_for_granted(self):
        hooks = make_hooks(Twofold(), self.spike, options={"on_reshape": none, **QUICK})
        hooks.add("later", halve, params="w", when=fsh.at(5), **QUICK)
        plan = hooks.plan(make_state(), 10)
        assert plan.params == (2, 2)
        assert "a: whether it fires is not known" in str(plan)
        assert [row.params for row in plan.rows if row.watched] == [(2, 4)]


class Twofold:
    def __call__(self, w):
        return jnp.concatenate([w, w])


class TestInputs:
    @staticmethod
    def scaled(w, factor):
        return w * factor

    @staticmethod
    def padded(w, extra):
        return jnp.concatenate([w, extra])

    def test_one_that_is_missing_is_said_and_the_leaves_are_known_all_the_same(self):
        plan = make_hooks(self.scaled, fsh.at(1)).plan(make_state(tx=optax.sgd(0.1, momentum=0.9)), 2)
        [row] = plan.rows
        assert row.notes == ("it asks for factor, which is not given",)
        assert (row.paths, [slot.name for slot in row.leaves[0].slots]) == (("w",), ["TraceState.trace"])

    def test_shapes_that_depend_on_it_are_not_foreseen(self):
        hooks = make_hooks(self.padded, fsh.at(1), options={"on_reshape": none, **QUICK})
        [row] = hooks.plan(make_state(), 2).rows
        assert row.notes == ("it asks for extra, which is not given: its new shapes are not foreseen",)

    @pytest.mark.parametrize("extra", [jax.ShapeDtypeStruct((3,), jnp.float32), jnp.ones(3)])
    def test_given_as_an_array_or_its_shape(self, extra):
        hooks = make_hooks(self.padded, fsh.at(1), options={"on_reshape": none, **QUICK})
        [row] = hooks.plan(make_state(), 2, extra=extra).rows
        assert (row.leaves[0].change, row.notes) == ("w [2] -> [5]", ())

    def test_a_missing_one_of_a_hook_never_due_is_said_too(self):
        plan = make_hooks(self.scaled, fsh.at(9)).plan(make_state(), 2)
        assert plan.rows[0].notes == ("it asks for factor, which is not given", "not due by step 2: at(9)")


class TestStates:
    def test_memory_need_not_be_there_yet(self):
        hooks = fsh.SurgeryHooks()
        hooks.add("average", Average(), params="w", when=fsh.at(1))
        assert [fire.paths for fire in hooks.plan(make_state(), 1).fires()] == [("w",)]

    def test_mirrors_and_fields_stand_beside_the_parameters(self):
        class State(fsh.TrainState):
            ema: Any = None
            batch_stats: Any = None

        tree = {"w": jnp.ones(2)}
        state = State.create(apply_fn=None, params=tree, tx=optax.sgd(0.1), ema=tree, batch_stats={"mean": jnp.ones(3)})
        hooks = fsh.SurgeryHooks(mirrors={"ema": "param"})
        hooks.add("grow", Twofold(), params="w", when=fsh.at(1), on_reshape=none, **QUICK)
        hooks.add("both", halve, params="**", fields=("batch_stats",), when=fsh.at(2), **QUICK)
        grow, both = hooks.plan(jax.eval_shape(lambda: state), 2).rows
        [slot] = grow.leaves[0].slots
        assert (slot.kind, slot.before.shape, slot.after.shape) == ("param", (2,), (4,))
        assert [leaf.path for leaf in both.leaves] == ["batch_stats/mean", "w"]

    def test_shardings_of_abstract_leaves_do_not_matter(self):
        for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
            placed = NamedSharding(mesh, PartitionSpec("x"))
            hooks = busy_hooks()
            with jax.set_mesh(mesh):
                assert hooks.plan(self.placed(placed), 14).rows == hooks.plan(state_of(), 14).rows

    @staticmethod
    def placed(placed):
        state = jax.eval_shape(state_of)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), state.params)
        return state.replace(params=params)

    def test_boxes_frozen_dicts_and_nnx(self):
        boxed = make_state(w=nn.Partitioned(jnp.ones(2), names=("x",)))
        assert [leaf.path for leaf in make_hooks(halve).plan(boxed, 1).rows[0].leaves] == ["w"]
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        bound = fsh.bind_nnx(model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param))
        [row] = make_hooks(halve, fsh.at(1), params="kernel").plan(bound, 1).rows
        assert (row.paths, [slot.kind for slot in row.leaves[0].slots]) == (("kernel",), ["grad", "grad_sq"])
        assert model.kernel[...].shape == (2, 3)

    def test_layers_of_a_stack(self):
        state = make_state(tx=optax.adam(0.1), layers={"kernel": jnp.ones((4, 2, 3))})
        [row] = make_hooks(halve, fsh.at(1), params="layers/kernel[1:3]").plan(state, 1).rows
        assert [(leaf.path, leaf.after.shape) for leaf in row.leaves] == [
            ("layers/kernel[1]", (2, 3)),
            ("layers/kernel[2]", (2, 3)),
        ]


class TestErrors:
    """What hooks would raise, as a first call or a fire does: with the hook, and the step at which it is due."""

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(e.SelectionError, match="hook 'a', step 7: The pattern 'v'") as raised:
            make_hooks(halve, fsh.every(7), params="v").plan(make_state(), 10)
        assert (raised.value.hook, raised.value.step) == ("a", 7)

    def test_also_of_a_hook_that_is_due_later(self):
        with pytest.raises(e.SelectionError, match="hook 'a', step 70: "):
            make_hooks(halve, fsh.every(70), params="v").plan(make_state(), 10)

    def test_a_change_of_shape_that_is_not_announced(self):
        with pytest.raises(e.StructureError, match=r"hook 'a', step 3, path 'w': .* changes the shape") as raised:
            make_hooks(Twofold(), fsh.at(3)).plan(make_state(), 10)
        assert raised.value.found == "[2] -> [4]"

    def test_one_that_only_the_shapes_after_another_fire_show(self):
        def fixed(w):
            return w + jnp.ones(2)

        hooks = make_hooks(fixed, fsh.every(4))
        hooks.add("grow", Twofold(), params="w", when=fsh.at(5), on_reshape=none, **QUICK)
        assert len(hooks.plan(make_state(), 7).fires()) == 2
        with pytest.raises(e.UserCodeError, match="hook 'a', step 8") as raised:
            hooks.plan(make_state(), 8)
        assert "(4,)" in str(raised.value)

    def test_parts_of_a_state_and_steps(self):
        hooks = make_hooks(halve)
        with pytest.raises(e.StateError, match="needs params, opt_state"):
            hooks.plan({"w": 1}, 3)
        with pytest.raises(e.StepError, match="is a Python int"):
            hooks.plan(make_state(), 2.5)
        with pytest.raises(e.StepError, match="is a Python int"):
            hooks.plan(make_state(), 2, step=-1)
        with pytest.raises(e.InputError, match="reserved"):
            hooks.plan(make_state(), 2, path=1)

    def test_a_state_without_room_for_memory(self):
        from flax.training import train_state

        plain = train_state.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
        with pytest.raises(e.StateError, match="no `surgery` field"):
            make_hooks(Average()).plan(plain, 2)

    def test_fires_of_a_hook_that_there_is_not(self):
        with pytest.raises(e.HookError, match="no hook of this name") as raised:
            make_hooks(halve).plan(make_state(), 2).fires("b")
        assert raised.value.hook == "b"


TEXT = """\
Steps 0 to 12: 4 fires of 3 hooks; parameters 48 -> 72, optimizer state 97 -> 72
| Steps | Hook   | Fires | Leaves                                        | Slots  | Rule      | Changes of shape                                                        | Parameters |
|:------|:-------|------:|:----------------------------------------------|:-------|:----------|:------------------------------------------------------------------------|-----------:|
| 3, 6  | shrink |     2 | 3: in/kernel, out/kernel, side/kernel         | mu, nu | carry     | -                                                                       |         48 |
| 6     | grow   |     1 | 3: in/bias, in/kernel, out/kernel             | mu, nu | transport | in/bias [4] -> [8]; in/kernel [3,4] -> [3,8]; out/kernel [4,2] -> [8,2] |   48 -> 72 |
| 9     | switch |     1 | 4: in/bias, in/kernel, out/kernel, and 1 more | -      | keep      | ScaleByAdamState -> TraceState                                          |         72 |
"""  # noqa: E501


class TestText:
    def test_the_table(self):
        hooks = fsh.SurgeryHooks()
        hooks.add("shrink", fsh.surgeries.Scale(0.5), params="**/kernel", when=fsh.every(3, stop=6))
        hooks.add("grow", Grow(), params=["in/*", "out/kernel"], when=fsh.at(6), on_reshape=none)
        switch = fsh.surgeries.SwitchOptimizer(optax.sgd(0.1, momentum=0.9))
        hooks.add("switch", switch, params="**", when=fsh.at(9))
        assert str(hooks.plan(state_of(), 12)) == TEXT.rstrip()

    def test_what_is_not_due_is_said(self):
        assert "a: not due by step 5: at(9)" in str(make_hooks(halve, fsh.at(9)).plan(make_state(), 5))

    def test_without_hooks(self):
        assert str(fsh.SurgeryHooks().plan(make_state(), 5)).startswith(
            "Steps 0 to 5: 0 fires of 0 hooks; parameters 2,"
        )

    def test_json(self):
        plan = busy_hooks().plan(state_of(), 14)
        read = json.loads(json.dumps(plan.to_json()))
        grow = next(row for row in read["rows"] if row["hook"] == "grow")
        assert grow["steps"] == [6]
        assert grow["leaves"][1] == {
            "path": "in/kernel",
            "before": {"shape": [3, 4], "dtype": "float32"},
            "after": {"shape": [3, 8], "dtype": "float32"},
            "slots": grow["leaves"][1]["slots"],
        }
