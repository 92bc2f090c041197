"""The code of docs/growth.md does what it says."""

from __future__ import annotations

from page_code import run_page


def test_the_code_on_the_page_does_what_it_says():
    assert run_page("growth.md") > 10
