"""200 random models of Keras: what is exported, rewritten without rules and loaded back is what it was, to the bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import keras
import pytest

import ckptsurg
from ckptsurg.integrations.keras import load_weights

from .random_models import predictions, random_model, scramble, sha256s, weight_bytes

# Keras gives numpy its variables in a way that numpy means to give up.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

MODELS = 200
BATCHES = 20  # so that workers can share them
EVERYTHING = {"version": 1, "freeze": ["**"]}

#: What must come up among the layers, or the tests below would show less than they say.
KINDS = {
    "AdditiveAttention", "Attention", "AveragePooling2D", "BatchNormalization", "Bidirectional", "Conv1D",
    "Conv1DTranspose", "Conv2D", "Conv2DTranspose", "Conv3D", "Conv3DTranspose", "ConvLSTM2D", "Dense",
    "DepthwiseConv1D", "DepthwiseConv2D", "Dropout", "EinsumDense", "Embedding", "Functional", "GRU", "Gate",
    "GroupNormalization", "GroupedQueryAttention", "LSTM", "LayerNormalization", "MaxPooling1D", "MaxPooling2D",
    "MaxPooling3D", "MultiHeadAttention", "Normalization", "PReLU", "RMSNormalization", "RNN", "Rescaling",
    "SeparableConv1D", "SeparableConv2D", "Sequential", "SimpleRNN", "SpectralNormalization", "TimeDistributed",
    "Tower", "UnitNormalization",
}  # fmt: skip


def copy_of(model: keras.Model) -> keras.Model:
    """The same architecture with other weights."""
    copy = type(model).from_config(model.get_config())
    if not copy.built:
        copy.build((None, 4))
    scramble(copy, 10**6)
    return copy


@pytest.mark.parametrize("batch", range(BATCHES))
def test_an_export_that_is_rewritten_without_rules_loads_back_to_the_bit(batch, tmp_path):
    for seed in range(batch, MODELS, BATCHES):
        model, data = random_model(seed)
        weights, outputs = weight_bytes(model), predictions(model, data)
        base = Path(tmp_path / f"{seed}.keras")
        model.save(base)
        manifest = ckptsurg.rewrite(EVERYTHING, base, tmp_path / str(seed), digest="sha256")

        assert Counter(record.digest for record in manifest.tensors.values()) == Counter(sha256s(model)), seed
        assert ckptsurg.make_manifest(["**"], model, digest="sha256").tensors == manifest.tensors, seed
        assert ckptsurg.verify(manifest, model, exact=True).verified == len(weights), seed

        copy = copy_of(model)
        assert len(weights) == len(copy.weights)
        assert any(one != other for one, other in zip(weights, weight_bytes(copy), strict=True))
        load_weights(copy, tmp_path / str(seed))
        assert weight_bytes(copy) == weights, seed
        assert predictions(copy, data) == outputs, seed


def test_the_random_models_have_layers_of_all_common_kinds():
    found: Counter[str] = Counter()
    for seed in range(100):
        found.update({type(layer).__name__ for layer in random_model(seed)[0]._flatten_layers()})
    assert found.keys() >= KINDS
    assert min(found[kind] for kind in KINDS) >= 3
