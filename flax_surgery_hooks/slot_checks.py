"""Whether an optimizer state is what its optimizer makes, and whether all of it is known."""

from __future__ import annotations

from typing import Any

import jax

from flax_surgery_hooks.errors import StateError, shorten
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.slot_probe import Shapes, without_measurements


def initial(tx: Any, params_treedef: Any, shapes: Shapes) -> Any:
    """What `tx.init` makes for parameters of these shapes, abstractly.

    Raises:
      StateError: it fails on them.
    """
    params = jax.tree.unflatten(params_treedef, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    try:
        return jax.eval_shape(tx.init, params)
    except Exception as error:
        raise StateError(
            f"`tx.init` fails on the parameters of the state: {type(error).__name__}: {shorten(error, 200)}",
            write="the very `tx` of the state",
        ) from error


def check_made(made: Any, held: Any) -> None:
    """Raises unless an optimizer state has the structure and shapes that `tx.init` makes, measurements apart.

    Raises:
      StateError: it has not.
    """
    made, held = without_measurements(made), without_measurements(held)
    structure: Any = jax.tree.structure(held)
    if structure != jax.tree.structure(made):
        found = shorten(structure)
    else:
        items = jax.tree_util.tree_flatten_with_path(held)[0]
        pairs = [(keys, a.shape, b.shape) for (keys, a), b in zip(items, jax.tree.leaves(made), strict=True)]
        wrong = [
            f"opt_state{jax.tree_util.keystr(keys)} {list(a)} instead of {list(b)}" for keys, a, b in pairs if a != b
        ]
        if not wrong:
            return
        found = listed(wrong, 3)
        if all(a == b or (len(a) == 1 and b == ()) for _, a, b in pairs):  # counts; the parameters look alike
            raise StateError(
                "The state is replicated for pmap: every leaf has a leading device axis.",
                found=found,
                write="flax.jax_utils.unreplicate before the call, and flax.jax_utils.replicate after it",
            )
    raise StateError(
        "The optimizer state is not what `tx.init` makes for these parameters.",
        found=found,
        write="state.replace(opt_state=tx.init(params)) with the very `tx` of the state",
    )
