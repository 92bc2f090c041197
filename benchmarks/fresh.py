"""What the first steps of units that start anew look like, by what their second moments start from: docs/fresh.md.

python benchmarks/fresh.py [--draw]

Writes docs/fresh.json, docs/fresh.md and docs/images/fresh.png; with --draw the last two, from the first. Some minutes
on two cores. Needs the `examples` extra.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import pathlib
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from tqdm import tqdm

import flax_surgery_hooks as fsh
from flax_surgery_hooks.optax import ScaleByAdamPerElementState, adam_per_element

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
digits: Any = importlib.import_module("digits")
report: Any = importlib.import_module("fresh_report")

NO_EDIT, MEAN, INIT, PER_ELEMENT = report.VARIANTS
B2S = (0.999, 0.95)
FRACTION = 4  # one unit in so many starts anew


@dataclass(frozen=True)
class Plan:
    """How long everything takes, in train steps.

    Attributes:
      before: steps before units start anew.
      window: steps after it of which every update is looked at.
      tail: all steps after it.
      seeds: how often everything is run.
      counted: what Adam's count is set to before; None for what it is.
    """

    before: int = 1_500
    window: int = 50
    tail: int = 300
    seeds: int = 3
    counted: int | None = None


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Attributes:
      init: key -> params.
      loss: (params, batch) -> mean loss.
      batches: seed -> endless batches.
      held_out: a batch that is never trained on.
      units: leaves of a hidden layer -> the axis along which its units lie.
      rate: learning rate, constant.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[int], Iterator[Any]]
    held_out: Any
    units: Mapping[str, int] = field(hash=False)
    rate: float = 1e-3


# Digits


def digits_case() -> Case:
    """The network of examples/digits.py; its hidden layer has 256 units."""
    train, test = digits.load_data()

    def loss(params: Any, batch: Any) -> jax.Array:
        return digits.loss_and_hits(digits.MODEL.apply, params, batch)[0]

    units = {"Dense_0/kernel": 1, "Dense_0/bias": 0, "Dense_1/kernel": 0}
    return Case(digits.init_params, loss, lambda seed: digits.batches(train, 64, seed), test, units)


# Text


class Block(nn.Module):
    """A layer of a transformer; the hidden layer of its MLP is Dense_0 to Dense_1."""

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class ByteModel(nn.Module):
    """Logits [n, length, 256] of the next byte."""

    width: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, text):
        places = self.param("places", nn.initializers.normal(0.02), (1, text.shape[1], self.width))
        x = nn.Embed(256, self.width)(text) + places
        for _ in range(self.layers):
            x = Block()(x)
        return nn.Dense(256)(nn.LayerNorm()(x))


def text_case(length: int = 64, batch_size: int = 8) -> Case:
    """Bytes of the help topics that come with Python; the last tenth is held out."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()
    data = np.frombuffer(text, np.uint8)
    train, test = np.split(data, [len(data) * 9 // 10])
    model = ByteModel()

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].astype(jnp.int32)).mean()

    def windows(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return data[starts[:, None] + np.arange(length + 1)]

    def batches(seed: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        while True:
            yield windows(train, rng.integers(0, len(train) - length, batch_size))

    held_out = windows(test, np.linspace(0, len(test) - length - 1, 64).astype(int))
    units = {"Block_0/Dense_0/kernel": 1, "Block_0/Dense_0/bias": 0, "Block_0/Dense_1/kernel": 0}

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, length), jnp.int32))["params"]

    return Case(init, loss, batches, held_out, units)


# Runs


def mask(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Which elements belong to the units that start anew: the first quarter along an axis."""
    where = np.arange(shape[axis]) < shape[axis] // FRACTION
    return np.broadcast_to(where.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def restart(case: Case) -> Callable[..., Any]:
    """The surgery: the weights into and out of a quarter of the units are drawn as at first."""

    def start_anew(leaves, key):
        drawn = flatten_dict(case.init(key), sep="/")
        return {p: jnp.where(mask(leaf.shape, case.units[p]), drawn[p], leaf) for p, leaf in leaves.items()}

    return start_anew


def with_ages(opt_state: Any) -> Any:
    """The state of Adam as that of Adam per element, which are the same as long as nothing starts anew."""
    adam, *rest = opt_state
    age = jax.tree.map(lambda mu: jnp.full(mu.shape, adam.count, jnp.float32), adam.mu)
    return ScaleByAdamPerElementState(age, adam.mu, adam.nu), *rest


def counted(opt_state: Any, count: int | None) -> Any:
    """The state with another count, if one is given."""
    adam, *rest = opt_state
    return opt_state if count is None else (adam._replace(count=jnp.asarray(count, adam.count.dtype)), *rest)


class Runs:
    """All runs of one case and b2; they compile once."""

    def __init__(self, plan: Plan, case: Case, b2: float, bar: Any):
        self.plan, self.case, self.bar = plan, case, bar
        self.adam, self.per_element = optax.adam(case.rate, b2=b2), adam_per_element(case.rate, b2=b2)
        self.restart = restart(case)
        self.evaluate = jax.jit(case.loss)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def step(self, tx: Any, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any]:
        updates, opt_state = tx.update(jax.grad(self.case.loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updates

    def seed(self, seed: int) -> dict[str, dict[str, Any]]:
        """Per variant what `branch` finds; all go on from the same state, over the same batches."""
        batches = self.case.batches(seed)
        params = self.case.init(jax.random.key(seed))
        opt_state = self.adam.init(params)
        for _ in range(self.plan.before):
            params, opt_state, _ = self.step(self.adam, params, opt_state, next(batches))
            self.bar.update()
        opt_state = counted(opt_state, self.plan.counted)
        after = [next(batches) for _ in range(self.plan.tail)]
        key = jax.random.key(1_000 + seed)
        return {variant: self.branch(variant, params, opt_state, after, key) for variant in report.VARIANTS}

    def branch(self, variant: str, params: Any, opt_state: Any, batches: list[Any], key: Any) -> dict[str, Any]:
        """Sizes of updates, in learning rates, of each step of the window, and held-out losses."""
        tx = self.per_element if variant == PER_ELEMENT else self.adam
        opt_state = with_ages(opt_state) if variant == PER_ELEMENT else opt_state
        if variant != NO_EDIT:
            state = fsh.bind(params=params, opt_state=opt_state, tx=tx)
            fresh = "mean" if variant == MEAN else "init"
            state, _ = fsh.operate(state, self.restart, params=list(self.case.units), fresh=fresh, key=key)
            params, opt_state = state.params, state.opt_state
        found: dict[str, list[float]] = {"loss": [float(self.evaluate(params, self.case.held_out))]}
        for number, batch in enumerate(batches, 1):
            params, opt_state, updates = self.step(tx, params, opt_state, batch)
            self.bar.update()
            if number <= self.plan.window:
                for name, size in self.sizes(updates).items():
                    found.setdefault(name, []).append(size)
            if number in (self.plan.window, self.plan.tail):
                found["loss"].append(float(self.evaluate(params, self.case.held_out)))
        return found

    def sizes(self, updates: Any) -> dict[str, float]:
        """99th percentile and maximum of |update| over what starts anew, or would, and over all else."""
        leaves = flatten_dict(jax.device_get(updates), sep="/")
        parts: dict[str, list[np.ndarray]] = {"fresh": [], "untouched": []}
        for path, leaf in leaves.items():
            axis = self.case.units.get(path)
            ours = np.zeros(leaf.shape, bool) if axis is None else mask(leaf.shape, axis)
            parts["fresh"].append(np.abs(leaf[ours]))
            parts["untouched"].append(np.abs(leaf[~ours]))
        found = {}
        for name, arrays in parts.items():
            every = np.concatenate(arrays) / self.case.rate
            found[f"{name}/p99"] = float(np.percentile(every, 99))
            found[f"{name}/max"] = float(every.max())
        return found


CASES: dict[str, Callable[[], Case]] = {"digits": digits_case, "text": text_case}


def conditions(plan: Plan) -> dict[str, Any]:
    return {"plan": asdict(plan), "b2": list(B2S), "rate": Case.rate, "fraction": FRACTION}


def measure(plan: Plan, cases: Mapping[str, Callable[[], Case]] = CASES, b2s: tuple[float, ...] = B2S) -> Any:
    """Runs everything; returns the figures as docs/fresh.json holds them."""
    steps = plan.before + len(report.VARIANTS) * plan.tail
    runs: dict[str, Any] = {}
    with tqdm(total=steps * plan.seeds * len(cases) * len(b2s), unit="step", disable=None, dynamic_ncols=True) as bar:
        for name, make in cases.items():
            case = make()
            for b2 in b2s:
                bar.set_description(f"{name}, b2 {b2}")
                one = Runs(plan, case, b2, bar)
                found = [one.seed(seed) for seed in range(plan.seeds)]
                runs[f"{name}/{b2}"] = {variant: _joined([f[variant] for f in found]) for variant in report.VARIANTS}
    return {"conditions": conditions(plan), "runs": runs}


def _joined(found: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Per figure the seeds' curves below each other, in four digits."""
    return {name: [[float(f"{value:.4g}") for value in one[name]] for one in found] for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="the page and the picture from docs/fresh.json")
    docs = ROOT / "docs"
    if not parser.parse_args().draw:
        (docs / "fresh.json").write_text(report.dump(measure(Plan())))
    figures = json.loads((docs / "fresh.json").read_text())
    (docs / "images").mkdir(exist_ok=True)
    report.draw(docs / "images" / "fresh.png", figures)
    (docs / "fresh.md").write_text(report.page(figures))
    print(report.page(figures))


if __name__ == "__main__":
    main()
