"""Brings the tensors of a plan to their places in an output, and keeps a record of each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate

from .checkpoints import Checkpoint, Extent, StoredFile
from .copying import Amounts, Target, outside, within
from .describing import Recorder, inherit
from .journal import Journal
from .layout import OutputFile
from .making import Slot, made
from .manifest import TensorRecord
from .metering import Meter
from .parallel import Segment, run
from .plans import Plan, PlannedTensor
from .publishing import Staging
from .reading import Reading, digest_threads, segments
from .spec import Spec
from .staged_folder import StagedFolder
from .wording import shown

__all__ = ["Work", "Writer"]

_log = logging.getLogger("ckptsurg")


@dataclass(frozen=True, slots=True)
class Work:
    """What is done of a file by one rank.

    Attributes:
        file: The file.
        span: The range of its bytes that is brought.
        is_linked: Whether it is a further name of the base's by now, so that its tensors are only read.
    """

    file: OutputFile
    span: range
    is_linked: bool = False

    def own(self) -> Iterator[tuple[PlannedTensor, int]]:
        """The tensors that the span has a part of, or that are recorded here, each with its offset in the file."""
        position = len(self.file.header)
        for tensor in self.file.tensors:
            end = position + tensor.info.nbytes
            if self.records(end) or within(range(position, end), self.span):
                yield tensor, position
            position = end

    def records(self, end: int) -> bool:
        """Whether a tensor is recorded here that ends at an offset: its last byte is in the span."""
        return self.span.start < end <= self.span.stop


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
        self._journal: Journal | None = None

    def link(self, files: Iterable[OutputFile], staging: Staging) -> set[str]:
        """Make files that stay as they are further names of the base's, where they can be; the names of those."""
        linked = set()
        for file in files if self._link else ():
            if file.untouched is None:
                continue
            obstacle = staging.link(file.name, self.base.path_of(file.untouched), file.untouched)
            if obstacle is None:
                linked.add(file.name)
            else:
                _log.warning("%s: cannot be linked to the base (%s)", shown(file.name), obstacle)
        return linked

    def write(
        self,
        works: Sequence[Work],
        place: StagedFolder,
        meter: Meter,
        *,
        journal: Journal | None = None,
        recorded: Mapping[str, str] | None = None,
    ) -> None:
        """Write files, or parts of them; they are on disk at the end.

        Args:
            works: What is to be done.
            place: Where.
            meter: Told how many bytes are done.
            journal: Told which tensors are in their places.
            recorded: Digests of tensors that a stopped run may have brought to theirs, by name in the output.

        Raises:
            SpecError: if a value that is to be drawn does not fit its dtype.
            CheckpointError: if the base turns out to be damaged, or changes meanwhile.
            SystemFailure: if it cannot be read.
            OSError: if the system fails.
        """
        targets: list[Target] = []
        self._total = sum(len(work.span) for work in works)
        self._journal = journal
        kept = self._kept(works, place, meter, recorded or {})
        run(self._segments(works, kept, place, targets, meter), self._jobs, meter)
        for target in targets:
            self.amounts.update(target.amounts)

    # --- What a stopped run has left

    def _kept(self, works: Sequence[Work], place: StagedFolder, meter: Meter, recorded: Mapping[str, str]) -> set[str]:
        """The tensors that a stopped run has brought to their places: read, and found to have their digests."""
        if self._algorithm is None or not recorded:
            return set()
        kept: dict[str, TensorRecord] = {}
        for work in works:
            if work.is_linked or (staged := place.read(work.file.name)) is None:
                continue
            found: dict[str, TensorRecord] = {}
            readings = []
            for tensor, position in work.own():
                whole = range(position, position + tensor.info.nbytes)
                if tensor.output_name in recorded and within(whole, work.span) == whole:
                    recorder = Recorder(tensor, self._algorithm, found.__setitem__, self._threads(tensor))
                    readings.append(Reading(Extent(staged, position, len(whole)), recorder))
            with closing(staged):
                run(segments(readings, "what was staged", self._jobs), self._jobs, meter)
            kept |= {name: record for name, record in found.items() if record.digest == recorded[name]}
        for name, record in kept.items():
            self._keep(name, record)
        self.amounts["kept"] += sum(record.info.nbytes for record in kept.values())
        return set(kept)

    def _keep(self, name: str, record: TensorRecord) -> None:
        self.records[name] = record
        if self._journal is not None:
            self._journal.add(name, record.digest, record.info.nbytes)

    # --- Space

    def spared(self, files: Iterable[OutputFile], staging: Staging) -> int:
        """How many bytes of files take no space of their own: those of links, and of shared blocks."""
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
        self, works: Sequence[Work], kept: Set[str], place: StagedFolder, targets: list[Target], meter: Meter
    ) -> Iterator[Segment]:
        for work in works:
            if work.is_linked:
                self.amounts["linked"] += len(work.span)
                yield from self._linked(work, meter)
                continue
            missing = len(work.span) - sum(tensor.info.nbytes for tensor, _ in work.own() if tensor.output_name in kept)
            target = place.target(work.file.name, work.file.size, missing)
            targets.append(target)
            yield from self._written(work, kept, target, meter)

    def _written(self, work: Work, kept: Set[str], target: Target, meter: Meter) -> Iterator[Segment]:
        file, span = work.file, work.span
        own = [(tensor, position) for tensor, position in work.own() if tensor.output_name not in kept]
        shared = range(0)
        if file.untouched is not None and kept.isdisjoint(tensor.output_name for tensor in file.tensors):
            shared = target.share(file.untouched, span.start, len(span), span.start)
        header = within(range(len(file.header)), span)
        for part in outside(header, shared):
            target.write(file.header[part.start : part.stop], part.start)
        meter.advance(len(header))
        copied: list[tuple[Sequence[PlannedTensor], Extent, int]] = []
        for together, position in _runs(own, self.base.extents):
            first, size = together[0], sum(tensor.info.nbytes for tensor in together)
            extent = self.base.extents.get(first.name)
            if first.is_copied and extent is not None:
                copied.append((together, Extent(extent.file, extent.offset, size), position))
            else:
                # First, so that some draw while others wait for the disk.
                slot = Slot(target, position, self._consumer(first), meter)
                yield made(first, self.base, self.plan.seed, self._spec.label, slot)
        for tensors, extent, start in copied:
            yield from self._copied(tensors, extent, target, start, work, shared, meter)

    def _consumer(self, tensor: PlannedTensor) -> Recorder | None:
        """Who makes the record of a tensor out of its bytes; None where they need not be known."""
        if self._algorithm is None:
            return None
        if tensor.action == "copy" and (record := inherit(tensor, self._inherited)) is not None:
            self.records[tensor.output_name] = record
            return None
        return Recorder(tensor, self._algorithm, self._keep, self._threads(tensor))

    def _threads(self, tensor: PlannedTensor) -> int | None:
        return digest_threads(tensor.info.nbytes, self._total, self._jobs) if self.base.source is None else None

    # --- Copied --------------------------------------------------------------------------------------

    def _linked(self, work: Work, meter: Meter) -> Iterator[Segment]:
        meter.advance(len(within(range(len(work.file.header)), work.span)))
        readings = self._readings(work.own(), work, range(work.file.size), meter)
        return segments(readings, self.base.label, self._jobs)

    def _copied(
        self,
        tensors: Sequence[PlannedTensor],
        extent: Extent,
        target: Target,
        position: int,
        work: Work,
        shared: range,
        meter: Meter,
    ) -> Iterator[Segment]:
        """Tensors that lie side by side, as one range."""
        shift = position - extent.offset
        own = within(range(position, position + extent.length), work.span)
        shared = shared or target.share(extent.file, own.start - shift, len(own), own.start)

        def write(view: memoryview, offset: int) -> None:
            span = within(range(offset + shift, offset + shift + len(view)), own)
            for part in outside(span, shared):
                start = part.start - offset - shift
                target.write(view[start : start + len(part)], part.start, "copied")

        placed = zip(tensors, accumulate((one.info.nbytes for one in tensors), initial=position), strict=False)
        return segments(self._readings(placed, work, shared, meter), self.base.label, self._jobs, write)

    def _readings(
        self, placed: Iterable[tuple[PlannedTensor, int]], work: Work, shared: range, meter: Meter
    ) -> Iterator[Reading]:
        """What must be read of tensors: all of those that are hashed here, of others what is not shared."""
        for tensor, position in placed:
            extent = self.base.extents[tensor.name]
            consumer = self._consumer(tensor) if work.records(position + extent.length) else None
            if consumer is not None:
                yield Reading(extent, consumer)
                continue
            whole = within(range(position, position + extent.length), work.span)
            parts = list(outside(whole, shared))
            meter.advance(len(whole) - sum(map(len, parts)))
            for part in parts:
                yield Reading(extent.part(part.start - position, part.stop - position))


def _runs(
    placed: Iterable[tuple[PlannedTensor, int]], extents: Mapping[str, Extent]
) -> Iterator[tuple[list[PlannedTensor], int]]:
    """Tensors in their order, and where the first goes of those that are brought together.

    Copied ones are that lie side by side in the base and in the output; every other one is by itself.
    """
    together: list[PlannedTensor] = []
    start = end = 0
    last: Extent | None = None
    for tensor, position in placed:
        extent = extents.get(tensor.name) if tensor.is_copied else None
        goes_on = extent and last and extent.file is last.file and extent.offset == last.offset + last.length
        if together and not (goes_on and position == end):
            yield together, start
            together = []
        start = start if together else position
        together.append(tensor)
        last, end = extent, position + tensor.info.nbytes
    if together:
        yield together, start
