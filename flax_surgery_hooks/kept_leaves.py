"""What a fire touches, as it was before: read off a state, copied to the host, and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_surgery_hooks import fires, memory
from flax_surgery_hooks.committing import commit, restarts_at
from flax_surgery_hooks.donation import buffer_of, leaves_of_state
from flax_surgery_hooks.errors import StateError
from flax_surgery_hooks.layers import Layer
from flax_surgery_hooks.mirrors import Mirrors, original, viewed
from flax_surgery_hooks.operation import Operation, Unit, like, units
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.placement import off_mesh
from flax_surgery_hooks.planning import arrays_of, fire_memory
from flax_surgery_hooks.programs import Arrays
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.rules import SlotRules
from flax_surgery_hooks.slots import as_abstract, slots_of
from flax_surgery_hooks.train_state import Parts, put_back, take_apart


class Touched(NamedTuple):
    """What a fire touches; a pytree.

    Attributes:
      arrays: leaves, slots and memory of each unit.
      restarts: place in the optimizer state -> what an edit makes anew though it belongs to no parameter.
    """

    arrays: tuple[Arrays, ...]
    restarts: dict[int, Any]


class Site(NamedTuple):
    """A state as one hook sees it, and what of it the hook's fires touch.

    Attributes:
      state: the state, or a view of it.
      parts: its parts.
      operation: the hook's, which leaves the slots alone.
      plan: the units.
      touched: their values.
    """

    state: Any
    parts: Parts
    operation: Operation
    plan: list[Unit]
    touched: Touched


def site_of(operation: Operation, state: Any, name: str) -> Site:
    """What a fire of an operation touches in a state, concrete or abstract, that is seen as the operation sees it.

    Raises:
      SelectionError, SlotError, StateError: as in a fire.
    """
    parts = take_apart(state)
    # Slots that stay where they are in a fire are put back with their leaf all the same.
    keeping = dataclasses.replace(
        operation, rules=SlotRules("keep"), edit=dataclasses.replace(operation.edit, edit_slots=None)
    )
    plan = units(keeping, parts.params, slots_of(parts.tx, parts.opt_state, parts.params), parts.opt_leaves)
    remembered = memory.held(state, name, operation)
    arrays = tuple(arrays_of(unit, parts, fire_memory(operation, unit, remembered)) for unit in plan)
    restarts = {index: parts.opt_leaves[index] for index in sorted(restarts_at(operation, parts, plan))}
    return Site(state, parts, keeping, plan, Touched(arrays, restarts))


def kept_of(before: Site, after: Any, *, host: bool) -> list[Any]:
    """The values of what a fire touched, before it, as nobody will take their memory.

    Args:
      before: the state before the fire.
      after: the state after it.
      host: whether they go to the host, which waits for them.
    """
    leaves = jax.tree.leaves(before.touched)
    if host:
        return list(map(hosted, leaves))
    # The next train step may take the memory of all that the new state holds.
    shared = {key for leaf in leaves_of_state(after) for key in _memory(leaf)}
    return [_own(leaf, not shared.isdisjoint(_memory(leaf))) for leaf in leaves]


def _memory(leaf: Any) -> tuple[Any, ...]:
    """What arrays that share their memory have in common; waits for nothing.

    Arrays on their way come of a compiled program, which gives each its own memory: only the very object is shared.
    """
    there = isinstance(leaf, jax.Array) and not leaf.is_deleted()
    if not there or not leaf.is_ready():
        return (id(leaf),)
    return (id(leaf), ("buffer", buffer_of(leaf)))


def _own(leaf: Any, is_shared: bool) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()  # a trainer may write into it
    return jnp.copy(leaf) if is_shared and isinstance(leaf, jax.Array) else leaf


def put(hook: Hook, state: Any, leaves: Sequence[Any], mirrors: Mirrors) -> Any:
    """The state with kept leaves in the place of what the hook's fires touch, as these lie now.

    Args:
      hook: whose fire it was.
      state: the state now.
      leaves: what `kept_of` returned.
      mirrors: fields of the state that mirror the parameters.

    Raises:
      StateError: the state has other leaves now, or the kept ones were deleted.
    """
    with off_mesh(state):
        held, _ = viewed(state, mirrors, hook)
        now = site_of(hook.operation, held, hook.name)
        _check(now, leaves)
        current, treedef = jax.tree.flatten(now.touched)
        old = jax.tree.unflatten(treedef, list(map(_placed, leaves, current)))
        new = commit(now.operation, held, now.parts, now.plan, old.arrays, None, restart=False)
        if old.restarts:
            new = put_back(new, take_apart(new), {}, old.restarts)
        if hook.operation.edit.takes("memory"):
            new = memory.put(new, hook.name, fires.remembered_by(hook.operation, now.plan, old.arrays))
        return original(new)


def _check(now: Site, leaves: Sequence[Any]) -> None:
    current = jax.tree.leaves(now.touched)
    paths = listed(path for unit in now.plan for path in unit.paths)
    if list(map(_shape, leaves)) != list(map(_shape, current)):
        raise StateError(
            "What was kept of the leaves does not fit the state any more.",
            path=paths,
            found=f"{len(leaves)} arrays kept, {len(current)} in the state, or of other shapes",
            write="hooks.undo(state) with a state of the same model and optimizer",
        )
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise StateError(
            "What was kept of the leaves has been deleted.",
            path=paths,
            found="arrays whose memory was donated",
            write="rollback=fsh.Rollback(..., to='host'), or a train step that is given only what the hooks returned",
        )


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, HostCopy) else tuple(np.shape(leaf)), _dtype(leaf)


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def _placed(leaf: Any, now: Any) -> Any:
    """A kept leaf where its successor lies, and committed only if that is."""
    leaf = leaf.array() if isinstance(leaf, HostCopy) else leaf
    if not isinstance(now, jax.Array) or not isinstance(leaf, jax.Array):
        return leaf
    if now.committed:
        same = leaf.committed and leaf.sharding == now.sharding
        return leaf if same else like(jax.device_put(leaf, now.sharding), now)
    return like(jnp.asarray(np.asarray(leaf)), now) if leaf.committed else leaf


class HostCopy:
    """An array on the host: of each part that this process has, one copy.

    Attributes:
      shape: of the whole array.
      dtype: likewise.
    """

    __slots__ = ("_committed", "_parts", "_sharding", "_weak", "dtype", "shape")

    def __init__(self, leaf: jax.Array):
        self.shape, self.dtype = leaf.shape, leaf.dtype
        self._sharding, self._committed, self._weak = leaf.sharding, leaf.committed, leaf.weak_type
        parts = {str(shard.index): shard.data for shard in leaf.addressable_shards}
        # A copy: on CPU the host would else look at the very memory that a train step may take.
        self._parts = {index: np.array(part) for index, part in jax.device_get(parts).items()}

    def array(self) -> jax.Array:
        """The array, where it was."""
        if not self._committed:
            value = jnp.asarray(next(iter(self._parts.values())))
        else:
            value = jax.make_array_from_callback(self.shape, self._sharding, lambda index: self._parts[str(index)])
        return like(value, jax.ShapeDtypeStruct(self.shape, self.dtype, weak_type=self._weak))


def hosted(leaf: Any) -> Any:
    """A leaf on the host; keys, which are small, stay where they are."""
    if not isinstance(leaf, jax.Array):
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
    return jnp.copy(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else HostCopy(leaf)


def described(leaves: Sequence[Any]) -> list[list[Any]]:
    """Shape and dtype of kept leaves, as JSON holds them."""
    return [[list(shape), dtype] for shape, dtype in map(_shape, leaves)]


def abstract(site: Site) -> list[Any]:
    """Shape, dtype and sharding of what a fire touches, as it lies in the state."""
    leaves, treedef = jax.tree.flatten(site.touched)
    places = jax.tree.unflatten(treedef, [_sharding(leaf) for leaf in leaves])
    known = {id(unit): one for unit, one in zip(site.plan, places.arrays, strict=True)}
    arrays = [_places(site.parts, unit, known[id(unit)]) for unit in site.plan]
    flat = jax.tree.leaves(Touched(tuple(arrays), places.restarts), is_leaf=lambda node: isinstance(node, _Place))
    return [_abstract(leaf, place.sharding) for leaf, place in zip(leaves, flat, strict=True)]


class _Place:
    """A sharding as a leaf of trees; None, too."""

    def __init__(self, sharding: Any):
        self.sharding = sharding


def _sharding(leaf: Any) -> _Place:
    return _Place(getattr(leaf, "sharding", None))


def _places(parts: Parts, unit: Unit, known: Arrays) -> Arrays:
    """Where the leaves and slots of a unit lie; of layers and pieces the whole of which they are a part tells."""
    params = [
        own if layer is None else _Place(layer.sharding(_sharding(parts.params.values[place]).sharding))
        for own, (_, place, layer) in zip(known.params, unit.pieces, strict=True)
    ]
    slots = []
    for own, slot in zip(known.slots, unit.slots, strict=True):
        whole = _sharding(parts.opt_leaves[slot.index]).sharding
        if slot.offset is not None:
            whole = NamedSharding(whole.mesh, PartitionSpec()) if isinstance(whole, NamedSharding) else whole
            slots.append(_Place(whole))
        elif slot.axis is not None and slot.layer is not None:
            slots.append(_Place(Layer(slot.axis, slot.layer).sharding(whole)))
        else:
            slots.append(own)
    return Arrays(tuple(params), tuple(slots), known.memory)


def _abstract(leaf: Any, sharding: Any) -> Any:
    shape = as_abstract(leaf)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def overlap(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether leaves, or layers of them, have some in common.

    >>> overlap(("a/kernel[3]",), ("a/kernel",)), overlap(("a/kernel[3]",), ("a/kernel[2]", "b"))
    (True, False)
    """
    theirs: Mapping[str, None] = dict.fromkeys(other)
    wholes = {_whole(path) for path in other if path != _whole(path)}
    return any(path in theirs or _whole(path) in theirs or path in wholes for path in one)


def _whole(path: str) -> str:
    """The leaf of a layer; any other path itself."""
    return path[: path.rindex("[")] if path.endswith("]") and "[" in path else path
