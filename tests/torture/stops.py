"""Kinds: signals at any moment, of a run from its first second to its last."""

import signal
import time
from collections.abc import Callable

from tests.torture.case import Case
from tests.torture.kinds import IDENTICAL, Fault, kind
from tests.torture.process import Process
from tests.torture.world import STEPS, WRITERS, read_result


def moment(case: Case, process: Process) -> tuple[str, Callable[[], bool]]:
    """A moment of a run, in words, and whether it has come: any time, during a checkpoint, after a step, at the end."""
    run, rng = case.folder / case.run, case.rng
    match rng.choice(["time", "time", "checkpoint", "step", "end"]):
        case "time":
            share = rng.random()
            seconds = share * case.world.seconds
            return f"after {share:.0%} of the time", lambda: process.seconds >= seconds
        case "checkpoint":
            step = rng.choice([0, 3, 4, 6, 8, 9, STEPS])
            pattern = f"{step}.orbax-checkpoint-tmp*"
            return f"while checkpoint {step} is written", lambda: any((run / "checkpoints").glob(pattern))
        case "step":
            lines = rng.randrange(1, STEPS + 5)
            log = run / "metrics.jsonl"
            return f"after line {lines}", lambda: log.is_file() and log.read_bytes().count(b"\n") >= lines
    place = run / "checkpoints" / str(STEPS)
    return "after the last checkpoint", lambda: place.is_dir()


def hit(case: Case, process: Process, *numbers: signal.Signals) -> bool:
    """Sends signals at a moment, one shortly after the other; returns whether the process was still there."""
    words, has_come = moment(case, process)
    there = process.wait(has_come)
    delay = case.rng.choice([0, case.rng.random() * 0.05, case.rng.random() * 0.3])
    if there:
        until = process.seconds + delay
        there = process.wait(lambda: process.seconds >= until)
    case.place += f"{words}{f' and {delay:.3f} s' if delay else ''}{'' if there else ', too late'}; "
    for number in numbers:
        process.send(number)
        if number != numbers[-1]:
            pause = time.monotonic() + case.rng.random() * case.rng.choice([0.01, 0.3])
            process.wait(lambda until=pause: time.monotonic() >= until)
    return there


@kind("SIGKILL", 4)
def killed(case: Case) -> str:
    """Once to three times, and to the end."""
    case.fill("inputs")
    for _ in range(case.rng.choice([1, 1, 1, 2, 3])):
        process = case.start()
        hit(case, process, signal.SIGKILL)
        case.finish(process)
    return case.ends_identical()


def _asked(case: Case, *numbers: signal.Signals) -> str:
    """A run that is asked to stop ends by the signal, as interrupted, or saved and with status 0."""
    case.fill("inputs")
    process = case.start()
    hit(case, process, *numbers)
    done = case.finish(process)
    if done.code not in (0, 130, *(-number for number in numbers)):
        raise Fault(f"status {done.code} after {', '.join(n.name for n in numbers)}: {done.text[-1500:]}")
    return case.ends_identical()


@kind("SIGTERM", 2)
def terminated(case: Case) -> str:
    """Saves and stops."""
    return _asked(case, signal.SIGTERM)


@kind("SIGINT", 2)
def interrupted(case: Case) -> str:
    """Saves and stops."""
    return _asked(case, signal.SIGINT)


@kind("SIGINT twice", 2)
def interrupted_twice(case: Case) -> str:
    """The second ends the run at once, also while the first is obeyed."""
    return _asked(case, signal.SIGINT, signal.SIGINT)


@kind("SIGTERM twice")
def terminated_twice(case: Case) -> str:
    """As with SIGINT; or one of each, as from a shell and a scheduler."""
    return _asked(case, signal.SIGTERM, case.rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL]))


@kind("SIGSTOP and SIGCONT")
def stopped(case: Case) -> str:
    """A run that stood still goes on."""
    case.fill("inputs")
    process = case.start()
    for _ in range(case.rng.randint(1, 3)):
        hit(case, process, signal.SIGSTOP)
        time.sleep(case.rng.random() * 0.4)
        process.send(signal.SIGCONT)
    return case.judge(case.finish(process))


@kind("SIGHUP")
def hung_up(case: Case) -> str:
    """The terminal is closed."""
    case.fill("inputs")
    process = case.start()
    hit(case, process, signal.SIGHUP)
    case.finish(process)
    return case.ends_identical()


@kind("SIGKILL of an export, an index or vectors", 2)
def killed_writer(case: Case) -> str:
    """What it was writing is there whole or not at all, and the same command writes it."""
    case.fill("whole")
    words = case.rng.choice(WRITERS)
    place = case.folder / words[-1]
    process = case.start(words)
    seconds = case.rng.random() * 0.4 * case.world.seconds
    process.wait(lambda: process.seconds >= seconds)
    process.send(signal.SIGKILL)
    if case.finish(process).code == 0 or not place.exists():
        case.place = f"{words[0]} after {seconds:.2f} s"
    else:
        case.place = f"{words[0]} after {seconds:.2f} s, when it was there"
    if not place.exists():
        done = case.do(words)
        if done.code:
            raise Fault(f"{words[0]} is refused: {done.err[-1500:]}")
    expected = case.world.reading("whole", words)[1]
    found = read_result(None, case.folder)[1]
    if found != expected:
        raise Fault(f"{words[-1]} holds {sorted(found)}, not {sorted(expected)}, or other content")
    return IDENTICAL
