"""Which optax leaf belongs to which parameter, and what it holds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks import slot_probe
from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.layouts import Laid, Made
from flax_surgery_hooks.paths import KeyPath, Leaves, flatten
from flax_surgery_hooks.rules import KINDS
from flax_surgery_hooks.slot_checks import check_made, initial
from flax_surgery_hooks.slot_registry import REGISTRY, TRAITS
from flax_surgery_hooks.slot_registry import version as registry_version
from flax_surgery_hooks.slot_walk import (
    UNMIRRORED,
    Context,
    Field,
    Mirrored,
    by_keys,
    children,
    mirror_roots,
    named_tuples,
    owner_of,
    walk,
)


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
      layer: of which layer of its parameter it is, if that is stacked and a layer of it is edited, else None.
      axis: along which axis of the optimizer leaf the slots of layers lie; None where `layer` is, or if all are one.
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
    layer: int | None = None
    axis: int | None = None

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape when its parameter has this one."""
        return leaf if self.laid is None else self.laid.made.shape(leaf)


@dataclass(frozen=True)
class Restart:
    """A leaf of the optimizer state that belongs to no parameter and is made anew when one of them is edited.

    Attributes:
      index: its place among the flattened leaves of `opt_state`.
      path: its key path there, as `jax.tree_util.keystr` writes it.
      when: "edit": by any; "unpreserved": by one whose slots do not follow by the chain rule; "reshape": by one that
        changes shapes.
      state: where its state lies, as `Slot.group` begins.
      init: the constant that `tx.init` fills it with.
    """

    index: int
    path: str
    when: str
    state: str
    init: float


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
    inner, fields = getattr(tx.init, "inner", tx), getattr(tx.init, "fields", ())
    if not fields:
        return _found(inner, opt_state, params).slots
    # Fields of the train state that stand beside the parameters have no slots.
    places = [place for place, keys in enumerate(params.keys) if getattr(keys[0], "key", None) not in fields]
    bare = flatten(_without(params, fields))
    found = _found(inner, opt_state, bare).slots
    return {
        places[owner]: tuple(dataclasses.replace(slot, owner=places[owner]) for slot in slots)
        for owner, slots in found.items()
    }


def _without(params: Leaves, fields: tuple[str, ...]) -> Any:
    tree = jax.tree.unflatten(params.treedef, params.values)
    return type(tree)({name: value for name, value in tree.items() if name not in fields})


def restarts_of(tx: Any, opt_state: Any, params: Leaves) -> tuple[Restart, ...]:
    """The leaves of an optimizer state that have to be made anew after edits; arguments as for `slots_of`."""
    if not _may_restart(jax.tree.structure(opt_state), registry_version()):
        return ()  # every fire asks; most optimizers have none
    inner, fields = getattr(tx.init, "inner", tx), getattr(tx.init, "fields", ())
    return _found(inner, opt_state, flatten(_without(params, fields)) if fields else params).restarts


@functools.lru_cache(maxsize=32)
def _may_restart(treedef: Any, version: int) -> bool:
    """Whether a state class with such leaves is in a structure; `version` is that of the registry."""
    node = treedef.node_data()
    if node is not None and node[0] in TRAITS and TRAITS[node[0]].restarts:
        return True
    return any(_may_restart(child, version) for child in treedef.children())


def _found(tx: Any, opt_state: Any, params: Leaves) -> Found:
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in map(as_abstract, params.values))
    items, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
    slot_shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in (as_abstract(leaf) for _, leaf in items))
    return find_slots(tx, treedef, slot_shapes, params.treedef, params.keys, shapes, registry_version())


def owners_of(opt_state: Any, params: Any) -> dict[int, int]:
    """Which parameter a leaf of an optimizer state belongs to, by structure alone: of any state, traced or abstract.

    Nothing has to be registered. One bare array has no path to recognise its slots by: put it into a dict.

    Args:
      opt_state: state of any optimizer.
      params: the parameters, or anything of the same key paths.

    Returns:
      Place among the leaves of `opt_state` -> place of its parameter among those of `params`; what belongs to no
      single parameter is missing.

    >>> import optax
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> owners_of(optax.adam(0.1).init(params), params)  # count, mu/a, mu/b, nu/a, nu/b
    {1: 0, 2: 1, 3: 0, 4: 1}
    """
    items, treedef = jax.tree_util.tree_flatten_with_path(params)
    mirrored = Mirrored(tuple(keys for keys, _ in items), named_tuples(treedef), ())
    owners = by_keys(mirrored.keys)
    roots = tuple(mirror_roots(opt_state, (), mirrored))
    found = {}
    for index, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        below = [keys[len(root) :] for root in roots if keys[: len(root)] == root]
        if below and (owner := owner_of(below[0], owners)) is not None:
            found[index] = owner
    return found


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
    version: int,
) -> Found:
    """`slots_of` and `restarts_of` on what is hashable, so that it is done once per optimizer and structure."""
    opt_state = jax.tree.unflatten(opt_treedef, [jax.ShapeDtypeStruct(*shape) for shape in slot_shapes])
    check_made(initial(tx, params_treedef, param_shapes), opt_state)
    param_keys = _mirrored_keys(params_treedef, param_keys)
    mirrored = Mirrored(param_keys, named_tuples(params_treedef), _sizes(param_shapes))
    fields = list(walk(opt_state, Context(), mirrored))
    places = list(_places(opt_state, fields, param_keys, mirrored.sizes))
    places = [place for place in places if jnp.issubdtype(param_shapes[place.owner][1], jnp.inexact)]
    anew = list(_restarts(opt_state))
    if not places and not anew:
        return Found({}, ())
    stands_for = _representatives(places, param_shapes)
    chosen = set(stands_for.values()) or {0}
    probed = slot_probe.probe(tx, params_treedef, param_shapes, tuple(sorted(chosen)))
    _check_known(places, probed, stands_for, param_keys)
    laid = _lying(places, slot_shapes, param_shapes, Made(tx, params_treedef, param_shapes, 0, ()), param_keys)
    found: dict[int, list[Slot]] = {}
    for place in places:
        keys = place.keys(param_keys[stands_for[place.owner]])
        kind, init = _kind(place.field, probed.verdicts[keys]), probed.init[keys]
        slot = Slot(place.place, place.owner, kind, place.field.name, place.group, init, laid.get(place), place.offset,
                    TRAITS[place.field.state].counted)  # fmt: skip
        found.setdefault(place.owner, []).append(slot)
    restarts = tuple(dataclasses.replace(one, init=probed.init.get(keys) or 0.0) for keys, one in anew)
    return Found({owner: tuple(slots) for owner, slots in found.items()}, restarts)


def _mirrored_keys(params_treedef: Any, param_keys: tuple[KeyPath, ...]) -> tuple[KeyPath, ...]:
    """The key paths by which slots mirror parameters: of the fast half of `optax.lookahead`'s pair alone."""
    if not slot_probe.is_pair(params_treedef):
        return param_keys
    return tuple(keys[1:] if keys[0].name == "fast" else UNMIRRORED for keys in param_keys)


class _Place(NamedTuple):
    """Where a slot lies: among the leaves of `opt_state`, of which parameter, what of its path lies below that, and
    where it begins in a vector of all parameters.
    """

    place: int
    owner: int
    field: Field
    layout: KeyPath
    offset: int | None = None

    @property
    def group(self) -> str:
        return jax.tree_util.keystr(self.field.keys) + "".join(map(str, self.layout))

    def keys(self, param: KeyPath) -> KeyPath:
        """The key path of such a slot of the parameter at this path."""
        return self.field.keys if self.offset is not None else (*self.field.keys, *param, *self.layout)


def _places(
    opt_state: Any, fields: list[Field], param_keys: tuple[KeyPath, ...], sizes: tuple[int, ...]
) -> Iterator[_Place]:
    owners = by_keys(param_keys)
    by_root = {field.keys: field for field in fields}
    for index, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        field = next((by_root[keys[:n]] for n in range(len(keys) + 1) if keys[:n] in by_root), None)
        if field is None:
            continue
        if field.flat:
            offsets = itertools.accumulate(sizes[:-1], initial=0)
            yield from (_Place(index, owner, field, (), offset) for owner, offset in enumerate(offsets))
            continue
        rest = keys[len(field.keys) :]
        owner = owner_of(rest, owners)
        if owner is not None:
            yield _Place(index, owner, field, rest[len(param_keys[owner]) :])


def _lying(
    places: list[_Place],
    slot_shapes: slot_probe.Shapes,
    param_shapes: slot_probe.Shapes,
    made: Made,
    param_keys: tuple[KeyPath, ...],
) -> dict[_Place, Laid]:
    """How those slots lie that are not shaped like their parameter."""
    beside: dict[tuple[int, type], list[tuple[int, ...]]] = {}
    for place in places:
        if place.field.layout is not None:
            beside.setdefault((place.owner, type(place.field.layout)), []).append(slot_shapes[place.place][0])
    laid = {}
    for place in places:
        layout, leaf = place.field.layout, param_shapes[place.owner][0]
        if layout is None or place.offset is not None or (layout.joins == "keys" and not place.layout):
            continue
        shape = slot_shapes[place.place][0]
        if not layout.applies(shape, leaf, beside[place.owner, type(layout)]):
            continue
        bundle = {
            "": place.group,
            "keys": jax.tree_util.keystr(place.field.keys),
            "fields": jax.tree_util.keystr(place.field.keys[:-1]),
        }[layout.joins]
        keys = place.keys(param_keys[place.owner])
        laid[place] = Laid(layout, bundle, leaf, dataclasses.replace(made, owner=place.owner, keys=keys))
    return laid


def _restarts(opt_state: Any) -> Iterator[tuple[KeyPath, Restart]]:
    """The leaves that are registered to be made anew, with their key paths."""
    states: dict[KeyPath, Any] = {}

    def visit(node: Any, keys: KeyPath) -> None:
        if type(node) in TRAITS and TRAITS[type(node)].restarts:
            states[keys] = type(node)
        if not isinstance(node, jax.ShapeDtypeStruct):
            for child_keys, child in children(node):
                visit(child, (*keys, *child_keys))

    visit(opt_state, ())
    for index, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(opt_state)[0]):
        state = states.get(keys[:-1])
        if state is not None and keys[-1].name in TRAITS[state].restarts:
            when, at = TRAITS[state].restarts[keys[-1].name], jax.tree_util.keystr(keys[:-1])
            yield keys, Restart(index, jax.tree_util.keystr(keys), when, at, 0.0)


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


def _check_known(
    places: list[_Place], probed: slot_probe.Probed, stands_for: dict[int, int], param_keys: tuple[KeyPath, ...]
) -> None:
    """Raises unless it is registered what every field holds; the error drafts the registration by what was measured."""
    unknown = [place for place in places if not place.field.known]
    if not unknown:
        return
    state, seen = unknown[0].field.state, {}
    for place in unknown:
        verdict = probed.verdicts[place.keys(param_keys[stands_for[place.owner]])]
        if place.field.state is state and (place.field.field not in seen or verdict.kind is not None):
            seen[place.field.field] = verdict
    first = next(iter(seen))
    draft = ", ".join(f'{field}="{verdict.kind or "grad"}"' for field, verdict in seen.items())
    raise SlotError(
        f"The field {first!r} of the optimizer state {state.__name__} mirrors the parameters, and what it holds "
        "is unknown.",
        found=f"class {state.__module__}.{state.__qualname__}; "
        + ", ".join(f"{field}: {verdict.seen}" for field, verdict in seen.items()),
        write=f'fsh.register_slot({state.__name__}, {draft}) (or another of {", ".join(KINDS)}), or opt_state="keep"',
    )


def _kind(field: Field, verdict: slot_probe.Verdict) -> str:
    registered = REGISTRY[field.state][field.field]
    allowed = registered(field.preceding) if callable(registered) else registered
    kinds = (allowed,) if isinstance(allowed, str) else allowed
    if verdict.kind is None or "none" in kinds:
        return kinds[0]
    if verdict.kind in kinds:
        return verdict.kind
    if "param" in kinds and verdict.kind == "invariant":
        return "param"  # a copy of the parameters of a later step: gradients do not scale it
    raise SlotError(
        f"{field.name} is registered as {' or '.join(kinds)} in this chain, but scales otherwise when gradients do.",
        found=verdict.seen,
        write=f"fsh.register_slot({field.state.__name__}, {field.field}={verdict.kind!r}), "
        "or a function of the transforms before it",
    )


def _sizes(shapes: slot_probe.Shapes) -> tuple[int, ...]:
    return tuple(math.prod(shape) for shape, _ in shapes)
