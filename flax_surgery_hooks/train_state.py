"""The train state: Flax's own, with room for what surgeries remember; and how its parts are read and put back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training import train_state as flax_train_state

from flax_surgery_hooks.errors import StateError
from flax_surgery_hooks.paths import Leaves, flatten, listed


class TrainState(flax_train_state.TrainState):
    """`flax.training.train_state.TrainState` with one more field, for what surgeries keep in the train state.

    Attributes:
      surgery: None, or what `SurgeryHooks.init` puts there for surgeries that remember.

    >>> import jax.numpy as jnp, optax
    >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    >>> state.surgery is None
    True
    """

    surgery: Any = None


class Parts(NamedTuple):
    """A train state taken apart.

    Attributes:
      params: the flattened parameters.
      opt_leaves: the leaves of the optimizer state.
      opt_treedef: their structure.
      tx: the optimizer.
    """

    params: Leaves
    opt_leaves: tuple[Any, ...]
    opt_treedef: Any
    tx: Any

    @property
    def opt_state(self) -> Any:
        """The optimizer state as optax knows it."""
        return jax.tree.unflatten(self.opt_treedef, self.opt_leaves)


def take_apart(state: Any) -> Parts:
    """Reads params, optimizer state and optimizer of a train state.

    Raises:
      StateError: a part is missing.
    """
    missing = [name for name in ("params", "opt_state", "tx", "replace") if not hasattr(state, name)]
    if missing:
        raise StateError(
            f"A train state needs params, opt_state, tx and replace; {listed(missing)} missing.",
            found=type(state).__name__,
            write="flax_surgery_hooks.TrainState.create(apply_fn=..., params=..., tx=...), or for loose parts fsh.bind "
            "and fsh.bind_nnx",
        )
    check_one_replica(state)
    if not callable(getattr(state.tx, "update", None)):
        raise StateError(
            "`state.tx` is no optax transformation.", found=type(state.tx).__name__, write="tx=optax.adamw(...)"
        )
    params = flatten(state.params)
    if not params.values:
        raise StateError("`state.params` has no leaves.", found=type(state.params).__name__, write="model.init(...)")
    opt_leaves, opt_treedef = jax.tree.flatten(state.opt_state)
    return Parts(params, tuple(opt_leaves), opt_treedef, state.tx)


def check_one_replica(state: Any) -> None:
    """Raises if the state's step, and so every leaf, has a leading device axis.

    Raises:
      StateError: it has.
    """
    step = getattr(state, "step", None)
    shape = () if step is None else jnp.shape(step)
    if len(shape) == 1:
        raise StateError(
            "The state is replicated for pmap: every leaf has a leading device axis.",
            found=f"state.step of shape {list(shape)}",
            write="hooks(step, flax.jax_utils.unreplicate(state)), then flax.jax_utils.replicate",
        )


def written(state: Any) -> Any:
    """The state once a call of hooks is complete: one that stands for objects edited in place writes into them."""
    write_back = getattr(state, "write_back", None)
    return state if write_back is None else write_back()


def put_back(state: Any, parts: Parts, params: dict[int, Any], slots: dict[int, Any]) -> Any:
    """The state with some leaves replaced; all others are the same objects.

    Args:
      state: the train state that `parts` was taken from.
      parts: its parts.
      params: new parameters by place.
      slots: new optimizer leaves by place.
    """
    values = [params.get(place, leaf) for place, leaf in enumerate(parts.params.values)]
    opt_leaves = [slots.get(place, leaf) for place, leaf in enumerate(parts.opt_leaves)]
    changes = {"params": jax.tree.unflatten(parts.params.treedef, values)}
    if slots:
        changes["opt_state"] = jax.tree.unflatten(parts.opt_treedef, opt_leaves)
    return state.replace(**changes)
