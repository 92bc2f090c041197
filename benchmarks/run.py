"""What hooks cost: an idle call, a fire. One command, some minutes on two cores; writes RESULTS.md beside this file.

python benchmarks/run.py [--fast]
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from paired import Ratio, ratio, seconds
from tqdm import tqdm

import flax_surgery_hooks as fsh

HERE = pathlib.Path(__file__).parent
CALLS = 20_000


class Nothing:
    """An empty callable object with the signature of hooks: the floor of an idle call."""

    def __call__(self, step: int, state: Any = None, **inputs: Any) -> Any:
        return state


def small_state() -> Any:
    params = {"w": jnp.ones((4, 4))}
    return fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).replace(step=jnp.int32(1))


def idle_hooks(count: int) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks()
    for i in range(count):
        hooks.add(f"hook_{i}", fsh.surgeries.Scale(0.5), params="w", when=fsh.at(10**9 + i), opt_state="keep")
    return hooks


def calls(hooks: Any, state: Any) -> Callable[[], None]:
    """A run of many idle calls at steps that go forward from run to run."""
    step = [1]

    def run() -> None:
        start = step[0]
        for i in range(start + 1, start + 1 + CALLS):
            hooks(i, state)
        step[0] = start + CALLS

    return run


def idle(count: int, pairs: int) -> Ratio:
    """Idle calls of so many hooks, against an empty callable object."""
    state, hooks = small_state(), idle_hooks(count)
    hooks(1, state)
    return ratio(calls(hooks, state), calls(Nothing(), state), pairs)


def twin(pairs: int) -> Ratio:
    """The empty callable against itself: the noise of the other idle rows."""
    state = small_state()
    return ratio(calls(Nothing(), state), calls(Nothing(), state), pairs)


def big_state(side: int) -> Any:
    """One leaf with its two moments."""
    state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.full((side, side), 0.5)}, tx=optax.adam(0.1))
    adam = state.opt_state[0]
    moments = {"mu": {"w": jnp.full((side, side), 0.1)}, "nu": {"w": jnp.full((side, side), 0.01)}}
    return state.replace(opt_state=(adam._replace(**moments), *state.opt_state[1:]))


def fire(side: int, pairs: int, *, figures: bool, guard: str) -> Ratio:
    """A scale of (w, mu, nu) by a hook, against a plain jitted read-write of the same arrays."""
    state = big_state(side)
    arrays = (state.params["w"], state.opt_state[0].mu["w"], state.opt_state[0].nu["w"])
    plain = jax.jit(lambda *arrays: [array * 1.0001 for array in arrays])
    hooks = fsh.SurgeryHooks()
    hooks.add(
        "scale", fsh.surgeries.Scale(1.0001), params="w", when=fsh.at(1), opt_state="transport", figures=figures,
        guard=guard,
    )  # fmt: skip

    def fired() -> Any:
        new = hooks.fire("scale", state, step=1)
        hooks._settler._waiting.clear()  # figures of a thousand fires are not what is measured
        return new.params, new.opt_state

    return ratio(fired, lambda: plain(*arrays), pairs)


def many_leaves(count: int) -> Any:
    sides = (32, 48, 64, 80, 96)
    params = {f"layer_{i}": {"kernel": jnp.eye(sides[i % 5]) + 0.1} for i in range(count)}
    return fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))


def first_fire(count: int) -> float:
    """Compiling and running the first fire on so many leaves of five shapes, over doing so as one program for all."""
    state = many_leaves(count)
    hooks = fsh.SurgeryHooks()
    hooks.add("norm", fsh.surgeries.Normalize(), params="**", when=fsh.at(1))
    by_signature = seconds(lambda: hooks.fire("norm", state, step=1).params)
    one = jax.jit(lambda state: fsh.operate(state, fsh.surgeries.Normalize())[0])
    return by_signature / seconds(lambda: one(state).params)


def rows(fast: bool) -> list[tuple[str, str, str]]:
    """Name, figure and bound of every measurement."""
    pairs, side = (5, 1024) if fast else (21, 4096)
    jobs: list[tuple[str, Callable[[], Any], str]] = [("an empty callable against itself", lambda: twin(pairs), "1")]
    for count in (1, 10, 100, 1_000):
        jobs.append((f"idle call, {count:,} hooks / empty callable", lambda count=count: idle(count, pairs), "1.2"))
    size = f"3 x {side * side * 4 / 2**20:.0f} MiB"
    for figures, guard, bound in ((False, "off", "1.2"), (True, "finite", "3")):
        what = "with figures and guard" if figures else "without"
        jobs.append(
            (
                f"scale of {size} {what} / plain jitted read-write",
                lambda figures=figures, guard=guard: fire(side, pairs, figures=figures, guard=guard),
                bound,
            )
        )
    leaves = 40 if fast else 200
    jobs.append((f"first fire, {leaves} leaves / one program for all", lambda: f"{first_fire(leaves):.2f}", "0.33"))
    return [(name, str(job()), bound) for name, job, bound in tqdm(jobs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="small arrays, few pairs; prints and writes nothing")
    fast = parser.parse_args().fast
    table = rows(fast)
    lines = ["| what | ratio: median (quartiles) | wanted at most |", "|---|---|---|"]
    lines += [f"| {name} | {figure} | {bound} |" for name, figure, bound in table]
    where = f"{datetime.date.today()}, {os.cpu_count()} {platform.machine()} cores, {jax.default_backend()}"
    text = f"# What hooks cost\n\nBy `python benchmarks/run.py`, {where}, JAX {jax.__version__}.\n\n" + "\n".join(lines)
    print(text)
    if not fast:
        (HERE / "RESULTS.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
