"""What `import flax_surgery_hooks` costs next to `import flax, optax, clu.metrics`: prints one row of a table.

python benchmarks/import_cost.py [--pairs=40]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from paired import Ratio
from tqdm import tqdm

FLOOR = "flax, optax, clu.metrics"
OURS = "flax_surgery_hooks"
BOUND = 1.05


def import_seconds(modules: str) -> float:
    """Wall time of an import in a fresh interpreter, whose own start does not count."""
    code = f"import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def import_ratio(pairs: int) -> Ratio:
    """The two imports in turn, in alternating order, after one of each that does not count (it compiles files)."""
    import_seconds(OURS), import_seconds(FLOOR)
    ratios, of_floor = [], []
    for i in tqdm(range(pairs), unit="pair", disable=not sys.stderr.isatty()):
        order = (OURS, FLOOR) if i % 2 else (FLOOR, OURS)
        times = {modules: import_seconds(modules) for modules in order}
        ratios.append(times[OURS] / times[FLOOR])
        of_floor.append(times[FLOOR])
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, statistics.median(of_floor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    ratio = import_ratio(parser.parse_args().pairs)
    print(f"| import {OURS} / import {FLOOR} ({ratio.seconds:.2f} s) | {ratio} | {BOUND:.2f} |")


if __name__ == "__main__":
    main()
