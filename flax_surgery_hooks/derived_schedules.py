"""Schedules told in epochs, fractions of a run or optimizer updates, and schedules made from others.

Each of these functions returns a schedule of `at` and `every`, in train steps: nothing else is left of the arguments.
"""

from __future__ import annotations

import itertools
import math
import numbers
from fractions import Fraction
from typing import Any

from flax_surgery_hooks.errors import ScheduleError, typed
from flax_surgery_hooks.schedules import AnyOf, At, Every, Schedule, as_int, at, every, is_finite, joined

# A schedule that needs more steps than these, written out, was surely not meant.
_MAX_WRITTEN = 10_000


def at_epochs(*epochs: float, steps_per_epoch: int) -> Schedule:
    """Due once that many epochs are done: at the first step at which they are, for fractions of an epoch.

    Args:
      *epochs: epochs since the start; 0 is before training.
      steps_per_epoch: train steps of one epoch.

    Raises:
      ScheduleError: no epoch at all, one that is negative or no number, or steps that are no positive integer.

    >>> at_epochs(1, 2.5, steps_per_epoch=100)
    at(100, 250)
    """
    size = _as_positive(steps_per_epoch, "steps_per_epoch")
    return at(
        *(math.ceil(size * _as_number(epoch, "An epoch of `at_epochs`", "at_epochs(1, 2.5)")) for epoch in epochs)
    )


def every_epochs(
    epochs: float, *, steps_per_epoch: int, start: float = 0, stop: float | None = None, max_fires: int | None = None
) -> Schedule:
    """Due at the end of every epoch, every two epochs, or twice in each (`epochs=0.5`); never at step 0.

    Args:
      epochs: epochs from one due step to the next; they must come to a whole number of steps.
      steps_per_epoch: train steps of one epoch.
      start: if not 0, the first due step is where so many epochs are done.
      stop: no step after so many epochs is due.
      max_fires: how many due steps there are at most.

    Raises:
      ScheduleError: as for `every`, or the period is no whole number of steps.

    >>> every_epochs(2, steps_per_epoch=100, stop=10)
    every(200, stop=1000)
    """
    size = _as_positive(steps_per_epoch, "steps_per_epoch")
    n = size * _as_number(epochs, "`epochs` of `every_epochs`", f"every_epochs(1, steps_per_epoch={size})")
    if n.denominator != 1 or n < 1:
        raise ScheduleError(
            "`epochs` of `every_epochs` must come to a whole number of train steps, at least 1.",
            found=f"{epochs} epochs of {size} steps, {float(n):g} steps",
            write=f"every({max(1, round(n))}), or at_epochs(...), which rounds up",
        )
    first = math.ceil(size * _as_number(start, "`start` of `every_epochs`", "start=5"))
    last = None if stop is None else math.floor(size * _as_number(stop, "`stop` of `every_epochs`", "stop=90"))
    return every(int(n), first, last, max_fires)


def at_fraction(*fractions: float, num_steps: int) -> Schedule:
    """Due once that part of the run is done: at the first step at which it is.

    Args:
      *fractions: from 0 (before training) to 1 (after the last train step).
      num_steps: train steps of the whole run.

    Raises:
      ScheduleError: no fraction at all, one that is not from 0 to 1, or steps that are no positive integer.

    >>> at_fraction(0.5, 0.75, num_steps=1_000)
    at(500, 750)
    """
    size = _as_positive(num_steps, "num_steps")
    return at(*(math.ceil(size * _as_fraction(fraction, "at_fraction")) for fraction in fractions))


def every_fraction(fraction: float, *, num_steps: int) -> Schedule:
    """Due whenever another such part of the run is done, until its end; never at step 0.

    Args:
      fraction: above 0 and up to 1; 0.1 is due ten times. Steps are rounded up, each by itself.
      num_steps: train steps of the whole run.

    Raises:
      ScheduleError: the fraction is not in that range or less than a step, or steps that are no positive integer.

    >>> every_fraction(0.25, num_steps=1_000)
    every(250, stop=1000)
    >>> every_fraction(1 / 3, num_steps=1_000)
    at(334, 667, 1000)
    """
    size = _as_positive(num_steps, "num_steps")
    part = size * _as_fraction(fraction, "every_fraction")
    if part < 1:
        raise ScheduleError(
            "`every_fraction` is less than one train step.",
            found=f"{fraction} of {size} steps, {float(part):g} steps",
            write="every(1)",
        )
    if part.denominator == 1:
        return every(int(part), stop=size)
    return at(*_written(math.ceil(i * part) for i in range(1, math.floor(size / part) + 1)))


def every_updates(
    n: int, *, micro_steps: int, start: int = 0, stop: int | None = None, max_fires: int | None = None
) -> Schedule:
    """Due at every n-th update of an optimizer under `optax.MultiSteps`, right after it; a step is a micro-step.

    Args:
      n: updates from one due step to the next.
      micro_steps: what `MultiSteps(every_k_schedule=...)` holds: train steps of one update. Where it is a function, the
        steps of the updates cannot be known in advance.
      start: if not 0, the update after which it is first due.
      stop: nothing is due after this update; itself it may be.
      max_fires: how many due steps there are at most.

    Raises:
      ScheduleError: as for `every`, or `micro_steps` is no positive integer.

    >>> every_updates(100, micro_steps=4, start=50)
    every(400, start=200)
    """
    k = _as_positive(micro_steps, "micro_steps")
    updates = Every(n, start, stop)
    return every(updates.n * k, updates.start * k, None if updates.stop is None else updates.stop * k, max_fires)


def first(schedule: Schedule, k: int = 1) -> Schedule:
    """The first k due steps of a schedule: its `max_fires(k)`.

    Raises:
      ScheduleError: `schedule` is none, or `k` is no positive integer.

    >>> first(every(200, start=50))
    every(200, start=50, stop=50)
    """
    return _as_schedule(schedule, "first").max_fires(_as_positive(k, "k"))


def last(schedule: Schedule, num_steps: int, k: int = 1) -> Schedule:
    """The last k due steps of a schedule within a run, or as many as there are.

    Args:
      schedule: any schedule.
      num_steps: train steps of the whole run; the last of them may be due.
      k: how many.

    Raises:
      ScheduleError: `schedule` is none or never due in the run, or `num_steps` or `k` is no positive integer.

    >>> last(every(300), num_steps=1_000)
    at(900)
    """
    _as_schedule(schedule, "last")
    end, count, window = _as_positive(num_steps, "num_steps"), _as_positive(k, "k"), 1
    while True:  # from the end, in windows twice as long each time: the due steps before them need no walk
        window *= 2
        steps = list(schedule.due_steps(max(end - window, -1), end))
        if len(steps) >= count or window > end:
            break
    if not steps:
        raise ScheduleError(
            "`last` of a schedule that is never due in the run.",
            found=f"{schedule!r} until step {end}",
            write=f"at({end})",
        )
    return at(*_written(steps[-count:]))


def cooldown(schedule: Schedule, steps: int) -> Schedule:
    """The schedule without the due steps that come less than `steps` after the one kept before them.

    Args:
      schedule: made of `at` and `every`.
      steps: train steps that lie between two due steps, at least.

    Raises:
      ScheduleError: `steps` is no positive integer, or `schedule` is of a class of your own, or so irregular that it
        does not repeat itself for 10,000 due steps.

    >>> cooldown(at(5) | every(10), 10)
    at(5) | every(10, start=20)
    >>> cooldown(every(10), 25)
    every(30, start=10)
    """
    apart = _as_positive(steps, "steps")
    schedule = _as_schedule(schedule, "cooldown")
    parts = schedule.parts if isinstance(schedule, AnyOf) else (schedule,)
    listed = [part for part in parts if type(part) is At]
    periodic = [part for part in parts if type(part) is Every]
    if len(listed) + len(periodic) < len(parts):
        raise ScheduleError(
            "`cooldown` thins schedules of `at` and `every`.", found=schedule, write="a `_next` that leaves steps out"
        )
    if not listed and len(periodic) == 1:
        [only] = periodic
        return _periodic(only.n * -(-apart // only.n), only.first, only.stop)
    bounds = [part.steps[-1] for part in listed] + [max(part.first, part.stop or 0) for part in periodic]
    return _thinned(schedule, apart, max(bounds), [part.n for part in periodic if part.stop is None])


def _thinned(schedule: Schedule, apart: int, settled: int, endless: list[int]) -> Schedule:
    """Walks until what is kept repeats itself: past `settled`, a step modulo all periods decides what comes next."""
    period = math.lcm(*endless)
    kept: list[int] = []
    seen: dict[int, int] = {}
    step = schedule.next_step(-1)
    while step is not None:
        if endless and step > settled:
            if step % period in seen:
                return _repeating(kept, seen[step % period], step)
            seen[step % period] = len(kept)
        kept.append(step)
        if len(kept) > _MAX_WRITTEN:
            break
        step = schedule.next_step(step + apart - 1)
    return at(*_written(kept))


def _repeating(kept: list[int], begin: int, end: int) -> Schedule:
    """The steps kept, which from place `begin` on repeat themselves; `end` is the first that does."""
    n = end - kept[begin]
    while begin and 0 < kept[begin - 1] == kept[-1] - n:  # the repetition reaches further back
        kept = kept[:-1]
        begin -= 1
    once = [At(tuple(kept[:begin]))] if begin else []
    return joined([*once, *(_periodic(n, step) for step in kept[begin:])])


def _periodic(n: int, first_step: int, stop: int | None = None) -> Every:
    return Every(n, 0 if first_step == n else first_step, stop)


def _written(steps: Any) -> list[int]:
    """The steps as a list, if it is not too long."""
    listed = list(itertools.islice(steps, _MAX_WRITTEN + 1))
    if len(listed) > _MAX_WRITTEN:
        raise ScheduleError(
            f"The schedule cannot be told in fewer than {_MAX_WRITTEN:,} steps.",
            found=f"{listed[0]}, {listed[1]}, {listed[2]}, ...",
            write="every(n), or a union of few",
        )
    return listed


def _as_schedule(schedule: Any, function: str) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"`{function}` takes a schedule.", found=typed(schedule), write=f"{function}(every(100), ...)"
        )
    return schedule


def _as_positive(value: Any, name: str) -> int:
    number = as_int(value, f"`{name}`", f"{name}=100")
    if number < 1:
        raise ScheduleError(f"`{name}` must be at least 1.", found=number, write=f"{name}=100")
    return number


def _as_number(value: Any, what: str, write: str) -> Fraction:
    """`value` as the simplest fraction that it stands for: 0.1 is a tenth, though no float is."""
    if not is_finite(value):
        raise ScheduleError(f"{what} must be a finite number.", found=typed(value), write=write)
    if value < 0:
        raise ScheduleError(f"{what} is negative.", found=value, write=write)
    exact = value if isinstance(value, numbers.Rational) else float(value)
    return Fraction(exact) if isinstance(exact, numbers.Rational) else Fraction(exact).limit_denominator(10**9)


def _as_fraction(value: Any, function: str) -> Fraction:
    write = f"{function}(0.5, num_steps=...)"
    fraction = _as_number(value, f"A fraction of `{function}`", write)
    if fraction > 1:
        raise ScheduleError(f"A fraction of `{function}` is more than the whole run.", found=value, write=write)
    return fraction
