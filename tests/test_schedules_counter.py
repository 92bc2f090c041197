"""Schedules that a counter decides, against counting by hand."""

import copy
import dataclasses
import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import flax_surgery_hooks as fsh
from flax_surgery_hooks.count_schedules import CountState, OnCount
from flax_surgery_hooks.errors import InputError, ScheduleError
from flax_surgery_hooks.watched_values import Site
from flax_surgery_hooks.watching import Watch

FAR = 400


def due_counts(n, start=0, stop=None, max_fires=None):
    """The due counts up to FAR, from the documentation."""
    due = [c for c in range(1, FAR + 1) if (c % n == 0 if start == 0 else c >= start and (c - start) % n == 0)]
    due = [c for c in due if stop is None or c <= stop]
    return set(due if max_fires is None else due[:max_fires])


def every_count(*args):
    return fsh.every_count(args[0], of="tokens", **dict(zip(("start", "stop", "max_fires"), args[1:], strict=False)))


CASES = {
    **{
        f"every{args}": (every_count(*args), due_counts(*args))
        for args in [(1,), (7,), (100,), (10, 3), (10, 30), (10, 0, 45), (7, 5, 5), (9, 0, None, 3), (9, 4, 90, 99)]
    },
    "at": (fsh.at_count(50, 10, 50, of="tokens"), {10, 50}),
    "at one": (fsh.at_count(1, of="tokens"), {1}),
    "at, first of": (fsh.at_count(50, 10, 70, of="tokens").max_fires(2), {10, 50}),
    "every, first of": (fsh.every_count(20, of="tokens").max_fires(2), {20, 40}),
}


def expected(due, counts):
    """[(place, the last due count that was passed there, how many were)]."""
    passed = [
        (i, {c for c in due if before < c <= count}) for i, (before, count) in enumerate(itertools.pairwise(counts), 1)
    ]
    return [(i, max(one), len(one)) for i, one in passed if one]


def observed(schedule, counts):
    state, fires = schedule.begin(), []
    for i, count in enumerate(counts):
        state, trigger = schedule.observe(state, i, count)
        if trigger is not None:
            assert (trigger.step, trigger.value) == (i, count)
            fires.append((i, trigger.limit, trigger.crossed))
    return fires


def walk(seed, n=60):
    """A counter with steps of every size, none included."""
    return np.cumsum(np.random.default_rng(seed).choice([0, 0, 1, 1, 2, 3, 5, 13, 40], n)).tolist()


@pytest.mark.parametrize("name", CASES)
def test_random_counters(name):
    schedule, due = CASES[name]
    fired = 0
    for seed in range(20):
        counts = [count for count in walk(seed) if count <= FAR]
        assert observed(schedule, counts) == expected(due, counts), seed
        fired += len(expected(due, counts))
    assert fired > 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, FAR), max_size=12).map(sorted), st.sampled_from(sorted(CASES)))
def test_any_counter(counts, name):
    schedule, due = CASES[name]
    assert observed(schedule, counts) == expected(due, counts)


class ByRemainder(OnCount):
    """Due where the counter is a multiple: a jump misses it."""

    def observe(self, state, step, value, now=None):
        new, trigger = super().observe(state, step, value, now)
        return new, trigger if trigger is not None and value == trigger.limit else None


class FromZero(OnCount):
    """Takes a run that goes on for one that begins."""

    def begin(self):
        return CountState(0)


class OneEach(OnCount):
    """Counts a passed multiple at every call until the counter has caught up."""

    def observe(self, state, step, value, now=None):
        new, trigger = super().observe(state, step, value, now)
        return (new if trigger is None or trigger.crossed == 1 else CountState(trigger.limit - 1)), trigger


@pytest.mark.parametrize("wrong", [ByRemainder, FromZero, OneEach])
def test_wrong_rules_are_found(wrong):
    right, due = CASES["every(7,)"]
    series = [[count + 20 for count in walk(seed) if count <= FAR - 20] for seed in range(20)]
    assert any(observed(wrong(right.counts, right.of), counts) != expected(due, counts) for counts in series)


def test_counters_of_any_size():
    schedule = fsh.every_count(10**15, of="tokens")
    counts = [0, 10**15 - 1, 10**15, 10**15 + 1, 10**18 + 3, 10**18 + 4]
    assert observed(schedule, counts) == [(2, 10**15, 1), (4, 10**18, 999)]


# Hooks in a loop.


def by_hooks(schedule, counts, kind=int, first=0):
    hooks, state = tiny.make_hooks(tiny.halve, schedule), tiny.make_state(first)
    for step, count in enumerate(counts, start=first):
        state = hooks(step, state.replace(step=step), tokens=None if count is None else kind(count))
    told = [one for one in hooks.ledger.records if one.event == "fired"]
    return [(one.step, one.triggers[0].step, one.triggers[0].crossed) for one in told]


def test_a_python_int_fires_in_its_own_call():
    assert by_hooks(fsh.every_count(100, of="tokens"), [0, 99, 100, 101, 350, 360, 400]) == [
        (2, 2, 1), (4, 4, 2), (6, 6, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_an_array_fires_its_lag_later(lag):
    counts = [0, 99, 100, 101, 350, 360, 360, 360, 360]
    assert by_hooks(fsh.every_count(100, of="tokens", lag=lag), counts, jnp.int32) == [
        (2 + lag, 2, 1), (4 + lag, 4, 2)
    ]  # fmt: skip


def test_an_array_is_not_read_before():
    hooks, deleted = tiny.make_hooks(tiny.halve, fsh.every_count(5, of="tokens", lag=2)), jnp.int32(1)
    hooks(0, tiny.make_state(0), tokens=jnp.int32(0))
    hooks(1, tiny.make_state(1), tokens=deleted)
    deleted.delete()
    hooks(2, tiny.make_state(1), tokens=jnp.int32(2))
    with pytest.raises(InputError, match="'tokens' was deleted before"):
        hooks(3, tiny.make_state(1), tokens=jnp.int32(3))


def test_a_run_that_goes_on_does_not_fire_for_the_past():
    assert by_hooks(fsh.every_count(1_000_000, of="tokens"), [5_300_000, 5_900_000, 6_100_000], first=53) == [
        (55, 55, 1)
    ]


def test_no_count_at_a_step_is_none():
    assert by_hooks(fsh.every_count(10, of="tokens"), [0, None, 5, None, 11]) == [(4, 4, 1)]


def test_a_counter_in_the_metrics():
    hooks = tiny.make_hooks(tiny.halve, fsh.at_count(10, of="metrics/seen/tokens"))
    for step, tokens in enumerate([0, 9, 12]):
        hooks(step, tiny.make_state(0), metrics={"seen": {"tokens": np.int64(tokens)}})
    assert tiny.events(hooks, "fired") == [("fired", "a", 2)]


def test_listed_counts_before_the_first_are_told_as_past(caplog):
    by_hooks(fsh.at_count(10, 20, 90, of="tokens"), [50, 60])
    assert "Hook a was due at 10, 20 of tokens, before the first call: taken as past." in caplog.text
    caplog.clear()
    by_hooks(fsh.every_count(10, of="tokens"), [50, 60])
    by_hooks(fsh.at_count(90, of="tokens"), [50, 60])
    assert not caplog.text


def test_hooks_past_all_their_counts_are_idle_again():
    hooks = tiny.make_hooks(tiny.halve, fsh.at_count(10, of="tokens"))
    for step, tokens in enumerate([0, 5, 10]):
        hooks(step, tiny.make_state(0), tokens=tokens)
    hooks(3, tiny.make_state(0))
    hooks.flush()
    assert hooks._wake > 10**6


def test_joined_with_steps_and_a_metric():
    when = (
        fsh.at(2) | fsh.every_count(100, of="tokens") | fsh.at_count(130, of="tokens") | fsh.on_metric("loss", above=5)
    )
    hooks = tiny.make_hooks(tiny.halve, when)
    for step in range(9):
        hooks(step, tiny.make_state(0), tokens=30 * step, metrics={"loss": 9.0 if step == 1 else 1.0})
    told = [
        (one.step, [trigger.limit for trigger in one.triggers]) for one in hooks.ledger.records if one.event == "fired"
    ]
    assert told == [(2, []), (4, [100]), (5, [130, 5.0]), (7, [200])]


def test_the_record_says_what_was_passed():
    hooks = tiny.make_hooks(tiny.halve, fsh.every_count(100, of="tokens"))
    for step, tokens in enumerate([0, 350]):
        hooks(step, tiny.make_state(0), tokens=tokens)
    [record] = [one for one in hooks.ledger.records if one.event == "fired"]
    assert json.loads(record.to_json())["triggers"] == [
        {"schedule": "every_count(100, of='tokens')", "step": 1, "value": 350, "limit": 300, "crossed": 3}
    ]


@pytest.mark.parametrize("kind", [int, jnp.int32])
@pytest.mark.parametrize("name", CASES)
def test_a_replay_from_every_cut_fires_the_same(name, kind):
    schedule, _ = CASES[name]
    counts = [count for count in walk(4, 30) if count <= FAR]

    def run(cut):
        watch, fires = Watch("a", schedule), []
        for step, count in enumerate(counts):
            if step == cut:
                saved = json.dumps(watch.to_json())
                watch = Watch("a", schedule)
                watch.from_json(json.loads(saved))
            fires += [(step, one) for one in watch.step(step, {"tokens": kind(count)}, Site())]
        return fires

    whole = run(None)
    assert [(one.step, one.limit, one.crossed) for _, one in whole] == [
        one for one in observed(schedule, counts) if one[0] + (0 if kind is int else schedule.lag) < len(counts)
    ]
    assert all(run(cut) == whole for cut in range(len(counts)))


# Values.


def test_equality_hash_and_copies_are_by_value():
    schedule = fsh.every_count(100, of="tokens", start=np.int64(50))
    assert schedule == fsh.every_count(100, of="tokens", start=50)
    assert fsh.every_count(10, of="tokens", max_fires=3) == fsh.every_count(10, of="tokens", stop=30)
    assert fsh.at_count(2, 1, 2, of="a") == fsh.at_count(1, 2, of="a")
    different = [schedule, fsh.every_count(100, of="tokens"), fsh.every_count(100, of="samples"), fsh.every(100)]
    assert len({*different, fsh.at_count(100, of="tokens"), fsh.every_count(100, of="tokens", lag=0)}) == 6
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.of = "samples"


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (fsh.every_count(100, of="tokens"), "every_count(100, of='tokens')"),
        (fsh.every_count(100, of="t", start=5, stop=505), "every_count(100, of='t', start=5, stop=505)"),
        (fsh.every_count(100, of="t", max_fires=3, lag=0), "every_count(100, of='t', stop=300, lag=0)"),
        (fsh.every_count(100, of="t", stop=250, max_fires=3), "every_count(100, of='t', stop=250)"),
        (fsh.at_count(7, 5, of="t", lag=1), "at_count(5, 7, of='t', lag=1)"),
        (fsh.at(3) | fsh.at_count(7, of="metrics/t"), "at(3) | at_count(7, of='metrics/t')"),
    ],
)
def test_a_schedule_is_shown_as_it_is_written(schedule, text):
    assert repr(schedule) == text
    assert eval(text, {name: getattr(fsh, name) for name in ("at", "at_count", "every_count")}) == schedule


# Every `raise`, on its content.


REFUSED = {
    "n of 0": (lambda: fsh.every_count(0, of="t"), "`n` of `every_count` must be at least 1", "0", "1_000_000"),
    "a float": (lambda: fsh.every_count(1e6, of="t"), "`n` of `every_count` must be an integer", "1000000.0", "1_000"),
    "start": (
        lambda: fsh.every_count(5, of="t", start=-1),
        "`start` of `every_count` must be at least 0",
        "-1",
        "start",
    ),
    "stop": (lambda: fsh.every_count(5, of="t", stop=-1), "`stop` of `every_count` must be at least 0", "-1", "stop"),
    "never": (lambda: fsh.every_count(5, of="t", stop=4), "is never due", "stop=4", "stop=5 or more"),
    "max_fires": (lambda: fsh.every_count(5, of="t", max_fires=0), "`max_fires` of `every_count`", "0", "max_fires=1"),
    "max_fires after": (lambda: fsh.every_count(5, of="t").max_fires(0), "`max_fires` below 1", "0", "max_fires=1"),
    "no counter": (lambda: fsh.every_count(5, of=""), "`of`, the counter, must be a name", "str", "of='tokens'"),
    "a counter": (lambda: fsh.at_count(5, of=5), "`of`, the counter, must be a name", "int 5", "of='tokens'"),
    "lag": (lambda: fsh.at_count(5, of="t", lag=-1), "`lag` of a counter must be at least 0", "-1", "lag=4"),
    "no count": (lambda: fsh.at_count(of="t"), "without counts is never due", "at_count()", "at_count(1_000_000"),
    "count 0": (lambda: fsh.at_count(0, of="t"), "A count of `at_count` must be at least 1", "0", "at_count(1_000_000"),
    "a list": (lambda: fsh.at_count([1], of="t"), "A count of `at_count` must be an integer", "list [1]", "at_count("),
    "is_due": (lambda: fsh.at_count(5, of="t").is_due(5), "not known in advance", "at_count(5, of='t')", "host"),
    "traced": (lambda: jax.jit(fsh.at_count(5, of="t").is_due)(5), "no in-graph form", "at_count(5", "the host form"),
    "state": (lambda: fsh.at_count(5, of="t").state_from_json([1]), "not the saved state", "[1]", "seen, fires"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, problem, told, write = REFUSED[name]
    with pytest.raises(ScheduleError) as caught:
        build()
    error = caught.value
    assert problem in error.problem
    assert told in str(error.found)
    assert write in error.write


REFUSED_COUNTS = {
    "none": ([None], "does not pass 'tokens'", "inputs samples", "hooks(step, state, tokens=tokens)"),
    "a float": ([1.0], "'tokens' is a counter, and no integer", "float 1.0", "int(...)"),
    "a bool": ([True], "'tokens' is a counter, and no integer", "bool True", "int(...)"),
    "a float array": ([jnp.float32(1)], "is a counter, and no integer", "float32[]", "int(...)"),
    "a flag": ([jnp.bool_(True)], "is a counter, and no integer", "bool[]", "int(...)"),
    "a vector": ([jnp.arange(3)], "'tokens' is no real scalar", "int32[3]", "tokens.mean()"),
    "back": ([10, 9], "The counter 'tokens' goes back", "9 after 10", "a count since the start"),
    "over": ([jnp.int32(2**31 - 1), jnp.int32(-(2**31))], "goes back", "as an int32 does", "a Python int"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_COUNTS)
def test_refused_counts(name):
    counts, problem, told, write = REFUSED_COUNTS[name]
    hooks = tiny.make_hooks(tiny.halve, fsh.every_count(100, of="tokens", lag=0))
    *before, last = [{"samples": 1} if count is None else {"tokens": count} for count in counts]
    for step, inputs in enumerate(before):
        hooks(step, tiny.make_state(0), **inputs)
    with pytest.raises(InputError) as caught:
        hooks(len(before), tiny.make_state(0), **last)
    error = caught.value
    assert problem in error.problem
    assert told in str(error.found)
    assert write in error.write
    assert (error.hook, error.step) == ("a", len(counts) - 1)


def test_on_several_processes_a_python_int_counts_and_an_array_of_one_does_not():
    schedule = fsh.every_count(100, of="tokens")
    watch = Watch("a", schedule)
    assert watch.step(0, {"tokens": 0}, Site(processes=2)) == ()
    assert [one.limit for one in watch.step(1, {"tokens": np.int64(100)}, Site(processes=2))] == [100]
    with pytest.raises(InputError, match="may differ between processes"):
        watch.step(2, {"tokens": jnp.int32(100)}, Site(processes=2))
