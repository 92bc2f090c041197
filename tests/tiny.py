"""A small state, quick hooks on it, and what tests of the runner read off them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_surgery_hooks as fsh

SGD = optax.sgd(0.1)  # without slots, so that an edit compiles in no time
MOMENTUM = optax.sgd(0.1, momentum=0.9)
QUICK = {"guard": "off", "figures": False}


def make_state(step=0, tx=SGD, **params):
    """A train state, by default of one leaf `w` of two ones."""
    return fsh.TrainState.create(apply_fn=None, params=params or {"w": jnp.ones(2)}, tx=tx).replace(step=step)


def make_hooks(surgery, when=None, *, params="w", name="a", options=QUICK, **kwargs):
    """One hook, by default a quick one at every step."""
    hooks = fsh.SurgeryHooks(**kwargs)
    hooks.add(name, surgery, params=params, when=when or fsh.every(1), **options)
    return hooks


def halve(w):
    return w / 2


def w_of(state):
    return np.asarray(state.params["w"]).tolist()


def events(hooks, *kinds):
    """(event, hook, step) of the records of these kinds, of all but "run" by default."""
    return [
        (r.event, r.hook, r.step) for r in hooks.ledger.records if (r.event in kinds if kinds else r.event != "run")
    ]


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (np.asarray(x).dtype, np.asarray(x).tobytes()) == (np.asarray(y).dtype, np.asarray(y).tobytes())
