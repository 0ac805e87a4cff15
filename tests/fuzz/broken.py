"""A target that must fail: it holds that no file of safetensors can be read."""

from __future__ import annotations

from ckptsurg.errors import CheckpointError

from .checking import Target, attempt, require
from .header import PATH, SEEDS, WORDS, mutate, read


def holds(data: bytes) -> None:
    PATH.write_bytes(data)
    require(attempt(read, data, CheckpointError) is None, data, "accepted")


TARGET = Target([SEEDS[0][:-1]], WORDS, holds, mutate)
