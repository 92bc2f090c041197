"""Hooks in a compiled step: room in the state for what they remember and measure, their traced form, and what the host
reads of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax

from flax_surgery_hooks import checks, fires, in_graph, memory, room
from flax_surgery_hooks.agreement import Agreement
from flax_surgery_hooks.collecting import Collector
from flax_surgery_hooks.errors import HookError, quoted
from flax_surgery_hooks.hook_set import HookSet
from flax_surgery_hooks.ledger import Ledger, Record
from flax_surgery_hooks.memory_mirrors import remembered_by
from flax_surgery_hooks.mirrors import Fields, Mirrors
from flax_surgery_hooks.placement import off_mesh
from flax_surgery_hooks.plan import Plan
from flax_surgery_hooks.planner import Planner
from flax_surgery_hooks.registration import Hook
from flax_surgery_hooks.settling import NEVER, Fired, Settler
from flax_surgery_hooks.steps import check_concrete, checked_step, planned_from, step_of
from flax_surgery_hooks.together import fire_due
from flax_surgery_hooks.train_state import written


class TracedHooks(HookSet):
    """The part of `SurgeryHooks` that works under `jax.jit`."""

    __slots__ = ("_agreement", "_collector", "_mirrored", "_settler", "_started", "_wake", "ledger", "seed")

    seed: int
    _mirrored: Fields
    ledger: Ledger
    _agreement: Agreement
    _collector: Collector
    _settler: Settler
    _last: int
    _started: bool
    _wake: int

    def init(self, state: Any, *, fires: int = 8) -> Any:
        """The state with room, in its field `surgery`, for what surgeries remember and for the figures of fires in
        graph. Once all hooks are added, before the first train step: a later change of the state's structure would
        compile the step anew; and once more where the state has moved to other devices.

        What is there already, from a checkpoint, is kept. Works on concrete, abstract and traced states; on a concrete
        one it waits for the device, and sees where the leaves lie, without which figures cost more in graph.

        Args:
          state: the train state.
          fires: for how many fires in graph of each hook there is room until `collect`; 0 where only `observe` runs
            in the train step and fires are the host's.

        Raises:
          StateError: surgeries remember and the state has no such field, or it holds what does not fit.
          HookError: `fires` is no such number.
        """
        if isinstance(fires, bool) or not isinstance(fires, int) or fires < 0:
            raise HookError("init(fires=...) is a number of fires.", found=quoted(fires), write="hooks.init(state)")
        if checks.concrete(state):
            self._agree("hooks.init", state)
        with off_mesh(state):
            state = memory.fitted(state, self._named(), self.seed)
            state = written(room.fitted(state, self._graphable(), fires))
        self._collector.begin(state, self.mirrors, self._graphable())
        return state

    def in_graph(self, state: Any, **inputs: Any) -> Any:
        """The traced form of a call, for inside the jitted train step or a scan of many steps.

        First comes `observe`, then the fires that are due at `state.step`, each under a `lax.cond` over the leaves that
        it touches.

        They do the same to the state as fires on the host, with the same keys. Their figures wait in the state until
        `collect`, or a call of the hooks, reads them. From the first trace on a call leaves these hooks alone, and does
        what stays on the host: hooks that bring `apply_fn=` or the like, that switch the optimizer, keep histograms or
        old values for a rollback, or whose schedule only the host can decide. Refused fires in graph are recorded, and
        never repeated, whatever `on_error` says; nor is `on_fire` called.

        Args:
          state: the train state after the optimizer's update, traced or not.
          **inputs: whatever surgeries ask for by name.

        Returns:
          The state, of the same structure.

        Raises:
          StateError: `init` has not been called, or the state has no field `surgery` or no step.
          HookError: no hook has anything to do in graph.
          StructureError: a fire changes the shape of a leaf, and the hook does not say so.
        """
        self._agree("hooks.in_graph")
        hooks, graphable = self._ordered(), self._graphable()
        in_graph.check_not_empty(hooks, any(hook.operation.edit.observe is not None for hook in hooks))
        room.check_ready(state, graphable)
        state = memory.observe(state, self._named(), self.seed, inputs)
        state, about = fire_due(state, graphable, self.seed, inputs, self.mirrors, self._collector.state)
        self._collector.traced |= about
        for name in about:
            self._settler.forget(name)
        self._wake = -1  # a call before the trace may have thought that these hooks are the host's
        return written(state)

    def wrap(self, train_step: Callable[..., Any], **jit: Any) -> Callable[..., Any]:
        """Two compiled programs of a train step: one with `in_graph`, for steps at which a hook is due, and one with
        `observe` alone, for all others.

        A program that can fire is larger, and on CPU the mere size of what is not run costs time at every call (some 25
        us for each leaf of each hook with figures, on two cores). Here an idle step runs what the train step would be
        without fires. Each program is compiled when it is first needed. Both round as XLA chooses for each: to the bit
        a run is the same as another one that is wrapped.

        Args:
          train_step: `train_step(state, *args) -> state` or a tuple that begins with the state; not jitted.
          **jit: options of `jax.jit`, such as `donate_argnums=0` and shardings; places are those of `train_step`.

        Returns:
          `step(number, state, *args)`, with what `state.step` will hold after the step in front, a Python int.

        >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
        >>> hooks = fsh.SurgeryHooks()
        >>> hooks.add("halve", fsh.surgeries.Scale(0.5), params="**", when=fsh.at(2))
        >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
        >>> state = hooks.init(state.replace(step=jnp.int32(0)))
        >>> step = hooks.wrap(lambda state: state.apply_gradients(grads={"w": jnp.zeros(2)}))
        >>> for number in (1, 2, 3):
        ...     state = step(number, state)
        >>> state.params["w"].tolist(), [record.step for record in hooks.collect(state)]
        ([0.5, 0.5], [2])
        """

        def then(last: Callable[[Any], Any]) -> Callable[..., Any]:
            @functools.wraps(train_step)
            def step(*args: Any, **kwargs: Any) -> Any:
                result = train_step(*args, **kwargs)
                return (last(result[0]), *result[1:]) if type(result) is tuple else last(result)

            return jax.jit(step, **jit)

        idle, firing = then(self.observe), then(self.in_graph)

        @functools.wraps(train_step)
        def wrapped(number: int, *args: Any, **kwargs: Any) -> Any:
            due = any(hook.when.is_due(checked_step(number)) for hook in self._graphable())
            return (firing if due else idle)(*args, **kwargs)

        return wrapped

    def observe(self, state: Any, **inputs: Any) -> Any:
        """What hooks do at every step, and no fires: their surgeries' `observe`. For inside the jitted train step of a
        loop that calls the hooks after it, or a scan.

        Hooks are observed in the order in which they fire; nothing is measured or recorded, slots stay as they are.

        Args:
          state: the train state, traced or not.
          **inputs: whatever an `observe` asks for by name.

        Returns:
          The state, of the same structure.

        Raises:
          StateError: `init` has not been called.
        """
        self._agree("hooks.observe")
        return written(memory.observe(state, self._named(), self.seed, inputs))

    def collect(self, state: Any) -> tuple[Record, ...]:
        """Records the fires in graph since the last time, and reads the figures of all fires; waits for the device.

        For loops that scan many steps in one call: once after each, or at least as often as `init(fires=...)` allows. A
        loop that calls the hooks after each step need not: they do this by themselves, some steps later.

        Args:
          state: the train state.

        Returns:
          The new "settled" and "refused" records.

        Raises:
          RefusedError: the guard kept a result out, and `on_error` is "raise".
        """
        check_concrete(state)
        self._agree("hooks.collect", state)
        if not self._started:
            self._begin(step_of(state))
        known = len(self.ledger.records)
        self._gather(self._collector.read(self._ordered(), room.buffers(state)))
        self._settler.settle(NEVER)
        self._rewake()
        return tuple(one for one in self.ledger.records[known:] if one.event in ("settled", "refused"))

    def plan(self, state: Any, num_steps: int, *, step: int | None = None, **inputs: Any) -> Plan:
        """What would fire up to a step, on which leaves and slots, and what becomes of their shapes; nothing is run.

        A dry run by `jax.eval_shape`: no array is allocated and no edit compiled (an optimizer of a new structure is
        probed, as at a first call, on a few elements). What the values of leaves show, such as an edit that mixes
        elements, and what an `on_reshape=` does, is left to the first call.

        Args:
          state: the train state, concrete or abstract. It need not have been through `init`.
          num_steps: train steps of the whole run, the last value of `state.step` that is planned.
          step: what `state.step` holds; None reads it, which waits for the device, and is 0 where it is abstract. Fires
            at this step are over, but at step 0 if the hooks have not been called yet.
          **inputs: whatever surgeries ask for by name. Where one is not given, the plan says so; fires that may change
            shapes by it are not foreseen.

        Returns:
          The plan; `print` shows it as a table. Fires that values of the train loop decide are listed as "when ...".

        Raises:
          SurgeryError: what would be raised at the first call or, of shapes that come later, at a fire.

        >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
        >>> hooks = fsh.SurgeryHooks()
        >>> hooks.add("halve", fsh.surgeries.Scale(0.5), params="w", when=fsh.every(2))
        >>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.adam(0.1))
        >>> [(fire.step, fire.hook, fire.paths) for fire in hooks.plan(state, 5).fires()]
        [(2, 'halve', ('w',)), (4, 'halve', ('w',))]
        """
        start = planned_from(state) if step is None else checked_step(step)
        after = -1 if start == 0 and not self._started else start
        with off_mesh(()):  # nothing here has values
            return Planner(self._ordered(), inputs, self.seed, self.mirrors).plan(
                state, start, after, checked_step(num_steps)
            )

    def flush(self) -> None:
        """Reads the figures of all fires now, which waits for the device, and flushes the writer.

        Of fires in graph those at which the hooks were called; `collect` reads the others.
        """
        self._gather(self._collector.ripe(self._ordered(), NEVER))
        self._settler.flush()
        self._rewake()

    def settings(self) -> dict[str, Any]:
        """What holds for all hooks, and must be the same on every process."""
        mirrors = {"mirrors": dict(self._mirrored), "ledger": self.ledger.trouble()}
        return {**json.loads(fires.versions_json(self.seed)), **mirrors, **self._settler.settings}

    @property
    def mirrors(self) -> Mirrors:
        """What moves with the parameters: fields of the state, and what hooks remember."""
        remembered = filter(None, map(remembered_by, self._hooks.values()))
        return Mirrors(self._mirrored, tuple(remembered))

    def _agree(self, call: str, state: Any = None, step: int | None = None) -> None:
        """Compares what this process holds with the others, as far as that has not been done; see `agreement`."""
        if self._agreement.pending:
            self._agreement.compare(call, self._ordered(), self.settings, state, step)

    def _refitted(self, state: Any) -> Any:
        """The state with room for memory and figures as its new shapes need it."""
        before = state
        state = memory.fitted(state, self._named(), self.seed, anew=True)
        held = room.buffers(before)
        if held:
            self._gather(self._collector.read(self._ordered(), held))
            capacity = next(iter(held.values()))["steps"].shape[0]
            state = room.fitted(state, self._graphable(), capacity, anew=True)
            self._collector.renewed(before, state)
        return state

    def _graphable(self) -> list[Hook]:
        return [hook for hook in self._ordered() if in_graph.why_on_host(hook) is None]

    def _gather(self, fired: list[Fired]) -> None:
        self._settler.fired(*fired)

    def _begin(self, step: int) -> None:
        """Called at the first step that the host sees."""

    def _rewake(self) -> None:
        """Called when it is to be found out anew at which step a call has something to do."""
