"""What every hook in a config has beside the fields of its surgery: its keys, what they must hold, and its schedule."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from flax_surgery_hooks.config_fields import MISMATCH
from flax_surgery_hooks.config_reading import Report
from flax_surgery_hooks.derived_schedules import at_epochs, at_fraction, cooldown, every_epochs, every_fraction
from flax_surgery_hooks.rules import FRESH, GUARDS, check_choice, slot_rules
from flax_surgery_hooks.schedules import Schedule, at, every
from flax_surgery_hooks.selection import select


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
      figures: whether changes are measured and written.
      histograms: whether histograms of the leaves before and after are.
      fields: fields of the train state that can be selected too.
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
    figures: bool = True
    histograms: bool = False
    fields: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class HookFields:
    """The keys of every hook in a config; read like the fields of a surgery, by their annotations.

    What several of `at`, `every`, `at_epochs`, `every_epochs`, `at_fraction` and `every_fraction` say is joined.

    Attributes:
      surgery: which surgery: a built-in one in snake case, or a name given to `register_surgery`.
      params: which leaves: a glob, a regular expression `re:...`, or a tuple of them.
      exclude: which leaves to leave out, likewise.
      expect: how many leaves must be selected.
      at: steps at which it is due.
      every: steps from one due step to the next.
      start: for `every`, the first due step (with a `phase`, the earliest).
      stop: for `every`, the last step that may be due.
      phase: for `every`, the remainder of due steps when divided by it.
      at_epochs: epochs after which it is due; needs `steps_per_epoch`.
      every_epochs: epochs from one due step to the next; needs `steps_per_epoch`.
      at_fraction: parts of the run after which it is due, from 0 to 1; needs `num_steps`.
      every_fraction: part of the run from one due step to the next; needs `num_steps`.
      steps_per_epoch: train steps of one epoch.
      num_steps: train steps of the whole run.
      cooldown: steps that lie between two due steps, at least.
      max_fires: how many due steps there are at most.
      opt_state: how optimizer slots follow: a rule, or a dict from kind of slot to rule.
      fresh: what second moments of elements without history start from, "mean" or "init".
      guard: "finite", so that a result with new non-finite values is not applied, or "off".
      priority: hooks due at one step fire from the highest to the lowest, then in the order of their names.
      figures: whether changes are measured and written.
      histograms: whether histograms of the leaves before and after are.
      fields: fields of the train state, such as `batch_stats`, whose leaves can be selected too.
      enabled: whether the hook is there at all; a disabled one is checked all the same.
    """

    surgery: str
    params: str | tuple[str, ...]
    exclude: str | tuple[str, ...] | None = None
    expect: int | None = None
    at: tuple[int, ...] = ()
    every: int | None = None
    start: int = 0
    stop: int | None = None
    phase: int | None = None
    at_epochs: tuple[float, ...] = ()
    every_epochs: float | None = None
    at_fraction: tuple[float, ...] = ()
    every_fraction: float | None = None
    steps_per_epoch: int | None = None
    num_steps: int | None = None
    cooldown: int | None = None
    max_fires: int | None = None
    opt_state: str | dict[str, str] | None = None
    fresh: str = "mean"
    guard: str = "finite"
    priority: int = 0
    figures: bool = True
    histograms: bool = False
    fields: tuple[str, ...] = ()
    enabled: bool = True


def check_choices(values: Mapping[str, Any], report: Report) -> None:
    """Reports rules, kinds and other choices that do not exist."""
    rules = values.get("opt_state")
    if isinstance(rules, dict):
        for kind, rule in rules.items():
            report.at("opt_state").at(kind).attempt(slot_rules, {kind: rule}, "nothing")
    elif isinstance(rules, str):
        report.at("opt_state").attempt(slot_rules, rules, "nothing")
    for key, choices in (("fresh", FRESH), ("guard", GUARDS)):
        if isinstance(values.get(key), str):
            report.at(key).attempt(check_choice, values[key], choices, f"value of `{key}`")


def check_selection(settings: Mapping[str, Any], report: Report) -> None:
    """Reports patterns that are none."""
    params, exclude = settings["params"], settings["exclude"]
    if params is None:
        report.at("params").add("no parameters are named; write for example '**/kernel', or '**' for all")
    elif params is not MISMATCH:
        report.at("params").attempt(select, params)
    if exclude is not None and exclude is not MISMATCH:
        report.at("exclude").attempt(select, "**", exclude)
    if isinstance(settings["expect"], int):
        report.at("expect").attempt(select, "**", None, settings["expect"])


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
_MADE_BY: dict[str, Callable[..., Schedule]] = {
    "at": at, "at_epochs": at_epochs, "every_epochs": every_epochs, "at_fraction": at_fraction,
    "every_fraction": every_fraction,
}  # fmt: skip


def schedule(settings: Mapping[str, Any], report: Report) -> Schedule | None:
    """When the hook is due, or None if that is wrong or missing."""
    if any(settings[key] is MISMATCH for key in (*_NEEDS, *_NEEDS.values(), *_BOUNDS, "cooldown", "max_fires") if key):
        return None
    named = [key for key in _NEEDS if settings[key] not in ((), None)]
    if not named:
        report.add("neither `at` nor `every` says when it is due; write at=(1000,) or every=1000")
    elif settings["every"] is None:
        for key, bound in {key: settings[key] for key in _BOUNDS}.items():
            if bound is not None and (key, bound) != ("start", 0):
                report.at(key).add(f"bounds `every`, which is not set; found {bound}")
    parts = [_part(key, settings, report.at(key)) for key in named]
    # Where the schedule is wrong, any other one serves to check what thins it all the same.
    when = functools.reduce(operator.or_, [part for part in parts if part is not None] or [every(1)])
    if settings["cooldown"] is not None:
        when = report.at("cooldown").attempt(cooldown, when, settings["cooldown"]) or when
    if settings["max_fires"] is not None:
        when = report.at("max_fires").attempt(when.max_fires, settings["max_fires"])
    return when if named and None not in parts else None


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
