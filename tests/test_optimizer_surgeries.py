"""Surgeries on the optimizer as a whole: hyperparameters, the re-warm, and the protocol behind them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from raised import Case
from tiny import MOMENTUM, assert_bitwise_equal, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import Freeze, Rewarm, Scale, SetHyperparams

LOWER = SetHyperparams({"learning_rate": 0.01})


def injected(**kwargs):
    return optax.inject_hyperparams(optax.adam)(**{"learning_rate": 0.1, **kwargs})


NESTED = {
    "bare": (injected(), lambda s: s),
    "chain": (optax.chain(optax.clip(1.0), injected()), lambda s: s[1]),
    "every_2": (optax.MultiSteps(injected(), 2).gradient_transformation(), lambda s: s.inner_opt_state),
    "masked": (optax.masked(injected(), {"w": True, "v": False}), lambda s: s.inner_state),
    "partition": (optax.partition({"a": injected(), "b": optax.sgd(0.1)}, {"w": "a", "v": "b"}),
                  lambda s: s.inner_states["a"].inner_state),
    "freezable": (fsh.optax.freezable(injected()), lambda s: s.inner_state),
    "in_itself": (optax.inject_hyperparams(lambda decay: optax.chain(injected(), optax.trace(decay)))(decay=0.9),
                  lambda s: s.inner_state[0]),
}  # fmt: skip


def state_of(tx):
    return make_state(0, tx, w=jnp.ones((2, 2)), v=jnp.ones(3))


@pytest.mark.parametrize("name", NESTED)
def test_hyperparams_are_written_wherever_they_are_and_nothing_else_changes(name):
    tx, find = NESTED[name]
    state = state_of(tx).apply_gradients(grads=state_of(tx).params)
    new, record = fsh.operate(state, LOWER)
    assert float(find(new.opt_state).hyperparams["learning_rate"]) == np.float32(0.01)
    written = find(state.opt_state).hyperparams["learning_rate"]
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
    assert [old is written for old, leaf in leaves if leaf is not old] == [True]
    assert new.tx is tx
    assert (record.event, record.rule, record.figures) == ("settled", "", {})
    assert record.paths == ("v", "w")


def test_the_next_update_takes_what_is_written():
    state = state_of(injected()).apply_gradients(grads=state_of(injected()).params)
    new, _ = fsh.operate(state, SetHyperparams({"learning_rate": 0.02, "b1": 0.5}))
    other = optax.adam(0.02, b1=0.5)
    expected, _ = other.update(state.params, state.opt_state.inner_state, state.params)
    assert float(new.opt_state.hyperparams["b1"]) == 0.5
    updates, after = new.tx.update(state.params, new.opt_state, state.params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)  # decays are float32 there
    assert float(after.hyperparams["learning_rate"]) == np.float32(0.02)


@pytest.mark.parametrize("kind", ["strong", "weak", "placed", "replicated", "numpy", "number"])
def test_a_compiled_step_goes_on(kind):
    traces = []

    @jax.jit
    def train_step(state):
        traces.append(1)
        return state.apply_gradients(grads=state.params)

    state = state_of(injected())
    if kind in ("placed", "replicated"):
        mesh = jax.make_mesh((8,), ("a",))
        where = jax.devices()[3] if kind == "placed" else NamedSharding(mesh, PartitionSpec())
        state = jax.device_put(state, where)
    rate = {"weak": jnp.asarray(0.1), "numpy": np.float32(0.1), "number": 0.1}.get(kind)
    if rate is not None:
        held = {**state.opt_state.hyperparams, "learning_rate": rate}
        state = state.replace(opt_state=state.opt_state._replace(hyperparams=held))
    train_step(state)
    hooks = fsh.SurgeryHooks()
    hooks.add("lower", LOWER, params="**", when=fsh.at(1))
    old, new = state, hooks(1, state.replace(step=1)).replace(step=state.step)
    train_step(new)
    assert len(traces) == 1
    before, after = (s.opt_state.hyperparams["learning_rate"] for s in (old, new))
    assert getattr(before, "weak_type", kind == "number") == after.weak_type
    if isinstance(before, jax.Array):
        assert (before.sharding, before.committed) == (after.sharding, after.committed)


def test_under_jit_and_abstractly():
    state = state_of(injected())
    inside = jax.jit(lambda state: fsh.operate(state, LOWER)[0])(state)
    assert_bitwise_equal(inside.opt_state, fsh.operate(state, LOWER)[0].opt_state)
    abstract = jax.eval_shape(lambda: state)
    ahead, _ = fsh.operate(abstract, LOWER)
    assert jax.tree.structure(ahead.opt_state) == jax.tree.structure(state.opt_state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(ahead.opt_state))


def test_loose_parts_and_nnx():
    tx, params = injected(), {"w": jnp.ones(2)}
    bound, _ = fsh.operate(fsh.bind(params=params, opt_state=tx.init(params), tx=tx), LOWER)
    assert float(bound.opt_state.hyperparams["learning_rate"]) == np.float32(0.01)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fsh.optax.freezable(injected()), wrt=nnx.Param)
    hooks = fsh.SurgeryHooks()
    hooks.add("lower", LOWER, params="**", when=fsh.at(0))
    hooks.add("freeze", Freeze(), params="bias", when=fsh.at(0))
    hooks(0, fsh.bind_nnx(model, optimizer))
    optimizer.update(model, nnx.state(model, nnx.Param))
    assert float(optimizer.opt_state.inner_state.hyperparams["learning_rate"][...]) == np.float32(0.01)
    assert not np.asarray(model.bias[...]).any()


def test_rewarm_lets_updates_of_the_selected_leaves_grow_anew():
    def run(state, steps):
        rows = []
        for _ in range(steps):
            before = state.params
            state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, before))
            rows.append([float((before[path] - state.params[path])[0]) for path in ("v", "w")])
        return state, np.round(rows, 6).tolist()

    tx = optax.chain(optax.sgd(1.0), fsh.optax.rewarm(2))
    state, rows = run(make_state(0, tx, w=jnp.zeros(1), v=jnp.zeros(1)), 2)
    assert rows == [[1, 1]] * 2
    state, _ = fsh.operate(state, Rewarm(), params="w")
    state, rows = run(state, 3)
    assert rows == [[1, 0], [1, 0.5], [1, 1]]
    state, _ = fsh.operate(state, Rewarm())
    assert run(state, 3)[1] == [[0, 0], [0.5, 0.5], [1, 1]]


def test_one_bare_array_and_leaves_that_a_partition_leaves_out():
    tx = optax.chain(optax.sgd(1.0), fsh.optax.rewarm(2))
    bare, _ = fsh.operate(fsh.bind(params=jnp.ones(2), opt_state=tx.init(jnp.ones(2)), tx=tx), Rewarm())
    assert int(bare.opt_state[1].since) == 0
    split = optax.partition({"a": tx, "b": optax.sgd(1.0)}, {"w": "a", "v": "b"})
    state, _ = fsh.operate(state_of(split), Rewarm(), params="w")
    assert int(state.opt_state.inner_states["a"].inner_state[1].since["w"]) == 0


def test_a_preview_leaves_the_state_and_configs_name_them():
    config = {
        "a": fsh.config.hook("set_hyperparams", params="**", at=(1,), hyperparams={"learning_rate": 0.01}),
        "b": fsh.config.hook("rewarm", params="w", every=2),
    }
    hooks = fsh.SurgeryHooks.from_config(config)
    state = state_of(optax.chain(injected(), fsh.optax.rewarm(3))).replace(step=1)
    record = hooks.preview("a", state)
    assert (record.event, record.paths) == ("preview", ("v", "w"))
    state = hooks(1, state)
    assert float(state.opt_state[0].hyperparams["learning_rate"]) == np.float32(0.01)
    again = fsh.SurgeryHooks.from_config(hooks.to_config())
    assert again.hparams() == hooks.hparams()


# --- A surgery of a user's own.


@dataclasses.dataclass(frozen=True)
class Own:
    function: object

    def edit_optimizer(self, optimizer, /, key, step, factor=1.0):
        return self.function(optimizer, key=key, step=step, factor=factor)


def test_what_it_is_given_and_what_is_recorded():
    seen = {}

    def look(optimizer, **given):
        seen.update(given, optimizer=optimizer)
        return optimizer.replace(detail={"n": 3})

    state = state_of(MOMENTUM)
    new, record = fsh.operate(state, Own(look), params="w", key=jax.random.key(0), step=7, inputs={"factor": 2.0})
    assert_bitwise_equal(new, state)
    optimizer = seen["optimizer"]
    assert (optimizer.paths, optimizer.selected, int(seen["step"]), seen["factor"]) == (("w",), (1,), 7, 2.0)
    assert [slot.kind for slot in optimizer.slots[1]] == ["grad"]
    assert record.detail == '{"n": 3}'
    assert record.leaves == (((2, 2), "float32"),)


def own(function, **kwargs):
    return lambda: fsh.operate(state_of(MOMENTUM), Own(function), key=jax.random.key(0), **kwargs)


def raising(optimizer, **_):
    raise ValueError("no luck")


def longer(optimizer, **_):
    return optimizer.replace(opt_state=jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), optimizer.opt_state))


class Both:
    def __call__(self, leaf):
        return leaf

    def edit_optimizer(self, optimizer, /):
        return optimizer


class Paths:
    def edit_optimizer(self, optimizer, /, path):
        return optimizer


def hook(surgery, state=None, **kwargs):
    def run():
        hooks = fsh.SurgeryHooks()
        hooks.add("a", surgery, **{"params": "**", "when": fsh.at(9), **kwargs})
        hooks(0, state_of(injected()) if state is None else state)

    return run


FUNCTION, STATE = e.SurgeryFunctionError, e.StateError
SCHEDULED = state_of(injected(learning_rate=optax.constant_schedule(0.1)))
INTEGER = make_state(0, optax.inject_hyperparams(lambda n: optax.trace(0.5 * n))(n=1))
HALF = state_of(optax.masked(fsh.optax.freezable(MOMENTUM), {"w": True, "v": False}))
CASES = {
    "nothing": Case(lambda: SetHyperparams({}), FUNCTION, ("by name", "Found: {}", '{"learning_rate": 0.01}')),
    "no_mapping": Case(lambda: SetHyperparams(0.1), FUNCTION, ("by name", "Found: 0.1")),
    "no_number": Case(lambda: SetHyperparams({"b1": "0.9"}), FUNCTION, ("finite number for 'b1'", "{'b1': 0.01}")),
    "a_function": Case(lambda: SetHyperparams({"b1": abs}), FUNCTION, ("finite number", "rewarm or a schedule")),
    "infinite": Case(lambda: SetHyperparams({"b1": float("inf")}), FUNCTION, ("finite number for 'b1'", "inf")),
    "no_state": Case(hook(LOWER, state_of(MOMENTUM)), STATE,
                     ("holds no hyperparameters", "Found: tuple", "tx=optax.inject_hyperparams(")),
    "unknown": Case(hook(SetHyperparams({"learning_rat": 1})), STATE,
                    ("no hyperparameter 'learning_rat'", "b1, b2, eps", "Write instead: learning_rate")),
    "scheduled": Case(hook(LOWER, SCHEDULED), STATE,
                      ("A schedule drives the hyperparameter 'learning_rate'", "Found: schedules for learning_rate",
                       "fsh.optax.rewarm")),
    "integer": Case(hook(SetHyperparams({"n": 0.5}), INTEGER), FUNCTION, ("'n' is an integer", "0.5 for int32")),
    "some_leaves": Case(hook(LOWER, params="w"), FUNCTION,
                        ("SetHyperparams concerns the whole optimizer", "1 of 2 leaves: w", 'params="**"')),
    "no_rewarm": Case(hook(Rewarm()), STATE,
                      ("into a RewarmState, and the optimizer state has none", "InjectStatefulHyperparamsState",
                       "fsh.optax.rewarm(100)")),
    "no_freezable": Case(hook(Freeze()), STATE, ("into a FreezableState", "tx=fsh.optax.freezable(tx)")),
    "left_out": Case(hook(Freeze(), HALF), STATE, ("leave out some of the leaves", "Found: v", "exclude= with them")),
    "brings": Case(hook(LOWER, tx=MOMENTUM, apply_fn=abs), e.StructureError,
                   ("leaves all shapes alone", "Found: apply_fn=, tx=", "SwitchOptimizer(tx)")),
    "opt_state": Case(hook(LOWER, opt_state="carry"), e.RuleError, ("SetHyperparams says itself", "no opt_state=")),
    "raises": Case(own(raising), e.UserCodeError, ("Own.edit_optimizer raised ValueError: no luck",)),
    "returns": Case(own(lambda optimizer, **_: None), FUNCTION, ("must return the optimizer", "Found: NoneType")),
    "other_params": Case(own(lambda optimizer, **_: optimizer.replace(params={})), FUNCTION, ("Found: other params",)),
    "longer": Case(own(longer), e.StructureError, ("of the optimizer state another shape", "[3] -> [3, 2]")),
    "other_structure": Case(own(lambda optimizer, **_: optimizer.replace(opt_state=())), e.StructureError,
                            ("another structure, and the optimizer is the same", "opt_state=..., tx=...")),
    "both": Case(lambda: fsh.operate(SCHEDULED, Both()), FUNCTION,
                 ("no leaves beside it", "edit_optimizer and __call__", "two surgeries")),
    "path": Case(lambda: fsh.operate(SCHEDULED, Paths()), FUNCTION,
                 ("asks for path", "`optimizer.paths` are the selected leaves")),
    "no_key": Case(lambda: fsh.operate(SCHEDULED, Own(raising)), e.InputError, ("draws random numbers",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    case = CASES[name]
    with pytest.raises(case.error) as caught:
        case.run()
    assert [part for part in case.says if part not in str(caught.value)] == [], str(caught.value)


def test_other_hooks_go_on_beside_them():
    hooks = fsh.SurgeryHooks()
    hooks.add("lower", LOWER, params="**", when=fsh.at(1))
    hooks.add("halve", Scale(0.5), params="w", when=fsh.at(1))
    state = hooks(1, state_of(injected()).replace(step=1))
    assert float(state.params["w"][0, 0]) == 0.5
    assert float(state.opt_state.hyperparams["learning_rate"]) == np.float32(0.01)
    hooks.flush()
    assert [(r.event, r.hook) for r in hooks.ledger.records if r.event != "run"] == [
        ("fired", "lower"), ("fired", "halve"), ("settled", "lower"), ("settled", "halve")]  # fmt: skip
