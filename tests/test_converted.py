from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, core_model_loading
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming

from ckptsurg.errors import FreezeError
from ckptsurg.frameworks.pytorch import live_tensors
from ckptsurg.integrations.pytorch.converted import parts_as_saved
from ckptsurg.integrations.pytorch.parts import Part

# fmt: off
BERT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
TEXT = dict(BERT, num_key_value_heads=2)
EXPERTS = dict(TEXT, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
LATENT = dict(
    BERT, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=16,
    kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)
GROUPED = dict(LATENT, first_k_dense_replace=1, n_group=2, topk_group=1)
PLAIN_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = dict(PLAIN_VISION, image_size=32, patch_size=16)
DEEP_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14}
THREE_AXES = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}

#: What is built of each class, by what its conversion has of interest.
CONFIGS: dict[str, dict[str, Any]] = {
    # nothing
    "BertForSequenceClassification": BERT,
    "BertForPreTraining": BERT,
    "LlamaForCausalLM": dict(TEXT, tie_word_embeddings=True),
    "T5ForConditionalGeneration": {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    },
    "BartForConditionalGeneration": {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    },
    "GPT2LMHeadModel": {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "RobertaForMaskedLM": BERT,
    "Wav2Vec2Model": dict(
        PLAIN_VISION, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    "CLIPModel": {"text_config": BERT, "vision_config": VISION},
    # other names
    "ViTForImageClassification": VISION,
    "ViTModel": VISION,
    "ViTMAEForPreTraining": dict(
        VISION, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
        decoder_intermediate_size=48,
    ),
    "SwinModel": {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
    },
    "EsmModel": dict(BERT, pad_token_id=1),
    # several models in one, with prefixes that moved
    "LlavaForConditionalGeneration": {
        "text_config": dict(TEXT, model_type="llama"), "vision_config": dict(VISION, model_type="clip_vision_model"),
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": dict(TEXT, rope_parameters=THREE_AXES), "vision_config": dict(DEEP_VISION, embed_dim=32),
    },
    # experts in one tensor
    "MixtralForCausalLM": dict(TEXT, num_local_experts=4),
    "Qwen2MoeForCausalLM": dict(EXPERTS, shared_expert_intermediate_size=16),
    "DeepseekV3ForCausalLM": GROUPED,
    "Qwen3_5MoeForCausalLM": dict(
        EXPERTS, shared_expert_intermediate_size=16, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    ),
    "JambaForCausalLM": dict(
        TEXT, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0,
        use_mamba_kernels=False,
    ),
    "LongcatFlashForCausalLM": dict(
        LATENT, num_layers=1, expert_ffn_hidden_size=16, ffn_hidden_size=16, zero_expert_num=1, moe_topk=2,
    ),
    # experts of text and of vision, dealt out from one list
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": dict(
            TEXT, moe_intermediate_size=[16, 8], moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
            mlp_layer_types=["sparse", "sparse"], rope_parameters=THREE_AXES,
        ),
        "vision_config": dict(DEEP_VISION, intermediate_size=48),
    },
    # one tensor in the file, several in the model
    "HrmTextForCausalLM": TEXT,
    "GteModel": BERT,
    "Dinov2Model": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
        "use_swiglu_ffn": True,
    },
    # this, and the other way round
    "Molmo2TextModel": dict(TEXT, head_dim=8),
    # rows in another order
    "MistralLarge4ForConditionalGeneration": {"text_config": GROUPED, "vision_config": dict(VISION, head_dim=8)},
    "Kimi_K25ForConditionalGeneration": {
        "text_config": dict(GROUPED, model_type="deepseek_v3"), "vision_config": dict(PLAIN_VISION, patch_size=14),
    },
}
# fmt: on
#: Classes that are built of the same.
CONFIGS |= {
    "BertModel": BERT,
    "CLIPVisionModel": VISION,
    "GPT2Model": CONFIGS["GPT2LMHeadModel"],
    "MixtralModel": CONFIGS["MixtralForCausalLM"],
}


def build(name: str) -> PreTrainedModel:
    """A model in which no two tensors are alike."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this version of transformers has no {name}")
    torch.manual_seed(1)
    model: PreTrainedModel = kind(kind.config_class(**CONFIGS[name]))
    with torch.no_grad():
        for tensor in live_tensors(model).values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model


def save(
    model: PreTrainedModel, folder: Path, called: Callable[[str], str] = str, **how: Any
) -> dict[str, torch.Tensor]:
    """Save a model, with other names, and give what the file has."""
    model.save_pretrained(folder, **how)
    path = folder / "model.safetensors"
    saved = {called(name): tensor for name, tensor in load_file(path).items()}
    save_file(saved, path, metadata={"format": "pt"})
    return saved


def untouched(name: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model of a file from ``from_pretrained``, and one with its weights that never saw a file."""
    loaded = getattr(transformers, name).from_pretrained(folder)
    fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    return loaded, fresh


def split(model: PreTrainedModel, saved: Iterable[str]) -> tuple[list[Part], dict[str, torch.Tensor]]:
    """The parts of a model, and all that they make; each live tensor stands in one."""
    live = live_tensors(model)
    parts = parts_as_saved(model, live, list(saved))
    assert sorted(name for part in parts for name in part.live) == sorted(live)
    made: dict[str, torch.Tensor] = {}
    for part in parts:
        some = part.cut({name: live[name] for name in part.live})
        assert set(some) == set(part.saved)
        assert len(set(part.saved)) == len(part.saved)
        assert not made.keys() & some.keys()
        made.update(some)
    return parts, made


def different(made: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> list[str]:
    """Names on both sides with another dtype, shape or byte."""
    return [name for name in made.keys() & saved.keys() if described(made[name]) != described(saved[name])]


def described(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, raw.numpy().tobytes()


def tied(model: PreTrainedModel) -> set[str]:
    """Names of tensors that have another one too."""
    live = live_tensors(model)
    times = [id(tensor) for tensor in live.values()]
    return {name for name, tensor in live.items() if times.count(id(tensor)) > 1}


# --- What transformers saves ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_what_its_file_holds(name: str, tmp_path: Path) -> None:
    model = build(name)
    saved = save(model, tmp_path)
    for one in (model, *untouched(name, tmp_path)):
        parts, made = split(one, saved)
        assert saved.keys() <= made.keys()
        assert different(made, saved) == []
        assert {live for part in parts for live in part.live if not set(part.saved) <= saved.keys()} <= tied(one)


def test_half_precision_and_odd_bits(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM").to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj.view(torch.int16)[1, 2, :2] = torch.tensor([0x7FC5, -0x8000])
    saved = save(model, tmp_path)
    assert different(split(model, saved)[1], saved) == []


def test_experts_of_mixtral(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    live = live_tensors(model)
    parts = {part.live: part for part in parts_as_saved(model, live, ())}
    experts = "model.layers.1.block_sparse_moe.experts"
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    part = parts[fused,]
    assert sorted(part.saved) == sorted(f"{experts}.{number}.w{w}.weight" for number in range(4) for w in (1, 3))
    made, whole = part.cut({fused: live[fused]}), live[fused].detach().numpy()
    for number in range(4):
        np.testing.assert_array_equal(made[f"{experts}.{number}.w1.weight"], whole[number, :48])
        np.testing.assert_array_equal(made[f"{experts}.{number}.w3.weight"], whole[number, 48:])
    assert parts["model.norm.weight",].saved == ("model.norm.weight",)


def test_names_of_vit() -> None:
    model = build("ViTForImageClassification")
    saved = {part.live: part.saved for part in parts_as_saved(model, live_tensors(model), ())}
    for live, name in {
        "vit.layers.0.attention.k_proj.weight": "vit.encoder.layer.0.attention.attention.key.weight",
        "vit.layers.1.attention.o_proj.bias": "vit.encoder.layer.1.attention.output.dense.bias",
        "vit.layers.1.mlp.fc1.weight": "vit.encoder.layer.1.intermediate.dense.weight",
        "classifier.weight": "classifier.weight",
    }.items():
        assert saved[live,] == (name,)


def test_heads_that_the_file_has_fused() -> None:
    model = build("GteModel")
    live = live_tensors(model)
    names = tuple(f"layers.0.self_attn.{one}_proj.weight" for one in "qkv")
    part = next(part for part in parts_as_saved(model, live, ()) if set(names) <= set(part.live))
    assert part.live == tuple(name for name in live if name in names)
    (whole,) = part.cut(live).values()
    np.testing.assert_array_equal(whole, np.concatenate([live[name].detach().numpy() for name in names]))


def test_a_model_that_was_loaded_without_conversion_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(build("LlamaForCausalLM"), tmp_path)
    model, _ = untouched("LlamaForCausalLM", tmp_path)
    monkeypatch.delattr(core_model_loading, "revert_weight_conversion")
    live = live_tensors(model)
    assert [(part.live, part.saved) for part in parts_as_saved(model, live, live)] == [
        ((name,), (name,)) for name in live
    ]


def test_asking_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    save(build("MixtralForCausalLM"), tmp_path)
    model, _ = untouched("MixtralForCausalLM", tmp_path)
    conversions, live = list(model._weight_conversions), live_tensors(model)
    before = {name: described(tensor) for name, tensor in live.items()}
    split(model, ())
    assert model._weight_conversions == conversions
    assert {name: described(tensor) for name, tensor in live_tensors(model).items()} == before
    assert all(tensor is live[name] and tensor.requires_grad for name, tensor in model.named_parameters())


# --- Files of another class, and older ones ---------------------------------------------------------


def old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def old_below(name: str) -> str:
    return old(name) if ".0." in name else name


def new(name: str) -> str:
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def old_norm(name: str) -> str:
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


def below_vision(name: str) -> str:
    return name.replace("model.", "model.language_model.")


AS_LIVE = {"save_original_format": False}


@pytest.mark.parametrize(
    ("of", "called", "how", "into", "beyond"),
    [
        # names that transformers has given up
        ("BertForSequenceClassification", old, {}, "BertForSequenceClassification", ()),
        ("BertForSequenceClassification", old_below, {}, "BertForSequenceClassification", ()),
        ("Wav2Vec2Model", old_norm, {}, "Wav2Vec2Model", ()),
        ("EsmModel", new, {}, "EsmModel", ()),
        # a base model's file in a model with a head, and the reverse
        ("BertModel", str, {}, "BertForSequenceClassification", ()),
        ("BertModel", old, {}, "BertForSequenceClassification", ()),
        ("BertForSequenceClassification", str, {}, "BertModel", ("classifier.",)),
        ("BertForPreTraining", old, {}, "BertModel", ("cls.",)),
        ("ViTModel", str, {}, "ViTForImageClassification", ("pooler.",)),
        ("ViTForImageClassification", str, {}, "ViTModel", ("classifier.",)),
        ("MixtralModel", str, {}, "MixtralForCausalLM", ()),
        ("MixtralForCausalLM", str, {}, "MixtralModel", ("lm_head.",)),
        ("HrmTextForCausalLM", str, {}, "HrmTextModel", ("lm_head.",)),
        ("GPT2Model", str, {}, "GPT2LMHeadModel", ()),
        ("GPT2LMHeadModel", str, {}, "GPT2Model", ()),
        ("Wav2Vec2Model", old_norm, {}, "Wav2Vec2ForCTC", ()),
        # one model of several
        ("CLIPModel", str, {}, "CLIPVisionModel", ("text_", "visual_projection.", "logit_scale")),
        ("CLIPModel", str, {}, "CLIPTextModel", ("vision_", "visual_projection.", "text_projection.", "logit_scale")),
        ("Qwen3_5MoeForCausalLM", below_vision, {}, "Qwen3_5MoeForCausalLM", ()),
        ("LlavaForConditionalGeneration", str, {}, "LlavaModel", ("language_model.lm_head.",)),
        ("Qwen2VLForConditionalGeneration", str, {}, "Qwen2VLModel", ("lm_head.",)),
        # files that are cut as the model is
        ("ViTForImageClassification", str, AS_LIVE, "ViTForImageClassification", ()),
        ("MixtralForCausalLM", str, AS_LIVE, "MixtralForCausalLM", ()),
        ("MixtralModel", str, AS_LIVE, "MixtralForCausalLM", ()),
        ("HrmTextForCausalLM", str, AS_LIVE, "HrmTextModel", ("lm_head.",)),
        ("MistralLarge4ForConditionalGeneration", str, AS_LIVE, "MistralLarge4ForConditionalGeneration", ()),
        ("LlavaForConditionalGeneration", str, AS_LIVE, "LlavaForConditionalGeneration", ()),
    ],
)
def test_a_file_that_transformers_would_not_save(
    of: str, called: Callable[[str], str], how: dict[str, Any], into: str, beyond: tuple[str, ...], tmp_path: Path
) -> None:
    model = build(of)
    saved = save(model, tmp_path, called, **how)
    for one in untouched(into, tmp_path):
        _, made = split(one, saved)
        assert [name for name in saved if name not in made and not name.startswith(beyond or "-")] == []
        assert different(made, saved) == []
        assert len(made.keys() & saved.keys()) > len(made) / 2


def test_the_user_s_own_names(tmp_path: Path) -> None:
    saved = save(build("BertForSequenceClassification"), tmp_path, lambda name: name.replace("bert.", "trunk."))
    kind = transformers.BertForSequenceClassification
    model = kind.from_pretrained(tmp_path, key_mapping={r"^trunk\.": "bert."})
    _, made = split(model, saved)
    assert made.keys() == saved.keys()
    assert different(made, saved) == []


def test_two_names_for_one_tensor_are_left_alone() -> None:
    model = build("BertForSequenceClassification")
    wanted = ["embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.bias"]
    wanted += ["pooler.dense.weight", "bert.pooler.dense.weight"]
    saved = {part.live: part.saved for part in parts_as_saved(model, live_tensors(model), wanted)}
    assert saved["bert.embeddings.LayerNorm.weight",] == ("bert.embeddings.LayerNorm.weight",)
    assert saved["bert.embeddings.LayerNorm.bias",] == ("embeddings.LayerNorm.bias",)
    assert saved["bert.pooler.dense.weight",] == ("bert.pooler.dense.weight",)


def test_a_tensor_that_is_there_whole_and_in_pieces_is_in_pieces() -> None:
    model = build("MixtralForCausalLM")
    fused = "model.layers.1.mlp.experts.down_proj"
    wanted = [fused, "model.layers.1.block_sparse_moe.experts.0.w2.weight"]
    saved = {part.live: part.saved for part in parts_as_saved(model, live_tensors(model), wanted)}
    assert len(saved[fused,]) == 4


def test_what_belongs_together_is_split_a_layer_at_a_time() -> None:
    model = build("Ernie4_5_VLMoeForConditionalGeneration")
    parts = parts_as_saved(model, live_tensors(model), ())
    experts = [part.live for part in parts if any(".text_moe.experts." in name for name in part.live)]
    assert len(experts) == 2
    assert all(len(live) == 4 for live in experts)


# --- What cannot be taken back ----------------------------------------------------------------------


class OneWay(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise AssertionError


class Reversible(OneWay):
    """Its reverse is a function of one tensor."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.function = function

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        ((tensor,),) = input_dict.values()
        return {kwargs["target_patterns"][0]: self.function(tensor)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def converted(*conversions: WeightRenaming | WeightConverter) -> PreTrainedModel:
    model = build("BertForSequenceClassification")
    model._weight_conversions = list(conversions)
    return model


def refused(*conversions: WeightRenaming | WeightConverter) -> str:
    model = converted(*conversions)
    with pytest.raises(FreezeError) as caught:
        parts_as_saved(model, live_tensors(model), ())
    start = "the model (BertForSequenceClassification) cannot be compared with its checkpoint: transformers "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def test_a_quantised_model_is_refused() -> None:
    quantised = WeightRenaming("head", "classifier")
    quantised.quantization_operation = Chunk()
    assert refused(quantised) == (
        "cannot take back how it converted the weights: Cannot reverse the transform with TP or quantization "
        "(hint: give `names`)"
    )


def test_a_conversion_without_a_reverse_is_refused() -> None:
    one_way = WeightConverter("head.weight", "classifier.weight", [OneWay()])
    assert refused(one_way).startswith("cannot take back how it converted the weights: NotImplementedError (hint: ")


@pytest.mark.parametrize(
    "function",
    [lambda tensor: -tensor, lambda tensor: tensor.half().T, lambda tensor: tensor.clone().round_().view(-1)],
    ids=["negated", "rounded", "in place"],
)
def test_a_conversion_that_computes_is_refused(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    computing = WeightConverter("head.weight", "classifier.weight", [Reversible(function)])
    assert refused(computing).startswith('saves "head.weight" computed anew, not with the bits in the model (hint: ')


def test_a_conversion_that_moves_is_not() -> None:
    moving = WeightConverter("head.weight", "classifier.weight", [Reversible(lambda tensor: tensor.T.flip(0))])
    model = converted(moving)
    _, made = split(model, ())
    np.testing.assert_array_equal(made["head.weight"], model.classifier.weight.detach().numpy().T[::-1])


def test_a_conversion_that_works_once_is_refused() -> None:
    calls = iter([True])
    once = Reversible(lambda tensor: tensor.clone() if next(calls) else tensor)
    conversion = WeightConverter("classifier.weight", "classifier.weight", [once])
    assert (
        refused(conversion)
        == 'takes the conversion of "classifier.weight" back only with the whole model (hint: give `names`)'
    )


def test_a_tensor_that_would_be_overwritten_is_refused() -> None:
    overwriting = WeightRenaming("^classifier.weight", "bert.pooler.dense.weight")
    assert (
        refused(overwriting)
        == 'saves another tensor as "classifier.weight", and not the one of that name (hint: give `names`)'
    )


def test_of_two_that_become_one_the_other_keeps_its_name() -> None:
    first = WeightRenaming("^both.weight", "bert.pooler.dense.weight")
    parts, _ = split(converted(first, WeightRenaming("^both.weight", "classifier.weight")), ())
    saved = {part.live: part.saved for part in parts}
    assert saved["bert.pooler.dense.weight",] == ("both.weight",)
    assert saved["classifier.weight",] == ("classifier.weight",)
