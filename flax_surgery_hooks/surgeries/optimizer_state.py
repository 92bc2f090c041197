"""Surgeries on the optimizer as a whole."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks.errors import SlotError, StateError, SurgeryFunctionError, quoted, typed
from flax_surgery_hooks.optax.freezable import FreezableState
from flax_surgery_hooks.optax.rewarm import RewarmState
from flax_surgery_hooks.optimizer_edits import Optimizer
from flax_surgery_hooks.paths import close_matches, listed
from flax_surgery_hooks.slots import Slot, owners_of
from flax_surgery_hooks.switching import switch

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
      hyperparams: name -> number. Each is written wherever the optimizer has one of this name. One that a schedule
        drives is refused: the next update would overwrite it.

    >>> import optax, flax_surgery_hooks as fsh
    >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    >>> state, _ = fsh.operate(state, SetHyperparams({"learning_rate": 0.01}))
    >>> round(float(state.opt_state.hyperparams["learning_rate"]), 4)
    0.01
    """

    hyperparams: dict[str, float]

    def __post_init__(self):
        if not isinstance(self.hyperparams, dict) or not self.hyperparams:
            raise SurgeryFunctionError(
                "SetHyperparams takes hyperparameters by name.",
                found=quoted(self.hyperparams),
                write='SetHyperparams({"learning_rate": 0.01})',
            )
        for name, value in self.hyperparams.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise SurgeryFunctionError(
                    f"SetHyperparams needs a finite number for {name!r}.",
                    found=quoted(value),
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
        unknown = [name for name in self.hyperparams if name not in there]
        if unknown:
            raise StateError(
                f"The optimizer has no hyperparameter {unknown[0]!r}.",
                found=f"hyperparameters {listed(sorted(there))}",
                write=listed(close_matches(unknown[0], there)) or "one of these",
            )
        return optimizer.replace(opt_state=opt_state)

    def _written(self, state: Any, there: set[str]) -> Any:
        there.update(state.hyperparams)
        mine = {name: value for name, value in self.hyperparams.items() if name in state.hyperparams}
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


@dataclass(frozen=True)
class Freeze:
    """Freezes the selected leaves where `fsh.optax.freezable` is in the optimizer: until `Thaw` they and their slots
    stay as they are, bit for bit, without weight decay. The compiled train step goes on.

    >>> import optax, flax_surgery_hooks as fsh
    >>> params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    >>> state = fsh.TrainState.create(apply_fn=None, params=params, tx=fsh.optax.freezable(optax.adamw(0.1)))
    >>> state, _ = fsh.operate(state, Freeze(), params="w")
    >>> state = state.apply_gradients(grads=params)
    >>> state.params["w"].tolist(), bool((state.params["v"] < 1).all())
    ([1.0, 1.0], True)
    """

    def edit_optimizer(self, optimizer: Optimizer, /) -> Optimizer:
        """The optimizer after it."""
        return _marked(optimizer, "Freeze", FreezableState, "frozen", True, _FREEZABLE)


@dataclass(frozen=True)
class Thaw:
    """Lets leaves go on that `Freeze` has frozen.

    Args:
      first_moments: "keep": with the slots that they had when they were frozen. "reset": with first moments (slots of
        kind "grad" and "update") as `tx.init` makes them, as the old direction says little of where the other leaves
        have gone meanwhile; second moments are kept.

    >>> Thaw(first_moments="reset")
    Thaw(first_moments='reset')
    """

    first_moments: Literal["keep", "reset"] = "keep"

    def __post_init__(self):
        if self.first_moments not in ("keep", "reset"):
            raise SurgeryFunctionError(
                "Thaw(first_moments=...) is unknown.", found=quoted(self.first_moments), write='"keep" or "reset"'
            )

    def edit_optimizer(self, optimizer: Optimizer, /) -> Optimizer:
        """The optimizer after it."""
        thawed = _marked(optimizer, "Thaw", FreezableState, "frozen", False, _FREEZABLE)
        return thawed if self.first_moments == "keep" else _without_first_moments(thawed)


@dataclass(frozen=True)
class Rewarm:
    """Lets the updates of the selected leaves grow anew from small ones, where `fsh.optax.rewarm` is in the optimizer;
    `params="**"` for all. It says how far and how fast. The compiled train step goes on.

    >>> import optax, flax_surgery_hooks as fsh
    >>> tx = optax.chain(optax.sgd(1.0), fsh.optax.rewarm(4))
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=tx)
    >>> state, _ = fsh.operate(state, Rewarm())
    >>> for _ in range(3):
    ...     state = state.apply_gradients(grads={"w": jnp.ones(1)})
    >>> state.params["w"].tolist()  # 1 - 0 - 1/4 - 2/4
    [0.25]
    """

    def edit_optimizer(self, optimizer: Optimizer, /) -> Optimizer:
        """The optimizer after it."""
        return _marked(optimizer, "Rewarm", RewarmState, "since", 0, "tx=optax.chain(tx, fsh.optax.rewarm(100))")


_FREEZABLE = "tx=fsh.optax.freezable(tx)"


def _marked(optimizer: Optimizer, surgery: str, kind: Any, field: str, value: Any, write: str) -> Optimizer:
    """The optimizer with a value at the selected leaves, in every state of a class whose field mirrors the params."""
    reached: set[int] = set()

    def mark(state: Any) -> Any:
        tree = getattr(state, field)
        owners = owners_of({"": tree}, {"": optimizer.params})  # in a dict: a bare array has no path
        leaves, treedef = jax.tree.flatten(tree)
        reached.update(owners.values())
        chosen = {index for index, owner in owners.items() if owner in optimizer.selected}
        marked = [
            jnp.full(jnp.shape(leaf), value, jnp.result_type(leaf)) if index in chosen else leaf
            for index, leaf in enumerate(leaves)
        ]
        return state._replace(**{field: jax.tree.unflatten(treedef, marked)})

    opt_state, count = optimizer.map_states((kind,), mark)
    if not count:
        raise StateError(
            f"{surgery} writes into a {kind.__name__}, and the optimizer state has none.",
            found=type(optimizer.opt_state).__name__,
            write=write,
        )
    missing = [path for path, place in zip(optimizer.paths, optimizer.selected, strict=True) if place not in reached]
    if missing:
        raise StateError(
            f"{surgery} writes into a {kind.__name__}, and those of the optimizer leave out some of the leaves.",
            found=listed(missing),
            write=f"{write} around the parts for these leaves too, or exclude= with them",
        )
    return optimizer.replace(opt_state=opt_state)


def _without_first_moments(optimizer: Optimizer) -> Optimizer:
    leaves, treedef = jax.tree.flatten(optimizer.opt_state)
    slots, params = optimizer.slots, optimizer.leaves
    for place in optimizer.selected:
        for slot in slots.get(place, ()):
            if slot.kind in ("grad", "update"):
                size = math.prod(jnp.shape(params.values[place]))
                leaves[slot.index] = _initial(slot, leaves[slot.index], size, params.paths[place])
    return optimizer.replace(opt_state=jax.tree.unflatten(treedef, leaves))


def _initial(slot: Slot, old: Any, size: int, path: str) -> Any:
    if slot.init is None:
        raise SlotError(
            f"`tx.init` fills {slot.name} with no constant, so that it cannot be reset.",
            path=path,
            write='Thaw(first_moments="keep")',
        )
    if slot.offset is not None:  # a vector that holds the slots of all parameters
        return jnp.asarray(old).at[slot.offset : slot.offset + size].set(slot.init)
    # Of the old leaf, so that a sharded one is made where it lies.
    return jnp.full_like(old, slot.init)


@dataclass(frozen=True)
class SwitchOptimizer:
    """Puts another optimizer in the place of the state's. Parameters stay; a compiled train step is traced anew.

    A slot of the new optimizer is taken from the old one's slot of the same parameter and kind (first moments, squares
    and so on, see `rules.KINDS`; of several the one of the same name), times the ratio of their sizes under a constant
    gradient, which is measured on a tiny copy of both: from Adam to SGD, trace = mu / (1 - b1); from Adam to Lion, or
    to Muon, mu stays as it is. What has no such source, or no known size, starts as `tx.init` makes it, copies of the
    parameters from the parameters as they are now. The record's `detail` says which is which.

    Where Adam's second moments start at zero beside first moments or counts that are carried (from SGD or Lion), its
    next updates are many times the learning rate: then `carry=False, count="restart"`, or a `fsh.optax.rewarm`.

    The new optimizer is in `state.tx`: a trainer that uses another reference to it has to take it from there, for
    example in `on_reshape` of the hook. To the optimizer that the state has already, it does nothing.

    Args:
      tx: the new optimizer.
      carry: whether slots are carried.
      count: "carry": counts of updates, and so schedules, go on: each from the old state of the same class, if there is
        one, else from the largest. "restart": they start at 0.

    >>> import optax, flax_surgery_hooks as fsh
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.adam(0.1, b1=0.5))
    >>> state = state.apply_gradients(grads={"w": jnp.ones(1)})
    >>> state, record = fsh.operate(state, SwitchOptimizer(optax.sgd(0.1, momentum=0.5)))
    >>> state.opt_state[0].trace["w"].tolist()  # mu is 0.5
    [1.0]
    """

    tx: Any
    carry: bool = True
    count: Literal["carry", "restart"] = "carry"

    def __post_init__(self):
        if not callable(getattr(self.tx, "init", None)) or not callable(getattr(self.tx, "update", None)):
            raise SurgeryFunctionError(
                "SwitchOptimizer takes an optax transformation.",
                found=typed(self.tx),
                write="SwitchOptimizer(optax.sgd(0.1, momentum=0.9))",
            )
        if not isinstance(self.carry, bool):
            raise SurgeryFunctionError("SwitchOptimizer(carry=...) is True or False.", found=typed(self.carry))
        if self.count not in ("carry", "restart"):
            raise SurgeryFunctionError(
                "SwitchOptimizer(count=...) is unknown.", found=quoted(self.count), write='"carry" or "restart"'
            )

    def edit_optimizer(self, optimizer: Optimizer, /) -> Optimizer:
        """The optimizer after it."""
        optimizer.check_whole("SwitchOptimizer")
        if self.tx == optimizer.tx:
            return optimizer
        return switch(optimizer, self.tx, carry=self.carry, count=self.count)
