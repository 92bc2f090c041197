"""Hooks to a config and back: the same hooks, or an error that names what a config cannot hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from config_cases import Cut, Fill, parse
from config_cases import own_registry as own_registry  # the fixture `registry`
from ml_collections import ConfigDict

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import ConfigError
from flax_surgery_hooks.surgeries import Assign, Normalize, Reinit, Scale

pytestmark = pytest.mark.usefixtures("registry")


@dataclasses.dataclass(frozen=True)
class Pair:
    inner: fsh.Surgery
    more: tuple[fsh.Surgery, ...] = ()

    def __call__(self, leaf: jax.Array) -> jax.Array:
        return self.inner(leaf)


def hooks_of(*hooks: tuple[Any, dict[str, Any]]) -> fsh.SurgeryHooks:
    """Hooks a, b, ... of pairs of a surgery and what else is said of it."""
    made = fsh.SurgeryHooks()
    for name, (surgery, said) in zip("abcdef", hooks, strict=False):
        made.add(said.pop("name", name), surgery, **{"params": "**", "when": fsh.every(5), **said})
    return made


def values(hooks: fsh.SurgeryHooks) -> list[tuple[Any, ...]]:
    """All that hooks are, but the number of their registration."""
    told = []
    for one in hooks._ordered():
        operation = dataclasses.replace(one.operation, edit=None)
        told.append((one.name, one.operation.edit.function, operation, one.when, one.priority))
    return told


def problems_of(hooks: fsh.SurgeryHooks, objects: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        hooks.to_config(objects=objects)
    return caught.value.problems


TOLD = {
    "defaults": (Normalize(), {}),
    "fields": (Normalize(axis=(0, 1), to=3.0), {}),
    "every type": (Cut(0.25, 3, "high", "late", (0, 1), (0.5, 0.1), 1, None, True, 2.5), {}),
    "patterns": (Scale(2.0), {"params": ["a/*", "re:b.*"], "exclude": "**/bias", "expect": 3}),
    "one in a list": (Scale(2.0), {"params": ["a/*"], "exclude": ["b", "c"]}),
    "at": (Scale(2.0), {"when": fsh.at(0, 7)}),
    "at and every": (Scale(2.0), {"when": fsh.at(0, 7) | fsh.every(9, start=3, stop=30)}),
    "epochs": (Scale(2.0), {"when": fsh.every_epochs(2, steps_per_epoch=50, max_fires=3)}),
    "fractions": (Scale(2.0), {"when": fsh.every_fraction(1 / 3, num_steps=1000)}),
    "phase": (Scale(2.0), {"when": fsh.every(9, phase=3)}),
    "a rule": (Scale(2.0), {"opt_state": "reset"}),
    "the default rule, said": (Scale(2.0), {"opt_state": "carry"}),
    "rules": (Scale(2.0), {"opt_state": {"grad_sq": "keep", "grad": "reset"}}),
    "the rest": (Scale(2.0), {"fresh": "init", "guard": "off", "figures": False, "priority": -3}),
    "nested": (Pair(Scale(2.0), (Cut(1.0), Pair(Normalize()))), {}),
    "numbers": (Scale(2), {}),
}


@pytest.fixture(autouse=True)
def pair(registry: dict[str, type]) -> None:
    registry["pair"] = Pair


@pytest.mark.parametrize(
    "through", [lambda config: config, lambda config: json.loads(config.to_json_best_effort())], ids=["", "json"]
)
@pytest.mark.parametrize("name", TOLD)
def test_the_same_hooks_come_back(name: str, through: Callable[[ConfigDict], Any]):
    surgery, said = TOLD[name]
    hooks = hooks_of((surgery, dict(said)))
    again = fsh.SurgeryHooks.from_config(through(hooks.to_config()))
    assert values(again) == values(hooks)
    assert again.to_config().to_dict() == hooks.to_config().to_dict()


def test_all_hooks_come_back_in_order_and_do_the_same():
    hooks = hooks_of(
        (Scale(3.0), {"name": "late", "when": fsh.at(1)}),
        (Normalize(), {"name": "early", "when": fsh.at(1), "priority": 2}),
    )
    again = fsh.SurgeryHooks.from_config(hooks.to_config())
    assert again.names == hooks.names == ("early", "late")
    states = [each(1, tiny.make_state(step=1)) for each in (hooks, again)]
    tiny.assert_bitwise_equal(states[0].params, states[1].params)
    np.testing.assert_allclose(states[0].params["w"], 3 / np.sqrt([2, 2]), rtol=1e-6)


def test_the_config_is_open_to_the_shell():
    config = hooks_of((Pair(Scale(2.0)), {})).to_config()
    changed = parse(config, "a.every=7", "a.inner.factor=4", "a.fresh=init", "a.num_steps=3")
    [[_, surgery, operation, when, _]] = values(fsh.SurgeryHooks.from_config(changed))
    assert (surgery, operation.fresh, when) == (Pair(Scale(4.0)), "init", fsh.every(7))


def test_no_hooks_are_an_empty_config():
    assert fsh.SurgeryHooks().to_config().to_dict() == {}


def test_objects_hold_what_no_config_can():
    objects = {"fn": jnp.sin, "score": jnp.abs, "weight": jnp.cos, "value": np.ones(2), "init": lambda key: {"w": key}}
    hooks = hooks_of(
        (Fill(jnp.sin), {}),
        (Cut(0.5, score=jnp.abs, weight=jnp.cos), {}),
        (Pair(Fill(jnp.sin)), {}),
        (Reinit(init=objects["init"]), {}),
    )
    del objects["value"]
    config = hooks.to_config(objects=objects)
    assert values(fsh.SurgeryHooks.from_config(config, objects=objects)) == values(hooks)
    assert "weight" not in config.b
    assert "fn" not in config.c.inner
    value = np.ones(2)
    assigning = hooks_of((Assign(value), {}))
    again = fsh.SurgeryHooks.from_config(assigning.to_config(objects={"value": value}), objects={"value": value})
    assert values(again)[0][1].value is value


@dataclasses.dataclass(frozen=True)
class Unknown:
    def __call__(self, leaf: jax.Array) -> jax.Array:
        return leaf


UNTOLD = {
    "a function": (tiny.halve, {}, "hooks.a.surgery: no config can name halve; make it a frozen dataclass under @reg"),
    "an unregistered class": (Unknown(), {}, "hooks.a.surgery: no config can name Unknown; make it a frozen dataclass"),
    "a required field": (
        Fill(jnp.sin),
        {},
        "hooks.a.fn: no value; it cannot stand in a config: pass objects={'fn': ...}",
    ),
    "an optional field": (
        Cut(0.5, score=abs),
        {},
        "hooks.a.score: would come back as None (NoneType), is <built-in funct",
    ),
    "an open field": (
        Cut(0.5, weight=abs),
        {},
        "hooks.a.weight: would come back as 1.0 (float), is <built-in function",
    ),
    "a nested field": (Pair(Fill(abs)), {}, "hooks.a.inner.fn: no value; it cannot stand in a config: pass objects="),
    "a nested class": (Pair(Unknown()), {}, "hooks.a.inner: no value; set it to a surgery, or pass objects={'inner'"),
    "a wrong type": (
        Cut(0.5, axes=[0]),
        {},
        "hooks.a.axes: would come back as (0,) (tuple), is [0] (list); pass objects",
    ),
    "a None": (
        Cut(0.5, dry=None),
        {},
        "hooks.a.dry: would come back as False (bool), is None (NoneType); pass objects",
    ),
    "a predicate": (
        Scale(2.0),
        {"params": ["a", lambda path, leaf: True]},
        "hooks.a.params: holds a predicate or a sel",
    ),
    "an excluded predicate": (Scale(2.0), {"exclude": lambda path, leaf: True}, "hooks.a.exclude: holds a predicate"),
    "a slot function": (
        Scale(2.0),
        {"opt_state": lambda slot, **_: slot},
        "hooks.a.opt_state: is a function, which no",
    ),
    "a slot function of a kind": (
        Scale(2.0),
        {"opt_state": {"grad": lambda slot, **_: slot}},
        "hooks.a.opt_state: is a f",
    ),
    "two periods": (
        Scale(2.0),
        {"when": fsh.every(2) | fsh.every(3)},
        "hooks.a.when: a config holds one each of `at`, `every`, `on_metric`,",
    ),
    "a new model": (Scale(2.0), {"apply_fn": abs}, "hooks.a.apply_fn: no config can hold it"),
    "a method's name": (
        Scale(2.0),
        {"name": "items"},
        "hooks.items: is the name of a method of ConfigDict; rename the",
    ),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_no_config_can_hold_is_named(name: str):
    surgery, said, expected = UNTOLD[name]
    [problem] = problems_of(hooks_of((surgery, dict(said))))
    assert problem.startswith(expected)


def test_everything_is_told_at_once():
    hooks = hooks_of(
        (tiny.halve, {"params": lambda path, leaf: True}), (Scale(1.0), {"when": fsh.every(2) | fsh.every(3)})
    )
    assert [problem.split(": ")[0] for problem in problems_of(hooks)] == [
        "hooks.a.surgery", "hooks.a.params", "hooks.b.when"
    ]  # fmt: skip


def test_an_order_that_names_do_not_tell_is_refused():
    hooks = hooks_of((Scale(1.0), {"name": "z"}), (Scale(2.0), {"name": "y"}))
    assert problems_of(hooks) == ["hooks: fire as z, y, and from a config as y, z; give them priorities"]


def test_objects_that_would_fill_another_field_too_are_refused():
    hooks = hooks_of((Cut(0.5, score=abs), {}), (Cut(0.5), {}))
    [problem] = problems_of(hooks, {"score": abs})
    assert problem.startswith("hooks.b.score: would come back as <built-in function abs>")


def test_objects_that_nothing_takes_are_refused():
    assert problems_of(hooks_of((Scale(1.0), {})), {"fn": abs}) == [
        "objects.fn: no surgery has an unset field of this name"
    ]
