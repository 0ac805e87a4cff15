"""FreezeCallback in a real transformers.Trainer: what it holds, and what it catches at which step."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import ckptsurg
from ckptsurg.integrations.transformers import FreezeCallback

STEPS = 20
LABELS = 3
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
IMAGES = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}

#: Model, its configuration, what trains, and what is drawn anew.
KINDS: dict[str, tuple[type[PreTrainedModel], dict[str, Any], str, str]] = {
    "bert": (transformers.BertForSequenceClassification, TEXT, "classifier", "classifier"),
    "resnet": (transformers.ResNetForImageClassification, STAGES, "classifier", "classifier"),
    "last stage": (
        transformers.ResNetForImageClassification,
        STAGES,
        "{classifier,resnet.encoder.stages.1}",
        "classifier",
    ),
    "vit": (transformers.ViTForImageClassification, IMAGES, "classifier", "classifier"),
}


def publish(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A base of random weights, with a new head by a spec."""
    model_class, options, trains, drawn = KINDS[kind]
    torch.manual_seed(0)
    model_class(model_class.config_class(**options)).to(dtype).save_pretrained(folder / "base")
    spec = {
        "version": 1,
        "freeze": ["**", f"!{trains}"],
        "reinit": [{"match": f"{drawn}.**.weight", "shape": {0: LABELS}, "init": {"normal": {"std": 0.02}}},
                   {"match": f"{drawn}.**.bias", "shape": {0: LABELS}, "init": "zeros"}],
        "config": {"set": {"num_labels": LABELS}, "unset": ["id2label", "label2id"]},
    }  # fmt: skip
    ckptsurg.rewrite(spec, folder / "base", folder / "out")
    return folder / "out"


def load(kind: str, out: Path, **options: Any) -> PreTrainedModel:
    return KINDS[kind][0].from_pretrained(out, **options)


def examples(kind: str, count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)

    def one() -> dict[str, Any]:
        label = int(torch.randint(LABELS, (), generator=generator))
        if kind == "bert":
            return {"input_ids": torch.randint(32, (8,), generator=generator), "labels": label}
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": label}

    return [one() for _ in range(count)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder / "run"), **given | options)


def trainer_of(
    kind: str, out: Path, *callbacks: TrainerCallback, model: PreTrainedModel | None = None, **options: Any
) -> Trainer:
    optimizers = options.pop("optimizers", (None, None))
    args = arguments(out.parent, **options)
    data = examples(kind, STEPS * args.per_device_train_batch_size * args.gradient_accumulation_steps)
    return Trainer(
        model if model is not None else load(kind, out),
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def bits(tensors: Any) -> dict[str, bytes]:
    """Raw bytes of every tensor of a model or of a checkpoint's folder."""
    tensors = tensors.state_dict() if isinstance(tensors, nn.Module) else load_file(tensors / "model.safetensors")
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def moved(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, one in before.items() if one != after[name]}


class At(TrainerCallback):
    """Does something to the model at one event of one step."""

    def __init__(self, event: str, step: int, act: Callable[..., None]) -> None:
        def react(args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == step:
                act(given["model"])

        setattr(self, event, react)


def caught(trainer: Trainer, message: str, **options: Any) -> ckptsurg.FrozenWeightsChanged:
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=message) as caught:
        trainer.train(**options)
    return caught.value


# --- It holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "trained"),
    [
        ("bert", {"gradient_accumulation_steps": 2}, {"classifier.weight", "classifier.bias"}),
        ("resnet", {}, {"classifier.1.weight", "classifier.1.bias"}),
    ],
)
def test_frozen_bits_hold_and_the_head_moves(kind, options, trained, tmp_path):
    out = publish(kind, tmp_path)
    callback = FreezeCallback(out, expect_trained=True)
    trainer = trainer_of(kind, out, callback, **options)
    before = bits(trainer.model)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert moved(before, bits(trainer.model)) == trained
    assert callback.frozen.verify().verified == len(before) - len(trained)


def test_norms_of_a_stage_that_trains_follow_the_model(tmp_path):
    out = publish("last stage", tmp_path)
    trainer = trainer_of("last stage", out, FreezeCallback(out, expect_trained=True))
    before = bits(trainer.model)
    trainer.train()
    after = moved(before, bits(trainer.model))
    assert {name for name in after if not name.startswith(("classifier.", "resnet.encoder.stages.1."))} == set()
    statistics = {name for name in before if ".stages.1." in name and name.endswith(("running_mean", "tracked"))}
    assert statistics and statistics <= after


def test_without_the_callback_statistics_move(tmp_path):
    out = publish("resnet", tmp_path)
    trainer = trainer_of("resnet", out, max_steps=1)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    trainer.train()
    report = ckptsurg.verify(out, trainer.model)
    assert report.drifted and {difference.cause for difference in report.drifted} == {"batchnorm_stats"}


def test_a_wider_dtype_is_accepted_in_the_model_and_its_saves(tmp_path):
    out = publish("bert", tmp_path, torch.bfloat16)
    callback = FreezeCallback(out, allow_widened=True)
    model = load("bert", out, dtype=torch.float32)
    trainer = trainer_of("bert", out, callback, model=model, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.state.global_step == 2
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert {d.verdict for d in ckptsurg.verify(out, checkpoint).drifted} == {"dtype_only"}
    assert ckptsurg.verify(out, checkpoint, allow_widened=True).ok


# --- It catches, at that very step ------------------------------------------------------------------

BODY = "bert.encoder.layer.0.output.dense.weight"


def thaw(model: nn.Module) -> None:
    model.get_parameter(BODY).requires_grad_(True)


def nudge(model: nn.Module) -> None:
    model.get_parameter(BODY).data.add_(1e-6)


def zero_gradient(model: nn.Module) -> None:
    model.get_parameter(BODY).grad = torch.zeros_like(model.get_parameter(BODY))


def replace_all(model: nn.Module) -> None:
    copies = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(copies, assign=True)


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize(
    ("event", "act", "causes"),
    [
        ("on_step_begin", thaw, {BODY: "reenabled"}),
        ("on_pre_optimizer_step", zero_gradient, {BODY: "zero_grad_not_none"}),
        (
            "on_step_begin",
            replace_all,
            {"classifier.weight": "stale_optimizer", "classifier.bias": "stale_optimizer"},
        ),
    ],
)
def test_before_a_step_that_would_move_something(event, act, causes, every, tmp_path):
    out = publish("bert", tmp_path)
    model = load("bert", out)
    callback = FreezeCallback(out, every=every)
    trainer = trainer_of("bert", out, At(event, 7, act), callback, model=model)
    if act is zero_gradient:  # an optimizer that was built from everything
        trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    error = caught(trainer, r"before step 8:")
    assert error.causes == causes
    for name, code in causes.items():
        assert name in error.message and code in error.message
    assert trainer.state.global_step == 7
    assert callback.frozen.verify().ok  # it did not move


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
def test_a_direct_write_is_named_and_its_cause_not_guessed(event, tmp_path):
    out = publish("bert", tmp_path)
    step = 8 if event == "on_step_end" else 7
    trainer = trainer_of("bert", out, At(event, step, nudge), FreezeCallback(out))
    error = caught(trainer, rf"^after step 8, 1 frozen tensor changed:\n  {BODY}: bits changed$")
    assert error.causes == {}
    assert trainer.state.global_step == 8


def test_a_write_of_a_later_callback_is_caught_at_the_next_step(tmp_path):
    out = publish("bert", tmp_path)
    trainer = trainer_of("bert", out, FreezeCallback(out), At("on_step_end", 8, nudge))
    assert caught(trainer, "^after step 9, 1 frozen tensor changed").causes == {}


def wake(model: nn.Module) -> None:
    for module in model.modules():
        module.training = True


def test_norms_that_are_put_back_in_training_mode(tmp_path):
    out = publish("resnet", tmp_path)
    trainer = trainer_of("resnet", out, At("on_pre_optimizer_step", 5, wake), FreezeCallback(out))
    error = caught(trainer, r"before step 6:")
    assert error.causes and set(error.causes.values()) == {"batchnorm_stats"}
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in error.causes)
    assert trainer.state.global_step == 5


def test_a_norm_that_trains_only_while_it_computes(tmp_path):
    out = publish("resnet", tmp_path)
    norm = "resnet.embedder.embedder.normalization"

    def sabotage(model: nn.Module) -> None:
        module = model.get_submodule(norm)
        module.register_forward_pre_hook(lambda module, _: setattr(module, "training", True))
        module.register_forward_hook(lambda module, *_: setattr(module, "training", False))

    trainer = trainer_of("resnet", out, At("on_step_begin", 2, sabotage), FreezeCallback(out))
    error = caught(trainer, "^after step 3, 3 frozen tensors changed")
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert error.causes == {f"{norm}.{buffer}": "batchnorm_stats" for buffer in buffers}
    assert trainer.state.global_step == 3


def test_tiers(tmp_path):
    out = publish("bert", tmp_path)
    for every, message, step in ((5, "^after step 10, 1 frozen tensor", 10), (None, "^1 frozen tensor", STEPS)):
        trainer = trainer_of("bert", out, At("on_step_end", 6, nudge), FreezeCallback(out, every=every))
        assert caught(trainer, message).causes == {}
        assert trainer.state.global_step == step


@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_a_tier_that_is_no_number_of_steps_is_refused_at_once(every, tmp_path):
    out = publish("bert", tmp_path)
    with pytest.raises(ckptsurg.UsageError, match="every: expected a whole number from 1"):
        FreezeCallback(out, every=every)


def test_what_should_train_and_does_not(tmp_path):
    out = publish("bert", tmp_path)
    trainer = trainer_of("bert", out, FreezeCallback(out, expect_trained=True), learning_rate=0.0)
    error = caught(trainer, "2 trainable tensors did not move:\n  classifier.(weight|bias)")
    assert "classifier.weight" in error.message and "classifier.bias" in error.message
    assert trainer.state.global_step == STEPS
    trainer_of("bert", out, FreezeCallback(out), learning_rate=0.0).train()


# --- Saves ------------------------------------------------------------------------------------------

SAVES = {"save_strategy": "steps", "save_steps": 5}


def tamper(folder: Path, name: str = BODY) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_file_that_was_written_is_proven(tmp_path):
    out = publish("bert", tmp_path)
    spoil = At("on_save", 10, lambda _: tamper(tmp_path / "run" / "checkpoint-10"))
    trainer = trainer_of("bert", out, spoil, FreezeCallback(out), **SAVES)
    error = caught(trainer, rf"checkpoint-10: 1 frozen tensor changed:\n  {BODY}: bits changed$")
    assert error.causes == {}
    assert trainer.state.global_step == 10


def test_a_file_without_its_frozen_tensors(tmp_path):
    out = publish("bert", tmp_path)

    def thin(_: nn.Module) -> None:
        file = tmp_path / "run" / "checkpoint-5" / "model.safetensors"
        save_file({name: t for name, t in load_file(file).items() if name.startswith("classifier")}, file)

    trainer = trainer_of("bert", out, At("on_save", 5, thin), FreezeCallback(out), **SAVES)
    error = caught(trainer, r"checkpoint-5: \d+ frozen tensors changed:")
    assert error.causes[BODY] == "not_saved" and set(error.causes.values()) == {"not_saved"}


def test_saves_that_are_sharded_thinned_out_or_weights_alone(tmp_path):
    out = publish("bert", tmp_path)
    trainer = trainer_of("bert", out, FreezeCallback(out), **SAVES, save_total_limit=1, save_only_model=True)
    save = trainer.model.save_pretrained
    trainer.model.save_pretrained = lambda *given, **options: save(*given, **options, max_shard_size="4KB")
    trainer.train()
    [folder] = (tmp_path / "run").glob("checkpoint-*")
    assert folder.name == f"checkpoint-{STEPS}" and len(list(folder.glob("*.safetensors"))) > 1
    assert ckptsurg.verify(out, folder, expect_trained=True).ok


def test_a_save_that_holds_no_weights_is_not_taken_for_proven(tmp_path, caplog):
    out = publish("bert", tmp_path)
    away = At("on_save", 5, lambda _: shutil.rmtree(tmp_path / "run" / "checkpoint-5"))
    trainer = trainer_of("bert", out, away, FreezeCallback(out), **SAVES, max_steps=10)
    with caplog.at_level(logging.WARNING, "ckptsurg"):
        trainer.train()
    warned = [record for record in caplog.records if record.name == "ckptsurg" and record.levelno >= logging.WARNING]
    [said] = [record.getMessage() for record in warned]
    assert "checkpoint-5 is not there" in said and said.endswith("it is not proven")


def test_the_best_model_is_no_false_alarm(tmp_path):
    out = publish("resnet", tmp_path)
    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = trainer_of("resnet", out, FreezeCallback(out, expect_trained=True), **SAVES, **best)
    trainer.train()
    chosen = Path(trainer.state.best_model_checkpoint)
    assert moved(bits(trainer.model), bits(chosen)) == set()
    assert ckptsurg.verify(out, chosen).ok and ckptsurg.verify(out, trainer.model).ok


def test_a_model_that_goes_by_other_names_than_its_file(tmp_path):
    out = publish("vit", tmp_path)
    trainer = trainer_of("vit", out, FreezeCallback(out, expect_trained=True), **SAVES)
    frozen = load_file(out / "model.safetensors").keys()
    assert frozen - trainer.model.state_dict().keys()  # or this shows nothing
    before = bits(trainer.model)
    trainer.train()
    assert moved(before, bits(trainer.model)) == {"classifier.weight", "classifier.bias"}
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    report = ckptsurg.verify(out / "freeze.json", checkpoint, exact=True, expect_trained=True)
    assert report.ok and report.verified == len(frozen) - 2
    assert moved(bits(out), bits(checkpoint)) == {"classifier.weight", "classifier.bias"}


def test_a_sabotaged_tensor_goes_by_its_file_s_name(tmp_path):
    out = publish("vit", tmp_path)
    live = KINDS["vit"][0].from_pretrained(out).state_dict().keys()
    names = load_file(out / "model.safetensors").keys()
    target = next(name for name in live if name not in names and name.endswith("weight"))
    nudged = At("on_optimizer_step", 3, lambda model: model.get_parameter(target).data.add_(1e-6))
    error = caught(trainer_of("vit", out, nudged, FreezeCallback(out)), "^after step 4, 1 frozen tensor changed")
    assert any(f"\n  {name}: bits changed" in error.message for name in names)


# --- Resuming, further phases -----------------------------------------------------------------------


def test_resuming_gives_what_one_run_gives(tmp_path):
    out = publish("resnet", tmp_path)
    whole = trainer_of("resnet", out, FreezeCallback(out), **SAVES)
    whole.train()
    callback = FreezeCallback(out, expect_trained=True)
    resumed = trainer_of("resnet", out, callback, At("on_step_end", 10, pytest.fail), **SAVES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert resumed.state.global_step == STEPS
    assert moved(bits(whole.model), bits(resumed.model)) == set()
    assert callback.frozen.verify().ok


def test_a_checkpoint_that_was_altered_is_caught_before_the_first_step(tmp_path):
    out = publish("bert", tmp_path)
    trainer_of("bert", out, FreezeCallback(out), **SAVES, max_steps=10).train()
    tamper(tmp_path / "run" / "checkpoint-5")
    none = At("on_step_begin", 5, lambda _: pytest.fail("a step was begun"))
    trainer = trainer_of("bert", out, none, FreezeCallback(out, every=None), **SAVES)
    error = caught(
        trainer,
        rf"^resuming at step 5, 1 frozen tensor changed:\n  {BODY}: bits changed$",
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"),
    )
    assert error.causes == {} and trainer.state.global_step == 5
    tamper(tmp_path / "run" / "checkpoint-10", "classifier.weight")  # what trains may differ
    trainer = trainer_of("bert", out, FreezeCallback(out), **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert trainer.state.global_step == STEPS


def test_steps_are_counted_on_after_resuming(tmp_path):
    out = publish("bert", tmp_path)
    trainer_of("bert", out, FreezeCallback(out), **SAVES, max_steps=5).train()
    for event, act, message in (
        ("on_optimizer_step", nudge, "^after step 8, "),
        ("on_step_begin", thaw, "^before step 8:"),
    ):
        trainer = trainer_of("bert", out, At(event, 7, act), FreezeCallback(out), **SAVES)
        caught(trainer, message, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))


def test_a_model_that_is_made_anew_for_every_training(tmp_path):
    out = publish("resnet", tmp_path)
    made: list[PreTrainedModel] = []

    def model_init() -> PreTrainedModel:
        made.append(load("resnet", out))
        return made[-1]

    callback = FreezeCallback(out, expect_trained=True)
    data = examples("resnet", STEPS * 4)
    trainer = Trainer(
        None, arguments(tmp_path, **SAVES), train_dataset=data, model_init=model_init, callbacks=[callback]
    )
    before = bits(out)
    for trainings in (1, 2):
        trainer.train()
        assert len(made) == trainings + 1 and trainer.model is made[-1] and callback.frozen.model is made[-1]
        assert moved(before, bits(trainer.model)) == {"classifier.1.weight", "classifier.1.bias"}
    trainer.add_callback(
        At("on_optimizer_step", 3, lambda model: model.resnet.embedder.embedder.convolution.weight.data.neg_())
    )
    assert "resnet.embedder.embedder.convolution.weight: bits changed" in caught(trainer, "^after step 4, ").message


def test_training_goes_on_after_an_alarm_that_was_answered(tmp_path):
    out = publish("bert", tmp_path)
    callback = FreezeCallback(out)
    trainer = trainer_of("bert", out, callback)
    for step in (2, 5):  # nothing of the first training watches, or counts in, the second
        saboteur = At("on_step_begin", step, thaw)
        trainer.add_callback(saboteur)
        caught(trainer, f"^before step {step + 1}:")
        trainer.remove_callback(saboteur)
        trainer.model.get_parameter(BODY).requires_grad_(False)
    trainer.train()
    assert trainer.state.global_step == STEPS and callback.frozen.verify().ok
    nudge(trainer.model)
    caught(trainer, "^at the beginning, 1 frozen tensor changed")


def test_a_second_phase_has_its_own_manifest(tmp_path):
    out = publish("resnet", tmp_path)
    trainer_of("resnet", out, FreezeCallback(out), **SAVES).train()
    first = tmp_path / "run" / f"checkpoint-{STEPS}"
    # The whole last stage trains now; what the first phase trained is the base of the second.
    manifest = ckptsurg.make_manifest(["**", "!classifier", "!resnet.encoder.stages.1"], first)
    model = load("resnet", first)
    trainer = trainer_of("resnet", out, FreezeCallback(manifest, expect_trained=True), model=model)
    before = bits(model)
    trainer.train()
    after = moved(before, bits(model))
    assert after and all(name.startswith(("classifier.", "resnet.encoder.stages.1.")) for name in after)
    assert not ckptsurg.verify(out, model).ok and ckptsurg.verify(manifest, model).ok
    with pytest.raises(ckptsurg.FreezeError, match="has other bits: not loaded, or from another file"):
        trainer_of("resnet", out, FreezeCallback(out), model=model)


def test_a_model_that_was_not_loaded_from_the_output(tmp_path):
    out = publish("bert", tmp_path)
    fresh = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=LABELS))
    with pytest.raises(ckptsurg.FreezeError, match=r"bert\.embeddings\.word_embeddings\.weight.* has other bits"):
        trainer_of("bert", out, FreezeCallback(out), model=fresh)
