"""What else is given in the place of a spec: one line says what it is, for `check` as for `plan`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
SPEC = 'version: 1\nfreeze: ["**", "!head"]\n'


def run(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "ckptsurg", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that stands beside a spec, as the commands write it."""
    home = tmp_path_factory.mktemp("home")
    (home / "base").mkdir()
    save_file({"body.weight": torch.ones(3), "head.weight": torch.zeros(4, 3)}, home / "base" / "model.safetensors")
    (home / "base" / "config.json").write_text('{"model_type": "none"}')
    run(home, "init", "base", "-o", "specs/new.yaml")
    (home / "spec.yaml").write_text(SPEC)
    run(home, "plan", "spec.yaml", "base", "-o", "plan.json")
    run(home, "rewrite", "spec.yaml", "base", "-o", "out", "--max-shard-size", "40")
    (home / "report.json").write_text(run(home, "verify", "out", "out", "--json").stdout)
    return home


OTHERS = {
    "specs/ckptsurg-spec.schema.json": "is a JSON Schema; expected a spec",
    "out/freeze.json": "is a manifest; expected a spec",
    "plan.json": "is a plan; expected a spec",
    "report.json": "is a report; expected a spec",
    "base/config.json": "is a model's config.json; expected a spec",
    "out/model.safetensors.index.json": "is an index of shards; expected a spec",
    "base": "is the folder of a checkpoint; expected a spec",
    "specs": "is a folder; expected a document",
    "spec.yml": "no such file; nearest: spec.yaml",
    "specs/nwe.yaml": "no such file; nearest: specs/new.yaml",
    "head.yaml": "no such file",
}


@pytest.mark.parametrize("name", OTHERS)
def test_one_line_says_what_it_is(folder: Path, name: str) -> None:
    said = run(folder, "check", name, code=2).stderr.splitlines()[0]
    assert said == f"error: {name}: {OTHERS[name]}"


def test_other_commands_say_the_same(folder: Path) -> None:
    for name in ("specs/ckptsurg-spec.schema.json", "base", "spec.yml"):
        assert run(folder, "plan", name, "base", code=2).stderr.startswith(f"error: {name}: {OTHERS[name]}\n")


def test_the_hook_leaves_the_schema_of_a_draft_aside(folder: Path) -> None:
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    taken = [one for one in names if re.search(hook["files"], one) and not re.search(hook["exclude"], one)]
    assert taken == ["spec.yaml", "specs/new.yaml"]
    assert run(folder, "check", *taken).stdout == "2 specs valid\n"
