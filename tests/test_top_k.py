"""The k largest, by a sort in NumPy: values of every sort, ties, many arrays, layouts; and what it must not do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_surgery_hooks as fsh
from flax_surgery_hooks import bisection, reductions, top_k
from flax_surgery_hooks.errors import SelectionError
from flax_surgery_hooks.top_k import top_k_mask, top_k_masks, top_k_masks_each

MESHES = {"1d": ((8,), ("data",)), "2d": ((4, 2), ("data", "tensor"))}
LAYOUTS = {"rows": ("1d", P("data")), "columns": ("1d", P(None, "data")), "both": ("2d", P("data", "tensor")),
           "joint": ("2d", P(("tensor", "data"))), "copies": ("2d", P())}  # fmt: skip
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def expected(scores, k):
    """The masks by a stable sort of all elements in the order of names and indices, NaN first."""
    names = sorted(scores)
    flat = np.concatenate([np.zeros(0)] + [np.asarray(scores[name]).astype(np.float64).ravel() for name in names])
    order = np.lexsort((np.arange(flat.size), -np.where(np.isnan(flat), 0, flat), ~np.isnan(flat)))
    chosen = np.zeros(flat.size, bool)
    chosen[order[:k]] = True
    ends = np.cumsum([np.size(scores[name]) for name in names])
    return {
        name: part.reshape(np.shape(scores[name]))
        for name, part in zip(names, np.split(chosen, ends[:-1]), strict=True)
    }


def check(select, scores, k):
    """Raises unless a function from scores and k to masks marks the k largest."""
    masks = select(scores, k)
    assert set(masks) == set(scores)
    assert sum(int(np.sum(mask)) for mask in masks.values()) == k
    for name, mask in expected(scores, k).items():
        assert masks[name].dtype == bool
        np.testing.assert_array_equal(masks[name], mask, err_msg=name)


def numbers(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def levels(*shape, seed=0, dtype=jnp.float32):
    """Few different values, both zeros among them."""
    drawn = np.random.default_rng(seed).integers(-3, 4, size=shape) * np.random.default_rng(seed).choice(
        [1.0, -1.0], shape
    )
    return jnp.asarray(drawn, dtype)


SPECIAL = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, -jnp.nan, 1.0, -1.0, 1e-45, -1e-45, -jnp.inf, jnp.inf])
SCORES = {
    "numbers": {"a": numbers(40)},
    "levels": {"a": levels(5, 9)},
    "negative": {"a": -jnp.abs(numbers(40))},
    "equal": {"a": jnp.full(40, -2.5)},
    "zero": {"a": jnp.zeros(40)},
    "zeros": {"a": jnp.array([0.0, -0.0] * 20)},
    "special": {"a": SPECIAL},
    "no_number": {"a": jnp.full(7, jnp.nan), "b": jnp.full(7, jnp.inf)},
    "lowest": {"a": jnp.full(7, -jnp.inf), "b": numbers(7)},
    "many": {"c/w": levels(4, 3), "a": levels(2, 3, 2, 5), "b": jnp.float32(1.0), "aa": levels(7), "e": numbers(0, 3)},
    "kinds": {"a": numbers(20, dtype=jnp.bfloat16), "b": numbers(20), "c": levels(20, dtype=jnp.float16)},
    "long": {"a": levels(150, 130), "b": numbers(17, 1001)},
    "odd": {"a": levels(16411), "b": levels(9, 1, 2003)},
    "short_rows": {"a": levels(6000, 3), "b": levels(300, 8, 8)},
}  # fmt: skip


def some_of(size):
    """Numbers to select from so many, both ends among them."""
    return sorted({0, 1, size // 3, size // 2, size - 1, size} & set(range(size + 1)))


@pytest.mark.parametrize("name", SCORES)
def test_the_k_largest_are_marked(name):
    scores = SCORES[name]
    for k in some_of(sum(leaf.size for leaf in scores.values())):
        check(top_k_masks, scores, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [numbers, levels])
def test_every_float_type(make, dtype):
    scores = {"a": make(300, seed=1, dtype=dtype), "b": SPECIAL.astype(dtype)}
    for k in range(0, 313, 13):
        check(top_k_masks, scores, k)


def test_doubles(x64):
    scores = {"a": numbers(300, dtype=jnp.float64), "b": 1 + levels(90, dtype=jnp.float64) * 1e-15, "c": SPECIAL}
    assert len({float(value) for value in scores["b"]}) > len(set(np.float32(scores["b"]).tolist()))
    for k in range(0, 402, 67):
        check(_jitted, scores, k)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=24), st.data())
def test_any_levels_and_any_number_of_them(drawn, data):
    values = jnp.array([float(value) for value in drawn] + [9.0] * (24 - len(drawn)))
    k = data.draw(st.integers(0, 24))
    check(_jitted, {"b": values[:7], "a": values[7:].reshape(1, 17)}, k)
    check(lambda scores, k: {"a": _one(scores["a"], k)}, {"a": values.reshape(2, 12)}, k)


_jitted = jax.jit(top_k_masks)
_one = jax.jit(top_k_mask)


@pytest.mark.parametrize("make", [numbers, levels])
def test_a_sample_only_says_where_to_begin(make):
    """Sorted values, of which even spacing takes a fair sample; and columns, of which it does not."""
    fair = jnp.sort(make(1 << 20))
    columns = make(1 << 12, 1) + jnp.arange(256.0)[None]
    for scores in ({"a": fair}, {"a": columns, "b": make(33)}):
        for k in (1, 500_000, sum(leaf.size for leaf in scores.values()) - 1):
            check(_jitted, scores, k)


def test_a_traced_number_is_clipped():
    scores = {"a": numbers(10), "b": levels(4)}
    for k, kept in ((-3, 0), (5, 5), (14, 14), (99, 14)):
        check(lambda scores, _, k=k: _jitted(scores, jnp.int32(k)), scores, kept)
    assert int(jax.jit(top_k_mask)(numbers(10), jnp.uint32(2**32 - 1)).sum()) == 10
    assert int(jax.jit(top_k_mask)(numbers(300), jnp.int8(-1)).sum()) == 0


def test_each_array_has_its_own_number():
    scores = {**SCORES["many"], "long": SCORES["long"]["a"]}
    for part in (0, 0.3, 1):
        ks = {name: int(part * leaf.size) for name, leaf in scores.items()}
        for masks in (top_k_masks_each(scores, ks), jax.jit(top_k_masks_each)(scores, ks)):
            assert set(masks) == set(scores)
            for name, leaf in scores.items():
                check(lambda _, k, name=name, masks=masks: {name: masks[name]}, {name: leaf}, ks[name])


def test_one_loop_serves_all_of_them():
    scores = {f"w{i}": jax.ShapeDtypeStruct((8, 8), jnp.float32) for i in range(9)}
    text = jax.jit(top_k_masks_each).lower(scores, dict.fromkeys(scores, jnp.int32(3))).as_text()
    assert text.count("stablehlo.while") == 2  # of values, and of the indices of ties
    assert "stablehlo.sort" not in text
    assert "stablehlo.gather" not in text


def test_within_control_flow():
    leaf, other = levels(6, 7), numbers(6, 7)

    def step(carry, k):
        mask = jax.lax.cond(k % 2 == 0, lambda: top_k_mask(leaf, k), lambda: top_k_mask(other, k))
        return carry + mask.sum(), mask

    total, masks = jax.jit(lambda: jax.lax.scan(step, 0, jnp.arange(43)))()
    assert total == sum(range(43))
    for k in range(43):
        check(lambda scores, _, k=k: {"a": masks[k]}, {"a": other if k % 2 else leaf}, k)


def test_under_vmap_and_beside_a_gradient():
    leaf = levels(5, 8)
    masks = jax.jit(jax.vmap(top_k_mask, in_axes=(0, None)))(leaf, 3)
    for row, mask in zip(leaf, masks, strict=True):
        check(lambda scores, k, mask=mask: {"a": mask}, {"a": row}, 3)
    pruned = jax.grad(lambda leaf: jnp.where(top_k_mask(jnp.abs(leaf), 9), leaf**2, 0).sum())(leaf)
    np.testing.assert_array_equal(pruned, jnp.where(top_k_mask(jnp.abs(leaf), 9), 2 * leaf, 0))


def laid(scores, layout, kind=AxisType.Auto):
    mesh_name, spec = LAYOUTS[layout]
    shape, names = MESHES[mesh_name]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    return {name: jax.device_put(leaf, NamedSharding(mesh, spec)) for name, leaf in scores.items()}


def compiled(scores, known):
    """The program of sharded scores, whose places are known to it or not."""
    places = reductions.places_of([(leaf.shape, leaf.sharding) for leaf in scores.values()]) if known else {}

    def select(scores, k):
        with reductions.across(places):
            return top_k_masks(scores, k)

    return jax.jit(select).lower(scores, jnp.int32(0)).compile()


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_set_is_the_same_on_every_layout(layout, known):
    """Ties go by the index in the whole array, not in a shard; what is said to other devices is counts."""
    scores = {"b": levels(256, 128), "a": levels(64, 24, seed=1)}
    placed = laid(scores, layout)
    program = compiled(placed, known)
    for k in (777, 20_000, scores["a"].size + scores["b"].size):
        check(lambda _, k: program(placed, jnp.int32(k)), scores, k)
    said = fsh.collectives(program)
    assert {one.kind for one in said} == ({"all-reduce"} if layout != "copies" else set())
    assert sum(one.bytes for one in said) <= 1024
    assert known is False or len(said) <= 3


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_sharded_sample_is_not_moved_either(known):
    scores = {"a": levels(1024, 2048)}
    placed = laid(scores, "both")
    program = compiled(placed, known)
    check(lambda _, k: program(placed, jnp.int32(k)), scores, 654_321)
    assert {one.kind for one in fsh.collectives(program)} == {"all-reduce"}
    assert sum(one.bytes for one in fsh.collectives(program)) <= 1024


def test_a_surgery_on_explicit_axes_selects_the_same():
    """On the host and in graph; the leaf is divided over both axes."""
    leaf = levels(32, 16)
    expected_leaf = jnp.where(expected({"a": jnp.abs(leaf)}, 100)["a"], leaf, 0)

    def prune(leaf):
        return jnp.where(top_k_mask(jnp.abs(leaf), 100), leaf, 0)

    placed = laid({"w": leaf}, "both", AxisType.Explicit)["w"]
    hooks = fsh.SurgeryHooks()
    hooks.add("prune", prune, params="w", when=fsh.at(1), guard="off", figures=False)
    state = hooks.init(fsh.TrainState.create(apply_fn=None, params={"w": placed}, tx=optax.sgd(0.1)))
    state = state.replace(step=jnp.int32(1))
    for after in (hooks.fire("prune", state, step=1), jax.jit(hooks.in_graph)(state)):
        np.testing.assert_array_equal(after.params["w"], expected_leaf)
        assert after.params["w"].sharding == placed.sharding


def test_nothing_is_kept_of_the_size_of_a_leaf():
    leaf = jax.ShapeDtypeStruct((1 << 10, 1 << 12), jnp.float32)
    program = jax.jit(top_k_mask).lower(leaf, jnp.int32(0)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * math.prod(leaf.shape) / 8


def test_constants_are_not_folded_when_compiled():
    """A leaf of constants would take XLA minutes; whether it did shows in the text: the counts would be there."""
    text = jax.jit(lambda k: top_k_mask(jnp.full((1 << 10, 1 << 10), 0.5), k)).lower(jnp.int32(0)).compile().as_text()
    assert "reduce" in text


def wrong_ties(scores, k):
    """All that is as large as the k-th."""
    flat = jnp.sort(jnp.concatenate([leaf.ravel() for leaf in scores.values()]))
    return {name: leaf >= flat[-k] for name, leaf in scores.items()}


def wrong_names(scores, k):
    """Ties in the order in which arrays are given."""
    renamed = {str(i): leaf for i, leaf in enumerate(scores.values())}
    return dict(zip(scores, top_k_masks(renamed, k).values(), strict=True))


def wrong_shards(scores, k):
    """Ties in the order of the shards of columns."""
    moved = top_k_masks({name: jnp.stack(jnp.split(leaf, 2, axis=1)) for name, leaf in scores.items()}, k)
    return {name: jnp.concatenate(list(mask), axis=1) for name, mask in moved.items()}


def wrong_zeros(scores, k):
    """Zeros in the order of their signs."""
    return top_k_masks(
        {name: jnp.where(jnp.signbit(leaf) & (leaf == 0), -1e-30, leaf) for name, leaf in scores.items()}, k
    )


@pytest.mark.parametrize("wrong", [wrong_ties, wrong_names, wrong_shards, wrong_zeros])
def test_the_check_finds_a_wrong_selection(wrong):
    scores = {"b": levels(6, 8), "a": levels(40, 8, seed=3)}
    k = sum(int((leaf > 0).sum()) for leaf in scores.values()) + 20  # cut among the zeros
    check(top_k_masks, scores, k)
    with pytest.raises(AssertionError):
        check(wrong, scores, k)


def test_a_search_that_begins_anywhere_ends_where_it_should():
    """Windows that are empty or beside the target cost passes, and nothing else."""
    values = jnp.sort(jax.lax.bitcast_convert_type(numbers(1000), jnp.int32))
    ends = jnp.full(1, -(2**31)), jnp.full(1, 2**31 - 1)

    def count(thresholds):
        return (values[None, None] > thresholds[..., None]).sum(-1)

    search = jax.jit(lambda k, bracket: bisection.search(count, k, bracket).found(k))
    for start, stop in ((0, 0), (-(2**31), -(2**31)), (2**31 - 1, 2**31 - 1), (-5, 9), (-(2**31), 2**31 - 1)):
        bracket = bisection.whole(*ends, jnp.full(1, 1000))._replace(start=jnp.full(1, start), stop=jnp.full(1, stop))
        for k in (1, 500, 999):
            cut, wanting = search(jnp.full(1, k), bracket)
            assert (values > cut).sum() + wanting[0] == k


ONE = jnp.zeros(3)
HUGE = jax.ShapeDtypeStruct((1 << 20, 1 << 11), jnp.float32)
ERRORS = {
    "too_many": (lambda: top_k_mask(ONE, 4), "Found: 4. Write instead: a number from 0 to 3"),
    "negative": (lambda: top_k_mask(ONE, jnp.int32(-1)), "Found: -1"),
    "no_integer": (lambda: top_k_mask(ONE, 0.5), "is no integer. Found: float 0.5"),
    "truth": (lambda: top_k_mask(ONE, True), "is no integer. Found: bool True"),
    "vector": (lambda: top_k_mask(ONE, jnp.ones(2, int)), "is no integer. Found: ArrayImpl int32[2]"),
    "traced": (lambda: jax.jit(top_k_mask)(ONE, 0.5), "is no integer. Found: "),
    "integers": (lambda: top_k_masks({"a/b": jnp.ones(3, int)}, 1), "path 'a/b': Scores are of a type"),
    "huge": (lambda: jax.eval_shape(top_k_mask, HUGE, 1), "Found: 2,147,483,648"),
    "names": (lambda: top_k_masks_each({"a": ONE}, {"b": 1}), "Found: a, b in one of them only"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    run, says = ERRORS[name]
    with pytest.raises(SelectionError) as caught:
        run()
    assert says in str(caught.value)
    assert caught.value.found is not None
    assert caught.value.write


def test_nothing_to_select_from():
    assert top_k_masks({}, 0) == {}
    assert top_k_masks_each({}, {}) == {}
    assert top_k_mask(jnp.zeros((0, 4)), 0).shape == (0, 4)


def test_another_number_compiles_nothing():
    leaf = numbers(13)
    top_k_mask(leaf, 0)
    before = top_k._masks._cache_size()
    for k in range(14):
        top_k_mask(leaf, k)
    assert top_k._masks._cache_size() == before
