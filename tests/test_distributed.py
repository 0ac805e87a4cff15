"""Frozen models over two processes: DistributedDataParallel, fully_shard, FullyShardedDataParallel.

One group of processes plays all scenes of ``distributed_worlds``; each test looks at what they saw. About a sharded
model every process has to ask: ``verify``, ``moved`` and a guard gather, and one that asks alone waits for the others.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
from safetensors.torch import load_file

import ckptsurg
from ckptsurg.schemas import schema

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
    assert sabotaged["message"] == "after step 3, 1 frozen tensor changed:\n  body.0.weight (rank 1): bits changed"
    assert sabotaged["ranks"] == {"body.0.weight": (1,)}


def test_at_the_end_too_each_rank_speaks_for_its_replica(seen):
    honest, sabotaged = seen("ddp_saboteur_at_the_end")
    assert honest["report"]["ok"] and "message" not in honest
    assert sabotaged["message"] == "1 frozen tensor changed:\n  body.1.running_mean (rank 1): bits changed"
    assert [(one["name"], one["detail"]) for one in sabotaged["report"]["drifted"]] == [
        ("body.1.running_mean", {"ranks": [1]})
    ]


def test_what_is_thawed_on_one_rank_is_caught_there(seen):
    honest, sabotaged = seen("ddp_thawed")
    assert honest["step"] is None
    assert sabotaged["message"].startswith("before step 3:\n  body.0.weight (rank 1); cause: reenabled")
    assert sabotaged["causes"] == {"body.0.weight": "reenabled"} and sabotaged["ranks"] == {"body.0.weight": (1,)}


def test_a_refusal_says_on_which_rank(seen):
    fine, refused = seen("ddp_refused")
    assert fine == {"freeze": {}, "watch": {}, "watched": {"ok": True}}
    assert refused["freeze"]["message"].startswith(
        'the model (Net) on rank 1 cannot be frozen:\n  "one.weight" has other bits'
    )
    assert refused["watch"]["message"].startswith("the model (Net) on rank 1 does not hold what the manifest freezes")
    assert refused["watched"]["message"] == (
        "1 frozen tensor changed:\n  one.weight (rank 1): bits changed; 1 element, by up to 1, first at [0, 2]"
    )


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
    ("scene", "name", "guilty"),
    [
        ("fsdp2_saboteur", "body.0.weight", 1),
        ("fsdp2_saboteur_of_the_row_that_one_process_has", "one.weight", 0),
        ("fsdp2_rows_saboteur", "embed.weight", 1),
        ("fsdp1_saboteur", "body.0.weight", 0),
    ],
)
def test_a_saboteur_of_one_shard_is_caught_at_its_step_on_all_ranks(seen, scene, name, guilty):
    for rank in seen(scene):
        assert rank["step"] == 3
        assert rank["message"] == f"after step 3, 1 frozen tensor changed:\n  {name} (rank {guilty}): bits changed"
        assert rank["causes"] == {}, "nothing tells who wrote to it"
        assert rank["ranks"] == {name: (guilty,)}


@pytest.mark.parametrize("scene", ["fsdp2_saboteur_of_a_buffer", "fsdp1_saboteur_of_a_buffer"])
def test_what_one_rank_alone_has_is_proven_without_the_others(seen, scene):
    honest, sabotaged = seen(scene)
    assert honest["step"] is None, "it goes on"
    assert sabotaged["step"] == 3 and sabotaged["ranks"] == {"body.1.running_mean": (1,)}
    assert sabotaged["message"] == (
        "after step 3, 1 frozen tensor changed:\n  body.1.running_mean (rank 1): bits changed"
    )


def test_every_rank_whose_part_moved_is_named(seen):
    for rank in seen("fsdp2_saboteurs"):
        assert rank["step"] == 3 and rank["ranks"] == {"embed.weight": (0, 1), "one.weight": (0,)}
        lines = ["embed.weight (ranks 0, 1): bits changed", "one.weight (rank 0): bits changed"]
        assert rank["message"] == "\n  ".join(["after step 3, 2 frozen tensors changed:", *lines])
        assert rank["sharded"] == "\n  ".join(["2 frozen tensors changed:", *lines])
    gathered = seen("fsdp2_saboteurs")[0]["gathered"]
    assert gathered == "2 frozen tensors changed:\n  embed.weight: bits changed\n  one.weight: bits changed"


def test_a_report_has_the_ranks_in_the_detail_and_keeps_to_its_schema(seen):
    for rank in seen("fsdp2_saboteurs"):
        document = json.loads(rank["report"])
        jsonschema.validate(document, schema("report"))
        found = {one["name"]: one["detail"] for one in document["drifted"]}
        assert {name: detail["ranks"] for name, detail in found.items()} == {"embed.weight": [0, 1], "one.weight": [0]}
        assert found["embed.weight"]["elements_changed"] == 2 and found["embed.weight"]["first_index"] == [0, 0]


def test_parts_that_nobody_has_seen_before_are_not_compared(seen):
    for rank in seen("fsdp2_saboteur_while_nobody_watches"):
        assert rank["before"] == "1 frozen tensor changed:\n  body.0.weight: bits changed"
        assert rank["after"] == rank["before"], "no part is another than when the guard came"


def test_parts_are_known_since_a_sharded_model_was_frozen(seen):
    for number, rank in enumerate(seen("fsdp2_frozen_after_sharding_and_moved")):
        assert rank["moved"] == ["body.0.weight"]
        assert rank["summary"] == "1 frozen tensor changed:\n  body.0.weight (rank 1): bits changed"
        assert rank["message"].startswith(
            f'the model (FSDPNet) on rank {number} cannot be frozen:\n  "body.0.weight" has other bits'
        )


def test_a_replica_that_moved_is_named_on_all_ranks(seen):
    for rank in seen("fsdp2_replicas"):
        assert rank["message"] == "body.0.weight (rank 1): its replicas differ"
        assert rank["ranks"] == {"body.0.weight": (1,)}
    honest, sabotaged = seen("fsdp2_replicas")
    assert honest["verified"] == "12 frozen tensors verified"
    assert sabotaged["verified"] == "1 frozen tensor changed:\n  body.0.weight (rank 1): bits changed"


def test_looking_asks_the_others_once_and_the_host_waits_once(seen):
    for rank in seen("fsdp2_cost"):
        assert rank["moved"] == []
        assert rank["at_the_beginning"] == (0, 1), "a second guard has nothing to mark"
        assert rank["after_a_step"] == (1, 1)


@pytest.mark.parametrize("scene", ["fsdp2_reenabled", "fsdp1_reenabled"])
def test_what_is_thawed_is_caught_before_it_moves(seen, scene):
    for rank in seen(scene):
        assert rank["step"] == 3 and rank["causes"] == {"body.0.weight": "reenabled"}
    for number, rank in enumerate(seen(scene)):
        assert rank["message"].startswith(f"before step 3:\n  body.0.weight (rank {number}); cause: reenabled")


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


def test_frozen_rows_of_a_flat_parameter_are_refused(seen):
    for rank in seen("fsdp1_rows"):
        assert '"embed.weight"' in rank["message"], "no row of a flattened parameter can be held"


# --- Jobs of a launcher -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["ddp", "fully_shard"])
def test_torchrun_ends_a_job_in_which_one_rank_alone_sees_a_drift(folder, wrapped):
    """The other rank waits in a collective by then, which would give up after half an hour."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.distributed_worlds", wrapped, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    said = "FrozenWeightsChanged: after step 3, 1 frozen tensor changed:\n"
    assert done.stderr.count(said) == 1 and "  body.1.running_mean (rank 1): bits changed\n" in done.stderr
    assert not list(folder.glob("finished.*")), done.stderr
