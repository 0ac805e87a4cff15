"""`rows`: a part of a tensor that is frozen along its first dimension, in documents and in files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckptsurg
from ckptsurg.tensors import CHUNK_BYTES, DTYPE_BITS


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
    from ckptsurg.schemas import schema

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
