"""Layers of stacked leaves in selections, against Python's own indexing, and every way in which one is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_surgery_hooks import paths
from flax_surgery_hooks.errors import SelectionError
from flax_surgery_hooks.selection import select

LEAVES = paths.flatten(
    {
        "head": {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2)), "scale": jnp.ones(())},
        "layers": {
            "attn": {"bias": jnp.ones((4, 3)), "kernel": jnp.ones((4, 3, 3))},
            "mlp": {"kernel": jnp.ones((4, 3, 5))},
        },
        "none": jnp.ones((0, 3)),
    }
)
INDICES = ["0", "3", "-1", "-4", ":", "1:", ":2", "1:3", "-2:", ":-1", "::2", "::-1", "3:0:-2", "1:9", "0:4:3"]


def picked(*arguments, leaves=LEAVES, **named):
    return [pick.path(leaves) for pick in select(*arguments, **named).picks(leaves)]


@pytest.mark.parametrize("index", INDICES)
def test_an_index_takes_what_python_takes(index):
    held = eval(f"np.arange(4)[{index}]")
    expected = [f"layers/mlp/kernel[{i}]" for i in sorted(np.ravel(held))]
    assert picked(f"layers/mlp/kernel[{index}]") == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("layers/**/kernel[3]",), ["layers/attn/kernel[3]", "layers/mlp/kernel[3]"]),
        (("layers/**[0]",), ["layers/attn/bias[0]", "layers/attn/kernel[0]", "layers/mlp/kernel[0]"]),
        (("layers/attn/{bias,kernel}[-1]",), ["layers/attn/bias[3]", "layers/attn/kernel[3]"]),
        ((["layers/attn/bias[0:2]", "layers/attn/bias[1]"],), ["layers/attn/bias[0]", "layers/attn/bias[1]"]),
        (("layers/attn/bias", "**/bias[0]"), [f"layers/attn/bias[{i}]" for i in (1, 2, 3)]),
        (("layers/attn/bias[:3]", "**/bias[0]"), [f"layers/attn/bias[{i}]" for i in (1, 2)]),
        (("**/kernel[0]", "layers/**"), ["head/kernel[0]"]),
        (("**/bias", "layers/**/bias[1:]"), ["head/bias", "layers/attn/bias[0]"]),
        ((["layers/attn/bias[0]", "head/bias"], "head/kernel[0]"), ["head/bias", "layers/attn/bias[0]"]),
        ((["re:layers/mlp/.*", "layers/attn/kernel[2]"],), ["layers/attn/kernel[2]", "layers/mlp/kernel"]),
        ((["layers/attn/bias", "layers/attn/bias[0]", "head/bias"], "layers/**"), ["head/bias"]),
        ((select("layers/mlp/kernel", "**[:2]"), "**[3]"), ["layers/mlp/kernel[2]"]),
    ],
)
def test_unions_and_exclusions(arguments, expected):
    if "**[" in str(arguments):  # every leaf must have the layer
        stacked = paths.flatten({"layers": {"mlp": {"kernel": jnp.ones((4, 3, 5))}}})
        leaves = stacked if isinstance(arguments[0], type(select("a"))) else LEAVES
        assert picked(*arguments, leaves=leaves) == expected
    else:
        assert picked(*arguments) == expected


def test_expect_counts_layers():
    assert len(picked("layers/**/kernel", exclude="**/kernel[0]", expect=6)) == 6
    with pytest.raises(SelectionError, match="Expected 2 leaves, but 4 are selected") as caught:
        picked("layers/mlp/kernel[:]", expect=2)
    assert "layers/mlp/kernel[3]" in caught.value.found


def test_abstract_leaves_and_one_bare_array():
    abstract = paths.flatten({"a": jax.ShapeDtypeStruct((3, 2), jnp.float32)})
    assert picked("a[1:]", leaves=abstract) == ["a[1]", "a[2]"]
    assert picked("**[1]", leaves=paths.flatten(jnp.ones((3, 2)))) == ["[1]"]


def test_the_description_is_the_pattern_as_written():
    assert select("a[1:3]", exclude="*[2]").describe() == {"params": ["a[1:3]"], "exclude": ["*[2]"], "expect": None}


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
@pytest.mark.parametrize(
    ("names", "axis"), [(("embed", "layers", "mlp"), 1), (("layers", None, None), 0), (("a", "b", "c"), 0)]
)
def test_the_axis_that_a_box_names_layers(box, names, axis):
    leaves = paths.flatten({"k": box(jnp.ones((4, 5, 6)), names=names), "b": jnp.ones((2, 3))})
    (first, *others) = select("k[0:2]").picks(leaves)
    assert (first.layer.axis, len(others)) == (axis, 1)
    assert first.path(leaves) == "k[0]"
    assert len(select("k[:]").picks(leaves)) == (4, 5, 6)[axis]
    assert select("b[1]").picks(leaves)[0].layer.axis == 0


REFUSED = {
    "in the middle": ("Dense_[0-3]/kernel", "but for an index at its very end", "'Dense_[0-3]/kernel'", "'re:Dense_["),
    "character class": ("layers/Dense_[ab]", "Brackets are not part of a glob", "'layers/Dense_[ab]'", "'re:Dense_["),
    "a range with a dash": ("kernel[0-3]", "Brackets are not part of a glob", "'kernel[0-3]'", "'kernel[2:4]'"),
    "a list": ("kernel[1,2]", "Brackets are not part of a glob", "'kernel[1,2]'", "'kernel[2:4]'"),
    "nothing": ("kernel[]", "Brackets are not part of a glob", "'kernel[]'", "'layers/**/kernel[3]'"),
    "a step of 0": ("kernel[::0]", "Brackets are not part of a glob", "'kernel[::0]'", "'kernel[2:4]'"),
    "twice": ("kernel[0][1]", "Brackets are not part of a glob", "'kernel[0][1]'", "'layers/**/kernel[3]'"),
    "of no name": ("[3]", "Brackets are not part of a glob", "'[3]'", "'layers/**/kernel[3]'"),
    "of an empty name": ("layers/[3]", "Brackets are not part of a glob", "'layers/[3]'", "'layers/**/kernel[3]'"),
    "within braces": ("{a[0],b}", "Brackets are not part of a glob", "'{a[0],b}'", "'layers/**/kernel[3]'"),
    "never closed": ("kernel[3", "Brackets are not part of a glob", "'kernel[3'", "'layers/**/kernel[3]'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name):
    pattern, problem, found, write = REFUSED[name]
    with pytest.raises(SelectionError) as caught:
        select(pattern)
    error = caught.value
    assert problem in error.problem
    assert error.found == found
    assert write in error.write


UNFIT = {
    "beyond": ("layers/attn/kernel[4]", "[4] takes none of the 4 layers", "layers/attn/kernel", "from -4 to 3"),
    "before": ("layers/attn/kernel[-5]", "[-5] takes none of the 4 layers", "layers/attn/kernel", "from -4 to 3"),
    "empty slice": ("head/kernel[3:2]", "[3:2] takes none", "head/kernel", "from -4 to 3"),
    "slice beyond": ("head/kernel[9:]", "[9:] takes none", "head/kernel", "from -4 to 3"),
    "axis of size 0": ("none[:]", "takes none of the 0 layers", "none", "a pattern that matches other leaves"),
    "scalar": ("head/scale[0]", "a leaf without axes has none", "head/scale", "'layers/**/kernel[3]'"),
    "one of many": ("**/kernel[3]", None, None, None),
    "whole and layers": (["layers/**", "layers/attn/kernel[1]"], "as a whole and by layers", "layers/attn/kernel",
                         "exclude= with an index"),
    "no such leaf": ("atn/kernel[1]", "matches none of the 7", None, "'layers/attn/kernel'"),
    "name alone": ("kernel[1]", "matches none of the 7", None, "'**/kernel[1]'"),
    "a module": ("layers/mlp[1]", "matches none of the 7", None, "'layers/mlp/**[1]'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_refused_for_these_leaves(name):
    patterns, problem, path, write = UNFIT[name]
    if problem is None:  # the control: all of its leaves have the layer
        assert len(picked(patterns)) == 3
        return
    with pytest.raises(SelectionError) as caught:
        picked(patterns)
    error = caught.value
    assert problem in error.problem
    assert error.path == path
    assert write in error.write
    assert error.found


def test_everything_excluded_layer_by_layer():
    with pytest.raises(SelectionError, match="also excluded") as caught:
        picked("head/bias[0]", exclude=["head/bias[:1]"])
    assert caught.value.found == "head/bias[0]"


def test_where_only_whole_leaves_can_be_selected():
    with pytest.raises(SelectionError, match="Only whole leaves") as caught:
        select("head/bias[1]").resolve(LEAVES)
    assert (caught.value.found, caught.value.write) == ("head/bias[1]", "no index")
    assert select("head/bias").resolve(LEAVES) == (0,)
