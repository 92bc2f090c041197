"""Reads what a surgery is from its attributes and signatures: an `Edit`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted
from flax_surgery_hooks.methods import Method, parameters_of
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.rules import KINDS, check_choice
from flax_surgery_hooks.surgery import FOLLOWS, LEAVES, PRESERVES, RESERVED, STATE, Edit


def as_edit(surgery: Any) -> Edit:
    """Reads the signature of a function or of a surgery object.

    Raises:
      SurgeryFunctionError: it cannot be called with leaves, or declares something unknown.

    >>> as_edit(lambda kernel, key: kernel).wants
    ('key',)
    """
    name = getattr(surgery, "__name__", type(surgery).__name__)
    if hasattr(surgery, "edit_optimizer") and not inspect.isclass(surgery):
        return _optimizer_edit(surgery, name)
    if inspect.isclass(surgery) or not callable(surgery):
        raise SurgeryFunctionError(
            "A surgery is a function of leaves or an object that can be called with them.",
            found=quoted(surgery),
            write=f"{name}(...), an instance"
            if inspect.isclass(surgery)
            else "a function such as lambda kernel: 2 * kernel",
        )
    first, wants, may_take = parameters_of(surgery, name)
    preserves = getattr(surgery, "preserves", "nothing")
    if preserves not in PRESERVES:
        raise SurgeryFunctionError(
            f"The surgery {name} declares an unknown `preserves`.",
            found=quoted(preserves),
            write=f"one of {', '.join(PRESERVES)}",
        )
    fold_back = getattr(surgery, "fold_back", None)
    fold_wants = () if fold_back is None else parameters_of(fold_back, f"{name}.fold_back")[1]
    if {"path", "memory"} & set(fold_wants):
        raise SurgeryFunctionError(
            f"The fold_back of {name} asks for `path` or `memory`; it is given leaves, `key`, `step` and inputs.",
            found=f"({listed(fold_wants)})",
            write="the form with `leaves`, whose keys are the paths",
        )
    if first == "leaves" and "path" in wants + may_take:
        raise SurgeryFunctionError(
            f"The surgery {name} takes all leaves at once and asks for `path`.",
            write="the keys of `leaves`, which are the paths",
        )
    edit = Edit(surgery, name, first == "leaves", wants, may_take, preserves, fold_back, fold_wants)
    return dataclasses.replace(
        edit,
        init_memory=_init_memory(edit),
        observe=_method(edit, "observe"),
        edit_slots=_edit_slots(edit),
        derived=_derived(edit),
        **_figures(edit),
        **_memory_moves(edit),
        rule=getattr(surgery, "opt_state", None),
        starts_anew=bool(getattr(surgery, "starts_anew", False)),
    )


def _derived(edit: Edit) -> tuple[tuple[str, Method], ...]:
    """What a surgery computes once per fire."""
    functions = getattr(edit.function, "derived", None) or {}
    if not isinstance(functions, Mapping):
        raise SurgeryFunctionError(
            f"{edit.name}.derived is a mapping from the name of an input to the function that makes it.",
            found=type(functions).__name__,
            write="a property, if it depends on fields: @property def derived(self): return {...}",
        )
    found: dict[str, Method] = {}
    for name, function in functions.items():
        method = _derived_method(edit, name, function)
        of_state = method.takes(STATE)
        late = [want for want in method.wants if want in functions and (want not in found or (
            of_state and not found[want].takes(STATE)))]  # fmt: skip
        if late:
            raise SurgeryFunctionError(
                f"{method.name} asks for {late[0]!r}, which is made after it.",
                found=f"the order {listed(functions)}",
                write="what it asks for in front of it; functions of `state` come before those of `leaves`",
            )
        found[name] = method
    return tuple(found.items())


def _derived_method(edit: Edit, name: str, function: Any) -> Method:
    called = f"{edit.name}.derived[{name!r}]"
    if not callable(function) or name in RESERVED or not name.isidentifier():
        raise SurgeryFunctionError(
            f"{called} is no function under a name that an input can have.",
            found=quoted(function) if name not in RESERVED else f"the name {name!r}, which is reserved",
            write='derived = {"grads": lambda state, batch: jax.grad(loss)(state.params, batch)}',
        )
    first, wants, may_take = parameters_of(function, called)
    method = Method(function, called, (first, *wants), may_take)
    alone = (LEAVES, "memory")
    _refuse_reserved(method, ("path",), "`state`, or `leaves` and `memory`, `key`, `step` and inputs")
    if method.takes(STATE) and (method.takes(LEAVES) or method.takes("memory")):
        raise SurgeryFunctionError(
            f"{called} asks for the whole state and for the selected leaves.",
            found=f"({listed((*method.wants, *method.may_take))})",
            write="two functions: the second is given, by its name, what the first has made",
        )
    if not edit.many and any(map(method.takes, alone)):
        raise SurgeryFunctionError(
            f"{called} asks for {listed(filter(method.takes, alone))}, and the surgery takes one leaf at a time.",
            write="`leaves` as the first parameter of the surgery, or a function of `state`",
        )
    return method


def _figures(edit: Edit) -> dict[str, Any]:
    """What a surgery measures."""
    method, names = _method(edit, "figures"), getattr(edit.function, "figure_names", None)
    if (method is None) != (names is None):
        raise SurgeryFunctionError(
            f"{edit.name} has {'figures' if names is None else 'names of figures'} without "
            f"{'their names' if names is None else 'figures'}, and room for them is made before the first fire.",
            write='def figures(self, leaf) -> {"largest": ...}, and def figure_names(self, paths) -> ("largest",)',
        )
    return {"figures": method, "figure_names": names}


def _memory_moves(edit: Edit) -> dict[str, Any]:
    """What of the memory moves with its leaf, and when."""
    kinds, follows = (getattr(edit.function, name, default) for name, default in (
        ("memory_kinds", ()), ("memory_follows", "edits")))  # fmt: skip
    if isinstance(kinds, str):
        kinds = {"": kinds}
    fits = isinstance(kinds, Mapping) and all(isinstance(key, str) for key in kinds) and not (edit.many and "" in kinds)
    if kinds != () and not fits:
        raise SurgeryFunctionError(
            f"{edit.name}.memory_kinds says what arrays of its memory hold.",
            found=quoted(getattr(edit.function, "memory_kinds", None)),
            write='{"average": "param"}, of keys of the memory' + ("" if edit.many else ', or "param" for all of it'),
        )
    if kinds and not hasattr(edit.function, "init_memory"):
        raise SurgeryFunctionError(
            f"{edit.name}.memory_kinds is of a memory, and the surgery has none.",
            write="init_memory(self, leaf), or no memory_kinds",
        )
    if follows not in FOLLOWS:
        raise SurgeryFunctionError(
            f"{edit.name}.memory_follows says which fires of other hooks its memory follows.",
            found=quoted(follows),
            write=" or ".join(map(repr, FOLLOWS)),
        )
    checked = {key: check_choice(kind, KINDS[:-1], "kind of memory") for key, kind in dict(kinds).items()}
    return {"memory_kinds": tuple(checked.items()), "memory_follows": follows}


def _optimizer_edit(surgery: Any, name: str) -> Edit:
    """A surgery on the optimizer state as a whole."""
    others = [other for other in ("__call__", "edit_slots", "init_memory", "observe") if hasattr(surgery, other)]
    if others:
        raise SurgeryFunctionError(
            f"The surgery {name} edits the optimizer as a whole, and so no leaves beside it.",
            found=f"edit_optimizer and {listed(others)}",
            write="two surgeries, each with one of them",
        )
    method = Method(surgery.edit_optimizer, f"{name}.edit_optimizer", *parameters_of(surgery.edit_optimizer, name)[1:])
    _refuse_reserved(method, ("path", "memory"), "`key`, `step` and inputs; `optimizer.paths` are the selected leaves")
    return Edit(surgery, name, False, (), (), "nothing", edit_optimizer=method)


def _edit_slots(edit: Edit) -> Method | None:
    """What edits the slots of a leaf, if the surgery has that."""
    function = getattr(edit.function, "edit_slots", None)
    if function is None:
        return None
    method = Method(function, f"{edit.name}.edit_slots", *parameters_of(function, f"{edit.name}.edit_slots")[1:])
    if edit.many:
        _refuse_reserved(method, ("memory", "path", "leaf"), "`leaves`, `key`, `step` and inputs")
    else:
        _refuse_reserved(method, ("memory", "leaves"), "`leaf`, `path`, `key`, `step` and inputs")
    return method


def _refuse_reserved(method: Method, names: tuple[str, ...], given: str) -> None:
    asked = [name for name in names if method.takes(name)]
    if asked:
        raise SurgeryFunctionError(f"{method.name} asks for {listed(asked)}; it is given {given}.", write="without it")


def _method(edit: Edit, attribute: str) -> Method | None:
    """A further method of a surgery, which must take leaves in the form that its `__call__` does."""
    function = getattr(edit.function, attribute, None)
    if function is None:
        return None
    name = f"{edit.name}.{attribute}"
    first, wants, may_take = parameters_of(function, name)
    if (first == "leaves") != edit.many:
        raise SurgeryFunctionError(
            f"{name} and the surgery itself do not take leaves in the same form.",
            found=f"first parameter {first!r}",
            write="`leaves` as the first parameter of both, or of neither",
        )
    if edit.many and "path" in wants:
        raise SurgeryFunctionError(
            f"{name} takes all leaves at once and asks for `path`.", write="the keys of `leaves`, which are the paths"
        )
    return Method(function, name, wants, may_take)


def _init_memory(edit: Edit) -> Method | None:
    init, observe = _method(edit, "init_memory"), _method(edit, "observe")
    uses = [method.name for method in (edit.main, observe) if method is not None and method.takes("memory")]
    if uses and init is None:
        raise SurgeryFunctionError(
            f"{uses[0]} asks for `memory`, and nothing says what it remembers at first.",
            write="a surgery class with `init_memory(self, leaf)`, or another name: `memory` is a reserved name",
        )
    if init is None:
        return None
    if not uses:
        raise SurgeryFunctionError(
            f"{init.name} makes a memory that nothing asks for.",
            write="a parameter `memory` in `__call__` or `observe`, which then return (leaf, memory)",
        )
    unknown = sorted({*init.wants} - {"path", "key"})
    if unknown:
        raise SurgeryFunctionError(
            f"{init.name} asks for {listed(unknown)}; it is called before the first step and gets `path` and `key`.",
            write="def init_memory(self, leaf)",
        )
    return init
