"""Random models of Keras, by a seed: layers of all common kinds, nested, shared and subclassed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

BATCH = 2
#: Layers compute in these; a model has one, its weights with it or in float32.
POLICIES = ("float32", "float32", "float32", "bfloat16", "mixed_bfloat16", "float64")


@keras.saving.register_keras_serializable("ckptsurg")
class Gate(layers.Layer):
    """A layer with a weight, layers in a list and in a dict, and a counter of its own."""

    def __init__(self, units: int, **others: Any) -> None:
        super().__init__(**others)
        self.units = units
        self.steps = [layers.Dense(units, dtype=self.dtype_policy, name=f"step_{n}") for n in range(2)]
        self.named = {"norm": layers.LayerNormalization(dtype=self.dtype_policy, name="norm")}

    def build(self, shape: Sequence[int | None]) -> None:
        self.scale = self.add_weight(shape=(self.units,), name="scale", initializer="ones")
        self.calls = self.add_weight(shape=(), name="calls", dtype="int32", initializer="zeros", trainable=False)
        for step in self.steps:
            step.build(shape)
        self.named["norm"].build((*shape[:-1], self.units))

    def call(self, x: Any) -> Any:
        one, other = (step(x) for step in self.steps)
        return self.named["norm"](one * keras.ops.sigmoid(other)) * self.scale

    def compute_output_shape(self, shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return (*shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("ckptsurg")
class Tower(keras.Model):
    """A subclassed model, with a functional one inside and a weight at the top."""

    def __init__(self, units: int, width: int, **others: Any) -> None:
        super().__init__(**others)
        self.units, self.width = units, width
        given = keras.Input((width,), dtype=self.compute_dtype)
        first = layers.Dense(units, dtype=self.dtype_policy, name="first")(given)
        self.body = keras.Model(
            given, layers.BatchNormalization(dtype=self.dtype_policy, name="bn")(first), name="body"
        )
        self.head = layers.Dense(units, dtype=self.dtype_policy, name="head")

    def build(self, shape: Sequence[int | None]) -> None:
        self.temperature = self.add_weight(shape=(), name="temperature", initializer="ones")
        self.head.build((*shape[:-1], self.units))
        self.built = True

    def call(self, x: Any) -> Any:
        return self.head(self.body(x)) * keras.ops.cast(self.temperature, self.compute_dtype)

    def compute_output_shape(self, shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return (*shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "width": self.width}


Step = Callable[[Any], Any]


class _Maker:
    """What a model is made of: random choices, and a policy that all its layers have."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.policy = POLICIES[seed % len(POLICIES)]
        self.inputs: list[Any] = []
        self.data: list[np.ndarray] = []

    def size(self) -> int:
        return int(self.rng.integers(2, 6))

    def one_of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def give(self, shape: tuple[int, ...], tokens: int | None = None) -> Any:
        """An input, and what a prediction is made of."""
        dtype = "int32" if tokens else keras.DTypePolicy(self.policy).compute_dtype
        values = self.rng.integers(0, tokens, (BATCH, *shape)) if tokens else self.rng.normal(size=(BATCH, *shape))
        self.inputs.append(keras.Input(shape, dtype=dtype))
        self.data.append(values.astype("int32" if tokens else "float32"))
        return self.inputs[-1]

    def make(self, kind: Callable[..., Any], *given: Any, **others: Any) -> Any:
        return kind(*given, dtype=self.policy, **others)

    def apply(self, choices: Sequence[Step], x: Any, count: int) -> Any:
        for number in self.rng.permutation(len(choices))[:count]:
            x = choices[int(number)](x)
        return x

    # Each step takes a tensor and gives one of the same rank.

    def anywhere(self) -> list[Step]:
        make, size = self.make, self.size

        def dense(x: Any) -> Any:
            activation, use_bias = self.one_of("relu", "gelu", None), self.one_of(True, False)
            return make(layers.Dense, size(), activation=activation, use_bias=use_bias)(x)

        return [
            dense,
            lambda x: make(layers.BatchNormalization, scale=self.one_of(True, False))(x),
            lambda x: make(layers.LayerNormalization)(x),
            lambda x: make(layers.RMSNormalization)(x),
            lambda x: make(layers.UnitNormalization)(x),
            lambda x: make(layers.PReLU)(x),
            lambda x: make(layers.Dropout, 0.5)(x),
            lambda x: make(layers.GaussianNoise, 0.1)(x),
            lambda x: make(layers.Rescaling, 0.5, offset=0.1)(x),
            lambda x: make(layers.Activation, "tanh")(x),
            lambda x: make(layers.SpectralNormalization, make(layers.Dense, size()))(x),
            lambda x: make(layers.EinsumDense, "...x,xy->...y", output_shape=4, bias_axes="y")(x),
            lambda x: make(Gate, size())(x),
        ]

    def images(self) -> list[Step]:
        make, size = self.make, self.size
        return [
            lambda x: make(layers.Conv2D, size(), 3, padding="same", dilation_rate=self.one_of(1, 2))(x),
            lambda x: make(layers.SeparableConv2D, size(), 3, padding="same")(x),
            lambda x: make(layers.DepthwiseConv2D, 3, depth_multiplier=self.one_of(1, 2), padding="same")(x),
            lambda x: make(layers.Conv2DTranspose, size(), 2, strides=1, padding="same")(x),
            lambda x: make(layers.GroupNormalization, groups=1)(x),
            lambda x: make(layers.MaxPooling2D, 2, padding="same")(x),
            lambda x: make(layers.AveragePooling2D, 2, padding="same")(x),
            lambda x: make(layers.ZeroPadding2D, 1)(x),
            lambda x: make(layers.SpatialDropout2D, 0.2)(x),
            lambda x: make(layers.UpSampling2D, 2)(x),
        ]

    def sequences(self) -> list[Step]:
        make, size = self.make, self.size

        def recurrent() -> Any:  # orthogonal, the default, is not there in bfloat16
            kind = self.one_of(layers.LSTM, layers.GRU, layers.SimpleRNN)
            return make(kind, size(), recurrent_initializer="glorot_uniform", return_sequences=True)

        def stacked() -> Any:
            cells = [
                make(kind, size(), recurrent_initializer="he_normal") for kind in (layers.LSTMCell, layers.GRUCell)
            ]
            return make(layers.RNN, cells, return_sequences=True)

        return [
            lambda x: make(layers.Conv1D, size(), 3, padding="causal")(x),
            lambda x: make(layers.SeparableConv1D, size(), 2, padding="same")(x),
            lambda x: make(layers.DepthwiseConv1D, 2, padding="same")(x),
            lambda x: make(layers.Conv1DTranspose, size(), 2, padding="same")(x),
            lambda x: recurrent()(x),
            lambda x: make(layers.Bidirectional, recurrent())(x),
            lambda x: stacked()(x),
            lambda x: make(layers.TimeDistributed, make(layers.Dense, size()))(x),
            lambda x: make(layers.MultiHeadAttention, num_heads=2, key_dim=3)(x, x),
            lambda x: make(layers.GroupQueryAttention, head_dim=2, num_query_heads=2, num_key_value_heads=1)(x, x),
            lambda x: make(layers.Attention, use_scale=True)([x, x]),
            lambda x: make(layers.AdditiveAttention)([x, x]),
            lambda x: make(layers.MaxPooling1D, 2, padding="same")(x),
        ]

    def volumes(self) -> list[Step]:
        make, size = self.make, self.size

        def recurrent(x: Any) -> Any:
            others = {"recurrent_initializer": "he_normal", "return_sequences": True}
            return make(layers.ConvLSTM2D, size(), 2, padding="same", **others)(x)

        return [
            recurrent,
            lambda x: make(layers.Conv3D, size(), 2, padding="same")(x),
            lambda x: make(layers.Conv3DTranspose, size(), 2, padding="same")(x),
            lambda x: layers.MaxPooling3D(2, padding="same", dtype="float32")(x),  # TensorFlow has none in float64
            lambda x: make(layers.TimeDistributed, make(layers.Conv2D, size(), 2, padding="same"))(x),
        ]

    def vectors(self) -> list[Step]:
        make, size = self.make, self.size
        return [
            self.functional,
            self.sequential,
            self.normalized,
            self.shared,
            lambda x: make(Tower, size(), x.shape[-1])(x),
            lambda x: make(layers.Add)([x, make(layers.Dense, x.shape[-1])(x)]),
        ]

    def functional(self, x: Any) -> Any:
        given = keras.Input(x.shape[1:], dtype=x.dtype)
        return keras.Model(given, self.sequential(self.apply(self.anywhere(), given, 2)))(x)

    def sequential(self, x: Any) -> Any:
        stack = [self.make(layers.Dense, self.size()), self.make(layers.BatchNormalization)]
        if self.one_of(True, False):
            stack.append(keras.Sequential([self.make(layers.Dense, 3)]))
        return keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), *stack])(x)

    def normalized(self, x: Any) -> Any:
        layer = self.make(layers.Normalization)
        layer.adapt(self.rng.normal(1, 3, (8, x.shape[-1])).astype("float32"))
        return layer(x)

    def shared(self, x: Any) -> Any:
        layer = self.make(layers.Dense, x.shape[-1])
        return self.make(layers.Concatenate)([layer(x), layer(layer(x))])

    def branch(self, kind: str) -> Any:
        """A vector from an input of its own."""
        make, count = self.make, int(self.rng.integers(2, 4))
        if kind == "tokens":
            x = make(layers.Embedding, 11, self.size())(self.give((5,), tokens=11))
            x = self.apply(self.sequences(), x, count)
            return make(self.one_of(layers.LSTM, layers.GRU), 3, recurrent_initializer="glorot_normal")(x)
        if kind == "sequence":
            x = self.apply([*self.sequences(), *self.anywhere()], self.give((6, 4)), count)
            return make(layers.GlobalAveragePooling1D)(x)
        if kind == "image":
            x = self.apply([*self.images(), *self.anywhere()], self.give((6, 6, 3)), count + 1)
            return make(self.one_of(layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D, layers.Flatten))(x)
        if kind == "volume":
            return make(layers.GlobalAveragePooling3D)(self.apply(self.volumes(), self.give((3, 4, 4, 2)), count))
        return self.apply([*self.vectors(), *self.anywhere()], self.give((4,)), count)

    def functional_model(self, kind: str) -> keras.Model:
        """Up to two inputs and two outputs."""
        kinds = [kind, *self.rng.choice(["vector", "image", "sequence", "tokens"], self.one_of(0, 1))]
        vectors = [self.branch(kind) for kind in kinds]
        x = vectors[0] if len(vectors) == 1 else self.make(layers.Concatenate)(vectors)
        outputs = [self.make(layers.Dense, 3)(self.apply(self.vectors(), x, 1))]
        if self.one_of(True, False):
            outputs.append(self.make(layers.Dense, 1, activation="sigmoid")(x))
        return keras.Model(self.inputs if len(self.inputs) > 1 else self.inputs[0], outputs)

    def stacked_model(self) -> keras.Model:
        """A ``Sequential`` or a subclassed model at the top."""
        units = self.size()
        self.data = [self.rng.normal(size=(BATCH, 4)).astype("float32")]
        if self.one_of(True, False):
            model = self.make(Tower, units, 4)
            model.build((None, 4))
            return model
        stack = [self.make(layers.Dense, units), self.make(Tower, units, units), self.make(Gate, 3)]
        return keras.Sequential([keras.Input((4,)), *stack])


def random_model(seed: int) -> tuple[keras.Model, list[np.ndarray]]:
    """A model whose weights have random values, and data for its inputs."""
    maker = _Maker(seed)
    kinds = ("vector", "image", "sequence", "tokens", "volume")
    model = maker.functional_model(kinds[seed % 5]) if seed % 8 else maker.stacked_model()
    scramble(model, seed)
    return model, maker.data


def scramble(model: keras.Model, seed: int) -> None:
    """Other values in every weight: positive, as variances must be, but for a negative zero here and there."""
    rng = np.random.default_rng([seed, 1])
    for variable in model.weights:
        if "int" in variable.dtype:
            values = rng.integers(1, 99, variable.shape)
        else:
            values = np.abs(rng.normal(0.5, 0.2, variable.shape))
            values = (
                np.where(rng.random(variable.shape) < 0.02, -0.0, values)
                if variable.name.endswith("kernel")
                else values
            )
        variable.assign(np.asarray(values).astype(variable.dtype))
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def bytes_of(value: Any) -> bytes:
    return np.ascontiguousarray(keras.ops.convert_to_numpy(value)).tobytes()


def weight_bytes(model: keras.Model) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every weight, in Keras's order."""
    return [(variable.dtype, tuple(variable.shape), bytes_of(variable.value)) for variable in model.weights]


def sha256s(model: keras.Model) -> list[str]:
    return [f"sha256:{hashlib.sha256(raw).hexdigest()}" for _, _, raw in weight_bytes(model)]


def predictions(model: keras.Model, data: Sequence[np.ndarray]) -> list[bytes]:
    given = list(data) if len(data) > 1 else data[0]
    return [bytes_of(output) for output in keras.tree.flatten(model(given, training=False))]
