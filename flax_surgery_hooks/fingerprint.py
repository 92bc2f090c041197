"""What hooks and states are, as JSON that is the same in every process of the same program.

No addresses, no `id`s, no order of sets: functions are told by name, compiled code, defaults and what they close over;
arrays by shape, dtype and a checksum; what has no description of its own by the name of its class.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import math
import os
import types
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from flax_surgery_hooks.processes import numbered
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.selection import Selection

DEEPEST = 12
"""How far fields of fields are followed."""


def stable(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value as JSON, the same in every process.

    Args:
      value: anything.
      within: the `id`s of what it is part of, so that a cycle ends.

    >>> stable({"b": 1.5, "a": (1, {"y", "x"})})
    {'b': 1.5, 'a': [1, ['x', 'y']]}
    >>> stable(object())
    '<builtins.object>'
    """
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if id(value) in within or len(within) > DEEPEST:
        return f"<{qualified(type(value))}>"
    within = (*within, id(value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value)
    if inspect.isclass(value):
        return qualified(value)
    fields = _fields(value)
    if fields is not None:
        return {"is": qualified(type(value)), **{name: stable(field, within) for name, field in fields.items()}}
    if isinstance(value, Mapping):
        return {str(key): stable(item, within) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [stable(item, within) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((stable(item, within) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, types.MethodType):  # before `unwrap`, which would lose whose method it is
        return {"of": stable(value.__self__, within), "method": stable(value.__func__, within)}
    function = inspect.unwrap(value) if callable(value) else None
    if isinstance(function, types.FunctionType):
        return _function(function, within)
    return f"<{qualified(value if hasattr(value, '__qualname__') else type(value))}>"


def qualified(named: Any) -> str:
    """The name of a class or function with its module."""
    return f"{named.__module__}.{named.__qualname__}"


def _fields(value: Any) -> dict[str, Any] | None:
    """What a value is made of, if it says so."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, functools.partial):
        return {"function": value.func, "args": value.args, **value.keywords}
    return None


def _array(value: Any) -> str:
    """Shape and dtype, and where all of it is here a checksum of its elements."""
    name = f"{value.dtype}{list(value.shape)}"
    if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return name
    held = jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
    return f"{name} {zlib.crc32(np.ascontiguousarray(jax.device_get(held)).tobytes()):08x}"


def _function(function: types.FunctionType, within: tuple[int, ...]) -> dict[str, Any]:
    told: dict[str, Any] = {"function": qualified(function), "code": f"{_code(function.__code__):08x}"}
    if function.__defaults__ or function.__kwdefaults__:
        told["defaults"] = stable([function.__defaults__, function.__kwdefaults__], within)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    if closed:
        told["closure"] = stable(closed, within)
    return told


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises where a name is not assigned yet
    except ValueError:
        return False
    return True


def _code(code: types.CodeType) -> int:
    """A checksum of what a function does, whatever the file and line it stands on."""
    parts = (code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, _constant(code.co_consts))
    return zlib.crc32(repr(parts).encode())


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return tuple(map(_constant, value)) if isinstance(value, tuple) else value


def of_hook(hook: Hook) -> dict[str, Any]:
    """What a hook is: field -> description."""
    operation = {field.name: getattr(hook.operation, field.name) for field in dataclasses.fields(hook.operation)}
    edit, selection = operation.pop("edit"), operation.pop("selection")
    reshape = {field.name: getattr(hook.reshape, field.name) for field in dataclasses.fields(hook.reshape)}
    callback = reshape.pop("on_reshape", None)  # the trainer's: what it closes over may well differ
    return {
        "surgery": stable(edit.function),
        "preserves": edit.preserves,
        **_selection(selection),
        "when": _schedule(hook.when),
        "priority": hook.priority,
        **{name: stable(value) for name, value in (operation | reshape).items()},
        "on_reshape": None if callback is None else _name(callback),
        "on_error": hook.on_error,
        "rollback": stable(hook.rollback),
    }


def _name(function: Any) -> str:
    return qualified(function if hasattr(function, "__qualname__") else type(function))


def _selection(selection: Selection) -> dict[str, Any]:
    """Patterns as written; predicates with their code."""

    def one(term: Any) -> Any:
        return stable(term.fn) if hasattr(term, "fn") else term.describe()

    return {
        "params": list(map(one, selection.include)),
        "exclude": list(map(one, selection.exclude)),
        "expect": selection.expect,
    }


def _schedule(when: Schedule) -> Any:
    text = repr(when)
    return text if " at 0x" not in text else stable(when)


def of_state(state: Any, fields: tuple[str, ...]) -> dict[str, str]:
    """Path -> shape, dtype and place of every leaf of these fields of a state."""
    held = {name: getattr(state, name) for name in fields if hasattr(state, name)}
    leaves, _ = jax.tree_util.tree_flatten_with_path(held)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _leaf(leaf) for path, leaf in leaves}


def _leaf(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array):
        return f"{type(leaf).__name__}{list(np.shape(leaf))}"
    kind = "" if leaf.committed else ", uncommitted"
    return f"{leaf.dtype}{list(leaf.shape)} {_place(leaf.sharding)}{kind}"


@functools.lru_cache(maxsize=256)  # a mesh may have thousands of devices, and most leaves lie alike
def _place(sharding: Any) -> str:
    processes = {device.process_index for device in sharding.device_set}
    if processes == {jax.process_index()}:  # no numbers of devices, as each process has its own
        return f"on {len(sharding.device_set)} of this process's devices"
    if len(processes) < jax.process_count():
        return f"on devices of {numbered(tuple(sorted(processes)))} of {jax.process_count()}"
    if not isinstance(sharding, NamedSharding):
        return f"{type(sharding).__name__} over {len(sharding.device_set)} devices"
    devices = np.array([device.id for device in sharding.mesh.devices.flat])
    axes = ", ".join(f"{name}={size} {kind}" for (name, size), kind in zip(
        sharding.mesh.shape.items(), sharding.mesh.axis_types, strict=True))  # fmt: skip
    return f"{sharding.spec} over {axes}, devices {zlib.crc32(devices.tobytes()):08x}"
