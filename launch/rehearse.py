#!/usr/bin/env python3
"""Rehearses a multi-host run on one machine: processes with CPU devices of their own, joined over loopback.

    launch/rehearse.py 2 4 simcse-jax train quickstart --output runs/rehearsal

starts 2 processes of 4 devices each. Process 0 prints to the terminal, process K to rehearsal-K.log in --logs. When a
process fails, the script ends the others, within two minutes, and returns its status; it hands SIGTERM and Ctrl-C on to
every process.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

PATIENCE = 120
"""Seconds that the other processes have to end by themselves when one has failed."""


def main() -> int:
    """Runs the processes to their end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the processes instead of starting them")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder of the log files")
    parser.add_argument("processes", type=int, help="processes to start, each as one host of the job")
    parser.add_argument("devices", type=int, help="CPU devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command that each process runs")
    options = parser.parse_args()
    if options.processes < 1 or options.devices < 1 or not options.command:
        parser.error("give at least one process, one device and a command")
    if shutil.which(options.command[0]) is None:
        parser.error(f"no command '{options.command[0]}' on the PATH: install the package first")

    with socket.socket() as free:  # takes a port that is free now; the processes meet there a moment later
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = [
        {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(options.devices),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(options.processes),
            "JAX_PROCESS_ID": str(process),
        }
        for process in range(options.processes)
    ]
    if options.dry_run:
        for variables in settings:
            print(shlex.join([*(f"{name}={value}" for name, value in variables.items()), *options.command]))
        return 0
    return run(options.command, settings, options.logs)


def run(command: list[str], settings: list[dict[str, str]], logs: Path) -> int:
    """Starts one process per dictionary of variables and waits for all; returns the first status that is not 0."""
    processes = []
    for process, variables in enumerate(settings):
        log = None if process == 0 else (logs / f"rehearsal-{process}.log").open("w")
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdout=log,
                stderr=log and subprocess.STDOUT,
                start_new_session=True,  # a terminal would send Ctrl-C to it besides
            )
        )

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    status, failed_at = 0, 0.0
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not status:
            status, failed_at = failed[0], time.monotonic()
            hand_on(signal.SIGTERM, None)
        elif status and time.monotonic() > failed_at + PATIENCE:  # one that is stopped, say
            hand_on(signal.SIGKILL, None)
        time.sleep(0.1)
    status = status or next((p.returncode for p in processes if p.returncode), 0)
    if status:
        print(f"rehearse: a process ended with status {status}; logs in {logs}/rehearsal-*.log", file=sys.stderr)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
