"""The surgery protocol: how a user's plain function, or a built-in class, is called on the selected leaves."""

from __future__ import annotations

import dataclasses
import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from flax_surgery_hooks.errors import InputError, SurgeryFunctionError, quoted, shorten
from flax_surgery_hooks.methods import Method as Method
from flax_surgery_hooks.methods import parameters_of
from flax_surgery_hooks.paths import listed

RESERVED = ("path", "key", "step", "memory", "state", "leaves")
LEAF = "leaf"
"""What `edit_slots` gets the leaf under."""
STATE, LEAVES = "state", "leaves"
"""What functions of `derived` get the train state and the selected leaves under."""
PRESERVES = ("function", "eval_function", "nothing")


class Surgery(Protocol):
    """What a surgery class looks like; a plain function with the same parameters is a surgery too.

    The first parameter is one selected leaf, or, if it is named `leaves`, the dict from path to leaf of all selected
    ones, and a dict comes back: of the same paths, or of others, which adds and removes leaves. Further parameters are
    filled by name: `path` (str, one-leaf form only), `key` (a typed PRNG key; in the one-leaf form the leaf's own),
    `step` (int32 scalar: what `state.step` holds), `memory`, and any input that the trainer passes to the hooks. Leaves
    come as float32 where they are stored in fewer bits, and go back to their dtype.

    A class may have further methods, whose parameters are filled likewise:
      `init_memory(leaf)`: what the surgery remembers of the leaf at first, a pytree of arrays; it may take `path` and
        `key`. `hooks.init(state)` puts it into the train state. A `__call__` or `observe` that takes `memory` returns a
        pair of what it returns otherwise and the new memory, which has the structure, shapes and dtypes of the old one.
      `observe(leaf)`: what happens to the leaf and the memory at every step, inside the train step, by
        `hooks.observe(state)` or `hooks.in_graph(state)`. Slots are left alone.
      `fold_back(new_leaf)`: the linear map that says how a change of the new leaf folds back into the old one.
      `edit_slots(slots)`: the optimizer slots of the leaf after the edit, see `slot_edits`; it may take `leaf` too.
      `figures(leaf)`: further figures of a fire, name -> number, and `figure_names(paths)`, which says their names.
      `check_schedule(when)`: raises if the surgery is not made for such a schedule; called by `hooks.add`.

    An attribute `derived`, name -> function, holds what is computed once per fire, before the edit, and given to the
    others as inputs of these names: gradients of the user's loss, a mask. The functions' parameters are filled by name
    too: `state` (the whole train state), or `leaves` (path -> leaf) and `memory`; `key`, `step`, inputs, and what the
    functions before it have made. See `deriving`.

    A class with `edit_optimizer(optimizer)` instead of `__call__` edits the optimizer state as a whole, see
    `optimizer_edits`.

    Attributes:
      preserves: "function" or "eval_function" if the model computes the same after the edit (slots are transported by
        default), "nothing" otherwise (slots are carried by default).
      opt_state: another rule to be the default, such as "keep" where an edit leaves the history of all elements alone.
      starts_anew: whether `operate`, which has no place for what a surgery remembers, may start it from `init_memory`
        and let go of what comes of that.
    """

    preserves: ClassVar[str] = "nothing"

    def __call__(self, leaf: jax.Array, /) -> jax.Array:
        """The edited leaf."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """A surgery whose signature has been read.

    Attributes:
      function: the surgery itself.
      name: its name in records.
      many: whether it takes the dict of all selected leaves.
      wants: names of the further parameters that must be filled.
      may_take: names of those that have defaults.
      preserves: what the edit leaves alone.
      fold_back: the linear map from new leaves to old ones, or None.
      fold_wants: the names that `fold_back` takes beside its first parameter.
      init_memory: what makes the memory of a leaf (of all leaves, if it takes many), or None if it remembers nothing.
      observe: what happens at every step, or None.
      edit_slots: what edits the slots of a leaf in place of a rule, or None.
      edit_optimizer: what edits the optimizer state as a whole, in place of leaves, or None.
      derived: what is computed once per fire, in order: name -> function.
      figures: what measures a fire beside the edit, or None.
      figure_names: from the paths of a call's leaves to the names of these figures.
      rule: the rule of slots by default, or None for that of `preserves`.
      starts_anew: whether `operate` may start it from its first memory.
    """

    function: Callable[..., Any]
    name: str
    many: bool
    wants: tuple[str, ...]
    may_take: tuple[str, ...]
    preserves: str
    fold_back: Callable[..., Any] | None = None
    fold_wants: tuple[str, ...] = ()
    init_memory: Method | None = None
    observe: Method | None = None
    edit_slots: Method | None = None
    edit_optimizer: Method | None = None
    derived: tuple[tuple[str, Method], ...] = ()
    figures: Method | None = None
    figure_names: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None
    rule: str | None = None
    starts_anew: bool = False

    @property
    def main(self) -> Method:
        """What a fire calls."""
        return Method(self.function, self.name, self.wants, self.may_take)

    def takes(self, name: str) -> bool:
        """Whether anything that a fire calls has a parameter of this name beside its first."""
        return any(method.takes(name) for method in (self.main, *self._called))

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the parameters without default of all that a fire calls, but for those that it makes itself."""
        others = [name for method in self._called for name in method.wants if name != LEAF]
        made = dict(self.derived)
        return tuple(name for name in (*self.wants, *others, *self.fold_wants) if name not in made)

    @property
    def edits_state(self) -> bool:
        """Whether slots change by what the surgery itself says, so that no rule applies."""
        return any(method is not None for method in self._others)

    @property
    def _others(self) -> tuple[Method | None, Method | None]:
        return self.edit_slots, self.edit_optimizer

    @property
    def _called(self) -> tuple[Method, ...]:
        """What a fire calls beside the surgery itself."""
        functions = (*self._others, self.figures, *(method for _, method in self.derived))
        return tuple(method for method in functions if method is not None)

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the trainer's inputs that this surgery asks for.

        Raises:
          InputError: one that it needs is not there, or one is there that it makes itself.
        """
        optional = [name for method in self._called for name in method.may_take if name != LEAF]
        asked = dict.fromkeys((*self.needs, *self.may_take, *optional))
        twice = [name for name, _ in self.derived if name in given]
        if twice:
            raise InputError(
                f"The surgery {self.name} computes {twice[0]!r} itself, and the train loop passes it too.",
                found=f"inputs {listed(given)}",
                write=f"hooks(step, state) without {twice[0]}=, or the surgery without its function for it",
            )
        missing = [name for name in self.needs if name not in given and name not in RESERVED]
        if missing:
            raise InputError(
                f"The surgery {self.name} asks for {listed(missing)}, which the train loop does not pass.",
                found=f"inputs {listed(given) or 'none'}",
                write=f"hooks(step, state, {missing[0]}=...), or give the parameter a default",
            )
        return {name: given[name] for name in asked if name in given}

    def observed_inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the inputs of `hooks.observe` that `observe` asks for.

        Raises:
          InputError: one that it needs is not there.
        """
        assert self.observe is not None
        missing = [name for name in self.observe.wants if name not in given and name not in RESERVED]
        if missing:
            raise InputError(
                f"{self.observe.name} asks for {listed(missing)}, which the train step does not pass.",
                found=f"inputs {listed(given) or 'none'}",
                write=f"hooks.observe(state, {missing[0]}=...), or give the parameter a default",
            )
        return self.observe.fill(given)


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
    if edit.many:
        raise SurgeryFunctionError(
            f"{edit.name}.edit_slots is given the slots of one leaf, and the surgery takes all leaves at once.",
            write="def __call__(self, leaf): return leaf",
        )
    method = Method(function, f"{edit.name}.edit_slots", *parameters_of(function, f"{edit.name}.edit_slots")[1:])
    _refuse_reserved(method, ("memory",), "`leaf`, `path`, `key`, `step` and inputs")
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


def describe(surgery: Any) -> dict[str, Any]:
    """Name and fields of a surgery as JSON holds them, for records.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Halve:
    ...     by: float = 2.0
    >>> describe(Halve())
    {'name': 'Halve', 'by': 2.0}
    """
    name = getattr(surgery, "__name__", type(surgery).__name__)
    if not dataclasses.is_dataclass(surgery) or inspect.isclass(surgery):
        return {"name": name}
    fields = {field.name: getattr(surgery, field.name) for field in dataclasses.fields(surgery)}
    return {"name": name, **{key: plain(value) for key, value in fields.items()}}


def plain(value: Any) -> Any:
    """`value` as JSON holds it; arrays and functions by what they are, not by content."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return shorten(value)


def path_hash(path: str) -> np.uint32:
    """The number of a path that keys are folded with: its crc32, the same on every process and in every run."""
    return np.uint32(zlib.crc32(path.encode()))


def key_for(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf: `key` folded with the hash of the leaf's path.

    >>> import jax
    >>> bool((key_for(jax.random.key(0), "a") == key_for(jax.random.key(0), "b")).all())
    False
    """
    return jax.random.fold_in(key, path_hash(path))
