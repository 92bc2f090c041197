"""Surgeries on the size of weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

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

    Args:
      max_norm: the largest norm allowed, > 0.
      axis: as for `Normalize`.

    Source: max-norm regularisation, Srebro et al. 2005; Srivastava et al. 2014 (Dropout), section 5.1.

    >>> ClipNorm(1.0)(jnp.array([0.0, 2.0])).tolist()
    [0.0, 1.0]
    """

    max_norm: float
    axis: Axis = None
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        _check_number("ClipNorm", "max_norm", self.max_norm)

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """The edited leaf."""
        size = jax.lax.stop_gradient(_norm(leaf, self.axis))
        # A clipped leaf has its norm only up to rounding; it must not be scaled again for that.
        slack = 1 + 8 * float(jnp.finfo(leaf.dtype).eps)
        too_large = size > self.max_norm * slack
        return jnp.where(too_large, leaf * (self.max_norm / jnp.where(too_large, size, 1)), leaf)


def _norm(leaf: jax.Array, axis: Axis) -> jax.Array:
    """The 2-norm over these axes, kept as axes of length 1."""
    if axis is None:
        return jnp.linalg.norm(leaf.reshape(-1) if leaf.ndim != 2 else leaf)
    axes = (axis,) if isinstance(axis, int) else axis
    if any(not -leaf.ndim <= one < leaf.ndim for one in axes):
        raise SurgeryFunctionError(
            "The axis of a norm is not an axis of the leaf.",
            found=f"axis {axis} for shape {list(leaf.shape)}",
            write=f"axis between {-leaf.ndim} and {leaf.ndim - 1}, or None",
        )
    return jnp.sqrt(jnp.sum(leaf * leaf, axis=axes, keepdims=True))


def _check_number(surgery: str, field: str, value: Any, positive: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise SurgeryFunctionError(f"{surgery}({field}=...) must be a finite number.", found=quoted(value))
    if positive and value <= 0:
        raise SurgeryFunctionError(
            f"{surgery}({field}=...) must be positive.", found=quoted(value), write=f"{field}=1.0"
        )
