"""Which optimizer leaf belongs to which parameter, and what it holds, read in the context of its chain."""

import typing
from unittest import mock

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from optax import contrib
from tiny import make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import optax_slots, slot_registry, slots
from flax_surgery_hooks.errors import RuleError, SlotError, StateError
from flax_surgery_hooks.paths import flatten

PARAMS = {"a": {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}, "z": jnp.ones(5)}


def find(tx, params=None, opt_state=None):
    """The slots of each parameter, by its path."""
    params = PARAMS if params is None else params
    leaves = flatten(params)
    found = slots.slots_of(tx, tx.init(params) if opt_state is None else opt_state, leaves)
    return {leaves.paths[place]: mine for place, mine in found.items()}


def kinds(tx, params=None):
    """Name of a slot -> its kind, which is the same for all parameters here."""
    found = find(tx, params)
    assert len({tuple((slot.name, slot.kind) for slot in mine) for mine in found.values()}) <= 1
    assert not found or len(found) == len(jax.tree.leaves(PARAMS if params is None else params))
    return {slot.name: slot.kind for mine in found.values() for slot in mine}


# Whose slot is it?


def numbered(tree):
    """The tree with a number in each leaf by which it can be told apart."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [jnp.full(jnp.shape(leaf), i, jnp.float32) for i, leaf in enumerate(leaves)])


def partitioned(value):
    return nn.Partitioned(value, names=(None,) * value.ndim)


ADVERSARIAL = {"kernel": jnp.ones(3), "a": {"kernel": jnp.ones(3)},
               "mu": {"kernel": jnp.ones(3), "a": {"kernel": jnp.ones(3)}}}  # fmt: skip
TREES = {
    "plain": PARAMS,
    "names_of_fields": ADVERSARIAL,
    "all_names_of_states": {"0": {"mu": jnp.ones(3), "nu": {"0": jnp.ones(3)}}, "count": jnp.ones(3)},
    "learning_rate": {"learning_rate": jnp.ones(3), "b1": jnp.ones(3)},
    "lists": [jnp.ones(3), (jnp.ones(3), {"mu": jnp.ones(3)})],
    "bare": jnp.ones((4, 3)),
    "one": {"w": jnp.ones(3)},
    "boxed": {"mu": partitioned(jnp.ones((2, 3))), "value": {"value": partitioned(jnp.ones(3)), "w": jnp.ones(3)}},
    "frozen": flax.core.freeze(ADVERSARIAL),
    "scalars": {"count": jnp.ones(()), "mu": jnp.ones(())},
    "nnx": nnx.State({"mu": {"kernel": nnx.Param(jnp.ones(3))}, "kernel": nnx.Param(jnp.ones(3))}),
}
WRAPPERS = {
    "adam": lambda: optax.adam(0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.chain(optax.scale_by_adam(), optax.scale(0.1))),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "masked": lambda: optax.masked(optax.adam(0.1), lambda params: jax.tree.map(lambda _: True, params)),
    "named": lambda: optax.named_chain(("mu", optax.scale_by_adam()), ("kernel", optax.scale(0.1))),
}


def adam_of(state):
    """The ScaleByAdamState within a state, by looking everywhere."""
    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    assert len(found) == 1
    return found[0]


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("tree", TREES)
def test_slots_belong_to_the_parameter_at_the_same_place(tree, wrapper):
    params, tx = TREES[tree], WRAPPERS[wrapper]()
    state = numbered(tx.init(params))
    adam, leaves = adam_of(state), jax.tree.leaves(state)
    mu, nu = flatten(adam.mu), flatten(adam.nu)
    found = find(tx, params)
    assert list(found) == list(flatten(params).paths) == list(mu.paths)
    for place, mine in enumerate(found.values()):
        by_name = {slot.name: slot for slot in mine}
        assert leaves[by_name["ScaleByAdamState.mu"].index] is mu.values[place]
        assert leaves[by_name["ScaleByAdamState.nu"].index] is nu.values[place]
        assert [slot.owner for slot in mine] == [place] * len(mine)
        assert set(by_name) - {"MultiStepsState.acc_grads"} == {"ScaleByAdamState.mu", "ScaleByAdamState.nu"}
        assert ("MultiStepsState.acc_grads" in by_name) == (wrapper == "multi_steps")


@pytest.mark.parametrize("boxed", [False, True])
def test_edits_reach_the_slots_of_their_own_leaf_alone(boxed):
    params = jax.tree.map(partitioned, ADVERSARIAL) if boxed else ADVERSARIAL
    state = make_state(0, optax.adam(0.1), **params)
    state = state.replace(opt_state=numbered(state.opt_state))
    after, record = fsh.operate(state, lambda w: w[::-1] * 2, params="mu/kernel", opt_state="transport")
    assert record.paths == ("mu/kernel",)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    old, new = (flatten(one.opt_state[0]._asdict()) for one in (state, after))
    changed = [
        (path, float((new / old).ravel()[0]))
        for path, old, new in zip(old.paths, old.values, new.values, strict=True)
        if old is not new
    ]
    assert changed == [("mu/mu/kernel", 0.5), ("nu/mu/kernel", 0.25)]


@pytest.mark.parametrize(
    ("params", "labels"),
    [
        ({"kernel": jnp.ones(3), "bias": jnp.ones(4)}, {"kernel": "kernel", "bias": "bias"}),
        ({"kernel": jnp.ones(3), "bias": jnp.ones(4)}, {"kernel": "bias", "bias": "kernel"}),
        ({"kernel": jnp.ones(3), "bias": {"kernel": jnp.ones(4), "bias": jnp.ones(2)}},
         {"kernel": "kernel", "bias": {"kernel": "bias", "bias": "kernel"}}),
    ],
    ids=["equal", "crossed", "nested"],
)  # fmt: skip
def test_labels_of_a_partition_may_be_names_of_parameters(params, labels):
    tx = optax.multi_transform({"kernel": optax.adam(0.1), "bias": optax.sgd(0.1, momentum=0.9)}, labels)
    leaves = jax.tree.leaves(tx.init(params))
    found = find(tx, params)
    of_label = {"kernel": ADAM, "bias": {"TraceState.trace": "grad"}}
    expected = {path: of_label[label] for path, label in zip(*flatten(labels)[0:3:2], strict=True)}
    assert {path: {slot.name: slot.kind for slot in mine} for path, mine in found.items()} == expected
    for path, value in zip(*flatten(params)[0:3:2], strict=True):
        assert {leaves[slot.index].shape for slot in found[path]} == {value.shape}


@pytest.mark.parametrize(("kept", "expected"), [("a", ["a/bias", "a/kernel"]), ("z", ["z"])])
def test_masked_subtrees_have_no_slots(kept, expected):
    tx = optax.masked(optax.adam(0.1), {name: name == kept for name in PARAMS})
    assert list(find(tx)) == expected


def test_one_field_may_be_of_another_kind_for_another_leaf():
    tx = optax.chain(optax.masked(optax.scale_by_adam(), {"a": True, "z": False}), optax.trace(0.9))
    trace = {p: slot.kind for p, mine in find(tx).items() for slot in mine if slot.name == "TraceState.trace"}
    assert trace == {"a/bias": "update", "a/kernel": "update", "z": "grad"}


# What is it?

ADAM = {"ScaleByAdamState.mu": "grad", "ScaleByAdamState.nu": "grad_sq"}
CLIPPED_ADAM = {"ScaleByAdamState.mu": "update", "ScaleByAdamState.nu": "invariant"}
KINDS = {
    "sgd": (lambda: optax.sgd(0.1), {}),
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), {"TraceState.trace": "grad"}),
    "nesterov": (lambda: optax.sgd(0.1, momentum=0.9, nesterov=True), {"TraceState.trace": "grad"}),
    "rmsprop_momentum": (lambda: optax.rmsprop(0.1, momentum=0.9),
                         {"ScaleByRmsState.nu": "grad_sq", "TraceState.trace": "update"}),
    "lars": (lambda: optax.lars(0.1), {"TraceState.trace": "update"}),
    "adafactor_momentum": (lambda: optax.adafactor(0.1, momentum=0.9),
                           {f"FactoredState.{part}": "grad_sq" for part in ("v_row", "v_col", "v")}
                           | {"EmaState.ema": "update"}),
    "clip_trace": (lambda: optax.chain(optax.clip(1.0), optax.trace(0.9)), {"TraceState.trace": "update"}),
    "sign_trace": (lambda: optax.chain(optax.scale_by_sign(), optax.trace(0.9)), {"TraceState.trace": "update"}),
    "global_clip_trace": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9)),
                          {"TraceState.trace": "grad"}),
    "schedule_trace": (lambda: optax.chain(optax.scale_by_schedule(lambda step: 0.1), optax.trace(0.9)),
                       {"TraceState.trace": "grad"}),
    "adam": (lambda: optax.adam(0.1), ADAM),
    "adam_ema": (lambda: optax.chain(optax.scale_by_adam(), optax.ema(0.9)), ADAM | {"EmaState.ema": "update"}),
    "ema_adam": (lambda: optax.chain(optax.ema(0.9), optax.scale_by_adam()), ADAM | {"EmaState.ema": "grad"}),
    "adamax": (lambda: optax.adamax(0.1), ADAM | {"ScaleByAdamState.nu": "grad_abs"}),
    "adamw_clipped": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), ADAM),
    "adam_clipped_by_value": (lambda: optax.chain(optax.clip(1.0), optax.adam(0.1)), CLIPPED_ADAM),
    "decayed_adam": (lambda: optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam()), ADAM),
    "multi_steps": (lambda: optax.MultiSteps(optax.adam(0.1), 4), ADAM | {"MultiStepsState.acc_grads": "grad"}),
    "inject": (lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1.0, 0.1, 5)), ADAM),
    "schedule_free": (lambda: contrib.schedule_free_adamw(0.1),
                      {"ScheduleFreeState.z": "param", "ScaleByRmsWithCountState.nu": "grad_sq"}),
    "schedule_free_sgd": (lambda: contrib.schedule_free_sgd(0.1), {"ScheduleFreeState.z": "param"}),
    "lion": (lambda: optax.lion(0.1), {"ScaleByLionState.mu": "grad"}),
    "amsgrad": (lambda: optax.amsgrad(0.1),
                {"ScaleByAmsgradState.mu": "grad", "ScaleByAmsgradState.nu": "grad_sq",
                 "ScaleByAmsgradState.nu_max": "grad_sq"}),
    "adagrad": (lambda: optax.adagrad(0.1), {"ScaleByRssState.sum_of_squares": "grad_sq"}),
    "adadelta": (lambda: optax.adadelta(0.1),
                 {"ScaleByAdaDeltaState.e_g": "grad_sq", "ScaleByAdaDeltaState.e_x": "invariant"}),
    "rprop": (lambda: optax.rprop(0.1),
              {"ScaleByRpropState.step_sizes": "invariant", "ScaleByRpropState.prev_updates": "update"}),
    "optimistic_adam": (lambda: optax.optimistic_adam_v2(0.1),
                        ADAM | {"ScaleByOptimisticGradientState.previous_gradient": "update"}),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(0.1), 3), ADAM),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_in_context(name):
    make, expected = KINDS[name]
    assert kinds(make()) == expected


@pytest.mark.parametrize(
    ("preceding", "order"),
    [
        ((), 1),
        ((optax.TraceState, optax.ScaleByScheduleState), 1),
        ((optax.ScaleByAdamState,), 0),
        ((optax.EmptyState,), None),
        ((optax.EmptyState, optax.ScaleByAdamState), 0),
        ((optax.EmptyState, optax.TraceState), None),
        ((optax.ScaleByAdamState, optax.EmptyState), 0),
    ],
)
def test_order_of_what_arrives_behind_other_transforms(preceding, order):
    assert optax_slots.order(preceding) == order


def test_slots_know_what_the_optimizer_starts_them_with():
    tx = optax.chain(optax.scale_by_rss(0.25), optax.scale_by_rms(initial_scale=3.0), optax.trace(0.9))
    assert {slot.name: slot.init for mine in find(tx).values() for slot in mine} == {
        "ScaleByRssState.sum_of_squares": 0.25, "ScaleByRmsState.nu": 3.0, "TraceState.trace": 0.0}  # fmt: skip
    assert {slot.init for mine in find(contrib.schedule_free_sgd(0.1)).values() for slot in mine} == {None}


def test_slots_of_integer_leaves_follow_nothing():
    params = {"table": jnp.arange(3), "w": jnp.ones(2)}
    tx = optax.masked(optax.adam(0.1), {"table": False, "w": True})
    assert list(find(tx, params)) == ["w"]


# Registration.


class Momentum(typing.NamedTuple):
    mine: typing.Any
    other: typing.Any = ()


def momentum(linear=True):
    """Momentum as someone might write it: order 1 in the gradient, or 0 behind a sign."""

    def update(updates, state, params=None):
        del params
        mine = jax.tree.map(lambda m, g: 0.9 * m + (g if linear else jnp.sign(g)), state.mine, updates)
        return mine, Momentum(mine)

    return optax.GradientTransformation(lambda params: Momentum(jax.tree.map(jnp.zeros_like, params)), update)


@pytest.fixture
def registry():
    """What a test registers is forgotten after it."""
    with mock.patch.dict(slot_registry.REGISTRY), mock.patch.dict(slot_registry.TRAITS):
        yield
    slots.find_slots.cache_clear()


def test_an_unknown_state_is_an_error_with_advice_that_works(registry):
    with pytest.raises(SlotError, match="'mine' of the optimizer state Momentum mirrors the parameters") as caught:
        find(momentum())
    assert caught.value.found == f"class {__name__}.Momentum; mine: order 1.00 in the gradient, signed"
    assert 'fsh.register_slot(Momentum, mine="grad")' in caught.value.write
    with pytest.raises(SlotError) as other:
        find(momentum(linear=False))
    assert 'fsh.register_slot(Momentum, mine="update")' in other.value.write, "the draft is what was measured"
    assert 'opt_state="keep"' in caught.value.write
    state = make_state(0, momentum(), w=jnp.ones(2))
    assert fsh.operate(state, lambda w: w * 2, opt_state="keep")[0].params["w"].tolist() == [2, 2]
    fsh.register_slot(Momentum, mine="grad")
    assert kinds(momentum()) == {"Momentum.mine": "grad"}


def test_the_probe_contradicts_a_wrong_registration(registry):
    fsh.register_slot(Momentum, mine="grad")
    with pytest.raises(SlotError, match=r"Momentum\.mine is registered as grad in this chain, but scales") as caught:
        find(momentum(linear=False))
    assert caught.value.found == "order 0.00 in the gradient, signed"
    assert "fsh.register_slot(Momentum, mine='update')" in caught.value.write
    fsh.register_slot(Momentum, mine="update")
    assert kinds(momentum(linear=False)) == {"Momentum.mine": "update"}
    with pytest.raises(SlotError, match="registered as update") as caught:
        find(momentum())
    assert caught.value.found == "order 1.00 in the gradient, signed"


def test_a_kind_may_be_a_choice_or_depend_on_the_chain(registry):
    fsh.register_slot(Momentum, mine=("grad", "update"))
    assert kinds(momentum()) == {"Momentum.mine": "grad"}
    assert kinds(momentum(linear=False)) == {"Momentum.mine": "update"}
    seen = []
    fsh.register_slot(Momentum, mine=lambda preceding: seen.append(preceding) or "grad")
    kinds(optax.chain(optax.trace(0.9), optax.chain(optax.identity(), momentum())))
    assert set(seen) == {(optax.TraceState, optax.EmptyState)}
    fsh.register_slot(Momentum, mine="none")
    assert kinds(momentum()) == {}


def test_a_further_registration_adds_to_what_is_known(registry):
    fsh.register_slot(optax.ScaleByAdamState, mu=("grad", "update"))
    assert kinds(optax.adam(0.1)) == ADAM
    assert kinds(contrib.adopt(0.1))["ScaleByAdamState.mu"] == "update"


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"yours": "grad"}, SlotError, "Momentum has no field 'yours'. Found: fields mine, other"),
        ({"mine": "gradient"}, RuleError, "Unknown kind of slot. Found: 'gradient'. Write instead: one of grad"),
        ({"mine": ("grad", "velocity")}, RuleError, "Unknown kind of slot. Found: 'velocity'"),
    ],
)
def test_malformed_registrations(fields, error, text, registry):
    with pytest.raises(error) as caught:
        fsh.register_slot(Momentum, **fields)
    assert text in str(caught.value)
    assert Momentum not in slot_registry.REGISTRY


def test_a_state_of_another_optimizer_or_of_other_parameters_is_refused():
    adam, other = optax.adam(0.1), optax.chain(optax.scale_by_adam(), optax.trace(0.9))
    with pytest.raises(StateError, match=r"not what `tx\.init` makes for these parameters") as caught:
        find(adam, opt_state=other.init(PARAMS))
    assert "tx.init(params)" in caught.value.write
    with pytest.raises((StateError, SlotError)):
        find(adam, opt_state=adam.init({"a": PARAMS["a"]}))
