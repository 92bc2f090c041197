"""Runs one input of the fuzz tests, and says what became of it: accepted, and how often it fired, or which error."""

from __future__ import annotations

import collections
import contextlib
import functools
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from fuzz_inputs import Input, as_config_dict
from ml_collections import ConfigDict, config_flags

import flax_surgery_hooks as fsh

LIMIT_SECS = 60
"""A call that takes longer hangs."""


class Outcome(NamedTuple):
    """What became of an input.

    Attributes:
      kind: "accepted", "refused" (a `SurgeryError`), "foreign" (what comes before the library refused it: absl,
        `ml_collections`) or "escaped".
      what: the class of the error, and for one that escaped the line of the library where it came from.
      fires: how many fires are recorded.
      error: the exception, or None.
    """

    kind: str
    what: str
    fires: int = 0
    error: BaseException | None = None


class Hung(BaseException):
    """A call that did not come back; no `Exception`, so that nobody catches it."""


@contextlib.contextmanager
def limited(secs: int | None = None) -> Iterator[None]:
    """Raises `Hung` in a body that takes longer; `LIMIT_SECS` if nothing is said."""
    secs = LIMIT_SECS if secs is None else secs

    def ring(*_: Any) -> None:
        raise Hung(f"more than {secs} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(secs)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judged(run: Callable[[], int]) -> Outcome:
    """What becomes of a call that returns how often something fired."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of `re` about a pattern, which is the user's
            return Outcome("accepted", "", run())
    except fsh.SurgeryError as error:
        try:
            text = str(error)
        except Exception as other:  # a message that cannot be shown is no message
            return Outcome("escaped", f"{type(other).__name__} in the message of {site(error)}", 0, other)
        if len(text) > 20_000:
            return Outcome(
                "escaped", f"a message of {len(text) // 10_000}0,000 characters from {site(error)}", 0, error
            )
        return Outcome("refused", type(error).__name__, 0, error)
    except Foreign as error:
        return Outcome("foreign", type(error.__cause__).__name__, 0, error)
    except (Exception, Hung) as error:
        return Outcome("escaped", f"{type(error).__name__} at {site(error)}", 0, error)


def site(error: BaseException) -> str:
    """The innermost line of the library that an exception went through."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "flax_surgery_hooks/" in one.filename]
    return f"{frames[-1].filename.rpartition('flax_surgery_hooks/')[2]}:{frames[-1].lineno}" if frames else "nowhere"


class Foreign(Exception):
    """Something before the library refused the input; the original is its `__cause__`."""


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Marks what others raise."""
    try:
        yield
    except Exception as error:
        raise Foreign from error


# --- Configs.


def run_config(given: Input) -> int:
    """Builds the hooks and runs a few steps of a loop with them; how often they fired."""
    hooks = fsh.SurgeryHooks.from_config(configured(given), objects=given.objects, **given.settings)
    return trained(hooks, given) if given.form == "host" else scanned(hooks, given)


def configured(given: Input) -> Any:
    """The config in the form in which a user writes it."""
    hooks = given.hooks
    if given.entry in ("hook", "shell") and isinstance(hooks, dict):
        hooks = {name: _as_hook(one) for name, one in hooks.items()}
    if given.entry == "dict":
        return hooks
    with foreign():
        hooks = as_config_dict(hooks)
    return overridden(hooks, given.overrides) if given.entry == "shell" else hooks


def _as_hook(one: Any) -> Any:
    """`fsh.config.hook(...)` with these arguments, if they can be arguments."""
    if not isinstance(one, dict) or not all(isinstance(key, str) for key in one):
        return one
    rest = {key: value for key, value in one.items() if key != "surgery"}
    return fsh.config.hook(one.get("surgery"), **rest)


def overridden(hooks: Any, overrides: tuple[tuple[str, str], ...]) -> Any:
    """The hooks after absl has read `--config.surgery.<first hook>.<key>=<text>` for each override."""
    with foreign():
        config = ConfigDict({"surgery": hooks})
        first = next(iter(config.surgery))
        argv = ["train.py", *(f"--config.surgery.{first}.{key}={text}" for key, text in overrides)]
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
        return values.config.surgery


@functools.cache
def first_state(optimizer: str) -> Any:
    """A train state of two leaves; the same object each time, so that its train step is compiled once."""
    tx = {
        "sgd": lambda: optax.sgd(0.1),
        "momentum": lambda: optax.sgd(0.1, momentum=0.9),
        "adamw": lambda: optax.adamw(1e-3),
        "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        "freezable": lambda: optax.chain(fsh.optax.freezable(optax.sgd(0.1)), fsh.optax.rewarm(3)),
    }[optimizer]()
    params = {"dense": {"kernel": jnp.linspace(0.1, 1.0, 6).reshape(2, 3), "bias": jnp.array([0.5, -0.5, 2.0])}}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)
    return state.replace(step=jnp.int32(0))


@functools.cache
def train_step() -> Any:
    return jax.jit(lambda state: state.apply_gradients(grads=state.params))


def trained(hooks: fsh.SurgeryHooks, given: Input) -> int:
    """The loop of a trainer that calls the hooks at these steps."""
    state, applied = first_state(given.optimizer), 0
    for step in given.steps:
        while applied < step:
            state, applied = train_step()(state), applied + 1
        loss = 10.0 / (1 + step % 4)
        metrics = {"loss": jnp.float32(loss), "nan": float("nan"), "deep": {"loss": loss}, "count": step * 10}
        state = hooks(step, state, metrics=metrics, tokens=step * 40)
    hooks.flush()
    return len([record for record in hooks.ledger.records if record.event == "fired"])


def scanned(hooks: fsh.SurgeryHooks, given: Input) -> int:
    """The same in one compiled loop."""
    state = hooks.init(first_state(given.optimizer), fires=2)

    def step(state: Any, _: Any) -> tuple[Any, None]:
        return hooks.in_graph(state.apply_gradients(grads=state.params)), None

    state, _ = jax.lax.scan(step, state, None, length=given.steps[-1])
    hooks.collect(state)
    hooks.flush()
    return len([record for record in hooks.ledger.records if record.event in ("fired", "settled", "refused")])


# --- Tallies.


class Tally:
    """How many inputs became what, and one small example of each that escaped."""

    def __init__(self) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[tuple[str, str]] = collections.Counter()
        self.fired = 0
        self.fires = 0
        self.examples: dict[str, tuple[str, BaseException | None]] = {}

    def add(self, outcome: Outcome, given: Any) -> None:
        """One more input."""
        self.kinds[outcome.kind] += 1
        self.errors[outcome.kind, outcome.what] += 1
        self.fired += outcome.fires > 0
        self.fires += outcome.fires
        if outcome.kind == "escaped":
            told = shown(given)
            if len(told) < len(self.examples.get(outcome.what, (told + "x",))[0]):
                self.examples[outcome.what] = (told, outcome.error)

    @property
    def total(self) -> int:
        """How many inputs there were."""
        return sum(self.kinds.values())

    def __str__(self) -> str:
        share = 100 * self.fired / max(self.total, 1)
        lines = [f"{self.total} inputs, {self.fired} fired ({share:.1f} %), {self.fires} fires"]
        for (kind, what), count in sorted(self.errors.items(), key=lambda item: (item[0][0], -item[1])):
            lines.append(f"  {count:7}  {kind:9} {what}")
        return "\n".join(lines)


def shown(value: Any) -> str:
    """`repr`, but of values that Python does not print."""
    try:
        return repr(value)
    except Exception as error:
        return (
            f"<no repr: {error}>"
            if not hasattr(value, "__dict__")
            else f"<{ {k: shown(v) for k, v in vars(value).items()} }>"
        )
