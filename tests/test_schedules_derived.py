"""Epochs, fractions, updates, phase, cooldown, first and last: tabulated by brute force, and in real train loops."""

import functools
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tabulated import N, due_every, host_violation, repr_violation, traced_violation

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import ScheduleError
from flax_surgery_hooks.schedules import Every, at, every

# The oracles say what is due from the words of the documentation, step by step.


def due_phase(n, phase, start=0, stop=N):
    return {step for step in range(1, N + 1) if start <= step <= stop and step % n == phase}


def due_reached(*parts, of):
    """Of each part of a whole (exact), the first step at which it is done."""
    return {next(step for step in range(N + 1) if Fraction(step, of) >= Fraction(part)) for part in parts}


def due_spaced(due, apart):
    kept = []
    for step in sorted(due):
        if not kept or step - kept[-1] >= apart:
            kept.append(step)
    return set(kept)


THIRD = Fraction(1, 3)

TABLE = {
    "phase": (every(10, phase=3), due_phase(10, 3)),
    "phase 0": (every(10, phase=0), due_phase(10, 0)),
    "phase, start before it": (every(10, 21, phase=3), due_phase(10, 3, 21)),
    "phase, start on it": (every(10, 23, phase=3), due_phase(10, 3, 23)),
    "phase, start after it": (every(10, 24, phase=3), due_phase(10, 3, 24)),
    "phase, stop": (every(10, 0, 33, phase=3), due_phase(10, 3, 0, 33)),
    "phase, first of": (every(10, 9, max_fires=2, phase=3), {13, 23}),
    "phase of every step": (every(1, phase=0), due_phase(1, 0)),
    "at epochs": (fsh.at_epochs(0, 1, 2.5, steps_per_epoch=10), {0, 10, 25}),
    "at epochs, rounded up": (fsh.at_epochs(0.5, 1.5, steps_per_epoch=11), due_reached("0.5", "1.5", of=11)),
    "every epoch": (fsh.every_epochs(1, steps_per_epoch=12), {12, 24, 36, 48, 60}),
    "every other epoch": (fsh.every_epochs(2, steps_per_epoch=12), {24, 48}),
    "twice in each": (fsh.every_epochs(0.5, steps_per_epoch=12), due_every(6)),
    "epochs, bounded": (fsh.every_epochs(1, steps_per_epoch=10, start=1.55, stop=4.59), {16, 26, 36}),
    "epochs, first of": (fsh.every_epochs(1, steps_per_epoch=10, max_fires=2), {10, 20}),
    "thirds of an epoch": (fsh.every_epochs(1 / 3, steps_per_epoch=30), due_every(10)),
    "at fraction": (fsh.at_fraction(0, 0.1, 0.3, 1, num_steps=30), {0, 3, 9, 30}),
    "at fraction, rounded up": (fsh.at_fraction(0.5, 0.25, num_steps=31), due_reached("0.5", "0.25", of=31)),
    "a numpy fraction": (fsh.at_fraction(np.float64(0.7), num_steps=np.int64(10)), {7}),
    "every fraction": (fsh.every_fraction(0.25, num_steps=40), {10, 20, 30, 40}),
    "every third": (fsh.every_fraction(1 / 3, num_steps=31), due_reached(THIRD, 2 * THIRD, 1, of=31)),
    "every exact third": (fsh.every_fraction(THIRD, num_steps=31), due_reached(THIRD, 2 * THIRD, 1, of=31)),
    "every 0.4": (fsh.every_fraction(0.4, num_steps=31), due_reached("0.4", "0.8", of=31)),
    "every seventh ends at the end": (
        fsh.every_fraction(1 / 7, num_steps=60),
        due_reached(*(Fraction(i, 7) for i in range(1, 8)), of=60),
    ),
    "updates": (fsh.every_updates(2, micro_steps=4), due_every(8)),
    "updates, bounded": (fsh.every_updates(2, micro_steps=4, start=3, stop=7), {12, 20, 28}),
    "updates, first of": (fsh.every_updates(1, micro_steps=7, max_fires=3), {7, 14, 21}),
    "first": (fsh.first(at(30, 7) | every(10)), {7}),
    "first three": (fsh.first(at(30, 7) | every(10), 3), {7, 10, 20}),
    "last": (fsh.last(every(7), num_steps=N), {56}),
    "last three": (fsh.last(at(30) | every(25), num_steps=N, k=3), {25, 30, 50}),
    "last, fewer than asked": (fsh.last(at(0, 90), num_steps=N, k=5), {0}),
    "last, at the very end": (fsh.last(every(20), num_steps=N), {60}),
    "cooldown of at": (fsh.cooldown(at(0, 4, 5, 9, 14), 5), {0, 5, 14}),
    "cooldown of every": (fsh.cooldown(every(4), 10), due_spaced(due_every(4), 10)),
    "cooldown of every, bounded": (fsh.cooldown(every(4, start=7, stop=40), 9), due_spaced(due_every(4, 7, 40), 9)),
    "cooldown that keeps all": (fsh.cooldown(every(4), 4), due_every(4)),
    "cooldown of a union": (fsh.cooldown(every(4) | every(6), 5), due_spaced(due_every(4) | due_every(6), 5)),
    "cooldown of a finite union": (
        fsh.cooldown(every(4, stop=22) | at(23, 50), 5),
        due_spaced(due_every(4, stop=22) | {23, 50}, 5),
    ),
    "cooldown past a bound": (
        fsh.cooldown(every(9, stop=30) | every(4), 6),
        due_spaced(due_every(9, stop=30) | due_every(4), 6),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_brute_force(name):
    schedule, due = TABLE[name]
    assert due
    assert host_violation(schedule, due) is None
    assert traced_violation(schedule, due) is None
    assert repr_violation(schedule) is None


def test_brute_force_jitted():
    @jax.jit
    def tabulate(steps):
        return {name: schedule.is_due(steps) for name, (schedule, _) in TABLE.items()}

    tables = tabulate(jnp.arange(N + 1))
    for name, (schedule, due) in TABLE.items():
        assert traced_violation(schedule, due, lambda _, name=name: tables[name]) is None, name


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(0, 9), st.sampled_from([None, 20, 41])), max_size=3),
    st.lists(st.integers(0, N), max_size=3),
    st.integers(1, 15),
)
def test_random_cooldowns(periodic, listed, apart):
    periodic, listed = periodic or [(3, 0, None)], set(listed)
    due = set().union(*(due_every(*p) for p in periodic), listed)
    parts = [every(*p) for p in periodic] + [at(step) for step in listed]
    thinned = fsh.cooldown(functools.reduce(operator.or_, parts), apart)
    assert host_violation(thinned, due_spaced(due, apart)) is None
    assert traced_violation(thinned, due_spaced(due, apart)) is None


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, N), st.integers(1, N), st.booleans())
def test_a_float_stands_for_the_fraction_that_was_meant(numerator, of, as_float):
    """i/n of n steps is step i, though i/n times n is often more in floats; 5/7 of 7,000 would be 5,001."""
    numerator = min(numerator, of)
    part = numerator / of if as_float else Fraction(numerator, of)
    assert fsh.at_fraction(part, num_steps=1_000 * of) == at(1_000 * numerator)
    assert fsh.at_epochs(part, steps_per_epoch=of) == at(numerator)


def test_a_cooldown_stays_right_far_beyond_its_table():
    schedule = at(3) | every(35) | every(49, start=11)
    thinned = fsh.cooldown(schedule, 30)
    assert set(thinned.due_steps(-1, 50_000)) == due_spaced(set(schedule.due_steps(-1, 50_000)), 30)


def test_results_are_told_in_steps():
    assert fsh.every_epochs(1, steps_per_epoch=100) == every(100)
    assert fsh.every_fraction(0.25, num_steps=1_000) == every(250, stop=1_000)
    assert fsh.cooldown(every(10), 10) == every(10)
    assert fsh.cooldown(at(5) | every(10), 10) == at(5) | every(10, start=20)
    assert fsh.cooldown(at(2) | every(3), 1) == at(2) | every(3)
    assert every(200, phase=0, start=900) == every(200, start=1_000)


def test_last_needs_no_walk_through_the_run():
    asked = []

    class Counting(Every):
        def _next(self, step):
            asked.append(step)
            return super()._next(step)

    assert fsh.last(Counting(3), num_steps=10**9, k=2) == at(10**9 - 4, 10**9 - 1)
    assert len(asked) < 30


# What the schedules mean in a train loop.


def fired_at(hooks):
    return [record.step for record in hooks.ledger.records if record.event == "fired"]


def test_step_0_fires_before_the_first_train_step():
    hooks = tiny.make_hooks(tiny.halve, at(0, 2))
    state = tiny.make_state()
    state = hooks(0, state)
    assert tiny.w_of(state) == [0.5, 0.5]
    for step in (1, 2):
        state = hooks(step, state.replace(step=step))
    assert tiny.w_of(state) == [0.25, 0.25]
    assert fired_at(hooks) == [0, 2]


def test_a_loop_that_begins_at_step_1_has_passed_step_0():
    hooks = tiny.make_hooks(tiny.halve, at(0))
    assert tiny.w_of(hooks(1, tiny.make_state(step=1))) == [1.0, 1.0]
    assert tiny.events(hooks) == [("passed", "a", 1)]


@pytest.mark.parametrize("k", [3, 4])
def test_updates_of_multi_steps(k):
    """`state.step` counts micro-steps; at the steps of `every_updates`, nothing that was accumulated waits."""
    tx = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), every_k_schedule=k)
    seen = []
    hooks = tiny.make_hooks(tiny.halve, fsh.every_updates(2, micro_steps=k))
    state = tiny.make_state(tx=tx)
    plain = state
    step_of = jax.jit(lambda state: state.apply_gradients(grads={"w": jnp.ones(2)}))
    for step in range(1, 4 * k + 1):
        state = step_of(state)
        assert int(state.step) == step
        before = state
        state = hooks(step, state)
        if state is not before:
            seen.append((step, int(before.opt_state.gradient_step)))
            assert int(before.opt_state.mini_step) == 0
            assert not np.any(before.opt_state.acc_grads["w"])
            np.testing.assert_array_equal(state.params["w"], before.params["w"] / 2)
    assert seen == [(2 * k, 2), (4 * k, 4)]
    assert fired_at(hooks) == [2 * k, 4 * k]
    for _ in range(k - 1):
        plain = step_of(plain)
    np.testing.assert_array_equal(plain.params["w"], [1.0, 1.0])  # micro-steps alone change nothing


# Every `raise`, on its content.


REFUSED = {
    "phase of n": (lambda: every(10, phase=10), "a remainder of division by `n`", "10 for n=10", "every(10, phase=0)"),
    "phase below 0": (lambda: every(10, phase=-1), "a remainder of division", "-1 for n=10", "every(10, phase=9)"),
    "a float phase": (lambda: every(10, phase=2.0), "`phase` of `every` must be an integer", "2.0", "phase=5"),
    "phase, stop too early": (
        lambda: every(10, stop=5, phase=7),
        "comes before `start`",
        "every(10, start=7, stop=5)",
        "",
    ),
    "no epoch": (lambda: fsh.at_epochs(steps_per_epoch=9), "without steps is never due", "at()", "at(100)"),
    "a negative epoch": (lambda: fsh.at_epochs(-1, steps_per_epoch=9), "epoch of `at_epochs` is negative", "-1", "2.5"),
    "a text epoch": (lambda: fsh.at_epochs("1", steps_per_epoch=9), "must be a finite number", "str 1", "at_epochs(1"),
    "epochs of 0 steps": (
        lambda: fsh.at_epochs(1, steps_per_epoch=0),
        "`steps_per_epoch` must be at least 1",
        "0",
        "100",
    ),
    "epochs of 1.5 steps": (
        lambda: fsh.every_epochs(1, steps_per_epoch=1.5),
        "`steps_per_epoch` must be an int",
        "1.5",
        "100",
    ),
    "half a step": (
        lambda: fsh.every_epochs(0.5, steps_per_epoch=1251),
        "a whole number of train steps",
        "625.5 steps",
        "every(626)",
    ),
    "no period": (
        lambda: fsh.every_epochs(0, steps_per_epoch=10),
        "a whole number of train steps",
        "0 steps",
        "every(1)",
    ),
    "a bool period": (
        lambda: fsh.every_epochs(True, steps_per_epoch=10),
        "`epochs` of `every_epochs` must be",
        "bool",
        "10)",
    ),
    "a text start": (
        lambda: fsh.every_epochs(1, steps_per_epoch=2, start="a"),
        "`start` of `every_epochs`",
        "str a",
        "start=5",
    ),
    "a nan stop": (
        lambda: fsh.every_epochs(1, steps_per_epoch=2, stop=float("nan")),
        "`stop` of `every_epochs`",
        "nan",
        "90",
    ),
    "stop before an epoch": (
        lambda: fsh.every_epochs(1, steps_per_epoch=9, stop=0.5),
        "is never due",
        "every(9, stop=4)",
        "",
    ),
    "a percentage": (lambda: fsh.at_fraction(50, num_steps=9), "more than the whole run", "50", "at_fraction(0.5"),
    "inf": (lambda: fsh.at_fraction(float("inf"), num_steps=9), "must be a finite number", "inf", "at_fraction(0.5"),
    "a run without steps": (lambda: fsh.at_fraction(0.5, num_steps=0), "`num_steps` must be at least 1", "0", "100"),
    "a fraction of a step": (
        lambda: fsh.every_fraction(0.01, num_steps=50),
        "less than one train step",
        "0.5 steps",
        "every(1)",
    ),
    "too many fractions": (
        lambda: fsh.every_fraction(Fraction(3, 10**6 + 1), num_steps=10**6),
        "fewer than 10,000",
        "3, 6, 9",
        "every(n)",
    ),
    "no micro-steps": (
        lambda: fsh.every_updates(1, micro_steps=0),
        "`micro_steps` must be at least 1",
        "0",
        "micro_steps=100",
    ),
    "a schedule of k": (
        lambda: fsh.every_updates(1, micro_steps=lambda n: 4),
        "`micro_steps` must be an integer",
        "function",
        "",
    ),
    "no update": (lambda: fsh.every_updates(0, micro_steps=4), "`n` of `every` must be at least 1", "0", "every(100)"),
    "first of an int": (lambda: fsh.first(3), "`first` takes a schedule", "int 3", "first(every(100), ...)"),
    "first none": (lambda: fsh.first(every(3), 0), "`k` must be at least 1", "0", "k=100"),
    "last of an int": (lambda: fsh.last(3, 9), "`last` takes a schedule", "int 3", "last(every(100), ...)"),
    "last of never": (
        lambda: fsh.last(every(10), num_steps=9),
        "never due in the run",
        "every(10) until step 9",
        "at(9)",
    ),
    "cooldown of an int": (
        lambda: fsh.cooldown(3, 9),
        "`cooldown` takes a schedule",
        "int 3",
        "cooldown(every(100), ...)",
    ),
    "cooldown of 0": (lambda: fsh.cooldown(every(3), 0), "`steps` must be at least 1", "0", "steps=100"),
    "cooldown of the unknown": (
        lambda: fsh.cooldown(at(3) | Own(9), 2),
        "schedules of `at` and `every`",
        "at(3) | every(9)",
        "_next",
    ),
    "cooldown without end": (
        lambda: fsh.cooldown(every(9973) | every(9967), 2),
        "fewer than 10,000",
        "9967, 9973",
        "every(n)",
    ),
}


class Own(Every):
    pass


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, problem, found, write = REFUSED[name]
    with pytest.raises(ScheduleError) as caught:
        build()
    error = caught.value
    assert problem in error.problem
    assert found in str(error)
    assert write in str(error.write)
