"""The table of surgeries: those of the catalogue that edit parameters, each with what it does written out in NumPy.

A surgery is an edit whose numbers depend on the kernel that it is given; on the recorded one it is an `EditRow`, so
that the laws of edits hold for it, and those of training on.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks import surgeries, units
from flax_surgery_hooks.testing import laws, stability, streams
from flax_surgery_hooks.testing.edits import FRESH, SMALL, EditRow
from flax_surgery_hooks.testing.edits import row as edit_row
from flax_surgery_hooks.testing.optimizers import OPTIMIZERS
from flax_surgery_hooks.testing.rows import RULES, OptimizerRow

REPRESENTATIVES = (
    "adafactor", "adam", "adamax", "lion", "masked", "momentum", "MultiSteps", "rmsprop_momentum",
    "schedule_free_adamw",
)  # fmt: skip
"""Optimizers that have between them a slot of each kind and two layouts, a mask, and a count of steps."""


@dataclass(frozen=True, eq=False)
class SurgeryRow:
    """A surgery that the laws are checked on.

    Attributes:
      name: of the row, unique.
      surgery: what `fsh.operate` is given; it may draw with `key`.
      oracle: from a kernel (float64, [3, 4]) to what the surgery does to it, in NumPy: keyword arguments of
        `flax_surgery_hooks.testing.edits.row`. `factor` is what elements are multiplied by, `share` what their gradient
        is multiplied by where the model computes the same (1 / factor), `wrong_share` a mistake of it that must show,
        `offset` what is added as a constant, `constant` what elements without history hold, `source` which those are
        (-1) and whence the others come. What is left out is that of an edit that changes nothing.
      like: name of the edit of `EDITS` whose laws hold for each optimizer: "scale" for one factor, "scale_rows" for
        some, "reinitialise" where elements have no history.
      rules: the rules that it can be used with.
      idempotent: whether the second fire changes no slot, bitwise.

    A row of one's own inherits every law:

    >>> row = SurgeryRow(
    ...     "halve", lambda kernel: kernel / 2, lambda kernel: {"factor": 0.5, "share": 2.0, "wrong_share": 0.5}
    ... )
    >>> check_surgery(row, ["momentum"])
    """

    name: str
    surgery: Any
    oracle: Callable[[np.ndarray], Mapping[str, Any]]
    like: str = "scale"
    rules: tuple[str, ...] = RULES
    idempotent: bool = False

    @functools.cached_property
    def edit(self) -> EditRow:
        """What it does to the recorded kernel."""
        with streams.enable_x64(True):
            kernel = streams.params_at(streams.STEPS, SMALL)["kernel"]
            said: dict[str, Any] = {"source": np.arange(kernel.size).reshape(SMALL), "like": self.like}
            said |= self.oracle(kernel)
            return edit_row(self.name, self.surgery, **said)


def check_surgery(row: SurgeryRow, optimizers: Sequence[str] = REPRESENTATIVES) -> None:
    """Checks all that holds of a surgery, under each of its rules and for each of these optimizers.

    The new parameters and every slot are what the oracle says, in float64: under "transport" those of the optimizer run
    on gradients mapped by hand, under "carry" those of its element. A mistake in the oracle's shares shows. Then
    training goes on, as after every edit.

    Args:
      row: the surgery.
      optimizers: keys of `OPTIMIZERS`.

    Raises:
      AssertionError: something is not what the row says.
      SurgeryError: what `fsh.operate` raises.
    """
    rows = tuple(OPTIMIZERS[name] for name in optimizers)
    for rule in row.rules:
        wrong = list(complaints(row, rows, rule))
        if wrong:
            raise AssertionError(f"{row.name} under {rule}: " + "; ".join(wrong))


def complaints(row: SurgeryRow, rows: tuple[OptimizerRow, ...], rule: str) -> Iterator[str]:
    """What is wrong with a surgery under a rule, in words; see `check_surgery`."""
    for name, finding in laws.findings(rows, row.edit, rule).items():
        yield from (f"{name}: {problem}" for problem in finding.problems)
        yield from (f"{name}: {slot} would not show a mistake" for slot in finding.undetected)
    for name in ("onward", *(["idempotent"] if row.idempotent else [])):
        law = stability.Law(stability.STABILITY[name].says, {row.name: row.surgery}, stability.STABILITY[name].found)
        for each, found in stability.problems(rows, name, law, rule).items():
            yield from (f"{each}: {name}: {one.field} {one.says}" for one in found)


@dataclass(frozen=True, eq=False)
class Beside:
    """A surgery of several leaves, as an edit of one of them beside others that stay what they are.

    Attributes:
      surgery: the surgery; it takes the dict of leaves.
      path: under which it gets the leaf that is edited.
      others: path -> the other leaves, NumPy arrays.
      inputs: makes the further arguments of the surgery.
    """

    surgery: Any
    path: str
    others: Mapping[str, np.ndarray]
    inputs: Callable[[], Mapping[str, Any]] = dict

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """The edited leaf."""
        others = {path: jnp.asarray(other, leaf.dtype) for path, other in self.others.items()}
        return self.surgery({self.path: leaf, **others}, **self.inputs())[self.path]


# The catalogue


def _scaling(factor: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], dict[str, Any]]:
    """The oracle of a surgery that multiplies by what it reads off the kernel: the mistake is the factor as share."""

    def oracle(kernel: np.ndarray) -> dict[str, Any]:
        by = np.asarray(factor(kernel), np.float64)
        return {"factor": by, "share": 1 / by, "wrong_share": 1.5 * by}

    return oracle


def _norms(kernel: np.ndarray) -> np.ndarray:
    return np.sqrt((kernel**2).sum(axis=0, keepdims=True))


def _drawn(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.normal(key, SMALL, jnp.float64))


def _noise(std: float, relative: bool) -> Callable[[np.ndarray], dict[str, Any]]:
    def oracle(kernel: np.ndarray) -> dict[str, Any]:
        size = np.sqrt(np.mean(kernel**2)) if relative else 1.0
        key = jax.random.fold_in(streams.key(), zlib.crc32(b"kernel"))
        return {"offset": std * size * _drawn(key), "wrong_share": 2.0}

    return oracle


def _anew(values: Callable[[], Any]) -> Callable[[np.ndarray], dict[str, Any]]:
    return lambda kernel: {"source": np.full(SMALL, FRESH), "constant": values()}


_VALUES = 0.1 * np.arange(1.0, 5.0)
_OTHERS = 0.1 * np.cos(np.arange(12.0)).reshape(SMALL)
_initial = jax.nn.initializers.normal(0.1)


def _model(key: jax.Array) -> dict[str, jax.Array]:
    return {"kernel": 0.1 * jax.random.normal(key, SMALL), "bias": jnp.zeros(4)}


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Which elements are the `count` largest."""
    return scores >= np.sort(scores, axis=None)[-count]


def _dropping(kept: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], dict[str, Any]]:
    """The oracle of a surgery that leaves zeros with the history of their elements: of a constant that is added."""
    return lambda kernel: {"offset": np.where(kept(kernel), 0, -kernel), "wrong_share": 2.0}


def _truncating(rank: int) -> Callable[[np.ndarray], dict[str, Any]]:
    """The oracle of what takes the place of a kernel element by element: of a constant that is added."""

    def oracle(kernel: np.ndarray) -> dict[str, Any]:
        left, sizes, right = np.linalg.svd(kernel, full_matrices=False)
        return {"offset": (left[:, :rank] * sizes[:rank]) @ right[:rank] - kernel, "wrong_share": 2.0}

    return oracle


def _exchanging(
    count: int, moved: int, growth: Callable[[jax.Array], np.ndarray]
) -> Callable[[np.ndarray], dict[str, Any]]:
    """The oracle of sparse training: what is dropped keeps its history, and what is grown has none."""

    def oracle(kernel: np.ndarray) -> dict[str, Any]:
        held = _largest(_uniform(jax.random.fold_in(streams.key(), zlib.crc32(b"init_memory"))), count)
        stay = _largest(np.where(held, np.abs(kernel), -1), count - moved)
        taken = _largest(np.where(stay, -1, growth(streams.key())), moved)
        source = np.where(taken & ~held, FRESH, np.arange(kernel.size).reshape(SMALL))
        return {"source": source, "offset": np.where(stay | (taken & held), 0, -kernel), "wrong_share": 2.0}

    return oracle


_DORMANT = np.array([0.0, 3.0, 0.01, 5.0]), np.array([1.0, 0.0, 1.0])
"""What the units of columns and those of rows do: of the former two are dormant, of the latter one."""
_UNITS = (units.Units("columns", {"kernel": 1}, {}), units.Units("rows", {}, {"kernel": 0}))


def _of_state(state: Any) -> dict[str, jax.Array]:
    return {one.activation: jnp.asarray(done)[None] for one, done in zip(_UNITS, _DORMANT, strict=True)}


def _recycling(columns: list[int], rows: list[int]) -> Callable[[np.ndarray], dict[str, Any]]:
    """The oracle of units drawn anew: columns are those of a fresh draw, then rows are zero."""

    def oracle(kernel: np.ndarray) -> dict[str, Any]:
        column, row = np.isin(np.arange(4), columns)[None, :], np.isin(np.arange(3), rows)[:, None]
        source = np.where(column | row, FRESH, np.arange(kernel.size).reshape(SMALL))
        constant = np.where(row, 0, 0.1 * _drawn(streams.key()))
        return {"source": source, "constant": constant, "wrong_source": np.roll(source, 1, axis=1)}

    return oracle


def _uniform(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.uniform(jax.random.fold_in(key, zlib.crc32(b"kernel")), SMALL))


_TWICE = np.tile(np.arange(12).reshape(SMALL), (2, 1))
_GRADIENT = np.sin(np.arange(1.0, 13.0)).reshape(SMALL)
_OUT = np.cos(np.arange(1.0, 9.0)).reshape(4, 2)
_TABLE = (
    SurgeryRow("Scale", surgeries.Scale(-0.5), _scaling(lambda kernel: -0.5)),
    SurgeryRow("Normalize", surgeries.Normalize(), _scaling(lambda kernel: 1 / np.linalg.norm(kernel))),
    SurgeryRow(
        "Normalize_axis", surgeries.Normalize(axis=0, to=2.0), _scaling(lambda kernel: 2 / _norms(kernel)), "scale_rows"
    ),
    SurgeryRow(
        "ClipNorm",
        surgeries.ClipNorm(1.5),
        _scaling(lambda kernel: min(1.0, 1.5 / np.linalg.norm(kernel))),
        idempotent=True,
    ),
    SurgeryRow(
        "ClipNorm_axis",
        surgeries.ClipNorm(1.3, axis=0),
        _scaling(lambda kernel: np.minimum(1.0, 1.3 / _norms(kernel))),
        "scale_rows",
        idempotent=True,
    ),
    SurgeryRow(
        "ClipNorm_spectral",
        surgeries.ClipNorm(1.2, norm="spectral"),
        _scaling(lambda kernel: min(1.0, 1.2 / np.linalg.norm(kernel, 2))),
        idempotent=True,
    ),
    SurgeryRow(
        "Balance",
        Beside(surgeries.Balance("in", "out"), "in/kernel", {"out/kernel": _OUT}),
        _scaling(lambda kernel: np.sqrt(np.linalg.norm(_OUT, axis=1) / _norms(kernel))),
        "scale_rows",
    ),
    SurgeryRow(
        "QKClip",
        Beside(
            surgeries.QKClip(tau=100.0, alpha=0.25, heads=2),
            "query/kernel",
            {"key/kernel": np.ones((3, 4))},
            lambda: {"max_logits": np.array([400.0, 50.0]), "beside": {}},
        ),
        _scaling(lambda kernel: np.array([0.25**0.25, 0.25**0.25, 1.0, 1.0])),
        "scale_rows",
    ),
    SurgeryRow("Noise", surgeries.Noise(0.1), _noise(0.1, relative=True)),
    SurgeryRow("Noise_absolute", surgeries.Noise(0.1, relative=False), _noise(0.1, relative=False)),
    SurgeryRow("Assign", surgeries.Assign(_VALUES), _anew(lambda: _VALUES), "reinitialise"),
    SurgeryRow(
        "Graft",
        surgeries.Graft({"body": {"kernel": _OTHERS}}, paths=("^", "body/")),
        _anew(lambda: _OTHERS),
        "reinitialise",
    ),
    SurgeryRow(
        "Reinit",
        surgeries.Reinit(initializer=_initial),
        _anew(lambda: 0.1 * _drawn(jax.random.fold_in(streams.key(), zlib.crc32(b"kernel")))),
        "reinitialise",
    ),
    SurgeryRow(
        "Reinit_model", surgeries.Reinit(init=_model), _anew(lambda: 0.1 * _drawn(streams.key())), "reinitialise"
    ),
    SurgeryRow(
        "ShrinkAndPerturb",
        surgeries.ShrinkAndPerturb(_model, shrink=0.5, perturb=0.3),
        lambda kernel: {"factor": 0.5, "share": 2.0, "wrong_share": 0.5, "offset": 0.03 * _drawn(streams.key())},
    ),
    SurgeryRow(
        "RecycleDormant",
        surgeries.RecycleDormant(_UNITS, _model, activations=_of_state),
        _recycling([0, 2], [1]),
        "reinitialise",
    ),
    SurgeryRow(
        "ContinualBackprop",
        surgeries.ContinualBackprop(_UNITS, _model, activations=_of_state, rate=0.4, maturity=0),
        _recycling([0], [1]),
        "reinitialise",
    ),
    SurgeryRow("Factorize", surgeries.Factorize(2), _truncating(2)),
    SurgeryRow(
        "Widen_incoming",
        surgeries.Widen(units.Units("rows", {"kernel": 0}, {}), to=6),
        lambda kernel: {"source": _TWICE, "share": 0.5, "wrong_share": 1.0},
        "duplicate_in",
    ),
    SurgeryRow(
        "Widen_outgoing",
        surgeries.Widen(units.Units("rows", {}, {"kernel": 0}), to=6),
        lambda kernel: {"source": _TWICE, "factor": 0.5, "wrong_share": 0.5},
        "duplicate_out",
    ),
    SurgeryRow(
        "Widen_unequal",
        surgeries.Widen(units.Units("rows", {"kernel": 0}, {}), to=6, split=0.7),
        lambda kernel: {"source": _TWICE, "share": np.repeat([[0.7], [0.3]], 3, axis=0), "wrong_share": 0.5},
        "duplicate_unequal",
    ),
    SurgeryRow("Prune", surgeries.Prune(0.5), _dropping(lambda kernel: _largest(np.abs(kernel), 6)), idempotent=True),
    SurgeryRow(
        "SET",
        surgeries.SET(0.5, fraction=0.5, anneal="constant"),
        _exchanging(6, 3, _uniform),
        "reinitialise",
    ),
    SurgeryRow(
        "RigL",
        surgeries.RigL(0.5, fraction=0.5, anneal="constant", grads=lambda state: {"kernel": jnp.asarray(_GRADIENT)}),
        _exchanging(6, 3, lambda key: np.abs(_GRADIENT)),
        "reinitialise",
    ),
)

SURGERIES: dict[str, SurgeryRow] = {row.name: row for row in _TABLE}
"""The rows by name."""
