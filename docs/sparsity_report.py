"""The tables and sentences of docs/sparsity.md, from what the examples of sparse training left in docs/sparsity.json.

    PYTHONPATH=examples python docs/sparsity_report.py

Needs nothing but the file. Its numbers come from `python examples/sparse_digits.py --results=docs/sparsity.json
--picture=docs/images/sparse.png` and the same of `examples/sparse_lm.py` with `docs/images/sparse_lm.png`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import results
from measured import bullets, comparison, fill, table, versions, wrapped

PAGE = pathlib.Path(__file__).with_name("sparsity.md")
FILE = pathlib.Path(__file__).with_name("sparsity.json")
AIM = 0.01
"""How far below dense training pruning is to stay, as a share of the held-out images."""


def blocks(found: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Markdown: everything on the page that was measured."""
    digits, models = found["digits"], [found[name] for name in sorted(found) if name.startswith("lm_")]
    return {
        "digits_conditions": _digits_conditions(digits),
        "pruned": _digits_table(digits["runs"]["pruned"]),
        "pruned_says": _pruned_says(digits),
        "sparse": _digits_table(digits["runs"]["sparse"]),
        "masked": _digits_table(digits["runs"]["masked"]),
        "lm": "\n\n".join(f"{_lm_conditions(one)}\n\n{_lm_table(one['runs'])}" for one in models),
    }


def _digits_conditions(found: Mapping[str, Any]) -> str:
    given, config = found["conditions"], found["conditions"]["config"]
    plan, kernels, images = given["plan"], given["kernels"], given["images"]
    return bullets(
        f"Network, data and optimizer of `examples/digits.py`: {images['train']:,} images to train on, "
        f"{images['held_out']} held out, {config['batch_size']} a batch, `adamw` with a learning rate that rises to "
        f"`{config['learning_rate']}` over {config['warmup_steps']} steps and falls to `{config['end_learning_rate']}` "
        "by a cosine, after clipping by a global norm of 1.",
        f"{plan['num_steps']} steps, {plan['seeds']} seeds. A seed decides the first weights, the batches and the "
        "masks that are drawn; runs of the same seed are compared. One image is "
        f"{100 / images['held_out']:.2f} points of accuracy.",
        f"{len(kernels)} kernels of {sum(kernels.values()):,} weights in all. Hooks are due every {plan['every']} "
        f"steps, in the third comparison every {plan['often']}, and not after step {plan['last']}.",
        f"Pruning begins at step {plan['begin']} and reaches its target at step {plan['end']}.",
        f"Measured on {found['date']} with {versions(found)}.",
    )


def _digits_table(runs: Mapping[str, Sequence[results.Run]]) -> str:
    control = next(iter(runs))
    rows = [["", "held-out accuracy, %", "worst and best seed", f"points beside {control}", "held-out loss"]]
    for name, ones in runs.items():
        accuracies = results.last(ones, "accuracies")
        beside = "" if name == control else results.apart(ones, runs[control], "accuracies", 100.0, 2)
        span = f"{100 * min(accuracies):.2f} to {100 * max(accuracies):.2f}"
        loss = f"{results.mean(results.last(ones, 'losses')):.3f}"
        rows.append([name, f"{100 * results.mean(accuracies):.2f}", span, beside, loss])
    return table(rows)


def _pruned_says(found: Mapping[str, Any]) -> str:
    """Whether the aim was reached, by the mean and by the interval."""
    runs = found["runs"]["pruned"]
    gaps = results.differences(runs["pruned"], runs["dense"], "accuracies")
    centre, half = results.mean(gaps), results.interval(gaps)
    reached = "within" if centre >= -AIM else "not within"
    sure = "lies above" if centre - half >= -AIM else "does not lie wholly above"
    weights = sum(found["conditions"]["kernels"].values())
    left = round(weights * (1 - found["runs"]["pruned"]["pruned"][0]["fires"][-1]["sparsity"]))
    gap = f"{100 * abs(centre):.2f} points {'below' if centre < 0 else 'above'}"
    return wrapped(
        f"With {left:,} of {weights:,} kernel weights left, pruning ends {gap} dense training: {reached} the "
        f"{100 * AIM:g} point that was aimed at. The 95 % interval of the difference, {100 * (centre - half):+.2f} to "
        f"{100 * (centre + half):+.2f} points, {sure} -{100 * AIM:g}."
    )


def _lm_conditions(found: Mapping[str, Any]) -> str:
    given = found["conditions"]
    model, config, share = given["model"], given["config"], f"{100 * given['sparsity']:g} %"
    return f"`configs/lm.py:sparse`, {share} sparse:\n\n" + bullets(
        f"{model['layers']} scanned blocks of width {model['width']}, windows of {model['length']} bytes, "
        f"{config['batch_size']} a batch, {given['num_steps']} steps, {given['seeds']} seeds. The score is of a "
        f"held-out sample of {config['eval_windows']} windows.",
        f'{share} of the weights of the blocks\' kernels are zero, by `"erk"`, each layer of a stack apart. Masks move '
        f"every {given['every']} steps until step {given['end']}, at first a fraction of {given['fraction']}.",
        f"Measured on {found['date']} with {versions(found)}.",
    )


def _lm_table(runs: Mapping[str, Sequence[results.Run]]) -> str:
    names = ["held-out bits per byte", "best and worst seed", f"beside {next(iter(runs))}"]
    return comparison(runs, "bits", names, 1.0, 3)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), blocks(json.loads(FILE.read_text()))))
