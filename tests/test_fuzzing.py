"""The fuzzer finds what there is to find: every kind of failure is noticed, ends the run, and names its input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from ckptsurg import CheckpointError, SpecError
from ckptsurg.errors import Problem

from .fuzz import TARGETS, checking
from .fuzz.checking import Finding, attempt, configure, unlimited

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _traced():
    """Memory is traced in every call, where the fuzzer does it in one of many."""
    configure(traced_every=1)
    yield
    configure()


def fuzz(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_hold(name):
    target = import_module(f"tests.fuzz.{name}").TARGET
    for seed in target.seeds:
        with unlimited():
            target.holds(seed)
        target.holds(seed)


def without_end() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:  # as a reader may that takes everything for a failure of its own
            continue


def refusing(error: Exception) -> Callable[[], None]:
    def read() -> None:
        raise error

    return read


PROBLEMS = [Problem("a", "is wrong"), Problem("b", "is wrong")]


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda: {}["key"], "exception"),
        (refusing(SpecError("x", PROBLEMS)), "exception"),  # an error of ours, and of another kind
        (without_end, "hang"),
        (lambda: [b"%d" % number for number in range(100_000)], "memory"),
        (refusing(CheckpointError("x" * 20_001)), "message"),
        (refusing(CheckpointError("x: a\u202eb")), "message"),
        (refusing(CheckpointError("x: a\x1b[2J")), "message"),
        (refusing(CheckpointError("x: a\nb")), "message"),
        (refusing(CheckpointError("")), "message"),
    ],
)
def test_failures_are_found(monkeypatch, read, kind):
    monkeypatch.setattr(checking, "MAX_SECONDS", 0.05)
    with pytest.raises(Finding) as found:
        attempt(read, b"in\0put", CheckpointError)
    assert found.value.kind == kind
    assert repr(b"in\0put") in str(found.value)


def test_refusals_are_no_failures():
    assert attempt(refusing(CheckpointError("x: is cut short", hint="fetch it again")), b"", CheckpointError) is None
    assert attempt(refusing(SpecError("x", PROBLEMS, hint="read on")), b"", SpecError) is None
    assert attempt(lambda: 5, b"", SpecError) == 5


def test_a_finding_fails_the_run_and_names_the_input(tmp_path):
    done = fuzz(tmp_path, "broken", "--runs", "20000", "--seed", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differs: accepted" in done.stdout
    [saved] = (tmp_path / "build" / "fuzz").glob("broken-crash-*")
    assert f"input: {saved.read_bytes()!r}" in done.stdout
    command = re.search("again: python -m tests.fuzz (.*)", done.stdout)
    assert command is not None
    again = fuzz(tmp_path, *command[1].split())
    assert again.returncode == 1
    assert "differs: accepted" in again.stdout


def test_what_is_found_leads_further(tmp_path):
    done = fuzz(tmp_path, "patterns", "--runs", "4000", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    coverage = re.search(r"coverage ([0-9]+) to ([0-9]+)", done.stdout)
    assert coverage is not None, done.stdout
    assert 0 < int(coverage[1]) < int(coverage[2])
