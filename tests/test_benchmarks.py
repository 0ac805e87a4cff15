"""The table and the chart of `make bench` say what was measured; nothing is measured here."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COPY, OWN, PEER = "cp && sync <FILE>", "ckptsurg rewrite", "others: load & save"
SECONDS = {  # by size and tool, of rounds 1 to 3
    1.0: {COPY: [0.5, 0.625, 1.0], OWN: [0.8, 0.4, 0.35], PEER: [2.0, 2.5, 3.0]},
    4.0: {COPY: [2.0, 1.6, 2.5], OWN: [1.8, 2.0, 1.5], PEER: [8.0, 8.8, 10.5]},
}


@pytest.fixture
def kept(tmp_path):
    """Kept runs, in another order than that in which they are shown."""
    runs = [
        {
            "place": "ext4",
            "gigabytes": size,
            "tool": tool,
            "round": number,
            "seconds": seconds,
            "beside": None if tool == COPY else tools[COPY][number - 1],
            "memory": number * 10**8,
        }
        for size, tools in reversed(SECONDS.items())
        for number in (3, 1, 2)
        for tool, seconds in ((tool, each[number - 1]) for tool, each in tools.items())
    ]
    tools = [{"name": name, "yardstick": None if name == COPY else COPY} for name in (PEER, COPY, OWN)]
    shared = [{"place": "ext4", "gigabytes": 4.0, "tool": OWN, "bytes": 3_987_000_000, "shared": 3_912_000_000}]
    missing = [{"name": "absentee", "place": "ext4", "reason": "absentee is not installed"}]
    machine = {"processor": "Abacus", "cores": "2", "memory": "25 GB", "kernel": "Linux 6.18"}
    found = {"machine": machine, "versions": {"torch": "2.13.0"}, "tools": tools, "runs": runs}
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(found | {"shared": shared, "missing": missing}))
    return path


def _report(kept: Path, readme: str) -> tuple[Path, str]:
    folder = kept.parent
    (folder / "README.md").write_text(readme)
    command = [sys.executable, BENCHMARKS / "speed.py", "--from", kept, "--docs", "docs", "--readme", "README.md"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return folder, done.stdout


def _spread(size: float, tool: str) -> tuple[float, float, float]:
    pairs = [own / beside for own, beside in zip(SECONDS[size][tool], SECONDS[size][COPY], strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def test_the_table_has_medians_of_pairs_and_goes_between_its_marks(kept):
    folder, said = _report(kept, "before\n<!-- bench -->\nan older table\n<!-- /bench -->\nafter\n")
    readme = (folder / "README.md").read_text()
    assert readme.startswith("before\n<!-- bench -->\n| file system |")
    assert readme.endswith("\n<!-- /bench -->\nafter\n")
    assert "an older table" not in readme
    assert "| file system" not in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("|")]
    assert rows[0] == ["file system", "", "1 GB", "4 GB", "s per GB", "memory", "shared"]
    assert [row[1] for row in rows[2:]] == [f"**{COPY}**", PEER, OWN]
    assert rows[2][2:4] == [f"{statistics.median(SECONDS[size][COPY]):.2f} s" for size in (1.0, 4.0)]
    for row in rows[3:]:
        for cell, size in zip(row[2:4], (1.0, 4.0), strict=True):
            assert cell == "{:.2f} ({:.2f}-{:.2f})".format(*_spread(size, row[1]))
        assert row[4] == ", ".join(f"{statistics.median(SECONDS[size][row[1]]) / size:.2f}" for size in (1.0, 4.0))
        assert row[5] == "300 MB"
    assert [row[6] for row in rows[2:]] == ["", "", "3.912 of 3.987 GB"]
    assert "Medians of 3 rounds" in readme
    assert "2 cores of Abacus, 25 GB, Linux 6.18; torch 2.13.0." in readme
    assert "- absentee on ext4: absentee is not installed" in readme


def test_a_readme_without_marks_stays_as_it_is_and_the_table_is_printed(kept):
    folder, said = _report(kept, "before\n<!-- bench -->\nno end\n")
    assert (folder / "README.md").read_text() == "before\n<!-- bench -->\nno end\n"
    assert "README.md has no place for the table" in said
    assert "| ext4 | ckptsurg rewrite | " in said


def test_the_chart_has_a_bar_for_each_ratio_and_seconds_per_gb_of_each_size(kept):
    folder, _ = _report(kept, "")
    chart = ET.parse(folder / "docs" / "performance.svg").getroot()
    space = {"": "http://www.w3.org/2000/svg"}
    bars = {
        bar.findtext("title", "", space): float(bar.get("width", "")) for bar in chart.iterfind("rect[title]", space)
    }
    wanted = {tool: _spread(4.0, tool) for tool in (PEER, OWN)}
    assert set(bars) == {"{}: {:.2f} ({:.2f}-{:.2f})".format(tool, *spread) for tool, spread in wanted.items()}
    peer, own = bars.values()
    assert peer / own == pytest.approx(wanted[PEER][0] / wanted[OWN][0], rel=0.01)
    [left] = {float(bar.get("x", "")) for bar in chart.iterfind("rect[title]", space)}
    [one] = {float(line.get("d", "")[1:].split()[0]) for line in chart.iterfind("path[@class='one']", space)}
    assert (one - left) / own == pytest.approx(1 / wanted[OWN][0], rel=0.01)
    texts = [text.text for text in chart.iterfind("text", space)]
    for tool in (COPY, PEER, OWN):
        at = texts.index(f"{tool} = 1" if tool == COPY else tool)
        ratio = [] if tool == COPY else [f"{wanted[tool][0]:.2f}"]
        growth = [f"{statistics.median(SECONDS[size][tool]) / size:.2f}" for size in (1.0, 4.0)]
        assert texts[at + 1 :][: len(ratio + growth)] == ratio + growth
    assert "prefers-color-scheme: dark" in chart.findtext("style", "", space)


def test_the_runs_are_kept_as_they_were(kept):
    folder, _ = _report(kept, "")
    assert json.loads((folder / "docs" / "performance.json").read_text()) == json.loads(kept.read_text())


@pytest.mark.parametrize("gigabytes", [0.05, 1.0])
def test_what_is_measured_is_a_llama_of_the_size_that_is_asked_for(monkeypatch, gigabytes):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.syspath_prepend(BENCHMARKS)
    from measuring import inputs

    config = inputs.config(gigabytes)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    tensors = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert inputs.shapes(config) == tensors
    total = sum(2 * parameter.numel() for parameter in model.parameters())
    assert total == pytest.approx(gigabytes * 1e9, abs=10_000)
