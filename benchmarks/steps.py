"""What idle hooks and masks cost a train step of the language model, and a fire on eight devices. Minutes on two cores.

python benchmarks/steps.py [--fast]

A row of steps counts only beside a twin that is within 2 %: the bare step against itself.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent / "configs")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import lm  # noqa: E402
import lm_train  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from lm_model import Partitioning  # noqa: E402
from paired import Ratio, ratio  # noqa: E402

import flax_surgery_hooks as fsh  # noqa: E402

NEVER = fsh.at(10**9)
TWIN = 0.02


def idle_hooks(number: int, **options: Any) -> fsh.SurgeryHooks:
    """Hooks of five sorts on all kernels, due in no run."""
    hooks = fsh.SurgeryHooks()
    sorts = [
        fsh.surgeries.Scale(0.5), fsh.surgeries.Normalize(), fsh.surgeries.ClipNorm(1.0), fsh.surgeries.Noise(0.1),
        lambda leaves: {path: leaf / 2 for path, leaf in leaves.items()},
    ]  # fmt: skip
    for i in range(number):
        hooks.add(f"hook_{i}", sorts[i % 5], params="**/kernel", when=NEVER, **options)
    return hooks


def masking() -> fsh.SurgeryHooks:
    """Masks on all kernels, enforced at every step; due in no run."""
    hooks = fsh.SurgeryHooks()
    hooks.add("prune", fsh.surgeries.Prune(0.9), params="**/kernel", when=NEVER)
    return hooks


class Observed:
    """Hooks of which a train step only observes."""

    def __init__(self, hooks: fsh.SurgeryHooks):
        self.in_graph = hooks.observe


class Training:
    """A language model on one device, some steps a run."""

    def __init__(self, steps: int, hooks: fsh.SurgeryHooks, form: str = "host", size: str = "tiny"):
        config = lm_config(size)
        mesh = jax.make_mesh((1, 1, 1), lm_train.AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
        partitioning = Partitioning(mesh, tuple(config.rules))
        state = lm_train.create_state(config, partitioning)
        self._state = state if form == "host" else hooks.init(state, fires=0 if form == "observed" else 8)
        inside: Any = {"in graph": hooks, "observed": Observed(hooks)}.get(form, fsh.SurgeryHooks())
        self._bare = lm_train.make_train_step(self._state, inside, partitioning)
        self._step = hooks.wrap(self._bare.__wrapped__, donate_argnums=0) if form == "wrapped" else None
        self._hooks = hooks if form == "host" else None
        self._batch = lm.load_data(config).loader.batch(0, lm_train.batch_sharding(partitioning), 1)
        self._steps, self._at = steps, 0

    def temporaries(self) -> int:
        """Bytes that the compiled step allocates beside its arguments and results."""
        return self._bare.lower(self._state, self._batch).compile().memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        for _ in range(self._steps):
            self._at += 1
            if self._step is not None:
                self._state, _ = self._step(self._at, self._state, self._batch)
            else:
                self._state, _ = self._bare(self._state, self._batch)
            if self._hooks is not None:
                self._state = self._hooks(self._at, self._state)
        return self._state


def lm_config(size: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("lm_config", EXAMPLES.parent / "configs" / "lm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size)


def steps(fast: bool) -> dict[str, Ratio]:
    """Rows of train steps: hooks idle in graph, wrapped, on the host, and none twice."""
    count, pairs, number, name = (2, 2, 1, "one hook") if fast else (60, 40, 10, "ten hooks")
    none = Training(count, fsh.SurgeryHooks())
    rows = {"bare step against its twin": Training(count, fsh.SurgeryHooks())}
    rows[f"step with {name} idle on the host / bare step"] = Training(count, idle_hooks(number))
    rows[f"wrapped step with {name} idle / bare step"] = Training(count, idle_hooks(number), "wrapped")
    rows[f"step with {name} without figures and guard idle in graph / bare step"] = Training(
        count, idle_hooks(number, figures=False, guard="off", fresh="init"), "in graph"
    )
    rows[f"step with {name} idle in graph / bare step"] = Training(count, idle_hooks(number), "in graph")
    return {name: ratio(training, none, pairs) for name, training in rows.items()}


def masked(fast: bool) -> tuple[dict[str, Ratio], list[str]]:
    """Rows of steps that enforce masks, and what they allocate."""
    rows, notes = {}, []
    for size, count, pairs in [("tiny", 2, 2)] if fast else [("tiny", 60, 40), ("small", 2, 20)]:
        bare = Training(count, fsh.SurgeryHooks(), "host", size)
        twin = Training(count, fsh.SurgeryHooks(), "host", size)  # of its own: runs donate the state
        ours = Training(count, masking(), "observed", size)
        rows[f"bare step of {size} against its twin"] = ratio(twin, bare, pairs)
        rows[f"step of {size} with masks on all kernels enforced / bare step"] = ratio(ours, bare, pairs)
        share = ours.temporaries() / bare.temporaries()
        notes.append(f"Temporaries of the step of {size} with masks / those of the bare step: {share:.3f}")
    return rows, notes


def fire_of(side: int, devices: int) -> Callable[[], Any]:
    """A fire of a scale on one leaf with its moments, over so many devices."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    leaf = jax.device_put(jnp.ones((side, side)), NamedSharding(mesh, PartitionSpec("data")))
    tx = optax.adam(0.1)
    state = fsh.TrainState.create(apply_fn=None, params={"w": leaf}, tx=tx).replace(step=0)
    hooks = fsh.SurgeryHooks()
    hooks.add("scale", fsh.surgeries.Scale(0.999), params="w", when=fsh.every(1), figures=False, guard="off")
    at = [0]

    def run() -> Any:
        state_now = held[0] = hooks(at[0], held[0].replace(step=at[0]))
        at[0] += 1
        return state_now.params

    held = [state]
    return run


def fires(fast: bool) -> dict[str, Ratio]:
    """Rows of fires: the same bytes on eight virtual devices and on one."""
    side, pairs = (256, 4) if fast else (4096, 30)
    name = f"fire of a scale of 3 x {side * side * 4 // 2**20} MiB on 8 devices / on 1"
    return {name: ratio(fire_of(side, 8), fire_of(side, 1), pairs)}


def main() -> None:
    """Prints the rows as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="few and small runs, to see that it works")
    fast = parser.parse_args().fast
    of_masks, notes = masked(fast)
    rows = steps(fast) | fires(fast) | of_masks
    twin = next(iter(rows.values()))
    print("| what | ratio: median (quartiles) |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value.median:.3f} ({value.low:.3f} to {value.high:.3f}) |")
    print("\n".join(notes))
    if max(abs(twin.median - 1), twin.high - 1, 1 - twin.low) > TWIN:
        print("The twin is wider than 2 %: the rows of steps count for nothing. Leave the machine alone, and repeat.")


if __name__ == "__main__":
    main()
