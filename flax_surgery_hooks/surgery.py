"""The surgery protocol: how a user's plain function, or a built-in class, is called on the selected leaves."""

from __future__ import annotations

import dataclasses
import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from flax_surgery_hooks.errors import InputError, shorten
from flax_surgery_hooks.methods import Method as Method
from flax_surgery_hooks.paths import listed

RESERVED = ("path", "key", "step", "memory", "state", "leaves")
LEAF = "leaf"
"""What `edit_slots` gets the leaf under."""
STATE, LEAVES = "state", "leaves"
"""What functions of `derived` get the train state and the selected leaves under."""
PRESERVES = ("function", "eval_function", "nothing")
FOLLOWS = ("edits", "reshapes")
"""Which fires of other hooks the memory of a surgery follows."""


class Surgery(Protocol):
    """What a surgery class looks like; a plain function with the same parameters is a surgery too.

    The first parameter is one selected leaf, or, if it is named `leaves`, the dict from path to leaf of all selected
    ones, and a dict comes back: of the same paths, or of others, which adds and removes leaves. Further parameters are
    filled by name: `path` (str, one-leaf form only), `key` (a typed PRNG key; in the one-leaf form the leaf's own),
    `step` (int32 scalar: what `state.step` holds), `memory`, and any input that the trainer passes to the hooks. Leaves
    come as float32 where they are stored in fewer bits, and go back to their dtype.

    A class may have further methods, whose parameters are filled likewise:
      `init_memory(leaf)`: what the surgery remembers of the leaf at first, a pytree of arrays; it may take `path` and
        `key`. `hooks.init(state)` puts it into the train state. A `__call__` or `observe` that takes `memory` returns a
        pair of what it returns otherwise and the new memory, which has the structure, shapes and dtypes of the old one.
      `observe(leaf)`: what happens to the leaf and the memory at every step, inside the train step, by
        `hooks.observe(state)` or `hooks.in_graph(state)`. Slots are left alone.
      `fold_back(new_leaf)`: the linear map that says how a change of the new leaf folds back into the old one.
      `edit_slots(slots)`: the optimizer slots of the leaf after the edit, see `slot_edits`; it may take `leaf` too, or
        `leaves` where the surgery takes all.
      `figures(leaf)`: further figures of a fire, name -> number, and `figure_names(paths)`, which says their names.
      `check_schedule(when)`: raises if the surgery is not made for such a schedule; called by `hooks.add`.

    An attribute `derived`, name -> function, holds what is computed once per fire, before the edit, and given to the
    others as inputs of these names: gradients of the user's loss, a mask. The functions' parameters are filled by name
    too: `state` (the whole train state), or `leaves` (path -> leaf) and `memory`; `key`, `step`, inputs, and what the
    functions before it have made. See `deriving`.

    A class with `edit_optimizer(optimizer)` instead of `__call__` edits the optimizer state as a whole, see
    `optimizer_edits`.

    Attributes:
      preserves: "function" or "eval_function" if the model computes the same after the edit (slots are transported by
        default), "nothing" otherwise (slots are carried by default).
      opt_state: another rule to be the default, such as "keep" where an edit leaves the history of all elements alone.
      memory_kinds: what arrays of the memory hold that have the shape of the leaf, one of `rules.KINDS`: they move as
        optimizer slots of that kind where another hook fires. A kind for the whole memory of a leaf, or a mapping from
        keys of it, {"average": "param"}; of a surgery that takes all leaves such a key holds path -> array.
      memory_follows: which fires of other hooks these arrays follow: "edits", or, where they hold what was, the
        "reshapes" of hooks that may change shapes.
      starts_anew: whether `operate`, which has no place for what a surgery remembers, may start it from `init_memory`
        and let go of what comes of that.
    """

    preserves: ClassVar[str] = "nothing"

    def __call__(self, leaf: jax.Array, /) -> jax.Array:
        """The edited leaf."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """A surgery whose signature has been read.

    Attributes:
      function: the surgery itself.
      name: its name in records.
      many: whether it takes the dict of all selected leaves.
      wants: names of the further parameters that must be filled.
      may_take: names of those that have defaults.
      preserves: what the edit leaves alone.
      fold_back: the linear map from new leaves to old ones, or None.
      fold_wants: the names that `fold_back` takes beside its first parameter.
      init_memory: what makes the memory of a leaf (of all leaves, if it takes many), or None if it remembers nothing.
      observe: what happens at every step, or None.
      edit_slots: what edits the slots of a leaf in place of a rule, or None.
      edit_optimizer: what edits the optimizer state as a whole, in place of leaves, or None.
      derived: what is computed once per fire, in order: name -> function.
      figures: what measures a fire beside the edit, or None.
      figure_names: from the paths of a call's leaves to the names of these figures.
      memory_kinds: pairs of a key of the memory, "" for all of it, and the kind of its arrays.
      memory_follows: "edits" or "reshapes".
      rule: the rule of slots by default, or None for that of `preserves`.
      starts_anew: whether `operate` may start it from its first memory.
    """

    function: Callable[..., Any]
    name: str
    many: bool
    wants: tuple[str, ...]
    may_take: tuple[str, ...]
    preserves: str
    fold_back: Callable[..., Any] | None = None
    fold_wants: tuple[str, ...] = ()
    init_memory: Method | None = None
    observe: Method | None = None
    edit_slots: Method | None = None
    edit_optimizer: Method | None = None
    derived: tuple[tuple[str, Method], ...] = ()
    figures: Method | None = None
    figure_names: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None
    memory_kinds: tuple[tuple[str, str], ...] = ()
    memory_follows: str = "edits"
    rule: str | None = None
    starts_anew: bool = False

    @property
    def main(self) -> Method:
        """What a fire calls."""
        return Method(self.function, self.name, self.wants, self.may_take)

    def takes(self, name: str) -> bool:
        """Whether anything that a fire calls has a parameter of this name beside its first."""
        return any(method.takes(name) for method in (self.main, *self._called))

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the parameters without default of all that a fire calls, but for those that it makes itself."""
        others = [name for method in self._called for name in method.wants if name not in (LEAF, LEAVES)]
        made = dict(self.derived)
        return tuple(name for name in (*self.wants, *others, *self.fold_wants) if name not in made)

    @property
    def edits_state(self) -> bool:
        """Whether slots change by what the surgery itself says, so that no rule applies."""
        return any(method is not None for method in self._others)

    @property
    def _others(self) -> tuple[Method | None, Method | None]:
        return self.edit_slots, self.edit_optimizer

    @property
    def _called(self) -> tuple[Method, ...]:
        """What a fire calls beside the surgery itself."""
        functions = (*self._others, self.figures, *(method for _, method in self.derived))
        return tuple(method for method in functions if method is not None)

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the trainer's inputs that this surgery asks for.

        Raises:
          InputError: one that it needs is not there, or one is there that it makes itself.
        """
        optional = [name for method in self._called for name in method.may_take if name != LEAF]
        asked = dict.fromkeys((*self.needs, *self.may_take, *optional))
        twice = [name for name, _ in self.derived if name in given]
        if twice:
            raise InputError(
                f"The surgery {self.name} computes {twice[0]!r} itself, and the train loop passes it too.",
                found=f"inputs {listed(given)}",
                write=f"hooks(step, state) without {twice[0]}=, or the surgery without its function for it",
            )
        missing = [name for name in self.needs if name not in given and name not in RESERVED]
        if missing:
            raise InputError(
                f"The surgery {self.name} asks for {listed(missing)}, which the train loop does not pass.",
                found=f"inputs {listed(given) or 'none'}",
                write=f"hooks(step, state, {missing[0]}=...), or give the parameter a default",
            )
        return {name: given[name] for name in asked if name in given}

    def observed_inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the inputs of `hooks.observe` that `observe` asks for.

        Raises:
          InputError: one that it needs is not there.
        """
        assert self.observe is not None
        missing = [name for name in self.observe.wants if name not in given and name not in RESERVED]
        if missing:
            raise InputError(
                f"{self.observe.name} asks for {listed(missing)}, which the train step does not pass.",
                found=f"inputs {listed(given) or 'none'}",
                write=f"hooks.observe(state, {missing[0]}=...), or give the parameter a default",
            )
        return self.observe.fill(given)


def describe(surgery: Any) -> dict[str, Any]:
    """Name and fields of a surgery as JSON holds them, for records.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Halve:
    ...     by: float = 2.0
    >>> describe(Halve())
    {'name': 'Halve', 'by': 2.0}
    """
    name = getattr(surgery, "__name__", type(surgery).__name__)
    if not dataclasses.is_dataclass(surgery) or inspect.isclass(surgery):
        return {"name": name}
    fields = {field.name: getattr(surgery, field.name) for field in dataclasses.fields(surgery)}
    return {"name": name, **{key: plain(value) for key, value in fields.items()}}


def plain(value: Any) -> Any:
    """`value` as JSON holds it; arrays and functions by what they are, not by content."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return shorten(value)


def path_hash(path: str) -> np.uint32:
    """The number of a path that keys are folded with: its crc32, the same on every process and in every run."""
    return np.uint32(zlib.crc32(path.encode()))


def key_for(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf: `key` folded with the hash of the leaf's path.

    >>> import jax
    >>> bool((key_for(jax.random.key(0), "a") == key_for(jax.random.key(0), "b")).all())
    False
    """
    return jax.random.fold_in(key, path_hash(path))
