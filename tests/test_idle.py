"""The call of hooks when nothing is due: what it takes for a step, and how far ahead it looks."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import events, halve, make_state, w_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import StateError, StepError

FAR = 2**30 - 1


def running_hooks(first, when=None):
    """Hooks that have been called once and wait for a step far off; the state is at the step after."""
    hooks = tiny.make_hooks(halve, when or fsh.at(10**15))
    hooks(first, make_state(first))
    return hooks, make_state(first + 1)


def no_steps(value):
    """Values that are equal to a step and are none."""
    yield from (np.int64(value), np.uint8(value % 256), np.float32(value), np.array(value), jnp.int32(value))
    yield from (float(value), fractions.Fraction(value), str(value), None, complex(value), [value])


@pytest.mark.parametrize("first", [0, 1, 2, 41])
def test_what_merely_equals_the_next_step_is_refused(first):
    hooks, state = running_hooks(first)
    for step in no_steps(first + 1):
        with pytest.raises(StepError, match="a Python int of at least 0"):
            hooks(step, state)
    assert hooks(first + 1, state) is state  # none of them counted


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("step", [False, True])
def test_a_bool_is_no_step_whatever_came_before(first, step):
    hooks, state = running_hooks(first)
    with pytest.raises(StepError, match="a Python int of at least 0"):
        hooks(step, state)


def test_a_traced_next_step_is_refused():
    hooks, state = running_hooks(5)
    with pytest.raises(StepError, match="traced"):
        jax.jit(lambda step: hooks(step, state))(6)


def test_the_next_step_without_a_state_is_refused():
    hooks, _ = running_hooks(5)
    with pytest.raises(StateError, match="need it and return it"):
        hooks(6)


@pytest.mark.parametrize("first", [0, 7, 255, 256, 2**15, FAR - 3, FAR, 2**31, 2**60 - 2, 2**63])
@pytest.mark.parametrize("stride", [1, 2, 1_000])
def test_idle_calls_take_any_stride_at_any_size_and_refuse_repeats(first, stride):
    hooks, state = running_hooks(first, fsh.at(10**30))
    for step in range(first + stride, first + 6 * stride, stride):
        assert hooks(step, state) is state
        for again in (step, step - 1):
            with pytest.raises(StepError, match="Steps go forward"):
                hooks(again, state)


@pytest.mark.parametrize("due", [1, 2, 3, FAR - 1, FAR, FAR + 1, FAR + 2, 2**31 - 1])
def test_a_due_step_is_met_wherever_it_lies(due):
    hooks = tiny.make_hooks(halve, fsh.at(due))
    state = make_state(max(due - 5, 0))
    for step in range(max(due - 5, 0), due + 5):
        state = hooks(step, state)
    assert events(hooks, "fired") == [("fired", "a", due)]
    assert w_of(state) == [0.5, 0.5]


def test_a_long_stride_over_the_limit_of_fast_comparisons_meets_what_lies_beyond():
    hooks, state = running_hooks(FAR - 10, fsh.at(FAR + 10**6))
    for step in (FAR - 9, FAR + 5, FAR + 6):
        assert hooks(step, state) is state
    assert w_of(hooks(FAR + 10**6, state)) == [0.5, 0.5]


def test_idle_calls_read_nothing_of_the_state():
    hooks, _ = running_hooks(5)
    anything = object()
    assert all(hooks(step, anything) is anything for step in (6, 7, 9, 10))


@pytest.mark.parametrize("step", [jnp.int32(1), np.int64(1), True, 1.0])
def test_a_call_before_the_loop_does_not_vouch_for_the_one_in_it(step):
    hooks = tiny.make_hooks(halve, fsh.at(10**15))
    state = hooks(0, make_state(0))
    with pytest.raises(StepError, match="a Python int of at least 0"):
        hooks(step, state)


def test_a_step_of_another_sort_in_an_idle_call_is_noticed_where_something_is_due():
    hooks = tiny.make_hooks(halve, fsh.at(9))
    state = make_state(1)
    for step in (1, 2, 3, 4.0):
        state = hooks(step, state)
    with pytest.raises(StepError, match="a Python int of at least 0"):
        hooks(9.0, state)
