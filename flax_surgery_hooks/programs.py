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
from flax_surgery_hooks.passes import Passes
from flax_surgery_hooks.perform import Edited, examine, perform

ANY_LEAF = "<leaf>"
"""Stands for the path of a leaf in programs that serve many."""


class Measured(NamedTuple):
    """The first pass over a unit.

    Attributes:
      changes: the `Change` of its leaves and of its slots as two rows of one array, as each array costs to handle.
      seeds: see `Edited.seeds`.
    """

    changes: jax.Array
    seeds: tuple[jax.Array, ...]


class Arrays(NamedTuple):
    """The values of a unit's leaves and of their slots."""

    params: tuple[Any, ...]
    slots: tuple[Any, ...]


class Signature(NamedTuple):
    """What is known of all units of one signature.

    Attributes:
      common: the unit that stands for them.
      in_place: whether slots stay in place because the edit mixes.
      shapes: of leaves and slots after the edit.
    """

    common: Unit
    in_place: bool
    shapes: tuple[tuple[int, ...], ...]


class Ready(NamedTuple):
    """A unit that can be edited: looked up once per fire, so that many small leaves cost little but their programs.

    Attributes:
      unit: the leaves.
      arrays: their values.
      placed: these under Auto axes.
      passes: their programs.
    """

    unit: Unit
    arrays: Arrays
    placed: Arrays
    passes: Passes


class Programs:
    """The compiled programs of one operation.

    Attributes:
      operation: the surgery and its rules.
      compiled: signature, shapes and placement -> the two passes.
    """

    def __init__(self, operation: Operation):
        self.operation = operation
        self.compiled: dict[Hashable, Passes] = {}
        self._signatures: dict[Hashable, Signature] = {}
        self._common: dict[Hashable, Unit] = {}  # holds them, so that keys may use their `id`: hashing slots is slow
        self._reshapes = False
        rules = [operation.rules.default, *(rule for _, rule in operation.rules.by_kind)]
        self._by_path = operation.edit.many or operation.edit.takes("path") or any(map(callable, rules))

    def ready(self, unit: Unit, arrays: Arrays, fire: Fire, *, may_reshape: bool) -> Ready:
        """`prepare`, with the programs for these values; nothing is compiled yet."""
        common = self._stand_in(unit)
        placements = tuple([_placement(leaf) for leaf in (*arrays.params, *arrays.slots)])
        key = (id(common), _shapes_of(arrays), _shapes_of(fire.inputs), placements)
        placed, passes = _relabelled(arrays), self.compiled.get(key)
        if passes is None:
            with _own_path(unit):
                signature = self._examined(unit, arrays, fire, may_reshape)
                passes = self.compiled[key] = self._passes(signature, arrays, placed)
        return Ready(unit, arrays, placed, passes)

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
        return self._examined(unit, arrays, fire, may_reshape).in_place

    def _examined(self, unit: Unit, arrays: Arrays, fire: Fire, may_reshape: bool) -> Signature:
        common = self._stand_in(unit)
        key = (id(common), _shapes_of(arrays), _shapes_of(fire.inputs))
        if key in self._signatures:
            return self._signatures[key]
        with _own_path(unit):
            placed = _relabelled(arrays)
            in_place = False
            if follows(self.operation, common):
                in_place = examine(self.operation, common, placed.params, fire)
            edited = jax.eval_shape(functools.partial(self._edit, common, in_place), placed, fire)
            if not may_reshape:
                self._check_shapes(common, arrays, edited)
        self._reshapes |= any(np.shape(a) != b.shape for a, b in zip(arrays.params, edited.params, strict=True))
        shapes = tuple(leaf.shape for leaf in (*edited.params, *edited.slots))
        self._signatures[key] = Signature(common, in_place, shapes)
        return self._signatures[key]

    @property
    def reshapes(self) -> bool:
        """Whether any unit prepared so far changes the shape of a leaf."""
        return self._reshapes

    def measure(self, ready: Ready, fire: Fire) -> Measured:
        """The first pass: figures and seeds, nothing edited."""
        with _own_path(ready.unit):
            return ready.passes.measure(ready.placed, fire)

    def edit(self, ready: Ready, fire: Fire, seeds: Sequence[jax.Array] | None, ok: Any) -> Arrays:
        """The second pass: the new values, or the old ones where `ok` is False; each placed as it was.

        Args:
          ready: the unit.
          fire: as in the first pass.
          seeds: from the first pass, or None to compute them here.
          ok: a boolean scalar, or None to apply the edit in any case.
        """
        with _own_path(ready.unit):
            new = ready.passes.edit(ready.placed, fire, seeds, ok)
        if ready.placed is ready.arrays:
            return new
        return jax.tree.map(_as_before, ready.arrays, new, is_leaf=lambda x: x is None)

    def _stand_in(self, unit: Unit) -> Unit:
        """The unit that stands for all of its signature; itself where the path matters to the surgery."""
        key = unit if self._by_path else unit.slots
        common = self._common.get(key)
        if common is None:
            common = unit if self._by_path else _generic(unit)
            common = self._common[key] = self._common.setdefault(common, common)
        return common

    def _passes(self, signature: Signature, arrays: Arrays, placed: Arrays) -> Passes:
        placements = _out_shardings(arrays, signature.shapes)
        count = len(arrays.params)
        first = jax.jit(functools.partial(self._measure, signature.common, signature.in_place))
        second = jax.jit(
            functools.partial(self._guarded, signature.common, signature.in_place),
            out_shardings=Arrays(placements[:count], placements[count:]),
        )
        return Passes(first, second, placed, signature.in_place)

    def _edit(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire, seeds: Any = None) -> Edited:
        return perform(self.operation, unit, arrays.params, arrays.slots, fire, in_place=in_place, seeds=seeds)

    def _measure(self, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire) -> Measured:
        edited = self._edit(unit, in_place, arrays, fire)
        rows = [jnp.stack(jax.tree.leaves(change)) for change in (edited.params_change, edited.slots_change)]
        return Measured(jnp.stack(rows), edited.seeds)

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


def _generic(unit: Unit) -> Unit:
    slots = tuple(dataclasses.replace(slot, index=i, owner=0) for i, slot in enumerate(unit.slots))
    return Unit((ANY_LEAF,), (0,), slots)


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


def verdict(measured: Sequence[Measured]) -> Verdict:
    """`judge` of all units of a fire, on their device; read by the host if they live on different ones."""
    changes = [one.changes for one in measured]
    if len({frozenset(change.devices()) for change in changes}) > 1:
        return jax.device_get(_judge_rows(jax.device_get(changes)))
    return _judge_rows_jitted(changes)


def _judge_rows(changes: Sequence[jax.Array]) -> Verdict:
    return judge([(Change(*rows[0]), Change(*rows[1])) for rows in changes])


_judge_rows_jitted = jax.jit(_judge_rows)


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
    return treedef, tuple([_shape_of(leaf) for leaf in leaves])


def _shape_of(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype
    return np.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


# Placement. Sort, gather and scatter raise on Explicit mesh axes, so edits run on the same devices under Auto ones.


def _placement(leaf: Any) -> Hashable:
    """What decides, beside the shapes, which program serves a leaf."""
    return (leaf.sharding, leaf.committed) if isinstance(leaf, jax.Array) else None


def _relabelled(arrays: Arrays) -> Arrays:
    """The arrays under Auto axes; the same object if they are so already."""
    if all(_auto(leaf) is None for leaf in (*arrays.params, *arrays.slots)):
        return arrays
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
