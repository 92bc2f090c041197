"""Fires that fail while they run: out of memory, in a callback. What is left of the state, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from flax_surgery_hooks.errors import FireError, SurgeryError, shorten


@contextlib.contextmanager
def explained(state: Any, manager: Any) -> Iterator[None]:
    """What a fire on this state raises within becomes a `FireError`.

    Args:
      state: as it was before the fire.
      manager: Orbax's, of the directory that the run is saved in, or None.

    Raises:
      FireError: something was raised that is no `SurgeryError`.
    """
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise _failed(state, manager, error) from error


def _failed(state: Any, manager: Any, error: Exception) -> FireError:
    gone = any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(_arrays(state)))
    if not gone:
        return FireError(
            f"The fire failed while it ran: {type(error).__name__}: {shorten(error)}",
            found="the state in hand is that before this call, whole",
            write="a surgery that needs less or does not raise; the same call can be made again, or hooks.remove(name)",
        )
    step = None if manager is None else manager.latest_step()
    last = "none that this process knows of" if step is None else f"that of step {step} in {manager.directory}"
    return FireError(
        f"The fire failed while it ran, and had been given the memory of the old leaves: {type(error).__name__}: "
        f"{shorten(error)}",
        found=f"the state in hand is gone; the last whole checkpoint is {last}",
        write='fsh.checkpoint.restore, and SurgeryHooks(donate="never") where both copies fit',
    )


def _arrays(state: Any) -> Any:
    return [getattr(state, name, None) for name in ("params", "opt_state", "surgery")]


def wait(state: Any) -> None:
    """Waits until the arrays that a fire edits are there, and raises if they will never be."""
    jax.block_until_ready(_arrays(state))
