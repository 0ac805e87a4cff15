"""freeze(model, manifest) on Keras: what it holds, what it refuses, what it leaves as it was."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import ckptsurg
from ckptsurg.frameworks.keras import KerasVariables, assign_bytes
from ckptsurg.tensors import TensorInfo

from .models import bits, compiled, digits, flags, manifest_of, moved, small, train

BODY = {"conv/kernel", "conv/bias", "bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance"}
HEAD = {"fc/kernel", "fc/bias"}


def test_only_what_trains_moves(model, manifest):
    before = bits(model)
    frozen = ckptsurg.freeze(model, manifest)
    train(compiled(model, keras.optimizers.AdamW(0.01, weight_decay=0.1)), epochs=3)

    assert moved(model, before) == HEAD
    assert {variable.path for variable in frozen.trainable_variables()} == HEAD
    assert frozen.verify(expect_trained=True).ok
    assert repr(frozen) == "FrozenModel(Functional: 6 frozen, 2 trainable, 1 BatchNormalization kept in inference mode)"


def test_a_frozen_norm_computes_in_training_what_it_computes_in_inference(model):
    norm = model.get_layer("bn")
    hidden = np.random.default_rng(0).normal(3, 2, (16, 6, 6, 4)).astype("float32")
    in_training = keras.ops.convert_to_numpy(norm(hidden, training=True))  # and its statistics move
    expected = keras.ops.convert_to_numpy(norm(hidden, training=False))
    ckptsurg.freeze(model, manifest_of(model, "**", "!fc"))

    found = keras.ops.convert_to_numpy(norm(hidden, training=True))
    assert found.tobytes() == expected.tobytes()
    assert not np.allclose(found, in_training, atol=0.1)


def test_a_layer_is_frozen_in_a_part_by_its_variables(model):
    before = bits(model)
    frozen = ckptsurg.freeze(model, manifest_of(model, "conv/kernel", "bn/{gamma,beta}"))
    assert [layer.trainable for layer in model.layers] == [True] * 7
    train(compiled(model))

    assert moved(model, before) == BODY - {"conv/kernel", "bn/gamma", "bn/beta"} | HEAD
    assert frozen.verify(expect_trained=True).ok


def test_release_gives_the_model_back_as_it_was_found(model):
    model.get_layer("dropout").trainable = False
    model.get_layer("fc").bias.trainable = False
    before = flags(model)
    frozen = ckptsurg.freeze(model, manifest_of(model, "**", {"match": "fc", "optional": True}))
    assert not any(variable.trainable for variable in model.weights)
    assert model.trainable, "what is built on the model is to train"
    frozen.release()

    assert flags(model) == before
    train(compiled(model))
    assert not frozen.verify().ok


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_freezes_that_overlap_are_released_in_any_order(model, order):
    before = flags(model)
    both = [
        ckptsurg.freeze(model, manifest_of(model, "conv", "bn")),
        ckptsurg.freeze(model, manifest_of(model, "bn", {"match": "fc/bias", "rows": "[0:3]"})),
    ]
    both[order[0]].release()
    assert not model.get_layer("bn").trainable
    assert model.get_layer("conv").trainable == (order[0] == 0)
    assert (model.get_layer("fc").bias.constraint is None) == (order[0] == 1)
    both[order[1]].release()

    assert flags(model) == before
    assert model.get_layer("fc").bias.constraint is None


def test_training_is_never_turned_on(model, manifest):
    model.get_layer("fc").trainable = False
    with pytest.warns(UserWarning, match="2 tensors that the manifest leaves to train will not, .*fc/kernel"):
        ckptsurg.freeze(model, manifest)
    assert not model.get_layer("fc").trainable
    assert model.trainable_variables == []


def test_a_model_that_was_trained_before_needs_no_luck(model, manifest):
    train(compiled(model))
    manifest = manifest_of(model, "**", "!fc")
    before = bits(model)
    frozen = ckptsurg.freeze(model, manifest)
    train(model)  # and not compiled again: TensorFlow would go on with the function that trained everything

    assert moved(model, before) == HEAD
    frozen.release()
    train(compiled(model))
    assert moved(model, before) == BODY | HEAD


def test_averages_that_were_kept_before_the_freeze_are_warned_of(model):
    train(compiled(model, keras.optimizers.SGD(0.1, use_ema=True)))
    with pytest.warns(UserWarning, match="compile again after the freeze"):
        ckptsurg.freeze(model, manifest_of(model, "**", "!fc"))


_OPTIMIZERS = {
    "momentum and decay": lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.5),
    "averages": lambda: keras.optimizers.Adam(0.05, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=2),
    "lion": lambda: keras.optimizers.Lion(0.05, clipnorm=1.0),
    "ftrl": lambda: keras.optimizers.Ftrl(0.05, l2_regularization_strength=0.1),
}


@pytest.mark.parametrize("optimizer", _OPTIMIZERS.values(), ids=_OPTIMIZERS)
def test_every_optimizer_leaves_what_is_frozen(model, manifest, optimizer):
    before = bits(model)
    ckptsurg.freeze(model, manifest)
    train(compiled(model, optimizer()), epochs=2)
    assert moved(model, before) == HEAD


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        *((name, {}) for name in _OPTIMIZERS if name != "averages"),
        ("adamw", {"run_eagerly": True}),
        ("adamw", {"jit_compile": "auto"}),
    ],
)
def test_frozen_rows_keep_their_bits_under_every_optimizer(optimizer, way):
    words = keras.Input((3,), dtype="int32")
    table = layers.Embedding(8, 4, name="table", embeddings_constraint=keras.constraints.MaxNorm(0.5, axis=1))
    model = keras.Model(words, layers.Dense(10, name="fc")(layers.Flatten()(table(words))))
    raw = np.random.default_rng(0).normal(size=(8, 4)).astype("<f4")
    raw[2] = [-0.0, 1e-40, 5.0, np.float32(np.nan)]  # a norm beyond the constraint's, and what arithmetic would change
    raw.view("<u4")[2, 3] = 0x7FA00001
    raw = raw[[2, 0, 1, 3, 4, 5, 6, 7]]
    assign_bytes(table.embeddings, TensorInfo("F32", (8, 4)), [raw.tobytes()])
    manifest = manifest_of(model, {"match": "table", "rows": "[0:3]"})
    before = bits(model)
    frozen = ckptsurg.freeze(model, manifest)
    compiled(model, _OPTIMIZERS[optimizer](), **way)
    data = np.random.default_rng(1).integers(1, 8, (32, 3)), np.arange(32) % 10
    model.fit(*data, batch_size=8, epochs=2, verbose=0, callbacks=[frozen.callback()])

    after = bits(model)["table/embeddings"]
    assert after[:48] == before["table/embeddings"][:48]
    rest = np.frombuffer(after, "<f4").reshape(8, 4)[3:]
    assert (rest != raw[3:]).any(axis=1).all()
    assert (np.linalg.norm(rest, axis=1) < 0.501).all(), "the layer's own constraint holds for what trains"
    assert "1 in part" in repr(frozen)


def test_a_new_head_on_a_frozen_base_trains(model, tmp_path):
    base = keras.Model(model.input, model.get_layer("pool").output, name="base")
    manifest = manifest_of(base, "**")
    picture = keras.Input((8, 8, 1))
    whole = keras.Model(picture, layers.Dense(10, name="head")(base(picture)))
    before = bits(whole)

    with pytest.warns(UserWarning, match="left as they are, the manifest lacks them: head/kernel, head/bias"):
        frozen = ckptsurg.freeze(whole, manifest)
    assert frozen.extra == ("head/kernel", "head/bias")
    assert not base.trainable
    train(compiled(whole))
    assert moved(whole, before) == {"head/kernel", "head/bias"}

    with pytest.raises(ckptsurg.FreezeError, match="parameters that the manifest lacks: head/kernel, head/bias"):
        ckptsurg.freeze(whole, manifest, extra="error")


def test_another_head_than_the_published_one_is_warned_of(model):
    manifest = manifest_of(model, "**", "!fc")
    other = keras.Model(model.input, layers.Dense(12, name="fc")(model.get_layer("dropout").output))
    said = r"not as published, but trainable, .*: fc/bias .*, fc/kernel \(expected F32 \[4, 10\], found F32 \[4, 12\]\)"
    with pytest.warns(UserWarning, match=said):
        frozen = ckptsurg.freeze(other, manifest)
    assert frozen.verify().ok and not frozen.verify(expect_trained=True).ok


def test_freezing_the_base_alone_freezes_it_in_the_model_around_it(model):
    base = keras.Model(model.input, model.get_layer("pool").output, name="base")
    picture = keras.Input((8, 8, 1))
    whole = compiled(keras.Model(picture, layers.Dense(10, name="head")(base(picture))))
    ckptsurg.freeze(base, manifest_of(base, "**"))
    before = bits(whole)
    train(whole)
    assert moved(whole, before) == {"head/kernel", "head/bias"}


def test_names_may_be_mapped(model, manifest):
    other = keras.models.clone_model(model, clone_function=lambda layer: _renamed(layer))
    other.set_weights(model.get_weights())
    with pytest.raises(ckptsurg.FreezeError, match=r'all stand under "my_": give names=lambda name: name.removeprefix'):
        ckptsurg.freeze(other, manifest)
    ckptsurg.freeze(other, manifest, names=lambda name: name.removeprefix("my_"))
    assert {variable.path for variable in other.trainable_variables} == {"my_fc/kernel", "my_fc/bias"}


def _renamed(layer: keras.Layer) -> keras.Layer:
    return type(layer).from_config({**layer.get_config(), "name": f"my_{layer.name}"})


def test_a_model_inside_another_is_known_by_the_ends_of_its_names():
    inside = keras.Sequential([keras.Input((4,)), layers.Dense(2)], name="inside")
    outer = keras.Sequential([keras.Input((4,)), keras.Sequential([inside], name="middle")], name="outer")
    assert list(KerasVariables(outer).tensors) == ["middle/inside/dense/kernel", "middle/inside/dense/bias"]
    ckptsurg.freeze(outer, manifest_of(inside, "dense"))
    assert outer.trainable_variables == []


def _change(variable: keras.Variable, value: float = 1.5) -> None:
    variable.assign(keras.ops.full(variable.shape, value, variable.dtype))


def test_a_model_that_does_not_hold_the_manifest_is_refused_and_left_alone(model, manifest):
    _change(model.get_layer("conv").kernel)
    _change(model.get_layer("bn").moving_mean)
    before, were = bits(model), flags(model)
    with pytest.raises(ckptsurg.FreezeError) as refused:
        ckptsurg.freeze(model, manifest)

    assert refused.value.message == (
        "the model (Functional) cannot be frozen:\n"
        '  "bn/moving_mean" has other bits: not loaded, or from another file\n'
        '  "conv/kernel" has other bits: not loaded, or from another file'
    )
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("load the published weights first")
    assert (bits(model), flags(model)) == (before, were)


def test_what_differs_is_named(manifest):
    picture = keras.Input((8, 8, 1))
    hidden = layers.Conv2D(5, 3, name="conv", dtype="float64")(picture)
    model = keras.Model(picture, layers.Dense(10, name="fc")(layers.GlobalAveragePooling2D()(hidden)))
    with pytest.raises(ckptsurg.FreezeError) as refused:
        ckptsurg.freeze(model, manifest)
    for line in (
        '"bn/gamma" is not in the model',
        "conv/kernel: has another shape; expected F32 [3, 3, 1, 4], found F64 [3, 3, 1, 5]",
    ):
        assert f"\n  {line}" in refused.value.message


def test_a_wider_dtype_is_accepted_if_it_is_allowed(model, manifest):
    keras.mixed_precision.set_global_policy("float64")
    wide = small()
    for variable, narrow in zip(wide.weights, model.weights, strict=True):
        variable.assign(keras.ops.cast(narrow, variable.dtype))
    with pytest.raises(ckptsurg.FreezeError, match=r"expected F32, found F64: .* `allow_widened=True` accepts them"):
        ckptsurg.freeze(wide, manifest)
    frozen = ckptsurg.freeze(wide, manifest, allow_widened=True)
    train(compiled(wide), [frozen.callback()])


def test_statistics_alone_cannot_be_frozen(model):
    before = flags(model)
    with pytest.raises(ckptsurg.FreezeError) as refused:
        ckptsurg.freeze(model, manifest_of(model, "bn/moving_*"))
    assert (
        "\n  bn/moving_mean, bn/moving_variance: moving statistics, frozen in a BatchNormalization whose gamma, beta "
        "train: Keras moves them whenever the layer trains; freeze the whole layer, or let its statistics go"
    ) in refused.value.message
    assert flags(model) == before


def test_statistics_without_parameters_are_frozen():
    model = small(center=False, scale=False)
    before = bits(model)
    ckptsurg.freeze(model, manifest_of(model, "bn"))
    train(compiled(model))
    assert moved(model, before) == HEAD | {"conv/kernel", "conv/bias"}


def test_spectral_normalization_is_refused():
    x = keras.Input((4,))
    model = keras.Model(x, layers.SpectralNormalization(layers.Dense(4, name="inner"), name="spectral")(x))
    with pytest.raises(ckptsurg.FreezeError) as refused:
        ckptsurg.freeze(model, manifest_of(model, "**"))
    for name in ("spectral/kernel", "spectral/vector_u"):
        assert f'"{name}" is written by its SpectralNormalization in every step of training' in refused.value.message
    ckptsurg.freeze(model, manifest_of(model, "spectral/inner/bias"))


def test_no_other_layer_of_keras_writes_to_its_frozen_weights_in_training():
    image = keras.Input((6, 6, 2))
    hidden = layers.BatchNormalization(renorm=True)(image)
    hidden = layers.GroupNormalization(1)(layers.SeparableConv2D(2, 3, padding="same")(hidden))
    hidden = layers.Normalization(mean=0.5, variance=2.0)(layers.LayerNormalization()(hidden))
    hidden = layers.UnitNormalization()(layers.Conv2DTranspose(3, 3, padding="same")(hidden))
    steps = layers.Reshape((36, 3))(hidden)
    steps = layers.TimeDistributed(layers.BatchNormalization())(
        layers.Bidirectional(layers.GRU(2, return_sequences=True))(steps)
    )
    steps = layers.GroupQueryAttention(4, 2, 1)(steps, steps)
    steps = layers.EinsumDense("abc,cd->abd", (None, 4))(steps)
    steps = layers.RNN(layers.LSTMCell(3, dropout=0.1))(steps)
    model = keras.Model(image, layers.Dense(2)(layers.PReLU()(steps)))
    before = bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of Keras: there is nothing to train
        ckptsurg.freeze(model, manifest_of(model, "**"))
        model.compile("sgd", "mse")
        rng = np.random.default_rng(0)
        model.fit(rng.normal(size=(8, 6, 6, 2)), rng.normal(size=(8, 2)), batch_size=4, verbose=0)
    assert moved(model, before) == set()


def test_float8_histories_keep_their_bits():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="one"), layers.Dense(8, name="two")])
    for layer in model.layers:
        layer.quantize("float8")
    names = {variable.path.removeprefix("sequential/") for variable in model.layers[0].weights}
    assert "one/inputs_amax_history" in names
    before = bits(model)
    ckptsurg.freeze(model, manifest_of(model, "one", "two/kernel_amax_history"))
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 8)), np.ones((8, 8)), verbose=0)
    changed = {path.removeprefix("sequential/") for path in moved(model, before)}
    assert changed >= {"two/kernel", "two/inputs_amax_history"}
    assert changed.isdisjoint({*names, "two/kernel_amax_history"})


def test_mixed_precision_trains_the_head_alone():
    keras.mixed_precision.set_global_policy("mixed_float16")
    model = small()
    before = bits(model)
    ckptsurg.freeze(model, manifest_of(model, "**", "!fc"))
    train(compiled(model, keras.optimizers.SGD(0.1)))
    assert moved(model, before) == HEAD


def test_turning_a_layer_on_again_is_told_as_the_cause(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    model.get_layer("conv").trainable = True
    model.get_layer("bn").trainable = True
    train(compiled(model))
    report = frozen.verify()
    causes = {one.name: one.cause for one in report.drifted}
    assert causes == {
        **dict.fromkeys(("conv/kernel", "conv/bias", "bn/gamma", "bn/beta"), "reenabled"),
        **dict.fromkeys(("bn/moving_mean", "bn/moving_variance"), "batchnorm_stats"),
    }


def test_a_baseline_says_where(model, manifest):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    frozen = ckptsurg.freeze(model, manifest)
    kernel = model.get_layer("conv").kernel
    value = keras.ops.convert_to_numpy(kernel).copy()
    value[0, 2, 0, 1] += 0.5
    kernel.assign(value)
    (found,) = frozen.verify(KerasVariables(copy)).drifted
    assert (found.name, found.detail.first_index, found.detail.elements_changed) == ("conv/kernel", (0, 2, 0, 1), 1)


@pytest.mark.parametrize("given", [object(), "model.keras", None])
def test_what_is_no_model_is_refused(manifest, given):
    from ckptsurg.integrations.keras import freeze

    with pytest.raises(ckptsurg.UsageError, match="expected a model of Keras, found"):
        freeze(given, manifest)


def test_arguments_that_do_not_fit_are_refused(model, manifest):
    with pytest.raises(ckptsurg.UsageError, match='extra: expected "keep" or "error", found drop'):
        ckptsurg.freeze(model, manifest, extra="drop")
    with pytest.raises(ckptsurg.ManifestError, match="nothing is frozen"):
        ckptsurg.freeze(model, ckptsurg.make_manifest({"version": 1}, KerasVariables(model)))


def test_predictions_do_not_change_by_a_freeze(model, manifest):
    pictures, _ = digits(8)
    before = model.predict(pictures, verbose=0).tobytes()
    ckptsurg.freeze(model, manifest)
    assert model.predict(pictures, verbose=0).tobytes() == before
