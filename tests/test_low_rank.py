"""LoRA factors merged and started anew, and kernels replaced by factors, against NumPy and gradients at new params."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import InputError, SurgeryFunctionError
from flax_surgery_hooks.surgeries import Factorize, MergeLora, ReLoRA, Rewarm

SCALE = 0.5
BATCH = np.random.default_rng(0).normal(size=(7, 6))
AIMS = np.random.default_rng(1).normal(size=(7, 4))


def factors(inputs=(6,), rank=2, outputs=(4,), layers=(), dtype=None) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    shapes = {
        "kernel": (*layers, *inputs, *outputs), "lora_a": (*layers, *inputs, rank), "lora_b": (*layers, rank, *outputs),
    }  # fmt: skip
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def model(params: Any, batch: Any) -> Any:
    layer = params["dense"]
    return batch @ layer["kernel"] + SCALE * (batch @ layer["lora_a"]) @ layer["lora_b"]


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(model(params, batch)) - AIMS) ** 2)


def trained(tx: Any, params: Any = None, steps: int = 4) -> Any:
    """A state some steps on, and the params before each of them."""
    params = {"dense": factors()} if params is None else params
    state, seen = fsh.TrainState.create(apply_fn=None, params=params, tx=tx), []
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params, BATCH)))
    for _ in range(steps):
        seen.append(state.params)
        state = step(state)
    return state, seen


def merged_by_hand(params: Any) -> Any:
    layer = {name: np.asarray(leaf) for name, leaf in params["dense"].items()}
    kernel = layer["kernel"] + SCALE * layer["lora_a"] @ layer["lora_b"]
    return {"dense": {"kernel": kernel, "lora_a": layer["lora_a"], "lora_b": np.zeros_like(layer["lora_b"])}}


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> bool:
    return all(
        np.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def test_a_merge_is_numpys_and_the_model_computes_the_same(x64):
    state, _ = trained(optax.adam(0.1))
    new, record = fsh.operate(state, MergeLora(SCALE))
    assert close(new.params, merged_by_hand(state.params))
    assert close(model(new.params, BATCH), model(state.params, BATCH))
    wrong, _ = fsh.operate(state, MergeLora(2 * SCALE))
    assert not close(model(wrong.params, BATCH), model(state.params, BATCH), 1e-3)
    added = SCALE * np.asarray(state.params["dense"]["lora_a"]) @ np.asarray(state.params["dense"]["lora_b"])
    size = np.linalg.norm(added) / np.linalg.norm(state.params["dense"]["kernel"])
    assert record.figures["lora/relative_size"] == pytest.approx(size, rel=1e-6)


def test_moments_are_those_of_a_run_mapped_through_the_merge(x64):
    """Every recorded step is merged, its gradients are taken there, and Adam's averages are built from them."""
    state, seen = trained(optax.adam(0.1))
    mu = nu = jax.tree.map(np.zeros_like, state.params)
    for params in seen:
        grad = jax.grad(loss)(jax.tree.map(jnp.asarray, merged_by_hand(params)), BATCH)
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grad)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, nu, grad)
    new, _ = fsh.operate(state, MergeLora(SCALE))
    adam = new.opt_state[0]
    assert close(adam.mu, mu)
    assert close(
        [adam.nu["dense"][name] for name in ("kernel", "lora_b")], [nu["dense"]["kernel"], nu["dense"]["lora_b"]]
    )
    assert not close(state.opt_state[0].mu, mu)  # as they were: those of A are those of another B


def test_only_first_moments_of_a_start_anew():
    state, _ = trained(optax.adam(0.1))
    new, _ = fsh.operate(state, MergeLora(SCALE))
    old, adam = state.opt_state[0], new.opt_state[0]
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), (old.mu["dense"], old.nu["dense"]), (adam.mu["dense"], adam.nu["dense"])
    )
    assert changed == ({"kernel": False, "lora_a": True, "lora_b": False}, dict.fromkeys(old.mu["dense"], False))
    assert not adam.mu["dense"]["lora_a"].any()
    assert adam.count == old.count


def test_copies_of_the_parameters_move_with_them():
    state, _ = trained(optax.contrib.schedule_free_sgd(0.1))
    new, _ = fsh.operate(state, MergeLora(SCALE))
    z, old = new.opt_state.z["dense"], state.opt_state.z["dense"]
    moved = new.params["dense"]["kernel"] - state.params["dense"]["kernel"]
    np.testing.assert_allclose(z["kernel"], old["kernel"] + moved, rtol=1e-6)
    np.testing.assert_array_equal(z["lora_a"], new.params["dense"]["lora_a"])
    assert not z["lora_b"].any()


def test_an_optimizer_without_slots_will_do():
    state, _ = trained(optax.sgd(0.1))
    new, _ = fsh.operate(state, MergeLora(SCALE))
    assert close(new.params, merged_by_hand(state.params), 1e-5)


LAYOUTS = {
    "stack": {"layers": (3,)},
    "many_axes": {"inputs": (2, 3), "outputs": (2, 2)},
    "stack_of_many_axes": {"layers": (2,), "inputs": (2, 3), "outputs": (5,), "rank": 3},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_factors(name, x64):
    leaves = factors(**LAYOUTS[name])
    stacked, a, b = "stack" in name, leaves["lora_a"], leaves["lora_b"]
    by_layer = [np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)] if stacked else np.tensordot(a, b, 1)
    state = fsh.TrainState.create(apply_fn=None, params={"layers": leaves}, tx=optax.sgd(0.1))
    new, _ = fsh.operate(state, MergeLora(SCALE, redraw=True), key=jax.random.key(0))
    np.testing.assert_allclose(
        new.params["layers"]["kernel"], leaves["kernel"] + SCALE * np.asarray(by_layer), rtol=1e-12
    )
    drawn, inputs = new.params["layers"]["lora_a"], 6
    assert 0.5 / np.sqrt(inputs) < np.abs(drawn).max() <= 1 / np.sqrt(inputs)
    assert drawn.std() == pytest.approx(1 / np.sqrt(3 * inputs), rel=0.35)


def test_one_layer_of_a_stack_and_names_in_other_folders(x64):
    leaves = factors(layers=(3,))
    params = {
        "dense": {"w": leaves["kernel"], "lora": {"a": leaves["lora_a"], "b": leaves["lora_b"]}},
        "bias": jnp.ones(4),
    }
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    merge = MergeLora(SCALE, a="lora/a", b="lora/b", kernel="w")
    new, _ = fsh.operate(state, merge, params=["dense/**[1]"])
    expected = np.array(leaves["kernel"])
    expected[1] += SCALE * np.asarray(leaves["lora_a"][1] @ leaves["lora_b"][1])
    np.testing.assert_allclose(new.params["dense"]["w"], expected, rtol=1e-12)
    assert new.params["dense"]["lora"]["b"].any(axis=(1, 2)).tolist() == [True, False, True]
    whole, _ = fsh.operate(state, merge)
    assert not whole.params["dense"]["lora"]["b"].any()
    np.testing.assert_array_equal(whole.params["bias"], params["bias"])


def test_a_bfloat16_kernel_is_merged_in_float32():
    leaves = {name: leaf.astype(jnp.bfloat16) for name, leaf in factors(dtype=jnp.float32).items()}
    state = fsh.TrainState.create(apply_fn=None, params=leaves, tx=optax.sgd(0.1))
    new, _ = fsh.operate(state, MergeLora(SCALE))
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    expected = jnp.asarray(wide["kernel"] + SCALE * wide["lora_a"] @ wide["lora_b"], jnp.bfloat16)
    np.testing.assert_array_equal(new.params["kernel"], expected)
    assert (leaves["kernel"] + leaves["lora_a"] @ leaves["lora_b"] * SCALE != expected).any()


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_relora_forgets_moments_by_one_mask(by):
    state, _ = trained(optax.adam(0.1))
    new, _ = fsh.operate(state, ReLoRA(SCALE, fraction=0.75, by=by), key=jax.random.key(0))
    old, adam = state.opt_state[0], new.opt_state[0]
    for name in ("lora_a", "lora_b"):
        mu, nu, before = adam.mu["dense"][name], adam.nu["dense"][name], old.mu["dense"][name]
        np.testing.assert_array_equal(mu == 0, nu == 0)
        assert (mu == 0).sum() == round(0.75 * mu.size)
        np.testing.assert_array_equal(mu[mu != 0], before[mu != 0])
        if by == "magnitude":
            assert np.abs(before[mu == 0]).max() <= np.abs(before[mu != 0]).min()
    np.testing.assert_array_equal(adam.mu["dense"]["kernel"], old.mu["dense"]["kernel"])


@pytest.mark.parametrize("name", ["adafactor", "rmsprop"])
def test_relora_forgets_all_where_slots_have_other_shapes(name):
    state, _ = trained(
        getattr(optax, name)(0.1, min_dim_size_to_factor=2) if name == "adafactor" else optax.rmsprop(0.1)
    )
    new, _ = fsh.operate(state, ReLoRA(SCALE, fraction=1), key=jax.random.key(0))
    fresh = state.tx.init(new.params)
    of_b = [
        (a, b)
        for (path, a), b in zip(jax.tree.leaves_with_path(new.opt_state), jax.tree.leaves(fresh), strict=True)
        if "lora_b" in jax.tree_util.keystr(path)
    ]
    assert of_b
    assert close(*zip(*of_b, strict=True))


def test_ranks_add_up_over_merges_and_b_learns_at_once():
    """The learning rate warms up again at each merge; the sum of what is added has a rank that no single one has."""
    params = {"dense": {**factors(rank=1), "lora_b": jnp.zeros((1, 4))}}
    frozen = {"dense": {"kernel": "frozen", "lora_a": "trained", "lora_b": "trained"}}
    adam = optax.chain(optax.adam(0.05), fsh.optax.rewarm(4))
    tx = optax.multi_transform({"trained": adam, "frozen": optax.set_to_zero()}, frozen)
    hooks = fsh.SurgeryHooks()
    hooks.add("merge", ReLoRA(SCALE), params="dense/*", when=fsh.every(10))
    hooks.add("rewarm", Rewarm(), params="dense/lora_?", when=fsh.every(10))
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params, BATCH)))
    ranks = []
    for at in range(1, 31):
        state = hooks(at, step(state))
        if at % 10 == 0:
            added = state.params["dense"]["kernel"] - params["dense"]["kernel"]
            ranks.append(int(np.linalg.matrix_rank(added, tol=1e-4)))
            grad = jax.grad(loss)(state.params, BATCH)["dense"]
            assert np.abs(grad["lora_b"]).min() > 0 == np.abs(grad["lora_a"]).max()
    assert ranks == [1, 2, 3]


def hooked(surgery: Any, state: Any, *, inside: bool) -> Any:
    hooks = fsh.SurgeryHooks(seed=3)
    hooks.add("edit", surgery, params="**", when=fsh.at(2))
    if not inside:
        return hooks(2, state.replace(step=2))
    return jax.jit(lambda state: hooks.in_graph(state))(hooks.init(state.replace(step=jnp.int32(2))))


@pytest.mark.parametrize(
    "surgery", [MergeLora(SCALE), ReLoRA(SCALE, fraction=0.5), Factorize(2)], ids=lambda s: type(s).__name__
)
def test_fires_in_graph_and_on_eight_devices_are_those_of_the_host(surgery):
    params = {"dense": factors((16,), 4, (8,), dtype=jnp.float32)}
    if isinstance(surgery, Factorize):
        params = {"dense": {"kernel": params["dense"]["kernel"]}}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    state = state.apply_gradients(grads=jax.tree.map(jnp.sin, params))
    host, inside = (hooked(surgery, state, inside=inside) for inside in (False, True))
    assert close((host.params, host.opt_state), (inside.params, inside.opt_state), 1e-6)
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    place = NamedSharding(mesh, P("x", "y"))
    spread = jax.tree.map(
        lambda leaf: jax.device_put(leaf, place) if jnp.ndim(leaf) == 2 and leaf.shape[0] % 4 == 0 else leaf, state
    )
    sharded = hooked(surgery, spread, inside=False)
    assert close((host.params, host.opt_state), (sharded.params, sharded.opt_state), 1e-5)
    assert sharded.params["dense"]["kernel"].sharding == place


def truncated(kernel: np.ndarray, rank: int) -> np.ndarray:
    left, sizes, right = np.linalg.svd(kernel, full_matrices=False)
    return left[:, :rank] * sizes[:rank] @ right[:rank]


def test_a_kernel_is_truncated_in_its_place(x64):
    state, _ = trained(optax.adam(0.1))
    new, record = fsh.operate(state, Factorize(2), params="dense/kernel")
    kernel = np.asarray(state.params["dense"]["kernel"])
    np.testing.assert_allclose(new.params["dense"]["kernel"], truncated(kernel, 2), atol=1e-12)
    for name in ("mu", "nu"):
        np.testing.assert_array_equal(*(getattr(s.opt_state[0], name)["dense"]["kernel"] for s in (new, state)))
    sizes = np.linalg.svd(kernel, compute_uv=False) ** 2
    assert record.figures["factorize/energy"] == pytest.approx(sizes[:2].sum() / sizes.sum(), rel=1e-6)


def test_layers_of_a_stack_are_truncated_each(x64):
    kernel = factors(layers=(3,), inputs=(2, 3))["kernel"]
    state = fsh.TrainState.create(apply_fn=None, params={"w": kernel}, tx=optax.sgd(0.1))
    new, _ = fsh.operate(state, Factorize(1, layers=1))
    expected = [truncated(layer, 1) for layer in np.asarray(kernel).reshape(3, 6, 4)]
    np.testing.assert_allclose(new.params["w"].reshape(3, 6, 4), expected, atol=1e-12)


def test_factors_take_the_place_of_a_kernel(x64):
    state, _ = trained(optax.adam(0.1), {"dense": factors(), "head": {"kernel": jnp.ones((2, 2))}})
    hooks = fsh.SurgeryHooks()
    hooks.add("factorize", Factorize(4, into=("a", "b")), params="dense/kernel", when=fsh.at(4), apply_fn=len)
    new = hooks(4, state)
    dense = new.params["dense"]
    assert sorted(dense) == ["a", "b", "lora_a", "lora_b"]
    assert (dense["a"].shape, dense["b"].shape) == ((6, 4), (4, 4))
    np.testing.assert_allclose(dense["a"] @ dense["b"], state.params["dense"]["kernel"], atol=1e-12)
    np.testing.assert_allclose((dense["a"] ** 2).sum(0), (dense["b"] ** 2).sum(1), rtol=1e-12)
    assert not new.opt_state[0].mu["dense"]["a"].any()
    np.testing.assert_array_equal(new.opt_state[0].mu["dense"]["lora_a"], state.opt_state[0].mu["dense"]["lora_a"])


def merging(surgery: Any = None, **leaves: Any) -> Any:
    surgery = MergeLora(SCALE) if surgery is None else surgery
    params = {"dense": {**factors(dtype=jnp.float32), **leaves}}
    params = {"dense": {name: leaf for name, leaf in params["dense"].items() if leaf is not None}}
    return lambda: fsh.operate(fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1)), surgery)


ERRORS = {
    "scale": (lambda: MergeLora("2"), ("MergeLora(scale=...) must be a finite number", "'2'", "alpha / rank")),
    "initializer": (lambda: MergeLora(1.0, initializer=jax.nn.initializers.ones),
                    ("redraw=False keeps it", "redraw=True")),
    "redraw": (lambda: ReLoRA(1.0, redraw=False), ("ReLoRA draws A anew", "MergeLora(scale=...)")),
    "fraction": (lambda: ReLoRA(1.0, fraction=2), ("fraction=...) is a number from 0 to 1",)),
    "no_factors": (merging(MergeLora(1.0, a="x", b="y")), ("finds no factors", "dense/kernel", 'a="lora_a"')),
    "no_kernel": (merging(kernel=None), ("path 'dense/lora_b'", "without kernel")),
    "no_b": (merging(lora_b=None), ("without lora_b",)),
    "no_fit": (merging(lora_b=jnp.ones((3, 4))), ("path 'dense/kernel'", "[6, 2] times [3, 4] for [6, 4]")),
    "vector": (merging(kernel=jnp.ones(4)), ("do not fit the kernel",)),
    "rank": (lambda: Factorize(0), ("Factorize(rank=...) is a Python int of at least 1", "0")),
    "layers": (lambda: Factorize(1, layers=True), ("Factorize(layers=...)", "True")),
    "into": (lambda: Factorize(1, into=("a", "a")), ("names of the two factors", 'into=("a", "b")')),
    "too_large": (merging(Factorize(3)), ("matrices of at least that rank", "[6, 2]", "a smaller rank")),
    "bias": (merging(Factorize(1), bias=jnp.ones(4)), ("path 'dense/bias'", "shape [4]")),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_and_where(name):
    run, says = ERRORS[name]
    with pytest.raises(SurgeryFunctionError) as caught:
        run()
    assert [part for part in says if part not in str(caught.value)] == [], str(caught.value)


def test_what_is_drawn_anew_needs_a_key():
    state, _ = trained(optax.sgd(0.1), steps=1)
    with pytest.raises(InputError, match=r"ReLoRA draws random numbers.*key=jax.random.key\(0\)"):
        fsh.operate(state, ReLoRA(SCALE))


def test_configs_name_them():
    hook = fsh.config.hook("re_lora", scale=0.5, params="**", every=100)
    assert (hook.fraction, hook.by) == (ReLoRA(0.5).fraction, "random")
    assert fsh.config.hook("merge_lora", scale=0.5, params="**", at=(1,)).redraw is False
    assert fsh.config.hook("factorize", rank=2, params="w", at=(1,)).layers == 0
