"""Guards that are functions of figures, what becomes of fires that they refuse, and the callback of each fire."""

import dataclasses
import json
import logging as python_logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import Case, fail
from tiny import MOMENTUM, assert_bitwise_equal, events, halve, make_hooks, make_state, w_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks import errors as e
from flax_surgery_hooks.guards import FIGURES, Bounds, as_guard
from flax_surgery_hooks.metrics import Change, FireFigures
from flax_surgery_hooks.settling import Settler

CHANGE = "params/relative_change"


@dataclasses.dataclass(frozen=True)
class Below:
    """A guard of one's own class."""

    limit: float

    def __call__(self, figures):
        return figures[CHANGE] < self.limit


FORMS = {"function": lambda limit: lambda figures: figures[CHANGE] < limit, "text": lambda limit: f"{CHANGE} < {limit}",
         "class": Below}  # fmt: skip


def toward(target):
    """An edit whose relative change of (3, 4) and (0, 12), norm 13, is a pure function of the target."""

    def edit(leaves):
        return {path: leaf + target * jnp.array([0.6, 0.8]) for path, leaf in leaves.items()}

    return edit


PARAMS = {"v": jnp.array([3.0, 4.0]), "w": jnp.array([0.0, 12.0])}


def two_leaves(step=1):
    state = make_state(step, MOMENTUM, **PARAMS)
    return state.replace(opt_state=jax.tree.map(lambda leaf: leaf + 0.3, state.opt_state))


# The function.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "refused"), [(1.0, False), (4.0, True)])
def test_a_guard_decides_by_the_figures_of_the_whole_fire(form, size, refused):
    """Each leaf moves by `size`, so that the whole change is sqrt(2) size / 13: 0.109 or 0.435."""
    old = np.concatenate([PARAMS["v"], PARAMS["w"]]).astype(np.float64)
    change = np.linalg.norm(size * np.array([0.6, 0.8, 0.6, 0.8])) / np.linalg.norm(old)
    assert (change >= 0.4) == refused
    guard = FORMS[form](0.4)
    hooks = make_hooks(toward(size), params="**", options={"guard": guard}, on_error="skip")
    state = two_leaves()
    after = hooks(1, state)
    hooks.flush()
    record = hooks.ledger.records[-1]
    assert record.event == ("refused" if refused else "settled")
    assert record.figures[CHANGE] == pytest.approx(change, rel=1e-6)
    if refused:
        assert_bitwise_equal(after, state)
        assert json.loads(record.detail)["refused_by"] in (f"{CHANGE} < 0.4", "Below") or "lambda" in record.detail
        # `v` alone, which changes by 4 / 5, is refused by another limit: one verdict for all, of the sum of all.
        alone = make_hooks(toward(size), params="w", options={"guard": guard}, on_error="skip")
        assert w_of(alone(1, state)) != w_of(state)
    else:
        np.testing.assert_allclose(after.params["v"], [3.6, 4.8], rtol=1e-6)


def test_a_guard_is_asked_besides_finite():
    hooks = make_hooks(lambda w: w / 0, options={"guard": lambda figures: figures[CHANGE] == figures[CHANGE] + 1})
    state = make_state(1)
    assert_bitwise_equal(hooks(1, state), state)
    with pytest.raises(e.RefusedError, match="non-finite values"):
        hooks.flush()
    assert json.loads(hooks.ledger.records[-1].detail) == {"refused_by": "finite"}
    everything = make_hooks(lambda w: w / 0, options={"guard": lambda figures: True}, on_error="skip")
    assert_bitwise_equal(everything(1, state), state)


def test_a_guard_needs_no_figures_to_be_told():
    hooks = make_hooks(halve, fsh.at(1, 2), options={"figures": False, "guard": "params/norm_after > 0.5"})
    state = make_state(1)
    state = hooks(2, hooks(1, state).replace(step=2))  # sqrt(2) / 2, then sqrt(2) / 4
    assert w_of(state) == [0.5, 0.5]
    with pytest.raises(e.RefusedError) as caught:
        hooks.flush()
    assert caught.value.found == "params/norm_after 0.353553"
    settled, refused = hooks.ledger.records[-2:]
    assert (settled.event, settled.figures, settled.per_leaf) == ("settled", {}, None)
    assert (refused.event, refused.figures["params/norm_after"]) == ("refused", pytest.approx(8**-0.5))


def test_the_message_says_which_guard_and_which_figures():
    hooks = make_hooks(halve, options={"guard": f"{CHANGE} < 0.4 and slots/norm_after >= 0"})
    hooks(1, make_state(1))
    with pytest.raises(e.RefusedError) as caught:
        hooks.flush()
    assert caught.value.problem == (
        f"The fire was refused by its guard {CHANGE} < 0.4 and slots/norm_after >= 0.0; the state kept its old values."
    )
    assert caught.value.found == f"{CHANGE} 0.5, slots/norm_after 0"
    assert (caught.value.hook, caught.value.step, caught.value.path) == ("a", 1, "w")


def test_the_figures_are_those_of_fires():
    figures = jax.eval_shape(lambda: FireFigures.of(Change.empty(), Change.empty()).compute_flat())
    assert sorted(figures) == sorted(FIGURES)


def test_operate_takes_guards_on_values_and_traced():
    state = two_leaves()
    with pytest.raises(e.RefusedError, match=r"by its guard Below; .*Found: params/relative_change 0\.5\."):
        fsh.operate(state, halve, guard=Below(0.4))

    def traced(state, limit):
        return fsh.operate(state, halve, guard=f"{CHANGE} < {limit}")[0]

    after = jax.jit(traced, static_argnums=1)(state, 0.4)
    assert_bitwise_equal((after.params, after.opt_state), (state.params, state.opt_state))
    assert w_of(jax.jit(traced, static_argnums=1)(state, 0.6)) == [0, 6]


def test_the_guard_is_the_same_in_graph():
    """Relative changes of 0.1 step: the limit lies between those of steps 4 and 5."""

    def grow(w, step):
        return w + 0.1 * step * w

    def make():
        hooks = make_hooks(grow, fsh.every(1), options={"guard": lambda figures: figures[CHANGE] < 0.45},
                           on_error="skip")  # fmt: skip
        hooks.add("b", halve, params="w", when=fsh.every(2), guard="params/norm_before > 1", figures=False)
        return hooks

    hooks, here = make(), make()
    before = hooks.init(make_state(jnp.int32(0), MOMENTUM))
    step = jax.jit(lambda state: hooks.in_graph(state.replace(step=state.step + 1)))
    after = before
    for _ in range(7):
        after = step(after)
    hooks.collect(after)
    state = make_state(0, MOMENTUM)
    for number in range(1, 8):
        state = here(number, state.replace(step=number))
    here.flush()
    assert_bitwise_equal(after.params, state.params)
    told = [[(r.event, r.hook, r.step, r.detail, sorted(r.figures)) for r in one.ledger.records
             if r.event in ("settled", "refused")] for one in (hooks, here)]  # fmt: skip
    assert sorted(told[0]) == sorted(told[1])
    assert [r.step for r in hooks.ledger.records if (r.event, r.hook) == ("refused", "a")] == [5, 6, 7]
    assert {r.event for r in hooks.ledger.records if r.hook == "b"} >= {"settled"}


def test_the_verdict_of_a_scan_is_told_as_it_was_given():
    """A limit at the very figure: whichever way it rounds there, the record says what was done."""
    limit = float(np.float32(0.1))
    hooks = make_hooks(lambda w: w * 0.9, fsh.every(1), options={"guard": f"{CHANGE} < {limit!r}"}, on_error="skip")
    state = hooks.init(make_state(jnp.int32(0), w=jnp.linspace(0.1, 3.3, 7)))

    def step(state, _):
        state = hooks.in_graph(state.replace(step=state.step + 1))
        return state, state.params["w"]

    after, seen = jax.jit(lambda state: jax.lax.scan(step, state, length=6))(state)
    changed = np.abs(np.diff(np.concatenate([np.asarray(state.params["w"])[None], seen]), axis=0)).max(1) > 0
    told = [record.event == "settled" for record in hooks.collect(after)]
    assert told == changed.tolist()


def test_a_refused_growth_by_a_guard_leaves_the_shapes():
    hooks = make_hooks(lambda w: jnp.tile(w, 2), options={"guard": "params/elements < 4", "apply_fn": fail},
                       on_error="skip")  # fmt: skip
    state = make_state(1, MOMENTUM)
    assert_bitwise_equal(hooks(1, state).params, state.params)
    hooks.flush()
    assert hooks.ledger.records[-1].event == "refused"


# In configs.


@pytest.mark.parametrize(
    "text",
    ["finite", "off", f"{CHANGE} < 0.5", "params/sparsity<=.9 and slots/norm_after>1e-3", "slots/nonfinite >= 0"],
)
def test_guards_come_back_from_a_config(text):
    config = {"a": fsh.config.hook("scale", factor=0.5, params="w", every=3, guard=text)}
    hooks = fsh.SurgeryHooks.from_config(config)
    again = fsh.SurgeryHooks.from_config(json.loads(hooks.to_config().to_json_best_effort()))
    assert hooks._hooks["a"].operation.guard == again._hooks["a"].operation.guard == as_guard(text)
    assert again.to_config().to_dict() == hooks.to_config().to_dict()
    assert hash(as_guard(text)) == hash(as_guard(text))
    assert hooks.hparams()["surgery/a/guard"] == str(as_guard(text))
    different = as_guard(f"{CHANGE} <= 0.5")
    assert different != as_guard(f"{CHANGE} < 0.5")


def test_what_a_hook_says_of_refusals_comes_back_from_a_config():
    config = {"a": fsh.config.hook("scale", factor=0.5, params="w", every=3, on_error="retry_next", rollback_steps=9,
                                   rollback_metric="loss", rollback_above=5)}  # fmt: skip
    hooks = fsh.SurgeryHooks.from_config(config)
    again = fsh.SurgeryHooks.from_config(hooks.to_config())
    for one in (hooks, again):
        held = one._hooks["a"]
        assert (held.on_error, held.rollback) == ("retry_next", fsh.Rollback(9, metric="loss", above=5.0))
    assert hooks.hparams()["surgery/a/rollback"].startswith("Rollback(steps=9, metric='loss', above=5.0")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guard": "params/sparsty < 1"}, "guard: A guard looks at a figure that fires do not have."),
        ({"guard": "params/sparsity < x"}, "guard: A guard compares figures with finite numbers"),
        ({"on_error": "retry"}, "on_error: Unknown on_error=. Found: 'retry'."),
        ({"rollback_above": 3}, "rollback_above: needs `rollback_steps` beside it, which is not set; found 3"),
        ({"rollback_steps": 0}, "rollback_steps: `steps` of `Rollback` is a number of steps"),
        ({"rollback_steps": "x"}, "rollback_steps: wants int, found 'x' (str)"),
    ],
)
def test_what_is_wrong_in_a_config(fields, expected):
    with pytest.raises(e.ConfigError) as caught:
        fsh.SurgeryHooks.from_config({"a": {"surgery": "scale", "factor": 2.0, "params": "w", "every": 3, **fields}})
    [problem] = caught.value.problems
    assert problem.startswith(f"surgery.a.{expected}")


def test_no_config_holds_a_function():
    hooks = make_hooks(fsh.surgeries.Scale(2.0), options={"guard": Below(0.5)})
    with pytest.raises(e.ConfigError, match="guard: is a function, which no config can hold"):
        hooks.to_config()


# Errors.


def adding(guard):
    return lambda: make_hooks(halve, options={"guard": guard})


CASES = {
    "unknown": Case(adding("finit"), e.RuleError, ("Unknown guard", "Found: 'finit'", "finite, off", "< 0.5")),
    "number": Case(adding(0.5), e.RuleError, ("Unknown guard", "Found: 0.5")),
    "expression": Case(adding("params/sparsity < 1 or 2 > 1"), e.RuleError, ("joined by `and`", "or 2 > 1'")),
    "infinite": Case(adding("params/sparsity < inf"), e.RuleError, ("finite numbers", 'guard="params/')),
    "figure": Case(adding("params/sparsty < 1"), e.RuleError, ("fires do not have", "'params/sparsity'")),
    "figure_read": Case(adding(lambda figures: figures["loss"] < 1), e.RuleError, ("fires do not have", "'loss'")),
    "raises": Case(adding(fail), e.UserCodeError, ("The guard fail raised ValueError: no luck", "traced figures")),
    "python_and": Case(adding(lambda f: f[CHANGE] < 1 and f["params/sparsity"] < 1), e.UserCodeError,
                       ("raised TracerBoolConversionError", "`&` in place of `and`")),
    "no_boolean": Case(adding(lambda f: f[CHANGE]), e.RuleError, ("must return one boolean", "float32[]")),
    "no_scalar": Case(adding(lambda f: jnp.ones(2) < f[CHANGE]), e.RuleError, ("one boolean", "bool[2]")),
    "nothing": Case(adding(lambda f: None), e.RuleError, ("one boolean", "Found: NoneType None")),
    "unhashable": Case(adding(dataclasses.make_dataclass("Loose", [], namespace={"__call__": lambda self, f: True})()),
                       e.RuleError, ("cannot be hashed", "Found: Loose", "frozen=True")),
    "optimizer": Case(lambda: make_hooks(fsh.surgeries.SetHyperparams({"lr": 1.0}), options={"guard": Below(1)}),
                      e.RuleError, ("edits the optimizer as a whole", "guard=Below", "no guard=")),
    "on_error": Case(lambda: make_hooks(halve, options={"on_error": "retry"}), e.HookError,
                     ("Unknown on_error=", "Found: 'retry'", "raise, skip, retry_next")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    with pytest.raises(e.SurgeryError) as caught:
        CASES[name].run()
    assert type(caught.value) is CASES[name].error
    assert [part for part in CASES[name].says if part not in str(caught.value)] == [], str(caught.value)
    assert caught.value.hook == "a"
    assert len(str(caught.value)) < 1000


def test_bounds_are_and_of_comparisons():
    signs = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    for sign, oracle in signs.items():
        bounds = Bounds.parse(f"params/changed {sign} 2 and params/fresh >= 0")
        for value in (1.0, 2.0, 3.0, float("nan")):
            assert bool(bounds({"params/changed": value, "params/fresh": 0.0})) == bool(oracle(value, 2.0))
            assert not bounds({"params/changed": value, "params/fresh": -1.0})


# Refused fires again.


def until(number):
    """Doubles, but is not finite before a step."""
    return lambda w, step: jnp.where(step < number, jnp.inf, w * 2)


def run(hooks, steps, state=None, flush_at=()):
    state = make_state(0) if state is None else state
    for step in steps:
        state = hooks(step, state.replace(step=step))
        if step in flush_at:
            hooks.flush()
    return state


def retried(first, settle_after, number, steps):
    """When a hook fires that is due at `first` and passes from `number` on: brute force."""
    fires, due = [], first
    for step in steps:
        if due is not None and step >= due:
            fires.append(step)
            due = None if step >= number else step + max(settle_after, 1)
    return fires


@pytest.mark.parametrize("flush_at", [(), (3, 4), (2, 3, 5, 8)])
@pytest.mark.parametrize("steps", [range(1, 20), range(1, 20, 3)])
@pytest.mark.parametrize("settle_after", [0, 1, 3])
def test_a_refused_fire_is_repeated_until_it_passes(settle_after, steps, flush_at):
    hooks = make_hooks(until(9), fsh.at(2), options={}, on_error="retry_next", settle_after=settle_after)
    state = run(hooks, steps, flush_at=flush_at)
    hooks.flush()
    expected = retried(2, settle_after, 9, steps)
    fired = [record for record in hooks.ledger.records if record.event == "fired"]
    assert [record.step for record in fired] == expected
    assert len(expected) > 2
    assert [json.loads(r.detail or "{}").get("retry_of") for r in fired] == [None, *range(len(fired) - 1)]
    assert [r.event for r in hooks.ledger.records if r.event in ("refused", "settled")] == [
        *["refused"] * (len(fired) - 1), "settled"]  # fmt: skip
    assert w_of(state) == [2, 2]


def test_only_the_last_fire_is_repeated():
    """Due at 2, 4, 6 and 8, read 3 steps later: each of them is followed by one that is due anyway, but the last."""
    hooks = make_hooks(until(10), fsh.every(2, stop=8), options={}, on_error="retry_next", settle_after=3)
    run(hooks, range(1, 20))
    assert [r.step for r in hooks.ledger.records if r.event == "fired"] == [2, 4, 6, 8, 11]


def test_a_retry_draws_with_the_key_of_its_own_step():
    def draw(w, key, step):
        return jnp.where(step < 4, jnp.inf, jax.random.uniform(key, w.shape))

    again = run(make_hooks(draw, fsh.at(2), options={}, on_error="retry_next", settle_after=2), range(1, 6))
    at_4 = run(make_hooks(draw, fsh.at(4), options={}), range(1, 6))
    assert w_of(again) == w_of(at_4)


def test_a_hook_says_itself_what_becomes_of_its_refusals():
    hooks = make_hooks(lambda w: w / 0, fsh.at(1), options={"on_error": "skip"}, settle_after=1)
    hooks.add("b", until(3), params="w", when=fsh.at(1), on_error="retry_next")
    hooks.add("c", lambda w: w / 0, params="w", when=fsh.at(6))
    state = run(hooks, range(1, 7))
    with pytest.raises(e.RefusedError) as caught:
        run(hooks, (7,), state)
    assert caught.value.hook == "c"
    assert [(hook, step) for _, hook, step in events(hooks, "fired")] == [
        ("a", 1),
        ("b", 1),
        ("b", 2),
        ("b", 3),
        ("c", 6),
    ]


def test_what_failed_with_a_retry_is_tried_again():
    broken = [True]

    def fragile(w, mode="fine"):
        if mode == "broken" and broken[0]:
            raise ValueError
        return w

    hooks = make_hooks(until(3), fsh.at(1), options={}, on_error="retry_next", settle_after=2)
    hooks.add("b", fragile, params="w", when=fsh.at(3))
    state = run(hooks, (1, 2)).replace(step=3)
    with pytest.raises(e.UserCodeError):
        hooks(3, state, mode="broken")
    broken[0] = False
    assert w_of(hooks(3, state, mode="broken")) == [2, 2]


def test_what_is_to_be_repeated_is_saved():
    def make():
        return make_hooks(until(7), fsh.at(2), options={}, on_error="retry_next", settle_after=3)

    whole, first, second = make(), make(), make()
    state = run(first, range(1, 4))
    first.flush()
    saved = json.loads(json.dumps(first._settler.to_json()))
    assert saved == {"next_id": 1, "retries": {"a": [0, 5]}}
    second._settler.from_json(saved)
    second._begin(3)
    second._unchecked.clear()
    after = run(second, range(4, 15), state)
    assert_bitwise_equal(after, run(whole, range(1, 15)))
    fired = [[(r.id, r.step, r.detail) for r in hooks.ledger.records if r.event == "fired"] for hooks in
             (first, second, whole)]  # fmt: skip
    assert fired[0] + fired[1] == fired[2]
    for wrong in (None, {}, {"next_id": 1, "retries": {"a": 3}}):
        with pytest.raises(e.StateError, match="not what was saved of the fires that wait"):
            Settler(fsh.Ledger(), None, "skip", 4).from_json(wrong)


def test_fires_in_graph_are_not_repeated_and_that_is_logged(caplog):
    hooks = make_hooks(until(5), fsh.at(2), options={}, on_error="retry_next", settle_after=1)
    state = hooks.init(make_state(jnp.int32(0)))
    step = jax.jit(hooks.in_graph)
    with caplog.at_level(python_logging.WARNING):
        for number in range(1, 9):
            state = hooks(number, step(state.replace(step=jnp.int32(number))))
    assert events(hooks, "fired", "refused") == [("fired", "a", 2), ("refused", "a", 2)]
    assert "it fired in graph, where fires are not repeated" in caplog.text


def test_a_removed_hook_is_not_repeated():
    hooks = make_hooks(until(9), fsh.at(1), options={}, on_error="retry_next", settle_after=2)
    state = run(hooks, (1, 2))
    hooks.flush()
    hooks.remove("a")
    hooks.add("b", halve, params="w", when=fsh.at(5))
    run(hooks, range(3, 7), state)
    assert [(hook, step) for _, hook, step in events(hooks, "fired")] == [("a", 1), ("b", 5)]


# The callback of each fire.


def test_on_fire_is_called_after_each_fire_and_may_give_another_state():
    seen = []

    def on_fire(record, state):
        seen.append((record.hook, record.step, w_of(state)))
        return state.replace(params={"w": state.params["w"] + 1}) if record.hook == "b" else None

    hooks = make_hooks(halve, fsh.at(1, 3), on_fire=on_fire)
    hooks.add("b", lambda w: w * 4, params="w", when=fsh.at(1), priority=1)
    state = run(hooks, (1, 2, 3))
    assert seen == [("b", 1, [4, 4]), ("a", 1, [2.5, 2.5]), ("a", 3, [1.25, 1.25])]
    hooks.preview("a", state)
    assert len(seen) == 3
    assert w_of(hooks.fire("a", state)) == [0.625, 0.625]
    assert len(seen) == 4


def test_on_fire_is_not_called_where_a_growth_was_refused():
    seen = []
    hooks = make_hooks(lambda w: jnp.tile(w, 2) / 0, options={"apply_fn": fail}, on_error="skip",
                       on_fire=lambda record, state: seen.append(record))  # fmt: skip
    hooks(1, make_state(1))
    assert seen == []


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (fail, e.UserCodeError, "on_fire raised ValueError: no luck"),
        (lambda record, state: 3, e.StructureError, "on_fire returned something that is no train state. Found: int"),
    ],
)
def test_when_on_fire_fails_the_old_state_is_whole_and_nothing_is_recorded(function, error, says):
    hooks = make_hooks(halve, fsh.at(2), on_fire=function)
    state = run(hooks, (1,)).replace(step=2)
    recorded = list(hooks.ledger.records)
    with pytest.raises(error, match=says) as caught:
        hooks(2, state)
    assert (caught.value.hook, caught.value.step) == ("a", 2)
    assert (w_of(state), hooks.ledger.records) == ([1, 1], recorded)
