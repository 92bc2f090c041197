"""The picture of a language model's run: held-out bits per byte over steps, the n-gram model, and every fire."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(
    path: pathlib.Path,
    rows: Sequence[Mapping[str, float]],
    fires: Sequence[tuple[int, str]],
    scores: Mapping[str, float],
) -> None:
    """Writes a PNG.

    Args:
      path: the file.
      rows: "step", and bits per byte, "train" and "held_out".
      fires: (step, hook).
      scores: bits per byte; "ngram/sample", of the order "ngram/order", is drawn as a line where there is one.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(10, 5.2), dpi=150, layout="constrained")
        axes: Axes = figure.subplots()
        steps = [row["step"] for row in rows]
        held_out = [row["held_out"] for row in rows]
        axes.plot(steps, [row["train"] for row in rows], color=plots.FAINT, linewidth=1.2, label="train, mean of steps")
        axes.plot(steps, held_out, color=plots.HELD_OUT, linewidth=1.8, marker="o", markersize=3, label="held out")
        axes.annotate(f"{held_out[-1]:.3f}", (steps[-1], held_out[-1]), xytext=(6, 0), textcoords="offset points",
                      va="center", color=plots.HELD_OUT, fontweight="bold", annotation_clip=False)  # fmt: skip
        if "ngram/sample" in scores:
            level, name = scores["ngram/sample"], f"{scores['ngram/order']:g}-gram, held out"
            axes.axhline(level, color=plots.COLOURS[1], linewidth=1.4, linestyle="--", label=name)
            axes.annotate(f"{level:.3f}", (1, level), xycoords=("axes fraction", "data"), xytext=(6, 0), va="center",
                          textcoords="offset points", color=plots.COLOURS[1], annotation_clip=False)  # fmt: skip
        low = min([*held_out, *(row["train"] for row in rows), scores.get("ngram/sample", np.inf)])
        axes.set_ylim(low - 0.1, min(max(held_out), low + 2.5) + 0.1)
        axes.set(xlabel="train steps applied", ylabel="bits per byte")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, steps[-1] * 1.005)
        _mark(axes, fires)
        axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=1)
        figure.savefig(path)


def _mark(axes: Axes, fires: Sequence[tuple[int, str]]) -> None:
    """A row of marks above the curve for each hook, and faint lines down."""
    for row, hook in enumerate(dict.fromkeys(hook for _, hook in fires)):
        colour = plots.COLOURS[(0, 2, 3, 4, 5)[row % 5]]
        steps = [step for step, name in fires if name == hook]
        height = 1.03 + 0.045 * row
        transform = axes.get_xaxis_transform()
        axes.scatter(
            steps, [height] * len(steps), marker="D", s=26, color=colour, transform=transform, clip_on=False, zorder=3
        )
        axes.text(-0.012, height, hook, transform=axes.transAxes, color=colour, ha="right", va="center")
        for step in steps:
            axes.axvline(step, color=colour, linewidth=0.9, alpha=0.35, zorder=0)
