"""Functions that hooks call with parameters filled by name, and what their signatures say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax_surgery_hooks.errors import SurgeryFunctionError


class Method(NamedTuple):
    """A function of leaves, and what it takes beside them.

    Attributes:
      function: the function.
      name: its name in messages.
      wants: names of the further parameters that must be filled.
      may_take: names of those that have defaults.
    """

    function: Callable[..., Any]
    name: str
    wants: tuple[str, ...]
    may_take: tuple[str, ...]

    def takes(self, name: str) -> bool:
        """Whether it has a parameter of this name beside its first."""
        return name in self.wants or name in self.may_take

    def fill(self, ready: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that it takes."""
        return {name: ready[name] for name in (*self.wants, *self.may_take) if name in ready}


def parameters_of(function: Callable[..., Any], name: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Name of the first parameter, names without and with a default of the others.

    Raises:
      SurgeryFunctionError: there is none, or a parameter has no name to fill it by.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise SurgeryFunctionError(
            f"The signature of {name} cannot be read.", write=f"lambda leaf: {name}(leaf)"
        ) from error
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise SurgeryFunctionError(
            f"{name} takes no leaf: its first parameter must be positional.",
            found=str(signature),
            write="def edit(kernel, ...)",
        )
    rest = parameters[1:]
    for parameter in rest:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise SurgeryFunctionError(
                f"{name} takes {parameter}; parameters are filled by name, so each needs one.",
                found=str(signature),
                write="the names of the inputs it uses",
            )
    wants = tuple(p.name for p in rest if p.default is inspect.Parameter.empty)
    may_take = tuple(p.name for p in rest if p.default is not inspect.Parameter.empty)
    return parameters[0].name, wants, may_take
