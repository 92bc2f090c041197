"""What a ledger says, for people: one row for each fire, and whatever else was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.tables import aligned

HEAD = ("Step", "Hook", "Event", "Leaves", "Rule", "Params changed", "Optimizer changed", "Seconds")
RIGHT = (0, 5, 6, 7)
DONE = ("settled",)
"""What becomes of a fire where all is well."""
OUTSIDE = ("run",)
"""Events that no row is about."""
SHOWN = 3


@dataclass(frozen=True)
class Line:
    """A fire, or another event of a hook.

    Attributes:
      step: what `state.step` held.
      hook: its name.
      event: "fired", which stands for a fire whose figures are known too; "fired, not settled" where the run ended
        before they were; else what the record says, such as "refused".
      session: number of the session of hooks, counted from 1.
      leaves: the leaves.
      added: those of them that the edit added.
      removed: leaves that it took away.
      rule: how optimizer slots followed.
      params_change: relative change of the leaves, None if it is not known.
      slots_change: that of their optimizer slots.
      seconds: host time of the fire.
      passed: due steps before it for which it stands; or which were missed.
    """

    step: int | None
    hook: str
    event: str
    session: int
    leaves: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    rule: str
    params_change: float | None
    slots_change: float | None
    seconds: float | None
    passed: tuple[int, ...]

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        leaves = self.leaves[0] if len(self.leaves) == 1 else f"{len(self.leaves)} leaves" if self.leaves else "-"
        marks = [f"{sign}{len(paths)}" for sign, paths in (("+", self.added), ("-", self.removed)) if paths]
        return (
            "-" if self.step is None else str(self.step),
            self.hook,
            self._told(),
            " ".join([leaves, *marks]),
            self.rule or "-",
            _number(self.params_change),
            _number(self.slots_change),
            "-" if self.seconds is None else f"{self.seconds:.3f}",
        )

    def _told(self) -> str:
        steps = ", ".join(map(str, self.passed[:SHOWN])) + (" ..." if len(self.passed) > SHOWN else "")
        if not steps:
            return self.event
        return f"{self.event} {steps}" if self.event == "passed" else f"{self.event}, also for {steps}"


def lines(records: Sequence[Record]) -> list[Line]:
    """The fires and other events of a ledger, in order; a fire and what became of it are one.

    >>> fired = Record(event="fired", step=5, hook="halve", id=0, paths=("w",), seconds=0.25)
    >>> settled = Record(event="settled", step=5, hook="halve", id=0, figures={"params/relative_change": 0.5})
    >>> [(line.event, line.params_change, line.seconds) for line in lines([Record(event="run"), fired, settled])]
    [('fired', 0.5, 0.25)]
    """
    found: list[list[Any]] = []
    place: dict[Any, int] = {}
    session = 0
    for record in records:
        if record.event in OUTSIDE:
            session += 1
            continue
        key = (session, record.id)
        if record.id is not None and record.event != "fired" and key in place:
            found[place[key]][2] = record
            continue
        if record.id is not None:
            place[key] = len(found)
        found.append([session, record, None])
    return [_line(session, first, after) for session, first, after in found]


def _line(session: int, first: Record, after: Record | None) -> Line:
    event = first.event
    if event == "fired" and after is None:
        event = "fired, not settled"
    elif after is not None and after.event not in DONE:
        event = after.event
    figures = (after or first).figures
    return Line(
        step=first.step,
        hook=first.hook,
        event=event,
        session=session,
        leaves=first.paths,
        added=first.added,
        removed=first.removed,
        rule=first.rule,
        params_change=_finite(figures.get("params/relative_change")),
        slots_change=_finite(figures.get("slots/relative_change")),
        seconds=first.seconds if first.paths else None,
        passed=first.passed,
    )


def table(found: Sequence[Line]) -> str:
    """All lines as a table, and how many fires there are.

    >>> print(table([]))
    Nothing has fired.
    """
    if not found:
        return "Nothing has fired."
    fires = sum(line.event.startswith("fired") for line in found)
    sessions = len({line.session for line in found})
    head = f"{fires} fires by {len({line.hook for line in found})} hooks" + (
        f" in {sessions} sessions" if sessions > 1 else ""
    )
    return "\n".join([head, aligned(HEAD, [line.cells() for line in found], right=RIGHT)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _finite(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and abs(number) < float("inf") else None
