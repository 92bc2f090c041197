"""What fuzzing found: inputs that once escaped as another exception, hung, or made a message that cannot be shown."""

import numpy as np
from ml_collections import FieldReference
from raised import Case
from tiny import halve, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.surgeries import Noise, ResetMoments, Scale, SetHyperparams

LONG = 10**5000
"""Python refuses to print it."""
BEYOND = 10**400
"""No float can stand for it."""
NAN, INF = float("nan"), float("inf")
STATE = make_state(1)
HOOK = {"surgery": "scale", "params": "**", "factor": 0.5, "every": 2}


def adding(surgery=halve, **options):
    return lambda: make_hooks(surgery, options={"figures": False, **options})


def reading(**fields):
    return lambda: fsh.SurgeryHooks.from_config({"a": {**HOOK, **fields}})


def calling(*steps, state=STATE, when=None, inputs=None, **kwargs):
    """Calls of one hook at these steps."""

    def run():
        hooks = make_hooks(halve, when or fsh.every(1), **kwargs)
        for step in steps:
            hooks(step, state, **(inputs or {}))

    return run


def deleted():
    state = make_state(1)
    state.params["w"].delete()
    return state


def resuming(**saved):
    """Goes on from what other hooks have saved, with something else in it."""

    def run():
        hooks = make_hooks(halve, fsh.on_metric("x", above=1))
        hooks.load_state_dict({**hooks.state_dict(), **saved})

    return run


ANY = {"hook": "a"}
RESUME = "nothing that `state_dict` has returned"
CASES = {
    # What stands in messages.
    "long_key": Case(reading(**{"x" * 5000: 1}), e.ConfigError, ("unknown key", "xxx...xxx")),
    "long_int": Case(reading(params=LONG), e.ConfigError, ("surgery.a.params: wants", "<int that cannot be shown>")),
    "long_step": Case(calling(-LONG), e.StepError, ("of at least 0", "<int that cannot be shown> (int)")),
    "long_mode": Case(lambda: fsh.on_metric("loss", plateau=0.1, patience=1, mode=LONG), e.ScheduleError,
                      ("`mode` of `on_metric`", "mode=<int that cannot be shown> with plateau")),
    "long_rule": Case(adding(opt_state=LONG), e.RuleError, ("Unknown opt_state rule", "cannot be shown"), ANY),
    "long_rule_beside": Case(adding(ResetMoments(), opt_state=LONG), e.RuleError,
                             ("says itself", "opt_state=<int that cannot be shown>"), ANY),
    "long_name": Case(lambda: make_hooks(halve).remove(LONG), e.HookError, ("no hook of this name", "hooks a"),
                      {"hook": "<int that cannot be shown>"}),
    "unhashable_name": Case(lambda: make_hooks(halve).fire([], STATE), e.HookError, ("no hook of this name",),
                            {"hook": "[]"}),
    # Numbers beyond all use.
    "float_of_a_field": Case(reading(factor=BEYOND), e.ConfigError, ("surgery.a.factor: wants float, found 1000",)),
    "due_step": Case(reading(at=(LONG,)), e.ConfigError, ("larger than any run", "<int that cannot be shown>")),
    "fires_of_a_union": Case(lambda: (fsh.at(5) | fsh.every(10)).max_fires(10**9), e.ScheduleError,
                             ("walks over the due steps", "1000000000 of at(5) | every(10)", "max_fires=1000000")),
    "epochs": Case(lambda: fsh.at_epochs(BEYOND, steps_per_epoch=2), e.ScheduleError, ("must be a finite number",)),
    "above": Case(lambda: fsh.on_metric("loss", above=BEYOND), e.ScheduleError, ("must be a finite number",)),
    "factor": Case(lambda: Scale(BEYOND), e.SurgeryFunctionError, ("must be a finite number",)),
    "std": Case(lambda: Noise(BEYOND), e.SurgeryFunctionError, ("must be a finite number",)),
    "hyperparameter": Case(lambda: SetHyperparams({"lr": BEYOND}), e.SurgeryFunctionError, ("finite number for 'lr'",)),
    "seed": Case(lambda: fsh.SurgeryHooks(seed=2**63), e.HookError,
                 ("seed=...) is a Python int", "Found: 9223372036854775808", "64 bits")),
    "priority": Case(adding(priority=2**63), e.HookError, ("`priority=` is a Python int", "64 bits"), ANY),
    "agree_secs": Case(lambda: fsh.SurgeryHooks(agree_secs=BEYOND), e.HookError, ("agree_secs= is a time",)),
    "metric": Case(calling(1, 2, 3, when=fsh.on_metric("x", above=1, lag=0), inputs={"metrics": {"x": BEYOND}}),
                   e.InputError, ("'metrics/x' is too large for a number", "int 1000", "the metric or count itself"),
                   {"hook": "a", "step": 1}),
    "count": Case(calling(1, 2, 3, when=fsh.every_count(9, of="n"), inputs={"n": LONG}), e.InputError,
                  ("'n' is too large for a number", "cannot be shown"), {"hook": "a", "step": 1}),
    # Steps that are none.
    "fire_beyond_int32": Case(calling(2**31, state=make_state(None)), e.StepError,
                              ("told its step as an int32", "Found: 2147483648", "stop=2**31 - 1"),
                              {"hook": "a", "step": 2**31}),
    "tokens_as_steps": Case(calling(1, 805_079_009_068), e.StepError,
                            ("jumps over more than 100000 due steps", "step 805079009068 after 1", "state.step"), ANY),
    # Values of other types.
    "on_record": Case(lambda: fsh.SurgeryHooks(on_record="print"), e.LedgerError,
                      ("on_record= is a function of a record", "Found: 'print'", "on_record=print")),
    "on_record_raises": Case(lambda: fsh.Ledger(on_record=lambda record: 1 // 0).write(fsh.Record(hook="a", step=3)),
                             e.UserCodeError, ("on_record raised ZeroDivisionError", "is not done"),
                             {"hook": "a", "step": 3}),
    "ledger": Case(lambda: fsh.SurgeryHooks(ledger=3), e.LedgerError, ("the path of a file", "Found: 3")),
    "read": Case(lambda: fsh.Ledger.read(3), e.LedgerError, ("the path of a file", "Found: 3")),
    "zero_byte": Case(lambda: fsh.Ledger.read("a\0"), e.LedgerError, ("cannot be read", "null byte"), {"path": "a\0"}),
    "write_zero_byte": Case(lambda: fsh.Ledger("a\0").write(fsh.Record()), e.LedgerError,
                            ("cannot be written", "null byte"), {"path": "a\0"}),
    "writer": Case(lambda: fsh.SurgeryHooks(writer=3), e.HookError,
                   ("no CLU metric writer", "Found: int without write_hparams", "create_default_writer")),
    "on_error": Case(lambda: fsh.SurgeryHooks(on_error=np.ones(2)), e.HookError,
                     ("Unknown on_error=", "[1., 1.]")),
    "donate": Case(lambda: fsh.SurgeryHooks(donate=np.ones(2)), e.HookError, ("Unknown donate=", "array([1., 1.])")),
    "mode": Case(lambda: fsh.on_metric("loss", plateau=0.1, patience=1, mode=np.ones(2)), e.ScheduleError,
                 ("`mode` of",)),
    "fields": Case(adding(fields="batch_stats"), e.HookError,
                   ("lists fields of the train state", "Found: 'batch_stats'", '("batch_stats",)'), ANY),
    "fields_of": Case(adding(fields=([],)), e.HookError, ("lists fields of the train state", "Found: ([],)"), ANY),
    "deleted": Case(calling(1, state=deleted()), e.StateError,
                    ("Arrays of the state are deleted", "1 such arrays, the first ArrayImpl float32[2]")),
    "repetition": Case(lambda: fsh.select("re:a{99999999999}"), e.SelectionError,
                       ("Not a regular expression: the repetition number is too large",)),
    "nesting": Case(lambda: fsh.select("re:" + "(" * 5000 + ")" * 5000), e.SelectionError,
                    ("Not a regular expression: maximum recursion depth exceeded",)),
    "figure": Case(lambda: fsh.Record.from_json(f'{{"event": "fired", "figures": {{"a": {BEYOND}}}}}'), e.LedgerError,
                   ("field 'figures' is not what is written there", "1000")),
    # What hooks have saved, damaged.
    "no_next_id": Case(resuming(settling={}), e.ResumeError, (RESUME, "Found: settling of another type")),
    "next_id": Case(resuming(settling={"next_id": None}), e.ResumeError, (RESUME, "Found: settling of another type")),
    "watched": Case(resuming(watching={"a": None}), e.ResumeError, (RESUME, "Found: watching of another type")),
    "watched_one": Case(resuming(watching={"a": [None]}), e.ResumeError, (RESUME, "Found: watching of another type")),
    "watched_when": Case(
        resuming(watching={"a": [{"schedule": "on_metric('x', above=1.0)", "state": {}, "waiting": [[NAN, 1, 2.0]]}]}),
        e.ScheduleError, ("This is not what was saved of on_metric('x', above=1.0)",), ANY),
    "watched_then": Case(
        resuming(watching={"a": [{"schedule": "on_metric('x', above=1.0)", "state": {}, "waiting": [[INF, 1, 2.0]]}]}),
        e.ScheduleError, ("This is not what was saved of on_metric('x', above=1.0)",), ANY),
    # Configs as `fsh.config.hook` writes them.
    "mapping_for_tuple": Case(lambda: fsh.config.hook("scale", factor=1, params="**", at={}), e.ConfigError,
                              (".at: wants tuple[int, ...], found {} (dict)",)),
    "failing_reference": Case(lambda: fsh.config.hook("scale", factor=FieldReference(1) // FieldReference(0)),
                              e.ConfigError, (".factor: has no value: ZeroDivisionError",)),
}  # fmt: skip
