"""Which leaves units are wired to: found by derivatives, and checked by them.

Both look at subsets of the units that tell every two of them apart, and at which derivatives are exactly zero. A unit
that nothing reads moves no output, so that the derivative by what makes it is zero; a unit that gets nothing is zero
itself (if its activation function is 0 at 0), so that the derivative by what reads it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import UnitsError
from flax_surgery_hooks.paths import flatten, listed
from flax_surgery_hooks.units.captured import known
from flax_surgery_hooks.units.groups import ORDERS, Place, Units, as_groups

Leaves = dict[str, Any]


def check(units: Any, output: Callable[[Any], Any], params: Any) -> None:
    """Checks that units are wired as they are described. Costs some gradients of the model; do it once, in a test.

    Around the parameters, moved a little so that no bias is 0:
      where the outgoing elements of units are 0, the derivative of the output by their incoming ones is exactly 0;
      where the incoming elements are 0, the derivative by the outgoing ones is.
    The first fails where something else reads a unit too, another axis or order, a skip connection, a norm over the
    units (LayerNorm: then no recycling leaves the others alone). The second fails where a unit is made of more than
    said, such as a bias, is read elsewhere than said, or has an activation function that is not 0 at 0.

    Args:
      units: `Units`, one or several.
      output: from parameters to the output of the model on some batch, such as
        `lambda params: model.apply({"params": params}, x)`.
      params: the parameters.

    Raises:
      UnitsError: a leaf has derivatives where there must be none, has no part in the output, or is not there.

    >>> x = jnp.arange(1.0, 7.0).reshape(2, 3)
    >>> params = {"into": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
    >>> output = lambda params: jnp.tanh(x @ params["into"] / 50) @ params["out"]
    >>> check(Units("h", {"into": 1}, {"out": 0}), output, params)
    """
    leaves, rebuild = _moved(params)
    loss = _projected(lambda leaves: output(rebuild(leaves)))
    slopes = jax.jit(jax.grad(loss))
    apart = slopes(leaves)
    for group in as_groups(units):
        shape = group.extent(leaves)
        _check_parts(group, apart)
        for chosen in map(jnp.asarray, _subsets(shape[-1])):
            each = jnp.broadcast_to(chosen, shape)
            for silent, still in ((group.outgoing, group.incoming), (group.incoming, group.outgoing)):
                if silent and still:
                    found = slopes(_without(group, leaves, each, silent))
                    _check_still(group, leaves, each, still, found)


def find(
    run: Callable[[Any], tuple[Any, Mapping[str, Any]]], params: Any, *, stacked: Sequence[str] = ()
) -> tuple[Units, ...]:
    """The units whose activations a model gives, with all leaves that they are wired to.

    Costs some gradients of the model for each name. What is found are paths and axes, so that a narrower copy of the
    model, on a small batch, finds them as well.

    Args:
      run: from parameters to the output and the activations by name, such as
        `lambda params: fsh.units.capture(model, {"params": params}, x)`.
      params: the parameters.
      stacked: names of the activations whose first axis is that of layers.

    Raises:
      UnitsError: nothing makes or reads a unit alone (behind a LayerNorm, on a skip connection), a leaf is wired in two
        ways, or two names are of the same units.

    >>> x = jnp.arange(1.0, 7.0).reshape(2, 3)
    >>> params = {"into": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
    >>> def run(params):
    ...     h = jnp.tanh(x @ params["into"] / 50)
    ...     return h @ params["out"], {"h": h}
    >>> find(run, params)
    (Units(activation='h', incoming={'into': 1}, outgoing={'out': 0}, stacked=False),)
    """
    leaves, rebuild = _moved(params)
    shapes = jax.eval_shape(lambda leaves: run(rebuild(leaves))[1], leaves)
    odd = [name for name in stacked if name not in shapes]
    if odd or not shapes:
        raise UnitsError(
            "There are no such activations." if odd else "There are no activations.",
            found=listed(odd) if odd else "{}",
            write=known(shapes) or 'self.sow("intermediates", "h", h)',
        )
    found = tuple(_find_one(run, rebuild, leaves, name, shapes, name in stacked) for name in shapes)
    for one, other in itertools.combinations(found, 2):
        if set(one.incoming.items()) & set(other.incoming.items()):
            raise UnitsError(
                "Two names are of the same units, before and after an activation function perhaps.",
                found=f"{one.activation} and {other.activation}, both made by {listed(one.incoming)}",
                write="only the name of what the next layer reads",
            )
    return found


def _find_one(run: Any, rebuild: Any, leaves: Leaves, name: str, shapes: Any, stacked: bool) -> Units:
    shape = shapes[name].shape
    if len(shape) < 2 + stacked or shape[-1] < 2:
        raise UnitsError(
            f"The activations {name!r} have no axis of several units.", found=known(shapes), write="[batch, ..., units]"
        )
    subsets = _subsets(shape[-1])

    # What later layers of a stack do depends on all before; the first depends on its own leaves alone.
    def active(leaves: Leaves, chosen: Any) -> Any:
        made = run(rebuild(leaves))[1][name]
        made = made[0] if stacked else made
        return _some(jnp.where(jnp.broadcast_to(chosen, made.shape), made, 0))

    into = jax.jit(jax.grad(active))
    slopes = [into(leaves, jnp.asarray(chosen)) for chosen in subsets]
    first = [{path: slope[0] if stacked and slope.ndim else slope for path, slope in one.items()} for one in slopes]
    incoming = _wired(name, subsets, first, within=True, stacked=stacked)
    if not any(leaves[path].ndim > 1 + stacked for path in incoming):
        raise UnitsError(
            f"No kernel makes each of the units {name!r} alone: a norm mixes them, or they are on a skip connection.",
            found=f"made by {listed(incoming) or 'no leaf'}",
            write="Units(activation, incoming, outgoing) by hand",
        )
    made = Units(name, incoming, {}, stacked)
    out = jax.jit(jax.grad(_projected(lambda leaves: run(rebuild(leaves))[0])))
    units = (shape[0], shape[-1]) if stacked else (shape[-1],)
    slopes = [out(_without(made, leaves, jnp.broadcast_to(one, units), incoming)) for one in map(jnp.asarray, subsets)]
    last = [{path: slope[0] if stacked and slope.ndim else slope for path, slope in one.items()} for one in slopes]
    outgoing = _wired(name, subsets, last, within=False, stacked=stacked, but=incoming)
    if not outgoing:
        raise UnitsError(
            f"No leaf reads each of the units {name!r} alone: they go through a norm, or are the model's output.",
            found=f"made by {listed(incoming)}",
            write="Units(activation, incoming, outgoing) by hand, or without this activation",
        )
    return Units(name, incoming, outgoing, stacked)


def _wired(
    name: str,
    subsets: Sequence[np.ndarray],
    slopes: Sequence[Leaves],
    *,
    within: bool,
    stacked: bool,
    but: Mapping[str, Place] | None = None,
) -> dict[str, Place]:
    """The leaves whose derivatives are zero outside the elements of chosen units (`within`), or inside."""
    wired: dict[str, Place] = {}
    count = subsets[0].size
    for path in slopes[0]:
        given = [np.asarray(one[path]) != 0 for one in slopes]
        places = [
            place
            for place in _candidates(given[0].shape, count)
            if all(_agrees(given[i], chosen, place, within) for i, chosen in enumerate(subsets))
        ]
        found = [_told(place, stacked) for place in places]
        found = [place for place in found if (but or {}).get(path) != place]
        if len(found) > 1:
            raise UnitsError(
                f"A leaf is wired to the units {name!r} in several ways.",
                path=path,
                found=f"along {listed(map(str, found))}",
                write="Units(activation, incoming, outgoing) by hand",
            )
        wired |= {path: found[0]} if found else {}
    return wired


def _agrees(given: np.ndarray, chosen: np.ndarray, place: tuple[int, str], within: bool) -> bool:
    axis, order = place
    times = given.shape[axis] // chosen.size
    along = np.tile(chosen, times) if order == "tile" else np.repeat(chosen, times)
    inside = given[(slice(None),) * axis + (along,)].any()
    outside = given[(slice(None),) * axis + (~along,)].any()
    return bool(inside and not outside) if within else bool(outside and not inside)


def _candidates(shape: tuple[int, ...], count: int) -> Iterator[tuple[int, str]]:
    for axis, length in enumerate(shape):
        if length and length % count == 0:
            yield from ((axis, order) for order in (ORDERS if length > count else ORDERS[:1]))


def _told(place: tuple[int, str], stacked: bool) -> Place:
    axis, order = place[0] + stacked, place[1]
    return axis if order == "tile" else (axis, order)


def _subsets(count: int) -> list[np.ndarray]:
    """Subsets of `count` units, as flags, such that every two are told apart by one that has the first alone."""
    numbers = np.arange(count)
    bits = [(numbers >> bit) & 1 == 1 for bit in range(max(1, (count - 1).bit_length()))]
    return [flags for bit in bits for flags in (bit, ~bit) if flags.any()]


def _moved(params: Any) -> tuple[Leaves, Callable[[Leaves], Any]]:
    """The floating leaves by path, with a little noise so that none is zero, and how to put them back."""
    flat = flatten(params)
    keys = jax.random.split(jax.random.key(0), len(flat.paths))
    leaves = {}
    for path, leaf, key in zip(flat.paths, map(jnp.asarray, flat.values), keys, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves[path] = leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)

    def rebuild(leaves: Leaves) -> Any:
        values = [leaves.get(path, leaf) for path, leaf in zip(flat.paths, flat.values, strict=True)]
        return jax.tree.unflatten(flat.treedef, values)

    return leaves, rebuild


def _projected(output: Callable[[Leaves], Any]) -> Callable[[Leaves], Any]:
    def loss(leaves: Leaves) -> Any:
        made = [leaf for leaf in jax.tree.leaves(output(leaves)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(map(_some, made), jnp.float32(0))

    return loss


def _some(made: Any) -> Any:
    """A weighted sum, with weights that do not cancel by chance."""
    return jnp.sum(made * jax.random.normal(jax.random.key(1), made.shape, made.dtype))


def _without(group: Units, leaves: Leaves, chosen: Any, places: Mapping[str, Place]) -> Leaves:
    """The leaves with zeros at these elements of the chosen units."""
    shut = {
        path: jnp.where(group.elements(path, leaves[path].shape, chosen, places), 0, leaves[path]) for path in places
    }
    return {**leaves, **shut}


def _check_parts(group: Units, slopes: Leaves) -> None:
    idle = [path for path in (*group.incoming, *group.outgoing) if not np.any(np.asarray(slopes[path]))]
    if idle:
        raise UnitsError(
            f"A leaf of the units {group.activation!r} has no part in the output.",
            found=listed(idle),
            write="leaves that the model uses, and a batch on which it does",
        )


def _check_still(group: Units, leaves: Leaves, chosen: Any, places: Mapping[str, Place], slopes: Leaves) -> None:
    incoming = places is group.incoming
    for path in places:
        inside = group.elements(path, leaves[path].shape, chosen, places)
        count = int(jnp.sum((slopes[path] != 0) & inside))
        if not count:
            continue
        raise UnitsError(
            f"The units {group.activation!r} still move the output when all that is said to read them is 0."
            if incoming
            else f"The units {group.activation!r} are still read when all that is said to make them is 0.",
            path=path,
            found=f"{count} elements with a derivative",
            write='all leaves in `outgoing`, their axis and order (axis, "tile" or "repeat"); no norm may mix the units'
            if incoming
            else "all leaves in `incoming`, biases too; `outgoing` of these units alone; an activation that is 0 at 0",
        )
