"""What the tables of errors are made of: a mistake, and the error that it must raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from flax_surgery_hooks import errors as e


class Case(NamedTuple):
    """A mistake, the error it raises, parts of its text, and the fields it must have set."""

    run: Callable[[], Any]
    error: type[e.SurgeryError]
    says: tuple[str, ...]
    fields: dict[str, Any] = {}  # noqa: RUF012  # never changed

    def check(self) -> None:
        """Makes the mistake, and looks at what the error says, and at its path."""
        with pytest.raises(self.error) as caught:
            self.run()
        assert [part for part in self.says if part not in str(caught.value)] == [], str(caught.value)
        assert caught.value.path == self.fields.get("path")


def fail(*args, **kwargs):
    raise ValueError("no luck")


def of_leaves(function):
    """The form that takes all leaves."""

    def edit(leaves):
        return function(leaves)

    return edit
