"""Trains the digits network while some gradients are a thousand times too large, with and without resets of moments.

    python examples/spikes_digits.py --results=docs/values.json --picture=docs/images/spikes.png [--fast]

One spike fills Adam's second moments for a thousand steps, and updates are too small until they have forgotten it. A
hook that resets the moments at intervals, followed by a re-warm of the learning rate, bounds that time, as in SPAM
(arXiv 2501.06842). The same runs without spikes, and resets without the re-warm, are there to compare with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
import results

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import ResetMoments, Rewarm

METHODS = {
    "no spikes": {"spikes": False},
    "nothing done": {},
    "resets": {"resets": True},
    "resets, re-warmed": {"resets": True, "rewarm": True},
}
STYLES = {
    "no spikes": {"color": plots.FAINT, "linestyle": (0, (1, 1.2))},
    "nothing done": {"color": plots.COLOURS[1], "linestyle": (0, (5, 1.5))},
    "resets": {"color": plots.COLOURS[2], "linestyle": (0, (5, 1.2, 1, 1.2))},
    "resets, re-warmed": {"color": plots.COLOURS[0]},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the measurement.

    Attributes:
      num_steps: train steps of each run.
      every: steps from one reset to the next.
      rewarm: steps over which the learning rate rises again after a reset.
      spikes: share of the steps whose gradient is too large.
      size: by what such a gradient is multiplied.
      seeds: how many runs of each method.
      evaluations: steps from one evaluation to the next.
    """

    num_steps: int = 600
    every: int = 60
    rewarm: int = 20
    spikes: float = 0.01
    size: float = 1000.0
    seeds: int = 5
    evaluations: int = 20
    learning_rate: float = 1e-3
    batch_size: int = 64


FAST = Plan(num_steps=40, every=16, rewarm=8, spikes=0.1, seeds=1)


@functools.cache
def optimizer(plan: Plan) -> optax.GradientTransformation:
    """Adam, whose updates a hook can let grow anew."""
    return optax.chain(optax.adam(plan.learning_rate), fsh.optax.rewarm(plan.rewarm, start=0.01, schedule="cosine"))


def make_hooks(plan: Plan, seed: int, *, resets: bool = False, rewarm: bool = False) -> fsh.SurgeryHooks:
    """The hooks of a method: the reset, and after it the re-warm."""
    hooks, due = fsh.SurgeryHooks(seed=seed), fsh.every(plan.every)
    if resets:
        hooks.add("reset", ResetMoments(), params="**", when=due)
    if rewarm:
        hooks.add("rewarm", Rewarm(), params="**", when=due)
    return hooks


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: fsh.TrainState, batch: digits.Split, factor: jax.Array) -> fsh.TrainState:
    """One step of the optimizer, on a gradient times a factor."""
    grads = jax.grad(lambda params: digits.loss_and_hits(state.apply_fn, params, batch)[0])(state.params)
    return state.apply_gradients(grads=jax.tree.map(lambda grad: factor * grad, grads))


def factors(plan: Plan, seed: int) -> np.ndarray:
    """What the gradient of each step is multiplied by."""
    drawn = np.random.default_rng((seed, 1)).random(plan.num_steps)
    return np.where(drawn < plan.spikes, plan.size, 1.0).astype(np.float32)


def train(plan: Plan, name: str, seed: int, advance: Callable[[], object]) -> dict[str, Any]:
    """One run, and what was measured of it."""
    method, (train_split, test_split) = dict(METHODS[name]), digits.load_data()
    each = factors(plan, seed) if method.pop("spikes", True) else np.ones(plan.num_steps, np.float32)
    hooks = make_hooks(plan, seed, **method)
    params = digits.init_params(jax.random.key(seed))
    state = fsh.TrainState.create(apply_fn=digits.MODEL.apply, params=params, tx=optimizer(plan))
    state = state.replace(step=jnp.int32(0))
    data, scores = digits.batches(train_split, plan.batch_size, seed), {}
    for step, factor in enumerate(each, 1):
        state = hooks(step, train_step(state, next(data), factor))
        advance()
        if step % plan.evaluations == 0:
            scores[step] = digits.evaluate(state, test_split)
    return results.curve(seed, scores) | {"spikes": [int(step) for step in np.flatnonzero(each != 1) + 1]}


def main(arguments: Any) -> None:
    """Measures, keeps the numbers, draws, and prints what came out."""
    plan = FAST if arguments.fast else Plan()
    runs = results.run_all(METHODS, plan.seeds, plan.num_steps, functools.partial(train, plan))
    title = f"Gradients {plan.size:g} times too large at {100 * plan.spikes:g} % of the steps"
    results.report(arguments, "spikes", title, plan, runs, STYLES)


if __name__ == "__main__":
    main(results.arguments(__doc__))
