"""Densities solved by hand, schedules tabulated, and where JaxPruner's published rules differ."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import Case

from flax_surgery_hooks import errors as e
from flax_surgery_hooks.sparsity.distributions import by_pattern, erk, exact, from_map, kept, uniform
from flax_surgery_hooks.sparsity.ramps import drop_fraction, kept_at, progress, share

SHAPES = {"conv": (3, 3, 16, 32), "wide": (128, 512), "deep": (512, 128), "head": (128, 10)}
SPARSITIES = [0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0]


def in_all(shapes, sparsities):
    return sum(kept(math.prod(shape), sparsities[path]) for path, shape in shapes.items())


# How many are kept.


@pytest.mark.parametrize(
    ("units", "sparsity", "expected"),
    [(1000, 0.9, 100), (10, 0.7, 3), (10, 0.9, 1), (5, 0.9, 1), (5, 0.5, 2), (7, 0.5, 4), (10, 0.99, 1), (10, 1, 1),
     (10, 0, 10), (10, 0.0, 10), (1, 1.0, 1), (30, 0.95, 2), (10**9, 0.9, 10**8), (1000, np.float32(0.9), 100),
     (1000, np.float64(0.9), 100), (0, 0.5, 0), (9, Fraction(1, 3), 6)],
)  # fmt: skip
def test_kept(units, sparsity, expected):
    assert kept(units, sparsity) == expected


def theirs_kept(units, sparsity):
    """JaxPruner's rule, in float32 as it is there."""
    return max(1, int(np.round(np.float32(units) * (np.float32(1) - np.float32(sparsity)))))


def test_kept_is_of_the_decimal_that_was_written():
    """JaxPruner's rule but for what floats make of it: halves, which fall to either side, and large leaves."""
    cases = [(units, percent) for units in range(1, 250) for percent in range(0, 100, 3)]
    differing = []
    for units, percent in cases:
        ours = kept(units, percent / 100)
        assert ours == max(1, round(Fraction(100 - percent, 100) * units))
        if ours != theirs_kept(units, percent / 100):
            differing.append(units * (100 - percent) % 100)
    assert set(differing) == {50}
    assert (1 - 0.7) * 10 > 3
    assert (kept(10**9, 0.9), kept(10, 0.7)) == (10**8, 3)
    assert theirs_kept(10**9, 0.9) != 10**8


@pytest.mark.parametrize(
    "sparsity", [-0.1, 1.1, float("nan"), float("inf"), True, False, "0.9", None, 1j, jnp.ones(())]
)
@pytest.mark.parametrize("ask", [exact, lambda s: kept(8, s), lambda s: uniform(SHAPES, s), lambda s: erk(SHAPES, s)])
def test_what_is_no_sparsity(ask, sparsity):
    with pytest.raises(e.SurgeryFunctionError, match=r"number from 0 to 1.* Found: .*0\.9 for nine in ten"):
        ask(sparsity)


# Distributions.


def test_uniform():
    assert uniform(SHAPES, 0.9) == dict.fromkeys(SHAPES, 0.9)


def test_erk_solved_by_hand():
    """Shapes (10, 10), (20, 30), (3, 3, 2, 2), sparsity 0.8: in all 100 + 600 + 36 = 736, of which 147.2 are kept.

    A leaf keeps eps * sum(dims): 20, 50 and 10 of it. All three free: eps = 147.2 / 80 = 1.84, densities
    1.84 * 20 / 100 = 0.368, 1.84 * 50 / 600 = 0.15333 and 1.84 * 10 / 36 = 0.51111, none above 1.
    """
    found = erk({"a": (10, 10), "b": (20, 30), "c": (3, 3, 2, 2)}, 0.8)
    assert found == pytest.approx({"a": 1 - 0.368, "b": 1 - 0.46 / 3, "c": 1 - 4.6 / 9}, abs=1e-15)


def test_erk_pins_what_would_be_more_than_dense_and_solves_again():
    """The same shapes, sparsity 0.5: 368 are kept.

    All free: eps = 368 / 80 = 4.6, densities 0.92, 0.38333 and 1.27778: the last is pinned, with its 36. Again: eps =
    (368 - 36) / 70 = 4.742857, densities 0.948571 and 0.395238. At 0.45, 404.8: eps = 5.06, densities 1.012, 0.42167,
    1.40556: two are pinned, and b keeps 404.8 - 136 = 268.8 of 600.
    """
    shapes = {"a": (10, 10), "b": (20, 30), "c": (3, 3, 2, 2)}
    assert erk(shapes, 0.5) == pytest.approx({"a": 1 - 0.9485714286, "b": 1 - 0.3952380952, "c": 0}, abs=1e-9)
    assert erk(shapes, 0.45) == pytest.approx({"a": 0, "b": 1 - 0.448, "c": 0}, abs=1e-12)
    # What is wrong without solving again: too few are kept in all.
    clipped = {path: 1 - min(1, 4.6 * sum(shape) / math.prod(shape)) for path, shape in shapes.items()}
    assert abs(in_all(shapes, erk(shapes, 0.5)) - 368) <= 1
    assert in_all(shapes, clipped) < 368 - 9


def test_a_leaf_that_is_pinned_in_the_second_round():
    """Shapes (2, 2), (4, 8), (10, 20), sparsity 0.5: in all 4 + 32 + 200 = 236, of which 118 are kept.

    All free: eps = 118 / (4 + 12 + 30) = 2.5652, densities 2.5652, 0.96196 and 0.38478: a is pinned. Again: eps =
    114 / 42 = 2.7143, b at 1.01786 is pinned. Again: eps = (118 - 36) / 30 = 2.7333, c at 2.7333 * 30 / 200 = 0.41.
    """
    assert erk({"a": (2, 2), "b": (4, 8), "c": (10, 20)}, 0.5) == {"a": 0, "b": 0, "c": 0.59}


def test_erk_has_one_eps_and_pins_only_what_needs_it():
    shapes = {"s": (2, 2), "m": (6, 6), "l": (7, 7), "w": (30, 60)}
    ratios = {path: sum(shape) / math.prod(shape) for path, shape in shapes.items()}
    for percent in range(1, 100):
        found = erk(shapes, percent / 100)
        eps = {(1 - found[path]) / ratios[path] for path in shapes if found[path] > 0}
        assert max(eps) == pytest.approx(min(eps), rel=1e-9)
        assert all(ratios[path] * max(eps) >= 1 - 1e-9 for path in shapes if found[path] == 0)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_adds_up_and_no_leaf_is_more_than_dense(sparsity):
    found = erk(SHAPES, sparsity)
    assert all(0 <= one <= 1 for one in found.values())
    total = sum(map(math.prod, SHAPES.values()))
    assert sum((1 - found[path]) * math.prod(shape) for path, shape in SHAPES.items()) == pytest.approx(
        (1 - sparsity) * total, abs=1e-6
    )
    # Half an element of each leaf, and the one that each keeps at least.
    assert abs(in_all(SHAPES, found) - (1 - sparsity) * total) <= len(SHAPES)


def test_erk_does_not_ask_which_axis_is_which():
    for shapes in ({path: shape[::-1] for path, shape in SHAPES.items()}, {"x": (2, 3, 5), "y": (50, 7)}):
        permuted = itertools.product(*map(itertools.permutations, shapes.values()))
        orders = [dict(zip(shapes, some, strict=True)) for some in permuted]
        assert all(erk(order, 0.7) == erk(shapes, 0.7) for order in orders)
    assert list(erk(dict(reversed(SHAPES.items())), 0.7)) == list(reversed(SHAPES))
    assert erk(dict(reversed(SHAPES.items())), 0.7) == erk(SHAPES, 0.7)


def test_erk_of_odd_leaves():
    assert erk({"only": (4, 8)}, 0.75) == {"only": 0.75}
    assert erk({"s": (), "empty": (0, 3), "w": (100, 100)}, 0.9) == {
        "s": 0,
        "empty": 0,
        "w": pytest.approx(0.9, abs=1e-4),
    }
    assert erk({}, 0.5) == {}


# Patterns.

PATHS = ["enc/attn/kernel", "enc/mlp/kernel", "layers/kernel[0]", "layers/kernel[1]", "layers/kernel[12]", "head"]


def test_from_map_does_not_ask_for_the_order():
    given = {"**": 0.9, "enc/**": 0.5, "head": 0.0}
    expected = {
        path: given["enc/**" if path.startswith("enc") else "head" if path == "head" else "**"] for path in PATHS
    }
    for order in itertools.permutations(given.items()):
        assert from_map(dict.fromkeys(PATHS, (4, 4)), dict(order)) == expected


@pytest.mark.parametrize(
    ("pattern", "places"),
    [("**/kernel", [0, 1, 2, 3, 4]), ("layers/kernel", [2, 3, 4]), ("layers/kernel[1]", [3]),
     ("{enc,layers}/**", [0, 1, 2, 3, 4]),
     ("layers/kernel[1:]", [3, 4]), ("layers/*[:13:12]", [2, 4]), ("re:.*mlp.*|head", [1, 5]), ("enc/*/kernel", [0, 1]),
     (r"re:.*\[1\d\]", [4])],
)  # fmt: skip
def test_what_a_pattern_is_for(pattern, places):
    found = by_pattern(PATHS, {pattern: "mine", "**": "rest"}, "structure=")
    assert [path for path in found if found[path] == "mine"] == [PATHS[place] for place in places]
    assert list(found) == PATHS


def test_the_pattern_for_the_rest_may_find_nothing_left():
    assert by_pattern(["a", "b"], {"{a,b}": 1, "**": 2}, "x=") == {"a": 1, "b": 1}


REFUSED = {
    "none": Case(
        lambda: by_pattern(PATHS, {"enc/**": 1, "layers/**": 2}, "sparsity="), e.SelectionError,
        ("No pattern of sparsity=", "'enc/**'", "'layers/**'", "'**' for all the rest"), {"path": "head"},
    ),
    "no patterns": Case(
        lambda: from_map({"a": (2,)}, {}), e.SelectionError, ("No pattern of sparsity=", "no patterns at all"),
        {"path": "a"},
    ),
    "two": Case(
        lambda: by_pattern(PATHS, {"enc/**": 1, "**/kernel": 2, "head": 3}, "structure="), e.SelectionError,
        ("Several patterns of structure=", "'enc/**' and '**/kernel'", "'**' is for all the rest"),
        {"path": "enc/attn/kernel"},
    ),
    "matches nothing": Case(
        lambda: by_pattern(PATHS, {"**": 1, "enc/atn/kernel": 2}, "structure="), e.SelectionError,
        ("'enc/atn/kernel' of structure=", "none of the 6", "instead: 'enc/attn/kernel'"),
    ),
    "no leaves": Case(
        lambda: by_pattern([], {"a": 1}, "structure="), e.SelectionError, ("none of the 0", "no leaves at all"),
    ),
    "no such layer": Case(
        lambda: by_pattern(PATHS, {"**": 1, "layers/kernel[7]": 2}, "structure="), e.SelectionError,
        ("'layers/kernel[7]'", "'layers/kernel[0]'", "instead: 'layers/kernel["),
    ),
    "from the end": Case(
        lambda: by_pattern(PATHS, {"**": 1, "layers/kernel[-1]": 2}, "structure="), e.SelectionError,
        ("counts from the front", "'layers/kernel[-1]'", "kernel[3]"),
    ),
    "regex": Case(
        lambda: by_pattern(PATHS, {"re:(": 1}, "structure="), e.SelectionError, ("Not a regular expression", "'re:('"),
    ),
    "no text": Case(
        lambda: by_pattern(PATHS, {3: 1}, "structure="), e.SelectionError, ("a glob or a 're:' pattern", "int 3"),
    ),
    "no sparsity": Case(
        lambda: from_map({"a": (2,)}, {"**": 1.5}), e.SurgeryFunctionError, ("from 0 to 1", "float 1.5"),
        {"path": "**"},
    ),
    "ramp backwards": Case(
        lambda: progress(0, 10, 5), e.ScheduleError, ("ends at or after", "begin 10, end 5", "begin=0"),
    ),
    "ramp too long": Case(lambda: progress(0, 0, 2**27), e.ScheduleError, ("shorter than 2**27",)),
    "power": Case(lambda: progress(0, 0, 5, 2.5), e.ScheduleError, ("whole number", "2.5", "power=3")),
    "power of NaN": Case(lambda: progress(0, 0, 5, float("nan")), e.ScheduleError, ("whole number", "nan")),
    "power of 0": Case(lambda: progress(0, 0, 5, 0), e.ScheduleError, ("from 1 to 32", "Found: 0")),
    "drop too much": Case(lambda: drop_fraction(0, 1.5, 9), e.ScheduleError, ("from 0 to 1", "1.5", "fraction=0.3")),
    "anneal": Case(
        lambda: drop_fraction(0, 0.3, 9, "linear"), e.ScheduleError,
        ("No annealing", "'linear'", "'cosine' or 'constant'"),
    ),
    "endless cosine": Case(lambda: drop_fraction(0, 0.3), e.ScheduleError, ("falls to 0", "end=None", "'constant'")),
    "no end": Case(lambda: drop_fraction(0, 0.3, 0), e.ScheduleError, ("from 1 to", "Found: 0", "end=75_000")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    case = REFUSED[name]
    with pytest.raises(case.error) as caught:
        case.run()
    assert type(caught.value) is case.error
    assert [part for part in case.says if part not in str(caught.value)] == []
    assert {field: getattr(caught.value, field) for field in case.fields} == case.fields


# Ramps.

CUBIC = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
"""0.9 * (1 - (1 - u) ** 3) for u = 0, 0.1, ..., 1; at 0.3 for example 0.9 * (1 - 0.343) = 0.5913."""


def test_the_cubic_by_hand():
    steps = range(0, 1001, 100)
    assert [0.9 * progress(step, 0, 1000) for step in steps] == pytest.approx(CUBIC, abs=1e-6)
    numbers = [kept_at(progress(step, 0, 1000), first=10_000, last=1000) for step in steps]
    assert numbers == [10_000, 7561, 5608, 4087, 2944, 2125, 1576, 1243, 1072, 1009, 1000]


@pytest.mark.parametrize("power", [1, 3.0])
@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 7), (3, 60), (-4, 9), (5, 5), (100, 100_000), (0, 2**27 - 1)])
def test_a_ramp_is_what_it_says(begin, end, power):
    steps = sorted({*range(begin - 2, min(begin + 80, end + 3)), end - 1, end, end + 1})
    found = [progress(step, begin, end, power) for step in steps]
    u = [
        float(np.clip((step - begin) / max(end - begin, 1), 0, 1)) if end > begin else float(step >= end)
        for step in steps
    ]
    assert found == pytest.approx([1 - (1 - one) ** power for one in u], abs=power * 2.0**-23)
    assert found == sorted(found)
    assert progress(end, begin, end, power) == 1
    assert progress(begin - 1, begin, end, power) == 0
    traced = jax.jit(jax.vmap(lambda step: progress(step, begin, end, power)))(jnp.array(steps, jnp.int32))
    assert traced.dtype == jnp.float32
    assert np.array_equal(np.asarray(traced, np.float64), found)


@pytest.mark.parametrize(
    ("first", "last"), [(1000, 100), (100, 1000), (7, 7), (2**31 - 1, 1), (150_994_943, 15_099_495)]
)
def test_numbers_are_the_same_by_themselves_and_inside_a_program(first, last):
    """Exact at both ends, also where float32 does not hold them; monotone; the nearest integer between."""
    steps = [*range(300), 300, 400]

    def ask(step):
        return kept_at(progress(step, 10, 300), first=first, last=last)

    alone = [ask(step) for step in steps]
    assert (alone[0], alone[-1], alone[300]) == (first, last, last)
    assert alone == sorted(alone, reverse=first > last)
    exactly = [first + (last - first) * Fraction(progress(step, 10, 300)) for step in steps]
    assert all(abs(k - one) <= Fraction(1, 2) for k, one in zip(alone, exactly, strict=True))
    inside = jax.jit(jax.vmap(ask))(jnp.array(steps, jnp.int32))
    assert inside.dtype == jnp.int32
    assert inside.tolist() == alone
    eager = [int(ask(jnp.int32(step))) for step in (0, 11, 57, 299, 300)]
    assert eager == [alone[step] for step in (0, 11, 57, 299, 300)]
    assert ask(np.int64(57)) == alone[57]


def test_float32_would_not_be_exact():
    """Why it is integers: the plain formula does not end where it should."""
    first, last = 150_994_943, 15_099_495
    plain = np.float32(first) + np.float32(1.0) * np.float32(last - first)
    assert int(plain) != last


def test_a_share_of_a_count():
    rng = np.random.default_rng(0)
    counts = [0, 1, 2**24 - 1, 2**24, 2**31 - 1, *rng.integers(0, 2**31, 300).tolist()]
    parts = [0, 1, 2**23, 2**24 - 1, 2**24, *rng.integers(0, 2**24, 300).tolist()]
    expected = [(count * part + 2**23) >> 24 for count, part in zip(counts, parts, strict=True)]
    fractions = np.array(parts) / 2.0**24
    assert [share(count, float(one)) for count, one in zip(counts, fractions, strict=True)] == expected
    traced = jax.jit(jax.vmap(share))(jnp.array(counts, jnp.int32), jnp.array(fractions, jnp.float32))
    assert traced.tolist() == expected


def theirs(step, begin, end, target):
    """JaxPruner's PolynomialSchedule, which counts the step at which it is asked as done."""
    u = np.clip(step + 1 - begin, 0, end - begin) / (end - begin)
    return target * (1 - (1 - u) ** 3)


def test_where_jaxpruners_schedule_differs():
    ours = [0.9 * progress(step, 0, 1000) for step in range(1100)]
    assert [theirs(step - 1, 0, 1000, 0.9) for step in range(1, 1100)] == pytest.approx(ours[1:], abs=1e-6)
    assert theirs(0, 0, 1000, 0.9) > 0
    # It updates where `step % update_freq == 0`, up to its end: where that is no such step, the last update stops short
    # for good. Ours goes by the step alone: whoever asks at the end or later is told the target.
    last = max(step for step in range(1001) if step % 300 == 0)
    assert theirs(last, 0, 1000, 0.9) < 0.8992
    assert [kept_at(progress(step, 0, 1000), first=10**6, last=10**5) for step in (1000, 1200)] == [10**5] * 2


@pytest.mark.parametrize("end", [1, 2, 10, 999, 75_000])
def test_the_cosine_of_rigl(end):
    steps = sorted({*range(min(end + 2, 300)), end // 2, end - 1, end, end + 1})
    found = [drop_fraction(step, 0.3, end) for step in steps]
    expected = [0.15 * (1 + math.cos(math.pi * step / end)) if step < end else 0 for step in steps]
    assert found == pytest.approx(expected, abs=2e-7)
    assert found == sorted(found, reverse=True)
    traced = jax.jit(jax.vmap(lambda step: drop_fraction(step, 0.3, end)))(jnp.array(steps, jnp.int32))
    assert np.array_equal(np.asarray(traced, np.float64), found)


def test_a_cosine_falls_everywhere_by_itself():
    found = np.array([drop_fraction(step, 1.0, 20_011) for step in range(20_012)])
    assert (np.diff(found) <= 0).all()
    assert (found[0], found[-1]) == (1, 0)
    assert np.abs(found - (1 + np.cos(np.pi * np.arange(20_012) / 20_011)) / 2).max() < 2e-7


def test_a_constant_fraction():
    assert [drop_fraction(step, 0.25, 10, "constant") for step in (0, 9, 10, 11)] == [0.25, 0.25, 0, 0]
    assert [drop_fraction(step, 0.25, None, "constant") for step in (0, 10**6)] == [0.25, 0.25]
    for end in (10, None):
        traced = jax.jit(lambda step, end=end: drop_fraction(step, 0.25, end, "constant"))
        assert [float(traced(step)) for step in (0, 10)] == [0.25, 0 if end else 0.25]
