"""A Llama-shaped checkpoint of a given size: bf16, of random bytes, which no file system can compress or leave out.

    python benchmarks/measuring/inputs.py FOLDER GB

writes FOLDER/model.safetensors and the config.json with which transformers loads it. A process of its own, for numpy.
"""

from __future__ import annotations

import json
import os
import sys
from math import prod
from pathlib import Path
from typing import Any

_PIECE = 1 << 26  # bytes drawn at a time
_USUAL_VOCABULARY = 32_000


def config(gigabytes: float) -> dict[str, Any]:
    """The config.json of a checkpoint of so many GB (10^9 bytes), to some kB: the vocabulary makes it exact."""
    hidden = 512 * max(1, round(2 * gigabytes**0.5))  # so that a block is some 2 % of any size
    layer = sum(map(prod, _layer(hidden).values()))
    elements = round(gigabytes * 1e9 / 2) - hidden
    layers = max(2, round((elements - 2 * _USUAL_VOCABULARY * hidden) / layer))
    vocabulary = (elements - layers * layer) // (2 * hidden)
    if vocabulary < 1:
        raise SystemExit(f"{gigabytes:g} GB is less than two layers")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 512,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """The tensors of such a model, in the order in which they stand in the file."""
    hidden, ends = config["hidden_size"], [config["vocab_size"], config["hidden_size"]]
    found = {"model.embed_tokens.weight": ends}
    for number in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}": shape for name, shape in _layer(hidden).items()}
    return found | {"model.norm.weight": [hidden], "lm_head.weight": ends}


def _layer(hidden: int) -> dict[str, list[int]]:
    inner, keys = hidden * 11 // 4, hidden // 8
    return {
        "input_layernorm.weight": [hidden],
        "mlp.down_proj.weight": [hidden, inner],
        "mlp.gate_proj.weight": [inner, hidden],
        "mlp.up_proj.weight": [inner, hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.o_proj.weight": [hidden, hidden],
        "self_attn.q_proj.weight": [hidden, hidden],
        "self_attn.v_proj.weight": [keys, hidden],
    }


def make(folder: Path, gigabytes: float) -> None:
    """Write it, the same for the same size, down to the disk."""
    import numpy as np

    described = config(gigabytes)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes(described).items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for begin in range(0, end, _PIECE):
            file.write(random.bytes(min(_PIECE, end - begin)))
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    make(Path(sys.argv[1]), float(sys.argv[2]))
