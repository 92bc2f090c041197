"""Mistakes with surgeries that add and remove leaves."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from raised import Case, fail, of_leaves
from tiny import MOMENTUM, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e

FUNCTION, STRUCTURE = e.SurgeryFunctionError, e.StructureError
SLOTS = make_state(1, MOMENTUM, w=jnp.arange(1.0, 5), v=jnp.ones(4))
DEEP = make_state(1, MOMENTUM, a={"w": jnp.ones(2), "v": jnp.ones(2)})


def returning(leaves: Any, state: Any = SLOTS, params: str = "w", **kwargs: Any) -> Any:
    """A call of `operate` with a surgery that returns these leaves, or what a function makes of the given ones."""
    function = leaves if callable(leaves) else lambda _: leaves
    return lambda: fsh.operate(state, of_leaves(function), params=params, **kwargs)


def picky() -> Any:
    """An optimizer that knows the leaves it was made for."""

    def init(params: Any) -> Any:
        return optax.trace(0.9).init(params) if set(params) == {"v", "w"} else fail()

    return optax.GradientTransformation(init, optax.trace(0.9).update)


def added(leaves: Any) -> Any:
    return {**leaves, "u": leaves["w"] * 1}


ONES = jnp.ones(2)


def in_place() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MOMENTUM, wrt=nnx.Param)
    grow = of_leaves(lambda leaves: {**leaves, "scale": jnp.ones(2)})
    make_hooks(grow, fsh.at(5), params="bias", options={"on_reshape": print})(0, fsh.bind_nnx(model, optimizer))


STACKED = make_state(1, MOMENTUM, w=jnp.ones((3, 4)))

CASES = {
    "layer_reshaped": Case(lambda: fsh.operate(STACKED, lambda w: w[1:], params="w[-1]"), STRUCTURE,
                           ("the shape of one layer", "Found: [4] -> [3]", "without an index"), {"path": "w[2]"}),
    "layer_added": Case(returning(lambda leaves: {**leaves, "u": ONES}, STACKED, "w[1]"), STRUCTURE,
                        ("can neither be added nor removed", "Found: w[1] -> u, w[1]", "whole leaves")),
    "in_place": Case(in_place, STRUCTURE, ("cannot be added to or removed from a model that is edited in place",
                     "Found: adds scale", "a new `nnx.Optimizer`"), {"hook": "a"}),
    "other_paths": Case(lambda: make_hooks(of_leaves(lambda leaves: {"u": leaves["w"]}))(1, make_state(1)), STRUCTURE,
                        ("adds or removes leaves", "Found: adds u; removes w", "apply_fn="),
                        {"hook": "a", "path": "w"}),
    "no_string_path": Case(returning({1: ONES}), FUNCTION, ("or others as strings without empty parts", "Found: 1"),
                           {"path": "w"}),
    "empty_part": Case(returning({"u//x": ONES}), FUNCTION, ("without empty parts", "Found: 'u//x'"), {"path": "w"}),
    "no_paths": Case(returning({}), FUNCTION, ("to add and remove leaves", "Found: no paths"), {"path": "w"}),
    "taken_path": Case(returning({"w": ONES, "v": ONES}), STRUCTURE,
                       ("that it was not given, at paths that exist", "Found: v", "a selection that takes these")),
    "path_above": Case(returning(lambda leaves: {**leaves, "a": ONES}, DEEP, "a/*"), STRUCTURE,
                       ("where other leaves are below", "Found: v, w", "another path"), {"path": "a"}),
    "path_below": Case(returning(lambda leaves: {**leaves, "w/x": ONES}), STRUCTURE,
                       ("dicts only; 'x' is in none", "nested dicts, FrozenDicts or an nnx.State"), {"path": "w/x"}),
    "path_in_list": Case(returning({"layers/2": ONES}, make_state(1, layers=[ONES, ONES]), "layers/1"), STRUCTURE,
                         ("dicts only; '1' is in none", "Found: list"), {"path": "layers/1"}),
    "optimizer_for_paths": Case(returning(added, make_state(1, picky(), w=ONES, v=ONES)), STRUCTURE,
                                ("`tx.init` fails on the new parameters: ValueError: no luck", "tx= of the hook")),
    "kept_new": Case(returning(added, opt_state={"grad": "keep"}), e.RuleError,
                     ("TraceState.trace cannot be kept: there is none, as the edit adds the leaf",), {"path": "u"}),
    "all_kept_new": Case(returning(added, opt_state="keep"), e.RuleError,
                         ("the edit adds or removes leaves", "Found: w -> u, w", "'carry', 'transport' or 'reset'")),
}  # fmt: skip
