"""Mistakes with surgeries that remember."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax.numpy as jnp
from raised import Case, fail
from tiny import QUICK, SGD, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e

FUNCTION, STATE, STRUCTURE = e.SurgeryFunctionError, e.StateError, e.StructureError
W, A = {"path": "w"}, {"hook": "a"}
PLAIN = make_state(1)


@dataclasses.dataclass(frozen=True)
class Remember:
    """Remembers somehow, observes somehow."""

    init: Any = jnp.zeros_like
    seen: Any = lambda leaf, memory: (leaf, memory)
    fired: Any = lambda leaf, memory: (leaf, memory)

    def init_memory(self, leaf):
        return self.init(leaf)

    def observe(self, leaf, memory):
        return self.seen(leaf, memory)

    def __call__(self, leaf, memory):
        return self.fired(leaf, memory)


def of_class(**methods: Any) -> Any:
    """A case's surgery: a class with these methods."""
    return lambda: fsh.operate(PLAIN, type("Odd", (), methods)())


def with_hook(surgery: Any, params: str = "w") -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks()
    hooks.add("a", surgery, params=params, when=fsh.every(1), **QUICK)
    return hooks


def begun(surgery: Any, state: Any = PLAIN, step: str = "observe") -> Any:
    """Initialises, then observes or fires."""

    def run() -> None:
        hooks = with_hook(surgery)
        held = hooks.init(state)
        hooks.observe(held) if step == "observe" else hooks(1, held)

    return run


def other_leaves() -> None:
    two = make_state(1, w=jnp.ones(2), v=jnp.ones(2))
    with_hook(Remember(), "*").observe(with_hook(Remember()).init(two))


def holding(surgery: Any) -> Any:
    return lambda: with_hook(Remember()).init(PLAIN.replace(surgery=surgery))


def same(self: Any, leaf: Any, memory: Any) -> Any:
    return leaf, memory


def declaring(kinds: Any = "param", follows: str = "edits", init: Any = jnp.copy) -> Any:
    """A surgery whose memory moves with its leaf somehow."""

    def remember(self: Any, leaf: Any) -> Any:
        return init(leaf)

    methods = {"memory_kinds": kinds, "memory_follows": follows, "init_memory": remember, "__call__": same}
    return type("Odd", (), methods)()


def declaring_for_all(kinds: Any) -> Any:
    methods = {
        "memory_kinds": kinds,
        "init_memory": lambda self, leaves: {"live": {path: leaf[:1] for path, leaf in leaves.items()}},
        "__call__": lambda self, leaves, memory: (leaves, memory),
    }
    return type("Odd", (), methods)()


def forgetful(self: Any, leaf: Any) -> Any:
    return leaf


CASES = {
    "kinds_are_none": Case(
        begun(declaring(["param"])), FUNCTION,
        ("Odd.memory_kinds says what arrays of its memory hold", "['param']", 'or "param" for all of it'), A),
    "kinds_of_all": Case(begun(declaring_for_all("param")), FUNCTION,
                         ("memory_kinds says what arrays of its memory hold", "'param'", '{"average": "param"}'), A),
    "kinds_of_nothing": Case(
        lambda: with_hook(type("Odd", (), {"memory_kinds": "param", "__call__": forgetful})()), FUNCTION,
        ("Odd.memory_kinds is of a memory, and the surgery has none", "init_memory(self, leaf)"), A),
    "kinds_at_times": Case(begun(declaring(follows="always")), FUNCTION,
                           ("Odd.memory_follows says which fires", "'always'", "'edits' or 'reshapes'"), A),
    "kinds_unknown": Case(begun(declaring("params")), e.RuleError,
                          ("Unknown kind of memory", "'params'", "one of param"), A),
    "kinds_of_no_part": Case(begun(declaring({"mean": "param"})), FUNCTION,
                             ("Odd.init_memory makes no 'mean'", "float32[2]", "a dict with 'mean'"), A),
    "kinds_of_another_shape": Case(begun(declaring(init=lambda leaf: leaf[:1])), FUNCTION,
                                   ("arrays of another shape than theirs", "memory: (1,)", "shape [2]"), A),
    "kinds_by_path": Case(begun(declaring_for_all({"live": "param"})), FUNCTION,
                          ("arrays of another shape than theirs", "live: {'w': (1,)}", "by the path of the leaf"), A),
    "memory_without_start": Case(
        of_class(__call__=same), FUNCTION, ("Odd asks for `memory`", "`init_memory(self, leaf)`", "reserved name")),
    "memory_unused": Case(of_class(__call__=lambda self, w: w, init_memory=lambda self, w: w), FUNCTION,
                          ("makes a memory that nothing asks for", "a parameter `memory` in `__call__` or `observe`")),
    "memory_start_asks": Case(of_class(__call__=same, init_memory=lambda self, w, loss: w), FUNCTION,
                              ("asks for loss", "before the first step", "def init_memory(self, leaf)")),
    "observe_form": Case(of_class(__call__=lambda self, leaves: leaves, observe=lambda self, w: w), FUNCTION,
                         ("do not take leaves in the same form", "Found: first parameter 'w'", "`leaves`")),
    "observe_path": Case(
        of_class(__call__=lambda self, leaves: leaves, observe=lambda self, leaves, path: leaves), FUNCTION,
        ("Odd.observe takes all leaves at once and asks for `path`", "the keys of `leaves`")),
    "observe_input": Case(
        lambda: with_hook(type("Odd", (), {"__call__": lambda s, w: w, "observe": lambda s, w, loss: w})()).observe(
            PLAIN, metric=1), e.InputError,
        ("Odd.observe asks for loss", "Found: inputs metric", "hooks.observe(state, loss=...)"), A),
    "memory_start_none": Case(begun(Remember(init=lambda leaf: None)), FUNCTION,
                              ("must return arrays", "Found: NoneType", "jnp.zeros_like(leaf)"), A),
    "memory_start_raises": Case(begun(Remember(init=fail)), e.UserCodeError, ("init_memory raised ValueError",), A),
    "memory_no_pair": Case(begun(Remember(seen=lambda leaf, memory: leaf)), FUNCTION,
                           ("must return a pair", "return leaf, memory"), A | W),
    "memory_structure": Case(begun(Remember(seen=lambda leaf, memory: (leaf, [memory]))), FUNCTION,
                             ("a memory of another structure", "Found: PyTreeDef([*])"), A | W),
    "memory_dtype": Case(begun(Remember(seen=lambda leaf, memory: (leaf, memory > 0))), FUNCTION,
                         ("a memory of another dtype", "Found: bool for float32", "memory.astype(float32)"), A | W),
    "memory_shape": Case(begun(Remember(fired=lambda leaf, memory: (leaf, memory[:1])), step="fire"), STRUCTURE,
                         ("changes the shape of its memory", "Found: [2] -> [1]"), A | W),
    "observed_shape": Case(begun(Remember(seen=lambda leaf, memory: (leaf[:1], memory))), STRUCTURE,
                           ("Remember.observe changes the shape of a leaf", "[2] -> [1]", "in `__call__`"), A | W),
    "no_field": Case(begun(Remember(), types.SimpleNamespace(params=PLAIN.params, opt_state=PLAIN.opt_state, tx=SGD,
                                                             replace=None)), STATE,
                     ("no `surgery` field", "Found: SimpleNamespace", "fsh.TrainState, or a field"), A),
    "no_init": Case(lambda: with_hook(Remember())(1, PLAIN), STATE,
                    ("has no memory of it yet", "Found: memory of no hook", "state = hooks.init(state)"), A),
    "no_init_in_graph": Case(lambda: with_hook(Remember()).observe(PLAIN), STATE, ("has no memory of it yet",), A),
    "memory_of_others": Case(other_leaves, STATE, ("remembers nothing of this leaf", "memory of w", "hooks.init"),
                             A | {"path": "v"}),
    "foreign_field": Case(holding([1]), STATE, ("of another origin", "Found: list", "None, or what hooks.init"), A),
    "memory_no_dict": Case(holding({"memory": {"a": 1}}), STATE,
                           ("memory of Remember does not fit its leaves", "Found: int"), A | W),
    "memory_unfit": Case(holding({"memory": {"a": {"w": jnp.zeros(3)}}}), STATE,
                         ("does not fit its leaves", "Found: (3,)", "a state whose `surgery` is None"), A | W),
    "memory_in_operate": Case(lambda: fsh.operate(PLAIN, Remember()), STATE,
                              ("`operate` has no place for that", "hooks.fire(name, state)")),
}  # fmt: skip
