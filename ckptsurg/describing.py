"""Records of tensors: of bytes that pass by, or inherited; and the manifest of what is trained as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from .checkpoints import Checkpoint, StoredFile, extents_of
from .errors import UsageError
from .manifest import (
    BaseFile,
    FrozenRows,
    Manifest,
    Origin,
    SpecIdentity,
    TensorRecord,
    is_file_output,
    load_manifest,
    manifest_path,
)
from .metering import Meter, Progress
from .parallel import run
from .plans import Action, Plan, PlannedTensor
from .reading import Reading, digest_threads, segments
from .spec import Spec
from .tensors import Buffer, Digester, TensorSource, refuse_unstorable, row_span, section
from .wording import encodable, shown

__all__ = ["Recorder", "base_files", "describe", "identity", "inherit", "inherited_records"]

_log = logging.getLogger("ckptsurg")

_ORIGINS: dict[Action, Origin] = {
    "copy": "copied",
    "reinit": "reinitialised",
    "add": "added",
    "cast": "cast",
    "graft": "grafted",
}


def describe(
    spec: Spec,
    plan: Plan,
    source: TensorSource,
    *,
    algorithm: str = "blake3",
    inherited: Mapping[str, TensorRecord] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of a source under a plan that only copies.

    Args:
        spec: The spec that the plan was made to.
        plan: The plan.
        source: What is described.
        algorithm: Of the digests.
        inherited: Records of tensors whose digests need not be computed.
        jobs: How many threads read what lies in files as it is.
        progress: Told how many bytes are read.

    Raises:
        UsageError: if a tensor has a dtype that safetensors does not have.
        CheckpointError: if the source turns out to be damaged, or changes meanwhile.
        SystemFailure: if it cannot be read.
    """
    refuse_unstorable(source.label, source.tensors)
    total = sum(tensor.info.nbytes for tensor in plan.output)
    meter = Meter(total, progress)
    extents = extents_of(source)
    records: dict[str, TensorRecord] = {}
    lying: list[PlannedTensor] = []
    for tensor in plan.output:
        if (record := inherit(tensor, inherited or {})) is not None:
            records[tensor.name] = record
            meter.advance(tensor.info.nbytes)
        elif tensor.name in extents:
            lying.append(tensor)
        else:
            recorder = Recorder(tensor, algorithm, records.__setitem__)
            for chunk in meter.over(source.read(tensor.name)):
                recorder.update(chunk)
            recorder.finish()
    readings = (
        Reading(
            extents[tensor.name],
            Recorder(tensor, algorithm, records.__setitem__, digest_threads(tensor.info.nbytes, total, jobs)),
        )
        for tensor in lying
    )
    run(segments(readings, source.label, jobs), jobs, meter)
    files = base_files(source, algorithm) if isinstance(source, Checkpoint) else []
    if isinstance(source, Checkpoint):
        source.refuse_if_changed()
    identity = SpecIdentity(name=spec.name, digest=spec.digest(algorithm))
    return Manifest.of(records, spec=identity, base=files, dropped=(), algorithm=algorithm)


class Recorder:
    """A manifest's record of a planned tensor in the making: it is given all bytes of the tensor, in their order.

    Args:
        tensor: The tensor.
        algorithm: Of the digest.
        keep: Given its name in the output and the record, once that is made.
        threads: How many threads may work on the digest; None for all there are.
    """

    def __init__(
        self,
        tensor: PlannedTensor,
        algorithm: str,
        keep: Callable[[str, TensorRecord], None],
        threads: int | None = None,
    ) -> None:
        self._tensor, self._keep, self._whole = tensor, keep, Digester(algorithm, threads)
        self._rows = None if tensor.rows is None else Digester(algorithm, threads)
        self._position = 0

    def update(self, data: Buffer) -> None:
        self._whole.update(data)
        if self._rows is not None and self._tensor.rows is not None:
            start, stop = (max(at - self._position, 0) for at in row_span(self._tensor.info, self._tensor.rows))
            for part in section([data], (start, stop)):
                self._rows.update(part)
            self._position += len(data)

    def finish(self) -> None:
        tensor = self._tensor
        rows = None
        if tensor.rows is not None:
            rows = FrozenRows(start=tensor.rows[0], stop=tensor.rows[1], digest=str(self._rows))
        record = TensorRecord(
            dtype=tensor.dtype,
            shape=tensor.shape,
            frozen=tensor.frozen,
            origin=_ORIGINS[tensor.action],
            digest=str(self._whole),
            rows=rows,
            base_name=None if tensor.to is None else tensor.name,
        )
        self._keep(tensor.output_name, record)


def inherited_records(base: TensorSource, algorithm: str) -> Mapping[str, TensorRecord]:
    """The records of the manifest that a base was published with; its digests are trusted, not computed.

    Raises:
        UsageError: if the base has no manifest, or one of other tensors or with other digests.
        ManifestError: if the manifest is not valid.
    """
    place = (base.folder or base.path) if isinstance(base, Checkpoint) else None
    if place is None or not (place.is_dir() or is_file_output(place)):
        raise UsageError(f"{base.label}: has no manifest that could be trusted", hint=_TRUST)
    if not manifest_path(place).exists():
        is_inside = manifest_path(place.parent).exists()
        hint = f"give the folder, {shown(place.parent)}, to which its manifest belongs" if is_inside else _TRUST
        raise UsageError(f"{shown(manifest_path(place))}: no such file: {base.label} has no manifest", hint=hint)
    manifest = load_manifest(place)
    label = shown(manifest_path(place))
    if manifest.infos != dict(base.tensors):
        odd = min(name for name in {*base.tensors, *manifest.tensors} if _differs(name, base, manifest))
        raise UsageError(f'{label}: does not describe {base.label}: "{shown(odd)}" is not in both alike', hint=_TRUST)
    if manifest.algorithm != algorithm:
        raise UsageError(
            f"{label}: has {manifest.algorithm} digests, which cannot stand for {algorithm}",
            hint=f"--digest {manifest.algorithm}",
        )
    _log.info("digests of copied tensors are taken from %s, not computed", label)
    return manifest.tensors


_TRUST = "without --trust-base-manifest all digests are computed"


def _differs(name: str, base: TensorSource, manifest: Manifest) -> bool:
    record = manifest.tensors.get(name)
    return record is None or record.info != base.tensors.get(name)


def inherit(tensor: PlannedTensor, inherited: Mapping[str, TensorRecord]) -> TensorRecord | None:
    """The record of a copied tensor by that of its base, or None if there is none that says enough."""
    known = inherited.get(tensor.name)
    if known is None:
        return None
    rows = known.rows if tensor.rows is not None else None
    if tensor.rows is not None and (rows is None or (rows.start, rows.stop) != tensor.rows):
        return None
    return TensorRecord(
        dtype=tensor.dtype,
        shape=tensor.shape,
        frozen=tensor.frozen,
        origin="copied",
        digest=known.digest,
        rows=rows,
        inherited=True,
        base_name=None if tensor.to is None else tensor.name,
    )


def base_files(base: Checkpoint, algorithm: str) -> list[BaseFile]:
    """A manifest's records of the files of a base."""
    return [
        BaseFile(file=encodable(file.name), size=file.size, header_digest=file.header_digest(algorithm))
        for file in base.files
    ]


def identity(source: TensorSource) -> list[list[object]]:
    """What two sources have in common that are the same, as JSON: all that tells of other bytes without reading them.

    That is names, sizes and headers of files, and their times of change or what a server calls their version.

    Raises:
        UsageError: if it is not in files.
    """
    files: Sequence[StoredFile] = getattr(source, "files", ())
    if not files:
        message = f"{source.label}: is in memory; the processes of a group share what is read from files"
        raise UsageError(message, hint="each of them can do it by itself, without a group")
    return [[encodable(file.name), file.size, file.header_digest("blake3"), file.version] for file in files]
