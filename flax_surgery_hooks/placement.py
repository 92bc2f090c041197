"""Where arrays live. Sort, gather and scatter raise on Explicit mesh axes, so edits run on the same devices under Auto
ones; every leaf comes back under its own sharding, and never committed if it was not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from flax_surgery_hooks.checks import concrete
from flax_surgery_hooks.errors import StructureError
from flax_surgery_hooks.paths import listed

_NO_MESH = Mesh(np.empty((), dtype=object), ())


def off_mesh(state: Any) -> contextlib.AbstractContextManager[Any]:
    """What runs here, on a state that has values, sees no mesh of `jax.set_mesh`: one of Explicit axes would contradict
    the Auto ones of edits, and any would take uncommitted leaves on itself.
    """
    if jax.sharding.get_abstract_mesh().empty or not concrete(state):
        return contextlib.nullcontext()
    return jax.set_mesh(_NO_MESH)


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
    sharding = replicated(beside(neighbours), np.ndim(new))
    return new if sharding is None else jax.device_put(new, sharding)


def replicated(sharding: Sharding | None, ndim: int) -> Sharding | None:
    """What `beside` gives, for an array of so many axes.

    Explicit axes name every one, as a step returns it: another spec would compile the next step anew.
    """
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return NamedSharding(sharding.mesh, PartitionSpec(*[None] * ndim))
    return sharding


def beside(neighbours: Iterable[Any]) -> Sharding | None:
    """The sharding of a leaf that was not there before: a copy on every device of its neighbours.

    None if these are uncommitted, or do not agree on their devices: then JAX places the leaf.
    """
    shardings = [sharding for leaf in neighbours if (sharding := known_sharding(leaf)) is not None]
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    if len(meshes) == 1 and all(isinstance(sharding, NamedSharding) for sharding in shardings):
        return NamedSharding(meshes.pop(), PartitionSpec())
    return shardings[0] if len(set(shardings)) == 1 else None


def known_sharding(leaf: Any) -> Sharding | None:
    """Where a leaf is meant to lie: the sharding of a committed array, or what an abstract one says."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def check_together(name: str, paths: Iterable[str], leaves: Iterable[Any]) -> None:
    """Raises unless all leaves that a surgery sees in one call, and what goes with them, lie on the same devices.

    Raises:
      StructureError: they do not.
    """
    held = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and leaf.committed]
    sets = {tuple(sorted(device.id for device in list[Any](leaf.sharding.device_set))) for leaf in held}
    if len(sets) > 1:
        raise StructureError(
            f"One call of the surgery {name} takes arrays that lie on different devices.",
            path=listed(paths),
            found=" and ".join(f"devices {listed(map(str, ids), 8)}" for ids in sorted(sets)),
            write="jax.device_put of the state onto one mesh, or a surgery of one leaf, with its slots beside it",
        )


def out_sharding(old: Any, shape: Sequence[int]) -> Sharding | None:
    """What `jit` is told of the new value of a leaf: its sharding, if it is committed; else None.

    Raises:
      StructureError: the new shape does not divide over the leaf's mesh.
    """
    if not isinstance(old, jax.Array) or not old.committed:
        return None  # never for uncommitted leaves, which it would commit
    return auto_axes(divided(old.sharding, tuple(shape)))


def divided(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """The sharding, if the shape divides over its mesh.

    Raises:
      StructureError: it does not.
    """
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:
        raise StructureError(
            "The new shape does not divide over the leaf's mesh.",
            found=_undivided(sharding, shape) or f"shape {list(shape)} under {sharding}",
            write="a size that the mesh axes divide, or shardings= of the hook, which says where the new leaf goes",
        ) from error
    return sharding


def _undivided(sharding: Sharding, shape: tuple[int, ...]) -> str | None:
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = dict(sharding.mesh.shape)
    if len(sharding.spec) > len(shape):
        return f"shape {list(shape)} has fewer axes than {sharding.spec}"
    for axis, (size, part) in enumerate(zip(shape, sharding.spec, strict=False)):
        names = (part,) if isinstance(part, str) else tuple(part or ())
        devices = math.prod(mesh[name] for name in names)
        if size % devices:
            over = " and ".join(map(repr, names))
            return (
                f"axis {axis} of size {size} over {over}, {devices} shards, in shape {list(shape)} on the mesh {mesh}"
            )
    return None


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
