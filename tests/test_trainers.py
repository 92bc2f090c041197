"""What real train loops do around a hook call: donate, jit or not, count on their own, mix dtypes, call like CLU."""

from __future__ import annotations

import functools
from typing import Any

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import QUICK, halve

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import StateError, StepError

BATCH = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
SCHEDULED = optax.adam(optax.linear_schedule(1e-2, 1e-3, 10), mu_dtype=jnp.bfloat16)


def make_params(leaf: Any = jnp.asarray) -> dict[str, Any]:
    return {"bias": leaf(np.zeros(2, np.float32)), "kernel": leaf(np.full((3, 2), 0.5, np.float32))}


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch @ params["kernel"] + params["bias"][None] - 1.0) ** 2)


def apply(state: Any, batch: Any) -> Any:
    return state.apply_gradients(grads=jax.grad(loss)(state.params, batch))


def create(params: Any, tx: Any = SCHEDULED) -> Any:
    return fsh.TrainState.create(apply_fn=None, params=params, tx=tx)


STATES = {
    "weak_step": lambda: create(make_params()),  # Flax starts from a Python 0: weak after the first jitted step
    "strong_step": lambda: create(make_params()).replace(step=jnp.int32(0)),  # as after a restore
    "jitted_init": jax.jit(lambda: create(make_params())),
    "numpy_params": lambda: create(make_params(np.asarray)),
    "numpy_state": lambda: jax.tree.map(np.asarray, create(make_params())),
    "committed": lambda: jax.device_put(create(make_params()), jax.devices()[0]),
}


def train(state: Any, hooks: Any, first: int = 0) -> tuple[Any, list[int]]:
    """Six donated steps; the state, and how often the step had been traced after each."""
    traces: list[int] = []

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        traces.append(1)
        return apply(state, batch)

    counts = []
    for step in range(first, 6):
        state = train_step(state, BATCH)
        state = hooks(step + 1, state)
        counts.append(len(traces))
    return state, counts


def scaling(when: Any) -> Any:
    return tiny.make_hooks(halve, when, params="kernel", options={})


def no_hooks(step, state):
    return state


@pytest.fixture(scope="module")
def expected() -> Any:
    return train(STATES["strong_step"](), scaling(fsh.at(3, 5)))[0]


@pytest.mark.parametrize("kind", STATES)
def test_a_donated_loop_is_edited_alike_and_retraces_no_more_than_without_hooks(kind, expected):
    _, alone = train(STATES[kind](), no_hooks)
    state, counts = train(STATES[kind](), scaling(fsh.at(3, 5)))
    assert counts == alone
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        found, wanted = (np.asarray(leaf, np.float32) for leaf in (found, wanted))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert state.params["kernel"].dtype == jnp.float32
    assert state.opt_state[0].mu["kernel"].dtype == jnp.bfloat16  # bf16 moments beside f32 params
    assert state.opt_state[0].nu["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("kind", STATES)
def test_a_fire_before_the_first_step_costs_no_further_trace(kind):
    _, alone = train(STATES[kind](), no_hooks)
    hooks = scaling(fsh.at(0, 3))
    state = hooks(0, STATES[kind]())
    np.testing.assert_array_equal(state.params["kernel"], np.full((3, 2), 0.25, np.float32))
    assert train(state, hooks)[1] == alone


@pytest.mark.parametrize("rule", ["carry", "transport", "reset"])
def test_steps_and_counts_are_never_touched(rule):
    """A Python, weak, strong or numpy step; Adam's count and the schedule's."""
    state = create(make_params())
    for step in (4, jnp.int32(4), jnp.full((), 4), np.int64(4)):
        state = state.replace(step=step)
        new = fsh.operate(state, halve, params="kernel", opt_state=rule)[0]
        assert new.step is step
    assert new.opt_state[0].count is state.opt_state[0].count
    assert new.opt_state[1].count is state.opt_state[1].count


def test_nothing_of_a_donated_state_is_read_later():
    """Figures are read some steps on, when the state that they were measured on is dead."""
    records: list[Any] = []
    hooks = fsh.SurgeryHooks(on_record=records.append, settle_after=2)
    hooks.add("a", halve, params="**", when=fsh.at(2))
    train(STATES["strong_step"](), hooks)
    assert [(r.event, r.step) for r in records if r.event != "run"] == [("fired", 2), ("settled", 2)]
    assert records[-1].figures["params/elements"] == 8


def test_several_optimizer_steps_a_call():
    """As in PPO: the step jumps by three, and a hook that was due in between fires once."""

    @jax.jit
    def update(state, batch):
        return jax.lax.scan(lambda state, _: (apply(state, batch), None), state, None, 3)[0]

    hooks, state = tiny.make_hooks(halve, fsh.every(4), params="kernel"), STATES["strong_step"]()
    step = 0
    state = hooks(step, state)
    for _ in range(3):
        state = update(state, BATCH)
        step += 3
        state = hooks(step, state)
    fired = [(r.step, r.passed) for r in hooks.ledger.records if r.event == "fired"]
    assert fired == [(6, (4,)), (9, (8,))]
    assert int(state.step) == 9


def test_a_count_of_calls_instead_of_optimizer_steps_is_refused():
    state = create(make_params()).replace(step=jnp.int32(3))
    with pytest.raises(StepError) as caught:
        tiny.make_hooks(halve, params="kernel")(1, state)
    assert caught.value.write == "hooks(3, state)"


@pytest.mark.parametrize("call", [lambda h: h(1), lambda h: h(1, 1_700_000_000.0), lambda h: h(step=1)])
def test_a_call_as_for_clus_periodic_actions_raises(call):
    """`for h in hooks: h(step)`, and with the time as a second argument."""
    with pytest.raises(StateError):
        call(tiny.make_hooks(halve))


def test_metrics_may_be_passed_and_are_ignored_unless_asked_for():
    hooks, state = tiny.make_hooks(halve), tiny.make_state(1)
    state = hooks(1, state, metrics={"loss": jnp.float32(1)}, note="text", nothing=None)
    assert tiny.w_of(state) == [0.5, 0.5]


def test_a_pmap_loop_unreplicates_for_the_call():
    devices = jax.local_devices()[:2]
    state = flax.jax_utils.replicate(tiny.make_state(1), devices)
    hooks = tiny.make_hooks(halve)
    with pytest.raises(StateError, match="replicated for pmap"):
        hooks(1, state)
    state = flax.jax_utils.replicate(hooks(1, flax.jax_utils.unreplicate(state)), devices)
    assert tiny.w_of(state) == [[0.5, 0.5], [0.5, 0.5]]


def test_a_loop_with_loose_parts_and_a_closed_over_optimizer():
    tx = optax.sgd(0.1, momentum=0.9)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, batch):
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = make_params(), tx.init(make_params())
    state = create(make_params(), tx)
    hooks, others = (tiny.make_hooks(halve, fsh.every(2), params="kernel", options=QUICK) for _ in range(2))
    for step in range(1, 5):
        params, opt_state = train_step(params, opt_state, BATCH)
        bound = hooks(step, fsh.bind(params=params, opt_state=opt_state, tx=tx))
        params, opt_state = bound.params, bound.opt_state
        state = others(step, apply(state, BATCH))
    assert train_step._cache_size() == 1
    wanted = jax.tree.leaves((state.params, state.opt_state))
    for found, value in zip(jax.tree.leaves((params, opt_state)), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-6)
