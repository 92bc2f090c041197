"""Schedules that a metric decides, against rules written in NumPy from the documentation alone."""

import copy
import dataclasses
import json
import math
import pickle

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from clu import metrics as clu_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import InputError, ScheduleError, StepError
from flax_surgery_hooks.metric_schedules import MetricState, OnMetric
from flax_surgery_hooks.watched_values import Site, found, read, taken
from flax_surgery_hooks.watching import WATCHING, Watch

NAN, INF = math.nan, math.inf


# The oracle: from the whole series, each time anew. It shares nothing with the code.


def averages(values, horizon):
    """At each place the average of the finite values up to and with it, weighted by (1 - 1/horizon)^age."""
    result = []
    for i in range(len(values)):
        x = np.asarray(values[: i + 1], float)
        x = x[np.isfinite(x)]
        weights = (1 - 1 / horizon) ** np.arange(len(x))[::-1]
        result.append(np.average(x, weights=weights) if len(x) else NAN)
    return result


def spikes(values, factor, horizon):
    """At each place whether it is a spike. It goes into the average at its bound, if it is finite."""
    kept, found = [], []
    for value in values:
        mean = averages(kept, horizon)[-1] if kept else None
        bound = INF if mean is None else mean + (factor - 1) * abs(mean)
        found.append(not np.isfinite(value) or value > bound)
        if np.isfinite(value):
            kept.append(min(value, bound))
    return found


def stale(values, part, mode):
    """At each place whether it is no better than the best before, by more than this part of it."""
    sign, best, found = (1 if mode == "min" else -1), None, []
    for value in values:
        better = np.isfinite(value) and (best is None or sign * (best - value) > part * abs(best))
        found.append(not better)
        best = value if better else best
    return found


def conditions(schedule, values):
    if schedule.spike is not None:
        return spikes(values, schedule.spike, schedule.horizon)
    seen = averages(values, schedule.horizon) if schedule.horizon else values
    if schedule.plateau is not None:
        return stale(seen, schedule.plateau, schedule.mode)
    return [value > schedule.above if schedule.above is not None else value < schedule.below for value in seen]


def expected(schedule, values, first=1):
    """[(step of the fire, step of the value)] of a loop that calls the hooks at every step."""
    fires, row, quiet = [], 0, -1
    for step, holds in enumerate(conditions(schedule, values), start=first):
        if schedule.fires is not None and len(fires) == schedule.fires:
            break
        row = row + 1 if holds and step > quiet and step >= schedule.start else 0
        if row == schedule.patience:
            fires.append((step + schedule.lag, step))
            row, quiet = 0, step + schedule.lag + schedule.cooldown
    return fires


def observed(schedule, values, first=1):
    state, fires = schedule.begin(), []
    for step, value in enumerate(values, start=first):
        state, trigger = schedule.observe(state, step, value)
        if trigger is not None:
            fires.append((step + schedule.lag, trigger.step))
    return fires


def by_hooks(schedule, values, first=1, kind=float, **options):
    """The fires of hooks in a loop, after which further steps bring no new value."""
    hooks = tiny.make_hooks(tiny.halve, schedule, **options)
    state = tiny.make_state(first)
    for step, value in enumerate([*values, *([None] * (schedule.lag + 1))], start=first):
        state = hooks(step, state.replace(step=step), metrics={"loss": value if value is None else kind(value)})
    return [(one.step, one.triggers[0].step) for one in hooks.ledger.records if one.event == "fired"]


def noisy(seed, n=120):
    """A falling loss with noise, jumps, a new level, and some values that are not finite."""
    rng = np.random.default_rng(seed)
    values = 3 * np.exp(-np.arange(n) / 40) + 0.3 * rng.standard_normal(n) - (seed % 3 == 2) * 2
    values[rng.integers(0, n, 5)] *= rng.uniform(2, 50, 5)
    values[n // 2 :] += seed % 4
    values[rng.integers(0, n, 3)] = rng.choice([NAN, INF, -INF], 3)
    return [float(np.float32(value)) for value in values]


SCHEDULES = {
    "above": fsh.on_metric("loss", above=2.5),
    "above, patient": fsh.on_metric("loss", above=1.0, patience=3, cooldown=7),
    "above, averaged": fsh.on_metric("loss", above=1.5, horizon=8, lag=1),
    "below": fsh.on_metric("loss", below=0.4, max_fires=3),
    "below, averaged, late": fsh.on_metric("loss", below=1.0, horizon=20, start=50, cooldown=3),
    "spike": fsh.on_metric("loss", spike=2.0),
    "spike, short": fsh.on_metric("loss", spike=1.5, horizon=5, lag=0),
    "spike, twice": fsh.on_metric("loss", spike=1.3, patience=2, cooldown=2, horizon=30),
    "spike, once": fsh.on_metric("loss", spike=1.1, max_fires=1, start=10),
    "plateau": fsh.on_metric("loss", plateau=0.05, patience=6),
    "plateau of none": fsh.on_metric("loss", plateau=0, patience=10, cooldown=5, lag=2),
    "plateau, averaged": fsh.on_metric("loss", plateau=0.01, patience=4, horizon=10),
    "plateau of the largest": fsh.on_metric("loss", plateau=0.1, patience=9, mode="max", max_fires=4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_series(name):
    schedule, fired = SCHEDULES[name], 0
    for seed in range(12):
        values = noisy(seed)
        assert observed(schedule, values) == expected(schedule, values), seed
        fired += len(expected(schedule, values))
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
    schedule, values = SCHEDULES[name], noisy(3, 80)
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


# The runner.


class Recording:
    """A number that notes when it is read."""

    def __init__(self, value, log, step):
        self.read = lambda: log.append(step) or value

    def __float__(self):
        return self.read()


def test_nothing_younger_than_the_lag_is_read():
    log, now = [], []
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1e9, lag=3))
    state = tiny.make_state(1)
    for step in range(1, 12):
        before = len(log)
        assert hooks(step, state, metrics={"loss": Recording(1.0, log, step)}) is state
        now.append((step, log[before:]))
    assert now == [(step, [step - 3] if step > 3 else []) for step in range(1, 12)]


def test_a_loop_that_skips_steps_reads_what_is_old_enough():
    log, now = [], []
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1e9, lag=4))
    for step in (1, 3, 5, 6, 12, 13, 16):
        before = len(log)
        hooks(step, tiny.make_state(1), metrics={"loss": Recording(1.0, log, step)})
        now.append((step, log[before:]))
    assert now == [(1, []), (3, []), (5, [1]), (6, []), (12, [3, 5, 6]), (13, []), (16, [12])]


@jax.jit
def _slow(x):
    return jax.lax.fori_loop(0, 400, lambda _, y: jnp.sin(y @ y), x).sum()


def test_a_call_does_not_wait_for_a_value_that_is_being_computed():
    x = jnp.ones((400, 400))
    _slow(x).block_until_ready()
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", spike=2.0, lag=3))
    state = tiny.make_state(1)
    for step in (1, 2, 3, 4):
        hooks(step, state, metrics={"loss": 1.0})
    slow = _slow(x)
    for step in (5, 6, 7):
        hooks(step, state, metrics={"loss": slow if step == 5 else 1.0})
    assert not slow.is_ready()
    hooks(8, state, metrics={"loss": 1.0})
    assert slow.is_ready()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_shorter_lag_waits_for_it(lag):
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", spike=2.0, lag=lag)), tiny.make_state(1)
    hooks(1, state, metrics={"loss": 1.0})
    slow = _slow(jnp.ones((400, 400)))
    hooks(2, state, metrics={"loss": slow})
    assert slow.is_ready() is (lag == 0)
    hooks(3, state, metrics={"loss": 1.0})
    assert slow.is_ready()


def test_a_hook_fires_by_hand_without_metrics():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1.0)), tiny.make_state(1)
    assert hooks.preview("a", state).triggers == ()
    assert tiny.w_of(hooks.fire("a", state)) == [0.5, 0.5]
    assert hooks.ledger.records[-1].triggers == ()


def test_no_implicit_transfer(no_transfers):
    values = [jax.device_put(np.float32(value)) for value in (1, 1, 9, 1, 1, 1, 1)]
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", spike=2.0, lag=2))
    state = tiny.make_state(jax.device_put(np.int32(1)), w=jax.device_put(np.ones(2, np.float32)))
    with jax.transfer_guard("allow"):
        hooks(1, state, metrics={"loss": values[0]})
        hooks(2, state, metrics={"loss": values[1]})
    for step, value in enumerate(values[2:4], start=3):
        hooks(step, state, metrics={"loss": value})
    assert not tiny.events(hooks, "fired")
    with jax.transfer_guard("allow"):
        hooks(5, state, metrics={"loss": values[4]})
    assert tiny.events(hooks, "fired") == [("fired", "a", 5)]


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    "value", [2.5, jnp.float32(2.5), jnp.bfloat16(2.5), np.float64(2.5), np.array(2.5), jnp.asarray(2.5)]
)
def test_real_scalars_of_all_sorts(value, far):
    where = Site(far=far)
    assert read(taken(value, "metrics/loss", integral=False, where=where), "", integral=False, where=where) == 2.5


def test_flags_and_integers_are_numbers_too():
    for value in (True, np.True_, jnp.bool_(True), 1, jnp.int8(1), np.uint16(1)):
        assert read(taken(value, "", integral=False, where=Site()), "", integral=False, where=Site()) == 1.0


def test_a_numpy_array_is_read_before_it_is_written_into():
    hooks, loss = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5.0, lag=2)), np.array(9.0)
    hooks(1, tiny.make_state(1), metrics={"loss": loss})
    loss[...] = 0
    hooks(2, tiny.make_state(1), metrics={"loss": loss})
    hooks(3, tiny.make_state(1), metrics={"loss": loss})
    assert tiny.events(hooks, "fired") == [("fired", "a", 3)]


@flax.struct.dataclass
class Metrics(clu_metrics.Collection):
    accuracy: clu_metrics.Accuracy
    loss: clu_metrics.Average.from_output("loss")


def test_collections_and_metrics_of_clu():
    collection = Metrics.single_from_model_output(
        logits=jnp.eye(4), labels=jnp.array([0, 1, 2, 0]), loss=jnp.array([1.0, 2.0, 6.0])
    )
    for metrics in (collection, {"train": collection}):
        path = "loss" if metrics is collection else "train/loss"
        schedule = fsh.on_metric(path, above=2.5, lag=1)
        hooks = tiny.make_hooks(tiny.halve, schedule)
        for step in (1, 2):
            hooks(step, tiny.make_state(1), metrics=metrics)
        [record] = [one for one in hooks.ledger.records if one.event == "fired"]
        assert record.triggers[0].value == 3.0
    with pytest.raises(InputError, match="Found: metrics with accuracy, loss"):
        tiny.make_hooks(tiny.halve, fsh.on_metric("lost", above=1.0))(1, tiny.make_state(1), metrics=collection)


def test_names_with_slashes_and_nested_ones():
    inputs = {"metrics": {"train/loss": 1, "train": {"acc": 2, "a/b": {"c": 3}}, "a": {"b": {"c/d": 4}}}, "tokens": 5}
    paths = {"train/loss": 1, "train/acc": 2, "train/a/b/c": 3, "a/b/c/d": 4}
    assert {path: found(inputs, ("metrics", path)) for path in paths} == paths
    assert found(inputs, ("tokens", "")) == 5


def test_the_record_says_which_value_decided(tmp_path):
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5, lag=2), ledger=tmp_path / "ledger.jsonl")
    state = tiny.make_state(1)
    for step, loss in enumerate([1.0, 7.5, 1.0, 1.0, INF, 1.0, 1.0], start=1):
        state = hooks(step, state.replace(step=step), metrics={"loss": loss})
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    told = [(line["step"], line["triggers"]) for line in lines if line["event"] == "fired"]
    schedule = "on_metric('loss', above=5.0, lag=2)"
    assert told == [
        (4, [{"schedule": schedule, "step": 2, "value": 7.5, "limit": 5.0}]),
        (7, [{"schedule": schedule, "step": 5, "value": "inf", "limit": 5.0}]),
    ]
    assert tiny.w_of(state) == [0.25, 0.25]


def test_the_record_tells_the_average():
    averaged = {
        "above": fsh.on_metric("loss", above=2.5, horizon=2),
        "spike": fsh.on_metric("loss", spike=2, horizon=2),
    }
    found = {}
    for name, schedule in averaged.items():
        state, _ = schedule.observe(schedule.begin(), 1, 1.0)
        _, trigger = schedule.observe(state, 2, 4.0)
        found[name] = (trigger.value, trigger.limit, trigger.average)
    assert found == {"above": (4.0, 2.5, pytest.approx(3.0)), "spike": (4.0, 2.0, 1.0)}


def test_joined_with_steps_and_with_each_other():
    schedule = (
        fsh.at(3) | fsh.on_metric("loss", above=5.0, lag=1) | fsh.on_metric("acc", below=0.1, lag=2) | fsh.every(10)
    )
    hooks, state = tiny.make_hooks(tiny.halve, schedule), tiny.make_state(1)
    for step in range(1, 22):
        metrics = {"loss": 9.0 if step in (5, 9, 16) else 1.0, "acc": 0.0 if step in (12, 13, 15) else 0.5}
        state = hooks(step, state.replace(step=step), metrics=metrics)
    told = [
        (one.step, [trigger.step for trigger in one.triggers]) for one in hooks.ledger.records if one.event == "fired"
    ]
    assert told == [(3, []), (6, [5]), (10, [9]), (14, [12]), (17, [16, 15]), (20, [])]


def test_several_hooks_each_see_the_metric():
    hooks, state = fsh.SurgeryHooks(), tiny.make_state(1)
    for name, bound in {"a": 2.0, "b": 4.0}.items():
        hooks.add(name, tiny.halve, params="w", when=fsh.on_metric("loss", above=bound, lag=1), **tiny.QUICK)
    for step, loss in enumerate([1.0, 3.0, 1.0, 5.0, 1.0, 1.0], start=1):
        state = hooks(step, state.replace(step=step), metrics={"loss": loss})
    assert tiny.events(hooks, "fired") == [("fired", "a", 3), ("fired", "a", 5), ("fired", "b", 5)]


def test_hooks_that_are_done_are_idle_again():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1.0, max_fires=1, lag=1)), tiny.make_state(1)
    for step in (1, 2):
        assert tiny.w_of(state) == [1.0, 1.0]
        state = hooks(step, state.replace(step=step), metrics={"loss": 2.0})
    assert tiny.w_of(state) == [0.5, 0.5]
    state = hooks(3, state.replace(step=3))  # no metrics are asked for any more
    hooks.flush()
    assert hooks._wake > 10**6


def test_hooks_without_such_schedules_wake_as_before():
    hooks = tiny.make_hooks(tiny.halve, fsh.at(50))
    hooks(1, tiny.make_state(1))
    hooks(2, tiny.make_state(2))
    assert hooks._wake == 50
    hooks.add("b", tiny.halve, params="w", when=fsh.on_metric("loss", above=1.0), **tiny.QUICK)
    for step in (3, 4):
        hooks(step, tiny.make_state(3), metrics={"loss": 0.0})
    assert (hooks._wake, hooks._watching.wake) == (WATCHING, 50)
    hooks.remove("b")
    hooks(5, tiny.make_state(5))
    assert hooks._wake == 50


def test_a_call_that_only_watches_still_checks_the_step():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5.0)), tiny.make_state(1)
    for step in (1, 2, 3):
        hooks(step, state, metrics={"loss": 1.0})
    for step in (3, 2, 4.0, np.int64(4), True, None, jnp.int32(4)):
        with pytest.raises(StepError):
            hooks(step, state, metrics={"loss": 1.0})
    assert hooks(4, state, metrics={"loss": 1.0}) is state


def test_a_call_that_failed_can_be_made_again():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5.0, lag=1)), tiny.make_state(1)
    metrics = {"loss": 9.0}
    hooks(1, state, metrics=metrics)
    with pytest.raises(InputError, match="'metrics'"):
        hooks(2, state)
    state = hooks(2, state.replace(step=2), metrics=metrics)
    assert tiny.events(hooks, "fired") == [("fired", "a", 2)]
    assert hooks._watching.to_json()["a"][0]["waiting"] == [[3, 2, 9.0]]


def test_a_fire_that_failed_is_made_up_for():
    """The trigger stays until the hook has fired, as a due step does."""

    def scaled(w, factor):
        return w * factor

    hooks, state = tiny.make_hooks(scaled, fsh.on_metric("loss", above=5.0, lag=1)), tiny.make_state(1)
    for step, loss in ((1, 1.0), (2, 9.0)):
        hooks(step, state, metrics={"loss": loss}, factor=jnp.float32(0.5))
    for step in (3, 3, 4):
        with pytest.raises(InputError, match="factor"):
            hooks(step, state, metrics={"loss": 1.0})
    state = hooks(4, state, metrics={"loss": 1.0}, factor=jnp.float32(0.5))
    [record] = [one for one in hooks.ledger.records if one.event == "fired"]
    assert (record.step, [one.step for one in record.triggers]) == (4, [2])
    assert tiny.w_of(state) == [0.5, 0.5]


def test_surgeries_that_change_shapes_are_checked_ahead():
    """Such a hook may fire at any step, so that the look ahead takes it for the next one."""

    def grow(leaves):
        return {"w": jnp.concatenate([leaves["w"], leaves["w"]])}

    reshape = {"apply_fn": None, "tx": tiny.SGD, "on_reshape": lambda state, record: seen.append(record.triggers)}
    seen: list = []
    hooks = fsh.SurgeryHooks()
    hooks.add("grow", grow, params="w", when=fsh.on_metric("loss", above=5.0, lag=1), **tiny.QUICK, **reshape)
    hooks.add("fixed", lambda w: w + jnp.ones(2), params="w", when=fsh.at(50), **tiny.QUICK)
    with pytest.raises(fsh.SurgeryError, match="hook 'fixed'"):
        hooks(1, tiny.make_state(1), metrics={"loss": 1.0})
    hooks.remove("fixed")
    state = hooks(1, tiny.make_state(1), metrics={"loss": 9.0})
    state = hooks(2, state.replace(step=2), metrics={"loss": 1.0})
    assert tiny.w_of(state) == [1.0] * 4
    assert [trigger.step for trigger in seen[0]] == [1]


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


STATE = tiny.make_state(1)


def call(value, name="loss", **inputs):
    """A first call of hooks that look at a metric."""
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric(name, above=1.0, lag=0), options=tiny.QUICK)
    return hooks(1, STATE, metrics=value, **inputs)


def deleted():
    value = jnp.float32(1)
    value.delete()
    return value


PARTLY = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))

REFUSED_VALUES = {
    "no metrics": (
        lambda: tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1))(1, tiny.make_state(1), tokens=3),
        "looks at 'metrics/loss', and the train loop does not pass 'metrics'",
        "inputs tokens",
        "hooks(step, state, metrics=metrics)",
    ),
    "another metric": (
        lambda: call({"los": 1.0, "eval": {"acc": 1}}),
        "'metrics' does not hold it",
        "metrics with los, eval/acc",
        "los; at a step without a value, None under that name",
    ),
    "no mapping": (lambda: call(3.0), "'metrics' does not hold it", "metrics=float 3.0", "one of these"),
    "a vector": (lambda: call({"loss": jnp.ones(8)}), "is no real scalar", "ArrayImpl float32[8]", "loss.mean()"),
    "a NumPy vector": (lambda: call({"loss": np.ones(1)}), "is no real scalar", "ndarray float64[1]", "loss.mean()"),
    "a text": (lambda: call({"loss": "1.0"}), "is no real scalar", "str 1.0", ""),
    "a complex number": (lambda: call({"loss": 1j}), "is no real scalar", "complex 1j", ""),
    "a complex array": (lambda: call({"loss": jnp.complex64(1)}), "is no real scalar", "complex64[]", ""),
    "a key": (lambda: call({"loss": jax.random.key(0)}), "is no real scalar", "key<fry>[]", ""),
    "a mapping": (lambda: call({"loss": {"a": 1.0}}), "is no real scalar", "dict {'a': 1.0}", ""),
    "a metric per device": (
        lambda: call({"loss": clu_metrics.Average(total=jnp.ones(8), count=jnp.ones(8))}),
        "is no real scalar",
        "float32[8]",
        "flax.jax_utils.unreplicate",
    ),
    "traced": (
        lambda: jax.jit(lambda loss: call({"loss": loss}) and loss)(1.0),
        "'metrics/loss' is traced",
        "float32[]",
        "outside of the jitted step",
    ),
    "deleted": (lambda: call({"loss": deleted()}), "was deleted before", "donated", "does not donate"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_values_are_refused_at_the_first_call(name):
    build, problem, told, write = REFUSED_VALUES[name]
    with pytest.raises(InputError) as caught:
        build()
    error = caught.value
    assert problem in error.problem
    assert told in str(error)
    assert write in error.write
    assert (error.hook, error.step) == ("a", 1)


def test_a_value_that_is_donated_while_it_waits_is_told():
    hooks, state, loss = (
        tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1.0, lag=1)),
        tiny.make_state(1),
        jnp.float32(0),
    )
    hooks(1, state, metrics={"loss": loss})
    jax.jit(lambda x: x + 1, donate_argnums=0)(loss)
    with pytest.raises(InputError, match="hook 'a', step 2: 'metrics/loss' was deleted"):
        hooks(2, state, metrics={"loss": 1.0})


@pytest.mark.parametrize(
    "value",
    [1.0, 1, np.float32(1), jnp.float32(1), jax.device_put(1.0, NamedSharding(PARTLY.mesh, PartitionSpec()))],
    ids=repr,
)
def test_values_of_one_process_are_refused_on_several(value):
    assert taken(value, "metrics/loss", integral=False, where=Site()) is not None
    with pytest.raises(InputError) as caught:
        taken(value, "metrics/loss", integral=False, where=Site(processes=2))
    assert "may differ between processes" in caught.value.problem
    assert "fully replicated over the mesh of all processes" in caught.value.write
    assert "of 2 processes" in caught.value.found


def test_on_several_processes_a_python_number_of_the_loop_is_refused_too():
    with pytest.raises(InputError, match="may differ between processes"):
        Watch("a", fsh.on_metric("loss", above=1.0)).step(1, {"metrics": {"loss": 1.0}}, Site(processes=2))
