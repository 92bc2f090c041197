"""Hooks that can put back what their fires touched."""

from __future__ import annotations

from typing import Any

from flax_surgery_hooks.keeping import Keeper
from flax_surgery_hooks.settling import Fired
from flax_surgery_hooks.steps import check_concrete, checked_step, step_of
from flax_surgery_hooks.traced_hooks import TracedHooks
from flax_surgery_hooks.train_state import written


class UndoingHooks(TracedHooks):
    """The part of `SurgeryHooks` that puts back what was kept of fires; see `rollback.Rollback`."""

    __slots__ = ("_keeper",)

    _keeper: Keeper

    def undo(self, state: Any, step: int | None = None) -> Any:
        """Undoes the last fire whose old values are kept: the leaves it edited, their optimizer slots and what the
        surgery remembers are as they were before it, bit for bit; all else stays. The ledger has an "undone" record.

        Called again, it undoes the fire before that. A fire that was refused is none, and is passed over.

        Args:
          state: the train state now.
          step: what `state.step` holds; None reads it, which waits for the device.

        Returns:
          The state with the old values.

        Raises:
          HookError: no fire is kept, or another one has touched the same leaves since.
          StateError: the state has other leaves now, or the kept ones were deleted.

        >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
        >>> hooks = fsh.SurgeryHooks()
        >>> hooks.add("halve", lambda w: w / 2, params="w", when=fsh.at(1), rollback=fsh.Rollback(steps=100))
        >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1)).replace(step=1)
        >>> halved = hooks(1, state)
        >>> hooks.undo(halved).params["w"].tolist(), hooks.ledger.records[-1].event
        ([1.0, 1.0], 'undone')
        """
        check_concrete(state)
        self._agree("hooks.undo", state, step)
        step = step_of(state) if step is None else checked_step(step)
        state, one = self._keeper.undone(state, step, self.mirrors)
        self.ledger.write(one.record)
        state = written(state)
        self._keeper.put_back(one.kept, step)
        self._rewake()
        return state

    def _gather(self, fired: list[Fired]) -> None:
        for record, one in zip(self._settler.fired(*fired), fired, strict=True):
            self._keeper.note(record, one)

    def _removed(self, name: str) -> None:
        self._keeper.forget(name)
        self._settler.forget(name)
