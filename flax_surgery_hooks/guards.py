"""Guards: what decides by the figures of a fire whether its result is put into the state.

`guard="finite"` keeps out results with new non-finite values, `"off"` lets everything in. A function of figures decides
in addition to "finite": `lambda figures: figures["params/relative_change"] < 0.5`, or the same as a string,
`"params/relative_change < 0.5"`. It is traced, in the pass that measures a fire and in graph, and its verdict is one
for the whole fire: all leaves, slots and memory, or none.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import RuleError, SurgeryError, UserCodeError, shorten, typed
from flax_surgery_hooks.paths import close_matches, listed
from flax_surgery_hooks.rules import GUARDS

Function = Callable[[Mapping[str, Any]], Any]
Guard = str | Function
"""What an operation holds: one of `GUARDS`, or a function."""

_NAMES = "elements changed fresh norm_before norm_after relative_change sparsity nonfinite"
FIGURES = tuple(f"{part}/{name}" for part in ("params", "slots") for name in _NAMES.split())
"""The figures of a fire, see `metrics.Change.compute`."""
_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_TERM = re.compile(r"\s*(?P<name>[^\s<>=]+)\s*(?P<sign><=|>=|<|>)\s*(?P<number>[^\s<>=]+)\s*")
_EXAMPLE = '"params/relative_change < 0.5"'


@dataclass(frozen=True)
class Bounds:
    """A guard as a config can hold it: figures compared with numbers. `str` gives the text it was read from.

    Attributes:
      terms: (figure, one of < <= > >=, number) of each comparison; all of them must hold.

    >>> bounds = Bounds.parse("params/relative_change < 0.5 and slots/norm_after <= 1e3")
    >>> str(bounds), Bounds.parse(str(bounds)) == bounds
    ('params/relative_change < 0.5 and slots/norm_after <= 1000.0', True)
    >>> bool(bounds({"params/relative_change": 0.1, "slots/norm_after": 2e3}))
    False
    """

    terms: tuple[tuple[str, str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Bounds:
        """Reads comparisons joined by " and ".

        Raises:
          RuleError: the text is no such thing, or names an unknown figure.
        """
        return cls(tuple(map(_term, text.split(" and "))))

    def __call__(self, figures: Mapping[str, Any]) -> Any:
        """Whether all comparisons hold; a figure that is NaN holds none."""
        return functools.reduce(operator.and_, (_SIGNS[sign](figures[name], x) for name, sign, x in self.terms))

    def __str__(self) -> str:
        return " and ".join(f"{name} {sign} {number!r}" for name, sign, number in self.terms)


def _term(text: str) -> tuple[str, str, float]:
    match = _TERM.fullmatch(text)
    number = math.nan
    if match is not None:
        try:
            number = float(match["number"])
        except ValueError:
            match = None
    if match is None or not math.isfinite(number):
        raise RuleError(
            "A guard compares figures with finite numbers, by <, <=, > or >=, joined by `and`.",
            found=repr(text.strip()),
            write=f"guard={_EXAMPLE}",
        )
    return _known(match["name"]), match["sign"], number


def _known(name: Any) -> str:
    if name not in FIGURES:
        raise RuleError(
            "A guard looks at a figure that fires do not have.",
            found=repr(name),
            write=listed(map(repr, close_matches(str(name), FIGURES) or FIGURES), len(FIGURES)),
        )
    return name


class _Figures(dict[str, Any]):
    """Figures that note which of them are read."""

    def __init__(self, figures: Mapping[str, Any]):
        super().__init__(figures)
        self.read: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self.read[_known(name)] = None
        return super().__getitem__(name)


def as_guard(value: Any, what: str = "guard") -> Guard:
    """Reads `guard=`: "finite", "off", comparisons of figures as a string, or a function of figures.

    Args:
      value: what was given.
      what: what to call it in a message.

    Raises:
      RuleError: it is nothing of that, names an unknown figure, cannot be hashed, or does not return one boolean.
      UserCodeError: the function raised.

    >>> as_guard("finite"), str(as_guard("params/sparsity<1"))
    ('finite', 'params/sparsity < 1.0')
    """
    if isinstance(value, str) and value in GUARDS:
        return value
    if isinstance(value, str) and set(value) & set("<>"):
        return Bounds.parse(value)
    if isinstance(value, str) or not callable(value):
        raise RuleError(
            f"Unknown {what}.",
            found=repr(value),
            write=f"one of {', '.join(GUARDS)}, comparisons of figures such as {_EXAMPLE}, or a function of figures",
        )
    try:
        hash(value)
    except TypeError as error:
        raise RuleError(
            "A guard cannot be hashed, and compiled programs are looked up by it.",
            found=type(value).__name__,
            write="a function, or an instance of a @dataclass(frozen=True)",
        ) from error
    looked_at(value)
    return value


def passes(guard: Function, figures: Mapping[str, Any]) -> jax.Array:
    """Whether a guard lets these figures through, a boolean scalar; traced where they are.

    Raises:
      UserCodeError: the guard raised.
      RuleError: it returned something else, or looked at an unknown figure.
    """
    try:
        result = guard(_Figures(figures) if not isinstance(figures, _Figures) else figures)
    except SurgeryError:
        raise
    except Exception as error:
        raise UserCodeError(
            f"The guard {told(guard)} raised {type(error).__name__}: {shorten(error, 150)}",
            write="a function of traced figures: `&` in place of `and`, jnp.where in place of `if`",
        ) from error
    if not isinstance(result, bool | np.bool_) and (
        getattr(result, "dtype", None) != jnp.bool_ or np.shape(result) != ()
    ):
        raise RuleError(
            f"The guard {told(guard)} must return one boolean.",
            found=typed(result),
            write='lambda figures: figures["params/relative_change"] < 0.5',
        )
    return jnp.asarray(result)


def looked_at(guard: Function) -> tuple[str, ...]:
    """The figures that a guard reads by name; all of them if it reads none by name. Runs it abstractly.

    Raises:
      UserCodeError, RuleError: as for `passes`.
    """
    seen: list[_Figures] = []

    def look(figures: dict[str, Any]) -> Any:
        seen.append(_Figures(figures))
        return passes(guard, seen[-1])

    jax.eval_shape(look, {name: jax.ShapeDtypeStruct((), jnp.float32) for name in FIGURES})
    return tuple(seen[0].read) or FIGURES


def told(guard: Any) -> str:
    """A guard as one line, for records and messages.

    >>> told("finite"), told(Bounds.parse("params/sparsity < 1"))
    ('finite', 'params/sparsity < 1.0')
    """
    if isinstance(guard, str | Bounds):
        return str(guard)
    return getattr(guard, "__qualname__", None) or type(guard).__qualname__


def shown(guard: Function, figures: Mapping[str, Any]) -> str:
    """The figures that a guard looked at, for a message.

    >>> shown(Bounds.parse("params/sparsity < 0.5"), {"params/sparsity": 0.75})
    'params/sparsity 0.75'
    """
    return ", ".join(f"{name} {float(figures[name]):.6g}" for name in looked_at(guard))
