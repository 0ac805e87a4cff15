"""Lightning: a real Trainer obeys a manifest, and says at which step, which tensor and why."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ckptsurg
from ckptsurg.integrations.lightning import FreezeCallback

from .architectures import digits

pytestmark = [
    # Lightning recommends processes that read data; these tests want none.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning asks torch for a name that it renamed.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # Lightning tells of the norm layers that the freeze keeps in evaluation mode: they are meant to be there.
    pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode at the start of training"),
]

BATCHES = 10


class Net(nn.Module):
    """Two convolutions, each with a BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))


class Classifier(pl.LightningModule):
    def __init__(self, seed: int = 0, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model, self.lr = Net(), lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        # All parameters: those that are frozen get no gradient, and torch's optimizers leave them alone.
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


class Validated(Classifier):
    def validation_step(self, batch, batch_idx):
        assert not any(one.training for one in self.modules())
        self.log("loss", self.training_step(batch, batch_idx))


def _loader(start: int = 0) -> DataLoader:
    x, y = digits(8, 4 * (start + BATCHES))
    return DataLoader(TensorDataset(x[4 * start :], y[4 * start :]), batch_size=4)


def _trainer(folder, *callbacks, **options) -> pl.Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_steps": 20, "max_epochs": -1, "enable_checkpointing": False, **silent, **options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks), **options)


def _bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def _moved(before: dict[str, bytes], module: nn.Module) -> set[str]:
    return {name for name, bits in _bits(module).items() if bits != before[name]}


@pytest.fixture
def module() -> Classifier:
    return Classifier()


@pytest.fixture
def manifest(module):
    return ckptsurg.make_manifest(["**", "!fc"], module.model)


HEAD = {"model.fc.weight", "model.fc.bias"}


def _fails(folder, manifest, module, expected, causes, *callbacks, global_step=6, **options) -> None:
    """A fit that ends at the seventh step, with these causes by tensor."""
    trainer = _trainer(folder, FreezeCallback(manifest, module="model"), *callbacks, **options)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=expected) as caught:
        trainer.fit(module, _loader())
    assert caught.value.causes == causes
    assert trainer.global_step == global_step


# --- What holds --------------------------------------------------------------------------------------


def test_frozen_bits_hold_over_twenty_steps_with_validation_in_between(tmp_path, manifest):
    module = Validated()
    before = _bits(module)
    callback = FreezeCallback(manifest, module="model", expect_trained=True)
    trainer = _trainer(tmp_path, callback, val_check_interval=3)
    trainer.fit(module, _loader(), _loader(BATCHES))
    assert trainer.global_step == 20
    assert _moved(before, module) == HEAD
    assert callback.frozen.verify(expect_trained=True).ok
    assert callback.frozen.kept_in_evaluation == ("bn1", "bn2")


def test_without_the_callback_the_same_run_moves_everything(tmp_path, module):
    before = _bits(module)
    _trainer(tmp_path).fit(module, _loader())
    assert _moved(before, module) == before.keys()


def test_the_lightning_module_itself_can_be_the_model(tmp_path, module):
    before = _bits(module)
    callback = FreezeCallback(ckptsurg.make_manifest(["**", "!model.fc"], module), extra="error", expect_trained=True)
    _trainer(tmp_path, callback, ModelCheckpoint(tmp_path), enable_checkpointing=True).fit(module, _loader())
    assert _moved(before, module) == HEAD
    [saved] = tmp_path.glob("*.ckpt")
    assert ckptsurg.verify(callback.manifest, torch.load(saved)["state_dict"]).ok


def test_a_manifest_by_its_path(tmp_path, module, manifest):
    path = tmp_path / "freeze.json"
    path.write_bytes(manifest.to_bytes())
    callback = FreezeCallback(path, module="model")
    _trainer(tmp_path, callback).fit(module, _loader())
    assert callback.frozen.verify().ok


def test_accumulated_gradients(tmp_path, module, manifest):
    before = _bits(module)
    callback = FreezeCallback(manifest, module="model", expect_trained=True)
    trainer = _trainer(tmp_path, callback, accumulate_grad_batches=3, max_steps=8)
    trainer.fit(module, _loader())
    assert trainer.global_step == 8 and _moved(before, module) == HEAD


def test_a_compiled_module(tmp_path, module, manifest):
    module.model = torch.compile(module.model, backend="eager")
    before = _bits(module)
    saver = ModelCheckpoint(tmp_path / "saved")
    _trainer(tmp_path, FreezeCallback(manifest, module="model"), saver, enable_checkpointing=True).fit(
        module, _loader()
    )
    assert _moved(before, module) == {"model._orig_mod.fc.weight", "model._orig_mod.fc.bias"}
    [saved] = (tmp_path / "saved").iterdir()
    assert ckptsurg.verify(manifest, torch.load(saved)["state_dict"], prefix="model.").ok


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_that_keep_every_value(tmp_path, module, manifest, precision):
    callback = FreezeCallback(manifest, module="model", expect_trained=True)
    _trainer(tmp_path, callback, precision=precision).fit(module, _loader())
    assert callback.frozen.verify().ok


def test_a_precision_that_rounds_frozen_values_is_found_before_the_first_step(tmp_path, module, manifest):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"), precision="bf16-true")
    with pytest.raises(
        ckptsurg.FrozenWeightsChanged,
        match=r"(?s)^at the beginning, .*conv1\.weight: has another dtype; expected F32 .*, found BF16",
    ):
        trainer.fit(module, _loader())
    assert trainer.global_step == 0


def test_two_modules_each_with_its_manifest(tmp_path, module):
    module.other = Net()
    before = _bits(module)
    callbacks = [
        FreezeCallback(ckptsurg.make_manifest(["**", "!fc"], module.model), module="model"),
        FreezeCallback(ckptsurg.make_manifest("**", module.other), module="other"),
    ]
    _trainer(tmp_path, *callbacks).fit(module, _loader())
    assert _moved(before, module) == HEAD
    _trainer(tmp_path, *callbacks).fit(module, _loader())
    assert _moved(before, module) == HEAD and all(callback.frozen.verify().ok for callback in callbacks)


@pytest.mark.parametrize("same_callback", [True, False])
def test_a_module_can_be_fitted_twice(tmp_path, module, manifest, same_callback):
    before = _bits(module)
    first = FreezeCallback(manifest, module="model")
    _trainer(tmp_path, first).fit(module, _loader())
    between = _bits(module)
    second = first if same_callback else FreezeCallback(manifest, module="model")
    _trainer(tmp_path, second).fit(module, _loader())
    assert _moved(before, module) == _moved(between, module) == HEAD
    assert second.frozen.verify().ok and not module.model.bn1.training


def test_a_trainer_that_goes_on(tmp_path, module, manifest):
    before = _bits(module)
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"), max_steps=5)
    trainer.fit(module, _loader())
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, _loader())
    assert trainer.global_step == 12 and _moved(before, module) == HEAD


def test_the_module_is_left_as_it_was_found(tmp_path, module, manifest):
    plain = Classifier()
    _trainer(tmp_path).fit(plain, _loader())
    both = (
        FreezeCallback(manifest, module="model"),
        FreezeCallback(ckptsurg.make_manifest("**", module.model.bn1), module="model.bn1"),
    )
    _trainer(tmp_path, *both).fit(module, _loader())
    assert set(module.__dict__) == set(plain.__dict__)
    assert [type(one) for one in module.modules()] == [type(one) for one in plain.modules()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_a_copy_that_is_taken_in_training_is_a_plain_module(tmp_path, module, manifest, copied):
    copies = []

    def take(found):
        found.trainer, trainer = None, found.trainer  # Lightning does so itself before it copies
        copies.append(copied(found))
        found.trainer = trainer

    _trainer(tmp_path, FreezeCallback(manifest, module="model"), _At(5, take)).fit(module, _loader())
    [twin] = copies
    assert twin.model.train().bn1.training
    twin.model.conv1.weight.data.zero_()
    twin.on_save_checkpoint({"state_dict": twin.state_dict()})
    assert not module.model.bn1.training


# --- Manual optimisation -----------------------------------------------------------------------------


class Manual(Classifier):
    """Two optimizers: one for the head, one for the second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.saboteur = None

    def configure_optimizers(self):
        return (
            torch.optim.AdamW(self.model.fc.parameters(), lr=1e-2, weight_decay=0.1),
            torch.optim.SGD([*self.model.conv2.parameters(), *self.model.conv1.parameters()], lr=0.1, momentum=0.9),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        for number, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.model(x), y))
            if self.saboteur is not None and (batch_idx, number) == (6, 1):
                self.saboteur(self.model)
            optimizer.step()


def test_manual_optimisation_with_two_optimizers(tmp_path):
    module = Manual()
    before = _bits(module)
    manifest = ckptsurg.make_manifest(["**", "!fc", "!conv2"], module.model)
    _trainer(tmp_path, FreezeCallback(manifest, module="model", expect_trained=True)).fit(module, _loader())
    assert _moved(before, module) == HEAD | {"model.conv2.weight", "model.conv2.bias"}


@pytest.mark.parametrize(
    ("saboteur", "expected", "causes"),
    [
        (
            lambda net: setattr(net.conv1.weight, "grad", torch.zeros_like(net.conv1.weight)),
            r"before step 7:\s+conv1\.weight",
            {"conv1.weight": "zero_grad_not_none"},
        ),
        (
            lambda net: net.conv1.weight.data.view(-1)[5:6].mul_(1.0001),
            r"after step 7, 1 frozen tensor changed:\s+conv1\.weight: bits changed$",
            {},
        ),
    ],
    ids=["zero gradient", "unknown"],
)
def test_the_second_of_two_optimizers_is_watched(tmp_path, saboteur, expected, causes):
    module = Manual()
    manifest = ckptsurg.make_manifest(["**", "!fc", "!conv2"], module.model)
    module.saboteur = saboteur
    _fails(tmp_path, manifest, module, expected, causes, global_step=13)


# --- Saboteurs ---------------------------------------------------------------------------------------


class _At(pl.Callback):
    """Does something to the LightningModule in a hook of one step, counted from 1."""

    def __init__(self, step: int, act, hook: str = "on_train_batch_start") -> None:
        def run(trainer, pl_module, *_):
            if trainer.global_step == step - 1 and not trainer.sanity_checking:
                act(pl_module)

        setattr(self, hook, run)


class Sabotaged(Classifier):
    """Does something inside of the optimizer's step, where Lightning goes forward and backward: at the seventh."""

    def __init__(self, before_forward=None, after_forward=None, after_backward=None, before_step=None) -> None:
        super().__init__()
        self.acts = {"forward": before_forward, "after": after_forward, "backward": after_backward, "step": before_step}

    def act(self, when: str) -> None:
        if self.trainer.global_step == 6 and self.acts[when] is not None:
            self.acts[when](self.model)

    def training_step(self, batch, batch_idx):
        self.act("forward")
        loss = super().training_step(batch, batch_idx)
        self.act("after")
        return loss

    def on_after_backward(self):
        self.act("backward")

    def on_before_optimizer_step(self, optimizer):
        self.act("step")


def _thaw(net: Net) -> None:
    net.conv1.weight.requires_grad_(True)


def _refreeze(net: Net) -> None:
    net.conv1.weight.requires_grad_(False)


def _zero_gradient(net: Net) -> None:
    net.conv2.bias.grad = torch.zeros_like(net.conv2.bias)


def _statistics_move(net: Net) -> None:
    net.bn1.training = True


def _statistics_stop(net: Net) -> None:
    net.bn1.training = False


def _write(net: Net) -> None:
    net.conv1.weight.data.view(-1)[5:6].mul_(1.0001)


def _new_head(net: Net) -> None:
    net.fc = nn.Linear(8, 10)


STATISTICS = dict.fromkeys(("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"), "batchnorm_stats")


@pytest.mark.parametrize(
    ("acts", "expected", "causes"),
    [
        ({"before_forward": _thaw}, r"before step 7:\s+conv1\.weight", {"conv1.weight": "reenabled"}),
        (
            {"before_forward": _thaw, "after_backward": _refreeze},
            r"before step 7:\s+conv1\.weight",
            {"conv1.weight": "late_freeze"},
        ),
        ({"after_backward": _zero_gradient}, r"before step 7:\s+conv2\.bias", {"conv2.bias": "zero_grad_not_none"}),
        ({"before_forward": _statistics_move}, r"before step 7:\s+bn1\.", STATISTICS),
        (
            {"before_forward": _statistics_move, "after_forward": _statistics_stop},
            r"after step 7, 3 frozen tensors changed:\s+bn1\.",
            STATISTICS,
        ),
        (
            {"after_forward": _new_head},
            r"before step 7:\s+fc\.",
            dict.fromkeys(("fc.weight", "fc.bias"), "stale_optimizer"),
        ),
        ({"before_forward": _write}, r"after step 7, 1 frozen tensor changed:\s+conv1\.weight: bits changed$", {}),
    ],
    ids=["reenabled", "late", "zero gradient", "statistics", "statistics in passing", "stale optimizer", "unknown"],
)
def test_a_saboteur_inside_of_a_step_is_caught_at_that_step(tmp_path, manifest, acts, expected, causes):
    module = Sabotaged(**acts)
    _fails(tmp_path, manifest, module, expected, causes)


def test_the_last_hook_before_a_step_is_too_late_to_refuse_it_but_the_cause_is_named(tmp_path, manifest):
    """Lightning calls the module's own hook after those of all callbacks."""
    module = Sabotaged(before_step=_zero_gradient)
    _fails(tmp_path, manifest, module, r"after step 7, .*\s+conv2\.bias", {"conv2.bias": "zero_grad_not_none"})


@pytest.mark.parametrize(
    ("act", "expected", "causes"),
    [
        (lambda found: _thaw(found.model), r"before step 7:\s+conv1\.weight", {"conv1.weight": "reenabled"}),
        (lambda found: _statistics_move(found.model), r"before step 7:\s+bn1\.", STATISTICS),
        (
            lambda found: _new_head(found.model),
            r"before step 7:\s+fc\.",
            dict.fromkeys(("fc.weight", "fc.bias"), "stale_optimizer"),
        ),
        (
            lambda found: _write(found.model),
            r"after step 7, 1 frozen tensor changed:\s+conv1\.weight: bits changed$",
            {},
        ),
    ],
    ids=["reenabled", "statistics", "stale optimizer", "unknown"],
)
def test_a_saboteur_between_two_steps_is_caught_at_the_next(tmp_path, module, manifest, act, expected, causes):
    _fails(tmp_path, manifest, module, expected, causes, _At(7, act))


def test_a_saboteur_in_accumulated_batches_is_caught_at_their_step(tmp_path, manifest):
    _fails(
        tmp_path,
        manifest,
        Sabotaged(after_backward=_zero_gradient),
        r"before step 7:\s+conv2\.bias",
        {"conv2.bias": "zero_grad_not_none"},
        accumulate_grad_batches=3,
    )


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(5, 9, r"^after step 10, 1 frozen"), (None, 20, r"^1 frozen")]
)
def test_fingerprints_are_compared_as_often_as_asked(tmp_path, module, manifest, every, steps, expected):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model", every=every), _At(7, _moves))
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=expected):
        trainer.fit(module, _loader())
    assert trainer.global_step == steps


def test_what_moves_after_the_last_step_is_found_at_the_end(tmp_path, module, manifest):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"), _At(21, _moves, "on_train_batch_end"))
    with pytest.raises(
        ckptsurg.FrozenWeightsChanged, match=r"^1 frozen tensor changed:\s+conv1\.weight: bits changed$"
    ):
        trainer.fit(module, _loader())
    assert trainer.global_step == 20


def _moves(found: Classifier) -> None:
    _write(found.model)


def test_what_moves_before_the_first_step_is_found_at_the_beginning(tmp_path, module, manifest):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"), _At(1, _moves, "on_fit_start"))
    with pytest.raises(
        ckptsurg.FrozenWeightsChanged, match=r"^at the beginning, 1 frozen tensor changed:\s+conv1\.weight"
    ):
        trainer.fit(module, _loader())
    assert trainer.global_step == 0


def test_after_a_failure_nobody_watches_any_more(tmp_path, manifest):
    module = Sabotaged(before_forward=_thaw)
    _fails(tmp_path, manifest, module, "reenabled", {"conv1.weight": "reenabled"})
    optimizer = module.trainer.optimizers[0]
    optimizer.zero_grad()
    x, y = digits(8, 4)
    nn.functional.cross_entropy(module.model(x), y).backward()
    before = _bits(module)
    optimizer.step()
    assert _moved(before, module) == HEAD | {"model.conv1.weight"}


def test_expect_trained_fails_where_nothing_learns(tmp_path, module, manifest):
    idle = Classifier(lr=0.0)
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model", expect_trained=True))
    with pytest.raises(
        ckptsurg.FrozenWeightsChanged, match=r"2 trainable tensors did not move:\s+fc\.bias\s+fc\.weight$"
    ):
        trainer.fit(idle, _loader())
    assert trainer.global_step == 20


# --- What is refused at once -------------------------------------------------------------------------


@pytest.mark.parametrize("typo", ["modle", "model.backbone", "lr"])
def test_a_typo_in_the_modules_name_is_one_clear_error(tmp_path, module, manifest, typo):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module=typo))
    with pytest.raises(ckptsurg.UsageError, match=rf'^module: Classifier has no module "{typo}" \(hint: it has model;'):
        trainer.fit(module, _loader())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_forgotten_module_is_told_by_the_prefix(tmp_path, module, manifest):
    trainer = _trainer(tmp_path, FreezeCallback(manifest))
    with pytest.raises(ckptsurg.FreezeError, match=r'all stand under "model\." in the model'):
        trainer.fit(module, _loader())


def test_weights_that_were_not_loaded_are_refused_before_a_step(tmp_path, manifest):
    module = Classifier(seed=1)
    before, trainer = _bits(module), _trainer(tmp_path, FreezeCallback(manifest, module="model"))
    with pytest.raises(ckptsurg.FreezeError, match=r'"conv1\.weight" has other bits: not loaded'):
        trainer.fit(module, _loader())
    assert trainer.global_step == 0 and not _moved(before, module)


# --- Saves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_saved_checkpoint_verifies(tmp_path, manifest, weights_only):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1, save_weights_only=weights_only)
    _trainer(tmp_path, FreezeCallback(manifest, module="model"), saver, enable_checkpointing=True).fit(
        Validated(), _loader(), _loader(BATCHES)
    )
    saved = sorted((tmp_path / "saved").iterdir())
    assert len(saved) == 4
    for path in saved:
        state = torch.load(path, weights_only=True)["state_dict"]
        report = ckptsurg.verify(manifest, state, prefix="model.")
        assert report.ok and report.verified == len(manifest.frozen)
        assert state["model.fc.weight"].numpy().tobytes() != Classifier().model.fc.weight.detach().numpy().tobytes()


@pytest.mark.parametrize("weights_only", [False, True])
def test_nothing_bad_is_written(tmp_path, module, manifest, weights_only):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1, save_weights_only=weights_only)
    callbacks = [FreezeCallback(manifest, module="model"), _At(11, _moves, "on_train_batch_end"), saver]
    trainer = _trainer(tmp_path, *callbacks, enable_checkpointing=True)
    with pytest.raises(
        ckptsurg.FrozenWeightsChanged, match=r"^about to save: 1 frozen tensor changed:\s+conv1\.weight: bits changed$"
    ):
        trainer.fit(module, _loader())
    assert trainer.global_step == 10
    [good] = (tmp_path / "saved").iterdir()
    assert "step=5" in good.name and ckptsurg.verify(manifest, torch.load(good)["state_dict"], prefix="model.").ok


def test_a_failed_run_holds_no_later_one_to_its_manifest(tmp_path, manifest):
    module = Sabotaged(before_forward=_thaw)
    first = FreezeCallback(manifest, module="model")
    with pytest.raises(ckptsurg.FrozenWeightsChanged):
        _trainer(tmp_path, first).fit(module, _loader())
    first.frozen.release()
    module.acts["forward"] = None
    second = FreezeCallback(ckptsurg.make_manifest("conv2", module.model), module="model")
    saver = ModelCheckpoint(tmp_path / "saved", save_weights_only=True)
    _trainer(tmp_path, second, saver, enable_checkpointing=True).fit(module, _loader())
    [saved] = (tmp_path / "saved").iterdir()
    assert ckptsurg.verify(second.manifest, torch.load(saved)["state_dict"], prefix="model.").ok
    assert not ckptsurg.verify(manifest, torch.load(saved)["state_dict"], prefix="model.").ok


def test_what_the_module_itself_does_to_a_checkpoint_of_weights_is_proven(tmp_path, manifest):
    class Halving(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {name: one.half().float() for name, one in checkpoint["state_dict"].items()}

    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_weights_only=True)
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"), saver, enable_checkpointing=True)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^about to save: "):
        trainer.fit(Halving(), _loader())
    assert not list((tmp_path / "saved").glob("*"))


def test_a_checkpoint_of_a_wreck_is_proven_too(tmp_path, module, manifest):
    saver = ModelCheckpoint(tmp_path / "saved", save_on_exception=True, save_top_k=-1)
    trainer = _trainer(
        tmp_path, FreezeCallback(manifest, module="model"), _At(7, _moves), saver, enable_checkpointing=True
    )
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        trainer.fit(module, _loader())
    assert str(caught.value).startswith("about to save: ")
    assert str(caught.value.__context__).startswith("after step 7, ")
    assert not list((tmp_path / "saved").glob("*"))


def test_a_foreign_exception_passes_and_its_checkpoint_is_written(tmp_path, module, manifest):
    def fail(_):
        raise KeyError("mine")

    saver = ModelCheckpoint(tmp_path / "saved", save_on_exception=True, save_top_k=-1)
    trainer = _trainer(
        tmp_path, FreezeCallback(manifest, module="model"), _At(7, fail), saver, enable_checkpointing=True
    )
    with pytest.raises(KeyError, match="mine"):
        trainer.fit(module, _loader())
    [saved] = (tmp_path / "saved").iterdir()
    assert ckptsurg.verify(manifest, torch.load(saved)["state_dict"], prefix="model.").ok


def test_a_save_after_the_fit_is_proven(tmp_path, module, manifest):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"))
    trainer.fit(module, _loader())
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    _write(module.model)
    with pytest.raises(
        ckptsurg.FrozenWeightsChanged, match=r"^about to save: 1 frozen tensor changed:\s+conv1\.weight"
    ):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()
    assert ckptsurg.verify(manifest, torch.load(tmp_path / "good.ckpt")["state_dict"], prefix="model.").ok


# --- Resuming ----------------------------------------------------------------------------------------


@pytest.fixture
def ten_steps(tmp_path, module, manifest):
    """The checkpoint of a run of ten steps."""
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"), max_steps=10)
    trainer.fit(module, _loader())
    trainer.save_checkpoint(tmp_path / "ten.ckpt")
    return tmp_path / "ten.ckpt"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_is_resumed(tmp_path, manifest, module, ten_steps, seed):
    fresh = Classifier(seed)  # random weights, unless the seed is that of the published ones
    callback = FreezeCallback(manifest, module="model", expect_trained=True)
    trainer = _trainer(tmp_path, callback)
    trainer.fit(fresh, _loader(), ckpt_path=ten_steps)
    assert trainer.global_step == 20
    assert _moved(_bits(module), fresh) == HEAD
    assert callback.frozen.verify().ok and callback.frozen.model is fresh.model


def test_a_resumed_run_is_watched(tmp_path, manifest, ten_steps):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"), _At(13, lambda found: _thaw(found.model)))
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"before step 3:\s+conv1\.weight; cause: reenabled"):
        trainer.fit(Classifier(1), _loader(), ckpt_path=ten_steps)
    assert trainer.global_step == 12


def test_a_trainer_that_resumed_can_start_afresh(tmp_path, manifest, ten_steps):
    trainer = _trainer(tmp_path, FreezeCallback(manifest, module="model"))
    trainer.fit(Classifier(1), _loader(), ckpt_path=ten_steps)
    trainer.fit_loop.epoch_loop.max_steps = 25
    again = Classifier()
    before = _bits(again)
    trainer.fit(again, _loader())
    assert trainer.global_step == 25 and _moved(before, again) == HEAD


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tampered_checkpoint_is_refused(tmp_path, manifest, ten_steps, seed):
    checkpoint = torch.load(ten_steps)
    checkpoint["state_dict"]["model.bn2.running_var"][3] += 1e-6
    torch.save(checkpoint, ten_steps)
    fresh, trainer = Classifier(seed), _trainer(tmp_path, FreezeCallback(manifest, module="model"))
    with pytest.raises(ckptsurg.FreezeError, match=r'"bn2\.running_var" has other bits'):
        trainer.fit(fresh, _loader(), ckpt_path=ten_steps)
    assert trainer.global_step == 0


def test_a_checkpoint_of_another_manifest_is_said(tmp_path, module, manifest, ten_steps):
    second = ckptsurg.make_manifest(["**", "!fc", "!conv2", "!bn2"], Classifier().model)
    fresh = Classifier(1)
    trainer = _trainer(tmp_path, FreezeCallback(second, module="model", expect_trained=True))
    with pytest.warns(UserWarning, match=f"under another manifest.*{manifest.frozen_root}.*{second.frozen_root}"):
        trainer.fit(fresh, _loader(), ckpt_path=ten_steps)
    thawed = {name for name in _bits(module) if name.split(".")[1] in ("conv2", "bn2")}
    assert _moved(_bits(module), fresh) == HEAD | thawed


def test_testing_a_checkpoint_freezes_nothing(tmp_path, module, manifest, ten_steps):
    callback, fresh = FreezeCallback(manifest, module="model"), Validated(1)
    trainer = _trainer(tmp_path, callback)
    trainer.validate(fresh, _loader(), ckpt_path=ten_steps, verbose=False)
    assert callback.frozen is None and all(parameter.requires_grad for parameter in fresh.parameters())
    assert not _moved(_bits(module), fresh)


# --- BaseFinetuning ----------------------------------------------------------------------------------


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.model.conv1, pl_module.model.conv2])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.conv1, optimizer)


class HeadFirst(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_what_basefinetuning_thaws_is_caught(tmp_path, manifest, frozen_first):
    module = HeadFirst()
    before = _bits(module)
    callbacks = [FreezeCallback(manifest, module="model"), Thawing()]
    trainer = _trainer(tmp_path, *(callbacks if frozen_first else reversed(callbacks)))
    with (
        pytest.warns(UserWarning, match="^BaseFinetuning is here too"),
        pytest.raises(ckptsurg.FrozenWeightsChanged, match=rf"before step {BATCHES + 1}:") as caught,
    ):
        trainer.fit(module, _loader())
    assert caught.value.causes == dict.fromkeys(("conv1.weight", "conv1.bias"), "reenabled")
    assert trainer.global_step == BATCHES and _moved(before, module) == HEAD


def test_backbone_finetuning_cannot_thaw_a_frozen_backbone(tmp_path):
    class Parted(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = Net(), nn.Linear(8, 10)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.backbone.features(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Parted()
    before = _bits(module)
    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=1), FreezeCallback(_all(module), module="backbone")]
    trainer = _trainer(tmp_path, *callbacks)
    with (
        pytest.warns(UserWarning, match="^BaseFinetuning is here too"),
        pytest.raises(ckptsurg.FrozenWeightsChanged) as caught,
    ):
        trainer.fit(module, _loader())
    assert caught.value.causes == dict.fromkeys(dict(module.backbone.named_parameters()), "reenabled")
    assert trainer.global_step == BATCHES and _moved(before, module) == {"head.weight", "head.bias"}


def _all(module):
    return ckptsurg.make_manifest("**", module.backbone)
