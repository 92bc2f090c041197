"""Records read back from their lines, and the file of a ledger cut to what a checkpoint knows."""

import json
import math
import os

import pytest

import flax_surgery_hooks as fsh
from flax_surgery_hooks import ledger_files, processes
from flax_surgery_hooks.watched_schedules import Trigger

FULL = fsh.Record(
    event="fired", step=7, hook="halve", id=0, surgery='{"name": "Scale", "by": 0.5}', rule="transport",
    paths=("a/kernel", "b"), added=("b",), removed=("c",), leaves=(((2, 3), "float32"), ((), "bfloat16")),
    in_place=("a/kernel",), restarted=("Adam.count x",), donated=True, passed=(5, 6),
    seconds=0.1234567, time=1e9 + 0.12345,
    triggers=(Trigger("on_metric('loss', above=3.0)", 3, math.inf, 3.0),), detail='{"a": [1, null]}',
    structure='{"params": {}}', figures={"params/norm": 1.5},
)  # fmt: skip


def lines(*steps):
    return [fsh.Record(event="fired", step=step, hook="halve", time=1.0).to_json() for step in steps]


def write(path, held):
    path.write_text("".join(f"{line}\n" for line in held))
    return path


def test_a_record_is_read_as_it_was_written():
    line = FULL.to_json()
    again = fsh.Record.from_json(line)
    assert again.to_json() == line
    assert again.replace(seconds=FULL.seconds, time=FULL.time) == FULL
    assert set(json.loads(line)) == {field for field in FULL.__dataclass_fields__ if field != "per_leaf"}
    assert math.isnan(fsh.Record.from_json(FULL.replace(figures={"x": math.inf}).to_json()).figures["x"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"event": "fired", "step": 1', "no JSON"),
        ('{"event": "fired", "figures": {"x": NaN}}', "no JSON"),
        ("[1]", "no record"),
        ('{"event": "fired", "colour": 1}', "Found: colour"),
        ('{"event": "burned"}', "Found: burned"),
        ('{"step": 1}', "no event"),
        ('{"event": "fired", "step": true}', "field 'step'"),
        ('{"event": "fired", "leaves": [{"shape": [2]}]}', "field 'leaves'"),
        ('{"event": "fired", "triggers": [{"schedule": "x", "stop": 3}]}', "field 'triggers'"),
        ('{"event": "fired", "figures": {"x": "much"}}', "field 'figures'"),
    ],
)
def test_a_line_that_is_no_record_is_an_error(line, says):
    with pytest.raises(fsh.errors.LedgerError, match=says):
        fsh.Record.from_json(line)


def test_a_damaged_file_says_what_of_it_is_whole(tmp_path):
    path = write(tmp_path / "ledger.jsonl", lines(1, 2, 3))
    assert [record.step for record in fsh.Ledger.read(path)] == [1, 2, 3]
    path.write_text(path.read_text()[:-9])
    with pytest.raises(fsh.errors.LedgerError, match=r"line 3'.*lines 1 to 2 are whole"):
        fsh.Ledger.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(fsh.errors.LedgerError, match="cannot be read"):
        fsh.Ledger.read(path)
    with pytest.raises(fsh.errors.LedgerError, match="No such file"):
        fsh.Ledger.read(tmp_path / "none.jsonl")
    path.write_text("")
    assert fsh.Ledger.read(path) == ()


def test_a_file_is_cut_and_its_tail_kept(tmp_path):
    path = write(tmp_path / "ledger.jsonl", lines(1, 2, 3))
    kept = ledger_files.cut(path, lines(1, 2))
    assert path.read_text().splitlines() == lines(1, 2)
    assert kept == tmp_path / "ledger.jsonl.tail-1"
    assert kept.read_text().splitlines() == lines(3)
    write(path, lines(1, 2, 4, 5))
    assert ledger_files.cut(path, lines(1, 2)).read_text().splitlines() == lines(4, 5)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "ledger.jsonl",
        "ledger.jsonl.tail-1",
        "ledger.jsonl.tail-2",
    ]
    assert ledger_files.cut(path, lines(1, 2)) is None


def test_a_file_with_less_than_the_checkpoint_is_written_from_it(tmp_path):
    path = tmp_path / "logs" / "ledger.jsonl"
    assert ledger_files.cut(path, lines(1, 2)) is None  # deleted, with its directory
    assert path.read_text().splitlines() == lines(1, 2)
    path.write_text(path.read_text()[:-9])  # torn by a crash
    torn = path.read_bytes()
    assert ledger_files.cut(path, lines(1, 2)).read_bytes() == torn
    assert path.read_text().splitlines() == lines(1, 2)


def test_a_damaged_middle_is_mended_and_kept(tmp_path):
    path = write(tmp_path / "ledger.jsonl", [*lines(1), "{damaged", *lines(3)])
    kept = ledger_files.cut(path, lines(1, 2, 3))
    assert kept.read_text().splitlines() == [*lines(1), "{damaged", *lines(3)]
    assert path.read_text().splitlines() == lines(1, 2, 3)


def test_a_file_of_another_run_is_left_alone(tmp_path):
    path = write(tmp_path / "ledger.jsonl", lines(8, 9))
    with pytest.raises(fsh.errors.LedgerError, match=r"another run.*move this one away"):
        ledger_files.cut(path, lines(1, 2))
    assert path.read_text().splitlines() == lines(8, 9)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_directory_is_an_error(tmp_path):
    path = write(tmp_path / "ledger.jsonl", lines(1, 2))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(fsh.errors.LedgerError, match="cannot be written"):
            ledger_files.cut(path, lines(1))
    finally:
        tmp_path.chmod(0o700)


def test_what_is_no_file_is_an_error(tmp_path):
    with pytest.raises(fsh.errors.LedgerError, match="cannot be written"):
        ledger_files.cut(tmp_path, lines(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(fsh.errors.LedgerError, match="cannot be written"):
        ledger_files.cut(tmp_path / "file" / "ledger.jsonl", lines(1))


def test_a_ledger_takes_records_for_all_that_has_happened(tmp_path):
    path = write(tmp_path / "ledger.jsonl", lines(1, 2, 3))
    ledger = fsh.Ledger(path)
    ledger.resume(fsh.Ledger.read(path)[:2])
    ledger.write(fsh.Record(event="fired", step=9, hook="halve", time=1.0))
    assert [record.step for record in ledger.records] == [1, 2, 9]
    assert path.read_text().splitlines() == lines(1, 2, 9)


def test_what_the_first_process_raises_is_raised():
    def fail():
        raise fsh.errors.LedgerError("No.")

    with pytest.raises(fsh.errors.LedgerError, match="No"):
        processes.by_first("test", fail)
