"""freeze(model, manifest): what it holds, what it refuses, what it leaves as it was."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import ckptsurg


class Small(nn.Module):
    """A body with every kind of tensor: convolution, norm with statistics, parameter, buffer; and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.bn(self.conv(x))) * self.scale
        return self.fc(hidden.mean((2, 3)) * self.mask)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    model.train()
    optimizer.zero_grad()
    model(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))).pow(2).sum().backward()
    optimizer.step()


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def manifest(model):
    return ckptsurg.make_manifest(["**", "!fc"], model)


def test_only_what_trains_moves(model, manifest):
    before = _bits(model)
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for seed in range(20):
        _step(model, optimizer, seed)
    moved = {name for name, bits in _bits(model).items() if bits != before[name]}
    assert moved == {"fc.weight", "fc.bias"}
    assert frozen.verify().ok


def test_trainable_parameters_are_a_list_of_what_is_left(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    parameters = frozen.trainable_parameters()
    assert isinstance(parameters, list)
    assert [id(p) for p in parameters] == [id(model.fc.weight), id(model.fc.bias)]


def test_norms_follow_the_model_unless_their_statistics_are_frozen(model):
    manifest = ckptsurg.make_manifest(["**", "!bn"], model)
    ckptsurg.freeze(model, manifest)
    assert model.train().bn.training
    assert not model.eval().bn.training
    other = Small()
    only_statistics = ckptsurg.make_manifest(["bn.{running_mean,running_var,num_batches_tracked}"], other)
    frozen = ckptsurg.freeze(other, only_statistics)
    before = _bits(other)
    _step(other, torch.optim.SGD(frozen.trainable_parameters(), lr=0.1))
    moved = {name for name, bits in _bits(other).items() if bits != before[name]}
    assert "bn.weight" in moved and not any("running" in name or "tracked" in name for name in moved)


@pytest.mark.parametrize("again", [lambda m: m.train(), lambda m: m.bn.train(), lambda m: m.train(False).train(True)])
def test_frozen_norms_stay_in_evaluation_mode(model, manifest, again):
    ckptsurg.freeze(model, manifest)
    again(model)
    assert not model.bn.training
    assert model.train() is model and model.bn.train() is model.bn


def test_a_norm_that_is_the_whole_model():
    norm = nn.BatchNorm1d(3)
    frozen = ckptsurg.freeze(norm, ckptsurg.make_manifest("**", norm))
    norm.train()
    norm(torch.randn(4, 3))
    assert not norm.training and frozen.verify().ok


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")
@pytest.mark.parametrize("spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_vectors_stand_still(spectral_norm):
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.Linear(16, 2))  # large enough not to have converged
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(["**", "!1"], model))
    model.train()
    model(torch.randn(3, 16))
    assert frozen.verify().ok
    frozen.release()
    model.train()
    model(torch.randn(3, 16))
    assert not frozen.verify().ok


def test_model_stays_what_it_was(model, manifest):
    keys, kind, kinds = list(model.state_dict()), type(model), [type(m) for m in model.modules()]
    ckptsurg.freeze(model, manifest)
    assert list(model.state_dict()) == keys
    assert type(model) is kind and [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_plain_model(model, manifest, copied):
    ckptsurg.freeze(model, manifest)
    twin = copied(model)
    assert type(twin) is type(model) and _bits(twin) == _bits(model)
    twin.train()
    assert twin.bn.training and not model.train().bn.training
    twin(torch.randn(2, 1, 8, 8))
    assert int(twin.bn.num_batches_tracked) == 1 and int(model.bn.num_batches_tracked) == 0


def test_release_restores_what_was_found(model, manifest):
    model.conv.bias.requires_grad_(False)
    model.bn.eval()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    gradient = model.conv.weight.grad
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    frozen = ckptsurg.freeze(model, manifest)
    assert model.conv.weight.grad is None
    frozen.release()
    assert not model.conv.bias.requires_grad and model.conv.weight.requires_grad
    assert model.conv.weight.grad is gradient
    assert not model.bn.training and model.train().bn.training
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    frozen.release()  # a second time does nothing


@pytest.mark.parametrize("first_goes_first", [True, False])
def test_two_freezes_of_one_model(model, manifest, first_goes_first):
    everything = ckptsurg.make_manifest("**", model)
    freezes = [ckptsurg.freeze(model, manifest), ckptsurg.freeze(model, everything)]
    one, other = freezes if first_goes_first else reversed(freezes)
    one.release()
    left = {id(p) for p in other.trainable_parameters()}
    assert left == (set() if first_goes_first else {id(model.fc.weight), id(model.fc.bias)})
    assert not model.train().bn.training
    other.release()
    assert all(p.requires_grad for p in model.parameters()) and model.train().bn.training
    assert "train" not in model.bn.__dict__


def test_a_second_phase_with_its_own_manifest(model, manifest):
    ckptsurg.freeze(model, manifest).release()
    second = ckptsurg.freeze(model, ckptsurg.make_manifest(["**", "!conv", "!bn"], model))
    assert model.conv.weight.requires_grad and not model.fc.weight.requires_grad and model.train().bn.training
    assert second.verify().ok


def test_a_baseline_by_its_path(model, tmp_path):
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "base.safetensors")
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(["**", "!fc"], tmp_path / "base.safetensors"))
    model.scale.data += 0.5
    [difference] = frozen.verify(baseline=tmp_path / "base.safetensors").drifted
    assert difference.detail.max_abs_diff == 0.5


def test_arguments_that_do_not_fit(model, manifest, tmp_path):
    for call in (
        lambda: ckptsurg.freeze(model, manifest, extra="raise"),
        lambda: ckptsurg.plan(5, tmp_path),
        lambda: ckptsurg.plan({"version": 1}, 5),
        lambda: ckptsurg.verify(manifest, None),
        lambda: ckptsurg.verify(manifest, {"a": 3}),
        lambda: ckptsurg.verify("x" * 300, model),
        lambda: ckptsurg.verify("a\0b", model),
        lambda: ckptsurg.make_manifest("{" + ",".join(f"layer{i}.weight" for i in range(99)) + "}", model),
        lambda: ckptsurg.make_manifest({"version": 1, "name": object()}, model),
        lambda: ckptsurg.make_manifest(7, model),
        lambda: ckptsurg.make_manifest("**", {"a": torch.zeros(2, dtype=torch.complex128)}),
        lambda: ckptsurg.make_manifest("**", nn.LazyLinear(3)),
        lambda: ckptsurg.freeze(model, manifest, names={"conv.weight": None}),
        lambda: ckptsurg.freeze(model, manifest, names="x"),
        lambda: ckptsurg.freeze(model, manifest).guard(torch.optim.SGD(model.parameters(), lr=1), every="2"),
    ):
        with pytest.raises(ckptsurg.CkptsurgError):
            call()


def test_release_gives_back_the_mode_that_was_asked_for_last(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    model.eval()
    frozen.release()
    assert not model.bn.training


def test_a_norm_that_was_replaced_is_noticed(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.1)
    twin = nn.BatchNorm2d(4)
    twin.load_state_dict(model.bn.state_dict())
    model.bn = twin.requires_grad_(False)
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"bn\.running_mean.*batchnorm_stats"),
        frozen.guard(optimizer),
    ):
        optimizer.step()


def test_a_guard_is_used_once(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    guard = frozen.guard(torch.optim.SGD(frozen.trainable_parameters(), lr=0.1))
    guard.remove()
    with pytest.raises(ckptsurg.UsageError, match="the guard was removed"):
        guard.__enter__()


def test_training_is_only_turned_off(model, manifest):
    model.fc.bias.requires_grad_(False)
    frozen = ckptsurg.freeze(model, manifest)
    assert [id(p) for p in frozen.trainable_parameters()] == [id(model.fc.weight)]


# --- Refusals ---------------------------------------------------------------------------------------


def _refused(model: nn.Module, manifest, fragment: str, **options) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    with pytest.raises(ckptsurg.FreezeError, match=fragment) as caught:
        ckptsurg.freeze(model, manifest, **options)
    assert caught.value.exit_code == 2
    assert [p.requires_grad for p in model.parameters()] == flags, "a refused model is unchanged"
    assert [m.training for m in model.modules()] == modes


def test_other_bits_are_refused(manifest):
    torch.manual_seed(1)
    _refused(Small(), manifest, r'"conv\.weight" has other bits: not loaded, or from another file')


def test_a_sign_of_zero_is_another_bit(model):
    model.conv.bias.data.zero_()
    manifest = ckptsurg.make_manifest(["**"], model)
    model.conv.bias.data.neg_()
    _refused(model, manifest, r'"conv\.bias" has other bits')


def test_absent_tensors_are_refused(model, manifest):
    del model.norm
    _refused(model, manifest, r'"norm\.weight" is not in the model')


def test_a_reparametrised_tensor_is_named(model, manifest):
    nn.utils.parametrizations.weight_norm(model.conv)
    _refused(model, manifest, r"reparametrised as conv\.parametrizations\.weight\.original0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_refused(model, manifest, dtype):
    found = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]
    _refused(model.to(dtype), manifest, rf"bn\.bias.*: expected F32, found {found}: load the model in the published")


def test_a_wider_dtype_can_be_accepted(model, manifest):
    frozen = ckptsurg.freeze(model.double(), manifest, allow_widened=True)
    report = frozen.verify()
    assert report.ok and {difference.verdict for difference in report.drifted} == {"dtype_only"}
    model.conv.weight.data[0, 0, 0, 0] += 2.0**-50  # a bit that the narrow dtype does not have
    assert not frozen.verify().ok


def test_another_shape_is_refused(model, manifest):
    model.conv.weight = nn.Parameter(torch.zeros(4, 1, 3, 2))
    _refused(model, manifest, r"conv\.weight: has another shape; expected F32 \[4, 1, 3, 3\], found F32 \[4, 1, 3, 2\]")


def test_meta_tensors_are_refused(manifest):
    with torch.device("meta"):
        empty = Small()
    _refused(empty, manifest, "is on the meta device: it has no values yet")


def test_a_strided_element_has_bytes_too():
    model = nn.Module()
    model.scale = nn.Parameter(torch.arange(4.0)[3::2])
    model.rows = nn.Parameter(torch.arange(10.0)[::2])
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(["scale", {"match": "rows", "rows": "[:1]"}], model))
    assert frozen.moved() == [] and frozen.verify().ok
    model.scale.data += 1
    assert frozen.moved() == ["scale"]


def test_quantised_tensors_are_refused(model, manifest):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop these tensors; checkpoints have them still
        quantised = torch.quantize_per_tensor(torch.rand(4, 1, 3, 3), 0.1, 0, torch.quint8)
    model.conv.weight = nn.Parameter(quantised, requires_grad=False)
    _refused(model, manifest, r'"conv\.weight" is quantised')


def test_nothing_frozen_is_an_error(model):
    manifest = ckptsurg.make_manifest({"version": 1}, model)
    with pytest.raises(ckptsurg.ManifestError, match="nothing is frozen: there is nothing to prove"):
        ckptsurg.freeze(model, manifest)


# --- Shared storage ---------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_a_frozen_tensor_tied_to_a_trainable_one_is_refused():
    model = Tied(tie=False)
    model.head.weight.data = model.embed.weight.data.clone()
    manifest = ckptsurg.make_manifest(["**", "!head"], model)
    model.head.weight = model.embed.weight
    _refused(model, manifest, '"embed.weight" is frozen and shares its storage with "head.weight", which trains')


def test_a_view_of_a_frozen_tensor_is_refused(model, manifest):
    model.fc.weight = nn.Parameter(model.conv.weight.data.view(-1)[:12].view(3, 4))
    _refused(model, manifest, '"conv.weight" is frozen and shares its storage with "fc.weight"')


def test_neighbours_in_one_storage_are_not_tied(model):
    flat = torch.cat([model.conv.weight.data.view(-1), model.fc.weight.data.view(-1)])
    model.conv.weight.data, model.fc.weight.data = flat[:36].view(4, 1, 3, 3), flat[36:].view(3, 4)
    manifest = ckptsurg.make_manifest(["**", "!fc"], model)
    assert ckptsurg.freeze(model, manifest).verify().ok


def test_tied_tensors_that_are_both_frozen():
    model = Tied()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest("**", model))
    assert frozen.verify().verified == 2 and not model.embed.weight.requires_grad
    frozen.release()
    assert model.embed.weight.requires_grad


def test_a_second_name_of_a_frozen_parameter_is_no_extra():
    model = Tied()
    manifest = ckptsurg.make_manifest("embed", nn.ModuleDict({"embed": model.embed}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = ckptsurg.freeze(model, manifest)
    assert frozen.extra == () and frozen.trainable_parameters() == []


# --- Extra parameters, names ------------------------------------------------------------------------


def test_extra_parameters_are_kept_listed_and_warned_of_once(model, manifest):
    model.adapter = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"adapter\.weight, adapter\.bias") as caught:
        frozen = ckptsurg.freeze(model, manifest)
    assert len(caught) == 1
    assert frozen.extra == ("adapter.weight", "adapter.bias") and model.adapter.weight.requires_grad


def test_extra_parameters_can_be_forbidden(model, manifest):
    model.adapter = nn.Linear(2, 2)
    _refused(model, manifest, r"parameters that the manifest lacks: adapter\.weight", extra="error")


def _wrapped_in_data_parallel(model: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.module = model
    return holder


@pytest.mark.parametrize("wrap", [_wrapped_in_data_parallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_names_are_seen_through(model, manifest, wrap):
    frozen = ckptsurg.freeze(wrap(model), manifest)
    assert not model.conv.weight.requires_grad and not model.train().bn.training
    assert frozen.verify().ok


@pytest.mark.parametrize(
    "names",
    [lambda name: name.replace("conv", "stem"), {"conv.weight": "stem.weight", "conv.bias": "stem.bias"}],
    ids=["function", "mapping"],
)
def test_names_bridge_model_and_manifest(model, names):
    published = {("stem" + name[4:] if name.startswith("conv") else name): t for name, t in model.state_dict().items()}
    manifest = ckptsurg.make_manifest(["**", "!fc"], published)
    frozen = ckptsurg.freeze(model, manifest, names=names)
    assert not model.conv.weight.requires_grad and frozen.verify().verified == manifest.counts["frozen"]


# --- Guard ------------------------------------------------------------------------------------------


def test_guard_catches_what_is_thawed_before_it_moves(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = _bits(model)
    with frozen.guard(optimizer), pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"conv\.weight; cause: reenabled"):
        model.conv.weight.requires_grad_(True)
        _step(model, optimizer)
    assert {name for name, bits in _bits(model).items() if bits != before[name]} == set()


def test_guard_catches_a_gradient_that_is_not_none(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.conv.weight.grad = torch.zeros_like(model.conv.weight)
    guard = frozen.guard(optimizer)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"conv\.weight; cause: zero_grad_not_none"):
        optimizer.step()
    guard.remove()
    optimizer.step()
    assert not frozen.verify().ok


def test_guard_catches_statistics_that_move(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.1)
    with (
        frozen.guard(optimizer),
        pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"bn\.running_mean.*batchnorm_stats"),
    ):
        for module in model.modules():
            module.training = True
        optimizer.step()


def test_guard_proves_at_the_end(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.1)
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"scale: bits changed") as caught,
        frozen.guard(optimizer) as guard,
    ):
        _step(model, optimizer)
        model.scale.data += 1e-7
    assert caught.value.exit_code == 1
    assert guard.steps == 1 and guard.cost().endswith("over 1 step")


def test_guard_can_prove_every_so_many_steps(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.1)
    guard = frozen.guard(optimizer, every=2)
    model.scale.data += 1e-7
    _step(model, optimizer)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="scale"):
        _step(model, optimizer)
    guard.remove()
    _step(model, optimizer)


def test_guard_hides_no_exception(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.1)
    with pytest.raises(KeyError, match="mine"), frozen.guard(optimizer):
        model.scale.data += 1
        raise KeyError("mine")


def test_guard_looks_parameters_up_afresh(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.1)
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"conv\.weight; cause: reenabled"),
        frozen.guard(optimizer),
    ):
        model.conv.weight = nn.Parameter(model.conv.weight.detach().clone())
        _step(model, optimizer)
