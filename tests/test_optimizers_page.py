"""docs/optimizers.md is what the table of optimizers says now, and its example runs."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import re
import sys

import optax
import pytest

from flax_surgery_hooks import testing

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "optimizers.md").read_text()


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("optimizers_page")
    finally:
        sys.path.remove(str(DOCS))


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="the page is of a newer optax")
def test_the_page_is_current(page):
    assert page.page() == PAGE, "run: python docs/optimizers_page.py"


def test_every_row_is_on_the_page():
    assert set(testing.OPTIMIZERS) - set(re.findall(r"^\| (\w+) \|", PAGE, re.MULTILINE)) == set()


def test_the_example_on_the_page_does_what_it_says():
    [block] = re.findall(r"^```pycon\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(
        doctest.DocTestParser().get_doctest(block, {"__name__": "example"}, "optimizers.md", None, 0), out=said.append
    )
    assert runner.tries
    assert not runner.failures, "".join(said)
