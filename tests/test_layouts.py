"""Slots of another shape than their parameter, against the same optimizer run on mapped gradients, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.layouts import FACTORED
from flax_surgery_hooks.optax import scale_by_adam_per_element

STEPS = 4
ROWS = jnp.array([2, 0, 1])


def start():
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=4))}


def gradients(step, rank_one=False):
    rng = np.random.default_rng(1 + step)
    kernel = np.outer(*(np.random.default_rng(9).normal(size=n) for n in (3, 4))) * rng.normal()
    return {
        "kernel": jnp.asarray(kernel if rank_one else rng.normal(size=(3, 4))),
        "bias": jnp.asarray(rng.normal(size=4)),
    }


def run(tx, of_params=lambda w: w, of_gradient=lambda g: g, **kwargs):
    """The state after some steps at drifting parameters, the kernel and its gradients mapped."""
    params = start()
    state = tx.init({**params, "kernel": of_params(params["kernel"])})
    for step in range(STEPS):
        grads = gradients(step, **kwargs)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        mapped = {**params, "kernel": of_params(params["kernel"])}
        _, state = tx.update({**grads, "kernel": of_gradient(grads["kernel"])}, state, mapped)
    return params, state


def edited(tx, edit, rule="transport", surgery_params="kernel", **kwargs):
    params, state = run(tx, **kwargs)
    bound = fsh.bind(params=params, opt_state=state, tx=tx)
    return fsh.operate(bound, edit, params=surgery_params, opt_state=rule)


def differing(a, b, rtol=1e-9):
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [jax.tree_util.keystr(k) for (k, x), y in pairs if x.shape != y.shape or not np.allclose(x, y, rtol, 1e-14)]


# Adafactor


@functools.cache
def factored():
    return optax.scale_by_factored_rms(min_dim_size_to_factor=2, epsilon=0.0)


SCALES = jnp.asarray([[0.5], [2.0], [-4.0]])


@pytest.mark.parametrize(
    ("edit", "of_gradient"),
    [
        (lambda w: w[ROWS], lambda g: g[ROWS]),
        (lambda w: 3 * w, lambda g: g / 3),
        (lambda w: SCALES * w, lambda g: g / SCALES),
        (lambda w: w.T, lambda g: g.T),
        (lambda w: jnp.repeat(w, 2, axis=1), lambda g: jnp.repeat(g, 2, axis=1) / 2),
    ],
    ids=["permute", "scale", "per_row", "transposed", "duplicate"],
)
def test_factored_moments_of_rank_one_are_exact(edit, of_gradient, x64):
    expected = run(factored(), edit, of_gradient, rank_one=True)[1]
    after, record = edited(factored(), edit, rank_one=True)
    assert differing(after.opt_state, expected) == []
    assert record.restarted == ()
    wrong = run(factored(), edit, lambda g: edit(g), rank_one=True)[1]
    keeps = np.allclose(of_gradient(jnp.ones((3, 4))), 1)
    assert bool(differing(after.opt_state, wrong)) != keeps, "gradients that scale as the weights do must fail"


def test_factored_moments_of_any_rank_are_exact_under_what_is_uniform(x64):
    for edit, of_gradient in ((lambda w: 3 * w, lambda g: g / 3), (lambda w: w[ROWS], lambda g: g[ROWS])):
        assert differing(edited(factored(), edit)[0].opt_state, run(factored(), edit, of_gradient)[1]) == []


def test_a_leaf_is_factored_once_it_is_large_enough_and_no_longer_when_it_is_not(x64):
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    grown, record = edited(tx, lambda w: jnp.concatenate([w, w[:1]]), "carry")
    assert grown.opt_state.v["kernel"].shape == (1,)
    assert grown.opt_state.v_row["kernel"].shape == (4,)
    whole = run(tx)[1].v["kernel"]
    repeated = np.concatenate([whole, whole[:1]])
    np.testing.assert_allclose(grown.opt_state.v_row["kernel"], repeated.mean(axis=1))
    shrunk, _ = fsh.operate(grown, lambda w: w[:3], params="kernel")
    rows, columns = repeated.mean(axis=1), repeated.mean(axis=0)
    np.testing.assert_allclose(shrunk.opt_state.v["kernel"], np.outer(rows, columns)[:3] / rows.mean())
    assert record.restarted == ()


def test_what_does_not_move_stays_bitwise_through_lifting_and_lowering(x64):
    params, state = run(factored())
    after, _ = fsh.operate(fsh.bind(params=params, opt_state=state, tx=factored()), lambda w: w + 1, params="**")
    assert all(jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after.opt_state, state)), strict=True))


def test_lifting_is_the_estimate_that_the_optimizer_uses(x64):
    _, state = run(factored())
    grads = gradients(99)
    # One more step with a gradient of nearly no weight in the averages: what it divides by is the lifted moment.
    parts = [getattr(state, name)["kernel"] for name in ("v_row", "v_col", "v")]
    lifted = FACTORED.lift(parts, (3, 4))
    update, after = factored().update(grads, state, start())
    decay = 1.0 - float(state.count + 1) ** -0.8
    new = [
        decay * part + (1 - decay) * (grads["kernel"] ** 2).mean(axis=axis)
        for part, axis in zip(parts, (1, 0), strict=False)
    ]
    expected = grads["kernel"] / np.sqrt(np.outer(new[0], new[1]) / new[0].mean())
    np.testing.assert_allclose(update["kernel"], expected)
    np.testing.assert_allclose(lifted, np.outer(parts[0], parts[1]) / parts[0].mean())
    assert after.count == state.count + 1


# SM3, NovoGrad


@pytest.mark.parametrize(
    ("edit", "of_squares"),
    [
        (lambda w: SCALES * w, lambda v: v / SCALES**2),
        (lambda w: w[ROWS], lambda v: v[ROWS]),
        (lambda w: w[:2], lambda v: v[:2]),
    ],
    ids=["per_row", "permute", "slice"],
)
def test_sums_along_axes_stay_bounds_from_above(edit, of_squares, x64):
    tx = optax.scale_by_sm3(b2=1.0)
    squares = sum(gradients(step)["kernel"] ** 2 for step in range(STEPS))
    before = np.minimum.outer(*run(tx)[1].mu["kernel"])
    after, record = edited(tx, edit)
    bound, mapped = np.minimum.outer(*after.opt_state.mu["kernel"]), of_squares(squares)
    assert (bound >= mapped * (1 - 1e-12)).all()
    assert (bound <= of_squares(before).max()).all(), "a bound that says nothing would pass the first test"
    assert record.restarted == ()


def test_a_sum_over_the_leaf_is_exact_where_all_scale_alike(x64):
    tx = optax.scale_by_novograd(eps=0.0)
    for edit, of_gradient in ((lambda w: -2 * w, lambda g: g / -2), (lambda w: w[ROWS], lambda g: g[ROWS])):
        expected = run(tx, edit, of_gradient)[1]
        assert differing(edited(tx, edit)[0].opt_state, expected) == []
    assert differing(edited(tx, lambda w: -2 * w, "carry")[0].opt_state, run(tx, lambda w: w, lambda g: g / -2)[1])


# L-BFGS


def test_memories_of_past_steps_follow_by_the_chain_rule(x64):
    tx = optax.scale_by_lbfgs(memory_size=3)
    expected = run(tx, lambda w: SCALES * w, lambda g: g / SCALES)[1]
    after, record = edited(tx, lambda w: SCALES * w)
    assert differing(after.opt_state, expected) == []
    assert record.restarted == ()


def test_memories_are_dropped_where_the_function_changes(x64):
    tx = optax.scale_by_lbfgs(memory_size=3)
    after, record = edited(tx, lambda w: SCALES * w, "carry")
    assert after.opt_state.count == 0
    assert not after.opt_state.weights_memory.any()
    assert not any(map(jnp.any, (after.opt_state.diff_params_memory["kernel"],)))
    assert record.restarted == (
        "ScaleByLBFGSState.diff_params_memory kernel", "ScaleByLBFGSState.diff_updates_memory kernel",
    )  # fmt: skip
    grads = gradients(7)
    update, state = tx.update(grads, after.opt_state, after.params)
    fresh = tx.update(grads, tx.init(after.params), after.params)[0]
    assert differing(update, fresh) == [], "as an optimizer that starts here"
    assert not state.weights_memory.any(), "no pair across the edit"


# GaLore


@pytest.mark.skipif(not hasattr(contrib, "galore"), reason="an older optax")
@pytest.mark.parametrize("rule", ["carry", "transport"])
def test_a_projector_stays_under_value_edits_and_is_due_at_once_after_others(rule, x64):
    tx = contrib.scale_by_galore(rank=2, update_proj_gap=1_000)
    params, state = run(tx)
    bound = fsh.bind(params=params, opt_state=state, tx=tx)
    value, record = fsh.operate(bound, lambda w: 2 * w, params="kernel", opt_state=rule)
    assert record.restarted == ()
    assert value.opt_state.projector["kernel"] is not None
    assert jnp.array_equal(value.opt_state.projector["kernel"], state.projector["kernel"])
    assert value.opt_state.count == state.count
    grown, record = fsh.operate(
        bound, lambda w: jnp.pad(w, ((0, 0), (0, 2)), constant_values=0.1), params="kernel", opt_state=rule
    )
    assert grown.opt_state.count == 0
    assert grown.opt_state.base_optimizer_state.count == state.base_optimizer_state.count
    assert {name.split(".")[0] for name in record.restarted} == {"ScaleByAdamState", "GaLoreState"}
    grads = {"kernel": jnp.ones((3, 6)), "bias": jnp.ones(4)}
    update, _ = tx.update(grads, grown.opt_state, grown.params)
    assert jnp.any(update["kernel"] != 0), "a projector of zeros would stop the leaf in silence"
    stopped = grown.opt_state._replace(count=state.count)
    assert not jnp.any(tx.update(grads, stopped, grown.params)[0]["kernel"] != 0)


# One vector for all parameters


@pytest.mark.parametrize("inner", [optax.scale_by_adam, lambda: optax.trace(0.9), optax.scale_by_lion])
def test_slots_in_one_vector_follow_like_others(inner, x64):
    edit, of_gradient = (lambda w: (SCALES * w)[:2]), (lambda g: (g / SCALES)[:2])
    expected = run(optax.flatten(inner()), edit, of_gradient)[1]
    after, record = edited(optax.flatten(inner()), edit)
    assert differing(after.opt_state, expected) == []
    both, _ = edited(optax.flatten(inner()), lambda w: w[::-1], surgery_params="**")
    plain, _ = edited(inner(), lambda w: w[::-1], surgery_params="**")
    trees = jax.tree.leaves(plain.opt_state, is_leaf=lambda node: isinstance(node, dict))
    flat = [jax.flatten_util.ravel_pytree(tree)[0] for tree in trees]
    held = jax.tree.leaves(both.opt_state)
    assert differing(held, [jnp.reshape(a, b.shape) for a, b in zip(flat, held, strict=True)]) == []
    assert record.restarted == ()


def test_leaves_are_added_to_and_taken_from_one_vector(x64):
    tx = optax.flatten(optax.scale_by_adam())

    def split(leaves):
        return {"bias": leaves["bias"], "left": leaves["kernel"][:, :2], "right": leaves["kernel"][:, 2:]}

    after, _ = edited(tx, split, "carry", surgery_params="**")
    mu = run(tx)[1].mu
    kernel = mu[4:].reshape(3, 4)
    np.testing.assert_allclose(
        after.opt_state.mu, np.concatenate([mu[:4], kernel[:, :2].ravel(), kernel[:, 2:].ravel()])
    )


# Counts of units, line searches, registration


@pytest.mark.parametrize("per", ["element", "unit"])
def test_elements_that_start_anew_are_corrected_as_in_their_first_steps(per, x64):
    tx = scale_by_adam_per_element(per=per)
    mask = jnp.array([True, True, False, False])
    after, _ = edited(tx, lambda w: jnp.where(mask, w, jax.lax.stop_gradient(w) + 1), "carry")
    held = after.opt_state
    ages = jnp.broadcast_to(held.age["kernel"], (3, 4))
    assert (ages[:, :2] == STEPS).all()
    assert (ages[:, 2:] == 0).all()
    assert not held.nu["kernel"][:, 2:].any(), "the count does what a mean of others would have to"
    update, _ = tx.update(gradients(5), held, after.params)
    begun, _ = tx.update(gradients(5), tx.init(after.params), after.params)
    np.testing.assert_array_equal(update["kernel"][:, 2:], begun["kernel"][:, 2:])


@pytest.mark.parametrize("search", [optax.scale_by_backtracking_linesearch, optax.scale_by_zoom_linesearch])
def test_a_line_search_forgets_the_loss_of_the_model_before(search):
    options = {"store_grad": True} if search is optax.scale_by_backtracking_linesearch else {}
    tx = optax.chain(optax.sgd(0.1), search(5, **options))
    params = start()

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    state = tx.init(params)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
    params = optax.apply_updates(params, updates)
    assert np.isfinite(state[1].value)
    bound = fsh.bind(params=params, opt_state=state, tx=tx)
    after, _ = fsh.operate(bound, lambda w: 3 * w, params="kernel")
    assert np.isinf(after.opt_state[1].value)
    value, _ = optax.value_and_grad_from_state(loss)(after.params, state=after.opt_state)
    assert value == loss(after.params)
    stale, _ = optax.value_and_grad_from_state(loss)(after.params, state=state)
    assert stale != loss(after.params), "the cached one is that of the model before"
    kept, _ = fsh.operate(bound, lambda w: 3 * w, params="kernel", opt_state="keep")
    assert kept.opt_state[1].value == state[1].value


def test_a_restart_names_a_field_and_a_time_that_exist():
    with pytest.raises(SlotError, match="TraceState has no field 'counts'"):
        fsh.register_slot(optax.TraceState, restarts={"counts": "edit"})
    with pytest.raises(fsh.SurgeryError, match=r"Unknown time of a restart\. Found: 'always'"):
        fsh.register_slot(optax.TraceState, restarts={"trace": "always"})


def test_shapes_are_those_of_the_slot_wherever_measurements_lie(x64):
    if not hasattr(optax, "monitor"):
        pytest.skip("an older optax")
    tx = optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.scale_by_lbfgs(memory_size=3))
    after, _ = edited(tx, lambda w: 2 * w, "carry")
    assert after.opt_state[1].diff_params_memory["kernel"].shape == (3, 3, 4)


def test_a_restart_is_for_its_own_state_and_not_for_one_whose_name_begins_alike(x64):
    tx = optax.named_chain(
        ("r1", optax.masked(optax.scale_by_lbfgs(memory_size=3), {"kernel": False, "bias": True})),
        ("r11", optax.trace(0.9)),
    )
    params, state = run(tx)
    after, _ = fsh.operate(fsh.bind(params=params, opt_state=state, tx=tx), lambda w: 2 * w, params="kernel")
    assert after.opt_state["r1"].inner_state.count == STEPS, "the edited leaf is none of its"


# Lookahead: parameters are a pair, slots those of the fast half


def test_lookahead_slots_follow_the_fast_half(x64):
    tx = optax.lookahead(optax.sgd(0.1, momentum=0.9), sync_period=3, slow_step_size=0.5)
    start_pair = optax.LookaheadParams.init_synced(start())

    def run_pair(edit=lambda w: w, of_gradient=lambda g: g):
        mapped = jax.tree.map(lambda w: edit(w) if w.ndim == 2 else w, start_pair)
        state = tx.init(mapped)
        for step in range(2):
            grads = gradients(step)
            grads = {**grads, "kernel": of_gradient(grads["kernel"])}
            _, state = tx.update(grads, state, mapped)
        return mapped, state

    params, state = run_pair()
    bound = fsh.bind(params=params, opt_state=state, tx=tx)
    edit, of_gradient = (lambda w: SCALES * w[ROWS]), (lambda g: g[ROWS] / SCALES)
    after, record = fsh.operate(bound, edit, params="{fast,slow}/kernel", opt_state="transport")
    expected = run_pair(edit, of_gradient)
    assert differing(after.opt_state, expected[1]) == []
    assert differing(after.params, expected[0]) == []
    assert record.paths == ("fast/kernel", "slow/kernel")
    assert differing(after.opt_state, run_pair(edit, edit)[1])
