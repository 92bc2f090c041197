"""Several sums over the same arrays in one pass, and over the shards of all of them in one all-reduce.

XLA on CPU runs one loop over the data for each sum, and keeps what several of them share as whole arrays. One reduction
of many operands is one loop, and keeps nothing; but XLA gathers its operands rather than partition it. So every device
reduces its own shards, and one sum over devices joins the results. For this it must be known where the arrays lie,
which a trace under Auto axes does not tell: `across` does.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_LONG = 1 << 12

Places = Mapping[tuple[int, ...], NamedSharding]
"""Shape -> where arrays of this shape lie. Arrays that lie elsewhere are summed as correctly, and moved for it."""

_PLACES: ContextVar[Places | None] = ContextVar("places", default=None)


@contextlib.contextmanager
def across(places: Places) -> Iterator[None]:
    """Sums in this context know where their arrays lie."""
    token = _PLACES.set(places)
    try:
        yield
    finally:
        _PLACES.reset(token)


def known_places() -> Places:
    """What `across` says here."""
    return _PLACES.get() or {}


def places_of(arrays: Iterable[tuple[Any, Any]]) -> Places:
    """The places of arrays, given as pairs of shape and sharding; those that are not sharded over a mesh have none.

    Of several shardings for one shape it is the one of the smallest shards, into which a larger one is cut for free.
    """
    found: dict[tuple[int, ...], NamedSharding] = {}
    for shape, sharding in arrays:
        if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
            continue
        shape = tuple(shape)
        size = np.prod(sharding.shard_shape(shape))
        if shape not in found or size < np.prod(found[shape].shard_shape(shape)):
            found[shape] = sharding
    return found


def sums(values: Sequence[jax.Array], over: Iterable[int], then: Callable[..., jax.Array]) -> jax.Array:
    """`then` of the sums of several arrays of one shape over the same axes, which stay as axes of length 1; float32.

    Every device gets all of the sums, so that what is made of them costs no further all-reduce.
    """
    axes = tuple(over)
    place = _place_of(values[0])
    if place is None:
        return then(*_sums(values, axes))
    spec = _padded(place.spec, values[0].ndim)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(values[0].shape))

    def local(values: Sequence[jax.Array]) -> jax.Array:
        here = jnp.stack(_sums(values, axes))
        starts = [0] + [0 if axis in axes else _index(place.mesh, part) for axis, part in enumerate(spec)]
        starts = [start * size for start, size in zip(starts, here.shape, strict=True)]
        whole = jax.lax.dynamic_update_slice(jnp.zeros((len(values), *shape), here.dtype), here, starts)
        return then(*jax.lax.psum(_once(whole, place.mesh, spec), place.mesh.axis_names))

    return _mapped(local, place.mesh, ([spec] * len(values),), PartitionSpec())(list(values))


def totals(values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The sums of all elements of several arrays of one shape, as float32 scalars.

    They run along the last axis first, so that a count beyond 2**24 does not stall in float32.

    >>> [float(total) for total in totals([jnp.ones((2, 3)), jnp.arange(6.0).reshape(2, 3)])]
    [6.0, 15.0]
    """
    (together,) = added(lambda values: jnp.stack(totals_here(values)), [list(values)])
    return tuple(together)


def added(function: Callable[[Any], jax.Array], items: Sequence[Any]) -> list[jax.Array]:
    """`function` of each item, where for a sharded one it is the sum of the function of its shards.

    Args:
      function: from the arrays of an item, or a piece of them, to a float32 or int32 vector; all have one length.
      items: pytrees of arrays, each of which lies in one way.
    """
    return added_with(lambda item, piece, common: function(item), items, ())


class Piece(NamedTuple):
    """What `added_with` hands to its function at a time: an item, or what one device has of it.

    Attributes:
      item: which of the items.
      mesh: of the devices that share the item; None where the function has all of it.
      spec: how they share it.
      local: whether the arrays are known to lie on one device, where a reshape moves nothing.
    """

    item: int = 0
    mesh: Any = None
    spec: PartitionSpec = PartitionSpec()
    local: bool = False

    def indices(self, leaf: jax.Array, zero: Any = 0) -> jax.Array:
        """The row-major index in the whole leaf of each element of the piece, int32.

        Args:
          leaf: the piece.
          zero: in a loop a zero that XLA takes for one that changes, or it would keep the indices from pass to pass.
        """
        index: Any = 0
        for axis, part in enumerate(_padded(self.spec, leaf.ndim)):
            size = leaf.shape[axis]
            whole = size * math.prod(self.mesh.shape[name] for name in _names(part))
            start = _index(self.mesh, part) * size + zero
            index = index * whole + start + jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
        return index


def added_with(function: Callable[[Any, Piece, Any], jax.Array], items: Sequence[Any], common: Any) -> list[jax.Array]:
    """`added` of a function that also takes which piece it has, and `common`, which every device has all of."""
    places = [_common_place(item) for item in items]
    results: dict[int, jax.Array] = {
        i: function(items[i], Piece(i), common) for i, place in enumerate(places) if place is None
    }
    for mesh in dict.fromkeys(place.mesh for place in places if place is not None):
        members = [i for i, place in enumerate(places) if place is not None and place.mesh == mesh]
        pieces = [Piece(i, mesh, places[i].spec, True) for i in members]  # type: ignore[union-attr]
        local = functools.partial(_added_here, function, pieces)
        given = [_specs_like(items[piece.item], piece.spec) for piece in pieces]
        rows = _mapped(local, mesh, (given, PartitionSpec()), PartitionSpec())([items[i] for i in members], common)
        results |= dict(zip(members, rows, strict=True))
    return [results[i] for i in range(len(items))]


def _added_here(
    function: Callable[[Any, Piece, Any], jax.Array], pieces: Sequence[Piece], items: Sequence[Any], common: Any
) -> jax.Array:
    """The sums over all devices."""
    rows = [
        _once(function(item, piece, common), piece.mesh, piece.spec) for item, piece in zip(items, pieces, strict=True)
    ]
    return jax.lax.psum(jnp.stack(rows), pieces[0].mesh.axis_names)


def _once(value: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    """What a device has of its shard, on one of the devices that hold this shard; zeros on the others."""
    for name in (name for name in mesh.axis_names if name not in _names(tuple(spec))):
        value = jnp.where(jax.lax.axis_index(name) == 0, value, jnp.zeros((), value.dtype))
    return value


def _index(mesh: Any, part: Any) -> Any:
    """Which of its shards along an axis a device has; `part` names the mesh axes, the slowest first."""
    index: Any = 0
    for name in _names(part):
        index = index * mesh.shape[name] + jax.lax.axis_index(name)
    return index


def _mapped(function: Any, mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` on a mesh; inside a trace under a mesh of the same axes that is the mesh in force."""
    current = jax.sharding.get_abstract_mesh()
    within = current.axis_names == mesh.axis_names and all(kind == AxisType.Auto for kind in current.axis_types)
    return jax.shard_map(
        function, mesh=None if within else mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _place_of(leaf: jax.Array) -> NamedSharding | None:
    return known_places().get(leaf.shape)


def _common_place(item: Any) -> NamedSharding | None:
    """Where all arrays of an item lie; None if that is not known of one, or they differ."""
    found = [_place_of(leaf) for leaf in jax.tree.leaves(item) if leaf.size]
    return found[0] if found and found[0] is not None and all(place == found[0] for place in found) else None


def _specs_like(item: Any, spec: PartitionSpec) -> Any:
    """Empty arrays stand for what is not there, and lie everywhere."""
    return jax.tree.map(lambda leaf: spec if leaf.size else PartitionSpec(), item)


def _padded(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    return PartitionSpec(*spec, *[None] * (ndim - len(spec)))


def _names(part: Any) -> tuple[str, ...]:
    """The mesh axes in a part of a spec, or in a whole one."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(name for inner in part for name in _names(inner))


def _sums(values: Sequence[jax.Array], axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(values[0].shape))
    # A sum that XLA could fold: of a leaf of constants, at compile time, it would take minutes.
    zeros = (jax.lax.optimization_barrier(jnp.zeros((), jnp.float32)),) * len(values)
    wide = tuple(value.astype(jnp.float32) for value in values)
    reduced = jax.lax.reduce(wide, zeros, _add_all, axes) if axes else wide
    return tuple(value.reshape(shape) for value in reduced)


def totals_here(values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """`totals` of arrays as they are given, for use within `added`."""
    if values[0].ndim == 1 and values[0].size > _LONG and values[0].size % _LONG == 0:
        values = [value.reshape(-1, _LONG) for value in values]
    while values[0].ndim:
        last = values[0].ndim - 1
        values = [value.squeeze(last) for value in _sums(values, (last,))]
    return tuple(value.astype(jnp.float32) for value in values)


def _add_all(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
