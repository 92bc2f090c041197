"""One surgery with its rules, the leaves that each of its calls sees, and what it is given beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import SlotError, located
from flax_surgery_hooks.paths import Leaves, listed
from flax_surgery_hooks.rules import SlotRules
from flax_surgery_hooks.selection import Selection
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
      guard: "finite" or "off".
      figures: whether figures are computed.
      histograms: whether elements of the leaves are kept for histograms.
      fields: fields of the train state whose leaves can be selected too, under the field's name.
      static: those of the trainer's inputs that are neither arrays nor numbers, as pairs of name and value.
    """

    edit: Edit
    selection: Selection
    rules: SlotRules
    fresh: str = "mean"
    guard: str = "finite"
    figures: bool = True
    histograms: bool = False
    fields: tuple[str, ...] = ()
    static: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Side:
    """Leaves and slots on one side of an edit, before or after it.

    Attributes:
      paths: paths of the leaves.
      places: their places among the flattened parameters.
      slots: their slots in the optimizer state.
      dtypes: dtypes of leaves and slots, `NO_DTYPES` where those before the edit hold.
    """

    paths: tuple[str, ...]
    places: tuple[int, ...]
    slots: tuple[Slot, ...]
    dtypes: tuple[tuple[Any, ...], tuple[Any, ...]] = NO_DTYPES

    def position(self, slot: Slot) -> int:
        """Which of the leaves a slot belongs to."""
        return self.places.index(slot.owner)

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


def units(operation: Operation, leaves: Leaves, slots: Mapping[int, tuple[Slot, ...]]) -> list[Unit]:
    """Selects leaves and groups them by call of the surgery.

    Raises:
      SelectionError: see `Selection.resolve`.
      SlotError: a slot whose layout or starting value the rule cannot use.
    """
    places = operation.selection.resolve(leaves)
    for place in places:
        with located(path=leaves.paths[place]):
            for slot in slots.get(place, ()):
                _check_start(operation, slot)
    grouped = [places] if operation.edit.many else [(place,) for place in places]
    return [
        Unit(
            tuple(leaves.paths[place] for place in group),
            tuple(group),
            tuple(slot for place in group for slot in slots.get(place, ())),
        )
        for group in grouped
    ]


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
