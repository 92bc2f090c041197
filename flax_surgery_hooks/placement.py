"""Where arrays live. Sort, gather and scatter raise on Explicit mesh axes, so edits run on the same devices under Auto
ones; every leaf comes back under its own sharding, and never committed if it was not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from flax_surgery_hooks.errors import StructureError


def placement(leaf: Any) -> Hashable:
    """What decides which compiled program serves a leaf: shape, dtype, and where it lies."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, leaf.sharding, leaf.committed
    return np.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_auto(leaf: Any) -> bool:
    """Whether a leaf needs no relabelling."""
    return _auto(leaf) is None


def relabelled(tree: Any) -> Any:
    """A tree of arrays on all-Auto meshes of their devices, without a copy."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, s) if (s := _auto(leaf)) is not None else leaf, tree)


def as_before(old: Any, new: Any) -> Any:
    """`new` under the very sharding object of `old` (edits run under Auto axes)."""
    if isinstance(old, jax.Array) and _auto(old) is not None:
        return jax.device_put(new, old.sharding)
    return new


def like_neighbours(neighbours: Iterable[Any], new: Any) -> Any:
    """A leaf that was not there before, on the mesh of the leaves beside it, with that mesh's kind of axes."""
    sharding = beside(neighbours)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        # As a step returns it: Explicit axes name every dimension, and another spec would compile the next step anew.
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*[None] * np.ndim(new)))
    return new if sharding is None else jax.device_put(new, sharding)


def beside(neighbours: Iterable[Any]) -> Sharding | None:
    """The sharding of a leaf that was not there before: a copy on every device of its neighbours.

    None if these are uncommitted, or do not agree on their devices: then JAX places the leaf.
    """
    shardings = [leaf.sharding for leaf in neighbours if isinstance(leaf, jax.Array) and leaf.committed]
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    if len(meshes) == 1 and all(isinstance(sharding, NamedSharding) for sharding in shardings):
        return NamedSharding(meshes.pop(), PartitionSpec())
    return shardings[0] if len(set(shardings)) == 1 else None


def out_sharding(old: Any, shape: Sequence[int]) -> Sharding | None:
    """What `jit` is told of the new value of a leaf: its sharding, if it is committed; else None.

    Raises:
      StructureError: the new shape does not divide over the leaf's mesh.
    """
    if not isinstance(old, jax.Array) or not old.committed:
        return None  # never for uncommitted leaves, which it would commit
    sharding = _auto(old) or old.sharding
    try:
        sharding.shard_shape(tuple(shape))
    except ValueError as error:
        raise StructureError(
            "The new shape does not divide over the leaf's mesh.",
            found=f"shape {list(shape)} under {sharding}",
            write="a size that the mesh axes divide",
        ) from error
    return sharding


def auto_axes(sharding: Sharding | None) -> Sharding | None:
    """The sharding on an all-Auto mesh of the same devices."""
    if not isinstance(sharding, NamedSharding) or all(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return sharding
    mesh = sharding.mesh
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(auto, sharding.spec, memory_kind=sharding.memory_kind)


def _auto(leaf: Any) -> Any:
    """The leaf's sharding on an all-Auto mesh, or None if it needs no other."""
    sharding = getattr(leaf, "sharding", None)
    auto = auto_axes(sharding)
    return None if auto is sharding else auto
