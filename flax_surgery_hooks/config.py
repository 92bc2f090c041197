"""Hooks described in a config: a `ConfigDict` whose every field the shell can override, and `build`, which reads it.

Everything that is wrong with a config is one `ConfigError` that lists all problems, each with its config path.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference

from flax_surgery_hooks.config_fields import MISMATCH, Field, fields_of, is_mapping
from flax_surgery_hooks.config_reading import (
    Report,
    check_keys,
    dereferenced,
    did_you_mean,
    read,
    resolved,
    shown,
    told,
    typed,
)
from flax_surgery_hooks.errors import ConfigError, shorten
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.rules import FRESH, GUARDS, check_choice, slot_rules
from flax_surgery_hooks.schedules import Schedule, at, every
from flax_surgery_hooks.selection import select
from flax_surgery_hooks.surgery import as_edit

SurgeryClass = TypeVar("SurgeryClass", bound=type)

_registered: dict[str, type] = {}


@dataclasses.dataclass(frozen=True)
class HookSpec:
    """One hook as a config describes it, checked: what `SurgeryHooks.add` takes.

    Attributes:
      name: the hook's key in the config.
      surgery: an instance of the registered class.
      params: glob or globs of the leaves to edit.
      exclude: glob or globs of the leaves to leave out, or None.
      expect: how many leaves must be selected, or None for any number.
      when: the due steps.
      opt_state: the rule of the slots, a dict of rules by kind, or None for the surgery's default.
      fresh: what second moments of fresh elements start from.
      guard: whether a fire that brings in non-finite values is refused.
      priority: the order among hooks due at one step.
    """

    name: str
    surgery: Any
    params: str | tuple[str, ...]
    exclude: str | tuple[str, ...] | None
    expect: int | None
    when: Schedule
    opt_state: str | dict[str, str] | None
    fresh: str
    guard: str
    priority: int


@dataclasses.dataclass(frozen=True)
class _HookFields:
    """The fields of every hook in a config, beside those of its surgery; read like those, by their annotations."""

    surgery: str
    params: str | tuple[str, ...]
    exclude: str | tuple[str, ...] | None = None
    expect: int | None = None
    at: tuple[int, ...] = ()
    every: int | None = None
    start: int = 0
    stop: int | None = None
    max_fires: int | None = None
    opt_state: str | dict[str, str] | None = None
    fresh: str = "mean"
    guard: str = "finite"
    priority: int = 0
    enabled: bool = True


def register_surgery(name: str) -> Callable[[SurgeryClass], SurgeryClass]:
    """Class decorator: makes a surgery class of yours known to configs under `name`.

    A field of the class is settable in a config by its annotation: `bool`, `int`, `float`, `str`, `Literal`, tuples and
    dicts of these, and unions. Fields of other types are given to `build` as `objects`. To define the same class again,
    as a notebook does, replaces it.

    Args:
      name: what `hook(name)` and `config.surgery.<hook>.surgery` will say.

    Raises:
      ConfigError: the name is taken or not a string, the class is not a frozen dataclass, its annotations cannot be
        resolved, or a field has the name of a hook's field or of a method of `ConfigDict`.

    >>> @register_surgery("shift")
    ... @dataclasses.dataclass(frozen=True)
    ... class Shift:
    ...     by: float = 1.0
    ...     def __call__(self, leaf): return leaf + self.by
    >>> hook("shift", by=3).by
    3.0
    """
    if not isinstance(name, str) or not name:
        raise ConfigError("A surgery is registered under a name.", found=repr(name), write='@register_surgery("name")')

    def register(cls: SurgeryClass) -> SurgeryClass:
        _check_class(name, cls)
        _check_name(name, cls)
        _registered[name] = cls
        return cls

    return register


def hook(surgery_name: str, /, **fields: Any) -> ConfigDict:
    """The config of one hook: every field of the hook and of its surgery is there, typed, for the shell to override.

    Hook fields: `params` and `exclude` (a pattern or a tuple of them), `expect`, `at` (a tuple of steps), `every`,
    `start`, `stop`, `max_fires`, `opt_state` (a rule, or a dict from kind to rule), `fresh`, `guard`, `priority` and
    `enabled`. None stands for "not set". Copy the result with `copy.deepcopy`: `ConfigDict(other)` shares references.

    Args:
      surgery_name: a built-in surgery in snake case (`"clip_norm"`) or a name given to `register_surgery`.
      **fields: values for fields of the hook and of the surgery; a `FieldReference` stays one.

    Raises:
      ConfigError: an unknown surgery or field, or a value of the wrong type; all of them at once.

    >>> config = ConfigDict({"surgery": {"head": hook("normalize", params="Dense_1/kernel", every=200)}})
    >>> config.surgery.head.to, config.surgery.head.get_type("expect")
    (1.0, <class 'int'>)
    """
    report = Report(f"hook({surgery_name!r})")
    cls = _find_class(surgery_name, report)
    known = fields_of(_HookFields) | (fields_of(cls) if cls is not None else {})
    given = {"surgery": surgery_name, **fields}
    if "surgery" in fields:
        report.at("surgery").add("the first argument already names the surgery")
    if cls is not None:
        check_keys(given, known, report)
    # An empty reference may be a required one, which cannot be read before it is filled.
    filled = {key: value for key, value in given.items() if not _is_empty(value)}
    values = typed(read(filled, resolved, report), known, report)
    _check_choices(values, report)
    for key in [key for key in given if key in known and key not in filled]:
        _check_empty_reference(known[key], given[key], report.at(key))
    report.raise_if_any(f"the arguments of {report.path}")

    config = ConfigDict()
    for key, field in known.items():
        if field.hints:
            is_given = given.get(key) is not None or (field.optional and key in given)
            value = values.get(key) if is_given else field.convert(field.or_default(None))
            config[key] = _entry(field, given.get(key), value)
    return config


def build(config: Any, objects: Mapping[str, Any] | None = None, *, prefix: str = "surgery") -> list[HookSpec]:
    """Reads all hooks of a config.

    Args:
      config: a `ConfigDict` or mapping from the hook's name to its config, as `hook` makes it or a plain dict.
      objects: values for surgery fields that a config leaves unset or cannot hold, such as `{"init": fn}`; each goes
        to every surgery with an unset field of that name.
      prefix: where `config` stands in the whole config, for error messages.

    Returns:
      The enabled hooks in the order of their names, whatever order the config has: a `ConfigDict`, its JSON and a
      plain dict would each give another. Disabled ones are checked like them, and left out.

    Raises:
      ConfigError: anything is wrong; its `problems` name everything that is.

    >>> [spec] = build({"head": {"surgery": "normalize", "params": "Dense_1/kernel", "at": (10,), "every": 200}})
    >>> spec.when, spec.fresh
    (at(10) | every(200), 'mean')
    """
    report, given_objects = Report(prefix), _Objects(dict(objects or {}))
    if not is_mapping(config):
        report.add(f"must map names of hooks to their configs, found {shown(config)}")
        report.raise_if_any("the config")
    hooks = read(config, dereferenced, report)
    specs = [_spec(name, hooks[name], given_objects, report.at(name)) for name in sorted(hooks, key=str)]
    given_objects.report_unused(report)
    report.raise_if_any("the config")
    return [spec for spec in specs if spec is not None]


# --- What stands in one hook's config.


@dataclasses.dataclass
class _Objects:
    """What `build` was given beside the config, and the names of the surgery fields that could take something of it."""

    values: dict[str, Any]
    takers: set[str] = dataclasses.field(default_factory=set)

    def report_unused(self, report: Report) -> None:
        for key in [key for key in self.values if key not in self.takers]:
            hint = did_you_mean(key, self.takers)
            self.report(report, key).add(f"no surgery has an unset field of this name{hint}")

    @staticmethod
    def report(report: Report, key: str) -> Report:
        return dataclasses.replace(report, path=f"objects.{key}")


def _spec(name: Any, config: Any, objects: _Objects, report: Report) -> HookSpec | None:
    """One hook, or None if it is disabled or wrong."""
    if config is MISMATCH:
        return None
    if not isinstance(name, str):
        report.add(f"the name of a hook must be a string, found {shown(name)}")
        return None
    if not is_mapping(config):
        report.add(f"must be the config of a hook, such as hook('scale', ...), found {shown(config)}")
        return None
    given = read(config, resolved, report)
    cls = _find_class(given.get("surgery"), report)
    hook_fields, fields = fields_of(_HookFields), fields_of(cls) if cls is not None else {}
    if cls is not None:
        check_keys(given, hook_fields | fields, report)
    values = typed(given, hook_fields | fields, report)
    settings = {key: field.or_default(values.get(key)) for key, field in hook_fields.items()}
    _check_choices(settings, report)
    _check_selection(settings, report)
    when = _schedule(settings, report)
    surgery = _instance(cls, values, objects, report)
    if when is None or surgery is None or not settings["enabled"]:
        return None
    kept = {field.name for field in dataclasses.fields(HookSpec)} & settings.keys() - {"surgery"}
    return HookSpec(name=name, surgery=surgery, when=when, **{key: settings[key] for key in kept})


def _check_choices(values: Mapping[str, Any], report: Report) -> None:
    rules = values.get("opt_state")
    if isinstance(rules, dict):
        for kind, rule in rules.items():
            report.at("opt_state").at(kind).attempt(slot_rules, {kind: rule}, "nothing")
    elif isinstance(rules, str):
        report.at("opt_state").attempt(slot_rules, rules, "nothing")
    for key, choices in (("fresh", FRESH), ("guard", GUARDS)):
        if isinstance(values.get(key), str):
            report.at(key).attempt(check_choice, values[key], choices, f"value of `{key}`")


def _check_selection(settings: Mapping[str, Any], report: Report) -> None:
    params, exclude = settings["params"], settings["exclude"]
    if params is None:
        report.at("params").add("no parameters are named; write for example '**/kernel', or '**' for all")
    elif params is not MISMATCH:
        report.at("params").attempt(select, params)
    if exclude is not None and exclude is not MISMATCH:
        report.at("exclude").attempt(select, "**", exclude)
    if isinstance(settings["expect"], int):
        report.at("expect").attempt(select, "**", None, settings["expect"])


def _schedule(settings: Mapping[str, Any], report: Report) -> Schedule | None:
    steps, n, start, stop, count = (settings[key] for key in ("at", "every", "start", "stop", "max_fires"))
    if MISMATCH in (steps, n, start, stop, count):
        return None
    if not steps and n is None:
        report.add("neither `at` nor `every` says when it is due; write at=(1000,) or every=1000")
    elif n is None:
        for key, bound in {"start": start or None, "stop": stop}.items():
            if bound is not None:
                report.at(key).add(f"bounds `every`, which is not set; found {bound}")
    parts = [report.at("at").attempt(at, *steps)] if steps else []
    if n is not None:
        parts.append(report.at("every").attempt(every, n, start, stop))
    # Where the schedule is wrong, any other one serves to check `max_fires` all the same.
    made = [part for part in parts if part is not None] or [every(1)]
    when = functools.reduce(operator.or_, made)
    if count is not None:
        when = report.at("max_fires").attempt(when.max_fires, count)
    return when if None not in parts else None


def _instance(cls: type | None, values: Mapping[str, Any], objects: _Objects, report: Report) -> Any:
    """The surgery, or None if a field is missing or wrong, or the class refuses its fields."""
    if cls is None:
        objects.takers |= objects.values.keys()  # the surgery that was meant might take any of them
        return None
    fields = fields_of(cls)
    arguments = {key: _argument(field, values, objects, report) for key, field in fields.items()}
    if any(value is MISMATCH for value in arguments.values()):
        return None
    try:
        surgery = cls(**{key: value for key, value in arguments.items() if value is not dataclasses.MISSING})
        as_edit(surgery)
    except Exception as error:  # the user's own __post_init__ may raise anything, and the other problems matter too
        report.add(f"{cls.__name__}: {told(error)}", error)
        return None
    return surgery


def _argument(field: Field, values: Mapping[str, Any], objects: _Objects, report: Report) -> Any:
    """The value of a surgery's field, `MISSING` where its default applies, `MISMATCH` where it is wrong or missing."""
    key, value = field.name, values.get(field.name)
    if value is None or value is MISMATCH:
        objects.takers.add(key)
    if value is not None:
        return value
    if key in objects.values:
        item = objects.values[key]
        converted = item if field.open else field.convert(item)
        if converted is MISMATCH:
            objects.report(report, key).add(f"wants {field.wanted}, for {report.path}; found {shown(item)}")
        return converted
    if field.optional and key in values:
        return None
    if field.default is not dataclasses.MISSING:
        return dataclasses.MISSING
    report.at(key).add(f"no value; {field.advice}")
    return MISMATCH


def _find_class(name: Any, report: Report) -> type | None:
    known = _builtins() | _registered
    if isinstance(name, str) and name in known:
        return known[name]
    if name is not MISMATCH:
        what = (
            "no surgery is named"
            if name is None
            else f"unknown surgery {shorten(repr(name), 80)}{did_you_mean(name, known)}"
        )
        report.at("surgery").add(f"{what}; known are {listed(sorted(known), limit=60)}")
    return None


@functools.cache
def _builtins() -> dict[str, type]:
    """The catalogue by snake-case names; imported late, for it is much to import and nothing here depends on it."""
    catalogue = importlib.import_module("flax_surgery_hooks.surgeries")
    classes = {name: getattr(catalogue, name) for name in catalogue.__all__}
    return {
        _snake_case(name): cls
        for name, cls in classes.items()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
    }


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _check_name(name: str, cls: type) -> None:
    taken = (_builtins() | _registered).get(name)
    # A notebook cell that is run again, or a reloaded module, defines the same class anew.
    if taken is None or (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__):
        return
    raise ConfigError(
        f"The surgery name {name!r} is taken.", found=f"{taken.__module__}.{taken.__qualname__}", write="another name"
    )


def _check_class(name: str, cls: type) -> None:
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
    clashes = [key for key in fields if key in fields_of(_HookFields)]
    # The shell's parser reads `config.values` and gets the method.
    clashes += [key for key, field in fields.items() if field.hints and hasattr(ConfigDict, key)]
    if clashes:
        raise ConfigError(
            f"{what} has fields with names that hooks or ConfigDict already use.",
            found=listed(clashes),
            write="other names for these fields",
        )


# --- Writing ConfigDicts.


def _entry(field: Field, given: Any, value: Any) -> Any:
    """What a `ConfigDict` holds for a field: a value whose type the shell's parser can tell, else a typed reference."""
    if isinstance(given, FieldReference):
        # A reference to an int would refuse a float from the shell.
        return given.to_float() if field.stored is float and given.get_type() is int else given
    if isinstance(given, tuple | list) and any(isinstance(item, FieldReference) for item in given):
        return tuple(given)
    value = given if is_mapping(given) else value  # it may hold references
    value = None if value is MISMATCH else value  # a default such as a function, which no config can hold
    return value if type(value) is field.stored else FieldReference(value, field_type=field.stored)


def _is_empty(value: Any) -> bool:
    return isinstance(value, FieldReference) and value.empty()


def _check_empty_reference(field: Field, given: FieldReference, report: Report) -> None:
    allowed = (field.stored, int) if field.stored is float else (field.stored,)
    if field.stored is not object and given.get_type() not in allowed:
        report.add(f"wants {field.wanted}, found an empty reference of type {given.get_type().__name__}")
