"""The system calls by which something on a disk changes, and nothing else: no policy, no messages."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from .tensors import Buffer

__all__ = [
    "BLOCK_BYTES",
    "append",
    "begin_writeback",
    "claim",
    "clone_range",
    "create",
    "exchange",
    "flush",
    "flush_folder",
    "link",
    "make_folder",
    "move",
    "open_folder",
    "remove",
    "remove_all",
    "remove_folder",
    "reopen",
    "replace",
    "set_size",
    "write_all",
]

#: What file systems share extents in units of, in bytes.
BLOCK_BYTES = 4096

#: How often in a row the system may take nothing.
_MOST_IDLE = 8
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_FICLONERANGE = getattr(fcntl, "FICLONERANGE", 0x4020940D)  # named by Python 3.12 and later
_SYNC_FILE_RANGE_WRITE = 2


def create(path: Path) -> int:
    """A new file, open for writing; its mode follows the umask."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def set_size(descriptor: int, length: int) -> None:
    """Give a file its size in bytes, with holes where nothing is yet."""
    os.ftruncate(descriptor, length)


def open_folder(path: Path) -> int:
    """A folder, so that files are opened in it whatever becomes of its name; never one at the end of a link."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def reopen(name: str, folder: int) -> int:
    """A file that is there in an open folder, open for writing; never one at the end of a link."""
    return os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def append(path: Path, content: Buffer) -> None:
    """Write at the end of a file, which is made if it is not there; nothing of it need be on disk afterwards."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: Buffer, at: int) -> None:
    """Write everything at an offset.

    The system may take less than it is given. That is rare, and odd enough that what it says it took is given again.

    Raises:
        OSError: if it cannot, or takes nothing again and again.
    """
    parts = [(memoryview(content), at)]
    idle = 0
    while parts:
        view, at = parts.pop()
        count = os.pwrite(descriptor, view, at)
        if count == len(view):
            continue
        idle = 0 if count else idle + 1
        if idle > _MOST_IDLE:
            raise OSError(errno.EIO, "the system takes no more bytes, and does not say why")
        parts += [part for part in ((view[:count], at), (view[count:], at + count)) if part[0]]


def begin_writeback(descriptor: int, offset: int, length: int) -> None:
    """Have the system begin to write a range to disk, so that flushing later finds little to do.

    Where it cannot, flushing does it all; an error of the disk is kept for ``flush``.
    """
    sync_file_range = _libc("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if sync_file_range is not None:
        sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)


def clone_range(source: int, offset: int, length: int, target: int, at: int) -> bool:
    """Let two files share the blocks of a range (``ioctl_ficlonerange(2)``); whether they do now.

    Unlike ``copy_file_range(2)``, it never copies instead. Offsets and length are multiples of the file system's block,
    but for a length that ends with the source; 0 is all that is left of the source.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, offset, length, at))
    except OSError:
        return False  # another file system, or one that shares no blocks; whatever else it is, copying will meet it
    return True


def make_folder(path: Path, mode: int = 0o777) -> None:
    """A new folder; its mode follows the umask."""
    path.mkdir(mode)


def link(source: Path, path: Path) -> None:
    """Another name for a file."""
    path.hardlink_to(source)


def remove(path: Path) -> None:
    """Remove a file's name."""
    path.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder that is empty."""
    folder.rmdir()


def remove_all(folder: Path) -> None:
    """Remove a folder with all that is in it, also what is in folders that may not be written to."""
    with suppress(OSError):
        before = folder.lstat()
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.samestat(folder.lstat(), before):
            return  # somebody else's by now
        for place, _, _ in os.walk(folder):
            Path(place).chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)


def claim(folder: int) -> bool:
    """Lock a folder for as long as its descriptor is open (``flock(2)``); False if another process has it.

    Raises:
        OSError: if its file system has no locks.
    """
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def flush(descriptor: int) -> None:
    """Have a file on disk."""
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename, never onto something that exists.

    Raises:
        FileExistsError: if something does.
    """
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if source.is_dir():
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)  # never onto a folder that holds something
    else:
        link(source, target)  # never onto a file
        remove(source)


def replace(source: Path, target: Path) -> None:
    """Rename, in the place of a file that may exist."""
    source.replace(target)


def exchange(one: Path, other: Path) -> None:
    """Let two names change places in one step.

    Raises:
        NotImplementedError: if the system cannot.
    """
    if not _renameat2(one, other, _RENAME_EXCHANGE):
        raise NotImplementedError


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Call ``renameat2(2)``; False where system or file system does not have it."""
    renameat2 = _libc("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(target))


@cache
def _libc(name: str, *argument_types: Any) -> Callable[..., int] | None:
    """A function of the C library that Python has no name for; None where there is none."""
    if sys.platform != "linux" or (function := getattr(ctypes.CDLL(None, use_errno=True), name, None)) is None:
        return None
    function.argtypes = argument_types
    return function  # type: ignore[no-any-return]
