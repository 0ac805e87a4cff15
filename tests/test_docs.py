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
from safetensors.torch import load_file, save_file

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
    assert len(blocks) == 4
    model = resnet18(10)

    def few_steps(model, optimizer):
        train(model, optimizer, steps=2)

    scope = {"model": model, "train": few_steps}
    exec(blocks[0], scope)

    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, "last.ckpt")
    exec(blocks[3], scope)

    def train_one_step(model):
        model.fc.weight.data += 1

    scope = {"model": model, "train_one_step": train_one_step, "ckptsurg": ckptsurg}
    exec(blocks[2], scope)
    model.conv1.weight.data += 1
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"conv1\.weight"):
        ckptsurg.verify(scope["before"], model).raise_if_changed()


def test_the_block_for_hugging_face_runs(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    (tmp_path / "specs").symlink_to(ROOT / "specs")
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).save_pretrained("llama")

    def train(model, optimizer):
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()

    block = next(text for kind, text in BLOCKS if kind == "python" and "AutoModel" in text)
    exec(block, {"ckptsurg": ckptsurg, "torch": torch, "train": train})


def test_the_plan_shown_is_the_plan_given(tmp_path, monkeypatch):
    from .architectures import resnet18

    monkeypatch.chdir(tmp_path)
    save_file(resnet18(1000).state_dict(), "base.safetensors")
    Path("spec.yaml").write_text(next(text for kind, text in BLOCKS if kind == "yaml" and "# spec.yaml" in text))
    shown = next(text for kind, text in BLOCKS if kind == "text" and "fate" in text)
    given = _shell("ckptsurg plan spec.yaml base.safetensors")
    assert [line.rstrip() for line in given.splitlines()] == shown.splitlines()


def test_the_cause_shown_is_the_cause_given():
    from ckptsurg.causes import CAUSES

    cause = CAUSES["batchnorm_stats"]
    assert f"batchnorm_stats: {cause.explanation}; {cause.remedy}" in README


def test_the_gate_runs(place):
    script = next(text for kind, text in BLOCKS if kind == "sh").replace("ckptsurg", f"{sys.executable} -m ckptsurg", 1)
    ckptsurg.rewrite("spec.yaml", "base.safetensors", "out")
    for change, code, said in ((0.0, 0, "intact"), (1.0, 1, "changed"), (None, 2, "not verified")):
        if change is None:
            Path("trained", "model.safetensors").unlink()
        else:
            tensors = load_file("out/model.safetensors")
            tensors["conv1.weight"] += change
            Path("trained").mkdir(exist_ok=True)
            save_file(tensors, "trained/model.safetensors")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert (done.returncode, said in done.stdout) == (code, True)


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
