"""Surgeries that put other weights into the live ones: an average and back, slow ones, earlier ones, another run's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.averages import averaged, averages_in
from flax_surgery_hooks.errors import CheckpointError, ScheduleError, StateError, SurgeryFunctionError, quoted, shorten
from flax_surgery_hooks.paths import close_matches, flatten, listed
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.surgeries.averages import check_whole

Arrays = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Swap:
    """Puts another hook's averages into the live weights, and at its next fire the live weights back, bit for bit.

    Made for a trainer that evaluates the live state: `state = hooks.fire("swap", state)` before the evaluation and once
    more after it, with a schedule that never comes due, `when=fsh.at(1_000_000_000)`. Steps in between would train the
    average, and be lost. Optimizer slots are left alone. The memory is as large as the weights; where they need not be
    in the state, `fsh.average_of(state, hook)` is simpler.

    Args:
      hook: name of the hook whose surgery is `Ema`, `Swa` or `Lawa`, of the same leaves or more.

    >>> import optax, flax_surgery_hooks as fsh
    >>> hooks, never = fsh.SurgeryHooks(), fsh.at(1_000_000)
    >>> hooks.add("ema", fsh.surgeries.Ema(0.75), params="w", when=never)
    >>> hooks.add("swap", fsh.surgeries.Swap("ema"), params="w", when=never)
    >>> params = {"w": jnp.array([4.0])}
    >>> state = hooks.init(fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0)))
    >>> state = hooks.observe(state.apply_gradients(grads=params))
    >>> swapped = hooks.fire("swap", state)
    >>> back = hooks.fire("swap", swapped)
    >>> state.params["w"].tolist(), swapped.params["w"].tolist(), back.params["w"].tolist()
    ([0.0], [3.0], [0.0])
    """

    hook: str
    preserves: ClassVar[str] = "nothing"
    opt_state: ClassVar[str] = "keep"
    memory_kinds: ClassVar[dict[str, str]] = {"live": "param"}
    memory_follows: ClassVar[str] = "reshapes"

    def __post_init__(self):
        if not isinstance(self.hook, str) or not self.hook:
            raise SurgeryFunctionError(
                "Swap(hook=...) is the name of a hook.", found=quoted(self.hook), write='Swap("ema")'
            )

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """What the other hook remembers."""
        return {"averages": lambda state: averages_in(state, self.hook)}

    def init_memory(self, leaves: Arrays) -> dict[str, Any]:
        """The leaves, which are live."""
        return {"live": {path: jnp.copy(leaf) for path, leaf in leaves.items()}, "swapped": jnp.zeros((), jnp.bool_)}

    def __call__(
        self, leaves: Arrays, memory: Mapping[str, Any], averages: Mapping[str, Any]
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The averages, or the live leaves that were swapped for them, and what is needed for the way back."""
        self._check(leaves, averages)
        live, swapped = memory["live"], memory["swapped"]
        new = {p: jnp.where(swapped, live[p], averaged(averages[p], leaf)) for p, leaf in leaves.items()}
        held = {path: jnp.where(swapped, live[path], leaf) for path, leaf in leaves.items()}
        return new, {"live": held, "swapped": ~swapped}

    def _check(self, leaves: Arrays, averages: Mapping[str, Any]) -> None:
        for path in leaves:
            if path not in averages:
                raise StateError(
                    f"Swap({self.hook!r}) has a leaf that this hook does not average.",
                    path=path,
                    found=f"averages of {listed(averages)}",
                    write=listed(close_matches(path, averages)) or "the same params= for both hooks",
                )


@dataclass(frozen=True)
class Lookahead:
    """Moves slow weights towards the fast ones, and lets these go on from there: `slow += alpha * (fast - slow)`.

    The optimizer trains the fast weights, which are the live ones, for as many steps as lie between two fires (in the
    paper 5 to 20, `when=fsh.every(5)`). The slow ones lie in the train state and start from the weights at
    `hooks.init`. Optimizer slots go on as they are; `opt_state="reset"` forgets them. The paper has both.

    Args:
      alpha: how far the slow weights move, above 0, at most 1.

    Source: Zhang et al. 2019 (arXiv 1907.08610).

    >>> lookahead = Lookahead(0.5)
    >>> new, slow = lookahead(jnp.array([4.0]), lookahead.init_memory(jnp.array([2.0])))
    >>> new.tolist(), slow.tolist()
    ([3.0], [3.0])
    """

    alpha: float = 0.5
    preserves: ClassVar[str] = "nothing"
    opt_state: ClassVar[str] = "keep"
    memory_kinds: ClassVar[str] = "param"

    def __post_init__(self):
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1:
            raise SurgeryFunctionError(
                "Lookahead(alpha=...) is above 0 and at most 1.", found=quoted(self.alpha), write="alpha=0.5"
            )

    def init_memory(self, leaf: jax.Array) -> jax.Array:
        """The slow weights: the leaf."""
        return jnp.copy(leaf)

    def __call__(self, leaf: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The new slow weights, as fast ones too."""
        slow = memory + self.alpha * (leaf - memory)
        return jnp.copy(slow), slow  # else both would be one buffer, which cannot be donated twice


@dataclass(frozen=True)
class Rewind:
    """Puts the weights of an earlier step back, as lottery tickets are rewound.

    `hooks.observe(state)` (or `hooks.in_graph`) in the train step takes the snapshot at `to_step`, in float32 in the
    train state; until then, and for `to_step=0`, it is that of `hooks.init`. Masks of a `Prune` hook hold on: its own
    `observe` sets dropped weights back to zero in the next step. Optimizer slots go on as they are;
    `opt_state="reset"` forgets them, as a run does that starts anew from there.

    Args:
      to_step: the step (what `state.step` holds) whose weights are put back; not after the first fire.

    Sources: Frankle & Carbin 2019 (arXiv 1803.03635), to the start; Frankle et al. 2020 (arXiv 1912.05671), to later
    steps.

    >>> rewind = Rewind(to_step=1)
    >>> memory = rewind.init_memory(jnp.array([1.0]))
    >>> for step, leaf in enumerate([1.0, 2.0, 3.0]):
    ...     _, memory = rewind.observe(jnp.array([leaf]), memory, step)
    >>> rewind(jnp.array([3.0]), memory)[0].tolist()
    [2.0]
    """

    to_step: int
    preserves: ClassVar[str] = "nothing"
    opt_state: ClassVar[str] = "keep"
    memory_kinds: ClassVar[str] = "param"
    memory_follows: ClassVar[str] = "reshapes"

    def __post_init__(self):
        check_whole("Rewind", "to_step", self.to_step, least=0)

    def init_memory(self, leaf: jax.Array) -> jax.Array:
        """The leaf."""
        return jnp.copy(leaf)

    def observe(self, leaf: jax.Array, memory: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        """The leaf as it is, and the snapshot, which it becomes at its step."""
        return leaf, jnp.where(step == self.to_step, leaf, memory)

    def __call__(self, leaf: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The snapshot, and the memory as it is."""
        return jnp.copy(memory), memory  # else leaf and memory would be one buffer, which cannot be donated twice

    def check_schedule(self, when: Schedule) -> None:
        """Raises if a fire comes before there is a snapshot.

        Raises:
          ScheduleError: it does.
        """
        first = None if when.planned is None else when.planned.next_step(-1)
        if first is not None and first < self.to_step:
            raise ScheduleError(
                "Rewind fires before the step that it goes back to.",
                found=f"{when!r}, due at {first}, and to_step={self.to_step}",
                write=f"a schedule that is first due at {self.to_step} or later",
            )


@dataclass(frozen=True, eq=False)  # arrays neither hash nor compare, so each instance is equal to itself alone
class Graft:
    """Puts leaves of another run into the model. All their elements are fresh, as those of `Assign`.

    Args:
      source: a tree like the parameters, such as `other_state.params`, or the directory of an Orbax checkpoint (what
        `StandardCheckpointer` saves; under a `CheckpointManager` the one of an item, ".../1000/state"). It is copied
        into the host's memory when the surgery is made.
      paths: under which path of the source a leaf is found, where that is not its own: a dict from path to path in the
        source, or a pair (regular expression, replacement) for `re.sub` on the path, such as `("^", "params/")`.

    >>> import optax, flax_surgery_hooks as fsh
    >>> params = {"encoder": {"kernel": jnp.zeros(2)}, "head": {"kernel": jnp.zeros(2)}}
    >>> state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))
    >>> graft = Graft({"body": {"kernel": jnp.ones(2)}}, paths=("^encoder/", "body/"))
    >>> state, _ = fsh.operate(state, graft, params="encoder/*")
    >>> state.params["encoder"]["kernel"].tolist(), state.params["head"]["kernel"].tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """

    source: Any
    paths: dict[str, str] | tuple[str, str] | None = None
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        _check_map(self.paths)
        tree = _restored(self.source) if isinstance(self.source, str | os.PathLike) else self.source
        flat = flatten(tree)
        object.__setattr__(self, "_held", dict(zip(flat.paths, map(_on_host, flat.values), strict=True)))

    def __call__(self, leaves: Arrays) -> dict[str, jax.Array]:
        """The leaves of the source."""
        return {path: self._found(path, leaf) for path, leaf in leaves.items()}

    def _found(self, path: str, leaf: jax.Array) -> jax.Array:
        held: Mapping[str, Any] = vars(self)["_held"]
        name = self._name(path)
        if name not in held:
            raise SurgeryFunctionError(
                "Graft(source=...) has no such leaf.",
                path=path,
                found=f"no {name!r} among {listed(held) or 'no leaves at all'}",
                write=f"paths={{{path!r}: {(close_matches(name, held) or ['...'])[0]!r}}}",
            )
        if np.shape(held[name]) != leaf.shape:
            raise SurgeryFunctionError(
                "Graft(source=...) has a leaf of another shape.",
                path=path,
                found=f"{name} of {list(np.shape(held[name]))} for {list(leaf.shape)}",
                write="params= that leaves it out, or the path of a leaf of this shape",
            )
        return jnp.asarray(held[name], leaf.dtype)

    def _name(self, path: str) -> str:
        if isinstance(self.paths, Mapping):
            return self.paths.get(path, path)
        return path if self.paths is None else re.sub(*self.paths, path)


def _on_host(leaf: Any) -> Any:
    """A copy that a train step which donates the source cannot take; traced leaves, and parts of one, as they are."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.is_fully_addressable:
        return leaf
    return np.array(leaf)


def _check_map(paths: Any) -> None:
    pairs = list(paths.items()) if isinstance(paths, Mapping) else [paths] if isinstance(paths, tuple) else None
    texts = pairs is not None and all(len(pair) == 2 and all(isinstance(one, str) for one in pair) for pair in pairs)
    if paths is not None and not texts:
        raise SurgeryFunctionError(
            "Graft(paths=...) says under which paths of the source leaves are found.",
            found=quoted(paths),
            write='{"encoder/kernel": "body/kernel"}, or ("^encoder/", "body/")',
        )
    if isinstance(paths, tuple):
        pattern, replacement = paths
        try:
            re.sub(pattern, replacement, "")
        except re.error as error:
            raise SurgeryFunctionError(
                "Graft(paths=...) is no regular expression with its replacement.",
                found=f"{quoted(paths)}: {error}",
                write='("^encoder/", "body/")',
            ) from error


def _restored(directory: str | os.PathLike[str]) -> Any:
    """The tree of an Orbax checkpoint, as NumPy arrays: it may come from other devices than there are here."""
    import orbax.checkpoint as ocp  # much to import, for those who have no checkpoint

    name = os.fspath(directory)
    place = name if "://" in name else os.path.abspath(name)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(place)
            saved = getattr(metadata, "item_metadata", metadata).tree  # in older releases it is that of the item itself
            as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            return checkpointer.restore(place, restore_args=as_arrays)
    except Exception as error:
        raise CheckpointError(
            "Graft(source=...) is no directory of an Orbax checkpoint that can be read.",
            found=f"{name}: {shorten(error, 150)}",
            write='the directory of one item, such as "/checkpoints/1000/state"',
        ) from error
