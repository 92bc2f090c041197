"""The file of a ledger when a run goes on from a checkpoint: it is cut to what the checkpoint knows."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from flax_surgery_hooks.errors import LedgerError, shorten


def cut(path: pathlib.Path, lines: Sequence[str]) -> pathlib.Path | None:
    """Makes the file hold these lines and no others.

    What it has beyond them is a run that went on after the checkpoint and was lost: it is kept beside the file, as
    "<name>.tail-1" and so on. A file that ends too early, or is gone, is written from the lines; one that is damaged
    is kept as a whole in such a file.

    Args:
      path: the file.
      lines: the records of the checkpoint, one line each, without line ends.

    Returns:
      The file with what was taken away, None if nothing was.

    Raises:
      LedgerError: the file is of another run, or cannot be written; it is as it was then.
    """
    try:
        held = path.read_bytes()
    except FileNotFoundError:
        held = b""
    except OSError as error:
        raise _unwritable(path, error) from error
    wanted = "".join(f"{line}\n" for line in lines).encode()
    if held == wanted:
        return None
    tail = _beyond(path, held, lines)
    try:
        kept = _kept(path, tail) if tail else None
        _replace(path, wanted)
    except OSError as error:
        raise _unwritable(path, error) from error
    if kept is not None:
        logging.warning("The ledger %s is cut to its checkpoint; what it had beyond it is in %s.", path, kept)
    elif len(held) < len(wanted):
        logging.warning("The ledger %s had less than its checkpoint knows, and is written from that.", path)
    return kept


def _beyond(path: pathlib.Path, held: bytes, lines: Sequence[str]) -> bytes:
    """What of the file is not in the lines; all of it, where the two part before one of them ends."""
    told = held.splitlines(keepends=True)
    alike = 0
    while alike < min(len(told), len(lines)) and _parsed(told[alike]) == json.loads(lines[alike]):
        alike += 1
    if told and lines and not alike:
        raise LedgerError(
            "The file of the ledger is that of another run, or its beginning is damaged.",
            path=str(path),
            found=f"{shorten(told[0].decode(errors='replace').strip(), 80)}, where the checkpoint has "
            f"{shorten(lines[0], 80)}",
            write="SurgeryHooks(ledger=) with this run's own file, or move this one away: the checkpoint has it all up "
            "to its step",
        )
    at_end = alike == len(lines) or alike == len(told)
    return b"".join(told[alike:]) if at_end else held


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _kept(path: pathlib.Path, tail: bytes) -> pathlib.Path:
    for number in itertools.count(1):
        beside = path.with_name(f"{path.name}.tail-{number}")
        with contextlib.suppress(FileExistsError), beside.open("xb") as file:
            file.write(tail)
            break
    return beside


def _replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a file as a whole or not at all, wherever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _unwritable(path: pathlib.Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"The ledger cannot be written: {shorten(error)}",
        path=str(path),
        write="ledger=<a file in a writable directory>",
    )
