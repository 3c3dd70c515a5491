"""The guard around every request: its host name, the size of its body, its time to arrive, headers for browsers."""

import asyncio
import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # The page runs its own scripts and asks its own server, nothing else; no other site may frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 400, 413 or 408."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        size, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.max_seconds

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:  # the next message says that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request took longer than {self.max_seconds:g} s to arrive") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.max_body:
                raise HTTPException(413, self._too_large())
            return message

        host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).lower()
        if "*" not in self.hosts and host not in self.hosts:
            said = f"the Host header must name one of {', '.join(dict.fromkeys(self.hosts))}"
            await JSONResponse({"error": said}, 400)(scope, receive, with_headers)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_body:
            await JSONResponse({"error": self._too_large()}, 413)(scope, receive, with_headers)
            return
        await self.app(scope, bounded, with_headers)

    def _too_large(self) -> str:
        return f"the request's body is larger than {self.max_body:,} bytes: send fewer or shorter sentences at a time"
