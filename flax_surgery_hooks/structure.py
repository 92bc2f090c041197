"""Fires that change shapes: what goes with them, and the checks that the parts of the state still belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import StructureError, SurgeryError, UserCodeError, shorten
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.operation import Unit
from flax_surgery_hooks.paths import join, listed


@dataclass(frozen=True)
class Reshape:
    """What a hook brings for the shapes after its fire.

    Attributes:
      apply_fn: replaces `state.apply_fn`, or None.
      tx: replaces `state.tx`, or None; its `init` must make an optimizer state of the same structure.
      shardings: from path and new shape of a leaf to where it goes, or None; see `targets.Place`.
      on_reshape: `on_reshape(state, record)`, called after a fire that changed shapes, for what the trainer has to
        rebuild (a jitted step that closes over the model, shardings, an EMA). Returns None or another state.
    """

    apply_fn: Callable[..., Any] | None = None
    tx: Any = None
    on_reshape: Callable[[Any, Record], Any] | None = None
    shardings: Callable[[str, Any], Any] | None = None

    @property
    def declared(self) -> bool:
        """Whether the hook says that it changes shapes."""
        return any(part is not None for part in (self.apply_fn, self.tx, self.on_reshape, self.shardings))

    def check(self, state: Any) -> None:
        """Raises if the hook brings what this state has no place for.

        Raises:
          StructureError: `apply_fn=` for a state without one.
        """
        if self.apply_fn is not None and not hasattr(state, "apply_fn"):
            raise StructureError(
                "The hook brings `apply_fn=`, but the state has no such field.",
                found=type(state).__name__,
                write="on_reshape=, which is called with the new state",
            )

    def check_paths(self, state: Any, plan: Sequence[Unit]) -> None:
        """Raises if a fire would add or remove leaves of a model that is edited in place.

        Raises:
          StructureError: it would: the model's own code decides which variables it has.
        """
        changed = [unit for unit in plan if unit.other is not None]
        if changed and hasattr(state, "write_back"):
            raise StructureError(
                "Leaves cannot be added to or removed from a model that is edited in place.",
                found=changed[0].difference(),
                write="a new model with these variables and a new `nnx.Optimizer`, bound anew, or an edit that keeps "
                "paths",
            )

    def replaced(self, state: Any) -> Any:
        """The state with the model function and optimizer that go with the new shapes.

        Raises:
          StructureError: the optimizer state does not fit them.
        """
        changes = {name: value for name, value in (("apply_fn", self.apply_fn), ("tx", self.tx)) if value is not None}
        state = state.replace(**changes) if changes else state
        check_opt_state(state)
        return state

    def finish(self, state: Any, record: Record) -> Any:
        """Calls `on_reshape`.

        Raises:
          UserCodeError: it raised.
          StructureError: it returned something that is no train state.
        """
        return state if self.on_reshape is None else called_back("on_reshape", self.on_reshape, state, state, record)


def called_back(name: str, function: Callable[..., Any], state: Any, *given: Any) -> Any:
    """What a callback of the trainer makes of a state: another one, or the same if it returns None.

    Args:
      name: of the callback, for messages.
      function: the callback.
      state: the state.
      *given: what the callback is called with.

    Raises:
      UserCodeError: it raised.
      StructureError: it returned something that is no train state.
    """
    try:
        result = function(*given)
    except SurgeryError:
        raise
    except Exception as error:
        raise UserCodeError(f"{name} raised {type(error).__name__}: {shorten(error)}") from error
    if result is None:
        return state
    if not hasattr(result, "params") or not hasattr(result, "opt_state"):
        raise StructureError(
            f"{name} returned something that is no train state.",
            found=type(result).__name__,
            write="the state, or None to leave it",
        )
    return result


def shapes(params: Any) -> Any:
    """The structure of the params and the shapes of all leaves, to compare."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple(map(jnp.shape, leaves))


def check_opt_state(state: Any) -> None:
    """Checks abstractly that the optimizer state is what `state.tx` makes for `state.params`.

    Raises:
      StructureError: another structure, or leaves of other shapes.
    """
    try:
        fitting = jax.eval_shape(state.tx.init, state.params)
    except Exception as error:
        raise StructureError(
            f"`tx.init` fails on the new parameters: {type(error).__name__}: {shorten(error, 200)}",
            write="tx= of the hook: the optimizer for the new shapes",
        ) from error
    structure: Any = jax.tree.structure(fitting)
    if structure != jax.tree.structure(state.opt_state):
        raise StructureError(
            "The optimizer state has another structure than `tx` makes for the new parameters.",
            found=shorten(jax.tree.structure(state.opt_state), 150),
            write="tx= with the same chain of transforms",
        )
    held: list[Any] = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    wrong = [join(keys) for (keys, a), b in zip(held, jax.tree.leaves(fitting), strict=True) if jnp.shape(a) != b.shape]
    if wrong:
        raise StructureError(
            "Slots of the optimizer state have other shapes than `tx` makes for the new parameters.",
            found=listed(wrong),
            write="opt_state='reset' or 'carry' for these, so that they change with the leaf",
        )
