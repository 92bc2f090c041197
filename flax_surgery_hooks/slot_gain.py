"""How large a slot is for a given gradient, measured: what a moment of one optimizer is worth in another.

A gradient at one update and none after it leaves `first` in a slot, which then shrinks by `decay` at each update, if
the slot is a linear average or sum. Under a constant gradient g it tends to `gain * g`, gain = first / (1 - decay): 1
for the averages of Adam, 1 / (1 - decay) for the trace of SGD. It is measured in float64 on parameters of zero that do
not move, so that weight decay adds nothing, with gradients so small that nothing is clipped; for slots of order 0,
which hold what is clipped or preconditioned, with large ones.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_surgery_hooks.errors import SlotError, shorten
from flax_surgery_hooks.paths import KeyPath, Leaves
from flax_surgery_hooks.slot_probe import Shapes, small
from flax_surgery_hooks.slots import Slot, as_abstract

ORDER = {"grad": 1, "grad_sq": 2, "grad_abs": 1, "update": 0}
"""The kinds of slots whose size is measured, and their order in the gradient."""
SMALL, LARGE = 2.0**-20, 2.0**20
LONGEST = 64
"""How many updates are waited for a slot to take a gradient up: those between two of `optax.MultiSteps`."""


class Response(NamedTuple):
    """What one unit gradient does to a slot.

    Attributes:
      values: the slot after the update that takes it up and after each of two further ones.
      precision: relative precision of the slot's dtype.
    """

    values: tuple[float, ...]
    precision: float

    @property
    def gain(self) -> float | None:
        """The size of the slot under a constant gradient of 1; None if the slot is no linear average or decaying sum.

        >>> round(Response((1.0, 0.9, 0.81), 1e-16).gain, 6)
        10.0
        >>> Response((1.0, 1.0, 1.0), 1e-16).gain is None
        True
        """
        first, second, third = self.values
        if first == 0 or not np.isfinite(self.values).all():
            return None
        decay, slack = second / first, max(8 * self.precision, 1e-9)
        if not 0 <= decay < 1 or abs(third - decay * second) > slack * abs(first):
            return None
        gain = first / (1 - decay)
        return 1.0 if abs(gain - 1) <= slack / (1 - decay) else gain

    def like(self, other: Response) -> bool:
        """Whether both are of one size at every update."""
        slack = max(8 * self.precision, 8 * other.precision, 1e-9)
        return bool(np.allclose(self.values, other.values, rtol=slack, atol=0))


def responses(tx: Any, opt_state: Any, params: Leaves, slots: Mapping[int, tuple[Slot, ...]]) -> dict[str, Response]:
    """The response of each group of slots, by `Slot.group`; those of other kinds than in `ORDER` are missing, and those
    that take up no gradient.

    Args:
      tx: the optimizer.
      opt_state: its state; arrays or `jax.ShapeDtypeStruct`s.
      params: the flattened parameters.
      slots: what `slots_of` says of these.

    Raises:
      SlotError: the optimizer cannot be run.
    """
    keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(opt_state)[0]]
    one_of_each: dict[str, tuple[int, str, str, KeyPath]] = {}
    for owner, of_leaf in slots.items():
        for slot in of_leaf:
            if slot.kind in ORDER:
                one_of_each.setdefault(slot.group, (owner, slot.group, slot.kind, keys[slot.index]))
    if not one_of_each:
        return {}
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in map(as_abstract, params.values))
    return _responses(tx, params.treedef, shapes, tuple(one_of_each.values()))


@functools.lru_cache(maxsize=16)
def _responses(tx: Any, treedef: Any, shapes: Shapes, slots: tuple[Any, ...]) -> dict[str, Response]:
    some = tuple(sorted({owner for owner, *_ in slots}))
    # Holes stand for the other parameters; some optimizers bear none, and some no float64.
    trials = [(chosen, wide) for chosen in (some, tuple(range(len(shapes)))) for wide in (True, False)]
    for chosen, wide in trials[:-1]:
        with contextlib.suppress(Exception):
            return _measured(tx, treedef, shapes, slots, chosen, wide)
    try:
        return _measured(tx, treedef, shapes, slots, *trials[-1])
    except Exception as error:
        raise SlotError(
            f"The size of the optimizer's slots could not be measured: {type(error).__name__}: {shorten(error, 200)}",
            write="carry=False, or an optimizer whose update(updates, state, params) runs on any shapes",
        ) from error


def _measured(
    tx: Any, treedef: Any, shapes: Shapes, slots: tuple[Any, ...], chosen: tuple[int, ...], wide: bool
) -> dict[str, Response]:
    with jax.ensure_compile_time_eval(), _precision(wide), jax.default_device(jax.local_devices(backend="cpu")[0]):
        leaves = [_zero(*shape, wide) if i in chosen else optax.MaskedNode() for i, shape in enumerate(shapes)]
        params = jax.tree.unflatten(treedef, leaves)
        found: dict[str, Response] = {}
        for gradient, orders in ((SMALL, (1, 2)), (LARGE, (0,))):
            mine = [(group, ORDER[kind], keys) for _, group, kind, keys in slots if ORDER[kind] in orders]
            found |= _Stream(tx, params, gradient).responses(mine) if mine else {}
        return found


class _Stream:
    """Runs of a tiny optimizer, and what they leave in some of its slots."""

    def __init__(self, tx: Any, params: Any, gradient: float):
        self._transform = optax.with_extra_args_support(tx)
        self._params = params
        self._gradient = gradient
        self._start = self._transform.init(params)
        self._places: list[int] = []
        self._runs: dict[int, list[list[float]]] = {}
        self._update = jax.jit(self._updated)  # one program for all updates

    def responses(self, slots: list[tuple[str, int, KeyPath]]) -> dict[str, Response]:
        """The response of each slot, given as group, order and path; those that take up no gradient are missing."""
        keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(self._start)[0]]
        self._places = [keys.index(slot) for *_, slot in slots]
        found = {}
        for which, ((group, order, _), taken) in enumerate(zip(slots, self._first_taken(), strict=True)):
            if taken is not None:
                values, precision = self._response(which, taken)
                found[group] = Response(tuple(value / self._gradient**order for value in values), precision)
        return found

    def _first_taken(self) -> list[int | None]:
        """For each slot the update at which it takes up a constant gradient, counted from 0; None if it never does."""
        found: list[int | None] = [None] * len(self._places)
        state = idle = self._start
        for step in range(LONGEST):
            state, idle = self._update(state, self._gradient), self._update(idle, 0.0)
            differ = [a != b for a, b in zip(self._values(state), self._values(idle), strict=True)]
            found = [step if old is None and new else old for old, new in zip(found, differ, strict=True)]
            if None not in found:
                break
        return found

    def _response(self, which: int, taken: int) -> tuple[tuple[float, ...], float]:
        """A slot after the update that takes up a gradient, and as many updates later twice; and its precision."""
        period = taken + 1
        rows = self._run(period)
        leaf = jax.tree.leaves(self._start)[self._places[which]]
        between = [row[which] for row in rows[taken : 2 * period - 1]]
        if any(value != between[0] for value in between):  # it moves in between: no multiple of `period` says how
            return (float("nan"),) * 3, 1.0
        return tuple(rows[taken + i * period][which] for i in range(3)), float(jnp.finfo(leaf.dtype).eps)

    def _run(self, period: int) -> list[list[float]]:
        """All slots after each update, a gradient at the first `period` of them, less what they are without any."""
        if period not in self._runs:
            state = idle = self._start
            rows = []
            for step in range(3 * period):
                state = self._update(state, self._gradient if step < period else 0.0)
                idle = self._update(idle, 0.0)
                rows.append([a - b for a, b in zip(self._values(state), self._values(idle), strict=True)])
            self._runs[period] = rows
        return self._runs[period]

    def _updated(self, state: Any, gradient: Any) -> Any:
        grads = jax.tree.map(lambda p: jnp.full(p.shape, gradient, p.dtype) if _is_float(p) else p, self._params)
        one = jnp.float32(1)
        extra = {"value": one, "grad": grads, "value_fn": lambda _: one}
        return self._transform.update(grads, state, self._params, **extra)[1]

    def _values(self, state: Any) -> list[float]:
        leaves = jax.tree.leaves(state)
        return [float(np.asarray(leaves[place], np.float64).ravel()[0]) for place in self._places]


def _zero(shape: tuple[int, ...], dtype: Any, wide: bool) -> Any:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), small(shape)) if shape else jax.random.key(0)
    is_real = jnp.issubdtype(dtype, jnp.floating)
    return jnp.zeros(small(shape), jnp.float64 if wide and is_real else dtype)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _precision(wide: bool) -> Any:
    """A context in which arrays may be float64."""
    if not wide:
        return contextlib.nullcontext()
    module: Any = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # before JAX 0.8
    return module.enable_x64(True)
