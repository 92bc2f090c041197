"""Train states for trainers that have none: loose params and optimizer state, or an NNX model with its optimizer.

NNX is imported where it is used: it would make the import of this package a tenth slower for those who do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import StateError, StructureError, shorten


@flax.struct.dataclass
class Bound:
    """Params, optimizer state and optimizer as one immutable value; a pytree, `tx` its static part.

    Attributes:
      params: the parameters.
      opt_state: what `tx.init(params)` makes, some steps later.
      step: train steps applied so far, or None where the trainer's own count is the only one.
      surgery: what surgeries remember.
      tx: the `optax.GradientTransformation`.
    """

    params: Any
    opt_state: Any
    step: Any = None
    surgery: Any = None
    tx: Any = flax.struct.field(pytree_node=False, default=None)


def bind(*, params: Any, opt_state: Any, tx: Any, step: Any = None, surgery: Any = None) -> Bound:
    """What hooks take as a state, of parts that a trainer keeps apart.

    Args:
      params: the parameters.
      opt_state: their optimizer state.
      tx: the optimizer that made it.
      step: train steps applied so far, if the trainer keeps such an array; the first call of hooks compares theirs
        with it. Without it a state replicated for pmap is recognised only if its optimizer counts.
      surgery: what surgeries remember: `hooks.init(fsh.bind(...)).surgery`, then that of the last call.

    >>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
    >>> hooks = fsh.SurgeryHooks()
    >>> hooks.add("halve", lambda w: w / 2, params="w", when=fsh.at(1))
    >>> params, tx = {"w": jnp.ones(2)}, optax.sgd(0.1)
    >>> bound = hooks(1, fsh.bind(params=params, opt_state=tx.init(params), tx=tx))
    >>> bound.params["w"].tolist()
    [0.5, 0.5]
    """
    return Bound(params=params, opt_state=opt_state, step=step, surgery=surgery, tx=tx)


_CHILDREN = ("params", "opt_state", "step", "surgery")


@dataclass(frozen=True, eq=False)
class _Pair:
    """A model and its optimizer; equal to another if it holds the same two objects."""

    model: Any
    optimizer: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pair) and self.model is other.model and self.optimizer is other.optimizer

    def __hash__(self) -> int:
        return hash((id(self.model), id(self.optimizer)))


@jax.tree_util.register_pytree_node_class
class NnxState:
    """An NNX model and its optimizer, seen as a train state; made by `bind_nnx`.

    Without pending values it reads the model and the optimizer as they are at that moment, so it may be kept.
    `replace` returns another one with pending values and touches neither; `write_back` puts these in place.
    """

    def __init__(self, pair: _Pair, pending: Mapping[str, Any]):
        self._pair = pair
        self._pending = dict(pending)

    @property
    def params(self) -> Any:
        """The variables that the optimizer trains, an `nnx.State` of plain arrays."""
        return self._pending["params"] if "params" in self._pending else _params(self._pair)

    @property
    def opt_state(self) -> Any:
        """The optimizer state as optax knows it, without NNX's variables around the arrays."""
        return self._pending["opt_state"] if "opt_state" in self._pending else _pure(self._pair.optimizer.opt_state)

    @property
    def step(self) -> Any:
        """Train steps applied so far: `optimizer.step`."""
        return self._pending["step"] if "step" in self._pending else _pure(self._pair.optimizer.step)

    @property
    def surgery(self) -> Any:
        """What surgeries remember; `hooks.init` keeps it as an attribute `surgery` of the optimizer."""
        held = getattr(self._pair.optimizer, "surgery", None)
        return self._pending["surgery"] if "surgery" in self._pending else _pure(held)

    @property
    def tx(self) -> Any:
        """The `optax.GradientTransformation`."""
        return self._pending.get("tx", self._pair.optimizer.tx)

    def replace(self, **changes: Any) -> NnxState:
        """Another state with these values pending.

        Args:
          **changes: new `params`, `opt_state`, `step`, `surgery` or `tx`.

        Raises:
          StateError: another name.
        """
        unknown = [name for name in changes if name not in (*_CHILDREN, "tx")]
        if unknown:
            raise StateError(
                f"A bound NNX model has no field {unknown[0]!r}.",
                found=f"replace({unknown[0]}=...)",
                write="params=, opt_state=, step=, surgery= or tx=; other attributes on the model itself",
            )
        return NnxState(self._pair, {**self._pending, **changes})

    def write_back(self) -> NnxState:
        """Puts the pending values into the model and the optimizer, all or none; returns a state without any.

        Hooks do this at the end of a call in which something fired; after `fsh.operate` it is for the caller.

        Raises:
          StructureError: the values have other paths than the model or the optimizer.
        """
        from flax import nnx

        pending = {name: value if name == "tx" else _pure(value) for name, value in self._pending.items()}
        here = NnxState(self._pair, {})
        for name in ("params", "opt_state"):
            if name in pending:
                _check_structure(name, pending[name], getattr(here, name))
        optimizer = self._pair.optimizer
        if "params" in pending:
            nnx.update(self._pair.model, pending["params"])
        if "opt_state" in pending:
            nnx.update(optimizer.opt_state, nnx.state(pending["opt_state"], **_mode(optimizer)))
        if "step" in pending:
            optimizer.step[...] = jnp.asarray(pending["step"], jnp.result_type(here.step))
        if "surgery" in pending:
            _keep_memory(optimizer, pending["surgery"])
        if "tx" in pending:
            optimizer.tx = pending["tx"]
        return here

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Arrays, and what is static, for JAX."""
        return tuple(getattr(self, name) for name in _CHILDREN), (self._pair, self.tx)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> NnxState:
        """The inverse of `tree_flatten`, with all values pending."""
        pair, tx = static
        pending = dict(zip(_CHILDREN, children, strict=True))
        return cls(pair, pending if tx is pair.optimizer.tx else {**pending, "tx": tx})


def bind_nnx(model: Any, optimizer: Any) -> NnxState:
    """What hooks take as a state, of an NNX model and its `nnx.Optimizer`.

    A call of hooks, or `hooks.fire`, writes into the two, in place, what fired; at its end, so that an error, be it of
    the last of several hooks, leaves both untouched. A fire whose result is refused writes the old values.
    `fsh.operate` is pure: its result waits for `write_back()`.

    Args:
      model: the model.
      optimizer: its `nnx.Optimizer`; hooks see the variables that it trains, `nnx.state(model, optimizer.wrt)`, by the
        paths of that state: "linear1/kernel", "layers/0/bias".

    Returns:
      A view on the two; the same one may be passed at every step.

    Raises:
      StateError: the arguments are not these.

    >>> import optax, flax_surgery_hooks as fsh
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> hooks = fsh.SurgeryHooks()
    >>> hooks.add("fill", fsh.surgeries.Assign(3.0), params="kernel", when=fsh.at(0))
    >>> state = hooks(0, fsh.bind_nnx(model, optimizer))
    >>> model.kernel[...].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    from flax import nnx

    if not isinstance(optimizer, nnx.Optimizer) or not isinstance(model, nnx.Module):
        raise StateError(
            "`bind_nnx` takes an NNX model and its `nnx.Optimizer`.",
            found=f"{type(model).__name__}, {type(optimizer).__name__}",
            write="fsh.bind_nnx(model, optimizer), or fsh.bind(params=..., opt_state=..., tx=...) for other parts",
        )
    return NnxState(_Pair(model, optimizer), {})


def _pure(tree: Any) -> Any:
    """The tree with arrays in place of NNX's variables."""
    from flax import nnx

    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)  # the name in Flax 0.11


def _mode(optimizer: Any) -> dict[str, Any]:
    return {"graph": optimizer.graph} if hasattr(optimizer, "graph") else {}  # Flax 0.11 has no modes


def _keep_memory(optimizer: Any, memory: Any) -> None:
    """Puts arrays into the optimizer's attribute, as variables of the class that its own step is."""
    from flax import nnx

    held = getattr(optimizer, "surgery", None)
    new: Any = jax.tree.structure(memory)
    if held is not None and jax.tree.structure(_pure(held)) == new:
        nnx.update(held, nnx.state(memory, **_mode(optimizer)))
        return
    optimizer.surgery = nnx.data(jax.tree.map(type(optimizer.step), memory))


def _params(pair: _Pair) -> Any:
    from flax import nnx

    return _pure(nnx.state(pair.model, pair.optimizer.wrt, **_mode(pair.optimizer)))


def _check_structure(name: str, new: Any, held: Any) -> None:
    structure: Any = jax.tree.structure(new)
    if structure != jax.tree.structure(held):
        raise StructureError(
            f"The new {name} have other paths than the model and optimizer that they belong to.",
            found=shorten(structure, 150),
            write="an edit that keeps paths, or another model and optimizer, bound anew",
        )
