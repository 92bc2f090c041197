"""Masked params for the forward pass, with a gradient for the dense ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks import paths as names
from flax_surgery_hooks.errors import SelectionError, StateError, StructureError, SurgeryFunctionError, quoted, typed
from flax_surgery_hooks.layers import Layer, axis_of
from flax_surgery_hooks.paths import Leaves, close_matches, listed
from flax_surgery_hooks.remembered import remembered

Masks = Mapping[str, Any]


def ste(params: Any, masks: Masks) -> Any:
    """Params with zeros where a mask is False, whose gradient goes straight through to all elements.

    Call it on the params in the loss. A masked weight is zero in the forward pass and still gets the gradient of the
    loss with respect to that zero, so that it can come back. The value is that of `apply_masks`, bit by bit.

    Args:
      params: any tree of arrays that surgeries take: dicts, boxes, `nnx.State`.
      masks: path -> bool mask of the leaf's shape, such as `masks_of` gives; `layers/kernel[3]` is a layer of a stacked
        leaf. Leaves without a mask are as they are.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      SelectionError: no param has a mask's path, or a leaf has one as a whole and by layers.
      StructureError: a mask is not of bools, or of another shape.

    Source: Bengio et al. 2013, arXiv 1308.3432.

    >>> masks = {"w": jnp.array([True, False])}
    >>> loss = lambda params: jnp.sum(ste(params, masks)["w"] ** 2 + 3 * ste(params, masks)["w"])
    >>> value, gradient = jax.value_and_grad(loss)({"w": jnp.array([1.0, 2.0])})
    >>> float(value), gradient["w"].tolist()
    (4.0, [5.0, 3.0])
    """
    return _masked(params, masks, _through)


def sr_ste(params: Any, masks: Masks, decay: float = 2e-4) -> Any:
    """`ste`, whose gradient also pulls masked weights to zero: `g + decay * (1 - mask) * w`.

    Without the pull, masks of N:M that follow the weights keep changing until the end. Call it once in a loss, whose
    scale the pull does not know: a loss that is multiplied, as for float16, needs a `decay` that is multiplied alike.

    Args:
      params: as for `ste`.
      masks: as for `ste`.
      decay: how much of a masked weight is added to its gradient, 0 or more.

    Returns:
      As `ste`.

    Raises:
      SelectionError, StructureError: as for `ste`.
      SurgeryFunctionError: `decay` is negative, or no number.

    Source: Zhou et al. 2021, arXiv 2102.04010, equation 9.

    >>> loss = lambda params: jnp.sum(sr_ste(params, {"w": jnp.array([True, False])}, 0.5)["w"])
    >>> jax.grad(loss)({"w": jnp.array([1.0, 2.0])})["w"].tolist()
    [1.0, 2.0]
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < float("inf"):
        raise SurgeryFunctionError("sr_ste(decay=...) is a number, 0 or more.", found=quoted(decay), write="decay=2e-4")
    return _masked(params, masks, lambda leaf, mask: _pulling(leaf, mask, decay))


def apply_masks(params: Any, masks: Masks) -> Any:
    """Params with zeros where a mask is False; the gradient is masked alike.

    Args:
      params: as for `ste`.
      masks: as for `ste`.

    Returns:
      As `ste`.

    Raises:
      SelectionError, StructureError: as for `ste`.

    >>> apply_masks({"w": jnp.array([jnp.inf, 2.0])}, {"w": jnp.array([False, True])})["w"].tolist()
    [0.0, 2.0]
    """
    return _masked(params, masks, _zeroed)


def masks_of(state: Any, hook: str) -> dict[str, Any]:
    """The masks that a hook keeps in the train state.

    Args:
      state: whose `surgery` field holds them once `hooks.init(state)` was called; also while it is traced.
      hook: name of the hook, whose surgery remembers masks.

    Returns:
      Path -> bool mask.

    Raises:
      StateError: the state holds no memory of such a hook, or it is not of masks.

    >>> import types
    >>> state = types.SimpleNamespace(surgery={"memory": {"prune": {"w": jnp.array([True, False])}}})
    >>> masks_of(state, "prune")["w"].tolist()
    [True, False]
    """
    found = remembered(state, hook, "masks")
    masks = found if isinstance(found, Mapping) else {}
    if not masks or any(getattr(mask, "dtype", None) != jnp.bool_ for mask in masks.values()):
        raise StateError(
            f"What the hook {hook!r} remembers is not masks.",
            found=listed(f"{path}: {typed(mask)}" for path, mask in masks.items()) or typed(found),
            write="the name of a hook that prunes",
        )
    return dict(masks)


@jax.custom_jvp
def _through(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return _zeroed(leaf, mask)


@_through.defjvp
def _through_jvp(primals: Any, tangents: Any) -> Any:
    return _through(*primals), tangents[0]


@jax.custom_vjp
def _pulling(leaf: jax.Array, mask: jax.Array, decay: Any) -> jax.Array:
    return _zeroed(leaf, mask)


def _pulling_forward(leaf: jax.Array, mask: jax.Array, decay: Any) -> Any:
    return _zeroed(leaf, mask), (leaf, mask, decay)


def _pulling_backward(held: Any, cotangent: jax.Array) -> Any:
    leaf, mask, decay = held
    pull = jnp.asarray(decay, leaf.dtype) * leaf
    return cotangent + jnp.where(mask, jnp.zeros((), leaf.dtype), pull), None, None


_pulling.defvjp(_pulling_forward, _pulling_backward)


def _zeroed(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    # Not a product: that would make NaN of a masked infinity, and -0.0 of what is negative.
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _masked(params: Any, masks: Masks, mask_leaf: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    leaves = names.flatten(params)
    values = list(leaves.values)
    for place, mask in _by_place(leaves, masks).items():
        values[place] = mask_leaf(jnp.asarray(values[place]), mask)
    return jax.tree.unflatten(leaves.treedef, values)


def _by_place(leaves: Leaves, masks: Masks) -> dict[int, jax.Array]:
    """Place of a leaf -> its whole mask."""
    places = {path: place for place, path in enumerate(leaves.paths)}
    whole: dict[int, jax.Array] = {}
    layers: dict[int, dict[int, jax.Array]] = {}
    for path, mask in masks.items():
        stem, _, index = path.removesuffix("]").rpartition("[")
        if path in places:
            whole[places[path]] = _checked(mask, path, jnp.shape(leaves.values[places[path]]))
        elif path.endswith("]") and stem in places and index.isdecimal():
            place = places[stem]
            layers.setdefault(place, {})[int(index)] = _checked(mask, path, _layer_shape(leaves, place, path, index))
        else:
            raise SelectionError(
                "A mask is for a parameter that is not there.",
                path=path,
                found=listed(map(repr, leaves.paths)) or "no parameters at all",
                write=" or ".join(map(repr, close_matches(path, leaves.paths))) or None,
            )
    for place in whole.keys() & layers.keys():
        raise SelectionError(
            "A leaf has a mask as a whole, and masks of its layers.",
            path=leaves.paths[place],
            found=f"layers {listed(map(str, sorted(layers[place])))}",
            write="one of them",
        )
    return whole | {place: _stacked(leaves, place, ones) for place, ones in layers.items()}


def _layer_shape(leaves: Leaves, place: int, path: str, index: str) -> tuple[int, ...]:
    """The shape of a layer, which the leaf has."""
    shape = jnp.shape(leaves.values[place])
    axis = axis_of(leaves, place) if shape else 0
    if not shape or int(index) >= shape[axis]:
        raise SelectionError(
            "A mask is for a layer that the leaf has not.",
            path=path,
            found=f"shape {list(shape)}, layers along axis {axis}",
            write=f"an index up to {shape[axis] - 1}" if shape else "the path without an index",
        )
    return Layer(axis, int(index)).shape(shape)


def _checked(mask: Any, path: str, shape: tuple[int, ...]) -> jax.Array:
    if getattr(mask, "dtype", None) != jnp.bool_ or jnp.shape(mask) != shape:
        raise StructureError(
            "A mask has to be of bools, and of the shape of what it masks.",
            path=path,
            found=typed(mask),
            write=f"a mask of bool{list(shape)}, which `hooks.init(state)` makes anew after a fire that changed shapes",
        )
    return jnp.asarray(mask)


def _stacked(leaves: Leaves, place: int, layers: Mapping[int, jax.Array]) -> jax.Array:
    """The mask of a stacked leaf, of which layers without a mask are kept whole."""
    axis = axis_of(leaves, place)
    size = jnp.shape(leaves.values[place])[axis]
    kept = jnp.ones_like(next(iter(layers.values())))
    return jnp.stack([layers.get(index, kept) for index in range(size)], axis)
