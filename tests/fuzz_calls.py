"""Calls of the library's functions for the fuzz tests: schedules, selections, hooks added and called, fair and foul."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import fuzz_runs
import jax
import jax.numpy as jnp
import numpy as np
from fuzz_inputs import STEPS, good_patterns, huge_ints, ints, objects, odd, patterns, plain, texts
from hypothesis import strategies as st

import flax_surgery_hooks as fsh
from flax_surgery_hooks import paths


def _mostly(fair: st.SearchStrategy, foul: st.SearchStrategy, share: int = 12) -> st.SearchStrategy:
    """`fair` but for one of `share` draws."""
    return st.sampled_from(range(share)).flatmap(lambda roll: fair if roll else foul)


# --- Schedules.

_step = _mostly(st.integers(1, 20), plain | objects, 25)
_numbers = _mostly(st.integers(1, 20) | st.sampled_from([0.5, 1.5, 0.25]), plain | objects, 25)
_conditions = st.sampled_from(["above", "below", "spike", "plateau"])


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of the library by name, and what it is called with; arguments may be calls themselves."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


def _calls(name: str, *args: st.SearchStrategy, **kwargs: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(Call, st.just(name), st.tuples(*args), st.fixed_dictionaries({}, optional=kwargs))


def _with_condition(call: Call, name: str, value: Any) -> Call:
    return dataclasses.replace(call, kwargs={**call.kwargs, name: value})


_made = st.one_of(
    # Right ones: of the others some releases of Hypothesis make too few.
    st.integers(1, 4).map(lambda n: Call("every", (n,))),
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(lambda steps: Call("at", tuple(steps))),
    st.lists(_step, max_size=3).map(lambda steps: Call("at", tuple(steps))),
    _calls("every", _step, start=_step, stop=_step, max_fires=_step, phase=_step),
    st.builds(lambda parts, size: Call("at_epochs", tuple(parts), {"steps_per_epoch": size}),
              st.lists(_numbers, max_size=2), _step),
    st.builds(lambda part, size, more: Call("every_epochs", (part,), {"steps_per_epoch": size, **more}), _numbers,
    _step,
              st.fixed_dictionaries({}, optional={"start": _numbers, "stop": _numbers, "max_fires": _step})),
    st.builds(lambda parts, size: Call("at_fraction", tuple(parts), {"num_steps": size}),
              st.lists(_numbers, max_size=2), _step),
    st.builds(lambda part, size: Call("every_fraction", (part,), {"num_steps": size}), _numbers, _step),
    st.builds(lambda n, size: Call("every_updates", (n,), {"micro_steps": size}), _step, _step),
    st.builds(
        _with_condition,
        _calls("on_metric", texts | st.just("loss"), patience=_step, cooldown=_step, max_fires=_step, start=_step,
               horizon=_step, mode=st.sampled_from(["min", "max"]) | plain, lag=_step),
        _conditions,
        _numbers,
    ),
    st.builds(lambda n, of, more: Call("every_count", (n,), {"of": of, **more}), _step, texts | st.just("tokens"),
              st.fixed_dictionaries({}, optional={"start": _step, "stop": _step, "max_fires": _step, "lag": _step})),
    st.builds(lambda counts, of: Call("at_count", tuple(counts), {"of": of}), st.lists(_step, max_size=3),
              texts | st.just("tokens")),
)  # fmt: skip
_expressions = st.recursive(
    _mostly(_made, objects, 15),
    lambda inner: st.one_of(
        _calls("|", inner, inner),
        _calls("cooldown", inner, _step),
        _calls("first", inner, k=_step),
        st.builds(lambda one, size, more: Call("last", (one,), {"num_steps": size, **more}), inner, _step,
                  st.fixed_dictionaries({}, optional={"k": _step})),
        _calls("max_fires", inner, _mostly(_step, huge_ints, 4)),
    ),
    max_leaves=4,
)  # fmt: skip
schedule_calls = st.tuples(_expressions, _step, _step)


def run_schedule(given: tuple[Any, Any, Any]) -> int:
    """Makes a schedule and asks it; how many of the first steps are due."""
    expression, first, second = given
    when = made(expression)
    if not isinstance(when, fsh.Schedule):
        return 0
    hash(when), repr(when)
    assert when == made(expression)
    due = list(when.due_steps(-1, 50)) if not when.watched else []
    when.next_step(first)
    when.is_due(second)
    return len(due)


def made(call: Any) -> Any:
    """What a call returns."""
    if not isinstance(call, Call):
        return call
    args = tuple(map(made, call.args))
    if call.name == "|":
        left, right = args
        # Where neither side is a schedule, `|` is not the library's.
        return left | right if any(isinstance(one, fsh.Schedule) for one in args) else fsh.at(0) | right
    if call.name == "max_fires":
        return args[0].max_fires(args[1]) if isinstance(args[0], fsh.Schedule) else args[0]
    return getattr(fsh, call.name)(*args, **call.kwargs)


# --- Selections.

_TREES = [
    {"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}},
    {"layers": {"kernel": np.ones((4, 2, 2)), "scale": np.ones(())}, "é": np.ones(1), "": {"w": np.ones(1)}},
    np.ones(2),
    {"a": [np.ones(2), {"b": np.ones((0, 2))}]},
]
_predicates = st.sampled_from(
    [lambda path, leaf: leaf.ndim == 2, lambda path, leaf: None, lambda path: True, lambda path, leaf: 1 / 0]
)
_selectors = st.recursive(
    good_patterns | good_patterns | _mostly(patterns | _predicates | st.just(fsh.select("**")), odd, 6),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=3,
)
selections = st.tuples(
    _selectors,
    _mostly(st.none(), _selectors, 4),
    _mostly(st.none(), odd | st.integers(1, 3), 8),
    _mostly(st.just(0), st.integers(0, len(_TREES) - 1), 4),
)


def run_selection(given: tuple[Any, Any, Any, int]) -> int:
    """Selects, and says how many leaves."""
    params, exclude, expect, tree = given
    selection = fsh.select(params, exclude, expect)
    selection.describe(), hash(selection)
    return len(selection.picks(paths.flatten(_TREES[tree])))


# --- Hooks added and called.


def takes_input(leaf, x):
    """A surgery that asks for an input."""
    return leaf * jnp.sum(jnp.asarray(x))


def takes_static(leaf, x=2):
    """A surgery that asks for an input and may go without."""
    return leaf * float(x)


def forgets(leaf):
    """A surgery without return."""


def of_all(leaves, key, step):
    """A surgery that takes all leaves."""
    return {path: leaf + jax.random.normal(key, leaf.shape) * step for path, leaf in leaves.items()}


_functions = st.sampled_from(
    [lambda w: w / 2, lambda w: w / 2, lambda w: w * 0.5, takes_input, takes_static, of_all, fsh.surgeries.Scale(0.5),
     fsh.surgeries.Normalize(), lambda w, path: w, lambda w: jnp.inf * w]
)  # fmt: skip
_foul_functions = odd | st.sampled_from(
    [forgets, lambda w: w[0], lambda w: "x", lambda: 1, lambda w, **kwargs: w, lambda w, memory: w, lambda leaves: {},
     lambda leaves: {3: 1}, lambda w: w.astype(int), lambda w: 1 / 0, lambda w: w if w.sum() > 0 else -w, jnp.sort,
     lambda w: w + jnp.ones((7, 1)), fsh.surgeries.Scale, lambda w: [w], lambda w: w.at[9].set(1), np.asarray, print,
     lambda leaves: {**leaves, "a//b": jnp.ones(1)}, lambda leaves: {"dense": jnp.ones(1)}, lambda w: w + 1j,
     lambda w: jax.random.key(0), lambda w: (_ for _ in ()).throw(KeyError(3))]
)  # fmt: skip
_whens = st.sampled_from([fsh.at(1), fsh.every(2), fsh.at(2) | fsh.every(3), fsh.on_metric("loss", above=0.1, lag=1),
                          fsh.every_count(50, of="tokens")])  # fmt: skip
_fair_options = {
    "opt_state": st.sampled_from([None, "carry", "keep", "reset", {"grad": "reset"}]),
    "guard": st.sampled_from(["finite", "off"]), "figures": st.booleans(), "expect": st.just(2) | st.none(),
    "priority": st.integers(-1, 1), "fresh": st.sampled_from(["mean", "init"]),
}  # fmt: skip
_foul_options = st.dictionaries(
    st.sampled_from(["opt_state", "guard", "figures", "expect", "priority", "fresh", "exclude", "histograms", "fields",
                     "apply_fn", "tx", "on_reshape", "shardings", "when", "params"]),
    odd | patterns | _functions, min_size=1, max_size=2,
)  # fmt: skip
_fair_steps = st.lists(st.integers(0, STEPS), min_size=1, max_size=4, unique=True).map(sorted)
_foul_steps = st.lists(plain | objects | ints, min_size=1, max_size=3)
_fair_inputs = st.fixed_dictionaries(
    {"metrics": st.just({"loss": 1.0}), "tokens": st.just(None) | st.integers(0, 100)},
    optional={"x": st.sampled_from([2, 0.5, jnp.ones(2), "a", None])},
)
_foul_inputs = st.dictionaries(
    st.sampled_from(["metrics", "tokens", "x", "key", "path", "leaf"]),
    odd | st.dictionaries(st.sampled_from(["loss", "loss/a", ""]), odd, max_size=2), max_size=3,
)  # fmt: skip
_foul_states = st.sampled_from(
    ["none", "dict", "abstract", "deleted", "no slots", "other slots", "empty", "bare", "int params", "odd", "odd leaf",
     "replicated"]
)  # fmt: skip
_endings = st.sampled_from(["flush", "flush", "flush", "fire", "preview", "remove", "collect", "init", "plan",
                            "programs",
                            "state_dict", "to_config", "hparams"])  # fmt: skip


def _sequences(mostly: Callable[..., st.SearchStrategy]) -> st.SearchStrategy:
    """Calls of some hooks, given how fair and foul arguments are mixed."""
    adds = st.fixed_dictionaries(
        {
            "surgery": mostly(_functions, _foul_functions, 4),
            "params": mostly(st.just("**"), _selectors, 6),
            "when": mostly(_whens, odd, 10),
        },
        optional=_fair_options,
    )
    names = mostly(st.sampled_from([("a",), ("a", "b")]), st.lists(odd, min_size=1, max_size=2), 10)
    options = mostly(st.just({}), _foul_options, 4)
    return st.fixed_dictionaries(
        {
            "adds": names.flatmap(
                lambda names: st.tuples(*(st.builds(_named, st.just(name), adds, options) for name in names))
            ),
            "steps": mostly(_fair_steps, _foul_steps, 4),
            "inputs": mostly(_fair_inputs, _foul_inputs, 4),
            "state": mostly(st.just("fair"), _foul_states, 6),
            "endings": st.lists(st.tuples(_endings, mostly(st.just("a"), odd, 6)), min_size=1, max_size=2),
            "value": odd,
        }
    )


def _named(name: Any, fair: dict[str, Any], foul: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, **fair, **foul}


call_sequences = _mostly(_sequences(lambda fair, *_: fair), _sequences(_mostly), 3)


def run_calls(given: dict[str, Any]) -> int:
    """Adds hooks, calls them and does something else with them; how often they fired."""
    hooks = fsh.SurgeryHooks(on_error="skip")
    for one in given["adds"]:
        rest = {name: value for name, value in one.items() if name not in ("name", "surgery")}
        hooks.add(one["name"], one["surgery"], **rest)
    for step in given["steps"]:
        hooks(step, state_of(given["state"], step, given["value"]), **given["inputs"])
    state = state_of("fair", 9, None)
    for ending, name in given["endings"]:
        ended(hooks, ending, name, state, given["inputs"])
    hooks.flush()
    return len([record for record in hooks.ledger.records if record.event == "fired"])


def ended(hooks: fsh.SurgeryHooks, ending: str, name: Any, state: Any, inputs: dict[str, Any]) -> None:
    """A further call of the hooks."""
    if ending in ("fire", "preview"):
        getattr(hooks, ending)(name, state, **{key: value for key, value in inputs.items() if key != "step"})
    elif ending in ("remove", "programs"):
        getattr(hooks, ending)(name)
    elif ending in ("collect", "init"):
        getattr(hooks, ending)(state)
    elif ending == "plan" and hasattr(hooks, "plan"):
        str(hooks.plan(state, name))
    elif ending in ("state_dict", "to_config", "hparams", "flush") and hasattr(hooks, ending):
        getattr(hooks, ending)()


def state_of(kind: str, step: Any, value: Any) -> Any:
    """A train state at this step, with something wrong about it."""
    fair = fuzz_runs.first_state("sgd").replace(step=step)
    made = {
        "fair": lambda: fair,
        "none": lambda: None,
        "dict": lambda: {"params": fair.params},
        "abstract": lambda: jax.eval_shape(lambda: fuzz_runs.first_state("sgd")),
        "deleted": lambda: fair.replace(params=_deleted()),
        "no slots": lambda: fair.replace(opt_state=None),
        "other slots": lambda: fair.replace(opt_state=fuzz_runs.first_state("adamw").opt_state),
        "empty": lambda: fair.replace(params={}),
        "bare": lambda: fair.replace(params=jnp.ones(3)),
        "int params": lambda: fair.replace(params={"dense": {"kernel": jnp.ones((2, 3), int), "bias": np.ones(3)}}),
        "odd": lambda: value,
        "odd leaf": lambda: fair.replace(params={"dense": {"kernel": value, "bias": jnp.ones(3)}}),
        "replicated": lambda: fair.replace(step=jnp.ones(8, int)),
    }
    return made[kind]()


def _deleted() -> Any:
    leaves = jax.tree.map(lambda leaf: leaf + 0, fuzz_runs.first_state("sgd").params)
    functools.reduce(operator.or_, (leaf.delete() or False for leaf in jax.tree.leaves(leaves)))
    return leaves
