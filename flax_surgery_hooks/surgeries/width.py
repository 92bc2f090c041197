"""Other numbers of units: more of them, by copies or by fresh ones that are not heard yet, and fewer.

`fsh.units.Units` say along which axes of which leaves the units lie, so that this is the hidden width of an MLP, gated
or not, the channels of convolutions, the heads of an attention, the groups that share a key and value head, or the
residual stream. The hook brings `apply_fn=` of the model with the new widths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import InputError, SurgeryFunctionError, UnitsError, quoted
from flax_surgery_hooks.paths import close_matches, listed
from flax_surgery_hooks.surgeries.values import drawn_by
from flax_surgery_hooks.surgery import key_for
from flax_surgery_hooks.units.groups import Units, as_groups

Arrays = Mapping[str, jax.Array]
Copies = Mapping[str, Mapping[str, jax.Array]]
"""Name of the activation -> `source`, which unit each new one copies, int [new units]; `share`, what part of the
outgoing weights of that unit it gets, float [new units]; and `old`, as long as there were units.
"""


@dataclass(frozen=True)
class Widen:
    """Gives layers more units, without a change of what the model computes.

    `by="copy"` (Net2Net): each new unit copies one that there is, and the copies of a unit share its outgoing weights.
    Moments follow exactly, also where weights lie between two layers that grow, and for uneven shares:

        W'[i, j] = share_in[i] W[c(i), c(j)]     mu' = share_out[j] mu[c(i), c(j)]     nu' = share_out[j]**2 nu[...]

    Copies that share evenly get equal gradients, and stay copies for ever; what tells them apart is a choice: `split`,
    which under Adam does so slowly, or `noise`, which changes what the model computes by about that much. A norm over
    the units (LayerNorm, RMSNorm on the residual stream) computes the same only if all units are copied equally often.

    `by="zero"`: new units are drawn by `init`, and what reads them is zero, so that nothing is heard of them yet and
    they learn from the first step on. All their elements are fresh. No norm over the units may be between.

    Args:
      units: `fsh.units.Units`, one or several; `fsh.units.find` finds them.
      to: how many units there will be in a layer, or name of the activation -> number, where they differ.
      by: "copy" or "zero".
      mapping: which units the new ones copy: "round_robin", from the first on, or "random", drawn with the hook's key.
      split: "even", or the share of the unit itself, above 0 and below 1: its copies share the rest evenly.
      noise: what is added to the incoming weights of copies, relative to the root mean square of their leaf.
      init: for `by="zero"`, `init(key) -> params` of the wider model, `lambda key: wide.init(key, x)["params"]`.

    Sources: Chen et al. 2015 (arXiv 1511.05641) for copies, Wang et al. 2023 (arXiv 2310.07999) for uneven shares,
    Gesmundo & Maile 2023 (arXiv 2308.06103) for zeros.

    >>> units = Units("h", {"into": 1}, {"out": 0})
    >>> surgery = Widen(units, to=3)
    >>> leaves = {"into": jnp.array([[1.0, 2.0]]), "out": jnp.array([[4.0], [6.0]])}
    >>> wide = surgery(leaves, surgery.copies(leaves))
    >>> wide["into"].tolist(), wide["out"].tolist()
    ([[1.0, 2.0, 1.0]], [[2.0], [6.0], [2.0]])
    """

    units: Units | tuple[Units, ...]
    to: int | Mapping[str, int]
    by: Literal["copy", "zero"] = "copy"
    mapping: Literal["round_robin", "random"] = "round_robin"
    split: Literal["even"] | float = "even"
    noise: float = 0.0
    init: Callable[[jax.Array], Any] | None = None
    opt_state: ClassVar[str] = "transport"

    def __post_init__(self):
        object.__setattr__(self, "units", as_groups(self.units))
        _check_to("Widen", self.to, self.units)
        _check_choice("Widen", "by", self.by, ("copy", "zero"))
        _check_choice("Widen", "mapping", self.mapping, ("round_robin", "random"))
        if self.split != "even" and not (_is_number(self.split) and 0 < self.split < 1):
            raise SurgeryFunctionError(
                'Widen(split=...) is "even", or a number above 0 and below 1.', found=quoted(self.split), write="0.7"
            )
        if not _is_number(self.noise) or not 0 <= self.noise < float("inf"):
            raise SurgeryFunctionError(
                "Widen(noise=...) is a number, at least 0.", found=quoted(self.noise), write="noise=0.01"
            )
        if (self.by == "zero") != callable(self.init):
            raise SurgeryFunctionError(
                'Widen(init=...) draws the new units of by="zero", and of nothing else.',
                found=f"by={self.by!r}, init={quoted(self.init)}",
                write='by="zero", init=lambda key: wide.init(key, x)["params"]',
            )
        if self.by == "zero" and (self.mapping, self.split, self.noise) != ("round_robin", "even", 0):
            raise SurgeryFunctionError(
                'Widen(by="zero") copies nothing, so that there is nothing to map, split or tell apart.',
                found=f"mapping={self.mapping!r}, split={self.split!r}, noise={self.noise!r}",
                write='by="copy", or none of these',
            )

    @property
    def preserves(self) -> str:
        """Noise changes what is computed."""
        return "nothing" if self.noise else "function"

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """Which units are copied, and how they share."""
        if self.mapping == "random":
            return {"copies": lambda leaves, key: self.copies(leaves, key)}
        return {"copies": lambda leaves: self.copies(leaves)}

    def copies(self, leaves: Arrays, key: jax.Array | None = None) -> Copies:
        """Which unit each new one copies, and what it gets of its outgoing weights.

        Raises:
          UnitsError: there are as many already, or more, or a leaf does not fit.
        """
        return {one.activation: self._copies(one, leaves, key) for one in as_groups(self.units)}

    def __call__(self, leaves: Arrays, copies: Copies, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """The edited leaves."""
        if (self.by == "zero" or self.noise) and key is None:
            raise InputError("Widen draws random numbers.", write="key=jax.random.key(0)")
        if self.by == "zero":
            return self._with_silent(leaves, copies, key)
        edited = dict(leaves)
        for group in as_groups(self.units):
            source, share, count = _of(copies, group)
            for path in group.incoming:
                edited[path] = group.taken(path, edited[path], source, count, group.incoming)
                if self.noise:
                    edited[path] += self._noises(group, path, edited[path], count, key)
            for path in group.outgoing:
                wide = group.taken(path, edited[path], source, count, group.outgoing)
                edited[path] = _shared(group, path, wide, share, group.outgoing)
        return edited

    @property
    def fold_back(self) -> Callable[..., dict[str, jax.Array]] | None:
        """How a change of the new leaves folds back into the old ones; None where new elements are fresh."""
        return self._folded if self.by == "copy" else None

    def _folded(self, leaves: Arrays, copies: Copies) -> dict[str, jax.Array]:
        """What a change of the copies amounts to: the outgoing share of a unit is what its incoming weights weigh."""
        folded = dict(leaves)
        for group in as_groups(self.units):
            source, share, count = _of(copies, group)
            for path in group.incoming:
                weighed = _shared(group, path, folded[path], share, group.incoming)
                folded[path] = group.summed(path, weighed, source, count, group.incoming)
            for path in group.outgoing:
                folded[path] = group.summed(path, folded[path], source, count, group.outgoing)
        return folded

    def _copies(self, group: Units, leaves: Arrays, key: jax.Array | None) -> dict[str, jax.Array]:
        count, to = group.extent(leaves)[-1], _to(self.to, group)
        if to <= count:
            raise UnitsError(
                f"Widen(to=...) is no more than there is of {group.activation!r}.",
                found=f"to={to} of {count} units",
                write=f"to={2 * count}, or Shrink",
            )
        more = jnp.arange(count, to) % count
        if key is not None:
            more = jax.random.randint(key_for(key, group.activation), (to - count,), 0, count)
        source = jnp.concatenate([jnp.arange(count), more])
        times = jnp.zeros(count).at[source].add(1.0)[source]
        share = 1 / times
        if self.split != "even":
            first = jnp.arange(to) < count
            uneven = jnp.where(first, self.split, (1 - self.split) / jnp.maximum(times - 1, 1))
            share = jnp.where(times > 1, uneven, 1.0)
        return {"source": source, "share": share, "old": jnp.zeros(count)}

    def _noises(self, group: Units, path: str, leaf: jax.Array, count: int, key: Any) -> jax.Array:
        """Noise for the copies, none for the units that there were."""
        new = jnp.arange(_to(self.to, group)) >= count
        size = self.noise * jnp.sqrt(jnp.mean(jnp.square(leaf)))
        drawn = size * jax.random.normal(key_for(key, path), leaf.shape, leaf.dtype)
        return jax.lax.stop_gradient(jnp.where(group.elements(path, leaf.shape, new, group.incoming), drawn, 0))

    def _with_silent(self, leaves: Arrays, copies: Copies, key: Any) -> dict[str, jax.Array]:
        """New units beside the old ones, and zeros where old ones would read them."""
        assert self.init is not None
        wide = dict(leaves)
        fresh, silent = ({path: jnp.zeros((), bool) for path in leaves} for _ in range(2))
        for group in as_groups(self.units):
            source, _, count = _of(copies, group)
            new = jnp.arange(_to(self.to, group)) >= count
            for places, flags in ((group.incoming, fresh), (group.outgoing, silent)):
                for path in places:
                    wide[path] = group.taken(path, wide[path], source, count, places)
                    flags[path] = flags[path] | group.elements(path, wide[path].shape, new, places)
        touched = {path: leaf for path, leaf in wide.items() if fresh[path].ndim or silent[path].ndim}
        drawn = drawn_by(self.init, key, touched, "Widen")
        old = {path: jnp.where(silent[path], 0, leaf) for path, leaf in touched.items()}
        return wide | {path: jnp.where(fresh[path], drawn[path], old[path]) for path in touched}


@dataclass(frozen=True)
class MergeUnits:
    """Merges units that are copies of each other, the inverse of `Widen(by="copy")` in round robin.

    Unit `i` goes into unit `i % to`: its incoming weights are those of the first one, what reads the two is added. The
    model is the same if the units are copies, and `units/apart/<activation>` says by how much they are not; moments are
    exact if copies have shared evenly.

    Args:
      units: `fsh.units.Units`, one or several.
      to: how many units there will be in a layer, or name of the activation -> number.

    >>> units = Units("h", {"into": 1}, {"out": 0})
    >>> surgery = MergeUnits(units, to=2)
    >>> leaves = {"into": jnp.array([[1.0, 2.0, 1.0]]), "out": jnp.array([[2.0], [6.0], [2.0]])}
    >>> narrow = surgery(leaves, surgery.copies(leaves))
    >>> narrow["into"].tolist(), narrow["out"].tolist()
    ([[1.0, 2.0]], [[4.0], [6.0]])
    """

    units: Units | tuple[Units, ...]
    to: int | Mapping[str, int]
    preserves: ClassVar[str] = "function"

    def __post_init__(self):
        object.__setattr__(self, "units", as_groups(self.units))
        _check_to("MergeUnits", self.to, self.units)

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """Which units are merged."""
        return {"copies": lambda leaves: self.copies(leaves)}

    def copies(self, leaves: Arrays) -> Copies:
        """Which unit each old one goes into, and the share that a change of what reads the merged one has of it.

        Raises:
          UnitsError: there are as few already, or fewer, or a leaf does not fit.
        """
        found = {}
        for one in as_groups(self.units):
            to, count = _fewer("MergeUnits", self.to, one, leaves)
            source = jnp.arange(count) % to
            times = jnp.zeros(to).at[source].add(1.0)
            found[one.activation] = {"source": source, "share": 1 / times[source], "old": jnp.zeros(to)}
        return found

    def __call__(self, leaves: Arrays, copies: Copies) -> dict[str, jax.Array]:
        """The edited leaves."""
        edited = dict(leaves)
        for group in as_groups(self.units):
            source, _, to = _of(copies, group)
            for path in group.incoming:
                edited[path] = group.taken(path, edited[path], jnp.arange(to), source.size, group.incoming)
            for path in group.outgoing:
                edited[path] = group.summed(path, edited[path], source, to, group.outgoing)
        return edited

    def fold_back(self, leaves: Arrays, copies: Copies) -> dict[str, jax.Array]:
        """What a change of the merged units amounts to: one of all copies, and of what reads them in equal parts."""
        folded = dict(leaves)
        for group in as_groups(self.units):
            source, share, to = _of(copies, group)
            for path in group.incoming:
                folded[path] = group.taken(path, folded[path], source, to, group.incoming)
            for path in group.outgoing:
                wide = group.taken(path, folded[path], source, to, group.outgoing)
                folded[path] = _shared(group, path, wide, share, group.outgoing)
        return folded

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """`units/apart/<activation>`."""
        return tuple(f"units/apart/{group.activation}" for group in as_groups(self.units))

    def figures(self, leaves: Arrays, copies: Copies) -> dict[str, Any]:
        """The largest difference between incoming weights of units that are merged, over the largest weight."""
        found = {}
        for group in as_groups(self.units):
            source, _, _ = _of(copies, group)
            apart, largest = jnp.float32(0), jnp.float32(0)
            for path in group.incoming:
                leaf = leaves[path]
                other = leaf - group.taken(path, leaf, source, source.size, group.incoming)
                apart = jnp.maximum(apart, jnp.max(jnp.abs(other)))
                largest = jnp.maximum(largest, jnp.max(jnp.abs(leaf)))
            found[f"units/apart/{group.activation}"] = apart / jnp.maximum(largest, jnp.finfo(largest.dtype).tiny)
        return found


@dataclass(frozen=True)
class Shrink:
    """Takes the least useful units out of layers for real, so that the step gets cheaper.

    A unit is of as much use as what it does on a batch times the absolute sum of what reads it, if `activations` are
    given, else as the norm of what makes it times that of what reads it. Those that are exactly dead, or cut off by a
    `Prune`, are of none, and without them the model computes the same. The rest keep their order, values and moments.

    Args:
      units: `fsh.units.Units`, one or several; `fsh.units.find` finds them.
      to: how many units are left in a layer, or name of the activation -> number.
      activations: from the state, and inputs of the train loop such as a batch, to {name: array [..., units]};
        `fsh.units.activations(model)` makes such a function. None: by norms.

    >>> units = Units("h", {"into": 1}, {"out": 0})
    >>> surgery = Shrink(units, to=2)
    >>> leaves = {"into": jnp.array([[1.0, 2.0, 3.0]]), "out": jnp.array([[4.0], [0.0], [5.0]])}
    >>> surgery(leaves, surgery.kept(leaves))["into"].tolist()
    [[1.0, 3.0]]
    """

    units: Units | tuple[Units, ...]
    to: int | Mapping[str, int]
    activations: Callable[..., Any] | None = None
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        object.__setattr__(self, "units", as_groups(self.units))
        _check_to("Shrink", self.to, self.units)
        if self.activations is not None and not callable(self.activations):
            raise SurgeryFunctionError(
                "Shrink(activations=...) is a function of the train state.",
                found=quoted(self.activations),
                write="fsh.units.activations(model), or None to go by norms",
            )

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """Which units are kept."""
        if self.activations is None:
            return {"kept": lambda leaves: self.kept(leaves)}
        return {
            "activations": self.activations,
            "kept": lambda leaves, activations: self.kept(leaves, activations),
        }

    def kept(self, leaves: Arrays, activations: Any = None) -> Copies:
        """Which units are kept, in order, and the share of all use that goes.

        Raises:
          UnitsError: there are as few already, or fewer, or a leaf or an activation does not fit.
        """
        found = {}
        for one in as_groups(self.units):
            to, count = _fewer("Shrink", self.to, one, leaves)
            use = self._use(one, leaves, activations, count)
            kept = jnp.sort(jnp.argsort(-use, axis=-1, stable=True)[..., :to], axis=-1)
            lost = 1 - jnp.take_along_axis(use, kept, axis=-1).sum() / jnp.maximum(use.sum(), 1e-30)
            found[one.activation] = {"source": kept, "lost": lost, "old": jnp.zeros(count)}
        return found

    def __call__(self, leaves: Arrays, kept: Copies) -> dict[str, jax.Array]:
        """The edited leaves."""
        edited = dict(leaves)
        for group in as_groups(self.units):
            source, _, count = _of(kept, group)
            for places in (group.incoming, group.outgoing):
                for path in places:
                    edited[path] = group.taken(path, edited[path], source, count, places)
        return edited

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """`units/removed_use/<activation>`."""
        return tuple(f"units/removed_use/{group.activation}" for group in as_groups(self.units))

    def figures(self, leaves: Arrays, kept: Copies) -> dict[str, Any]:
        """The share of all use that the removed units had."""
        return {f"units/removed_use/{one.activation}": kept[one.activation]["lost"] for one in as_groups(self.units)}

    def _use(self, group: Units, leaves: Arrays, activations: Any, count: int) -> jax.Array:
        """[units], or [layers, units]."""
        if activations is not None:
            done = group.mean(jnp.abs(group.activity(leaves, activations)))
            read = [group.gathered(path, jnp.abs(leaves[path]), count, group.outgoing) for path in group.outgoing]
            return done * jnp.sum(jnp.stack(read), axis=0) if read else done
        sizes = [
            [group.gathered(path, jnp.square(leaves[path]), count, places) for path in places if not _is_seen(path)]
            for places in (group.incoming, group.outgoing)
        ]
        norms = [jnp.sqrt(jnp.sum(jnp.stack(one), axis=0)) for one in sizes if one]
        return functools.reduce(jnp.multiply, norms)


def _is_seen(path: str) -> bool:
    """Whether a leaf is of running statistics, which say nothing of use."""
    return path.startswith("batch_stats/")


def _of(copies: Copies, group: Units) -> tuple[jax.Array, Any, int]:
    """Which units are taken, with what shares, and of how many."""
    held = copies[group.activation]
    return held["source"], held.get("share"), held["old"].size


def _shared(group: Units, path: str, leaf: jax.Array, share: jax.Array, places: Mapping[str, Any]) -> jax.Array:
    """The leaf times the share of each unit."""
    return leaf * group.elements(path, leaf.shape, share, places).astype(leaf.dtype)


def _to(to: int | Mapping[str, int], group: Units) -> int:
    return to if isinstance(to, int) else to[group.activation]


def _fewer(surgery: str, to: int | Mapping[str, int], group: Units, leaves: Arrays) -> tuple[int, int]:
    """How many units there will be, and how many there are.

    Raises:
      UnitsError: not fewer.
    """
    wanted, count = _to(to, group), group.extent(leaves)[-1]
    if wanted >= count:
        raise UnitsError(
            f"{surgery}(to=...) is no less than there is of {group.activation!r}.",
            found=f"to={wanted} of {count} units",
            write=f"to={max(count // 2, 1)}, or Widen",
        )
    return wanted, count


def _check_to(surgery: str, to: Any, units: Any) -> None:
    groups = as_groups(units)
    fits = _is_count(to) or (isinstance(to, Mapping) and all(map(_is_count, to.values())))
    if not fits:
        raise SurgeryFunctionError(
            f"{surgery}(to=...) says how many units there will be.",
            found=quoted(to),
            write=f"to=128, or to={{{groups[0].activation!r}: 128}}",
        )
    names = {one.activation for one in groups}
    if isinstance(to, Mapping) and set(to) != names:
        odd = sorted(set(to) ^ names)
        raise SurgeryFunctionError(
            f"{surgery}(to=...) and units= name different activations.",
            found=listed(odd),
            write=listed(close_matches(odd[0], names)) or f"a number for each of {listed(names)}",
        )


def _check_choice(surgery: str, field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SurgeryFunctionError(
            f"{surgery}({field}=...) is unknown.", found=quoted(value), write=" or ".join(map(repr, choices))
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
