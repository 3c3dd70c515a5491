"""Kinds: a run of several processes that loses one; two commands at once; other users and umasks; NaN in a gradient."""

import ctypes
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.case import Case, check_error
from tests.torture.kinds import IDENTICAL, REFUSED, Fault, Skipped, kind
from tests.torture.process import Done, Process
from tests.torture.stops import moment
from tests.torture.world import EVALUATE, EXPORT, STEPS, TRAIN, digests

HEARTBEAT, JOINING = 6, 20
_undisturbed: dict[int, dict[str, Any]] = {}
"""What a run of so many processes leads to."""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _start_job(case: Case, count: int, far: dict[int, int] | None = None) -> list[Process]:
    """Starts a run of several processes; `far` has the ports by which single ones reach process 0."""
    port = _free_port() if far is None or not far else far[-1]

    def environment(process: int) -> dict[str, str | None]:
        address = f"127.0.0.1:{(far or {}).get(process, port)}"
        return {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(process),
        }

    words = (*TRAIN, "--heartbeat", str(HEARTBEAT), "--join-timeout", str(JOINING))
    return [case.start(words, environment=environment(process)) for process in range(count)]


def _finish_job(case: Case, job: list[Process]) -> list[Done]:
    # The end of one is the others' business, so all are read while they run.
    while not all(process.ended for process in job):
        for process in job:
            until = process.seconds + 0.02
            process.wait(lambda process=process, until=until: process.seconds >= until)  # type: ignore[misc]
    return [case.finish(process) for process in job]


def _ends_as_undisturbed(case: Case, count: int) -> None:
    """Continues the run of a case with as many processes, and compares it with one that no fault has hit."""
    if count not in _undisturbed:
        other = Case(case.world, case.folder.with_name(f"{case.folder.name}-undisturbed"), "")
        other.fill("inputs")
        alone = _finish_job(other, _start_job(other, count))
        if any(one.code for one in alone):
            raise Fault(f"an undisturbed job of {count} ends with {[one.text[-800:] for one in alone]}")
        _undisturbed[count] = case.world.outcome(other.folder)
        shutil.rmtree(other.folder)
    done = _finish_job(case, _start_job(case, count))
    if any(one.code for one in done):
        raise Fault(f"a job of {count} does not go on: {[one.text[-800:] for one in done]}")
    found = case.world.outcome(case.folder)
    if differing := [name for name, value in _undisturbed[count].items() if found[name] != value]:
        raise Fault(f"silent: {', '.join(differing)} differs")


def _lose(case: Case, job: list[Process], victim: int, lose: Callable[[], None], awaited: list[int]) -> str:
    """Takes a process from a job at a moment; the others must end soon, and name it."""
    words, has_come = moment(case, job[0])
    case.place += f"process {victim} of {len(job)}, {words}"
    job[0].wait(has_come)
    lose()
    begin = time.monotonic()
    survivors = [job[process] for process in awaited]
    lost = False
    for process, done in zip(awaited, _finish_job(case, survivors), strict=True):
        if done.code == 0:
            continue
        lost = True
        check_error(done)
        named = victim if process != victim else 0
        if f"process {named} of {len(job)} " not in done.err and "for the others to join" not in done.err:
            raise Fault(f"process {process} does not name process {named}: {done.text[-1500:]}")
    if (took := time.monotonic() - begin) > HEARTBEAT + JOINING + 60:
        raise Fault(f"the others ended after {took:.0f} s")
    for process in job:
        process.send(signal.SIGKILL)
        process.wait()
    _ends_as_undisturbed(case, len(job))
    return REFUSED if lost else IDENTICAL


def _hit_one(case: Case, number: signal.Signals) -> str:
    count = case.rng.choice([2, 2, 2, 4])
    victim = case.rng.randrange(count)
    case.fill("inputs")
    job = _start_job(case, count)
    others = [process for process in range(count) if process != victim]
    return _lose(case, job, victim, lambda: job[victim].send(number), others)


@kind("one of several processes killed", 0.5)
def killed_process(case: Case) -> str:
    """The others say so."""
    return _hit_one(case, signal.SIGKILL)


@kind("one of several processes stopped", 0.5)
def stopped_process(case: Case) -> str:
    """The others say so."""
    return _hit_one(case, signal.SIGSTOP)


@kind("one of several processes cut off", 0.5)
def cut_off_process(case: Case) -> str:
    """It reaches process 0 through another process, which is stopped: no connection is closed."""
    count = case.rng.choice([2, 2, 2, 4])
    victim = case.rng.randrange(1, count)
    case.fill("inputs")
    near, far = _free_port(), _free_port()
    between = case.world.process((), case.folder, main=lambda: _hand_on(near, far))
    case.processes.append(between)
    job = _start_job(case, count, {victim: near, -1: far})
    return _lose(case, job, victim, lambda: between.send(signal.SIGSTOP), [*range(count)])


def _hand_on(near: int, far: int) -> None:
    from simcse_jax.runtime.relay import _serve

    _serve(socket.create_server(("127.0.0.1", near)), ("127.0.0.1", far), threading.Event())


@kind("two commands at once", 3)
def two_at_once(case: Case) -> str:
    """In one folder: each ends as it would alone, or with one clear error, and one of them does its work."""
    index = ("search", "run", "text.txt", "--save-index", "out")
    pairs = [
        *(("inputs", TRAIN, TRAIN), ("half", TRAIN, TRAIN), ("inputs", TRAIN, (*TRAIN, "--output", "second"))),
        *(("half", TRAIN, EVALUATE), ("half", TRAIN, EXPORT), ("whole", EXPORT, EXPORT), ("whole", index, index)),
        ("whole", ("encode", "run", "text.txt", "vectors.npy"), ("encode", "run", "text.txt", "vectors.npy")),
    ]
    template, first, second = case.rng.choice(pairs)
    case.place = f"{' '.join(first)} and {' '.join(second)}"
    case.fill(template)
    processes = [case.start(first)]
    later = case.rng.choice([0.0, 0.0, case.rng.random() * case.world.seconds])
    processes[0].wait(lambda: processes[0].seconds >= later)
    processes.append(case.start(second))
    refused = False
    for done in _finish_job(case, processes):
        if done.code:
            check_error(done)
            refused = True
    if "train" in (first[0], second[0]):
        if not (case.folder / "run" / "results.json").is_file():
            raise Fault("neither has trained to the end")
        found = case.world.outcome(case.folder, "second") if second[-1] == "second" and not refused else {}
        if differing := [name for name, value in found.items() if value != case.world.final[name]]:
            raise Fault(f"silent: {', '.join(differing)} of the second run")
        case.ends_identical()
    else:
        for name in ("out", "vectors.npy"):
            if (case.folder / name).exists():
                shutil.move(case.folder / name, case.folder / f"{name}-at-once")
        alone = case.do(first)
        if alone.code:
            raise Fault(f"status {alone.code} of {first[0]}: {alone.text[-1500:]}")
        for name in ("out", "vectors.npy"):
            one, other = case.folder / name, case.folder / f"{name}-at-once"
            if one.exists() != other.exists() or _content(one) != _content(other):
                raise Fault(f"silent: {name} differs")
    return REFUSED if refused else IDENTICAL


def _content(path: Path) -> Any:
    return digests(path) if path.is_dir() else path.read_bytes() if path.is_file() else None


NOBODY = 65534


def _become_nobody() -> None:
    """Drops all rights but that to read all files, because Python itself may lie in root's home."""
    libc = ctypes.CDLL(None)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    may_read = 1 << 2  # CAP_DAC_READ_SEARCH
    version, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(may_read, may_read, 0, 0, 0, 0)
    if libc.capset(version, rights):
        raise OSError("no rights to give up rights")


def _give(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


@kind("another user", 2)
def another_user(case: Case) -> str:
    """A run that another user owns is not continued, and can be read; one's own can be continued by root."""
    if os.getuid():
        raise Skipped("root alone can be another user")
    for folder in (case.world.folder.parent, case.world.folder, case.folder.parent, case.folder):
        folder.chmod(0o755)
    programs = case.folder / "programs"
    as_nobody: dict[str, Any] = {"setup": _become_nobody, "programs": programs}
    case.place = case.rng.choice(["resumes root's", "root resumes its own", "reads root's"])
    if case.place == "root resumes its own":
        case.fill("inputs")
        programs.mkdir()
        _give(case.folder, NOBODY)
        process = case.start(**as_nobody)
        _, has_come = moment(case, process)
        process.wait(has_come)
        process.send(signal.SIGKILL)
        case.finish(process)
        return case.ends_identical()
    reads = case.place == "reads root's"
    case.fill("whole" if reads else "half")
    for name in ("home", "tmp", "programs"):
        (case.folder / name).mkdir(exist_ok=True)
        os.chown(case.folder / name, NOBODY, NOBODY)
    before = case.snapshot()
    words = case.rng.choice([EVALUATE, EXPORT]) if reads else TRAIN
    done = case.do(words, **as_nobody)
    if reads:
        return case.judge(done, lambda: None, before, "whole") if words == EVALUATE else _refused(case, done, before)
    return _refused(case, done, before)


def _refused(case: Case, done: Done, before: dict[str, str]) -> str:
    check_error(done)
    case.unchanged(before)
    case.ends_identical()
    return REFUSED


@kind("umask", 1)
def umask(case: Case) -> str:
    """Files and folders have the permissions that the umask says, whatever made them."""
    mask = case.rng.choice([0o022, 0o002, 0o077, 0o027, 0])
    case.place = f"{mask:03o}"
    case.fill("inputs")
    outcome = case.judge(case.do(setup=lambda: os.umask(mask) and None))
    case.finish(case.start(EXPORT, setup=lambda: os.umask(mask) and None))
    for name in ("run", "out", "cache"):
        for path in (case.folder / name).rglob("*"):
            mode, expected = path.stat().st_mode & 0o777, (0o777 if path.is_dir() else 0o666) & ~mask
            if mode & ~expected or (name != "cache" and mode != expected):
                raise Fault(f"{path.relative_to(case.folder)} has mode {mode:03o}, not {expected:03o}")
    return outcome


@kind("NaN in a gradient", 1)
def nan(case: Case) -> str:
    """The run says so and keeps the checkpoints before it; without the NaN it ends as if nothing had been."""
    step = case.rng.randrange(1, STEPS + 1)
    value = case.rng.choice([float("nan"), float("inf")])
    case.place = f"{value} at step {step}"
    case.fill("inputs")

    def spoil() -> None:
        import jax

        import simcse_jax.training.trainer as trainer

        take = trainer.Trainer.take

        def spoilt(self: Any, batch: Any) -> None:
            if self.step == step - 1:
                self.state = self.state._replace(params=jax.tree.map(lambda x: x * value, self.state.params))
            take(self, batch)

        trainer.Trainer.take = spoilt  # type: ignore[method-assign]

    done = case.do(setup=spoil)
    if done.code != 1 or f"training diverged: at step {step} " not in done.err:
        raise Fault(f"status {done.code} after {value} at step {step}: {done.text[-1500:]}")
    return case.judge(done, lambda: None)
