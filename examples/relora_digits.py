"""Trains low-rank factors beside frozen kernels, with and without merges, and beside training at full rank.

    python examples/relora_digits.py --results=docs/values.json --picture=docs/images/relora.png [--fast]

A network of dense layers is trained at full rank for some steps; from there on its kernels are frozen, and factors of
rank one beside them are trained. `ReLoRA` merges these into the kernels at intervals and starts them anew, with a
re-warm of the learning rate, so that what is learnt has a higher rank in the end. The controls: factors that are never
merged, merges alone, and training at full rank all along.
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
import optax
import plots
import results

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import MergeLora, ReLoRA, Rewarm

SCALE = 2.0
METHODS = {
    "full rank": None,
    "never merged": (),
    "merged alone": (MergeLora(SCALE, redraw=True),),
    "ReLoRA": (ReLoRA(SCALE), Rewarm()),
}
STYLES = {
    "full rank": {"color": plots.FAINT, "linestyle": (0, (1, 1.2))},
    "never merged": {"color": plots.COLOURS[1], "linestyle": (0, (5, 1.5))},
    "merged alone": {"color": plots.COLOURS[2], "linestyle": (0, (5, 1.2, 1, 1.2))},
    "ReLoRA": {"color": plots.COLOURS[0]},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the measurement; the learning rate of the factors is twice that of the kernels."""

    first_steps: int = 30
    num_steps: int = 900
    every: int = 100
    rewarm: int = 20
    seeds: int = 5
    evaluations: int = 30
    learning_rate: float = 1e-3
    batch_size: int = 64


FAST = Plan(first_steps=4, num_steps=24, every=8, rewarm=4, seeds=1, evaluations=8)


class Layer(nn.Module):
    """A dense layer with low-rank factors beside its kernel; B is zero at first."""

    features: int
    rank: int = 1

    @nn.compact
    def __call__(self, x):
        """Shape [n, features], of x of shape [n, inputs]."""
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        a = self.param("lora_a", init, (x.shape[-1], self.rank))
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        return x @ kernel + SCALE * (x @ a) @ b + self.param("bias", nn.initializers.zeros, (self.features,))


class Network(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, images):
        """Logits [n, 10] of images [n, 8, 8, 1]."""
        x = images.reshape(images.shape[0], -1)
        for features in (128, 128):
            x = nn.relu(Layer(features)(x))
        return Layer(10)(x)


MODEL = Network()


@functools.cache
def optimizer(plan: Plan, trained: str) -> optax.GradientTransformation:
    """Adam of what is trained, and of the biases: "kernel" or "lora"."""

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "trained" if path[-1].key.startswith((trained, "bias")) else "frozen", params
        )

    rate = plan.learning_rate * (2 if trained == "lora" else 1)
    adam = optax.chain(optax.adam(rate), fsh.optax.rewarm(plan.rewarm))
    return optax.multi_transform({"trained": adam, "frozen": optax.set_to_zero()}, labels)


def make_hooks(plan: Plan, name: str, seed: int) -> fsh.SurgeryHooks:
    """The hooks of a method: what is merged, and what warms up again after it."""
    hooks = fsh.SurgeryHooks(seed=seed)
    for surgery in METHODS[name] or ():
        params = "**/lora_?" if isinstance(surgery, Rewarm) else ["**/kernel", "**/lora_?"]
        due = fsh.every(plan.every, start=plan.first_steps + plan.every)
        hooks.add(type(surgery).__name__, surgery, params=params, when=due)
    return hooks


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: fsh.TrainState, batch: digits.Split) -> fsh.TrainState:
    """One step of the optimizer."""
    grads = jax.grad(lambda params: digits.loss_and_hits(state.apply_fn, params, batch)[0])(state.params)
    return state.apply_gradients(grads=grads)


def new_state(params: Any, tx: optax.GradientTransformation, step: int) -> fsh.TrainState:
    """A state that begins with these params at this step."""
    state = fsh.TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
    return state.replace(step=jnp.int32(step))


def train(plan: Plan, name: str, seed: int, advance: Callable[[], object]) -> dict[str, Any]:
    """One run, and what was measured of it."""
    train_split, test_split = digits.load_data()
    data = digits.batches(train_split, plan.batch_size, seed)
    params = MODEL.init(jax.random.key(seed), train_split.images[:1])["params"]
    state, hooks = new_state(params, optimizer(plan, "kernel"), 0), make_hooks(plan, name, seed)
    scores, begun = {}, None
    for step in range(1, plan.num_steps + 1):
        state = train_step(state, next(data))
        if step > plan.first_steps:  # the optimizer of the factors is there
            state = hooks(step, state)
        elif step == plan.first_steps:
            begun = jax.tree.map(jnp.copy, state.params)
            if METHODS[name] is not None:
                state = new_state(state.params, optimizer(plan, "lora"), step)
        advance()
        if step % plan.evaluations == 0:
            scores[step] = digits.evaluate(state, test_split)
    return results.curve(seed, scores) | {"ranks": ranks(begun, state.params)}


def ranks(before: Any, after: Any) -> list[int]:
    """The rank of what was learnt of each kernel: singular values of at least a hundredth of the largest."""
    found = []
    for name in sorted(after):
        added = after[name]["kernel"] - before[name]["kernel"] + SCALE * after[name]["lora_a"] @ after[name]["lora_b"]
        sizes = jnp.linalg.svd(added, compute_uv=False)
        found.append(int((sizes >= 0.01 * sizes[0]).sum()))
    return found


def main(arguments: Any) -> None:
    """Measures, keeps the numbers, draws, and prints what came out."""
    plan = FAST if arguments.fast else Plan()
    runs = results.run_all(METHODS, plan.seeds, plan.num_steps, functools.partial(train, plan))
    title = "Factors of rank one beside frozen kernels"
    results.report(arguments, "relora", title, plan, runs, STYLES)


if __name__ == "__main__":
    main(results.arguments(__doc__))
