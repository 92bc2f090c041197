"""The picture of docs/rules.md, from the curves that measure_rules.py found."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rules_report import TITLES, Curves

STYLES: dict[str, dict[str, Any]] = {  # told apart by colour, by dashes and by brightness
    "no edit": {"color": plots.FAINT, "linewidth": 1.2, "linestyle": (0, (1, 1.2))},
    "carry": {"color": plots.COLOURS[0], "linewidth": 1.8},
    "transport": {"color": plots.COLOURS[1], "linewidth": 1.8, "linestyle": (0, (5, 1.5))},
    "reset": {"color": plots.COLOURS[2], "linewidth": 1.4, "linestyle": (0, (3, 1, 1, 1))},
}
LABELS = {"carry": "carry, and keep (the same)"}
SMOOTH = 10  # steps


def draw(path: pathlib.Path, curves: Curves, every: int, window: int) -> None:
    """Writes the PNG.

    Args:
      path: where.
      curves: see `rules_report.figures`.
      every: the steps between two fires.
      window: over how many steps the figures are taken.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 11.5), dpi=110, layout="constrained")
        panels = figure.subplots(3, 2)
        for row, case in zip(panels, ("head", "norm"), strict=False):
            _draw_once(row[0], curves, case, every, window)
            _draw_fires(row[1], curves, f"{case}_adam", every)
        panels[0][0].legend(loc="upper right", frameon=False, fontsize=9)
        _draw_sizes(panels[2][0], curves, window)
        _draw_losses(panels[2][1], curves)
        figure.savefig(path)


def _draw_once(axes: Axes, curves: Curves, case: str, every: int, window: int) -> None:
    """The first fire of the digits run, and what follows."""
    _title(axes, TITLES[case][0].upper() + TITLES[case][1:], f"normalised at step {every}")
    before = min(20, every)
    for rule, style in STYLES.items():
        shown = np.asarray(curves[case, rule, "loss"])[:, every - before : every + 2 * window]
        smooth = _smooth(shown, [before])
        _band(axes, np.arange(-before, smooth.shape[1] - before), smooth, style, LABELS.get(rule, rule))
    axes.axvspan(0, window, color=plots.GRID, alpha=0.5, zorder=0, linewidth=0)
    axes.text(window / 2, 0.96, "in the table", transform=axes.get_xaxis_transform(), va="top", ha="center", fontsize=9)
    axes.set_xlabel("train steps since the edit")


def _title(axes: Axes, what: str, how: str) -> None:
    axes.set_title(how, loc="left", fontsize=10)
    axes.text(0, 1.09, what, transform=axes.transAxes, fontsize=11, fontweight="bold")
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
