"""The two compiled passes over leaves of one signature, and what can be seen of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flax_surgery_hooks.collectives import Collective, collectives

Leaf = tuple[tuple[int, ...], str, str]
"""Shape, dtype and placement of a leaf or slot."""


@dataclass(frozen=True)
class Memory:
    """What a compiled program needs beside its code, in bytes on one device, as XLA says.

    Attributes:
      arguments: the arrays it reads.
      outputs: the arrays it makes.
      temporaries: what it allocates for the time of its run.
    """

    arguments: int
    outputs: int
    temporaries: int

    @property
    def touched(self) -> int:
        """Arguments and outputs together."""
        return self.arguments + self.outputs


@dataclass(frozen=True)
class Program:
    """The compiled passes for leaves of one signature.

    Attributes:
      leaves: shape, dtype and placement of each leaf that one call of the surgery sees.
      slots: likewise of their slots in the optimizer state.
      served: how many times the editing pass has run, which is once for each such leaf of each fire.
      in_place: whether the edit mixes elements, so that slots stay in place.
      edit: memory of the editing pass, or None where it has not run or the backend does not say.
      measure: likewise of the measuring pass.
      edit_collectives: what the editing pass says to other devices.
      measure_collectives: likewise the measuring pass.
      derives: name of the input that the program makes once per fire (then it is told as `measure`), None for passes.
    """

    leaves: tuple[Leaf, ...]
    slots: tuple[Leaf, ...]
    served: int
    in_place: bool
    edit: Memory | None
    measure: Memory | None
    edit_collectives: tuple[Collective, ...] = ()
    measure_collectives: tuple[Collective, ...] = ()
    derives: str | None = None

    def __str__(self) -> str:
        leaves = ", ".join(f"{dtype}{list(shape)} on {place}" for shape, dtype, place in self.leaves)
        about = f"{len(self.slots)} slots" if self.derives is None else f"makes {self.derives!r}"
        parts = [*filter(None, [leaves]), about, f"served {self.served}"]
        if self.in_place:
            parts.append("slots in place")
        for name, memory in (("edit", self.edit), ("measure", self.measure)):
            if memory is not None:
                parts.append(f"{name}: {memory.touched:,} B touched, {memory.temporaries:,} B temporary")
        for name, said in (("edit", self.edit_collectives), ("measure", self.measure_collectives)):
            parts += [f"{name}: {one}" for one in said]
        return "; ".join(parts)


class Deriving:
    """A program that makes an input of a surgery.

    Args:
      name: of the input.
      program: jitted, of one argument.
    """

    def __init__(self, name: str, program: Any):
        self.name = name
        self.program = program
        self._arguments: Any = None
        self._leaves: tuple[Leaf, ...] = ()
        self._served = 0

    def __call__(self, arguments: Any) -> Any:
        """What the program makes."""
        if self._arguments is None:
            self._arguments = jax.tree.map(_abstract, arguments)
            self._leaves = tuple(map(_described, jax.tree.leaves(arguments.get("leaves", ()))))
        self._served += 1
        return self.program(arguments)

    def describe(self) -> Program:
        """What has been compiled and served so far; runs nothing."""
        compiled = _compiled(self.program, (self._arguments,))
        return Program(
            self._leaves, (), self._served, False, None, _memory_of(compiled), (), _said_by(compiled), self.name
        )  # fmt: skip


class Passes:
    """The two programs for leaves of one shape, dtype and placement.

    Attributes:
      first: the measuring pass, jitted.
      second: the editing pass, jitted.
      donating: the same pass, which takes the memory of its first argument.
      after: the shapes of what the second pass makes.
      in_place: whether slots stay in place because the edit mixes.
      targets: where the outcome of the second pass goes, None where it is there already.
    """

    def __init__(
        self, first: Any, second: Any, donating: Any, arrays: Any, after: Any, in_place: bool, targets: Any = None
    ):
        self.first = first
        self.second = second
        self.donating = donating
        self.after = after
        self.in_place = in_place
        self.targets = targets
        self._leaves = tuple(map(_described, arrays.params)), tuple(map(_described, arrays.slots))
        self._served = 0
        self._measured: Any = None
        self._edited: Any = None
        self._donated = False

    def measure(self, arrays: Any, fire: Any) -> Any:
        """The first pass: figures and seeds."""
        if self._measured is None:
            self._measured = jax.tree.map(_abstract, (arrays, fire))
        return self.first(arrays, fire)

    def edit(self, arrays: Any, fire: Any, seeds: Any, ok: Any, *, donate: bool = False) -> Any:
        """The second pass: the new values."""
        if self._edited is None:
            self._edited = jax.tree.map(_abstract, (arrays, fire, seeds, ok))
            self._donated = donate
        self._served += 1
        return (self.donating if donate else self.second)(arrays, fire, seeds, ok)

    def memory(self, *arguments: Any) -> Memory | None:
        """What an `edit` without donation needs; compiles it."""
        return _memory_of(_compiled(self.second, jax.tree.map(_abstract, arguments)))

    def compile_donating(self, *arguments: Any) -> None:
        """Compiles the donating `edit`: whatever fails there does so before anything is gone."""
        self.donating.lower(*jax.tree.map(_abstract, arguments)).compile()

    def describe(self) -> Program:
        """What has been compiled and served so far; runs nothing."""
        leaves, slots = self._leaves
        edit = _compiled(self.donating if self._donated else self.second, self._edited)
        measure = _compiled(self.first, self._measured)
        return Program(
            leaves, slots, self._served, self.in_place, _memory_of(edit), _memory_of(measure), _said_by(edit),
            _said_by(measure),
        )  # fmt: skip


def table(programs: Iterable[Program]) -> str:
    """One line per program."""
    return "\n".join(map(str, programs))


def _described(leaf: Any) -> Leaf:
    return tuple(np.shape(leaf)), str(jax.numpy.result_type(leaf)), _place(leaf)


def _place(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array):
        return "host"
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return f"{sharding.spec} of {dict(sharding.mesh.shape)}"
    held: list[Any] = list(sharding.device_set)
    devices = sorted(f"{device.platform}:{device.id}" for device in held)  # `str` differs by release
    return devices[0] if len(devices) == 1 else f"{len(devices)} devices"


def _abstract(leaf: Any) -> Any:
    """What `jit` has to know of an argument to find the program that it compiled for it."""
    if not isinstance(leaf, jax.Array):
        return leaf
    sharding = leaf.sharding if leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.aval.weak_type)


def _compiled(program: Any, arguments: Any) -> Any:
    """The program for these arguments; if it has run, found in JAX's own cache."""
    return None if arguments is None else program.lower(*arguments).compile()


def _memory_of(compiled: Any) -> Memory | None:
    analysis = None if compiled is None else compiled.memory_analysis()
    if analysis is None:
        return None
    return Memory(analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)


def _said_by(compiled: Any) -> tuple[Collective, ...]:
    return () if compiled is None else collectives(compiled)
