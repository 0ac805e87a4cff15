"""A folder in which the files of an output are made, held open by whoever brings a part of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from . import disk
from .checkpoints import StoredFile, open_regular
from .copying import Target
from .errors import CkptsurgError, SystemFailure
from .wording import shown

__all__ = ["StagedFolder"]

#: No descriptor: relative to it nothing can be opened.
_CLOSED = -1
_SHARED = "all ranks need to see the output's folder under one path, in storage that they share"


class StagedFolder:
    """A folder that is there. Where it came from, and what becomes of it, is another's business.

    It is held open, and its files are opened relative to it: whoever is still at work when it was taken away, and
    another run has made one under its name, does not come into that.

    Attributes:
        folder: The folder, inside one that is never published.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor = _CLOSED
        self._targets: list[Target] = []

    @classmethod
    def of_first(cls, folder: Path, mark: Path) -> Self:
        """The one that the first rank has made, beside which it has put a mark.

        Raises:
            SystemFailure: if it is another one, on a disk of this machine's own.
        """
        if not mark.exists():
            raise SystemFailure(f"{shown(folder)}: is not what the first rank has staged", hint=_SHARED)
        return cls(folder)

    def open(self) -> None:
        """Hold the folder open; it is there.

        Raises:
            OSError: if it cannot be opened.
        """
        self._descriptor = disk.open_folder(self.folder)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def target(self, name: str, size: int, missing: int) -> Target:
        """A file of a size in bytes, to bring so many bytes to it; closed at the end if it never is whole."""
        try:
            descriptor = disk.reopen(name, self._descriptor)
        except FileNotFoundError:
            message = f"{shown(self.folder / name)}: what the first rank has staged is not there"
            raise SystemFailure(message, hint=_SHARED) from None
        return self._opened(descriptor, size, missing)

    def read(self, name: str) -> StoredFile | None:
        """A file that is there, to be read; None if it is not."""
        try:
            descriptor, status = open_regular(Path(name), os.O_NOFOLLOW, folder=self._descriptor)
        except CkptsurgError:
            return None
        return StoredFile(name, descriptor, status, b"", None)

    def _opened(self, descriptor: int, size: int, missing: int | None = None) -> Target:
        target = Target(descriptor, size, missing)
        self._targets.append(target)
        return target

    def close(self) -> None:
        """Close what is open, whole or not."""
        for target in self._targets:
            target.close()
        if self._descriptor != _CLOSED:
            descriptor, self._descriptor = self._descriptor, _CLOSED
            os.close(descriptor)
