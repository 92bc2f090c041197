"""Curves of methods that are compared: means and ranges over seeds, with the last mean as a label."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def draw_scores(
    axes: Axes, runs: Runs, what: str, styles: Mapping[str, Any], *, scale: float = 1.0, form: str = "{:.2f}"
) -> None:
    """The mean over seeds of each method, the range in which its runs are, and the last mean as a label.

    Args:
      axes: where to draw.
      runs: method -> runs, each with `steps` and, by the name `what`, as many values.
      what: which values; of "accuracies" more is better.
      styles: method -> how its line looks.
      scale: what the values are multiplied by.
      form: of the last mean.
    """
    ends = {}
    for name, ones in runs.items():
        steps, values = ones[0]["steps"], scale * np.array([run[what] for run in ones])
        axes.fill_between(steps, values.min(0), values.max(0), color=styles[name]["color"], alpha=0.11, linewidth=0)
        axes.plot(steps, values.mean(0), linewidth=1.8, **styles[name])
        ends[name] = float(values.mean(0)[-1])
    axes.set_ylim(*_limits(runs, what, scale))
    low, high = axes.get_ylim()
    spread = dict(zip(ends, _apart(list(ends.values()), 0.062 * (high - low)), strict=True))
    for name, end in ends.items():
        text = f"{name} {form.format(end)}"
        _label(axes, runs[name][0]["steps"][-1], spread[name], text, styles[name]["color"])


def _label(axes: Axes, step: float, height: float, text: str, colour: str) -> None:
    """A text right of the end of a curve."""
    axes.annotate(
        text,
        (step, height),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=plots.INK if colour == plots.FAINT else colour,
        fontweight="bold",
        annotation_clip=False,
    )


def _limits(runs: Runs, what: str, scale: float) -> tuple[float, float]:
    """Around the second half of the curves, up to the best score of all: worse ones before it leave the picture."""
    late = scale * np.concatenate(
        [np.array(run[what])[len(run[what]) // 2 :] for ones in runs.values() for run in ones]
    )
    every = scale * np.concatenate([run[what] for ones in runs.values() for run in ones])
    low, high = (late.min(), every.max()) if what == "accuracies" else (every.min(), late.max())
    margin = 0.04 * max(high - low, 0.01 * scale)
    return float(low - margin), float(high + margin)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels, moved until neighbours are a gap apart, around where they were.

    >>> _apart([1.0, 1.0, 5.0], 1.0)
    [0.5, 1.5, 5.0]
    """
    found = np.array(heights, float)
    for _ in range(50):
        order = np.argsort(found, kind="stable")
        for below, above in itertools.pairwise(order):
            push = (gap - (found[above] - found[below])) / 2
            if push > 1e-9:
                found[below], found[above] = found[below] - push, found[above] + push
    return [float(height) for height in found]


def draw(
    path: pathlib.Path, title: str, label: str, runs: Runs, what: str, styles: Mapping[str, Any], **form: Any
) -> None:
    """One picture of one comparison.

    Args:
      path: of the PNG.
      title: what is compared.
      label: of the values, with their unit.
      runs: as for `draw_scores`, and so are `what`, `styles` and `form`.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        draw_scores(axes, runs, what, styles, **form)
        axes.set_ylabel(label)
        axes.set_xlabel("train steps applied")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
