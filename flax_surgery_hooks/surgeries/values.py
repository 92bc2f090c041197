"""Surgeries that put other values into a leaf."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted
from flax_surgery_hooks.paths import close_matches, flatten, listed
from flax_surgery_hooks.surgery import key_for


@dataclass(frozen=True)
class Noise:
    """Adds Gaussian noise: `leaf + std * scale * n` with n standard normal.

    Every element keeps its history, so slots stay as they are, bit for bit.

    Args:
      std: standard deviation, >= 0.
      relative: whether `scale` is the leaf's root mean square (True) or 1.

    >>> Noise(0.0)(jnp.ones(2), jax.random.key(0)).tolist()
    [1.0, 1.0]
    """

    std: float
    relative: bool = True
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        if (
            isinstance(self.std, bool)
            or not isinstance(self.std, int | float)
            or not 0 <= self.std <= sys.float_info.max
        ):
            raise SurgeryFunctionError("Noise(std=...) must be a finite number of at least 0.", found=quoted(self.std))

    def __call__(self, leaf: jax.Array, key: jax.Array) -> jax.Array:
        """The edited leaf."""
        scale = jnp.sqrt(jnp.mean(jnp.square(leaf))) if self.relative else 1.0
        return leaf + jax.lax.stop_gradient(self.std * scale * jax.random.normal(key, leaf.shape, leaf.dtype))


@dataclass(frozen=True, eq=False)  # arrays neither hash nor compare, so each instance is equal to itself alone
class Assign:
    """Puts given values into leaves. All their elements are fresh.

    Args:
      value: a number or array that broadcasts to each leaf, or a mapping from path to such.

    >>> Assign(0.0)({"w": jnp.ones(2)})["w"].tolist()
    [0.0, 0.0]
    """

    value: Any
    preserves: ClassVar[str] = "nothing"

    def __call__(self, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The edited leaves."""
        return {path: self._value(path, leaf) for path, leaf in leaves.items()}

    def _value(self, path: str, leaf: jax.Array) -> jax.Array:
        value = self.value
        if isinstance(value, Mapping):
            if path not in value:
                raise SurgeryFunctionError(
                    "Assign(value=...) has no value for a selected leaf.",
                    path=path,
                    found=f"values for {listed(value)}",
                    write=listed(close_matches(path, value)) or f"{{{path!r}: ...}}",
                )
            value = value[path]
        if not _fits(np.shape(value), leaf.shape):
            raise SurgeryFunctionError(
                "Assign(value=...) does not broadcast to the leaf.",
                path=path,
                found=f"shape {list(np.shape(value))} for {list(leaf.shape)}",
            )
        return jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape)


def _fits(shape: tuple[int, ...], leaf: tuple[int, ...]) -> bool:
    """Whether a value of this shape broadcasts to a leaf, without making it larger."""
    try:
        return np.broadcast_shapes(shape, leaf) == leaf
    except ValueError:
        return False


@dataclass(frozen=True)
class Reinit:
    """Draws leaves anew, by the model's own initialisers or by a given one. All their elements are fresh.

    On a period, for the last layers alone, it is the reset of Nikishin et al. against the primacy bias: the other
    layers keep their values and their optimizer slots, bit for bit. What the paper does to the slots of the reset
    layers is `fresh="init"`.

    Args:
      init: `init(key) -> params`, such as `lambda key: model.init(key, batch)["params"]`. Only the selected leaves of
        what it returns are computed.
      initializer: instead of `init`, a `jax.nn.initializers` function `(key, shape, dtype) -> array`, for each leaf.

    Source: Nikishin et al. 2022 (arXiv 2205.07802), for resets on a period.

    >>> reinit = Reinit(initializer=jax.nn.initializers.zeros)
    >>> reinit({"w": jnp.ones(2)}, key=jax.random.key(0))["w"].tolist()
    [0.0, 0.0]
    """

    init: Callable[[jax.Array], Any] | None = None
    initializer: Callable[..., jax.Array] | None = None
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        if (self.init is None) == (self.initializer is None):
            raise SurgeryFunctionError(
                "Reinit needs either the model's `init` or one `initializer`.",
                found="both" if self.init is not None else "neither",
                write='Reinit(init=lambda key: model.init(key, batch)["params"])',
            )

    def __call__(self, leaves: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The edited leaves."""
        if self.initializer is not None:
            return {p: self.initializer(key_for(key, p), leaf.shape, leaf.dtype) for p, leaf in leaves.items()}
        assert self.init is not None
        return drawn_by(self.init, key, leaves, "Reinit")


def drawn_by(
    init: Callable[[jax.Array], Any], key: jax.Array, leaves: Mapping[str, jax.Array], surgery: str
) -> dict[str, jax.Array]:
    """Leaves drawn anew by the model's own initialisers, as constants to the old ones.

    Args:
      init: `init(key) -> params`.
      key: the key of the fire.
      leaves: path -> leaf, of which paths, shapes and dtypes matter.
      surgery: whose `init` it is, for messages.

    Raises:
      SurgeryFunctionError: it returned no such parameter, or one of another shape.
    """
    drawn = flatten(init(key))
    fresh = dict(zip(drawn.paths, drawn.values, strict=True))
    return {path: _same(path, leaf, fresh, surgery) for path, leaf in leaves.items()}


def _same(path: str, leaf: jax.Array, fresh: Mapping[str, jax.Array], surgery: str) -> jax.Array:
    if path not in fresh:
        raise SurgeryFunctionError(
            f"{surgery}(init=...) returned no such parameter.",
            path=path,
            found=listed(fresh),
            write='init=lambda key: model.init(key, batch)["params"]'
            if f"params/{path}" in fresh
            else listed(close_matches(path, fresh)) or "an init of this very model",
        )
    if fresh[path].shape != leaf.shape:
        raise SurgeryFunctionError(
            f"{surgery}(init=...) returned a parameter of another shape.",
            path=path,
            found=f"{list(fresh[path].shape)} for {list(leaf.shape)}",
            write="an init of this very model",
        )
    return fresh[path].astype(leaf.dtype)
