"""Further fields of a train state: mirrors of the parameters, which move like slots, and leaves to edit beside them.

A train state that has averages or target networks is looked at as one whose optimizer state holds them too, so that all
that is known of slots is true of them: kinds, rules, records, donation. So are averages that other hooks remember. One
whose `batch_stats` are to be edited is looked at as one whose parameters hold them too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_surgery_hooks import memory_mirrors
from flax_surgery_hooks.errors import HookError, StateError, quoted, shorten
from flax_surgery_hooks.memory_mirrors import Beginning, Part, Remembered
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.rules import KINDS, check_choice
from flax_surgery_hooks.slot_registry import register_slot
from flax_surgery_hooks.structure import Reshape

Fields = tuple[tuple[str, str], ...]
"""Pairs of a field of the train state and the kind of what it holds."""


class Mirrors(NamedTuple):
    """What mirrors the parameters.

    Attributes:
      fields: fields of the train state.
      remembered: what hooks remember.
    """

    fields: Fields = ()
    remembered: tuple[Remembered, ...] = ()

    def beside(self, hook: Hook) -> Mirrors:
        """What moves where this hook fires."""
        return self._replace(remembered=tuple(one for one in self.remembered if memory_mirrors.follows(one, hook)))


NO_MIRRORS = Mirrors()


def checked(mirrors: Mapping[str, str] | None) -> Fields:
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


def checked_fields(fields: Any) -> tuple[str, ...]:
    """Names of fields of the train state.

    Raises:
      HookError: they are none.
    """
    if not isinstance(fields, list | tuple) or not all(isinstance(name, str) for name in fields):
        raise HookError(
            "fields= lists fields of the train state.", found=quoted(fields), write='fields=("batch_stats",)'
        )
    return tuple(fields)


def view(state: Any, mirrors: Mirrors, fields: tuple[str, ...] = ()) -> Any:
    """The state with its mirrors among the optimizer state and some fields among the parameters; itself without any.

    Raises:
      StateError: the state has no such field, the field does not mirror the parameters, or cannot stand beside them.
    """
    held = tuple((name, kind) for name, kind in mirrors.fields if _held(state, name) is not None)
    _check_fields(state, fields)
    parts: tuple[Part, ...] = ()
    if mirrors.remembered:
        names = [name for name, _ in held]
        parts = memory_mirrors.parts_of(memories_of(state), mirrors.remembered, state.params, names)
    return View(state, held, parts, fields) if held or parts or fields else state


def memories_of(state: Any) -> Mapping[str, Any]:
    """Hook -> what it remembers; empty before `hooks.init`."""
    surgery = getattr(state, "surgery", None)
    return surgery.get("memory", {}) if isinstance(surgery, Mapping) else {}


def _check_fields(state: Any, fields: tuple[str, ...]) -> None:
    for name in fields:
        if getattr(state, name, None) is None:
            raise StateError(
                f"fields= names the field {name!r}, which the train state has not.",
                found=type(state).__name__,
                write="the name of a field that holds a tree, such as batch_stats",
            )
        if not isinstance(state.params, Mapping) or name in state.params:
            raise StateError(
                f"The field {name!r} cannot stand beside the parameters.",
                found=type(state.params).__name__,
                write="parameters in a dict or FrozenDict that has no such key",
            )


def viewed(state: Any, mirrors: Mirrors, hook: Hook) -> tuple[Any, Reshape]:
    """The view for one hook, and what the hook brings for such a state; surgeries of the optimizer see it alone."""
    reshape, operation = hook.reshape, hook.operation
    held = state if operation.edit.edit_optimizer is not None else view(state, mirrors.beside(hook), operation.fields)
    if held is state or reshape.tx is None:
        return held, reshape
    return held, dataclasses.replace(reshape, tx=held.extended(reshape.tx))


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
    """A train state whose `opt_state` holds its mirrors too, whose `params` hold some fields too, and whose `tx` is for
    such parameters and makes such states.

    Attributes:
      mirrors: fields of the state that mirror the parameters, and kinds.
      parts: what hooks remember that mirrors them.
      fields: the fields among the parameters.
    """

    def __init__(self, state: Any, mirrors: Fields, parts: tuple[Part, ...], fields: tuple[str, ...]):
        self._state = state
        self.mirrors = mirrors
        self.parts = parts
        self.fields = fields
        self.tx = self.extended(state.tx)

    def __getattr__(self, name: str) -> Any:
        # A copy in the making has no `_state` yet, and would look for it here for ever.
        return getattr(object.__getattribute__(self, "_state"), name)

    def extended(self, tx: Any) -> Any:
        """An optimizer for such a view, of one for the state itself."""
        return extended(tx, self.mirrors, self.parts, self.fields)

    @functools.cached_property
    def params(self) -> Any:
        """The parameters, and the fields under their names."""
        if not self.fields:
            return self._state.params
        both = {**self._state.params, **{name: getattr(self._state, name) for name in self.fields}}
        return type(self._state.params)(both)

    @functools.cached_property
    def opt_state(self) -> Any:
        """The optimizer's state and the mirrors."""
        if not self.mirrors and not self.parts:
            return self._state.opt_state
        fields = [getattr(self._state, name) for name, _ in self.mirrors]
        remembered = memory_mirrors.trees(memories_of(self._state), self.parts, self._state.params)
        return Beside(self._state.opt_state, _class_for(_pairs(self.mirrors, self.parts))(*fields, *remembered))

    def replace(self, **changes: Any) -> View:
        """The same look at a state with these changes."""
        params = changes.pop("params", None)
        if params is not None:
            changes |= {"params": without(params, self.fields), **{name: params[name] for name in self.fields}}
        if "opt_state" in changes:
            surgery = changes.get("surgery", getattr(self._state, "surgery", None))
            changes |= self._taken_apart(changes.pop("opt_state"), surgery)
        tx = changes.pop("tx", None)
        if tx is not None:
            changes["tx"] = getattr(tx.init, "extends", tx)
        state = self._state.replace(**changes)
        structure: Any = jax.tree.structure(state.params)
        parts = self.parts
        if parts and structure != jax.tree.structure(self._state.params):
            parts = memory_mirrors.renewed(parts, memories_of(state), state.params)
        return View(state, self.mirrors, parts, self.fields)

    def _taken_apart(self, both: Any, surgery: Any) -> dict[str, Any]:
        """Fields of the state, of an optimizer state with mirrors beside it."""
        if not self.mirrors and not self.parts:
            return {"opt_state": both}
        count = len(self.mirrors)
        fields = {name: tree for (name, _), tree in zip(self.mirrors, both.mirrors, strict=False)}
        if not self.parts:
            return {"opt_state": both.opt_state, **fields}
        memory = memory_mirrors.put(surgery["memory"], self.parts, both.mirrors[count:])
        return {"opt_state": both.opt_state, **fields, "surgery": {**surgery, "memory": memory}}

    def unviewed(self) -> Any:
        """The state itself."""
        return self._state


def _pairs(mirrors: Fields, parts: tuple[Part, ...]) -> Fields:
    return (*mirrors, *((part.name, part.kind) for part in parts))


class Beside(NamedTuple):
    """The state of `mirroring`: the optimizer's own, and trees that mirror the parameters."""

    opt_state: Any
    mirrors: Any


@functools.lru_cache(maxsize=64)
def _class_for(mirrors: Fields) -> Any:
    """A state class with one field per mirror, registered by kind."""
    made = NamedTuple("Mirrors", [(name, Any) for name, _ in mirrors])  # type: ignore[misc]
    kinds: dict[str, Any] = dict(mirrors)
    register_slot(made, **kinds)
    return made


@functools.lru_cache(maxsize=64)
def extended(tx: Any, mirrors: Fields, parts: tuple[Part, ...], fields: tuple[str, ...]) -> Any:
    """An optimizer for parameters with fields beside them, whose state has their mirrors beside it.

    Its `init` has two attributes: `extends`, the optimizer for a train state as it is, and `inner`, the one for the
    parameters without fields; see `slots.slots_of`.
    """
    inner = mirroring(tx, mirrors, parts) if mirrors or parts else tx

    def init(params: Any) -> Any:
        return inner.init(without(params, fields))

    init.extends, init.inner, init.fields = tx, inner, fields  # type: ignore[attr-defined]
    return optax.GradientTransformation(init, inner.update)


def without(params: Any, fields: tuple[str, ...]) -> Any:
    """Parameters without the fields beside them."""
    return type(params)({name: value for name, value in params.items() if name not in fields}) if fields else params


@functools.lru_cache(maxsize=64)
def mirroring(tx: Any, mirrors: Fields, parts: tuple[Part, ...]) -> Any:
    """An optimizer whose state has trees beside it that mirror the parameters and that it leaves alone."""
    inner, held = optax.with_extra_args_support(tx), _class_for(_pairs(mirrors, parts))
    beginnings = [Beginning(part) for part in parts]

    def init(params: Any) -> Beside:
        trees = [params if kind == "param" else jax.tree.map(jnp.zeros_like, params) for _, kind in mirrors]
        return Beside(tx.init(params), held(*trees, *(first(params) for first in beginnings)))

    def update(updates: Any, state: Beside, params: Any = None, **given: Any) -> tuple[Any, Beside]:
        updates, opt_state = inner.update(updates, state.opt_state, params, **given)
        return updates, Beside(opt_state, state.mirrors)

    return optax.GradientTransformationExtraArgs(init, update)
