"""What works on one device works the same on a mesh: values, placement, committedness, memory."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import StructureError, UserCodeError

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {"1d": ((8,), ("data",)), "2d": ((4, 2), ("data", "tensor")), "3d": ((2, 2, 2), ("data", "fsdp", "tensor"))}
SPECS = {"1d": P("data", None), "2d": P("data", "tensor"), "3d": P(("data", "fsdp"), "tensor")}
KINDS = {"auto": (AUTO,), "explicit": (EXPLICIT,), "mixed": (EXPLICIT, AUTO)}
PLACED = [f"{mesh}-{kind}" for mesh in MESHES for kind in KINDS if kind != "mixed" or mesh != "1d"]
CONTAINERS = ["dict", "boxed", "nnx"]
TX = optax.adamw(1e-2, mask={"a": True, "b": False})
ROWS, UNITS = 16, 8


def mesh_of(placed: str) -> Mesh:
    name, kind = placed.split("-")
    shape, names = MESHES[name]
    kinds = (KINDS[kind] * len(names))[: len(names)]
    return jax.make_mesh(shape, names, axis_types=kinds)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


PARAMS = {"a": numbers(0, ROWS, UNITS), "b": numbers(1, UNITS)}
GRADS = {"a": numbers(2, ROWS, UNITS), "b": numbers(3, UNITS)}
NAMES = {"a": ("rows", "units"), "b": ("units",)}


def params_in(container: str, leaves: dict[str, Any]) -> Any:
    match container:
        case "boxed":
            return {name: nn.LogicallyPartitioned(leaf, NAMES[name]) for name, leaf in leaves.items()}
        case "nnx":
            return nnx.State({name: nnx.Param(leaf) for name, leaf in leaves.items()})
    return dict(leaves)


@functools.cache
def state_of(container: str, placed: str | None) -> Any:
    """A train state after one step of AdamW, on a mesh or uncommitted."""
    tx = optax.adamw(1e-2)
    params = params_in(container, {name: jnp.asarray(leaf) for name, leaf in PARAMS.items()})
    grads = params_in(container, {name: jnp.asarray(leaf) for name, leaf in GRADS.items()})
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=grads).replace(step=jnp.int32(1))
    if placed is None:
        return state
    mesh = mesh_of(placed)

    def place(leaf):
        matrix = SPECS[placed.split("-")[0]]
        spec = {0: P(), 1: P(matrix[1]), 2: matrix}[leaf.ndim]
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def mask(leaf):
    return jnp.where(jnp.arange(leaf.shape[-1]) < 3, 0, leaf.T).T if leaf.ndim == 1 else leaf.at[:, :3].set(0)


def permute(leaves):
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    return {path: leaf[..., order] for path, leaf in leaves.items()}


def top(leaf):
    """Keeps the largest half: a sort, which Explicit axes refuse."""
    return jnp.where(jnp.abs(leaf) >= jnp.sort(jnp.abs(leaf).ravel())[leaf.size // 2], leaf, 0)


def perturb(leaf, key):
    return 0.5 * leaf + 0.1 * jax.random.normal(key, leaf.shape)


# Surgery, options, relative tolerance: 0 where no sum over several devices is involved.
SURGERIES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "scale": (fsh.surgeries.Scale(0.3), {}, 0),
    "scale_transport": (fsh.surgeries.Scale(0.3), {"opt_state": "transport"}, 0),
    "mask": (mask, {"fresh": "init"}, 0),
    "mask_mean": (mask, {}, 1e-6),
    "top": (top, {"fresh": "init"}, 0),
    "permute": (permute, {"opt_state": "transport"}, 0),
    "perturb": (perturb, {}, 0),
    "normalize": (fsh.surgeries.Normalize(), {}, 1e-6),
    "clip_norm": (fsh.surgeries.ClipNorm(1.0), {}, 1e-6),
    "noise": (fsh.surgeries.Noise(0.1), {}, 1e-5),  # relative to the leaf's own size
    "reinit": (fsh.surgeries.Reinit(initializer=nn.initializers.normal(0.1)), {}, 1e-6),
    "reset": (fsh.surgeries.Scale(1.0), {"opt_state": "reset"}, 0),
    "moments": (fsh.surgeries.ResetMoments(), {}, 0),
}


def edited(name: str, state: Any) -> Any:
    surgery, options, _ = SURGERIES[name]
    key = jax.random.key(5)
    return fsh.operate(state, surgery, params="**", guard="off", key=key, **options)[0]


@functools.cache
def alone(name: str) -> Any:
    """The leaves of the edited state on one device."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(edited(name, state_of("dict", None)))]


@pytest.mark.parametrize("name", SURGERIES)
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("container", CONTAINERS)
def test_values_are_those_of_one_device_and_placement_stays(container, placed, name):
    state = state_of(container, placed)
    after = edited(name, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    tolerance = SURGERIES[name][2]
    for old, new, expected in zip(jax.tree.leaves(state), jax.tree.leaves(after), alone(name), strict=True):
        assert new.sharding == old.sharding
        assert new.committed == old.committed
        np.testing.assert_allclose(np.asarray(new), expected, rtol=tolerance, atol=tolerance)
    untouched = jax.tree.leaves(state_of("dict", None))
    assert any(not np.array_equal(a, b) for a, b in zip(alone(name), untouched, strict=True))


@pytest.mark.parametrize("placed", ["2d-auto", "2d-explicit", "3d-mixed"])
def test_an_ambient_mesh_changes_nothing(placed):
    state = state_of("dict", placed)
    for name in ("top", "normalize", "permute"):
        with jax.set_mesh(mesh_of(placed)):
            within = edited(name, state)
        for inside, outside in zip(jax.tree.leaves(within), jax.tree.leaves(edited(name, state)), strict=True):
            assert inside.sharding == outside.sharding
            np.testing.assert_array_equal(inside, outside)


@pytest.mark.parametrize("placed", ["1d-auto", "2d-explicit", "3d-auto"])
def test_a_step_with_fixed_shardings_takes_the_edited_state_without_compiling(placed):
    state = state_of("boxed", placed)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    grads = jax.tree.map(jnp.ones_like, state.params)

    @functools.partial(jax.jit, in_shardings=(shardings,), out_shardings=shardings, donate_argnums=0)
    def step(state):
        return state.apply_gradients(grads=grads)

    hooks = fsh.SurgeryHooks()
    hooks.add("a", fsh.surgeries.Normalize(), params="a", when=fsh.every(2))
    state = jax.tree.map(jnp.copy, state)
    state = jax.device_put(state, shardings)
    for i in range(2, 7):
        state = hooks(i, step(state))
    assert step._cache_size() == 1
    assert len([record for record in hooks.ledger.records if record.event == "fired"]) == 3


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="XLA cannot yet read leaves of a mesh in host memory")
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_memory_kinds_stay(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    try:
        host = NamedSharding(mesh, P("data"), memory_kind="unpinned_host")
        leaf = jax.device_put(jnp.arange(16.0), host)
    except ValueError as error:
        pytest.skip(f"no such memory here: {error}")
    state = fsh.TrainState.create(apply_fn=None, params={"w": leaf}, tx=optax.sgd(0.1))
    after, _ = fsh.operate(state, fsh.surgeries.Scale(0.5))
    assert after.params["w"].sharding == host
    np.testing.assert_array_equal(after.params["w"], np.arange(16) / 2)


def two(first: Any, second: Any) -> Any:
    """A state of two leaves, each with its moments beside it."""
    tx = optax.adam(0.1)
    params = {"a": jnp.arange(1.0, 17).reshape(4, 4), "b": jnp.arange(2.0, 18).reshape(4, 4)}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx)

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        sharding = first if "'a'" in name else second if "'b'" in name else None
        return leaf if sharding is None else jax.device_put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def placements() -> dict[str, tuple[Any, Any]]:
    devices = np.array(jax.devices())
    flat, square = Mesh(devices, ("x",)), Mesh(devices.reshape(4, 2), ("y", "z"))
    half = Mesh(devices[:4], ("x",))
    return {
        "two_meshes": (NamedSharding(flat, P()), NamedSharding(square, P("y", "z"))),
        "two_sets": (NamedSharding(half, P("x")), SingleDeviceSharding(devices[7])),
        "uncommitted": (NamedSharding(flat, P()), None),
    }


@pytest.mark.parametrize("name", placements())
def test_each_leaf_keeps_its_own_place(name):
    state = two(*placements()[name])
    expected, _ = fsh.operate(two(None, None), fsh.surgeries.Normalize(), params="**")
    after, record = fsh.operate(state, fsh.surgeries.Normalize(), params="**")
    for old, new, want in zip(*map(jax.tree.leaves, (state, after, expected)), strict=True):
        if isinstance(old, jax.Array):
            assert (new.sharding, new.committed) == (old.sharding, old.committed)
        np.testing.assert_allclose(new, want, rtol=1e-6)
    assert float(record.figures["params/elements"]) == 32


@pytest.mark.parametrize("name", ["two_sets"])
def test_a_surgery_that_couples_leaves_on_other_devices_is_refused(name):
    state = two(*placements()[name])
    swap = lambda leaves: {"a": leaves["a"] + leaves["b"].mean(), "b": leaves["b"]}  # noqa: E731
    with pytest.raises(StructureError, match=r"path 'a, b'.*arrays that lie on different devices.*jax.device_put"):
        fsh.operate(state, swap, params="**", opt_state="keep")


def test_a_surgery_that_couples_leaves_on_two_meshes_of_the_same_devices_works():
    state = two(*placements()["two_meshes"])
    swap = lambda leaves: {"a": leaves["b"], "b": leaves["a"]}  # noqa: E731
    after, _ = fsh.operate(state, swap, params="**", opt_state="transport")
    np.testing.assert_array_equal(after.params["a"], state.params["b"])
    assert after.params["a"].sharding == state.params["a"].sharding
    assert after.params["b"].sharding == state.params["b"].sharding


def pad(leaf):
    return jnp.concatenate([leaf, leaf])


def grown(state: Any, **options: Any) -> Any:
    hooks = fsh.SurgeryHooks()
    hooks.add("grow", pad, params="a", when=fsh.at(1), on_reshape=lambda state, record: None, **options)
    return hooks(1, state)


@pytest.mark.parametrize("placed", ["2d-auto", "2d-explicit", "3d-mixed"])
def test_a_leaf_of_another_shape_keeps_its_spec(placed):
    state = state_of("dict", placed)
    after = grown(state)
    assert after.params["a"].shape == (2 * ROWS, UNITS)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert new.sharding == old.sharding


@pytest.mark.parametrize("placed", ["2d-auto", "2d-explicit"])
def test_shardings_say_where_a_leaf_of_another_shape_goes(placed):
    state = state_of("dict", placed)
    seen = []

    def shardings(path, leaf):
        seen.append((path, leaf.shape))
        return P(None, ("data", "tensor"))

    after = grown(state, shardings=shardings)
    expected = NamedSharding(mesh_of(placed), P(None, ("data", "tensor")))
    assert set(seen) == {("a", (2 * ROWS, UNITS))}
    assert after.params["a"].sharding == expected
    assert after.opt_state[0].mu["a"].sharding == after.opt_state[0].nu["a"].sharding == expected
    assert after.params["b"] is state.params["b"]
    np.testing.assert_array_equal(after.params["a"][ROWS:], state.params["a"])


def test_boxes_say_where_a_leaf_of_another_shape_goes():
    """A leaf that lies otherwise than its box names it goes where the box says."""
    mesh = mesh_of("2d-auto")
    box = nn.Partitioned(jnp.ones((8, 8)), ("tensor", None))
    state = fsh.TrainState.create(apply_fn=None, params={"a": box}, tx=optax.adam(0.1)).replace(step=1)
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())), state)
    after = grown(state.replace(step=1))
    assert after.params["a"].value.sharding == NamedSharding(mesh, P("tensor", None))
    assert grown(state.replace(step=1), shardings=lambda *_: P()).params["a"].value.sharding.spec == P()


def test_logical_names_go_by_the_rules():
    state = state_of("boxed", "2d-auto")
    with nn.logical_axis_rules([("rows", None), ("units", "data")]):
        after = grown(state)
    assert after.params["a"].value.sharding.spec == P(None, "data")
    assert grown(state).params["a"].value.sharding.spec == SPECS["2d"]


@pytest.mark.parametrize(
    ("shardings", "error", "said"),
    [
        (lambda *_: "data", StructureError, r"must return a sharding. Found: str"),
        (lambda *_: 1 / 0, UserCodeError, r"shardings= raised ZeroDivisionError"),
        (lambda *_: P(None, None, "data"), StructureError, r"path 'a'.*divide.*fewer axes than"),
        (lambda path, leaf: P(None, ("data", "fsdp", "tensor")), StructureError,
         r"hook 'grow'.*path 'a'.*axis 1 of size 4 over 'data' and 'fsdp' and 'tensor', 8 shards"),
    ],
)  # fmt: skip
def test_shardings_that_cannot_be_are_told(shardings, error, said):
    state = state_of("dict", "3d-auto")
    hooks = fsh.SurgeryHooks()
    hooks.add("grow", lambda leaf: leaf[:, :4], params="a", when=fsh.at(1), shardings=shardings, opt_state="carry")
    with pytest.raises(error, match=said):
        hooks(1, state)


def test_a_spec_without_a_mesh_is_told():
    with pytest.raises(StructureError, match=r"gives a PartitionSpec, and the leaves of the fire lie on no mesh"):
        grown(state_of("dict", None), shardings=lambda *_: P("data"))


def test_a_shape_that_does_not_divide_is_told_before_the_fire():
    hooks = fsh.SurgeryHooks()
    hooks.add("cut", lambda leaf: leaf[:6], params="a", when=fsh.at(50), on_reshape=lambda state, record: None)
    with pytest.raises(StructureError, match=r"hook 'cut'.*path 'a'.*axis 0 of size 6 over 'data', 4 shards.*tensor"):
        hooks(1, state_of("dict", "2d-auto"))


def test_two_train_states_share_a_ledger_without_confusion(tmp_path):
    path = tmp_path / "ledger.jsonl"
    actor, critic = fsh.SurgeryHooks(seed=1, ledger=path), fsh.SurgeryHooks(seed=2, ledger=path)
    actor.add("actor_norm", fsh.surgeries.Normalize(), params="a", when=fsh.every(2))
    critic.add("critic_scale", fsh.surgeries.Scale(0.5), params="**", when=fsh.every(3))
    one, other = state_of("dict", "2d-auto").replace(step=0), state_of("dict", None).replace(step=0)
    for step in range(7):
        one, other = actor(step, one.replace(step=step)), critic(step, other.replace(step=step))
    actor.flush(), critic.flush()
    lines = path.read_text().splitlines()
    assert sum('"fired"' in line for line in lines) == 5
    assert sum('"settled"' in line and "actor_norm" in line for line in lines) == 3
    assert {record.hook for record in actor.ledger.records} == {"", "actor_norm"}
    assert {record.hook for record in critic.ledger.records} == {"", "critic_scale"}


def test_an_edit_of_leaves_needs_no_more_than_the_state_and_what_it_touches():
    """From XLA's own account of the programs: one leaf at a time, or all touched ones together; nothing in between."""
    mesh = mesh_of("2d-auto")
    sharding = NamedSharding(mesh, P("data", "tensor"))
    params = {name: jax.device_put(jnp.ones((1024, 512)), sharding) for name in "abcdefgh"}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).replace(step=1)
    shard = 3 * 1024 * 512 * 4 // 8  # a leaf with its two moments, on one device
    for surgery, leaves in ((fsh.surgeries.Scale(0.5), 1), (lambda leaves: {p: w / 2 for p, w in leaves.items()}, 8)):
        hooks = fsh.SurgeryHooks()
        hooks.add("a", surgery, params="**", when=fsh.at(1))
        hooks(1, state)
        (program,) = hooks.programs("a")
        assert program.served == 8 // leaves
        assert shard * leaves <= program.edit.outputs <= shard * leaves * 1.01
        assert program.edit.temporaries < shard * leaves * 0.02
        assert program.measure.outputs + program.measure.temporaries < shard * leaves * 0.05
