"""The way to the coordination service of a job.

Of each process but the first, a relay keeps it open: JAX aborts a process whose connection to the service is closed. In
the first, a gate before the service hears from each relay which process comes.
"""

import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_HELLO = re.compile(rb"simcse-jax (\d+) (.*)\n")
"""The first line of a relay: number and host of its process."""
_LONGEST = 512
"""Bytes of such a line."""

Opened = Callable[[socket.socket, socket.socket], None]
"""Called with both ends of a connection, before anything is handed on."""


def open_relay(address: str, cut: threading.Event, process: int, reached: Callable[[], None]) -> str:
    """Opens a port on this machine that hands everything on to the gate of process 0, and back.

    Args:
      address: host:port of the gate. A connection waits until it can be reached.
      cut: set when the other end closes a connection, which then stays open on this side.
      process: number of this process, which the gate is told.
      reached: called when the gate is reached.

    Returns:
      host:port of the new port.
    """

    def opened(_: socket.socket, far: socket.socket) -> None:
        far.sendall(f"simcse-jax {process} {socket.gethostname()}\n".encode())
        reached()

    host, _, port = address.rpartition("/")[2].rpartition(":")
    server = socket.create_server(("127.0.0.1", 0))
    _start(server, (host.strip("[]"), int(port)), cut, opened)
    return "{}:{}".format(*server.getsockname())


def open_gate(address: str, came: Callable[[int, str], None]) -> str:
    """Opens the address of a job's service, which gets a port of its own.

    Args:
      address: host:port on which the others expect the service; [::] is every interface.
      came: called with number and host of each process whose relay connects.

    Returns:
      host:port for the service.

    Raises:
      OSError: nothing can listen at the address.
    """
    host, _, port = address.rpartition(":")
    every = host == "[::]"
    family = socket.AF_INET6 if ":" in host and (not every or socket.has_dualstack_ipv6()) else socket.AF_INET
    server = socket.create_server(
        ("" if every else host.strip("[]"), int(port)),
        family=family,
        dualstack_ipv6=every and family == socket.AF_INET6,
        backlog=1024,
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        inner = free.getsockname()

    def opened(near: socket.socket, far: socket.socket) -> None:
        first = b""
        while len(first) < _LONGEST and (byte := _receive(near, 1)) and not (first := first + byte).endswith(b"\n"):
            pass
        if hello := _HELLO.fullmatch(first):
            came(int(hello[1]), hello[2].decode(errors="replace"))
        else:  # JAX's own connection of process 0
            far.sendall(first)

    _start(server, inner, threading.Event(), opened)
    return "{}:{}".format(*inner)


def _start(server: socket.socket, address: tuple[str, int], cut: threading.Event, opened: Opened) -> None:
    threading.Thread(target=_serve, args=(server, address, cut, opened), daemon=True).start()


def _serve(server: socket.socket, address: tuple[str, int], cut: threading.Event, opened: Opened) -> None:
    while True:
        try:
            near, _ = server.accept()
        except OSError:  # too many open files, for now
            time.sleep(0.1)
            continue
        threading.Thread(target=_connect, args=(near, address, cut, opened), daemon=True).start()


def connect_late(address: tuple[str, int]) -> socket.socket:
    """A connection to an address (host, port) at which nothing need listen so far: waits until something does."""
    while True:
        try:
            return socket.create_connection(address)
        except OSError:  # process 0 has not come so far
            time.sleep(0.1)


def _connect(near: socket.socket, address: tuple[str, int], cut: threading.Event, opened: Opened) -> None:
    far = connect_late(address)
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):  # closed already, which is found below
        opened(near, far)
    closed = threading.Event()  # by this side
    threading.Thread(target=_hand_on, args=(near, far, closed), daemon=True).start()
    with near, far:
        while data := _receive(far):
            try:
                near.sendall(data)
            except OSError:  # closed by this side
                return
        if not closed.is_set():
            cut.set()
            closed.wait()


def _hand_on(near: socket.socket, far: socket.socket, closed: threading.Event) -> None:
    while data := _receive(near):
        try:
            far.sendall(data)
        except OSError:  # the other direction finds it closed, too
            return
    closed.set()
    with suppress(OSError):  # closed already
        far.shutdown(socket.SHUT_RDWR)  # `close` would wait for the thread that reads from it


def _receive(end: socket.socket, most: int = 1 << 16) -> bytes:
    try:
        return end.recv(most)
    except OSError:
        return b""
