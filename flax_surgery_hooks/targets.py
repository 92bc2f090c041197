"""Where what a fire makes goes: each leaf where it was; one of another shape, or at a new path, where it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from flax_surgery_hooks.errors import StructureError, UserCodeError, located, shorten
from flax_surgery_hooks.operation import Unit
from flax_surgery_hooks.paths import flatten, join
from flax_surgery_hooks.placement import auto_axes, beside, divided, known_sharding, replicated

Place: TypeAlias = "Callable[[str, jax.ShapeDtypeStruct], Sharding | PartitionSpec | None]"
"""From path and new shape of a leaf to where it goes; None leaves that to the rule."""


def targets(unit: Unit, arrays: Any, after: Any, place: Place | None) -> tuple[list[Any], list[Any], Any]:
    """The sharding of each leaf, slot and memory after an edit; None where JAX chooses, as for what is uncommitted.

    Args:
      unit: the leaves.
      arrays: their `programs.Arrays` before.
      after: shapes of these after the edit.
      place: where leaves go whose shape changes, or None for the rule: the same spec as before, or a copy on all
        devices of the leaves beside it for one that is new.

    Raises:
      StructureError: a new shape does not divide over the mesh.
    """
    old = dict(zip(unit.paths, arrays.params, strict=True))
    asked: dict[str, Sharding] = {}
    params = []
    for path, new in zip(unit.after.paths, after.params, strict=True):
        with located(path=path):
            before = old.get(path)
            wanted = asked_of(place, path, before, new, arrays.params)
            if wanted is not None:
                asked[path] = wanted
            params.append(wanted if wanted is not None else _ruled(before, new, arrays.params))
    shapes = {path: new.shape for path, new in zip(unit.after.paths, after.params, strict=True)}
    slots = []
    for slot, origin, new in zip(unit.after.slots, unit.origins(), after.slots, strict=True):
        path = unit.after.path(slot)
        with located(path=path):
            mirrors = path in asked and new.shape == shapes[path]
            before = None if origin is None else arrays.slots[origin]
            slots.append(asked[path] if mirrors else _ruled(before, new, arrays.params))
    return params, slots, jax.tree.map(lambda leaf, new: _ruled(leaf, new, ()), arrays.memory, after.memory)


def asked_of(
    place: Place | None, path: str, before: Any, new: jax.ShapeDtypeStruct, neighbours: Sequence[Any]
) -> Sharding | None:
    """What `place` says of a leaf whose shape changes."""
    if place is None or (before is not None and np.shape(before) == new.shape):
        return None
    answer = place(path, new)
    if isinstance(answer, PartitionSpec):
        known = [known_sharding(leaf) for leaf in (before, *neighbours)]
        meshes = [sharding.mesh for sharding in known if isinstance(sharding, NamedSharding)]
        if not meshes:
            raise StructureError(
                "shardings= gives a PartitionSpec, and the leaves of the fire lie on no mesh.",
                found=str(answer),
                write="a NamedSharding, with the mesh that is meant",
            )
        answer = NamedSharding(meshes[0], answer)
    if answer is not None and not isinstance(answer, Sharding):
        raise StructureError(
            "shardings= must return a sharding.",
            found=type(answer).__name__,
            write="a jax.sharding.Sharding, a PartitionSpec on the mesh of the leaf, or None",
        )
    return None if answer is None else divided(answer, new.shape)


def _ruled(before: Any, new: Any, neighbours: Iterable[Any]) -> Sharding | None:
    if before is None:
        return replicated(beside(neighbours), len(new.shape))
    if not isinstance(before, jax.Array) or not before.committed:
        return None  # never for uncommitted leaves, which it would commit
    return divided(before.sharding, new.shape)


def placer(shardings: Any, params: Any) -> Place:
    """Where leaves of other shapes go: as a hook's `shardings=` says, else as the boxes around the leaves say.

    Args:
      shardings: a function of (path, new shape and dtype), or None.
      params: the parameters, of which boxed ones name their mesh axes.
    """
    named = _named(params)

    def place(path: str, new: jax.ShapeDtypeStruct) -> Any:
        answer = None
        if shardings is not None:
            try:
                answer = shardings(path, new)
            except Exception as error:
                raise UserCodeError(
                    f"shardings= raised {type(error).__name__}: {shorten(error)}",
                    write="def shardings(path, leaf): return a sharding, a PartitionSpec or None",
                ) from error
        return named.get(path) if answer is None else answer

    return place


def _named(params: Any) -> Mapping[str, PartitionSpec]:
    """Path -> spec on the mesh, of the leaves in boxes that name its axes."""
    boxes = [box for box in jax.tree.leaves(params, is_leaf=_is_box) if _is_box(box)]
    if not boxes:
        return {}
    tree = flatten(params)
    meshes = [leaf.sharding.mesh for leaf in tree.values if isinstance(getattr(leaf, "sharding", None), NamedSharding)]
    if not meshes:
        return {}
    specs = jax.tree.map(lambda box: _spec(box) if _is_box(box) else None, params, is_leaf=_is_box)
    found = {}
    for keys, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda one: isinstance(one, PartitionSpec)):
        path = join(keys)
        names = [name for part in spec for name in ((part,) if isinstance(part, str) else part or ())]
        if all(name in meshes[0].axis_names for name in names):
            found[path] = spec
    return found


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.Partitioned)  # LogicallyPartitioned is one


def _spec(box: Any) -> PartitionSpec | None:
    spec = box.get_partition_spec()
    if not isinstance(box, nn.LogicallyPartitioned):
        return spec
    rules = box.rules or nn.get_logical_axis_rules()
    return spmd.logical_to_mesh_axes(tuple(spec), rules) if rules else None


def moved(values: Any, shardings: Any) -> Any:
    """What came out of a program under Auto axes, as its targets have it."""
    given = jax.tree.leaves(shardings, is_leaf=lambda one: one is None)
    leaves, treedef = jax.tree.flatten(values)
    moved = [
        leaf if one is None or auto_axes(one) is one else jax.device_put(leaf, one)
        for leaf, one in zip(leaves, given, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)
