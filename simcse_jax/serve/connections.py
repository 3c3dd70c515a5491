"""Connections of the server: none may keep it waiting for long, and all together take bounded memory."""

import asyncio
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_UNSENT = 2**28  # most bytes of answers that wait for slow clients, all together
_PIECES = 1024  # pieces of a body of any size; beyond them, they must be large enough
_PIECE = 64  # bytes, on average
_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Crowd:
    """All connections of a server, the one that has kept it waiting for longest first."""

    def __init__(self, most: int, max_wait: float, max_seconds: float) -> None:
        """Nobody yet.

        Args:
          most: most connections; for one more, the one that has kept the server waiting for longest is closed.
          max_wait: most seconds for a request's headers to arrive, from the connection or the answer before.
          max_seconds: most seconds for a client to take its answer.
        """
        self.most = most
        self.seconds = {"headers": max_wait, "answer": max_seconds}
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}
        self.protocol = partial(Connection, self)

    def enter(self, connection: "Connection") -> None:
        """Takes a connection in."""
        self.open.add(connection)
        while len(self.open) > self.most and self.waiting:
            self._close(next(iter(self.waiting)))

    def leave(self, connection: "Connection") -> None:
        """Forgets a connection."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)

    def disperse(self, *, all_of_it: bool) -> None:
        """Closes all connections, or those of which a request has yet to arrive."""
        for connection in list(self.open if all_of_it else self.waiting):
            if all_of_it or connection.asks:
                self._close(connection)

    def spare_memory(self) -> None:
        """Closes those that do not take their answers, where too much waits for them; never the latest."""
        slow = [connection for connection in self.waiting if connection.flow.write_paused]
        unsent = {connection: connection.transport.get_write_buffer_size() for connection in slow}
        left = sum(unsent.values())
        for connection in slow[:-1]:
            if left <= _UNSENT:
                return
            left -= unsent[connection]
            self._close(connection)

    def _close(self, connection: "Connection") -> None:
        self.leave(connection)
        connection.transport.abort()


class Connection(H11Protocol):
    """A connection to a client, which has a limited time for each thing that the server waits for."""

    def __init__(self, crowd: Crowd, **given: Any) -> None:
        """Belongs to a crowd; the rest is given by uvicorn."""
        super().__init__(**given)
        self._crowd = crowd
        self._timer: asyncio.TimerHandle | None = None
        self._awaited: tuple[str | None, object] = (None, None)
        self._parse, self.conn.next_event = self.conn.next_event, self._next_event  # type: ignore[method-assign]
        self._pieces = self._bytes = 0

    @property
    def asks(self) -> bool:
        """Whether the server waits for a request, or for the rest of it."""
        return self._awaited[0] in ("headers", "body")

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._look()
        self._crowd.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._set_timer(None)
        self._crowd.leave(self)

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer is ready to be taken."""
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """The client takes its answer more slowly than it is made."""
        super().pause_writing()
        self._look()
        self._crowd.spare_memory()

    def resume_writing(self) -> None:
        """The client has taken most of its answer."""
        super().resume_writing()
        self._look()

    def timeout_keep_alive_handler(self) -> None:
        """The client has not asked again."""
        super().timeout_keep_alive_handler()
        self._look()

    def _look(self) -> None:
        """Notes what the server waits for, and since when."""
        what: str | None
        if self.transport.is_closing() or self.flow.write_paused:
            what = "answer"
        elif self.cycle is None or self.cycle.response_complete:
            what = "headers"
        else:  # `Guard` ends a body that takes long
            what = "body" if self.cycle.more_body else None
        if (what, self.cycle) == self._awaited:
            return
        self._awaited = what, self.cycle
        self._crowd.waiting.pop(self, None)
        if what:
            self._crowd.waiting[self] = None
        self._set_timer(self._crowd.seconds.get(what) if what else None)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self._awaited[0] == "answer":
            self.transport.abort()
            return
        if self.conn.trailing_data[0]:
            self.transport.write(_LATE)
        self.transport.close()
        self._look()

    def _next_event(self) -> Any:
        """The parser's next event; refuses bodies in tiny pieces, of which each takes as long as a large one."""
        event = self._parse()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > _PIECES + self._bytes / _PIECE:
                raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event
