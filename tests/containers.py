"""Networks in every container that holds params, with moments: what `test_container_laws` is about.

Nothing here is read by the library's own functions: leaves are found by the last name of JAX's own key path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import mlp
import numpy as np
import optax
from flax import nnx
from flax.core import FrozenDict
from flax.training import dynamic_scale, train_state

import flax_surgery_hooks as fsh

LAYERS = {"hidden": ("b1", "b2", "w1", "w2"), "out": ("b3", "w3")}
PATHS = {name: f"{layer}/{name}" for layer, names in LAYERS.items() for name in names}
TX = optax.adam(1e-2, mlp.B1, mlp.B2)
Flat = dict[str, Any]

# Networks: the one of `mlp`, and one that is a single array.


def pool_loss(params: Flat, batch: jax.Array) -> jax.Array:
    """Of ReLU units that are summed: their order does not matter, and halves of a unit do what the whole does."""
    [kernel] = params.values()
    return jnp.mean((jax.nn.relu(batch @ kernel).sum(1) - jnp.sin(batch[:, 0])) ** 2)


def pool_widen(params: Flat, shares: tuple[float, ...]) -> Flat:
    return {path: jnp.concatenate([kernel * share for share in shares], 1) for path, kernel in params.items()}


def pool_narrow(params: Flat, shares: tuple[float, ...]) -> Flat:
    return {path: sum(jnp.split(kernel, len(shares), 1)) for path, kernel in params.items()}


EVEN = (mlp.even([0, 1, 2, 3] * 2), mlp.even([0, 1, 2, 3, 4, 5] * 2))
UNEQUAL = (
    mlp.Widening(np.array([0, 1, 2, 3, 0]), np.array([0.7, 1, 1, 1, 0.3])),
    mlp.Widening(np.array([0, 1, 2, 3, 4, 5, 5]), np.array([1.0, 1, 1, 1, 1, 0.1, 0.9])),
)


class Change(NamedTuple):
    """An edit that preserves the function, its `fold_back`, and a rule that is wrong for it."""

    edit: Callable[[Flat], Flat]
    fold_back: Callable[[Flat], Flat] | None
    wrong: str


class Network(NamedTuple):
    """Initial params, gradients, and edits that leave what is computed alone."""

    params: Callable[[], Flat]
    gradient: Callable[[Flat, Any], Flat]
    changes: dict[str, Change]


MLP = Network(
    mlp.make_params,
    mlp.gradient,
    {
        "scale": Change(mlp.rescale, None, "carry"),
        "permute": Change(mlp.permute, None, "keep"),
        "duplicate": Change(functools.partial(mlp.widen, first=EVEN[0], second=EVEN[1]), None, "carry"),
        "split": Change(
            functools.partial(mlp.widen, first=UNEQUAL[0], second=UNEQUAL[1]),
            functools.partial(mlp.narrow, first=UNEQUAL[0], second=UNEQUAL[1]),
            "reset",
        ),
    },
)
POOL = Network(
    lambda: {"": jnp.asarray(np.random.default_rng(8).normal(size=(5, 4)))},
    jax.jit(jax.grad(pool_loss)),
    {
        "permute": Change(
            lambda params: {path: kernel[:, jnp.array([2, 0, 3, 1])] for path, kernel in params.items()}, None, "keep"
        ),
        "duplicate": Change(functools.partial(pool_widen, shares=(0.5, 0.5)), None, "reset"),
        "split": Change(
            functools.partial(pool_widen, shares=(0.7, 0.3)), functools.partial(pool_narrow, shares=(0.7, 0.3)), "reset"
        ),
    },
)
# Containers.


def nested(flat: Flat) -> dict[str, Any]:
    return {layer: {name: flat[name] for name in names} for layer, names in LAYERS.items()}


def in_order(flat: Flat) -> list[Flat]:
    return [{name: flat[name] for name in (f"b{i}", f"w{i}")} for i in (1, 2, 3)]


class Layer(nnx.Module):
    def __init__(self, leaves: Flat):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))


class Model(nnx.Module):
    """The network as an NNX module."""

    def __init__(self, flat: Flat):
        self.hidden, self.out = (Layer({name: flat[name] for name in names}) for names in LAYERS.values())
        self.stats = nnx.BatchStat(jnp.ones(4))


@flax.struct.dataclass
class Struct:
    hidden: Any
    out: Any


class Pair(NamedTuple):
    hidden: Any
    out: Any


def of_fields(leaves: Flat) -> Any:
    """Leaves that are attributes."""
    return (Hidden if "w1" in leaves else Out)(**leaves)


@flax.struct.dataclass
class Hidden:
    b1: Any
    b2: Any
    w1: Any
    w2: Any


class Out(NamedTuple):
    b3: Any
    w3: Any


class BigState(train_state.TrainState):
    """A state with what real trainers add."""

    batch_stats: Any = None
    dynamic_scale: Any = None
    ema_params: Any = None


def create(params: Any, cls: Any = fsh.TrainState, tx: Any = TX, **fields: Any) -> Any:
    return cls.create(apply_fn=nn.relu, params=params, tx=tx, **fields)


def big_state(flat: Flat) -> Any:
    beside = {"batch_stats": {"mean": jnp.ones(3)}, "dynamic_scale": dynamic_scale.DynamicScale()}
    return create(nested(flat), BigState, **beside, ema_params=nested(flat))


def bound(params: Any) -> Any:
    return fsh.bind(params=params, opt_state=TX.init(params), tx=TX)


def bound_nnx(flat: Flat) -> Any:
    model = Model(flat)
    return fsh.bind_nnx(model, nnx.Optimizer(model, TX, wrt=nnx.Param))


def boxed(box: Any, params: Any) -> Any:
    return jax.tree.map(lambda leaf: box(leaf, names=(None,) * leaf.ndim), params)


def cast(flat: Flat, dtype: Any) -> Flat:
    return {name: leaf.astype(dtype) for name, leaf in flat.items()}


STATES: dict[str, Callable[[Flat], Any]] = {
    "dict": lambda flat: create(nested(flat)),
    "flat_dict": lambda flat: create(dict(flat)),
    "flax_state": lambda flat: create(nested(flat), train_state.TrainState),
    "frozen": lambda flat: create(FrozenDict(nested(flat))),
    "partitioned": lambda flat: create(boxed(nn.Partitioned, nested(flat))),
    "logically": lambda flat: create(boxed(nn.LogicallyPartitioned, nested(flat))),
    "nnx_state": lambda flat: create(nnx.state(Model(flat), nnx.Param)),
    "nnx_pure_dict": lambda flat: create(nnx.to_pure_dict(nnx.state(Model(flat), nnx.Param))),
    "variables": lambda flat: create({"params": nested(flat), "batch_stats": {"mean": jnp.ones(3)}}),
    "list": lambda flat: create({"layers": in_order(flat)}),
    "tuple": lambda flat: create({"layers": tuple(in_order(flat))}),
    "struct": lambda flat: bound(Struct(**nested(flat))),  # Flax's TrainState asks whether a name is `in` its params
    "named_tuple": lambda flat: create(Pair(**nested(flat))),
    "struct_leaves": lambda flat: bound({layer: of_fields(leaves) for layer, leaves in nested(flat).items()}),
    "none": lambda flat: create({**nested(flat), "c": None}),
    "numpy": lambda flat: create(nested(jax.tree.map(np.asarray, flat))),
    "int_bool": lambda flat: create({**nested(flat), "n": jnp.arange(3), "m": jnp.array([True, False])}),
    "keys": lambda flat: create({**nested(flat), "key": jax.random.key(0), "raw": jax.random.PRNGKey(0)}),
    "scalars": lambda flat: create({**nested(flat), "scale": 2.0, "n": 3}),
    "big_state": big_state,
    "bound": lambda flat: bound(nested(flat)),
    "bound_nnx": bound_nnx,
    "bare": lambda flat: bound(flat[""]),
    "bare_state": lambda flat: create(flat[""]),
    "bare_box": lambda flat: bound(nn.Partitioned(flat[""], names=(None, None))),
}
COARSE: dict[str, Callable[[Flat], Any]] = {
    "bfloat16": lambda flat: create(nested(cast(flat, jnp.bfloat16))),
    "float16": lambda flat: create(nested(cast(flat, jnp.float16))),
    "bfloat16_mu": lambda flat: create(nested(flat), tx=optax.adam(1e-2, mu_dtype=jnp.bfloat16)),
}
"""Leaves that hold no float64."""
ALL = STATES | COARSE
NO_STEP = ("keys", "int_bool", "scalars")
"""Those that optax cannot train as they are."""


def network_of(container: str) -> Network:
    return POOL if container.startswith("bare") else MLP


def expected_paths(container: str, names: Any) -> tuple[str, ...]:
    """The `/`-joined paths, in the order of the tree."""
    if container.startswith("bare"):
        return ("",)
    if container == "flat_dict":
        return tuple(sorted(names))
    if container in ("list", "tuple"):
        return tuple(f"layers/{int(name[1]) - 1}/{name}" for name in sorted(names, key=lambda name: (name[1], name[0])))
    prefix = "params/" if container == "variables" else ""
    return tuple(prefix + path for name, path in PATHS.items() if name in names)


def name_of(keys: Any) -> str:
    """The leaf's name in the network, by the last part of its path that is not of a box; "" for a bare one."""
    named = [str(getattr(key, "key", getattr(key, "name", None))) for key in keys]
    named = [name for name in named if name != "value"]
    return named[-1] if named else ""


def refilled(tree: Any, flat: Flat) -> Any:
    """The tree with the leaves of the network replaced, in their own dtype."""

    def fill(keys: Any, leaf: Any) -> Any:
        name = name_of(keys)
        return jnp.asarray(flat[name], leaf.dtype) if name in flat else leaf

    return jax.tree_util.tree_map_with_path(fill, tree)


def flat_of(tree: Any, names: Any) -> dict[str, Any]:
    items = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(keys): leaf for keys, leaf in items if name_of(keys) in names}


def make_state(container: str, params: Flat, mu: Flat, nu: Flat) -> Any:
    """A state in a container, with these moments."""
    state = ALL[container](params)
    adam, *rest = state.opt_state
    adam = adam._replace(mu=refilled(adam.mu, mu), nu=refilled(adam.nu, nu), count=jnp.int32(mlp.STEPS))
    state = state.replace(opt_state=(adam, *rest))
    return state.write_back() if hasattr(state, "write_back") else state


def moments_of(state: Any, names: Any) -> tuple[Flat, Flat]:
    adam = state.opt_state[0]
    return tuple({n: np.asarray(x) for n, x in flat_of(tree, names).items()} for tree in (adam.mu, adam.nu))  # type: ignore[return-value]
