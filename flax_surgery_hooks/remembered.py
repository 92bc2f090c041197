"""What a hook's surgery remembers, read from a train state: masks for a loss, averages to evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from flax_surgery_hooks.errors import StateError
from flax_surgery_hooks.paths import close_matches, listed


def remembered(state: Any, hook: str, what: str) -> Any:
    """What a hook remembers, with arrays in place of the variables as which an optimizer of NNX holds them.

    Args:
      state: whose `surgery` field holds it once `hooks.init(state)` was called; also while it is traced.
      hook: name of the hook.
      what: what it should be, for the message.

    Raises:
      StateError: the state holds no memory of such a hook.
    """
    memory = (getattr(state, "surgery", None) or {}).get("memory", {})
    if hook not in memory:
        raise StateError(
            f"The state holds no {what} of a hook {hook!r}.",
            found=f"memory of {listed(memory) or 'no hook'}",
            write="state = hooks.init(state), once all hooks are added"
            if not memory
            else " or ".join(map(repr, close_matches(hook, memory) or memory)),
        )
    held = memory[hook]
    held = dict(held) if isinstance(held, Mapping) else held
    return jax.tree.map(lambda leaf: leaf[...] if _is_variable(leaf) else leaf, held, is_leaf=_is_variable)


def _is_variable(leaf: Any) -> bool:
    return hasattr(type(leaf), "raw_value")  # of the type: to read it is deprecated
