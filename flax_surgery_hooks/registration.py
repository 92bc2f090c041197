"""Registered hooks: what each of them is, and by which names they are known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flax_surgery_hooks import guards
from flax_surgery_hooks.errors import HookError, StepError, quoted, shorten
from flax_surgery_hooks.operation import Operation
from flax_surgery_hooks.paths import close_matches, listed
from flax_surgery_hooks.rollback import Rollback
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.structure import Reshape
from flax_surgery_hooks.surgery import describe, path_hash

MOST_PASSED = 100_000
"""Due steps that one call stands for: a record lists them."""


@dataclass(frozen=True)
class Hook:
    """One registered hook.

    Attributes:
      name: its unique name.
      operation: what it does to a state.
      when: at which steps.
      priority: hooks due at one step fire from the highest to the lowest.
      order: number of its registration, which decides between equal priorities.
      reshape: what it brings for the shapes after it.
      rollback: what it keeps of the state before its fires, or None.
      on_error: what becomes of its refused fires, or None for what holds for all hooks.
    """

    name: str
    operation: Operation
    when: Schedule
    priority: int
    order: int
    reshape: Reshape
    rollback: Rollback | None = None
    on_error: str | None = None

    def hparams(self) -> dict[str, Any]:
        """What the hook is: "surgery/<hook>/<field>" -> number, string or None."""
        operation = self.operation
        surgery, leaves = describe(operation.edit.function), operation.selection.describe()
        fields = {
            "surgery": surgery.pop("name"),
            **{f"surgery.{name}": value for name, value in surgery.items()},
            "params": ", ".join(map(str, leaves["params"])),
            "exclude": ", ".join(map(str, leaves["exclude"])),
            "when": repr(self.when),
            "opt_state": operation.rules.describe(),
            "fresh": operation.fresh,
            "guard": guards.told(operation.guard),
            **({} if self.rollback is None else {"rollback": repr(self.rollback)}),
            **({} if self.on_error is None else {"on_error": self.on_error}),
            "priority": self.priority,
        }
        return {f"surgery/{self.name}/{name}": _simple(value) for name, value in fields.items()}

    def planned_steps(self, after: int, upto: int) -> tuple[int, ...]:
        """The due steps in (after, upto] that are known in advance.

        Raises:
          StepError: they are too many to be recorded.
        """
        planned = self.when.planned
        steps = () if planned is None else tuple(itertools.islice(planned.due_steps(after, upto), MOST_PASSED + 1))
        if len(steps) > MOST_PASSED:
            raise StepError(
                f"The call jumps over more than {MOST_PASSED} due steps.",
                hook=self.name,
                found=f"step {upto} after {after}",
                write="the value of state.step, train steps applied so far, and no other counter",
            )
        return steps

    def next_planned(self, step: int) -> int | None:
        """The first of these after `step`, or None."""
        planned = self.when.planned
        return None if planned is None else planned.next_step(step)

    def next_possible(self, step: int) -> int | None:
        """The first step after `step` at which it may fire: the next one, if values decide."""
        return step + 1 if self.when.watched else self.next_planned(step)


def in_order(hooks: Iterable[Hook]) -> list[Hook]:
    """Hooks as they fire when due at one step: by priority, then as they were registered."""
    return sorted(hooks, key=lambda hook: (-hook.priority, hook.order))


def find(hooks: Mapping[str, Hook], name: str) -> Hook:
    """The hook of this name.

    Raises:
      HookError: there is none.
    """
    check_known(hooks, name)
    return hooks[name]


def check_known(hooks: Collection[str], name: str) -> None:
    """Raises unless there is a hook of this name.

    Raises:
      HookError: there is none.
    """
    if not isinstance(name, str) or name not in hooks:
        raise HookError(
            "There is no hook of this name.",
            hook=shorten(name),
            found=f"hooks {listed(hooks) or 'none'}",
            write=listed(close_matches(shorten(name), hooks)) or None,
        )


def check_name(hooks: Iterable[str], name: Any) -> None:
    """Raises unless a further hook may have this name.

    Raises:
      HookError: it is malformed, or taken.
    """
    if not isinstance(name, str) or not name or not name.replace("_", "a").replace("-", "a").isalnum():
        raise HookError(
            "A hook's name is made of letters, digits, '_' and '-'.", found=quoted(name), write='"head_norm"'
        )
    for other in hooks:
        if other == name or path_hash(other) == path_hash(name):
            raise HookError(
                "The name is taken."
                if other == name
                else "The name has the same hash as another, and so the same keys.",
                found=quoted(other),
                write="another name, or hooks.remove() first",
            )


def _simple(value: Any) -> Any:
    """A hyperparameter as all writers hold it."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
