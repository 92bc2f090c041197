"""Writing configs: the typed entries of `hook`, of given values and of defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from flax_surgery_hooks.config_fields import MISMATCH, Field, fields_of, is_mapping, is_surgery_config
from flax_surgery_hooks.config_hook import HookFields, check_choices
from flax_surgery_hooks.config_reading import Report, check_keys, read, resolved, typed
from flax_surgery_hooks.config_registry import find_class, name_of


def written(given: Mapping[str, Any], own: Mapping[str, Field], report: Report) -> ConfigDict:
    """A config with an entry for every settable field, checked; what is wrong is reported.

    Args:
      given: values by key, the name of the surgery under "surgery".
      own: the keys beside the fields of the surgery.
      report: takes the problems.
    """
    cls = find_class(given["surgery"], report)
    known = {**own, **(fields_of(cls) if cls is not None else {})}
    if cls is not None:
        check_keys(given, known, report)
    # An empty reference may be a required one, which cannot be read before it is filled; a surgery may hold such.
    nested = {key for key, value in given.items() if key in known and known[key].nested and is_surgery_config(value)}
    filled = {key: value for key, value in given.items() if key not in nested and not _is_empty(value)}
    values = typed(read(filled, resolved, report), known, report)
    check_choices(values, report)
    for key in [key for key in given if key in known and key not in filled and key not in nested]:
        _check_empty_reference(known[key], given[key], report.at(key))

    config = ConfigDict()
    for key, field in known.items():
        if key in nested:
            config[key] = _surgery_entry(given[key], report.at(key))
        elif field.hints:
            is_given = given.get(key) is not None or (field.optional and key in given)
            value = values.get(key) if is_given else field.convert(field.or_default(None))
            # What was reported is not written: a `ConfigDict` may refuse it.
            written_as = None if value is MISMATCH and is_given else given.get(key)
            config[key] = _entry(field, written_as, value, report.at(key))
    return config


def _surgery_entry(given: Any, report: Report) -> ConfigDict:
    """The config of a surgery in a field of another, completed; references in it stay."""
    items = given.items(preserve_field_references=True) if isinstance(given, ConfigDict) else given.items()
    return written(dict(items), {"surgery": fields_of(HookFields)["surgery"]}, report)


def _entry(field: Field, given: Any, value: Any, report: Report) -> Any:
    """What a `ConfigDict` holds for a field: a value whose type the shell's parser can tell, else a typed reference."""
    if isinstance(given, FieldReference):
        # A reference to an int would refuse a float from the shell.
        return given.to_float() if field.stored is float and given.get_type() is int else given
    if isinstance(given, tuple | list) and any(map(_holds_reference, given)):
        return tuple(given)
    value = given if is_mapping(given) else value  # it may hold references
    value = None if value is MISMATCH else value  # a default such as a function, which no config can hold
    value = plain(value) if field.nested else value
    if is_surgery_config(value):
        within = Report(report.path)
        entry = _surgery_entry(value, within)
        if given is not None:
            report.problems.extend(within.problems)
        # A default surgery that no config can hold stays one that the class fills in.
        return FieldReference(None, field_type=object) if within.problems else entry
    if callable(value):
        report.add(field.advice)
        return None
    return value if type(value) is field.stored else FieldReference(value, field_type=field.stored)


def plain(value: Any) -> Any:
    """`value` with each surgery in it, if configs know its class, as the dict that they hold of it."""
    name = name_of(type(value))
    if name is not None:
        return {"surgery": name, **{key: plain(getattr(value, key)) for key in fields_of(type(value))}}
    return tuple(map(plain, value)) if type(value) is tuple else value


def _holds_reference(value: Any) -> bool:
    if isinstance(value, ConfigDict):
        value = dict(value.items(preserve_field_references=True))
    inside = value.values() if is_mapping(value) else value if isinstance(value, tuple | list) else ()
    return isinstance(value, FieldReference) or any(map(_holds_reference, inside))


def _is_empty(value: Any) -> bool:
    return isinstance(value, FieldReference) and value.empty()


def _check_empty_reference(field: Field, given: FieldReference, report: Report) -> None:
    allowed = (field.stored, int) if field.stored is float else (field.stored,)
    if field.stored is not object and given.get_type() not in allowed:
        report.add(f"wants {field.wanted}, found an empty reference of type {given.get_type().__name__}")
