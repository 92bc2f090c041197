"""What the units of a Flax model do on a batch: the intermediates that it sows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax_surgery_hooks.errors import UnitsError
from flax_surgery_hooks.paths import flatten, listed

Captured = tuple[Any, dict[str, Any]]


def capture(model: Any, variables: Any, *inputs: Any, **options: Any) -> Captured:
    """The output of a Linen model, and what it sows by `self.sow("intermediates", name, h)`.

    Args:
      model: a `flax.linen.Module`.
      variables: what `model.apply` takes, such as `{"params": params}`.
      inputs: positional arguments of the model.
      options: keyword arguments of `model.apply`, such as `rngs=`.

    Returns:
      The output, and path of the module / name -> array.

    Raises:
      UnitsError: it sows nothing, or one name several times.

    >>> import jax, jax.numpy as jnp
    >>> import flax.linen as nn
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         h = nn.relu(nn.Dense(3)(x))
    ...         self.sow("intermediates", "h", h)
    ...         return nn.Dense(2)(h)
    >>> x = jnp.ones((4, 5))
    >>> params = Net().init(jax.random.key(0), x)["params"]
    >>> output, made = capture(Net(), {"params": params}, x)
    >>> made["h"].shape
    (4, 3)
    """
    output, kept = model.apply(variables, *inputs, mutable=["intermediates"], **options)
    flat = flatten(kept.get("intermediates", {}))
    sown: dict[str, Any] = {}
    for path, value in zip(flat.paths, flat.values, strict=True):
        name, _, turn = path.rpartition("/")  # what is sown under a name is a tuple
        if turn != "0":
            raise UnitsError(
                "The model sows one name several times in a call.", found=name, write="a name for each, or a scan"
            )
        sown[name] = value
    if not sown:
        raise UnitsError(
            "The model sows no intermediates.",
            found=type(model).__name__,
            write='self.sow("intermediates", "h", h) behind the activation function',
        )
    return output, sown


def activations(model: Any, inputs: Callable[[Any], Any] = lambda batch: batch) -> Callable[..., Mapping[str, Any]]:
    """A function `(state, batch) -> {name: array}` for surgeries on units, of what a Linen model sows.

    For a model with other collections or random numbers, write the two lines yourself, with `capture`.

    Args:
      model: a `flax.linen.Module` that is applied to `{"params": state.params}`.
      inputs: from the batch that the train loop passes, `hooks(step, state, batch=batch)`, to the model's input.
    """

    def activations(state: Any, batch: Any) -> Mapping[str, Any]:
        return capture(model, {"params": state.params}, inputs(batch))[1]

    return activations


def known(activations: Mapping[str, Any]) -> str:
    """Names and shapes of activations, for messages."""
    return listed(f"{name} {list(made.shape)}" for name, made in activations.items())
