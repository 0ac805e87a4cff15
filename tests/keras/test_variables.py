"""Variables of a Keras model as named tensors: names that last, and bytes that are theirs."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras import layers

import ckptsurg
from ckptsurg.frameworks.keras import KerasVariables, assign_bytes
from ckptsurg.tensors import CHUNK_BYTES, TensorInfo

from .models import raw, small


@keras.saving.register_keras_serializable("tests")
class Scaled(layers.Layer):
    """A custom layer that names what it makes."""

    def __init__(self, units: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.inner = layers.Dense(units, name="inner")

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.scale = self.add_weight(shape=(self.units,), initializer="ones", name="scale")
        self.inner.build(shape)

    def call(self, x: object) -> object:
        return self.inner(x) * self.scale


class Unnamed(keras.Model):
    """A subclassed model that leaves all names to Keras."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [layers.Dense(4) for _ in range(3)]
        self.norm = layers.BatchNormalization()

    def build(self, shape: tuple[int | None, ...]) -> None:
        for block in (*self.blocks, self.norm):
            block.build(shape)
        self.offset = self.add_weight(shape=(4,))

    def call(self, x: object, training: bool = False) -> object:
        for block in self.blocks:
            x = block(x)
        return self.norm(x, training=training) + self.offset


def _functional(name: str, layer: str = "fc") -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(4, name=layer)(x), name=name)


def _nested() -> keras.Model:
    x = keras.Input((4,))
    head = keras.Sequential([layers.Dense(4), layers.Dense(3)], name="head")
    return keras.Model(x, head(_functional("base")(x)))


def _twins() -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(2, name="out")(_functional("right")(_functional("left")(x))))


def _wrapped() -> keras.Model:
    x = keras.Input((5, 4))
    y = layers.TimeDistributed(layers.Dense(4))(x)
    y = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(y)
    y = layers.RNN([layers.LSTMCell(3), layers.GRUCell(4)], return_sequences=True)(y)
    y = layers.MultiHeadAttention(2, 3)(y, y)
    return keras.Model(x, layers.SpectralNormalization(layers.Dense(4))(y))


def _custom() -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, Scaled(2)(Scaled(3)(x)))


def _sequential() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(2)])


def _sequential_over_functional() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), _functional("base"), keras.Sequential([layers.Dense(2)])])


_KINDS: list[Callable[[], keras.Model]] = [
    _sequential,
    _nested,
    _twins,
    _wrapped,
    _custom,
    _sequential_over_functional,
]


def _bytes(source: KerasVariables) -> dict[str, bytes]:
    return {name: b"".join(bytes(chunk) for chunk in source.read(name)) for name in source.tensors}


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.__name__.strip("_"))
@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_a_model_that_was_saved_and_loaded_has_the_names_and_bytes_it_had(kind, ending, tmp_path):
    model = kind()
    source = KerasVariables(model)
    model.save(tmp_path / f"model{ending}")
    loaded = KerasVariables(keras.models.load_model(tmp_path / f"model{ending}", compile=False))

    assert list(source.variables.values()) == list(model.weights)
    assert _bytes(source) == {name: raw(variable) for name, variable in source.variables.items()}
    assert _bytes(loaded) == _bytes(source)
    assert list(loaded.tensors.items()) == list(source.tensors.items())
    assert loaded.metadata == source.metadata


def test_names_of_a_functional_model_are_the_paths_of_keras():
    model = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(32, 32, 3), alpha=0.35)
    x = keras.Input((32, 32, 3))
    whole = keras.Model(x, layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(model(x))))

    assert list(KerasVariables(model).tensors) == [variable.path for variable in model.weights]
    assert list(KerasVariables(whole).tensors) == [variable.path for variable in whole.weights]
    assert KerasVariables(whole).tensors["block_13_expand/kernel"].shape == (1, 1, 32, 192)


def test_layers_of_one_name_are_told_apart_by_the_models_they_are_in():
    assert list(KerasVariables(_twins()).tensors) == [
        *("left/fc/kernel", "left/fc/bias", "right/fc/kernel", "right/fc/bias", "out/kernel", "out/bias")
    ]


def test_variables_that_no_name_tells_apart_are_refused():
    class Same(layers.Layer):
        def build(self, shape):
            for _ in range(2):
                self.add_weight(shape=(2,), name="w")

    model = keras.Sequential([keras.Input((2,)), Same(name="same")])

    with pytest.raises(ckptsurg.FreezeError, match=r"several variables that are called the same: same/w") as refused:
        KerasVariables(model)
    assert refused.value.hint == "give the layers, and the weights in a layer, names of their own"


def test_a_layer_that_is_used_twice_has_one_name():
    x = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    inner = keras.Model(x, shared(x), name="inner")
    model = keras.Model(x, shared(inner(x)))

    assert sorted(KerasVariables(model).tensors) == ["shared/bias", "shared/kernel"]


def test_names_that_keras_has_for_a_variable_stand_for_it_where_they_are_wanted(tmp_path):
    model = _sequential()
    paths = [variable.path for variable in model.weights]
    assert paths[0] == "sequential/dense/kernel"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    inside = keras.Sequential([keras.Input((4,)), model])

    for one in (model, loaded, inside):
        assert list(KerasVariables(one, paths).tensors) == paths
    without = list(KerasVariables(model).tensors)
    assert without[0] == "dense/kernel"
    assert list(KerasVariables(inside, without).tensors) == without
    assert list(KerasVariables(model, ["dense/kernel", "else/kernel"]).tensors) == without


def test_layers_that_a_model_leaves_unnamed_are_known_when_the_model_is_made_again():
    first, second = Unnamed(), Unnamed()
    for model in (first, second):
        model.build((None, 4))
    wanted = KerasVariables(first).tensors
    again = KerasVariables(second, wanted)

    assert set(KerasVariables(second).tensors).isdisjoint(wanted)
    assert set(again.tensors) == set(wanted)
    for ours, theirs in zip(first.weights, second.weights, strict=True):
        name = next(name for name, variable in KerasVariables(first).variables.items() if variable is ours)
        assert again.variables[name] is theirs


def test_a_layer_alone_is_a_source_too():
    layer = Scaled(3)
    layer.build((None, 4))

    assert list(KerasVariables(layer).tensors) == ["scale", "inner/kernel", "inner/bias"]


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(ckptsurg.FreezeError, match=r"the model \(Sequential\) is not built: it has no weights yet"):
        KerasVariables(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ckptsurg.FreezeError, match="call it once on data"):
        KerasVariables(Unnamed())


#: Bytes of which any arithmetic, and any other dtype on the way, would change some: every pattern of 16 bits.
_PATTERNS = np.arange(1 << 16, dtype="<u2").tobytes()

_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_FLOAT8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_INTEGERS = {"int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64"}


def _zeros(shape: tuple[int, ...], dtype: str) -> object:
    return keras.ops.cast(keras.ops.zeros(shape, "float32"), dtype)  # TensorFlow makes no zeros of float8


def _variable(dtype: str, size: int) -> tuple[keras.Model, keras.Variable]:
    class Holder(layers.Layer):
        def build(self, shape):
            self.add_weight(shape=(size,), dtype=dtype, initializer=_zeros, name="w", trainable=dtype in _FLOATS)

    holder = Holder(name="holder")
    holder.build((None, 1))
    return holder, holder.weights[0]


@pytest.mark.parametrize(("dtype", "ours"), (_FLOATS | _FLOAT8 | _INTEGERS).items())
def test_every_bit_pattern_goes_into_a_variable_and_comes_out_again(dtype, ours):
    width = {"8": 1, "16": 2, "32": 4, "64": 8}[ours.lstrip("BFIU").partition("_")[0]]
    holder, variable = _variable(dtype, len(_PATTERNS) // width)
    info = TensorInfo(ours, (len(_PATTERNS) // width,))
    source = KerasVariables(holder)
    assert source.tensors == {"w": info}

    assign_bytes(variable, info, [_PATTERNS[:1000], _PATTERNS[1000:]])

    assert raw(variable) == _PATTERNS
    assert _bytes(source) == {"w": _PATTERNS}


def test_booleans_keep_their_bytes():
    holder, variable = _variable("bool", 5)
    assign_bytes(variable, TensorInfo("BOOL", (5,)), [b"\1\0\1\1\0"])
    assert _bytes(KerasVariables(holder)) == {"w": b"\1\0\1\1\0"}


def test_a_large_variable_comes_in_chunks():
    holder, variable = _variable("float32", CHUNK_BYTES // 4 + 3)
    chunks = [bytes(chunk) for chunk in KerasVariables(holder).read("w")]
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, 12]
    assert b"".join(chunks) == raw(variable)


def test_bytes_of_another_dtype_or_shape_are_refused():
    _, variable = _variable("float32", 2)
    with pytest.raises(ckptsurg.FreezeError, match=r'"holder/w" is F32 \[2\], and was to become F16 \[2\]'):
        assign_bytes(variable, TensorInfo("F16", (2,)), [bytes(4)])
    assert raw(variable) == bytes(8)


def test_mixed_precision_keeps_variables_in_their_own_dtype():
    keras.mixed_precision.set_global_policy("mixed_float16")
    assert {str(info.dtype) for info in KerasVariables(small()).tensors.values()} == {"F32"}


def _frozen(patterns: list[str], model: keras.Model) -> set[str]:
    manifest = ckptsurg.make_manifest(patterns, KerasVariables(model))
    return set(manifest.frozen)


def test_a_slice_over_layers_counts_as_the_model_counts():
    model = keras.applications.InceptionV3(weights=None, include_top=False, input_shape=(75, 75, 3))
    ours = {id(variable): name for name, variable in KerasVariables(model).variables.items()}

    for start, stop in ((None, -5), (249, None), (-40, -3), (7, 8)):
        expected = {ours[id(v)] for layer in model.layers[start:stop] for v in layer.weights}
        text = f"layers[{'' if start is None else start}:{'' if stop is None else stop}]"
        assert _frozen([text], model) == expected
        assert expected


def test_slices_reach_into_models_in_a_model():
    x = keras.Input((8, 8, 1))
    base = small()
    base = keras.Model(base.input, base.get_layer("pool").output, name="base")
    model = keras.Model(x, layers.Dense(2, name="head")(base(x)))
    norm = {f"bn/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    conv = {"conv/kernel", "conv/bias"}

    assert [layer.name for layer in base.layers] == [base.layers[0].name, "conv", "bn", "relu", "pool"]
    assert _frozen(["base"], model) == norm | conv
    assert _frozen(["base.layers[:-2]"], model) == norm | conv
    assert _frozen(["base.layers[:-3]"], model) == conv
    assert _frozen(["layers[1].layers[2:]"], model) == norm
    assert _frozen(["layers[-1]"], model) == {"head/kernel", "head/bias"}
    assert _frozen(["**", "!layers[1]"], model) == {"head/kernel", "head/bias"}
