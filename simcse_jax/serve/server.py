"""The application on a socket, until SIGTERM or Ctrl-C."""

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from simcse_jax.errors import InputError, reason
from simcse_jax.reports.progress import note, say
from simcse_jax.runtime.open_files import allow_open_files
from simcse_jax.serve.connections import Crowd
from simcse_jax.serve.limits import Limits
from simcse_jax.serve.log import config as config_of_log

_BACKLOG = 2048  # most connections that wait to be accepted
_OTHER_FILES = 128  # open files besides connections, at most
_SWITCH = 0.0005  # seconds


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

    def __init__(self, app: Any, limits: Limits) -> None:
        """Prepares; starts nothing yet.

        Args:
          app: ASGI application.
          limits: bounds of connections, and of the time to stop in.
        """
        files = allow_open_files()
        # A burst of connections is accepted before the first of them is seen.
        backlog = min(_BACKLOG, files // 4)
        most = min(limits.max_connections, max(1, files - backlog - min(_OTHER_FILES, files // 2)))
        crowd = Crowd(most, limits.max_wait, limits.max_seconds)
        config = uvicorn.Config(
            app,
            http=crowd.protocol,  # type: ignore[arg-type]  # makes protocols
            log_config=config_of_log(),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            backlog=backlog,
            timeout_graceful_shutdown=0.8 * limits.max_stop,  # type: ignore[arg-type]  # goes to asyncio.wait_for
        )
        self._server = _Stopping(config, crowd, limits.max_stop)

    def run(self, bound: socket.socket) -> None:
        """Answers requests until it is told to stop."""
        switch = sys.getswitchinterval()
        # Otherwise the model's thread waits 5 ms for each of its steps in Python while connections are busy.
        sys.setswitchinterval(_SWITCH)
        try:
            with _signals_end_quietly():
                self._server.run([bound])
        finally:
            self._server.last.cancel()
            sys.setswitchinterval(switch)

    def stop(self) -> None:
        """Ends `run`, from any thread."""
        self._server.should_exit = True


class _Stopping(uvicorn.Server):
    """Ends within a time once a signal tells it to; a second signal ends it without waiting for requests."""

    def __init__(self, config: uvicorn.Config, crowd: Crowd, max_stop: float) -> None:
        super().__init__(config)
        self._crowd = crowd
        self.last = threading.Timer(max_stop, leave)
        self.last.daemon = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called for each signal."""
        if self.should_exit:
            self.force_exit = True
        else:
            self.last.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what runs, and then what clients keep open: no loop closes while something waits to be sent."""
        self._crowd.disperse(all_of_it=False)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the application running then
            await self.lifespan.shutdown()
        self._crowd.disperse(all_of_it=True)
        await asyncio.sleep(0.05)


def leave() -> None:
    """Ends the process, with status 0, though a call of the model goes on: no thread can be ended from outside."""
    note("a call of the model went on and was left")
    say("stopped")
    sys.stdout.flush()
    os._exit(0)


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
