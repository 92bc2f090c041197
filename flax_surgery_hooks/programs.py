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
from jax.sharding import AxisType, Mesh, NamedSharding

from flax_surgery_hooks.errors import StructureError, SurgeryError
from flax_surgery_hooks.metrics import Change, FireFigures, combine
from flax_surgery_hooks.operation import Fire, Operation, Unit, follows, like
from flax_surgery_hooks.perform import Edited, examine, perform

ANY_LEAF = "<leaf>"
"""Stands for the path of a leaf in programs that serve many."""


class Measured(NamedTuple):
    """The first pass over a unit."""

    params_change: Change
    slots_change: Change
    seeds: tuple[jax.Array, ...]


class Arrays(NamedTuple):
    """The values of a unit's leaves and of their slots."""

    params: tuple[Any, ...]
    slots: tuple[Any, ...]


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
        self._shapes: dict[Hashable, Any] = {}
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
        signature = (*self._signature(unit), _shapes_of(arrays), _shapes_of(fire.inputs))
        if signature not in self._examined:
            common = self._common(unit)
            with _own_path(unit):
                placed = _relabelled(arrays)
                in_place = False
                if follows(self.operation, common):
                    in_place = examine(self.operation, common, placed.params, fire)
                edited = jax.eval_shape(functools.partial(self._edit, common, in_place), placed, fire)
                if not may_reshape:
                    self._check_shapes(common, arrays, edited)
            self._reshapes |= any(np.shape(a) != b.shape for a, b in zip(arrays.params, edited.params, strict=True))
            self._examined[signature] = in_place
            self._shapes[signature] = [leaf.shape for leaf in (*edited.params, *edited.slots)]
        return self._examined[signature]

    @property
    def reshapes(self) -> bool:
        """Whether any unit prepared so far changes the shape of a leaf."""
        return self._reshapes

    def measure(self, unit: Unit, arrays: Arrays, fire: Fire, in_place: bool) -> Measured:
        """The first pass: figures and seeds, nothing edited."""
        with _own_path(unit):
            return self._passes(unit, arrays, fire, in_place)[0](_relabelled(arrays), fire)

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
            new = self._passes(unit, arrays, fire, in_place)[1](_relabelled(arrays), fire, seeds, ok)
        return jax.tree.map(_as_before, arrays, new, is_leaf=lambda x: x is None)

    def _signature(self, unit: Unit) -> tuple[Hashable, ...]:
        return (self._common(unit), self.operation.static)

    def _common(self, unit: Unit) -> Unit:
        """The unit that stands for all of its signature; itself where the path matters to the surgery."""
        rules = [self.operation.rules.rule(slot.kind) for slot in unit.slots]
        if len(unit.paths) > 1 or self.operation.edit.takes("path") or any(map(callable, rules)):
            return unit
        if self.operation.edit.many:
            return unit
        slots = tuple(dataclasses.replace(slot, index=i, owner=0) for i, slot in enumerate(unit.slots))
        return Unit((ANY_LEAF,), (0,), slots)

    def _passes(self, unit: Unit, arrays: Arrays, fire: Fire, in_place: bool) -> tuple[Any, Any]:
        common = self._common(unit)
        shapes = self._shapes[(*self._signature(unit), _shapes_of(arrays), _shapes_of(fire.inputs))]
        placements = _out_shardings(arrays, shapes)
        signature = (common, self.operation.static, in_place, placements)
        if signature not in self.compiled:
            first = jax.jit(functools.partial(self._measure, common, in_place))
            count = len(arrays.params)
            second = jax.jit(
                functools.partial(self._guarded, common, in_place),
                out_shardings=Arrays(placements[:count], placements[count:]),
            )
            self.compiled[signature] = first, second
        return self.compiled[signature]

    def _edit(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire, seeds: Any = None) -> Edited:
        return perform(self.operation, unit, arrays.params, arrays.slots, fire, in_place=in_place, seeds=seeds)

    def _measure(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire) -> Measured:
        edited = self._edit(unit, in_place, arrays, fire)
        return Measured(edited.params_change, edited.slots_change, edited.seeds)

    def _guarded(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire, seeds: Any, ok: Any) -> Arrays:
        edited = self._edit(unit, in_place, arrays, fire, seeds)
        new = Arrays(edited.params, edited.slots)
        return new if ok is None else choose(ok, new, arrays)

    def _check_shapes(self, unit: Unit, arrays: Arrays, edited: Edited) -> None:
        for path, old, new in zip(unit.paths, arrays.params, edited.params, strict=True):
            if np.shape(old) != new.shape:
                raise StructureError(
                    f"The surgery {self.operation.edit.name} changes the shape of a leaf, and the hook brings nothing "
                    "for that.",
                    path=path,
                    found=f"{list(np.shape(old))} -> {list(new.shape)}",
                    write="apply_fn= for the new shapes, and on_reshape= for what the trainer has to rebuild",
                )


def choose(ok: Any, new: Arrays, old: Arrays) -> Arrays:
    """`new` where `ok`, else `old`; leaves whose shape changed are new in any case (an unguarded edit)."""

    def one(after: jax.Array, before: Any) -> jax.Array:
        if after.shape != np.shape(before):
            return after
        return like(jnp.where(ok, after, before), before)

    return Arrays(*jax.tree.map(one, tuple(new), tuple(old)))


def is_fine(changes: Sequence[tuple[Change, Change]]) -> jax.Array:
    """Whether a fire makes no value non-finite that was finite."""
    return combine(change for pair in changes for change in pair).nonfinite_new == 0


class Verdict(NamedTuple):
    """What the first pass over all units of a fire says.

    Attributes:
      ok: `is_fine`.
      figures: `FireFigures.compute_flat`.
    """

    ok: Any
    figures: dict[str, Any]


def judge(changes: Sequence[tuple[Change, Change]]) -> Verdict:
    """Verdict and figures of a fire; traced or concrete."""
    return Verdict(is_fine(changes), FireFigures.of(changes).compute_flat())


_judge_jitted = jax.jit(judge)


def verdict(measured: Sequence[Measured]) -> Verdict:
    """`judge` of all units of a fire, on their device; read by the host if they live on different ones."""
    changes = [(one.params_change, one.slots_change) for one in measured]
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


def _shapes_of(tree: Any) -> Hashable:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((np.shape(leaf), str(_dtype(leaf))) for leaf in leaves)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


# Placement. Sort, gather and scatter raise on Explicit mesh axes, so edits run on the same devices under Auto ones.


def _relabelled(arrays: Arrays) -> Arrays:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, s) if (s := _auto(leaf)) is not None else leaf, arrays)


def _auto(leaf: Any) -> NamedSharding | None:
    """The leaf's sharding on an all-Auto mesh of the same devices, or None if it needs no other."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or all(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return None
    mesh = sharding.mesh
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(auto, sharding.spec, memory_kind=sharding.memory_kind)


def _out_shardings(arrays: Arrays, shapes: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
    """What `jit` is told: the leaf's own sharding if it is committed; never for others, which it would commit."""
    placements: list[Any] = []
    for leaf, shape in zip((*arrays.params, *arrays.slots), shapes, strict=True):
        if not isinstance(leaf, jax.Array) or not leaf.committed:
            placements.append(None)
            continue
        sharding = _auto(leaf) or leaf.sharding
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise StructureError(
                "The new shape does not divide over the leaf's mesh.",
                found=f"shape {list(shape)} under {sharding}",
                write="a size that the mesh axes divide",
            ) from error
        placements.append(sharding)
    return tuple(placements)


def _as_before(old: Any, new: Any) -> Any:
    """`new` under the very sharding object of `old` (the passes run under Auto axes)."""
    if isinstance(old, jax.Array) and _auto(old) is not None:
        return jax.device_put(new, old.sharding)
    return new
