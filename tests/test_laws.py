"""Optimizers x edits x rules: each slot after an edit is that of the same optimizer run on mapped gradients, or lies
where its element lies. The laws are those of `flax_surgery_hooks.testing`.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks import testing
from flax_surgery_hooks.errors import SlotError
from flax_surgery_hooks.testing import namespace, streams
from flax_surgery_hooks.testing.edits import row as edit_row

RULES = ("transport", "carry")
RESHAPING = ("pad", "slice", "duplicate_in", "duplicate_out", "duplicate_unequal")
GALORE = ("ScaleByAdamState.mu", "ScaleByAdamState.nu", "GaLoreState.projector")
LBFGS = ("ScaleByLBFGSState.diff_params_memory", "ScaleByLBFGSState.diff_updates_memory")
PENDING = {"measure_with_ema": "outside `optax.monitor` it looks like an average that mirrors nothing"}
"""Optimizers whose slots are not moved yet: an error, not a guess."""
KNOWN: dict[tuple[str, str, str], str] = {}
"""(optimizer, edit, rule) where a law does not hold that should, and why."""
RESTARTED = {
    *(("galore", field, edit, rule) for field in GALORE for edit in RESHAPING for rule in RULES),
    *(
        (name, field, edit, "carry")
        for name in ("lbfgs", "lbfgs_linesearch")
        for field in LBFGS
        for edit in testing.EDITS
    ),
}
"""(optimizer, "Class.field", edit, rule) of slots that cannot be moved and start anew."""
LAID = (
    {
        "adafactor", "backtracking", "cocob", "flatten", "galore", "hutchinson_estimator_diag_hessian", "lbfgs",
        "monitor", "novograd", "sam", "sm3", "snapshot", "sophia", "zero_nans",
    },
    {"adafactor_momentum", "lbfgs_linesearch"},
    {"adafactor_plain"},
    {"adafactor_unfactored"},
)  # fmt: skip
"""Optimizers whose slots lie otherwise than their parameters, or that bring in new kinds, compiled in groups apart from
the rest. Behind `monitor`, whose state has more leaves once it has been updated, slots are not given their right shape.
"""
READY = tuple(row for name, row in testing.OPTIMIZERS.items() if name not in PENDING)


@pytest.fixture(autouse=True)
def no_warnings_from_optax():
    """Of dtypes of scalars in float64, and of deprecated arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The table is complete.


def test_every_optimizer_of_optax_has_a_row():
    missing = set(namespace.makers()) - set(testing.OPTIMIZERS) - set(namespace.BLOCKS)
    assert not missing, f"add a row to flax_surgery_hooks/testing/optimizers.py for: {', '.join(sorted(missing))}"


def test_a_new_optimizer_would_be_named(monkeypatch):
    def brand_new(learning_rate: float) -> optax.GradientTransformation:
        return optax.sgd(learning_rate)

    def unannotated(learning_rate):
        return optax.GradientTransformation(lambda params: (), lambda updates, state, params=None: (updates, state))

    monkeypatch.setattr(optax, "brand_new", brand_new, raising=False)
    monkeypatch.setattr(optax.contrib, "unannotated", unannotated, raising=False)
    monkeypatch.setattr(optax.contrib, "no_optimizer", lambda: 3, raising=False)
    with pytest.raises(AssertionError, match=r"for: brand_new, unannotated\n"):
        test_every_optimizer_of_optax_has_a_row()


def test_names_without_a_row_have_a_reason_that_is_true():
    assert not set(namespace.BLOCKS) & set(testing.OPTIMIZERS)
    for name, why in namespace.BLOCKS.items():
        if why.startswith("within "):
            assert why.removeprefix("within ") in testing.OPTIMIZERS or not hasattr(optax.contrib, name), name
    makers, arguments = namespace.makers(), {
        "adaptive_grad_clip": (1.0,), "add_decayed_weights": (0.1,), "clip": (1.0,), "clip_by_block_rms": (1.0,),
        "clip_by_global_norm": (1.0,), "scale": (1.0,), "scale_by_learning_rate": (1.0,),
        "stateless": (lambda updates, params: updates,), "stateless_with_tree_map": (lambda update, param: update,),
        "with_extra_args_support": (optax.identity(),),
    }  # fmt: skip
    arrayless = [name for name, why in namespace.BLOCKS.items() if why == "keeps no array" and name in makers]
    for name in arrayless:
        assert not jax.tree.leaves(makers[name](*arguments.get(name, ())).init({"w": jnp.ones(2)})), name
    assert len(arrayless) >= 15


def test_the_table_is_as_large_as_promised():
    assert len(READY) >= 60
    assert set(PENDING) - set(testing.OPTIMIZERS) <= {"galore", "monitor", "measure_with_ema"}, "not in this optax"


# The laws.


def batch_of(name: str) -> int:
    return next((place for place, names in enumerate(LAID, start=1) if name in names), 0)


@functools.cache
def batch(edit: str, rule: str, place: int):
    """Findings, or the error that stands for all of them: it would be the same at each further try."""
    rows = tuple(row for row in READY if batch_of(row.name) == place)
    try:
        return testing.findings(rows, testing.EDITS[edit], rule)
    except Exception as error:
        return error


def finding_of(name: str, edit: str, rule: str):
    found = batch(edit, rule, batch_of(name))
    if isinstance(found, Exception):
        raise found
    return found[name]


def cells(edit: str, rule: str):
    return {row.name: finding_of(row.name, edit, rule) for row in READY}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("edit", testing.EDITS)
@pytest.mark.parametrize("name", [row.name for row in READY])
def test_slots_follow(edit, rule, name):
    finding = finding_of(name, edit, rule)
    if (name, edit, rule) in KNOWN:
        assert finding.problems, f"holds now, remove it from KNOWN: {KNOWN[name, edit, rule]}"
        return
    assert finding.problems == ()
    assert finding.undetected == (), "mistakes in the factors or places must show"


@pytest.mark.parametrize("edit", ["mask", "pad"])
def test_second_moments_may_start_as_the_optimizer_starts_them(edit):
    rows = tuple(row for row in READY if row.name in ("adagrad", "adam", "prodigy", "rmsprop_momentum"))
    finding = testing.findings(rows, testing.EDITS[edit], "transport", "init")
    assert {name: found.problems for name, found in finding.items()} == {row.name: () for row in rows}
    meant = testing.findings(rows, testing.EDITS[edit], "transport", "mean")
    assert all(found.checked for found in meant.values())


@pytest.mark.parametrize("name", sorted(set(PENDING) & set(testing.OPTIMIZERS)))
def test_other_layouts_are_errors_until_they_are_moved(name):
    with streams.enable_x64(True):
        params = streams.mapped_params(0, (3, 4))
        tx = testing.OPTIMIZERS[name].make()
        bound = fsh.bind(params=params, opt_state=tx.init(params), tx=tx)
        with pytest.raises(SlotError):
            fsh.operate(bound, lambda kernel: kernel * 2, params="kernel", opt_state="transport")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("edit", testing.EDITS)
def test_nothing_restarts_but_what_is_listed(edit, rule):
    found = {(name, field, edit, rule) for name, one in cells(edit, rule).items() for field in one.restarted}
    assert found == {cell for cell in RESTARTED if cell[0] in testing.OPTIMIZERS and cell[2:] == (edit, rule)}


def test_the_law_is_the_same_for_one_optimizer_alone():
    """Side by side they are compiled together: that changes nothing."""
    for name in ("adam", "prodigy"):
        testing.check(testing.OPTIMIZERS[name], testing.EDITS["scale_rows"], "transport")


# A law that cannot fail would be none.


def test_a_wrong_factor_is_named():
    right = testing.EDITS["scale_rows"]
    wrong = dataclasses.replace(right, share=right.wrong[1], wrong=(right.source, right.share))
    with pytest.raises(
        AssertionError, match=r"^adam after scale_rows under transport: ScaleByAdamState\.mu.* is not exact"
    ):
        testing.check(testing.OPTIMIZERS["adam"], wrong, "transport")


def test_a_wrong_place_is_named():
    right = testing.EDITS["permute"]
    wrong = edit_row("permute", lambda kernel: kernel[jnp.array([2, 0, 1])], np.arange(12).reshape(3, 4)[[1, 2, 0]])
    with pytest.raises(AssertionError, match="permute"):
        testing.check(testing.OPTIMIZERS["adam"], wrong, "carry")
    testing.check(testing.OPTIMIZERS["adam"], right, "carry")


def test_a_law_by_kind_is_not_claimed_where_equality_holds():
    """Each exception of the table is needed: without it some cell fails."""
    rows = [row for row in READY if row.holds]
    bare = tuple(dataclasses.replace(row, holds=()) for row in rows)
    needed = set()
    for edit in ("scale_rows", "mask", "duplicate_in", "slice"):
        needed |= {
            name for name, one in testing.findings(bare, testing.EDITS[edit], "transport").items() if one.problems
        }
    assert {row.name for row in rows} - needed == set()
