"""Hooks described in a config: a `ConfigDict` whose every field the shell can override, and `build`, which reads it.

Everything that is wrong with a config is one `ConfigError` that lists all problems, each with its config path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from flax_surgery_hooks.config_fields import MISMATCH, Field, fields_of, is_mapping, is_surgery_config
from flax_surgery_hooks.config_hook import HookFields, HookSpec, check_choices, check_selection, rollback
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
from flax_surgery_hooks.config_registry import find_class
from flax_surgery_hooks.config_registry import register_surgery as register_surgery
from flax_surgery_hooks.config_schedule import schedule
from flax_surgery_hooks.config_writing import written
from flax_surgery_hooks.errors import quoted, shorten
from flax_surgery_hooks.reading import as_edit


def hook(surgery_name: str, /, **fields: Any) -> ConfigDict:
    """The config of one hook: every field of the hook and of its surgery is there, typed, for the shell to override.

    The fields of hooks are those of `config_hook.HookFields`; docs/config.md lists them all. None stands for "not set".
    Copy the result with `copy.deepcopy`: `ConfigDict(other)` shares references.

    Args:
      surgery_name: a built-in surgery in snake case (`"clip_norm"`) or a name given to `register_surgery`.
      **fields: values for fields of the hook and of the surgery; a `FieldReference` stays one.

    Raises:
      ConfigError: an unknown surgery or field, or a value of the wrong type; all of them at once.

    >>> config = ConfigDict({"surgery": {"head": hook("normalize", params="Dense_1/kernel", every=200)}})
    >>> config.surgery.head.to, config.surgery.head.get_type("expect")
    (1.0, <class 'int'>)
    """
    report = Report(f"hook({quoted(surgery_name, 80)})")
    if "surgery" in fields:
        report.at("surgery").add("the first argument already names the surgery")
    config = written({**fields, "surgery": surgery_name}, fields_of(HookFields), report)
    report.raise_if_any(f"the arguments of {report.path}")
    return config


def surgery(surgery_name: str, /, **fields: Any) -> ConfigDict:
    """The config of a surgery that stands in a field of another surgery; like `hook`, without the fields of hooks.

    Args:
      surgery_name: as for `hook`.
      **fields: values for fields of the surgery; a `FieldReference` stays one.

    Raises:
      ConfigError: an unknown surgery or field, or a value of the wrong type; all of them at once.

    >>> surgery("scale", factor=2).to_dict()
    {'factor': 2.0, 'surgery': 'scale'}
    """
    report = Report(f"surgery({quoted(surgery_name, 80)})")
    if "surgery" in fields:
        report.at("surgery").add("the first argument already names the surgery")
    config = written({**fields, "surgery": surgery_name}, {"surgery": fields_of(HookFields)["surgery"]}, report)
    report.raise_if_any(f"the arguments of {report.path}")
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
    specs = [_spec(name, hooks[name], given_objects, report.at(name)) for name in sorted(hooks, key=shorten)]
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
    cls = find_class(given.get("surgery"), report)
    hook_fields, fields = fields_of(HookFields), fields_of(cls) if cls is not None else {}
    if cls is not None:
        check_keys(given, hook_fields | fields, report)
    values = typed(given, hook_fields | fields, report)
    settings = {key: field.or_default(values.get(key)) for key, field in hook_fields.items()}
    check_choices(settings, report)
    check_selection(settings, report)
    when = schedule(settings, report)
    settings["rollback"] = rollback(settings, report)
    made = _instance(cls, values, objects, report)
    if when is None or made is None or not settings["enabled"]:
        return None
    kept = {field.name for field in dataclasses.fields(HookSpec)} & settings.keys() - {"surgery"}
    return HookSpec(name=name, surgery=made, when=when, **{key: settings[key] for key in kept})


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
        made = cls(**{key: value for key, value in arguments.items() if value is not dataclasses.MISSING})
        as_edit(made)
    except Exception as error:  # the user's own __post_init__ may raise anything, and the other problems matter too
        report.add(f"{cls.__name__}: {told(error)}", error)
        return None
    return made


def _argument(field: Field, values: Mapping[str, Any], objects: _Objects, report: Report) -> Any:
    """The value of a surgery's field, `MISSING` where its default applies, `MISMATCH` where it is wrong or missing."""
    key, value = field.name, values.get(field.name)
    if value is None or value is MISMATCH:
        objects.takers.add(key)
    if value is not None:
        return _filled(field, value, objects, report) if field.nested and value is not MISMATCH else value
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


def _filled(field: Field, value: Any, objects: _Objects, report: Report) -> Any:
    """The value of a field with the surgeries in it made, `MISMATCH` where one is wrong."""
    count = len(report.problems)
    made = _made(value, objects, report.at(field.name))
    if len(report.problems) > count:
        return MISMATCH
    converted = field.convert(made)
    if converted is MISMATCH:
        report.at(field.name).add(f"wants {field.wanted}, found {shown(made)}")
    return converted


def _made(value: Any, objects: _Objects, report: Report) -> Any:
    """`value` with each config of a surgery in it replaced by the surgery."""
    if is_surgery_config(value):
        cls = find_class(value["surgery"], report)
        fields = fields_of(cls) if cls is not None else {}
        known = {"surgery": fields_of(HookFields)["surgery"], **fields}
        if cls is not None:
            check_keys(value, known, report)
        return _instance(cls, typed(value, known, report), objects, report)
    if isinstance(value, tuple):
        return tuple(_made(item, objects, report.at(i)) for i, item in enumerate(value))
    if is_mapping(value):
        return {key: _made(item, objects, report.at(key)) for key, item in value.items()}
    return value
