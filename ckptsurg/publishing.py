"""How an output becomes visible: staged beside its target, flushed to disk, renamed into place.

Until the rename nothing of an output is under its name, after it everything is. What a run that fails has staged, it
takes away; what a run that is killed has staged, the next run to the same target does.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from . import disk
from .checkpoints import StoredFile, open_regular
from .claiming import claim_beside, is_plain
from .copying import Target
from .errors import CheckpointError, CkptsurgError, SystemFailure, UsageError, system_failures
from .journal import recorded_by
from .staged_folder import StagedFolder
from .targets import refuse_manifest_target, refuse_stranger
from .wording import shown

__all__ = ["Staging", "publish_document", "staged"]

_log = logging.getLogger("ckptsurg")

#: Of a clean-up that must come to its end; so that one that fails each time ends too.
_MOST_INTERRUPTIONS = 8


class Staging(StagedFolder):
    """A hidden folder beside the target, in which the output is made, and which is this run's alone.

    Attributes:
        folder: The folder, inside one that is never published.
        recorded: Digests of tensors that a run which was stopped has brought to their places, by name; it was the same
            run, and they are not checked.

    Args:
        target: What will be published.
        part_of: The staged output that it is published with.
        run: The identity of the run, if it is to go on with what a stopped one has staged, and to leave what it has
            staged itself if it is stopped.

    Raises:
        UsageError: if another run is at work on the same target.
        SystemFailure: if the folder cannot be used without danger.
        OSError: if the system fails.
    """

    def __init__(self, target: Path, part_of: Staging | None = None, run: str | None = None) -> None:
        self._claim = claim_beside(target)
        super().__init__(self._claim.output)
        self._is_published, self._part_of, self._can_be_resumed = False, part_of, run is not None
        self.recorded: Mapping[str, str] = {}
        self._prepared: set[str] = set()
        self._withdrawn: list[tuple[Path, Path]] = []
        self._unflushed: Path | None = None
        self._holds_old = self._holds_withdrawn = False
        try:
            if run is not None and self.folder.is_dir() and not self.folder.is_symlink():
                self.recorded = recorded_by(self._claim.journals(), run)
            self._claim.sweep(spare_output=bool(self.recorded))
        except BaseException:
            self._claim.release()
            raise
        try:
            if not self.recorded:
                disk.make_folder(self.folder)
            self.open()
        except BaseException:
            self.remove()
            raise

    @property
    def published(self) -> bool:
        """Whether anything of it may have its final name, or of what it is a part of."""
        return self._is_published or (self._part_of is not None and self._part_of.published)

    def remove(self) -> None:
        """Take the folder away, with what is left in it; what was withdrawn comes back if nothing was published."""
        try:
            _uninterrupted(self._clear)
        finally:
            self._claim.release()

    def _clear(self) -> None:
        self.close()
        if not self._claim.is_held():
            return  # somebody took the folder away, or this is a child of the process that has it
        for held, target in () if self.published else self._withdrawn:
            self._put_back(held, target)
        with suppress(OSError):
            self._flush()
        if self._holds_withdrawn:
            _log.warning("%s: holds what could not be put back", shown(self._claim.folder))
        elif self._can_be_resumed and not self.published and self._claim.journals():
            _log.warning("%s: holds what is done so far; --resume goes on with it", shown(self._claim.folder))
        elif self._holds_old:
            _log.warning("%s: holds the earlier output, for the new one may not be on disk", shown(self.folder))
        else:
            disk.remove_all(self._claim.folder)
            if self._claim.is_held():
                _log.warning("%s: could not be removed; remove it yourself", shown(self._claim.folder))

    def _put_back(self, held: Path, target: Path) -> None:
        if not os.path.lexists(held):
            return
        try:
            disk.move(held, target)
            disk.flush_folder(target.parent)
        except OSError:
            self._holds_withdrawn = os.path.lexists(held)

    def _flush(self) -> None:
        """Have the name of what was published on disk. One that failed is not tried again: it might seem to work."""
        if self._unflushed is None:
            return
        try:
            disk.flush_folder(self._unflushed)
        except OSError:
            self._unflushed = None
            raise
        self._unflushed, self._holds_old = None, False

    def mark(self) -> Path:
        """What other ranks are given to find the folder by, as of ``StagedFolder.of_first``."""
        return self._claim.mark().absolute()

    def held(self) -> int:
        """How much space what a stopped run has staged takes, in bytes."""
        return sum(path.lstat().st_blocks * 512 for path in self.folder.rglob("*")) if self.recorded else 0

    def keep_only(self, names: Collection[str]) -> None:
        """Of what a stopped run has staged, remove all but files of these names."""
        for path in [path for path in self.folder.rglob("*") if not path.is_dir() or path.is_symlink()]:
            if path.relative_to(self.folder).as_posix() not in names:
                disk.remove(path)
        for place, folders, _ in os.walk(self.folder, topdown=False):
            for folder in folders:
                with suppress(OSError):  # of one that holds what is kept
                    disk.remove_folder(Path(place, folder))

    def prepare(self, name: str, size: int) -> None:
        """A file of a size in bytes, of which any rank may bring a part; what is in one that is there by now stays.

        Not if it has other names too: to write to it would be to write to those.
        """
        path = self._place(name)
        self._prepared.add(name)
        is_ours = False
        with suppress(FileNotFoundError):
            is_ours = is_plain(path)
            if not is_ours:
                disk.remove(path)
        descriptor = disk.reopen(name, self._descriptor) if is_ours else disk.create(path)
        try:
            disk.set_size(descriptor, size)
        finally:
            os.close(descriptor)

    def target(self, name: str, size: int, missing: int) -> Target:
        """As of ``StagedFolder``; a file that was not prepared is made."""
        return super().target(name, size, missing) if name in self._prepared else self.create(name, size)

    def create(self, name: str, size: int) -> Target:
        """A new file of a size in bytes, on disk once it is whole."""
        return self._opened(disk.create(self._place(name)), size)

    def refuse_unless_whole(self, sizes: Mapping[str, int]) -> None:
        """Raise OSError if a file has not its size in bytes, whoever wrote to it."""
        for name, size in sizes.items():
            if (there := (self.folder / name).lstat().st_size) != size:
                raise OSError(errno.EIO, f"{shown(name)} has {there:,} bytes, where {size:,} were written")

    def _place(self, name: str) -> Path:
        """The path of a file, the folder of which is there."""
        self._refuse_if_removed()
        path = self.folder / name
        _make_folders(path.parent)
        return path

    def _refuse_if_removed(self) -> None:
        """Somebody may have taken the folder away: it is not made anew, with a part in it, nor is another's used."""
        if not (self._claim.is_held() and self.folder.is_dir()):
            raise FileNotFoundError(errno.ENOENT, "its staging folder was removed")

    def write(self, name: str, content: bytes) -> None:
        """A new small file."""
        self.create(name, len(content)).write(content, 0)

    def copy(self, name: str, source: Path) -> None:
        """A copy of a small file of the base."""
        try:
            descriptor, status = open_regular(source, os.O_NOFOLLOW)
        except UsageError:
            raise CheckpointError(f"{shown(source)}: was removed meanwhile; nothing was published") from None
        with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
            size, position = status.st_size, 0
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
        if self.recorded:
            path.unlink(missing_ok=True)
        try:
            disk.link(Path(os.path.realpath(source)), path)  # of a symbolic link there would be another symbolic link
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
            disk.remove(path)

    def withdraw(self, target: Path) -> None:
        """Take away a manifest that would otherwise stand beside an output that it does not describe."""
        refuse_manifest_target(target, overwrite=True)
        held = self._claim.withdrawn(target)
        self._withdrawn.append((held, target))
        with suppress(FileNotFoundError):
            disk.replace(target, held)
            disk.flush_folder(target.parent)

    def publish_folder(self, out: Path, *, overwrite: bool) -> None:
        """Rename the staging folder to its target."""
        self._refuse_if_removed()
        for place, _, _ in os.walk(self.folder):
            disk.flush_folder(Path(place))
        with self._publishing(out):
            if overwrite and out.is_dir() and any(out.iterdir()):
                refuse_stranger(out)  # who may have come since it was looked at first
                self._holds_old = True
                _exchange(self.folder, out)
            else:
                with suppress(OSError):
                    disk.remove_folder(out)  # an empty folder counts as absent; of any other the rename will tell
                self._move(self.folder, out)
        self._flush()

    def publish_file(self, name: str, target: Path, *, overwrite: bool) -> None:
        """Rename one staged file to its target."""
        self._refuse_if_removed()
        with self._publishing(target):
            if overwrite:
                disk.replace(self.folder / name, target)
            else:
                self._move(self.folder / name, target)
        self._flush()

    def _move(self, source: Path, target: Path) -> None:
        try:
            disk.move(source, target)
        except FileExistsError:
            done = self._part_of is not None and self._part_of.published
            consequence = "the weights are published without it" if done else "nothing was published"
            raise UsageError(f"{shown(target)}: appeared while the output was made; {consequence}") from None

    @contextmanager
    def _publishing(self, target: Path) -> Iterator[None]:
        """A rename that fails has published nothing; of one that is interrupted nobody knows."""
        self._is_published, self._unflushed = True, target.parent
        try:
            yield
        except (CkptsurgError, OSError):
            self._is_published, self._holds_old = False, False
            raise


@contextmanager
def staged(
    target: Path,
    size: int,
    spared: Callable[[Staging], int] | None = None,
    part_of: Staging | None = None,
    run: str | None = None,
) -> Iterator[Staging]:
    """A staging folder beside a target, on the same file system; it is gone at the end, whatever happens.

    Args:
        target: What will be published.
        size: Of all of it, in bytes; refused at once where the file system says that it has less.
        spared: How many bytes of it will take no room, asked if there is too little.
        part_of: The staged output that it is published with.
        run: As of ``Staging``: what is staged then stays if the run fails.

    Raises:
        UsageError: if another run is at work on the target.
        SystemFailure: if the system fails, with nothing published.
    """
    label = shown(target)
    with system_failures(label, "nothing was published"):
        try:
            _make_folders(target.parent)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{label}: a part of the path is a file, not a folder") from None
        staging = Staging(target, part_of, run)
    try:
        space = os.statvfs(target.parent)
        is_known = space.f_blocks > 0  # of a file system without a limit, none is
        if is_known and size > (available := space.f_bavail * space.f_frsize):
            size -= (spared(staging) if spared is not None else 0) + staging.held()
        if is_known and size > available:
            raise SystemFailure(f"{label}: needs {size:,} bytes, but the file system has {available:,} left")
        yield staging
    except OSError as failure:
        done = "what was published may not be whole or on disk" if staging.published else "nothing was published"
        raise SystemFailure(f"{label}: {failure.strerror or failure}; {done}") from failure
    finally:
        staging.remove()


def publish_document(content: bytes, path: Path, *, overwrite: bool) -> None:
    """Publish a manifest or statement by itself, in the place of an earlier one if it may be.

    Raises:
        UsageError: if something appears there meanwhile, or another run is at work.
        SystemFailure: if the system fails.
    """
    with staged(path, len(content)) as staging:
        staging.write(path.name, content)
        staging.publish_file(path.name, path, overwrite=overwrite)


def _uninterrupted(action: Callable[[], object]) -> None:
    """Do what may be begun anew, to its end, whoever interrupts; the interruption is raised again afterwards."""
    interruption: BaseException | None = None
    for _ in range(_MOST_INTERRUPTIONS):
        try:
            action()
            break
        except BaseException as raised:  # signal handlers raise what they like
            interruption = raised
    if interruption is not None:
        raise interruption


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it where they are missing; the names of those that are made are on disk."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        with suppress(FileExistsError):
            disk.make_folder(place)
        disk.flush_folder(place.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _exchange(staged: Path, out: Path) -> None:
    try:
        disk.exchange(staged, out)
    except (NotImplementedError, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno != errno.EXDEV:  # as overlayfs says of what lies below it
            raise
        message = f"{shown(out)}: the file system cannot exchange two folders; nothing was published"
        raise SystemFailure(message, hint="remove the old output first, or choose another place") from None
