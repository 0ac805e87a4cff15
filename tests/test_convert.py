"""The change of container alone: every tensor, every bit, and what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import ckptsurg
from ckptsurg.api import inspect

from .architectures import resnet18


def _convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptsurg", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def _same(state: dict[str, torch.Tensor], converted: dict[str, torch.Tensor]) -> None:
    assert converted.keys() == state.keys()
    for name, tensor in state.items():
        assert converted[name].dtype == tensor.dtype and converted[name].shape == tensor.shape
        assert converted[name].numpy().tobytes() == tensor.detach().numpy().tobytes()


def test_an_archive_becomes_a_file_and_no_manifest(tmp_path):
    state = resnet18(10).state_dict()
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    done = _convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    assert "epoch" in done.stderr and "122 tensors" in done.stdout
    _same(state, load_file(tmp_path / "a.safetensors"))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "a.safetensors"}
    assert ckptsurg.diff(tmp_path / "a.pth", tmp_path / "a.safetensors").ok


def test_tied_tensors_are_each_written_and_named(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    done = _convert(tmp_path / "tied.pt", tmp_path / "tied.safetensors")
    assert done.returncode == 0, done.stderr
    assert "embed.weight" in done.stderr and "head.weight" in done.stderr and "one tensor" in done.stderr
    _same(model.state_dict(), load_file(tmp_path / "tied.safetensors"))


def test_a_folder_keeps_its_shards_and_its_other_files(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    shards = {f"pytorch_model-0000{n}-of-00002.bin": {f"layer{n}.weight": torch.randn(4, 3)} for n in (1, 2)}
    for name, state in shards.items():
        torch.save(state, base / name)
    weight_map = {tensor: name for name, state in shards.items() for tensor in state}
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    done = _convert(base, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    for number in (1, 2):
        state = shards[f"pytorch_model-0000{number}-of-00002.bin"]
        _same(state, load_file(tmp_path / "out" / f"model-0000{number}-of-00002.safetensors"))
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == {f"layer{n}.weight": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}


def test_the_document_is_what_inspect_says_of_the_output(tmp_path):
    torch.save({"a": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "a.pt")
    done = _convert(tmp_path / "a.pt", tmp_path / "a.safetensors", "--json")
    assert json.loads(done.stdout) == json.loads(inspect(tmp_path / "a.safetensors").to_json())


def test_what_stands_there_is_replaced_only_if_asked_for_and_no_manifest_is(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    ckptsurg.rewrite({"version": 1, "freeze": "**"}, {"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    done = _convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert done.returncode == 2
    assert not load_file(tmp_path / "a.safetensors")["a"].any()
    done = _convert(tmp_path / "a.pt", tmp_path / "a.safetensors", "--overwrite")
    assert done.returncode == 2 and "a manifest that would speak for the output" in done.stderr
    assert (tmp_path / "a.freeze.json").exists() and not load_file(tmp_path / "a.safetensors")["a"].any()
    (tmp_path / "a.freeze.json").rename(tmp_path / "old.json")
    assert _convert(tmp_path / "a.pt", tmp_path / "a.safetensors", "--overwrite").returncode == 0
    assert load_file(tmp_path / "a.safetensors")["a"].all()


def test_an_output_is_not_called_what_it_is_not(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    done = _convert(tmp_path / "a.pt", tmp_path / "b.pth")
    assert done.returncode == 2 and "what is written is safetensors" in done.stderr
    assert not (tmp_path / "b.pth").exists()


def test_what_is_in_memory_is_written_too(tmp_path):
    model = resnet18(10)
    ckptsurg.convert(model, tmp_path / "model.safetensors")
    _same(model.state_dict(), load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ckptsurg.UsageError, match="complex128"):
        ckptsurg.convert({"a": torch.ones(2, dtype=torch.complex128)}, tmp_path / "b.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"}


def test_an_output_is_never_its_source(tmp_path):
    source = tmp_path / "a.safetensors"
    ckptsurg.convert({"a": torch.ones(2)}, source)
    before = source.read_bytes()
    for out in (source, Path(tmp_path)):
        done = _convert(source, out, "--overwrite")
        assert done.returncode == 2 and source.read_bytes() == before
