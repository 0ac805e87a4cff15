"""Carries a plan out: streams every tensor to its place, hashes what it writes, and publishes output and manifest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path

from .checkpoints import Checkpoint
from .config import CONFIG_NAME
from .copying import Writer
from .describing import Recorder, base_files
from .errors import Problem, SpecError, system_failures
from .initializer_arguments import Initializer
from .initializers import Drawing, Undrawable, moments
from .layout import Layout, OutputFile, lay_out
from .manifest import MANIFEST_NAME, Manifest, SpecIdentity, TensorRecord, is_file_output, manifest_path
from .metering import Meter, Progress
from .plans import Plan, PlannedTensor
from .publishing import Staging, refuse_target, staged
from .spec import Spec
from .tensors import DTYPE_BITS
from .wording import enumerate_names, shown

__all__ = ["overlay", "rewrite"]

_log = logging.getLogger("ckptsurg")


def rewrite(
    spec: Spec,
    plan: Plan,
    base: Checkpoint,
    out: Path,
    *,
    others: Mapping[str, Path],
    config: bytes | None = None,
    manifest_at: Path | None = None,
    overwrite: bool = False,
    max_shard_size: int | None = None,
    algorithm: str = "blake3",
    progress: Progress | None = None,
) -> Manifest:
    """Publish the output of a plan and its manifest, whole or not at all.

    Args:
        spec: The spec that the plan was made to.
        plan: The plan.
        base: The base that it was made for.
        out: The output: a file whose name ends in ``.safetensors``, or else a folder.
        others: Files that come along to a folder, by name inside it.
        config: New content of config.json; None where it is not edited.
        manifest_at: Where else the manifest goes; of a file output, instead of beside it.
        overwrite: Whether an earlier output is replaced.
        max_shard_size: Largest size of a shard's tensors, in bytes; None keeps the base's shards.
        algorithm: Of the digests.
        progress: Told how many bytes are written.

    Raises:
        SpecError: if a value that is to be drawn does not fit its dtype.
        UsageError: if the output exists or would touch the base.
        CheckpointError: if the base turns out to be damaged, or changes meanwhile.
        SystemFailure: if the system fails.
    """
    if manifest_at is not None and os.path.realpath(manifest_at) == os.path.realpath(manifest_path(out)):
        manifest_at = None
    with system_failures(shown(out)):
        refuse_target(out, manifest_at, base, overwrite=overwrite)
        beside_weights = sum(path.stat().st_size for path in others.values())
    single = out.name if is_file_output(out) else None
    layout = lay_out(plan.output, base, single=single, max_shard_size=max_shard_size)
    for warning in layout.warnings:
        _log.warning("%s", warning)
    with staged(out, layout.size + beside_weights) as staging:
        carrier = _Carrier(spec, plan, base, algorithm, Meter(layout.size, progress))
        for file in layout.files:
            with staging.create(file.name) as descriptor:
                carrier.write(file, descriptor)
        if single is None:
            _write_others(staging, layout, base, others, config)
        manifest = Manifest.of(
            carrier.records,
            spec=SpecIdentity(name=spec.name, digest=spec.digest(algorithm)),
            base=base_files(base, algorithm),
            dropped=[tensor.name for tensor in plan.tensors if tensor.action == "drop"],
            algorithm=algorithm,
        )
        base.refuse_if_changed()
        _publish(staging, manifest.to_bytes(), out, manifest_at, overwrite=overwrite)
    return manifest


def _publish(staging: Staging, content: bytes, out: Path, manifest_at: Path | None, *, overwrite: bool) -> None:
    """The output, then the manifest where that is a file of its own.

    An old manifest goes first, so that none ever stands beside weights that it does not describe.
    """
    if not is_file_output(out):
        staging.write(MANIFEST_NAME, content)
    target = manifest_at or (manifest_path(out) if is_file_output(out) else None)
    if target is None:
        staging.publish_folder(out, overwrite=overwrite)
        return
    with staged(target, len(content)) as beside:
        beside.write(target.name, content)
        if is_file_output(out):
            if overwrite:
                staging.withdraw(manifest_path(out))
                staging.withdraw(target)
            staging.publish_file(out.name, out, overwrite=overwrite)
        else:
            staging.publish_folder(out, overwrite=overwrite)
        beside.published = True
        beside.publish_file(target.name, target, overwrite=overwrite)


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
    """Writes files of an output, and keeps a record of every tensor it wrote."""

    def __init__(self, spec: Spec, plan: Plan, base: Checkpoint, algorithm: str, meter: Meter) -> None:
        self.records: dict[str, TensorRecord] = {}
        self._spec, self._seed, self._base = spec, plan.seed, base
        self._algorithm, self._meter = algorithm, meter

    def write(self, file: OutputFile, descriptor: int) -> None:
        writer = Writer(descriptor, self._base.label, self._meter.advance)
        writer.write_new([file.header])
        for tensor in file.tensors:
            recorder = Recorder(tensor, self._algorithm)
            if tensor.action == "copy" and (extent := self._base.extents.get(tensor.name)) is not None:
                writer.copy_range(extent, recorder)
            elif tensor.action == "copy":
                writer.write_new(self._base.read(tensor.name), recorder)
            else:
                try:
                    self._draw(tensor, writer, recorder)
                except Undrawable as error:
                    raise SpecError(self._spec.label, [Problem(tensor.rule or "", str(error))]) from None
            self.records[tensor.name] = recorder.record()

    def _draw(self, tensor: PlannedTensor, writer: Writer, recorder: Recorder) -> None:
        assert tensor.init is not None
        drawing = Drawing(self._seed, tensor.name, tensor.info, self._filled(tensor, tensor.init))
        if not tensor.keep:
            writer.write_new(drawing.read(0, tensor.info.elements), recorder)
            return
        read_old = self._base.ranges(tensor.name)
        size = DTYPE_BITS[tensor.dtype] // 8
        for is_old, start, length in overlay(self._base.tensors[tensor.name].shape, tensor.shape):
            if is_old:
                writer.write_new(read_old(start * size, (start + length) * size), recorder)
            else:
                writer.write_new(drawing.read(start, start + length), recorder)

    def _filled(self, tensor: PlannedTensor, init: Initializer) -> Initializer:
        """``like`` with the old tensor's mean and standard deviation filled in."""
        if init.name != "like":
            return init
        name = tensor.name
        mean, std = moments(lambda: self._base.read(name), self._base.tensors[name], name)
        return Initializer(name="normal", arguments={"mean": mean, "std": std})


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
