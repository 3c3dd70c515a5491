"""Runs the parts, most important first.

python -m benchmarks.gpu --minutes 9                     # in an environment that has everything
benchmarks/gpu/run.sh --minutes 9                        # from the pack, on a machine without network
python -m benchmarks.gpu --only loss profile --quick     # a rehearsal of two parts, whose figures say nothing
"""

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.gpu.parts import Part, parts
from benchmarks.report import commit, status_of
from benchmarks.worker import ROOT
from simcse_jax.errors import InputError, did_you_mean
from simcse_jax.storage.files import check_writable_folder, make_folder, new_file, write_text

LEAST = 15
"""Seconds that must be left for a part to be started."""
SHOWN = 14
"""Lines of a part's output that the summary repeats, its last."""


@dataclass(frozen=True)
class Settings:
    """Run the parts, each within a limit of its own and all within one. One that fails or runs out of time does not
    stop the others; the exit status is 1 then."""

    minutes: float | None = None
    """Minutes for all parts; 9 where None, and as many as they take in a rehearsal."""
    only: tuple[str, ...] = ()
    """Parts to run, in their own order; all where empty."""
    quick: bool = False
    """Rehearse at tiny sizes and without limits; the figures say nothing."""
    output: Path = Path("runs/gpu")
    """Folder for what each part prints (NAME.txt) and its tables (NAME.md, NAME.json), and for summary.txt, to which
    each call appends."""
    results: Path | None = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    """Folder that, after each part, also gets summary.txt and everything else as one file, out.tgz; by default that of
    the variable OUT, if set."""

    def run(self) -> int:
        """Runs the parts.

        Returns:
          0, or 1 if a part failed or ran out of time.

        Raises:
          InputError: an unknown part, or a folder that cannot be written.
        """
        output = self.output.expanduser().resolve()
        with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as folder:
            chosen = self._chosen(parts(output, Path(folder, "runs"), self.quick))
            for place in filter(None, (output, self.results)):
                check_writable_folder(place)
                make_folder(place)
            minutes = self.minutes if self.minutes is not None else float("inf") if self.quick else 9.0
            end = time.monotonic() + 60 * minutes
            programs = {
                "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "true",
            }
            environment = programs | os.environ | {"PYTHONUNBUFFERED": "1"}
            failed = False
            self._tell(output, f"commit {commit() or 'unknown'}{', a rehearsal' if self.quick else ''}, {time.ctime()}")
            for part in chosen:
                left = end - time.monotonic()
                if part.real_text and not environment.get("SIMCSE_DATA"):
                    self._tell(output, f"{part.name}: left out, it needs the real text of SIMCSE_DATA")
                elif left < LEAST:
                    self._tell(output, f"{part.name}: not started, no time left")
                else:
                    self._tell(output, f"{part.name}: started", kept=False)
                    limit = left if self.quick else min(part.seconds, left)
                    begin = time.monotonic()
                    status = run_part(part, output / f"{part.name}.txt", limit, environment)
                    failed |= status != 0
                    how = "out of time" if status is None else f"status {status}"
                    self._tell(output, f"{part.name}: {how}, {time.monotonic() - begin:.0f} s", tail(output, part))
        return int(failed)

    def _chosen(self, all_parts: list[Part]) -> list[Part]:
        names = [part.name for part in all_parts]
        if unknown := [name for name in self.only if name not in names]:
            guess = did_you_mean(unknown[0], names)
            raise InputError(f"there is no part '{unknown[0]}': {guess}The parts are {', '.join(names)}")
        return [part for part in all_parts if not self.only or part.name in self.only]

    def _tell(self, output: Path, line: str, more: str = "", kept: bool = True) -> None:
        """Prints lines and, if they are kept, appends them to the summary and writes the results anew."""
        print(line + more, flush=True)
        if not kept:
            return
        summary = output / "summary.txt"
        with summary.open("a", encoding="utf-8") as file:
            file.write(f"{line}{more}\n")
        if self.results is not None:
            with new_file(self.results / "out.tgz") as partial, tarfile.open(partial, "w:gz") as archive:
                for path in sorted(output.iterdir()):
                    if path.suffix in (".txt", ".md", ".json"):
                        archive.add(path, path.name)
            write_text(self.results / "summary.txt", summary.read_text("utf-8"))


def run_part(part: Part, log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """Runs a part in a process group of its own, which ends with it.

    Args:
      part: the part.
      log: file for all that it prints.
      seconds: its limit.
      environment: its environment variables.

    Returns:
      Its status; None where it ran out of time.
    """
    command = [sys.executable, "-m", part.module, *part.arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # the memory of a GPU is free once all are gone
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tail(output: Path, part: Part) -> str:
    """The last lines of what a part printed, indented, each cut to a screen's width."""
    lines = (output / f"{part.name}.txt").read_text("utf-8", errors="replace").splitlines()
    return "".join(f"\n    {line[:200]}" for line in lines[-SHOWN:])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if a part failed, or the input cannot be used."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.gpu", description=__doc__, args=arguments)
    return status_of(settings.run)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended, too
    sys.exit(main())
