"""One run at a time: a hidden folder beside a target, locked by the run that has it.

The lock is on the folder itself (``flock(2)``): whoever is killed gives it up, and no lock file is left behind.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import weakref
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from . import disk
from .errors import SystemFailure, UsageError
from .wording import counted, enumerate_names, shown

__all__ = ["Claim", "claim_beside", "is_hidden_name", "is_plain", "journal_beside"]

_log = logging.getLogger("ckptsurg")

#: Bytes of a target's name that its hidden folder's name repeats; file systems take 255 in all.
_LONGEST_NAME = 200
#: Of a name that another run takes away each time.
_MOST_TRIES = 100
_OUTPUT, _WITHDRAWN, _JOURNAL, _MARK = "output", "withdrawn-", "journal-", "run-"


class Claim:
    """A folder that no other run uses, until it is released or forgotten.

    Attributes:
        folder: The folder.
        output: Where in it an output is staged.
        descriptor: Of the folder; it holds the lock.
        release: Gives the lock up; it may be called again.
    """

    def __init__(self, target: Path, folder: Path, descriptor: int) -> None:
        self.folder, self.output = folder, folder / _OUTPUT
        self.descriptor, self._target = descriptor, target
        self.release = weakref.finalize(self, os.close, descriptor)
        _held.add(self)

    def withdrawn(self, path: Path) -> Path:
        """Where a file is kept that stood beside the target."""
        return self.folder / f"{_WITHDRAWN}{path.name}"

    def mark(self) -> Path:
        """A file that only this run has, by which other machines tell that the folder is this one."""
        path = self.folder / f"{_MARK}{uuid4().hex}"
        os.close(disk.create(path))
        return path

    def journals(self) -> list[Path]:
        """Those that runs have left."""
        return sorted(self.folder.glob(f"{_JOURNAL}*"))

    def sweep(self, *, spare_output: bool = False) -> None:
        """Take away what a run that was killed has left, and put back what it took away before it published anything.

        Args:
            spare_output: Whether what it has staged stays, with its journals.

        Raises:
            SystemFailure: if there is anything that no run of ours has left.
            OSError: if the system fails.
        """
        found = sorted(path.name for path in self.folder.iterdir())
        strange = [name for name in found if name != _OUTPUT and not name.startswith((_WITHDRAWN, _JOURNAL, _MARK))]
        if strange:
            message = f"{shown(self.folder)}: a folder of ours, but in it is what is not: {enumerate_names(strange)}"
            raise SystemFailure(message, hint="move that away, or choose another output")
        if not found:
            return
        # What is here may be an earlier output whose successor is not yet on disk under its name.
        disk.flush_folder(self.folder.parent)
        for name in found:
            self._put_back(self.folder / name)
        if spare_output:
            self._remove_all(path for path in self.journals() if not is_plain(path))
            return
        left = sum(not path.is_dir() or path.is_symlink() for path in self.folder.rglob("*"))
        self._remove_all(self.folder.iterdir())
        if left:
            _log.info("%s: removed %s that a stopped run left", shown(self.folder), counted(left, "file"))

    def _remove_all(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                disk.remove_all(path)
            else:
                disk.remove(path)

    def _put_back(self, path: Path) -> None:
        """Of a lone file whose successor is still staged, the manifest belongs beside it."""
        name = path.name.removeprefix(_WITHDRAWN)
        if name in (path.name, self._target.name) or not (self.output / self._target.name).exists():
            return
        with suppress(FileExistsError):
            disk.move(path, self.folder.parent / name)
            disk.flush_folder(self.folder.parent)

    def is_held(self) -> bool:
        """Whether the folder under its name is still the one that is locked, and by this process."""
        try:
            return self.release.alive and os.path.samestat(self.folder.lstat(), os.fstat(self.descriptor))
        except OSError:
            return False


def journal_beside(output: Path, rank: int) -> Path:
    """Where a rank keeps the journal of an output that is staged."""
    return output.parent / f"{_JOURNAL}{rank}"


def is_plain(path: Path) -> bool:
    """Whether it is a file and nothing else, under no other name too.

    Raises:
        FileNotFoundError: if it is not there.
    """
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


_held: weakref.WeakSet[Claim] = weakref.WeakSet()


def _let_go() -> None:
    """A child process has no part in its parent's runs; what it inherited would hold the lock after them."""
    for claim in list(_held):
        claim.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def claim_beside(target: Path) -> Claim:
    """The folder that only one run to a target has at a time; what is in it was left by one that was killed.

    Raises:
        UsageError: if another run has it.
        SystemFailure: if it cannot be used without danger.
        OSError: if the system fails.
    """
    folder, label = target.parent / _hidden_name(target.name), shown(target)
    for _ in range(_MOST_TRIES):
        is_new = False
        try:
            with suppress(FileExistsError):
                disk.make_folder(folder, 0o700)
                is_new = True
            claim = _opened(target, folder)
        except BaseException:
            _remove_empty(folder)
            raise
        if claim is None:
            continue  # the run that had it has just ended
        try:
            if not is_new and folder.stat().st_uid != os.geteuid():
                message = f"{label}: {shown(folder)} is another user's, who could change what is in it"
                raise SystemFailure(message, hint="remove it if no other run is at work, or choose another output")
            _lock(claim, folder, label, is_new=is_new)
            if claim.is_held():
                return claim
        except (UsageError, SystemFailure):
            claim.release()
            raise
        except BaseException:
            _remove_empty(folder)
            claim.release()
            raise
        claim.release()
    raise SystemFailure(f"{label}: {shown(folder)} is taken away again and again", hint="choose another output")


def _opened(target: Path, folder: Path) -> Claim | None:
    try:
        return Claim(target, folder, disk.open_folder(folder))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        message = f"{shown(target)}: {shown(folder)} is where it would be staged, and is no folder"
        raise SystemFailure(message, hint="move that away, or choose another output") from None


def is_hidden_name(name: str) -> bool:
    """Whether a folder of that name would be one that outputs are staged in."""
    return re.fullmatch(r"\..*\.ckptsurg", name, re.DOTALL) is not None


def _hidden_name(name: str) -> str:
    """Always the same for a target, so that the next run finds what is left."""
    raw = os.fsencode(name)
    if len(raw) > _LONGEST_NAME:
        raw = raw[: _LONGEST_NAME - 20] + b"-" + sha256(raw).hexdigest()[:16].encode()
    return f".{os.fsdecode(raw)}.ckptsurg"


def _lock(claim: Claim, folder: Path, label: str, *, is_new: bool) -> None:
    try:
        is_ours = disk.claim(claim.descriptor)
    except OSError as failure:
        if not is_new:  # where there are no locks, whoever makes the folder has it
            message = f"{label}: {shown(folder)} is there, and whether another run uses it cannot be told"
            hint = f"the file system has no locks ({failure.strerror}); remove the folder if no other run is at work"
            raise SystemFailure(message, hint=hint) from None
        return
    if not is_ours:
        hint = "wait until it has ended, or choose another output"
        raise UsageError(f"{label}: another run is at work on this output", hint=hint)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        disk.remove_folder(folder)
