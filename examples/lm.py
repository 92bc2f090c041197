"""Trains a byte-level Transformer on the Python standard library's sources, on a mesh, with hooks on the way.

    python examples/lm.py --config=configs/lm.py:small --workdir=runs/lm

The same command runs on one device or several, on CPU, GPU or TPU; examples/launch.py starts it in several processes. A
run that was cut off goes on from its last checkpoint when it is started again. The work directory gets ledger.jsonl
(what fired), curve.jsonl (the losses), event files, checkpoints/, scores.json and lm.png.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import lm_plots
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from lm_data import Loader, held_out_windows, split
from lm_model import Partitioning
from lm_ngram import NGram
from lm_train import (
    batch_sharding,
    hook_objects,
    initial_state,
    make_evaluate,
    make_partitioning,
    make_train_step,
    microbatches,
    paced,
)
from ml_collections import config_flags
from tqdm import tqdm

import flax_surgery_hooks as fsh

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/lm.py:small.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory for everything that the run leaves behind.", required=True)
COORDINATOR = flags.DEFINE_string("coordinator", None, "Of several processes, host:port of the first.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "How many processes run this together.")
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Which of them this is.")


class Windows(NamedTuple):
    """Windows, int32 [n, length + 1], and which bytes of the held-out stream they predict, int64 [n, length]."""

    tokens: np.ndarray
    places: np.ndarray


class Data(NamedTuple):
    """What is trained on, all that is held out, and the sample of it that the curve is of."""

    loader: Loader
    held_out: Windows
    sample: Windows
    held_out_stream: np.ndarray


def load_data(config: ml_collections.ConfigDict) -> Data:
    """The data of a config."""
    root = None if config.data.root is None else pathlib.Path(config.data.root)
    train, held_out = split(root, config.data.held_out, config.data.max_files)
    loader = Loader(train, config.seed, config.batch_size, config.model.length)
    stream = held_out.stream()
    every = Windows(*held_out_windows(stream, config.model.length))
    sample = Windows(*held_out_windows(stream, config.model.length, config.eval_windows))
    return Data(loader, every, sample, stream)


def baseline(config: ml_collections.ConfigDict, data: Data) -> dict[str, float]:
    """Bits per byte of an n-gram model on the bytes that the network predicts; nothing where the config wants none."""
    if not config.ngram_order:
        return {}
    bits = NGram.fit(data.loader.corpus.stream(), config.ngram_order).bits(data.held_out_stream)
    return {
        "ngram/order": config.ngram_order,
        "ngram/held_out": float(bits[data.held_out.places].mean()),
        "ngram/sample": float(bits[data.sample.places].mean()),
    }


# What a run writes. Only the first process does, but for checkpoints, which all of them write together.


class Curve:
    """The losses of a run so far, in a file, so that a resumed run has those before it.

    Args:
      path: JSON lines, or None to keep them in memory only.
      step: train steps applied so far; what the file holds of later ones is dropped.
    """

    def __init__(self, path: pathlib.Path | None, step: int):
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.rows: list[dict[str, float]] = [row for row in map(json.loads, lines) if row["step"] <= step]
        self._write()

    def add(self, step: int, train: float, held_out: float) -> None:
        """Adds bits per byte: the mean of the train steps since the last row, and the held-out sample's."""
        self.rows.append({"step": step, "train": train, "held_out": held_out})
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def make_hooks(
    config: ml_collections.ConfigDict, partitioning: Partitioning, writer: Any, ledger: pathlib.Path | None
) -> fsh.SurgeryHooks:
    """The hooks of the config; of several processes the first one shows what fires."""
    return fsh.SurgeryHooks.from_config(
        config.surgery,
        seed=config.seed,
        objects=hook_objects(config, partitioning),
        writer=writer,
        ledger=ledger,
        on_record=show if jax.process_index() == 0 else None,
    )


def show(record: fsh.Record) -> None:
    """One line per fire, once its figures are known, above the progress bar."""
    if record.event == "settled":
        leaves = "1 leaf" if len(record.paths) == 1 else f"{len(record.paths)} leaves"
        change = record.figures["params/relative_change"]
        tqdm.write(f"step {record.step:>6}  {record.hook:<10}  {leaves:>9}  params {change:.3f}")
    elif record.event == "refused":
        tqdm.write(f"step {record.step:>6}  {record.hook}  refused")


def read_fires(ledger: pathlib.Path) -> list[tuple[int, str]]:
    """(step, hook) of all fires, also those before the run was cut off."""
    return [(record.step or 0, record.hook) for record in fsh.Ledger.read(ledger) if record.event == "settled"]


# Checkpoints


def open_checkpoints(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ocp.CheckpointManager:
    """The last checkpoints of a run, which are written while it goes on."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoints_kept, save_interval_steps=config.checkpoint_every
    )
    return ocp.CheckpointManager(workdir / "checkpoints", options=options)


# Training


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[fsh.TrainState, dict[str, float]]:
    """Trains, leaves everything in `workdir` and returns the state and the scores, in bits per byte."""
    is_first = jax.process_index() == 0
    partitioning, data = make_partitioning(config), load_data(config)
    writer = fsh.metrics.create_default_writer(workdir, just_logging=not is_first)
    hooks = make_hooks(config, partitioning, writer, workdir / "ledger.jsonl")
    sharding, parts = batch_sharding(partitioning), microbatches(config)
    with open_checkpoints(config, workdir) as checkpoints:
        state = hooks.init(fsh.checkpoint.restore(checkpoints, initial_state(config, partitioning), hooks))
        done = int(state.step)
        state = state if done else hooks.observe(state)  # sparse models are sparse before the first step
        train_step = make_train_step(state, hooks, partitioning)
        evaluate = make_evaluate(state, partitioning, config.batch_size)
        curve = Curve(workdir / "curve.jsonl" if is_first else None, done)
        pending: list[jax.Array] = []  # losses still on the device: reading one would wait for its step
        steps = range(done, config.num_steps)
        quiet = None if is_first else True  # None: quiet unless on a terminal
        bar = tqdm(
            steps, initial=done, total=config.num_steps, desc="train", unit="step", disable=quiet, dynamic_ncols=True
        )
        for step in bar:
            batch = data.loader.batch(step, sharding, parts)
            state, metrics = train_step(state, batch)
            paced(metrics)
            state = hooks(step + 1, state, metrics=metrics, batch=batch)
            pending.append(metrics["loss"])
            is_last = step + 1 == config.num_steps
            if (step + 1) % config.eval_every == 0 or is_last:
                held_out = float(evaluate(state, data.sample.tokens).mean())
                curve.add(step + 1, float(np.mean(jax.device_get(pending))), held_out)
                pending = []
                writer.write_scalars(step + 1, {"train/bits": curve.rows[-1]["train"], "held_out/bits": held_out})
                bar.set_postfix(train=f"{curve.rows[-1]['train']:.3f}", held_out=f"{held_out:.3f}")
            fsh.checkpoint.save(checkpoints, step + 1, state, hooks, force=is_last)
        hooks.flush()
    writer.close()
    scores = {"lm/held_out": float(evaluate(state, data.held_out.tokens).mean())}
    if is_first:
        scores |= {"lm/sample": curve.rows[-1]["held_out"], **baseline(config, data)}
        (workdir / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
        lm_plots.draw(workdir / "lm.png", curve.rows, read_fires(workdir / "ledger.jsonl"), scores)
    return state, scores


def start(argv: list[str]) -> pathlib.Path:
    """Joins the other processes, if there are any, and returns the work directory."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    if NUM_PROCESSES.value > 1:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    workdir = pathlib.Path(WORKDIR.value).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir


def main(argv: list[str]) -> None:
    """Runs the training that the flags describe."""
    workdir = start(argv)
    started = time.perf_counter()
    _, scores = train(CONFIG.value, workdir)
    if jax.process_index() == 0:
        seconds, devices = time.perf_counter() - started, jax.device_count()
        others = f"; {CONFIG.value.ngram_order}-gram {scores['ngram/held_out']:.4f}" if CONFIG.value.ngram_order else ""
        print(
            f"Held-out bits per byte {scores['lm/held_out']:.4f} after {CONFIG.value.num_steps} steps{others}. "
            f"{seconds:.0f} s on {devices} device{'s' * (devices > 1)}. See {workdir}."
        )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
