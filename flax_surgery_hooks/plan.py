"""What hooks would do to a state: which fire, at which steps, on which leaves and slots, with which shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax_surgery_hooks.registration import check_known
from flax_surgery_hooks.tables import aligned

SHOWN = 3
"""How many leaves, or changes of shape, a row of the table names."""
HEAD = ("Steps", "Hook", "Fires", "Leaves", "Slots", "Rule", "Changes of shape", "Parameters")


@dataclass(frozen=True)
class Shape:
    """Shape and dtype of an array.

    >>> print(Shape((4, 8), "float32"))
    float32[4,8]
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class PlannedSlot:
    """An optimizer slot of a leaf.

    Attributes:
      name: class and field of the state that holds it, such as "ScaleByAdamState.mu".
      kind: what it holds, see `rules.KINDS`.
      rule: how it follows the edit.
      before: what it is before a fire; None for the slot of an added leaf.
      after: what it is after it; None for that of a removed one.
    """

    name: str
    kind: str
    rule: str
    before: Shape | None
    after: Shape | None


@dataclass(frozen=True)
class PlannedLeaf:
    """A leaf that a fire edits.

    Attributes:
      path: its path.
      before: what it is before a fire; None where the edit adds it.
      after: what it is after it; None where the edit removes it.
      slots: its optimizer slots; none where all are kept as they are.
    """

    path: str
    before: Shape | None
    after: Shape | None
    slots: tuple[PlannedSlot, ...] = ()

    @property
    def change(self) -> str:
        """What becomes of its shape, "" if nothing.

        >>> PlannedLeaf("w", Shape((4,), "float32"), Shape((8,), "float32")).change
        'w [4] -> [8]'
        """
        if self.before is None or self.after is None:
            held = self.before or self.after
            return f"{self.path} {'added' if self.before is None else 'removed'} {_bare(held)}"
        if self.before.shape == self.after.shape:
            return ""
        return f"{self.path} {_bare(self.before)} -> {_bare(self.after)}"


@dataclass(frozen=True)
class Row:
    """Fires of one hook that do the same to the same shapes.

    Attributes:
      hook: its name.
      steps: at which steps it fires, those known in advance; none where values decide, or where it is not due.
      when: its schedule, as it is written; of one in part decided by values, the part that this row is about.
      watched: whether values of the train loop decide, so that it may fire at any of the steps in `span`.
      span: the first and the last step at which these shapes are met.
      surgery: the surgery's name.
      rule: how optimizer slots follow.
      leaves: the leaves before and after each fire, those that it adds last.
      optimizer: the classes of the optimizer's states before and after, where a fire puts another optimizer in place.
      params: how many elements all parameters have before and after a fire.
      opt_state: how many elements the optimizer state has before and after.
      notes: what else is to be known, such as what could not be foreseen.
    """

    hook: str
    steps: tuple[int, ...]
    when: str
    watched: bool
    span: tuple[int, int]
    surgery: str
    rule: str
    leaves: tuple[PlannedLeaf, ...]
    optimizer: tuple[str, str] | None
    params: tuple[int, int]
    opt_state: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves after a fire, as `Record.paths` has them."""
        return tuple(leaf.path for leaf in self.leaves if leaf.after is not None)

    @property
    def reshapes(self) -> bool:
        """Whether a fire leaves other shapes, leaves or another optimizer."""
        return self.optimizer is not None or any(leaf.change for leaf in self.leaves)

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        names = dict.fromkeys(slot.name.rpartition(".")[2] for leaf in self.leaves for slot in leaf.slots)
        changes = [leaf.change for leaf in self.leaves if leaf.change]
        if self.optimizer is not None:
            changes.append(" -> ".join(self.optimizer))
        held = [leaf.path for leaf in self.leaves]
        before, after = (f"{count:,}" for count in self.params)
        return (
            self._when(),
            self.hook,
            str(len(self.steps)) if self.steps or not self.watched else "?",
            held[0] if len(held) == 1 else f"{len(held)}: {_first(held)}",
            ", ".join(names) or "-",
            self.rule or "-",
            _first(changes, "; ") or "-",
            before if before == after else f"{before} -> {after}",
        )

    def _when(self) -> str:
        if self.watched:
            return f"{self.span[0]} to {self.span[1]}, when {self.when}"
        return _steps(self.steps) or "-"


class PlannedFire(NamedTuple):
    """One fire.

    Attributes:
      step: what `state.step` will hold.
      row: what it does.
    """

    step: int
    row: Row

    @property
    def hook(self) -> str:
        """The hook."""
        return self.row.hook

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves after it."""
        return self.row.paths


@dataclass(frozen=True)
class Plan:
    """What the hooks of a run would do; made by `SurgeryHooks.plan`, printed as a table.

    Attributes:
      start: the step that the state holds; fires are later, or at step 0.
      num_steps: the last step that is planned.
      hooks: names of all hooks, in the order in which they fire at one step.
      rows: fires that do the same to the same shapes, in the order of their first steps; then hooks that are not due.
      params: how many elements all parameters have at `start` and after `num_steps`.
      opt_state: likewise the optimizer state.
    """

    start: int
    num_steps: int
    hooks: tuple[str, ...]
    rows: tuple[Row, ...]
    params: tuple[int, int]
    opt_state: tuple[int, int]

    def fires(self, hook: str | None = None) -> tuple[PlannedFire, ...]:
        """The fires of one hook, or of all, that are known in advance, in the order in which they happen.

        Raises:
          HookError: there is no such hook.
        """
        if hook is not None:
            check_known(self.hooks, hook)
        found = [PlannedFire(step, row) for row in self.rows if hook in (None, row.hook) for step in row.steps]
        place = {name: order for order, name in enumerate(self.hooks)}
        return tuple(sorted(found, key=lambda fire: (fire.step, place[fire.hook])))

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        fires = sum(len(row.steps) for row in self.rows)
        head = (
            f"Steps {self.start} to {self.num_steps}: {_count(fires, 'fire')} of {_count(len(self.hooks), 'hook')}; "
            f"parameters {_both(self.params)}, optimizer state {_both(self.opt_state)}"
        )
        notes = dict.fromkeys(f"{row.hook}: {note}" for row in self.rows for note in row.notes)
        table = [aligned(HEAD, [row.cells() for row in self.rows], right=(2, 7))] if self.rows else []
        return "\n".join([head, *table, *notes])


def _steps(steps: Sequence[int]) -> str:
    """Steps in short.

    >>> _steps((200, 400, 600, 800))
    '200, 400, ..., 800'
    """
    few = [*steps] if len(steps) <= SHOWN else [*steps[:2], "...", steps[-1]]
    return ", ".join(map(str, few))


def _first(names: Sequence[str], between: str = ", ") -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return between.join([*names[:SHOWN], *more])


def _bare(shape: Shape | None) -> str:
    return "" if shape is None else f"[{','.join(map(str, shape.shape))}]"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _both(counts: tuple[int, int]) -> str:
    before, after = (f"{count:,}" for count in counts)
    return before if before == after else f"{before} -> {after}"
