"""The commands: as a person would type them, a few in processes of their own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_trainer
from tiny import assert_bitwise_equal

import flax_surgery_hooks as fsh
from flax_surgery_hooks import cli

# ml_collections loads config files by a method that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ROOT = pathlib.Path(__file__).parents[1]
FILE = "tests/tiny_trainer.py"
TRAINER = (f"--trainer={FILE}", f"--config={FILE}")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def as_process(*arguments):
    """A command in a process of its own."""
    command = [sys.executable, "-m", "flax_surgery_hooks", *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def said(capsys, *arguments):
    """What a command prints that is done."""
    assert cli.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments, status=1):
    """What a command prints that cannot be done: one line, and nothing else."""
    assert cli.main([*map(str, arguments)]) == status
    told = capsys.readouterr()
    assert not told.out
    assert told.err.count("\n") == 1
    return told.err


class TestLedger:
    RECORDS = (
        {"event": "run", "step": 1},
        {"event": "passed", "step": 1, "hook": "halve", "passed": [0]},
        {"event": "fired", "step": 5, "hook": "halve", "id": 0, "rule": "carry", "paths": ["a", "b"], "seconds": 0.25},
        {"event": "fired", "step": 6, "hook": "noise", "id": 1, "rule": "carry", "paths": ["a"], "seconds": 0.5},
        {"event": "settled", "step": 5, "hook": "halve", "id": 0,
         "figures": {"params/relative_change": 0.5, "slots/relative_change": 0.0}},
        {"event": "refused", "step": 6, "hook": "noise", "id": 1, "figures": {"params/relative_change": None}},
        {"event": "run", "step": 7},
        {"event": "fired", "step": 9, "hook": "halve", "id": 0, "rule": "carry", "paths": ["a"], "added": ["a"],
         "removed": ["b"], "seconds": 0.125, "passed": [7]},
    )  # fmt: skip
    TABLE = """\
2 fires by 2 hooks in 2 sessions
| Step | Hook  | Event                          | Leaves   | Rule  | Params changed | Optimizer changed | Seconds |
|-----:|:------|:-------------------------------|:---------|:------|---------------:|------------------:|--------:|
|    1 | halve | passed 0                       | -        | -     |              - |                 - |       - |
|    5 | halve | fired                          | 2 leaves | carry |            0.5 |                 0 |   0.250 |
|    6 | noise | refused                        | a        | carry |              - |                 - |   0.500 |
|    9 | halve | fired, not settled, also for 7 | a +1 -1  | carry |              - |                 - |   0.125 |
"""

    @pytest.fixture
    def workdir(self, tmp_path):
        (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.RECORDS))
        return tmp_path

    def test_of_a_work_directory_or_a_file(self, workdir, capsys):
        text = said(capsys, "ledger", workdir)
        assert said(capsys, "ledger", workdir / "ledger.jsonl") == text
        assert text == self.TABLE

    def test_json(self, workdir, capsys):
        lines = json.loads(said(capsys, "ledger", workdir, "--json"))
        assert [(line["step"], line["event"], line["session"]) for line in lines] == [
            (1, "passed", 1), (5, "fired", 1), (6, "refused", 1), (9, "fired, not settled", 2),
        ]  # fmt: skip
        assert (lines[1]["params_change"], lines[1]["leaves"], lines[2]["params_change"]) == (0.5, ["a", "b"], None)
        assert (lines[3]["added"], lines[3]["removed"], lines[3]["passed"]) == (["a"], ["b"], [7])

    def test_of_a_run(self, tmp_path, capsys):
        init_fn, _ = tiny_trainer.for_surgery(tiny_trainer.get_config())
        hooks = fsh.SurgeryHooks.from_config(tiny_trainer.get_config().surgery, ledger=tmp_path / "ledger.jsonl")
        tiny_trainer.run(hooks, init_fn(), 8)
        hooks.flush()
        lines = json.loads(said(capsys, "ledger", tmp_path, "--json"))
        assert [(line["step"], line["hook"], line["event"]) for line in lines] == [
            (3, "halve", "fired"),
            (5, "noise", "fired"),
        ]
        assert lines[0]["params_change"] == pytest.approx(0.5, rel=0.2)  # the biases stay

    def test_without_fires(self, tmp_path, capsys):
        (tmp_path / "ledger.jsonl").write_text("")
        assert said(capsys, "ledger", tmp_path) == "Nothing has fired.\n"

    def test_one_that_is_missing(self, tmp_path, capsys):
        assert "LedgerError: path '" in refused(capsys, "ledger", tmp_path)

    def test_one_that_is_damaged_in_a_process_of_its_own(self, workdir):
        path = workdir / "ledger.jsonl"
        path.write_text(path.read_text()[:-30])
        done = as_process("ledger", workdir)
        assert done.returncode == 1
        assert "LedgerError: " in done.stderr
        assert "ledger.jsonl, line 8" in done.stderr
        assert "lines 1 to 7 are whole" in done.stderr
        assert "Traceback" not in done.stderr

    def test_an_argument_too_many(self, tmp_path, capsys):
        assert "UsageError: An argument is not known. Found: --josn." in refused(
            capsys, "ledger", tmp_path, "--josn", status=2
        )


class TestPlan:
    def test_of_the_digits_example_in_a_process_of_its_own(self):
        done = as_process(
            "plan", "--trainer=examples/digits.py", "--config=configs/digits.py:fast",
            "--config.surgery.head_norm.every=50", "--config.surgery.reinit.enabled=False",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        head, _, _, *rows = done.stdout.splitlines()
        assert head == "Steps 0 to 750: 16 fires of 2 hooks; parameters 87,178, optimizer state 174,358"
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        assert cells == [
            ["50, 100, ..., 750", "head_norm", "15", "Dense_1/kernel", "mu, nu", "carry", "-", "87,178"],
            ["500", "drop_small", "1", "2: Conv_0/kernel, Conv_1/kernel", "mu, nu", "carry", "-", "87,178"],
        ]

    def test_json_and_steps(self, capsys):
        told = json.loads(said(capsys, "plan", *TRAINER, "--num_steps=4", "--json"))
        assert [(row["hook"], row["steps"]) for row in told["rows"]] == [("halve", [3]), ("noise", [])]
        assert len(json.loads(said(capsys, "plan", *TRAINER, "--json"))["rows"][1]["steps"]) == 1  # config.num_steps

    def test_overrides_reach_the_trainer(self, capsys):
        told = said(capsys, "plan", *TRAINER, "--config.width=16", "--config.surgery.noise.at=(1, 2)")
        assert "3 fires of 2 hooks; parameters 64," in told

    def test_of_a_state_that_is_abstract_already(self, capsys):
        expected = said(capsys, "plan", *TRAINER)
        assert said(capsys, "plan", f"--trainer={FILE}:abstract", TRAINER[1]) == expected

    def test_what_hooks_would_raise(self, capsys):
        assert "StepError: `step` is a Python int of at least 0" in refused(capsys, "plan", *TRAINER, "--num_steps=-1")
        told = refused(capsys, "plan", *TRAINER, "--config.surgery.noise.params=**/kernal")
        assert told.startswith("SelectionError: hook 'noise', step 5: The pattern '**/kernal' matches none")


class TestTrainers:
    """What can be wrong with a trainer and its config, which `plan` and `apply` say alike."""

    @pytest.mark.parametrize(
        ("trainer", "says"),
        [
            ("nowhere.py", "CommandError: There is no such trainer file. Found: nowhere.py. Write instead: --trainer="),
            (f"{FILE}:for_surgry", "has no function 'for_surgry'. Found: functions get_config, create_state, for_sur"),
            (f"{FILE}:for_surgry", f"Write instead: --trainer={FILE}:for_surgery"),
            (f"{FILE}:only_hooks", "returns something else than its initial state and hooks. Found: SurgeryHooks."),
            (f"{FILE}:the_wrong_way_round", "Found: a tuple of SurgeryHooks, partial. Write instead: def for_surgery"),
            (
                f"{FILE}:no_state",
                "The first that the trainer's function returns makes no state, and is none. Found: int",
            ),
            (f"{FILE}:without_hooks", "ConfigError: The trainer has no hooks. Write instead: config.surgery.<name>"),
            (
                f"{FILE}:failing",
                "CommandError: path 'tests/tiny_trainer.py': The trainer's function fails. RuntimeError: ",
            ),
            (f"{FILE}:failing_init", "init_fn() fails when it is run abstractly. RuntimeError: no luck"),
        ],
    )
    def test_a_trainer(self, trainer, says, capsys):
        assert says in refused(capsys, "plan", f"--trainer={trainer}", TRAINER[1])

    def test_a_file_that_is_no_python(self, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / "broken.py").write_text("import nothing_of_this_name")
        assert "The trainer file is no Python file." in refused(capsys, "plan", f"--trainer={tmp_path}/notes.txt")
        told = refused(capsys, "plan", f"--trainer={tmp_path}/broken.py")
        assert "cannot be imported. ModuleNotFoundError: No module named 'nothing_of_this_name'" in told
        assert "broken" not in sys.modules

    @pytest.mark.parametrize(
        ("arguments", "status", "says"),
        [
            (
                (),
                1,
                "ConfigError: The config has no `surgery`, where hooks are described, and the trainer fails with it",
            ),
            (("--config=nowhere.py",), 1, "ConfigError: The config cannot be made. OSError: "),
            ((TRAINER[1], "--config.surgery.halve.evry=3"), 1, 'Did you mean "every" instead of "evry"?'),
            (
                (TRAINER[1], "--config.surgery.halve.every=x"),
                2,
                "UsageError: The arguments cannot be read. flag --config",
            ),
            ((TRAINER[1], "--nothing=3"), 2, "UsageError: The arguments cannot be read. Unknown command line flag"),
            ((TRAINER[1], "more"), 2, "UsageError: An argument is not known. Found: more."),
            ((f"{TRAINER[1]}:nothing",), 1, "ConfigError: The config cannot be made. KeyError: 'nothing'"),
        ],
    )
    def test_a_config(self, arguments, status, says, capsys):
        assert says in refused(capsys, "plan", TRAINER[0], *arguments, status=status)

    def test_a_config_without_hooks_and_steps(self, tmp_path, capsys):
        head = "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict"
        (tmp_path / "bare.py").write_text(f"{head}({{'seed': 0}})\n")
        told = refused(capsys, "plan", TRAINER[0], f"--config={tmp_path}/bare.py")
        assert "The config has no `surgery`" in told
        (tmp_path / "endless.py").write_text("from tiny_trainer import without_steps as get_config\n")
        endless = f"--config={tmp_path}/endless.py"
        told = refused(capsys, "plan", TRAINER[0], endless, status=2)
        assert "UsageError: How many steps the run has is not said" in told
        assert "Steps 0 to 4" in said(capsys, "plan", TRAINER[0], endless, "--num_steps=4")

    def test_a_value_of_a_config(self, capsys):
        assert cli.main(["plan", *TRAINER, "--config.surgery.halve.factor=-inf"]) == 1
        told = capsys.readouterr().err
        assert told.startswith(
            "ConfigError: 1 problem in the config:\n- surgery.halve: Scale: Scale(factor=...) must be"
        )

    @pytest.mark.parametrize("arguments", [(), ("plan",), ("plan", *TRAINER, "--num_steps=many"), ("destroy",)])
    def test_what_the_parser_refuses(self, arguments, capsys):
        with pytest.raises(SystemExit) as raised:
            cli.main(arguments)
        assert raised.value.code == 2
        assert "usage: python -m flax_surgery_hooks" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The checkpoint, at step 5, of a run without the hook `noise`."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    tiny_trainer.saved(tiny_trainer.get_config("noise"), directory, 5)
    return directory


class TestApply:
    @staticmethod
    def restored(directory, config):
        init_fn, hooks = tiny_trainer.for_surgery(config)
        with ocp.CheckpointManager(directory) as manager:
            return fsh.checkpoint.restore(manager, init_fn, hooks), hooks

    @staticmethod
    def in_the_run(upto):
        init_fn, hooks = tiny_trainer.for_surgery(tiny_trainer.get_config())
        return tiny_trainer.run(hooks, init_fn(), upto)

    def test_it_gives_what_the_run_would_have_given_to_the_bit(self, run, tmp_path, capsys):
        text = said(capsys, "apply", run, *TRAINER, "--hook=noise", f"--out={tmp_path / 'out'}")
        state, hooks = self.restored(tmp_path / "out", tiny_trainer.get_config())
        expected = self.in_the_run(5)
        assert_bitwise_equal((state.params, state.opt_state), (expected.params, expected.opt_state))
        assert int(state.step) == 5
        lines = text.splitlines()
        assert [cell.strip() for cell in lines[3].split("|")][1:5] == ["5", "noise", "fired", "2 leaves"]
        assert lines[4] == f"Saved step 5 in {tmp_path / 'out'}."
        # It counts as fired: a run that goes on from there does not fire again at step 5, and ends like the other.
        after, expected = tiny_trainer.run(hooks, state, 8), self.in_the_run(8)
        assert_bitwise_equal((after.params, after.opt_state), (expected.params, expected.opt_state))
        fired = [line["step"] for line in json.loads(said(capsys, "ledger", tmp_path / "out", "--json"))]
        assert fired == [3, 5]

    def test_other_seeds_and_untouched_states_are_told_apart(self, run, tmp_path, capsys):
        said(
            capsys, "apply", run, *TRAINER, "--hook=noise", f"--out={tmp_path}/other", "--config.surgery.noise.std=0.2"
        )
        expected = self.in_the_run(5)
        for directory in (run, tmp_path / "other"):
            state, _ = self.restored(directory, tiny_trainer.get_config())
            assert not np.array_equal(state.params["in"]["kernel"], expected.params["in"]["kernel"])

    def test_in_a_process_of_its_own(self, run, tmp_path):
        done = as_process("apply", run, *TRAINER, "--hook=halve", "--step=5", f"--out={tmp_path / 'out'}")
        assert done.returncode == 0, done.stderr
        before, _ = self.restored(run, tiny_trainer.get_config("noise"))
        after, _ = self.restored(tmp_path / "out", tiny_trainer.get_config("noise"))
        assert_bitwise_equal(after.params, jax.tree.map(lambda w: w / 2 if w.ndim > 1 else w, before.params))
        assert_bitwise_equal(after.opt_state, before.opt_state)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (
                ("--hook=noice",),
                "HookError: hook 'noice': There is no hook of this name. Found: hooks halve, noise. Write",
            ),
            (("--hook=noise", "--step=4"), "CheckpointError: step 4, path '"),
            (
                ("--hook=noise", f"--trainer={FILE}:with_ledger"),
                "hooks have a ledger, and this command would write into",
            ),
            (("--hook=noise", "--config.width=5"), "CheckpointError: step 5"),
        ],
    )
    def test_what_it_refuses_it_leaves_undone(self, run, tmp_path, arguments, says, capsys):
        told = refused(capsys, "apply", run, *TRAINER, f"--out={tmp_path / 'out'}", *arguments)
        assert says in told
        assert not (tmp_path / "out").exists()
        assert not (ROOT / "ledger.jsonl").exists()

    def test_a_fire_that_makes_values_that_are_not_finite(self, run, tmp_path, capsys):
        huge = "--config.surgery.halve.factor=3.4e38"
        told = refused(capsys, "apply", run, *TRAINER, "--hook=halve", f"--out={tmp_path / 'out'}", huge)
        assert told.startswith("RefusedError: hook 'halve', step 5, path 'in/kernel': ")
        skipping = f"--trainer={FILE}:skipping"
        told = refused(capsys, "apply", run, skipping, TRAINER[1], "--hook=halve", f"--out={tmp_path / 'out'}", huge)
        assert told.startswith("CommandError: hook 'halve', step 5: The fire was refused, and nothing is saved.")
        assert not (tmp_path / "out").exists()

    def test_directories(self, run, tmp_path, capsys):
        told = refused(capsys, "apply", tmp_path / "no", *TRAINER, "--hook=noise", f"--out={tmp_path / 'out'}")
        assert "CheckpointError: path '" in told
        assert "There is no such directory" in told
        (tmp_path / "empty").mkdir()
        told = refused(capsys, "apply", tmp_path / "empty", *TRAINER, "--hook=noise", f"--out={tmp_path / 'out'}")
        assert "The directory has no checkpoint." in told
        told = refused(capsys, "apply", run, *TRAINER, "--hook=noise", f"--out={run}")
        assert "CommandError: path '" in told
        assert "The output directory is not empty." in told
        (tmp_path / "file").write_text("")
        told = refused(capsys, "apply", run, *TRAINER, "--hook=noise", f"--out={tmp_path / 'file' / 'out'}")
        assert "The directory cannot be used: " in told
