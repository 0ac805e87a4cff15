"""Bad containers beyond the cases: what is too large for a case, or no file; and laws that hold for every header."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptsurg

from .cases import Contents, as_the_library_reads, cases, expected
from .oracle import BITS

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


#: Of the cases, those of a single file: its bytes, and what is said of it.
BAD = {
    str(case): (case.path.read_bytes(), expected(kind)[case.name]["message"])
    for kind in ("container", "dtypes", "entries", "layout")
    for case in cases(kind)
    if "message" in expected(kind)[case.name]
}
#: And those that are good.
LEGAL = {
    str(case): case.path.read_bytes()
    for kind in ("container", "dtypes", "entries", "layout", "names")
    for case in cases(kind)
    if "reads" in expected(kind)[case.name]
}

# --- What is too large for a case -------------------------------------------------------------------

LARGE = {
    "number-of-5000-digits": (edited("[2]", f"[{'2' * 5000}]"), "5,000 digits"),
    "nested-lists-100000-deep": (edited("[2]", "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "nested-objects-100000-deep": (container('{"a":' * 100_000 + "}" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize("defect", LARGE)
def test_what_is_large_is_refused_in_one_message(tmp_path: Path, defect: str) -> None:
    raw, fragment = LARGE[defect]
    (path := tmp_path / "bad.safetensors").write_bytes(raw)
    result = inspect(path)
    assert_refused(result, "bad.safetensors: ")
    assert fragment in result.stderr
    assert len(result.stderr) < 800


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


def test_the_command_escapes_a_hostile_file_name(tmp_path: Path) -> None:
    (path := tmp_path / "a\x1b[2J\u202eb\n.safetensors").write_bytes(b"")
    result = inspect(path)
    assert_refused(result, r"a\x1b[2J\u202eb\n.safetensors")


# --- What is odd and good ---------------------------------------------------------------------------


def read(folder: Path, raw: bytes) -> Contents:
    (path := folder / "good.safetensors").write_bytes(raw)
    with ckptsurg.open_checkpoint(path) as checkpoint:
        return {
            name: (info.dtype, list(info.shape), b"".join(map(bytes, checkpoint.read(name))))
            for name, info in checkpoint.tensors.items()
        }


@pytest.mark.parametrize("name", ["layer." * 20_000 + "weight", "." * 100_000], ids=["long", "deep"])
def test_a_name_too_large_for_a_case_is_read_as_the_library_reads_it_and_shown_in_short(
    tmp_path: Path, name: str
) -> None:
    raw = container({name: tensor("U8", [2], 0, 2)})
    assert read(tmp_path, raw) == as_the_library_reads(raw)
    result = inspect(tmp_path / "good.safetensors")
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) < 1000


def test_names_that_differ_in_their_separator_alone_are_shown_as_two_tensors(tmp_path: Path) -> None:
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
