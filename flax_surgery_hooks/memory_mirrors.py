"""What hooks remember of leaves, as further mirrors of the parameters: an average moves with the weights it is of.

A surgery declares it by `memory_kinds`, see `Surgery`. Where another hook fires, the arrays of these kinds are slots of
their leaves. Those of single layers of a stacked leaf, and of leaves in other fields than `params`, are none: they stay
as they are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks.errors import SelectionError
from flax_surgery_hooks.operation import compute_dtype
from flax_surgery_hooks.paths import Leaves, flatten
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.selection import Selection


class Remembered(NamedTuple):
    """What one hook remembers of its leaves, as far as that moves with them.

    Attributes:
      hook: its name.
      kinds: pairs of a part of the memory of a leaf, "" for all of it, and the kind of its arrays.
      many: whether each part maps paths to arrays, as in the memory of a surgery that takes all leaves.
      selection: the hook's leaves.
      follows: which fires of other hooks it follows: "edits" or "reshapes".
    """

    hook: str
    kinds: tuple[tuple[str, str], ...]
    many: bool
    selection: Selection
    follows: str


class Part(NamedTuple):
    """One array that a hook remembers of each of its leaves.

    Attributes:
      name: unique among all of a train state; that of a field of a NamedTuple.
      kind: what it holds, see `rules.KINDS`.
      source: the hook's memory.
      key: the part of the memory that it is in, "" for all of it.
      place: which of the arrays there.
      paths: the paths of all parameters.
      held: those of which it is remembered.
    """

    name: str
    kind: str
    source: Remembered
    key: str
    place: int
    paths: tuple[str, ...]
    held: frozenset[str]


def remembered_by(hook: Hook) -> Remembered | None:
    """What a hook remembers that moves with its leaves; None if there is nothing."""
    edit = hook.operation.edit
    if not edit.memory_kinds:
        return None
    return Remembered(hook.name, edit.memory_kinds, edit.many, hook.operation.selection, edit.memory_follows)


def follows(remembered: Remembered, hook: Hook) -> bool:
    """Whether it moves where this hook fires."""
    if remembered.hook == hook.name and hook.operation.edit.takes("memory"):
        return False  # the surgery itself says what becomes of it
    return remembered.follows == "edits" or hook.reshape.declared


def parts_of(memory: Mapping[str, Any], sources: Sequence[Remembered], params: Any, taken: Collection[str]) -> tuple[
    Part, ...
]:  # fmt: skip
    """The arrays that a train state holds of these hooks.

    Args:
      memory: hook -> what it remembers; empty before `hooks.init`.
      sources: the hooks' memories.
      params: the parameters.
      taken: names that the parts must not have.
    """
    if not any(source.hook in memory for source in sources):
        return ()
    paths, names = flatten(params).paths, set(taken)
    found = []
    for source in sources:
        for key, kind in source.kinds if source.hook in memory else ():
            by_path = _by_path(memory[source.hook], source, key)
            held = frozenset(by_path) & set(paths)
            count = len(by_path[min(held)]) if held else 0
            for place in range(count):
                name = _name(source.hook, key, place if count > 1 else None, names)
                names.add(name)
                found.append(Part(name, kind, source, key, place, paths, held))
    return tuple(found)


def renewed(parts: tuple[Part, ...], memory: Mapping[str, Any], params: Any) -> tuple[Part, ...]:
    """The same parts of a state whose parameters have other paths."""
    paths = flatten(params).paths
    held = [frozenset(_by_path(memory[part.source.hook], part.source, part.key)) & set(paths) for part in parts]
    return tuple(part._replace(paths=paths, held=of_part) for part, of_part in zip(parts, held, strict=True))


def _by_path(memory: Any, source: Remembered, key: str) -> dict[str, list[Any]]:
    """Path -> the arrays that a part of the memory has of this leaf."""
    if source.many:
        return {path: [array] for path, array in memory[key].items()}
    return {path: jax.tree.leaves(of_leaf[key] if key else of_leaf) for path, of_leaf in memory.items()}


def _name(hook: str, key: str, place: int | None, taken: Collection[str]) -> str:
    name = "_".join([re.sub(r"\W", "_", hook), *filter(None, [key]), *([] if place is None else [str(place)])])
    name = name if re.match("[a-zA-Z]", name) else f"hook_{name}"
    others = (f"{name}_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], others) if each not in taken)


def trees(memory: Mapping[str, Any], parts: Sequence[Part], params: Any) -> list[Any]:
    """Each part as a tree like the parameters, with holes where it is not remembered."""
    leaves, found = flatten(params), []
    for part in parts:
        by_path = _by_path(memory[part.source.hook], part.source, part.key)
        values = [by_path[path][part.place] if path in part.held else optax.MaskedNode() for path in leaves.paths]
        found.append(jax.tree.unflatten(leaves.treedef, values))
    return found


class Beginning:
    """What a part holds of parameters at first; among new ones it is of those that the hook selects."""

    def __init__(self, part: Part):
        self._part = part
        self._held = {path: path in part.held for path in part.paths}

    def __call__(self, params: Any) -> Any:
        """A tree like the parameters, which may have holes themselves."""
        leaves = flatten(params)
        self._decide(leaves)
        values = [
            self._first(leaf) if self._held[path] else optax.MaskedNode()
            for path, leaf in zip(leaves.paths, leaves.values, strict=True)
        ]
        return jax.tree.unflatten(leaves.treedef, values)

    def _decide(self, leaves: Leaves) -> None:
        # Once, of the parameters as they are: where optimizers are probed they have other shapes, or are not all there.
        unknown = [path for path in leaves.paths if path not in self._held]
        if not unknown:
            return
        try:
            selected = {pick.path(leaves) for pick in self._part.source.selection.picks(leaves)}
        except SelectionError:  # which the hook itself will be told, with its name
            selected = set()
        self._held |= {path: path in selected for path in unknown}

    def _first(self, leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        wide = leaf.astype(compute_dtype(leaf.dtype))
        return wide if self._part.kind == "param" else jnp.zeros_like(wide)


def put(memory: Mapping[str, Any], parts: Sequence[Part], new: Sequence[Any]) -> dict[str, Any]:
    """What the hooks remember, with other arrays in these parts.

    What is beside them of a leaf, such as a count of snapshots, stays; a new leaf has that of the others.
    """
    made = dict(memory)
    for part, tree in zip(parts, new, strict=True):
        leaves = flatten(tree)
        arrays = dict(zip(leaves.paths, leaves.values, strict=True))
        made[part.source.hook] = (_put_many if part.source.many else _put_each)(made[part.source.hook], part, arrays)
    return made


def _put_many(held: Any, part: Part, arrays: Mapping[str, Any]) -> Any:
    others = {path: array for path, array in held[part.key].items() if path not in part.held}
    return {**held, part.key: {**others, **arrays}}


def _put_each(held: Any, part: Part, arrays: Mapping[str, Any]) -> Any:
    others = {path: of_leaf for path, of_leaf in held.items() if path not in part.held or path in arrays}
    pattern = next(iter(held.values()), None)
    # Two leaves with one buffer for what is beside them could not be donated.
    new = {path: jax.tree.map(_own, pattern) for path in arrays if path not in others}
    return others | {path: _with((others | new)[path], part, array) for path, array in arrays.items()}


def _own(leaf: Any) -> Any:
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf


def _with(of_leaf: Any, part: Part, array: Any) -> Any:
    inner, treedef = jax.tree.flatten(of_leaf[part.key] if part.key else of_leaf)
    inner[part.place] = array
    changed = jax.tree.unflatten(treedef, inner)
    return {**of_leaf, part.key: changed} if part.key else changed
