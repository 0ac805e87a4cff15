"""The steps by which a tensor of an output comes about that is not copied from where it lies: drawn, grown, or read
through a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from threading import Lock
from typing import TypeAlias, TypeVar

from .checkpoints import Checkpoint
from .copying import Target
from .errors import CheckpointError, Problem, SpecError
from .initializer_arguments import Initializer
from .initializers import BLOCK, Drawing, Undrawable
from .metering import Meter
from .moments import MeanRow, moments
from .parallel import Step
from .plans import PlannedTensor
from .scanning import Consumer
from .tensors import DTYPE_BITS, Buffer
from .wording import shown

__all__ = ["Place", "made", "overlay"]

#: Bytes by where they begin and end, in chunks; asked for in any order, or in theirs alone.
_Ranges: TypeAlias = Callable[[int, int], Iterable[Buffer]]
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Place:
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


def made(tensor: PlannedTensor, base: Checkpoint, seed: int, spec: str, place: Place) -> Iterator[Step]:
    """The steps, in their order.

    Args:
        tensor: The tensor.
        base: Where it is read from, or what is kept of it.
        seed: Of the drawing.
        spec: How messages call the spec.
        place: Where it goes.

    Raises:
        SpecError: (by a step) if a value does not fit the dtype, or there is none to be drawn like.
        CheckpointError: (by a step) if a tensor turns out to have another size.
    """
    size = DTYPE_BITS[tensor.dtype] // 8
    draw = _drawing(tensor, base, seed, spec)
    if tensor.action == "copy":
        yield _Streamed(lambda: base.read(tensor.name), range(tensor.info.nbytes), place, _changed(base, tensor))
    elif not tensor.keep:
        yield from _drawn(draw, range(tensor.info.elements), size, place)
    else:
        old = base.tensors[tensor.name].shape
        # What only shrinks draws nothing, so nothing is asked of its old values. They are asked before the old
        # tensor's own stream begins: some sources have one buffer for all that they read.
        if any(now > before for before, now in zip(old, tensor.shape, strict=True)):
            yield _Drawn(draw, range(0), size, place)
        kept = _once(lambda: base.ranges(tensor.name))
        position = 0
        for is_old, start, length in overlay(old, tensor.shape):
            if is_old:
                read = partial(_read_range, kept, start * size, (start + length) * size)
                span = range(position * size, (position + length) * size)
                yield _Streamed(read, span, place, _changed(base, tensor))
            else:
                yield from _drawn(draw, range(start, start + length), size, place)
            position += length
    if place.consumer is not None:
        yield _Finished(place.consumer)


def _changed(base: Checkpoint, tensor: PlannedTensor) -> str:
    return f'{base.label}: "{shown(tensor.name)}" was changed while it was read'


def _read_range(ranges: Callable[[], _Ranges], start: int, stop: int) -> Iterable[Buffer]:
    return ranges()(start, stop)


def _drawing(tensor: PlannedTensor, base: Checkpoint, seed: int, spec: str) -> Callable[[int, int], bytes]:
    """A function that draws elements of a tensor, from one to before another."""
    values = _once(lambda: _values(tensor, base, seed))

    def draw(start: int, stop: int) -> bytes:
        try:
            return b"".join(values()(start, stop))
        except Undrawable as error:
            raise SpecError(spec, [Problem(tensor.rule or "", str(error))]) from None

    return draw


def _values(tensor: PlannedTensor, base: Checkpoint, seed: int) -> _Ranges:
    """A reader of a drawn tensor's bytes, by elements."""
    name, init = tensor.name, tensor.init
    assert init is not None
    if init.name == "mean":
        return MeanRow(lambda: base.read(name), base.tensors[name], name).read
    if init.name == "like":
        mean, std = moments(lambda: base.read(name), base.tensors[name], name)
        init = Initializer(name="normal", arguments={"mean": mean, "std": std})
    return Drawing(seed, name, tensor.info, init).read


def _drawn(draw: Callable[[int, int], bytes], elements: range, size: int, place: Place) -> Iterator[_Drawn]:
    """A range of elements; where it is empty, a step all the same, which finds out whether they could be drawn."""
    for start in range(elements.start, max(elements.stop, elements.start + 1), BLOCK):
        yield _Drawn(draw, range(start, min(start + BLOCK, elements.stop)), size, place)


def _once(make: Callable[[], _Made]) -> Callable[[], _Made]:
    """What is made when it is first asked for, by whichever thread, and only once."""
    lock = Lock()
    made: list[_Made] = []

    def get() -> _Made:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get


# --- Steps ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A range of elements is drawn, beside others."""

    draw: Callable[[int, int], bytes]
    elements: range
    size: int
    place: Place

    def fetch(self, buffer: memoryview) -> bytes:
        data = self.draw(self.elements.start, self.elements.stop)
        self.place.target.write(data, self.place.offset + self.elements.start * self.size)
        return data

    def follow(self, data: Buffer) -> None:
        if self.place.consumer is not None:
            self.place.consumer.update(data)


@dataclass(frozen=True, slots=True)
class _Streamed:
    """A span of the tensor's bytes is read and written in its turn: a reader may give them in their order alone."""

    read: Callable[[], Iterable[Buffer]]
    span: range
    place: Place
    complaint: str

    def fetch(self, buffer: memoryview) -> bytes:
        return b""

    def follow(self, data: Buffer) -> None:
        position = self.span.start
        for chunk in self.read():
            if position + len(chunk) > self.span.stop:
                raise CheckpointError(self.complaint)
            self.place.target.write(chunk, self.place.offset + position, "copied")
            if self.place.consumer is not None:
                self.place.consumer.update(chunk)
            self.place.meter.advance(len(chunk))
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
