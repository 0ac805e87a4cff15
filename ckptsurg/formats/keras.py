"""Files of Keras: ``.keras``, ``.weights.h5``, and the older ``.h5``.

Keras itself reads them, into a model, and the model's variables are the tensors. What a stranger's file could make
Keras do is refused before: read other files, call any of its functions, unpack what is far larger than the file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..checkpoints import Checkpoint, open_regular, open_stored
from ..errors import CheckpointError, CkptsurgError, UsageError
from ..tensors import Buffer, TensorInfo, digest_of
from ..wording import counted, enumerate_names, shown

if TYPE_CHECKING:
    import h5py
    import keras

    from ..frameworks.keras import KerasVariables

__all__ = ["import_keras", "open_keras"]

_CONFIG_NAME, _WEIGHTS_NAME = "config.json", "model.weights.h5"
#: Of a model's configuration, in bytes; that of the largest models has some millions.
MAX_CONFIG_BYTES = 100_000_000
#: From so many bytes on, a part of a file may not be ``MAX_EXPANSION`` times as large as what is stored of it. Keras
#: compresses nothing; its own limit begins at 4 GiB.
EXPANSION_FLOOR = 1 << 26
MAX_EXPANSION = 1000
#: Where Keras has what models are made of. A configuration can name any function of Keras, and Keras calls it while it
#: builds the model: those of ``keras.datasets`` and ``keras.applications`` fetch files, ``keras.config`` is global.
_MODELLING = frozenset({
    "activations", "constraints", "distillation", "dtype_policies", "initializers", "layers", "losses", "metrics",
    "models", "ops", "optimizers", "quantizers", "random", "regularizers", "src",
})  # fmt: skip
_BUILDER_HINT = "give the function that builds the model: --model module:function (in Python model=function)"


def open_keras(path: Path, model: Callable[[], Any] | None) -> Checkpoint:
    """Open a file of Keras.

    Args:
        path: The file. Keras goes by the ending of its name: ``.keras``, ``.weights.h5``, ``.h5`` or ``.hdf5``.
        model: Makes the model. A file that holds weights alone needs it, and so does one with classes of the user's own
            that are not registered.

    Raises:
        UsageError: if Keras is not installed, a model is needed, or ``model`` makes none.
        CheckpointError: if the file is malformed, unsafe, or does not fit the model.
        SystemFailure: if it cannot be opened.
    """
    label = shown(path)
    descriptor, before = open_regular(path)  # a pipe would keep Keras waiting
    os.close(descriptor)
    import_keras()
    layout = _examined(path, label, built=model is not None)
    if model is None and layout != "model":
        raise UsageError(f"{label}: holds weights alone, which have their names from the model", hint=_BUILDER_HINT)
    loaded = _loaded(path, label) if model is None else _built(model)
    variables = _variables(loaded, label, by_user=model is not None)
    if model is not None:
        _load_weights(loaded, path, label)
    _refuse_unloaded(loaded, variables, path, label)
    file = open_stored(path, path.name, variables.tensors)
    checkpoint = Checkpoint(path, [file], variables.tensors, {}, source=variables)
    if (file.size, file.status.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        checkpoint.close()
        raise CheckpointError(f"{label}: was changed while it was read")
    return checkpoint


# --- Keras ------------------------------------------------------------------------------------------


def import_keras() -> None:
    """Import Keras, quietly, and with a backend that is there if none was chosen.

    Raises:
        UsageError: if Keras or its backend is not installed.
    """
    if sys.modules.get("keras") is not None:
        return
    home = Path(os.environ.get("KERAS_HOME") or Path("~/.keras").expanduser())
    chosen = "KERAS_BACKEND" in os.environ or (home / "keras.json").exists()
    if not chosen and find_spec("tensorflow") is None and find_spec("torch") is not None:
        os.environ["KERAS_BACKEND"] = "torch"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with _without_announcements():
            import keras  # noqa: F401
    except ImportError as error:
        missing = shown(error.name.partition(".")[0] if error.name else error)
        if missing == "keras":
            raise UsageError("Keras is not installed", hint="pip install 'ckptsurg[keras]'") from None
        raise UsageError(
            f"the backend of Keras cannot be imported: {missing} is not installed",
            hint="pip install 'ckptsurg[keras]', or set KERAS_BACKEND to one that is: tensorflow, torch or jax",
        ) from None


#: What TensorFlow writes as it is imported, before its log levels count.
_ANNOUNCEMENT = re.compile(rb"WARNING: All log messages before absl::InitializeLog|I0000 .*oneDNN custom operations")


@contextmanager
def _without_announcements() -> Iterator[None]:
    """What is written to standard error meanwhile comes at the end, without TensorFlow's announcements."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not _ANNOUNCEMENT.match(line):
                    os.write(2, line)


def _built(function: Callable[[], Any]) -> keras.Model:
    import keras

    name = shown(getattr(function, "__qualname__", function))
    try:
        made = function()
    except (Exception, SystemExit) as error:
        raise UsageError(f"the model was not built: {name} raised {_said(error)}") from error
    if not isinstance(made, keras.Model):
        raise UsageError(f"{name} returned {shown(type(made).__name__)}; expected a model of Keras")
    return made


def _loaded(path: Path, label: str) -> keras.Model:
    import keras

    with _malformed(label):
        loaded = keras.saving.load_model(path, compile=False, safe_mode=True)
    if not isinstance(loaded, keras.Model):
        raise CheckpointError(f"{label}: holds {shown(type(loaded).__name__)}, which is no model")
    return loaded


def _load_weights(model: keras.Model, path: Path, label: str) -> None:
    with _malformed(label):
        _refuse_reordered(model, path, label)
        model.load_weights(path)


def _variables(model: keras.Model, label: str, *, by_user: bool) -> KerasVariables:
    from ..frameworks.keras import KerasVariables

    try:
        return KerasVariables(model)
    except CkptsurgError as error:
        kind = UsageError if by_user else CheckpointError
        raise kind(f"{label}: {error.message}", hint=error.hint if by_user else None) from None


def _refuse_unloaded(model: keras.Model, variables: KerasVariables, path: Path, label: str) -> None:
    """Keras leaves a variable as it was built, and says nothing, where it finds no way to it.

    So what was loaded is turned into its complement, and loaded again: what does not come back was never in the file.
    """
    from ..frameworks.keras import assign_bytes

    loaded = {name: digest_of(variables.read(name)) for name in variables.tensors}
    for name, info in variables.tensors.items():
        assign_bytes(variables.variables[name], info, [_complement(chunk, info) for chunk in variables.read(name)])
    _load_weights(model, path, label)
    if left := [name for name, digest in loaded.items() if digest_of(variables.read(name)) != digest]:
        raise CheckpointError(f"{label}: Keras finds nothing in it for {counted(len(left))}: {enumerate_names(left)}")


def _complement(chunk: Buffer, info: TensorInfo) -> Buffer:
    """Other bits in every element, that its dtype can have."""
    return (np.frombuffer(chunk, np.uint8) ^ (1 if info.dtype == "BOOL" else 0xFF)).tobytes()


# --- What Keras says --------------------------------------------------------------------------------


@contextmanager
def _malformed(label: str) -> Iterator[None]:
    """Turn what Keras, h5py and backends raise into one line. Their warnings are not for who reads a checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CkptsurgError:
        raise
    except Exception as error:
        _refuse(label, error)


_UNKNOWN = re.compile(r"(?:Could not (?:locate|deserialize) (?:class|function)|Unknown [a-z ]+:) '([^']*)'")
_UNSAFE = re.compile(r"Requested the (?:deserialization|loading) of an? (.+?)(?: via | whose |, which|\. )")


def _refuse(label: str, error: Exception) -> NoReturn:
    text = str(error)
    if found := _UNKNOWN.search(text):
        unknown = f'{label}: is a model with "{shown(found[1])}", which Keras does not have'
        raise CheckpointError(unknown, hint=_BUILDER_HINT) from None
    if found := _UNSAFE.search(text):
        unsafe = f"{label}: needs a {shown(found[1])}, and that is not loaded: it may run code or read other files"
        raise CheckpointError(unsafe, hint=_BUILDER_HINT) from None
    raise CheckpointError(f"{label}: Keras cannot read it: {_said(error)}") from None


def _said(error: BaseException) -> str:
    """What an error says, in a line: of one inside another the inner, and of many the first."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    for introduction in ("Exception encountered: ", "Example error message for object ", "Exception encountered when "):
        text = text.rpartition(introduction)[2]
    text = " ".join(text.partition("List of objects that could not be loaded")[0].split())
    return f"{type(error).__name__}: {shown(text)}" if text else type(error).__name__


# --- What Keras is not given ------------------------------------------------------------------------


def _examined(path: Path, label: str, *, built: bool) -> str:
    """Refuse what is unsafe in a file, or under a name by which Keras takes it for something else.

    Args:
        path: The file.
        label: How messages call it.
        built: Whether the model comes from elsewhere, so that the file's own is not built.

    Returns:
        ``model``, ``weights`` or, in the older layout, ``legacy weights``.
    """
    import h5py

    with _malformed(label):
        if zipfile.is_zipfile(path):
            _refuse_name(path, label, "an archive of Keras", ".keras")
            with zipfile.ZipFile(path) as archive:
                _examine_archive(archive, label, built=built)
            return "model"
        with h5py.File(path) as file:
            _examine_hdf5(file, label)
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


def _examine_archive(archive: zipfile.ZipFile, label: str, *, built: bool) -> None:
    import h5py

    for member in archive.infolist():
        _refuse_expanding(label, member.filename, member.file_size, member.compress_size)
    names = archive.namelist()
    for name in (_CONFIG_NAME, _WEIGHTS_NAME):
        if name not in names:
            raise CheckpointError(f"{label}: holds no {name}, and so is no model of Keras")
    with archive.open(_WEIGHTS_NAME) as opened, h5py.File(opened, "r") as weights:
        _examine_hdf5(weights, label)
    if not built:
        with archive.open(_CONFIG_NAME) as opened:
            _examine_config(opened.read(MAX_CONFIG_BYTES + 1), label)


def _examine_hdf5(file: h5py.File, label: str) -> None:
    """Refuse what would have HDF5 read another file, or give out far more than there is."""
    import h5py

    links: list[tuple[str, object]] = []
    file.visititems_links(lambda name, link: links.append((name, link)))
    for name, link in links:
        if not isinstance(link, h5py.HardLink):
            raise CheckpointError(f'{label}: "{shown(name)}" is a link to elsewhere; Keras writes none')
        one = file[name]
        if not isinstance(one, h5py.Dataset):
            continue
        if one.external or one.is_virtual:
            raise CheckpointError(f'{label}: "{shown(name)}" has its values in other files; Keras writes no such')
        _refuse_expanding(label, name, one.nbytes, one.id.get_storage_size())


def _refuse_expanding(label: str, name: str, declared: int, stored: int) -> None:
    if declared > max(EXPANSION_FLOOR, MAX_EXPANSION * stored):
        raise CheckpointError(
            f'{label}: "{shown(name)}" would take {declared:,} bytes, and {stored:,} are stored; it is no model\'s'
        )


def _examine_config(config: str | bytes, label: str) -> None:
    """Refuse a configuration that has Keras call functions of which no model is made."""
    if len(config) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{label}: the model's configuration is larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        left = [json.loads(config)]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: the model's configuration is no JSON: {_said(error)}") from None
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


def _refuse_reordered(model: keras.Model, path: Path, label: str) -> None:
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
