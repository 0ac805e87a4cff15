"""What README and docs say is so."""

from __future__ import annotations

import hashlib
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
from ckptsurg.causes import CAUSES, explained
from ckptsurg.cli.commands import cli
from docs import reference

from . import documents, worlds
from .architectures import digits, resnet18, train
from .serving import serving

ROOT = documents.ROOT
TEXTS = {name: path.read_text() for name, path in documents.DOCUMENTS.items()}
README, INTEGRATIONS, COMMANDS = TEXTS["README.md"], TEXTS["docs/integrations.md"], TEXTS["docs/commands.md"]
BLOCKS = [block for text in TEXTS.values() for block in documents.blocks(text)]
#: Whose commands have tests of their own: they need a backend of Keras; a server.
ELSEWHERE = {"docs/integrations.md", "docs/remote.md"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the spec of docs/integrations.md and a base that fits it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = resnet18(7)
    save_file(model.state_dict(), "base.safetensors")
    Path("spec.yaml").write_text(_block("yaml", "# spec.yaml"))
    return tmp_path


def _shell(line: str, code: int = 0) -> str:
    command = line.partition("#")[0].replace("ckptsurg", f"{sys.executable} -m ckptsurg", 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def _wrong(commands: list[documents.Command]) -> str:
    return "\n\n".join(f"$ {one.line}\n(exit code {one.code})\n{one.printed}" for one in commands if not one.right)


@pytest.mark.parametrize(
    "name", [name for name, text in TEXTS.items() if "```console" in text and name not in ELSEWHERE]
)
def test_what_a_document_shows_is_what_happens(tmp_path, name):
    worlds.WORLDS[name](tmp_path)
    commands = documents.run(TEXTS[name], tmp_path)
    assert commands and not _wrong(commands)


def test_what_is_shown_of_checkpoints_elsewhere_is_what_happens(tmp_path):
    worlds.trained(tmp_path)
    files = {"base.safetensors": (tmp_path / "base.safetensors").read_bytes()}
    with serving(files=files) as served:
        commands = documents.run(TEXTS["docs/remote.md"].replace("https://models.example.org", served.url), tmp_path)
    assert commands and not _wrong(commands)


def test_a_document_that_says_what_is_not_so_is_noticed(tmp_path):
    text = "```console\n$ echo a; echo b 1.2345\na\nb 9.8765\n$ seq 9\n1\n...\n9\n```\n"
    assert not _wrong(documents.run(text, tmp_path))
    for lie in (text.replace("a\nb 9", "b 9"), text.replace("1\n...", "2\n..."), text.replace("seq 9", "seq 9; false")):
        assert _wrong(documents.run(lie, tmp_path))


def test_of_what_is_not_run_there_is_little():
    """Installing takes a network, and the commands of make are run by a pipeline."""
    for kind, text in BLOCKS:
        assert kind in {"console", "python", "yaml", "yml", "json", "text", "sh", "shell"}
        if kind == "shell":
            assert all(re.match(r"\$ make |pip install ", line) for line in text.splitlines())


def test_the_spec_shown_is_the_spec_that_is_drafted(tmp_path):
    worlds.beginning(tmp_path)
    drafted = yaml.safe_load(ckptsurg.draft_spec(tmp_path / "base", new_head=10))
    assert yaml.safe_load(worlds.spec_of_readme()) == drafted


def test_tables_of_keys_and_options_are_those_of_the_code():
    for name, path in reference.FILES.items():
        text = path.read_text()
        assert reference.rendered(name, text) == text, "run: python -m docs.reference"


def _block(kind: str, containing: str) -> str:
    [found] = [text for language, text in BLOCKS if language == kind and containing in text]
    return found


def _few_steps(model, optimizer, *_):
    train(model, optimizer, steps=2)


@pytest.fixture
def published(place):
    """The README's output, and a model that holds it."""
    ckptsurg.rewrite("spec.yaml", "base.safetensors", "out")
    model = resnet18(10)
    model.load_state_dict(load_file("out/model.safetensors"))
    return model


def test_every_python_block_is_run_by_a_test():
    sources = [Path(__file__), Path(__file__).parent / "keras" / "test_docs.py"]
    source = "".join(path.read_text() for path in sources)
    blocks = [text for kind, text in BLOCKS if kind == "python" and not re.match(r"# \w+\.py\n", text)]
    fragments = re.findall(r'_block\("python", "([^"]+)"\)', source)
    assert {sum(fragment in block for fragment in fragments) for block in blocks} == {1}
    scripts = {text.split()[1] for kind, text in BLOCKS if kind == "python" and text not in blocks}
    assert all(f"$ python {name}\n" in README for name in scripts)


def test_no_integration_takes_more_than_eight_lines():
    section = INTEGRATIONS[INTEGRATIONS.index("## In a framework") : INTEGRATIONS.index("## Buffers")]
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        assert len([line for line in block.splitlines() if line.strip()]) <= 8


def test_the_block_for_plain_pytorch_runs(place):
    exec(_block("python", "import safetensors.torch"), {"model": resnet18(10), "train": _few_steps})


def test_the_blocks_for_a_live_model_run(published):
    scope = {"model": published, "ckptsurg": ckptsurg, "torch": torch}
    exec(_block("python", "phase1.freeze.json"), scope)
    assert ckptsurg.load_manifest("phase1.freeze.json") == scope["manifest"]
    exec(_block("python", "frozen.release()"), scope)
    _few_steps(published, scope["optimizer"])
    report = scope["frozen"].verify(expect_trained=True)
    assert report.ok and len(scope["manifest"].frozen) < 122


def test_the_block_for_an_archive_runs(published):
    state = {f"model.{name}": tensor for name, tensor in published.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, "last.ckpt")
    exec(_block("python", "last.ckpt"), {"manifest": "out", "torch": torch, "ckptsurg": ckptsurg})


def test_the_block_for_tests_runs(published, frozen_weights):
    def train_one_step(model):
        model.train()
        model(torch.rand(2, 3, 32, 32)).sum().backward()
        torch.optim.SGD(model.fc.parameters(), lr=0.1).step()

    scope = {"model": published, "train_one_step": train_one_step}
    exec(_block("python", "def test_the_backbone_stands_still"), scope)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"bn1\.running_mean +changed +64 .* batchnorm_stats"):
        scope["test_the_backbone_stands_still"](frozen_weights)
    published.eval()
    published.train = lambda mode=True: published
    scope["test_the_backbone_stands_still"](frozen_weights)


def test_the_block_for_trainer_runs(tmp_path, monkeypatch):
    from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

    monkeypatch.chdir(tmp_path)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10)).save_pretrained("base")
    ckptsurg.rewrite({"version": 1, "train": "classifier"}, "base", "out")
    x, y = digits(32, 24)
    data = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "save_steps": 3, "use_cpu": True}
    args = TrainingArguments("runs", **options, report_to="none", disable_tqdm=True)
    exec(_block("python", "Trainer(model, args"), {"args": args, "data": data, "ckptsurg": ckptsurg})


class Lit:
    """Made when it is needed: lightning takes seconds to import."""

    def __new__(cls, model):
        import lightning

        class Module(lightning.LightningModule):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def training_step(self, batch, _):
                return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()))

        return Module(model)


def _loader(count: int = 24):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits(32, count)), batch_size=8)


# Advice of lightning's own: a loader without worker processes, a run without a logger.
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # lightning and torch among themselves
def test_the_block_for_lightning_runs(published):
    before = published.fc.weight.detach().clone()
    exec(_block("python", "lit, loader"), {"lit": Lit(published), "loader": _loader()})
    assert (published.fc.weight != before).any()


def test_the_block_for_accelerate_runs(published):
    from accelerate import Accelerator

    scope = {"model": published, "accelerator": Accelerator(cpu=True), "loader": _loader(), "train": _few_steps}
    exec(_block("python", "accelerator.prepare"), {**scope, "torch": torch, "ckptsurg": ckptsurg})


def test_the_block_for_fsdp_runs(tmp_path, monkeypatch):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    monkeypatch.chdir(tmp_path)

    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
            self.fc = torch.nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(self.blocks(x))

    model = Blocks()
    save_file(model.state_dict(), "model.safetensors")
    ckptsurg.rewrite({"version": 1, "train": "fc"}, "model.safetensors", "out")

    def step(model, optimizer):
        model(torch.ones(3, 5)).sum().backward()
        optimizer.step()

    init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        scope = {"model": model, "fully_shard": fully_shard, "train": step, "torch": torch, "ckptsurg": ckptsurg}
        exec(_block("python", "fully_shard(model)"), scope)
    finally:
        destroy_process_group()


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A folder with a small Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (tmp_path / "specs").symlink_to(ROOT / "specs")
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).save_pretrained("llama")


def _read_numbers(model, optimizer):
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()


def test_the_block_for_a_model_folder_runs(llama):
    from transformers import AutoModelForCausalLM

    scope = {"ckptsurg": ckptsurg, "torch": torch, "train": _read_numbers, "AutoModelForCausalLM": AutoModelForCausalLM}
    exec(_block("python", "llama-last-two-blocks"), scope)


@pytest.mark.filterwarnings("ignore:left as they are:UserWarning")  # the block says that it warns of the adapter
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft and transformers among themselves
def test_the_block_for_peft_runs(llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ckptsurg.rewrite({"version": 1, "freeze": "**"}, "llama", "llama-out")
    scope = {"LoraConfig": LoraConfig, "get_peft_model": get_peft_model, "AutoModelForCausalLM": AutoModelForCausalLM}
    exec(_block("python", "get_peft_model"), {**scope, "ckptsurg": ckptsurg, "torch": torch, "train": _read_numbers})


def test_the_manifest_shown_is_that_of_the_file_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = documents.blocks(TEXTS["docs/manifest.md"])
    [spec] = [text for kind, text in blocks if kind == "yaml"]
    table, header, root_lines, frozen_lines = [text for kind, text in blocks if kind == "text"]
    [shown] = [json.loads(text) for kind, text in blocks if kind == "json"]
    rows = re.findall(r"^\S+ +\S+ +\[.*?\] +((?:[0-9a-f]+ ?)+)$", table, re.MULTILINE)
    raw = header.strip().encode() + b" " * 7
    Path("base.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes.fromhex("".join(rows)))
    Path("spec.yaml").write_text(spec)
    made = ckptsurg.make_manifest("spec.yaml", "base.safetensors", digest="sha256")
    assert json.loads(made.to_bytes()) == shown
    for key, lines in (("root", root_lines), ("frozen_root", frozen_lines)):
        assert shown[key] == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def test_causes_are_shown_as_they_are():
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", INTEGRATIONS[INTEGRATIONS.index("| cause |") :], re.MULTILINE))
    assert {code: cause.explanation for code, cause in CAUSES.items()}.items() <= shown.items()
    assert explained("batchnorm_stats") in README


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


def test_every_yaml_block_is_a_spec():
    for kind, text in BLOCKS:
        if kind == "yaml" and "# typo.yaml" not in text:
            ckptsurg.Spec.model_validate_json(json.dumps(yaml.safe_load(text)))


def test_every_command_is_in_the_readme_and_every_option_in_the_docs():
    assert isinstance(cli, click.Group)
    table = README[README.index("## Commands") : README.index("## What is promised")]
    assert sorted(re.findall(r"^\| `ckptsurg (\w+)", table, re.MULTILINE)) == sorted(cli.commands)
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", COMMANDS, re.DOTALL | re.MULTILINE))
    for name, command in cli.commands.items():
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert command.help and all(option.help for option in options), name
        for option in options:
            if option.name != "help":
                assert f"`{max(option.opts, key=len)}" in sections[name], (name, option.name)


def test_documents_lead_to_what_is_there():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            assert (ROOT / name).parent.joinpath(target).exists(), (name, target)
    for name in TEXTS:
        assert name == "README.md" or f"({name})" in README, name
    for spec in re.findall(r"`(?:specs/)?([\w-]+\.yaml)`", TEXTS["docs/recipes.md"]):
        assert (ROOT / "specs" / spec).exists(), spec
    listed = set(re.findall(r"([\w-]+\.yaml)`", TEXTS["docs/recipes.md"]))
    assert {path.name for path in (ROOT / "specs").glob("*.yaml")} <= listed


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 250


def test_the_two_commands_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"$ make {target}" in README and re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
