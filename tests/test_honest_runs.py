"""Training that leaves frozen weights alone raises no alarm, whatever the architecture and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import ckptsurg
from tests import architectures

from .drifting import (
    Router,
    Words,
    moved,
    state,
    tiny_llama,
)

pytestmark = [
    # torch's older reparametrisations and its own quantisation: what is tested is that these are recognised.
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    # peft asks transformers for an attribute that has another name by now.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# --- Honest runs ------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A body, and a head over what it makes of the input, averaged over positions."""

    def __init__(self, body: nn.Module, width: int, pick: Callable[[Any], torch.Tensor] = lambda out: out) -> None:
        super().__init__()
        self.body, self.pick, self.fc = body, pick, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.pick(self.body(x))
        return self.fc(hidden.flatten(2).mean(2) if hidden.dim() > 2 else hidden)


class Sentence(nn.Module):
    """The logits of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


TINY = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape)


def words(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, 24, shape)


def convnet() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    return Pooled(nn.Sequential(*layers), 8)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return Pooled(nn.TransformerEncoder(layer, 2), 8, lambda out: out.transpose(1, 2))


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Pooled(nn.Sequential(norm(nn.Linear(6, 12)), nn.ReLU(), norm(nn.Linear(12, 12))), 12)


def mixtral() -> nn.Module:
    return Sentence(MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4)))


HEAD = ["**", "!fc"]
LM_HEAD = ["**", "!model.lm_head"]
CLASSIFIER = ["**", "!model.classifier"]

#: A model, what it is given, what is frozen.
RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], Any]] = {
    "convolutions with BatchNorm": (convnet, floats(4, 3, 8, 8), HEAD),
    "BatchNorm that trains": (convnet, floats(4, 3, 8, 8), ["body.{0,1}"]),
    "ResNet18": (lambda: architectures.resnet18(5), floats(2, 3, 32, 32), HEAD),
    "Llama": (lambda: Sentence(tiny_llama()), words(2, 6), LM_HEAD),
    "Llama in bfloat16": (lambda: Sentence(tiny_llama().bfloat16()), words(2, 6), ["**", "!model.model.layers[-1:]"]),
    "Llama, tied, both frozen": (
        lambda: Sentence(tiny_llama(tie_word_embeddings=True)),
        words(2, 6),
        ["model.model.embed_tokens", "model.lm_head"],
    ),
    "BERT": (lambda: Sentence(BertForSequenceClassification(BertConfig(**TINY))), words(2, 6), CLASSIFIER),
    "GPT-2": (
        lambda: Sentence(GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2))),
        words(2, 6),
        ["model.transformer.h.0"],
    ),
    "ViT": (
        lambda: Sentence(ViTForImageClassification(ViTConfig(**TINY, image_size=16, patch_size=8))),
        floats(2, 3, 16, 16),
        CLASSIFIER,
    ),
    "Mixtral with fused experts": (mixtral, words(2, 6), LM_HEAD),
    "LSTM": (
        lambda: Pooled(nn.LSTM(6, 8, 2, batch_first=True, dropout=0.1), 8, lambda o: o[0][:, -1]),
        floats(4, 5, 6),
        HEAD,
    ),
    "GRU, one layer of two": (
        lambda: Pooled(nn.GRU(6, 8, 2, batch_first=True), 8, lambda o: o[0][:, -1]), floats(4, 5, 6), "body.*_l0",
    ),
    "encoder of a transformer": (encoder, floats(2, 5, 8), HEAD),
    "bag of embeddings": (lambda: Pooled(nn.EmbeddingBag(24, 8), 8), words(4, 5), HEAD),
    "rows of an embedding": (Words, words(4, 5), ["norm", {"match": "embed.weight", "rows": "[:16]"}]),
    "tied embeddings": (lambda: Words(tie=True), words(4, 5), ["embed", "lm_head"]),
    "GroupNorm": (lambda: Pooled(nn.Sequential(nn.Conv1d(6, 8, 3), nn.GroupNorm(2, 8)), 8), floats(4, 6, 9), HEAD),
    "InstanceNorm": (
        lambda: Pooled(
            nn.Sequential(nn.Conv1d(6, 8, 3), nn.InstanceNorm1d(8, affine=True, track_running_stats=True)), 8
        ),
        floats(4, 6, 9),
        HEAD,
    ),
    "spectral_norm": (normed(parametrizations.spectral_norm), floats(8, 6), HEAD),
    "older spectral_norm": (normed(nn.utils.spectral_norm), floats(8, 6), HEAD),
    "weight_norm": (normed(parametrizations.weight_norm), floats(8, 6), HEAD),
    "older weight_norm": (normed(nn.utils.weight_norm), floats(8, 6), HEAD),
    "dropout": (
        lambda: Pooled(nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.Linear(12, 12)), 12), floats(8, 6), HEAD,
    ),
    "a router": (lambda: Pooled(nn.Sequential(Router()), 4), floats(8, 6), HEAD),
}  # fmt: skip

HONEST_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizers", HONEST_OPTIMIZERS)
@pytest.mark.parametrize("name", RUNS)
def test_an_honest_run_raises_no_alarm(name, optimizers):
    build, batch, freeze = RUNS[name]
    model = build()
    before = state(model)
    manifest = ckptsurg.make_manifest(freeze, model)
    frozen = ckptsurg.freeze(model, manifest)
    # Two get all parameters, and leave alone what has no gradient.
    everything = optimizers in ("SGD", "fused")
    optimizer = HONEST_OPTIMIZERS[optimizers](model.parameters() if everything else frozen.trainable_parameters())
    with ckptsurg.watch(model, manifest=manifest) as watch, frozen.guard(optimizer, every=1) as guard:
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            model(batch()).float().pow(2).mean().backward()
            nn.utils.clip_grad_norm_(frozen.trainable_parameters(), 1.0)
            optimizer.step()
    assert guard.steps == 3 and watch.report is not None and watch.report.ok and not watch.report.drifted
    assert moved(before, state(model)), "nothing trained"
