"""Laws of training on after an edit: nothing drifts, nothing stops, nothing is compiled again. In float32.

Optimizers run side by side in one state, as for the other laws; one compiled program per edit serves all of them, and
all factors of a scale.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_surgery_hooks as fsh
from flax_surgery_hooks.testing import streams
from flax_surgery_hooks.testing.edits import SMALL
from flax_surgery_hooks.testing.rows import RULES, OptimizerRow

AHEAD = 5
"""Steps within which a kernel moves as a whole: some optimizers wait for several gradients before they move."""
BIAS = 4
"""Numbers of the bias, which come first in one vector for all parameters."""
UPDATES = "updates"
"""What a problem is with, where it is none of a slot."""


@dataclass(frozen=True, eq=False)
class Trained:
    """Optimizers side by side after the recorded steps.

    Attributes:
      rows: the optimizers.
      tx: all of them as one `GradientTransformation`.
      params: what they have been trained on, {"kernel": [3, 4], "bias": [4]}.
      opt_state: theirs, with a field per row.
      step: compiled (gradients, state, parameters per row, loss) -> (new parameters per row, updates per row, state).
      traces: as long as the number of times that `step` was traced.
    """

    rows: tuple[OptimizerRow, ...]
    tx: Any
    params: Any
    opt_state: Any
    step: Callable[..., Any]
    traces: list[None]

    def onward(self, params: Any, opt_state: Any) -> Iterator[tuple[list[np.ndarray], Any]]:
        """Per further step, the kernel's updates of each row and the new state."""
        each = [params] * len(self.rows)
        for step in range(streams.STEPS, streams.STEPS + AHEAD):
            grads = streams.mapped_gradient(step, SMALL)
            grads["kernel"] = jnp.resize(grads["kernel"], params["kernel"].shape)
            each, updates, opt_state = self.step(grads, opt_state, each, jnp.asarray(2.0 - 0.1 * step))
            yield [np.asarray(update["kernel"]) for update in updates], opt_state


@functools.lru_cache(maxsize=8)
def trained(rows: tuple[OptimizerRow, ...]) -> Trained:
    """Optimizers of distinct names after the recorded steps."""
    tx, transforms = streams.beside(rows), streams.transforms(rows)
    traces: list[None] = []

    @jax.jit
    def step(grads: Any, opt_state: Any, each: list[Any], value: Any) -> Any:
        traces.append(None)
        done = []
        for row, one, held, params in zip(rows, transforms, opt_state, each, strict=True):
            given = streams.extra_args(grads, params, value)
            done.append(one.update(grads, held, params, **{name: given[name] for name in row.asks}))
        moved = [optax.apply_updates(params, updates) for params, (updates, _) in zip(each, done, strict=True)]
        return moved, [updates for updates, _ in done], type(opt_state)(*(new for _, new in done))

    opt_state = tx.init(streams.mapped_params(0, SMALL))
    for at in range(streams.STEPS):
        each = [streams.mapped_params(at, SMALL)] * len(rows)
        opt_state = step(streams.mapped_gradient(at, SMALL), opt_state, each, jnp.asarray(2.0 - 0.1 * at))[2]
    return Trained(rows, tx, streams.mapped_params(streams.STEPS, SMALL), opt_state, step, traces)


@dataclass(frozen=True)
class Problem:
    """Where a law does not hold for an optimizer.

    Attributes:
      law: its name.
      edit: the name of the edit.
      rule: "transport" or "carry", or what `fsh.operate` was given instead.
      field: key path in the optimizer's state, such as "[0].mu['kernel']", or "updates".
      says: what is wrong, after "the field".
    """

    law: str
    edit: str
    rule: Any
    field: str
    says: str


Found = Iterator[tuple[int, str, str]]
"""The place of an optimizer, a field of its state, and what is wrong with it."""


@dataclass(frozen=True)
class Law:
    """What holds after edits of some sort.

    Attributes:
      says: it, in words.
      edits: surgeries of one kernel [3, 4] by name; a `factor` [3, 4] that they take is that of `factors`.
      found: from optimizers, a surgery, a rule and a factor to where it does not hold.
      factors: by the name of an edit what its `factor` is, if not 1.
    """

    says: str
    edits: Mapping[str, Any]
    found: Callable[[Trained, Any, Any, np.ndarray], Found]
    factors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def findings(rows: tuple[OptimizerRow, ...], law: str, rule: Any) -> Mapping[str, tuple[Problem, ...]]:
    """Where a law does not hold for several optimizers at once, by their names, exemptions left aside.

    Args:
      rows: the optimizers, of distinct names.
      law: a key of `STABILITY`.
      rule: "transport" or "carry", or any other that `fsh.operate` takes.
    """
    return problems(rows, law, STABILITY[law], rule)


def problems(rows: tuple[OptimizerRow, ...], name: str, law: Law, rule: Any) -> Mapping[str, tuple[Problem, ...]]:
    """`findings` of a law that need not be one of the table."""
    state, found = trained(rows), dict[str, list[Problem]]({row.name: [] for row in rows})
    for edit, surgery in law.edits.items():
        factor = np.broadcast_to(np.asarray(law.factors.get(edit, 1.0), np.float32), SMALL)
        for place, field, says in law.found(state, surgery, rule, factor):
            found[rows[place].name].append(Problem(name, edit, rule, field, says))
    return {row: tuple(each) for row, each in found.items()}


def judge(row: OptimizerRow, law: str, rule: str, found: tuple[Problem, ...]) -> list[str]:
    """What is wrong, in words: problems that no exemption of the row explains, and exemptions that explain none."""
    left = [one for one in found if not any(exempt.covers(one) for exempt in row.exempt)]
    wrong = [f"after {one.edit} under {rule} {one.field} {one.says}" for one in left]
    for exempt in row.exempt:
        if exempt.law != law or rule not in exempt.rules:
            continue
        for edit in exempt.edits or STABILITY[law].edits:
            if not any(exempt.covers(one) for one in found if one.edit == edit):
                wrong.append(f"after {edit} under {rule} the law holds: remove {exempt.fields} from `exempt`")
    return wrong


def check_stability(row: OptimizerRow) -> None:
    """Checks all laws of `STABILITY` for an optimizer, under both rules.

    Args:
      row: the optimizer.

    Raises:
      AssertionError: a law does not hold and the row does not exempt from it, or holds and the row does.
      SurgeryError: what `fsh.operate` raises.

    >>> import optax
    >>> check_stability(OptimizerRow("mine", lambda: optax.chain(optax.trace(0.9), optax.scale(-0.1))))
    """
    for law in STABILITY:
        for rule in RULES:
            wrong = judge(row, law, rule, findings((row,), law, rule)[row.name])
            if wrong:
                raise AssertionError(f"{row.name}, {law} ({STABILITY[law].says}): " + "; ".join(wrong))


# What happens to optimizers side by side


@functools.lru_cache(maxsize=64)
def _program(state: Trained, surgery: Any, rule: Any) -> Callable[..., Any]:
    def fire(params: Any, opt_state: Any, factor: Any) -> Any:
        bound = fsh.bind(params=params, opt_state=opt_state, tx=state.tx)
        inputs = {"factor": factor}
        new, _ = fsh.operate(
            bound, surgery, params="kernel", opt_state=rule, guard="off", inputs=inputs, key=streams.key()
        )
        return new.params, new.opt_state

    return jax.jit(fire)


def _leaves(state: Any) -> Iterator[tuple[int, str, Any]]:
    """The leaves with the place of their optimizer and the key path within its state; no keys of `jax.random`."""
    for place, one in enumerate(state):
        for path, leaf in streams.of_row((one,), 0).items():
            yield place, path, leaf


def changed(before: Any, after: Any, where: np.ndarray | None = None) -> Found:
    """The leaves that are not bitwise equal; of those that hold a number per element, only where it is asked."""
    for (place, path, old), (_, _, new) in zip(_leaves(before), _leaves(after), strict=True):
        chosen = _chosen(old, where)
        if old.dtype != new.dtype or old[chosen].tobytes() != new[chosen].tobytes():
            yield place, path, "changes"


def _chosen(leaf: np.ndarray, where: np.ndarray | None) -> Any:
    """The elements of a leaf of the state that belong to these elements of the kernel, or all where they are shared."""
    if where is not None and leaf.shape[-2:] == where.shape:
        return (..., where)
    if where is not None and leaf.shape == (BIAS + where.size,):  # one vector for all parameters
        return np.concatenate([np.ones(BIAS, bool), where.ravel()])
    return ...


def _drifts(state: Trained, surgery: Any, rule: Any, factor: np.ndarray) -> Found:
    fire = _program(state, surgery, rule)
    params, once = fire(state.params, state.opt_state, factor)
    yield from changed(once, fire(params, once, factor)[1])


def _touches(state: Trained, surgery: Any, rule: Any, factor: np.ndarray) -> Found:
    _, after = _program(state, surgery, rule)(state.params, state.opt_state, factor)
    yield from changed(state.opt_state, after, factor == 1)


def _loses(state: Trained, surgery: Any, rule: Any, factor: np.ndarray) -> Found:
    _, after = _program(state, surgery, rule)(state.params, state.opt_state, factor)
    for (place, path, old), (_, _, new) in zip(_leaves(state.opt_state), _leaves(after), strict=True):
        if not np.issubdtype(old.dtype, np.floating):
            continue
        if not np.isfinite(new[np.isfinite(old)]).all() or (new[np.abs(old) > 1e-10] == 0).any():
            yield place, path, "becomes 0 or infinite"


def _stops(state: Trained, surgery: Any, rule: Any, factor: np.ndarray) -> Found:
    bound = fsh.bind(params=state.params, opt_state=state.opt_state, tx=state.tx)
    after, _ = fsh.operate(bound, surgery, params="kernel", opt_state=rule, guard="off", key=streams.key())
    without = [updates for updates, _ in state.onward(state.params, state.opt_state)]
    traced = len(state.traces)
    (first, new), *later = state.onward(after.params, after.opt_state)
    same_shape = after.params["kernel"].shape == SMALL
    retyped = {*_retyped(after.opt_state, new), *(_retyped(state.opt_state, after.opt_state) if same_shape else ())}
    again = len(state.traces) - traced > (0 if same_shape else 1)
    for place in sorted(retyped) or (range(len(state.rows)) if again else ()):
        yield place, UPDATES, "are compiled again"
    steps = [first, *(updates for updates, _ in later)]
    for place in range(len(state.rows)):
        yield from _still(place, [each[place] for each in without], [each[place] for each in steps])


def _retyped(before: Any, after: Any) -> Iterator[int]:
    """The places of optimizers whose state is of another structure, shape or dtype."""
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        types = [jax.tree.map(_type, one) for one in (old, new)]
        if types[0] != types[1]:
            yield place


def _type(leaf: Any) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)


def _still(place: int, without: list[np.ndarray], steps: list[np.ndarray]) -> Found:
    """Compares updates of the same steps, without an edit and after it."""
    if not all(np.isfinite(updates).all() for updates in steps):
        yield place, UPDATES, "are not finite"
    moving = [step for step, updates in enumerate(without) if (updates != 0).all()]
    if not moving:
        yield place, UPDATES, f"do not move the whole kernel within {AHEAD} steps even without an edit"
    elif (steps[moving[0]] == 0).any():
        yield place, UPDATES, "are 0 somewhere, where they would not be without the edit"


# The table


def _prune(kernel: Any) -> Any:
    return jnp.where(jnp.abs(kernel) >= jnp.sort(jnp.abs(kernel).ravel())[kernel.size // 2], kernel, 0)


def _project(kernel: Any) -> Any:
    norm = jnp.sqrt(jnp.sum(kernel * kernel, axis=0, keepdims=True))
    shrunk = kernel / jax.lax.stop_gradient(norm)
    return jnp.where(norm > 1.0001, shrunk, kernel)  # a little above: what has been projected is 1 up to rounding


def scale(kernel: Any, factor: Any) -> Any:
    """An edit by an input: one program for all factors."""
    return kernel * factor


_IDEMPOTENT: dict[str, Callable[[Any], Any]] = {
    "clip": lambda kernel: jnp.clip(kernel, -0.5, 0.5),
    "maximum": lambda kernel: jnp.maximum(kernel, 0.1),
    "project": _project,
    "prune": _prune,
}
_ONWARD: dict[str, Callable[[Any], Any]] = {
    "reinitialise": lambda kernel: kernel.at[0].set(0.5),
    "pad": lambda kernel: jnp.concatenate([kernel, jnp.ones(SMALL)]),
}
_EXTREME = (1e-10, 1e-5, 1e5, 1e10)

STABILITY: dict[str, Law] = {
    "identity": Law("an edit that changes nothing changes no slot", {"scale by 1": scale}, _touches),
    "untouched": Law(
        "elements that an edit leaves as they are keep their slots bitwise",
        {"scale one row": scale},
        _touches,
        {"scale one row": np.array([[3.0], [1.0], [1.0]])},
    ),
    "idempotent": Law("the second fire of an edit that then changes nothing changes no slot", _IDEMPOTENT, _drifts),
    "extreme": Law(
        "what is not 0 stays so, and finite, when weights are scaled by any sensible factor",
        {f"scale by {factor:g}": scale for factor in _EXTREME},
        _loses,
        {f"scale by {factor:g}": np.asarray(factor) for factor in _EXTREME},
    ),
    "onward": Law(
        "updates keep structure and dtypes, are compiled again only for a new shape, and move all that they would have",
        _ONWARD,
        _stops,
    ),
}
"""The laws by name."""
