"""Edits that move no element: each new element comes from the old one at its own place, times a coefficient.

That is most edits (scale, normalise, clip, prune), and their slots need no gathering. It is proved on the jaxpr of the
derivative, by a list of primitives that keep elements where they are; whatever is not on it counts as moving.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

Tree = dict[str, jax.Array]

_ALONE = ("neg", "copy", "copy_p", "convert_element_type")
_SUMS = ("add", "sub", "add_any")
_CONSTANTS = frozenset(
    (
        *("abs", "add", "and", "convert_element_type", "div", "eq", "exp", "expm1", "floor", "ge", "gt", "integer_pow"),
        *("is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
        *("rsqrt", "select_n", "sign", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor"),
    )
)
"""Elementwise primitives that are computed before their operands are broadcast."""
_MOVED = "<moved>"
"""Stands for the path of the source of a value that may not lie where its source does."""


@dataclass(frozen=True)
class _Value:
    """An array that is computed only if it is asked for, and broadcast only when it has to be.

    Attributes:
      thin: makes it, with axes of length 1 where it does not vary, or of no axes; of a tangent, its coefficient.
      shape: its shape once broadcast.
      source: of a tangent, the path of the leaf whose elements lie at the same places; None for a constant.
      inverse: of a tangent, makes 1 / coefficient; anything where that is 0.
    """

    thin: Callable[[], Any]
    shape: tuple[int, ...]
    source: str | None = None
    inverse: Callable[[], Any] = lambda: None

    def whole(self) -> Any:
        array = self.thin()
        return array if jnp.shape(array) == self.shape else jnp.broadcast_to(array, self.shape)


class Diagonal(NamedTuple):
    """The derivative of an edit that moves no element.

    Attributes:
      coefficient: path -> coefficients, with axes of length 1 along which they do not vary: a scale has one for the
        whole leaf.
      inverse: 1 / coefficient, 0 where that is 0. It is followed through the edit by itself: a mask then has no
        quotients, which XLA would store rather than take twice.
    """

    coefficient: Tree
    inverse: Tree


def coefficients(push_at: Callable[[Tree, Tree], Tree], old: Tree) -> Diagonal | None:
    """The diagonal of an edit's derivative, or None if the derivative may have entries beside it.

    Args:
      push_at: (old, v) -> J v at old.
      old: path -> old leaf.
    """
    jaxpr, out = jax.make_jaxpr(push_at, return_shape=True)(old, old)
    if set(out) != set(old):
        return None
    paths = sorted(old)  # as JAX sorts them
    values = [_given(old[path]) for path in paths]
    ones = {path: functools.cache(functools.partial(_one, old[path])) for path in paths}
    tangents = [_Value(ones[path], old[path].shape, path, ones[path]) for path in paths]
    results = dict(zip(paths, _evaluate(jaxpr.jaxpr, jaxpr.consts, [*values, *tangents]), strict=True))
    if any(value.source != path or value.shape != old[path].shape for path, value in results.items()):
        return None
    coefficient = {path: results[path].thin() for path in old}
    inverse = {path: jnp.where(coefficient[path] == 0, 0, results[path].inverse()) for path in old}
    return Diagonal(coefficient, inverse)


def _one(leaf: jax.Array) -> jax.Array:
    """A 1 that XLA cannot fold, as `lineage.ones_like`."""
    return lax.optimization_barrier(jnp.ones((1,) * leaf.ndim, leaf.dtype))


def _given(array: Any) -> _Value:
    return _Value(lambda: array, jnp.shape(array))


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[_Value]) -> list[_Value]:
    known = dict(zip(jaxpr.constvars, map(_given, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> _Value:
        return _given(jnp.asarray(atom.val)) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _equation(jaxpr, eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(jaxpr: Any, eqn: Any, operands: list[_Value]) -> list[_Value]:
    if eqn.primitive.name in ("jit", "pjit"):
        inner = eqn.params["jaxpr"]
        return _evaluate(inner.jaxpr, inner.consts, operands)
    sources = {operand.source for operand in operands} - {None}
    shapes = [tuple(getattr(out.aval, "shape", ())) for out in eqn.outvars]
    if not sources:
        return _constant(jaxpr, eqn, operands, shapes)
    kept = all(operand.shape == shapes[0] for operand in operands if operand.source is not None)
    if len(sources) == 1 and kept and _stays(eqn.primitive.name, operands):
        coefficient = functools.cache(lambda: _bind(eqn, operands))
        inverse = functools.cache(lambda: _invert(eqn, operands, coefficient))
        return [_Value(coefficient, shapes[0], sources.pop(), inverse)]
    return [_Value(lambda: None, shape, _MOVED) for shape in shapes]


def _stays(name: str, operands: Sequence[_Value]) -> bool:
    """Whether a primitive that is linear in the marked operands leaves their elements where they are."""
    marked = [operand.source is not None for operand in operands]
    if any(operand.source == _MOVED for operand in operands):
        return False
    if name == "mul":
        return sum(marked) == 1
    if name == "div":
        return marked == [True, False]
    if name == "select_n":
        return not marked[0]
    return name in _ALONE or (name in _SUMS and all(marked))


def _invert(eqn: Any, operands: Sequence[_Value], coefficient: Callable[[], Any]) -> Any:
    """1 / coefficient after a primitive, from what it was before; anything where the coefficient is 0."""
    inverted = [o if o.source is None else dataclasses.replace(o, thin=o.inverse) for o in operands]
    name = eqn.primitive.name
    if name in ("mul", "div"):
        tangent, factor = sorted(inverted, key=lambda operand: operand.source is None)
        rank = len(tangent.shape)
        above, below = _aligned(tangent.thin(), rank), _aligned(factor.thin(), rank)
        return above * below if name == "div" else above / jnp.where(below == 0, 1, below)
    if name in _SUMS:
        return 1 / jnp.where(coefficient() == 0, 1, coefficient())
    return _bind(eqn, inverted)


def _constant(jaxpr: Any, eqn: Any, operands: Sequence[_Value], shapes: Sequence[tuple[int, ...]]) -> list[_Value]:
    if eqn.primitive.name in _CONSTANTS:
        return [_Value(functools.cache(lambda: _bind(eqn, operands)), shapes[0])]
    if eqn.primitive.name == "broadcast_in_dim" and len(operands) == 1:
        return [_Value(functools.cache(lambda: _placed(eqn, operands[0], len(shapes[0]))), shapes[0])]
    outputs = functools.cache(lambda: run_equation(jaxpr, eqn, [operand.whole() for operand in operands]))
    return [_Value(functools.partial(_nth, outputs, i), shape) for i, shape in enumerate(shapes)]


def _nth(outputs: Callable[[], Sequence[Any]], i: int) -> Any:
    return outputs()[i]


def _placed(eqn: Any, operand: _Value, rank: int) -> jax.Array:
    """The operand with its axes where `broadcast_in_dim` puts them, and no further broadcast."""
    array, shape = operand.thin(), [1] * rank
    for axis, size in zip(eqn.params["broadcast_dimensions"], _aligned(array, len(operand.shape)).shape, strict=True):
        shape[axis] = size
    return jnp.reshape(array, shape)


def _aligned(array: Any, rank: int) -> jax.Array:
    return array if jnp.ndim(array) == rank else jnp.reshape(array, (1,) * rank)


def _bind(eqn: Any, operands: Sequence[_Value]) -> Any:
    """The primitive on operands that are broadcast against one another and no further."""
    rank = max(len(operand.shape) for operand in operands)
    arrays = [
        _aligned(operand.thin(), rank).astype(atom.aval.dtype)  # literals are Python numbers
        for operand, atom in zip(operands, eqn.invars, strict=True)
    ]
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    return eqn.primitive.bind(*(jnp.broadcast_to(array, shape) for array in arrays), **eqn.params)


def run_equation(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation as a jaxpr of its own, the public way to do so."""
    inputs = [core.Var(atom.aval) if isinstance(atom, core.Literal) else atom for atom in eqn.invars]
    unique = list(dict.fromkeys(inputs))
    alone = jaxpr.replace(
        constvars=(), invars=unique, outvars=eqn.outvars, eqns=[eqn.replace(invars=inputs)], effects=eqn.effects
    )
    by_input = dict(zip(inputs, values, strict=True))
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*(by_input[atom] for atom in unique))
