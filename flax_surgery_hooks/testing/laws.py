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
from flax_surgery_hooks.testing.lifted import lift, lower
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
        initial = tx.init(streams.mapped_params(streams.STEPS, edit.before, edit))
        rebuilt = wrong = None
        if rule == "transport":
            rebuilt, wrong = (_rebuilt(rows, edit, wrong) for wrong in (False, True))
        found = {}
        for place, row in enumerate(rows):
            leaves = [streams.of_row(state, place) for state in (before, after, initial)]
            oracle = [None if state is None else streams.of_row(state, place) for state in (rebuilt, wrong)]
            cell = Cell(row, edit, rule, fresh, held[place], restarted, *leaves, *oracle)
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


def edited(opt_state: Any, tx: Any, edit: EditRow, rule: str, fresh: str) -> tuple[Any, frozenset[str]]:
    """The optimizer state after an edit, and what could not be moved, per optimizer side by side."""
    old = streams.params_at(streams.STEPS, edit.before)
    told: list[Any] = []

    def operate(params: Any, opt_state: Any) -> Any:
        bound = fsh.bind(params=params, opt_state=opt_state, tx=tx)
        new, record = fsh.operate(
            bound, edit.surgery, params="kernel", opt_state=rule, fresh=fresh, guard="off", key=streams.key()
        )
        told.append(record)
        return new.params, new.opt_state

    params, after = jax.jit(operate)(jax.tree.map(jax.numpy.asarray, old), opt_state)
    np.testing.assert_allclose(params["kernel"], edit.params(old["kernel"]), rtol=1e-14, err_msg=edit.name)
    return after, frozenset(entry.partition(" ")[0] for entry in told[0].restarted)


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
      restarted: names of the slots that the record says could not be moved.
      before: leaves of the state before the edit, by key path.
      after: those after it.
      initial: those of a new state of the edited parameters.
      rebuilt: those of a run on mapped gradients, under transport.
      wrong: those of a run on gradients mapped wrongly, under transport.
    """

    row: OptimizerRow
    edit: EditRow
    rule: str
    fresh: str
    slots: Mapping[str, Slot]
    restarted: frozenset[str]
    before: Leaves
    after: Leaves
    initial: Leaves
    rebuilt: Leaves | None
    wrong: Leaves | None

    def finding(self) -> Finding:
        """All that is wrong, in words."""
        problems: list[str] = []
        undetected: list[str] = []
        for path, value in self.after.items():
            slot = self.slots.get(path)
            name = path if slot is None else slot.name
            law = self.row.law(self.edit.like, self.rule, name)
            expected = self._expected(path, slot, law)
            tolerance = law.tolerance or self.row.tolerance
            if slot is not None and self._is_restarted(slot):
                tolerance = max(tolerance, 1e-6)  # a mean, computed in float32
            if not self._agrees(value, expected, tolerance, is_slot=slot is not None):
                problems.append(f"{name}{path if slot else ''} is not {law.law}: {_difference(value, expected)}")
            if slot is not None and self._shows(path, slot, value, expected) is False:
                undetected.append(name)
        restarted = {slot.name for slot in self.slots.values() if self._is_restarted(slot)}
        return Finding(tuple(problems), tuple(undetected), tuple(sorted(restarted)), len(self.slots))

    def _is_restarted(self, slot: Slot) -> bool:
        return slot.laid is not None and slot.name in self.restarted

    def _agrees(self, value: np.ndarray, expected: np.ndarray, tolerance: float, *, is_slot: bool) -> bool:
        loose = max(tolerance, 1e-6)  # what fresh elements start from is computed in float32
        fresh = self.edit.fresh
        if not is_slot or not fresh.any():
            return _close(value, expected, tolerance)
        if value.shape != fresh.shape or value.shape != np.shape(expected):
            return _close(value, expected, loose)
        return _close(value[~fresh], expected[~fresh], tolerance) and _close(value[fresh], expected[fresh], loose)

    def _expected(self, path: str, slot: Slot | None, law: Holds) -> np.ndarray:
        """What a leaf of the state should hold."""
        if slot is not None and self._is_restarted(slot):
            takes_mean = self.fresh == "mean" and slot.kind in SECOND_MOMENTS
            return np.full(self.initial[path].shape, self.before[path].mean()) if takes_mean else self.initial[path]
        if law.law == "restarted":
            return self.initial[path]
        by_hand = self.rebuilt is None or law.law == "by kind"
        rebuilt = None if by_hand else self.rebuilt[path]  # type: ignore[index]
        if slot is None:
            return self.before[path] if rebuilt is None else rebuilt
        if slot.offset is not None:
            return self._in_vector(path, slot, rebuilt)
        if slot.laid is None:
            return self._of_leaf(slot, self.before[path], rebuilt)
        if rebuilt is not None and not self.edit.fresh.any():
            return rebuilt
        layout = slot.laid.layout.name
        if layout == "stacked":
            return np.stack([self._of_leaf(slot, one, None) for one in self.before[path]])
        if layout == "projected":
            return self.before[path]
        bundle = [
            key for key, one in self.slots.items() if one.laid is not None and one.laid.bundle == slot.laid.bundle
        ]
        lifted = lift(layout, [self.before[key] for key in bundle], self.edit.before)
        parts = lower(layout, self._of_leaf(slot, lifted, None), [self.initial[key] for key in bundle])
        return parts[bundle.index(path)]

    def _in_vector(self, path: str, slot: Slot, rebuilt: np.ndarray | None) -> np.ndarray:
        """A slot that is part of a vector for all parameters."""
        assert slot.offset is not None
        old_end, new_end = (slot.offset + int(np.prod(shape)) for shape in (self.edit.before, self.edit.fresh.shape))
        vector = self.before[path]
        old = vector[slot.offset : old_end].reshape(self.edit.before)
        new = None if rebuilt is None else rebuilt[slot.offset : new_end].reshape(self.edit.fresh.shape)
        parts = [vector[: slot.offset], self._of_leaf(slot, old, new).ravel(), vector[old_end:]]
        return np.concatenate(parts)

    def _of_leaf(self, slot: Slot, before: np.ndarray, rebuilt: np.ndarray | None) -> np.ndarray:
        """What a slot shaped like its leaf should hold: from the oracle, or else by its kind."""
        moved = self._moved(slot, before) if rebuilt is None else rebuilt
        if slot.kind == "param" and rebuilt is None:
            return moved
        return np.where(self.edit.fresh, self._start(slot, before, moved), moved)

    def _moved(self, slot: Slot, value: np.ndarray) -> np.ndarray:
        """The slot at its element's new place, by the factor of its kind under transport."""
        edit = self.edit
        if slot.kind == "param":
            old = streams.params_at(streams.STEPS, edit.before)["kernel"]
            return edit.params(old) + np.where(edit.fresh, 0, edit.factor * edit.gather(value - old))
        moved = edit.gather(value)
        if self.rule == "carry":
            return moved
        share = edit.share
        factors = {
            "grad": share, "grad_sq": share**2, "grad_abs": np.abs(share), "update": np.sign(share),
            "param_diff": edit.factor,
        }  # fmt: skip
        return moved * factors.get(slot.kind, 1.0)

    def _start(self, slot: Slot, before: np.ndarray, moved: np.ndarray) -> Any:
        """What elements without history start from."""
        init = 0.0 if slot.init is None else slot.init
        if slot.kind == "param":
            return self.edit.params(streams.params_at(streams.STEPS, self.edit.before)["kernel"])
        if slot.kind not in SECOND_MOMENTS:
            return init if slot.kind == "invariant" else 0.0
        alive = ~self.edit.fresh
        if self.fresh == "init":
            return init
        if not alive.any():
            return before.mean()
        count = alive.sum(axis=0)
        of_column = (moved * alive).sum(axis=0) / np.maximum(count, 1)
        return np.where(count > 0, of_column, moved[alive].mean())

    def _shows(self, path: str, slot: Slot, value: np.ndarray, expected: np.ndarray) -> bool | None:
        """Whether a mistake would be seen, or None where the slot cannot show it."""
        if slot.kind == "none" or self._is_restarted(slot) or np.ptp(expected) == 0:
            return None
        if slot.laid is not None and slot.laid.layout.keeps:
            return None
        none_lives = bool(self.edit.fresh.all())
        by_run = self.wrong is not None and slot.kind not in ("param", "param_diff") and not none_lives
        wrong = self.wrong[path] if by_run else np.roll(expected, 1, axis=-1)  # type: ignore[index]
        if (
            slot.kind not in (*GRADIENTS, "param", "param_diff")
            and self.rule == "transport"
            and self.edit.like != "permute"
        ):
            return None
        if value.shape == self.edit.fresh.shape and not none_lives:
            value, wrong = value[~self.edit.fresh], wrong[~self.edit.fresh]
        return not _close(value, wrong, self.row.tolerance)


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
