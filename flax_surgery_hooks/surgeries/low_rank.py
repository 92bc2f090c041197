"""Surgeries on low-rank factors: LoRA factors merged into their kernels, and kernels replaced by factors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import InputError, SurgeryFunctionError, quoted
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.slot_edits import SlotValue
from flax_surgery_hooks.surgeries.masks import dropped
from flax_surgery_hooks.surgeries.optimizer import ResetMoments, start_of
from flax_surgery_hooks.surgeries.pairing import part_of
from flax_surgery_hooks.surgery import key_for

Arrays = Mapping[str, jax.Array]
Slots = Mapping[str, Mapping[str, SlotValue]]
FIRST_MOMENTS = ("grad", "update")
HIGHEST = jax.lax.Precision.HIGHEST


class Adapter(NamedTuple):
    """Paths of a kernel and of the factors beside it."""

    kernel: str
    a: str
    b: str


@dataclass(frozen=True)
class MergeLora:
    """Adds LoRA factors to the kernel beside them, `W + scale * A B` in float32, and starts B from zero again.

    The model computes the same after it, up to rounding: of a bfloat16 kernel, to its 8 bits. Dropout on the path of
    the factors is not in the merged kernel. Select kernels and factors: `params="**"`, or `["**/kernel", "**/lora_?"]`.

    Slots of the kernel stay: its gradient is the same. With B at zero the gradient of A is zero, and that of B what it
    was, so that the first moments of A start anew and all of B is kept. Where A is drawn anew, the first moments of B
    mean nothing any more and start anew as well. Second moments are kept: from zero, beside a count that goes on, the
    next updates would be several times too large.

    Args:
      scale: what the product is multiplied by in the model, `alpha / rank`.
      a: name of the factor [..., rank] that the inputs meet first, in the folder of the kernel or below it, such as
        "lora/lora_a".
      b: name of the factor [rank, ...].
      kernel: name of the kernel.
      redraw: whether A is drawn anew; else it stays.
      initializer: `(key, shape, dtype) -> array` for A; None for uniform between -1 / sqrt(inputs) and
        1 / sqrt(inputs), as in LoRA's reference code.

    Factors of a stack of layers have its axis in front, like the kernel.

    Source: Hu et al. 2021 (LoRA, arXiv 2106.09685).

    >>> merge = MergeLora(scale=2.0)
    >>> leaves = {"kernel": jnp.ones((2, 2)), "lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
    >>> new = merge(leaves, merge.merged(leaves))
    >>> new["kernel"].tolist(), new["lora_a"].tolist(), new["lora_b"].tolist()
    ([[3.0, 3.0], [3.0, 3.0]], [[1.0], [1.0]], [[0.0, 0.0]])
    """

    scale: float
    a: str = "lora_a"
    b: str = "lora_b"
    kernel: str = "kernel"
    redraw: bool = False
    initializer: Callable[..., jax.Array] | None = None
    preserves: ClassVar[str] = "function"

    def __post_init__(self):
        name, scale = type(self).__name__, self.scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= sys.float_info.max:
            raise SurgeryFunctionError(
                f"{name}(scale=...) must be a finite number.", found=quoted(scale), write="scale=alpha / rank"
            )
        if self.initializer is not None and not self.redraw:
            raise SurgeryFunctionError(
                f"{name}(initializer=...) draws A anew, and redraw=False keeps it.", write="redraw=True"
            )

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """The products, once per fire."""
        return {"merged": self.merged}

    def merged(self, leaves: Arrays) -> dict[str, jax.Array]:
        """What is added: path of a kernel -> array of its shape.

        Raises:
          SurgeryFunctionError: no factors, or such as have no kernel or do not fit it.
        """
        return {one.kernel: self.scale * _product(one, leaves) for one in self._adapters(leaves)}

    def __call__(self, leaves: Arrays, merged: Arrays, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """The edited leaves."""
        if self.redraw and key is None:
            raise InputError(f"{type(self).__name__} draws random numbers.", write="key=jax.random.key(0)")
        new = dict(leaves)
        for one in self._adapters(leaves):
            new[one.kernel] = leaves[one.kernel] + merged[one.kernel]
            new[one.b] = jnp.zeros_like(leaves[one.b])
            if key is not None and self.redraw:
                new[one.a] = self._drawn(key_for(key, one.a), leaves[one.a], leaves[one.a].ndim - _stacked(one, leaves))
        return new

    def edit_slots(
        self, slots: Slots, /, leaves: Arrays, merged: Arrays, key: jax.Array | None = None
    ) -> dict[str, dict[str, jax.Array]]:
        """The slots after it."""
        new = {path: {name: slot.value for name, slot in of.items()} for path, of in slots.items()}
        for one in self._adapters(leaves):
            new[one.kernel] = {name: _moved(slot, merged[one.kernel]) for name, slot in slots[one.kernel].items()}
            for path in (one.a, one.b):
                new[path] = self._factor_slots(slots[path], leaves[path], anew=self.redraw or path == one.a, key=key)
        return new

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """`lora/relative_size`."""
        return ("lora/relative_size",)

    def figures(self, leaves: Arrays, merged: Arrays) -> dict[str, Any]:
        """The norm of all that is added over that of the kernels that it is added to."""
        added, held = (sum(jnp.sum(tree[path] ** 2) for path in merged) for tree in (merged, leaves))
        return {"lora/relative_size": jnp.sqrt(added / held)}

    def _factor_slots(
        self, slots: Mapping[str, SlotValue], leaf: jax.Array, *, anew: bool, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        kinds = ("param", *(FIRST_MOMENTS if anew else ()))
        return {n: start_of(n, slot, leaf) if slot.kind in kinds else slot.value for n, slot in slots.items()}

    def _drawn(self, key: jax.Array, old: jax.Array, ndim: int) -> jax.Array:
        if self.initializer is not None:
            return self.initializer(key, old.shape, old.dtype)
        most = 1 / math.sqrt(math.prod(old.shape[old.ndim - ndim : -1]))
        return jax.random.uniform(key, old.shape, old.dtype, -most, most)

    def _adapters(self, paths: Iterable[str]) -> list[Adapter]:
        """The kernels among some paths that have factors beside them."""
        folders = {name: dict(_folders(paths, getattr(self, name))) for name in ("kernel", "a", "b")}
        chosen = dict.fromkeys([*folders["a"], *folders["b"]])
        if not chosen:
            raise SurgeryFunctionError(
                f"{type(self).__name__} finds no factors among the selected leaves.",
                found=listed(paths),
                write='params= that selects them, or their names: a="lora_a", b="lora_b"',
            )
        for folder in chosen:
            missing = [getattr(self, name) for name, held in folders.items() if folder not in held]
            if missing:
                raise SurgeryFunctionError(
                    f"{type(self).__name__} finds a factor without {' and '.join(missing)}.",
                    path=(folders["a"] | folders["b"])[folder],
                    found=listed(paths),
                    write='params= that selects kernels and factors, or their names: kernel="kernel"',
                )
        return [Adapter(*(folders[name][folder] for name in Adapter._fields)) for folder in chosen]


@dataclass(frozen=True)
class ReLoRA(MergeLora):
    """`MergeLora` that draws A anew and forgets most of the factors' moments, so that ranks add up over merges.

    Of each factor `fraction` of the elements start anew in all slots, by one mask. The learning rate has to warm up
    again after it: `fsh.optax.rewarm` last in the optimizer, and a hook with `Rewarm` at the same steps ("jagged
    cosine"). The paper trains all weights for some thousand steps first, and the factors at about twice that rate.

    Args:
      scale: as for `MergeLora`.
      a: as for `MergeLora`.
      b: as for `MergeLora`.
      kernel: as for `MergeLora`.
      redraw: must be True.
      initializer: as for `MergeLora`.
      fraction: the part of the elements whose moments start anew; 1 for all, also of slots of another shape.
      by: "random", or "magnitude": those with the smallest first moments, of which 0.8 to 0.99 is usual.

    Source: Lialin et al. 2023 (arXiv 2307.05695). Its code draws a mask for each moment: an element that keeps its
    first and loses its second then moves by hundreds of learning rates.

    >>> ReLoRA(scale=0.25).fraction
    0.999
    """

    redraw: bool = True
    fraction: float = 0.999
    by: Literal["random", "magnitude"] = "random"

    def __post_init__(self):
        super().__post_init__()
        if not self.redraw:
            raise SurgeryFunctionError(
                "ReLoRA draws A anew.", found="redraw=False", write="MergeLora(scale=...), which may keep it"
            )
        self._reset()

    def _reset(self) -> ResetMoments:
        return ResetMoments(fraction=self.fraction, by="all" if self.fraction == 1 else self.by)

    def _factor_slots(
        self, slots: Mapping[str, SlotValue], leaf: jax.Array, *, anew: bool, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        moments = {name: slot for name, slot in slots.items() if slot.kind not in ("param", "none")}
        kept = super()._factor_slots(slots, leaf, anew=False, key=key)
        return kept | (self._reset().edit_slots(moments, leaf=leaf, key=key) if moments else {})


@dataclass(frozen=True)
class Factorize:
    """Replaces a kernel by its best approximation of a rank, from its singular value decomposition.

    A kernel of more than two axes counts as a matrix [all others, last]. Without `into` the kernel keeps its path and
    shape, and its slots stay where they are. With `into` two factors take its place, each with the square roots of the
    singular values: an edit of paths, for which the hook brings `apply_fn=`. Their moments start anew.

    Args:
      rank: how many singular values are kept.
      into: names of the factors [..., rank] and [rank, last] in the folder of the kernel, or None.
      layers: how many axes in front are those of a stack of layers, each of which is decomposed by itself.

    The decomposition is made on one device: a sharded kernel is gathered for it.

    Source: Eckart and Young 1936.

    >>> surgery, leaves = Factorize(1), {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    >>> surgery(leaves, surgery.factors(leaves))["kernel"].round().tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """

    rank: int
    into: tuple[str, str] | None = None
    layers: int = 0
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self):
        for name, least in (("rank", 1), ("layers", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SurgeryFunctionError(
                    f"Factorize({name}=...) is a Python int of at least {least}.", found=quoted(value)
                )
        names = self.into
        if names is not None and (
            len(names) != 2 or names[0] == names[1] or not all(isinstance(n, str) for n in names)
        ):
            raise SurgeryFunctionError(
                "Factorize(into=...) is the names of the two factors.", found=quoted(names), write='into=("a", "b")'
            )

    @property
    def derived(self) -> dict[str, Callable[..., Any]]:
        """The factors, once per fire."""
        return {"factors": self.factors}

    def factors(self, leaves: Arrays) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Path -> the factors of the kernel there.

        Raises:
          SurgeryFunctionError: a leaf is no matrix, or smaller than the rank.
        """
        return {path: self._factors(path, leaf) for path, leaf in leaves.items()}

    def __call__(self, leaves: Arrays, factors: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
        """The edited leaves."""
        if self.into is None:
            return {path: dropped(leaf) + self._product(leaf, *factors[path]) for path, leaf in leaves.items()}
        folders = [path.rpartition("/")[:2] for path in leaves]
        names = [["".join((*folder, name)) for name in self.into] for folder in folders]
        pairs = zip(names, leaves, strict=True)
        return {name: factor for two, path in pairs for name, factor in zip(two, factors[path], strict=True)}

    def figure_names(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """`factorize/energy`."""
        return ("factorize/energy",)

    def figures(self, leaves: Arrays, factors: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, Any]:
        """The share of the sum of squares of all kernels that is kept."""
        kept = sum(jnp.sum(self._product(leaf, *factors[path]) ** 2) for path, leaf in leaves.items())
        return {"factorize/energy": kept / sum(jnp.sum(leaf**2) for leaf in leaves.values())}

    def _factors(self, path: str, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        matrix = self._matrix(leaf) if leaf.ndim >= self.layers + 2 else None
        if matrix is None or min(matrix.shape[-2:]) < self.rank:
            raise SurgeryFunctionError(
                f"Factorize(rank={self.rank}) needs matrices of at least that rank.",
                path=path,
                found=f"shape {list(leaf.shape)}, of which {self.layers} axes of layers",
                write="a smaller rank, or exclude= with this path",
            )
        left, sizes, right = jnp.linalg.svd(matrix, full_matrices=False)
        roots = jnp.sqrt(sizes[..., : self.rank])
        a = left[..., : self.rank] * jnp.expand_dims(roots, -2)
        return a.reshape(*leaf.shape[:-1], self.rank), right[..., : self.rank, :] * jnp.expand_dims(roots, -1)

    def _matrix(self, leaf: jax.Array) -> jax.Array:
        return leaf.reshape(*leaf.shape[: self.layers], -1, leaf.shape[-1])

    def _product(self, leaf: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(self._matrix(a), b, precision=HIGHEST).reshape(leaf.shape)


def _folders(paths: Iterable[str], name: str) -> Iterator[tuple[str, str]]:
    """The folder, and the layer of a stack, of each path that ends so, and the path."""
    for path in paths:
        part = part_of(path, name)
        if part is not None and not part.rest:
            yield part.group, path


def _stacked(one: Adapter, leaves: Arrays) -> int:
    """How many axes in front of a kernel and its factors are those of a stack of layers."""
    kernel, a, b = (leaves[path].shape for path in one)
    stacked = len(a) + len(b) - 2 - len(kernel)
    whole = range(min(len(a), len(b), len(kernel)))
    if stacked not in whole or a[-1:] != b[stacked : stacked + 1] or a[:-1] + b[stacked + 1 :] != kernel or (
        a[:stacked] != b[:stacked]
    ):  # fmt: skip
        raise SurgeryFunctionError(
            "The factors do not fit the kernel: A is [inputs, rank], B is [rank, outputs], a stack's layers in front.",
            path=one.kernel,
            found=f"{list(a)} times {list(b)} for {list(kernel)}",
        )
    return stacked


def _product(one: Adapter, leaves: Arrays) -> jax.Array:
    stacked = _stacked(one, leaves)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.tensordot(a, b, 1, precision=HIGHEST)

    for _ in range(stacked):
        product = jax.vmap(product)
    return product(leaves[one.a], leaves[one.b])


def _moved(slot: SlotValue, by: jax.Array) -> jax.Array:
    """A slot of a kernel: copies of it move as it does, and nothing else is any different."""
    return (
        slot.value + by.astype(slot.value.dtype)
        if slot.kind == "param" and slot.value.shape == by.shape
        else slot.value
    )
