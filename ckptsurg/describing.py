"""The manifest of tensors that are trained as they are: everything is hashed, nothing is written."""

from __future__ import annotations

from .checkpoints import Checkpoint
from .errors import UsageError
from .manifest import BaseFile, Manifest, Origin, SpecIdentity, TensorRecord
from .metering import Meter, Progress
from .plans import Action, Plan, PlannedTensor
from .spec import Spec
from .tensors import DTYPE_BITS, TensorSource, digest_of
from .wording import shown

__all__ = ["base_files", "describe", "record"]

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
    for tensor in plan.output:
        if tensor.dtype not in DTYPE_BITS:
            message = f'"{shown(tensor.name)}" is {tensor.dtype}, which safetensors does not have'
            raise UsageError(f"{source.label}: {message}")
    meter = Meter(sum(tensor.info.nbytes for tensor in plan.output), progress)
    records = {
        tensor.name: record(tensor, digest_of(meter.over(source.read(tensor.name)), algorithm))
        for tensor in plan.output
    }
    files = base_files(source, algorithm) if isinstance(source, Checkpoint) else []
    if isinstance(source, Checkpoint):
        source.refuse_if_changed()
    identity = SpecIdentity(name=spec.name, digest=spec.digest(algorithm))
    return Manifest.of(records, spec=identity, base=files, dropped=(), algorithm=algorithm)


def record(tensor: PlannedTensor, digest: str) -> TensorRecord:
    """A manifest's record of a planned tensor."""
    origin = _ORIGINS[tensor.action]
    return TensorRecord(dtype=tensor.dtype, shape=tensor.shape, frozen=tensor.frozen, origin=origin, digest=digest)


def base_files(base: Checkpoint, algorithm: str) -> list[BaseFile]:
    """A manifest's records of the files of a base."""
    return [
        BaseFile(file=file.name, size=file.size, header_digest=file.header_digest(algorithm)) for file in base.files
    ]
