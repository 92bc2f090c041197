"""Schedules that a metric decides: which values make them due, against an oracle; what they remember and refuse."""

import copy
import dataclasses
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_cases import INF, NAN, SCHEDULES, by_hooks, expected, noisy, observed

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import ScheduleError
from flax_surgery_hooks.metric_schedules import MetricState, OnMetric
from flax_surgery_hooks.watched_values import Site
from flax_surgery_hooks.watching import Watch


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_series(name):
    schedule, fired = SCHEDULES[name], 0
    for seed in range(12):
        values = noisy(seed)
        fires = expected(schedule, values)
        assert observed(schedule, values) == fires, seed
        fired += len(fires)
    assert fired > 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-4, 4, width=32) | st.sampled_from([NAN, INF, -INF, 0.0]), max_size=40),
    st.sampled_from(sorted(SCHEDULES)),
)
def test_any_series(values, name):
    assert observed(SCHEDULES[name], values) == expected(SCHEDULES[name], values)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", [float, jnp.float32])
def test_hooks_in_a_loop(name, kind):
    values = noisy(1, 60)
    assert by_hooks(SCHEDULES[name], values, kind=kind) == expected(SCHEDULES[name], values)


# Wrong rules that the oracle must find.


def changed(schedule, kind=OnMetric, **changes):
    """The schedule as one of another class, with other values of some fields."""
    return kind(**{field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)} | changes)


class Poisoned(OnMetric):
    """A spike enters the average as it is."""

    def _with(self, state, value):
        return changed(self, spike=None, above=1.0)._with(state, value)


class Biased(OnMetric):
    """The average starts from zero."""

    def _with(self, state, value):
        return super()._with(state, value)._replace(weight=1.0)


class Itself(OnMetric):
    """A value is compared with the average that holds it."""

    def _judged(self, state, seen, value):
        return super()._judged(seen, seen, value)


class Creeping(OnMetric):
    """The best moves with every small improvement."""

    def _with(self, state, value):
        return changed(self, plateau=0.0)._with(state, value)


class Impatient(OnMetric):
    """Values from before the fire count for the next one."""

    def observe(self, state, step, value, now=None):
        return super().observe(state._replace(quiet=-1), step, value, now)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (Poisoned, "spike"), (Biased, "spike"), (Itself, "spike"), (Creeping, "plateau"),
        (Impatient, "above, patient"), (Biased, "above, averaged"),
    ],
)  # fmt: skip
def test_wrong_rules_are_found(wrong, name):
    right = SCHEDULES[name]
    schedule = changed(right, wrong)
    assert any(observed(schedule, noisy(seed)) != expected(right, noisy(seed)) for seed in range(12))


# The decision state.


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_replay_from_every_cut_fires_the_same(name):
    schedule, values = SCHEDULES[name], noisy(3, 50)
    for cut in range(len(values)):
        first, second = values[:cut], values[cut:]
        watch, fires = Watch("a", schedule), []
        for values_, begin in ((first, 1), (second, cut + 1)):
            for step, value in enumerate(values_, start=begin):
                fires += [
                    (step, one.step) for one in watch.step(step, {"metrics": {"loss": jnp.float32(value)}}, Site())
                ]
            saved = json.loads(json.dumps(watch.to_json(), allow_nan=False))
            watch = Watch("a", schedule)
            watch.from_json(saved)
        whole = [fire for fire in expected(schedule, values) if fire[0] <= len(values)]
        assert fires == whole, cut


def test_a_replay_that_forgets_what_waits_is_found():
    schedule = fsh.on_metric("loss", above=5.0)
    watch = Watch("a", schedule)
    for step, value in enumerate([1.0, 9.0, 1.0], start=1):
        assert watch.step(step, {"metrics": {"loss": value}}, Site()) == ()
    saved = watch.to_json()
    assert saved["waiting"] == [[5, 1, 1.0], [6, 2, 9.0], [7, 3, 1.0]]
    for waiting, fires in ((saved["waiting"], [6]), ([], [])):
        again = Watch("a", schedule)
        again.from_json(saved | {"waiting": waiting})
        assert [step for step in range(4, 9) if again.step(step, {"metrics": {"loss": None}}, Site())] == fires


def test_hooks_go_on_from_what_they_saw():
    schedule, values = fsh.on_metric("loss", spike=1.5, horizon=10), noisy(5, 60)
    whole = by_hooks(schedule, values)
    for cut in (1, 17, 30, 44):
        hooks, state = tiny.make_hooks(tiny.halve, schedule), tiny.make_state(1)
        fires = []
        for step, value in enumerate([*values, *([None] * 5)], start=1):
            if step == cut + 1:
                fires += [one.step for one in hooks.ledger.records if one.event == "fired"]
                saved = json.dumps(hooks._watching.to_json(), allow_nan=False)
                hooks = tiny.make_hooks(tiny.halve, schedule)
                hooks._watching.from_json(json.loads(saved))
            state = hooks(step, state.replace(step=step), metrics={"loss": value})
        assert fires + [one.step for one in hooks.ledger.records if one.event == "fired"] == [at for at, _ in whole]


def test_what_was_not_saved_begins_anew(caplog):
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1.0))
    hooks._watching.from_json({"a": [{"schedule": "on_metric('loss', above=2.0)"}]})
    assert "begins to watch on_metric('loss', above=1.0) anew" in caplog.text
    assert hooks._watching.to_json() == {
        "a": [{"schedule": "on_metric('loss', above=1.0)", "state": MetricState()._asdict(), "waiting": []}]
    }


def test_huge_values_leave_a_state_of_finite_numbers():
    for schedule in (
        fsh.on_metric("loss", spike=2.0, horizon=3),
        fsh.on_metric("loss", plateau=0.5, patience=9, horizon=3),
    ):
        state = schedule.begin()
        for step, value in enumerate([1e308, -1e308, 1.7e308, INF, -1.7e308, NAN, 1.7e308] * 9):
            state, _ = schedule.observe(state, step, value)
            assert all(math.isfinite(number) for number in state if number is not None)


# Values.


def test_equality_hash_and_copies_are_by_value():
    schedule = fsh.on_metric("loss", spike=3, cooldown=np.int64(5))
    same = fsh.on_metric("loss", spike=3.0, cooldown=5, patience=1, horizon=100)
    assert schedule == same
    assert hash(schedule) == hash(same)
    assert len({schedule, same, fsh.on_metric("loss", above=3), fsh.on_metric("acc", spike=3)}) == 3
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert (schedule | fsh.at(3)) == (fsh.at(3) | same)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.spike = 2.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_shown_as_it_is_written(name):
    assert eval(repr(SCHEDULES[name]), {"on_metric": fsh.on_metric}) == SCHEDULES[name]


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (fsh.on_metric("loss", above=3), "on_metric('loss', above=3.0)"),
        (fsh.on_metric("loss", spike=3, horizon=100, patience=1), "on_metric('loss', spike=3.0)"),
        (fsh.on_metric("a", below=3, horizon=100, lag=0), "on_metric('a', below=3.0, horizon=100, lag=0)"),
        (fsh.on_metric("a", plateau=0, patience=9, mode="max"), "on_metric('a', plateau=0.0, patience=9, mode='max')"),
        (fsh.on_metric("a", above=1, max_fires=2), "on_metric('a', above=1.0, max_fires=2)"),
        (fsh.on_metric("a", above=1).max_fires(2), "on_metric('a', above=1.0, max_fires=2)"),
        (fsh.first(fsh.on_metric("a", above=1, max_fires=1), 2), "on_metric('a', above=1.0, max_fires=1)"),
        (fsh.on_metric("a", above=1) | fsh.every(9), "on_metric('a', above=1.0) | every(9)"),
    ],
)
def test_repr(schedule, text):
    assert repr(schedule) == text


# Every `raise`, on its content.


REFUSED = {
    "no condition": (lambda: fsh.on_metric("loss"), "exactly one condition", "none", "on_metric('loss', above=5.0) |"),
    "two": (lambda: fsh.on_metric("loss", above=1, spike=2), "exactly one condition", "above, spike", "plateau="),
    "no name": (lambda: fsh.on_metric("", above=1), "`name` of `on_metric` must be a name", "str", "'loss'"),
    "a path": (lambda: fsh.on_metric(("a", "b"), above=1), "must be a name", "tuple", "'loss'"),
    "a text": (lambda: fsh.on_metric("a", above="1"), "`above` of `on_metric` must be a finite", "str 1", "above=5.0"),
    "a bool": (lambda: fsh.on_metric("a", below=True), "must be a finite number", "bool True", "below=5.0"),
    "nan": (lambda: fsh.on_metric("a", above=NAN), "must be a finite number", "nan", "above=5.0"),
    "spike of 1": (lambda: fsh.on_metric("a", spike=1), "a factor above 1", "1.0", "spike=3.0"),
    "a large plateau": (lambda: fsh.on_metric("a", plateau=5, patience=1), "a part of 1", "5.0", "plateau=0.01"),
    "a plateau below 0": (lambda: fsh.on_metric("a", plateau=-0.1, patience=1), "a part of 1", "-0.1", "0.01"),
    "an impatient plateau": (
        lambda: fsh.on_metric("a", plateau=0.1),
        "needs `patience`",
        "plateau=0.1",
        "patience=1000",
    ),
    "a mode": (
        lambda: fsh.on_metric("a", plateau=0.1, patience=2, mode="low"),
        "small or large",
        "'low'",
        "mode='max'",
    ),
    "a mode of no plateau": (lambda: fsh.on_metric("a", above=1, mode="max"), "for a plateau", "above", "mode='min'"),
    "patience of 0": (lambda: fsh.on_metric("a", above=1, patience=0), "`patience` of `on_metric` must be", "0", "10"),
    "a float patience": (lambda: fsh.on_metric("a", above=1, patience=2.0), "must be an integer", "2.0", "patience=10"),
    "cooldown": (lambda: fsh.on_metric("a", above=1, cooldown=-1), "`cooldown` of `on_metric`", "-1", "cooldown=10"),
    "no cooldown": (lambda: fsh.on_metric("a", above=1, cooldown=None), "must be an integer", "None", "cooldown=10"),
    "max_fires": (lambda: fsh.on_metric("a", above=1, max_fires=0), "`max_fires` of `on_metric`", "0", "max_fires=10"),
    "start": (lambda: fsh.on_metric("a", above=1, start=-5), "`start` of `on_metric`", "-5", "start=10"),
    "horizon": (lambda: fsh.on_metric("a", above=1, horizon=0), "`horizon` of `on_metric`", "0", "horizon=10"),
    "lag": (lambda: fsh.on_metric("a", above=1, lag=-1), "`lag` of `on_metric`", "-1", "lag=10"),
    "none of it": (
        lambda: fsh.on_metric("a", above=1).max_fires(0),
        "`max_fires` must be at least 1",
        "0",
        "max_fires=1",
    ),
    "next_step": (lambda: fsh.on_metric("a", above=1).next_step(3), "not known in advance", "on_metric('a'", "`when=`"),
    "due_steps": (
        lambda: list(fsh.on_metric("a", above=1).due_steps(0, 9)),
        "not known in advance",
        "on_metric",
        "host",
    ),
    "is_due": (
        lambda: (fsh.at(3) | fsh.on_metric("a", above=1)).is_due(3),
        "not known in advance",
        "on_metric",
        "host",
    ),
    "last": (lambda: fsh.last(fsh.on_metric("a", above=1), 9), "not known in advance", "on_metric", "every"),
    "max_fires of a union": (
        lambda: (fsh.at(3) | fsh.on_metric("a", above=1)).max_fires(2),
        "not known in advance",
        "on_metric",
        "`max_fires=` in the schedule itself",
    ),
    "traced": (
        lambda: jax.jit((fsh.every(3) | fsh.on_metric("a", above=1)).is_due)(3),
        "no in-graph form",
        "on_metric('a', above=1.0)",
        "the host form, state = hooks(step, state, ...)",
    ),
    "cooldown of it": (lambda: fsh.cooldown(fsh.on_metric("a", above=1), 3), "`at` and `every`", "on_metric", "_next"),
    "another state": (
        lambda: fsh.on_metric("a", above=1).state_from_json({"seen": 3}),
        "not the saved state of on_metric('a', above=1.0)",
        "{'seen': 3}",
        "numbers under average, weight, best, run, fires, quiet",
    ),
    "a state of texts": (
        lambda: fsh.on_metric("a", above=1).state_from_json(MetricState()._asdict() | {"best": "x"}),
        "not the saved state",
        "'best': 'x'",
        "numbers",
    ),
    "no watch": (
        lambda: Watch("a", OnMetric("b", above=1)).from_json({"state": {}}),
        "not what was saved",
        "state",
        "to_json",
    ),
    "half a watch": (
        lambda: Watch("a", OnMetric("b", above=1)).from_json({"state": {}, "waiting": [[1, 2]]}),
        "not what was saved of on_metric('b', above=1.0)",
        "waiting",
        "to_json",
    ),
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
