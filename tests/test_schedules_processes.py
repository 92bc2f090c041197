"""Two processes over one mesh, as this file run twice: they fire together, and values of one of them are refused."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__)


def one_of_two(port, rank):
    import jax

    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    import flax_surgery_hooks as fsh

    mesh = jax.make_mesh((4,), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    state = jax.device_put(state, everywhere)
    mean = jax.jit(jnp.mean, out_shardings=everywhere)
    hooks = fsh.SurgeryHooks()
    when = fsh.on_metric("loss", above=5.0, lag=2) | fsh.every_count(100, of="tokens")
    hooks.add("a", lambda w: w / 2, params="w", when=when, guard="off", figures=False)
    refused = []
    for loss in (9.0, np.float32(9.0), jnp.float32(9.0)):
        try:
            hooks(0, state, metrics={"loss": loss}, tokens=0)
        except fsh.errors.InputError as error:
            refused.append(str(error))
    for step in range(9):
        local = np.full(1, (9.0 if step in (3, 7) else 1.0) + rank, np.float32)  # each process has another loss
        loss = mean(jax.make_array_from_callback((4,), rows, lambda _, local=local: local))
        state = hooks(step, state.replace(step=step), metrics={"loss": loss}, tokens=step * 30)
    fired = [one for one in hooks.ledger.records if one.event == "fired"]
    fires = [[one.step, [[trigger.step, trigger.value] for trigger in one.triggers]] for one in fired]
    w = np.asarray(state.params["w"].addressable_data(0)).tolist()
    print(json.dumps({"refused": refused, "fires": fires, "w": w}))


@pytest.fixture(scope="module")
def told():
    """What each of the two processes has to say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, str(HERE), str(port)]
    runs = [
        subprocess.Popen([*command, rank], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        done = [run.communicate(timeout=180) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors for _, errors in done)
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


def test_both_fire_at_the_same_steps_for_the_same_values(told):
    assert told[0]["fires"] == told[1]["fires"] == [[4, [[4, 120]]], [5, [[3, 9.5]]], [7, [[7, 210]]]]
    assert told[0]["w"] == told[1]["w"] == [0.125, 0.125]


def test_values_of_one_process_are_refused_by_both(told):
    for one in told:
        assert len(one["refused"]) == 3
        for message in one["refused"]:
            assert message.startswith("hook 'a', step 0: 'metrics/loss' may differ between processes")
        assert "float 9.0 on one of 2 processes" in one["refused"][0]
        assert "float32[] over the devices of 1 of 2 processes" in one["refused"][2]


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]))
