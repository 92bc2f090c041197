"""Pruning: which weights are kept, by score, structure and sparsity, on the way from a dense model to a sparse one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import ScheduleError, SurgeryFunctionError, quoted
from flax_surgery_hooks.methods import parameters_of
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.schedules import Schedule
from flax_surgery_hooks.sparsity import distributions, ramps, structures
from flax_surgery_hooks.sparsity.structures import Structure
from flax_surgery_hooks.surgeries.masks import Arrays, Masked, dropped, of_leaves
from flax_surgery_hooks.surgery import key_for
from flax_surgery_hooks.top_k import top_k_masks

SCORES = ("magnitude", "random", "saliency")


@dataclass(frozen=True)
class Prune(Masked):
    """Sets the weights of least score to zero, and holds them there.

    At each fire as many weights of a leaf are kept as its sparsity at that step says, exactly: those of the largest
    score, of equal ones the first. A sparsity of one step (`end=None`) is reached at once; else it rises from `begin`
    to `end` by the cubic ramp of Zhu & Gupta, `s_end + (s_begin - s_end) * (1 - u) ** 3`, and the fire at or after
    `end` reaches the target. What is dropped stays dropped: masks are nested. They are kept in the train state; call
    `hooks.observe(state)` (or `hooks.in_graph`) in the train step, which sets dropped weights back to zero after each
    update. Optimizer slots are left alone (`opt_state="keep"`).

    Args:
      sparsity: the share of weights dropped in the end, of each leaf or, under `distribution="erk"` and
        `scope="global"`, of all together; or a mapping from patterns of paths to shares, "**" for all other leaves.
        None where the structure says it (N:M).
      end: the step from which on the target holds; None for at once.
      begin: the step up to which the sparsity is `initial`.
      initial: the sparsity at `begin`.
      power: of the ramp.
      schedule: instead of `begin` and `end`, from a step (int32 scalar, traced) to the part of the way that is gone, 0
        to 1.
      score: "magnitude", |w|; "random"; "saliency", |w * gradient|; or a function of the leaf, which may take `path`,
        `key` and `grad` too, and returns an array of its shape.
      scope: "layer": each leaf has its own weights to keep; "global": they compete over all leaves.
      normalize: under "global", whether a leaf's scores are divided by their norm, as JaxPruner does.
      distribution: "uniform", or "erk": larger leaves are sparser (Erdos-Renyi-Kernel, RigL).
      structure: what is dropped together, see `sparsity.Structure`: "unstructured", "2:4", "block:4x4", "channel", or a
        mapping from patterns of paths to these.
      enforce: False leaves the weights as they are and changes the masks alone, which then follow the dense weights and
        may take in again what they have left out: for `sparsity.ste` in the forward pass.
      grads: what gives the gradients that a score needs, `grads(state, ...) -> tree like the parameters`; it may take
        inputs of the train loop, such as a batch, and is called when the hook fires. None: the loop passes `grads=`.

    Sources: Han et al. 2015 (arXiv 1506.02626), magnitude; Zhu & Gupta 2017 (arXiv 1710.01878), the ramp; Lee et al.
    2019 (arXiv 1810.02340), saliency; Lee et al. 2023 (JaxPruner, arXiv 2304.14082).

    >>> import optax, flax_surgery_hooks as fsh
    >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
    >>> state, record = fsh.operate(fsh.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)), Prune(0.5))
    >>> state.params["w"].tolist(), record.figures["masks/sparsity"].item()
    ([0.0, -4.0, 3.0, 0.0], 0.5)
    """

    sparsity: float | dict[str, float] | None = None
    end: int | None = None
    begin: int = 0
    initial: float = 0.0
    power: int = 3
    schedule: Callable[[Any], Any] | None = None
    score: Literal["magnitude", "random", "saliency"] | Callable[..., Any] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    normalize: bool = False
    distribution: Literal["uniform", "erk"] = "uniform"
    structure: str | dict[str, str] = "unstructured"
    enforce: bool = True
    grads: Callable[..., Any] | None = None
    opt_state: ClassVar[str] = "keep"

    def __post_init__(self):
        _check_choice("score", self.score, SCORES)
        _check_choice("scope", self.scope, ("layer", "global"))
        _check_choice("distribution", self.distribution, ("uniform", "erk"))
        if self.schedule is not None and self.end is not None:
            raise SurgeryFunctionError(
                "Prune has a ramp from `begin` to `end`, and a schedule too.",
                found=f"end={self.end}",
                write="one of both",
            )
        if self.end is not None:
            ramps.progress(0, self.begin, self.end, self.power)
        alone = [name for name, given in (
            ('distribution="erk"', self.distribution == "erk"),
            ('scope="global"', self.scope == "global"),
            ("a mapping as sparsity", isinstance(self.sparsity, Mapping)),
        ) if given]  # fmt: skip
        if len(alone) > 1:
            raise SurgeryFunctionError(
                "Prune is told in two ways how the sparsity is spread over leaves.",
                found=" and ".join(alone),
                write="one of them",
            )
        for text in self._texts():
            if self.scope == "global" and str(Structure.parse(text)) != "unstructured":
                raise SurgeryFunctionError(
                    'Under scope="global" single weights compete with each other.',
                    found=f"structure={quoted(text)}",
                    write='scope="layer", or structure="unstructured"',
                )
        for share in self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity, self.initial]:
            if share is not None:
                distributions.kept(1, share)

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """The gradients, if they are computed, and the masks."""
        return {**({} if self.grads is None else {"grads": self.grads}), "masks": self._chooser()}

    def init_memory(self, leaves: Arrays) -> dict[str, jax.Array]:
        """Masks that keep everything."""
        return {path: jnp.ones(leaf.shape, jnp.bool_) for path, leaf in leaves.items()}

    def __call__(self, leaves: Arrays, masks: Arrays, memory: Arrays) -> tuple[dict[str, jax.Array], Arrays]:
        """The edited leaves, and the masks."""
        if not self.enforce:
            return dict(leaves), masks
        return {path: jnp.where(masks[path], leaf, dropped(leaf)) for path, leaf in leaves.items()}, masks

    def observe(self, leaves: Arrays, memory: Arrays) -> tuple[dict[str, jax.Array], Arrays]:
        """The leaves with zeros where they are dropped."""
        return super().observe(leaves, memory) if self.enforce else (dict(leaves), memory)

    def check_schedule(self, when: Schedule) -> None:
        """Raises if the last fire comes before the ramp has reached its target.

        Raises:
          ScheduleError: it does.
        """
        if self.end is None or when.planned is None or when.planned.next_step(self.end - 1) is not None:
            return
        steps = list(when.planned.due_steps(-1, self.end))
        raise ScheduleError(
            "The last fire comes before the sparsity has reached its target.",
            found=f"{when!r}, last due at {steps[-1] if steps else 'no step'}, and end={self.end}",
            write=f"a schedule that is due at step {self.end} or later"
            + (f", or end={steps[-1]}" if steps and steps[-1] > self.begin else ""),
        )

    def masks(
        self, leaves: Arrays, *, step: Any = 0, key: Any = None, grads: Any = None, held: Arrays | None = None
    ) -> dict[str, jax.Array]:
        """The masks of leaves at a step; for a forward pass whose masks follow the weights at every step, too.

        Args:
          leaves: path -> leaf, arrays.
          step: what `state.step` holds.
          key: for scores that are drawn.
          grads: a tree like the parameters, for scores that need it.
          held: the masks in force, outside of which nothing is kept.

        Returns:
          Path -> bool mask, True where an element is kept.

        Raises:
          SurgeryFunctionError: a structure does not fit its leaf, a pattern no leaf, or the score is no array.

        >>> Prune(structure="1:2").masks({"w": jnp.array([[1.0], [2.0]])})["w"].tolist()
        [[False], [True]]
        """
        found = structures_of(self.structure, leaves)
        scores = self._scores(leaves, key, None if grads is None else of_leaves("grads", grads, leaves), step)
        if held is not None:
            scores = {path: jnp.where(held[path], score, -jnp.inf) for path, score in scores.items()}
        done = self._progress(step)
        if self.scope == "global":
            total = sum(leaf.size for leaf in leaves.values())
            share = _given(self.sparsity, found)
            return top_k_masks(_normed(scores) if self.normalize else scores, self._kept(total, share, done))
        shares = self._shares(leaves, found)
        kept = {path: self._kept_of(one, leaves[path].shape, shares.get(path), done) for path, one in found.items()}
        return structures.masks(scores, found, kept)

    def _progress(self, step: Any) -> Any:
        if self.schedule is not None:
            return jnp.clip(jnp.asarray(self.schedule(step), jnp.float32), 0, 1)
        return 1.0 if self.end is None else ramps.progress(step, self.begin, self.end, self.power)

    def _kept(self, units: int, share: float, done: Any) -> Any:
        first, last = (distributions.kept(units, each) for each in (self.initial, share))
        return ramps.kept_at(done, first=first, last=last)

    def _kept_of(self, structure: Structure, shape: tuple[int, ...], share: float | None, done: Any) -> Any:
        units = structure.units(shape)
        if structure.fixed is not None:
            return ramps.kept_at(done, first=units, last=structure.fixed)
        assert share is not None
        return self._kept(units, share, done)

    def _shares(self, leaves: Arrays, found: Mapping[str, Structure]) -> dict[str, float]:
        """The sparsity of each leaf whose structure does not say it, in the end."""
        shapes = {path: leaf.shape for path, leaf in leaves.items() if found[path].fixed is None}
        if not shapes:
            return {}
        if isinstance(self.sparsity, Mapping):
            return distributions.from_map(shapes, self.sparsity)
        spread = distributions.erk if self.distribution == "erk" else distributions.uniform
        return spread(shapes, _given(self.sparsity, found))

    def _scores(self, leaves: Arrays, key: Any, grads: Arrays | None, step: Any) -> dict[str, jax.Array]:
        if self.score == "magnitude":
            return {path: jnp.abs(leaf) for path, leaf in leaves.items()}
        if self.score == "random":
            return {path: _uniform(key_for(key, path), leaf) for path, leaf in leaves.items()}
        if self.score == "saliency":
            assert grads is not None
            return {path: jnp.abs(leaf * grads[path]) for path, leaf in leaves.items()}
        return {path: self._own_score(path, leaf, key, grads, step) for path, leaf in leaves.items()}

    def _own_score(self, path: str, leaf: jax.Array, key: Any, grads: Arrays | None, step: Any) -> jax.Array:
        assert callable(self.score)
        asked = set(self._asked)
        ready = {"path": path, "step": step}
        ready |= {"key": key_for(key, path)} if "key" in asked else {}
        ready |= {"grad": grads[path]} if grads is not None else {}
        score = self.score(leaf, **{name: ready[name] for name in asked})
        if jnp.shape(score) != leaf.shape:
            raise SurgeryFunctionError(
                "The score of a leaf is an array of its shape.",
                path=path,
                found=f"shape {list(jnp.shape(score))} for {list(leaf.shape)}",
                write="lambda leaf: jnp.abs(leaf)",
            )
        return jnp.asarray(score, leaf.dtype)

    @property
    def _asked(self) -> tuple[str, ...]:
        """What a score of one's own takes beside the leaf."""
        if not callable(self.score):
            return {"random": ("key",), "saliency": ("grad",)}.get(self.score, ())
        _, wants, may_take = parameters_of(self.score, "the score")
        unknown = [name for name in wants if name not in ("path", "key", "grad", "step")]
        if unknown:
            raise SurgeryFunctionError(
                f"The score of Prune asks for {listed(unknown)}.",
                found=f"({listed(wants)})",
                write="a function of the leaf, which may take `path`, `key`, `grad` and `step`",
            )
        return (*wants, *(name for name in may_take if name in ("path", "key", "grad", "step")))

    def _chooser(self) -> Callable[..., Any]:
        """What makes the masks of a fire, with the parameters that the score asks for."""
        held = (lambda memory: memory) if self.enforce else (lambda memory: None)
        by_form: dict[tuple[bool, bool], Callable[..., Any]] = {
            (False, False): lambda leaves, memory, step: self.masks(leaves, step=step, held=held(memory)),
            (True, False): lambda leaves, memory, step, key: self.masks(leaves, step=step, key=key, held=held(memory)),
            (False, True): lambda leaves, memory, step, grads: self.masks(
                leaves, step=step, grads=grads, held=held(memory)
            ),
            (True, True): lambda leaves, memory, step, key, grads: self.masks(
                leaves, step=step, key=key, grads=grads, held=held(memory)
            ),
        }
        return by_form["key" in self._asked, "grad" in self._asked]

    def _texts(self) -> list[str]:
        return list(self.structure.values()) if isinstance(self.structure, Mapping) else [self.structure]


def structures_of(text: str | Mapping[str, str], leaves: Arrays) -> dict[str, Structure]:
    """The structure of each leaf, checked to fit it."""
    texts = (
        distributions.by_pattern(leaves, text, "structure")
        if isinstance(text, Mapping)
        else dict.fromkeys(leaves, text)
    )
    found = {path: Structure.parse(one) for path, one in texts.items()}
    for path, structure in found.items():
        structure.check(path, leaves[path].shape)
    return found


def _given(sparsity: Any, found: Mapping[str, Structure]) -> float:
    if sparsity is None:
        raise SurgeryFunctionError(
            "Nothing says how sparse the leaves are to be.",
            found=f"structure {', '.join(sorted({repr(str(one)) for one in found.values()}))} and sparsity=None",
            write='sparsity=0.9, or structure="2:4"',
        )
    return sparsity


def _normed(scores: Arrays) -> dict[str, jax.Array]:
    return {
        path: score / (jnp.sqrt(jnp.sum(jnp.square(score), where=score > 0)) + 1e-8) for path, score in scores.items()
    }


def _uniform(key: jax.Array, leaf: jax.Array) -> jax.Array:
    return jax.random.uniform(key, leaf.shape, leaf.dtype)


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value in choices or (field == "score" and callable(value)):
        return
    raise SurgeryFunctionError(
        f"Prune({field}=...) is unknown.", found=quoted(value), write=f"one of {listed(choices)}"
    )
