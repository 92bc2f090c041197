"""What commands know of a trainer: a config, and a function that gives its initial state and its hooks.

The convention: a Python file has a function, by default named `for_surgery`,

    def for_surgery(config):
        return init_fn, hooks

with `init_fn()` the trainer's initial state (run abstractly; or such a state itself, abstract) and `hooks` its
`SurgeryHooks`, without ledger and writer: what `checkpoint.restore` takes. `config` is what `--config=` and
`--config.<key>=<value>` make, as in a trainer that uses `ml_collections.config_flags`.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from flax_surgery_hooks.errors import CommandError, ConfigError, SurgeryError, UsageError, shorten
from flax_surgery_hooks.hooks import SurgeryHooks
from flax_surgery_hooks.paths import close_matches, listed

FUNCTION = "for_surgery"
EXAMPLE = "--trainer=examples/digits.py:for_surgery"


class Trainer(NamedTuple):
    """A trainer.

    Attributes:
      init_fn: makes its initial state; or that state, abstract.
      hooks: its hooks.
      num_steps: `config.num_steps`, None if the config has none.
    """

    init_fn: Any
    hooks: SurgeryHooks
    num_steps: int | None = None

    def initial_state(self) -> Any:
        """Its initial state, abstract.

        Raises:
          CommandError: `init_fn` fails, or gives no state.
        """
        import jax

        if not callable(self.init_fn):
            return self.init_fn
        try:
            return jax.eval_shape(self.init_fn)
        except SurgeryError:
            raise
        except Exception as error:
            raise CommandError(
                f"The trainer's init_fn() fails when it is run abstractly. {type(error).__name__}: {_last_line(error)}",
                write="a function without arguments that makes the state in ordinary jnp, such as create_state",
            ) from error


def load(trainer: str, arguments: Sequence[str]) -> Trainer:
    """The trainer that `--trainer=` names, for the config that other arguments make.

    Args:
      trainer: "file.py:function", or "file.py".
      arguments: `--config=file.py:variant` and `--config.<key>=<value>`; nothing else.

    Raises:
      UsageError: the arguments are none of these.
      ConfigError: the config cannot be made, or describes no hooks.
      CommandError: the file, the function, or what it returns.
    """
    config = _config(arguments)
    path, function = _function(trainer)
    try:
        made = function(config)
    except SurgeryError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {_last_line(error)}"
        if not hasattr(config, "surgery"):
            raise ConfigError(
                "The config has no `surgery`, where hooks are described, and the trainer fails with it.",
                found="no --config=" if config is None else told,
                write="--config=configs/digits.py, and in that file config.surgery = ConfigDict({name: "
                "fsh.config.hook(...)})",
            ) from error
        raise CommandError(f"The trainer's function fails. {told}", path=path) from error
    num_steps = getattr(config, "num_steps", None)
    return _checked(path, made, num_steps if type(num_steps) is int else None)


def _checked(path: str, made: Any, num_steps: int | None) -> Trainer:
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], SurgeryHooks):
        found = f"a tuple of {listed(type(one).__name__ for one in made)}" if isinstance(made, tuple) else None
        raise CommandError(
            "The trainer's function returns something else than its initial state and hooks.",
            path=path,
            found=found or type(made).__name__,
            write="def for_surgery(config): return init_fn, hooks",
        )
    if not callable(made[0]) and not hasattr(made[0], "params"):
        raise CommandError(
            "The first that the trainer's function returns makes no state, and is none.",
            path=path,
            found=type(made[0]).__name__,
            write="a function without arguments, or an abstract train state",
        )
    if not made[1].names:
        raise ConfigError(
            "The trainer has no hooks.", write="config.surgery.<name> = fsh.config.hook(...), with enabled=True"
        )
    return Trainer(*made, num_steps)


def _function(trainer: str) -> tuple[str, Callable[[Any], Any]]:
    """The file and the function that "file.py:function" names."""
    name, _, wanted = trainer.partition(":")
    wanted = wanted or FUNCTION
    path = pathlib.Path(name)
    if not path.is_file():
        raise CommandError("There is no such trainer file.", found=name, write=EXAMPLE)
    module = _module(path.resolve())
    function = getattr(module, wanted, None)
    if not callable(function):
        mine = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        functions = [value.__name__ for value in mine if isinstance(value, types.FunctionType)]
        raise CommandError(
            f"The trainer file has no function {wanted!r}.",
            path=name,
            found=f"functions {listed(functions)}" if functions else "no functions",
            write=listed(f"--trainer={name}:{match}" for match in close_matches(wanted, functions))
            or f"def {FUNCTION}(config): return init_fn, hooks",
        )
    return name, function


def _module(path: pathlib.Path) -> types.ModuleType:
    """The file as a module, under its own name and with its folder on the path, as when it is run."""
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    name = path.stem if known is None else f"{path.stem} of {path.parent}"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CommandError("The trainer file is no Python file.", found=str(path), write=EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise CommandError(
            f"The trainer file cannot be imported. {type(error).__name__}: {_last_line(error)}", path=str(path)
        ) from error
    return module


def _config(arguments: Sequence[str]) -> Any:
    """What the config flags make; None without any."""
    values, argv = flags.FlagValues(), ["flax_surgery_hooks", *arguments]
    config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
        config = values.config
        hasattr(config, "surgery")  # one that could not be made says so when it is first looked at
    except flags.Error as error:
        raise UsageError(f"The arguments cannot be read. {_last_line(error)}", write=_WRITE) from error
    except Exception as error:
        raise ConfigError(
            f"The config cannot be made. {type(error).__name__}: {_last_line(error)}",
            found=listed(arguments),
            write="--config=configs/digits.py:fast --config.surgery.head_norm.every=50",
        ) from error
    if rest:
        raise UsageError("An argument is not known.", found=listed(rest), write=_WRITE)
    return config


def _last_line(error: Exception) -> str:
    """What an error says; of one that tells of others, by their tracebacks, the last."""
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shorten(lines[-1] if any("Traceback" in line for line in lines) else " ".join(lines))


_WRITE = "the options that --help lists, --config=file.py:variant and --config.<key>=<value>"
