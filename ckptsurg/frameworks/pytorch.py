"""Tensors of torch as a TensorSource: the bytes of a live model, a state dict or an archive."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import FreezeError
from ..tensors import CHUNK_BYTES, TensorInfo
from ..wording import shown
from .dtypes import DTYPES

__all__ = [
    "METADATA",
    "TorchTensors",
    "as_dtensor",
    "bytes_of",
    "dtype_of",
    "info_of",
    "live_tensors",
    "local_of",
    "unreadable",
    "whole_of",
    "without_memory",
]

_DTYPES = {getattr(torch, name): dtype for name, dtype in DTYPES.items() if hasattr(torch, name)}
_BY_NAME: Mapping[str, torch.dtype] = {name: dtype for dtype, name in _DTYPES.items()}


#: What libraries that read safetensors for torch expect to find in a file.
METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


class TorchTensors:
    """A TensorSource over tensors of torch.

    Attributes:
        label: How messages call it.
        tensors: Dtype and shape by name; a dtype that safetensors lacks has torch's own name.
        metadata: Of a file that they are written to.
    """

    def __init__(self, given: Mapping[str, torch.Tensor], label: str) -> None:
        self._given = dict(given)
        self.label, self.metadata = label, METADATA

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: info_of(tensor) for name, tensor in self._given.items()}

    def read(self, name: str) -> Iterator[memoryview]:
        tensor = self._given[name]
        if reason := unreadable(tensor):
            raise FreezeError(f'{self.label}: "{shown(name)}" {reason}')
        return bytes_of(tensor)


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """Dtype and shape; of a sharded tensor, those of the whole."""
    if is_lazy(tensor):
        return TensorInfo("lazy", ())
    if tensor.is_nested:
        return TensorInfo("nested", ())
    return TensorInfo(_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def dtype_of(info: TensorInfo) -> torch.dtype:
    """The dtype of torch, of one that it has."""
    return _BY_NAME[info.dtype]


def bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The little-endian bytes of a tensor, in chunks of ``CHUNK_BYTES``.

    A sharded one is gathered: every process of its mesh has to ask for it.
    """
    if not tensor.numel():
        return
    plain = whole_of(tensor).resolve_conj().resolve_neg()
    flat = plain.cpu().contiguous().reshape(-1)
    if len(flat) == 1:  # contiguous by torch's word, whatever its stride, but then not to be seen as bytes
        flat = flat.as_strided((1,), (1,))
    raw = flat.view(torch.uint8)
    view = np.from_dlpack(raw).data  # numpy() would forbid FullyShardedDataParallel to free the storage
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, outside the graph; a sharded one is gathered by all processes of its mesh."""
    sharded = as_dtensor(tensor)
    whole: torch.Tensor = (tensor if sharded is None else sharded.full_tensor()).detach()
    return whole


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of a sharded one, what this process has of it, outside the graph."""
    sharded = as_dtensor(tensor)
    local: torch.Tensor = tensor if sharded is None else sharded.detach().to_local()
    return local


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same dtype and shape that has no values."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def as_dtensor(tensor: torch.Tensor) -> Any:
    """The tensor, if it is one shard of a ``torch.distributed.tensor.DTensor``; None for any other."""
    distributed = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return tensor if distributed is not None and isinstance(tensor, distributed.DTensor) else None


def unreadable(tensor: torch.Tensor) -> str | None:
    """Why a tensor has no bytes to compare; None if it has."""
    if is_lazy(tensor):
        return "is lazy: it has no shape yet; run a forward pass first"
    if tensor.is_nested:
        return "is a nested tensor; only dense tensors are compared"
    if tensor.is_meta:
        return "is on the meta device: it has no values yet; load the weights first"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}); its bytes are not the checkpoint's"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}; only dense tensors are compared"
    if is_traceable_wrapper_subclass(tensor) and as_dtensor(tensor) is None:
        return f"is a {type(tensor).__name__}, which keeps its values in other tensors"
    if tensor.dtype not in _DTYPES:
        return f"is {tensor.dtype}, which safetensors does not have"
    return None


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by qualified name, once for each name that a shared one has."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[prefix + name] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[prefix + name] = buffer
    return found
