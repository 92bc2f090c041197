"""One surgery with its rules, the leaves that each of its calls sees, and what it is given beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import SlotError, located
from flax_surgery_hooks.guards import Guard
from flax_surgery_hooks.layer_slots import slots_of_layer
from flax_surgery_hooks.layers import Layer
from flax_surgery_hooks.paths import Leaves, listed
from flax_surgery_hooks.rules import SlotRules
from flax_surgery_hooks.selection import Pick, Selection
from flax_surgery_hooks.slots import Slot
from flax_surgery_hooks.surgery import Edit, path_hash

FOLLOWING = ("transport", "carry")
NO_DTYPES: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
NOTHING = np.zeros((0,), np.float32)
"""The leaf or slot before an edit that adds it."""


@dataclass(frozen=True)
class Operation:
    """Everything about one surgery that does not depend on a train state.

    Attributes:
      edit: the surgery.
      selection: which leaves it edits.
      rules: how slots follow.
      fresh: what second moments without history start from, "mean" or "init".
      guard: "finite", "off", or a function of figures, see `guards`.
      figures: whether figures are computed.
      histograms: whether elements of the leaves are kept for histograms.
      fields: fields of the train state whose leaves can be selected too, under the field's name.
      static: those of the trainer's inputs that are neither arrays nor numbers, as pairs of name and value.
    """

    edit: Edit
    selection: Selection
    rules: SlotRules
    fresh: str = "mean"
    guard: Guard = "finite"
    figures: bool = True
    histograms: bool = False
    fields: tuple[str, ...] = ()
    static: tuple[tuple[str, Any], ...] = ()

    @property
    def bound(self) -> Any:
        """The guard, if it is a function of figures; else None."""
        return self.guard if callable(self.guard) else None


@dataclass(frozen=True)
class Side:
    """Leaves and slots on one side of an edit, before or after it.

    Attributes:
      paths: paths of the leaves.
      places: their places among the flattened parameters.
      slots: their slots in the optimizer state.
      dtypes: dtypes of leaves and slots, `NO_DTYPES` where those before the edit hold.
      layers: which layer of a stacked leaf each is, or None for the whole leaf; () if all are whole.
    """

    paths: tuple[str, ...]
    places: tuple[int, ...]
    slots: tuple[Slot, ...]
    dtypes: tuple[tuple[Any, ...], tuple[Any, ...]] = NO_DTYPES
    layers: tuple[Layer | None, ...] = ()

    @property
    def pieces(self) -> tuple[tuple[str, int, Layer | None], ...]:
        """Path, place and layer of each leaf."""
        return tuple(zip(self.paths, self.places, self.layers or (None,) * len(self.paths), strict=True))

    def position(self, slot: Slot) -> int:
        """Which of the leaves a slot belongs to."""
        if not self.layers:
            return self.places.index(slot.owner)
        held = [(place, layer and layer.index) for _, place, layer in self.pieces]
        return held.index((slot.owner, slot.layer))

    def path(self, slot: Slot) -> str:
        """The path of the leaf that a slot belongs to."""
        return self.paths[self.position(slot)]


@dataclass(frozen=True)
class Unit(Side):
    """The leaves that one call of the surgery sees: one, or all selected ones.

    Attributes:
      other: the leaves after an edit that adds or removes some; None where the paths stay.
    """

    other: Side | None = None

    @property
    def after(self) -> Side:
        """The leaves after the edit."""
        return self if self.other is None else self.other

    @property
    def added(self) -> tuple[str, ...]:
        """Paths that the edit adds."""
        return tuple(path for path in self.after.paths if path not in self.paths)

    @property
    def removed(self) -> tuple[str, ...]:
        """Paths that it takes away."""
        return tuple(path for path in self.paths if path not in self.after.paths)

    def difference(self) -> str:
        """What the edit does to paths, for an error."""
        parts = (("adds", self.added), ("removes", self.removed))
        return "; ".join(f"{what} {listed(paths)}" for what, paths in parts if paths)

    def origins(self) -> tuple[int | None, ...]:
        """Per slot after the edit its index among those before, by field and path; None for the slot of a new leaf."""
        if self.other is None:
            return tuple(range(len(self.slots)))
        known = {(slot.group, self.path(slot)): i for i, slot in enumerate(self.slots)}
        return tuple(known.get((slot.group, self.other.path(slot))) for slot in self.other.slots)


class Fire(NamedTuple):
    """What a surgery gets beside its leaves; a pytree of arrays.

    Attributes:
      key: the key of the fire, or None if nothing asks for it.
      step: what `state.step` holds, int32 scalar.
      inputs: those of the trainer's inputs that the surgery asked for and that are arrays or numbers.
      hashes: `path_hash` of each leaf of the unit.
      memory: what the surgery remembers of the unit; () if it asks for none.
    """

    key: jax.Array | None
    step: Any
    inputs: dict[str, Any]
    hashes: tuple[Any, ...]
    memory: Any = ()


def fire_for(unit: Unit, key: jax.Array | None, step: Any, inputs: dict[str, Any], memory: Any = ()) -> Fire:
    """The `Fire` of one unit."""
    return Fire(key, step, inputs, tuple(path_hash(path) for path in unit.paths), memory)


def units(
    operation: Operation, leaves: Leaves, slots: Mapping[int, tuple[Slot, ...]], opt_leaves: Sequence[Any] = ()
) -> list[Unit]:
    """Selects leaves and groups them by call of the surgery.

    Args:
      operation: the surgery and its rules.
      leaves: the flattened parameters.
      slots: place of a parameter -> its slots.
      opt_leaves: the leaves of the optimizer state that these are in.

    Raises:
      SelectionError: see `Selection.picks`.
      SlotError: a slot whose layout or starting value the rule cannot use.
    """
    picks = operation.selection.picks(leaves)
    found = [_pick_slots(operation, pick, leaves, slots.get(pick.place, ()), opt_leaves) for pick in picks]
    every = range(len(picks))
    grouped = [tuple(every)] if operation.edit.many else [(i,) for i in every]
    return [
        Unit(
            tuple(picks[i].path(leaves) for i in group),
            tuple(picks[i].place for i in group),
            tuple(slot for i in group for slot in found[i]),
            layers=tuple(picks[i].layer for i in group) if any(picks[i].layer for i in group) else (),
        )
        for group in grouped
    ]


def _pick_slots(
    operation: Operation, pick: Pick, leaves: Leaves, slots: tuple[Slot, ...], opt_leaves: Sequence[Any]
) -> tuple[Slot, ...]:
    with located(path=pick.path(leaves)):
        for slot in slots:
            _check_start(operation, slot)
        if pick.layer is None or not slots:
            return slots
        shapes = {slot.index: np.shape(opt_leaves[slot.index]) for slot in slots}
        kept = frozenset(slot.kind for slot in slots if operation.rules.rule(slot.kind) == "keep")
        kept = kept if operation.edit.edit_slots is None else frozenset()
        return slots_of_layer(slots, pick.layer, np.shape(leaves.values[pick.place]), shapes, kept)


def _check_start(operation: Operation, slot: Slot) -> None:
    rule = operation.rules.rule(slot.kind)
    needs_init = rule == "reset" or (rule in FOLLOWING and (operation.fresh == "init" or slot.kind == "invariant"))
    if needs_init and slot.init is None and slot.kind != "param":
        raise SlotError(
            f"`tx.init` fills {slot.name} with no constant, so that elements cannot start anew in it.",
            write=f'opt_state={{"{slot.kind}": "keep"}}',
        )


def follows(operation: Operation, unit: Unit) -> bool:
    """Whether any slot of a unit has to be moved by the derivative of the edit."""
    return any(operation.rules.rule(slot.kind) in FOLLOWING for slot in unit.slots)


def compute_dtype(dtype: Any) -> Any:
    """The dtype in which a surgery sees a leaf: float32 for shorter floats, else the leaf's own."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def like(value: jax.Array, old: Any) -> jax.Array:
    """`value` in the dtype and weak type of `old`; from weak to strong would retrace the train step."""
    value = jnp.asarray(value)  # a constant may come as a number
    value = value.astype(jnp.result_type(old)) if hasattr(old, "dtype") else value
    if not getattr(old, "weak_type", False):
        return value
    # The primitive itself: `lax.convert_element_type` cannot make a strong array weak.
    return jax.lax.convert_element_type_p.bind(value, new_dtype=value.dtype, weak_type=True, sharding=None)
