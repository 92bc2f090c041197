"""Every field of a hook, overridden through absl's own parser."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from absl import flags
from config_cases import Cut, cut, parse, parse_one, problems_of
from config_cases import own_registry as own_registry  # the fixture `registry`
from ml_collections import ConfigDict, config_flags

from flax_surgery_hooks.config import build, hook
from flax_surgery_hooks.schedules import at, every

pytestmark = pytest.mark.usefixtures("registry")


@pytest.mark.parametrize(
    ("argument", "field", "expected"),
    [
        ("params=Dense_1/kernel", "params", "Dense_1/kernel"),
        ("params=('a/*', 'b/*')", "params", ("a/*", "b/*")),
        ("params=re:Dense_[01]/kernel", "params", "re:Dense_[01]/kernel"),
        ("exclude=**/bias", "exclude", "**/bias"),
        ("expect=3", "expect", 3),
        ("at=(100,)", "when", at(100) | every(500)),
        ("at=100", "when", at(100) | every(500)),
        ("every=50", "when", every(50)),
        ("start=250", "when", every(500, start=250)),
        ("stop=2000", "when", every(500, stop=2000)),
        ("max_fires=2", "when", every(500, stop=1000)),
        ("phase=100", "when", every(500, start=100)),
        ("cooldown=700", "when", every(1000, start=500)),
        ("figures=False", "figures", False),
        ("opt_state=reset", "opt_state", "reset"),
        ("opt_state={'grad': 'reset'}", "opt_state", {"grad": "reset"}),
        ("fresh=init", "fresh", "init"),
        ("guard=off", "guard", "off"),
        ("priority=-1", "priority", -1),
    ],
)
def test_shell_overrides_each_hook_field(argument: str, field: str, expected: Any):
    assert getattr(parse_one(cut()), field) != expected
    assert getattr(parse_one(cut(), argument), field) == expected


@pytest.mark.parametrize(
    ("argument", "field", "expected"),
    [
        ("sparsity=0.9", "sparsity", 0.9),
        ("sparsity=1", "sparsity", 1.0),
        ("seed=3", "seed", 3),
        ("mode=high", "mode", "high"),
        ("tag=late", "tag", "late"),
        ("axes=(0, 1)", "axes", (0, 1)),
        ("betas=(0.5, 1)", "betas", (0.5, 1.0)),
        ("axis=1", "axis", 1),
        ("axis=(0, 1)", "axis", (0, 1)),
        ("decay=0.25", "decay", 0.25),
        ("dry=true", "dry", True),
        ("weight=2.5", "weight", 2.5),
    ],
)
def test_shell_overrides_each_surgery_field(argument: str, field: str, expected: Any):
    assert getattr(parse_one(cut()).surgery, field) != expected
    new = getattr(parse_one(cut(), argument).surgery, field)
    assert new == expected
    assert type(new) is type(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["every_epochs=2", "steps_per_epoch=50"], every(100)),
        (["every_epochs=0.5", "steps_per_epoch=50"], every(25)),
        (["at_epochs=(1, 2.5)", "steps_per_epoch=50"], at(50, 125)),
        (["at_fraction=(0.1, 1)", "num_steps=1000"], at(100, 1000)),
        (["every_fraction=0.25", "num_steps=1000"], every(250, stop=1000)),
        (["every_fraction=0.25", "num_steps=1000", "max_fires=2"], every(250, stop=500)),
        (["every_fraction=0.5", "num_steps=400", "at=(7,)", "cooldown=194"], at(7, 400)),
    ],
)
def test_shell_tells_the_schedule_in_parts_of_a_run(arguments: list[str], expected: Any):
    assert parse_one(cut(every=None), *arguments).when == expected


def test_shell_fills_required_fields_that_the_config_left_open():
    spec = parse_one(hook("cut"), "sparsity=0.9", "params=kernel", "at=(100, 7)")
    assert (spec.surgery, spec.params, spec.when) == (Cut(0.9), "kernel", at(7, 100))


def test_shell_overrides_a_float_that_was_given_as_int():
    base = cut(sparsity=1, decay=2)
    assert parse_one(base).surgery.sparsity == 1.0
    assert parse_one(base, "sparsity=0.25", "decay=0.75").surgery == Cut(0.25, decay=0.75)


def test_shell_switches_a_union_from_one_type_to_the_other():
    assert parse_one(cut(axis=0, params=("a", "b")), "axis=(0, 1)", "params=c").surgery.axis == (0, 1)
    assert parse_one(cut(axis=(0, 1)), "axis=None").surgery.axis is None


def test_shell_overrides_one_kind_of_a_rule_dict_and_replaces_the_whole():
    base = cut(opt_state={"grad": "reset", "grad_sq": "keep"})
    assert parse_one(base, "opt_state.grad=carry").opt_state == {"grad": "carry", "grad_sq": "keep"}
    assert parse_one(base, "opt_state=keep").opt_state == "keep"


def test_shell_sets_dicts_and_numbers_of_either_type(registry: dict[str, type]):
    registry["mix"] = dataclasses.make_dataclass(
        "Mix",
        [("rates", dict[str, float] | None, None), ("size", float | int, 0.5), ("sizes", tuple[float | int, ...], ())],
        frozen=True,
        namespace={"__call__": lambda self, kernel: kernel},
    )
    spec = parse_one(hook("mix", params="k", every=5), "rates={'a': 1}", "size=3", "sizes=(1, 0.5)")
    assert (spec.surgery.rates, spec.surgery.size, spec.surgery.sizes) == ({"a": 1.0}, 3, (1, 0.5))
    assert [type(value) for value in (spec.surgery.rates["a"], *spec.surgery.sizes)] == [float, int, float]
    assert type(parse_one(hook("mix", params="k", every=5, sizes=(2,))).surgery.sizes[0]) is int


@pytest.mark.parametrize("argument", ["--config.surgery.a.enabled=False", "--noconfig.surgery.a.enabled"])
def test_shell_disables_a_hook(argument: str):
    hooks = {"a": cut(), "b": cut()}
    assert [spec.name for spec in build(hooks)] == ["a", "b"]
    config = ConfigDict({"surgery": hooks})
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=["train.py", argument])
    flag_values(["train.py", argument])
    assert [spec.name for spec in build(flag_values.config.surgery)] == ["b"]


def test_shell_refuses_fields_that_do_not_exist():
    with pytest.raises(AttributeError, match="sparsity"):
        parse({"prune": cut()}, "prune.sparsty=0.9")


def test_a_pattern_without_equals_sign_is_told():
    flag_values = flags.FlagValues()
    argv = ["train.py", "--config.prune.params", "**/bias"]
    config_flags.DEFINE_config_dict("config", ConfigDict({"prune": cut()}), flag_values=flag_values, sys_argv=argv)
    flag_values(argv)
    [problem] = problems_of(flag_values.config)
    assert problem.startswith("surgery.prune.params: wants str or tuple[str, ...], found True (bool)")
    assert "write '=' between" in problem


def test_builtin_from_the_shell():
    [spec] = build(parse({"head": hook("normalize", params="Dense_1/kernel", every=200)}, "head.to=2", "head.axis=0"))
    assert (type(spec.surgery).__name__, spec.surgery.to, spec.surgery.axis) == ("Normalize", 2.0, 0)
