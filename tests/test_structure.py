"""Hooks that change shapes: what they must bring, what is checked before anything fires, and that training goes on."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import StructureError, UserCodeError


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(3)(hidden)


BATCH = np.asarray(np.random.default_rng(0).normal(size=(8, 5)), np.float32)


def make_state() -> Any:
    params = Mlp(4).init(jax.random.key(0), BATCH)["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return fsh.TrainState.create(apply_fn=Mlp(4).apply, params=params, tx=tx)


def make_step() -> Any:
    def step(state: Any) -> Any:
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, BATCH) - 1) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    return jax.jit(step)


class Double:
    """Every hidden unit twice, its outgoing weights halved: the same function."""

    preserves = "function"

    def __call__(self, leaves):
        return {
            "Dense_0/kernel": jnp.concatenate([leaves["Dense_0/kernel"]] * 2, 1),
            "Dense_0/bias": jnp.concatenate([leaves["Dense_0/bias"]] * 2),
            "Dense_1/kernel": jnp.concatenate([leaves["Dense_1/kernel"]] * 2) / 2,
        }


HIDDEN = ["Dense_0/*", "Dense_1/kernel"]


def add_double(hooks: fsh.SurgeryHooks, **kwargs: Any) -> None:
    hooks.add("grow", Double(), params=HIDDEN, **({"when": fsh.at(3)} | kwargs))


def run(hooks: fsh.SurgeryHooks, steps: int = 6) -> Any:
    state, train_step = make_state(), make_step()
    for step in range(1, steps + 1):
        state = hooks(step, train_step(state))
    return state


def test_a_model_grows_in_the_loop_and_computes_the_same():
    grown: list[Any] = []
    hooks = fsh.SurgeryHooks()
    add_double(hooks, apply_fn=Mlp(8).apply, on_reshape=lambda state, record: grown.append((state, record)))
    hooks.add("norm", fsh.surgeries.Normalize(), params="Dense_1/kernel", when=fsh.every(2), priority=-1)
    state = run(hooks)
    assert state.params["Dense_0"]["kernel"].shape == (5, 8)
    assert state.opt_state[1][0].mu["Dense_1"]["kernel"].shape == (8, 3)
    ((at, record),) = grown
    assert (record.hook, record.step) == ("grow", 3)
    before = run(fsh_without_growth(), steps=3)
    np.testing.assert_allclose(
        at.apply_fn({"params": at.params}, BATCH), before.apply_fn({"params": before.params}, BATCH), rtol=1e-5
    )
    np.testing.assert_allclose(
        at.opt_state[1][0].mu["Dense_0"]["kernel"][:, :4], before.opt_state[1][0].mu["Dense_0"]["kernel"] / 2, rtol=1e-6
    )
    fired = [(r.step, r.hook) for r in hooks.ledger.records if r.event == "fired"]
    assert fired == [(2, "norm"), (3, "grow"), (4, "norm"), (6, "norm")]
    shapes = dict(zip(record.paths, record.leaves, strict=True))
    assert shapes["Dense_1/kernel"] == ((8, 3), "float32")


def fsh_without_growth() -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks()
    hooks.add("norm", fsh.surgeries.Normalize(), params="Dense_1/kernel", when=fsh.every(2))
    return hooks


def test_a_fire_that_changes_shapes_unannounced_is_an_error_at_the_first_call():
    hooks = fsh.SurgeryHooks()
    add_double(hooks, when=fsh.at(5_000))
    with pytest.raises(StructureError, match="apply_fn= for the new shapes, and on_reshape=") as caught:
        run(hooks, steps=1)
    assert caught.value.hook == "grow"
    assert caught.value.path == "Dense_0/bias"
    assert (
        "[4, 3] -> [8, 3]" in str(caught.value) or "[5, 4] -> [5, 8]" in str(caught.value) or "[4]" in str(caught.value)
    )


def test_later_hooks_are_checked_against_the_new_shapes_at_the_first_call():
    hooks = fsh.SurgeryHooks()
    add_double(hooks, apply_fn=Mlp(8).apply)
    mask = np.ones((4, 3), np.float32)
    hooks.add("mask", lambda kernel: kernel * mask, params="Dense_1/kernel", when=fsh.at(1, 5_000))
    state = make_step()(make_state())
    for _ in range(2):  # whoever tries again is told again
        with pytest.raises(UserCodeError, match=r"broadcast|incompatible") as caught:
            hooks(1, state)
        assert caught.value.hook == "mask"
    fine = fsh.SurgeryHooks()
    add_double(fine, apply_fn=Mlp(8).apply)
    fine.add("mask", lambda kernel: kernel * mask, params="Dense_1/kernel", when=fsh.at(1))  # only before the growth
    run(fine, steps=4)


def test_a_hook_grows_twice():
    hooks = fsh.SurgeryHooks()

    def bring(state, record):
        return state.replace(apply_fn=Mlp(state.params["Dense_0"]["bias"].size).apply)

    add_double(hooks, when=fsh.at(2, 4), on_reshape=bring)
    state = run(hooks)
    assert state.params["Dense_1"]["kernel"].shape == (16, 3)


def test_a_refused_growth_leaves_everything_as_it_was():
    called = []

    def broken(leaves):
        return {path: leaf + jnp.inf for path, leaf in Double()(leaves).items()}

    hooks = fsh.SurgeryHooks(on_error="skip")
    hooks.add(
        "grow", broken, params=HIDDEN, when=fsh.at(1), apply_fn=Mlp(8).apply, on_reshape=lambda *_: called.append(1)
    )
    state = make_step()(make_state())
    new = hooks(1, state)
    hooks.flush()
    assert new.params is not None
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert a is b
    assert new.apply_fn == state.apply_fn
    assert not called
    assert hooks.ledger.records[-1].event == "refused"


def test_preview_of_a_growth_commits_nothing():
    called = []
    hooks = fsh.SurgeryHooks()
    add_double(hooks, apply_fn=Mlp(8).apply, on_reshape=lambda *_: called.append(1))
    record = hooks.preview("grow", make_state(), step=0)
    assert record.figures["params/elements"] == 2 * (20 + 4 + 12)
    assert not called


def test_an_optimizer_that_does_not_fit_the_new_shapes_is_an_error():
    hooks = fsh.SurgeryHooks()
    add_double(hooks, when=fsh.at(1), apply_fn=Mlp(8).apply, tx=optax.sgd(0.1, momentum=0.9))
    state = make_step()(make_state())
    with pytest.raises(StructureError, match="another structure than `tx` makes") as caught:
        hooks(1, state)
    assert caught.value.hook == "grow"


def test_an_optimizer_whose_init_fails_on_the_new_shapes_is_an_error():
    def init(params):
        if params["Dense_0"]["bias"].shape == (8,):
            raise ValueError("made for width 4")
        return optax.adam(0.1).init(params)

    tx = optax.GradientTransformation(init, optax.adam(0.1).update)
    state = make_state().replace(tx=tx, opt_state=tx.init(make_state().params))
    hooks = fsh.SurgeryHooks()
    add_double(hooks, when=fsh.at(1), apply_fn=Mlp(8).apply)
    with pytest.raises(StructureError, match="made for width 4"):
        hooks.fire("grow", state, step=1)


def test_slots_that_stayed_behind_are_an_error():
    """A function rule may return anything of the new shape, so only `keep` could leave a slot behind: it is refused."""
    hooks = fsh.SurgeryHooks()
    add_double(hooks, apply_fn=Mlp(8).apply, opt_state="keep")
    with pytest.raises(fsh.errors.RuleError, match="cannot be kept"):
        hooks.fire("grow", make_state(), step=1)


def test_apply_fn_for_a_state_without_one_is_an_error():
    state = make_state()

    class Bare:
        params, opt_state, tx, step = state.params, state.opt_state, state.tx, 1

        def replace(self, **changes):
            return self

    hooks = fsh.SurgeryHooks()
    add_double(hooks, apply_fn=Mlp(8).apply)
    with pytest.raises(StructureError, match="the state has no such field"):
        hooks.fire("grow", Bare(), step=1)


@pytest.mark.parametrize(
    ("on_reshape", "error", "message"),
    [
        (lambda state, record: 1 / 0, UserCodeError, "on_reshape raised ZeroDivisionError"),
        (lambda state, record: 3, StructureError, "no train state"),
    ],
)
def test_what_on_reshape_does_wrong_names_the_hook(on_reshape, error, message):
    hooks = fsh.SurgeryHooks()
    add_double(hooks, when=fsh.at(1), on_reshape=on_reshape)
    state = make_step()(make_state())
    with pytest.raises(error, match=message) as caught:
        hooks(1, state)
    assert (caught.value.hook, caught.value.step) == ("grow", 1)
    assert not [record for record in hooks.ledger.records if record.event == "fired"]
