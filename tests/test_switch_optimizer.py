"""Another optimizer in the middle of a run: against that optimizer with moments set by hand, in float64."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib
from raised import Case
from tiny import MOMENTUM, assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.paths import flatten
from flax_surgery_hooks.slot_gain import responses
from flax_surgery_hooks.slots import slots_of
from flax_surgery_hooks.surgeries import Scale, SwitchOptimizer

B1 = 0.9
ADAM = optax.adam(0.1, b1=B1)


def grads_at(params, step):
    keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(3), step), 8))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape, p.dtype), params)


def trained(tx, steps=5, dtype=None, place=None):
    params = {"kernel": jnp.ones((4, 8), dtype), "bias": jnp.full(8, 0.5, dtype or jnp.float32)}
    params = params if place is None else jax.tree.map(place, params)
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)
    for step in range(steps):
        state = state.apply_gradients(grads=grads_at(params, step))
    return state


def switched(state, tx, **fields):
    """The state under the new optimizer, and what the record says."""
    new, record = fsh.operate(state, SwitchOptimizer(tx, **fields))
    assert new.tx is tx
    assert_bitwise_equal(new.params, state.params)
    return new, json.loads(record.detail) if record.detail else {}


def next_update(state):
    return state.tx.update(grads_at(state.params, 100), state.opt_state, state.params)[0]


def assert_equal(a, b, tolerance=1e-15):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=0)


@pytest.mark.usefixtures("x64")
class TestExactly:
    """Against moments set by hand; the tolerance is a few units in the last place."""

    def test_from_adam_to_momentum(self):
        state, tx = trained(ADAM, dtype=jnp.float64), optax.sgd(0.1, momentum=B1)
        new, told = switched(state, tx)
        trace = jax.tree.map(lambda mu: mu / (1 - B1), state.opt_state[0].mu)
        by_hand = state.replace(tx=tx, opt_state=(optax.TraceState(trace), *tx.init(state.params)[1:]))
        assert_equal(next_update(new), next_update(by_hand))
        uncorrected = state.replace(tx=tx, opt_state=(optax.TraceState(state.opt_state[0].mu), *new.opt_state[1:]))
        with pytest.raises(AssertionError):
            assert_equal(next_update(uncorrected), next_update(by_hand), 0.1)
        assert told["carried"] == {
            "ScaleByAdamState.mu -> TraceState.trace": {"factor": pytest.approx(10, rel=1e-15), "leaves": 2}
        }
        assert (told["initialised"], told["counts"]) == ({}, {})

    def test_a_momentum_run_from_the_start_is_reached(self):
        """The trace that the switch makes is that of SGD on the same gradients, as both are linear in them."""
        state = trained(ADAM, dtype=jnp.float64)
        new, _ = switched(state, optax.sgd(0.1, momentum=B1))
        rows = [grads_at(state.params, step)["kernel"] for step in range(5)]
        trace = sum(B1 ** (4 - step) * np.asarray(row) for step, row in enumerate(rows))
        np.testing.assert_allclose(new.opt_state[0].trace["kernel"], trace, rtol=1e-12)

    def test_and_back(self):
        state = trained(ADAM, dtype=jnp.float64)
        there, _ = switched(state, optax.sgd(0.1, momentum=B1))
        back, told = switched(there, ADAM)
        assert_equal(back.opt_state[0].mu, state.opt_state[0].mu)
        assert not np.asarray(back.opt_state[0].nu["bias"]).any()
        assert told["initialised"] == {"ScaleByAdamState.nu": 2}

    @pytest.mark.parametrize("b2", [0.9, 0.99])
    def test_between_adam_and_lion(self, b2):
        state, tx = trained(ADAM, dtype=jnp.float64), optax.lion(0.1, b2=b2)
        new, told = switched(state, tx)
        assert new.opt_state[0].mu["kernel"] is state.opt_state[0].mu["kernel"]
        assert int(new.opt_state[0].count) == 5
        by_hand = (optax.ScaleByLionState(jnp.int32(5), state.opt_state[0].mu), *tx.init(state.params)[1:])
        assert_equal(next_update(new), next_update(state.replace(tx=tx, opt_state=by_hand)))
        back, told = switched(new, ADAM)
        assert_bitwise_equal(back.opt_state[0].mu, state.opt_state[0].mu)
        assert told["initialised"] == {"ScaleByAdamState.nu": 2}

    def test_from_adam_to_muon(self):
        state, tx = trained(ADAM, dtype=jnp.float64), contrib.muon(0.1)
        new, told = switched(state, tx)
        parts = tx.init(state.params).inner_states
        muon, adam = parts["muon"].inner_state, parts["adam"].inner_state
        old, five = state.opt_state[0], jnp.int32(5)
        muon_mu = {"kernel": old.mu["kernel"], "bias": muon[0].mu["bias"]}
        adam_mu, adam_nu = ({"bias": m["bias"], "kernel": adam[0].mu["kernel"]} for m in (old.mu, old.nu))
        inner = {
            "muon": parts["muon"]._replace(inner_state=(muon[0]._replace(count=five, mu=muon_mu), *muon[1:])),
            "adam": parts["adam"]._replace(
                inner_state=(adam[0]._replace(count=five, mu=adam_mu, nu=adam_nu), *adam[1:])
            ),
        }
        by_hand = state.replace(tx=tx, opt_state=tx.init(state.params)._replace(inner_states=inner))
        assert_equal(next_update(new), next_update(by_hand))
        assert {name: entry["leaves"] for name, entry in told["carried"].items()} == {
            "ScaleByAdamState.mu -> MuonState.mu": 1,
            "ScaleByAdamState.mu -> ScaleByAdamState.mu": 1,
            "ScaleByAdamState.nu -> ScaleByAdamState.nu": 1,
        }

    def test_from_adam_to_schedule_free(self):
        state, tx = trained(ADAM, dtype=jnp.float64), contrib.schedule_free_adamw(0.1)
        new, told = switched(state, tx)
        assert_bitwise_equal(new.opt_state.z, state.params)
        assert all(a is not b for a, b in zip(*map(jax.tree.leaves, (new.opt_state.z, new.params)), strict=True))
        first = new.opt_state.base_optimizer_state[0]
        assert_bitwise_equal(first.nu, state.opt_state[0].nu)
        assert int(first.count) == int(new.opt_state.step_count) == 5
        start = tx.init(state.params)
        base = (start.base_optimizer_state[0]._replace(nu=state.opt_state[0].nu, count=jnp.int32(5)),)
        by_hand = start._replace(
            base_optimizer_state=base + start.base_optimizer_state[1:], step_count=jnp.asarray(5, jnp.int32)
        )
        assert_equal(next_update(new), next_update(state.replace(tx=tx, opt_state=by_hand)))
        assert told["initialised"] == {"ScheduleFreeState.z": 2}

    def test_signs_and_rates_before_the_momentum(self):
        """Momentum of what the learning rate has made: the ratio of sizes has its factor and sign."""
        state = trained(ADAM, dtype=jnp.float64)
        new, _ = switched(state, optax.chain(optax.scale(-0.1), optax.trace(0.8)))
        trace = jax.tree.map(lambda mu: -0.1 * mu / (1 - 0.8), state.opt_state[0].mu)
        assert_equal(new.opt_state[1].trace, trace, 1e-14)


def test_from_adam_to_adam_is_bitwise_and_shares_what_it_carries():
    state = trained(optax.adam(0.1))
    new, told = switched(state, optax.adam(0.2))
    leaves = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(new.opt_state), strict=True)
    assert all(old is leaf for old, leaf in leaves)
    assert told["initialised"] == {}
    assert told["counts"] == {"ScaleByAdamState": "carried"}


def test_the_same_optimizer_is_no_switch():
    state = trained(ADAM)
    new, record = fsh.operate(state, SwitchOptimizer(ADAM))
    assert (new.opt_state, record.detail) == (state.opt_state, "")
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True))


def test_what_is_unmeasured_starts_anew_and_says_so():
    state = trained(ADAM)
    for tx, names in (
        (optax.adagrad(0.1), {"ScaleByRssState.sum_of_squares"}),  # it sums, and forgets nothing
        (optax.amsgrad(0.1), {"ScaleByAmsgradState.nu_max"}),
        (optax.adabelief(0.1), {"ScaleByBeliefState.nu"}),  # squares of deviations
        (optax.MultiSteps(ADAM, 4).gradient_transformation(), {"MultiStepsState.acc_grads"}),
    ):
        new, told = switched(state, tx)
        assert set(told["initialised"]) == names
        fresh = dict(jax.tree_util.tree_leaves_with_path(tx.init(state.params)))
        field = next(iter(names)).split(".")[1]
        for keys, leaf in jax.tree_util.tree_leaves_with_path(new.opt_state):
            if any(getattr(key, "name", None) == field for key in keys):
                assert_bitwise_equal(leaf, fresh[keys])


def test_sums_are_carried_where_only_settings_differ():
    for make in (optax.adagrad, optax.adabelief, lambda rate: optax.MultiSteps(optax.sgd(rate), 4)):
        old, new = (getattr(tx, "gradient_transformation", lambda tx=tx: tx)() for tx in (make(0.1), make(0.2)))
        state = trained(old)
        after, told = switched(state, new)
        assert told["initialised"] == {}
        assert_bitwise_equal(after.opt_state, state.opt_state)  # the place within an accumulation too


def test_several_candidates_of_no_common_name_are_none():
    two = optax.chain(optax.trace(0.5), optax.trace(0.9), optax.scale(-0.1))
    _, told = switched(trained(two), ADAM)
    assert told["initialised"] == {"ScaleByAdamState.mu": 2, "ScaleByAdamState.nu": 2}
    new, told = switched(trained(two), optax.chain(optax.trace(0.5), optax.trace(0.9), optax.scale(-0.2)))
    assert told["initialised"] == {}
    ams = trained(optax.amsgrad(0.1))
    new, told = switched(ams, ADAM)  # `nu` and `nu_max` are both squares; the name decides
    assert_bitwise_equal(new.opt_state[0].nu, ams.opt_state[0].nu)


def test_counts_go_on_or_restart():
    warm = optax.linear_schedule(0.0, 1.0, 100)
    new, told = switched(trained(ADAM), optax.sgd(warm, momentum=B1))
    assert int(new.opt_state[1].count) == 5
    assert told["counts"] == {"ScaleByScheduleState": "carried"}
    new, told = switched(trained(ADAM), optax.adam(warm), count="restart")
    assert (int(new.opt_state[0].count), int(new.opt_state[1].count)) == (0, 0)
    assert_bitwise_equal(new.opt_state[0].mu, trained(ADAM).opt_state[0].mu)
    assert told["counts"] == {"ScaleByAdamState": "restarted", "ScaleByScheduleState": "restarted"}
    sgd = trained(optax.sgd(0.1))
    assert switched(sgd, ADAM)[1]["counts"] == {"ScaleByAdamState": "restarted"}  # there is none to carry
    multi = trained(optax.MultiSteps(ADAM, 2).gradient_transformation(), steps=5)
    new, _ = switched(multi, optax.chain(ADAM, optax.scale_by_schedule(warm)))
    assert int(new.opt_state[0][0].count) == 2  # of the same class
    assert int(new.opt_state[1].count) == 2  # the largest


def test_a_count_within_a_period_starts_anew():
    """Carried, it would be beyond the end of the period, and the transform would wait for that for ever."""
    new, told = switched(trained(ADAM), optax.chain(optax.adam(0.1), contrib.reduce_on_plateau(accumulation_size=3)))
    assert int(new.opt_state[1].count) == 0
    assert int(new.opt_state[0][0].count) == 5
    assert told["counts"] == {"ScaleByAdamState": "carried"}


def test_one_count_for_several_is_copied_so_that_the_state_can_be_donated():
    warm = optax.linear_schedule(0.0, 1.0, 100)
    new, _ = switched(trained(ADAM), optax.chain(optax.adam(warm), optax.scale_by_schedule(warm)))
    jax.jit(lambda state: state.apply_gradients(grads=state.params), donate_argnums=0)(new)


def test_nothing_is_carried_if_that_is_asked():
    new, told = switched(trained(ADAM), optax.adam(0.2), carry=False, count="restart")
    assert_bitwise_equal(new.opt_state, optax.adam(0.2).init(new.params))
    assert told["carried"] == {}


def test_first_moments_beside_fresh_second_ones_move_far():
    """What the docstring warns of, and its remedies."""

    def largest(state, steps=5):
        worst = 0.0
        for step in range(steps):
            updates, opt_state = state.tx.update(grads_at(state.params, step), state.opt_state, state.params)
            state = state.replace(opt_state=opt_state)
            worst = max(worst, max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(updates)))
        return worst

    state, adam = trained(optax.lion(1.0), steps=50), optax.adam(1.0)
    assert largest(switched(state, adam)[0]) > 5
    assert largest(switched(state, adam, carry=False, count="restart")[0]) < 1.01


def test_short_moments_and_other_dtypes():
    state = trained(ADAM)
    new, _ = switched(state, optax.adam(0.1, mu_dtype=jnp.bfloat16))
    assert new.opt_state[0].mu["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new.opt_state[0].mu["kernel"], state.opt_state[0].mu["kernel"].astype(jnp.bfloat16))
    back, _ = switched(new, optax.sgd(0.1, momentum=B1))
    expected = 10 * new.opt_state[0].mu["kernel"].astype(jnp.float32)
    np.testing.assert_allclose(back.opt_state[0].trace["kernel"], expected, rtol=0.03)


# --- Where new leaves lie, and what else has to go on.


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_new_leaves_lie_beside_their_parameters(axis_type):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(getattr(jax.sharding.AxisType, axis_type),))
    where = {2: NamedSharding(mesh, PartitionSpec(None, "a")), 1: NamedSharding(mesh, PartitionSpec("a"))}
    state = trained(ADAM, place=lambda leaf: jax.device_put(leaf, where[leaf.ndim]))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = state.replace(
        opt_state=jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, everywhere), state.opt_state)
    )
    plain = trained(ADAM)
    for tx in (optax.sgd(0.1, momentum=B1), contrib.schedule_free_adamw(0.1), optax.adagrad(0.1)):
        new, _ = switched(state, tx)
        for leaf in jax.tree.leaves(new.opt_state):
            assert leaf.sharding.device_set == set(mesh.devices.flat)
            assert leaf.sharding == where.get(leaf.ndim, leaf.sharding)
        other = switched(plain, tx)[0]
        for leaf, alone in zip(jax.tree.leaves(new.opt_state), jax.tree.leaves(other.opt_state), strict=True):
            np.testing.assert_allclose(leaf, alone, rtol=1e-6)
        next_update(new)


def test_leaves_on_different_devices():
    devices = jax.devices()
    state = trained(ADAM, steps=0, place=lambda leaf: jax.device_put(leaf, devices[leaf.ndim]))
    new, _ = switched(state, optax.adagrad(0.1))
    assert {leaf.ndim: leaf.devices() for leaf in jax.tree.leaves(new.opt_state)} == {
        1: {devices[1]}, 2: {devices[2]}}  # fmt: skip


def test_what_was_not_committed_is_not_afterwards():
    new, _ = switched(trained(ADAM), contrib.schedule_free_adamw(0.1))
    assert not any(leaf.committed for leaf in jax.tree.leaves(new.opt_state))


def run(switch_at=None, steps=8):
    traces, told = [], []

    @jax.jit
    def train_step(state, step):
        traces.append(1)
        return state.apply_gradients(grads=jax.tree.map(lambda p: p * (1 + step % 3), state.params))

    hooks = fsh.SurgeryHooks()
    if switch_at is not None:
        hooks.add("switch", SwitchOptimizer(MOMENTUM), params="**", when=fsh.at(switch_at),
                  on_reshape=lambda state, record: told.append(record.hook))  # fmt: skip
    hooks.add("halve", Scale(0.5), params="kernel", when=fsh.every(2))
    state = trained(ADAM, steps=0)
    for step in range(1, steps + 1):
        state = hooks(step, train_step(state, jnp.asarray(step)))
    hooks.flush()
    return state, hooks, len(traces), told


def test_in_the_loop_the_step_is_traced_once_more_and_other_hooks_go_on():
    state, hooks, traces, told = run(switch_at=4)
    assert run()[2] == 1
    assert traces == 2
    assert told == ["switch"]
    assert state.tx is MOMENTUM
    settled = [(r.hook, r.step) for r in hooks.ledger.records if r.event == "settled"]
    assert settled == [("halve", 2), ("switch", 4), ("halve", 4), ("halve", 6), ("halve", 8)]
    fired = next(r for r in hooks.ledger.records if r.hook == "switch")
    assert json.loads(fired.to_json())["detail"]["carried"]


def test_other_hooks_are_checked_against_the_new_optimizer_at_the_first_call():
    odd = optax.chain(ADAM, optax.GradientTransformation(lambda p: {"x": p}, lambda g, s, p=None: (g, s)))
    hooks = fsh.SurgeryHooks()
    hooks.add("switch", SwitchOptimizer(odd), params="**", when=fsh.at(100))
    with pytest.raises(e.SlotError, match="hook 'switch'"):
        hooks(1, trained(ADAM, steps=1))
    hooks = fsh.SurgeryHooks()
    hooks.add("switch", SwitchOptimizer(optax.sgd(0.1)), params="**", when=fsh.at(100))
    hooks.add("reset", fsh.surgeries.ResetMoments(), params="**", when=fsh.at(200))
    with pytest.raises(e.SlotError, match=r"hook 'reset'.*selected leaves have none"):
        hooks(1, trained(ADAM, steps=1))


def test_abstractly_and_in_jit():
    state = trained(ADAM)
    new, _ = switched(state, MOMENTUM)
    ahead, _ = fsh.operate(jax.eval_shape(lambda: state), SwitchOptimizer(MOMENTUM))
    assert jax.tree.structure(ahead.opt_state) == jax.tree.structure(new.opt_state)
    inside = jax.jit(lambda state: fsh.operate(state, SwitchOptimizer(MOMENTUM))[0])(state)
    assert inside.tx is MOMENTUM
    assert_equal(inside.opt_state, new.opt_state, 1e-6)


def test_loose_parts_one_bare_array_and_holes():
    params = jnp.ones(4)
    bound = fsh.bind(params=params, opt_state=ADAM.init(params), tx=ADAM)
    new, _ = fsh.operate(bound, SwitchOptimizer(MOMENTUM))
    assert new.opt_state[0].trace.shape == (4,)
    parts = {"a": optax.sgd(0.1, momentum=0.5), "b": optax.sgd(0.1)}
    split = optax.partition(parts, {"kernel": "a", "bias": "b"})
    state = trained(ADAM)
    new, told = switched(state, split)
    assert told["carried"]["ScaleByAdamState.mu -> TraceState.trace"] == {"factor": 2.0, "leaves": 1}
    back, told = switched(new, ADAM)
    assert told["initialised"] == {"ScaleByAdamState.mu": 1, "ScaleByAdamState.nu": 2}
    next_update(back)


def test_one_vector_of_all_slots():
    flat = {name: optax.flatten(tx) for name, tx in {"adam": ADAM, "sgd": optax.sgd(0.1, momentum=B1)}.items()}
    state = trained(flat["adam"])
    new, _ = switched(state, flat["sgd"])
    np.testing.assert_allclose(new.opt_state[0].trace, 10 * state.opt_state[0].mu, rtol=1e-6)
    apart, told = switched(state, optax.sgd(0.1, momentum=B1))
    assert told["initialised"] == {"TraceState.trace": 2}
    next_update(apart)


def test_slots_of_other_layouts_start_anew_or_stay():
    state = trained(optax.adafactor(0.1, min_dim_size_to_factor=4))
    new, told = switched(state, ADAM)
    assert told["carried"] == {}
    next_update(new)
    again, _ = switched(trained(ADAM), state.tx)
    next_update(again)


def test_boxes_keys_and_integers_among_the_parameters():
    names = {2: ("a", "b"), 1: ("a",)}
    params = jax.tree.map(lambda p: nn.Partitioned(p, names[p.ndim]), trained(ADAM, 0).params)
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=ADAM)
    state = state.apply_gradients(grads=params)
    next_update(switched(state, optax.adagrad(0.1))[0])
    new, _ = switched(state, MOMENTUM)
    np.testing.assert_allclose(new.opt_state[0].trace["bias"].value, state.params["bias"].value * 0 + 0.5, rtol=1e-6)
    assert new.opt_state[0].trace["bias"].names == ("a",)
    mixed = {"w": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0)}
    masked = optax.masked(ADAM, {"w": True, "n": False, "key": False})
    bound = fsh.bind(params=mixed, opt_state=masked.init(mixed), tx=masked)
    new, record = fsh.operate(bound, SwitchOptimizer(optax.masked(MOMENTUM, {"w": True, "n": False, "key": False})))
    assert json.loads(record.detail)["initialised"] == {}
    assert new.params["key"] is mixed["key"]


def test_nnx_keeps_the_structure_of_its_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    hooks = fsh.SurgeryHooks()
    hooks.add("faster", SwitchOptimizer(optax.adam(0.2)), params="**", when=fsh.at(0))
    other = optimizer.tx
    hooks(0, fsh.bind_nnx(model, optimizer))
    assert optimizer.tx is not other
    hooks = fsh.SurgeryHooks()
    hooks.add("switch", SwitchOptimizer(MOMENTUM), params="**", when=fsh.at(100))
    with pytest.raises(e.StructureError, match=r"`nnx\.Optimizer` keeps the structure of its own") as caught:
        hooks(0, fsh.bind_nnx(model, optimizer))
    assert "nnx.Optimizer made of what it returns" in str(caught.value)


def test_configs_take_the_optimizer_as_an_object():
    config = {"switch": fsh.config.hook("switch_optimizer", params="**", at=(1,), count="restart")}
    hooks = fsh.SurgeryHooks.from_config(config, objects={"tx": MOMENTUM})
    assert hooks(1, trained(ADAM, steps=1)).tx is MOMENTUM
    assert hooks.to_config(objects={"tx": MOMENTUM}).switch["count"] == "restart"


# --- What is measured.


@pytest.mark.parametrize(
    ("tx", "gains"),
    [
        pytest.param(optax.adam(0.1), [1, 1], id="adam"),
        pytest.param(optax.adam(0.1, mu_dtype=jnp.bfloat16), [1, 1], id="bf16"),
        pytest.param(optax.sgd(0.1, momentum=0.75), [4], id="momentum"),
        pytest.param(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.75)), [4], id="clipped"),
        pytest.param(optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.75)), [4], id="decayed"),
        pytest.param(optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(), [None, 1, 1], id="every_3"),
        pytest.param(optax.adagrad(0.1), [None], id="adagrad"),
        pytest.param(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), [1, 1], id="injected"),
        pytest.param(fsh.optax.freezable(optax.adam(0.1)), [1, 1], id="freezable"),
    ],
)
def test_gains(tx, gains):
    tree = {"w": jnp.ones((3, 2)), "v": jnp.ones(3)}
    params, opt_state = flatten(tree), tx.init(tree)
    found = responses(tx, opt_state, params, slots_of(tx, opt_state, params))
    by_name = sorted(found.items())
    assert [None if r.gain is None else pytest.approx(r.gain, rel=1e-12) for _, r in by_name] == gains


def test_an_optimizer_that_takes_no_holes_and_no_float64_is_measured_all_the_same():
    def update(grads, state, params=None):
        if any(g.dtype != jnp.float32 or g.size == 0 for g in jax.tree.leaves(grads)) or len(grads) < 2:
            raise TypeError("float32 alone")
        return MOMENTUM.update(grads, state, params)

    picky = optax.GradientTransformation(MOMENTUM.init, update)
    _, told = switched(trained(ADAM), picky)
    factor = told["carried"]["ScaleByAdamState.mu -> TraceState.trace"]["factor"]
    assert factor == pytest.approx(10, rel=1e-5)


FUNCTION = e.SurgeryFunctionError


def switch(tx, params="**"):
    return lambda: fsh.operate(trained(ADAM, 0), SwitchOptimizer(tx), params=params)


def wearing_out():
    """Runs where slots are probed, which is three updates, and fails where their size is measured."""
    calls = []

    def update(grads, state, params=None):
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("no luck")
        return MOMENTUM.update(grads, state, params)

    return optax.GradientTransformation(MOMENTUM.init, update)


CASES = {
    "tx": Case(lambda: SwitchOptimizer("adam"), FUNCTION, ("takes an optax transformation", "Found: str adam")),
    "carry": Case(lambda: SwitchOptimizer(ADAM, carry="grad"), FUNCTION, ("True or False", "Found: str grad")),
    "count": Case(lambda: SwitchOptimizer(ADAM, count="keep"), FUNCTION, ("Found: 'keep'", '"carry" or "restart"')),
    "some": Case(switch(MOMENTUM, "bias"), FUNCTION, ("SwitchOptimizer concerns the whole optimizer", "1 of 2 leaves")),
    "init": Case(switch(optax.GradientTransformation(lambda p: 1 / 0, lambda *_: None)), e.StateError,
                 ("of the new optimizer fails on the parameters: ZeroDivisionError",)),
    "update": Case(switch(wearing_out()), e.SlotError,
                   ("could not be measured: ValueError: no luck", "carry=False")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    case = CASES[name]
    with pytest.raises(case.error) as caught:
        case.run()
    assert [part for part in case.says if part not in str(caught.value)] == [], str(caught.value)
