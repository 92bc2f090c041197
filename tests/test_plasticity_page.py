"""The code of docs/plasticity.md does what it says, and units come to surgeries from a config as the page's do."""

from __future__ import annotations

import jax.numpy as jnp
from config_cases import parse
from page_code import run_page
from unit_cases import CASES

import flax_surgery_hooks as fsh
from flax_surgery_hooks.config import build
from flax_surgery_hooks.surgeries import ContinualBackprop, RecycleDormant


def test_the_code_on_the_page_does_what_it_says():
    assert run_page("plasticity.md") > 10


def test_units_and_activations_come_to_a_config_as_objects():
    case = CASES["mlp"]
    objects = {"units": case.units, "init": case.init, "activations": fsh.units.activations(case.model)}
    hooks = {
        "redo": fsh.config.hook("recycle_dormant", params="**", every=100),
        "cbp": fsh.config.hook("continual_backprop", params="**", every=1),
    }
    cbp, redo = build(parse(hooks, "redo.tau=0.2", "cbp.rate=0.01", "cbp.compensate=True"), objects)
    assert redo.surgery == RecycleDormant(**objects, tau=0.2)
    assert cbp.surgery == ContinualBackprop(**objects, rate=0.01, compensate=True)
    assert jnp.shape(cbp.surgery.init_memory(_leaves(case))["k"]["age"]) == (5,)


def _leaves(case):
    return {f"{one}/{leaf}": value for one, held in case.params().items() for leaf, value in held.items()}
