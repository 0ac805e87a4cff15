"""Where an output may go: never onto something else than an earlier output, nor onto its base."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint
from .claiming import is_hidden_name
from .errors import UsageError
from .manifest import MANIFEST_NAME, is_file_output, manifest_path
from .wording import shown

__all__ = [
    "refuse_manifest_target",
    "refuse_plan_target",
    "refuse_statement_target",
    "refuse_stranger",
    "refuse_target",
]

_OVERWRITE = "--overwrite (overwrite=True) replaces an earlier output"


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
        _refuse_hidden(target)
        _refuse_base(target, base)
    if base.path is not None:
        _refuse_hidden(base.path)
    if is_file and _is_manifest(out.parent / MANIFEST_NAME):
        message = f"{shown(out)}: lies in an earlier output, whose {MANIFEST_NAME} would not describe it"
        raise UsageError(message, hint="choose a place outside it")
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
        refuse_manifest_target(path, overwrite=overwrite)


def refuse_manifest_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place for a manifest that is taken.

    Raises:
        UsageError: if it is, and not to be overwritten or not by a manifest.
    """
    _refuse_taken(path, "manifest", _is_manifest, overwrite=overwrite)


def refuse_plan_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place for a plan that is taken.

    Raises:
        UsageError: if it is, and not to be overwritten or not by a plan.
    """
    _refuse_taken(path, "plan", _is_plan, overwrite=overwrite)


def refuse_statement_target(path: Path, is_statement: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Refuse a place for a statement that is taken.

    Raises:
        UsageError: if it is, and not to be overwritten or not by a statement.
    """
    _refuse_taken(path, "statement", is_statement, overwrite=overwrite)


def _refuse_taken(path: Path, kind: str, is_one: Callable[[Path], bool], *, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UsageError(f"{shown(path)}: exists already", hint=_OVERWRITE)
    if not is_one(path):
        raise UsageError(f"{shown(path)}: is no {kind} of ckptsurg and is not replaced; choose another place")


def _refuse_hidden(path: Path) -> None:
    """What lies in a folder that outputs are staged in is taken away by the next run."""
    hidden = [part for part in _real(path).parts if is_hidden_name(part)]
    if hidden:
        hint = "move it to a place of its own"
        raise UsageError(f"{shown(path)}: {shown(hidden[0])} is where outputs are staged, and swept", hint=hint)


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


def refuse_stranger(out: Path) -> None:
    """Raise UsageError if a folder that would be replaced is not an earlier output."""
    _refuse_folder(out, shown(out), overwrite=True)


def _is_manifest(path: Path) -> bool:
    return _says(path, lambda document: document["tool"]["name"] == "ckptsurg")


def _is_plan(path: Path) -> bool:
    return _says(path, lambda document: "spec_digest" in document["reviewed"])


def _says(path: Path, test: Callable[[Any], bool]) -> bool:
    """Whether a path is a file, of a JSON document that a test holds of."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and test(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
