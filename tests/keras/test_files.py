"""Files of Keras as bases and as what came back from training; files that are hostile, broken, or of another model."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import marshal
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

import ckptsurg

# Keras gives numpy its variables in a way that numpy means to give up.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SPEC = {"version": 1, "freeze": ["**", "!head"], "reinit": [{"match": "head/out/kernel", "init": "zeros"}]}


def build() -> keras.Model:
    given = keras.Input((4,))
    body = layers.BatchNormalization(name="bn")(layers.Dense(5, name="hidden")(given))
    head = keras.Sequential([keras.Input((5,)), layers.Dense(3, name="out")], name="head")
    return keras.Model(given, head(body), name="classifier")


def filled(model: keras.Model) -> keras.Model:
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape).astype(variable.dtype))
    return model


def save_legacy_weights(model: keras.Model, path: Path) -> None:
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, model)


#: How each format is saved; the last two hold no names of their own.
SAVERS: dict[str, Callable[[keras.Model, Path], None]] = {
    "model.keras": keras.Model.save,
    "model.h5": keras.Model.save,
    "model.weights.h5": keras.Model.save_weights,
    "legacy.h5": save_legacy_weights,
}
WEIGHTS_ALONE = ("model.weights.h5", "legacy.h5")


def opened(path: Path, builder: Callable[[], keras.Model] = build) -> ckptsurg.checkpoints.Checkpoint:
    return ckptsurg.open_checkpoint(path, model=builder if path.name in WEIGHTS_ALONE else None)


def digests(model: keras.Model) -> list[str]:
    raws = [np.ascontiguousarray(keras.ops.convert_to_numpy(variable.value)).tobytes() for variable in model.weights]
    return [f"sha256:{hashlib.sha256(raw).hexdigest()}" for raw in raws]


def flip(variable: keras.Variable) -> None:
    """Turn the lowest bit of its last element."""
    values = np.array(keras.ops.convert_to_numpy(variable.value))
    values.reshape(-1).view(np.uint32)[-1] ^= 1
    variable.assign(values)


# --- What they are for --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVERS)
def test_each_format_is_a_base_and_what_came_back_from_training(name, tmp_path):
    model = filled(build())
    SAVERS[name](model, tmp_path / name)
    with opened(tmp_path / name) as base:
        assert list(base.tensors) == [
            "hidden/kernel", "hidden/bias", "bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance",
            "head/out/kernel", "head/out/bias",
        ]  # fmt: skip
        manifest = ckptsurg.rewrite(SPEC, base, tmp_path / "out", digest="sha256")
        assert ckptsurg.make_manifest(["**"], base, digest="sha256").base == manifest.base
        assert ckptsurg.diff(base, model).ok
        assert ckptsurg.inspect(base, ["head"]).model_dump()["tensors"]

    expected = dict(zip(base.tensors, digests(model), strict=True))
    assert {one: record.digest for one, record in manifest.frozen.items()} == {
        one: digest for one, digest in expected.items() if not one.startswith("head")
    }
    assert manifest.tensors["head/out/kernel"].digest == f"sha256:{hashlib.sha256(bytes(5 * 3 * 4)).hexdigest()}"
    # The frozen weights are what they were, so the base itself verifies, in every format.
    for other, save in SAVERS.items():
        save(model, tmp_path / other)
        with opened(tmp_path / other) as trained:
            assert ckptsurg.verify(manifest, trained).verified == 6, other


@pytest.mark.parametrize("name", SAVERS)
def test_a_flipped_bit_is_found_and_named(name, tmp_path):
    model = filled(build())
    manifest = ckptsurg.make_manifest(["**", "!head"], model)
    flip(model.get_layer("bn").moving_variance)
    flip(model.get_layer("head").get_layer("out").kernel)  # trains
    SAVERS[name](model, tmp_path / name)
    with opened(tmp_path / name) as trained:
        report = ckptsurg.verify(manifest, trained)
    assert [(one.name, one.verdict) for one in report.drifted] == [("bn/moving_variance", "changed")]


def test_the_command_line_reads_weights_with_the_function_that_builds_the_model(tmp_path):
    model = filled(build())
    ckptsurg.write_manifest(ckptsurg.make_manifest(["**"], model), tmp_path / "freeze.json")
    model.save_weights(tmp_path / "model.weights.h5")
    shutil.copy(__file__, tmp_path / "mine.py")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckptsurg", "verify", "freeze.json", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
        )

    done = run("model.weights.h5", "--model", "mine:build")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("model.weights.h5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: model.weights.h5: holds weights alone, which have their names from the model\n"
        "hint: give the function that builds the model: --model module:function (in Python model=function)\n"
    )


# --- Names ------------------------------------------------------------------------------------------


def nested() -> keras.Model:
    given = keras.Input((4,))
    return keras.Model(given, layers.Dense(2)(build()(layers.Dense(4)(given))))


def frozen_inside() -> keras.Model:
    inner = build()
    inner.trainable = False
    given = keras.Input((4,))
    return keras.Model(given, layers.Dense(2)(inner(given)))


def stacked() -> keras.Model:
    inner = keras.Sequential([keras.Input((3,)), keras.Sequential([layers.Dense(4)]), layers.BatchNormalization()])
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), inner, layers.Dense(2)])


def built_later() -> keras.Model:
    model = keras.Sequential([layers.Dense(3), keras.Sequential([layers.Dense(2)])])
    model.build((None, 4))
    return model


def shared() -> keras.Model:
    one, other, layer, inner = keras.Input((4,)), keras.Input((4,)), layers.Dense(4), build()
    return keras.Model(
        [one, other], [layers.Add()([layer(one), layer(other)]), layers.Add()([inner(one), inner(other)])]
    )


def recurrent() -> keras.Model:
    given = keras.Input((5, 4))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(given)
    x = layers.MultiHeadAttention(2, 3)(x, layers.TimeDistributed(keras.Sequential([layers.Dense(2)]))(x))
    return keras.Model(given, layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)])(x))


@pytest.mark.parametrize("builder", [nested, frozen_inside, stacked, built_later, shared, recurrent])
def test_a_model_and_its_files_have_the_same_names(builder, tmp_path):
    model = filled(builder())
    live = ckptsurg.make_manifest(["**"], model)
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        with ckptsurg.open_checkpoint(tmp_path / name) as file:
            assert ckptsurg.make_manifest(["**"], file).tensors == live.tensors, name
    model.save_weights(tmp_path / "model.weights.h5")
    # Names that Keras made up count on in a process; in a new one the function would give the same.
    keras.src.utils.naming.reset_uids()
    with ckptsurg.open_checkpoint(tmp_path / "model.weights.h5", model=builder) as file:
        assert ckptsurg.make_manifest(["**"], file).tensors == live.tensors


# --- Hostile files ------------------------------------------------------------------------------------


def repacked(path: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def reconfigured(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A file with another configuration inside."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            file.attrs["model_config"] = json.dumps(edit(config) or config)
        return path

    def edit_member(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        members["config.json"] = json.dumps(edit(config) or config).encode()

    return repacked(path, edit_member)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def function(path: Path) -> dict[str, Any]:
    code = compile(f"lambda x: __import__('pathlib').Path({str(path)!r}).touch() or x", "model", "eval").co_consts[0]
    encoded = base64.b64encode(marshal.dumps(code)).decode()
    return {"class_name": "__lambda__", "config": {"code": encoded, "defaults": None, "closure": None}}


def added(module: str | None, kind: str, config: dict[str, Any], arguments: list[Any] | None = None) -> Any:
    """Put one more layer into a configuration."""
    layer = {"class_name": kind, "config": config, "name": "more", "registered_name": kind}
    layer |= {"inbound_nodes": [] if arguments is None else [{"args": arguments, "kwargs": {}}]}
    layer |= {} if module is None else {"module": module}
    return lambda config: config["config"]["layers"].append(layer)


def named(module: str, name: str) -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def activation(value: Any) -> Any:
    return lambda config: config["config"]["layers"][1]["config"].update(activation=value)


TRUE = {"class_name": "__tensor__", "config": {"value": True, "dtype": "bool"}}
CACHE = named("keras.datasets.mnist", "load_data")
ZERO = {"name": "more"}
SWITCH = named("keras.config", "disable_interactive_logging")

#: From the path of a file that the payload would make, to what is edited; and what is said.
CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a lambda as an activation": (lambda mark: activation(function(mark)), "needs a Python lambda"),
    "a layer of code": (
        lambda mark: added("keras.layers", "Lambda", {"name": "more", "function": function(mark)}),
        "needs a `Lambda` layer",
    ),
    "a layer of code, as Keras 2 had it": (
        lambda mark: added(None, "Lambda", {"function": [function(mark)["config"]["code"], None, None]}),
        "needs a `Lambda` layer",
    ),
    "a pickle": (
        lambda mark: added(
            "keras.layers",
            "TorchModuleWrapper",
            {"name": "more", "module": base64.b64encode(pickle.dumps(Touch(mark))).decode()},
        ),
        "needs a `torch.nn.Module` object|which Keras does not have",
    ),
    "another model of TensorFlow": (
        lambda mark: added("keras.layers", "TFSMLayer", {"name": "more", "filepath": str(mark.parent)}),
        "needs a `TFSMLayer`|which Keras does not have",
    ),
    "a file that is read": (
        lambda mark: added("keras.layers", "StringLookup", {"name": "more", "vocabulary": "/etc/passwd"}),
        "needs a vocabulary file outside of the model archive",
    ),
    "a module that is imported": (lambda mark: added("this", "Layer", ZERO), '"Layer", which Keras does not have'),
    "a function of Python": (lambda mark: added("os", "system", ZERO), '"system", which Keras does not have'),
    "a download": (
        lambda mark: added("keras.src.ops.core", "Cond", ZERO, [TRUE, CACHE, CACHE]),
        'names "keras.datasets.mnist.load_data", of which no model is made',
    ),
    "a switch of Keras": (
        lambda mark: added("keras.src.ops.core", "Cond", ZERO, [TRUE, SWITCH, SWITCH]),
        'names "keras.config.disable_interactive_logging", of which no model is made',
    ),
    "the safe mode's own switch": (
        lambda mark: added("keras", "config.enable_unsafe_deserialization", ZERO),
        'names "keras.config.enable_unsafe_deserialization", of which no model is made',
    ),
    "a download as the model": (
        lambda mark: lambda config: {**CACHE, "class_name": "load_data", "config": {}},
        'names "keras.datasets.mnist.load_data", of which no model is made',
    ),
    "a layer as the model": (
        lambda mark: lambda config: {"module": "keras.layers", "class_name": "ReLU", "config": {}},
        "holds ReLU, which is no model|Keras cannot read it",
    ),
    "a layer larger than any": (
        lambda mark: lambda config: config["config"]["layers"][1]["config"].update(units=10**30),
        "Keras cannot read it: ",
    ),
}


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize("payload", CONFIGS)
def test_a_model_that_would_run_code_is_refused_and_nothing_runs(payload, name, tmp_path):
    build().save(tmp_path / name)
    mark = tmp_path / "mark"
    edit, message = CONFIGS[payload]
    reconfigured(tmp_path / name, edit(mark))
    with pytest.raises(ckptsurg.CheckpointError, match=message) as raised:
        ckptsurg.open_checkpoint(tmp_path / name)
    assert not mark.exists()
    assert "this" not in sys.modules
    assert keras.config.is_interactive_logging_enabled()
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 500
    assert keras.src.saving.serialization_lib.in_safe_mode() is None
    # The weights can be had all the same, since the configuration is not used.
    if payload != "a layer larger than any":
        with ckptsurg.open_checkpoint(tmp_path / name, model=build) as checkpoint:
            assert len(checkpoint.tensors) == 8


def linked(group: h5py.Group, name: str, other: Path) -> None:
    del group[name]
    group[name] = h5py.ExternalLink(str(other), "secret")


def softly_linked(group: h5py.Group, name: str, other: Path) -> None:
    del group[name]
    group[name] = h5py.SoftLink("/elsewhere")


def virtual(group: h5py.Group, name: str, other: Path) -> None:
    shape = group[name].shape
    del group[name]
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource(str(other), "secret", shape)
    group.create_virtual_dataset(name, layout)


def stored_outside(group: h5py.Group, name: str, other: Path) -> None:
    shape = group[name].shape
    del group[name]
    group.create_dataset(name, shape, "f4", external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def huge(group: h5py.Group, name: str, other: Path) -> None:
    del group[name]
    group.create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000), compression="gzip")


TRICKS = {
    linked: "is a link to elsewhere; Keras writes none",
    softly_linked: "is a link to elsewhere; Keras writes none",
    virtual: "has its values in other files; Keras writes no such",
    stored_outside: "has its values in other files; Keras writes no such",
    huge: "would take 4,000,000,000,172 bytes, and 172 are stored",
}


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("trick", TRICKS)
def test_a_file_that_would_read_others_or_unpack_without_end_is_refused(trick, name, tmp_path):
    with h5py.File(tmp_path / "other", "w") as other:
        other["secret"] = np.ones((4, 5), "f4")
    SAVERS[name](build(), tmp_path / name)

    def spoil(file: h5py.File) -> None:
        found: list[str] = []
        file.visititems(lambda path, one: found.append(path) if getattr(one, "shape", None) == (4, 5) else None)
        trick(file[found[0]].parent, found[0].rpartition("/")[2], tmp_path / "other")

    def spoil_member(members: dict[str, bytes]) -> None:
        inner = io.BytesIO(members["model.weights.h5"])
        with h5py.File(inner, "r+") as file:
            spoil(file)
        members["model.weights.h5"] = inner.getvalue()

    if name == "model.keras":
        repacked(tmp_path / name, spoil_member)
    else:
        with h5py.File(tmp_path / name, "r+") as file:
            spoil(file)
    with pytest.raises(ckptsurg.CheckpointError, match=TRICKS[trick]):
        opened(tmp_path / name)


def _free_list_in_a_circle(raw: bytearray) -> None:
    """The first free block of a group's names is followed by itself: HDF5 never comes to the end."""
    heap = raw.index(b"HEAP")
    first, start = (int.from_bytes(raw[heap + at : heap + at + 8], "little") for at in (16, 24))
    raw[start + first : start + first + 8] = first.to_bytes(8, "little")


def _text_of_no_kind(raw: bytearray) -> None:
    """The dtype of an attribute, of varying length, is neither text nor a sequence: reading it crashes."""
    raw[raw.index(b"\x19\x01\x01\x00\x10\x00\x00\x00") + 1] = 3


def _texts_without_end(raw: bytearray) -> None:
    """A collection of texts says that it is longer than it is: HDF5 looks for its end for ever."""
    collection = raw.index(b"GCOL") + 8
    length = int.from_bytes(raw[collection : collection + 8], "little")
    raw[collection : collection + 8] = (length + 256).to_bytes(8, "little")


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
@pytest.mark.parametrize("damage", [_free_list_in_a_circle, _text_of_no_kind, _texts_without_end])
def test_a_file_that_hdf5_does_not_come_back_from_is_refused(damage, name, tmp_path):
    SAVERS[name](build(), tmp_path / name)

    def damaged(raw: bytes) -> bytes:
        changed = bytearray(raw)
        damage(changed)
        return bytes(changed)

    if name == "model.keras":
        repacked(
            tmp_path / name, lambda members: members.update({"model.weights.h5": damaged(members["model.weights.h5"])})
        )
    else:
        (tmp_path / name).write_bytes(damaged((tmp_path / name).read_bytes()))
    with pytest.raises(ckptsurg.CheckpointError, match=r"is damaged: HDF5 (crashes on it|cannot read it)") as raised:
        opened(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path):
    build().save(tmp_path / "model.keras")
    repacked(tmp_path / "model.keras", lambda members: members.update({"assets/zeros": bytes(300_000_000)}))
    with pytest.raises(ckptsurg.CheckpointError, match=r"would take 300,0[0-9,]+ bytes, and [0-9,]+ are stored"):
        ckptsurg.open_checkpoint(tmp_path / "model.keras")


def test_an_archive_writes_nothing_outside_its_place(tmp_path):
    build().save(tmp_path / "model.keras")
    names = ["../escaped", str(tmp_path / "escaped"), "assets/../../escaped"]
    repacked(tmp_path / "model.keras", lambda members: members.update(dict.fromkeys(names, b"x")))
    before = sorted(tmp_path.parent.rglob("*"))
    with ckptsurg.open_checkpoint(tmp_path / "model.keras") as checkpoint:
        assert len(checkpoint.tensors) == 8
    assert sorted(tmp_path.parent.rglob("*")) == before


# --- Files that are broken, or of another model ---------------------------------------------------------


def raw(text: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text)


def cut(save: Callable[[keras.Model, Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save(build(), path)
        os.truncate(path, path.stat().st_size // 2)

    return write


def without(member: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        build().save(path)
        repacked(path, lambda members: members.pop(member))

    return write


def renamed(saved: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        SAVERS[saved](build(), path.parent / saved)
        (path.parent / saved).rename(path)

    return write


AGAIN = r"\(hint: fetch it or save it again\)"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.keras": (raw(b""), f"expected a file of Keras, found an empty file {AGAIN}"),
    "text.keras": (raw(b"hello " * 99), f"expected a file of Keras, found 0x68656c6c {AGAIN}"),
    "text.h5": (raw(b"hello " * 99), f"expected a file of Keras, found 0x68656c6c {AGAIN}"),
    "pointer.keras": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "is a Git LFS pointer, not"),
    "cut.keras": (cut(keras.Model.save), f"the archive is damaged or cut short {AGAIN}"),
    "cut.h5": (cut(keras.Model.save), f"is cut short: expected [0-9,]+ bytes, found [0-9,]+ {AGAIN}"),
    "cut.weights.h5": (cut(keras.Model.save_weights), f"is cut short: expected [0-9,]+ bytes, found [0-9,]+ {AGAIN}"),
    "configless.keras": (without("config.json"), "holds no config.json, and so is no model of Keras"),
    "weightless.keras": (without("model.weights.h5"), "holds no model.weights.h5, and so is no model of Keras"),
    "renamed.h5": (renamed("model.keras"), "is an archive of Keras, which Keras reads if the name ends in .keras"),
    "renamed.keras": (renamed("model.h5"), "is HDF5 in the older layout, which Keras reads if the name ends in .h5"),
    "weights.h5": (renamed("model.weights.h5"), "is weights alone, which Keras reads if the name ends in .weights.h5"),
    "old.weights.h5": (renamed("legacy.h5"), "is HDF5 in the older layout, .* ends in .h5 and not in .weights.h5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_message(name, tmp_path):
    write, message = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(ckptsurg.CheckpointError, match=message) as raised:
        ckptsurg.open_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in raised.value.message
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1, 2]", '"text"', '{"class_name": 1, "config": []}'])
def test_a_broken_configuration_is_one_message(text, tmp_path):
    build().save(tmp_path / "model.keras")
    repacked(tmp_path / "model.keras", lambda members: members.update({"config.json": text.encode()}))
    with pytest.raises(
        ckptsurg.CheckpointError, match=r"the model's configuration is no JSON|Keras cannot read it"
    ) as raised:
        ckptsurg.open_checkpoint(tmp_path / "model.keras")
    assert "\n" not in str(raised.value)


@keras.saving.register_keras_serializable("ckptsurg_tests")
class Scale(layers.Layer):
    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(), name="factor")

    def call(self, x: Any) -> Any:
        return x * self.factor


def scaled() -> keras.Model:
    given = keras.Input((4,))
    return keras.Model(given, Scale(name="scale")(given))


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_model_with_a_class_of_ones_own_is_built_by_ones_own_function(name, tmp_path, monkeypatch):
    scaled().save(tmp_path / name)
    for registry in (keras.saving.get_custom_objects(), keras.src.saving.object_registration.GLOBAL_CUSTOM_NAMES):
        for key in [key for key, value in registry.items() if value is Scale or key is Scale]:
            monkeypatch.delitem(registry, key)
    with pytest.raises(
        ckptsurg.CheckpointError, match=r'is a model with "(ckptsurg_tests>)?Scale", which Keras does not have'
    ) as raised:
        ckptsurg.open_checkpoint(tmp_path / name)
    assert "--model module:function" in raised.value.hint
    with ckptsurg.open_checkpoint(tmp_path / name, model=scaled) as checkpoint:
        assert list(checkpoint.tensors) == ["scale/factor"]


def raising(error: BaseException) -> Callable[[], Any]:
    def build_with_error() -> Any:
        raise error

    return build_with_error


MISTAKES = {
    "build": (None, "holds weights alone, which have their names from the model"),
    "none": (lambda: None, "returned NoneType; expected a model of Keras"),
    "layer": (lambda: layers.Dense(3), "returned Dense; expected a model of Keras"),
    "unbuilt": (
        lambda: keras.Sequential([layers.Dense(3)]),
        "the model .Sequential. is not built: it has no weights yet",
    ),
    "raising": (raising(ValueError("no\nsuch\npath")), "build_with_error raised ValueError: no such path$"),
    "exiting": (raising(SystemExit(3)), "build_with_error raised SystemExit: 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_function_that_makes_no_model_is_named(mistake, tmp_path):
    build().save_weights(tmp_path / "model.weights.h5")
    function, message = MISTAKES[mistake]
    with pytest.raises(ckptsurg.UsageError, match=message):
        ckptsurg.open_checkpoint(tmp_path / "model.weights.h5", model=function)
    with pytest.raises(KeyboardInterrupt):
        ckptsurg.open_checkpoint(tmp_path / "model.weights.h5", model=raising(KeyboardInterrupt()))


@pytest.mark.parametrize("name", SAVERS)
def test_weights_of_another_model_are_refused(name, tmp_path):
    SAVERS[name](build(), tmp_path / name)
    with pytest.raises(ckptsurg.CheckpointError, match="Keras cannot read it: ValueError: ") as raised:
        ckptsurg.open_checkpoint(tmp_path / name, model=stacked)
    assert "\n" not in str(raised.value)


class Hidden(layers.Layer):
    """Keras tracks layers in a set, and does not save them."""

    def build(self, shape: Any) -> None:
        self.found, self.lost = layers.Dense(3, name="found"), {layers.Dense(2, name="lost")}
        self.found.build((None, 4))
        next(iter(self.lost)).build((None, 3))

    def call(self, x: Any) -> Any:
        return next(iter(self.lost))(self.found(x))


def hidden() -> keras.Model:
    given = keras.Input((4,))
    return keras.Model(given, Hidden(name="hidden")(given))


def test_what_keras_would_leave_unloaded_is_named(tmp_path):
    hidden().save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(
        ckptsurg.CheckpointError, match="finds nothing in it for 2 tensors: hidden/lost/kernel, hidden/lost/bias"
    ):
        ckptsurg.open_checkpoint(tmp_path / "model.weights.h5", model=hidden)


def test_weights_that_the_older_layout_would_mix_up_are_refused(tmp_path):
    # Keras writes a nested model's trainable weights first, and all of them are as long as the norm is wide.
    def model(trainable: bool) -> keras.Model:
        inner = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.BatchNormalization()])
        inner.trainable = trainable
        return keras.Sequential([keras.Input((4,)), inner])

    save_legacy_weights(filled(model(trainable=False)), tmp_path / "legacy.h5")
    with pytest.raises(
        ckptsurg.CheckpointError, match="was saved with other weights trainable, and Keras would mix them up"
    ):
        ckptsurg.open_checkpoint(tmp_path / "legacy.h5", model=lambda: model(trainable=True))
    with ckptsurg.open_checkpoint(tmp_path / "legacy.h5", model=lambda: model(trainable=False)) as checkpoint:
        assert len(checkpoint.tensors) == 8


def test_what_was_global_in_keras_stays_as_it_was(tmp_path):
    filled(build()).save(tmp_path / "model.keras")
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        with ckptsurg.open_checkpoint(tmp_path / "model.keras") as checkpoint:
            assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}
        assert warnings.filters == filters
    assert keras.mixed_precision.global_policy().name == "mixed_bfloat16"


WITHOUT = """
import sys
sys.modules[{missing!r}] = None
import ckptsurg
try:
    ckptsurg.open_checkpoint("model.keras")
except ckptsurg.UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("h5py", "model.keras: is read by h5py, which is not installed (hint: pip install 'ckptsurg[keras]')"),
        ("keras", "model.keras: is read by Keras, which is not installed (hint: pip install 'ckptsurg[keras]')"),
        (
            keras.backend.backend(),
            f"the backend of Keras cannot be imported: {keras.backend.backend()} is not installed (hint: pip install "
            "tensorflow (or torch, or jax), or set KERAS_BACKEND to one that is installed)",
        ),
    ],
)
def test_what_is_not_installed_is_named(missing, message, tmp_path):
    build().save(tmp_path / "model.keras")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == (message, "")
