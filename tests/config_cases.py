"""Surgeries that configs of the tests name, and how the tests read configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from flax_surgery_hooks import config_registry
from flax_surgery_hooks.config import HookSpec, build, hook
from flax_surgery_hooks.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Cut:
    """A surgery with a field of every type that a config can hold, and of some that none can."""

    sparsity: float
    seed: int | None = None
    mode: Literal["low", "high"] = "low"
    tag: str | None = None
    axes: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.99)
    axis: int | tuple[int, ...] | None = None
    decay: float | None = 0.5
    dry: bool = False
    weight: float | Callable[[int], float] = 1.0
    score: Callable[[Any], Any] | None = None

    def __post_init__(self):
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must be in [0, 1], is {self.sparsity}")

    def __call__(self, kernel: jax.Array) -> jax.Array:
        return kernel * (1 - self.sparsity)


@dataclasses.dataclass(frozen=True)
class Fill:
    """A surgery whose one field, required, no config can hold."""

    fn: Callable[[Any], Any]

    def __call__(self, kernel: jax.Array) -> jax.Array:
        return self.fn(kernel)


@pytest.fixture(name="registry")
def own_registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """A registry of this test's own."""
    registered = {"cut": Cut, "fill": Fill}
    monkeypatch.setattr(config_registry, "_registered", registered)
    return registered


def cut(**fields: Any) -> ConfigDict:
    return hook("cut", **{"params": "**/kernel", "every": 500, "sparsity": 0.5, **fields})


def parse(hooks: Mapping[str, ConfigDict], *arguments: str) -> ConfigDict:
    """`config.surgery` after absl has parsed `--config.surgery.<argument>` for each argument."""
    config = ConfigDict({"surgery": dict(hooks)})
    flag_values = flags.FlagValues()
    argv = ["train.py", *(f"--config.surgery.{argument}" for argument in arguments)]
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
    flag_values(argv)
    return flag_values.config.surgery


def parse_one(base: ConfigDict, *arguments: str) -> HookSpec:
    [spec] = build(parse({"prune": base}, *(f"prune.{argument}" for argument in arguments)))
    return spec


def problems_of(config: Any, objects: Mapping[str, Any] | None = None, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(config, objects, **kwargs)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


def problem_of(objects: Mapping[str, Any] | None = None, **fields: Any) -> str:
    """The one problem of a plain dict config that is right but for `fields`."""
    config = {"surgery": "cut", "params": "**/kernel", "every": 500, "sparsity": 0.5, **fields}
    [problem] = problems_of({"prune": config}, objects)
    return problem
