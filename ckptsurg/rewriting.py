"""Carries a plan out: streams every tensor to its place, hashes what it writes, and publishes output and manifest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path

from .checkpoints import Checkpoint, Extent
from .config import CONFIG_NAME
from .copying import Writer
from .errors import enumerate_names
from .initializers import Drawing, moments
from .layout import Layout, OutputFile, lay_out
from .manifest import BaseFile, Manifest, Origin, SpecIdentity, TensorRecord, manifest_path
from .plans import Action, Plan, PlannedTensor
from .publishing import Staging, refuse_target, staged
from .signatures import Initializer
from .spec import Spec
from .tensors import ALGORITHMS, DTYPE_BITS, Hasher, TensorSource, digest_of

__all__ = ["describe", "rewrite", "say_left_behind", "write_manifest"]

_log = logging.getLogger("ckptsurg")

_ORIGINS: dict[Action, Origin] = {"copy": "copied", "reinit": "reinitialised", "add": "added"}

#: Called with the number of bytes done and of bytes in all.
Progress = Callable[[int, int], None]


def rewrite(
    spec: Spec,
    plan: Plan,
    base: Checkpoint,
    out: Path,
    *,
    others: Mapping[str, Path],
    config: bytes | None = None,
    manifest: Path | None = None,
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
        manifest: Where else the manifest goes; of a file output, instead of beside it.
        overwrite: Whether an earlier output is replaced.
        max_shard_size: Largest size of a shard's tensors, in bytes; None keeps the base's shards.
        algorithm: Of the digests.
        progress: Told how many bytes are written.

    Raises:
        UsageError: if the output exists or would touch the base.
        CheckpointError: if the base turns out to be damaged, or changes meanwhile.
        SystemFailure: if the system fails; nothing is published then.
    """
    is_file = out.name.endswith(".safetensors")
    if manifest is not None and os.path.realpath(manifest) == os.path.realpath(manifest_path(out)):
        manifest = None
    refuse_target(out, manifest, base, overwrite=overwrite)
    layout = lay_out(plan.output, base, single=out.name if is_file else None, max_shard_size=max_shard_size)
    for warning in layout.warnings:
        _log.warning("%s", warning)
    with staged(out, layout.size) as staging:
        carrier = _Carrier(plan, base, algorithm, layout.size, progress)
        for file in layout.files:
            with staging.create(file.name) as descriptor:
                carrier.write(file, descriptor)
        if not is_file:
            _write_others(staging, layout, base, others, config)
        base.refuse_if_changed()
        dropped = [tensor.name for tensor in plan.tensors if tensor.action == "drop"]
        document = Manifest.of(
            carrier.records,
            spec=SpecIdentity(name=spec.name, digest=spec.digest(algorithm)),
            base=_base_files(base, algorithm),
            dropped=dropped,
            algorithm=algorithm,
        )
        _publish(staging, document.to_bytes(), out, manifest, overwrite=overwrite)
    return document


def _publish(staging: Staging, content: bytes, out: Path, manifest: Path | None, *, overwrite: bool) -> None:
    """The output, then the manifest where that is a file of its own.

    An old manifest goes first, so that none ever stands beside weights that it does not describe.
    """
    is_file = out.name.endswith(".safetensors")
    if not is_file:
        staging.write("freeze.json", content)
    target = manifest_path(out) if manifest is None and is_file else manifest
    if target is None:
        staging.publish_folder(out, overwrite=overwrite)
        return
    with staged(target, len(content)) as beside:
        beside.write(target.name, content)
        if is_file:
            if overwrite:
                staging.withdraw(manifest_path(out))
                staging.withdraw(target)
            staging.publish_file(out.name, out, overwrite=overwrite)
        else:
            staging.publish_folder(out, overwrite=overwrite)
        beside.publish_file(target.name, target, overwrite=overwrite)


def describe(
    spec: Spec, plan: Plan, source: TensorSource, *, algorithm: str = "blake3", progress: Progress | None = None
) -> Manifest:
    """The manifest of a source that is trained as it is: every tensor is copied, none is written."""
    total = sum(tensor.info.nbytes for tensor in plan.output)
    done = 0

    def counted(chunks: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
        nonlocal done
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            if progress is not None:
                progress(done, total)

    records = {
        tensor.name: _record(tensor, digest_of(counted(source.read(tensor.name)), algorithm)) for tensor in plan.output
    }
    if isinstance(source, Checkpoint):
        source.refuse_if_changed()
    return Manifest.of(
        records,
        spec=SpecIdentity(name=spec.name, digest=spec.digest(algorithm)),
        base=_base_files(source, algorithm) if isinstance(source, Checkpoint) else (),
        dropped=(),
        algorithm=algorithm,
    )


def say_left_behind(names: Sequence[str]) -> None:
    """Log which files of the base's folder do not come along."""
    _log.warning("not brought along: %s (other weights: --keep-other-weights)", enumerate_names(names, 10))


def write_manifest(document: Manifest, path: Path, *, overwrite: bool) -> None:
    """Publish a manifest by itself."""
    content = document.to_bytes()
    with staged(path, len(content)) as staging:
        staging.write(path.name, content)
        staging.publish_file(path.name, path, overwrite=overwrite)


def _record(tensor: PlannedTensor, digest: str) -> TensorRecord:
    origin = _ORIGINS[tensor.action]
    return TensorRecord(dtype=tensor.dtype, shape=tensor.shape, frozen=tensor.frozen, origin=origin, digest=digest)


def _base_files(base: Checkpoint, algorithm: str) -> list[BaseFile]:
    return [
        BaseFile(file=file.name, size=file.size, header_digest=file.header_digest(algorithm)) for file in base.files
    ]


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

    def __init__(self, plan: Plan, base: Checkpoint, algorithm: str, total: int, progress: Progress | None) -> None:
        self.records: dict[str, TensorRecord] = {}
        self._plan, self._base, self._algorithm = plan, base, algorithm
        self._total, self._done, self._progress = total, 0, progress

    def write(self, file: OutputFile, descriptor: int) -> None:
        writer = Writer(descriptor, self._base.label, self._advance)
        writer.write_new([file.header])
        for tensor in file.tensors:
            hasher: Hasher = ALGORITHMS[self._algorithm]()
            if tensor.action == "copy":
                writer.copy_range(self._base.extents[tensor.name], hasher)
            else:
                self._draw(tensor, writer, hasher)
            self.records[tensor.name] = _record(tensor, f"{self._algorithm}:{hasher.hexdigest()}")

    def _draw(self, tensor: PlannedTensor, writer: Writer, hasher: Hasher) -> None:
        assert tensor.init is not None
        drawing = Drawing(self._plan.seed, tensor.name, tensor.info, self._filled(tensor, tensor.init))
        if not tensor.keep:
            writer.write_new(drawing.read(0, tensor.info.elements), hasher)
            return
        extent, old = self._base.extents[tensor.name], self._base.tensors[tensor.name]
        size = DTYPE_BITS[tensor.dtype] // 8
        for is_old, start, length in overlay(old.shape, tensor.shape):
            if is_old:
                writer.copy_range(Extent(extent.file, extent.offset + start * size, length * size), hasher)
            else:
                writer.write_new(drawing.read(start, start + length), hasher)

    def _filled(self, tensor: PlannedTensor, init: Initializer) -> Initializer:
        """``like`` with the old tensor's mean and standard deviation filled in."""
        if init.name != "like":
            return init
        name = tensor.name
        mean, std = moments(lambda: self._base.read(name), self._base.tensors[name], name)
        return Initializer(name="normal", arguments={"mean": mean, "std": std})

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


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
