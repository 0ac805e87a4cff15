"""Rewriting in several processes: the same bytes as in one, nothing published where one fails, and going on later."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import ckptsurg
from ckptsurg.journal import Journal, recorded_by
from ckptsurg.ranks import meeting
from ckptsurg.staged_folder import StagedFolder

from .rank_worlds import Zygote, contents

LAYERS, WIDTH = 6, 64
SPEC = {
    "version": 1,
    "drop": {"match": "model.layers[2]", "renumber": True},
    "freeze": ["**", "!embed", "!model.layers[1].q"],
    "cast": [{"match": "**.norm.weight", "dtype": "BF16"}],
    "reinit": [{"match": "model.layers[1].q", "init": {"normal": {"std": 0.02}}}],
    "add": [{"name": "head.weight", "shape": [10, WIDTH], "dtype": "F32", "init": "xavier_uniform"}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A sharded folder, one tensor of which is larger than all others together."""
    folder = tmp_path_factory.mktemp("ranks") / "base"
    folder.mkdir()
    torch.manual_seed(0)
    places = {}
    for shard in range(3):
        tensors = {
            f"model.layers.{number}.{kind}.weight": torch.randn(WIDTH, WIDTH)
            for number in range(2 * shard, 2 * shard + 2)
            for kind in "qkvo"
        }
        tensors |= {
            f"model.layers.{number}.norm.weight": torch.ones(WIDTH) for number in range(2 * shard, 2 * shard + 2)
        }
        if shard == 1:
            tensors["embed.weight"] = torch.randn(3000, WIDTH)
        name = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    total = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"num_hidden_layers": 6}')
    return folder


@pytest.fixture(scope="module")
def expected(base) -> dict[str, bytes]:
    """What one process makes of it."""
    ckptsurg.rewrite(SPEC, base, base.parent / "one")
    return contents(base.parent / "one")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_the_output_is_that_of_one_process(zygote, base, expected, tmp_path, ranks):
    ended = zygote.run(ranks, spec=SPEC, ckpt=str(base), out=str(tmp_path / "out"))
    assert [one["code"] for one in ended] == [0] * ranks, ended
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "options",
    [
        {"link": True},
        {"max_shard_size": "200kB"},
        {"digest": "sha256"},
        {"manifest": "elsewhere.json"},
        {"trust_base_manifest": True},
        {"trust_base_manifest": True, "resume": True},
        {"overwrite": True},
    ],
)
def test_options_are_those_of_one_process(zygote, base, tmp_path, options):
    """With some rows of a tensor frozen, which several ranks bring parts of."""
    mine = tmp_path / "base"
    if "trust_base_manifest" in options:
        ckptsurg.rewrite({"version": 1, "freeze": "**"}, base, mine)
    else:
        shutil.copytree(base, mine)
    rows = {"match": "embed", "rows": "[:2000]"}
    spec = {"version": 1, "freeze": ["**", "!embed", rows], "drop": "model.layers[-1:].norm"}
    each = {}
    for way in ("one", "out"):
        (tmp_path / way).mkdir()
        arguments = {"spec": spec, "ckpt": str(mine), "out": str(tmp_path / way / "it"), **options}
        if "manifest" in options:
            arguments["manifest"] = str(tmp_path / way / options["manifest"])
        if "overwrite" in options:
            ckptsurg.rewrite({**spec, "seed": 7}, mine, arguments["out"])
        each[way] = arguments
    ckptsurg.rewrite(**each["one"])
    ended = zygote.run(3, **each["out"])
    assert [one["code"] for one in ended] == [0] * 3, ended
    for way in ([], ["it"]):
        files = [path for path in Path(tmp_path, "one", *way).iterdir() if path.is_file()]
        assert {path.name for path in Path(tmp_path, "out", *way).iterdir()} == {
            path.name for path in Path(tmp_path, "one", *way).iterdir()
        }
        assert all(path.read_bytes() == Path(tmp_path, "out", *way, path.name).read_bytes() for path in files)


def test_a_distributed_checkpoint_is_a_base_too(zygote, tmp_path):
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(
            {f"layers.{number}.weight": torch.randn(300, 30) for number in range(9)}, checkpoint_id=tmp_path / "base"
        )
    spec = {"version": 1, "drop": "layers.4", "freeze": "**"}
    ckptsurg.rewrite(spec, tmp_path / "base", tmp_path / "one")
    ended = zygote.run(3, spec=spec, ckpt=str(tmp_path / "base"), out=str(tmp_path / "out"))
    assert [one["code"] for one in ended] == [0] * 3, ended
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_lone_file_is_written_by_all(zygote, base, tmp_path):
    ckptsurg.rewrite(SPEC, base, tmp_path / "one.safetensors")
    ended = zygote.run(4, spec=SPEC, ckpt=str(base), out=str(tmp_path / "out.safetensors"))
    assert [one["code"] for one in ended] == [0] * 4, ended
    for ending in (".safetensors", ".freeze.json"):
        assert (tmp_path / f"out{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()


# --- What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_rank_cannot_open_stops_all(zygote, base, tmp_path, rank):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out")}
    ended = zygote.run(3, **arguments, own={rank: {"ckpt": str(tmp_path / "none")}})
    assert [one["code"] for one in ended] == [2] * 3, ended
    for other in range(3):
        peer = "" if other == rank else f"rank {rank}: "
        error = "UsageError" if other == rank else "PeerFailed"
        assert ended[other]["said"].startswith(f"{error}: {peer}{tmp_path / 'none'}: no such file or folder"), ended
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused_by_the_first_rank(zygote, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    ended = zygote.run(2, spec=SPEC, ckpt=str(base), out=str(tmp_path / "out"))
    assert [one["code"] for one in ended] == [2, 2], ended
    assert f"UsageError: {tmp_path / 'out'}: exists already" in ended[0]["said"]
    assert f"PeerFailed: rank 0: {tmp_path / 'out'}: exists already" in ended[1]["said"]


def test_a_file_system_that_is_full_for_one_rank_is_said_as_everywhere(zygote, base, tmp_path):
    """The second rank finds the disk full as it writes."""
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out")}
    ended = zygote.run(2, **arguments, own={1: {"fault": "write_all"}})
    assert [one["code"] for one in ended] == [4, 4], ended
    reason = f"{tmp_path / 'out'}: No space left on device; nothing was published"
    assert ended[1]["said"].endswith(f"SystemFailure: {reason}")
    assert ended[0]["said"].endswith(f"PeerFailed: rank 1: {reason}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_copy", [True, False])
def test_ranks_see_the_same_files_if_nothing_tells_that_they_do_not(zygote, base, expected, tmp_path, is_copy):
    """Two of one name, size and header; of a copy the times of change are the same too."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        shutil.copytree(base, tmp_path / str(rank) / "base")
    if not is_copy:
        os.utime(tmp_path / "1" / "base" / "model-00001-of-00003.safetensors")
    own = {rank: {"folder": str(tmp_path / str(rank))} for rank in range(2)}
    ended = zygote.run(2, spec=SPEC, ckpt="base", out=str(tmp_path / "out"), own=own)
    if is_copy:
        assert [one["code"] for one in ended] == [0, 0], ended
        assert contents(tmp_path / "out") == expected
    else:
        assert [one["code"] for one in ended] == [2, 2], ended
        assert all("base: not the same for rank 1 as for rank 0" in one["said"] for one in ended), ended


def test_an_output_in_a_folder_of_each_ranks_own_is_refused(zygote, base, tmp_path):
    """The second rank's has what a stopped run left there; nothing of that is taken for what the first has staged."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    place = tmp_path / "1" / ".out.ckptsurg" / "output"
    place.mkdir(parents=True)
    for path in base.glob("*.safetensors"):
        shutil.copy(path, place / path.name)
    before = contents(place)
    with pytest.raises(ckptsurg.SystemFailure, match="not what the first rank has staged"):
        StagedFolder.of_first(place, place.parent / "run-0")
    own = {rank: {"folder": str(tmp_path / str(rank))} for rank in range(2)}
    ended = zygote.run(2, spec=SPEC, ckpt=str(base), out="out", own=own)
    assert [one["code"] for one in ended] == [0, 0], ended  # the first rank's path is what counts
    assert contents(place) == before
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["out"]


@pytest.mark.parametrize("other", [{"only": "model.layers.1"}, {"expect_trained": True}, {"baseline": True}])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_are_asked_for_other_proofs_are_refused(zygote, base, expected, rank, other):
    if "baseline" in other:
        other = {"baseline": str(base.parent / "one")}
    arguments = {"manifest": str(base.parent / "one"), "ckpt_or_model": str(base.parent / "one")}
    ended = zygote.run(2, call="verify", **arguments, own={rank: other})
    assert [one["code"] for one in ended] == [2, 2], ended
    assert all("the arguments: not the same for rank 1 as for rank 0" in one["said"] for one in ended), ended


def test_donors_are_the_same_under_the_same_names(zygote, base, tmp_path):
    for seed, name in enumerate("ab"):
        ckptsurg.rewrite(
            {"version": 1, "seed": seed, "reinit": [{"match": "**.q", "init": "orthogonal"}]}, base, tmp_path / name
        )
    spec = {"version": 1, "graft": [{"match": "**.q", "from": "a"}, {"match": "**.k", "from": "b"}], "freeze": "**"}
    donors = [
        {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")},
        {"a": str(tmp_path / "b"), "b": str(tmp_path / "a")},
    ]
    own = {rank: {"donors": donors[rank]} for rank in range(2)}
    ended = zygote.run(2, spec=spec, ckpt=str(base), out=str(tmp_path / "out"), own=own)
    assert [one["code"] for one in ended] == [2, 2], ended
    assert all("the donor a: not the same for rank 1 as for rank 0" in one["said"] for one in ended), ended


def test_ranks_that_make_other_calls_are_refused(zygote, base, expected, tmp_path):
    verify = {"manifest": str(base.parent / "one"), "ckpt_or_model": str(base.parent / "one")}
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out")}
    ended = zygote.run(2, own={0: arguments, 1: {"call": "verify", **verify}})
    assert [one["code"] for one in ended] == [2, 2], ended
    assert all("the ranks do different things" in one["said"] for one in ended), ended


def _make(kind: str, path: Path, other: Path) -> None:
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(other)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_what_is_no_journal_is_taken_away(zygote, base, expected, tmp_path, kind):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out"), "resume": True, "jobs": 1}
    moments = zygote.run(2, **arguments)[1]["moments"]
    shutil.rmtree(tmp_path / "out")
    zygote.run(2, (1, moments - 3), **arguments)
    (tmp_path / "other").write_text("kept")
    _make(kind, tmp_path / ".out.ckptsurg" / "journal-0", tmp_path / "other")
    again = zygote.run(3, **arguments)
    assert [one["code"] for one in again] == [0] * 3, again
    assert "kept" in again[0]["said"]
    assert contents(tmp_path / "out") == expected
    assert (tmp_path / "other").read_text() == "kept"


def test_a_rank_of_a_dead_run_does_not_come_into_the_next(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "it").write_bytes(bytes(8))
    with StagedFolder(folder) as staged:
        staged.target("it", 8, 8).write(b"12345678", 0)
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "it").write_bytes(bytes(8))
        with pytest.raises(ckptsurg.SystemFailure, match="what the first rank has staged is not there"):
            staged.target("it", 8, 8)
        assert staged.read("it") is None
    assert (folder / "it").read_bytes() == bytes(8)


def test_what_a_dead_run_adds_to_a_journal_is_told_from_what_the_next_adds(tmp_path):
    """Each batch of lines is of a size that is written at once."""
    path = tmp_path / "journal-1"
    dead, alive = Journal(path, "dead"), Journal(path, "alive")
    for number in range(3):
        alive.add(f"tensor.{number}", f"blake3:{number}", 1 << 30)
        dead.add(f"tensor.{number}", "blake3:other", 1 << 30)
    assert recorded_by([path], "alive") == {f"tensor.{number}": f"blake3:{number}" for number in range(3)}
    assert set(recorded_by([path], "dead").values()) == {"blake3:other"}


# --- Stopped ----------------------------------------------------------------------------------------


def _moments(zygote: Zygote, base: Path, folder: Path, rank: int, count: int) -> list[int]:
    """Moments of a rank in an undisturbed run, evenly apart, the first and the last among them."""
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(folder / "out"), "resume": True, "jobs": 1}
    seen = zygote.run(2, **arguments)[rank]["moments"]
    shutil.rmtree(folder / "out")
    return [number * (seen - 1) // (count - 1) for number in range(count)]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_at_any_moment_nothing_is_published_and_resume_finishes(zygote, base, expected, tmp_path, rank):
    kept = 0
    for moment in _moments(zygote, base, tmp_path, rank, 20):
        place = tmp_path / str(moment)
        place.mkdir()
        arguments = {"spec": SPEC, "ckpt": str(base), "out": str(place / "out"), "resume": True, "jobs": 1}
        ended = zygote.run(2, (rank, moment), **arguments)
        assert ended[rank]["code"] == -9
        if (place / "out").exists():  # killed after it was published, when there was only cleaning up to do
            assert contents(place / "out") == expected
            arguments["overwrite"] = True
        else:
            assert ended[1 - rank]["code"] == 4, (moment, ended)
            assert "another rank is lost" in ended[1 - rank]["said"]
        again = zygote.run(2, **arguments)
        assert [one["code"] for one in again] == [0, 0], again
        kept += "kept" in again[0]["said"]
        assert contents(place / "out") == expected
        assert [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(place)
    assert kept > 5


def test_what_was_staged_is_read_before_it_is_kept(zygote, base, expected, tmp_path):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out"), "resume": True}
    moments = zygote.run(2, **arguments)[1]["moments"]
    shutil.rmtree(tmp_path / "out")
    assert zygote.run(2, (1, moments - 3), **arguments)[1]["code"] == -9
    staged = sorted((tmp_path / ".out.ckptsurg" / "output").glob("*.safetensors"))
    assert list((tmp_path / ".out.ckptsurg").glob("journal-*"))
    for path in staged:  # one bit in each 64 bytes, so in every tensor
        raw = bytearray(path.read_bytes())
        raw[::64] = bytes(byte ^ 1 for byte in raw[::64])
        path.write_bytes(raw)
    again = zygote.run(2, **arguments)
    assert [one["code"] for one in again] == [0, 0], again
    assert "kept" not in again[0]["said"]
    assert contents(tmp_path / "out") == expected


def test_one_process_goes_on_where_several_were_stopped(zygote, base, expected, tmp_path):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out"), "resume": True}
    moments = zygote.run(3, **arguments)[2]["moments"]
    shutil.rmtree(tmp_path / "out")
    zygote.run(3, (2, moments - 3), **arguments)
    again = zygote.run(1, **arguments)
    assert "kept" in again[0]["said"]
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_one_process_goes_on_where_it_was_stopped(zygote, base, tmp_path, out):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / out), "resume": True, "jobs": 1}
    ckptsurg.rewrite(**{**arguments, "out": str(tmp_path / f"one-{out}")})
    moments = zygote.run(1, **arguments, overwrite=True)[0]["moments"]
    for path in tmp_path.glob(f"{Path(out).stem}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert zygote.run(1, (0, moments // 2), **arguments)[0]["code"] == -9
    again = zygote.run(1, **arguments)
    assert again[0]["code"] == 0, again
    assert "kept" in again[0]["said"]
    if out == "out":
        assert contents(tmp_path / out) == contents(tmp_path / f"one-{out}")
    else:
        assert (tmp_path / out).read_bytes() == (tmp_path / f"one-{out}").read_bytes()


@pytest.mark.parametrize("change", ["spec", "base"])
def test_what_another_run_staged_is_not_kept(zygote, base, tmp_path, change):
    mine = tmp_path / "base"
    shutil.copytree(base, mine)
    arguments = {"spec": SPEC, "ckpt": str(mine), "out": str(tmp_path / "out"), "resume": True}
    moments = zygote.run(2, **arguments)[1]["moments"]
    shutil.rmtree(tmp_path / "out")
    zygote.run(2, (1, moments - 3), **arguments)
    if change == "spec":
        arguments["spec"] = {**SPEC, "seed": 1}
    else:
        for path in mine.glob("*.safetensors"):
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
    again = zygote.run(2, **arguments)
    assert [one["code"] for one in again] == [0, 0], again
    assert "kept" not in again[0]["said"]
    ckptsurg.rewrite(arguments["spec"], mine, tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_ranks_may_have_made_other_groups_before_and_call_again(zygote, base, expected, tmp_path):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out"), "overwrite": True}
    ended = zygote.run(3, **arguments, times=3, groups=[0, 2, 1])
    assert [one["code"] for one in ended] == [0] * 3, ended
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGSTOP, 4, "SystemFailure: another rank is lost"), (signal.SIGINT, 4, "PeerFailed: rank 1: was stopped")],
)
def test_a_rank_that_falls_silent_or_is_interrupted_stops_the_others(zygote, base, tmp_path, sent, code, said):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out"), "jobs": 1}
    moments = zygote.run(3, **arguments)[1]["moments"]
    shutil.rmtree(tmp_path / "out")
    ended = zygote.run(3, (1, moments // 2), sent=sent, **arguments)
    assert [one["code"] for one in (ended[0], ended[2])] == [code] * 2, ended
    assert all(said in one["said"] for one in (ended[0], ended[2])), ended
    assert not list(tmp_path.iterdir())


def test_without_resume_what_a_stopped_run_left_is_taken_away(zygote, base, expected, tmp_path):
    arguments = {"spec": SPEC, "ckpt": str(base), "out": str(tmp_path / "out")}
    moments = zygote.run(2, **arguments)[0]["moments"]
    shutil.rmtree(tmp_path / "out")
    zygote.run(2, (0, moments // 2), **arguments)
    assert (tmp_path / ".out.ckptsurg").exists()
    again = zygote.run(2, **arguments)
    assert [one["code"] for one in again] == [0, 0], again
    assert "kept" not in again[0]["said"]
    assert contents(tmp_path / "out") == expected


def test_links_that_a_stopped_run_left_are_not_written_through(zygote, base, tmp_path):
    """They are further names of the base's files."""
    before = contents(base)
    spec = {"version": 1, "freeze": ["**", "!embed"], "drop": "model.layers[-1:].norm"}
    arguments = {"spec": spec, "ckpt": str(base), "out": str(tmp_path / "out"), "resume": True}
    moments = zygote.run(2, **arguments, link=True)[1]["moments"]
    shutil.rmtree(tmp_path / "out")
    zygote.run(2, (1, moments - 3), **arguments, link=True)
    assert any(path.stat().st_nlink > 1 for path in (tmp_path / ".out.ckptsurg" / "output").iterdir())
    again = zygote.run(2, **arguments)
    assert [one["code"] for one in again] == [0, 0], again
    assert contents(base) == before


# --- Verifying --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base, expected) -> Path:
    """The output, some bits of which were changed, and one tensor left out."""
    folder = base.parent / "trained"
    shutil.copytree(base.parent / "one", folder)
    (folder / "freeze.json").unlink()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name in ("model.layers.0.k.weight", "model.layers.3.norm.weight", "embed.weight"):
                flat = tensors[name].view(torch.uint8).reshape(-1)
                flat[-1] ^= 1
        tensors.pop("model.layers.4.v.weight", None)
        save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.4.v.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"baseline": True}, {"expect_trained": True, "exact": True}, {"only": ["**", "!head"]}, {"root": True}],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_report_is_that_of_one_process(zygote, base, trained, ranks, options):
    if "baseline" in options:
        options = {"baseline": str(base.parent / "one")}
    if "root" in options:
        options = {"root": ckptsurg.load_manifest(base.parent / "one").root}
    arguments = {"manifest": str(base.parent / "one"), "ckpt_or_model": str(trained), **options}
    one = ckptsurg.verify(**arguments)
    assert {difference.name for difference in one.drifted} == {
        "model.layers.0.k.weight", "model.layers.3.norm.weight", "model.layers.4.v.weight"
    }  # fmt: skip
    ended = zygote.run(ranks, call="verify", **arguments)
    assert [each["result"] for each in ended] == [one.to_json()] * ranks, ended


def test_ranks_read_each_byte_once_between_them(zygote, tmp_path):
    """All that is frozen, by what the kernel counts of each process's reads; modules are among it, and headers."""
    save_file({f"layers.{number}.weight": torch.randn(500, 500) for number in range(24)}, tmp_path / "base.safetensors")
    manifest = ckptsurg.make_manifest(["**", "!layers.3"], tmp_path / "base.safetensors")
    ckptsurg.write_manifest(manifest, tmp_path / "base.freeze.json")
    path = str(tmp_path / "base.safetensors")
    each = [one["read"] for one in zygote.run(3, call="verify", manifest=path, ckpt_or_model=path)]
    frozen = sum(record.info.nbytes for record in manifest.tensors.values() if record.frozen)
    assert frozen <= sum(each) <= 1.1 * frozen
    assert max(each) < 1.2 * min(each)


def test_of_a_distributed_checkpoint_each_rank_reads_its_part(zygote, tmp_path):
    torch.manual_seed(1)
    tensors = {f"layers.{number}.weight": torch.randn(900, 900) for number in range(12)}
    save_file(tensors, tmp_path / "base.safetensors")
    manifest = ckptsurg.make_manifest(["**", "!layers.3"], tmp_path / "base.safetensors")
    ckptsurg.write_manifest(manifest, tmp_path / "base.freeze.json")
    tensors["layers.7.weight"].view(torch.int32)[899, 899] ^= 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(tensors, checkpoint_id=tmp_path / "trained")
    arguments = {"manifest": str(tmp_path / "base.freeze.json"), "ckpt_or_model": str(tmp_path / "trained")}
    one = ckptsurg.verify(**arguments)
    assert [difference.name for difference in one.drifted] == ["layers.7.weight"]
    alone = zygote.run(1, call="verify", **arguments)[0]["read"]
    ended = zygote.run(3, call="verify", **arguments)
    assert [each["result"] for each in ended] == [one.to_json()] * 3, ended
    assert max(each["read"] for each in ended) < 0.6 * alone


def test_a_lost_rank_proves_nothing(zygote, base, expected):
    arguments = {"manifest": str(base.parent / "one"), "ckpt_or_model": str(base.parent / "one")}
    moments = zygote.run(2, call="verify", **arguments)[1]["moments"]
    ended = zygote.run(2, (1, moments - 1), call="verify", **arguments)
    assert [one["code"] for one in ended] == [4, -9]
    assert "another rank is lost" in ended[0]["said"]


# --- Meeting ----------------------------------------------------------------------------------------


def test_who_gives_up_waiting_has_not_come(monkeypatch):
    """And meets the others the next time, at a place where nothing of the last time is."""
    store = dist.HashStore()
    for me in range(2):
        with monkeypatch.context() as patch, pytest.raises(ckptsurg.UsageError, match="of 2 ranks only 1 came"):
            patch.setattr(meeting, "START", 0.0)
            meeting.meet(store, [0, 1], me)
    for time in range(2):
        with ThreadPoolExecutor(2) as threads:
            one, other = threads.map(lambda me: meeting.meet(store, [0, 1], me), range(2))
        one.set(f"said-{time}", "")
        assert [other.check([f"said-{number}"]) for number in range(2)] == [number == time for number in range(2)]
