"""The service and clients that mean it harm: connections, bodies, a model that hangs, its log and its end."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'simcse-jax[serve]'")

from simcse_jax.inference.simcse import SimCSE
from simcse_jax.serve.app import create_app
from simcse_jax.serve.batching import Batcher
from simcse_jax.serve.engine import Answer, Engine, Job
from simcse_jax.serve.limits import Limits
from simcse_jax.serve.log import Sparing
from simcse_jax.serve.server import Server, bind

LIMITS = Limits(
    max_body=4000,
    max_sentences=20,
    max_characters=100,
    max_plot=6,
    max_connections=12,
    max_wait=0.5,
    max_seconds=1.0,
    max_stop=5.0,
    batch=4,
)
JSON = "Content-Type: application/json"


class Waits(SimCSE):
    """In a model's place: wide vectors of ones, after a wait where a sentence says so."""

    width, max_length = 20_000, 8  # type: ignore[assignment]

    def __init__(self) -> None:
        self.index = None
        self.gate = threading.Event()
        self.asked: list[list[str]] = []

    def warm_up(self) -> None:
        pass

    def are_cut(self, sentences: Any) -> list[bool]:
        return [False] * len(sentences)

    def encode(self, sentences: Any, **_: Any) -> Any:
        self.asked.append(list(sentences))
        if "wait" in sentences:
            assert self.gate.wait(20)
        return np.ones((len(sentences), self.width), np.float32)


@dataclass
class Service:
    """A service on a socket, in a thread."""

    port: int
    model: Waits = field(repr=False)
    batcher: Batcher[Job, Answer]

    def connect(self) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(15)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)  # what is not read stays with the service
        connection.connect(("127.0.0.1", self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def send(self, sentence: str = "a", number: int = 1, path: str = "encode") -> socket.socket:
        """A connection on which a request has been sent, which is to end after the answer."""
        body = json.dumps({"sentences": [sentence] * number})
        connection = self.connect()
        connection.sendall(head(path, f"Content-Length: {len(body)}", "Connection: close") + body.encode())
        return connection

    def ask(self, **given: Any) -> tuple[int, bytes]:
        return answer(self.send(**given))


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} /api/{path} HTTP/1.1", "Host: 127.0.0.1", JSON, *lines, "", ""]).encode()


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the answer, read to the end of the connection; status 0 without an answer."""
    received = b""
    with connection, contextlib.suppress(ConnectionError):  # it may be closed with something unread
        while piece := connection.recv(2**20):
            received += piece
    status, _, body = received.partition(b"\r\n\r\n")
    return int(status.split()[1]) if status else 0, body


def flood(connection: socket.socket, piece: bytes, most: int, pause: float = 0.0) -> int:
    """Bytes sent until the service closed the connection."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
            time.sleep(pause)
    except ConnectionError:
        pass
    return sent


@contextmanager
def serving(**limits: Any) -> Iterator[Service]:
    model, ready = Waits(), Future[Exception | None]()
    bounds = replace(LIMITS, **limits)
    app = create_app(Engine(model, None, 5, bounds.batch), "waits", bounds, ["127.0.0.1"], ready.set_result)
    server = Server(app, bounds)
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, args=(bound,))
        thread.start()
        try:
            assert ready.result(20) is None
            yield Service(bound.getsockname()[1], model, app.state.batcher)
        finally:
            model.gate.set()
            server.stop()
            thread.join()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def until(condition: Any, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 0),
        (b"POST /api/enc", 408),
        (b"GET /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\r\n", 408),
        (head("encode", "Content-Length: 100") + b"{", 408),
        (head("encode", "Transfer-Encoding: chunked") + b"1\r\n{\r\n", 408),
    ],
)
def test_what_comes_late_ends_the_connection(service: Service, sent: bytes, status: int) -> None:
    with service.connect() as connection:
        connection.sendall(sent)
        begun = time.monotonic()
        assert answer(connection)[0] == status
        assert time.monotonic() - begun < 10


def test_a_trickle_is_late_too(service: Service) -> None:
    with service.connect() as connection:
        assert flood(connection, b"G", 500, pause=0.03) < 500
    with service.connect() as connection:  # the time for the headers of a second request is no longer
        connection.sendall(head("health", method="GET"))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        assert flood(connection, b"G", 500, pause=0.03) < 500


@pytest.mark.parametrize(
    "sent", [head("encode", "Content-Length: 12000"), head("encode", "Transfer-Encoding: chunked", "Connection: x")]
)
def test_a_body_that_is_too_large_is_refused_and_its_client_reads_why(service: Service, sent: bytes) -> None:
    body = b"x" * 12000 if b"Length" in sent else b"2ee0\r\n" + b"x" * 12000 + b"\r\n0\r\n\r\n"
    with service.connect() as connection:
        connection.sendall(sent)
        for start in range(0, len(body), 1000):
            connection.sendall(body[start : start + 1000])
            time.sleep(0.002)
        status, said = answer(connection)  # to the end: the connection is closed
    assert status == 413
    assert b"larger than 4,000 bytes" in said


@pytest.mark.parametrize("path", ["encode", "health", "nothing"])
@pytest.mark.parametrize("how", ["Content-Length: 99999999999", "Transfer-Encoding: chunked"])
def test_an_endless_body_ends(service: Service, path: str, how: str) -> None:
    piece = b"x" * 65536
    chunk = piece if "Length" in how else b"10000\r\n" + piece + b"\r\n"
    begun = time.monotonic()
    with service.connect() as connection:
        connection.sendall(head(path, how, method="GET" if path == "health" else "POST"))
        # Less is what lies in the buffers of both sockets.
        assert flood(connection, chunk, 2**28) < 2**25
    assert time.monotonic() - begun < 10
    assert service.ask()[0] == 200


def test_a_client_that_waits_for_a_word_before_its_body_is_refused_at_once(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(head("encode", "Content-Length: 50000", "Expect: 100-continue"))
        assert answer(connection)[0] == 413


def test_a_body_in_tiny_pieces_is_refused(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(head("encode", "Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 1500)
        assert answer(connection)[0] == 400


def test_more_connections_than_allowed_close_the_idlest_and_harm_nobody() -> None:
    with serving(max_wait=20.0) as service:
        idle = [service.connect() for _ in range(40)]
        assert service.ask()[0] == 200
        first, last = idle[0], idle[-1]
        first.settimeout(5)
        assert answer(first)[0] == 0
        last.sendall(head("health", "Connection: close", method="GET"))
        assert answer(last)[0] == 200
        busy = service.send("wait")  # what the service works on is no idle connection
        until(lambda: service.batcher.busy)
        more = [service.connect() for _ in range(40)]
        service.model.gate.set()
        assert answer(busy)[0] == 200
        for connection in (*idle, *more, busy):
            connection.close()


def test_who_does_not_take_an_answer_is_cut_off(service: Service) -> None:
    slow = [service.send(number=20) for _ in range(2)]
    time.sleep(4)
    for connection in slow:
        status, begun = answer(connection)
        assert status == 200
        assert begun.count(b",") < 20 * service.model.width
    assert service.ask()[0] == 200


def test_much_that_is_not_taken_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simcse_jax.serve.connections._UNSENT", 2**20)
    with serving(max_seconds=15.0) as service:
        slow = [service.send(number=20) for _ in range(4)]
        begun = time.monotonic()
        until(lambda: len(service.model.asked) > 1 and not service.batcher.busy)
        time.sleep(1)
        assert answer(slow[0])[1].count(b",") < 20 * service.model.width
        assert time.monotonic() - begun < 10
        assert answer(slow[-1])[1].count(b",") > 20 * service.model.width
        for connection in slow:
            connection.close()


def test_who_has_gone_is_not_answered(service: Service) -> None:
    first = service.send("wait")
    until(lambda: service.batcher.busy)
    asked = len(service.model.asked)
    for _ in range(5):
        service.send("gone").close()
    kept = service.send("kept")
    time.sleep(0.3)
    service.model.gate.set()
    assert answer(first)[0] == answer(kept)[0] == 200
    assert service.model.asked[asked:] == [["kept"]]
    service.model.gate.clear()


def test_bodies_that_stall_leave_room_for_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simcse_jax.serve.guard._BODIES", 3)
    monkeypatch.setattr("simcse_jax.serve.guard._SMALL", 1000)
    with serving(max_seconds=5.0) as service:
        stalled = [service.connect() for _ in range(6)]
        for connection in stalled:
            connection.sendall(head("encode", "Content-Length: 4000") + b"x" * 3000)
        assert answer(stalled[-1])[0] == 503
        assert service.ask()[0] == 200
        for connection in stalled:
            connection.close()
        until(lambda: service.ask(sentence="b" * 90, number=15)[0] == 200)


@pytest.mark.parametrize(
    "body",
    [
        "[" * 3900,
        '{"a":' * 700,
        '{"sentences": ' + "[" * 1900 + "]" * 1900 + "}",
        '{"sentences": NaN}',
        '{"sentences": ["a"], "normalize": Infinity}',
        '{"sentences": ["a"], "normalize": ' + "9" * 3900 + "}",
        '{"sentences": ["\\u0000\\ud800"]}',
        '{"sentences": ["a"], "sentences": [1e999]}',
        "\0",
        "null",
        "-Infinity",
    ],
)
def test_odd_json_is_refused_and_said(service: Service, body: str, caplog: pytest.LogCaptureFixture) -> None:
    with service.connect() as connection:
        connection.sendall(head("encode", f"Content-Length: {len(body)}", "Connection: close") + body.encode())
        status, said = answer(connection)
    assert status in (400, 422)
    assert set(json.loads(said)) == {"error"}
    assert not caplog.records


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400),
        (b"\r\n" * 10 + b"HELO there\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"y" * 70_000, 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (head("encode", "Content-Length: 5", "Content-Length: 6"), 400),
        (head("encode", "Content-Length: -5"), 400),
        (head("health", "Upgrade: websocket", "Connection: Upgrade, close", method="GET"), 200),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", 404),
        (head("health", method="GET") * 200 + head("health", "Connection: close", method="GET"), 200),
    ],
)
def test_what_is_hardly_http_gets_an_answer_and_an_end(service: Service, sent: bytes, status: int) -> None:
    with service.connect() as connection:
        connection.sendall(sent)
        assert answer(connection)[0] == status
    assert service.ask()[0] == 200


def test_half_closed_connections_go(service: Service) -> None:
    for sent in (b"", b"GET /", head("encode", "Content-Length: 10") + b"{"):
        with service.connect() as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer(connection)
    assert service.ask()[0] == 200


def test_the_log_says_each_thing_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sparing = Sparing()

    def said(text: str, line: int, error: type[Exception] | None = None) -> str | None:
        info = (error, error(), None) if error else None
        record = logging.LogRecord("uvicorn.error", logging.WARNING, "file", line, text, (), info)
        return record.getMessage() if sparing.filter(record) else None

    assert [said("bad request", 1) for _ in range(1000)] == ["bad request", *[None] * 999]
    assert said("a fault", 2, ValueError) == "a fault"
    assert said("a fault", 2, ValueError) is None
    assert said("a fault", 2, KeyError) == "a fault"
    now += 60
    assert said("bad request", 1) == "bad request (999 more like the one before were left out)"
    assert said("bad request", 1) is None


_PROGRAM = """
import sys, threading
import simcse_jax.inference.simcse as module
from tests.test_serve_hostile import Waits
module.SimCSE = lambda *_, **__: Waits()
from simcse_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def command(*options: str, files: int = 4096) -> Iterator[tuple[subprocess.Popen[str], Service]]:
    """The command in a process of its own, over a model of which a call can hang."""
    given = [sys.executable, "-c", _PROGRAM, "serve", "waits", "--port", "0", *options]
    pipe = subprocess.PIPE
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    few = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *given]
    with subprocess.Popen(few, stdout=pipe, stderr=pipe, text=True, cwd=root, env=environment) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("ready: "))
            yield process, Service(int(line.split()[1].rpartition(":")[2]), Waits(), None)  # type: ignore[arg-type]
        finally:
            process.kill()


def test_where_few_files_may_be_open_there_are_fewer_connections() -> None:
    with command("--max-wait", "30", files=256) as (process, service):
        idle = [service.connect() for _ in range(500)]
        assert [service.ask()[0] for _ in range(10)] == [200] * 10
        assert answer(idle[0])[0] == 0
        process.terminate()
        _, err = process.communicate(timeout=20)
        for connection in idle:
            connection.close()
    assert "Traceback" not in err
    assert len(err.splitlines()) < 5


def status_of(service: Service, path: str) -> int:
    with service.connect() as connection:
        connection.sendall(head(path, "Connection: close", method="GET"))
        return answer(connection)[0]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_call_that_hangs_is_said_and_holds_nobody(signals: int) -> None:
    with command("--max-seconds", "0.5", "--max-stop", "3") as (process, service):
        assert (status_of(service, "ready"), service.ask()[0]) == (200, 200)
        assert service.ask(sentence="wait")[0] == 504
        until(lambda: status_of(service, "ready") == 503)
        assert status_of(service, "health") == 200
        status, said = service.ask()
        assert (status, b"at one call for more than 0.5 s" in said) == (503, True)
        for _ in range(300):
            with service.connect() as connection:
                connection.sendall(b"what is this\r\n\r\n")
                answer(connection)
        begun = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - begun < 3.5
    assert process.returncode == 0
    assert out.endswith("stopped\n")
    assert err.splitlines()[-1] == "a call of the model went on and was left"
    assert len(err.splitlines()) < 10


def test_an_end_that_does_not_come_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()
    monkeypatch.setattr("simcse_jax.serve.server.leave", left.set)
    app = create_app(Engine(Waits(), None, 5, 4), "waits", LIMITS)
    for max_stop, forced in ((0.05, True), (30.0, False)):
        server = Server(app, replace(LIMITS, max_stop=max_stop))
        server._server.handle_exit(signal.SIGTERM, None)
        assert left.wait(5 if forced else 0.2) == forced
        left.clear()
        with bind("127.0.0.1", 0) as bound:
            server.run(bound)  # ends at once, and takes back what would end this process
        assert server._server.last.finished.is_set()


def test_requests_under_way_are_told_that_the_service_ends() -> None:
    with command("--max-stop", "2") as (process, service):
        waiting = [service.send("wait") for _ in range(3)]
        slow = service.connect()
        slow.sendall(head("encode", "Content-Length: 100") + b"{")
        time.sleep(0.5)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert answer(slow)[0] == 0  # what has not arrived is not waited for
        assert time.monotonic() - begun < 1.5
        for connection in waiting:
            status, said = answer(connection)
            assert (status, b"is stopping" in said) == (503, True)
        process.communicate(timeout=20)
        assert time.monotonic() - begun < 2.5
    assert process.returncode == 0
