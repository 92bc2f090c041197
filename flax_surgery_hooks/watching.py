"""The runner's half of schedules that values decide: taking values in, reading them later, saying what is due.

While such a hook may still fire, a call at which nothing is due puts one value aside and reads one that is old enough.
For each schedule that is 2 to 5 us a call if the value is a Python number, and about 10 us if it is an array: measured
on two busy CPU cores; an array on another device is copied to the host besides, in the background. Hooks without such
schedules pay nothing.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from flax_surgery_hooks.errors import ScheduleError, SurgeryError, located, shorten
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.watched_schedules import Trigger, Watched, number_from_json, number_to_json
from flax_surgery_hooks.watched_values import Site, found, read, site, taken

WATCHING = 0
"""The wake of hooks that look at values: below every step, so that no call is idle, and not that of those unchecked."""


class Watch:
    """One watched schedule of one hook: what it has seen, and the values that it has still to read."""

    __slots__ = ("_blank", "_hook", "_path", "_queue", "_schedule", "_taken", "state")

    def __init__(self, hook: str, schedule: Watched):
        self._hook = hook
        self._schedule = schedule
        self._path = "/".join(filter(None, schedule.source))
        self._queue: collections.deque[tuple[int, int, Any]] = collections.deque()
        self._taken = -1
        self.state = self._blank = schedule.begin()

    @property
    def is_done(self) -> bool:
        """Whether the hook can never be due again by this schedule."""
        return self._schedule.is_done(self.state)

    def step(self, step: int, inputs: Mapping[str, Any], where: Site) -> tuple[Trigger, ...]:
        """Takes the value of this step in, once, and reads those that are old enough.

        Raises:
          InputError: the value is missing, or not what it must be.
        """
        schedule, queue = self._schedule, self._queue
        if step != self._taken:
            self._take(step, inputs, where)
        triggers: tuple[Trigger, ...] = ()
        while queue and queue[0][0] <= step:
            _, of, value = queue[0]
            if type(value) is not float:
                value = read(value, self._path, integral=schedule.integral, where=where)
            if self.state == self._blank and (past := schedule.past(value)):
                told = (self._hook, past, self._path)
                logging.warning("Hook %s was due at %s of %s, before the first call: taken as past.", *told)
            self.state, trigger = schedule.observe(self.state, of, value, step)
            queue.popleft()
            if trigger is not None:
                triggers = (*triggers, trigger)
                if self.is_done:
                    queue.clear()
        return triggers

    def _take(self, step: int, inputs: Mapping[str, Any], where: Site) -> None:
        """Puts the value of this step aside, if there is one."""
        integral, (name, path) = self._schedule.integral, self._schedule.source
        try:
            value = inputs[name][path] if path else inputs[name]
        except Exception:
            value = found(inputs, self._schedule.source)
        if value is not None:
            if type(value) is not (int if integral else float) or (where.processes > 1 and not integral):
                value = taken(value, self._path, integral=integral, where=where)
            # A counter that the host knows is not waited for.
            at_once = integral and type(value) is int
            self._queue.append((step if at_once else step + self._schedule.lag, step, value))
        self._taken = step

    def to_json(self) -> dict[str, Any]:
        """What it has seen and what it has still to read, which waits for the device."""
        integral, where = self._schedule.integral, site()
        waiting = [(due, of, read(value, self._path, integral=integral, where=where)) for due, of, value in self._queue]
        return {
            "schedule": repr(self._schedule),
            "state": self.state._asdict(),
            "waiting": [[due, of, number_to_json(value)] for due, of, value in waiting],
        }

    def from_json(self, saved: Mapping[str, Any]) -> None:
        """Goes on where `to_json` was called.

        Raises:
          ScheduleError: `saved` is no such thing.
        """
        try:
            waiting = [(int(due), int(of), number_from_json(value)) for due, of, value in saved["waiting"]]
            state = saved["state"]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ScheduleError(
                f"This is not what was saved of {self._schedule!r}.",
                hook=self._hook,
                found=shorten(saved, 150),
                write="what `to_json` returned",
            ) from None
        with located(hook=self._hook):
            self.state = self._schedule.state_from_json(state)
        self._queue = collections.deque(waiting)


class Watching:
    """All watched schedules of hooks, and which hooks they make due.

    Attributes:
      wake: the step at which a call has something else to do than to look at values.
    """

    __slots__ = ("_active", "_site", "_triggers", "_watches", "wake")

    def __init__(self) -> None:
        self._watches: dict[str, list[Watch]] = {}
        self._active: list[tuple[str, Watch]] = []
        self._triggers: dict[str, tuple[Trigger, ...]] = {}
        self._site: Site | None = None
        self.wake = -1

    def add(self, hook: str, when: Schedule) -> None:
        """Watches the schedules of a hook."""
        if when.watched:
            self._watches[hook] = [Watch(hook, schedule) for schedule in when.watched]
        self._refresh()

    def remove(self, hook: str) -> None:
        """Forgets a hook."""
        self._watches.pop(hook, None)
        self._triggers.pop(hook, None)
        self._refresh()

    def _refresh(self) -> None:
        self._active = [(hook, one) for hook, watches in self._watches.items() for one in watches if not one.is_done]

    def held(self, wake: int) -> int:
        """The wake of the hooks, of which `wake` is what else there is to do: `WATCHING` while values decide."""
        self._refresh()
        self.wake = wake
        return WATCHING if self._active else wake

    def passes(self, step: Any, last: int, inputs: Mapping[str, Any]) -> bool:
        """Looks at the values of a call that has nothing else to do; whether they make nothing due either.

        Raises:
          InputError: as for `look`.
        """
        if type(step) is not int or not last < step < self.wake:
            return False
        self.look(step, inputs)
        return not self._triggers

    def look(self, step: int, inputs: Mapping[str, Any]) -> None:
        """Takes in the values of this step, once, and reads those that are old enough.

        Raises:
          InputError: a value is missing, no real scalar, or may differ between processes.
        """
        if not self._active:
            return
        where = self._site = self._site or site()
        for hook, watch in self._active:
            try:
                triggers = watch.step(step, inputs, where)
            except SurgeryError:  # in place of a `with` around it, which would cost every call
                with located(hook=hook, step=step):
                    raise
            if triggers:
                self._triggers[hook] = (*self._triggers.get(hook, ()), *triggers)

    def triggers(self, hook: str) -> tuple[Trigger, ...]:
        """Why a hook is due, if values say that it is."""
        return self._triggers.get(hook, ())

    def clear(self) -> None:
        """Says that all hooks that were due have fired."""
        self._triggers = {}

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """What all schedules have seen, by hook, as JSON holds it; waits for the values that are not read yet."""
        return {hook: [watch.to_json() for watch in watches] for hook, watches in self._watches.items()}

    def from_json(self, saved: Mapping[str, list[Mapping[str, Any]]]) -> None:
        """Goes on where `to_json` was called. A schedule that was not there then begins anew, and is logged.

        Raises:
          ScheduleError: `saved` is no such thing.
        """
        for hook, watch in self._all():
            written = repr(watch._schedule)
            held = next((one for one in saved.get(hook, ()) if one.get("schedule") == written), None)
            if held is None:
                logging.warning("Hook %s begins to watch %s anew: nothing was saved of it.", hook, written)
            else:
                watch.from_json(held)
        self._refresh()

    def _all(self) -> Iterator[tuple[str, Watch]]:
        yield from ((hook, watch) for hook, watches in self._watches.items() for watch in watches)
