"""Executes what the README shows: its Python blocks in order, and the pieces of its shell commands."""

from __future__ import annotations

import doctest
import itertools
import os
import pathlib
import re
import shlex
import tomllib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
import pytest
from flax import nnx

import flax_surgery_hooks as fsh
from flax_surgery_hooks.writers import LoggingWriter

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.replace("&&\n", "&& ").splitlines()]


class Writer(LoggingWriter):
    """Keeps scalars, and logs the rest."""

    def __init__(self):
        super().__init__()
        self.scalars: dict[str, list[int]] = {}

    def write_scalars(self, step, scalars):
        for name in scalars:
            self.scalars.setdefault(name, []).append(step)


class Network(nn.Module):
    """The layers of the digits network, fewer units."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(2, (3, 3))(x))
        x = nn.relu(nn.Conv(2, (3, 3))(x))
        return nn.Dense(10)(nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1))))


@pytest.fixture
def namespace(tmp_path: pathlib.Path) -> dict[str, Any]:
    """What the README's train loop has: a network, its optimizer and a step."""
    network = Network()
    images = jax.random.uniform(jax.random.key(1), (2, 4, 4, 1))

    def init_params(key):
        return network.init(key, images)["params"]

    @jax.jit
    def train_step(state, batch):
        def loss(params):
            logits = state.apply_fn({"params": params}, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(2)).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    return {
        "state": fsh.TrainState.create(
            apply_fn=network.apply,
            params=init_params(jax.random.key(0)),
            tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        ),
        "train_step": train_step,
        "batches": itertools.repeat(images),
        "num_steps": 1_000,
        "writer": Writer(),
        "workdir": tmp_path,
        "init_params": init_params,
        "jax": jax,
        "jnp": jnp,
        "ml_collections": ml_collections,
        "nn": nn,
        "nnx": nnx,
        "optax": optax,
    }


def test_python_blocks_do_what_they_say(namespace):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for i, (kind, block) in enumerate(BLOCKS):
        if kind == "python":
            exec(compile(block, f"README.md block {i}", "exec"), namespace)
        elif kind == "pycon":
            test = doctest.DocTestParser().get_doctest(block, namespace, f"block {i}", "README.md", 0)
            said: list[str] = []
            runner.run(test, out=said.append, clear_globs=False)
            assert not runner.summarize(verbose=False).failed, "".join(said)
            namespace.update(test.globs)
    writer, steps = namespace["writer"], [200, 400, 600, 800, 1_000]
    assert writer.scalars["surgery/head_norm/params/relative_change"][:5] == steps
    assert writer.scalars["surgery/halve/params/relative_change"] == [1_000]
    assert (namespace["workdir"] / "ledger.jsonl").stat().st_size
    assert namespace["hooks"].names == ("head_norm", "reinit")


def test_the_surgeries_listed_are_those_there_are():
    listed = re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(fsh.surgeries.__all__)


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands_name_files_and_extras_that_exist(command):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    words = shlex.split(command)
    for name in re.findall(r"\[(\w+)\]", command):
        assert name in extras
    for word in words:
        path = re.sub(r"^--(config|trainer)=", "", word).partition(":")[0]
        if path.endswith(".py"):
            assert (ROOT / path).is_file(), path
    is_script = "/" in words[0] and os.access(ROOT / words[0], os.X_OK)
    assert is_script or words[0] == "python" or words[:3] == ["python3", "-m", "venv"]


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
            assert target[1:] in [heading.lower().replace(",", "").replace(" ", "-") for heading in headings]
        else:
            assert (ROOT / target).is_file(), target
