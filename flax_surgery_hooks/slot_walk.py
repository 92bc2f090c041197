"""The walk from the root of an optimizer state to the nodes that mirror the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.layouts import Layout
from flax_surgery_hooks.paths import KeyPath
from flax_surgery_hooks.slot_probe import MEASUREMENTS
from flax_surgery_hooks.slot_registry import REGISTRY, TRAITS, Preceding

UNMIRRORED: KeyPath = (jax.tree_util.GetAttrKey("slow"),)
"""Stands for the path of a parameter that no slot mirrors."""


@dataclass(frozen=True)
class Field:
    """A field of an optimizer state whose leaves mirror the parameters, before its kind is known."""

    keys: KeyPath
    state: type
    field: str
    preceding: Preceding
    layout: Layout | None = None
    flat: bool = False

    @property
    def name(self) -> str:
        """Class and field."""
        return f"{self.state.__name__}.{self.field}"

    @property
    def known(self) -> bool:
        """Whether it is registered what it holds."""
        return self.field in REGISTRY.get(self.state, {})


def by_keys(param_keys: tuple[KeyPath, ...]) -> dict[KeyPath, int]:
    """The places of parameters by their key path."""
    return {keys: owner for owner, keys in enumerate(param_keys) if keys is not UNMIRRORED}


def owner_of(rest: KeyPath, owners: dict[KeyPath, int]) -> int | None:
    """The parameter whose whole key path `rest` begins with."""
    return next((owners[rest[:n]] for n in range(len(rest) + 1) if rest[:n] in owners), None)


class Mirrored(NamedTuple):
    """The parameters that parts of an optimizer state mirror.

    Attributes:
      keys: key path of each.
      containers: NamedTuple classes among their containers, which are no optimizer states.
      sizes: number of elements of each.
    """

    keys: tuple[KeyPath, ...]
    containers: frozenset[type]
    sizes: tuple[int, ...]


def named_tuples(treedef: Any) -> frozenset[type]:
    """NamedTuple classes among the containers of a tree."""
    node = treedef.node_data()
    here = {node[0]} if node is not None and hasattr(node[0], "_fields") else set()
    return frozenset(here).union(*map(named_tuples, treedef.children()))


class Context(NamedTuple):
    """Where the walk is: the key path, the nearest enclosing state and its field, the transforms before it, and the
    layout that enclosing states are registered with.
    """

    keys: KeyPath = ()
    state: type | None = None
    field: str = ""
    preceding: Preceding = ()
    layout: Layout | None = None


def walk(node: Any, at: Context, mirrored: Mirrored) -> Iterator[Field]:
    """Yields the fields below `node`."""
    if isinstance(node, MEASUREMENTS) or not jax.tree.leaves(node):
        return
    flat = _is_flat(node, at, mirrored)
    if at.state is not None and (flat or mirrors(node, at.state, at.field, mirrored)):
        if REGISTRY.get(at.state, {}).get(at.field) != "none":
            yield Field(at.keys, at.state, at.field, at.preceding, at.layout, flat)
        return
    if isinstance(node, jax.ShapeDtypeStruct):
        _check_follows_nothing(node, at.state, at.field)
        return
    is_chain = isinstance(node, tuple) and not hasattr(node, "_fields")
    unordered = isinstance(node, dict) and at.state is not optax.transforms.PartitionState
    before = (*at.preceding, object) if unordered else at.preceding
    for child_keys, child in children(node):
        here = at._replace(keys=(*at.keys, *child_keys), preceding=before)
        if hasattr(node, "_fields"):
            here = here._replace(state=type(node), field=child_keys[0].name, layout=_layout(type(node), at.layout))
        yield from walk(child, here, mirrored)
        if is_chain:
            before = (*before, *_state_types(child))


def _layout(state: type, outer: Layout | None) -> Layout | None:
    own = TRAITS[state].layout if state in TRAITS else None
    return outer if own is None else own


def _is_flat(node: Any, at: Context, mirrored: Mirrored) -> bool:
    """Whether `node` is one vector for all parameters, as `optax.flatten` makes of each field."""
    if not isinstance(node, jax.ShapeDtypeStruct) or mirrored.keys == ((),) or at.state is None:
        return False
    declared = REGISTRY.get(at.state, {}).get(at.field, "none") != "none"
    return declared and node.shape == (sum(mirrored.sizes),)


def mirror_roots(node: Any, keys: KeyPath, mirrored: Mirrored) -> Iterator[KeyPath]:
    """Paths of the nodes below `node` that mirror the parameters, of states that nobody has registered too."""
    if not jax.tree.leaves(node) or jax.tree_util.treedef_is_leaf(jax.tree.structure(node)):
        return
    if mirrors(node, object, "", mirrored):
        yield keys
        return
    for child_keys, child in children(node):
        yield from mirror_roots(child, (*keys, *child_keys), mirrored)


def children(node: Any) -> list[tuple[KeyPath, Any]]:
    """What lies directly below a node, with the keys to it."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)[0]


def _state_types(node: Any) -> tuple[type, ...]:
    """The state classes of a transform, or of each in a nested chain."""
    if isinstance(node, tuple) and not hasattr(node, "_fields"):
        return tuple(kind for child in node for kind in _state_types(child))
    return (type(node),)


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode) or (isinstance(node, list) and not node)


def mirrors(node: Any, state: type, field: str, mirrored: Mirrored) -> bool:
    """Whether every leaf below `node` starts with a full parameter path and every parameter is covered.

    A hole (`MaskedNode`, None, an empty list) covers the parameters below it. What stands at a parameter's place may be
    a box or a tuple of arrays, but no further state: labels of a partition can be equal to parameter names.
    """
    if mirrored.keys == ((),):  # one bare array: nothing to recognise by, so the registry decides
        return field in REGISTRY.get(state, {})

    def is_state(node: Any) -> bool:
        return _is_state(node) and type(node) not in mirrored.containers

    items = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: _is_hole(x) or is_state(x))[0]
    if any(is_state(leaf) for _, leaf in items):
        return False
    places = by_keys(mirrored.keys)
    owners = [owner_of(keys, places) for keys, leaf in items if not _is_hole(leaf)]
    if None in owners or not owners:
        return False
    holes = {keys for keys, leaf in items if _is_hole(leaf)}
    covered = set(owners)
    return all(
        place in covered or any(keys[:n] in holes for n in range(len(keys) + 1)) for keys, place in places.items()
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields") and not isinstance(node, optax.MaskedNode)


def _check_follows_nothing(leaf: Any, state: type | None, field: str) -> None:
    """Counts, keys and the scalars of registered states follow no edit; anything else has to be declared."""
    is_count = leaf.shape == () and not jnp.issubdtype(leaf.dtype, jnp.inexact)
    declared = REGISTRY.get(state, {}) if state is not None else {}
    if is_count or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or declared.get(field) == "none":
        return
    if state in REGISTRY and field not in declared and leaf.shape == ():
        return
    name = state.__name__ if state is not None else "the optimizer state"
    raise SlotError(
        f"The field {field!r} of {name} holds an array that does not mirror the parameters, and how it follows an edit "
        "is unknown.",
        found=f"{leaf.dtype}{list(leaf.shape)}",
        write=f'fsh.register_slot({name}, {field}="none") if it follows no edit, or opt_state="keep"',
    )
