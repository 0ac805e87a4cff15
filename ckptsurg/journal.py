"""What a rewrite has brought to its place, tensor by tensor, so that one that was stopped can be gone on with.

A line for the run that it is of, then one for each tensor, as JSON: its name in the output, and the digest of its
bytes. That again and again, so that what a run adds late to the journal of another is told from what that has added.
Nobody relies on it: whoever goes on reads what is there, and keeps what has the digest. So it need not be on disk, and
its last line may be torn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from . import disk
from .checkpoints import read_small
from .errors import CkptsurgError

__all__ = ["Journal", "recorded_by"]

#: How many bytes of tensors are brought to their places before the journal says so: it is no work beside them.
_SAID_EVERY = 16 << 20
#: Of a journal, in bytes: that of ten million tensors.
_MOST_BYTES = 2 << 30


class Journal:
    """The journal of one rank. Any thread may add to it.

    Args:
        path: Where it is.
        run: The identity of the run: what it makes of what.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._lock = path, Lock()
        self._head = ["", _line({"run": run})]  # an earlier line may be torn
        self._lines: list[str] = []
        self._unsaid = 0

    def add(self, name: str, digest: str, nbytes: int) -> None:
        """A tensor is in its place.

        Raises:
            OSError: if the system fails.
        """
        with self._lock:
            self._lines.append(_line([name, digest]))
            self._unsaid += nbytes
            if self._unsaid >= _SAID_EVERY:
                disk.append(self._path, "\n".join([*self._head, *self._lines, ""]).encode())
                self._lines, self._unsaid = [], 0


def recorded_by(journals: Iterable[Path], run: str) -> dict[str, str]:
    """The digests that journals have of a run, by name; nothing of journals that cannot be read."""
    found: dict[str, str] = {}
    for path in journals:
        is_of_run = False
        try:
            lines = read_small(path, _MOST_BYTES).splitlines()
        except (CkptsurgError, OSError):
            continue
        for line in lines:
            try:
                said = json.loads(line)
            except (ValueError, RecursionError):  # torn, or not ours
                continue
            if isinstance(said, dict):
                is_of_run = said.get("run") == run
            elif is_of_run and isinstance(said, list) and len(said) == 2 and all(isinstance(one, str) for one in said):
                found[said[0]] = said[1]
    return found


def _line(said: object) -> str:
    return json.dumps(said, separators=(",", ":"))
