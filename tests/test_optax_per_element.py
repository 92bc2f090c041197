"""Adam with a count per element: Adam itself where nothing is edited, and Adam from its first step where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import assert_bitwise_equal

from flax_surgery_hooks.errors import RuleError
from flax_surgery_hooks.optax import (
    ScaleByAdamPerElementState,
    adam_per_element,
    adamw_per_element,
    scale_by_adam_per_element,
)

PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3), "scale": jnp.ones(())}


def gradients(step, dtype=np.float64):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=leaf.shape), dtype) for name, leaf in PARAMS.items()}


def trained(tx, state, steps, dtype=np.float64):
    """The state after these steps, and the updates of each."""
    updates = []
    step = jax.jit(tx.update)
    for number in steps:
        update, state = step(gradients(number, dtype), state)
        updates.append(update)
    return state, updates


def assert_close(a, b, rtol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-300)


OPTIONS = {
    "plain": {},
    "betas": {"b1": 0.5, "b2": 0.95},
    "no_momentum": {"b1": 0.0},
    "eps": {"eps": 1e-2, "eps_root": 1e-3},
    "mu_dtype": {"mu_dtype": jnp.float32},
    "nesterov": {"nesterov": True},
    "all": {"b1": 0.8, "b2": 0.99, "eps": 1e-4, "eps_root": 1e-6, "mu_dtype": jnp.float32, "nesterov": True},
}


@pytest.mark.parametrize("per", ["element", "unit"])
@pytest.mark.parametrize("name", OPTIONS)
def test_without_surgery_it_is_adam(name, per, x64):
    options = OPTIONS[name]
    tx, plain = scale_by_adam_per_element(**options, per=per), optax.scale_by_adam(**options)
    params = gradients(0)
    state, updates = trained(tx, tx.init(params), range(50))
    expected_state, expected = trained(plain, plain.init(params), range(50))
    assert_close(updates, expected, 1e-12)
    assert_close((state.mu, state.nu), (expected_state.mu, expected_state.nu), 1e-12)
    assert [mu.dtype for mu in state.mu.values()] == [mu.dtype for mu in expected_state.mu.values()]
    assert all((age == 50).all() for age in jax.tree.leaves(state.age))
    other, changed = trained(optax.scale_by_adam(b2=0.9), plain.init(params), range(50))
    assert other
    assert not np.allclose(updates[-1]["kernel"], changed[-1]["kernel"], rtol=1e-6), "the comparison sees a wrong decay"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_surgery_it_is_adam_in_the_usual_precision(dtype):
    tx, plain = scale_by_adam_per_element(), optax.scale_by_adam()
    params = gradients(0, dtype)
    (state, updates), (_, expected) = (trained(one, one.init(params), range(30), dtype) for one in (tx, plain))
    assert_close(updates, expected, 1e-5 if dtype == jnp.float32 else 1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, state.mu, state.nu))} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.age)} == {jnp.dtype(jnp.float32)}


CHOSEN = np.zeros((4, 3), bool)
CHOSEN[[0, 2, 3], [1, 0, 2]] = True
UNITS = np.broadcast_to(np.array([False, True, False]), (4, 3))


def restart(state, chosen, ages):
    """The state with moments and ages of these elements of the kernel set to 0."""

    def cleared(tree, where):
        return tree | {"kernel": jnp.where(where, jnp.zeros((), tree["kernel"].dtype), tree["kernel"])}

    return ScaleByAdamPerElementState(cleared(state.age, ages), cleared(state.mu, chosen), cleared(state.nu, chosen))


def kernels(updates, where):
    return np.stack([np.asarray(update["kernel"])[where] for update in updates])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("per", "chosen", "ages"), [("element", CHOSEN, CHOSEN), ("unit", UNITS, UNITS[:1]), ("element", UNITS, UNITS)]
)
def test_an_element_set_to_zero_goes_on_as_one_that_starts_there(per, chosen, ages, nesterov, dtype):
    tx = scale_by_adam_per_element(per=per, nesterov=nesterov)
    start = tx.init(gradients(0, dtype))
    middle, _ = trained(tx, start, range(1000, 1100), dtype)
    _, updates = trained(tx, restart(middle, chosen, ages), range(50), dtype)
    _, as_new = trained(tx, start, range(50), dtype)
    _, as_old = trained(tx, middle, range(50), dtype)
    assert_bitwise_equal(kernels(updates, chosen), kernels(as_new, chosen))
    assert_bitwise_equal(kernels(updates, ~chosen), kernels(as_old, ~chosen))
    assert_bitwise_equal([u["bias"] for u in updates], [u["bias"] for u in as_old])


def test_with_one_count_for_all_an_element_set_to_zero_overshoots():
    plain, tx = optax.scale_by_adam(), scale_by_adam_per_element()
    grads, zeros = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    aged = plain.init(grads)._replace(count=jnp.int32(100_000))
    sizes = []
    for _ in range(12):
        update, aged = plain.update(grads, aged)
        sizes.append(float(update["w"][0]))
    np.testing.assert_allclose([sizes[0], sizes[-1]], [0.1 / np.sqrt(0.001), 6.57], rtol=1e-3)
    update, _ = tx.update(grads, ScaleByAdamPerElementState(zeros, zeros, zeros))
    np.testing.assert_allclose(update["w"], 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("per", "shapes"),
    [
        ("element", {"kernel": (4, 3), "bias": (3,), "scale": ()}),
        ("unit", {"kernel": (1, 3), "bias": (3,), "scale": ()}),
    ],
)
def test_ages_broadcast_against_the_leaf(per, shapes):
    state = scale_by_adam_per_element(per=per).init(PARAMS)
    assert jax.tree.map(jnp.shape, state.age, is_leaf=lambda x: hasattr(x, "shape")) == shapes


def test_holes_stay_holes_and_complex_leaves_work():
    params = {"a": optax.MaskedNode(), "b": None, "c": jnp.ones(2), "z": jnp.array([1 + 2j, -1j])}
    tx, plain = scale_by_adam_per_element(), optax.scale_by_adam()
    updates, state = tx.update(params, tx.init(params))
    assert_close(updates, plain.update(params, plain.init(params))[0], 1e-6)
    assert state.age["b"] is None


def test_an_age_stands_still_before_it_is_inexact():
    params = {"w": jnp.ones(2)}
    tx = scale_by_adam_per_element()
    state = tx.init(params)._replace(age={"w": jnp.array([2.0**24, 2.0**24 - 1])})
    updates, state = tx.update(params, state)
    np.testing.assert_array_equal(state.age["w"], 2.0**24)
    np.testing.assert_allclose(updates["w"], 0.1 / np.sqrt(0.001), rtol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adam_per_element(0.1, b2=0.95), optax.adam(0.1, b2=0.95)),
        (
            adamw_per_element(0.1, weight_decay=0.3, mask={"kernel": True, "bias": False, "scale": False}),
            optax.adamw(0.1, weight_decay=0.3, mask={"kernel": True, "bias": False, "scale": False}),
        ),
        (optax.inject_hyperparams(adam_per_element)(0.1, b1=0.8), optax.inject_hyperparams(optax.adam)(0.1, b1=0.8)),
    ],
)
def test_the_optimizers_are_those_of_optax(ours, theirs):
    state, expected_state = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(5):
        grads = gradients(step, np.float32)
        updates, state = ours.update(grads, state, PARAMS)
        expected, expected_state = theirs.update(grads, expected_state, PARAMS)
        assert_close(updates, expected, 2e-5)


def test_sharded_it_keeps_shardings():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    params = {"w": jax.device_put(jnp.arange(32.0).reshape(16, 2), sharding)}
    tx = scale_by_adam_per_element()
    updates, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params))
    assert all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in jax.tree.leaves((updates, state)))
    on_one = jax.device_put(params, jax.devices()[0])
    assert_close(jax.device_get(updates), jax.device_get(tx.update(on_one, tx.init(on_one))[0]), 1e-6)


def test_an_unknown_per_is_named():
    with pytest.raises(RuleError, match=r"Unknown `per=`.*'units'.*one of unit"):
        scale_by_adam_per_element(per="units")
