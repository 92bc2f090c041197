"""A run that can be killed anywhere and started again: `python crash_worker.py --kind=mlp --workdir=...`.

It trains as any trainer with this library would, from the last checkpoint to the end. Its real work is all there is,
but for marks of what it is doing (see crash_phases.py) and a slow disk under the ledger.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from crash_phases import Phases
from crash_trainings import TRAININGS, Training

import flax_surgery_hooks as fsh

SAVE_EVERY = 3
PAUSE_SECS = 0.01


class SlowPath(type(pathlib.Path())):
    """A path on a disk that takes its time: what is appended arrives in two pieces, and a kill may come between."""

    phases: Phases

    def open(self, mode="r", *args, **kwargs):
        file = super().open(mode, *args, **kwargs)
        return Slow(file, SlowPath.phases) if mode == "a" else file


class Slow:
    """A file on that disk; the phase lasts from its opening to its closing."""

    def __init__(self, file: Any, phases: Phases):
        self._file, self._phases = file, phases

    def __enter__(self) -> Slow:
        self._phases.enter("ledger")
        return self

    def write(self, text: str) -> None:
        half = len(text) // 2
        self._file.write(text[:half])
        self._file.flush()
        time.sleep(PAUSE_SECS)
        self._file.write(text[half:])

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._phases.leave("ledger")


class Worker:
    """One process of a run."""

    def __init__(self, given: argparse.Namespace):
        self.workdir, self.forgetful = given.workdir, given.wrong == "forgetful"
        self.rank = given.process_id
        self.phases = SlowPath.phases = Phases.begin(self.workdir / f"phases-{self.rank}")
        is_first = self.rank == 0
        self.writer = fsh.metrics.create_default_writer(self.workdir / "metrics") if is_first else None
        self.hooks = fsh.SurgeryHooks(
            seed=given.seed, writer=self.writer, ledger=SlowPath(self.workdir / "ledger.jsonl")
        )
        self.hooks.ledger.path = SlowPath(self.hooks.ledger.path)
        self.training: Training = TRAININGS[given.kind](self.hooks, given.seed)

    def run(self) -> Any:
        """Trains to the end, from wherever the last checkpoint is."""
        training, hooks = self.training, self.hooks
        options = ocp.CheckpointManagerOptions(save_interval_steps=SAVE_EVERY, max_to_keep=3)
        with ocp.CheckpointManager(self.workdir / "checkpoints", options=options) as manager:
            with self.phases.during("restore"):
                state = self.restored(manager)
            step, structure = training.make_step(state), jax.tree.structure(state)
            for at in range(int(state.step) + 1, training.steps + 1):
                self.phases.step = at
                with self.phases.during("step"):
                    state, loss = jax.block_until_ready(step(state, training.batch(at)))
                state = self.called(at, state, loss)
                if jax.tree.structure(state) != structure:
                    step, structure = training.make_step(state), jax.tree.structure(state)
                if self.writer is not None:
                    self.writer.write_scalars(at, {"train/loss": float(loss)})
                self.save(manager, at, state)
            hooks.flush()
        if self.writer is not None:
            self.writer.close()
        return state

    def restored(self, manager: ocp.CheckpointManager) -> Any:
        """The state to go on from."""
        hooks, training = self.hooks, self.training
        if self.forgetful:  # a mistake that the verdict has to find: these hooks do not hear of the past
            hooks = fsh.SurgeryHooks(seed=hooks.seed)
            training = TRAININGS["mlp"](hooks, hooks.seed)
        state = fsh.checkpoint.restore(manager, training.initial, hooks)
        if self.rank == 0:
            tails = len(list(self.workdir.glob("ledger.jsonl.tail-*")))
            with (self.workdir / "restored.jsonl").open("a") as file:
                file.write(json.dumps({"step": int(state.step), "tails": tails}) + "\n")
        return state

    def called(self, at: int, state: Any, loss: Any) -> Any:
        """The state after the hooks; where steps make some due, that is a fire."""
        due = any(when.next_step(at - 1) == at for when in self.training.planned)
        with self.phases.during("fire") if due else contextlib.nullcontext():
            state = self.hooks(at, state, metrics={"loss": loss})
            return jax.block_until_ready(state) if due else state

    def save(self, manager: ocp.CheckpointManager, at: int, state: Any) -> None:
        """Saves where it is time; the phase ends with the commit, while the run goes on."""
        last = at == self.training.steps
        if not (last or manager.should_save(at)):
            return
        self.phases.enter("save")
        saved = fsh.checkpoint.save(manager, at, state, self.hooks, force=last)
        assert saved
        threading.Thread(target=self._committed, args=(manager, at), daemon=True).start()

    def _committed(self, manager: ocp.CheckpointManager, at: int) -> None:
        committed = pathlib.Path(str(manager.directory)) / str(at)
        while not committed.exists():  # Orbax renames the whole checkpoint to its name
            time.sleep(0.0005)
        self.phases.leave("save")


def write(path: pathlib.Path, state: Any) -> None:
    """Parameters, optimizer state and memory as this process holds them, by path and place; whole or not at all."""
    shards = {}
    held = (state.step, state.params, state.opt_state, state.surgery)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(held)[0]:
        for shard in leaf.addressable_shards:
            place = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
            shards[f"{jax.tree_util.keystr(keys)}|{place}|{shard.replica_id}"] = np.asarray(shard.data)
    np.savez(path.with_suffix(".new.npz"), **shards)
    os.replace(path.with_suffix(".new.npz"), path)


def connect(given: argparse.Namespace, port: str) -> None:
    """Sets JAX up: its devices, its cache and the other processes."""
    jax.config.update("jax_num_cpu_devices", 8 // given.num_processes if given.kind == "lm" else 1)
    if given.cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(given.cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if given.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", given.num_processes, given.process_id)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=TRAININGS, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=pathlib.Path, default=None)
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--process_id", type=int, default=0)
    parser.add_argument("--wrong", choices=("forgetful",), default=None)
    given = parser.parse_args()
    port = sys.stdin.readline().strip()  # all is imported; the process before this one may still be running
    if not port:
        return  # whoever started this one is gone
    connect(given, port)
    worker = Worker(given)
    write(given.workdir / f"final-{given.process_id}.npz", worker.run())


if __name__ == "__main__":
    main()
