"""The runner: which hooks fire at which call, in what order, what it refuses, and what it records of that."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import logging
from tiny import QUICK, SGD, events, halve, make_state, w_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import HookError, ScheduleError, StateError, StepError, SurgeryError, UserCodeError


def add_one(w):
    return w + 1


def make_hooks(when=None, surgery=halve, **kwargs):
    return tiny.make_hooks(surgery, when, **kwargs)


# Order.


@pytest.mark.parametrize(
    ("priorities", "order"),
    [
        ({"a": 0, "b": 0, "c": 0}, "abc"),
        ({"c": 0, "a": 0, "b": 0}, "cab"),
        ({"a": 0, "b": 5, "c": 0}, "bac"),
        ({"a": -1, "b": 0, "c": 2}, "cba"),
        ({"a": 1, "b": 0, "c": 1}, "acb"),
    ],
)
def test_hooks_fire_by_priority_then_registration(priorities, order):
    hooks = fsh.SurgeryHooks()
    for digit, (name, priority) in enumerate(priorities.items(), start=1):

        def edit(w, digit=digit):
            return w * 10 + digit

        hooks.add(name, edit, params="w", when=fsh.at(1), priority=priority, **QUICK)
    assert "".join(hooks.names) == order
    state = hooks(1, make_state(1, w=jnp.zeros(2)))
    number = {name: digit for digit, name in enumerate(priorities, start=1)}
    seen = int("".join(str(number[name]) for name in order))  # each hook sees the result of the one before
    assert w_of(state) == [seen, seen]
    assert events(hooks) == [("fired", name, 1) for name in order]


def test_each_hook_edits_its_own_leaves_and_leaves_the_rest_alone():
    hooks = make_hooks(fsh.at(2))
    hooks.add("b", add_one, params="v", when=fsh.at(2), **QUICK)
    hooks.add("c", add_one, params="**", when=fsh.at(3), **QUICK)
    state = make_state(1, w=jnp.ones(2), v=jnp.zeros(3), u=jnp.ones(1))
    assert hooks(1, state) is state
    after = hooks(2, state)
    assert (w_of(after), after.params["v"].tolist()) == ([0.5, 0.5], [1, 1, 1])
    assert after.params["u"] is state.params["u"]
    assert w_of(state) == [1, 1]  # the state that was passed is not touched
    assert hooks.ledger.records[-1].paths == ("v",)
    assert w_of(hooks(3, after)) == [1.5, 1.5]
    assert hooks.ledger.records[-1].paths == ("u", "v", "w")


# Names and other arguments of `add`.


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a.b", None, 3, "a\n"])
def test_malformed_names_are_refused(name):
    with pytest.raises(HookError, match="letters, digits") as caught:
        make_hooks(name=name)
    assert caught.value.found == repr(name)


def test_a_name_is_unique():
    hooks = make_hooks()
    with pytest.raises(HookError, match="The name is taken") as caught:
        hooks.add("a", halve, params="w", when=fsh.at(1))
    assert (caught.value.hook, caught.value.found) == ("a", "'a'")
    assert hooks.names == ("a",)


def test_names_of_equal_hash_are_refused():
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    hooks = make_hooks(name="plumless")
    with pytest.raises(HookError, match="same hash as another, and so the same keys") as caught:
        hooks.add("buckeroo", halve, params="w", when=fsh.at(1))
    assert (caught.value.hook, caught.value.found) == ("buckeroo", "'plumless'")
    hooks.remove("plumless")
    hooks.add("buckeroo", halve, params="w", when=fsh.at(1))
    assert hooks.names == ("buckeroo",)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"when": 100}, ScheduleError, "`when=` is no schedule. Found: 100"),
        ({"when": fsh.every}, ScheduleError, "`when=` is no schedule"),
        ({"priority": "high"}, HookError, "`priority=` is a Python int. Found: 'high'"),
        ({"priority": True}, HookError, "`priority=` is a Python int. Found: True"),
    ],
)
def test_arguments_of_add_are_checked(kwargs, error, text):
    hooks = fsh.SurgeryHooks()
    with pytest.raises(error) as caught:
        hooks.add("a", halve, params="w", **{"when": fsh.at(1), **kwargs})
    assert text in str(caught.value)
    assert caught.value.hook == "a"
    assert hooks.names == ()


def test_every_error_of_add_names_the_hook():
    for kwargs in ({"params": []}, {"opt_state": "teleport"}, {"guard": "maybe"}, {"fresh": 0}, {"expect": 0}):
        with pytest.raises(SurgeryError) as caught:
            fsh.SurgeryHooks().add("a", halve, **{"params": "w", "when": fsh.at(1), **kwargs})
        assert caught.value.hook == "a"


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"seed": 1.0}, "Python int. Found: 1.0"),
        ({"seed": True}, "Python int. Found: True"),
        ({"on_error": "ignore"}, "Unknown on_error=. Found: 'ignore'. Write instead: one of raise, skip"),
        ({"settle_after": -1}, "settle_after= is a number of steps. Found: -1"),
        ({"settle_after": 2.5}, "settle_after= is a number of steps. Found: 2.5"),
        ({"settle_after": False}, "settle_after= is a number of steps. Found: False"),
    ],
)
def test_arguments_of_the_runner_are_checked(kwargs, text):
    with pytest.raises(HookError) as caught:
        fsh.SurgeryHooks(**kwargs)
    assert text in str(caught.value)


def test_register_is_a_decorator_that_returns_the_function():
    hooks = fsh.SurgeryHooks()

    @hooks.register(params="w", when=fsh.at(1), **QUICK)
    def double(w):
        return 2 * w

    @hooks.register(params="w", when=fsh.at(1), name="again", priority=3, **QUICK)
    def add_three(w):
        return w + 3

    assert (double(3), add_three(3)) == (6, 6)
    assert hooks.names == ("again", "double")
    assert w_of(hooks(1, make_state(1))) == [8, 8]


# Steps.


def a_step(kind):
    """A value that is no step, by how one comes by it."""
    return {"jax": lambda: jnp.int32(1), "numpy": lambda: np.int64(1), "bool": lambda: True, "float": lambda: 1.0,
            "negative": lambda: -1, "none": lambda: None}[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["jax", "numpy", "bool", "float", "negative", "none"])
@pytest.mark.parametrize("started", [False, True])
def test_a_step_is_a_python_int_of_at_least_zero(kind, started):
    hooks = make_hooks(fsh.at(100))
    if started:
        hooks(0, make_state())
    for call in (hooks, lambda step, state: hooks.fire("a", state, step)):
        if kind == "none" and call is not hooks:
            continue  # `fire` reads the step from the state then
        with pytest.raises(StepError, match="`step` is a Python int of at least 0") as caught:
            call(a_step(kind), make_state(1))
        assert type(a_step(kind)).__name__ in caught.value.found
        assert "step += 1" in caught.value.write


def test_a_traced_step_or_state_is_refused():
    hooks = make_hooks()
    with pytest.raises(StepError, match="Found: a traced value") as caught:
        jax.jit(lambda state: hooks(state.step, state))(make_state(1))
    assert "outside of the jitted step" in caught.value.write
    calls = (lambda s: hooks(1, s), lambda s: hooks.fire("a", s, 1), lambda s: hooks.preview("a", s))
    for call in calls:
        with pytest.raises(StateError, match=r"traced \(the call is inside jit\) or abstract") as caught:
            jax.jit(call)(make_state(1))
        assert "fsh.operate" in caught.value.write
        with pytest.raises(StateError, match="or abstract"):
            call(jax.eval_shape(lambda: make_state(1)))
    assert hooks.ledger.records == []


@pytest.mark.parametrize("step", [5, 4, 0])
def test_steps_go_forward(step):
    hooks = make_hooks(fsh.at(100))
    hooks(5, make_state(5))
    with pytest.raises(StepError, match="Steps go forward") as caught:
        hooks(step, make_state(step))
    assert caught.value.found == f"step {step} after 5"
    state = make_state(6)
    assert hooks(6, state) is state  # the mistake cost nothing


def test_a_fire_is_not_doubled_by_a_repeated_step():
    hooks = make_hooks(fsh.at(5))
    state = hooks(5, make_state(5))
    with pytest.raises(StepError):
        hooks(5, state)
    assert events(hooks) == [("fired", "a", 5)]


@pytest.mark.parametrize(
    ("step", "held", "write"), [(0, 1, "hooks(step + 1, state)"), (3, 1, "hooks(1, state)"), (5, 9, "hooks(9, state)")]
)
def test_the_first_step_is_compared_with_the_states(step, held, write):
    hooks = make_hooks()
    with pytest.raises(StepError, match=r"must be what `state.step` holds") as caught:
        hooks(step, make_state(held))
    assert (caught.value.found, caught.value.write) == (f"step {step}, state.step {held}", write)
    assert hooks.ledger.records == []
    assert w_of(hooks(held, make_state(held))) == [0.5, 0.5]  # the retry is the first call


def test_later_steps_are_not_compared():
    hooks = make_hooks(fsh.at(2))
    hooks(1, make_state(1))
    assert w_of(hooks(2, make_state(1))) == [0.5, 0.5]


def test_a_state_without_a_step_is_taken_at_the_callers_word():
    class Plain:
        tx = SGD

        def __init__(self, params, opt_state):
            self.params, self.opt_state = params, opt_state

        def replace(self, **changes):
            return Plain(**{"params": self.params, "opt_state": self.opt_state, **changes})

    params = {"w": jnp.ones(2)}
    hooks = make_hooks()
    assert w_of(hooks(7, Plain(params, SGD.init(params)))) == [0.5, 0.5]
    with pytest.raises(StateError, match="The state has no `step`") as caught:
        hooks.fire("a", Plain(params, SGD.init(params)))
    assert caught.value.found == "Plain"


def test_a_state_replicated_for_pmap_is_refused():
    hooks = make_hooks()
    with pytest.raises(StateError, match="replicated for pmap") as caught:
        hooks(1, replicated(make_state(1)))
    assert caught.value.found == "state.step of shape [8]"
    assert "unreplicate" in caught.value.write


def replicated(state):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (jax.local_device_count(), *jnp.shape(x))), state)


@pytest.mark.parametrize("started", [False, True])
def test_a_call_without_a_state_never_does_nothing(started):
    hooks = make_hooks(fsh.at(100))
    if started:
        hooks(0, make_state())
    with pytest.raises(StateError, match="Hooks edit the state") as caught:
        hooks(1)
    assert (caught.value.found, caught.value.write) == ("hooks(step)", "state = hooks(step, state)")


# Jumps, late starts, changes of the set of hooks.


@pytest.mark.parametrize(
    ("when", "calls", "fired"),
    [
        (fsh.every(2), [1, 5], {5: (2, 4)}),
        (fsh.every(2), [1, 6], {6: (2, 4)}),
        (fsh.at(3), [1, 2, 4], {4: (3,)}),
        (fsh.at(3) | fsh.every(5), [1, 12, 13], {12: (3, 5, 10)}),
        (fsh.every(2), [0, 2, 4], {2: (), 4: ()}),
        (fsh.every(10), [1, 9, 11, 12], {11: (10,)}),
    ],
)
def test_a_jump_over_due_steps_fires_once_and_says_so(when, calls, fired):
    hooks = make_hooks(when)
    state = make_state(calls[0])
    for step in calls:
        before = w_of(state)
        state = hooks(step, state)
        assert (w_of(state) != before) == (step in fired)
    assert {r.step: r.passed for r in hooks.ledger.records if r.event == "fired"} == fired
    assert w_of(state) == [0.5 ** len(fired)] * 2


def test_strict_steps_refuse_a_jump():
    hooks = make_hooks(fsh.every(2), strict_steps=True)
    hooks.add("b", add_one, params="w", when=fsh.at(5), priority=1, **QUICK)
    state = hooks(1, make_state(1))
    with pytest.raises(StepError, match="jumps over steps") as caught:
        hooks(5, state)
    assert (caught.value.hook, caught.value.step) == ("a", 5)
    assert caught.value.found == "due at 2, 4, last call at 1"
    assert events(hooks) == []  # the other hook's fire did not happen either
    assert w_of(hooks(2, state)) == [0.5, 0.5]


@pytest.mark.parametrize(("first", "missed"), [(0, ()), (1, ()), (5, (2, 4)), (6, (2, 4))])
def test_a_late_first_call_takes_earlier_steps_as_past(first, missed, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    hooks = make_hooks(fsh.every(2))
    hooks.add("b", add_one, params="v", when=fsh.at(1000), **QUICK)
    hooks(first, make_state(first, w=jnp.ones(2), v=jnp.zeros(3)))
    passed = [r for r in hooks.ledger.records if r.event == "passed"]
    assert [(r.hook, r.step, r.passed) for r in passed] == ([("a", first, missed)] if missed else [])
    assert len(warnings) == len(passed)
    assert all("a was due at 2, 4, before the first call at step" in text for text in warnings)
    assert events(hooks, "fired") == ([("fired", "a", 6)] if first == 6 else [])  # late ones are never caught up
    assert [r.event for r in hooks.ledger.records].count("run") == 1


def test_remove_ends_a_hook_and_keeps_its_records():
    hooks = make_hooks()
    hooks.add("b", add_one, params="w", when=fsh.every(1), **QUICK)
    state = hooks(1, make_state(1))
    hooks.remove("a")
    assert hooks.names == ("b",)
    assert w_of(hooks(2, state)) == [2.5, 2.5]
    assert events(hooks) == [("fired", "a", 1), ("fired", "b", 1), ("fired", "b", 2)]
    with pytest.raises(HookError, match="There is no hook of this name") as caught:
        hooks.remove("a")
    assert caught.value.found == "hooks b"


@pytest.mark.parametrize("method", ["remove", "fire", "preview"])
def test_unknown_names_get_a_suggestion(method):
    hooks = make_hooks(name="head_norm")
    with pytest.raises(HookError, match="There is no hook of this name") as caught:
        getattr(hooks, method)(*(("head_nrom",) if method == "remove" else ("head_nrom", make_state())))
    assert (caught.value.hook, caught.value.found, caught.value.write) == ("head_nrom", "hooks head_norm", "head_norm")


def test_a_hook_added_while_training_fires_from_then_on():
    hooks = make_hooks(fsh.at(100))
    state = hooks(1, make_state(1))
    assert hooks(2, state) is state
    hooks.add("late", add_one, params="w", when=fsh.every(2), **QUICK)
    assert hooks(3, state) is state
    assert w_of(hooks(4, state)) == [2, 2]


def test_a_hook_is_checked_at_the_first_call_though_it_is_due_much_later():
    hooks = make_hooks(fsh.at(50_000), surgery=lambda w: w.shape.nonsense)
    with pytest.raises(UserCodeError) as caught:
        hooks(1, make_state(1))
    assert (caught.value.hook, caught.value.path) == ("a", "w")
    hooks.remove("a")
    state = make_state(1)
    assert hooks(1, state) is state


def test_a_hook_added_later_is_checked_at_the_next_call_whatever_comes_between():
    hooks = make_hooks(fsh.at(100))
    state = hooks(1, make_state(1))
    hooks.add("broken", lambda w: w.shape.nonsense, params="w", when=fsh.at(50_000))
    hooks.flush()
    hooks.fire("a", state)
    with pytest.raises(UserCodeError) as caught:
        hooks(2, state)
    assert caught.value.hook == "broken"


def test_idle_hooks_return_the_same_object():
    hooks, state = make_hooks(fsh.at(1_000)), make_state(0)
    assert all(hooks(step, state) is state for step in range(50))
    assert events(hooks) == []


def test_no_hooks_at_all():
    hooks, state = fsh.SurgeryHooks(), make_state(1)
    assert all(hooks(step, state) is state for step in (1, 2, 5))


def test_a_hook_added_after_its_step_is_recorded_as_passed():
    hooks = fsh.SurgeryHooks()
    hooks(50, make_state(50, w=jnp.ones(2)))
    hooks.add("late", halve, params="w", when=fsh.at(20, 60))
    passed = [record for record in hooks.ledger.records if record.event == "passed"]
    assert [(record.hook, record.step, record.passed) for record in passed] == [("late", 51, (20,))]


def test_a_record_of_many_missed_steps_stays_short():
    hooks = fsh.SurgeryHooks()
    hooks.add("often", halve, params="w", when=fsh.every(1))
    hooks(1_000_000, make_state(1_000_000, w=jnp.ones(2)))
    (passed,) = [record for record in hooks.ledger.records if record.event == "passed"]
    assert passed.passed == tuple(range(1, 101))
