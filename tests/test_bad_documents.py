"""Bad specs and manifests beyond the cases: what is too large for a case, what costs time, and laws for every text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ckptsurg

# --- Specs ------------------------------------------------------------------------------------------

#: What is too large for a case.
LARGE = {
    "whole-number.yaml": (f"version: 1\nseed: {'9' * 5000}\n", "a number of 5,000 digits"),
    "float.yaml": (f"version: 1\nseed: 0.{'9' * 4998}\n", "a number of 5,000 digits"),
    "hexadecimal.yaml": (f"version: 1\nseed: 0x{'f' * 4998}\n", "a number of 5,000 digits"),
    "brackets.yaml": (f"version: 1\nfreeze: {'[' * 5000}{']' * 5000}\n", "nested more than"),
    "braces.yaml": (f"version: 1\nfreeze: {'{a: ' * 5000}{'}' * 5000}\n", "nested more than"),
    "dashes.yaml": (f"version: 1\nfreeze:\n{'- ' * 5000}fc\n", "nested more than"),
    "over-1-mib.yaml": ("version: 1\n#" + "x" * (1 << 20), "larger than 1,048,576 bytes"),
    "number.json": ('{"version": 1, "seed": ' + "9" * 5000 + "}", "a number of 5,000 digits"),
    "brackets.json": ('{"version": 1, "freeze": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    "over-1-mib.json": ('{"version": 1}' + " " * (1 << 20), "larger than 1,048,576 bytes"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tied tensors and a vector, which are frozen; and a head that trains."""
    square = np.arange(4, dtype=np.float32).reshape(2, 2)
    tensors = {"conv.weight": square, "twin.weight": square, "conv.bias": square[0], "fc.weight": square[:1]}
    save_file(tensors, path := tmp_path_factory.mktemp("base") / "base.safetensors")
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", LARGE)
def test_a_large_spec_is_refused_in_little_time(tmp_path: Path, name: str) -> None:
    content, fragment = LARGE[name]
    path = write(tmp_path / name, content)
    started = time.process_time()
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.load_spec(path)
    assert time.process_time() - started < 5
    message = str(caught.value)
    assert message.startswith(f"{path}")
    assert fragment in message
    assert message.replace("\n", "").isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *((text, text) for text in ("no", "yes", "off", "on", "y", "N", "017", "1_000", "1:30", "2001-01-01", "0b1")),
        *((text, text) for text in ("=", "<<", "1.2.3", "e5", "+", "-.", "0o8", "NO", "TRue", "nULL", ".")),
        *(("'1'", "1"), ("'null'", "null"), ("~", None), ("", None), ("null", None), ("Null", None)),
    ],
)
def test_text_is_what_the_core_schema_of_yaml_1_2_reads_as_text(
    tmp_path: Path, written: str, value: str | None
) -> None:
    assert ckptsurg.load_spec(write(tmp_path / "spec.yaml", f"version: 1\nname: {written}\n")).name == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(
            ("1e-3", 0.001),
            ("1E+3", 1000.0),
            (".5", 0.5),
            ("5.", 5.0),
            ("-2", -2),
            ("0x1F", 31),
            ("0o17", 15),
            ("0", 0),
        ),
        *(("true", True), ("False", False), ("no", "no"), ("017", "017"), ("[1, {a: ~}]", [1, {"a": None}])),
    ],
)
def test_values_for_the_config_are_read_as_the_core_schema_has_them(tmp_path: Path, written: str, value: Any) -> None:
    spec = ckptsurg.load_spec(write(tmp_path / "spec.yaml", f"version: 1\nconfig: {{set: {{key: {written}}}}}\n"))
    found = spec.config.set["key"]
    assert (type(found), found) == (type(value), value)


def test_everything_wrong_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    content = "version: 1\nseed: no\nreinit:\n- {match: fc, init: kaiming, keep: 1}\nadd:\n- {name: x}\ntrian: fc\n"
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.load_spec(write(tmp_path / "spec.yaml", content))
    found = [(problem.line, problem.path) for problem in caught.value.problems]
    places = {(2, "seed"), (4, "reinit[0].init"), (4, "reinit[0].keep"), (6, "add[0]"), (7, "trian")}
    assert places <= set(found)
    assert [line for line, _ in found] == sorted(line for line, _ in found)


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_spec_that_is_no_file_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ckptsurg.UsageError):
        ckptsurg.load_spec(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        "freeze: " + "[" * 1_000_000,
        "freeze: " + "{" * 1_000_000,
        "freeze:\n" + "- " * 500_000,
        "? " * 500_000,
        "freeze: [" + "!a, " * 250_000 + "]",
        "freeze: [" + "a, " * 300_000 + "!b]",
        "freeze: [" + "[a:" * 300_000 + "]",
        "freeze: *" + "a" * 1_000_000,
        "freeze: !" + "[0:" * 300_000,
        "freeze: [" + "x" * 1_000_000 + "[0:",
        "freeze: [" + "&" * 1_000_000,
        "freeze: '" + "a" * 1_000_000,
        "\n" * 1_000_000 + "*",
    ],
    ids=range(13),
)
def test_a_spec_of_1_mib_is_refused_in_little_time(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "spec.yaml", "version: 1\n" + content)
    started = time.process_time()
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.load_spec(path)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("name", "load"), [("spec.json", ckptsurg.load_spec), ("m.json", ckptsurg.load_manifest)])
@pytest.mark.parametrize("key", ["freeze", "tool", "tensors"])
def test_nesting_of_any_depth_is_refused_in_words(
    tmp_path: Path, name: str, load: Callable[[Path], Any], key: str
) -> None:
    # Close to the interpreter's limit, reading may succeed where checking what was read does not.
    for depth in [*range(60, 270, 5), *range(800, 1005)]:
        nested = '{"x":' * depth + "1" + "}" * depth if key == "tensors" else "[" * depth + "]" * depth
        path = write(tmp_path / name, f'{{"version": 1, "{key}": {nested}}}')
        with pytest.raises((ckptsurg.SpecError, ckptsurg.ManifestError)) as caught:
            load(path)
        assert len(str(caught.value)) < 3000


def test_a_config_nested_to_any_depth_is_read_or_refused_in_words(tmp_path: Path) -> None:
    refused = []
    for depth in [10, *range(60, 270, 5), *range(800, 1005)]:
        nested = '{"x":' * depth + "1" + "}" * depth
        path = write(tmp_path / "spec.json", f'{{"version": 1, "config": {{"set": {nested}}}}}')
        try:
            assert ckptsurg.load_spec(path).digest().startswith("blake3:")
        except ckptsurg.SpecError:
            refused.append(depth)
    assert 10 not in refused
    assert 1000 in refused


# --- Patterns ---------------------------------------------------------------------------------------


def named(folder: Path, *names: str) -> Path:
    save_file({name: np.arange(1, dtype=np.float32) for name in names}, folder / "base.safetensors")
    return folder / "base.safetensors"


@pytest.mark.parametrize(
    "pattern",
    [
        "re:(a+)+$",
        "re:(a|aa)+$",
        "re:(.*)*x",
        "re:" + "a?" * 200 + "a" * 200,
        "*a" * 60 + "b",
        "?*" * 60 + "b",
        "**.a." * 60 + "b",
        "{a,b}" * 13 + "z",
    ],
    ids=range(8),
)
def test_no_pattern_takes_exponential_time(tmp_path: Path, pattern: str) -> None:
    base = named(tmp_path, "a" * 20_000 + "!", "a." * 400 + "c", "fc.weight")
    started = time.process_time()
    with pytest.raises(ckptsurg.SpecError):
        ckptsurg.plan({"version": 1, "freeze": pattern}, base)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("written", ["[0:3]", "[:3]", "[-2:]", "[:-1]", "[0:3:2]"])
def test_an_unquoted_slice_comes_with_what_to_type(tmp_path: Path, written: str) -> None:
    base = named(tmp_path, "0.weight", "1.weight", "2.weight", "3.weight", "fc.weight")
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan(write(tmp_path / "spec.yaml", f"version: 1\nfreeze: {written}\n"), base)
    assert "type: " in str(caught.value)
    assert str(caught.value).endswith(f'"{written}"')


def test_a_thousand_alternatives_that_match_nothing_are_one_short_message(tmp_path: Path) -> None:
    base = named(
        tmp_path, *(f"model.layers.{i}.mlp.{part}.weight" for i in range(80) for part in ("up", "down", "gate"))
    )
    started = time.process_time()
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan({"version": 1, "freeze": "layer{0..999}.weight"}, base)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 5000


def test_a_long_pattern_that_cannot_be_read_is_refused_with_its_place(tmp_path: Path) -> None:
    base = named(tmp_path, "a.0.weight", "a.1.weight", "fc.weight")
    pattern = "re:" + "(" * 5000 + "a" + ")" * 5000
    path = write(tmp_path / "spec.yaml", f"version: 1\nfreeze:\n- fc\n- {json.dumps(pattern)}\n")
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan(path, base)
    assert str(caught.value).startswith(f"{path}:4: freeze[1]: ")
    assert len(str(caught.value)) < 1000


PIECES = st.one_of(
    st.sampled_from(
        ["version: 1\n", "freeze:", "reinit:", "shape:", "init:", "config:", "set:", "- ", "? ", "  ", "\n"]
    ),
    st.sampled_from(["*", "&a", "!fc", "**", "|", ">", "#", "%", "---", "...", "<<", "~", "@", "`", "'", '"']),
    st.sampled_from(["0", "0: 1", "1e999", ".nan", "zeros", "no", "{", "}", "[", "]", ",", ":", " "]),
    st.sampled_from(["\t", "\r", "\x85", "\u2028", "\ufeff", "\0", "\ud7ff", "é"]),
)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12))
def test_any_text_is_planned_or_refused_as_a_spec(
    tmp_path_factory: pytest.TempPathFactory, base: Path, pieces: list[str]
) -> None:
    for name in ("any.yaml", "any.json"):
        path = write(tmp_path_factory.getbasetemp() / name, "version: 1\n" + "".join(pieces))
        try:
            plan = ckptsurg.plan(path, base)
        except ckptsurg.SpecError as error:
            message = str(error)
        else:
            assert len(plan.tensors) >= 4
            continue
        assert message.startswith(str(path))


# --- Manifests --------------------------------------------------------------------------------------

Document = dict[str, Any]


@pytest.fixture(scope="module")
def good(base: Path) -> str:
    return ckptsurg.make_manifest(["**", "!fc"], base).to_json()


@pytest.mark.parametrize(("put", "fragment"), [("9" * 5000, "5,000 digits"), ("[" * 5000 + "]" * 5000, "nested too")])
def test_a_large_manifest_is_refused(tmp_path: Path, good: str, put: str, fragment: str) -> None:
    assert good.count('"dropped": 0') == 1
    path = write(tmp_path / "freeze.json", good.replace('"dropped": 0', f'"dropped": {put}'))
    with pytest.raises(ckptsurg.ManifestError) as caught:
        ckptsurg.load_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert fragment in message
    assert len(message) < 2000


def test_a_good_manifest_stays_as_it_is(tmp_path: Path, base: Path, good: str) -> None:
    manifest = ckptsurg.load_manifest(write(tmp_path / "freeze.json", good))
    assert manifest.to_json() == good
    assert ckptsurg.verify(manifest, base).ok


def pinned(document: Document) -> list[Any]:
    """What of a manifest the roots stand for."""
    return [
        document["root"],
        document["frozen_root"],
        document["counts"],
        sorted((name, r["dtype"], r["shape"], r["frozen"], r["digest"]) for name, r in document["tensors"].items()),
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_manifest_with_bytes_changed_is_refused_or_pins_the_same(
    tmp_path_factory: pytest.TempPathFactory, good: str, data: st.DataObject
) -> None:
    raw = bytearray(good.encode())
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(raw)))
        put = data.draw(st.one_of(st.binary(max_size=1), st.sampled_from([b'"', b"\\", b"{}", b"true", b"-", b".0"])))
        raw[at : at + data.draw(st.integers(0, 2))] = put
    path = write(tmp_path_factory.getbasetemp() / "freeze.json", bytes(raw))
    try:
        manifest = ckptsurg.load_manifest(path)
    except ckptsurg.ManifestError as error:
        message = str(error)
    else:
        assert pinned(json.loads(manifest.to_json())) == pinned(json.loads(good))
        return
    assert message.startswith(f"{path}:")
