"""A spec drafted from a checkpoint fits it, with each of its examples, and does what its comments say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ckptsurg
from ckptsurg.drafting import SCHEMA_NAME
from ckptsurg.drafts import draft_spec, name_of, place_for_draft

from .architectures import ConvModel, resnet18

_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
_TEXT = {**_SMALL, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _bert(**options: int) -> transformers.BertConfig:
    return transformers.BertConfig(**_TEXT, max_position_embeddings=32, **options)


def _llama(*, tied: bool) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, tie_word_embeddings=tied))


def _gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=4, n_head=2, **ends)
    )


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**_SMALL, image_size=32, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1])
    return transformers.ResNetForImageClassification(config)


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=3, num_heads=2)
    )


def _mixtral() -> nn.Module:
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, **sizes))


#: What makes a model, what is asked for, what the draft says besides "**", and examples that it has to have.
_MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], list[str], list[str]]] = {
    "resnet18": (
        resnet18,
        {"new_head": 7},
        ["!fc"],
        [
            '- "!layer4"',
            '- "!layer4[-1:]"',
            '- {match: "!**", where: {beside: running_mean}}',
            "keep: true",
            'drop: "**.num_batches_tracked"',
        ],
    ),
    "convnet": (ConvModel, {}, ["!fc"], ['- "!conv3"', '- "!**.bias"', "reinit:"]),
    "bert": (
        lambda: transformers.BertForSequenceClassification(_bert(num_labels=3)),
        {"new_head": 7},
        ["!classifier"],
        ['- "!bert.encoder.layer[-2:]"', "keep: true", 'drop: {match: "bert.encoder.layer[1:3]", renumber: true}'],
    ),
    "bert-body": (
        lambda: transformers.BertModel(_bert()),
        {},
        [],
        ['- "!encoder.layer[-2:]"', "add:", 'drop: {match: "encoder.layer[1:3]", renumber: true}'],
    ),
    "gpt2": (_gpt2, {}, [], ['- "!transformer.h[-2:]"', "add:", 'drop: {match: "transformer.h[1:3]", renumber: true}']),
    "llama": (
        lambda: _llama(tied=False),
        {},
        ["!lm_head"],
        ['- "!model.layers[-2:]"', "add:", 'drop: {match: "model.layers[1:3]", renumber: true}'],
    ),
    "llama-tied": (
        lambda: _llama(tied=True),
        {},
        [],
        ['- "!model.layers[-2:]"', 'drop: {match: "model.layers[1:3]", renumber: true}'],
    ),
    "vit": (_vit, {"new_head": 7}, ["!classifier"], ["keep: true"]),
    "resnet": (_resnet, {}, ["!classifier.1"], ["reinit:", '- "!**.bias"']),
    "t5": (_t5, {}, [], ['- "!decoder.block[-1:]"', '- "!encoder.block[-1:]"']),
    "mixtral": (
        _mixtral,
        {},
        ["!lm_head"],
        ['- "!model.layers[-2:]"', 'drop: {match: "model.layers[1:3]", renumber: true}'],
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """A checkpoint of each model, as its own library saves it."""
    folder = tmp_path_factory.mktemp("models")

    def save(name: str) -> Path:
        model = _MODELS[name][0]
        if isinstance(model, type) or model is resnet18:
            path = folder / f"{name}.safetensors"
            if not path.exists():
                save_file(model().state_dict(), path)
            return path
        if not (folder / name).exists():
            model().save_pretrained(folder / name)
        return folder / name

    return save


def _examples(draft: str) -> Iterator[tuple[str, str]]:
    """Each example's first line, and the draft with that example a part of it: by the rule that the draft states."""
    lines = draft.splitlines()
    is_example = [re.match(r" *#(?! \S)", line) is not None for line in lines]
    position = 0
    while position < len(lines):
        end = position + 1
        if is_example[position]:
            # At the margin several lines are one example; in a list or mapping each is one.
            while lines[position].startswith("#") and end < len(lines) and is_example[end]:
                end += 1
            taken = [line.replace("#", "", 1) for line in lines[position:end]]
            yield taken[0].partition("  # ")[0].strip(), "\n".join([*lines[:position], *taken, *lines[end:]])
        position = end


@pytest.mark.parametrize("name", _MODELS)
def test_a_draft_and_the_draft_with_each_example_are_specs_that_fit(name, saved, tmp_path):
    _, options, patterns, examples = _MODELS[name]
    draft = draft_spec(saved(name), **options)
    written = dict(_examples(draft))
    assert [line for line in examples if line not in written] == []
    publish = place_for_draft(tmp_path / "spec.yaml")
    publish(draft)
    first = draft.splitlines()[0]
    schema = json.loads((tmp_path / first.removeprefix("# yaml-language-server: $schema=")).read_text())
    plans = []
    for text in (draft, *written.values()):
        (tmp_path / "one.yaml").write_text(text)
        plans.append(ckptsurg.plan(tmp_path / "one.yaml", saved(name)))
        # As JSON spells it, which is how editors look at YAML.
        jsonschema.validate(json.loads(json.dumps(yaml.safe_load(text))), schema)
    assert yaml.safe_load(draft)["freeze"] == ["**", *patterns]
    assert len({plan.to_json() for plan in plans}) == len(plans), "an example changes nothing"
    outputs = {tensor.shape[0] for tensor in plans[0].tensors if tensor.action == "reinit"}
    assert outputs == ({7} if options else set())
    assert max(map(len, draft.splitlines())) <= 120


def test_check_jsonschema_takes_a_draft_with_the_schema_beside_it(saved, tmp_path):
    place_for_draft(tmp_path / "spec.yaml")(draft_spec(saved("bert"), new_head=7))
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", SCHEMA_NAME, "spec.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_head_is_one_that_transformers_loads(saved, tmp_path):
    (tmp_path / "spec.yaml").write_text(draft_spec(saved("bert"), new_head=7))
    ckptsurg.rewrite(tmp_path / "spec.yaml", saved("bert"), tmp_path / "out")
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.num_labels == 7 and model.classifier.out_features == 7


def test_the_example_that_drops_blocks_is_one_that_transformers_loads(saved, tmp_path):
    pruned = dict(_examples(draft_spec(saved("llama"))))['drop: {match: "model.layers[1:3]", renumber: true}']
    (tmp_path / "spec.yaml").write_text(pruned)
    assert ckptsurg.plan(tmp_path / "spec.yaml", saved("llama")).notes == ()
    ckptsurg.rewrite(tmp_path / "spec.yaml", saved("llama"), tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert len(model.model.layers) == 2


def test_the_example_that_drops_blocks_trims_the_lists_of_config_too(saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": ["a", "b", "c", "d"]}))
    draft = draft_spec(tmp_path / "base")
    pruned = yaml.safe_load(dict(_examples(draft))['drop: {match: "model.layers[1:3]", renumber: true}'])
    assert pruned["config"] == {"set": {"num_hidden_layers": 2, "layer_types": ["a", "d"]}}
    # Another example has a `config` too: the draft says that both have one.
    assert len(re.findall("^#config:$", draft, re.M)) == 2
    assert "`config` is written once, with the keys of both:" in " ".join(draft.replace("# ", "").split())
    told = " ".join(draft_spec(saved("bert"), new_head=7).replace("# ", "").split())
    assert "With it, set num_hidden_layers: 2 under `config`:" in told and "written once" not in told


def test_what_was_named_is_remarked_and_no_example_takes_it_in(saved):
    draft = draft_spec(saved("llama"), freeze_all_but="model.layers[-1:]")
    assert '  - "!model.layers[-1:]"  # but for what you named, 9 tensors\n' in draft
    assert "model.layers[-2:]" not in draft
    assert '#- "!model.layers[-2:]"' in draft_spec(saved("llama"), freeze_all_but="model.norm")
    draft = draft_spec(saved("bert"))
    remark = "but for the head, 2 tensors: its name says so, and no later layer uses its outputs"
    assert f'  - "!classifier"  # {remark}\n' in draft


# --- What is told from names and shapes -------------------------------------------------------------


def _freeze(tensors: dict[str, tuple[int, ...]], **options: object) -> list[str]:
    state = {name: torch.zeros(shape) for name, shape in tensors.items()}
    return yaml.safe_load(draft_spec(state, **options))["freeze"]


_BODY = {"conv1.weight": (8, 3, 3, 3), "norm.weight": (8,), "norm.bias": (8,)}


@pytest.mark.parametrize(
    ("tensors", "head"),
    [
        ({"classifier.0.weight": (6, 8), "classifier.0.bias": (6,), "classifier.3.weight": (5, 6)}, "classifier.3"),
        ({"0.weight": (6, 8), "0.bias": (6,), "2.weight": (5, 6), "2.bias": (5,)}, "2"),
        ({"net.final.weight": (5, 8), "net.final.bias": (5,)}, "net.final"),
        ({"decode_head.classifier.weight": (5, 8, 1, 1)}, "decode_head.classifier"),
        ({"dense_1/kernel": (8, 5), "dense_1/bias": (5,)}, "dense_1"),
        ({"fc.weight": (8, 8)}, "fc"),  # as many outputs as others take: by its name
        ({"logits.weight": (5, 8), "embed.weight": (7, 8), "pooler.weight": (8, 8), "pooler.bias": (8,)}, "logits"),
    ],
)
def test_a_head_is_told_from_names_and_shapes(tensors, head):
    assert _freeze({**_BODY, **tensors}) == ["**", f"!{head}"]


def test_a_head_that_cannot_be_told_is_not_guessed():
    twins = {name: torch.zeros(5, 8) for name in ("head.weight", "head_dist.weight")}
    draft = draft_spec(twins)
    assert yaml.safe_load(draft)["freeze"] == ["**"]
    assert "# Which layer is the head cannot be told; it may be one of: head, head_dist." in draft
    with pytest.raises(ckptsurg.UsageError, match="which layer is the head cannot be told") as caught:
        draft_spec(twins, new_head=3)
    assert caught.value.hint == "--head PATTERN names it; it may be one of: head, head_dist"
    assert _freeze(dict.fromkeys(twins, (5, 8)), new_head=3, head="head_dist") == ["**", "!head_dist"]
    with pytest.raises(ckptsurg.SpecError, match='"haed" matches nothing; nearest: head'):
        draft_spec(twins, head="haed")


def test_a_head_that_was_named_is_a_layer_that_can_be_one():
    tensors = {"classifier.dense.weight": torch.zeros(8, 8), "classifier.out.weight": torch.zeros(5, 8)}
    tensors["norm.weight"] = torch.zeros(8)
    sizes = r"classifier.dense \(8\), classifier.out \(5\)"
    with pytest.raises(ckptsurg.UsageError, match=f"layers with other numbers of outputs each: {sizes}"):
        draft_spec(tensors, head="classifier", new_head=3)
    with pytest.raises(ckptsurg.UsageError, match=r'"norm" selects norm\.weight, which no layer like Linear has'):
        draft_spec(tensors, head="norm")
    with pytest.raises(ckptsurg.UsageError, match="a number of outputs from 1, found 0"):
        draft_spec(tensors, new_head=0)


def test_a_head_that_predicts_tokens_is_no_classifier(saved):
    with pytest.raises(ckptsurg.UsageError, match="lm_head has an output for each token, and is no classifier"):
        draft_spec(saved("llama"), new_head=3)


def test_a_classifier_of_two_classes_is_not_taken_for_the_table_of_two_segments(tmp_path):
    transformers.BertForSequenceClassification(_bert(num_labels=2)).save_pretrained(tmp_path)
    spec = yaml.safe_load(draft_spec(tmp_path, new_head=3))
    assert spec["freeze"] == ["**", "!classifier"] and spec["config"]["set"] == {"num_labels": 3}


def test_a_lone_weight_of_an_embedding_is_no_head():
    assert _freeze({"lookup.weight": (50, 8), "norm.weight": (8,)}) == ["**"]


def test_a_head_of_keras_is_drawn_as_keras_draws_it():
    tensors = {"conv/kernel": torch.zeros(3, 3, 3, 8), "predictions/kernel": torch.zeros(8, 5)}
    tensors["predictions/bias"] = torch.zeros(5)
    spec = yaml.safe_load(draft_spec(tensors, new_head=2))
    assert spec["reinit"] == [
        {"match": "predictions/kernel", "shape": {1: 2}, "init": "xavier_uniform"},
        {"match": "predictions/bias", "shape": {0: 2}, "init": "zeros"},
    ]


def test_a_body_of_keras_gets_a_head_as_keras_calls_it():
    tensors = {"conv/kernel": torch.zeros(3, 3, 3, 8), "norm/gamma": torch.zeros(8), "norm/beta": torch.zeros(8)}
    spec = yaml.safe_load(dict(_examples(draft_spec(tensors)))["add:"])
    assert [(one["name"], one["shape"]) for one in spec["add"]] == [
        ("classifier/kernel", [8, 10]),
        ("classifier/bias", [10]),
    ]


def test_what_trains_is_what_was_named_and_the_new_head(saved):
    path = saved("resnet18")
    assert yaml.safe_load(draft_spec(path, freeze_all_but="layer4"))["freeze"] == ["**", "!layer4"]
    both = yaml.safe_load(draft_spec(path, freeze_all_but=["layer4", "layer4.1"], new_head=3))
    assert both["freeze"] == ["**", "!layer4", "!fc"]  # what adds nothing is no item
    with pytest.raises(ckptsurg.UsageError, match='"!fc": give what trains, without !'):
        draft_spec(path, freeze_all_but=["!fc"])


def test_names_that_mean_something_to_yaml_or_patterns_stay_names(tmp_path):
    names = [
        "!fc.weight",
        "a*b.weight",
        "{x}.weight",
        "re:.weight",
        'q"\\.weight',
        "line\n#- x.weight",
        "é\u2028.weight",
    ]
    for name in names:
        head = {name: torch.zeros(5, 8), name.replace("weight", "bias"): torch.zeros(5)}
        draft = draft_spec({**head, "body.weight": torch.zeros(8, 8)}, name=name, freeze_all_but=["body"], new_head=3)
        (tmp_path / "spec.yaml").write_text(draft, encoding="utf-8")
        save_file({**head, "body.weight": torch.zeros(8, 8)}, tmp_path / "base.safetensors")
        plan = ckptsurg.plan(tmp_path / "spec.yaml", tmp_path / "base.safetensors")
        assert {tensor.name for tensor in plan.tensors if tensor.action == "reinit"} == set(head)


def test_a_draft_is_called_after_its_checkpoint():
    names = {
        "a/resnet18.safetensors": "resnet18",
        "a/llama": "llama",
        "a/llama/model.safetensors.index.json": "llama",
        "a/x.weights.h5": "x",
        "hub/models--google--vit-base/snapshots/0123abcd": "vit-base",
    }
    assert {path: name_of(Path(path)) for path in names} == names


# --- The command ------------------------------------------------------------------------------------


def _run(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptsurg", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def place(tmp_path) -> Path:
    save_file({"conv.weight": torch.zeros(8, 3), "fc.weight": torch.zeros(5, 8)}, tmp_path / "base.safetensors")
    return tmp_path


def test_init_writes_a_spec_and_its_schema_and_says_what_comes_next(place):
    done = _run(place, "init", "base.safetensors", "--new-head", "3", "-o", "specs/one.yaml")
    assert done.stdout.splitlines() == [
        "spec         specs/one.yaml",
        f"schema       specs/{SCHEMA_NAME}",
        "next         ckptsurg plan specs/one.yaml base.safetensors",
    ]
    written = json.loads((place / "specs" / SCHEMA_NAME).read_text())
    assert written == json.loads(_run(place, "schema", "spec").stdout)
    assert (place / "specs" / "one.yaml").read_text() == _run(place, "init", "base.safetensors", "--new-head", 3).stdout
    assert sorted(path.name for path in (place / "specs").iterdir()) == [SCHEMA_NAME, "one.yaml"]
    _run(place, *done.stdout.splitlines()[2].split()[2:])


def test_init_prints_json_for_programs(place):
    spec = json.loads(_run(place, "init", "base.safetensors", "--new-head", 3, "--name", "x", "--json").stdout)
    assert spec["name"] == "x-3-outputs" and spec["reinit"][0]["shape"] == {"0": 3}
    (place / "spec.json").write_text(json.dumps(spec))
    _run(place, "plan", "spec.json", "base.safetensors")


def test_init_replaces_nothing_but_an_earlier_spec_and_only_when_told(place):
    _run(place, "init", "base.safetensors", "-o", "one.yaml")
    before = (place / "one.yaml").read_bytes()
    error = _run(place, "init", "base.safetensors", "--new-head", 3, "-o", "one.yaml", code=2).stderr
    assert error == "error: one.yaml: exists already\nhint: --overwrite (overwrite=True) replaces an earlier spec\n"
    assert (place / "one.yaml").read_bytes() == before
    _run(place, "init", "base.safetensors", "--new-head", 3, "-o", "one.yaml", "--overwrite")
    assert b"reinit:" in (place / "one.yaml").read_bytes()
    weights = (place / "base.safetensors").read_bytes()
    (place / "compose.yaml").write_text('version: "3"\nservices: {}\n')
    for name in ("base.safetensors", "compose.yaml"):
        error = _run(place, "init", "base.safetensors", "-o", name, "--overwrite", code=2).stderr
        assert error == f"error: {name}: is no spec and is not replaced; choose another place\n"
    assert (place / "base.safetensors").read_bytes() == weights
    error = _run(place, "init", "base.safetensors", "-o", "one.json", code=2).stderr
    assert error == "error: one.json: a draft is YAML, for its comments; end the name in .yaml\n"


def test_somebody_elses_schema_is_not_replaced(place):
    (place / SCHEMA_NAME).write_text('{"$id": "https://example.com/other"}')
    error = _run(place, "init", "base.safetensors", "-o", "one.yaml", code=2).stderr
    assert error.splitlines() == [
        f"error: {SCHEMA_NAME}: is no schema of ckptsurg and is not replaced",
        "hint: --schema names another, and writes none",
    ]
    assert not (place / "one.yaml").exists()
    _run(place, "init", "base.safetensors", "-o", "one.yaml", "--schema", "../spec.json")
    assert (place / "one.yaml").read_text().startswith("# yaml-language-server: $schema=../spec.json\n")
    assert (place / SCHEMA_NAME).read_text() == '{"$id": "https://example.com/other"}'
    (place / SCHEMA_NAME).write_text('{"$id": "urn:ckptsurg:spec:1", "of": "an earlier version"}')
    _run(place, "init", "base.safetensors", "-o", "two.yaml")
    assert "an earlier version" not in (place / SCHEMA_NAME).read_text()
