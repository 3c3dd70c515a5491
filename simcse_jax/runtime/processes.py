"""The processes of a job: how they connect, check that they share a folder, and act in order."""

import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from simcse_jax.errors import InputError, reason, room
from simcse_jax.runtime.compilation_cache import drop_programs
from simcse_jax.runtime.heartbeat import NEVER, Watch, private
from simcse_jax.runtime.joining import Joining, say_waiting
from simcse_jax.runtime.mesh import find_devices
from simcse_jax.runtime.relay import open_gate, open_relay
from simcse_jax.storage.files import UNFINISHED

_TEXT = 1000
"""Bytes of a text that a process tells the others."""

_VERSION = "simcse_jax/version/"
_FAILED = "\n"
"""Begins what is told where nothing was found."""
_PATIENCE = 60.0
"""Seconds between two lines of a process that waits for a version."""

_watch: Watch | None = None
_depth = 0


@contextmanager
def joined_processes(multi_host: bool = False, heartbeat: int = 60, join_timeout: int = 300) -> Iterator[None]:
    """A block of a job's work: connects this process to the others of a multi-host run, and finds the job's devices.

    With JAX_COORDINATOR_ADDRESS set, JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too. Otherwise, with
    `multi_host`, JAX finds the job on its own (Cloud TPU, SLURM, Open MPI). Where a process is lost, or ends the
    outermost of these blocks by an exception, all others end, each with a line that names it.

    Args:
      multi_host: whether JAX is to find the job.
      heartbeat: seconds without a sign of life after which a process is lost.
      join_timeout: seconds for all processes to join, after which those that have come end.

    Raises:
      InputError: JAX_COORDINATOR_ADDRESS without the other two, or where process 0 cannot listen; no job found; or no
        device.
    """
    global _depth
    if not jax.distributed.is_initialized():
        _join(multi_host, heartbeat, join_timeout)
    _depth += 1
    try:
        find_devices()  # before anything else asks JAX, which has words of its own for a platform that is not there
        yield
    except BaseException as error:
        if _watch and _depth == 1:
            _watch.fail(error)
        raise
    finally:
        _depth -= 1


def _join(multi_host: bool, heartbeat: int, join_timeout: int) -> None:
    global _watch
    address: str | None = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and not multi_host:
        return
    drop_programs()
    count: int | None = None
    process: int | None = None
    devices: Sequence[int] | None = None
    if address is not None:
        if missing := [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name not in os.environ]:
            raise InputError(f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} is not: set all three")
        count, process = _number("JAX_NUM_PROCESSES", 1), _number("JAX_PROCESS_ID", 0)
        if process >= count:
            raise InputError(f"JAX_PROCESS_ID is {process} of JAX_NUM_PROCESSES {count}: they are numbered from 0")
        if not (re.fullmatch(r".+:\d{1,5}", address) and 0 < int(address.rpartition(":")[2]) < 2**16):
            raise InputError(f"JAX_COORDINATOR_ADDRESS is {address!r}: give host:port of process 0")
    cut = threading.Event()
    joining = Joining(join_timeout, cut)
    # JAX would fail, or abort the process: the end of `joining` and the watch come first.
    jax_timeout = 2 * join_timeout
    try:
        with joining:
            if address is None:  # of several slices, process 0 may be on a host that comes later
                found = private("clusters", "ClusterEnv").auto_detect_unset_distributed_params(*[None] * 5, jax_timeout)
                address, count, process, devices = found
            at, inner = address, None
            if address is not None and process is not None and count is not None:
                joining.job = address, process, count
                if process:
                    at = open_relay(address, cut, process, lambda: joining.here.update({0: ""}))
                else:
                    inner = _open_gate(address, joining)
            jax.distributed.initialize(
                at,
                count,
                process,
                devices,
                coordinator_bind_address=inner,
                initialization_timeout=jax_timeout,
                heartbeat_timeout_seconds=NEVER,
            )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"multi_host is set but no Cloud TPU, SLURM or MPI job was found ({error}): start one process per host "
            "inside such a job, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    _watch = Watch(heartbeat, cut)


def _number(name: str, least: int) -> int:
    text = os.environ[name]
    if not (text.isdecimal() and int(text) >= least):
        raise InputError(f"{name} is {text!r}; expected a whole number, {least} or more")
    return int(text)


def _open_gate(address: str, joining: Joining) -> str:
    """The port of process 0's service, behind the address at which the others look for it."""
    outer = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{address.rpartition(':')[2]}")
    try:
        return open_gate(outer, lambda process, host: joining.here.update({process: host}))
    except (OSError, OverflowError, ValueError) as error:  # the others of what is no address
        raise InputError(
            f"process 0 cannot listen at {outer} ({reason(error)}): choose another port in JAX_COORDINATOR_ADDRESS, or "
            "end the job that has it"
        ) from error


def check_shared(folder: Path) -> None:
    """Raises `InputError` on every process of a multi-host run unless all of them see the files in `folder`.

    Process 0 writes a file with a random name to the folder, or to the nearest existing folder above it, and removes
    it again.
    """
    if jax.process_count() == 1:
        return
    name = _new_name()
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    first, problem, advice = jax.process_index() == 0, "", "choose another"
    if first:
        try:
            (nearest / name).touch()
        except OSError as error:  # raised by all below: the others wait for this process
            problem = reason(error)
            advice = f"{room(error)} or choose another".removeprefix(" or ")
    multihost_utils.sync_global_devices("written")
    outcome = multihost_utils.process_allgather(np.array([(nearest / name).exists(), not problem]))
    seen, written = outcome[:, 0], outcome[:, 1].all()
    if first:
        (nearest / name).unlink(missing_ok=True)
    if not written:
        raise InputError(f"output {folder} cannot be written by process 0 ({problem or 'its log says why'}): {advice}")
    if not seen.all():
        raise InputError(
            f"output {folder} is not shared: {int((~seen).sum())} of {seen.size} processes do not see what process 0 "
            "writes there. Give an --output on a file system that all hosts mount at the same path"
        )


def _new_name() -> str:
    """A name for a trial, the same on all processes, that no file has."""
    return f"{UNFINISHED}{int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))):08x}"


def sharing(folder: Path | None) -> list[int]:
    """The processes of a job that see the same files in a folder as this one does, which is among them; ascending.

    All processes call it; None stands for no folder, and gives no process.

    Raises:
      OSError: the folder cannot be written.
    """
    process, count = jax.process_index(), jax.process_count()
    if count == 1:
        return [process] if folder else []
    name = _new_name()
    if folder:
        (folder / f"{name}-{process}").touch()
    multihost_utils.sync_global_devices("written")
    seen = np.array([folder is not None and (folder / f"{name}-{other}").exists() for other in range(count)])
    table = multihost_utils.process_allgather(seen)
    if folder is None:
        return []
    (folder / f"{name}-{process}").unlink(missing_ok=True)
    alike = np.flatnonzero((table == seen).all(axis=1))
    return [int(other) for other in alike] if np.array_equal(alike, np.flatnonzero(seen)) else [process]


def gather_texts(text: str) -> list[str]:
    """The text of each process of a job, in their order, cut to a thousand bytes; all processes call it."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode()[:_TEXT].ljust(_TEXT, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(own)]


T = TypeVar("T")


def tell_version(name: str, version: str) -> None:
    """Process 0 tells the others of its job which version of something it has, the first time; see `same_version`."""
    if jax.distributed.is_initialized() and jax.process_index() == 0 and _told(name) is None:
        _tell(name, version)


def same_version(name: str, find: Callable[[str | None], T], version_of: Callable[[T], str]) -> T:
    """Finds something that changes where it lies, such as a model of a hub, in one version on all processes of a job.

    The version that process 0 finds first holds for all, as long as the job lasts. The processes need not call this at
    the same time; process 0 calls it, or `tell_version`, with each name that another process calls it with.

    Args:
      name: a name for it, the same on all processes.
      find: finds the present version, or the one that it is given.
      version_of: the version of what was found; empty for what only its place names.

    Raises:
      InputError: this process cannot find the version of process 0.
    """
    if not jax.distributed.is_initialized():
        return find(None)
    process = jax.process_index()
    wanted = _told(name) if process == 0 else _hear_version(name)
    if wanted is None:
        try:
            found = find(None)
        except InputError as error:  # the others would wait, and this process perhaps for them
            _tell(name, f"{_FAILED}{error}")
            raise
        tell_version(name, version_of(found))
        return found
    if wanted.startswith(_FAILED):
        raise InputError(f"process 0 does not find {name}: {wanted.removeprefix(_FAILED)}")
    problem = "which is a path there, and not here"
    # The present version first: caches then know it by its name, too.
    for version in (None, wanted) if wanted else ():
        try:
            found = find(version)
        except InputError as error:
            problem = f"{wanted}: {error}"
            continue
        if version_of(found) == wanted:
            return found
        problem = f"{wanted}, but {version_of(found)}"
    raise InputError(
        f"process {process} ({socket.gethostname()}) does not find {name} as process 0 has it, {problem}. Let all "
        "hosts reach the network, or give them the files or the cache of process 0"
    )


def _tell(name: str, text: str) -> None:
    private("distributed", "global_state").client.key_value_set(_VERSION + name, text, allow_overwrite=True)


def _told(name: str) -> str | None:
    """What process 0 has told in this job with this name; None where that is nothing, or that it found nothing."""
    try:
        text = str(private("distributed", "global_state").client.key_value_try_get(_VERSION + name))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None
    return None if text.startswith(_FAILED) else text


def _hear_version(name: str) -> str:
    """What process 0 tells with this name; a line a minute says what is awaited."""
    client = private("distributed", "global_state").client
    while True:
        try:
            return str(client.blocking_key_value_get(_VERSION + name, int(1000 * _PATIENCE)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        say_waiting(f"process 0 to find {name}: if it was started with other settings, it never will")


def first_on_process_0(action: Callable[[], T]) -> T:
    """Runs `action` on process 0, then on the others."""
    result = action() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_on_process_0")
        result = action() if result is None else result
    assert result is not None
    return result
