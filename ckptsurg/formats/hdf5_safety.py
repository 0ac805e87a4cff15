"""What a stranger's file could make HDF5 do, refused before: loop or crash, read other files, give out without end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, SystemFailure
from ..wording import shown
from .expanding import refuse_expanding

if TYPE_CHECKING:
    import h5py

__all__ = ["examine_hdf5", "refuse_cut_archive", "try_out"]

_PROGRAM = Path(__file__).with_name("hdf5_trial.py")
#: What a trial may take: seconds of processor time, so many, and one more for so many bytes of the file; and bytes of
#: memory, so many, and so many more for each of the file.
FREE_SECONDS, BYTES_PER_SECOND = 2, 5_000_000
FREE_MEMORY, MEMORY_PER_BYTE = 1 << 27, 10
#: What a program that crashes, or takes too long, ends with.
_FATAL = [-signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL, -signal.SIGSEGV, -signal.SIGXCPU]
_ZIP_BEGINS = b"PK\x03\x04"
_CUT_SHORT = re.compile(r"truncated file: eof = (\d+), .*stored_eof = (\d+)")
_AGAIN = "fetch it or save it again"


def refuse_cut_archive(path: Path, label: str) -> None:
    """Refuse an archive that lacks its end, which h5py would be asked about, and a pointer to a file.

    Raises:
        CheckpointError: if it is one.
    """
    with path.open("rb") as file:
        prefix = file.read(64)
    if prefix.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label}: is a Git LFS pointer, not the file itself", hint="run `git lfs pull`")
    if prefix.startswith(_ZIP_BEGINS) and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{label}: the archive is damaged or cut short", hint=_AGAIN)


def try_out(path: Path, member: str, label: str) -> None:
    """Refuse what HDF5 does not come back from: on a damaged file it loops or crashes, in whatever process reads it.

    Args:
        path: The file.
        member: What to read of it, if it is an archive.
        label: How messages call it.

    Raises:
        CheckpointError: if HDF5 cannot read it, crashes, or takes too much time or memory.
        SystemFailure: if there is no process to try it out in.
    """
    size = path.stat().st_size
    limits = FREE_SECONDS + size // BYTES_PER_SECOND, FREE_MEMORY + MEMORY_PER_BYTE * size
    command = [sys.executable, "-P", str(_PROGRAM), str(path), member, *map(str, limits)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment)  # noqa: S603 - ours
    except OSError as failure:
        raise SystemFailure(f"{label}: no process to try it out in: {failure.strerror}") from None
    if done.returncode == 0:
        return
    text = " ".join(done.stdout.decode(errors="replace").split())
    if "file signature not found" in text:
        with path.open("rb") as file:
            prefix = file.read(4)
        found = f"0x{prefix.hex()}" if prefix else "an empty file"
        raise CheckpointError(f"{label}: expected a file of Keras, found {found}", hint=_AGAIN)
    if cut := _CUT_SHORT.search(text):
        sizes = f"expected {int(cut[2]):,} bytes, found {int(cut[1]):,}"
        raise CheckpointError(f"{label}: is cut short: {sizes}", hint=_AGAIN)
    if not text and done.returncode not in _FATAL:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise SystemFailure(f"{label}: the process to try it out in failed: {shown(reason or done.returncode)}")
    reason = f"HDF5 cannot read it: {shown(text)}" if text else "HDF5 crashes on it, or reads without end"
    raise CheckpointError(f"{label}: is damaged: {reason}", hint=_AGAIN)


def examine_hdf5(file: h5py.File, label: str) -> None:
    """Refuse what would have HDF5 read another file, or give out far more than there is.

    Raises:
        CheckpointError: if it would.
    """
    import h5py

    declared = stored = 0
    links: list[tuple[str, object]] = []
    file.visititems_links(lambda name, link: links.append((name, link)))
    for name, link in links:
        if not isinstance(link, h5py.HardLink):
            raise CheckpointError(f'{label}: "{shown(name)}" is a link to elsewhere; Keras writes none')
        one = file[name]
        if not isinstance(one, h5py.Dataset):
            continue
        if one.external or one.is_virtual:
            raise CheckpointError(f'{label}: "{shown(name)}" has its values in other files; Keras writes no such')
        declared, stored = declared + one.nbytes, stored + one.id.get_storage_size()
    refuse_expanding(label, declared, stored)
