"""Brings the tensors of a plan to their places in an output, and keeps a record of each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .checkpoints import Checkpoint, Extent, StoredFile
from .copying import Amounts, Target, outside
from .describing import Recorder, inherit
from .layout import OutputFile
from .making import Slot, made
from .manifest import TensorRecord
from .metering import Meter
from .parallel import Segment, run
from .plans import Plan, PlannedTensor
from .publishing import Staging
from .reading import Reading, digest_threads, segments
from .spec import Spec
from .wording import shown

__all__ = ["Writer"]

_log = logging.getLogger("ckptsurg")


class Writer:
    """Writes the files of an output.

    Attributes:
        records: Of every tensor that was brought to its place, if there is an algorithm for digests.
        amounts: How many bytes came in which way.

    Args:
        spec: The spec, for messages.
        plan: The plan.
        base: The base.
        algorithm: Of the digests; None for no records.
        inherited: Records of tensors whose digests need not be computed.
        jobs: How many threads work. What is not read from files by us is read in the calling thread.
        link: Whether files that stay as they are become further names of the base's files.
    """

    def __init__(
        self,
        spec: Spec,
        plan: Plan,
        base: Checkpoint,
        *,
        algorithm: str | None,
        inherited: Mapping[str, TensorRecord],
        jobs: int,
        link: bool,
    ) -> None:
        self.records: dict[str, TensorRecord] = {}
        self.amounts = Amounts()
        self.plan, self.base = plan, base
        self._spec, self._algorithm, self._inherited = spec, algorithm, inherited
        self._jobs = jobs if base.source is None else 1
        self._link = link
        self._total = 0

    def write(self, files: Sequence[OutputFile], staging: Staging, meter: Meter) -> None:
        """Write files; they are on disk at the end.

        Raises:
            SpecError: if a value that is to be drawn does not fit its dtype.
            CheckpointError: if the base turns out to be damaged, or changes meanwhile.
            SystemFailure: if it cannot be read.
            OSError: if the system fails.
        """
        targets: list[Target] = []
        self._total = sum(file.size for file in files)
        run(self._segments(files, staging, targets, meter), self._jobs, meter)
        for target in targets:
            self.amounts.update(target.amounts)

    def spared(self, files: Iterable[OutputFile], staging: Staging) -> int:
        """How many bytes of files take no room of their own: those of links, and of shared blocks."""
        shares = {file: staging.shares_with(file) for file in {one.file for one in self.base.extents.values()}}
        folder = staging.folder.stat().st_dev
        return sum(
            file.size
            if self._link and file.untouched is not None and file.untouched.status.st_dev == folder
            else sum(self._sharable(tensor, shares) for tensor in file.tensors)
            for file in files
        )

    def _sharable(self, tensor: PlannedTensor, shares: Mapping[StoredFile, bool]) -> int:
        extent = self.base.extents.get(tensor.name) if tensor.is_copied else None
        return extent.length if extent is not None and shares[extent.file] else 0

    def _segments(
        self, files: Sequence[OutputFile], staging: Staging, targets: list[Target], meter: Meter
    ) -> Iterator[Segment]:
        for file in files:
            if self._link and file.untouched is not None:
                obstacle = staging.link(file.name, self.base.path_of(file.untouched), file.untouched)
                if obstacle is None:
                    self.amounts["linked"] += file.size
                    yield from self._linked(file, meter)
                    continue
                _log.warning("%s: cannot be linked to the base (%s)", shown(file.name), obstacle)
            target = staging.create(file.name, file.size)
            targets.append(target)
            yield from self._written(file, target, meter)

    def _written(self, file: OutputFile, target: Target, meter: Meter) -> Iterator[Segment]:
        shared = range(0)
        if file.untouched is not None:
            shared = target.share(file.untouched, 0, file.size, 0)
        position = len(file.header)
        for part in outside(range(position), shared):
            target.write(file.header[part.start : part.stop], part.start)
        meter.advance(position)
        copied: list[tuple[Sequence[PlannedTensor], Extent, int]] = []
        for together in _runs(file.tensors, self.base.extents):
            first, size = together[0], sum(tensor.info.nbytes for tensor in together)
            extent = self.base.extents.get(first.name)
            if first.is_copied and extent is not None:
                copied.append((together, Extent(extent.file, extent.offset, size), position))
            else:
                # First, so that some draw while others wait for the disk.
                slot = Slot(target, position, self._consumer(first), meter)
                yield made(first, self.base, self.plan.seed, self._spec.label, slot)
            position += size
        for tensors, extent, start in copied:
            yield from self._copied(tensors, extent, target, start, shared, meter)

    def _consumer(self, tensor: PlannedTensor) -> Recorder | None:
        """Who makes the record of a tensor out of its bytes; None where they need not be known."""
        if self._algorithm is None:
            return None
        if tensor.action == "copy" and (record := inherit(tensor, self._inherited)) is not None:
            self.records[tensor.output_name] = record
            return None
        threads = digest_threads(tensor.info.nbytes, self._total, self._jobs) if self.base.source is None else None
        return Recorder(tensor, self._algorithm, self.records, threads)

    # --- Copied --------------------------------------------------------------------------------------

    def _linked(self, file: OutputFile, meter: Meter) -> Iterator[Segment]:
        meter.advance(len(file.header))
        readings = self._readings(file.tensors, range(file.size), meter)
        return segments(readings, self.base.label, self._jobs)

    def _copied(
        self,
        tensors: Sequence[PlannedTensor],
        extent: Extent,
        target: Target,
        position: int,
        shared: range,
        meter: Meter,
    ) -> Iterator[Segment]:
        """Tensors that lie side by side, as one range."""
        shared = shared or target.share(extent.file, extent.offset, extent.length, position)
        shift = position - extent.offset

        def write(view: memoryview, offset: int) -> None:
            span = range(offset + shift, offset + shift + len(view))
            for part in outside(span, shared):
                target.write(view[part.start - span.start : part.stop - span.start], part.start, "copied")

        readings = self._readings(tensors, range(shared.start - shift, shared.stop - shift), meter)
        return segments(readings, self.base.label, self._jobs, write)

    def _readings(self, tensors: Iterable[PlannedTensor], shared: range, meter: Meter) -> Iterator[Reading]:
        """What must be read of tensors: all of those that are hashed, of others what is not shared."""
        for tensor in tensors:
            extent, consumer = self.base.extents[tensor.name], self._consumer(tensor)
            if consumer is not None:
                yield Reading(extent, consumer)
                continue
            parts = list(outside(range(extent.offset, extent.offset + extent.length), shared))
            meter.advance(extent.length - sum(map(len, parts)))
            for part in parts:
                yield Reading(Extent(extent.file, part.start, len(part)))


def _runs(tensors: Iterable[PlannedTensor], extents: Mapping[str, Extent]) -> Iterator[list[PlannedTensor]]:
    """Tensors in their order: copied ones together that lie side by side in the base, every other one by itself."""
    together: list[PlannedTensor] = []
    last: Extent | None = None
    for tensor in tensors:
        extent = extents.get(tensor.name) if tensor.is_copied else None
        goes_on = extent and last and extent.file is last.file and extent.offset == last.offset + last.length
        if together and not goes_on:
            yield together
            together = []
        together.append(tensor)
        last = extent
    if together:
        yield together
