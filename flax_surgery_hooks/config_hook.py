"""What every hook in a config has beside the fields of its surgery: its keys, and what they must hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_surgery_hooks.config_fields import MISMATCH
from flax_surgery_hooks.config_reading import Report
from flax_surgery_hooks.guards import as_guard
from flax_surgery_hooks.rollback import Rollback
from flax_surgery_hooks.rules import FRESH, check_choice, slot_rules
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.selection import select
from flax_surgery_hooks.settling import check_on_error
from flax_surgery_hooks.watched_schedules import LAG


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
      guard: "finite", "off", or comparisons of figures that a fire must hold.
      priority: the order among hooks due at one step.
      figures: whether changes are measured and written.
      histograms: whether histograms of the leaves before and after are.
      fields: fields of the train state that can be selected too.
      rollback: what is kept of the state before a fire, or None.
      on_error: what becomes of refused fires, or None for what holds for all hooks.
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
    rollback: Rollback | None = None
    on_error: str | None = None


@dataclasses.dataclass(frozen=True)
class HookFields:
    """The keys of every hook in a config; read like the fields of a surgery, by their annotations.

    What several of `at`, `every`, `at_epochs`, `every_epochs`, `at_fraction`, `every_fraction`, `on_metric`, `at_count`
    and `every_count` say is joined. `cooldown` and `max_fires` thin what is said in steps, the first six of them.

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
      on_metric: the metric whose values make it due; needs one of the next four.
      metric_above: for `on_metric`, the metric is larger.
      metric_below: for `on_metric`, it is smaller.
      metric_spike: for `on_metric`, it exceeds this many times its running average.
      metric_plateau: for `on_metric`, it has not improved on its best by more than this part; needs `metric_patience`.
      metric_patience: for `on_metric`, how many observations in a row must hold the condition.
      metric_cooldown: for `on_metric`, steps after a fire whose values do not count.
      metric_max_fires: for `on_metric`, how often it is due at most.
      metric_start: for `on_metric`, the first step whose value counts.
      metric_horizon: for `on_metric`, observations over which it is averaged.
      metric_mode: for `metric_plateau`, "min" if smaller values are better, or "max".
      metric_lag: for `on_metric`, how many steps after its own a value is read.
      at_count: counts at which it is due, once the counter `count_of` passes them.
      every_count: from one due count to the next.
      count_of: for `at_count` and `every_count`, the counter: the name of an input of the train loop.
      count_start: for `every_count`, the first due count.
      count_stop: for `every_count`, the last count that may be due.
      count_lag: for `at_count` and `every_count`, how many steps after its own an array is read.
      opt_state: how optimizer slots follow: a rule, or a dict from kind of slot to rule.
      fresh: what second moments of elements without history start from, "mean" or "init".
      guard: "finite", so that a result with new non-finite values is not applied; "off"; or comparisons that the
        figures must hold besides, such as "params/relative_change < 0.5 and params/sparsity < 0.9".
      priority: hooks due at one step fire from the highest to the lowest, then in the order of their names.
      figures: whether changes are measured and written.
      histograms: whether histograms of the leaves before and after are.
      fields: fields of the train state, such as `batch_stats`, whose leaves can be selected too.
      rollback_steps: how many steps after a fire the old values of what it touched are kept; see `fsh.Rollback`.
      rollback_metric: the metric that puts them back when it leaves its band; needs `rollback_steps`.
      rollback_above: upper end of the band.
      rollback_below: lower end of the band.
      rollback_patience: how many values in a row must lie outside.
      rollback_lag: how many steps after its own a value is read.
      rollback_to: where they are kept, "device" or "host".
      on_error: what becomes of refused fires, "raise", "skip" or "retry_next", if not what `SurgeryHooks` was told.
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
    on_metric: str | None = None
    metric_above: float | None = None
    metric_below: float | None = None
    metric_spike: float | None = None
    metric_plateau: float | None = None
    metric_patience: int | None = None
    metric_cooldown: int = 0
    metric_max_fires: int | None = None
    metric_start: int = 0
    metric_horizon: int | None = None
    metric_mode: str = "min"
    metric_lag: int = LAG
    at_count: tuple[int, ...] = ()
    every_count: int | None = None
    count_of: str | None = None
    count_start: int = 0
    count_stop: int | None = None
    count_lag: int = LAG
    opt_state: str | dict[str, str] | None = None
    fresh: str = "mean"
    guard: str = "finite"
    priority: int = 0
    figures: bool = True
    histograms: bool = False
    fields: tuple[str, ...] = ()
    rollback_steps: int | None = None
    rollback_metric: str | None = None
    rollback_above: float | None = None
    rollback_below: float | None = None
    rollback_patience: int = 1
    rollback_lag: int = LAG
    rollback_to: str = "device"
    on_error: str | None = None
    enabled: bool = True


def check_choices(values: Mapping[str, Any], report: Report) -> None:
    """Reports rules, kinds and other choices that do not exist."""
    rules = values.get("opt_state")
    if isinstance(rules, dict):
        for kind, rule in rules.items():
            report.at("opt_state").at(kind).attempt(slot_rules, {kind: rule}, "nothing")
    elif isinstance(rules, str):
        report.at("opt_state").attempt(slot_rules, rules, "nothing")
    for key, choices in (("fresh", FRESH),):
        if isinstance(values.get(key), str):
            report.at(key).attempt(check_choice, values[key], choices, f"value of `{key}`")
    if isinstance(values.get("guard"), str):
        report.at("guard").attempt(as_guard, values["guard"], "value of `guard`")
    if isinstance(values.get("on_error"), str):
        report.at("on_error").attempt(check_on_error, values["on_error"])


def rollback(settings: Mapping[str, Any], report: Report) -> Rollback | None:
    """What the keys `rollback_...` say, None where they say nothing; what is wrong is reported."""
    given = {field.name: settings[f"rollback_{field.name}"] for field in dataclasses.fields(Rollback)}
    if any(value is MISMATCH for value in given.values()):
        return None
    if given["steps"] is None:
        usual = HookFields("", "")
        said = [f"rollback_{name}" for name, value in given.items() if value != getattr(usual, f"rollback_{name}")]
        for key in said:
            report.at(key).add(f"needs `rollback_steps` beside it, which is not set; found {settings[key]}")
        return None
    return report.at("rollback_steps").attempt(lambda: Rollback(**given))


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
