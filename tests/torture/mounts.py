"""Volumes of a case's own: mounted in a name space of the campaign, so that none outlives it."""

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

from tests.torture.kinds import Skipped

_NEW_MOUNTS, _NEW_USERS = 0x20000, 0x10000000
_SHUTDOWN, _WITHOUT_LOG = 0x8004587D, 2  # of ext4's ioctl
_state: dict[str, str] = {}


def private_mounts() -> None:
    """Gives this process mounts of its own; where it may not, kinds that mount are left out."""
    libc = ctypes.CDLL(None, use_errno=True)
    users, groups = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS | (_NEW_USERS if users else 0)):
        _state["refused"] = f"no mounts of its own ({os.strerror(ctypes.get_errno())})"
        return
    if users:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {users} 1")
        Path("/proc/self/gid_map").write_text(f"0 {groups} 1")
    mount("--make-rprivate", "/")


def mount(*words: str | Path) -> None:
    """Calls mount, or raises `Skipped`."""
    _call("mount", *words)


def unmount(place: Path, *words: str) -> None:
    """Calls umount, or raises `Skipped`."""
    _call("umount", *words, place)


def _call(*words: str | Path) -> None:
    if refused := _state.get("refused"):
        raise Skipped(refused)
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"{' '.join(map(str, words[:3]))}: {done.stderr.strip().splitlines()[0]}")


def unmount_below(folder: Path) -> None:
    """Unmounts all that is mounted below a folder."""
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed(places):
        if Path(place).is_relative_to(folder):
            subprocess.run(["umount", "-l", place], capture_output=True, check=False)


def memory_volume(place: Path, kib: int) -> None:
    """Mounts a tmpfs of a size."""
    place.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={kib}k,mode=755", "none", place)


def resize(place: Path, kib: int) -> None:
    """Gives a mounted tmpfs another size."""
    mount("-o", f"remount,size={kib}k", place)


class Disk:
    """A volume of ext4 in a file, which can fail as disks do."""

    def __init__(self, place: Path, mib: int = 24, commit: int = 5) -> None:
        """Makes the file system and mounts it.

        Args:
          place: where.
          mib: its size.
          commit: seconds after which its journal writes by itself.
        """
        self.place, self.image, self.commit = place, place.with_suffix(".ext4"), commit
        if not shutil.which("mkfs.ext4"):
            raise Skipped("no mkfs.ext4")
        with self.image.open("wb") as file:
            file.truncate(mib << 20)
        _call("mkfs.ext4", "-q", "-F", "-b", "1024", "-J", "size=1", "-m", "0", self.image)
        place.mkdir()
        self.attach()

    def attach(self) -> None:
        """Mounts it; the journal brings it to the state of its last commit."""
        mount("-o", f"loop,commit={self.commit}", self.image, self.place)

    def detach(self) -> None:
        """Unmounts it."""
        unmount(self.place)

    def turn_read_only(self) -> None:
        """Ends all writing at once, as the system does after an error of the disk, also for files that are open."""
        mount("-o", "remount,abort", self.place)

    def fail(self) -> None:
        """Loses what has not reached the disk, as a power cut does; all access gives an input/output error."""
        number = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(number, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        except OSError as error:
            raise Skipped(f"ext4's shutdown: {error.strerror}") from error
        finally:
            os.close(number)
