"""The code of docs/plasticity.md does what it says, and units come to surgeries from a config as the page's do."""

from __future__ import annotations

import doctest
import pathlib
import re

import jax
import jax.numpy as jnp
from config_cases import parse
from unit_cases import CASES

import flax_surgery_hooks as fsh
from flax_surgery_hooks.config import build
from flax_surgery_hooks.surgeries import ContinualBackprop, RecycleDormant

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "plasticity.md").read_text()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def test_the_code_on_the_page_does_what_it_says():
    with jax.numpy_rank_promotion("allow"):  # as it is for whoever reads the page
        runner, names, said = doctest.DocTestRunner(optionflags=FLAGS), {}, []
        for block in re.findall(r"^```pycon\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
            test = doctest.DocTestParser().get_doctest(block, names, "plasticity.md", None, 0)
            runner.run(test, out=said.append, clear_globs=False)
            names = test.globs
    assert runner.tries > 10
    assert not runner.failures, "".join(said)


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
