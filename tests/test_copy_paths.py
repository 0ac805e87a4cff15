"""The ways by which bytes come to an output: copied, shared, linked, drawn; by any number of threads the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors.torch import load_file

import ckptsurg

from .filesystems import mounted

MIB = 1 << 20
#: One tensor of several pieces, of an odd length; runs of small ones; an empty one.
SIZES = {"a.0": 5 * MIB + 13, "a.1": 7, "a.2": 0, "b.huge": 37 * MIB + 1, "c.0": 4096, "c.1": 3 * MIB, "head": 65_536}
SPEC = {
    "version": 1,
    "drop": "c.0",
    "freeze": ["**", "!head"],
    "reinit": [{"match": "head", "init": "ones"}],
    "add": [{"name": "score", "shape": [300_002, 3], "dtype": "F32", "init": {"normal": {"std": 0.02}}}],
}


def _tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {name: rng.integers(0, 256, size, np.uint8) for name, size in SIZES.items()}
    return tensors | {"head": rng.normal(size=SIZES["head"]).astype(np.float32)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    safetensors.numpy.save_file(_tensors(), path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A folder of three shards: one of them in a header of its own making, none of the library's."""
    folder = tmp_path_factory.mktemp("sharded")
    tensors, weight_map = _tensors(), {}
    for number, names in enumerate((["a.0", "a.1", "a.2"], ["b.huge"], ["c.0", "c.1", "head"]), 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file, {"shard": str(number)})
        weight_map |= dict.fromkeys(names, file)
    second = folder / "model-00002-of-00003.safetensors"
    data = tensors["b.huge"].tobytes()
    entry = {"data_offsets": [0, len(data)], "shape": [len(data)], "dtype": "U8"}
    header = json.dumps({"b.huge": entry, "__metadata__": {"shard": "2"}}, indent=1).encode()
    header += b" " * (-len(header) % 8 + 24)
    second.write_bytes(len(header).to_bytes(8, "little") + header + data)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- Threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", ["blake3", "sha256"])
def test_any_number_of_threads_gives_the_same_bytes(base, tmp_path, digest):
    manifests = [ckptsurg.rewrite(SPEC, base, tmp_path / str(jobs), digest=digest, jobs=jobs) for jobs in (1, 2, 3, 16)]
    outputs = [_files(tmp_path / str(jobs)) for jobs in (1, 2, 3, 16)]
    assert all(output == outputs[0] for output in outputs)
    assert all(manifest == manifests[0] for manifest in manifests)
    written = load_file(tmp_path / "1" / "model.safetensors")
    assert written.keys() == manifests[0].tensors.keys()
    for name, tensor in _tensors().items():
        if name not in ("c.0", "head"):
            assert written[name].numpy().tobytes() == tensor.tobytes()
    if digest == "sha256":
        for name, tensor in written.items():
            found = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            assert manifests[0].tensors[name].digest == f"sha256:{found}"


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_hashed_alone_has_the_same_digests(base, tmp_path, jobs):
    published = ckptsurg.rewrite({"version": 1, "freeze": "**"}, base, tmp_path / "out", jobs=2)
    alone = ckptsurg.make_manifest("**", base, jobs=jobs)
    assert alone.root == published.root
    assert ckptsurg.verify(alone, base, jobs=jobs).verified == len(SIZES)


def test_jobs_are_a_number_from_one(base):
    for jobs in (0, -1, 1.5, True, 10**8):
        with pytest.raises(ckptsurg.UsageError, match="jobs must be a whole number from 1 to 1024"):
            ckptsurg.make_manifest("**", base, jobs=jobs)


# --- Files that stay as they are --------------------------------------------------------------------


def test_untouched_shards_stay_byte_for_byte(sharded, tmp_path, caplog):
    """Their headers too, as they were written: whoever has the shard already need not fetch it again."""
    caplog.set_level("INFO", "ckptsurg")
    ckptsurg.rewrite({"version": 1, "drop": "c.0", "freeze": "**"}, sharded, tmp_path / "out")
    before, after = _files(sharded), _files(tmp_path / "out")
    same = {name for name in before if before[name] == after[name]}
    assert same == {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"}
    assert re.search(r"(copied|reflinked) 4\d\.\d MB, .*wrote \d+(\.\d k| )B", caplog.text)


def test_links_are_the_same_files_and_digests(sharded, tmp_path, caplog):
    caplog.set_level("INFO", "ckptsurg")
    before, spec = _files(sharded), {"version": 1, "drop": "c.0", "freeze": "**"}
    linked = ckptsurg.rewrite(spec, sharded, tmp_path / "linked", link=True)
    assert linked == ckptsurg.rewrite(spec, sharded, tmp_path / "copied")
    assert _files(tmp_path / "linked") == _files(tmp_path / "copied")
    for number, is_same in ((1, True), (2, True), (3, False)):
        name = f"model-{number:05d}-of-00003.safetensors"
        assert (sharded / name).samefile(tmp_path / "linked" / name) is is_same
    assert re.search(r"linked 44\.\d MB, (copied|reflinked) 3\.\d MB, .*wrote ", caplog.text)
    ckptsurg.rewrite(spec, sharded, tmp_path / "linked", overwrite=True)
    assert _files(sharded) == before


def test_links_lead_to_the_file_and_not_to_a_link(sharded, tmp_path):
    """As in the cache of Hugging Face, where a model is a folder of symbolic links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    for path in sharded.iterdir():
        shutil.copy(path, tmp_path / "blobs" / path.name)
    shutil.copy(sharded / "model-00001-of-00003.safetensors", tmp_path / "blobs" / "alone")
    (tmp_path / "model" / "x.safetensors").symlink_to("../blobs/alone")
    out = tmp_path / "elsewhere" / "out.safetensors"
    ckptsurg.rewrite({"version": 1, "freeze": "**"}, tmp_path / "model" / "x.safetensors", out, link=True)
    assert not out.is_symlink() and out.samefile(tmp_path / "blobs" / "alone")


def test_what_cannot_be_linked_is_copied(sharded, caplog):
    """Another file system: that in memory."""
    out = Path("/dev/shm") / f"ckptsurg-{os.getpid()}"
    try:
        ckptsurg.rewrite({"version": 1, "freeze": "**"}, sharded, out, link=True)
        assert _files(out).keys() == {*_files(sharded), "freeze.json"}
        name = "model-00002-of-00003.safetensors"
        assert not (out / name).samefile(sharded / name)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    assert "model-00001-of-00003.safetensors: cannot be linked to the base (Invalid cross-device link)" in caplog.text


def test_a_file_whose_data_is_out_of_line_is_laid_out_anew(tmp_path):
    """Every tensor of an output is aligned to its dtype, whatever the base did."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((3 - len(header)) % 8)
    data = np.arange(3, dtype=np.float32).tobytes()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    ckptsurg.rewrite({"version": 1, "freeze": "**"}, tmp_path / "odd.safetensors", tmp_path / "out.safetensors")
    out = (tmp_path / "out.safetensors").read_bytes()
    assert int.from_bytes(out[:8], "little") % 8 == 0 and out.endswith(data)


# --- Known digests ----------------------------------------------------------------------------------


def test_digests_of_the_base_are_inherited_where_the_bytes_are_copied(base, tmp_path):
    first = ckptsurg.rewrite({"version": 1, "drop": "c.0", "freeze": "**"}, base, tmp_path / "first")
    spec = {
        "version": 1,
        "drop": "a.1",
        "freeze": ["**", "!head", {"match": "b.huge", "rows": "[:100]"}],
        "reinit": [{"match": "head", "init": "ones"}],
    }
    computed = ckptsurg.rewrite(spec, tmp_path / "first", tmp_path / "computed")
    inherited = ckptsurg.rewrite(spec, tmp_path / "first", tmp_path / "inherited", trust_base_manifest=True)
    assert _files(tmp_path / "computed")["model.safetensors"] == _files(tmp_path / "inherited")["model.safetensors"]
    assert {name for name, record in inherited.tensors.items() if record.inherited} == {"a.0", "a.2", "c.1"}
    assert inherited.root == computed.root and inherited.frozen_root == computed.frozen_root
    assert ckptsurg.load_manifest(tmp_path / "inherited") == inherited
    alone = ckptsurg.make_manifest("**", tmp_path / "inherited", trust_base_manifest=True)
    assert all(record.inherited for name, record in alone.tensors.items())
    assert alone.root == ckptsurg.make_manifest("**", tmp_path / "inherited").root
    assert first.tensors["a.0"].digest == inherited.tensors["a.0"].digest


def test_of_what_is_inherited_nothing_is_read(tmp_path):
    """A terabyte that is not there: to hash it would take minutes, to allocate it would fail."""
    size = 10**12
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    small = tmp_path / "small.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(4, np.uint8)}, small)
    document = json.loads(ckptsurg.make_manifest("**", small).to_json())
    document["tensors"]["w"]["shape"] = [size]
    digest = document["tensors"]["w"]["digest"]
    line = json.dumps(["w", "U8", [size], True, digest], separators=(",", ":")) + "\n"
    from blake3 import blake3

    document["root"] = document["frozen_root"] = f"blake3:{blake3(line.encode()).hexdigest()}"
    (tmp_path / "x.freeze.json").write_text(json.dumps(document))
    manifest = ckptsurg.make_manifest("**", tmp_path / "x.safetensors", trust_base_manifest=True)
    assert manifest.tensors["w"].digest == digest and manifest.tensors["w"].inherited


def test_a_manifest_is_trusted_only_if_it_fits(base, tmp_path):
    freeze = {"version": 1, "freeze": "**"}

    def refused(message: str, **options: object) -> None:
        with pytest.raises(ckptsurg.UsageError, match=message):
            ckptsurg.rewrite(freeze, copy, tmp_path / "out", trust_base_manifest=True, **options)
        assert not (tmp_path / "out").exists()

    copy = tmp_path / "copy.safetensors"
    shutil.copy(base, copy)
    refused(r"copy\.freeze\.json: no such file: .*copy\.safetensors has no manifest")
    (tmp_path / "freeze.json").write_text("{}")
    with pytest.raises(ckptsurg.UsageError) as error:
        ckptsurg.rewrite(freeze, copy, tmp_path / "out", trust_base_manifest=True)
    assert error.value.hint == f"give the folder, {tmp_path}, to which its manifest belongs"
    ckptsurg.write_manifest(ckptsurg.make_manifest("**", copy), tmp_path / "copy.freeze.json")
    refused(r"copy\.freeze\.json: has blake3 digests, which cannot stand for sha256", digest="sha256")
    safetensors.numpy.save_file(_tensors() | {"a.1": np.zeros(8, np.uint8)}, copy)
    refused(r'copy\.freeze\.json: does not describe .*copy\.safetensors: "a\.1" is not in both alike')
    safetensors.numpy.save_file({"a.1": np.zeros(7, np.uint8)}, copy)
    refused(r'does not describe .*: "a\.0" is not in both alike')


def test_trust_is_the_users_and_verify_tells_when_it_was_misplaced(base, tmp_path):
    ckptsurg.rewrite({"version": 1, "freeze": "**"}, base, tmp_path / "first")
    weights = tmp_path / "first" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    out = tmp_path / "second"
    ckptsurg.rewrite({"version": 1, "freeze": "**"}, tmp_path / "first", out, trust_base_manifest=True)
    assert [d.verdict for d in ckptsurg.verify(out, out).drifted] == ["changed"]


# --- File systems that share blocks -----------------------------------------------------------------


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def sharing(request, tmp_path_factory) -> Iterator[Path]:
    """A file system whose files can share blocks."""
    with mounted(tmp_path_factory.mktemp(request.param) / "mounted", request.param) as place:
        yield place


def _shared_bytes(path: Path) -> int:
    lines = subprocess.run(["filefrag", "-v", "-b1", path], check=True, capture_output=True, text=True).stdout
    extents = re.findall(r"^ *\d+: +(\d+)\.\. *(\d+): .*\bshared", lines, re.MULTILINE)
    return sum(int(last) - int(first) + 1 for first, last in extents)


def test_blocks_are_shared_and_the_bytes_are_as_anywhere(sharing, base, tmp_path, caplog):
    """With a tensor dropped from the middle, one of odd size drawn anew, and one added."""
    caplog.set_level("INFO", "ckptsurg")
    shutil.copy(base, sharing / "base.safetensors")
    os.sync()
    manifest = ckptsurg.rewrite(SPEC, sharing / "base.safetensors", sharing / "out")
    shared = re.search(r"reflinked (\d+\.\d) MB, copied \d+\.\d kB, wrote", caplog.text)
    assert shared is not None and float(shared[1]) > 47
    assert manifest == ckptsurg.rewrite(SPEC, base, tmp_path / "out")
    assert (sharing / "out/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert _shared_bytes(sharing / "out/model.safetensors") > 47 * 10**6
    # What is written to the one stays out of the other.
    before = (sharing / "out/model.safetensors").read_bytes()
    with (sharing / "base.safetensors").open("r+b") as file:
        file.write(bytes(40 * MIB))
    os.sync()
    assert (sharing / "out/model.safetensors").read_bytes() == before


def test_a_whole_file_is_shared_to_its_last_byte(sharing, sharded, caplog):
    caplog.set_level("INFO", "ckptsurg")
    shutil.copytree(sharded, sharing / "sharded")
    os.sync()
    spec = {"version": 1, "drop": "c.0", "freeze": "**"}
    ckptsurg.rewrite({"version": 1, "freeze": "**"}, sharing / "sharded", sharing / "whole")
    assert "copied" not in caplog.text and re.search(r"reflinked 47\.\d MB$", caplog.text, re.MULTILINE)
    second = ckptsurg.rewrite(spec, sharing / "whole", sharing / "second", trust_base_manifest=True)
    assert second.root == ckptsurg.rewrite(spec, sharing / "sharded", sharing / "third").root
    assert (
        _files(sharing / "second")["model-00002-of-00003.safetensors"]
        == _files(sharded)["model-00002-of-00003.safetensors"]
    )


def test_what_is_shared_or_linked_needs_no_room(sharing, tmp_path):
    base = sharing / "large.safetensors"
    safetensors.numpy.save_file({f"w.{i}": np.full(15 * MIB, i, np.uint8) for i in range(8)}, base)
    os.sync()
    room = os.statvfs(sharing)
    with (sharing / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, max(room.f_bavail * room.f_frsize - 60 * MIB, 1))
    try:
        ckptsurg.rewrite({"version": 1, "freeze": "**"}, base, sharing / "linked", link=True)
        manifest = ckptsurg.rewrite({"version": 1, "drop": "w.3", "freeze": "**"}, base, sharing / "shared")
        assert ckptsurg.verify(manifest, sharing / "shared").verified == 7
        elsewhere = tmp_path / "base.safetensors"
        shutil.copy(base, elsewhere)
        with pytest.raises(ckptsurg.SystemFailure, match=r"needs 1[0-9,]+ bytes, but the file system has"):
            ckptsurg.rewrite({"version": 1, "freeze": "**"}, elsewhere, sharing / "written")
    finally:
        (sharing / "filler").unlink()
    assert sorted(path.name for path in sharing.iterdir() if path.name.startswith(".")) == []
