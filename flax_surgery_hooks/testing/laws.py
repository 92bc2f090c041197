"""The laws: after an edit each slot is that of the same optimizer run on mapped gradients, or lies where its element
lies.

Under `transport` the oracle is optax itself, run from the start on gradients mapped by hand; under `carry` it is NumPy
indexing. Optimizers run side by side in one state: what an edit does to one does not depend on the others, and
compiling them together takes a tenth of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import flax_surgery_hooks as fsh
from flax_surgery_hooks import slots
from flax_surgery_hooks.paths import flatten
from flax_surgery_hooks.slots import Slot
from flax_surgery_hooks.testing import streams
from flax_surgery_hooks.testing.edits import EditRow
from flax_surgery_hooks.testing.rows import Holds, OptimizerRow

GRADIENTS = ("grad", "grad_sq", "grad_abs")
"""Kinds of slot that scale with gradients, by which wrong shares can be told."""
SECOND_MOMENTS = ("grad_sq", "grad_abs")
ORDERS = {"grad": 1, "grad_sq": 2}


@dataclass(frozen=True)
class Finding:
    """What came out for one optimizer, edit and rule.

    Attributes:
      problems: slots of which the law does not hold, in words.
      undetected: slots by which a mistake should have been seen and was not.
      restarted: names of slots that the record says could not be moved.
      checked: number of slots of the edited leaf.
    """

    problems: tuple[str, ...]
    undetected: tuple[str, ...]
    restarted: tuple[str, ...]
    checked: int


def check(row: OptimizerRow, edit: EditRow, rule: str) -> None:
    """Checks one optimizer, edit and rule.

    Args:
      row: the optimizer.
      edit: the edit.
      rule: "transport" or "carry".

    Raises:
      AssertionError: a slot is not what the row says, or a mistake in the factors would not be seen.
      SurgeryError: what `fsh.operate` raises.
    """
    finding = findings((row,), edit, rule)[row.name]
    wrong = [*finding.problems, *(f"{slot} would not show a mistake" for slot in finding.undetected)]
    if wrong:
        raise AssertionError(f"{row.name} after {edit.name} under {rule}: " + "; ".join(wrong))


@functools.lru_cache(maxsize=128)
def findings(rows: tuple[OptimizerRow, ...], edit: EditRow, rule: str, fresh: str = "mean") -> Mapping[str, Finding]:
    """What comes out for several optimizers at once, by name; see `check`.

    Args:
      rows: the optimizers, of distinct names.
      edit: the edit.
      rule: "transport" or "carry".
      fresh: what second moments of fresh elements start from, see `fsh.operate`.
    """
    with streams.enable_x64(True):
        before, tx = start(rows, edit.before)
        after, restarted = edited(before, tx, edit, rule, fresh)
        held = _slots_by_row(tx, before, edit.before)
        rebuilt = wrong = None
        if rule == "transport":
            rebuilt, wrong = (_rebuilt(rows, edit, wrong) for wrong in (False, True))
        found = {}
        for place, row in enumerate(rows):
            leaves = [streams.of_row(state, place) for state in (before, after)]
            oracle = [None if state is None else streams.of_row(state, place) for state in (rebuilt, wrong)]
            cell = Cell(row, edit, rule, fresh, held[place], restarted[place], *leaves, *oracle)
            found[row.name] = cell.finding()
        return found


@functools.lru_cache(maxsize=16)
def start(rows: tuple[OptimizerRow, ...], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The state of optimizers side by side after the recorded steps, and the optimizer."""
    tx = beside(rows)
    return streams.run(tx, shape), tx


@functools.lru_cache(maxsize=8)
def beside(rows: tuple[OptimizerRow, ...]) -> Any:
    """`streams.beside`, the same object for the same rows."""
    return streams.beside(rows)


@functools.lru_cache(maxsize=64)
def _rebuilt(rows: tuple[OptimizerRow, ...], edit: EditRow, wrong: bool) -> Any:
    return streams.run(beside(rows), edit.before, edit, wrong=wrong)


def edited(opt_state: Any, tx: Any, edit: EditRow, rule: str, fresh: str) -> tuple[Any, list[tuple[str, ...]]]:
    """The optimizer state after an edit, and what could not be moved, per optimizer side by side."""
    old = streams.params_at(streams.STEPS, edit.before)
    told: list[Any] = []

    def operate(params: Any, opt_state: Any) -> Any:
        bound = fsh.bind(params=params, opt_state=opt_state, tx=tx)
        new, record = fsh.operate(bound, edit.surgery, params="kernel", opt_state=rule, fresh=fresh, guard="off")
        told.append(record)
        return new.params, new.opt_state

    params, after = jax.jit(operate)(jax.tree.map(jax.numpy.asarray, old), opt_state)
    np.testing.assert_allclose(params["kernel"], edit.params(old["kernel"]), rtol=1e-15, err_msg=edit.name)
    restarted = [str(name) for name in getattr(told[0], "restarted", ())]
    return after, [tuple(name for name in restarted) for _ in after]


def _slots_by_row(tx: Any, opt_state: Any, shape: tuple[int, ...]) -> list[dict[str, Slot]]:
    """Per optimizer the slots of the kernel, by their key path in its own state."""
    leaves = flatten(streams.params_at(streams.STEPS, shape))
    mine = slots.slots_of(tx, opt_state, leaves).get(leaves.paths.index("kernel"), ())
    keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(opt_state)[0]]
    fields = opt_state._fields
    held: list[dict[str, Slot]] = [{} for _ in fields]
    for slot in mine:
        first, *rest = keys[slot.index]
        held[fields.index(first.name)][jax.tree_util.keystr(tuple(rest))] = slot
    return held


Leaves = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Cell:
    """One optimizer, edit and rule, with the states by which it is judged.

    Attributes:
      row: the optimizer.
      edit: the edit.
      rule: "transport" or "carry".
      fresh: "mean" or "init".
      slots: those of the edited leaf, by key path.
      restarted: names of fields that could not be moved.
      before: leaves of the state before the edit, by key path.
      after: those after it.
      rebuilt: those of a run on mapped gradients, under transport.
      wrong: those of a run on gradients mapped wrongly, under transport.
    """

    row: OptimizerRow
    edit: EditRow
    rule: str
    fresh: str
    slots: Mapping[str, Slot]
    restarted: tuple[str, ...]
    before: Leaves
    after: Leaves
    rebuilt: Leaves | None
    wrong: Leaves | None

    def finding(self) -> Finding:
        """All that is wrong, in words."""
        problems: list[str] = []
        undetected: list[str] = []
        for path, value in self.after.items():
            slot = self.slots.get(path)
            law = self.row.law(self.edit.name, self.rule, "" if slot is None else slot.name)
            expected = self._other(path, law) if slot is None else self._slot(path, slot, law)
            label = path if slot is None else slot.name
            if not self._agrees(value, expected, law.tolerance or self.row.tolerance, is_slot=slot is not None):
                problems.append(f"{label}{path if slot else ''} is not {law.law}: {_difference(value, expected)}")
            if slot is not None and self._shows(path, slot, value, expected) is False:
                undetected.append(label)
        return Finding(tuple(problems), tuple(undetected), self.restarted, len(self.slots))

    def _agrees(self, value: np.ndarray, expected: np.ndarray, tolerance: float, *, is_slot: bool) -> bool:
        if not is_slot or value.shape != self.edit.fresh.shape or value.shape != np.shape(expected):
            return _close(value, expected, tolerance)
        fresh = self.edit.fresh  # what they start from is computed in float32
        return _close(value[~fresh], expected[~fresh], tolerance) and _close(
            value[fresh], expected[fresh], max(tolerance, 1e-6)
        )

    def _other(self, path: str, law: Holds) -> np.ndarray:
        """What belongs to other leaves, or to none."""
        return self.rebuilt[path] if self.rebuilt is not None and law.law == "exact" else self.before[path]

    def _slot(self, path: str, slot: Slot, law: Holds) -> np.ndarray:
        """What a slot should hold."""
        by_hand = self.rebuilt is None or law.law == "by kind"
        moved = self._moved(path, slot) if by_hand else self.rebuilt[path]  # type: ignore[index]
        if slot.kind == "param" and by_hand:
            return moved
        return np.where(self.edit.fresh, self._start(path, slot, moved), moved)

    def _moved(self, path: str, slot: Slot) -> np.ndarray:
        """The slot at its element's new place, by the factor of its kind under transport."""
        edit, value = self.edit, self.before[path]
        if slot.kind == "param":
            old = streams.params_at(streams.STEPS, edit.before)["kernel"]
            return edit.params(old) + np.where(edit.fresh, 0, edit.factor * edit.gather(value - old))
        moved = edit.gather(value)
        if self.rule == "carry":
            return moved
        share = edit.share
        factors = {"grad": share, "grad_sq": share**2, "grad_abs": np.abs(share), "update": np.sign(share)}
        return moved * factors.get(slot.kind, edit.factor if slot.kind == "param_diff" else 1.0)

    def _start(self, path: str, slot: Slot, moved: np.ndarray) -> Any:
        """What elements without history start from."""
        init = 0.0 if slot.init is None else slot.init
        if slot.kind == "param":
            return self.edit.params(streams.params_at(streams.STEPS, self.edit.before)["kernel"])
        if slot.kind not in SECOND_MOMENTS:
            return init if slot.kind == "invariant" else 0.0
        if self.fresh == "init":
            return init
        alive = ~self.edit.fresh
        count = alive.sum(axis=0)
        of_column = (moved * alive).sum(axis=0) / np.maximum(count, 1)
        return np.where(count > 0, of_column, moved[alive].mean())

    def _shows(self, path: str, slot: Slot, value: np.ndarray, expected: np.ndarray) -> bool | None:
        """Whether a mistake would be seen, or None where the slot cannot show it."""
        seen = ~self.edit.fresh
        if slot.kind == "none" or np.ptp(self.before[path]) == 0 or not seen.any():
            return None
        by_run = self.wrong is not None and slot.kind != "param"
        wrong = self.wrong[path] if by_run else np.roll(expected, 1, axis=-1)  # type: ignore[index]
        if slot.kind not in (*GRADIENTS, "param") and self.rule == "transport" and self.edit.name not in ("permute",):
            return None
        return not _close(value[seen], wrong[seen], self.row.tolerance)


def _close(value: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    if value.shape != np.shape(expected):
        return False
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    scale = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
    return bool(np.allclose(value, expected, rtol=tolerance, atol=0.1 * tolerance * scale, equal_nan=True))


def _difference(value: np.ndarray, expected: np.ndarray) -> str:
    if value.shape != np.shape(expected):
        return f"shaped {list(value.shape)} instead of {list(np.shape(expected))}"
    error = np.abs(np.asarray(value, np.float64) - np.asarray(expected, np.float64))
    worst = np.unravel_index(np.argmax(error), error.shape)
    return f"{value[worst]:.6g} instead of {np.asarray(expected)[worst]:.6g} at {list(map(int, worst))}"
