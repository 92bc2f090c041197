"""What hooks cost: an idle call, a fire. One command, some minutes on two cores; writes RESULTS.md beside this file.

python benchmarks/run.py [--fast]

What an idle call costs above an empty callable: two comparisons, that nothing is due and that steps go forward, and the
step is stored; each is about a twentieth of the floor.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import selection
from paired import Ratio, ratio, seconds
from tqdm import tqdm

import flax_surgery_hooks as fsh
from flax_surgery_hooks.passes import Passes

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


def direct(hooks: fsh.SurgeryHooks, state: Any) -> Callable[[], Any]:
    """The passes of a hook's one fire on this state, called with the same arguments and nothing around them."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    held = Passes.measure, Passes.edit

    def measure(passes: Passes, *args: Any) -> Any:
        calls.append((passes.first, args))
        return held[0](passes, *args)

    def edit(passes: Passes, *args: Any, **kwargs: Any) -> Any:
        calls.append((passes.second, args))
        return held[1](passes, *args, **kwargs)

    Passes.measure, Passes.edit = measure, edit  # type: ignore[method-assign]  # for the one fire that is recorded
    try:
        hooks.fire("norm", state, step=1)
    finally:
        Passes.measure, Passes.edit = held  # type: ignore[method-assign]
    return lambda: [program(*args) for program, args in calls]


def later_fires(count: int, pairs: int) -> Ratio:
    """A fire over so many small leaves whose programs are compiled, against its passes alone."""
    state = many_leaves(count)
    hooks = fsh.SurgeryHooks()
    hooks.add("norm", fsh.surgeries.Normalize(), params="**", when=fsh.at(1))
    hooks.fire("norm", state, step=1)

    def fired() -> Any:
        new = hooks.fire("norm", state, step=1)
        hooks._settler._waiting.clear()
        return new.params, new.opt_state

    return ratio(fired, direct(hooks, state), pairs)


def plan(count: int) -> float:
    """Planning 100,000 steps with 10,000 fires on so many abstract leaves of five shapes, whose first is probed, over
    tracing one update of the optimizer.
    """
    state = jax.eval_shape(lambda: many_leaves(count))
    hooks = fsh.SurgeryHooks()
    hooks.add("norm", fsh.surgeries.Normalize(), params="**", when=fsh.every(10))
    planned = seconds(lambda: hooks.plan(state, 100_000).params)
    return planned / seconds(
        lambda: len(jax.tree.leaves(jax.eval_shape(state.tx.update, state.params, state.opt_state)))
    )


ELEMENTWISE = {
    "scale": fsh.surgeries.Scale(1.0001),
    "prune": lambda w: jnp.where(jnp.abs(w) < 0.1, 0.0, w),
    "clip": lambda w: jnp.clip(w, -0.3, 0.3),
}


def temporaries(name: str, side: int) -> str:
    """What both passes of a fire allocate beside their arrays, over the bytes they read and write."""
    hooks = fsh.SurgeryHooks()
    hooks.add("edit", ELEMENTWISE[name], params="w", when=fsh.at(1), opt_state="transport")
    hooks.fire("edit", big_state(side), step=1)
    (program,) = hooks.programs("edit")
    passes = [memory for memory in (program.measure, program.edit) if memory is not None]
    return f"{max(memory.temporaries / memory.touched for memory in passes):.4f}" if passes else "not reported"


def periodic_actions(count: int, pairs: int) -> Ratio | None:
    """Idle calls of so many of CLU's periodic actions, against an empty callable; None where they do not import."""
    try:
        from clu import (
            periodic_actions as clu_actions,
        )  # imports TensorFlow and tensorboard, which clu does not install
    except ImportError:
        return None
    actions = [clu_actions.PeriodicCallback(every_steps=10**9, callback_fn=print) for _ in range(count)]

    def all_of(step: int, state: Any) -> None:
        for action in actions:
            action(step)

    return ratio(calls(all_of, None), calls(Nothing(), None), pairs)


def rows(fast: bool) -> list[tuple[str, str, str]]:
    """Name, figure and bound of every measurement; those that cannot be made here are left out."""
    pairs, side = (3, 1024) if fast else (21, 4096)
    jobs: list[tuple[str, Callable[[], Any], str]] = [("an empty callable against itself", lambda: twin(pairs), "1")]
    for count in (1, 10, 100, 1_000):
        jobs.append((f"idle call, {count:,} hooks / empty callable", lambda count=count: idle(count, pairs), "1.2"))
    jobs.append(("ten of CLU's periodic actions / empty callable", lambda: periodic_actions(10, pairs), "-"))
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
    for name in ELEMENTWISE:
        jobs.append((f"temporaries of {name} / bytes touched", lambda name=name: temporaries(name, side), "0.02"))
    leaves = 10 if fast else 200
    jobs.append((f"first fire, {leaves} leaves / one program for all", lambda: f"{first_fire(leaves):.2f}", "0.33"))
    jobs.append((f"later fires, {leaves} leaves / their passes alone", lambda: later_fires(leaves, pairs), "1.5"))
    leaves = 10 if fast else 1_000
    jobs.append((f"plan of 100,000 steps, {leaves:,} leaves / tracing an update", lambda: f"{plan(leaves):.2f}", "10"))
    table = [(name, job(), bound) for name, job, bound in tqdm(jobs)]
    measured = [(name, str(figure), bound) for name, figure, bound in table if figure is not None]
    return measured + selection.rows(fast)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="small arrays, few pairs; prints and writes nothing")
    fast = parser.parse_args(arguments).fast
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
