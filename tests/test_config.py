"""Configs written and read, and every mistake told at once with its path."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from config_cases import Cut, Fill, cut, parse_one, problem_of, problems_of
from config_cases import own_registry as own_registry  # the fixture `registry`
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_dict

from flax_surgery_hooks.config import HookSpec, build, hook
from flax_surgery_hooks.config_hook import HookFields
from flax_surgery_hooks.errors import ConfigError
from flax_surgery_hooks.schedules import at, every

pytestmark = pytest.mark.usefixtures("registry")


# --- `hook`.


def test_hook_holds_every_settable_field_typed_and_no_other():
    config = cut()
    hook_fields = {field.name for field in dataclasses.fields(HookFields)}
    assert set(config.keys()) == hook_fields | {field.name for field in dataclasses.fields(Cut)} - {"score"}
    types = {"expect": int, "every": int, "stop": int, "at": tuple, "seed": int, "tag": str, "decay": float}
    types |= {"axis": object, "params": object, "opt_state": object, "mode": str, "axes": tuple, "enabled": bool}
    assert {key: config.get_type(key) for key in types} == types
    assert "fn" not in hook("fill")


def test_hook_keeps_an_explicit_none_of_an_optional_field():
    assert cut().decay == 0.5
    assert cut(decay=None).decay is None
    assert cut(dry=None).dry is False  # None is no bool: not set
    assert parse_one(cut(decay=None)).surgery.decay is None
    assert parse_one(cut(decay=None), "decay=0.25").surgery.decay == 0.25


def test_hook_turns_numpy_numbers_into_python_ones():
    config = cut(every=np.int64(10), sparsity=np.float32(0.25), dry=np.bool_(True))
    assert [type(config[key]) for key in ("every", "sparsity", "dry")] == [int, float, bool]


def test_hook_tells_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        hook("cut", sparsty=0.5, every="often", axes=3, params=7, fresh="meen", seed=True, score=abs)
    problems = {problem.split(":")[0]: problem for problem in caught.value.problems}
    assert set(problems) == {
        f"hook('cut').{key}" for key in ["sparsty", "every", "axes", "params", "fresh", "seed", "score"]
    }
    assert "did you mean 'sparsity'?" in problems["hook('cut').sparsty"]
    assert "wants int, found 'often' (str)" in problems["hook('cut').every"]
    assert "wants tuple[int, ...], found 3 (int); write (3,)" in problems["hook('cut').axes"]
    assert "wants str or tuple[str, ...], found 7" in problems["hook('cut').params"]
    assert "'meen'" in problems["hook('cut').fresh"]
    assert "wants int, found True (bool)" in problems["hook('cut').seed"]
    assert "pass objects={'score': ...}" in problems["hook('cut').score"]
    assert str(caught.value).startswith("7 problems in the arguments of hook('cut'):\n- ")


def test_hook_refuses_an_unknown_surgery():
    with pytest.raises(ConfigError, match=r"unknown surgery 'cuts' \(did you mean 'cut'\?\); known are .*clip_norm"):
        hook("cuts")


def test_hook_refuses_surgery_as_a_field():
    with pytest.raises(ConfigError, match="already names the surgery"):
        hook("cut", surgery="fill")


# --- References and containers.


def test_references_are_resolved_late_and_stay_linked():
    config = ConfigDict({"period": 100, "rate": 1})
    config.surgery = {"prune": cut(every=config.get_ref("period") // 2, sparsity=config.get_ref("rate"))}
    config.surgery.prune.at = (7,)
    config.period, config.rate = 300, 0
    [spec] = build(config.surgery)
    assert (spec.when, spec.surgery.sparsity) == (at(7) | every(150), 0.0)
    assert type(spec.surgery.sparsity) is float


def test_an_int_reference_in_a_float_field_takes_a_float_from_the_shell():
    assert parse_one(cut(sparsity=FieldReference(1)), "sparsity=0.25").surgery.sparsity == 0.25


def test_references_inside_tuples_and_plain_dicts_are_resolved():
    step, rule = FieldReference(10), FieldReference("reset")
    hooks = {
        "a": cut(at=(step, 3), opt_state={"grad": rule}),
        "b": {
            "surgery": "cut",
            "params": "k",
            "every": step,
            "sparsity": FieldReference(1),
            "opt_state": {"grad": rule},
        },
    }
    step.set(20)
    rule.set("keep")
    a, b = build(hooks)
    assert (a.when, a.opt_state) == (at(3, 20) | every(500), {"grad": "keep"})
    assert (b.when, b.surgery, b.opt_state) == (every(20), Cut(1.0), {"grad": "keep"})


def test_a_required_placeholder_must_be_filled():
    config = cut(sparsity=config_dict.required_placeholder(float))
    [problem] = problems_of({"prune": config})
    assert problem.startswith("surgery.prune.sparsity: has no value: RequiredValueError")
    config.sparsity = 0.25
    assert build({"prune": config})[0].surgery.sparsity == 0.25


def test_an_empty_reference_of_another_type_is_refused():
    with pytest.raises(ConfigError) as caught:
        cut(sparsity=config_dict.placeholder(str), every=config_dict.placeholder(int))
    assert caught.value.problems == ["hook('cut').sparsity: wants float, found an empty reference of type str"]


@pytest.mark.parametrize(
    "changed",
    [
        lambda config: config.lock(),
        FrozenConfigDict,
        ConfigDict.to_dict,
        copy.deepcopy,
        lambda config: config.copy_and_resolve_references(),
        lambda config: json.loads(config.to_json()),
    ],
    ids=["locked", "frozen", "plain", "copied", "resolved", "json"],
)
def test_every_container_builds_the_same_hooks(changed: Callable[[ConfigDict], Any]):
    fields = {"axis": (0, 1), "at": (3,), "params": ("a", "b"), "opt_state": {"grad": "reset"}, "max_fires": 4}
    hooks = ConfigDict({"b": cut(**fields), "a": cut(decay=None)})
    assert build(changed(hooks)) == build(hooks) == [*build({"a": cut(decay=None)}), *build({"b": cut(**fields)})]


def test_a_deep_copy_is_not_linked():
    config = ConfigDict({"a": cut()})
    config.b = copy.deepcopy(config.a)
    config.b.expect = 2
    assert [spec.expect for spec in build(config)] == [None, 2]


# --- `build`.


def test_build_fills_defaults_and_passes_everything_on():
    [spec] = build({"prune": {"surgery": "cut", "params": "k", "every": 500, "sparsity": 1}})
    expected = HookSpec("prune", Cut(1.0), "k", None, None, every(500), None, "mean", "finite", 0)
    assert spec == expected
    assert type(spec.surgery.sparsity) is float


def test_build_of_nothing_is_nothing():
    assert build(ConfigDict()) == []


def test_max_fires_counts_the_union():
    [spec] = build({"prune": cut(at=(250, 600), max_fires=3)})
    assert list(spec.when.due_steps(0, 10_000)) == [250, 500, 600]


def test_all_problems_of_all_hooks_come_at_once():
    config = {
        "a": {"surgery": "cut", "params": "k", "every": 0, "max_fires": 0, "sparsity": "much", "axis": 1.5},
        "b": {"surgery": "cot", "every": "x"},
        "c": {"surgery": "cut", "params": "k", "sparsity": 2.0, "enabled": False},
        "d": 3,
        "e": {"params": "a//[", "exclude": ()},
    }
    paths = [problem.split(":")[0] for problem in problems_of(config)]
    assert sorted(paths) == sorted(
        [
            *("surgery.a.every", "surgery.a.max_fires", "surgery.a.sparsity", "surgery.a.axis"),
            *("surgery.b.surgery", "surgery.b.params", "surgery.b.every"),
            *("surgery.c", "surgery.c"),  # disabled, and checked all the same: neither `at` nor `every`, and the value
            "surgery.d",
            *("surgery.e.surgery", "surgery.e.params", "surgery.e.exclude", "surgery.e"),
        ]
    )


def test_prefix_begins_every_path():
    problems = problems_of({"a": {"surgery": "cut"}}, prefix="config.hooks")
    assert [problem.split(":")[0] for problem in problems] == [
        "config.hooks.a.params",
        "config.hooks.a",
        "config.hooks.a.sparsity",
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sparsty": 1}, "surgery.prune.sparsty: unknown key (did you mean 'sparsity'?); allowed are at, at_count, "),
        ({"surgery": "cot"}, "surgery.prune.surgery: unknown surgery 'cot' (did you mean 'cut'?); known are "),
        ({"surgery": None}, "surgery.prune.surgery: no surgery is named; known are "),
        ({"sparsity": None}, "surgery.prune.sparsity: no value; set it to float, or pass objects={'sparsity': ...}"),
        ({"sparsity": "0.5"}, "surgery.prune.sparsity: wants float, found '0.5' (str)"),
        ({"sparsity": jnp.ones(3)}, "surgery.prune.sparsity: wants float, found ArrayImpl float32[3]"),
        ({"sparsity": True}, "surgery.prune.sparsity: wants float, found True (bool)"),
        ({"sparsity": 1.5}, "surgery.prune: Cut: ValueError: sparsity must be in [0, 1], is 1.5"),
        ({"mode": "mid"}, "surgery.prune.mode: wants one of 'low', 'high', found 'mid' (str)"),
        ({"betas": (0.1,)}, "surgery.prune.betas: wants tuple[float, float], found (0.1,) (tuple)"),
        ({"axes": (0, "1")}, "surgery.prune.axes: wants tuple[int, ...], found (0, '1') (tuple)"),
        ({"axis": "0"}, "surgery.prune.axis: wants int or tuple[int, ...], found '0' (str)"),
        ({"score": abs}, "surgery.prune.score: it cannot stand in a config: pass objects={'score': ...}"),
        ({"every": 0}, "surgery.prune.every: `n` of `every` must be at least 1. Found: 0."),
        ({"every": 10.0}, "surgery.prune.every: wants int, found 10.0 (float)"),
        ({"every": None}, "surgery.prune: neither `at` nor `every` says when it is due"),
        ({"at": (-1,)}, "surgery.prune.at: A step of `at` is negative."),
        ({"at": 100}, "surgery.prune.at: wants tuple[int, ...], found 100 (int); write (100,)"),
        ({"max_fires": 0}, "surgery.prune.max_fires: `max_fires` below 1"),
        ({"stop": 100}, "surgery.prune.every: `every` is never due"),
        ({"every": None, "at": (5,), "stop": 9}, "surgery.prune.stop: bounds `every`, which is not set; found 9"),
        ({"every": None, "at": (5,), "phase": 0}, "surgery.prune.phase: bounds `every`, which is not set; found 0"),
        ({"phase": 500}, "surgery.prune.every: `phase` of `every` is a remainder of division by `n`."),
        ({"cooldown": 0}, "surgery.prune.cooldown: `steps` must be at least 1. Found: 0."),
        ({"every_epochs": 2}, "surgery.prune.every_epochs: needs `steps_per_epoch` beside it, which is not set"),
        ({"at_epochs": (2,)}, "surgery.prune.at_epochs: needs `steps_per_epoch` beside it, which is not set"),
        ({"at_fraction": (0.5,)}, "surgery.prune.at_fraction: needs `num_steps` beside it, which is not set"),
        ({"every_fraction": 2, "num_steps": 9}, "surgery.prune.every_fraction: A fraction of `every_fraction` is more"),
        ({"every_epochs": "x", "steps_per_epoch": 9}, "surgery.prune.every_epochs: wants float, found 'x' (str)"),
        ({"every": None, "at": (5,), "start": 9}, "surgery.prune.start: bounds `every`, which is not set; found 9"),
        (
            {"opt_state": "rest"},
            "surgery.prune.opt_state: Unknown opt_state rule. Found: 'rest'. Write instead: one of reset",
        ),
        ({"opt_state": {"grad": "rest"}}, "surgery.prune.opt_state.grad: Unknown opt_state rule."),
        ({"opt_state": {"grads": "keep"}}, "surgery.prune.opt_state.grads: Unknown kind of slot. Found: 'grads'."),
        ({"opt_state": {"grad": 3}}, "surgery.prune.opt_state: wants str or dict[str, str], found {'grad': 3} (dict)"),
        ({"fresh": "meen"}, "surgery.prune.fresh: Unknown value of `fresh`. Found: 'meen'. Write instead: one of mean"),
        ({"guard": "of"}, "surgery.prune.guard: Unknown value of `guard`. Found: 'of'."),
        ({"params": None}, "surgery.prune.params: no parameters are named; write for example '**/kernel'"),
        ({"params": "a["}, "surgery.prune.params: Brackets are not part of a glob"),
        ({"exclude": ""}, "surgery.prune.exclude: exclude= holds an empty pattern."),
        ({"expect": 0}, "surgery.prune.expect: expect= is how many leaves must be selected"),
        ({"enabled": "no"}, "surgery.prune.enabled: wants bool, found 'no' (str)"),
    ],
)
def test_one_mistake_is_one_problem(fields: dict[str, Any], expected: str):
    assert problem_of(**fields).startswith(expected)


def test_advice_is_given_only_where_it_helps():
    assert problem_of(at="x") == "surgery.prune.at: wants tuple[int, ...], found 'x' (str)"


def test_a_bool_is_no_literal_int(registry: dict[str, type]):
    registry["level"] = dataclasses.make_dataclass(
        "Level", [("level", Literal[1, 2], 2)], frozen=True, namespace={"__call__": lambda self, kernel: kernel}
    )
    [problem] = problems_of({"x": {"surgery": "level", "params": "k", "every": 5, "level": True}})
    assert problem == "surgery.x.level: wants one of 1, 2, found True (bool)"


def test_the_same_mistake_in_a_disabled_hook_is_told():
    assert problem_of(every=0, enabled=False).startswith("surgery.prune.every: ")


def test_errors_of_the_surgery_are_the_cause():
    with pytest.raises(ConfigError) as caught:
        build({"prune": cut(sparsity=1.5)})
    assert isinstance(caught.value.__cause__, ValueError)


def test_arithmetic_that_fails_is_a_problem_of_its_key():
    config = ConfigDict({"period": 100})
    config.surgery = {"prune": cut(every=500 // config.get_ref("period"))}
    config.period = 0
    [problem] = problems_of(config.surgery)
    assert problem.startswith("surgery.prune.every: has no value: ZeroDivisionError")


@pytest.mark.parametrize("config", [None, 3, [cut]])
def test_a_config_that_is_no_mapping_is_refused(config: Any):
    [problem] = problems_of(config)
    assert problem.startswith("surgery: must map names of hooks to their configs, found ")


def test_a_hook_that_is_no_config_is_refused():
    assert problems_of({"prune": 3, 4: cut()}) == [
        "surgery.4: the name of a hook must be a string, found 4 (int)",
        "surgery.prune: must be the config of a hook, such as hook('scale', ...), found 3 (int)",
    ]


def test_an_uncallable_surgery_is_refused(registry: dict[str, type]):
    registry["inert"] = dataclasses.make_dataclass("Inert", [], frozen=True)
    [problem] = problems_of({"x": {"surgery": "inert", "params": "k", "every": 5}})
    assert problem.startswith("surgery.x: Inert: A surgery is a function of leaves or an object")


# --- `objects`.


def test_objects_fill_what_no_config_can_hold_and_what_was_left_unset():
    hooks = {"a": cut(), "b": hook("fill", params="k", every=5), "c": hook("cut", params="k", every=5)}
    a, b, c = build(hooks, {"fn": jnp.sin, "score": jnp.abs, "sparsity": 1})
    assert (a.surgery, b.surgery, c.surgery) == (Cut(0.5, score=jnp.abs), Fill(jnp.sin), Cut(1.0, score=jnp.abs))
    assert type(c.surgery.sparsity) is float


def test_objects_fill_an_unset_field_that_also_takes_functions():
    base = cut().to_dict() | {"weight": None}
    [spec] = build({"prune": base}, {"weight": jnp.sin})
    assert spec.surgery.weight is jnp.sin
    assert build({"prune": base})[0].surgery.weight == 1.0


def test_a_missing_object_is_told():
    [problem] = problems_of({"fill": hook("fill", params="k", every=5)})
    assert problem == "surgery.fill.fn: no value; it cannot stand in a config: pass objects={'fn': ...}"


def test_objects_that_no_surgery_uses_are_told():
    assert (
        problem_of({"skore": abs})
        == "objects.skore: no surgery has an unset field of this name (did you mean 'score'?)"
    )
    assert problem_of({"sparsity": 0.1}) == "objects.sparsity: no surgery has an unset field of this name"


def test_objects_of_the_wrong_type_are_told():
    problem = problem_of({"seed": "x"})
    assert problem == "objects.seed: wants int, for surgery.prune; found 'x' (str)"


def test_objects_may_be_for_a_surgery_that_is_misspelt():
    assert len(problems_of({"f": {"surgery": "fil", "params": "k", "every": 5}}, {"fn": jnp.sin})) == 1


def test_objects_used_by_disabled_hooks_alone_are_used():
    assert build({"prune": cut(enabled=False)}, {"score": abs}) == []
