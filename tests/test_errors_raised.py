"""Every `raise` of the core once, by what a user would do to meet it: its type, what it says, and of what."""

import ast
import dataclasses
import functools
import pathlib
import traceback
import types
import typing
from collections.abc import Callable
from typing import Any
from unittest import mock

import derived_cases
import fuzz_cases
import jax
import jax.numpy as jnp
import memory_cases
import numpy as np
import optax
import path_cases
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from raised import Case, fail, of_leaves
from tiny import MOMENTUM, halve, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks import slot_registry, slots
from flax_surgery_hooks.surgeries import Assign, ClipNorm, Noise, Normalize, Reinit, ResetMoments, Scale, SetHyperparams

ELSEWHERE = ("__init__", "_encodings", "_event_files", "abstract_state", "adapters", "agreement", "averages",
             "balance", "captured", "checkpoint", "cli", "config", "config_export", "config_fields", "config_hook",
             "config_reading", "config_registry", "config_writing", "copies", "count_schedules", "derived_schedules",
             "distributions", "errors", "failing", "fingerprint", "freezable", "globs", "groups", "guards",
             "in_graph", "keeping", "kept_leaves", "layer_index", "layer_slots", "ledger_files", "ledger_lines",
             "low_rank", "metric_schedules", "mirrors", "optimizer", "optimizer_edits", "optimizer_state", "pairing",
             "paths", "placement", "plasticity", "processes", "qk_clip", "ramps", "remembered", "resize", "resuming",
             "rewarm", "rollback", "room", "schedules", "selection", "slot_edits", "slot_gain", "straight_through",
             "structures", "switching", "targets", "traced_hooks", "trainers", "watched_schedules", "watched_values",
             "watching", "width", "wiring", "writers")  # fmt: skip
"""Modules whose own tests see to what they raise."""
PLAIN = make_state(1)
SLOTS = make_state(1, MOMENTUM, w=jnp.arange(1.0, 5), v=jnp.ones(4))


BARE = types.SimpleNamespace(params=PLAIN.params, opt_state=PLAIN.opt_state, tx=PLAIN.tx, replace=None)


def on_slots(surgery, **kwargs):
    """A call of `operate` on one leaf that has a slot."""
    return lambda: fsh.operate(SLOTS, surgery, **{"params": "w", **kwargs})


def on_plain(surgery, **kwargs):
    return lambda: fsh.operate(PLAIN, surgery, **kwargs)


def by_hook(surgery=halve, state=PLAIN, step=1, inputs=None, **options):
    """A first call of hooks."""
    return lambda: make_hooks(surgery, options=options)(step, state, **(inputs or {}))


class SlotsOfAll:
    def __call__(self, leaves):
        return {**leaves, "more": jnp.ones(2)}

    def edit_slots(self, slots, /):
        return slots


class OptimizerPath:
    def edit_optimizer(self, optimizer, /, path):
        return optimizer


class LeavesToo(OptimizerPath):
    def __call__(self, leaf):
        return leaf


def started(**kwargs):
    hooks = make_hooks(halve, fsh.every(2), **kwargs)
    hooks(1, PLAIN)
    return hooks


@dataclasses.dataclass(frozen=True)
class Folding:
    """A surgery that doubles, and folds back somehow."""

    fold_back: Callable[..., Any]
    preserves = "function"

    def __call__(self, w):
        return 2 * w


def duplicated(share):
    """Three copies of each of the first two elements in unequal parts."""
    return lambda w: w[jnp.array([0, 0, 1, 1, 2])] * jnp.asarray(share)


@jax.custom_vjp
def no_forward_rule(w):
    return w * 2


no_forward_rule.defvjp(lambda w: (w * 2, None), lambda _, g: (g * 2,))


def until_large(w):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: 2 * x, w)


class Odd(typing.NamedTuple):
    mine: Any


def odd_optimizer(start, update=lambda old, g: old + g.sum()):
    """An optimizer whose state the library does not know."""

    def step(updates, state, params=None):
        del params
        return updates, Odd(jax.tree.map(update, state.mine, updates))

    return optax.GradientTransformation(lambda params: Odd(jax.tree.map(start, params)), step)


def on_odd(tx, kind=None, run=fsh.operate, **kwargs):
    def registered():
        with mock.patch.dict(slot_registry.REGISTRY):
            if kind is not None:
                fsh.register_slot(Odd, mine=kind)
            slots.find_slots.cache_clear()
            run(make_state(0, tx, w=jnp.ones((3, 2)), v=jnp.ones(2)), halve, params="w", **kwargs)

    return registered


def reshapes(state, *_, params):
    make_hooks(cut, params=params, options={"on_reshape": lambda state, record: None})(0, state)


def cut(w):
    return w[1:]


def raising_later():
    hooks = make_hooks(lambda w, mode="": w if mode else fail())
    hooks(1, PLAIN, mode="fine")
    hooks.fire("a", PLAIN, 3)


def replicated(state):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *jnp.shape(x))), state)


def undivided():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.device_put(jnp.ones(16), NamedSharding(mesh, PartitionSpec("d")))
    fsh.operate(make_state(0, w=w), lambda w: w[1:])


def refused(**kwargs):
    hooks = make_hooks(lambda w: w / 0, options=kwargs)
    hooks(1, PLAIN)
    hooks.flush()


W, A = {"path": "w"}, {"hook": "a"}
FUNCTION, HOOK, STEP, STATE, SLOT, RULE = (
    e.SurgeryFunctionError, e.HookError, e.StepError, e.StateError, e.SlotError, e.RuleError)  # fmt: skip

CASES = {
    # What a surgery may be.
    "missing_input": Case(by_hook(lambda w, loss: w, inputs={"metric": 1}), e.InputError,
                          ("asks for loss", "Found: inputs metric", "hooks(step, state, loss=...)"), A),
    "a_class": Case(on_plain(Normalize), FUNCTION, ("can be called with", "Normalize(...), an instance")),
    "no_function": Case(on_plain(3), FUNCTION, ("Found: 3", "lambda kernel: 2 * kernel")),
    "preserves": Case(on_plain(type("Odd", (), {"__call__": lambda self, w: w, "preserves": "loss"})()), FUNCTION,
                      ("unknown `preserves`", "Found: 'loss'", "function, eval_function, nothing")),
    "fold_back_path": Case(on_slots(Folding(lambda w, path: w)), FUNCTION,
                           ("fold_back of Folding asks for `path`", "Found: (path)", "whose keys are the paths")),
    "path_of_all": Case(on_plain(lambda leaves, path: leaves), FUNCTION, ("asks for `path`", "the keys of `leaves`")),
    "memory": Case(on_plain(lambda w, memory: w), FUNCTION, ("asks for `memory`", "a reserved name")),
    "signature": Case(on_plain(type("Odd", (), {"__call__": lambda self, w: w, "__signature__": "?"})()), FUNCTION,
                      ("signature of Odd cannot be read", "lambda leaf: Odd(leaf)")),
    "no_leaf": Case(on_plain(lambda: 1), FUNCTION, ("takes no leaf", "Found: ().", "def edit(kernel, ...)")),
    "no_positional_leaf": Case(on_plain(lambda *, kernel: kernel), FUNCTION,
                               ("must be positional", "Found: (*, kernel)")),
    "star_args": Case(on_plain(lambda w, **others: w), FUNCTION, ("takes **others", "filled by name")),
    "raising": Case(by_hook(lambda w: fail()), e.UserCodeError, ("raised ValueError: no luck",), A | W),
    "raising_later": Case(raising_later, e.UserCodeError, ("raised ValueError: no luck",), A | W | {"step": 3}),
    **derived_cases.CASES,
    **memory_cases.CASES,
    **path_cases.CASES,
    **{f"found_{name}": case for name, case in fuzz_cases.CASES.items()},
    "no_dict": Case(on_plain(of_leaves(lambda leaves: None)), FUNCTION,
                    ("with the paths it was given: w", "Found: NoneType"), W),
    "no_return": Case(on_plain(lambda w: None), FUNCTION, ("must return an array", "is a `return` missing?"), W),
    "no_array": Case(on_plain(lambda w: "w"), FUNCTION, ("must return an array", "Found: str"), W),
    "other_numbers": Case(on_plain(lambda w: w > 0), FUNCTION, ("float32 came back as bool", ".astype(float32)"), W),
    # Rules and slots.
    "rule": Case(on_plain(halve, opt_state="transprot"), RULE,
                 ("Unknown opt_state rule", "Found: 'transprot'", "one of transport")),
    "no_start": Case(on_odd(odd_optimizer(lambda p: jnp.cumsum(p, 0), lambda m, g: m + g), "grad", opt_state="reset"),
                     SLOT, ("fills Odd.mine with no constant", 'opt_state={"grad": "keep"}'), W),
    "complex": Case(lambda: fsh.operate(make_state(0, w=jnp.ones(2, complex)), halve), FUNCTION,
                    ("Complex leaves cannot be edited", "complex64[2]", "exclude="), W),
    "fold_back_square": Case(on_slots(Folding(lambda w: w * w)), e.FoldBackError, ("of Folding is not linear",), W),
    "all_kept": Case(on_slots(lambda w: w[1:], opt_state="keep"), RULE, ("Slots cannot be kept", "[4] -> [3]"), W),
    "layout": Case(on_odd(odd_optimizer(lambda p: jnp.zeros(p.shape[-1:]), lambda old, g: old), "grad"), SLOT,
                   ("Odd.mine is shaped [2] for a parameter shaped [3, 2]", 'opt_state={"grad": "keep"}'), W),
    "kept": Case(on_slots(lambda w: w[1:], opt_state={"grad": "keep"}), RULE,
                 ("TraceState.trace cannot be kept", "[4] -> [3]", "'carry', 'transport' or 'reset'"), W),
    "slot_function": Case(on_slots(halve, opt_state=fail), e.UserCodeError,
                          ("fail raised ValueError on TraceState.trace: no luck", "def fn(slot, *,"), W),
    "slot_shape": Case(on_slots(halve, opt_state=lambda slot, **_: slot[1:]), RULE,
                       ("of the slot's new shape for TraceState.trace", "Found: [3]", "an array of shape [4]"), W),
    "unknown_slot": Case(on_odd(odd_optimizer(jnp.zeros_like)), SLOT,
                         ("'mine' of the optimizer state Odd mirrors", 'fsh.register_slot(Odd, mine="grad")')),
    "wrong_kind": Case(on_odd(odd_optimizer(jnp.zeros_like, lambda old, g: old + g), "grad_sq"), SLOT,
                       ("Odd.mine is registered as grad_sq", "order 1.00 in the gradient, signed", "mine='grad'")),
    "field": Case(lambda: fsh.register_slot(Odd, yours="grad"), SLOT, ("Odd has no field 'yours'", "fields mine")),
    "no_mirror": Case(on_odd(optax.GradientTransformation(lambda _: Odd(jnp.ones(7)), lambda u, s, _: (u, s))), SLOT,
                      ("'mine' of Odd holds an array that does not mirror", "float32[7]", 'mine="none"')),
    "other_optimizer": Case(lambda: fsh.operate(PLAIN.replace(opt_state=SLOTS.opt_state), halve), STATE,
                            ("not what `tx.init` makes for these parameters", "tx.init(params)")),
    "other_params": Case(lambda: fsh.operate(SLOTS.replace(params={"w": jnp.ones(4), "v": jnp.ones(5)}), halve), STATE,
                         ("not what `tx.init` makes for these parameters",)),
    "replicated_slots": Case(lambda: fsh.operate(replicated(make_state(0, optax.adam(0.1))).replace(step=0), halve),
                             STATE, ("replicated for pmap", "count [8] instead of []", "flax.jax_utils.unreplicate")),
    "no_init": Case(lambda: fsh.operate(PLAIN.replace(tx=PLAIN.tx._replace(init=fail)), halve), STATE,
                    ("`tx.init` fails on the parameters of the state: ValueError: no luck", "the very `tx`")),
    "unprobed": Case(on_odd(odd_optimizer(jnp.zeros_like, fail), "grad"), SLOT,
                     ("could not be probed: ValueError: no luck", "opt_state='keep'")),
    # What an edit may contain.
    "rounding": Case(on_slots(jnp.round), e.LostHistoryError, ("derivative is zero everywhere", "opt_state='keep'"), W),
    "mixing": Case(on_slots(jnp.cumsum, opt_state="transport"), e.MixingError,
                   ("from several old ones", "3 such elements", "stop_gradient", "opt_state='carry', which"), W),
    "mixing_reshaped": Case(on_slots(lambda w: jnp.convolve(w, jnp.ones(2))), e.MixingError, ("3 such elements",), W),
    "unequal": Case(on_slots(duplicated([0.3, 0.7, 0.5, 0.5, 1]), opt_state="transport"), e.UnequalCopiesError,
                    ("coefficients of different size", "2 such elements", "fold_back"), W),
    "fold_back_affine": Case(on_slots(Folding(lambda w: w / 2 + 1)), e.FoldBackError,
                             ("does not map zeros to zeros", "values up to 1"), W),
    "fold_back_off": Case(on_slots(Folding(lambda w: w)), e.FoldBackError,
                          ("does not undo the edit", "a relative error of 1"), W),
    "fold_back_shape": Case(on_slots(Folding(lambda w: w[1:])), e.FoldBackError,
                            ("shaped like the old one", "Found: [3]", "shape [4]"), W),
    "callback": Case(on_slots(lambda w: jax.pure_callback(np.square, w, w)), e.DifferentiationError,
                     ("cannot be differentiated", "opt_state='keep'"), W),
    "custom_vjp": Case(on_slots(lambda w: no_forward_rule(w)), e.DifferentiationError, ("custom_vjp",), W),
    "while_loop": Case(on_slots(until_large, opt_state="transport"), e.DifferentiationError, ("while_loop",), W),
    # Surgeries on the optimizer; tests/test_reset_moments.py and tests/test_optimizer_surgeries.py have more.
    "slot_rule_given": Case(on_slots(ResetMoments(), opt_state="reset"), RULE, ("says itself", "no opt_state=")),
    "no_slots": Case(on_plain(ResetMoments()), SLOT, ("edits optimizer slots", "leaves have none", "Found: w")),
    "slots_of_more": Case(on_slots(SlotsOfAll(), params="**"), e.StructureError,
                          ("can neither add nor remove leaves", "v, w -> more", "without edit_slots")),
    "optimizer_and_leaves": Case(on_plain(LeavesToo()), FUNCTION, ("edit_optimizer and __call__", "two surgeries")),
    "optimizer_path": Case(on_plain(OptimizerPath()), FUNCTION, ("asks for path", "are the selected leaves")),
    # Where a fire ends.
    "reshaping_hook": Case(by_hook(cut), e.StructureError,
                           ("the hook brings nothing for that", "[2] -> [1]", "apply_fn=", "on_reshape="), A | W),
    "no_apply_fn": Case(by_hook(cut, BARE, apply_fn=cut), e.StructureError,
                        ("the state has no such field", "SimpleNamespace", "on_reshape="), A),
    "new_tx_fails": Case(by_hook(cut, tx=PLAIN.tx._replace(init=fail)), e.StructureError,
                         ("`tx.init` fails on the new parameters: ValueError: no luck", "tx= of the hook"), A),
    "new_tx_differs": Case(by_hook(cut, tx=MOMENTUM), e.StructureError,
                           ("another structure than `tx` makes", "same chain of transforms"), A),
    "slots_left_behind": Case(on_odd(odd_optimizer(jnp.zeros_like, lambda m, g: m + g), "none", reshapes),
                              e.StructureError, ("state have other shapes", "Found: mine/w", "'reset' or 'carry'"), A),
    "on_reshape_raises": Case(by_hook(cut, on_reshape=fail), e.UserCodeError,
                              ("on_reshape raised ValueError: no luck",), A | {"step": 1}),
    "on_reshape_returns": Case(by_hook(cut, on_reshape=lambda state, record: 3), e.StructureError,
                               ("no train state", "Found: int", "None to leave it"), A | {"step": 1}),
    "undivided": Case(undivided, e.StructureError,
                      ("does not divide over the leaf's mesh", "axis 0 of size 15 over 'd', 8 shards"), W),
    "no_key": Case(on_plain(lambda w, key: w), e.InputError, ("draws random numbers", "key=jax.random.key(0)")),
    "not_finite": Case(on_plain(lambda w: w / 0), e.RefusedError, ("2 non-finite values", "guard='off'")),
    "guarded": Case(on_plain(halve, guard="params/sparsity > 0"), e.RefusedError,
                    ("was refused by its guard params/sparsity > 0.0", "Found: params/sparsity 0")),
    "guarded_optimizer": Case(on_plain(SetHyperparams({"lr": 1.0}), guard="params/sparsity > 0"), RULE,
                              ("edits the optimizer as a whole", "guard=params/sparsity > 0.0")),
    "saved_fires": Case(lambda: make_hooks(halve)._settler.from_json({}), STATE, ("not what was saved of the fires",)),
    "rollback": Case(by_hook(rollback=9), HOOK, ("`rollback=` is no `fsh.Rollback`", "Found: int 9"), A),
    "rollback_of_shapes": Case(by_hook(rollback=fsh.Rollback(9), apply_fn=cut), HOOK,
                               ("may change the structure", "Found: apply_fn="), A),
    "reserved": Case(by_hook(inputs={"key": 1}), e.InputError, ("'key' is reserved", "my_key=..."), A),
    "unhashable": Case(by_hook(lambda w, x: w, inputs={"x": {"a"}}), e.InputError, ("'x' is neither", "Found: set"), A),
    "refused": Case(refused, e.RefusedError, ("refused", "2 in params, 0 in slots"), A | W | {"step": 1}),
    "no_ledger": Case(lambda: fsh.Ledger("/dev/null/there").write(fsh.Record()), e.LedgerError,
                      ("cannot be written", "writable directory"), {"path": "/dev/null/there"}),
    # The runner.
    "seed": Case(lambda: fsh.SurgeryHooks(seed="0"), HOOK, ("seed=...) is a Python int", "Found: '0'")),
    "donate": Case(lambda: fsh.SurgeryHooks(donate="yes"), HOOK,
                   ("Unknown donate=", "Found: 'yes'", "auto, always, never")),
    "on_error": Case(lambda: fsh.SurgeryHooks(on_error="warn"), HOOK, ("on_error=", "Found: 'warn'", "raise, skip")),
    "settle_after": Case(lambda: fsh.SurgeryHooks(settle_after=-1), HOOK, ("is a number of steps", "Found: -1")),
    "when": Case(lambda: make_hooks(halve, 100), e.ScheduleError, ("`when=` is no schedule", "fsh.every(200)"), A),
    "priority": Case(by_hook(priority=0.5), HOOK, ("`priority=` is a Python int", "Found: 0.5"), A),
    "no_state": Case(lambda: started()(2), STATE, ("need it and return it", "state = hooks(step, state)")),
    "backwards": Case(lambda: started()(1, PLAIN), STEP, ("Steps go forward", "step 1 after 1")),
    "replicated": Case(by_hook(state=PLAIN.replace(step=jnp.ones(8, int))), STATE, ("replicated for pmap", "[8]")),
    "other_step": Case(by_hook(step=0), STEP, ("`state.step` holds", "step 0, state.step 1", "hooks(step + 1, state)")),
    "jump": Case(lambda: started(strict_steps=True)(3, PLAIN), STEP, ("jumps over", "due at 2, last call at 1"),
                 A | {"step": 3}),
    "no_hook": Case(lambda: make_hooks(halve).remove("b"), HOOK, ("no hook of this name", "hooks a"), {"hook": "b"}),
    "name": Case(lambda: make_hooks(halve, name="a/b"), HOOK, ("letters, digits", "Found: 'a/b'"), {"hook": "a/b"}),
    "name_taken": Case(lambda: make_hooks(halve).add("a", halve, params="w", when=fsh.at(1)), HOOK,
                       ("The name is taken", "hooks.remove()"), A),
    "float_step": Case(by_hook(step=1.0), STEP, ("a Python int of at least 0", "1.0 (float)", "step += 1")),
    "traced_state": Case(lambda: jax.jit(make_hooks(halve).__call__, static_argnums=0)(1, PLAIN), STATE,
                         ("is traced", "fsh.operate")),
    "without_step": Case(lambda: make_hooks(halve).fire("a", types.SimpleNamespace()), STATE, ("has no `step`",)),
    # The train state.
    "no_train_state": Case(lambda: fsh.operate({"w": 1}, halve), STATE,
                           ("params, opt_state, tx, replace missing", "Found: dict", "TrainState.create(")),
    "no_optimizer": Case(lambda: fsh.operate(PLAIN.replace(tx="adam"), halve), STATE, ("no optax", "Found: str")),
    "no_params": Case(lambda: fsh.operate(PLAIN.replace(params={}), halve), STATE, ("has no leaves", "Found: dict")),
    # The catalogue.
    "axis": Case(on_plain(ClipNorm(1.0, axis=2)), FUNCTION, ("not an axis of the leaf", "axis 2 for shape [2]"), W),
    "norm": Case(lambda: ClipNorm(1.0, norm="nuclear"), FUNCTION, ("ClipNorm(norm=...) is unknown", "'nuclear'")),
    "iterations": Case(lambda: ClipNorm(1.0, iterations=0), FUNCTION, ("must be a positive int", "Found: 0")),
    "no_matrix": Case(on_plain(ClipNorm(1.0, norm="spectral")), FUNCTION, ("two axes or more", "shape [2]"), W),
    "no_number": Case(lambda: Scale("2"), FUNCTION, ("Scale(factor=...) must be a finite number", "Found: '2'")),
    "not_positive": Case(lambda: Normalize(to=0), FUNCTION, ("Normalize(to=...) must be positive", "Found: 0")),
    "noise": Case(lambda: Noise(-1.0), FUNCTION, ("Noise(std=...) must be", "Found: -1.0")),
    "unassigned": Case(on_plain(Assign({"q": 1})), FUNCTION, ("no value for a selected leaf", "values for q"), W),
    "not_broadcast": Case(on_plain(Assign(jnp.ones(3))), FUNCTION, ("does not broadcast", "[3] for [2]"), W),
    "reinit_nothing": Case(Reinit, FUNCTION, ("either the model's `init` or", "Found: neither")),
    "reinit_elsewhere": Case(on_plain(Reinit(lambda key: {"params": PLAIN.params}), key=jax.random.key(0)), FUNCTION,
                             ("returned no such parameter", "params/w", 'model.init(key, batch)["params"]'), W),
    "reinit_shape": Case(on_plain(Reinit(lambda key: {"w": jnp.ones(3)}), key=jax.random.key(0)), FUNCTION,
                         ("parameter of another shape", "[3] for [2]"), W),
}  # fmt: skip


@functools.cache
def outcome(name):
    """The error of a case, and the lines of the library that it went through."""
    try:
        CASES[name].run()
    except e.SurgeryError as error:
        frames = traceback.extract_tb(error.__traceback__)
        return error, {(pathlib.Path(frame.filename), frame.lineno) for frame in frames}
    return None, set()


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    case, (error, _) = CASES[name], outcome(name)
    assert type(error) is case.error
    assert [part for part in case.says if part not in str(error)] == [], str(error)
    assert {field: getattr(error, field) for field in ("hook", "step", "path")} == {
        "hook": None, "step": None, "path": None, **case.fields}  # fmt: skip
    assert len(str(error)) < 1000


def raise_sites():
    for file in pathlib.Path(fsh.__file__).parent.rglob("*.py"):
        if file.stem not in ELSEWHERE and file.parent.name != "testing":  # laws raise AssertionError
            nodes = ast.walk(ast.parse(file.read_text()))
            yield from ((file, node.lineno) for node in nodes if isinstance(node, ast.Raise) and node.exc is not None)


def test_every_raise_has_a_case():
    reached = set().union(*(outcome(name)[1] for name in CASES))
    assert [f"{file.name}:{line}" for file, line in raise_sites() if (file, line) not in reached] == []
