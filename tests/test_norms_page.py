"""The code of docs/norms.md does what it says."""

from page_code import run_page


def test_the_code_on_the_page_does_what_it_says():
    assert run_page("norms.md") > 20
