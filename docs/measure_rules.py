"""Measures what the rules for optimizer slots do to a training run, for docs/rules.md.

    python docs/measure_rules.py

It writes docs/rules.json, docs/images/rules.png and the tables of docs/rules.md. Data, network and optimizer are those
of examples/digits.py; a plain network under plain Adam is measured beside it. Needs the `examples` extra.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import pathlib
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from tqdm import tqdm

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs")]
digits: Any = importlib.import_module("digits")
report: Any = importlib.import_module("rules_report")
picture: Any = importlib.import_module("rules_plot")

RULES = ("carry", "keep", "transport", "reset")
NO_EDIT = "no edit"
FRESH = ("mean", "init")
DIGITS_RUN, UNCLIPPED, PLAIN_ADAM = "digits run", "digits run without clipping", "plain Adam"
PLAIN_RATE = 1e-3
B1, B2, EPS = 0.9, 0.999, 1e-8  # Adam's defaults, which all runs use


@dataclass(frozen=True)
class Plan:
    """When what is done, in train steps applied so far.

    Attributes:
      num_steps: length of a run.
      every: the kernel is normalised at every multiple of this before the end.
      reinit_at: when a layer starts anew, in the digits run and under plain Adam.
      window: over how many steps figures are taken.
      tail: how many steps follow a re-initialisation.
      seeds: how often everything is run.
    """

    num_steps: int = 1_500
    every: int = 200
    reinit_at: tuple[int, int] = (700, 1_000)
    window: int = 50
    tail: int = 200
    seeds: int = 5


@dataclass(frozen=True)
class Case:
    """A network, its optimizer, and what is edited.

    Attributes:
      model: the network.
      optimizer: its name.
      kernel: the kernel that is normalised.
      reinits: the layers that start anew, each in a branch of its own.
    """

    model: nn.Module
    optimizer: str
    kernel: str
    reinits: tuple[str, ...] = ()


class Network(nn.Module):
    """Hidden layer and head of the digits run; `conv`: after its convolutions; `norm`: with a LayerNorm between."""

    conv: bool = False
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        """Logits [n, 10] of images [n, 8, 8, 1]."""
        for features in (32, 64) if self.conv else ():
            x = nn.avg_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.Dense(256, use_bias=not self.norm)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.relu(nn.LayerNorm()(x) if self.norm else x))


CASES = {
    "head": Case(digits.MODEL, DIGITS_RUN, "Dense_1/kernel", ("Dense_0", "Dense_1")),
    "head_adam": Case(Network(), PLAIN_ADAM, "Dense_1/kernel", ("Dense_0",)),
    "norm": Case(Network(conv=True, norm=True), DIGITS_RUN, "Dense_0/kernel"),
    "norm_unclipped": Case(Network(conv=True, norm=True), UNCLIPPED, "Dense_0/kernel"),
    "norm_adam": Case(Network(norm=True), PLAIN_ADAM, "Dense_0/kernel"),
}

Curves = dict[tuple[str, ...], list[Any]]
"""(case, rule, what) or (case, layer, fresh, what) -> per seed a curve, or a number."""


# Measuring


def read_config() -> Any:
    """The config of the digits run."""
    return runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()


def conditions(plan: Plan) -> dict[str, Any]:
    """What the figures depend on."""
    names = ("learning_rate", "end_learning_rate", "warmup_steps", "weight_decay", "batch_size")
    config = read_config()
    run = {name: config[name] for name in names}
    return json.loads(json.dumps({"plan": asdict(plan), "plain_adam": PLAIN_RATE, "digits_run": run}))


def optimizer(name: str, num_steps: int) -> optax.GradientTransformation:
    """An optimizer by its name in `Case`."""
    config = read_config()
    config.num_steps = num_steps
    if name == PLAIN_ADAM:
        return optax.adam(PLAIN_RATE)
    if name == DIGITS_RUN:
        return digits.create_state(config).tx
    rates = (0.0, config.learning_rate, config.warmup_steps, num_steps, config.end_learning_rate)
    return optax.adamw(optax.warmup_cosine_decay_schedule(*rates), weight_decay=config.weight_decay)


def init_params(model: nn.Module, key: jax.Array) -> Any:
    """Fresh params of a network."""
    return model.init(key, jnp.zeros((1, 8, 8, 1)))["params"]


@functools.cache
def reinit_surgery(model: nn.Module) -> fsh.surgeries.Reinit:
    """The same object for the same network, so that its programs are compiled once."""
    return fsh.surgeries.Reinit(init=lambda key: init_params(model, key))


@jax.jit
def unit_updates(state: Any) -> Any:
    """Size of the last update of every element in units of the learning rate, before weight decay."""

    def size(mu: jax.Array, nu: jax.Array) -> jax.Array:
        return jnp.abs(mu / (1 - B1**state.step)) / (jnp.sqrt(nu / (1 - B2**state.step)) + EPS)

    mu, nu = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))
    return jax.tree.map(size, mu, nu)


class Runs:
    """The runs of one case and seed; they share batches, and all steps before their first edit."""

    def __init__(self, plan: Plan, case: Case, seed: int, bar: Any):
        self.plan, self.case, self.seed, self.bar = plan, case, seed, bar
        self.reinit_at = plan.reinit_at[case.optimizer == PLAIN_ADAM]
        train_split, self.test_split = digits.load_data()
        batches = digits.batches(train_split, read_config().batch_size, seed)
        self.batches = list(itertools.islice(batches, plan.num_steps + plan.tail))
        params = init_params(case.model, jax.random.key(seed))
        tx = optimizer(case.optimizer, plan.num_steps)
        self.start = fsh.TrainState.create(apply_fn=case.model.apply, params=params, tx=tx)

    def train(self, state: Any, steps: range, watch: Any = None) -> tuple[Any, list[jax.Array]]:
        """Trains over these batches, and calls `watch(state)` after each; the given state stays alive."""
        state, losses = jax.tree.map(jnp.copy, state), []
        for step in steps:
            state, loss = digits.train_step(state, self.batches[step])
            losses.append(loss)
            if watch is not None:
                watch(state)
        self.bar.update(len(steps))
        return state, losses

    def unedited(self) -> tuple[dict[int, Any], dict[str, Any]]:
        """The states before edits of a run without any, and what was measured."""
        stops = sorted({self.plan.every, self.reinit_at, self.plan.num_steps})
        state, states, losses = self.start, {}, []
        for start, stop in itertools.pairwise([0, *stops]):
            state, more = self.train(state, range(start, stop))
            states[stop] = state
            losses += more
        return states, {"loss": _read(losses), "accuracy": self.accuracy(state)}

    def normalize(self, state: Any, rule: str) -> dict[str, Any]:
        """Losses from the first fire on, mean size of the kernel's updates in the window after it, the kernel's norm
        before the last fire, and accuracy.
        """
        losses: list[jax.Array] = []
        sizes: list[float] = []

        def watch(state: Any) -> None:
            sizes.append(float(flatten_dict(unit_updates(state), sep="/")[self.case.kernel].mean()))

        for fire in range(self.plan.every, self.plan.num_steps, self.plan.every):
            state, record = fsh.operate(state, fsh.surgeries.Normalize(), params=self.case.kernel, opt_state=rule)
            middle, end = fire + self.plan.window, min(fire + self.plan.every, self.plan.num_steps)
            state, more = self.train(state, range(fire, middle), None if losses else watch)
            state, rest = self.train(state, range(middle, end))
            losses += [*more, *rest]
        norm = float(record.figures["params/norm_before"])
        return {"loss": _read(losses), "size": np.mean(sizes), "norm": norm, "accuracy": self.accuracy(state)}

    def reinit(self, state: Any, layer: str, fresh: str) -> dict[str, np.ndarray]:
        """Losses after a layer started anew, and 99th percentiles of update sizes, fresh and untouched elements."""
        surgery, key = reinit_surgery(self.case.model), jax.random.key(1_000 + self.seed)
        state, _ = fsh.operate(state, surgery, params=f"{layer}/*", fresh=fresh, key=key)
        percentiles: list[tuple[float, float]] = []

        def watch(state: Any) -> None:
            sizes = jax.device_get(unit_updates(state))
            ours = [np.ravel(leaf) for leaf in jax.tree.leaves(sizes.pop(layer))]
            others = [np.ravel(leaf) for leaf in jax.tree.leaves(sizes)]
            percentiles.append((np.percentile(np.concatenate(ours), 99), np.percentile(np.concatenate(others), 99)))

        start, middle = self.reinit_at, self.reinit_at + self.plan.window
        state, losses = self.train(state, range(start, middle), watch)
        _, rest = self.train(state, range(middle, start + self.plan.tail))
        ours, others = np.array(percentiles).T
        return {"loss": _read([*losses, *rest]), "fresh": ours, "untouched": others}

    def accuracy(self, state: Any) -> float:
        """On the held-out split."""
        return float(digits.evaluate(state, self.test_split)[1])


def _read(losses: Sequence[jax.Array]) -> np.ndarray:
    return np.array(jax.device_get(losses))


def measure(plan: Plan, cases: Mapping[str, Case] = CASES) -> tuple[dict[str, Any], Curves]:
    """Runs everything; returns the figures as docs/rules.json holds them, and the curves."""
    curves: Curves = {}
    branches = len(RULES) * (plan.num_steps - plan.every) + plan.num_steps
    total = plan.seeds * sum(branches + len(FRESH) * len(case.reinits) * plan.tail for case in cases.values())
    with tqdm(total=total, desc="measure", unit="step", disable=None, dynamic_ncols=True) as bar:
        for seed, (name, case) in itertools.product(range(plan.seeds), cases.items()):
            runs = Runs(plan, case, seed, bar)
            states, base = runs.unedited()
            _note(curves, (name, NO_EDIT), base)
            for rule in RULES:
                found = runs.normalize(states[plan.every], rule)
                found["loss"] = np.concatenate([base["loss"][: plan.every], found["loss"]])
                _note(curves, (name, rule), found)
            for layer, fresh in itertools.product(case.reinits, FRESH):
                _note(curves, (name, layer, fresh), runs.reinit(states[runs.reinit_at], layer, fresh))
    return {"conditions": conditions(plan), **report.figures(curves, plan.every, plan.window)}, curves


def _note(curves: Curves, names: tuple[str, ...], found: Mapping[str, Any]) -> None:
    for what, value in found.items():
        curves.setdefault((*names, what), []).append(value)


def main() -> None:
    """Measures, and writes everything that docs/rules.md shows."""
    plan = Plan()
    figures, curves = measure(plan)
    docs = ROOT / "docs"
    (docs / "rules.json").write_text(report.dump(figures))
    (docs / "images").mkdir(exist_ok=True)
    picture.draw(docs / "images" / "rules.png", curves, plan.every, plan.window)
    page = docs / "rules.md"
    page.write_text(report.fill(page.read_text(), figures))
    print(*report.blocks(figures).values(), sep="\n\n")


if __name__ == "__main__":
    main()
