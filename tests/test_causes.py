"""Why frozen weights moved: every cause is provoked by the real thing, and found under its code and no other.

Which tensors moved is told here by their bytes, so that each scenario states the whole map from tensors to causes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import ckptsurg
from ckptsurg.causes import CAUSES
from tests import architectures

pytestmark = [
    # torch's older reparametrisations and its own quantisation: what is tested is that these are recognised.
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    # peft asks transformers for an attribute that has another name by now.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CODES = [
    "zero_grad_not_none", "weight_decay", "late_freeze", "stale_optimizer", "optimizer_ignores_none", "never_frozen",
    "reenabled", "tied", "reparametrised", "batchnorm_stats", "spectral_norm", "embedding_max_norm", "observer",
    "router_bias", "merge_roundtrip", "ema_rounding", "dtype_only", "sign_of_zero", "nan_payload", "not_saved",
]  # fmt: skip

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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


# --- The codes --------------------------------------------------------------------------------------


def test_the_codes_each_with_one_sentence_of_explanation_and_one_of_remedy():
    assert list(CAUSES) == CODES
    for cause in CAUSES.values():
        for sentence in (cause.explanation, cause.remedy):
            assert len(sentence) > 20 and not sentence.endswith(".") and ". " not in sentence
    assert len({cause.explanation for cause in CAUSES.values()}) == len(CODES)


# --- Optimizers -------------------------------------------------------------------------------------


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_that_are_not_none(name):
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, count=2)
    optimizer.zero_grad(set_to_none=False)
    model.body.requires_grad_(False)
    before = state(model)
    found = watched(model, NOT_FC, lambda: steps(model, optimizer, none=False))
    assert found == all_are("zero_grad_not_none", moved(before, state(model), "body"))
    assert len(found) == 6


def test_zero_gradients_are_refused_before_the_step():
    model = Net()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="before step 1") as raised, frozen.guard(optimizer):
        backward(model)
        model.body[2].weight.grad = torch.zeros(12, 12)
        optimizer.step()
    assert raised.value.causes == {"body.2.weight": "zero_grad_not_none"}
    assert frozen.verify().ok


def test_frozen_between_backward_and_step():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = state(model)

    def train() -> None:
        backward(model)
        model.body.requires_grad_(False)
        optimizer.step()
        steps(model, optimizer, none=False)  # momentum goes on, and is not what began it

    assert watched(model, NOT_FC, train) == all_are("late_freeze", moved(before, state(model), "body"))


def test_a_late_freeze_is_refused_before_the_step():
    model = Net()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as raised, frozen.guard(optimizer):
        model.body[0].requires_grad_(True)
        backward(model)
        model.body[0].requires_grad_(False)
        optimizer.step()
    assert raised.value.causes == {"body.0.weight": "late_freeze", "body.0.bias": "late_freeze"}


def _set_on_the_module(model: Net) -> None:
    model.body.requires_grad = False  # an attribute that nobody reads


def _typo(model: Net) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("bdoy."):
            parameter.requires_grad = False


def _part_of_it(model: Net) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("body.") and name.endswith(".weight"):
            parameter.requires_grad = False


@pytest.mark.parametrize(("freeze", "count"), [(_set_on_the_module, 6), (_typo, 6), (_part_of_it, 3)])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_what_was_never_frozen(freeze, count, name):
    model = Net()
    freeze(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = state(model)
    found = watched(model, NOT_FC, lambda: steps(model, optimizer))
    assert found == all_are("never_frozen", moved(before, state(model), "body"))
    assert len(found) == count


def test_gradients_that_come_within_the_step():
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    before = state(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(8, 6)).pow(2).mean()
        loss.backward()
        return loss

    found = watched(model, NOT_FC, lambda: optimizer.step(closure))
    assert found == all_are("never_frozen", moved(before, state(model), "body"))


def test_what_was_thawed_again():
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = state(model)

    def train() -> None:
        steps(model, optimizer)
        model.body[2].requires_grad_(True)
        steps(model, optimizer)

    assert watched(model, NOT_FC, train) == {"body.2.weight": "reenabled", "body.2.bias": "reenabled"}
    assert moved(before, state(model), "body") == {"body.2.weight", "body.2.bias"}


def test_what_is_thawed_again_is_refused_before_the_step():
    model = Net()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="before step 3") as raised, frozen.guard(optimizer):
        steps(model, optimizer, count=2)
        model.requires_grad_(True)
        steps(model, optimizer)
    assert raised.value.causes == all_are("reenabled", {name for name in state(model) if name.startswith("body")})
    assert frozen.verify().ok


def test_a_new_head_that_the_optimizer_does_not_have():
    model = Net()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters())
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as raised, frozen.guard(optimizer):
        model.fc = nn.Linear(12, 5)
        steps(model, optimizer)
    assert raised.value.causes == {"fc.weight": "stale_optimizer", "fc.bias": "stale_optimizer"}


def test_loading_by_assignment_leaves_the_optimizer_with_the_old():
    model = Net()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters())
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as raised, frozen.guard(optimizer):
        steps(model, optimizer)
        model.load_state_dict(state(model), assign=True)
        steps(model, optimizer)
    assert raised.value.causes == {"fc.weight": "stale_optimizer", "fc.bias": "stale_optimizer"}
    assert frozen.verify().ok


def test_a_watch_names_a_stale_optimizer_where_frozen_weights_were_replaced():
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    other = state(Net())
    before = state(model)

    def train() -> None:
        steps(model, optimizer)
        model.load_state_dict(other, assign=True)
        steps(model, optimizer)

    assert watched(model, NOT_FC, train) == all_are("stale_optimizer", moved(before, state(model), "body"))


class DecaysAll(torch.optim.Optimizer):
    """Decays whatever it has, as several optimizers from outside torch do."""

    def __init__(self, parameters: Any, lr: float = 0.1, decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


def test_an_optimizer_that_decays_without_a_gradient():
    model = Net()
    model.body.requires_grad_(False)
    optimizer = DecaysAll(model.parameters())
    before = state(model)
    found = watched(model, NOT_FC, lambda: steps(model, optimizer))
    assert found == all_are("optimizer_ignores_none", moved(before, state(model), "body"))
    assert "body.1.weight" in found and "body.1.bias" not in found  # zeros shrink to zeros


def test_an_optimizer_that_decays_without_a_gradient_is_caught_at_its_first_step():
    model = Net()
    before = state(model)
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = DecaysAll(model.parameters())
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="after step 1") as raised, frozen.guard(optimizer):
        steps(model, optimizer)
    assert raised.value.causes == all_are("optimizer_ignores_none", moved(before, state(model), "body"))


# --- Weight decay -----------------------------------------------------------------------------------


class Unused(Net):
    """A net whose body takes part in the loss, but for nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.repeat(1, 2)) + 0 * self.body(x).sum()


def test_decay_of_parameters_without_influence():
    model = Unused()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    before = state(model)
    assert watched(model, NOT_FC, lambda: steps(model, optimizer)) == all_are(
        "weight_decay", moved(before, state(model), "body")
    )


def test_decay_of_rows_whose_gradient_is_masked():
    model = Words()
    model.embed.weight.register_hook(lambda gradient: gradient * (torch.arange(24) >= 16)[:, None])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    rows = [{"match": "embed.weight", "rows": "[:16]"}]
    assert watched(model, rows, lambda: steps(model, optimizer)) == {"embed.weight": "weight_decay"}


def test_momentum_of_rows_whose_gradient_is_masked_is_not_decay():
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    steps(model, optimizer)
    model.embed.weight.register_hook(lambda gradient: gradient * (torch.arange(24) >= 16)[:, None])
    rows = [{"match": "embed.weight", "rows": "[:16]"}]
    assert watched(model, rows, lambda: steps(model, optimizer)) == {"embed.weight": "zero_grad_not_none"}


def test_rows_that_nobody_masked():
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = [{"match": "embed.weight", "rows": "[:16]"}]
    assert watched(model, rows, lambda: steps(model, optimizer)) == {"embed.weight": "never_frozen"}


def test_decay_of_rows_without_a_gradient_is_told_from_files(tmp_path):
    model = Words()
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    steps(model, optimizer, count=20)  # the first four words never occur
    rows = [{"match": "embed.weight", "rows": "[:4]"}]
    assert offline(tmp_path, before, state(model), rows) == {"embed.weight": "weight_decay"}


DECAYS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "as transformers fine-tunes": lambda p: torch.optim.AdamW(p, lr=5e-5, weight_decay=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-2),
    "nadamw": lambda p: torch.optim.NAdam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("count", [1, 10, 300])
@pytest.mark.parametrize("name", DECAYS)
def test_decay_is_told_from_files_by_its_one_ratio(tmp_path, name, count):
    model = Net()
    before = state(model)
    optimizer = DECAYS[name](model.parameters())
    model.requires_grad_(True)
    for parameter in model.body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(count):
        optimizer.step()
    after = state(model)
    assert offline(tmp_path, before, after, NOT_FC) == all_are("weight_decay", moved(before, after, "body"))


@pytest.mark.parametrize(("rate", "count"), [(0.01, 1), (0.01, 30), (0.1, 1)])
def test_decay_in_bfloat16(tmp_path, rate, count):
    model = Net().bfloat16()
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1)
    for parameter in model.body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(count):
        optimizer.step()
    after = state(model)
    assert offline(tmp_path, before, after, NOT_FC) == all_are("weight_decay", moved(before, after, "body"))


def test_decay_of_float32_weights_that_are_saved_in_bfloat16(tmp_path):
    before = state(Net().bfloat16())
    model = Net()
    model.load_state_dict(before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for parameter in model.body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(50):
        optimizer.step()
    after = state(model.bfloat16())
    assert offline(tmp_path, before, after, NOT_FC) == all_are("weight_decay", moved(before, after, "body"))


@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize("rate", [5e-6, 8e-6])
def test_decay_of_less_than_an_ulp_a_step_is_no_moving_average(tmp_path, rate, count):
    model = Net(nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 12)))
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for parameter in model.body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(count):
        optimizer.step()
    found = offline(tmp_path, before, state(model), NOT_FC)
    assert found.keys() == moved(before, state(model), "body") and len(found) == 4
    assert set(found.values()) <= {
        None,
        "weight_decay",
    }  # where few units in the last place are left, it may be unknown


# --- Tensors that are one, or under other names -----------------------------------------------------


def _thaw_the_head(model: Words) -> None:
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)  # and with it the embedding


def _freeze_nothing(model: Words) -> None:
    pass


@pytest.mark.parametrize("freeze", [_thaw_the_head, _freeze_nothing])
def test_an_embedding_that_is_tied_to_a_trainable_head(tmp_path, freeze):
    model = Words(tie=True)
    freeze(model)
    model.norm.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = state(model)
    found = watched(model, ["**", "!lm_head"], lambda: steps(model, optimizer))
    assert found == {"embed.weight": "tied"}
    for baseline in (True, False):
        assert offline(tmp_path, before, state(model), ["**", "!lm_head"], baseline=baseline) == found
    with pytest.raises(ckptsurg.FreezeError, match=r'"embed\.weight" .* shares its storage with "lm_head\.weight"'):
        ckptsurg.freeze(model, ckptsurg.make_manifest(["**", "!lm_head"], model))


def test_parameters_over_one_storage_are_tied():
    model = Words()
    model.lm_head.weight = nn.Parameter(model.embed.weight.data)
    model.embed.requires_grad_(False)
    model.norm.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    assert watched(model, ["**", "!lm_head"], lambda: steps(model, optimizer)) == {"embed.weight": "tied"}


def test_equal_weights_that_part_were_not_tied(tmp_path):
    model = Words()
    model.lm_head.load_state_dict({"weight": model.embed.weight.detach()})
    before = state(model)
    steps(model, torch.optim.Adam(model.parameters(), lr=0.01))
    found = offline(tmp_path, before, state(model), ["**", "!lm_head"])
    assert found == all_are(None, ["embed.weight", "norm.weight", "norm.bias"])


def _pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.3)


REPARAMETRISATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "older weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "older spectral_norm": nn.utils.spectral_norm,
    "pruning": _pruned,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", REPARAMETRISATIONS)
def test_a_reparametrised_weight_has_other_names(tmp_path, name):
    model = Net()
    manifest = ckptsurg.make_manifest(NOT_FC, model)
    before = state(model)

    def train() -> None:
        REPARAMETRISATIONS[name](model.body[2])
        model.body.requires_grad_(False)
        steps(model, torch.optim.SGD(model.fc.parameters(), lr=0.1))

    assert watched(model, NOT_FC, train) == {"body.2.weight": "reparametrised"}
    for baseline in (True, False):
        found = offline(tmp_path, before, state(model), NOT_FC, baseline=baseline)
        assert found == {"body.2.weight": "reparametrised"}
    with pytest.raises(ckptsurg.FreezeError, match=r'"body\.2\.weight" is not in the model: it is reparametrised'):
        ckptsurg.freeze(model, manifest)


def test_pruning_that_was_made_permanent_has_no_cause(tmp_path):
    model = Net()
    before = state(model)
    prune.l1_unstructured(model.body[2], "weight", amount=0.3)
    prune.remove(model.body[2], "weight")
    assert offline(tmp_path, before, state(model), NOT_FC) == {"body.2.weight": None}


# --- Buffers that the forward pass writes to --------------------------------------------------------


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (8, 6), {"running_mean", "running_var", "num_batches_tracked"}),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (2, 6, 4, 4), {"running_mean", "running_var", "num_batches_tracked"}),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (2, 6, 2, 2, 2), {"running_mean", "running_var", "num_batches_tracked"}),
    "average": (
        lambda: nn.BatchNorm1d(6, momentum=None), (8, 6), {"running_mean", "running_var", "num_batches_tracked"},
    ),
    "momentum 0": (lambda: nn.BatchNorm1d(6, momentum=0.0), (8, 6), {"num_batches_tracked"}),
    "InstanceNorm1d": (
        lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (2, 6, 5), {"running_mean", "running_var"},
    ),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(6, track_running_stats=True), (2, 6, 4, 4), {"running_mean", "running_var"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_of_frozen_norms(tmp_path, name):
    norm, shape, leaves = NORMS[name]
    model = Net(nn.Sequential(norm()), 6)
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = state(model)
    expected = all_are("batchnorm_stats", {f"body.0.{leaf}" for leaf in leaves})
    assert watched(model, NOT_FC, lambda: steps(model.train(), optimizer, *shape)) == expected
    for baseline in (True, False):
        assert offline(tmp_path, before, state(model), NOT_FC, baseline=baseline) == expected


def test_statistics_that_move_are_refused_before_the_step():
    model = Net(nn.Sequential(nn.BatchNorm1d(6)), 6)
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters())
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="before step 2") as raised, frozen.guard(optimizer):
        steps(model.train(), optimizer, count=1)
        model.body[0].training = True
        steps(model, optimizer, count=1)
    leaves = ("running_mean", "running_var", "num_batches_tracked")
    assert raised.value.causes == all_are("batchnorm_stats", [f"body.0.{leaf}" for leaf in leaves])


def test_synchronised_statistics_stand_still_in_evaluation_mode():
    model = Net(nn.Sequential(nn.SyncBatchNorm(6)), 6).eval()
    model.body.requires_grad_(False)
    with ckptsurg.watch(model, freeze=NOT_FC):
        steps(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters())
    with frozen.guard(optimizer):
        steps(model.train(), optimizer)


def test_statistics_and_weights_that_moved_have_a_cause_each(tmp_path):
    model = Net(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state(model)
    found = watched(model, NOT_FC, lambda: steps(model, optimizer))
    gone = moved(before, state(model), "body")
    buffers = {name for name in gone if "running" in name or "tracked" in name}
    assert found == all_are("batchnorm_stats", buffers) | all_are("never_frozen", gone - buffers)
    assert offline(tmp_path, before, state(model), NOT_FC) == all_are("batchnorm_stats", buffers) | all_are(
        None, gone - buffers
    )


def test_statistics_that_are_reset_by_hand_were_not_moved_by_training():
    model = Net(nn.Sequential(nn.BatchNorm1d(6)), 6)
    steps(model, torch.optim.SGD(model.fc.parameters(), lr=0.1))
    model.eval().body.requires_grad_(False)
    before = state(model)
    found = watched(model, NOT_FC, lambda: model.body[0].reset_running_stats())
    assert found == all_are(None, moved(before, state(model)))


@pytest.mark.parametrize(
    ("spectral_norm", "vectors"),
    [
        (parametrizations.spectral_norm, {"parametrizations.weight.0._u", "parametrizations.weight.0._v"}),
        (nn.utils.spectral_norm, {"weight_u", "weight_v"}),
    ],
)
def test_vectors_of_spectral_norm(tmp_path, spectral_norm, vectors):
    model = Net(nn.Sequential(spectral_norm(nn.Linear(6, 12))))
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = state(model)
    expected = all_are("spectral_norm", {f"body.0.{leaf}" for leaf in vectors})
    assert watched(model, NOT_FC, lambda: steps(model.train(), optimizer)) == expected
    for baseline in (True, False):
        assert offline(tmp_path, before, state(model), NOT_FC, baseline=baseline) == expected


class Bag(Words):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(24, 8, **options)


@pytest.mark.parametrize("kind", [Words, Bag])
def test_an_embedding_that_shrinks_what_it_looks_up(kind):
    model = kind(max_norm=1.0)
    model.embed.requires_grad_(False)
    manifest = ckptsurg.make_manifest(["embed"], model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    assert watched(model, "embed", lambda: steps(model, optimizer)) == {"embed.weight": "embedding_max_norm"}
    longer = kind(max_norm=1.0)
    manifest = ckptsurg.make_manifest(["embed"], longer)
    with pytest.raises(ckptsurg.FreezeError, match=r'"embed\.weight" has rows longer than the max_norm'):
        ckptsurg.freeze(longer, manifest)


@pytest.mark.parametrize("kind", [Words, Bag])
def test_an_embedding_whose_rows_are_short_enough_can_be_frozen(kind):
    model = kind(max_norm=1.0)
    for _ in range(2):
        model.embed(torch.arange(24)[None])
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(["embed"], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.01)
    with frozen.guard(optimizer):
        steps(model, optimizer)


def test_an_embedding_with_short_rows_was_not_moved_by_its_max_norm():
    model = Words(max_norm=1e6)
    model.embed.requires_grad_(False)
    assert watched(model, "embed", lambda: model.embed.weight.data.add_(0.1)) == {"embed.weight": None}


def _fake_quantize() -> nn.Module:
    return quantization.FakeQuantize.with_args(observer=quantization.MovingAverageMinMaxObserver)()


@pytest.mark.parametrize("observer", [quantization.MinMaxObserver, quantization.HistogramObserver, _fake_quantize])
def test_observers_of_quantisation(tmp_path, observer):
    model = Net(nn.Sequential(nn.Linear(6, 12), observer()))
    model.body.requires_grad_(False)
    model(torch.randn(8, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = state(model)
    found = watched(model, NOT_FC, lambda: [model(10 * torch.randn(8, 6)), steps(model, optimizer)])
    assert found == all_are("observer", moved(before, state(model), "body"))
    for baseline in (True, False):
        assert offline(tmp_path, before, state(model), NOT_FC, baseline=baseline) == found
    with pytest.raises(ckptsurg.FreezeError, match=r'"body\.1\..*" is written by a quantisation observer'):
        ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))


def test_observers_that_are_turned_off_can_be_frozen():
    model = Net(nn.Sequential(nn.Linear(6, 12), _fake_quantize()))
    model(torch.randn(8, 6))
    model.apply(quantization.disable_observer)
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(NOT_FC, model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.01)
    with frozen.guard(optimizer):
        steps(model.train(), optimizer)


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


def test_load_balancing_of_a_router(tmp_path):
    model = Net(nn.Sequential(Router()), 4)
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = state(model)

    def train() -> None:
        for _ in range(5):
            steps(model, optimizer, count=1)
            model.body[0].balance()

    expected = {"body.0.e_score_correction_bias": "router_bias"}
    assert watched(model, NOT_FC, train) == expected
    for baseline in (True, False):
        assert offline(tmp_path, before, state(model), NOT_FC, baseline=baseline) == expected


# --- What saving does -------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float32, 8), (torch.float32, 256), (torch.bfloat16, 16)])
def test_an_adapter_that_was_merged_and_unmerged(tmp_path, dtype, alpha):
    model = tiny_llama().to(dtype)
    before = state(model)
    targets = ["q_proj", "v_proj", "up_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=alpha, target_modules=targets))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)
    language_steps(adapted, optimizer, 3)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    live = by_name(ckptsurg.verify(ckptsurg.make_manifest("**", before), adapted, baseline=before))
    after = state(adapted.unload())
    expected = all_are("merge_roundtrip", moved(before, after))
    assert all(name.split(".")[-2] in targets for name in expected)
    assert live == expected
    assert offline(tmp_path, before, after, "**") == expected


@pytest.mark.parametrize("alpha", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_was_merged_for_good_is_no_rounding(tmp_path, dtype, alpha):
    model = tiny_llama().to(dtype)
    before = state(model)
    lora = LoraConfig(r=8, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    after = state(get_peft_model(model, lora).merge_and_unload())
    assert offline(tmp_path, before, after, "**") == all_are(None, moved(before, after))


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [
        (torch.float32, 0.9),
        (torch.float32, 0.99),
        (torch.float32, 0.999),
        (torch.float32, 0.9999),
        (torch.bfloat16, 0.9),  # with larger ones nothing moves
    ],
)
@pytest.mark.parametrize("build", [Net, tiny_llama])
def test_a_moving_average_that_is_saved_in_place_of_the_model(tmp_path, build, dtype, decay):
    model = build().to(dtype)
    before = state(model)
    average = state(model)
    for _ in range(20):
        for name, tensor in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    assert offline(tmp_path, before, average, "**") == all_are("ema_rounding", moved(before, average))


def test_the_averages_of_torch_do_not_move_what_stands_still(tmp_path):
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    before = state(model)
    for _ in range(20):
        steps(model, optimizer, count=1)
        averaged.update_parameters(model)
    assert offline(tmp_path, before, state(averaged.module), NOT_FC) == {}


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [(torch.optim.SGD, 1e-9), (torch.optim.SGD, 1e-7), (torch.optim.Adam, 1e-9), (torch.optim.Adam, 1e-7)],
)
@pytest.mark.parametrize("count", [1, 10])
def test_training_with_a_tiny_rate_is_no_rounding(tmp_path, optimizer, rate, count):
    model = Net()
    before = state(model)
    steps(model, optimizer(model.parameters(), lr=rate), count=count)
    assert offline(tmp_path, before, state(model), NOT_FC) == all_are(None, moved(before, state(model), "body"))


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [
        (torch.bfloat16, 1e-6),
        (torch.bfloat16, 1e-5),
        (torch.bfloat16, 1e-4),
        (torch.float32, 1e-10),
        (torch.float32, 1e-9),
    ],
)
@pytest.mark.parametrize("count", [1, 5])
def test_training_of_few_values_is_no_rounding_of_sums(tmp_path, dtype, rate, count):
    """In bfloat16 an update moves small values, is lost in large ones, and leaves the ones of norms alone."""
    model = tiny_llama().to(dtype)
    before = state(model)
    language_steps(model, torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0), count)
    after = state(model)
    assert offline(tmp_path, before, after, "**") == all_are(None, moved(before, after))


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("build", [Net, Words])
@pytest.mark.parametrize("count", [1, 3])
def test_ordinary_training_has_no_cause_in_files(tmp_path, name, build, count):
    """Adam moves all ones of a norm by its rate: of equal values one ratio says nothing."""
    model = build()
    before = state(model)
    steps(model, OPTIMIZERS[name](model.parameters()), count=count)
    found = offline(tmp_path, before, state(model), ["**", "!fc" if build is Net else "!lm_head"])
    heads = {"fc.weight", "fc.bias", "lm_head.weight"}
    assert found == all_are(None, moved(before, state(model)) - heads)


def test_saved_in_a_narrower_dtype(tmp_path):
    before = state(Net())
    after = state(Net().to(torch.bfloat16)) | {name: tensor.bfloat16() for name, tensor in before.items()}
    body = [name for name in before if name.startswith("body")]
    assert offline(tmp_path, before, after, NOT_FC) == all_are("dtype_only", body)
    # Without the published values there is nothing to cast.
    assert offline(tmp_path, before, after, NOT_FC, baseline=False) == all_are(None, body)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_a_wider_dtype(tmp_path, dtype):
    before = state(Net().to(dtype))
    after = {name: tensor.float() for name, tensor in before.items()}
    body = [name for name in before if name.startswith("body")]
    for baseline in (True, False):
        assert offline(tmp_path, before, after, NOT_FC, baseline=baseline) == all_are("dtype_only", body)


def test_a_wider_dtype_with_other_values_is_more_than_a_dtype(tmp_path):
    before = state(Net().bfloat16())
    after = {name: tensor.float() for name, tensor in before.items()}
    after["body.0.weight"][0, 0] += 1e-6
    found = offline(tmp_path, before, after, NOT_FC)
    assert found == all_are("dtype_only", [name for name in before if name.startswith("body")]) | {
        "body.0.weight": None
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_roundtrip_through_a_narrower_dtype(tmp_path, dtype):
    model = Net()
    model.requires_grad_(False)
    before = state(model)
    found = watched(model, NOT_FC, lambda: model.to(dtype).float())
    assert found == all_are("dtype_only", moved(before, state(model), "body"))
    assert "body.1.weight" not in found  # ones are ones
    assert offline(tmp_path, before, state(model), NOT_FC) == found


def test_zeros_that_change_their_sign(tmp_path):
    model = Net()
    model.requires_grad_(False)
    model.body[0].weight[:3] = -0.0
    before = state(model)
    found = watched(model, NOT_FC, lambda: [p.data.add_(0.0) for p in model.parameters()])
    assert found == {"body.0.weight": "sign_of_zero"}
    assert offline(tmp_path, before, state(model), NOT_FC) == found
    assert offline(tmp_path, before, state(model), NOT_FC, baseline=False) == {"body.0.weight": None}


def test_nans_that_change_their_bits(tmp_path):
    model = Net()
    model.requires_grad_(False)
    model.body[0].bias.data.view(torch.int32)[2] = 0x7F800001  # a signalling NaN: arithmetic makes it a quiet one
    before = state(model)
    found = watched(model, NOT_FC, lambda: [p.data.add_(0.0) for p in model.parameters()])
    assert found == {"body.0.bias": "nan_payload"}
    assert offline(tmp_path, before, state(model), NOT_FC) == found


def test_frozen_weights_that_were_left_out_of_the_file(tmp_path):
    model = Net()
    before = state(model)
    model.body.requires_grad_(False)
    steps(model, torch.optim.SGD(model.fc.parameters(), lr=0.1))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    body = [name for name in before if name.startswith("body")]
    for baseline in (True, False):
        assert offline(tmp_path, before, trained, NOT_FC, baseline=baseline) == all_are("not_saved", body)
        some = trained | {name: before[name] for name in body[:4]}
        assert offline(tmp_path, before, some, NOT_FC, baseline=baseline) == all_are("not_saved", body[4:])


def test_a_file_of_another_model_omits_nothing(tmp_path):
    before = state(Net())
    other = {f"encoder.{name}.kernel": tensor for name, tensor in before.items()}
    assert offline(tmp_path, before, other, NOT_FC) == all_are(None, [n for n in before if n.startswith("body")])


# --- What evidence does not settle ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-8),
        (torch.float32, 1e-7),
        (torch.float32, 1e-2),
        (torch.float32, 10),
        (torch.bfloat16, 1e-4),
        (torch.bfloat16, 1e-3),
        (torch.bfloat16, 10),
    ],
)
def test_noise_on_one_weight_has_no_cause(tmp_path, dtype, size):
    model = Net().to(dtype)
    model.requires_grad_(False)
    before = state(model)

    def disturb() -> None:
        weight = model.body[2].weight
        weight.add_(size * torch.randn(weight.shape).to(dtype))

    found = watched(model, NOT_FC, disturb)
    assert found == all_are(None, moved(before, state(model)))
    assert found.keys() == {"body.2.weight"}
    assert offline(tmp_path, before, state(model), NOT_FC) == found


@pytest.mark.parametrize("element", [0, -1])
def test_one_element_in_one_weight_has_no_cause(tmp_path, element):
    before = state(Net())
    for bit in range(32):
        after = state(before)
        after["body.2.weight"].view(torch.int32).view(-1)[element] ^= -(2**31) if bit == 31 else 2**bit
        assert offline(tmp_path, before, after, NOT_FC) == {"body.2.weight": None}, bit


def test_swapped_rows_have_no_cause(tmp_path):
    before = state(Net())
    after = state(before)
    after["body.0.weight"] = before["body.0.weight"].flip(0).contiguous()
    assert offline(tmp_path, before, after, NOT_FC) == {"body.0.weight": None}


def _decayed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 0.9


def _noisy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1e-2 * torch.randn_like(tensor)


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def _unsigned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor == 0, 0.0, tensor)


@pytest.mark.parametrize(
    "mechanisms",
    # Decay with a cast before or after it is decay: whether there was a cast besides cannot be told.
    [(_decayed, _noisy), (_cast, _noisy), (_noisy, _cast), (_unsigned, _noisy)],
)
def test_two_mechanisms_on_one_tensor_have_no_one_cause(tmp_path, mechanisms):
    before = state(Net())
    before["body.2.weight"][0] = -0.0
    after = state(before)
    for mechanism in mechanisms:
        after["body.2.weight"] = mechanism(after["body.2.weight"])
    assert offline(tmp_path, before, after, NOT_FC) == {"body.2.weight": None}


@pytest.mark.parametrize("build", [Net, lambda: Net(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), 6)])
def test_another_checkpoint_altogether_has_no_cause(tmp_path, build):
    before = state(build())
    torch.manual_seed(1)
    other = build()
    steps(other, torch.optim.AdamW(other.parameters(), lr=0.01), count=10)
    after = state(other)
    for baseline in (True, False):
        found = offline(tmp_path, before, after, NOT_FC, baseline=baseline)
        assert found == all_are(None, moved(before, after, "body"))


def test_each_tensor_has_its_own_cause(tmp_path):
    model = nn.ModuleDict(
        {"cast": nn.Linear(8, 8), "decayed": nn.Linear(8, 8), "noisy": nn.Linear(8, 8), "gone": nn.Linear(8, 8),
         "zeros": nn.Linear(8, 8), "bn": nn.BatchNorm1d(8), "still": nn.Linear(8, 8), "fc": nn.Linear(8, 8)}
    )  # fmt: skip
    model["zeros"].weight.data.fill_(-0.0)
    before = state(model)
    model["bn"](torch.randn(4, 8))
    after = state(model)
    for leaf in ("weight", "bias"):
        after[f"cast.{leaf}"] = _cast(after[f"cast.{leaf}"])
        after[f"decayed.{leaf}"] = _decayed(after[f"decayed.{leaf}"])
        after[f"noisy.{leaf}"] = _noisy(after[f"noisy.{leaf}"])
        del after[f"gone.{leaf}"]
    after["zeros.weight"] += 0.0
    assert offline(tmp_path, before, after, NOT_FC) == {
        "cast.weight": "dtype_only",
        "cast.bias": "dtype_only",
        "decayed.weight": "weight_decay",
        "decayed.bias": "weight_decay",
        "noisy.weight": None,
        "noisy.bias": None,
        "gone.weight": "not_saved",
        "gone.bias": "not_saved",
        "zeros.weight": "sign_of_zero",
        "bn.running_mean": "batchnorm_stats",
        "bn.running_var": "batchnorm_stats",
        "bn.num_batches_tracked": "batchnorm_stats",
    }


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


# --- The command ------------------------------------------------------------------------------------


def test_the_command_prints_causes_under_the_table_and_has_the_codes_in_json(tmp_path):
    before = state(Net())
    after = state(before)
    after["body.0.weight"] = _decayed(after["body.0.weight"])
    after["body.2.bias"] = _cast(after["body.2.bias"])
    after["body.2.weight"] = _noisy(after["body.2.weight"])
    expected = {"body.0.weight": "weight_decay", "body.2.bias": "dtype_only", "body.2.weight": None}
    assert offline(tmp_path, before, after, NOT_FC) == expected

    def run(*options: str) -> str:
        arguments = ["verify", "published.freeze.json", "trained.safetensors", "--baseline", "published.safetensors"]
        command = [sys.executable, "-m", "ckptsurg", *arguments, *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        return done.stdout

    lines = run().splitlines()
    table = {row[0]: row for row in map(str.split, lines) if row and row[0] in expected}
    assert {name: [word for word in row if word in CODES] for name, row in table.items()} == {
        "body.0.weight": ["weight_decay"],
        "body.2.bias": ["dtype_only"],
        "body.2.weight": [],
    }
    explained = [line for line in lines if line.split(":")[0] in CODES]
    assert explained == [
        f"{code}: {CAUSES[code].explanation}; {CAUSES[code].remedy}" for code in ("dtype_only", "weight_decay")
    ]
    assert max(map(lines.index, explained)) > max(
        i for i, line in enumerate(lines) if line.split()[:1] and line.split()[0] in expected
    )
    document = json.loads(run("--json"))
    assert {one["name"]: one["cause"] for one in document["drifted"]} == expected
