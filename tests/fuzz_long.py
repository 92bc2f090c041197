"""Tens of thousands of generated inputs: `python tests/fuzz_long.py --examples 20000 [--only configs] [--seed 1]`.

Prints how many were accepted, fired and refused, by error; every exception of another type with a small example, and
exits with 1 if there was one. CI runs a few hundred of the same inputs (tests/test_fuzz_*.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import fuzz_calls
import fuzz_inputs
import fuzz_ledgers
import fuzz_runs
import hypothesis
import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from flax_surgery_hooks import config_registry

BATCH = 500
TARGETS = {
    "configs": (fuzz_inputs.inputs(), fuzz_runs.run_config),
    "calls": (fuzz_calls.call_sequences, fuzz_calls.run_calls),
    "schedules": (fuzz_calls.schedule_calls, fuzz_calls.run_schedule),
    "selections": (fuzz_calls.selections, fuzz_calls.run_selection),
    "round trips": (fuzz_ledgers.records, fuzz_ledgers.run_round_trip),
    "lines": (fuzz_ledgers.lines, fuzz_ledgers.run_line),
    "ledgers": (fuzz_ledgers.damaged, fuzz_ledgers.run_damaged),
    "saved": (fuzz_ledgers.saved, fuzz_ledgers.run_saved),
}


@contextlib.contextmanager
def cached(directory: os.PathLike[str] | str) -> Iterator[None]:
    """Keeps compiled programs in a directory: hooks of each input would compile the same ones anew."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it looks at the directory once
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def batch(target: str, tally: fuzz_runs.Tally, seed: int, examples: int) -> None:
    """So many inputs more; what escapes is noted and not raised."""
    strategy, run = TARGETS[target]

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=examples, deadline=None, database=None, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(strategy)
    def more(given):
        tally.add(fuzz_runs.judged(lambda: run(given)), given)

    more()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000, help="inputs of each target")
    parser.add_argument("--only", choices=TARGETS, help="one target alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="stop after so long")
    options = parser.parse_args()

    logging.set_verbosity(logging.FATAL)
    warnings.simplefilter("error")
    config_registry._registered.update(fuzz_inputs.REGISTERED)
    end, escaped = time.monotonic() + 60 * options.minutes, False
    with tempfile.TemporaryDirectory() as directory, cached(directory):
        for target in [options.only] if options.only else TARGETS:
            tally = fuzz_runs.Tally()
            while tally.total < options.examples and time.monotonic() < end:
                number = tally.total
                batch(target, tally, options.seed * 1_000_003 + number, min(BATCH, options.examples - number))
                jax.clear_caches()
                print(f"{target}: {tally}", flush=True)
            for what, (example, error) in tally.examples.items():
                print(f"\n=== {what}\n{example[:3000]}")
                traced = traceback.format_exception(error, limit=-6, chain=False)
                print("".join(line[:1000] for line in traced))
            escaped |= bool(tally.examples)
    return int(escaped)


if __name__ == "__main__":
    sys.exit(main())
