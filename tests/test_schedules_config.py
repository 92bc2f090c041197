"""Schedules of metrics and counters in configs: read, overridden from the shell, written back, refused."""

from typing import Any

import pytest
import tiny
from config_cases import cut, parse_one, problem_of
from config_cases import own_registry as own_registry  # the fixture `registry`
from ml_collections import ConfigDict

import flax_surgery_hooks as fsh
from flax_surgery_hooks.config import build, hook
from flax_surgery_hooks.errors import ConfigError

pytestmark = pytest.mark.usefixtures("registry")

SCHEDULES = {
    "spike": (fsh.on_metric("loss", spike=3), {"on_metric": "loss", "metric_spike": 3}),
    "all of a spike": (
        fsh.on_metric("a/b", spike=1.5, patience=2, cooldown=9, max_fires=4, start=7, horizon=30, lag=1),
        {
            "on_metric": "a/b", "metric_spike": 1.5, "metric_patience": 2, "metric_cooldown": 9, "metric_max_fires": 4,
            "metric_start": 7, "metric_horizon": 30, "metric_lag": 1,
        },
    ),
    "plateau": (
        fsh.on_metric("acc", plateau=0.01, patience=50, mode="max"),
        {"on_metric": "acc", "metric_plateau": 0.01, "metric_patience": 50, "metric_mode": "max"},
    ),
    "below": (fsh.on_metric("acc", below=0.1), {"on_metric": "acc", "metric_below": 0.1}),
    "tokens": (fsh.every_count(10**9, of="tokens"), {"every_count": 10**9, "count_of": "tokens"}),
    "tokens within": (
        fsh.every_count(10, of="tokens", start=5, stop=95, lag=0),
        {"every_count": 10, "count_of": "tokens", "count_start": 5, "count_stop": 95, "count_lag": 0},
    ),
    "listed": (fsh.at_count(5, 7, of="metrics/n"), {"at_count": (5, 7), "count_of": "metrics/n"}),
    "all of it": (
        fsh.at(4)
        | fsh.every(20, max_fires=2)
        | fsh.on_metric("loss", above=5, max_fires=1)
        | fsh.at_count(5, of="n")
        | fsh.every_count(9, of="n"),
        {
            "at": (4,), "every": 20, "stop": 40, "on_metric": "loss", "metric_above": 5, "metric_max_fires": 1,
            "at_count": (5,), "every_count": 9, "count_of": "n",
        },
    ),
    "thinned steps": (
        fsh.every(10, stop=20) | fsh.on_metric("loss", above=5),
        {"every": 5, "cooldown": 10, "start": 10, "max_fires": 2, "on_metric": "loss", "metric_above": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_config_says_it(name):
    when, fields = SCHEDULES[name]
    config = ConfigDict({"a": hook("scale", params="w", factor=0.5, **fields)})
    for given in (config, {"a": {"surgery": "scale", "params": "w", "factor": 0.5, **fields}}):
        [spec] = build(given)
        assert spec.when == when


@pytest.mark.parametrize("name", SCHEDULES)
def test_there_and_back(name):
    when, _ = SCHEDULES[name]
    hooks = fsh.SurgeryHooks()
    hooks.add("a", fsh.surgeries.Scale(0.5), params="w", when=when)
    config = hooks.to_config()
    [spec] = build(config)
    assert spec.when == when
    assert fsh.SurgeryHooks.from_config(config).to_config() == config


SHELL = {
    ("on_metric=loss", "metric_spike=3"): fsh.on_metric("loss", spike=3),
    ("on_metric=train/loss", "metric_above=2.5", "metric_cooldown=9"): fsh.on_metric(
        "train/loss", above=2.5, cooldown=9
    ),
    ("on_metric=a", "metric_plateau=0.1", "metric_patience=5", "metric_mode=max"): fsh.on_metric(
        "a", plateau=0.1, patience=5, mode="max"
    ),
    ("every_count=1000", "count_of=tokens"): fsh.every_count(1000, of="tokens"),
    ("at_count=(1000,)", "count_of=tokens", "count_lag=2"): fsh.at_count(1000, of="tokens", lag=2),
}


@pytest.mark.parametrize("arguments", SHELL)
def test_the_shell_says_it(arguments: tuple[str, ...]):
    assert parse_one(cut(), *arguments).when == fsh.every(500) | SHELL[arguments]


def test_a_config_fires_as_it_says():
    config = ConfigDict({"a": hook("scale", params="w", factor=0.5, on_metric="loss", metric_above=5, metric_lag=1)})
    hooks, state = fsh.SurgeryHooks.from_config(config), tiny.make_state(1)
    for step, loss in enumerate([1.0, 9.0, 1.0], start=1):
        state = hooks(step, state.replace(step=step), metrics={"loss": loss})
    assert tiny.events(hooks, "fired") == [("fired", "a", 3)]
    assert tiny.w_of(state) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"on_metric": "loss"}, "surgery.prune.on_metric: `on_metric` takes exactly one condition. Found: none."),
        ({"on_metric": "loss", "metric_spike": 1}, "surgery.prune.on_metric: `spike` of `on_metric` is a factor"),
        ({"on_metric": 3}, "surgery.prune.on_metric: wants str, found 3 (int)"),
        ({"metric_spike": 3.0}, "surgery.prune.metric_spike: belongs to `on_metric`, which is not set; found 3.0"),
        ({"every": None, "metric_lag": 1}, "surgery.prune.metric_lag: belongs to `on_metric`, which is not set"),
        ({"every_count": 5}, "surgery.prune.every_count: needs `count_of` beside it, the name of the counter"),
        ({"count_of": "n"}, "surgery.prune.count_of: belongs to `at_count` and `every_count`, which are not set"),
        ({"every_count": 0, "count_of": "n"}, "surgery.prune.every_count: `n` of `every_count` must be at least 1"),
        ({"at_count": (0,), "count_of": "n"}, "surgery.prune.at_count: A count of `at_count` must be at least 1"),
        (
            {"at_count": (5,), "count_of": "n", "count_stop": 9},
            "surgery.prune.count_stop: bounds `every_count`, which is not set; found 9",
        ),
        (
            {"every": None, "every_count": 5, "count_of": "n", "max_fires": 3},
            "surgery.prune.max_fires: is about steps, and none are named; found 3",
        ),
        (
            {"every": None, "on_metric": "loss", "metric_above": 1.0, "start": 3},
            "surgery.prune.start: is about steps, and none are named; found 3",
        ),
        ({"every": None}, "surgery.prune: neither `at` nor `every` says when it is due"),
    ],
)
def test_one_mistake_is_one_problem(fields: dict[str, Any], expected: str):
    assert problem_of(**fields).startswith(expected)


@pytest.mark.parametrize(
    "when",
    [
        fsh.on_metric("loss", above=1) | fsh.on_metric("loss", spike=2),
        fsh.every_count(5, of="n") | fsh.every_count(7, of="n"),
        fsh.every_count(5, of="n") | fsh.at_count(7, of="m"),
        fsh.every_count(5, of="n") | fsh.at_count(7, of="n", lag=1),
    ],
    ids=repr,
)
def test_what_no_config_can_hold_is_named(when):
    hooks = fsh.SurgeryHooks()
    hooks.add("a", fsh.surgeries.Scale(0.5), params="w", when=when)
    with pytest.raises(ConfigError) as caught:
        hooks.to_config()
    [problem] = caught.value.problems
    assert problem.startswith("hooks.a.when: a config holds one each of `at`, `every`, `on_metric`, `at_count` and")
    assert repr(when) in problem
