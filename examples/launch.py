"""Starts a program in several processes that train together, here on one machine.

    python examples/launch.py --processes=2 --devices=4 -- examples/lm.py --config=configs/lm.py:tiny --workdir=runs/two

Each process runs the program with --coordinator, --num_processes and --process_id added, and sees `--devices` virtual
CPU devices. What they print gets the number of the process before each line. When one fails, the time is over, or
this program is stopped, they all are.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_SECS = 5.0
"""How long a process has to end after it was asked to."""


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def environment(devices: int | None) -> dict[str, str]:
    """The variables of a process: for so many virtual devices of the CPU, or for the devices that there are."""
    if devices is None:
        return dict(os.environ)
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "force_host_platform_device_count" not in flag]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        "PYTHONUNBUFFERED": "1",
    }


def launch(program: Sequence[str], processes: int, devices: int | None, timeout_secs: float | None = None) -> int:
    """Runs a program in several processes until all have ended, and returns the first exit status that is not 0.

    Args:
      program: a Python script and its arguments.
      processes: how many.
      devices: virtual CPU devices of each; None takes the devices that there are.
      timeout_secs: after which all are stopped, and the status is 124; None waits for ever.
    """
    shared = [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    started = [
        subprocess.Popen(
            [sys.executable, *program, *shared, f"--process_id={i}"],
            env=environment(devices),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for i in range(processes)
    ]
    printers = [threading.Thread(target=echo, args=(i, process), daemon=True) for i, process in enumerate(started)]
    for printer in printers:
        printer.start()
    try:
        status = wait(started, timeout_secs)
    finally:
        stop(started)
        for printer in printers:
            printer.join(GRACE_SECS)  # something else that a process started may hold its output open
    return status


def echo(number: int, process: subprocess.Popen[str]) -> None:
    """Prints what a process prints."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(f"[{number}] {line}", end="", flush=True)


def wait(processes: Sequence[subprocess.Popen[str]], timeout_secs: float | None) -> int:
    """Waits until all have ended well, or one has not, or the time is over."""
    end = None if timeout_secs is None else time.monotonic() + timeout_secs
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        if None not in codes:
            return 0
        if end is not None and time.monotonic() > end:
            print(f"Stopped after {timeout_secs:g} s.", file=sys.stderr)
            return 124
        time.sleep(0.05)


def stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Ends those that still run, by force where asking does not help."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + GRACE_SECS
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> int:
    """Reads the command line, and runs what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2, help="how many processes")
    parser.add_argument("--devices", type=int, default=None, help="virtual CPU devices of each process")
    parser.add_argument("--timeout", type=float, default=None, help="seconds after which all are stopped")
    parser.add_argument("program", nargs="+", help="-- script.py --flag=...")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `launch` stops the processes
    return launch(given.program, given.processes, given.devices, given.timeout)


if __name__ == "__main__":
    sys.exit(main())
