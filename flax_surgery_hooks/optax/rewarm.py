"""A learning rate that warms up again, leaf by leaf, after an edit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks.errors import ScheduleError, typed
from flax_surgery_hooks.optax.beside import beside, map_beside
from flax_surgery_hooks.rules import check_choice
from flax_surgery_hooks.slot_registry import register_slot

SCHEDULES = ("linear", "cosine")
MOST_STEPS = 2**31 - 1
"""What an int32 holds."""


class RewarmState(NamedTuple):
    """State of `rewarm`.

    Attributes:
      since: an int32 of shape () for each parameter, at their key paths (boxes and variables around them name
        no mesh axes): updates since the trigger, at most `steps`. 0 triggers; `steps` is inactive.
    """

    since: Any


register_slot(RewarmState, since="none")


def rewarm(steps: int, *, start: float = 0.0, schedule: str = "linear") -> optax.GradientTransformation:
    """Multiplies the updates of a leaf by a factor that rises from `start` to 1 after a trigger, and else by nothing.

    A trigger is a 0 written into `state.since` at the leaf's place. The update k after it (k = 0, ..., steps - 1) is
    multiplied by

        start + (1 - start) * k / steps                       "linear", as in ReLoRA (arXiv 2307.05695)
        start + (1 - start) * (1 - cos(pi * k / steps)) / 2   "cosine", as in SPAM (arXiv 2501.06842) with start=0.01

    and later ones, as those before any trigger, come back bitwise. Put it last in the chain, so that it acts on what
    the learning rate and weight decay have made. Keeps shapes and dtypes; bfloat16 is multiplied in float32.

    Args:
      steps: length of the rise, in updates of this transform (inside `optax.MultiSteps`, those that it lets through).
      start: the first factor, in [0, 1]. With 0 the first update is none.
      schedule: "linear" or "cosine".

    Returns:
      A transform whose state is a `RewarmState`, inactive at first.

    Raises:
      ScheduleError: `steps` is no positive Python int (of at most 31 bits), or `start` is outside [0, 1].
      RuleError: a schedule that does not exist.

    >>> tx = rewarm(4, start=0.2)
    >>> state = tx.init({"w": jnp.ones(1)})._replace(since={"w": jnp.int32(0)})
    >>> for _ in range(6):
    ...     updates, state = tx.update({"w": jnp.ones(1)}, state)
    ...     print(round(updates["w"].item(), 6), end=" ")
    0.2 0.4 0.6 0.8 1.0 1.0
    """
    _check(steps, start, schedule)

    def factor(k: jax.Array, dtype: Any) -> jax.Array:
        part = k.astype(jnp.promote_types(dtype, jnp.float32)) / steps
        part = part if schedule == "linear" else (1 - jnp.cos(jnp.pi * part)) / 2
        return start + (1 - start) * part

    def scaled(update: jax.Array, since: jax.Array) -> jax.Array:
        if not jnp.issubdtype(update.dtype, jnp.inexact):
            return update
        slow = (update * factor(since, update.dtype)).astype(update.dtype)
        return jax.lax.select_n(since < steps, update, slow)

    def init(params: Any) -> RewarmState:
        return RewarmState(beside(params, lambda _: jnp.full((), steps, jnp.int32)))

    def update(updates: Any, state: RewarmState, params: Any = None) -> tuple[Any, RewarmState]:
        del params
        after = jax.tree.map(lambda since: jnp.where(since < steps, since + 1, steps), state.since)
        return map_beside(scaled, updates, state.since), RewarmState(after)

    return optax.GradientTransformation(init, update)


def _check(steps: Any, start: Any, schedule: Any) -> None:
    if type(steps) is not int or not 0 < steps <= MOST_STEPS:
        raise ScheduleError(
            "rewarm(steps=...) is a number of updates, a positive Python int.", found=typed(steps), write="rewarm(100)"
        )
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start <= 1:
        raise ScheduleError(
            "rewarm(start=...) is the first factor, from 0 to 1.", found=typed(start), write="rewarm(100, start=0.0)"
        )
    check_choice(schedule, SCHEDULES, "schedule of a rewarm")
