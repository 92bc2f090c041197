"""Averages kept in the train state: their numbers, how they are read and put in place, and how long they live."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from resumed import assert_same, mesh_of, open_manager
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import StateError, StructureError, SurgeryError, SurgeryFunctionError
from flax_surgery_hooks.surgeries import Ema, Lawa, Prune, Swa
from flax_surgery_hooks.testing import streams

STEPS = 11
NEVER = fsh.at(1_000_000_000)
TX = optax.adam(0.05)
AVERAGES = {"ema": Ema(0.8), "half": Ema(half_life=3), "swa": Swa(begin=4, interval=2), "lawa": Lawa(k=3, interval=2)}


def make_hooks(surgeries: Any = AVERAGES, when: Any = NEVER, **options: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=1)
    for name, surgery in surgeries.items():
        hooks.add(name, surgery, params="kernel", when=when, **options)
    return hooks


def make_state(dtype: Any = jnp.float32, shape: tuple[int, int] = (3, 4)) -> fsh.TrainState:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    params = {"kernel": kernel, "bias": jnp.ones(4, dtype)}
    return fsh.TrainState.create(apply_fn=None, params=params, tx=TX).replace(step=jnp.int32(0))


def update(state: Any) -> Any:
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params))


def trained(hooks: fsh.SurgeryHooks, state: Any, form: str = "host", steps: int = STEPS) -> tuple[Any, list[Any]]:
    """The state after a run whose train step donates, and the kernel after each step, the first one too."""
    inside = hooks.in_graph if form == "graph" else hooks.observe
    step = jax.jit(lambda state: inside(update(state)), donate_argnums=0)
    seen = [np.array(state.params["kernel"])]
    for at in range(int(state.step) + 1, steps + 1):
        state = hooks(at, step(state))
        seen.append(np.array(state.params["kernel"]))
    hooks.collect(state)
    return state, seen


# The numbers, replayed in NumPy from the weights of every step.


def oracle(name: str, seen: list[Any]) -> Any:
    """From the weights after each step, float64, to the average after the last, by its definition."""
    last = len(seen) - 1
    if name in ("ema", "half"):
        decay = {"ema": 0.8, "half": 0.5 ** (1 / 3)}[name]
        return decay**last * seen[0] + sum((1 - decay) * decay ** (last - at) * seen[at] for at in range(1, last + 1))
    if name == "swa":
        taken = [seen[at] for at in range(4, last + 1, 2)]
    else:
        taken = [seen[at] for at in range(2, last + 1, 2)][-3:]
    return np.mean(taken, axis=0) if taken else seen[-1]


@functools.cache
def replayed() -> list[tuple[Any, list[Any]]]:
    """After each number of steps: what the averages are in a run of float64, and the weights up to there."""
    with streams.enable_x64(True):
        hooks = make_hooks()
        state = hooks.init(make_state(jnp.float64))
        step = jax.jit(lambda state: hooks.observe(update(state)))
        seen, told = [np.array(state.params["kernel"])], []
        for _ in range(STEPS):
            state = step(state)
            seen.append(np.array(state.params["kernel"]))
            averages = {name: np.array(fsh.average_of(state, name)["kernel"]) for name in AVERAGES}
            told.append((averages, list(seen)))
    return told


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_is_what_its_definition_says_after_every_step(name):
    for averages, seen in replayed():
        assert averages[name].dtype == np.float64
        np.testing.assert_allclose(averages[name], oracle(name, seen), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", AVERAGES)
def test_mistakes_would_show(name):
    """An alias of the weights, another decay, a step or a snapshot too many or too few, all steps."""
    averages, seen = replayed()[-1]
    wrong = {
        "ema": [oracle("half", seen), oracle("ema", seen[1:])],
        "half": [oracle("ema", seen), oracle("half", seen[:-1])],
        "swa": [np.mean(seen[4:], axis=0), np.mean(seen[2::2], axis=0), np.mean(seen[6::2], axis=0)],
        "lawa": [np.mean(seen[4::2], axis=0), np.mean(seen[8::2], axis=0), np.mean(seen[-3:], axis=0)],
    }[name]
    for other in (seen[-1], *wrong):
        assert np.abs(averages[name] - other).max() > 1e-4


def test_before_the_first_snapshot_the_average_is_the_weights():
    averages, seen = replayed()[0]
    for name in ("swa", "lawa"):
        np.testing.assert_array_equal(averages[name], seen[-1])
    assert (averages["ema"] != seen[-1]).any()


def test_snapshots_that_are_not_due_do_not_count_even_if_they_are_not_finite():
    for surgery in (Swa(begin=1, interval=2), Lawa(k=2, interval=1)):
        memory = surgery.init_memory(jnp.ones(2))
        for step, value in ((0, jnp.nan), (1, 3.0)):
            _, memory = surgery.observe(jnp.full(2, value), memory, jnp.int32(step))
        assert surgery(jnp.ones(2), memory)[0].tolist() == [3.0, 3.0]


def test_averages_of_bfloat16_are_kept_in_float32():
    """In bfloat16 an average with a decay of 0.999 would not move at all."""
    hooks = make_hooks({"ema": Ema(0.999), "swa": Swa(begin=1), "lawa": Lawa(k=2, interval=1)})
    state = hooks.init(make_state(jnp.bfloat16))
    first = np.float64(state.params["kernel"])
    state, seen = trained(hooks, state, steps=5)
    kept = state.surgery["memory"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept) if leaf.ndim} == {"float32"}
    wanted = first.copy()
    for kernel in seen[1:]:
        wanted += 0.001 * (np.float64(kernel) - wanted)
    found = np.float64(kept["ema"]["kernel"]["average"])
    # XLA may spare the average the rounding of the weights, to 1 / 256 of them.
    np.testing.assert_allclose(found - first, wanted - first, rtol=1e-3, atol=3e-5)
    assert np.abs(wanted - first).min() > 1e-4
    assert (found != first).all()
    assert {fsh.average_of(state, name)["kernel"].dtype.name for name in kept} == {"bfloat16"}


# Fires


@functools.cache
def fired(form: str, guard: str = "finite") -> tuple[Any, Any, Any]:
    """A run whose averages are put in place at steps 6, 7, 8, one after the other; hooks, state and weights."""
    hooks = fsh.SurgeryHooks(seed=1)
    for at, (name, surgery) in zip((6, 7, 8, 8), AVERAGES.items(), strict=True):
        hooks.add(name, surgery, params="kernel", when=fsh.at(at), guard=guard)
    state, seen = trained(hooks, hooks.init(make_state()), form)
    hooks.flush()
    return hooks, state, seen


@pytest.mark.parametrize("guard", ["finite", "off"])
def test_a_fire_puts_the_average_in_place_and_the_host_form_is_that_in_graph(guard):
    """The train step donates: neither a snapshot nor an average may be the buffer of a leaf."""
    _, host, seen = fired("host", guard)
    _, graph, others = fired("graph", guard)
    for one, other in zip(seen, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    for one, other in zip(jax.tree.leaves(host.opt_state), jax.tree.leaves(graph.opt_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_figure_of_a_fire_is_the_distance_between_average_and_weights_and_slots_stay():
    hooks = make_hooks({"ema": Ema(0.8)}, fsh.at(3))
    state, _ = trained(hooks, hooks.init(make_state()), steps=2)
    before = jax.jit(lambda state: hooks.observe(update(state)))(state)
    after = hooks(3, before)
    hooks.flush()
    weights, average = (np.float64(one["kernel"]) for one in (before.params, fsh.average_of(before, "ema")))
    np.testing.assert_array_equal(after.params["kernel"], np.float32(average))
    assert_bitwise_equal(after.opt_state, before.opt_state)
    (record,) = [one for one in hooks.ledger.records if one.event == "settled"]
    wanted = np.linalg.norm(average - weights) / np.linalg.norm(weights)
    assert record.figures["params/relative_change"] == pytest.approx(wanted, rel=1e-5)
    assert wanted > 1e-3


def test_operate_has_no_place_for_an_average():
    with pytest.raises(StateError, match="remembers"):
        fsh.operate(make_state(), Ema(0.9), params="kernel")


# Reading


def test_average_of_gives_a_tree_that_survives_the_state():
    hooks = make_hooks()
    state, _ = trained(hooks, hooks.init(make_state()), steps=6)
    found = {name: fsh.average_of(state, name) for name in AVERAGES}
    kept = {name: np.array(one["kernel"]) for name, one in found.items()}
    assert all(one["bias"] is state.params["bias"] for one in found.values())
    traced = jax.jit(lambda state: fsh.average_of(state, "lawa"))(state)
    np.testing.assert_allclose(traced["kernel"], kept["lawa"], rtol=1e-6)
    trained(hooks, state, steps=7)  # donates the state, and writes the next snapshots
    for name, one in found.items():
        np.testing.assert_array_equal(one["kernel"], kept[name])


def test_layers_of_a_stack_have_averages_of_their_own():
    stack = {"layers": {"kernel": jnp.arange(24.0).reshape(3, 2, 4)}}
    state = fsh.TrainState.create(apply_fn=None, params=stack, tx=optax.sgd(1.0)).replace(step=jnp.int32(0))
    hooks = fsh.SurgeryHooks()
    hooks.add("ema", Ema(0.75), params="layers/kernel[1:]", when=NEVER)
    state = hooks.init(state)
    state = hooks.observe(state.apply_gradients(grads=jax.tree.map(jnp.ones_like, stack)))
    live, average = (np.asarray(tree["layers"]["kernel"]) for tree in (state.params, fsh.average_of(state, "ema")))
    np.testing.assert_array_equal(average[0], live[0])
    np.testing.assert_array_equal(average[1:], live[1:] + 0.75)


def test_other_containers():
    tx, params = optax.sgd(1.0), {"kernel": jnp.full(2, 4.0)}
    hooks = make_hooks({"ema": Ema(0.75), "lawa": Lawa(k=2, interval=1)})
    bound = hooks.init(fsh.bind(params=params, opt_state=tx.init(params), tx=tx, step=jnp.int32(0)))
    bound = hooks.observe(bound.replace(params={"kernel": jnp.zeros(2)}, step=jnp.int32(1)))
    assert fsh.average_of(bound, "ema")["kernel"].tolist() == [3.0, 3.0]
    assert fsh.average_of(bound, "lawa")["kernel"].tolist() == [0.0, 0.0]

    model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.full((2, 2), 4.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    hooks = make_hooks({"ema": Ema(0.75), "lawa": Lawa(k=2, interval=1)})
    hooks.init(fsh.bind_nnx(model, optimizer))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(lambda leaf: 4 * jnp.ones_like(leaf), nnx.state(model, nnx.Param)))
        hooks.observe(fsh.bind_nnx(model, optimizer))

    step(model, optimizer)
    state = fsh.bind_nnx(model, optimizer)
    for holder in (state, optimizer):
        assert set(fsh.averages.averages_in(holder, "ema")) == {"kernel"}
    assert np.unique(fsh.average_of(state, "ema")["kernel"]).tolist() == [3.0]
    assert np.unique(fsh.average_of(state, "lawa")["kernel"]).tolist() == [0.0]


# Long runs


@pytest.mark.parametrize("form", ["host", "graph"])
def test_a_run_that_was_cut_off_amid_an_average_goes_on_bit_for_bit(form):
    with tempfile.TemporaryDirectory() as directory:
        hooks = make_hooks(when=fsh.at(9))
        state, _ = trained(hooks, hooks.init(make_state()), form, steps=5)
        with open_manager(f"{directory}/checkpoints") as manager:
            fsh.checkpoint.save(manager, 5, state, hooks)
        expected, _ = trained(hooks, state, form)
        again = make_hooks(when=fsh.at(9))
        with open_manager(f"{directory}/checkpoints") as manager:
            state = fsh.checkpoint.restore(manager, again.init(make_state()), again)
        state, _ = trained(again, state, form)
    without_room = lambda state: state.replace(surgery=state.surgery["memory"])  # noqa: E731
    assert_same(without_room(state), without_room(expected))


@pytest.mark.parametrize("placed", ["auto", "explicit"])
def test_averages_lie_as_their_leaves_do(placed):
    mesh = mesh_of(placed)
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "tensor"), ()))

    def run(place: Any) -> Any:
        hooks = make_hooks(when=fsh.at(9))
        return trained(hooks, hooks.init(jax.tree.map(place, make_state(shape=(8, 4)))))[0]

    state = run(lambda leaf: jax.device_put(leaf, spread if leaf.ndim == 2 else whole))
    alone = run(jnp.asarray).surgery["memory"]
    for one, other in zip(jax.tree.leaves(state.surgery["memory"]), jax.tree.leaves(alone), strict=True):
        assert one.ndim == 0 or one.sharding.is_equivalent_to(spread, 2)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_an_average_follows_its_leaf_to_another_shape():
    hooks = fsh.SurgeryHooks()
    hooks.add("ema", Ema(0.5), params="**", when=NEVER)
    twice = lambda kernel: jnp.concatenate([kernel, kernel], 1)  # noqa: E731
    hooks.add("widen", twice, params="kernel", when=fsh.at(2), apply_fn=lambda params: params)
    hooks.add("swa", Swa(begin=1), params="**", when=NEVER)
    step = jax.jit(lambda state: hooks.observe(update(state)))
    before = step(hooks(1, step(hooks.init(make_state()))))
    after = hooks(2, before)
    for name in ("ema", "swa"):
        old, new = fsh.average_of(before, name), fsh.average_of(after, name)
        np.testing.assert_array_equal(new["bias"], old["bias"])
        np.testing.assert_allclose(new["kernel"], twice(old["kernel"]), rtol=1e-6)
        assert np.any(new["kernel"] != after.params["kernel"])
    assert fsh.average_of(step(after), "swa")["kernel"].shape == (3, 8)


def test_an_average_after_the_hook_that_masks_sees_what_is_masked():
    hooks = fsh.SurgeryHooks()
    hooks.add("prune", Prune(0.5), params="kernel", when=fsh.at(1))
    hooks.add("lawa", Lawa(k=2, interval=1), params="kernel", when=NEVER)
    state, _ = trained(hooks, hooks.init(make_state()), steps=4)
    assert np.sum(np.asarray(fsh.average_of(state, "lawa")["kernel"]) != 0) == 6


# Configs and mistakes


def test_configs_name_them():
    given = {"ema": {"half_life": 100}, "swa": {"begin": 10}, "lawa": {"k": 3, "interval": 5}}
    for name, fields in given.items():
        [spec] = fsh.config.build({name: fsh.config.hook(name, **fields, params="kernel", at=(9,))})
        assert spec.surgery == {"ema": Ema, "swa": Swa, "lawa": Lawa}[name](**fields)


MISTAKES = {
    "neither": (lambda: Ema(), ("either `decay` or `half_life`", "neither", "Ema(0.999)")),
    "both": (lambda: Ema(0.9, 10), ("either `decay` or `half_life`", "both")),
    "decay": (lambda: Ema(1.0), ("above 0 and below 1", "1.0")),
    "half_life": (lambda: Ema(half_life=0), ("steps above 0", "half_life=1_000")),
    "begin": (lambda: Swa(-1), ("Swa(begin=...)", "at least 0", "-1")),
    "interval": (lambda: Swa(1, True), ("Swa(interval=...)", "True")),
    "k": (lambda: Lawa(0, 5), ("Lawa(k=...)", "at least 1")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_fields(name):
    make, says = MISTAKES[name]
    with pytest.raises(SurgeryFunctionError) as caught:
        make()
    assert all(part in str(caught.value) for part in says), caught.value


def raised(state: Any, hook: str, kind: type[SurgeryError]) -> str:
    with pytest.raises(kind) as caught:
        fsh.average_of(state, hook)
    return str(caught.value)


def test_mistakes_in_names_and_states():
    state = make_state()
    assert "hooks.init(state)" in raised(state, "ema", StateError)
    hooks = make_hooks({"ema": Ema(0.5), "prune": Prune(0.5)})
    state = hooks.init(state)
    assert "'ema'" in raised(state, "emma", StateError)
    assert "is not averages" in raised(state, "prune", StateError)
    other = state.replace(params={"kernle": jnp.ones(2)})
    assert "do not have. Found: kernle" in raised(other, "ema", StructureError)
    other = state.replace(params={"kernel": jnp.ones(2)})
    assert "[3, 4] for [2]" in raised(other, "ema", StructureError)
