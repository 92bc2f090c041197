"""The benchmark runs, and its table has every row. What it measures is for machines that are left alone."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "run.py"


@pytest.fixture(scope="module")
def table():
    """Name of the row -> figure and bound."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_bytes()
    done = subprocess.run([sys.executable, str(SCRIPT), "--fast"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (ROOT / "benchmarks" / "RESULTS.md").read_bytes() == results  # a fast run writes nothing
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {name: (figure, bound) for name, figure, bound in rows[1:]}


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ("an empty callable against itself", 1),
        ("idle call, ", 4),
        ("scale of ", 2),
        ("temporaries of ", 6),
        ("first fire, ", 1),
        ("later fires, ", 1),
        ("plan of ", 1),
    ],
)
def test_every_row_is_there_with_a_figure_and_a_bound(table, row, count):
    found = [figures for name, figures in table.items() if name.startswith(row)]
    assert len(found) == count
    assert all(float(figure.split()[0]) > 0 and float(bound) > 0 for figure, bound in found)


@pytest.mark.parametrize("row", ["sort / top-k", "top-k", "temporaries of top-k"])
def test_selections_of_one_leaf_and_of_many_have_their_rows(table, row):
    found = [float(figure.split()[0]) for name, (figure, _) in table.items() if name.startswith(f"{row} of")]
    assert len(found) == 3
    assert all(figure > 0 for figure in found)


def test_temporaries_are_within_their_bound(table):
    held = {name: (float(figure), float(bound)) for name, (figure, bound) in table.items() if "temporaries" in name}
    assert all(figure < bound for figure, bound in held.values()), held


def test_the_row_of_periodic_actions_is_there_where_they_import(table):
    try:
        import clu.periodic_actions  # noqa: F401
    except ImportError:
        there = False
    else:
        there = True
    assert any("periodic actions" in name for name in table) is there


def test_the_benchmark_of_steps_has_every_row():
    script = ROOT / "benchmarks" / "steps.py"
    done = subprocess.run([sys.executable, str(script), "--fast"], capture_output=True, text=True, check=True, cwd=ROOT)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [name.split(" idle")[0].split(" of ")[0] for name, _ in rows] == [
        "bare step against its twin",
        "step with one hook",
        "wrapped step with one hook",
        "step with one hook without figures and guard",
        "step with one hook",
        "fire",
        "bare step",
        "step",
    ]
    assert all(float(figure.split()[0]) > 0 for _, figure in rows)
