"""Frozen models over two processes: DistributedDataParallel, fully_shard, FullyShardedDataParallel.

One group of processes plays all scenes of ``distributed_worlds``; each test looks at what they saw. About a sharded
model every process has to ask: ``verify``, ``moved`` and a guard gather, and one that asks alone waits for the others.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from safetensors.torch import load_file

import ckptsurg

from . import distributed_worlds as worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    worlds.publish(folder)
    worlds.run(worlds.RANKS, worlds.play, folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What each process saw in a scene."""
    ranks = [pickle.loads((folder / f"seen.{rank}").read_bytes()) for rank in range(worlds.RANKS)]

    def look(scene: str) -> list[dict]:
        found = [rank[scene] for rank in ranks]
        failed = [f"rank {rank}: {one}" for rank, one in enumerate(found) if isinstance(one, str)]
        assert not failed, "\n".join(failed)
        return found

    return look


@pytest.fixture(scope="module")
def published(folder):
    return worlds.bits(load_file(folder / "base.safetensors"))


def _moved(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, bits in after.items() if bits != before[name]}


def _rows(bits: bytes) -> list[bytes]:
    return [row.tobytes() for row in np.frombuffer(bits, np.uint32).reshape(11, 5)]


# --- DistributedDataParallel ------------------------------------------------------------------------


def test_ddp_moves_what_trains_and_nothing_else_on_both_ranks(seen, published):
    for rank in seen("ddp"):
        assert rank["steps"] == worlds.STEPS and rank["kept"] == ("body.1",)
        assert _moved(published, rank["bits"]) == worlds.TRAINED
        assert rank["ok"] and rank["saved"] and rank["verified"] == 12


def test_ddp_replicas_train_alike(seen):
    first, second = seen("ddp")
    assert first["bits"] == second["bits"]


def test_a_frozen_sync_batch_norm_evaluates(seen, published):
    for rank in seen("sync_batch_norm"):
        assert rank["kind"] == "SyncBatchNorm" and rank["kept"] == ("body.1",)
        assert _moved(published, rank["bits"]) == worlds.TRAINED


def test_a_saboteur_under_ddp_is_caught_at_its_step_on_its_rank(seen):
    honest, sabotaged = seen("ddp_saboteur")
    assert honest["step"] is None, "its replica has not moved"
    assert sabotaged["step"] == 3
    assert sabotaged["message"] == "after step 3, 1 frozen tensor changed:\n  body.0.weight: bits changed"


def test_frozen_rows_stand_still_under_ddp(seen, published):
    before = _rows(published["embed.weight"])
    for rank in seen("ddp_rows"):
        after = _rows(rank["bits"]["embed.weight"])
        assert {row for row in range(11) if after[row] != before[row]} == {0, 1, 8, 9, 10}
        assert rank["gradients"] == [0.0] * 5


# --- fully_shard ------------------------------------------------------------------------------------


def test_fully_shard_shares_unevenly(seen):
    first, second = (rank["local"] for rank in seen("fsdp2"))
    assert first["body.0.weight"] == [4, 5] and second["body.0.weight"] == [3, 5]
    assert first["one.weight"] == [1, 5] and second["one.weight"] == [0, 5]


def test_fully_shard_changes_no_fingerprint_and_no_name(seen, published):
    for rank in seen("fsdp2"):
        assert rank["moved_by_sharding"] == []
        assert set(rank["names"]) == published.keys() - worlds.TRAINED


def test_fully_shard_moves_what_trains_and_nothing_else(seen, published):
    first, second = seen("fsdp2")
    for rank in (first, second):
        assert rank["steps"] == worlds.STEPS and rank["kept"] == ("body.1",)
        assert rank["ok"] and rank["saved"] and rank["verified"] == 12
        assert rank["statistics"].items() <= published.items() and len(rank["statistics"]) == 3
    assert _moved(published, first["bits"]) == worlds.TRAINED
    assert second["bits"] == {}, "rank 0 gathers the state dict"


def test_what_rank_0_saves_is_proven_offline(seen, folder, published):
    seen("fsdp2")
    report = ckptsurg.verify(
        folder / "base.freeze.json", folder / "fsdp2.safetensors", baseline=folder / "base.safetensors", exact=True
    )
    assert report.ok and report.verified == 12
    assert _moved(published, worlds.bits(load_file(folder / "fsdp2.safetensors"))) == worlds.TRAINED


@pytest.mark.parametrize(
    ("scene", "name"),
    [
        ("fsdp2_saboteur", "body.0.weight"),
        ("fsdp2_saboteur_of_the_row_that_one_process_has", "one.weight"),
        ("fsdp2_saboteur_of_a_buffer", "body.1.running_mean"),
        ("fsdp2_rows_saboteur", "embed.weight"),
    ],
)
def test_a_saboteur_of_one_shard_is_caught_at_its_step_on_all_ranks(seen, scene, name):
    for rank in seen(scene):
        assert rank["step"] == 3
        assert rank["message"] == f"after step 3, 1 frozen tensor changed:\n  {name}: bits changed"
        assert rank["causes"] == {}, "nothing tells who wrote to it"


@pytest.mark.parametrize("scene", ["fsdp2_reenabled", "fsdp1_reenabled"])
def test_what_is_thawed_is_caught_before_it_moves(seen, scene):
    for rank in seen(scene):
        assert rank["step"] == 3 and rank["message"].startswith("before step 3:\n  body.0.weight; cause: reenabled")
        assert rank["causes"] == {"body.0.weight": "reenabled"}


def test_an_optimizer_older_than_fully_shard_is_stale(seen):
    for rank in seen("fsdp2_stale_optimizer"):
        assert rank["step"] == 1
        assert rank["causes"] == dict.fromkeys(worlds.TRAINED, "stale_optimizer")


def test_frozen_rows_stand_still_over_shards(seen, published):
    first, second = seen("fsdp2_rows")
    assert first["local"] == [6, 5] and second["local"] == [5, 5], "rows 2 to 7 lie on both"
    assert first["ok"] and second["ok"] and first["moved_by_sharding"] == second["moved_by_sharding"] == []
    before, after = _rows(published["embed.weight"]), _rows(first["bits"]["embed.weight"])
    assert {row for row in range(11) if after[row] != before[row]} == {0, 1, 8, 9, 10}


def test_frozen_rows_have_no_gradient_over_shards(seen):
    for rank in seen("fsdp2_rows"):
        assert rank["gradients"] == [0.0] * 10


def test_a_sharded_model_can_be_frozen(seen, published):
    assert _moved(published, seen("fsdp2_frozen_after_sharding")[0]["bits"]) == worlds.TRAINED


# --- FullyShardedDataParallel -----------------------------------------------------------------------


def test_fsdp1_moves_what_trains_and_nothing_else(seen, published):
    for rank in seen("fsdp1"):
        assert rank["moved_by_sharding"] == [] and rank["kept"] == ("body.1",)
        assert rank["steps"] == worlds.STEPS and rank["ok"] and rank["verified"] == 12
        assert _moved(published, rank["bits"]) == worlds.TRAINED


@pytest.mark.parametrize("asked", ["verify", "moved"])
def test_fsdp1_has_to_be_attached(seen, asked):
    for rank in seen("fsdp1_without_attach"):
        assert rank[asked]["message"] == (
            '"embed.weight" is sharded by FullyShardedDataParallel from outside the model '
            "(hint: tell the frozen model of the wrapper: frozen.attach(wrapped))"
        )


def test_a_wrapper_of_another_model_is_refused(seen):
    for rank in seen("fsdp1_attached_to_another"):
        assert rank["message"] == "the frozen model is not inside this FullyShardedDataParallel"


def test_a_saboteur_of_a_flat_parameter_is_caught_at_its_step_on_all_ranks(seen):
    for rank in seen("fsdp1_saboteur"):
        assert rank["step"] == 3
        assert rank["message"] == "after step 3, 1 frozen tensor changed:\n  body.0.weight: bits changed"


def test_frozen_rows_of_a_flat_parameter_are_refused(seen):
    for rank in seen("fsdp1_rows"):
        assert '"embed.weight"' in rank["message"], "no row of a flattened parameter can be held"
