"""What torch takes on trust in an archive, looked at before: lengths, names, sizes, and what its pickle would make."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

from ..errors import CheckpointError
from ..wording import shown
from .expanding import refuse_expanding
from .pickles import memory_for
from .saved_by_torch import AGAIN
from .storages import storages_in

__all__ = ["examined"]

_ZIP_BEGINS, _PICKLE_BEGINS = b"PK\x03\x04", b"\x80"
#: What stands before a member: a signature, and the lengths of its name and of what else stands there.
_LOCAL = struct.Struct("<4s22xHH")
#: The flag of a member that has its check sum behind it; what that begins with, if anything; its lengths.
_SUM_BEHIND, _SUM_BEGINS, _SUM_LENGTHS = 8, b"PK\x07\x08", (12, 16, 20, 24)
_IS_FOLDER = 0x10
#: So much larger than its archive may a pickle be, in bytes, in one that was packed again with compression.
MORE_PICKLE = 1 << 24
#: In the format before ZIP: a magic number, a version, the system, what was saved, and the storages' keys.
_MAGIC_NUMBER, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_NUMBER_BYTES = 8


def examined(file: BinaryIO, size: int, label: str) -> bool:
    """Refuse what torch would crash on, or would take far more memory for than there is of it.

    Args:
        file: The archive, at its beginning.
        size: Of the archive, in bytes.
        label: How messages call it.

    Returns:
        Whether the tensors lie in it as they are, so that it can be mapped.

    Raises:
        CheckpointError: if it is no archive, or no good one.
        Exception: whatever else a pickle or ZIP archive that is no good makes Python raise.
    """
    prefix = file.read(64)
    file.seek(0)
    if prefix.startswith(_ZIP_BEGINS):
        return _examine_zip(file, size, label)
    if not prefix.startswith(_PICKLE_BEGINS):
        _refuse_other(prefix, label)
    if tarfile.is_tarfile(file):
        raise CheckpointError(f"{label}: is in the format of PyTorch 0.1", hint="save it again with torch.save")
    file.seek(0)
    storages = storages_in(file, memory_for(size), (_MAGIC_NUMBER, _VERSION, None, None))
    if None not in storages.values():
        needed = file.tell() + sum(_NUMBER_BYTES + nbytes for nbytes in storages.values() if nbytes is not None)
        if needed > size:
            raise CheckpointError(
                f"{label}: is cut short: expected at least {needed:,} bytes, found {size:,}", hint=AGAIN
            )
    return False


def _refuse_other(prefix: bytes, label: str) -> None:
    if prefix.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label}: is a Git LFS pointer, not the file itself", hint="run `git lfs pull`")
    found = f"0x{prefix[:4].hex()}" if prefix else "an empty file"
    raise CheckpointError(f"{label}: expected an archive of torch.save, found {found}", hint=AGAIN)


def _examine_zip(file: BinaryIO, size: int, label: str) -> bool:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise CheckpointError(f"{label}: the archive is damaged or cut short", hint=AGAIN) from None
    members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
    if "constants.pkl" in members:
        raise CheckpointError(
            f"{label}: is a TorchScript archive, which holds code",
            hint="torch.save(torch.jit.load(...).state_dict(), ...) saves its weights",
        )
    if "data.pkl" not in members:
        raise CheckpointError(f"{label}: is a ZIP archive, but none of torch.save", hint=AGAIN)
    if len({name.lower() for name in members}) < len(archive.infolist()):  # torch does not tell cases apart
        raise CheckpointError(f"{label}: two members of the archive have one name", hint=AGAIN)
    if any(one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for one in members.values()):
        raise CheckpointError(f"{label}: is packed in a way that torch does not read", hint="pack it again as it was")
    packed = sum(one.compress_size for one in members.values())
    refuse_expanding(label, sum(one.file_size for one in members.values()), packed)
    _refuse_misplaced(file, archive, label)
    pickled = members["data.pkl"]
    if pickled.file_size > size + MORE_PICKLE:
        raise CheckpointError(
            f"{label}: what says where the tensors are would take {pickled.file_size:,} bytes, of an archive of "
            f"{size:,}; it is no model's"
        )
    storages = storages_in(archive.read(pickled), memory_for(size))
    _refuse_other_sizes(storages, members, label)
    is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members.values())
    return is_stored and None not in storages.values()


def _refuse_misplaced(file: BinaryIO, archive: zipfile.ZipFile, label: str) -> None:
    """Refuse members that do not lie one behind another: torch goes by what stands before each, and checks no sums."""
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    ends = [*(member.header_offset for member in members[1:]), archive.start_dir]
    for member, end in zip(members, ends, strict=True):
        file.seek(member.header_offset)
        before = file.read(_LOCAL.size)
        signature, name_length, more_length = _LOCAL.unpack(before) if len(before) == _LOCAL.size else (b"", 0, 0)
        file.seek(name_length + more_length + member.compress_size, os.SEEK_CUR)
        gap = end - file.tell()
        has_sum_behind = bool(member.flag_bits & _SUM_BEHIND)
        behind = file.read(gap).removeprefix(_SUM_BEGINS) if has_sum_behind and gap in _SUM_LENGTHS else b""
        is_right = behind.startswith(struct.pack("<I", member.CRC)) if has_sum_behind else gap == 0
        name = shown(member.filename.partition("/")[2])
        if signature != _ZIP_BEGINS or not is_right:
            raise CheckpointError(f"{label}: is damaged: {name} is not where the archive says", hint=AGAIN)
        if member.external_attr & _IS_FOLDER:  # of which torch reads nothing, and takes whatever was in memory
            raise CheckpointError(f"{label}: is damaged: {name} is a folder, by the archive", hint=AGAIN)


def _refuse_other_sizes(storages: Mapping[str, int | None], members: Mapping[str, zipfile.ZipInfo], label: str) -> None:
    """Mapped, a storage is cut out of the file by the size that the pickle gives it, whatever it reaches into."""
    for key, size in storages.items():
        found = members[f"data/{key}"].file_size if f"data/{key}" in members else None
        if size is not None and size != found:
            said = "is not there" if found is None else f"has {found:,} bytes, expected {size:,}"
            raise CheckpointError(f"{label}: is damaged: the storage {shown(key)} {said}", hint=AGAIN)
