"""All fires of a step under one condition: a step at which no hook is due decides once, however many there are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flax_surgery_hooks import in_graph
from flax_surgery_hooks.errors import located
from flax_surgery_hooks.mirrors import Mirrors
from flax_surgery_hooks.registration import Hook

_MARK = object()


def fire_due(
    state: Any, hooks: Sequence[Hook], seed: int, inputs: Mapping[str, Any], mirrors: Mirrors, seen: Any
) -> tuple[Any, dict[str, in_graph.About]]:
    """The state after the fires that are due at `state.step`, in order, and what is known of each hook's.

    Arguments and errors as for `in_graph.Run`.
    """
    runs = []
    for hook in hooks:
        with located(hook=hook.name):
            runs.append(in_graph.Run(state, hook, seed, inputs, mirrors, seen))
    about = {hook.name: run.about() for hook, run in zip(hooks, runs, strict=True)}
    if len(runs) < 2:
        return (runs[0].after(state) if runs else state), about
    fields = _Fields(state, hooks, mirrors)
    touched = sorted({place for run in runs for place in fields.marks(run.marked(_MARK))})

    def apply(leaves: Sequence[Any]) -> list[Any]:
        after = fields.put(state, dict(zip(touched, leaves, strict=True)))
        for run in runs:
            after = run.after(after)
        new = fields.leaves(after)
        return [new[place] for place in touched]

    old = fields.leaves(state)
    any_due = functools.reduce(operator.or_, (run.due for run in runs))
    new = jax.lax.cond(any_due, apply, lambda leaves: leaves, [old[place] for place in touched])
    return fields.put(state, dict(zip(touched, new, strict=True))), about


class _Fields:
    """The leaves of those fields of a state that fires may edit; the state itself need not be a pytree."""

    def __init__(self, state: Any, hooks: Sequence[Hook], mirrors: Mirrors):
        further = [*(name for name, _ in mirrors.fields), *(name for hook in hooks for name in hook.operation.fields)]
        self._names = tuple(dict.fromkeys(["params", "opt_state", "surgery", *further]))
        _, self._treedef = jax.tree.flatten(self._held(state))

    def _held(self, state: Any) -> tuple[Any, ...]:
        return tuple(getattr(state, name) for name in self._names)

    def leaves(self, state: Any) -> list[Any]:
        """All leaves, in order."""
        return jax.tree.leaves(self._held(state))

    def marks(self, state: Any) -> list[int]:
        """The places of the marks."""
        return [place for place, leaf in enumerate(self.leaves(state)) if leaf is _MARK]

    def put(self, state: Any, leaves: Mapping[int, Any]) -> Any:
        """The state with some leaves replaced."""
        values = [leaves.get(place, leaf) for place, leaf in enumerate(self.leaves(state))]
        return state.replace(**dict(zip(self._names, jax.tree.unflatten(self._treedef, values), strict=True)))
