"""What is told of fires: at once what the host knows, some steps later the figures, in the ledger and by the writer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from flax_surgery_hooks import guards
from flax_surgery_hooks._encodings import finite_elements
from flax_surgery_hooks.errors import HookError, RefusedError, StateError, quoted, shorten
from flax_surgery_hooks.ledger import Ledger, Record
from flax_surgery_hooks.metrics import MetricWriter
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.processes import is_first

ON_ERROR = ("raise", "skip", "retry_next")
"""What becomes of a refused fire."""
NEVER = sys.maxsize
"""A step that no run reaches; an int, as comparing one with a float costs more."""
MOST_ROWS = 200
"""How many leaves the table shows that a writer gets; `Record.table` shows them all."""
FAR = 2**30 - 1
"""The largest int that CPython compares at its fastest; a wake beyond it is looked at again there."""

WRITES = ("write_hparams", "write_scalars", "write_texts", "write_histograms", "flush")
"""What is called of a writer."""


@dataclass(frozen=True, eq=False)
class Fired:
    """A fire whose figures may still be on their way.

    Attributes:
      record: the "fired" record, without id.
      figures: figures on the device.
      leaves: figures of each leaf on the device, see `Record.per_leaf`; None if not measured.
      histograms: "before/<path>" and "after/<path>" -> elements on the device, if asked for.
      ok: the guard's verdict on the device, or None without guard.
      reshaped: whether leaves changed shape.
      finite: whether it made no value non-finite, on the device, or None without guard.
      guard: the guard, if it is a function of figures.
      quiet: whether the figures are there for the guard alone, and told only of a refusal.
      on_error: the hook's own, or None.
      in_graph: whether it happened in a compiled step.
      kept: old values to be kept for a rollback.
    """

    record: Record
    figures: Mapping[str, Any]
    leaves: Any = None
    histograms: Mapping[str, Any] | None = None
    ok: Any = None
    reshaped: bool = False
    finite: Any = None
    guard: Any = None
    quiet: bool = False
    on_error: str | None = None
    in_graph: bool = False
    kept: list[Any] | None = None


class Retry(NamedTuple):
    """A refused fire that is to be repeated.

    Attributes:
      id: its number.
      due: the step from which on it is.
    """

    id: int
    due: int


def check_on_error(value: Any) -> None:
    """Raises unless refused fires can be treated so.

    Raises:
      HookError: there is no such way.
    """
    if not isinstance(value, str) or value not in ON_ERROR:
        raise HookError("Unknown on_error=.", found=quoted(value), write=f"one of {', '.join(ON_ERROR)}")


def told(fired: Fired, verdict: Any, figures: bool, guard: Any) -> Fired:
    """A fire with as much of its verdict (or outcome) as is told of it.

    Args:
      fired: without figures.
      verdict: something with `figures`, `leaves` and `finite`.
      figures: whether the hook measures.
      guard: the hook's.
    """
    fired = replace(fired, finite=verdict.finite)
    if callable(guard):
        fired = replace(fired, guard=guard, quiet=not figures, figures=verdict.figures)
    return replace(fired, figures=verdict.figures, leaves=verdict.leaves) if figures else fired


def read(fired: Fired) -> Record:
    """The record with its figures; waits for the device."""
    figures, leaves = jax.device_get((dict(fired.figures), fired.leaves))
    return replace(fired.record, figures={name: float(value) for name, value in figures.items()}, per_leaf=leaves)


class Settler:
    """Turns fires into records: "fired" at once, "settled" or "refused" when the figures are read.

    With `on_error="retry_next"` a hook fires again, due or not, as soon as the refusal of its last fire is read, in the
    call of `settle_after` steps after that fire, or the first after it (whether a flush has read it before or not); and
    again until one passes. A refused fire after which the hook has fired already is not repeated.

    Of several processes the first uses its writer and logs; all have the same records, and raise the same errors.
    """

    def __init__(
        self,
        ledger: Ledger,
        writer: MetricWriter | None,
        on_error: str,
        after: int,
        refused: Callable[[int], None] = lambda id: None,
    ):
        missing = [name for name in WRITES if not callable(getattr(writer, name, None))]
        if writer is not None and missing:
            raise HookError(
                "writer= is no CLU metric writer.",
                found=f"{type(writer).__name__} without {listed(missing)}",
                write="writer=fsh.metrics.create_default_writer(workdir)",
            )
        self._ledger = ledger
        self._given = writer
        self._on_error = on_error
        self._after = after
        self._refused = refused
        self._waiting: list[Fired] = []
        self._count = 0
        self._latest: dict[str, int] = {}
        self._retries: dict[str, Retry] = {}

    @property
    def _writer(self) -> MetricWriter | None:
        return self._given if self._given is not None and is_first() else None

    @property
    def settings(self) -> dict[str, Any]:
        """What all processes must be told alike."""
        return {"on_error": self._on_error, "settle_after": self._after}

    @property
    def wake(self) -> int:
        """The step at which the oldest waiting fire wants to be read or repeated, `NEVER` if none waits."""
        steps = [_step(one) + self._after for one in self._waiting]
        return min([*steps, *(one.due for one in self._retries.values())], default=NEVER)

    @property
    def retry_by_default(self) -> bool:
        """Whether refused fires are repeated, where a hook does not say."""
        return self._on_error == "retry_next"

    def retries(self, step: int) -> frozenset[str]:
        """The hooks that fire at this step because their last fire was refused."""
        return frozenset(hook for hook, one in self._retries.items() if one.due <= step)

    def forget(self, hook: str) -> None:
        """Repeats no fire of a hook."""
        self._retries.pop(hook, None)
        self._latest.pop(hook, None)

    def started(self, hparams: Mapping[str, Any]) -> None:
        """Writes what the hooks are, once, as hyperparameters."""
        if (writer := self._writer) is not None and hparams:
            writer.write_hparams(hparams)

    def fired(self, *fired: Fired, before: Sequence[Record] = ()) -> list[Record]:
        """Writes the "fired" records, all or none, and keeps the figures for later.

        Args:
          *fired: the fires.
          before: records to write in front of them.
        """
        records = []
        for place, one in enumerate(fired):
            record = replace(one.record, event="fired", id=self._count + place)
            if (again := self._retries.get(record.hook)) is not None:
                record = _with_detail(record, retry_of=again.id)
            records.append(record)
        self._ledger.write(*before, *records)
        self._count += len(records)
        for one, record in zip(fired, records, strict=True):
            assert record.id is not None
            self._retries.pop(record.hook, None)
            self._latest[record.hook] = record.id
            # Histograms are elements, kept on the device until they are written: nobody but a writer wants them.
            histograms = one.histograms if self._writer else None
            self._waiting.append(replace(one, record=record, histograms=histograms, kept=None))
        return records

    def flush(self) -> None:
        """Settles everything and flushes the writer."""
        self.settle(NEVER)
        if (writer := self._writer) is not None:
            writer.flush()

    def settle(self, step: int) -> None:
        """Reads the figures of the fires that have waited long enough at this step.

        Raises:
          RefusedError: the guard kept a result out, and `on_error` is "raise". All records are written before.
        """
        settled = []
        for one in [one for one in self._waiting if _step(one) + self._after <= step]:
            settled.append((one, self._settled(one)))
            self._waiting.remove(one)  # only now: a record that cannot be written waits for the next time
        for one, record in settled:
            if record.event == "refused" and (one.on_error or self._on_error) == "raise":
                raise _refusal(one, record)

    def to_json(self) -> dict[str, Any]:
        """The number of the next fire, and what is to be repeated; to be asked for after a `flush`."""
        return {"next_id": self._count, "retries": {hook: list(one) for hook, one in sorted(self._retries.items())}}

    def from_json(self, saved: Any) -> None:
        """Goes on where `to_json` was called.

        Raises:
          StateError: `saved` is no such thing.
        """
        try:
            retries = {str(hook): Retry(int(id), int(due)) for hook, (id, due) in saved["retries"].items()}
            count = int(saved["next_id"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise StateError(
                "This is not what was saved of the fires that wait.",
                found=shorten(saved, 150),
                write="what `to_json` returned",
            ) from None
        self._count, self._retries, self._latest = count, retries, {}

    def _settled(self, one: Fired) -> Record:
        ok = one.ok is None or bool(one.ok)
        record = replace(read(one), event="settled" if ok else "refused", time=0.0)
        if ok and one.quiet:
            record = replace(record, figures={})
        if not ok:
            record = _with_detail(record, refused_by=_refuser(one))
            self._note_refused(one, record)
        self._ledger.write(record)
        if (writer := self._writer) is not None:
            _write(writer, record, ok, one.histograms or {})
        return record

    def _note_refused(self, one: Fired, record: Record) -> None:
        assert record.id is not None
        self._refused(record.id)
        again = (one.on_error or self._on_error) == "retry_next" and self._latest.get(record.hook) == record.id
        if again and not one.in_graph:
            self._retries[record.hook] = Retry(record.id, _step(one) + max(self._after, 1))
        if is_first():
            then = "; it fired in graph, where fires are not repeated" if again and one.in_graph else ""
            what = _refuser(one) if _refuser(one) != "finite" else "non-finite values"
            logging.warning("Hook %s at step %s was refused: %s%s.", record.hook, record.step, what, then)


def _with_detail(record: Record, **facts: Any) -> Record:
    return replace(record, detail=json.dumps({**json.loads(record.detail or "{}"), **facts}))


def _refuser(one: Fired) -> str:
    """The guard that refused a fire."""
    return "finite" if one.guard is None or not bool(one.finite) else guards.told(one.guard)


def _refusal(one: Fired, record: Record) -> RefusedError:
    where: dict[str, Any] = {"hook": record.hook, "step": record.step, "path": listed(record.paths)}
    if _refuser(one) == "finite":
        return RefusedError(
            "The fire was refused: it would have brought non-finite values into the state, which kept its old ones.",
            found=_where(record.figures),
            write="an edit that is finite on these leaves, or on_error='skip'",
            **where,
        )
    return RefusedError(
        f"The fire was refused by its guard {guards.told(one.guard)}; the state kept its old values.",
        found=guards.shown(one.guard, record.figures),
        write="an edit that this guard lets through, another guard=, or on_error='skip' or 'retry_next'",
        **where,
    )


def _write(writer: MetricWriter, record: Record, ok: bool, histograms: Mapping[str, Any]) -> None:
    """What TensorBoard shows of a fire."""
    assert record.step is not None
    name = f"surgery/{record.hook}"
    if record.figures:
        scalars = {f"{name}/{figure}": value for figure, value in record.figures.items()}
        writer.write_scalars(record.step, scalars | {f"{name}/refused": float(not ok)})
    if record.per_leaf is not None:
        writer.write_texts(record.step, {f"{name}/leaves": record.table(MOST_ROWS)})
    # CLU's logging writer fails on non-finite elements, and on too narrow a range in less than float64.
    finite = {f"{name}/{part}": finite_elements(np.asarray(x)) for part, x in histograms.items() if ok}
    if filled := {tag: elements for tag, elements in finite.items() if elements.size}:
        writer.write_histograms(record.step, filled)


def _where(figures: Mapping[str, Any]) -> str | None:
    if not figures:
        return None
    return f"{figures['params/nonfinite']:.0f} in params, {figures['slots/nonfinite']:.0f} in slots"


def _step(one: Fired) -> int:
    assert one.record.step is not None
    return one.record.step
