"""The reference of all config keys: `python -m flax_surgery_hooks.config_reference > docs/config.md` writes it."""

from __future__ import annotations

import dataclasses
import inspect
import re

from flax_surgery_hooks.config_fields import Field, fields_of
from flax_surgery_hooks.config_hook import HookFields
from flax_surgery_hooks.config_registry import builtins
from flax_surgery_hooks.surgery import describe

_HEAD = """# Keys of a hook's config

Generated from the code: `python -m flax_surgery_hooks.config_reference > docs/config.md`.

`fsh.config.hook("normalize", params="Dense_1/kernel", every=200)` makes a `ConfigDict` with all keys of hooks and all
those of the surgery; a plain dict with some of them does as well. `None` stands for "not set". In a field that takes a
surgery stands the config of one, `fsh.config.surgery("scale", factor=0.5)`. From the shell, each key is set with
`--config.surgery.<hook>.<key>=<value>`; tuples and dicts as Python writes them, `--config.surgery.head.at="(100,)"`.
"""


def reference() -> str:
    """The page, in Markdown.

    >>> print(reference().splitlines()[0])
    # Keys of a hook's config
    """
    sections = [_HEAD, "## Every hook\n", _paragraphs(HookFields), _table(HookFields)]
    for name, cls in sorted(builtins().items()):
        sections += [f"## `{name}`\n", _paragraphs(cls), _table(cls)]
    return "\n".join(sections)


def _table(cls: type) -> str:
    """A row for each field; nothing where there is none."""
    told = _told(cls)
    rows = [_row(field, told.get(field.name, "")) for field in fields_of(cls).values()]
    if not rows:
        return ""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (("key", "type", "default", "what"), ("---",) * 4, *rows))


def _row(field: Field, told: str) -> tuple[str, ...]:
    kind = " or ".join([field.wanted, *(["None"] if field.optional else [])]) if field.hints else "by `objects`"
    default = field.default if not callable(field.default) else describe(field.default)  # a function's repr varies
    default = "required" if default is dataclasses.MISSING else f"`{default!r}`"
    code = f"`{kind}`" if field.hints else kind
    return tuple(cell.replace("|", "\\|") for cell in (f"`{field.name}`", code, default, told))


def _paragraphs(cls: type) -> str:
    """What the docstring says before its sections."""
    return re.split(r"\n\n(?:Args|Attributes|Source|Raises|>>>)", _docstring(cls))[0] + "\n"


def _told(cls: type) -> dict[str, str]:
    """What the docstring says of each field.

    >>> _told(HookFields)["at"]
    'steps at which it is due.'
    """
    found = re.search(r"^(?:Args|Attributes):\n((?:  .*\n?)*)", _docstring(cls), re.MULTILINE)
    entries = re.split(r"^  (?=\w+:)", found[1], flags=re.MULTILINE)[1:] if found else ()
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(":") for entry in entries)}


def _docstring(cls: type) -> str:
    return inspect.getdoc(cls) or ""


if __name__ == "__main__":
    print(reference(), end="")
