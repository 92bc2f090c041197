"""Typed errors: every mistake a user can make is a `SurgeryError` that says where, what was found and what to write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class SurgeryError(Exception):
    """An error that names the hook, step and path it concerns, and how to mend it.

    Attributes:
      problem: what is wrong, one sentence.
      found: what was found instead of what was expected, or None.
      write: what to write instead, or None.
      hook: name of the hook concerned, or None.
      step: value of `state.step` at which it happened, or None.
      path: `/`-joined parameter path (or config key) concerned, or None.
    """

    def __init__(
        self,
        problem: str,
        *,
        found: object = None,
        write: str | None = None,
        hook: str | None = None,
        step: int | None = None,
        path: str | None = None,
    ):
        super().__init__(problem)
        self.problem = problem
        self.found = found
        self.write = write
        self.hook = hook
        self.step = step
        self.path = path

    def __str__(self) -> str:
        where = [f"hook {self.hook!r}" if self.hook is not None else "",
                 f"step {self.step}" if self.step is not None else "",
                 f"path {self.path!r}" if self.path is not None else ""]  # fmt: skip
        prefix = ", ".join(part for part in where if part)
        text = f"{prefix}: {self.problem}" if prefix else self.problem
        if self.found is not None:
            text += f" Found: {shorten(self.found)}."
        if self.write is not None:
            text += f" Write instead: {self.write}."
        return text


class ScheduleError(SurgeryError):
    """A schedule that can never be, such as `every(0)`."""


class SelectionError(SurgeryError):
    """A pattern that matches nothing, another number of leaves than expected, or is malformed."""


class UnitsError(SurgeryError):
    """A description of units that does not fit the model, or units whose wiring cannot be found."""


class SurgeryFunctionError(SurgeryError):
    """A surgery whose signature, or whose returned paths, shapes or dtypes are not what they must be."""


class UserCodeError(SurgeryError):
    """An exception raised inside a user's function; the original is its `__cause__`."""


class MixingError(SurgeryError):
    """An edit whose new elements combine several old ones, so that optimizer slots have no single lineage."""


class LostHistoryError(SurgeryError):
    """An edit that is computed from the old leaf but not differentiable anywhere, such as rounding."""


class UnequalCopiesError(SurgeryError):
    """Copies that share unequally without a `fold_back`: no single leaf knows how their gradients split."""


class FoldBackError(SurgeryError):
    """A `fold_back` that is not linear or does not undo the edit."""


class DifferentiationError(SurgeryError):
    """An edit that JAX cannot differentiate although its slot rule needs that."""


class SlotError(SurgeryError):
    """Optimizer state of unknown or contradicted meaning."""


class RuleError(SurgeryError):
    """An `opt_state=` rule that does not exist or does not fit the edit."""


class StateError(SurgeryError):
    """A train state without the fields surgery needs, or whose parts do not belong together."""


class StepError(SurgeryError):
    """A step that is not a Python int, goes back, repeats, or disagrees with `state.step`."""


class HookError(SurgeryError):
    """A hook that cannot be registered or found: a name taken, unknown or colliding."""


class InputError(SurgeryError):
    """A surgery that asks for an input which the trainer did not pass, or an input with a reserved name."""


class StructureError(SurgeryError):
    """A fire that would change shapes where the train loop expects them to stay."""


class FireError(SurgeryError):
    """A fire that failed while it ran, out of memory or in a callback; says whether the state in hand is whole."""


class RefusedError(SurgeryError):
    """A fire that its guard kept out, raised when `on_error="raise"`; the state kept its old values."""


class ConfigError(SurgeryError):
    """Everything that is wrong with a config, each problem with its key (`problems`, a list of strings)."""

    def __init__(self, problem: str, *, problems: list[str] | None = None, **fields: Any):
        super().__init__(problem, **fields)
        self.problems = problems if problems is not None else [problem]


class AgreementError(SurgeryError):
    """Processes of one run that hold different hooks, states or steps, or do not come to compare them; see `agreement`.

    Attributes:
      differences: what differs, each an `agreement.Difference`.
      missing: the processes that did not come.
    """

    def __init__(
        self, problem: str, *, differences: tuple[Any, ...] = (), missing: tuple[int, ...] = (), **fields: Any
    ):
        super().__init__(problem, **fields)
        self.differences = differences
        self.missing = missing


class LedgerError(SurgeryError):
    """A ledger file that cannot be written or read."""


class ResumeError(SurgeryError):
    """A run that cannot go on from what was saved: hooks that its past needs are gone or others, or nothing was saved.

    Attributes:
      changes: how the hooks differ from those that were saved, each a `resuming.Change`.
    """

    def __init__(self, problem: str, *, changes: tuple[Any, ...] = (), **fields: Any):
        super().__init__(problem, **fields)
        self.changes = changes


class CheckpointError(SurgeryError):
    """A checkpoint that is damaged, is not there, or holds another state than the trainer's."""


class WriterError(SurgeryError):
    """Metrics that cannot be written: a value of the wrong shape or type, a directory, a writer that is closed."""


class CommandError(SurgeryError):
    """What a command cannot do: its trainer file, checkpoint or output directory is not what it must be."""


class UsageError(CommandError):
    """Arguments of a command that cannot be read."""


def shorten(value: object, limit: int = 300) -> str:
    """`str(value)` cut in the middle to at most `limit` characters; arrays show as dtype and shape. It never raises.

    >>> shorten("ab" * 500, limit=11)
    'abab...abab'
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} {value.dtype}{list(value.shape)}"
    text = _printed(str, value)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[len(text) - half :]}"


def quoted(value: object, limit: int = 300) -> str:
    """`repr(value)`, shortened likewise, for the message about a value that may be anything.

    >>> quoted("3"), quoted(10**5000)
    ("'3'", '<int that cannot be shown>')
    """
    return shorten(_printed(repr, value), limit)


def _printed(how: Callable[[object], str], value: object) -> str:
    """A value as text, also one that cannot be shown, as an int of more digits than Python prints."""
    try:
        return how(value)
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


def typed(value: object) -> str:
    """A value with its type, for the message about a value of the wrong one.

    >>> typed("3")
    'str 3'
    """
    text = shorten(value, 80)
    name = type(value).__name__
    return text if text.startswith(f"{name} ") else f"{name} {text}"


@contextlib.contextmanager
def located(*, hook: str | None = None, step: int | None = None, path: str | None = None) -> Iterator[None]:
    """Fills in the fields that a `SurgeryError` raised inside does not have yet."""
    try:
        yield
    except SurgeryError as error:
        error.hook = hook if error.hook is None else error.hook
        error.step = step if error.step is None else error.step
        error.path = path if error.path is None else error.path
        raise
