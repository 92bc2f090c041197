"""Writes docs/optimizers.md: what every optimizer keeps, and what holds of it after an edit."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Iterator

import jax

from flax_surgery_hooks import slots, testing
from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.paths import flatten
from flax_surgery_hooks.testing import streams
from flax_surgery_hooks.testing.rows import LAWS, Exempt, OptimizerRow

PAGE = pathlib.Path(__file__).with_name("optimizers.md")
_HEAD = """# Optimizers

What each optimizer keeps per parameter, and what a slot is after an edit under `transport`. Written by
`python docs/optimizers_page.py` from the table that the tests run (`flax_surgery_hooks.testing`).

- **exact**: {exact}.
- **by kind**: {by_kind}.
- **restarted**: {restarted}.

Under `carry` every slot that is shaped like its parameter lies where its element lies, unchanged.
Edits of the table: {edits}.
"""
_ONWARD = """
## Training on

Laws of the next steps, for every optimizer of the table, under both rules:

{laws}

Where one does not hold, which the tests check too:

| optimizer | law | of | edits | rules | because |
|---|---|---|---|---|---|
{exempt}"""
_TAIL = """
## An optimizer of one's own

A row is a name and a function that makes the optimizer; states that optax does not have are registered first.

```pycon
>>> import typing, jax, optax, flax_surgery_hooks as fsh
>>> from flax_surgery_hooks import testing
>>> class Momentum(typing.NamedTuple):
...     trace: typing.Any
>>> def momentum():
...     def update(updates, state, params=None):
...         trace = jax.tree.map(lambda m, g: 0.9 * m + g, state.trace, updates)
...         return trace, Momentum(trace)
...     return optax.GradientTransformation(lambda params: Momentum(jax.tree.map(jax.numpy.zeros_like, params)), update)
>>> fsh.register_slot(Momentum, trace="grad")
>>> row = testing.OptimizerRow("momentum", momentum)
>>> for rule in ("transport", "carry"):
...     testing.check(row, testing.EDITS["scale_rows"], rule)
>>> testing.check_stability(row)

```
"""


def page() -> str:
    """The page, in Markdown."""
    head = _HEAD.format(
        exact=LAWS["exact"], by_kind=LAWS["by kind"], restarted=LAWS["restarted"], edits=", ".join(testing.EDITS)
    )
    table = ["| optimizer | slot | kind | layout | what holds |", "|---|---|---|---|---|"]
    lines = [line for row in testing.OPTIMIZERS.values() for line in _lines(row)]
    laws = "\n".join(f"- **{name}**: {law.says}." for name, law in testing.STABILITY.items())
    exempt = "\n".join(_exempt(row, one) for row in testing.OPTIMIZERS.values() for one in row.exempt)
    return "\n".join([head, *table, *lines, _ONWARD.format(laws=laws, exempt=exempt), _TAIL])


def _exempt(row: OptimizerRow, one: Exempt) -> str:
    cells = (row.name, one.law, f"`{one.fields}`", ", ".join(one.edits) or "all", ", ".join(one.rules), one.why)
    return f"| {' | '.join(cells)} |"


def _lines(row: OptimizerRow) -> Iterator[str]:
    with warnings.catch_warnings(), streams.enable_x64(True):
        warnings.simplefilter("ignore")
        tx, params = row.make(), streams.mapped_params(0, (3, 4))
        leaves = flatten(params)
        try:
            found = slots.slots_of(tx, tx.init(params), leaves).get(leaves.paths.index("kernel"), ())
        except SlotError as error:
            yield f"| {row.name} | | | | an error: {error.problem} |"
            return
    if not found:
        yield f"| {row.name} | none | | | |"
    for name, slot in {slot.name: slot for slot in found}.items():
        layout = "in one vector" if slot.offset is not None else slot.laid.layout.name if slot.laid else "its leaf's"
        yield f"| {row.name} | `{name}` | {slot.kind} | {layout} | {_holds(row, name)} |"


def _holds(row: OptimizerRow, name: str) -> str:
    by_law: dict[tuple[str, str], list[str]] = {}
    for edit in testing.EDITS:
        law = row.law(edit, "transport", name)
        by_law.setdefault((law.law, law.why), []).append(edit)
    if list(by_law) == [("exact", "")]:
        return "exact"
    parts = [f"{law} for {', '.join(edits)}{': ' + why if why else ''}" for (law, why), edits in by_law.items()]
    return "; ".join(parts)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    PAGE.write_text(page())
