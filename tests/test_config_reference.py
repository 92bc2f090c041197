"""docs/config.md is what the code says now."""

from __future__ import annotations

import pathlib

from flax_surgery_hooks.config_fields import fields_of
from flax_surgery_hooks.config_hook import HookFields
from flax_surgery_hooks.config_reference import _told, reference
from flax_surgery_hooks.config_registry import builtins

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "config.md").read_text()


def test_the_page_is_current():
    assert reference() == PAGE, "run: python -m flax_surgery_hooks.config_reference > docs/config.md"


def test_every_key_is_there_and_explained():
    for cls in (HookFields, *builtins().values()):
        assert _told(cls).keys() == fields_of(cls).keys(), cls
        for key in fields_of(cls):
            assert f"\n| `{key}` | " in PAGE
    assert [line for line in PAGE.splitlines() if line.startswith("## ")] == [
        "## Every hook", *(f"## `{name}`" for name in sorted(builtins()))
    ]  # fmt: skip


def test_a_row_has_type_default_and_meaning():
    assert "\n| `every` | `int or None` | `None` | steps from one due step to the next. |\n" in PAGE
    assert "\n| `to` | `float` | `1.0` | the norm afterwards, > 0. |\n" in PAGE
    assert "\n| `value` | by `objects` | required | " in PAGE
