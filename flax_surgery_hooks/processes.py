"""Several processes of one run: which of them writes, and how they tell each other something within a time limit."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_surgery_hooks.errors import AgreementError, SurgeryError, shorten


def is_first() -> bool:
    """Whether this is the process that writes files, logs and metrics; initialises JAX's backend."""
    return jax.process_index() == 0


def exchange(name: str, text: str, secs: float) -> dict[int, str]:
    """What every process says under a name, by the number of the process; each process has to call this.

    Args:
      name: the same on every process, and never used before.
      text: what this process says.
      secs: how long it waits for the others.

    Raises:
      AgreementError: a process has not come in time, or is dead.
    """
    store = client()
    return _by_collectives(name, text, secs) if store is None else _by_store(store, name, text, secs)


def client() -> Any:
    """The key-value store with barriers that `jax.distributed` runs; None where JAX does not have it.

    JAX does not export it yet, and what `jax.experimental.multihost_utils` exports are collectives, which wait for ever
    and keep the device. Other libraries of the field reach for this very attribute.
    """
    try:
        from jax._src import distributed
    except ImportError:
        return None
    store = getattr(getattr(distributed, "global_state", None), "client", None)
    uses = ("key_value_set", "key_value_dir_get", "wait_at_barrier")
    return store if all(hasattr(store, method) for method in uses) else None


def _by_store(store: Any, name: str, text: str, secs: float) -> dict[int, str]:
    store.key_value_set(f"{name}/{jax.process_index()}", text)
    try:
        store.wait_at_barrier(name, max(1, int(secs * 1000)))
    except RuntimeError as error:  # at the time limit, or at once if another process is known to be dead
        raise _absent(set(_said(store, name)), secs, str(error)) from error
    return _said(store, name)


def _said(store: Any, name: str) -> dict[int, str]:
    return {int(key.rpartition("/")[2]): text for key, text in store.key_value_dir_get(name)}


def _by_collectives(name: str, text: str, secs: float) -> dict[int, str]:
    """As `_by_store`, by what JAX exports: a thread that hangs if a process never comes, and is left behind then."""
    said: dict[int, str] = {}
    errors: list[Exception] = []

    def gather() -> None:
        try:
            said.update(enumerate(_gathered(text)))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=gather, name=name, daemon=True)
    thread.start()
    thread.join(secs)
    if len(said) < jax.process_count():
        # Who is missing nobody can say: a collective tells only that not all have come.
        raise _absent({jax.process_index()}, secs, str(errors[0]) if errors else "") from next(iter(errors), None)
    return said


def _gathered(text: str) -> list[str]:
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(mine.size)))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: mine.size] = mine
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _absent(here: set[int], secs: float, why: str) -> AgreementError:
    missing = tuple(sorted(set(range(jax.process_count())) - here))
    who = f"nothing from {numbered(missing)}" if missing else "all there now, too late for those that gave up"
    told = next((line for line in why.splitlines() if line), "")
    return AgreementError(
        f"Not all processes came within {secs:g} s to compare what they hold, and would have waited for ever.",
        missing=missing,
        found=f"{who}{f' ({shorten(told, 160)})' if told else ''}",
        write="the same calls of the hooks in every process; agree_secs= if one of them is slower than that. What the "
        "others died of is in their own output",
    )


def numbered(processes: tuple[int, ...]) -> str:
    """Processes for a message.

    >>> numbered((1,)), numbered((0, 2, 3))
    ('process 1', 'processes 0, 2, 3')
    """
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"


_actions = itertools.count()  # of `by_first` in this process: the n-th of each go together


def by_first(what: str, action: Callable[[], str], secs: float = 300.0) -> str:
    """What an action returns on the first process, which alone does it; where it raises, every process does.

    Every process has to call this, in the same order as the others.

    Raises:
      SurgeryError: on the first process, as the action raised it.
      AgreementError: on the others, or a process did not come.
    """
    if jax.process_count() == 1:
        return action()
    name = f"flax_surgery_hooks/{what}/{next(_actions)}"
    if is_first():
        try:
            text = action()
        except SurgeryError as error:
            exchange(name, json.dumps([str(error), ""]), secs)
            raise
        exchange(name, json.dumps(["", text]), secs)
        return text
    failed, text = json.loads(exchange(name, "", secs)[0])
    if failed:
        raise AgreementError("Process 0 could not do what all wait for.", found=failed, write="what its own error says")
    return str(text)
