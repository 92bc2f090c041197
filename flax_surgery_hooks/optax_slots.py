"""What the states of optax hold: registered on import."""

from __future__ import annotations

import sys
from typing import Any

import optax
from optax import contrib

from flax_surgery_hooks.layouts import FACTORED, PER_AXIS, PER_LEAF, PROJECTED, STACKED
from flax_surgery_hooks.slot_registry import Kind, Preceding, register_slot

# Transforms behind which updates are preconditioned, of order 0 in the gradient, and those that leave the order alone.
# Behind any other (an `EmptyState` may be a clip, a sign or a weight decay) the numeric probe decides.
_PRECONDITIONERS = {
    "ScaleByAdamState", "ScaleByAmsgradState", "ScaleByBeliefState", "ScaleByRmsState", "ScaleByRStdDevState",
    "ScaleByRssState", "ScaleByAdaDeltaState", "ScaleByAdanState", "ScaleByLionState", "ScaleByNovogradState",
    "ScaleBySM3State", "ScaleByRpropState", "FactoredState", "ScaleByTrustRatioState", "ScaleByRmsWithCountState",
    "ScaleByRStdDevWithCountState",
}  # fmt: skip
_LINEAR = {"TraceState", "EmaState", "ScaleByScheduleState", "ApplyEvery", "AddNoiseState", "ZeroNansState"}


def order(preceding: Preceding) -> int | None:
    """The order in the gradient of what arrives behind these transforms, or None if only a probe can tell."""
    arriving: int | None = 1
    for state in preceding:
        if state.__name__ in _PRECONDITIONERS:
            arriving = 0
        elif state.__name__ not in _LINEAR and arriving == 1:
            arriving = None
    return arriving


def _by_order(first: str, zeroth: str) -> Any:
    def kind(preceding: Preceding) -> Kind:
        arriving = order(preceding)
        return (first, zeroth) if arriving is None else (zeroth, first)[arriving]

    return kind


FIRST = _by_order("grad", "update")
"""Linear in what arrives: an average or a sum of updates."""
SECOND = _by_order("grad_sq", "invariant")
"""Quadratic in what arrives."""


def adam_mu(preceding: Preceding) -> Kind:
    """Averages of gradients in Adam and its kin, of preconditioned ones in Adopt, which shares the class: the probe
    tells.
    """
    return "update" if order(preceding) == 0 else ("grad", "update")


def adam_nu(preceding: Preceding) -> Kind:
    """Squares in Adam and its kin, magnitudes in Adamax, which shares the class: the probe tells."""
    arriving = order(preceding)
    if arriving == 0:
        return "invariant"
    return ("grad_sq", "grad_abs") if arriving == 1 else ("grad_sq", "grad_abs", "invariant")


_OPTAX: dict[str, dict[str, Any]] = {
    "ApplyEvery": {"grad_acc": FIRST},
    "EmaState": {"ema": FIRST},
    "TraceState": {"trace": FIRST},
    "MultiStepsState": {"acc_grads": FIRST},
    "ScaleByAdamState": {"mu": adam_mu, "nu": adam_nu},
    "ScaleByAmsgradState": {"mu": FIRST, "nu": SECOND, "nu_max": SECOND},
    "ScaleByAdanState": {"m": FIRST, "v": FIRST, "n": SECOND, "g": FIRST},
    "ScaleByBeliefState": {"mu": FIRST, "nu": SECOND},
    "ScaleByLionState": {"mu": FIRST},
    "ScaleByOptimisticGradientState": {"previous_gradient": FIRST},
    "ScaleByRmsState": {"nu": SECOND},
    "ScaleByRmsWithCountState": {"nu": SECOND},
    "ScaleByRStdDevState": {"mu": FIRST, "nu": SECOND},
    "ScaleByRStdDevWithCountState": {"mu": FIRST, "nu": SECOND},
    "ScaleByRssState": {"sum_of_squares": SECOND},
    "ScaleByRpropState": {"step_sizes": "invariant", "prev_updates": ("grad", "update")},
    # Squares of preconditioned updates: unsigned, of order 0.
    "ScaleByAdaDeltaState": {"e_g": SECOND, "e_x": "invariant"},
    "LookaheadState": {},
    "InjectHyperparamsState": {"hyperparams": "none"},
    "InjectStatefulHyperparamsState": {"hyperparams": "none", "hyperparams_states": "none"},
    "AddNoiseState": {"rng_key": "none"},
    "FactoredState": {"v_row": SECOND, "v_col": SECOND, "v": SECOND},
    "ScaleByNovogradState": {"mu": "update", "nu": SECOND},
    "ScaleBySM3State": {"mu": SECOND, "nu": "update"},
    "ScaleByLBFGSState": {
        "params": "param", "updates": FIRST, "diff_params_memory": "param_diff", "diff_updates_memory": FIRST,
        "weights_memory": "none",
    },
    "ScaleByBacktrackingLinesearchState": {"grad": "grad"},
    "BacktrackingLinesearchInfo": {},
    "ScaleByZoomLinesearchState": {"grad": "grad"},
    "ZoomLinesearchInfo": {},
    "ZeroNansState": {"found_nan": "none"},
    "SnapshotState": {"measurement": "none"},
    "MonitorState": {"measurements": "none", "measure_states": "none"},
}  # fmt: skip

_CONTRIB: dict[str, dict[str, Any]] = {
    # Scalars over all leaves (distances, norms) are those of the old model until steps renew them.
    "DAdaptAdamWState": {"exp_avg": FIRST, "exp_avg_sq": SECOND, "grad_sum": FIRST},
    # The reward is a product of gradient and way: neither scales it.
    "COCOBState": {
        "init_particles": "param", "cumulative_gradients": FIRST, "scale": "grad_abs", "subgradients": "grad_abs",
        "reward": "invariant",
    },
    "DoGState": {"init_params": "param"},
    "DoWGState": {"init_params": "param"},
    "MadgradState": {"grad_sum_sq": SECOND, "s": FIRST, "x0": "param"},
    "MechanicState": {"r": "none", "m": "none", "v": "none", "s": "none", "x0": "param"},
    "MomoAdamState": {"exp_avg": FIRST, "exp_avg_sq": SECOND},
    "MomoState": {"exp_avg": FIRST},
    "ProdigyState": {"exp_avg": FIRST, "exp_avg_sq": SECOND, "grad_sum": FIRST, "params0": "param"},
    "MuonState": {"mu": FIRST, "ns_coeffs": "none"},
    "ReduceLROnPlateauState": {},
    "ScaleByAdemamixState": {"m1": FIRST, "m2": FIRST, "nu": SECOND},
    "ScaleBySimplifiedAdEMAMixState": {"m": FIRST, "n": SECOND},
    "GaLoreState": {"projector": "invariant"},
    "HutchinsonState": {"key": "none"},
    "SAMState": {"cache": "param"},
    "ScheduleFreeState": {"z": "param"},
    # Second derivatives scale as squares of first ones do.
    "SophiaState": {"mu": FIRST, "nu": "grad_sq"},
}  # fmt: skip

# How slots lie that do not mirror their parameter, and what has to be made anew beside them: L-BFGS says nothing of
# another function, a line search would take the cached loss for that of the edited model, and a projector that started
# anew makes updates of zero until its count says that it is due.
_TRAITS: dict[str, dict[str, Any]] = {
    "FactoredState": {"layout": FACTORED},
    "GaLoreState": {"layout": PROJECTED, "restarts": {"count": "reshape"}},
    "ScaleByLBFGSState": {"layout": STACKED, "restarts": {"count": "unpreserved", "weights_memory": "unpreserved"}},
    "ScaleByNovogradState": {"layout": PER_LEAF},
    "ScaleBySM3State": {"layout": PER_AXIS},
    "ScaleByBacktrackingLinesearchState": {"restarts": {"value": "edit"}},
    "ScaleByZoomLinesearchState": {"restarts": {"value": "edit"}},
}

# Some states are not in optax's public namespace, but in that of a function's module.
_FUNCTIONS = (
    (optax, ("scale_by_adam", "scale_by_factored_rms", "scale_by_backtracking_linesearch")),
    (contrib, ("cocob", "galore", "sam", "sophia")),
)
_MODULES = [optax, contrib, optax.transforms] + [
    sys.modules[getattr(module, name).__module__]
    for module, names in _FUNCTIONS
    for name in names
    if hasattr(module, name)
]

for _name, _fields in (_OPTAX | _CONTRIB).items():
    _state = next((getattr(module, _name) for module in _MODULES if hasattr(module, _name)), None)
    if _state is not None:  # older releases lack some
        register_slot(_state, **_TRAITS.get(_name, {}), **_fields)
