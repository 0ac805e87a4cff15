"""An adapter that PEFT saved by itself: its folder holds what was trained, and says what base it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..checkpoints import Checkpoint, read_small
from ..errors import CheckpointError, UsageError
from ..parsing import parse_json
from ..renaming import unwrapped
from ..tensors import Buffer, TensorInfo
from ..wording import shown

__all__ = ["AdapterOverBase", "adapter_in", "base_of_adapter"]

_SAFETENSORS_NAME, _ARCHIVE_NAME = "adapter_model.safetensors", "adapter_model.bin"
CONFIG_NAME = "adapter_config.json"
#: Of a configuration that is read, in bytes; PEFT writes a few thousand.
MAX_CONFIG_BYTES = 10_000_000


def adapter_in(folder: Path) -> Path:
    """The file of the adapter's own tensors: safetensors, or the archive that PEFT wrote before."""
    archive = folder / _ARCHIVE_NAME
    return archive if archive.is_file() and not (folder / _SAFETENSORS_NAME).exists() else folder / _SAFETENSORS_NAME


def base_of_adapter(folder: Path) -> Path | None:
    """Where the base of an adapter is; None if the folder holds no adapter.

    Raises:
        CheckpointError: if the adapter's configuration is malformed.
        UsageError: if the base is not on this machine.
    """
    config = folder / CONFIG_NAME
    if not (config.is_file() and adapter_in(folder).is_file()):
        return None
    try:
        document: Any = parse_json(read_small(config, MAX_CONFIG_BYTES).decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{shown(config)}: not JSON: {error}") from None
    name = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    if isinstance(name, str) and name:
        for candidate in (Path(name), folder / name):
            with suppress(OSError):  # a name may be no path at all
                if candidate.exists():
                    return candidate
    said = f'"{shown(name)}" is not on this machine' if isinstance(name, str) and name else "it does not say which"
    raise UsageError(
        f"{shown(folder)}: an adapter alone: what is frozen is in its base, and {said}",
        hint="bring the base here, or verify the base by itself where it is",
    )


class AdapterOverBase:
    """A TensorSource: what is trained from the adapter, all else from its base.

    Attributes:
        label: How messages call it.
        tensors: Dtype and shape by name, of the base and of the adapter.
        metadata: Of the base.
        files: Of both.
        note: What a report says of it.

    Raises:
        CheckpointError: if two tensors of the adapter stand for one name.
    """

    def __init__(self, folder: Path, adapter: Checkpoint, base: Checkpoint) -> None:
        self._adapter, self._base = adapter, base
        # Whole modules that were trained (modules_to_save) stand under the base's own names.
        self._own: Mapping[str, str] = {unwrapped(name): name for name in adapter.tensors}
        self.label = shown(folder)
        if len(self._own) < len(adapter.tensors):
            twice = next(name for name in adapter.tensors if self._own[unwrapped(name)] != name)
            raise CheckpointError(f'{self.label}: two tensors of the adapter stand for "{shown(unwrapped(twice))}"')
        self.tensors: Mapping[str, TensorInfo] = {
            **base.tensors,
            **{new: adapter.tensors[name] for new, name in self._own.items()},
        }
        self.metadata, self.files = base.metadata, (*adapter.files, *base.files)
        self.note = f"{self.label} is an adapter alone: what it lacks was proven in its base, {base.label}"

    def read(self, name: str) -> Iterator[Buffer]:
        if name in self._own:
            return self._adapter.read(self._own[name])
        return self._base.read(name)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._stack.enter_context(self._adapter)
        self._stack.enter_context(self._base)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
