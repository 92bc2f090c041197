"""What examples/lm.py computes on the devices: mesh, train state, train step and evaluation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from lm_model import ModelConfig, Partitioning, Transformer

import flax_surgery_hooks as fsh

Metrics = dict[str, jax.Array]
AXES = ("data", "fsdp", "tensor")


def make_partitioning(config: ml_collections.ConfigDict) -> Partitioning:
    """The mesh that the config describes, over the devices of all processes, and the rules.

    Raises:
      ValueError: the devices do not fill the mesh, or the windows of a batch do not divide over it.
    """
    sizes = [config.mesh[axis] for axis in AXES]
    rest = jax.device_count() // math.prod(size for size in sizes if size != -1)
    shape = [rest if size == -1 else size for size in sizes]
    if sizes.count(-1) > 1 or math.prod(shape) != jax.device_count():
        raise ValueError(f"{jax.device_count()} devices do not fill a mesh of {dict(zip(AXES, sizes, strict=True))}.")
    mesh = Mesh(np.array(jax.devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    partitioning = Partitioning(mesh, tuple(config.rules))
    over = mesh.size // sharding_of(partitioning, "batch").shard_shape((mesh.size,))[0]
    windows = config.batch_size / microbatches(config)
    if windows % over:
        raise ValueError(f"{windows:g} windows do not divide over the {over} devices that share a batch.")
    return partitioning


def sharding_of(partitioning: Partitioning, *names: str | None) -> NamedSharding:
    """How an array lies whose axes have these logical names; none for one copy on each device."""
    return logical_to_mesh_sharding(PartitionSpec(*names), partitioning.mesh, list(partitioning.rules))


def microbatches(config: ml_collections.ConfigDict) -> int:
    """Into how many parts a train step cuts its batch.

    Raises:
      ValueError: `config.accumulate` is none of the two.
    """
    if config.accumulate not in ("scan", "multi_steps"):
        raise ValueError(f"No accumulate {config.accumulate!r}. Write 'scan' or 'multi_steps'.")
    return config.accumulation if config.accumulate == "scan" else 1


# State


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW under a warm-up and a cosine; kernels decay, embeddings and norms do not."""
    several = config.accumulation if config.accumulate == "multi_steps" else 1
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps // several, config.num_steps // several, config.end_learning_rate
    )
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay, mask=is_kernel)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return optax.MultiSteps(tx, several).gradient_transformation() if several > 1 else tx


def is_kernel(params: Any) -> Any:
    """For each leaf, boxed or not, whether it belongs to a kernel."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "'kernel'" in jax.tree_util.keystr(path), params)


def make_model(config: ml_collections.ConfigDict, partitioning: Partitioning) -> Transformer:
    """The network."""
    return Transformer(ModelConfig(**config.model), partitioning)


def init_boxed(model: Transformer, key: jax.Array) -> Any:
    """Fresh params, in boxes that name their axes."""
    return model.init(key, jnp.zeros((1, model.config.length), jnp.int32))["params"]


def hook_objects(config: ml_collections.ConfigDict, partitioning: Partitioning) -> dict[str, Any]:
    """What surgeries of the config need and a config cannot hold.

    For `reinit`, how parameters are drawn; for `rigl`, the gradients of a batch of the train step.
    """
    named = {hook.surgery for hook in config.surgery.values()}
    objects: dict[str, Any] = {}
    if "reinit" in named:
        model = make_model(config, partitioning)
        objects["init"] = lambda key: nn.unbox(init_boxed(model, key))
    if "rigl" in named:
        objects["grads"] = lambda state, batch: loss_and_grads(state, batch)[1]
    return objects


def initial_state(config: ml_collections.ConfigDict, partitioning: Partitioning) -> Callable[[], fsh.TrainState]:
    """Makes params and optimizer state at step 0, where they belong: no device ever holds more than its part.

    It is jitted, and so tells a checkpoint that is restored what goes where without making anything.
    """
    model, tx = make_model(config, partitioning), make_optimizer(config)

    def init() -> fsh.TrainState:
        params = init_boxed(model, jax.random.key(config.seed))
        return fsh.TrainState.create(apply_fn=model.apply, params=params, tx=tx).replace(step=jnp.zeros((), jnp.int32))

    specs = nn.get_partition_spec(jax.eval_shape(init))  # by the logical names in the boxes around parameters
    shardings = logical_to_mesh_sharding(specs, partitioning.mesh, list(partitioning.rules))
    return jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)


def create_state(config: ml_collections.ConfigDict, partitioning: Partitioning) -> fsh.TrainState:
    """The initial state."""
    return initial_state(config, partitioning)()


def shardings_of(state: Any) -> Any:
    """Where each leaf of a state lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


# Train step


def loss_of(apply_fn: Callable, params: Any, windows: jax.Array) -> jax.Array:
    """Bits per byte of each window, float32 [windows], of windows int32 [windows, length + 1]."""
    logits = apply_fn({"params": params}, windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean(-1) / math.log(2)


def loss_and_grads(state: fsh.TrainState, batch: jax.Array) -> tuple[jax.Array, Any]:
    """Mean bits per byte of a batch int32 [parts, windows, length + 1], and the gradients, one part at a time."""

    def of_part(windows: jax.Array) -> Any:
        return jax.value_and_grad(lambda params: loss_of(state.apply_fn, params, windows).mean())(state.params)

    def add(total: Any, windows: jax.Array) -> Any:
        return jax.tree.map(jnp.add, total, of_part(windows)), None

    if len(batch) == 1:
        return of_part(batch[0])
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.params))
    total, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda value: value / len(batch), total)


def make_train_step(
    state: fsh.TrainState, hooks: fsh.SurgeryHooks, partitioning: Partitioning
) -> Callable[[fsh.TrainState, jax.Array], tuple[fsh.TrainState, Metrics]]:
    """Compiles `train_step(state, batch) -> (state, metrics)`, which takes the old state's memory.

    A batch is int32 [parts, windows, length + 1], as for `loss_and_grads`; hooks get it as `batch`. Metrics are those
    before the step.

    Args:
      state: a state after `hooks.init`; its structure and shardings are those of all states to come.
      hooks: what runs inside the step.
      partitioning: the mesh and its rules.
    """

    def train_step(state: fsh.TrainState, batch: jax.Array) -> tuple[fsh.TrainState, Metrics]:
        loss, grads = loss_and_grads(state, batch)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return hooks.in_graph(state.apply_gradients(grads=grads), batch=batch), metrics

    shardings, one = shardings_of(state), sharding_of(partitioning)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(partitioning)),
        out_shardings=(shardings, {"loss": one, "grad_norm": one}),
        donate_argnums=0,
    )


def batch_sharding(partitioning: Partitioning) -> NamedSharding:
    """How a batch [parts, windows, length + 1] lies."""
    return sharding_of(partitioning, None, "batch", None)


def paced(values: Any) -> None:
    """On CPU, waits for these; elsewhere the host runs ahead of the devices.

    Virtual devices share the threads of a processor: collectives of two programs at once can each hold threads that the
    other one waits for.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(values)


# Evaluation


def make_evaluate(
    state: fsh.TrainState, partitioning: Partitioning, size: int
) -> Callable[[fsh.TrainState, np.ndarray], np.ndarray]:
    """Compiles `evaluate(state, windows)`: bits per byte of each window, float32 [n], of int32 [n, length + 1].

    Windows and results are on the host.

    Args:
      state: a state like those to come.
      partitioning: the mesh and its rules.
      size: how many windows are evaluated at a time; a last part is filled up.
    """
    lying = sharding_of(partitioning, "batch", None)
    run = jax.jit(
        functools.partial(loss_of, state.apply_fn),
        in_shardings=(shardings_of(state.params), lying),
        out_shardings=sharding_of(partitioning),
    )

    def evaluate(state: fsh.TrainState, windows: np.ndarray) -> np.ndarray:
        results = []
        for start in range(0, len(windows), size):
            part = windows[np.arange(start, start + size) % len(windows)]
            placed = jax.make_array_from_callback(part.shape, lying, functools.partial(np.ndarray.__getitem__, part))
            results.append(jax.device_get(run(state.params, placed)))  # one at a time, see `paced`
        return np.concatenate(results)[: len(windows)]

    return evaluate
