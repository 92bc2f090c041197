"""What an edit may contain: tests for mixing, unequal copies, lost history, and for a `fold_back` that is none.

Each is a few pushes through the edit's derivative, with numbers chosen so that the answer is exact in floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import (
    FoldBackError,
    LostHistoryError,
    MixingError,
    UnequalCopiesError,
    shorten,
)
from flax_surgery_hooks.lineage import Lineage, Tree, safe_divide, transpose
from flax_surgery_hooks.paths import listed

DRAWS = 4


class Findings(NamedTuple):
    """What was found per new leaf, path -> scalar; the counts are of elements.

    Attributes:
      mixed: elements that combine several old ones.
      unequal: elements whose source's copies have coefficients of different size.
      unfolded: largest relative error with which `fold_back` undoes the edit (0 without one).
      unmoved: value of `fold_back` at zero (0 for a linear map, and without one).
    """

    mixed: Tree
    unequal: Tree
    unfolded: Tree
    unmoved: Tree


def find(lineage: Lineage, *, transports: bool, fold_back: Callable[[Tree], Tree] | None, name: str) -> Findings:
    """Examines an edit at the values it was differentiated at; can be jitted.

    Args:
      lineage: the edit's derivative.
      transports: whether slots follow by the chain rule; then copies must share equally, or fold back.
      fold_back: the surgery's linear map from new leaves to old ones, or None.
      name: the surgery, for errors.
    """
    nothing = {path: jnp.zeros(()) for path in lineage.new}
    if fold_back is not None and transports:
        unfolded, unmoved = _folding(lineage, fold_back)
        return Findings(nothing, nothing, unfolded, unmoved)
    mixed = _mixed(lineage)
    unequal = _unequal(lineage, name) if transports else nothing
    return Findings(mixed, unequal, nothing, nothing)


def _mixed(lineage: Lineage) -> Tree:
    """Number of elements per new leaf that combine several old ones.

    Give every old element a random power of two r. An element with one source gives `J r / J = r` and `J r^2 / J = r^2`
    up to rounding, whatever J is; a mix gives a weighted mean of r and of r^2, and the second is the square of the
    first only if all sources drew the same r. (Signs would miss half of the mixes of two.)
    """

    def draw(salt: jax.Array, found: Tree) -> Tree:
        shown = _differs(lineage, salt.astype(jnp.uint32))
        return {path: flags | shown[path] for path, flags in found.items()}

    nothing = {path: jnp.zeros(leaf.shape, bool) for path, leaf in lineage.new.items()}
    return {path: jnp.sum(flags) for path, flags in jax.lax.fori_loop(1, DRAWS + 1, draw, nothing).items()}


def _differs(lineage: Lineage, salt: jax.Array) -> Tree:
    """Per new element, whether one draw of powers of two shows that it mixes."""
    powers = {path: _powers(leaf, salt + jnp.uint32(97 * i)) for i, (path, leaf) in enumerate(lineage.old.items())}
    first = lineage.push(powers)
    second = lineage.push({path: power * power for path, power in powers.items()})
    found = {}
    for path, coefficient in lineage.coefficient.items():
        mean = safe_divide(first[path], coefficient)
        square = mean * mean
        # Within rounding: XLA may divide by way of a reciprocal, after which `J r / J` is not quite r.
        rounding = 64 * jnp.finfo(square.dtype).eps * square
        differs = ~(jnp.abs(safe_divide(second[path], coefficient) - square) <= rounding)
        cancelled = (coefficient == 0) & (first[path] != 0)
        # What is not finite is for the guard to judge.
        found[path] = (differs | cancelled) & jnp.isfinite(second[path])
    return found


def _powers(leaf: jax.Array, salt: jax.Array) -> jax.Array:
    """2^e per element, e in 0..15 by a hash of its index: a few integer operations; a PRNG compiles for seconds."""
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    mixed = (index + jnp.uint32(1)) * jnp.uint32(2_654_435_761) ^ salt * jnp.uint32(2_246_822_519)
    mixed = (mixed ^ mixed >> jnp.uint32(15)) * jnp.uint32(3_266_489_917)
    exponent = (mixed ^ mixed >> jnp.uint32(13)) & jnp.uint32(15)
    return (jnp.uint32(1) << exponent).astype(leaf.dtype)


def _unequal(lineage: Lineage, name: str) -> Tree:
    """Number of elements whose source's copies differ in size: with n copies, all J^2 equal their mean D / n."""
    pull = transpose(lineage, name)
    squares = pull(lineage.coefficient)
    copies = pull({path: safe_divide(jnp.ones_like(c), c) for path, c in lineage.coefficient.items()})
    mean = {path: safe_divide(squares[path], copies[path]) for path in squares}
    expected = lineage.push(mean)  # J D / n, which is J^3 for equal copies
    counts = {}
    for path, coefficient in lineage.coefficient.items():
        ratio = safe_divide(safe_divide(expected[path], coefficient), coefficient)
        off = jnp.abs(ratio - coefficient) > 1e-4 * jnp.abs(coefficient)
        counts[path] = jnp.sum(off & (coefficient != 0))
    return counts


def _folding(lineage: Lineage, fold_back: Callable[[Tree], Tree]) -> tuple[Tree, Tree]:
    """Errors of `J B J v = J v` for a random v, and of `B 0 = 0`."""
    keys = jax.random.split(jax.random.key(7), len(lineage.old))
    direction = {
        path: jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, (path, leaf) in zip(keys, lineage.old.items(), strict=True)
    }
    there = lineage.push(direction)
    again = lineage.push(fold_back(there))
    zero = fold_back({path: jnp.zeros_like(leaf) for path, leaf in lineage.new.items()})
    size = {path: jnp.maximum(jnp.max(jnp.abs(there[path]), initial=0.0), 1e-30) for path in there}
    unfolded = {path: jnp.max(jnp.abs(again[path] - there[path]), initial=0.0) / size[path] for path in there}
    return unfolded, {path: jnp.max(jnp.abs(zero[path]), initial=0.0) for path in zero}


def judge(
    findings: Findings,
    *,
    depends: dict[str, bool],
    differentiable: dict[str, bool],
    same_shape: bool,
    one_leaf: bool,
    transports: bool,
    name: str,
) -> bool:
    """Raises on what the rules cannot follow; returns whether the slots must stay in place because the edit mixes.

    Args:
      findings: concrete findings.
      depends: per new leaf, whether it is computed from old ones.
      differentiable: per new leaf, whether its derivative has entries at all.
      same_shape: whether every leaf keeps its shape.
      one_leaf: whether the edit saw one leaf at a time.
      transports: whether slots follow by the chain rule.
      name: the surgery.

    Raises:
      LostHistoryError, MixingError, UnequalCopiesError, FoldBackError: as their names say.
    """
    lost = [path for path in depends if depends[path] and not differentiable[path]]
    if lost:
        raise LostHistoryError(
            f"The surgery {name} computes the new leaf from the old one, but its derivative is zero everywhere "
            "(rounding, a sign, a comparison or a cast), so that slots would lose their whole history.",
            path=listed(lost),
            write="opt_state='keep' or 'reset', or `jax.lax.stop_gradient(leaf)` if a fresh start is meant",
        )
    _judge_folding(findings, name)
    mixed = {path: int(count) for path, count in findings.mixed.items() if count > 0}
    if mixed and (transports or not (one_leaf and same_shape)):
        raise MixingError(
            f"The surgery {name} computes new elements from several old ones, so that no optimizer slot can follow "
            "them by lineage.",
            found=f"{sum(mixed.values())} such elements",
            path=listed(mixed),
            write="`jax.lax.stop_gradient` around a statistic meant as a constant "
            "(kernel / stop_gradient(norm(kernel))), a `fold_back`, or opt_state='keep', 'reset' or a function"
            + (", or opt_state='carry', which leaves the slots in place" if one_leaf and same_shape else ""),
        )
    unequal = {path: int(count) for path, count in findings.unequal.items() if count > 0}
    if unequal:
        raise UnequalCopiesError(
            f"The surgery {name} copies elements with coefficients of different size; how their gradients are shared "
            "is known to the model alone.",
            found=f"{sum(unequal.values())} such elements",
            path=listed(unequal),
            write="a surgery class with `fold_back(self, new_leaves) -> old leaves`, or opt_state='carry'",
        )
    return bool(mixed)


def _judge_folding(findings: Findings, name: str) -> None:
    moved = {path: float(value) for path, value in findings.unmoved.items() if value != 0}
    if moved:
        raise FoldBackError(
            f"The fold_back of {name} is not linear: it does not map zeros to zeros.",
            path=listed(moved),
            found=f"values up to {max(moved.values()):.3g}",
            write="sums, slices and products with constants only",
        )
    off = {path: float(value) for path, value in findings.unfolded.items() if not value < 1e-3}
    if off:
        raise FoldBackError(
            f"The fold_back of {name} does not undo the edit: folding an edited change back and editing it again gives "
            "another change.",
            path=listed(off),
            found=f"a relative error of {max(off.values()):.3g}",
            write="a fold_back B with J B J = J for the edit's derivative J",
        )


def not_linear(name: str, error: Exception) -> FoldBackError:
    """The typed error for a `fold_back` that cannot be transposed."""
    return FoldBackError(
        f"The fold_back of {name} is not linear: {type(error).__name__} {shorten(error, 200)}",
        write="sums, slices and products with constants only",
    )


def check_fold_shapes(name: str, old: Tree, folded: Any) -> None:
    """Raises if `fold_back` does not return leaves shaped like the old ones.

    Raises:
      FoldBackError: it does not.
    """
    for path, leaf in old.items():
        if folded[path].shape != leaf.shape:
            raise FoldBackError(
                f"The fold_back of {name} must return a leaf shaped like the old one.",
                path=path,
                found=list(folded[path].shape),
                write=f"an array of shape {list(leaf.shape)}",
            )


def concrete(tree: Any) -> bool:
    """Whether every array of a tree has values now (is neither traced nor abstract)."""
    return not any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
