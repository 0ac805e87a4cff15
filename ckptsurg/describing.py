"""The manifest of tensors that are trained as they are: everything is hashed, nothing is written."""

from __future__ import annotations

from .checkpoints import Checkpoint
from .manifest import BaseFile, FrozenRows, Manifest, Origin, SpecIdentity, TensorRecord
from .metering import Meter, Progress
from .plans import Action, Plan, PlannedTensor
from .spec import Spec
from .tensors import Buffer, Digester, TensorSource, refuse_unstorable, row_span, section

__all__ = ["Recorder", "base_files", "describe"]

_ORIGINS: dict[Action, Origin] = {"copy": "copied", "reinit": "reinitialised", "add": "added"}


def describe(
    spec: Spec, plan: Plan, source: TensorSource, *, algorithm: str = "blake3", progress: Progress | None = None
) -> Manifest:
    """The manifest of a source under a plan that only copies.

    Args:
        spec: The spec that the plan was made to.
        plan: The plan.
        source: What is described.
        algorithm: Of the digests.
        progress: Told how many bytes are read.

    Raises:
        UsageError: if a tensor has a dtype that safetensors does not have.
        CheckpointError: if the source turns out to be damaged, or changes meanwhile.
        SystemFailure: if it cannot be read.
    """
    refuse_unstorable(source.label, source.tensors)
    meter = Meter(sum(tensor.info.nbytes for tensor in plan.output), progress)
    records: dict[str, TensorRecord] = {}
    for tensor in plan.output:
        recorder = Recorder(tensor, algorithm)
        for chunk in meter.over(source.read(tensor.name)):
            recorder.update(chunk)
        records[tensor.name] = recorder.record()
    files = base_files(source, algorithm) if isinstance(source, Checkpoint) else []
    if isinstance(source, Checkpoint):
        source.refuse_if_changed()
    identity = SpecIdentity(name=spec.name, digest=spec.digest(algorithm))
    return Manifest.of(records, spec=identity, base=files, dropped=(), algorithm=algorithm)


class Recorder:
    """A manifest's record of a planned tensor in the making: it is given all bytes of the tensor, in their order."""

    def __init__(self, tensor: PlannedTensor, algorithm: str) -> None:
        self._tensor, self._whole = tensor, Digester(algorithm)
        self._rows, self._span, self._position = Digester(algorithm), (0, 0), 0
        if tensor.rows is not None:
            self._span = row_span(tensor.info, tensor.rows)

    def update(self, data: Buffer) -> None:
        self._whole.update(data)
        start, stop = (max(place - self._position, 0) for place in self._span)
        for part in section([data], (start, stop)):
            self._rows.update(part)
        self._position += len(data)

    def record(self) -> TensorRecord:
        tensor = self._tensor
        rows = None
        if tensor.rows is not None:
            rows = FrozenRows(start=tensor.rows[0], stop=tensor.rows[1], digest=str(self._rows))
        return TensorRecord(
            dtype=tensor.dtype,
            shape=tensor.shape,
            frozen=tensor.frozen,
            origin=_ORIGINS[tensor.action],
            digest=str(self._whole),
            rows=rows,
        )


def base_files(base: Checkpoint, algorithm: str) -> list[BaseFile]:
    """A manifest's records of the files of a base."""
    return [
        BaseFile(file=file.name, size=file.size, header_digest=file.header_digest(algorithm)) for file in base.files
    ]
