"""Adam whose bias correction counts for each element, so that elements can start anew."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks.layouts import PER_UNIT
from flax_surgery_hooks.optax.beside import beside, map_beside
from flax_surgery_hooks.optax_slots import FIRST, SECOND
from flax_surgery_hooks.rules import check_choice
from flax_surgery_hooks.slot_registry import register_slot

PER = ("element", "unit")


class ScaleByAdamPerElementState(NamedTuple):
    """State of `scale_by_adam_per_element`.

    Attributes:
      age: float32, updates that an element has seen, shaped like its parameter or, per unit, [1, ..., 1, last] (a
        scalar's is a scalar). Exact, and then standing still, up to 2**24, where the correction has long been 1.
      mu: first moments.
      nu: second moments.
    """

    age: Any
    mu: Any
    nu: Any


# An element without history starts as in its own first step: its count says so, and no other value has to stand in.
register_slot(ScaleByAdamPerElementState, layout=PER_UNIT, counted=True, age="invariant", mu=FIRST, nu=SECOND)


def scale_by_adam_per_element(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    *,
    mu_dtype: Any = None,
    nesterov: bool = False,
    per: str = "element",
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a count for each element instead of one for all.

    Both moments are averages that start at 0, and Adam divides by what is missing from them, 1 - b**count. An element
    that starts anew at a large count gets no such correction: with the default b2 its first update is 3.16 times that
    of a first step, and it rises to 6.6 times. Here, where `age`, `mu` and `nu` are set to 0, the element goes on as in
    an optimizer that starts at that step; untouched, all goes as in `optax.scale_by_adam`.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the square root.
      eps_root: added inside the square root.
      mu_dtype: dtype of `mu`; None for that of the parameter.
      nesterov: as in `optax.nadam`.
      per: "element", or "unit": one age for each index of the last axis. The memory of one more moment, or next to
        none.

    Returns:
      A transform whose state is a `ScaleByAdamPerElementState`.

    Raises:
      RuleError: a `per` that does not exist.

    >>> tx = scale_by_adam_per_element(per="unit")
    >>> state = tx.init({"kernel": jnp.ones((3, 2))})
    >>> updates, state = tx.update({"kernel": jnp.full((3, 2), 5.0)}, state)
    >>> state.age["kernel"].tolist()
    [[1.0, 1.0]]
    """
    check_choice(per, PER, "`per=`")
    mu_dtype = mu_dtype if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def init(params: Any) -> ScaleByAdamPerElementState:
        age = _ages(params, per)
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        return ScaleByAdamPerElementState(age, mu, optax.tree.zeros_like(params))

    def update(updates: Any, state: ScaleByAdamPerElementState, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        age = jax.tree.map(lambda age: age + 1, state.age)

        def direction(g: Any, m: Any, v: Any, age: Any) -> Any:
            mean = m / _seen(b1, age, m)
            if nesterov:
                mean = b1 * (m / _seen(b1, age + 1, m)) + (1 - b1) * (g / _seen(b1, age, g))
            return mean / (jnp.sqrt(v / _seen(b2, age, v) + eps_root) + eps)

        moved = map_beside(direction, updates, mu, nu, age)
        return moved, ScaleByAdamPerElementState(age, optax.tree.cast(mu, mu_dtype), optax.tree.cast_like(nu, state.nu))

    return optax.GradientTransformation(init, update)


def adam_per_element(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    *,
    mu_dtype: Any = None,
    nesterov: bool = False,
    per: str = "element",
) -> optax.GradientTransformation:
    """`optax.adam` on `scale_by_adam_per_element`; see there.

    >>> tx = adam_per_element(1e-3, b2=0.95, per="unit")
    """
    scale = scale_by_adam_per_element(b1, b2, eps, eps_root, mu_dtype=mu_dtype, nesterov=nesterov, per=per)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


def adamw_per_element(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    *,
    mu_dtype: Any = None,
    nesterov: bool = False,
    per: str = "element",
    weight_decay: Any = 1e-4,
    mask: Any = None,
) -> optax.GradientTransformation:
    """`optax.adamw` on `scale_by_adam_per_element`; see there.

    >>> tx = adamw_per_element(1e-3, weight_decay=0.1)
    """
    scale = scale_by_adam_per_element(b1, b2, eps, eps_root, mu_dtype=mu_dtype, nesterov=nesterov, per=per)
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(scale, decay, optax.scale_by_learning_rate(learning_rate))


def _ages(params: Any, per: str) -> Any:
    if per == "element":
        return optax.tree.zeros_like(params, dtype=jnp.float32)  # sharded like the parameters

    def of_units(leaf: Any) -> jax.Array:
        shape = jnp.shape(leaf)
        return jnp.zeros((1,) * (len(shape) - 1) + shape[-1:] if shape else (), jnp.float32)

    return beside(params, of_units)


def _seen(decay: Any, age: jax.Array, moment: jax.Array) -> jax.Array:
    """Which part of a moment its gradients make up, 1 - decay**age, in the moment's dtype but computed in float32."""
    real = jnp.finfo(moment.dtype).dtype
    return (1 - decay ** age.astype(jnp.promote_types(real, jnp.float32))).astype(real)
