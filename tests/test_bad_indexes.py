"""Bad indexes beyond the cases: what is too large for a case, links, caches, and what a folder may be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptsurg
from ckptsurg.formats import indexes

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT_MAP = {"a": ONE, "b": ONE, "c": TWO}
TOTAL = 4 * (2 + 3 + 5)


def save(path: Path, *names: str) -> None:
    """A file of F32 tensors; each name has its own size."""
    sizes = {"a": 2, "b": 3, "c": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.arange(sizes[name], dtype=np.float32) for name in names}, path)


def sharded(folder: Path, index: Any = None) -> Path:
    """A folder with two good shards, and an index; text, bytes or JSON."""
    save(folder / ONE, "a", "b")
    save(folder / TWO, "c")
    if index is None:
        index = {"metadata": {"total_size": TOTAL}, "weight_map": WEIGHT_MAP}
    if not isinstance(index, bytes):
        index = (index if isinstance(index, str) else json.dumps(index)).encode()
    (folder / INDEX).write_bytes(index)
    return folder


def names_of(path: Path) -> set[str]:
    with ckptsurg.open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            assert b"".join(map(bytes, checkpoint.read(name))) == np.arange(len_of(name), dtype="<f4").tobytes()
        return set(checkpoint.tensors)


def len_of(name: str) -> int:
    return {"a": 2, "b": 3, "c": 5}[name]


def refusal(path: Path) -> str:
    with pytest.raises(ckptsurg.CheckpointError) as caught:
        ckptsurg.open_checkpoint(path)
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()
    return str(caught.value)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ckptsurg", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=10)


def test_a_good_index_opens_its_shards_as_a_folder_and_by_its_path(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert names_of(tmp_path) == names_of(tmp_path / INDEX) == {"a", "b", "c"}


# --- The document -----------------------------------------------------------------------------------


def test_nesting_without_end_is_refused_in_words(tmp_path: Path) -> None:
    result = command("inspect", sharded(tmp_path, '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}"))
    assert_refused(result, INDEX)
    assert "nested too deeply" in result.stderr


def test_a_refused_checkpoint_is_closed(tmp_path: Path) -> None:
    sharded(tmp_path, {"weight_map": WEIGHT_MAP | {"lost": TWO}})
    before = len(list(Path("/dev/fd").iterdir()))
    refusal(tmp_path)
    assert len(list(Path("/dev/fd").iterdir())) == before


# --- Names of shards --------------------------------------------------------------------------------

#: Each of these leads a careless reader to a good file, whose name would not go everywhere.
UNSAFE_NAMES = {
    "drive": "C:inside.safetensors",
    "drive-and-backslash": "C:\\inside.safetensors",
    "backslash": "part\\inside.safetensors",
    "unc-path": "\\\\host\\share\\inside.safetensors",
}


@pytest.mark.parametrize("defect", UNSAFE_NAMES)
def test_a_shard_name_that_is_no_plain_path_is_refused_although_the_file_is_there(tmp_path: Path, defect: str) -> None:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    save(folder / UNSAFE_NAMES[defect], "a")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": UNSAFE_NAMES[defect]}}))
    message = refusal(folder)
    assert f'the shard name "{UNSAFE_NAMES[defect]}" ' in message
    assert INDEX in message


def test_an_absolute_shard_path_is_refused_although_it_leads_into_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "inside.safetensors", "a")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": str(tmp_path / "inside.safetensors")}}))
    assert "is an absolute path" in refusal(tmp_path)


@pytest.mark.parametrize("name", [".", "..", "/", "part/", "x" * 5000 + ".safetensors"])
def test_a_shard_name_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    sharded(tmp_path, {"weight_map": WEIGHT_MAP | {"d": name}})
    assert len(refusal(tmp_path)) < 1000


def test_every_shard_name_is_checked_before_any_shard_is_opened(tmp_path: Path) -> None:
    sharded(tmp_path, {"weight_map": WEIGHT_MAP | {"d": "z/../../x.safetensors"}})
    (tmp_path / ONE).write_bytes(b"broken")
    assert "leaves the folder" in refusal(tmp_path)


# --- Which checkpoint is meant ----------------------------------------------------------------------


def test_of_a_single_file_and_an_index_either_opens_by_its_path(tmp_path: Path) -> None:
    sharded(tmp_path)
    save(tmp_path / "model.safetensors", "a")
    assert names_of(tmp_path / "model.safetensors") == {"a"}
    assert names_of(tmp_path / INDEX) == {"a", "b", "c"}


def test_an_index_of_another_name_opens_by_its_path_and_is_named_where_the_folder_is_given(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / "model.fp16.safetensors.index.json")
    assert names_of(tmp_path / "model.fp16.safetensors.index.json") == {"a", "b", "c"}
    with pytest.raises(ckptsurg.UsageError) as caught:
        ckptsurg.open_checkpoint(tmp_path)
    assert "model.fp16.safetensors.index.json" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["model", "model.safetensors", INDEX])
def test_a_path_that_is_not_there_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ckptsurg.UsageError, match="no such file"):
        ckptsurg.open_checkpoint(tmp_path / name)


# --- total_size -------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, -1, 2**80])
def test_a_wrong_total_size_is_a_warning_that_a_plan_notes(tmp_path: Path, total: float) -> None:
    sharded(tmp_path, {"metadata": {"total_size": total}, "weight_map": WEIGHT_MAP})
    with ckptsurg.open_checkpoint(tmp_path) as checkpoint:
        [warning] = checkpoint.warnings
        assert INDEX in warning
        assert f"{TOTAL:,} bytes" in warning
        assert warning in ckptsurg.plan({"version": 1, "freeze": "**"}, checkpoint).notes


@pytest.mark.parametrize("metadata", [{"total_size": float(TOTAL)}, {"epoch": 1}, {}])
def test_a_true_or_absent_total_size_is_no_warning(tmp_path: Path, metadata: Any) -> None:
    sharded(tmp_path, {"metadata": metadata, "weight_map": WEIGHT_MAP})
    with ckptsurg.open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.warnings) == []


# --- Links ------------------------------------------------------------------------------------------


def move_and_link(path: Path, target: Path) -> None:
    """Put a file elsewhere and a relative link in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(os.path.relpath(target, path.parent))


@pytest.mark.parametrize("name", [ONE, INDEX])
def test_a_link_of_a_sharded_checkpoint_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path / "model")
    move_and_link(folder / name, tmp_path / "elsewhere" / name)
    message = refusal(folder)
    assert f"{name}: is a link that leaves the folder" in message


def test_a_link_of_a_single_file_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model" / "model.safetensors", "a")
    move_and_link(tmp_path / "model" / "model.safetensors", tmp_path / "model-of-another" / "x.safetensors")
    assert "model.safetensors: is a link that leaves the folder" in refusal(tmp_path / "model")


def test_a_shard_below_a_linked_folder_that_leaves_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x.safetensors", "a")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "part").symlink_to("../elsewhere")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": "part/x.safetensors"}}))
    assert "is a link that leaves the folder" in refusal(tmp_path / "model")


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    move_and_link(folder / ONE, folder / "part" / ONE)
    (tmp_path / "link").symlink_to("model")
    assert names_of(tmp_path / "link") == names_of(tmp_path / "link" / INDEX) == {"a", "b", "c"}


@pytest.mark.parametrize("target", [ONE, "nowhere"], ids=["to-itself", "to-nothing"])
def test_a_shard_that_is_a_link_to_no_file_is_refused(tmp_path: Path, target: str) -> None:
    sharded(tmp_path)
    (tmp_path / ONE).unlink()
    (tmp_path / ONE).symlink_to(target)
    assert ONE in refusal(tmp_path)


def test_a_shard_that_becomes_a_link_once_it_was_checked_is_not_followed(tmp_path: Path, monkeypatch: Any) -> None:
    folder = sharded(tmp_path / "model")
    save(tmp_path / "elsewhere.safetensors", "a")
    allow_descriptors = indexes.allow_descriptors

    def meanwhile(count: int) -> None:  # called after all shards were checked, and before any is opened
        (folder / ONE).unlink()
        (folder / ONE).symlink_to(tmp_path / "elsewhere.safetensors")
        allow_descriptors(count)

    monkeypatch.setattr(indexes, "allow_descriptors", meanwhile)
    with pytest.raises(ckptsurg.SystemFailure, match=f"{ONE}: cannot be opened: Too many levels of symbolic links"):
        ckptsurg.open_checkpoint(folder)


# --- The cache of Hugging Face ----------------------------------------------------------------------

REVISION = "0123456789abcdef0123456789abcdef01234567"


def into_cache(folder: Path, cache: Path, below: str = "") -> Path:
    """The files of a folder as the hub's cache keeps them: a snapshot of links to blobs."""
    snapshot = cache / "models--org--name" / "snapshots" / REVISION / below
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(snapshot / path.name)
        move_and_link(snapshot / path.name, cache / "models--org--name" / "blobs" / f"{number:064x}")
    return snapshot


def single(folder: Path) -> Path:
    save(folder / "model.safetensors", "a", "b", "c")
    return folder


@pytest.mark.parametrize("build", [single, sharded])
def test_a_snapshot_in_the_cache_opens(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    snapshot = into_cache(build(tmp_path / "downloaded"), tmp_path / "hub")
    assert names_of(snapshot) == {"a", "b", "c"}


@pytest.mark.parametrize("build", [single, sharded])
def test_a_model_in_a_folder_of_a_snapshot_opens(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    snapshot = into_cache(build(tmp_path / "downloaded"), tmp_path / "hub", below="text_encoder")
    assert names_of(snapshot) == {"a", "b", "c"}


def test_the_config_of_a_snapshot_comes_along_with_its_edits(tmp_path: Path) -> None:
    folder = single(tmp_path / "downloaded")
    (folder / "config.json").write_text('{"num_labels": 2, "kept": true}')
    (folder / "tokenizer.json").write_text("{}")
    snapshot = into_cache(folder, tmp_path / "hub")
    spec = {"version": 1, "freeze": "**", "config": {"set": {"num_labels": 10}}}
    ckptsurg.rewrite(spec, snapshot, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"num_labels": 10, "kept": True}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file() and not p.is_symlink()) == [
        "config.json",
        "freeze.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_snapshot_does_not_reach_into_another_model(tmp_path: Path) -> None:
    snapshot = into_cache(single(tmp_path / "downloaded"), tmp_path / "hub")
    (snapshot / "model.safetensors").unlink()
    single(snapshot)
    move_and_link(snapshot / "model.safetensors", tmp_path / "hub" / "models--org--secret" / "blobs" / "0")
    assert "is a link that leaves the folder" in refusal(snapshot)


def test_blobs_beside_a_folder_that_is_no_snapshot_are_outside(tmp_path: Path) -> None:
    folder = single(tmp_path / "repo" / "models" / "name")
    move_and_link(folder / "model.safetensors", tmp_path / "repo" / "blobs" / "0")
    assert "is a link that leaves the folder" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("edits", [{}, {"config": {"set": {"num_labels": 10}}}], ids=["as-it-is", "edited"])
def test_a_companion_that_is_a_link_out_of_the_folder_is_not_brought_along(
    tmp_path: Path, name: str, edits: dict[str, Any]
) -> None:
    folder = single(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    move_and_link(folder / name, tmp_path / "private" / name)
    with pytest.raises(ckptsurg.CheckpointError, match=f"{name}: is a link that leaves the folder"):
        ckptsurg.rewrite({"version": 1, "freeze": "**", **edits}, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if edits and name == "config.json":  # nor is it read for a plan
        with pytest.raises(ckptsurg.CheckpointError, match="is a link that leaves the folder"):
            ckptsurg.plan({"version": 1, "freeze": "**", **edits}, folder)


# --- What is no regular file ------------------------------------------------------------------------


def assert_refused(result: subprocess.CompletedProcess[str], name: str) -> None:
    lines = result.stderr.splitlines()
    assert result.returncode == 3, result.stderr
    assert lines[0].startswith("error: ")
    assert name in lines[0]
    assert [line for line in lines[1:] if not line.startswith("hint: ")] == []


@pytest.mark.parametrize("name", [ONE, INDEX])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_a_shard_or_index_that_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    sharded(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    assert_refused(command("inspect", tmp_path), name)


def test_a_config_that_is_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    single(tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "config.json")
    (tmp_path / "spec.yaml").write_text("version: 1\nfreeze: '**'\nconfig: {set: {num_labels: 10}}\n")
    result = command("rewrite", tmp_path / "spec.yaml", tmp_path / "model", "-o", tmp_path / "out")
    assert_refused(result, "config.json")
    assert not (tmp_path / "out").exists()
