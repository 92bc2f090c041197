"""The launcher of several processes: what they see, what is printed, and that nothing is left running."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def launch(tmp_path: pathlib.Path, program: str, *flags: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs a program in two processes; what came of it, and the seconds it took."""
    path = tmp_path / "program.py"
    path.write_text("import os, pathlib, sys, time\nwho = sys.argv[-1].removeprefix('--process_id=')\n" + program)
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "examples/launch.py", "--processes=2", *flags, "--", str(path), "--name=x", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_other=1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return result, time.monotonic() - started


def test_each_process_gets_its_number_and_its_devices(tmp_path):
    result, _ = launch(tmp_path, "print(sys.argv[1:], os.environ['XLA_FLAGS'])", "--devices=3")
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    assert len(lines) == 2
    port = lines[0].partition("localhost:")[2].partition("'")[0]
    assert 0 < int(port) < 65_536
    for i, line in enumerate(lines):
        arguments = ["--name=x", str(tmp_path), f"--coordinator=localhost:{port}", "--num_processes=2"]
        flags = "--xla_other=1 --xla_force_host_platform_device_count=3"
        assert line == f"[{i}] {[*arguments, f'--process_id={i}']} {flags}"


def test_without_a_number_of_devices_the_environment_stays(tmp_path):
    result, _ = launch(tmp_path, "print(os.environ['XLA_FLAGS'])")
    expected = "--xla_force_host_platform_device_count=8 --xla_other=1"
    assert sorted(result.stdout.splitlines()) == [f"[0] {expected}", f"[1] {expected}"]


WRITE = "pathlib.Path(sys.argv[2], who).write_text(str(os.getpid()))\n"
WAIT = "while not all(pathlib.Path(sys.argv[2], name).exists() for name in '01'): time.sleep(0.01)\n"


def test_when_one_fails_the_other_is_stopped(tmp_path):
    result, seconds = launch(tmp_path, WRITE + WAIT + "sys.exit(3) if who == '1' else time.sleep(50)")
    assert result.returncode == 3
    assert seconds < 30
    assert_gone(tmp_path, "0")


def test_stopped_itself_it_stops_the_others(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("import os, pathlib, sys, time\nwho = sys.argv[-1][-1]\n" + WRITE + "time.sleep(50)")
    command = [sys.executable, "examples/launch.py", "--", str(path), "--name=x", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as launcher:
        end = time.monotonic() + 30
        while not all((tmp_path / who).exists() and (tmp_path / who).read_text() for who in "01"):
            assert time.monotonic() < end
            time.sleep(0.02)
        launcher.terminate()
        assert launcher.wait(30) == 128 + 15
    assert_gone(tmp_path, "0")
    assert_gone(tmp_path, "1")


def test_one_that_does_not_listen_is_ended_by_force_when_the_time_is_over(tmp_path):
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WRITE
    program += "print('here', flush=True); time.sleep(50)"
    result, seconds = launch(tmp_path, program, "--timeout=2")
    assert result.returncode == 124
    assert "Stopped after 2 s." in result.stderr
    assert sorted(result.stdout.splitlines()) == ["[0] here", "[1] here"]
    assert seconds < 40
    assert_gone(tmp_path, "0")
    assert_gone(tmp_path, "1")


def assert_gone(tmp_path: pathlib.Path, who: str) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / who).read_text()), 0)
