"""Two small kernels, and which of their weights are kept, in NumPy and without the library: by stable sorts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_surgery_hooks as fsh

SHAPE = (8, 12)
SIZE = 96
PATHS = ("a/kernel", "b/kernel")
Masks = dict[str, np.ndarray]
Numbers = Mapping[str, np.ndarray]


def numbers(seed: int = 0, *, tied: bool = False) -> dict[str, np.ndarray]:
    """A float32 array for each kernel; of whole numbers from -4 to 4 if they are to be tied."""
    rng = np.random.default_rng(seed)
    draw = (lambda: rng.integers(-4, 5, SHAPE)) if tied else (lambda: rng.normal(size=SHAPE))
    return {path: np.asarray(draw(), np.float32) for path in PATHS}


def on_device(arrays: Numbers) -> dict[str, jax.Array]:
    return {path: jnp.asarray(array) for path, array in arrays.items()}


def make_state(values: Numbers | None = None, tx: Any = None, step: int = 0, cls: Any = fsh.TrainState) -> Any:
    """A train state of two kernels and a bias, with `step` on the device."""
    values = numbers() if values is None else values
    params = {"a": {"kernel": values["a/kernel"], "bias": np.ones(12, np.float32)}, "b": {"kernel": values["b/kernel"]}}
    params = jax.tree.map(jnp.asarray, params)
    return cls.create(apply_fn=None, params=params, tx=tx or optax.sgd(0.1)).replace(step=jnp.int32(step))


def kernels(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(tree[path[0]]["kernel"]) for path in PATHS}


def tree_of(values: Mapping[str, Any]) -> Any:
    """Gradients, say: a tree like the parameters of `make_state`."""
    return {"a": {"kernel": values["a/kernel"], "bias": jnp.zeros(12)}, "b": {"kernel": values["b/kernel"]}}


def masks_in(state: Any, hook: str = "prune") -> Masks:
    return {path: np.asarray(mask) for path, mask in state.surgery["memory"][hook].items()}


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The k highest, of equal ones the first in row-major order."""
    order = np.lexsort((np.arange(scores.size), -scores.astype(np.float64).ravel()))
    mask = np.zeros(scores.size, bool)
    mask[order[:k]] = True
    return mask.reshape(scores.shape)


def best_each(scores: Numbers, k: int | Mapping[str, int]) -> Masks:
    return {path: best(score, k if isinstance(k, int) else k[path]) for path, score in scores.items()}


def best_of_all(scores: Numbers, k: int) -> Masks:
    """The k highest of all leaves together, those of the first leaf first."""
    flat = best(np.concatenate([scores[path].astype(np.float64).ravel() for path in sorted(scores)]), k)
    found, start = {}, 0
    for path in sorted(scores):
        found[path] = flat[start : start + scores[path].size].reshape(scores[path].shape)
        start += scores[path].size
    return found


def within(scores: Numbers, held: Numbers) -> dict[str, np.ndarray]:
    return {path: np.where(held[path], score, -np.inf) for path, score in scores.items()}


def magnitude(values: Numbers) -> dict[str, np.ndarray]:
    return {path: np.abs(value) for path, value in values.items()}


def drawn(key: jax.Array, path: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """What a leaf draws: uniform numbers of the key, folded with the crc32 of its path."""
    return np.asarray(jax.random.uniform(jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode()))), shape))


def assert_masks(found: Mapping[str, Any], expected: Numbers) -> None:
    assert set(found) == set(expected)
    for path, mask in expected.items():
        assert np.asarray(found[path]).dtype == bool
        np.testing.assert_array_equal(found[path], mask, err_msg=path)


def differ(one: Numbers, other: Numbers) -> bool:
    return any(not np.array_equal(one[path], other[path]) for path in one)
