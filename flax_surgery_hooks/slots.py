"""Which optax leaf belongs to which parameter, and what it holds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_surgery_hooks import slot_probe
from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.layouts import Laid, Layout, Made
from flax_surgery_hooks.paths import KeyPath, Leaves
from flax_surgery_hooks.rules import KINDS, check_choice
from flax_surgery_hooks.slot_checks import check_made, initial

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
      laid: how it lies if it is not shaped like the parameter, else None.
      offset: where it begins in a vector that holds the slots of all parameters (`optax.flatten`), else None.
      counted: whether the optimizer counts steps per element, so that second moments start from `init` in any case.
    """

    index: int
    owner: int
    kind: str
    name: str
    group: str
    init: float | None
    laid: Laid | None = None
    offset: int | None = None
    counted: bool = False


@dataclass(frozen=True)
class Restart:
    """A leaf of the optimizer state that belongs to no parameter and is made anew when one of them is edited.

    Attributes:
      index: its place among the flattened leaves of `opt_state`.
      name: class and field.
      when: "edit": by any; "unpreserved": by one whose slots do not follow by the chain rule; "reshape": by one that
        changes shapes.
      state: where its state lies, as `Slot.group` begins.
      init: the constant that `tx.init` fills it with.
    """

    index: int
    name: str
    when: str
    state: str
    init: float


@dataclass(frozen=True)
class _Field:
    """A field of an optimizer state whose leaves mirror the parameters, before its kind is known."""

    keys: KeyPath
    state: type
    field: str
    preceding: Preceding
    layout: Layout | None = None
    flat: bool = False

    @property
    def name(self) -> str:
        return f"{self.state.__name__}.{self.field}"


class _Traits(NamedTuple):
    """What is known of a state class beside the kinds of its fields; see `register_slot`."""

    layout: Layout | None = None
    restarts: Mapping[str, str] = {}
    counted: bool = False


_REGISTRY: dict[type, dict[str, KindOf]] = {}
_TRAITS: dict[type, _Traits] = {}
RESTARTS = ("edit", "unpreserved", "reshape")


def register_slot(
    state: type,
    /,
    *,
    layout: Layout | None = None,
    restarts: Mapping[str, str] | None = None,
    counted: bool = False,
    **fields: KindOf,
) -> None:
    """Adds what the fields of an optimizer state hold; scalar fields of a registered class follow no edit.

    Args:
      state: the state's class, a NamedTuple or dataclass.
      layout: how slots lie that are not shaped like their parameter, here and in states within; see `layouts`.
      restarts: field that belongs to no parameter -> when it has to be made anew: after any "edit", after one that is
        "unpreserved" (slots do not follow by the chain rule), or after a "reshape".
      counted: whether the state counts steps per element, so that second moments without history start from `tx.init`.
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
    for field in (*fields, *(restarts or {})):
        if field not in known:
            raise SlotError(f"{state.__name__} has no field {field!r}.", found=f"fields {', '.join(known)}")
    for when in (restarts or {}).values():
        check_choice(when, RESTARTS, "time of a restart")
    for kind in fields.values():
        for one in () if callable(kind) else (kind,) if isinstance(kind, str) else kind:
            check_choice(one, KINDS, "kind of slot")
    _REGISTRY[state] = _REGISTRY.get(state, {}) | fields
    _TRAITS[state] = _Traits(layout, restarts or {}, counted)
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
    return _found(tx, opt_state, params).slots


def restarts_of(tx: Any, opt_state: Any, params: Leaves) -> tuple[Restart, ...]:
    """The leaves of an optimizer state that have to be made anew after edits; arguments as for `slots_of`."""
    return _found(tx, opt_state, params).restarts


def _found(tx: Any, opt_state: Any, params: Leaves) -> Found:
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in map(as_abstract, params.values))
    items, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
    slot_shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in (as_abstract(leaf) for _, leaf in items))
    return find_slots(tx, treedef, slot_shapes, params.treedef, params.keys, shapes)


def as_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a number or an abstract array."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        is_numpy = isinstance(leaf, np.ndarray | np.generic)  # may be float64, which JAX takes as float32
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype) if is_numpy else leaf.dtype)
    return jax.eval_shape(lambda: jnp.asarray(leaf))


class Found(NamedTuple):
    """What an optimizer state holds: slots by the place of their parameter, and leaves that are made anew."""

    slots: dict[int, tuple[Slot, ...]]
    restarts: tuple[Restart, ...]


@functools.lru_cache(maxsize=32)
def find_slots(
    tx: Any,
    opt_treedef: Any,
    slot_shapes: tuple[tuple[tuple[int, ...], Any], ...],
    params_treedef: Any,
    param_keys: tuple[KeyPath, ...],
    param_shapes: tuple[tuple[tuple[int, ...], Any], ...],
) -> Found:
    """`slots_of` and `restarts_of` on what is hashable, so that it is done once per optimizer and structure."""
    opt_state = jax.tree.unflatten(opt_treedef, [jax.ShapeDtypeStruct(*shape) for shape in slot_shapes])
    check_made(initial(tx, params_treedef, param_shapes), opt_state)
    mirrored = _Mirrored(param_keys, _named_tuples(params_treedef), _sizes(param_shapes))
    fields = list(_walk(opt_state, _Context(), mirrored))
    places = list(_places(opt_state, fields, param_keys, mirrored.sizes))
    places = [place for place in places if jnp.issubdtype(param_shapes[place.owner][1], jnp.inexact)]
    anew = list(_restarts(opt_state))
    if not places and not anew:
        return Found({}, ())
    stands_for = _representatives(places, param_shapes)
    chosen = set(stands_for.values()) or {0}
    probed = slot_probe.probe(tx, params_treedef, param_shapes, tuple(sorted(chosen)))
    laid = _lying(places, slot_shapes, param_shapes, Made(tx, params_treedef, param_shapes, 0, 0))
    found: dict[int, list[Slot]] = {}
    for place in places:
        keys = place.keys(param_keys[stands_for[place.owner]])
        kind, init = _kind(place.field, probed.verdicts[keys]), probed.init[keys]
        slot = Slot(place.index, place.owner, kind, place.field.name, place.group, init, laid.get(place), place.offset,
                    _TRAITS[place.field.state].counted)  # fmt: skip
        found.setdefault(place.owner, []).append(slot)
    restarts = tuple(dataclasses.replace(one, init=probed.init.get(keys) or 0.0) for keys, one in anew)
    return Found({owner: tuple(slots) for owner, slots in found.items()}, restarts)


class _Place(NamedTuple):
    """Where a slot lies: among the leaves of `opt_state`, of which parameter, what of its path lies below that, and
    where it begins in a vector of all parameters.
    """

    index: int
    owner: int
    field: _Field
    layout: KeyPath
    offset: int | None = None

    @property
    def group(self) -> str:
        return jax.tree_util.keystr(self.field.keys) + "".join(map(str, self.layout))

    def keys(self, param: KeyPath) -> KeyPath:
        """The key path of such a slot of the parameter at this path."""
        return self.field.keys if self.offset is not None else (*self.field.keys, *param, *self.layout)


def _places(
    opt_state: Any, fields: list[_Field], param_keys: tuple[KeyPath, ...], sizes: tuple[int, ...]
) -> Iterator[_Place]:
    owners = _by_keys(param_keys)
    by_root = {field.keys: field for field in fields}
    for index, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        field = next((by_root[keys[:n]] for n in range(len(keys) + 1) if keys[:n] in by_root), None)
        if field is None:
            continue
        if field.flat:
            offsets = itertools.accumulate(sizes, initial=0)
            yield from (_Place(index, i, field, (), offset) for i, offset in zip(range(len(sizes)), offsets))
            continue
        rest = keys[len(field.keys) :]
        owner = _owner(rest, owners)
        if owner is not None:
            yield _Place(index, owner, field, rest[len(param_keys[owner]) :])


def _lying(
    places: list[_Place], slot_shapes: slot_probe.Shapes, param_shapes: slot_probe.Shapes, made: Made
) -> dict[_Place, Laid]:
    """How those slots lie that are not shaped like their parameter."""
    beside: dict[tuple[int, type], list[tuple[int, ...]]] = {}
    for place in places:
        if place.field.layout is not None:
            beside.setdefault((place.owner, type(place.field.layout)), []).append(slot_shapes[place.index][0])
    laid = {}
    for place in places:
        layout, leaf = place.field.layout, param_shapes[place.owner][0]
        if layout is None or place.offset is not None:
            continue
        shape = slot_shapes[place.index][0]
        if not layout.applies(shape, leaf, beside[place.owner, type(layout)]):
            continue
        bundle = {
            "": place.group,
            "keys": jax.tree_util.keystr(place.field.keys),
            "fields": jax.tree_util.keystr(place.field.keys[:-1]),
        }[layout.joins]
        laid[place] = Laid(layout, bundle, leaf, dataclasses.replace(made, owner=place.owner, index=place.index))
    return laid


def _restarts(opt_state: Any) -> Iterator[tuple[KeyPath, Restart]]:
    """The leaves that are registered to be made anew, with their key paths."""
    states: dict[KeyPath, Any] = {}

    def visit(node: Any, keys: KeyPath) -> None:
        if type(node) in _TRAITS and _TRAITS[type(node)].restarts:
            states[keys] = type(node)
        if not isinstance(node, jax.ShapeDtypeStruct):
            for child_keys, child in _children(node):
                visit(child, (*keys, *child_keys))

    visit(opt_state, ())
    for index, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        state = states.get(keys[:-1])
        if state is not None and keys[-1].name in _TRAITS[state].restarts:
            name = keys[-1].name
            when = _TRAITS[state].restarts[name]
            at = jax.tree_util.keystr(keys[:-1])
            yield keys, Restart(index, f"{state.__name__}.{name}", when, at, 0.0)


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
      sizes: number of elements of each.
    """

    keys: tuple[KeyPath, ...]
    containers: frozenset[type]
    sizes: tuple[int, ...]


def _sizes(shapes: slot_probe.Shapes) -> tuple[int, ...]:
    return tuple(math.prod(shape) for shape, _ in shapes)


def _named_tuples(treedef: Any) -> frozenset[type]:
    node = treedef.node_data()
    here = {node[0]} if node is not None and hasattr(node[0], "_fields") else set()
    return frozenset(here).union(*map(_named_tuples, treedef.children()))


class _Context(NamedTuple):
    """Where the walk is: the key path, the nearest enclosing state and its field, the transforms before it, and the
    layout that enclosing states are registered with.
    """

    keys: KeyPath = ()
    state: type | None = None
    field: str = ""
    preceding: Preceding = ()
    layout: Layout | None = None


def _walk(node: Any, at: _Context, mirrored: _Mirrored) -> Iterator[_Field]:
    """Yields the fields below `node`."""
    if isinstance(node, slot_probe.MEASUREMENTS) or not jax.tree.leaves(node):
        return
    flat = _is_flat(node, at, mirrored)
    if at.state is not None and (flat or _mirrors(node, at.state, at.field, mirrored)):
        _check_known(at.state, at.field)
        if _REGISTRY[at.state][at.field] != "none":
            yield _Field(at.keys, at.state, at.field, at.preceding, at.layout, flat)
        return
    if isinstance(node, jax.ShapeDtypeStruct):
        _check_follows_nothing(node, at.state, at.field)
        return
    is_chain = isinstance(node, tuple) and not hasattr(node, "_fields")
    unordered = isinstance(node, dict) and at.state is not optax.transforms.PartitionState
    before = (*at.preceding, object) if unordered else at.preceding
    for child_keys, child in _children(node):
        here = at._replace(keys=(*at.keys, *child_keys), preceding=before)
        if hasattr(node, "_fields"):
            here = here._replace(state=type(node), field=child_keys[0].name, layout=_layout(type(node), at.layout))
        yield from _walk(child, here, mirrored)
        if is_chain:
            before = (*before, *_state_types(child))


def _layout(state: type, outer: Layout | None) -> Layout | None:
    own = _TRAITS[state].layout if state in _TRAITS else None
    return outer if own is None else own


def _is_flat(node: Any, at: _Context, mirrored: _Mirrored) -> bool:
    """Whether `node` is one vector for all parameters, as `optax.flatten` makes of each field."""
    if not isinstance(node, jax.ShapeDtypeStruct) or mirrored.keys == ((),) or at.state is None:
        return False
    declared = _REGISTRY.get(at.state, {}).get(at.field, "none") != "none"
    return declared and node.shape == (sum(mirrored.sizes),)


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
