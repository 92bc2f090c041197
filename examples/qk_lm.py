"""Trains the small language model at a deliberately high learning rate, with and without a bound on attention logits.

    python examples/qk_lm.py --results=docs/values.json --picture=docs/images/qk.png [--fast]

Adam at a rate of 0.1 lets queries and keys grow until attention looks at one byte alone, and learns hardly anything any
more. `QKClip` scales the two projections of a head down whenever its largest logit is beyond a bound, by what the train
step itself has seen. The control is the same run without it; a run at a tenth of the rate stands beside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import curves
import flax.linen as nn
import jax
import jax.numpy as jnp
import lm
import lm_train
import matplotlib
import ml_collections
import numpy as np
import optax
import plots
import results
from matplotlib.figure import Figure

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
METHODS = {"no bound": None, "QKClip(100)": 100.0, "QKClip(20)": 20.0, "a tenth of the rate": None}
STYLES: dict[str, dict[str, Any]] = {
    "no bound": {"color": plots.COLOURS[1], "linestyle": (0, (5, 1.5))},
    "QKClip(100)": {"color": plots.COLOURS[2], "linestyle": (0, (5, 1.2, 1, 1.2))},
    "QKClip(20)": {"color": plots.COLOURS[0]},
    "a tenth of the rate": {"color": plots.FAINT, "linestyle": (0, (1, 1.2))},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the measurement."""

    num_steps: int = 600
    learning_rate: float = 0.1
    warmup: int = 30
    batch_size: int = 16
    length: int = 64
    seeds: int = 5
    evaluations: int = 30


FAST = Plan(num_steps=12, warmup=4, seeds=1, evaluations=6)


def config_of(plan: Plan, seed: int) -> ml_collections.ConfigDict:
    """The small network of configs/lm.py, its layers not scanned."""
    config = runpy.run_path(str(ROOT / "configs" / "lm.py"))["get_config"]("sparse")
    config.seed, config.batch_size = seed, plan.batch_size
    config.model.length, config.model.scan_layers = plan.length, False
    return config


@functools.cache
def optimizer(plan: Plan, name: str) -> optax.GradientTransformation:
    """Adam under a warm-up, of a rate that stays."""
    rate = plan.learning_rate / 10 if name == "a tenth of the rate" else plan.learning_rate
    return optax.adam(optax.linear_schedule(0.0, rate, plan.warmup), b2=0.98)


def make_hooks(name: str, seed: int) -> fsh.SurgeryHooks:
    """The bound of a method: after every step, with the logits of that step."""
    hooks, tau = fsh.SurgeryHooks(seed=seed), METHODS[name]
    if tau is not None:
        clip = fsh.surgeries.QKClip(tau=tau)
        hooks.add("clip", clip, params=["**/query/*", "**/key/*"], when=fsh.every(1), figures=False)
    return hooks


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: fsh.TrainState, windows: jax.Array) -> tuple[fsh.TrainState, Any]:
    """One step of the optimizer on windows int32 [n, length + 1]; the largest logit of each head before it, a tree of
    the attentions.
    """

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, seen = state.apply_fn({"params": params}, windows[:, :-1], mutable="intermediates")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean() / math.log(2), seen["intermediates"]

    grads, max_logits = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), max_logits


def largest(max_logits: Any) -> jax.Array:
    """The largest logit of all heads."""
    return jnp.max(jnp.stack([jnp.max(leaf) for leaf in jax.tree.leaves(max_logits)]))


def train(plan: Plan, name: str, seed: int, advance: Callable[[], object]) -> dict[str, Any]:
    """One run, and what was measured of it."""
    config = config_of(plan, seed)
    partitioning, data = lm_train.make_partitioning(config), lm.load_data(config)
    model, sharding = lm_train.make_model(config, partitioning), lm_train.batch_sharding(partitioning)
    params = nn.unbox(lm_train.init_boxed(model, jax.random.key(seed)))
    state = fsh.TrainState.create(apply_fn=model.apply, params=params, tx=optimizer(plan, name))
    state, hooks = state.replace(step=jnp.int32(0)), make_hooks(name, seed)
    evaluate = lm_train.make_evaluate(state, partitioning, 64)
    found: dict[str, Any] = {"seed": seed, "steps": [], "bits": [], "logits": []}
    seen: list[jax.Array] = []  # still on the device
    for step in range(1, plan.num_steps + 1):
        state, max_logits = train_step(state, data.loader.batch(step - 1, sharding, 1)[0])
        state = hooks(step, state, max_logits=max_logits)
        seen.append(largest(max_logits))
        advance()
        if step % plan.evaluations == 0:
            found["steps"].append(step)
            found["bits"].append(round(float(evaluate(state, data.sample.tokens).mean()), 5))
            found["logits"].append(round(float(np.max(jax.device_get(seen))), 3))
            seen = []
    return found


def draw(path: pathlib.Path, runs: curves.Runs) -> None:
    """Held-out loss and largest logits, one above the other."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        upper.set_title("The language model at a learning rate of 0.1", loc="left", fontsize=11, fontweight="bold")
        curves.draw_scores(upper, runs, "bits", STYLES)
        upper.set_ylabel("held-out bits per byte")
        for name, ones in runs.items():
            steps, values = ones[0]["steps"], np.array([run["logits"] for run in ones])
            lower.fill_between(
                steps, values.min(0), values.max(0), color=STYLES[name]["color"], alpha=0.11, linewidth=0
            )
            lower.plot(steps, values.mean(0), linewidth=1.8, **STYLES[name])
        lower.set_yscale("log")
        lower.set_ylabel("largest attention logit")
        lower.set_xlabel("train steps applied")
        lower.xaxis.set_major_formatter("{x:,.0f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def main(arguments: Any) -> None:
    """Measures, keeps the numbers, draws, and prints what came out."""
    plan = FAST if arguments.fast else Plan()
    runs = results.run_all(METHODS, plan.seeds, plan.num_steps, functools.partial(train, plan))
    results.keep(arguments.results, "qk", {"conditions": dataclasses.asdict(plan), "runs": runs})
    if arguments.picture is not None:
        draw(arguments.picture, runs)
    for line in (
        *results.lines("qk", runs, "bits", 1.0, 3),
        *results.lines("largest logit", runs, "logits", 1.0, 1),
    ):
        print(line)


if __name__ == "__main__":
    main(results.arguments(__doc__))
