"""A server on this machine that has files, counts what it sends, and behaves as servers do."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

RANGE = re.compile(r"bytes=(\d+)-(\d+)")
PIECE = 64 << 10


@dataclass
class Served:
    """What the server has, does and did.

    Attributes:
        files: Content by path, without the slash in front.
        url: Where it is.
        asked: Path and range of each request, the range as its first byte and the one after its last, or None.
        sent: How many bytes of content went out.
        headers: Those of the last request.
        knows_ranges: Whether a range is heeded; else all is sent.
        cuts: How many of the next answers break off in the middle.
        statuses: What the next answers are instead.
        lies: Which headers of an answer are others.
        silent: Whether no answer comes while this is not set.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    asked: list[tuple[str, tuple[int, int] | None]] = field(default_factory=list)
    sent: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    knows_ranges: bool = True
    cuts: int = 0
    statuses: list[int] = field(default_factory=list)
    lies: dict[str, str] = field(default_factory=dict)
    silent: threading.Event | None = None

    def of(self, path: str) -> list[tuple[int, int] | None]:
        """The ranges of a path that were asked for."""
        return [span for asked, span in self.asked if asked == path]


def answer(served: Served, request: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(request.path).path).lstrip("/")
    match = RANGE.fullmatch(request.headers.get("Range", ""))
    served.asked.append((path, (int(match[1]), int(match[2]) + 1) if match else None))
    served.headers = dict(request.headers)
    if served.silent is not None:
        served.silent.wait()
    status = served.statuses.pop(0) if served.statuses else 200 if path in served.files else 404
    if status != 200:
        request.send_response(status)
        for name, value in {"Content-Length": "0", **served.lies}.items():
            request.send_header(name, value)
        request.end_headers()
        return
    content = served.files[path]
    said = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
    body = content
    if match and served.knows_ranges:
        start, stop = int(match[1]), min(int(match[2]) + 1, len(content))
        status, body = (206, content[start:stop]) if start < stop else (416, b"")
        said["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}" if body else f"bytes */{len(content)}"
    request.send_response(status)
    for name, value in {**said, "Content-Length": str(len(body)), **served.lies}.items():
        request.send_header(name, value)
    request.end_headers()
    if served.cuts:
        served.cuts -= 1
        body, request.close_connection = body[: len(body) // 2], True
    view = memoryview(body)
    for start in range(0, len(body), PIECE):
        piece = view[start : start + PIECE]
        served.sent += len(piece)  # before whoever asked can have it
        try:
            request.wfile.write(piece)
        except OSError:  # who went away
            request.close_connection = True
            return


@contextmanager
def serving(**behaviour: Any) -> Iterator[Served]:
    served = Served(**behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(served, self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        if served.silent is not None:
            served.silent.set()
        server.shutdown()
        server.server_close()
        thread.join()
