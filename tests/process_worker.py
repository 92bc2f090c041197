"""One process of the runs in test_processes.py: a small model over a mesh of all processes, with hooks of every kind.

`python process_worker.py SCENARIO OUT PORT RANK PROCESSES`: the last line that it prints is what it has to say, as JSON;
arrays go to `OUT/RANK.npz`. With PROCESSES of 1 the same devices are all in this process.
"""

import json
import os
import pathlib
import sys
import time

MEMORY_STEP, LAST = 3, 12


def connect(port, rank, processes, heartbeat=100):
    """Joins the other processes; nothing of JAX may have run before."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, rank, heartbeat_timeout_seconds=heartbeat)


def everywhere(*names):
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*names))


def whole(value):
    """A global array of what every process holds whole."""
    import jax
    import numpy as np

    def place(leaf):
        leaf = np.asarray(leaf)
        rows = leaf.ndim == 2 and leaf.shape[0] % 8 == 0
        return jax.make_array_from_callback(leaf.shape, everywhere("data") if rows else everywhere(), leaf.__getitem__)

    return jax.tree.map(place, value)


def fresh_state(tx=None):
    """Two layers that train, and leaves whose gradients are elementwise, so that no order of summation matters."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flax_surgery_hooks as fsh

    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)

    params = {
        "mlp": {"w1": draw(16, 8), "b1": draw(8), "w2": draw(8, 8)},
        "exact": {name: draw(16, 4) for name in ("scaled", "noisy", "reset", "traced", "averaged", "grown", "plain")},
    }
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=tx or optax.adam(0.01))
    return state.replace(step=0)


def make_step(hooks):
    import jax
    import jax.numpy as jnp

    def loss(params, batch):
        hidden = jax.nn.relu(batch @ params["mlp"]["w1"] + params["mlp"]["b1"][None])
        fit = jnp.mean((hidden @ params["mlp"]["w2"] - jnp.sin(batch[:, :8])) ** 2)
        return fit + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params["exact"])), fit

    def step(state, batch):
        (_, fit), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        return hooks.in_graph(state.apply_gradients(grads=grads)), fit

    return jax.jit(step, donate_argnums=0)


def main():
    scenario, out, port, rank, processes = sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:6])
    told = SCENARIOS[scenario](out, port, rank, processes)
    print(json.dumps(told), flush=True)
