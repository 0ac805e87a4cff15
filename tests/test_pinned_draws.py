"""The promise that values never change: digests of draws, pinned in ``pinned_draws.json``.

A mismatch here means that every spec in the world now gives other weights. That is a bug, save where a draw was wrong
before and the changelog says so. Only then, and for new initializers, write the file anew, on purpose, with

    python tests/test_pinned_draws.py

``orthogonal`` is left out: it goes through LAPACK and is promised for one build of numpy alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from pydantic import TypeAdapter

import ckptsurg
from ckptsurg.initializer_arguments import Init
from ckptsurg.initializers import Drawing
from ckptsurg.tensors import TensorInfo

PINS = Path(__file__).with_name("pinned_draws.json")

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SEEDS = (0, 1, 42, 2**32, 2**64 - 1)
NAMES = (
    "fc.weight",
    "model.layers.31.mlp.up_proj.weight",
    "w",
    "conv/kernel:0",
    "kodierer.schlüssel",
    "层.权重",
    '"\\',
)

ANY_RANK = [(37,), (12, 31)]
MATRIX = [(12, 31), (40, 9)]
FILTER = [(12, 31), (8, 6, 3, 5)]

DRAWS: list[tuple[Any, list[tuple[int, ...]]]] = [
    ("zeros", [(5, 3)]),
    ("ones", [(5, 3)]),
    ({"constant": {"val": 0.1}}, [(7,)]),
    ("uniform", ANY_RANK),
    ({"uniform": {"a": -0.037, "b": 0.12}}, ANY_RANK),
    ("normal", [(), (37,), (2, 3, 4, 5, 6)]),
    ({"normal": {"std": 0.02}}, ANY_RANK),
    ({"normal": {"mean": 0.3, "std": 2}}, ANY_RANK),
    ("trunc_normal", ANY_RANK),
    ({"trunc_normal": {"std": 0.02}}, ANY_RANK),
    ({"trunc_normal": {"mean": 0.5, "std": 0.3, "a": -1, "b": 0.2}}, ANY_RANK),
    ("xavier_uniform", FILTER),
    ({"xavier_uniform": {"gain": 1.6666666666666667}}, FILTER),
    ("xavier_normal", FILTER),
    ({"xavier_normal": {"gain": 0.7}}, FILTER),
    ("kaiming_uniform", FILTER),
    ({"kaiming_uniform": {"a": 2.23606797749979}}, FILTER),
    ({"kaiming_uniform": {"mode": "fan_out", "nonlinearity": "selu"}}, FILTER),
    ("kaiming_normal", FILTER),
    ({"kaiming_normal": {"mode": "fan_out", "nonlinearity": "relu"}}, FILTER),
    ({"kaiming_normal": {"a": 0.1, "nonlinearity": "tanh"}}, FILTER),
    ("eye", [(5, 7)]),
    ("dirac", [(6, 3, 2, 3)]),
    ({"dirac": {"groups": 2}}, [(6, 3, 5)]),
    ({"sparse": {"sparsity": 0.1}}, MATRIX),
    ({"sparse": {"sparsity": 0.75, "std": 1.5}}, MATRIX),
]
COMPLEX = [written for written in DRAWS if "uniform" not in str(written) and "trunc" not in str(written)]
LARGE = [
    ("normal", "F32", (3, 70_001)),
    ("normal", "C64", (100_003,)),
    ("uniform", "F64", (2**17,)),
    ("kaiming_uniform", "BF16", (300, 250, 2, 2)),
    ({"trunc_normal": {"std": 0.02}}, "BF16", (2**16 + 1,)),
    ({"sparse": {"sparsity": 0.3}}, "F32", (300, 700)),
    ("xavier_normal", "F16", (400, 300)),
]


def cases() -> Iterator[list[Any]]:
    """What is pinned, each a list of seed, name, dtype, shape and initializer as a spec writes it."""
    number = count()

    def case(dtype: str, shape: tuple[int, ...], written: Any) -> list[Any]:
        turn = next(number)
        return [SEEDS[turn % len(SEEDS)], NAMES[turn % len(NAMES)], dtype, list(shape), written]

    for written, shapes in DRAWS:
        for shape in shapes:
            for dtype in DTYPES:
                yield case(dtype, shape, written)
    for written, shapes in COMPLEX:
        if "sparse" not in str(written):
            yield case("C64", shapes[-1], written)
    for written, dtype, shape in LARGE:
        yield case(dtype, shape, written)


def digest(seed: int, name: str, dtype: str, shape: list[int], written: Any) -> str:
    init = TypeAdapter(Init).validate_python(written)
    hasher = blake3()
    for chunk in Drawing(seed, name, TensorInfo(dtype, tuple(shape)), init).read(0, prod(shape)):
        hasher.update(chunk)
    return hasher.hexdigest()


def initializer(case: list[Any]) -> str:
    return case[4] if isinstance(case[4], str) else next(iter(case[4]))


def rewritten(folder: Path) -> dict[str, str]:
    """Digests of a rewrite, for what is resolved on the way: ``default``, ``like``, ``keep``."""
    shapes = {
        "fc.weight": [9, 14], "fc.bias": [9], "conv.weight": [6, 2, 3, 3], "conv.bias": [6], "bn.weight": [6],
        "bn.bias": [6], "bn.running_mean": [6], "bn.running_var": [6], "rnn.weight_ih_l0": [20, 3],
        "rnn.weight_hh_l0": [20, 5], "rnn.bias_ih_l0": [20], "attention.in_proj_weight": [12, 4],
        "attention.in_proj_bias": [12], "emb.weight": [11, 4], "old": [8, 6], "grown": [8, 6],
    }  # fmt: skip
    header, data = {}, b""
    for name, shape in shapes.items():
        values = bytes(byte for i in range(prod(shape)) for byte in (0, 0, 64 + i % 50, 63 + i % 3))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    (folder / "base.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    spec = {
        "version": 1,
        "seed": 7,
        "reinit": [
            {"match": "{fc,conv,bn,rnn,attention}", "init": "default"},
            {"match": "emb", "init": {"default": "Embedding"}, "shape": {0: 13}},
            {"match": "old", "init": "like"},
            {"match": "grown", "init": "like", "shape": [10, 9], "keep": True},
        ],
    }
    manifest = ckptsurg.rewrite(spec, folder / "base.safetensors", folder / "out.safetensors")
    return {name: record.digest for name, record in sorted(manifest.tensors.items())}


def pinned() -> dict[str, Any]:
    return json.loads(PINS.read_text(encoding="utf-8"))


NAMES_OF_INITIALIZERS = sorted({initializer(case) for case in cases()})


@pytest.mark.parametrize("name", NAMES_OF_INITIALIZERS)
def test_draws_are_as_pinned(name):
    rows = [row for row in pinned()["draws"] if initializer(row) == name]
    assert rows
    assert [row[:5] for row in rows if digest(*row[:5]) != row[5]] == []


def test_a_rewrite_is_as_pinned(tmp_path):
    assert rewritten(tmp_path) == pinned()["rewrite"]


def test_no_pin_is_lost():
    rows = pinned()["draws"]
    assert [row[:5] for row in rows] == list(cases())
    assert len(rows) >= 300
    assert {row[2] for row in rows} == {*DTYPES, "C64"}
    known = {name[:-1] for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_")}
    assert set(NAMES_OF_INITIALIZERS) == known - {"orthogonal"}


def test_pins_of_chance_differ():
    certain = ("zeros", "ones", "constant", "eye", "dirac")
    digests = [row[5] for row in pinned()["draws"] if initializer(row) not in certain and prod(row[3]) > 1]
    assert len(set(digests)) == len(digests)


def write_pins() -> None:
    rows = [json.dumps([*case, digest(*case)], ensure_ascii=False) for case in cases()]
    with tempfile.TemporaryDirectory() as folder:
        digests = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rewritten(Path(folder)).items()]
    text = '{"draws": [\n' + ",\n".join(rows) + '\n],\n"rewrite": {\n' + ",\n".join(digests) + "\n}}\n"
    PINS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pins()
