"""A job that loses a process, or in which one fails: all others end soon, and say which it was."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simcse_jax.errors import InputError
from simcse_jax.runtime import joining, processes
from simcse_jax.runtime.heartbeat import private
from simcse_jax.runtime.joining import Joining
from simcse_jax.runtime.processes import joined_processes
from simcse_jax.runtime.relay import connect_late, open_gate, open_relay
from tests.jobs import Job

SECONDS = 4
"""The jobs' heartbeat."""

WORK = f"""
import sys, time
import jax
from jax.experimental import multihost_utils
from simcse_jax.errors import InputError
from simcse_jax.runtime import joining, processes

def work(step):
    if jax.process_index() == 1:
        exec(sys.argv[1])

joining._INTERVAL = 3.0
with processes.joined_processes(heartbeat={SECONDS}, join_timeout=int(sys.argv[2])):
    for step in range(int(sys.argv[3])):
        work(step)
        multihost_utils.sync_global_devices(str(step))
        if step == 0:
            print("at work")
        time.sleep(0.1)
print("done")
"""


def job(
    folder: Path,
    count: int = 2,
    work: str = "",
    joining: int = 300,
    steps: int = 10**6,
    own: dict[int, dict[str, str]] | None = None,
) -> Job:
    return Job(count, ["-c", WORK, work, str(joining), str(steps)], folder, own)


def wait_until_at_work(job: Job) -> None:
    job.until(lambda: all("at work" in job.log(process) for process in range(len(job.processes))))


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (4, 2)])
def test_a_lost_process_ends_all_others(tmp_path: Path, number: signal.Signals, count: int, victim: int) -> None:
    """Within the heartbeat and little more; with one line that names it; and no line of JAX's."""
    with job(tmp_path, count) as lost:
        wait_until_at_work(lost)
        lost.send(number, victim)
        begin = time.monotonic()
        assert lost.ends(60, without=victim) == [1] * (count - 1)
        assert time.monotonic() - begin < SECONDS + 20  # on a busy machine, too
        for process in set(range(count)) - {victim}:
            (line,) = lost.errors(process)
            assert f"process {victim} of {count}" in line
            assert f"pid {lost.processes[victim].pid}) was lost: " in line
            assert "start all processes again, with the same command, to go on from there" in line
            assert "*** Check failure" not in lost.log(process)
            assert "Traceback" not in lost.log(process)


@pytest.mark.full
def test_a_process_that_was_stopped_for_too_long_ends_when_it_goes_on(tmp_path: Path) -> None:
    with job(tmp_path) as stopped:
        wait_until_at_work(stopped)
        stopped.send(signal.SIGSTOP, 1)
        stopped.ends(60, without=1)
        time.sleep(2)
        stopped.send(signal.SIGCONT, 1)
        assert stopped.ends(60) == [1, 1]
        assert "(this process itself stood still for " in stopped.errors(1)[0]


@pytest.mark.full
def test_a_process_that_is_cut_off_and_the_others_end(tmp_path: Path) -> None:
    """Nothing that process 1 sends to process 0 arrives any more, though both live and no connection is closed."""
    flowing = threading.Event()
    flowing.set()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = address_of(server)
        with job(tmp_path, own={1: {"JAX_COORDINATOR_ADDRESS": address}}) as cut:
            between = threading.Thread(target=hand_on, args=(server, cut.address, flowing), daemon=True)
            between.start()
            wait_until_at_work(cut)
            flowing.clear()
            assert cut.ends(60) == [1, 1]
            for process in (0, 1):
                (line,) = cut.errors(process)
                assert f"process {1 - process} of 2 " in line
                assert f"was lost: no sign of life for {SECONDS} s" in line
        flowing.set()
        between.join()


def hand_on(server: socket.socket, address: str, flowing: threading.Event) -> None:
    """Between a process and the coordination service, while it may."""
    near, _ = server.accept()
    with near, connect_late(place_of(address)) as far:

        def pump(source: socket.socket, target: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    flowing.wait()
                    target.sendall(data)

        back = threading.Thread(target=pump, args=(far, near), daemon=True)
        back.start()
        pump(near, far)
        back.join()


@pytest.mark.full
@pytest.mark.parametrize(
    ("work", "status", "words"),
    [
        ("if step == 3: raise InputError('no such\\nfile')", 2, "has failed: no such file"),
        ("if step == 3: raise TypeError('a fault')", 1, "has failed (TypeError: a fault)"),
        ("if step == 3: raise KeyboardInterrupt", 130, "was interrupted"),
    ],
)
def test_a_process_that_fails_ends_all(tmp_path: Path, work: str, status: int, words: str) -> None:
    """With its status, at once."""
    with job(tmp_path, work=work) as failing:
        wait_until_at_work(failing)
        begin = time.monotonic()
        assert failing.ends(60)[0] == status
        assert time.monotonic() - begin < 20
        assert failing.errors(0)[0].endswith(f"pid {failing.processes[1].pid}) {words}")


@pytest.mark.full
def test_a_slow_process_and_a_job_that_stood_still_go_on(tmp_path: Path) -> None:
    """A step that takes longer than the heartbeat; and all processes stopped for longer than that."""
    with job(tmp_path, work=f"time.sleep(step == 3 and {SECONDS + 3})", steps=80) as slow:
        wait_until_at_work(slow)
        time.sleep(SECONDS + 3)
        slow.send(signal.SIGSTOP)
        time.sleep(SECONDS + 3)
        slow.send(signal.SIGCONT)
        assert slow.ends(60) == [0, 0], slow.said()
        assert [slow.log(process).splitlines()[-1] for process in (0, 1)] == ["done", "done"]


@pytest.mark.full
@pytest.mark.parametrize("missing", [0, 1])
def test_a_process_that_never_comes_is_not_awaited_for_ever(tmp_path: Path, missing: int) -> None:
    with job(tmp_path, count=3, joining=8) as alone:
        alone.send(signal.SIGKILL, missing)
        assert alone.ends(60, without=missing) == [1, 1]
        for process in {0, 1, 2} - {missing}:
            (line,) = alone.errors(process)
            assert f"process {process} of 3 has waited 8 s for the others to join at {alone.address}: " in line
            who = "process 0 cannot be reached" if missing == 0 else "process 0 is there, and its log names them"
            who = who if process else f"1 of 3 processes are missing, {missing}"
            gone = "process 0 was there and has gone, and its log says why"  # it may give up first
            assert any(f": {words}. See why" in line for words in (who, gone if process and missing else who))
            # A process that starts late hears of process 0 late.
            waiting = [line for line in alone.log(process).splitlines() if line.startswith("waiting   ")]
            assert waiting[-1] == f"waiting   for the others to join at {alone.address}, 6 s so far: {who}"


@pytest.mark.full
def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = {process: {"JAX_COORDINATOR_ADDRESS": address_of(server)} for process in (0, 1)}
        with job(tmp_path, joining=8, own=own) as refused:
            assert refused.ends(60) == [1, 1]
            (line,) = [line for line in refused.log(0).splitlines() if line.startswith("simcse_jax.errors.InputError")]
            assert f"process 0 cannot listen at [::]:{server.getsockname()[1]} (Address already in use" in line


def test_hosts_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    waiting = Joining(300, threading.Event())
    waiting.job = "here:1", 0, 4
    assert waiting._missing() == "3 of 4 processes are missing, 1, 2, 3"
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    waiting.here[2] = "c"
    assert waiting._missing() == "2 of 4 processes are missing, 1 (b), 3 (d)"
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")  # the hosts of this slice alone
    assert waiting._missing() == "2 of 4 processes are missing, 1 (worker 1 of slice 0), 3 (worker 1 of slice 1)"


METADATA = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "unknown:unknown:127.0.0.5,unknown:unknown:127.0.0.6",
    "tpu-env": "NODE_ID: 'a-1'\nMEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1:8080'\n",
}
"""What the metadata of a Cloud TPU VM says to worker 1 of slice 1 of 3 slices of 2 hosts."""
POD = {
    "TPU_WORKER_HOSTNAMES": "127.0.0.5,127.0.0.6",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
}
"""What GKE says to the same, in its environment."""


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Makes this process a worker of Cloud TPU to JAX's search for its job; returns the calls of jax.distributed."""
    for name in list(os.environ):
        if name.startswith(("TPU_", "MEGASCALE_", "SLURM_", "OMPI_", "JAX_COORDINATOR_")):
            monkeypatch.delenv(name)

    def become(metadata: dict[str, str], variables: dict[str, str]) -> list[tuple[Any, ...]]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        module = "jax._src.clusters.cloud_tpu_cluster"
        monkeypatch.setattr(f"{module}.running_in_cloud_tpu_vm", True)
        monkeypatch.setattr(f"{module}.get_metadata", lambda key: (metadata.get(key, ""), 200 if metadata else 404))
        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr("jax.distributed.initialize", lambda *given, **named: calls.append((*given, named)))
        monkeypatch.setattr(processes, "Watch", lambda *_: None)
        monkeypatch.setattr(processes, "_watch", None)
        monkeypatch.setattr(processes, "open_relay", lambda address, cut, process, reached: f"relay to {address}")
        monkeypatch.setattr(processes, "open_gate", lambda address, came: f"gate at {address}")
        return calls

    return become


@pytest.mark.parametrize("pod", [False, True])
@pytest.mark.parametrize(("slice_", "worker", "process"), [(0, 0, 0), (0, 1, 1), (1, 1, 3), (2, 0, 4)])
def test_processes_of_several_slices_find_their_job(
    tpu: Callable[..., list[tuple[Any, ...]]], pod: bool, slice_: int, worker: int, process: int
) -> None:
    if pod:
        calls = tpu({}, POD | {"MEGASCALE_SLICE_ID": str(slice_), "TPU_WORKER_ID": str(worker)})
    else:
        environment = METADATA["tpu-env"].replace("SLICE_ID: '1'", f"SLICE_ID: '{slice_}'")
        calls = tpu(METADATA | {"tpu-env": environment, "agent-worker-number": str(worker)}, {})
    with joined_processes(multi_host=True):
        ((at, count, number, devices, named),) = calls
    assert (count, number, devices) == (6, process, None)
    assert at == ("relay to 127.0.0.1:8482" if process else "127.0.0.1:8482")
    assert named["coordinator_bind_address"] == (None if process else "gate at [::]:8482")


def test_a_first_slice_that_comes_late_is_awaited(
    monkeypatch: pytest.MonkeyPatch, tpu: Callable[..., list[tuple[Any, ...]]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its hosts have no address before; JAX waits for that, and the process says so, and ends in time."""
    calls = tpu({}, POD | {"MEGASCALE_COORDINATOR_ADDRESS": "a-hosts-0-0.a"})
    come = threading.Event()
    ended: list[str] = []

    def resolve(name: str) -> str:
        if not come.is_set():
            raise socket.gaierror("unknown")
        return "127.0.0.1"

    def end(message: str, status: int) -> None:
        ended.append(message)
        come.set()

    clock = SimpleNamespace(time=time.time, sleep=lambda _: come.wait(0.01))
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.time", clock)
    monkeypatch.setattr("socket.gethostbyname", resolve)
    monkeypatch.setattr(joining, "_INTERVAL", 0.2)
    monkeypatch.setattr(joining, "end_process", end)
    with joined_processes(multi_host=True, join_timeout=1):
        assert [call[1:3] for call in calls] == [(6, 3)]
    missing = "JAX does not find the host of process 0, a-hosts-0-0.a"
    assert f"waiting   for the others to join, 0 s so far: {missing}\n" in capfd.readouterr().err
    assert ended[0].startswith(f"this process has waited 1 s for the others to join: {missing}. See why they did not")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "here:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID is not: set all three"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS is 'here': give host:port of process 0"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a whole number, 1 or more"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'; expected a whole number, 0 or more"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2 of JAX_NUM_PROCESSES 2: they are numbered from 0"),
    ],
)
def test_variables_of_no_job_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    whole = {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for name in whole:
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables if "set all three" in message else whole | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error, joined_processes():
        pass
    assert message in str(error.value)


def test_jax_has_what_it_has_no_public_name_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of a JAX that lacks it is refused; a process alone needs none of it."""
    client = private("lib", "_jax").DistributedRuntimeClient
    for name in ("blocking_key_value_get", "key_value_dir_get", "key_value_set", "wait_at_barrier"):
        assert hasattr(client, name)
    assert {"client", "process_id", "num_processes"} <= {*dir(private("distributed", "global_state"))}
    assert hasattr(private("clusters", "ClusterEnv"), "auto_detect_unset_distributed_params")
    monkeypatch.delattr("jax._src.clusters.ClusterEnv")
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    refused = pytest.raises(InputError, match=r"^JAX \S+ lacks jax\._src\.clusters\.ClusterEnv")
    with refused, joined_processes(multi_host=True):
        pass
    with joined_processes():
        pass


def test_a_relay_hands_on_and_stays_open() -> None:
    """Also where the gate comes later, and where it goes."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = address_of(place)
    cut, reached = threading.Event(), threading.Event()
    with socket.create_connection(place_of(open_relay(address, cut, 3, reached.set))) as near:
        near.sendall(b"early ")
        assert not reached.is_set()
        with socket.create_server(place_of(address)) as server:
            far, _ = server.accept()
            near.sendall(b"late")
            far.sendall(b"back")
            hello = f"simcse-jax 3 {socket.gethostname()}\n".encode()
            assert receive(far, len(hello) + 10) == hello + b"early late"
            assert receive(near, 4) == b"back"
            assert reached.is_set()
            assert not cut.is_set()
            far.close()
        assert cut.wait(10)
        near.settimeout(0.2)
        with pytest.raises(TimeoutError):
            near.recv(1)


def test_a_relay_closes_what_its_process_closes() -> None:
    cut = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(place_of(open_relay(address_of(server), cut, 1, lambda: None))):
            far, _ = server.accept()
        with far:
            far.settimeout(10)
            assert far.recv(1 << 16).startswith(b"simcse-jax 1 ")
            assert far.recv(1) == b""
    assert not cut.is_set()


@pytest.mark.parametrize("host", ["[::]", "127.0.0.1"])
def test_a_gate_hears_who_comes(host: str) -> None:
    """And hands on what comes after that, or all where no relay comes."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    came: dict[int, str] = {}
    with socket.create_server(place_of(open_gate(f"{host}:{port}", lambda *who: came.update([who])))) as service:
        relay = open_relay(f"127.0.0.1:{port}", threading.Event(), 2, lambda: None)
        for address, message in [(relay, b"PRI of another\n"), (f"127.0.0.1:{port}", b"PRI of its own\n")]:
            with socket.create_connection(place_of(address)) as near:
                near.sendall(message)
                far, _ = service.accept()
                with far:
                    assert receive(far, len(message)) == message
                    far.sendall(b"back")
                    assert receive(near, 4) == b"back"
    assert came == {2: socket.gethostname()}


def address_of(server: socket.socket) -> str:
    return "{}:{}".format(*server.getsockname())


def place_of(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def receive(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += end.recv(count - len(data))
    return data
