"""What is told of fires: at once what the host knows, some steps later the figures, in the ledger and by the writer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from absl import logging

from flax_surgery_hooks._encodings import finite_elements
from flax_surgery_hooks.errors import HookError, RefusedError
from flax_surgery_hooks.ledger import Ledger, Record
from flax_surgery_hooks.metrics import MetricWriter
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.processes import is_first

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
    """

    record: Record
    figures: Mapping[str, Any]
    leaves: Any = None
    histograms: Mapping[str, Any] | None = None
    ok: Any = None
    reshaped: bool = False


def read(fired: Fired) -> Record:
    """The record with its figures; waits for the device."""
    figures, leaves = jax.device_get((dict(fired.figures), fired.leaves))
    return replace(fired.record, figures={name: float(value) for name, value in figures.items()}, per_leaf=leaves)


class Settler:
    """Turns fires into records: "fired" at once, "settled" or "refused" when the figures are read.

    Of several processes the first uses its writer and logs; all have the same records, and raise the same errors.
    """

    def __init__(self, ledger: Ledger, writer: MetricWriter | None, on_error: str, after: int):
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
        self._waiting: list[Fired] = []
        self._count = 0

    @property
    def _writer(self) -> MetricWriter | None:
        return self._given if self._given is not None and is_first() else None

    @property
    def settings(self) -> dict[str, Any]:
        """What all processes must be told alike."""
        return {"on_error": self._on_error, "settle_after": self._after}

    @property
    def wake(self) -> int:
        """The step at which the oldest waiting fire wants to be read, `NEVER` if none waits."""
        return min((_step(one) + self._after for one in self._waiting), default=NEVER)

    def started(self, hparams: Mapping[str, Any]) -> None:
        """Writes what the hooks are, once, as hyperparameters."""
        if (writer := self._writer) is not None and hparams:
            writer.write_hparams(hparams)

    def fired(self, *fired: Fired) -> None:
        """Writes the "fired" records, all or none, and keeps the figures for later."""
        records = [replace(one.record, event="fired", id=self._count + i) for i, one in enumerate(fired)]
        self._ledger.write(*records)
        self._count += len(records)
        for one, record in zip(fired, records, strict=True):
            # Histograms are elements, kept on the device until they are written: nobody but a writer wants them.
            self._waiting.append(replace(one, record=record, histograms=one.histograms if self._writer else None))

    def to_json(self) -> dict[str, Any]:
        """What it knows beside the records, once it is flushed."""
        return {"next_id": self._count}

    def from_json(self, saved: Mapping[str, Any]) -> None:
        """Goes on where `to_json` was called."""
        self._count = int(saved["next_id"])

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
        refused = []
        for one in [one for one in self._waiting if _step(one) + self._after <= step]:
            record = self._settled(one)
            self._waiting.remove(one)  # only now: a record that cannot be written waits for the next time
            refused += [record] if record.event == "refused" else []
        if refused and self._on_error == "raise":
            first = refused[0]
            raise RefusedError(
                "The fire was refused: it would have brought non-finite values into the state, which kept its old "
                "ones.",
                hook=first.hook,
                step=first.step,
                path=listed(first.paths),
                found=_where(first.figures),
                write="an edit that is finite on these leaves, or on_error='skip'",
            )

    def _settled(self, one: Fired) -> Record:
        ok = one.ok is None or bool(one.ok)
        record = replace(read(one), event="settled" if ok else "refused", time=0.0)
        self._ledger.write(record)
        if not ok and is_first():
            logging.warning("Hook %s at step %s was refused: non-finite values.", record.hook, record.step)
        if (writer := self._writer) is not None:
            _write(writer, record, ok, one.histograms or {})
        return record


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
