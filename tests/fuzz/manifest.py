"""Manifests: what is loaded agrees with itself by the documented rules and is written as it was read, and `verify` says
ok only of a checkpoint that has the bits.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

from ckptsurg.api import make_manifest
from ckptsurg.errors import ManifestError
from ckptsurg.formats import open_checkpoint
from ckptsurg.manifest import Manifest, load_manifest
from ckptsurg.proofs import verify

from ..oracle import digest
from .checking import MISTAKES, Target, attempt, cases, require, scratch
from .header import container, entry
from .mutating import Members, edited, members, parsed, plain, written

FOLDER = scratch("manifest")
PATH = FOLDER / "freeze.json"
#: Two rows of two numbers each; the first two are tied.
BYTES = {
    "conv.weight": bytes(range(16)),
    "twin": bytes(range(16)),
    "fc.weight": bytes(16),
    "fc.bias": bytes(range(7, 23)),
}
_HEADER = {name: entry("F32", [2, 2], 16 * at, 16 * at + 16) for at, name in enumerate(BYTES)}
(FOLDER / "base.safetensors").write_bytes(container(json.dumps(_HEADER), b"".join(BYTES.values())))
BASE = open_checkpoint(FOLDER / "base.safetensors")
#: verify reads through a buffer of 2 MiB in each thread, whatever the manifest says.
BUFFER = 3 << 20


def holds(data: bytes) -> None:
    PATH.write_bytes(data)
    manifest = attempt(lambda: load_manifest(PATH), data, ManifestError, MISTAKES)
    if manifest is None:
        return
    found = json.loads(data)
    expected = derived(found["tensors"], found["root"].partition(":")[0], found.get("dropped", []))
    found["tied"] = sorted(map(sorted, found.get("tied", [])))
    require({key: found[key] for key in expected} == expected, data, f"from its tensors follows {expected}")
    text = manifest.to_json()
    PATH.write_text(text)
    again = load_manifest(PATH)
    require(again == manifest and again.to_json() == text, data, f"{manifest!r} is written as {text}")
    report = attempt(lambda: verify(manifest, BASE, jobs=1), data, ManifestError, BUFFER)
    if report is not None and report.ok:
        check_proven(manifest, data)


def check_proven(manifest: Manifest, data: bytes) -> None:
    for name, record in manifest.frozen.items():
        if name not in BYTES:  # one of tied tensors may be missing
            require(any(name in group and not BYTES.keys().isdisjoint(group) for group in manifest.tied), data, name)
            continue
        held = BYTES[name] if record.rows is None else BYTES[name][8 * record.rows.start : 8 * record.rows.stop]
        found = digest(held, record.held_digest.partition(":")[0])
        require((record.dtype, found) == ("F32", record.held_digest), data, f"{name} is verified, and has {found}")


# --- What follows from the tensors ------------------------------------------------------------------


def derived(tensors: dict[str, Any], algorithm: str, dropped: list[str]) -> dict[str, Any]:
    """Roots, counts and ties, by the documented rules."""
    whole, held = [], []
    tied: dict[str, list[str]] = defaultdict(list)
    for name, one in sorted(tensors.items(), key=lambda item: item[0].encode()):
        rows = one.get("rows")
        part = [] if rows is None else [[rows["start"], rows["stop"], rows["digest"]]]
        whole.append([name, one["dtype"], one["shape"], one["frozen"], one["digest"], *part])
        if one["frozen"]:
            held.append([name, one["dtype"], one["shape"], True, None if part else one["digest"], *part])
        if one["frozen"] and len(one["shape"]) > 1:
            tied[json.dumps([one["digest"], part and part[0][:2]])].append(name)
    frozen = len(held)
    origins = [one["origin"] for one in tensors.values()]
    return {
        "root": root(whole, algorithm),
        "frozen_root": root(held, algorithm),
        "counts": {
            "frozen": frozen,
            "trainable": len(tensors) - frozen,
            "reinitialised": origins.count("reinitialised"),
            "added": origins.count("added"),
            "dropped": len(dropped),
        },
        "tied": sorted(names for names in tied.values() if len(names) > 1),
    }


def root(lines: list[list[Any]], algorithm: str) -> str:
    text = "".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n" for line in lines)
    return digest(text.encode(), algorithm)


def mutate(data: bytes, rng: random.Random) -> bytes | None:
    manifest = parsed(data)
    if manifest is None:
        return None
    changed = edited(manifest, rng, WORDS)
    if isinstance(changed, Members) and rng.random() < 0.7:
        changed = consistent(changed)
    return written(changed, rng).encode("utf-8", "surrogatepass")


def consistent(manifest: Members) -> Members:
    """With roots, counts and ties that follow from the tensors, so that more than those is looked at."""
    said = plain(manifest)
    try:
        right = derived(said["tensors"], said["root"].partition(":")[0], said.get("dropped", []))
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError):
        return manifest
    return Members((key, members(right.get(key, value))) for key, value in manifest)


def _seeds() -> list[bytes]:
    path = FOLDER / "base.safetensors"
    rows = {"version": 1, "freeze": [{"match": "fc.weight", "rows": "[:1]"}, "twin", "conv"]}
    made = [
        make_manifest(["**", "!fc"], path),
        make_manifest(rows, path),
        make_manifest({"version": 1, "train": "fc.bias"}, path, digest="sha256"),
    ]
    return [json.dumps(json.loads(one.to_json()), separators=(",", ":")).encode() for one in made]


SEEDS = _seeds()
_RECORD = json.dumps(json.loads(SEEDS[0])["tensors"]["fc.bias"])
WORDS = (
    *("version", "tool", "spec", "base", "root", "frozen_root", "counts", "tensors", "tied", "dropped", *BYTES),
    *("dtype", "shape", "frozen", "origin", "digest", "rows", "inherited", "copied", "reinitialised"),
    *("added", "start", "stop"),
    *("F32", "C128", "blake3:" + "0" * 64, "sha256:" + "0" * 64, "SHA256:", '{"start":0,"stop":1,"digest":"blake3:0"}'),
    *(_RECORD, "true", "false", "null", "[]", "{}", "[2]", "[2,2]", "[0,2]", '["twin","conv.weight"]'),
    *("1.0", "-0", "2"),
    *("18446744073709551616", "\\u0061", "\\ud800", "\u202e", "__metadata__", "x"),
)
TARGET = Target([*SEEDS, *cases((".json",), "manifest")], WORDS, holds, mutate)
