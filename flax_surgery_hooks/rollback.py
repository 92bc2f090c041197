"""What a hook keeps of the state before its fires, for how long, and which metric puts it back."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

from flax_surgery_hooks.errors import HookError, typed
from flax_surgery_hooks.watched_schedules import LAG, Trigger, Watched

PLACES = ("device", "host")


@dataclass(frozen=True)
class Rollback:
    """Keeps what a fire touched as it was before, for some steps, and puts it back if a metric leaves a band.

    Kept are the leaves that the hook edits, their optimizer slots, and what the surgery remembers of them; no others.
    They are put back as they were, bit for bit, and all else stays as it is then: the train steps between the fire and
    the rollback are undone for these leaves alone. `hooks.undo(state)` does the same by hand.

    The metric is looked up in the trainer's `metrics` as for `on_metric`, and read `lag` steps later, without waiting
    for the device. Values of the steps after the fire count, as far as they are read before `steps` steps are over.

    Attributes:
      steps: how many steps after a fire its old values are kept.
      metric: which metric, `"loss"` or `"train/loss"`; None keeps for `undo` alone.
      above: upper end of the band: a larger value leaves it.
      below: lower end: a smaller value leaves it. A value that is not finite leaves every band, also one without ends.
      patience: how many values in a row must lie outside.
      lag: how many steps after its own a value is read.
      to: where they are kept: "device", the very arrays that the state held, with no copy; or "host", for which a fire
        waits until they are there.

    Raises:
      HookError: a value that is not one of these.

    >>> Rollback(200, metric="loss", above=5.0).patience
    1
    """

    steps: int
    metric: str | None = None
    above: float | None = None
    below: float | None = None
    patience: int = 1
    lag: int = LAG
    to: str = "device"

    def __post_init__(self) -> None:
        for name, lowest in (("steps", 1), ("patience", 1), ("lag", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise HookError(
                    f"`{name}` of `Rollback` is a number of steps or values, at least {lowest}.",
                    found=typed(value),
                    write=f"{name}={max(lowest, 4)}",
                )
        if self.to not in PLACES:
            raise HookError(
                "`to` of `Rollback` says where leaves are kept.", found=repr(self.to), write="to='device' or to='host'"
            )
        self._check_band()

    def _check_band(self) -> None:
        bounds = {name: getattr(self, name) for name in ("above", "below") if getattr(self, name) is not None}
        for name, value in bounds.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise HookError(
                    f"`{name}` of `Rollback` must be a finite number.", found=typed(value), write=f"{name}=5.0"
                )
            object.__setattr__(self, name, float(value))
        if self.metric is None and not bounds:
            return
        if not isinstance(self.metric, str) or not self.metric:
            raise HookError(
                "The band of `Rollback` is one of a metric, which needs a name.",
                found=f"metric={self.metric!r}",
                write="Rollback(200, metric='loss', above=5.0)",
            )
        if len(bounds) == 2 and not self.below < self.above:  # type: ignore[operator]  # both are set
            raise HookError(
                "The band of `Rollback` is empty.",
                found=f"from {self.below} to {self.above}",
                write="below= less than above=",
            )
        if self.steps < self.lag + self.patience:
            raise HookError(
                "The metric of `Rollback` would be read only after the leaves are let go.",
                found=f"steps={self.steps}, lag={self.lag}, patience={self.patience}",
                write="steps= of at least lag + patience",
            )

    @property
    def band(self) -> bool:
        """Whether a metric can put back what is kept."""
        return self.metric is not None


class BandState(NamedTuple):
    """What a band has seen: how many values in a row lay outside."""

    run: int = 0


@dataclass(frozen=True)
class Band(Watched):
    """Due when the metric of a rollback has left its band after a fire.

    Attributes:
      rollback: whose band.
      after: values of later steps count.
    """

    rollback: Rollback
    after: int

    integral = False

    @property
    def lag(self) -> int:  # type: ignore[override]  # nobody sets it
        """How many steps after its own a value is read."""
        return self.rollback.lag

    @property
    def source(self) -> tuple[str, str]:
        """The metric, in the trainer's `metrics`."""
        return ("metrics", self.rollback.metric or "")

    def begin(self) -> BandState:
        """The state before anything was observed."""
        return BandState()

    def is_done(self, state: BandState) -> bool:
        """Never: who watches a band stops watching it."""
        return False

    def observe(
        self, state: BandState, step: int, value: float, now: int | None = None
    ) -> tuple[BandState, Trigger | None]:
        """As for `Watched`.

        >>> band = Band(Rollback(200, metric="loss", above=5.0, patience=2), after=10)
        >>> state, trigger = band.observe(band.begin(), 11, 7.0)
        >>> band.observe(state, 12, 6.0)[1].limit
        5.0
        """
        if step <= self.after:
            return state, None
        outside, limit = self._judged(value)
        run = state.run + 1 if outside else 0
        if run < self.rollback.patience:
            return BandState(run), None
        return BandState(), Trigger(repr(self.rollback), step, value, limit)

    def _judged(self, value: float) -> tuple[bool, float | None]:
        """Whether a value lies outside, and of which end."""
        above, below = self.rollback.above, self.rollback.below
        if above is not None and value > above:
            return True, above
        if below is not None and value < below:
            return True, below
        return not math.isfinite(value), None
