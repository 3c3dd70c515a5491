"""A way to the coordination service that stays open: JAX aborts a process whose connection to the service is closed."""

import socket
import threading
import time
from contextlib import suppress


def open_relay(address: str, cut: threading.Event) -> str:
    """Opens a port on this machine that hands everything on to an address, and back.

    Args:
      address: host:port to hand on to. A connection waits until it can be reached.
      cut: set when the other end closes a connection, which then stays open on this side.

    Returns:
      host:port of the new port.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(server, (host.strip("[]"), int(port)), cut), daemon=True).start()
    return "{}:{}".format(*server.getsockname())


def _serve(server: socket.socket, address: tuple[str, int], cut: threading.Event) -> None:
    while True:
        near, _ = server.accept()
        threading.Thread(target=_connect, args=(near, address, cut), daemon=True).start()


def connect_late(address: tuple[str, int]) -> socket.socket:
    """A connection to an address (host, port) at which nothing need listen so far: waits until something does."""
    while True:
        try:
            return socket.create_connection(address)
        except OSError:  # process 0 has not come so far
            time.sleep(0.1)


def _connect(near: socket.socket, address: tuple[str, int], cut: threading.Event) -> None:
    far = connect_late(address)
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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


def _receive(end: socket.socket) -> bytes:
    try:
        return end.recv(1 << 16)
    except OSError:
        return b""
