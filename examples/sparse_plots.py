"""The pictures of sparse_digits.py and sparse_lm.py: held-out scores over steps, and what the masks did below them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import curves
import matplotlib
import numpy as np
import plots
import results
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
            curves.draw_scores(upper, runs, "accuracies", STYLES, scale=100.0, form="{:.1f}")
            _draw_masks(lower, runs, "sparsity" if group == "pruned" else "overlap", given["plan"]["num_steps"])
            lower.set_xlabel("train steps applied")
        panels[0][0].set_ylabel("held-out accuracy, %")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_lm(path: pathlib.Path, measured: Sequence[Mapping[str, Any]]) -> None:
    """Held-out bits per byte of the language model, and the overlap of masks below.

    Args:
      path: of the PNG.
      measured: what `sparse_lm.measure` returned, for each sparsity.
    """
    with matplotlib.rc_context(plots.STYLE):
        width = 2 + 5.5 * len(measured)
        figure = Figure(figsize=(width, 5.8), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1))
        panels = figure.subplots(2, len(measured), sharex="col", height_ratios=(2.6, 1), squeeze=False)
        for (upper, lower), found in zip(panels.T, measured, strict=True):
            runs, given = found["runs"], found["conditions"]
            sparse = {name: ones for name, ones in runs.items() if name != "dense"}
            title = f"Language model, sparse from the start, {100 * given['sparsity']:g} %"
            upper.set_title(title, loc="left", fontsize=11, fontweight="bold")
            curves.draw_scores(upper, sparse, "bits", STYLES, form="{:.3f}")
            level = results.mean(results.last(runs["dense"], "bits"))
            upper.text(0.01, 0.03, f"↓ dense {level:.3f}, below this picture", transform=upper.transAxes)
            _draw_masks(lower, sparse, "overlap", given["num_steps"])
            lower.set_xlabel("train steps applied")
        panels[0][0].set_ylabel("held-out bits per byte")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_masks(axes: Axes, runs: curves.Runs, what: str, num_steps: int) -> None:
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
