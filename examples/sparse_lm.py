"""Trains the small language model sparse from the start: RigL and SET beside masks that never move, at one sparsity.

    python examples/sparse_lm.py --results=runs/sparsity.json --picture=runs/sparse_lm.png [--sparsity=0.9]

Runs examples/lm.py on configs/lm.py:sparse with one of its three hooks enabled at a time, and dense. Prints held-out
bits per byte, keeps every number in a file beside those of other sparsities, and draws the curves of all of them.
"""

from __future__ import annotations

import argparse
import pathlib
import runpy
import tempfile
from typing import Any

import lm
import ml_collections
import results
import sparse_plots
from tqdm import tqdm

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
METHODS = {"static": "static", "SET": "set", "RigL": "rigl", "dense": None}
"""Method -> the hook of the config that is enabled. The first one is the control."""


def config_of(method: str, seed: int, steps: int, sparsity: float) -> ml_collections.ConfigDict:
    """The config of a run."""
    config = runpy.run_path(str(ROOT / "configs" / "lm.py"))["get_config"]("sparse")
    config.seed, config.num_steps = seed, steps
    config.eval_every = max(1, steps // 12)
    config.warmup_steps = min(config.warmup_steps, steps // 6)
    for name, hook in config.surgery.items():
        hook.enabled, hook.sparsity = name == METHODS[method], sparsity
    return config


def train(method: str, seed: int, steps: int, sparsity: float) -> dict[str, Any]:
    """One run, and what was measured of it."""
    config = config_of(method, seed, steps, sparsity)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        _, scores = lm.train(config, workdir)
        rows = lm.Curve(workdir / "curve.jsonl", steps).rows
        records = fsh.Ledger.read(workdir / "ledger.jsonl")
    return {
        "seed": seed,
        "steps": [row["step"] for row in rows],
        "bits": [round(row["held_out"], 5) for row in rows],
        "all_held_out": round(scores["lm/held_out"], 5),
        "fires": [results.fire_of(record) for record in records if record.event == "settled"],
    }


def measure(steps: int, seeds: int, sparsity: float) -> dict[str, Any]:
    """All runs, and their conditions."""
    lm.show = lambda record: None  # a hundred fires are not news
    todo = [(method, seed) for method in METHODS for seed in range(seeds)]
    runs: dict[str, Any] = {}
    with tqdm(todo, unit="run", disable=None, dynamic_ncols=True) as bar:
        for method, seed in bar:
            bar.set_description(f"{method}, seed {seed}")
            runs.setdefault(method, []).append(train(method, seed, steps, sparsity))
    return {"conditions": conditions(steps, seeds, sparsity), "runs": runs}


def conditions(steps: int, seeds: int, sparsity: float) -> dict[str, Any]:
    """What the runs have in common."""
    config = config_of("RigL", 0, steps, sparsity)
    hook = config.surgery.rigl
    chosen = ("batch_size", "learning_rate", "end_learning_rate", "warmup_steps", "weight_decay", "eval_windows")
    return {
        "num_steps": steps,
        "seeds": seeds,
        "every": round(hook.every_fraction * steps),
        "sparsity": hook.sparsity,
        "end": hook.end,
        "fraction": hook.fraction,
        "params": hook.params,
        "config": {name: config[name] for name in chosen},
        "model": {name: config.model[name] for name in ("length", "width", "layers", "heads", "mlp")},
        "files": config.data.max_files,
    }


def main(file: pathlib.Path, picture: pathlib.Path | None, steps: int, seeds: int, sparsity: float) -> None:
    """Measures, keeps the numbers, draws, and prints what came out."""
    with results.compiled_once():
        found = measure(steps, seeds, sparsity)
    results.keep(file, f"lm_{sparsity:g}", found)
    if picture is not None:
        sparse_plots.draw_lm(picture, results.language_models(file))
    for line in results.lines("bits per byte", found["runs"], "bits", 1.0, 3):
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--results", type=pathlib.Path, required=True, help="JSON file of all numbers, which is added to"
    )
    parser.add_argument("--picture", type=pathlib.Path, default=None, help="PNG of the curves")
    parser.add_argument("--sparsity", type=float, default=0.95, help="of the kernels of the blocks")
    parser.add_argument("--steps", type=int, default=600, help="train steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    arguments = parser.parse_args()
    main(arguments.results, arguments.picture, arguments.steps, arguments.seeds, arguments.sparsity)
