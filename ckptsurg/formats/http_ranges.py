"""Objects over HTTP. Each answer is checked: that it is the range that was asked for, and of the same object.

The session is fsspec's, with whatever is configured for it; its own reader of files takes what a server sends.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from fsspec.asyn import sync

from ..errors import CheckpointError, CkptsurgError, SystemFailure, UsageError
from ..urls import URL, redacted
from .ranges import HEAD_BYTES, Absent, Denied, Stored, Traffic, Version, changed

__all__ = ["HTTP"]

#: How long is waited before something is asked for again, in seconds.
_WAITS = (0.2, 1.0)
_PASSING = frozenset((408, 429, 500, 502, 503, 504))
_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})")
_CHUNK = 1 << 20
_PARTIAL, _WHOLE, _CHANGED, _NOT_THAT_LONG = 206, 200, 412, 416


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server says; the body of what was asked for alone, and no more than that."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


class HTTP:
    """Objects over HTTP.

    Args:
        filesystem: Of fsspec.
        traffic: Told what is fetched.
    """

    def __init__(self, filesystem: Any, traffic: Traffic) -> None:
        self._filesystem, self._traffic = filesystem, traffic

    def document(self, url: URL, limit: int) -> bytes:
        answer = self.ask(url, None, limit + 1)
        if answer.status != _WHOLE:
            raise _refusal(answer, url)
        if len(answer.body) > limit:
            raise CheckpointError(f"{url}: is larger than {limit:,} bytes")
        return answer.body

    def open(self, url: URL) -> tuple[Stored, bytes]:
        answer = self.ask(url, (0, HEAD_BYTES), HEAD_BYTES)
        stored = _Object(self, url, _version(answer, url))
        return stored, stored.checked(answer, 0, min(HEAD_BYTES, stored.version.size))

    def ask(self, url: URL, span: tuple[int, int] | None, most: int) -> _Answer:
        """Ask for an object, or for its bytes from one to before another; again, where that may help.

        Args:
            url: Of the object.
            span: The range.
            most: How many bytes of an answer are read.

        Raises:
            UsageError: if it is no URL.
            SystemFailure: if no answer comes.
        """
        for wait in (*_WAITS, None):
            try:
                answer: _Answer = sync(self._filesystem.loop, self._answer, url.secret, span, most)
            except (aiohttp.InvalidURL, ValueError):
                raise UsageError(f"{url}: is no URL") from None
            except asyncio.TimeoutError:  # noqa: UP041 - fsspec's is one of these, in any version
                said = "the server does not answer in time"
            except (aiohttp.ClientError, OSError) as failure:
                said = f"the connection failed: {redacted(failure) or type(failure).__name__}"
            else:
                if answer.status not in _PASSING:
                    return answer
                said = f"the server answers {answer.status} {redacted(answer.reason)}"
            if wait is not None:
                time.sleep(wait)
        raise SystemFailure(f"{url}: cannot be fetched: {said}")

    async def _answer(self, url: str, span: tuple[int, int] | None, most: int) -> _Answer:
        session = await self._filesystem.set_session()
        options = dict(self._filesystem.kwargs)
        # Of what is packed for the way, ranges would be others.
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        self._traffic.ask()
        async with session.get(self._filesystem.encode_url(url), headers=headers, **options) as response:
            body = b""
            if response.status == (_WHOLE if span is None else _PARTIAL):
                body = await self._body(response.content, most)
            if not response.content.at_eof():
                response.close()  # what is not wanted is not read
            return _Answer(response.status, response.reason or "", response.headers, body)

    async def _body(self, content: aiohttp.StreamReader, most: int) -> bytes:
        body = bytearray()
        while len(body) < most and (chunk := await content.read(min(_CHUNK, most - len(body)))):
            self._traffic.receive(len(chunk))
            body += chunk
        return bytes(body)


class _Object:
    """An object of which every answer says which one it is."""

    def __init__(self, store: HTTP, url: URL, version: Version) -> None:
        self._store, self._url, self.version = store, url, version

    def fetch(self, start: int, stop: int) -> bytes:
        return self.checked(self._store.ask(self._url, (start, stop), stop - start), start, stop)

    def checked(self, answer: _Answer, start: int, stop: int) -> bytes:
        """The bytes of an answer, if they are those from one to before another of this object."""
        if answer.status in (_CHANGED, _NOT_THAT_LONG) and start < stop:
            raise changed(str(self._url))
        if _version(answer, self._url) != self.version:
            raise changed(str(self._url))
        if start == stop:
            return b""
        first, last, _ = _range(answer) or (0, -1, 0)
        if (first, last + 1, len(answer.body)) != (start, stop, stop - start):
            found = f"{len(answer.body):,} bytes and calls them {first:,}-{last:,}"
            raise SystemFailure(f"{self._url}: asked for the bytes {start:,}-{stop - 1:,}, the server sends {found}")
        return answer.body

    def refuse_if_changed(self) -> None:
        if self.version.size:
            self.fetch(0, 1)

    def conclude(self) -> None:
        pass  # every answer was checked

    def close(self) -> None:
        pass  # the session is the store's


def _version(answer: _Answer, url: URL) -> Version:
    """Which object an answer is about."""
    is_empty = answer.status == _NOT_THAT_LONG or answer.headers.get("Content-Length") == "0"
    if answer.status not in (_PARTIAL, _NOT_THAT_LONG) and not (answer.status == _WHOLE and is_empty):
        raise _refusal(answer, url)
    found = _range(answer)
    if found is None and not is_empty:
        raise SystemFailure(f"{url}: the server sends a part, and does not say of how many bytes")
    tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return Version(found[2] if found else 0, tag)


def _range(answer: _Answer) -> tuple[int, int, int] | None:
    """The first and last byte of an answer, and the size of the object; None if it does not say."""
    match = _RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    return None if match is None else (int(match[1] or 0), int(match[2] or -1), int(match[3]))


def _refusal(answer: _Answer, url: URL) -> CkptsurgError:
    """What to raise of an answer that is not what was asked for."""
    status = f"{answer.status} {redacted(answer.reason)}"
    if answer.status in (404, 410):
        return Absent(f"{url}: no such file")
    if answer.status in (401, 403, 407):
        hint = "the server wants credentials, or a signature that has not run out; or there is no such file"
        return Denied(f"{url}: access is denied ({status})", hint=hint)
    if answer.status == _WHOLE:
        return UsageError(
            f"{url}: the server sends the whole file where a part of it is asked for, which is not read",
            hint="download it, and give its path",
        )
    return SystemFailure(f"{url}: cannot be fetched: the server answers {status}")
