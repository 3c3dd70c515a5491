"""Kinds: volumes that are full, read-only, failing or gone, before a run or at any moment of it."""

import resource
from collections.abc import Callable
from pathlib import Path

from tests.torture.case import Case
from tests.torture.kinds import Fault, kind
from tests.torture.mounts import Disk, memory_volume, mount, resize, unmount
from tests.torture.process import Done
from tests.torture.stops import hit, moment, signal
from tests.torture.world import READERS, WRITERS

VOLUME = "vol"


def _on_volume(case: Case) -> None:
    """The run goes to the volume, and in half of the cases the token cache, too."""
    case.fill("inputs")
    case.run = f"{VOLUME}/run"
    if case.rng.random() < 0.5:
        config = case.folder / "config.py"
        config.write_text(config.read_text().replace('cache="cache"', f'cache="{VOLUME}/cache"'))
        case.place += "cache too; "


def _at_a_moment(case: Case, fault: Callable[[], None], then: signal.Signals | None = None) -> Done:
    """Starts a run and lets something happen while it goes on; nothing happens where it has ended."""
    process = case.start()
    words, has_come = moment(case, process)
    there = process.wait(has_come)
    case.place += f"{words}{'' if there else ', too late'}; "
    if there:
        fault()
        if then:
            process.send(then)
    return case.finish(process)


def _fill_up(volume: Path, left: int = 0) -> Path:
    """Takes all free space of a volume but for `left` bytes."""
    ballast = volume / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            for size in (65536, 4096, 512):
                try:
                    while True:
                        if file.write(bytes(size)) < size:
                            break
                except OSError:
                    continue
            file.truncate(max(0, file.tell() - left))
    except OSError:  # not even a name fits
        pass
    return ballast


@kind("limit on the size of files", 2)
def limited(case: Case) -> str:
    """`ulimit -f`, from a hundred bytes to more than any file has."""
    case.fill(case.rng.choice(["inputs", "half"]))
    size = int(100 * 600 ** case.rng.random())
    case.place = f"{size} bytes"
    # Programs would be kept in part, for all cases after this one.
    done = case.do(setup=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    return case.judge(done, lambda: None)


@kind("full disk (tmpfs)", 3)
def full_memory(case: Case) -> str:
    """Too small from the beginning, or full at a moment."""
    volume = case.folder / VOLUME
    _on_volume(case)
    if case.rng.random() < 0.4:
        kib = int(4 * 300 ** case.rng.random())
        case.place += f"{kib} KiB"
        memory_volume(volume, kib)
        return case.judge(case.do(), lambda: resize(volume, 1 << 14))
    memory_volume(volume, 4096)
    done = _at_a_moment(case, lambda: _fill_up(volume, case.rng.choice([0, 0, 3000, 30000])) and None)
    return case.judge(done, (volume / "ballast").unlink)


@kind("full disk (ext4)", 2)
def full_disk(case: Case) -> str:
    """Full at a moment."""
    _on_volume(case)
    disk = Disk(case.folder / VOLUME)
    done = _at_a_moment(case, lambda: _fill_up(disk.place, case.rng.choice([0, 0, 3000, 30000])) and None)
    return case.judge(done, (disk.place / "ballast").unlink)


@kind("full disk for an export, an index or vectors", 2)
def full_for_writers(case: Case) -> str:
    """What was not there is not there in part."""
    case.fill("whole")
    volume = case.folder / VOLUME
    words = case.rng.choice(WRITERS)
    words = (*words[:-1], f"{VOLUME}/{words[-1]}")
    kib = int(4 * 30 ** case.rng.random())
    case.place = f"{words[0]}, {kib} KiB"
    before = case.snapshot()
    memory_volume(volume, kib)
    done = case.do(words)
    rest = [path.name for path in volume.iterdir()]
    rest += [path.name for path in (case.folder / "tmp").iterdir() if not path.name.startswith("simcse_jax-rescued")]
    if done.code and rest:
        raise Fault(f"{words[0]} left {', '.join(rest)}")
    case.unchanged(before)
    if done.code:
        _check(done)
        resize(volume, 1 << 14)
        again = case.do(words)
        if again.code:
            raise Fault(f"refused again once there was room: {again.err[-1500:]}")
    return "one clear error" if done.code else "identical"


def _check(done: Done) -> None:
    from tests.torture.case import check_error

    check_error(done)


@kind("read-only volume", 3)
def read_only(case: Case) -> str:
    """From the beginning, or, as the system does after an error of a disk, at a moment."""
    _on_volume(case)
    if case.rng.random() < 0.3:
        place = case.folder / VOLUME
        memory_volume(place, 4096)
        if case.rng.random() < 0.7:
            process = case.start()
            hit(case, process, signal.SIGKILL)
            case.finish(process)
        mount("-o", "remount,ro", place)
        case.place += "from the start"
        return case.judge(case.do(), lambda: mount("-o", "remount,rw", place), case.snapshot())
    disk = Disk(case.folder / VOLUME)
    done = _at_a_moment(case, disk.turn_read_only)
    return case.judge(done, lambda: _attach_again(disk))


def _attach_again(disk: Disk) -> None:
    disk.detach()
    disk.attach()


@kind("input/output errors", 3)
def failing(case: Case) -> str:
    """A disk that fails at a moment, and comes back with what had reached it."""
    _on_volume(case)
    disk = Disk(case.folder / VOLUME, commit=case.rng.choice([1, 5]))
    done = _at_a_moment(case, disk.fail)
    return case.judge(done, lambda: _attach_again(disk))


@kind("power cut", 4)
def power_cut(case: Case) -> str:
    """The process and all that has not reached the disk are gone; once or twice."""
    _on_volume(case)
    disk = Disk(case.folder / VOLUME, commit=case.rng.choice([1, 5]))
    for _ in range(case.rng.choice([1, 1, 2])):
        _at_a_moment(case, disk.fail, signal.SIGKILL)
        _attach_again(disk)
    return case.ends_identical()


@kind("power cut after an export, an index or vectors", 1)
def cut_after_writers(case: Case) -> str:
    """What the command said it has written is whole, or refused."""
    case.fill("whole")
    disk = Disk(case.folder / VOLUME)
    words = case.rng.choice(WRITERS)
    words = (*words[:-1], f"{VOLUME}/{words[-1]}")
    case.place = words[0]
    done = case.do(words)
    if done.code:
        raise Fault(f"status {done.code}: {done.text[-1500:]}")
    disk.fail()
    _attach_again(disk)
    kinds = {"export": "export", "search": "index", "encode": ""}
    written = case.folder / words[-1]
    if not written.exists():
        raise Fault(f"{words[-1]} is gone though the command has ended")
    if not (kind_read := kinds[words[0]]):
        return "identical" if written.stat().st_size else _lost(words[-1])
    reader = READERS[kind_read][0]
    moved = tuple(words[-1] if word == kind_read else word for word in reader)
    read = case.do(moved)
    if read.code:
        raise Fault(f"{words[-1]} cannot be read though the command has ended: {read.err[-1500:]}")
    return "identical"


def _lost(name: str) -> str:
    raise Fault(f"{name} is empty though the command has ended")


@kind("volume unmounted", 2)
def unmounted(case: Case) -> str:
    """At a moment; it is mounted again before the same command."""
    _on_volume(case)
    place, behind = case.folder / VOLUME, case.folder / "behind"
    behind.mkdir()
    place.mkdir()
    mount("--bind", behind, place)
    done = _at_a_moment(case, lambda: unmount(place, "-l"))
    if done.code == 0 and not (place / "run" / "results.json").is_file() and not place.is_mount():
        # It ended before it wrote again; or it saved what it had.
        mount("--bind", behind, place)
        return case.judge(done) if (place / "run" / "results.json").is_file() else case.ends_identical()
    return case.judge(done, lambda: mount("--bind", behind, place))
