"""What hooks remember moves with the weights that it is of: averages follow every edit, of every form, on meshes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec
from resumed import assert_same, mesh_of, open_manager
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks import fires
from flax_surgery_hooks.surgeries import Ema, Lawa, Lookahead, MergeLora, Reinit, Rewind, Scale, Swa, Swap
from flax_surgery_hooks.testing import streams
from flax_surgery_hooks.testing.edits import EDITS, EditRow
from flax_surgery_hooks.testing.surgeries import SURGERIES

NEVER = fsh.at(1_000_000_000)
AVERAGES = {"ema": Ema(0.7), "swa": Swa(begin=2), "lawa": Lawa(k=2, interval=2)}
OWN_KEYS = ("SET", "RigL")
"""What these draw for their memory depends on the hook, so that the table's oracles are of other numbers."""
KEEPING = ("Prune",)
"""Their own rule is "keep", for averages as for moments."""
ROWS = {**EDITS, **{name: row.edit for name, row in SURGERIES.items() if name not in OWN_KEYS + KEEPING}}


def make_hooks(surgeries: Any = AVERAGES, params: Any = "**", **options: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=1, **options)
    for name, surgery in surgeries.items():
        hooks.add(name, surgery, params=params, when=NEVER)
    return hooks


def make_state(params: Any, tx: Any = None) -> fsh.TrainState:
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx or optax.adam(0.1))
    return state.replace(step=jnp.int32(0))


def averages_of(state: Any) -> dict[str, Any]:
    return {name: np.array(fsh.average_of(state, name)["kernel"]) for name in AVERAGES}


def oracle(seen: list[np.ndarray]) -> dict[str, Any]:
    """The averages by their definitions, of the weights at step 0, 1, ..."""
    ema = seen[0]
    for weights in seen[1:]:
        ema = 0.7 * ema + 0.3 * weights
    return {"ema": ema, "swa": np.mean(seen[2:], axis=0), "lawa": np.mean([seen[2], seen[4]], axis=0)}


# Exactly: every recorded step through the edit, then the average of these.


def through(row: EditRow, monkeypatch: Any, rule: Any = None) -> tuple[Any, Any, list[np.ndarray]]:
    """The states before and after an edit, in float64, and the weights of all steps before it."""
    monkeypatch.setattr(fires, "folded", lambda *_: streams.key())  # that of the table
    hooks = make_hooks({**AVERAGES, "slow": Lookahead(0.5)})
    hooks.add("edit", row.surgery, params="kernel", when=NEVER, opt_state=rule, on_reshape=lambda *_: None)
    recorded = [streams.params_at(step, row.before) for step in range(streams.STEPS + 1)]
    state = hooks.init(make_state(jax.tree.map(jnp.asarray, recorded[0])))
    observe = jax.jit(hooks.observe)
    for step, params in enumerate(recorded[1:], start=1):
        state = observe(state.replace(step=jnp.int32(step), params=jax.tree.map(jnp.asarray, params)))
    return state, hooks.fire("edit", state), [params["kernel"] for params in recorded]


@pytest.mark.parametrize("name", ROWS)
def test_an_average_after_an_edit_is_that_of_edited_weights(name, x64, monkeypatch):
    row = ROWS[name]
    before, after, seen = through(row, monkeypatch)
    expected = oracle([row.params(weights) for weights in seen])
    live = row.params(seen[-1])
    for average, value in averages_of(after).items():
        np.testing.assert_allclose(value, expected[average], rtol=1e-12, atol=1e-14, err_msg=average)
        # Left alone, or made anew of the edited weights, it would be another one.
        alone = averages_of(before)[average]
        assert alone.shape != value.shape or np.abs(alone - value).max() > 1e-3
        assert row.fresh.all() or np.abs(live - value).max() > 1e-3
    slow = after.surgery["memory"]["slow"]["kernel"]
    np.testing.assert_allclose(slow, row.params(seen[0]), rtol=1e-12, atol=1e-14)
    assert_bitwise_equal(*(state.surgery["memory"]["ema"]["bias"] for state in (before, after)))


@pytest.mark.parametrize("name", KEEPING)
def test_surgeries_that_leave_slots_alone_leave_averages_alone(name, x64, monkeypatch):
    before, after, _ = through(SURGERIES[name].edit, monkeypatch)
    assert_bitwise_equal(averages_of(after), averages_of(before))


@pytest.mark.parametrize(("rule", "moves"), [("transport", True), ("carry", True), ("reset", None), ("keep", False)])
def test_rules_hold_for_averages_as_for_slots(rule, moves, x64, monkeypatch):
    row = EDITS["scale"]
    before, after, seen = through(row, monkeypatch, rule)
    expected = {True: averages_of(before), None: dict.fromkeys(AVERAGES, seen[-1]), False: averages_of(before)}[moves]
    for average, value in averages_of(after).items():
        factor = 1.0 if moves is False else -0.5
        np.testing.assert_allclose(value, factor * expected[average], rtol=1e-12)


def test_a_function_as_rule_is_given_averages_as_copies_of_parameters():
    seen = []

    def rule(slot, *, kind, path, old, new, key):
        seen.append(kind)
        return new + 1 if kind == "param" else slot

    hooks = make_hooks({"ema": Ema(0.5)})
    hooks.add("edit", Scale(2.0), params="kernel", when=NEVER, opt_state=rule)
    state = hooks.fire("edit", hooks.init(make_state({"kernel": jnp.ones((2, 2))})))
    assert np.unique(fsh.average_of(state, "ema")["kernel"]).tolist() == [3.0]
    assert set(seen) == {"param", "grad", "grad_sq"}
    [fired] = [record for record in hooks.ledger.records if record.event == "fired"]
    assert fired.rule == "rule"


def test_a_merge_of_low_rank_factors_moves_the_averages_of_all_three(x64):
    """`MergeLora` says itself what becomes of slots, of copies of parameters as of moments."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    first, last = ({"kernel": draw(3, 4), "lora_a": draw(3, 2), "lora_b": draw(2, 4)} for _ in range(2))
    hooks = make_hooks({"ema": Ema(0.5)})
    hooks.add("merge", MergeLora(scale=2.0, redraw=False), params="**", when=NEVER)
    state = hooks.init(make_state(jax.tree.map(jnp.asarray, first)))
    state = hooks.observe(state.replace(params=jax.tree.map(jnp.asarray, last)))
    after = fsh.average_of(hooks.fire("merge", state), "ema")
    merged = 2 * last["lora_a"] @ last["lora_b"]
    mean = {name: (first[name] + last[name]) / 2 for name in first}
    np.testing.assert_allclose(after["kernel"], mean["kernel"] + merged, rtol=1e-12)
    np.testing.assert_array_equal(after["lora_b"], np.zeros((2, 4)))
    np.testing.assert_array_equal(after["lora_a"], last["lora_a"])  # with B at zero it does nothing yet


# In a loop: forms, donation, guards, rollbacks.


def train(form: str, *, donate: str = "never", steps: int = 9, **options: Any) -> tuple[Any, fsh.SurgeryHooks]:
    hooks = make_hooks({**AVERAGES, "slow": Lookahead(0.5), "rewind": Rewind(1)}, donate=donate)
    hooks.add(
        "turn", lambda kernel: -2 * kernel[::-1], params="kernel", when=fsh.every(3), opt_state="carry", **options
    )
    hooks.add("reinit", Reinit(initializer=nn.initializers.ones), params="bias", when=fsh.at(5))
    params = {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": jnp.linspace(0, 1, 4)}
    state = hooks.init(make_state(params))
    inside = hooks.in_graph if form == "graph" else hooks.observe

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return inside(state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params)))

    for at in range(1, steps + 1):
        state = hooks(at, step(state))
    hooks.collect(state)
    return state, hooks


def kept(state: Any) -> Any:
    return state.params, state.opt_state, state.surgery["memory"]


@pytest.mark.parametrize("other", [("graph", "never"), ("host", "always")])
def test_a_run_in_graph_or_with_donated_leaves_is_that_of_the_host_to_the_bit(other):
    alone, _ = train("host")
    again, _ = train(other[0], donate=other[1])
    if other[0] == "host":
        assert_bitwise_equal(kept(again), kept(alone))
    else:  # another program may round in another order
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), kept(again), kept(alone))


def test_a_refused_fire_leaves_averages_as_they_were():
    state, _ = train("host", steps=2)
    hooks = make_hooks()
    hooks.add("bad", lambda kernel: kernel / 0, params="kernel", when=NEVER)
    after = hooks.fire("bad", state)
    assert_bitwise_equal(kept(after), kept(state))
    with pytest.raises(fsh.errors.RefusedError):
        hooks.flush()


def test_an_undone_fire_puts_averages_back():
    hooks = make_hooks({"ema": Ema(0.5)})
    hooks.add("turn", Scale(-3.0), params="kernel", when=fsh.at(1), rollback=fsh.Rollback(5))
    state = hooks.init(make_state({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}))
    state = hooks.observe(state.replace(step=1, params=jax.tree.map(jnp.zeros_like, state.params)))
    held = jax.tree.map(np.array, kept(state))
    state = hooks(1, state)
    assert np.unique(fsh.average_of(state, "ema")["kernel"]).tolist() == [-1.5]
    assert_bitwise_equal(kept(hooks.undo(state)), held)


def test_the_step_is_not_compiled_again():
    hooks = make_hooks()
    hooks.add("turn", Scale(-3.0), params="**", when=fsh.every(2))
    traces = []

    @jax.jit
    def step(state):
        traces.append(None)
        return hooks.observe(state.replace(step=state.step + 1))

    state = hooks.init(make_state({"kernel": jnp.ones((2, 2), jnp.bfloat16), "bias": jnp.ones(2)}))
    for at in range(1, 6):
        state = hooks(at, step(state))
    assert len(traces) == 1
    assert state.surgery["memory"]["ema"]["kernel"]["average"].dtype == jnp.float32


# What holds the parameters.


def test_averages_follow_in_every_container():
    kernel = jnp.ones((2, 2))
    holders = {
        "frozen": freeze({"kernel": kernel}),
        "boxed": {"kernel": nn.Partitioned(kernel, names=(None, None))},
        "bare": kernel,
    }
    for name, params in holders.items():
        hooks = make_hooks()
        hooks.add("turn", Scale(-3.0), params="**", when=NEVER)
        state = hooks.fire("turn", hooks.init(make_state(params)))
        for average in AVERAGES:
            [value] = jax.tree.leaves(fsh.average_of(state, average))
            assert np.unique(value).tolist() == [-3.0], (name, average)
        assert jax.tree.structure(state.params) == jax.tree.structure(params)

    model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = kernel
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    hooks = make_hooks()
    hooks.add("turn", Scale(-3.0), params="**", when=NEVER)
    hooks.init(fsh.bind_nnx(model, optimizer))
    hooks.fire("turn", fsh.bind_nnx(model, optimizer))
    assert np.unique(fsh.average_of(fsh.bind_nnx(model, optimizer), "lawa")["kernel"]).tolist() == [-3.0]

    loose = fsh.bind(params={"kernel": kernel}, opt_state=optax.adam(0.1).init({"kernel": kernel}), tx=optax.adam(0.1))
    hooks = make_hooks()
    hooks.add("turn", Scale(-3.0), params="**", when=NEVER)
    loose = hooks.fire("turn", hooks.init(loose), step=0)
    assert np.unique(fsh.average_of(loose, "ema")["kernel"]).tolist() == [-3.0]


def test_averages_of_some_leaves_beside_masked_and_flat_optimizers():
    """Holes of two sorts: where an optimizer holds nothing of a leaf, and where there is no average of it."""
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3), "c": jnp.full(3, 2.0)}
    for tx in (optax.masked(optax.adam(0.1), {"a": True, "b": False, "c": True}), optax.flatten(optax.adam(0.1))):
        hooks = make_hooks({"ema": Ema(0.5)}, params=["b", "c"])
        hooks.add("turn", Scale(-3.0), params="**", when=NEVER)
        state = hooks.fire("turn", hooks.init(make_state(params, tx)))
        averaged = fsh.average_of(state, "ema")
        assert jax.tree.map(lambda leaf: np.unique(leaf).tolist(), averaged) == {"a": [-3.0], "b": [-3.0], "c": [-6.0]}
        assert set(state.surgery["memory"]["ema"]) == {"b", "c"}


def test_layers_of_a_stack_and_other_fields_have_no_slots_and_stay():
    hooks = make_hooks({"ema": Ema(0.5)}, params="layers/kernel[1]")
    hooks.add("turn", Scale(-3.0), params="**", when=NEVER)
    state = hooks.init(make_state({"layers": {"kernel": jnp.ones((3, 2))}}))
    after = hooks.fire("turn", state)
    assert_bitwise_equal(after.surgery, state.surgery)
    assert np.unique(after.params["layers"]["kernel"]).tolist() == [-3.0]
    # Whole leaves do have slots, of which one layer moves alone.
    hooks = make_hooks({"ema": Ema(0.5)})
    hooks.add("turn", Scale(-3.0), params="layers/kernel[1]", when=NEVER)
    state = hooks.fire("turn", hooks.init(make_state({"layers": {"kernel": jnp.ones((3, 2))}})))
    assert fsh.average_of(state, "ema")["layers"]["kernel"].tolist() == [[1, 1], [-3, -3], [1, 1]]


@pytest.mark.parametrize("placed", ["auto", "explicit"])
@pytest.mark.parametrize("form", ["host", "graph"])
def test_averages_stay_where_they_lie_and_hold_what_they_hold_on_one_device(placed, form):
    mesh = mesh_of(placed)
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "tensor"), ()))

    def run(place: Any) -> Any:
        hooks = make_hooks()
        turned = dataclasses.replace(EDITS["scale"], surgery=Scale(-3.0)).surgery
        hooks.add("turn", turned, params="kernel", when=fsh.at(2))
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
        state = hooks.init(jax.tree.map(place, make_state({"kernel": kernel, "bias": jnp.ones(4)})))
        inside = hooks.in_graph if form == "graph" else hooks.observe
        step = jax.jit(lambda state: inside(state.apply_gradients(grads=jax.tree.map(jnp.sign, state.params))))
        for at in range(1, 5):
            state = hooks(at, step(state))
        return state

    state = run(lambda leaf: jax.device_put(leaf, spread if leaf.ndim == 2 else whole))
    alone = run(jnp.asarray)
    for one, other in zip(jax.tree.leaves(kept(state)), jax.tree.leaves(kept(alone)), strict=True):
        assert one.ndim != 2 or one.sharding.is_equivalent_to(spread, 2)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# Where shapes and paths change.


def structural(hooks: fsh.SurgeryHooks) -> fsh.SurgeryHooks:
    rebuild = {"on_reshape": lambda *_: None}
    hooks.add("wide", EDITS["duplicate_in"].surgery, params="kernel", when=fsh.at(3), **rebuild)
    split = lambda leaves: {"left": leaves["kernel"][:, :3], "right": 2 * leaves["kernel"][:, 3:]}  # noqa: E731
    hooks.add("split", split, params="kernel", when=fsh.at(5), **rebuild)
    return hooks


def test_averages_follow_leaves_to_other_shapes_and_paths(tmp_path):
    """Also across a checkpoint of each structure, bit for bit, and as planned."""

    def make(params="**", ledger=None):
        hooks = make_hooks({**AVERAGES, "rewind": Rewind(1)}, params=params, ledger=ledger)
        return structural(hooks)

    observed = jax.jit(lambda state, hooks: hooks.observe(state), static_argnums=1, donate_argnums=0)

    def step(hooks, state):
        grads = jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params)
        return observed(state.apply_gradients(grads=grads), hooks)

    hooks = make(ledger=tmp_path / "ledger.jsonl")
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    state = hooks.init(make_state({"kernel": kernel}))
    plan = hooks.plan(state, 8)
    seen, states = [np.asarray(kernel)], {}
    with open_manager(tmp_path / "checkpoints") as manager:
        for at in range(1, 8):
            state = step(hooks, state)
            seen.append(np.concatenate(jax.tree.leaves(state.params), axis=1))
            state = hooks(at, state)
            fsh.checkpoint.save(manager, at, state, hooks)
            states[at] = jax.tree.map(jnp.copy, state).replace(surgery=jax.tree.map(jnp.copy, state.surgery["memory"]))
    doubled = [np.concatenate([one, one]) for one in seen[:4]]
    seen = [np.concatenate([one[:, :3], 2 * one[:, 3:]], axis=1) for one in doubled + seen[4:6]] + seen[6:]
    ema = seen[0]
    for weights in seen[1:]:
        ema = 0.7 * ema + 0.3 * weights
    expected = {"ema": ema, "swa": np.mean(seen[2:], axis=0), "lawa": np.mean([seen[4], seen[6]], axis=0)}
    for name, value in expected.items():
        average = fsh.average_of(state, name)
        np.testing.assert_allclose(np.concatenate([average["left"], average["right"]], axis=1), value, rtol=1e-4)
    first = state.surgery["memory"]["rewind"]
    np.testing.assert_allclose(np.concatenate([first["left"], first["right"]], axis=1), seen[1], rtol=1e-5)
    assert {int(one["count"]) for one in state.surgery["memory"]["swa"].values()} == {6}

    slots = {slot.name: (slot.before, slot.after) for leaf in plan.fires("wide")[0].row.leaves for slot in leaf.slots}
    assert slots["Mirrors.swa_average"] == slots["Mirrors.rewind"] == slots["ScaleByAdamState.mu"]
    assert "Mirrors.lawa_snapshots_1" in slots

    for at in (2, 4, 6):
        again = make()
        with open_manager(tmp_path / "checkpoints") as manager:
            restored = fsh.checkpoint.restore(manager, again.init(make_state({"kernel": kernel})), again, step=at)
        for later in range(at + 1, 8):
            restored = again(later, step(again, restored))
        assert_same(restored.replace(surgery=restored.surgery["memory"]), states[7])


def test_averages_of_leaves_that_come_and_go():
    """A leaf that a fire adds has an average where the hook selects it, one that is left out has none."""
    hooks = make_hooks(params=["kernel", "new", "gone"])
    add = lambda leaves: {"kernel": leaves["kernel"], "new": jnp.full(2, 5.0)}  # noqa: E731
    hooks.add("add", add, params=["kernel", "gone"], when=NEVER, on_reshape=lambda *_: None)
    hooks.remove("ema")
    hooks.remove("lawa")
    hooks.remove("swa")
    hooks.add("swa", Swa(begin=0), params=lambda path, leaf: leaf.ndim == 1, when=NEVER)
    state = hooks.init(make_state({"kernel": jnp.ones((2, 2)), "gone": jnp.ones(3), "other": jnp.ones(4)}))
    state = hooks.observe(hooks.observe(state))
    after = hooks.fire("add", state)
    memory = after.surgery["memory"]["swa"]
    assert set(memory) == {"new", "other"}
    assert memory["new"]["average"].tolist() == [5.0, 5.0]
    assert memory["other"] == state.surgery["memory"]["swa"]["other"] or np.array_equal(
        memory["other"]["average"], state.surgery["memory"]["swa"]["other"]["average"]
    )
    assert (int(memory["new"]["count"]), int(memory["other"]["count"])) == (2, 2)


def test_what_was_follows_other_shapes_and_no_other_edits():
    hooks = make_hooks({"rewind": Rewind(0), "swap": Swap("ema"), "ema": Ema(0.5)})
    hooks.add("halve", Scale(0.5), params="kernel", when=NEVER)
    hooks.add("wide", EDITS["duplicate_in"].surgery, params="kernel", when=NEVER, on_reshape=lambda *_: None)
    state = hooks.init(make_state({"kernel": jnp.ones((3, 4))}))
    state = hooks.fire("halve", state)
    assert np.unique(state.surgery["memory"]["rewind"]["kernel"]).tolist() == [1.0]
    swapped = hooks.fire("swap", state.replace(params={"kernel": jnp.full((3, 4), 9.0)}))
    wide = hooks.fire("wide", swapped)
    assert np.unique(wide.params["kernel"]).tolist() == [0.5]
    back = hooks.fire("swap", wide)
    assert (np.unique(back.params["kernel"]).tolist(), back.params["kernel"].shape) == ([9.0], (6, 4))
    rewound = hooks.fire("rewind", back)
    assert (np.unique(rewound.params["kernel"]).tolist(), rewound.params["kernel"].shape) == ([1.0], (6, 4))


def test_names_of_parts_are_those_of_fields_and_differ():
    hooks = fsh.SurgeryHooks(mirrors={})
    for name in ("1-a", "1_a", "class"):
        hooks.add(name, Ema(0.5), params="**", when=NEVER)
    hooks.add("turn", Scale(-3.0), params="**", when=fsh.at(1))
    state = hooks.init(make_state({"kernel": jnp.ones((2, 2))}))
    [row] = [row for row in hooks.plan(state, 2).rows if row.hook == "turn"]
    names = [slot.name.removeprefix("Mirrors.") for slot in row.leaves[0].slots if "Mirrors" in slot.name]
    assert names == ["hook_1_a_average", "hook_1_a_average_2", "class_average"]
    after = hooks(1, state.replace(step=1))
    assert all(np.unique(fsh.average_of(after, name)["kernel"]) == -3 for name in ("1-a", "1_a", "class"))


# Surgeries of one's own.


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Remembers a mean of what its leaf's gradient might be."""

    memory_kinds = {"mean": "grad"}  # noqa: RUF012

    def init_memory(self, leaf):
        return {"mean": jnp.ones_like(leaf), "steps": jnp.zeros((), jnp.int32)}

    def __call__(self, leaf, memory):
        return leaf - memory["mean"], memory


def test_a_memory_of_another_kind_moves_as_slots_of_that_kind():
    hooks = make_hooks({"momentum": Momentum()})
    hooks.add("scale", Scale(4.0), params="kernel", when=NEVER, opt_state="transport")
    state = hooks.fire("scale", hooks.init(make_state({"kernel": jnp.ones((2, 2))})))
    assert np.unique(state.surgery["memory"]["momentum"]["kernel"]["mean"]).tolist() == [0.25]
    after = hooks.fire("momentum", state)
    assert np.unique(after.params["kernel"]).tolist() == [3.75]
    assert np.unique(after.surgery["memory"]["momentum"]["kernel"]["mean"]).tolist() == [0.25]
