"""What fired, when, and what it did: records, as JSON lines on disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct

from flax_surgery_hooks import ledger_files, ledger_lines, processes, tables
from flax_surgery_hooks.errors import LedgerError, SurgeryError, UserCodeError, quoted, shorten
from flax_surgery_hooks.processes import is_first
from flax_surgery_hooks.watched_schedules import Trigger

EVENTS = ("run", "fired", "settled", "refused", "rolled_back", "undone", "passed", "preview")
HOST_FACTS = ("seconds", "time", "donated")
"""Fields of a `Record` that tell of the machine and the day. All others, of all records but "run" (which say when and
with which versions a process began), are the same in a run that was cut off and went on as in one that was not."""


def _static(default: Any) -> Any:
    return flax.struct.field(pytree_node=False, default=default)


@flax.struct.dataclass
class Record:
    """One event of a hook. A pytree whose only children are figures, so that a jitted function can return it.

    Attributes:
      event: "run" (a session of hooks begins), "fired" (host facts, written at once), "settled" (its figures, once
        they are there) or "refused" (the guard kept the old values), "rolled_back" and "undone" (the old values were
        put back by a metric or by `hooks.undo`), "passed" (due steps that lie before the first call), "preview".
      step: what `state.step` held.
      hook: name of the hook.
      id: number of the fire in this session; joins a "fired" record with what becomes of it.
      surgery: the surgery's name and fields, as JSON.
      rule: how optimizer slots followed.
      paths: the leaves, after the edit.
      added: those of the leaves that the edit added.
      removed: leaves that it took away.
      leaves: per leaf its shape and dtype after the edit.
      in_place: the leaves whose slots stayed in place under "carry" because the edit mixes elements.
      restarted: slots that could not be moved and were made anew, as "Class.field path".
      donated: whether the old leaves gave their memory to the new ones.
      passed: due steps since the last call that this fire stands for.
      triggers: the values that made the hook due, see `watched_schedules.Trigger`; none where its steps did.
      seconds: host time of the fire, without waiting for the device.
      time: seconds since the epoch.
      detail: anything else, as JSON.
      structure: after a fire that changed shapes, paths or the optimizer: all leaves of the state, as JSON; see
        `abstract_state`.
      figures: "params/..." and "slots/..." -> number; see `metrics.Change`.
      per_leaf: figures of each of the leaves, then of the removed ones, float32 [leaves, len(metrics.COLUMNS)], or
        None; `table` shows them. Not part of the JSON.
    """

    event: str = _static("fired")
    step: int | None = _static(None)
    hook: str = _static("")
    id: int | None = _static(None)
    surgery: str = _static("")
    rule: str = _static("")
    paths: tuple[str, ...] = _static(())
    added: tuple[str, ...] = _static(())
    removed: tuple[str, ...] = _static(())
    leaves: tuple[tuple[tuple[int, ...], str], ...] = _static(())
    in_place: tuple[str, ...] = _static(())
    restarted: tuple[str, ...] = _static(())
    donated: bool = _static(False)
    passed: tuple[int, ...] = _static(())
    triggers: tuple[Trigger, ...] = _static(())
    seconds: float = _static(0.0)
    time: float = _static(0.0)
    detail: str = _static("")
    structure: str = _static("")
    figures: dict[str, Any] = flax.struct.field(default_factory=dict)
    per_leaf: Any = None

    def table(self, limit: int | None = None) -> str:
        """The leaves before and after as a Markdown table, in the manner of `clu.parameter_overview`; waits for the
        device.

        Args:
          limit: how many rows it has at most, None for all.

        >>> record = Record(paths=("w",), leaves=(((2, 3), "float32"),), per_leaf=[[6, 1, 0.5, 0.5, 6, 0, 0]])
        >>> print(record.table())
        | Name | Shape | Dtype | Size | Norm before | Norm after | Change | Changed | Fresh | Zeros |
        |:--|:--|:--|--:|--:|--:|--:|--:|--:|--:|
        | w | (2, 3) | float32 | 6 | 1 | 0.5 | 0.5 | 100 % | 0 % | 0 % |
        """
        return tables.leaf_table(self.paths, self.leaves, self.added, self.removed, self.per_leaf, limit)

    def to_json(self) -> str:
        """The record as one line of JSON; empty fields are left out, non-finite figures are null."""
        fields: dict[str, Any] = {"event": self.event, "step": self.step, "hook": self.hook, "id": self.id}
        fields["surgery"] = json.loads(self.surgery) if self.surgery else None
        fields["rule"] = self.rule
        fields["paths"] = list(self.paths)
        fields["added"] = list(self.added)
        fields["removed"] = list(self.removed)
        fields["leaves"] = [{"shape": list(shape), "dtype": dtype} for shape, dtype in self.leaves]
        fields["in_place"] = list(self.in_place)
        fields["restarted"] = list(self.restarted)
        fields["donated"] = self.donated or None
        fields["passed"] = list(self.passed)
        fields["triggers"] = [trigger.to_json() for trigger in self.triggers]
        fields["seconds"] = round(self.seconds, 6)
        fields["time"] = round(self.time, 3)
        fields["detail"] = json.loads(self.detail) if self.detail else None
        fields["structure"] = json.loads(self.structure) if self.structure else None
        fields["figures"] = {name: _finite(value) for name, value in self.figures.items()}
        kept = {name: value for name, value in fields.items() if value not in (None, "", [], {})}
        return json.dumps(kept, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record that `to_json` wrote; without `per_leaf`, and with figures that were not finite as NaN.

        Raises:
          LedgerError: the line is no such record.

        >>> Record.from_json('{"event": "fired", "step": 10, "hook": "halve"}').step
        10
        """
        return cls(**ledger_lines.fields_of(line, EVENTS))


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


class Ledger:
    """Records in order, in memory and, if a path is given, as JSON lines in a file that is closed after each.

    Of several processes the first writes the file, and no other opens it. Which one this is JAX tells only once it has
    been initialised, so the file is made with the first record.

    Args:
      path: file to append to; its directory is made. None keeps the records in memory only.
      on_record: called with each record as it is written, on every process.

    >>> ledger = Ledger()
    >>> ledger.write(Record(event="fired", step=10, hook="halve"))
    >>> [record.hook for record in ledger.records]
    ['halve']
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, on_record: Callable[[Record], None] | None = None):
        if on_record is not None and not callable(on_record):
            raise LedgerError("on_record= is a function of a record.", found=quoted(on_record), write="on_record=print")
        self.path = None if path is None else _as_path(path)
        self.records: list[Record] = []
        self._on_record = on_record

    @staticmethod
    def read(path: str | os.PathLike[str]) -> tuple[Record, ...]:
        """The records of a file.

        Raises:
          LedgerError: it cannot be read, or a line is damaged; it says up to which line all is well.
        """
        return tuple(Record(**fields) for fields in ledger_lines.read(_as_path(path), EVENTS))

    def resume(self, records: Sequence[Record]) -> None:
        """Takes these records, of a checkpoint, as all that has happened: the file is cut to them, and what it has
        beyond them kept in a file beside it. Of several processes the first does this; every one has to call it.

        Raises:
          LedgerError: the file is of another run, or cannot be written; nothing has changed then.
        """
        path, lines = self.path, [record.to_json() for record in records]
        # All processes come here, also those that were given no path: only the first one's counts.
        processes.by_first("ledger", lambda: "" if path is None else str(ledger_files.cut(path, lines)))
        self.records = list(records)

    def trouble(self) -> str | None:
        """Why this process, which should, cannot write the file; it is made for that. None if all is well."""
        try:
            self._append("")
        except LedgerError as error:
            return error.problem
        return None

    def write(self, *records: Record) -> None:
        """Appends records, all of them or none.

        Raises:
          LedgerError: the file cannot be written; the ledger is as it was.
          UserCodeError: `on_record` raised; likewise.
        """
        now = time.time()
        timed = [one if one.time else one.replace(time=now) for one in records]  # type: ignore[attr-defined]
        # A file that somebody has deleted is written anew, as it would not be a ledger without its beginning.
        gone = self.path is not None and self.records and is_first() and not self.path.exists()
        text = "".join(f"{one.to_json()}\n" for one in ([*self.records, *timed] if gone else timed))
        if self._on_record is not None:
            for one in timed:
                self._tell(self._on_record, one)
        self._append(text)
        self.records += timed

    @staticmethod
    def _tell(on_record: Callable[[Record], None], record: Record) -> None:
        try:
            on_record(record)
        except SurgeryError:
            raise
        except Exception as error:
            raise UserCodeError(
                f"on_record raised {type(error).__name__}: {shorten(error)}",
                hook=record.hook or None,
                step=record.step,
                write="an on_record= that does not raise; what this call would have done is not done",
            ) from error

    def _append(self, text: str) -> None:
        if self.path is not None and is_first():
            _append(self.path, text)


def _as_path(path: Any) -> pathlib.Path:
    if not isinstance(path, str | os.PathLike):
        raise LedgerError("A ledger is the path of a file.", found=quoted(path), write='ledger="ledger.jsonl"')
    return pathlib.Path(path)


def _append(path: pathlib.Path, text: str) -> None:
    """Adds to the file, which is closed again: fires are rare, and so nothing is left to lose or to leak."""
    size = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.is_file() else None
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # half a line would spoil the next one
        raise LedgerError(
            f"The ledger cannot be written: {shorten(error)}",
            path=str(path),
            write="ledger=<a file in a writable directory with space>; what this call would have done is not done, "
            "and the same call can be made again",
        ) from error
