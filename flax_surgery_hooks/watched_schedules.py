"""Schedules that values decide while the model trains: what they have in common. The runner's half is `watching`."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax

from flax_surgery_hooks.errors import ScheduleError, shorten, typed
from flax_surgery_hooks.schedules import Schedule, as_int

LAG = 4
"""How many steps later a value is read, if nothing else is said: as many as figures of a fire wait."""

_State = TypeVar("_State", bound=tuple)


class Trigger(NamedTuple):
    """Why a hook was due: the value that decided it.

    Attributes:
      schedule: the schedule, as it is written.
      step: the step whose value it was; the fire comes some steps later.
      value: the metric or the counter.
      limit: what it is beyond: the threshold, the bound of a spike, what a plateau did not get beyond, or the last due
        count.
      average: the running average before a spike; that which is looked at in place of the value, where one is.
      crossed: how many due counts the counter passed at once; None for a metric.
    """

    schedule: str
    step: int
    value: float
    limit: float | None = None
    average: float | None = None
    crossed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are set, as strict JSON holds them.

        >>> Trigger("on_metric('loss', spike=3.0)", 104, float("inf"), 2.5).to_json()
        {'schedule': "on_metric('loss', spike=3.0)", 'step': 104, 'value': 'inf', 'limit': 2.5}
        """
        return {name: number_to_json(value) for name, value in self._asdict().items() if value is not None}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Trigger:
        """The trigger that `to_json` told of."""
        numbers = {name: number_from_json(value) for name, value in saved.items() if name != "schedule"}
        return cls(schedule=saved["schedule"], **numbers)


class Watched(Schedule):
    """A schedule decided by one value of the trainer's inputs, in pure steps of a state apart from it.

    The schedule itself is an immutable value; what it has seen is a NamedTuple of numbers that `begin` makes and
    `observe` maps to the next one, so that the same values give the same fires on every process and after a resume.

    Attributes:
      lag: how many steps after its own a value is read.
      integral: whether the value is an integer.
    """

    lag: int
    integral: ClassVar[bool]

    @property
    @abc.abstractmethod
    def source(self) -> tuple[str, str]:
        """Where the value stands: the name of the trainer's input, and the `/`-joined path in it ("" for itself)."""

    @abc.abstractmethod
    def begin(self) -> Any:
        """The state before anything was observed."""

    @abc.abstractmethod
    def observe(self, state: Any, step: int, value: Any, now: int | None = None) -> tuple[Any, Trigger | None]:
        """The state after one more value, and why the schedule is due, if it is.

        Args:
          state: what `begin` or `observe` returned.
          step: the step of the value.
          value: a Python number.
          now: the step at which it is read, which is where the fire will be; by default `step + lag`.
        """

    @abc.abstractmethod
    def is_done(self, state: Any) -> bool:
        """Whether it can never be due again."""

    def past(self, first: Any) -> str:
        """What it will never be due for, as the first value shows; "" if nothing."""
        return ""

    @property
    def planned(self) -> None:
        """Nothing: no due step is known in advance."""

    @property
    def watched(self) -> tuple[Watched, ...]:
        """Itself."""
        return (self,)

    def state_from_json(self, saved: Any) -> Any:
        """The state of which `saved` is `state._asdict()`.

        Raises:
          ScheduleError: it is not.
        """
        return _state_from_json(type(self.begin()), saved, self)

    def _next(self, step: int) -> int | None:
        raise ScheduleError(
            "Its due steps are not known in advance: values that the train loop passes decide while it runs.",
            found=self,
            write="`when=` of a hook that is called on the host, `max_fires=` in the schedule itself, or at and every",
        )

    def _traced_is_due(self, step: jax.Array) -> jax.Array:
        raise ScheduleError(
            "It is decided by values that the host reads some steps later, so there is no in-graph form of it.",
            found=self,
            write="the host form, state = hooks(step, state, ...) outside of the jitted step, or at and every",
        )


def number_to_json(value: Any) -> Any:
    """`value`, a non-finite float by name: strict JSON has none.

    >>> number_to_json(float("nan")), number_to_json(2.5)
    ('nan', 2.5)
    """
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number_from_json(value: Any) -> Any:
    """The inverse of `number_to_json`."""
    return float(value) if isinstance(value, str) else value


def _state_from_json(kind: type[_State], saved: Any, schedule: Watched) -> _State:
    blank = schedule.begin()._asdict()
    if not isinstance(saved, Mapping) or saved.keys() != blank.keys() or not all(map(_is_plain, saved.values())):
        raise ScheduleError(
            f"This is not the saved state of {schedule!r}.",
            found=shorten(saved, 150),
            write=f"numbers under {', '.join(blank)}",
        )
    return kind(**saved)


def _is_plain(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def as_at_least(value: Any, lowest: int, what: str, write: str) -> int:
    """`value` as an int of at least `lowest`.

    Raises:
      ScheduleError: it is none.
    """
    number = as_int(value, what, write)
    if number < lowest:
        raise ScheduleError(f"{what} must be at least {lowest}.", found=number, write=write)
    return number


def as_name(value: Any, what: str, write: str) -> str:
    """`value` if it is a non-empty string.

    Raises:
      ScheduleError: it is none.
    """
    if not isinstance(value, str) or not value:
        raise ScheduleError(f"{what} must be a name.", found=typed(value), write=write)
    return value
