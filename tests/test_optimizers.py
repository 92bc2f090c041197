"""Optimizers whose slots mirror the parameters: each slot after an edit is that of the same optimizer run on the mapped
gradients from the start. Float64; the oracle is optax itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flax_surgery_hooks as fsh

STEPS = 5
ROWS: dict[str, Callable[[], Any]] = {
    "adabelief": lambda: optax.adabelief(0.1, eps_root=0.0),
    "adadelta": lambda: optax.adadelta(0.1),
    "adagrad": lambda: optax.adagrad(0.1, initial_accumulator_value=0.0),
    "adam": lambda: optax.adam(0.1),
    "adamax": lambda: optax.adamax(0.1, eps=0.0),
    "adamw": lambda: optax.adamw(0.1),
    "adan": lambda: optax.adan(0.1),
    "ademamix": lambda: contrib.ademamix(0.1),
    "adopt": lambda: contrib.adopt(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "dog": lambda: contrib.dog(0.1),
    "dowg": lambda: contrib.dowg(0.1),
    "lion": lambda: optax.lion(0.1),
    "madgrad": lambda: contrib.madgrad(0.1),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1, momentum=0.9)),
    "momo": lambda: contrib.momo(0.1),
    "momo_adam": lambda: contrib.momo_adam(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nadam": lambda: optax.nadam(0.1),
    "optimistic_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "prodigy": lambda: contrib.prodigy(),
    "radam": lambda: optax.radam(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "schedule_free": lambda: contrib.schedule_free_adamw(0.1),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(0.1),
    "yogi": lambda: optax.yogi(0.1),
}
if not hasattr(contrib, "madgrad"):  # an older optax
    del ROWS["madgrad"]
EPSILONS = {"adabelief", "adadelta", "adan", "adopt", "rmsprop", "yogi"}
"""Those whose slots see an eps, which does not scale with gradients, or a sign of a difference of squares."""
GLOBAL = {"dadapt_adamw", "dog", "dowg", "mechanize", "prodigy"}
"""Those whose slots depend on scalars over all leaves, which a scale of one leaf changes."""
EVOLVING = {"schedule_free"}
"""Those that remember parameters which they have moved themselves: after a scale these would have moved otherwise."""

Tree = dict[str, Any]


def params_at(step: int) -> Tree:
    rng = np.random.default_rng(0)
    start, drift = ({"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)} for _ in range(2))
    return {name: jnp.asarray(start[name] + 0.1 * step * drift[name]) for name in start}


def gradients(step: int) -> Tree:
    rng = np.random.default_rng(100 + step)
    return {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=4))}


def run(tx: Any, of_params: Callable[[Any], Any], of_gradient: Callable[[Any], Any]) -> Any:
    """The state after the recorded steps, the kernel and its gradients mapped."""

    def mapped(tree: Tree, function: Callable[[Any], Any]) -> Tree:
        return {**tree, "kernel": function(tree["kernel"])}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optax's own about dtypes of scalars
        state = tx.init(mapped(params_at(0), of_params))
        for step in range(STEPS):
            gradient = mapped(gradients(step), of_gradient)
            value = jnp.asarray(2.0 - 0.1 * step)  # the loss, which some ask for
            _, state = optax.with_extra_args_support(tx).update(
                gradient, state, mapped(params_at(step), of_params), value=value
            )
    return state


def moved(tx: Any, state: Any, edit: Callable[[Any], Any], rule: str = "transport") -> Any:
    bound = fsh.bind(params=params_at(STEPS), opt_state=state, tx=tx)
    return fsh.operate(bound, edit, params="kernel", opt_state=rule)[0].opt_state


def compare(held: Any, expected: Any) -> list[str]:
    """Paths of the leaves that differ."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(held), jax.tree.leaves(expected), strict=True)
    return [
        jax.tree_util.keystr(keys)
        for (keys, a), b in pairs
        if not np.allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-9, atol=1e-14)
    ]


@pytest.mark.parametrize("name", ROWS)
def test_slots_of_permuted_elements_are_those_of_permuted_gradients(name, x64):
    tx = ROWS[name]()
    permute = lambda kernel: kernel[jnp.array([2, 0, 1])][:, jnp.array([3, 1, 0, 2])]  # noqa: E731
    state = run(tx, lambda w: w, lambda g: g)
    expected = run(tx, permute, permute)
    assert compare(moved(tx, state, permute), expected) == []
    assert compare(moved(tx, state, permute, "keep"), expected), "the rule that leaves slots in place must fail"


@pytest.mark.parametrize("name", [name for name in ROWS if name not in EPSILONS | GLOBAL | EVOLVING])
def test_slots_of_scaled_elements_are_those_of_gradients_scaled_by_the_inverse(name, x64):
    tx = ROWS[name]()
    factors = jnp.asarray([[0.5], [2.0], [-4.0]])
    state = run(tx, lambda w: w, lambda g: g)
    expected = run(tx, lambda w: factors * w, lambda g: g / factors)
    assert compare(moved(tx, state, lambda w: factors * w), expected) == []
    wrong = run(tx, lambda w: factors * w, lambda g: g * factors)
    assert compare(moved(tx, state, lambda w: factors * w), wrong), "gradients scaled the other way must fail"
