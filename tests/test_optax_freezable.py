"""Frozen parameters: nothing of them moves, and everything else goes as if they were not there."""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax import contrib
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks import slots
from flax_surgery_hooks.errors import StateError
from flax_surgery_hooks.optax import FreezableState, freezable, rewarm, scale_by_adam_per_element
from flax_surgery_hooks.paths import flatten

ADAMW = optax.adamw(0.1, weight_decay=0.1)
HELD = "held"  # name of the leaf that gets frozen; no state has such a field


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    held = rng.normal(size=(4, 3))
    held[0] = [-0.0, 0.0, 1e-30]
    tree = {"a": {"bias": rng.normal(size=3), HELD: held}, "free": rng.normal(size=(2, 5))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def gradients(params, step):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    drawn = [jax.random.normal(key, jnp.shape(leaf), leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def is_held(keys):
    return any(getattr(key, "key", None) == HELD for key in keys)


def flags(params, which=is_held):
    return jax.tree_util.tree_map_with_path(lambda keys, _: jnp.array(which(keys)), params)


def is_freezable(node):
    return isinstance(node, FreezableState)


def freeze(opt_state, which=is_held):
    """The state with the flags of the `freezable` inside it set."""

    def set_flags(node):
        return node._replace(frozen=flags(node.frozen, which)) if is_freezable(node) else node

    return jax.tree.map(set_flags, opt_state, is_leaf=is_freezable)


def run(tx, params, state, steps, grads=gradients, compiled=True, **extra):
    """Params and state after these steps.

    Two optimizers that do the same are bitwise equal only operation by operation: a compiler fuses a product with the
    sum that comes next, if nothing stands between them.
    """

    def step(params, state, grads):
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    for number in steps:
        params, state = step(params, state, grads(params, number))
    return params, state


def bits(tree, which=is_held):
    items = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys): np.asarray(leaf).tobytes() for keys, leaf in items if which(keys)}


def what_moved(tx, params, **extra):
    """Names of the params and slots of the held leaf that change over 20 steps after it was frozen at step 5."""
    params, state = run(tx, params, tx.init(params), range(5), **extra)
    frozen = freeze(state)
    assert bits(frozen) != bits(state)
    after = run(tx, params, frozen, range(5, 25), **extra)
    before = bits((params, frozen))
    return sorted(name for name, held in bits(after).items() if held != before[name])


def wrong(keep_updates, keep_slots):
    """A `freezable` that sets gradients to 0, and does only half of the rest."""

    def wrapped(tx):
        right = freezable(tx)

        def update(updates, state, params=None):
            def seen(tree):
                return jax.tree.map(lambda g, frozen: jnp.where(frozen, 0, g), tree, state.frozen)

            moved, inner = tx.update(seen(updates), state.inner_state, params)
            returned, kept = right.update(updates, state, params)
            return returned if keep_updates else moved, kept if keep_slots else state._replace(inner_state=inner)

        return optax.GradientTransformation(right.init, update)

    return wrapped


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_frozen_leaf_and_its_slots_are_bitwise_constant(dtype):
    assert what_moved(freezable(ADAMW), make_params(dtype)) == []


def test_gradients_of_zero_alone_do_not_freeze():
    moved = what_moved(wrong(False, False)(ADAMW), make_params())
    assert len(moved) == 3  # the parameter, by momentum and decay, and both moments
    assert len(what_moved(wrong(True, False)(ADAMW), make_params())) == 2
    assert len(what_moved(wrong(False, True)(ADAMW), make_params())) == 1


def test_an_update_of_zero_would_change_a_negative_zero():
    params = {HELD: jnp.array([-0.0])}
    tx = freezable(ADAMW)
    updates, _ = tx.update(params, freeze(tx.init(params)), params)
    assert np.signbit(updates[HELD]).all()
    assert bits(optax.apply_updates(params, updates)) == bits(params)
    assert bits(optax.apply_updates(params, {HELD: jnp.zeros(1)})) != bits(params)


@pytest.mark.parametrize("value", [-0.0, 0.0, 1e-42, -1e-42, np.inf, -np.inf, np.nan, 3.4e38])
def test_a_frozen_value_stays_what_it_is(value):
    params = {HELD: jnp.full(3, value, jnp.float32), "free": jnp.ones(3)}
    assert what_moved(freezable(optax.sgd(0.1)), params) == []


def test_all_else_goes_as_without_the_frozen_leaf():
    params = make_params()
    alone = {"a": {"bias": params["a"]["bias"]}, "free": params["free"]}

    def of_alone(_, step):
        grads = gradients(params, step)
        return {"a": {"bias": grads["a"]["bias"]}, "free": grads["free"]}

    after, state = run(freezable(ADAMW), params, freeze(freezable(ADAMW).init(params)), range(20), compiled=False)
    expected, expected_state = run(ADAMW, alone, ADAMW.init(alone), range(20), of_alone, compiled=False)
    del after["a"][HELD]
    assert_bitwise_equal(after, expected)
    adam = state.inner_state[0]
    for slot in (adam.mu, adam.nu):
        del slot["a"][HELD]
    assert_bitwise_equal(tuple(adam), tuple(expected_state[0]))


def test_a_thawed_leaf_goes_on_with_its_old_slots():
    tx, params = freezable(ADAMW), make_params()
    params, state = run(tx, params, tx.init(params), range(5))
    middle, frozen = run(tx, params, freeze(state), range(5, 12))
    after, end = run(tx, middle, freeze(frozen, lambda keys: False), range(12, 20), compiled=False)
    adam, then = state.inner_state[0], frozen.inner_state[0]
    assert then.count == 12

    def as_held(old, new):
        return jax.tree_util.tree_map_with_path(lambda keys, a, b: a if is_held(keys) else b, old, new)

    plain = (then._replace(mu=as_held(adam.mu, then.mu), nu=as_held(adam.nu, then.nu)), *frozen.inner_state[1:])
    expected, expected_state = run(ADAMW, as_held(params, middle), plain, range(12, 20), compiled=False)
    assert_bitwise_equal((after, end.inner_state), (expected, expected_state))
    assert bits(after) != bits(middle)


def test_what_is_not_frozen_at_all_is_the_inner_optimizer():
    tx, params = freezable(ADAMW), make_params()
    after, state = run(tx, params, tx.init(params), range(10), compiled=False)
    assert_bitwise_equal((after, state.inner_state), run(ADAMW, params, ADAMW.init(params), range(10), compiled=False))


# Any optimizer


class Odd(typing.NamedTuple):
    mine: typing.Any
    total: typing.Any


def odd():
    """An optimizer whose states nobody has registered: a class of its own, holding a dict with tuples at the leaves."""

    def init(params):
        return Odd({"sums": jax.tree.map(lambda p: (jnp.zeros_like(p), jnp.zeros(())), params)}, jnp.zeros(()))

    def update(updates, state, params=None):
        del params

        def added(g, sums):
            return sums[0] + g, sums[1] + jnp.abs(g).sum()

        sums = jax.tree.map(added, updates, state.mine["sums"])
        return jax.tree.map(lambda g, held: held[0], updates, sums), Odd({"sums": sums}, state.total + 1)

    return optax.GradientTransformation(init, update)


def stateless_class():
    """An optimizer whose state is the bare tree of sums."""

    def update(updates, state, params=None):
        del params
        sums = jax.tree.map(jnp.add, state, updates)
        return sums, sums

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def loss(params):
    return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))


OPTIMIZERS = {
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2, weight_decay_rate=0.1, momentum=0.9),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "dog": lambda: contrib.dog(0.1),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=optax.constant_schedule(0.1)),
    "lbfgs": lambda: optax.lbfgs(),
    "lion": lambda: optax.lion(0.1),
    "masked": lambda: optax.masked(ADAMW, {"a": True, "free": False}),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "multi_steps": lambda: optax.MultiSteps(ADAMW, 2).gradient_transformation(),
    "muon": lambda: contrib.muon(0.1, weight_decay=0.1),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "odd": odd,
    "bare": stateless_class,
    "partition": lambda: optax.partition({"free": ADAMW, "a": optax.lion(0.1)}, {"a": "a", "free": "free"}),
    "prodigy": lambda: contrib.prodigy(weight_decay=0.1),
    "schedule_free": lambda: contrib.schedule_free_adamw(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "twice": lambda: freezable(ADAMW),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_nothing_of_a_frozen_leaf_moves_under_any_optimizer(name):
    tx, params = OPTIMIZERS[name](), make_params()
    extra = {"value": loss(params), "grad": jax.grad(loss)(params), "value_fn": loss}
    assert what_moved(freezable(tx), params, **extra) == []
    params, state = run(tx, params, tx.init(params), range(5), **extra)
    after = run(tx, params, state, range(5, 25), **extra)
    assert [held for name, held in bits(after).items() if held != bits((params, state))[name]], "else it tests nothing"


def test_counts_and_what_belongs_to_no_leaf_go_on():
    tx, params = freezable(odd()), make_params()
    _, state = run(tx, params, freeze(tx.init(params)), range(7))
    assert state.inner_state.total == 7
    sums = state.inner_state.mine["sums"]
    assert (np.asarray(sums["a"][HELD][0]) == 0).all()
    assert sums["a"][HELD][1] == 0
    assert sums["free"][1] > 0


def test_a_clip_by_the_global_norm_does_not_see_a_frozen_leaf():
    tx = freezable(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    grads = {HELD: jnp.full(2, jnp.nan), "free": jnp.array([3.0, 4.0])}
    updates, _ = tx.update(grads, freeze(tx.init(grads)), grads)
    np.testing.assert_allclose(updates["free"], [-0.6, -0.8], rtol=1e-6)
    blind = wrong(True, True)(optax.identity())  # around the clip it would be right; behind it, it comes too late
    late = optax.chain(optax.clip_by_global_norm(1.0), blind)
    assert np.isnan(late.update(grads, freeze(late.init(grads)), grads)[0]["free"]).all()


def test_an_inner_update_of_nan_does_not_reach_a_frozen_leaf():
    tx, params = freezable(optax.chain(ADAMW, optax.stateless(lambda u, _: jax.tree.map(jnp.log, u)))), make_params()
    after, _ = run(tx, params, freeze(tx.init(params)), range(2))
    assert bits(after) == bits(params)
    assert np.isnan(after["free"]).any()


def test_the_transforms_are_there_when_they_are_asked_for():
    assert fsh.optax.freezable is freezable
    assert fsh.optax.rewarm is rewarm


def test_extra_arguments_reach_the_inner_optimizer():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params = freezable(inner), make_params()
    tx.update(params, tx.init(params), params, value=1, grad=params, value_fn=loss)
    assert seen == {"value": 1, "grad": params, "value_fn": loss}


# Inside other transforms

OUTER = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"a": {"bias": False, HELD: True}, "free": True}),
    "injected": lambda tx: optax.inject_hyperparams(lambda rate: freezable(optax.adamw(rate)))(rate=0.1),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
}


@pytest.mark.parametrize("name", OUTER)
def test_it_freezes_inside_other_transforms(name):
    params = jax.tree.map(lambda leaf: leaf + 0.0, make_params())  # without -0.0, which MultiSteps does not leave alone
    tx = OUTER[name](freezable(ADAMW))
    params, state = run(tx, params, tx.init(params), range(6))
    after, end = run(tx, params, freeze(state), range(6, 20))
    assert bits(after) == bits(params)
    inner, inner_end = (
        [node.inner_state for node in jax.tree.leaves(tree, is_leaf=is_freezable) if is_freezable(node)]
        for tree in (state, end)
    )
    assert bits(inner)
    assert bits(inner) == bits(inner_end)
    assert bits(after, lambda keys: not is_held(keys)) != bits(params, lambda keys: not is_held(keys))


def test_holes_stay_holes():
    params = {"a": optax.MaskedNode(), "b": None, "c": jnp.ones(2)}
    state = freezable(ADAMW).init(params)
    assert state.frozen["a"] == optax.MaskedNode()
    assert state.frozen["b"] is None
    assert (state.frozen["c"].shape, state.frozen["c"].dtype) == ((), bool)


# Containers


class Model(nnx.Module):
    def __init__(self):
        self.held = nnx.Param(jnp.array([-0.0, 1.0, 2.0]))
        self.free = nnx.Param(jnp.ones((2, 3)))


FLAT = {HELD: jnp.array([-0.0, 1.0, 2.0]), "free": jnp.ones((2, 3))}
CONTAINERS = {
    "frozen": lambda: FrozenDict(FLAT),
    "partitioned": lambda: jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), FLAT),
    "logically": lambda: jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, (None,) * leaf.ndim), FLAT),
    "nnx": lambda: nnx.state(Model(), nnx.Param),
    "list": lambda: [{HELD: FLAT[HELD]}, FLAT["free"]],
}


def key_paths(tree):
    return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


@pytest.mark.parametrize("name", CONTAINERS)
def test_it_freezes_in_every_container(name):
    params = CONTAINERS[name]()
    assert len(bits(params)) == 1
    tx = freezable(ADAMW)
    state = tx.init(params)
    assert key_paths(state.frozen) == key_paths(params)
    assert what_moved(tx, params) == []


TRANSFORMS = [freezable(optax.adam(0.1)), rewarm(3), scale_by_adam_per_element(per="unit"), scale_by_adam_per_element()]


@pytest.mark.parametrize("tx", TRANSFORMS)
def test_boxes_that_name_mesh_axes_do_not_shard_scalars(tx):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    params = {"w": nn.Partitioned(jnp.ones((16, 3)), ("d", None)), "v": nn.Partitioned(jnp.ones(8), ("d",))}
    shardings = nn.get_sharding(jax.eval_shape(tx.init, params), mesh)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    updates, after = jax.jit(tx.update)(params, state)
    assert jax.tree.structure((updates, after)) == jax.tree.structure((params, state))


@pytest.mark.parametrize("tx", TRANSFORMS)
def test_variables_that_name_mesh_axes_do_not_shard_scalars(tx):
    kernel = nnx.with_partitioning(nnx.initializers.ones, ("d", None))
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))):
        model = nnx.Linear(16, 3, use_bias=False, kernel_init=kernel, rngs=nnx.Rngs(0))
        [before] = jax.tree.leaves(nnx.state(model))
        optimizer = nnx.Optimizer(model, optax.chain(tx, optax.scale(-1.0)), wrt=nnx.Param)
        optimizer.update(model, nnx.state(model, nnx.Param))
        [after] = jax.tree.leaves(nnx.state(model))
    assert after.sharding.is_equivalent_to(before.sharding, 2)
    assert (after != before).all()


@pytest.mark.parametrize("params", [jnp.array([-0.0, 1.0]), jnp.float32(-0.0)])
def test_one_bare_array_is_frozen_with_its_slots_but_not_the_counts(params):
    tx = freezable(optax.inject_hyperparams(optax.adamw)(0.1))
    params, state = run(tx, params, tx.init(params), range(3))
    after, end = run(tx, params, freeze(state, lambda keys: True), range(3, 9))
    assert_bitwise_equal(after, params)
    adam, adam_end = state.inner_state.inner_state[0], end.inner_state.inner_state[0]
    assert_bitwise_equal((adam.mu, adam.nu), (adam_end.mu, adam_end.nu))
    assert (adam_end.count, end.inner_state.count) == (9, 9)


# Compiled and sharded


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_flags_retrace_nothing_and_shardings_stay(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    params = {HELD: jnp.full((16, 2), -0.0), "free": jnp.ones((8, 4))}
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), params)
    grads = jax.tree.map(lambda leaf: leaf + 1, params)
    tx, traces = freezable(ADAMW), []

    @jax.jit
    def step(params, state, grads):
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        moved, state = step(params, jax.jit(tx.init)(params), grads)
        moved, state = step(moved, state, grads)  # of which everything is on the mesh
        count = len(traces)
        flag = jax.device_put(np.array(True), state.frozen[HELD].sharding)
        frozen = state._replace(frozen=state.frozen | {HELD: flag})
        after, end = step(moved, frozen, grads)
    assert len(traces) == count
    adam = end.inner_state[0]
    assert all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in jax.tree.leaves((after, adam.mu, adam.nu)))
    assert bits(after) == bits(moved) != bits(params)
    assert bits(end) == bits(frozen)


def test_it_works_abstractly_and_under_vmap():
    tx, params = freezable(ADAMW), make_params()
    abstract = jax.eval_shape(tx.init, params)
    updates, state = jax.eval_shape(tx.update, params, abstract, params)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), params)
    states = jax.vmap(tx.init)(many)
    assert jax.vmap(tx.update)(many, states, many)[1].frozen["free"].shape == (2,)


def test_surgery_on_a_freezable_optimizer_moves_its_slots_and_leaves_the_flags():
    tx, params = freezable(ADAMW), make_params()
    params, state = run(tx, params, tx.init(params), range(3))
    state = freeze(state)
    bound = fsh.bind(params=params, opt_state=state, tx=tx)
    after, _ = fsh.operate(bound, lambda leaf: leaf * 2, params="a/held", opt_state="transport")
    assert_bitwise_equal(after.opt_state.frozen, state.frozen)
    old, new = state.inner_state[0], after.opt_state.inner_state[0]
    assert_bitwise_equal(new.mu["a"][HELD], old.mu["a"][HELD] / 2)
    assert_bitwise_equal(new.nu["a"][HELD], old.nu["a"][HELD] / 4)
    longer, _ = fsh.operate(bound, lambda leaf: jnp.concatenate([leaf, 0 * leaf]), params="a/held")
    assert jax.tree.structure(longer.opt_state) == jax.tree.structure(tx.init(longer.params))
    assert longer.opt_state.frozen["a"][HELD]


# Which slot belongs to which parameter

COLLIDING = {"kernel": jnp.ones(2), "a": {"kernel": jnp.ones(3)},
             "mu": {"kernel": jnp.ones(4), "a": {"kernel": jnp.ones(5)}}}  # fmt: skip


def test_owners_are_told_apart_by_whole_paths():
    state = optax.adam(0.1).init(COLLIDING)
    leaves, owned = jax.tree.leaves(COLLIDING), slots.owners_of(state, COLLIDING)
    held = jax.tree.leaves(state)
    assert [held[i].shape for i in owned] == [leaves[owner].shape for owner in owned.values()]
    assert sorted(owned) == list(range(1, 9))


@pytest.mark.parametrize("name", ["amsgrad", "dog", "injected", "lion", "masked", "momentum", "multi_steps", "muon",
                                  "partition", "prodigy", "schedule_free"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_owners_are_those_of_the_slots_that_surgeries_move(name):
    tx, params = OPTIMIZERS[name](), make_params()
    state = jax.eval_shape(tx.init, params)
    moved = slots.slots_of(tx, state, flatten(params))
    owned = slots.owners_of(state, params)
    assert {slot.index: owner for owner, mine in moved.items() for slot in mine} == owned


def test_slots_in_one_vector_for_all_are_kept_too():
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2)), "c": jnp.ones(3)}
    tx = fsh.optax.freezable(optax.flatten(optax.adam(0.1)))
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    state = state._replace(frozen={**state.frozen, "b": jnp.array(True)})
    updates, after = tx.update(grads, state, params)
    before_mu, mu = state.inner_state[0].mu, after.inner_state[0].mu
    assert jnp.array_equal(mu[2:6], before_mu[2:6])
    assert (mu[:2] != before_mu[:2]).all()
    assert (mu[6:] != before_mu[6:]).all()
    assert not updates["b"].any()


def test_a_function_that_makes_an_optimizer_is_none():
    with pytest.raises(StateError, match=r"freezable wraps an optax transformation\. Found: adam") as caught:
        fsh.optax.freezable(optax.adam)
    assert caught.value.write == "fsh.optax.freezable(optax.adamw(1e-3))"
