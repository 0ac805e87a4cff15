"""The command under torchrun: processes side by side, and on two hosts that share a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptsurg

from .filesystems import as_root
from .rank_worlds import contents

SPEC = "version: 1\ndrop: body.2\nfreeze: ['**', '!body.1']\nreinit: [{match: body.1, init: {default: Linear}}]\n"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, a spec, and what one process makes of them."""
    place = tmp_path_factory.mktemp("torchrun")
    (place / "base").mkdir()
    torch.manual_seed(0)
    weight_map = {}
    for shard in range(2):
        tensors = {f"body.{number}.weight": torch.randn(300, 64) for number in range(2 * shard, 2 * shard + 2)}
        name = f"model-{shard + 1:05d}-of-00002.safetensors"
        save_file(tensors, place / "base" / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 4 * 300 * 64 * 4}, "weight_map": weight_map}
    (place / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "spec.yaml").write_text(SPEC)
    ckptsurg.rewrite(place / "spec.yaml", place / "base", place / "one")
    return place


def _run(command: Sequence[object], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def _rewrite(place: Path, out: Path) -> list[object]:
    return ["-m", "ckptsurg", "rewrite", place / "spec.yaml", place / "base", "-o", out]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rewrite_is_that_of_one_process_and_said_once(place, tmp_path, ranks):
    done = _run([*TORCHRUN, "--nproc-per-node", ranks, *_rewrite(place, tmp_path / "out")])
    output, said = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert contents(tmp_path / "out") == contents(place / "one")
    assert output.count("frozen_root") == output.count("published") == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_stops_all_with_its_message(place, tmp_path, failing):
    """Each rank in a folder of its own; one has no base."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / str(1 - failing) / "base").symlink_to(place / "base")
    rewrite = f"{sys.executable} -m ckptsurg rewrite {place}/spec.yaml base -o {tmp_path}/out"
    in_folders = ["--no-python", "bash", "-c", f"cd {tmp_path}/$RANK && {rewrite}"]
    done = _run([*TORCHRUN, "--nproc-per-node", 2, *in_folders], PYTHONPATH=str(Path.cwd()))
    _, said = done.communicate(timeout=120)
    assert done.returncode != 0
    peer = f"rank {failing}: " if failing else ""
    assert f"error: {peer}base: no such file or folder" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_ranks_that_see_other_files_are_refused(place, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        save_file({"body.1.weight": torch.zeros(3 + rank, 4)}, tmp_path / str(rank) / "base.safetensors")
    rewrite = f"{sys.executable} -m ckptsurg rewrite {place}/spec.yaml base.safetensors -o {tmp_path}/out"
    in_folders = ["--no-python", "bash", "-c", f"cd {tmp_path}/$RANK && {rewrite}"]
    done = _run([*TORCHRUN, "--nproc-per-node", 2, *in_folders], PYTHONPATH=str(Path.cwd()))
    _, said = done.communicate(timeout=120)
    assert done.returncode != 0
    assert "error: base.safetensors: not the same for rank 1 as for rank 0" in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with one wire between them."""
    names = (f"one-{os.getpid()}", f"two-{os.getpid()}")

    def ip(*arguments: str) -> None:
        subprocess.run([*as_root(), "ip", *arguments], check=True, capture_output=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "wire")
            for device in ("wire", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts_that_share_a_folder_write_what_one_process_does(place, tmp_path, hosts):
    runs = []
    for number, host in enumerate(hosts):
        meet = ["--nnodes", 2, "--node-rank", number, "--master-addr", "10.77.0.1", "--master-port", 29517]
        command = [*TORCHRUN, *meet, "--nproc-per-node", 1, *_rewrite(place, tmp_path / "out")]
        enter = [*as_root(), "ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=wire"]
        runs.append(_run([*enter, *command]))
    for run in runs:
        _, said = run.communicate(timeout=120)
        assert run.returncode == 0, said
    assert contents(tmp_path / "out") == contents(place / "one")


def test_a_rank_of_a_training_may_verify_alone(place, tmp_path):
    """A command that one rank of many starts is one of theirs, by the environment; without that it is its own."""
    script = tmp_path / "train.py"
    verify = f"{sys.executable} -m ckptsurg verify {place}/one {place}/one"
    script.write_text(
        "import os, subprocess\n"
        "if os.environ['RANK'] == '0':\n"
        "    environment = {k: v for k, v in os.environ.items() if k != 'TORCHELASTIC_RUN_ID'}\n"
        f"    subprocess.run({verify.split()!r}, env=environment, check=True)\n"
    )
    done = _run([*TORCHRUN, "--nproc-per-node", 2, script], PYTHONPATH=str(Path.cwd()))
    output, said = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert "2 frozen tensors verified: every one has its bits" in output


def test_a_verify_says_once_what_it_found(place, tmp_path):
    trained = tmp_path / "trained.safetensors"
    tensors = {name: value for path in (place / "one").glob("*.safetensors") for name, value in load_file(path).items()}
    tensors["body.3.weight"][17, 5] += 1
    save_file(tensors, trained)
    files = ["--junit", tmp_path / "gate.xml", "--markdown", tmp_path / "gate.md"]
    verify = ["-m", "ckptsurg", "verify", place / "one", trained, "--json", *files]
    done = _run([*TORCHRUN, "--nproc-per-node", 2, *verify])
    output, said = done.communicate(timeout=120)
    assert done.returncode == 1, said
    assert [one["name"] for one in json.loads(output)["drifted"]] == ["body.3.weight"]
    assert (tmp_path / "gate.md").read_text().count("body.3.weight") == 1
    assert (tmp_path / "gate.xml").read_text().count("<testsuites") == 1
