"""Statements for others to sign: what was published, and what was proven of it after training.

The form is in-toto's Statement v1 (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md), spelled as
RFC 8785 has it. A statement holds no time, no path but names inside a checkpoint, and no number of 2^53 or more: the
same checkpoint gives the same bytes. Nothing is signed here, and no signature is checked.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from .checkpoints import Checkpoint, Extent, StoredFile, open_stored, read_small
from .counterparts import Counterparts
from .documents import canonical_json
from .errors import DocumentError, Problem, UsageError
from .manifest import MANIFEST_NAME, Manifest, Tool
from .metering import Meter, Progress
from .parsing import parse_json
from .reading import digests
from .report import Report
from .wording import enumerate_names, shown

__all__ = ["PUBLISHED", "VERIFIED", "attested_root", "is_statement", "of_output", "of_report"]

STATEMENT = "https://in-toto.io/Statement/v1"
#: What the predicates say: what an output is; and what was found when a trained checkpoint was verified.
PUBLISHED, VERIFIED = "urn:ckptsurg:published:v1", "urn:ckptsurg:verified:v1"
_ENVELOPED = "application/vnd.in-toto+json"
_MOST_BYTES = 100_000_000


def of_output(manifest: Manifest, output: Checkpoint, *, jobs: int = 1, progress: Progress | None = None) -> bytes:
    """What an output is: the digests of its files, and which spec made it of which base.

    Every tensor is compared with the manifest first: what is stated was seen.

    Args:
        manifest: The manifest that it was published with.
        output: The output.
        jobs: How many threads read and hash.
        progress: Told how many bytes are read.

    Raises:
        UsageError: if it is not the output of this manifest.
        CheckpointError: if it changes meanwhile.
    """
    output.refuse_remote_folder()
    with ExitStack() as stack:
        files = [*output.files, *_beside(output, stack)]
        meter = Meter(sum(file.size for file in (*files, *output.files)), progress)
        _refuse_other(manifest, output, meter, jobs)
        subjects = _subjects(files, output.label, meter, jobs)
        found = {subject["name"]: subject["digest"]["sha256"] for subject in subjects}
        if found.get(MANIFEST_NAME, _digest(manifest)) != _digest(manifest):
            _refuse(output, f"its {MANIFEST_NAME} is another one")
        for file in files:
            file.refuse_if_changed(output.label)
    predicate = {
        "tool": manifest.tool.model_dump(),
        "spec": manifest.spec.model_dump(),
        "base": [file.model_dump() for file in manifest.base],
        **_identity(manifest),
        "counts": dict(manifest.counts),
    }
    return _statement(PUBLISHED, subjects, predicate)


def of_report(
    manifest: Manifest, report: Report, trained: Checkpoint, *, jobs: int = 1, progress: Progress | None = None
) -> bytes:
    """What was found when a trained checkpoint was verified; arguments and errors are those of ``of_output``."""
    meter = Meter(sum(file.size for file in trained.files), progress)
    subjects = _subjects(trained.files, trained.label, meter, jobs)
    trained.refuse_if_changed()
    predicate = {
        "tool": Tool().model_dump(),
        **_identity(manifest),
        "relied_on": report.relied_on,
        "ok": report.ok,
        "verified": report.verified,
        "drifted": [{"name": one.name, "verdict": one.verdict, "cause": one.cause} for one in report.drifted],
        "note": report.note,
    }
    return _statement(VERIFIED, subjects, predicate)


def attested_root(path: Path) -> str:
    """The root in a statement of a published output, or in an envelope of one (DSSE), whose signatures are not checked.

    Raises:
        DocumentError: if it is no such statement.
        UsageError: if there is no such file.
    """
    label = shown(path)
    document = _document(path)
    if document.get("payloadType") == _ENVELOPED:
        try:
            document = parse_json(base64.b64decode(document.get("payload", ""), validate=True).decode())
        except (ValueError, TypeError):
            _malformed(label, "payload", "is no JSON in base64")
    root = document.get("predicate", {}).get("root") if isinstance(document.get("predicate"), dict) else None
    if document.get("_type") != STATEMENT or document.get("predicateType") != PUBLISHED or not isinstance(root, str):
        _malformed(label, "", "is no statement of a published output; `ckptsurg attest` writes one")
    return root


def is_statement(path: Path) -> bool:
    """Whether a file is a statement that was made here."""
    try:
        return _document(path).get("predicateType") in (PUBLISHED, VERIFIED)
    except DocumentError:
        return False


def _document(path: Path) -> dict[str, Any]:
    label = shown(path)
    try:
        document = parse_json(read_small(path, _MOST_BYTES).decode())
    except ValueError as failure:
        _malformed(label, "", shown(failure))
    if not isinstance(document, dict):
        _malformed(label, "", "is no object")
    return document


def _malformed(label: str, place: str, message: str) -> NoReturn:
    raise DocumentError(label, [Problem(place, message)])


def _statement(kind: str, subjects: Iterable[Mapping[str, Any]], predicate: Mapping[str, Any]) -> bytes:
    return canonical_json(
        {"_type": STATEMENT, "subject": list(subjects), "predicateType": kind, "predicate": predicate}
    )


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {
        "manifest": {"sha256": _digest(manifest)},
        "root": manifest.root,
        "frozen_root": manifest.frozen_root,
    }


def _digest(manifest: Manifest) -> str:
    return sha256(manifest.to_bytes()).hexdigest()


def _subjects(files: Sequence[StoredFile], label: str, meter: Meter, jobs: int) -> list[dict[str, Any]]:
    """Files by their names, with their digests; in the order of the names."""
    if not files:
        raise UsageError(f"{label}: is not in files, of which a statement could speak", hint="save it, and verify that")
    whole = {file.name: (Extent(file, 0, file.size), "sha256") for file in files}
    found = digests(whole, label, meter, jobs)
    return [{"name": name, "digest": {"sha256": found[name].partition(":")[2]}} for name in sorted(found)]


def _beside(output: Checkpoint, stack: ExitStack) -> Iterator[StoredFile]:
    """The other files of a folder, hidden ones aside."""
    own = {file.name for file in output.files}
    for place, folders, names in os.walk(output.folder) if output.folder is not None else ():
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for one in sorted(names):
            path = Path(place, one)
            name = path.relative_to(output.folder or place).as_posix()
            if name not in own and not one.startswith("."):
                file = open_stored(path, name, {})
                stack.callback(file.close)
                yield file


def _refuse_other(manifest: Manifest, output: Checkpoint, meter: Meter, jobs: int) -> None:
    """Refuse what is not, in every tensor, what the manifest describes."""
    records = {name: record.model_copy(update={"rows": None}) for name, record in manifest.tensors.items()}
    counterparts = Counterparts(manifest, output, {name: name for name in output.tensors})
    if others := counterparts.others():
        _refuse(output, f"it holds {enumerate_names(others)} besides")
    if different := counterparts.differences(records, counterparts.digests(records, meter, jobs)):
        _refuse(output, ", ".join(f"{shown(one.name)} ({one.verdict})" for one in different[:5]) + " differ")


def _refuse(output: Checkpoint, reason: str) -> NoReturn:
    hint = "a statement is made of an output before it is trained, with the manifest that it was published with"
    raise UsageError(f"{output.label}: is not the output of this manifest: {reason}", hint=hint)
