"""Archives that hold far more than their size."""

from __future__ import annotations

from ..errors import CheckpointError

__all__ = ["refuse_expanding"]

#: From so many bytes on, what an archive holds may not be ``MAX_EXPANSION`` times as large as what is stored of it.
#: Neither torch nor Keras compresses anything.
EXPANSION_FLOOR = 1 << 26
MAX_EXPANSION = 1000


def refuse_expanding(label: str, declared: int, stored: int) -> None:
    """Refuse what would take up far more than is stored of it.

    Args:
        label: How messages call it.
        declared: What it would take, in bytes.
        stored: What is stored of it, in bytes.

    Raises:
        CheckpointError: if it is too much.
    """
    if declared > max(EXPANSION_FLOOR, MAX_EXPANSION * stored):
        raise CheckpointError(f"{label}: would take {declared:,} bytes, and {stored:,} are stored; it is no model's")
