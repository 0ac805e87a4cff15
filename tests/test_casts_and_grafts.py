"""Tensors in another dtype, and tensors of another checkpoint; and weights that mean nothing without their scales."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckptsurg
from ckptsurg.casting import cast

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
WORDS = {"F16": "<u2", "BF16": "<u2", "F32": "<u4", "F64": "<u8"}


def of_torch(raw: bytes, old: str, new: str) -> np.ndarray:
    cast_by_torch = torch.frombuffer(bytearray(raw), dtype=DTYPES[old]).to(DTYPES[new])
    words = np.frombuffer(cast_by_torch.view(torch.uint8).numpy().tobytes(), WORDS[new]).copy()
    words[cast_by_torch.isnan().numpy()] = 0  # which one a NaN becomes, processors differ in
    return words


def of_ours(raw: bytes, old: str, new: str) -> np.ndarray:
    found = cast(raw, old, new)
    words = np.frombuffer(found, WORDS[new]).copy()
    words[torch.frombuffer(bytearray(found), dtype=DTYPES[new]).isnan().numpy()] = 0
    return words


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(DTYPES, 2)))
def test_values_are_rounded_as_torch_rounds_them(old: str, new: str) -> None:
    """Every value of 16 bits; of wider ones those half-way between two, and values of every size."""
    if WORDS[old] == "<u2":
        raw = np.arange(65536, dtype="<u2").tobytes()
    else:
        generator = np.random.default_rng(0)
        halves = (np.arange(65536, dtype="<u4") << 16) | 0x8000
        near = np.concatenate([halves, halves + 1, halves - 1]).view("<f4")
        wide = generator.normal(size=100_000) * 10.0 ** generator.integers(-46, 39, 100_000)
        with np.errstate(all="ignore"):
            raw = np.concatenate([near.astype(np.float64), wide]).astype("<f4" if old == "F32" else "<f8").tobytes()
        raw += generator.integers(0, 256, 800_000, dtype=np.uint8).tobytes()
    assert np.array_equal(of_ours(raw, old, new), of_torch(raw, old, new))


@given(st.binary(min_size=8, max_size=64).filter(lambda raw: len(raw) % 8 == 0), st.permutations(list(DTYPES)))
def test_any_bytes(raw: bytes, order: list[str]) -> None:
    assert np.array_equal(of_ours(raw, *order[:2]), of_torch(raw, *order[:2]))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {f"encoder.{n}.w": torch.randn(700, 300) for n in range(3)} | {
        "norm.w": torch.randn(300),
        "fc.w": torch.randn(10, 300),
        "steps": torch.tensor([3]),
    }
    save_file(tensors, tmp_path / "base.safetensors", metadata={"format": "pt"})
    return tmp_path / "base.safetensors"


def test_a_cast_of_all_but_the_norms_with_a_new_head(base: Path, tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "version": 1,
        "freeze": ["**", "!fc"],
        "cast": [{"match": "**", "dtype": "BF16"}, {"match": "norm", "dtype": "F32"}],
        "reinit": [{"match": "fc", "shape": {0: 4}, "init": {"normal": {"std": 0.02}}}],
    }
    planned = ckptsurg.plan(spec, base)
    assert planned.counts["cast"] == 3 and any("steps" in n or "1 tensor without" in n for n in planned.notes)
    outputs = []
    for jobs in (1, 4):
        manifest = ckptsurg.rewrite(spec, base, tmp_path / f"out{jobs}", jobs=jobs)
        outputs.append((tmp_path / f"out{jobs}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    before, after = load_file(base), load_file(tmp_path / "out1" / "model.safetensors")
    for name, tensor in before.items():
        if name.startswith("encoder"):
            expected = tensor.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
            assert after[name].view(torch.uint8).numpy().tobytes() == expected
            assert (manifest.tensors[name].origin, manifest.tensors[name].dtype) == ("cast", "BF16")
    assert after["norm.w"].numpy().tobytes() == before["norm.w"].numpy().tobytes()
    assert (after["fc.w"].dtype, tuple(after["fc.w"].shape)) == (torch.bfloat16, (4, 300))
    assert manifest.counts["cast"] == 3 and manifest.tensors["steps"].origin == "copied"
    assert ckptsurg.verify(manifest, tmp_path / "out1").ok
    assert ckptsurg.load_manifest(tmp_path / "out1") == manifest


def test_a_cast_of_what_a_framework_reads(base: Path, tmp_path: Path) -> None:
    torch.save(load_file(base), tmp_path / "base.pth")
    spec = {"version": 1, "cast": [{"match": "**.w", "dtype": "F16"}]}
    ckptsurg.rewrite(spec, base, tmp_path / "a.safetensors")
    ckptsurg.rewrite(spec, tmp_path / "base.pth", tmp_path / "b.safetensors")
    ours, theirs = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert {n: t.numpy().tobytes() for n, t in ours.items()} == {n: t.numpy().tobytes() for n, t in theirs.items()}


def donor(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    tensors = {f"vision.{n}.w": torch.randn(700, 300) for n in range(3)}
    tensors |= {f"encoder.{n}.w": torch.randn(700, 300) for n in range(3)}
    save_file(tensors | {"norm.w": torch.randn(300).half()}, tmp_path / "donor.safetensors")
    return tmp_path / "donor.safetensors"


def test_a_graft_has_the_donors_bits(base: Path, tmp_path: Path) -> None:
    other = donor(tmp_path)
    spec = {"version": 1, "freeze": "encoder", "graft": [{"match": "encoder", "from": "clip", "named": "vision"}]}
    manifest = ckptsurg.rewrite(spec, base, tmp_path / "out", donors={"clip": other})
    before, after, theirs = load_file(base), load_file(tmp_path / "out" / "model.safetensors"), load_file(other)
    for n in range(3):
        assert after[f"encoder.{n}.w"].numpy().tobytes() == theirs[f"vision.{n}.w"].numpy().tobytes()
        assert manifest.tensors[f"encoder.{n}.w"].origin == "grafted"
    for name in ("norm.w", "fc.w", "steps"):
        assert after[name].numpy().tobytes() == before[name].numpy().tobytes()
    assert [one.file for one in manifest.donors["clip"]] == ["donor.safetensors"]
    assert manifest.counts["grafted"] == 3 and ckptsurg.verify(tmp_path / "out", tmp_path / "out").ok
    # Into shards, cast on the way, under another name.
    whole = {
        **spec,
        "cast": [{"match": "encoder", "dtype": "BF16"}],
        "rename": [{"match": "encoder", "to": "tower"}],
    }
    ckptsurg.rewrite(whole, base, tmp_path / "shards", donors={"clip": other}, max_shard_size=500_000)
    found = {k: v for file in (tmp_path / "shards").glob("*.safetensors") for k, v in load_file(file).items()}
    expected = theirs["vision.1.w"].to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert found["tower.1.w"].view(torch.uint8).numpy().tobytes() == expected


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"graft": [{"match": "encoder", "from": "nobody"}]}, 'no checkpoint is called "nobody"; given: clip'),
        ({"graft": [{"match": "fc", "from": "clip"}]}, "has no fc.w"),
        ({"graft": [{"match": "norm", "from": "clip"}]}, "norm.w is F32 [300], and norm.w of"),
        (
            {"graft": [{"match": "encoder", "from": "clip"}], "reinit": [{"match": "encoder.0", "init": "zeros"}]},
            "both claim encoder.0.w",
        ),
        ({"cast": [{"match": "steps", "dtype": "F32"}]}, "selects nothing that can be cast"),
        ({"cast": [{"match": "fc", "dtype": "I8"}]}, "I8 is none of BF16, F16, F32, F64"),
        (
            {
                "cast": [{"match": "fc", "dtype": "F16"}],
                "reinit": [{"match": "fc", "init": "zeros", "keep": True}],
            },
            "both claim fc.w",
        ),
    ],
)
def test_what_cannot_be_is_refused(base: Path, tmp_path: Path, spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan({"version": 1, **spec}, base, donors={"clip": donor(tmp_path)})
    assert said in str(caught.value)


def test_a_donor_that_is_no_safetensors_is_to_be_converted(base: Path, tmp_path: Path) -> None:
    torch.save(load_file(donor(tmp_path)), tmp_path / "donor.pth")
    spec = {"version": 1, "graft": [{"match": "encoder", "from": "clip"}]}
    with pytest.raises(ckptsurg.UsageError, match="ckptsurg convert"):
        ckptsurg.rewrite(spec, base, tmp_path / "out", donors={"clip": tmp_path / "donor.pth"})
    assert not (tmp_path / "out").exists()


def test_at_the_command_line_and_never_onto_a_donor(base: Path, tmp_path: Path) -> None:
    donor(tmp_path)
    (tmp_path / "spec.yaml").write_text("version: 1\ngraft:\n- {match: encoder, from: clip}\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckptsurg", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    given = ("--donor", "clip=donor.safetensors")
    done = run("plan", "spec.yaml", "base.safetensors", *given)
    assert done.returncode == 0 and "grafted  encoder.0.w  of clip" in done.stdout
    done = run("rewrite", "spec.yaml", "base.safetensors", *given, "-o", "donor.safetensors", "--overwrite")
    assert done.returncode == 2 and "an output never replaces its base" in done.stderr
    assert run("rewrite", "spec.yaml", "base.safetensors", *given, "-o", "out").returncode == 0
    for wrong in ("clip", "clip=", "=x"):
        assert run("plan", "spec.yaml", "base.safetensors", "--donor", wrong).returncode == 2


PARTED = {
    "drop": {"drop": "**.weight_scale_inv"},
    "freeze": {"freeze": ["**", "!**.weight_scale_inv"]},
    "cast": {"cast": [{"match": "**", "dtype": "BF16"}]},
    "reinit": {"reinit": [{"match": "**.weight_scale_inv", "init": "ones"}]},
}


@pytest.mark.parametrize("parted", PARTED)
def test_a_spec_that_parts_a_weight_from_its_scale_is_refused(tmp_path: Path, parted: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for n in range(2):
        tensors[f"l.{n}.weight"] = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
        tensors[f"l.{n}.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors | {"norm.weight": torch.ones(4)}, tmp_path / "fp8.safetensors")
    with pytest.raises(
        ckptsurg.SpecError, match=r"l\.0\.weight is .*, and l\.0\.weight_scale_inv is .*: one is nothing"
    ):
        ckptsurg.plan({"version": 1, **PARTED[parted]}, tmp_path / "fp8.safetensors")
    for whole in ({"drop": "l.0"}, {"freeze": "l"}, {"cast": [{"match": "norm", "dtype": "BF16"}]}):
        ckptsurg.plan({"version": 1, **whole}, tmp_path / "fp8.safetensors")


@pytest.mark.parametrize(
    "names",
    [
        ("q.qweight", "q.qzeros", "q.scales", "q.g_idx"),
        ("q.weight", "q.weight.absmax", "q.weight.quant_map", "q.weight.quant_state.bitsandbytes__nf4"),
        ("q.weight_packed", "q.weight_scale", "q.weight_zero_point"),
        ("e.gate_up_proj_blocks", "e.gate_up_proj_scales"),
    ],
)
def test_the_state_of_other_quantisations(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_file({name: torch.zeros(4, dtype=torch.uint8) for name in names}, tmp_path / "q.safetensors")
    for name in names:
        with pytest.raises(ckptsurg.SpecError, match="one is nothing without the other"):
            ckptsurg.plan({"version": 1, "freeze": ["**", f"!{name}"]}, tmp_path / "q.safetensors")


def test_scales_that_scale_nothing_quantised_are_tensors_like_any_other(tmp_path: Path) -> None:
    names = ("logit_scale", "logit", "block.weight", "block.weight_scale", "layer1", "layer1.absmax.w")
    save_file({name: torch.zeros(4) for name in names}, tmp_path / "x.safetensors")
    for name in names:
        ckptsurg.plan({"version": 1, "drop": {"match": f"re:{name}"}}, tmp_path / "x.safetensors")


def test_specs_that_were_there_before_keep_their_digests() -> None:
    """The new keys are no part of a spec that does not have them."""
    spec = ckptsurg.Spec(version=1, freeze=None)
    assert not {"cast", "graft", "rename"} & json.loads(spec.to_json()).keys()
