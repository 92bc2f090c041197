"""Layers of a stacked leaf, such as `nn.scan` makes: taken out of the leaf for an edit, and put back.

Layers lie along the first axis, or along the one that the leaf's box (`nn.Partitioned`) names "layers". A layer lies
where its part of the leaf lies, and the leaf keeps its own sharding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_surgery_hooks.paths import Leaves
from flax_surgery_hooks.placement import as_before, auto_axes, out_sharding, relabelled

AXIS_NAME = "layers"
"""What boxes call the axis along which layers lie, as `metadata_params={nn.PARTITION_NAME: "layers"}` has it."""


@dataclass(frozen=True)
class Layer:
    """One layer of a stacked leaf.

    Attributes:
      axis: along which layers lie.
      index: which of them it is, not negative.
    """

    axis: int
    index: int

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape in a leaf of this one.

        >>> Layer(0, 3).shape((4, 8, 2))
        (8, 2)
        """
        return (*leaf[: self.axis], *leaf[self.axis + 1 :])

    def path(self, leaf: str) -> str:
        """Its path, below that of the leaf.

        >>> Layer(0, 3).path("layers/kernel")
        'layers/kernel[3]'
        """
        return f"{leaf}[{self.index}]"

    def leaf_path(self, path: str) -> str:
        """The path of the leaf, from its own."""
        return path.removesuffix(f"[{self.index}]")

    def sharding(self, leaf: Any) -> Any:
        """Where it lies in a leaf of this sharding; None unless that is one of a mesh."""
        if not isinstance(leaf, NamedSharding):
            return None
        spec = PartitionSpec(*self.shape(tuple(leaf.spec)))
        return NamedSharding(leaf.mesh, spec, memory_kind=leaf.memory_kind)


def axis_of(leaves: Leaves, place: int) -> int:
    """The axis along which the layers of a leaf lie; the leaf has at least one."""
    axis = _named_axes(leaves.treedef).get(place, 0)
    return axis if axis < np.ndim(leaves.values[place]) else 0


@functools.lru_cache(maxsize=32)
def _named_axes(treedef: Any) -> dict[int, int]:
    """Place of a leaf -> the axis that its box names so."""
    tree = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    boxes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, meta.Partitioned))
    return {
        box.value: list(box.names).index(AXIS_NAME)
        for box in boxes
        if isinstance(box, meta.Partitioned) and AXIS_NAME in box.names
    }


def taken(leaf: Any, layer: Layer) -> Any:
    """One layer of a leaf: concrete, abstract or traced as the leaf is, and committed if that is."""
    shape = layer.shape(np.shape(leaf))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype, weak_type=leaf.weak_type)
    if isinstance(leaf, jax.core.Tracer):
        take = functools.partial(_take, layer.axis)
        return _under_auto_axes(take, layer.sharding(jax.typeof(leaf).sharding))(leaf, layer.index)
    own = layer.sharding(leaf.sharding) if isinstance(leaf, jax.Array) and leaf.committed else None
    auto = auto_axes(own)
    spread = own is not None and _is_spread(leaf, layer.axis)
    value = _taker(layer.axis, auto, spread)(relabelled(leaf), np.int32(layer.index))
    return value if own is auto else jax.device_put(value, own)


def with_layers(leaf: Any, axis: int, layers: Mapping[int, Any], *, donate: bool = False) -> Any:
    """The leaf with other layers at some indices, under its own sharding; all others keep their bits.

    Args:
      leaf: concrete, abstract or traced.
      axis: along which its layers lie.
      layers: index -> layer, in the leaf's dtype.
      donate: whether a concrete leaf gives its memory, and is gone.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    indices, values = tuple(layers), tuple(layers.values())
    if any(isinstance(one, jax.core.Tracer) for one in (leaf, *values)):
        put = _under_auto_axes(functools.partial(_put, axis), getattr(jax.typeof(leaf), "sharding", None))
        return put(leaf, indices, values)
    sharding = out_sharding(leaf, np.shape(leaf))
    new = _putter(axis, sharding, donate)(relabelled(leaf), tuple(map(np.int32, indices)), relabelled(values))
    return as_before(leaf, new)


def _take(axis: int, leaf: Any, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, axis, keepdims=False)


def _is_spread(leaf: jax.Array, axis: int) -> bool:
    """Whether layers lie on several devices, and have bits to sum."""
    sharding: Any = leaf.sharding
    over = tuple(sharding.spec)[axis : axis + 1]
    return over not in ((), (None,)) and leaf.dtype.name in _BITS


_BITS = {name: f"uint{8 * np.dtype(name).itemsize}" for name in ("float16", "float32", "float64")} | {
    "bfloat16": "uint16"
}


def _take_spread(axis: int, leaf: jax.Array, index: Any) -> jax.Array:
    """`_take` along a sharded axis, where XLA would gather the whole leaf for a dynamic index.

    Every device sums what it has of the layer, which is all or nothing. The sum is of bits: one of floats would turn
    a negative zero into another.
    """
    bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.name])
    here = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis) == index
    found = jnp.sum(jnp.where(here, bits, jnp.zeros((), bits.dtype)), axis=axis, dtype=bits.dtype)
    return jax.lax.bitcast_convert_type(found, leaf.dtype)


def _put(axis: int, leaf: Any, indices: tuple[Any, ...], values: tuple[Any, ...]) -> jax.Array:
    for index, value in zip(indices, values, strict=True):
        leaf = jax.lax.dynamic_update_index_in_dim(leaf, value, index, axis)
    return leaf


# The index is an argument, so that all layers of a leaf, and of leaves like it, share a program.
@functools.lru_cache(maxsize=256)
def _taker(axis: int, sharding: Any, spread: bool) -> Any:
    return jax.jit(functools.partial(_take_spread if spread else _take, axis), out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _putter(axis: int, sharding: Any, donate: bool) -> Any:
    return jax.jit(functools.partial(_put, axis), out_shardings=sharding, donate_argnums=(0,) if donate else ())


def _under_auto_axes(function: Any, sharding: Any) -> Any:
    """A traced function under Auto axes: on Explicit ones a sharded axis cannot be indexed."""
    if not isinstance(sharding, NamedSharding):
        return function
    kinds = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=sharding) if explicit else function
