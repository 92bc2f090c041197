"""Selections against an oracle that matches globs name by name, and every way in which a selection is refused."""

import dataclasses
import fnmatch
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_surgery_hooks import paths
from flax_surgery_hooks.errors import SelectionError, SurgeryError, UserCodeError
from flax_surgery_hooks.selection import Glob, Selection, select


def same_everywhere(value: object) -> str:
    """A test id without addresses, which differ between the workers of pytest-xdist."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def tree(*names):
    """A flattened tree of parameters with these joined paths, in this order."""
    return paths.Leaves(names, tuple((name,) for name in names), tuple(range(len(names))), None)


def selected(leaves, *arguments, **named):
    return [leaves.paths[index] for index in select(*arguments, **named).resolve(leaves)]


LEAVES = paths.flatten(
    {
        "embed": jnp.ones((5, 3)),
        "encoder": {
            "Dense_0": {"bias": jnp.ones(4), "kernel": jnp.ones((3, 4))},
            "Dense_1": {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))},
            "norm": {"scale": jnp.ones(4)},
        },
        "head": {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))},
    }
)


# The oracle: braces by rewriting the innermost pair, then names one at a time. No regular expression over paths.


def oracle(pattern, path):
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner:
        head, tail = pattern[: inner.start()], pattern[inner.end() :]
        return any(oracle(head + choice + tail, path) for choice in inner[1].split(","))
    return names_match(pattern.split("/") if pattern else [], path.split("/") if path else [])


def names_match(globs, names):
    if not globs:
        return not names
    if globs[0] == "**":
        return names_match(globs[1:], names) or (bool(names) and names_match(globs, names[1:]))
    return bool(names) and fnmatch.fnmatchcase(names[0], globs[0]) and names_match(globs[1:], names[1:])


# The law. It returns the disagreements, so that wrong matchers can prove that it finds them.

SOME_PATHS = [
    "",
    "a",
    "b",
    "ab",
    "a/b",
    "a/a",
    "b/a",
    "a/b/c",
    "a/b/c/a",
    "c/a.b",
    "c/a_b",
    "c/ab",
    "kernel",
    "a/b/kernel",
]
SOME_GLOBS = [
    "**", "*", "?", "a", "a/*", "a/**", "**/a", "**/kernel", "a/**/a", "**/b/**", "*/*", "a*", "*b", "a?b", "c/a.b",
    "**/**", "**/**/a", "a/a/**", "{a,b}", "{a,b}/{a,b}", "{a,b{,/a}}", "{**,b}/a", "{a/**,c}/{a,ab}", "a{,/b{,/c}}",
    "{a,{b,{kernel,c}/ab}}", "*{a,b}", "{*,**}/c/a", "a,b", "{a}", "{a,b}{,b}",
]  # fmt: skip


def disagreements(matches, globs=SOME_GLOBS, names=SOME_PATHS):
    return [(glob, name) for glob in globs for name in names if matches(glob, name) != oracle(glob, name)]


def matches(glob, name):
    return Glob(glob)._matches(tree(name)) == (0,)


def test_globs_against_the_oracle():
    assert disagreements(matches) == []


def star_crosses_slashes(glob, name):
    return any(fnmatch.fnmatchcase(name, plain) for plain in expanded(glob))


def doublestar_is_one_or_more(glob, name):
    wanted = [plain.replace("**", "*/**") for plain in expanded(glob)]
    return any(oracle(plain, name) for plain in wanted)


def dot_is_any_character(glob, name):
    return any(matches(plain.replace(".", "?"), name) for plain in expanded(glob))


def prefix_suffices(glob, name):
    return matches(glob, name) or matches(glob + "/**", name)


def braces_are_flat(glob, name):
    return matches(glob, name) if glob.count("{") < 2 else any(oracle(p, name) for p in re.split("[{},]", glob))


def bare_array_is_one_name(glob, name):
    return matches(glob, name) or (name == "" and glob == "*")


def expanded(glob):
    inner = re.search(r"\{([^{}]*)\}", glob)
    if not inner:
        return [glob]
    return [p for choice in inner[1].split(",") for p in expanded(glob[: inner.start()] + choice + glob[inner.end() :])]


@pytest.mark.parametrize(
    "wrong",
    [
        star_crosses_slashes,
        doublestar_is_one_or_more,
        dot_is_any_character,
        prefix_suffices,
        braces_are_flat,
        bare_array_is_one_name,
    ],
)
def test_the_law_finds_wrong_matchers(wrong):
    assert disagreements(wrong)


NAME = st.text("ab", min_size=1, max_size=3)
PATH = st.lists(NAME, max_size=4).map("/".join)
GLOB_NAME = st.one_of(
    st.just("**"), st.lists(st.sampled_from(["a", "b", "*", "?"]), min_size=1, max_size=3).map("".join)
)
PLAIN = st.lists(GLOB_NAME.filter(lambda name: name == "**" or "**" not in name), min_size=1, max_size=3).map("/".join)
BRACED = st.recursive(
    PLAIN,
    lambda part: st.lists(st.one_of(part, st.just("b")), min_size=1, max_size=3).map(lambda p: "{" + ",".join(p) + "}"),
    max_leaves=4,
)
GLOB = st.lists(BRACED, min_size=1, max_size=3).map("/".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(GLOB, st.lists(PATH, min_size=1, max_size=8))
def test_random_globs_against_the_oracle(glob, names):
    assert disagreements(matches, [glob], names) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_selections_against_sets(data):
    names = data.draw(st.lists(PATH.filter(bool), min_size=1, max_size=8, unique=True))
    include = data.draw(st.lists(GLOB, min_size=1, max_size=3))
    exclude = data.draw(st.lists(GLOB, max_size=2))
    hit = {glob: {i for i, name in enumerate(names) if oracle(glob, name)} for glob in (*include, *exclude)}
    expected = set().union(*map(hit.get, include)).difference(*map(hit.get, exclude))
    selection = select(include, exclude=exclude or None)
    if expected and all(hit.values()):
        assert selection.resolve(tree(*names)) == tuple(sorted(expected))
    else:
        with pytest.raises(SelectionError):
            selection.resolve(tree(*names))


# What selects, one by one.


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("embed", ["embed"]),
        ("head/*", ["head/bias", "head/kernel"]),
        ("**/bias", ["encoder/Dense_0/bias", "encoder/Dense_1/bias", "head/bias"]),
        ("encoder/Dense_?/{kernel,bias}", [p for p in LEAVES.paths if "Dense" in p]),
        ("{head,encoder/{norm,Dense_1}}/{scale,k*}", ["encoder/Dense_1/kernel", "encoder/norm/scale", "head/kernel"]),
        ("**", list(LEAVES.paths)),
        ("re:.*/Dense_[1-9]/kernel", ["encoder/Dense_1/kernel"]),
        (lambda path, leaf: leaf.ndim == 2 and "head" in path, ["head/kernel"]),
        (lambda path, leaf: np.bool_(leaf.size == 15), ["embed"]),
        (["head/kernel", "embed"], ["embed", "head/kernel"]),
        (("head/kernel", ["embed", "**/head/kernel"]), ["embed", "head/kernel"]),
        (["re:emb.*", lambda path, _: path == "head/bias", "**/scale"], ["embed", "encoder/norm/scale", "head/bias"]),
        (select("**/kernel", exclude="head/*"), ["encoder/Dense_0/kernel", "encoder/Dense_1/kernel"]),
        ([select("**/kernel", exclude="encoder/**"), "embed"], ["embed", "head/kernel"]),
    ],
    ids=same_everywhere,
)  # fmt: skip
def test_select(patterns, expected):
    assert selected(LEAVES, patterns) == expected


@pytest.mark.parametrize(
    "exclude",
    ["encoder/**", "re:encoder/.*", lambda path, leaf: path.startswith("enc"), ["**/Dense_0/*", "encoder/Dense_1/*"]],
    ids=["glob", "re", "predicate", "list"],
)
def test_exclude_takes_the_same_forms(exclude):
    assert selected(LEAVES, "**/kernel", exclude=exclude) == ["head/kernel"]
    assert selected(LEAVES, "**/kernel", exclude=select(exclude)) == ["head/kernel"]


def test_expect_is_how_many():
    assert len(select("**/kernel", expect=3).resolve(LEAVES)) == 3
    assert len(select("**/kernel", exclude="head/*", expect=np.int64(2)).resolve(LEAVES)) == 2


def test_a_bare_array_has_the_empty_path():
    bare = paths.flatten(jnp.ones(3))
    for patterns in ("**", "**/**", "re:.*", lambda path, leaf: path == ""):
        assert select(patterns).resolve(bare) == (0,)
    with pytest.raises(SelectionError, match=re.escape("Found: ''.")):
        select("*").resolve(bare)


def test_predicates_see_abstract_leaves():
    abstract = paths.flatten(jax.eval_shape(lambda: {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}))
    assert select(lambda path, leaf: leaf.ndim == 2).resolve(abstract) == (0,)


def test_many_stars_in_a_row_do_not_blow_up():
    assert not matches("/".join(["**"] * 30 + ["b"]), "/".join(["a"] * 30))


# Values.


def test_selections_are_values():
    make = functools.partial(select, ["**/kernel", "re:.*bias"], "head/**", 4)
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != select(["**/kernel", "re:.*bias"], "head/**")
    assert select("re:a") != select("a")
    assert select(select("a")) == select("a")
    assert select(make()) is not None
    assert isinstance(make(), Selection)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().expect = 1


def is_matrix(path, leaf, ndim=2):
    return leaf.ndim == ndim


class IsBias:
    def __call__(self, path, leaf):
        return path.endswith("bias")


def test_describe_is_stable_json():
    inner = select("**/bias", exclude="head/**", expect=2)
    predicates = [is_matrix, functools.partial(functools.partial(is_matrix), ndim=1), IsBias(), lambda path, leaf: True]
    selection = select(["re:.*", *predicates, inner], exclude=("a", ["{b,c}"]))
    described = selection.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "params": [
            "re:.*",
            f"{__name__}.is_matrix",
            f"{__name__}.is_matrix",
            f"{__name__}.IsBias",
            f"{__name__}.test_describe_is_stable_json.<locals>.<lambda>",
            {"params": ["**/bias"], "exclude": ["head/**"], "expect": 2},
        ],
        "exclude": ["a", "{b,c}"],
        "expect": None,
    }


# Every `raise` at construction, on its content.


BRACES = "{kernel,bias} without spaces, or a list of patterns; for a literal brace, a 're:' pattern"

REFUSED = {
    "empty pattern": (("",), "params= holds an empty pattern.", "''", "params='**'"),
    "blank pattern": (("  ",), "params= holds an empty pattern.", "'  '", "params='**'"),
    "empty regex": (("re:",), "params= holds an empty pattern.", "'re:'", "params='**'"),
    "empty pattern in a list": ((["a", ""],), "params= holds an empty pattern.", "''", "params='**'"),
    "empty exclude": (("a", ""), "exclude= holds an empty pattern.", "''", "exclude=None"),
    "empty list": (([],), "params= is an empty list.", [], "params='**'"),
    "empty tuple within": ((["a", ()],), "params= is an empty list.", (), "params='**'"),
    "exclude of nothing": (("a", []), "exclude= is an empty list.", [], "exclude=None"),
    "None": ((None,), "params= cannot be of type NoneType.", None, "a glob, a 're:' pattern, a function"),
    "the params": (({"a": jnp.ones(3)},), "params= cannot be of type dict.", None, "a glob, a 're:' pattern"),
    "a set": (({"a", "b"},), "params= cannot be of type set.", None, "a list of these, or a Selection"),
    "a number in exclude": (("a", [3]), "exclude= cannot be of type int.", None, "a glob, a 're:' pattern"),
    "bad regex": (("re:(a",), "Not a regular expression: missing )", "re:(a", "'re:Dense_[0-3]/kernel'"),
    "index in the middle": (("k[3]/kernel",), "but for an index at its very end", "'k[3]/kernel'",
                            "for layers 'layers/**/kernel[3]'"),
    "character class": (("Dense_[01]",), "Brackets are not part of a glob", "'Dense_[01]'", "'re:Dense_[0-3]/kernel'"),
    "never closed": (("{a,{b}/c",), "A brace is opened and never closed.", "'{a,{b}/c'", BRACES),
    "never opened": (("a}/b",), "A brace is closed that was never opened.", "'a}/b'", BRACES),
    "closed twice": (("{a,b}}",), "A brace is closed that was never opened.", "'{a,b}}'", BRACES),
    "nothing in braces": (("a{}",), "Braces with nothing in them.", "'a{}'", BRACES),
    "space in braces": (("{a, b}",), "Spaces within braces are taken as part of a name.", "'{a, b}'", BRACES),
    "too many braces": (("{a,b}" * 10,), "Braces that stand for more than 1000 patterns.", "{a,b}{a,b}", BRACES),
    "stars in a name": (("a/b**/c",), "`**` stands for whole names", "'b**'", "'b*'"),
    "three stars": (("***",), "must stand alone between slashes", "'***'", "'*'"),
    "stars from braces": (("b{a,*}*",), "must stand alone between slashes", "'b**'", "'b*'"),
    "expect of 0": (("a", None, 0), "expect= is how many leaves", "int 0", "expect=2"),
    "expect below 0": (("a", None, -1), "expect= is how many leaves", "int -1", "expect=2"),
    "expect of True": (("a", None, True), "expect= is how many leaves", "bool True", "expect=2"),
    "float expect": (("a", None, 2.0), "expect= is how many leaves", "float 2.0", "expect=2"),
    "text expect": ((select("a"), None, "2"), "expect= is how many leaves", "str 2", "expect=2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name):
    arguments, problem, found, write = REFUSED[name]
    with pytest.raises(SelectionError) as caught:
        select(*arguments)
    error = caught.value
    assert problem in error.problem
    assert found in error.found if isinstance(found, str) else found == error.found
    assert write in error.write
    assert "array" not in str(error).lower()


def test_a_bad_regex_is_chained():
    with pytest.raises(SelectionError) as caught:
        select("re:[a")
    assert isinstance(caught.value.__cause__, re.error)


# Every `raise` at resolution, on its content.


@pytest.mark.parametrize(
    ("patterns", "what", "write"),
    [
        ("head/kernal", "The pattern 'head/kernal'", "'head/kernel'"),
        ("head", "The pattern 'head'", "'head/**'"),
        ("scale", "The pattern 'scale'", "'**/scale'"),
        ("Dense_0", "The pattern 'Dense_0'", "'**/Dense_0/**'"),
        ("/head/bias", "The pattern '/head/bias'", "'head/bias'"),
        ("params/head/kernel", "The pattern 'params/head/kernel'", "'head/kernel'"),
        ("encoder/*", "The pattern 'encoder/*'", "'encoder/*/**'"),
        ("re:kernel", "The pattern 're:kernel'", "'re:.*(kernel).*'"),
        ("re:head/kernal", "The pattern 're:head/kernal'", "'head/kernel'"),
        ("xyz", "The pattern 'xyz'", None),
        (lambda path, leaf: False, "The predicate test_selection.<lambda>", None),
    ],
    ids=same_everywhere,
)
def test_a_pattern_that_matches_nothing(patterns, what, write):
    combined = [select(patterns), select(["**", patterns]), select("**", exclude=["head/*", patterns])]
    for selection in combined:
        with pytest.raises(SelectionError) as caught:
            selection.resolve(LEAVES)
        error = caught.value
        assert error.problem == f"{what} matches none of the {len(LEAVES.paths)} parameters."
        assert all(repr(path) in error.found for path in LEAVES.paths)
        assert error.write is None if write is None else write in error.write


def test_nothing_to_match():
    with pytest.raises(SelectionError, match=r"none of the 0 parameters\. Found: no parameters at all\.$"):
        select("**").resolve(paths.flatten({}))


def test_a_large_model_does_not_fill_the_screen():
    large = tree(*(f"block_{i}/attention/query/kernel" for i in range(500)))
    with pytest.raises(SelectionError, match="and 488 more") as caught:
        select("xyz").resolve(large)
    assert len(str(caught.value)) < 700


def test_everything_excluded():
    with pytest.raises(SelectionError, match="Everything that was selected is also excluded") as caught:
        select("head/*", exclude="**").resolve(LEAVES)
    assert caught.value.found == "head/bias, head/kernel"
    assert caught.value.write == "a narrower exclude="


def test_another_count_than_expected():
    with pytest.raises(SelectionError, match="Expected 2 leaves, but 3 are selected") as caught:
        select("**/kernel", expect=2).resolve(LEAVES)
    assert caught.value.found == "encoder/Dense_0/kernel, encoder/Dense_1/kernel, head/kernel"
    assert caught.value.write == "expect=3, or another pattern"


def test_a_predicate_that_raises():
    def fails(path, leaf):
        return leaf.shape[1] > 3

    with pytest.raises(UserCodeError) as caught:
        select(["embed", fails]).resolve(LEAVES)
    error = caught.value
    assert error.path == "encoder/Dense_0/bias"
    assert "fails, called with (path, leaf), raised IndexError: tuple index out of range" in error.problem
    assert isinstance(error.__cause__, IndexError)
    assert str(error).startswith("path 'encoder/Dense_0/bias': The predicate test_selection.test_a_predicate")


def test_a_predicate_of_another_signature():
    with pytest.raises(UserCodeError, match=r"called with \(path, leaf\), raised TypeError") as caught:
        select(lambda path: True).resolve(LEAVES)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (None, "NoneType None"),
        (1, "int 1"),
        ("yes", "str yes"),
        (jnp.array(True), "bool[]"),
        (np.ones(2), "float64[2]"),
    ],
    ids=["None", "int", "str", "jax", "numpy"],
)
def test_a_predicate_that_returns_no_bool(answer, found):
    with pytest.raises(SelectionError, match="must return True or False") as caught:
        select(lambda path, leaf: answer).resolve(LEAVES)
    assert found in caught.value.found
    assert caught.value.path == "embed"
    assert caught.value.write == "a function of (path, leaf) such as lambda path, leaf: leaf.ndim == 2"


def test_errors_are_surgery_errors():
    assert issubclass(SelectionError, SurgeryError)
    assert issubclass(UserCodeError, SurgeryError)
