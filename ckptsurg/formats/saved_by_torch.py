"""What archives and distributed checkpoints of PyTorch have in common: the weights in what was saved, and clear words.

Nothing here imports torch before a file of its is opened.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..checkpoints import StoredFile
from ..errors import CheckpointError, CkptsurgError, SystemFailure
from ..tensors import Buffer, TensorSource
from ..wording import enumerate_names, shown

__all__ = ["AGAIN", "STATE_DICT_KEYS", "StateDict", "UnchangedFiles", "find_state_dict", "reading"]

#: The keys under which training code keeps a state dict beside what else it saves.
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
#: What to do about a damaged file.
AGAIN = "fetch it or save it again"
_LISTED = 8
_DEEPEST = 8

T = TypeVar("T")


# --- Where the weights are --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StateDict(Generic[T]):
    """A state dict, and what was saved beside it.

    Attributes:
        tensors: Its tensors by name.
        warnings: What was left out, in words.
    """

    tensors: Mapping[str, T]
    warnings: list[str]


def find_state_dict(saved: object, kind: type[T], label: str) -> StateDict[T]:
    """The state dict in what was saved: that itself, or what is under one of ``STATE_DICT_KEYS``.

    Where one other key alone holds tensors, or there is but one, as in ``{"app": {"model": ..., "optimizer": ...}}``,
    it is looked for in there.

    Args:
        saved: What was saved.
        kind: What a tensor is.
        label: How messages call it.

    Raises:
        CheckpointError: if it is no state dict and has none, or more than one.
    """
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"{label}: expected a state dict, a dictionary of tensors by name; found a {_kind(saved)}",
            hint="save the model's state_dict()",
        )
    left_out: list[str] = []
    place = ""
    level: Mapping[Any, Any] = saved
    for _ in range(_DEEPEST):
        found = [key for key in STATE_DICT_KEYS if _holds(level.get(key), kind)]
        if len(found) > 1:
            raise CheckpointError(
                f"{label}: holds several state dicts: {', '.join(place + key for key in found)}; which one is meant?",
                hint="save that one by itself",
            )
        if found:
            left_out += [f"{place}{shown(key, 60)} ({_kind(value)})" for key, value in level.items() if key != found[0]]
            level, place = level[found[0]], f"{place}{found[0]}."
            break
        if _holds(level, kind):
            break
        holding = [key for key, value in level.items() if _holds(value, kind)]
        only = holding if len(holding) == 1 else list(level) if len(level) == 1 else []
        inner = level[only[0]] if only else None
        if not isinstance(inner, Mapping):
            raise _nowhere(level, kind, label, place)
        left_out += [f"{place}{shown(key, 60)} ({_kind(value)})" for key, value in level.items() if key != only[0]]
        place = f"{place}{shown(only[0], 60)}."
        level = inner
    else:
        raise CheckpointError(f"{label}: holds dictionaries in dictionaries, {_DEEPEST} deep, and no tensor yet")
    left_out += [f"{shown(key, 60)} ({_kind(value)})" for key, value in level.items() if not isinstance(value, kind)]
    tensors = {key: value for key, value in level.items() if isinstance(value, kind)}
    for name in tensors:
        _refuse_name(name, label)
    where = f' of "{shown(place[:-1])}"' if place else ""
    rest = f"; left out: {enumerate_names(left_out, _LISTED)}" if left_out else ""
    is_usual = not place or place[:-1] in STATE_DICT_KEYS
    warnings = [] if is_usual and not left_out else [f"{label}: only the tensors{where} are read{rest}"]
    return StateDict(tensors, warnings)


def _holds(value: object, kind: type[Any]) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, kind) for inner in value.values())


def _nowhere(level: Mapping[Any, Any], kind: type[Any], label: str, place: str) -> CheckpointError:
    nested = [f"{place}{shown(key, 60)}" for key, value in level.items() if _holds(value, kind)]
    if nested:
        return CheckpointError(
            f"{label}: neither the top nor {', '.join(STATE_DICT_KEYS)} holds tensors; "
            f"found them under: {enumerate_names(nested)}",
            hint="save the state dict that is meant by itself",
        )
    entries = [f"{place}{shown(key, 60)} ({_kind(value)})" for key, value in level.items()]
    found = f"; found: {enumerate_names(entries)}" if entries else ""
    return CheckpointError(f"{label}: holds no tensor{found}", hint="save the model's state_dict()")


def _refuse_name(name: object, label: str) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"{label}: the name of a tensor must be text, found {_kind(name)} {shown(name, 60)}")
    if name == "__metadata__":
        raise CheckpointError(f'{label}: tensor "__metadata__": safetensors has no tensor of that name')
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f'{label}: tensor "{shown(name)}": the name has a lone surrogate') from None


def _kind(value: object) -> str:
    return type(value).__name__


# --- Reading ----------------------------------------------------------------------------------------


class UnchangedFiles:
    """A TensorSource over files that are read in place: a change to one is an error before more of it is read.

    A mapped file that is cut short would kill the process.

    Attributes:
        label: How messages call it.
        tensors: Dtype and shape by name.
        metadata: Of a file that they are written to.
    """

    def __init__(self, inside: TensorSource, files: Mapping[str, Iterable[StoredFile]]) -> None:
        self.label, self.tensors, self.metadata = inside.label, inside.tensors, inside.metadata
        self._inside, self._files = inside, files

    def read(self, name: str) -> Iterator[Buffer]:
        self._refuse_if_changed(name)
        with reading(f'{self.label}: tensor "{shown(name)}"'):
            for chunk in self._inside.read(name):
                self._refuse_if_changed(name)
                yield chunk

    def _refuse_if_changed(self, name: str) -> None:
        for file in self._files[name]:
            file.refuse_if_changed(self.label)


_APART = "of a whole model, save its state_dict() instead; else save the weights apart from it"
_GLOBAL = re.compile(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL) (\S+)")


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn what torch says of a file that it cannot read into one clear line.

    Args:
        label: Of the file.
    """
    try:
        yield
    except (CkptsurgError, MemoryError):
        raise
    except Exception as error:
        # A file that is no good makes torch, zipfile and pickle raise nearly anything.
        raise _in_words(error, label) from None


def _in_words(error: Exception, label: str) -> CkptsurgError:
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.EINVAL:
        return SystemFailure(f"{label}: {error.strerror}")
    if "DefaultCPUAllocator" in message or "Cannot allocate memory" in message:
        return SystemFailure(f"{label}: does not fit into memory")
    if "torch.distributed.tensor" in message or "DeviceMesh" in message:
        return CheckpointError(
            f"{label}: holds DTensors, of which each process has a piece",
            hint="save with torch.distributed.checkpoint, or gather: "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
        )
    if found := _GLOBAL.search(message):
        return CheckpointError(
            f"{label}: holds {shown(found[1])}, which could run code as it is loaded; "
            "only weights and plain data are read",
            hint=_APART,
        )
    if "Invalid magic number" in message or "Unsupported operand" in message:
        hint = "save the state_dict() with torch.save, and with no other pickle protocol than its own"
        return CheckpointError(f"{label}: is damaged, or no pickle of torch.save", hint=hint)
    if isinstance(error, EOFError):
        return CheckpointError(f"{label}: is cut short, or damaged", hint=AGAIN)
    reason = message.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return CheckpointError(f"{label}: is damaged: {shown(reason or type(error).__name__)}", hint=AGAIN)
