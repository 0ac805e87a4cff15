"""A reader that is not Python: examples/cpp against good files, tampered ones and garbage; what it was written from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits

import ckptsurg
from ckptsurg.checkpoints import open_stored
from ckptsurg.cli.commands import cli
from ckptsurg.schemas import schema
from ckptsurg.tensors import TensorInfo

from . import strategies
from .oracle import BITS, Tensor, read_checkpoint
from .test_bad_containers import BAD, GOOD, LEGAL, container, mutated_headers

ROOT = Path(__file__).parent.parent
SANITIZERS = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"
PAGE = (ROOT / "docs" / "manifest.md").read_text()


def _built(factory: pytest.TempPathFactory, program: str, *variables: str, below: str = "plain") -> Path:
    """A program of examples/cpp, which the first worker that wants it builds for all."""
    home = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    path = home / below / program
    with (home / f"{program}-{below}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make = ["make", "-C", ROOT / "examples" / "cpp", f"BUILD={path.parent}", *variables, path]
        done = subprocess.run(make, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    return _built(tmp_path_factory, "verify_frozen")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The same, which ends with another exit code when it reads what it must not."""
    return _built(tmp_path_factory, "verify_frozen", f"CXXFLAGS={SANITIZERS}", below="sanitized")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Path:
    return _built(tmp_path_factory, "train")


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASAN_OPTIONS": "exitcode=99", "UBSAN_OPTIONS": "exitcode=98"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode in (0, 1, 2, 3), done.stderr
    assert (done.stdout + done.stderr).isascii()
    assert done.stderr.count("\n") == (done.returncode > 1)
    assert done.stderr.startswith("error: ") == (done.returncode > 1)
    return done


def _verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the reader says of each tensor, after a look at its exit code and last line."""
    *lines, last = done.stdout.splitlines()
    found = [
        re.fullmatch(r'(changed|dtype|shape|missing) ("(?:[^"\\]|\\.)*")( expected .*, found .*)?', x) for x in lines
    ]
    assert all(found), done.stdout
    assert done.returncode == (1 if lines else 0)
    assert last.startswith(f"FAILED: {len(lines)} of " if lines else "ok: ")
    return {json.loads(one[2]): one[1] for one in found}


def _published(folder: Path, spec: object, tensors: dict[str, Tensor]) -> Path:
    """The manifest of some tensors, which stand beside it in base.safetensors."""
    strategies.write_file(folder / "base.safetensors", tensors)
    manifest = ckptsurg.make_manifest(spec, folder / "base.safetensors", digest="sha256")
    ckptsurg.write_manifest(manifest, folder / "freeze.json", overwrite=True)
    return folder / "freeze.json"


def _check(reader: Path, manifest: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    trained = manifest.parent / "trained.safetensors"
    strategies.write_file(trained, tensors)
    return _verdicts(_run(reader, manifest, trained))


def _tensor(rng: random.Random, dtype: str, *shape: int) -> Tensor:
    return Tensor(dtype, shape, rng.randbytes(strategies.nbytes(dtype, shape)))


def _flipped(tensor: Tensor, bit: int) -> Tensor:
    raw = bytearray(tensor.data)
    raw[bit // 8] ^= 1 << bit % 8
    return Tensor(tensor.dtype, tensor.shape, bytes(raw))


@pytest.fixture
def model(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    """A manifest and its tensors: one of each dtype is frozen, with odd names and shapes; `head` trains."""
    rng = random.Random(0)
    tensors = {f"of.{dtype}": _tensor(rng, dtype, 3, 8) for dtype in BITS}
    tensors |= {"scalar": _tensor(rng, "F64"), "empty": _tensor(rng, "BF16", 4, 0), "": _tensor(rng, "I32", 2)}
    tensors |= {'"\\/\b\f\n\r\t\x01\x1f\x7f\u2028': _tensor(rng, "U8", 3), "слой.0/重み.🧊": _tensor(rng, "F16", 2, 2)}
    tensors |= {"embed": _tensor(rng, "F32", 6, 3), "head.weight": _tensor(rng, "F32", 5, 4)}
    rows = {"match": "embed", "rows": "[1:4]"}
    return _published(tmp_path, {"version": 1, "freeze": ["**", "!head", rows]}, tensors), tensors


# --- What is a difference, and what is not ----------------------------------------------------------


def test_a_checkpoint_as_it_was_is_ok_and_says_which_root_it_has(reader, model):
    manifest, _ = model
    done = _run(reader, manifest, manifest.parent / "base.safetensors")
    root = ckptsurg.load_manifest(manifest).frozen_root
    assert (done.returncode, done.stdout) == (0, f"ok: {len(BITS) + 6} frozen tensors, {root}\n")


def test_one_flipped_bit_in_a_frozen_tensor_is_named_and_nothing_else(reader, model):
    manifest, tensors = model
    rng = random.Random(1)
    for name, tensor in tensors.items():
        if tensor.data and name not in ("head.weight", "embed"):
            flipped = _flipped(tensor, rng.randrange(8 * len(tensor.data)))
            assert _check(reader, manifest, tensors | {name: flipped}) == {name: "changed"}


def test_what_trains_may_change_grow_or_go_and_others_may_come(reader, model):
    manifest, tensors = model
    rng = random.Random(2)
    for head in (_flipped(tensors["head.weight"], 7), _tensor(rng, "F16", 9, 9, 9)):
        assert _check(reader, manifest, tensors | {"head.weight": head, "lora": _tensor(rng, "F32", 2)}) == {}
    del tensors["head.weight"]
    assert _check(reader, manifest, tensors) == {}


def test_every_other_verdict_says_what_was_expected_and_found(reader, model):
    manifest, tensors = model
    tensors["of.F32"] = Tensor("I32", (3, 8), tensors["of.F32"].data)
    tensors["of.I16"] = Tensor("I16", (8, 3), tensors["of.I16"].data)
    tensors["empty"] = Tensor("BF16", (0, 4), b"")
    del tensors["scalar"]
    verdicts = {"of.F32": "dtype", "of.I16": "shape", "empty": "shape", "scalar": "missing"}
    assert _check(reader, manifest, tensors) == verdicts
    assert _run(reader, manifest, manifest.parent / "trained.safetensors").stdout.splitlines() == [
        'shape "empty" expected BF16 [4,0], found BF16 [0,4]',
        'dtype "of.F32" expected F32 [3,8], found I32 [3,8]',
        'shape "of.I16" expected I16 [3,8], found I16 [8,3]',
        'missing "scalar"',
        f"FAILED: 4 of {len(BITS) + 6} frozen tensors differ",
    ]


def test_of_a_tensor_that_is_frozen_in_a_part_only_that_part_counts(reader, model):
    manifest, tensors = model
    embed, row = tensors["embed"], 3 * 4
    for bit in range(0, 8 * len(embed.data), 32):
        is_frozen = row <= bit // 8 < 4 * row
        found = _check(reader, manifest, tensors | {"embed": _flipped(embed, bit)})
        assert found == ({"embed": "changed"} if is_frozen else {})
    for rows, columns, verdict in ((9, 3, None), (4, 3, None), (3, 3, "shape"), (0, 3, "shape"), (6, 2, "shape")):
        data = (embed.data + bytes(100))[: rows * columns * 4]
        found = _check(reader, manifest, tensors | {"embed": Tensor("F32", (rows, columns), data)})
        assert found == ({"embed": verdict} if verdict else {})
    assert _check(reader, manifest, tensors | {"embed": Tensor("F32", (), embed.data[:4])}) == {"embed": "shape"}


def test_of_tied_tensors_one_may_be_missing_if_its_twin_is_unchanged(reader, tmp_path):
    rng = random.Random(3)
    embed, bias = _tensor(rng, "BF16", 4, 3), _tensor(rng, "BF16", 4)
    tensors = {"embed": embed, "head": embed, "third": embed, "bias": bias, "other": bias}
    manifest = _published(tmp_path, "**", tensors)
    assert _check(reader, manifest, {"third": embed, "bias": bias, "other": bias}) == {}
    assert _check(reader, manifest, {"third": embed, "bias": bias}) == {"other": "missing"}
    moved = {"third": _flipped(embed, 0), "bias": bias, "other": bias}
    assert _check(reader, manifest, moved) == {"embed": "missing", "head": "missing", "third": "changed"}
    one_moved = {"third": embed, "head": _flipped(embed, 0), "bias": bias, "other": bias}
    assert _check(reader, manifest, one_moved) == {"head": "changed"}


def test_a_tensor_larger_than_the_buffer_is_read_to_its_end(reader, tmp_path):
    large = Tensor("U8", (3, 1_000_003), random.Random(4).randbytes(3_000_009))
    manifest = _published(tmp_path, {"version": 1, "freeze": [{"match": "w", "rows": "[1:]"}]}, {"w": large})
    assert _check(reader, manifest, {"w": _flipped(large, 8 * 1_000_003 - 1)}) == {}
    for byte in (1_000_003, 2_097_152, 3_000_008):
        assert _check(reader, manifest, {"w": _flipped(large, 8 * byte)}) == {"w": "changed"}


# --- Agreement with ckptsurg ------------------------------------------------------------------------


def _tampered(rng: random.Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some tensors changed in some way, trainable ones and rows that train among them."""
    after = dict(tensors)
    for name in rng.sample(list(after), min(len(after), rng.choice([0, 1, 1, 2, 3]))):
        tensor = after[name]
        same_width = [dtype for dtype, bits in BITS.items() if bits == BITS[tensor.dtype] and dtype != tensor.dtype]
        kind = rng.choice(["flip", "flip", "drop", "reshape", "retype", "widen", "rows"])
        if kind == "flip" and tensor.data:
            after[name] = _flipped(tensor, rng.randrange(8 * len(tensor.data)))
        elif kind == "drop" and len(after) > 1:
            del after[name]
        elif kind == "reshape":
            after[name] = Tensor(tensor.dtype, (1, *tensor.shape), tensor.data)
        elif kind == "retype" and same_width:
            after[name] = Tensor(rng.choice(same_width), tensor.shape, tensor.data)
        elif kind == "widen" and tensor.dtype == "BF16":
            pairs = (tensor.data[place : place + 2] for place in range(0, len(tensor.data), 2))
            after[name] = Tensor("F32", tensor.shape, b"".join(b"\0\0" + pair for pair in pairs))
        elif kind == "rows" and tensor.shape and tensor.shape[0]:
            row = len(tensor.data) // tensor.shape[0]
            count = rng.choice([tensor.shape[0] - 1, tensor.shape[0] + 1]) if len(tensor.data) % 8 == 0 else 0
            data = (tensor.data + bytes(row))[: row * count]
            if strategies.nbytes(tensor.dtype, (count, *tensor.shape[1:])) == len(data):
                after[name] = Tensor(tensor.dtype, (count, *tensor.shape[1:]), data)
    return after


def _spec(rng: random.Random, tensors: dict[str, Tensor]) -> dict:
    freeze: list = ["re:(?s).*"]
    for name, tensor in tensors.items():
        fate = rng.random()
        if fate < 0.3 and name != next(iter(tensors)):
            freeze.append({"match": f"!{name}", "optional": True})
        elif fate < 0.5 and tensor.shape and tensor.shape[0] > 1 and BITS[tensor.dtype] >= 8:
            start = rng.randrange(tensor.shape[0])
            freeze.append({"match": name, "rows": f"[{start}:{rng.randint(start + 1, tensor.shape[0])}]"})
    return {"version": 1, "freeze": freeze}


def test_the_command_and_the_reader_say_the_same_of_random_tamperings(reader, tmp_path):
    seen: Counter[str] = Counter()
    for seed in range(120):
        rng = random.Random(seed)
        tensors = strategies.tensors_of(rng)
        manifest = _published(tmp_path, _spec(rng, tensors), tensors)
        folder = tmp_path / str(seed)
        trained = strategies.write_checkpoint(rng, folder, _tampered(rng, tensors))  # a file, a folder, or shards
        mine = _verdicts(_run(reader, manifest, trained))
        command = ["verify", str(manifest), str(trained), "--json"]
        theirs = CliRunner().invoke(cli, command, standalone_mode=False, catch_exceptions=False)
        report = json.loads(theirs.stdout)
        said = {one["name"]: one["verdict"].replace("dtype_only", "dtype") for one in report["drifted"]}
        assert (mine, bool(mine)) == (said, not report["ok"]), seed
        seen.update([*said.values(), *(["ok"] if report["ok"] else [])])
    assert min(seen[verdict] for verdict in ("ok", "changed", "dtype", "shape", "missing")) >= 5, seen


# --- What is refused --------------------------------------------------------------------------------


def _edited(document: dict, place: str, value: object) -> dict:
    *parents, key = place.split("/")
    inner = document
    for parent in parents:
        inner = inner[parent]
    assert json.dumps(inner.get(key)) != json.dumps(value)
    inner[key] = value
    return document


EDITS = {
    "version": 2,
    "root": f"sha256:{'0' * 64}",
    "frozen_root": f"sha256:{'0' * 64}",
    "tensors/of.F32/digest": f"sha256:{'0' * 64}",
    "tensors/of.F32/frozen": False,
    "tensors/of.F32/dtype": "I32",
    "tensors/of.F32/shape": [8, 3],
    "tensors/of.F32/from": True,
    "tensors/of.F32/rows": {"start": 0, "stop": 1, "digest": f"sha256:{'0' * 64}"},
    "tensors/head.weight/digest": f"sha256:{'0' * 64}",
    "tensors/head.weight/frozen": 0,
    "tensors/embed/rows/start": 2,
    "tensors/embed/rows/stop": 7,
    "tensors/embed/rows/digest": f"sha256:{'0' * 63}",
    "tensors/scalar/shape": [1.0],
    "tensors/scalar/dtype": "f64",
    "tensors/empty": None,
    "tensors/of.F64": [],
    "tensors": {},
    "tensors/new": {"dtype": "U8", "shape": [], "frozen": True, "origin": "added", "digest": f"sha256:{'0' * 64}"},
}


@pytest.mark.parametrize("place", EDITS)
def test_an_edited_manifest_is_refused(sanitized, model, place):
    manifest, _ = model
    manifest.write_text(json.dumps(_edited(json.loads(manifest.read_text()), place, EDITS[place])))
    assert _run(sanitized, manifest, manifest.parent / "base.safetensors").returncode == 2
    with pytest.raises(ckptsurg.ManifestError):
        ckptsurg.load_manifest(manifest)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "version: 1", '{"version": 1, "version": 1}', "\xff", "[" * 100_000, '{"a": 1e999}'],
    ids=["empty", "open", "list", "yaml", "key-twice", "no-utf-8", "deep", "number"],
)
def test_what_is_no_manifest_is_refused(sanitized, model, text):
    manifest, _ = model
    manifest.write_bytes(text.encode("latin-1"))
    assert _run(sanitized, manifest, manifest.parent / "base.safetensors").returncode == 2


def test_a_removed_tensor_is_found_in_the_manifest(reader, model):
    manifest, _ = model
    document = json.loads(manifest.read_text())
    del document["tensors"]["of.F32"]
    manifest.write_text(json.dumps(document))
    done = _run(reader, manifest, manifest.parent / "base.safetensors")
    assert done.returncode == 2 and "its roots do not match" in done.stderr


def test_digests_that_it_cannot_compute_come_with_the_next_step(reader, model):
    manifest, _ = model
    blake = ckptsurg.make_manifest("**", manifest.parent / "base.safetensors")
    ckptsurg.write_manifest(blake, manifest, overwrite=True)
    done = _run(reader, manifest, manifest.parent / "base.safetensors")
    assert done.returncode == 2 and "make the manifest with --digest sha256" in done.stderr


def test_usage_and_paths_that_are_not_there(reader, model, tmp_path):
    manifest, _ = model
    assert _run(reader, manifest).stderr == "error: usage: verify_frozen MANIFEST CHECKPOINT\n"
    for paths in ((manifest, tmp_path / "none.safetensors"), (tmp_path / "none.json", manifest), (manifest, tmp_path)):
        assert _run(reader, *paths).returncode == 2
    nothing = _published(tmp_path, {"version": 1, "train": "**"}, {"w": Tensor("U8", (1,), b"x")})
    assert "nothing is frozen" in _run(reader, nothing, tmp_path / "base.safetensors").stderr


def test_malformed_files_are_refused(sanitized, tmp_path):
    manifest = _published(tmp_path, "**", {"a": Tensor("U8", (2,), b"\1\2")})
    for defect, (raw, _) in BAD.items():
        (tmp_path / "trained.safetensors").write_bytes(raw)
        assert _run(sanitized, manifest, tmp_path / "trained.safetensors").returncode == 3, defect


def test_odd_files_that_the_format_allows_are_read(reader, tmp_path):
    for kind, raw in LEGAL.items():
        (tmp_path / "odd.safetensors").write_bytes(raw)
        manifest = ckptsurg.make_manifest("re:(?s).*", tmp_path / "odd.safetensors", digest="sha256")
        ckptsurg.write_manifest(manifest, tmp_path / "freeze.json", overwrite=True)
        assert _run(reader, tmp_path / "freeze.json", tmp_path / "odd.safetensors").returncode == 0, kind


def test_what_stands_behind_a_nul_is_not_overlooked(sanitized, tmp_path):
    manifest = _published(tmp_path, "**", {"a": Tensor("U8", (2,), b"\1\2")})
    (tmp_path / "trained.safetensors").write_bytes(container(GOOD + "\0}"))
    assert _run(sanitized, manifest, tmp_path / "trained.safetensors").returncode == 3
    manifest.write_bytes(manifest.read_bytes() + b"\0and more")
    assert _run(sanitized, manifest, tmp_path / "base.safetensors").returncode == 2


def test_a_file_that_is_cut_short_anywhere_is_refused(sanitized, tmp_path):
    manifest = _published(tmp_path, "**", {"a": Tensor("U8", (2,), b"\1\2"), "b": Tensor("F32", (1,), b"abcd")})
    raw = (tmp_path / "base.safetensors").read_bytes()
    for length in (*range(20), *range(len(raw) - 8, len(raw))):
        (tmp_path / "trained.safetensors").write_bytes(raw[:length])
        assert _run(sanitized, manifest, tmp_path / "trained.safetensors").returncode == 3


@settings(max_examples=60, deadline=None)
@given(raw=mutated_headers())
def test_it_refuses_the_mutated_headers_that_ckptsurg_refuses(sanitized, tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("mutated")
    manifest = _published(folder, "**", {"a": Tensor("U8", (2,), b"\1\2")})
    (folder / "trained.safetensors").write_bytes(raw)
    codes = {0, 1}
    try:
        ckptsurg.open_checkpoint(folder / "trained.safetensors").close()
    except ckptsurg.CheckpointError:
        codes = {3}
    assert _run(sanitized, manifest, folder / "trained.safetensors").returncode in codes


INDEXES = {
    "leaves-the-folder": {"a": "../trained/one.safetensors"},
    "absolute": {"a": "/etc/passwd"},
    "no-safetensors": {"a": "one.bin"},
    "no-text": {"a": 1},
    "shard-missing": {"a": "two.safetensors"},
    "tensor-its-shard-lacks": {"a": "one.safetensors", "b": "one.safetensors"},
    "tensor-that-the-index-lacks": {"b": "one.safetensors"},
    "list": ["one.safetensors"],
    "empty": {},
}


@pytest.mark.parametrize("defect", INDEXES)
def test_an_index_that_is_no_good_is_refused(sanitized, tmp_path, defect):
    manifest = _published(tmp_path, "**", {"a": Tensor("U8", (2,), b"\1\2")})
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(container(GOOD))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert _run(sanitized, manifest, folder).returncode == _run(sanitized, manifest, index).returncode == 0
    index.write_text(json.dumps({"weight_map": INDEXES[defect]}))
    assert _run(sanitized, manifest, folder).returncode == _run(sanitized, manifest, index).returncode == 3


# --- The page from which a reader can be written ----------------------------------------------------


def _block(kind: str, containing: str) -> str:
    [found] = [
        text
        for language, text in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
        if kind == language and containing in text
    ]
    return found


def _sha256(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _documented() -> tuple[dict, bytes, dict[str, bytes]]:
    """The page's manifest, header and tensors."""
    rows = re.findall(r"^(\S+) +[A-Z0-9]+ +\[.*?\] +([0-9a-f ]+)$", _block("text", "in hexadecimal"), re.MULTILINE)
    header = _block("text", "data_offsets").strip().encode() + b" " * 7
    return json.loads(_block("json", "frozen_root")), header, {name: bytes.fromhex(digits) for name, digits in rows}


def test_the_digests_on_the_page_are_true():
    manifest, header, contents = _documented()
    assert manifest["tensors"].keys() == contents.keys() and len(contents) == 4
    assert manifest["base"][0]["header_digest"] == _sha256(header)
    lines: dict[str, list[str]] = {"root": [], "frozen_root": []}
    for name in sorted(manifest["tensors"], key=str.encode):
        record = manifest["tensors"][name]
        assert record["digest"] == _sha256(contents[name])
        line = [name, record["dtype"], record["shape"], record["frozen"], record["digest"]]
        if rows := record.get("rows"):
            row = len(contents[name]) // record["shape"][0]
            assert rows["digest"] == _sha256(contents[name][rows["start"] * row : rows["stop"] * row])
            line.append([rows["start"], rows["stop"], rows["digest"]])
        for key, digest in (("root", line[4]), ("frozen_root", None if rows else line[4])):
            if key == "root" or record["frozen"]:
                text = json.dumps([*line[:4], digest, *line[5:]], separators=(",", ":"), ensure_ascii=False)
                lines[key].append(text + "\n")
    for key, containing in (("root", '["head.weight",'), ("frozen_root", "true,null,")):
        text = "".join(lines[key])
        assert text == _block("text", containing)
        assert manifest[key] == _sha256(text.encode())


def test_ckptsurg_makes_the_manifest_on_the_page_and_the_reader_takes_it(reader, tmp_path):
    manifest, header, contents = _documented()
    base = tmp_path / "base.safetensors"
    base.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(contents.values()))
    (tmp_path / "spec.yaml").write_text(_block("yaml", "version: 1"))
    made = json.loads(ckptsurg.make_manifest(tmp_path / "spec.yaml", base, digest="sha256").to_json())
    assert made | {"tool": None} == manifest | {"tool": None}
    (tmp_path / "page.json").write_text(_block("json", "frozen_root"))
    assert _run(reader, tmp_path / "page.json", base).returncode == 0


def test_the_page_names_every_key():
    document = schema("manifest")
    keys = {key for part in (document, *document["$defs"].values()) for key in part["properties"]}
    assert len(keys) > 20 and {key for key in keys if f"`{key}`" not in PAGE} == set()


def test_what_stands_for_the_header_of_another_format(tmp_path):
    (path := tmp_path / "model.pth").write_bytes(b"not looked at")
    stored = open_stored(path, path.name, {"b": TensorInfo("F32", (2, 3)), "a": TensorInfo("I64", ())})
    assert stored.header_digest("sha256") == _sha256(b'{"a":["I64",[]],"b":["F32",[2,3]]}')
    os.close(stored.descriptor)


# --- X1: a framework of one's own -------------------------------------------------------------------

FROZEN = {f"layers.{number}.{leaf}" for number in range(11) for leaf in ("weight", "bias")}


@pytest.fixture
def perceptron(tmp_path, trainer):
    """Trains a perceptron of 14 layers in C++, after ckptsurg has made its manifest; answers the trained file."""
    generator = np.random.default_rng(0)
    widths = [64, *[32] * 13, 10]
    tensors = {}
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        weight = generator.standard_normal((outputs, inputs)) * np.sqrt(2 / inputs)
        tensors[f"layers.{number}.weight"] = weight.astype(np.float32)
        tensors[f"layers.{number}.bias"] = generator.standard_normal(outputs).astype(np.float32) / 10
    base, manifest = tmp_path / "base.safetensors", tmp_path / "base.freeze.json"
    save_file(tensors, base)
    images, labels = load_digits(return_X_y=True)
    save_file(
        {"images": (images / 16).astype(np.float32), "labels": labels.astype(np.int64)}, tmp_path / "data.safetensors"
    )
    spec = ROOT / "specs" / "x1-first-layers-by-index.yaml"
    _ckptsurg("manifest", spec, base, "-o", manifest, "--digest", "sha256")

    def train(*slip: str) -> Path:
        trained = tmp_path / "trained.safetensors"
        done = subprocess.run(
            [trainer, base, manifest, tmp_path / "data.safetensors", trained, *slip], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        first, last = map(float, re.findall(r"loss ([0-9.]+)", done.stdout))
        assert last < first - 0.1
        return trained

    return base, manifest, train


def _ckptsurg(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "ckptsurg", *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_x1_first_layers_by_index(reader, perceptron):
    base, manifest, train = perceptron
    trained = train()
    assert _verdicts(_run(reader, manifest, trained)) == {}
    _ckptsurg("verify", manifest, trained, "--expect-trained")
    before, after = read_checkpoint(base).tensors, read_checkpoint(trained).tensors
    assert {name for name in before if before[name].data == after[name].data} == FROZEN
    assert load_file(trained).keys() == before.keys()


def test_x1_with_gradients_of_zero_is_moved_by_the_weight_decay(reader, perceptron):
    base, manifest, train = perceptron
    trained = train("zero-gradient")
    assert _verdicts(_run(reader, manifest, trained)) == dict.fromkeys(FROZEN, "changed")
    report = json.loads(_ckptsurg("verify", manifest, trained, "--baseline", base, "--json", code=1))
    assert {one["name"]: one["cause"] for one in report["drifted"]} == dict.fromkeys(FROZEN, "weight_decay")


def test_x1_by_a_substring_takes_layers_1_for_layers_11(reader, perceptron):
    _, manifest, train = perceptron
    trained = train("substring")
    moved = {f"layers.{number}.{leaf}": "changed" for number in (1, 10) for leaf in ("weight", "bias")}
    assert _verdicts(_run(reader, manifest, trained)) == moved
    report = json.loads(_ckptsurg("verify", manifest, trained, "--json", code=1))
    assert {one["name"]: one["verdict"] for one in report["drifted"]} == moved
