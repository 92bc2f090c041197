"""Trees of parameters, and optimizer states, that gain and lose leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import StructureError, located, shorten
from flax_surgery_hooks.paths import Leaves, flatten, listed
from flax_surgery_hooks.slots import as_abstract, slots_of


def repathed(params: Leaves, old: Collection[str], new: Mapping[str, Any]) -> Leaves:
    """Parameters in which the leaves `old` have become the leaves `new`; all others are the same objects.

    Containers keep their type, and one that is left empty goes. A box around a leaf stays with its path.

    Args:
      params: the flattened parameters.
      old: paths of the leaves that an edit was given.
      new: path -> leaf that it returned.

    Raises:
      StructureError: a container has no place for a path, or another leaf is there.
    """
    tree = jax.tree.unflatten(params.treedef, params.values)
    added = [path for path in new if path not in params.paths]
    taken = [path for path in new if path in params.paths and path not in old]
    if taken:
        raise StructureError(
            "The surgery returned leaves that it was not given, at paths that exist.",
            found=listed(taken),
            write="other paths, or a selection that takes these leaves too",
        )
    for path in (path for path in old if path not in new):
        with located(path=path):
            rest = _without(tree, path.split("/"))
            tree = _rebuilt(tree, {}) if rest is None else rest
    for path in added:
        with located(path=path):
            tree = _with(tree, path.split("/"), new[path])
    leaves = flatten(tree)
    values = tuple(new.get(path, value) for path, value in zip(leaves.paths, leaves.values, strict=True))
    return leaves._replace(values=values)


def _without(tree: Any, parts: list[str]) -> Any:
    """The tree without one leaf; None where nothing is left of it."""
    held = _items(tree, parts[0])
    key = next(key for key in held if str(key) == parts[0])
    inner = held.pop(key)
    rest = _without(inner, parts[1:]) if len(parts) > 1 else None
    if rest is not None:
        held[key] = rest
    return _rebuilt(tree, held) if held else None


def _with(tree: Any, parts: list[str], leaf: Any) -> Any:
    held = _items(tree, parts[0])
    key = next((key for key in held if str(key) == parts[0]), None)
    if key is None:
        numbered = held and all(isinstance(other, int) for other in held) and parts[0].isdigit()
        key = int(parts[0]) if numbered else parts[0]
        inner: Any = _rebuilt(tree, {})
    else:
        inner = held[key]
        if len(parts) == 1:
            raise StructureError(
                "The surgery returned a leaf at a path where other leaves are below.",
                found=listed(str(below) for below in inner) if isinstance(inner, Mapping) else type(inner).__name__,
                write="another path",
            )
    held[key] = _with(inner, parts[1:], leaf) if len(parts) > 1 else leaf
    return _rebuilt(tree, held)


def _items(tree: Any, part: str) -> dict[Any, Any]:
    if not isinstance(tree, Mapping):
        raise StructureError(
            f"Leaves can be added to and removed from dicts only; {part!r} is in none.",
            found=type(tree).__name__,
            write="params as nested dicts, FrozenDicts or an nnx.State",
        )
    return dict(tree.items())


def _rebuilt(tree: Any, held: dict[Any, Any]) -> Any:
    return held if type(tree) is dict else type(tree)(held)


def initial_opt_state(tx: Any, params: Leaves) -> Any:
    """What `tx.init` makes for these parameters, abstractly.

    Raises:
      StructureError: it fails on them.
    """
    tree = jax.tree.unflatten(params.treedef, [as_abstract(leaf) for leaf in params.values])
    try:
        return jax.eval_shape(tx.init, tree)
    except Exception as error:
        raise StructureError(
            f"`tx.init` fails on the new parameters: {type(error).__name__}: {shorten(error, 200)}",
            write="tx= of the hook: the optimizer for the new paths",
        ) from error


def opt_state_for(
    tx: Any, params: Leaves, old_tx: Any, old_params: Leaves, old_state: Any, moved: Mapping[int, Any]
) -> Any:
    """The optimizer state of parameters that have gained and lost leaves.

    Args:
      tx: the optimizer for the new parameters.
      params: the new parameters.
      old_tx: the optimizer before.
      old_params: the parameters before.
      old_state: their optimizer state.
      moved: new slots by their index among the leaves of the new state.

    Returns:
      A state as `tx.init` makes it, with the moved slots, the slots of all other leaves, counts and the rest from the
      old one; what that has no value for starts as `tx.init` makes it.
    """
    abstract = initial_opt_state(tx, params)
    held = _named(slots_of(old_tx, old_state, old_params), old_params, old_state)
    names = _names(slots_of(tx, abstract, params), params, abstract)
    leaves: list[Any] = []
    made: list[Any] = []
    for index, (name, leaf) in enumerate(zip(names, jax.tree.leaves(abstract), strict=True)):
        value = moved.get(index, held.get(name))
        if value is None or jnp.shape(value) != leaf.shape:
            made = made or _initial_leaves(tx, params, abstract)
            value = made[index]
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _initial_leaves(tx: Any, params: Leaves, abstract: Any) -> list[Any]:
    """The leaves of a whole new state; of abstract parameters their shapes, for which nothing is allocated."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params.values):
        return jax.tree.leaves(abstract)
    return jax.tree.leaves(tx.init(jax.tree.unflatten(params.treedef, params.values)))


Name = tuple[str, str]


def _names(slots: Mapping[int, Any], params: Leaves, state: Any) -> list[Name]:
    """Per leaf of an optimizer state its field and the path of its parameter, or its own path if it has none."""
    names = [(jax.tree_util.keystr(keys), "") for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    for owner, of_leaf in slots.items():
        for slot in of_leaf:
            names[slot.index] = (slot.group, params.paths[owner])
    return names


def _named(slots: Mapping[int, Any], params: Leaves, state: Any) -> dict[Name, Any]:
    return dict(zip(_names(slots, params, state), jax.tree.leaves(state), strict=True))
