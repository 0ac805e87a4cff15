import json
import os
import pickle
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptsurg

#: Bits per element, by the format's own list; not read from the code under test.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
GOOD = '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


def container(header: str | bytes | dict[str, Any], data: bytes = b"\1\2", *, length: int | None = None) -> bytes:
    """A file with this header, well-formed or not; ``length`` is what it says of its header in place of the truth."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":"))
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def edited(old: str, new: str) -> bytes:
    """A good file of one tensor, with one thing in its header written differently."""
    assert GOOD.count(old) == 1
    return container(GOOD.replace(old, new))


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def archive() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    return buffer.getvalue()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 102502592\n"

# --- What must be refused: the file's bytes, and a part of the message -------------------------------

CONTAINER = {
    "empty": (b"", "expected at least 8 bytes, found 0"),
    "shorter-than-8-bytes": (b"\2\0\0\0", "expected at least 8 bytes, found 4"),
    "length-0": (container(GOOD, length=0), "length is 0"),
    "length-over-100-million": (container(GOOD, length=100_000_001), "at most 100,000,000"),
    "length-over-file": (container(GOOD, b"", length=len(GOOD) + 1), f"should have {len(GOOD) + 1} bytes"),
    "length-big-endian": (len(GOOD).to_bytes(8, "big") + GOOD.encode() + b"\1\2", "big-endian"),
    "length-2-to-64": (container(GOOD, length=2**64 - 1), "at most 100,000,000"),
    "git-lfs-pointer": (LFS_POINTER, "Git LFS pointer"),
    "zip-archive": (archive(), "PyTorch"),
    "pickle-protocol-2": (pickle.dumps({"weight": [0.5] * 9}, protocol=2), "PyTorch"),
    "pickle-protocol-4": (pickle.dumps({"weight": [0.5] * 9}, protocol=4), "pickle"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "html-lower-case": (b"<!doctype html><html><body>404</body></html>", "an HTML page"),
    "html-upper-case": (b"<HTML><HEAD><TITLE>404</TITLE></HEAD></HTML>", "an HTML page"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
    "not-utf-8": (container(GOOD.encode().replace(b"a", b"\xff", 1)), "not UTF-8: byte 2 is 0xff"),
    "overlong-utf-8": (container(GOOD.encode().replace(b'"a"', b'"\xc0\xaf"')), "not UTF-8"),
    "surrogate-in-utf-8": (container(GOOD.encode().replace(b'"a"', b'"\xed\xa0\x80"')), "not UTF-8"),
    "utf-16": (container(GOOD.encode("utf-16-le")), "header"),
    "byte-order-mark": (container("\ufeff" + GOOD), "byte order mark"),
    "leading-space": (container(" " + GOOD), 'must begin with "{", found 0x20'),
    "leading-newline": (container("\n" + GOOD), 'must begin with "{", found 0x0a'),
    "padded-with-tab": (container(GOOD + "\t"), "found 0x09"),
    "padded-with-newline": (container(GOOD + " \n "), "found 0x0a"),
    "padded-with-nul": (container(GOOD + "\0"), "found 0x00"),
    "second-document": (container(GOOD + "{}"), "not JSON: Extra data"),
    "second-document-after-space": (container(GOOD + " " + GOOD), "not JSON: Extra data"),
    "trailing-comma": (edited("[0,2]}", "[0,2],}"), "not JSON"),
    "trailing-comma-in-list": (edited("[2]", "[2,]"), "not JSON"),
    "comment": (edited('"shape"', '/* rows */"shape"'), "not JSON"),
    "single-quotes": (edited('"a"', "'a'"), "not JSON"),
    "control-character-in-string": (edited('"a"', '"a\n"'), "not JSON"),
    "nan": (edited("[2]", "[NaN]"), "NaN is not JSON"),
    "infinity": (edited("[2]", "[-Infinity]"), "Infinity is not JSON"),
    "number-of-5000-digits": (edited("[2]", f"[{'2' * 5000}]"), "5,000 digits"),
    "list-for-object": (container("[]"), 'must begin with "{"'),
    "string-for-object": (container('"a"'), 'must begin with "{"'),
    "nested-lists-100000-deep": (edited("[2]", "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "nested-objects-100000-deep": (container('{"a":' * 100_000 + "}" * 100_000), "nested too deeply"),
    "no-tensor": (container("{}", b""), "holds no tensor"),
    "metadata-only": (container('{"__metadata__":{"format":"pt"}}', b""), "holds no tensor"),
}

ENTRIES = {
    "name-twice": (container(GOOD[:-1] + "," + GOOD[1:]), 'the key "a" stands twice'),
    "name-twice-by-escape": (
        container(GOOD[:-1] + "," + GOOD[1:].replace('"a"', '"\\u0061"')),
        'the key "a" stands twice',
    ),
    "metadata-key-twice": (
        container('{"__metadata__":{"k":"1","\\u006b":"2"},' + GOOD[1:]),
        'the key "k" stands twice',
    ),
    "metadata-twice": (container('{"__metadata__":{},"__metadata__":{},' + GOOD[1:]), "stands twice"),
    "field-twice": (edited('"shape":[2]', '"shape":[2],"shape":[2]'), 'the key "shape" stands twice'),
    "unknown-field": (edited('"shape"', '"strides":[1],"shape"'), 'tensor "a": unknown field "strides"'),
    "array-for-entry": (container('{"a":["U8",[2],[0,2]]}'), 'tensor "a": expected an object'),
    "null-for-entry": (container('{"a":null}'), 'tensor "a": expected an object'),
    "string-for-entry": (container('{"a":"U8"}'), 'tensor "a": expected an object'),
    "dtype-missing": (edited('"dtype":"U8",', ""), "the field dtype is missing"),
    "shape-missing": (edited('"shape":[2],', ""), "the field shape is missing"),
    "data-offsets-missing": (edited(',"data_offsets":[0,2]', ""), "the field data_offsets is missing"),
    "metadata-null": (container('{"__metadata__":null,' + GOOD[1:]), "__metadata__ must map text to text"),
    "metadata-list": (container('{"__metadata__":[],' + GOOD[1:]), "__metadata__ must map text to text"),
    "metadata-string": (container('{"__metadata__":"pt",' + GOOD[1:]), "__metadata__ must map text to text"),
    "metadata-number": (container('{"__metadata__":{"epoch":1},' + GOOD[1:]), "must map text to text"),
    "metadata-null-value": (container('{"__metadata__":{"epoch":null},' + GOOD[1:]), "must map text to text"),
    "metadata-object": (container('{"__metadata__":{"epoch":{}},' + GOOD[1:]), "must map text to text"),
    "tensor-called-metadata": (edited('"a"', '"__metadata__"'), "__metadata__ must map text to text"),
    "lone-high-surrogate": (edited('"a"', '"\\ud800"'), "surrogate"),
    "lone-low-surrogate": (edited('"a"', '"\\udc00x"'), "surrogate"),
    "surrogates-reversed": (edited('"a"', '"\\udc00\\ud800"'), "surrogate"),
    "surrogate-in-metadata": (container('{"__metadata__":{"k":"\\ud83d"},' + GOOD[1:]), "surrogate"),
    **{
        f"dtype-{name}": (edited('"U8"', written), "unknown dtype")
        for name, written in {
            "C128": '"C128"',
            "lower-case": '"f32"',
            "number": "4",
            "null": "null",
            "empty": '""',
            "object": '{"U8":null}',
            "list": '["U8"]',
            "with-space": '"U8 "',
        }.items()
    },
    **{
        f"size-{name}": (edited("[2]", f"[{written}]"), fragment)
        for name, (written, fragment) in {
            "negative": ("-2", "a size must be a whole number"),
            "minus-zero": ("-0", "a size must be a whole number"),
            "2.0": ("2.0", "2.0 is not a whole number"),
            "2e0": ("2e0", "2e0 is not a whole number"),
            "string": ('"2"', "a size must be a whole number"),
            "true": ("true", "a size must be a whole number"),
            "null": ("null", "a size must be a whole number"),
            "list": ("[2]", "a size must be a whole number"),
            "2-to-64": (str(2**64), "a size must be a whole number"),
        }.items()
    },
    **{
        f"shape-{name}": (edited("[2]", written), "the shape must be a list")
        for name, written in {"number": "2", "null": "null", "string": '"2"', "object": '{"0":2}'}.items()
    },
    "product-overflows": (edited("[2]", f"[{2**32},{2**32}]"), "more than 2^64 - 1 elements"),
    "product-overflows-to-the-right-value": (edited("[2]", f"[{2**63 + 1},2]"), "more than 2^64 - 1 elements"),
    "product-overflows-before-zero": (
        container({"a": tensor("U8", [2**40, 2**40, 0], 0, 0)}, b""),
        "more than 2^64 - 1 elements",
    ),
    "product-overflows-behind-zero": (
        container({"a": tensor("U8", [0, 2**40, 2**40], 0, 0)}, b""),
        "more than 2^64 - 1 elements",
    ),
    "bits-overflow": (container({"a": tensor("U64", [2**61], 0, 0)}, b""), "but data_offsets"),
    "rank-65": (edited("[2]", str([1] * 64 + [2])), "at most 64 sizes"),
    **{
        f"offsets-{name}": (edited("[0,2]", written), fragment)
        for name, (written, fragment) in {
            "empty": ("[]", "data_offsets must be two numbers"),
            "of-length-1": ("[2]", "data_offsets must be two numbers"),
            "of-length-3": ("[0,2,2]", "data_offsets must be two numbers"),
            "null": ("null", "data_offsets must be two numbers"),
            "object": ('{"0":0,"1":2}', "data_offsets must be two numbers"),
            "float": ("[0.0,2.0]", "0.0 is not a whole number"),
            "string": ('["0","2"]', "data_offsets must be whole numbers"),
            "bool": ("[false,2]", "data_offsets must be whole numbers"),
            "negative": ("[-2,0]", "data_offsets must be whole numbers"),
            "end-before-begin": ("[2,0]", "the begin not after the end"),
            "over-2-to-64": (f"[{2**64},{2**64 + 2}]", "expected its data at 0"),
        }.items()
    },
}

LAYOUT = {
    "first-offset-not-0": (container({"a": tensor("U8", [2], 1, 3)}, b"\0\1\2"), 'a hole before tensor "a"'),
    "hole": (container({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, bytes(3)), "expected its data at"),
    "overlap": (
        container({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, bytes(3)),
        'an overlap before tensor "b": expected its data at 2, found 1',
    ),
    "full-alias": (
        container({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 0, 2)}),
        'an overlap before tensor "b"',
    ),
    "empty-tensor-inside-data": (
        container({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [0], 1, 1)}),
        'an overlap before tensor "b"',
    ),
    "empty-tensor-past-data": (
        container({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [0], 3, 3)}),
        'a hole before tensor "b"',
    ),
    "bytes-below-shape": (edited("[2]", "[3]"), "U8 [3] takes 3 bytes, but data_offsets [0, 2] span 2"),
    "bytes-above-shape": (edited("[2]", "[]"), "takes 1 bytes, but data_offsets [0, 2] span 2"),
    "bytes-for-empty": (edited("[2]", "[2,0]"), "takes 0 bytes"),
    "bytes-of-other-dtype": (edited('"U8"', '"F16"'), "F16 [2] takes 4 bytes"),
    "trailing-bytes": (container(GOOD, b"\1\2\3"), "trailing bytes: expected 2 bytes of data, found 3"),
    "data-cut-short": (container(GOOD, b"\1"), "cut short: expected 2 bytes of data, found 1"),
    "data-absent": (container(GOOD, b""), "cut short"),
    "f4-of-3": (container({"a": tensor("F4", [3], 0, 2)}), "3 elements of F4 do not fill whole bytes"),
    "f4-of-1": (container({"a": tensor("F4", [], 0, 0)}, b""), "do not fill whole bytes"),
    "f6-of-3": (container({"a": tensor("F6_E2M3", [3], 0, 2)}), "3 elements of F6_E2M3 do not fill whole bytes"),
    "f6-of-2": (container({"a": tensor("F6_E3M2", [2], 0, 2)}), "2 elements of F6_E3M2 do not fill whole bytes"),
}

BAD = CONTAINER | ENTRIES | LAYOUT


@pytest.mark.parametrize("defect", BAD)
def test_what_two_readers_could_understand_differently_is_refused(tmp_path: Path, defect: str) -> None:
    raw, fragment = BAD[defect]
    (path := tmp_path / "bad.safetensors").write_bytes(raw)
    with pytest.raises(ckptsurg.CheckpointError) as caught:
        ckptsurg.open_checkpoint(path)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "bad.safetensors: " in message
    assert fragment in message
    assert message.isprintable()
    assert len(message) < 800


def test_the_good_file_that_the_bad_ones_are_made_from_is_good(tmp_path: Path) -> None:
    assert read(tmp_path, container(GOOD)) == {"a": ("U8", [2], b"\1\2")}


@pytest.mark.parametrize(
    ("raw", "hint"),
    [(LFS_POINTER, "git lfs pull"), (archive(), "torch"), (b"<html></html>", "fetch it again")],
    ids=["git-lfs-pointer", "zip-archive", "html"],
)
def test_a_file_of_another_kind_comes_with_the_next_step(tmp_path: Path, raw: bytes, hint: str) -> None:
    (path := tmp_path / "bad.safetensors").write_bytes(raw)
    with pytest.raises(ckptsurg.CheckpointError) as caught:
        ckptsurg.open_checkpoint(path)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("key", ["a", "__metadata__"])
def test_nesting_of_any_depth_is_refused_in_words(tmp_path: Path, key: str) -> None:
    # Close to the interpreter's limit, reading may succeed where showing what was read does not.
    path = tmp_path / "bad.safetensors"
    for depth in range(100, 1010):
        path.write_bytes(container(f'{{"{key}":' + "[" * depth + "]" * depth + "}"))
        with pytest.raises(ckptsurg.CheckpointError, match=r"bad\.safetensors: "):
            ckptsurg.open_checkpoint(path)


def test_a_file_deep_down_is_still_named(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["a-long-folder-name"] * 12)
    folder.mkdir(parents=True)
    (path := folder / "bad.safetensors").write_bytes(b"")
    with pytest.raises(ckptsurg.CheckpointError, match=r"bad\.safetensors"):
        ckptsurg.open_checkpoint(path)


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    before = len(list(Path("/dev/fd").iterdir()))
    for raw, _ in BAD.values():
        path.write_bytes(raw)
        with pytest.raises(ckptsurg.CheckpointError):
            ckptsurg.open_checkpoint(path)
    assert len(list(Path("/dev/fd").iterdir())) == before


# --- No regular file --------------------------------------------------------------------------------


def inspect(path: Path | str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptsurg", "inspect", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def assert_refused(result: subprocess.CompletedProcess[str], name: str) -> None:
    """Exit code 3 and one message that names the file; no traceback."""
    lines = result.stderr.splitlines()
    assert result.returncode == 3, result.stderr
    assert lines[0].startswith("error: ")
    assert name in lines[0]
    assert [line for line in lines[1:] if not line.startswith("hint: ")] == []
    assert result.stdout == ""


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("given", [".", "model.safetensors"])
@pytest.mark.parametrize("make", [make_fifo, make_device])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None], given: str) -> None:
    make(tmp_path / "model.safetensors")
    assert_refused(inspect(tmp_path / given), "model.safetensors")


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert_refused(inspect(tmp_path), "model.safetensors: is a folder")


# --- The command line -------------------------------------------------------------------------------

THROUGH_THE_COMMAND = [
    "empty",
    "git-lfs-pointer",
    "not-utf-8",
    "nested-objects-100000-deep",
    "number-of-5000-digits",
    "lone-high-surrogate",
    "product-overflows",
    "data-cut-short",
]


@pytest.mark.parametrize("defect", THROUGH_THE_COMMAND)
def test_the_command_says_it_in_one_message(tmp_path: Path, defect: str) -> None:
    (path := tmp_path / "bad.safetensors").write_bytes(BAD[defect][0])
    result = inspect(path)
    assert_refused(result, "bad.safetensors: ")
    assert BAD[defect][1] in result.stderr


def test_the_command_escapes_a_hostile_file_name(tmp_path: Path) -> None:
    (path := tmp_path / "a\x1b[2J\u202eb\n.safetensors").write_bytes(b"")
    result = inspect(path)
    assert_refused(result, r"a\x1b[2J\u202eb\n.safetensors")


# --- What the library accepts and the format allows -------------------------------------------------

Contents = dict[str, tuple[str, list[int], bytes]]


def read(folder: Path, raw: bytes) -> Contents:
    (path := folder / "good.safetensors").write_bytes(raw)
    with ckptsurg.open_checkpoint(path) as checkpoint:
        return {
            name: (info.dtype, list(info.shape), b"".join(map(bytes, checkpoint.read(name))))
            for name, info in checkpoint.tensors.items()
        }


def as_the_library_reads(raw: bytes) -> Contents:
    return {
        name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(raw)
    }


def padded(length: int) -> bytes:
    return container(GOOD.ljust(length))


ODD_NAMES = {
    "empty": "",
    "dots-only": "...",
    "slashes-and-dots": "/./..",
    "space": " ",
    "control-characters": "a\0b\x1b[31m\r\n\x7f\x85",
    "bidi": "a\u202eb\u2066c\u200f",
    "line-separators": "a\u2028b\u2029",
    "invisible": "a\u200bb\ufeff",
    "outside-the-bmp": "weights.\U0001f9ca",
    "two-spellings": "e\u0301.\u00e9",
    "pattern-characters": "**.{a,b}[0:3]!?",
    "braces-and-quotes": '{"a":"\\',
    "like-metadata": "__metadata__.weight",
    "very-long": "layer." * 20_000 + "weight",
    "very-deep": "." * 100_000,
}

LEGAL = {
    "header-length-60-like-html": padded(60),
    "header-length-640-like-a-pickle": padded(640),
    "header-length-no-multiple-of-8": container('{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}} ', bytes(8)),
    "data-unaligned": container({"a": tensor("U8", [1], 0, 1), "b": tensor("F64", [1], 1, 9)}, bytes(range(9))),
    "scalar": container({"a": tensor("F32", [], 0, 4)}, b"\0\0\x80?"),
    "empty-tensor-alone": container({"a": tensor("F32", [0], 0, 0)}, b""),
    "empty-tensors-at-every-border": container(
        {
            "first": tensor("F4", [0], 0, 0),
            "a": tensor("U8", [1], 0, 1),
            "between": tensor("F32", [3, 0, 2], 1, 1),
            "between-too": tensor("F6_E2M3", [0], 1, 1),
            "b": tensor("U8", [1], 1, 2),
            "last": tensor("C64", [0, 2**40], 2, 2),
        }
    ),
    "size-2-to-64-less-1-behind-zero": container({"a": tensor("U8", [0, 2**64 - 1], 0, 0)}, b""),
    "rank-64": container({"a": tensor("U8", [1] * 63 + [2], 0, 2)}),
    "order-of-names-not-of-data": container({"a": tensor("U8", [1], 1, 2), "b": tensor("U8", [1], 0, 1)}),
    "fields-in-another-order": container('{"a":{"data_offsets":[0,2],"shape":[2],"dtype":"U8"}}'),
    "white-space-between-tokens": container(GOOD.replace(":", " :\t").replace(",", ",\r\n")),
    "escaped-slash": edited('"a"', '"a\\/b"'),
    "surrogate-pair": edited('"a"', '"\\ud83e\\uddca"'),
    "metadata-empty": container('{"__metadata__":{},' + GOOD[1:]),
    "metadata-last": container(GOOD[:-1] + ',"__metadata__":{"format":"pt"}}'),
    **{f"dtype-{key}": container({"a": tensor(key, [8], 0, bits)}, bytes(range(bits))) for key, bits in BITS.items()},
    **{f"name-{key}": container({name: tensor("U8", [2], 0, 2)}) for key, name in ODD_NAMES.items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", LEGAL)
def test_what_the_format_allows_is_read_as_the_library_reads_it(tmp_path: Path, kind: str) -> None:
    expected = as_the_library_reads(LEGAL[kind])
    assert len(expected) > 0
    assert read(tmp_path, LEGAL[kind]) == expected


def test_odd_names_are_escaped_where_a_person_reads_and_whole_where_a_program_does(tmp_path: Path) -> None:
    names = list(ODD_NAMES.values())
    header = {name: tensor("U8", [1], position, position + 1) for position, name in enumerate(names)}
    (path := tmp_path / "odd.safetensors").write_bytes(container(header, bytes(len(names))))
    shown, document = inspect(path), inspect(path, "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f" {len(names)} tensors" in shown.stdout
    assert {unicodedata.category(c) for c in shown.stdout if c != "\n"}.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})
    assert max(map(len, shown.stdout.splitlines())) < 1000
    assert list(json.loads(document.stdout)["tensors"]) == names
    assert document.stdout.isascii()


def test_a_hostile_name_is_escaped_in_the_message_about_it(tmp_path: Path) -> None:
    (path := tmp_path / "bad.safetensors").write_bytes(container({"w\u202e\x1b[31m\n": tensor("U8", [3], 0, 2)}))
    with pytest.raises(ckptsurg.CheckpointError) as caught:
        ckptsurg.open_checkpoint(path)
    assert r'tensor "w\u202e\x1b[31m\n"' in str(caught.value)


def test_names_that_differ_in_their_separator_alone_are_two_tensors(tmp_path: Path) -> None:
    (path := tmp_path / "odd.safetensors").write_bytes(
        container({"a.b": tensor("U8", [1], 0, 1), "a/b": tensor("U8", [3], 1, 4)}, bytes(4))
    )
    result = inspect(path)
    assert result.returncode == 0
    assert " 4 B" in result.stdout.splitlines()[0]
    assert "U8 [1]" in result.stdout
    assert "U8 [3]" in result.stdout


# --- Any header -------------------------------------------------------------------------------------

TOKENS = st.one_of(
    st.sampled_from('{}[]:,"\\ \t\n\0-+.eE0123456789ab\ufeff\xff'),
    st.sampled_from(
        ['"dtype"', '"shape"', '"data_offsets"', '"__metadata__":', '"F32"', '"F4"', "null", "true", "NaN"]
    ),
    st.sampled_from(
        ["\\u0061", "\\ud800", "\\udc00", "[0,4]", "[]", "{}", "1e0", "-1", str(2**63), str(2**64), "/**/"]
    ),
    st.just(GOOD[1:-1] + ","),
)
SEEDS = [
    container(GOOD)[8:-2],
    json.dumps({"__metadata__": {"format": "pt"}, "a": tensor("U8", [2], 0, 2)}).encode() + b"   ",
    json.dumps({"a": tensor("U8", [1], 0, 1), "b": tensor("F4", [2], 1, 2), "c": tensor("F32", [0], 2, 2)}).encode(),
]


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """A good header of two bytes of data in which pieces were cut out, put in or replaced."""
    header = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(header)))
        cut = draw(st.sampled_from([0, 0, 1, 1, 2, 7]))
        put = draw(st.one_of(st.just(b""), TOKENS.map(str.encode), st.binary(max_size=2)))
        header[at : at + cut] = put
    return bytes(header)


@settings(max_examples=1500, deadline=None)
@given(header=mutated_headers())
def test_what_the_library_rejects_is_refused_and_what_is_accepted_is_read_alike(
    tmp_path_factory: pytest.TempPathFactory, header: bytes
) -> None:
    raw = container(header)
    try:
        expected = as_the_library_reads(raw)
    except safetensors.SafetensorError:
        expected = None
    try:
        found = read(tmp_path_factory.getbasetemp(), raw)
    except ckptsurg.CheckpointError as error:
        message = str(error)
    else:
        assert found == expected
        return
    assert "good.safetensors: " in message
    assert message.isprintable()


@st.composite
def legal_files(draw: st.DrawFn) -> bytes:
    """Tensors with any names, dtypes and small shapes, one after another, in any order in the header."""
    names = draw(
        st.lists(st.text(max_size=12).filter(lambda n: n != "__metadata__"), min_size=1, max_size=5, unique=True)
    )
    header, position = {}, 0
    for name in names:
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3)) + [4] * (BITS[dtype] < 8)
        elements = 1
        for size in shape:
            elements *= size
        end = position + elements * BITS[dtype] // 8
        header[name] = tensor(dtype, shape, position, end)
        position = end
    shuffled = {name: header[name] for name in draw(st.permutations(names))}
    if draw(st.booleans()):
        shuffled["__metadata__"] = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
    text = json.dumps(shuffled, ensure_ascii=draw(st.booleans()))
    return container(text + " " * draw(st.integers(0, 9)), bytes(i % 251 for i in range(position)))


@settings(max_examples=300, deadline=None)
@given(raw=legal_files())
def test_every_legal_file_is_read_as_the_library_reads_it(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    assert read(tmp_path_factory.getbasetemp(), raw) == as_the_library_reads(raw)
