"""The code of docs/norms.md does what it says."""

import doctest
import pathlib
import re

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "norms.md").read_text()


def test_the_code_on_the_page_does_what_it_says():
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    names: dict[str, object] = {}
    said: list[str] = []
    for block in re.findall(r"^```pycon\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        test = doctest.DocTestParser().get_doctest(block, names, "norms.md", None, 0)
        runner.run(test, out=said.append, clear_globs=False)
        names = test.globs
    assert runner.tries > 20
    assert not runner.failures, "".join(said)
