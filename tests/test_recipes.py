"""Every spec in specs/ on the architecture it is for: base, rewrite or freeze, real training steps, verify."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurg

from . import architectures
from .architectures import digits, train

SPECS = Path(__file__).parent.parent / "specs"


def _spec(row: str) -> Path:
    [path] = SPECS.glob(f"{row}-*.yaml")
    return path


def _base(model: nn.Module, folder: Path) -> Path:
    """The model's weights as a file, after a step that gives its statistics values of their own."""
    model.train()
    with torch.no_grad():
        model(digits(32 if not isinstance(model, architectures.ConvModel) else 64, 8)[0])
    path = folder / "base.safetensors"
    save_file(model.state_dict(), path, {"format": "pt"})
    return path


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors whose bytes differ; an oracle of its own, over numpy."""
    return {name for name, old in before.items() if old.numpy().tobytes() != after[name].numpy().tobytes()}


def _fine_tune(make, spec: Path, folder: Path, optimize, steps: int, size: int = 32) -> set[str]:
    """The whole way; returns what moved, after checking that the report says the same."""
    torch.manual_seed(0)
    base = _base(make(1000) if make is not architectures.ConvModel else make(), folder)
    manifest = ckptsurg.rewrite(spec, base, folder / "out")
    published = load_file(folder / "out" / "model.safetensors")
    model = make(len(published["fc.bias"])) if make is not architectures.ConvModel else make()
    model.load_state_dict(published)
    frozen = ckptsurg.freeze(model, manifest)
    with frozen.guard(optimizer := optimize(frozen.trainable_parameters())):
        train(model, optimizer, steps, size=size)
    save_file(model.state_dict(), folder / "trained.safetensors")
    report = ckptsurg.verify(folder / "out" / "freeze.json", folder / "trained.safetensors", baseline=folder / "out")
    moved = _moved(published, load_file(folder / "trained.safetensors"))
    assert report.ok and report.verified == manifest.counts["frozen"]
    assert not moved & {name for name, record in manifest.tensors.items() if record.frozen}
    return moved


def _verify(*arguments: object) -> tuple[int, dict[str, str]]:
    """The exit code of the command, and the cause that it names for each tensor that drifted."""
    command = [sys.executable, "-m", "ckptsurg", "verify", "--json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, {one["name"]: one["cause"] for one in json.loads(done.stdout)["drifted"]}


def _as_tutorials_do(make, spec: Path, folder: Path, trains: tuple[str, ...]) -> set[str]:
    """requires_grad alone, in training mode, saved as tutorials save; returns what drifted, each for its statistics."""
    torch.manual_seed(0)
    base = _base(make(1000), folder)
    manifest = ckptsurg.rewrite(spec, base, folder / "out")
    published = load_file(folder / "out" / "model.safetensors")
    model = make(len(published["fc.bias"]))
    model.load_state_dict(published)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(trains)
    train(model, torch.optim.Adam(p for p in model.parameters() if p.requires_grad), 2)
    torch.save(model.state_dict(), folder / "trained.pth")
    code, causes = _verify(folder / "out" / "freeze.json", folder / "trained.pth")
    assert code == 1 and set(causes.values()) == {"batchnorm_stats"}
    live = ckptsurg.verify(manifest, model)
    assert {difference.name for difference in live.drifted} == set(causes)
    return set(causes)


def _statistics(model: nn.Module, below: tuple[str, ...] = ("",)) -> set[str]:
    return {name for name, _ in model.named_buffers() if name.startswith(below)}


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, foreach=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_t2_resnet18_new_head(tmp_path, optimizer):
    moved = _fine_tune(architectures.resnet18, _spec("t2"), tmp_path, OPTIMIZERS[optimizer], steps=20)
    assert moved == {"fc.weight", "fc.bias"}


def test_t2_as_written_moves_the_statistics(tmp_path):
    drifted = _as_tutorials_do(architectures.resnet18, _spec("t2"), tmp_path, ("fc",))
    assert drifted == _statistics(architectures.resnet18())


def test_t3_convnet_last_layer(tmp_path):
    moved = _fine_tune(architectures.ConvModel, _spec("t3"), tmp_path, OPTIMIZERS["adamw"], steps=5, size=64)
    assert moved == {"fc.weight", "fc.bias"}


def test_t3_needs_no_rewrite(tmp_path):
    base = _base(architectures.ConvModel(), tmp_path)
    manifest = ckptsurg.make_manifest(_spec("t3"), base)
    rewritten = ckptsurg.rewrite(_spec("t3"), base, tmp_path / "out")
    assert manifest.root == rewritten.root and manifest.frozen_root == rewritten.frozen_root


def test_t4_resnet_last_layer(tmp_path):
    moved = _fine_tune(architectures.resnet18, _spec("t4"), tmp_path, OPTIMIZERS["sgd"], steps=5)
    assert moved == {"fc.weight", "fc.bias"}


def test_t4_as_written_moves_the_statistics(tmp_path):
    drifted = _as_tutorials_do(architectures.resnet18, _spec("t4"), tmp_path, ("fc",))
    assert drifted == _statistics(architectures.resnet18())


def test_t5_last_block_keeps_learning(tmp_path):
    moved = _fine_tune(architectures.resnet18, _spec("t5"), tmp_path, OPTIMIZERS["adamw"], steps=5)
    everything = set(architectures.resnet18().state_dict())
    assert moved == {name for name in everything if name.startswith(("layer4.", "fc."))}


def test_t5_as_written_moves_the_other_statistics(tmp_path):
    drifted = _as_tutorials_do(architectures.resnet18, _spec("t5"), tmp_path, ("fc", "layer4"))
    statistics = _statistics(architectures.resnet18())
    assert drifted == {name for name in statistics if not name.startswith("layer4.")}


def test_t6_resnet50_ten_classes(tmp_path):
    moved = _fine_tune(architectures.resnet50, _spec("t6"), tmp_path, OPTIMIZERS["adamw"], steps=2)
    everything = set(architectures.resnet50().state_dict())
    assert moved == {name for name in everything if name.startswith(("layer4.", "fc."))}


def test_t6_as_written_moves_the_statistics(tmp_path):
    drifted = _as_tutorials_do(architectures.resnet50, _spec("t6"), tmp_path, ("layer4", "fc"))
    statistics = _statistics(architectures.resnet50())
    assert drifted == {name for name in statistics if not name.startswith("layer4.")}


def test_t7_later_rule_wins(tmp_path):
    moved = _fine_tune(architectures.resnet50, _spec("t7"), tmp_path, OPTIMIZERS["sgd"], steps=2)
    everything = set(architectures.resnet50().state_dict())
    assert moved == {name for name in everything if name.startswith(("layer3.", "layer4.", "fc."))}


def test_t7_as_written_moves_the_statistics(tmp_path):
    drifted = _as_tutorials_do(architectures.resnet50, _spec("t7"), tmp_path, ("layer3", "layer4", "fc"))
    statistics = _statistics(architectures.resnet50())
    assert drifted == {name for name in statistics if not name.startswith(("layer3.", "layer4."))}


def test_t8_fixed_feature_extractor(tmp_path):
    torch.manual_seed(0)
    base = _base(architectures.resnet50(), tmp_path)
    manifest = ckptsurg.make_manifest(_spec("t8"), base)
    extractor = architectures.resnet50()
    extractor.load_state_dict(load_file(base))
    frozen = ckptsurg.freeze(extractor, manifest)
    assert frozen.trainable_parameters() == []
    head = nn.Linear(2048, 10)
    before = head.weight.detach().clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    x, y = digits(32, 24)
    with frozen.guard(optimizer):
        for step in range(3):
            extractor.train()  # even so: nothing in it moves
            with torch.no_grad():
                features = extractor.features(x[step * 8 : step * 8 + 8])
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), y[step * 8 : step * 8 + 8]).backward()
            optimizer.step()
    assert not torch.equal(before, head.weight)
    save_file(extractor.state_dict(), tmp_path / "trained.safetensors")
    assert not _moved(load_file(base), load_file(tmp_path / "trained.safetensors"))


def test_t8_in_training_mode_moves_the_statistics(tmp_path):
    base = _base(architectures.resnet50(), tmp_path)
    manifest = ckptsurg.make_manifest(_spec("t8"), base)
    ckptsurg.write_manifest(manifest, tmp_path / "freeze.json")
    extractor = architectures.resnet50()
    extractor.load_state_dict(load_file(base))
    with torch.no_grad():
        extractor.train().features(digits(32, 8)[0])
    torch.save({"model": extractor.state_dict(), "epoch": 1}, tmp_path / "trained.pth")
    code, causes = _verify(tmp_path / "freeze.json", tmp_path / "trained.pth", "--baseline", base)
    assert code == 1
    assert causes == dict.fromkeys(_statistics(extractor), "batchnorm_stats")


# --- transformers -----------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "llama"
    # Several shards, as large models have them.
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def _load(kind, folder: Path):
    """from_pretrained, with nothing missing and nothing unexpected."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def _train_language_model(model, optimizer) -> None:
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        model.train()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def _folder_moved(manifest, before: Path, after: Path) -> set[str]:
    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    return _moved(tensors(before), tensors(after))


def test_llama_last_two_blocks(tmp_path, llama):
    from transformers import LlamaForCausalLM

    manifest = ckptsurg.rewrite(SPECS / "llama-last-two-blocks.yaml", llama, tmp_path / "out")
    model = _load(LlamaForCausalLM, tmp_path / "out")
    frozen = ckptsurg.freeze(model, manifest)
    _train_language_model(model, torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-2, weight_decay=0.1))
    model.save_pretrained(tmp_path / "trained")
    report = ckptsurg.verify(manifest, tmp_path / "trained")
    assert report.ok and report.verified == manifest.counts["frozen"]
    moved = _folder_moved(manifest, tmp_path / "out", tmp_path / "trained")
    trains = ("model.layers.4.", "model.layers.5.", "model.norm.", "lm_head.")
    assert moved == {name for name in manifest.tensors if name.startswith(trains)}


def test_llama_pruned(tmp_path, llama):
    from transformers import LlamaForCausalLM

    manifest = ckptsurg.rewrite(SPECS / "llama-pruned.yaml", llama, tmp_path / "out")
    model = _load(LlamaForCausalLM, tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    frozen = ckptsurg.freeze(model, manifest)
    _train_language_model(model, torch.optim.SGD(frozen.trainable_parameters(), lr=0.1, momentum=0.9))
    model.save_pretrained(tmp_path / "trained")
    assert ckptsurg.verify(manifest, tmp_path / "trained", exact=True).ok
    assert _folder_moved(manifest, tmp_path / "out", tmp_path / "trained") == {"lm_head.weight"}


def test_llama_middle_out(tmp_path, llama):
    from transformers import LlamaForCausalLM

    manifest = ckptsurg.rewrite(SPECS / "llama-middle-out.yaml", llama, tmp_path / "out")
    model = _load(LlamaForCausalLM, tmp_path / "out")
    old = {name: tensor for path in llama.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for new, was in ((1, 1), (2, 4), (3, 5)):
        weight = model.model.layers[new].mlp.up_proj.weight.detach()
        assert weight.numpy().tobytes() == old[f"model.layers.{was}.mlp.up_proj.weight"].numpy().tobytes()
    frozen = ckptsurg.freeze(model, manifest)
    _train_language_model(model, torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-2, weight_decay=0.1))
    model.save_pretrained(tmp_path / "trained")
    assert ckptsurg.verify(manifest, tmp_path / "trained", exact=True).ok
    assert _folder_moved(manifest, tmp_path / "out", tmp_path / "trained") == {"lm_head.weight"}


def test_llama_middle_out_last_block(tmp_path, llama):
    from transformers import LlamaForCausalLM

    manifest = ckptsurg.rewrite(SPECS / "llama-middle-out-last-block.yaml", llama, tmp_path / "out")
    model = _load(LlamaForCausalLM, tmp_path / "out")
    frozen = ckptsurg.freeze(model, manifest)
    with frozen.guard(optimizer := torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-2, weight_decay=0.1)):
        _train_language_model(model, optimizer)
    model.save_pretrained(tmp_path / "trained")
    assert ckptsurg.verify(manifest, tmp_path / "trained", exact=True).ok
    moved = _folder_moved(manifest, tmp_path / "out", tmp_path / "trained")
    assert moved == {name for name in manifest.tensors if name.startswith(("model.layers.3.", "lm_head."))}


def test_llama_old_tokens(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32064, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    manifest = ckptsurg.rewrite(SPECS / "llama-old-tokens.yaml", tmp_path / "llama", tmp_path / "out")
    model = _load(LlamaForCausalLM, tmp_path / "out")
    frozen = ckptsurg.freeze(model, manifest)
    tokens = torch.tensor([[1, 2, 31999, 32000, 32063, 3]])
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    with frozen.guard(optimizer, expect_trained=True):
        for _ in range(5):
            model.train()
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    assert ckptsurg.verify(manifest, tmp_path / "trained", expect_trained=True).verified == len(manifest.tensors)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "trained"))
    assert _moved(before, after) == {"model.embed_tokens.weight", "lm_head.weight"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = (tensors[name].numpy() for tensors in (before, after))
        assert old[:32000].tobytes() == new[:32000].tobytes()
        assert (old[32000:] != new[32000:]).any(1).sum() >= 2  # the rows of the new tokens that were there


def test_bert_new_classifier(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    manifest = ckptsurg.rewrite(SPECS / "bert-new-classifier.yaml", tmp_path / "bert", tmp_path / "out")
    model = _load(BertForSequenceClassification, tmp_path / "out")
    assert model.config.num_labels == 5 and model.classifier.weight.shape == (5, 32)
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tokens, labels = torch.randint(0, 64, (8, 12)), torch.arange(8) % 5
    with frozen.guard(optimizer):
        for _ in range(5):
            model.train()
            optimizer.zero_grad()
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    assert ckptsurg.verify(manifest, tmp_path / "trained", exact=True).ok
    moved = _folder_moved(manifest, tmp_path / "out", tmp_path / "trained")
    assert moved == {"classifier.weight", "classifier.bias"}


def test_every_spec_is_run_by_a_test():
    texts = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    starts = tuple(re.findall(r'_spec\("([^"]+)"\)', texts))
    names = {path.name for path in SPECS.glob("*.yaml")}
    assert {name for name in names if name in texts or name.startswith(starts)} == names


def test_every_row_has_a_spec_and_a_test_of_its_name():
    rows = [*(f"k{n}" for n in range(1, 7)), *(f"t{n}" for n in range(1, 9)), "x1", "n1"]
    texts = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    for row in rows:
        specs = list(SPECS.glob(f"{row}-*.yaml"))
        assert specs and all(path.read_text().startswith(f"# {row.upper()}") for path in specs)
        assert re.search(rf"^def test_{row}_", texts, re.MULTILINE)
