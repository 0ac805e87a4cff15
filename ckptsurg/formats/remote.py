"""A checkpoint in safetensors on another machine: of its files only headers and the ranges that are wanted are fetched.

Whatever fsspec reads may hold it. The headers and the index are checked as those of files here are.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from os import stat_result
from typing import Any

from ..checkpoints import Checkpoint, Index, StoredFile
from ..errors import CheckpointError, UsageError
from ..header import OpenedFile, read_header
from ..tensors import digest_of
from ..urls import URL, redacted
from ..wording import shown
from . import endings
from .endings import INDEX_NAME, SINGLE_NAME
from .indexes import MAX_INDEX_BYTES, ShardIndex, joined, parse_index, two_checkpoints
from .ranges import Absent, Denied, Fsspec, Store, Stored, Traffic

__all__ = ["RemoteFile", "open_remote"]

#: How many shards are opened at a time.
_OPENED_AT_A_TIME = 16
#: Of a shard's name: what no file system reads as anything else, such as a query, a revision or a wildcard.
_PLAIN_NAME = re.compile(r"[\w.,+=~ ()/-]+")
_NOT_READ = (*endings.TORCH, *endings.KERAS, *endings.OTHERS, endings.PART_OF_DISTRIBUTED, ".bin.index.json")
#: What the packages of the extra are for.
_EXTRA = ("hf", "http", "https", "s3", "s3a")
_INSTALL = "pip install 'ckptsurg[remote]'"


@dataclass(frozen=True, slots=True, eq=False)
class RemoteFile(StoredFile):
    """A file of weights on another machine: there is no descriptor, and what is wanted of it is fetched.

    Attributes:
        stored: The object.
        traffic: Told when it is closed.
    """

    stored: Stored
    traffic: Traffic

    @property
    def version(self) -> str:
        return self.stored.version.tag

    def fill(self, view: memoryview, offset: int, label: str) -> None:
        view[:] = self.stored.fetch(offset, offset + len(view))

    def conclude(self) -> None:
        self.stored.conclude()

    def refuse_if_changed(self, label: str) -> None:
        self.stored.refuse_if_changed()

    def close(self) -> None:
        self.stored.close()
        self.traffic.leave()


def open_remote(url: URL) -> Checkpoint:
    """Open a checkpoint on another machine.

    Args:
        url: Of a ``.safetensors`` file, an index, or a folder with ``model.safetensors`` or its index.

    Raises:
        UsageError: if there is none, it is of another format, no range of it can be had, or a package is missing.
        CheckpointError: if it is malformed.
        SystemFailure: if it cannot be fetched.
    """
    if url.name.endswith(_NOT_READ):
        raise UsageError(f"{url}: of what is on another machine only safetensors is read", hint="download it")
    traffic = Traffic()
    store = _store(url, traffic)
    if url.name.endswith(endings.SAFETENSORS):
        opened = _open_file(store, url, url.name, traffic)
        checkpoint = Checkpoint(None, [opened.file], opened.tensors, opened.extents, url=url)
    elif url.name.endswith(".index.json"):
        raw = store.document(url, MAX_INDEX_BYTES)
        checkpoint = _sharded(store, url, raw, url, traffic)
    else:
        checkpoint = _open_folder(store, url, traffic)
    traffic.begin(checkpoint.label, [file.size for file in checkpoint.files])
    return checkpoint


def _open_folder(store: Store, url: URL, traffic: Traffic) -> Checkpoint:
    index, single = url.within(INDEX_NAME), url.within(SINGLE_NAME)
    raw: bytes | None = None
    denied: Denied | None = None
    try:
        raw = store.document(index, MAX_INDEX_BYTES)
    except Absent:
        pass
    except Denied as error:  # which some servers say of what is not there
        denied = error
    try:
        opened = _open_file(store, single, SINGLE_NAME, traffic)
    except (Absent, Denied) as error:
        if raw is not None:
            return _sharded(store, index, raw, url, traffic)
        if isinstance(error, Denied) or denied is not None:
            raise (denied or error) from None
        raise UsageError(
            f"{url}: no checkpoint in this folder: expected {SINGLE_NAME} or {INDEX_NAME}",
            hint="the name of a file of weights ends in .safetensors, that of an index in .index.json",
        ) from None
    if raw is not None:
        opened.file.close()
        raise two_checkpoints(str(url), SINGLE_NAME, INDEX_NAME)
    return Checkpoint(None, [opened.file], opened.tensors, opened.extents, url=url, remote_folder=url)


def _sharded(store: Store, place: URL, raw: bytes, called: URL, traffic: Traffic) -> Checkpoint:
    """A checkpoint by its index.

    Args:
        store: Where it is.
        place: Of the index.
        raw: Its bytes.
        called: What messages call the checkpoint.
        traffic: Told what is fetched.
    """
    index = parse_index(raw, str(place), ".safetensors")
    for name in index.shards:
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f'{place}: the shard name "{shown(name)}" is no plain name in a URL')
    shards = _opened(store, index, place, traffic)
    try:
        files, tensors, extents = joined(index, shards.items())
    except BaseException:
        for shard in shards.values():
            shard.file.close()
        raise
    return Checkpoint(
        None,
        files,
        tensors,
        extents,
        index=Index(place.name, index.metadata),
        warnings=index.warnings(tensors.values()),
        url=called,
        remote_folder=place.folder,
    )


def _opened(store: Store, index: ShardIndex, place: URL, traffic: Traffic) -> Mapping[str, OpenedFile]:
    """All shards of an index, several at a time: each takes as long as the way there and back."""
    folder = place.folder
    with ExitStack() as stack, ThreadPoolExecutor(_OPENED_AT_A_TIME) as pool:

        def opened(name: str) -> OpenedFile:
            try:
                shard = _open_file(store, folder.within(name), name, traffic)
            except Absent:
                raise CheckpointError(f'{index.label}: the shard "{shown(name)}" is missing') from None
            stack.callback(shard.file.close)
            return shard

        try:
            shards = dict(zip(index.shards, pool.map(opened, index.shards), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        stack.pop_all()
    return shards


def _open_file(store: Store, url: URL, name: str, traffic: Traffic) -> OpenedFile:
    stored, head = store.open(url)
    label, size = str(url), stored.version.size

    def read(count: int, offset: int) -> bytes:
        stop = min(offset + count, size)
        known = head[offset:stop]
        return known if offset + len(known) == stop else known + stored.fetch(offset + len(known), stop)

    def file(length: int, metadata: Mapping[str, str] | None) -> StoredFile:
        return RemoteFile(name, -1, _status(url, size), length, metadata, stored, traffic)

    try:
        return read_header(read, size, label, file)
    except BaseException:
        stored.close()
        raise


def _status(url: URL, size: int) -> stat_result:
    """What ``fstat`` would say, for whoever asks whether two are one file; no device here has the number 0."""
    number = int(digest_of([url.secret.encode()], "sha256")[-16:], 16)
    return stat_result((stat.S_IFREG | 0o444, number, 0, 1, 0, 0, size, 0, 0, 0))


# --- fsspec ------------------------------------------------------------------------------------------


def _store(url: URL, traffic: Traffic) -> Store:
    """Where a URL leads: a file system of its own, for others' caches may be old."""
    try:
        import fsspec
    except ImportError:
        raise UsageError(f"{url}: fsspec, which fetches it, is not installed", hint=_INSTALL) from None
    if url.scheme not in fsspec.available_protocols():
        known = "s3, https, hf, and others that fsspec knows"
        raise UsageError(f"{url}: {shown(url.scheme)}:// is not known; there are {known}")
    try:
        kind: Any = fsspec.get_filesystem_class(url.scheme)
        filesystem = kind(**kind._get_kwargs_from_urls(url.secret), skip_instance_cache=True)
    except ImportError as failure:  # which says what to install
        raise UsageError(f"{url}: {redacted(failure)}", hint=_INSTALL if url.scheme in _EXTRA else None) from None
    except Exception as failure:
        raise UsageError(f"{url}: cannot be opened: {type(failure).__name__}: {redacted(failure)}") from None
    if not url.is_http:
        return Fsspec(filesystem, traffic)
    from .http_ranges import HTTP

    return HTTP(filesystem, traffic)
