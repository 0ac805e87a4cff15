"""Carries a plan out: streams every tensor to its place, hashes what it writes, and publishes output and manifest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from .checkpoints import Checkpoint
from .config import CONFIG_NAME
from .copying import Writer
from .describing import Recorder, base_files
from .errors import CheckpointError, Problem, SpecError, UsageError, system_failures
from .initializer_arguments import Initializer
from .initializers import Drawing, Undrawable
from .layout import Layout, OutputFile, lay_out
from .manifest import MANIFEST_NAME, Manifest, SpecIdentity, TensorRecord, is_file_output, manifest_path
from .metering import Meter, Progress
from .moments import MeanRow, moments
from .plans import Plan, PlannedTensor
from .publishing import Staging, refuse_target, staged
from .spec import Spec
from .tensors import DTYPE_BITS, Buffer, refuse_unstorable
from .wording import enumerate_names, shown

__all__ = ["Destination", "convert", "overlay", "rewrite"]

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
    """

    out: Path
    others: Mapping[str, Path]
    config: bytes | None = None
    manifest_at: Path | None = None
    overwrite: bool = False
    max_shard_size: int | None = None

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
    algorithm: str = "blake3",
    progress: Progress | None = None,
) -> Manifest:
    """Publish the output of a plan and its manifest, whole or not at all.

    Args:
        spec: The spec that the plan was made to.
        plan: The plan.
        base: The base that it was made for.
        destination: Where the output goes.
        algorithm: Of the digests.
        progress: Told how many bytes are written.

    Raises:
        SpecError: if a value that is to be drawn does not fit its dtype.
        UsageError: if the output exists or would touch the base, or a tensor has a dtype that safetensors lacks.
        CheckpointError: if the base turns out to be damaged, or changes meanwhile.
        SystemFailure: if the system fails.
    """
    carrier, files = _Carrier(spec, plan, base, algorithm), base_files(base, algorithm)
    with _written(carrier, destination, progress) as staging:
        manifest = Manifest.of(
            carrier.records,
            spec=SpecIdentity(name=spec.name, digest=spec.digest(algorithm)),
            base=files,
            dropped=[tensor.name for tensor in plan.tensors if tensor.action == "drop"],
            algorithm=algorithm,
        )
        _publish(staging, manifest.to_bytes(), destination)
    return manifest


def convert(plan: Plan, base: Checkpoint, destination: Destination, *, progress: Progress | None = None) -> None:
    """Publish the output of a plan that only copies, and no manifest. Arguments and errors are those of ``rewrite``."""
    beside = manifest_path(destination.out)
    if is_file_output(destination.out) and os.path.lexists(beside):
        raise UsageError(f"{shown(beside)}: a manifest that would speak for the output; move it, or call OUT otherwise")
    with _written(_Carrier(Spec(version=1), plan, base, None), destination, progress) as staging:
        _publish_weights(staging, destination)


@contextmanager
def _written(carrier: _Carrier, destination: Destination, progress: Progress | None) -> Iterator[Staging]:
    """Everything that an output holds but for its manifest, staged; made of a base that is still what it was."""
    base, out, others = carrier.base, destination.out, destination.others
    with system_failures(shown(out)):
        refuse_target(out, destination.manifest_elsewhere, base, overwrite=destination.overwrite)
        beside_weights = sum(path.stat().st_size for path in others.values())
    output = carrier.plan.output
    refuse_unstorable(base.label, {tensor.name: tensor.info for tensor in output})
    single = out.name if is_file_output(out) else None
    layout = lay_out(output, base, single=single, max_shard_size=destination.max_shard_size)
    for warning in layout.warnings:
        _log.warning("%s", warning)
    with staged(out, layout.size + beside_weights) as staging:
        meter = Meter(layout.size, progress)
        for file in layout.files:
            with staging.create(file.name) as descriptor:
                carrier.write(file, descriptor, meter)
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
    with staged(target, len(content)) as beside:
        beside.write(target.name, content)
        if is_file_output(out) and destination.overwrite:
            staging.withdraw(manifest_path(out))
            staging.withdraw(target)
        _publish_weights(staging, destination)
        beside.published = True
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
    weight_map = {tensor.name: file.name for file in layout.files for tensor in file.tensors}
    document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


class _Carrier:
    """Writes files of an output, and keeps a record of every tensor it wrote, if there is an algorithm for digests."""

    def __init__(self, spec: Spec, plan: Plan, base: Checkpoint, algorithm: str | None) -> None:
        self.records: dict[str, TensorRecord] = {}
        self.plan, self.base = plan, base
        self._spec, self._algorithm = spec, algorithm

    def write(self, file: OutputFile, descriptor: int, meter: Meter) -> None:
        writer = Writer(descriptor, self.base.label, meter.advance)
        writer.write_new([file.header])
        end = writer.position
        for tensor in file.tensors:
            recorder = Recorder(tensor, self._algorithm) if self._algorithm else None
            if tensor.action == "copy" and (extent := self.base.extents.get(tensor.name)) is not None:
                writer.copy_range(extent, recorder)
            elif tensor.action == "copy":
                writer.write_new(self.base.read(tensor.name), recorder)
            else:
                try:
                    self._draw(tensor, writer, recorder)
                except Undrawable as error:
                    raise SpecError(self._spec.label, [Problem(tensor.rule or "", str(error))]) from None
            end += tensor.info.nbytes
            if writer.position != end:
                raise CheckpointError(f'{self.base.label}: "{shown(tensor.name)}" was changed while it was read')
            if recorder is not None:
                self.records[tensor.name] = recorder.record()

    def _draw(self, tensor: PlannedTensor, writer: Writer, recorder: Recorder | None) -> None:
        if not tensor.keep:
            writer.write_new(self._values(tensor)(0, tensor.info.elements), recorder)
            return
        old = self.base.tensors[tensor.name].shape
        # What only shrinks draws nothing, so nothing is asked of its old values. They are asked before the old
        # tensor's own stream begins: some sources have one buffer for all that they read.
        grows = any(now > before for before, now in zip(old, tensor.shape, strict=True))
        read_new = self._values(tensor) if grows else None
        read_old = self.base.ranges(tensor.name)
        size = DTYPE_BITS[tensor.dtype] // 8
        for is_old, start, length in overlay(old, tensor.shape):
            if is_old:
                writer.write_new(read_old(start * size, (start + length) * size), recorder)
            else:
                assert read_new is not None
                writer.write_new(read_new(start, start + length), recorder)

    def _values(self, tensor: PlannedTensor) -> Callable[[int, int], Iterator[Buffer]]:
        """A reader of a drawn tensor's bytes, by first element and the one after the last."""
        name, init = tensor.name, tensor.init
        assert init is not None
        if init.name == "mean":
            return MeanRow(lambda: self.base.read(name), self.base.tensors[name], name).read
        if init.name == "like":
            mean, std = moments(lambda: self.base.read(name), self.base.tensors[name], name)
            init = Initializer(name="normal", arguments={"mean": mean, "std": std})
        return Drawing(self.plan.seed, name, tensor.info, init).read


def overlay(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[bool, int, int]]:
    """A new tensor as ranges, of the old tensor where the two overlap and new elsewhere.

    Args:
        old: The old shape.
        new: The new shape, of as many dimensions.

    Yields:
        (whether it is a range of the old tensor, its first element there or in the new one, its length in elements).
    """
    # Dimensions after the pivot are equal, so rows of the pivot lie side by side in both.
    pivot = next((axis for axis in reversed(range(len(new))) if old[axis] != new[axis]), None)
    if pivot is None:
        yield True, 0, prod(new)
        return
    row = prod(new[pivot + 1 :])
    kept = min(old[pivot], new[pivot]) * row
    drawn_from: int | None = None
    for number, place in enumerate(product(*map(range, new[:pivot]))):
        start = number * new[pivot] * row
        drawn_from = start if drawn_from is None else drawn_from
        if kept and all(index < size for index, size in zip(place, old[:pivot], strict=True)):
            if start > drawn_from:
                yield False, drawn_from, start - drawn_from
            old_number = 0
            for index, size in zip(place, old[:pivot], strict=True):
                old_number = old_number * size + index
            yield True, old_number * old[pivot] * row, kept
            drawn_from = start + kept
    if drawn_from is not None and prod(new) > drawn_from:
        yield False, drawn_from, prod(new) - drawn_from
