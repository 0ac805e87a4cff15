"""Pages: their numbers are those of the documents, they render in a real browser, and nothing in a name gets out."""

from __future__ import annotations

import http.server
import json
import logging
import math
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckptsurg
from ckptsurg.cli.report import report as command
from ckptsurg.errors import UsageError
from ckptsurg.manifest import Manifest, SpecIdentity, TensorRecord
from ckptsurg.pages import rendering
from ckptsurg.pages.changes import measure
from ckptsurg.pages.compared import of_report
from ckptsurg.pages.entries import Change
from ckptsurg.pages.heat import grids
from ckptsurg.pages.maps import MOST_BLOCKS
from ckptsurg.pages.model import of_manifest, of_plan
from ckptsurg.report import Difference, Report
from ckptsurg.tensors import TensorInfo

from .browser import Browser

OF = [("manifest", "out")]
_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer of four blocks, published, and trained so that frozen tensors moved in several ways."""
    place = tmp_path_factory.mktemp("pages")
    generator = torch.Generator().manual_seed(0)
    base = {"embed.weight": torch.randn(40, 8, generator=generator)}
    for block in range(4):
        for role, shape in (("attn.q_proj.weight", (8, 8)), ("attn.k_proj.weight", (8, 8)), ("norm.weight", (8,))):
            base[f"layers.{block}.{role}"] = torch.randn(*shape, generator=generator)
        for expert in range(8):
            base[f"layers.{block}.experts.{expert}.up.weight"] = torch.randn(16, 8, generator=generator)
    base["head.weight"] = torch.randn(40, 8, generator=generator)
    save_file(base, place / "base.safetensors")
    spec = {
        "version": 1,
        "drop": "layers.3.attn",
        "freeze": ["**", "!layers.3", "!head"],
        "reinit": [{"match": "head", "shape": {"0": 5}, "init": "zeros"}],
    }
    (place / "spec.json").write_text(json.dumps(spec))
    ckptsurg.rewrite(place / "spec.json", place / "base.safetensors", place / "out")
    trained = load_file(place / "out" / "model.safetensors")
    trained["head.weight"] += 0.25
    trained["layers.3.norm.weight"] *= 1.5
    trained["layers.0.attn.q_proj.weight"] *= 1.01
    trained["layers.1.experts.5.up.weight"][3] += 0.5
    trained["layers.1.norm.weight"] = trained["layers.1.norm.weight"].double()
    del trained["layers.2.attn.k_proj.weight"]
    save_file(trained, place / "trained.safetensors")
    return place


def _run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(command, [str(one) for one in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    assert done.return_value == code, done.output
    return done.output


def _page(folder: Path, name: str, *arguments: object, code: int = 0) -> Path:
    _run(*(folder / str(one) for one in arguments), "-o", folder / name, "--overwrite", code=code)
    return folder / name


TEXTS = "[...document.querySelectorAll({!r})].map(one => one.textContent.trim())"


def _texts(browser: Browser, selector: str) -> list[str]:
    return browser.evaluate(TEXTS.format(selector))


def _rows(browser: Browser, selector: str) -> list[list[str]]:
    return browser.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )


def _fact(browser: Browser, key: str) -> str:
    return browser.evaluate(f"document.querySelector('[data-fact={key}]').textContent")


# --- By how much a tensor changed ----------------------------------------------------------------------


def _chunks(raw: bytes, size: int) -> list[bytes]:
    return [raw[i : i + size] for i in range(0, len(raw), size)]


TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "U8": "u1", "BOOL": "?"}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TYPES)), st.integers(0, 300_000), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_change_is_what_numpy_says_of_the_whole(dtype, elements, seed, share):
    draw = np.random.default_rng(seed)
    old = (draw.standard_normal(elements) * 5).astype(TYPES[dtype])
    moved = draw.random(elements) < share
    new = np.where(moved, (draw.standard_normal(elements) * 5).astype(TYPES[dtype]), old)
    info = TensorInfo(dtype, (elements,))
    found = measure(_chunks(old.tobytes(), 24 * 1021), _chunks(new.tobytes(), 24 * 77), info, info)
    a, b = old.astype(np.float64), new.astype(np.float64)
    raw = f"V{old.dtype.itemsize}"
    assert found.elements == elements
    assert found.changed == int(np.sum(old.view(raw) != new.view(raw)))
    assert found.largest == (float(np.max(np.abs(b - a))) if elements else 0)
    distance, length = math.sqrt(math.fsum((b - a) ** 2)), math.sqrt(math.fsum(a**2))
    expected = 0.0 if not distance else distance / length if length else math.inf
    assert found.relative == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "changed", "largest", "relative"),
    [
        ([0.0, 0.0], [0.0, 3.0], 1, 3.0, math.inf),
        ([0.0, 1.0], [-0.0, 1.0], 1, 0.0, 0.0),
        ([math.inf, 3.0, 4.0], [math.inf, 3.0, 3.0], 1, 1.0, 0.2),
        ([math.nan, 1.0], [math.nan, 1.0], 0, 0.0, 0.0),
        ([1.0, 1.0], [1.0, math.inf], 1, math.nan, math.nan),
    ],
)
def test_a_change_of_what_is_zero_or_not_finite(old, new, changed, largest, relative):
    info = TensorInfo("F32", (len(old),))
    found = measure([np.float32(old).tobytes()], [np.float32(new).tobytes()], info, info)
    assert found == Change(len(old), changed, found.largest, found.relative)
    assert [found.largest, found.relative] == pytest.approx([largest, relative], nan_ok=True)


def test_a_change_of_dtype_is_one_of_values():
    old, new = np.float32([1, 2, 3, math.nan]), np.float64([1, 2, 3.5, math.nan])
    found = measure([old.tobytes()], [new.tobytes()], TensorInfo("F32", (4,)), TensorInfo("F64", (4,)))
    assert found == Change(4, 1, 0.5, 0.5 / math.sqrt(14))


# --- The numbers are those of the documents ------------------------------------------------------------


def test_the_page_of_a_plan_is_the_plan(browser, folder):
    browser.open(_page(folder, "plan.html", "spec.json", "base.safetensors"))
    plan = ckptsurg.plan(folder / "spec.json", folder / "base.safetensors")
    assert _fact(browser, "tensors") == str(len(plan.output))
    assert _fact(browser, "frozen") == str(plan.counts["frozen"])
    assert _fact(browser, "trainable") == str(plan.counts["trainable"])
    assert _fact(browser, "dropped") == str(plan.counts["drop"])
    legend = dict.fromkeys(_texts(browser, "[data-kind] strong"))
    assert list(legend) == ["frozen", "trains", "reinitialised", "dropped"]
    words = {row[0]: row[4] for row in _rows(browser, "#map tbody tr")}
    assert words == {
        "embed": "frozen",
        "head": "reinitialised",
        "layers.0": "frozen",
        "layers.1": "frozen",
        "layers.2": "frozen",
        "layers.3": "trains + dropped",
    }


@pytest.fixture(scope="module")
def closed_up(folder, tmp_path_factory):
    """A model folder that loses two of its four blocks, and the spec by which it does."""
    place = tmp_path_factory.mktemp("closed")
    (place / "base").mkdir()
    save_file(load_file(folder / "base.safetensors"), place / "base" / "model.safetensors")
    (place / "base" / "config.json").write_text('{"model_type": "x", "num_hidden_layers": 4, "use_cache": true}')
    spec = {
        "version": 1,
        "drop": {"match": "layers[1:3]", "renumber": True},
        "freeze": ["**", "!layers[-1:].attn"],
        "rename": [{"match": "head", "to": "score"}, {"match": "layers[0].norm", "to": "layers.*.ln"}],
        "add": [{"name": "layers.1.adapter.weight", "shape": [2, 8], "dtype": "F32", "init": "zeros"}],
        "config": {"set": {"num_hidden_layers": 2, "text.types": ["a"]}, "unset": ["use_cache"]},
    }
    (place / "spec.json").write_text(json.dumps(spec))
    ckptsurg.rewrite(place / "spec.json", place / "base", place / "out")
    return place


def test_a_plan_shows_the_bases_blocks_each_once_and_what_they_become(browser, closed_up):
    browser.look(width=1280)
    browser.open(_page(closed_up, "plan.html", "spec.json", "base"))
    plan = ckptsurg.plan(closed_up / "spec.json", closed_up / "base")
    rows = _rows(browser, "#map tbody tr")
    assert {row[0]: (row[3], row[4]) for row in rows} == {
        "embed": ("1", "frozen"),
        "head → score": ("1", "frozen"),
        "layers.0": ("11", "frozen"),
        "layers.1": ("11", "dropped"),
        "layers.2": ("11", "dropped"),
        "layers.3 → layers.1": ("12", "frozen + trains + added"),
    }
    assert sum(int(row[3]) for row in rows) == len(plan.tensors) and len(rows) == 6
    assert "layers.3 → layers.1" in _texts(browser, "summary .name") and "layers.{1..2}" in _texts(
        browser, "summary .name"
    )
    assert _fact(browser, "renamed") == str(plan.counts["rename"]) == "13"
    assert _rows(browser, "#renamed tbody tr") == [
        ["head", "→ score"],
        ["layers.0.norm", "→ layers.0.ln"],
        ["layers.3", "→ layers.1"],
    ]
    assert _rows(browser, "#edits tbody tr") == [
        ["num_hidden_layers", "2"],
        ["text.types", '["a"]'],
        ["use_cache", "goes"],
    ]
    assert _texts(browser, ".note") == list(plan.notes)


def test_all_blocks_that_move_together_are_one_group_with_one_arrow(tmp_path):
    save_file({f"h.{i}.w": torch.ones(2) for i in range(6)}, tmp_path / "base.safetensors")
    spec = {"version": 1, "freeze": "**", "drop": {"match": "h[:2]", "renumber": True}}
    page = of_plan(ckptsurg.plan(spec, tmp_path / "base.safetensors"), of=OF)
    assert [(one.label, one.to) for one in page.map.contents] == [("h.{0..1}", None), ("h.{2..5}", "h.{0..3}")]
    assert [bar.to for bar in page.map.bars] == [None, None, "h.0", "h.1", "h.2", "h.3"]


def test_a_diff_with_an_output_that_closed_up_says_so(browser, closed_up):
    browser.open(_page(closed_up, "d.html", "base", "out", code=1))
    [note] = _texts(browser, ".note")
    assert note == (
        "13 tensors of the first are called otherwise in the second, as its manifest says: head -> score, "
        "layers.0.norm -> layers.0.ln, layers.3 -> layers.1. Here tensors of one name are compared, whatever they "
        "were called"
    )
    [told] = [text for text in _texts(browser, "section p") if text.startswith("Tensors by relative change")]
    compared = sum(int(row[1]) for row in _rows(browser, "#histogram tbody tr"))
    assert told.startswith(f"Tensors by relative change: {compared} of 49 tensors; the others are not in both")
    assert "cause" not in _texts(browser, "#differences th") and "-" in _texts(browser, "td.removed")
    assert "+" in _texts(browser, "td.added")


def test_a_cast_of_what_trains_is_no_training(browser, folder, tmp_path):
    tensors = load_file(folder / "out" / "model.safetensors")
    tensors["layers.3.norm.weight"] = tensors["layers.3.norm.weight"].bfloat16()  # with fewer bits: other values
    tensors["layers.3.experts.0.up.weight"] = tensors["layers.3.experts.0.up.weight"].double()  # the same values
    tensors["layers.3.experts.1.up.weight"] += 1
    save_file(tensors, tmp_path / "trained.safetensors")
    page = tmp_path / "v.html"
    _run(folder / "out", tmp_path / "trained.safetensors", "-o", page)
    browser.open(page)
    assert _fact(browser, "moved") == "1 of 10"
    assert [row[0] for row in _rows(browser, "#trained tbody tr")] == ["layers.3.experts.1.up.weight"]
    assert "1 trainable tensor has another dtype than the manifest's" in _texts(browser, "h2")
    trained = {row[0]: int(row[3]) for row in _rows(browser, "#histogram tbody tr")}
    assert sum(trained.values()) == 9 and trained["not at all"] == 8
    told = _run(folder / "out", tmp_path / "trained.safetensors", "-o", page, "--overwrite", "--exact", code=1)
    assert told.startswith("All 34 frozen tensors kept every bit, but 1 trainable tensor has another dtype")


def test_the_legend_shows_each_cell_as_it_is(browser, folder):
    """Sign, frame and colour: those of a cell and those of the legend, as the browser has computed them."""
    styles = (
        "Object.fromEntries([...document.querySelectorAll({!r})].map(one => [one.className.split(' ')[1] + "
        "one.textContent, [getComputedStyle(one).boxShadow, getComputedStyle(one).color]]))"
    )
    for kind in ("verify", "diff"):
        browser.open(_page(folder, f"{kind}.html", *PAGES[kind], code=1))
        legend, cells = (
            browser.evaluate(styles.format(one)) for one in (".legend .cell:not(.s0,.s1,.s2,.s3,.s4)", "td.cell")
        )
        shared = legend.keys() & cells.keys()
        assert len(shared) >= 3 and {one: legend[one] for one in shared} == {one: cells[one] for one in shared}
    assert _texts(browser, ".kind") == ["Two checkpoints"]


def test_names_break_between_their_parts_and_wide_pages_show_them_whole(browser, tmp_path):
    name = "a_module_with_a_long_name.another_of_that_kind.and_one_more_of_them.weight_of_it"
    save_file({name: torch.ones(4)}, tmp_path / "base.safetensors")
    save_file({name: torch.zeros(4)}, tmp_path / "new.safetensors")
    page = _page(tmp_path, "d.html", "base.safetensors", "new.safetensors", code=1)
    browser.look(width=1280)
    browser.open(page)
    assert browser.evaluate(
        "[...document.querySelectorAll('.heat th[scope=row]')].every(one => one.scrollWidth <= one.clientWidth)"
    )
    browser.look(width=390)
    browser.open(page)
    lines = browser.evaluate(
        """(() => { const found = []; let top = null;
          const cell = document.querySelector("#differences th.name");
          for (const node of cell.childNodes) {
            if (node.nodeType !== 3) continue;
            const range = document.createRange(); range.selectNodeContents(node);
            if (range.getClientRects().length > 1) return ["broken", node.data];
            const y = range.getBoundingClientRect().top;
            if (y === top) found[found.length - 1] += node.data; else found.push(node.data);
            top = y; }
          return found; })()"""
    )
    assert "".join(lines) == name and len(lines) > 1 and all(line[-1] in "._" for line in lines[:-1])
    browser.look(width=1280)


def test_bars_are_true_to_scale(browser, folder):
    browser.look(width=1280)
    browser.open(_page(folder, "plan.html", "spec.json", "base.safetensors"))
    plan = ckptsurg.plan(folder / "spec.json", folder / "base.safetensors")
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        block = re.match(r"layers\.\d|[^.]+", tensor.name)[0]
        sizes[block] = sizes.get(block, 0) + tensor.info.nbytes
    widths = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#map tbody tr')].map(row => [row.cells[0].textContent, "
        "[...row.querySelectorAll('rect:not([fill])')].reduce((sum, r) => sum + r.getBoundingClientRect().width, 0)"
        " / row.querySelector('svg').getBoundingClientRect().width]))"
    )
    assert widths == {name: pytest.approx(size / max(sizes.values()), abs=0.01) for name, size in sizes.items()}


def test_the_page_of_an_output_is_its_manifest(browser, folder):
    browser.open(_page(folder, "output.html", "out"))
    manifest = ckptsurg.load_manifest(folder / "out")
    assert _fact(browser, "tensors") == str(len(manifest.tensors))
    assert _fact(browser, "frozen") == str(manifest.counts["frozen"])
    assert _fact(browser, "root") == manifest.root
    assert set(_texts(browser, ".names code")) == set(manifest.dropped)
    # Blocks that hold the same are listed once, and experts in one line.
    assert "layers.{0..2}" in _texts(browser, "summary .name")
    assert ["experts.{0..7}.up.weight", "8", "F32 [16, 8]", "4.1 kB", "frozen"] in _rows(browser, "details tbody tr")


def test_the_page_of_a_report_is_the_report(browser, folder):
    output = _run(
        folder / "out", folder / "trained.safetensors", "-o", folder / "v.html", "--overwrite", "--json", code=1
    )
    browser.open(folder / "v.html")
    report = ckptsurg.verify(folder / "out", folder / "trained.safetensors", folder / "out")
    told = json.loads(output)
    assert {one["name"] for one in told["drifted"]} == {one.name for one in report.drifted}
    assert _texts(browser, "h1") == ["✗ 4 of 34 frozen tensors are not as published, 1 of them missing"]
    assert _fact(browser, "verified") == f"{report.verified} of {report.verified + len(report.drifted)}"
    rows = {name: rest for name, *rest in _rows(browser, "#differences tbody tr")}
    assert rows.keys() == {one.name for one in report.drifted}
    for one in report.drifted:
        assert rows[one.name][1] == (one.cause or "not settled")
        if not isinstance(one.detail, dict) and one.detail is not None:
            assert rows[one.name][3].split(" of ")[0] == f"{one.detail.elements_changed:,}"
            assert float(rows[one.name][4]) == pytest.approx(one.detail.max_abs_diff, rel=1e-2)
    causes = {one.cause for one in report.drifted}
    assert {text.split()[0] for text in _texts(browser, ".cause h3")} == {cause or "Not" for cause in causes}
    assert _texts(browser, ".kind") == ["Frozen weights, checked"]
    assert _texts(browser, ".of dt") == ["manifest", "checkpoint", "changes are measured from"]


def test_a_heat_map_shows_what_moved_and_by_how_much(browser, folder):
    browser.open(_page(folder, "v.html", "out", "trained.safetensors", code=1))
    columns = _texts(browser, "table[data-stack=layers] thead th")[1:]
    rows = {
        name: dict(zip(columns, rest, strict=True)) for name, *rest in _rows(browser, "[data-stack=layers] tbody tr")
    }
    old, new = (load_file(folder / name) for name in ("out/model.safetensors", "trained.safetensors"))

    def relative(name: str) -> float:
        a, b = old[name].double().numpy(), new[name].double().numpy()
        return float(np.linalg.norm(b - a) / np.linalg.norm(a))

    assert float(rows["0"]["attn.q_proj.weight"]) == pytest.approx(relative("layers.0.attn.q_proj.weight"), rel=0.5)
    assert float(rows["1"]["experts.5.up.weight"]) == pytest.approx(relative("layers.1.experts.5.up.weight"), rel=0.5)
    assert float(rows["3"]["norm.weight"]) == 0.5  # trainable
    assert rows["1"]["norm.weight"] == "w" and rows["2"]["attn.k_proj.weight"] == "∅"
    assert rows["2"]["attn.q_proj.weight"] == "=" and rows["3"]["experts.0.up.weight"] == "0"
    assert rows["3"]["attn.q_proj.weight"] == ""  # dropped
    counts = [(row[1], row[3]) for row in _rows(browser, "#histogram tbody tr")]
    assert (sum(int(frozen) for frozen, _ in counts), sum(int(others) for _, others in counts)) == (33, 10)
    assert _rows(browser, "#trained tbody tr")[0][0] == "head.weight"
    assert _rows(browser, "#trained tbody tr")[0][1] == "from zero"


def test_without_a_baseline_the_page_says_that_changes_were_not_measured(browser, folder):
    browser.open(_page(folder, "v.html", "out/freeze.json", "trained.safetensors", code=1))
    [told] = [text for text in _texts(browser, "section p") if "not measured" in text]
    assert told.endswith("Here it was not measured: give the published checkpoint with --baseline.")
    assert not _texts(browser, "#histogram") and "≠" in _texts(browser, "td.changed")


def test_the_page_of_two_checkpoints_is_their_diff(browser, folder):
    browser.open(_page(folder, "d.html", "base.safetensors", "trained.safetensors", code=1))
    report = ckptsurg.diff(folder / "base.safetensors", folder / "trained.safetensors")
    assert {row[0] for row in _rows(browser, "#differences tbody tr")} == {one.name for one in report.tensors}
    assert _fact(browser, "removed") == str(sum(one.verdict == "removed" for one in report.tensors))
    assert _texts(browser, "h1") == [f"≠ {len(report.tensors)} of 46 tensors differ"]
    browser.open(_page(folder, "d.html", "base.safetensors", "base.safetensors"))
    assert _texts(browser, "h1") == ["✓ The two checkpoints are identical"]


def test_the_same_inputs_give_the_same_page(folder):
    pages = [_page(folder, "v.html", "out", "trained.safetensors", code=1).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


# --- What a page may rely on ---------------------------------------------------------------------------


def test_an_output_that_was_changed_too_vouches_for_nothing(browser, folder, tmp_path):
    ckptsurg.rewrite(folder / "spec.json", folder / "base.safetensors", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["embed.weight"] += 1
    for place in ("out/model.safetensors", "trained.safetensors"):
        save_file(tensors, tmp_path / place)
    browser.open(_page(tmp_path, "v.html", "out", "trained.safetensors", code=1))
    assert _texts(browser, "h1") == ["✗ 1 of 34 frozen tensors is not as published"]
    assert not _texts(browser, "#histogram")  # for there is nothing left to measure from


def test_frozen_rows_are_measured_by_themselves(browser, tmp_path):
    save_file({"embed.weight": torch.ones(8, 4), "fc.weight": torch.ones(2, 4)}, tmp_path / "base.safetensors")
    spec = {"version": 1, "freeze": ["**", {"match": "embed.weight", "rows": "[:6]"}]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    ckptsurg.rewrite(spec, tmp_path / "base.safetensors", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["embed.weight"][7] += 5
    save_file(tensors, tmp_path / "trained.safetensors")
    browser.open(_page(tmp_path, "v.html", "out", "trained.safetensors"))
    assert _texts(browser, "td.moved")[0] == "2e0" and _texts(browser, "h1") == [
        "✓ All 2 frozen tensors kept every bit"
    ]
    tensors["embed.weight"][0] += 1
    save_file(tensors, tmp_path / "trained.safetensors")
    browser.open(_page(tmp_path, "v.html", "out", "trained.safetensors", code=1))
    [row] = _rows(browser, "#differences tbody tr")
    assert row[3:6] == [f"{1 / math.sqrt(6):.1e}".replace("e-0", "e-"), "4 of 24", "1"]


# --- A page is inert -----------------------------------------------------------------------------------

HOSTILE = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "a.0.\u202egnp.live\u202c",
    "a.1.{{ 7 * 7 }}{% raw %}",
    "tab\tline\nnull\x07",
    "b.00000000000000000000000000000000000001.w",
    "..//..",
    "'onmouseover='x",
    "é𝕏.0.重み",
]


def test_hostile_names_are_text(browser, tmp_path):
    (tmp_path / "base").mkdir()
    save_file({name: torch.ones(4) for name in HOSTILE}, tmp_path / "base" / "model.safetensors")
    save_file({name: torch.zeros(4) for name in HOSTILE}, tmp_path / "new.safetensors")
    page = _page(tmp_path, "d.html", "base", "new.safetensors", code=1)
    browser.open(page)
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
    names = [row[0] for row in _rows(browser, "#differences tbody tr")]
    assert sorted(names) == sorted(
        one.replace("\u202e", "\\u202e").replace("\u202c", "\\u202c").replace("\t", "\\t").replace("\n", "\\n")
        .replace("\x07", "\\x07") for one in HOSTILE
    )  # fmt: skip
    assert browser.evaluate("document.title") == "All 9 tensors differ"
    assert browser.evaluate("document.querySelectorAll('img, iframe, object, link, script[src]').length") == 0
    assert browser.evaluate("document.scripts.length") == 1
    assert "{{ 7 * 7 }}" in browser.evaluate("document.body.textContent")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", page.read_text())


@contextmanager
def _listening():
    """A server on this machine, and what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def test_even_if_something_got_in_it_could_fetch_and_run_nothing(browser, folder, tmp_path):
    page = _page(folder, "plan.html", "spec.json", "base.safetensors").read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', page)[0]
    with _listening() as (server, asked):
        intruder = (
            f'<img src="{server}/image"><link rel="stylesheet" href="{server}/style">'
            f"<script>fetch('{server}/script'); document.title = 'owned'</script></body>"
        )
        titles = []
        for text in (page, page.replace(policy, "")):
            (tmp_path / "page.html").write_text(text.replace("</body>", intruder))
            browser.open(tmp_path / "page.html")
            titles.append((browser.evaluate("document.title"), len(asked)))
    assert titles[0] == ("A rewrite would freeze 34 of 44 tensors", 0)
    assert titles[1][0] == "owned" and titles[1][1] >= 2  # without the policy they get through: the test can fail


# --- A page reads well ---------------------------------------------------------------------------------

PAGES = {
    "plan": ("spec.json", "base.safetensors"),
    "output": ("out",),
    "verify": ("out", "trained.safetensors"),
    "diff": ("base.safetensors", "trained.safetensors"),
}

#: Pairs of colours of all texts, and their contrast as WCAG 2.1 has it.
CONTRASTS = """(() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = one => { for (; one; one = one.parentElement) {
    const rgb = parse(getComputedStyle(one).backgroundColor); if (rgb.length === 3 || rgb[3] > 0) return rgb; } };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    if (![...one.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || one.closest("script")) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(behind(one))];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), one.outerHTML.slice(0, 80)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_reads_well_in_both_colour_schemes_and_at_phone_width(browser, folder, kind):
    page = _page(folder, f"{kind}.html", *PAGES[kind], code=int(kind in ("verify", "diff")))
    backgrounds = set()
    for dark in (False, True):
        browser.look(width=1280, dark=dark)
        browser.open(page)
        assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
        backgrounds.add(browser.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        contrasts = browser.evaluate(CONTRASTS)
        assert len(contrasts) > 50
        assert [one for one in contrasts if one[0] < 4.5] == []
    assert len(backgrounds) == 2
    browser.look(width=390)
    browser.open(page)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    assert browser.evaluate("Math.min(...[...document.querySelectorAll('td, th, p, dd')].map(one => "
                            "parseFloat(getComputedStyle(one).fontSize)))") >= 12  # fmt: skip
    # One heading of the first rank, none skipped; all that scrolls can be reached by keyboard and has a name.
    ranks = [
        int(tag[1]) for tag in browser.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(one => one.tagName)")
    ]
    assert ranks.count(1) == 1 and all(later - one <= 1 for one, later in pairwise(ranks))
    assert browser.evaluate(
        "[...document.querySelectorAll('.scrolls')].every(one => one.tabIndex === 0 && one.ariaLabel)"
    )
    browser.look(width=1280)


def test_shades_are_told_apart_by_what_is_written_in_them(browser, folder):
    browser.open(_page(folder, "v.html", "out", "trained.safetensors", code=1))
    assert "" not in _texts(browser, "td.cell") and "underline" in browser.evaluate(
        "getComputedStyle(document.querySelector('td.changed')).textDecorationLine"
    )
    assert "underline" not in browser.evaluate(
        "getComputedStyle(document.querySelector('td.moved')).textDecorationLine"
    )
    signs = set(_texts(browser, ".legend .cell"))
    assert {text for text in _texts(browser, "td.cell") if not re.match(r"\d(e|$)", text)} <= signs


def _press(browser: Browser, key: str, code: int, text: str = "") -> None:
    for kind in ("keyDown", "keyUp"):
        also = {"text": text} if text and kind == "keyDown" else {}
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **also)


def test_a_page_is_used_by_keyboard(browser, folder):
    browser.open(_page(folder, "v.html", "out", "trained.safetensors", code=1))
    reached = []
    for _ in range(60):
        _press(browser, "Tab", 9)
        focused = browser.evaluate("document.activeElement.tagName")
        if focused == "BODY" and reached:
            break
        reached.append(focused)
        if focused == "INPUT" and reached.count("INPUT") == 1:
            for letter in "q_proj":
                browser.call("Input.insertText", text=letter)
            visible = browser.evaluate(
                "[...document.querySelectorAll('#differences tbody tr')].filter(r => !r.hidden).length"
            )
        if focused == "SUMMARY" and reached.count("SUMMARY") == 1:
            _press(browser, "Enter", 13, "\r")
            is_open = browser.evaluate("document.activeElement.parentElement.open")
    assert reached[0] == "A" and visible == 1 and is_open


def test_a_page_is_whole_without_its_script(browser, folder):
    page = _page(folder, "v.html", "out", "trained.safetensors", code=1)
    browser.open(page)
    texts = _texts(browser, "main td, main dd, main p")
    assert browser.evaluate("document.querySelector('.filter').hidden") is False
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(page)
        assert browser.evaluate("document.querySelector('.filter').hidden") is True
        assert _texts(browser, "main td, main dd, main p") == texts
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


# --- Large models --------------------------------------------------------------------------------------


def _large(blocks: int, experts: int) -> Manifest:
    digest = f"blake3:{'0' * 64}"
    tensors = {}
    for block in range(blocks):
        frozen = block < blocks - 1
        for role in ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.o_proj.weight"):
            tensors[f"model.layers.{block}.{role}"] = _record(frozen, digest)
        for expert in range(experts):
            for role in ("gate_proj", "up_proj", "down_proj"):
                for leaf in ("weight", "weight_scale_inv"):
                    name = f"model.layers.{block}.mlp.experts.{expert}.{role}.{leaf}"
                    tensors[name] = _record(frozen, digest)
    return Manifest.of(tensors, spec=SpecIdentity(name=None, digest=digest), base=(), dropped=(), algorithm="blake3")


def _record(frozen: bool, digest: str) -> TensorRecord:
    return TensorRecord(dtype="BF16", shape=(4, 4), frozen=frozen, origin="copied", digest=digest)


def test_a_hundred_thousand_tensors_stay_usable(browser, tmp_path):
    manifest = _large(66, 256)
    assert len(manifest.tensors) > 100_000
    drifted = [name for name, record in manifest.tensors.items() if record.frozen and name.endswith("up_proj.weight")]
    changes = {name: Change(16, 3, 0.5, 10.0 ** -(len(name) % 7)) for name in drifted}
    report = Report(
        ok=False,
        verified=manifest.counts["frozen"] - len(drifted),
        drifted=tuple(Difference(name=name, verdict="changed", cause="weight_decay") for name in drifted),
    )
    page = of_report(report, manifest, changes, of=OF)
    assert page.differing == len(drifted) == 65 * 256 and len(page.rows) == 100
    [grid] = page.grids
    cell = grid.rows[0][1][list(grid.columns).index("mlp.experts.*.up_proj.weight")]
    assert (cell.tensors, cell.state, cell.alike) == (256, "changed", 256)
    assert sum(one.frozen for one in page.bins) == manifest.counts["frozen"]
    assert sum(bar.nbytes for bar in page.map.bars) == 32 * len(manifest.tensors)
    assert [(one.label, one.blocks) for one in page.map.contents] == [
        ("model.layers.{0..64}", 65),
        ("model.layers.65", 1),
    ]
    path = tmp_path / "large.html"
    path.write_bytes(rendering.render(page))
    seconds = browser.open(path)
    elements = browser.evaluate("document.querySelectorAll('*').length")
    _log.info("%s bytes, %s elements, %.2f s", path.stat().st_size, elements, seconds)  # pytest --log-cli-level=INFO
    assert path.stat().st_size < 500_000 and elements < 10_000
    assert "and 16,540 more" in _texts(browser, ".more") and browser.complaints() == []


def test_of_many_modules_those_that_matter_are_shown():
    digest = f"blake3:{'0' * 64}"
    tensors = {f"module_{i:05}/kernel": _record(i != 4_999, digest) for i in range(5_000)}
    manifest = Manifest.of(
        tensors, spec=SpecIdentity(name=None, digest=digest), base=(), dropped=(), algorithm="blake3"
    )
    page = of_manifest(manifest, of=OF)
    assert len(page.map.bars) == MOST_BLOCKS and page.map.bars[-1].label == "module_04999"
    assert page.map.rest.tensors == 5_000 - MOST_BLOCKS and page.map.groups_left_out == 5_000 - 120
    report = Report(ok=False, verified=4_998, drifted=(Difference(name="module_04000/kernel", verdict="changed"),))
    [grid] = of_report(report, manifest, {}, of=OF).grids
    assert grid.label is None and grid.columns == ["kernel"] and grid.left_out == 5_000 - 120
    assert ("module_04000", "changed") in [(name, cell.state) for name, [cell] in grid.rows]
    assert grid.notable_left_out == 0


def test_blocks_stand_in_the_order_of_their_numbers(tmp_path):
    save_file({f"h.{i}.w": torch.ones(2) for i in range(12)}, tmp_path / "base.safetensors")
    plan = ckptsurg.plan({"version": 1, "freeze": "**"}, tmp_path / "base.safetensors")
    page = of_plan(plan, of=OF)
    assert [bar.label for bar in page.map.bars] == [f"h.{i}" for i in range(12)]
    assert [(one.label, one.blocks) for one in page.map.contents] == [("h.{0..11}", 12)]
    assert grids([]) == []


# --- The command ---------------------------------------------------------------------------------------


def test_only_an_earlier_page_is_replaced(folder, tmp_path):
    page = tmp_path / "page.html"
    _run(folder / "out", "-o", page)
    with pytest.raises(UsageError, match="exists already"):
        _run(folder / "out", "-o", page)
    _run(folder / "out", "-o", page, "--overwrite")
    (tmp_path / "mine.html").write_text("<p>mine")
    with pytest.raises(UsageError, match="is no page of ckptsurg and is not replaced"):
        _run(folder / "out", "-o", tmp_path / "mine.html", "--overwrite")
    assert (tmp_path / "mine.html").read_text() == "<p>mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spec.json"], "a spec needs a checkpoint"),
        (["base.safetensors"], "has no manifest, and nothing to be compared with"),
        (["out", "--exact"], "--exact: goes with a manifest and a trained checkpoint alone"),
        (["base.safetensors", "trained.safetensors", "--baseline", "out"], "--baseline: goes with a manifest"),
        (["out", "trained.safetensors", "--donor", "x=out"], "--donor: goes with a spec alone"),
        (["absent.yaml", "base.safetensors"], "no such file"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=re.escape(message)):
        _run(*arguments, "-o", "refused.html")
    assert not (folder / "refused.html").exists()


def test_options_of_verify_hold_here_too(folder, tmp_path):
    tensors = load_file(folder / "out" / "model.safetensors")
    tensors["embed.weight"] = tensors["embed.weight"].double()
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "trained.safetensors")
    given = (folder / "out", tmp_path / "trained.safetensors", "--prefix", "model.", "--overwrite")
    page = tmp_path / "page.html"
    assert _run(*given, "-o", page, code=1).startswith("1 of 34 frozen tensors is not as published")
    assert _run(*given, "-o", page, "--allow-widened").startswith("All 34 frozen tensors kept every bit")
    told = _run(*given, "-o", page, "--allow-widened", "--expect-trained", code=1)
    assert told.startswith("All 34 frozen tensors kept every bit, but 10 trainable tensors did not move")


def test_without_jinja2_the_message_says_what_to_install(folder, tmp_path):
    code = (
        f"import sys\nsys.modules['jinja2'] = None\nsys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from ckptsurg.cli.report import report\n"
        f"report([{str(folder / 'out')!r}, '-o', {str(tmp_path / 'p.html')!r}], standalone_mode=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a page needs Jinja2, which is not installed (hint: pip install 'ckptsurg[pages]')" in done.stderr
