"""Where each tensor of an output goes: which file, in which order, at which offset. Nothing is written.

File systems that share extents do so for ranges whose offsets agree with the source's modulo the block size. So
copied ranges keep the phase that they have in the base, as long as the header's padding and the tensors that are
free to move can bring that about; the format allows no holes. Drawn, added and small tensors are free to move.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .checkpoints import Checkpoint, Extent, StoredFile, read_extent
from .disk import BLOCK_BYTES
from .header import encode_header
from .plans import PlannedTensor

__all__ = ["OutputFile", "lay_out"]

_STARTS_TRIED = 8
_FILLERS_TRIED = 64
_TRIMMED = 8


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of an output.

    Attributes:
        name: Path inside the output folder; of a lone file, its own name.
        tensors: Its tensors, in the order of their bytes.
        header: Length and header, as they are written.
        untouched: The file of the base that has the same bytes.
    """

    name: str
    tensors: Sequence[PlannedTensor]
    header: bytes
    untouched: StoredFile | None = None

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.header) + sum(tensor.info.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of weights of an output.

    Attributes:
        files: In the order of their names.
        index: Name of the index, where the output has one.
        warnings: Metadata that two shards had and that could not both be kept.
    """

    files: Sequence[OutputFile]
    index: str | None
    warnings: Sequence[str] = field(default=())

    @property
    def size(self) -> int:
        """Size of all files, in bytes."""
        return sum(file.size for file in self.files)


def lay_out(
    tensors: Sequence[PlannedTensor], base: Checkpoint, *, single: str | None, max_shard_size: int | None
) -> Layout:
    """Give every tensor of an output its place.

    Args:
        tensors: The tensors of the output.
        base: Where copied tensors come from.
        single: The name of the one file that all tensors go to; None for a folder.
        max_shard_size: Largest size of a shard's tensors, in bytes; None keeps the base's shards.
    """
    ordered = sorted(tensors, key=lambda tensor: _position(tensor, base))
    merged, warnings = base.metadata, base.clashes
    if single is not None:
        return Layout([_file(single, ordered, merged, base)], None, warnings)
    if max_shard_size is not None:
        shards = _split(ordered, max_shard_size)
        index_name = "model.safetensors.index.json" if base.index is None else _as_safetensors(base.index.name)
        stem = index_name.removesuffix(".safetensors.index.json")
        names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        index = f"{stem}.safetensors.index.json" if len(shards) > 1 else None
        files = [
            _file(name if index else f"{stem}.safetensors", shard, merged, base)
            for name, shard in zip(names, shards, strict=True)
        ]
        return Layout(files, index, warnings)
    if base.index is None:
        return Layout([_file("model.safetensors", ordered, merged, base)], None)
    by_file: dict[str, list[PlannedTensor]] = {file.name: [] for file in base.files}
    added: list[PlannedTensor] = []
    for tensor in ordered:
        (added if tensor.action == "add" else by_file[base.file_of(tensor.name)]).append(tensor)
    by_file[max((name for name, shard in by_file.items() if shard), default=base.files[-1].name)] += added
    metadata = {file.name: file.metadata for file in base.files}
    files = [
        _file(_as_safetensors(name), shard, metadata[name] if base.source is None else merged, base)
        for name, shard in by_file.items()
        if shard
    ]
    return Layout(files, _as_safetensors(base.index.name))


def _as_safetensors(name: str) -> str:
    """What Hugging Face calls a file of weights once it is safetensors.

    ``pytorch_model-00001-of-00002.bin`` becomes ``model-00001-of-00002.safetensors``, and the index likewise.
    """
    return re.sub(r"^(?:pytorch_)?(.*)\.bin(\.index\.json)?$", r"\1.safetensors\2", name)


def _position(tensor: PlannedTensor, base: Checkpoint) -> tuple[bool, str, int, int]:
    """Order of the base's bytes, where they are known; added tensors after them in the order of the spec."""
    if tensor.action == "add":
        return True, "", 0, 0
    extent = base.extents.get(tensor.name)
    return False, base.file_of(tensor.name), extent.offset if extent else 0, extent.length if extent else 0


def _split(tensors: Iterable[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Shards of at most ``limit`` bytes each; a tensor that is larger has one for itself."""
    shards: list[list[PlannedTensor]] = []
    filled = 0
    for tensor in tensors:
        size = tensor.info.nbytes
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _file(
    name: str,
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, str] | None,
    base: Checkpoint,
) -> OutputFile:
    file = _untouched(tensors, metadata, base)
    if file is not None:
        header = b"".join(map(bytes, read_extent(Extent(file, 0, file.data_start), base.label)))
        return OutputFile(name, tensors, header, file)
    ordered, page = arrange(tensors, base.extents)
    infos = {tensor.output_name: tensor.info for tensor in ordered}
    return OutputFile(name, ordered, encode_header(infos, metadata, page, BLOCK_BYTES))


def _untouched(
    tensors: Sequence[PlannedTensor], metadata: Mapping[str, str] | None, base: Checkpoint
) -> StoredFile | None:
    """The file of the base that these tensors, in the order of the base's bytes, are all of; with its metadata."""
    first = base.extents.get(tensors[0].name) if tensors else None
    if first is None or first.file.metadata != metadata or base.counts[first.file] != len(tensors):
        return None
    file, position = first.file, first.file.data_start
    for tensor in tensors:
        extent = base.extents.get(tensor.name)
        if tensor.action != "copy" or tensor.to is not None:
            return None
        if extent is None or extent.file is not file or extent.offset != position:
            return None
        if position % tensor.info.alignment:
            return None
        position += extent.length
    return file if position == file.size else None


# --- Order ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """Copied tensors that lie side by side in the base.

    Attributes:
        tensors: In the order of their bytes.
        start: Offset of the first in its file.
        end: Offset after the last.
    """

    tensors: list[PlannedTensor]
    start: int
    end: int

    @property
    def shareable(self) -> int:
        """Bytes in whole pages."""
        return max(0, self.end // BLOCK_BYTES - -(-self.start // BLOCK_BYTES)) * BLOCK_BYTES

    def trim(self) -> None:
        """Give up small tensors at both ends: they have little to share, and are of use as fillers."""
        if all(tensor.info.nbytes < BLOCK_BYTES for tensor in self.tensors):
            return
        for _ in range(_TRIMMED):
            # The data of a file begins at a multiple of 8, so a run that could begin it stays one that can.
            if (size := self.tensors[0].info.nbytes) < BLOCK_BYTES and (self.start + size) % 8 == 0:
                del self.tensors[0]
                self.start += size
            if (size := self.tensors[-1].info.nbytes) < BLOCK_BYTES:
                del self.tensors[-1]
                self.end -= size


@dataclass(slots=True)
class _Chain:
    """Runs and fillers, one behind the other so that every run keeps its phase."""

    tensors: list[PlannedTensor]
    start: int
    end: int
    shared: int


def arrange(tensors: Sequence[PlannedTensor], extents: Mapping[str, Extent]) -> tuple[list[PlannedTensor], int | None]:
    """The order of a file's tensors, every one aligned to its dtype, as many copied ranges as possible in phase.

    Args:
        tensors: The file's tensors, copied ones in the order of the base.
        extents: Where the base has them.

    Returns:
        The tensors in order, and where in a page the data begins (None: no copied range cares).
    """
    whole = _runs(tensors, extents)
    for run in whole:
        run.trim()
    # Odd-sized tensors change the phase of all behind them. Taken out, what is left falls into classes of one phase
    # each, and they are what bridges from one class to the next.
    regular = _runs([tensor for tensor in tensors if tensor.info.nbytes % BLOCK_BYTES == 0], extents)
    chains = [*_chains(whole, tensors, by_phase=False), *_chains(regular, tensors, by_phase=True)]
    if not chains:
        return _aligned(tensors), None
    best = max(chains, key=lambda chain: chain.shared)
    placed = {tensor.output_name for tensor in best.tensors}
    loose = [tensor for tensor in tensors if tensor.output_name not in placed]
    # What would not be aligned behind the chain goes before it, where that leaves the beginning of the data aligned.
    wide = [tensor for tensor in loose if best.end % tensor.info.alignment]
    start = best.start - sum(tensor.info.nbytes for tensor in wide)
    if wide and start % 8 == 0:
        rest = [tensor for tensor in loose if not best.end % tensor.info.alignment]
        return _aligned(wide) + best.tensors + _aligned(rest), start % BLOCK_BYTES
    # Where it does not, the chain gives up its tail until all is aligned behind it, the widest dtype first.
    while best.tensors and loose and best.end % max(tensor.info.alignment for tensor in loose):
        tensor = best.tensors.pop()
        best.end -= tensor.info.nbytes
        loose.append(tensor)
    if not best.tensors:
        return _aligned(tensors), None
    return best.tensors + _aligned(loose), best.start % BLOCK_BYTES


def _aligned(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Widest dtype first: every size is a multiple of its own alignment, so all are aligned."""
    return sorted(tensors, key=lambda tensor: -tensor.info.alignment)


def _runs(tensors: Iterable[PlannedTensor], extents: Mapping[str, Extent]) -> list[_Run]:
    runs: list[_Run] = []
    last: Extent | None = None
    for tensor in tensors:
        extent = extents.get(tensor.name) if tensor.is_copied else None
        if extent is None or not extent.length or extent.offset % tensor.info.alignment:
            continue
        end = extent.offset + extent.length
        if last is not None and last.file is extent.file and runs[-1].end == extent.offset:
            runs[-1].tensors.append(tensor)
            runs[-1].end = end
        else:
            runs.append(_Run([tensor], extent.offset, end))
        last = extent
    return runs


def _chains(runs: Sequence[_Run], tensors: Sequence[PlannedTensor], *, by_phase: bool) -> Iterator[_Chain]:
    """Chains that begin with one of the largest runs."""
    runs = [run for run in runs if run.shareable]
    in_runs = {tensor.output_name for run in runs for tensor in run.tensors}
    fillers = [tensor for tensor in tensors if tensor.output_name not in in_runs and tensor.info.nbytes]
    fillers.sort(key=lambda tensor: tensor.is_copied)
    # Only a base whose own data begins elsewhere has no run that begins at a multiple of 8.
    starts = [run for run in runs if run.start % 8 == 0] or runs
    for first in sorted(starts, key=lambda run: (-run.shareable, run.start))[:_STARTS_TRIED]:
        others = [run for run in runs if run is not first]
        if by_phase:
            others.sort(key=lambda run: (run.start - first.end) % BLOCK_BYTES)
        yield _chain(first, others, fillers)


def _chain(first: _Run, others: Sequence[_Run], fillers: Sequence[PlannedTensor]) -> _Chain:
    """The first run, and behind it every other that can be brought into phase."""
    chain = _Chain(list(first.tensors), first.start, first.end, first.shareable)
    hopeless: set[int] = set()
    for run in others:
        gap = (run.start - chain.end) % BLOCK_BYTES
        between = None if gap in hopeless else _fill(gap, chain.end, fillers[:_FILLERS_TRIED])
        if between is None:
            hopeless.add(gap)
            continue
        if between:
            used = {tensor.output_name for tensor in between}
            fillers = [tensor for tensor in fillers if tensor.output_name not in used]
            hopeless.clear()
        chain.tensors += [*between, *run.tensors]
        chain.end += sum(tensor.info.nbytes for tensor in between) + run.end - run.start
        chain.shared += run.shareable
    return chain


def _fill(gap: int, position: int, fillers: Sequence[PlannedTensor]) -> list[PlannedTensor] | None:
    """Fillers that together take ``gap`` bytes modulo a page, aligned behind a position; None where there are none.

    A subset sum: bit ``r`` of ``reached[k]`` says whether some of the first ``k`` fillers leave ``r``.
    """
    if gap == 0:
        return []
    usable = [tensor for tensor in fillers if position % tensor.info.alignment == 0]
    everything = (1 << BLOCK_BYTES) - 1
    reached = [1]
    for tensor in usable:
        shift = tensor.info.nbytes % BLOCK_BYTES
        bits = reached[-1]
        reached.append(bits | (bits << shift & everything) | bits >> (BLOCK_BYTES - shift))
        if reached[-1] >> gap & 1:
            break
    if not reached[-1] >> gap & 1:
        return None
    chosen: list[PlannedTensor] = []
    for k in range(len(reached) - 1, 0, -1):
        if not reached[k - 1] >> gap & 1:
            chosen.append(usable[k - 1])
            gap = (gap - usable[k - 1].info.nbytes) % BLOCK_BYTES
    return _aligned(chosen)
