"""ckptsurg against a second, naive implementation of its contract, and the laws that hold for every input."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import ckptsurg
from ckptsurg.api import inspect, make_manifest, plan, rewrite
from ckptsurg.proofs import verify

from .oracle import BITS, Fate, Stored, Tensor, Wrong, digest, fates, nbytes, overlap, read_checkpoint, root, select
from .strategies import chance, pattern_of, selector_of, spec_of, tensors_of, write_checkpoint, write_file

#: More cases for a long run: CKPTSURG_ORACLE_CASES=1000.
CASES = int(os.environ.get("CKPTSURG_ORACLE_CASES", "150"))
FIRST = int(os.environ.get("CKPTSURG_ORACLE_FIRST", "0"))

law = settings(
    max_examples=max(10, CASES // 8),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as home:
        yield Path(home)


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file below a path, or the file itself."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def written_spec(rng: random.Random, spec: dict, home: Path) -> dict | Path:
    """The spec as a mapping, as JSON or as YAML (of which JSON is a part)."""
    form = rng.choice(["mapping", "spec.json", "spec.yaml"])
    if form == "mapping":
        return spec
    (home / form).write_text(json.dumps(spec, indent=1, ensure_ascii=False), encoding="utf-8")
    return home / form


# --- A rewrite is what the oracle says ---------------------------------------------------------------


def check_file(stored: Stored, path: Path) -> None:
    for shard in stored.shards.values():
        ends = [0, *(end for _, end in shard.spans)]
        assert [begin for begin, _ in shard.spans] == ends[:-1], "contiguous"
        assert shard.size == shard.data_start + ends[-1]
        assert shard.header.startswith(b"{")
        assert shard.spans
    for name, tensor in stored.tensors.items():
        assert tensor.offset % max(1, BITS[tensor.dtype] // 8) == 0, f"{name} is not aligned"
        assert len(tensor.data) == nbytes(tensor.dtype, tensor.shape)
    if stored.index is not None:
        assert stored.index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in stored.tensors.values())
        assert stored.index["weight_map"] == {name: tensor.file for name, tensor in stored.tensors.items()}
        weights = {file.name for file in path.glob("*.safetensors")}
        assert weights == set(stored.shards)


def check_drawn(name: str, fate: Fate, old: Tensor | None, new: Tensor) -> None:
    """What can be told of drawn bytes without drawing them: constants, and what is kept."""
    constants = {"zeros": 0.0, "ones": 1.0}
    value = constants.get(fate.init) if isinstance(fate.init, str) else fate.init.get("constant", {}).get("val")
    kept = old is not None and fate.keep
    if kept:
        before, after = overlap(old, new)
        assert before == after, f"{name}: kept bits changed"
    elif value is not None:
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8"}
        if fate.dtype in kinds:
            assert new.data == np.full(new.shape, value, kinds[fate.dtype]).tobytes()
        elif value == 0:
            assert not any(new.data)
    elif prod(new.shape) > 16 and "normal" in str(fate.init):
        assert len(set(new.data)) > 2, f"{name}: does not look drawn"


def check_metadata(base: Stored, out: Stored) -> None:
    if out.index is not None:
        assert {file: shard.metadata for file, shard in out.shards.items()} == {
            file: base.shards[file].metadata for file in out.shards
        }
        assert {**base.index["metadata"], "total_size": 0} == {**out.index["metadata"], "total_size": 0}
        return
    merged: dict[str, str] = {}
    for _, shard in sorted(base.shards.items()):
        merged = {**(shard.metadata or {}), **merged}
    [shard] = out.shards.values()
    assert (shard.metadata or {}) == merged


def check_output(base: Stored, found: dict[str, Fate], path: Path, manifest: dict, algorithm: str) -> None:
    out = read_checkpoint(path)
    check_file(out, path)
    check_metadata(base, out)
    expected = {name.removeprefix("+") if fate.action == "add" else name: fate for name, fate in found.items()}
    expected = {name: fate for name, fate in expected.items() if fate.action != "drop"}
    dropped = sorted((name for name, fate in found.items() if fate.action == "drop"), key=str.encode)
    assert set(out.tensors) == set(expected)
    assert {name: (t.dtype, t.shape) for name, t in out.tensors.items()} == {
        name: (fate.dtype, fate.shape) for name, fate in expected.items()
    }
    records = {}
    for name, fate in expected.items():
        new, old = out.tensors[name], base.tensors.get(name)
        if fate.action == "copy":
            assert new.data == old.data, f"{name} changed"
        else:
            check_drawn(name, fate, old if fate.action == "reinit" else None, new)
        if base.index is not None and out.index is not None and fate.action != "add":
            assert new.file == old.file
        origin = {"copy": "copied", "reinit": "reinitialised", "add": "added"}[fate.action]
        records[name] = {
            "dtype": fate.dtype, "shape": list(fate.shape), "frozen": fate.frozen, "origin": origin,
            "digest": digest(new.data, algorithm),
        }  # fmt: skip
    assert manifest["tensors"] == records
    assert list(manifest["dropped"]) == dropped
    assert manifest["root"] == root(records, algorithm)
    frozen = {name: record for name, record in records.items() if record["frozen"]}
    assert manifest["frozen_root"] == root(frozen, algorithm)
    origins = Counter(record["origin"] for record in records.values())
    assert manifest["counts"] == {
        "frozen": len(frozen),
        "trainable": len(records) - len(frozen),
        "reinitialised": origins["reinitialised"],
        "added": origins["added"],
        "dropped": len(dropped),
    }
    twins: dict[str, set[str]] = {}
    for name, record in frozen.items():
        if len(record["shape"]) >= 2:
            twins.setdefault(record["digest"], set()).add(name)
    assert {frozenset(group) for group in manifest["tied"]} == {frozenset(g) for g in twins.values() if len(g) > 1}
    assert [(file["file"], file["size"]) for file in manifest["base"]] == [
        (name, shard.size) for name, shard in sorted(base.shards.items())
    ]


def check_plan(found: dict[str, Fate], planned: dict) -> None:
    rows = {("+" if row["action"] == "add" else "") + row["name"]: row for row in planned["tensors"]}
    assert len(rows) == len(planned["tensors"])
    for name, fate in found.items():
        row = rows.pop(name)
        assert (row["action"], row["frozen"]) == (fate.action, fate.frozen), name
        assert (row["dtype"], tuple(row["shape"])) == (fate.dtype, fate.shape), name
    assert not rows
    actions = Counter(fate.action for fate in found.values())
    still = sum(fate.frozen for fate in found.values())
    assert planned["counts"] == {
        **{action: actions[action] for action in ("copy", "drop", "reinit", "add")},
        "frozen": still,
        "trainable": len(found) - actions["drop"] - still,
    }


def run_case(seed: int) -> None:
    rng = random.Random(seed)
    with scratch() as home:
        path = write_checkpoint(rng, home / "in")
        where = path.parent if path.name.endswith(".index.json") else path
        base, before = read_checkpoint(where), snapshot(home / "in")
        drawn = spec_of(rng, base.tensors)
        spec = written_spec(rng, drawn.spec, home)
        algorithm = rng.choice(["blake3", "blake3", "sha256"])
        outs = home / "out"
        if drawn.is_wrong:
            outs.mkdir()
            for name in ("x", "x.safetensors"):
                with pytest.raises(ckptsurg.SpecError):
                    rewrite(spec, path, outs / name)
            assert not snapshot(outs)
            assert not list(outs.iterdir())
            assert snapshot(home / "in") == before
            return
        found = fates(drawn.spec, base.tensors)
        check_plan(found, json.loads(plan(spec, path).to_json()))
        anything = any(fate.frozen for fate in found.values())
        for out, at in [("x/folder", "x/folder/freeze.json"), ("x y.safetensors", "x y.freeze.json")]:
            manifest = rewrite(spec, path, outs / out, digest=algorithm)
            written = json.loads((outs / at).read_bytes())
            assert written == json.loads(manifest.to_json())
            check_output(base, found, outs / out, written, algorithm)
            assert ckptsurg.load_manifest(outs / at) == manifest
            if anything:
                report = verify(manifest, outs / out, exact=True)
                assert report.ok
                assert report.verified == manifest.counts["frozen"]
        if (where / "config.json").exists():
            assert (outs / "x/folder/config.json").read_bytes() == (where / "config.json").read_bytes()
            assert (outs / "x/folder/tokenizer.txt").read_bytes() == (where / "tokenizer.txt").read_bytes()
        assert not (outs / "x/folder/pytorch_model.bin").exists()
        assert {p.name for p in outs.iterdir()} == {"x", "x y.safetensors", "x y.freeze.json"}
        assert snapshot(home / "in") == before


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_a_rewrite_is_what_the_oracle_says(seed: int) -> None:
    run_case(seed)


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_header_digests_are_of_the_headers_json(tmp_path: Path, algorithm: str) -> None:
    rng = random.Random(5)
    tensors = tensors_of(rng)
    write_file(tmp_path / "a.safetensors", tensors, {"k": "v"}, rng)
    base = read_checkpoint(tmp_path / "a.safetensors")
    manifest = make_manifest(["**"], tmp_path / "a.safetensors", digest=algorithm)
    assert [file.header_digest for file in manifest.base] == [digest(base.shards["a.safetensors"].header, algorithm)]
    assert manifest.spec.digest.startswith(f"{algorithm}:")


# --- Patterns ----------------------------------------------------------------------------------------


def wanted(selector: str | list, tensors: dict[str, Tensor]) -> set[str] | None:
    try:
        return select(selector, tensors)
    except Wrong:
        return None


@pytest.mark.parametrize("seed", range(FIRST, FIRST + max(CASES // 3, 1)))
def test_patterns_select_what_the_oracle_says(tmp_path: Path, seed: int) -> None:
    rng = random.Random(f"patterns {seed}")
    tensors = tensors_of(rng)
    small = {name: Tensor(t.dtype, (0,) * len(t.shape), b"") for name, t in tensors.items()}
    small = {name: t if t.shape else Tensor("U8", (), b"1") for name, t in small.items()}
    write_file(tmp_path / "a.safetensors", small)
    with ckptsurg.open_checkpoint(tmp_path / "a.safetensors") as opened:
        for _ in range(60):
            selector = pattern_of(rng, list(small)) if rng.random() < 0.5 else selector_of(rng, small)
            expected = wanted(selector, small)
            if expected is None:
                with pytest.raises(ckptsurg.SpecError):
                    plan({"version": 1, "freeze": selector}, opened)
                continue
            planned = plan({"version": 1, "freeze": selector}, opened)
            assert {tensor.name for tensor in planned.tensors if tensor.frozen} == expected, selector
            trained = plan({"version": 1, "train": selector}, opened)
            assert {tensor.name for tensor in trained.tensors if not tensor.frozen} == expected, selector
            if isinstance(selector, str):
                assert set(inspect(opened, [selector]).tensors) == expected, selector


# --- Laws --------------------------------------------------------------------------------------------


@law
@given(chance)
def test_a_spec_without_rules_keeps_every_digest(rng: random.Random) -> None:
    with scratch() as home:
        path = write_checkpoint(rng, home / "in")
        manifest = rewrite({"version": 1}, path, home / "out")
        base = read_checkpoint(path.parent if path.name.endswith(".index.json") else path)
        assert {name: record.digest for name, record in manifest.tensors.items()} == {
            name: digest(tensor.data, "blake3") for name, tensor in base.tensors.items()
        }
        assert ckptsurg.diff(path, home / "out").ok


@law
@given(chance)
def test_a_plan_partitions_the_bases_names(rng: random.Random) -> None:
    with scratch() as home:
        tensors = tensors_of(rng)
        path = write_checkpoint(rng, home, tensors)
        planned = plan(spec_of(rng, tensors, valid=True).spec, path)
        assert sorted(t.name for t in planned.tensors if t.action != "add") == sorted(tensors)
        output = [t.name for t in planned.tensors if t.action != "drop"]
        assert len(output) == len(set(output))


@law
@given(chance)
def test_a_manifest_survives_json(rng: random.Random) -> None:
    with scratch() as home:
        tensors = tensors_of(rng)
        write_file(home / "a.safetensors", tensors)
        manifest = make_manifest([rng.choice(list(tensors))], home / "a.safetensors")
        text = manifest.to_json()
        (home / "m.json").write_text(text)
        again = ckptsurg.load_manifest(home / "m.json")
        assert again == manifest
        assert again.to_json() == text


@law
@given(chance, st.data())
def test_a_flipped_bit_is_found_and_named(rng: random.Random, data: st.DataObject) -> None:
    with scratch() as home:
        tensors = tensors_of(rng)
        if not any(tensor.data for tensor in tensors.values()):
            return
        path = write_checkpoint(rng, home / "in", tensors)
        frozen = data.draw(st.sampled_from([name for name, tensor in tensors.items() if tensor.data]))
        patterns = ["**"] if rng.random() < 0.5 and not {"**", "*"} & set(tensors) else [frozen]
        single = rng.random() < 0.5
        out = home / ("out.safetensors" if single else "out")
        manifest = rewrite({"version": 1, "freeze": patterns}, path, out)
        stored = read_checkpoint(out)
        tensor = stored.tensors[frozen]
        bit = data.draw(st.integers(0, 8 * len(tensor.data) - 1))
        flip(out if single else out / tensor.file, tensor.offset + bit // 8, bit % 8)
        report = verify(manifest, out, baseline=path)
        assert not report.ok
        assert [difference.name for difference in report.drifted] == [frozen]
        assert report.verified == manifest.counts["frozen"] - 1
        detail = report.drifted[0].detail
        if BITS[tensor.dtype] >= 8:
            assert detail.elements_changed == 1
            element = bit // BITS[tensor.dtype]
            assert detail.first_index == tuple(int(i) for i in np.unravel_index(element, tensor.shape))
        plain = verify(manifest, out)
        assert [(difference.name, difference.verdict) for difference in plain.drifted] == [(frozen, "changed")]
        assert [difference.name for difference in ckptsurg.diff(path, out).tensors] == [frozen]


def flip(path: Path, offset: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


@law
@given(chance)
def test_a_flipped_bit_of_a_trainable_tensor_is_nobodys_business(rng: random.Random) -> None:
    with scratch() as home:
        tensors = {f"t.{n}": Tensor("U8", (64,), random.Random(n).randbytes(64)) for n in range(4)}
        write_file(home / "a.safetensors", tensors, None, rng)
        manifest = make_manifest(["t.0"], home / "a.safetensors")
        offset = read_checkpoint(home / "a.safetensors").tensors[f"t.{rng.randint(1, 3)}"].offset
        flip(home / "a.safetensors", offset + rng.randrange(64), rng.randrange(8))
        assert verify(manifest, home / "a.safetensors").ok


@law
@given(chance)
def test_a_tied_tensor_may_be_missing_while_its_twin_is_there(rng: random.Random) -> None:
    with scratch() as home:
        twin = Tensor("BF16", (3, 4), bytes(range(24)))
        tensors = {"emb.weight": twin, "head.weight": twin, "n.bias": Tensor("F32", (1,), b"abcd")}
        write_file(home / "a.safetensors", tensors, None, rng)
        manifest = make_manifest(["**"], home / "a.safetensors")
        gone = rng.choice(["emb.weight", "head.weight"])
        left = {name: tensor for name, tensor in tensors.items() if name != gone}
        write_file(home / "b.safetensors", left, None, rng)
        assert verify(manifest, home / "b.safetensors").ok
        [other] = {"emb.weight", "head.weight"} - {gone}
        offset = read_checkpoint(home / "b.safetensors").tensors[other].offset
        flip(home / "b.safetensors", offset + rng.randrange(24), rng.randrange(8))
        assert {d.name for d in verify(manifest, home / "b.safetensors").drifted} >= {other}


@law
@given(chance, st.integers(1, 60_000))
def test_sharding_changes_no_digest_nor_root(rng: random.Random, limit: int) -> None:
    with scratch() as home:
        tensors = tensors_of(rng)
        path = write_checkpoint(rng, home / "in", tensors)
        spec = spec_of(rng, tensors, valid=True).spec
        whole, split = rewrite(spec, path, home / "a"), rewrite(spec, path, home / "b", max_shard_size=limit)
        assert (whole.root, whole.frozen_root, whole.tensors) == (split.root, split.frozen_root, split.tensors)
        stored = read_checkpoint(home / "b")
        check_file(stored, home / "b")
        for file in stored.shards:
            sizes = [len(tensor.data) for tensor in stored.tensors.values() if tensor.file == file]
            assert sum(sizes) <= limit or len([size for size in sizes if size]) == 1
        assert ckptsurg.diff(home / "a", home / "b").ok


@law
@given(chance)
def test_kept_and_drawn_parts_do_not_disturb_one_another(rng: random.Random) -> None:
    """With `keep`, what is new has the values that it has without."""
    old_shape, new_shape = ([rng.randint(1, 9) for _ in range(3)] for _ in range(2))
    with scratch() as home:
        old = np.array([random.Random(n).random() for n in range(prod(old_shape))], "<f4").reshape(old_shape)
        write_file(home / "a.safetensors", {"w": Tensor("F32", tuple(old_shape), old.tobytes())})
        results = []
        for keep in (False, True):
            rule = {"match": "w", "shape": new_shape, "init": "normal", "keep": keep}
            rewrite({"version": 1, "reinit": [rule]}, home / "a.safetensors", home / f"{keep}.safetensors")
            data = read_checkpoint(home / f"{keep}.safetensors").tensors["w"].data
            results.append(np.frombuffer(data, "<f4").reshape(new_shape))
        expected = results[0].copy()
        common = tuple(slice(min(a, b)) for a, b in zip(old_shape, new_shape, strict=True))
        expected[common] = old[common]
        assert results[1].tobytes() == expected.tobytes()


# --- The same inputs give the same bytes -------------------------------------------------------------


REWRITE = "import sys; from ckptsurg.api import rewrite; rewrite(*sys.argv[1:])"


@pytest.mark.parametrize("seed", range(FIRST, FIRST + max(CASES // 30, 2)))
def test_same_inputs_give_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(f"same {seed}")
    tensors = tensors_of(rng)
    path = write_checkpoint(rng, tmp_path / "in", tensors)
    spec = spec_of(rng, tensors, valid=True).spec
    big = {"name": "big.weight", "shape": [300, 700], "dtype": "F32", "init": {"trunc_normal": {"std": 0.02}}}
    spec["add"] = [rule for rule in spec.get("add", ()) if rule["name"] != "big.weight"] + [big]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    for suffix in ("", ".safetensors"):
        outs = [tmp_path / run / f"out{suffix}" for run in ("one", "two", "three")]
        for out, cores in zip(outs, (1, 7), strict=False):
            monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
            rewrite(tmp_path / "spec.json", path, out)
        environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", REWRITE, tmp_path / "spec.json", path, outs[2]]
        subprocess.run(list(map(str, command)), env=environment, check=True, cwd="/")
        first, *others = (snapshot(out.parent) for out in outs)
        assert all(other == first for other in others)


def test_order_of_the_bases_bytes_changes_no_digest(tmp_path: Path) -> None:
    rng = random.Random(3)
    tensors = {f"m.{n}.w": Tensor("F16", (8, n), random.Random(n).randbytes(16 * n)) for n in range(1, 30)}
    roots = set()
    for run in range(3):
        write_file(tmp_path / f"{run}.safetensors", tensors, None, rng)
        spec = {"version": 1, "freeze": ["**", "!m.3"], "reinit": [{"match": "m.3", "init": "normal", "shape": [9, 9]}]}
        roots.add(rewrite(spec, tmp_path / f"{run}.safetensors", tmp_path / f"out{run}").root)
    assert len(roots) == 1


# --- Others can read what we write -------------------------------------------------------------------

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip


@law
@given(chance)
def test_safetensors_reads_what_is_written(rng: random.Random) -> None:
    with scratch() as home:
        tensors = {name: tensor for name, tensor in tensors_of(rng).items() if tensor.dtype in TORCH}
        if not tensors:
            return
        for name, tensor in tensors.items():
            if tensor.dtype == "BOOL":
                tensors[name] = Tensor("BOOL", tensor.shape, bytes(byte & 1 for byte in tensor.data))
        path = write_checkpoint(rng, home / "in", tensors)
        spec = spec_of(rng, tensors, valid=True).spec
        rewrite(spec, path, home / "out.safetensors")
        ours = read_checkpoint(home / "out.safetensors").tensors
        if any(tensor.dtype not in TORCH for tensor in ours.values()):
            return
        loaded = load_file(home / "out.safetensors")
        assert {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in loaded.items()} == {
            name: (TORCH[t.dtype], t.shape, t.data) for name, t in ours.items()
        }
        with safe_open(home / "out.safetensors", "pt") as opened:
            assert set(opened.keys()) == set(ours)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# --- Once found --------------------------------------------------------------------------------------


def test_the_public_plan_can_be_called_twice(tmp_path: Path) -> None:
    """A submodule that is called like a public function must not take its place."""
    write_file(tmp_path / "a.safetensors", {"w": Tensor("U8", (1,), b"x")})
    program = (
        f"import ckptsurg; spec = {{'version': 1, 'freeze': 'w'}}; path = {str(tmp_path / 'a.safetensors')!r}\n"
        "for _ in range(2):\n"
        "    for name in ckptsurg.__all__:\n"
        "        assert callable(getattr(ckptsurg, name)), name\n"
        "    ckptsurg.plan(spec, path)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("dtype", "signalling", "other"),
    [
        ("F64", "010000000000f07f", "030000000000f07f"),
        ("F32", "0100807f", "0300807f"),
        ("F16", "017c", "037c"),
        ("BF16", "817f", "837f"),
        ("C64", "0100807f00000000", "0300807f00000000"),
    ],
)
def test_signalling_nans_are_compared_without_a_warning(
    tmp_path: Path, dtype: str, signalling: str, other: str
) -> None:
    for file, bits in (("a", signalling), ("b", other)):
        write_file(tmp_path / f"{file}.safetensors", {"w": Tensor(dtype, (1,), bytes.fromhex(bits))})
    manifest = make_manifest(["**"], tmp_path / "a.safetensors")
    report = verify(manifest, tmp_path / "b.safetensors", baseline=tmp_path / "a.safetensors")
    assert [difference.verdict for difference in report.drifted] == ["nan_payload"]
