"""What fuzzing found and mended must leave right what is right; `fuzz_cases` has the inputs that are refused now."""

import jax.numpy as jnp
import numpy as np
from tiny import MOMENTUM, halve, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import Noise

STATE = make_state(1)


def test_a_union_of_few_steps_is_clipped_to_as_many_as_it_has():
    assert (fsh.at(5) | fsh.every(10, stop=40)).max_fires(10**9) == fsh.at(5) | fsh.every(10, stop=40)


def test_the_largest_step_of_an_int32_fires():
    hooks = make_hooks(lambda w, step: w + step, fsh.at(2**31 - 1))
    state = hooks(2**31 - 1, make_state(None))
    np.testing.assert_array_equal(np.asarray(state.params["w"]), np.float32(2**31))


def test_a_metric_that_is_infinite_is_one():
    hooks = make_hooks(halve, fsh.on_metric("x", spike=2, lag=0))
    state = make_state(1, MOMENTUM)
    for step, value in enumerate([1.0, 1.0, float("inf")], 1):
        state = hooks(step, state, metrics={"x": value}) if step > 1 else hooks(1, state, metrics={"x": value})
    assert [record.step for record in hooks.ledger.records if record.event == "fired"] == [3]


def test_the_largest_seeds_draw():
    for seed in (-(2**63), 2**63 - 1):
        hooks = make_hooks(Noise(1.0), fsh.at(1), options={"guard": "off"}, seed=seed)
        assert jnp.isfinite(hooks(1, STATE).params["w"]).all()


def test_a_value_that_cannot_be_shown_is_named_by_its_type():
    class Blank:
        def __repr__(self):
            raise ValueError("no luck")

    assert e.quoted(Blank()) == e.shorten(Blank()) == "<Blank that cannot be shown>"
    assert e.typed(Blank()) == "Blank <Blank that cannot be shown>"
