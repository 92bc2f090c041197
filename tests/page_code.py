"""Runs the code of a page of docs/ as whoever reads it would."""

from __future__ import annotations

import doctest
import pathlib
import re

import jax

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_page(name: str) -> int:
    """Runs all blocks of a page, each after the others, and returns how many statements there were.

    Raises:
      AssertionError: one does something else than the page says.
    """
    page = (pathlib.Path(__file__).parents[1] / "docs" / name).read_text()
    runner, names, said = doctest.DocTestRunner(optionflags=FLAGS), {}, []
    with jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"^```pycon\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            test = doctest.DocTestParser().get_doctest(block, names, name, None, 0)
            runner.run(test, out=said.append, clear_globs=False)
            names = test.globs
    assert not runner.failures, "".join(said)
    return runner.tries
