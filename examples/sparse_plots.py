"""The pictures of sparse_digits.py and sparse_lm.py: held-out scores over steps, and what the masks did below them."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import plots
import sparse_results as results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

STYLES: dict[str, dict[str, Any]] = {  # told apart by colour, by dashes and by brightness
    "dense": {"color": plots.FAINT, "linestyle": (0, (1, 1.2))},
    "pruned": {"color": plots.COLOURS[0]},
    "static": {"color": plots.FAINT, "linestyle": (0, (1, 1.2))},
    "SET": {"color": plots.COLOURS[1], "linestyle": (0, (5, 1.5))},
    "RigL": {"color": plots.COLOURS[0]},
    "enforced": {"color": plots.COLOURS[0]},
    "straight-through": {"color": plots.COLOURS[1], "linestyle": (0, (5, 1.5))},
}
TITLES = {
    "pruned": "Pruned to {:g} % beside dense",
    "sparse": "Sparse from the start, {:g} %",
    "masked": "Enforced or straight-through, {:g} %",
}
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def draw_digits(path: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Held-out accuracy of the three comparisons, and sparsity or overlap of masks below.

    Args:
      path: of the PNG.
      found: what `sparse_digits.measure` returns.
    """
    groups, given = found["runs"], found["conditions"]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(15, 6.2), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1))
        panels = figure.subplots(2, len(groups), sharex=True, height_ratios=(2.6, 1), squeeze=False)
        for (upper, lower), (group, runs) in zip(panels.T, groups.items(), strict=True):
            title = TITLES[group].format(100 * given["sparsity"][group])
            upper.set_title(title, loc="left", fontsize=11, fontweight="bold")
            _draw_scores(upper, runs, "accuracies", 100.0, "{:.1f}")
            _draw_masks(lower, runs, "sparsity" if group == "pruned" else "overlap", given["plan"]["num_steps"])
            lower.set_xlabel("train steps applied")
        panels[0][0].set_ylabel("held-out accuracy, %")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_lm(path: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Held-out bits per byte of the language model, and the overlap of masks below.

    Args:
      path: of the PNG.
      found: what `sparse_lm.measure` returns.
    """
    runs, given = found["runs"], found["conditions"]
    sparse = {name: ones for name, ones in runs.items() if name != "dense"}
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(9, 5.8), dpi=150, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
        title = f"Language model, sparse from the start: {100 * given['sparsity']:g} % of the kernels of its blocks"
        upper.set_title(title, loc="left", fontsize=11, fontweight="bold")
        _draw_scores(upper, sparse, "bits", 1.0, "{:.3f}")
        upper.set_ylabel("held-out bits per byte")
        if "dense" in runs:
            level = results.mean(results.last(runs["dense"], "bits"))
            upper.text(0.01, 0.03, f"↓ dense {level:.3f}, below this picture", transform=upper.transAxes)
        _draw_masks(lower, sparse, "overlap", given["num_steps"])
        lower.set_xlabel("train steps applied")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_scores(axes: Axes, runs: Runs, what: str, scale: float, form: str) -> None:
    """The mean over seeds of each method, the range in which its runs are, and the last mean as a label."""
    ends = {}
    for name, ones in runs.items():
        steps, values = ones[0]["steps"], scale * np.array([run[what] for run in ones])
        axes.fill_between(steps, values.min(0), values.max(0), color=STYLES[name]["color"], alpha=0.11, linewidth=0)
        axes.plot(steps, values.mean(0), linewidth=1.8, **STYLES[name])
        ends[name] = float(values.mean(0)[-1])
    axes.set_ylim(*_limits(runs, what, scale))
    low, high = axes.get_ylim()
    spread = dict(zip(ends, _apart(list(ends.values()), 0.062 * (high - low)), strict=True))
    for name, end in ends.items():
        text = f"{name} {form.format(end)}"
        _label(axes, runs[name][0]["steps"][-1], spread[name], text, STYLES[name]["color"])


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


def _draw_masks(axes: Axes, runs: Runs, what: str, num_steps: int) -> None:
    """Sparsity, which changes in jumps, or the share of kept weights that the fire before kept too."""
    for name, ones in runs.items():
        fires = ones[0]["fires"]
        if not fires:
            continue
        steps = [fire["step"] for fire in fires]
        values = 100 * np.array([[fire[what] for fire in run["fires"]] for run in ones]).mean(0)
        if what == "sparsity":
            axes.step([0, *steps, num_steps], [0, *values, values[-1]], where="post", linewidth=1.4, **STYLES[name])
        else:
            axes.plot(steps, values, linewidth=1.4, **STYLES[name])
    axes.set_xlim(0, num_steps)
    axes.set_ylabel("sparsity, %" if what == "sparsity" else "masks kept, %")
    axes.set_ylim(0 if what == "sparsity" else None, 103 if what == "sparsity" else None)
    axes.xaxis.set_major_formatter("{x:,.0f}")
