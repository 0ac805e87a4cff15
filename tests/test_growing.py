"""Tensors that grow and shrink: what is kept, what is new, and training in which the old rows stand still."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from math import fsum, prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurg
from ckptsurg.schemas import schema
from ckptsurg.tensors import CHUNK_BYTES, TensorInfo

from .architectures import DTYPES, ResNet, digits, resnet18

SPECS = Path(__file__).parent.parent / "specs"


def _bytes(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _elements(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array of opaque elements, so that numpy slices it and never looks at a value."""
    return np.frombuffer(_bytes(tensor), f"V{tensor.element_size()}").reshape(tensor.shape)


def _values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Finite values, as they stand in a model."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.complex64 if dtype.is_complex else torch.float32
    return (torch.randn(shape, generator=generator, dtype=kind) + 0.25).to(dtype)


def _mean_row(old: torch.Tensor) -> torch.Tensor:
    """The exact mean of the rows, by fractions, rounded to double, single and then the dtype of the tensor."""
    real = torch.view_as_real(old) if old.is_complex() else old
    columns = real.double().reshape(len(old), prod(real.shape[1:])).T.tolist()
    exact = torch.tensor([float(sum(map(Fraction, column)) / len(old)) for column in columns], dtype=torch.float64)
    if old.is_complex():
        return exact.float().view(torch.complex64).reshape(old.shape[1:])
    return (exact if old.dtype is torch.float64 else exact.float()).to(old.dtype).reshape(old.shape[1:])


def _rewritten(folder: Path, base: object, *rules: dict, **more: object) -> dict[str, torch.Tensor]:
    ckptsurg.rewrite({"version": 1, "reinit": list(rules), **more}, base, folder)
    return load_file(folder / "model.safetensors")


# --- Against numpy's slices ---------------------------------------------------------------------------


@st.composite
def _resized(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An old and a new shape: a bias, a Linear, a kernel of Keras, a convolution, anything."""
    old = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)))
    new = list(old)
    for axis in draw(st.lists(st.integers(0, len(old) - 1), min_size=1, max_size=len(old), unique=True)):
        new[axis] = draw(st.integers(0, 9))
    return old, tuple(new)


INITS = ["zeros", "ones", {"constant": {"val": -1.5}}, {"normal": {"std": 0.02}}, "mean"]


def _all_new(old: torch.Tensor, new: tuple[int, ...], init: object, drawn: torch.Tensor) -> torch.Tensor:
    """A tensor of the new shape in which nothing is old; what chance draws is taken from a rewrite without keep."""
    match init:
        case "zeros":
            return torch.zeros(new).to(old.dtype)
        case "ones":
            return torch.ones(new).to(old.dtype)
        case {"constant": {"val": value}}:
            return torch.full(new, value).to(old.dtype)
        case "mean":
            row = _mean_row(old)
            return torch.stack([row] * new[0]) if new[0] else torch.empty(new, dtype=old.dtype)
    return drawn


class _Module(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@given(sizes=st.lists(_resized(), min_size=1, max_size=4), data=st.data(), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=80)
def test_what_overlaps_is_old_and_the_rest_is_drawn_from_files_and_from_memory(sizes, data, seed):
    base, rules = {}, []
    for number, (old, new) in enumerate(sizes):
        dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
        base[f"w{number}"] = _values(old, dtype, seed + number)
        init = data.draw(st.sampled_from(INITS))
        if init == "mean" and (old[1:] != new[1:] or not old[0]):
            init = "zeros"
        if data.draw(st.booleans()):
            shape: object = list(new)
        else:
            signs = [data.draw(st.sampled_from([0, len(old)])) for _ in old]
            shape = {axis - sign: new[axis] for axis, sign in enumerate(signs)}
        rules.append({"match": f"w{number}", "shape": shape, "init": init})
    kept = [{**rule, "keep": True} for rule in rules]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_file(base, folder / "base.safetensors")
        drawn = _rewritten(folder / "drawn", folder / "base.safetensors", *rules)
        found = _rewritten(folder / "kept", folder / "base.safetensors", *kept)
        again = [_rewritten(folder / f"{one.__class__}", one, *kept) for one in (base, _Module(base))]
    for number, (old, new) in enumerate(sizes):
        name, init = f"w{number}", rules[number]["init"]
        fresh = _all_new(base[name], new, init, drawn[name])
        assert _bytes(fresh) == _bytes(drawn[name])
        expected = _elements(fresh).copy()
        overlap = tuple(slice(min(sizes)) for sizes in zip(old, new, strict=True))
        expected[overlap] = _elements(base[name])[overlap]
        for tensors in (found, *again):
            assert tensors[name].shape == new and tensors[name].dtype == base[name].dtype
            assert _elements(tensors[name]).tobytes() == expected.tobytes(), (name, old, new, init)


class _OneBuffer:
    """A source whose chunks are valid until the next one is asked for, of any tensor; then they are garbage."""

    label, metadata = "a source", None

    def __init__(self, given: dict[str, torch.Tensor]) -> None:
        self._given = {name: _bytes(tensor) for name, tensor in given.items()}
        self.tensors = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in given.items()}
        self._buffer = bytearray(CHUNK_BYTES)

    def read(self, name: str) -> Iterator[memoryview]:
        data = self._given[name]
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            self._buffer[:] = b"\xaa" * CHUNK_BYTES
            self._buffer[: len(chunk)] = chunk
            yield memoryview(self._buffer)[: len(chunk)]


@pytest.mark.parametrize(
    ("init", "shape"),
    [
        ("mean", (1_100, 2_003)),
        ("like", (1_100, 2_003)),
        ("like", (1_100, 2_100)),
        ("zeros", (1_003, 2_100)),
        ("zeros", (900, 2_100)),
        ("zeros", (900, 1_500)),
    ],
)
def test_a_tensor_of_many_chunks_that_grows_in_memory_is_the_one_that_grows_in_a_file(tmp_path, shape, init):
    base = {"w": _values((1_003, 2_003), torch.float32, 0)}
    assert base["w"].nbytes > 2 * CHUNK_BYTES
    rule = {"match": "w", "shape": list(shape), "keep": True, "init": init}
    save_file(base, tmp_path / "base.safetensors")
    found = [
        ckptsurg.rewrite({"version": 1, "reinit": [rule]}, one, tmp_path / str(number)).root
        for number, one in enumerate((tmp_path / "base.safetensors", base, _OneBuffer(base)))
    ]
    assert len(set(found)) == 1
    new = load_file(tmp_path / "0" / "model.safetensors")["w"]
    rows, columns = min(1_003, shape[0]), min(2_003, shape[1])
    assert _bytes(new[:rows, :columns]) == _bytes(base["w"][:rows, :columns])
    if init == "mean":
        assert set(map(_bytes, new[1_003:, :40])) == {_bytes(_mean_row(base["w"][:, :40]))}


def test_what_shrinks_asks_nothing_of_the_old_values(tmp_path):
    base = {"w": torch.full((6, 3), float("nan")), "v": torch.full((6,), float("inf"))}
    rules = [
        {"match": name, "shape": {0: 4}, "keep": True, "init": init} for name, init in [("w", "mean"), ("v", "like")]
    ]
    found = _rewritten(tmp_path / "out", base, *rules)
    assert {name: _bytes(tensor) for name, tensor in found.items()} == {n: _bytes(t[:4]) for n, t in base.items()}
    rules[0]["shape"] = {0: 7}
    with pytest.raises(ckptsurg.SpecError, match=r'reinit\[0\]: mean: "w" has values that are not finite'):
        _rewritten(tmp_path / "more", base, *rules)
    assert not (tmp_path / "more").exists()


def test_a_head_of_keras_grows_along_its_last_dimension(tmp_path):
    """A kernel is [in, classes] there. Its rows are the inputs, so ``mean`` and frozen rows do not speak of classes."""
    base = {"dense/kernel": _values((8, 10), torch.float32, 0), "dense/bias": _values((10,), torch.float32, 1)}
    rules = [
        {"match": "dense/kernel", "shape": {1: 15}, "keep": True, "init": "xavier_uniform"},
        {"match": "dense/bias", "shape": {0: 15}, "keep": True, "init": "zeros"},
    ]
    found = _rewritten(tmp_path / "out", base, *rules)
    assert _bytes(found["dense/kernel"][:, :10]) == _bytes(base["dense/kernel"])
    bound = sqrt(6 / (8 + 15))  # of the new shape
    assert 0.5 * bound < found["dense/kernel"][:, 10:].abs().max() <= bound
    assert _bytes(found["dense/bias"]) == _bytes(base["dense/bias"]) + bytes(20)
    message = (
        r"reinit\[0\]\.init: dense/kernel: mean is one of whole rows, so the first dimension alone may change; this"
    )
    with pytest.raises(ckptsurg.SpecError, match=message + r" one goes from \[8, 10\] to \[8, 15\]"):
        ckptsurg.plan({"version": 1, "reinit": [{**rules[0], "init": "mean"}]}, base)


# --- What is new --------------------------------------------------------------------------------------


def _head(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {"fc.weight": _values((outputs, inputs), torch.float32, 0), "fc.bias": _values((outputs,), torch.float32, 1)}


@pytest.mark.parametrize(("shape", "fan_in"), [({0: 15}, 48), ({1: 300}, 300), ({0: 15, -1: 12}, 12)])
def test_default_knows_the_new_fan_in_for_the_weight_and_its_bias(tmp_path, shape, fan_in):
    weight = {"match": "fc.weight", "shape": shape, "keep": True, "init": "default"}
    bias = {"match": "fc.bias", "shape": {0: 40}, "keep": True, "init": "default"}
    base = _head(48, 10)
    found = _rewritten(tmp_path / "out", base, weight, bias)
    assert _bytes(found["fc.bias"][:10]) == _bytes(base["fc.bias"])
    new = [found["fc.bias"][10:], found["fc.weight"][10:].flatten(), found["fc.weight"][:, 48:].flatten()]
    for values in new:
        if len(values):
            assert 0.5 / sqrt(fan_in) < values.abs().max() <= 1 / sqrt(fan_in)


def test_like_takes_the_moments_of_all_that_was_there(tmp_path):
    base = _head(48, 10)
    old = base["fc.weight"].double().flatten().tolist()
    mean = fsum(old) / len(old)
    std = sqrt(fsum((value - mean) * (value - mean) for value in old) / len(old))
    rule = {"match": "fc.weight", "shape": {0: 15}, "keep": True}
    found = _rewritten(tmp_path / "like", base, {**rule, "init": "like"})
    expected = _rewritten(tmp_path / "normal", base, {**rule, "init": {"normal": {"mean": mean, "std": std}}})
    assert _bytes(found["fc.weight"]) == _bytes(expected["fc.weight"])


def test_mean_without_keep_is_in_every_row(tmp_path):
    base = _head(6, 4)
    found = _rewritten(tmp_path / "out", base, {"match": "fc", "init": "mean"})
    for name, old in base.items():
        assert _bytes(found[name]) == _bytes(_mean_row(old)) * 4


@pytest.mark.parametrize(
    ("tensor", "rule", "message"),
    [
        (torch.zeros(()), {}, "w: mean draws tensors of 1 or more dimensions, this one has 0"),
        (torch.zeros(0, 3), {"shape": {0: 2}}, r"w: mean: there are no old rows, the shape is \[0, 3\]"),
        (torch.zeros(2, 3), {"shape": [4, 5]}, r"the first dimension alone may change; .* from \[2, 3\] to \[4, 5\]"),
        (torch.zeros(2, 3), {"shape": [6]}, r"the first dimension alone may change; .* from \[2, 3\] to \[6\]"),
        (torch.zeros(2, dtype=torch.int64), {}, "w: I64 cannot be drawn"),
        (torch.zeros(2), {"init": {"mean": {"std": 1}}}, 'mean: unknown argument "std"; it takes none'),
    ],
    ids=["no dimension", "no rows", "both dimensions", "another rank", "integers", "arguments"],
)
def test_what_has_no_mean_row_is_refused_with_its_place(tensor, rule, message):
    spec = {"version": 1, "reinit": [{"match": "w", "init": "mean", **rule}]}
    with pytest.raises(ckptsurg.SpecError, match=rf"reinit\[0\]\.init: .*{message}|reinit\[0\]\.init: {message}"):
        ckptsurg.plan(spec, {"w": tensor})


def test_an_added_tensor_has_no_mean():
    add = {"name": "new", "shape": [3], "dtype": "F32", "init": "mean"}
    with pytest.raises(ckptsurg.SpecError, match=r"add\[0\]\.init: mean: an added tensor has no old rows"):
        ckptsurg.plan({"version": 1, "add": [add]}, {"w": torch.zeros(1)})


def test_the_schema_has_mean_as_a_name():
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema("spec"))
    rule = {"match": "w", "keep": True, "shape": {"0": 9}}
    assert validator.is_valid({"version": 1, "reinit": [{**rule, "init": "mean"}]})
    assert not validator.is_valid({"version": 1, "reinit": [{**rule, "init": {"mean": {"std": 1}}}]})


# --- N1: more classes ---------------------------------------------------------------------------------

OLD, NEW = 5, 10
N1 = SPECS / "n1-more-classes.yaml"
HEAD = ("fc.weight", "fc.bias")


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, classes: range, steps: int = 4) -> None:
    """Steps over images of some of the digits."""
    x, y = digits(32, 400)
    chosen = torch.isin(y, torch.tensor(classes))
    x, y = x[chosen][: steps * 20], y[chosen][: steps * 20]
    for images, labels in zip(x.split(20), y.split(20), strict=True):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def five_classes(tmp_path_factory):
    """A ResNet18 that has learnt the digits 0 to 4."""
    torch.manual_seed(0)
    model = resnet18(OLD)
    _learn(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), range(OLD))
    path = tmp_path_factory.mktemp("five") / "base.safetensors"
    save_file(model.state_dict(), path, {"format": "pt"})
    return path


def _ten_classes(published: dict[str, torch.Tensor]) -> ResNet:
    model = resnet18(NEW)
    model.load_state_dict(published)
    return model


def _cli(*arguments: object, code: int) -> dict:
    command = [sys.executable, "-m", "ckptsurg", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_n1_more_classes_while_the_old_ones_stand_still(tmp_path, five_classes, optimizer):
    manifest = ckptsurg.rewrite(N1, five_classes, tmp_path / "out")
    old = load_file(five_classes)
    published = load_file(tmp_path / "out" / "model.safetensors")
    for name in HEAD:
        assert len(published[name]) == NEW and _bytes(published[name][:OLD]) == _bytes(old[name])
    model = _ten_classes(published)
    frozen = ckptsurg.freeze(model, manifest)
    with frozen.guard(stepping := OPTIMIZERS[optimizer](frozen.trainable_parameters()), expect_trained=True):
        _learn(model, stepping, range(NEW))
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    report = _cli("verify", tmp_path / "out", tmp_path / "trained.safetensors", "--expect-trained", code=0)
    assert report["ok"] and report["verified"] == len(old)
    trained = load_file(tmp_path / "trained.safetensors")
    assert {name for name in old if _bytes(trained[name]) != _bytes(published[name])} == set(HEAD)
    for name in HEAD:
        assert _bytes(trained[name][:OLD]) == _bytes(old[name])
        assert all(_bytes(trained[name][row]) != _bytes(published[name][row]) for row in range(OLD, NEW))


def test_n1_it_does_not_matter_whether_the_head_is_taken_away_first(five_classes):
    spec = ckptsurg.load_spec(N1)
    longer = {
        "version": 1,
        "freeze": ["**", "!fc", {"match": "fc", "rows": f"[:{OLD}]"}],
        "reinit": [{"match": "fc", "shape": {0: NEW}, "keep": True, "init": "default"}],
    }
    short, long = (ckptsurg.plan(one, five_classes).tensors for one in (spec, longer))
    assert [t.model_copy(update={"rule": None}) for t in short] == [t.model_copy(update={"rule": None}) for t in long]
    assert {t.name: t.rows for t in long if t.rows} == dict.fromkeys(HEAD, (0, OLD))


@pytest.mark.parametrize(
    ("freeze", "rule", "remedy"),
    [
        ([{"match": "fc", "rows": "[:5]"}], {}, 'add `keep: true` to the rule, or add "!fc" to freeze'),
        (["**"], {}, 'add "!fc" to freeze'),
        (
            ["**"],
            {"keep": True},
            'add "!fc" to freeze, or {match: fc, rows: "[:5]"} to freeze the old rows alone',
        ),
        (
            ["**"],
            {"keep": True, "shape": {0: 3}},
            'add "!fc" to freeze, or {match: fc, rows: "[:3]"} to freeze the old rows alone',
        ),
        (["**"], {"keep": True, "shape": [9, 9], "where": {"ndim": 2}}, 'add "!fc" to freeze'),
    ],
)
def test_n1_what_is_frozen_as_a_whole_cannot_grow_and_the_message_says_what_to_write(
    five_classes, freeze, rule, remedy
):
    rule = {"match": "fc", "shape": {0: NEW}, "init": "default"} | rule
    spec = {"version": 1, "freeze": freeze, "reinit": [rule]}
    with pytest.raises(ckptsurg.SpecError, match=r"freeze\[0\] and reinit\[0\] both claim fc\.") as caught:
        ckptsurg.plan(spec, five_classes)
    assert str(caught.value).endswith(f"; {remedy}")


def _as_written(model: ResNet) -> list[nn.Parameter]:
    """What is commonly written: a larger head with the old rows in it, whose gradients a mask sets to zero."""
    old, model.fc = model.fc, nn.Linear(512, NEW)
    with torch.no_grad():
        model.fc.weight[:OLD] = old.weight
        model.fc.bias[:OLD] = old.bias
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
    mask = (torch.arange(NEW) >= OLD).float()
    model.fc.weight.register_hook(lambda gradient: gradient * mask[:, None])
    model.fc.bias.register_hook(lambda gradient: gradient * mask)
    return list(model.fc.parameters())


def test_n1_as_written_decays_the_old_rows(tmp_path, five_classes):
    ckptsurg.rewrite(N1, five_classes, tmp_path / "out")
    torch.manual_seed(1)
    model = resnet18(OLD)
    model.load_state_dict(load_file(five_classes))
    head = _as_written(model)
    _learn(model, torch.optim.AdamW(head, lr=1e-2, weight_decay=0.1), range(NEW))
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    given = ("verify", tmp_path / "out", tmp_path / "trained.safetensors")
    statistics = {name for name, _ in model.named_buffers()}  # in training mode they move as well
    assert {one["name"] for one in _cli(*given, code=1)["drifted"]} == statistics | set(HEAD)
    report = _cli(*given, "--baseline", tmp_path / "out", code=1)
    causes = {one["name"]: one["cause"] for one in report["drifted"]}
    assert {name: causes[name] for name in HEAD} == dict.fromkeys(HEAD, "weight_decay")
    assert {causes[name] for name in statistics} == {"batchnorm_stats"}
    details = {one["name"]: one["detail"] for one in report["drifted"]}
    assert details["fc.weight"]["elements_changed"] == OLD * 512 and details["fc.bias"]["elements_changed"] == OLD


def test_n1_as_written_is_caught_while_it_trains(five_classes):
    torch.manual_seed(1)
    model = resnet18(OLD)
    model.load_state_dict(load_file(five_classes))
    head = _as_written(model)
    rows = {"match": "fc", "rows": f"[:{OLD}]"}
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [rows]):
        _learn(model, torch.optim.AdamW(head, lr=1e-2, weight_decay=0.1), range(NEW), steps=2)
    assert caught.value.causes == dict.fromkeys(HEAD, "weight_decay")
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [rows]):
        # The momentum is from before the mask: of a phase in which the head was trained as a whole.
        optimizer = torch.optim.SGD(head, lr=0.1, momentum=0.9)
        for parameter in head:
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
        _learn(model, optimizer, range(NEW), steps=1)
    assert caught.value.causes == dict.fromkeys(HEAD, "zero_grad_not_none")


# --- More tokens --------------------------------------------------------------------------------------


def _load(kind, folder: Path):
    """from_pretrained, with nothing missing and nothing unexpected."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def _train_language_model(model, optimizer, tokens: torch.Tensor) -> None:
    for _ in range(5):
        model.train()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def _tokens_are_added(kind, folder: Path, spec: object, old: int, new: int, grown: dict[str, str]) -> None:
    """The whole way of the model in ``folder / "base"``.

    Args:
        kind: The class of transformers.
        folder: For all that is written.
        spec: What to do.
        old: Number of tokens before.
        new: Number of tokens after.
        grown: The tensors of the file that have a row for each token, and what their new rows are.
    """
    before = load_file(folder / "base" / "model.safetensors")
    assert {name for name, tensor in before.items() if len(tensor) == old} == set(grown)
    manifest = ckptsurg.rewrite(spec, folder / "base", folder / "out")
    published = load_file(folder / "out" / "model.safetensors")
    for name, init in grown.items():
        row = _mean_row(before[name]) if init == "mean" else torch.zeros(before[name].shape[1:])
        assert _bytes(published[name]) == _bytes(before[name]) + _bytes(row) * (new - old)
    model = _load(kind, folder / "out")
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert model.config.vocab_size == new == len(embeddings) == len(head)
    assert (embeddings is head) == model.config.tie_word_embeddings

    # transformers draws around the same mean, with a covariance so small that it is no more than a trace.
    twin = _load(kind, folder / "base")
    torch.manual_seed(0)
    twin.resize_token_embeddings(new, mean_resizing=True)
    for name in grown:
        theirs, ours = (one.state_dict()[name] for one in (twin, model))
        assert _bytes(theirs[:old]) == _bytes(ours[:old])
        assert ((theirs[old:] - ours[old:]).abs() <= 1e-3 * before[name].std(0)).all()

    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tokens = torch.tensor([[1, 2, *range(old, new), 3, old - 1, old, new - 1]])
    with frozen.guard(optimizer, expect_trained=True):
        _train_language_model(model, optimizer, tokens)
    model.save_pretrained(folder / "trained")
    report = _cli("verify", folder / "out", folder / "trained", "--expect-trained", "--exact", code=0)
    assert report["verified"] == len(before)
    trained = load_file(folder / "trained" / "model.safetensors")
    assert {name for name in published if _bytes(trained[name]) != _bytes(published[name])} == set(grown)
    for name in grown:
        assert _bytes(trained[name][:old]) == _bytes(before[name])
        assert all(_bytes(trained[name][row]) != _bytes(published[name][row]) for row in range(old, new)), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_n1_more_tokens_for_llama(tmp_path, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    grown = {"model.embed_tokens.weight": "mean"} | ({} if tied else {"lm_head.weight": "mean"})
    _tokens_are_added(LlamaForCausalLM, tmp_path, SPECS / "llama-more-tokens.yaml", 32_000, 32_064, grown)


def _more_tokens(inits: dict[str, str]) -> dict:
    return {
        "version": 1,
        "freeze": ["**", *({"match": name, "rows": "[:64]"} for name in inits)],
        "reinit": [{"match": name, "shape": {0: 72}, "keep": True, "init": init} for name, init in inits.items()],
        "config": {"set": {"vocab_size": 72}},
    }


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_n1_more_tokens_for_a_tied_bert(tmp_path):
    """The head has a bias of its own, to which transformers adds zeros where the head is tied."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL))
    nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path / "base")
    grown = {"bert.embeddings.word_embeddings.weight": "mean", "cls.predictions.bias": "zeros"}
    _tokens_are_added(BertForMaskedLM, tmp_path, _more_tokens(grown), 64, 72, grown)


def test_n1_more_tokens_for_a_tied_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    grown = {"transformer.wte.weight": "mean"}
    _tokens_are_added(GPT2LMHeadModel, tmp_path, _more_tokens(grown), 64, 72, grown)


def test_n1_more_tokens_for_a_head_with_a_bias(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL, tie_word_embeddings=False))
    nn.init.normal_(model.lm_head.bias, 0.3)
    model.save_pretrained(tmp_path / "base")
    grown = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"), "mean")
    _tokens_are_added(PhiForCausalLM, tmp_path, _more_tokens(grown), 64, 72, grown)


def test_a_tied_llama_holds_one_tensor_for_both(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "llama")
    message = (
        r'reinit\[1\]\.match: "lm_head\.weight" matches nothing: the checkpoint has no such tensor; where a model ties '
        r"its head to its embeddings, model\.embed_tokens\.weight stands for both"
    )
    with pytest.raises(ckptsurg.SpecError, match=message):
        ckptsurg.plan(
            _more_tokens(dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), "mean")), tmp_path / "llama"
        )


def test_tensors_that_are_equal_stay_so_under_mean_but_not_under_chance(tmp_path):
    """A file may hold a tied tensor under both its names. What is drawn depends on the name, the mean does not."""
    base = {"model.embed_tokens.weight": _values((64, 8), torch.bfloat16, 0)}
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    rule = {"match": "{model.embed_tokens,lm_head}", "shape": {0: 72}, "keep": True}
    same, drawn = (
        _rewritten(tmp_path / str(number), base, {**rule, "init": init})
        for number, init in enumerate(("mean", {"normal": {"std": 0.02}}))
    )
    assert len({_bytes(tensor) for tensor in same.values()}) == 1
    assert len({_bytes(tensor[:64]) for tensor in drawn.values()}) == 1
    assert len({_bytes(tensor[64:]) for tensor in drawn.values()}) == 2


def test_a_new_shape_without_an_edit_of_the_config_is_noted(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).save_pretrained(tmp_path / "bert")
    rule = {"match": "classifier", "shape": {0: 5}, "keep": True, "init": "default"}
    spec = {"version": 1, "freeze": ["**", {"match": "classifier", "rows": "[:3]"}], "reinit": [rule]}
    [note] = ckptsurg.plan(spec, tmp_path / "bert").notes
    said, _, edit = note.partition("; config: ")
    assert said == "config.json says 3 labels, and classifier.weight has 5 rows"
    spec["config"] = yaml.safe_load(edit)
    assert spec["config"] == {"set": {"num_labels": 5}, "unset": ["id2label", "label2id"]}
    assert ckptsurg.plan(spec, tmp_path / "bert").notes == ()
    manifest = ckptsurg.rewrite(spec, tmp_path / "bert", tmp_path / "out")
    model = _load(BertForSequenceClassification, tmp_path / "out")
    assert model.classifier.weight.shape == (5, 32)
    frozen = ckptsurg.freeze(model, manifest)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tokens, labels = torch.randint(0, 64, (10, 12)), torch.arange(10) % 5
    with frozen.guard(optimizer, expect_trained=True):
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    for name in ("classifier.weight", "classifier.bias"):
        after = model.state_dict()[name]
        assert _bytes(after[:3]) == _bytes(before[name][:3]) and _bytes(after[3:]) != _bytes(before[name][3:])


def test_tied_tensors_whose_old_rows_are_frozen_may_be_saved_once(tmp_path):
    weight = torch.randn(5, 3)
    base = {"embed.weight": weight, "head.weight": weight.clone()}
    spec = {
        "version": 1,
        "freeze": {"match": "{embed,head}", "rows": "[:5]"},
        "reinit": [{"match": "{embed,head}", "shape": {0: 7}, "keep": True, "init": "mean"}],
    }
    manifest = ckptsurg.rewrite(spec, base, tmp_path / "out")
    assert manifest.tied == (("embed.weight", "head.weight"),)
    trained = load_file(tmp_path / "out" / "model.safetensors")["embed.weight"]
    trained[5:] += 1
    assert ckptsurg.verify(manifest, {"embed.weight": trained}).ok
    trained[0, 0] += 1
    drifted = ckptsurg.verify(manifest, {"embed.weight": trained}).drifted
    assert [(one.name, one.verdict) for one in drifted] == [("embed.weight", "changed"), ("head.weight", "missing")]
