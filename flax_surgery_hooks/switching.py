"""Another optimizer in the middle of a run: which of its slots the old one can fill, and with what factor."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from flax_surgery_hooks.checks import concrete
from flax_surgery_hooks.errors import StateError, shorten
from flax_surgery_hooks.operation import compute_dtype, like
from flax_surgery_hooks.optimizer_edits import Optimizer
from flax_surgery_hooks.paths import KeyPath
from flax_surgery_hooks.placement import as_before, auto_axes, beside, like_neighbours, out_sharding, relabelled
from flax_surgery_hooks.slot_gain import ORDER, Response, responses
from flax_surgery_hooks.slots import Slot, as_abstract, owners_of, slots_of

COUNTS = ("count", "count_m2", "gradient_step", "step", "step_count", "t")
"""Fields of optax states that count updates."""
PERIODIC = ("ApplyEvery", "GaLoreState", "ReduceLROnPlateauState")
"""States whose count says where in a period of their own they are, at whose start they fill what starts empty."""


class Source(NamedTuple):
    """Where a leaf of the new state comes from.

    Attributes:
      place: that of the old leaf.
      name: its class and field.
      factor: what it is multiplied by.
    """

    place: int
    name: str
    factor: float


def switch(optimizer: Optimizer, tx: Any, *, carry: bool, count: str) -> Optimizer:
    """The same parameters under another optimizer.

    Args:
      optimizer: the old one.
      tx: the new transformation.
      carry: whether slots are carried over, where kinds match and sizes are known.
      count: "carry" or "restart".

    Raises:
      StateError: `tx.init` fails on the parameters.
      SlotError: a state of unknown meaning, in the old or the new optimizer.
    """
    leaves = optimizer.leaves
    made = _abstract(tx, optimizer.params)
    new_leaves, treedef = jax.tree.flatten(made)
    slots = slots_of(tx, made, leaves) if carry else {}
    sources = _sources(optimizer, tx, made, slots) if carry else {}
    counts = _counts(optimizer.opt_state, made) if count == "carry" else {}
    old = jax.tree.leaves(optimizer.opt_state)
    values = _carried(old, new_leaves, sources) | _counted(old, new_leaves, counts)
    if count == "carry" and _only_settings_differ(optimizer.opt_state, made, slots, sources):
        values = _integers(old, new_leaves) | values
    missing = [index for index in range(len(new_leaves)) if index not in values]
    values |= zip(missing, _initialised(tx, optimizer.params, made, missing), strict=True)
    opt_state = jax.tree.unflatten(treedef, [values[index] for index in range(len(new_leaves))])
    return optimizer.replace(tx=tx, opt_state=opt_state, detail=_told(slots, sources, made, counts))


def _abstract(tx: Any, params: Any) -> Any:
    try:
        return jax.eval_shape(tx.init, jax.tree.map(as_abstract, params))
    except Exception as error:
        raise StateError(
            f"`tx.init` of the new optimizer fails on the parameters: {type(error).__name__}: {shorten(error, 200)}",
            write="SwitchOptimizer(tx) with an optimizer for these parameters",
        ) from error


# Slots.


def _sources(optimizer: Optimizer, tx: Any, made: Any, slots: Mapping[int, tuple[Slot, ...]]) -> dict[int, Source]:
    """Place of a leaf of the new state -> the old slot that it takes."""
    leaves, held = optimizer.leaves, optimizer.slots
    sizes = responses(tx, made, leaves, slots)
    old_sizes = responses(optimizer.tx, optimizer.opt_state, leaves, held)
    shapes, old_shapes = (list(map(jnp.shape, jax.tree.leaves(state))) for state in (made, optimizer.opt_state))
    found = {}
    for owner, of_leaf in slots.items():
        for slot in of_leaf:
            old = _match(slot, held.get(owner, ()) if slot.kind in ORDER else ())
            # A vector that holds the slots of all parameters goes as a whole.
            if old is None or (shapes[slot.index], slot.offset) != (old_shapes[old.index], old.offset):
                continue
            factor = _factor(old_sizes.get(old.group), sizes.get(slot.group), old.name == slot.name)
            if factor is not None:
                found[slot.index] = Source(old.index, old.name, factor)
    return found


def _match(slot: Slot, held: Sequence[Slot]) -> Slot | None:
    """The old slot of the same kind, of several the one at the same place, of the same name, or of the same field."""
    alike = [old for old in held if old.kind == slot.kind]

    def field(slot: Slot) -> str:
        return slot.name.rpartition(".")[2]

    narrower = (
        [old for old in alike if (old.group, old.name) == (slot.group, slot.name)],
        [old for old in alike if old.name == slot.name],
        [old for old in alike if field(old) == field(slot)],
        alike,
    )
    return next((matches[0] for matches in narrower if len(matches) == 1), None)


def _factor(old: Response | None, new: Response | None, same_name: bool) -> float | None:
    """What an old slot is multiplied by to be a new one; None if that is not known."""
    if old is None or new is None:
        return None
    if same_name and old.like(new):
        return 1.0
    if old.gain is None or new.gain is None:
        return None
    return new.gain / old.gain


def _carried(old: Sequence[Any], new: Sequence[Any], sources: Mapping[int, Source]) -> dict[int, Any]:
    used: Counter[int] = Counter()
    values = {}
    for index, source in sources.items():
        value = old[source.place]
        if source.factor != 1.0:
            value = jnp.asarray(value)
            value = value.astype(compute_dtype(value.dtype)) * source.factor
        elif used[source.place]:
            value = jnp.copy(value)  # two leaves in one buffer could not be donated
        used[source.place] += 1
        values[index] = _typed(value, new[index])
    return values


def _typed(value: Any, made: Any) -> Any:
    """A value in the dtype and weak type that `tx.init` makes; the same object where it has these."""
    held = as_abstract(value)
    same = held.dtype == made.dtype and getattr(value, "weak_type", False) == made.weak_type
    return value if same and isinstance(value, jax.Array) else like(value, made)


# Counts.


def _counts(old: Any, made: Any) -> dict[int, tuple[int, ...]]:
    """Place of a count in the new state -> places of the old ones of which it is the largest.

    Those of states of the same class if there is one, else all.
    """
    held = _counters(old)
    found = {}
    for index, state in _counters(made).items():
        same = [other for other, kind in held.items() if kind is state]
        if same or held:
            found[index] = tuple(same[:1] or held)
    return found


def _counters(opt_state: Any) -> dict[int, type]:
    """Place of each count -> class of the state that it is in."""
    found = {}
    for index, (keys, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        is_integer = jnp.shape(leaf) == () and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
        if is_integer and keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name in COUNTS:
            state = _holder(opt_state, keys)
            if state.__name__ not in PERIODIC:
                found[index] = state
    return found


def _holder(tree: Any, keys: KeyPath) -> type:
    """The class of what has the leaf of this path as a field."""
    for key in keys[:-1]:
        match key:
            case GetAttrKey(name=name):
                tree = getattr(tree, name)
            case SequenceKey(idx=place) | DictKey(key=place):
                tree = tree[place]
            case _:
                return object
    return type(tree)


def _counted(old: Sequence[Any], new: Sequence[Any], counts: Mapping[int, tuple[int, ...]]) -> dict[int, Any]:
    used: set[int] = set()
    values = {}
    for index, places in counts.items():
        value = functools.reduce(jnp.maximum, [jnp.asarray(old[place]) for place in places])
        if len(places) == 1:
            value = jnp.copy(value) if places[0] in used else old[places[0]]
            used.update(places)
        values[index] = _typed(value, new[index])
    return values


def _only_settings_differ(
    old: Any, made: Any, slots: Mapping[int, tuple[Slot, ...]], sources: Mapping[int, Source]
) -> bool:
    """Whether both optimizers keep the same things, and all of them are carried."""
    structure: Any = jax.tree.structure(old)
    moments = [slot.index for of_leaf in slots.values() for slot in of_leaf if slot.kind != "param"]
    return structure == jax.tree.structure(made) and bool(moments) and all(index in sources for index in moments)


def _integers(old: Sequence[Any], new: Sequence[Any]) -> dict[int, Any]:
    """Integers that are no counts, such as the place within an accumulation, by their place."""
    pairs = enumerate(zip(old, new, strict=True))
    return {
        i: _typed(value, made)
        for i, (value, made) in pairs
        if jnp.shape(value) == made.shape == () and jnp.issubdtype(made.dtype, jnp.integer)
    }


# What starts anew.


def _initialised(tx: Any, params: Any, made: Any, places: Sequence[int]) -> list[Any]:
    """Leaves of `tx.init(params)`: each beside its parameter where it has its shape, else on all devices of these."""
    if not places:
        return []

    def init(params: Any) -> list[Any]:
        # Copies, as an optimizer that keeps the parameters themselves would have one buffer be in the state twice.
        leaves = jax.tree.leaves(tx.init(jax.tree.map(jnp.copy, params)))
        return [jnp.asarray(leaves[place]) for place in places]

    if not concrete(params):
        return init(params)
    leaves = jax.tree.leaves(params)
    owners = owners_of({"": made}, {"": params}) if isinstance(params, jax.Array) else owners_of(made, params)
    shapes = jax.tree.leaves(made)
    near = [_neighbour(leaves, owners.get(place), shapes[place].shape) for place in places]
    devices = {frozenset(x.sharding.device_set) for x in leaves if isinstance(x, jax.Array) and x.committed}
    if len(devices) > 1:  # no one program for them
        values = init(params)
        return [
            jax.device_put(value, leaf.sharding) if leaf is not None and leaf.committed else value
            for leaf, value in zip(near, values, strict=True)
        ]
    others = auto_axes(beside(leaves))
    wanted = [
        others if leaf is None else out_sharding(leaf, shapes[place].shape)
        for leaf, place in zip(near, places, strict=True)
    ]
    values = jax.jit(init, out_shardings=wanted)(relabelled(params))
    return [
        like_neighbours(leaves, value) if leaf is None else as_before(leaf, value)
        for leaf, value in zip(near, values, strict=True)
    ]


def _neighbour(leaves: Sequence[Any], owner: int | None, shape: tuple[int, ...]) -> Any:
    """The parameter beside which a leaf of the state lies, if it has its shape."""
    return None if owner is None or jnp.shape(leaves[owner]) != shape else leaves[owner]


# What is told.


def _told(
    slots: Mapping[int, tuple[Slot, ...]], sources: Mapping[int, Source], made: Any, counts: Mapping[int, Any]
) -> dict[str, Any]:
    """What the record says: by field the factor and number of slots that were carried, those that start anew, and by
    class of state whether its count goes on.
    """
    carried: dict[str, dict[str, Any]] = {}
    initialised: Counter[str] = Counter()
    for slot in (slot for of_leaf in slots.values() for slot in of_leaf):
        source = sources.get(slot.index)
        if source is None:
            initialised[slot.name] += 1
            continue
        entry = carried.setdefault(f"{source.name} -> {slot.name}", {"factor": source.factor, "leaves": 0})
        entry["leaves"] += 1
    told = {state.__name__: "carried" if index in counts else "restarted" for index, state in _counters(made).items()}
    return {"carried": carried, "initialised": dict(initialised), "counts": told}
