"""What hooks and `operate` are told about one surgery, read and checked: an `Operation`, and the inputs bound to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_surgery_hooks import guards, rules
from flax_surgery_hooks.errors import InputError, RuleError, quoted
from flax_surgery_hooks.guards import Guard
from flax_surgery_hooks.mirrors import checked_fields
from flax_surgery_hooks.operation import Operation
from flax_surgery_hooks.reading import as_edit
from flax_surgery_hooks.selection import Patterns, select
from flax_surgery_hooks.surgery import RESERVED


def make_operation(
    surgery: Any,
    *,
    params: Patterns,
    exclude: Patterns | None = None,
    expect: int | None = None,
    opt_state: rules.OptStateRule = None,
    fresh: str = "mean",
    guard: Guard = "finite",
    figures: bool = True,
    histograms: bool = False,
    fields: Sequence[str] = (),
) -> Operation:
    """Reads all that `operate` and `SurgeryHooks.add` are told about one surgery.

    Raises:
      SurgeryFunctionError, SelectionError, RuleError, UserCodeError: what is wrong with it.
    """
    edit = as_edit(surgery)
    if edit.edits_state and opt_state is not None:
        raise RuleError(
            f"The surgery {edit.name} says itself what becomes of the optimizer state.",
            found=f"opt_state={quoted(opt_state)}",
            write="no opt_state=",
        )
    guard = guards.as_guard(guard)
    if edit.edit_optimizer is not None and callable(guard):
        raise RuleError(
            f"The surgery {edit.name} edits the optimizer as a whole; there are no figures for a guard to look at.",
            found=f"guard={guards.told(guard)}",
            write="no guard=",
        )
    return Operation(
        edit,
        select(params, exclude=exclude, expect=expect),
        rules.slot_rules("keep" if edit.edits_state else edit.rule if opt_state is None else opt_state, edit.preserves),
        rules.check_choice(fresh, rules.FRESH, "value of fresh="),
        guard,
        figures,
        histograms,
        checked_fields(fields),
    )


def bind_inputs(operation: Operation, given: Mapping[str, Any]) -> tuple[Operation, dict[str, Any]]:
    """The operation with its static inputs bound, and those inputs that are arrays, numbers or pytrees of them.

    Raises:
      InputError: a reserved name, an input that is missing, or a static one that cannot be hashed.
    """
    clash = [name for name in given if name in RESERVED]
    if clash:
        raise InputError(
            f"The input name {clash[0]!r} is reserved for what hooks give to surgeries.",
            found=f"inputs {', '.join(given)}",
            write=f"hooks(step, state, my_{clash[0]}=...)",
        )
    asked = operation.edit.inputs(given)
    arrays = {name: value for name, value in asked.items() if _is_arrays(value)}
    static = tuple((name, value) for name, value in asked.items() if name not in arrays)
    for name, value in static:
        try:
            hash(value)
        except TypeError as error:
            raise InputError(
                f"The input {name!r} is neither made of arrays and numbers nor hashable.",
                found=type(value).__name__,
                write="arrays, numbers, pytrees of them, or something hashable such as a function",
            ) from error
    return (dataclasses.replace(operation, static=static) if static else operation), arrays


_ARRAYS = jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic | int | float


def _is_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(x, _ARRAYS) for x in leaves)
