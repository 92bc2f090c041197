"""Surgeries that hold other surgeries: from dicts, `hook`, the shell, references and `objects`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_cases import Cut, Fill, parse, parse_one, problems_of
from config_cases import own_registry as own_registry  # the fixture `registry`
from ml_collections import ConfigDict, FieldReference, config_dict

import flax_surgery_hooks as fsh
from flax_surgery_hooks.config import build, hook, surgery
from flax_surgery_hooks.errors import ConfigError
from flax_surgery_hooks.surgeries import Normalize, Scale

HALF, SINE, SOME = Scale(0.5), Fill(jnp.sin), Cut(0.5)


@dataclasses.dataclass(frozen=True)
class Twice:
    """Runs one surgery after another."""

    inner: fsh.Surgery
    outer: Scale = HALF
    more: tuple[fsh.Surgery, ...] = ()
    last: fsh.Surgery | None = None

    def __call__(self, leaf: jax.Array) -> jax.Array:
        for each in (self.inner, self.outer, *self.more, *([self.last] if self.last else [])):
            leaf = each(leaf)
        return leaf


@dataclasses.dataclass(frozen=True)
class Filled:
    """Its default no config can hold."""

    inner: Fill = SINE

    def __call__(self, leaf: jax.Array) -> jax.Array:
        return self.inner(leaf)


@pytest.fixture(autouse=True)
def nesting(registry: dict[str, type]) -> None:
    registry.update(twice=Twice, filled=Filled)


def twice(**fields: Any) -> ConfigDict:
    return hook("twice", **{"params": "w", "every": 5, "inner": surgery("scale", factor=2), **fields})


def made(config: Any, objects: dict[str, Any] | None = None) -> Any:
    [spec] = build({"x": config}, objects)
    return spec.surgery


PLAIN = {"surgery": "scale", "factor": 2}


@pytest.mark.parametrize("inner", [surgery("scale", factor=2), PLAIN, ConfigDict(PLAIN), Scale(2.0)], ids=type)
def test_a_surgery_in_a_surgery_however_it_is_given(inner: Any):
    expected = Twice(Scale(2.0))
    assert made(hook("twice", params="w", every=5, inner=inner)) == expected
    assert made({"surgery": "twice", "params": "w", "every": 5, "inner": inner}) == expected
    assert type(made(twice(inner=inner)).inner.factor) is float


def test_it_is_called():
    np.testing.assert_array_equal(made(twice(last=surgery("scale", factor=3)))(jnp.ones(2)), [3.0, 3.0])


def test_the_default_of_a_nested_field_is_there_for_the_shell():
    assert twice().outer.to_dict() == {"surgery": "scale", "factor": 0.5}
    spec = parse_one(twice(), "outer.factor=0.25", "inner.factor=8")
    assert spec.surgery == Twice(Scale(8.0), Scale(0.25))


def test_the_shell_replaces_a_nested_surgery_by_a_dict():
    assert parse_one(twice(), "last={'surgery': 'normalize', 'to': 3}").surgery.last == Normalize(to=3.0)


def test_nested_surgeries_nest():
    inner = surgery("twice", inner=surgery("twice", inner=PLAIN))
    assert made(twice(inner=inner)) == Twice(Twice(Twice(Scale(2.0))))
    assert parse_one(twice(inner=inner), "inner.inner.inner.factor=4").surgery.inner.inner.inner == Scale(4.0)


def test_tuples_of_surgeries():
    more = (surgery("scale", factor=2), {"surgery": "normalize"}, Scale(3.0))
    config = twice(more=more)
    assert made(config).more == (Scale(2.0), Normalize(), Scale(3.0))
    assert made(json.loads(config.to_json())) == made(config)


def test_references_in_a_nested_surgery_are_read_late():
    factor = FieldReference(1)
    config = ConfigDict(
        {"x": twice(inner=surgery("scale", factor=factor), more=({"surgery": "scale", "factor": factor},))}
    )
    factor.set(7)
    [spec] = build(config)
    assert (spec.surgery.inner, spec.surgery.more) == (Scale(7.0), (Scale(7.0),))


def test_a_placeholder_in_a_nested_surgery_is_filled_later():
    config = twice(inner=surgery("scale", factor=config_dict.required_placeholder(float)))
    [problem] = problems_of({"x": config})
    assert problem.startswith("surgery.x.inner: has no value: RequiredValueError")
    config.inner.factor = 3.0
    assert made(config) == Twice(Scale(3.0))
    left_open = twice(inner=surgery("scale"))
    assert problems_of({"x": left_open}) == [
        "surgery.x.inner.factor: no value; set it to float, or pass objects={'factor': ...}"
    ]
    assert parse_one(left_open, "inner.factor=3").surgery == Twice(Scale(3.0))


def test_a_locked_config_takes_values_of_nested_fields():
    config = parse({"x": twice()})
    config.lock()
    config.x.inner.factor = 5.0
    assert build(config)[0].surgery.inner == Scale(5.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"inner": 3}, "surgery.x.inner: wants a surgery, found 3 (int)"),
        ({"inner": {"factor": 3}}, "surgery.x.inner: wants a surgery, found {'factor': 3} (dict)"),
        ({"inner": {"surgery": "scal"}}, "surgery.x.inner.surgery: unknown surgery 'scal' (did you mean 'scale'?)"),
        ({"inner": {**PLAIN, "factr": 1}}, "surgery.x.inner.factr: unknown key (did you mean 'factor'?)"),
        ({"inner": {"surgery": "scale", "factor": "a"}}, "surgery.x.inner.factor: wants float, found 'a' (str)"),
        ({"inner": {**PLAIN, "every": 5}}, "surgery.x.inner.every: unknown key"),
        ({"inner": {"surgery": "cut", "sparsity": 2}}, "surgery.x.inner: Cut: ValueError: sparsity must be"),
        ({"outer": {"surgery": "normalize"}}, "surgery.x.outer: wants the surgery Scale, found Normalize(axis=None"),
        ({"more": (PLAIN, {"surgery": "scal"})}, "surgery.x.more.1.surgery: unknown surgery 'scal'"),
        ({"more": PLAIN}, "surgery.x.more: wants tuple[Surgery, ...], found {"),
        ({"inner": None}, "surgery.x.inner: no value; set it to a surgery, or pass objects={'inner': ...}"),
    ],
)  # fmt: skip
def test_a_mistake_inside_has_its_path(fields: dict[str, Any], expected: str):
    [problem] = problems_of({"x": {"surgery": "twice", "params": "w", "every": 5, "inner": PLAIN, **fields}})
    assert problem.startswith(expected)


def test_hook_and_surgery_tell_mistakes_inside():
    with pytest.raises(ConfigError) as caught:
        twice(inner={"surgery": "scale", "factor": "a"}, outer={"surgery": "scal"}, last=lambda leaf: leaf)
    problems = caught.value.problems
    assert [problem.split(": ")[0] for problem in problems] == [
        "hook('twice').inner.factor", "hook('twice').outer.surgery", "hook('twice').last"
    ]  # fmt: skip
    assert problems[-1].endswith("set it to a surgery, or pass objects={'last': ...}")
    for wrong in ({"factr": 1}, {"surgery": "noise"}, {"every": 5}):
        with pytest.raises(ConfigError, match=r"surgery\('scale'\)\." + next(iter(wrong))):
            surgery("scale", **wrong)


def test_objects_reach_nested_surgeries():
    assert made(twice(inner=None), {"inner": jnp.sin}).inner is jnp.sin
    assert made(twice(inner=surgery("fill")), {"fn": jnp.cos}).inner == Fill(jnp.cos)
    [problem] = problems_of(
        {"x": {"surgery": "twice", "params": "w", "every": 5, "inner": PLAIN}}, {"outer": Normalize()}
    )
    assert problem.startswith("objects.outer: wants the surgery Scale, for surgery.x; found Normalize(")
    [problem] = problems_of({"x": twice(inner=surgery("fill"))})
    assert problem == "surgery.x.inner.fn: no value; it cannot stand in a config: pass objects={'fn': ...}"


def test_a_default_that_no_config_can_hold_stays():
    config = hook("filled", params="w", every=5)
    assert config.inner is None
    assert made(config) == Filled()


def test_a_function_beside_a_surgery_stays_settable(registry: dict[str, type]):
    @dataclasses.dataclass(frozen=True)
    class Either:
        inner: Cut | Callable[[Any], Any] = SOME

        def __call__(self, leaf: jax.Array) -> jax.Array:
            return self.inner(leaf)

    Either.__annotations__["inner"] = Cut | Callable[[Any], Any]
    registry["either"] = Either
    config = hook("either", params="w", every=5)
    assert made(config) == Either()
    assert parse_one(config, "inner.sparsity=0.25").surgery.inner == Cut(0.25)
