"""What the host knows of fires in graph: which hooks fire there, and their figures, read some steps after the fire."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from flax_surgery_hooks import checks, in_graph, room
from flax_surgery_hooks.mirrors import Mirrors
from flax_surgery_hooks.processes import is_first
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.settling import NEVER, Fired


def fires_in(path: pathlib.Path | None) -> frozenset[tuple[int, str]]:
    """(step, hook) of the fires that a ledger's file has; lines that are none are left to who reads it."""
    if path is None or not path.exists():
        return frozenset()
    found: set[tuple[int, str]] = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("event") == "fired" and {"step", "hook"} <= record.keys():
            found.add((record["step"], record["hook"]))
    return frozenset(found)


@dataclass
class Collector:
    """The fires in graph of one `SurgeryHooks`.

    Attributes:
      after: how many steps after a fire its figures are read.
      ledger: the file of the ledger, None if there is none.
      traced: hook -> what all its fires have in common, for those that some compiled step fires.
      first: the step of the first call, None if there was none yet; fires before it may have been recorded by then.
      state: the state as `init` saw it, in shapes with their places; None before that.
    """

    after: int
    ledger: pathlib.Path | None = None
    traced: dict[str, in_graph.About] = field(default_factory=dict)
    first: int | None = None
    state: Any = None
    _seen: dict[str, int] = field(default_factory=dict)
    _last: dict[str, int] = field(default_factory=dict)
    _waiting: list[tuple[int, Any]] = field(default_factory=list)
    _recorded: frozenset[tuple[int, str]] | None = None

    @property
    def wake(self) -> int:
        """The step at which the oldest waiting buffer wants to be read, `NEVER` if none waits."""
        return min((step + self.after for step, _ in self._waiting), default=NEVER)

    def begin(self, state: Any, mirrors: Mirrors, hooks: Sequence[Hook]) -> None:
        """Looks at a state with room for figures of these hooks; waits for the device if it has values.

        What a state from a checkpoint has seen may have been recorded or not: the ledger's file tells. Without a file
        it is taken as recorded.
        """
        self._recorded = None
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state.params)):
            self.state = in_graph.seen_of(state, mirrors, hooks)
        if checks.concrete(state) and self.ledger is None:
            counts = {name: buffer["count"] for name, buffer in room.buffers(state).items()}
            self._seen = {name: int(count) for name, count in jax.device_get(counts).items()}

    def note(self, state: Any, names: Iterable[str], step: int) -> None:
        """Keeps copies of the buffers of hooks that were due, as the next train step may take the state's own."""
        held = room.buffers(state)
        due = {name: held[name] for name in names if name in held}
        if due:
            self._waiting.append((step, jax.tree.map(jnp.copy, due)))

    def ripe(self, hooks: Sequence[Hook], step: int) -> list[Fired]:
        """The fires whose buffers have waited long enough at this step, in the order in which they happened."""
        ready = [one for one in self._waiting if one[0] + self.after <= step]
        self._waiting = [one for one in self._waiting if one[0] + self.after > step]
        return [fired for _, held in ready for fired in self.read(hooks, held)]

    def read(self, hooks: Sequence[Hook], held: Mapping[str, Any]) -> list[Fired]:
        """The fires in these buffers that have not been read yet; waits for the device."""
        buffers = jax.device_get(dict(held))
        found = []
        for order, hook in enumerate(hooks):
            if hook.name in buffers and hook.name in self.traced:
                found += [(order, one) for one in self._new(hook, buffers[hook.name])]
        return [one for _, one in sorted(found, key=lambda pair: (pair[1].record.step, pair[0]))]

    def renewed(self, old: Any, new: Any) -> None:
        """Takes note that a state has other buffers, as after a fire that changed shapes; the old ones are read."""
        self._waiting = []
        before, after = room.buffers(old), room.buffers(new)
        for name in after:
            if before.get(name) is not after[name]:
                self._seen[name] = 0

    def _new(self, hook: Hook, buffer: Mapping[str, Any]) -> list[Fired]:
        count, capacity = int(buffer["count"]), len(buffer["steps"])
        first = max(self._seen.get(hook.name, 0), count - capacity)
        kept = [(int(buffer["steps"][i % capacity]), buffer["rows"][i % capacity]) for i in range(first, count)]
        lost = self._lost(hook, first - self._seen.get(hook.name, 0), kept)
        self._seen[hook.name] = max(count, self._seen.get(hook.name, 0))
        if kept:
            self._last[hook.name] = kept[-1][0]
        new = [(step, rows) for step, rows in kept if not self._is_recorded(step, hook.name)]
        return [*lost, *(self.traced[hook.name].fired(step, rows) for step, rows in new)]

    def _is_recorded(self, step: int, hook: str) -> bool:
        """Whether a session before this one has recorded a fire."""
        if self.first is not None and step >= self.first:
            return False
        if self._recorded is None:
            self._recorded = fires_in(self.ledger)
        return (step, hook) in self._recorded

    def _lost(self, hook: Hook, number: int, kept: Sequence[tuple[int, Any]]) -> list[Fired]:
        """Fires whose figures others have taken the place of; the schedule knows their steps."""
        due = [] if number <= 0 else list(hook.when.due_steps(self._last.get(hook.name, -1), kept[0][0] - 1))
        lost = [step for step in due[-number:] if not self._is_recorded(step, hook.name)]
        if not lost:
            return []
        if is_first():
            logging.warning(
                "Hook %s fired %d times more between two collects than the state has room for; the figures of these "
                "fires are lost. Write hooks.init(state, fires=%d), or collect more often.",
                hook.name,
                len(lost),
                len(lost) + len(kept),
            )
        return [self.traced[hook.name].without_figures(step) for step in lost]
