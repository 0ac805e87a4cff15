"""What the names of files with weights end in, or are."""

from __future__ import annotations

__all__ = ["DISTRIBUTED_METADATA", "KERAS", "OTHERS", "PART_OF_DISTRIBUTED", "SAFETENSORS", "TORCH"]

SAFETENSORS = (".safetensors",)
KERAS = (".keras", ".h5", ".hdf5")
TORCH = (".pt", ".pth", ".bin", ".ckpt")
#: Of ``torch.distributed.checkpoint``.
PART_OF_DISTRIBUTED = ".distcp"
#: In the folder of such a checkpoint, the file that says where each tensor is.
DISTRIBUTED_METADATA = ".metadata"
#: Of formats that are not read.
OTHERS = (".gguf", ".msgpack", ".onnx")
