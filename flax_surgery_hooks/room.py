"""Room in the train state for the figures of fires in graph, which wait there until the host reads them.

They are in `surgery["fires"][hook]`:

    count: int32, how many fires of the hook there have been.
    steps: int32 [capacity], what `state.step` was at each of the last ones; the i-th fire is at i % capacity.
    rows: float32 [capacity, rows, fields], their figures, see `verdicts.rows_of`, the guard's own verdict if it is a
      function, and what the surgery measures itself; no rows if nothing is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import StateError, located
from flax_surgery_hooks.metrics import FIELDS
from flax_surgery_hooks.mirrors import NO_MIRRORS, view
from flax_surgery_hooks.operation import Operation, units
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.placement import like_neighbours
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.train_state import take_apart
from flax_surgery_hooks.verdicts import names_of


def measures(operation: Operation) -> bool:
    """Whether a fire has figures, or a guard that needs some of them."""
    return operation.figures or operation.guard != "off"


def fitted(state: Any, hooks: Sequence[Hook], capacity: int, *, anew: bool = False) -> Any:
    """The state with room for the figures of fires in graph; what fits already is kept.

    Args:
      state: concrete, abstract or traced.
      hooks: those that can fire in graph.
      capacity: how many fires of each there is room for.
      anew: whether what does not fit is made anew.

    Raises:
      StateError: the state holds buffers that do not fit.
    """
    if not hooks or not capacity or not hasattr(state, "surgery"):
        return state
    held = buffers(state)
    made = {}
    for hook in hooks:
        with located(hook=hook.name):
            shapes = _shapes(view(state, NO_MIRRORS, hook.operation.fields), hook.operation, capacity)
            made[hook.name] = _made(state, held.get(hook.name), shapes, anew)
    return state.replace(surgery={**(state.surgery or {}), "fires": made})


def buffers(state: Any) -> dict[str, Any]:
    """Hook -> its buffer; empty where there are none."""
    surgery = getattr(state, "surgery", None)
    return dict(surgery.get("fires", {})) if isinstance(surgery, Mapping) else {}


def _shapes(state: Any, operation: Operation, capacity: int) -> dict[str, jax.ShapeDtypeStruct]:
    plan = units(operation, take_apart(state).params, {})
    # A guard's own verdict is told beside the figures: figures of another program might round to another side of it.
    judged_too = operation.bound is not None
    own = -(-len(names_of(operation, plan)) // FIELDS)
    rows = sum(len(unit.paths) + 2 for unit in plan) + judged_too + own if measures(operation) else 0
    return {
        "count": jax.ShapeDtypeStruct((), jnp.int32),
        "steps": jax.ShapeDtypeStruct((capacity,), jnp.int32),
        "rows": jax.ShapeDtypeStruct((capacity, rows, FIELDS), jnp.float32),
    }


def _made(state: Any, kept: Any, shapes: dict[str, jax.ShapeDtypeStruct], anew: bool) -> Any:
    if kept is not None:
        found = {name: jnp.shape(leaf) for name, leaf in kept.items()}
        if found == {name: leaf.shape for name, leaf in shapes.items()}:
            return kept
        if not anew:
            raise StateError(
                "The state's room for figures of fires does not fit the hook.",
                found=str(found),
                write="the selection and fires= with which it was saved, or a state whose `surgery` has no 'fires'",
            )
    leaves = jax.tree.leaves(state.params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return shapes
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return zeros
    return {name: like_neighbours(leaves, leaf) for name, leaf in zeros.items()}


def with_own(rows: jax.Array, figures: Sequence[jax.Array]) -> jax.Array:
    """Rows of figures, and below them those that the surgery measures itself."""
    if not figures:
        return rows
    own = jnp.concatenate(list(figures))
    return jnp.concatenate([rows, jnp.pad(own, (0, -own.size % FIELDS)).reshape(-1, FIELDS)])


def noted(buffer: Any, step: Any, rows: Any) -> Any:
    """The buffer with one more fire, in the place of the oldest."""
    at = buffer["count"] % buffer["steps"].shape[0]
    kept = buffer["rows"] if rows is None else buffer["rows"].at[at].set(rows.astype(buffer["rows"].dtype))
    return {"count": buffer["count"] + 1, "steps": buffer["steps"].at[at].set(step), "rows": kept}


def check_ready(state: Any, hooks: Sequence[Hook]) -> None:
    """Raises unless the state has room for the figures of these hooks.

    Raises:
      StateError: it has not.
      HookError: there is no hook that could fire or observe.
    """
    held = buffers(state)
    missing = [hook.name for hook in hooks if hook.name not in held]
    if missing and not hasattr(state, "surgery"):
        raise StateError(
            "Hooks that fire in graph keep their figures in the state, which has no `surgery` field.",
            hook=missing[0],
            found=type(state).__name__,
            write="fsh.TrainState, or a field `surgery: Any = None` on your own; hooks.observe(state) fires nothing",
        )
    if missing:
        raise StateError(
            "Hooks that fire in graph keep their figures in the state, which has no room for them yet.",
            hook=missing[0],
            found=f"room for {listed(held) or 'no hook'}",
            write="state = hooks.init(state), once all hooks are added, before the first train step; "
            "hooks.observe(state) fires nothing",
        )
