"""One surgery on the leaves of a unit and their slots, as a pure function: edit, follow, measure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks import checks, lineage, transport
from flax_surgery_hooks.calling import call, call_figures, call_fold_back
from flax_surgery_hooks.errors import RuleError, StructureError, SurgeryFunctionError, UserCodeError, located
from flax_surgery_hooks.following import move_slots
from flax_surgery_hooks.metrics import Change, Pair, combine, measure
from flax_surgery_hooks.operation import NOTHING, Fire, Operation, Unit, compute_dtype, follows, like
from flax_surgery_hooks.slot_edits import edited_slots


class Edited(NamedTuple):
    """What comes of a unit.

    Attributes:
      params: new leaves, in their own dtypes.
      slots: new slots, in their own dtypes.
      memory: what the surgery remembers now, in the dtypes of what it remembered.
      params_change: figures of each leaf after the edit, then of each that it removed.
      slots_change: figures of the slots.
      memory_change: figures of the memory, for the guard.
      seeds: what fresh second moments start from, one per slot (0 where there is none to compute).
      figures: the surgery's own, float32 [figures]; None if it has none.
    """

    params: tuple[jax.Array, ...]
    slots: tuple[jax.Array, ...]
    memory: Any
    params_change: tuple[Change, ...]
    slots_change: Change
    memory_change: Change
    seeds: tuple[jax.Array, ...]
    figures: Any = None


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


class Traced(NamedTuple):
    """A unit's edit before it is differentiated.

    Attributes:
      edit: from its float leaves to its new float leaves.
      others: its other leaves after the edit.
      memory: what the surgery remembers afterwards.
    """

    edit: lineage.TracedEdit
    others: dict[str, Any]
    memory: Any


def trace_unit(operation: Operation, unit: Unit, params: Sequence[Any], fire: Fire) -> Traced:
    """The edit of a unit as a jaxpr on its float leaves.

    Raises:
      UserCodeError, SurgeryFunctionError, DifferentiationError: see `calling.call`.
    """
    floats, rest = split_leaves(unit, params)

    def everything(values: Mapping[str, Any]) -> Any:
        leaves = {path: values[path] if path in values else rest[path] for path in unit.paths}
        return call_unit(operation, unit, leaves, fire)

    def function(values: Mapping[str, Any]) -> dict[str, Any]:
        return {path: leaf for path, leaf in everything(values).leaves.items() if _is_float(leaf)}

    others, memory = {}, fire.memory
    if rest or operation.edit.takes("memory") or unit.other is not None:
        called = everything(floats)
        others = {path: leaf for path, leaf in called.leaves.items() if not _is_float(leaf)}
        memory = jax.tree.map(like, called.memory, fire.memory)
    return Traced(lineage.trace(function, floats), others, memory)


def call_unit(operation: Operation, unit: Unit, leaves: Mapping[str, Any], fire: Fire) -> Any:
    """Calls the surgery on the leaves of a unit, in compute dtype."""
    hashes = dict(zip(unit.paths, fire.hashes, strict=True))
    inputs = {**fire.inputs, **dict(operation.static)}
    return call(operation.edit, leaves, key=fire.key, step=fire.step, inputs=inputs, hashes=hashes, memory=fire.memory)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


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
        return call_fold_back(operation.edit, new, derivative.old, ready)

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
    measures: bool = True,
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
      measures: whether there are figures; where only shapes are asked for, tracing takes half the time without.
    """
    traced = trace_unit(operation, unit, params, fire)
    edit, after = traced.edit, unit.after
    how = _follow(operation, unit, edit, fire, in_place) if follows(operation, unit) and edit.old else None
    floats = how.lineage.new if how is not None else edit(edit.old)
    new = {**floats, **traced.others}
    old = dict(zip(unit.paths, params, strict=True))
    stored = tuple(_stored(unit, i, new[path], old.get(path)) for i, path in enumerate(after.paths))
    _check_kept(operation, unit, params, stored)
    if operation.edit.edit_slots is None:
        moved, fresh, used = move_slots(operation, unit, how, params, stored, slots, fire, seeds)
    else:
        given = {**fire.inputs, **dict(operation.static)}
        moved = edited_slots(operation.edit, unit, new, slots, fire, given)
        fresh, used = (None,) * len(moved), ()
    if not measures:
        return Edited(stored, moved, traced.memory, (), Change.empty(), Change.empty(), used)
    rule = "transport" if operation.rules.default == "transport" else "carry"
    without_history = {path: how.fresh(path, rule) for path in floats} if how is not None else {}
    changes = measure(
        [
            *_pairs([old.get(path) for path in after.paths], stored, map(without_history.get, after.paths)),
            *((leaf, NOTHING, None) for path, leaf in old.items() if path not in after.paths),
            *_pairs([None if i is None else slots[i] for i in unit.origins()], moved, fresh),
            *((slot, NOTHING, None) for i, slot in enumerate(slots) if i not in unit.origins()),
            *zip(*map(jax.tree.leaves, (fire.memory, traced.memory)), itertools.repeat(None)),
        ]
    )
    leaves = len(set(unit.paths) | set(after.paths))
    remembered = len(jax.tree.leaves(fire.memory))
    of_slots, of_memory = changes[leaves : len(changes) - remembered], changes[len(changes) - remembered :]
    return Edited(
        stored, moved, traced.memory, tuple(changes[:leaves]), combine(of_slots), combine(of_memory), used,
        _own_figures(operation, unit, params, fire),
    )  # fmt: skip


def _own_figures(operation: Operation, unit: Unit, params: Sequence[Any], fire: Fire) -> Any:
    if operation.edit.figures is None or not operation.figures:
        return None
    floats, rest = split_leaves(unit, params)
    leaves = {path: floats[path] if path in floats else rest[path] for path in unit.paths}
    inputs = {**fire.inputs, **dict(operation.static)}
    return call_figures(operation.edit, leaves, key=fire.key, step=fire.step, inputs=inputs, memory=fire.memory)


def _pairs(before: Iterable[Any], after: Iterable[jax.Array], fresh: Iterable[Any]) -> Iterator[Pair]:
    for old, new, flags in zip(before, after, fresh, strict=True):
        yield NOTHING if old is None else old, new, flags


def _stored(unit: Unit, place: int, new: jax.Array, old: Any) -> jax.Array:
    """A new leaf as the train state holds it: in the dtype of the old one, or in that settled for a new path."""
    return like(new, old) if old is not None else jnp.asarray(new).astype(unit.after.dtypes[0][place])


def _check_kept(operation: Operation, unit: Unit, old: Sequence[Any], new: Sequence[jax.Array]) -> None:
    """A layer has the shape of all others; and where all slots are kept nothing is known of them."""
    for (path, _, layer), before, after in zip(unit.pieces, old, new, strict=unit.other is None):
        if layer is not None and jnp.shape(before) != after.shape:
            raise StructureError(
                "The edit changes the shape of one layer, and a stacked leaf has one shape for all.",
                path=path,
                found=f"{list(jnp.shape(before))} -> {list(after.shape)}",
                write="the whole leaf, without an index",
            )
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
        traced = trace_unit(operation, unit, params, fire_arrays).edit
        derivative = lineage.linearize(traced, operation.edit.name)
        notes["depends"] = traced.depends()
        notes["differentiable"] = lineage.differentiable(derivative)
        notes["same_shape"] = {p: leaf.shape for p, leaf in derivative.new.items()} == {
            p: leaf.shape for p, leaf in derivative.old.items()
        }
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
