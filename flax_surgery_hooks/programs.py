"""Compiled programs of a surgery on the host: one per leaf signature, with every leaf's own placement.

Leaves of one shape, dtype and placement share a program, so that a surgery of 200 equal leaves compiles once. A fire is
two passes: the first measures and decides, the second edits, so that the guard never keeps a second copy of the state.
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
from jax.sharding import NamedSharding, PartitionSpec

from flax_surgery_hooks.calling import check_memory
from flax_surgery_hooks.deriving import Compiled
from flax_surgery_hooks.errors import StructureError, SurgeryError
from flax_surgery_hooks.layers import Layer
from flax_surgery_hooks.operation import Fire, Operation, Unit, follows, like
from flax_surgery_hooks.passes import Passes
from flax_surgery_hooks.perform import Edited, examine, perform
from flax_surgery_hooks.placement import auto_axes, check_together, is_auto, placement, relabelled
from flax_surgery_hooks.reductions import Places, across, places_of
from flax_surgery_hooks.targets import Place, moved, targets
from flax_surgery_hooks.verdicts import rows_of

ANY_LEAF = "<leaf>"
"""Stands for the path of a leaf in programs that serve many."""


class Measured(NamedTuple):
    """The first pass over a unit.

    Attributes:
      changes: `verdicts.rows_of` the unit.
      seeds: see `Edited.seeds`.
      figures: see `Edited.figures`.
    """

    changes: jax.Array
    seeds: tuple[jax.Array, ...]
    figures: Any = None


class Arrays(NamedTuple):
    """The values of a unit's leaves, of their slots, and of what the surgery remembers of them."""

    params: tuple[Any, ...]
    slots: tuple[Any, ...]
    memory: Any = ()


class Signature(NamedTuple):
    """What is known of all units of one signature.

    Attributes:
      common: the unit that stands for them.
      in_place: whether slots stay in place because the edit mixes.
      after: the shapes of what the edit makes of them.
    """

    common: Unit
    in_place: bool
    after: Arrays


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
      derive: the compiled functions of the surgery's `derived`.

    Args:
      operation: likewise.
      place: see `targets.targets`.
    """

    def __init__(self, operation: Operation, place: Place | None = None):
        self.operation = operation
        self._place = place
        self.compiled: dict[Hashable, Passes] = {}
        self.derive = Compiled()
        self._signatures: dict[Hashable, Signature] = {}
        self._foreseen: dict[Hashable, Arrays] = {}
        self._common: dict[Hashable, Unit] = {}  # holds them, so that keys may use their `id`: hashing slots is slow
        self._reshapes = False
        rules = [operation.rules.default, *(rule for _, rule in operation.rules.by_kind)]
        asks = operation.edit.takes("path") or any(map(callable, rules)) or place is not None
        self._by_path = operation.edit.many or asks

    def ready(self, unit: Unit, arrays: Arrays, fire: Fire, *, may_reshape: bool) -> Ready:
        """`prepare`, with the programs for these values; nothing is compiled yet."""
        common = self._stand_in(unit)
        leaves, treedef = jax.tree.flatten(arrays)
        key = (id(common), treedef, tuple([placement(leaf) for leaf in leaves]), shapes_of(fire.inputs))
        placed = arrays if all(map(is_auto, leaves)) else relabelled(arrays)
        passes = self.compiled.get(key)
        if passes is None:
            with _own_path(unit):
                signature = self._examined(unit, arrays, fire, may_reshape)
                passes = self.compiled[key] = self._passes(signature, unit, arrays, placed)
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

    def foresee(self, unit: Unit, arrays: Arrays, fire: Fire, *, may_reshape: bool) -> Arrays:
        """The shapes of what an edit makes of a unit, once per signature; arrays and fire may be abstract.

        Nothing is computed, so what only values show, such as an edit that mixes, is left to `prepare`.
        """
        common = self._stand_in(unit)
        key = (id(common), shapes_of(arrays), shapes_of(fire.inputs))
        if key not in self._foreseen:
            with _own_path(unit):
                known = (self.operation, common, False, arrays, fire)
                self._foreseen[key], _ = foreseen(*known, may_reshape=may_reshape)
        return self._foreseen[key]

    def _examined(self, unit: Unit, arrays: Arrays, fire: Fire, may_reshape: bool) -> Signature:
        common = self._stand_in(unit)
        key = (id(common), shapes_of(arrays), shapes_of(fire.inputs))
        if key in self._signatures:
            return self._signatures[key]
        with _own_path(unit):
            check_together(self.operation.edit.name, unit.paths, jax.tree.leaves(arrays))
            placed = relabelled(arrays)
            in_place = False
            if follows(self.operation, common):
                in_place = examine(self.operation, common, placed.params, fire._replace(memory=placed.memory))
            after, reshapes = foreseen(self.operation, common, in_place, placed, fire, may_reshape=may_reshape)
            self._reshapes |= reshapes
            if reshapes:
                targets(unit, arrays, after, self._place)  # raises where the new shapes cannot lie
        self._signatures[key] = Signature(common, in_place, after)
        return self._signatures[key]

    @property
    def reshapes(self) -> bool:
        """Whether any unit prepared so far changes the shape or the path of a leaf."""
        return self._reshapes

    def measure(self, ready: Ready, fire: Fire) -> Measured:
        """The first pass: figures and seeds, nothing edited."""
        with _own_path(ready.unit):
            return ready.passes.measure(ready.placed, fire)

    def edit(
        self, ready: Ready, fire: Fire, seeds: Sequence[jax.Array] | None, ok: Any, *, donate: bool = False
    ) -> Arrays:
        """The second pass: the new values, or the old ones where `ok` is False; each placed as it was.

        Args:
          ready: the unit.
          fire: as in the first pass.
          seeds: from the first pass, or None to compute them here.
          ok: a boolean scalar, or None to apply the edit in any case.
          donate: whether the old values give their memory to the new ones, and are gone.
        """
        with _own_path(ready.unit):
            new = ready.passes.edit(ready.placed, fire, seeds, ok, donate=donate)
        return new if ready.passes.targets is None else moved(new, ready.passes.targets)

    def _stand_in(self, unit: Unit) -> Unit:
        """The unit that stands for all of its signature; itself where the path matters to the surgery."""
        key = unit if self._by_path else (unit.slots, bool(unit.layers))
        common = self._common.get(key)
        if common is None:
            common = unit if self._by_path else _generic(unit)
            common = self._common[key] = self._common.setdefault(common, common)
        return common

    def _passes(self, signature: Signature, unit: Unit, arrays: Arrays, placed: Arrays) -> Passes:
        params, slots, memory = targets(unit, arrays, signature.after, self._place)
        wanted = Arrays(tuple(params), tuple(slots), memory)
        places = jax.tree.map(auto_axes, wanted)
        lie = _places(placed, signature.after, places)
        known = (self.operation, signature.common, signature.in_place, lie)
        first, edit = functools.partial(measuring, *known), functools.partial(editing, *known)
        everywhere: Any = Measured(_everywhere(placed), None, _everywhere(placed))  # type: ignore[arg-type]
        measure = jax.jit(first, out_shardings=everywhere)
        second, donating = (jax.jit(edit, out_shardings=places, donate_argnums=which) for which in ((), 0))
        relabels = any(one is not auto_axes(one) for one in jax.tree.leaves(wanted))
        return Passes(
            measure, second, donating, placed, signature.after, signature.in_place, wanted if relabels else None
        )


def foreseen(
    operation: Operation, unit: Unit, in_place: bool, arrays: Arrays, fire: Fire, *, may_reshape: bool
) -> tuple[Arrays, bool]:
    """The shapes of what an edit makes of a unit, and whether shapes or paths change.

    Raises:
      StructureError: they do, and may not.
    """
    edited = jax.eval_shape(functools.partial(edit_unit, operation, unit, in_place, measures=False), arrays, fire)
    write = "apply_fn= for the new shapes, and on_reshape= for what the trainer has to rebuild"
    name = operation.edit.name
    changed = [
        (path, np.shape(old), new.shape)
        for path, old, new in zip(unit.paths, arrays.params, edited.params, strict=unit.other is None)
        if np.shape(old) != new.shape and unit.other is None
    ]
    if unit.other is not None and not may_reshape:
        raise StructureError(
            f"The surgery {name} adds or removes leaves, and the hook brings nothing for that.",
            found=unit.difference(),
            write=write,
        )
    if changed and not may_reshape:
        path, old, new = changed[0]
        raise StructureError(
            f"The surgery {name} changes the shape of a leaf, and the hook brings nothing for that.",
            path=path,
            found=f"{list(old)} -> {list(new)}",
            write=write,
        )
    reshapes = bool(changed) or unit.other is not None
    if not reshapes:
        check_memory(name, arrays.memory, edited.memory)
    return Arrays(edited.params, edited.slots, edited.memory), reshapes


def edit_unit(
    operation: Operation,
    unit: Unit,
    in_place: bool,
    arrays: Arrays,
    fire: Fire,
    seeds: Any = None,
    measures: bool = True,
) -> Edited:
    """`perform`, with what the surgery remembers taken from the arrays."""
    fire = fire._replace(memory=arrays.memory)
    return perform(
        operation, unit, arrays.params, arrays.slots, fire, in_place=in_place, seeds=seeds, measures=measures
    )


def measuring(operation: Operation, unit: Unit, in_place: bool, lie: Places, arrays: Arrays, fire: Fire) -> Measured:
    """The first pass over a unit whose arrays lie so."""
    with across(lie):
        edited = edit_unit(operation, unit, in_place, arrays, fire)
    return Measured(rows_of(edited), edited.seeds, edited.figures)


def editing(
    operation: Operation, unit: Unit, in_place: bool, lie: Places, arrays: Arrays, fire: Fire, seeds: Any, ok: Any
) -> Arrays:
    """The second pass: the new values, or where `ok` is False the old ones; None applies the edit in any case."""
    with across(lie):
        edited = edit_unit(operation, unit, in_place, arrays, fire, seeds)
    new = Arrays(edited.params, edited.slots, edited.memory)
    return new if ok is None else choose(ok, new, arrays)


def _generic(unit: Unit) -> Unit:
    layers = (Layer(0, 0),) if unit.layers else ()  # what takes a layer out of its leaf runs before and after
    of = 0 if layers else None
    slots = tuple(
        dataclasses.replace(slot, index=i, owner=0, offset=None, layer=of, axis=None)
        for i, slot in enumerate(unit.slots)
    )
    return Unit((ANY_LEAF,), (0,), slots, layers=layers)


def _everywhere(arrays: Arrays) -> NamedSharding | None:
    """Where figures go, so that every process can read them: to all devices of the leaves' mesh."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array) and leaf.committed]
    mesh = next((one.mesh for one in shardings if isinstance(one, NamedSharding)), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _places(before: Arrays, after: Arrays, shardings: Arrays) -> Places:
    """Where the arrays of a unit lie, before its edit and after."""
    old = [(leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(before) if isinstance(leaf, jax.Array)]
    given = jax.tree.leaves(tuple(shardings), is_leaf=lambda sharding: sharding is None)
    return places_of([*old, *((leaf.shape, one) for leaf, one in zip(jax.tree.leaves(after), given, strict=True))])


def choose(ok: Any, new: Arrays, old: Arrays) -> Arrays:
    """`new` where `ok`, else `old`; leaves whose shape changed are new in any case (an unguarded edit)."""

    def one(after: jax.Array, before: Any) -> jax.Array:
        if after.shape != np.shape(before):
            return after
        return like(jnp.where(ok, after, before), before)

    return Arrays(*jax.tree.map(one, tuple(new), tuple(old)))


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
    return treedef, tuple([_shape_of(leaf) for leaf in leaves])


def _shape_of(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype
    return np.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
