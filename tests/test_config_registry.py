"""Which classes configs can name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_cases import Cut, parse_one
from config_cases import own_registry as own_registry  # the fixture `registry`

from flax_surgery_hooks import config_registry
from flax_surgery_hooks.config import hook, register_surgery
from flax_surgery_hooks.config_fields import fields_of
from flax_surgery_hooks.errors import ConfigError

pytestmark = pytest.mark.usefixtures("registry")


def test_a_registered_surgery_end_to_end():
    @register_surgery("halve")
    @dataclasses.dataclass(frozen=True)
    class Halve:
        by: float = 2.0

        def __call__(self, kernel: jax.Array) -> jax.Array:
            return kernel / self.by

    spec = parse_one(hook("halve", params="**", at=(1,)), "by=4")
    assert spec.surgery == Halve(4.0)
    np.testing.assert_array_equal(spec.surgery(jnp.ones(2)), [0.25, 0.25])


@pytest.mark.parametrize("name", ["cut", "normalize"])
def test_a_taken_name_is_refused(name: str, registry: dict[str, type]):
    before = dict(registry)
    with pytest.raises(ConfigError, match=f"The surgery name '{name}' is taken") as caught:
        register_surgery(name)(dataclasses.make_dataclass("Other", [], frozen=True))
    assert str(caught.value.found).endswith(("Cut", "Normalize"))
    assert registry == before


def test_the_same_class_defined_again_replaces_the_old_one(registry: dict[str, type]):
    def define() -> type:
        @register_surgery("again")
        @dataclasses.dataclass(frozen=True)
        class Again:
            pass

        return Again

    first, second = define(), define()
    assert first is not second
    assert registry["again"] is second


class Plain:
    pass


@dataclasses.dataclass
class Thawed:
    x: int = 0


class Undecorated(Cut):
    """Inherits the fields of a frozen dataclass, and silently drops its own."""

    more: int = 0


@pytest.mark.parametrize("cls", [Plain, Thawed, Undecorated, lambda kernel: kernel])
def test_what_is_no_frozen_dataclass_is_refused(cls: Any, registry: dict[str, type]):
    with pytest.raises(ConfigError, match="'x' must be a frozen dataclass") as caught:
        register_surgery("x")(cls)
    assert '@register_surgery("x") above @dataclasses.dataclass(frozen=True)' in str(caught.value)
    assert "x" not in registry


@pytest.mark.parametrize("name", ["", 3, Cut])
def test_a_registration_without_name_is_refused(name: Any):
    with pytest.raises(ConfigError, match="registered under a name"):
        register_surgery(name)


@pytest.mark.parametrize("field", ["every", "params", "values", "lock"])
def test_a_field_with_a_name_in_use_is_refused(field: str):
    cls = dataclasses.make_dataclass("Clash", [(field, int, 0), ("fine", int, 0)], frozen=True)
    with pytest.raises(ConfigError, match="names that hooks or ConfigDict already use") as caught:
        register_surgery("clash")(cls)
    assert caught.value.found == field


def test_fields_that_no_config_holds_may_have_any_name_but_a_hooks_own(registry: dict[str, type]):
    fields = [("values", Callable, None), ("made", int, dataclasses.field(default=0, init=False))]
    register_surgery("fine")(dataclasses.make_dataclass("Fine", fields, frozen=True))
    assert not {"values", "made"} & set(hook("fine"))


def test_annotations_that_cannot_be_resolved_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Dangling:
        x: Missing  # noqa: F821

    with pytest.raises(ConfigError, match="annotations that cannot be resolved") as caught:
        register_surgery("dangling")(Dangling)
    assert caught.value.found == "NameError: name 'Missing' is not defined"
    assert isinstance(caught.value.__cause__, NameError)


# --- The catalogue.


def test_every_builtin_is_known_by_its_snake_case_name():
    known = config_registry.builtins()
    assert {"normalize", "scale", "clip_norm", "noise", "assign", "reinit"} <= known.keys()
    for name, cls in known.items():
        config_registry.check_class(name, cls)
        assert set(hook(name).keys()) >= {key for key, field in fields_of(cls).items() if field.hints}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Normalize", "normalize"),
        ("ClipNorm", "clip_norm"),
        ("EMAReset", "ema_reset"),
        ("Net2Wider", "net2_wider"),
        ("SET", "set"),
        ("RigL", "rigl"),
    ],
)
def test_snake_case(name: str, expected: str):
    assert config_registry.snake_case(name) == expected
