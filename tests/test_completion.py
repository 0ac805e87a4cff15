"""What a shell offers for patterns: the names of the checkpoint on the line, a level at a time, and never an error."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.shell_completion import BashComplete
from safetensors.torch import save_file

import ckptsurg
from ckptsurg.cli.commands import cli

_NAMES = [
    *(f"model.layers.{number}.mlp.{leaf}" for number in range(11) for leaf in ("weight", "bias")),
    "model.norm.weight",
    "lm_head.weight",
    "mask",
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    save_file({name: torch.zeros(2) for name in _NAMES}, tmp_path / "base.safetensors")
    ckptsurg.rewrite({"version": 1, "freeze": "**"}, tmp_path / "base.safetensors", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offered(*words: str) -> list[str]:
    """What is offered for the last word of a line."""
    *before, incomplete = words
    completion = BashComplete(cli, {}, "ckptsurg", "_CKPTSURG_COMPLETE")
    return [item.value for item in completion.get_completions(before, incomplete)]


def test_names_are_offered_a_level_at_a_time(folder):
    assert offered("inspect", "base.safetensors", "") == ["lm_head", "mask", "model"]
    assert offered("inspect", "base.safetensors", "m") == ["mask", "model"]
    assert offered("inspect", "base.safetensors", "model.") == ["model.layers", "model.norm"]
    numbered = [f"model.layers.{number}" for number in range(11)]
    assert offered("inspect", "base.safetensors", "model.layers.") == numbered  # 2 before 10
    leaves = ["model.layers.3.mlp.bias", "model.layers.3.mlp.weight"]
    assert offered("inspect", "base.safetensors", "model.layers.3.mlp.") == leaves
    assert offered("inspect", "base.safetensors", "x") == []


def test_a_module_that_is_the_only_one_is_offered_with_what_is_in_it(folder):
    """Alone it would be taken for the whole word, and a space put after it."""
    assert offered("inspect", "base.safetensors", "mo") == ["model", "model.layers", "model.norm"]
    assert offered("inspect", "base.safetensors", "lm_head") == ["lm_head", "lm_head.weight"]
    assert offered("inspect", "base.safetensors", "lm_head.w") == ["lm_head.weight"]


def test_every_pattern_of_a_line_is_completed_and_what_takes_away_too(folder):
    assert offered("inspect", "base.safetensors", "model", "!l") == ["!lm_head", "!lm_head.weight"]
    assert offered("init", "base.safetensors", "--freeze-all-but", "mas") == ["mask"]
    assert offered("init", "base.safetensors", "--head", "l") == ["lm_head", "lm_head.weight"]
    for manifest in ("out", "out/freeze.json"):
        assert offered("verify", manifest, "trained", "--only", "model.n") == ["model.norm", "model.norm.weight"]
    assert offered("verify", "gone.json", "base.safetensors", "--only", "mas") == ["mask"]


def test_names_of_keras_go_on_with_a_slash(tmp_path):
    save_file({"block/conv/kernel": torch.zeros(2), "block/bn/gamma": torch.zeros(2)}, tmp_path / "k.safetensors")
    assert offered("inspect", str(tmp_path / "k.safetensors"), "block/") == ["block/bn", "block/conv"]


def test_folders_indexes_and_a_home_are_found(folder, monkeypatch):
    for checkpoint in ("out", "./out", "out/model.safetensors"):
        assert offered("inspect", checkpoint, "mas") == ["mask"]
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("MODELS", str(folder))
    for checkpoint in ("~/out", "$MODELS/out"):  # the shell expands them when the line is carried out
        assert offered("inspect", checkpoint, "mas") == ["mask"]
    ckptsurg.convert("base.safetensors", "sharded", max_shard_size=64)
    assert offered("inspect", "sharded", "mas") == ["mask"]
    assert offered("inspect", "sharded/model.safetensors.index.json", "mas") == ["mask"]


def test_names_that_would_be_commands_are_not_offered(tmp_path):
    hostile = ["$(touch gone)", "`touch gone`", "a;b", "a b", "a\nplain,b", "-rf", "~root", "*", "a'b", "a>b", "ok"]
    save_file({name: torch.zeros(2) for name in hostile}, tmp_path / "x.safetensors")
    assert offered("inspect", str(tmp_path / "x.safetensors"), "") == ["ok"]


def test_what_cannot_be_read_offers_nothing(folder, capfd):
    (folder / "broken.safetensors").write_bytes(b"\xff" * 64)
    (folder / "empty").mkdir()
    (folder / "torn").mkdir()
    (folder / "torn" / "model.safetensors.index.json").write_text("{")
    (folder / "bad.json").write_text('{"tensors": 3}')
    os.mkfifo(folder / "pipe.safetensors")
    unreadable = [
        "broken.safetensors",
        "empty",
        "torn",
        "gone",
        "pipe.safetensors",
        "s3://bucket/x.safetensors",
        "~no/x",
    ]
    for checkpoint in (*unreadable, "x\0y", ""):
        assert offered("inspect", checkpoint, "m") == []
    assert offered("verify", "bad.json", "gone", "--only", "m") == []
    assert capfd.readouterr() == ("", "")


def test_nothing_heavy_is_imported_to_complete(folder):
    code = (
        "import os, sys; from ckptsurg.cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'numpy', 'keras') if name in sys.modules])"
    )
    environment = os.environ | {
        "_CKPTSURG_COMPLETE": "bash_complete",
        "COMP_WORDS": "ckptsurg inspect base.safetensors mas",
        "COMP_CWORD": "3",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "plain,mask\n[]\n" and done.stderr == ""


def _in_bash(folder: Path, line: str) -> list[str]:
    """What a real bash is given for the last word of a line, by the function that the script defines."""
    tool = folder / "bin" / "ckptsurg"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckptsurg "$@"\n')
    tool.chmod(0o755)
    script = f"""
        eval "$(_CKPTSURG_COMPLETE=bash_source ckptsurg)"
        complete -p ckptsurg >&2
        COMP_WORDS=({line})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _ckptsurg_completion ckptsurg
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "complete -o nosort -F _ckptsurg_completion ckptsurg\n"
    return done.stdout.splitlines()


def test_a_real_bash_completes_commands_and_names(folder):
    assert _in_bash(folder, "ckptsurg ins") == ["inspect"]
    assert _in_bash(folder, "ckptsurg inspect base.safetensors model.") == ["model.layers", "model.norm"]
    assert _in_bash(folder, "ckptsurg verify out trained --only '!mo'") == ["!model", "!model.layers", "!model.norm"]
