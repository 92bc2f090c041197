"""Trains an NNX model on handwritten digits with an `nnx.Optimizer`, and two hooks that edit both in place.

    python examples/nnx_digits.py

Every 60 steps the last kernel is given a norm of 3 again. At step 200 the 16 hidden units with the smallest outgoing
weights, which do least, start again: new incoming weights, outgoing ones of zero. Prints what fired, and the accuracy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from flax import nnx

import flax_surgery_hooks as fsh

NUM_STEPS, BATCH_SIZE = 400, 128


class MLP(nnx.Module):
    """Two layers of 64 hidden units, and logits for ten digits."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Logits [n, 10] of pixels [n, 64]."""
        hidden = nnx.relu(self.norm(self.first(pixels)))
        return self.head(nnx.relu(self.second(hidden)))


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    """One optimizer step in place; returns the loss before it."""

    def mean_loss(model: MLP) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(pixels), labels).mean()

    loss, grads = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, grads)
    return loss


def load_data() -> tuple[Any, Any]:
    """(pixels, labels) of 1,437 digits to train on and of 360 others."""
    digits = sklearn.datasets.load_digits()
    pixels, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[360:], order[:360]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def make_hooks() -> fsh.SurgeryHooks:
    """The two hooks; paths are those of `nnx.state(model, nnx.Param)`."""
    hooks = fsh.SurgeryHooks(seed=0)
    hooks.add("head_norm", fsh.surgeries.Normalize(to=3.0), params="head/kernel", when=fsh.every(60))

    @hooks.register(params=["second/kernel", "second/bias", "head/kernel"], when=fsh.at(200))
    def recycle(leaves, key):
        outgoing = jax.lax.stop_gradient(jnp.linalg.norm(leaves["head/kernel"], axis=1))
        weak = jnp.argsort(outgoing).argsort() < 16
        drawn = jax.nn.initializers.lecun_normal()(key, leaves["second/kernel"].shape)
        return {
            "second/kernel": jnp.where(weak[None], drawn, leaves["second/kernel"]),
            "second/bias": jnp.where(weak, 0.0, leaves["second/bias"]),
            "head/kernel": jnp.where(weak[:, None], 0.0, leaves["head/kernel"]),
        }

    return hooks


def main() -> float:
    """Trains, prints, and returns the held-out accuracy."""
    (pixels, labels), (test_pixels, test_labels) = load_data()
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    hooks = make_hooks()
    rng = np.random.default_rng(0)
    for step in range(1, NUM_STEPS + 1):
        batch = rng.choice(len(labels), BATCH_SIZE, replace=False)
        loss = train_step(model, optimizer, pixels[batch], labels[batch])
        hooks(step, fsh.bind_nnx(model, optimizer))  # what fires is in model and optimizer when this returns
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.4f}")
    hooks.flush()
    for record in hooks.ledger.records:
        if record.event == "settled":
            change = record.figures["params/relative_change"]
            print(f"{record.hook} fired at step {record.step}: {', '.join(record.paths)}, changed by {change:.1%}")
    model.eval()
    accuracy = float((model(test_pixels).argmax(-1) == test_labels).mean())
    print(f"held-out accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
