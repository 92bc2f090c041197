"""What the slots of an optimizer hold, measured: how do they scale when gradients do?

Tiny gradient streams, one of them scaled by 4, one negated, run through the optimizer. Where a slot becomes 4 times as
large it is of order 1 in the gradient, 16 times of order 2, equal of order 0; negation tells signed from unsigned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_surgery_hooks.errors import SlotError, shorten
from flax_surgery_hooks.paths import KeyPath

STEPS = 3
SCALE = 4.0
SMALL, LARGE = 1e3, 1e6
"""Sizes of the scaled gradients and of those that dominate a global norm. Both are far above weight decay and `eps`."""


def is_pair(params_treedef: Any) -> bool:
    """Whether parameters are `optax.LookaheadParams`: gradients and slots are of the fast half."""
    node = params_treedef.node_data()
    return node is not None and node[0] is optax.LookaheadParams


class Verdict(NamedTuple):
    """What the probe says of one leaf: a kind, or None where it saw too little; and what it saw, in words."""

    kind: str | None
    seen: str


class Probed(NamedTuple):
    """Results for the leaves of an optimizer state, by their key path; those of parameters left out are missing.

    Attributes:
      verdicts: what each leaf holds.
      init: the constant that `tx.init` fills it with, or None.
    """

    verdicts: dict[KeyPath, Verdict]
    init: dict[KeyPath, float | None]


Shapes = tuple[tuple[tuple[int, ...], Any], ...]
KIND_OF = {
    (1, -1): "grad", (2, 1): "grad_sq", (1, 1): "grad_abs", (0, -1): "update", (0, 1): "invariant",
    (-1, -1): "param_diff",
}  # fmt: skip
ARGUMENTS = (("value", "grad", "value_fn"), ("value", "obj_fn"), ("obj_fn",), ())
"""Sets of arguments beside the gradients that `update` may ask for, in the order in which they are tried."""
MEASUREMENTS = tuple(
    getattr(optax, name) for name in ("MonitorState", "SnapshotState") if hasattr(optax, name)
)  # older releases lack some
"""States of what users measure while they train: arrays of any shape, whose structure `tx.init` need not know."""


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that stands for a parameter's in the probe."""
    return tuple(min(size, 2) for size in shape)


def probe(tx: Any, params_treedef: Any, shapes: Shapes, chosen: tuple[int, ...]) -> Probed:
    """Runs the optimizer on parameters of the same structure with dimensions of at most 2.

    One half of the leaves is scaled while the other dominates, then the other way round, so that a clip by the global
    norm acts alike on all streams. It runs operation by operation: to compile it once would take far longer.

    Args:
      tx: the optimizer.
      params_treedef: structure of the parameters.
      shapes: shape and dtype of each parameter.
      chosen: the parameters to run it on; holes stand for the others, unless the optimizer cannot bear holes.

    Raises:
      SlotError: the optimizer cannot be run like that.
    """
    try:
        return _probe(tx, params_treedef, shapes, chosen)
    except Exception as error:
        if len(chosen) == len(shapes):
            raise SlotError(
                f"The optimizer could not be probed: {type(error).__name__}: {shorten(error, 200)}",
                write="opt_state='keep', or an optimizer whose update(updates, state, params) runs on any shapes",
            ) from error
    return probe(tx, params_treedef, shapes, tuple(range(len(shapes))))


def _probe(tx: Any, params_treedef: Any, shapes: Shapes, chosen: tuple[int, ...]) -> Probed:
    # Not `ensure_compile_time_eval`: it folds constants even in what it lowers, which older JAX cannot do in a loop.
    with jax.core.eval_context(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        leaves = [_tiny(i, *shape) if i in set(chosen) else optax.MaskedNode() for i, shape in enumerate(shapes)]
        params = jax.tree.unflatten(params_treedef, leaves)
        scaled = [[i % 2 == half or len(chosen) == 1 for i in range(len(chosen))] for half in (0, 1)]
        factors = np.array([[_factors(each, to) for to in (1.0, SCALE, -1.0)] for each in scaled], np.float32)
        first, last = _run(tx, params, jnp.asarray(factors.reshape(6, len(chosen))))
        items = jax.tree_util.tree_flatten_with_path(without_measurements(jax.eval_shape(tx.init, params)))[0]
        originals = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params) if _is_float(leaf)]
        originals.append(np.concatenate([leaf.ravel() for leaf in originals]))  # as `optax.flatten` has them
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        elements = np.repeat(np.asarray(scaled), sizes, axis=1)
        verdicts = [_judge(a, b, originals, elements) for a, b in zip(first, last, strict=True)]
        keys = [path for path, _ in items]
        return Probed(dict(zip(keys, verdicts, strict=True)), dict(zip(keys, map(_constant, first), strict=True)))


def _tiny(place: int, shape: tuple[int, ...], dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), small(shape)) if shape else jax.random.key(0)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros(small(shape), dtype)
    values = 1.1 + np.random.default_rng(place).random(small(shape))  # never 1 or 0, which `tx.init` writes too
    return jnp.asarray(values, dtype)


def _factors(scaled: list[bool], to: float) -> list[float]:
    return [SMALL * to if one else LARGE for one in scaled]


def _run(tx: Any, params: Any, factors: jax.Array) -> tuple[Any, Any]:
    """The streams, with the first set of further arguments that the optimizer takes."""
    for arguments in ARGUMENTS[:-1]:
        with contextlib.suppress(TypeError, ValueError):
            return _streams(tx, params, arguments)(factors)
    return _streams(tx, params, ARGUMENTS[-1])(factors)


def _streams(tx: Any, params: Any, arguments: tuple[str, ...]) -> Callable[[Any], tuple[Any, Any]]:
    """A function from factors [streams, leaves] to the leaves of the initial and of the final states [streams, ...]."""
    transform = optax.with_extra_args_support(tx)
    leaves, treedef = jax.tree.flatten(params)

    def gradients(step: int, factors: jax.Array) -> Any:
        def one(place: int, leaf: Any) -> Any:
            if not _is_float(leaf):
                return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
            direction = 0.5 + np.random.default_rng((step, place)).random(leaf.shape)
            signs = np.random.default_rng(place).choice([-1.0, 1.0], leaf.shape)
            return (factors[place] * jnp.asarray(direction * signs, jnp.float32)).astype(leaf.dtype)

        tree = jax.tree.unflatten(treedef, [one(place, leaf) for place, leaf in enumerate(leaves)])
        return tree.fast if is_pair(treedef) else tree

    def moved(step: int, factors: jax.Array) -> Any:
        """The parameters after so many steps: moved by the inverse of the gradient's factor, as if the model computed
        the same.
        """

        def one(place: int, leaf: Any) -> Any:
            if not _is_float(leaf):
                return leaf
            drift = 0.01 * step * SMALL * np.random.default_rng(place).normal(size=leaf.shape)
            return (leaf + jnp.asarray(drift, jnp.float32) / factors[place]).astype(leaf.dtype)

        return jax.tree.unflatten(treedef, [one(place, leaf) for place, leaf in enumerate(leaves)])

    def objective(factors: jax.Array) -> Callable[[Any], jax.Array]:
        """A loss whose second derivatives are of order 2, for those that ask for it."""

        def loss(params: Any) -> jax.Array:
            floats = [leaf for leaf in jax.tree.leaves(params) if _is_float(leaf)]
            terms = [jnp.sum((factor * leaf) ** 2) for factor, leaf in zip(factors, floats, strict=False)]
            return jnp.sum(jnp.stack(terms))

        return loss

    def stream(factors: jax.Array) -> Any:
        state = transform.init(params)
        for step in range(STEPS):
            grads = gradients(step, factors)
            known = {
                "value": jnp.ones(()), "grad": grads, "value_fn": lambda _: jnp.ones(()),
                "obj_fn": objective(factors),
            }  # fmt: skip
            given = {name: known[name] for name in arguments}
            _, state = transform.update(grads, state, moved(step, factors), **given)
        return state

    return lambda factors: (_numbers(transform.init(params)), _numbers(jax.vmap(stream)(factors)))


def without_measurements(state: Any) -> Any:
    """An optimizer state with None in place of what users measure."""
    is_one = lambda node: isinstance(node, MEASUREMENTS)  # noqa: E731
    return jax.tree.map(lambda node: None if is_one(node) else node, state, is_leaf=is_one)


def _numbers(state: Any) -> list[jax.Array]:
    """The leaves of a state; what is no float becomes a 0, since keys cannot leave the device."""
    state = without_measurements(state)
    return [leaf if _is_float(leaf) else jnp.zeros((), jnp.int32) for leaf in map(_as_array, jax.tree.leaves(state))]


def _as_array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _constant(leaf: Any) -> float | None:
    if not _is_float(leaf) or leaf.size == 0:
        return None
    values = np.asarray(leaf, np.float64).ravel()
    return float(values[0]) if (values == values[0]).all() else None


def _judge(first: Any, last: Any, originals: list[np.ndarray], elements: np.ndarray) -> Verdict:
    """Compares the streams of one leaf; `elements` [2, size] says which of all parameters' elements were scaled."""
    if not _is_float(last):
        return Verdict(None, "not a float")
    start = np.asarray(first, np.float64)
    loose = 1e-2 if jnp.finfo(last.dtype).bits < 32 else 1e-6
    if any(start.shape == copy.shape and np.allclose(start, copy, rtol=loose) for copy in originals):
        return Verdict("param", "starts as a copy of the parameters")
    streams = np.asarray(last, np.float64).reshape(2, 3, -1)
    best = Verdict(None, "does not move")
    everything = np.ones((2, streams.shape[-1]), bool)
    counted = elements if start.shape == elements.shape[1:] else everything  # one vector for all parameters
    for scaled, (base, larger, negated) in zip(counted, streams, strict=True):
        moved = scaled & (base != 0) & np.isfinite(base) & np.isfinite(larger) & np.isfinite(negated)
        if not moved.any():
            continue
        order = np.median(np.log(np.maximum(np.abs(larger[moved] / base[moved]), 1e-30))) / np.log(SCALE)
        sign = np.median(np.sign(negated[moved] / base[moved]))
        kind = KIND_OF.get((round(order), int(sign))) if abs(order - round(order)) < 0.1 else None
        verdict = Verdict(kind, f"order {order:.2f} in the gradient, {'signed' if sign < 0 else 'unsigned'}")
        if kind != "invariant":
            return verdict
        best = verdict
    return best
