"""One fire: its keys, its inputs, and that the loop, `fire` and `preview` agree."""

import dataclasses
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MOMENTUM, QUICK, assert_bitwise_equal, events, halve, make_hooks, make_state, w_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import InputError

BITS = {"bits": jnp.zeros(2, jnp.uint32)}


# Keys.


def read_key(leaf, key):
    """A surgery that leaves the bits of its key in the leaf."""
    return jax.random.key_data(key)


def read_key_of_all(leaves, key):
    return {path: jax.random.key_data(key) for path in leaves}


def documented_key(seed, name, step, path=None, count=0):
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(name.encode()))
    key = jax.random.fold_in(key, step)
    key = jax.random.fold_in(key, count) if count else key
    return key if path is None else jax.random.fold_in(key, zlib.crc32(path.encode()))


def bits_of(key):
    return jax.random.key_data(key).tolist()


def key_hooks(surgery=read_key, when=None, **kwargs):
    return make_hooks(surgery, when, params="**", **kwargs)


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (0, 2), (7, 1), (2**31, 1), (-1, 1)])
def test_a_key_is_folded_from_seed_name_step_and_path(seed, step):
    state = key_hooks(seed=seed)(step, make_state(step, **BITS))
    assert state.params["bits"].tolist() == bits_of(documented_key(seed, "a", step, "bits"))


def test_keys_are_these_numbers_on_every_machine_and_in_every_version():
    state = key_hooks()(3, make_state(3, **BITS))
    assert state.params["bits"].tolist() == [859818311, 1547750130]


def test_the_form_with_all_leaves_gets_the_key_of_the_fire():
    state = make_state(1, x=jnp.zeros(2, jnp.uint32), y=jnp.zeros(2, jnp.uint32))
    one, every = key_hooks()(1, state), key_hooks(read_key_of_all)(1, state)
    fire = documented_key(0, "a", 1)
    assert every.params["x"].tolist() == every.params["y"].tolist() == bits_of(fire)
    assert one.params["x"].tolist() == bits_of(fsh.key_for(fire, "x"))
    assert one.params["y"].tolist() == bits_of(fsh.key_for(fire, "y")) != bits_of(fsh.key_for(fire, "x"))


def test_a_key_depends_on_neither_other_hooks_nor_history():
    alone = key_hooks(when=fsh.at(4))(4, make_state(4, **BITS))
    hooks = key_hooks(when=fsh.every(2))
    hooks.add("other", read_key_of_all, params="**", when=fsh.every(1), priority=1, **QUICK)
    state = make_state(1, **BITS)
    for step in range(1, 5):
        state = hooks(step, state)
    assert state.params["bits"].tolist() == alone.params["bits"].tolist()
    jumped = key_hooks(when=fsh.every(2))
    jumped(1, make_state(1, **BITS))
    assert jumped(4, state).params["bits"].tolist() == alone.params["bits"].tolist()


def test_a_second_fire_at_one_step_draws_another_key():
    hooks = key_hooks(when=fsh.at(1))
    state = make_state(1, **BITS)
    drawn = [hooks(1, state), hooks.fire("a", state, 1), hooks.fire("a", state), hooks.fire("a", state, 2)]
    keys = [documented_key(0, "a", step, "bits", count) for step, count in ((1, 0), (1, 1), (1, 2), (2, 0))]
    assert [one.params["bits"].tolist() for one in drawn] == [bits_of(key) for key in keys]
    hooks.preview("a", state)
    again = hooks.fire("a", state, 2)
    assert again.params["bits"].tolist() == bits_of(documented_key(0, "a", 2, "bits", 1))


def test_hooks_that_take_turns_at_one_step_do_not_forget_how_often_they_fired():
    hooks = key_hooks()
    hooks.add("b", read_key, params="**", when=fsh.at(1), **QUICK)
    state, drawn = make_state(1, **BITS), []
    for name in "abab":
        drawn.append(hooks.fire(name, state).params["bits"].tolist())
    expected = [documented_key(0, name, 1, "bits", count) for count in (0, 1) for name in "ab"]
    assert drawn == [bits_of(key) for key in expected]


def test_a_key_is_optional_and_a_default_stays_where_none_is_given():
    def edit(w, key="none"):
        return w * (2 if key == "none" else 3)

    assert w_of(fsh.operate(make_state(), edit)[0]) == [2, 2]
    assert w_of(fsh.operate(make_state(), edit, key=jax.random.key(0))[0]) == [3, 3]
    assert w_of(make_hooks(edit)(1, make_state(1))) == [3, 3]


# The loop, `fire` and `preview`.


def test_the_loop_fire_and_preview_agree():
    def edit(w, key, step):
        return w * step + jax.lax.stop_gradient(jax.random.normal(key, w.shape))

    state = make_state(2, MOMENTUM, w=jnp.arange(1.0, 4), v=jnp.ones(2))
    state = state.replace(opt_state=jax.tree.map(lambda x: x + 1.5, state.opt_state))
    hooks = [make_hooks(edit, options={}) for _ in range(3)]
    looped, fired = hooks[0](2, state), hooks[1].fire("a", state)
    record = hooks[2].preview("a", state)
    assert hooks[2].ledger.records == []
    previewed_then_fired = hooks[2].fire("a", state, 2)
    assert_bitwise_equal(looped, fired)
    assert_bitwise_equal(looped, previewed_then_fired)
    for one in hooks:
        one.flush()
    settled = hooks[0].ledger.records[-1]
    assert (record.event, record.id, record.hook, record.step) == ("preview", None, "a", 2)
    assert record.figures == settled.figures == hooks[1].ledger.records[-1].figures
    for field in ("surgery", "rule", "paths", "leaves", "in_place"):
        assert getattr(record, field) == getattr(settled, field)


def test_a_preview_commits_nothing():
    state = make_state(1)
    hooks = make_hooks(halve, fsh.at(2), options={})
    hooks(1, state)
    before = list(hooks.ledger.records)
    record = hooks.preview("a", state)
    assert record.figures["params/relative_change"] == 0.5
    assert w_of(state) == [1, 1]
    assert hooks.ledger.records == before
    assert hooks.preview("a", state, 7).step == 7
    assert w_of(hooks(2, state)) == [0.5, 0.5]
    assert json.loads(record.to_json())["event"] == "preview"


def test_firing_by_hand_does_not_move_the_loop():
    hooks = make_hooks(halve, fsh.at(3))
    state = hooks(1, make_state(1))
    assert w_of(hooks.fire("a", state, 100)) == [0.5, 0.5]
    assert w_of(hooks(3, state)) == [0.5, 0.5]
    assert events(hooks) == [("fired", "a", 100), ("fired", "a", 3)]


# Inputs.


def test_arrays_numbers_and_pytrees_of_them_are_traced_and_all_else_is_static():
    seen = {}

    def edit(w, array, number, tree, text, function, flag, none):
        seen.update(array=array, number=number, tree=tree["x"][0], text=text, function=function, flag=flag, none=none)
        return w * 2

    hooks = make_hooks(edit)
    given = {"array": np.ones(2), "number": 3, "tree": {"x": [jnp.ones(())]}, "text": "t", "function": halve,
             "flag": True, "none": None, "unused": object()}  # fmt: skip
    hooks(1, make_state(1), **given)
    traced = {name for name, value in seen.items() if isinstance(value, jax.core.Tracer)}
    assert traced == {"array", "number", "tree", "flag"}
    assert (seen["text"], seen["function"], seen["none"]) == ("t", halve, None)


def test_traced_inputs_do_not_compile_anew():
    traces = []

    def edit(w, by):
        traces.append(1)
        return w * by

    hooks, state, counts = make_hooks(edit), make_state(), []
    for step, by in enumerate([1, 2, 3, np.float32(4), jnp.float32(5), jnp.float32(6)], 1):
        state = hooks(step, state.replace(step=step), by=by)
        counts.append(len(traces))
    assert w_of(state) == [720, 720]
    assert counts[0] == counts[2] < counts[3] == counts[5]  # another dtype compiles once more


def test_static_inputs_choose_the_program():
    def edit(w, mode="double", act=None):
        w = {"double": 2 * w, "triple": 3 * w}[mode]
        return w if act is None else act(w)

    hooks = make_hooks(edit)
    results = []
    for step, inputs in enumerate(
        [{}, {"mode": "triple"}, {}, {"mode": "double"}, {"act": jnp.negative}, {"act": halve, "mode": "triple"}, {}], 1
    ):
        results.append(w_of(hooks(step, make_state(step), **inputs))[0])
    assert results == [2, 3, 2, 2, -2, 1.5, 2]


def test_an_input_may_be_static_first_and_an_array_later():
    hooks = make_hooks(lambda w, by=None: w * (5 if by is None else by))
    given = [{"by": None}, {"by": 2.0}, {}, {"by": jnp.float32(3)}]
    assert [w_of(hooks(step, make_state(step), **inputs))[0] for step, inputs in enumerate(given, 1)] == [5, 2, 5, 3]


def test_keys_are_inputs_too():
    hooks = make_hooks(lambda w, rng: w + jax.random.uniform(rng, w.shape))
    for step, rng in enumerate((jax.random.key(1), jax.random.key(2), jax.random.PRNGKey(2)), 1):
        expected = 1 + jax.random.uniform(rng, (2,))
        np.testing.assert_array_equal(hooks(step, make_state(step), rng=rng).params["w"], expected)


def test_a_missing_input_is_found_at_the_first_call():
    hooks = make_hooks(lambda w, metrics, scale=1: w * scale, fsh.at(1_000))
    with pytest.raises(InputError, match="asks for metrics, which the train loop does not pass") as caught:
        hooks(1, make_state(1), loss=0.5)
    assert (caught.value.hook, caught.value.found) == ("a", "inputs loss")
    assert "hooks(step, state, metrics=...)" in caught.value.write
    state = make_state(1)
    assert hooks(1, state, metrics={"loss": 1.0}) is state


@pytest.mark.parametrize("name", ["path", "key", "memory"])
def test_reserved_input_names(name):
    with pytest.raises(InputError, match=f"The input name '{name}' is reserved") as caught:
        make_hooks(halve)(1, make_state(1), **{name: 1})
    assert (caught.value.hook, caught.value.write) == ("a", f"hooks(step, state, my_{name}=...)")


@pytest.mark.parametrize("value", [{"a": "text"}, ["text"], {}, [], {"a": {1, 2}}])
def test_an_input_that_is_neither_numbers_nor_hashable(value):
    with pytest.raises(InputError, match="'extra' is neither made of arrays and numbers nor hashable") as caught:
        make_hooks(lambda w, extra: w)(1, make_state(1), extra=value)
    assert caught.value.found == type(value).__name__


@dataclasses.dataclass(frozen=True)
class Unhashable:
    factors: Any

    def __call__(self, w):
        return w * self.factors[0]


def test_surgeries_need_not_be_hashable():
    surgery = Unhashable([3.0])
    assert w_of(make_hooks(surgery)(1, make_state(1))) == [3, 3]
    assert w_of(fsh.operate(make_state(), surgery)[0]) == [3, 3]
