"""Mistakes with what surgeries compute once per fire, what they measure, pruning, sparse training, and top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from raised import Case, fail
from tiny import QUICK, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import SET, Prune, RigL
from flax_surgery_hooks.top_k import top_k_mask, top_k_masks, top_k_masks_each

FUNCTION = e.SurgeryFunctionError
W, A = {"path": "w"}, {"hook": "a"}
PLAIN = make_state(1)


def deriving(derived: Any, call: Any = None, **methods: Any) -> Callable[[], Any]:
    """Reads a surgery of all leaves that computes something, and operates by it."""
    methods = {"__call__": call or (lambda self, leaves: leaves), "derived": derived, **methods}
    return lambda: fsh.operate(PLAIN, type("Odd", (), methods)())


def of_leaf(self: Any, leaf: Any) -> Any:
    return leaf


def measuring(figures: Any = None, names: Any = None) -> Callable[[], Any]:
    methods = {"figures": figures, "figure_names": names}
    methods = {"__call__": of_leaf, **{name: one for name, one in methods.items() if one is not None}}
    return lambda: fsh.operate(PLAIN, type("Odd", (), methods)())


def named(*names: Any) -> Callable[..., Any]:
    return lambda self, paths: names


def by_hook(surgery: Any, when: Any = None, **inputs: Any) -> Callable[[], Any]:
    """Adds a hook, initialises and fires."""

    def run() -> None:
        hooks = fsh.SurgeryHooks()
        hooks.add("a", surgery, params="w", when=when or fsh.every(1), **QUICK)
        hooks(1, hooks.init(PLAIN), **inputs)

    return run


def takes(self: Any, leaves: Any, g: Any) -> Any:
    return leaves


def ones(state: Any) -> Any:
    return jnp.ones(2)


def of_leaves(leaves: Any) -> Any:
    return jnp.ones(2)


def pruned(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: fsh.operate(PLAIN, Prune(*args, **kwargs))


DERIVED = {
    "derived_no_mapping": Case(deriving(3), FUNCTION, ("Odd.derived is a mapping", "Found: int", "@property")),
    "derived_order": Case(
        deriving({"b": lambda state, a: a, "a": ones}), FUNCTION,
        ("Odd.derived['b'] asks for 'a', which is made after it", "the order b, a", "in front of it")),
    "derived_of_state_late": Case(
        deriving({"b": of_leaves, "a": lambda state, b: b}), FUNCTION,
        ("Odd.derived['a'] asks for 'b'", "functions of `state` come before those of `leaves`")),
    "derived_no_function": Case(deriving({"g": 3}), FUNCTION,
                                ("Odd.derived['g'] is no function under a name", "Found: 3", "jax.grad(loss)")),
    "derived_reserved": Case(deriving({"step": ones}), FUNCTION, ("Found: the name 'step', which is reserved",)),
    "derived_no_name": Case(deriving({"a b": ones}), FUNCTION, ("Odd.derived['a b'] is no function under a name",)),
    "derived_path": Case(deriving({"g": lambda state, path: 1}), FUNCTION,
                         ("Odd.derived['g'] asks for path", "it is given `state`, or `leaves` and `memory`")),
    "derived_of_both": Case(deriving({"g": lambda state, memory: 1}), FUNCTION,
                            ("asks for the whole state and for the selected leaves", "(state, memory)",
                             "two functions")),
    "derived_of_one_leaf": Case(deriving({"g": of_leaves}, of_leaf), FUNCTION,
                                ("asks for leaves, and the surgery takes one leaf at a time", "`leaves` as the first")),
    "derived_passed_too": Case(
        by_hook(type("Odd", (), {"__call__": takes, "derived": {"g": ones}})(), g=1, loss=2), e.InputError,
        ("The surgery Odd computes 'g' itself", "Found: inputs g, loss", "hooks(step, state) without g="), A),
    "derived_raises": Case(deriving({"g": lambda state: fail()}, takes), e.UserCodeError,
                           ("Odd.derived['g'] raised ValueError: no luck",)),
    "derived_nothing": Case(deriving({"g": lambda state: None}, takes), FUNCTION,
                            ("Odd.derived['g'] must return arrays", "Found: NoneType", "jax.grad(loss)")),
    "derived_text": Case(deriving({"g": lambda leaves: {"a": "b", "c": jnp.ones(1)}}, takes), FUNCTION,
                         ("must return arrays, or a pytree of them", "Found: str")),
    "derived_input": Case(deriving({"g": lambda state, batch: batch}, takes), e.InputError,
                          ("asks for batch, which the train loop does not pass",)),
    "figures_unnamed": Case(measuring(figures=lambda self, leaf: {}), FUNCTION,
                            ("Odd has figures without their names", "def figure_names(self, paths)")),
    "figures_none": Case(measuring(names=named("a")), FUNCTION, ("Odd has names of figures without figures",)),
    "figures_form": Case(measuring(lambda self, leaves: {}, named("a")), FUNCTION,
                         ("do not take leaves in the same form", "Found: first parameter 'leaves'")),
    "figure_names_twice": Case(measuring(lambda self, leaf: {}, named("a", "a")), FUNCTION,
                               ("must return different names", "Found: ('a', 'a')"), W),
    "figure_names_taken": Case(measuring(lambda self, leaf: {}, named("params/norm")), FUNCTION,
                               ("which do not begin with params/ or slots/", "('params/norm',)"), W),
    "figure_names_raise": Case(measuring(lambda self, leaf: {}, lambda self, paths: fail()), e.UserCodeError,
                               ("Odd.figure_names raised ValueError: no luck",), W),
    "figures_others": Case(measuring(lambda self, leaf: {"b": 1.0}, named("a")), FUNCTION,
                           ("a dict of the figures that figure_names names", "Found: b", "Write instead: a."), W),
    "figures_no_dict": Case(measuring(lambda self, leaf: 3.0, named("a")), FUNCTION, ("Found: float",), W),
    "figures_no_number": Case(measuring(lambda self, leaf: {"a": leaf}, named("a")), FUNCTION, ("each one number",), W),
    "figures_raise": Case(measuring(lambda self, leaf: fail(), named("a")), e.UserCodeError,
                          ("Odd.figures raised ValueError: no luck",), W),
}  # fmt: skip

SPARSE = {
    "prune_choice": Case(lambda: Prune(score="gradient"), FUNCTION,
                         ("Prune(score=...) is unknown", "Found: 'gradient'", "magnitude, random, saliency")),
    "prune_scope": Case(lambda: Prune(scope=lambda leaf: leaf), FUNCTION, ("Prune(scope=...) is unknown",)),
    "prune_spread": Case(lambda: Prune(distribution="flat"), FUNCTION, ("Prune(distribution=...) is unknown",)),
    "prune_two_ramps": Case(lambda: Prune(0.5, end=3, schedule=lambda step: 1), FUNCTION,
                            ("a ramp from `begin` to `end`, and a schedule too", "Found: end=3", "one of both")),
    "prune_ramp": Case(lambda: Prune(0.5, end=3, begin=4), e.ScheduleError, ("begin 4, end 3",)),
    "prune_spread_twice": Case(lambda: Prune({"**": 0.5}, scope="global"), FUNCTION,
                               ("told in two ways how the sparsity is spread",
                                'Found: scope="global" and a mapping as sparsity', "one of them")),
    "prune_global_blocks": Case(lambda: Prune(0.5, scope="global", structure={"w": "channel"}), FUNCTION,
                                ("single weights compete with each other", "structure='channel'", 'scope="layer"')),
    "prune_sparsity": Case(lambda: Prune(90), FUNCTION, ("A sparsity is a number from 0 to 1", "Found: int 90")),
    "prune_initial": Case(lambda: Prune(0.9, initial=-0.5), FUNCTION, ("Found: float -0.5",)),
    "prune_no_sparsity": Case(pruned(), FUNCTION, (
        "Nothing says how sparse the leaves are to be", "Found: structure 'unstructured' and sparsity=None",
        'sparsity=0.9, or structure="2:4"')),
    "prune_no_sparsity_of_all": Case(pruned(scope="global"), FUNCTION, ("Nothing says how sparse",)),
    "prune_end": Case(by_hook(Prune(0.5, end=8), fsh.at(2, 7)), e.ScheduleError,
                      ("before the sparsity has reached its target", "Found: at(2, 7), last due at 7, and end=8",
                       "a schedule that is due at step 8 or later, or end=7"), A),
    "prune_score_shape": Case(pruned(0.5, score=lambda leaf: leaf.sum()), FUNCTION,
                              ("The score of a leaf is an array of its shape", "shape [] for [2]"), W),
    "prune_score_raises": Case(pruned(0.5, score=lambda leaf: fail()), e.UserCodeError,
                               ("Prune.derived['masks'] raised ValueError: no luck",)),
    "prune_score_asks": Case(pruned(0.5, score=lambda leaf, loss: leaf), FUNCTION, (
        "The score of Prune asks for loss", "Found: (loss)", "may take `path`, `key`, `grad` and `step`")),
    "prune_grads_missing": Case(by_hook(Prune(0.5, score="saliency")), e.InputError,
                                ("asks for grads", "hooks(step, state, grads=...)"), A),
    "prune_grads_elsewhere": Case(by_hook(Prune(0.5, score="saliency"), grads={"v": jnp.ones(2)}), e.InputError,
                                  ("`grads` has no array for a selected leaf of this shape", "Found: v"), A | W),
    "prune_grads_shape": Case(
        by_hook(Prune(0.5, score="saliency", grads=lambda state: {"w": jnp.ones(3)})), e.InputError,
        ("`grads` has no array for a selected leaf of this shape", "float32[3]"), A | W),
    "prune_structure": Case(pruned(structure="2:4"), FUNCTION, ("The leaf has no axis -2",), W),
    "set_spread": Case(lambda: SET(0.5, 3, distribution="flat"), FUNCTION,
                       ("SET(distribution=...) is unknown", "Found: 'flat'", '"uniform" or "erk"')),
    "rigl_spread": Case(lambda: RigL(0.5, 3, distribution="flat"), FUNCTION, ("RigL(distribution=...) is unknown",)),
    "set_sparsity": Case(lambda: SET(9, 3), FUNCTION, ("A sparsity is a number from 0 to 1", "Found: int 9")),
    "set_end": Case(lambda: SET(0.9), e.ScheduleError, ("A cosine falls to 0 at some step", "Found: end=None")),
    "rigl_grads_missing": Case(by_hook(RigL(0.5, 3)), e.InputError, ("asks for grads",), A),
}  # fmt: skip

SELECTION = e.SelectionError
LARGE = jax.ShapeDtypeStruct((1 << 16, 1 << 15), jnp.float32)

TOP_K = {
    "top_k_names": Case(lambda: top_k_masks_each({"a": jnp.ones(2)}, {"a": 1, "b": 1}), SELECTION,
                        ("of different arrays", "Found: b in one of them only", "a number in ks for each")),
    "top_k_dtype": Case(lambda: top_k_masks({"w": jnp.arange(3)}, 1), SELECTION,
                        ("of a type that has no order here", "Found: int32", "scores.astype(jnp.float32)"), W),
    "top_k_too_many": Case(lambda: jax.eval_shape(lambda scores: top_k_mask(scores, 1), LARGE), SELECTION,
                           ("more elements than int32 can count", "2,147,483,648", "fewer than 2**31")),
    "top_k_float": Case(lambda: top_k_mask(jnp.ones(2), 1.0), SELECTION,
                        ("to select is no integer", "Found: float 1.0", "int(0.1 * size)")),
    "top_k_more": Case(lambda: top_k_mask(jnp.ones(2), 3), SELECTION,
                       ("not so many elements to select", "Found: 3", "from 0 to 2")),
}  # fmt: skip

CASES = DERIVED | SPARSE | TOP_K
