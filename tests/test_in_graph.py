"""Fires inside the jitted step: the same bits and the same ledger as on the host, and nothing else touched."""

import functools
import logging
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state as flax_train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import HookError, RefusedError, StateError, StepError, StructureError

STEPS = 200
X = np.asarray(np.random.default_rng(0).normal(size=(16, 8)), np.float32)
Y = np.asarray(np.random.default_rng(1).normal(size=(16, 4)), np.float32)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.LayerNorm()(nn.relu(nn.Dense(16)(x))))


class Tally:
    """Remembers a running mean, and on a fire puts it in the place of the leaf."""

    def init_memory(self, leaf):
        return leaf

    def observe(self, leaf, memory):
        return leaf, 0.9 * memory + 0.1 * leaf

    def __call__(self, leaf, memory):
        return memory, 0.5 * memory


def mask(kernel):
    return jnp.where(jnp.arange(kernel.shape[-1])[None] < 3, 0, kernel)


def perturb(kernel, key):
    return 0.5 * kernel + 0.1 * jax.random.normal(key, kernel.shape)


def double(leaves):
    return {path: leaf * 2 for path, leaf in leaves.items()}


def make_hooks(**options: Any) -> fsh.SurgeryHooks:
    """Six hooks of different sorts and periods."""
    hooks = fsh.SurgeryHooks(seed=3, **options)
    hooks.add("norm", fsh.surgeries.Normalize(), params="Dense_1/kernel", when=fsh.every(7))
    hooks.add("scale", fsh.surgeries.Scale(0.9), params="**", when=fsh.every(11), opt_state="transport")
    hooks.add("perturb", perturb, params="**/kernel", when=fsh.every(23))
    hooks.add("mask", mask, params="Dense_0/kernel", when=fsh.every(13), figures=False)
    hooks.add("double", double, params="**/bias", when=fsh.every(17), guard="off", priority=1)
    hooks.add("tally", Tally(), params="Dense_1/kernel", when=fsh.at(40, 100, 160))
    return hooks


def make_state(placed: str = "one") -> Any:
    params = Model().init(jax.random.key(0), X)["params"]
    state = fsh.TrainState.create(apply_fn=Model().apply, params=params, tx=optax.adamw(1e-2))
    state = state.replace(step=jnp.int32(0))
    if placed == "one":
        return state
    kind = AxisType.Auto if placed == "auto" else AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind, kind))

    def place(leaf):
        spec = {0: P(), 1: P("tensor"), 2: P("data", "tensor")}[leaf.ndim]
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def update(state: Any, placed: str) -> Any:
    if placed == "explicit":  # where the model of this test has no sharding rules
        return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params))

    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@functools.cache
def on_host(placed: str) -> tuple[Any, fsh.SurgeryHooks]:
    hooks = make_hooks()
    state = hooks.init(make_state(placed), fires=0)
    step = jax.jit(lambda state: hooks.observe(update(state, placed)))
    for i in range(1, STEPS + 1):
        state = hooks(i, step(state))
    hooks.flush()
    return state, hooks


def step_by_step(placed: str) -> tuple[Any, fsh.SurgeryHooks]:
    hooks = make_hooks()
    state = hooks.init(make_state(placed))
    step = jax.jit(lambda state: hooks.in_graph(update(state, placed)), donate_argnums=0)
    for i in range(1, STEPS + 1):
        state = hooks(i, step(state))
    assert step._cache_size() == 1
    hooks.flush()
    return state, hooks


def scanned(placed: str) -> tuple[Any, fsh.SurgeryHooks]:
    hooks = make_hooks()
    state = hooks.init(make_state(placed))

    def one(state, _):
        return hooks.in_graph(update(state, placed)), None

    ten = jax.jit(lambda state: jax.lax.scan(one, state, length=10)[0], donate_argnums=0)
    for _ in range(STEPS // 10):
        state = ten(state)
        hooks.collect(state)
    return state, hooks


def facts(hooks: fsh.SurgeryHooks) -> list[Any]:
    """What a ledger says but for its figures, times and the numbering of a session."""
    records = [record for record in hooks.ledger.records if record.event != "run"]
    found = [
        (record.step, record.hook, record.event, record.paths, record.rule, record.surgery, record.leaves,
         record.in_place, record.restarted, sorted(record.figures))
        for record in records
    ]  # fmt: skip
    return sorted(found, key=lambda fact: fact[:3])


def figures(hooks: fsh.SurgeryHooks) -> np.ndarray:
    """All figures of a ledger in the order of `facts`."""
    settled = [record for record in hooks.ledger.records if record.event == "settled" and record.figures]
    settled.sort(key=lambda record: (record.step, record.hook))
    return np.concatenate([[*record.figures.values(), *np.ravel(record.per_leaf)] for record in settled])


@pytest.mark.parametrize("placed", ["one", "auto", "explicit"])
def test_200_steps_are_bitwise_those_of_the_host(placed):
    expected, host = on_host(placed)
    assert len(facts(host)) > 100
    for run in (step_by_step, scanned):
        state, hooks = run(placed)
        for path, leaf in jax.tree_util.tree_leaves_with_path((expected.params, expected.opt_state)):
            other = dict(jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)))[path]
            np.testing.assert_array_equal(leaf, other, err_msg=f"{run.__name__} {jax.tree_util.keystr(path)}")
            assert leaf.sharding == other.sharding
        assert jax.tree.all(jax.tree.map(np.array_equal, expected.surgery["memory"], state.surgery["memory"]))
        assert facts(hooks) == facts(host)
        # XLA may contract a product and a sum in one program and not in the other.
        np.testing.assert_allclose(figures(hooks), figures(host), rtol=1e-6)


def test_a_ledger_of_other_fires_is_told_apart():
    """The control: what the comparison of ledgers must not miss."""
    _, host = on_host("one")
    state = make_state()
    hooks = make_hooks()
    state = hooks.init(state)
    step = jax.jit(lambda state: hooks.in_graph(update(state.replace(params=jax.tree.map(
        lambda leaf: leaf * (1 + 1e-6), state.params)), "one")))  # fmt: skip
    for i in range(1, STEPS + 1):
        state = hooks(i, step(state))
    hooks.flush()
    assert facts(hooks) == facts(host)
    assert not np.allclose(figures(hooks), figures(host), rtol=1e-6)


def one_hook(surgery: Any = None, when: Any = None, **options: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(**options)
    surgery = fsh.surgeries.Scale(0.5) if surgery is None else surgery
    hooks.add("a", surgery, params="**/kernel", when=when or fsh.every(2))
    return hooks


def bare_step(hooks: fsh.SurgeryHooks) -> Any:
    return jax.jit(lambda state: hooks.in_graph(state.replace(step=state.step + 1)))


def test_a_step_without_fires_changes_nothing_but_the_step():
    hooks = one_hook(when=fsh.at(100))
    state = hooks.init(make_state())
    after = bare_step(hooks)(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, after.replace(step=0), state.replace(step=0)))


def test_the_graph_holds_one_conditional_and_no_copies_of_leaves():
    """Untouched leaves are not operands of the conditional; touched ones are edited where they lie."""
    hooks = fsh.SurgeryHooks()
    hooks.add("a", fsh.surgeries.Scale(0.5), params="Dense_0/kernel", when=fsh.every(2))
    state = hooks.init(make_state())

    def step(state):
        return hooks.in_graph(update(state, "one"))

    jaxpr = str(jax.make_jaxpr(step)(state))
    (operands,) = re.findall(r"\bcond\[.*?\n\s*\] ([^\n]+)", jaxpr, flags=re.DOTALL)[-1:]
    assert len(operands.split()) <= 3 + 3 + 4  # index and step, the leaf and its two moments, the buffer
    large = jax.tree.map(lambda leaf: jnp.zeros((512, 512)) if leaf.ndim == 2 else leaf, state)
    bare = jax.jit(
        lambda s: s.replace(step=s.step + 1, params=jax.tree.map(lambda p: p * 0.99, s.params)), donate_argnums=0
    )
    fired = jax.jit(lambda s: hooks.in_graph(s.replace(
        step=s.step + 1, params=jax.tree.map(lambda p: p * 0.99, s.params))), donate_argnums=0)  # fmt: skip
    temporaries = [f.lower(large).compile().memory_analysis().temp_size_in_bytes for f in (bare, fired)]
    assert temporaries[1] - temporaries[0] < 512 * 512 * 4 // 10


def test_a_wrapped_step_fires_where_it_is_due_and_is_otherwise_the_plain_one():
    hooks, graph = make_hooks(), make_hooks()
    state, other = hooks.init(make_state()), graph.init(make_state())
    traced = []

    def train(state, scale):
        traced.append(1)
        return update(state, "one"), scale * 2

    step, whole = hooks.wrap(train, donate_argnums=0), jax.jit(lambda state: graph.in_graph(update(state, "one")))
    for i in range(1, 24):
        state, doubled = step(i, state, jnp.float32(i))
        state = hooks(i, state)
        other = graph(i, whole(other))
        assert doubled == 2 * i
    assert len(traced) == 2
    hooks.flush(), graph.flush()
    assert facts(hooks) == facts(graph)
    for one, two in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    idle = jax.jit(lambda state, scale: train(state, scale)).lower(state, jnp.float32(0)).compile()
    assert "conditional" not in idle.as_text()
    with pytest.raises(StepError, match="Python int"):
        step(jnp.int32(3), state, 1.0)


def test_a_refused_fire_keeps_the_old_values_and_is_told():
    hooks = one_hook(lambda kernel: kernel / 0, when=fsh.at(2))
    state = hooks.init(make_state())
    step = bare_step(hooks)
    after = step(step(state))
    np.testing.assert_array_equal(after.params["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"])
    with pytest.raises(RefusedError, match="non-finite values into the state"):
        hooks.collect(after)
    assert [record.event for record in hooks.ledger.records] == ["run", "fired", "refused"]
    hooks = one_hook(lambda kernel: kernel / 0, when=fsh.at(2), on_error="skip")
    after = bare_step(hooks)(bare_step(hooks)(hooks.init(make_state())))
    assert [record.event for record in hooks.collect(after)] == ["refused"]


def test_fires_beyond_the_room_are_recorded_without_figures(caplog):
    hooks = one_hook(when=fsh.every(2))
    state = hooks.init(make_state(), fires=3)
    many = jax.jit(lambda s: jax.lax.scan(lambda s, _: (bare_step(hooks)(s), None), s, length=12)[0])
    with caplog.at_level(logging.WARNING):
        records = hooks.collect(many(state))
    assert [record.step for record in records] == [2, 4, 6, 8, 10, 12]
    assert [bool(record.figures) for record in records] == [False] * 3 + [True] * 3
    assert "fires=6" in caplog.text
    assert hooks.collect(many(state)) == ()


def test_collecting_twice_records_once_and_a_resumed_state_is_not_recorded_again():
    hooks = one_hook()
    step = bare_step(hooks)
    state = step(step(hooks.init(make_state())))
    assert [record.step for record in hooks.collect(state)] == [2]
    assert hooks.collect(state) == ()
    again = one_hook()
    state = again.init(state)
    step = bare_step(again)
    assert again.collect(state) == ()
    assert [record.step for record in again.collect(step(step(state)))] == [4]


def test_a_resumed_run_records_what_the_ledger_lacks_and_nothing_twice(tmp_path):
    """The checkpoint holds figures of fires that the process before it had recorded, and of one that it had not."""
    path = tmp_path / "ledger.jsonl"
    hooks = one_hook(ledger=path)
    step, state = bare_step(hooks), hooks.init(make_state())
    for i in range(1, 10):
        state = hooks(i, step(state))  # the figures of step 8 would be read at step 12
    fired = [record.step for record in hooks.ledger.records if record.event == "fired"]
    assert fired == [2, 4]  # what the process has told of when it dies
    again = one_hook(ledger=path)
    again.init(make_state())  # before the checkpoint is restored, as trainers do
    step = bare_step(again)
    for i in range(10, 15):
        state = again(i, step(state))
    again.collect(state)
    assert [record.step for record in again.ledger.records if record.event == "settled"] == [6, 8, 10, 12, 14]
    from_scratch = one_hook(ledger=path)
    step, state = bare_step(from_scratch), from_scratch.init(make_state())
    for i in range(1, 4):
        state = from_scratch(i, step(state))
    from_scratch.collect(state)
    assert [record.step for record in from_scratch.ledger.records if record.event == "settled"] == [2]


def test_what_only_the_host_can_do_stays_with_it():
    hooks = fsh.SurgeryHooks()
    hooks.add("graph", fsh.surgeries.Scale(0.5), params="Dense_0/kernel", when=fsh.every(2))
    hooks.add("seen", fsh.surgeries.Scale(0.5), params="Dense_1/kernel", when=fsh.every(2), histograms=True)
    hooks.add("grow", lambda bias: jnp.concatenate([bias, bias[:1]]), params="Dense_1/bias", when=fsh.at(3),
              on_reshape=lambda state, record: None)  # fmt: skip
    state = hooks.init(make_state())
    assert sorted(state.surgery["fires"]) == ["graph"]
    before, step = state, bare_step(hooks)
    for i in range(1, 5):
        state = hooks(i, step(state))
    hooks.flush()
    np.testing.assert_array_equal(state.params["Dense_0"]["kernel"], before.params["Dense_0"]["kernel"] / 4)
    np.testing.assert_array_equal(state.params["Dense_1"]["kernel"], before.params["Dense_1"]["kernel"] / 4)
    assert state.params["Dense_1"]["bias"].shape == (17,)
    settled = [(record.step, record.hook) for record in hooks.ledger.records if record.event == "settled"]
    assert sorted(settled) == [(2, "graph"), (2, "seen"), (3, "grow"), (4, "graph"), (4, "seen")]


def test_a_fire_that_changes_the_selection_makes_room_anew():
    hooks = fsh.SurgeryHooks()
    hooks.add("all", fsh.surgeries.Scale(0.5), params="**/bias", when=fsh.every(2))
    hooks.add("add", lambda leaves: {**leaves, "Dense_2/bias": jnp.ones(3)}, params="Dense_1/*", when=fsh.at(3),
              apply_fn=lambda *_: None)  # fmt: skip
    state = hooks.init(make_state())
    rows = state.surgery["fires"]["all"]["rows"].shape[1]
    step = bare_step(hooks)
    for i in range(1, 7):
        state = hooks(i, step(state))
    assert state.surgery["fires"]["all"]["rows"].shape[1] == rows + 3
    hooks.flush()
    fired = [(r.step, len(r.paths)) for r in hooks.ledger.records if r.event == "settled" and r.hook == "all"]
    assert fired == [(2, 3), (4, 4), (6, 4)]


def test_traced_inputs_reach_a_fire_in_graph():
    hooks = fsh.SurgeryHooks()
    hooks.add("a", lambda kernel, loss: kernel * loss, params="Dense_0/kernel", when=fsh.at(1))
    state = hooks.init(make_state())
    step = jax.jit(lambda state, loss: hooks.in_graph(state.replace(step=state.step + 1), loss=loss))
    after = step(state, jnp.float32(3))
    np.testing.assert_array_equal(after.params["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"] * 3)


def test_mirrors_and_other_optimizers_follow_in_graph_as_on_the_host():
    class Averaging(fsh.TrainState):
        ema_params: Any = None

    def made():
        hooks = fsh.SurgeryHooks(mirrors={"ema_params": "param"})
        hooks.add("a", mask, params="**/kernel", when=fsh.at(2))
        params = make_state().params
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.flatten(optax.adam(0.1)))
        state = Averaging.create(apply_fn=None, params=params, tx=tx, ema_params=jax.tree.map(jnp.ones_like, params))
        return hooks, hooks.init(state.replace(step=jnp.int32(0)))

    def train(state):
        return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.sin(leaf) + 1, state.params))

    hooks, graph = made()
    step = jax.jit(lambda state: hooks.in_graph(train(state)))
    other, host = made()
    for i in range(1, 4):
        graph, host = step(graph), other(i, jax.jit(train)(host))
    assert jax.tree.all(jax.tree.map(np.array_equal, (graph.params, graph.opt_state, graph.ema_params),
                                     (host.params, host.opt_state, host.ema_params)))  # fmt: skip
    assert not np.any(graph.ema_params["Dense_0"]["kernel"][:, :3])


def test_a_state_without_room_is_told_what_to_write():
    hooks = one_hook()
    with pytest.raises(StateError, match=r"no room for them yet.*hooks.init\(state\).*hooks.observe"):
        hooks.in_graph(make_state())
    plain = flax_train_state.TrainState.create(apply_fn=None, params=make_state().params, tx=optax.sgd(0.1))
    assert hooks.init(plain) is plain
    with pytest.raises(StateError, match=r"no `surgery` field.*fsh.TrainState"):
        hooks.in_graph(plain)


def test_a_state_without_step_is_told_what_to_write():
    hooks, params, tx = one_hook(), make_state().params, optax.sgd(0.1)
    state = hooks.init(fsh.bind(params=params, opt_state=tx.init(params), tx=tx))
    with pytest.raises(StateError, match=r"look at `state.step`.*hooks.observe\(state\)"):
        hooks.in_graph(state)


def test_hooks_of_which_none_can_fire_in_graph_are_told_why():
    hooks = fsh.SurgeryHooks()
    hooks.add("seen", fsh.surgeries.Scale(0.5), params="**", when=fsh.at(1), histograms=True)
    with pytest.raises(HookError, match=r"None of the hooks can fire in graph.*seen: its histograms"):
        hooks.in_graph(make_state())


def test_an_edit_that_changes_shapes_is_an_error_of_the_trace():
    hooks = one_hook(lambda kernel: kernel[:1])
    state = hooks.init(make_state())
    with pytest.raises(StructureError, match=r"changes the shape of a leaf.*\[16, 4\] -> \[1, 4\]"):
        jax.jit(hooks.in_graph)(state)


def test_room_that_does_not_fit_is_told():
    state = one_hook().init(make_state())
    hooks = fsh.SurgeryHooks()
    hooks.add("a", fsh.surgeries.Scale(0.5), params="Dense_0/kernel", when=fsh.at(1))
    with pytest.raises(StateError, match=r"does not fit the hook.*fires="):
        hooks.init(state)


@pytest.mark.parametrize("fires", [-1, True, 2.0])
def test_room_is_a_number_of_fires(fires):
    with pytest.raises(HookError, match=r"init\(fires=...\) is a number of fires"):
        one_hook().init(make_state(), fires=fires)


def test_an_abstract_state_gets_abstract_room_and_a_traced_one_zeros():
    hooks = one_hook()
    shapes = hooks.init(jax.eval_shape(make_state))
    assert shapes.surgery["fires"]["a"]["rows"].shape == (8, 6, 9)
    traced = jax.jit(lambda: hooks.init(make_state()))()
    assert int(traced.surgery["fires"]["a"]["count"]) == 0
    after = bare_step(hooks)(bare_step(hooks)(traced))
    assert [record.step for record in hooks.collect(after)] == [2]
