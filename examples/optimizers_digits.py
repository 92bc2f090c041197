"""Trains on handwritten digits while the optimizer changes: another one, a frozen layer, moments that start anew.

    python examples/optimizers_digits.py [--picture=runs/optimizers.png]

Three surgeries, each beside a control without it: at step 100 Adam gives way to SGD with momentum, which takes over its
first moments, or starts with none; the first layer is frozen at step 100 and thawed at 200; at step 200 all moments of
Adam are reset, and the updates warm up again, or not. Prints what fired and the held-out losses, and draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nnx_digits import load_data
from tqdm import tqdm

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import Freeze, ResetMoments, Rewarm, SwitchOptimizer, Thaw

NUM_STEPS, BATCH_SIZE = 300, 64
B1 = 0.95
ADAM = optax.adam(2e-3, b1=B1)
SGD = optax.sgd(0.01, momentum=B1)
FREEZABLE = fsh.optax.freezable(ADAM)
REWARMED = optax.chain(ADAM, fsh.optax.rewarm(100))


class MLP(nn.Module):
    """Two hidden layers, and logits for ten digits."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Logits [n, 10] of pixels [n, 64]."""
        x = nn.relu(nn.Dense(64, name="first")(pixels))
        x = nn.relu(nn.Dense(64, name="second")(x))
        return nn.Dense(10, name="head")(x)


MODEL = MLP()


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      tx: the optimizer at the start.
      add: adds the hooks.
    """

    tx: Any
    add: Callable[[fsh.SurgeryHooks], None]


def switch(hooks: fsh.SurgeryHooks, carry: bool) -> None:
    """Adam until step 100, then SGD with momentum."""
    hooks.add("switch", SwitchOptimizer(SGD, carry=carry), params="**", when=fsh.at(100))


def freeze(hooks: fsh.SurgeryHooks) -> None:
    """The first layer stands still from step 100 to step 200."""
    hooks.add("freeze", Freeze(), params="first/*", when=fsh.at(100))
    hooks.add("thaw", Thaw(first_moments="reset"), params="first/*", when=fsh.at(200))


def reset(hooks: fsh.SurgeryHooks, rewarm: bool) -> None:
    """All moments start anew at step 200, while Adam's count goes on; with or without smaller updates after it."""
    hooks.add("reset", ResetMoments(), params="**", when=fsh.at(200))
    if rewarm:
        hooks.add("rewarm", Rewarm(), params="**", when=fsh.at(200))


def nothing(hooks: fsh.SurgeryHooks) -> None:
    """The control."""


RUNS = {
    "Adam to SGD with momentum": {
        "Adam all along": Run(ADAM, nothing),
        "SGD, momentum from zero": Run(ADAM, functools.partial(switch, carry=False)),
        "SGD, moments carried": Run(ADAM, functools.partial(switch, carry=True)),
    },
    "First layer frozen, then thawed": {
        "never frozen": Run(FREEZABLE, nothing),
        "frozen from 100 to 200": Run(FREEZABLE, freeze),
    },
    "Moments of Adam reset": {
        "no reset": Run(REWARMED, nothing),
        "reset alone": Run(REWARMED, functools.partial(reset, rewarm=False)),
        "reset and re-warmed": Run(REWARMED, functools.partial(reset, rewarm=True)),
    },
}
"""Per panel the control, and the runs with the surgery."""
MARKS = {
    "Adam to SGD with momentum": {100: "switch"},
    "First layer frozen, then thawed": {100: "freeze", 200: "thaw"},
    "Moments of Adam reset": {200: "reset"},
}


def batches(count: int, steps: int) -> Iterator[np.ndarray]:
    """Places of the examples of each step, the same in every run."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield rng.choice(count, BATCH_SIZE, replace=False)


def loss_of(params: Any, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    logits = MODEL.apply({"params": params}, pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: Any, pixels: jax.Array, labels: jax.Array) -> Any:
    """One optimizer step. The optimizer is a static part of the state, so that a switch traces this anew."""
    return state.apply_gradients(grads=jax.grad(loss_of)(state.params, pixels, labels))


def train(run: Run, title: str, steps: int) -> list[float]:
    """Trains, prints what fired, and returns the held-out loss after each step."""
    (pixels, labels), held_out = load_data()
    hooks = fsh.SurgeryHooks(seed=0)
    run.add(hooks)
    params = MODEL.init(jax.random.key(0), pixels[:1])["params"]
    state: Any = fsh.TrainState.create(apply_fn=MODEL.apply, params=params, tx=run.tx).replace(step=jnp.int32(0))
    evaluate, losses = jax.jit(loss_of), []
    for step, batch in enumerate(tqdm(batches(len(labels), steps), desc=title, total=steps, mininterval=1), start=1):
        state = hooks(step, train_step(state, pixels[batch], labels[batch]))
        losses.append(evaluate(state.params, *held_out))
    hooks.flush()
    for record in hooks.ledger.records:
        if record.event == "settled":
            print(f"{title}: {record.hook} fired at step {record.step}, {len(record.paths)} leaves")
    return [float(loss) for loss in losses]


def main(picture: pathlib.Path | None = None, steps: int = NUM_STEPS) -> dict[str, dict[str, list[float]]]:
    """Trains all eight, prints their held-out losses, draws, and returns all losses by panel and run."""
    losses = {
        panel: {name: train(run, f"{panel}, {name}", steps) for name, run in runs.items()}
        for panel, runs in RUNS.items()
    }
    for panel, runs in losses.items():
        for name, values in runs.items():
            after = values[max(MARKS[panel]) :] or values
            print(f"held-out loss, {panel}, {name}: {values[-1]:.4f} at last, {max(after):.4f} at worst after it")
    if picture is not None:
        draw(picture, losses)
    return losses


def draw(path: pathlib.Path, losses: dict[str, dict[str, list[float]]]) -> None:
    """Held-out loss over steps, a panel for each surgery."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
        every: list[Axes] = list(figure.subplots(1, len(losses), sharey=True))
        for axes, (panel, runs) in zip(every, losses.items(), strict=True):
            colours = (plots.FAINT, plots.COLOURS[4], plots.COLOURS[0])
            chosen = colours if len(runs) == 3 else (colours[0], colours[2])
            for (name, values), colour in zip(runs.items(), chosen, strict=True):
                axes.plot(np.arange(1, len(values) + 1), values, color=colour, label=name, linewidth=1.6)
            for step, text in MARKS[panel].items():
                axes.axvline(step, color=plots.COLOURS[1], linewidth=1.1)
                axes.text(step + 4, 0.98, text, transform=axes.get_xaxis_transform(), color=plots.COLOURS[1], va="top")
            axes.set_title(panel, loc="left", fontsize=11, fontweight="bold")
            axes.set(yscale="log", xlabel="train steps", xlim=(min(50, len(values) // 2), None))
            axes.legend(edgecolor="none", framealpha=1.0, loc="upper right", bbox_to_anchor=(1, 0.93))
        lowest = min(min(values) for runs in losses.values() for values in runs.values())
        every[0].set(ylabel="held-out loss", ylim=(0.9 * lowest, 1.0))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--picture", type=pathlib.Path, default=None, help="PNG of the held-out losses")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="train steps of each run")
    arguments = parser.parse_args()
    main(arguments.picture, arguments.steps)
