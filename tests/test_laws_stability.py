"""After an edit training goes on: nothing drifts, nothing stops, nothing is compiled again. Float32."""

from __future__ import annotations

import subprocess
import sys
import warnings

import jax.numpy as jnp
import pytest

from flax_surgery_hooks import testing
from flax_surgery_hooks.testing import stability
from flax_surgery_hooks.testing.edits import SMALL

RULES = ("transport", "carry")
NAMES = (
    "adagrad", "adam", "adamax", "ademamix", "amsgrad", "lion", "madgrad", "MultiSteps", "muon", "nadamw", "prodigy",
    "rmsprop_momentum", "schedule_free_adamw", "yogi",
)  # fmt: skip
MIRRORED = tuple(testing.OPTIMIZERS[name] for name in NAMES if name in testing.OPTIMIZERS)
STEPPING = ("adam", "adafactor", "galore", "novograd", "sm3", "rmsprop")
FIRST_ORDER = tuple(testing.OPTIMIZERS[name] for name in STEPPING if name in testing.OPTIMIZERS)


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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", stability.IDEMPOTENT)
def test_idempotent_edits_change_no_slot_twice(name, rule):
    stability.check_idempotent(MIRRORED, stability.IDEMPOTENT[name], rule)


def test_an_edit_that_goes_on_scaling_is_found():
    with pytest.raises(AssertionError, match=r"the second fire changes .*mu"):
        stability.check_idempotent(MIRRORED[:2], lambda kernel: kernel * 0.5, "transport")


@pytest.mark.parametrize("rule", RULES)
def test_untouched_elements_keep_their_slots_bitwise(rule):
    stability.check_untouched(MIRRORED, rule)


@pytest.mark.parametrize("factor", [1e-10, 1e-5, 1e5, 1e10])
def test_extreme_scales_neither_lose_nor_overflow_second_moments(factor):
    stability.check_extreme(MIRRORED, factor)


def test_factors_whose_square_is_taken_first_are_found():
    def squared_first(slot, *, kind, **_):
        return slot * (jnp.float32(1e25) ** 2) if kind == "grad_sq" else slot

    with pytest.raises(AssertionError, match=r"\.nu.* becomes 0 or infinite at a factor of 1e-10"):
        stability.check_extreme(MIRRORED[1:2], 1e-10, squared_first)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("row", FIRST_ORDER, ids=lambda row: row.name)
def test_the_next_update_goes_on(row, rule):
    stability.check_goes_on(row, lambda kernel: kernel.at[0].set(0.5), rule)
    stability.check_goes_on(row, lambda kernel: jnp.concatenate([kernel, jnp.ones(SMALL)]), rule, same_shape=False)


def test_a_stop_is_found():
    """Second moments so large that no update is left, as a projector of zeros would leave none."""

    def stop(slot, *, kind, **_):
        return jnp.where(slot >= 0, jnp.inf, slot) if kind == "grad_sq" else slot

    with pytest.raises(AssertionError, match="adam: the next update is 0 somewhere"):
        stability.check_goes_on(testing.OPTIMIZERS["adam"], lambda kernel: kernel * 2, stop)


def test_a_second_compilation_is_found():
    with pytest.raises(AssertionError, match="adam: the next update is compiled again"):
        stability.check_goes_on(testing.OPTIMIZERS["adam"], lambda kernel: kernel[::2], "carry")
