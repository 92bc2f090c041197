"""When a hook in a config is due: what its keys say of steps, of a metric and of a counter, joined."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax_surgery_hooks.config_fields import MISMATCH, fields_of
from flax_surgery_hooks.config_hook import HookFields
from flax_surgery_hooks.config_reading import Report
from flax_surgery_hooks.count_schedules import at_count, every_count
from flax_surgery_hooks.derived_schedules import at_epochs, at_fraction, cooldown, every_epochs, every_fraction
from flax_surgery_hooks.metric_schedules import CONDITIONS, on_metric
from flax_surgery_hooks.schedules import Schedule, at, every

# The keys that name due steps, and what those told in parts of something need beside them.
_NEEDS = {
    "at": None,
    "every": None,
    "at_epochs": "steps_per_epoch",
    "every_epochs": "steps_per_epoch",
    "at_fraction": "num_steps",
    "every_fraction": "num_steps",
}
_BOUNDS = ("start", "stop", "phase")
_CONDITIONS = tuple(f"metric_{key}" for key in CONDITIONS)
_OF_METRIC = (
    *_CONDITIONS, "metric_patience", "metric_cooldown", "metric_max_fires", "metric_start", "metric_horizon",
    "metric_mode", "metric_lag",
)  # fmt: skip
_COUNTS = ("at_count", "every_count")
_OF_COUNT = ("count_of", "count_start", "count_stop", "count_lag")
_KEYS = (
    *_NEEDS, *_BOUNDS, "steps_per_epoch", "num_steps", "cooldown", "max_fires", "on_metric", *_OF_METRIC, *_COUNTS,
    *_OF_COUNT,
)  # fmt: skip
_MADE_BY: dict[str, Callable[..., Schedule]] = {
    "at": at, "at_epochs": at_epochs, "every_epochs": every_epochs, "at_fraction": at_fraction,
    "every_fraction": every_fraction,
}  # fmt: skip


def schedule(settings: Mapping[str, Any], report: Report) -> Schedule | None:
    """When the hook is due, or None if that is wrong or missing."""
    if any(settings[key] is MISMATCH for key in _KEYS):
        return None
    count = len(report.problems)
    parts = [_planned(settings, report), _by_metric(settings, report), *_by_counts(settings, report)]
    named = [part for part in parts if part is not None]
    if not named and len(report.problems) == count:
        report.add("neither `at` nor `every` says when it is due; write at=(1000,) or every=1000")
    return functools.reduce(operator.or_, named) if named and len(report.problems) == count else None


def _planned(settings: Mapping[str, Any], report: Report) -> Schedule | None:
    """What is said in steps, or None if nothing is, or wrongly."""
    named = [key for key in _NEEDS if _is_set(settings[key])]
    if not named:
        if _watches(settings):
            _check_unused((*_BOUNDS, "cooldown", "max_fires"), "is about steps, and none are named", settings, report)
        return None
    if settings["every"] is None:
        _check_unused(_BOUNDS, "bounds `every`, which is not set", settings, report)
    parts = [_part(key, settings, report.at(key)) for key in named]
    # Where the schedule is wrong, any other one serves to check what thins it all the same.
    when = functools.reduce(operator.or_, [part for part in parts if part is not None] or [every(1)])
    if settings["cooldown"] is not None:
        when = report.at("cooldown").attempt(cooldown, when, settings["cooldown"]) or when
    if settings["max_fires"] is not None:
        when = report.at("max_fires").attempt(when.max_fires, settings["max_fires"])
    return when if None not in parts else None


def _part(key: str, settings: Mapping[str, Any], report: Report) -> Schedule | None:
    """What one key says of the due steps."""
    if key == "every":
        return report.attempt(
            every, settings["every"], *(settings[name] for name in ("start", "stop")), None, settings["phase"]
        )
    need = _NEEDS[key]
    if need is not None and settings[need] is None:
        report.add(f"needs `{need}` beside it, which is not set")
        return None
    given = settings[key] if isinstance(settings[key], tuple) else (settings[key],)
    make = _MADE_BY[key]
    return report.attempt(make if need is None else functools.partial(make, **{need: settings[need]}), *given)


def _by_metric(settings: Mapping[str, Any], report: Report) -> Schedule | None:
    """What the metric decides, or None."""
    if settings["on_metric"] is None:
        _check_unused(_OF_METRIC, "belongs to `on_metric`, which is not set", settings, report)
        return None
    named = {key.removeprefix("metric_"): settings[key] for key in _OF_METRIC}
    return report.at("on_metric").attempt(functools.partial(on_metric, settings["on_metric"], **named))


def _by_counts(settings: Mapping[str, Any], report: Report) -> list[Schedule | None]:
    """What the counter decides."""
    named = [key for key in _COUNTS if _is_set(settings[key])]
    if not named:
        _check_unused(_OF_COUNT, "belongs to `at_count` and `every_count`, which are not set", settings, report)
        return []
    if settings["every_count"] is None:
        _check_unused(("count_start", "count_stop"), "bounds `every_count`, which is not set", settings, report)
    if settings["count_of"] is None:
        report.at(named[0]).add("needs `count_of` beside it, the name of the counter, which is not set")
        return []
    of: dict[str, Any] = {"of": settings["count_of"], "lag": settings["count_lag"]}
    made: list[Schedule | None] = []
    if "at_count" in named:
        made.append(report.at("at_count").attempt(functools.partial(at_count, **of), *settings["at_count"]))
    if "every_count" in named:
        bounds = {"start": settings["count_start"], "stop": settings["count_stop"]}
        made.append(
            report.at("every_count").attempt(functools.partial(every_count, settings["every_count"], **of, **bounds))
        )
    return made


def _watches(settings: Mapping[str, Any]) -> bool:
    return any(_is_set(settings[key]) for key in ("on_metric", *_COUNTS))


def _is_set(value: Any) -> bool:
    return value is not None and value != ()


def _check_unused(keys: Iterable[str], why: str, settings: Mapping[str, Any], report: Report) -> None:
    """Reports settings that nothing makes use of."""
    defaults = fields_of(HookFields)
    for key in keys:
        if settings[key] != defaults[key].default:
            report.at(key).add(f"{why}; found {settings[key]}")
