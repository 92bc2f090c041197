"""Trains a small convolutional network on handwritten digits, with hooks that edit the model on the way.

    python examples/digits.py --config=configs/digits.py --workdir=runs/digits

The network is that of Flax's model-surgery guide, the data scikit-learn's bundled 1,797 scans of 8 x 8 pixels. The
work directory gets ledger.jsonl (what fired), event files (metrics), checkpoints/ (the last step) and digits.png.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
import plots
import rich.box
import rich.console
import rich.table
import sklearn.datasets
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

import flax_surgery_hooks as fsh

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/digits.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory for everything that the run leaves behind.", required=True)


# Data


class Split(NamedTuple):
    """Images [n, 8, 8, 1] in 0..1 and labels [n] in 0..9."""

    images: np.ndarray
    labels: np.ndarray


def load_data() -> tuple[Split, Split]:
    """A train split of 1,437 digits and a held-out one of 360, the same in every run."""
    digits = sklearn.datasets.load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[360:], order[:360]
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def batches(split: Split, batch_size: int, seed: int) -> Iterator[Split]:
    """Endless batches: every epoch is a new order, decided by the seed and the epoch alone."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(split.labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield Split(split.images[chosen], split.labels[chosen])
        epoch += 1


# Model


class CNN(nn.Module):
    """The network of Flax's guide; its layers are Conv_0, Conv_1, Dense_0 and Dense_1."""

    hidden: int = 256

    @nn.compact
    def __call__(self, x):
        """Logits [n, 10] of images [n, 8, 8, 1]."""
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(10)(x)


MODEL = CNN()


def init_params(key: jax.Array) -> Any:
    """Fresh params; the `reinit` hook calls this again under a key of its own."""
    return MODEL.init(key, jnp.zeros((1, 8, 8, 1)))["params"]


def create_state(config: ml_collections.ConfigDict) -> fsh.TrainState:
    """Params and optimizer state at step 0."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.num_steps, config.end_learning_rate
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))
    return fsh.TrainState.create(apply_fn=MODEL.apply, params=init_params(jax.random.key(config.seed)), tx=tx)


def loss_and_hits(apply_fn: Callable, params: Any, batch: Split) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy, and which images were classified correctly."""
    logits = apply_fn({"params": params}, batch.images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
    return loss, logits.argmax(-1) == batch.labels


# Training


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: fsh.TrainState, batch: Split) -> tuple[fsh.TrainState, jax.Array]:
    """One optimizer step, and the loss before it."""
    (loss, _), grads = jax.value_and_grad(loss_and_hits, argnums=1, has_aux=True)(state.apply_fn, state.params, batch)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def evaluate(state: fsh.TrainState, split: Split) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy of a whole split."""
    loss, hits = loss_and_hits(state.apply_fn, state.params, split)
    return loss, hits.mean()


def make_hooks(
    config: ml_collections.ConfigDict, writer: Any = None, ledger: pathlib.Path | None = None
) -> fsh.SurgeryHooks:
    """The hooks of the config, and one written here."""
    hooks = fsh.SurgeryHooks.from_config(
        config.surgery,
        seed=config.seed,
        writer=writer,
        ledger=ledger,
        objects={"init": init_params},
        on_record=show,
    )

    @hooks.register(params="Conv_*/kernel", when=fsh.at(config.threshold_at))
    def drop_small(kernel):
        return jnp.where(jnp.abs(kernel) < config.threshold, 0, kernel)

    return hooks


def for_surgery(config: ml_collections.ConfigDict) -> tuple[Callable[[], fsh.TrainState], fsh.SurgeryHooks]:
    """What the commands of flax_surgery_hooks ask a trainer for: its initial state and its hooks."""
    return functools.partial(create_state, config), make_hooks(config)


def show(record: fsh.Record) -> None:
    """One line per fire, once its figures are known, above the progress bar."""
    if record.event == "settled":
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells(record), (5, 10, 8, 12, 15, 9), strict=True))
        tqdm.write(f"step {row}")
    elif record.event in ("refused", "passed"):
        tqdm.write(f"step {record.step:>5}  {record.hook}  {record.event}")


def cells(record: fsh.Record) -> tuple[str, ...]:
    """What a line or table row says of a fire."""
    leaves = "1 leaf" if len(record.paths) == 1 else f"{len(record.paths)} leaves"
    return (
        str(record.step),
        record.hook,
        leaves,
        f"params {record.figures['params/relative_change']:.3f}",
        f"optimizer {record.figures['slots/relative_change']:.3f}",
        f"{1e3 * record.seconds:.0f} ms",
    )


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> float:
    """Trains, leaves everything in `workdir` and returns the last held-out accuracy."""
    train_split, test_split = load_data()
    test_split = jax.device_put(test_split)
    writer = fsh.metrics.create_default_writer(workdir)
    hooks = make_hooks(config, writer, workdir / "ledger.jsonl")
    state = create_state(config)
    history = plots.History()
    pending: list[jax.Array] = []  # losses still on the device: reading one would wait for its step
    data = batches(train_split, config.batch_size, config.seed)
    bar = tqdm(range(1, config.num_steps + 1), desc="train", unit="step", disable=None, dynamic_ncols=True)
    for step in bar:
        state, loss = train_step(state, next(data))
        state = hooks(step, state)
        pending.append(loss)
        if step % config.eval_every == 0 or step == config.num_steps:
            losses, (test_loss, accuracy) = jax.device_get((pending, evaluate(state, test_split)))
            pending = []
            history.add(step, losses, test_loss, accuracy)
            scalars = {"train/loss": np.mean(losses), "test/loss": test_loss, "test/accuracy": accuracy}
            writer.write_scalars(step, {name: float(value) for name, value in scalars.items()})
            bar.set_postfix(loss=f"{scalars['train/loss']:.4f}", accuracy=f"{accuracy:.1%}")
    bar.close()
    hooks.flush()
    writer.close()
    save(state, hooks, workdir / "checkpoints", config.num_steps)
    settled = [record for record in hooks.ledger.records if record.event == "settled"]
    plots.draw(workdir / "digits.png", history, [(record.step or 0, record.hook) for record in settled])
    print_table(settled)
    return history.accuracies[-1]


def save(state: fsh.TrainState, hooks: fsh.SurgeryHooks, directory: pathlib.Path, step: int) -> None:
    """An Orbax checkpoint of the state and of what the hooks know."""
    with ocp.CheckpointManager(directory) as manager:
        fsh.checkpoint.save(manager, step, state, hooks)


def print_table(settled: list[fsh.Record]) -> None:
    """All fires of the run, in a table."""
    table = rich.table.Table(title="Surgeries of this run", box=rich.box.SIMPLE_HEAD, title_justify="left")
    for name in ("step", "hook", "leaves", "params changed", "optimizer state changed", "time"):
        table.add_column(name, justify="left" if name == "hook" else "right")
    for record in settled:
        table.add_row(*(cell.removeprefix("params ").removeprefix("optimizer ") for cell in cells(record)))
    rich.console.Console().print(table)


def main(argv: list[str]) -> None:
    """Runs the training that the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    workdir = pathlib.Path(WORKDIR.value).absolute()
    ledger = workdir / "ledger.jsonl"
    if ledger.exists() and ledger.stat().st_size:
        raise app.UsageError(f"{workdir} holds a run already. Give another --workdir, or delete that one.")
    workdir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    accuracy = train(CONFIG.value, workdir)
    seconds = time.perf_counter() - started
    print(f"Held-out accuracy {accuracy:.1%} after {CONFIG.value.num_steps} steps and {seconds:.0f} s. See {workdir}.")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
