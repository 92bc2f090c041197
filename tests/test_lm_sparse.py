"""The sparse variant of the language model: RigL in the train step, on eight devices, by the gradients of its batch."""

from __future__ import annotations

import importlib
import itertools
import pathlib
import runpy
import sys
from typing import Any

import jax
import numpy as np
import pytest

import flax_surgery_hooks as fsh

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
lm_train: Any = importlib.import_module("lm_train")
sys.path.remove(str(ROOT / "examples"))

GET_CONFIG = runpy.run_path(str(ROOT / "configs" / "lm.py"))["get_config"]
STEPS, LENGTH = 6, 16


def make_config() -> Any:
    """Smaller still, two kernels of each layer: due at steps 3 and 6, of which only the first one moves masks."""
    config = GET_CONFIG("sparse")
    config.num_steps, config.warmup_steps = STEPS, 2
    config.model.update(length=LENGTH, width=16, mlp=32)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    for hook in config.surgery.values():
        hook.every_fraction, hook.params = 0.5, "blocks/mlp/*/kernel[:]"
    return config


def test_only_one_of_the_three_ways_is_enabled():
    config = GET_CONFIG("sparse")
    assert {name: hook.enabled for name, hook in config.surgery.items()} == {
        "rigl": True,
        "set": False,
        "static": False,
    }
    assert len({(hook.sparsity, hook.distribution, hook.params) for hook in config.surgery.values()}) == 1
    assert config.surgery.rigl.end == config.num_steps * 3 // 4
    with pytest.raises(ValueError, match=r"configs/lm\.py:sparse"):
        GET_CONFIG("dense")


@pytest.fixture(scope="module")
def trained() -> tuple[list[Any], list[fsh.Record], Any]:
    """The states of six steps, the fires, and the config."""
    config = make_config()
    partitioning = lm_train.make_partitioning(config)
    objects = lm_train.hook_objects(config, partitioning)
    hooks = fsh.SurgeryHooks.from_config(config.surgery, seed=0, objects=objects)
    state = hooks.observe(hooks.init(lm_train.create_state(config, partitioning)))
    step = lm_train.make_train_step(state, hooks, partitioning)
    states = [jax.device_get(state)]
    for number in range(STEPS):
        windows = np.random.default_rng(number).integers(256, size=(1, 8, LENGTH + 1), dtype=np.int32)
        batch = jax.device_put(windows, lm_train.batch_sharding(partitioning))
        state, metrics = step(state, batch)
        state = hooks(number + 1, state, metrics=metrics, batch=batch)
        states.append(jax.device_get(state))
    hooks.collect(state)
    hooks.flush()
    return states, [record for record in hooks.ledger.records if record.event == "settled"], config


def masks_of(state: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(mask) for path, mask in fsh.sparsity.masks_of(state, "rigl").items()}


def layer_of(params: Any, path: str) -> np.ndarray:
    """What lies at `blocks/.../kernel[1]`."""
    stem, index = path.removesuffix("]").split("[")
    for name in stem.split("/"):
        params = params[name]
    return np.asarray(params[int(index)])


def test_each_layer_has_as_many_weights_as_erk_says_at_every_step(trained):
    states, _, config = trained
    shapes = {path: mask.shape for path, mask in masks_of(states[0]).items()}
    assert len(shapes) == 2 * config.model.layers
    shares = fsh.sparsity.erk(shapes, config.surgery.rigl.sparsity)
    for state in states:
        for path, mask in masks_of(state).items():
            assert mask.sum() == round((1 - shares[path]) * mask.size), path
            assert (layer_of(state.params, path)[~mask] == 0).all(), path


def test_masks_move_at_the_first_fire_alone_and_grown_weights_are_zero_there(trained):
    states, fires, _ = trained
    assert [record.step for record in fires] == [3, 6]
    assert fires[0].figures["masks/overlap"] < 1 == fires[1].figures["masks/overlap"]
    for number, (before, after) in enumerate(itertools.pairwise(states), start=1):
        moved = [path for path, mask in masks_of(after).items() if (mask != masks_of(before)[path]).any()]
        assert bool(moved) == (number == 3)
        for path in moved:
            grown = masks_of(after)[path] & ~masks_of(before)[path]
            assert (layer_of(after.params, path)[grown] == 0).all()
            assert (layer_of(after.opt_state[1][0].mu, path)[grown] == 0).all()
