"""The surgery protocol: how a user's plain function, or a built-in class, is called on the selected leaves."""

from __future__ import annotations

import dataclasses
import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import InputError, SurgeryError, SurgeryFunctionError, UserCodeError, located, shorten
from flax_surgery_hooks.paths import listed

RESERVED = ("path", "key", "step", "memory")
PRESERVES = ("function", "eval_function", "nothing")


class Surgery(Protocol):
    """What a surgery class looks like; a plain function with the same parameters is a surgery too.

    The first parameter is one selected leaf, or, if it is named `leaves`, the dict from path to leaf of all selected
    ones, and as much comes back. Further parameters are filled by name: `path` (str, one-leaf form only), `key` (a
    typed PRNG key; in the one-leaf form the leaf's own), `step` (int32 scalar: what `state.step` holds), and any input
    that the trainer passes to the hooks. Leaves come as float32 where they are stored in fewer bits, and go back to
    their dtype.

    Attributes:
      preserves: "function" or "eval_function" if the model computes the same after the edit (slots are transported by
        default), "nothing" otherwise (slots are carried by default).
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
    """

    function: Callable[..., Any]
    name: str
    many: bool
    wants: tuple[str, ...]
    may_take: tuple[str, ...]
    preserves: str
    fold_back: Callable[..., Any] | None = None
    fold_wants: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether the surgery has a parameter of this name beside its first."""
        return name in self.wants or name in self.may_take

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the trainer's inputs that this surgery asks for.

        Raises:
          InputError: one that it needs is not there.
        """
        asked = dict.fromkeys((*self.wants, *self.may_take, *self.fold_wants))
        missing = [name for name in (*self.wants, *self.fold_wants) if name not in given and name not in RESERVED]
        if missing:
            raise InputError(
                f"The surgery {self.name} asks for {listed(missing)}, which the train loop does not pass.",
                found=f"inputs {listed(given) or 'none'}",
                write=f"hooks(step, state, {missing[0]}=...), or give the parameter a default",
            )
        return {name: given[name] for name in asked if name in given}


def as_edit(surgery: Any) -> Edit:
    """Reads the signature of a function or of a surgery object.

    Raises:
      SurgeryFunctionError: it cannot be called with leaves, or declares something unknown.

    >>> as_edit(lambda kernel, key: kernel).wants
    ('key',)
    """
    name = getattr(surgery, "__name__", type(surgery).__name__)
    if inspect.isclass(surgery) or not callable(surgery):
        raise SurgeryFunctionError(
            "A surgery is a function of leaves or an object that can be called with them.",
            found=repr(surgery),
            write=f"{name}(...), an instance"
            if inspect.isclass(surgery)
            else "a function such as lambda kernel: 2 * kernel",
        )
    first, wants, may_take = _parameters(surgery, name)
    preserves = getattr(surgery, "preserves", "nothing")
    if preserves not in PRESERVES:
        raise SurgeryFunctionError(
            f"The surgery {name} declares an unknown `preserves`.",
            found=repr(preserves),
            write=f"one of {', '.join(PRESERVES)}",
        )
    fold_back = getattr(surgery, "fold_back", None)
    fold_wants = () if fold_back is None else _parameters(fold_back, f"{name}.fold_back")[1]
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
    if "memory" in wants + may_take:
        raise SurgeryFunctionError(
            f"The surgery {name} asks for `memory`, a reserved name: surgeries keep no arrays between fires.",
            write="an input under another name, passed by the trainer",
        )
    return Edit(surgery, name, first == "leaves", wants, may_take, preserves, fold_back, fold_wants)


def _parameters(function: Callable[..., Any], name: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Name of the first parameter, names without and with a default of the others."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise SurgeryFunctionError(
            f"The signature of {name} cannot be read.", write=f"lambda leaf: {name}(leaf)"
        ) from error
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise SurgeryFunctionError(
            f"{name} takes no leaf: its first parameter must be positional.",
            found=str(signature),
            write="def edit(kernel, ...)",
        )
    rest = parameters[1:]
    for parameter in rest:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise SurgeryFunctionError(
                f"{name} takes {parameter}; parameters are filled by name, so each needs one.",
                found=str(signature),
                write="the names of the inputs it uses",
            )
    wants = tuple(p.name for p in rest if p.default is inspect.Parameter.empty)
    may_take = tuple(p.name for p in rest if p.default is not inspect.Parameter.empty)
    return parameters[0].name, wants, may_take


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


def call(
    edit: Edit,
    leaves: Mapping[str, Any],
    *,
    key: jax.Array | None,
    step: Any,
    inputs: Mapping[str, Any],
    hashes: Mapping[str, Any],
) -> dict[str, Any]:
    """Calls a surgery on its leaves and checks what comes back.

    Args:
      edit: the surgery.
      leaves: path -> leaf; exactly one in the one-leaf form.
      key: the key of the fire.
      step: what `state.step` holds, int32 scalar.
      inputs: what `Edit.inputs` returned.
      hashes: path -> `path_hash(path)`, which may be traced so that leaves of one shape share a program.

    Returns:
      path -> new leaf, with the paths of `leaves`.

    Raises:
      UserCodeError: the surgery raised.
      SurgeryFunctionError: it returned other paths, or something that is no array of the leaf's kind.
    """
    path = next(iter(leaves)) if len(leaves) == 1 else None
    own = key
    if key is not None and path is not None and not edit.many:
        own = jax.random.fold_in(key, hashes[path])
    ready = {"path": path, "step": step, **inputs}
    if own is not None:
        ready["key"] = own
    named = {name: ready[name] for name in (*edit.wants, *edit.may_take) if name in ready}
    argument = dict(leaves) if edit.many else next(iter(leaves.values()))
    with located(path=path):
        result = _run(edit.function, argument, named, edit.name)
        new = result if edit.many else {path: result}
        _check_result(edit, leaves, new)
    return {path: jnp.asarray(new[path]) for path in leaves}


def call_fold_back(edit: Edit, new: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Calls `fold_back` on new leaves (same paths as the old ones).

    Raises:
      UserCodeError: it raised.
      SurgeryFunctionError: it returned other paths.
    """
    assert edit.fold_back is not None
    named = {name: inputs[name] for name in edit.fold_wants}
    argument = dict(new) if edit.many else next(iter(new.values()))
    result = _run(edit.fold_back, argument, named, f"{edit.name}.fold_back")
    old = result if edit.many else {next(iter(new)): result}
    _check_result(edit, new, old, what=f"{edit.name}.fold_back")
    return {path: old[path] for path in new}


def _run(function: Callable[..., Any], argument: Any, named: Mapping[str, Any], name: str) -> Any:
    try:
        return function(argument, **named)
    except SurgeryError:
        raise
    except Exception as error:
        raise UserCodeError(f"{name} raised {type(error).__name__}: {shorten(error)}") from error


def _check_result(edit: Edit, leaves: Mapping[str, Any], new: Any, what: str | None = None) -> None:
    what = what or f"The surgery {edit.name}"
    if not isinstance(new, Mapping) or set(new) != set(leaves):
        raise SurgeryFunctionError(
            f"{what} must return a dict with the paths it was given: {listed(leaves)}.",
            found=listed(map(str, new)) if isinstance(new, Mapping) else type(new).__name__,
            write="{path: edited leaf} for every path of `leaves`",
        )
    for path, old in leaves.items():
        with located(path=path):
            _check_leaf(what, old, new[path])


def _check_leaf(what: str, old: Any, new: Any) -> None:
    if new is None or (not hasattr(new, "dtype") and not isinstance(new, int | float | complex)):
        raise SurgeryFunctionError(
            f"{what} must return an array.",
            found="None (is a `return` missing?)" if new is None else type(new).__name__,
            write="return the edited leaf",
        )
    dtype = jnp.asarray(new).dtype if not hasattr(new, "dtype") else new.dtype
    if _family(dtype) != _family(old.dtype):
        raise SurgeryFunctionError(
            f"{what} changed the kind of number: a leaf of {old.dtype} came back as {dtype}.",
            found=str(dtype),
            write=f"edited.astype({old.dtype})",
        )


def _family(dtype: Any) -> str:
    families = (("key", jax.dtypes.prng_key), ("float", jnp.floating), ("int", jnp.integer), ("bool", jnp.bool_))
    return next((name for name, scalar in families if jnp.issubdtype(dtype, scalar)), str(dtype))
