"""A disk that loses power: what may be on it, if only what was flushed is sure to be.

It promises less than any journal does: a change of names is atomic, but it may be missing, and a later one be there
without it, until a folder that it concerns is flushed. Bytes of a file may be missing, or be there in part, until the
file is flushed, whether its name is there or not.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ckptsurg import disk

from .scenes import Contents

#: Subsets of changes that are tried one by one; of more, so many by chance.
_MOST = 256


@dataclass
class Change:
    """Names that get another inode, or none, in one step: (folder, name, inode)."""

    names: tuple[tuple[int, str, int | None], ...]
    is_durable: bool = False


@dataclass
class File:
    """What was written to a file, in order, and how much of that is flushed."""

    writes: list[tuple[int, bytes]] = field(default_factory=list)
    flushed: int = 0

    def content(self, pending: str) -> bytes:
        writes = self.writes[: self.flushed] if pending == "lost" else self.writes
        found = bytearray()
        for number, (at, data) in enumerate(writes):
            if pending == "torn" and number >= self.flushed:
                data = data[: len(data) // 2]
            found.extend(bytes(max(0, at + len(data) - len(found))))
            found[at : at + len(data)] = data
        return bytes(found)


class Disk:
    """The inodes of a folder, and what happened to them since it was last surely on disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = count(1)
        self.files: dict[int, File] = {}
        self.entries: dict[int, dict[str, int]] = {0: {}}
        self.changes: list[Change] = []
        for place, folders, files in os.walk(root):
            parent = self._inode(Path(place))
            for name in folders:
                inode = self._new()
                self.entries[inode] = {}
                self._change((parent, name, inode))
            for name in files:
                inode = self._new()
                self.files[inode] = File([(0, (Path(place) / name).read_bytes())], 1)
                self._change((parent, name, inode))
        for change in self.changes:
            change.is_durable = True

    def _new(self) -> int:
        return next(self._numbers)

    def _inode(self, path: Path) -> int:
        inode = 0
        for name in path.relative_to(self._root).parts:
            inode = self.entries[inode][name]
        return inode

    def _at(self, path: Path) -> tuple[int, str]:
        return self._inode(path.parent), path.name

    def _change(self, *names: tuple[int, str, int | None]) -> None:
        self.changes.append(Change(names))
        _apply(self.entries, names)

    # --- Effects -------------------------------------------------------------------------------------

    def make_folder(self, path: Path) -> None:
        inode = self._new()
        self.entries[inode] = {}
        self._change((*self._at(path), inode))

    def create(self, path: Path) -> int:
        inode = self._new()
        self.files[inode] = File()
        self._change((*self._at(path), inode))
        return inode

    def write(self, inode: int, data: bytes, at: int) -> None:
        self.files[inode].writes.append((at, data))

    def flush(self, inode: int) -> None:
        self.files[inode].flushed = len(self.files[inode].writes)

    def flush_folder(self, path: Path) -> None:
        inode = self._inode(path)
        for change in self.changes:
            change.is_durable |= any(folder == inode for folder, _, _ in change.names)

    def rename(self, source: Path, target: Path) -> None:
        self._change((*self._at(source), None), (*self._at(target), self._inode(source)))

    def exchange(self, one: Path, other: Path) -> None:
        self._change((*self._at(one), self._inode(other)), (*self._at(other), self._inode(one)))

    def remove(self, path: Path) -> None:
        self._change((*self._at(path), None))

    def remove_all(self, folder: Path) -> None:
        inode = self._inode(folder)
        for name, below in list(self.entries[inode].items()):
            if below in self.entries:
                self.remove_all(folder / name)
            else:
                self.remove(folder / name)
        self.remove(folder)

    # --- After a crash -------------------------------------------------------------------------------

    def crashes(self, rng: random.Random) -> Iterator[Contents]:
        """What may be there if power is lost now."""
        pending = [change for change in self.changes if not change.is_durable]
        few = 1 << len(pending) <= _MOST
        chosen = range(1 << len(pending)) if few else [0, -1, *(rng.getrandbits(len(pending)) for _ in range(_MOST))]
        for bits in chosen:
            there = {id(change) for number, change in enumerate(pending) if bits >> number & 1}
            entries: dict[int, dict[str, int]] = {inode: {} for inode in self.entries}
            for change in self.changes:
                if change.is_durable or id(change) in there:
                    _apply(entries, change.names)
            for data in ("lost", "torn", "there"):
                yield dict(self._contents(entries, 0, "", data))

    def _contents(
        self, entries: dict[int, dict[str, int]], folder: int, prefix: str, pending: str
    ) -> Iterator[tuple[str, bytes]]:
        for name, inode in entries[folder].items():
            if inode in entries:
                yield from self._contents(entries, inode, f"{prefix}{name}/", pending)
            else:
                yield f"{prefix}{name}", self.files[inode].content(pending)


def _apply(entries: dict[int, dict[str, int]], names: tuple[tuple[int, str, int | None], ...]) -> None:
    for folder, name, inode in names:
        if inode is None:
            entries[folder].pop(name, None)
        else:
            entries[folder][name] = inode


Effect = tuple[str, tuple[Any, ...]]


def recorded(monkeypatch: Any, root: Path, action: Callable[[], object]) -> list[Effect]:
    """The effects of an action on a folder, in their order, as calls of ``Disk``; files are numbered as there."""
    effects: list[Effect] = []
    model = Disk(root)
    inodes: dict[int, int] = {}

    def note(name: str, *arguments: Any) -> Any:
        effects.append((name, arguments))
        return getattr(model, name)(*arguments)

    def watch(function: str, before: Callable[..., object]) -> None:
        real = getattr(disk, function)

        def watched(*arguments: Any) -> Any:
            found = real(*arguments)
            before(found, *arguments)
            return found

        monkeypatch.setattr(disk, function, watched)

    def created(descriptor: int, path: Path) -> None:
        inodes[descriptor] = note("create", path)

    def cloned(is_shared: bool, source: int, offset: int, length: int, target: int, at: int) -> None:
        if is_shared:
            length = length or os.fstat(source).st_size - offset
            note("write", inodes[target], os.pread(source, length, offset), at)

    watch("make_folder", lambda _, path, *mode: note("make_folder", path))
    watch("create", created)
    watch("write_all", lambda _, descriptor, data, at: note("write", inodes[descriptor], bytes(data), at))
    watch("clone_range", cloned)
    watch("flush", lambda _, descriptor: note("flush", inodes[descriptor]))
    watch("flush_folder", lambda _, folder: note("flush_folder", folder))
    watch("move", lambda _, source, target: note("rename", source, target))
    watch("replace", lambda _, source, target: note("rename", source, target))
    watch("exchange", lambda _, one, other: note("exchange", one, other))
    watch("remove", lambda _, path: note("remove", path))
    watch("remove_folder", lambda _, path: note("remove", path))
    watch("remove_all", lambda _, folder: note("remove_all", folder))
    action()
    return effects
