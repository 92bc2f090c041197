"""All processes of a run hold the same hooks, or all of them say so: compared before anything can hang on it.

A fire over a mesh of several processes is a program that all of them run; where one has another hook, another seed or
is at another step, its devices wait for ever for the others. So the first calls compare what every process holds: in
`hooks.init`, in the first trace of `hooks.in_graph`, and in the first call, `fire`, `preview` or `collect`, each time
as much as is known there (hooks, then also the state's leaves, then also the step), and again after hooks were added or
removed. That is a few messages through the key-value store of `jax.distributed`, no work for the devices, and nothing
in a call that does nothing else.

Who does not come is waited for no longer than `SurgeryHooks(agree_secs=...)`. A process that was killed is noticed by
`jax.distributed` itself after `jax.distributed.initialize(heartbeat_timeout_seconds=...)`, 100 by default: those that
wait here then get the typed error at once, and JAX terminates them a moment later. One that raised waits at its exit
for the others, which get the error at the limit. A process that dies between two fires is not looked for: the train
step itself waits for it, and JAX ends that likewise.
"""

from __future__ import annotations

import itertools
import json
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from flax_surgery_hooks import fingerprint, processes
from flax_surgery_hooks.errors import AgreementError, HookError, quoted, shorten
from flax_surgery_hooks.registration import Hook

LIMIT_SECS = 300.0
"""How long processes wait for each other: as long as `jax.distributed.initialize` does."""
LONGEST_SECS = 2.0**31
"""What a timeout of JAX, in milliseconds, has room for."""
SHOWN = 2
HOOKS, STATE, STEP = "hooks", "state", "step"
_numbers = itertools.count()  # of comparisons in this process: the n-th of each are compared with each other


class Difference(NamedTuple):
    """Something that is not the same on all processes.

    Attributes:
      what: "hook", "state" or "call".
      name: the hook, or the path of the leaf.
      field: of the hook.
      values: process -> what it holds, of some processes that differ; None where there is nothing.
    """

    what: str
    name: str
    field: str
    values: dict[int, Any]

    def __str__(self) -> str:
        where = ", ".join(filter(None, (f"{self.what} {self.name!r}" if self.name else self.what, self.field)))
        values = (f"{shorten(_shown(value), 60)} on process {at}" for at, value in self.values.items())
        return f"{where}: {', '.join(values)}"


class Agreement:
    """What of some hooks is still to be compared.

    Attributes:
      pending: what of it, `HOOKS`, `STATE` and `STEP`.
    """

    __slots__ = ("_secs", "pending")

    def __init__(self, secs: Any):
        if isinstance(secs, bool) or not isinstance(secs, int | float) or not 0 < secs <= LONGEST_SECS:
            raise HookError("agree_secs= is a time in seconds.", found=quoted(secs), write="agree_secs=300")
        self._secs = float(secs)
        self.pending: set[str] = set()
        self.renew()

    def renew(self) -> None:
        """Says that the hooks have changed."""
        self.pending = {HOOKS, STATE, STEP}

    def compare(
        self,
        call: str,
        hooks: Sequence[Hook],
        settings: Callable[[], dict[str, Any]],
        state: Any = None,
        step: int | None = None,
    ) -> None:
        """Compares hooks, and what else is given, with those of the other processes; each has to make the same call.

        Args:
          call: which call this is.
          hooks: in the order in which they fire at one step.
          settings: returns what else has to be the same.
          state: the train state, if it has values.
          step: what the call says is `state.step`.

        Raises:
          AgreementError: something differs, or a process has not come in time; on every process.
        """
        given = {HOOKS: True, STATE: state is not None, STEP: step is not None}
        known = {name for name, is_given in given.items() if is_given}
        if not known & self.pending:
            return
        if jax.process_count() > 1:
            differing = _differences(_described(call, hooks, settings(), state, step), self._secs)
            if differing:
                raise _disagreement(differing)
        self.pending -= known


def _described(
    call: str, hooks: Sequence[Hook], settings: dict[str, Any], state: Any, step: int | None
) -> dict[str, Any]:
    """Everything that has to be the same, as JSON."""
    told: dict[str, Any] = {
        "call": {"is": call, "step": step},
        "settings": {**settings, "python": platform.python_version()},
        "order": [hook.name for hook in hooks],
        "hook": {hook.name: fingerprint.of_hook(hook) for hook in hooks},
    }
    if state is not None:
        beside = itertools.chain(settings["mirrors"], *(hook.operation.fields for hook in hooks))
        told["state"] = fingerprint.of_state(state, ("step", "params", "opt_state", "surgery", *dict.fromkeys(beside)))
    return told


def _differences(told: Mapping[str, Any], secs: float) -> list[Difference]:
    """What differs between the processes; nothing if all say the same."""
    text = json.dumps(told, sort_keys=True)
    name = f"flax_surgery_hooks/{next(_numbers)}"
    sums = processes.exchange(f"{name}/sum", f"{zlib.crc32(text.encode()):08x}{len(text)}", secs)
    if len(set(sums.values())) == 1:
        return []
    # Long texts only of one process of each kind, and no process raises, and so perhaps exits, while others still read.
    speakers = {one: at for at, one in sorted(sums.items(), reverse=True)}
    mine = text if jax.process_index() in speakers.values() else ""
    texts = processes.exchange(f"{name}/text", mine, secs)
    processes.exchange(f"{name}/read", "", secs)
    return compared({at: json.loads(texts[at]) for at in sorted(speakers.values())})


def compared(told: Mapping[int, Mapping[str, Any]]) -> list[Difference]:
    """What differs in what several processes say of their hooks.

    >>> one, other = {"hook": {"a": {"when": "every(5)"}}}, {"hook": {"a": {"when": "every(6)"}}}
    >>> [str(difference) for difference in compared({0: one, 3: other})]
    ["hook 'a', when: every(5) on process 0, every(6) on process 3"]
    """
    flat = {at: dict(_flat(one)) for at, one in told.items()}
    found = []
    for key in dict.fromkeys(itertools.chain.from_iterable(flat.values())):
        held = {at: one.get(key) for at, one in flat.items()}
        distinct = {json.dumps(value): at for at, value in reversed(held.items())}
        if len(distinct) > 1:
            found.append(_difference(key, {at: held[at] for at in sorted(distinct.values())}))
    return sorted(found, key=lambda one: ("call", "settings", "order", "hook", "state").index(one.what))


def _difference(key: tuple[str, ...], values: dict[int, Any]) -> Difference:
    what, *rest = key
    name = rest.pop(0) if what in ("hook", "state") and rest else ""
    return Difference(what, name, ".".join(rest), values)


def _flat(told: Any, above: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Path and value of what is no mapping; of a hook that not all processes hold only that it is there."""
    if not isinstance(told, Mapping):
        yield above, told
        return
    if len(above) == 2 and above[0] == "hook":
        yield above, "registered"
    for name, value in told.items():
        yield from _flat(value, (*above, str(name)))


def _disagreement(found: list[Difference]) -> AgreementError:
    absent = {one.name for one in found if one.what == "hook" and not one.field}
    found = [one for one in found if one.what != "hook" or not one.field or one.name not in absent]
    more = f"; {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    kinds = Counter(one.what for one in found)
    what = "states" if set(kinds) == {"state"} else "hooks" if not kinds["call"] else "calls"
    hook = next((one.name for one in found if one.what == "hook"), None)
    return AgreementError(
        f"The processes do not have the same {what}, and would wait for each other for ever.",
        hook=hook if what == "hooks" else None,
        differences=tuple(found),
        found="; ".join(map(str, found[:SHOWN])) + more,
        write="the same hooks, seed, calls and state on every process: one config and one code for all",
    )


def _shown(value: Any) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
