"""A trainer as commands want it: `for_surgery(config)`, beside what makes a run of some steps."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import orbax.checkpoint as ocp

import flax_surgery_hooks as fsh


def get_config(without: str = "") -> ml_collections.ConfigDict:
    """The config, also of `--config=tests/tiny_trainer.py:noise`, which leaves out the hook of this name."""
    config = ml_collections.ConfigDict({"seed": 3, "num_steps": 8, "width": 4, "surgery": {}})
    config.surgery.halve = fsh.config.hook("scale", factor=0.5, params="**/kernel", at=(3,))
    config.surgery.noise = fsh.config.hook("noise", std=0.1, params="**", at=(5,))
    if without:
        config.surgery[without].enabled = False
    return config


def create_state(config: ml_collections.ConfigDict) -> fsh.TrainState:
    kernel = jax.random.normal(jax.random.key(0), (3, config.width))
    params = {"in": {"kernel": kernel, "bias": jnp.zeros(config.width)}}
    return fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))


def for_surgery(config: ml_collections.ConfigDict) -> Any:
    hooks = fsh.SurgeryHooks.from_config(config.surgery, seed=config.seed)
    return functools.partial(create_state, config), hooks


@jax.jit
def train_step(state: fsh.TrainState) -> fsh.TrainState:
    def loss(params):
        return jnp.sum(jnp.square(jnp.ones((2, 3)) @ params["in"]["kernel"] + params["in"]["bias"][None] - 1.0))

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def run(hooks: Any, state: Any, upto: int) -> fsh.TrainState:
    for step in range(int(state.step) + 1, upto + 1):
        state = hooks(step, train_step(state))
    return state


def saved(config: ml_collections.ConfigDict, directory: pathlib.Path, upto: int) -> fsh.TrainState:
    """A run up to a step, whose state is saved there."""
    init_fn, hooks = for_surgery(config)
    state = run(hooks, init_fn(), upto)
    with ocp.CheckpointManager(directory) as manager:
        fsh.checkpoint.save(manager, upto, state, hooks)
    return state


def with_ledger(config: ml_collections.ConfigDict) -> Any:
    return create_state, fsh.SurgeryHooks.from_config(config.surgery, ledger="ledger.jsonl")


def skipping(config: ml_collections.ConfigDict) -> Any:
    return functools.partial(create_state, config), fsh.SurgeryHooks.from_config(
        config.surgery, seed=3, on_error="skip"
    )


def without_hooks(config: ml_collections.ConfigDict) -> Any:
    return create_state, fsh.SurgeryHooks()


def the_wrong_way_round(config: ml_collections.ConfigDict) -> Any:
    return tuple(reversed(for_surgery(config)))


def only_hooks(config: ml_collections.ConfigDict) -> Any:
    return for_surgery(config)[1]


def no_state(config: ml_collections.ConfigDict) -> Any:
    return 3, for_surgery(config)[1]


def abstract(config: ml_collections.ConfigDict) -> Any:
    init_fn, hooks = for_surgery(config)
    return jax.eval_shape(init_fn), hooks


def failing(config: ml_collections.ConfigDict) -> Any:
    raise RuntimeError("no luck")


def failing_init(config: ml_collections.ConfigDict) -> Any:
    return functools.partial(failing, config), for_surgery(config)[1]


def without_steps() -> ml_collections.ConfigDict:
    config = get_config()
    del config["num_steps"]
    return config
