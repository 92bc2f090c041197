"""Surgeries of the catalogue x optimizers x rules: parameters and slots are what NumPy and mapped runs say."""

from __future__ import annotations

import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks import testing
from flax_surgery_hooks.errors import SurgeryError
from flax_surgery_hooks.testing import streams
from flax_surgery_hooks.testing.edits import SMALL
from flax_surgery_hooks.testing.surgeries import REPRESENTATIVES, complaints

ROWS = tuple(testing.OPTIMIZERS[name] for name in REPRESENTATIVES)
OF_THE_OPTIMIZER = ("edit_optimizer", "edit_slots")
"""What a surgery has that leaves parameters alone."""
OF_OTHER_SIZES = ("GrowVocab", "MergeUnits", "ReplaceHead", "Shrink")
"""What leaves kernels of sizes that the table has not: `test_width` and `test_resize` have their laws."""
RECORDED = streams.params_at(streams.STEPS, SMALL)["kernel"]


@pytest.fixture(autouse=True)
def no_warnings_from_optax():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def of_a_run(surgery):
    """Whether it puts what it remembers of a run into a leaf, so that `operate`, which has no run, cannot use it."""
    return hasattr(surgery, "init_memory") and not getattr(surgery, "starts_anew", False)


def test_every_surgery_of_the_catalogue_that_edits_parameters_has_a_row():
    made = {name: getattr(fsh.surgeries, name) for name in fsh.surgeries.__all__}
    edits = {
        name
        for name, one in made.items()
        if not any(hasattr(one, method) for method in OF_THE_OPTIMIZER) and not of_a_run(one)
    }
    rows = (getattr(row.surgery, "surgery", row.surgery) for row in testing.SURGERIES.values())
    missing = edits - {*OF_OTHER_SIZES} - {type(surgery).__name__ for surgery in rows}
    assert not missing, f"add a row to flax_surgery_hooks/testing/surgeries.py for: {', '.join(sorted(missing))}"
    assert len(edits) >= 6


@pytest.mark.parametrize("rule", testing.SURGERIES["Scale"].rules)
@pytest.mark.parametrize("name", testing.SURGERIES)
def test_surgeries_obey_the_laws(name, rule):
    row = testing.SURGERIES[name]
    assert rule in row.rules
    assert list(complaints(row, ROWS, rule)) == []


def test_the_recorded_kernel_shows_what_surgeries_do():
    clips = testing.SURGERIES["ClipNorm_axis"].edit
    assert 0 < np.sum(clips.factor == 1) < clips.factor.size, "some columns are too large, not all"
    assert np.ptp(testing.SURGERIES["Normalize_axis"].edit.factor) > 0.1
    assert np.all(testing.SURGERIES["Noise"].edit.offset != testing.SURGERIES["Noise_absolute"].edit.offset)
    for name in ("SET", "RigL"):
        row = testing.SURGERIES[name].edit
        zeros = np.sum(row.params(RECORDED) == 0)
        assert 6 < zeros < 12, "some are kept, some dropped, some grown"
        assert 0 < np.sum(row.fresh) < zeros


# A law that cannot fail would be none.


def changed(name: str, **said):
    """A row of the table whose oracle says something else."""
    row = testing.SURGERIES[name]
    return dataclasses.replace(row, oracle=lambda kernel: {**row.oracle(kernel), **said})


def test_other_parameters_are_found():
    of_rows = dataclasses.replace(
        testing.SURGERIES["Normalize_axis"],
        oracle=lambda kernel: {"factor": 2 / np.sqrt((kernel**2).sum(axis=1, keepdims=True)), "wrong_share": 2.0},
    )
    for wrong in (
        of_rows,
        changed("ClipNorm", factor=1.0),
        changed("Noise", offset=0.0),
        changed("Assign", constant=1),
    ):
        with pytest.raises(AssertionError, match="Mismatched elements"):
            testing.check_surgery(wrong, ["momentum"])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_other_shares_are_found_under_transport(share):
    wrong = changed("Scale", share=share)
    with pytest.raises(AssertionError, match=r"^Scale under transport: adam: ScaleByAdamState\.mu.* is not exact"):
        testing.check_surgery(wrong, ["adam"])
    assert list(complaints(wrong, ROWS[1:2], "carry")) == [], "carried slots know of no shares"


def test_history_that_there_is_none_is_found():
    kernel = np.arange(12).reshape(SMALL)
    kept = changed("Assign", source=kernel, factor=0.0, offset=testing.SURGERIES["Assign"].edit.constant)
    assert any("mu" in problem for problem in complaints(kept, ROWS[1:2], "carry"))
    lost = changed("Noise", source=np.full(SMALL, -1), constant=testing.SURGERIES["Noise"].edit.params(RECORDED))
    assert any("mu" in problem for problem in complaints(lost, ROWS[1:2], "carry"))


def test_weights_that_are_dropped_keep_their_history_and_grown_ones_have_none():
    dropped = testing.SURGERIES["Prune"].edit.offset != 0
    anew = changed("Prune", source=np.where(dropped, -1, np.arange(12).reshape(SMALL)), like="reinitialise")
    assert any("mu" in problem for problem in complaints(anew, ROWS[1:2], "carry"))
    grown = testing.SURGERIES["RigL"].edit.fresh
    assert grown.any()
    kept = changed("RigL", source=np.arange(12).reshape(SMALL), offset=testing.SURGERIES["RigL"].edit.offset)
    assert any("mu" in problem for problem in complaints(kept, ROWS[1:2], "carry"))


def test_an_oracle_without_a_mistake_is_none():
    row = changed("Scale", wrong_share=-2.0)
    assert any("would not show a mistake" in problem for problem in complaints(row, ROWS[1:2], "transport"))


def test_a_surgery_that_changes_slots_again_is_found():
    row = dataclasses.replace(testing.SURGERIES["Scale"], idempotent=True)
    assert list(complaints(row, ROWS[1:2], "transport")) == [
        "adam: idempotent: [0].mu['kernel'] changes",
        "adam: idempotent: [0].nu['kernel'] changes",
    ]


def test_a_norm_that_is_not_a_constant_is_an_error():
    mixing = dataclasses.replace(
        testing.SURGERIES["Normalize"], surgery=lambda kernel: kernel / jnp.linalg.norm(kernel), rules=("transport",)
    )
    with pytest.raises(SurgeryError, match="stop_gradient"):
        testing.check_surgery(mixing, ["adam"])
