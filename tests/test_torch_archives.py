"""Archives of ``torch.save`` as checkpoints: every command reads them, and nothing in them runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurg

from .architectures import train
from .oracle import read_checkpoint

SPECS = Path(__file__).parent.parent / "specs"
KEEP = {"version": 1, "freeze": "**"}
INDEX = "pytorch_model.bin.index.json"

#: How torch writes an archive, and how it did before 1.6.
CONTAINERS: dict[str, dict[str, Any]] = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5))
    return OrderedDict(body.state_dict(prefix="body."), head=torch.randn(7, 5))


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What ckptsurg reads."""
    with ckptsurg.open_checkpoint(path) as checkpoint:
        return {
            name: (info.dtype, info.shape, b"".join(map(bytes, checkpoint.read(name))))
            for name, info in checkpoint.tensors.items()
        }


def expected(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the safetensors library makes of them, read by hand."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, folder / "expected")
    found = read_checkpoint(folder / "expected").tensors
    return {name: (tensor.dtype, tensor.shape, tensor.data) for name, tensor in found.items()}


def refusal(path: Path, kind: type[ckptsurg.CkptsurgError] = ckptsurg.CheckpointError) -> str:
    descriptors = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(kind) as caught:
        ckptsurg.open_checkpoint(path)
    assert len(list(Path("/dev/fd").iterdir())) == descriptors
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path.parent))
    return message


def warnings_of(path: Path) -> list[str]:
    with ckptsurg.open_checkpoint(path) as checkpoint:
        return [said.removeprefix(f"{path}: ") for said in checkpoint.warnings]


# --- Bits -------------------------------------------------------------------------------------------


def _every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(240, dtype=torch.uint8)
    names = (
        "uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 complex64 float8_e4m3fn "
        "float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    )
    return {name: raw.clone().view(getattr(torch, name)).reshape(3, -1) for name in names.split()} | {
        "bool": raw % 3 == 0
    }


def _every_layout() -> dict[str, torch.Tensor]:
    grid = torch.arange(120, dtype=torch.int32).reshape(4, 5, 6)
    return {
        "transposed": grid.transpose(0, 2),
        "stepped": grid[::2, :, 1::2],
        "expanded": torch.tensor([[7], [8]]).expand(2, 9),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "row_of_a_larger_storage": torch.arange(10**6)[5:9],
        "column": grid[:, 2, 3],
        "scalar": torch.tensor(2.5),
        "one_strided": torch.arange(9)[::4][1:2],
        "empty": torch.empty(0, 3),
        "empty_view": grid[2:2],
        "conjugate": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        "parameter": nn.Parameter(torch.randn(3)),
    }


def _older_dtypes() -> dict[str, torch.Tensor]:
    """Those that torch reads back from the older format."""
    newer = {str(dtype).removeprefix("torch.") for dtype in torch.storage._new_dtypes()}
    return {name: tensor for name, tensor in _every_dtype().items() if name not in newer}


@pytest.mark.parametrize(
    ("container", "make"),
    [("zip", _every_dtype), ("zip", _every_layout), ("legacy", _older_dtypes), ("legacy", _every_layout)],
)
def test_every_dtype_and_layout_keeps_its_bits(tmp_path, container, make):
    tensors = make()
    assert len(tensors) > 10
    torch.save(tensors, tmp_path / "a.pt", **CONTAINERS[container])
    wanted = expected(tensors, tmp_path)
    assert stored(tmp_path / "a.pt") == wanted
    ckptsurg.rewrite(KEEP, tmp_path / "a.pt", tmp_path / "out.safetensors")
    out = read_checkpoint(tmp_path / "out.safetensors").tensors
    assert {name: (tensor.dtype, tensor.shape, tensor.data) for name, tensor in out.items()} == wanted


def test_an_archive_packed_again_with_compression_keeps_its_bits(tmp_path):
    torch.save(state_dict(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as plain, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    assert stored(tmp_path / "b.pth") == expected(state_dict(), tmp_path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_tied_tensors_are_each_written_and_named(tmp_path, container):
    weight, other = torch.randn(4, 3), torch.randn(6, 2)
    tensors = {"embed.weight": weight, "lm_head.weight": weight, "half": other[:3], "rest": other[3:]}
    torch.save(tensors, tmp_path / "a.pth", **CONTAINERS[container])
    assert stored(tmp_path / "a.pth") == expected(tensors, tmp_path)
    assert warnings_of(tmp_path / "a.pth") == [
        "embed.weight, lm_head.weight: one tensor in the archive; each is written"
    ]


def test_memory_does_not_grow_with_an_archive(tmp_path):
    """600 MB in three tensors: what the process holds of its own is sampled at every chunk written."""
    script = """
import sys, torch, ckptsurg

def held():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) >> 10

folder = sys.argv[1]
torch.save({f"w{i}": torch.full((50, 1 << 20), float(i)) for i in range(3)}, folder + "/big.pth")
torch.save({"w": torch.zeros(4)}, folder + "/small.pth")
ckptsurg.rewrite({"version": 1, "freeze": "**"}, folder + "/small.pth", folder + "/small")  # imports what it needs
before, samples = held(), []
ckptsurg.rewrite(
    {"version": 1, "freeze": "**"}, folder + "/big.pth", folder + "/out", progress=lambda *_: samples.append(held())
)
assert len(samples) > 200, len(samples)
print(max(samples) - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True)
    shutil.rmtree(tmp_path / "out")
    assert int(done.stdout) < 40, "megabytes"


def test_a_change_while_it_is_read_is_noticed(tmp_path):
    torch.save({"a": torch.zeros(3, 1 << 20), "b": torch.zeros(4)}, tmp_path / "a.pth")
    with ckptsurg.open_checkpoint(tmp_path / "a.pth") as checkpoint:
        chunks = checkpoint.read("a")
        next(chunks)
        os.truncate(tmp_path / "a.pth", 1000)  # to read on would kill the process
        with pytest.raises(ckptsurg.CheckpointError, match=r"a\.pth was changed while it was read"):
            list(chunks)


def test_a_closed_archive_is_not_read(tmp_path):
    torch.save(state_dict(), tmp_path / "a.pth")
    with ckptsurg.open_checkpoint(tmp_path / "a.pth") as checkpoint:
        pass
    with pytest.raises(ckptsurg.UsageError, match="the checkpoint is closed"):
        checkpoint.read("head")


# --- Where the weights are --------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_beside_what_else_training_saves(tmp_path, container, key):
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2)).sum().backward()
    optimizer.step()
    saved = {"epoch": 3, key: state_dict(), "optimizer": optimizer.state_dict(), "best": torch.tensor(0.9), 4: None}
    torch.save(saved, tmp_path / "a.pth", **CONTAINERS[container])
    assert stored(tmp_path / "a.pth") == expected(state_dict(), tmp_path)
    assert warnings_of(tmp_path / "a.pth") == [
        f'only the tensors of "{key}" are read; left out: epoch (int), optimizer (dict), best (Tensor), 4 (NoneType)'
    ]


def test_what_is_no_tensor_is_left_out_and_named(tmp_path):
    saved = state_dict() | {"body._extra_state": {"scale": torch.ones(1)}, "arch": "resnet18"}
    torch.save(saved, tmp_path / "a.pth")
    assert stored(tmp_path / "a.pth") == expected(state_dict(), tmp_path)
    left_out = "left out: body._extra_state (dict), arch (str)"
    assert warnings_of(tmp_path / "a.pth") == [f"only the tensors are read; {left_out}"]
    notes = ckptsurg.plan(KEEP, tmp_path / "a.pth").notes
    assert [note for note in notes if left_out in note] == [
        f"{tmp_path / 'a.pth'}: only the tensors are read; {left_out}"
    ]


def test_a_whole_application_under_one_key(tmp_path):
    torch.save({"app": {"model": state_dict(), "optim": {}}}, tmp_path / "a.pth")
    assert stored(tmp_path / "a.pth") == expected(state_dict(), tmp_path)
    assert warnings_of(tmp_path / "a.pth") == ['only the tensors of "app.model" are read; left out: app.optim (dict)']


WEIGHTS = {"w": torch.ones(2)}
#: What is saved, and what is said of it.
NO_STATE_DICTS: dict[str, tuple[Any, str]] = {
    "list": ([torch.ones(2)], "expected a state dict, a dictionary of tensors by name; found a list"),
    "tensor": (torch.ones(2), "expected a state dict, a dictionary of tensors by name; found a Tensor"),
    "empty": ({}, "holds no tensor (hint: save the model's state_dict())"),
    "no-tensor": ({"epoch": 3, "lr": 0.1}, "holds no tensor; found: epoch (int), lr (float)"),
    "two": ({"model": WEIGHTS, "state_dict": WEIGHTS}, "holds several state dicts: state_dict, model; which one is"),
    "unknown-keys": ({"net": WEIGHTS, "ema": WEIGHTS, "epoch": 1}, "found them under: net, ema"),
    "deep": (reduce(lambda inner, _: {"a": inner}, range(9), WEIGHTS), "dictionaries in dictionaries, 8 deep"),
    "odd-key": ({"w": torch.ones(2), ((((1,),),),): 1}, "a key that is neither text nor a number"),
    "number-as-name": ({1: torch.ones(2)}, "the name of a tensor must be text, found int 1"),
    "reserved-name": ({"__metadata__": torch.ones(2)}, 'tensor "__metadata__": safetensors has no tensor of that name'),
    "surrogate-name": ({"a\ud800": torch.ones(2)}, r'tensor "a\ud800": the name has a lone surrogate'),
    "sparse": ({"a": torch.ones(4).to_sparse()}, '"a" has the layout torch.sparse_coo; only dense tensors'),
    "meta": ({"a": torch.empty(3, device="meta")}, '"a" is on the meta device: it has no values yet'),
    "complex128": ({"a": torch.ones(2, dtype=torch.complex128)}, '"a" is torch.complex128, which safetensors does not'),
    "namespace": ({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, "holds argparse.Namespace, which could run"),
    "numpy": ({"w": torch.ones(2), "acc": np.float64(1)}, "multiarray.scalar, which could run code as it is loaded"),
    "whole-model": (nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear, which could run code as it is loaded; only "
                    "weights and plain data are read (hint: of a whole model, save its state_dict() instead"),
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_one_dictionary_of_tensors_is_taken_and_named(tmp_path, container):
    torch.save({"net": WEIGHTS, "epoch": 1}, tmp_path / "a.pth", **CONTAINERS[container])
    with ckptsurg.open_checkpoint(tmp_path / "a.pth") as opened:
        assert opened.tensors.keys() == WEIGHTS.keys()
        assert [said for said in opened.warnings if 'only the tensors of "net" are read; left out: epoch (int)' in said]


def test_a_storage_is_never_read_past_its_end(tmp_path):
    """Mapped, it would be: the next member of the archive would pass for weights."""
    torch.save({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive, zipfile.ZipFile(tmp_path / "short.pth", "w") as short:
        for member in archive.namelist():
            short.writestr(member, archive.read(member)[: 4 if member.endswith("data/0") else None])
    assert "the storage 0 has 4 bytes, expected 12" in refusal(tmp_path / "short.pth")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", NO_STATE_DICTS)
def test_what_is_no_state_dict_is_refused(tmp_path, container, case):
    saved, said = NO_STATE_DICTS[case]
    torch.save(saved, tmp_path / "a.pth", **CONTAINERS[container])
    assert said in refusal(tmp_path / "a.pth")


def test_quantised_and_nested_tensors_are_refused_by_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are on their way out of torch, and it says so
        quantised = torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"a": quantised}, tmp_path / "a.pth")
    assert '"a" is quantised (torch.quint8)' in refusal(tmp_path / "a.pth")
    torch.save({"b": nested}, tmp_path / "b.pth")
    assert '"b" is a nested tensor; only dense tensors are compared' in refusal(tmp_path / "b.pth")


# --- What is no archive -----------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_archive_cut_short_anywhere_is_refused(tmp_path, container):
    torch.save({"a": torch.ones(300)}, tmp_path / "a.pth", **CONTAINERS[container])
    raw = (tmp_path / "a.pth").read_bytes()
    for length in (0, 1, 3, 5, 30, 64, 100, 300, 700, len(raw) // 2, len(raw) - 1200, len(raw) - 20, len(raw) - 1):
        (tmp_path / "cut.pth").write_bytes(raw[:length])
        message = refusal(tmp_path / "cut.pth")
        assert "damaged" in message or "cut short" in message or length < 4
        assert "hint: fetch it or save it again" in message


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04"])
def test_garbage_is_refused(tmp_path, start):
    for seed in range(20):
        (tmp_path / "a.pth").write_bytes(start + np.random.default_rng(seed).bytes(3000))
        message = refusal(tmp_path / "a.pth")
        assert ("damaged" if start else "expected an archive of torch.save, found 0x") in message


def as_torch_reads(path: Path) -> dict[str, bytes]:
    """The bits that torch itself finds."""
    tensors = {name: value for name, value in torch.load(path).items() if isinstance(value, torch.Tensor)}
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("container", CONTAINERS)
def test_with_any_byte_changed_an_archive_is_refused_or_read_right(tmp_path, container):
    tensors = {"a": torch.arange(1.0, 5.0), "b": torch.ones(2, 3, dtype=torch.float16)}
    torch.save(tensors, tmp_path / "a.pth", **CONTAINERS[container])
    good, raw = stored(tmp_path / "a.pth"), (tmp_path / "a.pth").read_bytes()
    bits = {place for *_, data in good.values() for place in range(raw.index(data), raw.index(data) + len(data))}
    said = []
    for place, mask in ((place, mask) for place in range(len(raw)) for mask in (0x01, 0xFF)):
        (tmp_path / "b.pth").write_bytes(raw[:place] + bytes([raw[place] ^ mask]) + raw[place + 1 :])
        try:
            found = stored(tmp_path / "b.pth")
        except ckptsurg.CheckpointError as error:
            said.append(str(error))
            continue
        if found != good:  # a tensor's own bits; a name or a shape, where no sums are kept
            assert place in bits or container == "legacy"
            assert {name: data for name, (*_, data) in found.items()} == as_torch_reads(tmp_path / "b.pth")
    assert len(said) > len(raw) / 2
    assert all(one.isprintable() and one.startswith(f"{tmp_path}/b.pth: ") for one in said)


def _torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is, and its archives are still about
        torch.jit.script(nn.Linear(2, 2)).save(path)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<w/>")


#: What makes a file, and what is said of it.
OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torchscript": (_torchscript, "is a TorchScript archive, which holds code (hint: torch.save(torch.jit.load("),
    "other-zip": (_zip, "is a ZIP archive, but none of torch.save"),
    "plain-pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)),
        "is damaged, or no pickle of torch.save",
    ),
    "newer-pickle": (lambda path: torch.save(state_dict(), path, pickle_protocol=4), "with no other pickle protocol"),
    "git-lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer, not the file itself (hint: run `git lfs pull`)",
    ),
    "page": (lambda path: path.write_text("<!doctype html><title>404</title>"), "expected an archive of torch.save"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_archive_is_called_what_it_is(tmp_path, kind):
    make, said = OTHERS[kind]
    make(tmp_path / "a.pth")
    assert said in refusal(tmp_path / "a.pth")


# --- What would take memory or time without end -----------------------------------------------------

PROTOCOL = b"\x80\x02"
OLD_HEAD = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {}))
#: A tuple of a tuple twice, of a tuple twice, 2**64 in all.
NESTED = b")\x85" + b"q\x00h\x00\x86" * 64


def packed(path: Path, pickled: bytes, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """An archive with nothing but a pickle, and what must be there."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


#: What writes a file that a reader could be made to take gigabytes for, and what is said of it.
LARGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "long": (lambda path: packed(path, PROTOCOL + b"}" * 30_000_000 + b"."), "would take 30,000,003 bytes, of an arch"),
    "dictionaries": (lambda path: packed(path, PROTOCOL + b"}" * (1 << 24) + b"."), "far more memory than the file"),
    "sets": (lambda path: packed(path, PROTOCOL + b"\x8f" * (1 << 24) + b"."), "far more memory than the file"),
    "marks": (lambda path: packed(path, PROTOCOL + b"(" * (1 << 24) + b"."), "far more memory than the file"),
    "remembered": (lambda path: packed(path, PROTOCOL + b"}r\0\0\0\0" * (1 << 21) + b"."), "far more memory than"),
    "text": (lambda path: packed(path, PROTOCOL + b"X\0\0\0\1" + b"a" * (1 << 24) + b"."), "expected a state dict"),
    "stored": (lambda path: packed(path, PROTOCOL + b"}" * 9_000_000 + b".", 0), "far more memory than the file"),
    "older": (lambda path: path.write_bytes(OLD_HEAD + PROTOCOL + b"}" * 9_000_000 + b"."), "far more memory than the"),
    "length": (lambda path: path.write_bytes(OLD_HEAD + PROTOCOL + b"X\xff\xff\xff\xff."), "far more memory than the"),
    "one-number": (lambda path: torch.save({"a": torch.ones(1).expand(1 << 15, 1 << 16)}, path), 'tensor "a": would t'),
}


def test_memory_is_in_proportion_to_the_file_whatever_it_says(tmp_path):
    for name, (write, _) in LARGE.items():
        write(tmp_path / f"{name}.pth")
    script = """
import resource, sys
from pathlib import Path
import torch, ckptsurg

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

torch.save({"w": torch.zeros(4)}, sys.argv[1] + "/small.pth")
ckptsurg.open_checkpoint(sys.argv[1] + "/small.pth").close()  # imports what it needs
before = peak()
for path in sorted(map(Path, sys.argv[2:]), key=lambda path: path.stat().st_size):
    try:
        ckptsurg.open_checkpoint(path)
    except ckptsurg.CheckpointError as error:
        assert peak() - before < (1 << 28) + 10 * path.stat().st_size, (path, peak() - before)
        print(error)
"""
    paths = [tmp_path / f"{name}.pth" for name in LARGE]
    done = subprocess.run([sys.executable, "-c", script, tmp_path, *paths], check=True, capture_output=True, text=True)
    said = dict(line.removeprefix(f"{tmp_path}/").split(".pth: ", 1) for line in done.stdout.splitlines())
    assert said.keys() == LARGE.keys()
    for name, (_, wanted) in LARGE.items():
        assert wanted in said[name], said[name]


#: The pickle of what is saved, in the older format, and what is said of it.
ENDLESS = {
    "storage": (NESTED + b"Q.", "a storage that torch does not write"),
    "call": (NESTED + b")R.", "a call of what is no function"),
    "argument": (b"ctorch.serialization\n_get_layout\n" + NESTED + b"\x85R.", "what is given to _get_layout is none"),
    "pair": (b"ccollections\nOrderedDict\n]]" + NESTED + b"aNaa\x85R.", "a key that is neither text nor a number"),
    "state": (b"ccollections\nOrderedDict\n)R" + NESTED + b"b.", "a state that torch does not write"),
    "hexadecimal": (
        b"c_codecs\nencode\nq\1X\1\0\0\0aX\6\0\0\0latin1\x86R" + b"q\2h\1h\2X\3\0\0\0hex\x86R" * 64 + b".",
        "what is given to encode is none of what torch writes",
    ),
    "numbers": (b"ctorch\nFloatTensor\n\x8a\5\0\0\0\0\x10\x85R.", "what is given to FloatTensor is none of what"),
    "zeros": (b"c__builtin__\nbytearray\n\x8a\5\0\0\0\0\x10\x85R.", "what is given to bytearray is none of what"),
    "extension": (b"\x82\1.", "or no pickle of torch.save"),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_what_would_be_built_shown_or_hashed_without_end_is_refused(tmp_path, case):
    pickled, said = ENDLESS[case]
    (tmp_path / "a.pth").write_bytes(OLD_HEAD + PROTOCOL + pickled + PROTOCOL + b"].")
    assert said in refusal(tmp_path / "a.pth")


def repacked(path: Path, out: Path, *, edit: Callable[[bytes], bytes] = bytes, attributes: int = 0) -> None:
    """An archive packed again with compression, its pickle edited, a storage with other attributes."""
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(out, "w") as again:
        for name in plain.namelist():
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = attributes if name.endswith("/data/0") else 0
            raw = plain.read(name)
            again.writestr(member, edit(raw) if name.endswith("data.pkl") else raw)


def test_what_was_in_memory_is_never_taken_for_weights(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pth")
    repacked(tmp_path / "a.pth", tmp_path / "good.pth")
    assert stored(tmp_path / "good.pth") == stored(tmp_path / "a.pth")
    repacked(tmp_path / "a.pth", tmp_path / "bad.pth", attributes=0x10)
    assert "is damaged: data/0 is a folder, by the archive" in refusal(tmp_path / "bad.pth")
    assert torch.load(tmp_path / "bad.pth")["a"].shape == (3,), "torch reads nothing into it"


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_tensor_is_part_of_its_storage(tmp_path, container):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pth", **CONTAINERS[container])
    raw = (tmp_path / "a.pth").read_bytes()
    size = b"QK\x00K\x03\x85"
    assert raw.count(size) == 1
    if container == "zip":
        repacked(tmp_path / "a.pth", tmp_path / "b.pth", edit=lambda raw: raw.replace(size, size[:-2] + b"\x04\x85"))
    else:  # as large as no memory
        (tmp_path / "b.pth").write_bytes(raw.replace(size, size[:-3] + b"\x8a\x06" + b"\x7f" * 6 + b"\x85"))
    assert "what is given to _rebuild_tensor_v2 is none of what torch writes" in refusal(tmp_path / "b.pth")


def test_a_torch_with_the_hole_in_weights_only_is_refused(tmp_path, monkeypatch):
    torch.save(state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cpu"))
    message = refusal(tmp_path / "a.pth", ckptsurg.UsageError)
    assert "not read with PyTorch 2.5.1+cpu" in message and "CVE-2025-32434" in message
    assert message.endswith("(hint: pip install 'torch>=2.6')")


def test_without_torch_it_is_said_what_to_install(tmp_path):
    torch.save(state_dict(), tmp_path / "a.pth")
    script = "import sys; sys.modules['torch'] = None; from ckptsurg.cli import main; main()"
    command = [sys.executable, "-c", script, "inspect", tmp_path / "a.pth"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}/a.pth: is read by PyTorch, which is not installed\nhint: pip install 'ckptsurg[torch]'\n"
    )


# --- Nothing runs -----------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


class CommandLine:
    """The command line, each command in a process of its own; they are forks of one that has imported torch."""

    _SCRIPT = """
import json, os, sys
import torch, ckptsurg.api, ckptsurg.cli.rendering, ckptsurg.cli.commands, ckptsurg.frameworks.pytorch
from ckptsurg.cli import main
for line in sys.stdin:
    said, sys.argv = json.loads(line)
    if (child := os.fork()) == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main()
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(ended.code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def __init__(self, folder: Path) -> None:
        self._said = folder / "stderr"
        self._parent = subprocess.Popen(
            [sys.executable, "-c", self._SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Exit code, and what is on standard error."""
        self._parent.stdin.write(json.dumps([str(self._said), ["ckptsurg", *map(str, arguments)]]) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline()), self._said.read_text()

    def close(self) -> None:
        self._parent.communicate()


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path_factory.mktemp("command"))
    yield line
    line.close()


def refused_by_every_command(command: CommandLine, folder: Path, bad: Path) -> None:
    """Every command that reads a checkpoint exits with 3, wherever it stands, and names what it refuses."""
    save_file(state_dict(), folder / "good.safetensors")
    ckptsurg.write_manifest(ckptsurg.make_manifest("**", folder / "good.safetensors"), folder / "good.json")
    (folder / "spec.json").write_text(json.dumps(KEEP))
    torch.save(state_dict() | {"head": torch.zeros(7, 5)}, folder / "moved.pth")
    good, manifest, spec = folder / "good.safetensors", folder / "good.json", folder / "spec.json"
    for arguments in (
        ("inspect", bad),
        ("plan", spec, bad),
        ("rewrite", spec, bad, "-o", folder / "out"),
        ("manifest", spec, bad, "-o", folder / "made.json"),
        ("verify", manifest, bad),
        ("verify", manifest, folder / "moved.pth", "--baseline", bad),
        ("diff", good, bad),
        ("diff", bad, good),
    ):
        code, said = command(*arguments)
        assert code == 3, said
        assert "holds posix.system, which could run code as it is loaded" in said
        assert len(said.splitlines()) == 2 and "Traceback" not in said
    assert not (folder / "out").exists() and not (folder / "made.json").exists()


def test_the_payload_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_malicious_archive_runs_nothing(command, tmp_path, container):
    payload = Payload(tmp_path / "ran")
    torch.save(payload, tmp_path / "alone.pth", **CONTAINERS[container])
    assert "holds posix.system" in refusal(tmp_path / "alone.pth")
    torch.save({"state_dict": state_dict(), "args": payload}, tmp_path / "bad.pth", **CONTAINERS[container])
    refused_by_every_command(command, tmp_path, tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_a_malicious_shard_runs_nothing(command, tmp_path):
    folder = sharded(tmp_path / "model")
    shard = sorted(folder.glob("*.bin"))[-1]
    torch.save(torch.load(shard, weights_only=True) | {"extra": Payload(tmp_path / "ran")}, shard)
    refused_by_every_command(command, tmp_path, folder)
    assert not (tmp_path / "ran").exists()


def test_what_torch_was_told_to_trust_stays_as_it_was(tmp_path):
    before = torch.serialization.get_safe_globals()
    torch.save({"state_dict": state_dict(), "epoch": 1}, tmp_path / "a.pth")
    stored(tmp_path / "a.pth")
    assert torch.serialization.get_safe_globals() == before


# --- Shards -----------------------------------------------------------------------------------------


def sharded(folder: Path, tensors: dict[str, torch.Tensor] | None = None, size: int = 200) -> Path:
    """``pytorch_model-0000M-of-0000N.bin`` and their index, as huggingface_hub writes them."""
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(tensors or state_dict(), folder, safe_serialization=False, max_shard_size=size)
    assert len(list(folder.glob("*.bin"))) > 2
    return folder


def edit_index(folder: Path, **changes: str | None) -> None:
    """Give tensors of the index other files; None takes them out."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: place for name, place in (index["weight_map"] | changes).items() if place is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_are_read_by_their_folder_and_by_their_index(tmp_path):
    folder = sharded(tmp_path / "model")
    assert stored(folder) == stored(folder / INDEX) == expected(state_dict(), tmp_path)
    seen = ckptsurg.inspect(folder)
    assert [file.file for file in seen.files] == sorted(path.name for path in folder.glob("*.bin"))
    assert {name: place.file for name, place in seen.tensors.items()} == json.loads((folder / INDEX).read_text())[
        "weight_map"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "../outside.bin"}, 'the shard name "../outside.bin" leaves the folder'),
        ({"head": "/etc/outside.bin"}, "is an absolute path"),
        ({"head": "model.safetensors"}, "is not a .bin file"),
        ({"head": "link.bin"}, "is a link that leaves the folder"),
        ({"head": "absent.bin"}, 'the shard "absent.bin" is missing'),
        ({"body.0.bias": None}, 'tensor "body.0.bias" of pytorch_model-00002-of-00003.bin is not in the index'),
        (
            {"more": "pytorch_model-00001-of-00003.bin"},
            'tensor "more" is not in its shard pytorch_model-00001-of-00003',
        ),
        ({"body.0.bias": "pytorch_model-00001-of-00003.bin"}, "is in pytorch_model-00001-of-00003.bin by the index"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, changes, said):
    folder = sharded(tmp_path / "model")
    assert len(list(folder.glob("*.bin"))) == 3
    torch.save(state_dict(), tmp_path / "outside.bin")
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    edit_index(folder, **changes)
    assert said in refusal(folder / INDEX)


def test_with_any_byte_changed_an_index_is_refused_or_read_right(tmp_path):
    folder = sharded(tmp_path / "model", {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(3)}, 8)
    good, raw = stored(folder), (folder / INDEX).read_bytes()
    refused = 0
    for place, mask in ((place, mask) for place in range(len(raw)) for mask in (0x01, 0xFF)):
        (folder / INDEX).write_bytes(raw[:place] + bytes([raw[place] ^ mask]) + raw[place + 1 :])
        try:
            assert stored(folder) == good
        except ckptsurg.CheckpointError:
            refused += 1
    assert refused > len(raw)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path / "model")
    first, *_, last = sorted(folder.glob("*.bin"))
    torch.save(torch.load(first, weights_only=True) | torch.load(last, weights_only=True), last)
    message = refusal(folder / INDEX)
    assert "is in two shards" in message and first.name in message and last.name in message


def test_every_name_is_checked_before_a_shard_is_opened(tmp_path):
    folder = sharded(tmp_path / "model")
    sorted(folder.glob("*.bin"))[0].write_bytes(b"damaged")
    edit_index(folder, head="../outside.bin")
    assert "leaves the folder" in refusal(folder / INDEX)


def test_an_archive_of_a_folder_that_leads_out_of_it_is_refused(tmp_path):
    torch.save(state_dict(), tmp_path / "outside.bin")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(ckptsurg.CheckpointError, match="is a link that leaves the folder"):
        ckptsurg.open_checkpoint(tmp_path / "model")


def test_a_wrong_total_size_is_a_warning(tmp_path):
    folder = sharded(tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": 5}}))
    [said] = warnings_of(folder)
    assert said == f"{folder / INDEX}: total_size is 5; the tensors have {index['metadata']['total_size']:,} bytes"


# --- As base and as trained -------------------------------------------------------------------------


@pytest.fixture
def containers(tmp_path) -> dict[str, Path]:
    """The same weights in every container that torch and Hugging Face have had for them."""
    folder = tmp_path / "containers"
    folder.mkdir()
    save_file(state_dict(), folder / "base.safetensors")
    torch.save(state_dict(), folder / "zip.pth")
    torch.save(state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state_dict(), "epoch": 3}, folder / "lightning.ckpt")
    (folder / "lone").mkdir()
    torch.save(state_dict(), folder / "lone" / "pytorch_model.bin")
    return {path.name: path for path in folder.iterdir()} | {"sharded": sharded(folder / "sharded")}


def test_one_manifest_verifies_every_container(containers):
    manifest = ckptsurg.make_manifest(["**", "!head"], containers["base.safetensors"])
    for path in containers.values():
        report = ckptsurg.verify(manifest, path, exact=True)
        assert report.ok and report.verified == 9
        assert ckptsurg.diff(containers["base.safetensors"], path).ok
        assert ckptsurg.make_manifest(["**", "!head"], path).root == manifest.root


def test_one_spec_makes_one_output_of_every_container(containers, tmp_path):
    spec = {
        "version": 1,
        "drop": "**.num_batches_tracked",
        "freeze": ["**", "!head"],
        "reinit": [{"match": "head", "shape": {0: 9}, "keep": True, "init": {"normal": {"std": 0.02}}}],
        "add": [{"name": "score", "shape": [2], "dtype": "BF16", "init": "zeros"}],
    }
    roots = set()
    for name, path in containers.items():
        for out in (tmp_path / f"{name}.out", tmp_path / f"{name}.out.safetensors"):
            manifest = ckptsurg.rewrite(spec, path, out)
            assert ckptsurg.verify(manifest, out, exact=True).ok
            roots.add(manifest.root)
    assert len(roots) == 1
    base = state_dict()
    out = read_checkpoint(tmp_path / "zip.pth.out.safetensors").tensors
    assert out["head"].data.startswith(base["head"].numpy().tobytes()) and out["head"].shape == (9, 5)
    assert out["body.2.weight"].data == base["body.2.weight"].numpy().tobytes()


def test_an_output_is_split_anew(containers, tmp_path):
    manifest = ckptsurg.rewrite(KEEP, containers["zip.pth"], tmp_path / "out", max_shard_size=300)
    again = ckptsurg.rewrite(KEEP, containers["sharded"], tmp_path / "again", max_shard_size="1MB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert [path.name for path in (tmp_path / "again").glob("*.safetensors")] == ["model.safetensors"]
    assert manifest.root == again.root
    assert stored(tmp_path / "out") == stored(tmp_path / "again") == stored(containers["zip.pth"])


def test_the_manifest_names_the_archive_it_was_made_from(containers, tmp_path):
    manifest = ckptsurg.rewrite(KEEP, containers["zip.pth"], tmp_path / "out")
    [file] = manifest.base
    assert (file.file, file.size) == ("zip.pth", containers["zip.pth"].stat().st_size)
    assert json.loads((tmp_path / "out" / "freeze.json").read_text())["base"][0]["file"] == "zip.pth"
    assert ckptsurg.rewrite(KEEP, containers["zip.pth"], tmp_path / "again") == manifest


def test_one_flipped_bit_of_an_archive_is_found_and_named(containers):
    manifest = ckptsurg.make_manifest("**", containers["base.safetensors"])
    path = containers["zip.pth"]
    raw, bits = bytearray(path.read_bytes()), state_dict()["body.2.weight"].numpy().tobytes()
    place = raw.index(bits)
    raw[place + 7] ^= 4
    path.write_bytes(raw)
    report = ckptsurg.verify(manifest, path, baseline=containers["legacy.pth"])
    [difference] = report.drifted
    assert (difference.name, difference.detail.elements_changed) == ("body.2.weight", 1)


# --- Hugging Face -----------------------------------------------------------------------------------


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loads_whole(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    a, b = ({n: t.numpy().tobytes() for n, t in model.state_dict().items()} for model in (one, other))
    return a == b


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_folder_with_an_archive_becomes_one_that_transformers_loads(tmp_path, tied):
    model = llama(tied)
    folder = tmp_path / "llama"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    manifest = ckptsurg.rewrite(KEEP, folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.safetensors", "config.json", "freeze.json"}
    assert not list((tmp_path / "out").glob("*.bin"))
    assert same_bits(loads_whole(tmp_path / "out"), model)
    assert len(manifest.tied) == tied
    notes = ckptsurg.plan(KEEP, folder).notes
    assert any("lm_head.weight: one tensor in the archive" in note for note in notes) == tied


def test_a_sharded_model_folder_becomes_one_that_transformers_loads(tmp_path):
    model = llama(tied=False)
    folder = tmp_path / "llama"
    model.config.save_pretrained(folder)
    sharded(folder, model.state_dict(), size=8000)
    shards = sorted(path.name for path in folder.glob("*.bin"))
    ckptsurg.rewrite(KEEP, folder, tmp_path / "out")
    made = {path.name for path in (tmp_path / "out").iterdir()}
    renamed = {name.replace("pytorch_model-", "model-").replace(".bin", ".safetensors") for name in shards}
    assert made >= renamed | {"model.safetensors.index.json", "config.json"}
    assert len(made & renamed) == len(shards) and f"model-00001-of-{len(shards):05d}.safetensors" in renamed
    assert same_bits(loads_whole(tmp_path / "out"), model)


# --- T1: a pretrained model in a pickled state dict -------------------------------------------------


class Pretrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature_extractor(x))


STATISTICS = {
    f"feature_extractor.{layer}.{name}"
    for layer in (1, 5)
    for name in ("running_mean", "running_var", "num_batches_tracked")
}


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A model that has learnt a little, and whose statistics are its own."""
    torch.manual_seed(0)
    model = Pretrained()
    train(model, torch.optim.Adam(model.parameters()), 3, size=16)
    torch.save(model.state_dict(), tmp_path / "pretrained_model.pth")
    return tmp_path / "pretrained_model.pth"


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, old in before.items() if old.numpy().tobytes() != after[name].numpy().tobytes()}


@pytest.mark.parametrize("way", ["rewrite", "manifest"])
def test_t1_feature_extractor(command, tmp_path, pretrained, way):
    model, spec = Pretrained(), SPECS / "t1-feature-extractor.yaml"
    if way == "rewrite":
        code, said = command("rewrite", spec, pretrained, "-o", tmp_path / "out")
        manifest = tmp_path / "out" / "freeze.json"
        model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    else:
        manifest = tmp_path / "made.json"
        code, said = command("manifest", spec, pretrained, "-o", manifest)
        model.load_state_dict(torch.load(pretrained, weights_only=True))
    assert code == 0, said
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-3)
    with frozen.guard(optimizer, expect_trained=True):
        train(model, optimizer, 10, size=16)
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    code, said = command("verify", manifest, tmp_path / "trained.pth", "--expect-trained")
    assert code == 0, said
    before, after = (torch.load(path, weights_only=True) for path in (pretrained, tmp_path / "trained.pth"))
    assert _moved(before, after) == {"classifier.weight", "classifier.bias"}


def test_t1_as_written_moves_the_statistics(command, tmp_path, pretrained):
    manifest = ckptsurg.make_manifest(SPECS / "t1-feature-extractor.yaml", pretrained)
    ckptsurg.write_manifest(manifest, tmp_path / "made.json")
    model = Pretrained()
    model.load_state_dict(torch.load(pretrained, weights_only=True))
    for parameter in model.feature_extractor.parameters():
        parameter.requires_grad = False
    train(model, torch.optim.Adam(model.classifier.parameters(), lr=1e-3), 10, size=16)
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    code, said = command("verify", tmp_path / "made.json", tmp_path / "trained.pth", "--baseline", pretrained)
    assert code == 1 and said == ""
    report = ckptsurg.verify(manifest, tmp_path / "trained.pth", baseline=pretrained)
    assert {difference.name: difference.cause for difference in report.drifted} == dict.fromkeys(
        STATISTICS, "batchnorm_stats"
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_a_plan_says_where_a_spec_parts_what_was_one_tensor(tmp_path, sharded):
    weight = torch.randn(5, 3)
    torch.save({"embed.weight": weight, "head.weight": weight}, tmp_path / "pytorch_model.bin")
    base = tmp_path / "pytorch_model.bin"
    if sharded:
        base = tmp_path / "pytorch_model.bin.index.json"
        weight_map = dict.fromkeys(("embed.weight", "head.weight"), "pytorch_model.bin")
        base.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def parted(match: str, init: str) -> bool:
        rule = {"match": match, "shape": {0: 7}, "keep": True, "init": init}
        notes = ckptsurg.plan({"version": 1, "reinit": [rule]}, base).notes
        return any("embed.weight, head.weight: one tensor in the base, and not in the output" in note for note in notes)

    assert parted("embed", "mean") and parted("{embed,head}", "xavier_uniform")
    assert not parted("{embed,head}", "mean")
