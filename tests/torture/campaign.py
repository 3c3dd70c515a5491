"""The campaign: cases by number, in several processes, one line of a file per case."""

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from simcse_jax.runtime.provenance import software
from tests.torture.case import Case
from tests.torture.kinds import FAULT, SKIPPED, Fault, Kind, Skipped, load_kinds
from tests.torture.mounts import private_mounts, unmount_below
from tests.torture.report import summary, write_report
from tests.torture.world import World, make_world

ROOT = Path(__file__).parents[2]
_IMPORTED = (
    *("simcse_jax.cli", "simcse_jax.commands.train", "simcse_jax.commands.evaluate", "simcse_jax.commands.export"),
    *(
        "simcse_jax.commands.encode",
        "simcse_jax.commands.search",
        "simcse_jax.commands.verify",
        "simcse_jax.training.trainer",
        "transformers",
    ),
    *("simcse_jax.inference.export", "simcse_jax.inference.simcse", "simcse_jax.evaluation.suite", "matplotlib.pyplot"),
    *("simcse_jax.runs.figures", "simcse_jax.evaluation.tables", "scipy.stats", "matplotlib.backends.backend_svg"),
)
"""What the commands import on their way: here once, before the first fork."""


def kind_of(kinds: dict[str, Kind], seed: int, number: int) -> Kind:
    """The kind of a case: all in turn at first, and then drawn by their weights."""
    if number < len(kinds):
        return [*kinds.values()][number]
    chosen = random.Random(f"{seed} {number}").choices([*kinds.values()], [kind.weight for kind in kinds.values()])
    return chosen[0]


def run_case(world: World, kind: Kind, seed: int, number: int, keep: bool) -> dict[str, Any]:
    """Runs one case; the record of it."""
    folder = world.folder / "cases" / str(number)
    folder.mkdir(parents=True)
    case = Case(world, folder, f"{seed} {number}")
    begin = time.monotonic()
    detail = ""
    try:
        outcome = kind.apply(case)
    except Skipped as reason:
        outcome, detail = SKIPPED, str(reason)
    except Fault as fault:
        outcome, detail = FAULT, str(fault)
    except Exception:
        outcome, detail = FAULT, f"the campaign's own: {traceback.format_exc()[-3000:]}"
    for process in case.processes:
        process.send(signal.SIGKILL)
        with contextlib.suppress(Fault):
            process.wait()
    if not (keep and outcome == FAULT):
        unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return {
        **{"number": number, "seed": seed, "kind": kind.name, "place": case.place.strip("; "), "outcome": outcome},
        **{"commands": case.commands, "runs": len(case.processes), "seconds": round(time.monotonic() - begin, 2)},
        "detail": detail,
    }


def work(world: World, numbers: list[int], options: argparse.Namespace, about: dict[str, Any], deadline: float) -> None:
    """Runs cases until the time is over, and appends a line about each to the records."""
    kinds = _chosen(options)
    with options.records.open("a", buffering=1) as file:
        for number in numbers:
            if time.monotonic() > deadline:
                return
            assert world.folder.is_dir(), "the templates were removed"
            record = run_case(world, kind_of(kinds, options.seed, number), options.seed, number, options.keep)
            file.write(json.dumps(record | about) + "\n")
            said = f": {record['detail'][:600]}" if record["outcome"] == FAULT else ""
            print(
                number, record["kind"], f"({record['place']})", record["outcome"], record["seconds"], said, flush=True
            )


def _chosen(options: argparse.Namespace) -> dict[str, Kind]:
    kinds = load_kinds()
    if unknown := set(options.kinds) - set(kinds):
        sys.exit(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    return {name: kind for name, kind in kinds.items() if not options.kinds or name in options.kinds}


def read_records(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of all sittings with the same seed and the same choice of kinds."""
    lines = options.records.read_text().splitlines() if options.records.is_file() else []
    records = [json.loads(line) for line in lines]
    return [record for record in records if (record["seed"], record["of"]) == (options.seed, options.kinds)]


def _about() -> dict[str, Any]:
    """Which code, machine and day a record is of."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    # The report of an earlier sitting is no other code.
    edited = "-dirty" if git("status", "--porcelain", "simcse_jax", "tests") else ""
    commit = git("rev-parse", "--short", "HEAD") + edited
    with contextlib.suppress(OSError):
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}"
    return {"commit": commit or "unknown", "machine": machine, "date": datetime.now(UTC).date().isoformat()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases; case n of a seed is always the same")
    parser.add_argument("--minutes", type=float, default=30, help="when to start no further case")
    parser.add_argument("--runs", type=int, default=10**6, help="most cases, with those of earlier calls")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument(
        "--kinds", nargs="+", default=[], help="only these kinds, whose cases have numbers of their own"
    )
    parser.add_argument("--cases", type=int, nargs="+", help="these cases, also where they were run before")
    parser.add_argument("--records", type=Path, default=ROOT / ".cache" / "torture.jsonl", help="one line per case")
    parser.add_argument("--report", type=Path, help="page whose tables are written anew, e.g. docs/reliability.md")
    parser.add_argument("--keep", action="store_true", help="keep the folders of faults")
    parser.add_argument("--list", action="store_true", help="print the kinds, and end")
    options = parser.parse_args()
    kinds = _chosen(options)
    if options.list:
        print("\n".join(kinds))
        return
    options.records.parent.mkdir(parents=True, exist_ok=True)
    done = {record["number"] for record in read_records(options)}
    numbers = options.cases or [n for n in range(options.runs) if n not in done]
    if numbers and options.minutes > 0:
        _campaign(numbers, options)
    records = read_records(options)
    print(summary(records, kinds))
    if options.report:
        write_report(options.report, records, kinds)
    sys.exit(any(record["outcome"] == FAULT for record in records))


def _campaign(numbers: list[int], options: argparse.Namespace) -> None:
    for name in _IMPORTED:
        import_module(name)
    software()  # asks git, once for all children
    tasks = len([*Path("/proc/self/task").iterdir()])
    assert tasks == threading.active_count() == 1, f"{tasks} threads: a process with threads cannot fork"
    sys.stdin.close()
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    private_mounts()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    children = []
    try:
        begin = time.monotonic()
        world = make_world(folder / "world")
        print(
            f"ready after {time.monotonic() - begin:.0f} s; an undisturbed run takes {world.seconds:.1f} s", flush=True
        )
        gc.freeze()
        about, deadline = _about() | {"of": options.kinds}, begin + 60 * options.minutes
        for job in range(options.jobs):
            if not (child := os.fork()):
                try:
                    work(world, numbers[job :: options.jobs], options, about, deadline)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert not any(codes), "a worker has failed"
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGTERM)
        if not options.keep:
            unmount_below(folder)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"kept: {folder}")
