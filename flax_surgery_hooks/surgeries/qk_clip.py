"""QK-clip: attention logits that are held down by the weights that make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import InputError, SurgeryFunctionError, quoted
from flax_surgery_hooks.paths import flatten, listed
from flax_surgery_hooks.surgeries.pairing import grouped, part_of, whole

Arrays = Mapping[str, jax.Array]

# Logits computed anew differ from tau by rounding; a head must not be clipped again for that.
_SLACK = 1e-5


@dataclass(frozen=True)
class QKClip:
    """Shrinks the query and key projections of heads whose attention logits have grown beyond `tau`.

    For a head whose largest logit is S > tau, `gamma = tau / S`, and

        W_query *= gamma ** alpha        W_key *= gamma ** (1 - alpha)

    biases likewise, so that its logits are multiplied by gamma and the largest becomes tau. Other heads keep their
    bits. Where several query heads share a key head (GQA, MQA; consecutive ones, as `jax.nn.dot_product_attention` has
    it), the key is scaled by the largest gamma of them and each query head by what it lacks, `gamma / gamma_key **
    (1 - alpha)`: no head grows, and one that is not clipped has its logits as they were. Optimizer slots are left alone
    (`opt_state="keep"`), as in the paper.

    Select all leaves of the two projections, `params=["**/query/*", "**/key/*"]`. Kernels are [..., heads, features],
    as those of `nn.MultiHeadDotProductAttention`, biases [heads, features], of scanned layers with the layers first.

    The largest logits are an input of the train loop, `hooks(step, state, max_logits=...)`, or of `max_logits`: a tree
    of the same modules, with one array [heads] below each attention ([layers, heads] if it is scanned), such as
    `self.sow("intermediates", "max_logits", ...)` leaves, or that array alone if there is one attention only. They
    are signed, over all of the batch, the devices and the micro-batches, with the scale and the mask; function
    `max_logits` of this module computes them. Logits of the last step, from before its update, are what the paper
    takes. A head whose logit is not finite is left alone.

    With a norm of queries or keys beside the projections it is refused: the norm would undo it.

    Args:
      tau: the largest logit allowed, > 0.
      alpha: the part of the query, in [0, 1].
      query: name of the query projection in the paths.
      key: name of the key projection, of the same parent.
      heads: None for kernels with an axis for heads; else the number of query heads of kernels [..., heads *
        features].
      key_heads: likewise that of key heads, if they are fewer.
      content: MLA: how many features of a head, the first ones, have no rotary position. The query's others are
        multiplied by gamma, as the rotary key that all heads share is not touched; of the key only the first are
        scaled, as its others may be values.
      query_rope: MLA with a projection of its own for the rotary part of the query: its name. It is multiplied by
        gamma.
      max_logits: what gives the logits, `max_logits(state, ...) -> tree`; it may take inputs of the train loop, such as
        a batch, and is called when the hook fires. None: the loop passes `max_logits=`.

    Source: Kimi K2 (arXiv 2507.20534), MuonClip; https://kexue.fm/archives/11126.

    >>> leaves = {"query/kernel": jnp.ones((1, 2, 1)), "key/kernel": jnp.ones((1, 2, 1))}
    >>> clipped = QKClip(tau=1.0)(leaves, max_logits=jnp.array([0.5, 4.0]), beside={})
    >>> clipped["query/kernel"].ravel().tolist()
    [1.0, 0.5]
    """

    tau: float = 100.0
    alpha: float = 0.5
    query: str = "query"
    key: str = "key"
    heads: int | None = None
    key_heads: int | None = None
    content: int | None = None
    query_rope: str | None = None
    max_logits: Callable[..., Any] | None = None
    opt_state: ClassVar[str] = "keep"
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        if not _is_number(self.tau) or not 0 < self.tau < float("inf"):
            raise SurgeryFunctionError(
                "QKClip(tau=...) must be a positive number.", found=quoted(self.tau), write="tau=100.0"
            )
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise SurgeryFunctionError(
                "QKClip(alpha=...) must be a number from 0 to 1.", found=quoted(self.alpha), write="alpha=0.5"
            )
        for field in ("heads", "key_heads", "content"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SurgeryFunctionError(
                    f"QKClip({field}=...) must be a positive int, or None.", found=quoted(value), write=f"{field}=8"
                )

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """What stands beside the leaves in the model, and the logits, if they are computed."""
        return {"beside": self._beside, **({} if self.max_logits is None else {"max_logits": self.max_logits})}

    def __call__(self, leaves: Arrays, max_logits: Any, beside: Any) -> dict[str, jax.Array]:
        """The edited leaves."""
        edited = dict(leaves)
        for group, attention in self._attentions(leaves, max_logits).items():
            _refuse_norms(group, beside)
            self._refuse_others(group, leaves, beside)
            for paths, factors in zip(attention.paths, self._factors(attention), strict=True):
                for path in paths:
                    edited[path] = self._scaled(path, leaves[path], *factors)
        return edited

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Of all selected attentions together."""
        return "qk/clipped_heads", "qk/max_logit", "qk/min_gamma"

    def figures(self, leaves: Arrays, max_logits: Any) -> dict[str, Any]:
        """How many heads are clipped, the largest logit before it, and the smallest gamma."""
        logits = jnp.concatenate([each.logits.ravel() for each in self._attentions(leaves, max_logits).values()])
        gamma = self._gamma(logits)
        figures = (jnp.sum(jnp.where(gamma < 1, 1.0, 0.0)), jnp.max(logits), jnp.min(gamma))
        return dict(zip(self.figure_names(()), figures, strict=True))

    def _attentions(self, leaves: Arrays, max_logits: Any) -> dict[str, _Attention]:
        """The selected attentions by the path of their parents."""
        names = self._names
        groups = grouped("QKClip", leaves, names)
        found = {}
        for group, parts in groups.items():
            whole("QKClip", group, parts, names)
            query = _heads(leaves, parts[self.query], self.heads)
            key = _heads(leaves, parts[self.key], self.key_heads or self.heads)
            if not query or not key or query % key:
                shapes = [str(list(leaves[path].shape)) for name in names for path in parts[name].values()]
                raise SurgeryFunctionError(
                    "The kernels of queries and keys have no heads that fit each other.",
                    path=group or None,
                    found=f"shapes {listed(shapes)}, heads={self.heads}",
                    write="kernels [inputs, heads, features], or heads= for those of [inputs, heads * features]",
                )
            paths = tuple(tuple(parts[name].values()) for name in names)
            found[group] = _Attention(paths, key, _logits_of(max_logits, group, query, alone=len(groups) == 1))
        return found

    def _gamma(self, logits: jax.Array) -> jax.Array:
        over = jnp.isfinite(logits) & (logits > self.tau * (1 + _SLACK))
        return jnp.where(over, self.tau / jnp.where(over, logits, 1), 1)

    def _factors(self, attention: _Attention) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """For each of `paths`: the factors per head of the content, and of the other features where `content` says."""
        gamma = self._gamma(attention.logits)
        shares = gamma.reshape(*gamma.shape[:-1], attention.key_heads, -1)
        of_key = jnp.max(shares, axis=-1) ** (1 - self.alpha)
        of_query = (shares / of_key[..., None]).reshape(gamma.shape)
        factors = (of_query, gamma), (of_key, jnp.ones_like(of_key)), (gamma, gamma)
        return factors[: len(attention.paths)]

    def _scaled(self, path: str, leaf: jax.Array, content: jax.Array, rest: jax.Array) -> jax.Array:
        """The leaf, [*layers, ..., heads, features], times factors [*layers, heads]."""
        *layers, heads = content.shape
        features = leaf.shape[-1] if self.heads is None else leaf.shape[-1] // heads
        tail = (heads, features) if self.heads is None else (heads * features,)
        between = leaf.ndim - len(layers) - len(tail)
        if between < 0 or leaf.shape != (*layers, *leaf.shape[len(layers) : len(layers) + between], *tail):
            raise SurgeryFunctionError(
                "A selected leaf has not the layers and heads of its logits and kernel.",
                path=path,
                found=f"shape {list(leaf.shape)} for layers {layers}, {heads} heads of {features} features",
                write="logits [layers, heads] for scanned layers, the first axis of their leaves; [heads] else",
            )
        within = jnp.arange(features) < (features if self.content is None else self.content)
        factor = jnp.where(within, content[..., None], rest[..., None]).astype(leaf.dtype)
        return leaf * jax.lax.stop_gradient(factor.reshape(*layers, *(1,) * between, *tail))

    def _beside(self, state: Any) -> dict[str, Any]:
        """The paths of all projections and norms of queries and keys; as `derived` are arrays, each has a number that
        says nothing.
        """
        paths = flatten(state.params).paths
        told = [path for path in paths if _is_norm(path) or any(part_of(path, name) for name in self._names)]
        return dict.fromkeys(("", *told), 0.0)

    def _refuse_others(self, group: str, leaves: Arrays, beside: Any) -> None:
        """Raises where a part of a projection would stay as it is: then no logit becomes tau."""
        parent, opened, layer = group.partition("[")
        for path in beside:
            mine = any(part is not None and part.parent == parent for part in (part_of(path, n) for n in self._names))
            if mine and path not in leaves and f"{path}{opened}{layer}" not in leaves:
                raise SurgeryFunctionError(
                    "QKClip has a part of a projection only: what is not selected keeps its size.",
                    path=path,
                    found=listed(leaves),
                    write='params= that selects it too, such as "**/query/*"',
                )

    @property
    def _names(self) -> tuple[str, ...]:
        return (self.query, self.key, *(() if self.query_rope is None else (self.query_rope,)))


class _Attention(NamedTuple):
    """One attention: paths of the leaves of its query, key and rotary query, number of key heads, logits [*layers,
    heads].
    """

    paths: tuple[tuple[str, ...], ...]
    key_heads: int
    logits: jax.Array


def _heads(leaves: Arrays, parts: Mapping[str, str], given: int | None) -> int:
    """How many heads the kernel has, 0 if it has none, not as many as are given, or is not selected."""
    shape = leaves[parts["kernel"]].shape if "kernel" in parts else ()
    if given is None:
        return shape[-2] if len(shape) > 2 else 0
    return 0 if len(shape) < 2 or shape[-1] % given else given


_NORM = re.compile(
    r"(?:^|/)_*(?:q|k|qk|query|key)(?:_?proj)?[_/]?(?:layer_?norm|rms_?norm|norm|ln)(?:[_/\d]|$)", re.ASCII
)
"""Paths of norms such as `query_ln` (Flax), `q_norm`, `query/norm`."""


def _is_norm(path: str) -> bool:
    return _NORM.search(path.lower()) is not None


def _refuse_norms(group: str, beside: Any) -> None:
    norms = [path for path in beside if _is_norm(path) and _is_below(path, group.partition("[")[0])]
    if norms:
        raise SurgeryFunctionError(
            "Queries or keys are normalised, which bounds the logits and would undo QKClip.",
            path=norms[0],
            found=listed(norms),
            write="no QKClip for this attention",
        )


def _is_below(path: str, parent: str) -> bool:
    return not parent or f"{path}/".startswith(f"{parent}/")


def _logits_of(tree: Any, group: str, heads: int, *, alone: bool) -> jax.Array:
    """The logits of one attention, from a tree of the model's modules, or an array if it is the only one.

    Raises:
      InputError: there are none, several arrays, or those of other heads.
    """
    flat = flatten(tree)
    held = dict(zip(flat.paths, flat.values, strict=True))
    parent, _, layer = group.removesuffix("]").partition("[")
    mine = [one for path, one in held.items() if (alone if path == "" else _is_below(path, parent))]
    if len(mine) != 1 or jnp.shape(mine[0])[-1:] != (heads,):
        raise InputError(
            f"`max_logits` must hold one array for {heads} heads below {quoted(parent)}.",
            path=group or None,
            found=listed(f"{path or 'array'} {list(jnp.shape(one))}" for path, one in held.items()) or "nothing",
            write=f"{{{parent!r}: logits}} of shape [{heads}], or [layers, {heads}] for scanned layers",
        )
    logits = jnp.asarray(mine[0])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits[int(layer)] if layer and logits.ndim > 1 else logits


def max_logits(
    query: jax.Array, key: jax.Array, *, scale: float | None = None, mask: jax.Array | None = None
) -> jax.Array:
    """The largest attention logit of each head, float32 [heads], for `QKClip`.

    It makes all logits at once, in float32. Under `jax.jit` the batch may be sharded; inside `shard_map` or `pmap`
    take `jax.lax.pmax` of the result.

    Args:
      query: [batch, length, heads, features], after rotary positions.
      key: [batch, key length, key heads, features], likewise; key heads divide heads, and consecutive heads share one.
      scale: of the logits, 1 / sqrt(features) by default.
      mask: bool, broadcasts to [batch, heads, length, key length]; True where attention may look. None: everywhere.

    >>> max_logits(jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 1, 4))).tolist()
    [2.0]
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    shares = query.shape[-2] // key.shape[-2]
    every = jnp.repeat(key.astype(wide), shares, axis=-2)
    logits = jnp.einsum("bqhf,bkhf->bhqk", query.astype(wide), every, precision="highest")
    logits *= query.shape[-1] ** -0.5 if scale is None else scale
    return jnp.max(logits, axis=(0, 2, 3), where=True if mask is None else mask, initial=-jnp.inf)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
