"""FreezeCallback: what it lets through, what it stops, and when."""

from __future__ import annotations

import keras
import pytest
from keras import layers

import ckptsurg
from ckptsurg.frameworks.keras import KerasVariables
from ckptsurg.integrations.keras import FreezeCallback, freeze

from .models import BACKEND, bits, compiled, digits, manifest_of, moved, small, train


class At(keras.callbacks.Callback):
    """Does something after one batch."""

    def __init__(self, batch: int, act: object) -> None:
        super().__init__()
        self._batch, self._act, self._seen = batch, act, 0

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self._seen += 1
        if self._seen == self._batch:
            self._act(self.model)


def _nudge(model: keras.Model) -> None:
    kernel = model.get_layer("conv").kernel
    kernel.assign(kernel + 1e-6)


_WAYS = {
    "as Keras does": {"jit_compile": "auto"},
    "in a graph": {"jit_compile": False},
    "eagerly": {"run_eagerly": True},
    # The torch backend takes one step at a time.
    **({"several steps": {"steps_per_execution": 2}} if BACKEND != "torch" else {}),
}


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
def test_an_honest_fit_passes(model, manifest, way):
    before = bits(model)
    frozen = freeze(model, manifest)
    pictures, numbers = digits()
    callback = frozen.callback(expect_trained=True)
    train(compiled(model, **way), [callback], epochs=2, validation_data=(pictures, numbers))
    train(model, [callback])
    assert moved(model, before) == {"fc/kernel", "fc/bias"}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_an_honest_fit_in_mixed_precision_passes(policy):
    keras.mixed_precision.set_global_policy(policy)
    model = small()
    frozen = freeze(model, manifest_of(model, "**", "!fc"))
    train(compiled(model, keras.optimizers.SGD(0.1)), [frozen.callback(expect_trained=True)])


def test_averages_of_what_trains_pass(model, manifest):
    frozen = freeze(model, manifest)
    optimizer = keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=2)
    train(compiled(model, optimizer), [frozen.callback()], epochs=2)


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
def test_a_callback_that_writes_is_caught_at_its_step(model, manifest, way):
    frozen = freeze(model, manifest)
    compiled(model, **way)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        train(model, [At(2, _nudge), frozen.callback()])
    step = 4 if "steps_per_execution" in way else 2
    assert caught.value.message == f"after step {step}, 1 frozen tensor changed:\n  conv/kernel: bits changed"


def test_a_callback_after_it_is_caught_one_step_later(model, manifest):
    frozen = freeze(model, manifest)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^after step 6, 1 frozen tensor changed:\n  conv/kernel"):
        train(compiled(model), [frozen.callback(), At(5, _nudge)], epochs=2)


@pytest.mark.parametrize(("every", "step"), [(3, "after step 6, "), (None, "")])
def test_how_often_it_reads_is_a_choice(model, manifest, every, step):
    frozen = freeze(model, manifest)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        train(compiled(model), [At(4, _nudge), frozen.callback(every=every)], epochs=2)
    assert caught.value.message.startswith(f"{step}1 frozen tensor changed:\n")


def test_a_train_step_that_writes_is_caught(manifest):
    class Own(keras.Model):
        def train_step(self, *args, **kwargs):
            logs = super().train_step(*args, **kwargs)
            norm = self.get_layer("bn")
            norm.gamma.assign(norm.gamma * 0.999)
            return logs

    inner = small()
    manifest = manifest_of(inner, "**", "!fc")
    model = Own(inner.input, inner.output)
    frozen = freeze(model, manifest)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^after step 1, 1 frozen tensor changed:\n  bn/gamma"):
        train(compiled(model), [frozen.callback()])


def test_a_layer_that_writes_to_its_frozen_weight_is_caught():
    class Counting(layers.Layer):
        def build(self, shape):
            self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

        def call(self, x):
            self.seen.assign(self.seen + 1.0)
            return x

    picture = keras.Input((8, 8, 1))
    hidden = layers.Flatten()(Counting(name="counting")(picture))
    model = keras.Model(picture, layers.Dense(10, name="fc")(hidden))
    frozen = freeze(model, manifest_of(model, "counting"))
    with pytest.raises(
        ckptsurg.FrozenWeightsChanged, match=r"^after step 1, 1 frozen tensor changed:\n  counting/seen"
    ):
        train(compiled(model), [frozen.callback()])


def test_a_layer_that_is_turned_on_again_is_named_before_the_next_step(model, manifest):
    frozen = freeze(model, manifest)
    before = bits(model)

    def turn_on(model: keras.Model) -> None:
        model.get_layer("conv").trainable = True
        model.get_layer("bn").trainable = True

    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught:
        train(compiled(model), [frozen.callback(), At(3, turn_on)])
    assert caught.value.message.startswith(
        "before step 4:\n  bn/beta, bn/gamma, conv/bias, conv/kernel; cause: reenabled ("
    )
    assert "\n  bn/moving_mean, bn/moving_variance; cause: batchnorm_stats (" in caught.value.message
    assert caught.value.causes["conv/kernel"] == "reenabled"
    assert moved(model, before) == {"fc/kernel", "fc/bias"}


def test_a_model_that_nobody_froze_is_refused_before_the_first_step(model, manifest):
    before = bits(model)
    with pytest.raises(ckptsurg.FreezeError) as refused:
        train(compiled(model), [FreezeCallback(manifest)])
    assert refused.value.message.split("\n") == [
        "the model (Functional) would train what the manifest freezes:",
        "  bn/moving_mean, bn/moving_variance: moving statistics of a BatchNormalization that trains",
        "  bn/beta, bn/gamma, conv/bias, conv/kernel: trainable",
    ]
    assert refused.value.hint == "freeze it with ckptsurg.freeze(model, manifest), then compile it"
    assert bits(model) == before


def test_a_model_that_keras_alone_froze_passes_if_nothing_would_move(model, manifest):
    model.get_layer("conv").trainable = False
    with pytest.raises(ckptsurg.FreezeError, match=r"bn/beta, bn/gamma: trainable"):
        train(compiled(model), [FreezeCallback(manifest)])
    model.get_layer("bn").trainable = False
    train(compiled(model), [FreezeCallback(manifest, expect_trained=True)])


def test_a_model_without_the_bits_is_refused_before_the_first_step(model, manifest):
    frozen = freeze(model, manifest)
    _nudge(model)
    with pytest.raises(ckptsurg.FreezeError, match=r"does not hold what the manifest freezes, .*\n  conv/kernel: bits"):
        train(compiled(model), [frozen.callback()])


def test_an_optimizer_of_before_the_freeze_is_refused(model):
    train(compiled(model))
    frozen = freeze(model, manifest_of(model, "**", "!fc"))
    with pytest.raises(ckptsurg.FreezeError) as refused:
        train(model, [frozen.callback()])
    assert refused.value.message == (
        "the optimizer was built when bn/beta, bn/gamma, conv/bias, conv/kernel still trained"
    )
    assert refused.value.hint == "compile again after the freeze"
    train(compiled(model), [frozen.callback(expect_trained=True)])


def test_a_function_that_was_compiled_before_is_made_anew():
    model = small(center=False, scale=False)
    model.get_layer("conv").trainable = False
    train(compiled(model))  # TensorFlow compiles a step that moves the statistics, which no optimizer knows
    manifest = manifest_of(model, "conv", "bn")
    model.get_layer("bn").trainable = False
    before = bits(model)
    train(model, [FreezeCallback(manifest, expect_trained=True)])
    assert moved(model, before) == {"fc/kernel", "fc/bias"}


def test_rows_that_nobody_holds_are_refused(model):
    manifest = manifest_of(model, {"match": "fc/bias", "rows": "[2:5]"})
    with pytest.raises(ckptsurg.FreezeError, match=r"\n  fc/bias\[2:5\]: nobody holds the frozen rows"):
        train(compiled(model), [FreezeCallback(manifest)])
    frozen = freeze(model, manifest)
    with pytest.raises(ckptsurg.FreezeError, match=r"fc/bias: frozen in a part, and the optimizer puts averages"):
        train(compiled(model, keras.optimizers.SGD(use_ema=True)), [frozen.callback()])
    train(compiled(model), [frozen.callback(expect_trained=True)])


def test_what_should_have_trained_and_did_not_is_named(model, manifest):
    frozen = freeze(model, manifest)
    model.get_layer("fc").bias.trainable = False
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^1 trainable tensor did not move:\n  fc/bias"):
        train(compiled(model), [frozen.callback(expect_trained=True)])


def test_it_takes_the_path_of_amanifest_of(model, manifest, tmp_path):
    ckptsurg.write_manifest(manifest, tmp_path / "freeze.json")
    freeze(model, manifest)
    train(compiled(model), [FreezeCallback(tmp_path / "freeze.json")])


def test_arguments_that_do_not_fit_are_refused(model, manifest):
    with pytest.raises(ckptsurg.UsageError, match="every: expected a whole number from 1, found 0"):
        FreezeCallback(manifest, every=0)
    with pytest.raises(ckptsurg.UsageError, match="expected a manifest or its path, found dict"):
        FreezeCallback({})
    with pytest.raises(ckptsurg.ManifestError, match="nothing is frozen"):
        FreezeCallback(ckptsurg.make_manifest({"version": 1}, KerasVariables(model)))
