"""Slots of another shape than their parameter: how they are lifted to it, and lowered back once they have moved.

Factored second moments (Adafactor), sums along axes (SM3), one number per leaf (NovoGrad) or per unit, memories of past
steps (L-BFGS), and moments in a projected space (GaLore).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.lineage import safe_divide

Shape = tuple[int, ...]


class Layout(Protocol):
    """How slots lie that do not mirror their parameter.

    Attributes:
      name: in tables and messages.
      joins: "fields" if the fields of a state are lifted together, "keys" if the leaves of one field are, else "".
      stacked: whether a lifted slot has one more axis in front.
      keeps: whether slots stay as they are where the parameter keeps its shape.
      needs_transport: whether they can follow by the chain rule only, so that another rule starts them anew.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  # properties, so that frozen dataclasses are layouts
    @property
    def joins(self) -> str: ...  # noqa: D102
    @property
    def stacked(self) -> bool: ...  # noqa: D102
    @property
    def keeps(self) -> bool: ...  # noqa: D102
    @property
    def needs_transport(self) -> bool: ...  # noqa: D102

    def applies(self, shape: Shape, leaf: Shape, beside: Sequence[Shape]) -> bool:
        """Whether a slot of this shape lies like this; `beside` are the shapes of the leaf's slots in the state."""

    def lift(self, parts: Sequence[jax.Array], leaf: Shape) -> jax.Array:
        """The slot shaped like the leaf."""

    def lower(self, moved: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
        """The parts of a moved slot, in these shapes."""

    def layers(self, shapes: Sequence[Shape], leaf: Shape, axis: int) -> list[int | None] | None:
        """Along which axis of each part lie the parts of a stacked leaf's layers, which lie along `axis` in the leaf.

        None for a part that says nothing of any layer; None for all where layers share what a part says.
        """


@dataclass(frozen=True)
class _Traits:
    """The attributes of a layout, most of which are the same for most."""

    name: str = ""
    joins: str = ""
    stacked: bool = False
    keeps: bool = False
    needs_transport: bool = False

    def layers(self, shapes: Sequence[Shape], leaf: Shape, axis: int) -> list[int | None] | None:
        """None: what they say is of the whole leaf."""
        return None


@dataclass(frozen=True)
class Factored(_Traits):
    """Second moments as a mean over rows and one over columns (Adafactor): their product over their mean.

    Exact for second moments of rank 1; then for any edit that is monomial in them.
    """

    name: str = "factored"
    joins: str = "fields"

    def applies(self, shape: Shape, leaf: Shape, beside: Sequence[Shape]) -> bool:
        """Always: leaves that are not factored have their whole moment in the last part."""
        return True

    def lift(self, parts: Sequence[jax.Array], leaf: Shape) -> jax.Array:
        """The product of both factors over their mean; 0 where that is 0."""
        row, column, whole = parts
        if whole.shape == leaf and not _dims(leaf, row.shape, column.shape):
            return whole
        small, large = _dims(leaf, row.shape, column.shape)
        rows, columns = jnp.expand_dims(row, large), jnp.expand_dims(column, small)
        return safe_divide(rows, rows.mean(axis=small, keepdims=True)) * columns

    def lower(self, moved: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
        """Means along each of the two axes, or the whole."""
        row, column, whole = shapes
        dims = _dims(moved.shape, row, column)
        if not dims:
            return [jnp.zeros(row, moved.dtype), jnp.zeros(column, moved.dtype), moved]
        small, large = dims
        return [moved.mean(axis=large), moved.mean(axis=small), jnp.zeros(whole, moved.dtype)]

    def layers(self, shapes: Sequence[Shape], leaf: Shape, axis: int) -> list[int | None] | None:
        """Those of the factors, unless a mean is taken over layers; those of the whole where there are no factors."""
        row, column, whole = shapes
        dims = _dims(leaf, row, column)
        if axis in dims or not (dims or whole == leaf):
            return None
        small, large = dims or (len(leaf), len(leaf))
        axes = [axis - (large < axis), axis - (small < axis), None] if dims else [None, None, axis]
        rows, columns = (_without(part, one) for part, one in zip((row, column), axes[:2], strict=True))
        fits = _dims(_without(leaf, axis), rows, columns) == tuple(one - (axis < one) for one in dims)
        return axes if fits else None  # where sizes are equal, a layer alone may look as if it lay otherwise


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _dims(leaf: Shape, row: Shape, column: Shape) -> tuple[int, ...]:
    """The axes that optax factors over: of the second largest and of the largest size; () if it does not."""
    if len(leaf) < 2:
        return ()
    small, large = (int(axis) for axis in np.argsort(leaf)[-2:])
    fits = row == tuple(np.delete(leaf, large)) and column == tuple(np.delete(leaf, small))
    return (small, large) if fits else ()


@dataclass(frozen=True)
class PerAxis(_Traits):
    """One sum per index of each axis (SM3), whose least bounds the moment of an element from above."""

    name: str = "per axis"
    joins: str = "keys"

    def applies(self, shape: Shape, leaf: Shape, beside: Sequence[Shape]) -> bool:
        """Always; the state's fields that mirror the leaf are registered without."""
        return True

    def lift(self, parts: Sequence[jax.Array], leaf: Shape) -> jax.Array:
        """The least of the sums that an element is part of."""
        lifted = [jnp.expand_dims(part, [i for i in range(len(leaf)) if i != axis]) for axis, part in enumerate(parts)]
        result = jnp.broadcast_to(lifted[0], leaf)
        for one in lifted[1:]:
            result = jnp.minimum(result, one)
        return result

    def lower(self, moved: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
        """Per index the largest of its elements: still a bound from above."""
        axes = range(moved.ndim)
        return [moved.max(axis=tuple(i for i in axes if i != axis), initial=0) for axis in axes]


@dataclass(frozen=True)
class PerLeaf(_Traits):
    """One number for the whole leaf, the sum over its elements (NovoGrad). Exact where all scale alike."""

    name: str = "per leaf"

    def applies(self, shape: Shape, leaf: Shape, beside: Sequence[Shape]) -> bool:
        """Where it is a scalar and the leaf is none."""
        return shape == () != leaf

    def lift(self, parts: Sequence[jax.Array], leaf: Shape) -> jax.Array:
        """An even share for each element."""
        return jnp.broadcast_to(parts[0] / max(math.prod(leaf), 1), leaf)

    def lower(self, moved: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
        """The sum of the shares."""
        return [moved.sum()]


@dataclass(frozen=True)
class PerUnit(_Traits):
    """One number for all elements that share some axes, which have size 1 (counts of units)."""

    name: str = "per unit"

    def applies(self, shape: Shape, leaf: Shape, beside: Sequence[Shape]) -> bool:
        """Where it is of the leaf's rank and not of its shape."""
        return len(shape) == len(leaf) and shape != leaf

    def lift(self, parts: Sequence[jax.Array], leaf: Shape) -> jax.Array:
        """The unit's number at each of its elements."""
        return jnp.broadcast_to(parts[0], leaf)

    def lower(self, moved: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
        """The largest of a unit's elements: it has started anew only if all of them have."""
        shared = tuple(i for i, size in enumerate(shapes[0]) if size == 1)
        return [jnp.broadcast_to(moved.max(axis=shared, keepdims=True, initial=0), shapes[0])]

    def layers(self, shapes: Sequence[Shape], leaf: Shape, axis: int) -> list[int | None] | None:
        """Those of the units, unless layers share them."""
        return [axis] if shapes[0][axis] == leaf[axis] else None


@dataclass(frozen=True)
class Stacked(_Traits):
    """Several past values one behind the other along a first axis (L-BFGS). Exact under transport; they say nothing of
    another function, so that any other rule starts them anew.
    """

    name: str = "stacked"
    stacked: bool = True
    needs_transport: bool = True

    def applies(self, shape: Shape, leaf: Shape, beside: Sequence[Shape]) -> bool:
        """Where it is the leaf's shape behind one more axis."""
        return shape[1:] == leaf and len(shape) == len(leaf) + 1

    def lift(self, parts: Sequence[jax.Array], leaf: Shape) -> jax.Array:
        """The stack as it is."""
        return parts[0]

    def lower(self, moved: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
        """The stack as it is."""
        return [moved]

    def layers(self, shapes: Sequence[Shape], leaf: Shape, axis: int) -> list[int | None] | None:
        """Behind the axis of past values."""
        return [axis + 1]


@dataclass(frozen=True)
class Projected(_Traits):
    """Moments in the space of a projected gradient, and the projector (GaLore): they stay where the leaf keeps its
    shape, and start anew with the projector where it does not.
    """

    name: str = "projected"
    keeps: bool = True

    def applies(self, shape: Shape, leaf: Shape, beside: Sequence[Shape]) -> bool:
        """Where the leaf has a projector: those of other leaves are empty."""
        return all(math.prod(other) > 0 for other in beside) or math.prod(shape) == 0

    def lift(self, parts: Sequence[jax.Array], leaf: Shape) -> jax.Array:
        """Not called: they stay or start anew."""
        return parts[0]

    def lower(self, moved: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
        """Not called."""
        return [moved]

    def layers(self, shapes: Sequence[Shape], leaf: Shape, axis: int) -> list[int | None] | None:
        """Only of leaves without projector, for which the parts are empty."""
        return None if any(map(math.prod, shapes)) else [None] * len(shapes)


@dataclass(frozen=True)
class Fixed:
    """The shape of a slot that keeps it: one of a layer, which cannot change its own."""

    held: Shape

    def shape(self, leaf: Shape) -> Shape:
        """The slot's shape."""
        return self.held


@dataclass(frozen=True)
class Made:
    """The shape that `tx.init` gives to one leaf of its state, once a parameter has another shape.

    Equal for all parameters that lie alike, so that they share compiled programs.
    """

    tx: Any
    treedef: Any
    shapes: tuple[tuple[Shape, Any], ...]
    owner: int = field(compare=False)
    keys: tuple[Any, ...] = field(compare=False)

    def shape(self, leaf: Shape) -> Shape:
        """The slot's shape for a parameter of this shape."""
        params = [
            jax.ShapeDtypeStruct(leaf if place == self.owner else shape, dtype)
            for place, (shape, dtype) in enumerate(self.shapes)
        ]
        state = jax.eval_shape(self.tx.init, jax.tree.unflatten(self.treedef, params))
        items = jax.tree_util.tree_flatten_with_path(state)[0]  # places differ where users measure, paths do not
        return next(tuple(slot.shape) for keys, slot in items if keys == self.keys)


@dataclass(frozen=True)
class Laid:
    """How one slot lies.

    Attributes:
      layout: the layout.
      bundle: the same for all slots of a leaf that are lifted together.
      leaf: shape of the parameter.
      made: what shape it gets when the parameter changes.
    """

    layout: Any
    bundle: str
    leaf: Shape
    made: Made | Fixed

    def action(self, rule: Any, new_leaf: Shape) -> str:
        """What a rule that follows the edit does: "move", "keep" or "restart"."""
        if self.layout.keeps:
            return "keep" if new_leaf == self.leaf else "restart"
        return "restart" if self.layout.needs_transport and rule != "transport" else "move"


FACTORED, PER_AXIS, PER_LEAF, PER_UNIT = Factored(), PerAxis(), PerLeaf(), PerUnit()
STACKED, PROJECTED = Stacked(), Projected()
