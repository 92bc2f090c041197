"""The dry run behind `SurgeryHooks.plan`: fires foreseen by `jax.eval_shape`, once for each hook and structure.

Between two fires that change the structure of the state all fires of a hook do the same, so that only the former are
replayed, however many there are of the others.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks import deriving, memory, optimizer_edits
from flax_surgery_hooks.ahead import behind_reshapes, may_change
from flax_surgery_hooks.committing import commit
from flax_surgery_hooks.errors import SurgeryError, located
from flax_surgery_hooks.making import bind_inputs
from flax_surgery_hooks.mirrors import Mirrors, original, viewed
from flax_surgery_hooks.operate import needs_key
from flax_surgery_hooks.operation import Operation, Unit, fire_for, units
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.plan import Plan, PlannedLeaf, PlannedSlot, Row, Shape
from flax_surgery_hooks.planning import arrays_of, fire_memory, inputs_of_leaves, inputs_of_state, plan_units
from flax_surgery_hooks.programs import Arrays, Programs, shapes_of
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.slots import Slot, as_abstract, slots_of
from flax_surgery_hooks.structure import Reshape, shapes
from flax_surgery_hooks.surgery import RESERVED, describe
from flax_surgery_hooks.train_state import Parts, take_apart


class Structure(NamedTuple):
    """An abstract train state, and all of it that decides what a fire does to shapes."""

    state: Any
    key: Hashable


class Foreseen(NamedTuple):
    """What a fire of a hook does to a structure.

    Attributes:
      after: the structure after it.
      leaves: its leaves.
      optimizer: see `plan.Row`.
      notes: likewise.
    """

    after: Structure
    leaves: tuple[PlannedLeaf, ...]
    optimizer: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()

    def noting(self, note: str) -> Foreseen:
        """The same, with one more note."""
        return self._replace(notes=(*self.notes, note))


class Epoch(NamedTuple):
    """The fires between two that change the structure: those after `begin`, up to and with `end`.

    Attributes:
      begin: step of a fire, and the place of its hook in the order of hooks.
      end: likewise.
      structure: which they meet.
    """

    begin: tuple[int, int]
    end: tuple[int, int]
    structure: Structure

    def steps(self, place: int) -> tuple[int, int]:
        """After which step, and up to which, fires of the hook at this place belong to it."""
        first = self.begin[0] - (place > self.begin[1])
        return first, self.end[0] - (place > self.end[1])


@dataclass
class Planner:
    """Plans for some hooks.

    Attributes:
      hooks: in the order in which they fire at one step.
      inputs: the trainer's inputs; only shapes matter of what is made of arrays.
      seed: of the keys that `init_memory` may ask for.
      mirrors: fields of the state that mirror the parameters.
    """

    hooks: Sequence[Hook]
    inputs: Mapping[str, Any]
    seed: int
    mirrors: Mirrors
    _seen: dict[tuple[str, Hashable], Foreseen] = field(default_factory=dict)

    def plan(self, state: Any, start: int, after: int, upto: int) -> Plan:
        """The plan of all fires in (after, upto].

        Args:
          state: concrete or abstract; only its structure and shapes matter.
          start: the step that it holds.
          after: the step before the first that is planned.
          upto: the last one.

        Raises:
          SurgeryError: what a hook would raise, with its name and the step at which it is first due.
        """
        first = self._abstract(state)
        later = behind_reshapes(self.hooks, after)
        for hook in self.hooks:  # as the first call does, also those that are due much later
            with contextlib.suppress(*[SurgeryError] if hook.name in later else []):
                self._foreseen(hook, first, hook.next_possible(after))
        epochs = list(self._epochs(first, after, upto))
        rows = [row for epoch in epochs for row in self._rows(epoch)]
        busy = {row.hook for row in rows}
        last = epochs[-1].structure
        idle = [
            self._idle(hook, last if hook.name in later else first, (after + 1, upto))
            for hook in self.hooks
            if hook.name not in busy
        ]
        params, opt_state = zip(_counts(first.state), _counts(epochs[-1].structure.state), strict=True)
        return Plan(start, upto, tuple(hook.name for hook in self.hooks), (*rows, *idle), params, opt_state)

    def _abstract(self, state: Any) -> Structure:
        take_apart(state)  # raises where a part is missing
        names = ["params", "opt_state", "surgery", *(name for name, _ in self.mirrors.fields)]
        names += [name for hook in self.hooks for name in hook.operation.fields]
        held = {name: getattr(state, name) for name in dict.fromkeys(names) if hasattr(state, name)}
        return self._structure(state.replace(**jax.tree.map(as_abstract, held)))

    def _structure(self, state: Any) -> Structure:
        """The structure of an abstract state, with a memory for every surgery that remembers, as `init` makes it."""
        named = [(hook.name, hook.operation) for hook in self.hooks]
        if any(operation.edit.init_memory is not None for _, operation in named):

            def made(params: Any, surgery: Any) -> Any:
                held = state.replace(params=params, surgery=surgery) if hasattr(state, "surgery") else state
                return memory.fitted(held, named, self.seed, anew=True).surgery

            held = getattr(state, "surgery", None)
            state = state.replace(surgery=jax.eval_shape(made, state.params, held))
        names = ("params", "opt_state", "surgery", *(name for name, _ in self.mirrors.fields))
        arrays = [getattr(state, name, None) for name in names]
        return Structure(state, (shapes_of(arrays), id(state.tx)))

    def _epochs(self, first: Structure, after: int, upto: int) -> Iterator[Epoch]:
        structure, begin = first, (after, len(self.hooks))
        for step, place in self._structural(after, upto):
            foreseen = self._foreseen(self.hooks[place], structure, step)
            if foreseen.after.key != structure.key:
                yield Epoch(begin, (step, place), structure)
                structure, begin = foreseen.after, (step, place)
        yield Epoch(begin, (upto, len(self.hooks)), structure)

    def _structural(self, after: int, upto: int) -> Iterator[tuple[int, int]]:
        """Steps and places of the fires that may change the structure, in order."""

        def of(place: int, hook: Hook) -> Iterator[tuple[int, int]]:
            planned = hook.when.planned
            return iter(()) if planned is None else ((step, place) for step in planned.due_steps(after, upto))

        return heapq.merge(*(of(place, hook) for place, hook in enumerate(self.hooks) if may_change(hook)))

    def _rows(self, epoch: Epoch) -> list[Row]:
        """The rows of an epoch in the order of their first steps, then those that values decide."""
        planned, watched = [], []
        for place, hook in enumerate(self.hooks):
            after, upto = epoch.steps(place)
            steps = hook.planned_steps(after, upto)
            if steps:
                planned.append(self._planned(hook, epoch.structure, steps))
            if hook.when.watched and upto > after:
                watched.append(self._watched(hook, epoch.structure, (after + 1, upto)))
        return sorted(planned, key=lambda row: row.steps[0]) + watched

    def _planned(self, hook: Hook, structure: Structure, steps: tuple[int, ...]) -> Row:
        foreseen = self._foreseen(hook, structure, steps[0])
        if not steps[0]:
            foreseen = foreseen.noting("step 0 is before training: it fires in hooks(0, state)")
        span = (steps[0], steps[-1])
        return _row(hook, structure, foreseen, when=repr(hook.when.planned), span=span, steps=steps)

    def _watched(self, hook: Hook, structure: Structure, span: tuple[int, int]) -> Row:
        foreseen = self._foreseen(hook, structure, None)
        if foreseen.after.key != structure.key:
            foreseen = foreseen.noting("whether it fires is not known, so what is later is planned as if it did not")
        when = " | ".join(map(repr, hook.when.watched))
        return _row(hook, structure, foreseen, when=when, span=span, watched=True)

    def _idle(self, hook: Hook, structure: Structure, span: tuple[int, int]) -> Row:
        foreseen = self._foreseen(hook, structure, hook.next_possible(span[0] - 1))
        when = repr(hook.when)
        return _row(hook, structure, foreseen.noting(f"not due by step {span[1]}: {when}"), when=when, span=span)

    def _foreseen(self, hook: Hook, structure: Structure, step: int | None) -> Foreseen:
        known = (hook.name, structure.key)
        if known not in self._seen:
            with located(hook=hook.name, step=step):
                self._seen[known] = self._foresee(hook, structure)
        return self._seen[known]

    def _foresee(self, hook: Hook, structure: Structure) -> Foreseen:
        held, reshape = viewed(structure.state, self.mirrors, hook)
        edit = hook.operation.edit
        missing = [name for name in edit.needs if name not in self.inputs and name not in RESERVED]
        if missing:
            return self._unforeseen(hook, structure, held, missing)
        operation, arrays = bind_inputs(hook.operation, self.inputs)
        arrays = jax.tree.map(as_abstract, arrays)
        key = _abstract_key() if needs_key(operation) else None
        at = jax.ShapeDtypeStruct((), jnp.int32)
        arrays = inputs_of_state(operation, structure.state, key, 0, arrays, deriving.Abstractly.of_state)
        if edit.edit_optimizer is not None:
            return self._switched(operation, structure, key, arrays, reshape)
        parts = take_apart(held)
        remembered = memory.held(held, hook.name, operation)
        reshape.check(held)
        arrays = inputs_of_leaves(operation, parts, remembered, key, at, arrays, deriving.Abstractly.of_leaves)
        plan = plan_units(operation, parts, key, arrays, remembered, reshape.tx)
        reshape.check_paths(held, plan)
        programs = Programs(operation)
        before = [arrays_of(unit, parts, fire_memory(operation, unit, remembered)) for unit in plan]
        after = [
            programs.foresee(unit, one, fire_for(unit, key, at, arrays), may_reshape=reshape.declared)
            for unit, one in zip(plan, before, strict=True)
        ]
        leaves = tuple(leaf for each in zip(plan, before, after, strict=True) for leaf in _leaves(operation, *each))
        if not any(leaf.change for leaf in leaves):
            return Foreseen(structure, leaves)
        return Foreseen(self._structure(_committed(operation, held, parts, plan, after, reshape)), leaves)

    def _unforeseen(self, hook: Hook, structure: Structure, held: Any, missing: Sequence[str]) -> Foreseen:
        """What can be told of a fire whose inputs are not there: its leaves and slots as they are."""
        asks = f"it asks for {listed(missing)}, which is not given"
        note = f"{asks}: its new shapes are not foreseen" if may_change(hook) else asks
        parts = take_apart(held)
        blind = hook.operation.rules.only_keeps and hook.operation.edit.edit_slots is None
        slots = {} if blind else slots_of(parts.tx, parts.opt_state, parts.params)
        plan = units(hook.operation, parts.params, slots, parts.opt_leaves)
        arrays = [arrays_of(unit, parts) for unit in plan]
        each = [
            leaf for unit, one in zip(plan, arrays, strict=True) for leaf in _leaves(hook.operation, unit, one, one)
        ]
        return Foreseen(structure, tuple(each), notes=(note,))

    def _switched(
        self, operation: Operation, structure: Structure, key: Any, inputs: dict[str, Any], reshape: Reshape
    ) -> Foreseen:
        state = structure.state
        ahead = optimizer_edits.look_ahead(operation, state, key, inputs, reshape)
        params = take_apart(state).params
        places = operation.selection.resolve(params)
        held = [(params.paths[place], _shape(params.values[place])) for place in places]
        leaves = tuple(PlannedLeaf(path, shape, shape) for path, shape in held)
        if ahead.tx is state.tx:
            return Foreseen(structure, leaves)
        return Foreseen(self._structure(ahead), leaves, (_named(state.opt_state), _named(ahead.opt_state)))


@functools.lru_cache(maxsize=1)
def _abstract_key() -> Any:
    return jax.eval_shape(functools.partial(jax.random.key, impl="threefry2x32"), np.uint32(0))


def _row(
    hook: Hook,
    structure: Structure,
    foreseen: Foreseen,
    *,
    when: str,
    span: tuple[int, int],
    steps: tuple[int, ...] = (),
    watched: bool = False,
) -> Row:
    before, after = _counts(structure.state), _counts(foreseen.after.state)
    return Row(
        hook=hook.name,
        steps=steps,
        when=when,
        watched=watched,
        span=span,
        surgery=str(describe(hook.operation.edit.function)["name"]),
        rule=hook.operation.rules.describe(),
        leaves=foreseen.leaves,
        optimizer=foreseen.optimizer,
        params=(before[0], after[0]),
        opt_state=(before[1], after[1]),
        notes=foreseen.notes,
    )


def _committed(
    operation: Operation, held: Any, parts: Parts, plan: Sequence[Unit], after: Sequence[Arrays], reshape: Reshape
) -> Any:
    state = commit(operation, held, parts, plan, after, None, reshape.tx)
    if shapes(state.params) != shapes(held.params):
        state = reshape.replaced(state)
    return original(state)


def _leaves(operation: Operation, unit: Unit, before: Arrays, after: Arrays) -> Iterator[PlannedLeaf]:
    """The leaves of a unit with their slots, those that it adds last."""
    old = dict(zip(unit.paths, map(_shape, before.params), strict=True))
    new = dict(zip(unit.after.paths, map(_shape, after.params), strict=True))
    of_leaf: dict[str, list[PlannedSlot]] = {path: [] for path in (*old, *new)}
    origins = unit.origins()
    for slot, origin, value in zip(unit.after.slots, origins, after.slots, strict=True):
        held = None if origin is None else _shape(before.slots[origin])
        of_leaf[unit.after.path(slot)].append(_planned(operation, slot, held, _shape(value)))
    for index, slot in enumerate(unit.slots):
        if index not in origins:
            of_leaf[unit.path(slot)].append(_planned(operation, slot, _shape(before.slots[index]), None))
    for path, slots in of_leaf.items():
        yield PlannedLeaf(path, old.get(path), new.get(path), tuple(slots))


def _planned(operation: Operation, slot: Slot, before: Shape | None, after: Shape | None) -> PlannedSlot:
    rule = operation.rules.rule(slot.kind)
    return PlannedSlot(slot.name, slot.kind, getattr(rule, "__name__", str(rule)), before, after)


def _shape(leaf: Any) -> Shape:
    held = as_abstract(leaf)
    return Shape(tuple(held.shape), str(held.dtype))


def _counts(state: Any) -> tuple[int, int]:
    """How many elements the parameters and the optimizer state have."""
    params, opt_state = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state)
    )
    return params, opt_state


def _named(opt_state: Any) -> str:
    """The classes of an optimizer's states, in order."""
    found: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            found.append(type(node).__name__)
        return False

    jax.tree.leaves(opt_state, is_leaf=visit)
    return " + ".join(name for name in dict.fromkeys(found) if name != "EmptyState") or "EmptyState"
