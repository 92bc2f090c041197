"""Trains a network on one task after another, with and without units that are drawn anew, and sees how well it learns.

    python examples/plasticity_digits.py --results=docs/values.json --picture=docs/images/plasticity.png [--fast]

Each task shows the digits with their pixels in another order, for a few hundred steps of Adam; what is scored is the
held-out accuracy at its end. A network that is trained on and on learns ever less. `RecycleDormant` draws units anew
that have fallen silent, `ContinualBackprop` those of least use, in the jitted loop over the steps of a task.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import digits
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
import results

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import ContinualBackprop, RecycleDormant

STYLES = {
    "plain": {"color": plots.COLOURS[1], "linestyle": (0, (5, 1.5))},
    "RecycleDormant": {"color": plots.COLOURS[2], "linestyle": (0, (5, 1.2, 1, 1.2))},
    "ContinualBackprop": {"color": plots.COLOURS[0]},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the measurement.

    Attributes:
      tasks: how many orders of the pixels.
      block: of how many tasks the mean is one point of a curve.
      task_steps: train steps of each.
      every: steps from one fire of `RecycleDormant` to the next.
      tau: the largest score of a unit that it draws anew.
      rate: share of the units that `ContinualBackprop` draws anew, at each step.
      seeds: how many runs of each method.
    """

    tasks: int = 150
    block: int = 10
    task_steps: int = 150
    every: int = 150
    tau: float = 0.05
    rate: float = 1e-3
    seeds: int = 5
    learning_rate: float = 5e-3
    batch_size: int = 32


FAST = Plan(tasks=4, block=2, task_steps=20, every=10, seeds=1)


class Network(nn.Module):
    """Two hidden layers of ReLU units, which are sown."""

    features: int = 64

    @nn.compact
    def __call__(self, x):
        """Logits [n, 10] of pixels [n, 64]."""
        for layer in ("first", "second"):
            x = nn.relu(nn.Dense(self.features, name=layer)(x))
            self.sow("intermediates", f"{layer}_units", x)
        return nn.Dense(10, name="head")(x)


MODEL = Network()


def init_params(key: jax.Array) -> Any:
    """Fresh params; units that are drawn anew come from here too."""
    return MODEL.init(key, jnp.zeros((1, 64)))["params"]


@functools.cache
def units() -> tuple[fsh.units.Units, ...]:
    """The hidden units, with what makes them and what reads them, found by derivatives."""
    pixels = jax.random.normal(jax.random.key(0), (8, 64))
    return fsh.units.find(
        lambda params: fsh.units.capture(MODEL, {"params": params}, pixels), init_params(jax.random.key(1))
    )


@functools.cache
def optimizer(plan: Plan) -> optax.GradientTransformation:
    """One for all runs."""
    return optax.adam(plan.learning_rate)


def make_hooks(plan: Plan, name: str, seed: int) -> fsh.SurgeryHooks:
    """The hook of a method, if it has one."""
    hooks, seen = fsh.SurgeryHooks(seed=seed), fsh.units.activations(MODEL, lambda batch: batch[0])
    quiet: dict[str, Any] = {"params": "**", "figures": False, "guard": "off"}
    if name == "RecycleDormant":
        hooks.add(
            "recycle", RecycleDormant(units(), init_params, seen, tau=plan.tau), when=fsh.every(plan.every), **quiet
        )
    if name == "ContinualBackprop":
        hooks.add("replace", ContinualBackprop(units(), init_params, seen, rate=plan.rate), when=fsh.every(1), **quiet)
    return hooks


def logits(params: Any, pixels: Any) -> Any:
    """Shape [n, 10], of pixels [n, 64]."""
    return MODEL.apply({"params": params}, pixels)


def loss(params: Any, batch: Any) -> jax.Array:
    """Mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch[0]), batch[1]).mean()


def make_task(hooks: fsh.SurgeryHooks) -> Callable[..., Any]:
    """Trains on the batches of a task, and scores the held-out digits."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: fsh.TrainState, batches: Any, held_out: Any) -> tuple[fsh.TrainState, jax.Array, jax.Array]:
        def step(state: fsh.TrainState, batch: Any) -> tuple[fsh.TrainState, None]:
            state = state.apply_gradients(grads=jax.grad(loss)(state.params, batch))
            return hooks.in_graph(state, batch=batch), None

        state, _ = jax.lax.scan(step, state, batches)
        hits = logits(state.params, held_out[0]).argmax(-1) == held_out[1]
        return state, hits.mean(), loss(state.params, held_out)

    return run


def train(plan: Plan, name: str, seed: int, advance: Callable[[], object]) -> dict[str, Any]:
    """One run, and what was measured of it."""
    train_split, test_split = digits.load_data()
    hooks, rng = make_hooks(plan, name, seed), np.random.default_rng(seed)
    state = fsh.TrainState.create(apply_fn=MODEL.apply, params=init_params(jax.random.key(seed)), tx=optimizer(plan))
    state = hooks.init(state.replace(step=jnp.int32(0)))
    run, scores = make_task(hooks), []
    for _ in range(plan.tasks):
        order = rng.permutation(64)
        shown = rng.integers(len(train_split.labels), size=(plan.task_steps, plan.batch_size))
        pixels, held_out = (split.images.reshape(-1, 64)[:, order] for split in (train_split, test_split))
        batches = (pixels[shown], train_split.labels[shown])
        state, *score = run(state, batches, (held_out, test_split.labels))
        scores.append(score)
        advance()
    means = np.mean(np.reshape(jax.device_get(scores), (-1, plan.block, 2)), axis=1)
    steps = plan.task_steps * plan.block
    return results.curve(seed, {steps * (i + 1): (loss, accuracy) for i, (accuracy, loss) in enumerate(means)})


def main(arguments: Any) -> None:
    """Measures, keeps the numbers, draws, and prints what came out."""
    plan = FAST if arguments.fast else Plan()
    runs = results.run_all(STYLES, plan.seeds, plan.tasks, functools.partial(train, plan))
    title = f"{plan.tasks} tasks one after another: the digits, their pixels in another order in each"
    results.report(arguments, "plasticity", title, plan, runs, STYLES)


if __name__ == "__main__":
    main(results.arguments(__doc__))
