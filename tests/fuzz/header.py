"""The header of a safetensors file, against the library of that name."""

from __future__ import annotations

import json
import random
from math import prod
from typing import Any, TypeAlias

import safetensors

from ckptsurg.errors import CheckpointError
from ckptsurg.formats import open_checkpoint

from ..oracle import BITS
from .checking import Target, attempt, cases, require, scratch
from .mutating import Members, edited, parsed, written

#: Dtype, shape and bytes by name.
Tensors: TypeAlias = dict[str, tuple[str, list[int], bytes]]

PATH = scratch("header") / "x.safetensors"


def container(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def read() -> Tensors:
    with open_checkpoint(PATH) as checkpoint:
        return {
            name: (info.dtype, list(info.shape), b"".join(bytes(chunk) for chunk in checkpoint.read(name)))
            for name, info in checkpoint.tensors.items()
        }


def read_by_library(data: bytes) -> Tensors | None:
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (one["dtype"], list(one["shape"]), bytes(one["data"])) for name, one in tensors}


def holds(data: bytes) -> None:
    PATH.write_bytes(data)
    found = attempt(read, data, CheckpointError)
    if found is not None:
        expected = read_by_library(data)
        require(found == expected, data, f"accepted {found!r}, but the library {expected!r}")


def mutate(data: bytes, rng: random.Random) -> bytes | None:
    end = 8 + int.from_bytes(data[:8], "little")
    header = parsed(data[8:end]) if data[8:9] == b"{" else None
    if header is None:
        return None
    changed, body = edited(header, rng, WORDS), data[end:]
    if isinstance(changed, Members) and rng.random() < 0.6:
        body = laid_out(changed, body)
    return container(written(changed, rng) + " " * rng.choice((0, 0, 0, 5)), body)


def laid_out(header: Members, data: bytes) -> bytes:
    """Sets offsets as shapes and dtypes have them, so that more than the layout is looked at; gives the data to it."""
    position = 0
    for _, entry in header:
        fields: dict[str, Any] = dict(entry) if isinstance(entry, Members) else {}
        dtype, shape = fields.get("dtype"), fields.get("shape")
        if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
            continue
        length = prod(shape) * BITS.get(dtype, 8) // 8
        if 0 <= length <= 256 and "data_offsets" in fields:
            entry[:] = [(k, [position, position + length] if k == "data_offsets" else v) for k, v in entry]
            position += length
    return data[:position].ljust(position, b"\7")


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


_ONE = json.dumps({"a": entry("U8", [2], 0, 2)})
_SEVERAL = {
    "__metadata__": {"format": "pt", "\u00e9": ""},
    "b": entry("F4", [2], 1, 2),
    "a": entry("U8", [1], 0, 1),
    "c.d": entry("F32", [0, 3], 2, 2),
    "": entry("F16", [], 2, 4),
    "f": entry("F6_E2M3", [4], 4, 7),
}
WORDS = (
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '{"dtype":"U8","shape":[],"data_offsets":[0,1]}'),
    *(json.dumps(dtype) for dtype in (*BITS, "C128", "f32")),
    *("[0,4]", "[2,2]", "[4294967296,4294967296]", "18446744073709551615", "18446744073709551616", "-1", "-0", "2e0"),
    *("null", "true", "{}", "[]", '"2"', "NaN", "\\u0061", "\\ud800", "\ufeff", "\u202e", "},", '":', "//", "  "),
)
SEEDS = [
    container(_ONE, b"\1\2"),
    container(_ONE + "   ", b"\1\2"),
    container(json.dumps(_SEVERAL), b"\0" * 7),
    container(json.dumps({"a": entry("F64", [1] * 64, 0, 8), "b": entry("BOOL", [3, 1], 8, 11)}), bytes(11)),
    len(_ONE).to_bytes(8, "big") + _ONE.encode() + b"\1\2",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"",
]
TARGET = Target(
    [*SEEDS, *cases((".safetensors",), "container", "dtypes", "entries", "layout", "names")], WORDS, holds, mutate
)
