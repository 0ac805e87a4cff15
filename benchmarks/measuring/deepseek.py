"""A checkpoint of DeepSeek-V3's shape: true headers, and no weights, which take no place on the disk.

    python benchmarks/measuring/deepseek.py FOLDER [TIMES]

Names, dtypes, shapes and the number of shards are those of deepseek-ai/DeepSeek-V3: 61 layers and the one that predicts
a further token, FP8 weights with a scale for each block of 128 x 128. With TIMES it has so many times the layers that
hold experts, and as many times the shards. The order in a file is that of the safetensors library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

#: Dtype and shape by name.
Tensors: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]

_SHARDS = 163
_BLOCK = 128  # rows and columns that share a scale
_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def config(times: int = 1) -> dict[str, Any]:
    """The config.json."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 3 + 59 * times - 1,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [_BLOCK, _BLOCK],
        },
        "rms_norm_eps": 1e-06,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }


def tensors(config: dict[str, Any]) -> Tensors:
    """Every tensor, in the order of the layers."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    vocabulary = ("BF16", (config["vocab_size"], hidden))
    found: Tensors = {"model.embed_tokens.weight": vocabulary}
    for number in range(layers):
        layer = _layer(config, is_dense=number < config["first_k_dense_replace"])
        found |= {f"model.layers.{number}.{name}": one for name, one in layer.items()}
    found |= {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": vocabulary}
    for number in range(layers, layers + config["num_nextn_predict_layers"]):
        layer = {
            "embed_tokens.weight": vocabulary,
            "enorm.weight": ("BF16", (hidden,)),
            "hnorm.weight": ("BF16", (hidden,)),
            "eh_proj.weight": ("BF16", (hidden, 2 * hidden)),
            **_layer(config, is_dense=False),
            "shared_head.norm.weight": ("BF16", (hidden,)),
            "shared_head.head.weight": vocabulary,
        }
        found |= {f"model.layers.{number}.{name}": one for name, one in layer.items()}
    return found


def _layer(config: dict[str, Any], *, is_dense: bool) -> Tensors:
    hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    queries, keys = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, values = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    found: Tensors = {
        "input_layernorm.weight": ("BF16", (hidden,)),
        **_quantised("self_attn.q_a_proj", queries, hidden),
        "self_attn.q_a_layernorm.weight": ("BF16", (queries,)),
        **_quantised("self_attn.q_b_proj", heads * (nope + rope), queries),
        **_quantised("self_attn.kv_a_proj_with_mqa", keys + rope, hidden),
        "self_attn.kv_a_layernorm.weight": ("BF16", (keys,)),
        **_quantised("self_attn.kv_b_proj", heads * (nope + values), keys),
        **_quantised("self_attn.o_proj", hidden, heads * values),
        "post_attention_layernorm.weight": ("BF16", (hidden,)),
    }
    if is_dense:
        return found | _feed_forward("mlp", hidden, config["intermediate_size"])
    found |= {
        "mlp.gate.weight": ("BF16", (experts, hidden)),
        "mlp.gate.e_score_correction_bias": ("F32", (experts,)),
    }
    inner = config["moe_intermediate_size"]
    for number in range(experts):
        found |= _feed_forward(f"mlp.experts.{number}", hidden, inner)
    return found | _feed_forward("mlp.shared_experts", hidden, inner * config["n_shared_experts"])


def _feed_forward(module: str, hidden: int, inner: int) -> Tensors:
    return {
        **_quantised(f"{module}.gate_proj", inner, hidden),
        **_quantised(f"{module}.up_proj", inner, hidden),
        **_quantised(f"{module}.down_proj", hidden, inner),
    }


def _quantised(module: str, rows: int, columns: int) -> Tensors:
    blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
    return {f"{module}.weight": ("F8_E4M3", (rows, columns)), f"{module}.weight_scale_inv": ("F32", blocks)}


def make(folder: Path, times: int = 1) -> None:
    """Write the checkpoint: sparse shards, their index, and the config.json; the same each time."""
    described = config(times)
    given = tensors(described)
    weight_map: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, names in _shards(given, _SHARDS * times):
        _write(folder / name, {one: given[one] for one in names})
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total_size(given)}, "weight_map": dict(sorted(weight_map.items()))}
    for name, document in (("model.safetensors.index.json", index), ("config.json", described)):
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")


def total_size(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(map(_nbytes, tensors.values()))


def _shards(tensors: Tensors, count: int) -> Iterator[tuple[str, list[str]]]:
    """The names in each shard, of about as many bytes each, in the order of the tensors."""
    total = total_size(tensors)
    shards: list[list[str]] = [[] for _ in range(count)]
    position = 0
    for name, one in tensors.items():
        shards[position * count // total].append(name)
        position += _nbytes(one)
    filled = [names for names in shards if names]
    for number, names in enumerate(filled):
        yield f"model-{number + 1:05d}-of-{len(filled):06d}.safetensors", names


def _nbytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return _BYTES[dtype] * prod(shape)


def _write(path: Path, tensors: Tensors) -> None:
    """A sparse file, its tensors as the safetensors library orders them: the widest dtypes first, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-_BYTES[item[1][0]], item[0])):
        begin, end = end, end + _nbytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    with path.open("wb") as file:
        file.write(len(body).to_bytes(8, "little") + body)
        file.truncate(8 + len(body) + end)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
