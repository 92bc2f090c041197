"""One fire of a hook on the host, and what is recorded of it: at once what the host knows, its figures some steps
later.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from flax_surgery_hooks.errors import RefusedError
from flax_surgery_hooks.ledger import Ledger, Record
from flax_surgery_hooks.metrics import MetricWriter
from flax_surgery_hooks.operate import arrays_of, needs_key, plan_units, record_of, run, run_abstractly
from flax_surgery_hooks.operate import commit as put_outcome
from flax_surgery_hooks.operation import Operation, fire_for
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.programs import Programs
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.structure import Reshape, shapes
from flax_surgery_hooks.surgery import path_hash
from flax_surgery_hooks.train_state import take_apart

SHOWN = 100
"""How many missed steps a record lists."""
ON_ERROR = ("raise", "skip")
NEVER = sys.maxsize
"""A step that no run reaches; an int, as comparing one with a float costs more."""
FAR = 2**30 - 1
"""The largest int that CPython compares at its fastest; a wake beyond it is looked at again there."""


def foresee(operation: Operation, state: Any, key: Any, inputs: dict[str, Any], reshape: Reshape) -> Any:
    """The state after a fire, abstractly: raises whatever a fire on leaves of these shapes would."""
    parts = take_apart(state)
    plan = plan_units(operation, parts)
    outcome = run_abstractly(operation, plan, [arrays_of(unit, parts) for unit in plan], key, jnp.int32(0), inputs)
    return reshape.replaced(put_outcome(state, parts, plan, outcome))


@dataclass(frozen=True, eq=False)
class Fired:
    """A fire whose figures may still be on their way.

    Attributes:
      record: the "fired" record, without id.
      figures: figures on the device.
      ok: the guard's verdict on the device, or None without guard.
      reshaped: whether leaves changed shape.
    """

    record: Record
    figures: dict[str, jax.Array]
    ok: Any
    reshaped: bool = False


def fire_key(operation: Operation, seed: int, name: str, step: int, count: int) -> jax.Array | None:
    """The key of a fire, or None if nothing in the operation draws.

    A `fold_in` of the seed's threefry key with the name's hash and the step; a further fire of the same hook at the
    same step folds in how often it has fired there.
    """
    if not needs_key(operation):
        return None
    return _folded(seed, path_hash(name), step, count)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _folded(seed: int, name: Any, step: Any, count: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), name), step)
    return jax.random.fold_in(key, count) if count else key


def prepare(programs: Programs, state: Any, key: Any, step: int, inputs: dict[str, Any], reshape: Reshape) -> None:
    """Raises whatever a fire on this state would raise, and edits nothing."""
    parts = take_apart(state)
    reshape.check(state)
    at = jnp.int32(step)
    for unit in plan_units(programs.operation, parts):
        fire = fire_for(unit, key, at, inputs)
        programs.prepare(unit, arrays_of(unit, parts), fire, may_reshape=reshape.declared)


def fire(
    programs: Programs,
    state: Any,
    key: Any,
    step: int,
    inputs: dict[str, Any],
    reshape: Reshape,
    *,
    commit: bool = True,
) -> tuple[Any, Fired]:
    """Fires one operation on a concrete state; without `commit` the state comes back as it was.

    Waits for nothing, unless shapes change: then for the guard's verdict.
    """
    parts = take_apart(state)
    plan = plan_units(programs.operation, parts)
    arrays = [arrays_of(unit, parts) for unit in plan]
    at = jnp.int32(step)
    fires = [fire_for(unit, key, at, inputs) for unit in plan]
    outcome = run(programs, plan, arrays, fires, may_reshape=reshape.declared, commit=commit)
    before = shapes(state.params)
    if commit:
        state = put_outcome(state, parts, plan, outcome)
    reshaped = shapes(state.params) != before
    if reshaped:
        state = reshape.replaced(state)
    figures = outcome.figures if programs.operation.figures else {}
    record = record_of(programs.operation, plan, outcome)
    return state, Fired(record, figures, outcome.ok, reshaped)


def read(figures: dict[str, Any]) -> dict[str, float]:
    """Figures as Python floats; waits for the device."""
    return {name: float(value) for name, value in jax.device_get(figures).items()}


class Settler:
    """Turns fires into records: "fired" at once, "settled" or "refused" when the figures are read."""

    def __init__(self, ledger: Ledger, writer: MetricWriter | None, on_error: str, after: int):
        self._ledger = ledger
        self._writer = writer
        self._on_error = on_error
        self._after = after
        self._waiting: list[Fired] = []
        self._count = 0

    @property
    def wake(self) -> int:
        """The step at which the oldest waiting fire wants to be read, `NEVER` if none waits."""
        return min((_step(one) + self._after for one in self._waiting), default=NEVER)

    def fired(self, one: Fired) -> None:
        """Writes the "fired" record and keeps the figures for later."""
        record = one.record.replace(event="fired", id=self._count)  # type: ignore[attr-defined]  # added by flax.struct
        self._count += 1
        self._ledger.write(record)
        self._waiting.append(Fired(record, one.figures, one.ok))

    def flush(self) -> None:
        """Settles everything and flushes the writer."""
        self.settle(NEVER)
        if self._writer is not None:
            self._writer.flush()

    def settle(self, step: int) -> None:
        """Reads the figures of the fires that have waited long enough at this step.

        Raises:
          RefusedError: the guard kept a result out, and `on_error` is "raise". All records are written before.
        """
        ripe = [one for one in self._waiting if _step(one) + self._after <= step]
        self._waiting = [one for one in self._waiting if _step(one) + self._after > step]
        refused = [record for record in map(self._settled, ripe) if record.event == "refused"]
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
        figures, ok = read(one.figures), one.ok is None or bool(one.ok)
        event = "settled" if ok else "refused"
        record = one.record.replace(event=event, figures=figures, time=0.0)  # type: ignore[attr-defined]
        self._ledger.write(record)
        if not ok:
            logging.warning("Hook %s at step %s was refused: non-finite values.", record.hook, record.step)
        if self._writer is not None and figures:
            scalars = {f"surgery/{record.hook}/{name}": value for name, value in figures.items()}
            self._writer.write_scalars(_step(one), scalars | {f"surgery/{record.hook}/refused": float(not ok)})
        return record


def _where(figures: dict[str, Any]) -> str | None:
    if not figures:
        return None
    return f"{figures['params/nonfinite']:.0f} in params, {figures['slots/nonfinite']:.0f} in slots"


def _step(one: Fired) -> int:
    assert one.record.step is not None
    return one.record.step


def versions_json(seed: int) -> str:
    """Versions of what computes, and the seed, as JSON."""
    names = ("flax_surgery_hooks", "jax", "jaxlib", "flax", "optax", "clu")
    versions = {name: _version(name) for name in names}
    return json.dumps({"seed": seed, "versions": versions, "backend": jax.default_backend()})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        return "unknown"


def note_missed(ledger: Ledger, hook: str, when: Schedule, upto: int) -> None:
    """Records and logs due steps that lie before hooks were first called, or before the hook was added.

    They are taken as past and never fired late. A record lists the first of them.
    """
    missed = tuple(itertools.islice(when.due_steps(-1, upto), SHOWN))
    if not missed:
        return
    ledger.write(Record(event="passed", step=upto + 1, hook=hook, passed=missed))
    logging.warning(
        "Hook %s was due at %s, before the first call at step %d: taken as past.",
        hook,
        listed(map(str, missed)) + (" and further steps" if len(missed) == SHOWN else ""),
        upto + 1,
    )
