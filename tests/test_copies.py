"""Weights that are put in the place of the live ones: averages and back, slow, earlier ones, those of another run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from resumed import mesh_of, open_manager
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import CheckpointError, ScheduleError, StateError, SurgeryError, SurgeryFunctionError
from flax_surgery_hooks.surgeries import Ema, Graft, Lawa, Lookahead, Prune, Rewind, Swap
from flax_surgery_hooks.testing import streams

NEVER = fsh.at(1_000_000_000)
TX = optax.adam(0.05)
STEPS = 7


def make_state(dtype: Any = jnp.float32) -> fsh.TrainState:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), dtype)
    params = {"kernel": kernel, "bias": jnp.ones(4, dtype)}
    return fsh.TrainState.create(apply_fn=None, params=params, tx=TX).replace(step=jnp.int32(0))


def make_hooks(surgery: Any, when: Any, **options: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=1)
    hooks.add("a", surgery, params="kernel", when=when, **options)
    return hooks


def update(state: Any) -> Any:
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.1, state.params))


def trained(hooks: fsh.SurgeryHooks, form: str = "host", dtype: Any = jnp.float32) -> tuple[Any, list[Any]]:
    """The state after a run whose train step donates, and the states after each step, in NumPy."""
    inside = hooks.in_graph if form == "graph" else hooks.observe
    step = jax.jit(lambda state: inside(update(state)), donate_argnums=0)
    state = hooks.init(make_state(dtype))
    seen = [jax.tree.map(np.array, (state.params, state.opt_state))]
    for at in range(1, STEPS + 1):
        state = hooks(at, step(state))
        seen.append(jax.tree.map(np.array, (state.params, state.opt_state)))
    hooks.collect(state)
    hooks.flush()
    return state, seen


@jax.jit
def bare(params: Any, opt_state: Any) -> Any:
    """A step without hooks: params and optimizer state."""
    state = update(fsh.TrainState(step=0, apply_fn=None, params=params, tx=TX, opt_state=opt_state))
    return state.params, state.opt_state


def assert_close(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# Swap


def swapping(dtype: Any, surgery: Any, params: str = "kernel") -> tuple[fsh.SurgeryHooks, Any]:
    hooks = fsh.SurgeryHooks(seed=1)
    hooks.add("average", surgery, params="**", when=NEVER)
    hooks.add("swap", Swap("average"), params=params, when=NEVER)
    step = jax.jit(lambda state: hooks.observe(update(state)))
    state = hooks.init(make_state(dtype))
    for _ in range(3):
        state = step(state)
    return hooks, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("surgery", [Ema(0.8), Lawa(2, 1)])
def test_a_swap_puts_the_average_in_and_the_next_one_the_weights_back(dtype, surgery):
    hooks, state = swapping(dtype, surgery)
    average = fsh.average_of(state, "average")
    swapped = hooks.fire("swap", state)
    assert_bitwise_equal(swapped.params, {**state.params, "kernel": average["kernel"]})
    assert np.any(swapped.params["kernel"] != state.params["kernel"])
    back = hooks.fire("swap", swapped)
    assert_bitwise_equal(back.params, state.params)
    for one in (swapped, back):
        assert_bitwise_equal(one.opt_state, state.opt_state)
        assert_bitwise_equal(one.surgery["memory"]["average"], state.surgery["memory"]["average"])
    assert_bitwise_equal(hooks.fire("swap", back).params, swapped.params)


def test_a_swap_can_be_fired_in_graph():
    def run(form: str) -> Any:
        hooks = fsh.SurgeryHooks(seed=1)
        hooks.add("average", Ema(0.8), params="kernel", when=NEVER)
        hooks.add("swap", Swap("average"), params="kernel", when=fsh.at(3, 5))
        return trained(hooks, form)[1]

    assert_close(run("graph"), run("host"))


def test_live_weights_lie_as_their_own_leaf_does_not_as_another_of_its_shape():
    mesh = mesh_of("auto")
    places = {
        name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in (("a", ("data",)), ("b", (None, "data")))
    }
    params = {name: jax.device_put(jnp.ones((8, 8)), place) for name, place in places.items()}
    hooks = fsh.SurgeryHooks()
    hooks.add("average", Ema(0.8), params="**", when=NEVER)
    hooks.add("swap", Swap("average"), params="**", when=NEVER)
    hooks.add("prune", Prune(0.5), params="**", when=NEVER)
    memory = hooks.init(fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))).surgery["memory"]
    for name, place in places.items():
        for kept in (memory["average"][name]["average"], memory["swap"]["live"][name], memory["prune"][name]):
            assert kept.sharding.is_equivalent_to(place, 2)


# Lookahead


@pytest.mark.parametrize("form", ["host", "graph"])
def test_lookahead_is_the_algorithm_of_the_paper(form):
    """The inner optimizer runs by itself between the fires; slots are never touched."""
    with streams.enable_x64(True):
        _, seen = trained(make_hooks(Lookahead(0.3), fsh.every(3)), form, jnp.float64)
        slow = seen[0][0]["kernel"]
        for at in range(1, STEPS + 1):
            params, opt_state = bare(*seen[at - 1])
            params = dict(params)
            if at % 3 == 0:
                slow = 0.7 * slow + 0.3 * np.asarray(params["kernel"])
                wrong = 0.3 * slow + 0.7 * np.asarray(params["kernel"])
                assert np.abs(seen[at][0]["kernel"] - wrong).max() > 1e-3
                params["kernel"] = slow
            for one, other in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(seen[at]), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


# Rewind


@pytest.mark.parametrize("guard", ["finite", "off"])
@pytest.mark.parametrize("form", ["host", "graph"])
def test_a_rewind_puts_back_the_weights_of_its_step(form, guard):
    _, seen = trained(make_hooks(Rewind(2), fsh.at(5), guard=guard), form)
    assert_bitwise_equal(seen[5][0]["kernel"], seen[2][0]["kernel"])
    for other in (0, 1, 3):
        assert np.any(seen[5][0]["kernel"] != seen[other][0]["kernel"])
    params, opt_state = bare(*seen[4])
    assert_close((seen[5][0]["bias"], seen[5][1]), (params["bias"], opt_state))


def test_a_rewind_to_step_0_goes_back_to_the_start_and_can_reset_slots():
    state, seen = trained(make_hooks(Rewind(0), fsh.at(STEPS), opt_state="reset"))
    assert_bitwise_equal(seen[STEPS][0]["kernel"], seen[0][0]["kernel"])
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        assert not np.any(moment["kernel"])
        assert np.any(moment["bias"])


def test_a_rewound_network_stays_pruned():
    hooks = fsh.SurgeryHooks(seed=1)
    hooks.add("prune", Prune(0.5), params="kernel", when=fsh.at(4))
    hooks.add("rewind", Rewind(1), params="kernel", when=fsh.at(5))
    state, seen = trained(hooks)
    mask = np.asarray(state.surgery["memory"]["prune"]["kernel"])
    assert mask.sum() == 6
    assert_bitwise_equal(seen[5][0]["kernel"], seen[1][0]["kernel"])
    assert np.array_equal(seen[6][0]["kernel"] != 0, mask)


# All together: cut off, and on eight devices.


def several() -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=1)
    hooks.add("average", Ema(0.8), params="kernel", when=NEVER)
    hooks.add("swap", Swap("average"), params="kernel", when=fsh.at(3, 5))
    hooks.add("slow", Lookahead(0.5), params="*", when=fsh.every(2))
    hooks.add("rewind", Rewind(2), params="kernel", when=fsh.at(6))
    return hooks


def test_a_run_that_is_cut_off_while_weights_are_swapped_goes_on_bit_for_bit(tmp_path):
    expected, _ = trained(several())
    hooks = several()
    step = jax.jit(lambda state: hooks.observe(update(state)), donate_argnums=0)
    state = hooks.init(make_state())
    with open_manager(tmp_path) as manager:
        for at in range(1, 5):
            state = hooks(at, step(state))
        assert bool(state.surgery["memory"]["swap"]["swapped"])
        fsh.checkpoint.save(manager, 4, state, hooks)
    hooks = several()
    with open_manager(tmp_path) as manager:
        state = fsh.checkpoint.restore(manager, hooks.init(make_state()), hooks)
    for at in range(5, STEPS + 1):
        state = hooks(at, step(state))
    for of in (lambda state: (state.params, state.opt_state), lambda state: state.surgery["memory"]):
        assert_bitwise_equal(of(state), of(expected))


@pytest.mark.parametrize("form", ["host", "graph"])
@pytest.mark.parametrize("placed", ["auto", "explicit"])
def test_on_eight_devices_they_do_what_they_do_on_one(placed, form):
    mesh = mesh_of(placed)
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "tensor"), ()))

    def run(place: Any) -> Any:
        hooks = several()
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
        params = {"kernel": kernel, "bias": jnp.ones(4)}
        state = fsh.TrainState.create(apply_fn=None, params=params, tx=TX).replace(step=jnp.int32(0))
        state = hooks.init(jax.tree.map(place, state))
        inside = hooks.in_graph if form == "graph" else hooks.observe
        step = jax.jit(lambda state: inside(update(state)), donate_argnums=0)
        for at in range(1, STEPS + 1):
            state = hooks(at, step(state))
        return state.params, state.opt_state, state.surgery["memory"]

    found, alone = run(lambda leaf: jax.device_put(leaf, spread if leaf.ndim == 2 else whole)), run(jnp.asarray)
    assert_close(found, alone)
    for leaf in jax.tree.leaves(found):
        assert leaf.ndim != 2 or leaf.sharding.is_equivalent_to(spread, 2)


# Graft

OTHER = {"body": {"kernel": np.full((3, 4), 2.0, np.float32), "bias": np.full(4, 3.0, np.float32)}}


@pytest.mark.parametrize("paths", [("^", "body/"), {"kernel": "body/kernel", "bias": "body/bias"}])
def test_a_graft_takes_leaves_by_a_map_of_paths(paths):
    state, _ = fsh.operate(make_state(jnp.bfloat16), Graft(OTHER, paths=paths), params="kernel")
    assert_bitwise_equal(state.params, {**make_state(jnp.bfloat16).params, "kernel": jnp.full((3, 4), 2, jnp.bfloat16)})
    state, _ = fsh.operate(make_state(), Graft(OTHER, paths=paths))
    assert_bitwise_equal(state.params, OTHER["body"])


def test_a_graft_has_no_history():
    _, state = swapping(jnp.float32, Ema(0.5))
    assert np.any(state.opt_state[0].mu["kernel"])
    new, _ = fsh.operate(state, Graft({"kernel": OTHER["body"]["kernel"]}), params="kernel")
    assert not np.any(new.opt_state[0].mu["kernel"])
    assert_bitwise_equal(new.opt_state[0].mu["bias"], state.opt_state[0].mu["bias"])


def test_a_graft_reads_a_checkpoint(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "other", jax.tree.map(jnp.asarray, {"params": OTHER}))
    for source in (tmp_path / "other", str(tmp_path / "other")):
        state, record = fsh.operate(make_state(), Graft(source, paths=("^", "params/body/")))
        assert_bitwise_equal(state.params, OTHER["body"])
    assert "Graft" in record.surgery


def test_a_graft_reads_what_hooks_saved(tmp_path):
    hooks = make_hooks(Rewind(0), NEVER)
    state = jax.jit(update)(hooks.init(make_state()))
    with open_manager(str(tmp_path / "checkpoints")) as manager:
        fsh.checkpoint.save(manager, 1, state, hooks)
    graft = Graft(tmp_path / "checkpoints" / "1" / "state", paths=("^", "params/"))
    assert_bitwise_equal(fsh.operate(make_state(), graft)[0].params, state.params)


def test_a_graft_survives_the_donation_of_its_source():
    state = make_state()
    first, graft = np.array(state.params["kernel"]), Graft(state.params)
    state = jax.jit(update, donate_argnums=0)(state)
    assert np.any(state.params["kernel"] != first)
    assert_bitwise_equal(fsh.operate(state, graft, params="kernel")[0].params["kernel"], first)


# Configs and mistakes


def test_configs_name_them():
    given = {"swap": {"hook": "ema"}, "lookahead": {"alpha": 0.3}, "rewind": {"to_step": 3}}
    for name, fields in given.items():
        [spec] = fsh.config.build({name: fsh.config.hook(name, **fields, params="kernel", at=(9,))})
        assert spec.surgery == {"swap": Swap, "lookahead": Lookahead, "rewind": Rewind}[name](**fields)


def swap_with(hook: str, params: str = "kernel") -> Any:
    hooks = fsh.SurgeryHooks(seed=1)
    hooks.add("ema", Ema(0.8), params="kernel", when=NEVER)
    hooks.add("swap", Swap(hook), params=params, when=fsh.at(1))
    return hooks(0, hooks.init(make_state()))


def graft(source: Any, paths: Any = None) -> Any:
    return lambda: fsh.operate(make_state(), Graft(source, paths=paths), params="kernel")


MISTAKES = {
    "no leaf": (graft(OTHER), SurgeryFunctionError, ("no 'kernel' among body/bias", "paths={'kernel': 'body/kernel'}")),
    "no leaves": (graft({}), SurgeryFunctionError, ("no leaves at all",)),
    "shape": (graft(OTHER, {"kernel": "body/bias"}), SurgeryFunctionError, ("body/bias of [4] for [3, 4]",)),
    "map": (lambda: Graft(OTHER, paths=("a", 1)), SurgeryFunctionError, ("Found: ('a', 1)", '("^encoder/", "body/")')),
    "map of one": (lambda: Graft(OTHER, paths="body"), SurgeryFunctionError, ("Found: 'body'",)),
    "expression": (lambda: Graft(OTHER, paths=("(", "")), SurgeryFunctionError, ("no regular", "unterminated")),
    "group": (lambda: Graft(OTHER, paths=("a", r"\1")), SurgeryFunctionError, ("invalid group",)),
    "directory": (lambda: Graft("/nowhere"), CheckpointError, ("no directory", "/nowhere", "1000/state")),
    "hook": (lambda: Swap(Ema(0.9)), SurgeryFunctionError, ("the name of a hook", 'Swap("ema")')),
    "unknown hook": (lambda: swap_with("emma"), StateError, ("no averages of a hook 'emma'", "'ema'")),
    "itself": (lambda: swap_with("swap"), StateError, ("'swap' remembers is not averages",)),
    "leaf": (lambda: swap_with("ema", "**"), StateError, ("does not average", "path 'bias'", "kernel")),
    "alpha": (lambda: Lookahead(0.0), SurgeryFunctionError, ("above 0 and at most 1", "0.0")),
    "to_step": (lambda: Rewind(-1), SurgeryFunctionError, ("Rewind(to_step=...)", "-1")),
    "too early": (
        lambda: make_hooks(Rewind(5), fsh.every(2)),
        ScheduleError,
        ("before the step that it goes back to", "due at 2", "to_step=5"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, kind, says = MISTAKES[name]
    with pytest.raises(SurgeryError) as caught:
        make()
    assert type(caught.value) is kind
    assert all(part in str(caught.value) for part in says), caught.value
