"""Why frozen weights differ from what was published, told from files alone; and what cannot be told."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckptsurg
from ckptsurg.causes import CAUSES

from .drifting import (
    NOT_FC,
    OPTIMIZERS,
    Net,
    Words,
    all_are,
    by_name,
    language_steps,
    moved,
    offline,
    state,
    steps,
    tiny_llama,
    watched,
)

pytestmark = [
    # torch's older reparametrisations and its own quantisation: what is tested is that these are recognised.
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    # peft asks transformers for an attribute that has another name by now.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# --- What saving does -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float32, 64), (torch.float32, 256), (torch.bfloat16, 16)])
def test_an_adapter_that_was_merged_and_unmerged(tmp_path, dtype, alpha):
    model = tiny_llama().to(dtype)
    before = state(model)
    targets = ["q_proj", "v_proj", "up_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=alpha, target_modules=targets))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)
    language_steps(adapted, optimizer, 3)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    live = by_name(ckptsurg.verify(ckptsurg.make_manifest("**", before), adapted, baseline=before))
    after = state(adapted.unload())
    expected = all_are("merge_roundtrip", moved(before, after))
    assert all(name.split(".")[-2] in targets for name in expected)
    assert live == expected
    assert offline(tmp_path, before, after, "**") == expected


@pytest.mark.parametrize("alpha", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_was_merged_for_good_is_no_rounding(tmp_path, dtype, alpha):
    model = tiny_llama().to(dtype)
    before = state(model)
    lora = LoraConfig(r=8, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    after = state(get_peft_model(model, lora).merge_and_unload())
    assert offline(tmp_path, before, after, "**") == all_are(None, moved(before, after))


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [
        (torch.float32, 0.9),
        (torch.float32, 0.99),
        (torch.float32, 0.999),
        (torch.float32, 0.9999),
        (torch.bfloat16, 0.9),  # with larger ones nothing moves
    ],
)
@pytest.mark.parametrize("build", [Net, tiny_llama])
def test_a_moving_average_that_is_saved_in_place_of_the_model(tmp_path, build, dtype, decay):
    model = build().to(dtype)
    before = state(model)
    average = state(model)
    for _ in range(20):
        for name, tensor in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    assert offline(tmp_path, before, average, "**") == all_are("ema_rounding", moved(before, average))


def test_the_averages_of_torch_do_not_move_what_stands_still(tmp_path):
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    before = state(model)
    for _ in range(20):
        steps(model, optimizer, count=1)
        averaged.update_parameters(model)
    assert offline(tmp_path, before, state(averaged.module), NOT_FC) == {}


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [(torch.optim.SGD, 1e-9), (torch.optim.SGD, 1e-7), (torch.optim.Adam, 1e-9), (torch.optim.Adam, 1e-7)],
)
@pytest.mark.parametrize("count", [1, 10])
def test_training_with_a_tiny_rate_is_no_rounding(tmp_path, optimizer, rate, count):
    model = Net()
    before = state(model)
    steps(model, optimizer(model.parameters(), lr=rate), count=count)
    assert offline(tmp_path, before, state(model), NOT_FC) == all_are(None, moved(before, state(model), "body"))


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [
        (torch.bfloat16, 1e-6),
        (torch.bfloat16, 1e-5),
        (torch.bfloat16, 1e-4),
        (torch.float32, 1e-10),
        (torch.float32, 1e-9),
    ],
)
@pytest.mark.parametrize("count", [1, 5])
def test_training_of_few_values_is_no_rounding_of_sums(tmp_path, dtype, rate, count):
    """In bfloat16 an update moves small values, is lost in large ones, and leaves the ones of norms alone."""
    model = tiny_llama().to(dtype)
    before = state(model)
    language_steps(model, torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0), count)
    after = state(model)
    assert offline(tmp_path, before, after, "**") == all_are(None, moved(before, after))


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("build", [Net, Words])
@pytest.mark.parametrize("count", [1, 3])
def test_ordinary_training_has_no_cause_in_files(tmp_path, name, build, count):
    """Adam moves all ones of a norm by its rate: of equal values one ratio says nothing."""
    model = build()
    before = state(model)
    steps(model, OPTIMIZERS[name](model.parameters()), count=count)
    found = offline(tmp_path, before, state(model), ["**", "!fc" if build is Net else "!lm_head"])
    heads = {"fc.weight", "fc.bias", "lm_head.weight"}
    assert found == all_are(None, moved(before, state(model)) - heads)


def test_saved_in_a_narrower_dtype(tmp_path):
    before = state(Net())
    after = state(Net().to(torch.bfloat16)) | {name: tensor.bfloat16() for name, tensor in before.items()}
    body = [name for name in before if name.startswith("body")]
    assert offline(tmp_path, before, after, NOT_FC) == all_are("dtype_only", body)
    # Without the published values there is nothing to cast.
    assert offline(tmp_path, before, after, NOT_FC, baseline=False) == all_are(None, body)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_a_wider_dtype(tmp_path, dtype):
    before = state(Net().to(dtype))
    after = {name: tensor.float() for name, tensor in before.items()}
    body = [name for name in before if name.startswith("body")]
    for baseline in (True, False):
        assert offline(tmp_path, before, after, NOT_FC, baseline=baseline) == all_are("dtype_only", body)


def test_a_wider_dtype_with_other_values_is_more_than_a_dtype(tmp_path):
    before = state(Net().bfloat16())
    after = {name: tensor.float() for name, tensor in before.items()}
    after["body.0.weight"][0, 0] += 1e-6
    found = offline(tmp_path, before, after, NOT_FC)
    assert found == all_are("dtype_only", [name for name in before if name.startswith("body")]) | {
        "body.0.weight": None
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_roundtrip_through_a_narrower_dtype(tmp_path, dtype):
    model = Net()
    model.requires_grad_(False)
    before = state(model)
    found = watched(model, NOT_FC, lambda: model.to(dtype).float())
    assert found == all_are("dtype_only", moved(before, state(model), "body"))
    assert "body.1.weight" not in found  # ones are ones
    assert offline(tmp_path, before, state(model), NOT_FC) == found


def test_zeros_that_change_their_sign(tmp_path):
    model = Net()
    model.requires_grad_(False)
    model.body[0].weight[:3] = -0.0
    before = state(model)
    found = watched(model, NOT_FC, lambda: [p.data.add_(0.0) for p in model.parameters()])
    assert found == {"body.0.weight": "sign_of_zero"}
    assert offline(tmp_path, before, state(model), NOT_FC) == found
    assert offline(tmp_path, before, state(model), NOT_FC, baseline=False) == {"body.0.weight": None}


def test_nans_that_change_their_bits(tmp_path):
    model = Net()
    model.requires_grad_(False)
    model.body[0].bias.data.view(torch.int32)[2] = 0x7F800001  # a signalling NaN: arithmetic makes it a quiet one
    before = state(model)
    found = watched(model, NOT_FC, lambda: [p.data.add_(0.0) for p in model.parameters()])
    assert found == {"body.0.bias": "nan_payload"}
    assert offline(tmp_path, before, state(model), NOT_FC) == found


def test_frozen_weights_that_were_left_out_of_the_file(tmp_path):
    model = Net()
    before = state(model)
    model.body.requires_grad_(False)
    steps(model, torch.optim.SGD(model.fc.parameters(), lr=0.1))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    body = [name for name in before if name.startswith("body")]
    for baseline in (True, False):
        assert offline(tmp_path, before, trained, NOT_FC, baseline=baseline) == all_are("not_saved", body)
        some = trained | {name: before[name] for name in body[:4]}
        assert offline(tmp_path, before, some, NOT_FC, baseline=baseline) == all_are("not_saved", body[4:])


def test_a_file_of_another_model_omits_nothing(tmp_path):
    before = state(Net())
    other = {f"encoder.{name}.kernel": tensor for name, tensor in before.items()}
    assert offline(tmp_path, before, other, NOT_FC) == all_are(None, [n for n in before if n.startswith("body")])


# --- What evidence does not settle ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-8),
        (torch.float32, 1e-7),
        (torch.float32, 1e-2),
        (torch.float32, 10),
        (torch.bfloat16, 1e-4),
        (torch.bfloat16, 1e-3),
        (torch.bfloat16, 10),
    ],
)
def test_noise_on_one_weight_has_no_cause(tmp_path, dtype, size):
    model = Net().to(dtype)
    model.requires_grad_(False)
    before = state(model)

    def disturb() -> None:
        weight = model.body[2].weight
        weight.add_(size * torch.randn(weight.shape).to(dtype))

    found = watched(model, NOT_FC, disturb)
    assert found == all_are(None, moved(before, state(model)))
    assert found.keys() == {"body.2.weight"}
    assert offline(tmp_path, before, state(model), NOT_FC) == found


@pytest.mark.parametrize("element", [0, -1])
def test_one_element_in_one_weight_has_no_cause(tmp_path, element):
    before = state(Net())
    for bit in range(32):
        after = state(before)
        after["body.2.weight"].view(torch.int32).view(-1)[element] ^= -(2**31) if bit == 31 else 2**bit
        assert offline(tmp_path, before, after, NOT_FC) == {"body.2.weight": None}, bit


def test_swapped_rows_have_no_cause(tmp_path):
    before = state(Net())
    after = state(before)
    after["body.0.weight"] = before["body.0.weight"].flip(0).contiguous()
    assert offline(tmp_path, before, after, NOT_FC) == {"body.0.weight": None}


def _decayed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 0.9


def _noisy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1e-2 * torch.randn_like(tensor)


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def _unsigned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor == 0, 0.0, tensor)


@pytest.mark.parametrize(
    "mechanisms",
    # Decay with a cast before or after it is decay: whether there was a cast besides cannot be told.
    [(_decayed, _noisy), (_cast, _noisy), (_noisy, _cast), (_unsigned, _noisy)],
)
def test_two_mechanisms_on_one_tensor_have_no_one_cause(tmp_path, mechanisms):
    before = state(Net())
    before["body.2.weight"][0] = -0.0
    after = state(before)
    for mechanism in mechanisms:
        after["body.2.weight"] = mechanism(after["body.2.weight"])
    assert offline(tmp_path, before, after, NOT_FC) == {"body.2.weight": None}


@pytest.mark.parametrize("build", [Net, lambda: Net(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), 6)])
def test_another_checkpoint_altogether_has_no_cause(tmp_path, build):
    before = state(build())
    torch.manual_seed(1)
    other = build()
    steps(other, torch.optim.AdamW(other.parameters(), lr=0.01), count=10)
    after = state(other)
    for baseline in (True, False):
        found = offline(tmp_path, before, after, NOT_FC, baseline=baseline)
        assert found == all_are(None, moved(before, after, "body"))


def test_each_tensor_has_its_own_cause(tmp_path):
    model = nn.ModuleDict(
        {"cast": nn.Linear(8, 8), "decayed": nn.Linear(8, 8), "noisy": nn.Linear(8, 8), "gone": nn.Linear(8, 8),
         "zeros": nn.Linear(8, 8), "bn": nn.BatchNorm1d(8), "still": nn.Linear(8, 8), "fc": nn.Linear(8, 8)}
    )  # fmt: skip
    model["zeros"].weight.data.fill_(-0.0)
    before = state(model)
    model["bn"](torch.randn(4, 8))
    after = state(model)
    for leaf in ("weight", "bias"):
        after[f"cast.{leaf}"] = _cast(after[f"cast.{leaf}"])
        after[f"decayed.{leaf}"] = _decayed(after[f"decayed.{leaf}"])
        after[f"noisy.{leaf}"] = _noisy(after[f"noisy.{leaf}"])
        del after[f"gone.{leaf}"]
    after["zeros.weight"] += 0.0
    assert offline(tmp_path, before, after, NOT_FC) == {
        "cast.weight": "dtype_only",
        "cast.bias": "dtype_only",
        "decayed.weight": "weight_decay",
        "decayed.bias": "weight_decay",
        "noisy.weight": None,
        "noisy.bias": None,
        "gone.weight": "not_saved",
        "gone.bias": "not_saved",
        "zeros.weight": "sign_of_zero",
        "bn.running_mean": "batchnorm_stats",
        "bn.running_var": "batchnorm_stats",
        "bn.num_batches_tracked": "batchnorm_stats",
    }


# --- The command ------------------------------------------------------------------------------------


def test_the_command_prints_causes_under_the_table_and_has_the_codes_in_json(tmp_path):
    before = state(Net())
    after = state(before)
    after["body.0.weight"] = _decayed(after["body.0.weight"])
    after["body.2.bias"] = _cast(after["body.2.bias"])
    after["body.2.weight"] = _noisy(after["body.2.weight"])
    expected = {"body.0.weight": "weight_decay", "body.2.bias": "dtype_only", "body.2.weight": None}
    assert offline(tmp_path, before, after, NOT_FC) == expected

    def run(*options: str) -> str:
        arguments = ["verify", "published.freeze.json", "trained.safetensors", "--baseline", "published.safetensors"]
        command = [sys.executable, "-m", "ckptsurg", *arguments, *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        return done.stdout

    lines = run().splitlines()
    table = {row[0]: row for row in map(str.split, lines) if row and row[0] in expected}
    assert {name: [word for word in row if word in CAUSES] for name, row in table.items()} == {
        "body.0.weight": ["weight_decay"],
        "body.2.bias": ["dtype_only"],
        "body.2.weight": [],
    }
    explained = [line for line in lines if line.split(":")[0] in CAUSES]
    assert explained == [
        f"{code}: {CAUSES[code].explanation}; {CAUSES[code].remedy}" for code in ("dtype_only", "weight_decay")
    ]
    assert max(map(lines.index, explained)) > max(
        i for i, line in enumerate(lines) if line.split()[:1] and line.split()[0] in expected
    )
    document = json.loads(run("--json"))
    assert {one["name"]: one["cause"] for one in document["drifted"]} == expected
