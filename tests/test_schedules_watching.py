"""Hooks that look at metrics: values of every sort, taken in without waiting, read their lag later, told in records."""

import json

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from clu import metrics as clu_metrics
from jax.sharding import NamedSharding, PartitionSpec
from metric_cases import INF

import flax_surgery_hooks as fsh
from flax_surgery_hooks.errors import InputError, StepError
from flax_surgery_hooks.watched_values import Site, found, read, taken
from flax_surgery_hooks.watching import WATCHING, Watch


class Recording:
    """A number that notes when it is read."""

    def __init__(self, value, log, step):
        self.read = lambda: log.append(step) or value

    def __float__(self):
        return self.read()


def test_nothing_younger_than_the_lag_is_read():
    log, now = [], []
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1e9, lag=3))
    state = tiny.make_state(1)
    for step in range(1, 12):
        before = len(log)
        assert hooks(step, state, metrics={"loss": Recording(1.0, log, step)}) is state
        now.append((step, log[before:]))
    assert now == [(step, [step - 3] if step > 3 else []) for step in range(1, 12)]


def test_a_loop_that_skips_steps_reads_what_is_old_enough():
    log, now = [], []
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1e9, lag=4))
    for step in (1, 3, 5, 6, 12, 13, 16):
        before = len(log)
        hooks(step, tiny.make_state(1), metrics={"loss": Recording(1.0, log, step)})
        now.append((step, log[before:]))
    assert now == [(1, []), (3, []), (5, [1]), (6, []), (12, [3, 5, 6]), (13, []), (16, [12])]


@jax.jit
def _slow(x):
    return jax.lax.fori_loop(0, 400, lambda _, y: jnp.sin(y @ y), x).sum()


def test_a_call_does_not_wait_for_a_value_that_is_being_computed():
    x = jnp.ones((400, 400))
    _slow(x).block_until_ready()
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", spike=2.0, lag=3))
    state = tiny.make_state(1)
    for step in (1, 2, 3, 4):
        hooks(step, state, metrics={"loss": 1.0})
    slow = _slow(x)
    for step in (5, 6, 7):
        hooks(step, state, metrics={"loss": slow if step == 5 else 1.0})
    assert not slow.is_ready()
    hooks(8, state, metrics={"loss": 1.0})
    assert slow.is_ready()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_shorter_lag_waits_for_it(lag):
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", spike=2.0, lag=lag)), tiny.make_state(1)
    hooks(1, state, metrics={"loss": 1.0})
    slow = _slow(jnp.ones((400, 400)))
    hooks(2, state, metrics={"loss": slow})
    assert slow.is_ready() is (lag == 0)
    hooks(3, state, metrics={"loss": 1.0})
    assert slow.is_ready()


def test_a_hook_fires_by_hand_without_metrics():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1.0)), tiny.make_state(1)
    assert hooks.preview("a", state).triggers == ()
    assert tiny.w_of(hooks.fire("a", state)) == [0.5, 0.5]
    assert hooks.ledger.records[-1].triggers == ()


def test_no_implicit_transfer(no_transfers):
    values = [jax.device_put(np.float32(value)) for value in (1, 1, 9, 1, 1, 1, 1)]
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", spike=2.0, lag=2))
    state = tiny.make_state(jax.device_put(np.int32(1)), w=jax.device_put(np.ones(2, np.float32)))
    with jax.transfer_guard("allow"):
        hooks(1, state, metrics={"loss": values[0]})
        hooks(2, state, metrics={"loss": values[1]})
    for step, value in enumerate(values[2:4], start=3):
        hooks(step, state, metrics={"loss": value})
    assert not tiny.events(hooks, "fired")
    with jax.transfer_guard("allow"):
        hooks(5, state, metrics={"loss": values[4]})
    assert tiny.events(hooks, "fired") == [("fired", "a", 5)]


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    "value", [2.5, jnp.float32(2.5), jnp.bfloat16(2.5), np.float64(2.5), np.array(2.5), jnp.asarray(2.5)]
)
def test_real_scalars_of_all_sorts(value, far):
    where = Site(far=far)
    assert read(taken(value, "metrics/loss", integral=False, where=where), "", integral=False, where=where) == 2.5


def test_flags_and_integers_are_numbers_too():
    for value in (True, np.True_, jnp.bool_(True), 1, jnp.int8(1), np.uint16(1)):
        assert read(taken(value, "", integral=False, where=Site()), "", integral=False, where=Site()) == 1.0


def test_a_numpy_array_is_read_before_it_is_written_into():
    hooks, loss = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5.0, lag=2)), np.array(9.0)
    hooks(1, tiny.make_state(1), metrics={"loss": loss})
    loss[...] = 0
    hooks(2, tiny.make_state(1), metrics={"loss": loss})
    hooks(3, tiny.make_state(1), metrics={"loss": loss})
    assert tiny.events(hooks, "fired") == [("fired", "a", 3)]


@flax.struct.dataclass
class Metrics(clu_metrics.Collection):
    accuracy: clu_metrics.Accuracy
    loss: clu_metrics.Average.from_output("loss")


def test_collections_and_metrics_of_clu():
    collection = Metrics.single_from_model_output(
        logits=jnp.eye(4), labels=jnp.array([0, 1, 2, 0]), loss=jnp.array([1.0, 2.0, 6.0])
    )
    for metrics in (collection, {"train": collection}):
        path = "loss" if metrics is collection else "train/loss"
        schedule = fsh.on_metric(path, above=2.5, lag=1)
        hooks = tiny.make_hooks(tiny.halve, schedule)
        for step in (1, 2):
            hooks(step, tiny.make_state(1), metrics=metrics)
        [record] = [one for one in hooks.ledger.records if one.event == "fired"]
        assert record.triggers[0].value == 3.0
    with pytest.raises(InputError, match="Found: metrics with accuracy, loss"):
        tiny.make_hooks(tiny.halve, fsh.on_metric("lost", above=1.0))(1, tiny.make_state(1), metrics=collection)


def test_names_with_slashes_and_nested_ones():
    inputs = {"metrics": {"train/loss": 1, "train": {"acc": 2, "a/b": {"c": 3}}, "a": {"b": {"c/d": 4}}}, "tokens": 5}
    paths = {"train/loss": 1, "train/acc": 2, "train/a/b/c": 3, "a/b/c/d": 4}
    assert {path: found(inputs, ("metrics", path)) for path in paths} == paths
    assert found(inputs, ("tokens", "")) == 5


def test_the_record_says_which_value_decided(tmp_path):
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5, lag=2), ledger=tmp_path / "ledger.jsonl")
    state = tiny.make_state(1)
    for step, loss in enumerate([1.0, 7.5, 1.0, 1.0, INF, 1.0, 1.0], start=1):
        state = hooks(step, state.replace(step=step), metrics={"loss": loss})
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    told = [(line["step"], line["triggers"]) for line in lines if line["event"] == "fired"]
    schedule = "on_metric('loss', above=5.0, lag=2)"
    assert told == [
        (4, [{"schedule": schedule, "step": 2, "value": 7.5, "limit": 5.0}]),
        (7, [{"schedule": schedule, "step": 5, "value": "inf", "limit": 5.0}]),
    ]
    assert tiny.w_of(state) == [0.25, 0.25]


def test_the_record_tells_the_average():
    averaged = {
        "above": fsh.on_metric("loss", above=2.5, horizon=2),
        "spike": fsh.on_metric("loss", spike=2, horizon=2),
    }
    found = {}
    for name, schedule in averaged.items():
        state, _ = schedule.observe(schedule.begin(), 1, 1.0)
        _, trigger = schedule.observe(state, 2, 4.0)
        found[name] = (trigger.value, trigger.limit, trigger.average)
    assert found == {"above": (4.0, 2.5, pytest.approx(3.0)), "spike": (4.0, 2.0, 1.0)}


def test_joined_with_steps_and_with_each_other():
    schedule = (
        fsh.at(3) | fsh.on_metric("loss", above=5.0, lag=1) | fsh.on_metric("acc", below=0.1, lag=2) | fsh.every(10)
    )
    hooks, state = tiny.make_hooks(tiny.halve, schedule), tiny.make_state(1)
    for step in range(1, 22):
        metrics = {"loss": 9.0 if step in (5, 9, 16) else 1.0, "acc": 0.0 if step in (12, 13, 15) else 0.5}
        state = hooks(step, state.replace(step=step), metrics=metrics)
    told = [
        (one.step, [trigger.step for trigger in one.triggers]) for one in hooks.ledger.records if one.event == "fired"
    ]
    assert told == [(3, []), (6, [5]), (10, [9]), (14, [12]), (17, [16, 15]), (20, [])]


def test_several_hooks_each_see_the_metric():
    hooks, state = fsh.SurgeryHooks(), tiny.make_state(1)
    for name, bound in {"a": 2.0, "b": 4.0}.items():
        hooks.add(name, tiny.halve, params="w", when=fsh.on_metric("loss", above=bound, lag=1), **tiny.QUICK)
    for step, loss in enumerate([1.0, 3.0, 1.0, 5.0, 1.0, 1.0], start=1):
        state = hooks(step, state.replace(step=step), metrics={"loss": loss})
    assert tiny.events(hooks, "fired") == [("fired", "a", 3), ("fired", "a", 5), ("fired", "b", 5)]


def test_hooks_that_are_done_are_idle_again():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1.0, max_fires=1, lag=1)), tiny.make_state(1)
    for step in (1, 2):
        assert tiny.w_of(state) == [1.0, 1.0]
        state = hooks(step, state.replace(step=step), metrics={"loss": 2.0})
    assert tiny.w_of(state) == [0.5, 0.5]
    state = hooks(3, state.replace(step=3))  # no metrics are asked for any more
    hooks.flush()
    assert hooks._wake > 10**6


def test_hooks_without_such_schedules_wake_as_before():
    hooks = tiny.make_hooks(tiny.halve, fsh.at(50))
    hooks(1, tiny.make_state(1))
    hooks(2, tiny.make_state(2))
    assert hooks._wake == 50
    hooks.add("b", tiny.halve, params="w", when=fsh.on_metric("loss", above=1.0), **tiny.QUICK)
    for step in (3, 4):
        hooks(step, tiny.make_state(3), metrics={"loss": 0.0})
    assert (hooks._wake, hooks._watching.wake) == (WATCHING, 50)
    hooks.remove("b")
    hooks(5, tiny.make_state(5))
    assert hooks._wake == 50


def test_a_call_that_only_watches_still_checks_the_step():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5.0)), tiny.make_state(1)
    for step in (1, 2, 3):
        hooks(step, state, metrics={"loss": 1.0})
    for step in (3, 2, 4.0, np.int64(4), True, None, jnp.int32(4)):
        with pytest.raises(StepError):
            hooks(step, state, metrics={"loss": 1.0})
    assert hooks(4, state, metrics={"loss": 1.0}) is state


def test_a_call_that_failed_can_be_made_again():
    hooks, state = tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=5.0, lag=1)), tiny.make_state(1)
    metrics = {"loss": 9.0}
    hooks(1, state, metrics=metrics)
    with pytest.raises(InputError, match="'metrics'"):
        hooks(2, state)
    state = hooks(2, state.replace(step=2), metrics=metrics)
    assert tiny.events(hooks, "fired") == [("fired", "a", 2)]
    assert hooks._watching.to_json()["a"][0]["waiting"] == [[3, 2, 9.0]]


def test_a_fire_that_failed_is_made_up_for():
    """The trigger stays until the hook has fired, as a due step does."""

    def scaled(w, factor):
        return w * factor

    hooks, state = tiny.make_hooks(scaled, fsh.on_metric("loss", above=5.0, lag=1)), tiny.make_state(1)
    for step, loss in ((1, 1.0), (2, 9.0)):
        hooks(step, state, metrics={"loss": loss}, factor=jnp.float32(0.5))
    for step in (3, 3, 4):
        with pytest.raises(InputError, match="factor"):
            hooks(step, state, metrics={"loss": 1.0})
    state = hooks(4, state, metrics={"loss": 1.0}, factor=jnp.float32(0.5))
    [record] = [one for one in hooks.ledger.records if one.event == "fired"]
    assert (record.step, [one.step for one in record.triggers]) == (4, [2])
    assert tiny.w_of(state) == [0.5, 0.5]


def test_surgeries_that_change_shapes_are_checked_ahead():
    """Such a hook may fire at any step, so that the look ahead takes it for the next one."""

    def grow(leaves):
        return {"w": jnp.concatenate([leaves["w"], leaves["w"]])}

    reshape = {"apply_fn": None, "tx": tiny.SGD, "on_reshape": lambda state, record: seen.append(record.triggers)}
    seen: list = []
    hooks = fsh.SurgeryHooks()
    hooks.add("grow", grow, params="w", when=fsh.on_metric("loss", above=5.0, lag=1), **tiny.QUICK, **reshape)
    hooks.add("fixed", lambda w: w + jnp.ones(2), params="w", when=fsh.at(50), **tiny.QUICK)
    with pytest.raises(fsh.SurgeryError, match="hook 'fixed'"):
        hooks(1, tiny.make_state(1), metrics={"loss": 1.0})
    hooks.remove("fixed")
    state = hooks(1, tiny.make_state(1), metrics={"loss": 9.0})
    state = hooks(2, state.replace(step=2), metrics={"loss": 1.0})
    assert tiny.w_of(state) == [1.0] * 4
    assert [trigger.step for trigger in seen[0]] == [1]


# Every `raise`, on its content.


STATE = tiny.make_state(1)


def call(value, name="loss", **inputs):
    """A first call of hooks that look at a metric."""
    hooks = tiny.make_hooks(tiny.halve, fsh.on_metric(name, above=1.0, lag=0), options=tiny.QUICK)
    return hooks(1, STATE, metrics=value, **inputs)


def deleted():
    value = jnp.float32(1)
    value.delete()
    return value


PARTLY = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))

REFUSED_VALUES = {
    "no metrics": (
        lambda: tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1))(1, tiny.make_state(1), tokens=3),
        "looks at 'metrics/loss', and the train loop does not pass 'metrics'",
        "inputs tokens",
        "hooks(step, state, metrics=metrics)",
    ),
    "another metric": (
        lambda: call({"los": 1.0, "eval": {"acc": 1}}),
        "'metrics' does not hold it",
        "metrics with los, eval/acc",
        "los; at a step without a value, None under that name",
    ),
    "no mapping": (lambda: call(3.0), "'metrics' does not hold it", "metrics=float 3.0", "one of these"),
    "a vector": (lambda: call({"loss": jnp.ones(8)}), "is no real scalar", "ArrayImpl float32[8]", "loss.mean()"),
    "a NumPy vector": (lambda: call({"loss": np.ones(1)}), "is no real scalar", "ndarray float64[1]", "loss.mean()"),
    "a text": (lambda: call({"loss": "1.0"}), "is no real scalar", "str 1.0", ""),
    "a complex number": (lambda: call({"loss": 1j}), "is no real scalar", "complex 1j", ""),
    "a complex array": (lambda: call({"loss": jnp.complex64(1)}), "is no real scalar", "complex64[]", ""),
    "a key": (lambda: call({"loss": jax.random.key(0)}), "is no real scalar", "key<fry>[]", ""),
    "a mapping": (lambda: call({"loss": {"a": 1.0}}), "is no real scalar", "dict {'a': 1.0}", ""),
    "a metric per device": (
        lambda: call({"loss": clu_metrics.Average(total=jnp.ones(8), count=jnp.ones(8))}),
        "is no real scalar",
        "float32[8]",
        "flax.jax_utils.unreplicate",
    ),
    "traced": (
        lambda: jax.jit(lambda loss: call({"loss": loss}) and loss)(1.0),
        "'metrics/loss' is traced",
        "float32[]",
        "outside of the jitted step",
    ),
    "deleted": (lambda: call({"loss": deleted()}), "was deleted before", "donated", "does not donate"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_values_are_refused_at_the_first_call(name):
    build, problem, told, write = REFUSED_VALUES[name]
    with pytest.raises(InputError) as caught:
        build()
    error = caught.value
    assert problem in error.problem
    assert told in str(error)
    assert write in error.write
    assert (error.hook, error.step) == ("a", 1)


def test_a_value_that_is_donated_while_it_waits_is_told():
    hooks, state, loss = (
        tiny.make_hooks(tiny.halve, fsh.on_metric("loss", above=1.0, lag=1)),
        tiny.make_state(1),
        jnp.float32(0),
    )
    hooks(1, state, metrics={"loss": loss})
    jax.jit(lambda x: x + 1, donate_argnums=0)(loss)
    with pytest.raises(InputError, match="hook 'a', step 2: 'metrics/loss' was deleted"):
        hooks(2, state, metrics={"loss": 1.0})


@pytest.mark.parametrize(
    "value",
    [1.0, 1, np.float32(1), jnp.float32(1), jax.device_put(1.0, NamedSharding(PARTLY.mesh, PartitionSpec()))],
    ids=repr,
)
def test_values_of_one_process_are_refused_on_several(value):
    assert taken(value, "metrics/loss", integral=False, where=Site()) is not None
    with pytest.raises(InputError) as caught:
        taken(value, "metrics/loss", integral=False, where=Site(processes=2))
    assert "may differ between processes" in caught.value.problem
    assert "fully replicated over the mesh of all processes" in caught.value.write
    assert "of 2 processes" in caught.value.found


def test_on_several_processes_a_python_number_of_the_loop_is_refused_too():
    with pytest.raises(InputError, match="may differ between processes"):
        Watch("a", fsh.on_metric("loss", above=1.0)).step(1, {"metrics": {"loss": 1.0}}, Site(processes=2))
