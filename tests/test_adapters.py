"""Trainers without a TrainState: loose parts, and an NNX model that is edited in place."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny import QUICK, SGD, halve

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import RefusedError, StateError, StructureError

# Loose parts.


def bound(step: Any = None, tx: Any = tiny.MOMENTUM) -> Any:
    params = {"w": jnp.ones(2)}
    return fsh.bind(params=params, opt_state=tx.init(params), tx=tx, step=step)


def test_bound_parts_are_edited_and_the_given_ones_are_not():
    before = bound()
    after = tiny.make_hooks(halve)(3, before)  # without a step of its own, the caller's word counts
    assert after.params["w"].tolist() == [0.5, 0.5]
    assert before.params["w"].tolist() == [1, 1]
    assert (after.tx, after.step) == (before.tx, None)
    with pytest.raises(AttributeError):
        before.params = {}


def test_bound_parts_are_a_pytree_with_a_static_optimizer():
    before = bound(step=jnp.int32(3))
    assert [leaf.shape for leaf in jax.tree.leaves(before)] == [(2,), (2,), ()]
    after = jax.jit(lambda state: fsh.operate(state, halve, params="w")[0])(before)
    assert after.tx is before.tx
    assert after.params["w"].tolist() == [0.5, 0.5]
    assert after.replace(step=4).step == 4


def test_the_step_of_bound_parts_is_checked_if_there_is_one():
    with pytest.raises(fsh.errors.StepError, match=r"must be what `state.step` holds"):
        tiny.make_hooks(halve)(2, bound(step=jnp.int32(3)))
    with pytest.raises(StateError, match="The state has no `step`") as caught:
        tiny.make_hooks(halve).fire("a", bound())
    assert caught.value.found == "Bound"


def test_a_bound_optimizer_must_be_one():
    params = {"w": jnp.ones(2)}
    with pytest.raises(StateError, match=r"`state.tx` is no optax transformation"):
        fsh.operate(fsh.bind(params=params, opt_state=SGD.init(params), tx=SGD.init), halve)


# An NNX model and its optimizer.


class Model(nnx.Module):
    """A hidden layer with statistics, and two blocks in a list."""

    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        blocks = [nnx.Linear(4, 4, rngs=rngs) for _ in range(2)]
        self.blocks = nnx.List(blocks) if hasattr(nnx, "List") else blocks  # Flax 0.11 takes a list

    def __call__(self, x):
        x = self.norm(self.hidden(x))
        for block in self.blocks:
            x = block(x)
        return x


def make(wrt: Any = nnx.Param, tx: Any = tiny.MOMENTUM) -> tuple[Any, Any]:
    model = Model()
    return model, nnx.Optimizer(model, tx, wrt=wrt)


@nnx.jit
def train_step(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
    optimizer.update(model, grads)


X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def held(model: Any, optimizer: Any) -> Any:
    """All values of both, as numpy."""
    return tuple(nnx.to_pure_dict(jax.tree.map(np.array, nnx.state(part))) for part in (model, optimizer))


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_training_with_hooks_equals_training_a_state_of_the_same_values():
    model, optimizer = make()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    state = fsh.TrainState.create(apply_fn=None, params=nnx.to_pure_dict(params), tx=tiny.MOMENTUM)

    @jax.jit
    def plain_step(state, rest, x):
        def loss(params):
            own = jax.tree.map(lambda leaf: leaf, rest)  # variables of this trace, which a model may set
            model = nnx.merge(graphdef, params, own)
            value = jnp.mean((model(x) - 1) ** 2)
            return value, nnx.state(model, nnx.Not(nnx.Param))

        grads, rest = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), rest

    both = []
    for _ in range(2):
        hooks = fsh.SurgeryHooks()
        hooks.add("halve", halve, params="**/kernel", when=fsh.every(2), opt_state="transport", **QUICK)
        hooks.add("norm", fsh.surgeries.Normalize(), params="blocks/1/kernel", when=fsh.at(3), **QUICK)
        both.append(hooks)
    for step in range(1, 5):
        train_step(model, optimizer, X)
        both[0](step, fsh.bind_nnx(model, optimizer))
        state, rest = plain_step(state, rest, X)
        state = both[1](step, state)
    found, wanted = fsh.bind_nnx(model, optimizer), (state.params, state.opt_state)
    for a, b in zip(jax.tree.leaves((found.params, found.opt_state)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert tiny.events(both[0], "fired") == tiny.events(both[1], "fired") != []
    assert both[0].ledger.records[1].paths == ("blocks/0/kernel", "blocks/1/kernel", "hidden/kernel")


def test_variables_stay_the_same_objects_and_nothing_recompiles():
    model, optimizer = make()
    kernel, trace = model.hidden.kernel, jax.tree.leaves(optimizer.opt_state, is_leaf=is_variable)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model))

    hooks, view = tiny.make_hooks(halve, params="**/kernel", options={}), fsh.bind_nnx(model, optimizer)
    for i in range(1, 5):
        step(model, optimizer)
        hooks(i, view)  # one view serves all steps
    assert len(traces) == 1
    assert model.hidden.kernel is kernel
    assert all(a is b for a, b in zip(jax.tree.leaves(optimizer.opt_state, is_leaf=is_variable), trace, strict=True))
    assert optimizer.step[...] == 4


def is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def test_an_idle_call_returns_the_view_and_a_fire_one_without_pending_values():
    model, optimizer = make()
    view = fsh.bind_nnx(model, optimizer)
    hooks = tiny.make_hooks(halve, fsh.at(1), params="hidden/kernel")
    assert hooks(0, view) is view
    fired = hooks(1, view)
    model.hidden.kernel[...] = jnp.zeros((3, 4))  # what the loop does next
    assert not fired.params["hidden"]["kernel"].any()
    assert not view.params["hidden"]["kernel"].any()


def test_an_error_in_a_later_hook_leaves_the_model_untouched():
    model, optimizer = make()
    before = held(model, optimizer)
    hooks = tiny.make_hooks(halve, fsh.at(2), params="hidden/kernel", strict_steps=True)
    hooks.add("b", halve, params="hidden/kernel", when=fsh.at(1), **QUICK)
    view = fsh.bind_nnx(model, optimizer)
    hooks(0, view)
    with pytest.raises(fsh.errors.StepError, match="jumps over steps") as caught:
        hooks(2, view)  # the first hook has fired when the second is found to be passed
    assert caught.value.hook == "b"
    assert_same(held(model, optimizer), before)
    hooks.remove("b")
    hooks(2, view)
    np.testing.assert_array_equal(model.hidden.kernel[...], before[0]["hidden"]["kernel"] / 2)


def test_a_refused_fire_leaves_the_model_as_it_was():
    model, optimizer = make()
    before = held(model, optimizer)
    hooks = tiny.make_hooks(lambda w: w / 0, fsh.at(1), params="hidden/kernel", options={})
    hooks(0, fsh.bind_nnx(model, optimizer))
    hooks(1, fsh.bind_nnx(model, optimizer))
    with pytest.raises(RefusedError):
        hooks.flush()
    with pytest.raises(RefusedError):
        fsh.operate(fsh.bind_nnx(model, optimizer), lambda w: w / 0, params="hidden/kernel")
    assert_same(held(model, optimizer), before)


def test_preview_and_operate_are_pure_and_write_back_writes():
    model, optimizer = make()
    before = held(model, optimizer)
    view = fsh.bind_nnx(model, optimizer)
    tiny.make_hooks(halve, params="hidden/kernel").preview("a", view)
    new, _ = fsh.operate(view, halve, params="hidden/kernel", opt_state="transport")
    jitted = jax.jit(lambda state: fsh.operate(state, halve, params="blocks/0/kernel")[0])(view)
    assert_same(held(model, optimizer), before)
    for state, path in ((new, ("hidden", "kernel")), (jitted, ("blocks", 0, "kernel"))):
        state.write_back()
        found, old = held(model, optimizer)[0], before[0]
        for name in path:
            found, old = found[name], old[name]
        np.testing.assert_array_equal(found, old / 2)


def test_fire_by_hand_writes():
    model, optimizer = make()
    old = np.asarray(model.hidden.bias[...])
    view = tiny.make_hooks(lambda b: b + 1, params="hidden/bias").fire("a", fsh.bind_nnx(model, optimizer))
    np.testing.assert_array_equal(model.hidden.bias[...], old + 1)
    np.testing.assert_array_equal(view.params["hidden"]["bias"], old + 1)


def test_only_what_the_optimizer_trains_is_seen():
    class Adapter(nnx.Param):
        """The trained part of a model that is otherwise frozen."""

    model = Model()
    model.extra = Adapter(jnp.ones(3))
    optimizer = nnx.Optimizer(model, tiny.MOMENTUM, wrt=Adapter)
    _, record = fsh.operate(fsh.bind_nnx(model, optimizer), halve)
    assert record.paths == ("extra",)


def test_the_steps_of_loop_and_optimizer_are_compared():
    model, optimizer = make()
    train_step(model, optimizer, X)
    with pytest.raises(fsh.errors.StepError) as caught:
        tiny.make_hooks(halve, params="**")(0, fsh.bind_nnx(model, optimizer))
    assert caught.value.found == "step 0, state.step 1"


@pytest.mark.parametrize("swapped", [False, True])
def test_bind_nnx_takes_a_model_and_its_optimizer(swapped):
    model, optimizer = make()
    given = (optimizer, model) if swapped else (model, tiny.MOMENTUM)
    with pytest.raises(StateError, match=r"`bind_nnx` takes an NNX model and its `nnx.Optimizer`") as caught:
        fsh.bind_nnx(*given)
    assert caught.value.found == ("Optimizer, Model" if swapped else "Model, GradientTransformationExtraArgs")
    with pytest.raises(StateError, match="A train state needs params") as caught:
        fsh.operate(model, halve)
    assert "bind_nnx" in caught.value.write


def test_a_model_with_the_optimizer_of_another_is_refused():
    _, optimizer = make()
    with pytest.raises(StateError, match=r"not what `tx.init` makes"):
        fsh.operate(fsh.bind_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optimizer), halve)


def test_values_with_other_paths_are_not_written():
    model, optimizer = make()
    before = held(model, optimizer)
    view = fsh.bind_nnx(model, optimizer)
    params = nnx.State({**view.params, "more": jnp.ones(2)})
    for changes in ({"params": params}, {"params": view.params, "opt_state": ()}):
        with pytest.raises(StructureError, match="have other paths than the model"):
            view.replace(**changes).write_back()
    with pytest.raises(StateError, match="has no field 'batch_stats'"):
        view.replace(batch_stats=None)
    assert_same(held(model, optimizer), before)


def test_step_and_optimizer_can_be_replaced_too():
    model, optimizer = make()
    other = optax.sgd(0.2, momentum=0.9)
    fsh.bind_nnx(model, optimizer).replace(step=7, tx=other).write_back()
    assert (optimizer.step[...], optimizer.step[...].dtype) == (7, jnp.uint32)
    assert optimizer.tx is other


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


WRAPPED = {
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "accumulating": lambda: optax.MultiSteps(tiny.MOMENTUM, 2),
    "partitioned": lambda: optax.partition({"matrix": tiny.MOMENTUM, "vector": SGD}, by_rank),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_states_of_wrapping_optimizers_are_written_back(name):
    model, optimizer = make(tx=WRAPPED[name]())
    train_step(model, optimizer, X)
    view = fsh.bind_nnx(model, optimizer)
    before = jax.tree.map(np.array, view.opt_state)
    tiny.make_hooks(halve, params="hidden/kernel", options={"opt_state": "transport"})(1, view)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(view.opt_state), strict=True)
    changed = [(a, np.asarray(b)) for a, b in pairs if not np.array_equal(a, b)]
    assert changed
    for old, new in changed:
        assert old.shape == (3, 4)
        np.testing.assert_allclose(new, 2 * old, rtol=1e-6)
    train_step(model, optimizer, X)


def test_a_fire_that_changes_shapes_writes_the_new_ones():
    model, optimizer = make()

    def widen(leaves):
        return {path: jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, 1)]) for path, leaf in leaves.items()}

    hooks = fsh.SurgeryHooks()
    hooks.add("widen", widen, params="blocks/1/*", when=fsh.at(1), on_reshape=lambda state, record: None)
    hooks(0, fsh.bind_nnx(model, optimizer))
    assert model(X).shape == (5, 4)
    hooks(1, fsh.bind_nnx(model, optimizer))
    assert fsh.bind_nnx(model, optimizer).opt_state[0].trace["blocks"][1]["kernel"].shape == (4, 5)
    train_step(model, optimizer, X)
    assert model(X).shape == (5, 5)


def test_nnx_is_imported_only_where_it_is_used():
    code = "import sys, flax_surgery_hooks; assert 'flax.nnx' not in sys.modules, 'imported'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
