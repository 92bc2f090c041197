"""What optax's public namespaces make, so that a new optimizer without a row is found."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import optax
from optax import contrib

TRANSFORM = "GradientTransformation"

BLOCKS: dict[str, str] = {
    "WrappedSchedule": "a schedule",
    "normalize_by_update_norm": "keeps no array",
    "adaptive_grad_clip": "keeps no array",
    "add_decayed_weights": "keeps no array",
    "centralize": "keeps no array",
    "clip": "keeps no array",
    "clip_by_block_rms": "keeps no array",
    "clip_by_global_norm": "keeps no array",
    "identity": "keeps no array",
    "keep_params_nonnegative": "keeps no array",
    "normalize": "keeps no array",
    "scale": "keeps no array",
    "scale_by_learning_rate": "keeps no array",
    "scale_by_param_block_norm": "keeps no array",
    "scale_by_param_block_rms": "keeps no array",
    "scale_by_sign": "keeps no array",
    "scale_by_trust_ratio": "keeps no array",
    "set_to_zero": "keeps no array",
    "stateless": "keeps no array",
    "stateless_with_tree_map": "keeps no array",
    "with_extra_args_support": "keeps no array",
    "scale_by_adadelta": "within adadelta",
    "scale_by_adam": "within adam",
    "scale_by_adamax": "within adamax",
    "scale_by_adan": "within adan",
    "scale_by_amsgrad": "within amsgrad",
    "scale_by_backtracking_linesearch": "within backtracking",
    "scale_by_belief": "within adabelief",
    "scale_by_distance_over_gradients": "within dog",
    "scale_by_factored_rms": "within adafactor_plain",
    "scale_by_lbfgs": "within lbfgs",
    "scale_by_lion": "within lion",
    "scale_by_novograd": "within novograd",
    "scale_by_optimistic_gradient": "within optimistic_gradient_descent",
    "scale_by_polyak": "within polyak_sgd",
    "scale_by_radam": "within radam",
    "scale_by_rms": "within rmsprop",
    "scale_by_rprop": "within rprop",
    "scale_by_rss": "within adagrad",
    "scale_by_schedule": "within adam_behind_schedule",
    "scale_by_sm3": "within sm3",
    "scale_by_stddev": "within rmsprop_centered",
    "scale_by_yogi": "within yogi_from_zero",
    "scale_by_zoom_linesearch": "within lbfgs_linesearch",
    "trace": "within momentum",
    "scale_by_acprop": "within acprop",
    "scale_by_ademamix": "within ademamix",
    "scale_by_adopt": "within adopt",
    "scale_by_cocob": "within cocob",
    "scale_by_galore": "within galore",
    "scale_by_madgrad": "within madgrad",
    "scale_by_muon": "within muon",
    "scale_by_simplified_ademamix": "within simplified_ademamix",
    "lookahead": "its parameters are pairs: has a test of its own",
    "differentially_private_aggregate": "takes a gradient per example; keeps a random key alone",
    "dpsgd": "takes a gradient per example; keeps a random key alone",
}
"""Public names without a row of their own, and why."""


def makers() -> dict[str, Any]:
    """The public callables of optax and optax.contrib that make a `GradientTransformation`, or that may.

    A function that says what it returns is believed; of one that does not, the source is searched. Classes count if
    they have `init` and `update`, or give a transformation.

    >>> {"adam", "MultiSteps", "inject_hyperparams", "dog"} - set(makers())
    set()
    >>> {"apply_updates", "ScaleByAdamState", "cosine_decay_schedule"} & set(makers())
    set()
    """
    found: dict[str, Any] = {}
    for module in (optax, contrib):
        for name in dir(module):
            public = getattr(module, name)
            if not name.startswith("_") and not isinstance(public, ModuleType) and _makes(public):
                found[name] = public
    return found


def _makes(public: Any) -> bool:
    if inspect.isclass(public):
        named = hasattr(public, "gradient_transformation") or (hasattr(public, "init") and hasattr(public, "update"))
        return named and not public.__name__.startswith(TRANSFORM)
    if isinstance(public, functools.partial):
        return _makes(public.func)
    if not inspect.isfunction(public):
        return False
    returns = inspect.signature(public).return_annotation
    if returns is inspect.Signature.empty:
        return TRANSFORM in inspect.getsource(public)
    return TRANSFORM in str(returns)
