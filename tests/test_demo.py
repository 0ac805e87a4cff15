"""The demo shows what it says, and says the commands that a reader would type."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys


def _run(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ckptsurg", *arguments], cwd=folder, capture_output=True, text=True)


def test_the_demo_and_the_commands_it_prints(tmp_path):
    done = _run(tmp_path, "demo", "place")
    assert done.returncode == 0, done.stderr
    commands = [line.strip().removeprefix("$ ckptsurg ") for line in done.stdout.splitlines() if "$ ckptsurg" in line]
    assert [command.split()[0] for command in commands] == ["plan", "rewrite", "verify", "verify"]
    codes = [_run(tmp_path, *shlex.split(command)).returncode for command in commands]
    assert codes == [0, 2, 0, 1], "the output is there already; the loop of the tutorials moved something"


def test_the_demo_as_json(tmp_path):
    done = _run(tmp_path, "demo", "place", "--json")
    reports = json.loads(done.stdout)
    assert reports["frozen"]["ok"] and reports["frozen"]["verified"] == 14
    statistics = {f"bn{n}.{name}" for n in (1, 2) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {difference["name"] for difference in reports["tutorial"]["drifted"]} == statistics


def test_the_demo_takes_an_empty_place(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "precious").touch()
    done = _run(tmp_path, "demo", "place")
    assert done.returncode == 2 and "exists and is not empty" in done.stderr
