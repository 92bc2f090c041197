"""Fires on layers of stacked leaves, against the same surgery on an unstacked copy of the state, sliced by NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import RefusedError, SelectionError, SlotError
from flax_surgery_hooks.optax import adam_per_element
from flax_surgery_hooks.surgeries import Noise, Normalize, ResetMoments, Scale
from flax_surgery_hooks.surgery import path_hash

LAYERS, COLUMNS, ROWS, LENGTH = 4, 5, 6, 7
"""All different, so that the stacked axis of a slot is found by its size."""
CHOSEN = (1, 3)
PATTERN = "layers/*[1::2]"


def masked(leaf):
    return jnp.where(jnp.arange(leaf.shape[-1]) < 2, 0 * leaf, leaf)


SURGERIES = {
    "scale": (Scale(0.5), {"opt_state": "transport"}),
    "mask": (masked, {"opt_state": "carry"}),
    "normalize": (Normalize(), {}),
    "reset": (lambda leaf: leaf + 1, {"opt_state": "reset"}),
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=ROWS, momentum=0.9),
    "adafactor without factors": optax.adafactor(0.1),
    "accumulating": optax.MultiSteps(optax.adam(0.1), 2),
    "masked": optax.masked(optax.adam(0.1), {"layers": {"bias": False, "kernel": True}, "head": True}),
    "lbfgs": optax.scale_by_lbfgs(memory_size=2),
    "counts per element": adam_per_element(0.1),
}


def make_params(dtype: Any = np.float64) -> Any:
    random = np.random.default_rng(0)
    shapes = {"layers": {"bias": (LAYERS, COLUMNS), "kernel": (LAYERS, ROWS, LENGTH)}, "head": (COLUMNS, 2)}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def make_state(tx: Any, steps: int = 3, params: Any = None) -> Any:
    params = make_params() if params is None else params
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)
    for i in range(steps):
        angles = jax.tree.map(lambda leaf, i=i: (i + 2) * leaf, state.params)
        state = state.apply_gradients(grads=jax.tree.map(lambda angle: jnp.sin(angle) + 0.1, angles))
    return state


def axis_between(stacked: Any, layer: Any) -> int | None:
    """Where the stacked array has an axis more than that of one layer."""
    if np.shape(stacked) == np.shape(layer):
        return None
    return next(i for i in range(np.ndim(stacked)) if np.delete(np.shape(stacked), i).tolist() == list(layer.shape))


def unstacked(state: Any, index: int, slots_of: int) -> Any:
    """The state of one layer, as that of a model without stacking; slots may be taken of another, for a wrong one."""
    params = {**state.params, "layers": jax.tree.map(lambda leaf: leaf[index], state.params["layers"])}
    alone = jax.eval_shape(state.tx.init, params)
    axes = jax.tree.map(lambda a, b: -1 if axis_between(a, b) is None else axis_between(a, b), state.opt_state, alone)
    opt_state = jax.tree.map(
        lambda leaf, axis: leaf if axis < 0 else jnp.asarray(np.take(np.asarray(leaf), slots_of, axis)),
        state.opt_state,
        axes,
    )
    return state.replace(params=params, opt_state=opt_state), axes


def expected(state: Any, name: str, wrong: bool = False) -> Any:
    """Layer by layer on its own, put back by NumPy."""
    surgery, options = SURGERIES[name]
    params, opt_state = (jax.tree.map(lambda x: np.array(x), tree) for tree in (state.params, state.opt_state))
    for index in CHOSEN:
        alone, axes = unstacked(state, index, index - 1 if wrong else index)
        after, _ = fsh.operate(alone, surgery, params="layers/*", **options)
        for key, leaf in after.params["layers"].items():
            params["layers"][key][index] = leaf
        for leaf, new, axis in zip(*map(jax.tree.leaves, (opt_state, after.opt_state, axes)), strict=True):
            part = leaf if axis < 0 else np.moveaxis(leaf, axis, 0)[index]
            part[...] = new
    return params, opt_state


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def close(a: Any, b: Any) -> bool:
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return all(np.allclose(x, y, rtol=1e-12, atol=1e-14) for x, y in pairs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("optimizer", "surgery"),
    [(o, s) for o in OPTIMIZERS for s in SURGERIES if s in ("scale", "mask") or o in ("adam", "adafactor")],
)
def test_a_layer_is_edited_as_if_it_were_a_leaf_of_its_own(optimizer, surgery):
    state = make_state(OPTIMIZERS[optimizer])
    function, options = SURGERIES[surgery]
    after, record = fsh.operate(state, function, params=PATTERN, **options)
    right, wrong = expected(state, surgery), expected(state, surgery, wrong=True)
    assert close((after.params, after.opt_state), right)
    if surgery != "reset":  # which makes slots that do not depend on the old ones
        assert not close(after.opt_state, wrong[1])
    assert record.paths == tuple(f"layers/{name}[{index}]" for name in ("bias", "kernel") for index in CHOSEN)
    assert [shape for shape, _ in record.leaves] == [(COLUMNS,)] * 2 + [(ROWS, LENGTH)] * 2
    # What was not selected keeps its bits.
    untouched = [i for i in range(LAYERS) if i not in CHOSEN]
    for name, leaf in after.params["layers"].items():
        assert same(leaf[np.array(untouched)], state.params["layers"][name][np.array(untouched)])
    assert after.params["head"] is state.params["head"]
    _, axes = unstacked(state, 0, 0)
    for old, new, axis in zip(*map(jax.tree.leaves, (state.opt_state, after.opt_state, axes)), strict=True):
        if axis >= 0:
            assert same(*(np.take(np.asarray(leaf), untouched, axis) for leaf in (old, new)))


@pytest.mark.usefixtures("x64")
def test_a_norm_and_a_mean_are_of_one_layer():
    """The control beside: on the whole leaf both are of all layers."""
    state = make_state(OPTIMIZERS["adam"])
    after, _ = fsh.operate(state, Normalize(), params="layers/kernel[1]")
    assert np.linalg.norm(after.params["layers"]["kernel"][1]) == pytest.approx(1, rel=1e-12)
    whole, _ = fsh.operate(state, Normalize(), params="layers/kernel")
    assert np.linalg.norm(whole.params["layers"]["kernel"][1]) < 0.9
    start = state.opt_state[0].nu["layers"]["kernel"]
    scaled = state.replace(opt_state=jax.tree.map(lambda x: x, state.opt_state))
    huge = start.at[0].mul(1e6)
    adam = scaled.opt_state[0]
    adam = adam._replace(nu={**adam.nu, "layers": {**adam.nu["layers"], "kernel": huge}})
    scaled = scaled.replace(opt_state=(adam, *scaled.opt_state[1:]))

    def forget(leaf):  # every element of the last columns is new: the leaf's mean is taken
        return jnp.concatenate([leaf[..., :-1], jnp.zeros_like(leaf[..., -1:])], axis=-1)

    fresh = fsh.operate(scaled, forget, params="layers/kernel[1]")[0].opt_state[0].nu["layers"]["kernel"]
    crossing = fsh.operate(scaled, forget, params="layers/kernel")[0].opt_state[0].nu["layers"]["kernel"]
    assert fresh[1, :, -1].max() <= start[1].max()
    np.testing.assert_array_equal(fresh[0], huge[0])
    assert crossing[0, :, -1].max() > start[1].max() * 1e3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_the_layers_of_one_vector_of_all_parameters(inner):
    plain, flat = make_state(OPTIMIZERS[inner]), make_state(optax.flatten(OPTIMIZERS[inner]))
    for name, (surgery, options) in SURGERIES.items():
        one, _ = fsh.operate(plain, surgery, params=PATTERN, **options)
        other, _ = fsh.operate(flat, surgery, params=PATTERN, **options)
        assert close(one.params, other.params), name
        field = "mu" if inner == "adam" else "trace"
        tree = getattr(one.opt_state[0], field)
        vector = getattr(other.opt_state[0], field)
        np.testing.assert_allclose(vector, np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]), rtol=1e-12)


SHARED = {
    "adafactor over layers": (optax.adafactor(0.1, min_dim_size_to_factor=4), "layers/bias[0]", "grad_sq"),
    "novograd": (optax.novograd(0.1), "layers/kernel[0]", "grad_sq"),
    "sm3": (optax.sm3(0.1), "layers/kernel[0]", "grad_sq"),
}


@pytest.mark.parametrize("name", SHARED)
def test_slots_that_layers_share_are_refused_or_kept(name):
    tx, pattern, kind = SHARED[name]
    state = make_state(tx, params=make_params(np.float32))
    path = pattern.replace("[0]", "")
    with pytest.raises(SlotError, match="shared by all layers") as caught:
        fsh.operate(state, Scale(0.5), params=pattern, opt_state="transport")
    error = caught.value
    assert error.path == pattern
    assert "for a leaf shaped [4, " in error.found
    assert f'opt_state={{"{kind}": "keep"}}, or the whole leaf' in error.write
    assert "State." in error.problem
    after, _ = fsh.operate(state, Scale(0.5), params=pattern, opt_state={kind: "keep"})
    leaf, old = (one.params["layers"][path.split("/")[1]] for one in (after, state))
    np.testing.assert_array_equal(leaf, old.at[0].mul(0.5))
    kept = [jax.tree.leaves(one.opt_state) for one in (after, state)]
    changed = [np.shape(a) for a, b in zip(*kept, strict=True) if not np.array_equal(a, b)]
    assert all(shape[0] == LAYERS for shape in changed)  # momentum, which has layers
    assert same(fsh.operate(state, Scale(0.5), params=pattern, opt_state="keep")[0].opt_state, state.opt_state)
    whole, _ = fsh.operate(state, Scale(0.5), params=path, opt_state="transport")
    assert not same(whole.opt_state, state.opt_state)


def test_every_layer_draws_by_its_own_path():
    state = make_state(OPTIMIZERS["sgd"], params=make_params(np.float32))
    key = jax.random.key(7)

    def draw(leaf, key, path):
        drawn.append(path)
        return leaf + jax.random.normal(key, leaf.shape)

    drawn: list[str] = []
    after, _ = fsh.operate(state, draw, params="layers/kernel[:2]", key=key)
    assert set(drawn) == {"layers/kernel[0]", "layers/kernel[1]"}
    for index in (0, 1):
        own = jax.random.fold_in(key, path_hash(f"layers/kernel[{index}]"))
        expected = state.params["layers"]["kernel"][index] + jax.random.normal(own, (ROWS, LENGTH))
        np.testing.assert_allclose(after.params["layers"]["kernel"][index], expected, rtol=1e-6)


def test_the_form_that_takes_all_leaves_gets_layers_by_path():
    state = make_state(OPTIMIZERS["adam"], params=make_params(np.float32))

    def swap(leaves):
        assert {path: leaf.shape for path, leaf in leaves.items()} == {
            "head": (COLUMNS, 2), "layers/kernel[0]": (ROWS, LENGTH), "layers/kernel[2]": (ROWS, LENGTH)
        }  # fmt: skip
        first, second = leaves["layers/kernel[0]"], leaves["layers/kernel[2]"]
        return {**leaves, "layers/kernel[0]": second, "layers/kernel[2]": first}

    after, record = fsh.operate(state, swap, params=["layers/kernel[0:3:2]", "head"], opt_state="transport")
    order = np.array([2, 1, 0, 3])
    np.testing.assert_array_equal(after.params["layers"]["kernel"], state.params["layers"]["kernel"][order])
    for field in ("mu", "nu"):
        old, new = (getattr(one.opt_state[0], field)["layers"]["kernel"] for one in (state, after))
        np.testing.assert_array_equal(new, old[order])
    assert record.paths == ("head", "layers/kernel[0]", "layers/kernel[2]")


def test_moments_of_one_layer_are_reset():
    state = make_state(OPTIMIZERS["adam"], params=make_params(np.float32))
    after, _ = fsh.operate(state, ResetMoments(), params="layers/kernel[2]")
    old, new = state.opt_state[0].mu["layers"]["kernel"], after.opt_state[0].mu["layers"]["kernel"]
    np.testing.assert_array_equal(new, old.at[2].set(0))


def test_surgeries_of_the_optimizer_take_whole_leaves():
    state = make_state(fsh.optax.freezable(optax.adam(0.1)), params=make_params(np.float32))
    with pytest.raises(SelectionError, match="Only whole leaves"):
        fsh.operate(state, fsh.surgeries.Freeze(), params="layers/kernel[0]")


def test_under_jit_and_on_abstract_states():
    state = make_state(OPTIMIZERS["adam"], params=make_params(np.float32))

    def edit(state):
        return fsh.operate(state, masked, params=PATTERN)[0]

    eager, jitted, abstract = edit(state), jax.jit(edit)(state), jax.eval_shape(edit, state)
    np.testing.assert_allclose(*(one.opt_state[0].nu["layers"]["kernel"] for one in (eager, jitted)), rtol=1e-6)
    assert same(eager.params, jitted.params)
    assert [leaf.shape for leaf in jax.tree.leaves(abstract)] == [np.shape(leaf) for leaf in jax.tree.leaves(state)]


def test_a_refusal_keeps_all_old_values():
    state = make_state(OPTIMIZERS["adam"], params=make_params(np.float32))
    with pytest.raises(RefusedError):
        fsh.operate(state, lambda leaf: leaf / 0, params="layers/kernel[1]")
    hooks = fsh.SurgeryHooks(on_error="skip")
    hooks.add("a", lambda leaf: leaf / 0, params="layers/kernel[1]", when=fsh.at(4))
    after = hooks(4, state.replace(step=4))
    hooks.flush()
    assert [record.event for record in hooks.ledger.records] == ["run", "fired", "refused"]
    assert same((after.params, after.opt_state), (state.params, state.opt_state))


def test_noise_is_an_edit_of_a_layer_too():
    state = make_state(OPTIMIZERS["sgd"], params=make_params(np.float32))
    after, _ = fsh.operate(state, Noise(0.1), params="layers/kernel[-1]", key=jax.random.key(0))
    changed = np.any(np.asarray(after.params["layers"]["kernel"] != state.params["layers"]["kernel"]), axis=(1, 2))
    assert changed.tolist() == [False, False, False, True]
