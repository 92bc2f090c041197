"""Commands: `python -m flax_surgery_hooks ledger | plan | apply`.

    ledger runs/digits
    plan --trainer=examples/digits.py --config=configs/digits.py:fast --config.surgery.head_norm.every=50
    apply runs/digits/checkpoints --trainer=examples/digits.py --config=configs/digits.py --hook=reinit --out=runs/new

`trainers` says what a trainer's file has for them. The exit status is 0, or 2 where the arguments cannot be read, or 1
where the command cannot be done, with what is wrong as one line of text.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flax_surgery_hooks import ledger_text, trainers
from flax_surgery_hooks.errors import CheckpointError, CommandError, SurgeryError, UsageError
from flax_surgery_hooks.ledger import Ledger
from flax_surgery_hooks.paths import listed
from flax_surgery_hooks.registration import check_known
from flax_surgery_hooks.steps import step_of

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

LEDGER = "ledger.jsonl"
"""The name of a ledger in a work directory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name, by default those of the process.

    Returns:
      The exit status. Arguments that the parser itself refuses end the process, with status 2.
    """
    given, rest = _parser().parse_known_args(arguments)
    try:
        if rest and given.command == "ledger":
            raise UsageError("An argument is not known.", found=listed(rest), write="ledger WORKDIR_OR_FILE [--json]")
        commands = {"ledger": show_ledger, "plan": show_plan, "apply": apply}
        commands[given.command](given, rest)
    except SurgeryError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def show_ledger(given: argparse.Namespace, _: Sequence[str]) -> None:
    """Prints what fired.

    Raises:
      LedgerError: there is no such ledger, or it is damaged.
    """
    path = pathlib.Path(given.path)
    found = ledger_text.lines(Ledger.read(path / LEDGER if path.is_dir() else path))
    if given.json:
        print(json.dumps([dataclasses.asdict(line) for line in found], indent=1))
    else:
        print(ledger_text.table(found))


def show_plan(given: argparse.Namespace, rest: Sequence[str]) -> None:
    """Prints what would fire.

    Raises:
      SurgeryError: the trainer is not what it must be, or what its hooks would raise.
    """
    trainer = trainers.load(given.trainer, rest)
    num_steps = trainer.num_steps if given.num_steps is None else given.num_steps
    if num_steps is None:
        raise UsageError(
            "How many steps the run has is not said, and the config has no `num_steps`.", write="--num_steps=1000"
        )
    plan = trainer.hooks.plan(trainer.initial_state(), num_steps)
    print(json.dumps(plan.to_json(), indent=1) if given.json else plan)


def apply(given: argparse.Namespace, rest: Sequence[str]) -> None:
    """Fires a hook on a checkpoint, and saves what comes of it as another: bit for bit what the fire would have made of
    that state in the run.

    Raises:
      SurgeryError: the trainer or the checkpoint is not what it must be, or what the fire raises.
    """
    from flax_surgery_hooks import checkpoint

    trainer = trainers.load(given.trainer, rest)
    hooks, out = trainer.hooks, pathlib.Path(given.out).absolute()
    check_known(hooks.names, given.hook)
    if hooks.ledger.path is not None:
        raise CommandError(
            "The trainer's hooks have a ledger, and this command would write into that of the run.",
            found=str(hooks.ledger.path),
            write="hooks without ledger= in the function that --trainer= names",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError("The output directory is not empty.", path=str(out), write="--out=<a new directory>")
    with _manager(pathlib.Path(given.checkpoint).absolute(), create=False) as manager:
        if given.step is None and manager.latest_step() is None:
            raise CheckpointError("The directory has no checkpoint.", path=given.checkpoint, write="that of the run")
        state = checkpoint.restore(manager, trainer.init_fn, hooks, step=given.step, allow_changes=(given.hook,))
    step = step_of(state)
    state = hooks.fire(given.hook, state, step)
    hooks.flush()
    [fired] = ledger_text.lines(hooks.ledger.records)[-1:]
    if fired.event != "fired":
        raise CommandError(
            "The fire was refused, and nothing is saved.",
            hook=given.hook,
            step=step,
            found=f"an edit that is {fired.event}",
            write="an edit that is finite on these leaves",
        )
    with _manager(out, create=True) as manager:
        checkpoint.save(manager, step, state, hooks, force=True)
        manager.wait_until_finished()
    (out / LEDGER).write_text("".join(record.to_json() + "\n" for record in hooks.ledger.records), encoding="utf-8")
    print(ledger_text.table([fired]))
    print(f"Saved step {step} in {out}.")


@contextlib.contextmanager
def _manager(directory: pathlib.Path, *, create: bool) -> Iterator[ocp.CheckpointManager]:
    """A checkpoint manager.

    Raises:
      CheckpointError: there is no such directory, or it cannot be made.
    """
    import orbax.checkpoint as ocp

    if not create and not directory.is_dir():
        raise CheckpointError("There is no such directory.", path=str(directory), write="the checkpoints of a run")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=create))
    except OSError as error:
        raise CheckpointError(f"The directory cannot be used: {error}", path=str(directory)) from error
    with manager:
        yield manager


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flax_surgery_hooks", description="Hooks that edit a model while it trains, from outside.",
        allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    ledger = _command(commands, "ledger", "what fired, from the ledger of a run")
    ledger.add_argument("path", help=f"a ledger, or a work directory with {LEDGER}")
    plan = _command(commands, "plan", "what would fire, on which leaves, with which shapes")
    plan.add_argument("--num_steps", type=int, help="train steps of the run; by default config.num_steps")
    applied = _command(commands, "apply", "fire one hook on a checkpoint, and save the result as another")
    applied.add_argument("checkpoint", help="the directory of the run's checkpoints")
    applied.add_argument("--hook", required=True, help="the hook to fire")
    applied.add_argument("--out", required=True, help="directory of the new checkpoint")
    applied.add_argument("--step", type=int, help="which checkpoint; by default the last")
    for command in (ledger, plan):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for command in (plan, applied):
        command.add_argument(
            "--trainer", required=True, help="file.py:function that gives init_fn and hooks of a config; by default "
            f"the function {trainers.FUNCTION}",
        )  # fmt: skip
        command.epilog = "--config=file.py:variant and --config.<key>=<value> make the config, as in a trainer."
    return parser


def _command(commands: Any, name: str, told: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=told, description=told, allow_abbrev=False)
    return parser
