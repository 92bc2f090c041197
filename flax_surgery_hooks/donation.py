"""Giving the memory of the old leaves to the new ones, where that is needed.

A donated array is gone, also where the run then fails. So fires keep the old values unless memory demands it: until the
caller puts the new state in the place of the old one, both are there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.programs import Arrays, Ready

DONATE = ("auto", "always", "never")
MARGIN = 0.05
"""Part of a device's memory that a fire leaves free, for what is fragmented or allocated meanwhile."""


def wanted(choice: str, ready: Sequence[Ready], given: Sequence[tuple[Any, ...]]) -> bool:
    """Whether a fire is to donate; if so, its programs are compiled, so that only their runs can still fail.

    Args:
      choice: one of `DONATE`.
      ready: the units.
      given: the further arguments of each one's edit.
    """
    if choice == "never" or (choice == "auto" and not _does_not_fit(ready, given)):
        return False
    for one, rest in zip(ready, given, strict=True):
        one.passes.compile_donating(one.placed, *rest)
    return True


def _does_not_fit(ready: Sequence[Ready], given: Sequence[tuple[Any, ...]]) -> bool:
    leaves = jax.tree.leaves([one.placed for one in ready])
    if not demanded(sys.maxsize, leaves):  # the backend does not tell: nothing to compile for
        return False
    needs = [one.passes.memory(one.placed, *rest) for one, rest in zip(ready, given, strict=True)]
    known = [need for need in needs if need is not None]
    needed = sum(need.outputs for need in known) + max((need.temporaries for need in known), default=0)
    return demanded(needed, leaves)


def demanded(needed: int, leaves: Iterable[Any]) -> bool:
    """Whether so many bytes more do not fit on a device of these leaves; False where the backend does not tell.

    >>> demanded(2**60, [jnp.ones(2)])  # CPU does not
    False
    """
    devices = {device for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.sharding.addressable_devices}
    free = [_free(device) for device in devices]
    return any(bytes_ is not None and needed > bytes_ for bytes_ in free)


def _free(device: Any) -> int | None:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] * (1 - MARGIN)) - stats["bytes_in_use"]


def unaliased(ready: Sequence[Ready], state: Any) -> list[Ready]:
    """The units with copies in the place of arrays that share their memory with another leaf of the state.

    Optimizers that remember the parameters they started from (prodigy, mechanize) may hold the very same buffer.
    """
    own = unshared(state)

    def copied(leaf: Any) -> Any:
        return leaf if own(leaf) else jnp.copy(leaf)

    return [one._replace(placed=Arrays(*jax.tree.map(copied, tuple(one.placed)))) for one in ready]


def unshared(state: Any) -> Callable[[Any], bool]:
    """Whether an array, or what is no array, shares its memory with no other leaf of the state."""
    shared = Counter(map(buffer_of, leaves_of_state(state)))
    return lambda leaf: not isinstance(leaf, jax.Array) or shared[buffer_of(leaf)] <= 1


def leaves_of_state(state: Any) -> list[Any]:
    """All leaves of a train state."""
    leaves = jax.tree.leaves(state)
    if len(leaves) == 1 and leaves[0] is state:  # no pytree, only something with the fields of a train state
        leaves = jax.tree.leaves((state.params, state.opt_state, getattr(state, "surgery", None)))
    return leaves


def buffer_of(leaf: Any) -> Any:
    """What two arrays have in common if they share their memory; on CPU it waits for an array that is not there yet."""
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.is_deleted():
        return id(leaf)  # one that was donated has nothing to share any more
    return leaf.addressable_shards[0].data.unsafe_buffer_pointer() if leaf.addressable_shards else id(leaf)
