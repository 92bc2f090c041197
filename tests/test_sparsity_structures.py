"""N:M, blocks and channels against every subset there is, and against JaxPruner's rules written again in NumPy."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from raised import Case

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.sparsity.structures import Block, Channel, NOfM, Structure, Unstructured, masks

parse = Structure.parse
TEXTS = ["unstructured", "2:4", "1:2@0", "4:8@-1", "block:4x4", "block:2x3:max", "channel", "channel@0", "channel@-2"]


@functools.partial(jax.jit, static_argnums=0)
def found_by(structure, scores, kept):
    return masks({"a": scores}, {"a": structure}, {"a": kept})["a"]


def mask_of(text, scores, kept):
    return np.asarray(found_by(parse(text), scores, kept))


def best(scores, k):
    """The k largest of a few scores, earlier ones first where they are equal; NaN is the largest."""
    order = sorted(range(len(scores)), key=lambda i: (not np.isnan(scores[i]), -np.nan_to_num(scores[i], nan=0), i))
    return np.isin(np.arange(len(scores)), order[:k])


# The texts.


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_and_written(text):
    structure = parse(text)
    assert str(structure) == text
    assert parse(str(structure)) == structure == parse(structure) == parse(f" {text} ")
    assert hash(structure) == hash(parse(text))


def test_what_is_default_is_not_written():
    assert [str(parse(text)) for text in ("2:4@-2", "block:4x4:mean", "channel@-1")] == ["2:4", "block:4x4", "channel"]
    found = [parse(text) for text in ("unstructured", "2:4@0", "block:2x3:max", "channel@1")]
    assert found == [Unstructured(), NOfM(2, 4, 0), Block(2, 3, "max"), Channel(1)]


def test_only_n_of_m_fixes_how_many_are_kept():
    assert [parse(text).fixed for text in TEXTS] == [None, 2, 1, 4, None, None, None, None, None]


@pytest.mark.parametrize(
    ("text", "shape", "units"),
    [("unstructured", (3, 5), 15), ("unstructured", (), 1), ("2:4", (8, 3), 4), ("block:4x4", (2, 6, 9), 2 * 2 * 3),
     ("block:4x4:max", (8, 8), 4), ("channel", (3, 5), 5), ("channel@0", (3, 5), 3)],
)  # fmt: skip
def test_units(text, shape, units):
    assert parse(text).units(shape) == units
    parse(text).check("a", shape)


REFUSED = {
    "another name": Case(lambda: parse("1D"), e.SurgeryFunctionError, ("'1D'", "'2:4@-2'", "block:4x4", "channel@-1")),
    "YAML's 2:4": Case(lambda: parse(124), e.SurgeryFunctionError, ("int 124", "in quotes", "'2:4'")),
    "all": Case(lambda: parse("4:4"), e.SurgeryFunctionError, ("fewer than M", "'4:4'", "'2:4'")),
    "none": Case(lambda: parse("0:4"), e.SurgeryFunctionError, ("at least one", "'0:4'")),
    "a block of one": Case(lambda: parse("block:1x1"), e.SurgeryFunctionError, ("two elements", "'block:1x1'")),
    "a block of none": Case(lambda: parse("block:0x4"), e.SurgeryFunctionError, ("two elements", "'block:0x4'")),
    "no such axis": Case(
        lambda: parse("2:4").check("b/bias", (8,)), e.SurgeryFunctionError,
        ("no axis -2", "'2:4' for shape [8]", "from -1 to 0", "'2:4@-1'"), {"path": "b/bias"},
    ),
    "no axis at all": Case(
        lambda: parse("channel").check("s", ()), e.SurgeryFunctionError, ("no axis -1", "shape []", "scalars out"),
        {"path": "s"},
    ),
    "not divided": Case(
        lambda: parse("2:4").check("a/kernel", (6, 8)), e.SurgeryFunctionError,
        ("Axis -2 has size 6", "groups of 4", "shape [6, 8]", "'2:4@0'"), {"path": "a/kernel"},
    ),
    "one axis": Case(
        lambda: parse("block:4x4").check("b/bias", (8,)), e.SurgeryFunctionError,
        ("fewer", "'block:4x4' for shape [8]", "'unstructured'"), {"path": "b/bias"},
    ),
    "empty": Case(
        lambda: parse("unstructured").check("a", (0, 3)), e.SurgeryFunctionError, ("without elements", "shape [0, 3]"),
        {"path": "a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    case = REFUSED[name]
    with pytest.raises(case.error) as caught:
        case.run()
    assert type(caught.value) is case.error
    assert [part for part in case.says if part not in str(caught.value)] == []
    assert {field: getattr(caught.value, field) for field in case.fields} == case.fields


# N:M.


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 3, 4, 5) for n in range(m + 1)])
def test_of_each_group_the_subset_of_the_largest_sum(n, m):
    groups = np.random.default_rng(m).normal(size=(m, 40)).astype(np.float32)
    found = mask_of(f"1:{m}", groups, n)
    for column, mask in zip(groups.T, found.T, strict=True):
        sums = {subset: sum(float(column[i]) for i in subset) for subset in itertools.combinations(range(m), n)}
        assert tuple(np.flatnonzero(mask)) == max(sums, key=sums.get)


def test_every_order_of_four():
    orders = np.array(list(itertools.permutations([1.0, 2.0, 3.0, 4.0])), np.float32).T
    for n in range(5):
        assert np.array_equal(mask_of("2:4", orders, n), orders > 4 - n)


def test_every_tie_goes_to_the_lower_index():
    """All groups of four out of few values, with infinities and NaN, which is the largest; exactly n are kept."""
    values = [0.0, -0.0, 1e-40, 1.0, np.inf, -np.inf, np.nan]  # of which one is subnormal
    groups = np.array(list(itertools.product(values, repeat=4)), np.float32).T
    for n in range(5):
        found = mask_of("2:4", groups, n)
        assert (found.sum(0) == n).all()
        assert np.array_equal(found.T, [best(column, n) for column in groups.T])


def theirs_n_of_m(scores, n, m):
    """JaxPruner's rule: groups along the leading axis of [-1, m], the n of the highest rank of a stable sort."""
    groups = scores.reshape(-1, m)
    ranks = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1, kind="stable")
    return (ranks >= m - n).reshape(scores.shape)


def test_as_jaxpruner_but_for_ties():
    rng = np.random.default_rng(0)
    distinct = rng.permutation(64).astype(np.float32).reshape(4, 16)
    assert np.array_equal(mask_of("2:4@-1", distinct, 2), theirs_n_of_m(distinct, 2, 4))
    tied = np.ones((1, 4), np.float32)
    assert mask_of("2:4@-1", tied, 2).tolist() == [[True, True, False, False]]
    assert theirs_n_of_m(tied, 2, 4).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("shape", [(8, 4, 8), (4, 8, 4, 8)])
@pytest.mark.parametrize("axis", [0, 1, -2, -1])
def test_groups_lie_along_the_axis(shape, axis):
    scores = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    found = np.moveaxis(mask_of(f"2:4@{axis}", scores, 2), axis, -1).reshape(-1, 4)
    rows = np.moveaxis(scores, axis, -1).reshape(-1, 4)
    assert np.array_equal(found, [best(row, 2) for row in rows])


def test_the_default_axis_is_the_one_a_product_sums_over():
    """Another axis is another mask: rows of a Dense kernel are its inputs, and of each four two are left per unit."""
    kernel = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
    found = mask_of("2:4", kernel, 2)
    assert (found.reshape(4, 4, 8).sum(1) == 2).all()
    wrong = mask_of("2:4@-1", kernel, 2)
    assert not (wrong.reshape(4, 4, 8).sum(1) == 2).all()


def test_a_schedule_goes_from_m_to_n_in_one_program():
    scores = np.random.default_rng(3).normal(size=(16, 24)).astype(np.float32)
    before = found_by._cache_size()
    nested = [mask_of("2:4", scores, jnp.int32(n)) for n in (4, 3, 2)]
    assert found_by._cache_size() == before + 1
    assert nested[0].all()
    assert all((few <= many).all() for many, few in itertools.pairwise(nested))


def test_n_of_m_keeps_nothing_of_the_leafs_size_beside_it():
    scores = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    for m in (4, 16):
        program = found_by.lower(parse(f"2:{m}"), scores, 2)
        assert program.compile().memory_analysis().temp_size_in_bytes < 1024
        assert "sort" not in program.as_text()


# Blocks and channels.


def blocks_by_hand(scores, rows, columns, pool, k):
    """Blocks of each matrix, one after the other, cut off where it ends."""
    *others, height, width = scores.shape
    places = [
        (*lead, slice(row, row + rows), slice(column, column + columns))
        for lead in itertools.product(*map(range, others))
        for row in range(0, height, rows)
        for column in range(0, width, columns)
    ]
    kept = best([pool(scores[place].astype(np.float64)) for place in places], k)
    mask = np.zeros(scores.shape, bool)
    for place, is_kept in zip(places, kept, strict=True):
        mask[place] = is_kept
    return mask


@pytest.mark.parametrize(("shape", "rows", "columns"), [((7, 9), 4, 4), ((2, 5, 6), 2, 3)])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_blocks(shape, rows, columns, pool):
    # All below zero: a cut-off block that were filled up with zeros would count as too high.
    scores = -1 - np.random.default_rng(4).random(size=shape).astype(np.float32)
    text = f"block:{rows}x{columns}:{pool}"
    units = parse(text).units(shape)
    for k in (0, 1, units // 2, units - 1, units):
        expected = blocks_by_hand(scores, rows, columns, {"mean": np.mean, "max": np.max}[pool], k)
        assert np.array_equal(mask_of(text, scores, k), expected)


def theirs_blocks(scores, rows, columns, k):
    """JaxPruner's rule on two axes: average pooling of whole blocks, the k highest, spread by a Kronecker product."""
    pooled = scores.reshape(scores.shape[0] // rows, rows, scores.shape[1] // columns, columns).mean((1, 3))
    kept = np.zeros(pooled.size, bool)
    kept[np.argsort(-pooled.ravel(), kind="stable")[:k]] = True
    return np.kron(kept.reshape(pooled.shape), np.ones((rows, columns))).astype(bool)


def test_blocks_of_two_axes_are_those_of_jaxpruner():
    scores = np.random.default_rng(5).normal(size=(12, 8)).astype(np.float32)
    for k in range(7):
        assert np.array_equal(mask_of("block:4x4", scores, k), theirs_blocks(scores, 4, 4, k))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_means_are_taken_in_float32(dtype):
    """In bfloat16, 256 and more ones would not add up, and 70,000 is more than float16 holds."""
    scores = jnp.concatenate([jnp.full((300, 300), 1, dtype), jnp.full((300, 300), 1.01, dtype)], axis=1)
    means = parse("block:300x300").scores(scores)
    assert means.dtype == jnp.float32
    assert means[0].tolist() == pytest.approx([1, 1.01], abs=0.003)
    assert mask_of("channel", scores, 300)[0].tolist() == [False] * 300 + [True] * 300


@pytest.mark.parametrize("axis", [1, -1])
def test_channels(axis):
    scores = np.random.default_rng(6).normal(size=(4, 5, 6)).astype(np.float32)
    others = tuple(i for i in range(3) if i != axis % 3)
    means = scores.astype(np.float64).mean(others)
    for k in range(scores.shape[axis] + 1):
        expected = np.expand_dims(best(means, k), others)
        assert np.array_equal(mask_of(f"channel@{axis}", scores, k), np.broadcast_to(expected, scores.shape))


def test_the_output_unit_is_the_default_channel():
    kernel = np.array([[1.0, 5.0, 2.0], [1.0, 5.0, 9.0]], np.float32)
    assert mask_of("channel", kernel, 2).tolist() == [[False, True, True]] * 2
    assert mask_of("channel@0", kernel, 1).tolist() == [[False] * 3, [True] * 3]


# All together.

LEAVES = {"b": ("unstructured", (6, 5), 7), "a": ("2:4", (8, 3), 1), "c": ("block:2x2", (5, 5), 4),
          "d": ("channel", (4, 6), 2), "s": ("unstructured", (), 1)}  # fmt: skip


def by_itself(text, scores, k):
    """The mask from the k best units of one leaf, without the library's top-k."""
    structure = parse(text)
    if structure.fixed:
        return structure.mask(scores, k)
    units = structure.scores(scores)
    return structure.spread(jnp.asarray(best(np.ravel(units), k).reshape(units.shape)), scores.shape)


def test_leaves_of_all_kinds_together_are_each_by_itself():
    rng = np.random.default_rng(7)
    scores = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, (_, shape, _) in LEAVES.items()}
    structures = {path: parse(text) for path, (text, _, _) in LEAVES.items()}
    kept = {path: k for path, (_, _, k) in LEAVES.items()}
    found = jax.jit(lambda scores, kept: masks(scores, structures, kept))(scores, kept)
    assert set(found) == set(LEAVES)
    for path, (text, shape, k) in LEAVES.items():
        assert found[path].dtype == jnp.bool_
        assert found[path].shape == shape
        assert np.array_equal(found[path], by_itself(text, scores[path], k))


@pytest.mark.parametrize("text", ["unstructured", "block:2x4", "channel"])
def test_exactly_so_many_units_also_where_all_are_equal(text):
    structure, shape = parse(text), (6, 8)
    for k in range(structure.units(shape) + 1):
        found = mask_of(text, np.ones(shape, np.float32), k)
        assert found.sum() * structure.units(shape) == k * math.prod(shape)


# On eight devices.


def mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("spec", [P("data", "tensor"), P(("data", "tensor")), P(None, "data")])
def test_n_of_m_says_nothing_while_groups_do_not_cross_shards(spec):
    scores = jax.random.normal(jax.random.key(0), (64, 32))
    sharded = jax.device_put(scores, NamedSharding(mesh(), spec))
    assert fsh.collectives(found_by.lower(parse("2:4"), sharded, 2).compile()) == ()
    found = found_by(parse("2:4"), sharded, 2)
    assert np.array_equal(found, mask_of("2:4", scores, 2))
    assert found.sharding.is_equivalent_to(sharded.sharding, 2)


def test_groups_that_cross_shards_are_found_all_the_same():
    scores = jax.random.normal(jax.random.key(1), (24, 16))  # 6 rows on each of four shards
    sharded = jax.device_put(scores, NamedSharding(mesh(), P("data")))
    assert np.array_equal(mask_of("2:4", sharded, 2), mask_of("2:4", scores, 2))


@pytest.mark.parametrize("text", ["unstructured", "block:4x4", "channel"])
def test_sharded_leaves_have_the_same_masks_and_are_not_gathered(text):
    # Whole numbers, whose sums do not depend on their order.
    scores = jnp.round(jax.random.normal(jax.random.key(2), (64, 32)) * 100)
    sharded = jax.device_put(scores, NamedSharding(mesh(), P("data", "tensor")))
    k = parse(text).units(scores.shape) // 3
    program = found_by.lower(parse(text), sharded, k).compile()
    assert max(one.bytes for one in fsh.collectives(program)) < scores.nbytes // 8
    assert np.array_equal(program(sharded, k), mask_of(text, scores, k))
