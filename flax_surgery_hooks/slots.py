"""Which optax leaf belongs to which parameter, and what it holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_surgery_hooks import slot_probe
from flax_surgery_hooks.errors import SlotError, StateError, shorten
from flax_surgery_hooks.paths import KeyPath, Leaves, listed
from flax_surgery_hooks.rules import KINDS, check_choice

Preceding = tuple[type, ...]
Kind = str | tuple[str, ...]
KindOf = Kind | Callable[[Preceding], Kind]


@dataclass(frozen=True)
class Slot:
    """One leaf of the optimizer state that belongs to a parameter.

    Attributes:
      index: its place among the flattened leaves of `opt_state`.
      owner: place of its parameter among the flattened leaves of `params`.
      kind: see `rules.KINDS`.
      name: class and field, such as "ScaleByAdamState.mu".
      group: the same for the slots of all parameters that come from one field of one state.
      init: the constant that `tx.init` fills it with, or None if that is no constant.
    """

    index: int
    owner: int
    kind: str
    name: str
    group: str
    init: float | None


@dataclass(frozen=True)
class _Field:
    """A field of an optimizer state whose leaves mirror the parameters, before its kind is known."""

    keys: KeyPath
    state: type
    field: str
    preceding: Preceding

    @property
    def name(self) -> str:
        return f"{self.state.__name__}.{self.field}"


_REGISTRY: dict[type, dict[str, KindOf]] = {}


def register_slot(state: type, **fields: KindOf) -> None:
    """Adds what parameter-shaped fields of an optimizer state hold; scalar fields of a registered class follow no edit.

    Args:
      state: the state's class, a NamedTuple or dataclass.
      **fields: per field one of `rules.KINDS`, or a function from the tuple of state classes that precede this one in
        the chain to a kind, or to a tuple of possible kinds, among which the numeric probe decides.

    Raises:
      RuleError: a kind that does not exist.
      SlotError: the class has no such field.

    >>> import typing
    >>> class MyMomentum(typing.NamedTuple):
    ...     trace: typing.Any
    >>> register_slot(MyMomentum, trace="grad")
    """
    known = getattr(state, "_fields", None) or tuple(getattr(state, "__dataclass_fields__", {}))
    for field, kind in fields.items():
        if field not in known:
            raise SlotError(f"{state.__name__} has no field {field!r}.", found=f"fields {', '.join(known)}")
        for one in () if callable(kind) else (kind,) if isinstance(kind, str) else kind:
            check_choice(one, KINDS, "kind of slot")
    _REGISTRY[state] = _REGISTRY.get(state, {}) | fields
    find_slots.cache_clear()


def slots_of(tx: Any, opt_state: Any, params: Leaves) -> dict[int, tuple[Slot, ...]]:
    """The slots of every parameter, by the parameter's place among the flattened leaves.

    Args:
      tx: the `optax.GradientTransformation` that `opt_state` belongs to.
      opt_state: its state; arrays or `jax.ShapeDtypeStruct`s.
      params: the flattened parameters.

    Raises:
      SlotError: a state or field of unknown meaning, or one whose registered kind the probe contradicts.
      StateError: `opt_state` is not what `tx.init` makes for these parameters.
    """
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in map(as_abstract, params.values))
    items, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
    slot_shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in (as_abstract(leaf) for _, leaf in items))
    return find_slots(tx, treedef, slot_shapes, params.treedef, params.keys, shapes)


def owners_of(opt_state: Any, params: Any) -> dict[int, int]:
    """Which parameter a leaf of an optimizer state belongs to, by structure alone: of any state, traced or abstract.

    Nothing has to be registered. One bare array has no path to recognise its slots by: put it into a dict.

    Args:
      opt_state: state of any optimizer.
      params: the parameters, or anything of the same key paths.

    Returns:
      Place among the leaves of `opt_state` -> place of its parameter among those of `params`; what belongs to no
      single parameter is missing.

    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> owners_of(optax.adam(0.1).init(params), params)  # count, mu/a, mu/b, nu/a, nu/b
    {1: 0, 2: 1, 3: 0, 4: 1}
    """
    items, treedef = jax.tree_util.tree_flatten_with_path(params)
    mirrored = _Mirrored(tuple(keys for keys, _ in items), _named_tuples(treedef))
    owners = _by_keys(mirrored.keys)
    roots = tuple(_roots(opt_state, (), mirrored))
    found = {}
    for index, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        below = [keys[len(root) :] for root in roots if keys[: len(root)] == root]
        if below and (owner := _owner(below[0], owners)) is not None:
            found[index] = owner
    return found


def as_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a number or an abstract array."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        is_numpy = isinstance(leaf, np.ndarray | np.generic)  # may be float64, which JAX takes as float32
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype) if is_numpy else leaf.dtype)
    return jax.eval_shape(lambda: jnp.asarray(leaf))


@functools.lru_cache(maxsize=32)
def find_slots(
    tx: Any,
    opt_treedef: Any,
    slot_shapes: tuple[tuple[tuple[int, ...], Any], ...],
    params_treedef: Any,
    param_keys: tuple[KeyPath, ...],
    param_shapes: tuple[tuple[tuple[int, ...], Any], ...],
) -> dict[int, tuple[Slot, ...]]:
    """`slots_of` on what is hashable, so that it is done once per optimizer and structure."""
    opt_state = jax.tree.unflatten(opt_treedef, [jax.ShapeDtypeStruct(*shape) for shape in slot_shapes])
    _check_made(_initial(tx, params_treedef, param_shapes), opt_state)
    fields = list(_fields(opt_state, _Mirrored(param_keys, _named_tuples(params_treedef))))
    if not fields:
        return {}
    places = list(_places(opt_state, fields, param_keys))
    places = [place for place in places if jnp.issubdtype(param_shapes[place.owner][1], jnp.inexact)]
    stands_for = _representatives(places, param_shapes)
    probed = slot_probe.probe(tx, params_treedef, param_shapes, tuple(sorted(set(stands_for.values()))))
    found: dict[int, list[Slot]] = {}
    for place in places:
        keys = (*place.field.keys, *param_keys[stands_for[place.owner]], *place.layout)
        kind = _kind(place.field, probed.verdicts[keys])
        slot = Slot(place.place, place.owner, kind, place.field.name, place.group, probed.init[keys])
        found.setdefault(place.owner, []).append(slot)
    return {owner: tuple(slots) for owner, slots in found.items()}


class _Place(NamedTuple):
    """Where a slot lies: among the leaves of `opt_state`, of which parameter, and what of its path lies below that."""

    place: int
    owner: int
    field: _Field
    layout: KeyPath

    @property
    def group(self) -> str:
        return jax.tree_util.keystr(self.field.keys) + "".join(map(str, self.layout))


def _places(opt_state: Any, fields: list[_Field], param_keys: tuple[KeyPath, ...]) -> Iterator[_Place]:
    owners = _by_keys(param_keys)
    by_root = {field.keys: field for field in fields}
    for index, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        field = next((by_root[keys[:n]] for n in range(len(keys) + 1) if keys[:n] in by_root), None)
        if field is None:
            continue
        rest = keys[len(field.keys) :]
        owner = _owner(rest, owners)
        if owner is not None:
            yield _Place(index, owner, field, rest[len(param_keys[owner]) :])


def _representatives(places: list[_Place], shapes: slot_probe.Shapes) -> dict[int, int]:
    """For each parameter one that stands for it in the probe: alike in rank, dtype and slots.

    Two of each sort take part, so that one is not alone when a global norm is taken.
    """
    groups: dict[int, list[str]] = {}
    for place in places:
        groups.setdefault(place.owner, []).append(place.group)
    sorts: dict[Any, list[int]] = {}
    stands_for = {}
    for owner, slots in groups.items():
        alike = sorts.setdefault((slot_probe.small(shapes[owner][0]), shapes[owner][1], tuple(slots)), [])
        if len(alike) < 2:
            alike.append(owner)
        stands_for[owner] = alike[-1]
    return stands_for


def _initial(tx: Any, params_treedef: Any, shapes: slot_probe.Shapes) -> Any:
    params = jax.tree.unflatten(params_treedef, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    try:
        return jax.eval_shape(tx.init, params)
    except Exception as error:
        raise StateError(
            f"`tx.init` fails on the parameters of the state: {type(error).__name__}: {shorten(error, 200)}",
            write="the very `tx` of the state",
        ) from error


def _check_made(made: Any, held: Any) -> None:
    """Raises unless an optimizer state has the structure and shapes that `tx.init` makes.

    Raises:
      StateError: it has not.
    """
    structure: Any = jax.tree.structure(held)
    if structure != jax.tree.structure(made):
        found = shorten(structure)
    else:
        items = jax.tree_util.tree_flatten_with_path(held)[0]
        pairs = [(keys, a.shape, b.shape) for (keys, a), b in zip(items, jax.tree.leaves(made), strict=True)]
        wrong = [
            f"opt_state{jax.tree_util.keystr(keys)} {list(a)} instead of {list(b)}" for keys, a, b in pairs if a != b
        ]
        if not wrong:
            return
        found = listed(wrong, 3)
        if all(a == b or (len(a) == 1 and b == ()) for _, a, b in pairs):  # counts; the parameters look alike
            raise StateError(
                "The state is replicated for pmap: every leaf has a leading device axis.",
                found=found,
                write="flax.jax_utils.unreplicate before the call, and flax.jax_utils.replicate after it",
            )
    raise StateError(
        "The optimizer state is not what `tx.init` makes for these parameters.",
        found=found,
        write="state.replace(opt_state=tx.init(params)) with the very `tx` of the state",
    )


def _by_keys(param_keys: tuple[KeyPath, ...]) -> dict[KeyPath, int]:
    return {keys: owner for owner, keys in enumerate(param_keys)}


def _owner(rest: KeyPath, owners: dict[KeyPath, int]) -> int | None:
    """The parameter whose whole key path `rest` begins with."""
    return next((owners[rest[:n]] for n in range(len(rest) + 1) if rest[:n] in owners), None)


def _kind(field: _Field, verdict: slot_probe.Verdict) -> str:
    registered = _REGISTRY[field.state][field.field]
    allowed = registered(field.preceding) if callable(registered) else registered
    kinds = (allowed,) if isinstance(allowed, str) else allowed
    if verdict.kind is None or "none" in kinds:
        return kinds[0]
    if verdict.kind in kinds:
        return verdict.kind
    raise SlotError(
        f"{field.name} is registered as {' or '.join(kinds)} in this chain, but scales otherwise when gradients do.",
        found=verdict.seen,
        write=f"fsh.register_slot({field.state.__name__}, {field.field}={verdict.kind!r}), "
        "or a function of the transforms before it",
    )


# The walk from the root of an optimizer state to the nodes that mirror the parameters.


class _Mirrored(NamedTuple):
    """The parameters that parts of an optimizer state mirror.

    Attributes:
      keys: key path of each.
      containers: NamedTuple classes among their containers, which are no optimizer states.
    """

    keys: tuple[KeyPath, ...]
    containers: frozenset[type]


def _named_tuples(treedef: Any) -> frozenset[type]:
    node = treedef.node_data()
    here = {node[0]} if node is not None and hasattr(node[0], "_fields") else set()
    return frozenset(here).union(*map(_named_tuples, treedef.children()))


def _fields(opt_state: Any, mirrored: _Mirrored) -> Iterator[_Field]:
    yield from _walk(opt_state, (), None, "", (), mirrored)


def _walk(
    node: Any, keys: KeyPath, state: type | None, field: str, preceding: Preceding, mirrored: _Mirrored
) -> Iterator[_Field]:
    """Yields the fields below `node`, which lies in `field` of the nearest enclosing `state`."""
    if not jax.tree.leaves(node):
        return
    if state is not None and _mirrors(node, state, field, mirrored):
        _check_known(state, field)
        if _REGISTRY[state][field] != "none":
            yield _Field(keys, state, field, preceding)
        return
    if isinstance(node, jax.ShapeDtypeStruct):
        _check_follows_nothing(node, state, field)
        return
    is_chain = isinstance(node, tuple) and not hasattr(node, "_fields")
    unordered = isinstance(node, dict) and state is not optax.transforms.PartitionState
    before = (*preceding, object) if unordered else preceding
    for child_keys, child in _children(node):
        here, name = (type(node), child_keys[0].name) if hasattr(node, "_fields") else (state, field)
        yield from _walk(child, (*keys, *child_keys), here, name, before, mirrored)
        if is_chain:
            before = (*before, *_state_types(child))


def _roots(node: Any, keys: KeyPath, mirrored: _Mirrored) -> Iterator[KeyPath]:
    """Paths of the nodes below `node` that mirror the parameters, of states that nobody has registered too."""
    if not jax.tree.leaves(node) or jax.tree_util.treedef_is_leaf(jax.tree.structure(node)):
        return
    if _mirrors(node, object, "", mirrored):
        yield keys
        return
    for child_keys, child in _children(node):
        yield from _roots(child, (*keys, *child_keys), mirrored)


def _children(node: Any) -> list[tuple[KeyPath, Any]]:
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)[0]


def _state_types(node: Any) -> tuple[type, ...]:
    """The state classes of a transform, or of each in a nested chain."""
    if isinstance(node, tuple) and not hasattr(node, "_fields"):
        return tuple(kind for child in node for kind in _state_types(child))
    return (type(node),)


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _mirrors(node: Any, state: type, field: str, mirrored: _Mirrored) -> bool:
    """Whether every leaf below `node` starts with a full parameter path and every parameter is covered.

    A hole (`MaskedNode`, None) covers the parameters below it. What stands at a parameter's place may be a box or a
    tuple of arrays, but no further state: labels of a partition can be equal to parameter names.
    """
    if mirrored.keys == ((),):  # one bare array: nothing to recognise by, so the registry decides
        return field in _REGISTRY.get(state, {})

    def is_state(node: Any) -> bool:
        return _is_state(node) and type(node) not in mirrored.containers

    items = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: _is_hole(x) or is_state(x))[0]
    if any(is_state(leaf) for _, leaf in items):
        return False
    places = _by_keys(mirrored.keys)
    owners = [_owner(keys, places) for keys, leaf in items if not _is_hole(leaf)]
    if None in owners or not owners:
        return False
    holes = {keys for keys, leaf in items if _is_hole(leaf)}
    covered = set(owners)
    return all(
        place in covered or any(keys[:n] in holes for n in range(len(keys) + 1)) for keys, place in places.items()
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields") and not isinstance(node, optax.MaskedNode)


def _check_known(state: type, field: str) -> None:
    if field in _REGISTRY.get(state, {}):
        return
    raise SlotError(
        f"The field {field!r} of the optimizer state {state.__name__} mirrors the parameters, and what it holds "
        "is unknown.",
        found=f"class {state.__module__}.{state.__qualname__}",
        write=f'fsh.register_slot({state.__name__}, {field}="grad") (or another of {", ".join(KINDS)}), '
        'or opt_state="keep"',
    )


def _check_follows_nothing(leaf: Any, state: type | None, field: str) -> None:
    """Counts, keys and the scalars of registered states follow no edit; anything else has to be declared."""
    is_count = leaf.shape == () and not jnp.issubdtype(leaf.dtype, jnp.inexact)
    declared = _REGISTRY.get(state, {}) if state is not None else {}
    if is_count or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or declared.get(field) == "none":
        return
    if state in _REGISTRY and field not in declared and leaf.shape == ():
        return
    name = state.__name__ if state is not None else "the optimizer state"
    raise SlotError(
        f"The field {field!r} of {name} holds an array that does not mirror the parameters, and how it follows an edit "
        "is unknown.",
        found=f"{leaf.dtype}{list(leaf.shape)}",
        write=f'fsh.register_slot({name}, {field}="none") if it follows no edit, or opt_state="keep"',
    )
