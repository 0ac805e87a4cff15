"""load_weights: a checkpoint's bits go into a Keras model, all of them or none."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers
from safetensors.numpy import save_file

import ckptsurg
from ckptsurg.frameworks.keras import KerasVariables
from ckptsurg.integrations.keras import load_weights

from .models import bits, compiled, digits, raw, small, train


def _arrays(model: keras.Layer) -> dict[str, np.ndarray]:
    """The weights by name, as another library writes them."""
    return {
        name: np.frombuffer(
            raw(variable), ml_dtypes.bfloat16 if variable.dtype == "bfloat16" else variable.dtype
        ).reshape(tuple(variable.shape))
        for name, variable in KerasVariables(model).variables.items()
    }


@pytest.fixture
def trained() -> keras.Model:
    model = small()
    train(compiled(model))
    return model


@pytest.mark.parametrize("shards", [None, 200])
def test_a_published_checkpoint_gives_a_new_model_its_bits(trained, tmp_path, shards):
    ckptsurg.convert(KerasVariables(trained), tmp_path / "out", max_shard_size=shards)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (1 if shards else 0)
    model = small()
    assert bits(model) != bits(trained)
    load_weights(model, tmp_path / "out")

    assert bits(model) == bits(trained)
    pictures, _ = digits(8)
    assert model.predict(pictures, verbose=0).tobytes() == trained.predict(pictures, verbose=0).tobytes()


def test_what_a_rewrite_makes_loads_into_the_model_that_it_is_for(trained, tmp_path):
    out = tmp_path / "out.safetensors"
    spec = {
        "version": 1,
        "freeze": ["**", "!fc"],
        "reinit": [{"match": "fc", "shape": {-1: 3}, "init": "zeros"}],
    }
    manifest = ckptsurg.rewrite(spec, KerasVariables(trained), out)
    picture = trained.input
    model = keras.Model(picture, layers.Dense(3, name="fc")(trained.get_layer("dropout").output))
    before = bits(trained)
    for variable in model.weights:
        variable.assign(keras.ops.full(variable.shape, 7, variable.dtype))
    load_weights(model, out)

    after = bits(model)
    assert after == {name: before[name] for name in after if not name.startswith("fc/")} | {
        "fc/kernel": bytes(4 * 4 * 3),
        "fc/bias": bytes(4 * 3),
    }
    assert ckptsurg.freeze(model, manifest).verify().ok


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_bit_pattern_arrives(tmp_path, dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    kernel = np.arange(1 << 16, dtype="<u2").view(kind).reshape(256, -1)
    save_file({"dense/kernel": kernel}, tmp_path / "all.safetensors")
    x = keras.Input((256,))
    model = keras.Model(x, layers.Dense(kernel.shape[1], use_bias=False, dtype=dtype, name="dense")(x))
    load_weights(model, tmp_path / "all.safetensors")
    assert bits(model) == {"dense/kernel": kernel.tobytes()}


def test_everything_that_does_not_fit_is_said_at_once_and_the_model_left_alone(trained, tmp_path):
    arrays = _arrays(trained)
    del arrays["conv/bias"], arrays["bn/beta"]
    arrays["conv/bais"] = np.zeros(4, "float32")
    arrays["fc/kernel"] = np.zeros((4, 9), "float32")
    arrays["fc/bias"] = arrays["fc/bias"].astype("float64")
    arrays["conv/kernel"] = arrays["conv/kernel"] + 1
    save_file(arrays, tmp_path / "other.safetensors")
    before = bits(trained)
    with pytest.raises(ckptsurg.UsageError) as refused:
        load_weights(trained, tmp_path / "other.safetensors")

    assert refused.value.message.split("\n") == [
        f"{tmp_path / 'other.safetensors'} does not fit the model (Functional):",
        '  "conv/bias" is not in the checkpoint',
        '  "bn/beta" is not in the checkpoint',
        '  "fc/kernel": the model has F32 [4, 10], the checkpoint F32 [4, 9]',
        '  "fc/bias": the model has F32 [10], the checkpoint F64 [10]',
        '  "conv/bais" is not in the model',
    ]
    assert (
        refused.value.hint == "build the model as it was when the checkpoint was made; where names differ, give `names`"
    )
    assert bits(trained) == before


def test_names_may_be_mapped(trained, tmp_path):
    save_file({f"old/{name}": array for name, array in _arrays(trained).items()}, tmp_path / "old.safetensors")
    model = small()
    load_weights(model, tmp_path / "old.safetensors", names=lambda name: f"old/{name}")
    assert bits(model) == bits(trained)


def test_a_checkpoint_under_keras_paths_loads_too(tmp_path):
    def build() -> keras.Model:
        return keras.Sequential([keras.Input((3,)), layers.Dense(4, name="a"), layers.Dense(2, name="b")], name="net")

    first = build()
    paths = [variable.path for variable in first.weights]
    assert paths[0] == "net/a/kernel"
    arrays = dict(zip(paths, _arrays(first).values(), strict=True))
    save_file(arrays, tmp_path / "paths.safetensors")
    second = build()
    load_weights(second, tmp_path / "paths.safetensors")
    assert bits(second) == bits(first)


def test_an_opened_checkpoint_stays_open(trained, tmp_path):
    from ckptsurg.formats import open_checkpoint

    save_file(_arrays(trained), tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as opened:
        for model in (small(), small()):
            load_weights(model, opened)
            assert bits(model) == bits(trained)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ckptsurg.UsageError, match="no such file"):
        load_weights(small(), tmp_path / "none.safetensors")
    with pytest.raises(ckptsurg.UsageError, match="expected a model of Keras, found str"):
        load_weights("model", tmp_path / "none.safetensors")


def test_what_layers_derive_from_their_weights_follows_them(tmp_path):
    pictures, _ = digits(8)

    def adapted(offset: float) -> keras.Model:
        norm = layers.Normalization(name="norm")
        norm.adapt(pictures * 2 + offset)
        picture = keras.Input((8, 8, 1))
        return keras.Model(picture, norm(picture))

    first, second = adapted(0.0), adapted(5.0)
    assert second.predict(pictures, verbose=0).tobytes() != first.predict(pictures, verbose=0).tobytes()
    ckptsurg.convert(KerasVariables(first), tmp_path / "norm.safetensors")
    load_weights(second, tmp_path / "norm.safetensors")
    assert second.predict(pictures, verbose=0).tobytes() == first.predict(pictures, verbose=0).tobytes()
