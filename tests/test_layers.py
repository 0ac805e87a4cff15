"""Slices over a model's layers in their order, where the metadata of a file tells it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import ckptsurg
from ckptsurg.layers import LAYERS_KEY, Layer, from_metadata, to_text
from ckptsurg.matching import Names
from ckptsurg.patterns import PatternError

SEGMENTS = st.sampled_from(["a", "b", "block", "kernel", "0", "1"])
TENSORS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join), min_size=1, max_size=12, unique=True)


@st.composite
def models(draw: st.DrawFn, depth: int = 2) -> tuple[list[Layer], list[str]]:
    """Layers that share out names between them, some of them models themselves; and all names."""
    names = draw(TENSORS)
    owners = draw(st.lists(st.integers(0, 5), min_size=len(names), max_size=len(names)))
    layers = []
    for number in range(6):
        own = [name for name, owner in zip(names, owners, strict=True) if owner == number]
        below = [Layer("inner", own[:1]), Layer("rest", own[1:])] if depth and draw(st.booleans()) else []
        layers.append(Layer(draw(SEGMENTS), own, below))
    return layers, names


@given(models(), st.integers(-6, 5))
def test_a_number_selects_the_tensors_of_that_layer_and_no_other(model, number):
    layers, names = model
    [(_, selected)] = Names(names, layers).match(f"layers[{number}]")
    assert sorted(selected) == sorted(layers[number].tensors)


@given(models(), st.integers(-6, 6), st.integers(-6, 6))
def test_a_slice_is_a_slice_of_a_python_list(model, start, stop):
    layers, names = model
    [(_, selected)] = Names(names, layers).match(f"layers[{start}:{stop}]")
    expected = [name for layer in layers[start:stop] for name in layer.tensors]
    assert sorted(selected) == sorted(expected)


@given(models())
def test_the_order_survives_as_text(model):
    layers, _ = model
    read = from_metadata({LAYERS_KEY: to_text(layers)})
    assert to_text(read) == to_text(layers)


def test_a_layer_called_layers_is_not_taken_for_the_order():
    names = ["stem/kernel", "layers/0/kernel", "layers/1/kernel", "head/kernel"]
    layers = [Layer("stem", names[:1]), Layer("layers", names[1:3]), Layer("head", names[3:])]
    with pytest.raises(PatternError, match="a layer is called layers, and the model has layers in an order"):
        Names(names, layers).match("layers[:-1]")


def test_a_glob_never_means_the_order():
    layers = [Layer("lstm", ["lstm/kernel"]), Layer("head", ["head/kernel"])]
    [(_, selected)] = Names(["lstm/kernel", "head/kernel"], layers).match("la*")
    assert not selected


NESTED: object = {"name": "m", "tensors": ["a/b"]}
for _ in range(30):
    NESTED = {"name": "m", "tensors": ["a/b"], "layers": [NESTED, {"name": "n", "tensors": []}]}


@pytest.mark.parametrize(
    "text",
    [
        "[", "{}", "[3]", "[{}]", '[{"name": 3, "tensors": []}]', '[{"name": "a", "tensors": ["\\ud800"]}]',
        '[{"name": "a", "tensors": [], "layers": 7}]', "[" * 100_000,
    ],
)  # fmt: skip
def test_metadata_that_is_somebody_elses_is_only_text(tmp_path, text):
    save_file({"a.b": torch.ones(1)}, tmp_path / "a.safetensors", {LAYERS_KEY: text})
    with pytest.raises(ckptsurg.SpecError, match=r"layers\[0\].* matches nothing"):
        ckptsurg.plan({"version": 1, "freeze": "layers[0]"}, tmp_path / "a.safetensors")
    assert ckptsurg.plan({"version": 1, "freeze": "a"}, tmp_path / "a.safetensors").counts["frozen"] == 1


def test_models_deep_in_models_cost_no_more_than_their_layers(tmp_path):
    save_file({"a/b": torch.ones(1)}, tmp_path / "a.safetensors", {LAYERS_KEY: json.dumps([NESTED])})
    plan = ckptsurg.plan({"version": 1, "freeze": "m.m.m.layers[0]"}, tmp_path / "a.safetensors")
    assert plan.counts["frozen"] == 1
