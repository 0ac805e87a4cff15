"""What others do, each a process of its own: the same surgery without ckptsurg, and BLAKE3 and nothing else.

python benchmarks/measuring/peers.py safetensors|transformers BASE_FOLDER OUT_FOLDER
python benchmarks/measuring/peers.py blake3 FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def safetensors(base: str, out: str) -> None:
    """Load, leave the last block out, save: what people write by hand."""
    from safetensors.torch import load_file, save_file

    last = json.loads(Path(base, "config.json").read_text())["num_hidden_layers"] - 1
    tensors = load_file(Path(base, "model.safetensors"))
    for name in [name for name in tensors if name.startswith(f"model.layers.{last}.")]:
        del tensors[name]
    Path(out).mkdir()
    save_file(tensors, Path(out, "model.safetensors"), metadata={"format": "pt"})


def transformers(base: str, out: str) -> None:
    """Build the model, take its last block away, save it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    del model.model.layers[-1]
    model.config.num_hidden_layers -= 1
    model.save_pretrained(out)


def blake3(file: str) -> None:
    from blake3 import blake3

    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(file)
    print(digest.hexdigest())


if __name__ == "__main__":
    {"safetensors": safetensors, "transformers": transformers, "blake3": blake3}[sys.argv[1]](*sys.argv[2:])
