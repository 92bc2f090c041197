"""The tables of docs/values.md, from what examples left in docs/values.json.

    PYTHONPATH=examples python docs/values_report.py

Needs nothing but the file. The page says which example measured what; each adds its numbers with
`--results=docs/values.json` and draws with `--picture=docs/images/NAME.png`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from measured import comparison, fill, versions, wrapped

PAGE = pathlib.Path(__file__).with_name("values.md")
FILE = pathlib.Path(__file__).with_name("values.json")
ACCURACY = ("accuracies", ("held-out accuracy, %", "worst and best seed", "points beside {}"), 100.0, 2)
COLUMNS = {
    **dict.fromkeys(("spikes", "relora", "plasticity", "averages"), (ACCURACY,)),
    "qk": (
        ("bits", ("held-out bits per byte", "best and worst seed", "bits beside {}"), 1.0, 3),
        ("logits", ("largest attention logit, last 30 steps", "smallest and largest seed"), 1.0, 1),
    ),
}
"""Name of a measurement -> its tables: which curve, heads of the columns, scale, digits behind the point."""


def blocks(found: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Markdown: everything on the page that was measured."""
    made = {}
    for name, columns in COLUMNS.items():
        runs = found[name]["runs"]
        tables = [
            comparison(runs, what, [head.format(next(iter(runs))) for head in names], scale, digits)
            for what, names, scale, digits in columns
        ]
        made[name] = "\n\n".join([_conditions(found[name]), *tables])
    return made


def _conditions(found: Mapping[str, Any]) -> str:
    given = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found["conditions"].items())
    return wrapped(f"Measured on {found['date']} with {versions(found)}: {given}.")


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), blocks(json.loads(FILE.read_text()))))
