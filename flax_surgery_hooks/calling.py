"""Calls of a surgery's functions on leaves, and the checks of what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import (
    StructureError,
    SurgeryError,
    SurgeryFunctionError,
    UserCodeError,
    located,
    shorten,
)
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.surgery import Edit, Method


class Called(NamedTuple):
    """What a surgery returned.

    Attributes:
      leaves: path -> new leaf.
      memory: what it remembers now; the given memory if it does not ask for it.
    """

    leaves: dict[str, Any]
    memory: Any


def call(
    edit: Edit,
    leaves: Mapping[str, Any],
    *,
    key: jax.Array | None,
    step: Any,
    inputs: Mapping[str, Any],
    hashes: Mapping[str, Any],
    memory: Any = (),
    method: Method | None = None,
) -> Called:
    """Calls a surgery on its leaves and checks what comes back.

    Args:
      edit: the surgery.
      leaves: path -> leaf; exactly one in the one-leaf form.
      key: the key of the fire.
      step: what `state.step` holds, int32 scalar.
      inputs: what `Edit.inputs` returned.
      hashes: path -> `path_hash(path)`, which may be traced so that leaves of one shape share a program.
      memory: what the surgery remembers of these leaves, if it remembers.
      method: `Edit.observe`, to call that instead; it keeps paths.

    Raises:
      UserCodeError: the surgery raised.
      SurgeryFunctionError: it returned no dict of leaves, or something that is no array of the leaf's kind.
    """
    called = method or edit.main
    path = next(iter(leaves)) if len(leaves) == 1 else None
    ready = {"path": path, "step": step, "memory": memory, **inputs}
    if key is not None:
        ready["key"] = jax.random.fold_in(key, hashes[path]) if path is not None and not edit.many else key
    argument = dict(leaves) if edit.many else next(iter(leaves.values()))
    with located(path=path):
        result = _run(called.function, argument, called.fill(ready), called.name)
        if called.takes("memory"):
            result, memory = _pair(called.name, result, memory)
        new: Any = result if edit.many else {path: result}
        _check_result(f"The surgery {called.name}", leaves, new, may_differ=method is None)
    return Called({new_path: jnp.asarray(new[new_path]) for new_path in _in_order(leaves, new)}, memory)


def init_memory(edit: Edit, leaves: Mapping[str, Any], key: jax.Array | None) -> Any:
    """What a surgery remembers of these leaves at first: arrays.

    Raises:
      UserCodeError: `init_memory` raised.
      SurgeryFunctionError: it returned no arrays.
    """
    assert edit.init_memory is not None
    path = next(iter(leaves)) if not edit.many else None
    argument = dict(leaves) if edit.many else next(iter(leaves.values()))
    result = _run(
        edit.init_memory.function, argument, edit.init_memory.fill({"path": path, "key": key}), edit.init_memory.name
    )
    odd = [type(leaf).__name__ for leaf in jax.tree.leaves(result) if not _is_number(leaf)]
    if odd or not jax.tree.leaves(result):
        raise SurgeryFunctionError(
            f"{edit.init_memory.name} must return arrays: a pytree of what the surgery remembers.",
            found=listed(odd) if odd else type(result).__name__,
            write="return jnp.zeros_like(leaf)",
        )
    made = jax.tree.map(jnp.asarray, result)
    for part, kind in edit.memory_kinds:
        _check_moves(edit, leaves, made, part, kind)
    return made


def _check_moves(edit: Edit, leaves: Mapping[str, Any], made: Any, key: str, kind: str) -> None:
    """Raises unless a part of a memory holds arrays that can move with their leaves."""
    name = edit.init_memory.name if edit.init_memory is not None else edit.name
    if key and (not isinstance(made, Mapping) or key not in made):
        raise SurgeryFunctionError(
            f"{name} makes no {key!r}, of which memory_kinds says what it holds.",
            found=listed(map(str, made))
            if isinstance(made, Mapping)
            else f"{made.dtype}{list(made.shape)}"
            if hasattr(made, "dtype")
            else type(made).__name__,
            write=f"a dict with {key!r}, or memory_kinds without it",
        )
    part = made[key] if key else made
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves.items()}
    if edit.many:
        fits = isinstance(part, Mapping) and {path: jnp.shape(array) for path, array in part.items()} == shapes
    else:
        fits = {jnp.shape(array) for array in jax.tree.leaves(part)} == set(shapes.values())
    if not fits:
        raise SurgeryFunctionError(
            f"{name} makes what cannot move with its leaves as the kind {kind!r}: arrays of another shape than theirs.",
            found=f"{key or 'memory'}: {shorten(jax.tree.map(jnp.shape, part))}",
            write=f"arrays of shape {listed(str(list(shape)) for shape in shapes.values())}"
            + (" by the path of the leaf" if edit.many else ""),
        )


def figure_names(edit: Edit, paths: Sequence[str]) -> tuple[str, ...]:
    """The names of the figures that a surgery has of one call, in order; none if it measures nothing.

    Raises:
      UserCodeError: `figure_names` raised.
      SurgeryFunctionError: they are no names, or those of other figures.
    """
    if edit.figure_names is None:
        return ()
    names = _run(edit.figure_names, tuple(paths), {}, f"{edit.name}.figure_names")
    fits = isinstance(names, tuple | list) and all(isinstance(name, str) and name for name in names)
    if not fits or len(set(names)) < len(names) or any(name.split("/")[0] in ("params", "slots") for name in names):
        raise SurgeryFunctionError(
            f"{edit.name}.figure_names must return different names, which do not begin with params/ or slots/.",
            found=shorten(names),
            write='return ("overlap",)',
        )
    return tuple(names)


def call_figures(
    edit: Edit, leaves: Mapping[str, Any], *, key: Any, step: Any, inputs: Mapping[str, Any], memory: Any
) -> jax.Array:
    """The figures that a surgery has of its leaves before the edit, float32 [figures], in the order of their names.

    Raises:
      UserCodeError: `figures` raised.
      SurgeryFunctionError: it returned others than it named, or no numbers.
    """
    method = edit.figures
    assert method is not None
    names = figure_names(edit, tuple(leaves))
    argument = dict(leaves) if edit.many else next(iter(leaves.values()))
    ready = {"path": next(iter(leaves)), "step": step, "memory": memory, "key": key, **inputs}
    result = _run(method.function, argument, method.fill(ready), method.name)
    fits = isinstance(result, Mapping) and set(result) == set(names)
    if not fits or any(not _is_number(value) or jnp.shape(value) for value in result.values()):
        raise SurgeryFunctionError(
            f"{method.name} must return a dict of the figures that figure_names names, each one number.",
            found=listed(map(str, result)) if isinstance(result, Mapping) else type(result).__name__,
            write=listed(names) or "no method `figures`",
        )
    return jnp.stack([jnp.asarray(result[name], jnp.float32) for name in names] or [jnp.zeros((), jnp.float32)])


def call_fold_back(edit: Edit, new: Mapping[str, Any], old: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
    """Calls `fold_back` on new leaves; returns leaves at the paths of `old`.

    Raises:
      UserCodeError: it raised.
      SurgeryFunctionError: it returned other paths.
    """
    assert edit.fold_back is not None
    named = {name: inputs[name] for name in edit.fold_wants}
    argument = dict(new) if edit.many else next(iter(new.values()))
    result = _run(edit.fold_back, argument, named, f"{edit.name}.fold_back")
    folded = result if edit.many else {next(iter(old)): result}
    _check_result(f"{edit.name}.fold_back", old, folded, may_differ=False)
    return {path: folded[path] for path in old}


def _run(function: Callable[..., Any], argument: Any, named: Mapping[str, Any], name: str) -> Any:
    try:
        return function(argument, **named)
    except SurgeryError:
        raise
    except Exception as error:
        raise UserCodeError(f"{name} raised {type(error).__name__}: {shorten(error)}") from error


def _pair(name: str, result: Any, memory: Any) -> tuple[Any, Any]:
    """What a function that asks for `memory` returns, and its memory in the dtypes that are kept."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise SurgeryFunctionError(
            f"{name} asks for `memory`, so that it must return a pair.",
            found=f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__,
            write="return leaf, memory (the given memory, if nothing of it changed)",
        )
    edited, remembered = result
    held: Any = jax.tree.structure(memory)
    if jax.tree.structure(remembered) != held:
        raise SurgeryFunctionError(
            f"{name} returned a memory of another structure than `init_memory` made.",
            found=shorten(jax.tree.structure(remembered), 150),
            write=shorten(held, 150),
        )
    for before, after in zip(jax.tree.leaves(memory), jax.tree.leaves(remembered), strict=True):
        if not _is_number(after) or _dtype(after) != _dtype(before):
            raise SurgeryFunctionError(
                f"{name} returned a memory of another dtype than `init_memory` made.",
                found=f"{_dtype(after) if _is_number(after) else type(after).__name__} for {_dtype(before)}",
                write=f"memory.astype({_dtype(before)})",
            )
    return edited, jax.tree.map(jnp.asarray, remembered)


def check_memory(name: str, old: Any, new: Any) -> None:
    """Raises if a memory has changed its shape.

    Raises:
      StructureError: it has.
    """
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.shape(before) != after.shape:
            raise StructureError(
                f"{name} changes the shape of its memory, which is part of the train state.",
                found=f"{list(jnp.shape(before))} -> {list(after.shape)}",
                write="a memory that keeps its shape",
            )


def _check_result(what: str, leaves: Mapping[str, Any], new: Any, *, may_differ: bool) -> None:
    expected = isinstance(new, Mapping) and (set(new) == set(leaves) or (may_differ and _are_paths(new)))
    if not expected:
        raise SurgeryFunctionError(
            f"{what} must return a dict with the paths it was given: {listed(leaves)}"
            + (", or others as strings without empty parts, to add and remove leaves." if may_differ else "."),
            found=(listed(map(repr, new)) or "no paths") if isinstance(new, Mapping) else type(new).__name__,
            write="{path: edited leaf} for every path of `leaves`",
        )
    for path, leaf in new.items():
        with located(path=path):
            _check_leaf(what, leaves.get(path), leaf)


def _are_paths(new: Mapping[Any, Any]) -> bool:
    return bool(new) and all(isinstance(path, str) and all(path.split("/")) for path in new)


def _check_leaf(what: str, old: Any, new: Any) -> None:
    if new is None or not _is_number(new):
        raise SurgeryFunctionError(
            f"{what} must return an array.",
            found="None (is a `return` missing?)" if new is None else type(new).__name__,
            write="return the edited leaf",
        )
    dtype = _dtype(new)
    if old is not None and _family(dtype) != _family(old.dtype):
        raise SurgeryFunctionError(
            f"{what} changed the kind of number: a leaf of {old.dtype} came back as {dtype}.",
            found=str(dtype),
            write=f"edited.astype({old.dtype})",
        )


def _in_order(leaves: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The paths of `new`: those that were given in their order, then the others sorted."""
    return [path for path in leaves if path in new] + sorted(path for path in new if path not in leaves)


def _is_number(value: Any) -> bool:
    return hasattr(value, "dtype") or isinstance(value, int | float | complex)


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.asarray(value).dtype


def _family(dtype: Any) -> str:
    families = (("key", jax.dtypes.prng_key), ("float", jnp.floating), ("int", jnp.integer), ("bool", jnp.bool_))
    return next((name for name, scalar in families if jnp.issubdtype(dtype, scalar)), str(dtype))
