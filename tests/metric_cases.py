"""What metric schedules must do, written in NumPy from the documentation alone; and series to try them on."""

import math

import numpy as np
import tiny

import flax_surgery_hooks as fsh

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
