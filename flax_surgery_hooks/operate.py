"""One surgery on one train state, without hooks: for a notebook, a script, a test, or inside a jitted function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks import checks, deriving, donation, guards, optimizer_edits, rules
from flax_surgery_hooks import optax_slots as optax_slots  # registers optax's states
from flax_surgery_hooks.committing import commit
from flax_surgery_hooks.errors import InputError, RefusedError, StateError
from flax_surgery_hooks.guards import Guard
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.making import bind_inputs, make_operation
from flax_surgery_hooks.memory import first_memory
from flax_surgery_hooks.mirrors import Mirrors, checked, original, view
from flax_surgery_hooks.operation import Fire, Operation, Unit, fire_for, follows
from flax_surgery_hooks.perform import examine, perform
from flax_surgery_hooks.placement import off_mesh, relabelled
from flax_surgery_hooks.planning import arrays_of, fire_memory, inputs_of_leaves, inputs_of_state, plan_units
from flax_surgery_hooks.programs import Arrays, Measured, Programs, choose
from flax_surgery_hooks.relaid import restarted
from flax_surgery_hooks.selection import Patterns
from flax_surgery_hooks.surgery import Edit, describe
from flax_surgery_hooks.train_state import take_apart
from flax_surgery_hooks.verdicts import judge, named, rows_of, verdict


def operate(
    state: Any,
    surgery: Any,
    *,
    params: Patterns = "**",
    exclude: Patterns | None = None,
    expect: int | None = None,
    opt_state: rules.OptStateRule = None,
    fresh: str = "mean",
    guard: Guard = "finite",
    key: jax.Array | None = None,
    step: Any = None,
    inputs: Mapping[str, Any] | None = None,
    mirrors: Mapping[str, str] | None = None,
    fields: Sequence[str] = (),
) -> tuple[Any, Record]:
    """Applies one surgery to a train state and its optimizer state. Pure: the given state is not touched.

    Works on concrete states, on abstract ones (`jax.ShapeDtypeStruct` leaves) and under `jax.jit`. Shapes may change;
    what depends on them (`apply_fn`, other state) is the caller's.

    Args:
      state: any object with `params`, `opt_state`, `tx` and `replace`.
      surgery: a function of one leaf or of the dict `leaves`, or a surgery object; see `Surgery`.
      params: which leaves: a glob on `/`-joined paths, `re:...`, a predicate of (path, leaf), or a list of these.
      exclude: leaves to leave out, likewise.
      expect: how many leaves must be selected.
      opt_state: how slots follow: "transport", "carry", "keep", "reset", a function, or a mapping by kind of slot.
      fresh: what second moments of elements without history start from: "mean" of the survivors, or "init".
      guard: "finite": a result with new non-finite values is not applied; "off"; or, in addition to "finite", a
        function of figures, see `guards`. On a traced state an edit that changes shapes or paths is not guarded.
      key: PRNG key, if the surgery draws.
      step: what the surgery sees as `step`; by default `state.step`.
      inputs: further inputs by name.
      mirrors: fields of the state that hold trees like the parameters, see `SurgeryHooks`.
      fields: fields of the state, such as `batch_stats`, whose leaves can be selected too, as `batch_stats/...`.

    Returns:
      The new state, and the record with its figures (traced or abstract where the state is).

    Raises:
      SurgeryError: see `flax_surgery_hooks.errors`; the state keeps all its values.
      RefusedError: the guard did not let the result through (concrete states only; under jit the old values stay).

    >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.adam(0.1))
    >>> state, record = operate(state, lambda w: w / 2, params="w")
    >>> state.params["w"].tolist(), float(record.figures["params/relative_change"])
    ([0.5, 0.5, 0.5], 0.5)
    """
    take_apart(state)
    operation = make_operation(
        surgery, params=params, exclude=exclude, expect=expect, opt_state=opt_state, fresh=fresh, guard=guard,
        fields=fields,
    )  # fmt: skip
    operation, arrays = bind_inputs(operation, inputs or {})
    if key is None and "key" in operation.edit.needs:
        raise InputError(f"The surgery {operation.edit.name} draws random numbers.", write="key=jax.random.key(0)")
    step = getattr(state, "step", None) if step is None else step
    step = 0 if step is None else step  # a state may have none
    arrays = inputs_of_state(operation, state, key, step, arrays, _derive(operation, state).of_state)
    with off_mesh(state):
        return _operate(state, operation, key, step, arrays, Mirrors(checked(mirrors)))


def _operate(
    state: Any, operation: Operation, key: Any, step: Any, inputs: dict[str, Any], mirrors: Mirrors
) -> tuple[Any, Record]:
    start = time.perf_counter()
    if operation.edit.takes("memory") and not operation.edit.starts_anew:
        raise StateError(
            f"The surgery {operation.edit.name} remembers; `operate` has no place for that between two calls.",
            write="hooks.add(...), hooks.init(state), and hooks.fire(name, state)",
        )
    if operation.edit.edit_optimizer is not None:
        ran = optimizer_edits.run(operation, state, key, step, inputs)
        return ran.state, dataclasses.replace(ran.record, event="settled", seconds=time.perf_counter() - start)
    state = view(state, mirrors, operation.fields)
    parts = take_apart(state)
    remembered = first_memory(operation, parts, key) if operation.edit.takes("memory") else ()
    run_leaves = _derive(operation, state).of_leaves
    inputs = inputs_of_leaves(operation, parts, remembered, key, step, inputs, run_leaves)
    plan = plan_units(operation, parts, key, inputs, remembered)
    arrays = [arrays_of(unit, parts, fire_memory(operation, unit, remembered)) for unit in plan]
    given = (arrays, key, step, inputs)
    if checks.concrete(given):
        inputs = relabelled(inputs)
        fires = [fire_for(unit, key, jnp.asarray(step, jnp.int32), inputs) for unit in plan]
        outcome = run(_programs(operation), plan, arrays, fires, may_reshape=True)
        if outcome.ok is not None and not bool(outcome.finite):
            raise RefusedError(
                f"The surgery {operation.edit.name} made values that are not finite; the state is as it was.",
                found=f"{_nonfinite(outcome):.0f} non-finite values",
                write="an edit that is finite on these leaves, or guard='off'",
            )
        if outcome.ok is not None and not bool(outcome.ok):
            raise RefusedError(
                f"The surgery {operation.edit.name} was refused by its guard {guards.told(operation.guard)}; the state "
                "is as it was.",
                found=guards.shown(operation.bound, outcome.figures),
                write="an edit that this guard lets through, or another guard=",
            )
    elif any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(given)):
        outcome = run_abstractly(operation, plan, *given)
    else:
        outcome = _run_traced(operation, plan, *given)
    return original(commit(operation, state, parts, plan, outcome.arrays, outcome.ok)), record_of(
        operation,
        plan,
        outcome,
        event="settled",
        seconds=time.perf_counter() - start,
        figures=outcome.figures,
        per_leaf=outcome.leaves,
    )


def _derive(operation: Operation, state: Any) -> Any:
    """How the surgery's `derived` are computed for such a state: compiled, traced or abstractly."""
    leaves = jax.tree.leaves((state.params, state.opt_state))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return deriving.Abstractly
    return _programs(operation).derive if checks.concrete(leaves) else deriving.Traced({})


class Outcome(NamedTuple):
    """What a fire did to its units.

    Attributes:
      arrays: the new values per unit; only their shapes if the edit was not applied.
      figures: see `FireFigures.compute_flat`; on the device, empty if not measured.
      leaves: see `Record.per_leaf`; on the device, None if not measured.
      ok: whether the guard let it through, or None without guard.
      in_place: per unit, 1 where slots stayed in place because the edit mixes.
      finite: whether it made no value non-finite, or None without guard.
      applied: whether the arrays are to be put into the state.
      donated: whether the old values are gone.
    """

    arrays: list[Arrays]
    figures: dict[str, Any]
    leaves: Any
    ok: Any
    in_place: tuple[bool, ...]
    finite: Any = None
    applied: bool = True
    donated: bool = False


def needs_key(operation: Operation) -> bool:
    """Whether anything in an operation takes a key."""
    functions = [operation.rules.default, *(rule for _, rule in operation.rules.by_kind)]
    return operation.edit.takes("key") or "key" in operation.edit.fold_wants or any(map(callable, functions))


def run(
    programs: Programs,
    plan: Sequence[Unit],
    arrays: Sequence[Arrays],
    fires: Sequence[Fire],
    *,
    may_reshape: bool,
    commit: bool = True,
    donate: str = "never",
    state: Any = None,
) -> Outcome:
    """Runs an operation on concrete values by its compiled programs. Waits for nothing.

    Args:
      programs: the operation's.
      plan: its units.
      arrays: their values.
      fires: their inputs.
      may_reshape: whether leaves may change shape.
      commit: False measures only.
      donate: whether the edit may take the memory of the old values, see `SurgeryHooks`.
      state: all leaves beside which they stand, if it may.
    """
    ready = [
        programs.ready(unit, one, fire, may_reshape=may_reshape)
        for unit, one, fire in zip(plan, arrays, fires, strict=True)
    ]
    operation = programs.operation
    measured: list[Measured] = []
    ok: Any = None
    figures: dict[str, Any] = {}
    leaves = finite = None
    if operation.figures or operation.guard != "off":
        measured = [programs.measure(*each) for each in zip(ready, fires, strict=True)]
        ok, finite, figures, leaves = verdict([one.changes for one in measured], operation.bound)
        ok = ok if operation.guard != "off" else None
        figures = {**figures, **named(operation, plan, [one.figures for one in measured])}
    chosen, donated = ok, False
    if ok is not None and programs.reshapes and commit:
        commit, chosen = bool(ok), None  # old and new values have no common shape to choose between: wait for it
    if not commit:
        new = [one.passes.after for one in ready]
    else:
        seeds = [one.seeds for one in measured] if measured else [None] * len(plan)
        given = [(fire, seed, chosen) for fire, seed in zip(fires, seeds, strict=True)]
        donated = not programs.reshapes and donation.wanted(donate, ready, given)
        if donated:
            ready = donation.unaliased(ready, state)
        new = [programs.edit(one, *rest, donate=donated) for one, rest in zip(ready, given, strict=True)]
    in_place = tuple(one.passes.in_place for one in ready)
    return Outcome(new, figures, leaves, ok, in_place, finite, applied=commit, donated=donated)


def _run_traced(
    operation: Operation, plan: Sequence[Unit], arrays: Sequence[Arrays], key: Any, step: Any, inputs: dict[str, Any]
) -> Outcome:
    """`run` inside a trace: one graph, whose rules are chosen on random values of the same shapes."""
    step = jnp.asarray(step, jnp.int32)
    fires = [fire_for(unit, key, step, inputs, one.memory) for unit, one in zip(plan, arrays, strict=True)]
    in_place = tuple(map(functools.partial(examine_abstractly, operation), plan, arrays, fires))
    edited = [
        perform(operation, unit, one.params, one.slots, fire, in_place=stays)
        for unit, one, fire, stays in zip(plan, arrays, fires, in_place, strict=True)
    ]
    new = [Arrays(each.params, each.slots, each.memory) for each in edited]
    ok, finite, figures, leaves = judge([rows_of(each) for each in edited], operation.bound)
    figures = {**figures, **named(operation, plan, [each.figures for each in edited])}
    if operation.guard == "off" or any(unit.other is not None for unit in plan):
        ok = None  # old and new leaves at other paths have nothing to choose between
    else:
        new = [choose(ok, after, before) for after, before in zip(new, arrays, strict=True)]
    return Outcome(new, figures, leaves, ok, in_place, finite)


def run_abstractly(operation: Operation, plan: Sequence[Unit], *given: Any) -> Outcome:
    """`_run_traced` by `jax.eval_shape`, which would make an abstract array of `in_place` too."""
    in_place: list[tuple[bool, ...]] = []

    def arrays_only(*given: Any) -> Outcome:
        outcome = _run_traced(operation, plan, *given)
        in_place.append(outcome.in_place)
        return outcome._replace(in_place=())

    return jax.eval_shape(arrays_only, *given)._replace(in_place=in_place[0])


def examine_abstractly(operation: Operation, unit: Unit, arrays: Arrays, fire: Fire) -> bool:
    """`examine` on random values in the place of traced or abstract ones; False where no slot follows the edit."""
    if not follows(operation, unit):
        return False
    with jax.ensure_compile_time_eval():
        params = tuple(_stand_in(place, leaf) for place, leaf in enumerate(arrays.params))
        key = None if fire.key is None else jax.random.key(0)
        inputs = jax.tree.map(functools.partial(_stand_in, 1_000), fire.inputs)
        memory = jax.tree.map(functools.partial(_stand_in, 2_000), fire.memory)
        if operation.edit.fold_back is not None:  # it is judged by what is made of the leaves, which has to fit them
            given = {**inputs, "key": key, "step": jnp.int32(1)}
            leaves = dict(zip(unit.paths, params, strict=True))
            again = deriving.again_from_leaves(operation, leaves, memory, given)
            inputs = {name: again[name] for name in inputs}
        return examine(operation, unit, params, Fire(key, jnp.int32(1), inputs, fire.hashes, memory))


def _stand_in(seed: int, leaf: Any) -> Any:
    """Random values for a traced or abstract leaf; concrete ones are used as they are."""
    if not isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(seed), leaf.shape) if leaf.shape else jax.random.key(seed)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.ones(leaf.shape, leaf.dtype)
    return jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)


def _nonfinite(outcome: Outcome) -> float:
    return float(outcome.figures["params/nonfinite"]) + float(outcome.figures["slots/nonfinite"])


def record_of(operation: Operation, plan: Sequence[Unit], outcome: Outcome, **fields: Any) -> Record:
    """The record of a fire."""
    leaves = [leaf for new in outcome.arrays for leaf in new.params]
    shapes = [
        {path: tuple(leaf.shape) for path, leaf in zip(unit.after.paths, new.params, strict=True)}
        for unit, new in zip(plan, outcome.arrays, strict=True)
    ]
    mixed = tuple(path for unit, stays in zip(plan, outcome.in_place, strict=True) if stays for path in unit.paths)
    return Record(
        surgery=describe_json(operation.edit),
        rule=operation.rules.describe(),
        paths=tuple(path for unit in plan for path in unit.after.paths),
        added=tuple(path for unit in plan for path in unit.added),
        removed=tuple(path for unit in plan for path in unit.removed),
        leaves=tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves),
        in_place=mixed,
        restarted=tuple(
            name for unit, one in zip(plan, shapes, strict=True) for name in restarted(operation, unit, one)
        ),
        donated=outcome.donated,
        **fields,
    )


def describe_json(edit: Edit) -> str:
    """Name and fields of a surgery, as JSON."""
    return json.dumps(describe(edit.function))


@functools.lru_cache(maxsize=64)
def _cached_programs(operation: Operation) -> Programs:
    return Programs(operation)


def _programs(operation: Operation) -> Programs:
    with contextlib.suppress(TypeError):  # a surgery with unhashable fields is compiled anew
        return _cached_programs(operation)
    return Programs(operation)
