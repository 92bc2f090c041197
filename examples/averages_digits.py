"""Trains the digits network at a high constant learning rate, and evaluates averages of its weights beside the last.

    python examples/averages_digits.py --results=docs/values.json --picture=docs/images/averages.png [--fast]

Small batches and a rate that does not fall leave noise in the last weights, which an average takes out: exponential
(`Ema`), of all epochs from the middle of the run on (`Swa`), and of the latest ones (`Lawa`). All are of one and the
same run: `hooks.observe` in the train step keeps them in the train state, and training does not notice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import digits
import jax
import jax.numpy as jnp
import optax
import plots
import results

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import Ema, Lawa, Swa

LAST = "last weights"
STYLES = {
    LAST: {"color": plots.FAINT, "linestyle": (0, (1, 1.2))},
    "Ema": {"color": plots.COLOURS[0]},
    "Swa": {"color": plots.COLOURS[2], "linestyle": (0, (5, 1.2, 1, 1.2))},
    "Lawa": {"color": plots.COLOURS[1], "linestyle": (0, (5, 1.5))},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the measurement.

    Attributes:
      num_steps: train steps of each run.
      epoch: steps from one snapshot to the next, and from one evaluation to the next.
      latest: how many snapshots `Lawa` averages.
      half_life: of `Ema`, in steps.
      seeds: how many runs.
    """

    num_steps: int = 1068
    epoch: int = 89
    latest: int = 4
    half_life: int = 60
    seeds: int = 5
    learning_rate: float = 4e-3
    batch_size: int = 16


FAST = Plan(num_steps=20, epoch=4, latest=2, half_life=3, seeds=1)


@functools.cache
def optimizer(plan: Plan) -> optax.GradientTransformation:
    """One for all runs."""
    return optax.adam(plan.learning_rate)


def make_hooks(plan: Plan, seed: int) -> fsh.SurgeryHooks:
    """The averages, none of which is ever put into the live weights."""
    hooks, never = fsh.SurgeryHooks(seed=seed), fsh.at(1_000_000_000)
    hooks.add("Ema", Ema(half_life=plan.half_life), params="**", when=never)
    hooks.add("Swa", Swa(begin=plan.num_steps // 2, interval=plan.epoch), params="**", when=never)
    hooks.add("Lawa", Lawa(k=plan.latest, interval=plan.epoch), params="**", when=never)
    return hooks


def train(plan: Plan, name: str, seed: int, advance: Callable[[], object]) -> dict[str, Any]:
    """One run, and what was measured of it: by kind of average."""
    del name  # there is but one way of training
    train_split, test_split = digits.load_data()
    hooks, params = make_hooks(plan, seed), digits.init_params(jax.random.key(seed))
    state = fsh.TrainState.create(apply_fn=digits.MODEL.apply, params=params, tx=optimizer(plan))
    state = hooks.init(state.replace(step=jnp.int32(0)), fires=0)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: fsh.TrainState, batch: digits.Split) -> fsh.TrainState:
        grads = jax.grad(lambda params: digits.loss_and_hits(state.apply_fn, params, batch)[0])(state.params)
        return hooks.observe(state.apply_gradients(grads=grads))

    @jax.jit
    def evaluate(state: fsh.TrainState) -> dict[str, Any]:
        found = {kind: fsh.average_of(state, kind) for kind in STYLES if kind != LAST}
        return {
            kind: digits.evaluate(state.replace(params=params), test_split)
            for kind, params in {LAST: state.params, **found}.items()
        }

    data, scores = digits.batches(train_split, plan.batch_size, seed), {}
    for step in range(1, plan.num_steps + 1):
        state = train_step(state, next(data))
        advance()
        if step % plan.epoch == 0:
            scores[step] = evaluate(state)
    return {"seed": seed, "scores": scores}


def by_kind(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The curves of each kind of average, as those of a method of their own."""
    return {
        kind: [results.curve(run["seed"], {step: each[kind] for step, each in run["scores"].items()}) for run in found]
        for kind in STYLES
    }


def main(arguments: Any) -> None:
    """Measures, keeps the numbers, draws, and prints what came out."""
    plan = FAST if arguments.fast else Plan()
    runs = by_kind(results.run_all(["train"], plan.seeds, plan.num_steps, functools.partial(train, plan))["train"])
    title = "Averages of weights, at a high constant learning rate"
    results.report(arguments, "averages", title, plan, runs, STYLES)


if __name__ == "__main__":
    main(results.arguments(__doc__))
