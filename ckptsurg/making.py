"""The steps by which a tensor of an output comes about that is not copied from where it lies: drawn, grown, cast, or
read through a framework.

What draws needs numpy, and is imported by whichever thread draws first, while others copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from threading import Lock
from typing import TypeAlias, TypeVar

from .checkpoints import Checkpoint, read_extent
from .copying import Target
from .errors import CheckpointError, Problem, SpecError
from .initializer_arguments import Initializer
from .metering import Meter
from .parallel import Step
from .plans import PlannedTensor
from .reading import Consumer
from .tensors import BLOCK_ELEMENTS, CHUNK_BYTES, DTYPE_BITS, Buffer
from .wording import shown

__all__ = ["Slot", "made", "overlay"]

#: Bytes by where they begin and end, in chunks; asked for in any order, or in theirs alone.
_Ranges: TypeAlias = Callable[[int, int], Iterable[Buffer]]
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the bytes of a tensor go.

    Attributes:
        target: The file.
        offset: Where in it the tensor begins, in bytes.
        consumer: Who else is told the bytes.
        meter: Counts them.
    """

    target: Target
    offset: int
    consumer: Consumer | None
    meter: Meter


def made(tensor: PlannedTensor, base: Checkpoint, seed: int, spec: str, slot: Slot) -> Iterator[Step]:
    """The steps, in their order.

    Args:
        tensor: The tensor.
        base: Where it is read from, or what is kept of it.
        seed: Of the drawing.
        spec: How messages call the spec.
        slot: Where it goes.

    Raises:
        SpecError: (by a step) if a value does not fit the dtype, or there is none to be drawn like.
        CheckpointError: (by a step) if a tensor turns out to have another size.
    """
    size = DTYPE_BITS[tensor.dtype] // 8
    draw = _drawing(tensor, base, seed, spec)
    if tensor.old_dtype is not None:
        yield from _cast(tensor, tensor.old_dtype, base, slot)
    elif tensor.is_copied:
        yield _Streamed(lambda: base.read(tensor.name), range(tensor.info.nbytes), slot, _changed(base, tensor))
    elif not tensor.keep:
        yield from _drawn(draw, range(tensor.info.elements), size, slot)
    else:
        old = base.tensors[tensor.name].shape
        # What only shrinks draws nothing, so nothing is asked of its old values. They are asked before the old
        # tensor's own stream begins: some sources have one buffer for all that they read.
        if any(now > before for before, now in zip(old, tensor.shape, strict=True)):
            yield _Drawn(draw, range(0), size, slot)
        yield from _overlaid(tensor, base, draw, slot)
    if slot.consumer is not None:
        yield _Finished(slot.consumer)


def _cast(tensor: PlannedTensor, old: str, base: Checkpoint, slot: Slot) -> Iterator[Step]:
    """The steps of a tensor in another dtype: in any order where its bytes lie in a file, else in theirs."""
    before = DTYPE_BITS[old] // 8
    extent = base.extents.get(tensor.name)

    def read(chunks: Iterable[Buffer]) -> Iterator[bytes]:
        from .casting import cast

        return (cast(chunk, old, tensor.dtype) for chunk in chunks)

    if extent is None:
        complaint = _changed(base, tensor)
        yield _Streamed(lambda: read(base.read(tensor.name)), range(tensor.info.nbytes), slot, complaint)
        return

    def part(start: int, stop: int) -> bytes:
        return b"".join(read(read_extent(extent.part(start * before, stop * before), base.label)))

    yield from _drawn(part, range(tensor.info.elements), DTYPE_BITS[tensor.dtype] // 8, slot)


def _overlaid(tensor: PlannedTensor, base: Checkpoint, draw: Callable[[int, int], bytes], slot: Slot) -> Iterator[Step]:
    """The steps of a tensor of which a part is the old one. Where its rows grow, ranges are short: many are a step."""
    size = DTYPE_BITS[tensor.dtype] // 8
    old = _once(lambda: base.ranges(tensor.name))
    short: list[tuple[bool, int, int]] = []
    done = waiting = 0

    def together() -> Iterator[Step]:
        nonlocal done, waiting
        if short:
            read = partial(_joined, tuple(short), old, draw, size)
            yield _Streamed(read, range(done * size, (done + waiting) * size), slot, _changed(base, tensor))
            short.clear()
            done, waiting = done + waiting, 0

    for is_old, start, length in overlay(base.tensors[tensor.name].shape, tensor.shape):
        if not is_old and length >= BLOCK_ELEMENTS:
            yield from together()
            yield from _drawn(draw, range(start, start + length), size, slot)
            done += length
            continue
        short.append((is_old, start, length))
        waiting += length
        if waiting >= BLOCK_ELEMENTS:
            yield from together()
    yield from together()


def _joined(
    ranges: Iterable[tuple[bool, int, int]],
    old: Callable[[], _Ranges],
    draw: Callable[[int, int], bytes],
    size: int,
) -> Iterator[Buffer]:
    """Old and drawn elements, one range after the other, in chunks that are worth a write."""
    chunk = bytearray()
    for is_old, start, length in ranges:
        parts = old()(start * size, (start + length) * size) if is_old else [draw(start, start + length)]
        for part in parts:
            chunk += part
            if len(chunk) >= CHUNK_BYTES:
                yield chunk
                chunk = bytearray()
    yield chunk


def _changed(base: Checkpoint, tensor: PlannedTensor) -> str:
    return f'{base.label}: "{shown(tensor.name)}" was changed while it was read; nothing was published'


def _drawing(tensor: PlannedTensor, base: Checkpoint, seed: int, spec: str) -> Callable[[int, int], bytes]:
    """A function that draws elements of a tensor, from one to before another."""
    values = _once(lambda: _values(tensor, base, seed))

    def draw(start: int, stop: int) -> bytes:
        from .initializers import Undrawable

        try:
            return b"".join(values()(start, stop))
        except Undrawable as error:
            raise SpecError(spec, [Problem(tensor.rule or "", str(error))]) from None

    return draw


def _values(tensor: PlannedTensor, base: Checkpoint, seed: int) -> _Ranges:
    """A reader of a drawn tensor's bytes, by elements."""
    from .initializers import Drawing
    from .moments import MeanRow, moments

    name, init = tensor.name, tensor.init
    assert init is not None
    if init.name == "mean":
        return MeanRow(lambda: base.read(name), base.tensors[name], name).read
    if init.name == "like":
        mean, std = moments(lambda: base.read(name), base.tensors[name], name)
        init = Initializer(name="normal", arguments={"mean": mean, "std": std})
    return Drawing(seed, tensor.output_name, tensor.info, init).read


def _drawn(draw: Callable[[int, int], bytes], elements: range, size: int, slot: Slot) -> Iterator[_Drawn]:
    """A range of elements; where it is empty, a step all the same, which finds out whether they could be drawn."""
    for start in range(elements.start, max(elements.stop, elements.start + 1), BLOCK_ELEMENTS):
        yield _Drawn(draw, range(start, min(start + BLOCK_ELEMENTS, elements.stop)), size, slot)


def _once(make: Callable[[], _Made]) -> Callable[[], _Made]:
    """What is made when it is first asked for, by whichever thread, and only once."""
    lock = Lock()
    kept: list[_Made] = []

    def get() -> _Made:
        with lock:
            if not kept:
                kept.append(make())
        return kept[0]

    return get


# --- Steps ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A range of elements is drawn, beside others."""

    draw: Callable[[int, int], bytes]
    elements: range
    size: int
    slot: Slot

    def fetch(self, buffer: memoryview) -> bytes:
        data = self.draw(self.elements.start, self.elements.stop)
        self.slot.target.write(data, self.slot.offset + self.elements.start * self.size)
        return data

    def follow(self, data: Buffer) -> None:
        if self.slot.consumer is not None:
            self.slot.consumer.update(data)


@dataclass(frozen=True, slots=True)
class _Streamed:
    """A span of the tensor's bytes is read and written in its turn: a reader may give them in their order alone."""

    read: Callable[[], Iterable[Buffer]]
    span: range
    slot: Slot
    complaint: str

    def fetch(self, buffer: memoryview) -> bytes:
        return b""

    def follow(self, data: Buffer) -> None:
        position = self.span.start
        for chunk in self.read():
            if position + len(chunk) > self.span.stop:
                raise CheckpointError(self.complaint)
            self.slot.target.write(chunk, self.slot.offset + position, "copied")
            if self.slot.consumer is not None:
                self.slot.consumer.update(chunk)
            self.slot.meter.advance(len(chunk))
            position += len(chunk)
        if position != self.span.stop:
            raise CheckpointError(self.complaint)


@dataclass(frozen=True, slots=True)
class _Finished:
    """The last step: the tensor's bytes are all there."""

    consumer: Consumer

    def fetch(self, buffer: memoryview) -> bytes:
        return b""

    def follow(self, data: Buffer) -> None:
        self.consumer.finish()


# --- What grows and shrinks -------------------------------------------------------------------------


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
    for number, outer in enumerate(product(*map(range, new[:pivot]))):
        start = number * new[pivot] * row
        drawn_from = start if drawn_from is None else drawn_from
        if kept and all(index < size for index, size in zip(outer, old[:pivot], strict=True)):
            if start > drawn_from:
                yield False, drawn_from, start - drawn_from
            old_number = 0
            for index, size in zip(outer, old[:pivot], strict=True):
                old_number = old_number * size + index
            yield True, old_number * old[pivot] * row, kept
            drawn_from = start + kept
    if drawn_from is not None and prod(new) > drawn_from:
        yield False, drawn_from, prod(new) - drawn_from
