"""Resetting moments: which elements, of which slots, and that one mask serves them all; and the protocol behind it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from raised import Case
from tiny import MOMENTUM, QUICK, assert_bitwise_equal, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import ResetMoments
from flax_surgery_hooks.surgeries.optimizer import smallest

KEY = jax.random.key(7)
OPTIMIZERS = {
    "adamw": optax.adamw(0.1),
    "momentum": MOMENTUM,
    "lion": optax.lion(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "adagrad": optax.adagrad(0.1, initial_accumulator_value=0.3),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), MOMENTUM),
    "every_4": optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation(),
}


def trained(tx, steps=3, **params):
    """A state some steps later; gradients are random, of size one."""
    params = params or {"w": jnp.ones((5, 8)), "v": jnp.ones(7)}
    state = make_state(0, tx, **params)
    for step in range(steps):
        keys = jax.random.split(jax.random.fold_in(KEY, step), len(params))
        pairs = zip(params.items(), keys, strict=True)
        state = state.apply_gradients(grads={n: jax.random.normal(k, p.shape, p.dtype) for (n, p), k in pairs})
    return state


ADAM = trained(OPTIMIZERS["adamw"])


def counts(state):
    return [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_of_it_is_what_init_makes_and_counts_stay(name):
    state = trained(OPTIMIZERS[name])
    new, record = fsh.operate(state, ResetMoments())
    fresh = make_state(0, OPTIMIZERS[name], **state.params)
    for old, now, start in zip(*map(jax.tree.leaves, (state.opt_state, new.opt_state, fresh.opt_state)), strict=True):
        assert_bitwise_equal(now, old if old.dtype == jnp.int32 else start)
    assert_bitwise_equal(new.params, state.params)
    assert record.rule == "keep"
    assert record.figures["params/changed"] == 0
    assert record.figures["slots/changed"] > 0


@pytest.mark.parametrize("by", ["random", "magnitude"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.9, 1.0])
def test_one_mask_of_an_exact_size_serves_all_slots_of_a_leaf(by, fraction):
    new, _ = fsh.operate(ADAM, ResetMoments(fraction=fraction, by=by), key=KEY)
    for path, leaf in ADAM.params.items():
        mu, nu = (np.asarray(moments[path]) for moments in (new.opt_state[0].mu, new.opt_state[0].nu))
        assert (mu == 0).sum() == round(fraction * leaf.size)
        np.testing.assert_array_equal(mu == 0, nu == 0)
        kept = np.asarray(mu != 0)
        np.testing.assert_array_equal(mu[kept], np.asarray(ADAM.opt_state[0].mu[path])[kept])
        np.testing.assert_array_equal(nu[kept], np.asarray(ADAM.opt_state[0].nu[path])[kept])
    assert new.opt_state[0].count is ADAM.opt_state[0].count


def test_magnitude_takes_the_smallest_first_moments():
    new, _ = fsh.operate(ADAM, ResetMoments(fraction=0.35, by="magnitude"), params="w")
    old = np.asarray(ADAM.opt_state[0].mu["w"])
    expected = old.copy().ravel()
    expected[np.argsort(np.abs(expected), kind="stable")[: round(0.35 * 40)]] = 0
    np.testing.assert_array_equal(new.opt_state[0].mu["w"], expected.reshape(old.shape))
    assert new.opt_state[0].nu["v"] is ADAM.opt_state[0].nu["v"]


def test_magnitude_goes_by_second_moments_where_there_are_no_first():
    state = trained(optax.rmsprop(0.1), w=jnp.ones(9))
    new, _ = fsh.operate(state, ResetMoments(fraction=0.5, by="magnitude"))
    old = np.asarray(state.opt_state[0].nu["w"])
    np.testing.assert_array_equal(np.asarray(new.opt_state[0].nu["w"]) == 0, old <= np.sort(old)[3])


def test_random_masks_differ_by_leaf_and_key_and_come_again():
    def zeros(key):
        new, _ = fsh.operate(state, surgery, key=key)
        return {path: (np.asarray(moments) == 0).tolist() for path, moments in new.opt_state[0].trace.items()}

    surgery = ResetMoments(fraction=0.5, by="random")
    state = trained(MOMENTUM, w=jnp.ones(40), v=jnp.ones(40))
    masks = zeros(KEY)
    assert masks == zeros(KEY)
    assert masks["w"] != masks["v"]
    assert masks["w"] != zeros(jax.random.key(8))["w"]


def test_slots_of_other_layouts():
    flat = trained(optax.flatten(optax.adam(0.1)))
    new, _ = fsh.operate(flat, ResetMoments(), params="w")
    assert (np.asarray(new.opt_state[0].nu) == 0).tolist() == [False] * 7 + [True] * 40
    factored = trained(optax.adafactor(0.1, min_dim_size_to_factor=4))
    new, _ = fsh.operate(factored, ResetMoments(), params="w")
    start = factored.tx.init(factored.params)
    rows = [state[0].v_row["w"] for state in (new.opt_state, start)]
    assert_bitwise_equal(*rows)
    assert new.opt_state[0].v["v"] is factored.opt_state[0].v["v"]


def test_elements_of_adam_per_element_start_their_count_anew():
    state = trained(fsh.optax.adam_per_element(0.1))
    new, _ = fsh.operate(state, ResetMoments(fraction=0.5, by="random"), params="w", key=KEY)
    old, now = state.opt_state[0], new.opt_state[0]
    gone = np.asarray(now.mu["w"]) == 0
    np.testing.assert_array_equal(now.age["w"], np.where(gone, 0, old.age["w"]))


def test_kinds_choose_the_slots():
    new, _ = fsh.operate(ADAM, ResetMoments(("grad",)))
    assert not any(np.asarray(mu).any() for mu in new.opt_state[0].mu.values())
    assert_bitwise_equal(new.opt_state[0].nu, ADAM.opt_state[0].nu)


def test_copies_of_the_parameters_stay_unless_they_are_named():
    state = trained(optax.contrib.schedule_free_sgd(0.1), w=jnp.ones(6), v=jnp.ones(4))
    new, _ = fsh.operate(state, ResetMoments(("param",)))
    assert_bitwise_equal(new.opt_state.z, state.params)
    assert (np.asarray(state.opt_state.z["w"]) != np.asarray(state.params["w"])).any()
    with pytest.raises(e.SlotError, match="finds no slot of these kinds"):
        fsh.operate(state, ResetMoments())


def largest_update(state, grads_of, steps=50):
    """The 99.9th percentile of |update| over the learning rate, at worst, in some further steps."""
    worst = 0.0
    for step in range(steps):
        updates, opt_state = state.tx.update(grads_of(step), state.opt_state, state.params)
        state = state.replace(opt_state=opt_state)
        worst = max(worst, float(np.percentile(np.abs(np.asarray(updates["w"])), 99.9)))
    return worst


def test_two_masks_as_in_the_released_code_of_relora_give_huge_updates():
    tx = optax.adam(1.0)

    def grads_of(step):
        return {"w": jax.random.normal(jax.random.fold_in(KEY, step), (4_000,))}

    state = make_state(0, tx, w=jnp.zeros(4_000))
    for step in range(600):
        _, opt_state = tx.update(grads_of(1_000 + step), state.opt_state, state.params)
        state = state.replace(opt_state=opt_state)
    before = largest_update(state, grads_of)
    ours, _ = fsh.operate(state, ResetMoments(fraction=0.9, by="random"), key=KEY)
    first, _ = fsh.operate(state, ResetMoments(("grad",), 0.9, "random"), key=KEY)
    theirs, _ = fsh.operate(first, ResetMoments(("grad_sq",), 0.9, "random"), key=jax.random.key(8))
    gentle = largest_update(first, grads_of)
    assert largest_update(theirs, grads_of) > 20 * largest_update(ours, grads_of) > 20 * gentle
    assert gentle < 1.1 * before


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_short_floats_keep_their_dtype_and_what_is_not_reset(dtype):
    state = trained(optax.adam(0.1, mu_dtype=dtype), w=jnp.ones(33))
    new, _ = fsh.operate(state, ResetMoments(fraction=0.5, by="magnitude"))
    old, now = np.asarray(state.opt_state[0].mu["w"]), np.asarray(new.opt_state[0].mu["w"])
    assert now.dtype == old.dtype
    np.testing.assert_array_equal(now[now != 0], old[now != 0])
    assert (now == 0).sum() == 16


@pytest.mark.parametrize("shape", [(), (1,), (17,), (4, 3, 5)])
def test_smallest_counts_as_a_stable_sort_does(shape):
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 5, shape), rng.integers(0, 2**32 - 1, shape), np.full(shape, 2**32 - 1)):
        values = np.asarray(values, np.uint32)
        for count in {0, min(1, values.size), values.size // 2, values.size}:
            expected = np.zeros(values.size, bool)
            expected[np.argsort(values.ravel(), kind="stable")[:count]] = True
            np.testing.assert_array_equal(smallest(jnp.asarray(values), count), expected.reshape(shape))


@pytest.mark.usefixtures("x64")
def test_magnitudes_in_float64_are_told_apart_beyond_float32():
    sizes = 1 + jnp.arange(8, dtype=jnp.float64)[::-1] * 1e-15
    state = make_state(0, MOMENTUM, w=jnp.zeros(8, jnp.float64)).apply_gradients(grads={"w": sizes})
    new, _ = fsh.operate(state, ResetMoments(fraction=0.5, by="magnitude"))
    assert (np.asarray(new.opt_state[0].trace["w"]) == 0).tolist() == [False] * 4 + [True] * 4


# --- Wherever surgeries run.


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_inside_jit_it_is_the_same_bit_for_bit(by):
    def edit(state):
        return fsh.operate(state, ResetMoments(fraction=0.3, by=by), key=KEY)[0]

    inside, outside = jax.jit(edit)(ADAM), edit(ADAM)
    assert_bitwise_equal(inside.opt_state, outside.opt_state)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_moments_stay_where_they_are(axis_type):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(getattr(jax.sharding.AxisType, axis_type),) * 2)
    places = {"w": NamedSharding(mesh, PartitionSpec("a", "b")), "v": NamedSharding(mesh, PartitionSpec("a"))}
    params = {"w": jnp.ones((8, 4)), "v": jnp.ones(8)}
    state = trained(OPTIMIZERS["adamw"], **{n: jax.device_put(p, places[n]) for n, p in params.items()})
    plain = state.replace(**jax.device_get({"params": state.params, "opt_state": state.opt_state}))
    for surgery in (ResetMoments(), ResetMoments(fraction=0.4, by="random")):
        new, _ = fsh.operate(state, surgery, key=KEY)
        for old, leaf in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(new.opt_state), strict=True):
            assert leaf.sharding == old.sharding
        assert_bitwise_equal(new.opt_state, fsh.operate(plain, surgery, key=KEY)[0].opt_state)


def test_a_hook_resets_in_a_donated_loop_without_a_retrace():
    traces = []

    @jax.jit
    def train_step(state):
        traces.append(1)
        return state.apply_gradients(grads=state.params)

    hooks = fsh.SurgeryHooks(donate="always")
    hooks.add("reset", ResetMoments(fraction=0.5, by="random"), params="w", when=fsh.every(2))
    state = make_state(0, OPTIMIZERS["adamw"], w=jnp.ones(10), v=jnp.ones(3))
    for step in range(1, 7):
        state = hooks(step, train_step(state))
        if step % 2 == 0:
            assert (np.asarray(state.opt_state[0].nu["w"]) == 0).sum() == 5
    hooks.flush()
    assert len(traces) == 1
    settled = [record for record in hooks.ledger.records if record.event == "settled"]
    assert len(settled) == 3
    assert settled[0].figures["slots/sparsity"] == 0.5


def test_leaves_of_one_shape_share_a_program():
    hooks = fsh.SurgeryHooks()
    hooks.add("reset", ResetMoments(fraction=0.5, by="random"), params="**", when=fsh.at(1), **QUICK)
    hooks(1, trained(MOMENTUM, **{name: jnp.ones(4) for name in "abc"}).replace(step=1))
    assert [program.served for program in hooks.programs("reset")] == [3]


def test_configs_name_it_and_hooks_tell_it():
    config = {
        "reset": fsh.config.hook("reset_moments", params="w", at=(1,), kinds=("grad",), fraction=0.5, by="random")
    }
    hooks = fsh.SurgeryHooks.from_config(config)
    state = hooks(1, ADAM.replace(step=1))
    assert (np.asarray(state.opt_state[0].mu["w"]) == 0).sum() == 20
    again = hooks.to_config()
    assert again.reset.opt_state is None
    assert again.reset.fraction == 0.5


# --- Surgeries of a user's own that edit slots.


@dataclasses.dataclass(frozen=True)
class Own:
    """Doubles leaves, and returns whatever it is told of their slots."""

    function: object

    def __call__(self, leaf):
        return 2 * leaf

    def edit_slots(self, slots, /, leaf, path, step, factor):
        return self.function(slots, leaf=leaf, path=path, step=step, factor=factor)


def test_the_parameters_that_it_may_ask_for():
    seen = {}

    def look(slots, **given):
        seen.update(given, slots=slots)
        return {name: slot.value * given["factor"] + given["leaf"] for name, slot in slots.items()}

    state = trained(optax.chain(MOMENTUM, optax.trace(0.5)), w=jnp.ones(3))
    new, _ = fsh.operate(state, Own(look), inputs={"factor": 3.0})
    assert seen["path"] == "w"
    assert list(seen["slots"]) == ["TraceState.trace at [0][0].trace", "TraceState.trace at [1].trace"]
    assert {slot.kind for slot in seen["slots"].values()} == {"grad"}
    assert {slot.init for slot in seen["slots"].values()} == {0.0}
    np.testing.assert_allclose(new.params["w"], 2 * state.params["w"])
    expected = 3 * state.opt_state[0][0].trace["w"] + 2 * state.params["w"]
    np.testing.assert_allclose(new.opt_state[0][0].trace["w"], expected)


def test_slots_that_are_not_finite_are_refused():
    with pytest.raises(e.RefusedError, match="40 non-finite values"):
        own(lambda slots, **_: {name: slot.value / (0 if "mu" in name else 1) for name, slot in slots.items()})()


def own(function):
    return lambda: fsh.operate(ADAM, Own(function), params="w", inputs={"factor": 1.0})


def raising(slots, **_):
    raise ValueError("no luck")


class Many:
    """A surgery of all leaves that says what becomes of their slots."""

    def __init__(self, edit):
        self.edit = edit

    def __call__(self, leaves):
        return leaves

    def edit_slots(self, slots, /, leaves, key=None):
        return self.edit(slots, leaves)


def halved(slots, leaves):
    return {path: {name: slot.value / leaves[path].ndim for name, slot in of.items()} for path, of in slots.items()}


class ManyByPath(Many):
    def edit_slots(self, slots, /, path):
        return slots


class ManyAdding(Many):
    def __call__(self, leaves):
        return {**leaves, "more": leaves["w"]}


def test_a_surgery_of_all_leaves_edits_all_their_slots():
    """Each leaf has its own: those of one leaf are not those of another."""
    new, record = fsh.operate(ADAM, Many(halved), params=["w", "v"])
    for name in ("mu", "nu"):
        old, edited = getattr(ADAM.opt_state[0], name), getattr(new.opt_state[0], name)
        np.testing.assert_array_equal(edited["w"], old["w"] / 2)
        np.testing.assert_array_equal(edited["v"], old["v"])
    assert record.figures["slots/changed"] == 2 * ADAM.params["w"].size


class Remembering:
    def __call__(self, leaf):
        return leaf

    def edit_slots(self, slots, /, memory):
        return slots


def reset(state=ADAM, params="w", **fields):
    return lambda: fsh.operate(state, ResetMoments(**fields), params=params)


FUNCTION, W = e.SurgeryFunctionError, {"path": "w"}
ODD = make_state(1, optax.GradientTransformation(lambda p: {}, lambda g, s, p=None: (g, s)))
CASES = {
    "kinds": Case(lambda: ResetMoments(("grads",)), FUNCTION, ("does not exist", "Found: 'grads'", "grad")),
    "fraction": Case(lambda: ResetMoments(fraction=90), FUNCTION, ("from 0 to 1", "Found: 90", "fraction=0.9")),
    "by": Case(lambda: ResetMoments(fraction=0.9), FUNCTION, ("by='all', fraction=0.9", 'by="magnitude" or')),
    "no_kind": Case(reset(kinds=("grad_abs",)), e.SlotError,
                    ("no slot of these kinds", "ScaleByAdamState.mu: grad, ScaleByAdamState.nu: grad_sq",
                     "asked for grad_abs"), W),
    "no_key": Case(reset(fraction=0.5, by="random"), e.InputError, ("draws random", "key=jax.random.key(0)"), W),
    "no_slots": Case(reset(ODD), e.SlotError, ("selected leaves have none", "Found: w", "with moments")),
    "no_moments": Case(reset(trained(optax.contrib.schedule_free_sgd(0.1), w=jnp.ones(2)), kinds=("param",),
                             fraction=0.5, by="magnitude"), e.SlotError,
                       ("finds no moments", "ScheduleFreeState.z: param", 'by="random"'), W),
    "opt_state": Case(lambda: fsh.operate(ADAM, ResetMoments(), opt_state="reset"), e.RuleError,
                      ("says itself", "opt_state='reset'", "no opt_state=")),
    "raises": Case(own(raising), e.UserCodeError, ("Own.edit_slots raised ValueError: no luck",), W),
    "no_dict": Case(own(lambda slots, **_: None), FUNCTION,
                    ("a dict with the slots it was given: ScaleByAdamState.mu, ScaleByAdamState.nu", "NoneType"), W),
    "other_slots": Case(own(lambda slots, **_: {"mu": 0}), FUNCTION, ("Found: 'mu'", "for name, slot in"), W),
    "other_shape": Case(own(lambda slots, **_: {name: slot.value[1:] for name, slot in slots.items()}), FUNCTION,
                        ("an array like ScaleByAdamState.mu", "float32[4, 8]", "float32 of shape [5, 8]"), W),
    "no_array": Case(own(lambda slots, **_: dict.fromkeys(slots, 0)), FUNCTION, ("Found: int",), W),
    "no_input": Case(lambda: fsh.operate(ADAM, Own(dict), params="w"), e.InputError, ("asks for factor",)),
    "all_leaves": Case(lambda: fsh.operate(ADAM, Many(lambda slots, _: {"w": {}})), FUNCTION,
                       ("Many.edit_slots must return a dict with the paths it was given: ", "Found: 'w'")),
    "all_leaves_by_path": Case(lambda: fsh.operate(ADAM, ManyByPath(halved)), FUNCTION,
                               ("ManyByPath.edit_slots asks for path", "given `leaves`, `key`")),
    "all_leaves_and_more": Case(lambda: fsh.operate(ADAM, ManyAdding(halved)), e.StructureError,
                                ("neither add nor remove leaves", "more", "without edit_slots")),
    "memory": Case(lambda: fsh.operate(ADAM, Remembering()), FUNCTION,
                   ("Remembering.edit_slots asks for memory", "given `leaf`, `path`")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    CASES[name].check()


def test_slots_without_a_constant_or_of_another_shape_cannot_be_reset():
    from flax_surgery_hooks.slot_edits import SlotValue

    leaf = jnp.ones((3, 2))
    odd = {"a": SlotValue(jnp.ones((3, 2)), "grad", None)}
    with pytest.raises(e.SlotError, match="fills a with no constant"):
        ResetMoments().edit_slots(odd, leaf=leaf)
    factored = {"a": SlotValue(jnp.ones((3, 2)), "grad", 0.0), "b": SlotValue(jnp.ones(2), "grad_sq", 0.0)}
    with pytest.raises(e.SlotError, match="b has another shape than its parameter"):
        ResetMoments(fraction=0.5, by="magnitude").edit_slots(factored, leaf=leaf)
    assert not np.asarray(ResetMoments().edit_slots(factored, leaf=leaf)["b"]).any()
