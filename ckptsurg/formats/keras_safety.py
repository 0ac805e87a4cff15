"""What a stranger's file could make Keras do, refused before; and what Keras says of a file, in one line."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import CheckpointError, CkptsurgError
from ..wording import shown
from .expanding import refuse_expanding
from .hdf5_safety import examine_hdf5, refuse_cut_archive, try_out

if TYPE_CHECKING:
    import keras

__all__ = ["BUILDER_HINT", "examined", "malformed", "refuse_reordered", "said"]

_CONFIG_NAME, _WEIGHTS_NAME = "config.json", "model.weights.h5"
#: Of a model's configuration, in bytes; that of the largest models has some millions.
MAX_CONFIG_BYTES = 100_000_000
#: Where Keras has what models are made of. A configuration can name any function of Keras, and Keras calls it while it
#: builds the model: those of ``keras.datasets`` and ``keras.applications`` fetch files, ``keras.config`` is global.
_MODELLING = frozenset({
    "activations", "constraints", "distillation", "dtype_policies", "initializers", "layers", "losses", "metrics",
    "models", "ops", "optimizers", "quantizers", "random", "regularizers", "src",
})  # fmt: skip
BUILDER_HINT = "give the function that builds the model: --model module:function (in Python model=function)"


def examined(path: Path, label: str, *, built: bool) -> str:
    """Refuse what is unsafe in a file, or under a name by which Keras takes it for something else.

    Args:
        path: The file.
        label: How messages call it.
        built: Whether the model comes from elsewhere, so that the file's own is not built.

    Returns:
        ``model``, ``weights`` or, in the older layout, ``legacy weights``.
    """
    import h5py

    with malformed(label):
        refuse_cut_archive(path, label)
        if zipfile.is_zipfile(path):
            _refuse_name(path, label, "an archive of Keras", ".keras")
            with zipfile.ZipFile(path) as archive:
                _examine_archive(archive, path, label, built=built)
            return "model"
        try_out(path, "", label)
        with h5py.File(path) as file:
            examine_hdf5(file, label)
            config = file.attrs.get("model_config")
            is_legacy = config is not None or "layer_names" in file.attrs or "model_weights" in file
            if not is_legacy:
                _refuse_name(path, label, "weights alone", ".weights.h5")
                return "weights"
            if path.name.endswith(".weights.h5") and (built or config is None):
                _refuse_name(path, label, "HDF5 in the older layout", ".h5", but=".weights.h5")
            _refuse_name(path, label, "HDF5 in the older layout", ".h5", ".hdf5")
            if config is None:
                return "legacy weights"
            if not built:
                _examine_config(config, label)
            return "model"


def _refuse_name(path: Path, label: str, what: str, *endings: str, but: str | None = None) -> None:
    if not path.name.endswith(endings) or (but is not None and path.name.endswith(but)):
        unless = f" and not in {but}" if but else ""
        raise CheckpointError(
            f"{label}: is {what}, which Keras reads if the name ends in {endings[0]}{unless}",
            hint="rename it, or make a link to it",
        )


def _examine_archive(archive: zipfile.ZipFile, path: Path, label: str, *, built: bool) -> None:
    import h5py

    members = archive.infolist()
    refuse_expanding(label, sum(one.file_size for one in members), sum(one.compress_size for one in members))
    names = archive.namelist()
    for name in (_CONFIG_NAME, _WEIGHTS_NAME):
        if name not in names:
            raise CheckpointError(f"{label}: holds no {name}, and so is no model of Keras")
    try_out(path, _WEIGHTS_NAME, label)
    with archive.open(_WEIGHTS_NAME) as opened, h5py.File(opened, "r") as weights:
        examine_hdf5(weights, label)
    if not built:
        with archive.open(_CONFIG_NAME) as opened:
            _examine_config(opened.read(MAX_CONFIG_BYTES + 1), label)


def _examine_config(config: str | bytes, label: str) -> None:
    """Refuse a configuration that has Keras call functions of which no model is made."""
    if len(config) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{label}: the model's configuration is larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        left = [json.loads(config)]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: the model's configuration is no JSON: {said(error)}") from None
    while left:
        one = left.pop()
        if isinstance(one, list):
            left.extend(one)
        elif isinstance(one, Mapping):
            left.extend(one.values())
            _refuse_calls(one, label)


def _refuse_calls(one: Mapping[str, Any], label: str) -> None:
    if not isinstance(module := one.get("module"), str):
        return
    name = one.get("config") if one.get("class_name") == "function" else one.get("class_name")
    parts = [part for part in f"{module}.{name}".split(".") if part != "_legacy"]
    if parts[0] == "keras" and len(parts) > 2 and parts[1] not in _MODELLING:
        raise CheckpointError(f'{label}: the model names "{shown(".".join(parts))}", of which no model is made')


def refuse_reordered(model: keras.Model, path: Path, label: str) -> None:
    """Refuse the older layout where its weights would go to others.

    It has a layer's trainable weights before the rest, and Keras goes by their numbers: of a model that was frozen when
    it was saved, statistics would become scales.
    """
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import load_attributes_from_hdf5_group as names_in

    if path.name.endswith((".keras", ".weights.h5")):
        return
    with h5py.File(path) as file:
        group = file["model_weights"] if "layer_names" not in file.attrs and "model_weights" in file else file
        saved = {
            layer: [_last(name) for name in names_in(group[layer], "weight_names")]
            for layer in names_in(group, "layer_names")
        }
    layers = [layer for layer in model.layers if layer.weights]
    for layer, (name, stored) in zip(layers, [item for item in saved.items() if item[1]], strict=False):
        own = [_last(variable.path) for variable in (*layer.trainable_weights, *layer.non_trainable_weights)]
        if own != stored and sorted(own) == sorted(stored):
            raise CheckpointError(
                f'{label}: "{shown(name)}" was saved with other weights trainable, and Keras would mix them up',
                hint="let the function that builds the model set `trainable` as it was then",
            )


def _last(path: str) -> str:
    """The variable's own name in a path, without the number of its output that TensorFlow adds."""
    return path.rpartition("/")[2].partition(":")[0]


# --- What Keras says --------------------------------------------------------------------------------


@contextmanager
def malformed(label: str, hint: str | None = None) -> Iterator[None]:
    """Turn what Keras, h5py and backends raise into one line. Their warnings are not for who reads a checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CkptsurgError:
        raise
    except Exception as error:
        _refuse(label, error, hint)


_UNKNOWN = re.compile(r"(?:Could not (?:locate|deserialize) (?:class|function)|Unknown [a-z ]+:) '([^']*)'")
_UNSAFE = re.compile(r"Requested the (?:deserialization|loading) of an? (.+?)(?: via | whose |, which|\. )")


def _refuse(label: str, error: Exception, hint: str | None) -> NoReturn:
    text = str(error)
    if found := _UNKNOWN.search(text):
        unknown = f'{label}: is a model with "{shown(found[1])}", which Keras does not have'
        raise CheckpointError(unknown, hint=BUILDER_HINT) from None
    if found := _UNSAFE.search(text):
        unsafe = f"{label}: needs a {shown(found[1])}, and that is not loaded: it may run code or read other files"
        raise CheckpointError(unsafe, hint=BUILDER_HINT) from None
    raise CheckpointError(f"{label}: Keras cannot read it: {said(error)}", hint=hint) from None


def said(error: BaseException) -> str:
    """What an error says, in a line: of one inside another the inner, and of many the first."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    for introduction in ("Exception encountered: ", "Example error message for object ", "Exception encountered when "):
        text = text.rpartition(introduction)[2]
    text = " ".join(text.partition("List of objects that could not be loaded")[0].split())
    return f"{type(error).__name__}: {shown(text)}" if text else type(error).__name__
