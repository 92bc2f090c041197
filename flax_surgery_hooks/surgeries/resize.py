"""Other numbers of tokens and of classes: embeddings and heads of another size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import InputError, SurgeryFunctionError, quoted
from flax_surgery_hooks.paths import close_matches, flatten, listed
from flax_surgery_hooks.surgery import key_for

Arrays = Mapping[str, jax.Array]


@dataclass(frozen=True)
class GrowVocab:
    """Gives embeddings and heads another number of tokens: new ones at the end, or the last ones taken away.

    The row of a new token is the mean of those that there are. In a head its logit is then the mean of the others,
    so that it takes at most `1 / tokens` of their probability: for any input the divergence of the old prediction from
    the new one is at most `log(1 + new / tokens)`. A row of zeros or of noise could take nearly all of it.

    Old rows keep values and moments, new ones have no history. A tied embedding is one leaf, a head of its own another,
    with its bias: name all of them, so that they stay as long as each other.

    Args:
      axes: path -> the axis of the tokens, `{"embed/embedding": 0, "head/kernel": 1, "head/bias": 0}`.
      to: how many tokens there will be.
      multiple: `to` is rounded up to a multiple of it, as hardware or a mesh asks for.
      noise: what is added to new rows, relative to the standard deviation of the old ones, feature by feature; tells
        them apart, beyond the bound above.

    Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".

    >>> surgery = GrowVocab({"embed": 0}, to=3, multiple=2)
    >>> surgery({"embed": jnp.array([[1.0, 2.0], [3.0, 6.0]])})["embed"].tolist()
    [[1.0, 2.0], [3.0, 6.0], [2.0, 4.0], [2.0, 4.0]]
    """

    axes: Mapping[str, int]
    to: int
    multiple: int = 1
    noise: float = 0.0
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        if not isinstance(self.axes, Mapping) or not self.axes or not all(map(_is_whole, self.axes.values())):
            raise SurgeryFunctionError(
                "GrowVocab(axes=...) maps paths to the axis of the tokens.",
                found=quoted(self.axes),
                write='{"embed/embedding": 0, "head/kernel": 1}',
            )
        for field in ("to", "multiple"):
            value = getattr(self, field)
            if not _is_whole(value) or value < 1:
                raise SurgeryFunctionError(
                    f"GrowVocab({field}=...) is a whole number of at least 1.",
                    found=quoted(value),
                    write=f"{field}=128",
                )
        is_number = isinstance(self.noise, int | float) and not isinstance(self.noise, bool)
        if not is_number or not 0 <= self.noise < float("inf"):
            raise SurgeryFunctionError(
                "GrowVocab(noise=...) is a number, at least 0.", found=quoted(self.noise), write="noise=0.01"
            )

    def __hash__(self) -> int:
        return hash((*self.axes.items(), self.to, self.multiple, self.noise))

    def __call__(self, leaves: Arrays, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """The edited leaves."""
        missing = [path for path in self.axes if path not in leaves]
        if missing:
            raise SurgeryFunctionError(
                "GrowVocab(axes=...) names a leaf that is not there, or not selected.",
                path=missing[0],
                found=listed(leaves),
                write=listed(close_matches(missing[0], leaves)) or 'params="**"',
            )
        if self.noise and key is None:
            raise InputError("GrowVocab draws random numbers.", write="key=jax.random.key(0)")
        count = self._count(leaves)
        return {**leaves, **{path: self._resized(path, leaves[path], count, key) for path in self.axes}}

    def _count(self, leaves: Arrays) -> int:
        """How many tokens there are."""
        lengths = {}
        for path, axis in self.axes.items():
            shape = leaves[path].shape
            if not -len(shape) <= axis < len(shape):
                raise SurgeryFunctionError(
                    "GrowVocab(axes=...) names an axis that the leaf has not.",
                    path=path,
                    found=f"axis {axis} of shape {list(shape)}",
                    write=f"axis {max(len(shape) - 1, 0)}",
                )
            lengths[path] = shape[axis]
        if len(set(lengths.values())) > 1:
            raise SurgeryFunctionError(
                "The leaves have different numbers of tokens.",
                found=listed(f"{length} in {path}" for path, length in lengths.items()),
                write="the axis of the tokens in each",
            )
        return next(iter(lengths.values()))

    def _resized(self, path: str, leaf: jax.Array, count: int, key: jax.Array | None) -> jax.Array:
        axis, to = self.axes[path] % leaf.ndim, -(-self.to // self.multiple) * self.multiple
        if to <= count:
            return jax.lax.slice_in_dim(leaf, 0, to, axis=axis)
        still = jax.lax.stop_gradient(leaf)
        rows = jnp.broadcast_to(
            jnp.mean(still, axis=axis, keepdims=True), (*leaf.shape[:axis], to - count, *leaf.shape[axis + 1 :])
        )
        if self.noise and key is not None:
            spread = self.noise * jnp.std(still, axis=axis, keepdims=True)
            rows = rows + spread * jax.random.normal(key_for(key, path), rows.shape, leaf.dtype)
        return jnp.concatenate([leaf, rows], axis=axis)


@dataclass(frozen=True)
class ReplaceHead:
    """Puts fresh leaves of other shapes in, as for another number of classes. They have no history.

    Args:
      init: `init(key) -> params` of the model with the new head, `lambda key: new.init(key, x)["params"]`. Only the
        selected leaves of what it returns are computed.

    >>> surgery = ReplaceHead(lambda key: {"head": jnp.zeros((2, 5)), "body": jnp.ones(2)})
    >>> surgery({"head": jnp.ones((2, 3))}, jax.random.key(0))["head"].shape
    (2, 5)
    """

    init: Callable[[jax.Array], Any]
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        if not callable(self.init):
            raise SurgeryFunctionError(
                "ReplaceHead(init=...) is a function of a key.",
                found=quoted(self.init),
                write='init=lambda key: new.init(key, x)["params"]',
            )

    def __call__(self, leaves: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        """The edited leaves."""
        drawn = flatten(self.init(key))
        fresh = dict(zip(drawn.paths, drawn.values, strict=True))
        missing = [path for path in leaves if path not in fresh]
        if missing:
            raise SurgeryFunctionError(
                "ReplaceHead(init=...) returned no such parameter.",
                path=missing[0],
                found=listed(fresh),
                write='init=lambda key: new.init(key, x)["params"]'
                if f"params/{missing[0]}" in fresh
                else listed(close_matches(missing[0], fresh)) or "an init of the model with the new head",
            )
        return {path: fresh[path].astype(leaf.dtype) for path, leaf in leaves.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
