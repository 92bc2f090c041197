"""A run that goes on from what an earlier one saved: what hooks save of themselves, and how they differ from it.

A call at step s comes after the optimizer's update that made `state.step` s, and before the checkpoint of that state.
What is saved knows the last step that was called, and all records. So a run that goes on neither repeats a recorded
fire nor loses one that was due and not recorded; and as keys come from seed, name and step alone, no key depends on
how often a run was cut off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from absl import logging

from flax_surgery_hooks import abstract_state, fingerprint
from flax_surgery_hooks.errors import HookError, ResumeError, StepError, shorten
from flax_surgery_hooks.ledger import Ledger, Record
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.processes import is_first
from flax_surgery_hooks.undoing import UndoingHooks
from flax_surgery_hooks.watching import Watching

FORMAT = 1
SHOWN = 8
_PAST = ("surgery", "params", "exclude", "fields", "rules", "apply_fn", "tx", "shardings")
"""Fields of a hook that its structural fires depend on."""


@dataclass(frozen=True)
class Change:
    """How a hook differs from the one that was saved.

    Attributes:
      hook: its name.
      kind: "changed", "gone" or "new".
      fields: what of it has changed: field -> (saved, now).
      fires: the steps of its recorded fires, which stay as they were.
      falsifies: whether the state cannot be what it is without the hook as it was: it has changed shapes.
    """

    hook: str
    kind: str
    fields: Mapping[str, tuple[Any, Any]]
    fires: tuple[int, ...]
    falsifies: bool

    def __str__(self) -> str:
        told = [f"hook {self.hook!r} is {self.kind}"]
        told += [f"{name}: {shorten(was, 60)} -> {shorten(now, 60)}" for name, (was, now) in self.fields.items()]
        steps = listed(map(str, self.fires), SHOWN)
        told.append(f"its {len(self.fires)} recorded fires stay (steps {steps})" if self.fires else "it has not fired")
        if self.falsifies:
            told.append("it has changed shapes, which the state has")
        return "; ".join(told)


@dataclass(frozen=True)
class Report:
    """What a run that goes on found.

    Attributes:
      step: the last step that the hooks were called at, None if they were not.
      changes: how the hooks differ from those that were saved.
    """

    step: int | None
    changes: tuple[Change, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"goes on after step {self.step}", *map(str, self.changes)])


class Resumable(UndoingHooks):
    """The part of `SurgeryHooks` that saves what hooks know, and goes on from it."""

    __slots__ = ("_accepted", "_counts", "_known", "_last", "_past", "_resumed", "_saved", "_watching")

    _accepted: frozenset[str]
    _counts: dict[tuple[str, int], int]
    _known: frozenset[str]
    _last: int
    _past: dict[str, Any]
    _resumed: int | None
    _saved: Any
    _watching: Watching

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """What hooks know, as JSON holds it: records, what metric schedules have seen, and what each hook is.

        For a trainer with checkpoints of its own; `checkpoint.save` does this by itself. Reads the figures of all
        fires, which waits for the device. Save it with the state, in one commit.

        Args:
          step: what `state.step` holds; by default the step of the last call.

        Returns:
          Dicts, lists, strings, numbers and None.

        Raises:
          StepError: the hooks were called, and not at this step: its fires would be lost or come twice.
          RefusedError: as in `flush`.
        """
        called = self._collector.first is not None
        if called and step is not None and step != self._last:
            raise StepError(
                "Hooks are saved after the call of the same step, so that its fires are in the state.",
                step=step,
                found=f"the last call was at {self._last}",
                write=f"state = hooks({step}, state), and then the checkpoint",
            )
        self.flush()
        known = self._last if called or self._resumed is None else self._resumed
        return {
            "format": FORMAT,
            "step": step if step is not None else known if known >= 0 else None,
            "seed": self.seed,
            "python": list(sys.version_info[:2]),
            "hooks": {**self._past, **{hook.name: fingerprint.of_hook(hook) for hook in self._ordered()}},
            "watching": self._watching.to_json(),
            "settling": self._settler.to_json(),
            "kept": self._keeper.to_json(),
            "records": [json.loads(record.to_json()) for record in self.ledger.records],
        }

    @property
    def kept_arrays(self) -> dict[str, Any]:
        """Old values that a rollback or `undo` may put back, to be saved beside `state_dict()`; empty without any."""
        return self._keeper.arrays()

    def abstract_kept(self, saved: Mapping[str, Any], state: Any) -> dict[str, Any]:
        """What `kept_arrays` was when `state_dict` returned this, abstractly, for a state like the one saved with it.

        Raises:
          StateError: the state has other leaves.
        """
        return self._keeper.abstract(saved["kept"], state, self.mirrors)

    def load_state_dict(
        self, saved: Mapping[str, Any], allow_changes: Collection[str] = (), kept: Mapping[str, Any] | None = None
    ) -> Report:
        """Goes on from `state_dict()`, once all hooks are added and before anything is called.

        The file of the ledger is cut to the saved records; what it has beyond them is kept in a file beside it.

        Args:
          saved: what `state_dict` returned, possibly through JSON.
          allow_changes: names of hooks that may differ from the saved ones without a warning or an error. The state
            stays what their recorded fires have made of it.
          kept: what `kept_arrays` was. None lets go of it, with a warning: fires of before cannot be undone then.

        Returns:
          How the hooks differ from the saved ones. Those that concern the future alone are logged as warnings.

        Raises:
          ResumeError: `saved` is nothing that `state_dict` has returned, or a hook whose fires have changed shapes is
            gone or another one.
          LedgerError: the ledger's file is of another run.
          HookError: the hooks have been called.
        """
        step, records, changes = self._compared(saved, allow_changes)
        self._watching.from_json(saved["watching"])
        self._settler.from_json(saved["settling"])
        self._keeper.restored([] if kept is None else saved["kept"], kept or {})
        if kept is None and saved["kept"] and is_first():
            logging.warning("Old values of %d fires were not given back: these cannot be undone.", len(saved["kept"]))
        self.ledger.resume(records)  # last of what can fail, as it changes the file
        self._counts = {}
        for record in records:
            if record.event == "fired" and record.step is not None:
                self._counts[record.hook, record.step] = self._counts.get((record.hook, record.step), 0) + 1
        gone = {change.hook for change in changes if change.kind == "gone"}
        self._past = {name: saved["hooks"][name] for name in gone}
        self._accepted = frozenset(allow_changes)
        self._known = frozenset(saved["hooks"])
        self._resumed = -1 if step is None else step
        if is_first():
            for change in (change for change in changes if change.hook not in allow_changes):
                logging.warning("This run goes on with other hooks: %s.", change)
        return Report(step, tuple(changes))

    def note_checkpoints(self, manager: Any) -> None:
        """Says where the run is saved, so that an error can name the checkpoint to go back to."""
        self._saved = manager

    def check_state_dict(self, saved: Mapping[str, Any], allow_changes: Collection[str] = ()) -> Report:
        """What `load_state_dict` would return or raise, but for what concerns the ledger's file; changes nothing."""
        step, _, changes = self._compared(saved, allow_changes)
        return Report(step, tuple(changes))

    def _compared(
        self, saved: Any, allow_changes: Collection[str]
    ) -> tuple[int | None, tuple[Record, ...], list[Change]]:
        if self._started:
            raise HookError(
                "Hooks go on from what was saved before they are first called.",
                found=f"calls up to step {self._last}",
                write="a new SurgeryHooks, then load_state_dict, then the loop",
            )
        if isinstance(allow_changes, str):
            raise HookError(
                "allow_changes= takes names of hooks.", found=repr(allow_changes), write=f"({allow_changes!r},)"
            )
        step, records = _checked(saved)
        changes = _changes(saved, self._described(), self.seed, records)
        told = [change for change in changes if change.hook not in allow_changes]
        if any(change.falsifies for change in told):
            raise ResumeError(
                "The hooks are not those whose past the state has in it.",
                changes=tuple(changes),
                found="; ".join(str(change) for change in told if change.falsifies),
                write="the hooks of the past, or allow_changes= with these names, if the initial state and the "
                "optimizer fit the saved shapes",
            )
        return step, records, changes

    def abstract_state(
        self, state: Any, ledger: Ledger | Iterable[Record] | None = None, allow_changes: Collection[str] = ()
    ) -> Any:
        """The abstract state that a checkpoint holds: the initial one after the structural fires of a ledger.

        Args:
          state: the trainer's initial state, concrete or abstract. What its leaves say of shardings decides where the
            new ones go: as the hook's `shardings=` or the boxes say, else by the recorded spec where it divides.
          ledger: whose fires; by default those that these hooks know, after `load_state_dict`.
          allow_changes: names of hooks that may make other shapes today than they did.

        Returns:
          A state of `jax.ShapeDtypeStruct`, with the `apply_fn` and `tx` that go with the shapes. `on_reshape` is
          called with such states again.

        Raises:
          ResumeError, StructureError: see `abstract_state.after`.
        """
        ledger = self.ledger if ledger is None else ledger
        records = ledger.records if isinstance(ledger, Ledger) else ledger
        allowed = {*self._accepted, *allow_changes}
        return abstract_state.after(state, dict(self._hooks), records, self.seed, self.mirrors, allowed)

    def _described(self) -> dict[str, Any]:
        return {hook.name: fingerprint.of_hook(hook) for hook in self._ordered()}

    def _resume_at(self, step: int) -> int:
        """The step after which a run that goes on looks for due ones, at its first call.

        Raises:
          StepError: the state is of an earlier step than what the hooks know.
        """
        assert self._resumed is not None
        if step < self._resumed:
            raise StepError(
                "The state is older than what the hooks have been given.",
                found=f"step {step}, hooks saved at {self._resumed}",
                write="the state and the hooks' state_dict of one checkpoint",
            )
        return self._resumed


def _checked(saved: Any) -> tuple[int | None, tuple[Record, ...]]:
    """Step and records of what was saved.

    Raises:
      ResumeError: it is nothing that `state_dict` has returned.
    """
    keys = ("format", "step", "seed", "python", "hooks", "watching", "settling", "kept", "records")
    missing = [key for key in keys if not isinstance(saved, Mapping) or key not in saved]
    if missing:
        raise _no_state_dict(f"without {listed(missing)}" if isinstance(saved, Mapping) else type(saved).__name__)
    if saved["format"] != FORMAT:
        raise _no_state_dict(f"format {shorten(saved['format'], 40)}, this release reads {FORMAT}")
    step = saved["step"]
    if step is not None and (type(step) is not int or step < 0):
        raise _no_state_dict(f"step {shorten(step, 40)}")
    kinds = {"hooks": Mapping, "watching": Mapping, "settling": Mapping, "records": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(saved[name], kind)]
    wrong = wrong or [name for name, is_whole in _INSIDE.items() if not is_whole(saved[name])]
    if wrong:
        raise _no_state_dict(f"{listed(wrong)} of another type")
    return step, tuple(Record.from_json(json.dumps(record)) for record in saved["records"])


def _are_mappings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Mapping) for value in values)


_INSIDE: dict[str, Callable[[Any], bool]] = {
    "hooks": lambda told: _are_mappings(told.values()),
    "watching": lambda told: all(isinstance(held, list) and _are_mappings(held) for held in told.values()),
    "settling": lambda told: type(told.get("next_id")) is int,
}
"""Whether what is saved under these keys is what it has to be."""


def _no_state_dict(found: str) -> ResumeError:
    return ResumeError(
        "This is nothing that `state_dict` has returned.", found=found, write="what hooks.state_dict() returned, whole"
    )


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], seed: int, records: Iterable[Record]) -> list[Change]:
    fires: dict[str, list[int]] = {}
    structural = set()
    for record in records:
        if record.event == "fired" and record.step is not None:
            fires.setdefault(record.hook, []).append(record.step)
            structural |= {record.hook} if record.structure else set()
    other_python = saved["python"] != list(sys.version_info[:2])
    changes = []
    for name in dict.fromkeys((*saved["hooks"], *now)):
        steps = tuple(fires.get(name, ()))
        if name not in now:
            changes.append(Change(name, "gone", {}, steps, name in structural))
        elif name not in saved["hooks"]:
            changes.append(Change(name, "new", {}, steps, False))
        else:
            fields = _fields(saved["hooks"][name], now[name], other_python)
            if saved["seed"] != seed:
                fields["seed"] = (saved["seed"], seed)
            past = name in structural and any(field in _PAST for field in fields)
            changes += [Change(name, "changed", fields, steps, past)] if fields else []
    return changes


def _fields(saved: Mapping[str, Any], now: Mapping[str, Any], other_python: bool) -> dict[str, tuple[Any, Any]]:
    """Field -> (saved, now), where they differ; compiled code of another Python always does, and is left out."""
    found = {}
    for name in dict.fromkeys((*saved, *now)):
        was, today = saved.get(name), json.loads(json.dumps(now.get(name)))
        if other_python:
            was, today = _without_code(was), _without_code(today)
        if was != today:
            found[name] = _parting(was, today)
    return found


def _without_code(told: Any) -> Any:
    if isinstance(told, Mapping):
        return {name: _without_code(value) for name, value in told.items() if name != "code"}
    return [_without_code(value) for value in told] if isinstance(told, list) else told


def _parting(was: Any, now: Any) -> tuple[Any, Any]:
    """The parts of two descriptions that differ."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        names = [name for name in dict.fromkeys((*was, *now)) if was.get(name) != now.get(name)]
        if len(names) == 1:
            return _parting(was.get(names[0]), now.get(names[0]))
        return {name: was.get(name) for name in names}, {name: now.get(name) for name in names}
    return was, now
