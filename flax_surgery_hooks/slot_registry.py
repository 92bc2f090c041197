"""What the states of optimizers hold: a registry that others can add to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.layouts import Layout
from flax_surgery_hooks.rules import KINDS, check_choice

Preceding = tuple[type, ...]
Kind = str | tuple[str, ...]
KindOf = Kind | Callable[[Preceding], Kind]


class Traits(NamedTuple):
    """What is known of a state class beside the kinds of its fields; see `register_slot`."""

    layout: Layout | None = None
    restarts: Mapping[str, str] = {}
    counted: bool = False


REGISTRY: dict[type, dict[str, KindOf]] = {}
TRAITS: dict[type, Traits] = {}
RESTARTS = ("edit", "unpreserved", "reshape")
_changes: list[type] = []


def version() -> int:
    """How often the registry has changed: what was found before is found anew."""
    return len(_changes)


def register_slot(
    state: type,
    /,
    *,
    layout: Layout | None = None,
    restarts: Mapping[str, str] | None = None,
    counted: bool = False,
    **fields: KindOf,
) -> None:
    """Adds what the fields of an optimizer state hold; scalar fields of a registered class follow no edit.

    Args:
      state: the state's class, a NamedTuple or dataclass.
      layout: how slots lie that are not shaped like their parameter, here and in states within; see `layouts`.
      restarts: field that belongs to no parameter -> when it has to be made anew: after any "edit", after one that is
        "unpreserved" (slots do not follow by the chain rule), or after a "reshape".
      counted: whether the state counts steps per element, so that second moments without history start from `tx.init`.
      **fields: per field one of `rules.KINDS`, or a function from the tuple of state classes that precede this one in
        the chain to a kind, or to a tuple of possible kinds, among which the numeric probe decides.

    Raises:
      RuleError: a kind that does not exist.
      SlotError: the class has no such field.

    >>> import typing
    >>> class MyMomentum(typing.NamedTuple):
    ...     trace: typing.Any
    >>> register_slot(MyMomentum, trace="grad")
    """
    known = getattr(state, "_fields", None) or tuple(getattr(state, "__dataclass_fields__", {}))
    for field in (*fields, *(restarts or {})):
        if field not in known:
            raise SlotError(f"{state.__name__} has no field {field!r}.", found=f"fields {', '.join(known)}")
    for when in (restarts or {}).values():
        check_choice(when, RESTARTS, "time of a restart")
    for kind in fields.values():
        for one in () if callable(kind) else (kind,) if isinstance(kind, str) else kind:
            check_choice(one, KINDS, "kind of slot")
    REGISTRY[state] = REGISTRY.get(state, {}) | fields
    before = TRAITS.get(state, Traits())
    TRAITS[state] = Traits(layout or before.layout, {**before.restarts, **(restarts or {})}, counted or before.counted)
    _changes.append(state)
