"""A base's manifest on models that PEFT wraps, and against the adapters that it saves."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import ckptsurg
from ckptsurg.integrations.transformers import FreezeCallback

pytestmark = [
    # PEFT asks for an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS = 20
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
LLAMA, BERT = transformers.LlamaForCausalLM, transformers.BertForSequenceClassification


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A published base, with its manifest inside: everything is frozen."""
    return _publish(LLAMA, transformers.LlamaConfig(**SIZES, num_key_value_heads=1), tmp_path, "**")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A published base, with its manifest inside: the classifier trains."""
    return _publish(BERT, transformers.BertConfig(**SIZES), tmp_path, ["**", "!classifier"])


def _publish(
    model_class: type[PreTrainedModel], config: transformers.PretrainedConfig, folder: Path, freeze: Any
) -> Path:
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder / "base")
    ckptsurg.rewrite({"version": 1, "freeze": freeze}, folder / "base", folder / "out")
    return folder / "out"


def adapt_llama(model: PreTrainedModel) -> PeftModel:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def adapt_bert(model: PreTrainedModel) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    return get_peft_model(model, config)


def train(model: nn.Module, guarded: Any, steps: int = STEPS) -> None:
    """Steps of AdamW on everything that the model has, as a trainer that was told nothing would build it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    with guarded.guard(optimizer) as guard:
        for _ in range(steps):
            model.train()
            ids = torch.randint(32, (4, 8), generator=generator)
            labels = ids if "CausalLM" in type(model).__name__ else ids[:, 0] % 2
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert guard.steps == steps


def bits(tensors: Any) -> dict[str, bytes]:
    return {name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def base_bits(out: Path) -> dict[str, bytes]:
    return bits(load_file(out / "model.safetensors"))


def held(model: nn.Module, out: Path) -> set[str]:
    """The base's tensors that the wrapped model has with their bits, by the names of the base."""
    live = {
        name.removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", "."): one
        for name, one in bits(model.state_dict()).items()
    }
    return {name for name, one in base_bits(out).items() if live[name] == one}


# --- Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_base_holds_while_an_adapter_trains(when, llama):
    model = LLAMA.from_pretrained(llama)
    if when == "before":
        frozen = ckptsurg.freeze(model, llama / "freeze.json")
        wrapped = adapt_llama(model)
    else:
        wrapped = adapt_llama(model)
        with pytest.warns(UserWarning, match="the manifest lacks them: .*lora_A") as caught:
            frozen = ckptsurg.freeze(wrapped, llama / "freeze.json")
        assert len(caught) == 1
        assert len(frozen.extra) == 4 and all(".lora_" in name for name in frozen.extra)
    trainable = {name for name, one in wrapped.named_parameters() if one.requires_grad}
    assert trainable == {name for name, _ in wrapped.named_parameters() if ".lora_" in name} and len(trainable) == 4
    before = bits(wrapped.state_dict())
    train(wrapped, frozen)
    after = bits(wrapped.state_dict())
    assert {name for name in before if before[name] != after[name]} == trainable
    assert held(wrapped, llama) == base_bits(llama).keys()
    assert ckptsurg.verify(llama, wrapped).ok


def test_extra_parameters_may_be_forbidden(llama):
    wrapped = adapt_llama(LLAMA.from_pretrained(llama))
    with pytest.raises(ckptsurg.FreezeError, match=r"parameters that the manifest lacks: .*lora_A"):
        ckptsurg.freeze(wrapped, llama, extra="error")


@pytest.mark.parametrize("when", ["before", "after"])
def test_of_a_module_that_is_trained_in_copy_the_copy_counts(when, bert):
    model = BERT.from_pretrained(bert)
    if when == "before":
        frozen = ckptsurg.freeze(model, bert)
        wrapped = adapt_bert(model)
    else:
        wrapped = adapt_bert(model)
        with pytest.warns(UserWarning, match="the manifest lacks them"):
            frozen = ckptsurg.freeze(wrapped, bert)
    assert not ckptsurg.verify(bert, wrapped, expect_trained=True).ok
    train(wrapped, frozen)
    assert base_bits(bert).keys() - held(wrapped, bert) == {"classifier.weight", "classifier.bias"}
    report = frozen.verify(expect_trained=True)
    assert report.ok and report.untrained == ()
    assert ckptsurg.verify(bert, wrapped, expect_trained=True).ok


def test_a_frozen_module_of_which_a_copy_would_train(tmp_path):
    out = _publish(BERT, transformers.BertConfig(**SIZES), tmp_path, "**")
    model = BERT.from_pretrained(out)
    frozen = ckptsurg.freeze(model, out)
    wrapped = adapt_bert(model)  # turns the copy's training on
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"before step 1:") as caught:
        train(wrapped, frozen)
    assert caught.value.causes.keys() == {"classifier.weight", "classifier.bias"}
    assert set(caught.value.causes.values()) == {"reenabled"}
    other = adapt_bert(BERT.from_pretrained(out))
    with (
        pytest.warns(UserWarning, match="the manifest lacks them"),
        pytest.warns(UserWarning, match=r"classifier.*PEFT made a copy to train \(modules_to_save\)"),
    ):
        ckptsurg.freeze(other, out)
    assert all(".lora_" in name for name, one in other.named_parameters() if one.requires_grad)


def test_a_base_layer_that_is_moved_is_caught_at_that_step_under_its_own_name(llama):
    wrapped = adapt_llama(LLAMA.from_pretrained(llama))
    with pytest.warns(UserWarning, match="the manifest lacks them"):
        frozen = ckptsurg.freeze(wrapped, llama)
    weight = wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^after step 1, 1 frozen tensor changed") as caught:
        weight.data.add_(1e-6)
        train(wrapped, frozen)
    assert "\n  model.layers.0.self_attn.q_proj.weight: bits changed" in caught.value.message
    assert caught.value.causes == {}
    weight.data.sub_(1e-6)
    weight.requires_grad_(True)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="before step 1:") as caught:
        train(wrapped, frozen)
    assert set(caught.value.causes.values()) == {"reenabled"}


ADAPTERS = {
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "trainable tokens": LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_kinds_of_adapters(kind, when, llama, tmp_path):
    model = LLAMA.from_pretrained(llama)
    base = dict(model.named_parameters())
    before = bits(base)
    if when == "before":
        frozen = ckptsurg.freeze(model, llama)
    wrapped = get_peft_model(model, copy.deepcopy(ADAPTERS[kind]))
    if when == "after":
        with pytest.warns(UserWarning, match="the manifest lacks them"):
            frozen = ckptsurg.freeze(wrapped, llama)
    train(wrapped, frozen, 3)
    assert bits(base) == before
    assert frozen.verify().verified == len(base) and ckptsurg.verify(llama, wrapped).ok
    wrapped.save_pretrained(tmp_path / "adapter")
    report = ckptsurg.verify(llama, tmp_path / "adapter")
    assert report.ok and report.extra
    wrapped.get_base_model().model.norm.weight.data.add_(1e-3)
    assert {d.name for d in ckptsurg.verify(llama, wrapped).drifted} == {"model.norm.weight"}


def test_of_several_adapters_the_active_one_counts(bert):
    wrapped = adapt_bert(BERT.from_pretrained(bert))
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    wrapped.set_adapter("default")
    with pytest.warns(UserWarning, match="the manifest lacks them"):
        frozen = ckptsurg.freeze(wrapped, bert)
    train(wrapped, frozen, 3)
    assert frozen.verify(expect_trained=True).ok
    wrapped.set_adapter("other")
    assert ckptsurg.verify(bert, wrapped, expect_trained=True).untrained == ("classifier.bias", "classifier.weight")


# --- Adapters by themselves -------------------------------------------------------------------------


@pytest.fixture
def adapter(llama, tmp_path):
    """The folder of an adapter to the Llama base."""
    adapt_llama(LLAMA.from_pretrained(llama)).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    return tmp_path / "adapter"


def _configure(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _run(*arguments: Any, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptsurg", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_an_adapter_is_proven_in_its_base(llama, adapter):
    report = ckptsurg.verify(llama / "freeze.json", adapter)
    assert report.ok and report.verified == len(base_bits(llama))
    assert report.note == f"{adapter} is an adapter alone: what it lacks was proven in its base, {llama}"
    assert report.extra and all("lora_" in name for name in report.extra)
    told = _run("verify", llama / "freeze.json", adapter, code=0)
    assert "is an adapter alone" in " ".join((told.stdout + told.stderr).split())
    document = json.loads(_run("verify", llama / "freeze.json", adapter, "--json", code=0).stdout)
    assert document["ok"] and document["note"] == report.note


def test_what_an_adapter_brings_of_the_base_itself_counts(bert, tmp_path):
    model = BERT.from_pretrained(bert)
    frozen = ckptsurg.freeze(model, bert)
    wrapped = adapt_bert(model)
    train(wrapped, frozen)
    wrapped.save_pretrained(tmp_path / "adapter")
    report = ckptsurg.verify(bert, tmp_path / "adapter", expect_trained=True)
    assert report.ok and report.untrained == () and report.missing_trainable == ()
    everything = ckptsurg.make_manifest("**", bert)
    report = ckptsurg.verify(everything, tmp_path / "adapter")
    assert [difference.name for difference in report.drifted] == ["classifier.bias", "classifier.weight"]


def test_the_base_may_be_given_relative_to_the_adapter(llama, adapter):
    _configure(adapter, base_model_name_or_path="../out")
    assert ckptsurg.verify(llama, adapter).ok


def test_an_altered_base_is_found(llama, adapter):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    report = ckptsurg.verify(llama / "freeze.json", adapter)
    assert [(d.name, d.verdict, d.cause) for d in report.drifted] == [("model.norm.weight", "changed", None)]
    assert report.note is not None and str(llama) in report.note
    told = _run("verify", llama / "freeze.json", adapter, code=1)
    assert "model.norm.weight" in told.stdout and "is an adapter alone" in " ".join((told.stdout + told.stderr).split())


def test_another_base_is_found(llama, adapter, tmp_path):
    torch.manual_seed(5)
    LLAMA(transformers.LlamaConfig(**SIZES, num_key_value_heads=1)).save_pretrained(tmp_path / "other")
    _configure(adapter, base_model_name_or_path=str(tmp_path / "other"))
    assert not ckptsurg.verify(llama, adapter).ok


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("somebody/some-model", '"somebody/some-model" is not on this machine'),
        (None, "it does not say which"),
        ("", "it does not say which"),
        (7, "it does not say which"),
    ],
)
def test_a_base_that_is_not_here(name, said, llama, adapter):
    _configure(adapter, base_model_name_or_path=name)
    with pytest.raises(ckptsurg.UsageError) as caught:
        ckptsurg.verify(llama, adapter)
    assert caught.value.message == f"{adapter}: an adapter alone: what is frozen is in its base, and {said}"
    assert caught.value.hint == "bring the base here, or verify the base by itself where it is"


def test_the_command_says_what_is_wrong_with_an_adapter(llama, adapter):
    _configure(adapter, base_model_name_or_path="somebody/some-model")
    told = _run("verify", llama, adapter, code=2).stderr
    assert '"somebody/some-model" is not on this machine' in told and "hint: bring the base here" in told
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json: not JSON" in _run("verify", llama, adapter, code=3).stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"base_model_name_or_path": "a", "base_model_name_or_path": "b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b" " * 10_000_001, "adapter_config.json"),
    ],
    ids=["cut off", "bytes", "twice", "deep", "huge"],
)
def test_a_malformed_configuration(text, said, llama, adapter):
    (adapter / "adapter_config.json").write_bytes(text)
    with pytest.raises(ckptsurg.CheckpointError, match=said) as caught:
        ckptsurg.verify(llama, adapter)
    assert str(adapter / "adapter_config.json") in caught.value.message


def test_a_configuration_that_is_no_object_names_no_base(llama, adapter):
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ckptsurg.UsageError, match="it does not say which"):
        ckptsurg.verify(llama, adapter)


# --- Merging ----------------------------------------------------------------------------------------

MERGED = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv"}


def _trained(llama: Path) -> tuple[PeftModel, Any]:
    model = LLAMA.from_pretrained(llama)
    frozen = ckptsurg.freeze(model, llama)
    wrapped = adapt_llama(model)
    train(wrapped, frozen, 5)
    return wrapped, frozen


def test_a_merged_model_is_found_when_it_was_saved(llama, tmp_path):
    wrapped, _ = _trained(llama)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    for baseline in (None, llama):
        report = ckptsurg.verify(llama, tmp_path / "merged", baseline=baseline)
        assert {d.name for d in report.drifted} == MERGED
        assert {(d.verdict, d.cause) for d in report.drifted} == {("changed", None)}


def test_merging_and_unmerging_is_found_and_named(llama):
    wrapped, frozen = _trained(llama)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    for report in (frozen.verify(baseline=llama), ckptsurg.verify(llama, wrapped, baseline=llama)):
        assert {d.name: d.cause for d in report.drifted} == dict.fromkeys(MERGED, "merge_roundtrip")
        assert all(d.detail.elements_changed > 0 and d.detail.max_abs_diff < 1e-6 for d in report.drifted)
    assert {(d.name, d.cause) for d in frozen.verify().drifted} == {(name, None) for name in MERGED}


def test_merging_and_unmerging_is_named_in_what_is_saved(llama, tmp_path):
    wrapped, _ = _trained(llama)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    wrapped.unload().save_pretrained(tmp_path / "saved")
    report = ckptsurg.verify(llama, tmp_path / "saved", baseline=llama)
    assert {d.name: d.cause for d in report.drifted} == dict.fromkeys(MERGED, "merge_roundtrip")


def test_merging_between_steps_is_caught_at_the_next(llama):
    wrapped, frozen = _trained(llama)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"^after step 1, 2 frozen tensors changed"):
        train(wrapped, frozen)


# --- In a Trainer -----------------------------------------------------------------------------------


def _trainer(wrapped: PeftModel, callback: FreezeCallback, folder: Path, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    data = [
        {"input_ids": torch.randint(32, (8,), generator=generator), "labels": number % 2} for number in range(STEPS * 4)
    ]
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "save_strategy": "steps", "save_steps": 10, "logging_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="the manifest lacks them: .*lora_") as caught:
        trainer = Trainer(
            wrapped,
            TrainingArguments(output_dir=str(folder / "run"), **arguments | options),
            train_dataset=data,
            eval_dataset=data[:4],
            callbacks=[callback],
        )
    assert len(caught) == 1
    return trainer


def test_trainer_saves_adapters_that_are_proven(bert, tmp_path):
    callback = FreezeCallback(bert, expect_trained=True)
    best = {"eval_strategy": "steps", "eval_steps": 10, "load_best_model_at_end": True}
    trainer = _trainer(adapt_bert(BERT.from_pretrained(bert)), callback, tmp_path, **best)
    trainer.train()
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    report = ckptsurg.verify(bert, checkpoint, expect_trained=True)
    assert report.ok and report.note is not None
    resumed = _trainer(adapt_bert(BERT.from_pretrained(bert)), FreezeCallback(bert, expect_trained=True), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert resumed.state.global_step == STEPS and ckptsurg.verify(bert, resumed.model).ok


def test_trainer_catches_a_base_that_is_altered_under_the_adapter(bert, tmp_path):
    trainer = _trainer(adapt_bert(BERT.from_pretrained(bert)), FreezeCallback(bert), tmp_path)
    tensors = load_file(bert / "model.safetensors")
    tensors["bert.pooler.dense.bias"][3] += 1e-6
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"checkpoint-10: 1 frozen tensor changed") as caught:
        trainer.train()
    assert "bert.pooler.dense.bias: bits changed" in caught.value.message


@pytest.mark.filterwarnings("ignore:Could not find a config file in somebody:UserWarning")  # PEFT, at every save
def test_trainer_goes_on_where_the_base_is_not_on_this_machine(bert, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # or PEFT asks the network for the base's config.json
    wrapped = adapt_bert(BERT.from_pretrained(bert))
    wrapped.peft_config["default"].base_model_name_or_path = "somebody/some-model"
    trainer = _trainer(wrapped, FreezeCallback(bert), tmp_path)
    assert not wrapped.get_submodule("base_model.model.bert.pooler.dense").weight.requires_grad
    with caplog.at_level(logging.WARNING, "ckptsurg"):
        trainer.train()
    assert trainer.state.global_step == STEPS
    said = [record.getMessage() for record in caplog.records if record.name == "ckptsurg"]
    assert len(said) == 2 and all(
        "somebody/some-model" in one and "the live model is proven at the end" in one for one in said
    )
