"""What stands in the folder in which a document's commands are run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

import ckptsurg

from . import documents
from .architectures import resnet18, train

#: What README's training scripts take for data.
_DATA = """import torch
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)
images = torch.tensor(images[:48], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
images = torch.nn.functional.interpolate(images, 32).expand(-1, 3, -1, -1)
batches = [{"pixel_values": images[n : n + 16], "labels": torch.tensor(labels[n : n + 16])} for n in (0, 16, 32)]
"""


def spec_of_readme() -> str:
    """The spec that README shows."""
    [found] = [text for kind, text in documents.blocks(documents.DOCUMENTS["README.md"].read_text()) if kind == "yaml"]
    return found


def beginning(place: Path) -> None:
    """A model folder, as a newcomer has it, and data."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=1000)).save_pretrained(place / "base")
    (place / "data.py").write_text(_DATA)


def trained(place: Path) -> None:
    """A ResNet18 with a spec, and what became of its output in two loops: held, and by requires_grad alone."""
    torch.manual_seed(0)
    model = resnet18(1000)
    save_file(model.state_dict(), place / "base.safetensors", {"format": "pt"})
    spec = {"version": 1, "name": "new-head", "freeze": ["**", "!fc"]}
    spec["reinit"] = [{"match": "fc", "shape": {0: 10}, "init": "default"}]
    (place / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False, default_flow_style=None))
    manifest = ckptsurg.rewrite(place / "spec.yaml", place / "base.safetensors", place / "made")
    for name in ("trained", "usual"):
        model = resnet18(10)
        model.load_state_dict(load_file(place / "made" / "model.safetensors"))
        if name == "trained":
            parameters = ckptsurg.freeze(model, manifest).trainable_parameters()
        else:
            parameters = [parameter for key, parameter in model.named_parameters() if "fc" in key]
        train(model, torch.optim.SGD(parameters, lr=0.01), 2)
        save_file(model.state_dict(), place / f"{name}.safetensors")
    for path in (place / "made").iterdir():
        path.unlink()
    (place / "made").rmdir()


def languages(place: Path) -> None:
    """A Llama of six blocks, another with the same sizes, and a GPT-2; small ones."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for name in ("llama", "other"):
        config = LlamaConfig(**sizes, num_hidden_layers=6, num_key_value_heads=2, tie_word_embeddings=False)
        LlamaForCausalLM(config).save_pretrained(place / name)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).save_pretrained(place / "gpt2")


def _empty(place: Path) -> None:
    """For documents without commands."""


WORLDS: dict[str, Callable[[Path], None]] = dict.fromkeys(documents.DOCUMENTS, _empty) | {
    "README.md": beginning,
    "docs/commands.md": trained,
    "docs/patterns.md": trained,
    "docs/pipelines.md": trained,
    "docs/recipes.md": languages,
    "docs/spec.md": trained,
}
