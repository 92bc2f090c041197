"""Networks of any width, the groups of units in them, and their gradients: what `test_width` is about."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.units import Units

Flat = dict[str, np.ndarray]


class Mlp(nn.Module):
    """Two hidden layers."""

    widths: tuple[int, int] = (6, 5)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width, param_dtype=x.dtype)(x))
        return nn.Dense(3, param_dtype=x.dtype)(x)


class Cnn(nn.Module):
    """Two convolutions, the first with a BatchNorm by what it has seen, the second flattened, perhaps by channels."""

    channels: tuple[int, int] = (4, 3)
    channels_first: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.channels[0], (3, 3), param_dtype=x.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, param_dtype=x.dtype)(x))
        x = nn.relu(nn.Conv(self.channels[1], (3, 3), param_dtype=x.dtype)(x))
        x = x.transpose(0, 3, 1, 2) if self.channels_first else x
        return nn.Dense(3, param_dtype=x.dtype)(x.reshape(len(x), -1))


class Attention(nn.Module):
    """Causal, with rotary positions; consecutive heads share a key head where there are fewer."""

    heads: int
    key_heads: int
    features: int = 4

    @nn.compact
    def __call__(self, x):
        def part(name: str, heads: int) -> Any:
            return nn.DenseGeneral((heads, self.features), use_bias=False, name=name, param_dtype=x.dtype)(x)

        query, key, value = part("query", self.heads), part("key", self.key_heads), part("value", self.key_heads)
        query, key = rotated(query), rotated(key)
        # By hand: JAX's own takes the softmax in float32.
        key, value = (jnp.repeat(each, self.heads // self.key_heads, axis=-2) for each in (key, value))
        logits = jnp.einsum("bqhf,bkhf->bhqk", query, key) / np.sqrt(self.features)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        mixed = jnp.einsum("bhqk,bkhf->bqhf", jax.nn.softmax(jnp.where(causal, logits, -jnp.inf)), value)
        out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="out", param_dtype=x.dtype)
        return out(mixed)


def rotated(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * (10.0 ** -jnp.arange(half))[None]
    cos, sin = jnp.cos(angles)[None, :, None].astype(x.dtype), jnp.sin(angles)[None, :, None].astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


class Block(nn.Module):
    """Attention and a SwiGLU, each behind a norm and beside the residual stream."""

    heads: int
    key_heads: int
    hidden: int
    rms: bool

    @nn.compact
    def __call__(self, x, _=None):
        norm = functools.partial(nn.RMSNorm if self.rms else nn.LayerNorm, param_dtype=x.dtype)
        dense = functools.partial(nn.Dense, use_bias=False, param_dtype=x.dtype)
        x = x + Attention(self.heads, self.key_heads, name="attention")(norm(name="attention_norm")(x))
        y = norm(name="mlp_norm")(x)
        hidden = nn.silu(dense(self.hidden, name="gate")(y)) * dense(self.hidden, name="up")(y)
        return x + dense(x.shape[-1], name="down")(hidden), None


class Lm(nn.Module):
    """A language model; its head is the embedding once more. Layers may be scanned."""

    width: int = 6
    heads: int = 2
    key_heads: int = 1
    hidden: int = 5
    rms: bool = True
    scanned: bool = False
    dtype: Any = jnp.float64

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, self.width, name="embed", param_dtype=self.dtype, dtype=self.dtype)
        x = embed(tokens)
        sizes = (self.heads, self.key_heads, self.hidden, self.rms)
        if self.scanned:
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack(*sizes, name="blocks")(x, None)
        else:
            for i in range(2):
                x, _ = Block(*sizes, name=f"block_{i}")(x)
        norm = (nn.RMSNorm if self.rms else nn.LayerNorm)(name="out_norm", param_dtype=self.dtype)
        return embed.attend(norm(x))


class Case(NamedTuple):
    """A network, its groups of units, and the same with other numbers of them.

    Attributes:
      make: from the numbers of units, in the order of the groups, to the network.
      counts: how many there are at first.
      shape: of a batch; of integers below 11 for a language model.
      units: the groups, written by hand.
      to: how many there are afterwards, where units are copied.
      fields: collections beside the parameters.
    """

    make: Callable[..., Any]
    counts: tuple[int, ...]
    shape: tuple[int, ...]
    units: tuple[Units, ...]
    to: tuple[int, ...]
    fields: tuple[str, ...] = ()

    def batch(self, seed: int, dtype: Any = np.float64) -> jax.Array:
        rng = np.random.default_rng(seed)
        if self.is_lm:
            return jnp.asarray(rng.integers(11, size=self.shape), jnp.int32)
        return jnp.asarray(rng.normal(size=self.shape), dtype)

    @property
    def is_lm(self) -> bool:
        return isinstance(self.make(*self.counts), Lm)

    def wider(self, to: tuple[int, ...] | None = None) -> Any:
        return self.make(*(to or self.to))

    def variables(self, seed: int = 0, dtype: Any = np.float64, model: Any = None) -> dict[str, Any]:
        """Fresh ones of no special values: gains are not 1, biases not 0, running averages not those of the start."""
        model = model or self.make(*self.counts)
        made = model.init(jax.random.key(seed), self.batch(0, dtype))
        rng = np.random.default_rng(seed)

        def moved(leaf: Any) -> Any:
            return jnp.asarray(np.asarray(leaf) + 0.1 * np.abs(rng.normal(size=leaf.shape)), dtype)

        return {name: jax.tree.map(moved, tree) for name, tree in made.items()}


def dense(name: str, axis: int = 1) -> dict[str, Any]:
    return {f"{name}/kernel": axis, f"{name}/bias": 0}


def of_blocks(places: Mapping[str, Any], scanned: bool = False) -> dict[str, Any]:
    if scanned:
        return {f"blocks/{path}": axis + 1 if isinstance(axis, int) else (axis[0] + 1, axis[1]) for path, axis in
                places.items()}  # fmt: skip
    return {f"block_{i}/{path}": axis for i in range(2) for path, axis in places.items()}


def hidden(scanned: bool = False) -> tuple[Units, ...]:
    into, out = {"gate/kernel": 1, "up/kernel": 1}, {"down/kernel": 0}
    if scanned:
        return (Units("hidden", of_blocks(into, True), of_blocks(out, True), stacked=True),)
    return tuple(
        Units(f"hidden_{i}", {f"block_{i}/{path}": axis for path, axis in into.items()},
              {f"block_{i}/{path}": axis for path, axis in out.items()})
        for i in range(2)
    )  # fmt: skip


STREAM = Units(
    "stream",
    {"embed/embedding": 1, **of_blocks({"attention/out/kernel": 2, "down/kernel": 1, "attention_norm/scale": 0,
                                       "mlp_norm/scale": 0})},
    {**of_blocks({"attention/query/kernel": 0, "attention/key/kernel": 0, "attention/value/kernel": 0,
                  "gate/kernel": 0, "up/kernel": 0}), "out_norm/scale": 0},
)  # fmt: skip
"""The residual stream. The embedding is read by the head as well, so that the last norm's gain is what is shared."""
BIASES = {**of_blocks({"attention_norm/bias": 0, "mlp_norm/bias": 0})}
WITH_BIASES = Units("stream", {**STREAM.incoming, **BIASES}, {**STREAM.outgoing, "out_norm/bias": 0})
GROUPS = Units(
    "groups",
    of_blocks({"attention/query/kernel": (1, "repeat"), "attention/key/kernel": 1, "attention/value/kernel": 1}),
    of_blocks({"attention/out/kernel": (0, "repeat")}),
)
"""Key heads, each with the heads that share it."""

CASES = {
    "mlp": Case(lambda a, b: Mlp((a, b)), (6, 5), (16, 4), (
        Units("a", dense("Dense_0"), {"Dense_1/kernel": 0}), Units("b", dense("Dense_1"), {"Dense_2/kernel": 0})),
        (10, 8)),
    "cnn": Case(lambda a, b: Cnn((a, b)), (4, 3), (8, 4, 4, 2), (
        Units("a", {**dense("Conv_0", 3), "BatchNorm_0/scale": 0, "BatchNorm_0/bias": 0,
                    "batch_stats/BatchNorm_0/mean": 0, "batch_stats/BatchNorm_0/var": 0}, {"Conv_1/kernel": 2}),
        Units("b", dense("Conv_1", 3), {"Dense_0/kernel": 0})), (7, 5), ("batch_stats",)),
    "channels_first": Case(lambda b: Cnn((4, b), channels_first=True), (3,), (8, 4, 4, 2), (
        Units("b", dense("Conv_1", 3), {"Dense_0/kernel": (0, "repeat")}),), (5,), ("batch_stats",)),
    "hidden": Case(lambda a, b: Lm(hidden=a), (5, 5), (4, 7), hidden(), (8, 8)),
    "scanned": Case(lambda a: Lm(hidden=a, scanned=True), (5,), (4, 7), hidden(True), (9,)),
    "groups": Case(lambda a: Lm(heads=2 * a, key_heads=a), (2,), (4, 7), (GROUPS,), (4,)),
    "stream": Case(lambda a: Lm(width=a), (6,), (4, 7), (STREAM,), (12,)),
    "layer_norm": Case(lambda a: Lm(width=a, rms=False), (6,), (4, 7), (WITH_BIASES,), (18,)),
}  # fmt: skip


def loss_of(model: Any, params: Any, others: Mapping[str, Any], batch: jax.Array) -> jax.Array:
    """Something that depends on all of the output."""
    out = model.apply({"params": params, **others}, batch)
    weights = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return jnp.mean((out - weights) ** 2) / 2
