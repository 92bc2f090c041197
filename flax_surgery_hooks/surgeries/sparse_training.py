"""Sparse training: models that are sparse from the first step to the last, whose masks move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted
from flax_surgery_hooks.sparsity import distributions, ramps
from flax_surgery_hooks.surgeries.masks import Arrays, Masked, dropped, of_leaves
from flax_surgery_hooks.surgery import key_for
from flax_surgery_hooks.top_k import top_k_masks_each


@dataclass(frozen=True)
class SET(Masked):
    """Sparse evolutionary training: at each fire the smallest weights give way to as many others, drawn at random.

    The first masks are drawn at random by `hooks.init`; `state = hooks.observe(hooks.init(state))` makes the weights
    sparse before the first step, and `hooks.observe(state)` in the train step keeps them so. At a fire, in each leaf,
    the `fraction` of the kept weights with the smallest magnitude is dropped, and as many are grown among all that are
    not kept then, those just dropped included. The number of weights never changes. Grown weights are zero, so that
    growth alone changes no output, and start without history: first moments of zero, second moments by `fresh=`. A
    weight that is dropped and grown at once keeps its value and moments; one that is dropped keeps its moments.

    Args:
      sparsity: the share of weights that are zero, of each leaf or, under "erk", of all leaves together; or a mapping
        from patterns of paths to shares, "**" for all other leaves.
      end: the step from which on nothing is dropped any more; None for never, with `anneal="constant"`.
      fraction: of the kept weights that are dropped, at step 0.
      anneal: "cosine": the fraction falls as `fraction / 2 * (1 + cos(pi * step / end))`; "constant". With a fraction
        of 0 the masks never change, which is static sparse training, the usual control.
      distribution: "erk": larger leaves are sparser (Erdos-Renyi-Kernel); or "uniform".

    Sources: Mocanu et al. 2018 (arXiv 1707.04780); Evci et al. 2020 (RigL, arXiv 1911.11134) for ERK and annealing.

    >>> surgery = SET(0.5, fraction=0.5, anneal="constant", distribution="uniform")
    >>> leaves, held = {"w": jnp.array([5.0, 1.0, 0.0, 0.0])}, {"w": jnp.array([True, True, False, False])}
    >>> new = surgery.masks(leaves, held, {"w": jnp.array([0.1, 0.3, 0.2, 0.4])}, step=0)
    >>> new["w"].tolist()
    [True, False, False, True]
    """

    sparsity: float | dict[str, float] = 0.9
    end: int | None = None
    fraction: float = 0.3
    anneal: Literal["cosine", "constant"] = "cosine"
    distribution: Literal["uniform", "erk"] = "erk"

    def __post_init__(self):
        name = type(self).__name__
        if self.distribution not in ("uniform", "erk"):
            raise SurgeryFunctionError(
                f"{name}(distribution=...) is unknown.", found=quoted(self.distribution), write='"uniform" or "erk"'
            )
        ramps.drop_fraction(0, self.fraction, self.end, self.anneal)
        for share in self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]:
            distributions.kept(1, share)

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """The masks."""
        return {"masks": self._grown_at_random}

    def init_memory(self, leaves: Arrays, key: jax.Array) -> dict[str, jax.Array]:
        """Masks drawn at random, of as many weights as the sparsity says."""
        return top_k_masks_each(_drawn(leaves, key), self._kept(leaves))

    def __call__(self, leaves: Arrays, masks: Arrays, memory: Arrays) -> tuple[dict[str, jax.Array], Arrays]:
        """The edited leaves, and the masks."""
        # Zeros of two kinds: the grown ones have no history, the dropped ones keep theirs.
        edited = {
            path: jnp.where(masks[path], jnp.where(memory[path], leaf, 0), dropped(leaf))
            for path, leaf in leaves.items()
        }
        return edited, masks

    def masks(self, leaves: Arrays, held: Arrays, growth: Arrays, *, step: Any) -> dict[str, jax.Array]:
        """The masks after a fire.

        Args:
          leaves: path -> leaf.
          held: path -> the mask before it.
          growth: path -> scores by which weights are grown, of the leaf's shape.
          step: what `state.step` holds.

        Returns:
          Path -> bool mask; as many are True as the sparsity says.
        """
        fraction = ramps.drop_fraction(step, self.fraction, self.end, self.anneal)
        kept = self._kept(leaves)
        moved = {path: ramps.share(count, fraction) for path, count in kept.items()}
        size = {path: jnp.where(held[path], jnp.abs(leaf), -jnp.inf) for path, leaf in leaves.items()}
        stay = top_k_masks_each(size, {path: count - moved[path] for path, count in kept.items()})
        candidates = {path: jnp.where(stay[path], -jnp.inf, score) for path, score in growth.items()}
        grown = top_k_masks_each(candidates, moved)
        return {path: stay[path] | grown[path] for path in leaves}

    def _grown_at_random(self, leaves: Arrays, memory: Arrays, step: Any, key: Any) -> dict[str, jax.Array]:
        return self.masks(leaves, memory, _drawn(leaves, key), step=step)

    def _kept(self, leaves: Arrays) -> dict[str, int]:
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        if isinstance(self.sparsity, Mapping):
            shares = distributions.from_map(shapes, self.sparsity)
        else:
            shares = (distributions.erk if self.distribution == "erk" else distributions.uniform)(shapes, self.sparsity)
        return {path: distributions.kept(leaf.size, shares[path]) for path, leaf in leaves.items()}


@dataclass(frozen=True)
class RigL(SET):
    """`SET` that grows the weights with the largest gradient, "rigging the lottery".

    The gradients are those of the dense weights, at the sparse ones as they are: what a weight that is zero would get.
    In the paper a fire takes the place of a step of the optimizer; here it comes after one.

    Args:
      sparsity: as for `SET`.
      end: as for `SET`; in the paper three quarters of the run.
      fraction: as for `SET`.
      anneal: as for `SET`.
      distribution: as for `SET`.
      grads: what gives the gradients, `grads(state, ...) -> tree like the parameters`, such as
        `lambda state, batch: jax.grad(loss)(state.params, batch)`; it may take inputs of the train loop, and is called
        when the hook fires. None: the loop passes `grads=`.

    Source: Evci et al. 2020 (arXiv 1911.11134).

    >>> RigL(0.9, end=75_000).fraction
    0.3
    """

    grads: Callable[..., Any] | None = None

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """The gradients, if they are computed, and the masks."""
        return {**({} if self.grads is None else {"grads": self.grads}), "masks": self._grown_by_gradient}

    def _grown_by_gradient(self, leaves: Arrays, memory: Arrays, step: Any, grads: Any) -> dict[str, jax.Array]:
        size = {path: jnp.abs(grad) for path, grad in of_leaves("grads", grads, leaves).items()}
        return self.masks(leaves, memory, size, step=step)


def _drawn(leaves: Arrays, key: jax.Array) -> dict[str, jax.Array]:
    """A number for each element, all different but for chance, the same on every mesh."""
    return {path: jax.random.uniform(key_for(key, path), leaf.shape) for path, leaf in leaves.items()}
