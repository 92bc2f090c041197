"""The language model's network, state, train step and evaluation, on eight devices."""

from __future__ import annotations

import importlib
import pathlib
import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
lm_model: Any = importlib.import_module("lm_model")
lm_train: Any = importlib.import_module("lm_train")
sys.path.remove(str(ROOT / "examples"))

GET_CONFIG = runpy.run_path(str(ROOT / "configs" / "lm.py"))["get_config"]
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
LENGTH = 16


def make_config(mesh: dict[str, int] = MESH, model: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The tiny config, smaller still, without hooks."""
    config = GET_CONFIG("tiny")
    config.model.update(length=LENGTH, width=16, mlp=32, **(model or {}))
    config.update(mesh=mesh, surgery={}, **changes)
    return config


def windows_at(step: int, count: int = 8) -> np.ndarray:
    """Windows that are easy to learn: each counts up by a number of its own."""
    rng = np.random.default_rng(step)
    first, stride = rng.integers(64, size=(count, 1)), rng.integers(1, 4, size=(count, 1))
    return ((first + stride * np.arange(LENGTH + 1)) % 64).astype(np.int32)


class Run:
    """A train state and the functions that go with it."""

    def __init__(self, config: Any, hooks: fsh.SurgeryHooks | None = None):
        self.partitioning = lm_train.make_partitioning(config)
        self.hooks = fsh.SurgeryHooks() if hooks is None else hooks
        self.state = self.hooks.init(lm_train.create_state(config, self.partitioning))
        self.step = lm_train.make_train_step(self.state, self.hooks, self.partitioning)
        self.evaluate = lm_train.make_evaluate(self.state, self.partitioning, 8)
        self.parts = lm_train.microbatches(config)
        self.sharding = lm_train.batch_sharding(self.partitioning)

    def train(self, steps: int, count: int = 8) -> list[float]:
        """Losses of some steps."""
        losses = []
        for step in range(steps):
            batch = windows_at(step, count).reshape(self.parts, -1, LENGTH + 1)
            self.state, metrics = self.step(self.state, jax.device_put(batch, self.sharding))
            losses.append(float(metrics["loss"]))
            self.state = self.hooks(step + 1, self.state, metrics=metrics)
        return losses


def values_of(state: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(state)]


def assert_close(found: Any, expected: Any, atol: float = 2e-5) -> None:
    for a, b in zip(values_of(found), values_of(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def logits_of(run: Run, params: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(run.state.apply_fn)({"params": params}, tokens))


@pytest.fixture(scope="module")
def trained() -> tuple[Run, list[float]]:
    """Twenty-four steps of the scanned model."""
    run = Run(make_config(learning_rate=1e-2))
    return run, run.train(24)


def test_every_leaf_lies_where_its_axes_say(trained):
    run, _ = trained
    block = run.state.params["blocks"]
    assert block["attention"]["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert block["attention"]["out"]["kernel"].sharding.spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert block["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert block["mlp"]["down"]["kernel"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert run.state.params["embed"]["embedding"].sharding.spec == PartitionSpec("tensor", None)
    assert block["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 8, 16)
    adam = run.state.opt_state[1][0]
    for slot in (adam.mu, adam.nu):
        assert lm_train.shardings_of(slot) == lm_train.shardings_of(run.state.params)


def test_the_model_learns_and_the_step_is_compiled_once(trained):
    run, losses = trained
    assert losses[0] == pytest.approx(8, abs=1)  # 256 bytes
    assert losses[-1] < losses[0] - 2
    assert run.step._cache_size() == 1


def test_the_loss_is_the_cross_entropy_in_bits(trained):
    run, _ = trained
    windows = windows_at(99, 11)  # no multiple of what is evaluated at a time
    logits = logits_of(run, run.state.params, windows[:, :-1]).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0].mean(-1) / np.log(2)
    np.testing.assert_allclose(run.evaluate(run.state, windows), expected, rtol=1e-5)


def test_no_byte_sees_a_later_one(trained):
    run, _ = trained
    tokens = windows_at(5)[:, :-1]
    changed = tokens.copy()
    changed[:, 10:] = 200
    before, after = (logits_of(run, run.state.params, x) for x in (tokens, changed))
    np.testing.assert_allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert (np.abs(before[:, 10:] - after[:, 10:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("mesh", [{"data": -1, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 8, "tensor": 1}])
def test_every_mesh_trains_alike(trained, mesh):
    _, losses = trained
    run = Run(make_config(mesh, learning_rate=1e-2))
    np.testing.assert_allclose(run.train(4), losses[:4], rtol=1e-5)


def test_scanned_and_unscanned_layers_are_the_same_function(trained):
    scanned, _ = trained
    plain = Run(make_config(model={"scan_layers": False}))
    assert sum(x.size for x in values_of(plain.state.params)) == sum(x.size for x in values_of(scanned.state.params))
    params = jax.tree.map(np.asarray, scanned.state.params)
    stack = params.pop("blocks")
    for i in range(2):
        params[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
    tokens = windows_at(3)[:, :-1]
    expected = logits_of(scanned, scanned.state.params, tokens)
    np.testing.assert_allclose(logits_of(plain, params, tokens), expected, rtol=1e-4, atol=1e-4)
    losses = plain.train(6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("model", [{"positions": "learned"}, {"tied": True}, {"tied": True, "positions": "learned"}])
def test_positions_and_heads_of_the_other_kind_train(trained, model):
    run = Run(make_config(model=model, learning_rate=1e-2))
    sizes = {name: sum(x.size for x in values_of(r.state.params)) for name, r in (("this", run), ("rope", trained[0]))}
    extra = LENGTH * 16 * ("positions" in model) - 256 * 16 * ("tied" in model)
    assert sizes["this"] - sizes["rope"] == extra
    losses = run.train(8)
    assert losses[0] == pytest.approx(8, abs=1)
    assert losses[-1] < losses[0] - 0.5


def test_bfloat16_is_what_is_computed_in_and_parameters_are_float32(trained):
    _, expected = trained
    run = Run(make_config(model={"dtype": "bfloat16"}, learning_rate=1e-2))
    losses = run.train(8)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.state.params)} == {jnp.dtype("float32")}
    assert losses != expected[:8]
    np.testing.assert_allclose(losses, expected[:8], rtol=0.02)
    text = run.step.lower(run.state, jax.ShapeDtypeStruct((1, 8, LENGTH + 1), jnp.int32)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert sum("bf16" in line for line in products) > 0.8 * len(products)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, cut = Run(make_config()), Run(make_config(accumulation=2))
    assert cut.parts == 2
    np.testing.assert_allclose(cut.train(3), whole.train(3), rtol=1e-5)
    assert_close(cut.state.params, whole.state.params)


def test_multi_steps_updates_every_so_many_train_steps():
    many = Run(make_config(accumulation=2, accumulate="multi_steps", num_steps=24, warmup_steps=4))
    whole = Run(make_config(num_steps=12, warmup_steps=2, batch_size=16))
    before = values_of(many.state.params)
    for step in range(2):
        half = windows_at(0, 16)[8 * step : 8 * step + 8]
        many.state, _ = many.step(many.state, jax.device_put(half[None], many.sharding))
        if step == 0:
            assert all((a == b).all() for a, b in zip(values_of(many.state.params), before, strict=True))
    assert int(many.state.opt_state.gradient_step) == 1
    whole.train(1, 16)
    found, expected = many.state.opt_state.inner_opt_state[1][0], whole.state.opt_state[1][0]
    assert_close((found.mu, found.nu), (expected.mu, expected.nu))


def test_kernels_alone_decay(trained):
    params = trained[0].state.params
    tx = optax.adamw(1.0, weight_decay=0.5, mask=lm_train.is_kernel)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if leaf.any()}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert decayed == {path for path in paths if path.endswith("['kernel']")}
    assert 0 < len(decayed) < len(paths)


def test_rotary_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = (np.broadcast_to(rng.normal(size=8), (1, 12, 1, 8)).astype(np.float32) for _ in range(2))
    query, key = lm_model.rotated(query), lm_model.rotated(key)
    products = np.asarray(jnp.einsum("bqhd,bkhd->qk", query, key))
    for distance in range(-11, 12):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert len(set(products[0].round(3))) > 6
    np.testing.assert_allclose(jnp.linalg.norm(query, axis=-1), np.linalg.norm(query[0, 0, 0]), rtol=1e-5)


def test_hooks_fire_between_steps_and_the_step_is_not_compiled_again():
    hooks = fsh.SurgeryHooks()
    hooks.add("clear", fsh.surgeries.Assign(0.0), params="**/mlp/up/kernel", when=fsh.at(2))
    run = Run(make_config(), hooks)
    before = lm_train.shardings_of(run.state)
    run.train(2)
    assert not np.asarray(run.state.params["blocks"]["mlp"]["up"]["kernel"]).any()
    assert lm_train.shardings_of(run.state) == before
    run.step(run.state, jax.device_put(windows_at(2)[None], run.sharding))
    assert run.step._cache_size() == 1


def test_a_reinit_hook_draws_by_the_models_own_initialisers():
    config = make_config()
    assert lm_train.hook_objects(config, lm_train.make_partitioning(config)) == {}
    hook = fsh.config.hook("reinit", params=("**/query/kernel", "out_norm/scale"), at=(1,))
    config.update(surgery={"anew": hook})
    objects = lm_train.hook_objects(config, lm_train.make_partitioning(config))
    run = Run(config, fsh.SurgeryHooks.from_config(config.surgery, objects=objects))
    first = np.asarray(run.state.params["blocks"]["attention"]["query"]["kernel"])
    run.train(1)
    anew = run.state.params["blocks"]["attention"]["query"]["kernel"]
    assert np.abs(np.asarray(anew) - first).min(-1).max() > 0.05  # not one step away from the first draw
    assert np.asarray(anew).std() == pytest.approx(first.std(), rel=0.15)
    assert (np.asarray(run.state.params["out_norm"]["scale"]) == 1).all()
    assert anew.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3, "fsdp": 1, "tensor": 1}}, "8 devices do not fill a mesh of {'data': 3"),
        ({"mesh": {"data": -1, "fsdp": -1, "tensor": 1}}, "8 devices do not fill a mesh"),
        ({"batch_size": 6}, "6 windows do not divide over the 4 devices"),
        ({"accumulation": 4}, "2 windows do not divide over the 4 devices"),
        ({"accumulate": "later"}, "No accumulate 'later'. Write 'scan' or 'multi_steps'"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        lm_train.make_partitioning(make_config(**changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"positions": "none"}, "Write 'rope' or 'learned'"), ({"heads": 3}, "3 heads do not divide a width of 128")],
)
def test_a_model_that_cannot_be_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        lm_model.ModelConfig(**fields)


def test_configs_have_variants_and_hooks_that_follow_the_length_of_the_run():
    with pytest.raises(ValueError, match=r"Write configs/lm.py:small, configs/lm.py:tiny or configs/lm.py:sparse"):
        GET_CONFIG("large")
    config = GET_CONFIG("small")
    config.num_steps = 1_000
    due = {spec.name: list(spec.when.due_steps(0, 1_000)) for spec in fsh.config.build(config.surgery)}
    assert due == {"calm": list(range(100, 1_001, 100)), "shrink": [500], "perturb": [500]}
