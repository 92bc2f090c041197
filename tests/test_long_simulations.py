"""One weight over 1,200 steps, beside a loop of plain Python numbers: periods, resets, re-warms, averages, rewinds."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks.surgeries import Ema, Lookahead, ResetMoments, Rewarm, Rewind, Scale
from flax_surgery_hooks.testing import streams

STEPS, PERIOD, RAMP, RATE = 1_200, 200, 30, 0.01
B1, B2, EPS = 0.9, 0.999, 1e-8
SPIKE = 650
"""The step whose gradient is a thousand times too large."""


@functools.cache
def noises(spiked: bool = False) -> list[float]:
    found = np.random.default_rng(0).normal(size=STEPS)
    found[SPIKE - 1] *= 1_000 if spiked else 1
    return found.tolist()


def adam(weight: float, moments: tuple[float, float], gradient: float, step: int) -> tuple[float, tuple[float, float]]:
    """The update of a weight, and its moments after it."""
    m, v = moments
    m, v = B1 * m + (1 - B1) * gradient, B2 * v + (1 - B2) * gradient**2
    update = -RATE * (m / (1 - B1**step)) / (math.sqrt(v / (1 - B2**step)) + EPS)
    return update, (m, v)


def run(hooks: fsh.SurgeryHooks, tx: Any, noise: list[float], form: str) -> tuple[list[float], Any]:
    """The weight after each step, and the last state."""
    with streams.enable_x64(True):
        state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.float64(1.0)}, tx=tx)
        state = hooks.init(state.replace(step=jnp.int32(0)), fires=400)
        inside = hooks.in_graph if form == "graph" else hooks.observe

        def step(state: Any, noise: Any) -> Any:
            state = inside(state.apply_gradients(grads={"w": 0.5 * state.params["w"] + noise}))
            return state, state.params["w"]

        if form == "graph":
            state, seen = jax.jit(lambda state, noise: jax.lax.scan(step, state, noise))(state, jnp.asarray(noise))
            hooks.collect(state)
            return seen.tolist(), state
        step, weights = jax.jit(step, donate_argnums=0), []
        for at, one in enumerate(noise, start=1):
            state, _ = step(state, one)
            state = hooks(at, state)
            weights.append(float(state.params["w"]))  # the next step takes its memory
        hooks.flush()
        return weights, state


# Moments reset on a period, under a spike of the gradient, and a re-warm after each.


def resets(noise: list[float], period: int = PERIOD, shift: int = 0, late: int = 0, restart: bool = False) -> Any:
    """The weight after each step: moments are forgotten after every `period` steps, `shift` steps later, and updates
    grow anew over `RAMP` steps, `late` steps later; the count of Adam goes on, unless it is a `restart`.
    """
    weight, moments, since, seen, count = 1.0, (0.0, 0.0), RAMP + late, [], 0
    for step in range(1, STEPS + 1):
        count += 1
        update, moments = adam(weight, moments, 0.5 * weight + noise[step - 1], count)
        part = (1 - math.cos(math.pi * max(since - late, 0) / RAMP)) / 2
        weight += update * (0.01 + 0.99 * part if since < RAMP + late else 1)
        since += 1
        if (step - shift) % period == 0:
            moments, since, count = (0.0, 0.0), 0, 0 if restart else count
        seen.append(weight)
    return seen


def resetting() -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks()
    hooks.add("reset", ResetMoments(), params="**", when=fsh.every(PERIOD))
    hooks.add("rewarm", Rewarm(), params="**", when=fsh.every(PERIOD))
    return hooks


def test_resets_and_rewarms_are_those_of_the_loop_at_every_step():
    tx = optax.chain(optax.adam(RATE, B1, B2, EPS), fsh.optax.rewarm(RAMP, start=0.01, schedule="cosine"))
    hooks, noise = resetting(), noises(spiked=True)
    weights, state = run(hooks, tx, noise, "host")
    np.testing.assert_allclose(weights, resets(noise), rtol=1e-10)
    fired = [(record.step, record.hook) for record in hooks.ledger.records if record.event == "fired"]
    assert fired == [(step, hook) for step in range(PERIOD, STEPS + 1, PERIOD) for hook in ("reset", "rewarm")]
    adam_state = state.opt_state[0][0]  # the last step was a fire
    assert (float(adam_state.mu["w"]), float(adam_state.nu["w"]), int(adam_state.count)) == (0, 0, STEPS)
    assert int(state.opt_state[1].since["w"]) == 0
    for wrong in ({"shift": 1}, {"shift": -1}, {"late": 1}, {"period": PERIOD + 1}, {"restart": True}):
        assert np.abs(np.subtract(weights, resets(noise, **wrong))).max() > 1e-4, wrong


def test_what_a_spike_does_ends_with_the_next_reset():
    """Without resets its square is in the second moment to the end, and keeps updates small."""

    def moving(weights: list[float]) -> float:
        """Mean size of the updates of the last steps but for the re-warm, and the next reset."""
        return float(np.abs(np.diff(weights))[STEPS - PERIOD + RAMP : STEPS - 1].mean())

    with_resets, without = (
        [moving(resets(noises(spiked), period)) for spiked in (False, True)] for period in (PERIOD, 10 * STEPS)
    )
    assert with_resets[1] == pytest.approx(with_resets[0], rel=0.2)
    assert without[1] < without[0] / 10
    hooks = fsh.SurgeryHooks()
    tx = optax.adam(RATE, B1, B2, EPS)
    weights, state = run(hooks, tx, noises(spiked=True), "host")
    np.testing.assert_allclose(weights, resets(noises(spiked=True), 10 * STEPS), rtol=1e-10)
    assert float(state.opt_state[0].nu["w"]) > 100


# Hooks of several periods, what they remember, and what follows what.


def remembering(noise: list[float], follow: bool = True, period: int = 5, share: float = 0.5) -> Any:
    """The weight after each step, and the average in the end: scaled on a period of 7 from step 3 on, with slow weights
    and average; pulled to slow weights every 5 steps; put back to what it was at step 300 after step 900.
    """
    weight, moments, slow, average, snapshot, seen = 1.0, (0.0, 0.0), 1.0, 1.0, 1.0, []
    decay = 2 ** (-1 / 50)
    for step in range(1, STEPS + 1):
        update, moments = adam(weight, moments, 0.5 * weight + noise[step - 1], step)
        weight += update
        average += (1 - decay) * (weight - average)
        snapshot = weight if step == 300 else snapshot
        if step >= 3 and (step - 3) % 7 == 0:
            weight *= 0.9
            slow, average = (0.9 * slow, 0.9 * average) if follow else (slow, average)
        if step % period == 0:
            slow += share * (weight - slow)
            weight = slow
        weight = snapshot if step == 900 else weight
        seen.append(weight)
    return seen, average


@pytest.mark.parametrize("form", ["host", "graph"])
def test_hooks_of_several_periods_are_those_of_the_loop_at_every_step(form):
    hooks, noise = fsh.SurgeryHooks(), noises()
    hooks.add("ema", Ema(half_life=50), params="w", when=fsh.at(1_000_000))
    hooks.add("scale", Scale(0.9), params="w", when=fsh.every(7, start=3))
    hooks.add("slow", Lookahead(0.5), params="w", when=fsh.every(5))
    hooks.add("rewind", Rewind(to_step=300), params="w", when=fsh.at(900))
    weights, state = run(hooks, optax.adam(RATE, B1, B2, EPS), noise, form)
    expected, average = remembering(noise)
    np.testing.assert_allclose(weights, expected, rtol=1e-10)
    np.testing.assert_allclose(float(state.surgery["memory"]["ema"]["w"]["average"]), average, rtol=1e-10)
    fires = {"scale": range(3, STEPS + 1, 7), "slow": range(5, STEPS + 1, 5), "rewind": [900]}
    for hook, steps in fires.items():
        assert [one.step for one in hooks.ledger.records if (one.event, one.hook) == ("settled", hook)] == list(steps)
    for wrong in ({"follow": False}, {"period": 6}, {"share": 0.4}):
        assert np.abs(np.subtract(weights, remembering(noise, **wrong)[0])).max() > 1e-3, wrong
