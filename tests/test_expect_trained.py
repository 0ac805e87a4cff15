"""The other half of a proof: what should train did move."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurg


class Small(nn.Module):
    """A frozen body; a head, a norm and a counter that train or may."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.fc = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.body(x)))


TRAINABLE = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "fc.weight", "fc.bias"}


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def manifest(model):
    return ckptsurg.make_manifest("body", model)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    model.train()
    optimizer.zero_grad()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
    optimizer.step()


# --- Live models ------------------------------------------------------------------------------------


def test_what_trained_is_no_difference(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    with frozen.guard(optimizer, expect_trained=True):
        for seed in range(3):
            _step(model, optimizer, seed)
    report = frozen.verify(expect_trained=True)
    assert report.ok and report.untrained == ()
    assert ckptsurg.verify(manifest, model, expect_trained=True) == report


def test_nothing_is_asked_unless_it_is_said(model, manifest):
    report = ckptsurg.verify(manifest, model)
    assert report.ok and report.untrained is None and "untrained" not in report.to_json()
    assert ckptsurg.freeze(model, manifest).verify().untrained is None


def test_every_tensor_that_stood_still_is_named(model, manifest):
    report = ckptsurg.freeze(model, manifest).verify(expect_trained=True)
    assert not report.ok and report.drifted == () and report.verified == 2
    assert set(report.untrained) == TRAINABLE  # and not the counter of the norm, an integer
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"6 trainable tensors did not move:\n  fc\.bias") as caught:
        report.raise_if_changed()
    assert caught.value.exit_code == 1 and all(name in str(caught.value) for name in TRAINABLE)


def test_one_tensor_that_stood_still_is_enough(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    model.fc.bias.requires_grad_(False)
    _step(model, torch.optim.SGD(frozen.trainable_parameters(), lr=0.1))
    assert frozen.verify(expect_trained=True).untrained == ("fc.bias",)
    assert frozen.verify().ok


def test_one_bit_is_a_move(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    _step(model, torch.optim.SGD([model.fc.weight, *model.norm.parameters()], lr=0.1))
    model.fc.bias.data.view(torch.int32)[2] ^= 1
    assert frozen.verify(expect_trained=True).ok


def test_a_learning_rate_of_zero(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.0, weight_decay=0.1)
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match="4 trainable tensors did not move") as caught,
        frozen.guard(optimizer, expect_trained=True),
    ):
        for seed in range(3):
            _step(model, optimizer, seed)
    moving = {"norm.running_mean", "norm.running_var"}  # these follow the data and not the optimizer
    assert {name for name in TRAINABLE if name in str(caught.value)} == TRAINABLE - moving


def test_an_optimizer_that_was_given_the_wrong_parameters(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD([*model.body.parameters(), *model.norm.parameters()], lr=0.1)
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match="2 trainable tensors did not move") as caught,
        frozen.guard(optimizer, expect_trained=True),
    ):
        _step(model, optimizer)
    assert "fc.weight" in str(caught.value) and "fc.bias" in str(caught.value)


def test_an_optimizer_of_another_model(model, manifest):
    torch.manual_seed(0)
    other = Small()
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match="trainable tensors did not move"),
        frozen.guard(optimizer, expect_trained=True),
    ):
        _step(model, optimizer)


def test_a_guard_asks_only_if_it_is_told(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.SGD(frozen.trainable_parameters(), lr=0.0)
    with frozen.guard(optimizer):
        _step(model, optimizer)


def test_what_moved_though_it_is_frozen_is_said_first(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    model.body.weight.data += 1
    report = frozen.verify(expect_trained=True)
    assert not report.ok and [one.name for one in report.drifted] == ["body.weight"]
    assert set(report.untrained) == TRAINABLE
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"1 frozen tensor changed:\n  body\.weight") as caught:
        report.raise_if_changed()
    assert "did not move" in str(caught.value), "the other half is not lost"


def test_a_watch_asks_too(model):
    with (
        pytest.raises(ckptsurg.FrozenWeightsChanged, match="did not move"),
        ckptsurg.watch(model, ["body"], expect_trained=True) as watch,
    ):
        _step(model, torch.optim.SGD(model.fc.parameters(), lr=0.1))
    assert set(watch.report.untrained) == {"norm.weight", "norm.bias"}


def test_a_part_that_is_free_has_to_move(model):
    manifest = ckptsurg.make_manifest(["body", "norm", {"match": "fc", "rows": "[:2]"}], model)
    frozen = ckptsurg.freeze(model, manifest)
    assert set(frozen.verify(expect_trained=True).untrained) == {"fc.weight", "fc.bias"}
    optimizer = torch.optim.SGD([model.fc.weight], lr=0.1)
    _step(model, optimizer)
    assert frozen.verify(expect_trained=True).untrained == ("fc.bias",)
    model.fc.bias.data[2] += 1
    assert frozen.verify(expect_trained=True).ok


def test_the_same_values_in_a_wider_dtype_did_not_move():
    torch.manual_seed(0)
    model = Small().bfloat16()
    manifest = ckptsurg.make_manifest("body", model)
    frozen = ckptsurg.freeze(model.float(), manifest, allow_widened=True)
    assert set(frozen.verify(expect_trained=True).untrained) == TRAINABLE
    _step(model, torch.optim.SGD(frozen.trainable_parameters(), lr=1e-5))  # less than bfloat16 can hold
    assert frozen.verify(expect_trained=True).untrained == ()


# --- Files ------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path) -> Path:
    """An output with a trainable tied pair, an integer, an empty tensor, and rows."""
    torch.manual_seed(0)
    shared = torch.randn(5, 4)
    tensors = {
        "body.weight": torch.randn(4, 4),
        "embed.weight": shared,
        "lm_head.weight": shared.clone(),
        "steps": torch.tensor([3, 4]),
        "mask": torch.ones(4, dtype=torch.bool),
        "nothing": torch.zeros(0, 4),
        "words.weight": torch.randn(6, 2),
        "fc.weight": torch.randn(3, 4).bfloat16(),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    spec = {"version": 1, "freeze": ["body", {"match": "words", "rows": "[:4]"}]}
    ckptsurg.rewrite(spec, tmp_path / "base.safetensors", tmp_path / "out")
    return tmp_path


def _train(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("embed.weight", "lm_head.weight", "fc.weight"):
        tensors[name] += 1
    tensors["words.weight"][4:] += 1


def _verify(folder: Path, *changes, **options):
    tensors = load_file(folder / "out" / "model.safetensors")
    for change in changes:
        change(tensors)
    save_file(tensors, folder / "trained.safetensors")
    return ckptsurg.verify(folder / "out", folder / "trained.safetensors", expect_trained=True, **options)


def _original(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "out" / "model.safetensors")[name]


def test_a_file_that_was_trained(published):
    report = _verify(published, _train)
    assert report.ok and report.untrained == ()
    assert ckptsurg.verify(published / "out", load_file(published / "trained.safetensors"), expect_trained=True).ok


def test_a_file_that_was_not(published):
    report = _verify(published)
    assert not report.ok and report.drifted == ()
    assert report.untrained == ("embed.weight", "fc.weight", "lm_head.weight", "words.weight")


def test_integers_and_empty_tensors_need_not_move(published):
    def lose(tensors):
        del tensors["steps"], tensors["mask"], tensors["nothing"]

    assert _verify(published, _train).untrained == ()
    report = _verify(published, _train, lose)
    assert report.ok and report.untrained == () and set(report.missing_trainable) == {"steps", "mask", "nothing"}


def test_a_trainable_tensor_that_is_missing_did_not_move(published):
    report = _verify(published, _train, lambda t: t.pop("fc.weight"))
    assert not report.ok and report.untrained == ("fc.weight",) and report.missing_trainable == ("fc.weight",)


def test_of_a_tied_pair_one_is_enough(published):
    report = _verify(published, _train, lambda t: t.pop("lm_head.weight"))
    assert report.ok and report.untrained == () and report.missing_trainable == ("lm_head.weight",)
    report = _verify(published, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight" in report.untrained and "embed.weight" in report.untrained


def test_a_twin_that_is_there_has_to_move_by_itself(published):
    report = _verify(published, _train, lambda t: t.update({"lm_head.weight": _original(published, "lm_head.weight")}))
    assert report.untrained == ("lm_head.weight",)


def test_free_rows_of_a_file(published):
    original = _original(published, "words.weight")
    report = _verify(published, _train, lambda t: t.update({"words.weight": original}))
    assert report.drifted == () and report.untrained == ("words.weight",)
    one_more = torch.cat([original, torch.ones(1, 2)])  # what is appended was drawn, and trained or not: who knows
    report = _verify(published, _train, lambda t: t.update({"words.weight": one_more}))
    assert not report.ok and report.untrained == () and report.drifted == ()
    assert [one.name for one in report.mismatched_trainable] == ["words.weight"]
    assert ckptsurg.verify(published / "out", published / "trained.safetensors").ok


def test_names_and_prefixes_lead_to_trainable_tensors_too(published):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    assert _verify(published, _train, rename, prefix="model.").ok
    assert _verify(published, rename, prefix="model.").untrained == (
        "embed.weight",
        "fc.weight",
        "lm_head.weight",
        "words.weight",
    )


def test_a_trained_tensor_in_a_wider_dtype(published):
    def widen(tensors):
        tensors["fc.weight"] = tensors["fc.weight"].float()

    assert _verify(published, _train, widen).ok
    report = _verify(published, _train, lambda t: t.update({"fc.weight": _original(published, "fc.weight")}), widen)
    assert report.drifted == () and report.untrained == ("fc.weight",)


# --- Other shapes and dtypes ------------------------------------------------------------------------


def _of_other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"] = torch.ones(7, 4).bfloat16()


def _narrowed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed.weight"] = tensors["embed.weight"].bfloat16()


@pytest.mark.parametrize(
    ("change", "name", "verdict", "expected", "found"),
    [
        (_of_other_shape, "fc.weight", "shape", "BF16 [3, 4]", "BF16 [7, 4]"),
        (_narrowed, "embed.weight", "dtype", "F32 [5, 4]", "BF16 [5, 4]"),
        (lambda t: t.update(steps=t["steps"].float()), "steps", "dtype", "I64 [2]", "F32 [2]"),
    ],
    ids=["another-head", "cast", "counter"],
)
def test_what_is_not_as_published_did_not_train_from_it(published, change, name, verdict, expected, found):
    detail = {"expected": expected, "found": found}
    _verify(published, _train, change)
    for options, ok in (({}, True), ({"expect_trained": True}, False), ({"exact": True}, False)):
        report = ckptsurg.verify(published / "out", published / "trained.safetensors", **options)
        assert report.ok is ok and report.verified == 2 and not (report.drifted or report.untrained)
        told = [(one.name, one.verdict, one.detail) for one in report.mismatched_trainable]
        assert told == [(name, verdict, detail)]
        if not ok:
            head = rf"1 trainable tensor has another {verdict} than the manifest's:\n  {name} \(expected "
            with pytest.raises(ckptsurg.FrozenWeightsChanged, match=head):
                report.raise_if_changed()


def test_a_base_with_another_head_is_not_what_was_trained(published):
    """What freezing leaves out is in the base and in the output: digests alone do not tell the two apart."""
    base = load_file(published / "base.safetensors")
    spec = {"version": 1, "freeze": ["**", "!fc"], "reinit": [{"match": "fc", "shape": {0: 7}, "init": "zeros"}]}
    manifest = ckptsurg.rewrite(spec, published / "base.safetensors", published / "seven")
    report = ckptsurg.verify(manifest, published / "base.safetensors", root=manifest.root)
    assert report.ok and [one.name for one in report.mismatched_trainable] == ["fc.weight"]
    assert not ckptsurg.verify(manifest, base, expect_trained=True).ok
    assert not ckptsurg.verify(manifest, base, exact=True).ok
    grown = ckptsurg.rewrite(
        {
            "version": 1,
            "freeze": ["**", {"match": "embed", "rows": "[:5]"}],
            "reinit": [{"match": "embed", "shape": {0: 8}, "keep": True, "init": "zeros"}],
        },
        published / "base.safetensors",
        published / "grown",
    )
    report = ckptsurg.verify(grown, base, expect_trained=True)
    assert not report.ok and report.drifted == () and report.untrained == ()
    assert [one.name for one in report.mismatched_trainable] == ["embed.weight"]


def test_a_copy_of_the_same_values_in_another_dtype_did_not_train(published):
    report = _verify(published, _narrowed)
    assert not report.ok and [one.name for one in report.mismatched_trainable] == ["embed.weight"]
    assert report.untrained == ("fc.weight", "lm_head.weight", "words.weight")


def test_of_a_frozen_tensor_that_lost_rows_it_is_said_once(published):
    report = _verify(published, _train, lambda t: t.update({"words.weight": t["words.weight"][:3].clone()}))
    assert [(one.name, one.verdict) for one in report.drifted] == [("words.weight", "shape")]
    assert report.mismatched_trainable == () and report.untrained == ()
    report = _verify(published, _train, lambda t: t.pop("words.weight"))
    assert [(one.name, one.verdict) for one in report.drifted] == [("words.weight", "missing")]
    assert report.untrained == ()


def test_a_live_model_with_another_head_is_warned_of(model, manifest):
    frozen = ckptsurg.freeze(model, manifest)
    frozen.release()
    model.fc = nn.Linear(4, 7)
    said = (
        r"not as published, but trainable, .*: fc\.bias \(expected F32 \[3\], found F32 \[7\]\), "
        r"fc\.weight \(expected F32 \[3, 4\], found F32 \[7, 4\]\); where they were not resized on purpose"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        frozen = ckptsurg.freeze(model, manifest)
    assert [one.filename for one in caught] == [__file__]
    with pytest.warns(UserWarning, match=said) as caught, ckptsurg.watch(model, manifest=manifest):
        pass
    assert [one.filename for one in caught] == [__file__]
    assert frozen.verify().ok and not frozen.verify(expect_trained=True).ok


def test_the_command_line_says_what_is_not_as_published(published):
    _verify(published, _train, _of_other_shape)
    said = "1 trainable tensor has another shape than the manifest's"
    text = _run(published, code=0)
    assert text.startswith("ok     2 frozen tensors verified: every one has its bits (nothing pins the manifest)\n")
    assert f"\n{said}: fc.weight (expected BF16 [3, 4], found BF16 [7, 4])\nhint: train from the published " in text
    for option in ("--expect-trained", "--exact"):
        assert _run(published, option, code=1).startswith(f"FAILED {said}; 2 frozen tensors verified\n")
    document = json.loads(_run(published, "--json", code=0))
    from ckptsurg.schemas import schema

    jsonschema.validate(document, schema("report"))
    assert [one["name"] for one in document["mismatched_trainable"]] == ["fc.weight"]


# --- Command line -----------------------------------------------------------------------------------


def _run(folder: Path, *arguments: object, code: int) -> str:
    command = [sys.executable, "-m", "ckptsurg", "verify", "out", "trained.safetensors", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_command_line_says_what_did_not_move(published):
    _verify(published, _train, lambda t: t.pop("fc.weight"))
    text = _run(published, "--expect-trained", code=1)
    assert text.startswith("FAILED 1 trainable tensor is missing; 2 frozen tensors verified\n")
    assert "1 trainable tensor is missing: fc.weight\n" in text and "did not move" not in text
    assert "did not move" not in _run(published, code=0)
    _verify(published)
    text = _run(published, "--expect-trained", code=1)
    assert text.startswith("FAILED 4 trainable tensors did not move; 2 frozen tensors verified\n")
    assert "4 trainable tensors did not move: embed.weight, fc.weight, lm_head.weight, words.weight\n" in text
    assert "hint: build the optimizer of frozen.trainable_parameters(), and verify what it trained\n" in text
    _verify(published, _train)
    text = _run(published, "--expect-trained", code=0)
    assert text.startswith("ok     2 frozen tensors verified: every one has its bits; what trains has moved (")


def test_json_has_the_names_only_if_it_was_asked(published):
    from ckptsurg.schemas import schema

    _verify(published)
    asked = json.loads(_run(published, "--expect-trained", "--json", code=1))
    assert asked["ok"] is False and asked["drifted"] == []
    assert asked["untrained"] == ["embed.weight", "fc.weight", "lm_head.weight", "words.weight"]
    unasked = json.loads(_run(published, "--json", code=0))
    assert unasked["ok"] is True and "untrained" not in unasked
    _verify(published, _train)
    fine = json.loads(_run(published, "--expect-trained", "--json", code=0))
    assert fine["untrained"] == []
    for document in (asked, unasked, fine):
        jsonschema.validate(document, schema("report"))


def test_both_halves_at_the_command_line(published):
    _verify(published, lambda t: t["body.weight"].add_(1))
    text = _run(published, "--expect-trained", "--baseline", "out", code=1)
    assert "1 frozen tensor drifted" in text and "body.weight  changed" in text
    assert "4 trainable tensors did not move: " in text
