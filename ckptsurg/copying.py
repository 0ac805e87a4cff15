"""The two operations that a rewrite is made of: copy this range of that file, and write these new bytes.

Each byte is read once, and what is hashed is what is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Protocol

from .checkpoints import Extent, read_extent
from .tensors import CHUNK_BYTES, Buffer

__all__ = ["Writer", "write_all"]


class Hashing(Protocol):
    """What is told of every byte that is written."""

    def update(self, data: Buffer, /) -> None: ...


class Writer:
    """Appends to a file, through one buffer.

    Attributes:
        position: How many bytes are written.

    Args:
        descriptor: The file, open for writing and empty.
        label: How messages call the source.
        advance: Called with every number of bytes written.
    """

    def __init__(self, descriptor: int, label: str, advance: Callable[[int], None]) -> None:
        self._descriptor, self._label, self._advance = descriptor, label, advance
        self._buffer = bytearray(CHUNK_BYTES)
        self.position = 0

    def copy_range(self, extent: Extent, digester: Hashing | None = None) -> None:
        """Copy a range of a file."""
        self.write_new(read_extent(extent, self._label, self._buffer), digester)

    def write_new(self, chunks: Iterable[Buffer], digester: Hashing | None = None) -> None:
        """Write new bytes."""
        for chunk in chunks:
            if digester is not None:
                digester.update(chunk)
            write_all(self._descriptor, chunk)
            self.position += len(chunk)
            self._advance(len(chunk))


def write_all(descriptor: int, content: Buffer) -> None:
    """Write everything: the system may take less than it is given."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
