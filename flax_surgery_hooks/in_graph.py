"""Fires inside a jitted step or a scan: under `lax.cond`, over the leaves that they touch and no others.

A fire in graph does what one on the host does, in the same two passes and with the same keys. Its figures wait in the
state, see `room`.
"""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from flax_surgery_hooks import deriving, fires, memory
from flax_surgery_hooks.committing import commit, restarts_at
from flax_surgery_hooks.errors import HookError, StateError, located
from flax_surgery_hooks.guards import Guard
from flax_surgery_hooks.layers import Layer
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.making import bind_inputs
from flax_surgery_hooks.mirrors import Mirrors, original, view
from flax_surgery_hooks.operate import Outcome, examine_abstractly, needs_key, record_of
from flax_surgery_hooks.operation import Unit, fire_for
from flax_surgery_hooks.planning import (
    arrays_of,
    fire_memory,
    inputs_of_leaves,
    inputs_of_state,
    plan_units,
    shapes_only,
)
from flax_surgery_hooks.programs import Arrays, editing, foreseen, measuring
from flax_surgery_hooks.reductions import Places, places_of
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.room import buffers, measures, noted, with_own
from flax_surgery_hooks.settling import Fired, told
from flax_surgery_hooks.surgery import path_hash
from flax_surgery_hooks.train_state import Parts, put_back, take_apart
from flax_surgery_hooks.verdicts import judge, judged, names_of, row_of


def why_on_host(hook: Hook) -> str | None:
    """What keeps a hook out of the graph, or None."""
    if hook.reshape.declared or hook.operation.edit.edit_optimizer is not None:
        return "it may change the structure of the state"
    if hook.operation.histograms:
        return "its histograms need the elements of its leaves"
    if hook.rollback is not None:
        return "what it keeps for a rollback lies outside of the train state"
    return "values that the host reads decide when" if hook.when.watched else None


class About(NamedTuple):
    """What all fires of a hook have in common.

    Attributes:
      record: of a fire, without step and figures.
      rows: how many rows of figures each unit has; then come the guard's verdict, if it is a function, and `names`.
      names: of the figures that the surgery measures itself.
      figures: whether they are told.
      guard: the operation's.
      on_error: the hook's.
    """

    record: Record
    rows: tuple[int, ...]
    names: tuple[str, ...]
    figures: bool
    guard: Guard
    on_error: str | None

    def fired(self, step: int, rows: Any) -> Fired:
        """A fire at a step, with the rows that waited in the buffer."""
        if not len(rows):
            return self.without_figures(step)
        ends = list(itertools.accumulate(self.rows))
        verdict = judged([rows[end - size : end] for end, size in zip(ends, self.rows, strict=True)])
        end = ends[-1]
        if callable(self.guard):
            verdict = verdict._replace(ok=rows[end, 0] > 0, finite=rows[end, 1] > 0)
            end += 1
        own = zip(self.names, rows[end:].reshape(-1)[: len(self.names)], strict=True)
        verdict = verdict._replace(figures={**verdict.figures, **dict(own)})
        ok = verdict.ok if self.guard != "off" else None
        fired = Fired(replace(self.record, step=step), {}, ok=ok, in_graph=True, on_error=self.on_error)
        return told(fired, verdict, self.figures, self.guard)

    def without_figures(self, step: int) -> Fired:
        """A fire that measured nothing, or whose figures are lost."""
        return Fired(replace(self.record, step=step), {}, in_graph=True)


class Lying(NamedTuple):
    """Where the leaves of a state lie, in the order of its flattened trees; None where that is not known."""

    params: tuple[Any, ...] = ()
    opt_leaves: tuple[Any, ...] = ()

    @classmethod
    def of(cls, state: Any) -> Lying:
        """Of a concrete state, or an abstract one that says, as one hook sees it."""
        params, opt_state = jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state)
        return cls(*(tuple(getattr(leaf, "sharding", None) for leaf in leaves) for leaves in (params, opt_state)))


def seen_of(state: Any, mirrors: Mirrors, hooks: Sequence[Hook]) -> Any:
    """Those fields of a state that hooks see, as shapes with their places."""
    names = ["params", "opt_state", "surgery", *(name for name, _ in mirrors.fields)]
    names += [name for hook in hooks for name in hook.operation.fields]
    held = {name: getattr(state, name) for name in dict.fromkeys(names) if hasattr(state, name)}
    return types.SimpleNamespace(tx=state.tx, **jax.tree.map(_placed, held))


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=getattr(leaf, "sharding", None))


class _Touched(NamedTuple):
    """The leaves of a state that a fire edits, and its buffer."""

    params: dict[int, Any]
    opt_leaves: dict[int, Any]
    memory: Any
    buffer: Any


class Run:
    """One hook on one traced state.

    Attributes:
      due: whether `state.step` is due, a boolean scalar.

    Args:
      state: the train state, with a buffer for the hook.
      hook: one that `why_on_host` lets in.
      seed: the seed of the hooks' keys.
      inputs: the trainer's.
      mirrors: fields of the state that mirror the parameters.
      seen: a state that says where the leaves lie, see `seen_of`; without it figures cost gathers of partial sums.

    Raises:
      SurgeryError: whatever a fire on leaves of these shapes would raise; StructureError if shapes change.
    """

    def __init__(self, state: Any, hook: Hook, seed: int, inputs: Mapping[str, Any], mirrors: Mirrors, seen: Any):
        self._hook, self._seed, self._mirrors = hook, seed, mirrors.beside(hook)
        held = self._viewed(state)
        self._state, lying = held, Lying() if seen is None else Lying.of(self._viewed(seen))
        self._operation, self._inputs = bind_inputs(hook.operation, inputs)
        self._original = state
        self._parts = take_apart(held)
        self.step = jnp.asarray(_step_of(state), jnp.int32)
        self.due = hook.when.is_due(self.step)
        remembered = memory.held(state, hook.name, self._operation)
        key = jax.random.key(0, impl="threefry2x32") if needs_key(self._operation) else None
        foreseen_inputs = self._foreseen_inputs(key, remembered)
        self._plan = plan_units(self._operation, self._parts, key, foreseen_inputs, remembered)
        self._lie = [_places(unit, self._parts, lying) for unit in self._plan]
        arrays = self._arrays(self._parts, remembered)
        given = [fire_for(unit, key, self.step, foreseen_inputs, one.memory) for unit, one in self._pairs(arrays)]
        if self._operation.edit.fold_back is not None:  # is judged by values; that shapes stay is not
            for (unit, one), fire in zip(self._pairs(arrays), given, strict=True):
                foreseen(self._operation, unit, False, shapes_only(one), shapes_only(fire), may_reshape=False)
        self._in_place = [
            examine_abstractly(self._operation, unit, one, fire)
            for (unit, one), fire in zip(self._pairs(arrays), given, strict=True)
        ]
        self._after = [
            foreseen(self._operation, unit, stays, shapes_only(one), shapes_only(fire), may_reshape=False)[0]
            for (unit, one), fire, stays in zip(self._pairs(arrays), given, self._in_place, strict=True)
        ]
        self._touched = self._touching(arrays, remembered)

    def after(self, state: Any) -> Any:
        """The state after the fire, if it is due; of the structure of the one that this was made with."""
        again = copy.copy(self)
        again._original, again._state = state, self._viewed(state)
        again._parts = take_apart(again._state)
        remembered = memory.held(state, self._hook.name, self._operation)
        again._touched = again._touching(again._arrays(again._parts, remembered), remembered)
        with located(hook=self._hook.name):
            new = jax.lax.cond(self.due, again._branch, lambda touched: touched, again._touched)
        return again._with(new)

    def marked(self, mark: Any) -> Any:
        """The state with `mark` in the place of every leaf that a fire may change."""
        return self._with(jax.tree.map(lambda leaf: mark, self._touched))

    def _viewed(self, state: Any) -> Any:
        return view(state, self._mirrors, self._hook.operation.fields)

    def _foreseen_inputs(self, key: Any, remembered: Any) -> dict[str, Any]:
        """The inputs of the edit, those that its surgery makes as shapes: they are made where the hook is due."""
        run, known = deriving.Abstractly, (self._operation, self._original, key, self.step)
        inputs = inputs_of_state(*known, self._inputs, run.of_state)
        return inputs_of_leaves(
            self._operation, self._parts, remembered, key, self.step, inputs, deriving.Abstractly.of_leaves
        )

    def _key(self, step: Any) -> Any:
        if not needs_key(self._operation):
            return None
        return fires.folded(self._seed, path_hash(self._hook.name), step, 0)

    def _pairs(self, arrays: Sequence[Arrays]) -> Any:
        return zip(self._plan, arrays, strict=True)

    def _arrays(self, parts: Parts, remembered: Any) -> list[Arrays]:
        return [arrays_of(unit, parts, fire_memory(self._operation, unit, remembered)) for unit in self._plan]

    def _touching(self, arrays: Sequence[Arrays], remembered: Any) -> _Touched:
        places = [place for unit in self._plan for place in unit.places]
        indices = {slot.index for unit in self._plan for slot in unit.slots}
        indices |= restarts_at(self._operation, self._parts, self._plan)
        return _Touched(
            {place: self._parts.params.values[place] for place in places},
            {index: self._parts.opt_leaves[index] for index in sorted(indices)},
            remembered if self._operation.edit.takes("memory") else (),
            buffers(self._state)[self._hook.name],
        )

    def about(self) -> About:
        """What all fires have in common."""
        operation = self._operation
        outcome = Outcome(self._after, {}, None, None, tuple(self._in_place))
        record = record_of(operation, self._plan, outcome, hook=self._hook.name)
        rows = tuple(len(unit.paths) + 2 for unit in self._plan)
        names = names_of(operation, self._plan)
        return About(record, rows, names, operation.figures, operation.guard, self._hook.on_error)

    def _with(self, touched: _Touched) -> Any:
        state = put_back(self._state, self._parts, touched.params, touched.opt_leaves)
        if self._operation.edit.takes("memory"):
            state = memory.put(state, self._hook.name, touched.memory)
        everything = {**buffers(state), self._hook.name: touched.buffer}
        return original(state.replace(surgery={**(state.surgery or {}), "fires": everything}))

    def _branch(self, touched: _Touched) -> _Touched:
        """`apply`, under Auto axes: sort, gather and scatter raise on Explicit ones."""
        shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, touched)
        explicit = {
            name
            for one in jax.tree.leaves(shardings)
            for name, kind in zip(one.mesh.axis_names, one.mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        }
        apply, step = self._apply, self.step
        # Before anything is put under Auto axes: functions of the state call the user's model under its own.
        inputs = inputs_of_state(
            self._operation, self._original, self._key(step), step, self._inputs, deriving.Traced({}).of_state
        )
        if explicit:
            apply = jax.sharding.auto_axes(apply, axes=tuple(sorted(explicit)), out_sharding=shardings)
        return apply(touched, step, inputs)

    def _apply(self, touched: _Touched, step: Any, inputs: dict[str, Any]) -> _Touched:
        """The leaves after the fire."""
        operation = self._operation
        parts = take_apart(put_back(self._state, self._parts, touched.params, touched.opt_leaves))
        remembered = touched.memory if operation.edit.takes("memory") else ()
        arrays, key = self._arrays(parts, remembered), self._key(step)
        run = deriving.Traced(self._lie[0])
        inputs = inputs_of_leaves(operation, parts, remembered, key, step, inputs, run.of_leaves)
        given = [fire_for(unit, key, step, inputs, one.memory) for unit, one in self._pairs(arrays)]
        known = list(zip(self._plan, self._in_place, self._lie, strict=True))
        ok: Any = None
        rows: Any = None
        seeds: list[Any] = [None] * len(known)
        if measures(operation):
            first = [
                measuring(operation, *one, values, fire) for one, values, fire in zip(known, arrays, given, strict=True)
            ]
            verdict = judge([each.changes for each in first], operation.bound)
            ok = verdict.ok if operation.guard != "off" else None
            rows, seeds = jnp.concatenate([each.changes for each in first]), [each.seeds for each in first]
            rows = rows if operation.bound is None else jnp.concatenate([rows, row_of(verdict)])
            rows = with_own(rows, [each.figures for each in first if each.figures is not None])
            # Without this XLA would see that both passes make the same values, and keep these in between.
            arrays, ok, seeds = jax.lax.optimization_barrier((arrays, ok, seeds))
        new = [
            editing(operation, *one, values, fire, seed, ok)
            for one, values, fire, seed in zip(known, arrays, given, seeds, strict=True)
        ]
        after = commit(operation, self._state, parts, self._plan, new, ok)
        return self._read(take_apart(after), touched, new, step, rows)

    def _read(self, after: Parts, touched: _Touched, new: Sequence[Arrays], step: Any, rows: Any) -> _Touched:
        remembered = touched.memory
        if self._operation.edit.takes("memory"):
            remembered = fires.remembered_by(self._operation, self._plan, new)
        return _Touched(
            {place: after.params.values[place] for place in touched.params},
            {index: after.opt_leaves[index] for index in touched.opt_leaves},
            remembered,
            noted(touched.buffer, step, rows),
        )


def _step_of(state: Any) -> Any:
    step = getattr(state, "step", None)
    if step is None:
        raise StateError(
            "Hooks that fire in graph look at `state.step`, and the state has none.",
            found=type(state).__name__,
            write="fsh.bind(..., step=step), or hooks.observe(state) in the step and hooks(step, state) after it",
        )
    return step


def _places(unit: Unit, parts: Parts, lying: Lying) -> Places:
    """Where the arrays of a unit lie: as their types tell under Explicit axes, else as was seen of the state."""
    found = []
    for place, layer in ((place, layer) for _, place, layer in unit.pieces):
        found.append(_piece(parts.params.values, lying.params, place, layer))
    for slot in (slot for slot in unit.slots if slot.offset is None):
        layer = None if slot.axis is None or slot.layer is None else Layer(slot.axis, slot.layer)
        found.append(_piece(parts.opt_leaves, lying.opt_leaves, slot.index, layer))
    return places_of(found)


def _piece(leaves: Sequence[Any], seen: Sequence[Any], place: int, layer: Layer | None) -> tuple[Any, Any]:
    """Shape and sharding of a leaf or layer."""
    leaf = leaves[place]
    sharding = _sharding(leaf, seen[place] if len(seen) == len(leaves) else None)
    return (jnp.shape(leaf), sharding) if layer is None else (layer.shape(jnp.shape(leaf)), layer.sharding(sharding))


def _sharding(leaf: Any, seen: Any) -> Any:
    if isinstance(seen, NamedSharding):
        return seen
    typed = getattr(jax.typeof(leaf), "sharding", None)
    explicit = isinstance(typed, NamedSharding) and AxisType.Explicit in typed.mesh.axis_types
    return typed if explicit else None


def check_not_empty(hooks: Sequence[Hook], observes: bool) -> None:
    """Raises if there is nothing that `in_graph` could do.

    Raises:
      HookError: that is so.
    """
    if hooks and not observes and all(map(why_on_host, hooks)):
        raise HookError(
            "None of the hooks can fire in graph.",
            found="; ".join(f"{hook.name}: {why_on_host(hook)}" for hook in hooks),
            write="state = hooks(step, state) after each step",
        )
