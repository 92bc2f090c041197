"""Slots after an edit are what the optimizer would hold, had it trained the edited network from the start. In
float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mlp
import numpy as np
import optax
import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks import checks, lineage

EVEN = (mlp.even([0, 1, 2, 3] * 2), mlp.even([0, 1, 2, 3, 4, 5] * 3))
RAGGED = (mlp.even([0, 1, 2, 3, 1, 1, 0]), mlp.even([5, 4, 3, 2, 1, 0, 0]))
UNEQUAL = (
    mlp.Widening(np.array([0, 1, 2, 3, 0, 1]), np.array([0.7, 1.0, 1.0, 1.0, 0.3, 0.0])),
    mlp.Widening(np.array([0, 1, 2, 3, 4, 5, 5]), np.array([1.0, 1, 1, 1, 1, 0.1, 0.9])),
)


@dataclasses.dataclass(frozen=True)
class Preserving:
    """An edit as a surgery class that declares what it preserves."""

    edit: Callable[[mlp.Params], mlp.Params]
    preserves = "function"

    def __call__(self, leaves: Any) -> Any:
        return self.edit(leaves)


@dataclasses.dataclass(frozen=True)
class Folding(Preserving):
    back: Callable[[mlp.Params], mlp.Params] = mlp.average_blocks

    def fold_back(self, leaves: Any) -> Any:
        return self.back(leaves)


def widening(pair: tuple[mlp.Widening, mlp.Widening]) -> Callable[[mlp.Params], mlp.Params]:
    return functools.partial(mlp.widen, first=pair[0], second=pair[1])


def narrowing(pair: tuple[mlp.Widening, mlp.Widening]) -> Callable[[mlp.Params], mlp.Params]:
    return functools.partial(mlp.narrow, first=pair[0], second=pair[1])


EDITS = {
    "scale": Preserving(mlp.rescale),
    "permute": Preserving(mlp.permute),
    "slice": Preserving(mlp.drop_dead_unit),
    "duplicate": Preserving(widening(EVEN)),
    "duplicate_ragged": Preserving(widening(RAGGED)),
    "duplicate_folded": Folding(widening(EVEN), narrowing(EVEN)),
    "split_unequally": Folding(widening(UNEQUAL), narrowing(UNEQUAL)),
    "blocks": Folding(mlp.double_in_blocks, mlp.average_blocks),
}
CHANGES_FACTORS = ("scale", "duplicate", "duplicate_ragged", "duplicate_folded", "split_unequally", "blocks")


@functools.cache
def train() -> tuple[Any, mlp.Run]:
    """A state after some steps of Adam, and the points and batches of those steps."""
    state = fsh.TrainState.create(
        apply_fn=None, params=mlp.make_params(), tx=optax.chain(optax.scale_by_adam(mlp.B1, mlp.B2), optax.scale(-0.05))
    )
    points, batches = [], mlp.batches()
    for batch in batches:
        points.append(state.params)
        state = state.apply_gradients(grads=mlp.gradient(state.params, batch))
    return state, mlp.Run(points, batches)


@pytest.fixture
def trained(x64) -> tuple[Any, mlp.Run]:
    return train()


@functools.cache
def transported(name: str) -> Any:
    """The trained state after an edit of the table. With fresh="init", what has had no gradient (a copy with share 0)

    starts at the exact 0 rather than at the safer mean.
    """
    return fsh.operate(train()[0], EDITS[name], fresh="init")[0]


def moments(state: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    adam = state.opt_state[0]
    return jax.tree.map(np.asarray, adam.mu), jax.tree.map(np.asarray, adam.nu)


def error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest difference, relative to the largest value of each leaf."""
    return max(np.abs(found[n] - expected[n]).max() / max(np.abs(expected[n]).max(), 1e-300) for n in expected)


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_the_table_preserve_the_function(name, trained):
    _, run = trained
    for point, batch in zip(run.points, run.batches, strict=True):
        np.testing.assert_allclose(mlp.loss(EDITS[name].edit(point), batch), mlp.loss(point, batch), rtol=1e-12)


@pytest.mark.parametrize("name", EDITS)
def test_transported_moments_equal_rebuilt_ones(name, trained):
    _, run = trained
    mu, nu = moments(transported(name))
    expected_mu, expected_nu = mlp.rebuilt(run, EDITS[name].edit)
    assert error(mu, expected_mu) < 1e-12
    assert error(nu, expected_nu) < 1e-12


@pytest.mark.parametrize("name", CHANGES_FACTORS)
def test_wrong_factors_are_rejected_by_the_same_oracle(name, trained):
    state, run = trained
    edit = EDITS[name].edit
    expected_mu, expected_nu = mlp.rebuilt(run, edit)
    old_mu, old_nu = moments(state)
    like_params = jax.tree.map(np.asarray, edit(jax.tree.map(jnp.asarray, old_mu)))
    assert error(like_params, expected_mu) > 1e-2
    mu, _ = moments(transported(name))
    if name not in ("blocks", "split_unequally"):
        carried, _ = fsh.operate(state, EDITS[name], opt_state="carry")
        assert error(moments(carried)[0], expected_mu) > 1e-2
        assert error(moments(carried)[1], expected_nu) > 1e-2
    share = {n: np.where(mu[n] == 0, 1.0, 1.1) for n in mu}
    assert error({n: mu[n] * share[n] for n in mu}, expected_mu) > 1e-2
    linear = {n: np.asarray(v) for n, v in edit(jax.tree.map(jnp.asarray, old_nu)).items()}
    assert error(linear, expected_nu) > 1e-2


@pytest.mark.parametrize("name", EDITS)
def test_a_transported_gradient_is_the_gradient_at_the_new_params(name, trained):
    state, run = trained
    batch = run.batches[0]
    plain = fsh.TrainState.create(apply_fn=None, params=state.params, tx=optax.sgd(0.1, momentum=0.0))
    plain = plain.replace(opt_state=plain.tx.update(mlp.gradient(plain.params, batch), plain.opt_state)[1])
    new, _ = fsh.operate(plain, EDITS[name])
    expected = jax.tree.map(np.asarray, mlp.gradient(new.params, batch))
    assert error(jax.tree.map(np.asarray, new.opt_state[0].trace), expected) < 1e-12


def test_padding_is_exact_where_there_is_history_and_zero_where_the_gradient_is(trained):
    state, run = trained
    new, record = fsh.operate(state, Preserving(mlp.pad_with_idle_units), fresh="init")
    mu, nu = moments(new)
    expected_mu, expected_nu = mlp.rebuilt(run, mlp.pad_with_idle_units)
    old = {"w1": np.s_[:, :4], "b1": np.s_[:4], "w2": np.s_[:4]}
    for name in expected_mu:
        where = old.get(name, np.s_[...])
        np.testing.assert_allclose(mu[name][where], expected_mu[name][where], rtol=1e-12, atol=1e-16)
        np.testing.assert_allclose(nu[name][where], expected_nu[name][where], rtol=1e-12, atol=1e-16)
    np.testing.assert_array_equal(expected_mu["w1"][:, 4:], 0.0)
    np.testing.assert_array_equal(mu["w1"][:, 4:], 0.0)
    assert np.abs(expected_mu["w2"][4:]).max() > 0, "new outgoing weights do have a gradient: no rule can know it"
    assert float(record.figures["params/fresh"]) == 5 * 2 + 2 + 2 * 6


def test_unequal_copies_without_fold_back_are_refused(trained):
    state, _ = trained
    with pytest.raises(fsh.errors.UnequalCopiesError, match="fold_back") as caught:
        fsh.operate(state, Preserving(widening(UNEQUAL)))
    assert "w3" in str(caught.value.path)


def test_a_fold_back_that_does_not_undo_the_edit_is_refused(trained):
    state, _ = trained
    wrong = Folding(mlp.double_in_blocks, lambda new: jax.tree.map(lambda leaf: 2 * leaf, mlp.average_blocks(new)))
    with pytest.raises(fsh.errors.FoldBackError, match="does not undo"):
        fsh.operate(state, wrong)


# Lineage: carried slots are the sources' own bits, whatever the coefficients.

LINEAGES: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "odd_scale": (lambda x: x * 0.3371, lambda s: s),
    "chain": (lambda x: ((x * 0.7) / 1.3) * 1.9 - 4.0, lambda s: s),
    "tiny": (lambda x: x * 1e-10, lambda s: s),
    "huge": (lambda x: x * 1e10, lambda s: s),
    "negative": (lambda x: -x / 3, lambda s: s),
    "by_element": (lambda x: x * (1.1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)), lambda s: s),
    "reverse": (lambda x: 0.77 * x[::-1], lambda s: s[::-1]),
    "transpose": (lambda x: x.T / 3, lambda s: s.T),
    "tile": (lambda x: jnp.concatenate([x, x], 1) * 0.9, lambda s: np.concatenate([s, s], 1)),
    "slice": (lambda x: x[1:, ::2] * 7, lambda s: s[1:, ::2]),
    "sort_rows": (lambda x: jnp.sort(x, 0), lambda s: s),
    "one_hot_matmul": (lambda x: jnp.eye(x.shape[0], dtype=x.dtype)[::-1] @ x, lambda s: s[::-1]),
    "through_bf16": (lambda x: (x.astype(jnp.bfloat16) * 1.3).astype(x.dtype), lambda s: s),
}


@pytest.mark.parametrize("moment_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", LINEAGES)
def test_carried_slots_are_the_bits_of_their_sources(name, moment_dtype):
    edit, expected = LINEAGES[name]
    values = jnp.arange(1.0, 36.0).reshape(5, 7) if name == "sort_rows" else None
    state = random_state((5, 7), moment_dtype, values)
    new, record = fsh.operate(state, lambda leaf: edit(leaf), opt_state="carry")
    for field in ("mu", "nu"):
        before, after = (np.asarray(getattr(s.opt_state[0], field)["w"]) for s in (state, new))
        np.testing.assert_array_equal(after, expected(before))
        assert after.dtype == before.dtype
    assert float(record.figures["slots/fresh"]) == 0


def random_state(shape: tuple[int, ...], moment_dtype: Any = jnp.float32, values: Any = None) -> Any:
    keys = jax.random.split(jax.random.key(3), 3)
    values = jax.random.normal(keys[0], shape) if values is None else values
    state = fsh.TrainState.create(apply_fn=None, params={"w": values}, tx=optax.adam(0.1, mu_dtype=moment_dtype))
    adam = state.opt_state[0]
    mu = jax.random.normal(keys[1], shape, adam.mu["w"].dtype)
    nu = jax.random.uniform(keys[2], shape, adam.nu["w"].dtype)
    adam = adam._replace(mu={"w": mu}, nu={"w": nu}, count=jnp.int32(7))
    return state.replace(opt_state=(adam, *state.opt_state[1:]))


def test_sort_moves_slots_with_their_weights():
    state = random_state((5, 7))
    new, _ = fsh.operate(state, lambda leaf: jnp.sort(leaf, 0) * 3)
    order = np.argsort(np.asarray(state.params["w"]), 0)
    np.testing.assert_array_equal(
        new.opt_state[0].mu["w"], np.take_along_axis(np.asarray(state.opt_state[0].mu["w"]), order, 0)
    )


# Every kind against the factors of a dense Jacobian.


def dense_factors(jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, coefficient and gradient share of each new element, from the whole matrix, by the definition."""
    source = np.abs(jacobian).argmax(1)
    coefficient = jacobian[np.arange(len(source)), source]
    squares = (jacobian**2).sum(0)
    share = np.where(coefficient == 0, 0, coefficient / np.where(squares == 0, 1, squares)[source])
    return source, coefficient, share


def kind_factor(kind: str, coefficient: np.ndarray, share: np.ndarray) -> np.ndarray:
    return {
        "param_diff": coefficient,
        "grad": share,
        "grad_sq": share**2,
        "grad_abs": np.abs(share),
        "update": np.sign(share),
        "invariant": np.ones_like(share),
    }[kind]


class Holding:
    """Optimizer states with one slot that nothing ever updates, so that the probe has no opinion of its kind."""

    classes: dict[str, type] = {}  # noqa: RUF012  # filled below

    @classmethod
    def tx(cls, kind: str) -> optax.GradientTransformation:
        state = cls.classes[kind]
        return optax.GradientTransformation(
            lambda params: state(jax.tree.map(jnp.zeros_like, params)),
            lambda updates, state, params=None: (updates, state),
        )


for _kind in ("param_diff", "grad", "grad_sq", "grad_abs", "update", "invariant"):
    Holding.classes[_kind] = type(f"Hold_{_kind}", (tuple,), {})
    from typing import NamedTuple

    Holding.classes[_kind] = NamedTuple(f"Hold_{_kind}", [("slot", Any)])
    fsh.register_slot(Holding.classes[_kind], slot=_kind)

FACTOR_EDITS = {
    "scale_rows": lambda x: x * jnp.asarray([0.5, -2.0, 3.0], x.dtype)[:, None],
    "duplicate": lambda x: jnp.concatenate([x, -x, x]) * 0.4,
    "pad": lambda x: jnp.pad(1.5 * x, ((0, 1), (2, 0))),
    "slice": lambda x: -x[:2] / 3,
}


@pytest.mark.parametrize("rule", ["transport", "carry"])
@pytest.mark.parametrize("name", FACTOR_EDITS)
@pytest.mark.parametrize("kind", Holding.classes)
def test_factors_of_every_kind(kind, name, rule, x64):
    edit = FACTOR_EDITS[name]
    values = np.random.default_rng(0).normal(size=(3, 4))
    slot = np.random.default_rng(1).random((3, 4)) + 0.1
    state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.asarray(values)}, tx=Holding.tx(kind))
    state = state.replace(opt_state=Holding.classes[kind]({"w": jnp.asarray(slot)}))
    new, _ = fsh.operate(state, lambda leaf: edit(leaf), opt_state=rule, fresh="init")
    jacobian = np.asarray(jax.jacrev(edit)(jnp.asarray(values))).reshape(-1, values.size)
    source, coefficient, share = dense_factors(jacobian)
    factor = kind_factor(kind, coefficient, share) if rule == "transport" else 1.0
    expected = np.where(coefficient == 0, 0.0, factor * slot.ravel()[source])
    np.testing.assert_allclose(np.asarray(new.opt_state.slot["w"]).ravel(), expected, rtol=1e-13)
    for other in Holding.classes:
        wrong = np.where(coefficient == 0, 0.0, kind_factor(other, coefficient, share))
        if rule == "transport" and not np.allclose(wrong, np.where(coefficient == 0, 0.0, factor)):
            assert not np.allclose(wrong * slot.ravel()[source], expected)


@pytest.mark.parametrize("rule", ["transport", "carry"])
def test_copies_of_the_params_move_like_the_params(rule, x64):
    """Schedule-free keeps an iterate z beside the params: an affine edit maps it as it maps them."""
    tx = optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1, b1=0.9)
    state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.asarray(np.linspace(1, 2, 6))}, tx=tx)
    state = state.apply_gradients(grads={"w": jnp.asarray(np.linspace(-1, 3, 6))})

    def edit(w):
        return jnp.concatenate([w[::-1] * 0.7 + 0.1, jnp.full(2, 9.0, w.dtype)])

    new, _ = fsh.operate(state, lambda leaf: edit(leaf), opt_state=rule)
    np.testing.assert_allclose(new.opt_state.z["w"], edit(state.opt_state.z["w"]), rtol=1e-14)


# Laws of single elements.


@pytest.mark.parametrize("rule", ["transport", "carry"])
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda w: jnp.clip(w, -0.5, 0.5), id="clip"),
        pytest.param(lambda w: jnp.maximum(w, 0.0), id="maximum"),
        pytest.param(lambda w: jnp.minimum(w, 0.3), id="minimum"),
        pytest.param(lambda w: jax.lax.clamp(-0.5, w, 0.5), id="clamp"),
        pytest.param(lambda w: jnp.where(jnp.abs(w) > 0.4, w, 0.0), id="prune"),
        pytest.param(fsh.surgeries.ClipNorm(1.0), id="clip_norm"),
    ],
)
def test_the_second_fire_of_an_idempotent_edit_changes_no_slot(edit, rule):
    state = random_state((6, 8))
    once, first = fsh.operate(state, edit, opt_state=rule)
    twice, second = fsh.operate(once, edit, opt_state=rule)
    assert float(first.figures["params/changed"]) > 0
    for before, after in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(before, after)
    assert float(second.figures["slots/changed"]) == 0


@pytest.mark.parametrize("rule", ["transport", "carry"])
def test_an_element_with_coefficient_one_keeps_its_slot_bitwise(rule):
    state = random_state((6, 8))
    new, _ = fsh.operate(state, lambda w: jnp.concatenate([w[:2] + 3.0, w[2:] * 0.3]), opt_state=rule)
    for field in ("mu", "nu"):
        before, after = getattr(state.opt_state[0], field)["w"], getattr(new.opt_state[0], field)["w"]
        np.testing.assert_array_equal(before[:2], after[:2])


@pytest.mark.parametrize("factor", [1e-10, 1e-5, 1e5, 1e10])
def test_extreme_scales_neither_zero_nor_overflow_second_moments(factor):
    state = random_state((6, 8))
    new, _ = fsh.operate(state, fsh.surgeries.Scale(factor), opt_state="transport")
    nu = np.asarray(state.opt_state[0].nu["w"], np.float64) / factor**2
    np.testing.assert_allclose(np.asarray(new.opt_state[0].nu["w"], np.float64), nu, rtol=1e-5)


@pytest.mark.parametrize("fresh", ["mean", "init"])
def test_fresh_second_moments_against_numpy(fresh):
    """Column 1 has survivors, column 0 has none and takes the leaf's mean; first moments start at zero."""
    state = random_state((4, 3))
    dead = np.zeros((4, 3), bool)
    dead[:, 0] = dead[2:, 1] = True
    new, record = fsh.operate(state, lambda w: jnp.where(dead, 0.0, w), fresh=fresh)
    nu = np.asarray(state.opt_state[0].nu["w"])
    expected = nu.copy()
    expected[2:, 1] = nu[:2, 1].mean() if fresh == "mean" else 0.0
    expected[:, 0] = nu[~dead].mean() if fresh == "mean" else 0.0
    np.testing.assert_allclose(new.opt_state[0].nu["w"], expected, rtol=1e-6)
    np.testing.assert_array_equal(new.opt_state[0].mu["w"], np.where(dead, 0.0, state.opt_state[0].mu["w"]))
    assert float(record.figures["params/fresh"]) == dead.sum()
    assert int(new.opt_state[0].count) == 7


def test_a_leaf_without_survivors_starts_from_its_own_mean():
    state = random_state((4, 3))
    new, _ = fsh.operate(state, fsh.surgeries.Assign(0.5))
    np.testing.assert_allclose(new.opt_state[0].nu["w"], np.full((4, 3), state.opt_state[0].nu["w"].mean()), rtol=1e-6)


# What an edit may contain.

MIXES = {
    "average_pairs": lambda w: (w[::2] + w[1::2]) / 2,
    "matmul": lambda w: w @ jnp.full((8, 8), 0.3, w.dtype),
    "mean_removed": lambda w: w - w.mean(),
    "plain_norm": lambda w: w / jnp.linalg.norm(w),
    "difference": lambda w: w - w[::-1],
    "svd": lambda w: jnp.linalg.svd(w, full_matrices=False)[0] @ w[:, :6].T @ w,
    "partly": lambda w: w.at[0, 0].set(w[0, 0] + w[1, 1]),
}


@pytest.mark.parametrize("name", MIXES)
def test_mixing_under_transport_is_refused(name):
    with pytest.raises(fsh.errors.MixingError, match="stop_gradient") as caught:
        fsh.operate(random_state((6, 8)), lambda w: MIXES[name](w), opt_state="transport")
    assert caught.value.path == "w"


@pytest.mark.parametrize("name", [name for name in MIXES if name != "average_pairs"])
def test_mixing_under_carry_stays_in_place_and_is_recorded(name):
    state = random_state((6, 8))
    new, record = fsh.operate(state, lambda w: MIXES[name](w))
    np.testing.assert_array_equal(new.opt_state[0].mu["w"], state.opt_state[0].mu["w"])
    assert record.in_place == ("w",)


def test_mixing_that_changes_shape_is_refused_under_carry():
    with pytest.raises(fsh.errors.MixingError):
        fsh.operate(random_state((6, 8)), lambda w: MIXES["average_pairs"](w))


NOT_MIXES = {
    "norm_as_constant": lambda w: w / jax.lax.stop_gradient(jnp.linalg.norm(w)),
    "same_element_twice": lambda w: 0.3 * w + 0.7 * w,
    "masked": lambda w: jnp.where(w > 0, w, 0.0),
    "constant_added": lambda w: w + jax.lax.stop_gradient(w.T @ w).sum(),
}


@pytest.mark.parametrize("name", NOT_MIXES)
def test_what_does_not_mix_is_not_called_mixing(name):
    _, record = fsh.operate(random_state((6, 8)), lambda w: NOT_MIXES[name](w), opt_state="transport")
    assert record.in_place == ()


def test_no_norm_is_one_that_rounding_takes_for_mixing():
    """XLA divides by a scalar by way of its reciprocal, so that `J r / J` is not always r."""

    @jax.jit
    def mixed(w):
        edit = lineage.trace(
            lambda leaves: {"w": leaves["w"] / jax.lax.stop_gradient(jnp.linalg.norm(leaves["w"]))}, {"w": w}
        )
        return checks.find(lineage.linearize(edit), transports=False, fold_back=None, name="edit").mixed["w"]

    w = random_state((3, 2)).params["w"]
    assert [int(mixed(w * size)) for size in np.linspace(0.5, 4, 64, dtype=np.float32)] == [0] * 64


@pytest.mark.parametrize("edit", [lambda w: w / 0, lambda w: w * jnp.nan, lambda w: w.at[0, 0].set(jnp.inf)])
def test_what_is_not_finite_is_refused_by_the_guard_not_called_mixing(edit):
    with pytest.raises(fsh.errors.RefusedError, match="not finite") as caught:
        fsh.operate(random_state((6, 8)), lambda w: edit(w), opt_state="transport")
    assert "non-finite values" in str(caught.value.found)


@pytest.mark.parametrize(
    "edit", [jnp.round, jnp.sign, lambda w: w.astype(jnp.int32).astype(w.dtype), lambda w: (w > 0) * 1.0]
)
def test_losing_all_history_is_refused(edit):
    with pytest.raises(fsh.errors.LostHistoryError, match="opt_state='keep' or 'reset'") as caught:
        fsh.operate(random_state((6, 8)), lambda w: edit(w))
    assert caught.value.path == "w"
    kept, _ = fsh.operate(random_state((6, 8)), lambda w: edit(w), opt_state="keep")
    np.testing.assert_array_equal(kept.opt_state[0].mu["w"], random_state((6, 8)).opt_state[0].mu["w"])


@pytest.mark.parametrize("edit", [lambda w: jax.lax.stop_gradient(w) * 2, jnp.zeros_like, lambda w: w * 0.0])
def test_a_meant_fresh_start_is_allowed(edit):
    _, record = fsh.operate(random_state((6, 8)), lambda w: edit(w))
    assert float(record.figures["params/fresh"]) == 48


@jax.custom_vjp
def reverse_only(w):
    return w * 2


reverse_only.defvjp(lambda w: (w * 2, None), lambda _, g: (g * 2,))


@pytest.mark.parametrize("rule", ["transport", "carry"])
def test_an_edit_without_derivative_is_a_typed_error(rule):
    with pytest.raises(fsh.errors.DifferentiationError, match="opt_state='keep'") as caught:
        fsh.operate(random_state((6, 8)), lambda w: reverse_only(w), opt_state=rule)
    assert caught.value.__cause__ is not None
    new, _ = fsh.operate(random_state((6, 8)), lambda w: reverse_only(w), opt_state="keep")
    np.testing.assert_array_equal(new.params["w"], 2 * random_state((6, 8)).params["w"])


def test_carry_needs_no_transpose():
    """A loop of unknown length can be differentiated forwards only."""

    def doubled(w):
        return jax.lax.while_loop(lambda s: s[1] < 3, lambda s: (s[0] * 2, s[1] + 1), (w, 0))[0]

    new, _ = fsh.operate(random_state((6, 8)), doubled)
    np.testing.assert_array_equal(new.params["w"], 8 * random_state((6, 8)).params["w"])
    with pytest.raises(fsh.errors.DifferentiationError):
        fsh.operate(random_state((6, 8)), doubled, opt_state="transport")
