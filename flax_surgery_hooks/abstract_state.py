"""The shape of a run's state at a later time: what its ledger says of structure, laid on the trainer's initial state.

A fire that changes shapes, paths or the optimizer leaves in its record, as `structure`, every leaf of the state with
its shape, dtype and partition spec. So a state can be made ready for a checkpoint without a repetition of the past:
sizes that depended on data, or on inputs of the trainer, cannot be computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from flax_surgery_hooks import in_graph, memory, room
from flax_surgery_hooks.ahead import foresee
from flax_surgery_hooks.errors import ResumeError, StructureError, SurgeryError, located, shorten
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.mirrors import Mirrors
from flax_surgery_hooks.paths import flatten, listed
from flax_surgery_hooks.placement import beside, divided, replicated
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.repath import initial_opt_state, repathed
from flax_surgery_hooks.slots import as_abstract, slots_of
from flax_surgery_hooks.targets import Place, asked_of, placer

Entry = list[Any]
"""Of a leaf: shape, dtype, and its partition spec if it lies on a mesh."""


def fields_of(state: Any) -> tuple[str, ...]:
    """The fields of a state that hold arrays."""
    names = dict.fromkeys(str(getattr(keys[0], "name", keys[0])) for keys, _ in _items(state) if keys)
    held = tuple(name for name in names if hasattr(state, name))
    return held or tuple(name for name in ("step", "params", "opt_state", "surgery") if hasattr(state, name))


def structure_json(state: Any) -> str:
    """Every leaf of a state but for what hooks keep there, as a record tells it: field -> path -> entry."""
    told = {name: _told(name, getattr(state, name)) for name in fields_of(state) if name not in ("step", "surgery")}
    return json.dumps(told)


def _told(field: str, tree: Any) -> dict[str, Entry]:
    return {path: _entry(leaf) for path, leaf in _named(field, tree).items()}


def _named(field: str, tree: Any) -> dict[str, Any]:
    """Path -> leaf, by the paths of selections; those of an optimizer state go through its containers."""
    if field == "opt_state":
        return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in _items(tree)}
    leaves = flatten(tree)
    return dict(zip(leaves.paths, leaves.values, strict=True))


def _items(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _entry(leaf: Any) -> Entry:
    shape = as_abstract(leaf)
    sharding = getattr(leaf, "sharding", None)
    entry: Entry = [list(shape.shape), str(shape.dtype)]
    if isinstance(sharding, NamedSharding):
        entry.append([list(part) if isinstance(part, tuple) else part for part in sharding.spec])
    return entry


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, concrete or abstract; uncommitted ones have no sharding."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = as_abstract(leaf)
        given = isinstance(leaf, jax.ShapeDtypeStruct) or (isinstance(leaf, jax.Array) and leaf.committed)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=leaf.sharding if given else None)

    return jax.tree.map(one, tree)


def after(
    state: Any,
    hooks: Mapping[str, Hook],
    records: Iterable[Record],
    seed: int,
    mirrors: Mirrors,
    allowed: Iterable[str] = (),
) -> Any:
    """The abstract state after the fires of a ledger.

    Args:
      state: the trainer's initial one, concrete or abstract. Leaves of it that say where they lie tell it for all.
      hooks: by name; they bring the model function and the optimizer that go with the new shapes.
      records: the ledger's.
      seed: the seed of the hooks' keys.
      mirrors: fields of the state that mirror the parameters.
      allowed: hooks that may make other shapes today than they did.

    Raises:
      ResumeError: a hook would make other shapes today than those recorded, or the optimizer that there is does not
        make the recorded state.
      StructureError: a leaf does not divide over the mesh.
    """
    state = _as_abstract_state(state)
    structural = [record for record in records if record.structure and record.event == "fired"]
    if structural and json.loads(structural[-1].structure) == _without_places(state, structural[-1]):
        structural = []  # the trainer's initial state is that after the last of them
    for record in structural:
        with located(hook=record.hook, step=record.step):
            state = _replayed(state, hooks.get(record.hook), record, seed, mirrors, record.hook in set(allowed))
    ready = [hooks[name] for name in hooks]
    return _with_memory(state, ready, seed)


def _as_abstract_state(state: Any) -> Any:
    return state.replace(**{name: abstract(getattr(state, name)) for name in fields_of(state)})


def _without_places(state: Any, record: Record) -> Any:
    """What `structure_json` would tell of a state that lies as this record says."""
    told, recorded = json.loads(structure_json(state)), json.loads(record.structure)
    for field, leaves in told.items():
        for path, entry in leaves.items():
            leaves[path] = entry[:2] + recorded.get(field, {}).get(path, [])[2:]
    return told


def _replayed(state: Any, hook: Hook | None, record: Record, seed: int, mirrors: Mirrors, allowed: bool) -> Any:
    """The state after one structural fire."""
    recorded: dict[str, dict[str, Entry]] = json.loads(record.structure)
    tx = state.tx
    if hook is not None:
        foreseen = _foreseen(hook, state, seed, mirrors)
        if foreseen is not None and not allowed:
            _check_same(foreseen, recorded)
        tx = tx if foreseen is None else foreseen.tx
        tx = tx if hook.reshape.tx is None else hook.reshape.tx
    place = None if hook is None else placer(hook.reshape.shardings, state.params)
    new = _structured(state, recorded, tx, place)
    if tx is not state.tx:
        new = new.replace(tx=tx)
    return new if hook is None else hook.reshape.finish(hook.reshape.replaced(new), record)


def _foreseen(hook: Hook, state: Any, seed: int, mirrors: Mirrors) -> Any:
    """The state after a fire as the hook is today, None where inputs or values of the past would be needed for it."""
    try:
        return foresee(hook, state, {}, seed, mirrors)
    except SurgeryError as error:
        if hook.operation.edit.edit_optimizer is None:
            return None
        raise ResumeError(
            "The hook has given the state another optimizer, and cannot say which without its inputs.",
            found=shorten(error),
            write="a surgery on the optimizer that asks for no inputs, or an initial state that has that optimizer",
        ) from error


def _check_same(foreseen: Any, recorded: Mapping[str, Mapping[str, Entry]]) -> None:
    today = _told("params", foreseen.params)
    past = recorded["params"]
    differing = [path for path in dict.fromkeys((*past, *today)) if past.get(path, [])[:2] != today.get(path, [])[:2]]
    if differing:
        raise ResumeError(
            "The hook makes other leaves today than it has made.",
            path=listed(differing, 4),
            found=f"recorded {past.get(differing[0], ['none'])[0]}, today {today.get(differing[0], ['none'])[0]}",
            write="the surgery of the past, or allow_changes= with the name of the hook if its past fire is to stay",
        )


def _structured(state: Any, recorded: Mapping[str, Mapping[str, Entry]], tx: Any, place: Place | None) -> Any:
    """The state with the leaves that a record tells of."""
    held = [name for name in fields_of(state) if name in recorded and name != "opt_state"]
    changes = {name: _rebuilt(name, getattr(state, name), recorded[name], place) for name in held}
    if "params" not in changes or "opt_state" not in recorded:
        raise ResumeError("A record's structure has no params.", found=listed(recorded), write="the ledger as it was")
    before = _named("opt_state", state.opt_state)
    params = flatten(changes["params"])
    opt_state = initial_opt_state(tx, params)
    names = list(_named("opt_state", opt_state))
    wrong = sorted(set(names) ^ set(recorded["opt_state"]))
    leaves: list[Any] = jax.tree.leaves(opt_state)
    owners = {slot.index: place for place, slots in slots_of(tx, opt_state, params).items() for slot in slots}
    wrong = wrong or [n for n, leaf in zip(names, leaves, strict=True) if recorded["opt_state"][n][0] != [*leaf.shape]]
    if wrong:
        raise ResumeError(
            "The optimizer makes another state for the recorded parameters than the one recorded.",
            found=listed(wrong, 4),
            write="the optimizer of the past: in the initial state, or tx= of the hook that changed the shapes",
        )
    near = params.values
    made = []
    for index, name in enumerate(names):
        owner = params.values[owners[index]] if index in owners else None
        with located(path=name):
            made.append(_leaf(recorded["opt_state"][name], before.get(name), owner, near, None))
    changes["opt_state"] = jax.tree.unflatten(jax.tree.structure(opt_state), made)
    return state.replace(**changes)


def _rebuilt(field: str, tree: Any, recorded: Mapping[str, Entry], place: Place | None) -> Any:
    """A tree like the parameters with the leaves of a record."""
    old = flatten(tree)
    held = dict(zip(old.paths, old.values, strict=True))
    gone = [path for path in old.paths if path not in recorded]
    made: dict[str, Any] = {}
    for path, entry in recorded.items():
        with located(path=path):
            asked = place if field == "params" else None
            made[path] = _leaf(entry, held.get(path), None, old.values, None if asked is None else (asked, path))
    new = repathed(old, gone, {path: leaf for path, leaf in made.items() if path not in held})
    return jax.tree.unflatten(new.treedef, [made[path] for path in new.paths])


def _leaf(
    entry: Entry, before: Any, owner: Any, neighbours: Iterable[Any], asked: tuple[Place, str] | None
) -> jax.ShapeDtypeStruct:
    """A leaf as recorded, where it belongs on the mesh of today."""
    shape = tuple(entry[0])
    dtype = before.dtype if before is not None and str(before.dtype) == entry[1] else jnp.dtype(entry[1])
    new = jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(new, entry, before, owner, tuple(neighbours), asked))


def _sharding(
    new: jax.ShapeDtypeStruct,
    entry: Entry,
    before: Any,
    owner: Any,
    neighbours: tuple[Any, ...],
    asked: tuple[Place, str] | None,
) -> Sharding | None:
    if before is not None and before.shape == new.shape:
        return before.sharding
    if owner is not None and owner.shape == new.shape:
        return owner.sharding
    if asked is not None:
        wanted = asked_of(asked[0], asked[1], None, new, neighbours)
        if wanted is not None:
            return wanted
    known = before if before is not None else owner
    near = known.sharding if known is not None else beside(neighbours)
    if isinstance(near, NamedSharding) and len(entry) > 2:
        recorded = _recorded(near, entry[2], new.shape)
        if recorded is not None:
            return recorded
    if known is not None and len(known.shape) == len(new.shape):
        return None if known.sharding is None else divided(known.sharding, new.shape)
    return replicated(beside(neighbours), len(new.shape))


def _recorded(near: NamedSharding, spec: list[Any], shape: tuple[int, ...]) -> NamedSharding | None:
    """The recorded spec on the mesh of today, if that has its axes and they divide the shape."""
    parts = [tuple(part) if isinstance(part, list) else part for part in spec]
    names = [name for part in parts for name in ((part,) if isinstance(part, str) else part or ())]
    if not set(names) <= set(near.mesh.axis_names):
        return None
    sharding = NamedSharding(near.mesh, PartitionSpec(*parts), memory_kind=near.memory_kind)
    try:
        divided(sharding, shape)
    except StructureError:
        return None
    return sharding


def _with_memory(state: Any, hooks: list[Hook], seed: int) -> Any:
    """The state with what hooks remember in the shapes that their leaves have now."""
    if getattr(state, "surgery", None) is None:
        return state
    fitted = memory.fitted(state, [(hook.name, hook.operation) for hook in hooks], seed, anew=True)
    held = room.buffers(fitted)
    if held:
        capacity = next(iter(held.values()))["steps"].shape[0]
        able = [hook for hook in hooks if in_graph.why_on_host(hook) is None]
        fitted = room.fitted(fitted, able, capacity, anew=True)
    return fitted.replace(surgery=placed_beside(fitted.surgery, fitted.params))


def placed_beside(surgery: Any, params: Any) -> Any:
    """What hooks keep in the state, each leaf where its parameter lies, or a copy on all devices of these."""
    by_path = _named("params", params)
    near = tuple(by_path.values())

    def one(keys: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
            return leaf
        names = [str(getattr(key, "key", "")) for key in keys]
        twin = next((by_path[name] for name in names if name in by_path and by_path[name].shape == leaf.shape), None)
        sharding = replicated(beside(near), len(leaf.shape)) if twin is None else twin.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, surgery)
