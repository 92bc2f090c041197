"""Parameters that can be frozen and thawed while the model trains."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks.errors import StateError
from flax_surgery_hooks.optax.beside import beside, map_beside
from flax_surgery_hooks.slot_registry import register_slot
from flax_surgery_hooks.slots import owners_of


class FreezableState(NamedTuple):
    """State of `freezable`.

    Attributes:
      inner_state: that of the inner optimizer.
      frozen: a bool of shape () for each parameter, at their key paths (boxes and variables around
        them name no mesh axes).
    """

    inner_state: Any
    frozen: Any


register_slot(FreezableState, frozen="none")


def freezable(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets single parameters be frozen: `state.frozen` says which, and a change of its values traces nothing anew.

    While a parameter is frozen the inner optimizer gets a gradient of 0 for it (so that a clip by the global norm does
    not see it), its update is exactly -0.0 whatever comes out (weight decay, momentum, NaN), and its slots keep their
    values bitwise; thawed, it goes on with these. What belongs to no single parameter, such as a count, goes on.

    Put it around everything that changes updates: what comes after it can move a frozen parameter, and the 0.0 that
    `optax.MultiSteps` returns between its updates makes 0.0 of a -0.0. `grad=`, `value_fn=` and other extra arguments
    reach the inner optimizer as they are.

    Args:
      tx: the inner optimizer, of any states.

    Returns:
      A transform whose state is a `FreezableState`, with nothing frozen at first. Gradients, updates and slots keep
      their shapes and dtypes; updates that are neither float, complex nor integer (of keys, say) pass as they are.

    Raises:
      StateError: `tx` is no optax transformation, such as a function that makes one.

    >>> tx = freezable(optax.adamw(0.1))
    >>> params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> state = state._replace(frozen={**state.frozen, "w": jnp.array(True)})
    >>> updates, state = tx.update({"w": jnp.ones(2), "v": jnp.ones(2)}, state, params)
    >>> [updates[name].tolist() for name in ("w", "v")]
    [[-0.0, -0.0], [-0.1000..., -0.1000...]]
    """
    if not callable(getattr(tx, "update", None)):
        raise StateError(
            "freezable wraps an optax transformation.",
            found=getattr(tx, "__name__", type(tx).__name__),
            write="fsh.optax.freezable(optax.adamw(1e-3))",
        )
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> FreezableState:
        return FreezableState(inner.init(params), beside(params, lambda _: jnp.zeros((), bool)))

    def update(updates: Any, state: FreezableState, params: Any = None, **extra: Any) -> tuple[Any, FreezableState]:
        seen = map_beside(lambda g, frozen: _filled(g, frozen, 0.0), updates, state.frozen)
        moved, inner_state = inner.update(seen, state.inner_state, params, **extra)
        # p + -0.0 is bitwise p for every p; p + 0.0 is not: it makes 0.0 of -0.0.
        moved = map_beside(lambda u, frozen: _filled(u, frozen, -0.0), moved, state.frozen)
        owners = _owners(inner, state.inner_state, state.frozen, updates)
        sizes = [leaf.size for leaf in jax.tree.leaves(updates)]
        return moved, state._replace(inner_state=_kept(state.inner_state, inner_state, owners, state.frozen, sizes))

    return optax.GradientTransformationExtraArgs(init, update)


def _filled(leaf: Any, frozen: Any, value: float) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.number):
        return leaf
    return jax.lax.select_n(frozen, leaf, jnp.full_like(leaf, value))


def _owners(inner: optax.GradientTransformation, inner_state: Any, frozen: Any, updates: Any) -> dict[int, int]:
    """Place of a slot among the leaves of the inner state -> place of its parameter.

    One bare array has no path by which its slots could be told from a count. In a dict it has one, and the state of
    that has the same leaves in the same order.
    """
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(frozen)):
        return owners_of(inner_state, frozen)
    wrapped = {"array": updates}
    return owners_of(jax.eval_shape(inner.init, wrapped), wrapped)


def _kept(old: Any, new: Any, owners: dict[int, int], frozen: Any, sizes: list[int]) -> Any:
    """The new state, with the old slots of what is frozen.

    What belongs to no single parameter and has as many elements as all of them is the vector of `optax.flatten`.
    """
    flags = jax.tree.leaves(frozen)

    def kept(place: int, before: Any, after: Any) -> Any:
        if place in owners:
            return jax.lax.select_n(flags[owners[place]], after, before.astype(after.dtype))
        if len(sizes) > 1 and before.shape == (sum(sizes),):
            each = [jnp.broadcast_to(flag, (size,)) for flag, size in zip(flags, sizes, strict=True)]
            return jnp.where(jnp.concatenate(each), before, after)
        return after

    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    leaves = [kept(place, before, after) for place, (before, after) in enumerate(pairs)]
    return jax.tree.unflatten(jax.tree.structure(new), leaves)
