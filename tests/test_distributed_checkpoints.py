"""Folders of ``torch.distributed.checkpoint``: what sharded training saves is read without a process group."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckptsurg

from . import distributed_worlds as worlds
from .oracle import read_checkpoint
from .test_torch_archives import CommandLine, Payload, refused_by_every_command, state_dict

# One process alone saves here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

KEEP = {"version": 1, "freeze": "**"}


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What ckptsurg reads."""
    with ckptsurg.open_checkpoint(path) as checkpoint:
        return {
            name: (info.dtype, info.shape, b"".join(map(bytes, checkpoint.read(name))))
            for name, info in checkpoint.tensors.items()
        }


def expected(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A safetensors file, read by hand."""
    return {name: (one.dtype, one.shape, one.data) for name, one in read_checkpoint(path).tensors.items()}


def refusal(path: Path) -> str:
    descriptors = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(ckptsurg.CheckpointError) as caught:
        ckptsurg.open_checkpoint(path)
    assert len(list(Path("/dev/fd").iterdir())) == descriptors
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path))
    return message


# --- Sharded training -------------------------------------------------------------------------------


def train_and_save(rank: int, folder: Path, ranks: int) -> None:
    """A process of a group that trains a model sharded over all, and saves it in the ways that there are."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    net = worlds.loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    mesh = init_device_mesh("cpu", (ranks,))
    for module in (net.embed, net.body[0], net.body[3], net.one):
        fully_shard(module, mesh=mesh)
    model = fully_shard(net, mesh=mesh)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "untrained")
    optimizer = worlds.adamw(frozen)
    worlds.train(model, optimizer, rank, 3)
    whole = worlds.whole_state(model)
    if rank == 0:
        save_file(whole, folder / "whole.safetensors")
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer), "step": 3}
    dcp.save(saved, checkpoint_id=folder / "trained")
    dcp.save(model.state_dict(), checkpoint_id=folder / "plain")
    dcp.async_save({"model": model.state_dict()}, checkpoint_id=folder / "async").result()
    torch.save(model.state_dict(), folder / f"pieces.{rank}.pth")
    if rank == 0:  # alone: a collective would wait for the others, who do not come
        report = ckptsurg.verify(folder / "base.freeze.json", folder / "trained")
        (folder / "asked-alone").write_text(str(report.ok))
    report = ckptsurg.verify(folder / "base.freeze.json", folder / "trained", group=dist.group.WORLD)
    (folder / f"asked-together.{rank}").write_text(str(report.ok))
    with pytest.raises(ckptsurg.UsageError, match="is in memory") as refused:
        ckptsurg.verify(folder / "base.freeze.json", model, group=dist.group.WORLD)
    (folder / f"refused-together.{rank}").write_text(str(refused.value))
    if rank == ranks - 1:
        with torch.no_grad():
            model.body[0].weight.to_local().view(-1)[0] += 2.0**-20
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "sabotaged")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["two-processes", "three-processes"])
def world(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    worlds.publish(folder)
    worlds.run(request.param, train_and_save, folder, request.param)
    assert len(list((folder / "trained").glob("*.distcp"))) == request.param
    return folder


def test_what_fsdp_saves_is_read_whole(world):
    base, trained = (expected(world / name) for name in ("base.safetensors", "whole.safetensors"))
    assert stored(world / "untrained") == base
    assert stored(world / "trained") == stored(world / "plain") == stored(world / "async") == trained
    assert {name for name in base if base[name] != trained[name]} == worlds.TRAINED


def test_what_fsdp_saves_verifies(world):
    for name in ("trained", "plain", "async"):
        report = ckptsurg.verify(world / "base.freeze.json", world / name, exact=True, expect_trained=True)
        assert report.ok and report.verified == 12


def test_one_process_of_a_group_may_ask_alone(world):
    assert (world / "asked-alone").read_text() == "True"


def test_all_processes_of_a_group_may_ask_together(world):
    together = list(world.glob("asked-together.*"))
    assert len(together) > 1
    assert all(path.read_text() == "True" for path in together)
    assert len(list(world.glob("refused-together.*"))) == len(together)


def test_a_frozen_tensor_that_moved_is_found(world):
    report = ckptsurg.verify(world / "base.freeze.json", world / "sabotaged", baseline=world / "base.safetensors")
    [difference] = report.drifted
    assert (difference.name, difference.verdict) == ("body.0.weight", "changed")
    assert difference.detail.elements_changed == 1
    assert not ckptsurg.diff(world / "trained", world / "sabotaged").ok


def test_what_fsdp_saves_is_rewritten(world, tmp_path):
    spec = {"version": 1, "freeze": ["**", "!head"], "reinit": [{"match": "head", "shape": {0: 5}, "init": "default"}]}
    one = ckptsurg.rewrite(spec, world / "trained", tmp_path / "one")
    other = ckptsurg.rewrite(spec, world / "whole.safetensors", tmp_path / "other.safetensors")
    assert one.root == other.root
    assert {file.file for file in one.base} == {path.name for path in (world / "trained").iterdir()}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["freeze.json", "model.safetensors"]
    net = worlds.Net()
    net.head = torch.nn.Linear(6, 5)
    net.load_state_dict(load_file(tmp_path / "one" / "model.safetensors"))


def test_the_optimizer_is_left_out_and_named(world):
    left_out = 'only the tensors of "model" are read; left out: optimizer (dict), step (object)'
    [note] = [note for note in ckptsurg.plan(KEEP, world / "trained").notes if "left out" in note]
    assert note == f"{world / 'trained'}: {left_out}"


def test_a_piece_of_a_sharded_state_dict_is_refused(world):
    with pytest.raises(ckptsurg.CheckpointError, match=r"DTensor.*torch\.distributed\.checkpoint"):
        ckptsurg.open_checkpoint(world / "pieces.0.pth")


# --- One process ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    dcp.save({"model": state_dict()}, checkpoint_id=tmp_path / "saved")
    return tmp_path / "saved"


def shard(folder: Path) -> Path:
    [path] = folder.glob("*.distcp")
    return path


def test_what_one_process_saves_verifies(tmp_path, saved):
    save_file(state_dict(), tmp_path / "base.safetensors")
    dcp.save(state_dict(), checkpoint_id=tmp_path / "plain")
    dcp.save({"app": {"model": state_dict(), "optimizer": {"lr": 1}}}, checkpoint_id=tmp_path / "app")
    manifest = ckptsurg.make_manifest(["**", "!head"], tmp_path / "base.safetensors")
    for path in (saved, tmp_path / "plain", tmp_path / "app"):
        assert ckptsurg.verify(manifest, path, exact=True).ok
        assert ckptsurg.make_manifest(["**", "!head"], path).root == manifest.root
        rewritten = ckptsurg.rewrite({"version": 1, "freeze": ["**", "!head"]}, path, tmp_path / f"{path.name}.out")
        assert rewritten.root == manifest.root


def test_dtypes_and_shapes_keep_their_bits(tmp_path):
    raw = torch.arange(96, dtype=torch.uint8)
    tensors = {
        name: raw.clone().view(getattr(torch, name)).reshape(2, -1)
        for name in ("int8", "int16", "int64", "float16", "bfloat16", "float64", "complex64", "float8_e4m3fn")
    }
    tensors |= {"bool": raw % 3 == 0, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "odd/name .": raw}
    dcp.save(tensors | {"transposed": tensors["int16"].T}, checkpoint_id=tmp_path / "saved")
    save_file(tensors | {"transposed": tensors["int16"].T.contiguous()}, tmp_path / "expected")
    assert stored(tmp_path / "saved") == expected(tmp_path / "expected")


def test_several_files_of_one_process(tmp_path):
    writer = FileSystemWriter(tmp_path / "saved", single_file_per_rank=False)
    dcp.save(state_dict(), storage_writer=writer)
    save_file(state_dict(), tmp_path / "base.safetensors")
    assert stored(tmp_path / "saved") == expected(tmp_path / "base.safetensors")
    seen = ckptsurg.inspect(tmp_path / "saved")
    assert len({place.file for place in seen.tensors.values()}) == len(state_dict())
    assert {file.file for file in seen.files} == {path.name for path in (tmp_path / "saved").iterdir()}


def test_other_files_of_the_folder_come_along(tmp_path, saved):
    (saved / "config.json").write_text("{}")
    shutil.copy(shard(saved), saved / "__7_0.distcp")  # left over from a save by more processes
    ckptsurg.rewrite(KEEP, saved, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "freeze.json", "model.safetensors"]


def test_a_change_while_it_is_read_is_noticed(saved):
    with ckptsurg.open_checkpoint(saved) as checkpoint:
        os.utime(shard(saved), (1, 1))
        with pytest.raises(ckptsurg.CheckpointError, match=r"\.distcp was changed while it was read"):
            list(checkpoint.read("head"))


def test_a_closed_checkpoint_is_not_read(saved):
    with ckptsurg.open_checkpoint(saved) as checkpoint:
        pass
    with pytest.raises(ckptsurg.UsageError, match="the checkpoint is closed"):
        checkpoint.read("head")


# --- What is refused --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path_factory.mktemp("command"))
    yield line
    line.close()


def test_malicious_metadata_runs_nothing(command, tmp_path, saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data["more"] = Payload(tmp_path / "ran")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    refused_by_every_command(command, tmp_path, saved)
    assert not (tmp_path / "ran").exists()
    dcp.FileSystemReader(saved).read_metadata()
    assert (tmp_path / "ran").exists(), "torch's own reader runs it"


def test_malicious_pieces_run_nothing(tmp_path, saved):
    payload = tmp_path / "payload.pth"
    torch.save(Payload(tmp_path / "ran"), payload)
    raw = payload.read_bytes()
    assert len(raw) < shard(saved).stat().st_size

    def point_at_payload(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path, place.offset, place.length = "payload.distcp", 0, len(raw)

    (saved / "payload.distcp").write_bytes(raw)
    edit(saved, point_at_payload)
    refused = pytest.raises(ckptsurg.CheckpointError, match=r'"head".*holds posix\.system, which could run code')
    with ckptsurg.open_checkpoint(saved) as checkpoint, refused:
        list(checkpoint.read("head"))
    assert not (tmp_path / "ran").exists()


def test_metadata_cannot_alter_a_class(saved):
    # GLOBAL Metadata; a state of (None, {"altered": True}) is built onto it.
    (saved / ".metadata").write_bytes(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dX\x07\x00\x00\x00alteredI01\nstb."
    )
    assert "is damaged: a class or function would be altered" in refusal(saved)
    assert not hasattr(Metadata, "altered")


def edit(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _place(metadata: Metadata, name: str) -> _StorageInfo:
    return metadata.storage_data[MetadataIndex(f"model.{name}", torch.Size([0] * len(_record(metadata, name).size)))]


def _record(metadata: Metadata, name: str) -> Any:
    return metadata.state_dict_metadata[f"model.{name}"]


def _shift(metadata: Metadata, sizes: list[int]) -> None:
    _record(metadata, "head").chunks[0].sizes = torch.Size(sizes)


def _overlap(metadata: Metadata) -> None:
    """Two pieces of half the size that are the same half."""
    [chunk] = _record(metadata, "body.2.weight").chunks
    assert list(chunk.sizes) == [5, 4]
    chunk.sizes = torch.Size([5, 2])
    _record(metadata, "body.2.weight").chunks.append(copy.copy(chunk))


def _hole(metadata: Metadata) -> None:
    """Of four quarters one is there twice, and one not at all."""
    [chunk] = _record(metadata, "body.2.weight").chunks
    place = _place(metadata, "body.2.weight")
    for offsets in ([0, 0], [0, 2], [3, 0], [3, 0]):
        sizes = [3 - offsets[0] or 2, 2]
        _record(metadata, "body.2.weight").chunks.append(type(chunk)(torch.Size(offsets), torch.Size(sizes)))
        metadata.storage_data[MetadataIndex("model.body.2.weight", torch.Size(offsets))] = place
    _record(metadata, "body.2.weight").chunks.remove(chunk)


def _resize(metadata: Metadata, size: list[int]) -> None:
    _record(metadata, "head").size = torch.Size(size)
    _shift(metadata, size)


def _cut_along_all(metadata: Metadata) -> None:
    record = _record(metadata, "head")
    record.size = torch.Size([2] * 9)
    record.chunks[0].offsets, record.chunks[0].sizes = torch.Size([1] * 9), torch.Size([1] * 9)


#: What is done to good metadata, and what is said of it.
EDITS: dict[str, tuple[Any, str]] = {
    "leaves-the-folder": (
        lambda m: setattr(_place(m, "head"), "relative_path", "../x.distcp"),
        'tensor "head": the shard name "../x.distcp" leaves the folder',
    ),
    "absolute": (lambda m: setattr(_place(m, "head"), "relative_path", "/etc/passwd"), "is an absolute path"),
    "other-ending": (lambda m: setattr(_place(m, "head"), "relative_path", "x.pt"), "is not a .distcp file"),
    "absent": (lambda m: setattr(_place(m, "head"), "relative_path", "x.distcp"), "the file x.distcp is missing"),
    "beyond-the-end": (lambda m: setattr(_place(m, "head"), "offset", 10**6), "is cut short: expected at least 1,00"),
    "before-the-start": (lambda m: setattr(_place(m, "head"), "offset", -1), "is cut short"),
    "no-place": (lambda m: m.storage_data.clear(), "the metadata does not say where its piece at [0, 0"),
    "piece-too-small": (lambda m: _shift(m, [6, 5]), 'tensor "head": its pieces are not the whole of it'),
    "piece-too-large": (lambda m: _shift(m, [8, 5]), 'tensor "head": its pieces are not the whole of it'),
    "negative-piece": (lambda m: _shift(m, [-7, -5]), 'the metadata is malformed: "model.head"'),
    "rank": (lambda m: _shift(m, [35]), 'the metadata is malformed: "model.head"'),
    "negative-size": (lambda m: setattr(_record(m, "head"), "size", torch.Size([-7, 5])), 'malformed: "model.head"'),
    "unhashable-path": (lambda m: m.planner_data.update({"model.head": ("model", [])}), 'the path of "model.head"'),
    "overlap": (_overlap, 'tensor "body.2.weight": its pieces are not the whole of it'),
    "hole": (_hole, 'tensor "body.2.weight": its pieces are not the whole of it'),
    "without-end": (
        lambda m: _resize(m, [10**9, 10**9]),
        'tensor "head": its piece at [0, 0] has 1,',
    ),
    "cut-along-all": (_cut_along_all, 'tensor "head": is cut along 9 dimensions; 8 are allowed'),
    "chunks": (lambda m: setattr(_record(m, "head"), "chunks", [5]), 'the metadata is malformed: "model.head"'),
    "name": (lambda m: m.state_dict_metadata.update({5: 1}), "malformed: int in place of a name"),
    "no-dictionary": (lambda m: setattr(m, "storage_data", [1]), "the metadata is malformed: storage_data"),
    "offset": (lambda m: setattr(_place(m, "head"), "offset", "0"), 'malformed: where "model.head" is'),
    "transform": (
        lambda m: setattr(_place(m, "head"), "transform_descriptors", ["stream.zstd"]),
        "was saved through a transform (hint: save it without extensions)",
    ),
    "no-tensors": (lambda m: m.state_dict_metadata.clear(), "holds no tensor"),
    "dtype": (
        lambda m: setattr(_record(m, "head").properties, "dtype", "F32"),
        'the metadata is malformed: "model.head"',
    ),
    "size": (lambda m: setattr(_record(m, "head"), "size", [7, 5]), 'the metadata is malformed: "model.head"'),
    "complex128": (
        lambda m: setattr(_record(m, "head").properties, "dtype", torch.complex128),
        'tensor "head": is torch.complex128, which safetensors does not have',
    ),
    "layout": (
        lambda m: setattr(_record(m, "head").properties, "layout", torch.sparse_coo),
        'tensor "head": has the layout torch.sparse_coo; only dense tensors are compared',
    ),
    "path": (lambda m: m.planner_data.update({"model.head": 5}), 'the metadata is malformed: the path of "model.head"'),
    "two-on-one-path": (
        lambda m: m.planner_data.update({"model.head": ("model", "body.2.bias")}),
        'the metadata is malformed: the path of "model.head"',
    ),
    "storage-data": (lambda m: m.storage_data.update({"x": 1}), "the metadata is malformed: storage_data"),
    "state-dict-metadata": (lambda m: m.state_dict_metadata.update({"x": 1}), 'the metadata is malformed: "x"'),
    "nothing": (lambda m: m.__dict__.clear(), "damaged"),
}


@pytest.mark.parametrize("case", EDITS)
def test_metadata_that_does_not_hold_is_refused(saved, case):
    change, said = EDITS[case]
    edit(saved, change)
    assert said in refusal(saved)


def test_with_any_byte_changed_metadata_is_refused_or_read_right(tmp_path):
    saved = tmp_path / "saved"
    dcp.save({"model": {"a": torch.arange(4.0), "b": torch.ones(2, 3)}, "step": 3}, checkpoint_id=saved)
    good, raw = stored(saved), (saved / ".metadata").read_bytes()
    tensors, said = set(good.values()), []
    for place, mask in ((place, mask) for place in range(len(raw)) for mask in (0x01, 0xFF)):
        (saved / ".metadata").write_bytes(raw[:place] + bytes([raw[place] ^ mask]) + raw[place + 1 :])
        try:
            found = stored(saved)
        except ckptsurg.CheckpointError as error:
            said.append(str(error))
        else:
            assert tensors.issuperset(found.values()), "a name may be another, but nothing else"
    assert len(said) > len(raw) and all(one.isprintable() and one.startswith(str(saved)) for one in said)


def test_with_any_byte_changed_pieces_are_refused_or_read_right(tmp_path):
    tensor = torch.arange(1.0, 9.0)
    dcp.save({"a": tensor}, checkpoint_id=tmp_path / "saved")
    path, good = shard(tmp_path / "saved"), stored(tmp_path / "saved")
    raw, bits = path.read_bytes(), tensor.numpy().tobytes()
    own, refused = range(raw.index(bits), raw.index(bits) + len(bits)), 0
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        try:
            assert (stored(tmp_path / "saved") == good) == (place not in own)
        except ckptsurg.CheckpointError:
            refused += 1
    assert refused > len(raw) / 3


def test_a_piece_of_another_dtype_is_not_converted(saved):
    edit(saved, lambda metadata: setattr(_record(metadata, "head").properties, "dtype", torch.float16))
    with ckptsurg.open_checkpoint(saved) as checkpoint, pytest.raises(ckptsurg.CheckpointError) as caught:
        list(checkpoint.read("head"))
    name = shard(saved).name
    said = f'{saved}: tensor "head": its piece at [0, 0] in {name} is F32 [7, 5], expected F16 [7, 5]'
    assert str(caught.value).startswith(said)


def test_a_tensor_in_many_pieces_is_put_together(tmp_path):
    """A mesh of processes cuts along several dimensions, unevenly."""
    tensor = torch.arange(5 * 7 * 3, dtype=torch.int16).reshape(5, 7, 3)
    boxes = {(a, b, 0): tensor[a : a + m, b : b + n] for a, m in ((0, 2), (2, 3)) for b, n in ((0, 4), (4, 1), (5, 2))}
    dcp.save({str(place): part.clone() for place, part in boxes.items()}, checkpoint_id=tmp_path / "saved")

    def gather(metadata: Metadata) -> None:
        records, places = metadata.state_dict_metadata, metadata.storage_data
        whole = copy.deepcopy(records[str((0, 0, 0))])
        whole.size = tensor.shape
        whole.chunks = [type(whole.chunks[0])(torch.Size(place), part.shape) for place, part in boxes.items()]
        for place in boxes:
            offsets = torch.Size(place)
            places[MetadataIndex("w", offsets)] = places.pop(MetadataIndex(str(place), torch.Size([0, 0, 0])))
        metadata.state_dict_metadata, metadata.planner_data = {"w": whole}, {"w": ("w",)}

    edit(tmp_path / "saved", gather)
    assert stored(tmp_path / "saved") == {"w": ("I16", (5, 7, 3), tensor.numpy().tobytes())}


def test_metadata_that_would_be_shown_or_built_without_end_is_refused(saved):
    nested = b")\x85" + b"q\x00h\x00\x86" * 64
    for pickled, said in (
        (b"ctorch\nSize\n" + nested + b"\x85R.", "more is given to a call than torch writes"),
        (b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n)\x81" + nested + b"b.", "a state that torch"),
        (b"}" * 30_000_000 + b".", "unpickled, it would take far more memory than the file has bytes"),
        (b"\x8d" + b"\xff" * 6 + b"\0\0.", "unpickled, it would take far more memory than the file has bytes"),
    ):
        (saved / ".metadata").write_bytes(b"\x80\x04" + pickled)
        assert said in refusal(saved)


def test_metadata_cut_short_anywhere_is_refused(saved):
    raw = (saved / ".metadata").read_bytes()
    for length in range(0, len(raw) - 1, 37):
        (saved / ".metadata").write_bytes(raw[:length])
        assert "damaged" in refusal(saved)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps({"a": 1}), b"\x80\x05garbage", b"{}"])
def test_other_metadata_is_refused(saved, content):
    (saved / ".metadata").write_bytes(content)
    message = refusal(saved)
    assert "damaged" in message or "the metadata is malformed: expected Metadata, found dict" in message


def test_a_missing_file_is_refused(saved):
    name = shard(saved).name
    shard(saved).unlink()
    assert f"the file {name} is missing (hint: fetch it, or save the checkpoint again)" in refusal(saved)


def test_a_file_cut_short_is_refused(saved):
    path = shard(saved)
    path.write_bytes(path.read_bytes()[:-1500])
    assert f"{path.name} is cut short: expected at least" in refusal(saved)


def test_a_damaged_file_is_one_message(saved):
    path = shard(saved)
    path.write_bytes(bytes(path.stat().st_size))
    with ckptsurg.open_checkpoint(saved) as checkpoint, pytest.raises(ckptsurg.CheckpointError) as caught:
        list(checkpoint.read("head"))
    assert (
        str(caught.value).startswith(f'{saved}: tensor "head": its piece at [0, 0] in {path.name}: expected')
        and str(caught.value).isprintable()
    )


def test_a_file_that_leads_out_of_the_folder_is_refused(tmp_path, saved):
    path = shard(saved)
    path.rename(tmp_path / "outside.distcp")
    path.symlink_to(tmp_path / "outside.distcp")
    assert "is a link that leaves the folder" in str(_error(saved))


def _error(path: Path) -> ckptsurg.CheckpointError:
    with pytest.raises(ckptsurg.CheckpointError) as caught:
        ckptsurg.open_checkpoint(path)
    return caught.value
