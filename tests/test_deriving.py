"""What a surgery computes once per fire, what it measures, and what else it may say of itself; by small surgeries."""

from __future__ import annotations

import collections
import functools
import types
import zlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MOMENTUM, assert_bitwise_equal, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import deriving
from flax_surgery_hooks.errors import InputError, ScheduleError, StateError, StructureError, UserCodeError
from flax_surgery_hooks.making import make_operation

STEPS, EVERY = 6, 2
BATCH = jnp.arange(1.0, 4.0)
A, B = np.arange(1.0, 5, dtype=np.float32), np.asarray([3.0, -2.0], np.float32)
RAN: collections.Counter[str] = collections.Counter()
"""How often functions have run, inside programs too."""
TRACED: collections.Counter[str] = collections.Counter()
"""How often they were called by Python."""


def count(name: str) -> None:
    TRACED[name] += 1
    jax.debug.callback(lambda: RAN.update([name]))


def counted(counter: collections.Counter[str]) -> dict[str, int]:
    jax.effects_barrier()
    found = dict(counter)
    counter.clear()
    return found


def loss(params: Any, batch: Any) -> Any:
    return jnp.sum(batch) * sum(jnp.sum(leaf**2) for leaf in params.values())


class Pull:
    """Scales each leaf by the sign of its summed gradient, halved as often as it remembers; counts what is called."""

    def init_memory(self, leaves):
        return {path: jnp.zeros((), jnp.int32) for path in leaves}

    @property
    def derived(self):
        return {"grads": self.gradients, "factors": self.factors}

    def gradients(self, state, batch):
        count("grads")
        return jax.grad(loss)(state.params, batch)

    def factors(self, leaves, memory, grads, step, key):
        count("factors")
        del key
        return {
            path: jnp.sign(jnp.sum(grads[path])) * 0.5 ** (memory[path] + 1).astype(jnp.float32) * step
            for path in leaves
        }

    def __call__(self, leaves, memory, factors):
        count("call")
        return {path: leaf * factors[path] for path, leaf in leaves.items()}, {
            path: held + 1 for path, held in memory.items()
        }

    def figure_names(self, paths):
        return tuple(f"pull/{i}/{path}" for path in paths for i in range(6))

    def figures(self, leaves, memory, factors, grads, step, scale=10.0):
        count("figures")
        told = {}
        for path, leaf in leaves.items():
            values = (factors[path], memory[path], grads[path][0], step, leaf[0], scale)
            told |= {f"pull/{i}/{path}": value for i, value in enumerate(values)}
        return told


def train(state: Any) -> Any:
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.cos(leaf), state.params))


def start(tx: Any = MOMENTUM) -> Any:
    return make_state(jnp.int32(0), tx, w=jnp.asarray(A), v=jnp.asarray(B))


def make_hooks(surgery: Any, **options: Any) -> fsh.SurgeryHooks:
    hooks = fsh.SurgeryHooks(seed=2)
    hooks.add("pull", surgery, params="*", when=fsh.every(EVERY), **options)
    return hooks


class Run:
    """A run with what was counted: of each step, and for the first call apart."""

    def __init__(self, way: str) -> None:
        RAN.clear()
        TRACED.clear()
        self.hooks = make_hooks(Pull(), opt_state="transport")
        state = self.hooks.init(start(), **({"fires": 0} if way == "host" else {}))
        inside = self.hooks.observe if way == "host" else functools.partial(self.hooks.in_graph, batch=BATCH)
        step = jax.jit(lambda state: inside(train(state)))
        self.ran, self.traced, self.states = [], [], [state]
        for i in range(1, STEPS + 1):
            state = self.hooks(i, step(state), batch=BATCH)
            self.ran.append(counted(RAN))
            self.traced.append(counted(TRACED))
            self.states.append(state)
        self.hooks.collect(state)
        self.hooks.flush()


run = functools.cache(Run)


def expected() -> list[dict[str, np.ndarray]]:
    """The parameters after each step, in NumPy."""
    params, trace = {"w": A.astype(np.float64), "v": B.astype(np.float64)}, {"w": np.zeros(4), "v": np.zeros(2)}
    found, fires = [params], 0
    for step in range(1, STEPS + 1):
        trace = {path: np.cos(params[path]) + 0.9 * trace[path] for path in params}
        params = {path: params[path] - 0.1 * trace[path] for path in params}
        if step % EVERY == 0:
            fires += 1
            factor = {path: np.sign(np.sum(12 * leaf)) * 0.5**fires * step for path, leaf in params.items()}
            params = {path: leaf * factor[path] for path, leaf in params.items()}
            trace = {path: leaf / factor[path] for path, leaf in trace.items()}  # transported
        found.append(params)
    return found


# Once per fire.


@pytest.mark.parametrize("way", ["host", "graph"])
def test_a_fire_is_given_what_was_made_of_the_state_and_of_the_leaves(way):
    for state, params in zip(run(way).states, expected(), strict=True):
        for path in params:
            np.testing.assert_allclose(state.params[path], params[path], rtol=1e-4)


def test_host_and_graph_are_the_same_bits():
    for one, other in zip(run("host").states, run("graph").states, strict=True):
        memory = [state.surgery["memory"] for state in (one, other)]
        assert_bitwise_equal((one.params, one.opt_state, memory[0]), (other.params, other.opt_state, memory[1]))


@pytest.mark.parametrize("way", ["host", "graph"])
def test_it_is_computed_once_per_fire_and_on_no_other_step(way):
    """The passes run several times: for the figures, for the edit, for its derivative."""
    once = {"grads": 1, "factors": 1}
    for step, ran in enumerate(run(way).ran, start=1):
        made = {name: number for name, number in ran.items() if name in once}
        due = step == 1 or step % EVERY == 0  # the first call looks ahead at what a fire will do
        assert made == (once if due else {}), step
        assert step == 1 or ("call" in ran) == (step % EVERY == 0)
    assert max(ran.get("call", 0) for ran in run(way).ran) > 1


@pytest.mark.parametrize("way", ["host", "graph"])
def test_nothing_is_traced_again(way):
    first, second, *others = run(way).traced
    assert {"grads", "factors"} <= first.keys()
    assert second.get("grads", 0) == 0
    # That its edit keeps all paths is looked at anew at each fire.
    assert [traced for traced in others if set(traced) - {"call"}] == []


def test_a_state_that_is_no_pytree_is_given_as_it_is():
    """Such a state can hold what no program takes: the function is called by Python, at each fire once."""
    seen = []

    class Plain(types.SimpleNamespace):
        def replace(self, **fields):
            return Plain(**{**vars(self), **fields})

    class Seeing:
        derived: ClassVar = {"shift": lambda state: seen.append(state.note) or jnp.sum(state.params["w"])}

        def __call__(self, leaves, shift):
            return {path: leaf + shift for path, leaf in leaves.items()}

    held = start()
    state = Plain(params=held.params, opt_state=held.opt_state, tx=held.tx, step=0, note="a note")
    hooks = make_hooks(Seeing())
    for i in range(5):
        state = hooks(i, state.replace(step=i))
    assert seen == ["a note"] * 3  # the first call, and steps 2 and 4
    np.testing.assert_array_equal(state.params["w"], A + A.sum() + (A + A.sum()).sum())


# What is given to whom.


class Noted:
    """Its functions say what they are given."""

    def __init__(self):
        self.given: dict[str, Any] = {}

    @property
    def derived(self):
        return {"first": self.first, "second": self.second, "third": self.third}

    def first(self, state, batch, mode="none", key=None):
        self.given["first"] = (type(state), batch, mode, key)
        return jnp.sum(batch)

    def second(self, state, first):
        return {"w": state.params["w"] * first}

    def third(self, leaves, second, first, step):
        self.given["third"] = (list(leaves), {path: leaf.dtype for path, leaf in leaves.items()}, second, step)
        return jnp.max(leaves["w"]) + first

    def __call__(self, leaves, third, other=0.0):
        return {path: leaf + third + other for path, leaf in leaves.items()}


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def test_inputs_that_only_a_gradient_asked_for_are_not_given_to_the_passes():
    surgery = Noted()
    operation = make_operation(surgery, params="*")
    given = {"batch": BATCH, "other": jnp.float32(2), "key": None, "step": jnp.int32(3)}
    run = deriving.Traced({})
    of_state = deriving.from_state(operation, start(), given, run.of_state)
    assert set(of_state) == {"batch", "other", "first", "second"}
    of_leaves = deriving.from_leaves(operation, {"w": jnp.asarray(A)}, (), {**given, **of_state}, run.of_leaves)
    assert set(of_leaves) == {"other", "third"}
    assert of_leaves["third"] == 4 + 6
    assert surgery.given["first"][0] is fsh.TrainState


def test_by_operate_concrete_jitted_and_abstract():
    surgery = Noted()
    state = start().replace(params={"w": jnp.asarray(A, jnp.bfloat16), "v": jnp.asarray(B)}, opt_state=MOMENTUM.init(
        {"w": jnp.asarray(A, jnp.bfloat16), "v": jnp.asarray(B)}))  # fmt: skip

    def operate(state):
        return fsh.operate(state, surgery, inputs={"batch": BATCH, "mode": "static"})[0]

    concrete = operate(state)
    np.testing.assert_array_equal(concrete.params["v"], B + 10)
    np.testing.assert_array_equal(np.asarray(concrete.params["w"], np.float32), A + 10)
    assert surgery.given["first"][2:] == ("static", None)
    assert surgery.given["third"][1] == {"w": jnp.float32, "v": jnp.float32}, "short floats come as float32"
    jitted = jax.jit(operate)(state)
    assert_bitwise_equal((jitted.params, jitted.opt_state), (concrete.params, concrete.opt_state))
    abstract = operate(jax.eval_shape(lambda: state))
    assert shapes(abstract.params) == shapes(concrete.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract.params))


def test_keys_and_paths():
    """Functions are given the key of the fire; a surgery of one leaf is given what was made of the state at each."""

    class Each:
        derived: ClassVar = {"noise": lambda state, key: jax.random.normal(key, (4,))}

        def __call__(self, leaf, noise, path):
            return leaf + noise[: leaf.size] * (1 if path == "w" else -1)

    key = jax.random.key(8)
    noise = np.asarray(jax.random.normal(key, (4,)))
    state, _ = fsh.operate(start(), Each(), key=key)
    np.testing.assert_allclose(state.params["w"], A + noise, rtol=1e-6)
    np.testing.assert_allclose(state.params["v"], B - noise[:2], rtol=1e-6)
    with pytest.raises(InputError, match="draws random numbers"):
        fsh.operate(start(), Each())
    hooks, found = make_hooks(Each()), []
    for i in (0, 2, 4):
        state = hooks.fire("pull", start(), i)
        found.append(np.asarray(state.params["w"]) - A)
    folded = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), np.uint32(zlib.crc32(b"pull"))), 2)
    np.testing.assert_allclose(found[1], jax.random.normal(folded, (4,)), rtol=1e-4, atol=1e-6)
    assert not np.allclose(found[0], found[1])


def test_a_surgery_may_edit_slots_by_what_it_has_made():
    class Slots:
        derived: ClassVar = {"by": lambda state, loss: loss * 2}

        def __call__(self, leaf):
            return leaf

        def edit_slots(self, slots, /, by):
            return {name: slot.value * by for name, slot in slots.items()}

    state = train(start())
    after, _ = fsh.operate(state, Slots(), inputs={"loss": 3.0})
    np.testing.assert_allclose(after.opt_state[0].trace["w"], 6 * np.asarray(state.opt_state[0].trace["w"]), rtol=1e-6)


# Foreseen.


def test_plans_know_what_is_made():
    hooks = make_hooks(Pull())
    RAN.clear()
    state = hooks.init(start(), fires=0)
    plan = hooks.plan(state, STEPS, batch=BATCH)
    assert [(fire.step, fire.paths) for fire in plan.fires()] == [(step, ("v", "w")) for step in (2, 4, 6)]
    plan = hooks.plan(jax.eval_shape(lambda: state), STEPS, batch=jax.ShapeDtypeStruct((3,), jnp.float32))
    assert len(plan.fires()) == 3
    assert counted(RAN) == {}, "nothing is run"
    unknown = hooks.plan(state, STEPS)
    assert len(unknown.fires()) == 3
    assert "batch" in str(unknown)


class Cut:
    """Keeps the elements whose places it has made of the state, as many as an input says."""

    derived: ClassVar = {"places": lambda state, keep: jnp.argsort(-state.params["w"])[: len(keep)]}

    def __call__(self, leaves, places):
        return {**leaves, "w": leaves["w"][places]}


def long(w: Any) -> Any:
    if w.size < 4:
        raise ValueError(f"too short: {w.size}")
    return w


def test_a_fire_that_changes_shapes_is_foreseen():
    hooks = make_hooks(Cut(), apply_fn=lambda *_: None)
    hooks.add("later", long, params="w", when=fsh.at(5))
    with pytest.raises(UserCodeError, match="too short: 2") as caught:
        hooks(1, start().replace(step=1), keep=(0, 0))  # which sees what step 5 will meet
    assert caught.value.hook == "later"
    hooks = make_hooks(Cut())
    with pytest.raises(StructureError, match=r"\[4\] -> \[2\]"):
        hooks(1, start().replace(step=1), keep=(0, 0))
    state = make_hooks(Cut(), apply_fn=lambda *_: None).fire("pull", start(), 2, keep=(0, 0))
    np.testing.assert_array_equal(state.params["w"], [4, 3])
    assert state.opt_state[0].trace["w"].shape == (2,)


# Figures.


def test_figures_are_the_same_on_both_ways_in_the_ledger_and_in_a_preview():
    records = {way: [r for r in run(way).hooks.ledger.records if r.event == "settled"] for way in ("host", "graph")}
    names = Pull().figure_names(("v", "w"))
    assert len(names) == 12, "more than one row of the room for figures"
    for host, graph in zip(records["host"], records["graph"], strict=True):
        assert host.step == graph.step
        own = [{name: record.figures[name] for name in names} for record in (host, graph)]
        assert own[0] == own[1]
        assert {name for name in graph.figures if name.startswith("pull/")} == set(names)
    for fire, (record, step) in enumerate(zip(records["graph"], (2, 4, 6), strict=True)):
        before = run("graph").states[step - 1]
        w = float(train(before).params["w"][0])
        figures = [record.figures[f"pull/{i}/w"] for i in range(6)]
        assert figures[1:] == pytest.approx([fire, 12 * w, step, w, 10.0], rel=1e-5)
        assert abs(figures[0]) == step * 0.5 ** (fire + 1)
    state, hooks = run("host").states[3], run("host").hooks
    preview = hooks.preview("pull", train(state), batch=BATCH)
    assert {name: preview.figures[name] for name in names} == pytest.approx(
        {name: records["host"][1].figures[name] for name in names}, rel=1e-6
    )  # fmt: skip


class Measured:
    """Of one leaf."""

    def __call__(self, leaf):
        return leaf / 2

    def figure_names(self, paths):
        assert len(paths) == 1
        return ("largest", "of/loss")

    def figures(self, leaf, path, loss):
        count("measured")
        return {"of/loss": loss + (path == "w"), "largest": jnp.max(leaf)}


def test_figures_of_one_leaf_have_its_path():
    _, record = fsh.operate(start(), Measured(), inputs={"loss": 2.0})
    own = {name: float(value) for name, value in record.figures.items() if name.startswith(("largest", "of/"))}
    assert own == {"largest/w": 4.0, "largest/v": 3.0, "of/loss/w": 3.0, "of/loss/v": 2.0}


def test_without_figures_none_are_computed():
    hooks = make_hooks(Measured(), figures=False)
    TRACED.clear()
    hooks.fire("pull", start(), 2, loss=1.0)
    hooks.flush()
    assert counted(TRACED) == {}
    assert "largest/w" not in hooks.ledger.records[-1].figures


# What else a surgery says of itself.


class Kept:
    opt_state = "keep"

    def __call__(self, leaf):
        return leaf * 0


def test_a_surgery_has_a_rule_of_its_own_by_default():
    state = train(start())
    kept, record = fsh.operate(state, Kept())
    assert record.rule == "keep"
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (kept.opt_state, state.opt_state))))
    other, record = fsh.operate(state, Kept(), opt_state="reset")
    assert record.rule == "reset"
    assert not np.any(other.opt_state[0].trace["w"])
    hooks = make_hooks(Kept())
    assert "| keep |" in str(hooks.plan(state, STEPS))


class Picky:
    def check_schedule(self, when):
        if when.planned is None or when.planned.next_step(10) is not None:
            raise ScheduleError("It never ends.", found=repr(when))

    def __call__(self, leaf):
        return leaf


def test_a_schedule_is_looked_at_when_a_hook_is_added():
    hooks = fsh.SurgeryHooks()
    hooks.add("a", Picky(), params="w", when=fsh.at(10))
    for when in (fsh.at(11), fsh.every(3), fsh.on_metric("loss", above=1.0)):
        with pytest.raises(ScheduleError, match="It never ends") as caught:
            hooks.add("b", Picky(), params="w", when=when)
        assert (caught.value.hook, caught.value.found) == ("b", repr(when))
    hooks.add("b", Picky(), params="w", when=fsh.every(5, stop=10))


class Started:
    """Shifts by what it remembers, which it has drawn."""

    def init_memory(self, leaf, key):
        return jax.random.normal(key, leaf.shape)

    def __call__(self, leaf, memory):
        return leaf + memory, memory * 0


class StartsAnew(Started):
    starts_anew = True


def test_a_surgery_that_starts_anew_needs_no_place_for_its_memory():
    with pytest.raises(StateError, match="remembers; `operate` has no place for that"):
        fsh.operate(start(), Started())
    one, other = (fsh.operate(start(), StartsAnew(), key=jax.random.key(seed))[0] for seed in (0, 1))
    assert one.surgery is None
    assert not np.allclose(one.params["w"], A)
    assert not np.allclose(one.params["w"], other.params["w"])
    jitted = jax.jit(lambda state: fsh.operate(state, StartsAnew(), key=jax.random.key(0))[0])(start())
    np.testing.assert_allclose(jitted.params["w"], one.params["w"], rtol=1e-6)
    abstract, _ = fsh.operate(jax.eval_shape(start), StartsAnew(), key=jax.random.key(0))
    assert shapes(abstract.params) == shapes(one.params)
    hooks = make_hooks(StartsAnew())
    with pytest.raises(StateError, match="has no memory of it yet"):
        hooks(2, start().replace(step=2))
