"""Messages, word by word: where, what, and what is nearest or next."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

import ckptsurg


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tensors = {"conv1.weight": torch.zeros(4, 1, 3, 3), "fc.weight": torch.zeros(5, 4), "fc.bias": torch.zeros(5)}
    tensors |= {f"layer{n}.{i}.conv.weight": torch.zeros(4, 4, 3, 3) for n in (1, 2, 3, 4) for i in (0, 1)}
    tensors |= {f"layer{n}.{i}.bn.bias": torch.zeros(4) for n in (1, 2, 3, 4) for i in (0, 1)}
    tensors |= {f"decoder.layers.{i}.weight": torch.zeros(4, 4) for i in range(6)}
    tensors |= {"embed_tokens.weight": torch.zeros(8, 4), "step": torch.tensor(1)}
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(tensors, path)
    return path


TYPOS = {
    "a key": (
        'version: 1\nfreez: ["**"]\n',
        'spec.yaml:2: freez: unknown key "freez"; nearest: freeze, rename',
    ),
    "a key inside a rule": (
        "version: 1\nreinit:\n  - match: fc\n    inti: zeros\n",
        'spec.yaml:4: reinit[0].inti: unknown key "inti"; nearest: init',
    ),
    "an initializer": (
        "version: 1\nreinit:\n  - match: fc\n    init: kaming_normal\n",
        'spec.yaml:4: reinit[0].init: unknown initializer "kaming_normal"; nearest: kaiming_normal, kaiming_uniform',
    ),
    "an argument": (
        "version: 1\nreinit:\n  - {match: fc, init: {normal: {sdt: 0.02}}}\n",
        'spec.yaml:3: reinit[0].init: normal: unknown argument "sdt"; nearest: std',
    ),
    "a module": (
        "version: 1\nreinit:\n  - {match: fc, init: {default: Linaer}}\n",
        'spec.yaml:3: reinit[0].init: default: unknown module "Linaer"; nearest: Linear, Bilinear',
    ),
    "a dtype": (
        "version: 1\nfreeze:\n  - {match: fc, where: {dtype: BF61}}\n",
        'spec.yaml:3: freeze[0].where.dtype: "BF61" is not known; nearest: BF16, F64',
    ),
    "a module's name": (
        'version: 1\nfreeze: ["**", "!fcc"]\n',
        'spec.yaml:2: freeze[1]: "!fcc" matches nothing; nearest: !fc',
    ),
    "a tensor's name": (
        "version: 1\ndrop: fc.wieght\n",
        'spec.yaml:2: drop: "fc.wieght" matches nothing; nearest: fc.weight',
    ),
    "a brace alternative": (
        'version: 1\nfreeze: "layer{3..5}"\n',
        'spec.yaml:2: freeze: "layer5" (of "layer{3..5}") matches nothing; nearest: layer4, layer3, layer2',
    ),
    "brackets for braces": (
        'version: 1\nfreeze: "layer[3:]"\n',
        'spec.yaml:2: freeze: "layer[3:]" matches nothing; nearest: layer{3..4}',
    ),
    "a single star": (
        'version: 1\nfreeze: "bn.bias"\n',
        'spec.yaml:2: freeze: "bn.bias" matches nothing; nearest: **.bn.bias',
    ),
    "a child that is not there": (
        'version: 1\nfreeze: ["**", "!layer4.2"]\n',
        'spec.yaml:2: freeze[1]: "!layer4.2" matches nothing; at that place there are: 0, 1',
    ),
    "a slice out of range": (
        'version: 1\nfreeze: "decoder.layers[4:8]"\n',
        'spec.yaml:2: freeze: "decoder.layers[4:8]": [4:8] is out of range: "decoder.layers" has children 0..5',
    ),
    "an unquoted exclamation mark": (
        "version: 1\nfreeze:\n  - !fc\n",
        'spec.yaml:3: !fc is read as a tag; quote patterns, type: - "!fc"',
    ),
    "an unquoted star": (
        "version: 1\nfreeze: [**, conv1]\n",
        "spec.yaml:2: not YAML: did not find expected alphabetic or numeric character; quote patterns, "
        'type: freeze: ["**", conv1]',
    ),
    "an unquoted slice": (
        "version: 1\nfreeze: [decoder.layers[-2:]]\n",
        "spec.yaml:2: not YAML: found unexpected ':'; quote patterns, type: freeze: [\"decoder.layers[-2:]\"]",
    ),
    "an expected count": (
        'version: 1\nfreeze: [{match: "**.bias", expect: 8}]\n',
        'spec.yaml:2: freeze[0].expect: "**.bias" selects 9 tensors, expected 8: '
        "fc.bias, layer1.0.bn.bias, layer1.1.bn.bias and 6 more",
    ),
    "a claim by two keys": (
        'version: 1\nfreeze: "**"\nreinit:\n  - {match: fc, init: zeros}\n',
        'spec.yaml:4: reinit[0]: freeze and reinit[0] both claim fc.bias, fc.weight; add "!fc" to freeze',
    ),
    "a claim by two rules": (
        "version: 1\nreinit:\n  - {match: fc.bias, init: zeros}\n  - {match: fc, init: ones}\n",
        "spec.yaml:4: reinit[1]: reinit[0] and reinit[1] both claim fc.bias; a tensor is drawn by one rule; "
        "make a pattern narrower",
    ),
    "a dimension": (
        "version: 1\nreinit:\n  - {match: fc, shape: {1: 3}, init: zeros}\n",
        "spec.yaml:3: reinit[0].shape.1: fc.bias is F32 [5]: it has no dimension 1",
    ),
    "an ambiguous default": (
        "version: 1\nreinit:\n  - {match: embed_tokens, init: default}\n",
        "spec.yaml:3: reinit[0].init: embed_tokens.weight F32 [8, 4]: `default` cannot tell a Linear from an "
        "Embedding; write init: {default: Linear} or init: {default: Embedding}",
    ),
    "nothing near": (
        "version: 1\ndrop: zzz\n",
        'spec.yaml:2: drop: "zzz" matches nothing; at that place there are: '
        "step, conv1, decoder, embed_tokens, fc, layer1, …",
    ),
    "an unquoted index": (
        "version: 1\nfreeze: [decoder.layers[1]]\n",
        "spec.yaml:2: not YAML: did not find expected ',' or ']'; quote patterns, "
        'type: freeze: ["decoder.layers[1]"]',
    ),
    "unquoted braces": (
        "version: 1\nfreeze: {q,v}_proj\n",
        'spec.yaml:2: not YAML: did not find expected key; quote patterns, type: freeze: "{q,v}_proj"',
    ),
    "a shape that is a number": (
        "version: 1\nreinit:\n  - {match: fc, shape: 10, init: zeros}\n",
        "spec.yaml:3: reinit[0].shape: expected new sizes, {0: 10} or a whole list, found 10",
    ),
    "a wide claim": (
        'version: 1\nfreeze: ["**"]\ntrain: [fc]\n',
        'spec.yaml:3: train[0]: freeze[0] and train[0] both claim fc.bias, fc.weight; add "!fc" to freeze',
    ),
    "a narrow claim": (
        "version: 1\nfreeze: [layer4.0.bn]\ntrain: [layer4]\n",
        "spec.yaml:3: train[0]: freeze[0] and train[0] both claim layer4.0.bn.bias; "
        'add "!layer4.0.bn" to train\n'
        "spec.yaml:3: train: in neither freeze nor train: step, conv1.weight, "
        "decoder.layers.0.weight and 20 more; with both keys every tensor is in one",
    ),
    "a key without a value": (
        "version: 1\nfreeze:\ndrop: fc\n",
        "spec.yaml:2: freeze: nothing follows; give it a value, or leave the key out",
    ),
    "a sibling": (
        'version: 1\nfreeze: [{match: "**", where: {beside: wieght}}]\n',
        'spec.yaml:2: freeze[0].match: "**" matches 27 tensors, but none where beside: wieght; nearest: weight',
    ),
    "an argument's value": (
        "version: 1\nreinit:\n  - {match: fc, init: {kaiming_normal: {nonlinearity: rellu}}}\n",
        'spec.yaml:3: reinit[0].init: kaiming_normal: nonlinearity: "rellu" is not known; nearest: relu, selu',
    ),
    "a size": (
        "version: 1\nreinit:\n  - {match: fc, shape: {0: -3}, init: zeros}\n",
        "spec.yaml:3: reinit[0].shape: a size is a whole number from 0, found -3",
    ),
    "a regular expression in double quotes": (
        'version: 1\nfreeze: "re:.*\\.w"\n',
        "spec.yaml:2: not YAML: found unknown escape character; "
        "a backslash stands for itself in single quotes: 're:.*'",
    ),
    "a tied head": (
        'version: 1\nfreeze: ["**", "!lm_head"]\n',
        'spec.yaml:2: freeze[1]: "!lm_head" matches nothing: the checkpoint has no such tensor; where a model ties '
        "its head to its embeddings, embed_tokens.weight stands for both",
    ),
    "what is dropped already": (
        "version: 1\ndrop: fc\nfreeze: fc.bias\n",
        'spec.yaml:3: freeze: "fc.bias" matches nothing that is left: `drop` takes what it matches (1 tensor)',
    ),
    "an integer to be drawn": (
        "version: 1\nreinit:\n  - {match: step, init: zeros}\n",
        "spec.yaml:3: reinit[0].init: step: I64 cannot be drawn; only F64, F32, C64, BF16, F16, F8_E5M2, "
        "F8_E5M2FNUZ, F8_E4M3, F8_E4M3FNUZ can",
    ),
    "a bias drawn as its weight is": (
        "version: 1\nreinit:\n  - {match: fc, init: xavier_uniform}\n",
        "spec.yaml:3: reinit[0].init: fc.bias: xavier_uniform draws tensors of 2 or more dimensions, this one has "
        "1: [5]; give it a rule of its own, or write `init: default`",
    ),
    "a bias that is drawn alone": (
        "version: 1\nreinit:\n  - {match: fc.bias, init: xavier_uniform}\n",
        "spec.yaml:3: reinit[0].init: fc.bias: xavier_uniform draws tensors of 2 or more dimensions, this one has "
        "1: [5]",
    ),
    "an added name that exists": (
        "version: 1\nadd:\n  - {name: fc.bias, shape: [2], dtype: F32, init: zeros}\n",
        'spec.yaml:3: add[0].name: "fc.bias" is a tensor that the base has; draw it anew under reinit, or drop it',
    ),
    "a number that is text": (
        "version: 1\nseed: 017\n",
        'spec.yaml:2: seed: expected a whole number, found the text "017"',
    ),
    "the version": ('freeze: "**"\n', "spec.yaml:1: version: missing; write `version: 1`"),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_typos_in_a_spec(base, tmp_path, monkeypatch, typo):
    text, message = TYPOS[typo]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan("spec.yaml", base)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_all_problems_are_reported_at_once(base, tmp_path):
    spec = {
        "version": 1,
        "freeze": ["**", "!nothing", "!step"],
        "reinit": [{"match": "fc", "init": "eye"}, {"match": "absent", "init": "zeros"}],
        "add": [{"name": "step", "shape": [], "dtype": "I8", "init": "zeros"}],
    }
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan(spec, base)
    assert [problem.path for problem in caught.value.problems] == [
        "freeze[1]",
        "reinit[1].match",
        "reinit[0]",
        "add[0].name",
        "reinit[0].init",
        "add[0].init",
    ]


def test_what_may_match_nothing(base):
    for item in (
        {"match": "absent", "optional": True},
        {"match": "decoder.layers[9]", "optional": True},
        {"match": "absent", "expect": 0},
        {"match": "!absent", "expect": 0},
    ):
        assert ckptsurg.plan({"version": 1, "freeze": ["fc", item]}, base).counts["frozen"] == 2
    with pytest.raises(ckptsurg.SpecError, match="selects 2 tensors, expected 0"):
        ckptsurg.plan({"version": 1, "freeze": [{"match": "fc", "expect": 0}]}, base)


def test_lines_of_a_json_spec(base, tmp_path):
    (tmp_path / "spec.json").write_text('{\n  "version": 1,\n\t"freeze": [\n    "**",\n    "!fcc"\n  ]\n}\n')
    with pytest.raises(ckptsurg.SpecError, match=r'spec\.json:5: freeze\[1\]: "!fcc" matches nothing; nearest: !fc'):
        ckptsurg.plan(tmp_path / "spec.json", base)


def test_notes_on_likely_slips(base):
    assert ckptsurg.plan({"version": 1, "freeze": "*.bias"}, base).notes == (
        'freeze: "*.bias" selects 1 tensor; "**.bias" would select 9',
    )
    assert ckptsurg.plan({"version": 1}, base).notes == ("nothing is frozen: there will be nothing to verify",)


def test_notes_on_shapes(base):
    whole = {"match": "fc", "shape": [10, 4], "init": "zeros"}
    assert "reinit[0]: fc.bias changes from 1 to 2 dimensions; {0: 10} sets one size and keeps the others" in (
        ckptsurg.plan({"version": 1, "reinit": [whole]}, base).notes
    )


def test_notes_on_a_config_that_stays(base, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(base.read_bytes())
    (tmp_path / "config.json").write_text('{"num_labels": 5, "id2label": {}}')
    spec = {"version": 1, "freeze": "conv1", "reinit": [{"match": "fc", "shape": {0: 3}, "init": "zeros"}]}
    note = "fc.bias, fc.weight: a new shape, and config.json stays as it is; see `config`"
    assert ckptsurg.plan(spec, tmp_path).notes == (note,)
    config = {"set": {"num_labelz": 3}, "unset": ["id2lable", "label2id"]}
    assert ckptsurg.plan(spec | {"config": config}, tmp_path).notes == (
        "config.unset: config.json has no id2lable, but id2label",
        "config.set: config.json has no num_labelz, but num_labels",
    )


def test_notes_on_half_frozen_norms(tmp_path):
    save_file(torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict(), tmp_path / "base.safetensors")
    plan = ckptsurg.plan({"version": 1, "freeze": "**.{weight,bias}"}, tmp_path / "base.safetensors")
    assert plan.notes == (
        "1 norm layer half frozen: statistics follow the data though their weights are frozen (0.running_mean)",
    )


def test_slips_of_form_do_not_hide_what_does_not_fit(base, tmp_path):
    spec = {
        "version": 1,
        "freez": "x",
        "drop": "absent",
        "freeze": ["**", {"match": "!fc", "expct": 2}, 7],
        "reinit": [
            {"match": "conv1", "init": "zeros"},
            {"match": "fc", "init": "nothing", "shape": {4: 1}},
            {"mach": "fc", "init": "zeros"},
        ],
        "add": [{"name": "step", "shape": [1], "dtype": "F32", "init": "zeros"}, {"name": "b", "shape": [1]}],
    }
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan(spec, base)
    assert {problem.path for problem in caught.value.problems} == {
        *("freez", "drop", "freeze[1].expct", "freeze[2]", "reinit[0]"),
        *("reinit[1].init", "reinit[1].shape.4", "reinit[2].mach", "add[0].name", "add[1]"),
    }


def test_regular_expressions_see_one_name_at_a_time(tmp_path):
    names = ["a.w", "a.b", "", "ab", "a\\b", "w", "x.w", "é.w"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    save_file({name: torch.zeros(1) for name in [*names, "two\nlines"]}, tmp_path / "b.safetensors")
    for expression in (
        r".*\.w",
        r"[^a]*",
        r"\Aa.*",
        r"a.*\z",
        r"(?i)A.*",
        r"(?:a|x)\.w",
        r"^w$",
        r"a|w",
        r"\W*|.*b",
        r".*\s.*",
    ):
        for base, given in (("a", names), ("b", [*names, "two\nlines"])):
            wanted = {name for name in given if re.fullmatch(expression.replace(r"\z", r"\Z"), name)}
            item = {"match": f"re:{expression}", "optional": True}
            plan = ckptsurg.plan({"version": 1, "freeze": [item]}, tmp_path / f"{base}.safetensors")
            assert {tensor.name for tensor in plan.tensors if tensor.frozen} == wanted, expression


def test_patterns_over_nothing_that_is_left(base):
    with pytest.raises(ckptsurg.SpecError, match="matches nothing that is left: `drop` takes what it matches"):
        ckptsurg.plan({"version": 1, "drop": "**", "freeze": "re:.*"}, base)
