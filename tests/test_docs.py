"""What the README says is so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import yaml
from safetensors.torch import save_file

import ckptsurg
from ckptsurg.cli.commands import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the README's spec and a base that fits it."""
    from .architectures import ResNet, resnet18

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model: ResNet = resnet18(7)
    save_file(model.state_dict(), "base.safetensors")
    spec = next(text for kind, text in BLOCKS if kind == "yaml" and "# spec.yaml" in text)
    Path("spec.yaml").write_text(spec)
    return tmp_path


def _shell(line: str, code: int = 0) -> str:
    command = line.partition("#")[0].replace("ckptsurg", f"{sys.executable} -m ckptsurg", 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_first_commands_run(place):
    lines = next(text for kind, text in BLOCKS if kind == "console" and "ckptsurg plan spec.yaml" in text).splitlines()
    for line in lines:
        if "verify" in line:
            (place / "trained.safetensors").write_bytes((place / "out" / "model.safetensors").read_bytes())
        _shell(line.removeprefix("$ "))
    assert (place / "out" / "freeze.json").exists()


def test_the_python_blocks_run(place):
    from .architectures import resnet18, train

    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) == 2
    model = resnet18(10)

    def few_steps(model, optimizer):
        train(model, optimizer, steps=2)

    exec(blocks[0], {"model": model, "train": few_steps})

    def train_one_step(model):
        model.fc.weight.data += 1

    scope = {"model": model, "train_one_step": train_one_step, "ckptsurg": ckptsurg}
    exec(blocks[1], scope)
    model.conv1.weight.data += 1
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"conv1\.weight"):
        ckptsurg.verify(scope["before"], model).raise_if_changed()


def test_the_errors_shown_are_the_errors_given(place):
    text = next(text for kind, text in BLOCKS if kind == "console" and "typo.yaml" in text)
    line, _, expected = text.partition("\n")
    spec = 'version: 1\nfreeze: ["**", "!fcc"]\nreinit:\n  - match: fc\n    init: kaming_normal\n'
    (place / "typo.yaml").write_text(spec)
    assert _shell(line.removeprefix("$ "), code=2) == expected


def test_every_yaml_block_is_a_spec():
    for kind, text in BLOCKS:
        if kind == "yaml":
            ckptsurg.Spec.model_validate_json(json.dumps(yaml.safe_load(text)))


def test_every_command_and_option_is_documented():
    assert isinstance(cli, click.Group)
    documented = set(re.findall(r"`ckptsurg (\w+)", README))
    assert set(cli.commands) == documented
    for command in cli.commands.values():
        assert command.help and all(option.help for option in command.params if isinstance(option, click.Option)), (
            command.name
        )


def test_the_two_commands_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"$ make {target}" in README and re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
