"""Fingerprints: two 64-bit numbers of a tensor, computed where it lives, the same however it is sharded.

A tensor is its row-major little-endian bytes, filled up with zeros to whole words of 4 bytes; ``w_i`` is word ``i``
as a two's complement integer. Lane ``l`` of the fingerprint is

    F_l  =  sum over rows r of  G_l(r) * (sum over columns c of  K_l(c) * w_(4096 r + c))    modulo 2^64

where K_0, K_1, G_0 and G_1 are the numbers that splitmix64 gives (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014), each with its lowest bit set, so odd. This is multilinear hashing (Carter and Wegman,
"Universal classes of hash functions", 1979; Lemire and Kaser, "Strongly universal string hashing is fast", 2014), over
rows first and then over columns of the row sums.

Certain: a change within one word, such as one flipped bit, changes both lanes, for its difference is less than 2^32 and
an odd factor cannot make it zero. Likely: any other change is missed by one lane with a probability of at most
(64 - v) / 2^(62 - v) over the keys, if some word's difference has ``v`` zeros at its end; v is at most 31. That is
2^-56 a lane for differences that reach the lowest bit, and at worst 2^-25 a lane for a change of nothing but words'
highest bits, the signs of float32. Both lanes miss with the product.

It is linear: a part of a tensor adds what the whole would if everything else were zero, so the parts of any cut add up.
It says nothing of dtype, of shape or of zeros at the end. The keys are no secret, so it is no digest: whoever wants to
can make two tensors of one fingerprint. It is to be compared within one run; nothing is promised of it across versions.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch

from ...errors import FreezeError, FrozenWeightsChanged
from ...wording import enumerate_names, shown

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Fingerprint", "fingerprints"]

#: Both lanes, each from 0 to 2^64 - 1.
Fingerprint: TypeAlias = tuple[int, int]

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


def fingerprints(
    tensors: Mapping[str, torch.Tensor],
    *,
    rows: Mapping[str, tuple[int, int]] | None = None,
    compiled: bool | None = None,
) -> dict[str, Fingerprint]:
    """The fingerprint of every tensor. The host waits once for each device, whatever the number of tensors.

    A DTensor has the fingerprint of the whole tensor, on every rank of its mesh. All ranks of a mesh call this with
    the same names in the same order, for they add their sums up; a rank outside of a tensor's mesh leaves it out.
    A part along the first dimension costs what it holds, one along another dimension what its whole rows would. A
    tensor with a pending sum, or sharded in the strided way of FSDP over tensor parallelism, is gathered whole.

    Args:
        tensors: Dense tensors with values, on any devices; see ``unreadable`` for those that are not.
        rows: Of a tensor that is named here, the first row and the one after the last that count; others are zeros.
        compiled: Whether torch.compile makes the kernel for large tensors; None for on CUDA, if it can.

    Raises:
        FrozenWeightsChanged: on all ranks, if the replicas of a DTensor differ.
        FreezeError: on the ranks where a DTensor's part is not the one that its placements say.
    """
    lanes: dict[str, torch.Tensor] = {}
    meshes: dict[tuple[DeviceMesh, tuple[bool, ...]], list[str]] = {}
    devices: dict[torch.device, _Device] = {}
    # What is kept between calls is made here: a caller's inference mode must not leave its mark on it.
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            local, offsets = tensor.detach(), (0,) * tensor.dim()
            if _is_distributed(local):
                mesh = local.device_mesh
                if mesh.get_coordinate() is None:
                    continue
                local, offsets, sharded = _part(local, name)
                meshes.setdefault((mesh, sharded), []).append(name)
            if rows and name in rows:
                local, offsets = _cut(local, offsets, rows[name])
            if local.device not in devices:
                devices[local.device] = _Device(local.device, compiled)
            lanes[name] = devices[local.device].lanes(local, offsets, tuple(tensor.shape))
        for (mesh, sharded), names in meshes.items():
            sums = _over_mesh(mesh, sharded, [lanes[name] for name in names])
            lanes |= zip(names, sums.unbind(), strict=True)
        numbers = _on_host(lanes)
    if torn := [name for name, (_, _, *differ) in numbers.items() if any(differ)]:
        raise FrozenWeightsChanged(f"{enumerate_names(torn)}: {'its' if len(torn) == 1 else 'their'} replicas differ")
    return {name: (first % 2**64, second % 2**64) for name, (first, second, *_) in numbers.items()}


def _cut(local: torch.Tensor, offsets: tuple[int, ...], rows: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What some rows of a tensor have of a part of it, and where in the whole that begins."""
    first, last = (min(max(row - offsets[0], 0), len(local)) for row in rows)
    return local[first:last], (offsets[0] + first, *offsets[1:])


def _on_host(numbers: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Vectors of numbers as lists, in one transfer for each device."""
    devices: dict[torch.device, list[str]] = {}
    for name, vector in numbers.items():
        devices.setdefault(vector.device, []).append(name)
    found: dict[str, list[int]] = {}
    for names in devices.values():
        together = iter(torch.cat([numbers[name] for name in names]).tolist())
        found |= {name: list(islice(together, len(numbers[name]))) for name in names}
    return {name: found[name] for name in numbers}


# --- One device -------------------------------------------------------------------------------------


class _Device:
    """Sums up tensors on one device.

    Args:
        device: Where.
        compiled: As in ``fingerprints``.
    """

    def __init__(self, device: torch.device, compiled: bool | None) -> None:
        self._device = device
        self._compiled = device.type == "cuda" and _has_triton() if compiled is None else compiled
        self._may_fail = compiled is None
        self._block = _BLOCK
        self._buffers: torch.Tensor | None = None

    def lanes(self, tensor: torch.Tensor, offsets: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """What a part of a tensor adds to the lanes; shape [2].

        Args:
            tensor: The part.
            offsets: Where in the whole it begins, in elements along each dimension.
            shape: Of the whole.
        """
        size = tensor.element_size()
        sums = [
            self._of_words(words, start)
            for run, first in _runs(tensor, offsets, shape, 0, self._block * ROW * WORD // size)
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
            except RuntimeError:
                if not self._may_fail:
                    raise
                self._compiled = False  # a machine without a compiler has triton too
        in_rows = (self._in_threads if self._device.type == "cpu" else self._in_blocks)(words)
        return (in_rows * self._row_keys(row, row + len(words))).sum(1)

    def _in_threads(self, words: torch.Tensor) -> torch.Tensor:
        """Sums of each row of words [n, 4096], before row keys; shape [2, n]."""
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
        yield tensor.view(-1), start
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
            yield part.contiguous().resolve_conj().resolve_neg().view(-1), start + first * row
    else:
        for index, inner in enumerate(tensor):
            yield from _runs(inner, offsets[1:], shape[1:], start + index * row, most)


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


# --- Meshes -----------------------------------------------------------------------------------------


def _is_distributed(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; none can be while their module is not imported, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _part(tensor: DTensor, name: str) -> tuple[torch.Tensor, tuple[int, ...], tuple[bool, ...]]:
    """This rank's part of a DTensor.

    Returns:
        The part; where in the whole it begins, in elements along each dimension; whether the parts along each
        dimension of the mesh are to be added up. Those along the others are replicas.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    offsets, shape = [0] * tensor.dim(), list(tensor.shape)
    if any(type(placement) not in (Replicate, Shard) for placement in placements):
        return tensor.full_tensor(), tuple(offsets), (False,) * mesh.ndim
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            each = -(-shape[placement.dim] // mesh.size(axis))  # as torch.chunk splits
            first = min(each * mesh.get_local_rank(axis), shape[placement.dim])
            offsets[placement.dim] += first
            shape[placement.dim] = min(each, shape[placement.dim] - first)
    local = tensor.to_local()
    if (local.numel() or prod(shape)) and list(local.shape) != shape:
        raise FreezeError(
            f"{shown(name)}: this rank's part has the shape {list(local.shape)}, where {shape} was expected"
        )
    return local, tuple(offsets), tuple(isinstance(placement, Shard) for placement in placements)


def _over_mesh(mesh: DeviceMesh, sharded: Sequence[bool], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adds up what the ranks of a mesh have, and compares their replicas.

    Args:
        mesh: Of all these tensors.
        sharded: For each dimension of the mesh, whether to add or to compare along it.
        parts: Lanes of this rank's n parts, each of shape [2].

    Returns:
        Lanes of the wholes, and 1 where replicas differ, else 0; shape [n, 3].
    """
    from torch.distributed import ReduceOp, all_reduce

    kind = mesh.device_type  # where the ranks can reach one another; parts may have been moved to the host
    sums = torch.stack([part if part.device.type == kind else part.to(kind) for part in parts])
    axes = [(axis, sharded[axis]) for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    for axis, adds in axes:
        if adds:
            all_reduce(sums, ReduceOp.SUM, group=mesh.get_group(axis))
    extremes = torch.stack((sums, ~sums))  # the largest, and the complement of the smallest
    for axis, adds in axes:
        if not adds:
            all_reduce(extremes, ReduceOp.MAX, group=mesh.get_group(axis))
    differ = (extremes[0] != ~extremes[1]).any(1, keepdim=True)
    return torch.cat((sums, differ.to(torch.int64)), 1)
