"""Config of examples/digits.py; `--config=configs/digits.py:fast` takes the short variant."""

from __future__ import annotations

import ml_collections

import flax_surgery_hooks as fsh


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: "" is the full run, "fast" one of about twenty seconds."""
    if variant not in ("", "fast"):
        raise ValueError(f"No variant {variant!r}. Write configs/digits.py or configs/digits.py:fast.")
    fast = variant == "fast"
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_steps = 750 if fast else 1_500
    config.eval_every = 25
    config.batch_size = 64
    config.learning_rate = 5e-3
    config.end_learning_rate = 5e-4
    config.warmup_steps = 50
    config.weight_decay = 1e-3
    config.threshold = 0.02  # `drop_small`, the hook written in the example, zeroes weights below this ...
    config.threshold_at = 500 if fast else 1_100  # ... at this step
    config.surgery = ml_collections.ConfigDict()
    # The surgery of Flax's own guide: the last kernel divided by its norm, its Adam moments following.
    config.surgery.head_norm = fsh.config.hook("normalize", params="Dense_1/kernel", every=200)
    # One layer starts again from its initialiser, with fresh moments.
    config.surgery.reinit = fsh.config.hook("reinit", params="Dense_0/*", at=(300,) if fast else (700,))
    return config
