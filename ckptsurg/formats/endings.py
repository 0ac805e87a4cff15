"""What the names of files with weights end in."""

from __future__ import annotations

__all__ = ["KERAS", "OTHERS", "PART_OF_DISTRIBUTED", "SAFETENSORS", "TORCH"]

SAFETENSORS = (".safetensors",)
KERAS = (".keras", ".h5", ".hdf5")
TORCH = (".pt", ".pth", ".bin", ".ckpt")
#: Of ``torch.distributed.checkpoint``.
PART_OF_DISTRIBUTED = ".distcp"
#: Of formats that are not read.
OTHERS = (".gguf", ".msgpack", ".onnx")
