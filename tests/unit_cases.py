"""Small networks whose hidden units are wired in different ways, and parameters under which some of them are dead."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_surgery_hooks as fsh
from flax_surgery_hooks.units import Units


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(6)(x))
        self.sow("intermediates", "h", h)
        k = nn.relu(nn.Dense(5)(h))
        self.sow("intermediates", "k", k)
        return nn.Dense(3)(k)


class Cnn(nn.Module):
    """A convolution, flattened into a dense layer; `channels_first` as a network ported from elsewhere would do it."""

    channels_first: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Conv(4, (3, 3))(x))
        self.sow("intermediates", "h", h)
        if self.channels_first:
            h = h.transpose(0, 3, 1, 2)
        return nn.Dense(3)(h.reshape(len(x), -1))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(6, name="gate")(x)) * nn.Dense(6, name="up")(x)
        self.sow("intermediates", "h", h)
        return nn.Dense(3, name="down")(h)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.relu(nn.Dense(6, name="up")(x))
        self.sow("intermediates", "h", h)
        return x + nn.Dense(4, name="down")(h), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="head")(stack(name="layers")(x, None)[0])


class Normed(nn.Module):
    """A norm of each unit alone, over the batch as BatchNorm does it, or over the units."""

    over_units: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6)(x)
        norm = nn.LayerNorm() if self.over_units else nn.LayerNorm(reduction_axes=0, feature_axes=-1)
        h = nn.relu(norm(h))
        self.sow("intermediates", "h", h)
        return nn.Dense(3)(h)


class Case(NamedTuple):
    """A model, its input, and how its units are wired, written out by hand."""

    model: Any
    shape: tuple[int, ...]
    units: tuple[Units, ...]
    stacked: tuple[str, ...] = ()

    @property
    def x(self) -> jax.Array:
        return jnp.asarray(np.random.default_rng(0).normal(size=self.shape), jnp.float32)

    def params(self, key: int = 0) -> Any:
        return _params(self, key)

    def init(self, key: jax.Array) -> Any:
        return self.model.init(key, jnp.zeros(self.shape))["params"]

    def output(self, params: Any) -> Any:
        return self.model.apply({"params": params}, self.x)

    def run(self, params: Any) -> Any:
        return fsh.units.capture(self.model, {"params": params}, self.x)


@functools.cache
def _params(case: Case, key: int) -> Any:
    return case.init(jax.random.key(key))


def dense(name: str) -> dict[str, int]:
    return {f"{name}/kernel": 1, f"{name}/bias": 0}


CASES = {
    "mlp": Case(Mlp(), (16, 4), (Units("h", dense("Dense_0"), {"Dense_1/kernel": 0}),
                                 Units("k", dense("Dense_1"), {"Dense_2/kernel": 0}))),
    "cnn": Case(Cnn(), (8, 3, 3, 2), (Units("h", {"Conv_0/kernel": 3, "Conv_0/bias": 0}, {"Dense_0/kernel": 0}),)),
    "channels_first": Case(Cnn(channels_first=True), (8, 3, 3, 2), (
        Units("h", {"Conv_0/kernel": 3, "Conv_0/bias": 0}, {"Dense_0/kernel": (0, "repeat")}),)),
    "gated": Case(Gated(), (16, 4), (Units("h", {**dense("gate"), **dense("up")}, {"down/kernel": 0}),)),
    "scanned": Case(Scanned(), (16, 4), (
        Units("layers/h", {"layers/up/kernel": 2, "layers/up/bias": 1}, {"layers/down/kernel": 1}, stacked=True),),
        ("layers/h",)),
    "normed": Case(Normed(), (16, 4), (Units(
        "h", {**dense("Dense_0"), "LayerNorm_0/scale": 0, "LayerNorm_0/bias": 0}, {"Dense_1/kernel": 0}),)),
}  # fmt: skip
LAYER_NORM = Case(Normed(over_units=True), (16, 4), CASES["normed"].units)

DEAD = {
    "mlp": {"h": [1, 4], "k": [0]},
    "cnn": {"h": [1]},
    "channels_first": {"h": [2]},
    "gated": {"h": [0, 5]},
    "scanned": {"layers/h": [[0, 2], [1, 2], [1, 3], [2, 0]]},  # layer, unit
    "normed": {"h": [3]},
}
"""Which units `killed` kills."""
KILLED_BY = {"gated": "gate/bias", "normed": "LayerNorm_0/bias", "scanned": "layers/up/bias"}


def flags(name: str, activation: str) -> np.ndarray:
    """Which units of an activation are dead."""
    made = np.zeros({"layers/h": (3, 6), "k": (5,)}.get(activation, (4,) if name.startswith("c") else (6,)), bool)
    for unit in DEAD[name][activation]:
        made[tuple(unit) if isinstance(unit, list) else unit] = True
    return made


def killed(name: str, key: int = 0) -> Any:
    """Parameters, biases too, under which the units of `DEAD` are 0 for every input, and no others are."""
    case = CASES[name]
    leaves = flat(case.params(key))
    rng = np.random.default_rng(5)
    leaves = {path: leaf + (0.2 * rng.normal(size=leaf.shape)).astype(np.float32) for path, leaf in leaves.items()}
    if name == "scanned":  # so that what layers add does not kill others
        leaves["layers/down/kernel"] = leaves["layers/down/kernel"] / 10
    for group in case.units:
        default = next(path for path in group.incoming if path.endswith("bias"))
        path = KILLED_BY.get(name, default)
        leaves[path] = np.where(flags(name, group.activation), np.float32(-1e3), leaves[path] + np.float32(4.0))
    return tree(leaves)


def flat(params: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(key.key for key in keys): np.asarray(leaf) for keys, leaf in flat}


def tree(leaves: dict[str, np.ndarray]) -> Any:
    made: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *stem, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), stem, made)[last] = jnp.asarray(leaf)
    return made


def touched(name: str, chosen: Any = None) -> dict[str, np.ndarray]:
    """For each leaf, 1 where an element makes a dead unit, 2 where it reads one, 0 elsewhere: by loops over indices."""
    case = CASES[name]
    marks = {path: np.zeros(leaf.shape, int) for path, leaf in flat(case.params()).items()}
    for mark, places in ((1, "incoming"), (2, "outgoing")):
        for group in case.units:
            dead = flags(name, group.activation) if chosen is None else chosen[group.activation]
            for path, place in getattr(group, places).items():
                axis, order = (place, "tile") if isinstance(place, int) else place
                for index in np.ndindex(marks[path].shape):
                    n, at = dead.shape[-1], index[axis]
                    unit = at % n if order == "tile" else at // (marks[path].shape[axis] // n)
                    if dead[(index[0], unit) if group.stacked else unit]:
                        marks[path][index] = mark
    return marks


def state_of(params: Any, tx: Any = None) -> fsh.TrainState:
    """A train state whose moments are no two alike, in the middle of a run."""
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx or optax.adam(1e-2))
    rng = np.random.default_rng(9)
    moments = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), leaf.dtype) if leaf.ndim else leaf, state.opt_state
    )
    return state.replace(opt_state=moments)
