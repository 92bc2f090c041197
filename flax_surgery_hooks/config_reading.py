"""Reading a config: references resolved, values converted to their fields' types, and every problem collected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import FieldReference

from flax_surgery_hooks.config_fields import MISMATCH, Field, is_mapping
from flax_surgery_hooks.errors import ConfigError, SurgeryError, quoted, shorten
from flax_surgery_hooks.paths import close_matches, listed


@dataclasses.dataclass
class Report:
    """Collects problems below one config path, so that one error can tell them all.

    Attributes:
      path: where in the config the problems are.
      problems: what was found so far, each beginning with its path; shared by all that `at` returns.
      causes: the exceptions behind some of them, in order.

    >>> report = Report("surgery")
    >>> report.at("prune").add("is wrong")
    >>> report.problems
    ['surgery.prune: is wrong']
    """

    path: str
    problems: list[str] = dataclasses.field(default_factory=list)
    causes: list[Exception] = dataclasses.field(default_factory=list)

    def at(self, key: Any) -> Report:
        """The same report, for what stands under `key`."""
        return dataclasses.replace(self, path=f"{self.path}.{shorten(key, 80)}")

    def add(self, problem: str, cause: Exception | None = None) -> None:
        """Notes that something is wrong at this path."""
        self.problems.append(f"{self.path}: {problem}")
        self.causes.extend([cause] if cause is not None else [])

    def attempt(self, make: Callable[..., Any], *args: Any) -> Any:
        """What `make` returns, or None, its error reported."""
        try:
            return make(*args)
        except SurgeryError as error:
            self.add(told(error), error)
            return None

    def raise_if_any(self, where: str) -> None:
        """Ends the collecting.

        Raises:
          ConfigError: there are problems; it lists them all.
        """
        if self.problems:
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            lines = "".join(f"\n- {problem}" for problem in self.problems)
            raise ConfigError(f"{count} in {where}:{lines}", problems=self.problems) from next(iter(self.causes), None)


def read(config: Any, resolve: Callable[[Any], Any], report: Report) -> dict[Any, Any]:
    """The entries of a config with references resolved; those that cannot be read are reported and `MISMATCH`."""
    values = {}
    for key in config:
        try:
            values[key] = resolve(config[key])
        except Exception as error:  # a required placeholder without a value, or arithmetic on references that fails
            report.at(key).add(f"has no value: {told(error)}", error)
            values[key] = MISMATCH
    return values


def dereferenced(value: Any) -> Any:
    """What a reference refers to; anything else as it is."""
    return dereferenced(value.get()) if isinstance(value, FieldReference) else value


def resolved(value: Any) -> Any:
    """`value` with the references inside it resolved too, and a `ConfigDict` as a dict.

    >>> resolved((FieldReference(1), 2))
    (1, 2)
    """
    value = dereferenced(value)
    if is_mapping(value):
        return {key: resolved(value[key]) for key in value}
    return type(value)(map(resolved, value)) if type(value) in (tuple, list) else value


def typed(given: Mapping[str, Any], known: Mapping[str, Field], report: Report) -> dict[str, Any]:
    """The values of known fields, converted; those of the wrong type are reported and `MISMATCH`."""
    values = {}
    for key, value in given.items():
        if key in known:
            values[key] = value if value is MISMATCH else known[key].convert(value)
            if values[key] is MISMATCH and value is not MISMATCH:
                report.at(key).add(_mistyped(known[key], value))
    return values


def _mistyped(field: Field, value: Any) -> str:
    if not field.hints:
        return field.advice
    text = f"wants {field.wanted}, found {shown(value)}"
    if field.stored is tuple and field.convert((value,)) is not MISMATCH:
        return f"{text}; write ({quoted(value, 80)},)"
    if field.stored is object and isinstance(value, bool):
        # absl takes a flag that accepts any literal for a boolean one, and the word after it for another argument.
        return f"{text}; on the command line, write '=' between the flag and its value"
    return text


def check_keys(given: Iterable[Any], known: Mapping[str, Field], report: Report) -> None:
    """Reports keys that no field of a hook or of its surgery has."""
    settable = sorted(key for key, field in known.items() if field.hints)
    for key in given:
        if key not in known:
            text = f"unknown key{did_you_mean(key, settable)}; allowed are {listed(settable, limit=60)}"
            report.at(key).add(text)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A hint in parentheses, or nothing.

    >>> did_you_mean("sparsty", ["sparsity", "every"])
    " (did you mean 'sparsity'?)"
    """
    matches = close_matches(shorten(name), known, count=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def shown(value: Any) -> str:
    """A value and its type, for an error message; of an array only dtype and shape."""
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    return shorten(value) if is_array else f"{quoted(value, 80)} ({type(value).__name__})"


def told(error: Exception) -> str:
    """An exception as one line."""
    return str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {shorten(error)}"
