"""Edits that move no element: which they are, and that their slots follow bit for bit as by the general way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_surgery_hooks import lineage, transport

stop = lax.stop_gradient


def column_norm(w):
    return jnp.linalg.norm(w, axis=0, keepdims=True)


def dead_columns(w):
    return jnp.arange(w.shape[1]) % 3 == 0


STAYING = {
    "scale": lambda w: w * 1.7,
    "negative scale": lambda w: -w / 3,
    "per column": lambda w: w / stop(column_norm(w)),
    "per row": lambda w: w * jnp.linspace(0.1, 3.0, w.shape[0])[:, None],
    "normalise": lambda w: w / stop(jnp.linalg.norm(w)),
    "clip": lambda w: jnp.clip(w, -0.5, 0.5),
    "mask": lambda w: jnp.where(jnp.abs(w) < 0.3, 0.0, w),
    "dead columns": lambda w: jnp.where(dead_columns(w)[None, :], 0.0, w),
    "all dead but by value": lambda w: jnp.where(w > 1e6, w, 0.0),
    "recycled columns": lambda w: jnp.where(dead_columns(w)[None, :], jax.random.normal(jax.random.key(0), w.shape), w),
    "shrink and perturb": lambda w: 0.5 * w + 0.1 * jax.random.normal(jax.random.key(1), w.shape),
    "soft threshold": lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - 0.1, 0.0),
    "nonlinear": lambda w: jnp.tanh(w) + w**3 + jnp.exp(w),
    "twice itself": lambda w: w + w * 0.25,
    "by a decorated function": lambda w: jax.nn.relu(w) + 0.1 * w,
    "through a sort": lambda w: jnp.where(w > stop(jnp.sort(w.ravel())[5]), w, 0.0),
    "merged": lambda w: w + stop(w @ w.T @ w),
    "to bfloat16 and back": lambda w: (w.astype(jnp.bfloat16) * 2).astype(w.dtype),
}
MOVING = {
    "transpose": lambda w: w[:6, :6].T,
    "reverse": lambda w: w[::-1],
    "roll": lambda w: jnp.roll(w, 1, axis=0),
    "permute": lambda w: w[jnp.array([1, 0, *range(2, w.shape[0])])],
    "square transpose": lambda w: (w.T @ jnp.eye(w.shape[0]))[: w.shape[0]].T * 1.0,
    "sort": lambda w: jnp.sort(w, axis=0),
    "mean": lambda w: w - w.mean(),
    "norm": lambda w: w / jnp.linalg.norm(w),
    "cumulative": lambda w: jnp.cumsum(w, axis=0),
    "grow": lambda w: jnp.pad(w, ((0, 1), (0, 0))),
    "shrink": lambda w: w[:-1],
    "constant": jnp.ones_like,
    "scatter": lambda w: w.at[0].set(w[1]),
    "first row everywhere": lambda w: w[:1] * jnp.ones_like(w),
}


def leaf(seed=3, shape=(8, 6)):
    return jax.random.normal(jax.random.key(seed), shape)


def edit_of(function, *paths):
    return lineage.trace(
        lambda leaves: {path: function(leaf) for path, leaf in leaves.items()}, {p: leaf() for p in paths}
    )


def slots():
    """Slots of several dtypes, with every kind of odd number among them."""
    odd = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-42, 3e38, 1 / 3])
    wide = leaf(5).at[:, 0].set(odd).at[:, 3].set(-odd)
    return [wide, wide.astype(jnp.bfloat16), wide.astype(jnp.float16), (leaf(6) * 1e9).astype(jnp.int32), leaf(7) > 0]


def bits(array):
    return np.asarray(array).tobytes()


@pytest.fixture
def generally(monkeypatch):
    """Runs a function by the general way."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(lineage, "coefficients", lambda *args: None)
            return function()

    return run


@pytest.mark.parametrize("name", STAYING)
def test_an_edit_that_moves_nothing_gathers_bit_for_bit_as_the_general_way(name, generally):
    edit = edit_of(STAYING[name], "w")
    assert lineage.linearize(edit).diagonal is not None

    def gathered():
        def gather(slots):
            how = lineage.linearize(edit)
            share = lineage.gradient_share(how, "it")["w"]
            return (how.coefficient["w"], jnp.broadcast_to(share, leaf().shape)), [
                how.gather({"w": slot}, ["w"])["w"] for slot in slots
            ]

        return jax.jit(gather)(slots())

    factors, fast = gathered()
    expected, slow = generally(gathered)
    np.testing.assert_allclose(factors, expected, rtol=1e-5)
    for one, other in zip(fast, slow, strict=True):
        assert one.dtype == other.dtype
        assert bits(one) == bits(other)


@pytest.mark.parametrize("name", MOVING)
def test_an_edit_that_may_move_elements_is_followed_the_general_way(name):
    assert lineage.linearize(edit_of(MOVING[name], "w")).diagonal is None


def test_a_coefficient_is_no_larger_than_it_varies():
    shapes = {name: lineage.linearize(edit_of(STAYING[name], "w")).diagonal.coefficient["w"].shape for name in STAYING}
    assert {name: shapes[name] for name in ("scale", "normalise", "per column", "dead columns", "per row", "clip")} == {
        "scale": (1, 1), "normalise": (1, 1), "per column": (1, 6), "dead columns": (1, 6), "per row": (8, 1),
        "clip": (8, 6),
    }  # fmt: skip


def test_leaves_that_trade_places_are_followed_the_general_way():
    old = {"a": leaf(), "b": leaf(4)}
    swapped = lineage.linearize(lineage.trace(lambda leaves: {"a": leaves["b"], "b": leaves["a"]}, old))
    assert swapped.diagonal is None
    mixed = lineage.linearize(lineage.trace(lambda leaves: {"a": leaves["a"] + leaves["b"], "b": leaves["b"]}, old))
    assert mixed.diagonal is None
    both = lineage.linearize(lineage.trace(lambda leaves: {"b": leaves["b"] * 2, "a": -leaves["a"]}, old))
    assert {path: float(c.squeeze()) for path, c in both.diagonal.coefficient.items()} == {"a": -1.0, "b": 2.0}


def test_leaves_of_many_are_told_apart_whatever_their_order():
    old = {"a/b": jnp.full(2, 2.0), "a-c": jnp.full(3, 5.0)}  # sorted, "a-c" comes first
    edit = lineage.trace(lambda leaves: {path: 2 * leaf for path, leaf in leaves.items()}, old)
    assert {path: leaf.tolist() for path, leaf in edit(old).items()} == {"a/b": [4.0] * 2, "a-c": [10.0] * 3}


def seeds(function, how_fresh):
    """What second moments start from by the short way, and by the full one."""
    edit = edit_of(function, "w")
    slot = jnp.abs(leaf(9))

    def both(slot):
        how = transport.follow(lineage.linearize(edit), transports=True, fold=None, in_place=False, name="it")
        moved, fresh = transport.move(how, "transport", "grad_sq", {"w": slot}, ["w"])["w"], how.fresh("w", "transport")
        short = transport.mean_if_any_fresh(how, "transport", "grad_sq", "w", moved, fresh, slot, 0.5)
        return short, transport.mean_of_survivors(moved, fresh, slot, 0.5), fresh

    short, full, fresh = jax.jit(both)(slot)
    assert how_fresh(np.asarray(fresh))
    return short, full


@pytest.mark.parametrize("name", ["dead columns", "recycled columns", "mask", "all dead but by value"])
def test_where_elements_are_fresh_the_mean_is_the_same_bit_for_bit(name):
    short, full = seeds(STAYING[name], np.any)
    assert short.shape == full.shape
    assert bits(short) == bits(full)


def test_where_none_is_fresh_no_mean_is_taken():
    short, full = seeds(STAYING["per column"], lambda fresh: not fresh.any())
    assert short.shape == full.shape
    assert np.all(np.asarray(short) == 0.5)
    assert not np.any(np.asarray(full) == 0.5)


def test_tiny_coefficients_share_without_underflow():
    how = transport.follow(
        lineage.linearize(edit_of(lambda w: w * 1e-30, "w")), transports=True, fold=None, in_place=False, name="it"
    )
    np.testing.assert_allclose(how.share["w"], 1e30, rtol=1e-6)  # by way of J^2 it would be 0
