"""The index of a sharded checkpoint: what it leads to lies in its folder, and is what the shards hold."""

from __future__ import annotations

import json
import random

from ckptsurg.errors import CheckpointError
from ckptsurg.formats import open_checkpoint

from .checking import Target, attempt, cases, require, scratch
from .header import Tensors, container, entry, read_by_library
from .mutating import edited, parsed, written

FOLDER = scratch("index") / "model"
PATH = FOLDER / "model.safetensors.index.json"


def shard(*names: str) -> bytes:
    header = {name: entry("U8", [1], at, at + 1) for at, name in enumerate(names)}
    return container(json.dumps(header), bytes(range(65, 65 + len(names))))


SHARDS = {
    "x.safetensors": shard("a", "b"),
    "p/y.safetensors": shard("c"),
    "p/z.safetensors": shard("c", "d"),  # one of its tensors is in another too
    "bad.safetensors": shard("e")[:-1],
}
(FOLDER / "p").mkdir(parents=True)
for _name, _data in SHARDS.items():
    (FOLDER / _name).write_bytes(_data)
(FOLDER.parent / "outside.safetensors").write_bytes(shard("a", "b"))
(FOLDER / "out.safetensors").symlink_to("../outside.safetensors")
(FOLDER / "in.safetensors").symlink_to("x.safetensors")
(FOLDER / "loop.safetensors").symlink_to("loop.safetensors")
(FOLDER / "folder.safetensors").mkdir()


def read() -> tuple[Tensors, dict[str, str]]:
    with open_checkpoint(FOLDER) as checkpoint:
        tensors = {
            name: (info.dtype, list(info.shape), b"".join(bytes(chunk) for chunk in checkpoint.read(name)))
            for name, info in checkpoint.tensors.items()
        }
        for warning in checkpoint.warnings:
            if not warning.isprintable() or len(warning) > 1000:
                raise AssertionError(f"a warning of {len(warning)} characters: {warning[:200]!a}")
        return tensors, {name: checkpoint.file_of(name) for name in tensors}


def holds(data: bytes) -> None:
    PATH.write_bytes(data)
    found = attempt(read, data, CheckpointError)
    if found is None:
        return
    tensors, homes = found
    require(homes == json.loads(data)["weight_map"], data, f"files of tensors: {homes}")
    for name in set(homes.values()):
        # A link inside the folder is the file that it leads to.
        expected = read_by_library(SHARDS[name.replace("in.", "x.")])
        mine = {tensor: tensors[tensor] for tensor in tensors if homes[tensor] == name}
        require(mine == expected, data, f"{name}: {mine!r}, but the library {expected!r}")


def mutate(data: bytes, rng: random.Random) -> bytes | None:
    index = parsed(data)
    if index is None:
        return None
    return written(edited(index, rng, WORDS), rng).encode("utf-8", "surrogatepass")


def index(total_size: object = 3, **weight_map: str) -> bytes:
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}).encode()


WORDS = (
    *("weight_map", "metadata", "total_size", "a", "b", "c", "d", "e"),
    *(*SHARDS, "out.safetensors", "in.safetensors", "loop.safetensors", "folder.safetensors", "none.safetensors"),
    *("../outside.safetensors", "/etc/passwd", "C:x.safetensors", "p\\\\y.safetensors", "./x.safetensors", "..", "//"),
    *("null", "true", "{}", "[]", "1e5", "-0", "NaN", "1e999", "\\u0000", "\\ud800", "\u202e", '"3"'),
)
X, Y = "x.safetensors", "p/y.safetensors"
TARGET = Target(
    [
        index(a=X, b=X, c=Y),
        index(3.5, a=X, b=X),
        index(2, a="in.safetensors", b="in.safetensors"),
        index(a="out.safetensors", b="out.safetensors"),
        index(a=X, b=X, c=Y, d="p/z.safetensors"),
        index(c="../model/p/y.safetensors"),
        *cases((".index.json",), "index"),
    ],
    WORDS,
    holds,
    mutate,
)
