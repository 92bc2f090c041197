"""Laws of training on after an edit: nothing drifts, nothing stops, nothing is compiled again. In float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_surgery_hooks as fsh
from flax_surgery_hooks.testing import streams
from flax_surgery_hooks.testing.edits import SMALL
from flax_surgery_hooks.testing.rows import OptimizerRow


def _prune(kernel: Any) -> Any:
    return jnp.where(jnp.abs(kernel) >= jnp.sort(jnp.abs(kernel).ravel())[kernel.size // 2], kernel, 0)


def _project(kernel: Any) -> Any:
    norm = jnp.sqrt(jnp.sum(kernel * kernel, axis=0, keepdims=True))
    shrunk = kernel / jax.lax.stop_gradient(norm)
    return jnp.where(norm > 1.0001, shrunk, kernel)  # a little above: what has been projected is 1 up to rounding


IDEMPOTENT: dict[str, Callable[[Any], Any]] = {
    "clip": lambda kernel: jnp.clip(kernel, -0.5, 0.5),
    "maximum": lambda kernel: jnp.maximum(kernel, 0.1),
    "project": _project,
    "prune": _prune,
}
"""Edits that change nothing the second time."""


def trained(rows: Sequence[OptimizerRow]) -> Any:
    """Optimizers side by side after the recorded steps, as something that `fsh.operate` takes."""
    tx = streams.beside(rows)
    params = streams.mapped_params(streams.STEPS, SMALL)
    return fsh.bind(params=params, opt_state=streams.run(tx, SMALL), tx=tx)


def edit(state: Any, surgery: Any, rule: Any) -> Any:
    """The state after an edit of its kernel."""
    return fsh.operate(state, surgery, params="kernel", opt_state=rule, guard="off")[0]


def changed(before: Any, after: Any, where: Any = None) -> list[str]:
    """Key paths of the leaves that are not bitwise equal.

    Args:
      before: an optimizer state.
      after: another one of the same structure.
      where: booleans shaped like the kernel: of leaves of that shape, only these elements count.
    """
    found = []
    for (keys, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            continue
        old, new = np.asarray(a), np.asarray(b)
        if where is not None and old.shape == np.shape(where):
            old, new = old[where], new[where]
        if old.tobytes() != new.tobytes():
            found.append(jax.tree_util.keystr(keys))
    return found


def check_idempotent(rows: Sequence[OptimizerRow], surgery: Any, rule: str) -> None:
    """The second fire of an idempotent edit changes no slot.

    Raises:
      AssertionError: it does.
    """
    once = edit(trained(rows), surgery, rule)
    drifted = changed(once.opt_state, edit(once, surgery, rule).opt_state)
    if drifted:
        raise AssertionError(f"the second fire changes {', '.join(drifted)}")


def check_untouched(rows: Sequence[OptimizerRow], rule: str) -> None:
    """Elements that an edit leaves as they are keep their slots bitwise.

    Raises:
      AssertionError: they do not, or nothing has changed at all.
    """
    state, factors = trained(rows), np.ones(SMALL, np.float32)
    factors[0] = 3.0
    after = edit(state, lambda kernel: kernel * factors, rule)
    touched = changed(state.opt_state, after.opt_state, factors == 1)
    if touched:
        raise AssertionError(f"slots of unchanged elements change: {', '.join(touched)}")
    if rule == "transport" and not changed(state.opt_state, after.opt_state):
        raise AssertionError("no slot of the changed elements changes")


def check_extreme(rows: Sequence[OptimizerRow], factor: float, rule: Any = "transport") -> None:
    """Second moments that were positive stay so, and finite, when weights are scaled by any sensible factor.

    Raises:
      AssertionError: one becomes 0 or infinite.
    """
    state = trained(rows)
    after = edit(state, lambda kernel: kernel * factor, rule)
    pairs = zip(jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(after.opt_state), strict=True)
    for (keys, a), b in pairs:
        name = jax.tree_util.keystr(keys)
        if not jnp.issubdtype(a.dtype, jnp.floating) or "kernel" not in name:
            continue
        old, new = np.asarray(a), np.asarray(b)
        if not np.isfinite(new[np.isfinite(old)]).all() or (new[np.abs(old) > 1e-10] == 0).any():
            raise AssertionError(f"{name} becomes 0 or infinite at a factor of {factor:g}")


def check_goes_on(row: OptimizerRow, surgery: Any, rule: Any, *, same_shape: bool = True) -> None:
    """The next `tx.update` under jit keeps structure and dtypes, is not compiled again where the shape is the same, and
    moves every parameter that it would have moved without the edit.

    Raises:
      AssertionError: it does not.
    """
    state = trained((row,))
    traces: list[None] = []

    @jax.jit
    def step(grads: Any, opt_state: Any, params: Any) -> Any:
        traces.append(None)
        return state.tx.update(grads, opt_state, params)

    grads = streams.mapped_gradient(streams.STEPS - 1, SMALL)
    before, _ = step(grads, state.opt_state, state.params)
    after = edit(state, surgery, rule)
    wide = jax.tree.map(lambda leaf: jnp.resize(grads["kernel"], leaf.shape), {"kernel": after.params["kernel"]})
    updates, new = step(grads | wide, after.opt_state, after.params)
    told = jax.tree.map(lambda leaf: (leaf.dtype, getattr(leaf, "weak_type", False)), (state.opt_state, new))
    if told[0] != told[1]:
        raise AssertionError(f"{row.name}: the state after the next update is of another structure or dtype")
    if same_shape and len(traces) != 1:
        raise AssertionError(f"{row.name}: the next update is compiled again")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)):
        raise AssertionError(f"{row.name}: the next update is not finite")
    if np.all(np.asarray(before["kernel"]) != 0) and np.any(np.asarray(updates["kernel"]) == 0):
        raise AssertionError(f"{row.name}: the next update is 0 somewhere")
