"""The numbers of the examples that compare runs: the file that keeps them, and what they say of differences."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import curves
import jax
from tqdm import tqdm

import flax_surgery_hooks as fsh

PACKAGES = ("jax", "flax", "optax", "flax_surgery_hooks")
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Degrees of freedom -> the 97.5 % quantile of Student's t."""
_CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
Run = Mapping[str, Any]


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Within, no program is compiled twice: the runs of a method differ in their seeds alone."""
    with tempfile.TemporaryDirectory() as folder:
        before = {name: getattr(jax.config, name) for name in _CACHE}
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


def keep(path: pathlib.Path, name: str, found: Mapping[str, Any]) -> None:
    """Puts a measurement into a file, with its date and versions, and leaves the others there as they are."""
    every = json.loads(path.read_text()) if path.exists() else {}
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    every[name] = {"date": today, "versions": versions, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(every))


def language_models(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """What a file holds of the language model, by sparsity."""
    every = json.loads(path.read_text())
    return [every[name] for name in sorted(every) if name.startswith("lm_")]


def dump(found: Mapping[str, Any]) -> str:
    r"""JSON with one line for each list of numbers, and for each object that holds nothing but numbers and texts.

    >>> dump({"runs": [{"steps": [1, 2]}]})
    '{\n "runs": [\n  {\n   "steps": [1, 2]\n  }\n ]\n}\n'
    """
    text = json.dumps(found, indent=1)
    flat = re.compile(r"[\[{][^\[\]{}]*[\]}]")
    return flat.sub(lambda match: re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n"


def fire_of(record: fsh.Record) -> dict[str, float]:
    """What a fire did to the masks: the share that is dropped, and the share of the kept ones that was kept before."""
    sparsity, overlap = (float(record.figures[f"masks/{name}"]) for name in ("sparsity", "overlap"))
    return {"step": record.step or 0, "sparsity": round(sparsity, 6), "overlap": round(overlap, 6)}


def last(runs: Sequence[Run], what: str) -> list[float]:
    """The last value of a curve, for each seed."""
    return [run[what][-1] for run in runs]


def mean(values: Sequence[float]) -> float:
    """The mean.

    >>> mean([1.0, 2.0])
    1.5
    """
    return sum(values) / len(values)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of a mean: infinite for a single value.

    >>> round(interval([1.0, 2.0, 3.0]), 3), interval([1.0])
    (2.484, inf)
    """
    count = len(values)
    if count < 2:
        return math.inf
    centre = mean(values)
    deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / (count - 1))
    return T_95[count - 1] * deviation / math.sqrt(count)


def differences(runs: Sequence[Run], control: Sequence[Run], what: str) -> list[float]:
    """By how much each run ends above the control run of the same seed."""
    assert [run["seed"] for run in runs] == [run["seed"] for run in control]
    return [a - b for a, b in zip(last(runs, what), last(control, what), strict=True)]


def lines(group: str, runs: Mapping[str, Sequence[Run]], what: str, scale: float, digits: int) -> list[str]:
    """What a comparison found, a line for each method; the first method is the control."""
    control = next(iter(runs))
    found = []
    for name, ones in runs.items():
        line = f"{group}, {name}: {scale * mean(last(ones, what)):.{digits}f}, {len(ones)} seeds"
        if name != control:
            line += f", {apart(ones, runs[control], what, scale, digits)} beside {control}"
        found.append(line)
    return found


def apart(runs: Sequence[Run], control: Sequence[Run], what: str, scale: float, digits: int) -> str:
    """The mean difference to the control, and its 95 % interval.

    >>> runs = [{"seed": seed, "accuracies": [0.9 + 0.01 * seed]} for seed in range(3)]
    >>> apart(runs, [{**run, "accuracies": [0.9]} for run in runs], "accuracies", 100.0, 2)
    '+1.00 ± 2.48'
    """
    found = differences(runs, control, what)
    return f"{scale * mean(found):+.{digits}f} ± {scale * interval(found):.{digits}f}"


def run_all(
    methods: Sequence[str] | Mapping[str, Any],
    seeds: int,
    num_steps: int,
    train: Callable[[str, int, Callable[[], object]], dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Runs each method with each seed, under a progress bar.

    Args:
      methods: their names, the control first.
      seeds: how many.
      num_steps: of a run, for the bar.
      train: from the name of a method, a seed, and what to call after each step to what was measured of the run.

    Returns:
      Name -> what was measured, for each seed.
    """
    runs = {}
    with compiled_once(), tqdm(total=len(methods) * seeds * num_steps, unit="step", disable=None) as bar:
        for name in methods:
            bar.set_description(name)
            runs[name] = [train(name, seed, bar.update) for seed in range(seeds)]
    return runs


def curve(seed: int, scores: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    """What is kept of a run.

    Args:
      seed: of the run.
      scores: step -> held-out loss and accuracy, arrays that may still be on the device.

    >>> curve(0, {10: (1.5, 0.25)})
    {'seed': 0, 'steps': [10], 'losses': [1.5], 'accuracies': [0.25]}
    """
    losses, accuracies = zip(*jax.device_get(list(scores.values())), strict=True)
    return {
        "seed": seed,
        "steps": list(scores),
        "losses": [round(float(loss), 5) for loss in losses],
        "accuracies": [round(float(accuracy), 5) for accuracy in accuracies],
    }


def report(
    arguments: argparse.Namespace,
    name: str,
    title: str,
    plan: Any,
    runs: Mapping[str, Sequence[Run]],
    styles: Mapping[str, Any],
) -> None:
    """Keeps the numbers of a comparison, draws its held-out accuracies, and prints what came out.

    Args:
      arguments: those of the command line, see `arguments`.
      name: of the measurement in the file.
      title: of the picture.
      plan: a dataclass of the sizes of the measurement.
      runs: method -> what `curve` keeps of its runs, the control first.
      styles: method -> how its line looks.
    """
    keep(arguments.results, name, {"conditions": dataclasses.asdict(plan), "runs": runs})
    if arguments.picture is not None:
        label = "held-out accuracy, %"
        curves.draw(arguments.picture, title, label, runs, "accuracies", styles, scale=100.0, form="{:.1f}")
    print("\n".join(lines(name, runs, "accuracies", 100.0, 2)))


def arguments(doc: str | None) -> argparse.Namespace:
    """What such an example is given on the command line: `results`, `picture`, `fast`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, required=True, help="JSON file of all numbers, is added to")
    parser.add_argument("--picture", type=pathlib.Path, default=None, help="PNG of the curves")
    parser.add_argument("--fast", action="store_true", help="few steps and one seed, to see that it runs")
    return parser.parse_args()
