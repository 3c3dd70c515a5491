"""Clients that mean the service harm, on loopback: `python -m benchmarks.hostile_clients PORT SECONDS`.

They end by themselves after the seconds, and print as JSON what they got: counts of statuses by kind (0 where the
connection ended without an answer), answers that were not expected, and the bytes that the service let them send.
"""

import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

HOST = "127.0.0.1"
_IDLE, _SLOW, _ENDLESS = 2000, 50, 8
_PAUSE = 0.1  # seconds between two requests of a kind
_PIECE = b"x" * 65536


def request(path: str, body: bytes = b"", *lines: str, host: str = HOST, method: str = "POST") -> bytes:
    """A request as it is sent, which is to end after the answer."""
    given = [f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([f"{method} /api/{path} HTTP/1.1", *given, *lines, "", ""]).encode() + body


def _query(**fields: object) -> bytes:
    return json.dumps({"query": "a man plays music"} | fields).encode()


_HEAD = f"POST /api/encode HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n".encode()
_MANY = json.dumps({"sentences": ["a"] * 100_000}).encode()

REQUESTS: dict[str, tuple[bytes, set[int]]] = {
    "another host": (request("search", _query(), host="evil.example"), {400}),
    "a name here": (request("search", _query(), host="127.0.0.1.evil.example:8000"), {400}),
    "another site": (request("search", _query(), "Origin: https://evil.example"), {403}),
    "deep JSON": (request("search", b"[" * 1_000_000), {400, 422}),
    "deep objects": (request("search", b'{"query":' * 100_000), {400, 422}),
    "a huge top_k": (request("search", _query(top_k=2**62)), {422}),
    "more digits": (request("search", b'{"query": "a", "top_k": ' + b"9" * 100_000 + b"}"), {400, 422}),
    "a huge batch": (request("encode", _MANY), {422}),
    "a long text": (request("search", _query(query="a" * 900_000)), {422}),
    "no number": (request("search", b'{"query": "a", "threshold": NaN}'), {422}),
    "infinity": (request("search", b'{"query": "a", "threshold": Infinity}'), {422}),
    "half a character": (request("search", b'{"query": "\\ud800"}'), {422}),
    "many fields": (request("search", json.dumps(dict.fromkeys(map(str, range(50_000)))).encode()), {422}),
    "too large": (request("encode", b" " * 2**21), {413}),
    "tiny pieces": (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000, {400}),
    "two lengths": (_HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", {400}),
    "garbage": (bytes(range(256)) * 20 + b"\r\n\r\n", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n", {400}),
    "large headers": (_HEAD + b"X: " + b"y" * 100_000, {400}),
    "a websocket": (request("health", b"", "Upgrade: websocket", "Connection: Upgrade", method="GET"), {200}),
    "a path": (request("../../../etc/passwd", method="GET"), {404}),
    "many at once": (request("health", method="GET").replace(b"close", b"keep-alive") * 100, {200}),
}
"""By kind, what is sent and the statuses that may come back."""


class Clients:
    """All of them, and what they got."""

    def __init__(self, port: int, seconds: float) -> None:
        """Nothing is sent yet."""
        self.port, self.end = port, asyncio.get_running_loop().time() + seconds
        self.got: dict[str, Counter[int]] = {}
        self.unexpected: Counter[str] = Counter()
        self.longest = 0  # bytes sent of one endless body

    def left(self) -> float:
        """Seconds left."""
        return max(0.0, self.end - asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Runs until the end."""
        loops = [self.again(name, partial(self.ask, name)) for name in REQUESTS]
        loops += [self.again("idle", self.idle, _PAUSE * 10) for _ in range(_IDLE)]
        loops += [self.again("slow headers", lambda: self.trickle(b"GET / HTTP/1.1\r\nX: ")) for _ in range(_SLOW)]
        slow_body = _HEAD + b"Content-Length: 1000000\r\n\r\n{"
        loops += [self.again("slow bodies", lambda: self.trickle(slow_body)) for _ in range(_SLOW)]
        for how in (b"Transfer-Encoding: chunked", b"Content-Length: 999999999999"):
            loops += [self.again("endless bodies", partial(self.endless, how)) for _ in range(_ENDLESS // 2)]
        loops.append(self.again("gone", self.gone))
        loops.append(self.again("half closed", self.half_closed))
        loops.append(self.again("never reads", self.never_reads, 2.0))
        await asyncio.gather(*loops)

    async def again(self, name: str, once: Callable[[], Awaitable[int]], pause: float = _PAUSE) -> None:
        """One thing after the other until the end; counts what came back."""
        got = self.got.setdefault(name, Counter())
        await asyncio.sleep(min(self.left(), random.random() * max(1.0, pause)))
        while self.left():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.left()):
                    got[await once()] += 1
                    await asyncio.sleep(pause)

    async def ask(self, name: str) -> int:
        """Sends one of `REQUESTS` and reads the status."""
        sent, expected = REQUESTS[name]
        status = await self.exchange(sent)
        if status not in expected:
            self.unexpected[f"{name}: {status}"] += 1
        return status

    async def exchange(self, sent: bytes, *, half: bool = False) -> int:
        """Status of the answer; 0 where the connection ended without one."""
        answer = b""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(HOST, self.port)
            try:
                writer.write(sent)
                if half:
                    writer.write_eof()
                answer = await reader.read(64)
            finally:
                writer.transport.abort()
        return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0

    async def idle(self) -> int:
        """Holds a connection until the service closes it."""
        return await self.exchange(b"")

    async def trickle(self, first: bytes) -> int:
        """Sends a byte now and then."""
        return await self.send_on(first, b" ", 0.5)

    async def endless(self, how: bytes) -> int:
        """Sends a body without end."""
        piece = b"10000\r\n" + _PIECE + b"\r\n" if b"chunked" in how else _PIECE
        return await self.send_on(_HEAD + how + b"\r\n\r\n", piece, 0.0)

    async def send_on(self, first: bytes, piece: bytes, pause: float) -> int:
        """Sends pieces until the service ends the connection; reads the status where there is one."""
        answer, sent = b"", 0
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(HOST, self.port)
            try:
                writer.write(first)
                while not reader.at_eof() and not writer.transport.is_closing():
                    writer.write(piece)
                    await writer.drain()
                    sent += len(piece)
                    await asyncio.sleep(pause)
            finally:
                self.longest = max(self.longest, sent)
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(0.1):
                        answer = await reader.read(64)
                writer.transport.abort()
        return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0

    async def gone(self) -> int:
        """Asks and goes."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, self.port)
            writer.write(request("search", _query()))
            await writer.drain()
            writer.transport.abort()
        return 0

    async def half_closed(self) -> int:
        """Sends half a request and says that nothing more will come."""
        return await self.exchange(_HEAD + b"Content-Length: 10\r\n\r\n{", half=True)

    async def never_reads(self) -> int:
        """Asks for many vectors and takes none."""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(HOST, self.port, limit=1024)
            del reader
            try:
                body = json.dumps({"sentences": [f"sentence {number}" for number in range(64)]}).encode()
                writer.write(request("encode", body))
                await asyncio.sleep(5)
            finally:
                writer.transport.abort()
        return 0


async def main(port: int, seconds: float) -> None:
    """Runs the clients and prints what they got."""
    clients = Clients(port, seconds)
    await clients.run()
    got = {name: dict(sorted(statuses.items())) for name, statuses in clients.got.items()}
    print(json.dumps({"got": got, "unexpected": clients.unexpected, "longest": clients.longest}))


if __name__ == "__main__":
    from simcse_jax.runtime.open_files import allow_open_files

    allow_open_files()
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
