"""What a surgery computes once per fire, before its edit, and gets as inputs: gradients of the user's loss, a mask.

The two passes of a fire and the derivative of the edit each run the surgery anew; what is costly, or decides for all of
them, is made here once. The functions are those of the surgery's attribute `derived`, by name and in order:

    of `state`, the whole train state as it is before the fire: these see the train step's own mesh, and may call the
        user's model;
    of `leaves`, path -> selected leaf (float32 where it is stored in fewer bits), and `memory`: these run like an edit,
        under Auto axes.

Further parameters are filled by name: `key` (the key of the fire), `step`, inputs, and what was made before. They are
called when the hook fires, and once at the first call of the hooks, where everything that can be wrong is looked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_surgery_hooks.errors import SurgeryError, SurgeryFunctionError, UserCodeError, shorten
from flax_surgery_hooks.methods import Method
from flax_surgery_hooks.operation import Operation, compute_dtype
from flax_surgery_hooks.passes import Deriving
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.placement import is_auto, out_sharding, placement, relabelled
from flax_surgery_hooks.reductions import Places, across, places_of
from flax_surgery_hooks.surgery import LEAVES, STATE

Run = Callable[[str, Method, dict[str, Any]], Any]
"""From a name, its function and the arguments of that to what it makes."""


def from_state(operation: Operation, state: Any, given: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The inputs, with what functions of the state make.

    Args:
      operation: the surgery and its rules.
      state: the train state.
      given: `key`, `step`, and the inputs that are arrays.
      run: how functions are called: `of_state` of `Traced`, `Abstractly` or `Compiled`.

    Raises:
      UserCodeError: a function raised.
      SurgeryFunctionError: it made something else than arrays.
    """
    return _made(operation, {**given, STATE: state}, run, of_state=True)


def from_leaves(
    operation: Operation, leaves: Mapping[str, Any], memory: Any, given: Mapping[str, Any], run: Run
) -> dict[str, Any]:
    """The inputs that the edit asks for, with what functions of the leaves make.

    Args:
      operation: the surgery and its rules.
      leaves: path -> selected leaf, as it is stored; those that one call of the surgery sees.
      memory: what the surgery remembers.
      given: `key`, `step`, and what `from_state` has returned.
      run: how functions are called: `of_leaves` of `Traced`, `Abstractly` or `Compiled`.

    Raises:
      UserCodeError, SurgeryFunctionError: as for `from_state`.
    """
    ready = {**given, LEAVES: dict(leaves), "memory": memory}
    return _asked(operation, _made(operation, ready, run, of_state=False))


def again_from_leaves(
    operation: Operation, leaves: Mapping[str, Any], memory: Any, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The inputs, with what functions of the leaves alone make of other leaves; what needs more is left as given."""
    inputs = dict(given)
    for name, method in operation.edit.derived:
        ready = {**given, **dict(operation.static), LEAVES: dict(leaves), "memory": memory}
        if name in given and not method.takes(STATE) and all(want in ready for want in method.wants):
            inputs[name] = call(name, method, method.fill(ready))
    return {name: inputs[name] for name in given}


def _made(operation: Operation, ready: Mapping[str, Any], run: Run, *, of_state: bool) -> dict[str, Any]:
    inputs = {name: value for name, value in ready.items() if name not in (STATE, LEAVES, "memory", "key", "step")}
    for name, method in operation.edit.derived:
        if method.takes(STATE) == of_state:
            inputs[name] = run(name, method, method.fill({**ready, **inputs, **dict(operation.static)}))
    return inputs


def _asked(operation: Operation, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the passes of a fire are given: not a batch that only a gradient was asked of."""
    edit = operation.edit
    if not edit.derived:
        return dict(inputs)
    methods = [method for method in (edit.main, edit.figures, edit.edit_slots) if method is not None]
    return {
        name: value
        for name, value in inputs.items()
        if name in edit.fold_wants or any(method.takes(name) for method in methods)
    }


class Traced:
    """How functions are called inside a trace, on leaves that lie so."""

    of_state: Run

    def __init__(self, lie: Places):
        self.of_state = call
        self._lie = lie

    def of_leaves(self, name: str, method: Method, arguments: dict[str, Any]) -> Any:
        """A run for `from_leaves`."""
        with across(self._lie):
            return call(name, method, arguments)


class Abstractly:
    """How functions are called where only shapes are asked for."""

    @staticmethod
    def of_state(name: str, method: Method, arguments: dict[str, Any]) -> Any:
        """A run for `from_state`."""
        static = {key: value for key, value in arguments.items() if not _is_arrays(value) and key != STATE}
        arrays = {key: value for key, value in arguments.items() if key not in static}
        return jax.eval_shape(lambda arrays: call(name, method, {**arrays, **static}), arrays)

    @staticmethod
    def of_leaves(name: str, method: Method, arguments: dict[str, Any]) -> Any:
        """A run for `from_leaves`, which are under Auto axes where they have values."""
        bare = {key: _unplaced(value) if _is_arrays(value) else value for key, value in arguments.items()}
        return Abstractly.of_state(name, method, bare)


def call(name: str, method: Method, arguments: dict[str, Any]) -> Any:
    """Calls a function, traced or operation by operation."""
    if LEAVES in arguments:
        arguments = {**arguments, LEAVES: {path: _wide(leaf) for path, leaf in arguments[LEAVES].items()}}
    try:
        result = method.function(**arguments)
    except SurgeryError:
        raise
    except Exception as error:
        raise UserCodeError(f"{method.name} raised {type(error).__name__}: {shorten(error)}") from error
    odd = [type(leaf).__name__ for leaf in jax.tree.leaves(result) if not _is_number(leaf)]
    if odd or not jax.tree.leaves(result):
        raise SurgeryFunctionError(
            f"{method.name} must return arrays, or a pytree of them.",
            found=listed(odd) if odd else type(result).__name__,
            write="return jax.grad(loss)(state.params, batch)",
        )
    return result


class Compiled:
    """The functions of one operation, compiled for the host; what they make lies like leaves of its shape.

    Attributes:
      programs: what has been compiled.
    """

    def __init__(self) -> None:
        self.programs: dict[Hashable, Deriving] = {}

    def of_state(self, name: str, method: Method, arguments: dict[str, Any]) -> Any:
        """A run for `from_state`. A state that is no pytree of arrays is given as it is, operation by operation."""
        static = {key: value for key, value in arguments.items() if not _is_arrays(value)}
        if STATE in static:
            return call(name, method, arguments)
        if name not in self.programs:
            self.programs[name] = Deriving(name, jax.jit(lambda arrays: call(name, method, {**arrays, **static})))
        return self.programs[name]({key: value for key, value in arguments.items() if key not in static})

    def of_leaves(self, name: str, method: Method, arguments: dict[str, Any]) -> Any:
        """A run for `from_leaves`, of concrete ones."""
        static = {key: value for key, value in arguments.items() if not _is_arrays(value) and key != "memory"}
        arrays = {key: value for key, value in arguments.items() if key not in static}
        leaves, treedef = jax.tree.flatten(arrays)
        if not all(map(is_auto, leaves)):
            arrays = relabelled(arrays)
        key = (name, treedef, tuple(map(placement, leaves)))
        if key not in self.programs:
            near = jax.tree.leaves(arrays.get(LEAVES, ()))
            lie = places_of((jnp.shape(leaf), getattr(leaf, "sharding", None)) for leaf in near)
            function = functools.partial(_called, name, method, static, lie)
            places = jax.tree.map(functools.partial(_place, near), jax.eval_shape(function, arrays))
            self.programs[key] = Deriving(name, jax.jit(function, out_shardings=places))
        return self.programs[key](arrays)


def _called(name: str, method: Method, static: dict[str, Any], lie: Places, arrays: dict[str, Any]) -> Any:
    return Traced(lie).of_leaves(name, method, {**arrays, **static})


def _place(near: Sequence[Any], made: Any) -> Any:
    """Where an array goes that is made of leaves: beside the first of its shape."""
    return next((out_sharding(leaf, made.shape) for leaf in near if jnp.shape(leaf) == made.shape and made.shape), None)


def _unplaced(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def _wide(leaf: Any) -> Any:
    array = jnp.asarray(leaf)
    return array.astype(compute_dtype(array.dtype))


def _is_arrays(value: Any) -> bool:
    return all(map(_is_number, jax.tree.leaves(value)))


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or (isinstance(leaf, int | float | complex) and not isinstance(leaf, bool))
