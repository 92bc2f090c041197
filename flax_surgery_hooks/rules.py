"""The vocabulary of optimizer slots: what a slot is (its kind) and how it follows an edit (its rule)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax_surgery_hooks.errors import RuleError, quoted, shorten
from flax_surgery_hooks.paths import close_matches

KINDS = ("param", "param_diff", "grad", "grad_sq", "grad_abs", "update", "invariant", "none")
"""What a slot holds, by how it scales when the parameter or its gradient is scaled.

`param`: a copy of the parameters. `param_diff`: a difference of two. `grad`: order 1 in the gradient. `grad_sq`: order
2.
`grad_abs`: order 1, unsigned. `update`: order 0, signed. `invariant`: order 0, unsigned. `none`: follows no edit.
"""

RULES = ("transport", "carry", "keep", "reset")
"""How slots follow an edit: lineage and chain rule, lineage alone, untouched, or as `tx.init` makes them."""

FRESH = ("mean", "init")
"""What second moments of elements without history start from: the mean of the survivors, or the value of `tx.init`."""

GUARDS = ("finite", "off")
"""`finite`: a fire that would bring in non-finite values is not applied. `guards` has the others."""

SlotFunction = Callable[..., Any]
OptStateRule = str | SlotFunction | Mapping[str, "str | SlotFunction"] | None


@dataclass(frozen=True)
class SlotRules:
    """The rule of every kind of slot for one hook.

    Attributes:
      default: the rule of the kinds that `by_kind` does not name.
      by_kind: pairs of a kind and its rule.
    """

    default: str | SlotFunction
    by_kind: tuple[tuple[str, str | SlotFunction], ...] = ()

    def rule(self, kind: str) -> str | SlotFunction:
        """The rule for slots of this kind."""
        return dict(self.by_kind).get(kind, self.default)

    def uses(self, *rules: str) -> bool:
        """Whether any kind can follow one of these rules."""
        named = {self.default, *(rule for _, rule in self.by_kind)}
        return any(rule in named for rule in rules)

    @property
    def only_keeps(self) -> bool:
        """Whether no slot of any kind changes."""
        return self.default == "keep" and not self.by_kind

    def describe(self) -> str:
        """The rules as one line for ledgers and tables."""
        parts = [_rule_name(self.default), *(f"{kind}={_rule_name(rule)}" for kind, rule in self.by_kind)]
        return ", ".join(parts)


def slot_rules(opt_state: OptStateRule, preserves: str) -> SlotRules:
    """The rules that `opt_state=` asks for; the default depends on what the edit says it preserves.

    Args:
      opt_state: a rule, a function `fn(slot, *, kind, path, old, new, key) -> slot` (of a leaf that the
        edit adds, `old` is None and `slot` as `tx.init` makes it), a mapping from kind to either, or
        None for the default: `transport` for edits that preserve the function, else `carry`.
      preserves: `"function"`, `"eval_function"` or `"nothing"`.

    Raises:
      RuleError: a rule or kind that does not exist.

    >>> slot_rules({"grad": "reset"}, "nothing").describe()
    'carry, grad=reset'
    """
    default = "transport" if preserves in ("function", "eval_function") else "carry"
    if opt_state is None:
        return SlotRules(default)
    if isinstance(opt_state, Mapping):
        for kind in opt_state:
            _check_name(kind, KINDS[:-1], "kind of slot")
        return SlotRules(default, tuple((kind, _checked_rule(opt_state[kind])) for kind in sorted(opt_state)))
    return SlotRules(_checked_rule(opt_state))


def check_choice(value: Any, choices: tuple[str, ...], what: str) -> str:
    """`value` if it is one of `choices`.

    Raises:
      RuleError: it is not.
    """
    _check_name(value, choices, what)
    return value


def _checked_rule(rule: Any) -> str | SlotFunction:
    if callable(rule):
        return rule
    _check_name(rule, RULES, "opt_state rule")
    return rule


def _check_name(name: Any, known: tuple[str, ...], what: str) -> None:
    if isinstance(name, str) and name in known:
        return
    likely = close_matches(shorten(name), known)
    raise RuleError(f"Unknown {what}.", found=quoted(name), write=f"one of {', '.join(likely or known)}")


def _rule_name(rule: str | SlotFunction) -> str:
    return rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
