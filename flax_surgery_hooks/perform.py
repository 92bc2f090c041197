"""One surgery on the leaves of a unit and their slots, as a pure function: edit, follow, measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks import checks, lineage, transport
from flax_surgery_hooks.errors import RuleError, SurgeryFunctionError, UserCodeError, located
from flax_surgery_hooks.following import move_slots
from flax_surgery_hooks.metrics import Change, combine, measure
from flax_surgery_hooks.operation import Fire, Operation, Unit, follows, like
from flax_surgery_hooks.surgery import call, call_fold_back


class Edited(NamedTuple):
    """What comes of a unit.

    Attributes:
      params: new leaves, in their own dtypes.
      slots: new slots, in their own dtypes.
      params_change: figures of the leaves.
      slots_change: figures of the slots.
      seeds: what fresh second moments start from, one per slot (0 where there is none to compute).
    """

    params: tuple[jax.Array, ...]
    slots: tuple[jax.Array, ...]
    params_change: Change
    slots_change: Change
    seeds: tuple[jax.Array, ...]


def compute_dtype(dtype: Any) -> Any:
    """The dtype in which a surgery sees a leaf: float32 for shorter floats, else the leaf's own."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def split_leaves(unit: Unit, params: Sequence[Any]) -> tuple[lineage.Tree, dict[str, Any]]:
    """The float leaves of a unit in compute dtype, and the others."""
    arrays = dict(zip(unit.paths, map(jnp.asarray, params), strict=True))
    for path, leaf in arrays.items():
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise SurgeryFunctionError(
                "Complex leaves cannot be edited.", path=path, found=leaf, write="exclude= with this path"
            )
    floats = {p: x.astype(compute_dtype(x.dtype)) for p, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return floats, {path: leaf for path, leaf in arrays.items() if path not in floats}


def trace_unit(
    operation: Operation, unit: Unit, params: Sequence[Any], fire: Fire
) -> tuple[lineage.TracedEdit, dict[str, Any]]:
    """The edit of a unit as a jaxpr on its float leaves, and its other leaves after the edit.

    Raises:
      UserCodeError, SurgeryFunctionError, DifferentiationError: see `surgery.call`.
    """
    floats, rest = split_leaves(unit, params)
    hashes = dict(zip(unit.paths, fire.hashes, strict=True))
    inputs = {**fire.inputs, **dict(operation.static)}

    def function(values: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
        everything = {path: values[path] if path in values else rest[path] for path in unit.paths}
        new = call(operation.edit, everything, key=fire.key, step=fire.step, inputs=inputs, hashes=hashes)
        return {path: new[path] for path in part}

    others = function(floats, rest) if rest else {}
    return lineage.trace(lambda values: function(values, floats), floats), others


def _follow(operation: Operation, unit: Unit, edit: lineage.TracedEdit, fire: Fire, in_place: bool) -> transport.Follow:
    name = operation.edit.name
    derivative = lineage.linearize(edit, name)
    transports = any(operation.rules.rule(slot.kind) == "transport" for slot in unit.slots)
    fold = None
    if transports and operation.edit.fold_back is not None:
        fold = _transposed_fold_back(operation, unit, derivative, fire)
    return transport.follow(derivative, transports=transports, fold=fold, in_place=in_place, name=name)


def _fold_back(operation: Operation, derivative: lineage.Lineage, fire: Fire) -> Any:
    key = fire.key
    if key is not None and not operation.edit.many:
        key = jax.random.fold_in(key, fire.hashes[0])
    ready = {"key": key, "step": fire.step, **fire.inputs, **dict(operation.static)}

    def fold(new: lineage.Tree) -> lineage.Tree:
        folded = call_fold_back(operation.edit, new, ready)
        return {path: folded[path] for path in derivative.old}

    return fold


def _transposed_fold_back(operation: Operation, unit: Unit, derivative: lineage.Lineage, fire: Fire) -> Any:
    fold = _fold_back(operation, derivative, fire)
    try:
        transposed = jax.linear_transpose(fold, derivative.new)
        shapes = jax.eval_shape(fold, derivative.new)
        jax.eval_shape(transposed, shapes)  # only here does JAX notice what is not linear
    except (UserCodeError, SurgeryFunctionError):
        raise
    except Exception as error:
        raise checks.not_linear(operation.edit.name, error) from error
    checks.check_fold_shapes(operation.edit.name, derivative.old, shapes)
    return lambda slots: transposed(slots)[0]


def perform(
    operation: Operation,
    unit: Unit,
    params: Sequence[Any],
    slots: Sequence[Any],
    fire: Fire,
    *,
    in_place: bool,
    seeds: Sequence[jax.Array] | None = None,
) -> Edited:
    """Edits a unit.

    Args:
      operation: the surgery and its rules.
      unit: the leaves; its paths may stand for those of another unit of the same signature.
      params: the leaves' values.
      slots: the slots' values, in the order of `unit.slots`.
      fire: key, step, inputs.
      in_place: whether slots stay in place because the edit mixes, as `examine` found.
      seeds: `Edited.seeds` of an earlier run, which then are not computed again.
    """
    traced, others = trace_unit(operation, unit, params, fire)
    how = _follow(operation, unit, traced, fire, in_place) if follows(operation, unit) and traced.old else None
    floats = how.lineage.new if how is not None else traced(traced.old)
    new = {**floats, **others}
    stored = tuple(like(new[path], old) for path, old in zip(unit.paths, params, strict=True))
    _check_kept(operation, unit, params, stored)
    moved, fresh, used = move_slots(operation, unit, how, params, stored, slots, fire, seeds)
    rule = "transport" if operation.rules.default == "transport" else "carry"
    without_history = {path: how.fresh(path, rule) for path in floats} if how is not None else {}
    return Edited(
        stored,
        moved,
        combine(
            measure(jnp.asarray(old), after, without_history.get(path))
            for path, old, after in zip(unit.paths, params, stored, strict=True)
        ),
        combine(measure(jnp.asarray(a), b, flags) for a, b, flags in zip(slots, moved, fresh, strict=True)),
        used,
    )


def _check_kept(operation: Operation, unit: Unit, old: Sequence[Any], new: Sequence[jax.Array]) -> None:
    """Where all slots are kept nothing is known of them, so that no leaf may change its shape."""
    if not operation.rules.only_keeps:
        return
    for path, before, after in zip(unit.paths, old, new, strict=True):
        if jnp.shape(before) != after.shape:
            raise RuleError(
                "Slots cannot be kept: the edit changes the leaf's shape.",
                path=path,
                found=f"{list(jnp.shape(before))} -> {list(after.shape)}",
                write="opt_state='carry', 'transport' or 'reset'",
            )


def examine(operation: Operation, unit: Unit, params: Sequence[Any], fire: Fire) -> bool:
    """Checks on concrete values that the rules can follow the edit; returns whether slots must stay in place.

    Raises:
      MixingError, LostHistoryError, UnequalCopiesError, FoldBackError, DifferentiationError: see `checks.judge`.
    """
    transports = any(operation.rules.rule(slot.kind) == "transport" for slot in unit.slots)
    notes: dict[str, Any] = {}

    def find(params: Sequence[Any], fire_arrays: Fire) -> checks.Findings:
        traced, _ = trace_unit(operation, unit, params, fire_arrays)
        derivative = lineage.linearize(traced, operation.edit.name)
        notes["depends"] = traced.depends()
        notes["differentiable"] = lineage.differentiable(derivative)
        notes["same_shape"] = all(derivative.new[p].shape == leaf.shape for p, leaf in derivative.old.items())
        fold = None
        if operation.edit.fold_back is not None and transports:
            _transposed_fold_back(operation, unit, derivative, fire_arrays)
            fold = _fold_back(operation, derivative, fire_arrays)
        return checks.find(derivative, transports=transports, fold_back=fold, name=operation.edit.name)

    with located(path=unit.paths[0] if len(unit.paths) == 1 else None):
        try:
            findings = jax.device_get(jax.jit(find)(tuple(params), fire))
        except TypeError as error:  # JAX sees only when it compiles a derivative that a `custom_vjp` has none
            raise lineage.not_differentiable(operation.edit.name, error) from error
        one_leaf = len(unit.paths) == 1
        return checks.judge(findings, **notes, one_leaf=one_leaf, transports=transports, name=operation.edit.name)
