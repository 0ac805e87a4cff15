"""A plan that is looked at, kept and carried out as it is, or not at all; and why a tensor has its fate."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

SPEC = """version: 1
name: kept
freeze: ["**", "!fc", {match: "**.bias", where: {ndim: 2}, optional: true}]
drop: "**.gone"
reinit:
- {match: fc, shape: {0: 3}, init: {normal: {std: 0.02}}}
cast:
- {match: "body", dtype: BF16}
- {match: "body.0", dtype: F16}
rename:
- {match: body, to: trunk}
config:
  set: {num_labels: 3}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    torch.manual_seed(0)
    names = ("body.0.weight", "body.1.weight", "body.1.gone", "fc.weight", "fc.bias")
    tensors = {name: torch.randn(*((4,) if name.endswith("bias") else (4, 2))) for name in names}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def run(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "ckptsurg", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_what_was_looked_at_is_what_is_done(folder: Path) -> None:
    shown = run(folder, "plan", "spec.yaml", "base").stdout
    assert run(folder, "plan", "spec.yaml", "base", "-o", "plan.json").stdout == shown
    run(folder, "rewrite", "spec.yaml", "base", "-o", "by-spec")
    run(folder, "rewrite", "plan.json", "base", "-o", "by-plan")
    for name in ("model.safetensors", "freeze.json", "config.json"):
        assert (folder / "by-spec" / name).read_bytes() == (folder / "by-plan" / name).read_bytes()
    # The spec goes its own ways by then.
    (folder / "spec.yaml").write_text("version: 1\nfreeze: fc\n")
    run(folder, "rewrite", "plan.json", "base", "-o", "by-plan", "--overwrite")
    assert (folder / "by-spec" / "freeze.json").read_bytes() == (folder / "by-plan" / "freeze.json").read_bytes()


def _other_base(folder: Path) -> None:
    tensors = load_file(folder / "base" / "model.safetensors")
    save_file(tensors | {"body.2.weight": torch.zeros(1)}, folder / "base" / "model.safetensors")


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / "plan.json").read_text())
        change(document)
        (folder / "plan.json").write_text(json.dumps(document))

    return edit


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the-base": (_other_base, "base: is not what the plan was made of: its headers are others"),
    "a-fate": (
        _edit(lambda plan: plan["tensors"][0].update(frozen=False)),
        "the plan and its spec differ in body.0.weight: one of them was edited",
    ),
    "a-tensor-less": (_edit(lambda plan: plan["tensors"].pop()), "the plan and its spec differ in"),
    "the-seed": (_edit(lambda plan: plan.update(seed=1)), "the plan and its spec differ"),
    "its-spec": (_edit(lambda plan: plan["reviewed"]["spec"].update(seed=1)), "the plan's spec was edited"),
    "what-it-was-made-of": (_edit(lambda plan: plan.pop("reviewed")), "does not say what it was made of"),
    "its-form": (_edit(lambda plan: plan.update(version=2)), "plan.json:1: version: 2 is not known"),
    "a-key": (_edit(lambda plan: plan.update(extra=1)), 'unknown key "extra"'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_is_refused(folder: Path, change: str) -> None:
    edit, said = CHANGES[change]
    run(folder, "plan", "spec.yaml", "base", "-o", "plan.json")
    edit(folder)
    done = run(folder, "rewrite", "plan.json", "base", "-o", "out", code=2)
    assert said in done.stderr and not (folder / "out").exists()


def test_a_kept_plan_replaces_only_a_kept_plan(folder: Path) -> None:
    (folder / "mine.json").write_text("{}")
    run(folder, "plan", "spec.yaml", "base", "-o", "mine.json", code=2)
    done = run(folder, "plan", "spec.yaml", "base", "-o", "mine.json", "--overwrite", code=2)
    assert "is no plan of ckptsurg and is not replaced" in done.stderr
    assert "ends in .json" in run(folder, "plan", "spec.yaml", "base", "-o", "plan", code=2).stderr
    run(folder, "plan", "spec.yaml", "base", "-o", "plan.json")
    run(folder, "plan", "spec.yaml", "base", "-o", "plan.json", code=2)
    run(folder, "plan", "spec.yaml", "base", "-o", "plan.json", "--overwrite")


def reasons(folder: Path, name: str) -> list[tuple[str, str, bool]]:
    document = json.loads(run(folder, "plan", "spec.yaml", "base", "--explain", name, "--json").stdout)
    return [(one["rule"], one["does"], one["decides"]) for one in document["reasons"]]


def test_why_a_tensor_has_its_fate(folder: Path) -> None:
    assert reasons(folder, "fc.bias") == [
        ("freeze[0]", "takes", False),
        ("freeze[1]", "gives away", True),
        ("freeze[2]", "filters out", False),
        ("reinit[0]", "takes", True),
    ]
    assert reasons(folder, "body.1.gone") == [("drop", "takes", True)]
    assert reasons(folder, "trunk.0.weight") == [
        ("freeze[0]", "takes", True),
        ("cast[0]", "takes", False),
        ("cast[1]", "takes", True),
        ("rename[0]", "takes", True),
    ]
    shown = run(folder, "plan", "spec.yaml", "base", "--explain", "body.0.weight").stdout
    assert "body.0.weight -> trunk.0.weight  F16 [4, 2]  cast, frozen" in shown
    assert "  * cast[1]  body.0  takes it" in shown
    done = run(folder, "plan", "spec.yaml", "base", "--explain", "body.0.weigth", code=2)
    assert 'has no tensor "body.0.weigth"' in done.stderr and "body.0.weight" in done.stderr
