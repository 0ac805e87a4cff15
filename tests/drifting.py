"""Models that drift, and how a test says which of their tensors moved: by their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import ckptsurg

NOT_FC = ["**", "!fc"]

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """A body of matrices and vectors, and a head that trains."""

    def __init__(self, body: nn.Module | None = None, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12)) if body is None else body
        self.fc = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        return self.fc(hidden.flatten(2).mean(2) if hidden.dim() > 2 else hidden)


class Words(nn.Module):
    """An embedding, and a head that may be tied to it."""

    def __init__(self, tie: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8, **options)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 24, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.embed(ids)))


def backward(model: nn.Module, *shape: int) -> None:
    """A loss and its gradients; of word models, over all words but the first four."""
    if isinstance(model, Words):
        x: torch.Tensor = torch.randint(4, 24, (4, 6))
    else:
        x = torch.randn(*(shape or (8, 6)))
    model(x).pow(2).mean().backward()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *shape: int, count: int = 3, none: bool = True) -> None:
    for _ in range(count):
        optimizer.zero_grad(set_to_none=none)
        backward(model, *shape)
        optimizer.step()


def state(model: nn.Module | Mapping[str, torch.Tensor]) -> State:
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def moved(before: State, after: State, start: str = "") -> set[str]:
    """What is there and has other bytes."""
    return {
        name for name in before if name.startswith(start) and name in after and raw(before[name]) != raw(after[name])
    }


def by_name(report: ckptsurg.Report) -> dict[str, str | None]:
    return {difference.name: difference.cause for difference in report.drifted}


def watched(model: nn.Module, freeze: Any, train: Callable[[], object]) -> dict[str, str | None]:
    """Causes by name, after a watch that found frozen weights moved; no more and no fewer than have other bytes."""
    watch = ckptsurg.watch(model, freeze=freeze)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as raised, watch:
        train()
    assert watch.report is not None and not watch.report.ok
    found = by_name(watch.report)
    assert raised.value.causes == {name: code for name, code in found.items() if code is not None}
    return found


def offline(folder: Path, before: State, after: State, freeze: Any, *, baseline: bool = True) -> dict[str, str | None]:
    """Causes by name, told from files."""
    save_file(before, folder / "published.safetensors")
    save_file(after, folder / "trained.safetensors")
    manifest = ckptsurg.make_manifest(freeze, folder / "published.safetensors")
    ckptsurg.write_manifest(manifest, folder / "published.freeze.json", overwrite=True)
    report = ckptsurg.verify(
        folder / "published.freeze.json",
        folder / "trained.safetensors",
        baseline=folder / "published.safetensors" if baseline else None,
    )
    assert report.ok is not bool(report.drifted)
    return by_name(report)


def all_are(code: str | None, names: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(names, code)
    assert found, "the scenario moved nothing"
    return found


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, **options,
        )
    )  # fmt: skip


def language_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        ids = torch.randint(0, 48, (4, 8))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


class Router(nn.Module):
    """Sigmoid scores and a bias that only chooses, as DeepSeek-V3 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("e_score_correction_bias", torch.zeros(4))
        self.load = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.sigmoid(x @ self.weight.T)
        chosen = (scores + self.e_score_correction_bias).topk(2, dim=-1).indices
        self.load = torch.bincount(chosen.flatten(), minlength=4).float()
        return scores * torch.zeros_like(scores).scatter(-1, chosen, 1)

    def balance(self, speed: float = 1e-3) -> None:
        self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)
