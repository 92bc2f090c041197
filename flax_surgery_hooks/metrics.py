"""Figures of a fire as CLU metrics: how much changed, in parameters and in optimizer slots."""

# No `from __future__ import annotations`: `clu.metrics.Collection` reads its annotations as types.
from collections.abc import Iterable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from flax_surgery_hooks.reductions import added, totals_here
from flax_surgery_hooks.writers import MetricWriter as MetricWriter
from flax_surgery_hooks.writers import create_default_writer as create_default_writer


@flax.struct.dataclass
class Change(clu_metrics.Metric):
    """What an edit did to some arrays, as sums over their elements: float32 scalars, which merge by addition.

    Attributes:
      size: number of elements after the edit.
      changed: elements whose value differs (all, where the shape does).
      fresh: elements without history.
      square_before: sum of squares before.
      square_after: sum of squares after.
      square_change: sum of squares of the difference (of the values after, where the shape differs).
      zeros: elements that are 0 after.
      nonfinite: non-finite elements after.
      nonfinite_new: non-finite elements after that were finite before; of another shape, how many more there are.
    """

    size: jax.Array
    changed: jax.Array
    fresh: jax.Array
    square_before: jax.Array
    square_after: jax.Array
    square_change: jax.Array
    zeros: jax.Array
    nonfinite: jax.Array
    nonfinite_new: jax.Array

    @classmethod
    def empty(cls) -> Self:
        """No elements."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(9)))

    def merge(self, other: Self) -> Self:
        """The change of both sets of arrays together."""
        return jax.tree.map(lambda a, b: a + b, self, other)

    def compute(self) -> dict[str, Any]:
        """The figures: counts of elements, norms, and ratios (0 where nothing is divided by)."""
        size = jnp.maximum(self.size, 1)
        before = jnp.sqrt(self.square_before)
        return {
            "elements": self.size,
            "changed": self.changed,
            "fresh": self.fresh,
            "norm_before": before,
            "norm_after": jnp.sqrt(self.square_after),
            "relative_change": jnp.where(
                before > 0, jnp.sqrt(self.square_change) / jnp.where(before > 0, before, 1), 0
            ),
            "sparsity": self.zeros / size,
            "nonfinite": self.nonfinite,
        }


@flax.struct.dataclass
class FireFigures(clu_metrics.Collection):
    """The figures of one fire: of the parameters it edits, and of their optimizer slots together."""

    params: Change
    slots: Change

    @classmethod
    def of(cls, params: Change, slots: Change) -> Self:
        """The figures of a fire from the changes of all its leaves and of all their slots."""
        return cls.empty().replace(params=params, slots=slots)

    def compute_flat(self) -> dict[str, Any]:
        """`compute()` with keys such as "params/relative_change"."""
        return {f"{part}/{name}": value for part, values in self.compute().items() for name, value in values.items()}


Pair = tuple[Any, Any, Any]
"""An array before and after an edit, any shapes and number types, and which elements of the second have no history, as
booleans, or None."""


def measure(pairs: Iterable[Pair]) -> list[Change]:
    """The change of each pair: one pass over it, and one all-reduce for all pairs that lie on one mesh."""
    items = [(_keyless(before), _keyless(after), fresh) for before, after, fresh in pairs]
    return [_change(item, row) for item, row in zip(items, added(_row, items), strict=True)]


def _row(item: Pair) -> jax.Array:
    """What is summed over the elements of a pair, or of pieces of both."""
    old, new = _wide(item[0]), _wide(item[1])
    fresh = jnp.zeros(()) if item[2] is None else _flag(item[2])
    of_new = [new * new, _flag(new == 0), _flag(~jnp.isfinite(new)), *([] if item[2] is None else [fresh])]
    if old.shape == new.shape:
        change = new - old
        became = _flag(~jnp.isfinite(new) & jnp.isfinite(old))
        summed = totals_here([old * old, change * change, _flag(change != 0), became, *of_new])
    else:
        of_old = totals_here([old * old, _flag(~jnp.isfinite(old))])
        none = jnp.zeros((), jnp.float32)
        summed = (of_old[0], none, none, of_old[1], *totals_here(of_new))
    return jnp.stack([*summed, fresh] if item[2] is None else summed)


def _change(item: Pair, row: jax.Array) -> Change:
    square_before, square_change, changed, nonfinite_new, square_after, zeros, nonfinite, fresh = row
    size = jnp.full((), float(item[1].size), jnp.float32)
    if item[0].shape != item[1].shape:
        square_change, changed = square_after, size
        nonfinite_new = jnp.maximum(nonfinite - nonfinite_new, 0)
    return Change(
        size=size,
        changed=changed,
        fresh=fresh,
        square_before=square_before,
        square_after=square_after,
        square_change=square_change,
        zeros=zeros,
        nonfinite=nonfinite,
        nonfinite_new=nonfinite_new,
    )


def combine(changes: Iterable[Change]) -> Change:
    """The sum of several changes."""
    result = None
    for change in changes:
        result = change if result is None else result.merge(change)
    return Change.empty() if result is None else result


FIELDS = len(Change.__dataclass_fields__)
"""How many numbers a `Change` is."""

COLUMNS = ("elements", "norm_before", "norm_after", "relative_change", "changed", "fresh", "sparsity")
"""What `table_of` tells of each leaf."""


def table_of(leaves: Change) -> jax.Array:
    """The figures of each leaf, float32 [leaves, len(COLUMNS)], of a `Change` whose fields are arrays [leaves]."""
    figures = leaves.compute()
    return jnp.stack([figures[name] for name in COLUMNS], 1)


def _flag(flags: jax.Array) -> jax.Array:
    return jnp.where(flags, 1.0, 0.0).astype(jnp.float32)


def _keyless(values: Any) -> jax.Array:
    values = jnp.asarray(values)
    return jax.random.key_data(values) if jnp.issubdtype(values.dtype, jax.dtypes.prng_key) else values


def _wide(values: jax.Array) -> jax.Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
