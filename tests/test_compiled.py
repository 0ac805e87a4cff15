"""Compiled models, every optimizer of torch, and what training loops do around a step: honest runs, and saboteurs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import ckptsurg

# torch's own: what its compiler imports says so once.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


class Net(nn.Module):
    """Frozen and trainable layers in turns, a norm with statistics, and parameters of two dimensions that train."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 6))
        self.norm = nn.LayerNorm(6)
        self.mid = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.norm(self.body(x))))


TRAINED = {"mid.weight", "head.weight", "head.bias"}
PATTERNS = ["**", "!mid", "!head"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def manifest(model):
    return ckptsurg.make_manifest(PATTERNS, model)


def _batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def _loss(model: nn.Module, seed: int) -> torch.Tensor:
    x, labels = _batch(seed)
    return nn.functional.cross_entropy(model(x), labels)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    model.train()
    optimizer.zero_grad()
    _loss(model, seed).backward()
    optimizer.step()


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def _moved(before: dict[str, bytes], model: nn.Module) -> set[str]:
    return {name for name, bits in _bits(model).items() if bits != before[name]}


# --- torch.compile ----------------------------------------------------------------------------------


def _freeze_then_compile(model: nn.Module, manifest: Any, backend: str) -> tuple[Any, nn.Module]:
    return ckptsurg.freeze(model, manifest), torch.compile(model, backend=backend)


def _compile_then_freeze(model: nn.Module, manifest: Any, backend: str) -> tuple[Any, nn.Module]:
    compiled = torch.compile(model, backend=backend)
    return ckptsurg.freeze(compiled, manifest), compiled


def _compile_in_place(model: nn.Module, manifest: Any, backend: str) -> tuple[Any, nn.Module]:
    frozen = ckptsurg.freeze(model, manifest)
    model.compile(backend=backend)
    return frozen, model


def _compile_and_run_then_freeze(model: nn.Module, manifest: Any, backend: str) -> tuple[Any, nn.Module]:
    """The graph of training mode is there already, and is not used again."""
    compiled = torch.compile(model, backend=backend)
    state = copy.deepcopy(model.state_dict())
    compiled(_batch(0)[0])
    model.load_state_dict(state)
    return ckptsurg.freeze(compiled, manifest), compiled


ORDERS = [_freeze_then_compile, _compile_then_freeze, _compile_in_place, _compile_and_run_then_freeze]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_frozen_bits_hold_in_a_compiled_model(model, manifest, order, backend):
    frozen, compiled = order(model, manifest, backend)
    before = _bits(model)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.05, weight_decay=0.1)
    with frozen.guard(optimizer, expect_trained=True):
        for seed in range(5):
            _step(compiled, optimizer, seed)
    assert _moved(before, model) == TRAINED
    assert not model.body[1].training and model.head.training


def test_frozen_bits_hold_in_machine_code(model, manifest):
    frozen, compiled = _freeze_then_compile(model, manifest, "inductor")
    before = _bits(model)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.05, weight_decay=0.1)
    with frozen.guard(optimizer, expect_trained=True):
        for seed in range(5):
            _step(compiled, optimizer, seed)
    assert _moved(before, model) == TRAINED


def test_a_compiled_model_s_file_is_proven_under_its_names(model, manifest, tmp_path):
    frozen, compiled = _compile_then_freeze(model, manifest, "eager")
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.05)
    _step(compiled, optimizer)
    state = compiled.state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    save_file(state, tmp_path / "trained.safetensors")
    assert ckptsurg.verify(manifest, tmp_path / "trained.safetensors", exact=True).ok
    assert frozen.verify_saved(state).ok and frozen.verify_saved(tmp_path / "trained.safetensors").ok
    state["_orig_mod.norm.weight"] = state["_orig_mod.norm.weight"] + 2.0**-20
    assert [one.name for one in frozen.verify_saved(state).drifted] == ["norm.weight"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_saboteur_in_a_compiled_model_is_caught_at_its_step(model, manifest, order):
    frozen, compiled = order(model, manifest, "aot_eager")
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.05)
    guard = frozen.guard(optimizer)
    for seed in range(2):
        _step(compiled, optimizer, seed)
    model.body[3].weight.data[5, 7] += 2.0**-20
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        _step(compiled, optimizer, 2)
    guard.remove()
    assert str(caught.value) == "after step 3, 1 frozen tensor changed:\n  body.3.weight: bits changed"


def test_what_is_thawed_in_a_compiled_model_is_caught_before_it_moves(model, manifest):
    frozen, compiled = _compile_then_freeze(model, manifest, "aot_eager")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.05)
    before = _bits(model)
    with frozen.guard(optimizer), pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        model.body[0].weight.requires_grad_(True)
        _step(compiled, optimizer)
    assert list(caught.value.causes.values()) == ["reenabled"] and _moved(before, model) == set()


def test_a_norm_that_trains_in_the_compiled_graph_is_caught(model, manifest):
    frozen, compiled = _compile_then_freeze(model, manifest, "aot_eager")
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.05)
    guard = frozen.guard(optimizer)
    _step(compiled, optimizer)
    compiled.train()
    model.body[1].training = True
    _loss(compiled, 1).backward()
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        optimizer.step()
    guard.remove()
    assert {name.removeprefix("_orig_mod."): code for name, code in caught.value.causes.items()} == dict.fromkeys(
        ("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"), "batchnorm_stats"
    )


@pytest.mark.parametrize("begun", ["before the first step", "after the first step"])
def test_a_compiled_step_is_watched(model, manifest, begun):
    """Hooks of an optimizer run when its step is compiled, also those that came after the compiler."""
    frozen = ckptsurg.freeze(model, manifest)
    before = _bits(model)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=torch.tensor(0.05), weight_decay=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    guard = None
    for seed in range(4):
        optimizer.zero_grad()
        _loss(model, seed).backward()
        if seed == (begun == "after the first step"):
            guard = frozen.guard(optimizer)
        step()
    assert _moved(before, model) == TRAINED
    watched = guard.steps
    assert watched == (4 if begun == "before the first step" else 3)
    model.norm.bias.data[2] += 2.0**-20
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        step()
    assert str(caught.value) == f"after step {watched + 1}, 1 frozen tensor changed:\n  norm.bias: bits changed"
    guard.remove()
    step()
    assert guard.steps == watched + 1


def test_a_compiled_step_is_refused_before_it_moves_a_frozen_tensor(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    before = _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05), weight_decay=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    guard = frozen.guard(optimizer)
    model.norm.bias.grad = torch.zeros_like(model.norm.bias)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        step()
    guard.remove()
    assert caught.value.causes == {"norm.bias": "zero_grad_not_none"} and _moved(before, model) == set()


def test_the_guard_is_no_part_of_a_compiled_step(model, manifest):
    """Its reading of tensors would be compiled anew for each of them."""
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=torch.tensor(0.05))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(optimizer.step, backend=backend)
    guard = frozen.guard(optimizer)
    _loss(model, 0).backward()
    step()
    step()
    guard.remove()
    assert len(graphs) == 1 and guard.steps == 2


def test_frozen_rows_stand_still_in_a_compiled_model_and_step(model):
    manifest = ckptsurg.make_manifest(["**", "!mid", {"match": "head.weight", "rows": "[:2]"}], model)
    frozen, compiled = _freeze_then_compile(model, manifest, "aot_eager")
    before = model.head.weight.detach().clone()
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=torch.tensor(0.05), weight_decay=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(3):
        optimizer.zero_grad()
        _loss(compiled, seed).backward()
        step()
    kept = [a.numpy().tobytes() == b.detach().numpy().tobytes() for a, b in zip(before, model.head.weight, strict=True)]
    assert kept == [True, True, False] and frozen.verify().ok


# --- Optimizers -------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "AdamW, rate in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.05), weight_decay=0.1, foreach=False),
    "AdamW maximize": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, maximize=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9, weight_decay=0.1, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon([one for one in p if one.ndim == 2], lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("given", ["trainable parameters", "all parameters"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_honest_run_raises_no_alarm(model, manifest, name, given):
    frozen = ckptsurg.freeze(model, manifest)
    before = _bits(model)
    parameters = frozen.trainable_parameters() if given == "trainable parameters" else list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    with frozen.guard(optimizer) as guard:
        for seed in range(5):
            _step(model, optimizer, seed)
    assert guard.steps == 5
    assert _moved(before, model) == (TRAINED - {"head.bias"} if name == "Muon" else TRAINED)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_rows_stand_still_under_every_optimizer(model, name):
    manifest = ckptsurg.make_manifest(["**", "!mid", {"match": "head.weight", "rows": "[1:]"}], model)
    frozen = ckptsurg.freeze(model, manifest)
    before = [row.numpy().tobytes() for row in model.head.weight.detach().clone()]
    optimizer = OPTIMIZERS[name](frozen.trainable_parameters())
    with frozen.guard(optimizer, expect_trained=True):
        for seed in range(3):
            _step(model, optimizer, seed)
    after = [row.numpy().tobytes() for row in model.head.weight.detach()]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]


def _closure(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, deed: Callable[[], object] = int) -> Any:
    def closure() -> torch.Tensor:
        model.train()
        optimizer.zero_grad()
        deed()
        loss = _loss(model, seed)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_an_honest_run_of_lbfgs_raises_no_alarm(model, manifest, search):
    frozen = ckptsurg.freeze(model, manifest)
    before = _bits(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=4, line_search_fn=search)
    with frozen.guard(optimizer, expect_trained=True) as guard:
        for seed in range(5):
            optimizer.step(_closure(model, optimizer, seed))
    assert guard.steps == 5 and _moved(before, model) == TRAINED


def test_a_saboteur_in_a_closure_is_caught_at_its_step(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)
    guard = frozen.guard(optimizer)
    optimizer.step(_closure(model, optimizer, 0))
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"after step 2, .*\n  norm\.weight: bits changed"):
        optimizer.step(_closure(model, optimizer, 1, lambda: model.norm.weight.data[0].add_(2.0**-20)))
    guard.remove()


def test_what_a_closure_thaws_is_caught_after_its_step(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)
    guard = frozen.guard(optimizer, every=None)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^after step 1:") as caught:
        optimizer.step(_closure(model, optimizer, 0, lambda: model.norm.weight.requires_grad_(True)))
    guard.remove()
    assert caught.value.causes == {"norm.weight": "reenabled"}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).mean(1))


# Of torch's Adagrad, which makes sparse tensors without saying whether to check them.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(
    "built",
    [
        lambda p: torch.optim.SparseAdam(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.05),
        lambda p: torch.optim.Adagrad(p, lr=0.05),
    ],
    ids=["SparseAdam", "SGD", "Adagrad"],
)
@pytest.mark.parametrize("rows", [None, "[:6]"])
def test_sparse_gradients_raise_no_alarm(built, rows):
    torch.manual_seed(0)
    model = Words()
    patterns = ["**", "!embed"] if rows is None else ["**", {"match": "embed.weight", "rows": rows}]
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(patterns, model))
    before = [row.numpy().tobytes() for row in model.embed.weight.detach().clone()]
    optimizer = built(frozen.trainable_parameters())
    tokens = torch.arange(3, 9).view(2, 3)
    with frozen.guard(optimizer, expect_trained=True):
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), torch.tensor([0, 2])).backward()
            assert model.embed.weight.grad.is_sparse
            optimizer.step()
    after = [row.numpy().tobytes() for row in model.embed.weight.detach()]
    moved = {row for row in range(12) if after[row] != before[row]}
    assert moved == set(range(3 if rows is None else 6, 9))


# --- What loops do around a step --------------------------------------------------------------------


def _amp(dtype: torch.dtype) -> Callable[[nn.Module, torch.optim.Optimizer], None]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for seed in range(5):
            model.train()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = _loss(model, seed)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    return loop


def _clipping(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(5):
        optimizer.zero_grad()
        _loss(model.train(), seed).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()


def _accumulating(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(10):
        (_loss(model.train(), seed) / 2).backward()
        if seed % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


def _averaging(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for seed in range(5):
        _step(model, optimizer, seed)
        average.update_parameters(model)
        average.train()(_batch(seed)[0])  # whatever the copy does, the model is not it


def _evaluating_between(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(5):
        _step(model, optimizer, seed)
        with torch.inference_mode():
            model.eval()(_batch(seed)[0])


def _scheduled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
    for seed in range(5):
        _step(model, optimizer, seed)
        schedule.step()


def _resuming(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(5):
        _step(model, optimizer, seed)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


LOOPS = {
    "autocast in bfloat16": _amp(torch.bfloat16),
    "autocast in float16": _amp(torch.float16),
    "clipping": _clipping,
    "accumulation": _accumulating,
    "moving average beside": _averaging,
    "evaluation between": _evaluating_between,
    "learning rate schedule": _scheduled,
    "loading its own state": _resuming,
}


@pytest.mark.parametrize("name", LOOPS)
def test_an_honest_loop_raises_no_alarm(model, manifest, name):
    frozen = ckptsurg.freeze(model, manifest)
    before = _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with frozen.guard(optimizer, expect_trained=True) as guard:
        LOOPS[name](model, optimizer)
    assert guard.steps == 5 and _moved(before, model) == TRAINED


def test_a_guard_that_saw_no_step_says_so(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    watched, other = (torch.optim.AdamW(frozen.trainable_parameters()) for _ in range(2))
    guard = frozen.guard(watched).__enter__()
    _loss(model, 0).backward()
    other.step()
    with pytest.warns(UserWarning, match="no step of the guarded optimizer was seen"):
        guard.__exit__(None, None, None)


def test_a_step_that_a_scaler_skips_is_no_step(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    before = _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu")
    guard = frozen.guard(optimizer)
    scaler.scale(_loss(model, 0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    guard.remove()
    assert guard.steps == 0 and _moved(before, model) == set()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_raises_no_alarm(model, manifest, reentrant):
    """The forward pass through the frozen norm is run twice."""
    frozen = ckptsurg.freeze(model, manifest)
    before = _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with frozen.guard(optimizer, expect_trained=True):
        for seed in range(5):
            model.train()
            optimizer.zero_grad()
            x, labels = _batch(seed)
            hidden = checkpoint(model.body, x.requires_grad_(), use_reentrant=reentrant)
            nn.functional.cross_entropy(model.head(model.mid(model.norm(hidden))), labels).backward()
            optimizer.step()
    assert _moved(before, model) == TRAINED


def test_frozen_rows_count_in_no_norm_that_gradients_are_clipped_by(model):
    manifest = ckptsurg.make_manifest(["**", {"match": "head.weight", "rows": "[1:]"}], model)
    ckptsurg.freeze(model, manifest)
    _loss(model, 0).backward()
    norm = nn.utils.get_total_norm([model.head.weight.grad])
    expected = torch.autograd.grad(_loss(model, 0), model.head.weight)[0][:1]
    assert norm.numpy().tobytes() == torch.linalg.vector_norm(expected).numpy().tobytes()


def test_an_average_in_the_model_s_place_is_caught(model, manifest, tmp_path):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for seed in range(5):
        _step(model, optimizer, seed)
        for parameter, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
            averaged.data.mul_(0.99).add_(parameter.data, alpha=0.01)  # as averages are often written
    save_file(average.module.state_dict(), tmp_path / "average.safetensors")
    report = frozen.verify_saved(tmp_path / "average.safetensors")
    assert not report.ok and {one.name for one in report.drifted} <= set(manifest.frozen)
    assert frozen.verify().ok
