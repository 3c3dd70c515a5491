"""Kinds: files that storage has changed, in every place of a run, an export, an index and a token cache."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.torture.case import Case
from tests.torture.kinds import IDENTICAL, REFUSED, Fault, kind
from tests.torture.world import READERS, STOP, TRAIN

PLACES = {
    "newest checkpoint": ("half", f"run/checkpoints/{STOP}/**/*"),
    "older checkpoint": ("half", "run/checkpoints/6/**/*"),
    "best checkpoint": ("half", "run/checkpoints/4/**/*"),
    "every checkpoint": ("half", "run/checkpoints/*/**/*"),
    "run.json": ("half", "run/run.json"),
    "model": ("half", "run/model/*"),
    "metrics.jsonl": ("half", "run/metrics.jsonl"),
    "results.json": ("half", "run/results.json"),
    "token cache": ("half", "cache/tokens-*/*"),
    "checkpoint of an ended run": ("whole", "run/checkpoints/*/**/*"),
    "small files of an ended run": ("whole", "run/*.json*"),
    "model of an ended run": ("whole", "run/model/*"),
    "export": ("whole", "export/**/*"),
    "index": ("whole", "index/*"),
}
"""Where files are damaged: a template and a pattern in it."""


def flip(content: bytes, rng: random.Random) -> bytes:
    """One bit."""
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return content[: rng.randrange(len(content))]


def zero(content: bytes, rng: random.Random) -> bytes:
    """A block of 4 KiB is zeros; all, in a small file."""
    start = 4096 * rng.randrange(-(-len(content) // 4096))
    return content[:start] + bytes(min(4096, len(content) - start)) + content[start + 4096 :]


def empty(content: bytes, rng: random.Random) -> bytes:
    """The name has reached the disk and the content has not."""
    return b""


def scramble(content: bytes, rng: random.Random) -> bytes:
    """A block that holds something else."""
    start = 4096 * rng.randrange(-(-len(content) // 4096))
    return content[:start] + rng.randbytes(min(4096, len(content) - start)) + content[start + 4096 :]


def damaged(case: Case, change: Callable[[bytes, random.Random], bytes] | None) -> str:
    """Changes or removes files of a place, and runs a command that may read them.

    Args:
      case: the case.
      change: gives the new content of a file; None removes it.
    """
    place, template, originals = damage(case, change)
    return judged(case, template, place, originals)


def damage(case: Case, change: Callable[[bytes, random.Random], bytes] | None) -> tuple[str, str, dict[Path, bytes]]:
    """Changes or removes files of a place; gives the place, its template, and what the files held."""
    place = case.rng.choice([*PLACES])
    template, pattern = PLACES[place]
    case.fill(template)
    files = [path for path in sorted(case.folder.glob(pattern)) if path.is_file() and path.stat().st_size]
    if place == "every checkpoint":
        steps = sorted({path.relative_to(case.folder).parts[2] for path in files})
        chosen = [case.rng.choice([path for path in files if f"/checkpoints/{step}/" in str(path)]) for step in steps]
    else:
        chosen = [case.rng.choice(files)]
    originals = {path: path.read_bytes() for path in chosen}
    for path, content in originals.items():
        changed = content if change is None else change(content, case.rng)
        if change is None:
            path.unlink()
        elif changed != content:
            path.write_bytes(changed)
    case.place = f"{place}: {', '.join(path.relative_to(case.folder).as_posix() for path in chosen)}"
    return place, template, originals


def judged(case: Case, template: str, place: str, originals: dict[Path, bytes]) -> str:
    """Runs a command on damaged files: training goes on, or reads as it ended; or a reader."""
    words = case.rng.choice(READERS[place] if place in READERS else [TRAIN, TRAIN, TRAIN, *READERS["run"]])
    bad = {path: path.read_bytes() if path.exists() else None for path in originals}

    def undo() -> None:
        for path, content in originals.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    ends_again = template == "whole" and words == TRAIN and case.folder / "run" / "results.json" in originals
    before = None if ends_again else case.snapshot()
    outcome = case.judge(case.do(words), undo, before, "" if ends_again else template)
    if outcome != REFUSED and words == TRAIN and "checkpoint" in place and template == "half":
        kept_aside(case, bad)
    return outcome


def kept_aside(case: Case, bad: dict[Path, bytes | None]) -> None:
    """Raises `Fault` where a damaged checkpoint was passed over and is no longer there to be looked at."""
    steps = {path.relative_to(case.folder / case.run).parts[1] for path in bad}
    aside = case.folder / case.run / "damaged"
    for path, content in bad.items():
        step = path.relative_to(case.folder / case.run).parts[1]
        if (aside / step).is_dir() and content is not None:
            place = aside / path.relative_to(case.folder / case.run / "checkpoints")
            if not place.is_file() or place.read_bytes() != content:
                raise Fault(f"the damaged {path.name} of step {step} was not kept as it was; steps {steps}")


@kind("flipped bit", 10)
def flipped(case: Case) -> str:
    """In any file."""
    return damaged(case, flip)


@kind("truncated file", 4)
def truncated(case: Case) -> str:
    """At any byte."""
    return damaged(case, cut)


@kind("zeroed block", 4)
def zeroed(case: Case) -> str:
    """4 KiB, at a multiple of 4 KiB."""
    return damaged(case, zero)


@kind("scrambled block", 3)
def scrambled(case: Case) -> str:
    """4 KiB of another file."""
    return damaged(case, scramble)


@kind("empty file", 4)
def emptied(case: Case) -> str:
    """As after a power cut."""
    return damaged(case, empty)


@kind("missing file", 4)
def missing(case: Case) -> str:
    """Of any name."""
    return damaged(case, None)


_NOT_COVERED = ("commit_success.txt", "_CHECKPOINT_METADATA")
"""Files in which orbax notes when a checkpoint took its name: a bit of the time does not matter."""


@kind("damage that verify looks for", 4)
def verified(case: Case) -> str:
    """`simcse-jax verify` names it, changes nothing, and finds all whole once it is undone."""
    change = case.rng.choice([flip, cut, zero, scramble, empty, None])
    _, _, originals = damage(case, change)
    case.place += f" ({change.__name__ if change else 'missing'})"
    first = next(iter(originals)).relative_to(case.folder)
    root = Path(*first.parts[: 2 if first.parts[0] == "cache" else 1])
    before = case.snapshot()
    changed = [p for p, content in originals.items() if not p.exists() or p.read_bytes() != content]
    if all(path.name in _NOT_COVERED for path in changed):
        return IDENTICAL
    done = case.do(("verify", str(root)))
    case.unchanged(before)
    # Without results.json a run is as one that was killed before it wrote them, and verify says so.
    if done.code not in (1, 2) and not (change is None and "not there: the run has not ended" in done.out):
        raise Fault(f"verify has not found the damage (status {done.code}): {done.text[-1500:]}")
    for path, content in originals.items():
        path.write_bytes(content)
    again = case.do(("verify", str(root)))
    if again.code:
        raise Fault(f"verify finds damage in what is whole: {again.text[-1500:]}")
    return REFUSED


@kind("folder with a step's number", 3)
def step_folder(case: Case) -> str:
    """Empty, with a foreign file, or half of a checkpoint; newer or older than the others."""
    case.fill("half")
    steps = case.folder / "run" / "checkpoints"
    place = steps / str(case.rng.choice([2, 5, 8, 9, 12, 100]))
    what = case.rng.choice(["empty", "foreign", "half"])
    if what == "half":
        shutil.copytree(steps / str(STOP), place)
        for path in case.rng.sample(sorted(p for p in place.rglob("*") if p.is_file()), 8):
            path.unlink()
    else:
        place.mkdir()
        if what == "foreign":
            (place / "notes.txt").write_text("mine")
    case.place = f"{what}: {place.name}"
    outcome = judged(case, "half", "", {}) if case.rng.random() < 0.3 else case.judge(case.do())
    if what == "foreign" and not any(path.name == "notes.txt" for path in (case.folder / "run").rglob("*")):
        raise Fault("the foreign file is gone")
    return outcome


@kind("checkpoint under another number", 3)
def renamed(case: Case) -> str:
    """A copy, or the checkpoint itself."""
    case.fill("half")
    steps = case.folder / "run" / "checkpoints"
    source, number = case.rng.choice([(6, 9), (STOP, 12), (4, 8), (6, 5), (4, 10), (STOP, 3)])
    how = case.rng.choice(["copied", "copied", "renamed"])
    case.place = f"{how}: {source} as {number}"
    if how == "copied":
        shutil.copytree(steps / str(source), steps / str(number))
    else:
        (steps / str(source)).rename(steps / str(number))
    return case.judge(case.do())


@kind("checkpoint removed by hand", 2)
def removed(case: Case) -> str:
    """One or more; the run goes on from the newest that is left, or from its beginning."""
    case.fill("half")
    steps = case.rng.sample([4, 6, STOP], case.rng.choice([1, 1, 2, 3]))
    case.place = ", ".join(map(str, sorted(steps)))
    for step in steps:
        shutil.rmtree(case.folder / "run" / "checkpoints" / str(step))
    return case.judge(case.do())


@kind("half a line", 3)
def half_line(case: Case) -> str:
    """metrics.jsonl ends in the middle of a line, or results.json in the middle; or a line in between is spoilt."""
    case.fill("half")
    run = case.folder / "run"
    what = case.rng.choice(["last line", "middle line", "results.json"])
    case.place = what
    path = run / ("results.json" if what == "results.json" else "metrics.jsonl")
    content = path.read_bytes()
    if what == "middle line":
        lines = content.splitlines(keepends=True)
        number = case.rng.randrange(len(lines) - 1)
        line = lines[number]
        lines[number] = case.rng.choice([line[: len(line) // 2] + b"\n", bytes(len(line) - 1) + b"\n", b"\n", b""])
        path.write_bytes(b"".join(lines))
    elif what == "last line":
        # As a kill leaves it: the line of a step after the checkpoint.
        ends = [b'{"step": 8, "lo', b'{"st', bytes(40), b'{"step": 8, "loss": 1.0}\n']
        path.write_bytes(content + case.rng.choice(ends))
    else:
        path.write_bytes(content[: case.rng.randrange(1, len(content))])
    return judged(case, "half", "", {path: content})
