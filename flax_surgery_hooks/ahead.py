"""The look ahead, at the first call, at the shapes that hooks will meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from flax_surgery_hooks import deriving, fires, memory
from flax_surgery_hooks.errors import located
from flax_surgery_hooks.making import bind_inputs
from flax_surgery_hooks.mirrors import Mirrors, original, viewed
from flax_surgery_hooks.planning import inputs_of_state
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.slots import as_abstract


def check_ahead(
    hooks: Sequence[Hook], last: int, state: Any, inputs: dict[str, Any], seed: int, mirrors: Mirrors
) -> None:
    """Checks every hook against the shapes that the hooks before it will leave behind, abstractly.

    Args:
      hooks: in the order in which they fire at one step.
      last: the step before the first call.
      state: the state at the first call.
      inputs: the trainer's inputs.
      seed: the seed of the hooks' keys.
      mirrors: fields of the state that mirror the parameters.

    Raises:
      SurgeryError: what would be raised at the step in question.
    """
    first_due = [(hook.next_possible(last), order, hook) for order, hook in enumerate(hooks) if may_change(hook)]
    if not first_due:
        return
    names = ("params", "opt_state", "surgery", *(name for name, _ in mirrors.fields))
    fields = [name for name in names if hasattr(state, name)]
    ahead = state.replace(**{name: jax.tree.map(as_abstract, getattr(state, name)) for name in fields})
    for step, _, hook in sorted((due for due in first_due if due[0] is not None), key=lambda due: due[:2]):
        assert step is not None
        before, ahead = ahead, foresee(hook, ahead, inputs, seed, mirrors)
        if not hook.reshape.declared and ahead.tx is before.tx:
            continue
        ahead = memory.fitted(ahead, [(each.name, each.operation) for each in hooks], seed, anew=True)
        for other in hooks:
            if other.next_possible(step) is not None:
                foresee(other, ahead, inputs, seed, mirrors)


def behind_reshapes(hooks: Sequence[Hook], last: int) -> frozenset[str]:
    """The hooks that are first due behind a fire of another one that may change shapes, and so meet other ones.

    Args:
      hooks: in the order in which they fire at one step.
      last: the step before the first call.
    """
    due = [(step, order) for order, hook in enumerate(hooks) if (step := hook.next_possible(last)) is not None]
    changes = [one for one in due if may_change(hooks[one[1]])]
    return frozenset(hooks[order].name for step, order in due if changes and (step, order) > min(changes))


def may_change(hook: Hook) -> bool:
    """Whether a fire may leave other shapes, or another optimizer."""
    return hook.reshape.declared or hook.operation.edit.edit_optimizer is not None


def foresee(hook: Hook, ahead: Any, inputs: dict[str, Any], seed: int, mirrors: Mirrors) -> Any:
    """The abstract state after a fire of a hook on an abstract state.

    Raises:
      SurgeryError: what the fire would raise.
    """
    with located(hook=hook.name):
        operation, arrays = bind_inputs(hook.operation, inputs)
        key = fires.fire_key(operation, seed, hook.name, 0, 0)
        arrays = inputs_of_state(operation, ahead, key, 0, arrays, deriving.Abstractly.of_state)
        held, reshape = viewed(ahead, mirrors, hook)
        return original(fires.foresee(operation, held, hook.name, key, arrays, reshape))
