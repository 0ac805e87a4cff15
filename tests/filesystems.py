"""File systems of other kinds than the one that tests lie on; to mount them takes root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

#: How an image of each kind is made.
_MADE_BY = {
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
}
_IMAGE_BYTES = 400 << 20


def as_root() -> list[str]:
    """What comes before a command that only root may give."""
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


@contextmanager
def mounted(folder: Path, kind: str, options: str = "size=400m") -> Iterator[Path]:
    """A new file system.

    Args:
        folder: Where it is mounted; is made.
        kind: ``ext4``, ``xfs``, ``btrfs``, in an image on a loop device; ``tmpfs``, in memory; or ``overlay``, over a
            folder ``below`` beside it.
        options: Of one in memory.
    """
    folder.mkdir()
    with ExitStack() as stack:
        if kind == "tmpfs":
            source = ["-t", kind, "-o", options, "none"]
        elif kind == "overlay":
            # What an overlay writes to is no overlay itself, as the file system of a container is.
            upper = stack.enter_context(mounted(folder.with_name(f"{folder.name}.upper"), "tmpfs"))
            layers = {"lowerdir": folder.with_name("below"), "upperdir": upper / "files", "workdir": upper / "work"}
            for layer in layers.values():
                layer.mkdir(exist_ok=True)
            source = ["-t", kind, "-o", ",".join(f"{key}={layer}" for key, layer in layers.items()), "none"]
        else:
            image = folder.with_name(f"{folder.name}.image")
            stack.callback(image.unlink)
            with image.open("wb") as file:
                file.truncate(_IMAGE_BYTES)
            subprocess.run([*_MADE_BY[kind], image], check=True)
            source = ["-o", "loop", str(image)]
        subprocess.run([*as_root(), "mount", *source, folder], check=True)
        stack.callback(subprocess.run, [*as_root(), "umount", folder], check=True)
        subprocess.run([*as_root(), "chmod", "777", folder], check=True)
        yield folder
