"""The programs that a hook has compiled, as one can look at them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import QUICK, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import HookError
from flax_surgery_hooks.passes import table

ADAM = optax.adam(0.1)


def fired(surgery, fires=1, options=QUICK, opt_state="carry", **params):
    hooks = fsh.SurgeryHooks()
    hooks.add("a", surgery, params="**", when=fsh.at(1), opt_state=opt_state, **options)
    state = make_state(1, ADAM, **params)
    for _ in range(fires):
        state = hooks.fire("a", state, step=1)
    return hooks.programs("a")


def test_leaves_of_one_signature_share_a_program():
    equal = {f"w{i}": jnp.ones((4, 4)) for i in range(5)}
    programs = fired(lambda w: w / 2, fires=2, **equal, short=jnp.ones((4, 4), jnp.bfloat16), long=jnp.ones(9))
    assert sorted((one.leaves[0][:2], one.served) for one in programs) == [
        (((4, 4), "bfloat16"), 2),
        (((4, 4), "float32"), 10),
        (((9,), "float32"), 2),
    ]
    assert [len(one.slots) for one in programs] == [2, 2, 2]


def test_another_placement_is_another_program():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, jax.P("x")))
    programs = fired(lambda w: w / 2, a=jnp.ones((4, 4)), b=spread)
    places = sorted(one.leaves[0][2] for one in programs)
    assert len(places) == 2
    assert "'x'" in places[0]
    assert "cpu:0" in places[1]


def test_a_mix_is_shown_to_keep_its_slots_in_place():
    (mixes,) = fired(lambda w: w - w.mean(), w=jnp.arange(4.0))
    (moves,) = fired(lambda w: w / 2, w=jnp.arange(4.0))
    assert (mixes.in_place, moves.in_place) == (True, False)
    assert "slots in place" in str(mixes)
    assert "slots in place" not in str(moves)


def test_bytes_are_those_of_the_arrays():
    (program,) = fired(lambda w: w / 2, options={}, w=jnp.ones((64, 64)))
    bytes_of_leaf = 64 * 64 * 4
    assert program.edit is not None
    assert program.measure is not None
    assert 3 * bytes_of_leaf <= program.edit.outputs < 3.2 * bytes_of_leaf
    assert 3 * bytes_of_leaf <= program.edit.arguments < 3.2 * bytes_of_leaf
    assert program.edit.touched == program.edit.arguments + program.edit.outputs
    assert program.measure.outputs < bytes_of_leaf
    assert f"{program.edit.temporaries:,} B temporary" in table([program])


ELEMENTWISE = {
    "scale": lambda w: w * 1.5,
    "prune": lambda w: jnp.where(jnp.abs(w) < 0.1, 0.0, w),
    "clip": lambda w: jnp.clip(w, -0.3, 0.3),
    "dead columns": lambda w: jnp.where((jnp.arange(w.shape[1]) % 3 == 0)[None], 0.0, w),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("options", [{}, QUICK], ids=["figures", "quick"])
def test_elementwise_edits_take_next_to_no_temporaries(name, options):
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 768)), jnp.float32)
    (program,) = fired(ELEMENTWISE[name], options=options, opt_state="transport", w=leaf)
    for memory in (program.edit, program.measure):
        if memory is not None:
            assert memory.temporaries < 0.02 * memory.touched


def test_an_edit_that_draws_does_take_temporaries():
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 768)), jnp.float32)
    (program,) = fired(lambda w, key: w / 2 + jax.random.normal(key, w.shape), options={}, w=leaf)
    assert program.measure.temporaries > 0.02 * program.measure.touched  # the bound above can fail


def test_nothing_is_compiled_before_the_first_fire_nor_by_looking():
    hooks = fsh.SurgeryHooks()
    hooks.add("a", lambda w: w / 2, params="w", when=fsh.at(5), **QUICK)
    state = hooks(1, make_state(1, ADAM, w=jnp.ones(3)))
    assert hooks.programs("a") == []
    hooks.fire("a", state, step=2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    assert [one.served for one in hooks.programs("a")] == [1]
    assert not [name for name in compiled if "backend_compile" in name]
    jax.jit(lambda x: x * 17.25)(1.0)
    assert [name for name in compiled if "backend_compile" in name]  # the listener does hear


def test_a_preview_serves_no_leaf():
    hooks = fsh.SurgeryHooks()
    hooks.add("a", lambda w: w / 2, params="w", when=fsh.at(5))
    hooks.preview("a", make_state(1, ADAM, w=jnp.ones(3)))
    (program,) = hooks.programs("a")
    assert (program.served, program.edit) == (0, None)


def test_programs_of_an_unknown_hook_are_an_error():
    with pytest.raises(HookError, match="no hook of this name"):
        fsh.SurgeryHooks().programs("a")
