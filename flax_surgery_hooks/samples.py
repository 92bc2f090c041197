"""Elements of leaves before and after a fire, for histograms: copies that outlive a donated state."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.paths import flatten
from flax_surgery_hooks.placement import relabelled

MOST = 1 << 20
"""Of a larger leaf as many elements, evenly spread, so that a histogram never holds a second copy of a large one."""


def sampled(before: Any, after: Any, paths: tuple[str, ...]) -> dict[str, jax.Array]:
    """Elements of the float leaves at these paths, "before/<path>" and "after/<path>" -> 1-d array, as float32.

    Args:
      before: parameters before the fire.
      after: parameters after it.
      paths: of the leaves; one that is missing on one side is left out there.
    """
    samples = {}
    for when, params in (("before", before), ("after", after)):
        leaves = flatten(params)
        held: Mapping[str, Any] = dict(zip(leaves.paths, leaves.values, strict=True))
        for path in paths:
            if path in held and jnp.issubdtype(jnp.result_type(held[path]), jnp.floating):
                samples[f"{when}/{path}"] = _spread(relabelled(jnp.asarray(held[path])), MOST)
    return samples


@functools.partial(jax.jit, static_argnums=1)
def _spread(leaf: jax.Array, most: int) -> jax.Array:
    stride = -(-leaf.size // most) if leaf.size else 1
    # The barrier makes a copy even of a leaf that is taken whole: the train step may donate the leaf itself.
    return jax.lax.optimization_barrier(leaf.reshape(-1)[::stride].astype(jnp.float32))
