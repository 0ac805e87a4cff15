"""Why frozen weights moved: every cause that training has is provoked by the real thing, and found under its code.

Each scenario states the whole map from tensors to causes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

import ckptsurg
from ckptsurg.causes import CAUSES

from .drifting import (
    NOT_FC,
    OPTIMIZERS,
    Net,
    Router,
    Words,
    all_are,
    backward,
    moved,
    offline,
    state,
    steps,
    watched,
)

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

# --- The codes --------------------------------------------------------------------------------------


def test_the_codes_each_with_one_sentence_of_explanation_and_one_of_remedy():
    assert list(CAUSES) == CODES
    for cause in CAUSES.values():
        for sentence in (cause.explanation, cause.remedy):
            assert len(sentence) > 20 and not sentence.endswith(".") and ". " not in sentence
    assert len({cause.explanation for cause in CAUSES.values()}) == len(CODES)


# --- Optimizers -------------------------------------------------------------------------------------


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
    with pytest.raises(ckptsurg.FreezeError, match=r'"embed\.weight" has, or may have, rows longer than the max_norm'):
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
