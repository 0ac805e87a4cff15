"""Every case of bad input: refused in the words that stand beside it. And odd input that is good: read as others do."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError

import ckptsurg
from ckptsurg.spec import Spec

from .cases import (
    HOME,
    KINDS,
    TABLE,
    Case,
    Contents,
    as_the_library_reads,
    cases,
    content,
    expected,
    library_accepts,
    write_table,
)

ALL = [case for kind in KINDS for case in cases(kind)]
REFUSED = [case for case in ALL if "code" in expected(case.kind).get(case.name, {})]
READ = [case for case in ALL if "reads" in expected(case.kind).get(case.name, {})]
CHECKPOINTS = [case for case in READ if case.kind not in ("manifest", "spec")]
#: What of text would act on a terminal, or hide in it.
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def in_words(case: Case) -> str:
    """What is to be on standard error."""
    entry = expected(case.kind)[case.name]
    message = entry.get("since 3.13", entry["message"]) if sys.version_info >= (3, 13) else entry["message"]
    return f"error: {message}\n" + (f"hint: {entry['hint']}\n" if "hint" in entry else "")


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_it_is_refused_in_these_words_by_every_command(case: Case) -> None:
    entry = expected(case.kind)[case.name]
    assert entry["code"] == (2 if case.kind in ("manifest", "spec") else 3)
    for command in case.commands:
        outcome = case.run(*command)
        assert (outcome.code, outcome.stdout, outcome.stderr) == (entry["code"], "", in_words(case)), command


@pytest.mark.parametrize("case", READ, ids=str)
def test_what_is_good_is_read_by_every_command_and_shown_safely(case: Case) -> None:
    for command in case.commands:
        outcome = case.run(*command)
        assert outcome.code in (0, 1), outcome.stderr
        shown = outcome.stdout.replace("\n", "") + outcome.stderr.replace("\n", "")
        assert {unicodedata.category(character) for character in shown}.isdisjoint(INVISIBLE)
        assert "--json" in command or max(map(len, outcome.stdout.splitlines())) < 1000


@pytest.mark.parametrize("case", CHECKPOINTS, ids=str)
def test_a_checkpoint_is_read_as_others_read_it(case: Case) -> None:
    contents, warnings = case.read()
    assert contents == as_others_read(case.path)
    document = case.run("inspect", "--json", case.name).stdout
    assert list(json.loads(document)["tensors"]) == list(contents) and document.isascii()
    assert warnings == expected(case.kind)[case.name].get("warnings", [])


def as_others_read(path: Path) -> Contents:
    """As the library does, each shard by itself; archives as torch does."""
    if (path / "model.safetensors").exists():
        path /= "model.safetensors"
    if path.is_dir():
        [path] = path.glob("*.index.json")
    if path.name.endswith(".index.json"):
        shards = {path.parent / name for name in json.loads(path.read_bytes())["weight_map"].values()}
        return {name: tensor for shard in shards for name, tensor in as_others_read(shard).items()}
    raw = path.read_bytes()
    try:
        return as_the_library_reads(raw)
    except SafetensorError:
        return as_the_library_reads(safetensors.torch.save(as_torch_reads(raw)))


def as_torch_reads(raw: bytes) -> dict[str, torch.Tensor]:
    loaded: Any = torch.load(io.BytesIO(raw), weights_only=True)
    while not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        [loaded] = [value for value in loaded.values() if isinstance(value, Mapping)]
    return {name: value.clone() for name, value in loaded.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("case", [case for case in READ if case.kind == "spec"], ids=str)
def test_a_spec_is_read_as_others_read_it(case: Case) -> None:
    raw = case.path.read_bytes()
    document = json.loads(raw) if case.name.endswith(".json") else yaml.safe_load(raw)
    assert ckptsurg.load_spec(case.path) == Spec.model_validate(document)


@pytest.mark.parametrize("case", [case for case in READ if case.kind == "manifest"], ids=str)
def test_a_manifest_is_read_as_others_read_it(case: Case) -> None:
    assert json.loads(ckptsurg.load_manifest(case.path).to_json()) == json.loads(case.path.read_bytes())


SINGLE = [case for case in ALL if case.path.is_file() and case.path.suffix == ".safetensors"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if any(case.kind == kind for case in SINGLE)])
def test_nothing_is_read_that_the_library_rejects_and_what_it_accepts_is_marked(kind: str) -> None:
    accepted = {case.name for case in SINGLE if case.kind == kind and library_accepts(case.path)}
    table = {case.name: expected(kind)[case.name] for case in SINGLE if case.kind == kind}
    assert accepted == {name for name, entry in table.items() if "reads" in entry or entry.get("library") == "accepts"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_case_stands_in_its_table_and_the_table_shows_what_is_in_it(kind: str) -> None:
    table = expected(kind)
    assert list(table) == [case.name for case in cases(kind)]
    assert {"code", "reads"} >= {("code" if "code" in entry else "reads") for entry in table.values()}
    for case in cases(kind):
        entry = table[case.name]
        assert entry.get("input") == content(case), case
        assert "input" in entry or "about" in entry, case


def test_there_is_nothing_else() -> None:
    assert sorted(path.name for path in HOME.iterdir() if path.is_dir() and path.name != "__pycache__") == sorted(KINDS)
    assert [case for case in ALL if not case.path.is_dir() and not case.path.is_file()] == []
    large = [path for kind in KINDS for path in (HOME / kind).rglob("*") if path.stat().st_size > 4096]
    assert [path for path in large if path.is_file() and path.name != TABLE] == []


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_message_begins_with_the_path_that_was_given_and_can_be_printed(case: Case) -> None:
    for line in in_words(case).removeprefix("error: ").splitlines():
        assert line.isprintable()
        assert line.startswith((f"{case.name}:", f"{case.name}/", "hint: "))
        assert str(HOME) not in line
        assert len(line) < 1000


#: One of each kind, and what a process alone could get wrong: what it cannot decode, and code that must not run.
AS_PROCESSES = [
    *("container/empty.safetensors", "container/not-utf-8.safetensors", "dtypes/unknown-complex128.safetensors"),
    *("entries/surrogate-high.safetensors", "index/single-file-and-index", "layout/data-cut-short.safetensors"),
    *(
        "manifest/digest-of-arabic-digits.json",
        "manifest/nothing-frozen.json",
        "names/newline-in-a-message.safetensors",
    ),
    *("spec/freeze-and-train.yaml", "spec/not-utf-8.yaml", "torch/payload-beside-weights.pth"),
]


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_a_process_says_the_same(name: str) -> None:
    case = Case(HOME / Path(name).parent, Path(name).name)
    command = [sys.executable, "-m", "ckptsurg", *case.commands[-1]]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=case.folder, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (expected(case.kind)[case.name]["code"], b"")
    assert done.stderr.decode() == in_words(case)


def test_the_tables_are_as_accept_writes_them_and_it_mends_what_is_wrong(tmp_path: Path) -> None:
    for kind in ("container", "layout", "manifest", "spec"):  # of the others come the good files
        shutil.copytree(HOME / kind, tmp_path / kind)
    path = tmp_path / "layout" / TABLE
    path.write_text(path.read_text().replace("a hole before", "no hole before"))
    (tmp_path / "layout" / "alias.safetensors").unlink()
    write_table("layout", tmp_path)
    kept = [entry for entry in (HOME / "layout" / TABLE).read_text().split("\n\n") if not entry.startswith("alias.")]
    assert path.read_text() == "\n\n".join(kept)
