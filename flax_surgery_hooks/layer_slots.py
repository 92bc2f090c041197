"""The optimizer slots of one layer of a stacked leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.layers import Layer
from flax_surgery_hooks.layouts import Fixed, Shape
from flax_surgery_hooks.slots import Slot


def slots_of_layer(
    slots: Sequence[Slot], layer: Layer, leaf: Shape, shapes: Mapping[int, Shape], kept: frozenset[str]
) -> tuple[Slot, ...]:
    """The slots of a layer: parts of those of its leaf.

    Args:
      slots: those of the leaf.
      layer: which layer.
      leaf: shape of the leaf.
      shapes: index of a slot -> its shape.
      kept: the kinds that stay as they are, of which a slot without layers is left out.

    Raises:
      SlotError: a slot that all layers share, and that would have to follow.
    """
    found = []
    for slot in slots:
        held = shapes[slot.index] if slot.offset is None else leaf
        together = [one for one in slots if (one.laid and one.laid.bundle) == (slot.laid and slot.laid.bundle)]
        axes = [layer.axis] if held == leaf else None
        if slot.laid is not None:
            axes = slot.laid.layout.layers([shapes[one.index] for one in together], leaf, layer.axis)
        if axes is not None:
            axis = axes[together.index(slot)] if slot.laid is not None else axes[0]
            found.append(_of_layer(slot, layer, axis, held))
        elif slot.kind not in kept:
            raise _shared(slot, held, leaf)
    return tuple(found)


def _of_layer(slot: Slot, layer: Layer, axis: int | None, held: Shape) -> Slot:
    laid = slot.laid
    if laid is not None:
        own = held if axis is None else Layer(axis, layer.index).shape(held)
        laid = dataclasses.replace(laid, leaf=layer.shape(laid.leaf), made=Fixed(own))
    return dataclasses.replace(slot, laid=laid, layer=layer.index, axis=axis)


def _shared(slot: Slot, held: Shape, leaf: Shape) -> SlotError:
    return SlotError(
        f"{slot.name} is shared by all layers of the leaf, so that it cannot follow the edit of one.",
        found=f"a slot shaped {list(held)} for a leaf shaped {list(leaf)}",
        write=f'opt_state={{"{slot.kind}": "keep"}}, or the whole leaf, without an index',
    )
