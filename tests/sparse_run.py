"""A sparse run, to be cut off anywhere: pruned, SET and RigL at once, fired by the host or in graph, on any layout.

Gradients are elementwise, so that no order of summation matters: a run is the same to the bit wherever its leaves lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from resumed import mesh_of

import flax_surgery_hooks as fsh

STEPS = 11
SHAPE = (16, 16)
LEAVES = ("first", "second", "rigged", "evolving")
KEPT = {"first": 26, "second": 26, "rigged": 51, "evolving": 51}


def loss(params: Any, batch: Any) -> jax.Array:
    return sum(jnp.sum(jnp.cos(3 * leaf["kernel"] + batch) * weight) for weight, leaf in enumerate(params.values(), 1))


def gradients(state: Any, batch: Any) -> Any:
    return jax.grad(loss)(state.params, batch)


def make_hooks(
    ledger: Any = None, only: tuple[str, ...] = ("prune", "rigl", "evolve"), **kwargs: Any
) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=5, ledger=ledger, **kwargs)
    ramp = fsh.surgeries.Prune(0.9, end=10, score="saliency", grads=gradients)
    rigl = fsh.surgeries.RigL(0.8, end=20, grads=gradients, distribution="uniform")
    evolution = fsh.surgeries.SET(0.8, anneal="constant", distribution="uniform")
    hooks.add("prune", ramp, params="{first,second}/kernel", when=fsh.every(2))
    # The mean of the survivors is a sum, whose order is another on another mesh.
    hooks.add("rigl", rigl, params="rigged/kernel", when=fsh.every(3), fresh="init")
    hooks.add("evolve", evolution, params="evolving/kernel", when=fsh.every(3, start=1), fresh="init")
    for name in set(hooks.names) - set(only):
        hooks.remove(name)
    return hooks


@functools.cache
def adam() -> optax.GradientTransformation:
    return optax.adam(0.02)


def initial(hooks: fsh.SurgeryHooks, placed: str = "one") -> Callable[[], Any]:
    """Makes the initial state; on a mesh it says where the leaves go."""

    def make() -> Any:
        draw = jax.random.normal
        params = {name: {"kernel": draw(jax.random.key(place), SHAPE)} for place, name in enumerate(LEAVES)}
        state = fsh.TrainState.create(apply_fn=None, params=params, tx=adam())
        return hooks.observe(hooks.init(state.replace(step=jnp.zeros((), jnp.int32))))

    if placed == "one":
        return make

    def place(leaf: Any) -> NamedSharding:
        spec = ("data", "tensor") if leaf.shape == SHAPE else ()
        return NamedSharding(mesh_of(placed), PartitionSpec(*spec))

    return jax.jit(make, out_shardings=jax.tree.map(place, jax.eval_shape(make)))


def run(hooks: fsh.SurgeryHooks, state: Any, upto: int, form: str, manager: Any = None) -> Any:
    """Trains from where the state is to a step, and saves on the way; `form` is "host" or "graph"."""
    last = hooks.in_graph if form == "graph" else lambda state, batch: hooks.observe(state)

    def step(state: Any, batch: Any) -> Any:
        return last(state.apply_gradients(grads=gradients(state, batch)), batch=batch)

    step = jax.jit(step, donate_argnums=0)
    for at in range(int(state.step) + 1, upto + 1):
        batch = np.float32(at % 5)
        state = hooks(at, step(state, batch), batch=batch)
        if manager is not None:
            fsh.checkpoint.save(manager, at, state, hooks)
    return state


def counts(state: Any) -> dict[str, tuple[int, int]]:
    """Of each leaf how many elements its mask keeps, and how many weights are not zero."""
    masks = {path: mask for memory in state.surgery["memory"].values() for path, mask in memory.items()}
    return {
        name: (int(masks[f"{name}/kernel"].sum()), int((state.params[name]["kernel"] != 0).sum())) for name in LEAVES
    }
