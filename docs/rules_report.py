"""The figures, tables and sentences of docs/rules.md, from the curves that measure_rules.py found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TITLES = {
    "head": "output kernel, digits run",
    "head_adam": "output kernel, plain Adam",
    "norm": "kernel before a LayerNorm, digits run",
    "norm_unclipped": "the same without gradient clipping",
    "norm_adam": "kernel before a LayerNorm, plain Adam",
    "head/Dense_0": "`Dense_0`, digits run",
    "head/Dense_1": "`Dense_1`, the head, digits run",
    "head_adam/Dense_0": "`Dense_0`, plain Adam",
}
RULES = ("carry", "keep", "transport", "reset", "no edit")
Curves = Mapping[tuple[str, ...], Any]


# Figures


def figures(curves: Curves, every: int, window: int) -> dict[str, Any]:
    """Medians and ranges over seeds, as docs/rules.json holds them.

    Args:
      curves: (case, rule, what) -> per seed the losses of a run, or a number; (case, layer, fresh, what) -> per seed
        a curve since a re-initialisation.
      every: the step of the first fire.
      window: over how many steps figures are taken.
    """
    normalize: dict[str, Any] = {}
    reinit: dict[str, Any] = {}
    for case, rule in dict.fromkeys(names[:2] for names in curves if len(names) == 3):
        loss, plain = (np.asarray(curves[case, one, "loss"]) for one in (rule, "carry"))
        first, last = slice(every, every + window), slice(-window, None)
        found = {"next": _summary(loss[:, first].mean(1)), "end": _summary(loss[:, last].mean(1))}
        for what in ("size", "norm", "accuracy"):
            if (case, rule, what) in curves:
                found[what] = _summary(curves[case, rule, what])
        found["seeds_below_carry"] = {
            what: int((loss[:, steps].mean(1) < plain[:, steps].mean(1)).sum())
            for what, steps in (("next", first), ("end", last))
        }
        normalize.setdefault(case, {})[rule] = found
    for case, layer, fresh in dict.fromkeys(names[:3] for names in curves if len(names) == 4):
        loss, ours, others = (np.asarray(curves[case, layer, fresh, w]) for w in ("loss", "fresh", "untouched"))
        reinit.setdefault(f"{case}/{layer}", {})[fresh] = {
            "fresh": _summary(ours.mean(1)),
            "untouched": _summary(others.mean(1)),
            "within": round(float((ours <= others).mean()), 4),
            "worst": round(float((ours / others).max()), 4),
            "next": _summary(loss[:, :window].mean(1)),
            "end": _summary(loss[:, -window:].mean(1)),
        }
    return {"normalize": normalize, "reinit": reinit}


def _summary(values: Any) -> dict[str, float]:
    numbers = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
    return {name: float(f"{number:.4g}") for name, number in numbers.items()}


# Tables and sentences


def blocks(figures: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Markdown: everything on the page that was measured."""
    return {
        "conditions": _conditions(figures["conditions"]),
        "summary": _summary_text(figures),
        "next": _rule_table(figures, "next", lowest=True),
        "end": _rule_table(figures, "end", lowest=True),
        "size": _rule_table(figures, "size"),
        "growth": _growth(figures["normalize"]),
        "zeroed": _zeroed(figures["conditions"]["plan"]["reinit_at"]),
        "reinit": _reinit_table(figures),
        "reinit_summary": _reinit_text(figures["reinit"]),
    }


def fill(text: str, figures: Mapping[str, Any]) -> str:
    """A Markdown text with the tables in their places, which comments `<!-- measured: NAME -->` mark."""
    made = blocks(figures)

    def one(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- measured: (\w+) -->).*?<!-- end -->", one, text, flags=re.DOTALL)


def dump(figures: Mapping[str, Any]) -> str:
    """JSON with one line per figure."""
    text = json.dumps(figures, indent=1)
    return re.sub(r"\{\s*(\"median\":[^{}]*?)\s*\}", lambda found: "{" + " ".join(found[1].split()) + "}", text) + "\n"


def _conditions(found: Mapping[str, Any]) -> str:
    plan, run = found["plan"], found["digits_run"]
    fires = len(range(plan["every"], plan["num_steps"], plan["every"]))
    return f"""\
- Handwritten digits, {run["batch_size"]} a batch, {plan["num_steps"]:,} steps, {plan["seeds"]} seeds.
- *Digits run*: network and optimizer of `examples/digits.py`: `adamw` with a learning rate that rises to
  `{run["learning_rate"]}` over {run["warmup_steps"]} steps and falls to `{run["end_learning_rate"]}` by a cosine,
  weight decay `{run["weight_decay"]}`, after clipping by a global norm of 1.
- *Plain Adam*: no convolutions, and `adam({found["plain_adam"]})` at a constant rate.
- *Output kernel*: `Dense_1/kernel`. *Kernel before a LayerNorm*: `Dense_0/kernel`, with a LayerNorm put between it and
  the ReLU, and no bias.
- Normalised {fires} times, every {plan["every"]} steps. "First steps" and "end" are {plan["window"]} steps each."""


def _summary_text(figures: Mapping[str, Any]) -> str:
    found = figures["normalize"]

    def pair(case: str, figure: str) -> str:
        carry, transport = (number(found[case][rule][figure]["median"]) for rule in ("carry", "transport"))
        return f"{carry} under `carry`, {transport} under `transport`"

    below = found["norm"]["transport"]["seeds_below_carry"]["next"]
    seeds = figures["conditions"]["plan"]["seeds"]
    return f"""\
- **Output kernel**, loss in the first steps after one edit: {pair("head", "next")} in the digits run;
  {pair("head_adam", "next")} with plain Adam. At the end, after all edits: {pair("head", "end")} in the digits run;
  {pair("head_adam", "end")} with plain Adam.
- **Kernel before a LayerNorm**, first steps after one edit: {pair("norm", "next")} in the digits run (lower under
  `transport` in {below} of {seeds} seeds); {pair("norm_unclipped", "next")} without its clipping;
  {pair("norm_adam", "next")} with plain Adam."""


def _growth(found: Mapping[str, Any]) -> str:
    """How far the output kernel grew back between edits."""

    def norms(case: str) -> str:
        by_rule = {rule: number(found[case][rule]["norm"]["median"]) for rule in ("carry", "transport", "reset")}
        return ", ".join(f"{norm} under `{rule}`" for rule, norm in by_rule.items())

    return f"""\
Norm of the output kernel just before the last edit sets it to 1 once more: {norms("head")} in the digits run;
{norms("head_adam")} with plain Adam."""


def _zeroed(steps: Sequence[int]) -> str:
    """The first update of an element whose Adam moments are 0 at a step: 0.1 g / sqrt(0.001 g^2), bias-corrected."""
    *sizes, last = (number(0.1 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) / 0.001**0.5) for t in (*steps, 100_000))
    at = ", ".join(f"{size} learning rates at step {step:,}" for size, step in zip(sizes, steps, strict=True))
    return f"""\
Zero is a trap: whatever its gradient, the first update of an element with zeroed moments is {at},
{last} late in a long run, and the next ones are larger still."""


def _reinit_text(found: Mapping[str, Any]) -> str:
    hidden, head, plain = (found[case]["mean"] for case in ("head/Dense_0", "head/Dense_1", "head_adam/Dense_0"))
    init = [by_fresh["init"] for by_fresh in found.values()]
    pairs = [(by_fresh["init"]["next"]["median"], by_fresh["mean"]["next"]["median"]) for by_fresh in found.values()]
    faster = sum(with_init < with_mean for with_init, with_mean in pairs)
    most, low, high = (f([one[w] for one in init]) for f, w in ((max, "within"), (min, "worst"), (max, "worst")))
    return f"""\
- With `fresh="mean"` the updates of a hidden layer stay at or below those of the untouched layers in
  {percent(hidden["within"])} of the steps of the digits run and {percent(plain["within"])} with plain Adam; at worst
  they are {number(max(hidden["worst"], plain["worst"]))} times as large.
- For the head they do not: {percent(head["within"])} of the steps, {number(head["worst"])} times at worst. Its old
  second moments are those of a network that was nearly right, and its new gradients are not.
- With `fresh="init"` it is {percent(most)} of the steps, and {number(low)} to {number(high)} times at worst.
- The loss fell faster with `fresh="init"` in {faster} of these {len(init)}: networks this small bear large steps, and
  gain by them. `"mean"` is the default because it bounds the steps, not because it is faster."""


def _rule_table(figures: Mapping[str, Any], figure: str, lowest: bool = False) -> str:
    rules = [rule for rule in RULES if all(figure in by_rule[rule] for by_rule in figures["normalize"].values())]
    rows = [["", *(f"`{rule}`" if rule in RULES[:-1] else rule for rule in rules)]]
    for case, by_rule in figures["normalize"].items():
        best = min(by_rule[rule][figure]["median"] for rule in rules if rule in RULES[:-1])
        row = [TITLES[case]]
        for rule in rules:
            found = by_rule[rule][figure]
            bold = lowest and rule in RULES[:-1] and found["median"] == best
            row.append(f"**{number(found['median'])}** {_range(found)}" if bold else _ranged(found))
        rows.append(row)
    return _markdown(rows)


def _reinit_table(figures: Mapping[str, Any]) -> str:
    head = ["", "`fresh=`", "fresh elements", "untouched", "steps at or below", "worst step", "loss, next", "loss, end"]
    rows = [head]
    for case, by_fresh in figures["reinit"].items():
        for fresh, found in by_fresh.items():
            ours, others, *losses = (_ranged(found[name]) for name in ("fresh", "untouched", "next", "end"))
            within, worst = percent(found["within"]), number(found["worst"]) + " times"
            rows.append([TITLES[case], f'`"{fresh}"`', ours, others, within, worst, *losses])
    return _markdown(rows)


def number(value: float) -> str:
    """Two significant digits or more.

    >>> number(1.025), number(0.743), number(0.0591), number(0.00497), number(0.000004)
    ('1.02', '0.74', '0.059', '0.0050', '4.0e-06')
    """
    if value < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(2, 1 - int(np.floor(np.log10(value))))}f}"


def percent(value: float) -> str:
    """A share in percent.

    >>> percent(0.891), percent(0.004)
    ('89 %', 'under 1 %')
    """
    return "under 1 %" if 0 < value < 0.01 else f"{100 * value:.0f} %"


def _range(found: Mapping[str, float]) -> str:
    return f"({number(found['min'])} to {number(found['max'])})"


def _ranged(found: Mapping[str, float]) -> str:
    return f"{number(found['median'])} {_range(found)}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])
