"""Records as lines of JSON, read back: from text to the fields of a record, or an error that says what is wrong."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax_surgery_hooks.errors import LedgerError, located, shorten
from flax_surgery_hooks.watched_schedules import Trigger

WRITE = "a line that `Record.to_json` of this release wrote"


def read(path: pathlib.Path, events: Collection[str]) -> list[dict[str, Any]]:
    """The fields of every record in a file.

    Raises:
      LedgerError: it cannot be read, or a line is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # bytes that are no text, or a name with a zero byte
        raise LedgerError(
            f"The ledger cannot be read: {shorten(error)}",
            path=str(path),
            write="the JSON lines of SurgeryHooks(ledger=)",
        ) from error
    return parsed(text, events, str(path))


def parsed(text: str, events: Collection[str], path: str) -> list[dict[str, Any]]:
    """The fields of every record in the text of a ledger.

    Raises:
      LedgerError: a line is no record.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"), 1):
        if not text:
            break
        try:
            with located(path=f"{path}, line {number}"):
                found.append(fields_of(line, events))
        except LedgerError as error:
            readable = f"lines 1 to {number - 1} are whole" if number > 1 else "no line before it"
            error.problem = f"{error.problem} Of this file, {readable}."
            raise
    return found


def fields_of(line: str, events: Collection[str]) -> dict[str, Any]:
    """The fields of the record that a line tells of.

    Raises:
      LedgerError: it tells of none.
    """
    try:
        told = json.loads(line, parse_constant=_no_constant)
    except (ValueError, TypeError, RecursionError) as error:
        raise _wrong("A line of the ledger is no JSON.", line) from error
    if not isinstance(told, dict):
        raise _wrong("A line of the ledger is no record.", line)
    unknown = [name for name in told if name not in _READERS]
    if unknown:
        raise _wrong("A record has fields that this release does not know.", ", ".join(unknown))
    if told.get("event") not in events:
        raise _wrong("A record tells of no event that this release knows.", told.get("event"))
    fields: dict[str, Any] = {}
    for name, value in told.items():
        try:
            fields[name] = _READERS[name](value)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise _wrong(f"A record's field {name!r} is not what is written there.", json.dumps(value)) from error
    return fields


def _wrong(problem: str, found: Any) -> LedgerError:
    return LedgerError(problem, found=shorten(found, 100), write=WRITE)


def _no_constant(name: str) -> Any:
    raise TypeError


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise TypeError
    return number


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _json(value: Any) -> str:
    return json.dumps(value)


def _each(reader: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_each(values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list):
            raise TypeError
        return tuple(map(reader, values))

    return read_each


def _leaf(value: Any) -> tuple[tuple[int, ...], str]:
    return _each(_whole)(value["shape"]), _text(value["dtype"])


def _trigger(value: Any) -> Trigger:
    trigger = Trigger.from_json(value)
    _text(trigger.schedule)
    _whole(trigger.step)
    return trigger


def _figures(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {name: math.nan if number is None else _real(number) for name, number in value.items()}


_READERS: dict[str, Callable[[Any], Any]] = {
    "event": _text, "step": _whole, "hook": _text, "id": _whole, "surgery": _json, "rule": _text,
    "paths": _each(_text), "added": _each(_text), "removed": _each(_text), "leaves": _each(_leaf),
    "in_place": _each(_text), "restarted": _each(_text), "donated": _flag, "passed": _each(_whole),
    "triggers": _each(_trigger), "seconds": _real, "time": _real, "detail": _json, "structure": _json,
    "figures": _figures,
}  # fmt: skip
