"""What a fire made, put back into the train state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.donation import unshared
from flax_surgery_hooks.operation import Operation, Unit, like
from flax_surgery_hooks.paths import Leaves
from flax_surgery_hooks.placement import as_before
from flax_surgery_hooks.programs import Arrays
from flax_surgery_hooks.repath import opt_state_for, repathed
from flax_surgery_hooks.restacking import never, whole_leaves, whole_slots
from flax_surgery_hooks.slots import Restart, Slot, as_abstract, restarts_of
from flax_surgery_hooks.train_state import Parts, put_back


def commit(
    operation: Operation,
    state: Any,
    parts: Parts,
    plan: Sequence[Unit],
    arrays: Sequence[Arrays],
    ok: Any,
    tx: Any = None,
    *,
    donate: bool = False,
    restart: bool = True,
) -> Any:
    """The state with new leaves and slots; all other leaves are the same objects.

    Args:
      operation: the surgery and its rules.
      state: the state that `parts` was taken from.
      parts: its parts.
      plan: the units of the fire.
      arrays: their new values.
      ok: whether the guard let them through, a boolean scalar, or None without guard.
      tx: the optimizer for other paths, by default that of the state.
      donate: whether stacked leaves of which layers were edited give their memory to the new ones, and are gone.
      restart: whether what belongs to no parameter is made anew where an edit demands it.
    """
    may_donate = unshared(state) if donate else never
    params = whole_leaves(parts, [unit.after for unit in plan], [new.params for new in arrays], may_donate)
    slots: dict[int, Any] = {}
    pieces: dict[tuple[int, str], dict[str, Any]] = {}
    for slot, path, value in whole_slots(parts, plan, arrays, lambda slot: slot_of(slot, parts), may_donate):
        if slot.offset is None:
            slots[slot.index] = value
        else:
            pieces.setdefault((slot.index, slot.group), {})[path] = value
    repaths = any(unit.other is not None for unit in plan)
    leaves = repathed(parts.params, [path for unit in plan for path in unit.paths], params) if repaths else parts.params
    olds = {slot.group: slot for unit in plan for slot in unit.slots if slot.offset is not None}
    for (index, group), by_path in pieces.items():
        slots[index] = _joined(parts, leaves, olds[group], by_path)
    restarts = _restarts(operation, parts, plan, params) if restart else ()
    if repaths:
        opt_state = opt_state_for(tx or parts.tx, leaves, parts.tx, parts.params, parts.opt_state, slots)
        opt_state = _restarted(opt_state, restarts, ok)
        return state.replace(params=jax.tree.unflatten(leaves.treedef, leaves.values), opt_state=opt_state)
    slots |= {one.index: _anew(one, parts.opt_leaves[one.index], ok) for one in restarts}
    places = {place: params[parts.params.paths[place]] for unit in plan for place in unit.places}
    return put_back(state, parts, places, slots)


def slot_of(slot: Slot, parts: Parts) -> Any:
    """The slot of a whole parameter."""
    leaf = parts.opt_leaves[slot.index]
    return leaf if slot.offset is None else piece_of(leaf, slot, parts.params.values[slot.owner])


def piece_of(leaf: Any, slot: Slot, param: Any) -> Any:
    """The slot of one parameter in a vector that holds those of all, see `optax.flatten`."""
    assert slot.offset is not None
    shape = np.shape(param)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    return jnp.reshape(leaf[slot.offset : slot.offset + math.prod(shape)], shape)


def _joined(parts: Parts, leaves: Leaves, slot: Slot, pieces: Mapping[str, Any]) -> Any:
    """The vector of all slots, with new pieces for some parameters."""
    vector = parts.opt_leaves[slot.index]
    beside = getattr(parts.tx.init, "fields", ())  # of the train state, without slots
    sizes = [
        0 if path.split("/")[0] in beside else math.prod(np.shape(leaf))
        for path, leaf in zip(parts.params.paths, parts.params.values, strict=True)
    ]
    starts = dict(zip(parts.params.paths, itertools.accumulate(sizes, initial=0), strict=False))
    held = dict(zip(parts.params.paths, sizes, strict=True))
    if isinstance(vector, jax.ShapeDtypeStruct):
        size = sum(math.prod(pieces[path].shape) if path in pieces else held[path] for path in leaves.paths)
        return jax.ShapeDtypeStruct((size,), vector.dtype)
    joined = jnp.concatenate(
        [
            jnp.ravel(pieces[path]) if path in pieces else vector[starts[path] : starts[path] + held[path]]
            for path in leaves.paths
        ]
    )
    return as_before(vector, like(joined, vector))


def restarts_at(operation: Operation, parts: Parts, plan: Sequence[Unit]) -> set[int]:
    """Places in the optimizer state of what an edit that keeps shapes makes anew."""
    same = dict(zip(parts.params.paths, parts.params.values, strict=True))
    return {one.index for one in _restarts(operation, parts, plan, same)}


def _restarts(
    operation: Operation, parts: Parts, plan: Sequence[Unit], params: Mapping[str, Any]
) -> tuple[Restart, ...]:
    """What belongs to no parameter and has to be made anew after this fire."""
    if operation.rules.only_keeps:
        return ()
    old = dict(zip(parts.params.paths, parts.params.values, strict=True))

    def reshapes(unit: Unit) -> bool:
        paths = [parts.params.paths[place] for place in unit.places]
        return unit.other is not None or any(np.shape(old[path]) != np.shape(params[path]) for path in paths)

    def due(one: Restart) -> bool:
        if one.when == "edit":
            return True
        touching = [unit for unit in plan if any(_below(one.state, slot.group) for slot in unit.slots)]
        if one.when == "reshape":
            return any(map(reshapes, touching))
        return bool(touching) and operation.rules.rule("param_diff") not in ("transport", "keep")

    return tuple(filter(due, restarts_of(parts.tx, parts.opt_state, parts.params)))


def _below(state: str, path: str) -> bool:
    """Whether a key path leads through a state; the next key begins with a bracket or a dot."""
    return path.startswith(state) and path[len(state) :][:1] in ("", "[", ".")


def _anew(one: Restart, old: Any, ok: Any) -> Any:
    if isinstance(old, jax.ShapeDtypeStruct):
        return old
    new = jnp.full(np.shape(old), one.init, as_abstract(old).dtype)
    if ok is not None:
        new = jnp.where(ok, new, old)
    return as_before(old, like(new, old))


def _restarted(opt_state: Any, restarts: Sequence[Restart], ok: Any) -> Any:
    """An optimizer state of other parameters, with some of its leaves made anew."""
    if not restarts:
        return opt_state
    items, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
    by_path = {one.path: one for one in restarts}
    names = [jax.tree_util.keystr(keys) for keys, _ in items]
    leaves = [
        _anew(by_path[name], leaf, ok) if name in by_path else leaf
        for name, (_, leaf) in zip(names, items, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)
