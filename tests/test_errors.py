"""What an error says, and that it never prints an array."""

import copy
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_surgery_hooks import errors
from flax_surgery_hooks.errors import ConfigError, SurgeryError, located, shorten, typed

CLASSES = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, SurgeryError)]
FIELDS = {"found": "1.5", "write": "every(100)", "hook": "prune", "step": 300, "path": "head/kernel"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "Bad."),
        ({"hook": "prune"}, "hook 'prune': Bad."),
        ({"step": 0}, "step 0: Bad."),
        ({"path": ""}, "path '': Bad."),
        ({"hook": "prune", "path": "a/b"}, "hook 'prune', path 'a/b': Bad."),
        ({"found": 0}, "Bad. Found: 0."),
        ({"write": "at(5)"}, "Bad. Write instead: at(5)."),
        (FIELDS, "hook 'prune', step 300, path 'head/kernel': Bad. Found: 1.5. Write instead: every(100)."),
    ],
)
def test_message(fields, text):
    assert str(SurgeryError("Bad.", **fields)) == text


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_its_fields_and_survives_pickling(kind):
    error = kind("Bad.", **FIELDS)
    assert {name: getattr(error, name) for name in FIELDS} == FIELDS
    for again in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert vars(again) == vars(error)
        assert str(again) == str(error)
    bare = kind("Bad.")
    assert [getattr(bare, name) for name in FIELDS] == [None] * 5
    assert inspect.getdoc(kind) != inspect.getdoc(Exception)


def test_config_error_keeps_the_problems_apart():
    assert ConfigError("Bad.").problems == ["Bad."]
    error = ConfigError("Two.", problems=["a", "b"], path="surgery.prune")
    assert error.problems == pickle.loads(pickle.dumps(error)).problems == ["a", "b"]
    assert str(error) == "path 'surgery.prune': Two."


def test_long_values_are_cut_in_the_message():
    assert len(str(SurgeryError("Bad.", found="x" * 10_000))) < 350


def test_shorten():
    assert shorten("short") == "short"
    assert shorten(["a", 1]) == "['a', 1]"
    assert shorten("x" * 300) == "x" * 300
    assert shorten("a" * 200 + "b" * 200) == "a" * 148 + "..." + "b" * 148


@pytest.mark.parametrize("limit", range(3, 30))
def test_shorten_keeps_both_ends_within_the_limit(limit):
    text = "".join(map(chr, range(65, 120)))
    short = shorten(text, limit)
    assert len(short) <= limit
    head, tail = short.split("...")
    assert text.startswith(head)
    assert text.endswith(tail)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.ones((2, 3)), "ndarray float64[2, 3]"),
        (jnp.ones(5, jnp.bfloat16), "ArrayImpl bfloat16[5]"),
        (jax.ShapeDtypeStruct((), jnp.int32), "ShapeDtypeStruct int32[]"),
        (np.float32(2.5), "float32 float32[]"),
    ],
    ids=["numpy", "jax", "abstract", "scalar"],
)
def test_arrays_show_as_dtype_and_shape(value, text):
    assert shorten(value) == typed(value) == text
    assert str(SurgeryError("Bad.", found=value)) == f"Bad. Found: {text}."


@pytest.mark.parametrize(("value", "text"), [(3, "int 3"), (None, "NoneType None"), ("3", "str 3"), ([1], "list [1]")])
def test_typed(value, text):
    assert typed(value) == text


def test_typed_is_short():
    assert typed("x" * 500) == "str " + "x" * 38 + "..." + "x" * 38


def test_located_fills_in_what_is_missing():
    with (
        pytest.raises(SurgeryError) as caught,
        located(hook="outer", step=5, path="outer/path"),
        located(path="inner/path"),
        located(),
    ):
        raise SurgeryError("Bad.", step=0)
    error = caught.value
    assert (error.hook, error.step, error.path) == ("outer", 0, "inner/path")
    assert str(error) == "hook 'outer', step 0, path 'inner/path': Bad."


def test_located_leaves_other_errors_and_success_alone():
    with pytest.raises(ValueError, match="theirs"), located(hook="prune"):
        raise ValueError("theirs")
    with located(hook="prune"):
        pass
