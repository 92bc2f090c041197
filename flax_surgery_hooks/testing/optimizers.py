"""The table of optimizers: every optimizer and wrapper that optax and optax.contrib make, and some of them nested.

Where an `eps` enters a slot it is set to 0, or so small that it does not show: it does not scale with gradients, and
equality would hold up to that `eps` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from flax_surgery_hooks.testing.rows import COPIES, FRESH, SCALES, Exempt, Holds, OptimizerRow

RATE = 0.1
TINY = 1e-30
"""An `eps` below all that shows in float64."""

_GLOBAL = Holds("by kind", "it divides by distances or norms over all leaves, which the edit of one leaf changes")
_EVOLVED = Holds("by kind", "it has moved that copy of the parameters by updates, which do not scale with them")
_LEAF_NORM = Holds("by kind", "it multiplies updates by the norm of the leaf over that of its update")
_CLIPPED = Holds("by kind", "what it clips by depends on the size of gradients")
_INNER_PRODUCT = Holds(
    "by kind",
    "its `gamma` sums parameters times gradients over all leaves, those without history left out",
    FRESH,
    ".gamma",
)
_EVERY = ("permute", *SCALES, *FRESH, *COPIES)
_RULES = ("transport", "carry")
_MEASURED = Holds("by kind", "a measure is of the step before the edit", _EVERY, "*measurement*")
_CACHED = Holds(
    "restarted", "a line search would take the loss of the old model for that of the new", _EVERY, "*.value", _RULES
)
_UNPRESERVED = Holds("restarted", "what was remembered says nothing of another function", _EVERY, "*", ("carry",))
_FACTORS = Holds(
    "by kind",
    "of two factors only their product is known: exact for second moments of rank 1",
    ("scale_rows", "scale_elements", *FRESH, *COPIES),
)
_SHARED = Holds(
    "by kind",
    "elements share a number, which moves as if each had an even part of it",
    ("scale_rows", "scale_elements", *FRESH, *COPIES),
)
_BOUND = Holds(
    "by kind", "elements share bounds: still a bound from above", ("scale_rows", "scale_elements", *FRESH, *COPIES)
)
_DECAYED = Holds(
    "by kind", "decay that is added to gradients scales with parameters, not as gradients do", (*SCALES, *COPIES)
)


def _adam() -> Any:
    return optax.adam(RATE)


def _momentum() -> Any:
    return optax.sgd(RATE, momentum=0.9)


def _every_other(step: Any, **_: Any) -> Any:
    return step % 2 == 0


def _kernel_only(params: Any) -> Any:
    return {name: name == "kernel" for name in params}


_BIAS = {"kernel": False, "bias": True}

_MAKERS: dict[str, Callable[[], Any]] = {
    "adabelief": lambda: optax.adabelief(RATE, eps_root=0.0),
    "adadelta": lambda: optax.adadelta(RATE, eps=TINY),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2, eps=TINY),
    "adagrad": lambda: optax.adagrad(RATE, initial_accumulator_value=0.0),
    "adam": _adam,
    "adamax": lambda: optax.adamax(RATE, eps=0.0),
    "adamaxw": lambda: optax.adamaxw(RATE, eps=0.0),
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.1, mask=_kernel_only),
    "adan": lambda: optax.adan(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "fromage": lambda: optax.fromage(RATE),
    "lamb": lambda: optax.lamb(RATE, weight_decay=0.1),
    "lars": lambda: optax.lars(RATE),
    "lbfgs": lambda: optax.lbfgs(RATE, memory_size=3, linesearch=None),
    "lion": lambda: optax.lion(RATE),
    "nadam": lambda: optax.nadam(RATE),
    "nadamw": lambda: optax.nadamw(RATE),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=jax.random.key(0)),
    "novograd": lambda: optax.novograd(RATE, eps=0.0),
    "optimistic_adam": lambda: optax.optimistic_adam(RATE, eps=TINY),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(RATE, eps=TINY),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(RATE),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "radam": lambda: optax.radam(RATE),
    "rmsprop": lambda: optax.rmsprop(RATE, eps=0.0),
    "rprop": lambda: optax.rprop(RATE),
    "sgd": lambda: optax.sgd(RATE),
    "sign_sgd": lambda: optax.sign_sgd(RATE),
    "signum": lambda: optax.signum(RATE),
    "sm3": lambda: optax.sm3(RATE),
    "yogi": lambda: optax.yogi(RATE),
    # optax.contrib
    "acprop": lambda: contrib.acprop(RATE, eps_root=0.0),
    "ademamix": lambda: contrib.ademamix(RATE),
    "adopt": lambda: contrib.adopt(RATE, eps=TINY),
    "cocob": lambda: contrib.cocob(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "dog": lambda: contrib.dog(RATE),
    "dowg": lambda: contrib.dowg(RATE),
    "galore": lambda: contrib.galore(RATE, rank=2, update_proj_gap=4),
    "madgrad": lambda: contrib.madgrad(RATE),
    "mechanize": lambda: contrib.mechanize(_momentum()),
    "momo": lambda: contrib.momo(RATE),
    "momo_adam": lambda: contrib.momo_adam(RATE),
    "muon": lambda: contrib.muon(RATE),
    "prodigy": lambda: contrib.prodigy(),
    "reduce_on_plateau": lambda: optax.chain(_momentum(), contrib.reduce_on_plateau()),
    "sam": lambda: contrib.sam(_momentum(), optax.chain(contrib.normalize(), optax.sgd(RATE))),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE), learning_rate=RATE),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(RATE),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(RATE),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(RATE),
    "sophia": lambda: contrib.sophia(RATE),
    "hutchinson_estimator_diag_hessian": lambda: contrib.hutchinson_estimator_diag_hessian(),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(_adam()),
    # Wrappers and containers.
    "MultiSteps": lambda: optax.MultiSteps(_adam(), 2).gradient_transformation(),
    "apply_every": lambda: optax.chain(optax.scale_by_adam(eps=TINY), optax.apply_every(4)),
    "apply_if_finite": lambda: optax.apply_if_finite(_adam(), 3),
    "chain": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-RATE)),
    "conditionally_mask": lambda: optax.conditionally_mask(_adam(), _every_other),
    "conditionally_transform": lambda: optax.conditionally_transform(_adam(), _every_other),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.scale(-RATE)),
    "flatten": lambda: optax.flatten(_adam()),
    "freeze": lambda: optax.chain(_adam(), optax.freeze(_BIAS)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1.0, 0.1, 5)),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(RATE),
    "masked": lambda: optax.masked(_adam(), _kernel_only),
    "monitor": lambda: optax.chain(_momentum(), optax.monitor({"norm": optax.tree.norm})),
    "measure_with_ema": lambda: optax.chain(optax.measure_with_ema(optax.tree.norm, 0.9), optax.scale(-RATE)),
    "multi_transform": lambda: optax.multi_transform({"a": _adam(), "b": _momentum()}, {"kernel": "a", "bias": "b"}),
    "named_chain": lambda: optax.named_chain(("mu", optax.scale_by_adam()), ("kernel", optax.scale(-RATE))),
    "partition": lambda: optax.partition({"a": _momentum(), "b": _adam()}, {"kernel": "a", "bias": "b"}),
    "selective_transform": lambda: optax.selective_transform(_adam(), freeze_mask=_BIAS),
    "snapshot": lambda: optax.chain(optax.scale_by_adam(), optax.snapshot("adam", lambda updates: updates)),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), _adam()),
    "add_noise": lambda: optax.chain(_momentum(), optax.add_noise(0.01, 0.5, jax.random.key(0))),
    # Set-ups that no single name makes.
    "adafactor_momentum": lambda: optax.adafactor(
        min_dim_size_to_factor=2, momentum=0.9, eps=TINY, multiply_by_parameter_scale=False, clipping_threshold=None
    ),
    "adafactor_unfactored": lambda: optax.adafactor(RATE, factored=False, eps=TINY),
    "adafactor_plain": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=2, epsilon=0.0),
    "adam_nesterov": lambda: optax.adam(RATE, nesterov=True),
    "adam_behind_clip": lambda: optax.chain(optax.clip(0.5), _adam()),
    "adam_behind_global_clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), _adam()),
    "adam_behind_decay": lambda: optax.chain(optax.add_decayed_weights(0.1), _adam()),
    "adam_behind_schedule": lambda: optax.chain(optax.scale_by_schedule(lambda step: 1.0 / (1 + step)), _adam()),
    "lbfgs_linesearch": lambda: optax.lbfgs(),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)
    ),
    "momentum": _momentum,
    "nesterov": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "multi_steps_done": lambda: optax.MultiSteps(_adam(), 5).gradient_transformation(),
    "rmsprop_centered": lambda: optax.rmsprop(RATE, centered=True, eps=0.0),
    "rmsprop_corrected": lambda: optax.rmsprop(RATE, eps=0.0, bias_correction=True, centered=True),
    "rmsprop_momentum": lambda: optax.rmsprop(RATE, momentum=0.9, eps=TINY),
    "schedule_free_momentum": lambda: contrib.schedule_free(_adam(), learning_rate=RATE),
    "yogi_from_zero": lambda: optax.scale_by_yogi(initial_accumulator_value=0.0),
    # Nested in each other.
    "inject_multi_steps_adamw": lambda: optax.inject_hyperparams(
        lambda learning_rate: optax.MultiSteps(optax.adamw(learning_rate), 2).gradient_transformation()
    )(RATE),
    "masked_in_chain_in_finite": lambda: optax.apply_if_finite(
        optax.chain(optax.masked(optax.scale_by_adam(eps=TINY), _kernel_only), optax.trace(0.9), optax.scale(-RATE)), 3
    ),
    "partition_of_multi_steps": lambda: optax.partition(
        {"a": optax.MultiSteps(optax.lion(RATE), 2).gradient_transformation(), "b": optax.set_to_zero()},
        {"kernel": "a", "bias": "b"},
    ),
    "ema_of_named_chain": lambda: optax.chain(
        optax.named_chain(("trace", optax.trace(0.9)), ("rms", optax.scale_by_rms(eps=TINY))), optax.ema(0.9)
    ),
    "mechanize_adam": lambda: contrib.mechanize(_adam()),
}

_LBFGS = (
    dataclasses.replace(_UNPRESERVED, fields="[[]0].count"),
    dataclasses.replace(_UNPRESERVED, fields="*.weights_memory"),
    Holds("by kind", "it sums over all elements, those without history among them", FRESH, "*.weights_memory"),
)

_HOLDS: dict[str, tuple[Holds, ...]] = {
    **dict.fromkeys(("dadapt_adamw", "dog", "dowg", "mechanize", "mechanize_adam", "prodigy"), (_GLOBAL,)),
    **dict.fromkeys(
        ("schedule_free", "schedule_free_adamw", "schedule_free_sgd", "schedule_free_momentum"), (_EVOLVED,)
    ),
    "lars": (_LEAF_NORM,),
    "adam_behind_clip": (_CLIPPED,),
    "adam_behind_global_clip": (_CLIPPED,),
    "adam_behind_decay": (_DECAYED,),
    **dict.fromkeys(("momo", "momo_adam"), (_INNER_PRODUCT,)),
    **dict.fromkeys(("monitor", "snapshot"), (_MEASURED,)),
    "adafactor": (_FACTORS,),
    "adafactor_plain": (_FACTORS,),
    "adafactor_momentum": (_FACTORS,),
    "backtracking": (_CACHED,),
    "cocob": (Holds("by kind", "its reward is of the way that copies have gone together", COPIES, "*.reward"),),
    "galore": (
        Holds(
            "restarted",
            "a new projector is made when the count says so",
            ("pad", "slice", *COPIES),
            "[[]0].count",
            _RULES,
        ),
        Holds("by kind", "the projector and what it projects stay until it is renewed", _EVERY),
    ),
    "lbfgs": _LBFGS,
    "lbfgs_linesearch": (
        _CACHED,
        *_LBFGS,
        Holds("by kind", "it describes the last line search", _EVERY, "*.info.*"),
    ),
    "novograd": (_SHARED,),
    "sm3": (_BOUND,),
    "yogi": (
        Holds("by kind", "it starts from 1e-6, which a run on other gradients would not scale", (*SCALES, *COPIES)),
    ),
}


def _exists(name: str) -> bool:
    """Whether this release of optax has what a row is made of."""
    needs = {"madgrad": "madgrad", "galore": "galore"}.get(name)
    if needs is not None:
        return hasattr(contrib, needs)
    needs = {"monitor": "monitor", "measure_with_ema": "measure_with_ema", "signum": "signum"}.get(name)
    return needs is None or hasattr(optax, needs)


_TOLERANCE = {
    # These accumulate in float32 whatever the gradients are.
    **dict.fromkeys(("MultiSteps", "multi_steps_done", "inject_multi_steps_adamw", "partition_of_multi_steps"), 1e-6),
    "adafactor_momentum": 1e-6,  # its momentum
    "sm3": 1e-6,  # its eps
}
_ASKS = {"sam": (), **dict.fromkeys(("sophia", "hutchinson_estimator_diag_hessian"), ("obj_fn",))}
"""What the update asks for, if not what most do."""


def _together(fields: str) -> Exempt:
    return Exempt("untouched", "elements share numbers with those that change", fields, (), ("transport",))


_AGAIN = Exempt(
    "idempotent",
    "what is pruned again starts again from means, which two factors mix with all the rest: some percent at the second "
    "fire, and less at each further one",
    "*.v_*",
    ("prune",),
)
_SLOW = Exempt("onward", "at first it moves by less than a weight in float32 can show", "updates")
_FORGOTTEN = ("identity", "untouched", "extreme")
_MEMORY = tuple(
    Exempt(law, "its memory starts anew: it may be of another function", "*_memory*", (), ("carry",))
    for law in _FORGOTTEN
) + tuple(
    Exempt(law, "so does the number of steps that it remembers", "*.count", (), ("carry",)) for law in _FORGOTTEN[:2]
)
_LOSS = tuple(
    Exempt(law, "the loss of the model before says nothing of the model now", "*.value") for law in _FORGOTTEN
)

_EXEMPT: dict[str, tuple[Exempt, ...]] = {
    **dict.fromkeys(("adafactor", "adafactor_momentum", "adafactor_plain"), (_together("*.v_*"), _AGAIN)),
    "novograd": (_together("*.nu*"),),
    "sm3": (_together("*.mu*"),),
    **dict.fromkeys(("mechanize", "mechanize_adam"), (_SLOW,)),
    "backtracking": _LOSS,
    "hutchinson_estimator_diag_hessian": (
        Exempt("onward", "its updates are second derivatives, which are 0 of a loss that is linear", "updates"),
    ),
    "lbfgs": _MEMORY,
    "lbfgs_linesearch": (*_MEMORY, *_LOSS),
    "rprop": (Exempt("onward", "an element does not move when its gradient has just changed sign", "updates"),),
    "snapshot": (
        Exempt("onward", "what it has measured keeps its old shape until the next step", "updates", ("pad",)),
    ),
}
"""Laws of training on that do not hold."""

OPTIMIZERS: dict[str, OptimizerRow] = {
    name: OptimizerRow(
        name,
        make,
        _HOLDS.get(name, ()),
        _TOLERANCE.get(name, 1e-9),
        _ASKS.get(name, ("value", "grad", "value_fn")),
        _EXEMPT.get(name, ()),
    )
    for name, make in _MAKERS.items()
    if _exists(name)
}
"""The rows by name; what an older release of optax lacks is left out."""
