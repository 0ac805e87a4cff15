"""What importing and starting costs: no framework, and torch only where it is needed."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptsurg

FRAMEWORKS = {"torch", "tensorflow", "keras", "transformers", "jax", "lightning", "safetensors", "sklearn", "pytest"}


def _imported_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def _command(*arguments: object, code: int = 0) -> str:
    return (
        f"sys.argv = {['ckptsurg', *map(str, arguments)]!r}\n"
        "from ckptsurg.cli import main\n"
        f"try:\n    main()\nexcept SystemExit as exit:\n    assert exit.code == {code}, exit.code"
    )


def test_import_pulls_in_no_framework():
    assert not _imported_after("import ckptsurg") & (FRAMEWORKS | {"numpy", "pydantic", "click"})


def test_the_check_above_can_fail():
    assert "torch" in _imported_after("import ckptsurg, torch") & FRAMEWORKS


def test_commands_on_files_pull_in_no_framework(tmp_path):
    save_file({"fc.weight": torch.randn(3, 4), "body": torch.randn(3)}, tmp_path / "base.safetensors")
    spec = tmp_path / "spec.json"
    spec.write_text('{"version": 1, "freeze": "body", "reinit": [{"match": "fc", "init": {"default": "Linear"}}]}')
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    for arguments in (
        ("--help",),
        ("rewrite", spec, base, "-o", out),
        ("verify", out / "freeze.json", out, "--baseline", out),
        ("diff", out, out),
        ("inspect", base),
    ):
        assert not _imported_after(_command(*arguments)) & FRAMEWORKS


#: What would hold up the start of a command that has no use for it.
SLOW = {"h5py", "ml_dtypes", "numpy", "pydantic", "re2", "rich", "yaml"}


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("--help", set()),
        ("rewrite --help", set()),
        *((f"schema {document}", {"pydantic"}) for document in ("spec", "plan", "manifest", "report")),
        ("inspect base.safetensors", {"pydantic", "rich"}),
        ("inspect base.safetensors --json", {"pydantic"}),
        ("inspect base.safetensors fc", {"pydantic", "rich"}),
        ("plan spec.yaml base.safetensors", {"pydantic", "rich", "yaml"}),
        ("init base.safetensors", {"pydantic", "yaml"}),
        ("check spec.yaml", {"pydantic", "yaml"}),
        ("manifest spec.yaml base.safetensors -o new.json", {"pydantic", "yaml"}),
        ("rewrite spec.yaml base.safetensors -o out", {"pydantic", "yaml"}),
        ("diff base.safetensors base.safetensors", {"pydantic"}),
        ("verify freeze.json base.safetensors", {"pydantic"}),
        ("verify freeze.json base.safetensors --json", {"pydantic"}),
    ],
)
def test_a_command_imports_what_it_needs_and_no_more(tmp_path, monkeypatch, command, needed):
    monkeypatch.chdir(tmp_path)
    _write_checkpoint("base.safetensors")
    assert _imported_after(_command(*command.split())) & (SLOW | FRAMEWORKS) == needed


def test_numpy_is_imported_to_look_into_a_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write_checkpoint("base.safetensors")
    raw = bytearray(Path("base.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("trained.safetensors").write_bytes(raw)
    imported = _imported_after(_command("verify", "freeze.json", "trained.safetensors", code=1))
    assert "numpy" in imported
    assert not imported & FRAMEWORKS


def _write_checkpoint(name: str) -> None:
    """A checkpoint, a spec that freezes it, and its manifest."""
    save_file({"fc.weight": torch.randn(3, 4), "body": torch.randn(3)}, name)
    Path("spec.yaml").write_text('version: 1\nfreeze: "**"\n')
    ckptsurg.write_manifest(ckptsurg.make_manifest("spec.yaml", name), "freeze.json")


def test_public_names_are_sorted_and_there():
    names = ckptsurg.__all__
    assert names == sorted(names) == dir(ckptsurg)
    for module in pkgutil.iter_modules(ckptsurg.__path__):
        if module.name != "__main__":
            importlib.import_module(f"ckptsurg.{module.name}")
    # A module that is imported becomes an attribute of its package: none may hide a function.
    assert all(callable(getattr(ckptsurg, name)) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'frezze'"):
        _ = ckptsurg.frezze
