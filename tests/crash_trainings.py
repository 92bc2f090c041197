"""Runs that are killed: small ones of three models, each with hooks of every sort that a crash could harm."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import pathlib
import runpy
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from resumed import Average

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
QUICK = {"guard": "off", "figures": False, "opt_state": "keep"}
"""For hooks whose figures these runs can do without, as others have theirs."""
ROWS = 32_768
"""Of a batch of the perceptron: a step takes some milliseconds, so that kills find it."""


class Training(NamedTuple):
    """What a run needs.

    Attributes:
      initial: the initial state, or what makes it; the hooks are all added.
      make_step: state -> `step(state, batch) -> (state, loss)`, for states of this structure.
      batch: the batch of a step, counted from 1.
      steps: how many.
      planned: the schedules that steps decide.
    """

    initial: Any
    make_step: Callable[[Any], Callable[[Any, Any], Any]]
    batch: Callable[[int], Any]
    steps: int
    planned: tuple[Any, ...]


class Leaves(NamedTuple):
    """Which leaves of a model get which surgery; those that grow are "in", "out" and perhaps "bias"."""

    noise: str
    reinit: str
    memory: str
    calm: str
    grow: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Double:
    """Pads with copies of all hidden units, which share what these put out, and some noise that tells them apart."""

    into: str
    out: str
    bias: str | None = None

    def __call__(self, leaves, key):
        into, out = leaves[self.into], leaves[self.out]
        noise = 1 + 0.01 * jax.random.normal(key, into.shape)
        grown = {
            self.into: jnp.concatenate([into, into * noise], -1),
            self.out: jnp.concatenate([out, out], -2) / 2,
        }
        if self.bias is not None:
            grown[self.bias] = jnp.concatenate([leaves[self.bias]] * 2, -1)
        return grown


def momentum() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02, momentum=0.9))


def add_hooks(
    hooks: fsh.SurgeryHooks, on: Leaves, init: Callable[[Any], Any], apply_fn: Any, **quick: Any
) -> tuple[Any, ...]:
    """Value, re-init, memory, other shapes, other optimizer, and one that a metric triggers; the steps of the first.

    `quick` is for those that need no figures for the sake of these runs.
    """
    when = {"noise": fsh.every(3), "reinit": fsh.at(4, 11), "pull": fsh.at(5, 9, 15), "grow": fsh.at(7)}
    when["switch"] = fsh.at(13)
    double = Double(on.grow["in"], on.grow["out"], on.grow.get("bias"))
    hooks.add("noise", fsh.surgeries.Noise(0.01), params=on.noise, when=when["noise"])
    hooks.add("reinit", fsh.surgeries.Reinit(init), params=on.reinit, when=when["reinit"], **quick)
    hooks.add("pull", Average(), params=on.memory, when=when["pull"], **quick)
    hooks.add("grow", double, params=list(on.grow.values()), when=when["grow"], opt_state="carry", apply_fn=apply_fn)
    hooks.add("switch", fsh.surgeries.SwitchOptimizer(momentum()), params="**", when=when["switch"])
    above = fsh.on_metric("loss", above=0.0, cooldown=4, lag=2)
    hooks.add("calm", fsh.surgeries.Scale(0.9), params=on.calm, when=above, **quick)
    return tuple(when.values())


# A perceptron, for most of the kills; matrices lie in rows over the devices of all processes


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(4)(hidden)


def mlp(hooks: fsh.SurgeryHooks, seed: int) -> Training:
    on = Leaves("Dense_1/kernel", "Dense_1/bias", "Dense_1/bias", "Dense_0/kernel", GROWING)
    tx = optax.adamw(1e-2)

    def init(key):
        return Mlp(8).init(key, jnp.zeros((1, 4)))["params"]

    def create():
        state = fsh.TrainState.create(apply_fn=Mlp(8).apply, params=init(jax.random.key(seed)), tx=tx)
        return hooks.init(state.replace(step=jnp.zeros((), jnp.int32)), fires=0)

    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))

    def rows(leaf):
        return NamedSharding(mesh, PartitionSpec(*["data"] * (leaf.ndim == 2)))

    def batch(step):
        whole = np.asarray(np.random.default_rng((seed, step)).normal(size=(ROWS, 4)), np.float32)
        return jax.make_array_from_callback(whole.shape, rows(whole), whole.__getitem__)

    def loss(apply_fn, params, batch):
        return jnp.mean((apply_fn({"params": params}, batch) - jnp.tanh(batch.sum(1, keepdims=True))) ** 2)

    planned = add_hooks(hooks, on, init, Mlp(16).apply, **QUICK)
    made = jax.jit(create, out_shardings=jax.tree.map(rows, jax.eval_shape(create)))
    return Training(made, functools.partial(step_of, hooks, loss), batch, 20, planned)


GROWING = {"in": "Dense_0/kernel", "bias": "Dense_0/bias", "out": "Dense_1/kernel"}


def step_of(hooks: fsh.SurgeryHooks, loss: Callable[..., jax.Array], _: Any) -> Callable[[Any, Any], Any]:
    return _jitted(hooks, loss)


@functools.cache
def _jitted(hooks: fsh.SurgeryHooks, loss: Callable[..., jax.Array]) -> Callable[[Any, Any], Any]:
    def step(state, batch):
        value, grads = jax.value_and_grad(loss, argnums=1)(state.apply_fn, state.params, batch)
        return hooks.observe(state.apply_gradients(grads=grads)), value

    return jax.jit(step, donate_argnums=0)


# The digits of examples/digits.py


def digits(hooks: fsh.SurgeryHooks, seed: int) -> Training:
    example = of_examples("digits")
    train, _ = example.load_data()
    on = Leaves("Conv_*/kernel", "Dense_1/bias", "Dense_1/bias", "Dense_1/kernel", GROWING)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3))

    def create():
        params = example.init_params(jax.random.key(seed))
        state = fsh.TrainState.create(apply_fn=example.MODEL.apply, params=params, tx=tx)
        return hooks.init(state.replace(step=jnp.zeros((), jnp.int32)), fires=0)

    def loss(apply_fn, params, batch):
        return example.loss_and_hits(apply_fn, params, batch)[0]

    at, data = 0, example.batches(train, 32, seed)

    def batch(step):
        nonlocal at
        skipped, at = step - at - 1, step
        return next(itertools.islice(data, skipped, None))

    planned = add_hooks(hooks, on, example.init_params, example.CNN(hidden=512).apply, **QUICK)
    return Training(jax.jit(create), functools.partial(step_of, hooks, loss), batch, 18, planned)


# The language model of examples/lm.py, on all devices of all processes


def lm(hooks: fsh.SurgeryHooks, seed: int) -> Training:
    model, train, data = map(of_examples, ("lm_model", "lm_train", "lm_data"))
    config = runpy.run_path(str(ROOT / "configs" / "lm.py"))["get_config"]("tiny")
    config.model.update(length=16, width=16, mlp=32)
    config.update(mesh={"data": 2, "fsdp": 2, "tensor": 2}, surgery={}, seed=seed)
    partitioning = train.make_partitioning(config)
    wider = model.ModelConfig(**{**config.model, "mlp": 64})
    on = Leaves(
        "head/kernel",
        "**/mlp_norm/scale",
        "out_norm/scale",
        "**/query/kernel",
        {"in": "blocks/mlp/up/kernel", "out": "blocks/mlp/down/kernel"},
    )
    network = train.make_model(config, partitioning)

    def init(key):
        return nn.unbox(train.init_boxed(network, key))

    corpus, _ = data.split(None, config.data.held_out, config.data.max_files)
    loader = data.Loader(corpus, seed, config.batch_size, config.model.length)

    def make_step(state):
        step = train.make_train_step(state, hooks, partitioning)

        def stepped(state, batch):
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        return stepped

    def batch(step):
        return loader.batch(step - 1, train.batch_sharding(partitioning))

    planned = add_hooks(hooks, on, init, model.Transformer(wider, partitioning).apply)
    return Training(hooks.init(train.create_state(config, partitioning)), make_step, batch, 18, planned)


def of_examples(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "examples"))


TRAININGS = {"mlp": mlp, "digits": digits, "lm": lm}
