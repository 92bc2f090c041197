"""Fires whose old values are still kept: until when, what puts them back, and what of them a checkpoint holds.

Several fires may be kept at a time. The newest is put back first: by `undo` always, by a metric if several bands are
left in one call. What fires after it did to the same leaves goes with it, and the record lists them; `undo` refuses
that. Bands of earlier fires on the same leaves look at values after the rollback only, which know of it.

A fire that changes shapes or switches the optimizer lets go of everything that is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from absl import logging

from flax_surgery_hooks import kept_leaves
from flax_surgery_hooks.errors import HookError, StateError, located, shorten
from flax_surgery_hooks.kept_leaves import overlap
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.mirrors import NO_MIRRORS, Mirrors, original, viewed
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.processes import is_first
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.rollback import Band
from flax_surgery_hooks.settling import NEVER, Fired
from flax_surgery_hooks.watched_schedules import Trigger
from flax_surgery_hooks.watched_values import found, site, taken
from flax_surgery_hooks.watching import Watching


class Later(NamedTuple):
    """A fire that touched leaves of an earlier one."""

    id: int
    hook: str
    step: int


@dataclass
class Kept:
    """A fire whose old values are kept.

    Attributes:
      hook: name of the hook.
      id: number of the fire.
      step: at which it was.
      until: the step at which its values are let go.
      paths: its leaves.
      leaves: the values, see `kept_leaves.kept_of`.
      ok: the guard's verdict, maybe still on the device; None without guard.
      after: its band looks at values of later steps.
      later: fires since that touched the same leaves.
    """

    hook: str
    id: int
    step: int
    until: int
    paths: tuple[str, ...]
    leaves: list[Any]
    ok: Any = None
    after: int = -1
    later: list[Later] = field(default_factory=list)

    @property
    def watch(self) -> str:
        """The name under which its band is watched; no hook has such a name."""
        return f"{self.hook}, rollback of fire {self.id}"

    @property
    def refused(self) -> bool:
        """Whether the guard kept its result out, so that nothing is to be undone; waits for the verdict."""
        return self.ok is not None and not bool(self.ok)

    def record(self, event: str, step: int, triggers: tuple[Trigger, ...] = ()) -> Record:
        """What is recorded when it is put back."""
        detail: dict[str, Any] = {"fired": self.step}
        if self.later:
            detail["with"] = [one.id for one in self.later]
        return Record(
            event=event, step=step, hook=self.hook, id=self.id, paths=self.paths, triggers=triggers,
            detail=json.dumps(detail),
        )  # fmt: skip


class PutBack(NamedTuple):
    """A rollback that the state has, and that the keeper will know of once the call is complete."""

    kept: Kept
    record: Record


class Keeper:
    """The fires of some hooks whose old values are kept.

    Args:
      hooks: the hooks by name, as they are at any time.
      watching: what reads metrics for them.
    """

    __slots__ = ("_hooks", "_kept", "_watching")

    def __init__(self, hooks: Mapping[str, Hook], watching: Watching):
        self._hooks = hooks
        self._watching = watching
        self._kept: dict[int, Kept] = {}

    @property
    def wake(self) -> int:
        """The step at which the next values are let go, `NEVER` if none are kept."""
        return min((one.until for one in self._kept.values()), default=NEVER)

    @property
    def fires(self) -> tuple[Kept, ...]:
        """The fires that are kept, the newest first."""
        return tuple(sorted(self._kept.values(), key=lambda one: -one.id))

    def check(self, hook: Hook, inputs: Mapping[str, Any]) -> None:
        """Looks whether the trainer passes the metric of a hook's rollback.

        Raises:
          InputError: it does not, or passes what is no real scalar.
        """
        if hook.rollback is None or not hook.rollback.band:
            return
        with located(hook=hook.name):
            source = Band(hook.rollback, 0).source
            value = found(inputs, source)
            if value is not None:
                taken(value, "/".join(source), integral=False, where=site())

    def before(self, hook: Hook, state: Any) -> kept_leaves.Site | None:
        """What a fire of a hook will touch in a state, seen as the hook sees it; None if it keeps nothing."""
        return None if hook.rollback is None else kept_leaves.site_of(hook.operation, state, hook.name)

    def note(self, record: Record, fired: Fired) -> None:
        """Takes note of a fire that is recorded, and keeps what it brings."""
        assert record.id is not None
        assert record.step is not None
        if fired.reshaped:
            self.clear(f"hook {record.hook} changed the structure of the state")
            return
        for one in self._kept.values():
            since = record.step > one.step or (record.step == one.step and not fired.in_graph)
            if since and overlap(one.paths, record.paths):
                one.later.append(Later(record.id, record.hook, record.step))
        rollback = self._hooks[record.hook].rollback if record.hook in self._hooks else None
        if rollback is None or fired.kept is None:
            return
        until = record.step + rollback.steps
        self._kept[record.id] = one = Kept(
            record.hook, record.id, record.step, until, record.paths, fired.kept, fired.ok, record.step
        )
        self._watch(one)

    def _watch(self, one: Kept) -> None:
        rollback = self._hooks[one.hook].rollback
        if rollback is not None and rollback.band:
            self._watching.add(one.watch, Band(rollback, one.after))

    def drop(self, id: int) -> None:
        """Lets go of what a fire left, if it is kept."""
        if (one := self._kept.pop(id, None)) is not None:
            self._watching.remove(one.watch)

    def forget(self, hook: str) -> None:
        """Lets go of what all fires of a hook left."""
        for one in self.fires:
            if one.hook == hook:
                self.drop(one.id)

    def clear(self, why: str) -> None:
        """Lets go of everything, and says so."""
        if self._kept and is_first():
            names = listed(f"{one.hook} at step {one.step}" for one in self.fires)
            logging.warning("What was kept of %s is let go, and can not be put back: %s.", names, why)
        for one in self.fires:
            self.drop(one.id)

    def rolled_back(self, state: Any, step: int, mirrors: Mirrors) -> tuple[Any, list[PutBack]]:
        """The state with the old values of those fires whose metric has left its band; `commit` says that it is used.

        Args:
          state: the state of a call.
          step: its step.
          mirrors: fields of the state that mirror the parameters.

        Raises:
          StateError: see `kept_leaves.put`.
        """
        done: list[PutBack] = []
        for one in self.fires:
            triggers = self._watching.triggers(one.watch)
            if not triggers or one.refused or any(overlap(one.paths, other.kept.paths) for other in done):
                continue
            with located(hook=one.hook, step=step):
                state = kept_leaves.put(self._hooks[one.hook], state, one.leaves, mirrors)
            done.append(PutBack(one, one.record("rolled_back", step, triggers)))
        return state, done

    def commit(self, done: Iterable[PutBack], step: int) -> None:
        """Takes note that a call is complete in which these were put back, and recorded."""
        for one, record in done:
            self.put_back(one, step)
            if is_first():
                value = record.triggers[-1]
                logging.warning(
                    "Hook %s: the fire of step %d was rolled back at step %s: the metric was %s at step %d.",
                    one.hook, one.step, record.step, value.value, value.step,
                )  # fmt: skip
        for one in self.fires:
            if one.until <= step:
                self.drop(one.id)

    def put_back(self, one: Kept, step: int) -> None:
        """Forgets a fire that was put back, and what went with it; earlier ones have no such fire after them now."""
        gone = {one.id, *(later.id for later in one.later)}
        for id in gone:
            self.drop(id)
        for other in self._kept.values():
            if any(later.id in gone for later in other.later):
                other.later = [later for later in other.later if later.id not in gone]
                other.after = step
                self._watching.remove(other.watch)
                self._watch(other)

    def undone(self, state: Any, step: int, mirrors: Mirrors) -> tuple[Any, PutBack]:
        """The state before the newest fire that is kept, as far as it touched it; `put_back` says that it is used.

        Raises:
          HookError: none is kept, or another fire has touched the same leaves since.
          StateError: see `kept_leaves.put`.
        """
        one = next((one for one in self.fires if not one.refused), None)
        if one is None:
            raise HookError(
                "No fire is kept that could be undone.",
                found="no hook with rollback=, or all its fires were longer ago, refused or put back",
                write="hooks.add(..., rollback=fsh.Rollback(steps=100)), and hooks.undo(state) within so many steps",
            )
        if one.later:
            last = one.later[-1]
            raise HookError(
                "Another fire has touched the same leaves since, and would be undone with it.",
                hook=one.hook,
                step=one.step,
                found=f"hook {last.hook!r} at step {last.step}",
                write="rollback=fsh.Rollback(...) of that hook too: the newest fire is undone first",
            )
        with located(hook=one.hook, step=step):
            state = kept_leaves.put(self._hooks[one.hook], state, one.leaves, mirrors)
        return state, PutBack(one, one.record("undone", step))

    def to_json(self) -> list[dict[str, Any]]:
        """What is kept, without the values, as JSON holds it; waits for metrics that are not read yet, and verdicts."""
        watched = self._watching.to_json()
        return [_told(one, watched.get(one.watch, [])) for one in reversed(self.fires) if not one.refused]

    def arrays(self) -> dict[str, dict[str, Any]]:
        """The values, for a checkpoint: number of the fire -> number of the array -> array."""
        return {str(one.id): _numbered(map(_as_array, one.leaves)) for one in self.fires if not one.refused}

    def abstract(self, saved: Iterable[Mapping[str, Any]], state: Any, mirrors: Mirrors = NO_MIRRORS) -> dict[str, Any]:
        """What `arrays` held, as `jax.ShapeDtypeStruct`s that lie as the leaves of a state do.

        Args:
          saved: what `to_json` returned.
          state: the state that was saved, or an abstract one like it.
          mirrors: fields of the state that mirror the parameters.

        Raises:
          StateError: `saved` is no such thing, or tells of other leaves than the state has.
        """
        return {str(one["id"]): self._abstract(one, state, mirrors) for one in _checked(saved)}

    def _abstract(self, one: Mapping[str, Any], state: Any, mirrors: Mirrors) -> dict[str, Any]:
        hook = self._hooks.get(one["hook"])
        shapes = [(tuple(shape), dtype) for shape, dtype in one["leaves"]]
        if hook is None or hook.rollback is None:  # nobody will ask for them, but they are in the checkpoint
            return _numbered(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
        held, _ = viewed(state, mirrors, hook)
        leaves = kept_leaves.abstract(kept_leaves.site_of(hook.operation, held, hook.name))
        if [(leaf.shape, str(leaf.dtype)) for leaf in leaves] != shapes:
            raise StateError(
                "What was kept of a fire is not what the hook selects in this state.",
                hook=hook.name,
                step=one["step"],
                found=f"{len(shapes)} arrays saved, {len(leaves)} selected, or of other shapes",
                write="the selection, optimizer and model with which it was saved",
            )
        return _numbered(leaves)

    def restored(self, saved: Iterable[Mapping[str, Any]], arrays: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on where `to_json` and `arrays` were called. What hooks left that are gone, or keep nothing now, is let
        go, and logged.

        Raises:
          StateError: these are not what was saved.
        """
        facts = list(_checked(saved))
        if {str(one["id"]) for one in facts} != set(arrays):
            raise _foreign(sorted(arrays))
        for one in self.fires:
            self.drop(one.id)
        for one in facts:
            hook = self._hooks.get(one["hook"])
            if hook is None or hook.rollback is None:
                logging.warning("What was kept of hook %s at step %d is let go.", one["hook"], one["step"])
                continue
            leaves = [arrays[str(one["id"])][str(place)] for place in range(len(one["leaves"]))]
            leaves = list(map(kept_leaves.hosted, leaves)) if hook.rollback.to == "host" else leaves
            later = [Later(*each) for each in one["later"]]
            kept = Kept(hook.name, one["id"], one["step"], one["until"], tuple(one["paths"]), leaves)
            self._kept[kept.id] = replace(kept, after=one["after"], later=later)
            self._watch(self._kept[kept.id])
            for name, watch in self._watching._all():
                if name == kept.watch and one["watch"]:
                    watch.from_json({**one["watch"], "schedule": repr(watch._schedule)})


def keep(site: kept_leaves.Site | None, hook: Hook, after: Any) -> list[Any] | None:
    """What a fire that is put into the state leaves to be kept; see `Keeper.before`."""
    if site is None or hook.rollback is None:
        return None
    return kept_leaves.kept_of(site, original(after), host=hook.rollback.to == "host")


def _numbered(leaves: Iterable[Any]) -> dict[str, Any]:
    return {str(place): leaf for place, leaf in enumerate(leaves)}


def _as_array(leaf: Any) -> Any:
    return leaf.array() if isinstance(leaf, kept_leaves.HostCopy) else leaf


def _told(one: Kept, watched: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "hook": one.hook,
        "id": one.id,
        "step": one.step,
        "until": one.until,
        "paths": list(one.paths),
        "leaves": kept_leaves.described(one.leaves),
        "after": one.after,
        "later": [list(later) for later in one.later],
        "watch": watched[0] if watched else None,
    }


def _checked(saved: Any) -> list[Any]:
    """What `to_json` returned.

    Raises:
      StateError: it is something else.
    """
    facts = saved if isinstance(saved, list | tuple) else None
    wanted = {"hook": str, "id": int, "step": int, "until": int, "paths": list, "leaves": list, "after": int,
              "later": list}  # fmt: skip
    if facts is None or not all(
        isinstance(one, Mapping) and all(isinstance(one.get(name), kind) for name, kind in wanted.items())
        for one in facts
    ):
        raise _foreign(saved)
    return list(facts)


def _foreign(found: Any) -> StateError:
    return StateError(
        "This is not what was saved of the fires that are kept.",
        found=shorten(found, 150),
        write="what `to_json` and `arrays` returned, from the same checkpoint",
    )
