"""Kinds: the home folder, the temporary folder, the clock, the devices and the kept programs."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.torture.case import Case
from tests.torture.damages import cut, empty, flip, scramble, zero
from tests.torture.kinds import IDENTICAL, Fault, kind
from tests.torture.mounts import mount
from tests.torture.process import Process
from tests.torture.stops import hit, signal


@kind("no home", 2)
def home(case: Case) -> str:
    """HOME is not there, unset, empty, a file or not writable, and tokens and programs are kept below it."""
    case.fill(case.rng.choice(["inputs", "half"]))
    shutil.rmtree(case.folder / "cache", ignore_errors=True)
    folder = case.folder / "home"
    what = case.rng.choice(["gone", "unset", "empty", "a file", "read-only", "relative"])
    config = case.folder / "config.py"
    programs = None
    if what != "unset" and case.rng.random() < 0.7:  # unset, it would be that of this machine's user
        config.write_text(config.read_text().replace(', cache="cache"', ""))
        programs = case.rng.choice([None, case.folder / "nowhere"])
    case.place = what
    value: str | None = str(folder)
    if what == "gone":
        folder.rmdir()
    elif what == "a file":
        folder.rmdir()
        folder.touch()
    elif what == "read-only":
        mount("-t", "tmpfs", "-o", "ro", "none", folder)
    else:
        value = {"unset": None, "empty": "", "relative": "home"}[what]
    done = case.do(environment={"HOME": value}, programs=programs)
    if what == "unset":  # the folder of the user's, as the system knows it
        return case.judge(done)
    return case.judge(done, lambda: (case.folder / "good").mkdir(), environment={"HOME": str(case.folder / "good")})


@kind("no temporary folder", 1)
def temporary(case: Case) -> str:
    """TMPDIR is not there, a file, or not writable."""
    case.fill("inputs")
    folder = case.folder / "tmp"
    what = case.rng.choice(["gone", "a file", "read-only", "full", "empty"])
    case.place = what
    if what in ("gone", "a file"):
        folder.rmdir()
    if what == "a file":
        folder.touch()
    if what in ("read-only", "full"):
        mount("-t", "tmpfs", "-o", "ro" if what == "read-only" else "size=4k", "none", folder)
    if what == "full":
        (folder / "ballast").write_bytes(bytes(4096))
    return case.judge(case.do(environment={"TMPDIR": "" if what == "empty" else str(folder)}))


def _shift(seconds: float) -> Callable[[], None]:
    """A setup that moves the clock of the wall, and leaves that of intervals."""

    def setup() -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + seconds
        time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    return setup


@kind("clock set back", 2)
def clock(case: Case) -> str:
    """By a minute, a day or ten years between the parts of a run, or forth; files are then of the future."""
    case.fill("inputs")
    process = case.start(figures=False)
    hit(case, process, signal.SIGKILL)
    case.finish(process)
    shift = case.rng.choice([-60.0, -86400.0, -86400.0 * 3650, 86400.0 * 3650, -(2.0**31)])
    case.place += f"{shift:.0f} s"
    if case.rng.random() < 0.5:
        later = time.time() + abs(shift)
        for path in [*case.folder.rglob("*")]:
            os.utime(path, (later, later))
    return case.judge(case.do(setup=_shift(shift)))


@kind("1 → 8 → 1 devices", 2)
def devices(case: Case) -> str:
    """The same run in parts on one and eight devices: equal up to the rounding of sums in another order."""
    case.fill("inputs")
    for number in case.rng.choice([(1, 8), (8, 1), (8, 2), (1, 8, 2), (8, 8)]):
        process = case.start(devices=number)
        case.place += f"on {number}: "
        has_begun = case.folder / "run" / "checkpoints" / str(case.rng.choice([3, 4, 6]))
        process.wait(has_begun.is_dir)
        process.send(case.rng.choice([signal.SIGKILL, signal.SIGTERM]))
        case.finish(process)
    done = case.do()
    if done.code:
        raise Fault(f"status {done.code}: {done.text[-1500:]}")
    found, expected = case.world.outcome(case.folder), case.world.final
    for name in ("step", "settings", "model"):
        if found[name] != expected[name]:
            raise Fault(f"{name} differs")
    if [line["step"] for line in found["log"]] != [line["step"] for line in expected["log"]]:
        raise Fault("the log has other lines")
    for a, b in zip(found["log"], expected["log"], strict=True):
        for name, value in b.items():
            if name not in ("memory",) and not np.isclose(a[name], value, rtol=2e-3, atol=1e-5):
                raise Fault(f"{name} of step {b['step']} is {a[name]}, not {value}")
    if found["results"]["best_step"] != expected["results"]["best_step"]:
        raise Fault(f"best step {found['results']['best_step']}, not {expected['results']['best_step']}")
    return IDENTICAL


@kind("kept programs damaged", 3)
def programs(case: Case) -> str:
    """Some or all files of JAX's cache of compiled programs."""
    case.fill(case.rng.choice(["inputs", "half"]))
    kept = Path(shutil.copytree(case.world.folder / "programs", case.folder / "programs"))
    files = sorted(path for path in kept.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = case.rng.sample(files, case.rng.choice([1, 3, len(files)]))
    change = case.rng.choice([flip, flip, flip, cut, zero, empty, scramble])
    case.place = f"{change.__name__}, {len(chosen)} of {len(files)} files"
    for path in chosen:
        path.write_bytes(change(path.read_bytes(), case.rng))
    return case.judge(case.do(programs=kept))


@kind("killed while programs are kept", 1)
def killed_cold(case: Case) -> str:
    """A first run, which fills the cache of programs, ends while it does."""
    case.fill("inputs")
    kept = case.folder / "programs"
    kept.mkdir()
    process = case.start(programs=kept)
    seconds = case.rng.random() * 2 * case.world.seconds
    case.place = f"after {seconds / case.world.seconds:.0%} of the time of a run"
    _kill_after(process, seconds)
    case.finish(process)
    return case.judge(case.do(programs=kept))


def _kill_after(process: Process, seconds: float) -> None:
    process.wait(lambda: process.seconds >= seconds)
    process.send(signal.SIGKILL)


@kind("run moved between its parts", 1)
def moved(case: Case) -> str:
    """The folder of the run and its inputs have another place and other times."""
    case.fill("inputs")
    process = case.start()
    hit(case, process, signal.SIGKILL)
    case.finish(process)
    other = case.folder.with_name(f"{case.folder.name}-moved")
    shutil.copytree(case.folder, other, symlinks=True)
    for path in case.folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in other.iterdir():
        path.rename(case.folder / path.name)
    other.rmdir()
    return case.ends_identical()


@kind("output that nobody takes", 1)
def deaf(case: Case) -> str:
    """stdout or stderr is closed, a full device, or a pipe whose reader has gone."""
    case.fill(case.rng.choice(["inputs", "half"]))
    numbers = case.rng.choice([(1,), (2,), (1, 2)])
    what = case.rng.choice(["closed", "full", "broken pipe"])
    case.place = f"{what}: {', '.join(map(str, numbers))}"

    def setup() -> None:
        read, write = os.pipe()
        os.close(read)
        full = os.open("/dev/full", os.O_WRONLY)
        for number in numbers:
            sys.stdout.flush()
            if what == "closed":
                os.close(number)
                setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
            else:
                os.dup2(full if what == "full" else write, number)

    done = case.do(setup=setup)
    if done.code and 2 in numbers:  # where its error would have been
        return case.judge(case.do())
    if done.code == 128 + signal.SIGPIPE:  # as of any program in a pipe
        return case.judge(case.do())
    return case.judge(done, lambda: None)


@kind("few open files", 1)
def few_files(case: Case) -> str:
    """`ulimit -n`."""
    case.fill(case.rng.choice(["inputs", "half"]))
    number = int(12 * 20 ** case.rng.random())
    case.place = str(number)
    done = case.do(setup=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number)))
    return case.judge(done, lambda: None)
