"""The tables and the picture of docs/rules.md, from what measure_rules.py found."""

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
    "norm_adam": "kernel before a LayerNorm, plain Adam",
    "head/Dense_0": "`Dense_0` of the digits run",
    "head/Dense_1": "`Dense_1` (the head) of the digits run",
    "head_adam/Dense_0": "`Dense_0` under plain Adam",
}
RULES = ("carry", "keep", "transport", "reset", "no edit")
STYLES: dict[str, dict[str, Any]] = {  # told apart by colour, by dashes and by brightness
    "no edit": {"color": plots.FAINT, "linewidth": 1.2, "linestyle": (0, (1, 1.2))},
    "carry": {"color": plots.COLOURS[0], "linewidth": 1.8},
    "transport": {"color": plots.COLOURS[1], "linewidth": 1.8, "linestyle": (0, (5, 1.5))},
    "reset": {"color": plots.COLOURS[2], "linewidth": 1.4, "linestyle": (0, (3, 1, 1, 1))},
}
LABELS = {"carry": "carry, and keep (the same)"}
SMOOTH = 10


# Tables


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Markdown table."""
    return {
        "next": _rule_table(figures, "next", _ranged, lowest=True),
        "end": _rule_table(figures, "end", _ranged, lowest=True),
        "accuracy": _rule_table(figures, "accuracy", lambda found: f"{100 * found['median']:.1f} %"),
        "size": _rule_table(figures, "size", lambda found: f"{found['median']:.2f}"),
        "reinit": _reinit_table(figures),
    }


def fill(text: str, figures: Mapping[str, Any]) -> str:
    """A Markdown text with the tables in their places, which comments `<!-- measured: NAME -->` mark."""
    made = tables(figures)

    def one(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- measured: (\w+) -->).*?<!-- end -->", one, text, flags=re.DOTALL)


def dump(figures: Mapping[str, Any]) -> str:
    """JSON with one line per figure."""
    text = json.dumps(figures, indent=1)
    return re.sub(r"\{\s*(\"median\":[^{}]*?)\s*\}", lambda found: "{" + " ".join(found[1].split()) + "}", text) + "\n"


def _rule_table(figures: Mapping[str, Any], figure: str, show: Any, lowest: bool = False) -> str:
    rows = [["", *(f"`{rule}`" if " " not in rule else rule for rule in RULES)]]
    for case, by_rule in figures["normalize"].items():
        found = [by_rule[rule].get(figure) for rule in RULES]
        best = min(one["median"] for one in found[:-1])
        cells = [show(one) if one else "" for one in found]
        bold = [lowest and one is not None and one["median"] == best for one in found[:-1]] + [False]
        rows.append([TITLES[case], *(f"**{c}**" if b else c for c, b in zip(cells, bold, strict=True))])
    return _markdown(rows)


def _reinit_table(figures: Mapping[str, Any]) -> str:
    head = ["", "`fresh=`", "fresh elements", "untouched", "steps at or below", "worst step", "loss, next", "loss, end"]
    rows = [head]
    for case, by_fresh in figures["reinit"].items():
        for fresh, found in by_fresh.items():
            sizes = [_ranged(found[name], 2) for name in ("fresh", "untouched")]
            losses = [_ranged(found[name]) for name in ("next", "end")]
            within, worst = f"{100 * found['within']:.0f} %", f"{found['worst']:.2f}"
            rows.append([TITLES[case], f'`"{fresh}"`', *sizes, within, worst, *losses])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _ranged(found: Mapping[str, float], digits: int = 3) -> str:
    smallest = 10.0**-digits
    low, middle, high = (
        f"{found[name]:.{digits}f}" if found[name] >= smallest else f"<{smallest:.{digits}f}"
        for name in ("min", "median", "max")
    )
    return middle if low == high else f"{middle} ({low} to {high})"


# The picture


def draw(path: pathlib.Path, curves: Mapping[tuple[str, ...], Any], every: int, window: int) -> None:
    """Writes the PNG.

    Args:
      path: where.
      curves: (case, rule) -> losses of a run, and (case, layer, fresh, what) -> curves after a re-initialisation; an
        array of seeds by steps each.
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


def _draw_once(axes: Axes, curves: Mapping[Any, Any], case: str, every: int, window: int) -> None:
    """The first fire of the digits run, and what follows until the second."""
    _title(axes, f"{TITLES[case].capitalize()}:", f"normalised at step {every}")
    before = min(20, every)
    for rule, style in STYLES.items():
        smooth = _smooth(np.asarray(curves[case, rule])[:, every - before : 2 * every], [before])
        _band(axes, np.arange(-before, smooth.shape[1] - before), smooth, style, LABELS.get(rule, rule))
    axes.axvspan(0, window, color=plots.GRID, alpha=0.5, zorder=0, linewidth=0)
    axes.annotate(
        f"the {window} steps\nof the table", (window, 1), (-4, -4), "data", va="top", ha="right", fontsize=8.5
    )
    axes.set_xlabel("train steps since the edit")


def _title(axes: Axes, what: str, how: str) -> None:
    axes.set_title(f"{what}\n{how}", loc="left", fontsize=11, fontweight="bold")
    axes.set_yscale("log")
    axes.set_ylabel("train loss")


def _draw_fires(axes: Axes, curves: Mapping[Any, Any], case: str, every: int) -> None:
    """A whole run under plain Adam, normalised again and again."""
    steps = np.asarray(curves[case, "carry"]).shape[1]
    fires = range(every, steps, every)
    _title(axes, f"{TITLES[case].capitalize()}:", f"normalised {len(fires)} times, every {every} steps")
    for fire in fires:
        axes.axvline(fire, color=plots.GRID, linewidth=1, zorder=0)
    for rule, style in STYLES.items():
        smooth = _smooth(np.asarray(curves[case, rule]), list(fires))
        _band(axes, np.arange(steps), smooth, {**style, "linewidth": 1.2}, rule)
    axes.set_xlim(every - 50, steps)
    axes.set_xlabel("train steps applied")


def _draw_sizes(axes: Axes, curves: Mapping[Any, Any], window: int) -> None:
    _title(axes, "Dense_0 of the digits run starts anew:", "99th percentile of |update| / learning rate")
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
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def _draw_losses(axes: Axes, curves: Mapping[Any, Any]) -> None:
    _title(axes, "Dense_0 of the digits run starts anew:", "the loss that follows")
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
    """Running means of up to ten steps that never reach back over a fire."""
    parts = []
    for part in np.split(curves, fires, axis=1):
        total = np.cumsum(np.pad(part, ((0, 0), (1, 0))), axis=1)
        stop = np.arange(1, part.shape[1] + 1)
        start = np.maximum(stop - SMOOTH, 0)
        parts.append((total[:, stop] - total[:, start]) / (stop - start))
    return np.concatenate(parts, axis=1)
