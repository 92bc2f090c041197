"""What surgeries that keep masks have in common: where the masks are kept, that they hold, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import InputError, located, typed
from flax_surgery_hooks.paths import close_matches, flatten, listed
from flax_surgery_hooks.reductions import totals

Arrays = Mapping[str, jax.Array]


class Masked:
    """A surgery of all leaves at once that remembers a bool mask of each, True where an element is kept.

    The masks lie in the train state like the leaves. `observe` keeps the other elements at zero at every step.
    Subclasses make the masks of a fire as `derived["masks"]`.
    """

    preserves: ClassVar[str] = "nothing"
    starts_anew: ClassVar[bool] = True

    def observe(self, leaves: Arrays, memory: Arrays) -> tuple[dict[str, jax.Array], Arrays]:
        """The leaves with zeros where the mask is False. Slots stay as they are: a mask enforced is no fresh start."""
        return {path: jnp.where(memory[path], leaf, 0) for path, leaf in leaves.items()}, memory

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """For all leaves together and for each: `sparsity`, of the new mask, and `overlap` with the old one."""
        return tuple(f"masks/{name}{leaf}" for leaf in ("", *(f"/{path}" for path in paths)) for name in _TOLD)

    def figures(self, leaves: Arrays, memory: Arrays, masks: Arrays) -> dict[str, Any]:
        """`sparsity`: the share of elements that are not kept; `overlap`: of those kept, the share kept before too."""
        counts = {path: totals([_ones(mask), _ones(mask & memory[path])]) for path, mask in masks.items()}
        sizes = {path: float(mask.size) for path, mask in masks.items()}
        told = _shares("", sum(sizes.values()), *(sum(each) for each in zip(*counts.values(), strict=True)))
        for path, (kept, both) in counts.items():
            told |= _shares(f"/{path}", sizes[path], kept, both)
        return told


_TOLD = ("sparsity", "overlap")


def _shares(leaf: str, size: float, kept: Any, both: Any) -> dict[str, Any]:
    # Not 1 - kept / size, which rounds to less than 0 where everything is kept.
    return {f"masks/sparsity{leaf}": (size - kept) / size, f"masks/overlap{leaf}": both / jnp.maximum(kept, 1)}


def _ones(flags: jax.Array) -> jax.Array:
    return jnp.where(flags, 1.0, 0.0)


def dropped(leaf: jax.Array) -> jax.Array:
    """Zeros with the history of the leaf: a weight that is dropped keeps its slots until it comes back."""
    finite = jnp.where(jnp.isfinite(leaf), leaf, 0)
    return finite - jax.lax.stop_gradient(finite)


def of_leaves(name: str, tree: Any, leaves: Arrays) -> dict[str, jax.Array]:
    """What a tree like the parameters holds at the paths of leaves, layers of stacked ones included, as float32.

    Args:
      name: what the tree is, for messages.
      tree: a tree like the parameters, or a mapping from path to array.
      leaves: path -> leaf.

    Raises:
      InputError: it has nothing there, or something of another shape.
    """
    flat = flatten(tree)
    held = dict(zip(flat.paths, flat.values, strict=True))
    found = {}
    for path, leaf in leaves.items():
        with located(path=path):
            found[path] = _one(name, held, path, leaf.shape).astype(leaf.dtype)
    return found


def _one(name: str, held: Mapping[str, Any], path: str, shape: tuple[int, ...]) -> jax.Array:
    stem, _, index = path.removesuffix("]").rpartition("[")
    value = held.get(path)
    if value is None and path.endswith("]") and index.isdecimal() and stem in held:
        value = _layer(held[stem], int(index), shape)
    if value is None or jnp.shape(value) != shape:
        raise InputError(
            f"`{name}` has no array for a selected leaf of this shape.",
            found=typed(value) if value is not None else listed(held),
            write=listed(close_matches(path, held)) or f"{name} of the same structure as the parameters",
        )
    return jnp.asarray(value)


def _layer(stack: Any, index: int, shape: tuple[int, ...]) -> Any:
    """A layer of a stack: along the axis without which it has the layer's shape."""
    whole = jnp.shape(stack)
    axes = [axis for axis in range(len(whole)) if (*whole[:axis], *whole[axis + 1 :]) == shape and index < whole[axis]]
    return jax.lax.index_in_dim(stack, index, axes[0], keepdims=False) if axes else None
