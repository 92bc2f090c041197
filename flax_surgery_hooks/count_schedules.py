"""Schedules that a counter of the train loop decides: tokens, samples, frames seen."""

from __future__ import annotations

import bisect
import dataclasses
from typing import NamedTuple

from flax_surgery_hooks.errors import InputError, ScheduleError
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.schedules import At, Every, Schedule
from flax_surgery_hooks.watched_schedules import LAG, Trigger, Watched, as_at_least, as_name


class CountState(NamedTuple):
    """What a counter schedule has seen.

    Attributes:
      seen: the counter, None before the first observation.
      fires: how often it has been due.
    """

    seen: int | None = None
    fires: int = 0


@dataclasses.dataclass(frozen=True, repr=False)
class OnCount(Watched):
    """Due when a counter passes one of the counts at which `counts`, read as a schedule of counts, is due."""

    counts: At | Every
    of: str
    lag: int = LAG

    integral = True

    def __post_init__(self):
        as_name(self.of, "`of`, the counter,", "every_count(1_000_000, of='tokens')")
        object.__setattr__(self, "lag", as_at_least(self.lag, 0, "`lag` of a counter", "lag=4"))

    @property
    def source(self) -> tuple[str, str]:
        """The counter, among the trainer's inputs or in one of them."""
        name, _, inside = self.of.partition("/")
        return (name, inside)

    def max_fires(self, k: int) -> Schedule:
        """The first `k` of its counts; several that are passed at once are one fire.

        Raises:
          ScheduleError: `k` is not a positive integer.
        """
        counts = self.counts.max_fires(k)
        assert isinstance(counts, At | Every)
        return dataclasses.replace(self, counts=counts)

    def begin(self) -> CountState:
        """The state before anything was observed."""
        return CountState()

    def is_done(self, state: CountState) -> bool:
        """Whether all counts are passed."""
        return state.seen is not None and self.counts.next_step(state.seen) is None

    def observe(
        self, state: CountState, step: int, value: int, now: int | None = None
    ) -> tuple[CountState, Trigger | None]:
        """As for `Watched`. The first count is only where the counting begins.

        Raises:
          InputError: the counter goes back.

        >>> schedule = every_count(1_000, of="tokens")
        >>> state, trigger = schedule.observe(schedule.begin(), 1, 5_300)
        >>> state, trigger = schedule.observe(state, 2, 7_200)
        >>> trigger.limit, trigger.crossed
        (7000, 2)
        """
        if state.seen is None:
            return CountState(value, state.fires), None
        if value < state.seen:
            raise InputError(
                f"The counter {self.of!r} goes back.",
                step=step,
                found=f"{value} after {state.seen}" + (", as an int32 does beyond 2**31 - 1" if value < 0 else ""),
                write="a count since the start of training, as a Python int",
            )
        crossed = self._rank(value) - self._rank(state.seen)
        if not crossed:
            return CountState(value, state.fires), None
        return CountState(value, state.fires + 1), Trigger(repr(self), step, value, self._last(value), crossed=crossed)

    def past(self, first: int) -> str:
        """Those of its listed counts that the first one seen is not before; of periodic ones others follow."""
        return listed(map(str, self.counts.steps[: self._rank(first)])) if isinstance(self.counts, At) else ""

    def _rank(self, count: int) -> int:
        """How many of the counts are not beyond this one."""
        if isinstance(self.counts, At):
            return bisect.bisect_right(self.counts.steps, count)
        reached = count if self.counts.stop is None else min(count, self.counts.stop)
        return 0 if reached < self.counts.first else (reached - self.counts.first) // self.counts.n + 1

    def _last(self, count: int) -> int:
        """The last of the counts that is not beyond this one."""
        rank = self._rank(count)
        if isinstance(self.counts, At):
            return self.counts.steps[rank - 1]
        return self.counts.first + (rank - 1) * self.counts.n

    def __repr__(self) -> str:
        lag = "" if self.lag == LAG else f", lag={self.lag}"
        if isinstance(self.counts, At):
            return f"at_count({', '.join(map(str, self.counts.steps))}, of={self.of!r}{lag})"
        bounds = {"start": self.counts.start or None, "stop": self.counts.stop}
        told = "".join(f", {name}={value}" for name, value in bounds.items() if value is not None)
        return f"every_count({self.counts.n}, of={self.of!r}{told}{lag})"


def every_count(
    n: int, *, of: str, start: int = 0, stop: int | None = None, max_fires: int | None = None, lag: int = LAG
) -> Schedule:
    """Due when a counter passes n, 2n, 3n, ..., or with a `start` start, start + n, start + 2n, ...

    It is `every` with a counter of the train loop in place of the step: `hooks(step, state, tokens=tokens)`. A counter
    passes a count by reaching it or jumping beyond; several that it passes at once are one fire, and the record says
    how many they were (`triggers[0].crossed`). The first count that the hooks see is where they begin, and what lies
    before it is taken as past: a run that goes on with 5,300,000 tokens does not fire for the five millions. So that
    the first train step can pass a count, call the hooks before it, `state = hooks(0, state, tokens=0)`.

    A Python int is looked at in its own call; on several processes it must be the same on all of them: count what all
    of them see. An integer array is read `lag` steps later, as for `on_metric`, and the fire comes then. None says that
    there is no count at this step.

    Args:
      n: from one count to the next.
      of: the counter: the name of an input, or its path in one, `"metrics/tokens"`.
      start: if not 0, the first count.
      stop: no count after this one is due.
      max_fires: how many counts there are at most.
      lag: how many steps after its own an array is read.

    Raises:
      ScheduleError: an argument is out of its range, or there would be no count at all.

    >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
    >>> hooks = fsh.SurgeryHooks()
    >>> hooks.add("halve", lambda w: w / 2, params="w", when=fsh.every_count(1_000, of="tokens"))
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    >>> for step in range(6):
    ...     state = hooks(step, state.replace(step=step), tokens=step * 640)
    >>> [(one.step, one.triggers[0].value) for one in hooks.ledger.records if one.event == "fired"]
    [(2, 1280), (4, 2560), (5, 3200)]
    """
    example = "every_count(1_000_000, of='tokens')"
    n = as_at_least(n, 1, "`n` of `every_count`", example)
    start = as_at_least(start, 0, "`start` of `every_count`", "start=1_000_000")
    first = start or n
    if stop is not None:
        stop = as_at_least(stop, 0, "`stop` of `every_count`", "stop=1_000_000")
        if stop < first:
            raise ScheduleError("`every_count` is never due.", found=f"stop={stop}", write=f"stop={first} or more")
    if max_fires is not None:
        reached = first + (as_at_least(max_fires, 1, "`max_fires` of `every_count`", "max_fires=1") - 1) * n
        stop = reached if stop is None else min(stop, reached)
    return OnCount(Every(n, start, stop), of, lag)


def at_count(*counts: int, of: str, lag: int = LAG) -> Schedule:
    """Due when a counter passes one of these counts, as for `every_count`.

    Args:
      *counts: values of the counter.
      of: the counter: the name of an input, or its path in one.
      lag: how many steps after its own an array is read; a Python int is looked at in its own call.

    Raises:
      ScheduleError: no count at all, one that is no positive integer, or another argument out of its range.

    >>> at_count(5_000_000, 1_000_000, of="tokens")
    at_count(1000000, 5000000, of='tokens')
    """
    if not counts:
        raise ScheduleError(
            "`at_count` without counts is never due.", found="at_count()", write="at_count(1_000_000, of='tokens')"
        )
    return OnCount(
        At(tuple(as_at_least(one, 1, "A count of `at_count`", "at_count(1_000_000, of='tokens')") for one in counts)),
        of,
        lag,
    )
