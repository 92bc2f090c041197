"""The picture of a run: loss and accuracy over steps, with every fire of a hook marked and named."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by all eyes
INK, FAINT, GRID, HELD_OUT = "#222222", "#8a8f98", "#e6e8eb", "#7A3E9D"
STYLE: Any = {  # Any: matplotlib types the keys as a list of literals, another one in every release
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclasses.dataclass
class History:
    """What a run measured: the loss of every train step, and evaluations of the held-out split."""

    train_losses: list[float] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)

    def add(self, step: int, train_losses: Sequence[float], loss: float, accuracy: float) -> None:
        """Adds an evaluation at `step`, and the train losses since the last one."""
        self.train_losses += [float(value) for value in train_losses]
        self.steps.append(step)
        self.losses.append(float(loss))
        self.accuracies.append(float(accuracy))


def draw(path: pathlib.Path, history: History, fires: Sequence[tuple[int, str]]) -> None:
    """Writes a PNG; `fires` are (step, hook)."""
    hooks = list(dict.fromkeys(hook for _, hook in fires))
    colours = {hook: COLOURS[i % len(COLOURS)] for i, hook in enumerate(hooks)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2 + 0.3 * len(hooks)), dpi=150, layout="constrained")
        ratios = [0.34 * max(len(hooks), 1), 2.6, 2.6]
        strip, loss, accuracy = figure.subplots(3, 1, sharex=True, height_ratios=ratios)
        _draw_fires(strip, fires, hooks, colours)
        _draw_loss(loss, history)
        _draw_accuracy(accuracy, history)
        for axes in (loss, accuracy):
            for step, hook in fires:
                axes.axvline(step, color=colours[hook], linewidth=1.1, alpha=0.55, zorder=1)
        accuracy.set_xlabel("train steps applied")
        accuracy.xaxis.set_major_formatter("{x:,.0f}")
        accuracy.set_xlim(0, len(history.train_losses) * 1.005)
        figure.align_ylabels([loss, accuracy])
        figure.savefig(path)


def _draw_fires(axes: Axes, fires: Sequence[tuple[int, str]], hooks: list[str], colours: dict[str, str]) -> None:
    """One row per hook, a mark per fire with its step beside it where there is room."""
    axes.set_title("Surgeries" if hooks else "Surgeries: none fired", loc="left", fontsize=11, fontweight="bold")
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)
    axes.set_yticks(range(len(hooks)), hooks)
    axes.set_ylim(max(len(hooks), 1) - 0.5, -0.5)
    for row, hook in enumerate(hooks):
        steps = [step for step, name in fires if name == hook]
        axes.axhline(row, color=GRID, linewidth=0.8, zorder=0)
        axes.scatter(steps, [row] * len(steps), marker="D", s=34, color=colours[hook], zorder=3, clip_on=False)
        axes.get_yticklabels()[row].set_color(colours[hook])
        for step in steps if len(steps) <= 12 else ():
            axes.annotate(
                f"{step:,}",
                (step, row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=colours[hook],
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                annotation_clip=False,
                zorder=2,
            )


def _draw_loss(axes: Axes, history: History) -> None:
    """Every train loss faint, their running mean strong, the held-out loss on top."""
    steps = np.arange(1, len(history.train_losses) + 1)
    axes.set_title("Cross entropy", loc="left", fontsize=11, fontweight="bold")
    axes.set_yscale("log")
    axes.plot(steps, history.train_losses, color=FAINT, linewidth=0.6, alpha=0.45)
    axes.plot(steps, _smoothed(history.train_losses), color=INK, linewidth=1.5, label="train, smoothed")
    axes.plot(history.steps, history.losses, color=HELD_OUT, linewidth=1.5, label="held out")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, borderaxespad=0, ncols=2)


def _draw_accuracy(axes: Axes, history: History) -> None:
    """Held-out accuracy, the last value written at its end."""
    axes.set_title("Held-out accuracy", loc="left", fontsize=11, fontweight="bold")
    percent = [100 * value for value in history.accuracies]
    axes.plot(history.steps, percent, color=HELD_OUT, linewidth=1.5, marker="o", markersize=3)
    bottom = max(0.0, min(94.0, float(np.quantile(percent, 0.15)) - 2))
    axes.set_ylim(bottom, 100.4)
    axes.yaxis.set_major_formatter("{x:g} %")
    for step in _below(history.steps, percent, bottom):
        value = percent[history.steps.index(step)]
        axes.annotate(
            f"↓ {value:.0f} %",
            (step, bottom),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=HELD_OUT,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1},
        )
    axes.annotate(
        f"{percent[-1]:.1f} %",
        (history.steps[-1], percent[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        color=HELD_OUT,
        annotation_clip=False,
    )


def _below(steps: Sequence[int], values: Sequence[float], bottom: float) -> list[int]:
    """The step of the lowest value in each later stretch that leaves the picture at its lower edge."""
    lowest: list[int] = []
    inside = True
    start = next((i for i, value in enumerate(values) if value >= bottom), len(values))
    for i, value in enumerate(values[start:], start):
        if value < bottom and (inside or value < values[steps.index(lowest[-1])]):
            lowest[len(lowest) - (not inside) :] = [steps[i]]
        inside = value >= bottom
    return lowest


def _smoothed(values: Sequence[float], weight: float = 0.8) -> np.ndarray:
    """A running geometric mean; each step before counts `weight` times as much as the next."""
    logs = np.log(np.maximum(values, 1e-12))
    for i in range(1, len(logs)):
        logs[i] = weight * logs[i - 1] + (1 - weight) * logs[i]
    return np.exp(logs)
