"""Compiled programs of a surgery on the host: one per leaf signature, with every leaf's own placement.

Leaves of one shape, dtype and placement share a program, so that a surgery of 200 equal leaves compiles once. A fire
is two
passes: the first measures and decides, the second edits, so that the guard never keeps a second copy of the state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.calling import check_memory
from flax_surgery_hooks.errors import StructureError, SurgeryError
from flax_surgery_hooks.metrics import Change, FireFigures, combine, table_of
from flax_surgery_hooks.operation import Fire, Operation, Unit, follows, like
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.perform import Edited, examine, perform
from flax_surgery_hooks.placement import as_before, auto_axes, beside, like_neighbours, out_sharding, relabelled

ANY_LEAF = "<leaf>"
"""Stands for the path of a leaf in programs that serve many."""


class Changes(NamedTuple):
    """The figures of a unit.

    Attributes:
      params: of each leaf after the edit, then of each that it removed.
      slots: of all their slots.
      memory: of what the surgery remembers.
    """

    params: tuple[Change, ...]
    slots: Change
    memory: Change


class Measured(NamedTuple):
    """The first pass over a unit."""

    changes: Changes
    seeds: tuple[jax.Array, ...]


class Arrays(NamedTuple):
    """The values of a unit's leaves, of their slots, and of what the surgery remembers of them."""

    params: tuple[Any, ...]
    slots: tuple[Any, ...]
    memory: Any = ()


class Programs:
    """The compiled programs of one operation.

    Attributes:
      operation: the surgery and its rules.
      compiled: signature -> the two jitted passes; each holds one executable per shape, dtype and placement.
    """

    def __init__(self, operation: Operation):
        self.operation = operation
        self.compiled: dict[Hashable, tuple[Any, Any]] = {}
        self._examined: dict[Hashable, bool] = {}
        self._shapes: dict[Hashable, Arrays] = {}
        self._reshapes = False

    def prepare(self, unit: Unit, arrays: Arrays, fire: Fire, *, may_reshape: bool) -> bool:
        """Finds everything that can be wrong with editing a unit, once per signature; runs no edit.

        Args:
          unit: the leaves.
          arrays: their concrete values.
          fire: key, step and inputs.
          may_reshape: whether leaves may change shape.

        Returns:
          Whether slots stay in place because the edit mixes.

        Raises:
          SurgeryError: whatever `operation.perform` and `operation.examine` raise, with the leaf's own path.
        """
        signature = (*self._signature(unit), shapes_of(arrays), shapes_of(fire.inputs))
        if signature not in self._examined:
            common = self._common(unit)
            with _own_path(unit):
                placed = relabelled(arrays)
                in_place = False
                if follows(self.operation, common):
                    in_place = examine(self.operation, common, placed.params, fire._replace(memory=placed.memory))
                edited = jax.eval_shape(functools.partial(self._edit, common, in_place), placed, fire)
                reshapes = self._check_shapes(common, arrays, edited, may_reshape)
            self._reshapes |= reshapes
            self._examined[signature] = in_place
            self._shapes[signature] = Arrays(edited.params, edited.slots, edited.memory)
        return self._examined[signature]

    @property
    def reshapes(self) -> bool:
        """Whether any unit prepared so far changes the shape or the path of a leaf."""
        return self._reshapes

    def measure(self, unit: Unit, arrays: Arrays, fire: Fire, in_place: bool) -> Measured:
        """The first pass: figures and seeds, nothing edited."""
        with _own_path(unit):
            return self._passes(unit, arrays, fire, in_place)[0](relabelled(arrays), fire)

    def edit(
        self, unit: Unit, arrays: Arrays, fire: Fire, in_place: bool, seeds: Sequence[jax.Array] | None, ok: Any
    ) -> Arrays:
        """The second pass: the new values, or the old ones where `ok` is False; each placed as it was.

        Args:
          unit: the leaves.
          arrays: their values.
          fire: as in the first pass.
          in_place: what `prepare` returned.
          seeds: from the first pass, or None to compute them here.
          ok: a boolean scalar, or None to apply the edit in any case.
        """
        with _own_path(unit):
            new = self._passes(unit, arrays, fire, in_place)[1](relabelled(arrays), fire, seeds, ok)
        params, slots = _placed(unit, arrays, new)
        return Arrays(params, slots, jax.tree.map(as_before, arrays.memory, new.memory))

    def shapes_after(self, unit: Unit, arrays: Arrays, fire: Fire) -> Arrays:
        """The shapes of what `edit` would return, of a unit that was prepared."""
        return self._shapes[(*self._signature(unit), shapes_of(arrays), shapes_of(fire.inputs))]

    def _signature(self, unit: Unit) -> tuple[Hashable, ...]:
        return (self._common(unit), self.operation.static)

    def _common(self, unit: Unit) -> Unit:
        """The unit that stands for all of its signature; itself where the path matters to the surgery."""
        edit = self.operation.edit
        rules = [self.operation.rules.rule(slot.kind) for slot in unit.slots]
        if edit.many or edit.takes("path") or any(map(callable, rules)):
            return unit
        slots = tuple(dataclasses.replace(slot, index=i, owner=0) for i, slot in enumerate(unit.slots))
        return Unit((ANY_LEAF,), (0,), slots)

    def _passes(self, unit: Unit, arrays: Arrays, fire: Fire, in_place: bool) -> tuple[Any, Any]:
        common = self._common(unit)
        placements = _placements(unit, arrays, self.shapes_after(unit, arrays, fire))
        signature = (common, self.operation.static, in_place, placements, jax.tree.structure(arrays.memory))
        if signature not in self.compiled:
            first = jax.jit(functools.partial(self._measure, common, in_place))
            memory = jax.tree.unflatten(jax.tree.structure(arrays.memory), placements[2])
            second = jax.jit(
                functools.partial(self._guarded, common, in_place),
                out_shardings=Arrays(placements[0], placements[1], memory),
            )
            self.compiled[signature] = first, second
        return self.compiled[signature]

    def _edit(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire, seeds: Any = None) -> Edited:
        fire = fire._replace(memory=arrays.memory)
        return perform(self.operation, unit, arrays.params, arrays.slots, fire, in_place=in_place, seeds=seeds)

    def _measure(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire) -> Measured:
        edited = self._edit(unit, in_place, arrays, fire)
        return Measured(changes_of(edited), edited.seeds)

    def _guarded(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire, seeds: Any, ok: Any) -> Arrays:
        edited = self._edit(unit, in_place, arrays, fire, seeds)
        new = Arrays(edited.params, edited.slots, edited.memory)
        return new if ok is None else choose(ok, new, arrays)

    def _check_shapes(self, unit: Unit, arrays: Arrays, edited: Edited, may_reshape: bool) -> bool:
        """Whether the edit changes shapes or paths; raises if it does and may not."""
        write = "apply_fn= for the new shapes, and on_reshape= for what the trainer has to rebuild"
        name = self.operation.edit.name
        if unit.other is not None:
            if not may_reshape:
                raise StructureError(
                    f"The surgery {name} adds or removes leaves, and the hook brings nothing for that.",
                    found=_difference(unit),
                    write=write,
                )
            return True
        changed = [
            (path, np.shape(old), new.shape)
            for path, old, new in zip(unit.paths, arrays.params, edited.params, strict=True)
            if np.shape(old) != new.shape
        ]
        if changed and not may_reshape:
            path, old, new = changed[0]
            raise StructureError(
                f"The surgery {name} changes the shape of a leaf, and the hook brings nothing for that.",
                path=path,
                found=f"{list(old)} -> {list(new)}",
                write=write,
            )
        if not changed:
            check_memory(name, arrays.memory, edited.memory)
        return bool(changed)


def _difference(unit: Unit) -> str:
    new = [path for path in unit.after.paths if path not in unit.paths]
    gone = [path for path in unit.paths if path not in unit.after.paths]
    return "; ".join(f"{what} {listed(paths)}" for what, paths in (("adds", new), ("removes", gone)) if paths)


def changes_of(edited: Edited) -> Changes:
    """The figures of an edited unit."""
    return Changes(edited.params_change, edited.slots_change, edited.memory_change)


def _placements(unit: Unit, arrays: Arrays, edited: Arrays) -> tuple[tuple[Any, ...], ...]:
    """What `jit` is told of where new leaves, slots and memory go."""
    old = dict(zip(unit.paths, arrays.params, strict=True))
    others = auto_axes(beside(arrays.params)) if unit.other is not None else None

    def place(before: Any, after: Any) -> Any:
        return others if before is None else out_sharding(before, after.shape)

    params = map(place, [old.get(path) for path in unit.after.paths], edited.params)
    held = [None if i is None else arrays.slots[i] for i in unit.origins()]
    memory = map(place, jax.tree.leaves(arrays.memory), jax.tree.leaves(edited.memory))
    return tuple(params), tuple(map(place, held, edited.slots)), tuple(memory)


def _placed(unit: Unit, arrays: Arrays, new: Arrays) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """New leaves and slots under the shardings of the old ones."""
    old = dict(zip(unit.paths, arrays.params, strict=True))

    def place(before: Any, after: Any) -> Any:
        return like_neighbours(arrays.params, after) if before is None else as_before(before, after)

    held = [None if i is None else arrays.slots[i] for i in unit.origins()]
    return (
        tuple(map(place, [old.get(path) for path in unit.after.paths], new.params)),
        tuple(map(place, held, new.slots)),
    )


def choose(ok: Any, new: Arrays, old: Arrays) -> Arrays:
    """`new` where `ok`, else `old`; leaves whose shape changed are new in any case (an unguarded edit)."""

    def one(after: jax.Array, before: Any) -> jax.Array:
        if after.shape != np.shape(before):
            return after
        return like(jnp.where(ok, after, before), before)

    return Arrays(*jax.tree.map(one, tuple(new), tuple(old)))


def is_fine(changes: Sequence[Changes]) -> jax.Array:
    """Whether a fire makes no value non-finite that was finite."""
    return combine(change for unit in changes for change in (*unit.params, *unit[1:])).nonfinite_new == 0


class Verdict(NamedTuple):
    """What the first pass over all units of a fire says.

    Attributes:
      ok: `is_fine`.
      figures: `FireFigures.compute_flat`.
      leaves: `metrics.table_of` all leaves.
    """

    ok: Any
    figures: dict[str, Any]
    leaves: Any


def judge(changes: Sequence[Changes]) -> Verdict:
    """Verdict and figures of a fire; traced or concrete."""
    pairs = [(combine(unit.params), unit.slots) for unit in changes]
    leaves = table_of([change for unit in changes for change in unit.params])
    return Verdict(is_fine(changes), FireFigures.of(pairs).compute_flat(), leaves)


_judge_jitted = jax.jit(judge)


def verdict(measured: Sequence[Measured]) -> Verdict:
    """`judge` of all units of a fire, on their device; read by the host if they live on different ones."""
    changes = [one.changes for one in measured]
    devices = {frozenset(leaf.devices()) for leaf in jax.tree.leaves(changes)}
    if len(devices) > 1:
        return jax.device_get(judge(jax.device_get(changes)))
    return _judge_jitted(changes)


@contextlib.contextmanager
def _own_path(unit: Unit) -> Iterator[None]:
    try:
        yield
    except SurgeryError as error:
        if error.path == ANY_LEAF or (error.path is None and len(unit.paths) == 1):
            error.path = unit.paths[0]
        raise


def shapes_of(tree: Any) -> Hashable:
    """Structure, shapes and dtypes of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((np.shape(leaf), str(_dtype(leaf))) for leaf in leaves)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
