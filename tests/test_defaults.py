"""``default`` is what a fresh torch module holds; ``like`` and ``keep``; and what cannot be drawn is refused."""

from __future__ import annotations

import json
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import stats
from torch import nn

import ckptsurg

ALPHA = 1e-4


def rewritten(tmp_path: Path, tensors: dict[str, torch.Tensor], **spec) -> dict[str, torch.Tensor]:
    """What a spec makes of tensors, through files."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, tmp_path / "base.safetensors")
    ckptsurg.rewrite({"version": 1, **spec}, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    return safetensors.torch.load_file(tmp_path / "out.safetensors")


def reinitialised(tmp_path, tensors, init, **rule) -> dict[str, torch.Tensor]:
    return rewritten(tmp_path, tensors, reinit=[{"match": "**", "init": init, **rule}])


def refusal(tmp_path, tensors, **spec) -> str:
    with pytest.raises(ckptsurg.SpecError) as caught:
        rewritten(tmp_path, tensors, **spec)
    assert not (tmp_path / "out.safetensors").exists()
    return str(caught.value)


def pooled(states: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The values of all copies of a module by the tensor's name within it."""
    pools: dict[str, list[torch.Tensor]] = {}
    for name, tensor in states.items():
        pools.setdefault(name.split(".", 1)[1], []).append(tensor.flatten())
    return {leaf: torch.cat(parts).double().numpy() for leaf, parts in pools.items()}


def assert_same_distribution(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    if np.ptp(expected) == 0:
        assert np.array_equal(found, expected)
        return
    assert stats.ks_2samp(found, expected, method="asymp").pvalue > ALPHA
    assert abs(found.mean() - expected.mean()) < 5 * sqrt(2 * expected.var() / expected.size)
    spread = sqrt((found**2).var() / found.size + (expected**2).var() / expected.size)
    assert abs((found**2).mean() - (expected**2).mean()) < 5 * spread


# --- A fresh module -----------------------------------------------------------------------------------

MODULES = {
    "Linear": (lambda: nn.Linear(60, 90), "default", 100),
    "Linear, no bias": (lambda: nn.Linear(60, 90, bias=False), {"default": "Linear"}, 10),
    "Linear, named": (lambda: nn.Linear(7, 90), {"default": "Linear"}, 100),
    "Linear, square": (lambda: nn.Linear(40, 40), "default", 200),
    "Conv1d": (lambda: nn.Conv1d(12, 60, 5), "default", 100),
    "Conv1d, no bias": (lambda: nn.Conv1d(12, 60, 5, bias=False), "default", 10),
    "Conv2d": (lambda: nn.Conv2d(6, 60, 3), "default", 100),
    "Conv2d, groups": (lambda: nn.Conv2d(12, 60, 3, groups=6), "default", 100),
    "Conv2d, depthwise, no bias": (lambda: nn.Conv2d(60, 60, 5, groups=60, bias=False), "default", 20),
    "Conv2d, 1x1, named": (lambda: nn.Conv2d(6, 60, 1), {"default": "Conv2d"}, 100),
    "Conv3d": (lambda: nn.Conv3d(4, 40, (1, 2, 3)), "default", 100),
    "Conv3d, groups, no bias": (lambda: nn.Conv3d(4, 40, 3, groups=2, bias=False), "default", 20),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(10, 50, 4), "default", 100),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(10, 50, 3), "default", 60),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(10, 50, 3, groups=5), {"default": "ConvTranspose2d"}, 60),
    "ConvTranspose3d, no bias": (lambda: nn.ConvTranspose3d(8, 5, 3, bias=False), "default", 10),
    "Embedding": (lambda: nn.Embedding(500, 20), {"default": "Embedding"}, 5),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(500, 20), {"default": "EmbeddingBag"}, 5),
    "Bilinear": (lambda: nn.Bilinear(5, 20, 60), {"default": "Bilinear"}, 100),
    "LayerNorm": (lambda: nn.LayerNorm(8), "default", 2),
    "LayerNorm, 2-d": (lambda: nn.LayerNorm((3, 8)), "default", 2),
    "LayerNorm, no bias": (lambda: nn.LayerNorm(8, bias=False), {"default": "LayerNorm"}, 2),
    "RMSNorm": (lambda: nn.RMSNorm(8), {"default": "RMSNorm"}, 2),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), "default", 2),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), {"default": "BatchNorm2d"}, 2),
    "BatchNorm3d, not affine": (lambda: nn.BatchNorm3d(8, affine=False), "default", 2),
    "BatchNorm2d, no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), "default", 2),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(8), "default", 2),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), "default", 2),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(8, affine=True), "default", 2),
    "InstanceNorm2d, statistics": (lambda: nn.InstanceNorm2d(8, track_running_stats=True), "default", 2),
    "InstanceNorm3d, all": (lambda: nn.InstanceNorm3d(8, affine=True, track_running_stats=True), "default", 2),
    "PReLU": (lambda: nn.PReLU(5), {"default": "PReLU"}, 2),
    "LSTM": (lambda: nn.LSTM(7, 20, num_layers=2, bidirectional=True), "default", 60),
    "LSTM, projected": (lambda: nn.LSTM(7, 40, proj_size=5), "default", 60),
    "GRU": (lambda: nn.GRU(7, 20), "default", 100),
    "RNN": (lambda: nn.RNN(7, 30), {"default": "RNN"}, 100),
    "RNN, no bias": (lambda: nn.RNN(7, 30, bias=False), "default", 60),
}


def fresh(factory, copies: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"m{number}.{leaf}": tensor for number in range(copies) for leaf, tensor in factory().state_dict().items()}


@pytest.mark.parametrize("case", MODULES)
def test_default_is_distributed_as_a_fresh_module(tmp_path, case):
    factory, init, copies = MODULES[case]
    expected = fresh(factory, copies, 1)
    base = {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}
    found = reinitialised(tmp_path, base, init)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    wanted = pooled(expected)
    for leaf, values in pooled(found).items():
        assert_same_distribution(values, wanted[leaf])


@pytest.mark.parametrize("separate", [False, True])
def test_default_of_attention_projections(tmp_path, separate):
    def factory():
        return nn.MultiheadAttention(24, 2, kdim=10 if separate else None, vdim=16 if separate else None)

    expected = {name: t for name, t in fresh(factory, 20, 1).items() if "out_proj" not in name}
    found = reinitialised(tmp_path, {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}, "default")
    wanted = pooled(expected)
    assert ("q_proj_weight" in wanted) == separate
    for leaf, values in pooled(found).items():
        assert_same_distribution(values, wanted[leaf])


def test_default_of_attention_appended_biases(tmp_path):
    expected = fresh(lambda: nn.MultiheadAttention(60, 2, add_bias_kv=True), 100, 1)
    expected = {name: tensor for name, tensor in expected.items() if name.endswith(("bias_k", "bias_v"))}
    base = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    found, wanted = pooled(reinitialised(tmp_path, base, {"default": "MultiheadAttention"})), pooled(expected)
    for leaf in ("bias_k", "bias_v"):
        assert_same_distribution(found[leaf], wanted[leaf])


def test_the_counter_of_batches_begins_at_zero_and_stays_whole(tmp_path):
    norm = nn.BatchNorm2d(3)
    norm.num_batches_tracked.fill_(99)
    found = reinitialised(tmp_path, {f"bn.{leaf}": tensor for leaf, tensor in norm.state_dict().items()}, "default")
    assert found["bn.num_batches_tracked"].dtype == torch.int64
    assert found["bn.num_batches_tracked"].item() == 0


def test_default_reads_the_new_shapes_of_siblings(tmp_path):
    base = {"fc.weight": torch.zeros(4, 6), "fc.bias": torch.zeros(4)}
    rules = [
        {"match": "fc.weight", "shape": [20_000, 400], "init": "default"},
        {"match": "fc.bias", "shape": [20_000], "init": "default"},
    ]
    found = rewritten(tmp_path, base, reinit=rules)
    assert 0.999 / 20 < found["fc.bias"].abs().max() < 1 / 20
    assert 0.999 / 20 < found["fc.weight"].abs().max() <= 1 / 20


def test_default_of_a_bias_alone_needs_only_the_weight_beside_it(tmp_path):
    base = {"fc.weight": torch.ones(20_000, 9), "fc.bias": torch.zeros(20_000)}
    found = rewritten(tmp_path, base, reinit=[{"match": "fc.bias", "init": "default"}])
    assert torch.equal(found["fc.weight"], base["fc.weight"])
    assert stats.kstest(found["fc.bias"].numpy(), stats.uniform(-1 / 3, 2 / 3).cdf).pvalue > ALPHA


def test_default_of_an_added_module_reads_its_added_siblings(tmp_path):
    add = [
        {"name": "head.weight", "shape": [20_000, 25], "dtype": "F32", "init": "default"},
        {"name": "head.bias", "shape": [20_000], "dtype": "F32", "init": "default"},
    ]
    found = rewritten(tmp_path, {"a": torch.zeros(1)}, add=add)
    for leaf in ("weight", "bias"):
        assert 0.999 / 5 < found[f"head.{leaf}"].abs().max() <= 0.2


def test_default_is_the_initializer_it_stands_for(tmp_path):
    base = {"fc.weight": torch.zeros(30, 40), "fc.bias": torch.zeros(30)}
    by_default = reinitialised(tmp_path / "a", base, "default")
    bound = 1 / sqrt(40)
    by_name = rewritten(
        tmp_path / "b",
        base,
        reinit=[
            {"match": "fc.weight", "init": {"kaiming_uniform": {"a": sqrt(5)}}},
            {"match": "fc.bias", "init": {"uniform": {"a": -bound, "b": bound}}},
        ],
    )
    assert all(torch.equal(by_default[name], by_name[name]) for name in base)


AMBIGUOUS = {
    "2-d weight alone": ({"x.weight": (5, 4)}, "x.weight", ["init: {default: Linear}", "init: {default: Embedding}"]),
    "1-d weight alone": ({"x.weight": (5,)}, "x.weight", ["init: {default: RMSNorm}", "init: {default: PReLU}"]),
    "no weight": ({"x.scale": (5,)}, "x.scale", ["init: {default: Linear}"]),
    "no segment": ({"queries": (5, 4)}, "queries", ["init: {default: Linear}"]),
    "bias without weight": ({"x.bias": (5,)}, "x.bias", ["init: {default: Linear}"]),
    "other module's weight": ({"x.bias": (5,), "y.weight": (5, 4)}, "x.bias", ["init: {default: Linear}"]),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_an_ambiguous_default_says_the_line_to_type(tmp_path, case):
    shapes, match, lines = AMBIGUOUS[case]
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    message = refusal(tmp_path, base, reinit=[{"match": match, "init": "default"}])
    assert "reinit[0].init" in message
    assert match in message
    for line in lines:
        assert line in message


def test_the_line_to_type_is_accepted(tmp_path):
    for init, leaf, shape in (("Linear", "weight", (5, 4)), ("Embedding", "weight", (5, 4)), ("PReLU", "weight", (5,))):
        found = reinitialised(tmp_path / init, {f"x.{leaf}": torch.zeros(shape)}, {"default": init})
        assert found[f"x.{leaf}"].all()


@pytest.mark.parametrize(
    ("init", "leaf", "shape", "words"),
    [
        ({"default": "Linear"}, "weight", (5,), "no shape of such a module's weight"),
        ({"default": "Linear"}, "bias", (5,), "fan-in of the weight beside this bias"),
        ({"default": "Bilinear"}, "weight", (5, 4), "3 dimensions"),
        ({"default": "LSTM"}, "weight_ih_l0", (20, 4), "weight_hh_l0"),
        ({"default": "Linea"}, "weight", (5, 4), "Linear"),
        ({"default": {"module": "Nonsense"}}, "weight", (5, 4), "unknown module"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(tmp_path, init, leaf, shape, words):
    message = refusal(tmp_path, {f"x.{leaf}": torch.zeros(shape)}, reinit=[{"match": f"x.{leaf}", "init": init}])
    assert words in message


# --- Like ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_like_has_the_old_mean_and_deviation(tmp_path, dtype):
    torch.manual_seed(2)
    old = (torch.rand(300, 500) * 0.3 - 2).to(dtype)
    found = reinitialised(tmp_path, {"w": old}, "like", shape={0: 700})["w"].double().flatten()
    assert found.shape == (700 * 500,)
    mean, std = old.double().mean().item(), old.double().std(correction=0).item()
    expected = torch.normal(mean, std, (350_000,), dtype=torch.float64).to(dtype).double()
    assert_same_distribution(found.numpy(), expected.numpy())


def test_like_takes_the_exact_moments_of_the_old_values(tmp_path):
    old = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    found = reinitialised(tmp_path / "a", {"w": old}, "like")
    named = {"normal": {"mean": 4.0, "std": sqrt((9 + 4 + 1 + 36) / 4)}}
    assert torch.equal(found["w"], reinitialised(tmp_path / "b", {"w": old}, named)["w"])


def test_like_over_many_chunks(tmp_path):
    old = torch.arange(2_000_003, dtype=torch.float64) % 1009 - 1e6
    found = reinitialised(tmp_path, {"w": old}, "like")["w"]
    assert found.mean().item() == pytest.approx(old.mean().item(), abs=5 * 291 / sqrt(len(old)))
    assert found.std().item() == pytest.approx(old.std().item(), rel=0.005)


def test_like_one_value_is_that_value(tmp_path):
    assert (
        reinitialised(tmp_path, {"w": torch.full((5,), 0.3)}, "like", shape=[9])["w"].tolist()
        == [pytest.approx(0.3)] * 9
    )


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_like_values_that_are_not_finite_is_refused(tmp_path, odd, dtype):
    old = torch.ones(1000)
    old[777] = odd
    with pytest.raises(ckptsurg.SpecError, match=r'reinit\[0\]: like: "w" has values that are not finite'):
        reinitialised(tmp_path, {"w": old.to(dtype)}, "like")
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_like_nothing_is_refused(tmp_path):
    with pytest.raises(ckptsurg.CkptsurgError, match="no values to be like"):
        reinitialised(tmp_path, {"w": torch.zeros(0, 3)}, "like", shape={0: 3})


def test_like_an_added_tensor_is_refused(tmp_path):
    add = [{"name": "new", "shape": [3], "dtype": "F32", "init": "like"}]
    assert "write normal with mean and std" in refusal(tmp_path, {"w": torch.zeros(1)}, add=add)


# --- Keep ---------------------------------------------------------------------------------------------


def assert_kept(found: torch.Tensor, old: torch.Tensor, all_new: torch.Tensor) -> None:
    """The overlap has the old bits, the rest those of a draw without ``keep``; numpy's slices are the oracle."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    expected = all_new.view(integer).numpy().copy()
    overlap = tuple(slice(min(sizes)) for sizes in zip(old.shape, all_new.shape, strict=True))
    expected[overlap] = old.view(integer).numpy()[overlap]
    assert np.array_equal(found.view(integer).numpy(), expected)


def old_values(shape, dtype) -> torch.Tensor:
    """Any bits at all, NaN with payloads among them."""
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    bits = np.random.default_rng(prod(shape)).integers(0, 256, prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(bits).view(dtype).reshape(shape)


SIZES = [
    ((5,), (9,)),
    ((9,), (5,)),
    ((5,), (5,)),
    ((5,), (0,)),
    ((0,), (5,)),
    ((), ()),
    ((3, 4), (6, 4)),
    ((3, 4), (3, 7)),
    ((3, 4), (2, 4)),
    ((3, 4), (3, 1)),
    ((3, 4), (5, 2)),
    ((3, 4), (2, 9)),
    ((3, 4), (6, 8)),
    ((3, 4), (1, 1)),
    ((0, 4), (3, 4)),
    ((3, 0), (3, 4)),
    ((3, 4), (3, 0)),
    ((1, 1, 1), (4, 3, 2)),
    ((4, 3, 2), (4, 1, 2)),
    ((4, 3, 3, 3), (6, 3, 3, 3)),
    ((4, 3, 3, 3), (4, 5, 3, 3)),
    ((4, 3, 3, 3), (4, 3, 5, 3)),
    ((4, 3, 3, 3), (4, 3, 3, 1)),
    ((4, 3, 3, 3), (2, 5, 1, 7)),
    ((4, 3, 3, 3), (8, 1, 5, 2)),
    ((70_000, 3), (80_000, 3)),
    ((300, 400), (290, 410)),
    ((2, 70_000), (3, 66_000)),
]


def random_sizes(count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rng = np.random.default_rng(11)
    pairs = []
    for rank in rng.integers(1, 6, count):
        old, new = rng.integers(0, 5, (2, rank)).tolist()
        pairs.append((tuple(old), tuple(new)))
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.complex64])
def test_the_overlap_keeps_its_bits_and_the_rest_is_drawn(tmp_path, dtype):
    sizes = SIZES + random_sizes(80)
    base = {f"w{number}": old_values(old, dtype) for number, (old, _) in enumerate(sizes)}
    rules = [
        {"match": f"w{number}", "shape": list(new), "init": "normal"}
        if new
        else {"match": f"w{number}", "init": "normal"}
        for number, (_, new) in enumerate(sizes)
    ]
    kept = rewritten(tmp_path / "kept", base, reinit=[{**rule, "keep": True} for rule in rules])
    drawn = rewritten(tmp_path / "drawn", base, reinit=rules)
    for number, (_, new) in enumerate(sizes):
        name = f"w{number}"
        assert kept[name].shape == new
        assert_kept(kept[name], base[name], drawn[name])


@pytest.mark.parametrize(
    "init", ["like", {"default": "Embedding"}, "zeros", "orthogonal", {"sparse": {"sparsity": 0.5}}]
)
@pytest.mark.parametrize("shape", [{0: 9}, {1: 11}, {-1: 2, 0: 12}, {"0": 3, "-1": 7}])
def test_keep_goes_with_every_initializer(tmp_path, init, shape):
    base = {"emb.weight": torch.randn(6, 5, generator=torch.Generator().manual_seed(0))}
    kept = reinitialised(tmp_path / "kept", base, init, shape=shape, keep=True)["emb.weight"]
    drawn = reinitialised(tmp_path / "drawn", base, init, shape=shape)["emb.weight"]
    wanted = [6, 5]
    for dimension, size in shape.items():
        wanted[int(dimension)] = size
    assert list(kept.shape) == wanted
    assert_kept(kept, base["emb.weight"], drawn)


def test_keep_without_a_new_shape_is_a_copy(tmp_path):
    base = {"w": torch.randn(6, 5, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(reinitialised(tmp_path, base, "normal", keep=True)["w"], base["w"])


def test_keep_needs_as_many_dimensions(tmp_path):
    rule = {"match": "w", "shape": [3, 4, 1], "init": "zeros", "keep": True}
    message = refusal(tmp_path, {"w": torch.zeros(3, 4)}, reinit=[rule])
    assert "reinit[0].shape" in message
    assert "w is F32 [3, 4]; the new shape has 3 dimensions" in message


@pytest.mark.parametrize("shape", [{2: 5}, {-3: 5}, {0: 5, -2: 6}, {0: -1}, [3, -4]])
def test_a_dimension_that_is_not_there_is_refused(tmp_path, shape):
    rule = {"match": "w", "shape": shape, "init": "zeros"}
    assert "reinit[0].shape" in refusal(tmp_path, {"w": torch.zeros(3, 4)}, reinit=[rule])


# --- What cannot be drawn -----------------------------------------------------------------------------

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
BITS |= {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "F8_E4M3": 8, "F8_E4M3FNUZ": 8}


def plan_of(tmp_path: Path, dtype: str, shape: tuple[int, ...], init, name: str = "w") -> ckptsurg.Plan:
    """The plan for one tensor of zero bytes, of whatever dtype the format has."""
    size = prod(shape) * BITS[dtype] // 8
    header = json.dumps({name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}}).encode()
    path = tmp_path / "base.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return ckptsurg.plan({"version": 1, "reinit": [{"match": name, "init": init}]}, path)


@pytest.mark.parametrize("init", ["zeros", "normal", "like", {"constant": {"val": 1}}, {"default": "Linear"}], ids=str)
@pytest.mark.parametrize(
    "dtype", [d for d in BITS if d[0] in "BUI" and d != "BF16"] + ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"]
)
def test_integers_bools_and_exotic_floats_are_refused(tmp_path, dtype, init):
    with pytest.raises(ckptsurg.SpecError, match=rf"reinit\[0\]\.init: w: {dtype} cannot be drawn; only F64, F32"):
        plan_of(tmp_path, dtype, (4, 4), init)


def test_integers_are_refused_for_an_added_tensor(tmp_path):
    add = [{"name": "ids", "shape": [3], "dtype": "I64", "init": "zeros"}]
    assert "add[0].init: ids: I64 cannot be drawn" in refusal(tmp_path, {"w": torch.zeros(1)}, add=add)


@pytest.mark.parametrize("module", ["Embedding", "PReLU"])
def test_a_counter_is_drawn_only_as_the_zero_of_a_norm(tmp_path, module):
    with pytest.raises(ckptsurg.SpecError, match="I64 cannot be drawn"):
        plan_of(tmp_path, "I64", (), {"default": module}, "bn.num_batches_tracked")


@pytest.mark.parametrize(
    ("init", "ranks"),
    [
        ("xavier_uniform", {0, 1}),
        ("xavier_normal", {0, 1}),
        ("kaiming_uniform", {0, 1}),
        ("kaiming_normal", {0, 1}),
        ("orthogonal", {0, 1}),
        ("eye", {0, 1, 3, 4, 5, 6}),
        ({"sparse": {"sparsity": 0.5}}, {0, 1, 3, 4, 5, 6}),
        ("dirac", {0, 1, 2, 6}),
        ("normal", set()),
        ("uniform", set()),
        ("trunc_normal", set()),
        ("zeros", set()),
        ("like", set()),
    ],
    ids=str,
)
def test_each_initializer_has_its_ranks_as_torchs(tmp_path, init, ranks):
    name = init if isinstance(init, str) else next(iter(init))
    for rank in range(7):
        shape = (2,) * rank
        if name != "like":
            try:
                getattr(nn.init, f"{name}_")(torch.empty(shape), **(init[name] if isinstance(init, dict) else {}))
            except ValueError:
                assert rank in ranks
            else:
                assert rank not in ranks
        if rank in ranks:
            with pytest.raises(
                ckptsurg.SpecError, match=rf"{name} draws tensors of .*, this one has {rank}: \[[2, ]*\]"
            ):
                plan_of(tmp_path, "F32", shape, init)
        else:
            assert plan_of(tmp_path, "F32", shape, init).counts["reinit"] == 1


def test_the_rank_that_counts_is_that_of_the_new_shape(tmp_path):
    rule = {"match": "w", "shape": [8], "init": "xavier_uniform"}
    assert "this one has 1: [8]" in refusal(tmp_path / "a", {"w": torch.zeros(2, 2)}, reinit=[rule])
    rule = {"match": "w", "shape": [2, 4], "init": "xavier_uniform"}
    assert rewritten(tmp_path / "b", {"w": torch.zeros(3)}, reinit=[rule])["w"].shape == (2, 4)


@pytest.mark.parametrize(
    "init",
    [
        "uniform",
        "trunc_normal",
        "xavier_uniform",
        "kaiming_uniform",
        "orthogonal",
        {"sparse": {"sparsity": 0.1}},
        "like",
    ],
    ids=str,
)
def test_complex_numbers_are_not_drawn_by_real_formulas(tmp_path, init):
    with pytest.raises(ckptsurg.SpecError, match="does not draw complex numbers"):
        plan_of(tmp_path, "C64", (4, 4), init)


@pytest.mark.parametrize("init", ["normal", "xavier_normal", "kaiming_normal", "zeros", "ones", "eye"])
def test_complex_numbers_are_drawn_by_the_others(tmp_path, init):
    assert plan_of(tmp_path, "C64", (4, 4), init).tensors[0].init.name == init


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("F16", 65504.0), ("F8_E4M3", 448.0), ("F8_E4M3FNUZ", 240.0), ("BF16", 3.3895e38), ("F32", 3.4028e38)],
)
def test_a_constant_out_of_range_is_refused(tmp_path, dtype, largest):
    for sign in (1, -1):
        assert plan_of(tmp_path, dtype, (2,), {"constant": {"val": sign * largest}}).counts["reinit"] == 1
        with pytest.raises(ckptsurg.SpecError, match=f"is out of the range of {dtype}"):
            plan_of(tmp_path, dtype, (2,), {"constant": {"val": sign * largest * 1.01}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("argument", [("constant", "val"), ("normal", "mean"), ("normal", "std"), ("uniform", "b"),
                                      ("xavier_normal", "gain"), ("kaiming_normal", "a")], ids=str)  # fmt: skip
def test_an_argument_that_is_not_finite_is_refused(tmp_path, argument, value):
    initializer, key = argument
    with pytest.raises(ckptsurg.SpecError, match=r"reinit\[0\]"):
        plan_of(tmp_path, "F64", (4, 4), {initializer: {key: value}})


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("constant", 'constant: the argument "val" is missing'),
        ("sparse", 'sparse: the argument "sparsity" is missing'),
        ({"sparse": {"std": 0.1}}, 'sparse: the argument "sparsity" is missing'),
        ({"normal": {"sdt": 0.1}}, 'normal: unknown argument "sdt"; nearest: std'),
        ({"zeros": {"val": 0}}, 'zeros: unknown argument "val"; it takes none'),
        ({"normal": 0.02}, "the arguments have names; write {normal: {mean: 0.02}}"),
        ({"normal": {"std": -1}}, "normal: std:"),
        ({"normal": {"std": "0.02"}}, "normal: std:"),
        ({"normal": {"std": True}}, "normal: std:"),
        ({"trunc_normal": {"std": -1}}, "trunc_normal: std:"),
        ({"uniform": {"a": 2, "b": 1}}, "uniform: a (2.0) must not be above b (1.0)"),
        ({"uniform": {"a": 2}}, "uniform: a (2.0) must not be above b (1.0)"),
        ({"trunc_normal": {"a": 3}}, "trunc_normal: a (3.0) must not be above b (2.0)"),
        ({"sparse": {"sparsity": 1.1}}, "sparse: sparsity:"),
        ({"kaiming_normal": {"mode": "fan_mid"}}, "kaiming_normal: mode:"),
        ({"kaiming_normal": {"nonlinearity": "gelu"}}, "kaiming_normal: nonlinearity:"),
        ({"dirac": {"groups": 0}}, "dirac: groups:"),
        ({"dirac": {"groups": 1.5}}, "dirac: groups:"),
        ("normal_", 'unknown initializer "normal_"; nearest: normal'),
        ("xavier", "unknown initializer"),
        ({"zeros": None, "ones": None}, "expected an initializer"),
        ([], "expected an initializer"),
        (0, "expected an initializer"),
        (None, "expected an initializer"),
    ],
    ids=str,
)
def test_a_slip_in_an_initializer_is_explained(tmp_path, init, words):
    with pytest.raises(ckptsurg.SpecError) as caught:
        plan_of(tmp_path, "F32", (4, 4), init)
    assert "reinit[0].init" in str(caught.value)
    assert words in str(caught.value)


def test_dirac_needs_whole_groups(tmp_path):
    with pytest.raises(ckptsurg.SpecError, match="5 output channels cannot be parted into 2 groups"):
        plan_of(tmp_path, "F32", (5, 2, 3), {"dirac": {"groups": 2}})


def test_all_refusals_are_said_at_once(tmp_path):
    base = {"a": torch.zeros(3), "b": torch.zeros(3, dtype=torch.int64), "c.weight": torch.zeros(3, 3)}
    rules = [
        {"match": "a", "init": "xavier_normal"},
        {"match": "b", "init": "zeros"},
        {"match": "c", "init": "default"},
    ]
    message = refusal(tmp_path, base, reinit=rules)
    assert all(f"reinit[{position}].init" in message for position in range(3))
    assert len(message.splitlines()) == 3


def test_a_draw_out_of_range_publishes_nothing(tmp_path):
    base = {"w": torch.zeros(1000, dtype=torch.float16)}
    with pytest.raises(ckptsurg.CkptsurgError, match='"w": a drawn value is out of the range of F16'):
        reinitialised(tmp_path, base, {"normal": {"std": 1e6}})
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("init", ["default", {"default": "MultiheadAttention"}])
def test_the_projection_out_of_attention(tmp_path, init):
    attention = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(64, 4)})
    safetensors.torch.save_file(
        {name: tensor + 1 for name, tensor in attention.state_dict().items()}, tmp_path / "base.safetensors"
    )
    spec = {"version": 1, "reinit": [{"match": "attn", "init": init}]}
    ckptsurg.rewrite(spec, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    drawn = safetensors.torch.load_file(tmp_path / "out.safetensors")
    for name, fresh in attention.state_dict().items():
        assert float(drawn[name].std()) == pytest.approx(float(fresh.std()), rel=0.05), name
