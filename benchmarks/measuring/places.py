"""Where things are measured: a folder, and file systems in an image that is mounted for the time being."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MAKE = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q"],
}
_BLOCK_SIZE = re.compile(r"blocks? of (\d+) bytes")
_EXTENT = re.compile(r"^\s*\d+:\s*\d+\.\.\s*\d+:\s*\d+\.\.\s*\d+:\s*(\d+):(.*)$")


class NotHere(Exception):
    """Why a file system cannot be measured on this machine."""


@dataclass(frozen=True)
class Place:
    name: str  # of the file system
    folder: Path
    reflinks: bool  # whether files can share extents


def own_file_system(folder: Path) -> str:
    done = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


@contextmanager
def place(name: str, folder: Path, gigabytes: float) -> Iterator[Place]:
    """The folder itself, if that is its file system; else an image in it with room for checkpoints of that size.

    Raises:
        NotHere: It cannot be made or mounted.
    """
    if name == own_file_system(folder):
        within = folder / "measured"
        within.mkdir()
        try:
            yield Place(name, within, _reflinks(within))
        finally:
            shutil.rmtree(within)
    else:
        with _image(name, folder, int(4e9 * gigabytes + 2e9)) as mounted:
            yield Place(name, mounted, _reflinks(mounted))


@contextmanager
def _image(name: str, folder: Path, size: int) -> Iterator[Path]:
    """Sparse, so it takes what is written. Without a cache of its own, so that memory holds each byte once."""
    if name not in _MAKE:
        raise NotHere(f"the folder is not on {name}, and images are made of {', '.join(sorted(_MAKE))} alone")
    if os.geteuid() != 0:
        raise NotHere("only root mounts an image")
    if absent := [tool for tool in (_MAKE[name][0], "losetup", "mount") if shutil.which(tool) is None]:
        raise NotHere(f"{absent[0]} is not installed")
    image, mounted, device = folder / f"{name}.img", folder / name, ""
    try:
        with image.open("wb") as file:
            file.truncate(size)
        _do(*_MAKE[name], str(image))
        mounted.mkdir()
        device = _do("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        _do("mount", device, str(mounted))
        yield mounted
    finally:
        with _undisturbed():
            _unmount(mounted)
            if device:
                _do("losetup", "--detach", device)
            if mounted.exists():
                mounted.rmdir()
            image.unlink(missing_ok=True)


def _unmount(mounted: Path) -> None:
    """For some seconds it may be busy with what a process that was killed has not written yet."""
    for _ in range(100):
        if not os.path.ismount(mounted):
            return
        subprocess.run(["umount", mounted], capture_output=True, check=False)
        time.sleep(0.1)
    _do("umount", str(mounted))


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not leave an image mounted."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reflinks(folder: Path) -> bool:
    original, clone = folder / "original", folder / "clone"
    original.write_bytes(bytes(1 << 16))
    done = subprocess.run(["cp", "--reflink=always", original, clone], capture_output=True, check=False)
    for file in (original, clone):
        file.unlink(missing_ok=True)
    return done.returncode == 0


def shared_bytes(folder: Path) -> tuple[int, int]:
    """How many bytes the checkpoint in a folder has, and how many of them lie in extents that another file has too."""
    subprocess.run(["sync"], check=True)  # what is not on the disk has no extents
    total = shared = 0
    for file in sorted(folder.rglob("*.safetensors")):
        listed = subprocess.run(["filefrag", "-v", file], capture_output=True, text=True, check=True).stdout
        found = _BLOCK_SIZE.search(listed)
        block = int(found[1]) if found else 4096
        size = file.stat().st_size
        of_file = sum(
            int(extent[1]) * block
            for extent in map(_EXTENT.match, listed.splitlines())
            if extent and "shared" in extent[2]
        )
        total, shared = total + size, shared + min(of_file, size)
    return total, shared
