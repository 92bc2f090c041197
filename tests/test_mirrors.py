"""Trees of the train state that mirror the parameters move like slots."""

import typing

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import HookError, RuleError, StateError


class TrainState(fsh.TrainState):
    ema_params: typing.Any = None
    last_grads: typing.Any = None


MIRRORS = {"ema_params": "param", "last_grads": "grad"}


def make(step=0, tx=None, wrap=lambda tree: tree):
    rng = np.random.default_rng(0)
    trees = [
        wrap({"kernel": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=4))}) for _ in "abc"
    ]
    state = TrainState.create(
        apply_fn=None, params=trees[0], tx=tx or optax.adam(0.1), ema_params=trees[1], last_grads=trees[2]
    )
    return state.replace(step=step)


SCALES = jnp.array([[0.5], [2.0], [-4.0]])


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "frozen"])
def test_mirrors_follow_by_their_kind(wrap, x64):
    state = make(wrap=wrap)
    after, _ = fsh.operate(state, lambda w: SCALES * w, params="kernel", opt_state="transport", mirrors=MIRRORS)
    np.testing.assert_allclose(after.ema_params["kernel"], SCALES * state.ema_params["kernel"])
    np.testing.assert_allclose(after.last_grads["kernel"], state.last_grads["kernel"] / SCALES)
    assert after.ema_params["bias"] is state.ema_params["bias"]
    assert type(after) is TrainState
    assert (after.tx, type(after.ema_params)) == (state.tx, type(state.ema_params))
    without, _ = fsh.operate(state, lambda w: SCALES * w, params="kernel", opt_state="transport")
    assert without.ema_params is state.ema_params


def test_averages_commute_with_linear_edits(x64):
    """The average of the edited parameters is the edited average (an edit that is linear, over ten steps)."""
    rng = np.random.default_rng(0)
    recorded = [jnp.asarray(rng.normal(size=(3, 4))) for _ in range(10)]

    def average(steps):
        mean = jnp.zeros_like(steps[0])
        for value in steps:
            mean = 0.9 * mean + 0.1 * value
        return mean

    def edit(w):
        return jnp.repeat(SCALES * w, 2, axis=1)

    state = make().replace(params={"kernel": recorded[-1]}, ema_params={"kernel": average(recorded)}, last_grads=None)
    state = state.replace(opt_state=state.tx.init(state.params))
    after, _ = fsh.operate(state, edit, params="kernel", mirrors=MIRRORS)
    np.testing.assert_allclose(after.ema_params["kernel"], average([edit(value) for value in recorded]))
    assert after.last_grads is None


def test_an_element_that_starts_anew_does_so_in_its_average_too():
    state = make()
    mask = jnp.arange(4) < 2
    after, _ = fsh.operate(
        state, lambda w: jnp.where(mask, w, jax.lax.stop_gradient(w) * 0 + 7), params="kernel", mirrors=MIRRORS
    )
    assert (after.ema_params["kernel"][:, 2:] == 7).all()
    assert jnp.array_equal(after.ema_params["kernel"][:, :2], state.ema_params["kernel"][:, :2])
    assert (after.last_grads["kernel"][:, 2:] == 0).all()


def test_hooks_move_mirrors_in_a_loop_also_where_shapes_and_paths_change():
    hooks = fsh.SurgeryHooks(mirrors=MIRRORS)
    seen = []
    rebuild = lambda state, record: seen.append((type(state), record.paths))  # noqa: E731
    hooks.add("wide", lambda w: jnp.pad(w, ((0, 0), (0, 2))), params="kernel", when=fsh.at(2), on_reshape=rebuild)
    hooks.add("long", lambda b: jnp.pad(b, (0, 2)), params="bias", when=fsh.at(2), on_reshape=rebuild)
    hooks.add(
        "split",
        lambda leaves: {"left": leaves["kernel"][:, :3], "right": leaves["kernel"][:, 3:], "bias": leaves["bias"]},
        params="**",
        when=fsh.at(3),
        on_reshape=rebuild,
    )
    state = make()
    for step in range(5):
        state = hooks(step, state.replace(step=step))
    shapes = {"bias": (6,), "left": (3, 3), "right": (3, 3)}
    assert all(jax.tree.map(jnp.shape, tree) == shapes for tree in (state.params, state.ema_params, state.last_grads))
    assert [kind for kind, _ in seen] == [TrainState] * 3
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(state.tx.init(state.params))


def test_mirrors_follow_under_jit_and_retrace_nothing():
    traces = []

    @jax.jit
    def step(state):
        traces.append(None)
        return state.replace(step=state.step + 1)

    state = step(make(step=jnp.int32(0)))
    edit = lambda w: 2 * w  # noqa: E731
    host, _ = fsh.operate(state, edit, params="kernel", mirrors=MIRRORS)
    traced = jax.jit(lambda state: fsh.operate(state, edit, params="kernel", mirrors=MIRRORS)[0])(state)
    assert jnp.array_equal(traced.ema_params["kernel"], host.ema_params["kernel"])
    step(host)
    assert len(traces) == 1


def test_wrong_mirrors_are_told_before_anything_is_edited():
    with pytest.raises(HookError, match="mirrors= maps fields of the train state") as caught:
        fsh.SurgeryHooks(mirrors=["ema_params"])
    assert caught.value.write == 'mirrors={"ema_params": "param"}'
    with pytest.raises(RuleError, match=r"Unknown kind of slot\. Found: 'params'"):
        fsh.SurgeryHooks(mirrors={"ema_params": "params"})
    hooks = fsh.SurgeryHooks(mirrors={"ema": "param"})
    hooks.add("double", lambda w: 2 * w, params="kernel", when=fsh.at(100))
    with pytest.raises(StateError, match="names the field 'ema', which the train state has not"):
        hooks(0, make())
    hooks = fsh.SurgeryHooks(mirrors={"ema_params": "param"})
    hooks.add("double", lambda w: 2 * w, params="kernel", when=fsh.at(100))
    with pytest.raises(StateError, match="'ema_params' of the train state does not mirror the parameters"):
        hooks(0, make().replace(ema_params={"kernel": jnp.ones((3, 4))}))


class WithStatistics(TrainState):
    batch_stats: typing.Any = None


def with_statistics(tx, wrap=dict):
    state = make()
    stats = {"norm": {"mean": jnp.arange(4.0), "var": jnp.ones(4)}}
    return WithStatistics.create(
        apply_fn=None, params=wrap(state.params), tx=tx, ema_params=wrap(state.ema_params), batch_stats=wrap(stats)
    )


def widen(leaves):
    """Units twice: their incoming weights with their running statistics."""
    return {path: jnp.concatenate([leaf, leaf], axis=-1) for path, leaf in leaves.items()}


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.1),
    "flat": lambda: optax.flatten(optax.adam(0.1)),
    "factored": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "frozen"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_statistics_are_edited_with_the_parameters_where_a_hook_asks(optimizer, wrap):
    tx = OPTIMIZERS[optimizer]()
    state = with_statistics(tx, wrap)
    hooks = fsh.SurgeryHooks(mirrors={"ema_params": "param"})
    selected = ["kernel", "bias", "batch_stats/norm/*"]
    hooks.add("wide", widen, params=selected, fields=("batch_stats",), when=fsh.at(1), on_reshape=lambda *_: None)
    hooks.add("double", lambda w: 2 * w, params="**", when=fsh.at(1))
    after = hooks(1, state.replace(step=1))
    mean = after.batch_stats["norm"]["mean"]
    assert mean.tolist() == [0, 1, 2, 3, 0, 1, 2, 3], "a hook that did not ask for them leaves them"
    assert after.params["kernel"].shape == after.ema_params["kernel"].shape == (3, 8)
    assert set(after.params) == {"kernel", "bias"}
    assert (type(after), type(after.params), after.tx) == (WithStatistics, type(state.params), tx)
    assert jax.tree.structure(after.opt_state) == jax.tree.structure(tx.init(after.params))
    assert hooks.ledger.records[1].paths == ("batch_stats/norm/mean", "batch_stats/norm/var", "bias", "kernel")
    tx.update(jax.tree.map(jnp.ones_like, after.params), after.opt_state, after.params)


def test_a_field_that_is_not_there_or_has_no_place_is_told():
    state = with_statistics(optax.adam(0.1))
    with pytest.raises(StateError, match="fields= names the field 'stats', which the train state has not"):
        fsh.operate(state, widen, params="**", fields=("stats",))
    bare = state.replace(params=jnp.ones(3), opt_state=state.tx.init(jnp.ones(3)))
    with pytest.raises(StateError, match="The field 'batch_stats' cannot stand beside the parameters"):
        fsh.operate(bare, lambda w: w, params="**", fields=("batch_stats",))
