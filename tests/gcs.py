"""Google Cloud Storage on loopback: as much of its JSON API as gcsfs, tensorstore and orbax speak, in memory.

Writes are checked against `ifGenerationMatch`, as atomicity depends on it, and can be watched or cut short.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
_MOVE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)")
_OBJECTS = re.compile(r"/storage/v1/b/([^/]+)/o")
_UPLOAD = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)")


@dataclass
class Store:
    """The content of the store, `objects`: the bytes and the generation of each, by BUCKET/NAME."""

    url: str = ""
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    on_write: Callable[[str], None] = lambda when: None
    """Called with "body", half-way through the body of a write, with "object", before the object is there, and with
    "answer", when it is; an `OSError` closes the connection without an answer."""
    page: int = 20
    """The most objects in one answer to a listing."""
    forbids: Callable[[str], bool] = lambda name: False
    """Whether BUCKET/NAME, or what begins so, may not be read."""
    protects: Callable[[str], bool] = lambda name: False
    """Whether BUCKET/NAME may not be written."""
    written: dict[str, str] = field(default_factory=dict)
    """When objects were written, by BUCKET/NAME; the others have just been."""

    def names(self, below: str) -> list[str]:
        """The names of the objects below BUCKET/FOLDER, without it."""
        return sorted(name.removeprefix(f"{below}/") for name in self.objects if name.startswith(f"{below}/"))

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which gcsfs, Google's client and tensorstore find the store."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the bucket's kind by gRPC
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
        }


@contextmanager
def serve() -> Iterator[Store]:
    """A store with every bucket, while the block runs."""
    store, lock = Store(), threading.Lock()
    generations = itertools.count(1)
    uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._take()
            if found := _OBJECT.fullmatch(self.path):
                self._read(f"{found[1]}/{unquote(found[2])}")
            elif found := _OBJECTS.fullmatch(self.path):
                self._list(found[1])
            elif found := _BUCKET.fullmatch(self.path):
                self._say({"kind": "storage#bucket", "name": found[1], "id": found[1], "location": "US"})
            else:
                self._say({}, HTTPStatus.NOT_FOUND)

        def do_DELETE(self) -> None:
            self._take()
            found = _OBJECT.fullmatch(self.path)
            name = f"{found[1]}/{unquote(found[2])}" if found else ""
            store.on_write("object")
            with lock:
                if name not in store.objects:
                    return self._say({}, HTTPStatus.NOT_FOUND)
                if not self._matches(name, self.query):
                    return self._say({}, HTTPStatus.PRECONDITION_FAILED)
                del store.objects[name]
            return self._say(None, HTTPStatus.NO_CONTENT)

        def do_POST(self) -> None:
            self._take(writes=True)
            if found := _MOVE.fullmatch(self.path):
                source, name = (f"{found[1]}/{unquote(found[part])}" for part in (2, 3))
                with lock:
                    if source not in store.objects:
                        return self._say({}, HTTPStatus.NOT_FOUND)
                    store.objects[name] = store.objects.pop(source)[0], next(generations)
                return self._say(_about(store, name))
            found = _UPLOAD.fullmatch(self.path)
            if not found:
                return self._say({}, HTTPStatus.NOT_FOUND)
            if "upload_id" in self.query:
                return self._go_on()
            kind, name, body = self.query["uploadType"], self.query.get("name", ""), self.body
            if kind == "multipart":
                message = message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + body)
                about, _ = message.get_payload()
                name = json.loads(about.get_payload())["name"]
                # The parser takes the last newline for its own, and turns no others.
                start = self.body.index(b"\n\n", self.body.index(b"Content-Type", self.body.index(b"\n\n"))) + 2
                body = self.body[start : self.body.rindex(b"\n--")]
            elif kind == "resumable":
                name = name or json.loads(body)["name"]
                identity = str(next(generations))
                uploads[identity] = f"{found[1]}/{name}", dict(self.query), bytearray()
                where = f"{store.url}/upload/storage/v1/b/{found[1]}/o?uploadType=resumable&upload_id={identity}"
                return self._say({}, headers={"Location": where})
            return self._write(f"{found[1]}/{name}", body, self.query)

        def do_PUT(self) -> None:
            self._take(writes=True)
            self._go_on()

        def _go_on(self) -> None:
            """The next part of a resumable upload."""
            name, query, content = uploads[self.query["upload_id"]]
            span = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\d+|\*)", self.headers["Content-Range"])
            assert span
            if span[1]:
                assert int(span[1]) == len(content)
                content += self.body
            if span[3] == "*" or len(content) < int(span[3]):
                headers = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
                return self._say(None, HTTPStatus.PERMANENT_REDIRECT, headers)
            return self._write(name, bytes(content), query)

        def _take(self, writes: bool = False) -> None:
            """Reads the request: `path`, `query` and `body`."""
            parts = urlsplit(self.path)
            self.path = parts.path
            self.query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
            size = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(size // 2)
            if writes:
                store.on_write("body")
            self.body += self.rfile.read(size - len(self.body))
            if len(self.body) < size:
                raise ConnectionError("the client has gone")

        def _matches(self, name: str, query: dict[str, str]) -> bool:
            wanted = query.get("ifGenerationMatch")
            return wanted is None or int(wanted) == (store.objects[name][1] if name in store.objects else 0)

        def _write(self, name: str, body: bytes, query: dict[str, str]) -> None:
            store.on_write("object")
            if store.protects(name):
                return self._say({"error": {"message": "no access"}}, HTTPStatus.FORBIDDEN)
            with lock:
                if not self._matches(name, query):
                    return self._say({}, HTTPStatus.PRECONDITION_FAILED)
                store.objects[name] = bytes(body), next(generations)
            store.on_write("answer")
            return self._say(_about(store, name))

        def _read(self, name: str) -> None:
            if store.forbids(name):
                return self._say({"error": {"message": "no access"}}, HTTPStatus.FORBIDDEN)
            if name not in store.objects:
                return self._say({}, HTTPStatus.NOT_FOUND)
            content, generation = store.objects[name]
            if self.query.get("ifGenerationNotMatch") == str(generation):
                return self._say(None, HTTPStatus.NOT_MODIFIED)
            if not self._matches(name, self.query) or self.query.get("generation", str(generation)) != str(generation):
                return self._say({}, HTTPStatus.PRECONDITION_FAILED)
            if self.query.get("alt") != "media":
                return self._say(_about(store, name))
            headers, status = {"x-goog-generation": str(generation)}, HTTPStatus.OK
            if span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
                size = len(content)
                first = int(span[1]) if span[1] else max(0, size - int(span[2]))
                last = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
                if first >= size:
                    return self._say(None, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                content, status = content[first : last + 1], HTTPStatus.PARTIAL_CONTENT
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            return self._say(content, status, headers)

        def _list(self, bucket: str) -> None:
            prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
            if store.forbids(f"{bucket}/{prefix}"):
                return self._say({"error": {"message": "no access"}}, HTTPStatus.FORBIDDEN)
            after, start, end = (self.query.get(key, "") for key in ("pageToken", "startOffset", "endOffset"))
            most = min(int(self.query.get("maxResults", store.page)), store.page)
            entries: dict[str, Any] = {}
            with lock:
                for full in sorted(store.objects):
                    name = full.removeprefix(f"{bucket}/")
                    if name == full or not name.startswith(prefix) or name < start or (end and name >= end):
                        continue
                    cut = name.find(delimiter, len(prefix)) if delimiter else -1
                    key = name if cut < 0 else name[: cut + len(delimiter)]
                    if key > after:
                        entries.setdefault(key, None if cut >= 0 else _about(store, full))
            shown = list(entries)[:most]
            answer: dict[str, Any] = {"kind": "storage#objects"}
            answer["items"] = [entries[key] for key in shown if entries[key]]
            answer["prefixes"] = [key for key in shown if not entries[key]]
            if len(entries) > most:
                answer["nextPageToken"] = shown[-1]
            return self._say({key: value for key, value in answer.items() if value})

        def _say(self, answer: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
            body = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
            for key, value in {"Content-Type": kind, **(headers or {})}.items():
                self.send_header(key, value)
            if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *given: Any) -> None:  # a client was killed
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        store.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield store
        server.shutdown()


def _about(store: Store, name: str) -> dict[str, Any]:
    content, generation = store.objects[name]
    bucket, key = name.split("/", 1)
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": key,
        "size": str(len(content)),
        "generation": str(generation),
        "metageneration": "1",
        "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        "updated": store.written.get(name, f"{datetime.now(UTC).isoformat(timespec='milliseconds')[:-6]}Z"),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "contentType": "application/octet-stream",
    }
