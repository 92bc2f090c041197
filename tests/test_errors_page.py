"""docs/errors.md is what the code says now, and what users see stands there."""

from __future__ import annotations

import ast
import doctest
import importlib
import itertools
import pathlib
import re
import sys
import types
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import test_config
from config_cases import own_registry as own_registry  # the fixture `registry`
from config_cases import problem_of
from test_errors_raised import CASES, PLAIN, by_hook, outcome, started
from tiny import halve, make_hooks

import flax_surgery_hooks as fsh
from flax_surgery_hooks import adapters, writers
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.schedules import every
from flax_surgery_hooks.selection import select

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "errors.md").read_text()

KINDS = {
    "config": (e.ConfigError,),
    "patterns": (e.SelectionError,),
    "schedules": (e.ScheduleError,),
    "what a surgery is or returns": (e.SurgeryFunctionError, e.StructureError, e.RefusedError),
    "mixing and lost history": (
        e.MixingError, e.LostHistoryError, e.UnequalCopiesError, e.FoldBackError, e.DifferentiationError
    ),
    "unknown slots": (e.SlotError,),
    "rules": (e.RuleError,),
    "states": (e.StateError,),
    "steps": (e.StepError,),
    "hooks and inputs": (e.HookError, e.InputError),
    "metrics": (e.WriterError,),
    "units": (e.UnitsError,),
}  # fmt: skip
"""What users get wrong, and the classes that say so."""
RETURNED = {
    "another tree": ("must return a dict with the paths", "must return an array"),
    "another shape": ("changes the shape of a leaf", "leaf of another shape|cannot be kept", "does not broadcast"),
    "another dtype": ("changed the kind of number", "Complex leaves"),
    "NaN": ("would have brought non-finite values", "made values that are not finite"),
}


@pytest.fixture(scope="module")
def docs() -> Any:
    """The two scripts as modules."""
    sys.path.insert(0, str(DOCS))
    try:
        page, sites = importlib.import_module("errors_page"), importlib.import_module("error_sites")
    finally:
        sys.path.remove(str(DOCS))
    return types.SimpleNamespace(page=page, sites=list(sites.sites()), entries=page.entries(), module=sites)


def test_the_page_is_current(docs):
    assert docs.page.page() == PAGE, "run: python docs/errors_page.py"


def test_it_has_every_place_where_an_error_is_made(docs):
    """Whatever is raised anew is an error of the page, but for two signals that are caught where they are raised."""
    made = {(site.module, site.line) for site in docs.sites}
    assert len(made) >= 150
    # A function that returns an error is itself a place where one is made.
    functions = [
        node for one in docs.module.modules() for node in ast.walk(one.tree) if isinstance(node, ast.FunctionDef)
    ]
    makers = {
        node.name
        for node in functions
        if node.returns and ast.unparse(node.returns).rpartition(".")[2] in docs.module.CLASSES
    }
    missing = []
    for module in docs.module.modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                lines = range(node.lineno, node.end_lineno + 1)
                is_made = any((module.name, line) in made for line in lines)
                called = ast.unparse(node.exc.func)
                is_made |= called.rpartition(".")[2] in makers
                missing += [] if is_made else [f"{module.name}:{node.lineno} {called}"]
            elif isinstance(node, ast.Raise) and node.exc is not None:
                missing += [] if ast.unparse(node.exc) in ("TypeError", "errors[0]") else [ast.unparse(node)]
    assert missing == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mistake_has_several_messages(kind, docs):
    names = {cls.__name__ for cls in KINDS[kind]}
    assert sum(entry.error in names for entry in docs.entries) >= 4


def test_every_class_is_of_some_kind(docs):
    of_kinds = {cls.__name__ for cls in itertools.chain.from_iterable(KINDS.values())}
    others = {entry.error for entry in docs.entries} - of_kinds
    assert others == {
        "UserCodeError", "LedgerError", "AgreementError", "CheckpointError", "ResumeError", "CommandError",
        "UsageError", "FireError",
    }  # fmt: skip


@pytest.mark.parametrize("kind", RETURNED)
def test_every_wrong_result_of_a_surgery_is_there(kind):
    assert [text for text in RETURNED[kind] if not re.search(text, PAGE)] == []


def test_places_on_the_page_are_distinct_and_links_lead_to_them(docs):
    anchors = re.findall(r'<a id="([^"]*)">', PAGE)
    assert max(Counter(anchors).values()) == 1
    assert anchors == [entry.anchor for entry in docs.entries]
    titles = {title.lower() for title in re.findall("^## (.*)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= titles


def test_the_table_counts_the_messages(docs):
    told = {name: int(count) for name, count in re.findall(r"^\| \[`(\w+)`\]\S+ \| (\d+) \|", PAGE, re.MULTILINE)}
    assert told == Counter(entry.error for entry in docs.entries)


def test_messages_are_sorted_within_their_class():
    for section in PAGE.split("\n## ")[3:]:
        messages = re.findall(r"</a>`+ ?(.*?) ?`+\\?$", section, re.MULTILINE)
        words = [" ".join(re.findall(r"\w+", re.sub("<.*?>", " ", message).lower())) for message in messages]
        assert words == sorted(words)
        assert words


def test_markdown_shows_messages_as_they_are():
    """All stand in code, whose marks are longer than any within."""
    items = re.findall(r"^- <a .*?(?=\n\n|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    for item in items:
        outside = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", item.partition("</a>")[2])
        assert re.fullmatch(r"(\\\n  (Found:|Write instead:)|\s|or|\(or nothing\))*", outside), item


def test_the_example_on_the_page_does_what_it_says():
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=flags)
    [block] = re.findall(r"^```pycon\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    runner.run(doctest.DocTestParser().get_doctest(block, {}, "errors.md", None, 0), out=said.append)
    assert runner.tries
    assert not runner.failures, "".join(said)


def test_texts_are_read_off_the_source_as_the_examples_say(docs):
    assert doctest.testmod(docs.page).failed == doctest.testmod(docs.module).failed == 0


# What users see is on the page.


def words(docs: Any, entry: Any) -> list[str]:
    """What a message says whatever it is about."""
    return re.findall(r"\w+", re.sub(f"{docs.module.OPEN}.*?{docs.module.CLOSE}", " ", entry.problem))


def of_error(docs: Any, error: e.SurgeryError) -> list[Any]:
    """The entries that say what an error says, the one with the most words of its own last."""
    found = None if error.found is None else e.shorten(error.found)
    said = [one for one in docs.entries if one.matches(type(error).__name__, error.problem, found, error.write)]
    return sorted(said, key=lambda one: len(words(docs, one)))


def assert_on_the_page(docs: Any, error: e.SurgeryError) -> None:
    matching = of_error(docs, error)
    assert matching, str(error)
    assert words(docs, matching[-1])
    assert f'<a id="{matching[-1].anchor}"></a>' in PAGE
    changed = type(error)(f"{error.problem} Or so.", found=error.found, write=f"never {error.write}")
    assert of_error(docs, changed) == []


@pytest.mark.parametrize("name", CASES)
def test_what_the_core_raises_is_on_the_page(name, docs):
    assert_on_the_page(docs, outcome(name)[0])


def nothing(*args: Any, **kwargs: Any) -> None:
    """A function that does nothing."""


ELSEWHERE = {
    # Schedules.
    "every_0": lambda: every(0),
    "every_text": lambda: every("3"),
    "no_steps": lambda: fsh.at(),
    "negative": lambda: fsh.at(-1),
    "text_step": lambda: fsh.at("3"),
    "start": lambda: every(5, start=-1),
    "start_text": lambda: every(5, start="1"),
    "stop": lambda: every(5, start=10, stop=3),
    "never_due": lambda: every(5, stop=3),
    "phase": lambda: every(5, phase=5),
    "union": lambda: every(5) | 7,
    "max_fires": lambda: every(5, max_fires=0),
    # Patterns.
    "no_match": lambda: fsh.operate(PLAIN, halve, params="q"),
    "no_match_of_a_predicate": lambda: fsh.operate(PLAIN, halve, params=lambda path, leaf: False),
    "no_match_of_a_regex": lambda: fsh.operate(PLAIN, halve, params="re:q"),
    "regex": lambda: select("re:("),
    "brackets": lambda: select("a[0]/b"),
    "stars": lambda: fsh.operate(PLAIN, halve, params="a**"),
    "brace": lambda: fsh.operate(PLAIN, halve, params="{a"),
    "closing_brace": lambda: fsh.operate(PLAIN, halve, params="a}"),
    "braces": lambda: fsh.operate(PLAIN, halve, params="{}"),
    "expect": lambda: fsh.operate(PLAIN, halve, expect=2),
    "expect_0": lambda: select("*", expect=0),
    "excluded": lambda: fsh.operate(PLAIN, halve, exclude="*"),
    "empty": lambda: select(""),
    "empty_list": lambda: select([]),
    "exclude_empty_list": lambda: select("*", exclude=[]),
    "number": lambda: select(3),
    "no_bool": lambda: fsh.operate(PLAIN, halve, params=lambda path, leaf: 1),
    "predicate_raises": lambda: fsh.operate(PLAIN, halve, params=lambda path: True),
    # Steps, as trainers get them wrong.
    "a_traced_step": lambda: jax.jit(lambda step: make_hooks(halve)(step, PLAIN))(1),
    "a_jax_array": by_hook(step=jnp.int32(1)),
    "0-based": by_hook(step=0),
    "hooks(step)": lambda: make_hooks(halve)(1),
    "twice": lambda: started()(1, PLAIN),
    "is_due_of_a_float": lambda: every(5).is_due(1.5),
    "is_due_of_a_traced_float": lambda: jax.jit(every(5).is_due)(1.5),
    # Adapters.
    "bind_nnx": lambda: adapters.bind_nnx(1, 2),
    # Config.
    "register": lambda: fsh.register_surgery(""),
    "register_a_function": lambda: fsh.register_surgery("mine")(nothing),
    # Metrics.
    "max_pending": lambda: writers.AsyncWriter(None, max_pending=0),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_the_rest_raises_is_on_the_page(name, docs):
    with pytest.raises(e.SurgeryError) as caught:
        ELSEWHERE[name]()
    assert_on_the_page(docs, caught.value)


def _mistakes() -> list[dict[str, Any]]:
    marks = test_config.test_one_mistake_is_one_problem.pytestmark
    return [fields for mark in marks if mark.name == "parametrize" for fields, _ in mark.args[1]]


@pytest.mark.parametrize("fields", _mistakes(), ids=lambda fields: ",".join(map(str, fields.items())))
@pytest.mark.usefixtures("registry")
def test_what_is_wrong_with_a_config_is_on_the_page(fields, docs):
    """As a problem of configs, or behind its key in the words of another class."""
    problem = problem_of(**fields)
    rest = problem.partition(": ")[2]
    known = [one for one in docs.entries if one.matches("ConfigError", problem)]
    known += [one for one in docs.entries if one.error != "ConfigError" and one.says(rest)]
    # What a surgery's own `__post_init__` raises is in its words; `<key>: <class>: <error>` would stand for too much.
    assert any(len(words(docs, one)) > 1 for one in known) or rest.startswith("Cut: ValueError"), problem


def test_a_config_error_is_on_the_page(docs):
    with pytest.raises(e.ConfigError) as caught:
        fsh.SurgeryHooks.from_config({"a": 3, "b": 4})
    assert_on_the_page(docs, caught.value)


def test_a_state_without_tx_names_what_is_missing(docs):
    state = types.SimpleNamespace(params=PLAIN.params, opt_state=optax.EmptyState(), replace=nothing)
    with pytest.raises(e.StateError, match="tx missing") as caught:
        fsh.operate(state, halve)
    assert_on_the_page(docs, caught.value)
