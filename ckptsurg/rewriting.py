"""Carries a plan out: lays the output out, has it written, and publishes it with its manifest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .checkpoints import Checkpoint
from .config import CONFIG_NAME
from .describing import base_files
from .errors import UsageError, system_failures
from .grafting import grafted
from .layout import Layout, lay_out
from .manifest import MANIFEST_NAME, Manifest, SpecIdentity, TensorRecord, is_file_output, manifest_path
from .metering import Meter, Progress
from .plans import Plan
from .publishing import Staging, staged
from .spec import Spec
from .targets import refuse_target
from .tensors import refuse_unstorable
from .wording import enumerate_names, shown
from .writing import Writer

__all__ = ["Destination", "convert", "rewrite"]

_log = logging.getLogger("ckptsurg")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where an output goes, and what comes with it.

    Attributes:
        out: The output: a file whose name ends in ``.safetensors``, or else a folder.
        others: Files that come along to a folder, by name inside it.
        config: New content of config.json; None where it is not edited.
        manifest_at: Where else the manifest goes; of a file output, instead of beside it.
        overwrite: Whether an earlier output is replaced.
        max_shard_size: Largest size of a shard's tensors, in bytes; None keeps the base's shards.
        link: Whether files that stay as they are become further names of the base's files.
    """

    out: Path
    others: Mapping[str, Path]
    config: bytes | None = None
    manifest_at: Path | None = None
    overwrite: bool = False
    max_shard_size: int | None = None
    link: bool = False

    @property
    def manifest_elsewhere(self) -> Path | None:
        """Where the manifest goes, if not to its own place."""
        if self.manifest_at is None or os.path.realpath(self.manifest_at) == os.path.realpath(manifest_path(self.out)):
            return None
        return self.manifest_at


def rewrite(
    spec: Spec,
    plan: Plan,
    base: Checkpoint,
    destination: Destination,
    *,
    donors: Mapping[str, Checkpoint] | None = None,
    algorithm: str = "blake3",
    inherited: Mapping[str, TensorRecord] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Publish the output of a plan and its manifest, whole or not at all.

    Args:
        spec: The spec that the plan was made to.
        plan: The plan.
        base: The base that it was made for.
        destination: Where the output goes.
        donors: The checkpoints that tensors are grafted from, by what the spec calls them.
        algorithm: Of the digests.
        inherited: Records of tensors whose digests need not be computed.
        jobs: How many threads read, hash and write.
        progress: Told how many bytes are written.

    Raises:
        SpecError: if a value that is to be drawn does not fit its dtype.
        UsageError: if the output exists or would touch the base, or a tensor has a dtype that safetensors lacks.
        CheckpointError: if the base turns out to be damaged, or changes meanwhile.
        SystemFailure: if the system fails.
    """
    files = base_files(base, algorithm)
    given = donors or {}
    for donor in given.values():
        refuse_target(destination.out, destination.manifest_elsewhere, donor, overwrite=destination.overwrite)
    base = grafted(base, plan, given)
    writer = Writer(spec, plan, base, algorithm=algorithm, inherited=inherited or {}, jobs=jobs, link=destination.link)
    with _written(writer, destination, progress) as staging:
        for donor in given.values():
            donor.refuse_if_changed()
        manifest = Manifest.of(
            writer.records,
            spec=SpecIdentity(name=spec.name, digest=spec.digest(algorithm)),
            base=files,
            donors={name: base_files(donor, algorithm) for name, donor in sorted(given.items())},
            dropped=[tensor.name for tensor in plan.tensors if tensor.action == "drop"],
            algorithm=algorithm,
        )
        _publish(staging, manifest.to_bytes(), destination)
    _log.info("%s", writer.amounts)
    return manifest


def convert(
    plan: Plan, base: Checkpoint, destination: Destination, *, jobs: int = 1, progress: Progress | None = None
) -> None:
    """Publish the output of a plan that only copies, and no manifest. Arguments and errors are those of ``rewrite``."""
    beside = manifest_path(destination.out)
    if is_file_output(destination.out) and os.path.lexists(beside):
        raise UsageError(f"{shown(beside)}: a manifest that would speak for the output; move it, or call OUT otherwise")
    writer = Writer(Spec(version=1), plan, base, algorithm=None, inherited={}, jobs=jobs, link=destination.link)
    with _written(writer, destination, progress) as staging:
        _publish_weights(staging, destination)
    _log.info("%s", writer.amounts)


@contextmanager
def _written(writer: Writer, destination: Destination, progress: Progress | None) -> Iterator[Staging]:
    """Everything that an output holds but for its manifest, staged; made of a base that is still what it was."""
    base, out, others = writer.base, destination.out, destination.others
    base.refuse_if_closed()
    with system_failures(shown(out)):
        refuse_target(out, destination.manifest_elsewhere, base, overwrite=destination.overwrite)
        beside_weights = sum(path.stat().st_size for path in others.values())
    output = writer.plan.output
    refuse_unstorable(base.label, {tensor.output_name: tensor.info for tensor in output})
    single = out.name if is_file_output(out) else None
    layout = lay_out(output, base, single=single, max_shard_size=destination.max_shard_size)
    for warning in layout.warnings:
        _log.warning("%s", warning)
    with staged(out, layout.size + beside_weights, lambda staging: writer.spared(layout.files, staging)) as staging:
        writer.write(layout.files, staging, Meter(layout.size, progress))
        if single is None:
            _write_others(staging, layout, base, others, destination.config)
        base.refuse_if_changed()
        yield staging


def _publish(staging: Staging, content: bytes, destination: Destination) -> None:
    """The output, then the manifest where that is a file of its own.

    An old manifest goes first, so that none ever stands beside weights that it does not describe.
    """
    out, target = destination.out, destination.manifest_elsewhere
    if is_file_output(out):
        target = target or manifest_path(out)
    else:
        staging.write(MANIFEST_NAME, content)
    if target is None:
        _publish_weights(staging, destination)
        return
    with staged(target, len(content), part_of=staging) as beside:
        beside.write(target.name, content)
        if destination.overwrite:
            if is_file_output(out):
                staging.withdraw(manifest_path(out))
            beside.withdraw(target)
        _publish_weights(staging, destination)
        beside.publish_file(target.name, target, overwrite=destination.overwrite)


def _publish_weights(staging: Staging, destination: Destination) -> None:
    if is_file_output(destination.out):
        staging.publish_file(destination.out.name, destination.out, overwrite=destination.overwrite)
    else:
        staging.publish_folder(destination.out, overwrite=destination.overwrite)


def _write_others(
    staging: Staging, layout: Layout, base: Checkpoint, others: Mapping[str, Path], config: bytes | None
) -> None:
    written = {file.name for file in layout.files} | ({layout.index} if layout.index else set())
    if clashing := sorted(written & set(others)):
        _log.warning("not brought along, the output has files of that name: %s", enumerate_names(clashing))
    for name, path in others.items():
        if name == CONFIG_NAME and config is not None:
            staging.write(name, config)
        elif name not in written:
            staging.copy(name, path)
    if layout.index is not None:
        staging.write(layout.index, _index(layout, base))


def _index(layout: Layout, base: Checkpoint) -> bytes:
    """An index in the form that Hugging Face writes, with the true size."""
    metadata = dict(base.index.metadata) if base.index is not None else {}
    metadata.pop("total_parameters", None)  # true of the base alone
    metadata["total_size"] = sum(tensor.info.nbytes for file in layout.files for tensor in file.tensors)
    weight_map = {tensor.output_name: file.name for file in layout.files for tensor in file.tensors}
    document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
