"""A run with hooks of many kinds, to be cut off anywhere: values, memory, metrics, other shapes, other optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_surgery_hooks as fsh

STEPS = 20
HIDDEN = ("Dense_0/*", "Dense_1/kernel")
HOST_FACTS = ("seconds", "time", "donated")


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(8)(hidden)


def double(leaves, key):
    """Every hidden unit twice, its outgoing weights shared among the two, and a little noise that tells them apart."""
    kernel, bias, out = (leaves[name] for name in ("Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel"))
    noise = 1 + 0.01 * jax.random.normal(key, bias.shape)
    return {
        "Dense_0/kernel": jnp.concatenate([kernel, kernel * noise[None]], 1),
        "Dense_0/bias": jnp.concatenate([bias, bias]),
        "Dense_1/kernel": jnp.concatenate([out, out]) / 2,
    }


@dataclasses.dataclass(frozen=True)
class Average:
    """Remembers a running average of a leaf, and a fire goes half the way back to it."""

    def init_memory(self, leaf):
        return {"mean": jnp.zeros_like(leaf), "seen": jnp.zeros((), jnp.int32)}

    def observe(self, leaf, memory):
        return leaf, {"mean": 0.9 * memory["mean"] + 0.1 * leaf, "seen": memory["seen"] + 1}

    def __call__(self, leaf, memory):
        return (leaf + memory["mean"]) / 2, memory


def make_hooks(ledger: Any = None, leave_out: tuple[str, ...] = (), **kwargs: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=3, ledger=ledger, **kwargs)
    above = fsh.on_metric("loss", above=0.0, cooldown=4, lag=2)
    hooks.add("noise", fsh.surgeries.Noise(0.01), params="**/kernel", when=fsh.every(3))
    hooks.add("pull", Average(), params="Dense_1/*", when=fsh.at(5, 9, 15), figures=False, guard="off")
    hooks.add("grow", double, params=HIDDEN, when=fsh.at(7), opt_state="carry", apply_fn=Mlp(16).apply)
    hooks.add("switch", fsh.surgeries.SwitchOptimizer(momentum()), params="**", when=fsh.at(13))
    hooks.add("calm", fsh.surgeries.Scale(0.9), params="Dense_0/kernel", when=above)
    hooks.add("careful", fsh.surgeries.Scale(0.5), params="Dense_0/bias", when=fsh.at(14),
              rollback=fsh.Rollback(6, metric="loss", above=-1.0, lag=4))  # fmt: skip  # left at once, seen at 19
    for name in leave_out:
        hooks.remove(name)
    return hooks


@functools.cache
def momentum() -> optax.GradientTransformation:
    return optax.sgd(0.05, momentum=0.9)


@functools.cache
def adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def mesh_of(placed: str, count: int = 8) -> Any:
    kind = AxisType.Explicit if placed == "explicit" else AxisType.Auto
    return jax.make_mesh((count // 2, 2) if count > 1 else (1, 1), ("data", "tensor"), (kind, kind),
                         devices=jax.devices()[:count])  # fmt: skip


def create(hooks: fsh.SurgeryHooks) -> Any:
    params = Mlp(8).init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    state = fsh.TrainState.create(apply_fn=Mlp(8).apply, params=params, tx=adam())
    return hooks.init(state.replace(step=jnp.zeros((), jnp.int32)), fires=0)


def initial(hooks: fsh.SurgeryHooks, mesh: Any = None) -> Callable[[], Any]:
    """Makes the initial state; on a mesh it says where the leaves go."""
    make = functools.partial(create, hooks)
    if mesh is None:
        return make

    def place(leaf: Any) -> NamedSharding:
        spec = {0: (), 1: ("tensor",), 2: ("data", "tensor")}[leaf.ndim]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.jit(make, out_shardings=jax.tree.map(place, jax.eval_shape(make)))


def make_step(hooks: fsh.SurgeryHooks, placed: str = "one") -> Any:
    def step(state: Any, batch: Any) -> Any:
        def loss(params):
            out = state.apply_fn({"params": params}, batch)
            return jnp.mean((out - jnp.tanh(batch.sum(1, keepdims=True))) ** 2)

        if placed == "explicit":  # where the model of this test has no sharding rules
            value, grads = jnp.float32(1), jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params)
        else:
            value, grads = jax.value_and_grad(loss)(state.params)
        return hooks.observe(state.apply_gradients(grads=grads)), value

    return jax.jit(step, donate_argnums=0)


def batch_of(step: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(step).normal(size=(8, 4)), np.float32)


def run(
    hooks: fsh.SurgeryHooks, state: Any, upto: int, manager: Any = None, every: int = 1, placed: str = "one"
) -> Any:
    """Trains from where the state is to a step, and saves on the way."""
    step = make_step(hooks, placed)
    for at in range(int(state.step) + 1, upto + 1):
        state, loss = step(state, batch_of(at))
        state = hooks(at, state, metrics={"loss": loss})
        if manager is not None and at % every == 0:
            fsh.checkpoint.save(manager, at, state, hooks)
    return state


def open_manager(directory: Any, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options))


def facts(hooks: fsh.SurgeryHooks) -> list[dict[str, Any]]:
    """What the ledger tells, but for facts of the host."""
    told = [record for record in hooks.ledger.records if record.event != "run"]
    return [{name: value for name, value in vars(one).items() if name not in (*HOST_FACTS, "per_leaf")} for one in told]


def assert_same(state: Any, other: Any) -> None:
    assert jax.tree.structure((state.params, state.opt_state, state.surgery)) == jax.tree.structure(
        (other.params, other.opt_state, other.surgery)
    )
    for field in ("step", "params", "opt_state", "surgery"):
        ours, theirs = getattr(state, field), getattr(other, field)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(ours)[0]:
            want = functools.reduce(_at, keys, theirs)
            assert leaf.dtype == want.dtype, (field, keys)
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want), err_msg=f"{field} {keys}")


def _at(tree: Any, key: Any) -> Any:
    if hasattr(key, "name"):
        return getattr(tree, key.name)
    return tree[key.key if hasattr(key, "key") else key.idx]
