"""More units and fewer: outputs, moments rebuilt from recorded steps, liveness, loops, meshes, mistakes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from raised import Case as Mistake
from resumed import mesh_of, open_manager
from tiny import assert_bitwise_equal
from width_models import CASES, Case, loss_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import InputError, StructureError, SurgeryFunctionError, UnitsError
from flax_surgery_hooks.surgeries import Ema, MergeUnits, Shrink, Widen
from flax_surgery_hooks.units import Units

TX = optax.adam(0.01, b1=0.9, b2=0.99)
STEPS = 6
NORMED = ("stream", "layer_norm")


class State(fsh.TrainState):
    """With what networks have beside their parameters."""

    batch_stats: Any = None


def make_state(case: Case, variables: Mapping[str, Any] | None = None, tx: Any = TX) -> State:
    variables = variables or case.variables()
    model = case.make(*case.counts)
    return State.create(apply_fn=model.apply, tx=tx, **variables).replace(step=jnp.int32(0))


def operate(case: Case, state: State, surgery: Any, **options: Any) -> State:
    return fsh.operate(state, surgery, fields=case.fields, key=jax.random.key(3), **options)[0]


def flat_of(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def sought(case: Case) -> dict[str, int]:
    return {one.activation: to for one, to in zip(case.units, case.to, strict=True)}


def output(case: Case, model: Any, state: State, seed: int = 9) -> np.ndarray:
    others = {name: getattr(state, name) for name in case.fields}
    return np.asarray(jax.jit(model.apply)({"params": state.params, **others}, case.batch(seed, state_dtype(state))))


def assert_close(one: Any, other: Any, rtol: float = 1e-12) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-18)


def state_dtype(state: State) -> Any:
    return jax.tree.leaves(state.params)[0].dtype


# The oracle: loops over units, in NumPy.


def widened(leaves: Mapping[str, np.ndarray], units: tuple[Units, ...], maps: Mapping[str, Any]) -> dict[str, Any]:
    """Copies units one by one.

    Args:
      leaves: path -> leaf; of fields too.
      units: the groups.
      maps: name -> (source, share), lists as long as there will be units.
    """
    made = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    for group in units:
        source, share = maps[group.activation]
        for places, shares in ((group.incoming, [1.0] * len(source)), (group.outgoing, share)):
            for path, place in places.items():
                if path in made:
                    made[path] = copied(made[path], place, source, shares)
    return made


def copied(leaf: np.ndarray, place: Any, source: list[int], shares: list[float]) -> np.ndarray:
    axis, order = (place, "tile") if isinstance(place, int) else place
    count, new = max(source) + 1, len(source)
    times = leaf.shape[axis] // count
    slices = []
    for at in range(new * times):
        unit, within = (at % new, at // new) if order == "tile" else (at // times, at % times)
        old = within * count + source[unit] if order == "tile" else source[unit] * times + within
        slices.append(shares[unit] * np.take(leaf, old, axis=axis))
    return np.stack(slices, axis=axis)


def maps_of(case: Case, split: Any = "even") -> dict[str, Any]:
    """Round robin, and what each copy gets."""
    found = {}
    for group, count, to in zip(case.units, case.counts, case.to, strict=True):
        source = [unit % count for unit in range(to)]
        share = []
        for unit in range(to):
            times = source.count(source[unit])
            first = 1 / times if split == "even" or times == 1 else split
            share.append(first if unit < count else (1 - first) / (times - 1))
        found[group.activation] = (source, share)
    return found


@functools.cache
def trained(name: str) -> tuple[State, list[tuple[Any, jax.Array]]]:
    """A state after some steps of Adam, and parameters and batch of each."""
    case = CASES[name]
    state, seen = make_state(case), []
    model = case.make(*case.counts)
    others = {field: getattr(state, field) for field in case.fields}
    gradient = jax.jit(jax.grad(functools.partial(loss_of, model)))
    for step in range(STEPS):
        batch = case.batch(step)
        seen.append((state.params, batch))
        state = state.apply_gradients(grads=gradient(state.params, others, batch))
    return state, seen


def rebuilt(name: str, edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], model: Any) -> Any:
    """Adam's moments, had every recorded step been taken on the edited network."""
    case = CASES[name]
    state, seen = trained(name)
    others = {field: getattr(state, field) for field in case.fields}
    fields = {f"{field}/{path}": leaf for field in others for path, leaf in flat_of(others[field]).items()}
    gradient = jax.jit(jax.grad(functools.partial(loss_of, model)))
    mu = nu = None
    for params, batch in seen:
        both = edit({**flat_of(params), **fields})
        new = flax.traverse_util.unflatten_dict(
            {p: jnp.asarray(x) for p, x in both.items() if p not in fields}, sep="/"
        )
        beside = flax.traverse_util.unflatten_dict({p: jnp.asarray(x) for p, x in both.items() if p in fields}, sep="/")
        grads = flat_of(gradient(new, beside, batch))
        mu = {p: 0.9 * (0 if mu is None else mu[p]) + 0.1 * g for p, g in grads.items()}
        nu = {p: 0.99 * (0 if nu is None else nu[p]) + 0.01 * g**2 for p, g in grads.items()}
    return mu, nu


# Copies.


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, "even") for name in CASES), *((name, 0.7) for name in ("mlp", "cnn", "groups", "stream"))],
)
def test_copies_compute_the_same_and_have_the_moments_of_a_run_that_was_always_wide(name, split, x64):
    case = CASES[name]
    state, _ = trained(name)
    after = operate(case, state, Widen(case.units, sought(case), split=split))
    wide = case.wider()
    shapes = jax.eval_shape(lambda: wide.init(jax.random.key(0), case.batch(0)))
    assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(jnp.shape, shapes["params"])
    before = output(case, case.make(*case.counts), state)
    np.testing.assert_allclose(output(case, wide, after), before, rtol=1e-12, atol=1e-12)

    maps = maps_of(case, split)
    edit = functools.partial(widened, units=case.units, maps=maps)
    expected = edit(flat_of(state.params))
    for path, leaf in flat_of(after.params).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-14, err_msg=path)
    if split != "even" and name in NORMED:
        return  # a norm over the units has a gradient in which they are mixed
    mu, nu = rebuilt(name, edit, wide)
    adam = after.opt_state[0]
    for path, leaf in flat_of(adam.mu).items():
        np.testing.assert_allclose(leaf, mu[path], rtol=1e-9, atol=1e-14, err_msg=path)
    for path, leaf in flat_of(adam.nu).items():
        np.testing.assert_allclose(leaf, nu[path], rtol=1e-9, atol=1e-18, err_msg=path)
    # Moments that are copied as parameters are, or with no factor, are others.
    for rule in ("carry", "reset"):
        wrong = operate(case, state, Widen(case.units, sought(case), split=split), opt_state=rule).opt_state[0]
        off = [np.abs(leaf - mu[path]).max() / np.abs(mu[path]).max() for path, leaf in flat_of(wrong.mu).items()]
        assert max(off) > 0.2


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_units_drawn_at_random_are_copied_with_one_map_for_all_leaves(name, x64):
    case = CASES[name]
    state, _ = trained(name)
    surgery = Widen(case.units, sought(case), mapping="random")
    after = operate(case, state, surgery)
    leaves = {
        **flat_of(state.params),
        **{f"{f}/{p}": x for f in case.fields for p, x in flat_of(getattr(state, f)).items()},
    }
    copies = surgery.copies(leaves, jax.random.key(3))
    maps = {one: (held["source"].tolist(), held["share"].tolist()) for one, held in copies.items()}
    assert any(source != maps_of(case)[one][0] for one, (source, _) in maps.items())
    np.testing.assert_allclose(
        output(case, case.wider(), after), output(case, case.make(*case.counts), state), rtol=1e-12
    )
    edit = functools.partial(widened, units=case.units, maps=maps)
    mu, _ = rebuilt(name, edit, case.wider())
    for path, leaf in flat_of(after.opt_state[0].mu).items():
        np.testing.assert_allclose(leaf, mu[path], rtol=1e-9, atol=1e-14, err_msg=path)


def test_a_norm_over_units_that_are_not_copied_equally_often_is_another_function(x64):
    case = CASES["stream"]
    state, _ = trained("stream")
    after = operate(case, state, Widen(case.units, 10))
    apart = output(case, case.wider((10,)), after) - output(case, case.make(*case.counts), state)
    assert np.abs(apart).max() > 1e-3


def test_noise_tells_copies_apart_and_moves_the_output_by_as_much(x64):
    case = CASES["mlp"]
    state, _ = trained("mlp")
    before = output(case, case.make(*case.counts), state)
    apart = {}
    for noise in (0.001, 0.01):
        after = operate(case, state, Widen(case.units, sought(case), noise=noise))
        kernel, old = after.params["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"]
        np.testing.assert_array_equal(kernel[:, :6], old)
        size = noise * np.sqrt(np.mean(np.square(np.concatenate([old, old[:, :4]], axis=1))))
        assert 0.3 * size < np.abs(kernel[:, 6:] - old[:, :4]).mean() < 2 * size
        apart[noise] = np.abs(output(case, case.wider(), after) - before).max()
        exact = operate(case, state, Widen(case.units, sought(case)))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-16), after.opt_state, exact.opt_state
        )
    assert 5 < apart[0.01] / apart[0.001] < 20
    assert 0 < apart[0.001] < 0.01


# Fresh units that nobody hears yet.


@pytest.mark.parametrize("name", ["mlp", "cnn", "channels_first", "scanned", "groups"])
def test_silent_units_leave_the_output_as_it_is_and_learn_at_once(name, x64):
    case = CASES[name]
    state, _ = trained(name)
    wide = case.wider()
    made = case.variables(5, model=wide)

    def init(key: jax.Array) -> Any:
        return {**made["params"], **{field: made[field] for field in case.fields}}

    after = operate(case, state, Widen(case.units, sought(case), by="zero", init=init))
    np.testing.assert_allclose(
        output(case, wide, after), output(case, case.make(*case.counts), state), rtol=1e-12, atol=1e-12
    )
    old, new, drawn = flat_of(state.params), flat_of(after.params), flat_of(made["params"])
    after_mu, before_mu = (flat_of(one.opt_state[0].mu) for one in (after, state))
    for path, leaf in new.items():
        kept = np.isin(leaf, old[path])
        assert kept.sum() == old[path].size, path
        assert np.all(kept | (leaf == 0) | (leaf == drawn[path])), path
        np.testing.assert_array_equal(np.sort(after_mu[path][kept]), np.sort(before_mu[path].ravel()))
        assert not after_mu[path][~kept].any(), path
    others = {field: getattr(after, field) for field in case.fields}
    seen = {path: np.zeros(leaf.shape, bool) for path, leaf in new.items()}
    trained_on, gradient = after.replace(apply_fn=wide.apply), jax.jit(jax.grad(functools.partial(loss_of, wide)))
    for step in range(3):
        grads = gradient(trained_on.params, others, case.batch(20 + step))
        seen = {path: seen[path] | (grad != 0) for path, grad in flat_of(grads).items()}
        trained_on = trained_on.apply_gradients(grads=grads)
    for path, leaf in new.items():
        if leaf.shape != old[path].shape:
            quiet = ~seen[path] & ~np.isin(leaf, old[path])
            assert quiet.mean() < 0.2, path  # ReLUs that are dead on these batches alone


# Fewer.


@pytest.mark.parametrize("name", ["mlp", "cnn", "scanned", "groups"])
def test_merged_copies_are_what_there_was_with_its_moments(name, x64):
    case = CASES[name]
    state, _ = trained(name)
    wide = operate(case, state, Widen(case.units, sought(case)))
    counts = {one.activation: count for one, count in zip(case.units, case.counts, strict=True)}
    back, record = fsh.operate(wide, MergeUnits(case.units, counts), fields=case.fields)
    assert_close((back.params, back.opt_state), (state.params, state.opt_state))
    for group in case.units:
        assert float(record.figures[f"units/apart/{group.activation}"]) == 0
    first = case.units[0].activation
    _, record = fsh.operate(state, MergeUnits(case.units[:1], max(counts[first] - 1, 1)), fields=case.fields)
    assert float(record.figures[f"units/apart/{first}"]) > 0.1


def killed(case: Case, state: State, group: Units, dead: list[int]) -> State:
    """Units that nothing makes."""
    made = flat_of(state.params)
    for path, place in group.incoming.items():
        if path in made:
            assert isinstance(place, int)
            leaf = np.moveaxis(made[path].copy(), place, 0)
            leaf[np.isin(np.arange(len(leaf)) % case.counts[0], dead)] = 0
            made[path] = np.moveaxis(leaf, 0, place)
    return state.replace(params=flax.traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, made), sep="/"))


@pytest.mark.parametrize("name", ["mlp", "cnn", "scanned"])
def test_without_its_dead_units_a_model_computes_the_same_for_less(name, x64):
    case = CASES[name]
    group, dead = case.units[0], [1, 3]
    state = killed(case, trained(name)[0], group, dead)
    to = case.counts[0] - len(dead)
    narrow = case.make(to, *case.counts[1:])
    after, record = fsh.operate(state, Shrink(group, to), fields=case.fields)
    assert float(record.figures[f"units/removed_use/{group.activation}"]) == 0
    np.testing.assert_allclose(output(case, narrow, after), output(case, case.make(*case.counts), state), rtol=1e-12)
    left = [unit for unit in range(case.counts[0]) if unit not in dead]
    for path, leaf in flat_of(after.opt_state[0].mu).items():
        old = flat_of(state.opt_state[0].mu)[path]
        for places in (group.incoming, group.outgoing):
            old = np.take(old, left, axis=places[path]) if path in places else old
        np.testing.assert_array_equal(leaf, old)

    def flops(model: Any, state: State) -> float:
        others = {field: getattr(state, field) for field in case.fields}
        step = jax.jit(jax.grad(functools.partial(loss_of, model)))
        return step.lower(state.params, others, case.batch(0)).compile().cost_analysis()["flops"]

    assert flops(narrow, after) < flops(case.make(*case.counts), state)


def test_layers_of_a_stack_lose_units_of_their_own(x64):
    case = CASES["scanned"]
    state, _ = trained("scanned")
    down = state.params["blocks"]["down"]["kernel"]
    params = flax.traverse_util.flatten_dict(state.params, sep="/")
    params["blocks/down/kernel"] = down.at[0, 1].set(0).at[1, 4].set(0)
    state = state.replace(params=flax.traverse_util.unflatten_dict(params, sep="/"))
    after = operate(case, state, Shrink(case.units, 4))
    up, old = after.params["blocks"]["up"]["kernel"], state.params["blocks"]["up"]["kernel"]
    np.testing.assert_array_equal(up[0], np.delete(old[0], 1, axis=1))
    np.testing.assert_array_equal(up[1], np.delete(old[1], 4, axis=1))
    np.testing.assert_allclose(output(case, case.make(4), after), output(case, case.make(5), state), rtol=1e-12)


def test_use_is_what_units_do_times_what_reads_them(x64):
    leaves = {"into": np.random.default_rng(0).normal(size=(3, 6)), "out": np.random.default_rng(1).normal(size=(6, 2))}
    done = np.random.default_rng(2).normal(size=(4, 6))
    group = Units("h", {"into": 1}, {"out": 0})
    by = {
        "norms": (None, np.linalg.norm(leaves["into"], axis=0) * np.linalg.norm(leaves["out"], axis=1)),
        "activity": (lambda state: {"h": jnp.asarray(done)}, np.abs(done).mean(0) * np.abs(leaves["out"]).sum(1)),
    }
    orders = []
    for activations, use in by.values():
        state = fsh.TrainState.create(apply_fn=None, params=jax.tree.map(jnp.asarray, leaves), tx=optax.sgd(0.1))
        after, record = fsh.operate(state, Shrink(group, 3, activations=activations))
        left = np.sort(np.argsort(-use)[:3])
        np.testing.assert_array_equal(after.params["into"], leaves["into"][:, left])
        lost = 1 - use[left].sum() / use.sum()
        np.testing.assert_allclose(float(record.figures["units/removed_use/h"]), lost, rtol=1e-5)
        orders.append(left.tolist())
    assert orders[0] != orders[1]


# In a loop.


def in_loop(case: Case, hooks: fsh.SurgeryHooks, state: State, steps: range, seen: list[State] | None = None) -> State:
    """Trains; the train step looks at what the state says of its model."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: jax.Array) -> State:
        def loss(params: Any) -> Any:
            out = state.apply_fn({"params": params}, batch)
            return jnp.mean((out - jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)) ** 2)

        return hooks.observe(state.apply_gradients(grads=jax.grad(loss)(state.params)))

    for at in steps:
        state = hooks(at, step(state, case.batch(at, np.float32)))
        if seen is not None:
            seen.append(jax.tree.map(np.array, state))
    return state


def growing(case: Case, ledger: Any = None) -> fsh.SurgeryHooks:
    """Grows at step 3, shrinks again at step 6, with an average of the weights."""
    hooks = fsh.SurgeryHooks(seed=1, ledger=ledger)
    wide, narrow = case.wider(), case.make(*case.counts)
    hooks.add("ema", Ema(0.5), params="**", when=fsh.at(1_000_000))
    hooks.add("widen", Widen(case.units, sought(case), split=0.6), params="**", when=fsh.at(3), apply_fn=wide.apply)
    counts = {one.activation: count for one, count in zip(case.units, case.counts, strict=True)}
    hooks.add("shrink", Shrink(case.units, counts), params="**", when=fsh.at(6), apply_fn=narrow.apply)
    return hooks


def test_a_run_that_grows_and_shrinks_goes_on_bit_for_bit_from_every_step(tmp_path):
    case = CASES["mlp"]

    def begun(hooks: fsh.SurgeryHooks) -> State:
        return hooks.init(make_state(case, case.variables(dtype=np.float32)))

    hooks = growing(case, tmp_path / "ledger.jsonl")
    state, seen = begun(hooks), []
    plan = hooks.plan(state, 8)
    with open_manager(tmp_path / "checkpoints") as manager:
        for at in range(1, 9):
            state = in_loop(case, hooks, state, range(at, at + 1), seen)
            fsh.checkpoint.save(manager, at, state, hooks)
    assert [one.params["Dense_0"]["kernel"].shape[1] for one in seen] == [6, 6, 10, 10, 10, 6, 6, 6]
    assert plan.rows[0].leaves[1].change == "Dense_0/kernel [4,6] -> [4,10]"
    # The average moves as the weights do: half way between what it was and what they were, each made wide.
    old, new = (one.surgery["memory"]["ema"]["Dense_0/kernel"]["average"] for one in seen[1:3])
    step = in_loop(case, growing(case), begun(growing(case)), range(1, 3))
    assert step.params["Dense_0"]["kernel"].shape == old.shape
    assert new.shape == (4, 10)
    np.testing.assert_array_equal(new[:, 6:], new[:, :4])
    for at in (2, 3, 6):
        hooks = growing(case)
        with open_manager(tmp_path / "checkpoints") as manager:
            restored = fsh.checkpoint.restore(manager, begun(hooks), hooks, step=at)
        restored = in_loop(case, hooks, restored, range(at + 1, 9))
        assert_bitwise_equal(restored.params, state.params)
        assert_bitwise_equal(restored.opt_state, state.opt_state)
        assert_bitwise_equal(restored.surgery["memory"], state.surgery["memory"])


def test_what_a_hook_meets_behind_a_growth_is_looked_at_in_the_first_call():
    case = CASES["mlp"]

    def hooks(to: int, growth: int = 3) -> fsh.SurgeryHooks:
        made, wide = fsh.SurgeryHooks(), case.wider()
        made.add("widen", Widen(case.units, sought(case)), params="**", when=fsh.at(growth), apply_fn=wide.apply)
        made.add("shrink", Shrink(case.units[:1], to), params="**", when=fsh.at(6), apply_fn=wide.apply)
        return made

    state = make_state(case, case.variables(dtype=np.float32))
    hooks(to=8)(0, state)  # of 10, not of the 6 that there are
    for to, growth, found in ((10, 3, "to=10 of 10 units"), (8, 7, "to=8 of 6 units")):
        with pytest.raises(UnitsError, match=f"no less than there is of 'a'. Found: {found}") as caught:
            hooks(to, growth)(0, state)
        assert caught.value.hook == "shrink"
        with pytest.raises(UnitsError, match=found):
            hooks(to, growth).plan(state, 8)


def test_growth_in_graph_is_an_error_that_says_where_it_belongs():
    case = CASES["mlp"]
    hooks = fsh.SurgeryHooks()
    hooks.add("widen", Widen(case.units, sought(case)), params="**", when=fsh.at(3))
    state = hooks.init(make_state(case, case.variables(dtype=np.float32)))
    with pytest.raises(
        StructureError, match="changes the shape of a leaf, and the hook brings nothing for that"
    ) as caught:
        jax.jit(hooks.in_graph)(state)
    assert caught.value.hook == "widen"
    assert "apply_fn= for the new shapes" in str(caught.value)


@pytest.mark.parametrize("placed", ["auto", "explicit"])
def test_new_leaves_lie_as_a_state_does_that_is_made_at_the_new_size(placed):
    mesh = mesh_of(placed)
    case = CASES["mlp"]._replace(counts=(8, 4), to=(16, 8))
    specs = {"Dense_0/kernel": (None, "data"), "Dense_0/bias": ("data",), "Dense_1/kernel": ("data", "tensor"),
             "Dense_1/bias": ("tensor",), "Dense_2/kernel": ("tensor", None)}  # fmt: skip

    def place(keys: Any, leaf: Any) -> Any:
        path = "/".join(key.key for key in keys[-2:] if hasattr(key, "key"))
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*specs.get(path, ()))))

    def spread(state: State) -> State:
        return jax.tree_util.tree_map_with_path(place, state)

    alone = make_state(case, case.variables(dtype=np.float32))
    surgery = Widen(case.units, sought(case))
    after, _ = fsh.operate(spread(alone), surgery)
    expected, _ = fsh.operate(alone, surgery)
    like = spread(make_state(case, case.variables(dtype=np.float32, model=case.wider())))
    for one, other, there in zip(*map(jax.tree.leaves, (after, expected, like)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert one.sharding.is_equivalent_to(there.sharding, one.ndim)


# Mistakes.


GROUP = Units("h", {"into": 1}, {"out": 0})
SMALL = fsh.TrainState.create(
    apply_fn=None, params={"into": jnp.ones((2, 4)), "out": jnp.ones((4, 1))}, tx=optax.sgd(0.1)
)
MISTAKES = {
    "to is no number": Mistake(
        lambda: Widen(GROUP, 0), SurgeryFunctionError, ("Widen(to=...) says how many", "0", "to=128")
    ),
    "to names another": Mistake(
        lambda: Shrink(GROUP, {"g": 2}),
        SurgeryFunctionError,
        ("name different activations", "g", "a number for each of h"),
    ),
    "by": Mistake(
        lambda: Widen(GROUP, 8, by="add"), SurgeryFunctionError, ("Widen(by=...) is unknown", "'add'", "'zero'")
    ),
    "mapping": Mistake(
        lambda: Widen(GROUP, 8, mapping="last"),
        SurgeryFunctionError,
        ("Widen(mapping=...) is unknown", "'round_robin'"),
    ),
    "split": Mistake(lambda: Widen(GROUP, 8, split=1.5), SurgeryFunctionError, ("Widen(split=...)", "1.5", "0.7")),
    "noise": Mistake(lambda: Widen(GROUP, 8, noise=-1), SurgeryFunctionError, ("Widen(noise=...)", "-1", "noise=0.01")),
    "zeros of nothing": Mistake(
        lambda: Widen(GROUP, 8, by="zero"), SurgeryFunctionError, ("Widen(init=...) draws", "init=None", "wide.init")
    ),
    "zeros that are split": Mistake(
        lambda: Widen(GROUP, 8, by="zero", split=0.7, init=lambda key: {}),
        SurgeryFunctionError,
        ("copies nothing", "split=0.7", 'by="copy"'),
    ),
    "no more": Mistake(
        lambda: fsh.operate(SMALL, Widen(GROUP, 4)),
        UnitsError,
        ("no more than there is of 'h'", "to=4 of 4 units", "to=8"),
    ),
    "no less": Mistake(
        lambda: fsh.operate(SMALL, Shrink(GROUP, 4)),
        UnitsError,
        ("Shrink(to=...) is no less", "to=4 of 4 units", "to=2"),
    ),
    "nothing merged": Mistake(
        lambda: fsh.operate(SMALL, MergeUnits(GROUP, 5)), UnitsError, ("MergeUnits(to=...) is no less", "or Widen")
    ),
    "no key": Mistake(
        lambda: fsh.operate(SMALL, Widen(GROUP, 8, noise=0.1)), InputError, ("Widen draws random numbers", "key=")
    ),
    "a draw of the old model": Mistake(
        lambda: fsh.operate(SMALL, Widen(GROUP, 8, by="zero", init=lambda key: SMALL.params), key=jax.random.key(0)),
        SurgeryFunctionError,
        ("Widen(init=...) returned a parameter of another shape", "[2, 4] for [2, 8]"),
        {"path": "into"},
    ),
    "activations": Mistake(
        lambda: Shrink(GROUP, 2, activations=3), SurgeryFunctionError, ("Shrink(activations=...)", "3", "by norms")
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    MISTAKES[name].check()


def test_configs_name_them():
    """Units come as an object; what is a number or a choice is open to overrides."""
    config = ml_collections.ConfigDict()
    config.wide = fsh.config.hook("widen", params="**", to=10, at=(1,), split=0.7)
    config.narrow = fsh.config.hook("shrink", params="**", to=5, at=(2,))
    config.merge = fsh.config.hook("merge_units", params="**", to=3, at=(3,))
    case = CASES["mlp"]
    hooks = fsh.SurgeryHooks.from_config(config, objects={"units": case.units[:1]})
    assert hooks.hparams()["surgery/wide/surgery.split"] == 0.7
    assert set(hooks.names) == {"wide", "narrow", "merge"}
