"""Which old element each new element of an edit comes from, and with what coefficient: read off by differentiation.

For an edit `f` with derivative J at the old values, a new element has a *lineage* if its row of J has exactly one
entry: that old element is its source and the entry is its coefficient. A row without entries is a *fresh* element (a
new draw, a zero, anything under `stop_gradient`). A row with several entries *mixes*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from flax_surgery_hooks.diagonal import Diagonal, coefficients, run_equation
from flax_surgery_hooks.diagonal import Tree as Tree
from flax_surgery_hooks.errors import DifferentiationError, shorten


@dataclass(frozen=True)
class TracedEdit:
    """An edit as a jaxpr from the dict of old leaves to the dict of new ones, floats only."""

    jaxpr: core.ClosedJaxpr
    old: Tree
    out_paths: tuple[str, ...]

    def __call__(self, old: Tree) -> Tree:
        """Evaluates the edit, giving the whole derivative of `max` and `min` at ties to the edited operand.

        JAX splits it in halves there. After a clip every clipped weight is such a tie, and the factors of its slots
        would double at each further fire.
        """
        values = [old[path] for path in sorted(self.old)]  # JAX sorts the keys of a dict
        out = _evaluate(self.jaxpr.jaxpr, self.jaxpr.consts, values, [True] * len(values))
        return dict(zip(self.out_paths, (value for value, _ in out), strict=True))

    def depends(self) -> dict[str, bool]:
        """Whether each new leaf is computed from old ones, other than under `stop_gradient`."""
        return dict(zip(self.out_paths, _dependence(self.jaxpr, len(self.old)), strict=True))


def trace(function: Callable[[Tree], Tree], old: Tree) -> TracedEdit:
    """Traces an edit at these leaves (arrays of a float dtype, path -> leaf)."""
    jaxpr, out_shape = jax.make_jaxpr(function, return_shape=True)(old)
    return TracedEdit(jaxpr, old, tuple(out_shape))


@dataclass(frozen=True)
class Lineage:
    """The derivative of an edit at the values that are edited.

    Attributes:
      old: path -> old leaf.
      new: path -> new leaf.
      push: v -> J v.
      coefficient: J 1, per new element.
      chunk_bits: how many bits of a number survive a push exactly.
      diagonal: where no element moves, J's diagonal; else None.
    """

    old: Tree
    new: Tree
    push: Callable[[Tree], Tree]
    coefficient: Tree
    chunk_bits: int
    diagonal: Diagonal | None = None

    def gather(self, slots: Tree, paths: Sequence[str]) -> Tree:
        """The bits of each new element's source, 0 where it has none.

        A slot is moved as small integers, `round(J c / J)`, so that no coefficient, however odd, costs a bit of it.

        Args:
          slots: path -> slot, shaped like the old leaf of that path; all of one dtype, whichever.
          paths: the new leaves that get such a slot.
        """
        if self.diagonal is not None and all(path in slots for path in paths):
            fresh = {path: self.diagonal.coefficient[path] == 0 for path in paths}
            return {path: jnp.where(fresh[path], 0, slots[path]).astype(slots[path].dtype) for path in paths}
        dtype = next((slot.dtype for slot in slots.values()), jnp.dtype(jnp.float32))
        bits = {path: _to_bits(slot) for path, slot in slots.items()}
        unsigned = next((each.dtype for each in bits.values()), jnp.dtype(jnp.uint32))
        moved = {path: jnp.zeros(self.coefficient[path].shape, unsigned) for path in paths}
        for shift in range(0, unsigned.itemsize * 8 if slots else 0, self.chunk_bits):
            arrived = self._push_chunks({path: _chunk(bits[path], shift, self.chunk_bits) for path in slots}, paths)
            for path in paths:
                moved[path] |= arrived[path].astype(unsigned) << jnp.asarray(shift, unsigned)
        return {path: _from_bits(moved[path], dtype) for path in paths}

    def _push_chunks(self, chunks: Tree, paths: Sequence[str]) -> Tree:
        scale = float(2**self.chunk_bits)
        tangents = {}
        for path, leaf in self.old.items():
            chunk = chunks.get(path)
            tangents[path] = jnp.zeros_like(leaf) if chunk is None else chunk.astype(leaf.dtype) / scale
        pushed = self.push(tangents)
        return {path: jnp.round(safe_divide(pushed[path], self.coefficient[path]) * scale) for path in paths}


def linearize(edit: TracedEdit, name: str = "the edit") -> Lineage:
    """Differentiates a traced edit at the leaves it was traced with.

    Raises:
      DifferentiationError: part of the edit has no forward derivative.
    """
    with jax.default_matmul_precision("highest"):
        # Values apart from the derivative: sharing a quotient with it, XLA rounds `leaf / norm` otherwise than alone.
        new = edit(edit.old)
        held, bits = lax.optimization_barrier(edit.old), chunk_bits(edit.jaxpr.jaxpr)
        try:
            _, push = jax.linearize(edit, held)
        except Exception as error:  # the edit itself was traced before: only its derivative can fail here
            raise not_differentiable(name, error) from error
        diagonal = coefficients(lambda old, v: jax.linearize(edit, old)[1](v), held)
        if diagonal is None:
            return Lineage(edit.old, new, push, push(ones_like(edit.old)), bits)
        return _diagonal_lineage(edit.old, new, diagonal, bits)


def _diagonal_lineage(old: Tree, new: Tree, diagonal: Diagonal, bits: int) -> Lineage:
    thin = diagonal.coefficient

    def push(tangents: Tree) -> Tree:
        return {path: thin[path] * tangents[path] for path in thin}

    return Lineage(
        old, new, push, {p: jnp.broadcast_to(thin[p], leaf.shape) for p, leaf in old.items()}, bits, diagonal
    )


def not_differentiable(name: str, error: Exception) -> DifferentiationError:
    """The typed error for an edit without a derivative."""
    return DifferentiationError(
        f"{name} cannot be differentiated: {shorten(error, 200)}",
        write="opt_state='keep' or 'reset', which need no derivative, or `jax.lax.stop_gradient` around that part",
    )


def ones_like(tree: Tree) -> Tree:
    """Ones that XLA cannot fold: a literal 1 would let it evaluate whole gathers at compile time, for minutes."""

    def ones(leaf: jax.Array) -> jax.Array:
        return jnp.broadcast_to(lax.optimization_barrier(jnp.ones((), leaf.dtype)), leaf.shape)

    return {path: ones(leaf) for path, leaf in tree.items()}


def differentiable(lineage: Lineage) -> dict[str, bool]:
    """Whether the derivative of each new leaf has any entry but structural zeros (rounding has none, a mask has)."""
    jaxpr, out = jax.make_jaxpr(lineage.push, return_shape=True)(lineage.old)
    return dict(zip(out, _dependence(jaxpr, len(lineage.old)), strict=True))


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """`numerator / denominator`, 0 where the denominator is 0."""
    absent = denominator == 0
    return jnp.where(absent, 0, numerator / jnp.where(absent, 1, denominator))


def transpose(lineage: Lineage, name: str) -> Callable[[Tree], Tree]:
    """w -> J^T w.

    Raises:
      DifferentiationError: part of the edit has no transpose rule.
    """
    transposed = jax.linear_transpose(lineage.push, lineage.old)

    def pull(cotangents: Tree) -> Tree:
        try:
            return transposed(cotangents)[0]
        except Exception as error:
            raise not_differentiable(name, error) from error

    return pull


def gradient_share(lineage: Lineage, name: str) -> Tree:
    """b: the factor by which the gradient of a new element is its source's, if the model computes the same as before.

    Per old element, D sums the squared coefficients of its copies; `b = J / D`, 0 for fresh elements. It broadcasts
    against the leaf.
    """
    if lineage.diagonal is not None:  # no copies: D is J^2
        return lineage.diagonal.inverse
    squares = transpose(lineage, name)(lineage.coefficient)
    inverse = {path: safe_divide(jnp.ones_like(square), square) for path, square in squares.items()}
    return lineage.push(inverse)


def chunk_bits(jaxpr: Any) -> int:
    """How many bits of an integer survive the arithmetic of an edit: a power of two below its shortest mantissa."""
    mantissa = min((jnp.finfo(dtype).nmant for dtype in _float_dtypes(jaxpr)), default=23)
    return max(bits for bits in (1, 2, 4, 8, 16, 32) if bits <= max(mantissa - 4, 1))


def _float_dtypes(jaxpr: Any) -> Iterator[Any]:
    for variable in [*jaxpr.invars, *(out for eqn in jaxpr.eqns for out in eqn.outvars)]:
        dtype = getattr(variable.aval, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            yield dtype
    for value in (value for eqn in jaxpr.eqns for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)):
        if _is_jaxpr(value):
            yield from _float_dtypes(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _to_bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{array.dtype.itemsize * 8}"))


def _from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    return bits.astype(dtype) if dtype == jnp.bool_ else lax.bitcast_convert_type(bits, dtype)


def _chunk(bits: jax.Array, shift: int, count: int) -> jax.Array:
    mask = jnp.asarray((1 << min(count, bits.dtype.itemsize * 8)) - 1, bits.dtype)
    return (bits >> jnp.asarray(shift, bits.dtype)) & mask


# Evaluation of a jaxpr, with what of it depends on the edited leaves.

Value = tuple[Any, bool]


def _dependence(closed: Any, count: int) -> list[bool]:
    marks: list[bool] = []

    def note(*args: Any) -> None:
        marks.extend(marked for _, marked in _evaluate(closed.jaxpr, closed.consts, list(args), [True] * count))

    jax.eval_shape(note, *closed.in_avals)
    return marks


def _evaluate(jaxpr: Any, consts: Any, args: list[Any], depends: list[bool]) -> list[Value]:
    """Values of a jaxpr's outputs, each with whether it depends on the arguments marked in `depends`."""
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, ((const, False) for const in consts), strict=True))
    known.update(zip(jaxpr.invars, zip(args, depends, strict=True), strict=True))

    def read(atom: Any) -> Value:
        return (atom.val, False) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        values = _evaluate_equation(jaxpr, eqn, [read(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, values, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(jaxpr: Any, eqn: Any, operands: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    values, depends = [value for value, _ in operands], [marked for _, marked in operands]
    if name in ("max", "min") and sum(depends) == 1:
        return [(_one_sided(name, values, edited=depends.index(True)), True)]
    if name in ("jit", "pjit"):
        inner = eqn.params["jaxpr"]
        return _evaluate(inner.jaxpr, inner.consts, values, depends)
    marked = any(depends) and name != "stop_gradient"
    return [(value, marked) for value in run_equation(jaxpr, eqn, values)]


def _one_sided(name: str, operands: list[Any], edited: int) -> jax.Array:
    """`max` or `min`, whose derivative at ties belongs to the edited operand alone."""
    mine, other = jnp.broadcast_arrays(operands[edited], operands[1 - edited])
    beaten = other > mine if name == "max" else other < mine
    return jnp.where(beaten | (other != other), other, mine)
