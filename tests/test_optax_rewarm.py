"""Updates that rise again after a trigger: against a loop in NumPy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import RuleError, ScheduleError
from flax_surgery_hooks.optax import RewarmState, rewarm


def by_hand(steps, triggers, count, factor):
    """Factor of each update; a trigger at n is written before update n."""
    factors, since = [], steps
    for n in range(count):
        since = 0 if n in triggers else since
        factors.append(factor(since / steps) if since < steps else 1.0)
        since += 1
    return np.array(factors)


def linear(start):
    return lambda part: start + (1 - start) * part


def spam(part):
    return 1 - 0.99 * (1 + np.cos(np.pi * part)) / 2


def measured(tx, triggers, count):
    """Factor of each update of the leaf `a`; `b` is never triggered."""
    state = tx.init({"a": jnp.ones(2), "b": jnp.ones(())})
    step = jax.jit(tx.update)
    factors = []
    for n in range(count):
        if n in triggers:
            state = state._replace(since=state.since | {"a": jnp.zeros((), jnp.int32)})
        updates, state = step({"a": jnp.full(2, 3.0), "b": jnp.float64(3)}, state)
        assert updates["b"] == 3
        factors.append(np.asarray(updates["a"][0]) / 3)
    return np.array(factors)


TRIGGERS = [{3}, {0, 20}, {2, 5, 6}, {4, 11}, set()]


@pytest.mark.parametrize("triggers", TRIGGERS)
@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, linear(0.0)), ({"start": 0.25}, linear(0.25)), ({"start": 0.01, "schedule": "cosine"}, spam)],
)
def test_factors_are_those_of_a_loop(options, factor, triggers, x64):
    found = measured(rewarm(7, **options), triggers, 30)
    np.testing.assert_allclose(found, by_hand(7, triggers, 30, factor), rtol=1e-13, atol=1e-15)
    one_late = by_hand(7, {n + 1 for n in triggers}, 30, factor)
    assert not triggers or not np.allclose(found, one_late, rtol=1e-3)


def test_the_first_and_the_last_factor():
    state = RewarmState({"a": jnp.int32(0)})
    assert rewarm(10).update({"a": jnp.ones(1)}, state)[0]["a"] == 0
    assert rewarm(10, start=1).update({"a": jnp.ones(1)}, state)[0]["a"] == 1
    assert rewarm(1, start=0.5).update({"a": jnp.ones(1)}, state)[0]["a"] == 0.5
    assert rewarm(1, start=0.5).update({"a": jnp.ones(1)}, state)[1].since["a"] == 1
    late = RewarmState({"a": jnp.int32(9)})
    np.testing.assert_allclose(rewarm(10).update({"a": jnp.ones(1)}, late)[0]["a"], 0.9, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("steps", [1, 3, 1000, 2**31 - 1])
def test_inactive_updates_come_back_bitwise_and_nothing_overflows(dtype, steps):
    extremes = (float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).smallest_subnormal))
    values = jnp.array([1.1, -0.0, 0.0, np.nan, np.inf, -np.inf, *extremes], dtype)
    tx = rewarm(steps)
    state = tx.init({"a": values})
    for _ in range(3):
        updates, state = jax.jit(tx.update)({"a": values}, state)
        assert_bitwise_equal(updates, {"a": values})
        assert state.since["a"].dtype == jnp.int32
        assert state.since["a"] == steps


def test_dtypes_stay_and_products_are_rounded_once():
    tx = rewarm(3)
    updates, _ = tx.update({"a": jnp.full(4, 5.0, jnp.bfloat16)}, RewarmState({"a": jnp.int32(1)}))
    assert updates["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["a"], jnp.asarray(np.full(4, 5 / 3), jnp.bfloat16))


def test_holes_stay_holes_and_what_is_no_float_passes():
    params = {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode(), "n": jnp.arange(3)}
    tx = rewarm(3)
    state = tx.init(params)
    assert (state.since["b"], state.since["c"]) == (None, optax.MaskedNode())
    updates, _ = tx.update(params, RewarmState(jax.tree.map(jnp.zeros_like, state.since)))
    np.testing.assert_array_equal(updates["n"], [0, 1, 2])
    np.testing.assert_array_equal(updates["a"], [0, 0])


def test_a_trigger_retraces_nothing_in_a_chain():
    tx, traces = optax.chain(optax.adamw(0.1), rewarm(4, start=0.5)), []
    plain, params = optax.adamw(0.1), {"a": jnp.ones(3), "b": jnp.ones(2)}

    @jax.jit
    def step(state):
        traces.append(None)
        return tx.update(params, state, params)

    state = tx.init(params)
    _, state = step(state)
    state = (state[0], state[1]._replace(since=state[1].since | {"a": jnp.zeros_like(state[1].since["a"])}))
    updates, _ = step(state)
    expected, _ = jax.jit(plain.update)(params, state[0], params)
    assert_bitwise_equal(updates["a"], expected["a"] * 0.5)
    np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-6)
    assert len(traces) == 1


def test_surgery_leaves_the_counts_alone():
    tx, params = optax.chain(optax.sgd(0.1, momentum=0.9), rewarm(4)), {"a": jnp.ones(3), "b": jnp.ones(2)}
    bound = fsh.bind(params=params, opt_state=tx.init(params), tx=tx)
    after, _ = fsh.operate(bound, lambda leaf: leaf[:2], params="a")
    assert_bitwise_equal(after.opt_state[1], bound.opt_state[1])


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3", None, np.int32(3), 2**31])
def test_steps_must_be_a_positive_int(steps):
    with pytest.raises(ScheduleError, match=r"steps=.*positive Python int.*Write instead: rewarm\(100\)") as caught:
        rewarm(steps)
    assert type(steps).__name__ in caught.value.found


@pytest.mark.parametrize("start", [-0.1, 1.1, float("nan"), "0", None, True])
def test_start_must_be_a_factor(start):
    with pytest.raises(ScheduleError, match=r"start=.*from 0 to 1.*start=0\.0") as caught:
        rewarm(3, start=start)
    assert str(start) in caught.value.found


def test_an_unknown_schedule_is_named():
    with pytest.raises(RuleError, match=r"Unknown schedule of a rewarm.*'cosin'.*one of cosine"):
        rewarm(3, schedule="cosin")
