"""What is measured: commands over one checkpoint, and the yardstick that each is held against."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_PEERS = [sys.executable, str(_HERE / "peers.py")]

COPY = "cp --reflink=never && sync"
HASH = "BLAKE3 alone, on all cores"
COMPARE = "cmp"

_FROZEN = 'freeze: ["**", "!lm_head"]\n'
_DROP = f"version: 1\ndrop: model.layers[-1]\n{_FROZEN}"
SPECS = {
    "keep.yaml": f"version: 1\n{_FROZEN}",
    "drop.yaml": _DROP,
    "head.yaml": f"{_DROP}reinit:\n  - {{match: lm_head, init: {{normal: {{std: 0.02}}}}}}\n",
}


@dataclass(frozen=True)
class Tool:
    """A command; what it writes goes into the folder `out`, which is not there when it starts."""

    name: str
    command: list[str]
    yardstick: str | None  # the name of another tool of the same round; none: a yardstick itself
    needs: str = ""  # a package of Python


def prepare(folder: Path, gigabytes: float) -> None:
    """The checkpoint, the specs, what ckptsurg publishes of it whole, and without its last block."""
    base, published = folder / "base", folder / "published" / "model.safetensors"
    subprocess.run([sys.executable, str(_HERE / "inputs.py"), str(base), str(gigabytes)], check=True)
    for name, text in SPECS.items():
        (folder / name).write_text(text)
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    source = {"sources": [{"model": str(base), "layer_range": [0, layers - 1]}]}
    merge = {"slices": [source], "merge_method": "passthrough", "dtype": "bfloat16"}
    (folder / "mergekit.yaml").write_text(json.dumps(merge))
    for spec, out in (("keep.yaml", published), ("drop.yaml", folder / "dropped" / "model.safetensors")):
        publish = [ckptsurg(), "rewrite", str(folder / spec), str(base / "model.safetensors"), "-o", str(out)]
        subprocess.run(publish, check=True, capture_output=True, text=True)
    subprocess.run(["sync"], check=True)


def prepare_proofs(folder: Path) -> None:
    """A copy of what was published, as if trained."""
    published, trained = folder / "published" / "model.safetensors", folder / "trained.safetensors"
    subprocess.run(["cp", "--reflink=never", str(published), str(trained)], check=True)
    subprocess.run(["sync"], check=True)


def rewriting(folder: Path, *, reflinks: bool) -> list[Tool]:
    """Copies and surgeries: the last block goes, everything but the head is frozen."""
    base, out = folder / "base" / "model.safetensors", folder / "out" / "model.safetensors"
    published = folder / "published" / "model.safetensors"

    def copy(how: str, sync: bool) -> list[str]:
        paths = f"{shlex.quote(str(folder / 'dropped' / 'model.safetensors'))} {shlex.quote(str(out))}"
        flushed = f" && sync {shlex.quote(str(out))}" if sync else ""
        return ["sh", "-c", f"mkdir {shlex.quote(str(out.parent))} && cp --reflink={how} {paths}{flushed}"]

    def rewrite(spec: str, *options: str, of: Path = base) -> list[str]:
        return [ckptsurg(), "rewrite", str(folder / spec), str(of), "-o", str(out), *options]

    folders = [str(base.parent), str(out.parent)]
    merge = [str(Path(sys.executable).with_name("mergekit-yaml")), str(folder / "mergekit.yaml"), str(out.parent)]
    return [
        Tool(COPY, copy("never", sync=True), None),
        Tool("cp --reflink=never", copy("never", sync=False), COPY),
        *([Tool("cp --reflink=always && sync", copy("always", sync=True), COPY)] if reflinks else []),
        Tool("ckptsurg rewrite", rewrite("drop.yaml"), COPY),
        Tool("ckptsurg rewrite, a head drawn anew", rewrite("head.yaml"), COPY),
        Tool("ckptsurg rewrite --digest sha256", rewrite("drop.yaml", "--digest", "sha256"), COPY),
        Tool(
            "ckptsurg rewrite --trust-base-manifest", rewrite("drop.yaml", "--trust-base-manifest", of=published), COPY
        ),
        Tool("ckptsurg plan, headers alone", [ckptsurg(), "plan", str(folder / "drop.yaml"), str(base)], COPY),
        Tool("safetensors: load, edit, save", [*_PEERS, "safetensors", *folders], COPY, "safetensors"),
        Tool("mergekit: passthrough", merge, COPY, "mergekit"),
        Tool("transformers: load, edit, save", [*_PEERS, "transformers", *folders], COPY, "transformers"),
    ]


def verifying(folder: Path) -> list[Tool]:
    """Proofs, in which nothing is written."""
    published, trained = folder / "published" / "model.safetensors", str(folder / "trained.safetensors")
    verify = [ckptsurg(), "verify", str(published), trained]
    return [
        Tool(HASH, [*_PEERS, "blake3", trained], None),
        Tool("ckptsurg verify", verify, HASH),
        Tool("ckptsurg verify --only one block", [*verify, "--only", "model.layers[0]"], HASH),
        Tool(COMPARE, ["cmp", str(published), trained], None),
        Tool("ckptsurg verify --baseline", [*verify, "--baseline", str(published)], COMPARE),
    ]


def ckptsurg() -> str:
    """The command of this environment, as a user has it."""
    return str(Path(sys.executable).with_name("ckptsurg"))


def absence(tool: Tool) -> str | None:
    """Why it cannot run here, or None."""
    if tool.needs and version(tool.needs) is None:
        return f"{tool.needs} is not installed"
    if shutil.which(tool.command[0]) is None:
        return f"{Path(tool.command[0]).name} is not installed"
    return None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
