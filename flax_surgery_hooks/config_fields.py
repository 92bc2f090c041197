"""Fields of a dataclass that a config may hold: which ones, of which type, and how a value becomes one of theirs."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import numpy as np
from ml_collections import ConfigDict

from flax_surgery_hooks.surgery import Surgery

MISMATCH: Any = object()
"""Stands for a value that cannot become what its field holds; None cannot, for it means "not set"."""

_SCALARS: tuple[Any, ...] = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a hook or surgery.

    Attributes:
      name: its name.
      hints: the alternatives of its annotation that a config can hold, None apart; without any it is left out.
      optional: whether None is one of its values.
      open: whether it also takes what no config can hold.
      default: its default, or `dataclasses.MISSING`.
    """

    name: str
    hints: tuple[Any, ...]
    optional: bool
    open: bool
    default: Any

    @property
    def nested(self) -> bool:
        """Whether another surgery can stand here."""
        return any(_holds_surgery(hint) for hint in self.hints)

    @property
    def stored(self) -> type:
        """The type of its entry in a `ConfigDict`; `object` (any Python literal) where several can stand there."""
        kinds = {kind for hint in self.hints for kind in _stored_as(hint)}
        return kinds.pop() if len(kinds) == 1 else object

    @property
    def wanted(self) -> str:
        """What a config may hold here, in words."""
        return " or ".join(_hint_name(hint) for hint in self.hints)

    @property
    def advice(self) -> str:
        """How to give it a value."""
        by_object = f"pass objects={{{self.name!r}: ...}}"
        return f"set it to {self.wanted}, or {by_object}" if self.hints else f"it cannot stand in a config: {by_object}"

    def convert(self, value: Any) -> Any:
        """`value` as this field holds it, None for None, or `MISMATCH`."""
        return None if value is None else _as_any(value, self.hints)

    def or_default(self, value: Any) -> Any:
        """`value`, or where it is None the default if there is one."""
        return value if value is not None or self.default is dataclasses.MISSING else self.default


def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a dataclass by name, those that its `__init__` takes.

    Raises:
      NameError: an annotation names something that its module does not import.

    >>> @dataclasses.dataclass
    ... class Clip:
    ...     norm: float
    ...     axis: int | tuple[int, ...] | None = None
    >>> [(field.name, field.stored.__name__, field.optional) for field in fields_of(Clip).values()]
    [('norm', 'float', False), ('axis', 'object', True)]
    """
    hints = typing.get_type_hints(cls)
    return {field.name: _field(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _field(field: dataclasses.Field, hint: Any) -> Field:
    alternatives = typing.get_args(hint) if _is_union(hint) else (hint,)
    present = [alternative for alternative in alternatives if alternative is not types.NoneType]
    settable = tuple(filter(_is_settable, present))
    factory = field.default_factory
    default = factory() if callable(factory) else field.default
    return Field(field.name, settable, len(present) < len(alternatives), len(settable) < len(present), default)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _is_surgery(hint: Any) -> bool:
    """Whether an annotation means a surgery: `Surgery`, or a dataclass that can be called."""
    if not inspect.isclass(hint) or typing.get_args(hint):
        return False
    return hint is Surgery or (
        dataclasses.is_dataclass(hint) and any("__call__" in vars(base) for base in hint.__mro__)
    )


def _holds_surgery(hint: Any) -> bool:
    return _is_surgery(hint) or any(_holds_surgery(argument) for argument in typing.get_args(hint))


def _is_settable(hint: Any) -> bool:
    """Whether values of this annotation can stand in a config."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return all(type(choice) in _SCALARS for choice in arguments)
    if origin in (tuple, dict) or _is_union(hint):
        return all(_is_settable(argument) for argument in arguments if argument is not Ellipsis)
    return _is_surgery(hint) or any(hint is known for known in (*_SCALARS, tuple, dict, types.NoneType))


def _stored_as(hint: Any) -> set[type]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {type(choice) for choice in arguments}
    kind = origin or hint
    # The flag parser knows no dict, and reads one as a literal.
    return {object if kind is dict or _is_surgery(kind) else kind}


def _as_any(value: Any, hints: tuple[Any, ...]) -> Any:
    # Floats last: an int is one of both, and stays an int where it can.
    ordered = sorted(hints, key=lambda hint: hint is float)
    return next((new for hint in ordered if (new := _as(value, hint)) is not MISMATCH), MISMATCH)


def _as(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it, or `MISMATCH`; numpy's numbers become Python's, and an int serves as a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return _as_any(value, arguments)
    if origin is Literal:
        matches = any(type(choice) is type(value) and choice == value for choice in arguments)
        return value if matches else MISMATCH
    kind = origin or hint
    if _is_surgery(kind):
        fits = is_surgery_config(value) or (callable(value) if kind is Surgery else isinstance(value, kind))
        return value if fits else MISMATCH
    if kind is tuple and isinstance(value, tuple | list):
        return _as_tuple(value, arguments)
    if kind is dict and is_mapping(value):
        return _as_dict(value, arguments)
    is_bool = isinstance(value, bool | np.bool_)
    if kind is int and isinstance(value, numbers.Integral) and not is_bool:
        return int(value)
    if kind is float and isinstance(value, numbers.Real) and not is_bool:
        return _as_float(value)
    if kind is bool and is_bool:
        return bool(value)
    fits = (kind is str and isinstance(value, str)) or (kind is types.NoneType and value is None)
    return value if fits else MISMATCH


def _as_float(value: numbers.Real) -> Any:
    try:
        return float(value)
    except OverflowError:  # an int beyond 1.8e308
        return MISMATCH


def _as_tuple(value: tuple | list, hints: tuple[Any, ...]) -> Any:
    if not hints:
        return tuple(value)
    hints = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
    if len(hints) != len(value):
        return MISMATCH
    items = tuple(_as(item, hint) for item, hint in zip(value, hints, strict=True))
    return MISMATCH if any(item is MISMATCH for item in items) else items


def _as_dict(value: Mapping[Any, Any], hints: tuple[Any, ...]) -> Any:
    if not hints:
        return dict(value.items())
    items = {_as(key, hints[0]): _as(item, hints[1]) for key, item in value.items()}
    return MISMATCH if any(part is MISMATCH for pair in items.items() for part in pair) else items


def _hint_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if _is_surgery(hint):
        return "a surgery" if hint is Surgery else f"the surgery {hint.__name__}"
    is_plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if is_plain else str(hint).replace(f"{Surgery.__module__}.", "")


def is_mapping(value: Any) -> bool:
    """Whether `value` is a mapping or a `ConfigDict`, which is none by itself."""
    return isinstance(value, Mapping | ConfigDict)


def is_surgery_config(value: Any) -> bool:
    """Whether `value` is the config of a surgery that stands in a field of another."""
    return is_mapping(value) and "surgery" in value
