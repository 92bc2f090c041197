"""One surgery on some leaves and their slots, as a pure function: edit, follow, measure."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks import checks, lineage, transport
from flax_surgery_hooks.errors import RuleError, SlotError, SurgeryFunctionError, UserCodeError, located, shorten
from flax_surgery_hooks.metrics import Change, combine, measure
from flax_surgery_hooks.paths import Leaves
from flax_surgery_hooks.rules import SlotRules
from flax_surgery_hooks.selection import Selection
from flax_surgery_hooks.slots import Slot
from flax_surgery_hooks.surgery import Edit, call, call_fold_back, path_hash

FOLLOWING = ("transport", "carry")


@dataclass(frozen=True)
class Operation:
    """Everything about one surgery that does not depend on a train state.

    Attributes:
      edit: the surgery.
      selection: which leaves it edits.
      rules: how slots follow.
      fresh: what second moments without history start from, "mean" or "init".
      guard: "finite" or "off".
      figures: whether figures are computed.
      static: those of the trainer's inputs that are neither arrays nor numbers, as pairs of name and value.
    """

    edit: Edit
    selection: Selection
    rules: SlotRules
    fresh: str = "mean"
    guard: str = "finite"
    figures: bool = True
    static: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Unit:
    """The leaves that one call of the surgery sees: one, or all selected ones.

    Attributes:
      paths: their paths.
      places: their places among the flattened parameters.
      slots: their slots in the optimizer state.
    """

    paths: tuple[str, ...]
    places: tuple[int, ...]
    slots: tuple[Slot, ...]

    def position(self, slot: Slot) -> int:
        """Which leaf of the unit a slot belongs to."""
        return self.places.index(slot.owner)


class Fire(NamedTuple):
    """What a surgery gets beside its leaves; a pytree of arrays.

    Attributes:
      key: the key of the fire, or None if nothing asks for it.
      step: what `state.step` holds, int32 scalar.
      inputs: those of the trainer's inputs that the surgery asked for and that are arrays or numbers.
      hashes: `path_hash` of each leaf of the unit.
    """

    key: jax.Array | None
    step: Any
    inputs: dict[str, Any]
    hashes: tuple[Any, ...]


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


def units(operation: Operation, leaves: Leaves, slots: Mapping[int, tuple[Slot, ...]]) -> list[Unit]:
    """Selects leaves and groups them by call of the surgery.

    Raises:
      SelectionError: see `Selection.resolve`.
      SlotError: a slot whose layout or starting value the rule cannot use.
    """
    places = operation.selection.resolve(leaves)
    for place in places:
        with located(path=leaves.paths[place]):
            for slot in slots.get(place, ()):
                _check_start(operation, slot)
    grouped = [places] if operation.edit.many else [(place,) for place in places]
    return [
        Unit(
            tuple(leaves.paths[place] for place in group),
            tuple(group),
            tuple(slot for place in group for slot in slots.get(place, ())),
        )
        for group in grouped
    ]


def _check_start(operation: Operation, slot: Slot) -> None:
    rule = operation.rules.rule(slot.kind)
    needs_init = rule == "reset" or (rule in FOLLOWING and (operation.fresh == "init" or slot.kind == "invariant"))
    if needs_init and slot.init is None and slot.kind != "param":
        raise SlotError(
            f"`tx.init` fills {slot.name} with no constant, so that elements cannot start anew in it.",
            write=f'opt_state={{"{slot.kind}": "keep"}}',
        )


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


def follows(operation: Operation, unit: Unit) -> bool:
    """Whether any slot of a unit has to be moved by the derivative of the edit."""
    return any(operation.rules.rule(slot.kind) in FOLLOWING for slot in unit.slots)


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
    moved, fresh, used = _move_slots(operation, unit, how, params, stored, slots, fire, seeds)
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
        if np.shape(before) != after.shape:
            raise RuleError(
                "Slots cannot be kept: the edit changes the leaf's shape.",
                path=path,
                found=f"{list(np.shape(before))} -> {list(after.shape)}",
                write="opt_state='carry', 'transport' or 'reset'",
            )


def like(value: jax.Array, old: Any) -> jax.Array:
    """`value` in the dtype and weak type of `old`; from weak to strong would retrace the train step."""
    value = jnp.asarray(value)  # a constant may come as a number
    value = value.astype(jnp.result_type(old)) if hasattr(old, "dtype") else value
    if not getattr(old, "weak_type", False):
        return value
    # The primitive itself: `lax.convert_element_type` cannot make a strong array weak.
    return jax.lax.convert_element_type_p.bind(value, new_dtype=value.dtype, weak_type=True, sharding=None)


def _move_slots(
    operation: Operation,
    unit: Unit,
    how: transport.Follow | None,
    params: Sequence[Any],
    new: Sequence[jax.Array],
    slots: Sequence[Any],
    fire: Fire,
    seeds: Sequence[jax.Array] | None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...], tuple[jax.Array, ...]]:
    """New slots, which of their elements are fresh, and the seeds that were used."""
    values = [jnp.asarray(slot) for slot in slots]
    gathered = _gather_all(operation, unit, how, values)
    results, flags, used = [], [], []
    for i, slot in enumerate(unit.slots):
        position = unit.position(slot)
        path, rule = unit.paths[position], operation.rules.rule(slot.kind)
        seed = jnp.zeros((), jnp.float32)
        fresh = None
        with located(path=path):
            if i in gathered:
                assert how is not None
                fresh = how.fresh(path, str(rule))
                seed = seeds[i] if seeds is not None else _seed(operation, slot, gathered[i], fresh, values[i])
                result = transport.fill_fresh(gathered[i], fresh, slot.kind, seed)
            elif callable(rule):
                result = _call_rule(rule, slot, path, values[i], params[position], new[position], fire, position)
            elif rule == "reset":
                result = _reset(slot, values[i], new[position])
                fresh = jnp.ones(result.shape, bool)
            else:
                result = _keep(slot, values[i], params[position], new[position])
        results.append(like(result, slots[i]))
        flags.append(fresh)
        used.append(seed)
    return tuple(results), tuple(flags), tuple(used)


def _gather_all(
    operation: Operation, unit: Unit, how: transport.Follow | None, values: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """The moved slots by their index; the slots of one field and kind move together through the edit."""
    if how is None:
        return {}
    together: dict[tuple[str, str], list[int]] = {}
    for i, slot in enumerate(unit.slots):
        if operation.rules.rule(slot.kind) in FOLLOWING:
            together.setdefault((slot.group, slot.kind), []).append(i)
    moved: dict[int, jax.Array] = {}
    for (_, kind), members in together.items():
        owners = {unit.paths[unit.position(unit.slots[i])]: i for i in members}
        for path, i in owners.items():
            _check_layout(unit.slots[i], values[i], how.lineage.old[path], path)
        rule = str(operation.rules.rule(kind))
        arrived = transport.move(how, rule, kind, {path: values[i] for path, i in owners.items()})
        moved.update({i: arrived[path] for path, i in owners.items()})
    return moved


def _check_layout(slot: Slot, value: jax.Array, old: jax.Array, path: str) -> None:
    if value.shape != old.shape:
        raise SlotError(
            f"{slot.name} is shaped {list(value.shape)} for a parameter shaped {list(old.shape)}; slots of another "
            "layout cannot be moved.",
            path=path,
            write=f'opt_state={{"{slot.kind}": "keep"}} for an edit that keeps the shape',
        )


def _seed(operation: Operation, slot: Slot, moved: jax.Array, fresh: jax.Array, old: jax.Array) -> jax.Array:
    init = 0.0 if slot.init is None else slot.init
    if not transport.uses_seed(slot.kind) or operation.fresh == "init":
        return jnp.asarray(init, jnp.float32)
    return transport.mean_of_survivors(moved, fresh, old, init)


def _reset(slot: Slot, value: jax.Array, new: jax.Array) -> jax.Array:
    if slot.kind == "param":
        return new.astype(value.dtype)
    return jnp.full(new.shape, 0.0 if slot.init is None else slot.init, value.dtype)


def _keep(slot: Slot, value: jax.Array, old: Any, new: jax.Array) -> jax.Array:
    if new.shape != jnp.shape(old):
        raise RuleError(
            f"{slot.name} cannot be kept: the edit changes the leaf's shape.",
            found=f"{list(jnp.shape(old))} -> {list(new.shape)}",
            write="opt_state='carry', 'transport' or 'reset'",
        )
    return value


def _call_rule(
    rule: Any, slot: Slot, path: str, value: jax.Array, old: Any, new: jax.Array, fire: Fire, position: int
) -> jax.Array:
    own = None
    if fire.key is not None:
        own = jax.random.fold_in(jax.random.fold_in(fire.key, fire.hashes[position]), zlib.crc32(slot.group.encode()))
    name = getattr(rule, "__qualname__", type(rule).__qualname__)
    try:
        result = rule(value, kind=slot.kind, path=path, old=jnp.asarray(old), new=new, key=own)
    except Exception as error:
        raise UserCodeError(
            f"The opt_state function {name} raised {type(error).__name__} on {slot.name}: {shorten(error)}",
            write="def fn(slot, *, kind, path, old, new, key): return slot",
        ) from error
    if not hasattr(result, "shape") or result.shape != new.shape:
        raise RuleError(
            f"The opt_state function {name} must return an array shaped like the new leaf for {slot.name}.",
            found=list(result.shape) if hasattr(result, "shape") else type(result).__name__,
            write=f"an array of shape {list(new.shape)}",
        )
    return result


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


def fire_for(unit: Unit, key: jax.Array | None, step: Any, inputs: dict[str, Any]) -> Fire:
    """The `Fire` of one unit."""
    return Fire(key, step, inputs, tuple(path_hash(path) for path in unit.paths))
