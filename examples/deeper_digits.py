"""Trains a residual network on handwritten digits that gets deeper on the way, with a running average of its weights.

    python examples/deeper_digits.py [--picture=runs/deeper.png]

At step 200 the hook `deepen` adds a block whose last kernel is zero: new leaves in params and optimizer state, the same
function. The hook `average` remembers a running average of all weights, in the train state, updated inside the jitted
train step; at the last step it takes their place. Prints the held-out accuracy of both, and draws it.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import plots
from matplotlib.figure import Figure
from nnx_digits import load_data
from tqdm import tqdm

import flax_surgery_hooks as fsh

NUM_STEPS, BATCH_SIZE, WIDTH, DEEPEN_AT = 400, 64, 64, 200


class Residual(nn.Module):
    """A dense layer, blocks `x + Dense(relu(Dense(x)))`, and logits for ten digits."""

    blocks: int

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Logits [n, 10] of pixels [n, 64]."""
        x = nn.relu(nn.Dense(WIDTH, name="stem")(pixels))
        for i in range(self.blocks):
            hidden = nn.relu(nn.Dense(WIDTH, name=f"block_{i}_in")(x))
            x = x + nn.Dense(WIDTH, name=f"block_{i}_out")(hidden)
        return nn.Dense(10, name="head")(x)


@dataclass(frozen=True)
class Average:
    """Remembers a running average of each leaf, and puts it in the leaf's place when it fires."""

    decay: float = 0.98

    def init_memory(self, leaf: jax.Array) -> jax.Array:
        """At first the leaf itself, in float32."""
        return leaf

    def observe(self, leaf: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """At every step, inside the train step."""
        return leaf, self.decay * memory + (1 - self.decay) * leaf

    def __call__(self, leaf: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """When the hook fires."""
        return memory, memory


def deepen(leaves: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """A further block; that it adds nothing yet leaves the function as it was."""
    fresh = {
        "block_1_in/kernel": nn.initializers.lecun_normal()(key, (WIDTH, WIDTH)),
        "block_1_in/bias": jnp.zeros(WIDTH),
        "block_1_out/kernel": jnp.zeros((WIDTH, WIDTH)),
        "block_1_out/bias": jnp.zeros(WIDTH),
    }
    return {**leaves, **fresh}


def make_hooks() -> fsh.SurgeryHooks:
    """The two hooks; `apply_fn=` is the model function that goes with the deeper parameters."""
    hooks = fsh.SurgeryHooks(seed=0)
    hooks.add("deepen", deepen, params="block_0_*/*", when=fsh.at(DEEPEN_AT), apply_fn=Residual(2).apply)
    hooks.add("average", Average(), params="**", when=fsh.at(NUM_STEPS))
    return hooks


def main(picture: pathlib.Path | None = None) -> dict[str, float]:
    """Trains, prints, draws, and returns the held-out accuracies of the last step and of the average."""
    (pixels, labels), (test_pixels, test_labels) = load_data()
    model, hooks = Residual(1), make_hooks()
    params = model.init(jax.random.key(0), pixels[:1])["params"]
    state: Any = fsh.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))
    state = hooks.init(state.replace(step=jnp.int32(0)))  # room for the averages

    @jax.jit
    def train_step(state: Any, pixels: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, pixels)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return hooks.observe(state.apply_gradients(grads=jax.grad(loss)(state.params)))

    @jax.jit
    def held_out_loss(state: Any, params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, test_pixels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, test_labels).mean()

    def accuracy(state: Any) -> float:
        return float((state.apply_fn({"params": state.params}, test_pixels).argmax(-1) == test_labels).mean())

    rng, losses = np.random.default_rng(0), []
    accuracies = {}
    for step in tqdm(range(1, NUM_STEPS + 1), desc="training", mininterval=1):
        batch = rng.choice(len(labels), BATCH_SIZE, replace=False)
        state = train_step(state, pixels[batch], labels[batch])
        losses.append((held_out_loss(state, state.params), held_out_loss(state, averaged(state))))
        accuracies["last step"] = accuracy(state) if step == NUM_STEPS else 0.0
        state = hooks(step, state)
    accuracies["running average"] = accuracy(state)
    hooks.flush()
    for record in hooks.ledger.records:
        if record.event == "settled":
            print(f"{record.hook} fired at step {record.step}: {len(record.paths)} leaves, {len(record.added)} added")
    for name, value in accuracies.items():
        print(f"held-out accuracy, {name}: {value:.1%}")
    if picture is not None:
        draw(picture, np.asarray(losses, np.float32))
    return accuracies


def averaged(state: Any) -> Any:
    """The averages in the shape of the params."""
    flat = {tuple(path.split("/")): leaf for path, leaf in state.surgery["memory"]["average"].items()}
    return {layer: {name: flat[layer, name] for name in leaves} for layer, leaves in state.params.items()}


def draw(path: pathlib.Path, losses: np.ndarray) -> None:
    """Held-out loss over steps, [steps, 2]: of the weights and of their average."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
        axes = figure.subplots()
        steps = np.arange(1, len(losses) + 1)
        for column, name, colour in ((0, "weights", plots.FAINT), (1, "running average of the weights", "#0072B2")):
            axes.plot(steps, losses[:, column], color=colour, label=name, linewidth=1.6)
        axes.axvline(DEEPEN_AT, color="#D55E00", linewidth=1.2)
        axes.text(DEEPEN_AT + 5, 0.98, "deepen: a block added", transform=axes.get_xaxis_transform(), color="#D55E00",
                  va="top")  # fmt: skip
        axes.set(yscale="log", xlabel="train steps", ylabel="held-out loss")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.32, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--picture", type=pathlib.Path, default=None, help="PNG of the held-out loss")
    main(parser.parse_args().picture)
