"""What the first pass of a fire says: its figures, and whether the guard lets it through.

The figures of a unit travel as one array, as each array costs to handle: a row of the fields of a `Change` for each
leaf after the edit and each that it removed, then one for all slots, and one for what the surgery remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks.calling import figure_names
from flax_surgery_hooks.guards import Function, passes
from flax_surgery_hooks.metrics import FIELDS, Change, FireFigures, table_of
from flax_surgery_hooks.operation import Operation, Unit
from flax_surgery_hooks.perform import Edited


class Verdict(NamedTuple):
    """What the first pass over all units of a fire says.

    Attributes:
      ok: whether the fire makes no value non-finite that was finite, and the guard's function lets its figures through.
      finite: the first of these alone.
      figures: `FireFigures.compute_flat`.
      leaves: `metrics.table_of` all leaves.
    """

    ok: Any
    finite: Any
    figures: dict[str, Any]
    leaves: Any


def rows_of(edited: Edited) -> jax.Array:
    """The figures of a unit, float32 [leaves + 2, fields]."""
    changes = (*edited.params_change, edited.slots_change, edited.memory_change)
    return jnp.stack([jnp.stack(jax.tree.leaves(change)) for change in changes])


def judge(units: Sequence[jax.Array], guard: Function | None = None) -> Verdict:
    """Verdict and figures of a fire, of the rows of its units; traced or concrete.

    Args:
      units: `rows_of` each.
      guard: a function of figures that has to let them through too, or None.

    Raises:
      UserCodeError, RuleError: see `guards.passes`.
    """
    leaves = Change(*jnp.concatenate([rows[:-2] for rows in units]).T)
    slots, memory = (Change(*jnp.stack([rows[place] for rows in units]).sum(0)) for place in (-2, -1))
    params = jax.tree.map(jnp.sum, leaves)
    finite = params.merge(slots).merge(memory).nonfinite_new == 0
    figures = FireFigures.of(params, slots).compute_flat()
    ok = finite if guard is None else finite & passes(guard, figures)
    return Verdict(ok, finite, figures, table_of(leaves))


def names_of(operation: Operation, plan: Sequence[Unit]) -> tuple[str, ...]:
    """The names of the figures that a surgery measures itself, for all units of a fire; of one leaf, with its path.

    Raises:
      UserCodeError, SurgeryFunctionError: see `calling.figure_names`.
    """
    if not operation.figures or operation.edit.figures is None:
        return ()
    many = operation.edit.many
    found = [(unit.paths[0], figure_names(operation.edit, unit.paths)) for unit in plan]
    return tuple(name if many else f"{name}/{path}" for path, names in found for name in names)


def named(operation: Operation, plan: Sequence[Unit], units: Sequence[Any]) -> dict[str, Any]:
    """The figures that a surgery measures itself, by name, of `Edited.figures` of each unit."""
    names = names_of(operation, plan)
    return dict(zip(names, _apart([values for values in units if values is not None]), strict=True)) if names else {}


@jax.jit
def _apart(units: Sequence[jax.Array]) -> list[jax.Array]:
    """Each number by itself, by one program."""
    return [value for values in units for value in values]


def row_of(verdict: Verdict) -> jax.Array:
    """`ok` and `finite` as one more row of figures, float32 [1, fields]."""
    return jnp.zeros((1, FIELDS), jnp.float32).at[0, :2].set(jnp.stack([verdict.ok, verdict.finite]))


_judge_jitted = jax.jit(judge, static_argnums=1)


def judged(units: Sequence[Any]) -> Verdict:
    """`judge` of the units of a fire as the host has read them, by the program that judges fires on the host."""
    return _judge_jitted(list(map(jnp.asarray, units)), None)


def verdict(units: Sequence[jax.Array], guard: Function | None = None) -> Verdict:
    """`judge` of the units of a fire, on their device; read by the host if they live on different ones."""
    if len({frozenset(rows.devices()) for rows in units}) > 1:
        return jax.device_get(judge(jax.device_get(units), guard))
    return _judge_jitted(list(units), guard)
