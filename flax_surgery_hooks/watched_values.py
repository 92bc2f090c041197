"""Values that schedules look at: found in the trainer's inputs, taken in without waiting, read some steps later."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from flax_surgery_hooks.errors import InputError, typed
from flax_surgery_hooks.paths import close_matches, listed


class Site(NamedTuple):
    """Where the run takes place, looked up once.

    Attributes:
      processes: how many take part in it.
      far: whether arrays lie in a memory other than the host's.
    """

    processes: int = 1
    far: bool = False


def site() -> Site:
    """The site of this process, which initialises JAX's backend."""
    return Site(jax.process_count(), jax.default_backend() != "cpu")


def found(inputs: Mapping[str, Any], source: tuple[str, str]) -> Any:
    """The value at `source`: the name of an input, and the path in it, whose names may hold `/` themselves.

    Raises:
      InputError: there is none; it names what there is.

    >>> found({"metrics": {"train/loss": 1.0, "eval": {"loss": 2.0}}}, ("metrics", "eval/loss"))
    2.0
    """
    name, path = source
    whole = f"{name}/{path}" if path else name
    if name not in inputs:
        raise InputError(
            f"A schedule looks at {whole!r}, and the train loop does not pass {name!r}.",
            found=f"inputs {listed(inputs) or 'none'}",
            write=f"hooks(step, state, {name}={name})",
        )
    values = list(_at(inputs[name], path)) if path else [inputs[name]]
    if not values:
        known = list(_paths(inputs[name]))
        close = close_matches(path, known)
        raise InputError(
            f"A schedule looks at {whole!r}, and {name!r} does not hold it.",
            found=f"{name} with {listed(known)}" if known else f"{name}={typed(inputs[name])}",
            write=f"{listed(close) or 'one of these'}; at a step without a value, None under that name",
        )
    return values[0]


def _children(tree: Any) -> Mapping[str, Any]:
    """What stands in a mapping or a `clu.metrics.Collection`, by name; nothing in anything else."""
    if isinstance(tree, clu_metrics.Collection):
        names = [field.name for field in dataclasses.fields(tree)]
        return {name: getattr(tree, name) for name in names if not name.startswith("_")}
    return tree if isinstance(tree, Mapping) else {}


def _at(tree: Any, path: str) -> Iterator[Any]:
    children = _children(tree)
    if path in children:
        yield children[path]
    for i in [i for i, letter in enumerate(path) if letter == "/"]:
        if path[:i] in children:
            yield from _at(children[path[:i]], path[i + 1 :])


def _paths(tree: Any) -> Iterator[str]:
    for name, child in _children(tree).items():
        inside = list(_paths(child))
        yield from (f"{name}/{path}" for path in inside) if inside else (str(name),)


def taken(value: Any, path: str, *, integral: bool, where: Site) -> Any:
    """A value as it waits to be read: a Python number, or a scalar array on its way to the host.

    Args:
      value: what the trainer passed.
      path: where, for messages.
      integral: whether it must be an integer.
      where: the site of the run.

    Raises:
      InputError: it is no real scalar, not an integer where it must be, traced, deleted, or perhaps not the same on all
        processes.
    """
    if isinstance(value, clu_metrics.Metric):
        value = value.compute()
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()  # now: a NumPy array may be written into
    is_array = isinstance(value, jax.Array)
    if is_array and isinstance(value, jax.core.Tracer):
        raise InputError(
            f"{path!r} is traced: the call is inside jit.",
            found=typed(value),
            write="a call outside of the jitted step",
        )
    if not (_is_real(value.dtype) and value.ndim == 0 if is_array else _is_real_number(value)):
        raise InputError(
            f"{path!r} is no real scalar, and a schedule looks at it.",
            found=typed(value),
            write=f"a mean, {path.rpartition('/')[2]}.mean(), or flax.jax_utils.unreplicate of what pmap returns",
        )
    if integral and (value.dtype.kind not in "iu" if is_array else type(value) is not int):
        raise InputError(f"{path!r} is a counter, and no integer.", found=typed(value), write="int(...)")
    # A counter in Python is arithmetic on steps, the same on every process; a metric in Python was read from a device.
    if where.processes > 1 and (is_array or not integral):
        _check_global(value, path, where.processes)
    if is_array:
        _check_alive(value, path)
        if where.far:
            value.copy_to_host_async()
    return value


def _is_real(dtype: Any) -> bool:
    # Keys have no kind, and bfloat16 has one of its own.
    return getattr(dtype, "kind", "") in tuple("fiub") or jnp.issubdtype(dtype, jnp.floating)


def _is_real_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not getattr(value, "shape", ())


def _check_global(value: Any, path: str, processes: int) -> None:
    """Raises unless an array is one value for all processes."""
    if isinstance(value, jax.Array):
        spanned = _spanned(value.sharding)
        if value.is_fully_replicated and spanned == processes:
            return
        what = f"{typed(value)} over the devices of {spanned} of {processes} processes, {value.sharding}"
    else:
        what = f"{typed(value)} on one of {processes} processes"
    raise InputError(
        f"{path!r} may differ between processes, which would then not fire together.",
        found=what,
        write="the array that the jitted train step returns, fully replicated over the mesh of all processes",
    )


@functools.lru_cache(maxsize=64)  # a mesh may have thousands of devices, and metrics come at every step
def _spanned(sharding: jax.sharding.Sharding) -> int:
    """Over how many processes it reaches."""
    return len({device.process_index for device in sharding.device_set})  # type: ignore[attr-defined]


def _check_alive(value: jax.Array, path: str) -> None:
    if value.is_deleted():
        raise InputError(
            f"{path!r} was deleted before a schedule could read it.",
            found="an array whose memory was donated",
            write="an array that the train step does not donate, such as metric + 0",
        )


def read(value: Any, path: str, *, integral: bool, where: Site) -> float:
    """The number that `taken` returned; waits for it, and moves it, if it has to, in an explicit transfer.

    Raises:
      InputError: its memory was given away meanwhile.
    """
    if isinstance(value, jax.Array):
        _check_alive(value, path)
        value = jax.device_get(value) if where.far else np.asarray(value)
    try:
        number = float(value)  # of a count as well: one that no float can stand for is none
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path!r} is too large for a number, or none.", found=typed(value), write="the metric or count itself"
        ) from error
    return operator.index(value) if integral else number
