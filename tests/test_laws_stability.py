"""After an edit training goes on: nothing drifts, nothing stops, nothing is compiled again. Float32.

Optimizers are compiled together, in two groups; each has its own tests, for it may be exempt from a law.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import warnings

import jax.numpy as jnp
import optax
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks import testing
from flax_surgery_hooks.testing import stability
from flax_surgery_hooks.testing.edits import SMALL
from flax_surgery_hooks.testing.rows import RULES, Exempt

LAID = {
    "adafactor", "adafactor_momentum", "adafactor_plain", "adafactor_unfactored", "backtracking", "cocob", "flatten",
    "galore", "hutchinson_estimator_diag_hessian", "lbfgs", "lbfgs_linesearch", "monitor", "novograd", "sam", "sm3",
    "snapshot", "sophia", "zero_nans",
}  # fmt: skip
"""Optimizers whose slots lie otherwise than their parameters, compiled apart from the rest."""
PENDING = {"measure_with_ema"}
"""Their slots are not moved, which tests/test_laws.py says."""
READY = tuple(row for name, row in testing.OPTIMIZERS.items() if name not in PENDING)
GROUPS = tuple(tuple(row for row in READY if (row.name in LAID) == laid) for laid in (False, True))
ADAM = (testing.OPTIMIZERS["adam"],)


@pytest.fixture(autouse=True)
def no_warnings_from_optax():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_the_package_imports_its_laws_only_when_asked():
    code = "import sys, flax_surgery_hooks; print('flax_surgery_hooks.testing' in sys.modules, 'pytest' in sys.modules)"
    asked = code.replace("flax_surgery_hooks; print", "flax_surgery_hooks.testing; print")

    def said(program):
        return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    assert [said(code), said(asked)] == ["False False\n", "True False\n"]


# The laws, for every optimizer


@functools.cache
def group(place: int, law: str, rule: str):
    """Findings, or the error that stands for all of them: it would be the same at each further try."""
    try:
        return stability.findings(GROUPS[place], law, rule)
    except Exception as error:
        return error


def found_of(name: str, law: str, rule: str):
    found = group(int(name in LAID), law, rule)
    if isinstance(found, Exception):
        raise found
    return found[name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("law", testing.STABILITY)
@pytest.mark.parametrize("name", [row.name for row in READY])
def test_training_goes_on(name, law, rule):
    """A law that a row is exempt from fails there, in each of the edits that the row names."""
    assert stability.judge(testing.OPTIMIZERS[name], law, rule, found_of(name, law, rule)) == []


def test_exemptions_are_of_laws_edits_and_rules_that_there_are():
    exempt = [one for row in testing.OPTIMIZERS.values() for one in row.exempt]
    assert exempt
    for one in exempt:
        assert one.why
        assert one.rules
        assert set(one.rules) <= set(RULES)
        assert set(one.edits) <= set(testing.STABILITY[one.law].edits)


def test_an_edit_run_by_itself_drifts_no_more_than_one_compiled_with_the_step():
    """The laws run edits under jit; by itself an edit runs in programs of its own."""
    state = stability.trained(ADAM)
    state = once = fsh.bind(params=state.params, opt_state=state.opt_state, tx=state.tx)
    for surgery in testing.STABILITY["idempotent"].edits.values():
        for rule in RULES:
            once, _ = fsh.operate(state, surgery, params="kernel", opt_state=rule)
            twice, _ = fsh.operate(once, surgery, params="kernel", opt_state=rule)
            assert not list(stability.changed(once.opt_state, twice.opt_state))


# A law that cannot fail would be none.


def problems(name: str, rule, rows=ADAM, **edits):
    law = testing.STABILITY[name]
    law = dataclasses.replace(law, edits=edits or law.edits)
    return [f"{one.field} {one.says}" for one in stability.problems(rows, name, law, rule)[rows[0].name]]


def test_an_edit_that_goes_on_scaling_is_found():
    assert problems("idempotent", "transport", halve=lambda kernel: kernel * 0.5) == [
        "[0].mu['kernel'] changes",
        "[0].nu['kernel'] changes",
    ]


def test_slots_that_change_though_their_elements_do_not_are_found():
    def nudged(slot, **_):
        return slot * jnp.float32(1 + 2e-7)

    assert "[0].mu['kernel'] changes" in problems("identity", nudged)
    assert "[0].mu['kernel'] changes" in problems("untouched", nudged)
    assert problems("untouched", "reset") != []
    assert problems("untouched", lambda slot, **_: slot.at[0].set(0)) == [], "the first row is touched"


def test_factors_whose_square_is_taken_first_are_found():
    def squared_first(slot, *, kind, **_):
        return slot * (jnp.float32(1e25) ** 2) if kind == "grad_sq" else slot

    assert set(problems("extreme", squared_first)) == {"[0].nu['kernel'] becomes 0 or infinite"}


def test_a_stop_is_found():
    """Second moments so large that no update is left, as a projector of zeros would leave none."""

    def stop(slot, *, kind, **_):
        return jnp.where(slot >= 0, jnp.inf, slot) if kind == "grad_sq" else slot

    halve = {"halve": lambda kernel: kernel / 2}
    assert problems("onward", stop, **halve) == ["updates are 0 somewhere, where they would not be without the edit"]


def test_updates_that_are_not_finite_are_found():
    def broken(slot, *, kind, **_):
        return slot * jnp.nan if kind == "grad" else slot

    assert problems("onward", broken, halve=lambda kernel: kernel / 2) == ["updates are not finite"]


def test_an_optimizer_that_never_moves_is_found():
    rows = (testing.OptimizerRow("still", lambda: optax.chain(optax.trace(0.9), optax.scale(0.0))),)
    assert set(problems("onward", "carry", rows)) == {
        "updates do not move the whole kernel within 5 steps even without an edit"
    }


def test_a_second_compilation_is_found():
    """Of an optimizer whose step turns what it counts into another dtype, once the kernel has grown."""

    def update(updates, state, params=None):
        return updates, state if params["kernel"].shape == SMALL else optax.ScaleByScheduleState(jnp.int16(1))

    counting = optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.int32(1)), update)
    rows = (testing.OptimizerRow("counting", lambda: optax.chain(counting, optax.scale(-0.1))),)
    assert problems("onward", "carry", rows) == ["updates are compiled again"]


def test_a_law_that_fails_or_holds_unexpectedly_is_named():
    row = testing.OPTIMIZERS["backtracking"]
    with pytest.raises(AssertionError, match=r"^backtracking, identity \(an edit .*\[1\]\.value changes"):
        testing.check_stability(dataclasses.replace(row, exempt=()))
    needless = Exempt("identity", "of no reason", "*.mu*")
    with pytest.raises(AssertionError, match=r"after scale by 1 under transport the law holds: remove \*\.mu\* from"):
        testing.check_stability(dataclasses.replace(ADAM[0], exempt=(needless,)))
