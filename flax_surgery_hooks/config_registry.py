"""The surgeries that a config can name: the catalogue, and the classes that users register."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

from ml_collections import ConfigDict

from flax_surgery_hooks.config_fields import MISMATCH, fields_of
from flax_surgery_hooks.config_hook import HookFields
from flax_surgery_hooks.config_reading import Report, did_you_mean, told
from flax_surgery_hooks.errors import ConfigError, quoted
from flax_surgery_hooks.paths import listed

SurgeryClass = TypeVar("SurgeryClass", bound=type)

_registered: dict[str, type] = {}


def register_surgery(name: str) -> Callable[[SurgeryClass], SurgeryClass]:
    """Class decorator: makes a surgery class of yours known to configs under `name`.

    A field of the class is settable in a config by its annotation: `bool`, `int`, `float`, `str`, `Literal`, `Surgery`
    or the class of a surgery, tuples and dicts of these, and unions. Fields of other types are given to `build` as
    `objects`. To define the same class again, as a notebook does, replaces it.

    Args:
      name: what `hook(name)` and `config.surgery.<hook>.surgery` will say.

    Raises:
      ConfigError: the name is taken or not a string, the class is not a frozen dataclass, its annotations cannot be
        resolved, or a field has the name of a hook's field or of a method of `ConfigDict`.

    >>> import flax_surgery_hooks as fsh
    >>> @fsh.register_surgery("shift")
    ... @dataclasses.dataclass(frozen=True)
    ... class Shift:
    ...     by: float = 1.0
    ...     def __call__(self, leaf): return leaf + self.by
    >>> fsh.config.hook("shift", by=3).by
    3.0
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "A surgery is registered under a name.", found=quoted(name), write='@register_surgery("name")'
        )

    def register(cls: SurgeryClass) -> SurgeryClass:
        check_class(name, cls)
        _check_name(name, cls)
        _registered[name] = cls
        return cls

    return register


def find_class(name: Any, report: Report) -> type | None:
    """The class of this name, or None, which is reported."""
    known = builtins() | _registered
    if isinstance(name, str) and name in known:
        return known[name]
    if name is not MISMATCH:
        what = (
            "no surgery is named" if name is None else f"unknown surgery {quoted(name, 80)}{did_you_mean(name, known)}"
        )
        report.at("surgery").add(f"{what}; known are {listed(sorted(known), limit=60)}")
    return None


def name_of(cls: type) -> str | None:
    """The name under which configs know a class, or None."""
    return next((name for name, known in (builtins() | _registered).items() if known is cls), None)


@functools.cache
def builtins() -> dict[str, type]:
    """The catalogue by snake-case names; imported late, for it is much to import and nothing here depends on it."""
    catalogue = importlib.import_module("flax_surgery_hooks.surgeries")
    classes = {name: getattr(catalogue, name) for name in catalogue.__all__}
    return {
        snake_case(name): cls
        for name, cls in classes.items()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
    }


def snake_case(name: str) -> str:
    """A class name as configs write it; a capital at its end is no word of its own.

    >>> snake_case("ClipNorm"), snake_case("RigL")
    ('clip_norm', 'rigl')
    """
    return re.sub(r"(?<=[a-zA-Z0-9])(?=[A-Z][a-z])", "_", name).lower()


def _check_name(name: str, cls: type) -> None:
    taken = (builtins() | _registered).get(name)
    # A notebook cell that is run again, or a reloaded module, defines the same class anew.
    if taken is None or (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__):
        return
    raise ConfigError(
        f"The surgery name {name!r} is taken.", found=f"{taken.__module__}.{taken.__qualname__}", write="another name"
    )


def check_class(name: str, cls: type) -> None:
    """Raises unless configs can hold the class.

    Raises:
      ConfigError: as for `register_surgery`.
    """
    what = f"The surgery {name!r}"
    # The class's own dict: a subclass that was not decorated inherits dataclass fields but drops its own annotations.
    parameters = vars(cls).get("__dataclass_params__") if isinstance(cls, type) else None
    if parameters is None or not parameters.frozen:
        raise ConfigError(
            f"{what} must be a frozen dataclass.",
            found=getattr(cls, "__qualname__", repr(cls)),
            write=f'@register_surgery("{name}") above @dataclasses.dataclass(frozen=True) above the class',
        )
    try:
        fields = fields_of(cls)
    except Exception as error:
        raise ConfigError(
            f"{what} has annotations that cannot be resolved.",
            found=told(error),
            write="annotations whose names are imported when the module runs, not under TYPE_CHECKING",
        ) from error
    clashes = [key for key in fields if key in fields_of(HookFields)]
    # The shell's parser reads `config.values` and gets the method.
    clashes += [key for key, field in fields.items() if field.hints and hasattr(ConfigDict, key)]
    if clashes:
        raise ConfigError(
            f"{what} has fields with names that hooks or ConfigDict already use.",
            found=listed(clashes),
            write="other names for these fields",
        )
