"""What is planned of a checkpoint of 689 GB, and how its rewrite is dealt out: true headers, and no weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

import ckptsurg
from ckptsurg.checkpoints import Extent
from ckptsurg.dealing import deal
from ckptsurg.layout import OutputFile
from ckptsurg.plans import Plan

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
#: Bytes of the files of weights as they were published, headers included.
PUBLISHED = 688_586_727_753
BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
LAST_EXPERT = re.compile(r"model\.layers\.([0-9]+)\.mlp\.experts\.255\.(gate|up|down)_proj\.weight(_scale_inv)?")
GATE = re.compile(r"model\.layers\.([0-9]+)\.mlp\.gate\.(?:weight|e_score_correction_bias)")
WITH_EXPERTS = set(range(3, 62))  # the layer that predicts a further token among them

#: Dtype and shape by name, of each file by its name.
Read: TypeAlias = dict[str, dict[str, tuple[str, list[int]]]]
Layout: TypeAlias = tuple[Sequence[OutputFile], Mapping[str, Extent]]


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import scale

        yield scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scale: ModuleType) -> Path:
    from measuring import deepseek

    folder = tmp_path_factory.mktemp("deepseek")
    deepseek.make(folder)
    (folder / "spec.yaml").write_text(scale.SPEC)
    return folder


@pytest.fixture(scope="module")
def by_the_library(folder: Path) -> Read:
    found: Read = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            found[path.name] = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    return found


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return ckptsurg.plan(folder / "spec.yaml", folder)


@pytest.fixture(scope="module")
def layout(folder: Path, plan: Plan, scale: ModuleType) -> Layout:
    with ckptsurg.open_checkpoint(folder) as base:
        return scale.laid_out(plan, base), dict(base.extents)


# --- The checkpoint -----------------------------------------------------------------------------------


def test_the_library_reads_every_shard_and_finds_what_the_index_says(folder: Path, by_the_library: Read) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name: shard for shard, tensors in by_the_library.items() for name in tensors} == index["weight_map"]
    tensors = [one for shard in by_the_library.values() for one in shard.values()]
    assert index["metadata"]["total_size"] == sum(BYTES[dtype] * prod(shape) for dtype, shape in tensors)
    assert (len(tensors), len(by_the_library)) == (91_991, 163)
    files = [path.stat() for path in folder.glob("*.safetensors")]
    assert sum(file.st_size for file in files) == pytest.approx(PUBLISHED, rel=1e-6)
    assert sum(512 * file.st_blocks for file in files) < 20_000_000


def test_its_tensors_are_those_of_the_model_that_transformers_builds_of_its_config(
    folder: Path, by_the_library: Read
) -> None:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: shape for shard in by_the_library.values() for name, (_, shape) in shard.items()}
    found: dict[str, list[int]] = {}
    experts: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for name, shape in shapes.items():
        if name.startswith("model.layers.61."):
            continue  # of which transformers knows nothing
        if name.endswith("_scale_inv"):
            assert shape == [-(-size // 128) for size in shapes[name.removesuffix("_scale_inv")]]
        elif match := re.fullmatch(r"(.*\.experts)\.([0-9]+)\.(\w+)\.weight", name):
            experts[f"{match[1]}.{match[3]}"][int(match[2])] = shape
        else:
            found[name] = shape
    # There the experts of a layer are one tensor, and gate_proj and up_proj are one.
    for module, stack in experts.items():
        assert sorted(stack) == list(range(256))
        [rows, columns] = stack.pop(0)
        assert all(shape == [rows, columns] for shape in stack.values())
        if not module.endswith("up_proj"):
            is_gate = module.endswith("gate_proj")
            name = module.replace("gate_proj", "gate_up_proj")
            found[name] = [256, 2 * rows if is_gate else rows, columns]
    assert found == wanted


# --- The plan -----------------------------------------------------------------------------------------


def test_one_expert_of_each_layer_goes_and_what_routes_to_the_others_stays(plan: Plan, by_the_library: Read) -> None:
    names = {name for shard in by_the_library.values() for name in shard}
    gone = {tensor.name for tensor in plan.tensors if tensor.action == "drop"}
    assert gone == {name for name in names if LAST_EXPERT.fullmatch(name)}
    assert len(gone) == 6 * len(WITH_EXPERTS)
    assert {int(found[1]) for name in gone if (found := LAST_EXPERT.fullmatch(name))} == WITH_EXPERTS
    gates = {tensor.name: tensor for tensor in plan.output if GATE.fullmatch(tensor.name)}
    assert len(gates) == 2 * len(WITH_EXPERTS)
    assert all(gate.shape[0] == 255 and gate.keep for gate in gates.values())
    assert {tensor.name for tensor in plan.output} == names - gone
    assert all(tensor.action == "copy" for tensor in plan.output if tensor.name not in gates)
    assert plan.counts["frozen"] == len(names - gone)
    assert plan.notes == ()


def test_where_config_json_still_counts_the_expert_the_plan_says_so_and_nothing_else(folder: Path) -> None:
    spec = {"version": 1, "drop": "model.layers.*.mlp.experts[-1]", "freeze": "**"}
    [note] = ckptsurg.plan(spec, folder).notes
    assert note == (
        "config.json says n_routed_experts 256, and model.layers.3.mlp.experts has 255 experts; "
        "config: {set: {n_routed_experts: 255}}"
    )


@pytest.mark.parametrize(
    ("dropped", "edits"),
    [
        (None, {}),
        ("model.layers[3]", {"num_nextn_predict_layers": 0}),
        ("model.layers[1]", {"num_hidden_layers": 2}),
        ("model.layers[2:]", {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}),
    ],
)
@pytest.mark.parametrize("inside", ["", "text_config."])
def test_layers_that_predict_further_tokens_are_counted_by_a_key_of_their_own(
    tmp_path: Path, dropped: str | None, edits: dict[str, int], inside: str
) -> None:
    save_file(
        {f"model.layers.{n}.weight": np.zeros((2, 2), np.float32) for n in range(4)}, tmp_path / "model.safetensors"
    )
    counts = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({inside.rstrip("."): counts} if inside else counts))
    spec: dict[str, Any] = {"version": 1, "freeze": "**"}
    if dropped:
        spec["drop"] = {"match": dropped, "renumber": True}
    notes = ckptsurg.plan(spec, tmp_path).notes
    said: dict[str, int] = {}
    for note in notes:
        said |= yaml.safe_load(note.split("config: ", 1)[1])["set"]
    assert said == {f"{inside}{key}": value for key, value in edits.items()}
    if edits:
        assert ckptsurg.plan({**spec, "config": {"set": said}}, tmp_path).notes == ()


_PEAK = """
import sys
from pathlib import Path

from ckptsurg.cli import main

try:
    main()
finally:
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(peak.split()[1], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect .", "91,991 tensors"),
        ("inspect . --json", '"model.layers.61.mlp.experts.255.up_proj.weight_scale_inv": {'),
        ("plan spec.yaml .", "output: 91,637 tensors"),
        ("plan spec.yaml . --json", '"frozen": 91637'),
    ],
)
def test_a_command_that_reads_headers_takes_less_than_600_mb(folder: Path, command: str, said: str) -> None:
    arguments = [sys.executable, "-c", _PEAK, *command.split()]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=True)
    assert said in done.stdout
    assert int(done.stderr.split()[-1]) * 1024 < 600_000_000


# --- The deal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 8, 64, 512])
def test_a_rewrite_is_dealt_out_evenly_and_every_byte_of_it_once(layout: Layout, ranks: int, scale: ModuleType) -> None:
    files, extents = layout
    dealt = deal(files, ranks, extents)
    assert len(dealt.shares) == ranks
    parts: dict[str, list[range]] = defaultdict(list)
    for share in dealt.shares:
        for name, part in share.items():
            assert part
            parts[name].append(part)
    for file in files:
        ordered = sorted(parts.pop(file.name), key=lambda part: part.start)
        begins, ends = [part.start for part in ordered], [part.stop for part in ordered]
        assert [*begins, file.size] == [0, *ends]
    assert not parts
    assert dealt.unevenness <= 1.05
    shares = [sum(map(len, share.values())) for share in dealt.shares]
    assert max(shares) * ranks / sum(shares) <= 1.05
    copied = {one.output_name for file in files for one in file.tensors if one.is_copied}
    assert scale.cut(files, dealt) <= copied
