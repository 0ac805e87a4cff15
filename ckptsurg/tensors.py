"""What a tensor is to ckptsurg: a dtype, a shape and raw bytes. Nothing here decodes a value."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from threading import Event, Thread
from typing import Protocol, TypeAlias

from blake3 import blake3

from .errors import UsageError
from .wording import shown

__all__ = [
    "ALGORITHMS",
    "BLOCK_ELEMENTS",
    "CHUNK_BYTES",
    "DTYPE_BITS",
    "FLOATS",
    "MAX_RANK",
    "Buffer",
    "Digester",
    "TensorInfo",
    "TensorSource",
    "algorithm_of",
    "digest_of",
    "refuse_unstorable",
    "refused_name",
    "row_span",
    "same_bytes",
    "section",
    "sections",
    "unstorable",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

#: How much of a tensor is in memory at a time, in bytes. A multiple of every element size,
#: three-byte groups of F6 included, so that a chunk never ends inside an element.
CHUNK_BYTES = 3 << 20

#: How many elements are drawn at a time.
BLOCK_ELEMENTS = 1 << 17

#: How many dimensions a tensor may have.
MAX_RANK = 64

#: How many characters a tensor's name may have.
MAX_NAME_LENGTH = 1_000_000

#: Bits per element of every dtype of the safetensors format, by the format's own names
#: (``Dtype::bitsize`` in safetensors/src/tensor.rs, 0.6 and later).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: Dtypes with fractions that optimizers train in.
FLOATS = frozenset(("F16", "BF16", "F32", "F64"))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its values.

    Attributes:
        dtype: One of ``DTYPE_BITS``.
        shape: Size of each dimension, in elements.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes; sub-byte elements are packed and fill whole bytes."""
        return self.elements * DTYPE_BITS[self.dtype] // 8

    @property
    def alignment(self) -> int:
        """Bytes that the offset of the tensor should be a multiple of."""
        return max(1, DTYPE_BITS[self.dtype] // 8)

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


class TensorSource(Protocol):
    """Named tensors whose bytes can be read: a checkpoint, or a live model."""

    @property
    def label(self) -> str:
        """How messages call the source: a path, or the class of a model."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """Text by key, as ``__metadata__`` of a safetensors file holds it."""

    def read(self, name: str) -> Iterator[Buffer]:
        """The little-endian bytes of one tensor, in chunks of ``CHUNK_BYTES`` (the last may be less).

        A chunk is valid until the next one is asked for.
        """


def refuse_unstorable(label: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UsageError, naming the first tensor whose name, dtype or shape a safetensors file cannot have."""
    for name, info in tensors.items():
        if reason := unstorable(name, info):
            raise UsageError(f'{label}: "{shown(name)}" {reason}')


def refused_name(name: str) -> str | None:
    """Why a tensor cannot have a name, in words that follow it; None where it can."""
    if name == "__metadata__":
        return "is no name for a tensor: the format uses it"
    if len(name) > MAX_NAME_LENGTH:
        return f"has a name of {len(name):,} characters; at most {MAX_NAME_LENGTH:,} are allowed"
    return None


def unstorable(name: object, info: TensorInfo) -> str | None:
    """Why a safetensors file cannot have a tensor, in words that follow its name; None where it can."""
    if not isinstance(name, str):
        return f"is the name of a tensor, and no text but {type(name).__name__}"
    if info.dtype not in DTYPE_BITS:
        return f"is {shown(info.dtype)}, which safetensors does not have"
    if len(info.shape) > MAX_RANK:
        return f"has {len(info.shape)} dimensions; {MAX_RANK} are allowed"
    if info.elements * DTYPE_BITS[info.dtype] % 8:
        return f"is {info}, which does not fill whole bytes"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "has a name that is no Unicode: a surrogate stands alone"
    return refused_name(name)


class _Hash(Protocol):
    """What the objects of ``hashlib`` and ``blake3`` have in common."""

    def update(self, data: Buffer, /) -> object: ...

    def hexdigest(self) -> str: ...


_IS_CHILD = [False]
# The threads of a process do not survive its fork, and whoever waits for them waits for good.
os.register_at_fork(after_in_child=lambda: _IS_CHILD.__setitem__(0, True))


@cache
def _has_threads() -> bool:
    """Whether the system lets the process have a thread for each core now. BLAKE3 panics where it does not."""
    is_done = Event()
    threads = [Thread(target=is_done.wait, name="ckptsurg-asking") for _ in range(os.cpu_count() or 1)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:  # a limit on processes
        return False
    finally:
        is_done.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return True


def _blake3(threads: int | None) -> _Hash:
    is_alone = threads == 1 or _IS_CHILD[0] or not _has_threads()
    return blake3(max_threads=1 if is_alone else threads or blake3.AUTO)


def _sha256(threads: int | None) -> _Hash:
    return hashlib.sha256()


#: Digest algorithms by name, given how many threads may work; both have 32 bytes of output. SHA-256 is for one thread.
ALGORITHMS: dict[str, Callable[[int | None], _Hash]] = {"blake3": _blake3, "sha256": _sha256}


class Digester:
    """A digest in the making; as text it carries its algorithm: ``blake3:`` and hexadecimal digits.

    Args:
        algorithm: One of ``ALGORITHMS``.
        threads: How many threads may work on it; None for all there are.
    """

    def __init__(self, algorithm: str, threads: int | None = None) -> None:
        self._algorithm, self._hash = algorithm, ALGORITHMS[algorithm](threads)

    def update(self, data: Buffer) -> None:
        self._hash.update(data)

    def __str__(self) -> str:
        return f"{self._algorithm}:{self._hash.hexdigest()}"


def digest_of(chunks: Iterable[Buffer], algorithm: str = "blake3") -> str:
    """The digest of the concatenated chunks."""
    digester = Digester(algorithm)
    for chunk in chunks:
        digester.update(chunk)
    return str(digester)


def same_bytes(one: bytearray, other: Buffer) -> bool:
    """Whether two buffers hold the same bytes. A bytearray is compared as memory, where a view goes item by item."""
    return one == other


def row_span(info: TensorInfo, rows: tuple[int, int]) -> tuple[int, int]:
    """First byte of a range of rows and the one after its last.

    Args:
        info: Of the tensor; rows are along its first dimension, and each fills whole bytes.
        rows: The first row, and the one after the last.
    """
    row = TensorInfo(info.dtype, info.shape[1:]).nbytes
    return rows[0] * row, rows[1] * row


def section(chunks: Iterable[Buffer], span: tuple[int, int]) -> Iterator[Buffer]:
    """The bytes of chunks from the first of the span up to its second number."""
    start, stop = span
    position = 0
    for chunk in chunks:
        first, last = max(start - position, 0), min(stop - position, len(chunk))
        if first < last:
            yield memoryview(chunk)[first:last]
        position += len(chunk)
        if position >= stop:
            return


def sections(chunks: Iterator[Buffer]) -> Callable[[int, int], Iterator[Buffer]]:
    """A reader of spans of a stream of chunks, by first byte and the one after the last, asked for in their order."""
    rest: Buffer = b""
    position = 0

    def take(start: int, stop: int) -> Iterator[Buffer]:
        nonlocal rest, position
        while position < stop:
            if not rest:
                rest = next(chunks)
            view = memoryview(rest)
            skipped = min(max(start - position, 0), len(view))
            taken = min(len(view) - skipped, stop - position - skipped)
            rest, position = view[skipped + max(taken, 0) :], position + skipped + max(taken, 0)
            if taken > 0:
                yield view[skipped : skipped + taken]

    return take


def algorithm_of(digest: str) -> str:
    """The algorithm that a digest carries."""
    return digest.partition(":")[0]
