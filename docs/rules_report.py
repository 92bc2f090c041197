"""The figures, the tables and the picture of docs/rules.md, from the curves that measure_rules.py found."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
STYLES: dict[str, dict[str, Any]] = {  # told apart by colour, by dashes and by brightness
    "no edit": {"color": plots.FAINT, "linewidth": 1.2, "linestyle": (0, (1, 1.2))},
    "carry": {"color": plots.COLOURS[0], "linewidth": 1.8},
    "transport": {"color": plots.COLOURS[1], "linewidth": 1.8, "linestyle": (0, (5, 1.5))},
    "reset": {"color": plots.COLOURS[2], "linewidth": 1.4, "linestyle": (0, (3, 1, 1, 1))},
}
LABELS = {"carry": "carry, and keep (the same)"}
SMOOTH = 10  # steps


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
        for what in ("size", "accuracy"):
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
        "zeroed": _zeroed(figures["conditions"]["plan"]["reinit_at"]),
        "reinit": _reinit_table(figures),
        "reinit_summary": _reinit_text(figures),
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
    return "\n".join(
        [
            f"- Digits of scikit-learn, {run['batch_size']} a batch, {plan['num_steps']:,} steps, {plan['seeds']} seeds.",
            f"- *Digits run*: the network and optimizer of `examples/digits.py`: `adamw` with a learning rate that rises to "
            f"`{run['learning_rate']}` over {run['warmup_steps']} steps and falls to `{run['end_learning_rate']}` by a "
            f"cosine, weight decay `{run['weight_decay']}`, after clipping by a global norm of 1.",
            f"- *Plain Adam*: the same without the convolutions, `adam({found['plain_adam']})` at a constant rate.",
            "- *Kernel before a LayerNorm*: `Dense_0/kernel`, with a LayerNorm put between it and the ReLU, and no bias. "
            "*Output kernel*: `Dense_1/kernel`.",
            f'- Normalised {fires} times, every {plan["every"]} steps. "The first steps" and "the end" are '
            f"{plan['window']} steps each.",
        ]
    )


def _summary_text(figures: Mapping[str, Any]) -> str:
    found, seeds = figures["normalize"], figures["conditions"]["plan"]["seeds"]

    def pair(case: str, figure: str, first: str, second: str) -> str:
        one, other = (number(found[case][rule][figure]["median"]) for rule in (first, second))
        return f"{one} under `{first}`, {other} under `{second}`"

    below = found["norm"]["transport"]["seeds_below_carry"]["next"]
    return "\n".join(
        [
            f"- **Output kernel**, first steps after one edit: {pair('head', 'next', 'carry', 'transport')} in the digits "
            f"run; {pair('head_adam', 'next', 'carry', 'transport')} in that with plain Adam. At the end, after all edits: "
            f"{pair('head', 'end', 'carry', 'transport')}; {pair('head_adam', 'end', 'carry', 'transport')}.",
            f"- **Kernel before a LayerNorm**, first steps after one edit: {pair('norm', 'next', 'transport', 'carry')} in "
            f"the digits run (lower in {below} of {seeds} seeds); without its clipping "
            f"{pair('norm_unclipped', 'next', 'transport', 'carry')}; with plain Adam "
            f"{pair('norm_adam', 'next', 'transport', 'carry')}.",
        ]
    )


def _zeroed(steps: Sequence[int]) -> str:
    """The first update of an element whose Adam moments are 0 at a step: 0.1 g / sqrt(0.001 g^2), bias-corrected."""
    first = [0.1 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step) / 0.001**0.5 for step in (*steps, 100_000)]
    at = ", ".join(f"{number(size)} learning rates at step {step:,}" for size, step in zip(first, steps, strict=False))
    return (
        f"Zero is a trap: Adam's first update of an element with zeroed moments is {at}, {number(first[-1])} late in a "
        "long run, whatever its gradient, and the next ones are larger still."
    )


def _reinit_text(figures: Mapping[str, Any]) -> str:
    found = figures["reinit"]
    hidden, head, plain = (found[case] for case in ("head/Dense_0", "head/Dense_1", "head_adam/Dense_0"))
    below = sum(by["init"]["next"]["median"] < by["mean"]["next"]["median"] for by in found.values())
    return (
        f'With `fresh="mean"` the updates of a hidden layer stay at or below those of the untouched ones in '
        f"{percent(hidden['mean']['within'])} of the steps of the digits run and in {percent(plain['mean']['within'])} under "
        f"plain Adam, and never go beyond {number(max(hidden['mean']['worst'], plain['mean']['worst']))} times. They do not "
        f"for the head, where it is {percent(head['mean']['within'])} of the steps: its old second moments are those of a "
        f'network that was nearly right, and its gradients now are not. With `fresh="init"` it is '
        f"{percent(max(by['init']['within'] for by in found.values()))} of the steps at most, and up to "
        f"{number(max(by['init']['worst'] for by in found.values()))} times as large. Larger is not slower here: "
        f'the loss fell faster with `"init"` in {below} of these {len(found)}. `"mean"` is the default because it bounds the '
        "step, which these small networks do not need."
    )


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

    >>> percent(0.891)
    '89 %'
    """
    return f"{100 * value:.0f} %"


def _range(found: Mapping[str, float]) -> str:
    return f"({number(found['min'])} to {number(found['max'])})"


def _ranged(found: Mapping[str, float]) -> str:
    return f"{number(found['median'])} {_range(found)}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


# The picture


def draw(path: pathlib.Path, curves: Curves, every: int, window: int) -> None:
    """Writes the PNG.

    Args:
      path: where.
      curves: as for `figures`.
      every: the steps between two fires.
      window: over how many steps the figures are taken.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 11.5), dpi=140, layout="constrained")
        panels = figure.subplots(3, 2)
        for row, case in zip(panels, ("head", "norm"), strict=False):
            _draw_once(row[0], curves, case, every, window)
            _draw_fires(row[1], curves, f"{case}_adam", every)
        panels[0][0].legend(loc="lower left", frameon=False, fontsize=9)
        _draw_sizes(panels[2][0], curves, window)
        _draw_losses(panels[2][1], curves)
        figure.savefig(path)


def _draw_once(axes: Axes, curves: Curves, case: str, every: int, window: int) -> None:
    """The first fire of the digits run, and what follows until the second."""
    _title(axes, TITLES[case][0].upper() + TITLES[case][1:], f"normalised at step {every}")
    before = min(20, every)
    for rule, style in STYLES.items():
        smooth = _smooth(np.asarray(curves[case, rule, "loss"])[:, every - before : 2 * every], [before])
        _band(axes, np.arange(-before, smooth.shape[1] - before), smooth, style, LABELS.get(rule, rule))
    axes.axvspan(0, window, color=plots.GRID, alpha=0.5, zorder=0, linewidth=0)
    axes.text(window / 2, 0.96, "in the table", transform=axes.get_xaxis_transform(), va="top", ha="center", fontsize=9)
    axes.set_xlabel("train steps since the edit")


def _title(axes: Axes, what: str, how: str) -> None:
    axes.set_title(f"{what}\n{how}", loc="left", fontsize=11, fontweight="bold")
    axes.set_yscale("log")
    axes.set_ylabel("train loss")


def _draw_fires(axes: Axes, curves: Curves, case: str, every: int) -> None:
    """A whole run under plain Adam, normalised again and again."""
    steps = np.asarray(curves[case, "carry", "loss"]).shape[1]
    fires = range(every, steps, every)
    _title(axes, TITLES[case][0].upper() + TITLES[case][1:], f"normalised {len(fires)} times, every {every} steps")
    for fire in fires:
        axes.axvline(fire, color=plots.GRID, linewidth=1, zorder=0)
    for rule, style in STYLES.items():
        smooth = _smooth(np.asarray(curves[case, rule, "loss"]), list(fires))
        _band(axes, np.arange(steps), smooth, {**style, "linewidth": 1.2}, rule)
    axes.set_xlim(every - 50, steps)
    axes.set_xlabel("train steps applied")


def _draw_sizes(axes: Axes, curves: Curves, window: int) -> None:
    _title(axes, "Dense_0 of the digits run starts anew", "99th percentile of |update| / learning rate")
    axes.set_yscale("linear")
    axes.set_ylabel("learning rates")
    steps = np.arange(1, window + 1)
    for fresh, colour in (("mean", plots.COLOURS[0]), ("init", plots.COLOURS[1])):
        for what, dashes in (("fresh", "-"), ("untouched", (0, (1, 1.2)))):
            style = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
            label = f'fresh="{fresh}": {what} elements'
            _band(axes, steps, np.asarray(curves["head", "Dense_0", fresh, what]), style, label)
    axes.set_ylim(0)
    axes.set_xlabel("train steps since the edit")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _draw_losses(axes: Axes, curves: Curves) -> None:
    _title(axes, "Dense_0 of the digits run starts anew", "the loss that follows")
    for fresh, colour in (("mean", plots.COLOURS[0]), ("init", plots.COLOURS[1])):
        smooth = _smooth(np.asarray(curves["head", "Dense_0", fresh, "loss"]), [])
        dashes = "-" if fresh == "mean" else STYLES["transport"]["linestyle"]
        style = {"color": colour, "linewidth": 1.8, "linestyle": dashes}
        _band(axes, np.arange(smooth.shape[1]), smooth, style, f'fresh="{fresh}"')
    axes.set_xlabel("train steps since the edit")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _band(axes: Axes, steps: np.ndarray, curves: np.ndarray, style: Mapping[str, Any], label: str) -> None:
    """The median over seeds, and from the lowest to the highest."""
    axes.fill_between(steps, curves.min(0), curves.max(0), color=style["color"], alpha=0.13, linewidth=0)
    axes.plot(steps, np.median(curves, 0), label=label, **style)


def _smooth(curves: np.ndarray, fires: Sequence[int]) -> np.ndarray:
    """Running means of up to `SMOOTH` steps that never reach back over a fire."""
    parts = []
    for part in np.split(curves, fires, axis=1):
        total = np.cumsum(np.pad(part, ((0, 0), (1, 0))), axis=1)
        stop = np.arange(1, part.shape[1] + 1)
        start = np.maximum(stop - SMOOTH, 0)
        parts.append((total[:, stop] - total[:, start]) / (stop - start))
    return np.concatenate(parts, axis=1)
