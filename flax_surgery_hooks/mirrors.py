"""Trees beside the optimizer state that mirror the parameters, averages and target networks: they move like slots.

A train state that has some is looked at as one whose optimizer state holds them too, so that all that is known of slots
is true of them: kinds, rules, layouts of parameters, records, donation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks.errors import HookError, StateError, shorten
from flax_surgery_hooks.operation import Operation
from flax_surgery_hooks.rules import KINDS, check_choice
from flax_surgery_hooks.slot_registry import register_slot
from flax_surgery_hooks.structure import Reshape

Mirrors = tuple[tuple[str, str], ...]


def checked(mirrors: Mapping[str, str] | None) -> Mirrors:
    """Field of the train state -> kind of what it holds, as sorted pairs.

    Raises:
      HookError: no mapping from names of fields.
      RuleError: a kind that does not exist.
    """
    if mirrors is None:
        return ()
    if not isinstance(mirrors, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in mirrors):
        raise HookError(
            "mirrors= maps fields of the train state to what they hold.",
            found=shorten(mirrors),
            write='mirrors={"ema_params": "param"}',
        )
    for kind in mirrors.values():
        check_choice(kind, KINDS, "kind of slot")
    return tuple(sorted(mirrors.items()))


def view(state: Any, mirrors: Mirrors) -> Any:
    """The state with its mirrors among the optimizer state; itself if there are none.

    Raises:
      StateError: the state has no such field, or the field does not mirror the parameters.
    """
    held = tuple((name, kind) for name, kind in mirrors if _held(state, name) is not None)
    return View(state, held) if held else state


def viewed(state: Any, mirrors: Mirrors, operation: Operation, reshape: Reshape) -> tuple[Any, Reshape]:
    """The view for one hook, and what the hook brings for such a state; surgeries of the optimizer see it alone."""
    held = state if operation.edit.edit_optimizer is not None else view(state, mirrors)
    if held is state or reshape.tx is None:
        return held, reshape
    return held, dataclasses.replace(reshape, tx=mirroring(reshape.tx, held.mirrors))


def _held(state: Any, name: str) -> Any:
    if not hasattr(state, name):
        raise StateError(
            f"mirrors= names the field {name!r}, which the train state has not.",
            found=type(state).__name__,
            write="the name of a field that holds a tree like the parameters",
        )
    value = getattr(state, name)
    structure: Any = jax.tree.structure(value)
    if value is not None and structure != jax.tree.structure(state.params):
        raise StateError(
            f"The field {name!r} of the train state does not mirror the parameters.",
            found=shorten(structure),
            write="a tree of the structure of `params`, or None while there is none",
        )
    return value


def original(state: Any) -> Any:
    """The train state that a view was made of, with its edits; any other state is itself."""
    return state.unviewed() if isinstance(state, View) else state


class View:
    """A train state whose `opt_state` is the pair of its own and of its mirrors, and whose `tx` makes such pairs."""

    def __init__(self, state: Any, mirrors: Mirrors):
        self._state = state
        self.mirrors = mirrors
        self.tx = mirroring(state.tx, mirrors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    @property
    def opt_state(self) -> Any:
        """The optimizer's state and the mirrors."""
        held = _class_for(self.mirrors)
        return Beside(self._state.opt_state, held(*(getattr(self._state, name) for name, _ in self.mirrors)))

    def replace(self, **changes: Any) -> View:
        """The same look at a state with these changes."""
        both = changes.pop("opt_state", None)
        if both is not None:
            changes |= {"opt_state": both.opt_state, **both.mirrors._asdict()}
        tx = changes.pop("tx", None)
        if tx is not None:
            changes["tx"] = getattr(tx.init, "mirrored", tx)
        return View(self._state.replace(**changes), self.mirrors)

    def unviewed(self) -> Any:
        """The state itself."""
        return self._state


class Beside(NamedTuple):
    """The state of `mirroring`: the optimizer's own, and trees that mirror the parameters."""

    opt_state: Any
    mirrors: Any


@functools.lru_cache(maxsize=64)
def _class_for(mirrors: Mirrors) -> Any:
    """A state class with one field per mirror, registered by kind."""
    made = NamedTuple("Mirrors", [(name, Any) for name, _ in mirrors])  # type: ignore[misc]
    kinds: dict[str, Any] = dict(mirrors)
    register_slot(made, **kinds)
    return made


@functools.lru_cache(maxsize=64)
def mirroring(tx: Any, mirrors: Mirrors) -> Any:
    """An optimizer whose state has trees beside it that mirror the parameters and that it leaves alone."""
    inner, held = optax.with_extra_args_support(tx), _class_for(mirrors)

    def init(params: Any) -> Beside:
        trees = [params if kind == "param" else jax.tree.map(jnp.zeros_like, params) for _, kind in mirrors]
        return Beside(tx.init(params), held(*trees))

    def update(updates: Any, state: Beside, params: Any = None, **given: Any) -> tuple[Any, Beside]:
        updates, opt_state = inner.update(updates, state.opt_state, params, **given)
        return updates, Beside(opt_state, state.mirrors)

    init.mirrored = tx  # type: ignore[attr-defined]  # the way back
    return optax.GradientTransformationExtraArgs(init, update)
