"""When a hook is due: immutable values that answer a pure question, on the host and inside `jax.jit`.

What values of the train loop decide, metrics and counters, is a schedule too; see `watched_schedules`.

A step is always the value that `state.step` holds: train steps applied so far. Step 0 is before training: `at(0)` fires
in `state = hooks(0, state)`, called before the first train step; a loop that begins to call the hooks at step 1 has
passed it, and is warned.

Under `optax.MultiSteps`, `state.step` still counts train steps, which are micro-steps: with `every_k_schedule=k` the
parameters change at every k-th of them only. A schedule in optimizer updates is thus `every(n * k)`, or
`derived_schedules.every_updates(n, micro_steps=k)`; at its steps, no accumulated gradient waits.
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import ScheduleError, StepError, quoted, shorten, typed

if TYPE_CHECKING:
    from flax_surgery_hooks.watched_schedules import Watched


LARGEST_BITS = 256
"""Of an integer in a schedule: no step comes near, and its digits can still be printed."""


MOST_WALKED = 1_000_000
"""How many due steps of a union are looked at one by one: some seconds."""


class Schedule(abc.ABC):
    """A set of steps, made by `at`, `every`, `|`, `max_fires` and the functions of `derived_schedules`. Or one that
    only the run will tell, by `on_metric`, `every_count` and `at_count`: to ask those for their steps is an error.

    A schedule remembers nothing: asked twice, it answers the same. A subclass gives `_next` and `_traced_is_due`, and
    equality and hash by value; everything else follows.
    """

    @abc.abstractmethod
    def _next(self, step: int) -> int | None:
        """`next_step` of a step that is known to be an int."""

    @abc.abstractmethod
    def _traced_is_due(self, step: jax.Array) -> jax.Array:
        """`is_due` of an array that is known to hold integers, elementwise, in `jnp` operations only."""

    def next_step(self, step: int) -> int | None:
        """The first due step strictly after `step`, or None if there is none. `next_step(-1)` is the first of all.

        Raises:
          StepError: `step` is not an integer.

        >>> every(200, start=100).next_step(100)
        300
        """
        return self._next(_as_step(step))

    @overload
    def is_due(self, step: jax.Array) -> jax.Array: ...

    @overload
    def is_due(self, step: int) -> bool: ...

    def is_due(self, step: int | jax.Array) -> bool | jax.Array:
        """Whether `step` is due: a bool for an int, a boolean array of the same shape for a (traced) integer array.

        Raises:
          StepError: `step` is neither an integer nor a JAX array of integers.

        >>> every(10).is_due(20), every(10).is_due(25)
        (True, False)
        >>> jax.jit(every(10).is_due)(20)
        Array(True, dtype=bool)
        """
        if not isinstance(step, jax.Array):
            step = _as_step(step)
            return self._next(step - 1) == step
        if not jnp.issubdtype(step.dtype, jnp.integer):
            raise StepError("A traced step must be an array of integers.", found=step, write="is_due(state.step)")
        return self._traced_is_due(step)

    def due_steps(self, after: int, upto: int) -> Iterator[int]:
        """The due steps in (after, upto], in order.

        Raises:
          StepError: `after` or `upto` is not an integer.

        >>> list((at(5) | every(10)).due_steps(5, 30))
        [10, 20, 30]
        """
        return self._walk(_as_step(after), _as_step(upto))

    def max_fires(self, k: int) -> Schedule:
        """The first `k` due steps of this schedule.

        For a union this walks over those `k` steps once, when called, and clips its parts to the last of them.

        Raises:
          ScheduleError: `k` is not a positive integer.

        >>> every(10).max_fires(3)
        every(10, stop=30)
        >>> (at(5) | every(10)).max_fires(3)
        at(5) | every(10, stop=20)
        """
        last = self._nth_step(_as_max_fires(k))
        clipped = None if last is None else self._until(last)
        return self if clipped is None else clipped

    @property
    def planned(self) -> Schedule | None:
        """That part of it whose due steps are known in advance, or None: all of it, unless values decide."""
        return self

    @property
    def watched(self) -> tuple[Watched, ...]:
        """Those parts of it that values decide while the model trains."""
        return ()

    def __or__(self, other: object) -> Schedule:
        return _union(self, other, written=other)

    def __ror__(self, other: object) -> Schedule:
        return _union(other, self, written=other)

    def _walk(self, after: int, upto: int) -> Iterator[int]:
        step = self._next(after)
        while step is not None and step <= upto:
            yield step
            step = self._next(step)

    def _nth_step(self, k: int) -> int | None:
        """The k-th due step, counted from 1, or None if there are fewer."""
        step = self._next(-1)
        for number in range(k - 1):
            if step is None:
                break
            if number == MOST_WALKED:
                raise ScheduleError(
                    "`max_fires` walks over the due steps of such a schedule, and these are too many.",
                    found=f"{k} of {self}",
                    write=f"max_fires={MOST_WALKED} or less, or the `stop` of its parts",
                )
            step = self._next(step)
        return step

    def _until(self, stop: int) -> Schedule | None:
        """This schedule without what comes after `stop`, or None if nothing remains."""
        steps = tuple(self._walk(-1, stop))
        return At(steps) if steps else None


@dataclasses.dataclass(frozen=True, repr=False)
class At(Schedule):
    """Due at the steps listed; see `at`."""

    steps: tuple[int, ...]

    def __post_init__(self):
        if not self.steps:
            raise ScheduleError("A schedule without steps is never due.", found="at()", write="at(100)")
        steps = sorted({as_int(step, "A step of `at`", _unpacked(step)) for step in self.steps})
        if steps[0] < 0:
            raise ScheduleError("A step of `at` is negative.", found=steps[0], write="at(0) or later steps")
        object.__setattr__(self, "steps", tuple(steps))

    def _next(self, step: int) -> int | None:
        index = bisect.bisect_right(self.steps, step)
        return self.steps[index] if index < len(self.steps) else None

    def _traced_is_due(self, step: jax.Array) -> jax.Array:
        # A step that the dtype cannot hold is one that this array can never reach; comparing with it would overflow.
        reachable = [due for due in self.steps if due <= jnp.iinfo(step.dtype).max]
        if not reachable:
            return jnp.zeros_like(step, dtype=bool)
        due = jnp.asarray(reachable, step.dtype).reshape((1,) * step.ndim + (-1,))
        return (step[..., None] == due).any(-1)

    def _nth_step(self, k: int) -> int | None:
        return self.steps[k - 1] if k <= len(self.steps) else None

    def __repr__(self) -> str:
        return f"at({', '.join(map(str, self.steps))})"


@dataclasses.dataclass(frozen=True, repr=False)
class Every(Schedule):
    """Due periodically; see `every`."""

    n: int
    start: int = 0
    stop: int | None = None

    def __post_init__(self):
        n = as_int(self.n, "`n` of `every`", "every(100)")
        if n < 1:
            raise ScheduleError("`n` of `every` must be at least 1.", found=n, write="every(100)")
        start = _as_bound(self.start, "start", n)
        stop = None if self.stop is None else _as_bound(self.stop, "stop", n)
        for name, value in {"n": n, "start": start, "stop": stop}.items():
            object.__setattr__(self, name, value)
        if stop is not None and stop < start:
            raise ScheduleError(
                "`stop` of `every` comes before `start`, so that it is never due.",
                found=self,
                write=f"every({n}, start={start}, stop={start + n})",
            )
        if stop is not None and stop < self.first:
            raise ScheduleError(
                f"`every` is never due: without `start`, its first due step would be {self.first}, after `stop`.",
                found=self,
                write=f"every({n}, stop={n}) or a later stop, or at({stop})",
            )

    @property
    def first(self) -> int:
        """The first due step: never 0, where nothing has been trained yet."""
        return self.start or self.n

    def _next(self, step: int) -> int | None:
        due = self.first if step < self.first else step + self.n - (step - self.first) % self.n
        return due if self.stop is None or due <= self.stop else None

    def _traced_is_due(self, step: jax.Array) -> jax.Array:
        highest = int(jnp.iinfo(step.dtype).max)
        as_step = step.dtype.type  # JAX takes a bare Python int for an int32, whatever it is compared with
        if self.first > highest:
            return jnp.zeros_like(step, dtype=bool)
        since = step - as_step(self.first)
        # A period that the dtype cannot hold leaves only the first due step within reach.
        on_beat = since % as_step(self.n) == 0 if self.n <= highest else since == 0
        last = highest if self.stop is None else min(self.stop, highest)
        # Below `first` the difference may wrap around; the first comparison masks that out.
        return (step >= as_step(self.first)) & (step <= as_step(last)) & on_beat

    def _nth_step(self, k: int) -> int | None:
        due = self.first + (k - 1) * self.n
        return due if self.stop is None or due <= self.stop else None

    def _until(self, stop: int) -> Schedule | None:
        if stop < self.first:
            return None
        return dataclasses.replace(self, stop=stop if self.stop is None else min(self.stop, stop))

    def __repr__(self) -> str:
        bounds = {"start": self.start or None, "stop": self.stop}
        written = [f"{name}={value}" for name, value in bounds.items() if value is not None]
        return f"every({', '.join([str(self.n), *written])})"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class AnyOf(Schedule):
    """Due when any of its parts is; made by `|`. The order of the parts is only how it is shown."""

    parts: tuple[Schedule, ...]

    def _next(self, step: int) -> int | None:
        return min((due for part in self.parts if (due := part._next(step)) is not None), default=None)

    def _traced_is_due(self, step: jax.Array) -> jax.Array:
        return functools.reduce(operator.or_, (part._traced_is_due(step) for part in self.parts))

    def _until(self, stop: int) -> Schedule | None:
        return joined(clipped for part in self.parts if (clipped := part._until(stop)) is not None)

    @property
    def planned(self) -> Schedule | None:
        """The union of the parts whose due steps are known in advance, or None."""
        parts = [part for part in self.parts if not part.watched]
        return joined(parts) if parts else None

    @property
    def watched(self) -> tuple[Watched, ...]:
        """Those of the parts that values decide."""
        return tuple(inner for part in self.parts for inner in part.watched)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyOf) and frozenset(self.parts) == frozenset(other.parts)

    def __hash__(self) -> int:
        return hash(frozenset(self.parts))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


def at(*steps: int) -> Schedule:
    """Due at the given steps; duplicates collapse, and step 0 (nothing trained yet: `hooks(0, state)`) is allowed.

    Args:
      *steps: values of `state.step`.

    Raises:
      ScheduleError: no step at all, or one that is negative or not an integer.

    >>> at(200, 100, 200)
    at(100, 200)
    """
    return At(steps)


def every(
    n: int, start: int = 0, stop: int | None = None, max_fires: int | None = None, phase: int | None = None
) -> Schedule:
    """Due at n, 2n, 3n, ... (never at step 0), or with a `start` at start, start + n, start + 2n, ...

    Args:
      n: train steps from one due step to the next.
      start: if not 0, the first due step; with a `phase`, no step before this one is due.
      stop: no step after this one is due; itself it may be.
      max_fires: how many due steps there are at most.
      phase: if given, due steps are those that leave this remainder when divided by n, wherever `start` is.

    Raises:
      ScheduleError: an argument is negative or not an integer, `phase` is not below n, or the schedule would never be
        due.

    >>> list(every(200, start=100, stop=900).due_steps(0, 10_000))
    [100, 300, 500, 700, 900]
    >>> list(every(200, phase=50, start=1_000).due_steps(0, 1_500))
    [1050, 1250, 1450]
    """
    schedule = Every(n, start, stop) if phase is None else _in_phase(n, start, stop, phase)
    return schedule if max_fires is None else schedule.max_fires(max_fires)


def _in_phase(n: int, start: int, stop: int | None, phase: int) -> Every:
    free = Every(n, start)  # checks both; `stop` may come before its first due step, and not before ours
    remainder = as_int(phase, "`phase` of `every`", f"every({free.n}, phase={free.n // 2})")
    if not 0 <= remainder < free.n:
        raise ScheduleError(
            "`phase` of `every` is a remainder of division by `n`.",
            found=f"{remainder} for n={free.n}",
            write=f"every({free.n}, phase={remainder % free.n})",
        )
    earliest = max(free.start, 1)
    first = earliest + (remainder - earliest) % free.n
    return Every(free.n, 0 if first == free.n else first, stop)


def _union(left: object, right: object, *, written: object) -> Schedule:
    if not isinstance(left, Schedule) or not isinstance(right, Schedule):
        is_step = isinstance(written, int) and not isinstance(written, bool)
        raise ScheduleError(
            "`|` joins two schedules, and one side is not a schedule.",
            found=typed(written),
            write=f"... | at({written})" if is_step else "at(100) | every(1000)",
        )
    return joined((left, right))


def joined(parts: Iterable[Schedule]) -> Schedule:
    """The flat union of one or more schedules, in which all `At` are one and nothing stands twice."""
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, AnyOf) else (part,))]
    listed = [step for part in flat if isinstance(part, At) for step in part.steps]
    # The one `At` replaces each of the old ones, and dict keys keep the first of equals.
    unique = dict.fromkeys(At(tuple(listed)) if isinstance(part, At) else part for part in flat)
    return next(iter(unique)) if len(unique) == 1 else AnyOf(tuple(unique))


def as_int(value: Any, what: str, write: str) -> int:
    """`value` as an int: numpy integers are welcome; bools, floats and traced values are not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ScheduleError(f"{what} must be an integer.", found=typed(value), write=write) from None
    if number.bit_length() > LARGEST_BITS:
        raise ScheduleError(f"{what} is larger than any run.", found=quoted(value, 80), write=write)
    return number


def is_finite(value: Any) -> bool:
    """Whether `value` is a real number, no bool, that a float can stand for.

    >>> is_finite(0.5), is_finite(10**400), is_finite(True)
    (True, False, False)
    """
    try:
        return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:
        return False


def _as_bound(value: Any, name: str, n: int) -> int:
    bound = as_int(value, f"`{name}` of `every`", f"every({n}, {name}=1000)")
    if bound < 0:
        raise ScheduleError(f"`{name}` of `every` is negative.", found=bound, write=f"every({n}, {name}=1000)")
    return bound


def _as_max_fires(value: Any) -> int:
    k = as_int(value, "`max_fires`", "max_fires=1 or more")
    if k < 1:
        raise ScheduleError("`max_fires` below 1 makes a schedule that is never due.", found=k, write="max_fires=1")
    return k


def _unpacked(steps: Any) -> str:
    """What to write instead of `at(steps)` when `steps` is not an integer."""
    if isinstance(steps, list | tuple):
        return f"at({shorten(', '.join(map(str, steps)), 80)})"
    return "at(100, 200)"


def _as_step(step: Any) -> int:
    """`step` as an int. A traced step cannot be one: `is_due` alone works inside `jax.jit`."""
    try:
        if isinstance(step, bool):
            raise TypeError
        return operator.index(step)
    except TypeError:
        raise StepError(
            "A step must be an integer: how many train steps have been applied.",
            found=typed(step),
            write="is_due(state.step)" if isinstance(step, jax.Array) else "int(step)",
        ) from None
