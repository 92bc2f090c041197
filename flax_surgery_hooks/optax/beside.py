"""Small arrays kept beside the parameters, in their containers: one for each leaf."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
from flax.core.meta import Partitioned


def beside(params: Any, make: Callable[[Any], jax.Array]) -> Any:
    """A tree with the key paths of the parameters, holes included, and `make(leaf)` at each leaf.

    Boxes and variables name mesh axes that a smaller array has not: with them, `nn.get_sharding` and `nnx.Optimizer`
    would shard a scalar. Here they name none.

    >>> box = Partitioned(jax.numpy.ones((8, 2)), names=("data", None))
    >>> beside({"w": box}, lambda leaf: jax.numpy.zeros(()))["w"].names
    ()
    """
    variable = _variable_class()

    def one(node: Any) -> Any:
        if not jax.tree.leaves(node):
            return node
        if isinstance(node, Partitioned):
            return node.replace(value=beside(node.value, make), names=())
        if isinstance(node, variable):
            return type(node)(make(*jax.tree.leaves(node)))
        return make(node)

    return jax.tree.map(one, params, is_leaf=lambda node: isinstance(node, (Partitioned, *variable)))


def _variable_class() -> tuple[Any, ...]:
    """`nnx.Variable` where it is in use: nnx is slow to import, and without it nothing is one."""
    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None else (nnx.Variable,)


def map_beside(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` over a tree and others with the same leaves in the same order, whatever their boxes name."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [function(*group) for group in zip(leaves, *map(jax.tree.leaves, others), strict=True)]
    )
