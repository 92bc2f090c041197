"""Surgeries on the size of weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted

Axis = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Scale:
    """Multiplies a leaf: `factor * leaf`.

    Args:
      factor: the multiplier, finite.

    Optimizer slots are carried by default; give `opt_state="transport"` where the model computes the same after it, for
    example a kernel that feeds a norm.

    >>> Scale(0.5)(jnp.ones(2)).tolist()
    [0.5, 0.5]
    """

    factor: float
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        _check_number("Scale", "factor", self.factor, positive=False)

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """The edited leaf."""
        return self.factor * leaf


@dataclass(frozen=True)
class Normalize:
    """Gives a leaf a norm: `to * leaf / ||leaf||`. A leaf (or slice) of zeros stays as it is.

    The norm counts as a constant, so every element keeps its own history. With `opt_state="carry"` (the default) or
    "keep" this is the surgery of Flax's "model surgery" guide.

    Args:
      axis: None for the Frobenius norm of the whole leaf; else the axis or axes that a norm sums over (0 for one norm
        per output unit of a dense kernel).
      to: the norm afterwards, > 0.

    Source: https://flax.readthedocs.io/en/latest/guides/model_surgery.html

    >>> Normalize()(jnp.array([3.0, 4.0])).tolist()
    [0.6000000238418579, 0.800000011920929]
    """

    axis: Axis = None
    to: float = 1.0
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        _check_number("Normalize", "to", self.to)

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """The edited leaf."""
        size = jax.lax.stop_gradient(_norm(leaf, self.axis))
        unit = leaf / jnp.where(size == 0, 1, size)
        return unit if self.to == 1.0 else self.to * unit


@dataclass(frozen=True)
class ClipNorm:
    """Shrinks a leaf whose norm is too large: `leaf * min(1, max_norm / ||leaf||)`. A second time changes nothing.

    The spectral norm is that of a matrix: the last of the axes that the norm runs over numbers its columns, the others
    together its rows, as a conv kernel of [h, w, in, out] is one of [h * w * in, out]. It is estimated by power
    iteration from a start drawn once and for all, which never exceeds the norm: a leaf is never shrunk below
    `max_norm`, and what is left of the norm is at most `max_norm / (1 - d)`. Whatever the spectrum, for n columns and k
    iterations, d is on average over starts below `0.44 * ln(n) / (k - 1)` (Kuczynski & Wozniakowski 1992), 5% for n =
    1024 and the default, and far less where the largest singular value stands out. No leaf is reshaped or gathered for
    it; each iteration reads it twice.

    Args:
      max_norm: the largest norm allowed, > 0.
      axis: as for `Normalize`; for the spectral norm None or two axes and more, such as (-2, -1) for one norm per layer
        of scanned ones.
      norm: "frobenius", the root of the sum of squares, or "spectral", the largest singular value.
      iterations: of the power iteration, at least 1.

    Sources: max-norm regularisation, Srebro et al. 2005; Srivastava et al. 2014 (Dropout), section 5.1. The spectral
    norm: Yoshida & Miyato 2017 (arXiv 1705.10941).

    >>> ClipNorm(1.0)(jnp.array([0.0, 2.0])).tolist()
    [0.0, 1.0]
    >>> ClipNorm(1.0, norm="spectral")(jnp.diag(jnp.array([4.0, 2.0]))).round(3).tolist()
    [[1.0, 0.0], [0.0, 0.5]]
    """

    max_norm: float
    axis: Axis = None
    norm: Literal["frobenius", "spectral"] = "frobenius"
    iterations: int = 64
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        _check_number("ClipNorm", "max_norm", self.max_norm)
        if self.norm not in ("frobenius", "spectral"):
            raise SurgeryFunctionError(
                "ClipNorm(norm=...) is unknown.", found=quoted(self.norm), write='"frobenius" or "spectral"'
            )
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise SurgeryFunctionError(
                "ClipNorm(iterations=...) must be a positive int.", found=quoted(self.iterations), write="iterations=64"
            )

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """The edited leaf."""
        held = jax.lax.stop_gradient(leaf)
        size = _norm(held, self.axis) if self.norm == "frobenius" else _spectral(held, self.axis, self.iterations)
        # A clipped leaf has its norm only up to rounding; it must not be scaled again for that.
        slack = 1 + (8 if self.norm == "frobenius" else 32) * float(jnp.finfo(leaf.dtype).eps)
        too_large = size > self.max_norm * slack
        return jnp.where(too_large, leaf * (self.max_norm / jnp.where(too_large, size, 1)), leaf)


def _spectral(leaf: jax.Array, axis: Axis, iterations: int) -> jax.Array:
    """The largest singular value, from below, over these axes, kept as axes of length 1."""
    axes = _axes_of(leaf, tuple(range(leaf.ndim)) if axis is None else axis)
    if len(axes) < 2:
        raise SurgeryFunctionError(
            "The spectral norm is that of a matrix, over two axes or more.",
            found=f"axis {axis} for shape {list(leaf.shape)}",
            write='axis=(-2, -1), or norm="frobenius"',
        )
    rows, column = axes[:-1], axes[-1]

    def unit(vectors: jax.Array, over: tuple[int, ...]) -> jax.Array:
        size = jnp.sqrt(jnp.sum(vectors * vectors, axis=over, keepdims=True))
        return vectors / jnp.where(size == 0, 1, size)

    # Products and sums rather than contractions: layers and shards stay where they are.
    def times(right: jax.Array) -> jax.Array:
        return jnp.sum(leaf * right, axis=column, keepdims=True)

    def step(_: Any, right: jax.Array) -> jax.Array:
        return unit(jnp.sum(leaf * unit(times(right), rows), axis=rows, keepdims=True), (column,))

    start = jax.random.normal(
        jax.random.key(0, impl="threefry2x32"),
        [size if at == column else 1 for at, size in enumerate(leaf.shape)],
        leaf.dtype,
    )
    batch = [1 if at in axes else size for at, size in enumerate(leaf.shape)]
    start = jnp.broadcast_to(unit(start, (column,)), np.broadcast_shapes(start.shape, tuple(batch)))
    left = times(jax.lax.fori_loop(0, iterations, step, start))
    return jnp.sqrt(jnp.sum(left * left, axis=rows, keepdims=True))


def _norm(leaf: jax.Array, axis: Axis) -> jax.Array:
    """The 2-norm over these axes, kept as axes of length 1."""
    if axis is None:
        return jnp.linalg.norm(leaf.reshape(-1) if leaf.ndim != 2 else leaf)
    return jnp.sqrt(jnp.sum(leaf * leaf, axis=_axes_of(leaf, axis), keepdims=True))


def _axes_of(leaf: jax.Array, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a norm, none negative."""
    axes = (axis,) if isinstance(axis, int) else axis
    if any(not -leaf.ndim <= one < leaf.ndim for one in axes):
        raise SurgeryFunctionError(
            "The axis of a norm is not an axis of the leaf.",
            found=f"axis {axis} for shape {list(leaf.shape)}",
            write=f"axis between {-leaf.ndim} and {leaf.ndim - 1}, or None",
        )
    return tuple(one % leaf.ndim for one in axes)


def _check_number(surgery: str, field: str, value: Any, positive: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise SurgeryFunctionError(f"{surgery}({field}=...) must be a finite number.", found=quoted(value))
    if positive and value <= 0:
        raise SurgeryFunctionError(
            f"{surgery}({field}=...) must be positive.", found=quoted(value), write=f"{field}=1.0"
        )
