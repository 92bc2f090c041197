"""Trains the digits network dense, pruned, sparse from the start, and masked in the forward pass alone, and compares.

    python examples/sparse_digits.py --results=runs/sparsity.json --picture=runs/sparse.png [--fast]

Three comparisons, of runs with the same seeds: pruning to 90 % beside dense training; RigL and SET beside masks that
never move, at one sparsity; and masks that are enforced on the weights beside masks that only the forward pass sees
(straight-through). Prints held-out accuracies, draws the curves, and keeps every number in a file. Fast: few steps.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import digits
import jax
import jax.numpy as jnp
import ml_collections
import optax
import results
import sparse_plots
from tqdm import tqdm

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import SET, Prune, RigL

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = "**/kernel"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the measurement.

    Attributes:
      num_steps: train steps of each run.
      every: steps from one due step to the next, and from one evaluation to the next.
      often: steps from one due step to the next where masks are compared that weights or the loss alone see: those of
        the loss follow weights that move away from them at every step.
      seeds: how many runs of each method.
    """

    num_steps: int = 900
    every: int = 30
    often: int = 10
    seeds: int = 5

    @property
    def ramp(self) -> dict[str, Any]:
        """Pruning begins after a sixth of the run and reaches its target after two thirds."""
        return {"begin": self.num_steps // 6, "end": self.num_steps * 2 // 3}

    @property
    def last(self) -> int:
        """From here on masks stay, and what is left of the run trains the weights behind them."""
        return self.num_steps * 5 // 6


FAST = Plan(num_steps=72, every=12, often=12, seeds=1)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of training.

    Attributes:
      surgery: makes the surgery of all kernels, or None for dense training.
      often: whether it is due at every `plan.often` steps.
      through: whether the loss sees the weights through the masks, and the weights keep all elements.
    """

    surgery: Callable[[Plan], Any] | None = None
    often: bool = False
    through: bool = False


def loss_of(state: fsh.TrainState, params: Any, batch: digits.Split) -> jax.Array:
    """Mean cross entropy."""
    return digits.loss_and_hits(state.apply_fn, params, batch)[0]


def grads_of(state: fsh.TrainState, batch: digits.Split) -> Any:
    """What RigL grows by: the gradient of every weight, the zeros included."""
    return jax.grad(functools.partial(loss_of, state))(state.params, batch=batch)


def sparse(surgery: Callable[..., Any], plan: Plan, **fields: Any) -> Any:
    """SET or RigL, whose masks stop moving after three quarters of the run."""
    return surgery(SPARSE, end=plan.num_steps * 3 // 4, **fields)


PRUNED, SPARSE, MASKED = 0.9, 0.985, 0.98
GROUPS = {
    "pruned": {
        "dense": Method(),
        "pruned": Method(lambda plan: Prune(PRUNED, **plan.ramp)),
    },
    "sparse": {
        "static": Method(lambda plan: sparse(SET, plan, fraction=0.0)),
        "SET": Method(lambda plan: sparse(SET, plan)),
        "RigL": Method(lambda plan: sparse(RigL, plan, grads=grads_of)),
    },
    "masked": {
        "enforced": Method(lambda plan: Prune(MASKED, **plan.ramp), often=True),
        "straight-through": Method(lambda plan: Prune(MASKED, **plan.ramp, enforce=False), often=True, through=True),
    },
}
"""Per comparison the control, and what is compared with it."""
SPARSITY = {"pruned": PRUNED, "sparse": SPARSE, "masked": MASKED}


def config_of(plan: Plan, seed: int) -> ml_collections.ConfigDict:
    """The optimizer and the batches of the digits run, over the steps of the plan."""
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    config.num_steps, config.seed = plan.num_steps, seed
    config.warmup_steps = min(config.warmup_steps, plan.num_steps // 6)
    return config


@functools.cache
def optimizer(plan: Plan) -> optax.GradientTransformation:
    """One for all runs: what is compiled for a state depends on the optimizer that it holds."""
    return digits.create_state(config_of(plan, 0)).tx


def initial_state(plan: Plan, seed: int) -> fsh.TrainState:
    """Params drawn by a seed, and a step that is an array from the start, so that the train step compiles once."""
    params = digits.init_params(jax.random.key(seed))
    state = fsh.TrainState.create(apply_fn=digits.MODEL.apply, params=params, tx=optimizer(plan))
    return state.replace(step=jnp.int32(0))


def make_hooks(method: Method, plan: Plan, seed: int) -> fsh.SurgeryHooks:
    """The hook of a method, if it has one."""
    hooks = fsh.SurgeryHooks(seed=seed)
    if method.surgery is not None:
        due = fsh.every(plan.often if method.often else plan.every, stop=plan.last)
        hooks.add("sparse", method.surgery(plan), params=KERNELS, when=due)
    return hooks


def make_train_step(method: Method, hooks: fsh.SurgeryHooks) -> Callable[..., fsh.TrainState]:
    """The train step of a method: the optimizer's update, and what masks have to do after it."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: fsh.TrainState, batch: digits.Split) -> fsh.TrainState:
        def loss(params: Any) -> jax.Array:
            if method.through:
                params = fsh.sparsity.ste(params, fsh.sparsity.masks_of(state, "sparse"))
            return loss_of(state, params, batch)

        return hooks.observe(state.apply_gradients(grads=jax.grad(loss)(state.params)))

    return train_step


def final(method: Method, state: fsh.TrainState) -> fsh.TrainState:
    """The state to evaluate, and to keep: under straight-through masks, with them put on the weights."""
    if not method.through:
        return state
    return state.replace(params=fsh.sparsity.apply_masks(state.params, fsh.sparsity.masks_of(state, "sparse")))


def train(method: Method, plan: Plan, seed: int, bar: Any) -> dict[str, Any]:
    """One run, and what was measured of it."""
    config, (train_split, test_split) = config_of(plan, seed), digits.load_data()
    hooks = make_hooks(method, plan, seed)
    state = hooks.observe(
        hooks.init(initial_state(plan, seed), fires=0)
    )  # sparse methods are sparse before the first step
    train_step, data = make_train_step(method, hooks), digits.batches(train_split, config.batch_size, seed)
    scores: dict[int, Any] = {}
    for step in range(1, plan.num_steps + 1):
        batch = next(data)
        state = train_step(state, batch)
        state = hooks(step, state, batch=batch)
        bar.update()
        if step % plan.every == 0:
            scores[step] = digits.evaluate(final(method, state), test_split)
    hooks.flush()
    measured = [[float(value) for value in pair] for pair in jax.device_get(list(scores.values()))]
    return {
        "seed": seed,
        "steps": list(scores),
        "losses": [round(loss, 5) for loss, _ in measured],
        "accuracies": [round(accuracy, 5) for _, accuracy in measured],
        "zeros": zeros_of(final(method, state).params),
        "fires": [results.fire_of(record) for record in hooks.ledger.records if record.event == "settled"],
    }


def zeros_of(params: Any) -> dict[str, int]:
    """How many elements of each kernel are zero, after the last step."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {path: int((leaf == 0).sum()) for path, leaf in named.items() if path.endswith("kernel")}


def measure(plan: Plan) -> dict[str, Any]:
    """All runs, and their conditions."""
    names = [(group, name) for group, methods in GROUPS.items() for name in methods]
    runs: dict[str, Any] = {}
    with tqdm(total=len(names) * plan.seeds * plan.num_steps, unit="step", disable=None, dynamic_ncols=True) as bar:
        for group, name in names:
            bar.set_description(name)
            found = [train(GROUPS[group][name], plan, seed, bar) for seed in range(plan.seeds)]
            runs.setdefault(group, {})[name] = found
    return {"conditions": conditions(plan), "runs": runs}


def conditions(plan: Plan) -> dict[str, Any]:
    """What the runs have in common."""
    config, splits = config_of(plan, 0), digits.load_data()
    chosen = ("batch_size", "learning_rate", "end_learning_rate", "warmup_steps", "weight_decay")
    return {
        "plan": {**dataclasses.asdict(plan), **plan.ramp, "last": plan.last},
        "sparsity": SPARSITY,
        "config": {name: config[name] for name in chosen},
        "images": {"train": len(splits[0].labels), "held_out": len(splits[1].labels)},
        "kernels": sizes(),
    }


def sizes() -> dict[str, int]:
    """How many elements each kernel has."""
    shapes = jax.eval_shape(digits.init_params, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size for path, leaf in leaves}
    return {path: size for path, size in named.items() if path.endswith("kernel")}


def main(file: pathlib.Path, picture: pathlib.Path | None, plan: Plan) -> None:
    """Measures, keeps the numbers, draws, and prints what came out."""
    with results.compiled_once():
        found = measure(plan)
    results.keep(file, "digits", found)
    if picture is not None:
        sparse_plots.draw_digits(picture, found)
    for group, runs in found["runs"].items():
        for line in results.lines(group, runs, "accuracies", 100.0, 2):
            print(line)


if __name__ == "__main__":
    arguments = results.arguments(__doc__)
    main(arguments.results, arguments.picture, FAST if arguments.fast else Plan())
