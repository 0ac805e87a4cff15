"""The recipes of Keras, each the whole way with Keras's own architecture: base, rewrite or freeze, fit, verify."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

import ckptsurg
from ckptsurg.integrations.keras import FreezeCallback, load_weights

from .pretrained import accustomed, images

CROSSENTROPY = "sparse_categorical_crossentropy"
SPECS = Path(__file__).parent.parent.parent / "specs"


def _spec(start: str) -> Path:
    [path] = SPECS.glob(f"{start}*.yaml")
    return path


def _digest(model: keras.Model) -> dict[int, bytes]:
    """What each weight holds, by its position in ``model.weights``: an oracle that knows no names."""
    return {position: np.asarray(keras.ops.convert_to_numpy(w)).tobytes() for position, w in enumerate(model.weights)}


def _fit(
    model: keras.Model, manifest: ckptsurg.Manifest, data, *, loss=CROSSENTROPY, lr: float = 1e-3, all_move: bool = True
) -> set[str]:
    """Freeze, compile, fit; returns which weights moved, by their path, after checking that the frozen ones did not."""
    frozen = ckptsurg.freeze(model, manifest)
    model.compile(keras.optimizers.Adam(lr), loss=loss, jit_compile=False)
    before = _digest(model)
    model.fit(*data, batch_size=8, epochs=1, verbose=0, callbacks=[FreezeCallback(manifest, expect_trained=all_move)])
    after = _digest(model)
    assert frozen.verify().ok
    return {model.weights[position].path for position, raw in before.items() if after[position] != raw}


def _verify(manifest: Path, trained: Path, *options: str) -> tuple[int, dict[str, str | None]]:
    command = [sys.executable, "-m", "ckptsurg", "verify", "--json", str(manifest), str(trained), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, {one["name"]: one["cause"] for one in json.loads(done.stdout)["drifted"]}


def _classifier() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(8, 3, name="conv_1"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.SeparableConv2D(8, 3, name="separable_conv_2"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax", name="classifier"),
        ]
    )


def _compile(model: keras.Model) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile(keras.optimizers.Adam(1e-2), loss=loss, jit_compile=False)


def _pretrained(folder: Path) -> Path:
    """The file that the recipe begins with, of a model that was trained for moments."""
    model = _classifier()
    _compile(model)
    model.fit(*images(16, 32), verbose=0)
    model.save(folder / "pretrained_model.h5")
    return folder / "pretrained_model.h5"


def test_k1_convolutions_of_a_legacy_file(tmp_path):
    pretrained = _pretrained(tmp_path)
    manifest = ckptsurg.make_manifest(_spec("k1"), pretrained)
    ckptsurg.write_manifest(manifest, tmp_path / "freeze.json")
    model = keras.models.load_model(pretrained)
    ckptsurg.freeze(model, manifest)
    assert [layer.name for layer in model.layers if not layer.trainable] == ["conv_1", "separable_conv_2"]
    _compile(model)  # again: what was compiled before knows nothing of the freeze
    before = _digest(model)
    model.fit(*images(16, 32), verbose=0, callbacks=[FreezeCallback(manifest, expect_trained=True)])
    moved = {model.weights[position].path for position, raw in _digest(model).items() if before[position] != raw}
    assert {path.rpartition("/")[0].rpartition("/")[2] for path in moved} == {"norm", "classifier"}
    model.save(tmp_path / "trained.h5")
    assert _verify(tmp_path / "freeze.json", tmp_path / "trained.h5") == (0, {})


def test_k1_frozen_by_a_name_that_is_no_layers_moves(tmp_path):
    pretrained = _pretrained(tmp_path)
    manifest = ckptsurg.make_manifest(_spec("k1"), pretrained)
    ckptsurg.write_manifest(manifest, tmp_path / "freeze.json")
    model = keras.models.load_model(pretrained)
    for layer in model.layers:
        if layer.name.startswith("conv"):  # and separable_conv_2 is not found
            layer.trainable = False
    _compile(model)
    model.fit(*images(16, 32), verbose=0)
    model.save(tmp_path / "trained.h5")
    code, causes = _verify(tmp_path / "freeze.json", tmp_path / "trained.h5", "--baseline", str(pretrained))
    assert code == 1
    assert set(causes) == {f"separable_conv_2/{name}" for name in ("depthwise_kernel", "pointwise_kernel", "bias")}


def _on_top_of(base: keras.Model, *head: layers.Layer) -> keras.Model:
    """The recipe's model: the base, called as one layer in inference mode, pooling, and a head."""
    inputs = keras.Input(base.input_shape[1:])
    x = layers.GlobalAveragePooling2D()(base(inputs, training=False))
    for layer in head:
        x = layer(x)
    return keras.Model(inputs, x)


def test_k2_resnet50_new_head(tmp_path):
    base = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(32, 32, 3))
    base.save(tmp_path / "base.keras")
    manifest = ckptsurg.rewrite(_spec("k2"), tmp_path / "base.keras", tmp_path / "out")
    head = (
        layers.Dense(1024, activation="relu", name="hidden"),
        layers.Dense(10, activation="softmax", name="predictions"),
    )
    model = _on_top_of(base, *head)
    load_weights(model, tmp_path / "out")
    assert _fit(model, manifest, images(32, 16)) == {
        "hidden/kernel",
        "hidden/bias",
        "predictions/kernel",
        "predictions/bias",
    }
    model.save(tmp_path / "trained.keras")
    assert ckptsurg.verify(tmp_path / "out", tmp_path / "trained.keras", expect_trained=True).ok


def test_k3_mobilenetv2_in_two_phases(tmp_path):
    base = accustomed(keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(32, 32, 3)))
    base.save(tmp_path / "base.keras")
    manifest = ckptsurg.rewrite(_spec("k3-mobilenetv2-new-head"), tmp_path / "base.keras", tmp_path / "out")
    model = _on_top_of(base, layers.Dense(10, activation="softmax", name="predictions"))
    load_weights(model, tmp_path / "out")
    assert _fit(model, manifest, images(32, 16)) == {"predictions/kernel", "predictions/bias"}
    model.save(tmp_path / "phase1.keras")
    assert ckptsurg.verify(tmp_path / "out", tmp_path / "phase1.keras").ok

    second = ckptsurg.make_manifest(_spec("k3-mobilenetv2-fine-tuning"), tmp_path / "phase1.keras")
    ckptsurg.write_manifest(second, tmp_path / "phase2.freeze.json")
    first = [layer.name for layer in base.layers].index("block_13_expand")
    onward = {weight.path for layer in base.layers[first:] for weight in layer.weights}
    trains = {name for name, record in second.tensors.items() if not record.frozen}
    assert trains == onward | {"predictions/kernel", "predictions/bias"}

    resumed = keras.models.load_model(tmp_path / "phase1.keras")
    for layer in resumed.layers:  # the file has kept what was frozen; the model itself trains, and hands nothing down
        layer.trainable = True
    moved = _fit(resumed, second, images(32, 16), lr=1e-5, all_move=False)
    assert {path for path in trains if not path.endswith(("moving_mean", "moving_variance"))} <= moved <= trains
    resumed.save(tmp_path / "phase2.keras")
    assert _verify(tmp_path / "phase2.freeze.json", tmp_path / "phase2.keras") == (0, {})


def test_k3_thawed_without_a_line_between_moves_all(tmp_path):
    """The second phase as it is often written: the base is thawed as a whole, and runs in training mode."""
    base = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(32, 32, 3))
    model = keras.Sequential([base, layers.GlobalAveragePooling2D(), layers.Dense(10, name="predictions")])
    model.build((None, 32, 32, 3))
    manifest = ckptsurg.make_manifest(_spec("k3-mobilenetv2-fine-tuning"), model)
    first = [layer.name for layer in base.layers].index("block_13_expand")
    for layer in base.layers[:first]:
        if not isinstance(layer, layers.BatchNormalization):
            layer.trainable = False
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss=loss, jit_compile=False)  # a rate of zero: nothing trains
    model.fit(*images(32, 16), batch_size=8, verbose=0)
    drifted = ckptsurg.verify(manifest, model).drifted
    assert {one.cause for one in drifted} == {"batchnorm_stats"}
    norms = [layer for layer in base.layers[:first] if isinstance(layer, layers.BatchNormalization)]
    assert {one.name for one in drifted} <= {weight.path for layer in norms for weight in layer.non_trainable_weights}


def test_k4_mobilenetv2_for_one_class(tmp_path):
    whole = accustomed(keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3)))
    whole.save(tmp_path / "base.keras")
    manifest = ckptsurg.rewrite(_spec("k4"), tmp_path / "base.keras", tmp_path / "out")
    new = layers.Dense(1, activation="sigmoid", name="predictions")
    model = keras.Model(whole.input, new(whole.layers[-2].output))
    load_weights(model, tmp_path / "out")
    moved = _fit(model, manifest, images(32, 16, classes=2), loss="binary_crossentropy")
    assert moved == {"predictions/kernel", "predictions/bias"}
    model.save(tmp_path / "trained.keras")
    assert ckptsurg.verify(tmp_path / "out", tmp_path / "trained.keras", exact=True).ok


def test_k5_resnet50_functional_from_weights_alone(tmp_path):
    old = keras.applications.ResNet50(weights=None, classes=7, input_shape=(32, 32, 3))
    old.save_weights(tmp_path / "base.weights.h5")

    def build() -> keras.Model:
        return keras.applications.ResNet50(weights=None, classes=7, input_shape=(32, 32, 3))

    with ckptsurg.open_checkpoint(tmp_path / "base.weights.h5", model=build) as base:
        manifest = ckptsurg.rewrite(_spec("k5"), base, tmp_path / "out.safetensors")
    hidden = layers.Dense(1024, activation="relu", name="dense")(old.layers[-2].output)
    model = keras.Model(old.input, layers.Dense(3, activation="softmax", name="classes")(hidden))
    load_weights(model, tmp_path / "out.safetensors")
    moved = _fit(model, manifest, images(32, 16, classes=3))
    assert moved == {"dense/kernel", "dense/bias", "classes/kernel", "classes/bias"}
    model.save_weights(tmp_path / "trained.weights.h5")
    with ckptsurg.open_checkpoint(tmp_path / "trained.weights.h5", model=lambda: model) as trained:
        assert ckptsurg.verify(manifest, trained, exact=True).ok


def test_k6_inceptionv3_all_but_the_last_five_layers(tmp_path):
    base = keras.applications.InceptionV3(weights=None, include_top=False, input_shape=(75, 75, 3))
    base.save(tmp_path / "base.keras")
    manifest = ckptsurg.rewrite(_spec("k6"), tmp_path / "base.keras", tmp_path / "out")
    weights = {weight.path for layer in base.layers[:-5] for weight in layer.weights}
    assert {name for name, record in manifest.tensors.items() if record.frozen} == weights
    pooled = layers.GlobalAveragePooling2D()(base.output)
    model = keras.Model(base.input, layers.Dense(10, activation="softmax", name="predictions")(pooled))
    load_weights(model, tmp_path / "out")
    assert _fit(model, manifest, images(75, 8), lr=1e-4) == {"predictions/kernel", "predictions/bias"}
    model.save(tmp_path / "trained.keras")
    assert ckptsurg.verify(tmp_path / "out", tmp_path / "trained.keras").ok
