"""One run at a time: a hidden folder beside a target, locked by the run that has it.

The lock is on the folder itself (``flock(2)``): whoever is killed gives it up, and no lock file is left behind.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from . import disk
from .errors import SystemFailure, UsageError
from .wording import counted, shown

__all__ = ["Claim", "claim_beside"]

_log = logging.getLogger("ckptsurg")

#: Bytes of a target's name that its hidden folder's name repeats; file systems take 255 in all.
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class Claim:
    """A folder that no other run uses.

    Attributes:
        folder: The folder.
        descriptor: Its descriptor, which holds the lock.
    """

    folder: Path
    descriptor: int

    def sweep(self) -> None:
        """Take away what a run that was killed has left."""
        left = sum(not _is_folder(path) for path in self.folder.rglob("*"))
        for path in self.folder.iterdir():
            if _is_folder(path):
                disk.remove_all(path)
            else:
                disk.remove(path)
        if left:
            _log.info("%s: removed %s that a stopped run left", shown(self.folder), counted(left, "file"))

    def is_held(self) -> bool:
        """Whether the folder under its name is still the one that is locked."""
        try:
            return os.path.samestat(self.folder.lstat(), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock up."""
        os.close(self.descriptor)


def claim_beside(target: Path) -> Claim:
    """The folder that only one run to a target has at a time; what is in it was left by one that was killed.

    Raises:
        UsageError: if another run has it.
        SystemFailure: if it cannot be used without danger.
        OSError: if the system fails.
    """
    folder, label = target.parent / _hidden_name(target.name), shown(target)
    while True:
        is_new = False
        try:
            with suppress(FileExistsError):
                disk.make_folder(folder, 0o700)
                is_new = True
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if not folder.parent.is_dir():
                raise
            continue  # the run that had it has just ended
        except BaseException:
            _remove_empty(folder)
            raise
        try:
            if not is_new and os.fstat(descriptor).st_uid != os.geteuid():
                raise SystemFailure(f"{label}: {shown(folder)} is another user's, who could change what is in it")
            _lock(descriptor, folder, label)
            claim = Claim(folder, descriptor)
            if claim.is_held():
                return claim
        except (UsageError, SystemFailure):
            os.close(descriptor)
            raise
        except BaseException:
            _remove_empty(folder)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _hidden_name(name: str) -> str:
    """Always the same for a target, so that the next run finds what is left."""
    raw = os.fsencode(name)
    if len(raw) > _LONGEST_NAME:
        raw = raw[: _LONGEST_NAME - 20] + b"-" + sha256(raw).hexdigest()[:16].encode()
    return f".{os.fsdecode(raw)}.ckptsurg"


def _lock(descriptor: int, folder: Path, label: str) -> None:
    try:
        is_ours = disk.claim(descriptor)
    except OSError as failure:
        if any(folder.iterdir()):
            message = f"{label}: {shown(folder)} is there, and whether another run uses it cannot be told"
            hint = f"the file system has no locks ({failure.strerror}); remove the folder if no other run is at work"
            raise SystemFailure(message, hint=hint) from None
        return
    if not is_ours:
        hint = "wait until it has ended, or choose another output"
        raise UsageError(f"{label}: another run is at work on this output", hint=hint)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        disk.remove_folder(folder)
