"""Surgeries on the optimizer as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax

from flax_surgery_hooks.errors import StateError, SurgeryFunctionError
from flax_surgery_hooks.optimizer_edits import Optimizer
from flax_surgery_hooks.paths import close_matches, listed

_INJECTED: tuple[Any, ...] = tuple(
    getattr(optax, name)
    for name in ("InjectHyperparamsState", "InjectStatefulHyperparamsState")
    if hasattr(optax, name)
)


@dataclass(frozen=True)
class SetHyperparams:
    """Writes numbers into the hyperparameters that `optax.inject_hyperparams` keeps in the state; they stay until they
    are written again. The compiled train step goes on.

    Args:
      values: hyperparameter -> number. Each is written wherever the optimizer has one of this name. One that a schedule
        drives is refused: the next update would overwrite it.

    >>> import optax, flax_surgery_hooks as fsh
    >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    >>> state, _ = fsh.operate(state, SetHyperparams({"learning_rate": 0.01}))
    >>> round(float(state.opt_state.hyperparams["learning_rate"]), 4)
    0.01
    """

    values: dict[str, float]

    def __post_init__(self):
        if not isinstance(self.values, dict) or not self.values:
            raise SurgeryFunctionError(
                "SetHyperparams takes hyperparameters by name.",
                found=repr(self.values),
                write='SetHyperparams({"learning_rate": 0.01})',
            )
        for name, value in self.values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise SurgeryFunctionError(
                    f"SetHyperparams needs a finite number for {name!r}.",
                    found=repr(value),
                    write="fsh.optax.rewarm or a schedule in the optimizer, for values that depend on the step"
                    if callable(value)
                    else f"{{{name!r}: 0.01}}",
                )

    def edit_optimizer(self, optimizer: Optimizer, /) -> Optimizer:
        """The optimizer after it."""
        optimizer.check_whole("SetHyperparams")
        there: set[str] = set()
        opt_state, count = optimizer.map_states(_INJECTED, lambda state: self._written(state, there))
        if not count:
            raise StateError(
                "The optimizer state holds no hyperparameters.",
                found=type(optimizer.opt_state).__name__,
                write="tx=optax.inject_hyperparams(optax.adam)(learning_rate=0.1)",
            )
        unknown = [name for name in self.values if name not in there]
        if unknown:
            raise StateError(
                f"The optimizer has no hyperparameter {unknown[0]!r}.",
                found=f"hyperparameters {listed(sorted(there))}",
                write=listed(close_matches(unknown[0], there)) or "one of these",
            )
        return optimizer.replace(opt_state=opt_state)

    def _written(self, state: Any, there: set[str]) -> Any:
        there.update(state.hyperparams)
        mine = {name: value for name, value in self.values.items() if name in state.hyperparams}
        driven = [name for name in mine if name in getattr(state, "hyperparams_states", ())]
        if driven:
            raise StateError(
                f"A schedule drives the hyperparameter {driven[0]!r}: the next update would overwrite what is written.",
                found=f"schedules for {listed(state.hyperparams_states)}",
                write=f"inject_hyperparams(...)({driven[0]}=0.1), a constant; or fsh.optax.rewarm in the chain and the "
                "surgery Rewarm",
            )
        new = {name: _as_held(name, value, state.hyperparams[name]) for name, value in mine.items()}
        return state._replace(hyperparams={**state.hyperparams, **new})


def _as_held(name: str, value: float, old: Any) -> Any:
    dtype = jnp.result_type(old)
    if not jnp.issubdtype(dtype, jnp.inexact) and int(value) != value:
        raise SurgeryFunctionError(
            f"The hyperparameter {name!r} is an integer.", found=f"{value} for {dtype}", write=f"{{{name!r}: 1}}"
        )
    return jnp.full(jnp.shape(old), value, dtype)
