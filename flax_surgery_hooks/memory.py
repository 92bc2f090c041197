"""What surgeries remember: arrays in the `surgery` field of the train state, sharded, donated and saved with it.

The field holds `{"memory": {hook: {path: memory}}}`; of a surgery that takes all leaves at once `{hook: memory}`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey

from flax_surgery_hooks import calling
from flax_surgery_hooks.checks import concrete
from flax_surgery_hooks.errors import StateError, StructureError, located
from flax_surgery_hooks.operation import Operation, Unit, compute_dtype, like, units
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.placement import as_before, auto_axes, beside, like_neighbours, out_sharding, relabelled
from flax_surgery_hooks.planning import leaves_of, memory_of
from flax_surgery_hooks.programs import shapes_of
from flax_surgery_hooks.restacking import whole_leaves
from flax_surgery_hooks.surgery import key_for, path_hash
from flax_surgery_hooks.train_state import Parts, put_back, take_apart

Named = tuple[str, Operation]


def held(state: Any, name: str, operation: Operation) -> Any:
    """What a hook's surgery remembers; () if it remembers nothing.

    Raises:
      StateError: it should, and the state has no such field, or no memory of this hook.
    """
    if operation.edit.init_memory is None:
        return ()
    _check_field(state, operation)
    everything = _everything(state)
    if name not in everything:
        raise StateError(
            f"The surgery {operation.edit.name} remembers, and the state has no memory of it yet.",
            found=f"memory of {listed(everything) or 'no hook'}",
            write="state = hooks.init(state), once all hooks are added, before the first train step",
        )
    return everything[name]


def put(state: Any, name: str, memory: Any) -> Any:
    """The state with what a hook's surgery remembers now."""
    everything = {**_everything(state), name: memory}
    return state.replace(surgery={**(state.surgery or {}), "memory": everything})


def fitted(state: Any, hooks: Sequence[Named], seed: int, *, anew: bool = False) -> Any:
    """The state with a memory for every surgery that remembers; what fits already is kept.

    Args:
      state: concrete, abstract, or traced.
      hooks: their names and operations.
      seed: seed of the keys that `init_memory` may ask for.
      anew: whether a memory that does not fit its leaf is made anew, as after a fire that changed shapes.

    Raises:
      StateError: the state has no place for it, or holds one that does not fit.
      SelectionError: a hook's pattern matches nothing.
    """
    for name, operation in hooks:
        if operation.edit.init_memory is None:
            continue
        with located(hook=name):
            _check_field(state, operation)
            everything = _everything(state)
            key = key_for(jax.random.key(seed, impl="threefry2x32"), name)
            state = put(state, name, _all_made(operation, take_apart(state), key, everything.get(name), anew))
    return state


def first_memory(operation: Operation, parts: Parts, key: Any) -> Any:
    """What a surgery remembers at first, where there is nobody to keep it."""
    # What is drawn at first has to differ from what the fire draws with this key.
    key = jax.random.key(0) if key is None else jax.random.fold_in(key, path_hash("init_memory"))
    return _all_made(operation, parts, key, None, True)


def _all_made(operation: Operation, parts: Parts, key: Any, held: Any, anew: bool) -> Any:
    made = {}
    programs: dict[Hashable, Any] = {}
    for unit in units(operation, parts.params, {}):
        leaves = dict(zip(unit.paths, leaves_of(unit, parts), strict=True))
        made[unit.paths[0]] = _made(operation, leaves, key, _kept(operation, unit, held, anew), anew, programs)
    return next(iter(made.values())) if operation.edit.many else made


def _kept(operation: Operation, unit: Unit, memory: Any, anew: bool) -> Any:
    """The memory that there is of a unit, or None."""
    if memory is None or operation.edit.many:
        return memory
    if not isinstance(memory, Mapping):
        if anew:
            return None
        raise _other(operation, unit.paths, type(memory).__name__)
    return memory.get(unit.paths[0])


def _made(
    operation: Operation, leaves: dict[str, Any], key: Any, kept: Any, anew: bool, programs: dict[Hashable, Any]
) -> Any:
    """The memory of a unit: as kept if that fits, else as `init_memory` makes it; `programs` serve leaves alike."""

    def init(leaves: dict[str, Any], key: Any) -> Any:
        return calling.init_memory(operation.edit, leaves, key)

    wide = {path: _wide(leaf) for path, leaf in leaves.items()}
    if not operation.edit.many:
        key = jax.random.fold_in(key, path_hash(next(iter(leaves))))
    shapes = jax.eval_shape(init, wide, key)
    if kept is not None and shapes_of(kept) == shapes_of(shapes):
        return kept
    if kept is not None and not anew:
        raise _other(operation, leaves, str(jax.tree.map(jnp.shape, kept)))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in wide.values()):
        return shapes
    if not concrete(leaves):
        return init(wide, key)
    arrays = list(leaves.values())
    near = _neighbours(leaves, shapes)
    places = [
        auto_axes(beside(arrays)) if old is None else out_sharding(old, shape.shape)
        for old, shape in zip(near, jax.tree.leaves(shapes), strict=True)
    ]
    treedef: Any = jax.tree.structure(shapes)
    method = operation.edit.init_memory
    if not operation.edit.many and method is not None and not method.takes("path"):
        wide = {"": next(iter(wide.values()))}
    program = (tuple(wide), treedef, tuple(places))
    if program not in programs:
        programs[program] = jax.jit(init, out_shardings=jax.tree.unflatten(treedef, places))
    made = programs[program](relabelled(wide), key)
    values = [
        like_neighbours(arrays, leaf) if old is None else as_before(old, leaf)
        for old, leaf in zip(near, jax.tree.leaves(made), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def _neighbours(leaves: Mapping[str, Any], shapes: Any) -> list[Any]:
    """For each array of a memory a leaf of its shape, whose sharding it takes: that of its own path first; or None."""
    found = []
    for keys, shape in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        own = [leaves[key.key] for key in keys if isinstance(key, DictKey) and key.key in leaves]
        like = (leaf for leaf in (*own, *leaves.values()) if jnp.shape(leaf) == shape.shape)
        found.append(next(like, None) if shape.shape else None)
    return found


def _wide(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, compute_dtype(leaf.dtype))
    array = jnp.asarray(leaf)
    return array.astype(compute_dtype(array.dtype))


def observe(state: Any, hooks: Sequence[Named], seed: int, inputs: Mapping[str, Any]) -> Any:
    """The state after every hook's `observe`, in the order of the hooks; slots stay as they are. Can be traced.

    Raises:
      StateError: a memory is missing.
      InputError, SurgeryFunctionError, StructureError: an `observe` asks for or returns what it must not.
    """
    for name, operation in hooks:
        if operation.edit.observe is not None:
            with located(hook=name):
                state = _observe_one(state, name, operation, seed, operation.edit.observed_inputs(inputs))
    return state


def _observe_one(state: Any, name: str, operation: Operation, seed: int, inputs: dict[str, Any]) -> Any:
    method = operation.edit.observe
    assert method is not None
    remembered = held(state, name, operation)
    parts = take_apart(state)
    plan = units(operation, parts.params, {})
    step = jnp.asarray(0 if getattr(state, "step", None) is None else state.step, jnp.int32)
    key = None
    if method.takes("key"):
        key = jax.random.fold_in(key_for(jax.random.key(seed, impl="threefry2x32"), name), path_hash("observe"))
        key = jax.random.fold_in(key, step)
    values: list[list[Any]] = []
    edited: set[int] = set()
    memory = dict(remembered) if isinstance(remembered, Mapping) else remembered
    for unit in plan:
        old = dict(zip(unit.paths, leaves_of(unit, parts), strict=True))
        mine = memory_of(operation, unit, remembered)
        wide = {path: _wide(leaf) for path, leaf in old.items()}
        hashes = {path: path_hash(path) for path in unit.paths}
        called = calling.call(
            operation.edit, wide, key=key, step=step, inputs=inputs, hashes=hashes, memory=mine, method=method
        )
        changed = {path for path in unit.paths if called.leaves[path] is not wide[path]}
        edited |= {place for path, place in zip(unit.paths, unit.places, strict=True) if path in changed}
        values.append(
            [
                _same_shape(method.name, path, called.leaves[path], old[path]) if path in changed else old[path]
                for path in unit.paths
            ]
        )
        if method.takes("memory"):
            calling.check_memory(method.name, mine, called.memory)
            new = jax.tree.map(like, called.memory, mine)
            memory = new if operation.edit.many else {**memory, unit.paths[0]: new}
    if edited:
        new = whole_leaves(parts, plan, values)
        state = put_back(state, parts, {place: new[parts.params.paths[place]] for place in edited}, {})
    return put(state, name, memory) if method.takes("memory") else state


def _same_shape(name: str, path: str, new: Any, old: Any) -> Any:
    if new.shape != jnp.shape(old):
        raise StructureError(
            f"{name} changes the shape of a leaf, which only a fire may.",
            path=path,
            found=f"{list(jnp.shape(old))} -> {list(new.shape)}",
            write="the change in `__call__`",
        )
    return like(new, old)


def _check_field(state: Any, operation: Operation) -> None:
    if not hasattr(state, "surgery"):
        raise StateError(
            f"The surgery {operation.edit.name} remembers arrays, and the state has no `surgery` field to keep them.",
            found=type(state).__name__,
            write="fsh.TrainState, or a field `surgery: Any = None` on your own; fsh.bind(surgery=...) for loose parts",
        )


def _everything(state: Any) -> dict[str, Any]:
    surgery = state.surgery
    if surgery is None:
        return {}
    if not isinstance(surgery, Mapping) or not isinstance(surgery.get("memory", {}), Mapping):
        raise StateError(
            "The state's `surgery` field holds something of another origin.",
            found=type(surgery).__name__,
            write="None, or what hooks.init(state) puts there",
        )
    return dict(surgery.get("memory", {}))


def _other(operation: Operation, paths: Any, found: str) -> StateError:
    return StateError(
        f"The state's memory of {operation.edit.name} does not fit its leaves.",
        path=listed(paths),
        found=found,
        write="the surgery with which it was saved, or a state whose `surgery` is None",
    )
