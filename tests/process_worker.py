"""One process of the runs in test_processes.py: a small model over a mesh of all processes, with hooks of many kinds.

`python process_worker.py SCENARIO OUT PORT RANK PROCESSES`: the last line that it prints is what it has to say, as
JSON; arrays go to `OUT/RANK.npz`. With PROCESSES of 1 all eight devices are in this process.
"""

import dataclasses
import json
import logging
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging as absl_logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flax_surgery_hooks as fsh
from flax_surgery_hooks import processes, surgeries

LAST = 12
QUICK = {"guard": "off", "figures": False}
EXACT = ("averaged", "grown", "noisy", "plain", "reset", "scaled", "traced")


def connect(port, rank, processes, heartbeat=100):
    """Joins the other processes, which fails if anything before has initialised JAX's backend."""
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, rank, heartbeat_timeout_seconds=heartbeat)


def on_mesh(*names, devices=None):
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*names))


def whole(tree, rows="data"):
    """Global arrays of what every process holds whole; matrices in rows."""

    def place(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(
            leaf.shape, on_mesh(rows) if leaf.ndim == 2 else on_mesh(), leaf.__getitem__
        )

    return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True)
class Average:
    """A leaf becomes its running average."""

    rate: float = 0.25

    def init_memory(self, leaf):
        return jnp.zeros_like(leaf)

    def observe(self, leaf, memory):
        return leaf, memory + self.rate * (leaf - memory)

    def __call__(self, leaf, memory):
        return memory, memory


class Writer:
    """Counts what it is given."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        def count(*_, **__):
            self.calls[name] = self.calls.get(name, 0) + 1

        return count


def grow(leaf):
    return jnp.concatenate([leaf, jnp.zeros_like(leaf)])


def halve(leaf):
    return leaf / 2


def jitter(leaf, key):
    return leaf + 0.1 * jax.random.normal(key, leaf.shape)


def apply_grown(*_):
    raise NotImplementedError


def train_hooks(**kwargs):
    """Hooks of many kinds: on the host (those with histograms, other shapes, or values), and in graph."""
    hooks = fsh.SurgeryHooks(seed=7, agree_secs=60, **kwargs)
    host = {"histograms": True}  # which in graph has no place
    hooks.add("early", halve, params="exact/plain", when=fsh.at(0), **host, **QUICK)
    hooks.add("norm", surgeries.Normalize(), params="mlp/w1", when=fsh.every(4), **host)
    hooks.add("clip", surgeries.ClipNorm(0.5), params="mlp/w2", when=fsh.every(3), **host)
    hooks.add(
        "scale", surgeries.Scale(2.0), params="exact/scaled", when=fsh.at(4), opt_state="transport", **host, **QUICK
    )
    hooks.add("noise", jitter, params=["exact/noisy", "mlp/b1"], when=fsh.every(5), **host, **QUICK)
    hooks.add("reset", surgeries.ResetMoments(), params="exact/reset", when=fsh.at(6), **host, **QUICK)
    hooks.add("grow", grow, params="exact/grown", when=fsh.at(7), fresh="init", apply_fn=apply_grown, **QUICK)
    hooks.add("average", Average(), params="exact/averaged", when=fsh.at(8), **QUICK)
    hooks.add("traced", jitter, params="exact/traced", when=fsh.every(5))
    hooks.add("metric", halve, params="exact/plain", when=fsh.on_metric("loss", below=0.4, lag=2), **QUICK)
    hooks.add("count", halve, params="exact/plain", when=fsh.every_count(100, of="tokens"), **QUICK)
    return hooks


def fresh_state():
    """Two layers that train, and leaves whose gradients are elementwise: no order of summation matters to them."""
    rng = np.random.default_rng(0)
    shapes = {"mlp": {"w1": (16, 8), "b1": (8,), "w2": (8, 8)}, "exact": dict.fromkeys(EXACT, (16, 4))}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.01))


def make_step(hooks):
    def loss(params, batch):
        hidden = jax.nn.relu(batch @ params["mlp"]["w1"] + params["mlp"]["b1"][None])
        fit = jnp.mean((hidden @ params["mlp"]["w2"] - jnp.sin(batch[:, :8])) ** 2)
        return fit + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params["exact"])), fit

    def step(state, batch):
        (_, fit), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        return hooks.in_graph(state.apply_gradients(grads=grads)), fit

    return jax.jit(step, donate_argnums=0)


def train(out, port, rank, count, slow_secs=0.0):
    """A run with all hooks, in which one process may come late to a fire."""
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    absl_logging.get_absl_logger().addHandler(handler)
    writer = Writer()
    hooks = train_hooks(writer=writer, ledger=out / f"{rank}.jsonl")  # before `connect`: it must not wake JAX
    connect(port, rank, count)
    state = hooks.init(whole(fresh_state()))
    step = make_step(hooks)
    batch = whole(np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32))
    for i in range(1, LAST + 1):
        state, fit = step(state, batch)
        if i == 4 and rank == count - 1:
            time.sleep(slow_secs)
        state = hooks(i, state, metrics={"loss": fit}, tokens=30 * i)
    hooks.collect(state)
    hooks.flush()
    save(
        out / f"{rank}.npz", {"params": state.params, "opt_state": state.opt_state, "surgery": state.surgery["memory"]}
    )
    records = [[one.event, one.hook, one.step, one.figures] for one in hooks.ledger.records]
    return {"records": records, "writer": writer.calls, "logged": logged}


def save(path, tree):
    """The shards that this process holds, under their path and the rows that they are."""
    shards = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        for shard in leaf.addressable_shards:
            rows = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
            name, value = f"{jax.tree_util.keystr(keys)}|{rows}", np.asarray(shard.data)
            assert shards.setdefault(name, value).tobytes() == value.tobytes()
    np.savez(path, **shards)


def make_small(step=2, rows="data"):
    params = whole({"w": np.ones((8, 2), np.float32)}, rows)
    return fsh.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1)).replace(step=step)


def small_hooks(surgery=halve, when=None, name="a", **kwargs):
    hooks = fsh.SurgeryHooks(**{"agree_secs": 60, **kwargs})
    hooks.add(name, surgery, params="w", when=when or fsh.every(2), **QUICK)
    return hooks


def told_of(run):
    """What became of a call, and how long it took."""
    start, told = time.perf_counter(), {"error": None}
    try:
        run()
    except fsh.SurgeryError as error:
        told = {"error": type(error).__name__, "text": str(error), "hook": error.hook, "path": error.path}
        told["missing"] = list(getattr(error, "missing", ()))
        told["differences"] = list(map(str, getattr(error, "differences", ())))
    return told | {"secs": time.perf_counter() - start}


def other_settings(rank):
    """Calls of which one process makes another."""

    def first(**kwargs):
        return lambda: small_hooks(**kwargs)(2, make_small())

    def further(rank):
        hooks = small_hooks()
        if rank:
            hooks.add("b", halve, params="w", when=fsh.at(3))
        hooks(2, make_small())

    def ordered(rank):
        hooks = small_hooks(name="ab"[rank])
        hooks.add("ba"[rank], halve, params="w", when=fsh.every(2), **QUICK)
        hooks(2, make_small())

    def added(rank):
        hooks = small_hooks()
        state = hooks(2, make_small())
        hooks.add("b", halve, params="w", when=fsh.at(8 + rank))
        hooks(3, state)

    def closing_over(rate):
        return lambda w: w * rate

    one = 1.0 + rank
    other_code = (lambda w: w * 2, lambda w: w + w)[rank]
    return {
        "seed": first(seed=rank),
        "schedule": first(when=fsh.every(2 + rank)),
        "field": first(surgery=surgeries.Scale(one)),
        "closure": first(surgery=closing_over(one)),
        "code": first(surgery=other_code),
        "setting": first(donate=("auto", "never")[rank]),
        "mirror": first(mirrors={"ema": "param"} if rank else None),
        "further": lambda: further(rank),
        "order": lambda: ordered(rank),
        "added": lambda: added(rank),
        "step": lambda: small_hooks()(2 + rank, make_small(2 + rank)),
        "state": lambda: small_hooks()(2, make_small(rows=("data", None)[rank])),
        "call": lambda: small_hooks().fire("a", make_small(), 2) if rank else small_hooks()(2, make_small()),
        "init": lambda: small_hooks(seed=rank).init(make_small()),
        "graph": lambda: jax.eval_shape(small_hooks(seed=rank).in_graph, small_hooks().init(make_small())),
        "ledger": first(ledger="/dev/null/there"),
    }


@dataclasses.dataclass(frozen=True)
class Wordy:
    """A surgery whose fields have no order of their own, no JSON, or an address."""

    names: frozenset = frozenset({"alpha", "beta", "gamma"})
    start: object = dataclasses.field(default_factory=lambda: np.arange(3.0))
    thing: object = dataclasses.field(default_factory=object)

    def __call__(self, w):
        return w if "w" in {"u", "v", "w"} else w / 2


def disagree(out, port, rank, count):
    """First calls that differ between two processes, and some that do not."""
    connect(port, rank, count)
    told = {name: told_of(run) for name, run in other_settings(rank).items()}
    alike = small_hooks(Wordy(), name="wordy", ledger=out / f"{rank}.jsonl")
    told["alike"] = told_of(lambda: alike(2, make_small()))
    told["again"] = told_of(lambda: alike(4, make_small(4)))

    def late(secs, limit):
        def run():
            hooks = small_hooks(agree_secs=limit)
            if rank:
                time.sleep(secs)
            hooks(2, make_small())

        return told_of(run)

    told["slow"] = late(1.5, 60)
    told["late"] = late(3.0, 0.5)
    told["part"] = told_of(part_of_mesh)
    told["gathered"] = processes._by_collectives("x", f"from {rank}" * (1 + rank), 60)
    if rank:
        time.sleep(3)
    told["gathered late"] = told_of(lambda: processes._by_collectives("x", "y", 1.0))
    if rank:  # alone from here on
        alike.add("b", halve, params="w", when=fsh.at(9))
        alike._agreement._secs = 1.0
        told["alone"] = told_of(lambda: alike(6, make_small(6)))
    else:
        time.sleep(3)
    return told


def part_of_mesh():
    half = on_mesh(devices=jax.devices()[:4])
    w = jax.make_array_from_callback((8, 2), half, np.ones((8, 2), np.float32).__getitem__, dtype=jnp.float32)
    state = make_small()
    small_hooks()(2, state.replace(params={"w": w}))


def dies_first(out, port, rank, count):
    """One process dies before the first call of the hooks."""
    connect(port, rank, count, heartbeat=60)
    jax.devices()  # JAX itself waits here for what devices the others have
    if rank:
        os._exit(3)
    return {"dead": told_of(lambda: small_hooks(agree_secs=3)(2, make_small()))}


def dies_later(out, port, rank, count):
    """One process dies between two fires, which sum over the mesh."""
    connect(port, rank, count, heartbeat=10)
    hooks = fsh.SurgeryHooks(agree_secs=60)
    hooks.add("a", surgeries.Normalize(), params="w", when=fsh.every(2), guard="off")
    state = hooks(2, make_small())
    hooks.flush()
    if rank:
        os._exit(3)
    hooks(4, state.replace(step=4))
    hooks.flush()
    return {"went": "on"}


def shards_of(state, path):
    """The parts that this process has of a leaf and of its slots."""
    held = (state.params, state.opt_state[0].mu, state.opt_state[0].nu)
    parts = [shard.data for tree in held for shard in tree["exact"][path].addressable_shards]
    return [np.array(part).tobytes() for part in parts]


def put_back(out, port, rank, count):
    """Fires whose old values are kept on the devices, on the hosts, and for `undo`; and one that a guard refuses."""
    hooks = fsh.SurgeryHooks(agree_secs=60, on_error="skip")
    for path, to in (("plain", "device"), ("scaled", "host")):
        rollback = fsh.Rollback(20, metric="loss", above=5.0, lag=1, to=to)
        hooks.add(path, halve, params=f"exact/{path}", when=fsh.at(2), rollback=rollback, guard="params/fresh < 1")
    hooks.add("reset", halve, params="exact/reset", when=fsh.at(3), rollback=fsh.Rollback(20, to="host"))
    hooks.add("noisy", halve, params="exact/noisy", when=fsh.at(3), guard="params/relative_change < 0.4")
    connect(port, rank, count)
    state, step, seen = whole(fresh_state()), make_plain_step(), {}
    for i in range(1, 7):
        state = step(state)
        seen[i] = {path: shards_of(state, path) for path in EXACT}
        state = hooks(i, state, metrics={"loss": whole(np.float32(9.0 if i == 4 else 1.0))})
        seen[i, "after"] = {path: shards_of(state, path) for path in EXACT}
    undone = hooks.undo(state, 6)
    hooks.flush()
    return {
        "rolled_back": [seen[5, "after"][path] == seen[2][path] for path in ("plain", "scaled")],
        "others": [seen[5, "after"][path] == seen[5][path] for path in ("reset", "averaged")],
        "undone": shards_of(undone, "reset") == seen[3]["reset"] != seen[6, "after"]["reset"],
        "refused": seen[3, "after"]["noisy"] == seen[3]["noisy"],
        "events": [[one.event, one.hook, one.step] for one in hooks.ledger.records if one.event != "run"],
        "arrays": sorted(hooks._keeper.arrays()),
    }


def grow_and_save(out, port, rank, count):
    """A state that has grown, saved by one process with eight devices."""
    import resumed

    connect(port, rank, count)
    hooks = resumed.make_hooks(leave_out=("switch",))
    state = resumed.run(hooks, resumed.initial(hooks, resumed.mesh_of("auto"))(), 8, placed="auto")
    with resumed.open_manager(out / "checkpoints") as manager:
        fsh.checkpoint.save(manager, 8, state, hooks)
    save(out / f"{rank}.npz", {"params": state.params, "opt_state": state.opt_state, "surgery": state.surgery})
    return {"records": len(hooks.ledger.records)}


def go_on(out, port, rank, count):
    """The same state, restored by others; first with a ledger's file of another run, then with none."""
    import resumed

    connect(port, rank, count)
    told = {}
    with resumed.open_manager(pathlib.Path(os.environ["SOURCE"]) / "checkpoints") as manager:
        for ledger in ("foreign.jsonl", "ledger.jsonl"):
            hooks = resumed.make_hooks(out / ledger, leave_out=("switch",), agree_secs=60)
            if rank == 0 and ledger == "foreign.jsonl":
                (out / ledger).write_text('{"event": "fired", "hook": "other"}\n')
            try:
                init = resumed.initial(hooks, resumed.mesh_of("auto"))
                state = fsh.checkpoint.restore(manager, init, hooks)
            except fsh.SurgeryError as error:
                told = {"error": type(error).__name__, "says": str(error)}
    save(out / f"{rank}.npz", {"params": state.params, "opt_state": state.opt_state, "surgery": state.surgery})
    return {**told, "records": len(hooks.ledger.records)}


def sparse(out, port, rank, count):
    """A sparse run over all processes, fired by the hosts; cut off, and gone on with in graph."""
    import sparse_run
    from resumed import open_manager

    connect(port, rank, count)
    whole_run = sparse_run.make_hooks(out / f"{rank}.jsonl", only=("rigl",), agree_secs=60)
    with open_manager(out / "checkpoints") as manager:
        state = sparse_run.run(whole_run, sparse_run.initial(whole_run, "auto")(), 7, "host", manager)
    again = sparse_run.make_hooks(only=("rigl",), agree_secs=60)
    with open_manager(out / "checkpoints") as manager:
        resumed = fsh.checkpoint.restore(manager, sparse_run.initial(again, "auto"), again, step=3)
    resumed = sparse_run.run(again, resumed, 7, "graph")
    save(out / f"{rank}.npz", {"params": state.params, "opt_state": state.opt_state, "masks": state.surgery["memory"]})
    save(out / f"again{rank}.npz", {"params": resumed.params, "masks": resumed.surgery["memory"]})
    with np.load(out / f"{rank}.npz") as held, np.load(out / f"again{rank}.npz") as other:
        same = [bool(other[name].tobytes() == held[name].tobytes()) for name in other]
    return {"same": all(same), "compared": len(same)}


def make_plain_step():
    def step(state):
        return state.apply_gradients(grads=jax.tree.map(jnp.sin, state.params))

    return jax.jit(step, donate_argnums=0)


SCENARIOS = {
    "go_on": go_on,
    "grow_and_save": grow_and_save,
    "put_back": put_back,
    "train": train,
    "sparse": sparse,
    "slow": lambda *where: train(*where, slow_secs=5.0),
    "dies_later": dies_later,
    "disagree": disagree,
    "dies_first": dies_first,
}


if __name__ == "__main__":
    scenario, out, *numbers = sys.argv[1:]
    print(json.dumps(SCENARIOS[scenario](pathlib.Path(out), *map(int, numbers))), flush=True)
    if scenario == "dies_first":
        os._exit(0)  # at its exit JAX would wait for the dead process
