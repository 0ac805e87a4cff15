"""Accelerate: a guard over a prepared optimizer, its saves and its loads."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ckptsurg
from ckptsurg.integrations.accelerate import guard

from .architectures import digits


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))).mean((2, 3)))


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def _moved(before: dict[str, bytes], model: nn.Module) -> set[str]:
    return {name for name, bits in _bits(model).items() if bits != before[name]}


HEAD = {"fc.weight", "fc.bias"}


class Run:
    """A frozen model, prepared with AdamW over all of its parameters: the frozen ones get no gradient."""

    def __init__(self, accumulate: int = 1) -> None:
        torch.manual_seed(0)
        net = Net()
        self.manifest = ckptsurg.make_manifest(["**", "!fc"], net)
        self.before = _bits(net)
        self.frozen = ckptsurg.freeze(net, self.manifest)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        x, y = digits(8, 4 * 64)
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.model, self.optimizer, loader = self.accelerator.prepare(net, optimizer, loader)
        self.batches = iter(loader)
        self.steps = 0

    @property
    def net(self) -> Net:
        return self.accelerator.unwrap_model(self.model)

    def guard(self, **options):
        return guard(self.accelerator, self.frozen, self.optimizer, **options)

    def step(self, before_forward=None, before_step=None) -> None:
        """Batches until the optimizer has stepped; what is done in between is done before the last of them steps."""
        while True:
            with self.accelerator.accumulate(self.model):
                self.model.train()
                last = self.accelerator.sync_gradients
                x, y = next(self.batches)
                if last and before_forward is not None:
                    before_forward(self.net)
                self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
                if last and before_step is not None:
                    before_step(self.net)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if last:
                self.steps += 1
                return

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()


@pytest.fixture(autouse=True)
def _no_shared_state():
    """Accelerators of one process share their state."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# --- What holds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_frozen_bits_hold_over_twenty_steps(accumulate):
    run = Run(accumulate)
    with run.guard(expect_trained=True) as watching:
        run.train(20)
    assert watching.steps == 20
    assert _moved(run.before, run.net) == HEAD


def test_without_the_freeze_the_same_run_moves_everything():
    run = Run()
    run.frozen.release()
    run.train(20)
    assert _moved(run.before, run.net) == run.before.keys()


def test_clipping_and_a_schedule_change_nothing():
    run = Run()
    schedule = run.accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(run.optimizer.optimizer, 0.9))
    with run.guard(expect_trained=True):
        for _ in range(20):
            run.step(before_step=lambda net: run.accelerator.clip_grad_norm_(net.parameters(), 0.1))
            schedule.step()
    assert _moved(run.before, run.net) == HEAD


def test_an_optimizer_that_is_not_prepared_is_guarded_alike():
    run = Run()
    with guard(run.accelerator, run.frozen, run.optimizer.optimizer) as watching:
        run.train(3)
    assert watching.steps == 3


def test_something_else_than_an_optimizer_is_refused():
    run = Run()
    with pytest.raises(
        ckptsurg.UsageError,
        match=r"^expected an optimizer of torch, found Net \(hint: give the torch\.optim\.Optimizer",
    ):
        guard(run.accelerator, run.frozen, run.model)


# --- Saboteurs ---------------------------------------------------------------------------------------


def _thaw(net: Net) -> None:
    net.conv1.weight.requires_grad_(True)


def _late_freeze(net: Net) -> None:
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)


def _zero_gradient(net: Net) -> None:
    net.conv2.bias.grad = torch.zeros_like(net.conv2.bias)


def _statistics_move(net: Net) -> None:
    net.bn1.training = True


def _new_head(net: Net) -> None:
    net.fc = nn.Linear(8, 10)


def _write(net: Net) -> None:
    net.conv1.weight.data.view(-1)[5:6].mul_(1.0001)


STATISTICS = dict.fromkeys(("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"), "batchnorm_stats")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("when", "act", "expected", "causes"),
    [
        ("before_forward", _thaw, r"before step 7:\s+conv1\.weight", {"conv1.weight": "reenabled"}),
        ("before_step", _late_freeze, r"before step 7:\s+conv1\.weight", {"conv1.weight": "late_freeze"}),
        ("before_step", _zero_gradient, r"before step 7:\s+conv2\.bias", {"conv2.bias": "zero_grad_not_none"}),
        ("before_forward", _statistics_move, r"before step 7:\s+bn1\.", STATISTICS),
        (
            "before_forward",
            _new_head,
            r"before step 7:\s+fc\.",
            dict.fromkeys(("fc.weight", "fc.bias"), "stale_optimizer"),
        ),
        ("before_forward", _write, r"after step 7, 1 frozen tensor changed:\s+conv1\.weight: bits changed$", {}),
    ],
    ids=["reenabled", "late", "zero gradient", "statistics", "stale optimizer", "unknown"],
)
def test_a_saboteur_is_caught_at_its_step(accumulate, when, act, expected, causes):
    run = Run(accumulate)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=expected) as caught, run.guard():
        run.train(6)
        run.step(**{when: act})
    assert caught.value.causes == causes and run.steps == 6


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(5, 9, r"^after step 10, 1 frozen"), (None, 12, r"^1 frozen")]
)
def test_fingerprints_are_compared_as_often_as_asked(every, steps, expected):
    run = Run()
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=expected), run.guard(every=every):
        run.train(6)
        _write(run.net)
        run.train(6)
    assert run.steps == steps


def test_what_moves_after_the_last_step_is_found_at_the_end():
    run = Run()
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^1 frozen tensor changed:\s+conv1\.weight"), run.guard():
        run.train(3)
        _write(run.net)


def test_expect_trained_fails_where_nothing_learns():
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^2 trainable tensors did not move:"),
        run.guard(expect_trained=True),
    ):
        run.train(3)


# --- Saving and loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_a_moved_weight_is_not_saved(tmp_path, safe):
    run = Run()
    with run.guard():
        run.train(3)
        run.accelerator.save_state(tmp_path / "good", safe_serialization=safe)
        bits = run.net.conv1.weight.detach().clone()
        _write(run.net)
        with pytest.raises(
            ckptsurg.FrozenWeightsChanged, match=r"^about to save: 1 frozen tensor changed:\s+conv1\.weight"
        ):
            run.accelerator.save_state(tmp_path / "bad", safe_serialization=safe)
        run.net.conv1.weight.data.copy_(bits)
    assert not list((tmp_path / "bad").iterdir())
    assert len(list((tmp_path / "good").iterdir())) >= 2
    if safe:
        assert ckptsurg.verify(run.manifest, tmp_path / "good").ok


def test_loading_what_was_saved_is_no_alarm(tmp_path):
    run = Run()
    with run.guard(expect_trained=True) as watching:
        run.train(3)
        run.accelerator.save_state(tmp_path)
        between = _bits(run.net)
        run.train(3)
        run.accelerator.load_state(tmp_path)
        assert not _moved(between, run.net)
        run.train(3)
    assert watching.steps == 9 and _moved(run.before, run.net) == HEAD


@pytest.mark.parametrize("every", [1, None])
def test_a_tampered_state_is_caught_before_the_next_step(tmp_path, every):
    run = Run()
    with (
        pytest.raises(
            ckptsurg.FrozenWeightsChanged,
            match=r"^after loading, 1 frozen tensor changed:\s+bn2\.running_var: bits changed",
        ),
        run.guard(every=every) as watching,
    ):
        run.train(3)
        run.accelerator.save_state(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["bn2.running_var"][3] += 1e-6
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        run.accelerator.load_state(tmp_path)
        head = run.net.fc.weight.detach().clone()
        run.step()
    assert watching.steps == 3
    assert run.net.fc.weight.detach().numpy().tobytes() == head.numpy().tobytes()


def test_a_tampered_state_is_caught_at_the_end_if_no_step_follows(tmp_path):
    run = Run()
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"bn2\.running_var: bits changed"), run.guard():
        run.accelerator.save_state(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["bn2.running_var"][3] += 1e-6
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        run.accelerator.load_state(tmp_path)


def test_a_saved_model_verifies_from_its_file(tmp_path):
    run = Run()
    with run.guard():
        run.train(5)
        run.accelerator.save_model(run.model, tmp_path)
    report = ckptsurg.verify(run.manifest, tmp_path, expect_trained=True)
    assert report.ok and report.verified == len(run.manifest.frozen)


def test_removing_the_guard_removes_all_of_it(tmp_path):
    run = Run()
    with run.guard():
        run.train(1)
    watching = run.guard()
    watching.remove()
    watching.remove()  # a second time does nothing
    _thaw(run.net)
    _write(run.net)
    run.train(1)
    run.accelerator.save_state(tmp_path)
    run.accelerator.load_state(tmp_path)
    run.train(1)
    assert watching.steps == 0


def test_no_exception_is_hidden(tmp_path):
    run = Run()
    with pytest.raises(KeyError, match="mine"), run.guard():
        run.train(1)
        _write(run.net)
        raise KeyError("mine")
    run.accelerator.save_state(tmp_path)  # nobody watches any more


# --- Steps that are skipped --------------------------------------------------------------------------


def test_a_step_that_the_gradient_scaler_skips_is_none():
    run = Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
    x, y = digits(8, 4)

    def step(overflow: bool, act=None) -> None:
        loss = scaler.scale(nn.functional.cross_entropy(run.model(x), y))
        loss.backward()
        if overflow:
            run.net.fc.weight.grad[0, 0] = float("inf")
        if act is not None:
            act(run.net)
        optimizer.step()
        assert optimizer.step_was_skipped is overflow
        optimizer.zero_grad()

    with guard(run.accelerator, run.frozen, optimizer, expect_trained=True) as watching:
        step(overflow=False)
        assert watching.steps == 1
        between = _bits(run.net)
        step(overflow=True)
        assert watching.steps == 1 and not _moved(between, run.net) and scaler.get_scale() == 512.0
        step(overflow=True, act=_zero_gradient)  # nothing is stepped, so nothing would move
        assert watching.steps == 1
        step(overflow=False)
        assert watching.steps == 2 and _moved(between, run.net) == HEAD
        with pytest.raises(
            ckptsurg.FrozenWeightsChanged, match=r"before step 3:\s+conv2\.bias; cause: zero_grad_not_none"
        ):
            step(overflow=False, act=_zero_gradient)
