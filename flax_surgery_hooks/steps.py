"""Steps as trainers give them: train steps applied so far, what `state.step` holds."""

from __future__ import annotations

from typing import Any

import jax

from flax_surgery_hooks import checks
from flax_surgery_hooks.errors import StateError, StepError, quoted, shorten
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.train_state import check_one_replica

LONGEST = 2**256
"""No counter comes near, and its digits can still be printed."""


def check_fire_step(step: int) -> None:
    """Raises unless a surgery can be told this step, as an int32 scalar.

    Raises:
      StepError: it cannot.
    """
    if step >= 2**31:
        raise StepError(
            "A surgery is told its step as an int32, and this one is larger.",
            found=str(step),
            write="hooks whose last due step is below 2**31, such as fsh.every(n, stop=2**31 - 1)",
        )


def check_first_step(step: int, state: Any) -> None:
    """Compares the trainer's step with the state's own; waits for the device once.

    Raises:
      StateError: the state is replicated for pmap.
      StepError: the two differ.
    """
    held = getattr(state, "step", None)
    if held is None:
        return
    check_one_replica(state)
    if int(held) != step:
        raise StepError(
            "`step` must be what `state.step` holds: train steps applied so far.",
            found=f"step {step}, state.step {int(held)}",
            write="hooks(step + 1, state)" if int(held) == step + 1 else f"hooks({int(held)}, state)",
        )


def checked_step(step: Any) -> int:
    """`step` if it is a Python int of at least 0.

    Raises:
      StepError: it is not.
    """
    if type(step) is int and 0 <= step < LONGEST:
        return step
    traced = isinstance(step, jax.core.Tracer)
    raise StepError(
        "`step` is a Python int of at least 0: what `state.step` holds.",
        found="a traced value (the call is inside jit)" if traced else f"{quoted(step, 80)} ({type(step).__name__})",
        write="a call outside of the jitted step" if traced else "a counter of your own: step += 1; hooks(step, state)",
    )


def passed_steps(hook: str, due: tuple[int, ...], step: int, last: int, *, strict: bool) -> tuple[int, ...]:
    """Those of the due steps that a call jumps over.

    Args:
      hook: name of the hook.
      due: the steps since the last call, this one included.
      step: of the call.
      last: of the last call.
      strict: whether there must be none.

    Raises:
      StepError: there are some, and must not be.
    """
    passed = tuple(at for at in due if at != step)
    if passed and strict:
        raise StepError(
            "The call jumps over steps at which the hook is due.",
            hook=hook,
            step=step,
            found=f"due at {listed(map(str, passed))}, last call at {last}",
            write="a call at every step, a schedule that meets the calls, or strict_steps=False",
        )
    return passed


def check_concrete(state: Any) -> None:
    """Raises unless every leaf of the state has a value now.

    Raises:
      StateError: a leaf is traced, abstract or deleted.
    """
    if checks.concrete(state):
        _check_there(state)
        return
    raise StateError(
        "Hooks edit a state that has values; this one is traced (the call is inside jit) or abstract.",
        found=type(state).__name__,
        write="a call outside of the jitted step, or fsh.operate, which works on both",
    )


def _check_there(state: Any) -> None:
    gone = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array) and leaf.is_deleted()]
    if gone:
        raise StateError(
            "Arrays of the state are deleted: a compiled function that took it has reused their memory.",
            found=f"{len(gone)} such arrays, the first {shorten(gone[0])}",
            write="state = train_step(state, ...), and the hooks on what it returned",
        )


def step_of(state: Any) -> int:
    """What `state.step` holds; waits for the device.

    Raises:
      StateError: the state has none.
    """
    if getattr(state, "step", None) is None:
        raise StateError("The state has no `step`.", found=type(state).__name__, write="step=...")
    check_one_replica(state)
    return int(state.step)


def planned_from(state: Any) -> int:
    """What `state.step` holds, 0 where it is abstract, or there is none; waits for the device."""
    held = getattr(state, "step", None)
    return step_of(state) if held is not None and checks.concrete(held) else 0
