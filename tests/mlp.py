"""A small ReLU network in float64, its exact edits, and moments rebuilt from recorded steps: the oracle of the laws.

Nothing here uses the library. An edit maps the parameters of one network to those of another that computes the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

B1, B2, STEPS = 0.9, 0.99, 6
Params = dict[str, jax.Array]


def make_params(seed: int = 0) -> Params:
    """Layers 5 -> 4 -> 6 -> 3; unit 3 of the first hidden layer is dead for good (its bias is far below zero)."""
    rng = np.random.default_rng(seed)
    sizes = (5, 4, 6, 3)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes), start=1):
        params[f"w{i}"] = jnp.asarray(rng.normal(size=(rows, columns)))
        params[f"b{i}"] = jnp.asarray(rng.normal(size=columns) * 0.1)
    params["b1"] = params["b1"].at[3].set(-1e3)
    return params


def loss(params: Params, batch: jax.Array) -> jax.Array:
    """Mean squared output of the network against fixed targets."""
    hidden = jax.nn.relu(batch @ params["w1"] + params["b1"][None])
    hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"][None])
    out = hidden @ params["w3"] + params["b3"][None]
    return jnp.mean((out - jnp.sin(batch[:, :3])) ** 2)


gradient = jax.jit(jax.grad(loss))


class Run(NamedTuple):
    """Recorded steps: the parameters and batch at which each gradient was taken."""

    points: list[Params]
    batches: list[jax.Array]


def batches() -> list[jax.Array]:
    return [jnp.asarray(np.random.default_rng(100 + t).normal(size=(16, 5))) for t in range(STEPS)]


def rebuilt(
    run: Run, edit: Callable[[Params], Params], gradient: Callable[[Params, jax.Array], Params] = gradient
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Adam's moments, had every recorded step been taken on the edited network: plain NumPy averages of its
    gradients.
    """
    mu = nu = None
    for point, batch in zip(run.points, run.batches, strict=True):
        grads = {name: np.asarray(g) for name, g in gradient(edit(point), batch).items()}
        mu = {n: (1 - B1) * g + (B1 * mu[n] if mu else 0) for n, g in grads.items()}
        nu = {n: (1 - B2) * g**2 + (B2 * nu[n] if nu else 0) for n, g in grads.items()}
    assert mu is not None
    assert nu is not None
    return mu, nu


class Widening(NamedTuple):
    """New units as copies: `source[j]` is the unit that new unit j copies, `share[j]` multiplies its outgoing
    weights.
    """

    source: np.ndarray
    share: np.ndarray


def even(source: list[int]) -> Widening:
    """Every copy of a unit takes the same share."""
    counts = np.bincount(source)
    return Widening(np.array(source), 1.0 / counts[source])


def widen(params: Params, first: Widening, second: Widening) -> Params:
    """Both hidden layers widened by copies."""
    return {
        "w1": params["w1"][:, first.source],
        "b1": params["b1"][first.source],
        "w2": params["w2"][first.source][:, second.source] * first.share[:, None],
        "b2": params["b2"][second.source],
        "w3": params["w3"][second.source] * second.share[:, None],
        "b3": params["b3"],
    }


def narrow(params: Params, first: Widening, second: Widening) -> Params:
    """What change of the old network a small change of the widened one amounts to; linear, undoes `widen`.

    Copies change what is shared out by their shares where they feed on, and all together where they are fed.
    """
    into = [np.zeros((w.source.max() + 1, len(w.source))) for w in (first, second)]
    out = [np.zeros_like(one) for one in into]
    for one, both, w in zip(into, out, (first, second), strict=True):
        one[w.source, np.arange(len(w.source))] = w.share
        both[w.source, np.arange(len(w.source))] = 1.0
    return {
        "w1": params["w1"] @ into[0].T,
        "b1": params["b1"] @ into[0].T,
        "w2": out[0] @ params["w2"] @ into[1].T,
        "b2": params["b2"] @ into[1].T,
        "w3": out[1] @ params["w3"],
        "b3": params["b3"],
    }


def double_in_blocks(params: Params) -> Params:
    """Two networks side by side whose outputs are averaged: block-diagonal kernels."""
    zero = jnp.zeros_like(params["w2"])
    return {
        "w1": jnp.concatenate([params["w1"]] * 2, 1),
        "b1": jnp.concatenate([params["b1"]] * 2),
        "w2": jnp.block([[params["w2"], zero], [zero, params["w2"]]]),
        "b2": jnp.concatenate([params["b2"]] * 2),
        "w3": jnp.concatenate([params["w3"]] * 2) / 2,
        "b3": params["b3"],
    }


def average_blocks(params: Params) -> Params:
    """Folds `double_in_blocks` back."""
    half1, half2 = params["b1"].shape[0] // 2, params["b2"].shape[0] // 2

    def columns(w: jax.Array, half: int) -> jax.Array:
        return (w[..., :half] + w[..., half:]) / 2

    rows = params["w2"][:half1] + params["w2"][half1:]
    return {
        "w1": columns(params["w1"], half1),
        "b1": columns(params["b1"], half1),
        "w2": columns(rows, half2),
        "b2": columns(params["b2"], half2),
        "w3": params["w3"][:half2] + params["w3"][half2:],
        "b3": params["b3"],
    }


def rescale(params: Params) -> Params:
    """Units of the first hidden layer scaled up, their outgoing weights down: the same function, as ReLU is
    homogeneous.
    """
    c = jnp.asarray([0.25, 3.0, 1.0, 1.7])
    return params | {"w1": params["w1"] * c[None], "b1": params["b1"] * c, "w2": params["w2"] / c[:, None]}


def permute(params: Params) -> Params:
    order = np.array([2, 0, 3, 1])
    return params | {"w1": params["w1"][:, order], "b1": params["b1"][order], "w2": params["w2"][order]}


def drop_dead_unit(params: Params) -> Params:
    return params | {"w1": params["w1"][:, :3], "b1": params["b1"][:3], "w2": params["w2"][:3]}


def pad_with_idle_units(params: Params) -> Params:
    """Two new units with random incoming and zero outgoing weights."""
    incoming = jnp.asarray(np.random.default_rng(5).normal(size=(5, 2)))
    return params | {
        "w1": jnp.concatenate([params["w1"], incoming], 1),
        "b1": jnp.concatenate([params["b1"], jnp.zeros(2)]),
        "w2": jnp.concatenate([params["w2"], jnp.zeros((2, 6))]),
    }
