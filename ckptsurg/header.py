"""The safetensors container: its header, read strictly and written.

Format: https://github.com/huggingface/safetensors#format. A file is the length of the header (unsigned, 64 bits,
little-endian), the header (JSON, an object, padded with spaces), and the tensors' bytes without holes. The reader
refuses more than the library of that name does: whatever two readers could understand differently.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

from .checkpoints import Extent, StoredFile, open_regular
from .errors import CheckpointError, system_failures
from .parsing import parse_json
from .tensors import DTYPE_BITS, MAX_RANK, TensorInfo, refused_name
from .wording import counted, quoted, shown

__all__ = [
    "MAX_HEADER_BYTES",
    "OpenedFile",
    "ReadAt",
    "begins_like_safetensors",
    "encode_header",
    "open_file",
    "read_header",
]

#: Reads at most so many bytes from an offset, as ``os.pread`` does; none at the end of the file.
ReadAt: TypeAlias = Callable[[int, int], bytes]

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_UINT64 = 2**64

_ARCHIVE_HINT = "its name says safetensors; called .pth, it is read by torch"
_PAGE_HINT = "the download was not the file; fetch it again"
#: What a file that is no safetensors file begins with, what it is then, and what to do.
_OTHER_FORMATS: tuple[tuple[re.Pattern[bytes], str, str | None], ...] = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a ZIP archive, such as PyTorch writes", _ARCHIVE_HINT),
    (re.compile(rb"\x1f\x8b"), "packed by gzip", "unpack it"),
    (re.compile(rb"\x80[\x02-\x05]"), "a pickle, such as old PyTorch writes", _ARCHIVE_HINT),
    (re.compile(rb"GGUF"), "a GGUF file", "convert it to safetensors"),
    (
        re.compile(rb"\x89HDF\r\n"),
        "an HDF5 file, such as Keras writes",
        "its name says safetensors; called .h5 or .weights.h5, it is read by Keras",
    ),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+)?html", re.IGNORECASE), "an HTML page", _PAGE_HINT),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<[?]xml", re.IGNORECASE), "an XML document", _PAGE_HINT),
    (re.compile(rb"# xet version"), "a pointer of Xet, not the file itself", "fetch it with huggingface_hub"),
    (re.compile(rb'\s*[{]\s*"'), "a JSON document", "a manifest, an index, or a server's answer in place of the file?"),
    (
        re.compile(rb"[\t\n\r\x20-\x7e]{8}"),
        "a text file",
        "a checkpoint comes after SPEC or MANIFEST",
    ),
)


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A file of weights after its header was read and checked.

    Attributes:
        file: The file.
        tensors: Its tensors in the order of their bytes.
        extents: Where their bytes are.
    """

    file: StoredFile
    tensors: Mapping[str, TensorInfo]
    extents: Mapping[str, Extent]


def open_file(path: Path, name: str, flags: int = 0, called: Path | None = None) -> OpenedFile:
    """Open one file of weights and check its header.

    Args:
        path: Where it is.
        name: What it is called inside its checkpoint.
        flags: Further flags of ``open(2)``.
        called: Its path as the user knows it, where that is another.
    """
    label = shown(called or path)
    descriptor, status = open_regular(path, flags, label)
    try:
        with system_failures(label):
            return read_header(
                partial(os.pread, descriptor),
                status.st_size,
                label,
                lambda length, metadata: StoredFile(name, descriptor, status, length, metadata),
            )
    except BaseException:
        os.close(descriptor)
        raise


def read_header(
    read: ReadAt, size: int, label: str, stored: Callable[[int, Mapping[str, str] | None], StoredFile]
) -> OpenedFile:
    """Read and check the header of a file of weights, wherever it is.

    Args:
        read: Reads it.
        size: Of the file, in bytes.
        label: How messages call it.
        stored: Given the length of the header in bytes and the metadata: the file.

    Raises:
        CheckpointError: if it is malformed, or no safetensors file.
    """
    header = _read_header(read, size, label)
    metadata, entries = _parse_header(header, label)
    file = stored(len(header), metadata)
    del header  # it may be as large as all that is made of it
    return OpenedFile(file, *_check_layout(file, entries, label))


def begins_like_safetensors(prefix: bytes) -> bool:
    """Whether the first bytes of a file are a length that a header may have, and the header's first."""
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    return 0 < length <= MAX_HEADER_BYTES and prefix[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"


def _read_header(read: ReadAt, size: int, label: str) -> bytes:
    prefix = read(64, 0)
    if size < _LENGTH_BYTES:
        hint = "the download or copy broke off; fetch it again" if size == 0 else None
        raise CheckpointError(
            f"{label}: not a safetensors file: expected at least {_LENGTH_BYTES} bytes, found {size}", hint=hint
        )
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    header = b""
    if 0 < length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        while (missing := length - len(header)) > 0:
            chunk = read(missing, _LENGTH_BYTES + len(header))
            if not chunk:
                raise CheckpointError(f"{label}: was cut short while its header was read")
            header += chunk
        if header.startswith(b"{"):
            return header
    # Only now that it cannot be a safetensors file is it asked what else it is: a header length of
    # 60 begins with "<" and one of 640 with the first bytes of a pickle.
    for magic, kind, hint in _OTHER_FORMATS:
        if magic.match(prefix):
            raise CheckpointError(f"{label}: is {kind}; expected a safetensors file", hint=hint)
    if header:
        found = "a byte order mark" if header.startswith(b"\xef\xbb\xbf") else f"0x{header[0]:02x}"
        raise CheckpointError(f'{label}: the header must begin with "{{", found {found}')
    if length == 0:
        raise CheckpointError(f"{label}: the header length is 0; not a safetensors file")
    if 0 < int.from_bytes(prefix[:_LENGTH_BYTES], "big") <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise CheckpointError(f"{label}: the header length is big-endian; the format has it little-endian")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{label}: the header length is {length:,}; at most {MAX_HEADER_BYTES:,} is allowed",
            hint="is it safetensors?",
        )
    raise CheckpointError(
        f"{label}: the header should have {length:,} bytes, but the file has {size - _LENGTH_BYTES:,} after its length",
        hint="the download or copy broke off; fetch it again",
    )


def _parse_header(header: bytes, label: str) -> tuple[Mapping[str, str] | None, dict[str, Any]]:
    body = header.rstrip(b" ")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise CheckpointError(
            f"{label}: the header is not UTF-8: byte {failure.start:,} is 0x{body[failure.start]:02x}"
        ) from None
    if not text.endswith("}"):
        raise CheckpointError(f'{label}: the header must end with "}}" and spaces, found 0x{body[-1]:02x}')
    if _holds_nested_lists(text):
        raise CheckpointError(f"{label}: the header is malformed: a list holds lists or objects")
    try:
        entries = parse_json(text, floats=False, finish=_compact)
    except ValueError as failure:
        raise CheckpointError(f"{label}: the header is malformed: {failure}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{label}: the header is one tensor's entry; expected an object of them by name")
    metadata = None
    if "__metadata__" in entries:
        metadata = entries.pop("__metadata__")
        if isinstance(metadata, tuple):
            raise CheckpointError(f"{label}: a tensor is called __metadata__, a name that the format uses")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{label}: __metadata__ must map text to text, found {quoted(metadata)}")
    if not entries:
        raise CheckpointError(f"{label}: the file holds no tensor")
    return metadata, entries


_SMALL = 1 << 20
_NESTED = re.compile(r"[\[,]\s*[\[{]")
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


def _holds_nested_lists(text: str) -> bool:
    """Whether what is to be JSON has a list of anything but numbers, of which a few letters take much memory.

    Of a small header the tensor is named instead, and one that has no more brackets than its tensors need has none.
    """
    entries = text.count('"data_offsets"')
    if len(text) <= _SMALL or (text.count("[") <= 2 * entries and text.count("{") <= entries + 2):
        return False
    return _NESTED.search(text) is not None and _NESTED.search(_TEXT.sub('""', text)) is not None


_FIELDS = {"dtype", "shape", "data_offsets"}


def _compact(entry: dict[str, Any]) -> object:
    """A tensor's entry as a tuple: there may be a million, and as objects they take three times the memory."""
    if entry.keys() != _FIELDS:
        return entry
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or type(shape) is not list or type(offsets) is not list:
        return entry  # these may also be the names of three tensors
    return sys.intern(dtype), tuple(shape), tuple(offsets)


def _fields(entry: Any) -> tuple[Any, Any, Any]:
    """The dtype, shape and offsets of an entry, or ValueError."""
    if isinstance(entry, tuple):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with dtype, shape and data_offsets, found {quoted(entry)}")
    missing, unknown = sorted(_FIELDS - entry.keys()), sorted(entry.keys() - _FIELDS)
    if missing or unknown:
        raise ValueError(f"the field {missing[0]} is missing" if missing else f'unknown field "{shown(unknown[0])}"')
    shape, offsets = (
        tuple(value) if isinstance(value, list) else value for value in (entry["shape"], entry["data_offsets"])
    )
    return entry["dtype"], shape, offsets


def _described(entry: Any) -> tuple[TensorInfo, int, int]:
    """One tensor's dtype and shape, and offsets, each exactly of the form that the format gives it.

    Raises:
        ValueError: with what is wrong.
    """
    dtype, shape, offsets = _fields(entry)
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {quoted(dtype, 40)}; the format has {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, tuple) or len(shape) > MAX_RANK:
        raise ValueError(f"the shape must be a list of at most {MAX_RANK} sizes, found {quoted(shape)}")
    elements = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < _UINT64:
            raise ValueError(f"a size must be a whole number from 0 to 2^64 - 1, found {quoted(size, 40)}")
        elements *= size or 1
        if elements >= _UINT64:
            raise ValueError(f"the shape {quoted(shape)} has more than 2^64 - 1 elements")
    if 0 in shape:
        elements = 0
    if not isinstance(offsets, tuple) or len(offsets) != 2:
        raise ValueError(f"data_offsets must be two numbers, found {quoted(offsets)}")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(f"data_offsets must be whole numbers, the begin not after the end, found {quoted(offsets)}")
    info = TensorInfo(dtype, shape)
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{info} does not fill whole bytes")
    if end - begin != bits // 8:
        needed = counted(bits // 8, "byte")
        raise ValueError(f"{info} takes {needed}, but data_offsets {quoted(offsets)} span {end - begin:,}")
    return info, begin, end


def _check_layout(
    file: StoredFile, entries: Mapping[str, Any], label: str
) -> tuple[dict[str, TensorInfo], dict[str, Extent]]:
    checked = []
    for name, entry in entries.items():
        try:
            checked.append((name, *_described(entry)))
        except ValueError as failure:
            raise CheckpointError(f'{label}: tensor "{shown(name)}": {failure}') from None
        if reason := refused_name(name):
            raise CheckpointError(f'{label}: tensor "{shown(name)}" {reason}')
    checked.sort(key=itemgetter(2, 3))
    position = 0
    for name, _, begin, end in checked:
        if begin != position:
            fault = "a hole" if begin > position else "an overlap"
            raise CheckpointError(
                f'{label}: {fault} before tensor "{shown(name)}": expected its data at {position:,}, found {begin:,}'
            )
        position = end
    start = file.data_start
    available = file.size - start
    if available != position:
        verb, hint = ("is cut short", "fetch it again") if available < position else ("has trailing bytes", None)
        raise CheckpointError(
            f"{label}: the file {verb}: expected {position:,} bytes of data, found {available:,}", hint=hint
        )
    tensors = {name: info for name, info, _, _ in checked}
    extents = {name: Extent(file, start + begin, end - begin) for name, _, begin, end in checked}
    return tensors, extents


def encode_header(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str] | None,
    page: int | None = None,
    page_bytes: int = 4096,
) -> bytes:
    """The length and header of a file whose tensors follow one another in the order given.

    Args:
        tensors: The tensors, in the order of their bytes.
        metadata: ``__metadata__``, or None for none.
        page: Where in a page the data should begin, in bytes and a multiple of 8; None for the next multiple of 8.
        page_bytes: Size of a page, in bytes.

    Raises:
        CheckpointError: if the header would be larger than the format allows.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, info in tensors.items():
        end = position + info.nbytes
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    start = _LENGTH_BYTES + len(body)
    padding = -start % 8 if page is None else (page - start) % page_bytes
    length = len(body) + padding
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the output's header would have {length:,} bytes; at most {MAX_HEADER_BYTES:,} is allowed"
        )
    return length.to_bytes(_LENGTH_BYTES, "little") + body + b" " * padding
