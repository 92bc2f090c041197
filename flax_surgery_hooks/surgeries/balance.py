"""Balance: two kernels around units whose scale the model does not see, brought to equal norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted
from flax_surgery_hooks.surgeries.pairing import grouped, whole

Arrays = Mapping[str, jax.Array]
Axes = int | tuple[int, ...]


@dataclass(frozen=True)
class Balance:
    """Gives each hidden unit incoming and outgoing weights of equal norm, while the model computes the same:

        c = sqrt(||W_out|| / ||W_in||)        W_in *= c, b_in *= c        W_out /= c

    with the norms of the unit's weights; its bias moves with the incoming ones and counts for no norm. Optimizer slots
    are transported, exactly. A unit with a norm of zero on either side stays as it is, and a second time changes
    nothing.

    It is right for units of which the model computes a positively homogeneous function: ReLU and LeakyReLU units (also
    behind a pooling), the values of an attention (`Balance("value", "out", (-2, -1), (-3, -2))`), `up` and `down` of a
    gated MLP (not its gate). It is wrong for GELU, SiLU or tanh units, for units that feed a norm, and where another
    module reads the units too: there it changes what the model computes, and nothing tells.

    Select the leaves of both modules: the kernels, and the bias of the incoming one. The others of the outgoing module
    (its bias is not of these units) stay as they are.

    Args:
      incoming: name of the module that makes the units, in the paths.
      outgoing: name of the module that reads them, of the same parent.
      incoming_axes: the axes of the incoming kernel that number the units, -1 for dense and conv kernels; of scanned
        layers with theirs, (0, -1).
      outgoing_axes: those of the outgoing kernel, in the same order; -2 and (0, -2).
      powers_of_two: whether c is rounded to one. Outputs and slots then keep their bits (short of underflow), and the
        norms are equal up to a factor of 2.

    Source: path-SGD, Neyshabur et al. 2015 (arXiv 1506.02617), section 2, on rescaling; equi-normalisation, Stock et
    al. 2019 (arXiv 1902.10416).

    >>> balanced = Balance("up", "down")({"up/kernel": jnp.array([[4.0]]), "down/kernel": jnp.array([[1.0]])})
    >>> {path: leaf.item() for path, leaf in balanced.items()}
    {'up/kernel': 2.0, 'down/kernel': 2.0}
    """

    incoming: str
    outgoing: str
    incoming_axes: Axes = -1
    outgoing_axes: Axes = -2
    powers_of_two: bool = False
    preserves: ClassVar[str] = "function"

    def __post_init__(self):
        if not self.incoming or not self.outgoing or self.incoming == self.outgoing:
            raise SurgeryFunctionError(
                "Balance works between two modules.",
                found=f"{quoted(self.incoming)} and {quoted(self.outgoing)}",
                write='Balance("up", "down")',
            )

    def __call__(self, leaves: Arrays) -> dict[str, jax.Array]:
        """The edited leaves."""
        edited = dict(leaves)
        names = (self.incoming, self.outgoing)
        for group, found in grouped("Balance", leaves, names).items():
            whole("Balance", group, found, names)
            paths = [_kernel(name, group, found[name]) for name in names]
            sizes = [
                _norms(path, leaves[path], axes)
                for path, axes in zip(paths, (self.incoming_axes, self.outgoing_axes), strict=True)
            ]
            if sizes[0].shape != sizes[1].shape:
                raise SurgeryFunctionError(
                    "The two kernels of Balance have not the same units.",
                    path=group or None,
                    found=f"units {list(sizes[0].shape)} of {paths[0]}, {list(sizes[1].shape)} of {paths[1]}",
                    write="incoming_axes= and outgoing_axes= that number the same units",
                )
            factor = self._factor(*sizes)
            edited[paths[0]] = leaves[paths[0]] * _along(factor, leaves[paths[0]], self.incoming_axes)
            edited[paths[1]] = leaves[paths[1]] / _along(factor, leaves[paths[1]], self.outgoing_axes)
            for rest, path in found[self.incoming].items():
                if rest != "kernel":
                    edited[path] = _moved(path, leaves[path], factor)
        return edited

    def _factor(self, incoming: jax.Array, outgoing: jax.Array) -> jax.Array:
        """c of each unit."""
        both = (incoming > 0) & (outgoing > 0) & jnp.isfinite(incoming) & jnp.isfinite(outgoing)
        factor = jnp.sqrt(jnp.where(both, outgoing, 1)) / jnp.sqrt(jnp.where(both, incoming, 1))
        if self.powers_of_two:
            return jnp.ldexp(jnp.ones_like(factor), jnp.round(jnp.log2(factor)).astype(jnp.int32))
        # Balanced norms are equal up to rounding only; they must not be balanced again for that.
        off = jnp.abs(factor - 1) > 8 * float(jnp.finfo(factor.dtype).eps)
        return jnp.where(off, factor, 1)


def _kernel(name: str, group: str, found: Mapping[str, str]) -> str:
    if "kernel" not in found:
        raise SurgeryFunctionError(
            f"Balance needs the kernel of {quoted(name)}.",
            path=group or None,
            found=", ".join(found.values()),
            write=f'params="**/{name}/*"',
        )
    return found["kernel"]


def _norms(path: str, kernel: jax.Array, axes: Axes) -> jax.Array:
    """The norm of each unit's weights, shaped like the units. A constant to the slots."""
    units = _axes_of(path, kernel, axes)
    others = tuple(axis for axis in range(kernel.ndim) if axis not in units)
    squares = jnp.sum(jnp.square(jax.lax.stop_gradient(kernel)), axis=others)
    left = sorted(units)
    return jnp.sqrt(jnp.transpose(squares, [left.index(axis) for axis in units]))


def _axes_of(path: str, kernel: jax.Array, axes: Axes) -> tuple[int, ...]:
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    units = tuple(axis % kernel.ndim for axis in given if -kernel.ndim <= axis < kernel.ndim)
    if not given or len(set(units)) < len(given):
        raise SurgeryFunctionError(
            "The axes of Balance are different axes of the kernel, one or more.",
            path=path,
            found=f"{given} for shape {list(kernel.shape)}",
            write="-1 and -2 for dense and conv kernels",
        )
    return units


def _along(factor: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """The factors of units, to be multiplied with a kernel."""
    units = _axes_of("", kernel, axes)
    ordered = jnp.transpose(factor, sorted(range(len(units)), key=units.__getitem__))
    return ordered.reshape([size if axis in units else 1 for axis, size in enumerate(kernel.shape)])


def _moved(path: str, bias: jax.Array, factor: jax.Array) -> jax.Array:
    if bias.shape != factor.shape:
        raise SurgeryFunctionError(
            "A leaf beside the incoming kernel of Balance is no bias of its units.",
            path=path,
            found=f"shape {list(bias.shape)} for units {list(factor.shape)}",
            write="exclude= with this leaf if it does not feed the units",
        )
    return bias * factor
