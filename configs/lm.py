"""Config of examples/lm.py: `configs/lm.py:small` is the trained model, `configs/lm.py:tiny` a run of seconds.

`configs/lm.py:sparse` is a small one most of whose weights are zero from the first step to the last.
"""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict

import flax_surgery_hooks as fsh

RULES = (
    # Axes of parameters and of activations, by name, and the mesh axes that they are split over. The first rule that
    # names an axis counts, and no mesh axis splits two axes of one array.
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("length", None),
    ("features", None),  # of the embedding: looked up by tokens that lie elsewhere
    ("head_features", None),
    ("norm", None),
)


def get_config(variant: str = "small") -> ml_collections.ConfigDict:
    """The config of a variant: "small", "tiny" or "sparse"."""
    if variant not in ("small", "tiny", "sparse"):
        raise ValueError(
            f"No variant {variant!r}. Write configs/lm.py:small, configs/lm.py:tiny or configs/lm.py:sparse."
        )
    config = common()
    config.surgery = surgery(config)
    if variant != "small":
        shrink(config)
    if variant == "sparse":
        lengthen(config)
        config.surgery = sparse(config)
    return config


def common() -> ml_collections.ConfigDict:
    """Everything but the hooks."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_steps = 4_000
    config.eval_every = 200
    config.eval_windows = 256  # of the curve; the last figure is of all held-out bytes
    config.checkpoint_every = 400
    config.checkpoints_kept = 2
    config.batch_size = 8  # windows of one train step, over all processes and devices
    config.accumulation = 1  # microbatches whose gradients are averaged for one update ...
    config.accumulate = "scan"  # ... of one train step, or "multi_steps": of as many train steps, by `optax.MultiSteps`
    config.learning_rate = 3e-3
    config.end_learning_rate = 1e-4
    config.warmup_steps = 100
    config.weight_decay = 0.1
    config.ngram_order = 5  # of the baseline; 0 for none
    config.data = ml_collections.ConfigDict()
    config.data.root = config_dict.placeholder(str)  # a folder of Python sources; None: the standard library
    config.data.held_out = 0.05
    config.data.max_files = config_dict.placeholder(int)
    config.model = ml_collections.ConfigDict()
    config.model.length = 256
    config.model.width = 128
    config.model.layers = 4
    config.model.heads = 2
    config.model.mlp = 512
    config.model.positions = "rope"  # or "learned"
    config.model.scan_layers = False  # True: one stack of parameters; compiles faster, and on CPU trains slower
    config.model.tied = False
    config.model.dtype = "float32"  # or "bfloat16": what is computed in; parameters are float32
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all other devices
    config.rules = RULES
    return config


def shrink(config: ml_collections.ConfigDict) -> None:
    """A run of some seconds."""
    config.num_steps, config.eval_every, config.checkpoint_every, config.checkpoints_kept = 12, 4, 4, 3
    config.eval_windows, config.batch_size, config.warmup_steps = 8, 8, 2
    config.data.max_files, config.data.held_out = 24, 0.25
    config.surgery.calm.every_fraction = 0.25
    # Two sorts more, so that a run of seconds has seen five.
    config.surgery.even = fsh.config.hook("normalize", params="head/kernel", to=16.0, at=(8,))
    config.surgery.forget = fsh.config.hook("reset_moments", params="**/mlp/*/kernel", at=(10,))
    config.model.update(length=32, width=32, layers=2, heads=2, mlp=64, scan_layers=True)


def surgery(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The hooks; steps are parts of the run, so that they move with `--config.num_steps`."""
    hooks = ml_collections.ConfigDict()
    steps = {"num_steps": config.get_ref("num_steps")}
    # No column of the maps to queries and keys grows beyond a norm, so that attention does not become too sharp. The
    # axis counts from the end: scanned kernels have one more in front.
    hooks.calm = fsh.config.hook(
        "clip_norm", params="**/{query,key}/kernel", axis=-3, max_norm=2.0, every_fraction=0.1, **steps
    )
    # Shrink and perturb: kernels become smaller, then noise is added.
    where = {"params": "**/mlp/*/kernel", "at_fraction": (0.5,), **steps}
    hooks.shrink = fsh.config.hook("scale", factor=0.8, priority=1, **where)
    hooks.perturb = fsh.config.hook("noise", std=0.1, **where)
    return hooks


def lengthen(config: ml_collections.ConfigDict) -> None:
    """A run of a minute, of the network of `shrink`."""
    config.num_steps, config.eval_every, config.checkpoint_every, config.checkpoints_kept = 600, 50, 600, 1
    config.eval_windows, config.batch_size, config.warmup_steps = 512, 32, 50
    config.ngram_order = 0


def sparse(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Three ways of sparse training, of which one is enabled: RigL, SET, and masks that never move."""
    hooks = ml_collections.ConfigDict()
    # Each layer of the scanned stack is a leaf of its own, which has its own number of weights.
    where = {"params": "blocks/**/kernel[:]", "every_fraction": 1 / 30, "num_steps": config.get_ref("num_steps")}
    last = config.get_ref("num_steps") * 3 // 4
    hooks.rigl = fsh.config.hook("rigl", sparsity=0.95, end=last, **where)
    hooks.set = fsh.config.hook("set", sparsity=0.95, end=last, enabled=False, **where)
    hooks.static = fsh.config.hook("set", sparsity=0.95, fraction=0.0, anneal="constant", enabled=False, **where)
    return hooks
