"""Averages of weights that hooks keep in the train state: what their memory says, and parameters with them in place.

The memory of a leaf is a dict: `average` alone; `average` and the `count` of snapshots in it; or `snapshots`, a ring of
as many as are averaged, by "0", "1", ..., and the `count` of those taken so far. All are float32 (or what the leaf is
computed in). Before the first snapshot the average is the leaf itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import StateError, StructureError, located, typed
from flax_surgery_hooks.layers import Layer, axis_of, taken, with_layers
from flax_surgery_hooks.paths import Leaves, close_matches, flatten, listed
from flax_surgery_hooks.remembered import remembered

AVERAGE, SNAPSHOTS, COUNT = "average", "snapshots", "count"


def average_of(state: Any, hook: str) -> Any:
    """The parameters with a hook's averages in place of the leaves that it averages, for evaluation.

    Args:
      state: whose `surgery` field holds the averages once `hooks.init(state)` was called; also while it is traced.
      hook: name of the hook, whose surgery is `Ema`, `Swa` or `Lawa`.

    Returns:
      A tree like `state.params`: averages are new arrays in the dtype of their leaf, all others are those of the state.

    Raises:
      StateError: the state holds no memory of such a hook, or it is not of averages.
      StructureError: an average does not fit the parameters.

    >>> import optax, flax_surgery_hooks as fsh
    >>> hooks = fsh.SurgeryHooks()
    >>> hooks.add("ema", fsh.surgeries.Ema(0.75), params="w", when=fsh.at(1_000_000))
    >>> params = {"w": jnp.array([4.0]), "b": jnp.array([1.0])}
    >>> state = hooks.init(fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0)))
    >>> state = hooks.observe(state.apply_gradients(grads={"w": jnp.array([4.0]), "b": jnp.array([0.0])}))
    >>> state.params["w"].tolist(), fsh.average_of(state, "ema")["w"].tolist()
    ([0.0], [3.0])
    """
    leaves = flatten(state.params)
    places = {path: place for place, path in enumerate(leaves.paths)}
    values = list(leaves.values)
    layers: dict[int, dict[int, Any]] = {}
    for path, memory in averages_in(state, hook).items():
        stem, _, index = path.removesuffix("]").rpartition("[")
        with located(hook=hook, path=path):
            if path in places:
                values[places[path]] = _in_place(memory, leaves.values[places[path]])
            elif path.endswith("]") and stem in places and index.isdecimal():
                layer = _layer(leaves, places[stem], int(index))
                layers.setdefault(places[stem], {})[int(index)] = _in_place(memory, layer)
            else:
                raise StructureError(
                    "An average is of a leaf that the parameters do not have.",
                    found=listed(leaves.paths),
                    write=listed(close_matches(path, leaves.paths)) or "a hook on parameters, not on other fields",
                )
    for place, ones in layers.items():
        values[place] = with_layers(leaves.values[place], axis_of(leaves, place), ones)
    return jax.tree.unflatten(leaves.treedef, values)


def averages_in(state: Any, hook: str) -> dict[str, Any]:
    """The memory of averages of a hook, by path.

    Raises:
      StateError: as for `average_of`.
    """
    held = remembered(state, hook, "averages")
    if not isinstance(held, Mapping) or not held or not all(map(_is_average, held.values())):
        raise StateError(
            f"What the hook {hook!r} remembers is not averages.",
            found=listed(held) if isinstance(held, Mapping) else typed(held),
            write="the name of a hook whose surgery is Ema, Swa or Lawa",
        )
    return dict(held)


def averaged(memory: Mapping[str, Any], leaf: jax.Array) -> jax.Array:
    """The average of a leaf, as a new array.

    Args:
      memory: what a surgery remembers of it.
      leaf: the leaf, which is its own average before the first snapshot.
    """
    if COUNT not in memory:
        return jnp.copy(memory[AVERAGE])  # else leaf and memory would be one buffer, which cannot be donated twice
    count = memory[COUNT]
    mean = memory[AVERAGE] if AVERAGE in memory else _mean(memory[SNAPSHOTS], count)
    return jnp.where(count > 0, mean, leaf.astype(mean.dtype))


def _mean(snapshots: Mapping[str, jax.Array], count: jax.Array) -> jax.Array:
    """The mean of those that there are."""
    ordered = [snapshots[str(place)] for place in range(len(snapshots))]
    # Not a product with what is left out: the ring starts from zeros, but may hold what is not finite.
    total = sum(jnp.where(place < count, one, 0) for place, one in enumerate(ordered))
    return total / jnp.clip(count, 1, len(ordered)).astype(ordered[0].dtype)


def _in_place(memory: Mapping[str, Any], leaf: Any) -> jax.Array:
    average = averaged(memory, jnp.asarray(leaf))
    if average.shape != jnp.shape(leaf):
        raise StructureError(
            "An average has another shape than its leaf.",
            found=f"{list(average.shape)} for {list(jnp.shape(leaf))}",
            write="hooks.init(state), on a state whose `surgery` is None",
        )
    return average.astype(jnp.result_type(leaf))


def _layer(leaves: Leaves, place: int, index: int) -> Any:
    return taken(leaves.values[place], Layer(axis_of(leaves, place), index))


def _is_average(memory: Any) -> bool:
    return isinstance(memory, Mapping) and set(memory) in ({AVERAGE}, {AVERAGE, COUNT}, {SNAPSHOTS, COUNT})
