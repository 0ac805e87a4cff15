"""Specs, YAML and JSON: what is loaded can be written and loaded again, and a plan parts the base's names."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from ckptsurg.api import plan
from ckptsurg.errors import SpecError
from ckptsurg.formats import open_checkpoint
from ckptsurg.plans import Plan
from ckptsurg.spec import Spec, load_spec

from .checking import MISTAKES, WRITTEN_OUT, Target, attempt, cases, require, scratch
from .header import container
from .mutating import edited, members, parsed, plain, written

FOLDER = scratch("spec")
SHAPES = {
    "conv.weight": [2, 3],
    "conv.0.w": [2, 2],
    "conv.1.w": [2, 2],
    "bn.running_mean": [2],
    "fc.weight": [4, 2],
    "n": [],
}


def _base() -> bytes:
    header, position = {}, 0
    for name, shape in SHAPES.items():
        length = 4
        for size in shape:
            length *= size
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + length]}
        position += length
    return container(json.dumps(header), bytes(position))


(FOLDER / "base.safetensors").write_bytes(_base())
BASE = open_checkpoint(FOLDER / "base.safetensors")


def holds(data: bytes) -> None:
    """JSON is read twice, for it is YAML too."""
    names = ("spec.yaml", "spec.json") if data.lstrip()[:1] == b"{" else ("spec.yaml",)
    specs = [check(FOLDER / name, data) for name in names]
    if None not in specs:
        require(len({spec.digest() for spec in specs if spec}) == 1, data, f"as YAML and as JSON: {specs}")


def check(path: Path, data: bytes) -> Spec | None:
    path.write_bytes(data)
    spec = attempt(lambda: load_spec(path), data, SpecError, MISTAKES)
    # What is not valid goes in too: the plan of what is left of it tells more problems.
    planned = attempt(lambda: plan(path if spec is None else spec, BASE), data, SpecError, WRITTEN_OUT)
    if spec is not None:
        again = FOLDER / "again.json"
        again.write_text(spec.to_json())
        require(load_spec(again) == spec, data, f"{spec!r} is written as {spec.to_json()}")
    if planned is not None:
        require(spec is not None, data, "a plan of a spec that cannot be loaded")
        check_plan(planned, data)
    return spec


def check_plan(planned: Plan, data: bytes) -> None:
    of_base = [one.name for one in planned.tensors if one.action != "add"]
    require(of_base == list(SHAPES), data, f"names of the base: {of_base}")
    output = [one.name for one in planned.output]
    require(len(set(output)) == len(output) > 0, data, f"names of the output: {output}")
    actions = [one.action for one in planned.tensors]
    frozen = sum(one.frozen for one in planned.output)
    counts = {action: actions.count(action) for action in ("copy", "drop", "reinit", "add")}
    counts |= {"frozen": frozen, "trainable": len(output) - frozen}
    require(planned.counts == counts, data, f"counts: {planned.counts}, not {counts}")
    for one in planned.tensors:
        if one.action in ("copy", "drop"):
            require(list(one.shape) == SHAPES[one.name], data, f"{one.name}: {one.shape}")


def mutate(data: bytes, rng: random.Random) -> bytes | None:
    """A document as JSON or YAML, whichever it was."""
    document = parsed(data)
    if document is None and b"&" not in data:  # aliases of aliases have no end
        try:
            document = members(yaml.safe_load(data))
        except (yaml.YAMLError, ValueError, RecursionError):
            return None
    if document is None:
        return None
    changed = edited(document, rng, WORDS)
    if rng.random() < 0.5:
        return written(changed, rng).encode("utf-8", "surrogatepass")
    text: str = yaml.safe_dump(
        plain(changed), allow_unicode=True, default_flow_style=rng.random() < 0.3, sort_keys=False
    )
    return text.encode("utf-8", "surrogatepass")


_KEYS = ("version", "name", "seed", "drop", "freeze", "train", "reinit", "add", "config", "set", "unset")
_FIELDS = ("match", "where", "ndim", "dtype", "beside", "optional", "expect", "rows", "shape", "init", "keep", "frozen")
_INITS = (
    *("zeros", "ones", "constant", "normal", "uniform", "trunc_normal", "orthogonal", "kaiming_uniform"),
    *("kaiming_normal", "xavier_uniform", "xavier_normal", "default", "like", "mean"),
)
_ARGUMENTS = ("std", "mean", "val", "a", "b", "gain", "mode", "fan_in", "fan_out", "nonlinearity", "relu", "module")
WORDS = (
    *_KEYS,
    *_FIELDS,
    *_INITS,
    *_ARGUMENTS,
    *SHAPES,
    *("F32", "BF16", "C128", "**", "!fc", "conv[0:2]", "conv.{0,1}.w", "re:fc.*", "{a,b}", "{0..9999}", "[:1]"),
    *("[-1:]", "running_mean"),
    *('{"0":10}', "[2,2]", '{"normal":{"std":0.1}}', '{"match":"fc","init":"zeros"}', '{"match":"conv[0]"}'),
    *('{"name":"x","shape":[2],"dtype":"F32","init":"zeros"}', "1", "true", "null", "{}", "[]", "1e999", "-0.0"),
    *(": ", "\n- ", "\n  ", "? ", "&a ", "*a", "!!str ", "|", ">", "---\n", "...", "<<: ", "~", ".nan"),
    *("0x1f", "0o7", "no"),
    *("'", '"', "\\x00", "\\ud800", "\\u0061", "\ufeff", "\u202e", "\u0085", "# "),
)
_YAML = (
    "freeze: ['**', '!fc']\nreinit:\n- {match: fc, init: zeros, shape: {0: 10}, keep: true}\n",
    "seed: 7\ntrain: [fc]\nadd:\n- name: x\n  shape: [2, 3]\n  dtype: F32\n  init: {normal: {std: 0.1}}\n",
    "name: n\nconfig: {set: {a.b: [1, {c: ~}]}, unset: [x]}\nfreeze: {match: conv.weight, rows: '[:1]'}\n",
    "freeze: [bn, conv.weight]\ntrain: ['conv[0:2]', n]\ndrop: fc\nreinit: []\n",
    "reinit:\n- match: '**.w'\n  where: {dtype: F32, ndim: 2}\n  expect: 2\n  init: {kaiming_uniform: {a: 1}}\n",
)
_JSON = (
    '"freeze": [{"match": "conv[0:2]", "where": {"dtype": "F32", "ndim": 2}, "expect": 2}], "drop": "fc"',
    '"add": [{"name": "y", "shape": [], "dtype": "BF16", "init": {"constant": {"val": 1}}, "frozen": true}]',
    '"reinit": {"match": "fc", "init": "default", "frozen": true}, "freeze": {"match": "no", "optional": true}',
)
SEEDS = (*(f"version: 1\n{keys}" for keys in _YAML), *(f'{{"version": 1, {keys}}}' for keys in _JSON))
TARGET = Target([*(seed.encode() for seed in SEEDS), *cases((".yaml", ".yml", ".json"), "spec")], WORDS, holds, mutate)
