"""Which leaves and slots a fire touches, and what paths they have after it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks import deriving
from flax_surgery_hooks.committing import slot_of
from flax_surgery_hooks.errors import RuleError, SlotError, StateError, StructureError
from flax_surgery_hooks.layers import Layer, taken
from flax_surgery_hooks.operation import Fire, Operation, Side, Unit, compute_dtype, fire_for, units
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.perform import call_unit
from flax_surgery_hooks.programs import Arrays
from flax_surgery_hooks.repath import initial_opt_state, repathed
from flax_surgery_hooks.slots import Slot, as_abstract, slots_of
from flax_surgery_hooks.train_state import Parts


def plan_units(
    operation: Operation, parts: Parts, key: Any, inputs: dict[str, Any], memory: Any = (), tx: Any = None
) -> list[Unit]:
    """Which leaves and slots an operation touches, and what becomes of them.

    Args:
      operation: the surgery and its rules.
      parts: the state's.
      key: the key of the fire.
      inputs: the trainer's arrays for it; only their shapes matter here.
      memory: what the surgery remembers.
      tx: the optimizer for other paths, by default that of the state.

    Raises:
      SelectionError, SlotError, StateError, StructureError: as their names say.
    """
    blind = operation.rules.only_keeps and operation.edit.edit_slots is None
    slots = {} if blind else slots_of(parts.tx, parts.opt_state, parts.params)
    plan = units(operation, parts.params, slots, parts.opt_leaves)
    edits_one = operation.edit.edit_slots is not None and not operation.edit.many
    if edits_one and not any(unit.slots for unit in plan):
        raise SlotError(
            f"The surgery {operation.edit.name} edits optimizer slots, and the selected leaves have none.",
            found=listed(path for unit in plan for path in unit.paths),
            write="an optimizer with moments, or leaves that it updates",
        )
    if not operation.edit.many:
        return plan
    fires = [fire_for(unit, key, jnp.int32(0), inputs, fire_memory(operation, unit, memory)) for unit in plan]
    return [_with_paths_after(operation, unit, parts, fire, tx) for unit, fire in zip(plan, fires, strict=True)]


def inputs_of_state(
    operation: Operation, state: Any, key: Any, step: Any, inputs: dict[str, Any], run: deriving.Run
) -> dict[str, Any]:
    """The inputs, with what its surgery makes of the whole state."""
    if not operation.edit.derived:
        return inputs
    return deriving.from_state(operation, state, {**inputs, "key": key, "step": _int32(step)}, run)


def inputs_of_leaves(
    operation: Operation, parts: Parts, remembered: Any, key: Any, step: Any, inputs: dict[str, Any], run: deriving.Run
) -> dict[str, Any]:
    """The inputs that an edit is given, with what its surgery makes of the selected leaves before it."""
    if not operation.edit.derived:
        return inputs
    leaves: dict[str, Any] = {}
    if operation.edit.many:
        (unit,) = units(operation, parts.params, {})
        leaves = dict(zip(unit.paths, leaves_of(unit, parts), strict=True))
    return deriving.from_leaves(operation, leaves, remembered, {**inputs, "key": key, "step": _int32(step)}, run)


def shapes_only(tree: Any) -> Any:
    """A tree of arrays or tracers as shapes and dtypes, without shardings."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), tree)


def _int32(step: Any) -> Any:
    return (
        jax.ShapeDtypeStruct((), jnp.int32) if isinstance(step, jax.ShapeDtypeStruct) else jnp.asarray(step, jnp.int32)
    )


def fire_memory(operation: Operation, unit: Unit, memory: Any) -> Any:
    """What a surgery remembers of one unit, () if a fire does not ask for it; errors as for `memory_of`."""
    return memory_of(operation, unit, memory) if operation.edit.takes("memory") else ()


def memory_of(operation: Operation, unit: Unit, memory: Any) -> Any:
    """What a surgery remembers of one unit: that of its leaf, or all of it in the form that takes all leaves.

    Raises:
      StateError: it remembers, but not of this leaf.
    """
    if operation.edit.init_memory is None:
        return ()
    if operation.edit.many:
        return memory
    if unit.paths[0] not in memory:
        raise StateError(
            f"The surgery {operation.edit.name} remembers nothing of this leaf.",
            path=unit.paths[0],
            found=f"memory of {listed(memory)}",
            write="state = hooks.init(state) with the selection that is used",
        )
    return memory[unit.paths[0]]


def arrays_of(unit: Unit, parts: Parts, memory: Any = ()) -> Arrays:
    """The values of a unit's leaves and slots, and what is remembered of them."""
    return Arrays(
        leaves_of(unit, parts),
        tuple(_value(parts, slot) for slot in unit.slots),
        memory,
    )


def leaves_of(unit: Unit, parts: Parts) -> tuple[Any, ...]:
    """The values of a unit's leaves."""
    values = parts.params.values
    return tuple(values[place] if layer is None else taken(values[place], layer) for _, place, layer in unit.pieces)


def _value(parts: Parts, slot: Slot) -> Any:
    leaf = slot_of(slot, parts)
    return leaf if slot.axis is None or slot.layer is None else taken(leaf, Layer(slot.axis, slot.layer))


def _with_paths_after(operation: Operation, unit: Unit, parts: Parts, fire: Fire, tx: Any) -> Unit:
    """The unit, with its leaves and slots after an edit that adds or removes some."""
    held = dict(zip(unit.paths, map(as_abstract, leaves_of(unit, parts)), strict=True))
    wide = {path: jax.ShapeDtypeStruct(leaf.shape, compute_dtype(leaf.dtype)) for path, leaf in held.items()}
    # Shapes alone: what is made of the leaves beforehand lies under Auto axes, and a state need not.
    new = jax.eval_shape(lambda leaves, fire: call_unit(operation, unit, leaves, fire).leaves, wide, shapes_only(fire))
    if set(new) == set(unit.paths):
        return unit
    if operation.edit.edit_slots is not None:
        raise StructureError(
            f"{operation.edit.name} edits the slots of its leaves, and so can neither add nor remove leaves.",
            found=f"{listed(unit.paths)} -> {listed(new)}",
            write="without edit_slots, and with opt_state=, or an edit that returns the paths it was given",
        )
    if unit.layers:
        raise StructureError(
            "Layers of a stacked leaf can neither be added nor removed, nor can leaves beside them.",
            found=f"{listed(unit.paths)} -> {listed(new)}",
            write="whole leaves in the selection, or an edit that returns the paths it was given",
        )
    dtypes = {path: held[path].dtype if path in held else _dtype(leaf.dtype, held) for path, leaf in new.items()}
    made = {path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in new.items()}
    params = repathed(parts.params, unit.paths, made)
    # Leaves stand in their own order in the unit: that of the surgery's call.
    paths = tuple(new)
    places = tuple(params.paths.index(path) for path in paths)
    if operation.rules.only_keeps:  # then nothing is known of the slots
        raise RuleError(
            "Slots cannot be kept: the edit adds or removes leaves.",
            found=f"{listed(unit.paths)} -> {listed(paths)}",
            write="opt_state='carry', 'transport' or 'reset'",
        )
    tx = parts.tx if tx is None else tx
    opt_state = initial_opt_state(tx, params)
    found = slots_of(tx, opt_state, params)
    slots = tuple(slot for place in places for slot in found.get(place, ()))
    leaves = jax.tree.leaves(opt_state)
    kinds = (tuple(dtypes[path] for path in paths), tuple(leaves[slot.index].dtype for slot in slots))
    return Unit(unit.paths, unit.places, unit.slots, other=Side(paths, places, slots, kinds))


def _dtype(dtype: Any, held: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """The dtype of an added leaf: as returned, but float32 means that of its neighbours, which were widened to it."""
    floats = {leaf.dtype for leaf in held.values() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if dtype == jnp.float32 and len(floats) == 1 and compute_dtype(next(iter(floats))) == jnp.float32:
        return floats.pop()
    return dtype
