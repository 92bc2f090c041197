"""A group of units: the leaves that make them, and those by which they act."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import UnitsError, quoted
from flax_surgery_hooks.paths import close_matches, listed

Place = int | tuple[int, str]
ORDERS = ("tile", "repeat")


@dataclass(frozen=True)
class Units:
    """The units of a layer, by the axes of leaves along which they lie.

    Along an axis that is longer than there are units, each unit has several elements, in one of two orders. "tile": the
    unit is fastest, as in a dense kernel behind a convolution whose output [height, width, channels] is flattened;
    "repeat": the unit is slowest, as when channels come first.

    Args:
      activation: the name of the array that holds what they do, [..., units].
      incoming: path -> axis, of all that makes a unit: kernels (two if it is gated), biases, scale and bias of a norm.
      outgoing: path -> axis, of all that reads it. An axis may be `(axis, "repeat")` in both; alone it means "tile".
      stacked: whether all leaves and the activation have a first axis of layers (`nn.scan`), so that there are as many
        units in each layer.

    Either mapping may be empty: then units are re-drawn and not silenced, or the reverse.

    >>> units = Units("h", {"Dense_0/kernel": 1, "Dense_0/bias": 0}, {"Dense_1/kernel": 0})
    >>> shapes = {"Dense_0/kernel": (5, 4), "Dense_0/bias": (4,), "Dense_1/kernel": (8, 3)}
    >>> units.extent({path: jnp.zeros(shape) for path, shape in shapes.items()})
    (4,)
    >>> chosen = jnp.array([False, True, False, False])
    >>> units.elements("Dense_1/kernel", (8, 3), chosen, units.outgoing)[:, 0].astype(int).tolist()
    [0, 1, 0, 0, 0, 1, 0, 0]
    """

    activation: str
    incoming: Mapping[str, Place]
    outgoing: Mapping[str, Place]
    stacked: bool = False

    def __post_init__(self):
        for field in ("incoming", "outgoing"):
            given = getattr(self, field)
            if not isinstance(given, Mapping) or not all(_is_place(place) for place in given.values()):
                raise UnitsError(
                    f"Units({field}=...) is a mapping from path to axis.",
                    found=quoted(given),
                    write='{"Dense_0/kernel": 1}, or {"Dense_1/kernel": (0, "repeat")} where the unit is slowest',
                )
            object.__setattr__(self, field, dict(given))
        if not self.incoming and not self.outgoing:
            raise UnitsError("These units have no leaves.", found="incoming={} and outgoing={}", write="their kernels")

    def __hash__(self) -> int:
        return hash((self.activation, *self.incoming.items(), *self.outgoing.items(), self.stacked))

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all leaves that they are wired to, for the `params=` of a hook."""
        return tuple(dict.fromkeys((*self.incoming, *self.outgoing)))

    def extent(self, leaves: Mapping[str, Any]) -> tuple[int, ...]:
        """How many units there are: (units,), or (layers, units) if stacked.

        Args:
          leaves: path -> leaf, with all that these units name.

        Raises:
          UnitsError: a leaf is missing, has no such axis, or one whose length does not fit the others.
        """
        lengths = {path: _length(leaves, path, _pair(place)[0], self.stacked) for path, place in self._places()}
        count = min(lengths.values())
        odd = [f"{length} along {path}" for path, length in lengths.items() if length % count]
        if odd:
            raise UnitsError(
                f"The units of {self.activation!r} are {count} along one leaf, of which another has no multiple.",
                found=listed(odd),
                write="the axis of the units",
            )
        layers = {jnp.shape(leaves[path])[0] for path in lengths} if self.stacked else set()
        if len(layers) > 1:
            raise UnitsError(
                f"The leaves of {self.activation!r} are stacks of different numbers of layers.",
                found=listed(map(str, sorted(layers))),
                write="stacked=False, or the leaves of one stack",
            )
        return (*layers, count)

    def activity(self, leaves: Mapping[str, Any], activations: Any) -> jax.Array:
        """What these units do, float32 [..., units], or [layers, ..., units] if stacked.

        Args:
          leaves: path -> leaf.
          activations: name -> array, with theirs.

        Raises:
          UnitsError: there is no such array, or it has another number of units.
        """
        if not isinstance(activations, Mapping) or self.activation not in activations:
            known = list(activations) if isinstance(activations, Mapping) else []
            raise UnitsError(
                f"There are no activations named {self.activation!r}.",
                found=listed(known) if known else type(activations).__name__,
                write=listed(close_matches(self.activation, known)) or "a function that returns {name: array}",
            )
        made, shape = jnp.asarray(activations[self.activation]), self.extent(leaves)
        fits = (
            made.ndim > len(shape) and made.shape[-1] == shape[-1] and (not self.stacked or made.shape[0] == shape[0])
        )
        if not fits:
            raise UnitsError(
                f"The activations {self.activation!r} are of other units than the leaves.",
                found=f"shape {list(made.shape)} for {listed(map(str, shape))} units",
                write="[layers, batch, ..., units]" if self.stacked else "[batch, ..., units]",
            )
        return made.astype(jnp.float32)

    def mean(self, activity: jax.Array) -> jax.Array:
        """The mean of `activity` over all but the units (and layers)."""
        return jnp.mean(activity, axis=tuple(range(int(self.stacked), activity.ndim - 1)))

    def elements(self, path: str, shape: tuple[int, ...], chosen: Any, places: Mapping[str, Place]) -> jax.Array:
        """Values per unit, bool or numbers, at the elements of a leaf: an array that broadcasts to its shape.

        Args:
          path: of the leaf.
          shape: of the leaf.
          chosen: [units], or, if they are stacked and layers differ, [layers, units].
          places: `incoming` or `outgoing`.
        """
        axis, order = _pair(places[path])
        times = shape[axis] // chosen.shape[-1]
        across = (*(1 for _ in chosen.shape[1:]), times)
        along = jnp.tile(chosen, across) if order == "tile" else jnp.repeat(chosen, times, axis=-1)
        dims = [1] * len(shape)
        dims[axis] = shape[axis]
        if chosen.ndim > 1:
            dims[0] = shape[0]
        return along.reshape(dims)

    def taken(self, path: str, leaf: jax.Array, units: jax.Array, count: int, places: Mapping[str, Place]) -> jax.Array:
        """A leaf of other units, each a copy of one that there is.

        Args:
          path: of the leaf.
          leaf: its elements, or numbers of its shape.
          units: which unit each new one copies, int [new units], or [layers, new units] if layers differ.
          count: how many units a layer has.
          places: `incoming` or `outgoing`.
        """
        axis, index = self._index(path, jnp.shape(leaf), units, count, places)
        if units.ndim == 1:
            return jnp.take(leaf, index, axis=axis)
        dims = [1] * leaf.ndim
        dims[0], dims[axis] = index.shape
        return jnp.take_along_axis(leaf, index.reshape(dims), axis=axis)

    def summed(
        self, path: str, leaf: jax.Array, units: jax.Array, count: int, places: Mapping[str, Place]
    ) -> jax.Array:
        """The transpose of `taken`, from a leaf of the new units: what lies at all copies of a unit, summed."""
        shape = list(jnp.shape(leaf))
        axis, _ = _pair(places[path])
        shape[axis] = shape[axis] // units.shape[-1] * count
        take = functools.partial(self.taken, path, units=units, count=count, places=places)
        (old,) = jax.linear_transpose(take, jax.ShapeDtypeStruct(tuple(shape), leaf.dtype))(leaf)
        return old

    def _index(
        self, path: str, shape: tuple[int, ...], units: jax.Array, count: int, places: Mapping[str, Place]
    ) -> tuple[int, jax.Array]:
        """The axis along which units lie in a leaf, and which element along it each new one takes."""
        axis, order = _pair(places[path])
        axis %= len(shape)
        times = shape[axis] // count
        within = jnp.arange(times).reshape(*[1] * (units.ndim - 1), -1, 1)
        if order == "tile":
            index = within * count + units[..., None, :]
        else:
            index = units[..., :, None] * times + jnp.swapaxes(within, -1, -2)
        return axis, index.reshape(*units.shape[:-1], -1)

    def gathered(self, path: str, leaf: jax.Array, count: int, places: Mapping[str, Place]) -> jax.Array:
        """The sum of all that a leaf has of each unit: [units], or [layers, units] if stacked.

        Args:
          path: of the leaf.
          leaf: its elements, or numbers of its shape.
          count: how many units a layer has.
          places: `incoming` or `outgoing`.
        """
        axis, order = _pair(places[path])
        others = [other for other in range(int(self.stacked), leaf.ndim) if other != axis % leaf.ndim]
        along = jnp.sum(leaf, axis=tuple(others))
        split = (-1, count) if order == "tile" else (count, -1)
        return jnp.sum(along.reshape(*along.shape[:-1], *split), axis=-2 if order == "tile" else -1)

    def _places(self) -> Iterator[tuple[str, Place]]:
        yield from self.incoming.items()
        yield from self.outgoing.items()


def as_groups(units: Any) -> tuple[Units, ...]:
    """One `Units` or several as a tuple.

    Raises:
      UnitsError: they are none, or two have one name.
    """
    groups = (units,) if isinstance(units, Units) else tuple(units) if isinstance(units, Iterable) else ()
    if not groups or not all(isinstance(one, Units) for one in groups):
        raise UnitsError(
            "`units` are a `fsh.units.Units`, or several.",
            found=quoted(units),
            write="what fsh.units.find(...) returns, or Units(activation, incoming, outgoing)",
        )
    names = [one.activation for one in groups]
    if len(set(names)) < len(names):
        raise UnitsError("Two groups of units have one activation.", found=listed(names), write="a group for each name")
    return groups


def _pair(place: Place) -> tuple[int, str]:
    return (place, "tile") if isinstance(place, int) else place


def _is_place(place: Any) -> bool:
    pair = (place, "tile") if isinstance(place, int) else place
    fits = isinstance(pair, tuple) and len(pair) == 2 and pair[1] in ORDERS
    return fits and isinstance(pair[0], int) and not isinstance(pair[0], bool)


def _length(leaves: Mapping[str, Any], path: str, axis: int, stacked: bool) -> int:
    if path not in leaves:
        raise UnitsError(
            "A leaf of these units is not there, or not selected.",
            path=path,
            found=listed(leaves),
            write=listed(close_matches(path, leaves)) or 'params="**"',
        )
    shape = jnp.shape(leaves[path])
    if not -len(shape) <= axis < len(shape) or (stacked and axis % len(shape) == 0):
        raise UnitsError(
            "Units cannot lie along this axis of the leaf"
            + (", whose first one is that of layers." if stacked else "."),
            path=path,
            found=f"axis {axis} of shape {list(shape)}",
            write=f"axis {len(shape) - 1}" if shape else "a leaf with axes",
        )
    return shape[axis]
