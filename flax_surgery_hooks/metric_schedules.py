"""Schedules that a metric decides: a threshold, a spike, a plateau."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from flax_surgery_hooks.errors import ScheduleError, quoted, typed
from flax_surgery_hooks.schedules import Schedule, is_finite
from flax_surgery_hooks.watched_schedules import LAG, Trigger, Watched, as_at_least, as_name

CONDITIONS = ("above", "below", "spike", "plateau")
MODES = ("min", "max")
HORIZON = 100
"""Observations over which a spike's average reaches back, if nothing else is said."""


class MetricState(NamedTuple):
    """What a metric schedule has seen: plain numbers, all finite.

    Attributes:
      average: sum of the values, each weighted by its age.
      weight: sum of these weights; the running average is `average / weight`.
      best: the best value so far, of a plateau.
      run: how many observations in a row hold the condition.
      fires: how often it has been due.
      quiet: values of steps up to this one do not count.
    """

    average: float = 0.0
    weight: float = 0.0
    best: float | None = None
    run: int = 0
    fires: int = 0
    quiet: int = -1

    @property
    def mean(self) -> float:
        """The running average; NaN before there is one."""
        return self.average / self.weight if self.weight else math.nan


@dataclasses.dataclass(frozen=True, repr=False)
class OnMetric(Watched):
    """Due when a metric holds a condition; see `on_metric`."""

    name: str
    above: float | None = None
    below: float | None = None
    spike: float | None = None
    plateau: float | None = None
    patience: int | None = None
    cooldown: int = 0
    fires: int | None = None
    start: int = 0
    horizon: int | None = None
    mode: str = "min"
    lag: int = LAG

    integral = False

    def __post_init__(self):
        as_name(self.name, "`name` of `on_metric`", "on_metric('loss', spike=3.0)")
        given = [key for key in CONDITIONS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ScheduleError(
                "`on_metric` takes exactly one condition.",
                found=", ".join(given) or "none",
                write="on_metric('loss', above=5.0) | on_metric('loss', spike=3.0); or below=, or plateau=",
            )
        object.__setattr__(self, given[0], _as_bound(getattr(self, given[0]), given[0]))
        if self.plateau is not None and self.patience is None:
            raise ScheduleError(
                "A plateau needs `patience`: how many observations bring no improvement.",
                found=f"on_metric({self.name!r}, plateau={self.plateau})",
                write=f"on_metric({self.name!r}, plateau={self.plateau}, patience=1000)",
            )
        if not isinstance(self.mode, str) or self.mode not in MODES or (self.mode == "max" and self.plateau is None):
            raise ScheduleError(
                "`mode` of `on_metric` says for a plateau whether small or large values are good.",
                found=f"mode={quoted(self.mode, 80)} with {given[0]}",
                write="mode='min' or mode='max' with plateau=",
            )
        for key, lowest in {"patience": 1, "cooldown": 0, "fires": 1, "start": 0, "horizon": 1, "lag": 0}.items():
            self._check(key, lowest)
        defaults = {"patience": 1} | ({"horizon": HORIZON} if self.spike is not None else {})
        for key, default in defaults.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, default)

    def _check(self, key: str, lowest: int) -> None:
        value = getattr(self, key)
        if value is not None or key in ("cooldown", "start", "lag"):
            told = {"fires": "max_fires"}.get(key, key)
            number = as_at_least(value, lowest, f"`{told}` of `on_metric`", f"{told}={max(lowest, 10)}")
            object.__setattr__(self, key, number)

    @property
    def source(self) -> tuple[str, str]:
        """The metric, in the trainer's `metrics`."""
        return ("metrics", self.name)

    def max_fires(self, k: int) -> Schedule:
        """The first `k` times that it is due.

        Raises:
          ScheduleError: `k` is not a positive integer.
        """
        k = as_at_least(k, 1, "`max_fires`", "max_fires=1")
        return dataclasses.replace(self, fires=k if self.fires is None else min(k, self.fires))

    def begin(self) -> MetricState:
        """The state before anything was observed."""
        return MetricState()

    def is_done(self, state: MetricState) -> bool:
        """Whether it has fired as often as it may."""
        return self.fires is not None and state.fires >= self.fires

    def observe(
        self, state: MetricState, step: int, value: float, now: int | None = None
    ) -> tuple[MetricState, Trigger | None]:
        """As for `Watched`; the rule is in `on_metric`.

        >>> schedule = on_metric("loss", above=5, patience=2)
        >>> state, trigger = schedule.observe(schedule.begin(), 10, 7.0)
        >>> state, trigger = schedule.observe(state, 11, 6.0)
        >>> trigger
        Trigger(schedule="on_metric('loss', above=5.0, patience=2)", step=11, value=6.0, limit=5.0, average=None,
                crossed=None)
        >>> state.quiet
        15
        """
        if self.is_done(state):
            return state, None
        seen = self._with(state, value)
        holds, limit = self._judged(state, seen, value)
        run = state.run + 1 if holds and step > state.quiet and step >= self.start else 0
        assert self.patience is not None
        if run < self.patience:
            return seen if run == seen.run else seen._replace(run=run), None
        quiet = (step + self.lag if now is None else now) + self.cooldown
        mean = (state if self.spike is not None else seen).mean
        told = None if math.isnan(mean) else mean
        return seen._replace(run=0, fires=state.fires + 1, quiet=quiet), Trigger(repr(self), step, value, limit, told)

    def _with(self, state: MetricState, value: float) -> MetricState:
        """The state with the value in its average and its best."""
        if self.horizon is not None and math.isfinite(value):
            # A spike enters at its bound: one that is huge hides none after it, and a new level is one in the end.
            value = min(value, self._bound(state)) if self.spike is not None else value
            share = 1 / self.horizon
            average, weight = (1 - share) * state.average + share * value, (1 - share) * state.weight + share
            state = MetricState(average, weight, *state[2:])  # twice as fast as `_replace`
        if self.plateau is None or not self._betters(state.best, value := self._looked_at(state, value)):
            return state
        return state._replace(best=value)

    def _judged(self, state: MetricState, seen: MetricState, value: float) -> tuple[bool, float | None]:
        """Whether the condition holds for a value, given the states before and with it; and what it is held against."""
        if self.spike is not None:
            bound = self._bound(state)
            return value > bound or not math.isfinite(value), bound if state.weight else None
        value = self._looked_at(seen, value)
        if self.above is not None:
            return value > self.above, self.above
        if self.below is not None:
            return value < self.below, self.below
        return not self._betters(state.best, value), self._to_better(state.best)

    def _looked_at(self, seen: MetricState, value: float) -> float:
        return value if self.horizon is None else seen.mean

    def _bound(self, state: MetricState) -> float:
        """What a spike exceeds: nothing, before there is an average."""
        assert self.spike is not None
        mean = state.mean
        return mean + (self.spike - 1) * abs(mean) if state.weight else math.inf

    def _betters(self, best: float | None, value: float) -> bool:
        limit, sign = self._to_better(best), 1 if self.mode == "min" else -1
        return math.isfinite(value) and (limit is None or sign * value < sign * limit)

    def _to_better(self, best: float | None) -> float | None:
        """What a value must be beyond to better the best one of a plateau."""
        assert self.plateau is not None
        return None if best is None else best - (1 if self.mode == "min" else -1) * self.plateau * abs(best)

    def __repr__(self) -> str:
        usual: dict[str, Any] = {"patience": 1, "horizon": HORIZON if self.spike is not None else None}
        told = [repr(self.name)]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != usual.get(field.name, field.default):
                told.append(f"{'max_fires' if field.name == 'fires' else field.name}={value!r}")
        return f"on_metric({', '.join(told)})"


def on_metric(
    name: str,
    *,
    above: float | None = None,
    below: float | None = None,
    spike: float | None = None,
    plateau: float | None = None,
    patience: int | None = None,
    cooldown: int = 0,
    max_fires: int | None = None,
    start: int = 0,
    horizon: int | None = None,
    mode: str = "min",
    lag: int = LAG,
) -> Schedule:
    """Due when a metric holds a condition, exactly one of `above`, `below`, `spike` and `plateau`.

    The train loop passes its metrics at every call, `state = hooks(step, state, metrics=metrics)`: a mapping, nested or
    with `/` in its keys, or a `clu.metrics.Collection`. A value is a real number, a scalar array, a
    `clu.metrics.Metric` (whose `compute` is called), or None where there is none at this step. No value is waited for:
    that of step s is read in the call of step s + `lag`, and there the hook fires. The loop can thus be no more than
    `lag` steps ahead of the device. Reading one metric takes some microseconds a step (see `watching`).

    On several processes a value must be one for all of them: a fully replicated array over all devices.

    After a fire, values of the steps up to the fire itself, which do not know of it, and of `cooldown` steps more enter
    the average and the best value but do not count. A condition that still holds then is due again.

    Args:
      name: which metric: `"loss"`, `"train/loss"`.
      above: a finite number; the metric is larger. NaN is neither above nor below anything.
      below: a finite number; it is smaller.
      spike: a factor above 1; the metric exceeds this many times its running average, taken before the value: `value >
        mean + (spike - 1) * |mean|`. It is an exponential average over `horizon` observations, bias-corrected, so that
        the first value alone is its own average; a spike enters it at the bound that it exceeded, and a value that is
        not finite, which always counts as a spike, not at all.
      plateau: a part of 1; the metric has not improved on its best by more than `plateau * |best|`.
      patience: how many observations in a row must hold the condition: 1 by default; a plateau has to say.
      cooldown: steps after a fire that do not count.
      max_fires: how often it is due at most.
      start: values of earlier steps do not count.
      horizon: observations over which the average reaches back: an observation has a weight of 1 / horizon. 100 for a
        spike; with one, `above`, `below` and `plateau` look at the average, this value included, not at the value.
      mode: for a plateau: "min" if smaller is better, "max" if larger is.
      lag: how many steps after its own a value is read; 0 waits for the device at every step.

    Raises:
      ScheduleError: not exactly one condition, or an argument out of its range.

    >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
    >>> hooks = fsh.SurgeryHooks()
    >>> hooks.add("calm", lambda w: w / 2, params="w", when=fsh.on_metric("loss", spike=3, lag=2))
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    >>> for step, loss in enumerate([1.0, 1.2, 9.0, 1.1, 1.0, 1.0]):
    ...     state = hooks(step, state.replace(step=step), metrics={"loss": loss})
    >>> [(one.step, one.triggers[0].step, one.triggers[0].value) for one in hooks.ledger.records if one.triggers]
    [(4, 2, 9.0)]
    """
    return OnMetric(
        name, above, below, spike, plateau, patience, cooldown, max_fires, start, horizon, mode, lag
    )  # fmt: skip


def _as_bound(value: Any, key: str) -> float:
    """A threshold, factor or part as a float."""
    write = {"spike": "spike=3.0", "plateau": "plateau=0.01"}.get(key, f"{key}=5.0")
    if not is_finite(value):
        raise ScheduleError(f"`{key}` of `on_metric` must be a finite number.", found=typed(value), write=write)
    value = float(value)
    if key == "spike" and value <= 1:
        raise ScheduleError("`spike` of `on_metric` is a factor above 1.", found=value, write=write)
    if key == "plateau" and not 0 <= value < 1:
        raise ScheduleError("`plateau` of `on_metric` is a part of 1, from 0.", found=value, write=write)
    return value
