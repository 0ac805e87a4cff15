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

from collections.abc import Mapping, Sequence
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import torch

from ...errors import FreezeError, FrozenWeightsChanged
from ...frameworks.pytorch import as_dtensor
from ...wording import enumerate_names, on_ranks, shown
from .lanes import Lanes, Piece

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Fingerprint", "ReplicasDiffer", "fingerprints"]

#: Both lanes, each from 0 to 2^64 - 1.
Fingerprint: TypeAlias = tuple[int, int]


class ReplicasDiffer(FrozenWeightsChanged):
    """Processes that should have the same of a tensor have not.

    Args:
        names: Of the tensors.
        ranks: The ranks where each moved, as far as that is known.
    """

    def __init__(self, names: Sequence[str], ranks: Mapping[str, Sequence[int]] | None = None) -> None:
        known = {name: where for name, where in (ranks or {}).items() if where}
        placed = enumerate_names(on_ranks(name, known.get(name, ())) for name in names)
        super().__init__(f"{placed}: {'its' if len(names) == 1 else 'their'} replicas differ", ranks=known)
        self.names = tuple(names)


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
        ReplicasDiffer: on all ranks, if the replicas of a DTensor do.
        FreezeError: on the ranks where a DTensor's part is not the one that its placements say.
    """
    lanes: dict[str, torch.Tensor] = {}
    meshes: dict[tuple[DeviceMesh, tuple[bool, ...]], list[str]] = {}
    devices: dict[torch.device, dict[str, Piece]] = {}
    # What is kept between calls is made here: a caller's inference mode must not leave its mark on it.
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            local, offsets = tensor.detach(), (0,) * tensor.dim()
            if (distributed := as_dtensor(local)) is not None:
                mesh = distributed.device_mesh
                if mesh.get_coordinate() is None:
                    continue
                local, offsets, sharded = _part(distributed, name)
                meshes.setdefault((mesh, sharded), []).append(name)
            if rows and name in rows:
                local, offsets = _cut(local, offsets, rows[name])
            devices.setdefault(local.device, {})[name] = Piece(local, offsets, tuple(tensor.shape))
        for device, pieces in devices.items():
            lanes |= zip(pieces, Lanes(device, compiled).of(list(pieces.values())), strict=True)
        for (mesh, sharded), names in meshes.items():
            sums = _over_mesh(mesh, sharded, [lanes[name] for name in names])
            lanes |= zip(names, sums.unbind(), strict=True)
        numbers = _on_host(lanes)
    if torn := [name for name, (_, _, *differ) in numbers.items() if any(differ)]:
        raise ReplicasDiffer(torn)
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


# --- Meshes -----------------------------------------------------------------------------------------


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
            f"{shown(name)}: the part of rank {mesh.get_rank()} has the shape {list(local.shape)}, "
            f"where {shape} was expected"
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
