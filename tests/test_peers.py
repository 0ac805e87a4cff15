"""What the README's table says of others that freeze is what they do, and what it says of ckptsurg too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from lightning.pytorch.callbacks import BaseFinetuning
from model_signing import signing, verifying
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ckptsurg

from .architectures import digits, train

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.mid, self.fc = nn.Linear(4, 6), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.mid(self.bn(self.conv(x)).mean((2, 3)))))


STATISTICS = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
HEAD = {"fc.weight", "fc.bias"}


def decaying(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of everything, as one builds it who does not think of what is frozen."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def bits(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every tensor, by the name that it has without PEFT."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", "."): tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def moved(model: nn.Module, before: dict[str, bytes]) -> set[str]:
    after = bits(model)
    return {name for name in before if after[name] != before[name]}


@pytest.fixture
def model() -> Net:
    return Net()


@pytest.fixture
def before(model) -> dict[str, bytes]:
    return bits(model)


def test_the_table_names_the_versions_that_these_tests_are_pinned_to():
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    named = dict(re.findall(r"^\| (\w+) ([\d.]+)†", (ROOT / "README.md").read_text(), re.MULTILINE))
    packages = {"PyTorch": "torch", "model_signing": "model-signing"}
    assert named == {name: pinned[packages.get(name, name.lower())] for name in named}
    assert named.keys() == {"PyTorch", "Lightning", "PEFT", "Keras", "model_signing"}


# --- ckptsurg ----------------------------------------------------------------------------------------


def test_ckptsurg_holds_parameters_buffers_and_rows_and_checks_the_file(model, before, tmp_path):
    rows = {"match": "fc", "rows": "[:4]"}
    manifest = ckptsurg.make_manifest(["**", "!fc", rows], model)
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = decaying(model)
    with frozen.guard(optimizer):
        train(model, optimizer, 3, size=8)
    assert moved(model, before) == HEAD
    row = len(before["fc.weight"]) // 10
    for name, size in (("fc.weight", 4 * row), ("fc.bias", 16)):
        after = bits(model)[name]
        assert after[:size] == before[name][:size] and after[size:] != before[name][size:]

    save_file(model.state_dict(), tmp_path / "x.safetensors")
    assert ckptsurg.verify(manifest, tmp_path / "x.safetensors").ok
    model.bn.running_var.view(torch.int32)[2] ^= 1
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    report = ckptsurg.verify(manifest, tmp_path / "x.safetensors")
    assert [one.name for one in report.drifted] == ["bn.running_var"]
    with (
        pytest.raises(
            ckptsurg.FrozenWeightsChanged, match=r"^after step 1, 1 frozen tensor changed:\n  bn\.running_var"
        ),
        frozen.guard(optimizer),
    ):
        train(model, optimizer, 1, size=8)


def test_ckptsurg_names_what_is_nearest_to_a_name_that_matches_nothing(model):
    with pytest.raises(ckptsurg.SpecError, match=r'"cnov" matches nothing.*conv'):
        ckptsurg.make_manifest(["mid", "cnov"], model)


# --- requires_grad by hand -----------------------------------------------------------------------------


def freeze_by_hand(model: nn.Module, part: str) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad = False


def test_by_hand_parameters_stand_still_and_running_statistics_move(model, before):
    for part in ("conv", "bn", "mid"):
        freeze_by_hand(model, part)
    train(model, decaying(model), 3, size=8)
    assert moved(model, before) == STATISTICS | HEAD


@pytest.mark.parametrize(
    "optimizer",
    [decaying, lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)],
    ids=["weight decay", "momentum"],
)
@pytest.mark.parametrize("gradient", ["None", "zero"])
def test_by_hand_what_has_a_gradient_of_zero_is_moved(
    model, optimizer: Callable[[nn.Module], torch.optim.Optimizer], gradient
):
    stepping = optimizer(model)
    train(model, stepping, 2, size=8)  # and only now is the network's first part frozen
    stepping.zero_grad(set_to_none=gradient == "None")
    freeze_by_hand(model, "conv")
    before = bits(model)
    stepping.step()
    expected = {"conv.weight", "conv.bias"} if gradient == "zero" else set()
    assert moved(model, before) & {"conv.weight", "conv.bias"} == expected


@pytest.mark.filterwarnings("error")
def test_by_hand_nothing_is_said_of_a_name_that_matches_nothing(model, before, capfd):
    freeze_by_hand(model, "cnov")
    train(model, decaying(model), 3, size=8)
    assert moved(model, before) == before.keys() and capfd.readouterr() == ("", "")


# --- Lightning -----------------------------------------------------------------------------------------


class Freezing(BaseFinetuning):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.options = options

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze([pl_module.model.conv, pl_module.model.bn, pl_module.model.mid], **self.options)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing is unfrozen."""


class Classifier(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return decaying(self)


def fit(model: nn.Module, folder: Path, callback: pl.Callback) -> None:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=[callback], max_epochs=1,
        enable_checkpointing=False, **silent,
    )  # fmt: skip
    trainer.fit(Classifier(model), DataLoader(TensorDataset(*digits(8, 24)), batch_size=8))
    assert trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # and needs none
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning and torch
@pytest.mark.parametrize(
    ("options", "still_trains"),
    [({}, {"bn.weight", "bn.bias"} | STATISTICS), ({"train_bn": False}, set())],
    ids=["by default", "train_bn=False"],
)
def test_lightning_trains_a_batch_norm_unless_told_otherwise(model, before, tmp_path, options, still_trains):
    model.bn.requires_grad_(False)  # which Lightning turns on again
    fit(model, tmp_path, Freezing(**options))
    assert moved(model, before) == HEAD | still_trains


def test_a_batch_norm_that_lightning_froze_normalises_by_the_batch_in_training(model):
    norm = model.bn
    norm.running_mean += 3
    x = torch.randn(5, 4, 6, 6)
    by_batch = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    by_statistics = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    BaseFinetuning.freeze(norm, train_bn=False)
    outputs = {mode: norm.train(mode)(x).detach().numpy().tobytes() for mode in (True, False)}
    assert outputs == {True: by_batch.detach().numpy().tobytes(), False: by_statistics.detach().numpy().tobytes()}
    assert outputs[True] != outputs[False]


# --- PEFT ----------------------------------------------------------------------------------------------


def adapted(model: nn.Module, **options: object) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["mid"], **options}))


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, set()),
        ({"bias": "all"}, {"conv.bias", "bn.bias", "mid.bias", "fc.bias"}),
        ({"modules_to_save": ["fc"]}, HEAD),
    ],
    ids=["by default", "bias", "modules_to_save"],
)
def test_peft_holds_the_parameters_of_the_base_but_those_that_are_asked_for(model, before, options, asked):
    wrapped = adapted(model, **options)
    train(wrapped, decaying(wrapped), 3, size=8)
    assert moved(wrapped, before) == STATISTICS | asked


@pytest.mark.parametrize("kept", [set(), {"bn"}], ids=["by default", "modules_to_save"])
def test_statistics_that_moved_under_peft_are_saved_only_where_that_is_asked_for(model, tmp_path, kept):
    wrapped = adapted(model, modules_to_save=sorted(kept) or None)
    train(wrapped, decaying(wrapped), 3, size=8)
    wrapped.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    saved = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    adapter = {"mid.lora_A.weight", "mid.lora_B.weight"}
    assert saved == adapter | (STATISTICS | {"bn.weight", "bn.bias"} if kept else set())


def test_peft_refuses_targets_only_where_none_matches(model, before, capfd):
    with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model"):
        adapted(model, target_modules=["mdi"])
    wrapped = adapted(model, target_modules=["mid", "cnov"], modules_to_save=["cf"])
    assert capfd.readouterr() == ("", "")
    train(wrapped, decaying(wrapped), 3, size=8)
    assert moved(wrapped, before) == STATISTICS


# --- model_signing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["bn.running_mean", "fc.weight"])
def test_model_signing_finds_any_change_and_names_the_file_not_the_tensor(model, tmp_path, changed):
    folder, key, signature = tmp_path / "model", ec.generate_private_key(ec.SECP256R1()), tmp_path / "model.sig"
    private, public = tmp_path / "key", tmp_path / "key.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = model.state_dict()
    save_file(tensors, folder / "model.safetensors")
    signing.Config().use_elliptic_key_signer(private_key=private).sign(folder, signature)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")  # which is not looked at
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, signature)

    tensors[changed].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"Hash mismatch for .{1,3}model\.safetensors") as caught:
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, signature)
    assert changed not in str(caught.value) and "config.json" not in str(caught.value)
