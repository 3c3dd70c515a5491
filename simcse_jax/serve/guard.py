"""The guard around every request: where it comes from, its body's size and time, headers for browsers."""

import asyncio
import contextlib
import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # The page runs its own scripts and asks its own server, nothing else; no text becomes markup; no other site may
    # frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_SMALL = 2**14  # bytes of a body that is read however much else arrives
_BODIES = 64  # most large bodies at a time, in sizes of the largest
_DISCARDED = 16  # most that is read of a refused body, in sizes of the largest, so that its client reads the answer
_DISCARD_SECONDS = 2.0
_PAUSE = 0.01  # between two pieces that are thrown away: endless bodies take no time from other requests


class Guard:
    """ASGI middleware that checks requests and adds headers to answers."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], max_body: int, max_seconds: float) -> None:
        """Wraps an application.

        Args:
          app: the application to guard.
          hosts: names that a request's Host may have, port aside; "*" for any.
          max_body: most bytes of a request's body.
          max_seconds: most seconds for the body to arrive.
        """
        self.app, self.hosts, self.max_body, self.max_seconds = app, hosts, max_body, max_seconds
        self.held = 0  # bytes of the bodies of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 400, 403, 413, 408 or 503."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Body(self, receive, headers)
        started = ended = False

        async def with_headers(message: Message) -> None:
            nonlocal started, ended
            if message["type"] == "http.response.start":
                started = True
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added.setdefault(name, value)
                if not body.complete:  # otherwise the server would read what is left of it, without an end
                    added["Connection"] = "close"
            else:
                ended = not message.get("more_body", False)
            await send(message)

        async def answer(status: int, said: str) -> None:
            await JSONResponse({"error": said}, status)(scope, receive, with_headers)

        async def gone() -> None:
            await body.arrived.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        if refusal := self._refusal(scope["method"], headers):
            if refusal[0] == 413 and "expect" not in headers:  # a client that expects a word first sends nothing yet
                await body.discard()
            await answer(*refusal)
            return
        if body.complete:
            await self.app(scope, receive, with_headers)
            return
        answering = asyncio.ensure_future(self.app(scope, body.receive, with_headers))
        watching = asyncio.ensure_future(gone())
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
            if ended or answering.done():
                await answering
        except asyncio.CancelledError:  # the server ends
            if not started:
                await answer(503, "the service is stopping")
        finally:
            self.held -= body.size
            answering.cancel()  # its client has gone: nothing need be computed
            watching.cancel()
            await asyncio.wait((answering, watching))

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason where the headers alone say that a request is refused."""
        host = headers.get("host", "").lower()
        if "*" not in self.hosts and re.sub(r":\d*$", "", host) not in self.hosts:
            return 400, f"the Host header must name one of {', '.join(dict.fromkeys(self.hosts))}"
        if method not in ("GET", "HEAD", "OPTIONS"):
            # Browsers say where a request comes from; other clients say nothing.
            site, origin = headers.get("sec-fetch-site"), headers.get("origin")
            foreign = origin is not None and origin.partition("://")[2].lower() != host
            if site not in ("same-origin", "none") if site else foreign:
                return 403, "pages of other sites may not use this service"
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body:
            return 413, self.too_large()
        return None

    def too_large(self) -> str:
        """What is said of a body that is too large."""
        return f"the request's body is larger than {self.max_body:,} bytes: send fewer or shorter sentences at a time"


class _Body:
    """A request's body on its way, within the guard's bounds."""

    def __init__(self, guard: Guard, receive: Receive, headers: Headers) -> None:
        self._guard, self._receive = guard, receive
        self._deadline = asyncio.get_running_loop().time() + guard.max_seconds
        self.complete = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self.arrived = asyncio.Event()
        self.size = 0

    async def receive(self) -> Message:
        """The next message.

        Raises:
          HTTPException: the body is late (408), too large (413), or beyond what is held of all bodies (503).
        """
        if self.complete:  # the next message says that the client has gone
            return await self._receive()
        guard = self._guard
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the request took longer than {guard.max_seconds:g} s to arrive") from None
        size = len(message.get("body", b""))
        self.size += size
        guard.held += size
        self._note(message)
        if self.size > guard.max_body:
            await self.discard()
            raise HTTPException(413, guard.too_large())
        if self.size > _SMALL and guard.held > _BODIES * guard.max_body:
            raise HTTPException(503, "too many requests arrive at once: ask again in a moment", {"Retry-After": "1"})
        return message

    async def discard(self) -> None:
        """Throws away what is left, within bounds: a client that is still sending does not read the answer."""
        left = _DISCARDED * self._guard.max_body
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while left > 0 and not self.complete:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self._note(message)
                    await asyncio.sleep(_PAUSE)

    def _note(self, message: Message) -> None:
        if not message.get("more_body", False):
            self.complete = True
            self.arrived.set()
