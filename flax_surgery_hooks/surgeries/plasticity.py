"""Plasticity: what keeps a network able to learn, by shrinking it or by drawing units anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted
from flax_surgery_hooks.surgeries.masks import Arrays
from flax_surgery_hooks.surgeries.values import drawn_by
from flax_surgery_hooks.units.groups import Units, as_groups

Chosen = Mapping[str, jax.Array]
"""Name of the activation -> bool flags, [units] or [layers, units]."""
INIT = 'init=lambda key: model.init(key, batch)["params"]'


@dataclass(frozen=True)
class ShrinkAndPerturb:
    """Shrinks leaves and adds a little of a fresh draw: `shrink * leaf + perturb * fresh`.

    `fresh` is drawn by the model's own initialisers, so that each layer gets noise of its own size. Every element keeps
    its history: slots are carried. In the paper a new optimizer is made instead; that is `opt_state="reset"`.

    The gain of a norm is 1 at first and becomes `shrink + perturb` or less; leave it out with `exclude="**/scale"`,
    unless that is wanted. `shrink=0` and `perturb=1` is `Reinit`.

    Args:
      init: `init(key) -> params`, such as `lambda key: model.init(key, batch)["params"]`.
      shrink: what leaves are multiplied by, 0 to 1.
      perturb: what the fresh draw is multiplied by, at least 0.

    Source: Ash & Adams 2020 (arXiv 1910.08475); the defaults are those of its published code.

    >>> surgery = ShrinkAndPerturb(lambda key: {"w": jnp.ones(2)}, shrink=0.5, perturb=0.25)
    >>> surgery({"w": jnp.array([2.0, 4.0])}, jax.random.key(0))["w"].tolist()
    [1.25, 2.25]
    """

    init: Callable[[jax.Array], Any]
    shrink: float = 0.4
    perturb: float = 0.1
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        _check_init("ShrinkAndPerturb", self.init)
        _check_number("ShrinkAndPerturb", "shrink", self.shrink, 0, 1)
        _check_number("ShrinkAndPerturb", "perturb", self.perturb, 0)

    def __call__(self, leaves: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        """The edited leaves."""
        fresh = drawn_by(self.init, key, leaves, "ShrinkAndPerturb")
        return {path: self.shrink * leaf + self.perturb * fresh[path] for path, leaf in leaves.items()}


@dataclass(frozen=True)
class RecycleDormant:
    """Draws units anew that do next to nothing, "ReDo".

    A unit is dormant if its score `E|h_i| / mean_j E|h_j|` is at most `tau`: its mean activity on a batch (over space
    too), over that of its layer. What makes it is drawn anew by the model's own initialisers, kernel, bias and norm;
    what reads it becomes 0, so that what is new is unheard at first. An element between two recycled units becomes 0.
    These elements are fresh, in every slot; all others, and their slots, stay bit for bit. With `tau=0` and ReLU the
    output on the batch does not change at all: only units that are exactly 0 on it are recycled.

    A layer whose units are all 0 has no scores (0 / 0). It is left alone, so that a batch of blanks destroys nothing,
    and the figures tell of it: a share of 1 and none recycled. `dead_layers="recycle"` draws it anew.

    The activity is that of the function behind which it is small when a unit is of no use, ReLU and its kin; a tanh
    that is stuck at 1 is dormant to no such score.

    Args:
      units: `fsh.units.Units`, one or several; `fsh.units.find` finds them. Not those of the output.
      init: `init(key) -> params`, such as `lambda key: model.init(key, batch)["params"]`.
      activations: from the state, and inputs of the train loop such as a batch, to {name: array [..., units]};
        `fsh.units.activations(model)` makes such a function. It is called when the hook fires. None: the loop passes
        `activations=`.
      tau: the largest score of a dormant unit; 0 for units that are exactly 0.
      dead_layers: "keep" or "recycle" a layer all of whose units are 0.

    Source: Sokar et al. 2023 (arXiv 2302.12902), with every 1,000 steps; its moments of zero are `fresh="init"`.

    >>> import optax, flax_surgery_hooks as fsh
    >>> params = {"into": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
    >>> state = fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    >>> surgery = RecycleDormant(
    ...     fsh.units.Units("h", {"into": 1}, {"out": 0}),
    ...     init=lambda key: {"into": jnp.full((2, 3), 5.0), "out": jnp.ones((3, 1))},
    ...     activations=lambda state: {"h": jnp.array([[1.0, 0.0, 2.0]])},
    ... )
    >>> state, record = fsh.operate(state, surgery, key=jax.random.key(0))
    >>> state.params["into"][0].tolist(), state.params["out"][:, 0].tolist()
    ([1.0, 5.0, 1.0], [1.0, 0.0, 1.0])
    >>> record.figures["dormant/recycled/h"].item()
    1.0
    """

    units: Units | tuple[Units, ...]
    init: Callable[[jax.Array], Any]
    activations: Callable[..., Any] | None = None
    tau: float = 0.025
    dead_layers: Literal["keep", "recycle"] = "keep"
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        object.__setattr__(self, "units", as_groups(self.units))
        _check_init("RecycleDormant", self.init)
        _check_number("RecycleDormant", "tau", self.tau, 0)
        if self.dead_layers not in ("keep", "recycle"):
            raise SurgeryFunctionError(
                "RecycleDormant(dead_layers=...) is unknown.",
                found=quoted(self.dead_layers),
                write='"keep" or "recycle"',
            )

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """The activations, if they are computed, and which units are dormant."""
        return {**_given(self.activations), "dormant": self._dormant}

    def __call__(self, leaves: Arrays, key: jax.Array, dormant: Any) -> dict[str, jax.Array]:
        """The edited leaves."""
        chosen = {group.activation: dormant[group.activation]["recycled"] for group in as_groups(self.units)}
        return _renewed(as_groups(self.units), leaves, chosen, self.init, key, "RecycleDormant")

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """For each group: the `share` of units that are dormant, and how many are `recycled`."""
        groups = as_groups(self.units)
        return tuple(f"dormant/{told}/{group.activation}" for group in groups for told in ("share", "recycled"))

    def figures(self, leaves: Arrays, dormant: Any) -> dict[str, Any]:
        """The figures of all layers of a group together."""
        told = {}
        for name, found in dormant.items():
            told[f"dormant/share/{name}"] = jnp.mean(jnp.where(found["dormant"], 1.0, 0.0))
            told[f"dormant/recycled/{name}"] = jnp.sum(jnp.where(found["recycled"], 1.0, 0.0))
        return told

    def _dormant(self, leaves: Arrays, activations: Any) -> dict[str, dict[str, jax.Array]]:
        found = {}
        for group in as_groups(self.units):
            size = group.mean(jnp.abs(group.activity(leaves, activations)))
            layer = jnp.mean(size, axis=-1, keepdims=True)
            dormant = size <= self.tau * layer
            recycled = dormant if self.dead_layers == "recycle" else dormant & (layer > 0)
            found[group.activation] = {"dormant": dormant, "recycled": recycled}
        return found


@dataclass(frozen=True)
class ContinualBackprop:
    """Draws the least useful units anew, a few at every fire, "continual backpropagation".

    At each fire, in each layer, with `E` the mean over a batch (and space):

        age     = age + 1
        utility = decay * utility + (1 - decay) * E|h| * sum|outgoing|,   over 1 - decay^age to correct its start
        owed    = owed + rate * (number of units with age > maturity)

    and as many of these units are replaced, those of least utility, of equal ones the first, as there are whole numbers
    in `owed`, which they are taken off. Over T fires with n such units that is floor(rate * n * T), exactly: `owed` is
    kept in integers. What makes a replaced unit is drawn anew by the model's own initialisers, what reads it becomes 0
    (also between two replaced units), its age and utility too. These elements are fresh in every slot; all others, but
    for the compensation, stay bit for bit. Ages, `maturity` and `rate` count fires: with `every(10)`, ten steps each.

    Args:
      units: `fsh.units.Units`, one or several; `fsh.units.find` finds them. Not those of the output.
      init: `init(key) -> params`, such as `lambda key: model.init(key, batch)["params"]`.
      activations: from the state, and inputs of the train loop such as a batch, to {name: array [..., units]};
        `fsh.units.activations(model)` makes such a function. None: the loop, or the train step in graph, passes
        `activations=`, which then cost no further pass.
      rate: the share of mature units that are replaced in a fire, 0 to 1; a fraction whose denominator is at most a
        million is taken exactly.
      maturity: how many fires a new unit is safe.
      decay: of the averages, 0 up to but not 1.
      compensate: whether the bias beside each outgoing kernel takes over the mean that a replaced unit contributed,
        outgoing * the (corrected) average of h, so that the mean of what the next layer gets stays (behind a padded
        convolution, but for its border). A bias keeps its slots.

    Source: Dohare et al. 2024 (Nature 632; arXiv 2306.13812). Its code for `compensate` forgets the mean before it
    uses it; here it is used first.

    >>> import flax_surgery_hooks as fsh
    >>> units = fsh.units.Units("h", {"into": 1}, {"out": 0})
    >>> ContinualBackprop(units, lambda key: {"into": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}).maturity
    100
    """

    units: Units | tuple[Units, ...]
    init: Callable[[jax.Array], Any]
    activations: Callable[..., Any] | None = None
    rate: float = 1e-4
    maturity: int = 100
    decay: float = 0.99
    compensate: bool = False
    preserves: ClassVar[str] = "nothing"
    starts_anew: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "units", as_groups(self.units))
        _check_init("ContinualBackprop", self.init)
        _check_number("ContinualBackprop", "rate", self.rate, 0, 1)
        _check_number("ContinualBackprop", "decay", self.decay, 0, 1)
        if self.decay == 1:
            raise SurgeryFunctionError(
                "ContinualBackprop(decay=1) would never learn a utility.", found="1", write="decay=0.99"
            )
        if isinstance(self.maturity, bool) or not isinstance(self.maturity, int) or self.maturity < 0:
            raise SurgeryFunctionError(
                "ContinualBackprop(maturity=...) is a number of fires.",
                found=quoted(self.maturity),
                write="maturity=100",
            )

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """The activations, if they are computed, and which units are replaced."""
        return {**_given(self.activations), "replaced": self._replaced}

    def init_memory(self, leaves: Arrays) -> dict[str, dict[str, jax.Array]]:
        """Utility, age and mean activity of every unit, and what is owed of every layer."""
        remembered = {}
        for group in as_groups(self.units):
            shape = group.extent(leaves)
            zeros = jnp.zeros(shape, jnp.float32)
            remembered[group.activation] = {
                "utility": zeros,
                "mean": zeros,
                "age": jnp.zeros(shape, jnp.int32),
                "owed": jnp.zeros(shape[:-1], jnp.int32),
            }
        return remembered

    def __call__(self, leaves: Arrays, memory: Any, key: Any, replaced: Any) -> tuple[dict[str, jax.Array], Any]:
        """The edited leaves, and what is remembered."""
        groups = as_groups(self.units)
        chosen = {name: one["chosen"] for name, one in replaced.items()}
        taken = dict(leaves)
        for group in groups if self.compensate else ():
            taken = _compensated(group, leaves, taken, chosen[group.activation], replaced[group.activation]["mean"])
        new = _renewed(groups, taken, chosen, self.init, key, "ContinualBackprop")
        return new, {name: one["memory"] for name, one in replaced.items()}

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """For each group: how many units are `replaced`, and how many could have been."""
        groups = as_groups(self.units)
        return tuple(f"units/{told}/{group.activation}" for group in groups for told in ("replaced", "mature"))

    def figures(self, leaves: Arrays, replaced: Any) -> dict[str, Any]:
        """The figures of all layers of a group together."""
        told = {}
        for name, found in replaced.items():
            told[f"units/replaced/{name}"] = jnp.sum(jnp.where(found["chosen"], 1.0, 0.0))
            told[f"units/mature/{name}"] = jnp.sum(jnp.where(found["mature"], 1.0, 0.0))
        return told

    def _replaced(self, leaves: Arrays, memory: Any, activations: Any) -> dict[str, Any]:
        return {
            group.activation: self._chosen(group, leaves, memory[group.activation], activations)
            for group in as_groups(self.units)
        }

    def _chosen(self, group: Units, leaves: Arrays, held: Any, activations: Any) -> dict[str, Any]:
        """Which units of a group are replaced, their averages, and what is remembered then."""
        activity = group.activity(leaves, activations)
        age = held["age"] + 1
        utility = self._averaged(held["utility"], group.mean(jnp.abs(activity)) * _read(group, leaves))
        mean = self._averaged(held["mean"], group.mean(activity))
        start = 1 - jnp.float32(self.decay) ** age
        mature = age > self.maturity
        part, whole = self._fraction(utility.shape[-1])
        owed = held["owed"] + part * jnp.sum(mature, axis=-1, dtype=jnp.int32)
        chosen = _least(jnp.where(mature, utility / start, jnp.inf), owed // whole) & mature
        memory = {
            "utility": jnp.where(chosen, 0, utility),
            "mean": jnp.where(chosen, 0, mean),
            "age": jnp.where(chosen, 0, age),
            "owed": owed % whole,
        }
        return {"chosen": chosen, "mature": mature, "mean": mean / start, "memory": memory}

    def _averaged(self, old: jax.Array, new: jax.Array) -> jax.Array:
        return self.decay * old + (1 - self.decay) * new

    def _fraction(self, units: int) -> tuple[int, int]:
        """The rate as (part, whole), such that what is owed by so many units fits an int32."""
        rate = Fraction(str(self.rate))
        most = (2**31 - 1) // (math.ceil(rate * units) + 2)
        near = rate.limit_denominator(min(10**6, most))
        return near.numerator, near.denominator


def _renewed(
    groups: tuple[Units, ...],
    leaves: Arrays,
    chosen: Chosen,
    init: Callable[[jax.Array], Any],
    key: jax.Array,
    surgery: str,
) -> dict[str, jax.Array]:
    """The leaves with what makes the chosen units drawn anew, and then what reads them 0."""
    drawn = drawn_by(init, key, {path: leaves[path] for group in groups for path in group.incoming}, surgery)
    new = dict(leaves)
    for group in groups:
        for path in group.incoming:
            mine = group.elements(path, new[path].shape, chosen[group.activation], group.incoming)
            new[path] = jnp.where(mine, drawn[path], new[path])
    # Last, so that what one recycled unit says to another is 0: neither is heard.
    for group in groups:
        for path in group.outgoing:
            mine = group.elements(path, new[path].shape, chosen[group.activation], group.outgoing)
            new[path] = jnp.where(mine, 0, new[path])
    return new


def _read(group: Units, leaves: Arrays) -> jax.Array:
    """The sum of |outgoing| of each unit; 1 where nothing is said to read it."""
    shape = group.extent(leaves)
    if not group.outgoing:
        return jnp.ones(shape, jnp.float32)
    each = [group.gathered(path, jnp.abs(leaves[path]), shape[-1], group.outgoing) for path in group.outgoing]
    return sum(each, jnp.zeros(())).astype(jnp.float32)


def _least(values: jax.Array, count: jax.Array) -> jax.Array:
    """Which are the `count` least along the last axis, of equal ones the first."""
    rank = jnp.argsort(jnp.argsort(values, axis=-1, stable=True), axis=-1, stable=True)
    return rank < count[..., None]


def _compensated(
    group: Units, before: Arrays, leaves: Mapping[str, Any], chosen: jax.Array, mean: jax.Array
) -> dict[str, jax.Array]:
    """The leaves with biases that take over what the chosen units contributed on average."""
    new = dict(leaves)
    for path in group.outgoing:
        stem, _, _ = path.rpartition("/")
        bias = f"{stem}/bias" if stem else "bias"
        kernel = before[path]
        share = kernel * group.elements(path, kernel.shape, jnp.where(chosen, mean, 0), group.outgoing)
        first = int(group.stacked)
        lost = jnp.sum(share, axis=tuple(range(first, kernel.ndim - 1)))
        if bias not in before or before[bias].shape != lost.shape:
            raise SurgeryFunctionError(
                "ContinualBackprop(compensate=True) needs a bias beside each outgoing kernel, selected with it.",
                path=path,
                found=f"{bias} of shape {list(before[bias].shape)}" if bias in before else f"no {bias}",
                write="compensate=False, or a layer with a bias",
            )
        lost = jax.lax.stop_gradient(lost)
        new[bias] = jnp.where(lost == 0, new[bias], new[bias] + lost)  # -0.0 stays as it is
    return new


def _given(activations: Callable[..., Any] | None) -> dict[str, Callable[..., Any]]:
    return {} if activations is None else {"activations": activations}


def _check_init(surgery: str, init: Any) -> None:
    if not callable(init):
        raise SurgeryFunctionError(f"{surgery}(init=...) is the model's init.", found=quoted(init), write=INIT)


def _check_number(surgery: str, field: str, value: Any, least: float, most: float = math.inf) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise SurgeryFunctionError(f"{surgery}({field}=...) must be a number, {bounds}.", found=quoted(value))
