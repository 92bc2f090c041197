"""One surgery on one state: the same concretely, under jit and abstractly; kinds of leaves; every rule for slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SGD, assert_bitwise_equal, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import reductions
from flax_surgery_hooks.errors import RefusedError, RuleError

ADAM = optax.adam(0.1)


def random_params():
    rng = np.random.default_rng(0)
    return {"dense": {"bias": jnp.asarray(rng.normal(size=3), jnp.float32),
                      "kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)},
            "twin": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}  # fmt: skip


@functools.cache
def trained(tx=ADAM):
    """A state whose slots hold numbers that cannot be mistaken for each other."""
    state = make_state(jnp.int32(5), tx, **random_params())
    rng = np.random.default_rng(1)

    def fill(leaf):
        return leaf if leaf.ndim == 0 else jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)

    return state.replace(opt_state=jax.tree.map(fill, state.opt_state))


def kernel(state):
    """Kernel, mu and nu as NumPy arrays."""
    adam = state.opt_state[0]
    return [np.asarray(tree["dense"]["kernel"]) for tree in (state.params, adam.mu, adam.nu)]


def edit_kernel(surgery, **kwargs):
    """Old and new (kernel, mu, nu), and the record."""
    state, record = fsh.operate(trained(), surgery, params="dense/kernel", **kwargs)
    return kernel(trained()), kernel(state), record


MASK = np.array([[True, False, True], [False, False, True], [True, True, True], [False, False, True]])


def masked(w):
    return jnp.where(jnp.asarray(MASK), 0, w)


# Concretely, under jit, abstractly.


def swap(leaves):
    return {"dense/kernel": leaves["twin"], "twin": leaves["dense/kernel"]}


def rescale_pair(leaves):
    return {"dense/kernel": 4 * leaves["dense/kernel"], "twin": leaves["twin"] / 4}


def jitter(w, key):
    return w + jax.lax.stop_gradient(jax.random.uniform(key, w.shape))  # bits alone, which all compilers round alike


def negate_rows(slot, *, kind, path, old, new, key):
    return -slot


WAYS = {
    "transport": (lambda w: w * 0.5, {"params": "twin", "opt_state": "transport"}),
    "mixes": (lambda w: w / jnp.linalg.norm(w), {"params": "twin"}),
    "draws": (jitter, {"params": "twin"}),
    "steps": (lambda w, step, by: w * step + by, {"params": "twin", "inputs": {"by": 2.0}}),
    "masks": (masked, {"params": "twin"}),
    "swap": (swap, {"params": ["twin", "**/kernel"]}),
    "grow": (lambda w: jnp.pad(w, [(0, 1), (0, 2)]), {"params": "dense/kernel"}),
    "reset": (lambda w: w * 2, {"params": "twin", "opt_state": "reset"}),
    "by_kind": (lambda w: w * 2, {"params": "twin", "opt_state": {"grad": negate_rows, "grad_sq": "transport"}}),
    "off": (lambda w: jnp.where(w > 0, w, jnp.nan), {"params": "twin", "guard": "off"}),
    "refused": (lambda w: jnp.where(w > 1, jnp.nan, w * 2), {"params": ["twin", "**/bias"]}),
}


def signatures(tree):
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in map(jax.typeof, jax.tree.leaves(tree))]


@pytest.mark.parametrize("way", WAYS)
def test_concretely_under_jit_and_abstractly_the_same(way):
    surgery, kwargs = WAYS[way]
    edit = functools.partial(fsh.operate, surgery=surgery, **kwargs)
    state, key = trained(), jax.random.key(3)
    jitted, traced_record = jax.jit(lambda s, k: edit(s, key=k))(state, key)
    abstract, abstract_record = edit(jax.eval_shape(lambda: state), key=key)
    if way == "refused":
        with pytest.raises(RefusedError, match="the state is as it was"):
            edit(state)
        concrete, record = state, traced_record
        assert traced_record.figures["params/nonfinite"] > 0
    else:
        concrete, record = edit(state, key=key)
    assert_bitwise_equal(concrete, jitted)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert signatures(abstract) == signatures(concrete)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    for field in ("surgery", "rule", "paths", "leaves", "in_place", "event"):
        assert getattr(record, field) == getattr(traced_record, field) == getattr(abstract_record, field)
    assert (record.in_place == ("twin",)) == (way == "mixes")
    for name, value in record.figures.items():
        np.testing.assert_allclose(traced_record.figures[name], value, rtol=1e-6)
        assert abstract_record.figures[name].shape == ()


def test_operate_is_pure_and_touches_what_it_edits_only():
    state = trained()
    before = jax.tree.map(np.array, state)
    after, record = fsh.operate(state, lambda w: w * 2, params="twin")
    assert_bitwise_equal(jax.tree.map(np.asarray, state), before)
    for tree, new in ((state.params, after.params), (state.opt_state[0].nu, after.opt_state[0].nu)):
        assert new["dense"]["kernel"] is tree["dense"]["kernel"]
        assert new["twin"] is not tree["twin"]
    assert after.opt_state[0].count is state.opt_state[0].count
    assert (after.step, record.paths, record.leaves) == (5, ("twin",), (((4, 3), "float32"),))
    assert fsh.operate(state, lambda w: w * 2, params="twin", opt_state="keep")[0].opt_state is state.opt_state


def test_a_refused_edit_raises_and_can_be_let_through():
    with pytest.raises(RefusedError, match="not finite; the state is as it was") as caught:
        fsh.operate(trained(), lambda w: w / 0, params="twin")
    assert caught.value.found == "12 non-finite values"
    assert np.isinf(fsh.operate(trained(), lambda w: w / 0, params="twin", guard="off")[0].params["twin"]).all()


def test_the_step_is_the_states_unless_given():
    def edit(w, step):
        return w * 0 + step

    assert edit_kernel(edit, opt_state="keep")[1][0][0, 0] == 5
    assert edit_kernel(edit, opt_state="keep", step=9)[1][0][0, 0] == 9


# Several leaves at once.


@pytest.mark.parametrize("rule", ["carry", "transport"])
def test_leaves_that_swap_take_their_slots_with_them(rule):
    after, _ = fsh.operate(trained(), swap, params=["twin", "**/kernel"], opt_state=rule)
    old, new = trained().opt_state[0], after.opt_state[0]
    for before, then in ((trained().params, after.params), (old.mu, new.mu), (old.nu, new.nu)):
        np.testing.assert_array_equal(then["twin"], before["dense"]["kernel"])
        np.testing.assert_array_equal(then["dense"]["kernel"], before["twin"])
        assert then["dense"]["bias"] is before["dense"]["bias"]


@pytest.mark.parametrize(("rule", "power"), [("carry", 0), ("transport", 1)])
def test_a_rescaled_pair_rescales_its_slots_under_transport(rule, power):
    after, _ = fsh.operate(trained(), rescale_pair, params=["twin", "**/kernel"], opt_state=rule)
    (w, mu, nu), (new_w, new_mu, new_nu) = kernel(trained()), kernel(after)
    np.testing.assert_array_equal(new_w, 4 * w)
    np.testing.assert_array_equal(new_mu, mu / 4**power)
    np.testing.assert_array_equal(new_nu, nu / 16**power)
    np.testing.assert_array_equal(after.opt_state[0].mu["twin"], trained().opt_state[0].mu["twin"] * 4**power)
    np.testing.assert_array_equal(after.opt_state[0].nu["twin"], trained().opt_state[0].nu["twin"] * 16**power)


# Kinds of leaves.


@pytest.mark.parametrize(
    ("dtype", "mu_dtype"),
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32"), ("float64", "bfloat16")],
)
def test_short_floats_are_edited_in_float32_and_keep_their_dtypes(dtype, mu_dtype, x64):
    seen = []

    def edit(w):
        seen.append(w.dtype)
        return w * 0.3

    tx = optax.adam(0.1, mu_dtype=mu_dtype)
    params = {"w": jnp.asarray(np.linspace(-2, 2, 8), dtype)}
    state = make_state(0, tx, **params)
    adam = state.opt_state[0]._replace(mu={"w": jnp.linspace(0.1, 1, 8, dtype=mu_dtype)}, count=jnp.int32(3))
    state = state.replace(opt_state=(adam, *state.opt_state[1:]))
    after, record = fsh.operate(state, edit)
    assert set(seen) == {jnp.dtype("float64" if dtype == "float64" else "float32")}
    wide = np.asarray(params["w"]).astype(seen[0])
    np.testing.assert_array_equal(after.params["w"], (wide * seen[0].type(0.3)).astype(dtype))
    np.testing.assert_array_equal(after.opt_state[0].mu["w"], adam.mu["w"])
    assert signatures(after.replace(step=0)) == signatures(state)
    assert record.leaves == (((8,), dtype),)


def mixed_params():
    return {"bool": jnp.array([True, False]), "int": jnp.arange(3), "key": jax.random.key(0), "none": None,
            "w": jnp.arange(1.0, 4)}  # fmt: skip


@pytest.mark.parametrize("traced", [False, True])
def test_integers_bools_and_keys_are_leaves_too(traced):
    trained_leaves = {"bool": False, "int": False, "key": False, "none": None, "w": True}
    state = make_state(0, optax.masked(optax.adam(0.1), trained_leaves), **mixed_params())

    def edit(leaves):
        return {
            "bool": ~leaves["bool"],
            "int": leaves["int"][::-1],
            "key": jax.random.fold_in(leaves["key"], 1),
            "w": leaves["w"] * leaves["int"].astype(jnp.float32),
        }

    operate = functools.partial(fsh.operate, surgery=edit)
    after, record = (jax.jit(operate) if traced else operate)(state)
    assert after.params["bool"].tolist() == [False, True]
    assert after.params["int"].tolist() == [2, 1, 0]
    assert after.params["key"] == jax.random.fold_in(jax.random.key(0), 1)
    assert after.params["none"] is None
    assert after.params["w"].tolist() == [0, 2, 6]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert signatures(after) == signatures(state)
    assert record.paths == ("bool", "int", "key", "w")


@pytest.mark.parametrize(
    ("path", "edit", "expected"),
    [
        ("bool", jnp.logical_not, [False, True]),
        ("int", lambda x: x + 1, [1, 2, 3]),
        ("w", lambda x: x > 1.5, None),
        ("int", lambda x: x / 2, None),
        ("bool", lambda x: x * 1, None),
    ],
)
def test_one_leaf_keeps_its_kind_of_number(path, edit, expected):
    state = make_state(0, SGD, **mixed_params())
    if expected is None:
        with pytest.raises(fsh.errors.SurgeryFunctionError, match="changed the kind of number") as caught:
            fsh.operate(state, edit, params=path)
        assert caught.value.path == path
        assert f".astype({state.params[path].dtype})" in caught.value.write
    else:
        assert fsh.operate(state, edit, params=path)[0].params[path].tolist() == expected


def test_numbers_may_come_back_and_shorter_floats_too():
    assert edit_kernel(lambda w: w.astype(jnp.bfloat16), opt_state="keep")[1][0].dtype == np.float32
    state = fsh.operate(make_state(0, SGD, w=jnp.ones(())), lambda w: 3.5)[0]
    assert (state.params["w"].shape, float(state.params["w"])) == ((), 3.5)


# Shapes.


def test_a_slice_takes_its_slots_along():
    old, new, record = edit_kernel(lambda w: w[1:, ::-1])
    for before, after in zip(old, new, strict=True):
        np.testing.assert_array_equal(after, before[1:, ::-1])
    assert record.leaves == (((3, 3), "float32"),)


def test_growth_starts_new_elements_fresh():
    old, new, record = edit_kernel(lambda w: jnp.pad(w, [(0, 1), (0, 2)]))
    for before, after in zip(old, new, strict=True):
        np.testing.assert_array_equal(after[:4, :3], before)
    assert not new[0][4:].any()
    assert not new[1][4:].any()
    assert not new[1][:, 3:].any()
    expected = np.append(old[2].mean(0), [old[2].mean()] * 2)  # an old unit's mean; a new unit has the leaf's
    np.testing.assert_allclose(new[2][4], expected, rtol=1e-6)
    np.testing.assert_allclose(new[2][:, 3:], old[2].mean(), rtol=1e-6)
    assert float(record.figures["params/fresh"]) == 5 * 5 - 4 * 3


@pytest.mark.parametrize("traced", [False, True])
def test_slots_cannot_be_kept_for_another_shape(traced):
    def run(rule):
        operate = functools.partial(fsh.operate, surgery=lambda w: w[1:], params="twin", opt_state=rule)
        return (jax.jit(operate) if traced else operate)(trained())

    for rule, text in (("keep", "Slots cannot be kept"), ({"grad": "keep"}, r"ScaleByAdamState\.mu cannot be kept")):
        with pytest.raises(RuleError, match=f"{text}: the edit changes the leaf's shape") as caught:
            run(rule)
        assert (caught.value.path, caught.value.found) == ("twin", "[4, 3] -> [3, 3]")


# Rules.


@pytest.mark.parametrize(
    ("rule", "mu", "nu"),
    [
        ("carry", lambda mu: mu, lambda nu: nu),
        ("transport", lambda mu: mu / 2, lambda nu: nu / 4),
        ("keep", lambda mu: mu, lambda nu: nu),
        ("reset", np.zeros_like, np.zeros_like),
        ({"grad": "reset"}, np.zeros_like, lambda nu: nu),
        ({"grad": "reset", "grad_sq": "keep"}, np.zeros_like, lambda nu: nu),
        ({"grad_sq": "transport"}, lambda mu: mu, lambda nu: nu / 4),
        ({"grad": negate_rows}, lambda mu: -mu, lambda nu: nu),
        (negate_rows, lambda mu: -mu, lambda nu: -nu),
        ({"update": "reset"}, lambda mu: mu, lambda nu: nu),  # Adam has none
    ],
)
def test_every_rule(rule, mu, nu):
    old, new, _ = edit_kernel(lambda w: w * 2, opt_state=rule)
    for after, expected in zip(new, (old[0] * 2, mu(old[1]), nu(old[2])), strict=True):
        np.testing.assert_array_equal(after, expected)


def test_a_rule_that_is_a_function_is_told_everything():
    calls = {}

    def rule(slot, *, kind, path, old, new, key):
        calls[kind] = (path, old.shape, new.shape)
        return jnp.zeros(new.shape) + jax.random.uniform(key, new.shape) + (kind == "grad")

    def two_rows(w):
        return w[:2]

    first, again, other = (edit_kernel(two_rows, opt_state=rule, key=jax.random.key(seed))[1] for seed in (1, 1, 2))
    assert calls == dict.fromkeys(("grad", "grad_sq"), ("dense/kernel", (4, 3), (2, 3)))
    assert (first[1].min(), first[2].max()) > (1, 0)
    assert not np.array_equal(first[1] - 1, first[2])  # each slot draws from a key of its own
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_a_function_for_slots_needs_no_key_unless_it_uses_one():
    def rule(slot, *, kind, path, old, new, key):
        assert key is None
        return slot * 2

    old, new, _ = edit_kernel(lambda w: w, opt_state=rule)
    np.testing.assert_array_equal(new[1], old[1] * 2)


# Elements without history.


@pytest.mark.parametrize("fresh", ["mean", "init"])
@pytest.mark.parametrize("rule", ["carry", "transport"])
def test_masked_elements_start_anew(fresh, rule):
    (_, mu, nu), new, record = edit_kernel(masked, fresh=fresh, opt_state=rule)
    np.testing.assert_array_equal(new[1], np.where(MASK, 0, mu))
    survivors = np.where(MASK, np.nan, nu)
    unit_means = [np.nanmean(survivors[:, 0]), np.nanmean(survivors[:, 1]), np.nanmean(survivors)]  # none is left in 2
    expected = np.where(MASK, np.array(unit_means)[None], nu) if fresh == "mean" else np.where(MASK, 0, nu)
    np.testing.assert_allclose(new[2], expected, rtol=1e-6)
    np.testing.assert_array_equal(new[2][~MASK], nu[~MASK])
    assert float(record.figures["params/fresh"]) == MASK.sum()
    assert float(record.figures["params/sparsity"]) == pytest.approx(MASK.mean())


@pytest.mark.parametrize("fresh", ["mean", "init"])
def test_fresh_elements_of_a_vector_start_from_all_survivors(fresh):
    bias_mask = jnp.array([True, False, False])
    after, _ = fsh.operate(trained(), lambda w: jnp.where(bias_mask, 0, w), params="dense/bias", fresh=fresh)
    old, new = (np.asarray(state.opt_state[0].nu["dense"]["bias"]) for state in (trained(), after))
    np.testing.assert_allclose(new, [old[1:].mean() if fresh == "mean" else 0, *old[1:]], rtol=1e-6)


@pytest.mark.parametrize("fresh", ["mean", "init"])
def test_where_nothing_survives_the_old_mean_counts(fresh):
    (_, _, nu), new, _ = edit_kernel(lambda w: jnp.ones(w.shape), fresh=fresh)
    assert not new[1].any()
    np.testing.assert_allclose(new[2], np.full_like(nu, nu.mean() if fresh == "mean" else 0), rtol=1e-6)


def test_fresh_elements_start_from_what_the_optimizer_starts_with():
    tx = optax.adagrad(0.1, initial_accumulator_value=0.25)
    after, _ = fsh.operate(trained(tx), masked, params="dense/kernel", fresh="init")
    np.testing.assert_array_equal(np.asarray(after.opt_state[0].sum_of_squares["dense"]["kernel"])[MASK], 0.25)
    after, _ = fsh.operate(trained(tx), masked, params="dense/kernel", opt_state="reset")
    np.testing.assert_array_equal(after.opt_state[0].sum_of_squares["dense"]["kernel"], 0.25)


def test_sums_over_a_leaf_of_constants_are_left_to_run_time():
    """The compiler would fold them one element at a time: 100 s for a leaf of 2048 x 2048 set to zero."""
    leaves = [jnp.zeros((64, 64)), jnp.ones((64, 64))]
    compiled = jax.jit(lambda: reductions.totals([jnp.full(x.shape, x[0, 0]) for x in leaves])).lower().compile()
    assert " reduce(" in compiled.as_text()
    assert [float(total) for total in compiled()] == [0, 4096]
