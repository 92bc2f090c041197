"""Ledgers for the fuzz tests: records that could have been, their lines damaged, and files that are no ledgers."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from typing import Any

import fuzz_runs
from fuzz_inputs import texts
from hypothesis import strategies as st

import flax_surgery_hooks as fsh
from flax_surgery_hooks.ledger import EVENTS
from flax_surgery_hooks.watched_schedules import Trigger

# --- Records as the library makes them.

_texts = texts.filter(lambda text: len(text) < 100)
_paths = st.lists(_texts, max_size=3).map(tuple)
_steps = st.integers(0, 2**40)
_seconds = st.floats(0, 1e10)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_told = st.just("") | st.dictionaries(_texts, _json, min_size=1, max_size=3).map(json.dumps)
_triggers = st.lists(
    st.builds(Trigger, _texts, _steps, st.floats() | st.integers(0, 2**60), st.none() | st.floats(),
              st.none() | st.floats(), st.none() | st.integers(1, 9)), max_size=2,
).map(tuple)  # fmt: skip
_leaves = st.lists(
    st.tuples(st.lists(st.integers(0, 99), max_size=3).map(tuple), st.sampled_from(["float32", "key<fry>"])), max_size=3
).map(tuple)
records = st.builds(
    fsh.Record,
    event=st.sampled_from(EVENTS), step=st.none() | _steps, hook=_texts, id=st.none() | _steps, surgery=_told,
    rule=_texts,
    paths=_paths, added=_paths, removed=_paths, leaves=_leaves, in_place=_paths, restarted=_paths,
    donated=st.booleans(),
    passed=st.lists(_steps, max_size=3).map(tuple), triggers=_triggers, seconds=_seconds, time=_seconds, detail=_told,
    figures=st.dictionaries(_texts, st.floats(), max_size=3),
)  # fmt: skip


def run_round_trip(record: fsh.Record) -> int:
    """A record to its line and back; the line is the same again."""
    line = record.to_json()
    assert fsh.Record.from_json(line).to_json() == line
    return 1


# --- Ledgers that are damaged.


def real_hooks(**kwargs: Any) -> fsh.SurgeryHooks:
    """Hooks that are due by steps, by a metric and by a counter."""
    hooks = fsh.SurgeryHooks(on_error="skip", **kwargs)
    hooks.add("halve", _halve, params="**", when=fsh.at(0, 2, 3))
    hooks.add("calm", fsh.surgeries.Scale(0.9), params="**/kernel", when=fsh.on_metric("loss", above=3, lag=1))
    hooks.add("spoil", _spoil, params="**/bias", when=fsh.every_count(100, of="tokens"))
    return hooks


def _halve(w: Any) -> Any:
    return w / 2


def _spoil(w: Any) -> Any:
    return w / 0


def called(hooks: fsh.SurgeryHooks, first: int, last: int) -> None:
    """A loop from one step to another."""
    state = fuzz_runs.first_state("sgd")
    for step in range(first, last + 1):
        metrics = {"loss": float("inf") if step == 2 else 10.0 / step}
        state = hooks(step, state.replace(step=step), metrics=metrics, tokens=step * 40)


@functools.cache
def real_lines() -> tuple[str, ...]:
    """The lines that a run wrote: fires by steps, by a metric and by a counter, refused ones, passed steps."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "ledger.jsonl"
        hooks = real_hooks(ledger=path)
        called(hooks, 1, 6)
        hooks.flush()
        lines = path.read_text().splitlines()
    events = {json.loads(line)["event"] for line in lines}
    assert {"run", "fired", "settled", "refused", "passed"} <= events, events
    return tuple(lines)


_odd_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, 2**63, 1e308]) | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts, inner, max_size=3)
        | st.dictionaries(st.sampled_from(["shape", "dtype", "schedule", "step", "value", "limit"]), inner, max_size=4)
    ),
    max_leaves=5,
)
_fields = st.sampled_from(["event", "step", "hook", "id", "surgery", "rule", "paths", "leaves", "passed", "triggers",
                           "figures",
                           "detail", "seconds", "time", "donated", "structure", "added", "other"])  # fmt: skip
_odd_records = st.dictionaries(_fields, _odd_json, max_size=4).map(
    lambda fields: {"event": "fired", "step": 1, "hook": "a", **fields}
)
_raw = st.sampled_from(["", " ", "{", "}", "null", "[]", "{}", '""', "NaN", '{"event": NaN}', "[" * 100_000, "1" * 5000,
                        '{"event": "run", "event": 3}', "\ufeff{}", "\x00", "\u2028", '"\\ud800"',
                        '{"a":' * 50_000])  # fmt: skip
_odd_lines = (_odd_json | _odd_records).map(json.dumps) | _raw | st.text(max_size=20)
_damages = st.sampled_from(
    ["none", "truncate", "flip", "duplicate", "swap", "drop", "replace", "odd", "bytes", "join", "crlf"]
)
damaged = st.tuples(
    st.lists(st.tuples(_damages, st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=3), _odd_lines,
    st.binary(max_size=40),
)  # fmt: skip


def damaged_bytes(given: tuple[list[tuple[str, int, int]], str, bytes]) -> bytes:
    """A real ledger after some accidents."""
    damages, odd_line, binary = given
    data = "".join(f"{line}\n" for line in real_lines()).encode()
    for kind, first, second in damages:
        data = _damaged(data, kind, first, second, odd_line.encode(errors="surrogatepass"), binary)
    return data


def _damaged(data: bytes, kind: str, first: int, second: int, line: bytes, binary: bytes) -> bytes:
    at, other = first % (len(data) + 1), second % (len(data) + 1)
    lines = data.splitlines(keepends=True) or [b""]
    here, there = first % len(lines), second % len(lines)
    if kind == "truncate":
        return data[:at]
    if kind == "flip" and data:
        at = at % len(data)
        return data[:at] + bytes([data[at] ^ (1 << second % 8)]) + data[at + 1 :]
    if kind == "duplicate":
        return b"".join([*lines[:here], lines[here], *lines[here:]])
    if kind == "swap":
        lines[here], lines[there] = lines[there], lines[here]
        return b"".join(lines)
    if kind == "drop":
        return b"".join(lines[:here] + lines[here + 1 :])
    if kind == "odd":
        return b"".join([*lines[:here], line, b"\n", *lines[here:]])
    if kind == "bytes":
        return data[:at] + binary + data[other:]
    return {"replace": line, "join": data.replace(b"\n", b"", 1), "crlf": data.replace(b"\n", b"\r\n")}.get(kind, data)


def run_damaged(given: Any) -> int:
    """Reads a damaged ledger from its file and line by line, and goes on with it; how many records it has."""
    data = damaged_bytes(given)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "ledger.jsonl"
        path.write_bytes(data)
        resumed(path)
        path.write_bytes(data)
        found = fsh.Ledger.read(path)
    for record in found:
        assert fsh.Record.from_json(record.to_json()).to_json() == record.to_json()
    return len(found)


def resumed(path: pathlib.Path) -> None:
    """Goes on from what a checkpoint of the undamaged run knows: the file is that, or an error left it as it was."""
    known = [fsh.Record.from_json(line) for line in real_lines()[:4]]
    before, ledger = path.read_bytes(), fsh.Ledger(path)
    try:
        ledger.resume(known)
    except fsh.errors.LedgerError:
        assert path.read_bytes() == before
    else:
        assert [record.to_json() for record in fsh.Ledger.read(path)] == [record.to_json() for record in known]


def run_line(line: str) -> int:
    """Reads one line of any text."""
    record = fsh.Record.from_json(line)
    assert fsh.Record.from_json(record.to_json()).to_json() == record.to_json()
    return 1


lines = _odd_lines | records.map(lambda record: record.to_json())


# --- What hooks have saved.


@functools.cache
def saved_json() -> str:
    """What hooks saved in the middle of a run, as a checkpoint holds it."""
    hooks = real_hooks()
    called(hooks, 1, 4)
    return json.dumps(hooks.state_dict())


_places = st.lists(st.integers(0, 40), min_size=1, max_size=4)
_changes = st.lists(st.tuples(_places, st.sampled_from(["replace", "delete", "add"]), _odd_json), max_size=2)
saved = st.tuples(
    _changes, st.booleans(), st.sampled_from([(), (), ("halve",), ("halve", "calm", "spoil", "x"), "halve"])
)


def changed(value: Any, place: list[int], kind: str, new: Any) -> Any:
    """A JSON value with something else, nothing or something more where `place` leads to."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not place or not len(keys):
        return new
    key = keys[place[0] % len(keys)]
    rest = dict(value) if isinstance(value, dict) else list(value)
    if len(place) > 1 and isinstance(rest[key], dict | list):
        rest[key] = changed(rest[key], place[1:], kind, new)
    elif kind == "delete":
        del rest[key]
    elif kind == "add" and isinstance(rest, dict):
        rest["other"] = new
    else:
        rest[key] = new
    return rest


def run_saved(given: Any) -> int:
    """Goes on from what was saved and has been changed since; how many records there are in the end."""
    changes, goes_on, allow_changes = given
    held = json.loads(saved_json())
    for place, kind, new in changes:
        held = changed(held, place, kind, new)
    hooks = real_hooks()
    str(hooks.load_state_dict(held, allow_changes))
    json.dumps(hooks.state_dict(), allow_nan=False)
    if goes_on:
        called(hooks, 5, 6)
    hooks.flush()
    return len(hooks.ledger.records)
