"""One fire of a hook on the host, and what is recorded of it: at once what the host knows, its figures some steps
later.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from flax_surgery_hooks import deriving, memory, optimizer_edits
from flax_surgery_hooks.committing import commit as commit_arrays
from flax_surgery_hooks.ledger import Ledger, Record
from flax_surgery_hooks.operate import needs_key, record_of, run, run_abstractly
from flax_surgery_hooks.operation import Operation, Unit, fire_for
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.placement import relabelled
from flax_surgery_hooks.planning import arrays_of, fire_memory, inputs_of_leaves, plan_units
from flax_surgery_hooks.processes import is_first
from flax_surgery_hooks.programs import Arrays, Programs
from flax_surgery_hooks.samples import sampled
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.settling import Fired, told
from flax_surgery_hooks.structure import Reshape, shapes
from flax_surgery_hooks.surgery import path_hash
from flax_surgery_hooks.train_state import Parts, take_apart

SHOWN = 100
"""How many missed steps a record lists."""


def foresee(operation: Operation, state: Any, name: str, key: Any, inputs: dict[str, Any], reshape: Reshape) -> Any:
    """The state after a fire, abstractly: raises whatever a fire on leaves of these shapes would."""
    if operation.edit.edit_optimizer is not None:
        return optimizer_edits.look_ahead(operation, state, key, inputs, reshape)
    parts = take_apart(state)
    at, remembered = jnp.int32(0), memory.held(state, name, operation)
    inputs = inputs_of_leaves(operation, parts, remembered, key, at, inputs, deriving.Abstractly.of_leaves)
    plan, arrays = _planned(operation, parts, remembered, key, inputs, reshape)
    reshape.check_paths(state, plan)
    outcome = run_abstractly(operation, plan, arrays, key, at, inputs)
    return reshape.replaced(commit_arrays(operation, state, parts, plan, outcome.arrays, outcome.ok, reshape.tx))


def _planned(
    operation: Operation, parts: Parts, remembered: Any, key: Any, inputs: dict[str, Any], reshape: Reshape
) -> tuple[list[Unit], list[Arrays]]:
    plan = plan_units(operation, parts, key, inputs, remembered, reshape.tx)
    return plan, [arrays_of(unit, parts, fire_memory(operation, unit, remembered)) for unit in plan]


def fire_key(operation: Operation, seed: int, name: str, step: int, count: int) -> jax.Array | None:
    """The key of a fire, or None if nothing in the operation draws.

    A `fold_in` of the seed's threefry key with the name's hash and the step; a further fire of the same hook at the
    same step folds in how often it has fired there.
    """
    if not needs_key(operation):
        return None
    return folded(seed, path_hash(name), step, count)


@functools.partial(jax.jit, static_argnums=(0, 3))
def folded(seed: int, name: Any, step: Any, count: int) -> jax.Array:
    """The key of a fire; `name` is the `path_hash` of the hook's."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), name), step)
    return jax.random.fold_in(key, count) if count else key


def prepare(
    programs: Programs, state: Any, name: str, key: Any, step: int, inputs: dict[str, Any], reshape: Reshape
) -> None:
    """Raises whatever a fire on this state would raise, and edits nothing."""
    if programs.operation.edit.edit_optimizer is not None:
        optimizer_edits.look_ahead(programs.operation, state, key, inputs, reshape)
        return
    operation, parts = programs.operation, take_apart(state)
    reshape.check(state)
    at, remembered = jnp.int32(step), memory.held(state, name, operation)
    inputs = relabelled(inputs_of_leaves(operation, parts, remembered, key, at, inputs, programs.derive.of_leaves))
    plan, arrays = _planned(operation, parts, remembered, key, inputs, reshape)
    reshape.check_paths(state, plan)
    for unit, one in zip(plan, arrays, strict=True):
        programs.prepare(unit, one, fire_for(unit, key, at, inputs), may_reshape=reshape.declared)


def fire(
    programs: Programs,
    state: Any,
    name: str,
    key: Any,
    step: int,
    inputs: dict[str, Any],
    reshape: Reshape,
    *,
    commit: bool,
    donate: str,
) -> tuple[Any, Fired]:
    """Fires one operation on a concrete state; without `commit` the state comes back as it was.

    Waits for nothing, unless shapes or paths change: then for the guard's verdict.
    """
    if programs.operation.edit.edit_optimizer is not None:
        return optimizer_edits.fire(programs.operation, state, key, step, inputs, commit=commit)
    operation, parts = programs.operation, take_apart(state)
    at, remembered = jnp.int32(step), memory.held(state, name, operation)
    inputs = relabelled(inputs_of_leaves(operation, parts, remembered, key, at, inputs, programs.derive.of_leaves))
    plan, arrays = _planned(operation, parts, remembered, key, inputs, reshape)
    fires = [fire_for(unit, key, at, inputs) for unit in plan]
    held = state.params
    layers = {path: layer for unit in plan for path, _, layer in unit.pieces if layer is not None}
    paths = [path for unit in plan for path in unit.paths]
    samples = sampled("before", held, paths, layers) if operation.histograms else {}
    outcome = run(
        programs, plan, arrays, fires, may_reshape=reshape.declared, commit=commit, donate=donate, state=state
    )
    if outcome.applied:
        state = commit_arrays(
            operation, state, parts, plan, outcome.arrays, outcome.ok, reshape.tx, donate=outcome.donated
        )
        if operation.edit.takes("memory"):
            state = memory.put(state, name, remembered_by(operation, plan, outcome.arrays))
    reshaped = shapes(state.params) != shapes(held)
    if reshaped:
        state = reshape.replaced(state)
    record = record_of(operation, plan, outcome)
    samples |= sampled("after", state.params, record.paths, layers) if operation.histograms else {}
    fired = Fired(record, {}, None, samples, outcome.ok, reshaped)
    return state, told(fired, outcome, operation.figures, operation.guard)


def remembered_by(operation: Operation, plan: Sequence[Unit], arrays: Sequence[Arrays]) -> Any:
    """What a surgery remembers after a fire."""
    by_path = {unit.paths[0]: new.memory for unit, new in zip(plan, arrays, strict=True)}
    return next(iter(by_path.values())) if operation.edit.many else by_path


def versions_json(seed: int) -> str:
    """Versions of what computes, and the seed, as JSON."""
    names = ("flax_surgery_hooks", "jax", "jaxlib", "flax", "optax", "clu")
    versions = {name: _version(name) for name in names}
    return json.dumps({"seed": seed, "versions": versions, "backend": jax.default_backend()})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        return "unknown"


def note_missed(ledger: Ledger, hook: str, when: Schedule, upto: int) -> None:
    """Records and logs due steps that lie before hooks were first called, or before the hook was added.

    They are taken as past and never fired late. A record lists the first of them.
    """
    planned = when.planned
    missed = () if planned is None else tuple(itertools.islice(planned.due_steps(-1, upto), SHOWN))
    if not missed:
        return
    ledger.write(Record(event="passed", step=upto + 1, hook=hook, passed=missed))
    if not is_first():
        return
    logging.warning(
        "Hook %s was due at %s, before the first call at step %d: taken as past.",
        hook,
        listed(map(str, missed)) + (" and further steps" if len(missed) == SHOWN else ""),
        upto + 1,
    )
