"""The application on a socket, until SIGTERM or Ctrl-C."""

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from simcse_jax.errors import InputError, reason

_BACKLOG = 2048  # most connections that wait to be accepted


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Takes a port: returns a listening socket, whose connections wait until it is served.

    Args:
      host: name or address.
      port: 0 for any that is free.

    Raises:
      InputError: the port is in use or may not be used, or there is no such address here.
    """
    if not 0 <= port < 65536:
        raise InputError(f"port is {port}; it must be between 0 (any that is free) and 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"cannot listen on {host} ({reason(error)}): give an address of this machine") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)  # until one of them listens, two sockets may have the same port
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on {host} port {port} ({reason(error)}): choose another with --port, or 0 for any"
        ) from error
    return bound


def url(bound: socket.socket) -> str:
    """The address for a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server:
    """A uvicorn server that SIGTERM, Ctrl-C or another thread ends cleanly."""

    def __init__(self, app: Any, max_seconds: float) -> None:
        """Prepares; starts nothing yet.

        Args:
          app: ASGI application.
          max_seconds: most seconds that running requests have to end.
        """
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            backlog=_BACKLOG,
            timeout_graceful_shutdown=int(max_seconds) + 1,
        )
        self._server = uvicorn.Server(config)

    def run(self, bound: socket.socket) -> None:
        """Answers requests until it is told to stop."""
        allow_open_files()
        with _signals_end_quietly():
            self._server.run([bound])

    def stop(self) -> None:
        """Ends `run`, from any thread."""
        self._server.should_exit = True


@contextlib.contextmanager
def _signals_end_quietly() -> Any:
    # Once it has stopped, uvicorn raises the signal again for the earlier handler: nothing here needs it any more.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignore: Callable[[int, Any], None] = lambda number, frame: None  # noqa: E731
    previous = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def allow_open_files() -> None:
    """Raises the limit of open files: each connection is one, and many systems allow 1,024 unless asked for more."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
