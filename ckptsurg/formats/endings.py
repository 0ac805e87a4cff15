"""What the names of files with weights end in, or are."""

from __future__ import annotations

__all__ = [
    "DISTRIBUTED_METADATA",
    "INDEX_NAME",
    "KERAS",
    "OTHERS",
    "PART_OF_DISTRIBUTED",
    "SAFETENSORS",
    "SINGLE_NAME",
    "TORCH",
]

#: In a model folder in the layout of Hugging Face, the one file of weights, or the index of the shards.
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SAFETENSORS = (".safetensors",)
KERAS = (".keras", ".h5", ".hdf5")
TORCH = (".pt", ".pth", ".bin", ".ckpt")
#: Of ``torch.distributed.checkpoint``.
PART_OF_DISTRIBUTED = ".distcp"
#: In the folder of such a checkpoint, the file that says where each tensor is.
DISTRIBUTED_METADATA = ".metadata"
#: Of formats that are not read.
OTHERS = (".gguf", ".msgpack", ".onnx")
