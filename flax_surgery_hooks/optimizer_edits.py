"""Surgeries on the optimizer as a whole: its hyperparameters, its switches, or another optimizer in its place.

Such a surgery is a class with a method `edit_optimizer(optimizer)` instead of `__call__`. It is given an `Optimizer`
and returns one, `optimizer.replace(opt_state=..., tx=...)`. What it leaves alone must stay the same objects. Further
parameters are filled by name: `key`, `step` and the trainer's inputs. It runs on the host, operation by operation, on
concrete values, and on abstract ones under `jax.eval_shape`, so that whatever it raises is raised at the first call:
it must not look at values. New leaves keep dtype, weak type and placement of those they replace, so that a compiled
train step goes on; a surgery that gives another `tx` places its leaves itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks.checks import concrete
from flax_surgery_hooks.errors import StructureError, SurgeryError, SurgeryFunctionError, UserCodeError, shorten
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.operation import Operation, like
from flax_surgery_hooks.paths import Leaves, flatten, join, listed
from flax_surgery_hooks.settling import Fired
from flax_surgery_hooks.slots import Slot, as_abstract, slots_of
from flax_surgery_hooks.structure import Reshape, check_opt_state
from flax_surgery_hooks.surgery import describe
from flax_surgery_hooks.train_state import take_apart


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """An optimizer with its state and parameters, as `edit_optimizer` sees it.

    Attributes:
      tx: the `optax.GradientTransformation`.
      opt_state: its state; arrays, or tracers where it is looked ahead.
      params: the parameters, not to be edited.
      paths: paths of the selected leaves.
      selected: their places among the flattened parameters.
      detail: what the record should tell of the edit, as JSON holds it.
    """

    tx: Any
    opt_state: Any
    params: Any
    paths: tuple[str, ...]
    selected: tuple[int, ...]
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> Optimizer:
        """Another one, with these attributes changed."""
        return dataclasses.replace(self, **changes)

    @property
    def leaves(self) -> Leaves:
        """The flattened parameters."""
        return flatten(self.params)

    @property
    def slots(self) -> dict[int, tuple[Slot, ...]]:
        """The slots of each parameter, by its place.

        Raises:
          SlotError, StateError: see `slots.slots_of`.
        """
        return slots_of(self.tx, self.opt_state, self.leaves)

    def check_whole(self, surgery: str) -> None:
        """Raises unless all leaves are selected.

        Raises:
          SurgeryFunctionError: some are not.
        """
        everything = self.leaves.paths
        if len(self.selected) < len(everything):
            raise SurgeryFunctionError(
                f"{surgery} concerns the whole optimizer, and only some leaves are selected.",
                found=f"{len(self.selected)} of {len(everything)} leaves: {listed(self.paths, 3)}",
                write='params="**"',
            )

    def map_states(self, kinds: tuple[Any, ...], edit: Callable[[Any], Any]) -> tuple[Any, int]:
        """The state with every transform's state of these classes, however deep, edited; and how many there are.

        Args:
          kinds: NamedTuple classes.
          edit: from a state to a state; those within it have been edited before.
        """
        found: list[Any] = []

        def one(node: Any) -> Any:
            if not isinstance(node, kinds):
                return node
            found.append(node)
            return edit(type(node)(*map(below, node)))

        def below(tree: Any) -> Any:
            return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, kinds))

        return below(self.opt_state), len(found)


class Ran(NamedTuple):
    """A surgery that has run.

    Attributes:
      state: the train state after it.
      record: what is known of it.
      switched: whether the optimizer is another.
    """

    state: Any
    record: Record
    switched: bool


def run(operation: Operation, state: Any, key: Any, step: Any, inputs: Mapping[str, Any]) -> Ran:
    """Edits the optimizer of a train state, concrete, abstract or traced.

    Raises:
      UserCodeError: the surgery raised.
      SurgeryFunctionError: it returned no `Optimizer`, or other parameters.
      StructureError: leaves of other shapes, or a state that does not belong to its `tx`.
    """
    parts = take_apart(state)
    places = operation.selection.resolve(parts.params)
    paths = tuple(parts.params.paths[place] for place in places)
    before = Optimizer(parts.tx, state.opt_state, state.params, paths, places)
    given = (before.opt_state, before.params, key, step, dict(inputs))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(given)):
        after = _abstractly(operation, before, given)
    else:
        after = _edited(operation, before, key, step, inputs)
    switched = after.tx is not before.tx
    record = Record(
        surgery=json.dumps(describe(operation.edit.function)),
        paths=paths,
        leaves=tuple((tuple(jnp.shape(leaf)), str(as_abstract(leaf).dtype)) for leaf in _at(parts.params, places)),
        detail=json.dumps(dict(after.detail)) if after.detail else "",
    )
    changes = {"opt_state": after.opt_state, **({"tx": after.tx} if after.tx is not before.tx else {})}
    new = state.replace(**changes)
    if switched:
        check_opt_state(new)
    return Ran(new, record, switched)


def _at(leaves: Leaves, places: tuple[int, ...]) -> list[Any]:
    return [leaves.values[place] for place in places]


def _abstractly(operation: Operation, before: Optimizer, given: tuple[Any, ...]) -> Optimizer:
    """`_edited` by `jax.eval_shape`: allocates nothing."""
    made: list[Optimizer] = []

    def edit(opt_state: Any, params: Any, key: Any, step: Any, inputs: Any) -> Any:
        made.append(_edited(operation, before.replace(opt_state=opt_state, params=params), key, step, inputs))
        return made[-1].opt_state

    shapes = jax.eval_shape(edit, *jax.tree.map(as_abstract, given))
    return made[-1].replace(opt_state=shapes, params=before.params)


def _edited(operation: Operation, before: Optimizer, key: Any, step: Any, inputs: Mapping[str, Any]) -> Optimizer:
    method = operation.edit.edit_optimizer
    assert method is not None
    ready = {"step": jnp.asarray(step, jnp.int32), **inputs, **dict(operation.static)}
    if key is not None:
        ready["key"] = key
    try:
        after = method.function(before, **method.fill(ready))
    except SurgeryError:
        raise
    except Exception as error:
        raise UserCodeError(f"{method.name} raised {type(error).__name__}: {shorten(error)}") from error
    if not isinstance(after, Optimizer) or after.params is not before.params:
        raise SurgeryFunctionError(
            f"{method.name} must return the optimizer that it was given, with another state or `tx`.",
            found="other params" if isinstance(after, Optimizer) else type(after).__name__,
            write="return optimizer.replace(opt_state=...)",
        )
    return after.replace(opt_state=_placed(before.opt_state, after.opt_state)) if after.tx is before.tx else after


def _placed(before: Any, after: Any) -> Any:
    """New leaves like those they replace.

    Raises:
      StructureError: another structure, or a leaf of another shape, though the optimizer is the same.
    """
    items, treedef = jax.tree_util.tree_flatten_with_path(before)
    structure: Any = jax.tree.structure(after)
    write = "optimizer.replace(opt_state=..., tx=...), a `tx` that makes such a state"
    if structure != treedef:
        raise StructureError(
            "The surgery gives the optimizer state another structure, and the optimizer is the same.",
            found=shorten(structure, 150),
            write=write,
        )
    new = jax.tree.leaves(after)
    for (keys, old), leaf in zip(items, new, strict=True):
        if jnp.shape(old) != jnp.shape(leaf):
            raise StructureError(
                "The surgery gives a leaf of the optimizer state another shape, and the optimizer is the same.",
                path=join(keys),
                found=f"{list(jnp.shape(old))} -> {list(jnp.shape(leaf))}",
                write=write,
            )
    return jax.tree.unflatten(treedef, [like_held(old, leaf) for (_, old), leaf in zip(items, new, strict=True)])


def like_held(old: Any, new: Any) -> Any:
    """A new value in the dtype, weak type and placement of the one it replaces; committed only if that is."""
    if new is old:
        return old
    value = like(new, old if hasattr(old, "dtype") else as_abstract(old))  # a number traces as a weak array
    if isinstance(old, jax.Array) and concrete((old, value)) and old.committed:
        return jax.device_put(value, old.sharding)
    return value


def look_ahead(operation: Operation, state: Any, key: Any, inputs: Mapping[str, Any], reshape: Reshape) -> Any:
    """The state after a fire, abstractly: raises whatever a fire on this state would.

    Raises:
      StructureError: the hook brings what has no use here, or the state cannot take another structure.
    """
    brought = [name for name in ("apply_fn", "tx") if getattr(reshape, name) is not None]
    if brought:
        raise StructureError(
            f"The surgery {operation.edit.name} leaves all shapes alone, and the hook brings parts for other ones.",
            found=", ".join(f"{name}=" for name in brought),
            write="no such argument; SwitchOptimizer(tx) takes the new optimizer",
        )
    fields = {name: jax.tree.map(as_abstract, getattr(state, name)) for name in ("params", "opt_state")}
    ahead = run(operation, state.replace(**fields), key, 0, inputs).state
    held: Any = jax.tree.structure(state.opt_state)
    if hasattr(state, "write_back") and jax.tree.structure(ahead.opt_state) != held:
        raise StructureError(
            f"The surgery {operation.edit.name} gives the optimizer another state, and `nnx.Optimizer` keeps the "
            "structure of its own.",
            found=shorten(jax.tree.structure(ahead.opt_state), 150),
            write="fsh.operate on fsh.bind(params=..., opt_state=..., tx=...), and an nnx.Optimizer made of what it "
            "returns",
        )
    return ahead


def fire(
    operation: Operation, state: Any, key: Any, step: int, inputs: Mapping[str, Any], *, commit: bool
) -> tuple[Any, Fired]:
    """Fires on a concrete state; without `commit` the state comes back as it was. There are no figures."""
    ran = run(operation, state, key, step, inputs)
    return (ran.state if commit else state), Fired(ran.record, {}, reshaped=ran.switched)
