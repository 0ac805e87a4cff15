"""What importing and starting costs: no framework, and torch only where it is needed."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import ckptsurg

FRAMEWORKS = {"torch", "tensorflow", "keras", "transformers", "jax", "lightning", "safetensors", "sklearn", "pytest"}


def _imported_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def _command(*arguments: object) -> str:
    return (
        f"sys.argv = {['ckptsurg', *map(str, arguments)]!r}\n"
        "from ckptsurg.cli import main\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert exit.code == 0, exit.code"
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


def test_help_needs_neither_numpy_nor_pydantic():
    assert not _imported_after(_command("rewrite", "--help")) & {"numpy", "pydantic", "rich"}


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
