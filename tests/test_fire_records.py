"""What becomes of a fire: the guard's verdict, its records and metrics, and that a failure leaves everything whole."""

import json

import event_files
import jax
import jax.numpy as jnp
import optax
import pytest
from tiny import MOMENTUM, QUICK, assert_bitwise_equal, events, halve, make_hooks, make_state, w_of

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import LedgerError, MixingError, RefusedError, UserCodeError
from flax_surgery_hooks.writers import EventFileWriter

NAN = float("nan")


# The guard.


def spoil(leaves):
    """Not finite in one of the leaves, or in none."""
    return {path: leaf * 2 if path == "v" else jnp.where(leaf > 5, NAN, leaf * 2) for path, leaf in leaves.items()}


def spoil_one(leaf):
    return jnp.where(leaf > 5, jnp.inf, leaf * 2)


@pytest.mark.parametrize("surgery", [spoil, spoil_one])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_refused_fire_keeps_all_leaves_bitwise(surgery, on_error):
    good = make_state(1, MOMENTUM, v=jnp.arange(3.0), w=jnp.arange(4.0))
    good = good.replace(opt_state=jax.tree.map(lambda x: x + 0.3, good.opt_state))
    bad = good.replace(step=2, params={"v": good.params["v"] / 3, "w": jnp.array([1.0, 2, 9, 0.1])})
    hooks = make_hooks(surgery, params="**", options={}, on_error=on_error, settle_after=1)
    assert hooks(1, good).params["v"].tolist() == [0, 2, 4]
    after = hooks(2, bad)
    assert_bitwise_equal(after, bad)
    assert [e for e, _, _ in events(hooks)] == ["fired", "settled", "fired"]
    if on_error == "raise":
        with pytest.raises(RefusedError, match="The fire was refused") as caught:
            hooks(3, after)
        assert (caught.value.hook, caught.value.step, caught.value.path) == ("a", 2, "v, w")
        assert caught.value.found == "1 in params, 0 in slots"
    hooks(3, good)  # after the error as before it, the loop goes on
    record = [r for r in hooks.ledger.records if r.event == "refused"]
    assert [(r.step, r.id, r.figures["params/nonfinite"]) for r in record] == [(2, 1, 1)]


def test_the_guard_looks_at_slots_too():
    def explode(slot, *, kind, path, old, new, key):
        return slot / 0

    hooks = make_hooks(halve, options={"opt_state": explode}, on_error="skip")
    state = make_state(1, MOMENTUM)
    assert_bitwise_equal(hooks(1, state), state)
    hooks.flush()
    assert hooks.ledger.records[-1].figures["slots/nonfinite"] == 2


def test_values_that_were_not_finite_before_are_no_reason_to_refuse():
    hooks = make_hooks(halve, options={})
    assert w_of(hooks(1, make_state(1, w=jnp.array([jnp.inf, 4.0])))) == [float("inf"), 2]
    hooks.flush()
    assert hooks.ledger.records[-1].event == "settled"


def test_without_guard_the_result_is_applied():
    hooks = make_hooks(lambda w: w / 0, options={"guard": "off"})
    assert w_of(hooks(1, make_state(1))) == [float("inf")] * 2
    hooks.flush()
    assert hooks.ledger.records[-1].figures["params/nonfinite"] == 2


def test_a_refusal_without_figures():
    hooks = make_hooks(lambda w: w / 0, options={"figures": False})
    state = make_state(1)
    assert w_of(hooks(1, state)) == [1, 1]
    with pytest.raises(RefusedError) as caught:
        hooks.flush()
    assert caught.value.found is None
    assert hooks.ledger.records[-1].figures == {}


# Records, and when they are written.


@pytest.mark.parametrize("settle_after", [0, 1, 3])
def test_figures_settle_some_steps_later(settle_after):
    hooks = make_hooks(halve, fsh.at(2) | fsh.at(3), options={}, settle_after=settle_after)
    state, settled_at = make_state(1), {}
    for step in range(1, 9):
        state = hooks(step, state)
        for record in hooks.ledger.records:
            if record.event == "settled":
                settled_at.setdefault(record.step, step)
    assert settled_at == {at: max(at + settle_after, at + 1) for at in (2, 3)}
    fired = [r for r in hooks.ledger.records if r.event == "fired"]
    settled = [r for r in hooks.ledger.records if r.event == "settled"]
    assert [r.id for r in fired] == [r.id for r in settled] == [0, 1]
    assert all(r.figures == {} for r in fired)
    assert [r.figures["params/norm_after"] for r in settled] == pytest.approx([2**-0.5, 2**-1.5])


def test_flush_settles_at_once_and_flushes_the_writer(tmp_path):
    hooks = make_hooks(halve, options={}, writer=EventFileWriter(tmp_path))
    hooks(1, make_state(1))
    assert events(hooks) == [("fired", "a", 1)]
    hooks.flush()
    assert events(hooks) == [("fired", "a", 1), ("settled", "a", 1)]
    # Not closed: what can be read now was flushed.
    assert event_files.read_scalars(tmp_path)["surgery/a/params/changed"] == [(1, 2.0)]
    hooks.flush()
    assert len(events(hooks)) == 2


def test_scalars_reach_an_event_file(tmp_path):
    writer = EventFileWriter(tmp_path)
    hooks = make_hooks(lambda w: jnp.where(w < 0.3, jnp.nan, w / 2), options={}, writer=writer, on_error="skip")
    state = make_state(1, MOMENTUM, w=jnp.array([3.0, 4.0]))
    for step in (1, 2):
        state = hooks(step, state)
    hooks(9, state.replace(params={"w": jnp.zeros(2)}))
    hooks.flush()
    writer.close()
    scalars = event_files.read_scalars(tmp_path)
    assert scalars["surgery/a/params/norm_before"] == [(1, 5.0), (2, 2.5), (9, 0.0)]
    assert scalars["surgery/a/params/relative_change"][:2] == [(1, 0.5), (2, 0.5)]
    assert scalars["surgery/a/slots/elements"] == [(1, 2), (2, 2), (9, 2)]
    assert scalars["surgery/a/refused"] == [(1, 0), (2, 0), (9, 1)]
    assert {tag.rsplit("/", 1)[0] for tag in scalars} == {"surgery/a", "surgery/a/params", "surgery/a/slots"}


def test_figures_can_be_left_out(tmp_path):
    writer = EventFileWriter(tmp_path)
    hooks = make_hooks(halve, options={"figures": False}, writer=writer)
    assert w_of(hooks(1, make_state(1))) == [0.5, 0.5]
    hooks.flush()
    writer.close()
    assert hooks.ledger.records[-1].event == "settled"
    assert hooks.ledger.records[-1].figures == {}
    assert event_files.read_scalars(tmp_path) == {}
    assert hooks.preview("a", make_state(1)).figures == {}


def test_the_ledger_file_holds_every_record_as_it_is_written(tmp_path):
    seen = []
    path = tmp_path / "below" / "ledger.jsonl"
    hooks = make_hooks(fsh.surgeries.Scale(0.5), options={}, ledger=path, on_record=lambda r: seen.append(r.event))
    state = hooks(1, make_state(1))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == seen == ["run", "fired"]
    assert lines[0]["detail"]["seed"] == 0
    assert lines[0]["detail"]["versions"]["jax"] == jax.__version__
    fired = {k: lines[1][k] for k in ("step", "hook", "id", "surgery", "rule", "paths", "leaves")}
    assert fired == {"step": 1, "hook": "a", "id": 0, "surgery": {"name": "Scale", "factor": 0.5}, "rule": "carry",
                     "paths": ["w"], "leaves": [{"shape": [2], "dtype": "float32"}]}  # fmt: skip
    hooks(2, state)
    hooks.flush()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line.get("id")) for line in lines[2:]] == [
        ("fired", 1), ("settled", 0), ("settled", 1)]  # fmt: skip
    assert lines[-1]["figures"]["params/relative_change"] == 0.5
    path.unlink()
    path.mkdir()  # as good a reason as any that it cannot be written
    with pytest.raises(LedgerError, match="The ledger cannot be written"):
        hooks(3, state)
    assert hooks.ledger.records[-1].event == "settled"  # the call can be made again, and leaves no record twice


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), NAN])
def test_surgeries_with_fields_that_json_does_not_have_are_recorded(value, tmp_path):
    hooks = make_hooks(fsh.surgeries.Assign(value), ledger=tmp_path / "ledger.jsonl")
    hooks(1, make_state(1))
    line = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])
    assert line["surgery"] == {"name": "Assign", "value": str(value)}


# Failures.


def test_a_failing_surgery_leaves_the_state_whole_and_can_be_retried():
    broken = [True]

    def edit(w, mode="fine"):
        if mode == "broken" and broken[0]:
            raise ValueError("no luck")
        return w * 2

    hooks = make_hooks(edit, fsh.at(2))
    state = hooks(1, make_state(1))
    with pytest.raises(UserCodeError, match="raised ValueError: no luck") as caught:
        hooks(2, state, mode="broken")
    assert (caught.value.hook, caught.value.step, caught.value.path) == ("a", 2, "w")
    assert isinstance(caught.value.__cause__, ValueError)
    assert w_of(state) == [1, 1]
    assert events(hooks) == []
    broken[0] = False
    assert w_of(hooks(2, state, mode="broken")) == [2, 2]
    assert events(hooks) == [("fired", "a", 2)]


def test_when_the_second_of_two_hooks_fails_nothing_happened():
    broken = [True]

    def fail(w, mode="fine"):
        if mode == "broken" and broken[0]:
            raise ValueError
        return w

    def draw(w, key):
        return jax.random.uniform(key, w.shape)

    hooks = make_hooks(draw, name="first")
    hooks.add("second", fail, params="w", when=fsh.every(1), **QUICK)
    state = hooks(1, make_state(1))
    recorded = list(hooks.ledger.records)
    with pytest.raises(UserCodeError):
        hooks(2, state, mode="broken")
    assert hooks.ledger.records == recorded
    broken[0] = False
    retried = hooks(2, state, mode="broken")
    assert w_of(retried) == w_of(make_hooks(draw, name="first")(2, make_state(2)))  # drawn as if fired once
    assert events(hooks)[2:] == [("fired", "first", 2), ("fired", "second", 2)]


def test_a_check_that_fails_at_the_first_call_can_be_retried_with_another_hook():
    hooks = make_hooks(lambda w: w - w.mean(), fsh.at(5), options={"opt_state": "transport"})
    state = make_state(1, MOMENTUM)
    with pytest.raises(MixingError) as caught:
        hooks(1, state)
    assert (caught.value.hook, caught.value.path) == ("a", "w")
    hooks.remove("a")
    hooks.add("a", halve, params="w", when=fsh.at(5))
    assert hooks(1, state) is state
    assert w_of(hooks(5, state)) == [0.5, 0.5]


def test_what_becomes_non_finite_is_not_made_up_for_by_what_becomes_finite():
    """Two NaN in one leaf are cleared while two values of another turn infinite, in one call of the surgery."""
    params = {"v": jnp.array([jnp.nan, jnp.nan, 1.0]), "w": jnp.ones(3)}
    state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))

    def swap(leaves):
        return {"v": jnp.nan_to_num(leaves["v"]), "w": leaves["w"].at[:2].set(jnp.inf)}

    with pytest.raises(fsh.errors.RefusedError):
        fsh.operate(state, swap, opt_state="keep")
    cleared, _ = fsh.operate(state, lambda leaf: jnp.nan_to_num(leaf), params="v", opt_state="keep")
    assert bool(jnp.isfinite(cleared.params["v"]).all())
