"""What a row of the table of optimizers says."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LAWS = {
    "exact": "that of the same optimizer run on the mapped gradients from the start",
    "by kind": "the old slot times the factor of its kind; a run from the start would have seen other norms or updates",
    "restarted": "as `tx.init` makes it, and the record says so",
    "bounded": "no less than that of the same optimizer run on the mapped gradients",
}
"""What may hold of a slot after an edit, in words."""

RULES = ("transport", "carry")
SCALES = ("scale", "scale_rows", "scale_elements")
COPIES = ("duplicate_in", "duplicate_out", "duplicate_unequal")
FRESH = ("mask", "reinitialise", "pad", "slice")
ALL_BUT_PERMUTE = (*SCALES, *FRESH, *COPIES)


@dataclass(frozen=True)
class Holds:
    """What holds of some slots of an optimizer after some edits, where it is not equality with a rebuilt state.

    Attributes:
      law: a key of `LAWS`.
      why: the reason, as the end of a sentence "because ...".
      edits: names of edits.
      fields: pattern of "Class.field", such as "FactoredState.*".
      rules: the rules under which it holds; the others leave equality.
      tolerance: how far from equality, relative, instead of that of the row.
    """

    law: str
    why: str
    edits: tuple[str, ...] = ALL_BUT_PERMUTE
    fields: str = "*"
    rules: tuple[str, ...] = ("transport",)
    tolerance: float | None = None


@dataclass(frozen=True)
class Exempt:
    """Where a law of training on does not hold for an optimizer. It must really fail at each of these places.

    Attributes:
      law: a key of `flax_surgery_hooks.testing.STABILITY`.
      why: the reason, as the end of a sentence "because ...".
      fields: pattern of the key path in the optimizer's state, such as "*.nu*", or "updates".
      edits: names of edits of that law; () for all.
      rules: the rules under which it does not.
    """

    law: str
    why: str
    fields: str = "*"
    edits: tuple[str, ...] = ()
    rules: tuple[str, ...] = RULES

    def covers(self, problem: Any) -> bool:
        """Whether it explains a `stability.Problem`."""
        here = (
            problem.law == self.law and problem.rule in self.rules and problem.edit in (self.edits or (problem.edit,))
        )
        return here and fnmatch.fnmatchcase(problem.field, self.fields)


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer set-up that the laws are checked on.

    Attributes:
      name: of the row, unique; where it is a public name of optax, the row is that optimizer's.
      make: makes the `optax.GradientTransformation` for parameters {"kernel": [rows, 4], "bias": [4]}.
      holds: what holds where equality with a rebuilt state does not; the first that matches counts.
      tolerance: how far from equality, relative.
      asks: what its `update` takes beside the parameters, of "value", "grad", "value_fn" and "obj_fn".
      exempt: which laws of training on do not hold, and why; a closed list.

    >>> import optax
    >>> OptimizerRow("adam", lambda: optax.adam(0.1)).law("scale", "transport", "ScaleByAdamState.mu").law
    'exact'
    """

    name: str
    make: Callable[[], Any]
    holds: tuple[Holds, ...] = ()
    tolerance: float = 1e-9
    asks: tuple[str, ...] = ("value", "grad", "value_fn")
    exempt: tuple[Exempt, ...] = ()

    def law(self, edit: str, rule: str, field: str) -> Holds:
        """What holds of a field ("Class.field") after an edit (its name) under a rule."""
        for one in self.holds:
            if edit in one.edits and rule in one.rules and fnmatch.fnmatchcase(field, one.fields):
                return one
        return Holds("exact", "")
