"""A killed run beside one that was let be.

python -m benchmarks.gpu.resume --output runs/resume
"""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.report import status_of
from benchmarks.worker import ROOT
from simcse_jax.errors import InputError
from simcse_jax.runs.checkpoints import checkpoint_folders
from simcse_jax.runs.metrics_log import read_log


@dataclass(frozen=True)
class Resume:
    """Train quickstart twice, kill the second run after its first checkpoint, resume it, and compare the losses."""

    output: Path
    """New folder for both runs."""
    steps: int = 400
    every: int = 100
    """Steps between checkpoints."""
    batch_size: int = 64
    quick: bool = False
    """Rehearse at a tiny size."""

    def command(self, run: Path) -> list[str]:
        """The command of a run, the same before and after the kill."""
        size = ("--max-steps", self.steps, "--checkpoint.every", self.every, "--batch-size", self.batch_size)
        unscored = ("--evaluation.dev", "", "--evaluation.test")
        words = ("-m", "simcse_jax", "train", "quickstart", "--output", run, *size, *unscored)
        return [sys.executable, *map(str, words)]

    def run(self) -> int:
        """Trains and prints; returns 1 if the run could not be killed, a command failed, or a step is missing.

        Raises:
          InputError: the output is there already: what it holds would be resumed.
        """
        if self.output.exists():
            raise InputError(f"{self.output} exists: give a new folder, so that both runs begin there")
        if self.quick:
            return replace(self, steps=12, every=3, batch_size=8, quick=False).run()
        whole, killed = self.output.resolve() / "whole", self.output.resolve() / "killed"
        subprocess.run(self.command(whole), cwd=ROOT, check=True)
        with subprocess.Popen(self.command(killed), cwd=ROOT) as process:
            while not checkpoint_folders(killed) and process.poll() is None:
                time.sleep(0.02)
            process.kill()
        if process.returncode != -9:
            print(f"the run ended before it was killed, with status {process.returncode}: give more --steps")
            return 1
        at = max(checkpoint_folders(killed))
        print(f"killed after the checkpoint of step {at}", flush=True)
        subprocess.run(self.command(killed), cwd=ROOT, check=True)
        return compare(losses(whole), losses(killed), at)


def losses(run: Path) -> dict[int, float]:
    """The losses of a run, by step."""
    return {line["step"]: line["loss"] for line in read_log(run / "metrics.jsonl") if "loss" in line}


def compare(whole: dict[int, float], killed: dict[int, float], at: int) -> int:
    """Prints how far the losses of two runs are apart, before and after a step; returns 1 if either lacks a step."""
    if whole.keys() != killed.keys():
        print(f"the logs differ in their steps: {sorted(whole.keys() ^ killed.keys())}")
        return 1
    for words, steps in (
        (f"to step {at}", [step for step in whole if step <= at]),
        ("after it", [step for step in whole if step > at]),
    ):
        apart = max(abs(whole[step] - killed[step]) for step in steps)
        print(f"{len(steps)} losses {words}: {apart:g} apart at most")
    return 0


def parse(arguments: list[str]) -> Resume:
    """The settings that the arguments give, ready to `run`."""
    return tyro.cli(Resume, prog="python -m benchmarks.gpu.resume", description=__doc__, args=arguments)


if __name__ == "__main__":
    sys.exit(status_of(parse(sys.argv[1:]).run))
