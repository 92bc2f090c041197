"""New layers put back into their stacked leaves and slots, before these go back into the train state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from flax_surgery_hooks.layers import with_layers
from flax_surgery_hooks.operation import Side, Unit, like
from flax_surgery_hooks.programs import Arrays
from flax_surgery_hooks.slots import Slot
from flax_surgery_hooks.train_state import Parts

MayDonate = Callable[[Any], bool]


def never(leaf: Any) -> bool:
    """No leaf is donated."""
    return False


def whole_leaves(
    parts: Parts, units: Sequence[Side], values: Sequence[Sequence[Any]], may_donate: MayDonate = never
) -> dict[str, Any]:
    """Path -> new leaf; of one of which layers were edited the whole, with its other layers as they were.

    Args:
      parts: the state's.
      units: the leaves and layers.
      values: new leaves and layers of each unit.
      may_donate: whether a stacked leaf gives its memory to the new one.
    """
    whole: dict[str, Any] = {}
    stacks: dict[tuple[int, int], dict[int, Any]] = {}
    for unit, new in zip(units, values, strict=True):
        for (path, place, layer), value in zip(unit.pieces, new, strict=True):
            if layer is None:
                whole[path] = value
            else:
                stacks.setdefault((place, layer.axis), {})[layer.index] = value
    for (place, axis), layers in stacks.items():
        leaf = parts.params.values[place]
        whole[parts.params.paths[place]] = _restacked(leaf, axis, layers, may_donate(leaf))
    return whole


def whole_slots(
    parts: Parts, plan: Sequence[Unit], arrays: Sequence[Arrays], held: Callable[[Slot], Any], may_donate: MayDonate
) -> Iterator[tuple[Slot, str, Any]]:
    """Slot, path of its parameter and new value; those of one parameter's layers once, together.

    Args:
      parts: the state's.
      plan: the units.
      arrays: what was made of them.
      held: the whole slot before.
      may_donate: whether a stacked slot gives its memory to the new one.
    """
    stacks: dict[tuple[int, int], tuple[Slot, dict[int, Any]]] = {}
    for unit, new in zip(plan, arrays, strict=True):
        for slot, value in zip(unit.after.slots, new.slots, strict=True):
            if slot.layer is None:
                yield slot, unit.after.path(slot), value
            elif slot.axis is None:
                yield slot, parts.params.paths[slot.owner], value
            else:
                stacks.setdefault((slot.index, slot.owner), (slot, {}))[1][slot.layer] = value
    for slot, layers in stacks.values():
        leaf = held(slot)
        assert slot.axis is not None
        donate = slot.offset is None and may_donate(leaf)
        yield slot, parts.params.paths[slot.owner], _restacked(leaf, slot.axis, layers, donate)


def _restacked(leaf: Any, axis: int, layers: dict[int, Any], donate: bool) -> Any:
    weak = getattr(leaf, "weak_type", False)
    new = with_layers(leaf, axis, layers, donate=donate)
    return like(new, leaf) if weak and not isinstance(leaf, jax.ShapeDtypeStruct) else new
