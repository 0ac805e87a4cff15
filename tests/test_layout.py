"""The order of an output: aligned, and in phase with the base wherever that can be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptsurg
from ckptsurg.tensors import DTYPE_BITS

PAGE = 4096


def _write(path, sizes: list[tuple[str, str, int]], padding: int = 0) -> None:
    """A file of one-dimensional tensors (name, dtype, elements), behind a header with extra spaces."""
    header, position = {}, 0
    for name, dtype, elements in sizes:
        end = position + elements * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": [elements], "data_offsets": [position, end]}
        position = end
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8 + padding)
    content = np.random.default_rng(0).integers(0, 256, position, np.uint8).tobytes()
    path.write_bytes(len(body).to_bytes(8, "little") + body + content)


def _offsets(path) -> dict[str, int]:
    with ckptsurg.open_checkpoint(path) as checkpoint:
        return {name: extent.offset for name, extent in checkpoint.extents.items()}


def _in_phase(tmp_path, sizes, spec) -> tuple[set[str], set[str]]:
    """Names of copied tensors of a page or more that kept their phase, and those that did not."""
    _write(tmp_path / "base.safetensors", sizes)
    ckptsurg.rewrite({"version": 1, **spec}, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    before, after = _offsets(tmp_path / "base.safetensors"), _offsets(tmp_path / "out.safetensors")
    drawn = {t.name for t in ckptsurg.plan({"version": 1, **spec}, tmp_path / "base.safetensors").output if t.init}
    large = {name for name, dtype, n in sizes if n * DTYPE_BITS[dtype] // 8 >= 2 * PAGE} & set(after) - drawn
    kept = {name for name in large if (after[name] - before[name]) % PAGE == 0}
    return kept, large - kept


BLOCKS = [(f"block{i}", "F32", 8 * 1024) for i in range(6)]


def test_nothing_changed_keeps_every_phase(tmp_path):
    sizes = [BLOCKS[0], ("odd", "BF16", 50), *BLOCKS[1:]]
    assert _in_phase(tmp_path, sizes, {"freeze": "**"})[1] == set()


def test_dropped_blocks_keep_the_phase_of_the_rest(tmp_path):
    assert _in_phase(tmp_path, BLOCKS, {"drop": "block{1,4}"})[1] == set()


def test_an_odd_sized_drawn_tensor_goes_out_of_the_way(tmp_path):
    sizes = [*BLOCKS[:3], ("head", "F32", 8 * 1024), *BLOCKS[3:]]
    spec = {"reinit": [{"match": "head", "shape": {0: 10}, "init": "zeros"}]}
    assert _in_phase(tmp_path, sizes, spec)[1] == set()


def test_a_drawn_tensor_fills_the_gap_that_it_left(tmp_path):
    """The head is odd-sized, so that what is behind it is in phase only if something of its size stands before it."""
    sizes = [*BLOCKS[:3], ("head", "F32", 1001), *BLOCKS[3:]]
    assert _in_phase(tmp_path, sizes, {"reinit": [{"match": "head", "init": "normal"}]})[1] == set()


def test_small_tensors_fill_gaps(tmp_path):
    sizes = [BLOCKS[0], ("gone", "F32", 300), *BLOCKS[1:], ("a", "F32", 100), ("b", "F32", 150), ("c", "F32", 50)]
    assert _in_phase(tmp_path, sizes, {"drop": "gone"})[1] == set()


def test_where_it_cannot_be_the_larger_part_keeps_its_phase(tmp_path):
    sizes = [BLOCKS[0], ("gone", "F32", 302), *BLOCKS[1:]]
    kept, lost = _in_phase(tmp_path, sizes, {"drop": "gone"})
    assert kept == {name for name, _, _ in BLOCKS[1:]} and lost == {"block0"}


def test_a_small_first_tensor_does_not_cost_the_phase(tmp_path):
    sizes = [("a_head", "F32", 3), *BLOCKS]
    assert _in_phase(tmp_path, sizes, {"drop": "block5"})[1] == set()


def test_norms_bridge_the_classes_that_they_make(tmp_path):
    """Every block moves the phase by the 512 bytes of its norm; a block that goes would shift all behind it."""
    sizes = []
    for i in range(12):
        sizes += [(f"l.{i}.a", "BF16", 64 * 1024), (f"l.{i}.norm", "BF16", 256), (f"l.{i}.z", "BF16", 128 * 1024)]
    assert _in_phase(tmp_path, sizes, {"drop": "l.5"})[1] == set()


def test_what_would_be_out_of_line_behind_goes_before(tmp_path):
    """Quantised weights of odd sizes, and a head of floats: behind them it would not be aligned."""
    sizes = [("head", "F32", 8 * 1024), ("a", "U8", 5 * PAGE + 1), ("b", "U8", 9 * PAGE + 2), ("c", "U8", 3 * PAGE)]
    spec = {"reinit": [{"match": "head", "shape": {0: 10}, "init": "ones"}]}
    assert _in_phase(tmp_path, sizes, spec) == ({"a", "b", "c"}, set())
    assert _offsets(tmp_path / "out.safetensors")["head"] % 4 == 0


@pytest.mark.parametrize("dtype", ["U8", "BF16", "F64"])
def test_an_odd_tail_does_not_misalign_what_is_drawn(tmp_path, dtype):
    sizes = [*BLOCKS, ("tail", "U8", 5)]
    add = [{"name": "new", "shape": [3], "dtype": "F64", "init": "ones"}]
    _write(tmp_path / "base.safetensors", [("first", dtype, 3), *sizes], padding=3)
    ckptsurg.rewrite({"version": 1, "add": add}, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    assert _offsets(tmp_path / "out.safetensors")["new"] % 8 == 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["U8", "BF16", "F32", "F64"]), st.sampled_from([0, 1, 3, 100, 1024, 5000])),
        min_size=2,
        max_size=12,
    ),
    dropped=st.sets(st.integers(1, 11), max_size=3),
    padding=st.integers(0, 7),
)
def test_every_tensor_is_aligned_to_its_dtype(tmp_path_factory, sizes, dropped, padding):
    folder = tmp_path_factory.mktemp("layout")
    named = [(f"t{i}", dtype, elements) for i, (dtype, elements) in enumerate(sizes)]
    _write(folder / "base.safetensors", named, padding)
    drop = [f"t{i}" for i in sorted(dropped) if i < len(named)]
    spec = {"version": 1, "freeze": "**", **({"drop": drop} if drop else {})}
    ckptsurg.rewrite(spec, folder / "base.safetensors", folder / "out.safetensors")
    with ckptsurg.open_checkpoint(folder / "out.safetensors") as out:
        for name, info in out.tensors.items():
            assert out.extents[name].offset % info.alignment == 0
    assert ckptsurg.verify(folder / "out.freeze.json", folder / "base.safetensors").ok
