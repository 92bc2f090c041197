"""Fires that take the memory of the old leaves for the new ones: what is gone then, what is not, and when they do."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import assert_bitwise_equal, halve

import flax_surgery_hooks as fsh
from flax_surgery_hooks import donation
from flax_surgery_hooks.errors import UserCodeError

ADAM = optax.adam(0.1)


def make_state(step=1):
    params = {"w": jnp.arange(12.0).reshape(3, 4), "v": jnp.ones(4)}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=ADAM)
    return jax.tree.map(jnp.copy, state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))).replace(step=step)


def make_hooks(surgery=halve, donate="always", **options):
    hooks = fsh.SurgeryHooks(donate=donate)
    hooks.add("a", surgery, params="w", when=fsh.every(1), **options)
    return hooks


def copied(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def deleted(tree):
    return [leaf.is_deleted() for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


@pytest.mark.parametrize("options", [{}, {"guard": "off", "figures": False}, {"opt_state": "transport"}])
def test_a_donating_fire_does_the_same_bit_for_bit_and_takes_what_it_edits_only(options):
    expected = make_hooks(donate="never", **options)(1, make_state())
    state = make_state()
    adam = state.opt_state[0]
    hooks = make_hooks(**options)
    after = hooks(1, state)
    assert_bitwise_equal(after, expected)
    assert deleted((state.params["w"], adam.mu["w"], adam.nu["w"])) == [True] * 3
    assert after.params["v"] is state.params["v"]
    assert not any(deleted((state.params["v"], adam.mu["v"], adam.nu["v"], adam.count)))
    assert hooks.ledger.records[-1].donated
    assert '"donated": true' in hooks.ledger.records[-1].to_json()


@pytest.mark.parametrize("donate", ["auto", "never"])
def test_without_need_nothing_is_taken(donate):
    state = make_state()
    hooks = make_hooks(donate=donate)
    hooks(1, state)
    assert not any(deleted(state))
    assert not hooks.ledger.records[-1].donated
    assert "donated" not in hooks.ledger.records[-1].to_json()


def test_auto_takes_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(donation, "_free", lambda device: 100)  # CPU does not tell its free memory
    for count, taken in ((20, False), (40, True)):
        state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(count)}, tx=optax.sgd(0.1)).replace(step=1)
        hooks = make_hooks(donate="auto")
        hooks(1, state)
        assert state.params["w"].is_deleted() == taken == hooks.ledger.records[-1].donated


def test_a_refused_donating_fire_keeps_the_old_values():
    state, spoil = make_state(), lambda w: w / 0
    expected = copied(state)
    hooks = fsh.SurgeryHooks(donate="always", on_error="skip")
    hooks.add("a", spoil, params="w", when=fsh.at(1))
    assert_bitwise_equal(copied(hooks(1, state)), expected)


def test_leaves_that_share_their_memory_stay_whole():
    state = make_state()
    shared = state.replace(surgery={"start": state.params["w"]})
    after = make_hooks()(1, shared)
    np.testing.assert_array_equal(shared.surgery["start"] / 2, after.params["w"])
    assert after.surgery["start"] is state.params["w"]


def test_a_state_that_is_no_pytree_is_looked_through_as_well():
    class Plain:
        step = 1

        def __init__(self, **fields):
            self.__dict__.update(fields)

        def replace(self, **changes):
            return Plain(**{**self.__dict__, **changes})

    w = jnp.arange(3.0)
    params = {"v": w, "w": w}
    hooks = fsh.SurgeryHooks(donate="always")
    hooks.add("a", lambda leaves: {path: leaf / 2 for path, leaf in leaves.items()}, params="*", when=fsh.at(1))
    tx = optax.sgd(0.1)
    after = hooks(1, Plain(params=params, opt_state=tx.init(params), tx=tx))
    assert after.params["v"].tolist() == after.params["w"].tolist() == [0, 0.5, 1]


def test_prodigy_which_holds_its_first_parameters_can_be_edited():
    tx = optax.contrib.prodigy(0.1)
    params = {"w": jnp.arange(3.0)}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx).replace(step=1)
    hooks = fsh.SurgeryHooks(donate="always")
    hooks.add("a", halve, params="w", when=fsh.at(1), opt_state="keep")
    after = hooks(1, state)
    np.testing.assert_array_equal(after.params["w"], [0, 0.5, 1])
    assert not any(deleted(after))


def test_only_the_last_fire_of_a_call_takes_what_the_caller_holds():
    state = make_state()
    expected = copied(state)

    def fail(w, mode):
        if mode == "fail":
            raise ValueError("no luck")
        return w * 1

    hooks = make_hooks()
    hooks.add("b", fail, params="w", when=fsh.every(1))
    with pytest.raises(UserCodeError):
        hooks(1, state, mode="fail")
    assert_bitwise_equal(copied(state), expected)
    after = hooks(1, state, mode="fine")
    assert not any(deleted(after))
    assert [r.donated for r in hooks.ledger.records if r.event == "fired"] == [False, True]


def test_a_preview_a_change_of_shape_and_operate_take_nothing():
    state = make_state()
    hooks = make_hooks()
    hooks.preview("a", state)
    fsh.operate(state, halve, params="w")
    growing = make_hooks(lambda w: jnp.concatenate([w, w]), on_reshape=lambda state, record: None)
    growing(1, state)
    assert not any(deleted(state))
    assert not growing.ledger.records[-1].donated


def test_histograms_are_of_the_leaves_before(tmp_path):
    from flax_surgery_hooks.writers import EventFileWriter

    writer = EventFileWriter(tmp_path)
    hooks = fsh.SurgeryHooks(donate="always", writer=writer)
    hooks.add("a", halve, params="w", when=fsh.at(1), histograms=True)
    hooks(1, make_state())
    hooks.flush()
    writer.close()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves_are_taken_too(axis_type):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "d"))
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda leaf: jax.device_put(leaf, sharding if jnp.shape(leaf) == (3, 4) else whole)  # noqa: E731
    state = jax.tree.map(place, make_state())
    expected = make_hooks(donate="never")(1, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among them that a donated buffer could not be used
        after = make_hooks()(1, state)
    assert_bitwise_equal(after, expected)
    assert after.params["w"].sharding == sharding
    assert state.params["w"].is_deleted()


def test_an_nnx_model_holds_the_new_values():
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = np.asarray(model.kernel[...]).copy()
    hooks = fsh.SurgeryHooks(donate="always")
    hooks.add("a", halve, params="kernel", when=fsh.at(0))
    hooks(0, fsh.bind_nnx(model, optimizer))
    np.testing.assert_array_equal(model.kernel[...], before / 2)


def test_leaves_of_numpy_and_numbers_cannot_be_taken():
    params = {"w": np.ones(3, np.float32), "v": 2.0}
    tx = optax.sgd(0.1)
    hooks = fsh.SurgeryHooks(donate="always")
    hooks.add("a", halve, params="*", when=fsh.at(1))
    after = hooks(1, fsh.bind(params=params, opt_state=tx.init(params), tx=tx))
    np.testing.assert_array_equal(after.params["w"], 0.5)
    assert params["w"].tolist() == [1, 1, 1]
