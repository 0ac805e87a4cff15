"""Fingerprints of tensors: what they are, what they see, and that no sharding changes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptsurg import FrozenWeightsChanged
from ckptsurg.errors import FreezeError
from ckptsurg.frameworks.pytorch import TorchTensors
from ckptsurg.integrations.pytorch import fingerprint, lanes
from ckptsurg.integrations.pytorch.fingerprint import Fingerprint, fingerprints

from . import distributed_worlds as worlds

CPU = torch.device("cpu")
B = 4096
DTYPES = [
    getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float8_e4m3fn",
        "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float16", "bfloat16", "float32",
        "float64", "complex64",
    )
    if hasattr(torch, name)
]  # fmt: skip


def splitmix64(state: int) -> Iterator[int]:
    """As in its authors' C: https://prng.di.unimi.it/splitmix64.c."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
        yield z ^ z >> 31


def numbers(seed: int, count: int) -> np.ndarray:
    return np.array([number | 1 for number in itertools.islice(splitmix64(seed), count)], np.uint64)


COLUMNS = [numbers(seed, B) for seed in (0x243F6A8885A308D3, 0x13198A2E03707344)]
ROWS = [numbers(seed, 2100) for seed in (0xA4093822299F31D0, 0x082EFA98EC4E6C89)]


def reference(raw: bytes) -> Fingerprint:
    """The definition, in numpy."""
    words = np.frombuffer(raw + bytes(-len(raw) % (4 * B)), "<i4").astype(np.int64).view(np.uint64).reshape(-1, B)
    first, second = (
        int((rows[: len(words)] * (words @ columns)).sum()) for rows, columns in zip(ROWS, COLUMNS, strict=True)
    )
    return first, second


def raw_of(tensor: torch.Tensor) -> bytes:
    return b"".join(TorchTensors({"t": tensor}, "").read("t"))


def one(tensor: torch.Tensor, **options: bool) -> Fingerprint:
    return fingerprints({"t": tensor}, **options)["t"]


def random_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Any bits, NaNs and subnormal numbers among them."""
    if dtype == torch.bool:
        return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape).astype(bool))
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def test_the_reference_draws_what_splitmix64_draws():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of seed 1234567
    assert list(itertools.islice(splitmix64(1234567), 3)) == published
    assert lanes._keys((1234567, 0), 0, 3, CPU)[0].tolist() == [lanes._signed(number | 1) for number in published]
    assert torch.equal(
        lanes._keys((1, 2), lanes._KEPT - 5, lanes._KEPT + 5, CPU)[:, 5:],
        lanes._keys((1, 2), lanes._KEPT, lanes._KEPT + 5, CPU),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_size_is_as_defined(dtype):
    words = [B - 1, B, B + 1, 3 * B + 17, 128 * B, 300 * B + 5]
    sizes = [0, 1, 2, 3, 5, *(count * 4 // dtype.itemsize for count in words), (B * 4 + 1) // dtype.itemsize]
    tensors = {f"{size}": random_bits(dtype, size, seed=size) for size in sizes}
    assert fingerprints(tensors) == {name: reference(raw_of(tensor)) for name, tensor in tensors.items()}
    assert fingerprints(tensors)["0"] == (0, 0)


LAYOUTS = {
    "scalar": lambda x: x.reshape(-1)[7],
    "transposed": lambda x: x.T,
    "every third": lambda x: x.reshape(-1)[1::3],
    "within a row of bytes": lambda x: x.reshape(-1)[1:],
    "columns": lambda x: x[:, 3:90],
    "expanded": lambda x: x[:, :1].expand(-1, 500),
    "expanded scalar": lambda x: x[0, 0].expand(3, B),
    "permuted": lambda x: x.reshape(30, -1, 13).permute(2, 0, 1),
    "long rows": lambda x: x.reshape(-1)[:6].reshape(2, 3, 1).expand(2, 3, 700_001),
    "trained": lambda x: nn.Parameter(x) if x.is_floating_point() else x,
    "conjugated": lambda x: x.conj(),
    "imaginary part of conjugated": lambda x: x.conj().imag if x.is_complex() else x,
    "conjugated scalar": lambda x: x.conj()[0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex64], ids=str)
def test_the_layout_in_memory_does_not_matter(dtype, layout):
    tensor = LAYOUTS[layout](random_bits(dtype, 330, 1300))
    before = raw_of(tensor)
    assert one(tensor) == reference(before)
    assert raw_of(tensor) == before


def test_modes_of_the_caller_do_not_matter():
    tensor = random_bits(torch.float32, 100, 5000)[:, 1:]
    lanes._kept_keys.cache_clear()
    with torch.inference_mode():
        inferred = {"t": tensor, "made here": torch.ones(3)}
        found = fingerprints(inferred)
    assert found == fingerprints(inferred)
    assert not lanes._kept_keys(CPU)[0].is_inference()
    lanes._kept_keys.cache_clear()
    with torch.device("meta"), torch.autocast("cpu"):
        assert one(tensor) == found["t"]


# --- What is seen -----------------------------------------------------------------------------------


@given(st.sampled_from(DTYPES), st.integers(1, 9000), st.data())
def test_a_flipped_bit_changes_both_lanes(dtype, size, data):
    tensor = random_bits(dtype, size)
    raw = tensor.view(torch.uint8)
    place = data.draw(st.integers(0, len(raw) - 1))
    bit = 0 if dtype == torch.bool else data.draw(st.integers(0, 7))
    before = one(tensor)
    raw[place] ^= 1 << bit
    after = one(tensor)
    assert before[0] != after[0]
    assert before[1] != after[1]


@given(st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64]), st.data())
@settings(max_examples=50)
def test_two_swapped_rows_are_seen(dtype, data):
    tensor = random_bits(dtype, data.draw(st.integers(2, 9)), data.draw(st.sampled_from([2, 64, 1000, B, B + 1])))
    first = data.draw(st.integers(0, len(tensor) - 2))
    second = data.draw(st.integers(first + 1, len(tensor) - 1))
    order = torch.arange(len(tensor))
    order[first], order[second] = second, first
    swapped = tensor[order]
    assert (one(tensor) == one(swapped)) == (raw_of(tensor) == raw_of(swapped))


@given(st.sets(st.integers(0, 20_000), min_size=2, max_size=40))
@settings(max_examples=50)
def test_flipped_signs_of_doubles_are_seen(places):
    # In words of 64 bits the sign would be the highest bit, and two flips would add up to 2^64, which is nothing.
    tensor = random_bits(torch.float64, 20_001)
    before = one(tensor)
    tensor[sorted(places)] *= -1
    assert one(tensor) != before


def test_what_equal_numbers_hide_is_seen():
    for value in (1.0, 0.5, -3.0):
        ones = torch.full((64, B), value)
        changes = {"decayed": ones * 0.999, "by a bit": ones.nextafter(torch.zeros(())), "negated": -ones}
        for length in (2, B - 2, B + 1, 4 * B):
            changes[f"{length} negated"] = torch.cat((-ones.reshape(-1)[:length], ones.reshape(-1)[length:]))
        found = [one(ones), *fingerprints(changes).values()]
        assert len({number for lanes in found for number in lanes}) == 2 * len(found)


def test_a_bit_that_no_value_shows_is_seen():
    zero, quiet, other = torch.zeros(3), torch.full((3,), torch.nan), torch.full((3,), torch.nan)
    other.view(torch.int32)[1] ^= 1
    assert one(zero) != one(-zero)
    assert bool(other.isnan().all())
    assert one(quiet) != one(other)


@pytest.mark.skipif(not hasattr(torch, "hash_tensor"), reason="this torch has no hash_tensor")
def test_hash_tensor_of_torch_misses_what_is_seen_here():
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(64, 128)
    for before, after in ((rows, rows.flip(0)), (ones, ones * 0.5)):
        assert not torch.equal(before, after)
        assert torch.equal(torch.hash_tensor(before), torch.hash_tensor(after))
        assert one(before) != one(after)


# --- Parts ------------------------------------------------------------------------------------------


@given(st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.complex64]), st.data())
@settings(deadline=None)
def test_the_parts_of_any_cut_add_up(dtype, data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 7]), max_size=2).map(tuple)) + data.draw(
        st.sampled_from([(), (1,), (33,), (70, 131)])
    )
    tensor = random_bits(dtype, *shape)
    cuts = [
        [0, *sorted(data.draw(st.sets(st.integers(0, size), max_size=2 if size > 3 else 1))), size] for size in shape
    ]
    device = lanes.Lanes(CPU, compiled=False)
    device._block = data.draw(st.sampled_from([1, 2, 1024]))
    total = torch.zeros(2, dtype=torch.int64)
    for box in itertools.product(*(itertools.pairwise(points) for points in cuts)):
        part = tensor[tuple(slice(*span) for span in box)]
        piece = lanes.Piece(part, [start for start, _ in box], shape)
        alone, (together,) = device._of_one(piece), device.of([piece])
        assert alone.tolist() == together.tolist()
        total += together
    assert tuple(lane % 2**64 for lane in total.tolist()) == reference(raw_of(tensor))


def test_far_positions_have_keys_of_their_own():
    # 2^28 words and more before the part, as in a shard of an embedding: row keys beyond those that are kept.
    device = lanes.Lanes(CPU, compiled=False)
    part = random_bits(torch.float32, 3, B)
    far = lanes._KEPT - 1
    found = device.of([lanes.Piece(part, (far, 0), (far + 3, B))])[0].tolist()
    assert device._of_one(lanes.Piece(part, (far, 0), (far + 3, B))).tolist() == found
    expected = [
        sum(
            int(value) * int(column) * (int(row) | 1)
            for values, row in zip(part.view(torch.int32).tolist(), rows, strict=True)
            for value, column in zip(values, COLUMNS[lane], strict=True)
        )
        % 2**64
        for lane, seed in enumerate((0xA4093822299F31D0, 0x082EFA98EC4E6C89))
        for rows in [list(itertools.islice(splitmix64(seed), far, far + 3))]
    ]
    assert [lane % 2**64 for lane in found] == expected


# --- Speed without a change -------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_other_devices_add_up_the_same_rows(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    device = lanes.Lanes(CPU, compiled=False)
    device._block = 50
    for rows in (1, 55, 57, 170, 333):
        words = random_bits(torch.int32, rows, B)
        expected = [(words.numpy().astype(np.int64).view(np.uint64) @ keys).astype(np.int64) for keys in COLUMNS]
        assert np.array_equal(device._in_threads(words).numpy(), expected)
        assert np.array_equal(device._in_blocks(words).numpy(), expected)


def test_compiled_is_eager_bit_for_bit(monkeypatch):
    sizes = {"small": 5000, "a block": 128 * B, "larger": 333 * B + 77}
    tensors = {
        f"{name} {dtype}": random_bits(dtype, size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    }
    monkeypatch.setattr(lanes, "_BLOCK", 128)
    eager = fingerprints(tensors, compiled=False)
    assert fingerprints(tensors, compiled=True) == eager
    monkeypatch.setattr(lanes, "_COMPILED_ROWS", 150)
    assert fingerprints(tensors, compiled=True) == eager


def test_where_nothing_compiles_it_is_eager_unless_asked_for(monkeypatch):
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    tensor = random_bits(torch.float32, 200, B)
    monkeypatch.setattr(lanes, "_compiled", lambda: broken)
    monkeypatch.setattr(lanes, "_BLOCK", 128)
    with pytest.raises(RuntimeError, match="no compiler"):
        one(tensor, compiled=True)
    device = lanes.Lanes(CPU, None)
    device._compiled = True  # as it is on CUDA
    [found] = device.of([lanes.Piece(tensor, (0, 0), (200, B))])
    assert [lane % 2**64 for lane in found.tolist()] == list(one(tensor))


def test_the_host_reads_once(monkeypatch):
    tensors = {f"{i}": random_bits(torch.bfloat16, 40 * i, 3001)[:, i:] for i in range(1, 9)}
    with worlds.Reads() as reads:
        fingerprints(tensors)
    assert reads.names == ["tolist"]
    # A tensor of the meta device has no values: reading one, in any way, raises.
    monkeypatch.setattr(fingerprint, "_on_host", lambda vectors: {name: [0, 0] for name in vectors})
    fingerprints({name: tensor.to("meta") for name, tensor in tensors.items()})


# --- Over processes ---------------------------------------------------------------------------------


def _rank(rank: int, rendezvous: str) -> None:
    """What each of four processes checks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=4)
    calls = []
    plain_all_reduce = dist.all_reduce
    four, two = init_device_mesh("cpu", (4,)), DeviceMesh("cpu", [1, 3])
    single = [DeviceMesh("cpu", [each]) for each in range(4)][rank]
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))

    tensors = {
        "uneven": random_bits(torch.bfloat16, 10, 1031),
        "fewer rows than ranks": random_bits(torch.float32, 2, 5000),
        "bytes": random_bits(torch.int8, 7, 3),
        "one row": random_bits(torch.float64, 1, 3),
        "large": random_bits(torch.float32, 70, 3, 4097),
        "experts": random_bits(torch.bfloat16, 3, 9, 2003),
    }
    placements = [
        (mesh, placed)
        for mesh, choices in {
            single: [[Shard(0)], [Replicate()]],
            two: [[Shard(0)], [Shard(1)], [Replicate()]],
            four: [[Shard(0)], [Shard(1)], [Replicate()]],
            grid: [[Replicate(), Shard(0)], [Shard(1), Shard(0)], [Shard(0), Shard(0)], [Shard(0), Replicate()]],
        }.items()
        for placed in choices
    ]
    whole = fingerprints(tensors)
    spread = {
        f"{name} {number}": distribute_tensor(tensor.clone(), mesh, placed)
        for number, (mesh, placed) in enumerate(placements)
        for name, tensor in tensors.items()
        if mesh.get_coordinate() is not None
    }
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), plain_all_reduce(*args, **kwargs))[1]
    with worlds.Reads() as reads:
        found = fingerprints(spread | {"plain": tensors["large"]})
    dist.all_reduce = plain_all_reduce
    assert len(found) == len(spread) + 1
    for name, number in found.items():
        assert number == whole[name.rpartition(" ")[0] or "large"], name
    assert reads.names == ["tolist"]
    # One for each mesh dimension of each (mesh, which dimensions shard): not one for each tensor.
    assert len(calls) == 8 + (2 if two.get_coordinate() else 0), len(calls)

    # Elsewhere in the world a tensor is not there.
    elsewhere = DTensor.from_local(torch.ones(3), two, [Replicate()], run_check=False)
    assert set(fingerprints({"t": elsewhere})) == ({"t"} if rank in (1, 3) else set())

    # What is no plain sharding is gathered.
    pending = DTensor.from_local(torch.full((5,), rank + 1.0), four, [Partial()], run_check=False)
    assert one(pending) == one(torch.full((5,), 10.0))

    # Models as they are sharded in earnest: FSDP, FSDP with replicas, FSDP over tensor parallelism.
    def small() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(30, 17), nn.LayerNorm(17), nn.Linear(17, 3))

    expected = fingerprints(small().state_dict())
    assert fingerprints(fully_shard(small(), mesh=four).state_dict()) == expected
    assert fingerprints(fully_shard(small(), mesh=grid).state_dict()) == expected
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    expected = fingerprints(mlp.state_dict())
    parallelize_module(mlp, grid["model"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(mlp, mesh=grid["data"])
    strided = mlp.state_dict()
    assert any("Strided" in type(placement).__name__ for placement in strided["0.weight"].placements)
    assert fingerprints(strided) == expected

    # A replica that differs is named, on every rank, also where only its other half has moved.
    torn = distribute_tensor(tensors["large"].clone(), grid, [Replicate(), Shard(0)])
    if rank == 3:
        torn.to_local()[5, 1, 7] = 1.0
    copies = distribute_tensor(torch.zeros(3), four, [Replicate()])
    if rank == 2:
        copies.to_local().neg_()
    fine = distribute_tensor(torch.zeros(3), four, [Replicate()])
    with pytest.raises(FrozenWeightsChanged, match=r"^a\.torn: its replicas differ$"):
        fingerprints({"fine": fine, "a.torn": torn})
    with pytest.raises(FrozenWeightsChanged, match=r"^a\.torn, a\.copy: their replicas differ$"):
        fingerprints({"a.torn": torn, "fine": fine, "a.copy": copies})

    # A part that is not where its placement says has no known position.
    odd = DTensor.from_local(torch.ones(2), four, [Shard(0)], run_check=False, shape=(15,), stride=(1,))
    with pytest.raises(
        FreezeError, match=rf"t: the part of rank {rank} has the shape \[2\], where \[[34]\] was expected"
    ):
        fingerprints({"t": odd})
    dist.destroy_process_group()


def test_no_sharding_changes_a_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    worlds.run(4, _rank, str(tmp_path / "rendezvous"))
