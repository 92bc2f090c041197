"""What a fire on sharded leaves says to other devices: on the text of its compiled programs."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_surgery_hooks as fsh

ROWS, UNITS = 64, 32
MESHES = {"1d": ((8,), ("data",)), "2d": ((4, 2), ("data", "tensor")), "3d": ((2, 2, 2), ("data", "fsdp", "tensor"))}
SPECS = {"1d": P("data"), "2d": P("data", "tensor"), "3d": P(("data", "fsdp"), "tensor")}
QUICK = {"figures": False, "guard": "off"}


def mesh_of(name: str, kind: AxisType = AxisType.Auto) -> Mesh:
    shape, names = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def state_on(mesh: Mesh, spec: P, tx: optax.GradientTransformation | None = None) -> fsh.TrainState:
    kernel = jnp.arange(1.0, ROWS * UNITS + 1).reshape(ROWS, UNITS)
    params = {"w": jax.device_put(kernel, NamedSharding(mesh, spec))}
    return fsh.TrainState.create(apply_fn=None, params=params, tx=tx or optax.adam(0.1)).replace(step=1)


def program_of(state: fsh.TrainState, surgery, **options):
    hooks = fsh.SurgeryHooks()
    hooks.add("a", surgery, params="**", when=fsh.at(1), **options)
    hooks(1, state)
    (program,) = hooks.programs("a")
    return program


def mask(kernel):
    return jnp.where(jnp.arange(UNITS)[None] < 8, 0, kernel)


ELEMENTWISE = {
    "scale": fsh.surgeries.Scale(0.5),
    "clip": lambda kernel: jnp.clip(kernel, -1, 1),
    "mask": mask,
    "rows": lambda kernel: kernel * (0.5 + jnp.arange(UNITS)[None] / UNITS),
}


@pytest.mark.parametrize("opt_state", ["carry", "transport"])
@pytest.mark.parametrize("edit", ELEMENTWISE)
@pytest.mark.parametrize("mesh", MESHES)
def test_an_elementwise_edit_says_nothing(mesh, edit, opt_state):
    state = state_on(mesh_of(mesh), SPECS[mesh])
    program = program_of(state, ELEMENTWISE[edit], fresh="init", opt_state=opt_state, **QUICK)
    assert program.edit is not None
    assert program.edit_collectives == ()


@pytest.mark.parametrize("mesh", MESHES)
def test_figures_are_one_small_all_reduce(mesh):
    program = program_of(state_on(mesh_of(mesh), SPECS[mesh]), fsh.surgeries.Scale(0.5), fresh="init")
    (one,) = program.measure_collectives
    assert one.kind == "all-reduce"
    assert one.bytes <= 4 * 8 * 3  # eight sums of the leaf and of each of its two moments
    assert program.edit_collectives == ()


def all_in_one(leaves):
    return {path: leaf * 0.5 for path, leaf in leaves.items()}


def test_figures_of_many_leaves_in_one_call_are_one_all_reduce():
    mesh = mesh_of("2d")
    params = {name: jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, SPECS["2d"])) for name in "abcdef"}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).replace(step=1)
    (one,) = program_of(state, all_in_one, fresh="init").measure_collectives
    assert one.bytes == 4 * 8 * 6 * 3


@pytest.mark.parametrize("mesh", MESHES)
def test_the_mean_of_survivors_is_one_all_reduce_of_the_last_axis(mesh):
    program = program_of(state_on(mesh_of(mesh), SPECS[mesh]), fsh.surgeries.Scale(0.5), **QUICK)
    (one,) = program.edit_collectives
    assert one.kind == "all-reduce"
    assert one.bytes == 4 * 3 * UNITS


@pytest.mark.parametrize(
    "surgery", [fsh.surgeries.Normalize(), fsh.surgeries.ClipNorm(1.0)], ids=["normalize", "clip_norm"]
)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_norm_is_scalar_all_reduces(mesh, surgery):
    program = program_of(state_on(mesh_of(mesh), SPECS[mesh]), surgery, fresh="init", **QUICK)
    assert program.edit_collectives
    assert {one.kind for one in program.edit_collectives} == {"all-reduce"}
    assert {shape for one in program.edit_collectives for shape in one.shapes} == {"f32[]"}


def test_an_edit_that_moves_whole_leaves_is_found():
    """The control: what a test of text must not miss."""
    state = state_on(mesh_of("2d"), SPECS["2d"])
    program = program_of(state, lambda kernel: kernel[::-1], fresh="init", opt_state="carry", **QUICK)
    assert program.edit_collectives
    assert max(one.bytes for one in program.edit_collectives) >= 4 * ROWS * UNITS // 8


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.adafactor(0.1), optax.sm3(0.1)], ids=["adam", "factored", "sm3"])
def test_sums_over_shards_are_the_sums(mesh, tx):
    """Figures and starting values of a sharded state are those of one device; a sum of one shard is not."""
    state = state_on(mesh_of(mesh), SPECS[mesh], tx)
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf) + 2, state.params)
    state = state.apply_gradients(grads=grads)
    alone = jax.tree.map(lambda leaf: jnp.asarray(jax.device_get(leaf)), state)
    sharded, record = fsh.operate(state, mask, params="**")
    single, expected = fsh.operate(alone, mask, params="**")
    for name, value in expected.figures.items():
        assert float(record.figures[name]) == pytest.approx(float(value), rel=1e-5), name
    for got, want in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        assert jnp.allclose(jax.device_get(got), want, rtol=1e-5, atol=1e-7)
    norm = float(expected.figures["params/norm_before"])
    assert norm > 1.5 * float(jnp.linalg.norm(state.params["w"].addressable_shards[0].data))


def test_the_report_reads_every_kind():
    text = """
      %a = f32[4,8]{1,0} all-gather(%x), dimensions={0}
      %b = (f32[2]{0}, s32[]) all-reduce-start(%y, %z), to_apply=%add
      %c = (f32[2]{0}, s32[]) all-reduce-done(%b)
      %d = bf16[16]{0} reduce-scatter(%x), dimensions={0}
      %e = pred[3]{0} collective-permute(%x), source_target_pairs={{0,1}}
      %f = f32[2]{0} add(%x, %all-reduce)
    """
    found = fsh.collectives(text)
    assert [(one.kind, one.bytes) for one in found] == [
        ("all-gather", 128), ("all-reduce", 12), ("reduce-scatter", 32), ("collective-permute", 3),
    ]  # fmt: skip
    assert found[1].shapes == ("f32[2]", "s32[]")
    assert "all-gather of f32[4,8] (128 B)" in str(found[0])
