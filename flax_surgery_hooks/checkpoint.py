"""Checkpoints of a run whose model changes: the train state and what hooks know, in one commit of Orbax.

A state is restored straight into the shapes, the optimizer and the places that it had, or that the trainer gives it
now: another mesh, another number of processes. Nothing is allocated twice, padded or cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from flax_surgery_hooks import processes, room
from flax_surgery_hooks.abstract_state import abstract, fields_of, placed_beside
from flax_surgery_hooks.errors import CheckpointError, located, shorten
from flax_surgery_hooks.hooks import SurgeryHooks
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.placement import beside, known_sharding, replicated

STATE, HOOKS, KEPT = "state", "surgery", "surgery_kept"
"""Names of the items of a checkpoint; a trainer's own have others."""

Names = tuple[str, ...]


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    hooks: SurgeryHooks,
    *,
    items: Mapping[str, Any] | None = None,
    force: bool = False,
    **kwargs: Any,
) -> bool:
    """Saves the train state, and with it what the hooks know, in one commit; asynchronously, where the manager does.

    Comes after the call of the hooks at the same step. Where the manager saves at this step the figures of all fires
    are read first, which waits for the device.

    Args:
      manager: made without `item_names=`, or with "state", "surgery" and "surgery_kept" among them.
      step: what `state.step` holds.
      state: the train state.
      hooks: those of the loop.
      items: further items, name -> `ocp.args`, such as a data iterator.
      force: saves also where the manager's options would not.
      **kwargs: as for `manager.save`, such as `metrics=`.

    Returns:
      Whether a checkpoint was saved, or is being saved.

    Raises:
      StepError: the hooks were last called at another step.
      CheckpointError: it cannot be written, or `items` has names that are taken.
    """
    taken = {STATE, HOOKS, KEPT} & set(items or ())
    if taken:
        raise CheckpointError(
            "The names of these items are taken.", found=listed(sorted(taken)), write="other names in items="
        )
    hooks.note_checkpoints(manager)
    if not force and not manager.should_save(step):
        return False
    if room.buffers(state):
        hooks.collect(state)
    saved, tree = hooks.state_dict(step), _tree(state)
    told = [[list(names), list(leaf.shape), str(leaf.dtype)] for names, leaf in _by_names(tree).items()]
    kept = {KEPT: ocp.args.StandardSave(arrays)} if (arrays := hooks.kept_arrays) else {}
    args = ocp.args.Composite(
        **kept,
        **{STATE: ocp.args.StandardSave(tree), HOOKS: ocp.args.JsonSave({"hooks": saved, "arrays": told})},
        **(items or {}),
    )
    try:
        return bool(manager.save(step, args=args, force=force, **kwargs))
    except Exception as error:  # of Orbax, the file system or another process: each has classes of its own
        raise CheckpointError(
            f"The checkpoint cannot be saved: {type(error).__name__}: {shorten(error)}",
            step=step,
            path=str(manager.directory),
            found=f"whole checkpoints of steps {_steps(manager.all_steps())}",
            write="a directory with space that can be written; the state in hand is whole, and can be saved there",
        ) from error


def restore(
    manager: ocp.CheckpointManager,
    init: Callable[[], Any] | Any,
    hooks: SurgeryHooks,
    *,
    step: int | None = None,
    allow_changes: Collection[str] = (),
) -> Any:
    """The train state of a checkpoint, and the hooks as they were: the run goes on as if it had not been cut off.

    Once all hooks are added and before anything is called. The ledger's file is cut to the checkpoint's; without one,
    what it holds is moved to a file beside it as a whole.

    Args:
      manager: of the directory that `save` wrote into.
      init: makes the trainer's initial state, and is only traced. It tells the containers, the functions and, if it is
        `jax.jit(init, out_shardings=...)`, where leaves go. Or that state itself, abstract or concrete; one that
        stands for objects edited in place is written into.
      hooks: the same as were saved, or others, see `load_state_dict`.
      step: of the checkpoint; by default that of the last one.
      allow_changes: names of hooks that may differ from those saved.

    Returns:
      The state. If the directory has no checkpoint and no step is asked for: the initial state, with what surgeries
      remember.

    Raises:
      CheckpointError: the checkpoint is damaged, is not there, or holds another state.
      ResumeError, LedgerError: see `load_state_dict`.
      StructureError: a leaf does not divide over the mesh of today.
    """
    at = manager.latest_step() if step is None else step
    if at is None:
        if not hooks.ledger.records:
            hooks.ledger.resume(())  # of a run that was cut off before its first checkpoint
        state = init() if callable(init) else init
        return hooks.init(state, fires=0)
    if at not in manager.all_steps():
        raise CheckpointError(
            "There is no checkpoint of this step.",
            step=at,
            path=str(manager.directory),
            found=f"steps {_steps(manager.all_steps())}",
            write="step=<one of these>, or none for the last",
        )
    saved, stored = _saved(manager, at)
    hooks.check_state_dict(saved, allow_changes)
    records = [Record.from_json(json.dumps(record)) for record in saved["records"]]
    initial = _initial(init)
    with located(step=at):
        target = hooks.abstract_state(initial, records, allow_changes)
        room = _room(target)
        target = _as_stored(target, stored, hooks)
        state = _arrays(manager, at, target)
        kept = hooks.abstract_kept(saved, target)
        kept = _read(manager, at, KEPT, kept) if kept else {}
    hooks.load_state_dict(saved, allow_changes, kept)
    hooks.note_checkpoints(manager)
    _warn_of_later(manager, at)
    return hooks.init(state, fires=_room(state) or room)


def _tree(state: Any) -> Any:
    """What Orbax saves of a state: a pytree of arrays."""
    tree = state if _is_tree(state) else {name: getattr(state, name) for name in fields_of(state)}
    kept = jax.Array | jax.ShapeDtypeStruct
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, kept) else jnp.asarray(leaf), tree)


def _is_tree(state: Any) -> bool:
    return not hasattr(state, "write_back") and not jax.tree_util.all_leaves([state])


def _initial(init: Any) -> Any:
    if not callable(init) or hasattr(init, "params"):
        return init
    return init.eval_shape() if hasattr(init, "eval_shape") else jax.eval_shape(init)


def _saved(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], dict[Names, Any]]:
    """What the hooks saved, as the first process reads it, and shape and dtype of every array by its names."""
    try:
        read = manager.restore(step, args=ocp.args.Composite(**{HOOKS: ocp.args.JsonRestore()}))[HOOKS]
        stored = _stored(read)
    except Exception as error:
        raise _damaged(manager, step, error, "What the hooks knew cannot be read") from error
    return dict(json.loads(processes.by_first("checkpoint", lambda: json.dumps(read["hooks"])))), stored


def _stored(read: Mapping[str, Any]) -> dict[Names, Any]:
    return {tuple(names): jax.ShapeDtypeStruct(tuple(shape), _dtype(dtype)) for names, shape, dtype in read["arrays"]}


def _dtype(name: str) -> Any:
    return jax.random.key(0, impl=name[4:-1]).dtype if name.startswith("key<") else jnp.dtype(name)


def _names(keys: Any) -> Names:
    found = []
    for key in keys:
        name = next(getattr(key, one) for one in ("name", "key", "idx") if hasattr(key, one))
        found.append(str(name))
    return tuple(found)


def _room(state: Any) -> int:
    """For how many fires in graph a state has room."""
    return next((int(one["steps"].shape[0]) for one in room.buffers(state).values()), 0)


def _as_stored(target: Any, stored: Mapping[Names, Any], hooks: SurgeryHooks) -> Any:
    """The target with just what is stored of hooks; everything else is checked against what is stored.

    Raises:
      CheckpointError: the checkpoint holds another state.
    """
    kept = {names[1:]: leaf for names, leaf in stored.items() if names[0] == "surgery"}
    if kept and not hasattr(target, "surgery"):
        raise _other_state(
            "The checkpoint has what hooks remember, and the state has no field `surgery` for it.",
            found=type(target).__name__,
        )
    if hasattr(target, "surgery"):
        target = target.replace(surgery=_surgery(target, kept, hooks) if kept else None)
    wanted = _by_names(abstract(_tree(target)))
    lacking, beyond = [n for n in wanted if n not in stored], [n for n in stored if n not in wanted]
    if lacking or beyond:
        told = [f"only in the state: {_shown(lacking)}" if lacking else ""]
        told.append(f"only in the checkpoint: {_shown(beyond)}" if beyond else "")
        raise _other_state("The checkpoint holds other leaves than the state.", found="; ".join(filter(None, told)))
    for names, leaf in wanted.items():
        held = stored[names]
        if held.shape != leaf.shape or str(held.dtype) != str(leaf.dtype):
            raise _other_state(
                "The checkpoint holds a leaf of another shape or dtype.",
                path="/".join(names),
                found=f"{held.dtype}{list(held.shape)}, the state has {leaf.dtype}{list(leaf.shape)}",
            )
    return target


def _surgery(target: Any, kept: Mapping[Names, Any], hooks: SurgeryHooks) -> Any:
    """What is stored of hooks, in the containers that the hooks make where these fit."""
    capacity = next((leaf.shape[0] for names, leaf in kept.items() if names[0] == "fires" and names[-1] == "steps"), 0)
    ready = hooks.init(target, fires=capacity).surgery or {}
    found: dict[str, Any] = {}
    for kind, name in dict.fromkeys(names[:2] for names in kept):
        stored = {names[2:]: leaf for names, leaf in kept.items() if names[:2] == (kind, name)}
        made = ready.get(kind, {}).get(name)
        fits = made is not None and _shapes(_by_names(made)) == _shapes(stored)
        found.setdefault(kind, {})[name] = made if fits else _nested(stored)
    return placed_beside(found, target.params)


def _shapes(leaves: Mapping[Names, Any]) -> dict[Names, Any]:
    return {names: (tuple(leaf.shape), str(leaf.dtype)) for names, leaf in leaves.items()}


def _by_names(tree: Any) -> dict[Names, Any]:
    return {_names(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _nested(leaves: Mapping[Names, Any]) -> Any:
    if () in leaves:
        return leaves[()]
    firsts = dict.fromkeys(names[0] for names in leaves)
    return {one: _nested({names[1:]: leaf for names, leaf in leaves.items() if names[0] == one}) for one in firsts}


def _shown(names: Iterable[Names]) -> str:
    return listed(("/".join(one) for one in names), 4)


def _other_state(problem: str, **fields: Any) -> CheckpointError:
    return CheckpointError(
        problem,
        write="the model, the optimizer and the hooks with which it was saved, or its own step= if they have changed "
        "since",
        **fields,
    )


def _arrays(manager: ocp.CheckpointManager, step: int, target: Any) -> Any:
    """The state with its arrays, each read straight to where it belongs."""
    arrays = _read(manager, step, STATE, abstract(_tree(target)))
    return arrays if _is_tree(target) else target.replace(**arrays).write_back()


def _read(manager: ocp.CheckpointManager, step: int, item: str, tree: Any) -> Any:
    """The arrays of one item of a checkpoint."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(_placed(tree))}))[item]
    except Exception as error:
        raise _damaged(manager, step, error, "Its arrays cannot be read") from error


def _placed(tree: Any) -> Any:
    """Shapes that say where each array goes: by default a copy on every device of the others, or JAX's first device."""
    leaves = jax.tree.leaves(tree)
    near = beside(leaves) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def one(leaf: Any) -> Any:
        sharding = known_sharding(leaf) or replicated(near, len(leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _damaged(manager: ocp.CheckpointManager, step: int, error: Exception, what: str) -> CheckpointError:
    whole = [one for one in sorted(manager.all_steps(), reverse=True) if one != step and _is_whole(manager, one)]
    return CheckpointError(
        f"The checkpoint is damaged. {what}: {type(error).__name__}: {shorten(error)}",
        step=step,
        path=str(manager.directory),
        found=f"whole checkpoints of steps {_steps(whole)}",
        write=f"step={whole[0]}, with a SurgeryHooks that has not been called" if whole else "a copy of the checkpoint",
    )


def _is_whole(manager: ocp.CheckpointManager, step: int) -> bool:
    """Whether everything of a checkpoint can be read, as far as one process can tell."""
    try:
        args: dict[str, Any] = {HOOKS: ocp.args.JsonRestore()}
        if jax.process_count() == 1:
            first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            args[STATE] = ocp.args.StandardRestore(fallback_sharding=first)
        _stored(manager.restore(step, args=ocp.args.Composite(**args))[HOOKS])
    except Exception:
        return False
    return True


def _steps(steps: Iterable[int]) -> str:
    return listed(map(str, sorted(steps)), 8) or "none"


def _warn_of_later(manager: ocp.CheckpointManager, step: int) -> None:
    later = [one for one in manager.all_steps() if one > step]
    if later and processes.is_first():
        logging.warning(
            "The run goes on from step %d, and checkpoints of later steps %s are there: Orbax saves none until they "
            "are passed. Delete them if that future is not wanted.",
            step,
            _steps(later),
        )
