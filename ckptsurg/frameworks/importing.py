"""Importing a framework to read a file of its: which may be absent, too old, or loud."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..wording import shown

__all__ = ["import_keras", "import_torch"]


def import_torch(label: str) -> Any:
    """Import torch.

    Args:
        label: Of what it is to read.

    Raises:
        UsageError: if it is not installed, or so old that a file can run code in spite of ``weights_only``.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise UsageError(
            f"{label}: is read by PyTorch, which is not installed", hint="pip install 'ckptsurg[torch]'"
        ) from None
    except ImportError as error:
        raise UsageError(f"{label}: is read by PyTorch, which cannot be imported: {shown(error)}") from None
    if torch.torch_version.TorchVersion(torch.__version__) < "2.6":
        raise UsageError(
            f"{label}: is not read with PyTorch {torch.__version__}, in which a file can run code although only "
            "weights are asked for (CVE-2025-32434)",
            hint="pip install 'torch>=2.6'",
        )
    return torch


def import_keras(label: str = "a file of Keras") -> None:
    """Import Keras, quietly, and with a backend that is there if none was chosen.

    Args:
        label: Of what it is to read.

    Raises:
        UsageError: if Keras, its backend or h5py is not installed.
    """
    if find_spec("h5py") is None:
        raise UsageError(f"{label}: is read by h5py, which is not installed", hint="pip install 'ckptsurg[keras]'")
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
            raise UsageError(
                f"{label}: is read by Keras, which is not installed", hint="pip install 'ckptsurg[keras]'"
            ) from None
        raise UsageError(
            f"the backend of Keras cannot be imported: {missing} is not installed",
            hint="pip install tensorflow (or torch, or jax), or set KERAS_BACKEND to one that is installed",
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
