"""Folders that load: models of transformers after blocks, experts, labels and words are gone or have come."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import ckptsurg

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
GPT2 = GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=50, n_positions=20, bos_token_id=1, eos_token_id=2)
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=4, head_dim=8, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_hidden_layers=4, max_position_embeddings=20)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGES, num_hidden_layers=4)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_hidden_layers=2, num_local_experts=4)),
}
LOADERS = dict.fromkeys(MAKERS, AutoModelForCausalLM) | {
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
}
TEN_LABELS = {"reinit": [{"match": "classifier", "shape": {"0": 10}, "init": "default"}]}
#: What is cut out or added, and how many notes it gives before config.json is edited.
SURGERY: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama-inner-blocks": ("llama", {"drop": {"match": "model.layers[1:3]", "renumber": True}}, 1),
    "llama-more-words": (
        "llama",
        {"reinit": [{"match": "{model.embed_tokens,lm_head}", "shape": {"0": 56}, "init": "mean", "keep": True}]},
        1,
    ),
    "qwen3-last-block": ("qwen3", {"drop": {"match": "model.layers[3]", "renumber": True}}, 2),
    "gpt2-first-block": ("gpt2", {"drop": {"match": "transformer.h[0]", "renumber": True}}, 1),
    "gpt2-head-of-its-own": (
        "gpt2",
        {"add": [{"name": "lm_head.weight", "shape": [50, 16], "dtype": "F32", "init": {"normal": {"std": 0.02}}}]},
        1,
    ),
    "bert-blocks-and-labels": (
        "bert",
        {"drop": {"match": "bert.encoder.layer[2]", "renumber": True}, **TEN_LABELS},
        2,
    ),
    "vit-blocks-and-labels": ("vit", {"drop": {"match": "vit.encoder.layer[0:2]", "renumber": True}, **TEN_LABELS}, 2),
    "mixtral-last-expert": (
        "mixtral",
        {
            "drop": {"match": "**.experts[-1]", "renumber": True},
            "reinit": [{"match": "**.gate", "shape": {"0": 3}, "init": "zeros", "keep": True}],
        },
        1,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        make().save_pretrained(home / name)
    return home


def edits_in(notes: tuple[str, ...]) -> dict[str, Any]:
    """The `config:` that the notes say to add."""
    found: dict[str, Any] = {}
    for note in notes:
        for key, value in yaml.safe_load(note.split("config: ", 1)[1]).items():
            found[key] = found[key] | value if isinstance(value, dict) and key in found else value
    return found


@pytest.mark.parametrize("surgery", SURGERY)
def test_with_the_edits_that_a_plan_names_the_output_loads_whole(folders: Path, tmp_path: Path, surgery: str) -> None:
    name, spec, expected = SURGERY[surgery]
    spec = {"version": 1, "freeze": ["**", *(f"!{rule['match']}" for rule in spec.get("reinit", []))], **spec}
    notes = tuple(note for note in ckptsurg.plan(spec, folders / name).notes if "config: {" in note)
    assert len(notes) == expected, notes
    spec["config"] = edits_in(notes)
    planned = ckptsurg.plan(spec, folders / name)
    assert not [note for note in planned.notes if "config" in note], planned.notes
    manifest = ckptsurg.rewrite(spec, folders / name, tmp_path / "out")

    model, info = LOADERS[name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    model.save_pretrained(tmp_path / "trained")
    if surgery != "gpt2-head-of-its-own":  # which transformers saves beside its twin
        assert ckptsurg.verify(manifest, tmp_path / "trained").ok
    # Every tensor that was copied has the bits of the base's tensor that the plan says it is.
    before, after = load_file(folders / name / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for tensor in planned.output:
        if tensor.action == "copy":
            ours = after[tensor.output_name].numpy().tobytes()
            assert ours == before[tensor.name].numpy().tobytes(), tensor.name
            assert (manifest.tensors[tensor.output_name].base_name == tensor.to and tensor.to is None) or (
                manifest.tensors[tensor.output_name].base_name == tensor.name
            )
    assert after.keys() == {tensor.output_name for tensor in planned.output}


def test_without_the_edits_it_does_not_load(folders: Path, tmp_path: Path) -> None:
    """Or the notes would be of no use."""
    for name, pattern in (("llama", "model.layers[1:3]"), ("bert", "bert.encoder.layer[2]")):
        ckptsurg.rewrite({"version": 1, "drop": {"match": pattern, "renumber": True}}, folders / name, tmp_path / name)
        _, info = LOADERS[name].from_pretrained(tmp_path / name, output_loading_info=True)
        assert info["missing_keys"]


def test_a_model_that_is_left_as_it_is_has_no_notes(folders: Path) -> None:
    for name in MAKERS:
        assert ckptsurg.plan({"version": 1, "freeze": "**"}, folders / name).notes == ()


def test_gaps_are_told_with_the_key_that_closes_them(folders: Path) -> None:
    notes = ckptsurg.plan({"version": 1, "drop": ["lm_head", "model.layers[1]"]}, folders / "llama").notes
    assert (
        "model.layers has no 1, and goes on to 3: a model counts its blocks from 0, so that the folder does not load "
        'whole; drop: {match: "model.layers[1]", renumber: true}'
    ) in notes


def test_objects_in_a_config_and_lists_of_blocks(folders: Path, tmp_path: Path) -> None:
    """As models of several modalities have them."""
    shutil.copytree(folders / "llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    text = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "vocab_size": 50}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "text_config": text}))
    spec: dict[str, Any] = {"version": 1, "drop": {"match": "model.layers[1:3]", "renumber": True}}
    notes = ckptsurg.plan(spec, tmp_path / "model").notes
    said = edits_in(tuple(note for note in notes if "config: {" in note))
    assert said["set"] == {
        "num_hidden_layers": 2,
        "text_config.num_hidden_layers": 2,
        "text_config.layer_types": ["a", "d"],
    }


def test_a_tied_head_that_config_denies(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "gpt2", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    notes = ckptsurg.plan({"version": 1, "freeze": "**"}, tmp_path / "model").notes
    assert [note for note in notes if "tie_word_embeddings false, and there is no head" in note]


def test_a_config_that_cannot_be_read_is_no_concern_of_a_plan_that_does_not_edit_it(
    folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "gpt2", tmp_path / "model")
    for content in ("{", "[]", '{"architectures": 3, "id2label": 4, "n_layer": "x", "layer_types": {}}'):
        (tmp_path / "model" / "config.json").write_text(content)
        assert ckptsurg.plan({"version": 1, "freeze": "**"}, tmp_path / "model").notes == ()
