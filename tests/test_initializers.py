"""What is drawn has the distributions of ``torch.nn.init``, and can be read in any part and order."""

from __future__ import annotations

import functools
import inspect
import operator
import struct
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import ceil, fsum, prod, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import special, stats

from ckptsurg import random_bits
from ckptsurg.initializer_arguments import Init, Initializer
from ckptsurg.initializers import Drawing, Undrawable, rounded
from ckptsurg.moments import MeanRow
from ckptsurg.tensors import BLOCK_ELEMENTS as BLOCK
from ckptsurg.tensors import CHUNK_BYTES, TensorInfo

from .architectures import DTYPES

ALPHA = 1e-4
NARROW = [dtype for dtype in DTYPES if dtype not in ("F64", "F32", "C64")]
TORCH_NAMES = sorted(name[:-1] for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_"))


def parsed(written) -> Initializer:
    return TypeAdapter(Init).validate_python(written)


def drawing(written, shape, dtype="F32", seed=0, name="w") -> Drawing:
    return Drawing(seed, name, TensorInfo(dtype, tuple(shape)), parsed(written))


def raw(written, shape, dtype="F32", seed=0, name="w") -> bytes:
    return b"".join(drawing(written, shape, dtype, seed, name).read(0, prod(shape)))


def drawn(written, shape, dtype="F32", seed=0, name="w") -> torch.Tensor:
    data = bytearray(raw(written, shape, dtype, seed, name))
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)


def by_torch(written, shape, dtype=torch.float64, seed=1) -> torch.Tensor:
    """What torch.nn.init draws, in double precision unless told."""
    torch.manual_seed(seed)
    name, arguments = (written, {}) if isinstance(written, str) else next(iter(written.items()))
    return getattr(torch.nn.init, f"{name}_")(torch.empty(shape, dtype=dtype), **arguments)


def assert_same_distribution(found: torch.Tensor, expected: torch.Tensor) -> None:
    one, other = found.double().flatten().numpy(), expected.double().flatten().numpy()
    assert stats.ks_2samp(one, other, method="asymp").pvalue > ALPHA
    assert stats.ks_2samp(np.abs(one), np.abs(other), method="asymp").pvalue > ALPHA
    for power in (1, 2):
        a, b = one**power, other**power
        assert abs(a.mean() - b.mean()) <= 5 * sqrt(a.var() / a.size + b.var() / b.size)


# --- The signatures are torch's -----------------------------------------------------------------------


def test_every_initializer_of_torch_is_known_by_its_name_and_arguments():
    assert len(TORCH_NAMES) == 14
    for name in TORCH_NAMES:
        parameters = inspect.signature(getattr(torch.nn.init, f"{name}_")).parameters
        wanted = {key: p for key, p in parameters.items() if key not in ("tensor", "generator")}
        required = {key: 0.5 for key, parameter in wanted.items() if parameter.default is parameter.empty}
        defaults = {key: parameter.default for key, parameter in wanted.items() if key not in required}
        assert parsed({name: required} if required else name).arguments == required | defaults


# --- Distributions ------------------------------------------------------------------------------------

DISTRIBUTIONS = [
    ("uniform", (100_000,)),
    ({"uniform": {"a": -3.0, "b": -1.0}}, (50, 40, 5, 5)),
    ({"uniform": {"a": 2.0, "b": 2.0}}, (9,)),
    ("normal", (100_000,)),
    ({"normal": {"mean": 1.0, "std": 0.02}}, (200, 300)),
    ({"normal": {"mean": -1.0, "std": 0.0}}, (9,)),
    ("trunc_normal", (300, 400)),
    ({"trunc_normal": {"std": 0.02}}, (300, 400)),
    ({"trunc_normal": {"mean": 0.5, "std": 2.0, "a": -1.0, "b": 1.0}}, (60, 50, 3, 3)),
    ({"trunc_normal": {"mean": 0.0, "std": 1.0, "a": 1.2, "b": 2.5}}, (40_000,)),
    ("xavier_uniform", (300, 400)),
    ({"xavier_uniform": {"gain": 5 / 3}}, (64, 32, 5, 5)),
    ("xavier_normal", (100, 700)),
    ({"xavier_normal": {"gain": 0.5}}, (64, 32, 5, 5)),
    ({"xavier_normal": {"gain": 2.0}}, (32, 16, 5, 5, 5)),
    ("kaiming_uniform", (100, 700)),
    ({"kaiming_uniform": {"a": sqrt(5)}}, (64, 32, 5, 5)),
    ({"kaiming_uniform": {"mode": "fan_out", "nonlinearity": "relu"}}, (256, 20, 3, 3)),
    ({"kaiming_uniform": {"nonlinearity": "selu"}}, (90, 40, 17)),
    ("kaiming_normal", (700, 100)),
    ({"kaiming_normal": {"mode": "fan_out", "nonlinearity": "relu"}}, (256, 20, 3, 3)),
    ({"kaiming_normal": {"nonlinearity": "tanh"}}, (32, 16, 5, 5, 5)),
    ({"kaiming_normal": {"nonlinearity": "sigmoid"}}, (200, 300)),
    ({"kaiming_normal": {"a": 0.3, "nonlinearity": "conv_transpose2d"}}, (64, 32, 5, 5)),
    ({"kaiming_normal": {"a": 0.7}}, (300, 200)),
]


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E4M3"])
@pytest.mark.parametrize(("written", "shape"), DISTRIBUTIONS, ids=str)
def test_draws_are_distributed_as_torchs(written, shape, dtype):
    found = drawn(written, shape, dtype, seed=7)
    expected = by_torch(written, shape).float() if dtype != "F64" else by_torch(written, shape)
    assert_same_distribution(found, expected.to(DTYPES[dtype]))


NONLINEARITIES = (
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d sigmoid tanh relu leaky_relu selu"
)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES.split())
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_bound_of_kaiming_uniform(nonlinearity, mode):
    shape, a = (50, 20, 4, 2), 0.4
    fan = {"fan_in": 20 * 8, "fan_out": 50 * 8}[mode]
    bound = sqrt(3) * torch.nn.init.calculate_gain(nonlinearity, a) / sqrt(fan)
    found = drawn({"kaiming_uniform": {"a": a, "mode": mode, "nonlinearity": nonlinearity}}, shape, "F64")
    assert 0.999 * bound < found.abs().max() < bound


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("low", "high"), [(4.0, 9.0), (6.0, 7.0), (8.0, 10.0), (12.0, 13.0)])
def test_truncated_normal_in_either_far_tail(low, high, sign):
    a, b = sorted((sign * low, sign * high))
    found = drawn({"trunc_normal": {"mean": 3.0, "std": 2.0, "a": 3.0 + 2.0 * a, "b": 3.0 + 2.0 * b}}, (20_000,), "F64")
    depth = (found.numpy() - 3.0) / 2.0 * sign
    assert depth.min() >= low
    assert depth.max() <= high
    # scipy's truncnorm in its own words: the part of the tail above `low`, taken from logarithms.
    log_survival = special.log_ndtr(-depth) - special.log_ndtr(-low)
    scale = -np.expm1(special.log_ndtr(-high) - special.log_ndtr(-low))
    assert stats.kstest(-np.expm1(log_survival) / scale, "uniform").pvalue > ALPHA


def test_truncated_normal_stays_within_its_bounds_in_every_dtype():
    for dtype, kind in DTYPES.items():
        if dtype == "C64":
            continue
        found = drawn({"trunc_normal": {"std": 0.5, "a": -0.3, "b": 0.45}}, (30_000,), dtype).double()
        low, high = torch.tensor([-0.3, 0.45]).to(kind).double()
        assert found.min() >= low
        assert found.max() <= high
        assert len(found.unique()) > 5


def test_truncated_normal_without_spread_is_the_nearest_value_inside():
    for mean, inside in ((0.5, 0.5), (-7.0, -2.0), (7.0, 2.0)):
        assert drawn({"trunc_normal": {"mean": mean, "std": 0.0}}, (4,)).tolist() == [inside] * 4


def test_like_is_no_drawing_of_its_own():
    assert parsed("like").arguments == {}
    with pytest.raises(KeyError):
        drawing("like", (3,))


def test_uniform_draws_are_spread_evenly_to_the_last_place():
    found = drawn("uniform", (400_000,), "F64").numpy()
    assert 0 < found.min() < 1e-4
    assert 1 - 1e-4 < found.max() < 1
    assert len(np.unique(found)) == found.size
    for scale in (1, 2**20, 2**40):
        assert stats.kstest(found * scale % 1, "uniform").pvalue > ALPHA
        counts = np.bincount((found * scale % 1 * 256).astype(int), minlength=256)
        assert stats.chisquare(counts).pvalue > ALPHA


def test_normal_draws_are_normal_into_the_tails():
    found = drawn("normal", (1_000_000,), "F64").numpy()
    for depth in (1, 2, 3, 4):
        expected = found.size * stats.norm.sf(depth)
        for count in ((found > depth).sum(), (found < -depth).sum()):
            assert abs(count - expected) < 5 * sqrt(expected)


# --- Dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "written", ["normal", {"normal": {"std": 1e-3}}, {"normal": {"mean": 3.0, "std": 0.1}}], ids=str
)
def test_narrow_dtypes_are_rounded_from_single_precision(written, dtype):
    arguments = parsed(written).arguments
    normals = torch.from_numpy(drawing(written, (20_000,), dtype).normals(0, 20_000))
    single = (arguments["mean"] + arguments["std"] * normals).float()
    found = drawn(written, (20_000,), dtype)
    assert torch.equal(found.view(torch.uint8), single.to(DTYPES[dtype]).view(torch.uint8))


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_draws_are_distributed_as_rounded_single_ones(dtype):
    found = drawn("normal", (100_000,), dtype).float()
    torch.manual_seed(3)
    expected = torch.empty(100_000).normal_().to(DTYPES[dtype]).float()
    assert torch.isfinite(found).all()
    assert_same_distribution(found, expected)
    levels, counts = torch.cat([found, expected]).unique(return_counts=True)
    common = levels[counts > 200]
    table = [[(sample == level).sum().item() for level in common] for sample in (found, expected)]
    if len(common) > 1:
        assert stats.chi2_contingency(table).pvalue > ALPHA


def test_no_narrow_draw_is_nan_where_a_negative_one_underflows():
    for dtype in NARROW:
        found = drawn({"normal": {"std": 1e-9}}, (5_000,), dtype).float()
        assert torch.isfinite(found).all()
        assert drawn({"constant": {"val": -0.0}}, (3,), dtype).float().eq(0).all()


@pytest.mark.parametrize("name", ["normal", "xavier_normal", "kaiming_normal"])
def test_complex_normals_are_as_torchs(name):
    found, expected = drawn(name, (200, 300), "C64"), by_torch(name, (200, 300), torch.complex64)
    for part in ("real", "imag"):
        assert_same_distribution(getattr(found, part), getattr(expected, part))
    assert_same_distribution(found.abs(), expected.abs())
    assert abs(np.corrcoef(found.real.flatten(), found.imag.flatten())[0, 1]) < 5 / sqrt(found.numel())


def test_a_complex_mean_is_real():
    found = drawn({"normal": {"mean": 4.0, "std": 2.0}}, (50_000,), "C64")
    assert found.real.mean() == pytest.approx(4, abs=0.05)
    assert found.imag.mean() == pytest.approx(0, abs=0.05)
    assert found.real.std() == pytest.approx(sqrt(2), rel=0.02)


def test_no_complex_value_comes_twice():
    found = drawn("normal", (3 * BLOCK,), "C64").numpy()
    assert len(np.unique(found)) == found.size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("written", "shape"),
    [
        ("zeros", (3, 5)),
        ("zeros", ()),
        ("zeros", (0, 4)),
        ("ones", (4,)),
        ({"constant": {"val": 0.1}}, (2, 3)),
        ({"constant": {"val": -7.3}}, ()),
        ("eye", (4, 4)),
        ("eye", (3, 7)),
        ("eye", (7, 3)),
        ("eye", (0, 3)),
        ("dirac", (4, 4, 3)),
        ("dirac", (6, 3, 4, 5)),
        ("dirac", (3, 6, 2, 3, 4)),
        ({"dirac": {"groups": 2}}, (6, 3, 3, 3)),
        ({"dirac": {"groups": 3}}, (6, 5, 1, 2)),
        ({"dirac": {"groups": 4}}, (8, 1, 5)),
    ],
    ids=str,
)
def test_values_without_chance_are_exactly_torchs(written, shape, dtype):
    expected = by_torch(written, shape, torch.complex64 if dtype == "C64" else torch.float64)
    if dtype not in ("C64", "F64"):
        expected = expected.float()
    expected = expected.to(DTYPES[dtype])
    assert raw(written, shape, dtype) == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "written"),
    [
        ("F16", {"normal": {"std": 1e5}}),
        ("F8_E4M3", {"uniform": {"a": 500.0, "b": 600.0}}),
        ("F8_E4M3FNUZ", {"uniform": {"a": 300.0, "b": 400.0}}),
        ("F32", {"normal": {"mean": 3.4e38, "std": 1e37}}),
    ],
)
def test_a_value_out_of_range_is_an_error_not_an_infinity(dtype, written):
    with pytest.raises(Undrawable, match=f'"head.w": a drawn value is out of the range of {dtype}'):
        raw(written, (1000,), dtype, name="head.w")


#: Half a step beyond the largest number of a dtype, and whether that still rounds to it: a tie goes to the even one.
BORDERS = {
    "F32": (2.0**128 - 2.0**103, False),
    "F16": (65520.0, False),
    "BF16": (2.0**128 - 2.0**119, False),
    "F8_E4M3": (464.0, True),
    "F8_E5M2": (61440.0, False),
    "F8_E4M3FNUZ": (248.0, False),
    "F8_E5M2FNUZ": (61440.0, False),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", BORDERS)
def test_what_rounds_to_the_largest_number_is_drawn_and_what_is_beyond_it_is_refused(dtype, sign):
    border, kept = BORDERS[dtype]
    step = np.spacing(border if dtype == "F32" else np.float32(border))
    largest = torch.tensor([sign * torch.finfo(DTYPES[dtype]).max]).to(DTYPES[dtype]).view(torch.uint8)
    for value, drawable in ((border - step, True), (border, kept), (border + step, False)):
        written = {"constant": {"val": sign * float(value)}}
        if drawable:
            assert raw(written, (1,), dtype) == largest.numpy().tobytes()
        else:
            with pytest.raises(Undrawable, match=f"is out of the range of {dtype}"):
                raw(written, (1,), dtype)


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    count=st.integers(1, 300),
    place=st.floats(0, 1, exclude_max=True),
    odd=st.sampled_from([np.inf, -np.inf, np.nan, 1.5e308, -1.5e308]),
)
@settings(deadline=None)
def test_one_value_that_does_not_fit_is_found_anywhere(dtype, count, place, odd):
    values = np.linspace(-1, 1, count) * (1 + 1j if dtype == "C64" else 1)
    assert len(rounded(values, dtype, "w")) == count * DTYPES[dtype].itemsize
    parts = values.view(np.float64)
    parts[int(place * len(parts))] = odd
    if dtype == "F64" and np.isfinite(odd):
        assert rounded(values, dtype, "w") == values.tobytes()
        return
    with pytest.raises(Undrawable, match=f'"w": a drawn value is out of the range of {dtype}'):
        rounded(values, dtype, "w")


# --- Orthogonal and sparse ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
@pytest.mark.parametrize("gain", [1.0, -0.5, 3.0])
@pytest.mark.parametrize("shape", [(20, 20), (70, 12), (12, 70), (8, 4, 3, 3), (60, 3, 2, 2), (1, 5), (5, 1)], ids=str)
def test_rows_or_columns_are_orthogonal(shape, gain, dtype):
    matrix = drawn({"orthogonal": {"gain": gain}}, shape, dtype).double().reshape(shape[0], -1)
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    tolerance = gain**2 * {"F64": 1e-13, "F32": 1e-5, "BF16": 2e-2}[dtype]
    assert torch.allclose(small @ small.T, gain**2 * torch.eye(len(small), dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)], ids=str)
def test_orthogonal_matrices_are_uniform_as_torchs(shape):
    found = torch.stack([drawn("orthogonal", shape, "F64", name=f"w{number}") for number in range(1000)])
    torch.manual_seed(5)
    expected = torch.stack([torch.nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64)) for _ in range(1000)])
    for row, column in np.ndindex(shape):
        sample, other = found[:, row, column].numpy(), expected[:, row, column].numpy()
        assert stats.ks_2samp(sample, other, method="asymp").pvalue > ALPHA
    if shape == (3, 3):
        positive = (torch.linalg.det(found) > 0).sum().item()
        assert stats.binomtest(positive, 1000).pvalue > ALPHA


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.35, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(300, 120), (7, 900), (3, 3)], ids=str)
def test_each_column_has_its_number_of_zeros(shape, sparsity):
    written = {"sparse": {"sparsity": sparsity, "std": 0.5}}
    found = drawn(written, shape)
    assert (found == 0).sum(0).tolist() == [ceil(sparsity * shape[0])] * shape[1]
    expected = by_torch(written, shape)
    assert (expected == 0).sum(0).tolist() == (found == 0).sum(0).tolist()
    if len(found[found != 0]) > 100:
        assert_same_distribution(found[found != 0], expected[expected != 0])


def test_zeros_lie_anywhere_in_a_column():
    zeros = drawn({"sparse": {"sparsity": 0.3}}, (20, 20_000)) == 0
    counts = zeros.sum(1).double().numpy()
    assert abs(counts - 6000).max() < 5 * sqrt(20_000 * 0.3 * 0.7)
    assert abs(np.corrcoef(zeros[0], zeros[1])[0, 1] + 1 / 19) < 5 / sqrt(20_000)
    assert zeros[:, 0].tolist() != zeros[:, 1].tolist()


# --- Streams ------------------------------------------------------------------------------------------

MASK = 2**64 - 1


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 as published: ten rounds over a counter of 256 bits with a key of 128."""
    c = [counter >> (64 * i) & MASK for i in range(4)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


KNOWN_ANSWERS = [  # kat_vectors of Random123, of philox4x64 with 10 rounds
    (0, 0, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (2**256 - 1, 2**128 - 1, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_oracle_is_philox(counter, key, answer):
    assert " ".join(f"{word:016x}" for word in philox(counter, key)) == answer


def test_words_are_those_of_philox_at_counter_zero_too():
    # numpy counts up before it draws, so the published answer at counter zero is that of the one before.
    generator = np.random.Philox(key=0, counter=2**256 - 1)
    assert " ".join(f"{word:016x}" for word in generator.random_raw(4).tolist()) == KNOWN_ANSWERS[0][2]
    assert random_bits.words(0, 0, 4).tolist() == philox(1, 0)


@given(key=st.integers(0, 2**128 - 1), start=st.integers(0, 2**70), count=st.integers(0, 11))
@settings(deadline=None)
def test_words_are_philox_at_any_position(key, start, count):
    expected = [philox(i // 4 + 1, key)[i % 4] for i in range(start, start + count)]
    assert random_bits.words(key, start, start + count).tolist() == expected


def test_uniforms_are_symmetric_and_never_zero_or_one():
    ends = random_bits.uniform(np.array([0, MASK, 2**63, 2**63 - 1, 4095, 4096], np.uint64))
    half = 2.0**-53
    assert ends.tolist() == [half, 1 - half, 0.5 + half, 0.5 - half, half, 3 * half]


def test_quantile_is_the_inverse_of_the_normal_distribution():
    rng = np.random.default_rng(0)
    middle = rng.random(200_000)
    tails = np.exp(-rng.uniform(0.7, 700, 100_000))
    near_half = 0.5 + rng.uniform(-1, 1, 50_000) * 10.0 ** -rng.integers(1, 15, 50_000)
    edges = np.array([2.0**-53, 2.0**-1022, 1 - 2.0**-53, 0.075, 0.925, 0.0749999, 0.0750001, np.exp(-25), 0.5])
    p = np.concatenate([middle, tails, 1 - tails[tails > 1e-15], near_half, edges])
    np.testing.assert_allclose(random_bits.quantile(p), special.ndtri(p), rtol=1e-14, atol=0)


@given(count=st.integers(0, 3 * BLOCK), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_quantiles_in_place_of_their_probabilities_are_those_of_each_alone(count, seed):
    p = np.random.default_rng(seed).random(count)
    p[:3] = np.array([2.0**-1022, 2.0**-40, 1 - 2.0**-53])[:count]
    expected = random_bits.quantile(p.copy())
    picked = np.unique(np.random.default_rng(seed).integers(0, max(count, 1), min(count, 50)))
    alone = b"".join(random_bits.quantile(p[at : at + 1]).tobytes() for at in picked)
    assert random_bits.quantile(p, out=p) is p
    assert p.tobytes() == expected.tobytes()
    assert p[picked].tobytes() == alone


def test_quantile_is_antisymmetric_and_rises():
    p = np.sort(np.random.default_rng(1).integers(1, 2**51, 50_000)) * 2.0**-52
    assert (random_bits.quantile(p) == -random_bits.quantile(1 - p)).all()
    assert (np.diff(random_bits.quantile(p)) >= 0).all()


def test_cumulative_is_the_normal_distribution():
    points = [0.0, -0.0, 0.3, 1.0, -1.0, 2.5, -2.5, 5.0, -8.3, 8.3, -20.0, -37.4, 30.0, 1e-9, -1e-300]
    np.testing.assert_allclose([random_bits.cumulative(x) for x in points], special.ndtr(points), rtol=2e-13, atol=0)
    for x in (-15.0, -30.5, -37.0):
        assert np.log(random_bits.cumulative(x)) == pytest.approx(special.log_ndtr(x), rel=1e-15)
    assert [random_bits.cumulative(x) for x in (-1e9, 1e9, float("-inf"), float("inf"))] == [0, 1, 0, 1]
    # The double nearest to 0.97500210485177952.., as tables print it.
    assert random_bits.cumulative(1.96) == 0.9750021048517795


# --- Parts, orders, threads ---------------------------------------------------------------------------

PARTS = [
    ("normal", (3, BLOCK + 11), "F32"),
    ("normal", (2 * BLOCK + 7,), "C64"),
    ("trunc_normal", (5, BLOCK // 2 + 3), "F16"),
    ({"trunc_normal": {"a": 9.0, "b": 11.0}}, (2, BLOCK + 1), "F64"),
    ("kaiming_uniform", (3 * BLOCK // 500, 100, 5), "BF16"),
    ({"sparse": {"sparsity": 0.4}}, (300, BLOCK // 150), "F64"),
    ({"dirac": {"groups": 2}}, (200, 3 * BLOCK // 1800, 3, 3), "F8_E4M3"),
    ("eye", (500, BLOCK // 300), "F32"),
    ("orthogonal", (300, BLOCK // 200), "F32"),
    ({"constant": {"val": 0.1}}, (2, BLOCK + 5), "BF16"),
]
WHOLE = {}


def whole(case) -> bytes:
    if str(case) not in WHOLE:
        WHOLE[str(case)] = raw(*case)
    return WHOLE[str(case)]


@given(data=st.data(), case=st.sampled_from(PARTS))
@settings(deadline=None, max_examples=60)
def test_any_part_in_any_order_is_a_part_of_the_whole(data, case):
    _, shape, dtype = case
    count, size = prod(shape), DTYPES[dtype].itemsize
    near_edges = st.sampled_from([0, BLOCK, 2 * BLOCK, count]).flatmap(lambda at: st.integers(at - 3, at + 3))
    positions = st.one_of(near_edges, st.integers(0, count)).map(lambda at: min(max(at, 0), count))
    source = drawing(*case)
    for _ in range(data.draw(st.integers(1, 4))):
        start, stop = sorted((data.draw(positions), data.draw(positions)))
        assert b"".join(source.read(start, stop)) == whole(case)[start * size : stop * size]


@pytest.mark.parametrize("readers", [2, 5])
@pytest.mark.parametrize("case", PARTS, ids=str)
def test_threads_that_read_one_tensor_at_once_get_what_one_alone_gets(case, readers):
    count = prod(case[1])
    source, at_once = drawing(*case), threading.Barrier(readers)

    def read(reader: int) -> list[bytes]:
        """A part of the tensor as a whole, and again row by row, as of one that grows."""
        at_once.wait()
        start, stop = count * reader // readers, count * (reader + 1) // readers
        rows = [b"".join(source.read(at, min(at + 499, stop))) for at in range(start, stop, 499)]
        return [b"".join(source.read(start, stop)), b"".join(rows)]

    with ThreadPoolExecutor(readers) as pool:
        parts = list(pool.map(read, range(readers)))
    assert [b"".join(part) for part in zip(*parts, strict=True)] == [whole(case), whole(case)]


def test_a_thread_alone_draws_what_it_reads():
    """Whoever reads parts in several threads of its own is not to find more of them."""
    before = threading.active_count()
    reader = drawing("normal", (3 * BLOCK,)).read(0, 3 * BLOCK)
    assert [(len(chunk), threading.active_count()) for chunk in reader] == [(4 * BLOCK, before)] * 3


def test_two_readers_at_once_do_not_disturb_one_another():
    source = drawing("normal", (5 * BLOCK,))
    one, other = source.read(0, 5 * BLOCK), source.read(0, 5 * BLOCK)
    mixed = [(next(one), next(other)) for _ in range(5)]
    expected = raw("normal", (5 * BLOCK,))
    assert [b"".join(chunks) for chunks in zip(*mixed, strict=True)] == [expected, expected]


def test_a_reader_may_stop_early():
    reader = drawing("normal", (9 * BLOCK,)).read(0, 9 * BLOCK)
    first = bytes(next(reader))
    reader.close()
    assert first == raw("normal", (9 * BLOCK,))[: len(first)]


# --- What values depend on ----------------------------------------------------------------------------

SAME = {"written": "normal", "shape": (60, 40), "dtype": "F32", "seed": 0, "name": "fc.weight"}
OTHERS = [
    {"seed": 1},
    {"seed": 2**63},
    {"seed": 2**64 - 1},
    {"name": "fc2.weight"},
    {"name": "fc.weight "},
    {"name": "fc/weight"},
    {"name": ""},
    {"shape": (40, 60)},
    {"shape": (2400,)},
    {"shape": (60, 40, 1)},
    {"dtype": "F64"},
    {"dtype": "BF16"},
    {"dtype": "F16"},
    {"written": {"normal": {"std": 0.5}}},
    {"written": {"normal": {"mean": 1e-30}}},
    {"written": {"trunc_normal": {"a": -1e3, "b": 1e3}}},
    {"written": "uniform"},
    {"written": "kaiming_normal"},
]


def test_each_thing_that_counts_gives_another_stream():
    variants = [SAME | change for change in ({}, *OTHERS)]
    raws = [raw(**variant) for variant in variants]
    assert len(set(raws)) == len(raws)
    samples = [drawn(**variant).double().flatten().numpy() for variant in variants]
    ranks = np.array([stats.rankdata(sample) for sample in samples])
    between = np.corrcoef(ranks)[np.triu_indices(len(ranks), 1)]
    assert np.abs(between).max() < 5.5 / sqrt(2400)


def test_the_same_things_give_the_same_values_however_they_are_written():
    expected = raw(**SAME)
    assert raw(**SAME) == expected
    for written in ({"normal": {}}, {"normal": None}, {"normal": {"std": 1}}, {"normal": {"std": 1.0, "mean": 0}}):
        assert raw(**(SAME | {"written": written})) == expected


def test_no_two_blocks_or_neighbours_of_a_tensor_are_related():
    values = drawn("normal", (4 * BLOCK,), "F64").numpy()
    blocks = values.reshape(4, BLOCK)
    assert np.abs(np.corrcoef(blocks)[np.triu_indices(4, 1)]).max() < 5 / sqrt(BLOCK)
    for lag in (1, 2, 3, 4, 5, 8, 64):
        for power in (1, 2):
            series = values**power
            assert abs(np.corrcoef(series[:-lag], series[lag:])[0, 1]) < 5 / sqrt(values.size)


@pytest.mark.parametrize("names", [("a", "b"), ("layers.0.w", "layers.1.w"), ("q", "k")])
@pytest.mark.parametrize("name", ["normal", "uniform", "trunc_normal"])
def test_two_tensors_are_independent(names, name):
    one, other = (drawn(name, (100_000,), "F64", name=each).numpy() for each in names)
    assert not np.array_equal(one, other)
    for a, b in ((one, other), (one**2, other**2), (one[1:], other[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / sqrt(len(a))


# --- Mean ---------------------------------------------------------------------------------------------

MEANS = [
    ((1, 3), 0),
    ((5,), 1),
    ((70_001,), 2),
    ((9, 7), 3),
    ((3_000, 50), 4),
    ((1_001, 2, 3, 3), 5),
    ((3, 70_000), 6),
    ((2, 131_072), 7),
    ((4, 0), 8),
    ((40_000, 4), 9),
]


def some_values(shape, dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 0.25
    return torch.complex(values.float(), values.flip(0).float()) if dtype == "C64" else values.to(DTYPES[dtype])


def columns_of(tensor: torch.Tensor) -> list[list[float]]:
    """The values of each column, as Python's own numbers; of complex ones, real and imaginary parts are two columns."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.double().reshape(len(tensor), prod(real.shape[1:])).T.tolist()


def mean_row(tensor: torch.Tensor, dtype: str, chunk: int = CHUNK_BYTES, rows: int = 1) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    row = MeanRow(
        lambda: (data[at : at + chunk] for at in range(0, len(data), chunk)),
        TensorInfo(dtype, tuple(tensor.shape)),
        "w",
    )
    return b"".join(row.read(0, rows * prod(tensor.shape[1:])))


def in_blocks(column: list[float], width: int) -> float:
    """What is promised of a sum, in plain Python: every so many rows are added up in their order, then all exactly."""
    every = max(1, 65_536 // width)
    return fsum(functools.reduce(operator.add, column[at::every], 0.0) for at in range(min(every, len(column))))


@pytest.mark.parametrize(("shape", "seed"), MEANS, ids=str)
def test_the_mean_row_in_double_precision_is_added_up_in_a_fixed_order(shape, seed):
    values = some_values(shape, "F64", seed)
    columns = columns_of(values)
    expected = [in_blocks(column, len(columns)) / shape[0] for column in columns]
    assert mean_row(values, "F64") == struct.pack(f"<{len(expected)}d", *expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "F64"])
@pytest.mark.parametrize(
    ("shape", "seed"), [((5,), 1), ((9, 7), 3), ((3_000, 5), 4), ((301, 2, 3), 5), ((2, 9_000), 6)]
)
def test_the_mean_row_of_narrower_values_is_the_exact_one_rounded(shape, seed, dtype):
    values = some_values(shape, dtype, seed)
    # float() of a fraction is the nearest one.
    exact = [float(sum(map(Fraction, column)) / shape[0]) for column in columns_of(values)]
    rounded = torch.tensor(exact, dtype=torch.float64).float()
    expected = rounded if dtype == "C64" else rounded.to(DTYPES[dtype])
    assert mean_row(values, dtype) == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_mean_row_is_pinned():
    """As the other draws are: whoever changes these gives every spec in the world other weights."""
    values = torch.frombuffer(bytearray(raw("normal", (30_011, 5), "F64")), dtype=torch.float64).reshape(30_011, 5)
    values[::7] *= 2.0**40
    pinned = "1e040997285e9441b10234e72487f0c195bddbaf80b5f04194c864bbbce5e141f89b49e7e4a2d141"
    assert mean_row(values, "F64").hex() == pinned
    assert struct.pack("<5d", *(in_blocks(column, 5) / 30_011 for column in columns_of(values))).hex() == pinned


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E4M3", "C64"])
@pytest.mark.parametrize("chunk", [8, 24, 1_000, 65_536, 524_288, CHUNK_BYTES])
def test_the_mean_row_does_not_depend_on_chunks(chunk, dtype):
    for shape in ((700, 30), (5_003,), (2, 66_000)):
        values = some_values(shape, dtype, 1)
        assert mean_row(values, dtype, chunk) == mean_row(values, dtype)


@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
@settings(deadline=None, max_examples=60)
def test_any_part_of_mean_rows_is_a_part_of_the_whole(data, shape):
    values = some_values(shape, "BF16", 3)
    packed = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    row = MeanRow(lambda: iter([packed]), TensorInfo("BF16", shape), "w")
    count = 200_000
    whole = mean_row(values, "BF16") * (-(-count // prod(shape[1:])))
    start, stop = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    assert b"".join(row.read(start, stop)) == whole[2 * start : 2 * stop]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 66_000)])
def test_the_mean_of_values_that_are_not_finite_is_refused(shape, odd):
    for dtype in ("F64", "F16"):
        values = some_values(shape, dtype, 0)
        values[-1] = odd
        with pytest.raises(Undrawable, match='mean: "w" has values that are not finite, or whose sum is not'):
            mean_row(values, dtype)


def test_a_sum_that_overflows_is_refused():
    for shape in ((3,), (3, 66_000)):
        with pytest.raises(Undrawable, match="whose sum is not"):
            mean_row(torch.full(shape, 1.7e308, dtype=torch.float64), "F64")


def test_the_mean_row_is_read_piece_by_piece():
    shape, rows = (4_000, 4_000), 100
    piece = np.full((rows, shape[1]), 0.5, np.float32).tobytes()
    tracemalloc.start()
    row = MeanRow(lambda: iter([piece] * (shape[0] // rows)), TensorInfo("F32", shape), "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert b"".join(row.read(0, shape[1])) == piece[: 4 * shape[1]]
    assert peak < 8_000_000 < 4 * prod(shape)


def test_mean_is_no_drawing_of_its_own():
    assert parsed("mean").arguments == {}
    with pytest.raises(KeyError):
        drawing("mean", (3,))
