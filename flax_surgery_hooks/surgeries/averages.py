"""Averages of the weights along a run, kept in the train state: exponential, of equal weight, and of the latest.

`hooks.observe(state)` (or `hooks.in_graph`) in the train step keeps them up to date; `fsh.average_of(state, name)`
gives parameters with them in place, for evaluation. A fire puts them into the live weights for good and leaves the
optimizer state alone; its figure `params/relative_change` is the distance between average and weights, relative to the
weights. A hook that is only there to be evaluated gets a schedule that never comes due, `when=fsh.at(1_000_000_000)`.

Averages are of float32, also for parameters of fewer bits: one of bfloat16 would stand still where 1 - decay is less
than its precision. They follow the edits of other hooks, to other shapes and paths too, as slots of the kind `param`:
elements that start anew there do so in the average, as if they had been so from its beginning. Hooks are observed in
the order in which they fire: add an average after the hook that masks its leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_surgery_hooks.averages import AVERAGE, COUNT, SNAPSHOTS, averaged
from flax_surgery_hooks.errors import SurgeryFunctionError, quoted

Memory = dict[str, Any]


class _Averaging:
    """A surgery of one leaf that remembers an average of it, which a fire puts in its place."""

    preserves: ClassVar[str] = "nothing"
    opt_state: ClassVar[str] = "keep"
    memory_kinds: ClassVar[dict[str, str]] = {AVERAGE: "param"}

    def __call__(self, leaf: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        """The average, and the memory as it is."""
        return averaged(memory, leaf), memory


@dataclass(frozen=True)
class Ema(_Averaging):
    """Keeps an exponential moving average of the weights: `average += (1 - decay) * (leaf - average)` at every step.

    It starts from the weights at `hooks.init`, so that no bias has to be taken out. `hooks.observe(state)` in the train
    step keeps it, in float32 in the train state; `fsh.average_of(state, hook)` gives parameters with it in place. A
    fire puts it into the live weights and leaves optimizer slots alone.

    Args:
      decay: how much of the average stays at each step, above 0 and below 1.
      half_life: instead, after how many steps half of it is left: `decay = 2 ** (-1 / half_life)`.

    Source: Polyak & Juditsky 1992 for averages of iterates; Tarvainen & Valpola 2017 (arXiv 1703.01780) for this one.

    >>> ema = Ema(half_life=1)
    >>> _, memory = ema.observe(jnp.array([2.0]), ema.init_memory(jnp.array([4.0])))
    >>> memory["average"].tolist()
    [3.0]
    """

    decay: float | None = None
    half_life: float | None = None

    def __post_init__(self):
        if (self.decay is None) == (self.half_life is None):
            raise SurgeryFunctionError(
                "Ema needs either `decay` or `half_life`.",
                found="neither" if self.decay is None else "both",
                write="Ema(0.999), or Ema(half_life=1_000)",
            )
        if self.decay is not None and not (_is_number(self.decay) and 0 < self.decay < 1):
            raise SurgeryFunctionError(
                "Ema(decay=...) is above 0 and below 1.", found=quoted(self.decay), write="decay=0.999"
            )
        if self.half_life is not None and not (_is_number(self.half_life) and 0 < self.half_life < float("inf")):
            raise SurgeryFunctionError(
                "Ema(half_life=...) is a number of steps above 0.",
                found=quoted(self.half_life),
                write="half_life=1_000",
            )

    def init_memory(self, leaf: jax.Array) -> Memory:
        """The leaf."""
        return {AVERAGE: jnp.copy(leaf)}

    def observe(self, leaf: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        """The leaf as it is, and its average a step further."""
        average = memory[AVERAGE]
        return leaf, {AVERAGE: average + self._share * (leaf - average)}

    @property
    def _share(self) -> float:
        """How much of the new leaf comes in, not as 1 minus what is almost 1 in float32."""
        if self.decay is not None:
            return 1 - self.decay
        assert self.half_life is not None
        return 1 - 2 ** (-1 / self.half_life)


@dataclass(frozen=True)
class Swa(_Averaging):
    """Keeps the mean of the weights, all of equal weight, from a step on: stochastic weight averaging.

    `hooks.observe(state)` in the train step takes a snapshot at `begin`, then every `interval` steps: `average += (leaf
    - average) / (snapshots + 1)`, in float32 in the train state. `fsh.average_of(state, hook)` gives parameters with it
    in place; a fire puts it into the live weights and leaves optimizer slots alone. Before the first snapshot it is the
    weights themselves. Batch statistics of the averaged model have to be computed anew.

    Args:
      begin: the first step (what `state.step` holds) whose weights count; in the paper three quarters of the run.
      interval: how many steps lie between two snapshots; in the paper an epoch, at a constant or a cyclical rate.

    Source: Izmailov et al. 2018 (arXiv 1803.05407).

    >>> swa = Swa(begin=1)
    >>> memory = swa.init_memory(jnp.zeros(1))
    >>> for step, leaf in enumerate([9.0, 1.0, 3.0]):
    ...     _, memory = swa.observe(jnp.array([leaf]), memory, step)
    >>> memory["average"].tolist(), int(memory["count"])
    ([2.0], 2)
    """

    begin: int
    interval: int = 1

    def __post_init__(self):
        check_whole("Swa", "begin", self.begin, least=0)
        check_whole("Swa", "interval", self.interval, least=1)

    def init_memory(self, leaf: jax.Array) -> Memory:
        """No snapshot."""
        return {AVERAGE: jnp.copy(leaf), COUNT: jnp.zeros((), jnp.int32)}

    def observe(self, leaf: jax.Array, memory: Memory, step: Any) -> tuple[jax.Array, Memory]:
        """The leaf as it is, and its average, with the leaf if its step counts."""
        due = (step >= self.begin) & ((step - self.begin) % self.interval == 0)
        average, count = memory[AVERAGE], memory[COUNT]
        # The first one is taken as it is: nothing that came before may be left of it.
        further = jnp.where(count > 0, average + (leaf - average) / (count + 1).astype(leaf.dtype), leaf)
        return leaf, {AVERAGE: jnp.where(due, further, average), COUNT: count + due}


@dataclass(frozen=True)
class Lawa(_Averaging):
    """Keeps the latest snapshots of the weights, whose mean is the average: latest weight averaging.

    `hooks.observe(state)` in the train step takes a snapshot at the steps that `interval` divides, but for step 0, in
    the place of the oldest. Until there are `k`, the average is the mean of those there are, before the first one the
    weights themselves. `fsh.average_of(state, hook)` gives parameters with it in place; a fire puts it into the live
    weights and leaves optimizer slots alone. The train state grows by `k` times the leaves, in float32, and every step
    passes over them.

    Args:
      k: how many snapshots.
      interval: how many steps lie between two; in the paper an epoch.

    Source: Kaddour 2022 (arXiv 2209.14981).

    >>> lawa = Lawa(k=2, interval=1)
    >>> memory = lawa.init_memory(jnp.zeros(1))
    >>> for step, leaf in enumerate([1.0, 3.0, 5.0], start=1):
    ...     _, memory = lawa.observe(jnp.array([leaf]), memory, step)
    >>> lawa(jnp.array([5.0]), memory)[0].tolist()
    [4.0]
    """

    k: int
    interval: int
    memory_kinds: ClassVar[dict[str, str]] = {SNAPSHOTS: "param"}

    def __post_init__(self):
        check_whole("Lawa", "k", self.k, least=1)
        check_whole("Lawa", "interval", self.interval, least=1)

    def init_memory(self, leaf: jax.Array) -> Memory:
        """No snapshot."""
        # An array for each, not one of [k, ...]: each lies on the devices as the leaf does.
        empty = {str(place): jnp.zeros_like(leaf) for place in range(self.k)}
        return {SNAPSHOTS: empty, COUNT: jnp.zeros((), jnp.int32)}

    def observe(self, leaf: jax.Array, memory: Memory, step: Any) -> tuple[jax.Array, Memory]:
        """The leaf as it is, and the snapshots, with one of it if its step counts."""
        held, count = memory[SNAPSHOTS], memory[COUNT]
        due = (step > 0) & (step % self.interval == 0)
        place = jnp.where(due, count % self.k, self.k)
        taken = {name: jnp.where(place == int(name), leaf, one) for name, one in held.items()}
        return leaf, {SNAPSHOTS: taken, COUNT: count + due}


def check_whole(surgery: str, field: str, value: Any, *, least: int) -> None:
    """Raises unless the value of a field is a whole number that steps can be counted with.

    Raises:
      SurgeryFunctionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise SurgeryFunctionError(
            f"{surgery}({field}=...) is a whole number of at least {least}, and below 2**31.",
            found=quoted(value),
            write=f"{field}={max(least, 1)}",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
