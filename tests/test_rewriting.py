"""What a rewrite publishes: files, names, shards, the folder's other files; and that it is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptsurg
from ckptsurg.publishing import staged

SPEC = {"version": 1, "freeze": ["**", "!fc"], "reinit": [{"match": "fc", "init": "zeros"}]}
PLAIN = {"version": 1, "freeze": "**"}


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"layers.0.w": (40, 30), "layers.1.w": (40, 30), "layers.2.w": (7,), "fc.weight": (3, 30), "fc.bias": (3,)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def single(tmp_path) -> Path:
    save_file(_tensors(), tmp_path / "base.safetensors", {"format": "pt", "made_by": "a test"})
    return tmp_path / "base.safetensors"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A model folder of three shards with files beside them."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = _tensors()
    shards = [["layers.0.w"], ["layers.1.w", "layers.2.w"], ["fc.weight", "fc.bias"]]
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt", "shard": str(number)})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total, "total_parameters": 9}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "num_labels": 3, "id2label": {"0": "a"}}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return folder


# --- Shape of the output ----------------------------------------------------------------------------


def test_a_file_to_a_file(single, tmp_path):
    manifest = ckptsurg.rewrite(SPEC, single, tmp_path / "deep" / "er" / "out.safetensors")
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == ["out.freeze.json", "out.safetensors"]
    assert ckptsurg.load_manifest(tmp_path / "deep" / "er" / "out.freeze.json") == manifest
    with safe_open(tmp_path / "deep" / "er" / "out.safetensors", "pt") as out:
        assert out.metadata() == {"format": "pt", "made_by": "a test"}
    assert not load_file(tmp_path / "deep" / "er" / "out.safetensors")["fc.weight"].any()


def test_a_file_to_a_folder(single, tmp_path):
    ckptsurg.rewrite(SPEC, single, tmp_path / "out")
    assert sorted(_contents(tmp_path / "out")) == ["freeze.json", "model.safetensors"]


def test_shards_are_joined_into_a_file(sharded, tmp_path, caplog):
    ckptsurg.rewrite(PLAIN, sharded, tmp_path / "out.safetensors")
    joined = load_file(tmp_path / "out.safetensors")
    assert all(joined[name].equal(tensor) for name, tensor in _tensors().items())
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert out.metadata() == {"format": "pt", "shard": "1"}
    assert "metadata 'shard': model-00002-of-00003.safetensors says '2'; kept '1'" in caplog.text


def test_shards_keep_their_names_and_empty_ones_go(sharded, tmp_path):
    ckptsurg.rewrite({"version": 1, "drop": "layers[1:]", "freeze": "**"}, sharded, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "fc.bias": "model-00003-of-00003.safetensors",
        "fc.weight": "model-00003-of-00003.safetensors",
        "layers.0.w": "model-00001-of-00003.safetensors",
    }
    assert index["metadata"] == {"total_size": (40 * 30 + 3 * 30 + 3) * 4}
    assert not (tmp_path / "out" / "model-00002-of-00003.safetensors").exists()
    with safe_open(tmp_path / "out" / "model-00003-of-00003.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt", "shard": "3"}


@pytest.mark.parametrize(("size", "files"), [("5KB", 3), (5000, 3), ("9.9KB", 2), ("1GB", 1)])
def test_shards_are_split_anew(single, tmp_path, size, files):
    ckptsurg.rewrite(PLAIN, single, tmp_path / "out", max_shard_size=size)
    weights = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(weights) == files
    assert (weights == ["model.safetensors"]) == (files == 1)
    with ckptsurg.open_checkpoint(tmp_path / "out") as out:
        assert set(out.tensors) == set(_tensors())
    assert ckptsurg.diff(single, tmp_path / "out").ok


@pytest.mark.parametrize("size", ["5 apples", "0", "-3", ""])
def test_a_size_that_is_none_is_refused(single, tmp_path, size):
    with pytest.raises(ckptsurg.UsageError, match="size"):
        ckptsurg.rewrite(PLAIN, single, tmp_path / "out", max_shard_size=size)


def test_an_index_by_its_path(sharded, tmp_path):
    (sharded / "model.safetensors.index.json").rename(sharded / "diffusion.safetensors.index.json")
    ckptsurg.rewrite(PLAIN, sharded / "diffusion.safetensors.index.json", tmp_path / "out")
    assert ckptsurg.diff(
        sharded / "diffusion.safetensors.index.json", tmp_path / "out" / "diffusion.safetensors.index.json"
    ).ok


def test_added_tensors(single, tmp_path):
    add = [
        {"name": "score.weight", "shape": [2, 3], "dtype": "BF16", "init": {"constant": {"val": 0.5}}},
        {"name": "score.bias", "shape": [], "dtype": "F64", "init": "ones", "frozen": True},
    ]
    manifest = ckptsurg.rewrite({"version": 1, "add": add}, single, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out["score.weight"].equal(torch.full((2, 3), 0.5, dtype=torch.bfloat16))
    assert out["score.bias"].equal(torch.ones((), dtype=torch.float64))
    assert list(manifest.frozen) == ["score.bias"] and manifest.counts["added"] == 2


def test_a_dropped_name_may_be_added_anew(single, tmp_path):
    add = [{"name": "fc.weight", "shape": [2], "dtype": "F16", "init": "ones"}]
    manifest = ckptsurg.rewrite({"version": 1, "drop": "fc", "add": add}, single, tmp_path / "out")
    assert manifest.tensors["fc.weight"].origin == "added" and "fc.weight" in manifest.dropped
    assert ckptsurg.load_manifest(tmp_path / "out") == manifest


# --- The same bytes ---------------------------------------------------------------------------------


def test_the_same_bytes_every_time(sharded, tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(SPEC | {"reinit": [{"match": "fc", "init": "normal"}]}))
    ckptsurg.rewrite(spec, sharded, tmp_path / "one")
    elsewhere = tmp_path / "elsewhere"
    sharded.rename(elsewhere)
    environment = os.environ | {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-m", "ckptsurg", "rewrite", spec, elsewhere, "-o", tmp_path / "two"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    one, two = _contents(tmp_path / "one"), _contents(tmp_path / "two")
    assert one == two
    assert str(tmp_path).encode() not in b"".join(one.values())


def test_file_modes_follow_the_umask(single, tmp_path):
    for mask in (0o022, 0o077):
        old = os.umask(mask)
        try:
            ckptsurg.rewrite(PLAIN, single, tmp_path / f"out{mask}")
        finally:
            os.umask(old)
        for path in [tmp_path / f"out{mask}", *(tmp_path / f"out{mask}").iterdir()]:
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask


# --- The folder's other files -----------------------------------------------------------------------


def test_other_files_come_along_and_other_weights_do_not(sharded, tmp_path, caplog):
    left = ["pytorch_model.bin", "a.pt", "b.pth", "c.h5", "d.gguf", "e.msgpack", "f.onnx", "stray.safetensors"]
    for name in [*left, "freeze.json", "pytorch_model.bin.index.json", "onnx/model.onnx"]:
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text("old")
    (sharded / ".git").mkdir()
    (sharded / ".git" / "config").write_text("x")
    ckptsurg.rewrite(PLAIN, sharded, tmp_path / "out")
    shards = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    expected = ["config.json", "freeze.json", *shards, "model.safetensors.index.json", "tokenizer/vocab.txt"]
    assert sorted(_contents(tmp_path / "out")) == sorted(expected)
    assert (tmp_path / "out" / "config.json").read_bytes() == (sharded / "config.json").read_bytes()
    for name in (".git/", "a.pt", "pytorch_model.bin"):
        assert name in caplog.text
    ckptsurg.rewrite(PLAIN, sharded, tmp_path / "all", keep_other_weights=True)
    assert set(left) <= set(_contents(tmp_path / "all"))


def test_config_is_edited(sharded, tmp_path):
    config = {"set": {"num_labels": 5, "text_config.vocab_size": 32100}, "unset": ["id2label", "label2id"]}
    plan = ckptsurg.plan(PLAIN | {"config": config}, sharded)
    assert plan.notes == ()
    ckptsurg.rewrite(PLAIN | {"config": config}, sharded, tmp_path / "out")
    edited = json.loads((tmp_path / "out" / "config.json").read_text())
    assert edited == {"model_type": "x", "num_labels": 5, "text_config": {"vocab_size": 32100}}


def test_config_edits_have_no_order(sharded):
    config = {"set": {"t.v": 2, "t": {"q": 1}}}
    with pytest.raises(ckptsurg.SpecError, match=r"config\.set\.t\.v: t is set too, as a whole"):
        ckptsurg.plan(PLAIN | {"config": config}, sharded)
    with pytest.raises(ckptsurg.SpecError, match="num_labels is set and unset"):
        ckptsurg.plan(PLAIN | {"config": {"set": {"num_labels": 1}, "unset": ["num_labels"]}}, sharded)
    with pytest.raises(ckptsurg.SpecError, match="a part of the path is no object"):
        ckptsurg.plan(PLAIN | {"config": {"set": {"model_type.x": 1}}}, sharded)


def test_config_edits_need_a_config(single, sharded, tmp_path):
    spec = PLAIN | {"config": {"set": {"a": 1}}}
    with pytest.raises(ckptsurg.SpecError, match=r"config: the base is a lone file and has no config\.json"):
        ckptsurg.rewrite(spec, single, tmp_path / "out")
    (sharded / "config.json").unlink()
    with pytest.raises(ckptsurg.SpecError, match=r"has no config\.json to edit"):
        ckptsurg.plan(spec, sharded)
    assert not (tmp_path / "out").exists()


# --- Whole or not at all ----------------------------------------------------------------------------


def _refused(fragment: str, base: Path, out: Path, error: type = ckptsurg.UsageError, **options) -> None:
    """The rewrite is refused, and everything around the output stays as it was, the names included."""
    before = _contents(base.parent)
    with pytest.raises(error, match=fragment):
        ckptsurg.rewrite(PLAIN, base, out, **options)
    assert _contents(base.parent) == before


def test_an_output_that_exists_is_refused(single, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    _refused("exists already and is not empty", single, tmp_path / "out")
    _refused(r"holds no freeze\.json of ckptsurg", single, tmp_path / "out", overwrite=True)
    (tmp_path / "out.safetensors").write_text("mine")
    _refused("exists already", single, tmp_path / "out.safetensors")
    (tmp_path / "other.freeze.json").write_text("mine")
    _refused("exists already", single, tmp_path / "other.safetensors")
    (tmp_path / "plain").write_text("mine")
    _refused("is a file", single, tmp_path / "plain", overwrite=True)
    (tmp_path / "dir.safetensors").mkdir()
    _refused("is a folder", single, tmp_path / "dir.safetensors", overwrite=True)


def test_an_empty_folder_counts_as_absent(single, tmp_path):
    (tmp_path / "out").mkdir()
    ckptsurg.rewrite(PLAIN, single, tmp_path / "out")
    assert ckptsurg.diff(single, tmp_path / "out").ok


def test_overwrite_replaces_an_earlier_output(single, sharded, tmp_path):
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        ckptsurg.rewrite(PLAIN, sharded, out)
        manifest = ckptsurg.rewrite(SPEC, single, out, overwrite=True)
        beside = out / "freeze.json" if out.is_dir() else out.with_suffix(".freeze.json")
        assert ckptsurg.load_manifest(beside) == manifest
        assert ckptsurg.verify(manifest, out, exact=True).ok
    assert sorted(_contents(tmp_path / "out")) == ["freeze.json", "model.safetensors"]


def test_never_onto_the_base(single, sharded, tmp_path):
    os.link(single, tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(single)
    for name in ("base.safetensors", "hard.safetensors", "soft.safetensors"):
        _refused("is the base, or a link to it", single, tmp_path / name, overwrite=True)
    _refused("is the base|lies inside", sharded, sharded, overwrite=True)
    _refused("lies inside the base", sharded, sharded / "out", overwrite=True)
    _refused("lies inside the base", sharded, sharded / "out.safetensors", overwrite=True)
    (tmp_path / "alias").symlink_to(sharded)
    _refused("lies inside the base", sharded, tmp_path / "alias" / "out", overwrite=True)


def test_a_manifest_replaces_nothing_but_a_manifest(single, sharded, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("version: 1\n")
    _refused("is the base", single, tmp_path / "x", manifest=single, overwrite=True)
    _refused("is no manifest of ckptsurg", single, tmp_path / "x", manifest=spec, overwrite=True)
    _refused("lies inside the base", sharded, tmp_path / "x", manifest=sharded / "config.json", overwrite=True)
    (tmp_path / "folder").mkdir()
    _refused("is no manifest of ckptsurg", single, tmp_path / "x", manifest=tmp_path / "folder", overwrite=True)
    before = _contents(tmp_path)
    manifest = ckptsurg.make_manifest("**", single)
    for path in (single, spec, sharded / "model-00001-of-00003.safetensors", tmp_path / "folder"):
        for overwrite in (False, True):
            with pytest.raises(ckptsurg.UsageError, match=r"exists already|is no manifest"):
                ckptsurg.write_manifest(manifest, path, overwrite=overwrite)
    assert _contents(tmp_path) == before
    ckptsurg.write_manifest(manifest, tmp_path / "m.json")
    ckptsurg.write_manifest(manifest, tmp_path / "m.json", overwrite=True)


def test_a_stale_manifest_is_not_left_beside_other_weights(single, tmp_path):
    ckptsurg.rewrite(SPEC, single, tmp_path / "out.safetensors")
    (tmp_path / "out.safetensors").unlink()
    _refused(r"out\.freeze\.json: exists already", single, tmp_path / "out.safetensors", manifest=tmp_path / "m.json")
    ckptsurg.rewrite(PLAIN, single, tmp_path / "out.safetensors", manifest=tmp_path / "m.json", overwrite=True)
    assert not (tmp_path / "out.freeze.json").exists()


def test_a_pipe_is_no_place_for_a_manifest(single, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ckptsurg.UsageError, match="is no manifest of ckptsurg"):
        ckptsurg.rewrite(PLAIN, single, tmp_path / "out", manifest=tmp_path / "pipe", overwrite=True)


def test_an_output_is_no_link(single, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    _refused("is a link; give the path", single, tmp_path / "link")


def test_edits_of_a_config_that_would_be_lost(sharded, tmp_path):
    with pytest.raises(ckptsurg.SpecError, match=r"config: .*is a lone file and has no config\.json; give a folder"):
        ckptsurg.rewrite(PLAIN | {"config": {"set": {"a": 1}}}, sharded, tmp_path / "out.safetensors")


def test_never_over_the_base(single, tmp_path):
    (tmp_path / "freeze.json").write_text(json.dumps({"tool": {"name": "ckptsurg"}}))
    _refused("holds the base", single, tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_base_that_changes_meanwhile_is_noticed(single, tmp_path, name):
    def change(done: int, total: int) -> None:
        os.utime(single, ns=(1, done))

    with pytest.raises(ckptsurg.CheckpointError, match="was changed while it was read"):
        ckptsurg.rewrite(PLAIN, single, tmp_path / name, progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_base_that_is_cut_short_meanwhile(single, tmp_path, name):
    save_file({"a": torch.zeros(9 << 20, dtype=torch.uint8)}, single)

    def cut(done: int, total: int) -> None:
        os.truncate(single, 2000)

    with pytest.raises(ckptsurg.CheckpointError, match="was cut short while it was read: expected"):
        ckptsurg.rewrite(PLAIN, single, tmp_path / name, jobs=1, progress=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_interrupted_run_leaves_nothing(single, tmp_path, name):
    ckptsurg.rewrite(PLAIN, single, tmp_path / name)
    before = _contents(tmp_path)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckptsurg.rewrite(SPEC, single, tmp_path / name, overwrite=True, progress=interrupt)
    assert _contents(tmp_path) == before


def test_a_staging_folder_that_is_taken_away_is_not_made_anew(sharded, tmp_path):
    """Else what was staged before would be missing from what is published."""

    def clean(done: int, total: int) -> None:
        for path in tmp_path.glob(".out.ckptsurg"):
            shutil.rmtree(path)

    with pytest.raises(ckptsurg.SystemFailure, match="its staging folder was removed; nothing was published"):
        ckptsurg.rewrite(PLAIN, sharded, tmp_path / "out", jobs=1, progress=clean)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_beside_the_weights_that_grows_meanwhile(tmp_path):
    """A file of the kernel's has more in it than its size says."""
    source = Path("/proc/version")
    assert source.stat().st_size == 0 and source.read_bytes()
    with staged(tmp_path / "out", 0) as staging, pytest.raises(ckptsurg.CheckpointError, match="was changed while it"):
        staging.copy("version", source)


def test_a_closed_checkpoint_is_refused_although_its_descriptor_is_another_files(single, tmp_path):
    manifest = ckptsurg.make_manifest("**", single)
    closed = ckptsurg.open_checkpoint(single)
    closed.close()
    with ckptsurg.open_checkpoint(single):  # takes the number
        for use in (
            lambda: ckptsurg.diff(closed, single),
            lambda: ckptsurg.verify(manifest, closed),
            lambda: ckptsurg.make_manifest("**", closed),
            lambda: ckptsurg.rewrite(PLAIN, closed, tmp_path / "out"),
            lambda: ckptsurg.convert(closed, tmp_path / "out"),
        ):
            with pytest.raises(ckptsurg.UsageError, match="the checkpoint is closed"):
                use()


def test_an_output_that_appears_meanwhile_is_not_replaced(single, tmp_path):
    ckptsurg.rewrite(SPEC, single, tmp_path / "other")

    def meanwhile(done: int, total: int) -> None:
        if not (tmp_path / "out").exists():
            shutil.copytree(tmp_path / "other", tmp_path / "out")

    with pytest.raises(ckptsurg.UsageError, match="appeared while the output was made"):
        ckptsurg.rewrite(PLAIN, single, tmp_path / "out", progress=meanwhile)
    assert ckptsurg.verify(tmp_path / "out", tmp_path / "out").verified == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "other", "out"]


def test_two_runs_on_one_output(single, tmp_path):
    """The one that comes second is refused at once; the first goes on."""
    refused = []

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(ckptsurg.UsageError, match="another run is at work on this output") as caught:
            ckptsurg.rewrite(SPEC, single, tmp_path / "out")
        refused.append(caught.value)

    ckptsurg.rewrite(PLAIN, single, tmp_path / "out", progress=meanwhile)
    assert refused and ckptsurg.verify(tmp_path / "out", tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "out"]


def test_a_full_disk(single, tmp_path):
    script = (
        "import resource, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "sys.argv[0] = 'ckptsurg'; from ckptsurg.cli import main; main()"
    )
    (tmp_path / "spec.json").write_text(json.dumps(PLAIN))
    command = [sys.executable, "-c", script, "rewrite", tmp_path / "spec.json", single, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "spec.json"]


def test_a_disk_with_too_little_room_is_said_before_writing(single, tmp_path, monkeypatch):
    real = os.statvfs

    def nearly_full(path):
        found = list(real(path))
        found[4] = 1  # f_bavail, in blocks
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    _refused(
        r"needs [0-9,]+ bytes, but the file system has [0-9,]+ left", single, tmp_path / "x", ckptsurg.SystemFailure
    )


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """One tensor of 1 GB, under an address-space limit of 700 MB, most of which the interpreter's libraries take."""
    size = 10**9
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "base.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "spec.json").write_text(json.dumps(PLAIN))
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20));"
        "from ckptsurg.cli import main; main()"
    )
    arguments = ["rewrite", tmp_path / "spec.json", tmp_path / "base.safetensors", "-o", tmp_path / "out"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, env=environment)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size >= size


def test_a_manifest_elsewhere(single, tmp_path):
    manifest = ckptsurg.rewrite(PLAIN, single, tmp_path / "out", manifest=tmp_path / "m" / "a.json")
    assert ckptsurg.load_manifest(tmp_path / "m" / "a.json") == manifest == ckptsurg.load_manifest(tmp_path / "out")
    ckptsurg.rewrite(PLAIN, single, tmp_path / "b.safetensors", manifest=tmp_path / "m" / "b.json")
    assert ckptsurg.load_manifest(tmp_path / "m" / "b.json").root == manifest.root
    assert not (tmp_path / "b.freeze.json").exists()
    ckptsurg.rewrite(PLAIN, single, tmp_path / "c", manifest=tmp_path / "c" / "freeze.json")
    _refused("exists already", single, tmp_path / "d", manifest=tmp_path / "m" / "a.json")
    _refused("is the base", single, tmp_path / "d", manifest=single, overwrite=True)
    _refused("lies inside the output", single, tmp_path / "d", manifest=tmp_path / "d" / "m.json")
    (tmp_path / "no").write_text("a file, not a folder")
    _refused("a part of the path is a file", single, tmp_path / "d", manifest=tmp_path / "no" / "m.json")
    assert not (tmp_path / "d").exists()
