"""What the README's table says of Keras's ``trainable`` is what it does."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import ckptsurg

from .models import BACKEND, bits, compiled, manifest_of, moved, train

BODY = {"conv/kernel", "conv/bias", "bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance"}
STATISTICS = {"bn/moving_mean", "bn/moving_variance"}
HEAD = {"fc/kernel", "fc/bias"}


def decaying() -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(0.01, weight_decay=0.1)


def freeze_layers(model: keras.Model) -> None:
    for layer in model.layers:
        layer.trainable = layer.name == "fc"


def test_keras_holds_the_weights_of_layers(model):
    before = bits(model)
    freeze_layers(model)
    train(compiled(model, decaying()))
    assert moved(model, before) == HEAD


def test_keras_holds_single_weights_and_then_statistics_move(model):
    before = bits(model)
    for variable in model.weights:
        variable.trainable = variable.path in HEAD
    train(compiled(model, decaying()))
    assert moved(model, before) == STATISTICS | HEAD


def test_a_batch_normalization_that_does_not_train_runs_in_inference_mode(model):
    norm = model.get_layer("bn")
    hidden = np.random.default_rng(0).normal(3, 2, (16, 6, 6, 4)).astype("float32")
    outputs = {}
    for trainable, training in (
        (False, True),
        (False, False),
        (True, False),
        (True, True),
    ):  # the last moves statistics
        norm.trainable = trainable
        output = keras.ops.convert_to_numpy(norm(hidden, training=training))
        outputs[trainable, training] = output.tobytes()
    assert outputs[False, True] == outputs[False, False] == outputs[True, False] != outputs[True, True]


@pytest.mark.parametrize("again", [False, True], ids=["as it is", "compiled again"])
def test_after_fit_a_change_counts_from_the_next_compile_on_tensorflow(model, again):
    train(compiled(model, decaying()))
    freeze_layers(model)
    if again:
        compiled(model, decaying())
    before = bits(model)
    train(model)  # a warning would be an error
    assert moved(model, before) == (BODY | HEAD if BACKEND == "tensorflow" and not again else HEAD)


@pytest.fixture
def spectral() -> keras.Model:
    picture = keras.Input((8, 8, 1))
    hidden = layers.SpectralNormalization(layers.Conv2D(4, 3, name="conv"), name="sn")(picture)
    return keras.Model(picture, layers.Dense(10, name="fc")(layers.GlobalAveragePooling2D()(hidden)))


def test_spectral_normalization_goes_on_whatever_trainable_says(spectral):
    spectral.get_layer("sn").trainable = False
    before = bits(spectral)
    train(compiled(spectral, decaying()))
    assert moved(spectral, before) == HEAD | {"sn/conv/kernel", "sn/vector_u"}


def test_ckptsurg_refuses_to_freeze_what_keras_would_move(spectral):
    with pytest.raises(ckptsurg.FreezeError, match="written by its SpectralNormalization in every step"):
        ckptsurg.freeze(spectral, manifest_of(spectral, "**", "!fc"))


def test_a_layer_that_is_not_there_is_an_error(model):
    with pytest.raises(ValueError, match="No such layer: cnov"):
        model.get_layer("cnov")
