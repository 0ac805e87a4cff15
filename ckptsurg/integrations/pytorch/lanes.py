"""The sums that fingerprints are made of, on one device; see ``fingerprint`` for what they are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

__all__ = ["Lanes", "Piece"]

#: Bytes in a word, words in a row.
WORD, ROW = 4, 4096

#: Seeds of the column keys K_0, K_1 and of the row keys G_0, G_1: the first 256 bits of the fraction of pi.
COLUMN_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
ROW_SEEDS = (0xA4093822299F31D0, 0x082EFA98EC4E6C89)

#: Row keys that are kept for each device; later ones are made again when they are needed.
_KEPT = 1 << 16

#: Rows of a block, 16 MiB of words: what is copied at a time, and what launching a kernel is small beside.
_BLOCK = 1024

#: Rows of a strip, the working set of one thread of a processor, and of a copy that torch makes in the thread that
#: asks: it shares out work of 2^15 elements and more, and waits long for its threads where cores are shared.
_STRIP, _UNSHARED = 56, 7

#: Rows that a compiled kernel is given at most, 2^30 words: an index of 32 bits reaches all of them.
_COMPILED_ROWS = 1 << 18

#: Bytes of a piece that is summed up together with others: of small ones, launching kernels takes the time.
_PACKED = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor.

    Attributes:
        tensor: The part.
        offsets: Where in the whole it begins, in elements along each dimension.
        shape: Of the whole.
    """

    tensor: torch.Tensor
    offsets: Sequence[int]
    shape: Sequence[int]


class Lanes:
    """Sums up tensors on one device.

    Args:
        device: Where.
        compiled: As in ``fingerprints``.
    """

    def __init__(self, device: torch.device, compiled: bool | None) -> None:
        self._device = device
        by_itself = device.type == "cuda" and device.type not in _UNCOMPILED and _has_triton()
        self._compiled = by_itself if compiled is None else compiled
        self._may_fail = compiled is None
        self._block = _BLOCK
        self._buffers: torch.Tensor | None = None

    def of(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """What each piece adds to the lanes of its tensor; shape [2] each."""
        small = {index: run for index, piece in enumerate(pieces) if (run := self._as_small(piece)) is not None}
        together = dict(zip(small, self._of_small(list(small.values())), strict=True)) if small else {}
        return [together[index] if index in together else self._of_one(one) for index, one in enumerate(pieces)]

    def _as_small(self, piece: Piece) -> tuple[torch.Tensor, int] | None:
        """The bytes of a small piece, shape [n], and the row that it begins; None if it is large, or begins none."""
        tensor, size = piece.tensor, piece.tensor.element_size()
        if not 0 < tensor.numel() * size <= _PACKED or tensor.shape[1:] != torch.Size(piece.shape[1:]):
            return None
        runs = list(_runs(tensor, piece.offsets, piece.shape, 0, _PACKED // size))
        if len(runs) != 1 or runs[0][1] * size % (ROW * WORD):
            return None
        return runs[0][0].view(torch.uint8), runs[0][1] * size // (ROW * WORD)

    def _of_small(self, runs: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
        """Lanes of runs of bytes, each of which begins a row; shape [2] each."""
        counts = [-(-len(raw) // (ROW * WORD)) for raw, _ in runs]
        zeros = torch.zeros(ROW * WORD, dtype=torch.uint8, device=self._device)
        found: list[torch.Tensor] = []
        first = 0
        while first < len(runs):
            last, rows = first, 0
            while last < len(runs) and (last == first or rows + counts[last] <= self._block):
                rows, last = rows + counts[last], last + 1
            filled = [part for raw, _ in runs[first:last] for part in (raw, zeros[: -len(raw) % (ROW * WORD)])]
            words = torch.cat(filled).view(torch.int32).view(rows, ROW)
            some = range(first, last)
            keys = torch.cat([self._row_keys(runs[one][1], runs[one][1] + counts[one]) for one in some], 1)
            owners = torch.tensor([one - first for one in some for _ in range(counts[one])], device=self._device)
            sums = torch.zeros((last - first, 2), dtype=torch.int64, device=self._device)
            found += sums.index_add_(0, owners, (self._in_rows(words) * keys).T).unbind()
            first = last
        return found

    def _of_one(self, piece: Piece) -> torch.Tensor:
        """What a piece adds to the lanes; shape [2]."""
        size = piece.tensor.element_size()
        sums = [
            self._of_words(words, start)
            for run, first in _runs(piece.tensor, piece.offsets, piece.shape, 0, self._block * ROW * WORD // size)
            for words, start in _words(run, first * size, self._block * ROW * WORD)
        ]
        if len(sums) == 1:
            return sums[0]
        return torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.int64, device=self._device)

    def _of_words(self, words: torch.Tensor, start: int) -> torch.Tensor:
        """The sums of words [n], the first of which is word ``start`` of its tensor; shape [2]."""
        row, column = divmod(start, ROW)
        head = min(-column % ROW, len(words))
        rows = (len(words) - head) // ROW
        sums = []
        if head:
            sums.append(self._of_row(words[:head], row, column))
            row += 1
        if rows:
            sums.append(self._of_rows(words[head : head + rows * ROW].view(rows, ROW), row))
        if head + rows * ROW < len(words):
            sums.append(self._of_row(words[head + rows * ROW :], row + rows, 0))
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def _of_row(self, words: torch.Tensor, row: int, column: int) -> torch.Tensor:
        keys = _kept_keys(self._device)[0][:, column : column + len(words)]
        return (words * keys).sum(1) * self._row_keys(row, row + 1)[:, 0]

    def _of_rows(self, words: torch.Tensor, row: int) -> torch.Tensor:
        """The sums of whole rows, words [n, 4096]; shape [2]."""
        if self._compiled and len(words) >= self._block:
            try:
                sums = []
                for first in range(0, len(words), _COMPILED_ROWS):
                    part = words[first : first + _COMPILED_ROWS]
                    keys = self._row_keys(row + first, row + first + len(part))
                    sums.append(_compiled()(part, _kept_keys(self._device)[0], keys))
                return torch.stack(sums).sum(0)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if not self._may_fail:
                    raise
                self._compiled = False  # a machine without a compiler has triton too
                _UNCOMPILED.add(self._device.type)
        return (self._in_rows(words) * self._row_keys(row, row + len(words))).sum(1)

    def _in_rows(self, words: torch.Tensor) -> torch.Tensor:
        """Sums of each row of words [n, 4096], before row keys; shape [2, n]."""
        return self._in_threads(words) if self._device.type == "cpu" else self._in_blocks(words)

    def _in_threads(self, words: torch.Tensor) -> torch.Tensor:
        keys = _kept_keys(self._device)[0]
        sums = torch.empty((2, len(words)), dtype=torch.int64, device=self._device)
        threads = max(1, min(torch.get_num_threads(), len(words) // _STRIP))

        def work(thread: int) -> None:
            wide = torch.empty((_STRIP, ROW), dtype=torch.int64, device=self._device)
            for first in range(thread * _STRIP, len(words), threads * _STRIP):
                strip = words[first : first + _STRIP]
                for row in range(0, len(strip), _UNSHARED):
                    wide[row : row + _UNSHARED][: len(strip) - row].copy_(strip[row : row + _UNSHARED])
                for lane in (0, 1):
                    torch.mv(wide[: len(strip)], keys[lane], out=sums[lane, first : first + _STRIP])

        if threads == 1:
            work(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
        return sums

    def _in_blocks(self, words: torch.Tensor) -> torch.Tensor:
        """As ``_in_threads``, with what every device has: CUDA has no product of matrices of integers."""
        if self._buffers is None:
            self._buffers = torch.empty((2, self._block, ROW), dtype=torch.int64, device=self._device)
        keys = _kept_keys(self._device)[0]
        sums = torch.empty((2, len(words)), dtype=torch.int64, device=self._device)
        for first in range(0, len(words), self._block):
            block = words[first : first + self._block]
            wide, product = self._buffers[:, : len(block)]
            wide.copy_(block)
            for lane in (0, 1):
                torch.mul(wide, keys[lane], out=product)
                torch.sum(product, 1, out=sums[lane, first : first + self._block])
        return sums

    def _row_keys(self, start: int, stop: int) -> torch.Tensor:
        """Keys of rows ``start`` to ``stop``; shape [2, stop - start]."""
        if stop <= _KEPT:
            return _kept_keys(self._device)[1][:, start:stop]
        return _keys(ROW_SEEDS, start, stop, self._device)


def _row_sums(words: torch.Tensor, column_keys: torch.Tensor, row_keys: torch.Tensor) -> torch.Tensor:
    """Lanes of rows: words [n, 4096], keys [2, 4096] and [2, n]; shape [2]."""
    wide = words.to(torch.int64)
    return torch.stack([((wide * column_keys[lane]).sum(1) * row_keys[lane]).sum() for lane in (0, 1)])


@cache
def _compiled() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports, in torch itself
        return torch.compile(_row_sums, dynamic=True)


#: Types of device for which compiling failed in this process.
_UNCOMPILED: set[str] = set()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _kept_keys(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Column keys, shape [2, 4096], and the first row keys, shape [2, 65536]."""
    return _keys(COLUMN_SEEDS, 0, ROW, device), _keys(ROW_SEEDS, 0, _KEPT, device)


def _keys(seeds: tuple[int, int], start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Numbers ``start`` to ``stop`` of splitmix64 for each seed, made odd; shape [2, stop - start]."""
    count = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    mixed = torch.stack([count * _signed(0x9E3779B97F4A7C15) + _signed(seed) for seed in seeds])
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return mixed ^ _shifted(mixed, 31) | 1


def _shifted(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers, kept as signed ones, shifted to the right; same shape."""
    return numbers >> bits & (1 << 64 - bits) - 1


def _signed(number: int) -> int:
    """A number below 2^64 as the int64 of the same bits."""
    return number - (1 << 64) if number >> 63 else number


# --- Words ------------------------------------------------------------------------------------------


def _runs(
    tensor: torch.Tensor, offsets: Sequence[int], shape: Sequence[int], start: int, most: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """A part of a tensor as contiguous runs of the whole.

    Args:
        tensor: The part.
        offsets: Where in the whole it begins, in elements along each dimension.
        shape: Of the whole.
        start: Position of the whole's first element.
        most: Elements that may be copied at a time.

    Yields:
        Elements, shape [n], and the position of the first.
    """
    if not tensor.numel():
        return
    row = prod(shape[1:])
    start += offsets[0] * row if offsets else 0
    fills_rows = tensor.shape[1:] == torch.Size(shape[1:])
    if fills_rows and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        yield _unit_stride(tensor.view(-1)), start
    elif not tensor.dim():
        yield tensor.resolve_conj().resolve_neg().view(1), start
    elif rows := most // row:
        for first in range(0, len(tensor), rows):
            part = tensor[first : first + rows]
            if not fills_rows:  # what is elsewhere adds nothing, as zeros do
                window = torch.zeros((len(part), *shape[1:]), dtype=tensor.dtype, device=tensor.device)
                places = zip(offsets[1:], part.shape[1:], strict=True)
                window[:, *(slice(offset, offset + size) for offset, size in places)] = part
                part = window
            yield _unit_stride(part.contiguous().resolve_conj().resolve_neg().view(-1)), start + first * row
    else:
        for index, inner in enumerate(tensor):
            yield from _runs(inner, offsets[1:], shape[1:], start + index * row, most)


def _unit_stride(run: torch.Tensor) -> torch.Tensor:
    """One element is contiguous by torch's word, whatever its stride, but then not to be seen as bytes."""
    return run.as_strided((1,), (1,)) if len(run) == 1 else run


def _words(run: torch.Tensor, start: int, most: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Elements as words, filled up with zeros at both ends where they do not begin or end with one.

    Args:
        run: Shape [n].
        start: Where in its tensor it begins, in bytes.
        most: Bytes that may be copied at a time.

    Yields:
        Words, shape [m], and the position of the first, in words.
    """
    if run.element_size() % WORD == 0:
        yield run.view(torch.int32), start // WORD
        return
    raw = run.view(torch.uint8)
    done = 0
    if start % WORD == raw.storage_offset() % WORD == 0 and len(raw) >= WORD:
        done = len(raw) // WORD * WORD
        yield raw[:done].view(torch.int32), start // WORD
    while done < len(raw):
        first, lead = divmod(start + done, WORD)
        piece = raw[done : done + most - lead]
        filled = torch.zeros(-(-(lead + len(piece)) // WORD) * WORD, dtype=torch.uint8, device=raw.device)
        filled[lead : lead + len(piece)] = piece
        yield filled.view(torch.int32), first
        done += len(piece)
