"""Recorded parameters and gradients, and optimizers run on them, several side by side. Float64."""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax

from flax_surgery_hooks.testing.edits import EditRow
from flax_surgery_hooks.testing.rows import OptimizerRow

enable_x64: Any = vars(jax if hasattr(jax, "enable_x64") else jax.experimental)["enable_x64"]  # before JAX 0.8

STEPS = 5
Tree = dict[str, Any]


def key() -> jax.Array:
    """The key of a fire, for edits that draw."""
    return jax.random.key(7)


def params_at(step: int, shape: tuple[int, ...]) -> Tree:
    """The parameters before a step: a kernel of this shape and a bias of 4."""
    rng = np.random.default_rng(0)
    start, drift = ({"kernel": rng.normal(size=shape), "bias": rng.normal(size=4)} for _ in range(2))
    return {name: start[name] + 0.1 * step * drift[name] for name in start}


def gradient_at(step: int, shape: tuple[int, ...]) -> Tree:
    """The gradient of a step."""
    rng = np.random.default_rng(100 + step)
    return {"kernel": rng.normal(size=shape), "bias": rng.normal(size=4)}


@functools.lru_cache(maxsize=64)
def transforms(rows: tuple[OptimizerRow, ...]) -> tuple[Any, ...]:
    """The optimizers of rows, made once."""
    return tuple(optax.with_extra_args_support(row.make()) for row in rows)


def beside(rows: Sequence[OptimizerRow]) -> Any:
    """One `GradientTransformation` that runs several on the same gradients; its updates are those of the first.

    The fields of its state are r0, r1, ...: each optimizer lies in its own, in the context that it has alone.
    """
    held = collections.namedtuple("SideBySide", [f"r{place}" for place in range(len(rows))])  # type: ignore[misc]
    made = transforms(tuple(rows))

    def init(params: Any) -> Any:
        return held(*(tx.init(params) for tx in made))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        given = extra_args(updates, updates if params is None else params, jnp.asarray(1.0)) | extra
        done = [
            tx.update(updates, one, params, **{name: given[name] for name in row.asks})
            for row, tx, one in zip(rows, made, state, strict=True)
        ]
        return done[0][0], held(*(one for _, one in done))

    return optax.GradientTransformationExtraArgs(init, update)


def run(tx: Any, shape: tuple[int, ...], edit: EditRow | None = None, *, wrong: bool = False) -> Any:
    """The state of `beside` after the recorded steps.

    Args:
      tx: the optimizer.
      shape: of the recorded kernels.
      edit: an edit that maps kernels and their gradients, from the start.
      wrong: whether gradients are mapped as they should not be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optax's own about dtypes of scalars
        state = tx.init(mapped_params(0, shape, edit))
        for step in range(STEPS):
            state = updated(tx, state, step, shape, edit, wrong=wrong)[1]
    return state


def updated(
    tx: Any, state: Any, step: int, shape: tuple[int, ...], edit: EditRow | None = None, *, wrong: bool = False
) -> Any:
    """Updates and state of one recorded step."""
    params = mapped_params(step, shape, edit)
    return update_of(tx)(mapped_gradient(step, shape, edit, wrong=wrong), state, params, jnp.asarray(2.0 - 0.1 * step))


@functools.lru_cache(maxsize=64)
def update_of(tx: Any) -> Callable[..., Any]:
    """`tx.update(grads, state, params, value)` with all that optimizers ask for, compiled."""

    def update(grads: Any, state: Any, params: Any, value: Any) -> Any:
        return tx.update(grads, state, params, **extra_args(grads, params, value))

    return jax.jit(update)


def extra_args(grads: Any, params: Any, value: Any) -> dict[str, Any]:
    """What some optimizers ask for: the loss, the gradient, and the loss as a function of the parameters."""

    def loss(at: Any) -> Any:
        return value + sum(jnp.vdot(grads[name], at[name] - params[name]) for name in grads)

    return {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}


def mapped_params(step: int, shape: tuple[int, ...], edit: EditRow | None = None) -> Tree:
    """The parameters before a step, after the edit if there is one, as JAX arrays."""
    old = params_at(step, shape)
    return jax.tree.map(jnp.asarray, old if edit is None else old | {"kernel": edit.params(old["kernel"])})


def mapped_gradient(step: int, shape: tuple[int, ...], edit: EditRow | None = None, *, wrong: bool = False) -> Tree:
    """The gradient of a step after the edit, mapped as it should be or as it should not."""
    old = gradient_at(step, shape)
    new = old if edit is None else old | {"kernel": edit.gradient(old["kernel"], wrong=wrong)}
    return jax.tree.map(jnp.asarray, new)


def of_row(state: Any, place: int) -> Mapping[str, np.ndarray]:
    """The leaves of one optimizer's state by their key path, keys of `jax.random` left out."""
    items = jax.tree_util.tree_flatten_with_path(state[place])[0]
    return {
        jax.tree_util.keystr(keys): np.asarray(leaf)
        for keys, leaf in items
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
