"""A decoder-only Transformer in Flax Linen whose parameters say, by logical axis names, how they are partitioned.

Pre-norm blocks; rotary or learned positions; layers scanned (one stack of parameters) or not; a head that is the
embedding once more, or one of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.sharding import Mesh

from flax_surgery_hooks.surgeries.qk_clip import max_logits

Rules = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """Where logical axes lie.

    Attributes:
      mesh: the devices.
      rules: logical axis -> mesh axis, tuple of mesh axes, or None.
    """

    mesh: Mesh
    rules: Rules


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of the network.

    Attributes:
      vocab: how many tokens there are.
      length: the longest sequence.
      width: features of the residual stream.
      layers: number of blocks.
      heads: attention heads; they divide the width.
      mlp: hidden units of a block's MLP.
      positions: "rope" or "learned".
      scan_layers: whether the blocks are one scanned stack.
      tied: whether the embedding is the head too.
      dtype: what is computed in; parameters are float32.
    """

    vocab: int = 256
    length: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 512
    positions: str = "rope"
    scan_layers: bool = True
    tied: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.positions not in ("rope", "learned"):
            raise ValueError(f"No positions {self.positions!r}. Write 'rope' or 'learned'.")
        if self.width % (2 * self.heads):
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width} into even parts.")


class Part(nn.Module):
    """What all parts of the network share."""

    config: ModelConfig
    partitioning: Partitioning

    def at(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x` with its axes laid out as the rules say."""
        return with_logical_constraint(x, names, rules=self.partitioning.rules, mesh=self.partitioning.mesh)

    def norm(self, name: str) -> nn.RMSNorm:
        """A norm over features, in float32."""
        scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        return nn.RMSNorm(name=name, dtype=jnp.float32, scale_init=scale_init)

    def dense(self, name: str, features: int | tuple[int, ...], names: tuple[str, ...], axis: Any = -1) -> Any:
        """A linear map without bias, whose kernel's axes have these names."""
        return nn.DenseGeneral(
            features,
            axis=axis,
            use_bias=False,
            dtype=jnp.dtype(self.config.dtype),
            kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), names),
            name=name,
        )


class Attention(Part):
    """Causal self-attention; where "intermediates" are asked for, it tells the largest logit of each head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The mix of values, [batch, length, width]."""
        head = self.config.width // self.config.heads
        names = ("embed", "heads", "head_features")
        query, key, value = (
            self.at(self.dense(name, (self.config.heads, head), names)(x), "batch", "length", "heads", None)
            for name in ("query", "key", "value")
        )
        if self.config.positions == "rope":
            query, key = rotated(query), rotated(key)
        if self.is_mutable_collection("intermediates"):  # makes all logits at once: only where they are asked for
            causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
            self.sow("intermediates", "max_logits", max_logits(query, key, mask=causal))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.dense("out", self.config.width, ("heads", "head_features", "embed"), axis=(-2, -1))(mixed)


class MLP(Part):
    """Two linear maps with a GELU between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """New features, [batch, length, width]."""
        hidden = nn.gelu(self.dense("up", self.config.mlp, ("embed", "mlp"))(x))
        hidden = self.at(hidden, "batch", "length", "mlp")
        return self.dense("down", self.config.width, ("mlp", "embed"))(hidden)


class Block(Part):
    """Attention and an MLP, each behind a norm and beside the residual stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The residual stream after the block, [batch, length, width]."""
        x = x + Attention(self.config, self.partitioning, name="attention")(self.norm("attention_norm")(x))
        x = x + MLP(self.config, self.partitioning, name="mlp")(self.norm("mlp_norm")(x))
        return self.at(x, "batch", "length", None)


class Transformer(Part):
    """The language model."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next tokens, float32 [batch, length, vocab], of tokens int32 [batch, length]."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        small = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "features"))
        embed = nn.Embed(
            config.vocab,
            config.width,
            dtype=dtype,
            embedding_init=small,
            name="embed",
        )
        x = embed(tokens)
        if config.positions == "learned":
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("length", "features"))
            positions = self.param("positions", init, (config.length, config.width))
            x = x + jnp.asarray(positions, dtype)[None, : tokens.shape[1]]
        x = self.norm("out_norm")(self.blocks(self.at(x, "batch", "length", None))).astype(dtype)
        logits = embed.attend(x) if config.tied else self.dense("head", config.vocab, ("embed", "vocab"))(x)
        return self.at(logits, "batch", "length", "vocab").astype(jnp.float32)

    def blocks(self, x: jax.Array) -> jax.Array:
        """All blocks: `blocks` with a leading axis for the layers where they are scanned, else `block_0`, ..."""
        if not self.config.scan_layers:
            for i in range(self.config.layers):
                x = Block(self.config, self.partitioning, name=f"block_{i}")(x)
            return x
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.config.layers,
            metadata_params={nn.meta.PARTITION_NAME: "layers"},
        )
        return scan(Block(self.config, self.partitioning, name="blocks"), x, None)[0]


def rotated(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions: pairs of features turned by angles that grow with the position.

    Args:
      x: [batch, length, heads, features], of which feature `i` pairs with `i + features / 2`.
      base: the ratio of the fastest to the slowest turn.
    """
    half = x.shape[-1] // 2
    speeds = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * speeds[None]
    cos, sin = (jnp.asarray(fn(angles)[None, :, None], x.dtype) for fn in (jnp.cos, jnp.sin))
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
