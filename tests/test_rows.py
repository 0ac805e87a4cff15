"""`rows`: a part of a tensor that is frozen along its first dimension, in documents, in files and in training."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import jsonschema
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurg
from ckptsurg.tensors import CHUNK_BYTES, DTYPE_BITS

STEPS = 20


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _digest(content: bytes) -> str:
    return f"blake3:{blake3(content).hexdigest()}"


def _root(tensors: dict, *, only_frozen: bool = False) -> str:
    """The root over a manifest's tensors, or over its frozen ones."""
    lines = []
    for name in sorted(tensors, key=str.encode):
        record = tensors[name]
        if only_frozen and not record["frozen"]:
            continue
        rows = record.get("rows")
        digest = None if only_frozen and rows else record["digest"]
        part = [[rows["start"], rows["stop"], rows["digest"]]] if rows else []
        line = [name, record["dtype"], record["shape"], record["frozen"], digest, *part]
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    return _digest("".join(lines).encode())


def _write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file of raw bytes, of dtypes too that torch has not."""
    header, offset = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(content for *_, content in tensors.values()))
    return path


# --- Documents --------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(6, 4),
        "lm_head.weight": torch.randn(6, 4),
        "body.weight": torch.randn(4, 4).bfloat16(),
        "scale": torch.tensor(2.0),
        "fc.weight": torch.randn(3, 4),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def _spec(rows: str, match: str = "embed.weight", **more: object) -> dict:
    return {"version": 1, "freeze": ["body", {"match": match, "rows": rows, **more}]}


def test_the_record_has_the_rows_and_both_digests(base):
    manifest = ckptsurg.make_manifest(_spec("[1:5]"), base)
    record = json.loads(manifest.to_json())["tensors"]["embed.weight"]
    tensor = load_file(base)["embed.weight"]
    assert record == {
        "dtype": "F32",
        "shape": [6, 4],
        "frozen": True,
        "origin": "copied",
        "digest": _digest(_bytes(tensor)),
        "rows": {"start": 1, "stop": 5, "digest": _digest(_bytes(tensor[1:5]))},
    }
    assert manifest.counts["frozen"] == 2 and manifest.counts["trainable"] == 3


def test_roots_pin_the_rows(base, tmp_path):
    manifest = ckptsurg.make_manifest(_spec("[1:5]"), base)
    tensors = json.loads(manifest.to_json())["tensors"]
    assert manifest.root == _root(tensors)
    assert manifest.frozen_root == _root(tensors, only_frozen=True)
    # What trains is no part of what must hold: other free rows, the same frozen root; other frozen rows, another.
    other = load_file(base)
    other["embed.weight"][0] += 1
    save_file(other, tmp_path / "free.safetensors")
    free = ckptsurg.make_manifest(_spec("[1:5]"), tmp_path / "free.safetensors")
    assert free.frozen_root == manifest.frozen_root and free.root != manifest.root
    other["embed.weight"][1] += 1
    save_file(other, tmp_path / "held.safetensors")
    assert ckptsurg.make_manifest(_spec("[1:5]"), tmp_path / "held.safetensors").frozen_root != manifest.frozen_root


def test_a_manifest_with_rows_survives_json(base, tmp_path):
    manifest = ckptsurg.make_manifest(_spec("[1:5]"), base)
    ckptsurg.write_manifest(manifest, tmp_path / "a.json")
    loaded = ckptsurg.load_manifest(tmp_path / "a.json")
    assert loaded.to_bytes() == manifest.to_bytes() and loaded.tensors == manifest.tensors
    without = ckptsurg.make_manifest({"version": 1, "freeze": "body"}, base)
    assert '"rows"' not in without.to_json()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"start": 0}, r"root: does not match the tensors"),
        ({"stop": 6}, r"frozen_root: does not match the tensors"),
        ({"digest": "blake3:" + "0" * 64}, r"frozen_root: does not match the tensors"),
        ({"stop": 7}, r"tensors\.embed\.weight\.rows: \[1:7\] is no part of F32 \[6, 4\]"),
        ({"start": 5}, r"tensors\.embed\.weight\.rows: \[5:5\] is no part of"),
        ({"start": -1}, r"tensors\.embed\.weight\.rows\.start"),
        ({"step": 2}, r"tensors\.embed\.weight\.rows\.step"),
        (None, r"root: does not match the tensors"),
    ],
)
def test_edited_rows_are_refused(base, tmp_path, edit, said):
    document = json.loads(ckptsurg.make_manifest(_spec("[1:5]"), base).to_json())
    if edit is None:
        del document["tensors"]["embed.weight"]["rows"]
    else:
        document["tensors"]["embed.weight"]["rows"] |= edit
    (tmp_path / "edited.json").write_text(json.dumps(document))
    with pytest.raises(ckptsurg.ManifestError, match=said):
        ckptsurg.load_manifest(tmp_path / "edited.json")


def test_rows_of_what_is_not_frozen_are_refused(base, tmp_path):
    document = json.loads(ckptsurg.make_manifest(_spec("[1:5]"), base).to_json())
    document["tensors"]["embed.weight"]["frozen"] = False
    document["root"] = _root(document["tensors"])
    document["frozen_root"] = _root(document["tensors"], only_frozen=True)
    document["counts"] |= {"frozen": 1, "trainable": 4}
    (tmp_path / "edited.json").write_text(json.dumps(document))
    with pytest.raises(ckptsurg.ManifestError, match=r"tensors\.embed\.weight\.rows"):
        ckptsurg.load_manifest(tmp_path / "edited.json")


def test_documents_fit_their_schemas(base):
    from ckptsurg.api import schema

    documents = {
        "spec": _spec("[1:5]"),
        "plan": json.loads(ckptsurg.plan(_spec("[1:5]"), base).to_json()),
        "manifest": json.loads(ckptsurg.make_manifest(_spec("[1:5]"), base).to_json()),
    }
    for kind, document in documents.items():
        jsonschema.Draft202012Validator.check_schema(schema(kind))
        jsonschema.validate(document, schema(kind))
    [planned] = [tensor for tensor in documents["plan"]["tensors"] if tensor["name"] == "embed.weight"]
    assert planned["rows"] == [1, 5] and planned["frozen"] is True
    for kind, broken in (
        ("spec", _spec(5)),
        ("spec", {"version": 1, "drop": [{"match": "fc", "rows": "[:1]"}]}),
        ("spec", {"version": 1, "train": {"match": "fc", "rows": "[:1]"}}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema(kind))


# --- Slices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "start", "stop"),
    [
        ("[:4]", 0, 4),
        ("[4:]", 4, 6),
        ("[1:5]", 1, 5),
        ("[-2:]", 4, 6),
        ("[:-2]", 0, 4),
        ("[-5:-1]", 1, 5),
        ("[3]", 3, 4),
        ("[-1]", 5, 6),
        ("[-6]", 0, 1),
    ],
)
def test_slices_are_those_of_python(base, rows, start, stop):
    record = ckptsurg.make_manifest(_spec(rows), base).tensors["embed.weight"]
    assert (record.rows.start, record.rows.stop) == (start, stop)
    assert record.rows.digest == _digest(_bytes(load_file(base)["embed.weight"][start:stop]))


@pytest.mark.parametrize("rows", ["[:]", "[0:]", "[:6]", "[0:6]", "[-6:]", "[-6:6]"])
def test_all_rows_are_those_that_the_tensor_has_now(base, rows, tmp_path):
    """A vocabulary may grow in training: what it had is frozen, and nothing of it is expected to train."""
    manifest = ckptsurg.make_manifest(_spec(rows), base)
    record = manifest.tensors["embed.weight"]
    assert (record.rows.start, record.rows.stop, record.rows.digest) == (0, 6, record.digest)
    tensors = {**load_file(base), "fc.weight": load_file(base)["fc.weight"] + 1}
    save_file(tensors, tmp_path / "t.safetensors")
    assert "embed.weight" not in ckptsurg.verify(manifest, tmp_path / "t.safetensors", expect_trained=True).untrained
    tensors["embed.weight"] = torch.cat([tensors["embed.weight"], torch.ones(2, 4)])
    save_file(tensors, tmp_path / "t.safetensors")
    assert ckptsurg.verify(manifest, tmp_path / "t.safetensors").ok


@pytest.mark.parametrize("rows", ["[:7]", "[6]", "[-7]", "[-7:]", "[7:]", "[6:]", "[3:3]", "[4:2]", "[:0]", "[:-6]"])
def test_rows_that_are_not_there_are_an_error(base, rows):
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan(_spec(rows), base)
    [problem] = caught.value.problems
    assert problem.path == "freeze[1].rows"
    assert problem.message == f'"{rows}" is no range of the 6 rows of embed.weight'


@pytest.mark.parametrize(
    "rows",
    [*("[::2]", "[0:4:1]", "[]", "", "4", ":4", "[a:b]", "[1.0:]", "[ :4]", "[:4] ", "[0,4]", "[:4"), 4, [0, 4], True],
)
def test_what_is_no_range_is_an_error_with_an_example(base, rows):
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan(_spec(rows), base)
    [problem] = caught.value.problems
    assert problem.path == "freeze[1].rows"
    assert problem.message == f'expected a range of rows in quotes, such as "[:32000]", found {json.dumps(rows)}'


def test_an_unquoted_range_in_yaml_is_explained(base, tmp_path):
    (tmp_path / "spec.yaml").write_text("version: 1\nfreeze:\n  - {match: embed.weight, rows: [32000]}\n")
    with pytest.raises(ckptsurg.SpecError, match=r'spec\.yaml:3: freeze\[0\]\.rows: .*in quotes, such as "\[:32000\]"'):
        ckptsurg.plan(tmp_path / "spec.yaml", base)


def test_a_scalar_has_no_rows(base):
    with pytest.raises(ckptsurg.SpecError, match=r'"\[:1\]" is a range of rows, and scale has no dimensions'):
        ckptsurg.plan(_spec("[:1]", "scale"), base)


def test_rows_end_at_whole_bytes(tmp_path):
    path = _write(tmp_path / "odd.safetensors", {"w": ("F4", [4, 3], bytes(6)), "v": ("F4", [4, 2], bytes(4))})
    with pytest.raises(ckptsurg.SpecError, match="would part a byte of w, whose dtype is F4"):
        ckptsurg.make_manifest([{"match": "w", "rows": "[:2]"}], path)
    assert ckptsurg.make_manifest([{"match": "v", "rows": "[:2]"}], path).tensors["v"].rows.stop == 2


def test_taking_rows_away_is_an_error_that_says_what_to_write(base):
    spec = {"version": 1, "freeze": ["**", {"match": "!embed.weight", "rows": "[:2]"}]}
    with pytest.raises(ckptsurg.SpecError, match=r"freeze\[1\]\.rows: .* says which rows are frozen; without !"):
        ckptsurg.plan(spec, base)


@pytest.mark.parametrize(
    "spec",
    [
        {"drop": {"match": "fc", "rows": "[:1]"}},
        {"train": [{"match": "fc", "rows": "[:1]"}]},
        {"reinit": [{"match": "fc", "init": "zeros", "rows": "[:1]"}]},
    ],
    ids=["drop", "train", "reinit"],
)
def test_only_freeze_knows_rows(base, spec):
    with pytest.raises(ckptsurg.SpecError, match=r"rows: unknown key"):
        ckptsurg.plan({"version": 1, **spec}, base)


def _frozen_rows(base: Path, *items: object) -> dict[str, tuple[int, int] | None]:
    """Of each frozen tensor, which rows; None for all of it."""
    plan = ckptsurg.plan({"version": 1, "freeze": list(items)}, base)
    return {tensor.name: tensor.rows for tensor in plan.tensors if tensor.frozen}


def test_the_later_item_wins(base):
    part = {"match": "embed.weight", "rows": "[:2]"}
    assert _frozen_rows(base, "embed", part) == {"embed.weight": (0, 2)}
    assert _frozen_rows(base, part, "embed") == {"embed.weight": None}
    assert _frozen_rows(base, part, {**part, "rows": "[3:]"}) == {"embed.weight": (3, 6)}
    assert _frozen_rows(base, part, "body", "!embed") == {"body.weight": None}
    assert _frozen_rows(base, "body", part, "!body") == {"embed.weight": (0, 2)}


def test_one_item_may_select_several_tensors(base):
    item = {"match": "{embed,lm_head,fc}.weight", "rows": "[-2:]"}
    expected = {"embed.weight": (4, 6), "lm_head.weight": (4, 6), "fc.weight": (1, 3)}
    assert _frozen_rows(base, item) == expected
    with pytest.raises(ckptsurg.SpecError, match=r'"\[4:\]" is no range of the 3 rows of fc\.weight'):
        _frozen_rows(base, {**item, "rows": "[4:]"})


def test_rows_go_with_where_expect_and_optional(base):
    item = {"match": "**", "rows": "[:2]", "where": {"dtype": "F32", "ndim": 2}, "expect": 3}
    part = (0, 2)
    assert _frozen_rows(base, item) == {"embed.weight": part, "lm_head.weight": part, "fc.weight": part}
    with pytest.raises(ckptsurg.SpecError, match="selects 3 tensors, expected 2"):
        _frozen_rows(base, {**item, "expect": 2})
    gone = {"match": "wte.weight", "rows": "[:2]", "optional": True}
    assert _frozen_rows(base, "body", gone) == {"body.weight": None}
    with pytest.raises(ckptsurg.SpecError, match=r'"wte\.weight" matches nothing'):
        _frozen_rows(base, "body", {**gone, "optional": False})


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_rows_digest_is_that_of_the_naive_slice(data):
    dtype = data.draw(st.sampled_from(sorted(DTYPE_BITS)))
    count = data.draw(st.integers(1, 9))
    rest = data.draw(st.lists(st.integers(0, 5), max_size=3))
    if DTYPE_BITS[dtype] < 8:
        rest = [*rest, 4]
    size = 1
    for length in rest:
        size *= length
    row = size * DTYPE_BITS[dtype] // 8
    content = data.draw(st.binary(min_size=count * row, max_size=count * row))
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder, "a.safetensors"), {"x": ("U8", [1], b"\1"), "w": (dtype, [count, *rest], content)})
        manifest = ckptsurg.make_manifest(["x", {"match": "w", "rows": f"[{start}:{stop}]"}], path)
        record = manifest.tensors["w"]
        assert record.digest == _digest(content)
        part = _digest(content[start * row : stop * row])
        assert (record.rows.start, record.rows.stop, record.rows.digest) == (start, stop, part)
        if content:
            at = data.draw(st.integers(0, len(content) * 8 - 1))
            flipped = bytearray(content)
            flipped[at // 8] ^= 1 << at % 8
            trained = _write(
                Path(folder, "b.safetensors"), {"x": ("U8", [1], b"\1"), "w": (dtype, [count, *rest], bytes(flipped))}
            )
            inside = start * row <= at // 8 < stop * row
            assert ckptsurg.verify(manifest, trained).ok is not inside


# --- Files ------------------------------------------------------------------------------------------


@pytest.fixture
def published(base, tmp_path) -> Path:
    ckptsurg.rewrite(_spec("[1:5]"), base, tmp_path / "out")
    return tmp_path


def _verify(published: Path, change, **options):
    tensors = load_file(published / "out" / "model.safetensors")
    change(tensors)
    save_file(tensors, published / "trained.safetensors")
    return ckptsurg.verify(published / "out", published / "trained.safetensors", **options)


def _set(tensors: dict, name: str, value: torch.Tensor) -> None:
    tensors[name] = value.contiguous()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["embed.weight"][0].add_(1),
        lambda t: t["embed.weight"][5].fill_(float("nan")),
        lambda t: _set(t, "embed.weight", torch.cat([t["embed.weight"], torch.ones(3, 4)])),
        lambda t: _set(t, "embed.weight", t["embed.weight"][:5]),
    ],
    ids=["before", "after", "appended", "taken away"],
)
def test_only_the_rows_are_verified(published, change):
    report = _verify(published, change)
    assert report.ok and report.verified == 2 and report.drifted == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: _set(t, "embed.weight", t["embed.weight"][:4]),
        lambda t: _set(t, "embed.weight", t["embed.weight"][:, :3]),
        lambda t: _set(t, "embed.weight", t["embed.weight"].reshape(6, 4, 1)),
        lambda t: _set(t, "embed.weight", t["embed.weight"].reshape(-1)),
        lambda t: _set(t, "embed.weight", torch.tensor(1.0)),
    ],
    ids=["too few rows", "narrower", "three dimensions", "flat", "scalar"],
)
def test_rows_that_cannot_be_there_are_another_shape(published, change):
    [difference] = _verify(published, change, baseline=published / "out").drifted
    assert (difference.name, difference.verdict) == ("embed.weight", "shape")
    assert difference.detail["expected"] == "F32 [6, 4]"


def test_rows_that_are_missing_are_missing(published):
    [difference] = _verify(published, lambda t: t.pop("embed.weight")).drifted
    assert (difference.verdict, difference.cause) == ("missing", "not_saved")


@pytest.mark.parametrize(("row", "column"), [(1, 0), (3, 2), (4, 3)])
@pytest.mark.parametrize("bit", [0, 31])
def test_one_flipped_bit_is_located(published, row, column, bit):
    def flip(tensors):
        tensors["embed.weight"].view(torch.int32)[row, column] ^= -(2**31) if bit == 31 else 1 << bit

    assert [one.verdict for one in _verify(published, flip).drifted] == ["changed"]
    [difference] = _verify(published, flip, baseline=published / "out").drifted
    assert difference.name == "embed.weight" and difference.detail.elements_changed == 1
    assert difference.detail.first_index == (row, column)


def test_a_bit_beyond_a_chunk_is_located(tmp_path):
    """Chunks begin and end inside of the frozen rows, and inside of one of them."""
    tensor = torch.randn(1000, 1500, generator=torch.Generator().manual_seed(0))
    assert 4 * tensor.numel() > CHUNK_BYTES and CHUNK_BYTES % 6000
    middle = CHUNK_BYTES // 6000
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    manifest = ckptsurg.make_manifest([{"match": "w", "rows": "[100:900]"}], tmp_path / "a.safetensors")
    assert manifest.tensors["w"].rows.digest == _digest(_bytes(tensor[100:900]))
    longer = torch.cat([tensor, torch.zeros(200, 1500)])
    for row, found in ((99, []), (100, [100]), (middle, [middle]), (899, [899]), (900, []), (1100, [])):
        trained = longer.clone()
        trained.view(torch.int32)[row, 1499] ^= 1
        save_file({"w": trained}, tmp_path / "b.safetensors")
        report = ckptsurg.verify(manifest, tmp_path / "b.safetensors", baseline=tmp_path / "a.safetensors")
        assert [one.detail.first_index for one in report.drifted] == [(row, 1499) for row in found]


def test_a_cast_is_told_by_the_rows_alone(base, tmp_path):
    ckptsurg.rewrite({"version": 1, "freeze": {"match": "body", "rows": "[:2]"}}, base, tmp_path / "out")
    wide = load_file(base)
    wide["body.weight"] = wide["body.weight"].float()
    wide["body.weight"][2:] += 2.0**-20  # not to be had in bfloat16, but these rows train
    save_file(wide, tmp_path / "wide.safetensors")
    report = ckptsurg.verify(tmp_path / "out", tmp_path / "wide.safetensors")
    assert not report.ok and [one.verdict for one in report.drifted] == ["dtype_only"]
    assert ckptsurg.verify(tmp_path / "out", tmp_path / "wide.safetensors", allow_widened=True).ok
    wide["body.weight"][1, 1] += 2.0**-20
    save_file(wide, tmp_path / "wide.safetensors")
    report = ckptsurg.verify(tmp_path / "out", tmp_path / "wide.safetensors", allow_widened=True)
    assert not report.ok and [one.verdict for one in report.drifted] == ["dtype"]


def test_shards_change_no_rows(base, tmp_path):
    one = ckptsurg.rewrite(_spec("[1:5]"), base, tmp_path / "one.safetensors")
    many = ckptsurg.rewrite(_spec("[1:5]"), base, tmp_path / "many", max_shard_size=100)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert (one.root, one.frozen_root) == (many.root, many.frozen_root)
    assert ckptsurg.verify(tmp_path / "many", tmp_path / "one.safetensors", baseline=tmp_path / "many").ok
    sha = ckptsurg.rewrite(_spec("[1:5]"), base, tmp_path / "sha", digest="sha256")
    assert sha.tensors["embed.weight"].rows.digest.startswith("sha256:")
    assert ckptsurg.verify(tmp_path / "sha", tmp_path / "one.safetensors").ok


def _grown(rows: str, size: object, **more: object) -> dict:
    """A vocabulary that grows: what it had is frozen, what is new trains."""
    rule = {"match": "embed.weight", "shape": size, "init": {"normal": {"std": 0.02}}, **more}
    return _spec(rows) | {"reinit": [rule]}


def test_a_grown_tensor_whose_old_rows_are_frozen(base, tmp_path):
    manifest = ckptsurg.rewrite(_grown("[:]", {"0": 9}, keep=True), base, tmp_path / "out")
    record = manifest.tensors["embed.weight"]
    assert record.frozen and record.origin == "reinitialised" and record.shape == (9, 4)
    old = load_file(base)["embed.weight"]
    new = load_file(tmp_path / "out" / "model.safetensors")["embed.weight"]
    assert (record.rows.start, record.rows.stop, record.rows.digest) == (0, 6, _digest(_bytes(old)))
    assert _bytes(new[:6]) == _bytes(old)
    new[6:] += 1
    save_file({**load_file(tmp_path / "out" / "model.safetensors"), "embed.weight": new}, tmp_path / "t.safetensors")
    assert ckptsurg.verify(manifest, tmp_path / "t.safetensors", expect_trained=False).ok
    new[5] += 1
    save_file({**load_file(tmp_path / "out" / "model.safetensors"), "embed.weight": new}, tmp_path / "t.safetensors")
    [difference] = ckptsurg.verify(manifest, tmp_path / "t.safetensors", baseline=tmp_path / "out").drifted
    assert difference.detail.first_index == (5, 0) and difference.detail.elements_changed == 4


def test_a_shrunk_tensor_that_keeps_its_frozen_rows(base):
    plan = ckptsurg.plan(_grown("[:3]", {"0": 4}, keep=True), base)
    assert {t.name: (t.frozen, t.rows) for t in plan.tensors}["embed.weight"] == (True, (0, 3))
    plan = ckptsurg.plan(_grown("[:3]", {"0": 3}, keep=True), base)
    assert {t.name: (t.frozen, t.rows) for t in plan.tensors}["embed.weight"] == (True, (0, 3))


@pytest.mark.parametrize("size", [{"0": 4}, {"1": 5}, {"0": 9, "1": 3}])
def test_rows_that_are_not_kept_whole_are_an_error(base, size):
    with pytest.raises(ckptsurg.SpecError, match=r"freeze\[1\]\.rows: embed\.weight goes from .* not kept whole"):
        ckptsurg.plan(_grown("[:5]", size, keep=True), base)


def test_rows_of_what_is_drawn_anew_are_claimed_twice(base):
    with pytest.raises(ckptsurg.SpecError, match=r"freeze\[1\] and reinit\[0\] both claim embed\.weight"):
        ckptsurg.plan(_grown("[:5]", {"0": 9}), base)


def _run(folder: Path, *arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "ckptsurg", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_the_command_line_speaks_of_rows(base, tmp_path):
    (tmp_path / "spec.yaml").write_text(
        'version: 1\nfreeze: [body, lm_head, {match: embed.weight, rows: "[:6]"}]\n'
        "reinit:\n  - {match: embed.weight, shape: {0: 9}, init: {normal: {std: 0.02}}, keep: true}\n"
    )
    text = _run(tmp_path, "plan", "spec.yaml", "base.safetensors")
    rows = [line.split() for line in text.splitlines()]
    assert ["frozen", "in", "part", "reinit[0]", "embed.weight", "1"] in [row[:6] for row in rows]
    assert "embed.weight  rows 0 to 5 are frozen, the rest trains" in text
    text = _run(tmp_path, "rewrite", "spec.yaml", "base.safetensors", "-o", "out")
    assert "3 frozen, 2 trainable, 1 reinitialised" in text
    trained = load_file(tmp_path / "out" / "model.safetensors")
    trained["embed.weight"][6:] += 1
    save_file(trained, tmp_path / "trained.safetensors")
    assert "3 frozen tensors verified" in _run(tmp_path, "verify", "out", "trained.safetensors")
    trained["embed.weight"][5, 2] += 1
    save_file(trained, tmp_path / "trained.safetensors")
    text = _run(tmp_path, "verify", "out", "trained.safetensors", "--baseline", "out", code=1)
    assert "embed.weight  changed" in text and "1 element, by up to 1, first at [5, 2]" in text
    report = json.loads(_run(tmp_path, "verify", "out", "trained.safetensors", "--baseline", "out", "--json", code=1))
    assert report["drifted"][0]["detail"]["first_index"] == [5, 2]


# --- Training ---------------------------------------------------------------------------------------

WORDS, HELD, WIDTH = 12, 8, 4
ROWS = {"match": "{embed,head}.weight", "rows": f"[:{HELD}]"}


class Language(nn.Module):
    """Words in, words out; the head may be the embedding."""

    def __init__(self, *, tied: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, sparse=sparse)
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(words))


def _language(**options: bool) -> Language:
    torch.manual_seed(0)
    return Language(**options)


def _loss(model: nn.Module, seed: int) -> torch.Tensor:
    """Every word stands in every batch."""
    words = torch.arange(WORDS)
    return nn.functional.cross_entropy(model(words), words.roll(seed % WORDS))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    model.train()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(model, seed)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def _held(model: nn.Module, names: tuple[str, ...] = ("embed", "head")) -> dict[str, bytes]:
    return {name: _bytes(getattr(model, name).weight[:HELD]) for name in names}


def _unmoved(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Free rows, row by row, that have the bits that they had."""
    return [
        f"{name}[{row}]"
        for name in ("embed.weight", "head.weight")
        for row in range(HELD, WORDS)
        if _bytes(model.state_dict()[name][row]) == _bytes(before[name][row])
    ]


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, **SGD, foreach=False),
    "SGD-nesterov-foreach": lambda p: torch.optim.SGD(p, **SGD, nesterov=True, foreach=True),
    "SGD-fused": lambda p: torch.optim.SGD(p, **SGD, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, foreach=False),
    "Adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True, foreach=True),
    "Adam-fused": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, centered=True),
    "RMSprop-foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, foreach=False),
    "Adagrad-foreach": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, foreach=True),
    "Adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "LBFGS-wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize(
    ("tied", "guarded"), [(False, False), (False, True), (True, True)], ids=["unguarded", "guarded", "guarded-tied"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_stand_still_under_every_optimizer(name, tied, guarded):
    model = _language(tied=tied)
    manifest = ckptsurg.make_manifest([ROWS], model)
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = OPTIMIZERS[name](frozen.trainable_parameters())
    watching = frozen.guard(optimizer, every=1, expect_trained=True) if guarded else None
    del frozen  # what it holds does not hang on it
    gc.collect()
    for step in range(STEPS):
        _step(model, optimizer, step)
        assert _held(model) == held, f"after step {step + 1}"
    assert _unmoved(model, before) == []
    if watching is not None:
        watching.remove()
    assert ckptsurg.verify(manifest, model, expect_trained=True).ok


# torch asks for a decision on the checks of its own sparse tensors.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SparseAdam(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
    ids=["SparseAdam", "Adagrad", "SGD"],
)
def test_rows_stand_still_under_sparse_gradients(make):
    model = _language(sparse=True)
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    sparse, dense = make([model.embed.weight]), torch.optim.AdamW(model.head.parameters(), lr=0.1)
    with frozen.guard(sparse), frozen.guard(dense):
        for step in range(STEPS):
            sparse.zero_grad()
            _step(model, dense, step)
            assert model.embed.weight.grad.layout is torch.sparse_coo
            sparse.step()
            assert _held(model) == held, f"after step {step + 1}"
    assert _unmoved(model, before) == []


def test_the_guard_of_freeze_is_not_needed():
    model = _language()
    held = _held(model)
    ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    gc.collect()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(STEPS):
        _step(model, optimizer, step)
        assert _held(model) == held


def test_momentum_from_before_the_freeze_moves_no_row():
    model = _language()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for step in range(3):
        _step(model, optimizer, step)
    held = _held(model)
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer.step()  # with gradients that were there before
    assert _held(model) == held
    with frozen.guard(optimizer):
        for step in range(5):
            _step(model, optimizer, step)
            assert _held(model) == held


def test_rows_of_a_wider_model_stand_still():
    model = _language().bfloat16()
    manifest = ckptsurg.make_manifest([ROWS], model)
    model.float()
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, manifest, allow_widened=True)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    with frozen.guard(optimizer):
        for step in range(3):
            _step(model, optimizer, step)
    assert _held(model) == held and _unmoved(model, before) == []
    assert {one.verdict for one in frozen.verify().drifted} == {"dtype_only"}


def test_rows_in_the_middle_of_a_bias_and_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(24, 2))
    before = copy.deepcopy(model.state_dict())
    ckptsurg.freeze(model, ckptsurg.make_manifest([{"match": "0", "rows": "[2:4]"}], model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 1, 4, 4)).pow(2).sum().backward()
        optimizer.step()
    for name in ("0.weight", "0.bias"):
        same = [_bytes(model.state_dict()[name][row]) == _bytes(before[name][row]) for row in range(6)]
        assert same == [False, False, True, True, False, False], name


def test_the_two_names_of_a_tied_tensor():
    """The checkpoint may hold both, with rows for both, or for one while the other trains; never all of one."""
    part = {"match": "embed.weight", "rows": f"[:{HELD}]"}
    for items in ([part], [{**part, "match": "head.weight"}], [part, {"match": "head.weight", "rows": "[:4]"}]):
        model = _language(tied=True)
        held = _held(model)
        ckptsurg.freeze(model, ckptsurg.make_manifest(items, model))
        _step(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
        assert _held(model) == held
    model = _language(tied=True)
    with pytest.raises(ckptsurg.FreezeError, match=r'"head\.weight" is frozen and shares its storage'):
        ckptsurg.freeze(model, ckptsurg.make_manifest(["head.weight", part], model))


def _mask(model: Language) -> None:
    """What many scripts do: the gradient of frozen rows is zero."""
    keep = torch.ones(WORDS, 1)
    keep[:HELD] = 0
    for weight in (model.embed.weight, model.head.weight):
        weight.register_hook(lambda gradient: gradient * keep)


def test_a_mask_on_the_gradient_is_not_enough():
    model = _language()
    _mask(model)
    held = _held(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [ROWS]) as watch:
        for step in range(3):
            _step(model, optimizer, step)
    assert _held(model) != held
    assert caught.value.causes == {"embed.weight": "weight_decay", "head.weight": "weight_decay"}
    for difference in watch.report.drifted:
        assert difference.detail.elements_changed == HELD * WIDTH and difference.detail.first_index == (0, 0)
    assert "weight_decay" in str(caught.value)


def test_a_mask_on_the_gradient_does_not_stop_momentum():
    model = _language()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _step(model, optimizer)
    _mask(model)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [ROWS]):
        _step(model, optimizer)
    assert caught.value.causes == {"embed.weight": "zero_grad_not_none", "head.weight": "zero_grad_not_none"}


def test_rows_that_nobody_freezes_are_never_frozen():
    model = _language()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [ROWS]):
        _step(model, optimizer)
    assert caught.value.causes == {"embed.weight": "never_frozen", "head.weight": "never_frozen"}


def test_a_mask_without_decay_and_momentum_is_honest():
    model = _language()
    _mask(model)
    before = copy.deepcopy(model.state_dict())
    with ckptsurg.watch(model, [ROWS], expect_trained=True) as watch:
        _step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert watch.report.ok and _unmoved(model, before) == []


def test_frozen_rows_have_no_part_in_clipping():
    frozen, twin = _language(), _language()
    ckptsurg.freeze(frozen, ckptsurg.make_manifest([ROWS], frozen))
    for model in (frozen, twin):
        for seed in range(2):  # accumulated
            _loss(model, seed).backward()
    for weight in (twin.embed.weight, twin.head.weight):
        assert weight.grad[:HELD].count_nonzero() > 0
        weight.grad[:HELD] = 0
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.01) for model in (frozen, twin)]
    assert _bytes(norms[0]) == _bytes(norms[1]) and norms[0] > 0.01
    for one, other in zip(frozen.parameters(), twin.parameters(), strict=True):
        assert _bytes(one.grad) == _bytes(other.grad)


def test_free_rows_train_as_if_nothing_were_frozen():
    """Adam steps every element by itself: the free rows get the very bits that they get without a freeze."""
    torch.manual_seed(0)
    frozen, free = nn.Embedding(6, 3), nn.Embedding(6, 3)
    free.load_state_dict(frozen.state_dict())
    ckptsurg.freeze(frozen, ckptsurg.make_manifest([{"match": "weight", "rows": "[:4]"}], frozen))
    for model in (frozen, free):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.arange(6)).pow(2).sum().backward()
            optimizer.step()
    assert _bytes(frozen.weight[4:]) == _bytes(free.weight[4:])
    assert _bytes(frozen.weight[:4]) != _bytes(free.weight[:4])


def test_release_lets_rows_train_again():
    model = _language()
    held, keys = _held(model), list(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, optimizer)
    assert _held(model) == held and list(model.state_dict()) == keys
    frozen.release()
    frozen.release()  # a second time does nothing
    _step(model, optimizer)
    assert all(now != held[name] for name, now in _held(model).items())
    assert model.embed.weight.grad[:HELD].count_nonzero() == HELD * WIDTH


def test_two_freezes_of_one_model_hold_both_parts():
    model = _language()
    first = ckptsurg.freeze(model, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[:4]"}], model))
    second = ckptsurg.freeze(model, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[2:6]"}], model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def moved() -> list[int]:
        before = model.embed.weight.detach().clone()
        _step(model, optimizer)
        return [row for row in range(WORDS) if _bytes(before[row]) != _bytes(model.embed.weight[row])]

    assert moved() == [*range(6, WORDS)]
    first.release()
    assert moved() == [0, 1, *range(6, WORDS)]
    second.release()
    assert moved() == [*range(WORDS)]


@pytest.mark.parametrize("together", [True, False], ids=["one optimizer", "two optimizers"])
def test_two_models(together):
    one, other = _language(), _language()
    freezes = [
        ckptsurg.freeze(one, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[:4]"}], one)),
        ckptsurg.freeze(other, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[4:]"}], other)),
    ]
    parameters = [list(one.parameters()), list(other.parameters())]
    groups = [[*parameters[0], *parameters[1]]] if together else parameters
    optimizers = [torch.optim.AdamW(group, lr=0.1, weight_decay=0.1) for group in groups]

    def moved() -> list[list[int]]:
        before = [model.embed.weight.detach().clone() for model in (one, other)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        (_loss(one, 1) + _loss(other, 1)).backward()
        for optimizer in optimizers:
            optimizer.step()
        pairs = zip(before, (one, other), strict=True)
        return [[r for r in range(WORDS) if _bytes(b[r]) != _bytes(m.embed.weight[r])] for b, m in pairs]

    assert moved() == [[*range(4, WORDS)], [*range(4)]]
    freezes[0].release()
    assert moved() == [[*range(WORDS)], [*range(4)]]


def test_a_model_that_is_gone_leaves_nothing_behind():
    from torch.optim import optimizer as internals

    def live_and_die() -> list[weakref.ref]:
        model = _language()
        frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
        optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
        with frozen.guard(optimizer):
            _step(model, optimizer)
        return [weakref.ref(one) for one in (model, frozen, optimizer, model.embed.weight)]

    live_and_die()
    hooks = [len(internals._global_optimizer_pre_hooks), len(internals._global_optimizer_post_hooks)]
    references = live_and_die() + live_and_die()
    gc.collect()
    assert [reference() for reference in references] == [None] * 8
    assert [len(internals._global_optimizer_pre_hooks), len(internals._global_optimizer_post_hooks)] == hooks
    other = _language()
    _step(other, torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_model_trains_all_of_its_rows(copied):
    model = _language()
    held = _held(model)
    ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    _step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    twin = copied(model)
    assert _held(twin) == held
    _step(twin, torch.optim.AdamW(twin.parameters(), lr=0.1))
    assert all(now != held[name] for name, now in _held(twin).items())
    assert twin.embed.weight.grad[:HELD].count_nonzero() > 0
    _step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert _held(model) == held


class Exploding(torch.optim.SGD):
    """Moves everything, then fails, when it is armed."""

    armed = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)
        if self.armed:
            raise KeyError("mine")


def test_an_exception_in_a_step_leaves_rows_that_can_be_put_back():
    model = _language()
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = Exploding(model.parameters(), lr=0.1)
    optimizer.armed = True
    with pytest.raises(KeyError, match="mine"), frozen.guard(optimizer):
        optimizer.step()
    assert _unmoved(model, before) == []
    assert frozen.verify().ok == (_held(model) == held), "whatever a failed step leaves, a proof tells the truth"
    optimizer.armed = False
    optimizer.step()
    assert _held(model) == held and frozen.verify().ok


def test_a_write_after_a_step_that_failed_is_found_and_not_healed():
    """What a failed step left aside is put back once, and not held against all later writes."""
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = Exploding(model.parameters(), lr=0.1)
    optimizer.armed = True
    with pytest.raises(KeyError, match="mine"):
        optimizer.step()
    optimizer.armed = False
    optimizer.step()
    assert frozen.verify().ok
    guard = frozen.guard(optimizer)
    model.embed.weight.data[0] += 1
    spoilt = _held(model)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"after step 1, 1 frozen tensor changed:\n  embed\.weight"):
        optimizer.step()
    guard.remove()
    assert _held(model) == spoilt


def test_what_is_repaired_after_an_alarm_stays_repaired():
    model = _language()
    held = _held(model)
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    published = copy.deepcopy(model.state_dict())
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="after step 1"), frozen.guard(optimizer):
        model.embed.weight.data[0] += 1
        _step(model, optimizer)
    model.load_state_dict(published)
    with frozen.guard(optimizer):
        for step in range(2):
            _step(model, optimizer, step)
            assert _held(model) == held


class DecaysAfterwards(torch.optim.SGD):
    """Does something of its own after the step that it inherits, as many optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer, and then pulls weights back, as Lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer, *, own: bool = False) -> None:
        self.inner = inner
        groups = [{"params": [nn.Parameter(torch.zeros(1))]}] if own else inner.param_groups
        super().__init__([dict(group) for group in groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: DecaysAfterwards(p, **SGD),
        lambda p: Wrapping(torch.optim.SGD(list(p), **SGD)),
        lambda p: Wrapping(torch.optim.SGD(list(p), **SGD), own=True),
    ],
    ids=["inherited", "wrapped", "wrapped, with groups of its own"],
)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_rows_stand_still_under_steps_within_steps(make, guarded):
    model = _language()
    torch.optim.SGD(model.parameters(), lr=0.1)  # the class that is inherited has its hooks by now
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = make(model.parameters())
    watching = frozen.guard(optimizer) if guarded else None
    for step in range(3):
        _step(model, optimizer, step)
        assert _held(model) == held, f"after step {step + 1}"
    assert _unmoved(model, before) == []
    if watching is not None:
        watching.remove()


def test_a_write_to_a_frozen_row_is_found_at_the_next_step_and_not_healed():
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    guard = frozen.guard(optimizer, every=1)
    for step in range(3):
        _step(model, optimizer, step)
    model.embed.weight.data.view(torch.int32)[HELD - 1, 2] ^= 1
    spoilt = _held(model)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"after step 4, 1 frozen tensor changed:\n  embed\.weight"):
        _step(model, optimizer)
    guard.remove()
    assert _held(model) == spoilt
    _step(model, optimizer)
    assert _held(model) == spoilt
    assert [one.name for one in frozen.verify().drifted] == ["embed.weight"]


def test_a_write_to_a_free_row_is_nobodys_business():
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    with frozen.guard(optimizer):
        model.embed.weight.data[HELD:] = 7
        _step(model, optimizer)


def test_a_resized_model_is_held_by_the_rows_that_it_kept():
    """A model that grew after publication: the manifest's rows are there, with more of them below."""
    model = _language()
    manifest = ckptsurg.make_manifest([{"match": "embed.weight", "rows": f"[:{HELD}]"}], model)
    report = ckptsurg.verify(manifest, {**model.state_dict(), "embed.weight": torch.cat([model.embed.weight] * 2)})
    assert report.ok
    wider = nn.Embedding(2 * WORDS, WIDTH)
    wider.weight.data[:WORDS] = model.embed.weight.data
    model.embed = wider
    held = _held(model, ("embed",))
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1, weight_decay=0.1)
    with frozen.guard(optimizer):
        _step(model, optimizer)
    assert _held(model, ("embed",)) == held


def test_freeze_refuses_a_model_without_the_rows():
    model = _language()
    manifest = ckptsurg.make_manifest([ROWS], model)
    model.embed.weight.data[0, 0] += 1
    with pytest.raises(ckptsurg.FreezeError, match=r'"embed\.weight" has other bits'):
        ckptsurg.freeze(model, manifest)
    model = _language()
    model.head.weight.data[HELD:] += 1  # these train: an earlier run may have
    ckptsurg.freeze(model, manifest)


def test_what_is_saved_of_the_model_is_proven(tmp_path):
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    _step(model, torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1))
    assert frozen.verify_saved(model.state_dict()).ok
    save_file(model.state_dict(), tmp_path / "saved.safetensors")
    assert frozen.verify_saved(tmp_path / "saved.safetensors").ok
    spoilt = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoilt["embed.weight"][0, 0] += 1
    assert [one.name for one in frozen.verify_saved(spoilt).drifted] == ["embed.weight"]
