"""Hooks by name: how they are registered, removed, and told to others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from flax_surgery_hooks import rules
from flax_surgery_hooks.errors import HookError, ScheduleError, located, quoted, typed
from flax_surgery_hooks.guards import Guard
from flax_surgery_hooks.ledger import Record
from flax_surgery_hooks.making import make_operation
from flax_surgery_hooks.operation import Operation
from flax_surgery_hooks.registration import Hook, check_name, find, in_order
from flax_surgery_hooks.rollback import Rollback
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.selection import Patterns
from flax_surgery_hooks.settling import check_on_error
from flax_surgery_hooks.structure import Reshape

_Function = TypeVar("_Function", bound=Callable[..., Any])


class HookSet:
    """Registered hooks; `SurgeryHooks` is the one that fires them."""

    __slots__ = ("_hooks", "_registered")

    def __init__(self) -> None:
        self._hooks: dict[str, Hook] = {}
        self._registered = 0

    def add(
        self,
        name: str,
        surgery: Any,
        *,
        params: Patterns,
        when: Schedule,
        exclude: Patterns | None = None,
        expect: int | None = None,
        opt_state: rules.OptStateRule = None,
        fresh: str = "mean",
        guard: Guard = "finite",
        figures: bool = True,
        histograms: bool = False,
        fields: Sequence[str] = (),
        priority: int = 0,
        apply_fn: Callable[..., Any] | None = None,
        tx: Any = None,
        on_reshape: Callable[[Any, Record], Any] | None = None,
        shardings: Callable[[str, Any], Any] | None = None,
        rollback: Rollback | None = None,
        on_error: str | None = None,
    ) -> None:
        """Registers a hook.

        Args:
          name: unique; part of metric names and of the key, so it should not change between runs.
          surgery: see `Surgery`.
          params: which leaves: a glob on `/`-joined paths, `re:...`, a predicate of (path, leaf), or a list of these.
          when: a schedule such as `every(200)` or `at(1_000)`.
          exclude: leaves to leave out, likewise.
          expect: how many leaves must be selected.
          opt_state: how slots follow: "transport", "carry", "keep", "reset", a function, or a mapping by kind of slot.
          fresh: what second moments of elements without history start from: "mean" of the survivors, or "init".
          guard: "finite": a result with new non-finite values is not applied; "off"; or, in addition to "finite", what
            the figures must hold: `"params/relative_change < 0.5"`, or a function of figures, see `guards`.
          figures: whether changes are measured and written.
          histograms: whether the writer gets histograms of the leaves before and after too. Until then up to 2**20
            elements of each stay on the device.
          fields: fields of the train state, such as `batch_stats`, whose leaves this hook can select too, as
            `batch_stats/...`; `**` takes them with the others.
          priority: hooks due at the same step fire from the highest to the lowest, then as registered.
          apply_fn: for a surgery that changes shapes: the model function that goes with the new ones.
          tx: likewise the optimizer, if it has to be another object; its states must have the same structure.
          on_reshape: likewise `on_reshape(state, record) -> None or a state`, for what the trainer has to rebuild.
          shardings: likewise `shardings(path, leaf) -> a sharding, a PartitionSpec on the leaf's mesh, or None`: where
            leaves go whose shape changes, and their slots of that shape; `leaf` has shape and dtype of the new one. By
            default as its box names the mesh axes, else by the spec of the old one.
          rollback: keeps what a fire touched as it was before, to be put back by a metric or `undo`; see `Rollback`.
          on_error: what becomes of this hook's refused fires, where `SurgeryHooks(on_error=...)` is not to say it.

        Raises:
          HookError: the name is taken or malformed.
          SurgeryError: anything else that can be seen without a state.
        """
        with located(hook=name if isinstance(name, str) else quoted(name)):
            check_name(self._hooks, name)
            if not isinstance(when, Schedule):
                raise ScheduleError(
                    "`when=` is no schedule.", found=quoted(when), write="when=fsh.every(200) or fsh.at(1_000)"
                )
            if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
                raise HookError(
                    "`priority=` is a Python int.", found=quoted(priority), write="priority=0 (at most 64 bits)"
                )
            operation = make_operation(
                surgery, params=params, exclude=exclude, expect=expect, opt_state=opt_state, fresh=fresh, guard=guard,
                figures=bool(figures), histograms=bool(histograms), fields=fields,
            )  # fmt: skip
            if on_error is not None:
                check_on_error(on_error)
            if callable(check := getattr(surgery, "check_schedule", None)):
                check(when)
            reshape = Reshape(apply_fn, tx, on_reshape, shardings)
            _check_rollback(rollback, operation, reshape)
        self._hooks[name] = Hook(name, operation, when, priority, self._registered, reshape, rollback, on_error)
        self._registered += 1
        self._added(self._hooks[name])

    def register(
        self, *, params: Patterns, when: Schedule, name: str | None = None, **kwargs: Any
    ) -> Callable[[_Function], _Function]:
        """Decorator that registers a function as a hook, by default under its own name; arguments as for `add`."""

        def decorate(function: _Function) -> _Function:
            self.add(name or function.__name__, function, params=params, when=when, **kwargs)
            return function

        return decorate

    def remove(self, name: str) -> None:
        """Unregisters a hook; its past fires stay recorded.

        Raises:
          HookError: there is no such hook.
        """
        find(self._hooks, name)
        del self._hooks[name]
        self._removed(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all hooks, in the order in which they fire when due at one step."""
        return tuple(hook.name for hook in self._ordered())

    def to_config(self, *, objects: Mapping[str, Any] | None = None) -> Any:
        """The `ConfigDict` from which `from_config` makes these hooks again, given the same `objects`.

        Raises:
          ConfigError: a hook holds what no config can, such as a plain function as its surgery; it names all of them.
        """
        from flax_surgery_hooks import config_export

        return config_export.to_config(self._ordered(), objects)

    def hparams(self) -> dict[str, Any]:
        """What the hooks are, as hyperparameters: "surgery/<hook>/<field>" -> number, string or None.

        The writer gets them at the first call. TensorBoard keeps the first ones of a run: a trainer that writes its own
        adds these, `writer.write_hparams({**hparams, **hooks.hparams()})`.
        """
        return {name: value for hook in self._ordered() for name, value in hook.hparams().items()}

    def _added(self, hook: Hook) -> None:
        """Called with each new hook."""

    def _removed(self, name: str) -> None:
        """Called when a hook is gone."""

    def _named(self) -> list[tuple[str, Operation]]:
        return [(hook.name, hook.operation) for hook in self._ordered()]

    def _ordered(self) -> list[Hook]:
        return in_order(self._hooks.values())


def _check_rollback(rollback: Any, operation: Operation, reshape: Reshape) -> None:
    """Raises unless a hook can keep what its fires touch.

    Raises:
      HookError: it cannot.
    """
    if rollback is None:
        return
    if not isinstance(rollback, Rollback):
        raise HookError(
            "`rollback=` is no `fsh.Rollback`.", found=typed(rollback), write="rollback=fsh.Rollback(steps=200)"
        )
    brought = [field.name for field in dataclasses.fields(reshape) if getattr(reshape, field.name) is not None]
    if brought or operation.edit.edit_optimizer is not None:
        raise HookError(
            "`rollback=` puts leaves back, and this hook may change the structure of the state.",
            found=", ".join(f"{name}=" for name in brought) or f"{operation.edit.name}, which edits the optimizer",
            write="rollback= on hooks that keep shapes; a checkpoint from before the fire for others",
        )
