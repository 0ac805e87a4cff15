"""All that touches a disk's safety: staging, flushing to disk, publishing by rename.

An output is staged in a hidden folder beside its target, flushed, and renamed into place. Until then nothing of it
is visible under its name; a run that fails takes its staging folder away.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import disk
from .checkpoints import Checkpoint, StoredFile
from .copying import Target
from .errors import CheckpointError, SystemFailure, UsageError, system_failures
from .manifest import is_file_output, manifest_path
from .wording import shown

__all__ = ["Staging", "publish_manifest", "refuse_target", "staged"]

_OVERWRITE = "--overwrite (overwrite=True) replaces an earlier output"


# --- Targets ----------------------------------------------------------------------------------------


def refuse_target(out: Path, manifest: Path | None, base: Checkpoint, *, overwrite: bool) -> None:
    """Refuse an output that exists, or that would touch the base.

    Args:
        out: The output: a file whose name ends in ``.safetensors``, or else a folder.
        manifest: Where the manifest goes, if not to its own place.
        base: The base.
        overwrite: Whether an earlier output may be replaced.

    Raises:
        UsageError: if the output must not be written.
    """
    is_file = is_file_output(out)
    # A stale manifest in its usual place would describe other weights, even if the new one goes elsewhere.
    beside = [manifest_path(out)] if is_file else []
    beside += [manifest] if manifest is not None else []
    for target in (out, *beside):
        _refuse_base(target, base)
    if manifest is not None and _real(manifest).is_relative_to(_real(out)):
        raise UsageError(
            f"{shown(manifest)}: lies inside the output, which has its own freeze.json; choose another place"
        )
    if is_file and out.is_dir():
        raise UsageError(f"{shown(out)}: is a folder; the name of an output that ends in .safetensors is a file's")
    if not is_file and os.path.lexists(out):
        _refuse_folder(out, shown(out), overwrite=overwrite)
    if out.is_symlink():
        raise UsageError(f"{shown(out)}: is a link; give the path that it leads to")
    if is_file and os.path.lexists(out) and not overwrite:
        raise UsageError(f"{shown(out)}: exists already", hint=_OVERWRITE)
    for path in beside:
        _refuse_file(path, overwrite=overwrite)


def _refuse_base(target: Path, base: Checkpoint) -> None:
    itself = f"{shown(target)}: is the base, or a link to it; an output never replaces its base"
    hint = "if it is an earlier output that was linked to the base, remove it first"
    if base.folder is not None and _real(target) == _real(base.folder):
        raise UsageError(itself)
    with suppress(OSError):
        status = target.stat()
        if any((status.st_dev, status.st_ino) == (file.status.st_dev, file.status.st_ino) for file in base.files):
            raise UsageError(itself, hint=hint)
    if base.folder is not None and _real(target).is_relative_to(_real(base.folder)):
        raise UsageError(f"{shown(target)}: lies inside the base {base.label}; choose a place outside it")
    if any(_real(base.path_of(file)).is_relative_to(_real(target)) for file in base.files):
        raise UsageError(f"{shown(target)}: holds the base {base.label}; choose another place")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _refuse_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a place for a manifest that is taken by anything but a manifest."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UsageError(f"{shown(path)}: exists already", hint=_OVERWRITE)
    if not _is_manifest(path):
        raise UsageError(f"{shown(path)}: is no manifest of ckptsurg and is not replaced; choose another place")


def _refuse_folder(out: Path, label: str, *, overwrite: bool) -> None:
    if not out.is_dir():
        raise UsageError(f"{label}: is a file; an output whose name does not end in .safetensors is a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{label}: exists already and is not empty", hint=_OVERWRITE)
    if not _is_manifest(manifest_path(out)):
        raise UsageError(
            f"{label}: holds no freeze.json of ckptsurg, so it is not an earlier output and is not replaced",
            hint="remove the folder yourself if it may go",
        )


def _is_manifest(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return bool(json.loads(path.read_bytes())["tool"]["name"] == "ckptsurg")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


# --- Staging ----------------------------------------------------------------------------------------


class Staging:
    """A hidden folder beside the target, in which the output is made.

    Attributes:
        folder: The folder.
        published: Whether anything of it has its final name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.published = False
        self._targets: list[Target] = []

    def remove(self) -> None:
        """Take the folder away, with what is left in it."""
        for target in self._targets:
            target.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def create(self, name: str, size: int) -> Target:
        """A new file of a size in bytes, on disk once it is whole; closed at the end if it never is."""
        path = self._place(name)
        target = Target(disk.create(path), size)
        self._targets.append(target)
        return target

    def _place(self, name: str) -> Path:
        """The path of a new file. Somebody may have taken the folder away: it is not made anew, with a part in it."""
        path = self.folder / name
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its staging folder was removed", str(self.folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: bytes) -> None:
        """A new small file."""
        self.create(name, len(content)).write(content, 0)

    def copy(self, name: str, source: Path) -> None:
        """A copy of a small file of the base."""
        with source.open("rb") as file:
            size, position = os.fstat(file.fileno()).st_size, 0
            target = self.create(name, size)
            while position < size and (chunk := file.read(min(1 << 20, size - position))):
                target.write(chunk, position)
                position += len(chunk)
            has_grown = bool(file.read(1))
        if position != size or has_grown:
            raise CheckpointError(f"{shown(source)}: was changed while it was read; nothing was published")

    def link(self, name: str, source: Path, file: StoredFile) -> str | None:
        """Another name for a file of the base, on disk; or why there can be none."""
        path = self._place(name)
        try:
            path.hardlink_to(os.path.realpath(source))  # of a symbolic link there would be another symbolic link
        except OSError as failure:
            return failure.strerror or str(failure)
        if not os.path.samestat(path.lstat(), file.status):
            raise CheckpointError(f"{shown(source)}: was replaced while it was read; nothing was published")
        disk.flush(file.descriptor)
        return None

    def shares_with(self, file: StoredFile) -> bool:
        """Whether files here can share blocks with a file."""
        path = self._place("probe")
        descriptor = disk.create(path)
        try:
            return disk.clone_range(file.descriptor, 0, 0, descriptor, 0)
        finally:
            os.close(descriptor)
            path.unlink()

    def publish_folder(self, out: Path, *, overwrite: bool) -> None:
        """Rename the staging folder to its target."""
        for place, _, _ in os.walk(self.folder):
            disk.flush_folder(Path(place))
        if overwrite and out.is_dir() and any(out.iterdir()):
            _exchange(self.folder, out)
        else:
            with suppress(OSError):
                out.rmdir()  # an empty folder counts as absent; of any other the rename will tell
            _move(self.folder, out)
        self.published = True
        disk.flush_folder(out.parent)

    def publish_file(self, name: str, target: Path, *, overwrite: bool) -> None:
        """Rename one staged file to its target."""
        if overwrite:
            (self.folder / name).replace(target)
        else:
            _move(self.folder / name, target)
        self.published = True
        disk.flush_folder(target.parent)

    @staticmethod
    def withdraw(target: Path) -> None:
        """Remove what would otherwise stand beside an output that it does not describe."""
        with suppress(FileNotFoundError):
            target.unlink()
            disk.flush_folder(target.parent)


@contextmanager
def staged(target: Path, size: int, spared: Callable[[Staging], int] | None = None) -> Iterator[Staging]:
    """A staging folder beside a target, on the same file system; it is gone at the end, whatever happens.

    Args:
        target: What will be published.
        size: Of all of it, in bytes; refused at once where the file system says that it has less.
        spared: How many bytes of it will take no room, asked if there is too little.

    Raises:
        SystemFailure: if the system fails, with nothing published.
    """
    label = shown(target)
    with system_failures(label, "nothing was published"):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{label}: a part of the path is a file, not a folder") from None
        space = os.statvfs(target.parent)
        staging = Staging(target.parent / f".{target.name[:40]}.ckptsurg-{secrets.token_hex(6)}")
        staging.folder.mkdir()
    try:
        if size > (available := space.f_bavail * space.f_frsize):
            size -= spared(staging) if spared is not None else 0
        if size > available:
            raise SystemFailure(f"{label}: needs {size:,} bytes, but the file system has {available:,} left")
        yield staging
    except OSError as failure:
        done = "what was published may not be whole or on disk" if staging.published else "nothing was published"
        raise SystemFailure(f"{label}: {failure.strerror or failure}; {done}") from failure
    finally:
        staging.remove()


def publish_manifest(content: bytes, path: Path, *, overwrite: bool) -> None:
    """Publish a manifest by itself.

    Raises:
        UsageError: if the place is taken, and not to be overwritten or not by a manifest.
        SystemFailure: if the system fails.
    """
    _refuse_file(path, overwrite=overwrite)
    with staged(path, len(content)) as staging:
        staging.write(path.name, content)
        staging.publish_file(path.name, path, overwrite=overwrite)


def _move(source: Path, target: Path) -> None:
    try:
        disk.move(source, target)
    except FileExistsError:
        raise UsageError(f"{shown(target)}: appeared while the output was made; nothing was published") from None


def _exchange(staged: Path, out: Path) -> None:
    try:
        disk.exchange(staged, out)
    except NotImplementedError:
        message = f"{shown(out)}: this system cannot exchange two folders; remove the old output first"
        raise SystemFailure(message) from None
