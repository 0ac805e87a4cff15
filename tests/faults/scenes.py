"""A rewrite that faults are put into, and what may stand on the disk afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

#: One thread, so that the calls of a run come in one order.
REWRITE = (sys.executable, "-m", "ckptsurg", "rewrite", "spec.json", "base", "--jobs", "1")

Contents = Mapping[str, bytes]


def contents(path: Path) -> Contents:
    """Every file at or below a path, by its name from there."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def run(command: Sequence[object], folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, **options)


@dataclass(frozen=True)
class Scene:
    """A folder before a rewrite, and how it stands after one that nothing disturbs.

    Attributes:
        before: The folder.
        out: The output, by its name in it.
        old: Files of the output that was there before, by name in the folder; none if there was none.
        new: Files of the output as it should become.
    """

    before: Path
    out: str
    old: Contents
    new: Contents

    @property
    def command(self) -> tuple[str, ...]:
        return (*REWRITE, "-o", self.out, *(["--overwrite"] if self.old else []))

    @property
    def is_lone(self) -> bool:
        """Whether the output is a file, with a manifest beside it."""
        return self.out.endswith(".safetensors")

    def copied_to(self, folder: Path) -> Path:
        shutil.copytree(self.before, folder)
        return folder

    def problems(self, found: Contents, code: int | None) -> list[str]:
        """What is wrong with a folder after a run that ended with a code, or was killed (None)."""
        output = {name: data for name, data in found.items() if _is_of(name, self.out)}
        inputs = {name: data for name, data in found.items() if _is_input(name)}
        wrong = []
        if inputs != {name: data for name, data in contents(self.before).items() if _is_input(name)}:
            wrong.append("the base or the spec has changed")
        if output not in self._legal():
            wrong.append(f"the output is neither absent, nor the old one, nor the new one: {sorted(output)}")
        if code == 0 and output != self.new:
            wrong.append("exit code 0, but not the new output")
        strange = [name for name in found if name not in inputs and name not in output and not _is_staged(name)]
        return wrong + [f"a file that nobody asked for: {name}" for name in strange]

    def _legal(self) -> list[Contents]:
        """Of a lone file the manifest is the last to come and the first to go, so it may be missing."""
        whole = [{}, self.old, self.new]
        if not self.is_lone:
            return whole
        return whole + [{self.out: files[self.out]} for files in whole if files]

    def retried(self, folder: Path) -> list[str]:
        """What is wrong after a second run, that nothing disturbs."""
        is_there = any(_is_of(name, self.out) for name in contents(folder))
        overwrite = ["--overwrite"] if is_there and not self.old else []
        done = run((*self.command, *overwrite), folder)
        if done.returncode:
            return [f"the next run fails: {done.stderr}"]
        wrong = [f"the next run: {one}" for one in self.problems(contents(folder), 0)]
        return wrong + [f"the next run leaves {name}" for name in self.staged(folder)]

    def staged(self, folder: Path) -> list[str]:
        """What is left of staging."""
        return sorted(path.name for path in folder.rglob(".*") if _is_staged(path.name))


def _is_input(name: str) -> bool:
    return name == "spec.json" or name.startswith("base/")


def _is_of(name: str, out: str) -> bool:
    return name == out or name.startswith(f"{out}/") or name == out.replace(".safetensors", ".freeze.json")


def _is_staged(name: str) -> bool:
    return ".ckptsurg/" in f"{name}/"


def make(folder: Path, out: str, *, shards: int = 1, overwrite: bool = False) -> Scene:
    """A base of so many files, a spec that drops, draws and copies, and an earlier output if it is overwritten."""
    before, after = folder / "before", folder / "after"
    base = before / "base"
    base.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"block.{number}.{leaf}": torch.randn(size, generator=generator)
        for number in range(2)
        for leaf, size in (("weight", (40, 30)), ("bias", (30,)), ("gone", (3, 3)))
    } | {"head.weight": torch.randn(5, 30, generator=generator)}
    if shards == 1:
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        names = {
            name: f"model-{1 + number % shards:05}-of-{shards:05}.safetensors" for number, name in enumerate(tensors)
        }
        for file in set(names.values()):
            save_file({name: tensors[name] for name in tensors if names[name] == file}, base / file)
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (base / "config.json").write_text('{"num_labels": 5}\n')
    spec = {
        "version": 1,
        "drop": "**.gone",
        "freeze": ["**", "!head"],
        "reinit": [{"match": "head", "shape": {"0": 7}, "init": {"normal": {"std": 0.02}}}],
    }
    old: Contents = {}
    if overwrite:
        (before / "spec.json").write_text('{"version": 1, "freeze": "block"}')
        assert run((*REWRITE, "-o", out), before).returncode == 0
        old = {name: data for name, data in contents(before).items() if _is_of(name, out)}
    if not out.endswith(".safetensors"):
        spec["config"] = {"set": {"num_labels": 7}}
    (before / "spec.json").write_text(json.dumps(spec))
    shutil.copytree(before, after)
    scene = Scene(before, out, old, {})
    done = run(scene.command, after)
    assert done.returncode == 0, done.stderr
    new = {name: data for name, data in contents(after).items() if _is_of(name, out)}
    assert new and new != old
    return Scene(before, out, old, new)


SCENES = {
    "file": {"out": "out.safetensors"},
    "file-overwritten": {"out": "out.safetensors", "overwrite": True},
    "folder": {"out": "out", "shards": 3},
    "folder-overwritten": {"out": "out", "shards": 3, "overwrite": True},
    "folder-below-new-ones": {"out": "some/where/out"},
}
