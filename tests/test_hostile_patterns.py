"""Patterns, names and documents that are made to cost time or memory, or to be taken for others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ckptsurg


def write(path: Path, *names: str) -> Path:
    """A checkpoint of two bytes a tensor."""
    header = {name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * n, 2 * n + 2]} for n, name in enumerate(names)}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(2 * len(names)))
    return path


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{a,b}" * 15_000, "expands to more than 10,000 alternatives"),
        ("{0..9999}" + "a" * 20_000, "expands to 10,000 alternatives of up to 20,004 characters, which is too long"),
        ("re:" + "a{1000}" * 698 + "a" * 992, "not a regular expression that RE2 takes: pattern too large"),
        ("a." * 8_000 + "b", "is longer than 4,096 characters or 256 segments"),
        ("a" + "[1]" * 30_000 + "x", "is longer than 4,096 characters or 256 segments"),
        ("**.*." * 2_000 + "w", "is longer than 4,096 characters or 256 segments"),
        ("*." * 255 + "w", "matches nothing"),
    ],
)
def test_patterns(tmp_path, pattern, said):
    base = write(tmp_path / "x.safetensors", "a.b", "0." * 10_000 + "w")
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan({"version": 1, "freeze": pattern}, base)
    assert said in str(caught.value)


def test_slices_far_down(tmp_path):
    base = write(tmp_path / "x.safetensors", *(f"{n}." + "0." * 10_000 + "w" for n in range(10)))
    assert ckptsurg.plan({"version": 1, "freeze": "**.*[0]"}, base).counts["frozen"] == 10


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a" * 1_000_001], "has a name of 1,000,001 characters; at most 1,000,000 are allowed"),
        (["0/" * 100_010 + "w"], "names lead to more modules than a model has"),
        ([f"{n}." + "0." * 10_000 + "w" for n in range(11)], "names lead to more modules than a model has"),
    ],
)
def test_names(tmp_path, names, said):
    with pytest.raises(ckptsurg.CheckpointError, match=said):
        ckptsurg.plan({"version": 1, "freeze": "**.w"}, write(tmp_path / "x.safetensors", *names))


def test_names_of_a_tensor_that_is_added_and_shapes(tmp_path):
    base = write(tmp_path / "x.safetensors", "a", "a" * 1_000_000, "a/" * 100_000 + "b")
    assert ckptsurg.plan({"version": 1, "freeze": "a.**.b"}, base).counts["frozen"] == 1
    for name, shape, said in (
        ("a" * 1_000_001, [1], "at most 1,000,000 are allowed"),
        ("b", [1] * 10_000, "a tensor has at most 64 dimensions, found 10,000"),
    ):
        spec = {"version": 1, "add": [{"name": name, "shape": shape, "dtype": "F32", "init": "zeros"}]}
        with pytest.raises(ckptsurg.SpecError, match=said) as caught:
            ckptsurg.plan(spec, base)
        assert len(str(caught.value)) < 1_000


def test_patterns_that_together_take_long(tmp_path):
    """Each is short, and within the limits of one pattern."""
    base = write(tmp_path / "x.safetensors", *(f"a.{n}.w" for n in range(2_000)))
    wide = [{"match": "**.x{0..9999}*", "init": "zeros", "optional": True}]
    many = [{"match": "**.*.{0..9999}.?", "init": "zeros", "optional": True}] * 60
    for rules in (wide, many):
        with pytest.raises(ckptsurg.SpecError, match=r"reinit\[.*one too many for these names"):
            ckptsurg.plan({"version": 1, "reinit": rules}, base)
    patterns = [{"match": f"**.{n}.*", "expect": 1} for n in range(1_000)]
    assert ckptsurg.plan({"version": 1, "freeze": patterns}, base).counts["frozen"] == 1_000


def test_long_names_are_not_compared(tmp_path):
    signs = "".join(chr(0x4E00 + number % 400) for number in range(30_000))
    base = write(tmp_path / "x.safetensors", signs)
    with pytest.raises(ckptsurg.SpecError):
        ckptsurg.plan({"version": 1, "freeze": signs[4000:0:-1]}, base)


def test_of_many_problems_some_are_told(tmp_path):
    (tmp_path / "spec.json").write_text(json.dumps({"version": 1, "freeze": [1] * 100_000}))
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.load_spec(tmp_path / "spec.json")
    said = str(caught.value)
    assert "more" in said.splitlines()[0] + said.splitlines()[-1] and len(said) < 20_000


def test_a_tensor_without_a_name_stands_for_no_other(tmp_path):
    manifest = ckptsurg.make_manifest("**", write(tmp_path / "x.safetensors", "a"))
    nameless = write(tmp_path / "y.safetensors", "")
    report = ckptsurg.verify(manifest, nameless)
    assert [(one.name, one.verdict) for one in report.drifted] == [("a", "missing")] and report.extra == ("",)


def test_a_file_name_that_is_not_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    write(path, "a")
    command = [sys.executable, "-m", "ckptsurg", "inspect", os.fsencode(path), "--json"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(done.stdout)["files"] == [{"file": "\\xff.safetensors", "size": path.stat().st_size}]
    assert ckptsurg.make_manifest("**", path).base[0].file == "\\xff.safetensors"


def test_what_metadata_says_is_shown_safely(tmp_path, caplog):
    names = ("z\u202e\x1b[2J.safetensors", "a.safetensors")
    for number, name in enumerate(names):
        header = {
            "__metadata__": {"k": f"{number}\x1b" * 1000},
            f"t{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
        }
        raw = json.dumps(header).encode()
        (tmp_path / name).write_bytes(len(raw).to_bytes(8, "little") + raw)
    index = {"metadata": {}, "weight_map": {"t0": names[0], "t1": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with ckptsurg.open_checkpoint(tmp_path) as checkpoint:
        [clash] = checkpoint.clashes
    assert clash.isprintable() and len(clash) < 400


@pytest.mark.parametrize("load", [ckptsurg.load_spec, ckptsurg.load_manifest])
def test_a_document_without_end(load):
    with pytest.raises(
        (ckptsurg.SpecError, ckptsurg.ManifestError), match="/dev/zero: is a device; expected a document"
    ):
        load("/dev/zero")


def test_a_spec_that_comes_through_a_pipe(tmp_path):
    base = write(tmp_path / "x.safetensors", "a")
    command = [sys.executable, "-m", "ckptsurg", "plan", "/dev/stdin", base, "--json"]
    done = subprocess.run(command, input='{"version": 1, "freeze": "**"}', capture_output=True, text=True)
    assert json.loads(done.stdout)["counts"]["frozen"] == 1


def test_a_header_of_many_lists_is_refused_before_they_are_made(tmp_path):
    """A list takes 64 bytes, and two letters stand for it."""
    tensors = {f"a[[{n}]], [{{": {"dtype": "U8", "shape": [], "data_offsets": [n, n + 1]} for n in range(20_000)}
    for rest, said in (({"b": [[]] * 500_000}, "a list holds lists or objects"), ({}, None)):
        raw = json.dumps(tensors | rest).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(len(tensors)))
        if said is None:
            assert ckptsurg.inspect(path).tensors.keys() == tensors.keys()
            continue
        with pytest.raises(ckptsurg.CheckpointError, match=said):
            ckptsurg.inspect(path)
