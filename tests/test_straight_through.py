"""Masked params in a loss: their values bit by bit, and the gradients by hand."""

import functools
import types

import containers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from raised import Case
from tiny import MOMENTUM, assert_bitwise_equal, make_state

from flax_surgery_hooks import errors as e
from flax_surgery_hooks import paths
from flax_surgery_hooks.sparsity import apply_masks, masks_of, sr_ste, ste

FORMS = {"ste": ste, "sr_ste": sr_ste, "apply_masks": apply_masks}
KERNEL = jnp.array([[1.0, -2.0, 3.0], [-0.0, jnp.inf, -jnp.inf]])
MASK = jnp.array([[True, False, True], [False, True, False]])
PARAMS = {"a": {"kernel": KERNEL, "bias": jnp.arange(3.0)}}
MASKS = {"a/kernel": MASK}
FACTORS = jnp.array([[0.5, -3.0, 7.0], [1e-30, 2.0, -4.0]])


def gradient(form, params=PARAMS, masks=MASKS, factors=FACTORS):
    def loss(params):
        kernel = form(params, masks)["a"]["kernel"]
        return jnp.sum(kernel * factors)

    return jax.grad(loss)(params)


# Values.


@pytest.mark.parametrize("name", FORMS)
def test_the_value_is_the_weight_or_zero(name):
    found = FORMS[name](PARAMS, MASKS)
    expected = np.where(MASK, KERNEL, np.float32(0))
    assert_bitwise_equal(found, {"a": {"kernel": expected, "bias": PARAMS["a"]["bias"]}})
    assert found["a"]["bias"] is PARAMS["a"]["bias"]
    assert_bitwise_equal(jax.jit(lambda params: FORMS[name](params, MASKS))(PARAMS), found)


def test_the_usual_way_to_write_it_is_not_exact():
    """`w + stop_gradient(masked - w)` is off in its last bit, and NaN where a weight is infinite."""
    weights = jnp.array([1e8, 0.1, jnp.inf], jnp.float32)
    usual = weights + (jnp.where(jnp.array([True, True, False]), weights, 0) - weights)
    assert bool(jnp.isnan(usual[2]))
    assert float(ste({"w": weights}, {"w": jnp.array([True, True, False])})["w"][2]) == 0


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_stay(name, dtype):
    params = {"w": jnp.array([1.5, 2.5], dtype)}
    masks = {"w": jnp.array([True, False])}
    value, grads = jax.value_and_grad(lambda params: FORMS[name](params, masks)["w"].sum())(params)
    assert value == 1.5
    assert value.dtype == grads["w"].dtype == dtype


# Gradients.


def test_the_gradient_of_ste_goes_to_every_element():
    found = gradient(ste)
    assert np.array_equal(found["a"]["kernel"], FACTORS)
    assert not found["a"]["bias"].any()
    forward = jax.jvp(lambda params: ste(params, MASKS), (PARAMS,), (jax.tree.map(jnp.ones_like, PARAMS),))[1]
    assert all(leaf.all() for leaf in jax.tree.leaves(forward))


def test_the_gradient_of_hard_masks_is_masked():
    """What STE must not be."""
    found = gradient(apply_masks)
    assert np.array_equal(found["a"]["kernel"], np.where(MASK, FACTORS, 0))
    assert not np.array_equal(found["a"]["kernel"], gradient(ste)["a"]["kernel"])


@pytest.mark.parametrize("decay", [0, 2e-4, 0.5])
def test_the_gradient_of_sr_ste_pulls_masked_weights_to_zero(decay):
    finite = {"a": {**PARAMS["a"], "kernel": jnp.where(jnp.isfinite(KERNEL), KERNEL, 4.0)}}
    found = gradient(functools.partial(sr_ste, decay=decay), finite)["a"]["kernel"]
    kernel = np.asarray(finite["a"]["kernel"])
    assert np.array_equal(found, FACTORS + np.float32(decay) * (1 - np.asarray(MASK)) * kernel)


def test_sr_ste_decays_by_2e_4_by_default_and_leaves_kept_infinities_alone():
    assert_bitwise_equal(gradient(sr_ste), gradient(functools.partial(sr_ste, decay=2e-4)))
    assert gradient(sr_ste)["a"]["kernel"][1, 1] == FACTORS[1, 1]


def test_a_masked_weight_comes_back_by_ste_alone():
    """The larger of two is kept; at first the one that is where it should be, and the other should be at 1."""

    def train(form):
        @jax.jit
        def step(w):
            mask = jnp.abs(w) >= jnp.max(jnp.abs(w))
            loss = lambda params: jnp.sum((form(params, {"w": mask})["w"] - jnp.array([0.3, 1.0])) ** 2)  # noqa: E731
            return w - 0.1 * jax.grad(loss)({"w": w})["w"]

        w = jnp.array([0.3, 0.1])
        for _ in range(20):
            w = step(w)
        return w

    assert train(ste)[1] > 0.9
    assert np.array_equal(train(apply_masks), np.float32([0.3, 0.1]))


# Trees.


@pytest.mark.parametrize("container", sorted(containers.ALL))
def test_every_container(container):
    network = containers.network_of(container)
    params = containers.ALL[container](network.params()).params
    leaves = paths.flatten(params)
    masks = {path: jnp.zeros(jnp.shape(leaf), bool) for path, leaf in zip(leaves.paths, leaves.values, strict=True)
             if jnp.ndim(leaf) == 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}  # fmt: skip
    assert masks
    found = ste(params, masks)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for path, old, new in zip(leaves.paths, leaves.values, paths.flatten(found).values, strict=True):
        assert not np.any(np.asarray(new)) if path in masks else new is old


def stacked(axis=0):
    shape = (3, 4, 2) if axis == 0 else (4, 3, 2)
    return {"layers": {"kernel": jnp.arange(1.0, 25.0).reshape(shape)}}


@pytest.mark.parametrize("name", FORMS)
def test_layers_of_a_stacked_leaf(name):
    params = stacked()
    masks = {f"layers/kernel[{i}]": jnp.arange(8).reshape(4, 2) % (i + 2) == 0 for i in (2, 0)}
    expected = np.asarray(params["layers"]["kernel"]).copy()
    for i in (2, 0):
        expected[i] *= np.asarray(masks[f"layers/kernel[{i}]"])
    value, pull = jax.vjp(lambda params: FORMS[name](params, masks), params)
    assert np.array_equal(value["layers"]["kernel"], expected)
    (grads,) = pull(jax.tree.map(jnp.ones_like, params))
    if name == "ste":
        assert (grads["layers"]["kernel"] == 1).all()
    if name == "apply_masks":
        assert np.array_equal(grads["layers"]["kernel"], expected != 0)


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_layers_lie_along_the_axis_that_the_box_names(box):
    params = jax.tree.map(lambda leaf: box(leaf, names=(None, "layers", None)), stacked(axis=1))
    mask = jnp.zeros((4, 2), bool)
    kernel = ste(params, {"layers/kernel[1]": mask})["layers"]["kernel"]
    assert isinstance(kernel, box)
    assert [bool(kernel.value[:, i].any()) for i in range(3)] == [True, False, True]


def test_a_parameter_whose_name_ends_in_brackets():
    params = {"w": jnp.ones((3, 2)), "w[0]": jnp.ones(2)}
    found = ste(params, {"w[0]": jnp.zeros(2, bool)})
    assert (bool(found["w"].all()), bool(found["w[0]"].any())) == (True, False)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_params_stay_where_they_are_in_a_step(kind):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    place = NamedSharding(mesh, P("data", "tensor"))
    stack = NamedSharding(mesh, P(None, "data", "tensor"))
    params = {"w": jax.device_put(jnp.ones((8, 4)), place), "s": jax.device_put(jnp.ones((2, 8, 4)), stack)}
    mask = jax.device_put(jnp.arange(32).reshape(8, 4) % 3 == 0, place)
    masks = {"w": mask, "s[1]": mask}
    with jax.set_mesh(mesh):
        for form in FORMS.values():
            step = jax.jit(lambda params, masks, form=form: form(params, masks))
            found = step(params, masks)
            assert all(
                found[path].sharding.is_equivalent_to(params[path].sharding, params[path].ndim) for path in found
            )
            text = step.lower(params, masks).compile().as_text()
            assert "all-gather" not in text
            assert np.array_equal(found["s"][1], np.asarray(mask, np.float32))


# Masks out of a state.


def state_with(**memory):
    return make_state().replace(surgery={"memory": memory})


def test_masks_of_a_hook():
    state = state_with(prune={"w": jnp.array([True, False])}, other={"w": jnp.zeros(2)})
    assert masks_of(state, "prune")["w"].tolist() == [True, False]

    @jax.jit
    def forward(state):
        return ste(state.params, masks_of(state, "prune"))["w"]

    assert forward(state).tolist() == [1, 0]
    frozen = types.SimpleNamespace(surgery=FrozenDict({"memory": {"prune": {"w": jnp.array([True])}}}))
    assert masks_of(frozen, "prune")["w"].tolist() == [True]
    abstract = jax.eval_shape(lambda: state)
    assert masks_of(abstract, "prune")["w"].shape == (2,)


def test_masks_of_an_optimizer_of_nnx():
    """It holds them as variables, as `bind_nnx` puts them there."""
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MOMENTUM, wrt=nnx.Param)
    optimizer.surgery = nnx.data({"memory": {"prune": {"kernel": type(optimizer.step)(jnp.array([[True], [False]]))}}})
    found = masks_of(optimizer, "prune")
    kernel = ste(nnx.state(model, nnx.Param), found)["kernel"][...]
    assert (kernel != 0).tolist() == [[True], [False]]


GOOD = jnp.array([True, False])
REFUSED = {
    "no such param": Case(
        lambda: ste({"a": {"kernel": jnp.ones(2)}}, {"a/kernl": GOOD}), e.SelectionError,
        ("not there", "'a/kernel'", "Write instead: 'a/kernel'"), {"path": "a/kernl"},
    ),
    "no params": Case(lambda: apply_masks({}, {"w": GOOD}), e.SelectionError, ("no parameters at all",), {"path": "w"}),
    "no such layer": Case(
        lambda: ste(stacked(), {"layers/kernel[3]": jnp.zeros((4, 2), bool)}), e.SelectionError,
        ("has not", "shape [3, 4, 2], layers along axis 0", "up to 2"), {"path": "layers/kernel[3]"},
    ),
    "a scalar's layer": Case(
        lambda: ste({"s": jnp.float32(1)}, {"s[0]": GOOD}), e.SelectionError,
        ("has not", "shape []", "without an index"), {"path": "s[0]"},
    ),
    "not from the front": Case(
        lambda: ste(stacked(), {"layers/kernel[-1]": jnp.zeros((4, 2), bool)}), e.SelectionError, ("not there",),
        {"path": "layers/kernel[-1]"},
    ),
    "twice": Case(
        lambda: ste(stacked(), {"layers/kernel": jnp.ones((3, 4, 2), bool), "layers/kernel[1]": jnp.ones((4, 2)) > 0}),
        e.SelectionError, ("as a whole, and masks of its layers", "layers 1", "one of them"), {"path": "layers/kernel"},
    ),
    "another shape": Case(
        lambda: sr_ste({"w": jnp.ones(2)}, {"w": jnp.ones(3, bool)}), e.StructureError,
        ("of the shape", "bool[3]", "a mask of bool[2]", "hooks.init"), {"path": "w"},
    ),
    "a layer's shape": Case(
        lambda: ste(stacked(), {"layers/kernel[0]": jnp.ones((3, 4, 2), bool)}), e.StructureError,
        ("bool[3, 4, 2]", "bool[4, 2]"), {"path": "layers/kernel[0]"},
    ),
    "no bools": Case(
        lambda: ste({"w": jnp.ones(2)}, {"w": jnp.ones(2)}), e.StructureError,
        ("of bools", "float32[2]"), {"path": "w"},
    ),
    "None": Case(lambda: ste({"w": jnp.ones(2)}, {"w": None}), e.StructureError, ("NoneType",), {"path": "w"}),
    "decay": Case(
        lambda: sr_ste({"w": jnp.ones(2)}, {"w": GOOD}, -1), e.SurgeryFunctionError, ("0 or more", "Found: -1", "2e-4"),
    ),
    "NaN as decay": Case(
        lambda: sr_ste({"w": jnp.ones(2)}, {"w": GOOD}, float("nan")), e.SurgeryFunctionError, ("Found: nan",),
    ),
    "no field": Case(
        lambda: masks_of(types.SimpleNamespace(), "prune"), e.StateError,
        ("no masks of a hook 'prune'", "no hook", "hooks.init(state)"),
    ),
    "not initialised": Case(lambda: masks_of(make_state(), "prune"), e.StateError, ("no hook", "hooks.init(state)")),
    "another hook": Case(
        lambda: masks_of(state_with(prune={"w": GOOD}, grow={"w": GOOD}), "prun"), e.StateError,
        ("a hook 'prun'", "memory of prune, grow", "instead: 'prune'"),
    ),
    "another memory": Case(
        lambda: masks_of(state_with(mean={"w": jnp.ones(2)}), "mean"), e.StateError,
        ("'mean' remembers is not masks", "float32[2]", "prunes"),
    ),
    "no dict": Case(lambda: masks_of(state_with(mean=jnp.ones(2)), "mean"), e.StateError, ("not masks", "float32[2]")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    case = REFUSED[name]
    with pytest.raises(case.error) as caught:
        case.run()
    assert type(caught.value) is case.error
    assert [part for part in case.says if part not in str(caught.value)] == []
    assert {field: getattr(caught.value, field) for field in case.fields} == case.fields
