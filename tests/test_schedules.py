"""Schedules against brute force: every one is tabulated over 0..N, on the host and traced."""

import copy
import dataclasses
import functools
import itertools
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tabulated import N, due_every, host_violation, repr_violation, traced_violation

from flax_surgery_hooks.errors import ScheduleError, StepError, SurgeryError
from flax_surgery_hooks.schedules import AnyOf, At, Every, Schedule, at, every

INT32_MAX = 2**31 - 1


def every_cases():
    for n, start, stop, fires in itertools.product((1, 3, 10), (0, 1, 7), (None, 0, 7, 10, 23), (None, 1, 3)):
        if due_every(n, start, stop):
            yield (n, start, stop, fires), due_every(n, start, stop, fires)


EVERY = {f"every{arguments}": (every(*arguments), due) for arguments, due in every_cases()}

COMPOSED = {
    "at": (at(7), {7}),
    "at zero": (at(0), {0}),
    "at unsorted, twice": (at(30, 5, 30, 0), {0, 5, 30}),
    "at, first of": (at(9, 3, 6).max_fires(2), {3, 6}),
    "at, fewer than asked": (at(9, 3).max_fires(5), {3, 9}),
    "every, first of again": (every(10, max_fires=4).max_fires(2), {10, 20}),
    "at | every": (at(5) | every(10), {5, 10, 20, 30, 40, 50, 60}),
    "overlapping": (every(4) | every(6), {s for s in range(1, N + 1) if s % 4 == 0 or s % 6 == 0}),
    "overlapping, first of": ((every(4) | every(6)).max_fires(5), {4, 6, 8, 12, 16}),
    "first of drops a part": ((at(1, 2, 3) | every(10)).max_fires(2), {1, 2}),
    "first of cuts between": ((every(10) | every(10, start=3)).max_fires(3), {3, 10, 13}),
    "first of ends before all": ((every(7, stop=21) | at(50)).max_fires(3), {7, 14, 21}),
    "first of a finite union": ((every(7, stop=14) | at(50)).max_fires(9), {7, 14, 50}),
    "union of first ofs": (every(7, max_fires=2) | every(5, max_fires=1) | at(0), {0, 5, 7, 14}),
    "nested": ((at(1) | every(20)) | (at(2) | every(30, stop=30)), {1, 2, 20, 30, 40, 60}),
}

TABLE = EVERY | COMPOSED


@pytest.mark.parametrize("name", TABLE)
def test_brute_force_on_host(name):
    schedule, due = TABLE[name]
    assert host_violation(schedule, due) is None
    assert repr_violation(schedule) is None


@pytest.mark.parametrize("name", TABLE)
def test_brute_force_on_arrays(name):
    assert traced_violation(*TABLE[name]) is None


def test_brute_force_jitted():
    @jax.jit
    def tabulate(steps):
        return {name: schedule.is_due(steps) for name, (schedule, _) in TABLE.items()}

    tables = tabulate(jnp.arange(N + 1))
    for name, (schedule, due) in TABLE.items():
        assert traced_violation(schedule, due, lambda _, name=name: tables[name]) is None, name


@pytest.mark.parametrize("name", COMPOSED)
def test_brute_force_jitted_and_vmapped(name):
    schedule, due = TABLE[name]
    assert traced_violation(schedule, due, jax.jit(jax.vmap(schedule.is_due))) is None


def test_is_due_inside_scan_and_cond():
    schedule = at(0, 3) | every(4)

    def train_step(step, _):
        fired = jax.lax.cond(schedule.is_due(step), lambda: 1, lambda: 0)
        return step + 1, fired

    _, fired = jax.jit(lambda: jax.lax.scan(train_step, jnp.int32(0), length=10))()
    assert np.flatnonzero(fired).tolist() == [0, 3, 4, 8]


def test_is_due_of_a_matrix_of_steps():
    steps = jnp.arange(12).reshape(3, 4)
    np.testing.assert_array_equal((at(5, 7) | every(10)).is_due(steps), np.isin(steps, [5, 7, 10]))


def test_is_due_traced_moves_nothing_between_host_and_device(no_transfers):
    step = jax.device_put(np.int32(20))
    due = jax.jit((at(5) | every(10, stop=50)).is_due)(step)
    assert jax.device_get(due)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_unions(data):
    arguments = st.tuples(st.integers(1, 9), st.integers(0, 9), st.just(None), st.sampled_from([None, 1, 2, 9]))
    steps = st.lists(st.integers(0, N), min_size=1, max_size=4)
    periodic = data.draw(st.lists(arguments, max_size=3))
    listed = data.draw(st.lists(steps, min_size=0 if periodic else 1, max_size=2))
    parts = [*(every(*p) for p in periodic), *(at(*s) for s in listed)]
    due = set().union(*(due_every(*p) for p in periodic), *listed)
    schedule = functools.reduce(operator.or_, parts)
    assert host_violation(schedule, due) is None
    assert traced_violation(schedule, due) is None
    assert repr_violation(schedule) is None
    k = data.draw(st.integers(1, 8))
    if len(due) >= k:  # else the k-th may lie beyond the table
        assert host_violation(schedule.max_fires(k), set(sorted(due)[:k])) is None


# Wrong schedules that the law must find.


class StopExclusive(Every):
    def _next(self, step):
        due = super()._next(step)
        return None if due == self.stop else due


class PhaseOfZero(Every):
    def _next(self, step):
        return max(self.start, (step // self.n + 1) * self.n)

    def _traced_is_due(self, step):
        return (step >= self.start) & (step % self.n == 0)


class DueAtZero(Every):
    def _next(self, step):
        return 0 if step < 0 else super()._next(step)

    def _traced_is_due(self, step):
        return step % self.n == 0


class Inclusive(Every):
    def _next(self, step):
        return super()._next(step - 1)


class Forgetful(Every):
    """Moves on each time it is asked."""

    def _next(self, step):
        object.__setattr__(self, "start", self.first + self.n)
        return super()._next(step)


@pytest.mark.parametrize(
    ("wrong", "due", "traced_too"),
    [
        (StopExclusive(10, 0, 30), due_every(10, 0, 30), False),
        (PhaseOfZero(10, 5), due_every(10, 5), True),
        (DueAtZero(10), due_every(10), True),
        (Inclusive(10), due_every(10), False),
        (Forgetful(10), due_every(10), True),
        (at(5) | DueAtZero(10), {5} | due_every(10), True),
        (AnyOf((every(4, max_fires=3), every(6, max_fires=3))), {4, 6, 8}, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_law_finds_wrong_schedules(wrong, due, traced_too):
    assert host_violation(wrong, due) is not None
    assert (traced_violation(wrong, due) is not None) is traced_too


# Steps that a dtype can only just hold, or cannot.


EXTREME = [
    every(3),
    every(7, start=INT32_MAX - 10),
    every(INT32_MAX),
    every(2**31),
    every(2**31, start=5),
    every(10, start=5, stop=2**40),
    every(10, start=2**40),
    every(120, start=100),
    every(300, start=7),
    at(INT32_MAX),
    at(2**31, 5, 127),
    at(2**31, 2**63),
    at(2**40) | every(2**35, start=127),
]


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32"])
@pytest.mark.parametrize("schedule", EXTREME, ids=repr)
def test_dtype_limits(schedule, dtype):
    highest = np.iinfo(dtype).max
    candidates = [0, 1, 3, 5, 7, 100, 127, 220, 251, INT32_MAX - 10, INT32_MAX - 3, INT32_MAX - 1, INT32_MAX, 2**31]
    steps = sorted({step for step in (*candidates, highest - 1, highest) if step <= highest})
    found = schedule.is_due(jnp.asarray(np.asarray(steps, dtype)))
    assert found.tolist() == [schedule.is_due(step) for step in steps]


def test_wide_steps_under_x64(x64):
    steps = [0, 5, 2**31, 2**32, 2**40, 2**40 + 10, 2**62]
    for schedule in EXTREME:
        assert schedule.is_due(jnp.asarray(steps, jnp.int64)).tolist() == [schedule.is_due(step) for step in steps]


def test_steps_below_zero_are_never_due():
    lowest = [-(2**31), -(2**31) + 5, -10, -1]
    schedule = at(0) | every(1) | every(7, start=INT32_MAX - 10)
    assert schedule.is_due(jnp.asarray(lowest)).tolist() == [schedule.is_due(step) for step in lowest] == [False] * 4


# Values.


def test_numpy_integers_become_ints():
    schedule = at(np.int64(5)) | every(np.int32(10), start=np.uint8(3), stop=np.int64(40), max_fires=np.int16(2))
    assert repr(schedule) == "at(5) | every(10, start=3, stop=13)"
    assert all(type(value) is int for value in schedule.due_steps(np.int64(-1), np.int64(40)))
    assert schedule.is_due(np.int64(13)) is True
    assert type(every(np.int32(10)).n) is int


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (every(200), "every(200)"),
        (every(200, start=100), "every(200, start=100)"),
        (every(200, stop=1000), "every(200, stop=1000)"),
        (every(200, start=100, max_fires=3), "every(200, start=100, stop=500)"),
        (every(200, stop=500, max_fires=9), "every(200, stop=500)"),
        (at(200, 100), "at(100, 200)"),
        (at(5) | every(10), "at(5) | every(10)"),
        (every(10) | at(5), "every(10) | at(5)"),
        (at(7) | every(10) | at(5), "at(5, 7) | every(10)"),
        ((at(5) | every(10)).max_fires(3), "at(5) | every(10, stop=20)"),
    ],
)
def test_repr(schedule, text):
    assert repr(schedule) == text


def test_equality_and_hash_are_by_value():
    same = [
        (every(200, start=100), every(200, 100)),
        (at(1, 2), at(2, 1, 1)),
        (at(1) | at(2), at(1, 2)),
        (at(5) | every(10), every(10) | at(5)),
        ((at(5) | every(10)) | every(3), at(5) | (every(10) | every(3))),
        (every(10) | every(10), every(10)),
        (every(10, max_fires=3), every(10, stop=30)),
    ]
    for left, right in same:
        assert left == right
        assert hash(left) == hash(right)
    different = [every(10), every(11), every(10, start=10), every(10, stop=30), at(10), at(10) | every(10), at(10, 20)]
    assert len(set(different)) == len(different)
    assert every(10) != 10


@pytest.mark.parametrize("name", COMPOSED)
def test_copies_are_equal(name):
    schedule, _ = COMPOSED[name]
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule


@pytest.mark.parametrize("schedule", [at(5), every(10), at(5) | every(10)], ids=repr)
def test_schedules_are_frozen(schedule):
    before = dict(vars(schedule))
    schedule.max_fires(2)
    assert schedule | every(3) != schedule
    assert vars(schedule) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, next(iter(before)), None)


def test_a_schedule_of_ones_own_joins_in():
    @dataclasses.dataclass(frozen=True)
    class PowersOfTwo(Schedule):
        def _next(self, step):
            return 1 if step < 1 else 1 << int(step).bit_length()

        def _traced_is_due(self, step):
            return (step > 0) & ((step & (step - 1)) == 0)

    powers = {1, 2, 4, 8, 16, 32}
    assert host_violation(PowersOfTwo(), powers) is None
    assert traced_violation(PowersOfTwo() | at(5), powers | {5}) is None
    assert PowersOfTwo().max_fires(3) == at(1, 2, 4)
    assert (PowersOfTwo() | at(3)).max_fires(4) == at(1, 2, 3, 4)


# Every `raise`, on its content.


REFUSED = {
    "no step": (lambda: at(), "without steps is never due", "at()", "at(100)"),
    "a list": (lambda: at([3, 1]), "step of `at` must be an integer", "list [3, 1]", "at(3, 1)"),
    "a float step": (lambda: at(1, 2.0), "step of `at` must be an integer", "float 2.0", "at(100, 200)"),
    "a bool step": (lambda: at(True), "step of `at` must be an integer", "bool True", "at(100, 200)"),
    "an array": (lambda: at(np.arange(3)), "step of `at` must be an integer", "ndarray int64[3]", "at(100, 200)"),
    "a negative step": (lambda: at(4, -1), "step of `at` is negative", "-1", "at(0) or later"),
    "n of 0": (lambda: every(0), "`n` of `every` must be at least 1", "0", "every(100)"),
    "n below 0": (lambda: every(-5), "`n` of `every` must be at least 1", "-5", "every(100)"),
    "a bool n": (lambda: every(True), "`n` of `every` must be an integer", "bool True", "every(100)"),
    "a float n": (lambda: every(1e3), "`n` of `every` must be an integer", "float 1000.0", "every(100)"),
    "no n": (lambda: every(None), "`n` of `every` must be an integer", "NoneType None", "every(100)"),
    "a float start": (lambda: every(5, start=1.5), "`start` of `every` must be an integer", "float 1.5", "start=1000"),
    "start below 0": (lambda: every(5, start=-1), "`start` of `every` is negative", "-1", "every(5, start=1000)"),
    "a text stop": (lambda: every(5, stop="9"), "`stop` of `every` must be an integer", "str 9", "stop=1000"),
    "stop below 0": (lambda: every(5, stop=-1), "`stop` of `every` is negative", "-1", "every(5, stop=1000)"),
    "stop before start": (
        lambda: every(5, start=9, stop=3),
        "`stop` of `every` comes before `start`",
        "every(5, start=9, stop=3)",
        "every(5, start=9, stop=14)",
    ),
    "stop before n": (
        lambda: every(10, stop=5),
        "`every` is never due: without `start`, its first due step would be 10",
        "every(10, stop=5)",
        "every(10, stop=10) or a later stop, or at(5)",
    ),
    "max_fires of 0": (lambda: every(5, max_fires=0), "`max_fires` below 1", "0", "max_fires=1"),
    "max_fires below 0": (lambda: at(5).max_fires(-2), "`max_fires` below 1", "-2", "max_fires=1"),
    "a float max_fires": (lambda: at(5).max_fires(2.0), "`max_fires` must be an integer", "float 2.0", "max_fires=1"),
    "a bool max_fires": (lambda: every(5).max_fires(True), "`max_fires` must be an integer", "bool True", "max_fires"),
    "schedule | int": (lambda: every(5) | 3, "one side is not a schedule", "int 3", "... | at(3)"),
    "int | schedule": (lambda: 3 | every(5), "one side is not a schedule", "int 3", "... | at(3)"),
    "schedule | None": (lambda: at(5) | None, "one side is not a schedule", "NoneType None", "at(100) | every(1000)"),
    "union | bool": (lambda: at(5) | every(3) | True, "one side is not a schedule", "bool True", "at(100) | every"),
    "direct At": (lambda: At(()), "without steps is never due", "at()", "at(100)"),
    "direct Every": (lambda: dataclasses.replace(Every(5), n=0), "must be at least 1", "0", "every(100)"),
    "traced into at": (lambda: jax.jit(lambda s: at(s).is_due(s))(3), "must be an integer", "int32[]", "at(100, 200)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name):
    build, problem, found, write = REFUSED[name]
    with pytest.raises(ScheduleError) as caught:
        build()
    error = caught.value
    assert problem in error.problem
    assert found in str(error.found)
    assert write in error.write
    assert str(error) == f"{error.problem} Found: {error.found}. Write instead: {error.write}."


REFUSED_STEPS = {
    "float": (2.0, "float 2.0", "int(step)"),
    "bool": (True, "bool True", "int(step)"),
    "None": (None, "NoneType None", "int(step)"),
    "str": ("7", "str 7", "int(step)"),
    "numpy array": (np.arange(3), "ndarray int64[3]", "int(step)"),
}


@pytest.mark.parametrize("schedule", [at(5), every(10), at(5) | every(10)], ids=repr)
@pytest.mark.parametrize("name", REFUSED_STEPS)
def test_refused_steps(name, schedule):
    step, found, write = REFUSED_STEPS[name]
    asked = [schedule.next_step, schedule.is_due, lambda step: schedule.due_steps(step, 9)]
    for ask in [*asked, lambda step: schedule.due_steps(0, step)]:
        with pytest.raises(StepError, match="must be an integer: how many train steps have been applied") as caught:
            ask(step)
        assert (caught.value.found, caught.value.write) == (found, write)


def test_next_step_of_a_traced_step_points_to_is_due():
    with pytest.raises(StepError) as caught:
        jax.jit(every(10).next_step)(3)
    assert "Tracer int32[]" in caught.value.found
    assert caught.value.write == "is_due(state.step)"


@pytest.mark.parametrize("step", [jnp.ones(3), jnp.array(True)], ids=["float", "bool"])
def test_is_due_of_an_array_that_holds_no_steps(step):
    with pytest.raises(StepError, match="must be an array of integers") as caught:
        every(10).is_due(step)
    assert caught.value.found is step
    assert str(step.dtype) in str(caught.value)
    assert caught.value.write == "is_due(state.step)"


def test_errors_are_surgery_errors():
    assert issubclass(ScheduleError, SurgeryError)
    assert issubclass(StepError, SurgeryError)
