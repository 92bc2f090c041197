"""What `import flax_surgery_hooks` brings in, beyond what `import flax, optax, clu.metrics` brings in anyway."""

import functools
import json
import subprocess
import sys

import pytest

import flax_surgery_hooks as fsh

FLOOR = "import flax, optax, clu.metrics"
OURS = "import flax_surgery_hooks"
# Pure Python and small; what is not in this list has to be imported where it is used.
SMALL = {"flax_surgery_hooks", "absl"}
# Of the packages that are there anyway, the modules that they do not import by themselves.
FURTHER = {"flax.training", "flax.training.train_state"}


@functools.cache
def imported(statement: str) -> frozenset[str]:
    """Names of the modules that a fresh interpreter holds after a statement, without Python's own."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return frozenset(name for name in json.loads(done.stdout) if package(name) not in sys.stdlib_module_names)


def package(name: str) -> str:
    return name.split(".")[0]


def added(statement: str) -> set[str]:
    """What a statement imports beyond the floor, small packages left out."""
    return {name for name in imported(statement) - imported(FLOOR) if package(name) not in SMALL}


def test_nothing_is_imported_beyond_the_floor_but_what_is_small():
    assert added(OURS) <= FURTHER


def test_nothing_heavy_or_optional_is_imported_at_all():
    """Not by the floor either, as things are: should that change, it is worth knowing."""
    heavy = {"tensorflow", "tensorboard", "tensorboardX", "orbax", "matplotlib", "sklearn", "torch", "rich", "tqdm"}
    assert {name for name in imported(OURS) if package(name) in heavy} <= imported(FLOOR)
    assert {"clu.metric_writers", "clu.periodic_actions", "orbax.checkpoint"}.isdisjoint(imported(OURS))


def test_configs_are_there_when_they_are_asked_for():
    asked = f"{OURS} as fsh; assert fsh.config.hook; assert fsh.register_surgery is fsh.config.register_surgery"
    assert "ml_collections" in imported(asked) - imported(OURS)
    with pytest.raises(AttributeError, match="'flax_surgery_hooks' has no attribute 'confg'"):
        fsh.confg  # noqa: B018


def test_the_comparison_sees_an_import():
    assert "tensorboardX" in added(f"{OURS}, tensorboardX")
