"""The runner in the trainer: which hooks are due, in what order they fire, and what is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from flax_surgery_hooks import failing, fires
from flax_surgery_hooks.abstract_state import structure_json
from flax_surgery_hooks.agreement import LIMIT_SECS, Agreement
from flax_surgery_hooks.ahead import behind_reshapes, check_ahead
from flax_surgery_hooks.collecting import Collector
from flax_surgery_hooks.donation import DONATE
from flax_surgery_hooks.errors import HookError, StateError, StepError, SurgeryError, located, quoted
from flax_surgery_hooks.keeping import Keeper, keep
from flax_surgery_hooks.ledger import Ledger, Record
from flax_surgery_hooks.making import bind_inputs
from flax_surgery_hooks.metrics import MetricWriter
from flax_surgery_hooks.mirrors import checked, original, viewed
from flax_surgery_hooks.operation import Operation
from flax_surgery_hooks.passes import Program
from flax_surgery_hooks.placement import off_mesh
from flax_surgery_hooks.planning import inputs_of_state
from flax_surgery_hooks.programs import Programs
from flax_surgery_hooks.registration import Hook, find
from flax_surgery_hooks.resuming import Resumable
from flax_surgery_hooks.settling import FAR, NEVER, Fired, Settler, check_on_error, read
from flax_surgery_hooks.steps import (
    check_concrete,
    check_fire_step,
    check_first_step,
    checked_step,
    passed_steps,
    step_of,
)  # fmt: skip
from flax_surgery_hooks.structure import called_back
from flax_surgery_hooks.targets import placer
from flax_surgery_hooks.train_state import written
from flax_surgery_hooks.watching import WATCHING, Watching

_Function = TypeVar("_Function", bound=Callable[..., Any])


class SurgeryHooks(Resumable):
    """Hooks that edit a train state between train steps. Call them after each step: `state = hooks(step, state)`.

    Args:
      seed: seed of all keys that surgeries get; the same seed, names and steps draw the same numbers in every run.
      writer: a CLU metric writer (see `metrics.MetricWriter`), or None.
      ledger: file for the records (JSON lines), or None to keep them in memory only.
      on_record: called with each `Record` as it is written.
      on_error: what a refused fire (the guard kept it out; the state keeps the old values) does when it is noticed,
        some steps later: "raise" a `RefusedError`, "skip": record it and go on, "retry_next": fire again, there and
        `settle_after` steps after each attempt, until one passes; fires in graph are not repeated. See `hooks.add` too.
      strict_steps: whether a call whose step jumps over due ones is an error; by default the hook fires once, and the
        record says which steps were passed.
      settle_after: how many steps after a fire its figures are read, so that nothing waits for the device.
      donate: whether a fire may take the memory of the leaves that it edits, which are gone then, as a train step with
        `donate_argnums` does with its whole state: "auto" where the new ones do not fit beside them (as far as the
        backend tells), "always" or "never". Where several hooks fire in one call only the last one may, so that an
        error leaves the state whole; one that changes shapes never does.
      mirrors: fields of the train state that hold trees like the parameters, such as averages and target networks, and
        what they hold (see `rules.KINDS`): `{"ema_params": "param"}`. They move with the parameters as slots do.
      on_fire: `on_fire(record, state) -> None or a state`, called after each fire on the host that is put into the
        state, for what the trainer has to rebuild; the verdict of the guard may not be known by then.
      agree_secs: of several processes, how long each waits at its first call until all have said what hooks they hold;
        see `agreement`.

    Raises:
      HookError: an argument that is not one of these.

    >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
    >>> hooks = fsh.SurgeryHooks()
    >>> hooks.add("halve", lambda w: w / 2, params="w", when=fsh.at(1))
    >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    >>> hooks(1, state.replace(step=1)).params["w"].tolist()
    [0.5, 0.5]
    """

    # An idle call is two comparisons of integers; slots make reading these a quarter cheaper.
    __slots__ = (
        "_on_fire", "_programs", "_tried", "_unchecked", "donate", "strict_steps",
    )  # fmt: skip

    def __init__(
        self,
        *,
        seed: int = 0,
        writer: MetricWriter | None = None,
        ledger: Any = None,
        on_record: Callable[[Record], None] | None = None,
        on_error: str = "raise",
        strict_steps: bool = False,
        settle_after: int = 4,
        donate: str = "auto",
        mirrors: Mapping[str, str] | None = None,
        on_fire: Callable[[Record, Any], Any] | None = None,
        agree_secs: float = LIMIT_SECS,
    ):
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise HookError(
                "SurgeryHooks(seed=...) is a Python int.", found=quoted(seed), write="seed=0 (at most 64 bits)"
            )
        check_on_error(on_error)
        if isinstance(settle_after, bool) or not isinstance(settle_after, int) or settle_after < 0:
            raise HookError("settle_after= is a number of steps.", found=quoted(settle_after), write="settle_after=4")
        if not isinstance(donate, str) or donate not in DONATE:
            raise HookError("Unknown donate=.", found=quoted(donate), write=f"one of {', '.join(DONATE)}")
        self.seed = seed
        self.donate = donate
        self._mirrored = checked(mirrors)
        self.ledger = Ledger(ledger, on_record)
        self.strict_steps = strict_steps
        self._agreement = Agreement(agree_secs)
        self._watching = Watching()
        self._keeper = Keeper(self._hooks, self._watching)
        self._settler = Settler(self.ledger, writer, on_error, settle_after, self._keeper.drop)
        self._collector = Collector(settle_after, self.ledger.path)
        self._programs: dict[str, dict[Hashable, Programs]] = {}
        self._tried: dict[Programs, int] = {}
        self._unchecked: set[str] = set()
        self._counts = {}
        self._past, self._resumed, self._known, self._accepted = {}, None, frozenset(), frozenset()
        self._saved = None
        self._started = False
        self._last = -1
        self._wake = -1
        self._on_fire = on_fire

    @classmethod
    def from_config(cls, config: Any, *, objects: Mapping[str, Any] | None = None, **kwargs: Any) -> SurgeryHooks:
        """Hooks as an `ml_collections.ConfigDict` (or mapping) of `config.hook(...)`s names them.

        Args:
          config: name -> hook config; hooks with `enabled=False` are left out.
          objects: values for surgery fields that a config cannot hold, such as functions, by field name.
          **kwargs: as for `SurgeryHooks`.

        Raises:
          ConfigError: everything that is wrong with the config, at once.
        """
        from flax_surgery_hooks import config as configs  # the config is an edge; the runner does not need it

        hooks = cls(**kwargs)
        for spec in configs.build(config, objects):
            hooks.add(**vars(spec))
        return hooks

    def _added(self, hook: Hook) -> None:
        self._programs[hook.name] = {}
        self._unchecked.add(hook.name)
        self._watching.add(hook.name, hook.when)
        self._agreement.renew()
        self._wake = -1  # look at the new hook at the next call
        if self._started:
            fires.note_missed(self.ledger, hook.name, hook.when, self._last)

    def _removed(self, name: str) -> None:
        del self._programs[name]
        self._unchecked.discard(name)
        self._watching.remove(name)
        super()._removed(name)
        self._agreement.renew()
        self._wake = -1

    def __call__(self, step: int, state: Any = None, **inputs: Any) -> Any:
        """Fires what is due. When nothing is, the same state object comes back at the cost of a comparison.

        Args:
          step: what `state.step` holds: train steps applied so far, a Python int that goes forward.
          state: the train state after that step.
          **inputs: whatever surgeries ask for by name; arrays, numbers and pytrees of them are traced. `on_metric` and
            the like look at theirs in each call, which then costs some microseconds (see `watching`).

        Returns:
          The state, edited if something was due. The first call checks every hook against it.

        Raises:
          SurgeryError: see `flax_surgery_hooks.errors`. The given state is never half-edited.
        """
        # Two comparisons, as a pair of ints is compared fastest. What step and state are is looked at in the first two
        # calls and wherever something is due: a line of a trainer passes the same sort of thing each time.
        try:
            if step < self._wake and step > self._last:
                self._last = step
                return state
        except Exception:
            pass  # whatever cannot be compared is no step: `_attend` says so
        if self._wake == WATCHING and self._watching.passes(step, self._last, inputs):
            self._last = step
            return state
        return self._attend(step, state, inputs)

    def fire(self, name: str, state: Any, step: int | None = None, **inputs: Any) -> Any:
        """Fires one hook by hand, whether due or not, with the arithmetic and keys of the loop.

        Args:
          name: the hook.
          state: the train state.
          step: what `state.step` holds; None reads it, which waits for the device.
          **inputs: as for a call.

        Returns:
          The edited state.
        """
        check_concrete(state)
        hook = find(self._hooks, name)
        self._agree(f"hooks.fire({name!r})", state, step)
        step = step_of(state) if step is None else checked_step(step)
        self._check(hook, state, inputs)
        state, fired = self._fire(hook, state, step, inputs, self.donate)
        state = written(state)
        self._record([fired])
        return state

    def preview(self, name: str, state: Any, step: int | None = None, **inputs: Any) -> Record:
        """The record that a fire would leave, with its figures; commits nothing. Arguments as for `fire`."""
        check_concrete(state)
        hook = find(self._hooks, name)
        self._agree(f"hooks.preview({name!r})", state, step)
        step = step_of(state) if step is None else checked_step(step)
        self._check(hook, state, inputs)
        _, fired = self._fire(hook, state, step, inputs, "never", commit=False)
        return replace(read(fired), event="preview", id=None)

    def settings(self) -> dict[str, Any]:
        """What holds for all hooks, and must be the same on every process."""
        return {**super().settings(), "strict_steps": self.strict_steps, "donate": self.donate}

    def programs(self, name: str) -> list[Program]:
        """What a hook has compiled: one entry per shape, dtype and placement of leaves, and one for each input that its
        surgery derives, see `passes.Program`.

        Args:
          name: the hook.

        Raises:
          HookError: there is no such hook.

        >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
        >>> hooks = fsh.SurgeryHooks()
        >>> hooks.add("halve", lambda w: w / 2, params="**", when=fsh.at(1), figures=False, guard="off")
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(3)}
        >>> _ = hooks(1, fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1)).replace(step=1))
        >>> [(program.leaves[0][0], program.served) for program in hooks.programs("halve")]
        [((2,), 2), ((3,), 1)]
        """
        find(self._hooks, name)
        by_static = self._programs[name].values()
        compiled: list[Any] = [each for programs in by_static for each in programs.compiled.values()]
        derived: list[Any] = [each for programs in by_static for each in programs.derive.programs.values()]
        with off_mesh(()):  # as they were compiled
            return [each.describe() for each in compiled + derived]

    def _attend(self, step: Any, state: Any, inputs: dict[str, Any]) -> Any:
        """A call that is not idle: something has to be done, or is wrong."""
        if state is None:
            raise StateError(
                "Hooks edit the state, so they need it and return it.",
                found="hooks(step)",
                write="state = hooks(step, state)",
            )
        step = checked_step(step)
        check_concrete(state)
        if self._started and step <= self._last:
            raise StepError(
                "Steps go forward.",
                found=f"step {step} after {self._last}",
                write="one call for each value of state.step; a new SurgeryHooks to run the steps again",
            )
        self._agree("hooks(step, state)", state, step)
        first = not self._started
        if first:
            self._start(step, state)
        self._check_all(state, inputs)
        self._gather(self._collector.ripe(self._ordered(), step))
        if step > self._last:  # it is the same where a run goes on at the very step that it saved
            self._watching.look(step, inputs)
        self._settler.settle(step)
        fired: list[Fired] = []
        counts = dict(self._counts)
        try:
            state, put_back = self._keeper.rolled_back(state, step, self.mirrors)
            due = [(hook, hook.planned_steps(self._last, step)) for hook in self._ordered()]
            again = self._settler.retries(step)
            due = [pair for pair in due if pair[1] or pair[0].name in again or self._watching.triggers(pair[0].name)]
            self._collector.note(state, [hook.name for hook, _ in due if hook.name in self._collector.traced], step)
            due = [(hook, steps) for hook, steps in due if hook.name not in self._collector.traced]
            for hook, steps in due:
                donate = self.donate if hook is due[-1][0] else "never"
                passed = passed_steps(hook.name, steps, step, self._last, strict=self.strict_steps)
                state, one = self._fire(hook, state, step, inputs, donate, passed)
                fired.append(one)
            records = self._settler.fired(*fired, before=[one.record for one in put_back])
            state = written(state) if fired or put_back else state
        except BaseException:
            self._counts = counts  # nothing of this call happened: the caller keeps the state it passed
            raise
        self._last = step
        self._watching.clear()
        self._keeper.commit(put_back, step)
        for record, one in zip(records, fired, strict=True):
            self._keeper.note(record, one)
        self._rewake()
        if first:
            self._wake = -1  # one call before the loop and one in it are two lines, so the second is looked at as well
        return state

    def _start(self, step: int, state: Any) -> None:
        """The first call: compares `step` with the state's own, and takes due steps before it as passed."""
        check_first_step(step, state)
        since = step - 1 if self._resumed is None else self._resume_at(step)
        self._begin(step)
        self._last, self._collector.first = since, step
        if self._resumed is not None:  # hooks that are past may name leaves that are gone, as after their own fire
            self._unchecked -= {name for name, hook in self._hooks.items() if hook.next_possible(since) is None}
        for hook in self._ordered():
            if hook.name not in self._collector.traced and hook.name not in self._known:
                fires.note_missed(self.ledger, hook.name, hook.when, since)

    def _begin(self, step: int) -> None:
        """Writes that a session of hooks begins."""
        self.ledger.write(Record(event="run", step=step, detail=fires.versions_json(self.seed)))
        self._started = True
        self._last = step
        self._settler.started(self.hparams())

    def _check_all(self, state: Any, inputs: dict[str, Any]) -> None:
        """Checks the hooks that have not been checked, on this state and on the shapes it will have."""
        unchecked = sorted(self._unchecked, key=list(self._hooks).index)
        if not unchecked:
            return
        later = behind_reshapes(self._ordered(), self._last)
        for name in unchecked:
            self._keeper.check(self._hooks[name], inputs)
            try:
                self._check(self._hooks[name], state, inputs)
            except SurgeryError:
                if name not in later:
                    raise
                self._unchecked.discard(name)  # what it will meet is looked at below
        try:
            with off_mesh(state):
                check_ahead(self._ordered(), self._last, state, inputs, self.seed, self.mirrors)
        except BaseException:
            self._unchecked.update(unchecked)  # a call that tries again is told again
            raise

    def _check(self, hook: Hook, state: Any, inputs: dict[str, Any]) -> None:
        """Finds everything that can be wrong with a hook on this state, without editing anything."""
        if hook.name not in self._unchecked:
            return
        with located(hook=hook.name):
            operation, arrays = bind_inputs(hook.operation, inputs)
            key = fires.fire_key(operation, self.seed, hook.name, 0, 0)
            held, reshape = viewed(state, self.mirrors, hook)
            programs = self._compiled(hook, operation, held)
            arrays = inputs_of_state(operation, state, key, 0, arrays, programs.derive.of_state)
            with off_mesh(state):
                fires.prepare(programs, held, hook.name, key, 0, arrays, reshape)
        self._unchecked.discard(hook.name)

    def _fire(
        self,
        hook: Hook,
        state: Any,
        step: int,
        inputs: dict[str, Any],
        donate: str,
        passed: tuple[int, ...] = (),
        commit: bool = True,
    ) -> tuple[Any, Fired]:
        start = time.perf_counter()
        with located(hook=hook.name, step=step):
            check_fire_step(step)
            operation, arrays = bind_inputs(hook.operation, inputs)
            count = self._counts.get((hook.name, step), 0)
            key = fires.fire_key(operation, self.seed, hook.name, step, count)
            held, reshape = viewed(state, self.mirrors, hook)
            programs = self._compiled(hook, operation, held)
            donate = donate if hook.rollback is None else "never"
            tried = self._tried.get(programs) == len(programs.compiled)
            if not tried:
                failing.wait(state)  # what fails here is the train step
            arrays = inputs_of_state(operation, state, key, step, arrays, programs.derive.of_state)
            with off_mesh(state), failing.explained(state, self._saved):
                before = self._keeper.before(hook, held) if commit else None
                held, fired = fires.fire(
                    programs, held, hook.name, key, step, arrays, reshape, commit=commit, donate=donate
                )
                kept = keep(before, hook, held)
                if not tried:  # a program that has just been compiled: that it runs is worth to wait for
                    failing.wait(held)
            self._tried[programs] = len(programs.compiled)
            given, state = state, original(held)
            seconds = time.perf_counter() - start
            triggers = self._watching.triggers(hook.name)
            record = replace(fired.record, hook=hook.name, step=step, passed=passed, triggers=triggers, seconds=seconds)
            if fired.reshaped:
                state = self._refitted(state)
                state = hook.reshape.finish(state, record)
                record = replace(record, structure=structure_json(state))
                self._unchecked.update(name for name, other in self._hooks.items() if other.next_possible(step))
            if self._on_fire is not None and commit and state is not given:
                state = called_back("on_fire", self._on_fire, state, record, state)
        if commit:
            self._counts[hook.name, step] = count + 1
        return state, replace(fired, record=record, on_error=hook.on_error, kept=kept)

    def _compiled(self, hook: Hook, operation: Operation, state: Any) -> Programs:
        by_static = self._programs[hook.name]
        if operation.static not in by_static:
            place = placer(hook.reshape.shardings, state.params) if hook.reshape.declared else None
            by_static[operation.static] = Programs(operation, place)
        return by_static[operation.static]

    def _record(self, fired: list[Fired]) -> None:
        self._gather(fired)
        self._rewake()

    def _rewake(self) -> None:
        """The next step at which a call has anything to do; unchecked hooks and the first call cannot wait."""
        if not self._started or self._unchecked:
            self._wake = -1
            return
        due = (hook.next_planned(self._last) for hook in self._hooks.values())
        far = FAR if self._last < FAR else NEVER
        waiting = (self._settler.wake, self._collector.wake, self._keeper.wake)
        self._wake = self._watching.held(min([far, *waiting, *(step for step in due if step is not None)]))
