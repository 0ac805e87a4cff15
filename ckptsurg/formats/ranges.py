"""Objects on other machines, of which ranges of bytes are fetched: what all of them have in common, and fsspec's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from ..errors import CheckpointError, CkptsurgError, SystemFailure, UsageError
from ..urls import URL, redacted
from ..wording import counted, shown, size

__all__ = ["HEAD_BYTES", "Absent", "Denied", "Fsspec", "Store", "Stored", "Traffic", "Version", "changed"]

#: How much of an object is fetched at first, in bytes: the headers of some 1,000 tensors are so long. A longer one
#: takes a second request.
HEAD_BYTES = 128 << 10

_log = logging.getLogger("ckptsurg")


class Absent(UsageError):
    """There is no such object."""


class Denied(SystemFailure):
    """There may be one, and it may not be read; of what is not there some servers say no more."""


def changed(label: str) -> CheckpointError:
    """What to raise where an object is another one by now."""
    return CheckpointError(f"{label}: was changed while it was read", hint="read it again once it stays as it is")


class Traffic:
    """Counts what is fetched of a checkpoint, in any thread, and says so once all its files are closed.

    Attributes:
        requests: How often something was asked for.
        fetched: How many bytes came.
    """

    def __init__(self) -> None:
        self.requests = self.fetched = 0
        self._lock = Lock()
        self._open = self._total = 0
        self._label = ""

    def ask(self) -> None:
        with self._lock:
            self.requests += 1

    def receive(self, count: int) -> None:
        with self._lock:
            self.fetched += count

    def begin(self, label: str, sizes: list[int]) -> None:
        """All files of a checkpoint are open; their sizes in bytes."""
        self._label, self._open, self._total = label, len(sizes), sum(sizes)

    def leave(self) -> None:
        """A file was closed."""
        self._open -= 1
        if self._open == 0:
            amounts = f"{size(self.fetched)} of {size(self._total)} in {counted(self.requests, 'request')}"
            _log.info("%s: fetched %s", self._label, amounts)


@dataclass(frozen=True, slots=True)
class Version:
    """What tells an object from another that has its place.

    Attributes:
        size: In bytes.
        tag: What the server says besides; empty if nothing.
    """

    size: int
    tag: str


class Stored(Protocol):
    """An object that was found. It may be read from any thread.

    Attributes:
        version: Which one it is.
    """

    version: Version

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes from one to before another, which it has.

        Raises:
            CheckpointError: if it is another one by now.
            SystemFailure: if they cannot be fetched.
        """

    def refuse_if_changed(self) -> None:
        """Ask which one it is, and raise CheckpointError if it is another one by now."""

    def conclude(self) -> None:
        """Likewise, where the answers so far may have been of several."""

    def close(self) -> None: ...


class Store(Protocol):
    """Where objects are."""

    def document(self, url: URL, limit: int) -> bytes:
        """All bytes of a small object.

        Raises:
            Absent, Denied: if there is none, or it may not be read.
            CheckpointError: if it is larger than ``limit`` bytes.
            SystemFailure: if it cannot be fetched.
        """

    def open(self, url: URL) -> tuple[Stored, bytes]:
        """An object, and its first bytes.

        Raises:
            Absent, Denied: if there is none, or it may not be read.
            UsageError: if no range of it can be had.
            SystemFailure: if it cannot be fetched.
        """


# --- fsspec ------------------------------------------------------------------------------------------

#: Under which names file systems say which version of an object there is.
_TAGS = (
    "ETag", "etag", "e_tag", "LastModified", "last_modified", "mtime", "updated", "created", "generation", "checksum",
    "content_hash", "blob_id", "xet_hash",
)  # fmt: skip


class Fsspec:
    """Objects in a file system of fsspec.

    Args:
        filesystem: The file system; its own caches are of no use, and are emptied.
        traffic: Told what is fetched.
    """

    def __init__(self, filesystem: Any, traffic: Traffic) -> None:
        self.filesystem, self.traffic = filesystem, traffic

    def document(self, url: URL, limit: int) -> bytes:
        stored = _Object(self, url)
        try:
            if stored.version.size > limit:
                raise CheckpointError(f"{url}: is larger than {limit:,} bytes")
            return stored.fetch(0, stored.version.size)
        finally:
            stored.close()

    def open(self, url: URL) -> tuple[Stored, bytes]:
        stored = _Object(self, url)
        try:
            return stored, stored.fetch(0, min(stored.version.size, HEAD_BYTES))
        except BaseException:
            stored.close()
            raise


class _Object:
    """An object; each thread that reads it at a time has a handle of its own."""

    def __init__(self, store: Fsspec, url: URL) -> None:
        self._store, self._label = store, str(url)
        self._path = store.filesystem._strip_protocol(url.secret)
        self._lock = Lock()
        self._reads = 0
        with _failures(self._label):
            handle, self.version = self._opened()
        self._idle = [handle]

    def fetch(self, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        with _failures(self._label):
            handle = self._taken()
            try:
                self._store.traffic.ask()
                data = self._read(handle, start, stop)
                if len(data) != stop - start:
                    raise EOFError(f"expected {stop - start:,} bytes, found {len(data):,}")
            except Exception:
                handle.close()
                self.refuse_if_changed()
                raise
        with self._lock:
            self._idle.append(handle)
            self._reads += 1
        return data

    def refuse_if_changed(self) -> None:
        filesystem = self._store.filesystem
        filesystem.invalidate_cache()
        self._store.traffic.ask()
        with _failures(self._label):
            try:
                version = _version(filesystem.info(self._path))
            except FileNotFoundError:
                raise changed(self._label) from None
            if version != self.version:
                raise changed(self._label)

    def conclude(self) -> None:
        if self._reads > 1:  # what one read gave is of one version, and its header fits the size
            self.refuse_if_changed()

    def close(self) -> None:
        for handle in self._idle:
            handle.close()

    def _read(self, handle: Any, start: int, stop: int) -> bytes:
        handle.seek(start)
        data = b""
        while len(data) < stop - start and (part := handle.read(stop - start - len(data))):
            self._store.traffic.receive(len(part))
            data = data + part if data else bytes(part)
        return data

    def _taken(self) -> Any:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        handle, version = self._opened()
        if version != self.version:
            handle.close()
            raise changed(self._label)
        return handle

    def _opened(self) -> tuple[Any, Version]:
        filesystem = self._store.filesystem
        self._store.traffic.ask()
        handle = filesystem.open(self._path, "rb", cache_type="none")  # what was not asked for is not fetched
        details = getattr(handle, "details", None)
        return handle, _version(details if isinstance(details, Mapping) else filesystem.info(self._path))


def _version(details: Mapping[str, Any]) -> Version:
    if details.get("type") == "directory":
        raise IsADirectoryError
    return Version(int(details["size"]), " ".join(str(details[key]) for key in _TAGS if details.get(key) is not None))


@contextmanager
def _failures(label: str) -> Iterator[None]:
    """What any file system raises, as errors of ours. What it says may hold URLs with signatures."""
    try:
        yield
    except CkptsurgError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Absent(f"{label}: no such file") from None
    except PermissionError as failure:
        raise Denied(f"{label}: access is denied{_said(failure)}") from None
    except ImportError as failure:  # a file system may be made of further packages
        name = f" ({shown(failure.name)})" if failure.name else ""
        raise UsageError(f"{label}: needs a package that is not installed{name}") from None
    except Exception as failure:
        raise SystemFailure(f"{label}: cannot be fetched: {type(failure).__name__}{_said(failure)}") from None


def _said(failure: Exception) -> str:
    text = str(failure.strerror or failure) if isinstance(failure, OSError) else str(failure)
    return f": {redacted(text.splitlines()[0])}" if text else ""
