"""From hooks back to a config: what `SurgeryHooks.from_config` would read as the same hooks, or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from flax_surgery_hooks.config import build, hook
from flax_surgery_hooks.config_fields import MISMATCH, fields_of
from flax_surgery_hooks.config_hook import HookSpec
from flax_surgery_hooks.config_reading import Report, shown
from flax_surgery_hooks.config_registry import name_of
from flax_surgery_hooks.count_schedules import OnCount
from flax_surgery_hooks.guards import Bounds, told
from flax_surgery_hooks.making import make_operation
from flax_surgery_hooks.metric_schedules import OnMetric
from flax_surgery_hooks.rollback import Rollback
from flax_surgery_hooks.rules import SlotRules, slot_rules
from flax_surgery_hooks.schedules import AnyOf, At, Every, Schedule
from flax_surgery_hooks.selection import Glob, Regex
from flax_surgery_hooks.surgery import Edit


def to_config(hooks: Iterable[Any], objects: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config from which `build` makes these hooks again; it does so once, to be sure.

    Args:
      hooks: registered hooks (`hooks.Hook`), in the order in which they fire.
      objects: what `from_config` will be given as `objects`; values of fields that a config cannot hold.

    Raises:
      ConfigError: something about a hook cannot stand in a config: a surgery that is a plain function or of a class
        that is not registered, a field that is not in `objects`, a predicate, a slot function, a schedule of several
        `every`, or an order that priorities and names do not tell. All such things at once.
    """
    hooks, report, config = list(hooks), Report("hooks"), ConfigDict()
    for one in hooks:
        if hasattr(ConfigDict, one.name):
            report.at(one.name).add("is the name of a method of ConfigDict; rename the hook")
            continue
        if (entry := _entry(one, report.at(one.name))) is not None:
            config[one.name] = entry
    report.raise_if_any("what a config would hold of these hooks")
    for one, spec in zip(sorted(hooks, key=lambda one: one.name), build(config, objects, prefix="hooks"), strict=True):
        _compare(one, spec, report.at(one.name))
    names = [one.name for one in hooks]
    in_order = [one.name for one in sorted(hooks, key=lambda one: (-one.priority, one.name))]
    if names != in_order:
        report.add(f"fire as {', '.join(names)}, and from a config as {', '.join(in_order)}; give them priorities")
    report.raise_if_any("what a config would hold of these hooks")
    return config


def _entry(one: Any, report: Report) -> ConfigDict | None:
    """The config of one hook, or None if something cannot be told."""
    count = len(report.problems)
    operation, surgery = one.operation, one.operation.edit.function
    if name_of(type(surgery)) is None:
        found = getattr(surgery, "__qualname__", type(surgery).__qualname__)
        report.at("surgery").add(f"no config can name {found}; make it a frozen dataclass under @register_surgery")
    fields = {
        "params": _patterns(operation.selection.include, report.at("params")),
        "exclude": _patterns(operation.selection.exclude, report.at("exclude")),
        "expect": operation.selection.expect,
        "opt_state": _rules(operation.rules, operation.edit, report.at("opt_state")),
        **_times(one.when, report.at("when")),
        "fresh": operation.fresh,
        "guard": _guard(operation.guard, report.at("guard")),
        **_rollback(one.rollback),
        "on_error": one.on_error,
        "figures": operation.figures,
        "histograms": operation.histograms,
        "fields": operation.fields,
        "priority": one.priority,
    }
    for key, value in _extras(one).items():
        if value is not None:
            report.at(key).add("no config can hold it")
    if len(report.problems) > count:
        return None
    told = _told(surgery)
    config = hook(told["surgery"], **fields, **{key: value for key, value in told.items() if key != "surgery"})
    _leave_out(config, surgery, told)
    return config


def _guard(guard: Any, report: Report) -> str:
    if not isinstance(guard, str | Bounds):
        report.add('is a function, which no config can hold; write comparisons, "params/relative_change < 0.5"')
    return told(guard)


def _rollback(rollback: Rollback | None) -> dict[str, Any]:
    if rollback is None:
        return {}
    return {f"rollback_{field.name}": getattr(rollback, field.name) for field in dataclasses.fields(rollback)}


def _extras(one: Any) -> dict[str, Any]:
    """What a hook brings for the shapes after it."""
    reshape = getattr(one, "reshape", None)
    return (
        {} if reshape is None else {field.name: getattr(reshape, field.name) for field in dataclasses.fields(reshape)}
    )


def _told(surgery: Any) -> dict[str, Any]:
    """Those fields of a surgery that a config can hold."""
    told = {"surgery": name_of(type(surgery))}
    for key, field in fields_of(type(surgery)).items():
        value = _with_told(getattr(surgery, key))
        can = field.optional if value is None else field.convert(value) is not MISMATCH and not callable(value)
        if field.hints and can:
            told[key] = value
    return told


def _with_told(value: Any) -> Any:
    if name_of(type(value)) is not None:
        return _told(value)
    return tuple(map(_with_told, value)) if type(value) is tuple else value


def _leave_out(config: ConfigDict, surgery: Any, told: Mapping[str, Any]) -> None:
    """Deletes the entries, made of defaults, of fields whose values a config cannot hold: `objects` has them."""
    for key in fields_of(type(surgery)):
        if key not in told and key in config:
            del config[key]
        elif isinstance(told.get(key), dict) and name_of(type(getattr(surgery, key))) is not None:
            _leave_out(config[key], getattr(surgery, key), told[key])


def _patterns(terms: tuple[Any, ...], report: Report) -> Any:
    told = [term.describe() for term in terms if isinstance(term, Glob | Regex)]
    if len(told) < len(terms):
        report.add("holds a predicate or a selection, which no config can hold; write globs or 're:' patterns")
    return told[0] if len(told) == 1 else tuple(told) or None


def _rules(rules: SlotRules, edit: Edit, report: Report) -> Any:
    if edit.edits_state:
        return None
    by_kind = dict(rules.by_kind)
    if not all(isinstance(rule, str) for rule in (rules.default, *by_kind.values())):
        report.add("is a function, which no config can hold; write the name of a rule")
    return by_kind or (None if rules == slot_rules(None, edit.preserves) else rules.default)


_SHARED = ("count_of", "count_lag")


def _times(when: Schedule, report: Report) -> dict[str, Any]:
    parts = when.parts if isinstance(when, AnyOf) else (when,)
    told: dict[str, Any] = {}
    for part in parts:
        one = _time(part)
        clashes = [key for key in one if key in told and (key not in _SHARED or one[key] != told[key])]
        if not one or clashes:
            report.add(
                f"a config holds one each of `at`, `every`, `on_metric`, `at_count` and `every_count`, not {when!r}; "
                "split the hook"
            )
            return {}
        told |= one
    return told


def _time(part: Schedule) -> dict[str, Any]:
    """What a config says of a schedule that is no union; nothing of one that it cannot hold."""
    if type(part) is At:
        return {"at": part.steps}
    if type(part) is Every:
        return {"every": part.n, "start": part.start, "stop": part.stop}
    if type(part) is OnMetric:
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        name, fields["max_fires"] = fields.pop("name"), fields.pop("fires")
        return {"on_metric": name, **{f"metric_{key}": value for key, value in fields.items()}}
    if type(part) is OnCount:
        of = {"count_of": part.of, "count_lag": part.lag}
        if isinstance(part.counts, At):
            return {"at_count": part.counts.steps, **of}
        return {"every_count": part.counts.n, "count_start": part.counts.start, "count_stop": part.counts.stop, **of}
    return {}


def _compare(one: Any, spec: HookSpec, report: Report) -> None:
    """Reports where the hook that comes back is another one."""
    _compare_surgeries(one.operation.edit.function, spec.surgery, report)
    of_hook = ("when", "priority", "rollback", "on_error")
    given = {key: value for key, value in vars(spec).items() if key not in ("name", "surgery", *of_hook)}
    operation = dataclasses.replace(make_operation(spec.surgery, **given), edit=one.operation.edit)
    for key, value in {**{key: getattr(spec, key) for key in of_hook}, "operation": operation}.items():
        if value != getattr(one, key):
            report.at(key).add(f"would come back as {shown(value)}, is {shown(getattr(one, key))}")


def _compare_surgeries(old: Any, new: Any, report: Report) -> None:
    for key in fields_of(type(old)):
        before, after = getattr(old, key), getattr(new, key)
        if name_of(type(before)) is not None and type(before) is type(after):
            _compare_surgeries(before, after, report.at(key))
        elif not _same(before, after):
            text = f"would come back as {shown(after)}, is {shown(before)}"
            report.at(key).add(f"{text}; pass objects={{{key!r}: ...}}, here and to from_config")


def _same(before: Any, after: Any) -> bool:
    try:
        return before is after or bool(before == after)
    except Exception:  # arrays, and whatever else does not compare
        return False
