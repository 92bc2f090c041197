"""Elements of leaves before and after a fire, for histograms: copies that outlive a donated state."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flax_surgery_hooks.layers import Layer, taken
from flax_surgery_hooks.paths import flatten
from flax_surgery_hooks.placement import relabelled

MOST = 1 << 20
"""Of a larger leaf as many elements, evenly spread, so that a histogram never holds a second copy of a large one."""


def sampled(
    when: str, params: Any, paths: Iterable[str], layers: Mapping[str, Layer] | None = None
) -> dict[str, jax.Array]:
    """Elements of the float leaves at these paths, "<when>/<path>" -> 1-d array, as float32.

    Args:
      when: "before" or "after".
      params: the parameters then.
      paths: of the leaves; one that is missing is left out.
      layers: those of the paths that are of layers of stacked leaves.
    """
    leaves = flatten(params)
    held = dict(zip(leaves.paths, leaves.values, strict=True))
    for path, layer in (layers or {}).items():
        held[path] = taken(held[layer.leaf_path(path)], layer)
    return {
        f"{when}/{path}": _elements(relabelled(jnp.asarray(held[path])))
        for path in paths
        if path in held and jnp.issubdtype(jnp.result_type(held[path]), jnp.floating)
    }


def _elements(leaf: jax.Array) -> jax.Array:
    """The elements of one leaf; those of one that several processes share are on each of them, for one to write."""
    if leaf.is_fully_addressable or not isinstance(leaf.sharding, NamedSharding):
        return _program(None)(leaf, MOST)
    return _program(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf, MOST)


@functools.cache
def _program(place: NamedSharding | None) -> Any:
    return jax.jit(_spread, static_argnums=1, out_shardings=place)


def _spread(leaf: jax.Array, most: int) -> jax.Array:
    stride = -(-leaf.size // most) if leaf.size else 1
    # The barrier makes a copy even of a leaf that is taken whole: the train step may donate the leaf itself.
    return jax.lax.optimization_barrier(leaf.reshape(-1)[::stride].astype(jnp.float32))
