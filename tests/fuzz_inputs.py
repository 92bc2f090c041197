"""What the fuzz tests feed to the library: values as users mistype them, and whole configs of hooks, good and bad.

A config is plausible first, from values that fit their fields; then some of its fields are overwritten. So a good part
of them is accepted and fires, and what is refused is not refused for the same reason each time.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
from decimal import Decimal
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from ml_collections import ConfigDict, FieldReference, config_dict

import flax_surgery_hooks as fsh
from flax_surgery_hooks.config_fields import fields_of
from flax_surgery_hooks.config_hook import HookFields
from flax_surgery_hooks.surgery import Surgery

STEPS = 6
NAN, INF = float("nan"), float("inf")


# --- Values.


def among(values: list[Any]) -> st.SearchStrategy:
    """`st.sampled_from`, which prints what it samples, for values that cannot be printed."""
    return st.sampled_from(range(len(values))).map(lambda place: values[place])


LONG = 10**5000  # Python refuses to print it
_HUGE = [2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, LONG, -(2**31), -(10**400), -LONG]
huge_ints = among(_HUGE)
ints = st.integers(-5, 12) | st.integers() | huge_ints
floats = st.floats() | st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1e308, 1e-45, 5e-324, 0.1, 1.5])
texts = st.text(max_size=8) | st.sampled_from(
    ["", " ", "none", "None", "\x00", "\n", "é", "模型", "a/b", "__class__", "%s{}", "0", "1e999", "\ud800", "x" * 5000]
)


def _odd_objects() -> list[Any]:
    return [
        object(), object, int, len, lambda: 1, fsh.at(1), fsh.every(2), fsh.select("**"), fsh.surgeries.Scale(2.0),
        fsh.surgeries.Scale, optax.sgd(0.1), b"", b"\xff", bytearray(2), complex(1, NAN), fractions.Fraction(1, 3),
        fractions.Fraction(LONG, 3), Decimal("NaN"), Decimal("1e999999"), range(3), ..., NotImplemented, {1},
        frozenset(),
        np.float32(0.5), np.int64(3), np.bool_(True), np.str_("scale"), np.float64(NAN), np.zeros(0), np.ones((2, 3)),
        np.array(3), np.array("a"), np.array(None), jnp.ones(2), jnp.int32(3), iter(()), np.datetime64("NaT", "s"),
        Exception("no"), type("Odd", (), {})(),
    ]  # fmt: skip


ODD_OBJECTS = _odd_objects()
objects = among(ODD_OBJECTS)
plain = st.none() | st.booleans() | ints | floats | texts
keys = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | texts
odd = st.recursive(
    plain | objects,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.sampled_from(["surgery", "factor", "params", "grad"]), inner, max_size=3)
    ),
    max_leaves=4,
)
"""Any value that somebody might pass."""

references = among(
    [
        FieldReference(2),
        FieldReference(0.5),
        FieldReference(None, field_type=int),
        FieldReference("w"),
        FieldReference(None, field_type=int) + 1,
        FieldReference((1, 2)),
        FieldReference(1) // FieldReference(0),
        config_dict.required_placeholder(float),
        config_dict.placeholder(str),
    ]
)


# --- Selections.

good_patterns = st.sampled_from(
    ["**", "**", "dense/kernel", "dense/bias", "**/kernel", "dense/*", "**/{kernel,bias}", "re:.*bias", "*/k?rnel",
     ("dense/kernel", "dense/bias"), ["**/kernel"], "re:dense/(kernel|bias)", "dense/kernel[0]", "**/kernel[-1]"]
)  # fmt: skip
_pieces = st.lists(
    st.sampled_from(["dense", "kernel", "bias", "/", "**", "*", "?", "{", "}", ",", "[", "]", "0", ":", "-1", "re:",
                     "(",
                     ")", "+", "\\", "|", "^", "$", " ", "é", "\x00", "(?P<a>", "{99999999999}", "(?i)", "[[", "\\p",
                     "(?"]),
    max_size=7,
).map("".join)  # fmt: skip
patterns = st.recursive(
    good_patterns | _pieces | texts | _pieces.map("re:".__add__),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=3,
)
"""Patterns good and bad."""


# --- Surgeries.


@dataclasses.dataclass(frozen=True)
class Twice:
    """A surgery with surgeries in its fields."""

    first: Surgery
    then: fsh.surgeries.Scale | None = None
    more: tuple[Surgery, ...] = ()
    named: dict[str, Surgery] = dataclasses.field(default_factory=dict)

    def __call__(self, leaf):
        for one in (self.first, self.then, *self.more, *self.named.values()):
            leaf = leaf if one is None else one(leaf)
        return leaf


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A surgery of a user that checks nothing, with fields of several types."""

    by: float = 1.0
    shape: tuple[int, int] | None = None
    table: dict[str, float] | None = None
    seed: int | str = 0

    def __call__(self, leaf, step, key=None):
        if self.shape is not None:
            return leaf.reshape(self.shape)  # whatever JAX thinks of it
        return leaf * self.by + self.table["by"] if self.table else leaf * self.by


REGISTERED = {"twice": Twice, "mixed": Mixed}
"""For `config_registry._registered` while the fuzz tests run."""

_factors = st.sampled_from([0.5, 2.0, 1.0, 0, -1, 1e-3, 1e38, 1e300])
_scale = st.fixed_dictionaries({"surgery": st.just("scale"), "factor": _factors})
_axes = st.sampled_from([None, None, 0, 1, -1, (0,), (0, 1), (), 5])
_nested = st.one_of(
    _scale,
    _scale,
    st.builds(lambda: fsh.surgeries.Scale(0.5)),
    st.just({"surgery": "normalize"}),
    st.builds(lambda: fsh.config.surgery("scale", factor=0.25)),
)
SURGERY_FIELDS: dict[str, dict[str, st.SearchStrategy]] = {
    "scale": {"factor": _factors},
    "normalize": {"axis": _axes, "to": st.sampled_from([1.0, 2, 0.5])},
    "clip_norm": {"max_norm": st.sampled_from([1.0, 0.5, 100]), "axis": _axes},
    "noise": {"std": st.sampled_from([0.0, 0.1, 1]), "relative": st.booleans()},
    "assign": {},
    "reinit": {},
    "reset_moments": {
        "kinds": st.sampled_from([None, ("grad",), ("grad", "grad_sq"), ("param",), ("mu",)]),
        "fraction": st.sampled_from([1.0, 0.5, 0]),
        "by": st.sampled_from(["all", "magnitude", "random"]),
    },
    "rewarm": {},
    "freeze": {},
    "thaw": {"first_moments": st.sampled_from(["keep", "reset"])},
    "set_hyperparams": {"hyperparams": st.sampled_from([{"learning_rate": 0.5}, {"learning_rate": NAN}, {"lr": 1},
    {}])},
    "switch_optimizer": {"carry": st.booleans(), "count": st.sampled_from(["carry", "restart"])},
    "twice": {"first": _nested, "then": st.none() | _scale, "more": st.lists(_nested, max_size=2).map(tuple),
              "named": st.dictionaries(st.sampled_from(["a", "b"]), _nested, max_size=1)},
    "mixed": {"by": _factors, "shape": st.none() | st.sampled_from([(3, 2), (6, 1), (-1, 1)]),
              "table": st.none() | st.just({"by": 1.0}), "seed": st.integers() | texts},
}  # fmt: skip
_REQUIRED = {"factor", "max_norm", "std", "hyperparams", "first"}
# What is quick to compile comes often.
_names = st.sampled_from(
    ["scale"] * 8 + ["normalize"] * 3 + ["mixed"] * 4 + ["noise", "clip_norm", "twice", "twice"] + list(SURGERY_FIELDS)
)


# --- Schedules.

_due = st.integers(0, STEPS + 1)
_schedules = st.one_of(
    st.fixed_dictionaries({"every": st.integers(1, 4)}),
    st.fixed_dictionaries({"at": st.lists(st.integers(1, STEPS), min_size=1, max_size=3).map(tuple)}),
    st.fixed_dictionaries(
        {"every": st.integers(1, 3)},
        optional={"start": _due, "stop": _due, "phase": st.integers(0, 1), "cooldown": st.integers(0, 3),
                  "max_fires": st.integers(1, 3), "at": st.just((2, 3))},
    ),
    st.fixed_dictionaries(
        {"steps_per_epoch": st.integers(1, 3), "at_epochs": st.sampled_from([(1,), (0.5, 2), (1.5,)])},
        optional={"every_epochs": st.sampled_from([1, 2.0, 0.5]), "cooldown": st.integers(0, 2)},
    ),
    st.fixed_dictionaries(
        {"num_steps": st.just(STEPS), "at_fraction": st.sampled_from([(0.5,), (1, 0.3)])},
        optional={"every_fraction": st.sampled_from([0.5, 0.2, 1])},
    ),
    st.fixed_dictionaries(
        {"on_metric": st.sampled_from(["loss", "loss", "nan", "deep/loss", "absent"]), "metric_lag": st.integers(0, 2)},
        optional={"metric_patience": st.integers(1, 2), "metric_cooldown": st.integers(0, 2),
                  "metric_start": st.integers(0, 3), "metric_horizon": st.integers(1, 9),
                  "metric_max_fires": st.integers(1, 2), "metric_mode": st.just("min")},
    ).flatmap(lambda fields: _conditions.map(lambda condition: {**fields, **condition})),
    st.fixed_dictionaries(
        {"count_of": st.sampled_from(["tokens", "tokens", "metrics/count", "absent"]), "every_count": st.integers(1,
        99)},
        optional={"count_lag": st.integers(0, 2), "count_start": st.integers(0, 50), "at_count": st.just((7, 90))},
    ),
)  # fmt: skip
_conditions = st.sampled_from(
    [{"metric_above": 0.5}, {"metric_above": 1}, {"metric_below": 9.5}, {"metric_spike": 1.1},
     {"metric_plateau": 0.1, "metric_patience": 1}, {"metric_plateau": 0, "metric_patience": 2, "metric_mode": "max"}]
)  # fmt: skip

_OPTIONS: dict[str, st.SearchStrategy] = {
    "opt_state": st.sampled_from(
        [None, "carry", "keep", "reset", "transport", {"grad": "reset"}, {"grad_sq": "keep", "grad": "carry"}]
    ),
    "fresh": st.sampled_from(["mean", "init"]),
    "guard": st.sampled_from(["finite", "off"]),
    "priority": st.integers(-2, 2) | huge_ints,
    "figures": st.booleans(),
    "histograms": st.booleans(),
    "exclude": st.sampled_from([None, None, "**/bias", "**/kernel"]),
    "expect": st.sampled_from([None, None, None, 1, 2]),
    "enabled": st.sampled_from([True, True, True, False]),
    "fields": st.just(()),
}


# --- Configs.


@st.composite
def plausible_hooks(draw: st.DrawFn) -> dict[str, Any]:
    """One hook from values that fit their fields, though not always each other."""
    name = draw(_names)
    fields = SURGERY_FIELDS[name]
    chosen = {key: draw(value) for key, value in fields.items() if key in _REQUIRED or draw(st.booleans())}
    options = draw(st.lists(st.sampled_from(list(_OPTIONS)), max_size=3, unique=True))
    return {
        "surgery": name, "params": draw(good_patterns), **chosen, **draw(_schedules),
        **{key: draw(_OPTIONS[key]) for key in options},
    }  # fmt: skip


@functools.cache
def _known_keys() -> list[str]:
    return sorted({*fields_of(HookFields), *(key for fields in SURGERY_FIELDS.values() for key in fields)})


field_names = st.deferred(lambda: st.sampled_from(_known_keys()) | texts)
_bad_fields = st.dictionaries(field_names, odd | references | patterns, min_size=1, max_size=2)
broken_hooks = st.builds(lambda base, bad: {**base, **bad}, plausible_hooks(), _bad_fields)
wild_hooks = (
    odd | st.dictionaries(field_names, odd, max_size=5) | st.fixed_dictionaries({"surgery": odd, "params": patterns})
)
hook_names = st.sampled_from(["a", "head", "b_2", "c-3"])
_any_names = hook_names | texts | objects.filter(lambda value: value.__hash__ is not None and _hashes(value))


def _hashes(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


_overridable = st.sampled_from(
    [
        "params",
        "params",
        "every",
        "start",
        "expect",
        "guard",
        "fresh",
        "opt_state",
        "figures",
        "at",
        "max_fires",
        "enabled",
        "priority",
        "exclude",
    ]
)
_overrides = st.lists(
    st.tuples(
        _overridable | _overridable | field_names,
        st.sampled_from(["0", "1", "0.5", "-1", "nan", "inf", "None", "True", "()", "(1,)", "(1", "{}",
                         "{'grad': 'keep'}",
                         "'**'", "**", "", "scale", "1e999", "[1]", "10" * 300, "é", "transport", "__import__('os')"])
        | texts,
    ),
    min_size=1,
    max_size=2,
)  # fmt: skip
_OBJECTS: dict[str, list[Any]] = {
    "value": [0.0, 1, jnp.ones(()), np.zeros(2), {"dense/kernel": 1.0}, None, "x", NAN],
    "initializer": [lambda key, shape, dtype: jnp.zeros(shape, dtype), lambda: 1, 3, None],
    "init": [lambda key: {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, lambda key: 1],
    "tx": [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), None, 3],
}
_sensible_objects = {key: st.sampled_from(values[:1]) for key, values in _OBJECTS.items() if key != "init"}
_settings = st.fixed_dictionaries(
    {},
    optional={"seed": st.sampled_from([0, 1, 2**31, 2**63 - 1, -1]), "on_error": st.sampled_from(["raise", "skip"]),
              "settle_after": st.sampled_from([0, 1, 4, 10**400]), "strict_steps": st.booleans(),
              "donate": st.sampled_from(["auto", "always", "never"])},
)  # fmt: skip
_bad_settings = st.dictionaries(
    st.sampled_from(["seed", "on_error", "settle_after", "strict_steps", "donate", "mirrors", "agree_secs", "writer",
                     "on_record"]),
    plain | objects, min_size=1, max_size=1,
)  # fmt: skip
OPTIMIZERS = ("sgd",) * 10 + ("momentum", "adamw", "injected", "freezable")


@dataclasses.dataclass(frozen=True)
class Input:
    """One whole input.

    Attributes:
      entry: how the config is made: "dict", "hook" (`fsh.config.hook`), "ConfigDict" or "shell".
      hooks: name -> config of a hook, or whatever stands in their place.
      overrides: (key, text) as the shell gives them, for the first hook.
      objects: what stands beside the config.
      settings: arguments of `SurgeryHooks`.
      optimizer: a name of `OPTIMIZERS`.
      form: "host" or "graph".
      steps: the steps at which the hooks are called.
    """

    entry: str
    hooks: Any
    overrides: tuple[tuple[str, str], ...]
    objects: Any
    settings: dict[str, Any]
    optimizer: str
    form: str
    steps: tuple[int, ...]


_USED = {"assign": "value", "reinit": "initializer", "switch_optimizer": "tx"}
_STEPS = st.sampled_from([tuple(range(1, STEPS + 1))] * 6 + [tuple(range(STEPS + 1)), (1, 2, 5, 6), (3, 4, 6), (0, 6)])


@st.composite
def inputs(draw: st.DrawFn) -> Input:
    """A config, plausible in three of four cases, with what is needed to run it."""
    kind = draw(st.sampled_from(["plausible"] * 14 + ["broken"] * 3 + ["wild"]))
    if kind == "wild":
        hooks = draw(st.dictionaries(_any_names, wild_hooks, max_size=2) | odd)
    else:
        one = plausible_hooks() if kind == "plausible" else broken_hooks
        names = st.sampled_from([("a",)] * 5 + [("a", "head")])
        hooks = {name: draw(one) for name in draw(names)}
    entry = draw(st.sampled_from(["dict", "dict", "hook", "ConfigDict", "shell"])) if kind != "wild" else "dict"
    overrides = tuple(draw(_overrides)) if entry == "shell" else ()
    settings = {**draw(_settings), **(draw(_bad_settings) if draw(st.integers(0, 9)) == 9 else {})}
    form = draw(st.sampled_from(["host"] * 9 + ["graph"]))
    return Input(entry, hooks, overrides, draw(_objects_for(hooks, kind)), settings,
                 draw(st.sampled_from(OPTIMIZERS)), form, draw(_STEPS))  # fmt: skip


def _objects_for(hooks: Any, kind: str) -> st.SearchStrategy:
    """The objects that these hooks ask for, or some others."""
    named = hooks.values() if isinstance(hooks, dict) else ()
    surgeries = [hook.get("surgery") for hook in named if isinstance(hook, dict)]
    used = [_USED[name] for name in surgeries if isinstance(name, str) and name in _USED]
    fitting = st.fixed_dictionaries({key: _sensible_objects[key] for key in used})
    any_object = st.dictionaries(st.sampled_from(list(_OBJECTS)), odd, max_size=2)
    listed = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in _OBJECTS.items()})
    return fitting if kind == "plausible" else fitting | any_object | listed | st.none()


def as_config_dict(hooks: Any) -> ConfigDict:
    """Hooks as a `ConfigDict`; raises what `ml_collections` thinks of them."""
    return ConfigDict({"surgery": hooks}).surgery
