"""The gate in a pipeline: what verify writes for its pages, the hook, the action, and a workflow to a release."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import xmlschema
import yaml
from junitparser import JUnitXml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurg
from ckptsurg.causes import CAUSES
from ckptsurg.report import Detail, Difference, Report
from ckptsurg.summaries import junit, markdown
from ckptsurg.summaries.outcomes import Outcome

from .workflows import Done, Runner, load

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
#: That of Jenkins' xUnit plugin, as pytest has it among its own tests.
JUNIT_SCHEMA = xmlschema.XMLSchema(Path(__file__).parent / "schemas" / "junit-10.xsd")

SPEC = 'version: 1\nname: gate\nfreeze: ["**", "!fc"]\nreinit:\n  - {match: fc, shape: {0: 4}, init: default}\n'

#: What a page, a log, a shell or a parser might take for something else than a name.
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a|b",
    "a\\|b <script>alert(1)</script>",
    "`tick` [x](https://example.com)",
    "```\nfence",
    "| --- |",
    "**bold** _it_ ~~no~~ @team #1 https://example.com",
    "line\n# heading\r\n<b>",
    "\u202eevil\u2066",
    "<!-- -->",
    "&lt;b&gt; &#60;",
    "![i](x)",
    "ends in \\",
    " ",
    "]]><failure/>",
    "\ufffe\uffff\x7f",
    "\x00\x1b[2J\x0b",
    "::error::$(touch pwned)`touch pwned`",
    "--json",
    "x" * 5000,
    "é/中.文",
]


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 12))
        self.fc = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


#: The loop that tutorials show, which leaves the BatchNorm in training mode; and the same with what holds it.
TRAIN = """\
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurg

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 12))
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.body(x))


published, trained = map(Path, sys.argv[1:])
model = Net()
model.load_state_dict(load_file(published / "model.safetensors"))
HOLD
optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
for _ in range(3):
    model.train()
    optimizer.zero_grad()
    model(torch.randn(8, 6)).pow(2).mean().backward()
    optimizer.step()
trained.mkdir()
save_file(model.state_dict(), trained / "model.safetensors")
"""
HELD = TRAIN.replace("HOLD", "ckptsurg.freeze(model, published)")
LOOSE = TRAIN.replace("HOLD", "model.body.requires_grad_(False)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, its output, and what two loops made of it: `held` and `loose`."""
    folder = tmp_path_factory.mktemp("gate")
    torch.manual_seed(0)
    (folder / "base").mkdir()
    save_file(Net(7).state_dict(), folder / "base" / "model.safetensors")
    (folder / "spec.yaml").write_text(SPEC)
    ckptsurg.rewrite(folder / "spec.yaml", folder / "base", folder / "out")
    for name, script in (("held", HELD), ("loose", LOOSE)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", str(folder / "out"), str(folder / name)])
            exec(script, {})
    return folder


def _run(folder: Path, *arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptsurg", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def _moved(folder: Path, trained: str) -> set[str]:
    """The frozen tensors whose bytes are others than the published ones."""
    with (
        safe_open(folder / "out" / "model.safetensors", "pt") as before,
        safe_open(folder / trained / "model.safetensors", "pt") as after,
    ):
        frozen = set(before.keys()) - {"fc.weight", "fc.bias"}
        raw = {name: [one.get_tensor(name).numpy().tobytes() for one in (before, after)] for name in frozen}
    return {name for name, (one, other) in raw.items() if one != other}


def _suite(content: bytes) -> ElementTree.Element:
    """The one suite of a document that the schema allows, whose counts are what is in it."""
    JUNIT_SCHEMA.validate(ElementTree.ElementTree(ElementTree.fromstring(content)))
    [suite] = ElementTree.fromstring(content)
    for key, found in (
        ("tests", suite.findall("testcase")),
        ("failures", suite.findall("testcase/failure")),
        ("errors", suite.findall("testcase/error")),
    ):
        assert int(suite.get(key, "")) == len(found)
    return suite


def _failures(suite: ElementTree.Element) -> dict[str, ElementTree.Element]:
    cases = {case.get("name", ""): case.find("failure") for case in suite.findall("testcase")}
    return {name: failure for name, failure in cases.items() if failure is not None}


def _tokens(text: str) -> list[Token]:
    """Markdown as a page reads it, with tables, and raw HTML where there is any."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def _tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, row by row, the head aside."""
    tables: list[list[list[str]]] = []
    in_body = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("tbody_open", "tbody_close"):
            in_body = token.type == "tbody_open"
            tables += [[]] if in_body else []
        elif in_body and token.type == "tr_open":
            tables[-1].append([])
        elif in_body and token.type == "inline":
            tables[-1][-1].append("".join(child.content for child in token.children or ()))
    return tables


# --- what verify writes ------------------------------------------------------------------------------


def test_a_pass_is_one_case_and_a_line(folder, tmp_path):
    page, summary = tmp_path / "new" / "junit.xml", tmp_path / "new" / "summary.md"
    root = ckptsurg.load_manifest(folder / "out").root
    _run(folder, "verify", "out", "held", "--root", root, "--junit", page, "--markdown", summary)
    suite = _suite(page.read_bytes())
    [case] = suite.findall("testcase")
    assert (case.get("classname"), case.get("name")) == ("frozen", "frozen tensors that have their bits")
    assert case.findtext("system-out") == "9 of 9" and not _failures(suite)
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    assert properties.items() >= {"root": root, "relied_on": "pinned", "verified": "9", "drifted": "0"}.items()
    text = summary.read_text()
    assert text.startswith("### Frozen weights: ok\n\n`held`: **9 frozen tensors verified: every one has its bits**\n")
    assert "the manifest is pinned" in text
    [counts] = _tables(text)
    assert counts == [["frozen, with their bits", "9"], ["frozen, drifted", "0"]]


def test_each_tensor_that_drifted_is_a_failure_with_verdict_cause_and_detail(folder, tmp_path):
    page, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    asked = ("verify", "out", "loose", "--baseline", "out", "--junit", page, "--markdown", summary, "--json")
    report = json.loads(_run(folder, *asked, code=1).stdout)
    moved = _moved(folder, "loose")
    assert moved == {f"body.1.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")}
    suite = _suite(page.read_bytes())
    failures = _failures(suite)
    assert failures.keys() == moved == {one["name"] for one in report["drifted"]}
    [case] = [one for one in suite.findall("testcase") if one.get("name") == "body.1.running_mean"]
    assert case.get("classname") == "frozen.body.1"
    failure = failures["body.1.running_mean"]
    assert failure.get("type") == "changed"
    assert re.fullmatch(
        r"changed; 12 elements, by up to 0\.\d+, first at \[0\]; cause: batchnorm_stats", failure.get("message", "")
    )
    cause = CAUSES["batchnorm_stats"]
    assert cause.explanation in (failure.text or "") and cause.remedy in (failure.text or "")
    held = [one.findtext("system-out") for one in suite.findall("testcase") if one.find("failure") is None]
    assert held == ["6 of 9"]
    text = summary.read_text()
    counts, drifted = _tables(text)
    assert counts[:2] == [["frozen, with their bits", "6"], ["frozen, drifted", "3"]]
    assert {(row[0], row[1], row[2]) for row in drifted} == {(name, "changed", "batchnorm_stats") for name in moved}
    assert "### Frozen weights: FAILED" in text and "nothing pins the manifest; `--root` and" in text
    assert f"- `batchnorm_stats`: {cause.explanation}; {cause.remedy}" in text


def _write(path: Path, **changes: torch.Tensor | None) -> None:
    path.parent.mkdir(exist_ok=True)
    tensors = {**load_file(path.parent.parent / "out" / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("changes", "options", "code", "failed"),
    [
        ({}, [], 0, set()),
        ({"more": torch.ones(2)}, [], 0, set()),
        ({"more": torch.ones(2)}, ["--exact"], 1, {"exactly the manifest's tensors"}),
        ({"fc.bias": None}, ["--exact"], 1, {"exactly the manifest's tensors"}),
        ({}, ["--exact"], 0, set()),
        ({"fc.bias": torch.ones(3)}, [], 0, set()),
        ({"fc.bias": torch.ones(3)}, ["--exact"], 1, {"exactly the manifest's tensors"}),
        ({"fc.bias": torch.ones(3)}, ["--expect-trained"], 1, {"trainable tensors that moved"}),
        ({}, ["--expect-trained"], 1, {"trainable tensors that moved"}),
        ({"body.0.bias": None}, [], 1, {"body.0.bias"}),
        ({"body.0.bias": "wide"}, [], 1, {"body.0.bias"}),
        ({"body.0.bias": "wide"}, ["--allow-widened"], 0, set()),
        ({"body.0.bias": "wide", "body.2.bias": torch.ones(12)}, ["--allow-widened"], 1, {"body.2.bias"}),
    ],
    ids=lambda one: "-".join(one) if isinstance(one, list | dict | set) else None,
)
def test_there_are_failures_where_the_exit_code_says_so_and_no_others(folder, tmp_path, changes, options, code, failed):
    shutil.copytree(folder / "out", tmp_path / "out")
    wide = load_file(folder / "out" / "model.safetensors")["body.0.bias"].double()
    given = {name: wide if isinstance(one, str) else one for name, one in changes.items()}
    _write(tmp_path / "trained" / "model.safetensors", **given)
    _run(tmp_path, "verify", "out", "trained", *options, "--junit", "j.xml", "--markdown", "s.md", code=code)
    suite = _suite((tmp_path / "j.xml").read_bytes())
    assert _failures(suite).keys() == failed
    text = (tmp_path / "s.md").read_text()
    assert ("### Frozen weights: ok" in text) == (code == 0)
    if "more" in changes:
        assert "1 tensor is not in the manifest:\n  more" in (suite.findtext("system-out") or "")
        assert "- 1 tensor is not in the manifest: `more`" in text
    if "fc.bias" in changes and changes["fc.bias"] is not None:
        told = "fc.bias (expected F32 [4], found F32 [3])"
        assert f"another shape than the manifest's:\n  {told}" in (suite.findtext("system-out") or "")
        assert f"`{told}`" in text and "| trainable, another shape or dtype | 1 |" in text
    if "--allow-widened" in options:
        assert "- 1 tensor in a wider dtype, which was accepted: `body.0.bias`" in text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A manifest of tensors with hostile names, and a checkpoint in which all of them moved."""
    folder = tmp_path_factory.mktemp("hostile")
    save_file({name: torch.zeros(2) for name in HOSTILE}, folder / "base.safetensors")
    ckptsurg.write_manifest(ckptsurg.make_manifest(["**"], folder / "base.safetensors"), folder / "freeze.json")
    others = {f"{name}extra": torch.zeros(2) for name in HOSTILE}
    save_file({name: torch.ones(2) for name in HOSTILE} | others, folder / "<b>`|.safetensors")
    return folder


def test_hostile_names_are_text_in_a_summary(hostile, tmp_path):
    path = tmp_path / "s.md"
    _run(hostile, "verify", "freeze.json", "<b>`|.safetensors", "--markdown", path, code=1)
    text = path.read_text()
    kinds = {token.type for token in _tokens(text)}
    assert "code_inline" in kinds
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "fence", "s_open", "em_open", "code_block"}
    assert sum(token.type == "heading_open" for token in _tokens(text)) == 1
    _, drifted = _tables(text)
    assert len(drifted) == len(HOSTILE) and {len(row) for row in drifted} == {3}
    shown = [row[0] for row in drifted]
    assert "a\\x7cb" in shown and "<img src=x onerror=alert(1)>" in shown and "é/中.文" in shown
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "".join(shown))
    assert max(map(len, shown)) <= 200
    # Only in code spans, where no page looks for links and people, is anything that came from a file.
    prose = "".join(token.content for token in _tokens(text) if token.type == "text")
    assert not re.search("example|team|alert|touch|evil", prose)


def test_hostile_names_break_no_xml(hostile, tmp_path):
    path = tmp_path / "j.xml"
    _run(hostile, "verify", "freeze.json", "<b>`|.safetensors", "--junit", path, code=1)
    failures = _failures(_suite(path.read_bytes()))
    assert len(failures) == len(HOSTILE)
    assert {"<img src=x onerror=alert(1)>", "]]><failure/>", "a|b", "é/中.文", "\\ufffe\\uffff\\x7f"} <= failures.keys()
    assert sum(len(case) for case in JUnitXml.fromfile(str(path))) == len(HOSTILE)


def test_the_pages_of_a_hundred_thousand_tensors_are_short(folder):
    manifest = ckptsurg.load_manifest(folder / "out")
    detail = Detail(elements_changed=3, max_abs_diff=0.5, first_index=(0, 1))
    drifted = tuple(
        Difference(
            name=f"model.layers.{n}.mlp.experts.{n % 64}.w", verdict="changed", cause="weight_decay", detail=detail
        )
        for n in range(100_000)
    )
    names = tuple(one.name for one in drifted)
    report = Report(ok=False, verified=1, drifted=drifted, extra=names, missing_trainable=names, untrained=names)
    outcome = Outcome(report, manifest, "trained", "out", exact=True)
    content = junit.render(outcome)
    suite = _suite(content)
    assert len(suite.findall("testcase")) == 104 and len(content) < 1 << 20
    assert _failures(suite)["further frozen tensors"].get("message") == "99,900 more; --json lists all"
    text = markdown.render(outcome)
    assert len(text) < 1 << 15
    assert len(_tables(text)[1]) == 50 and "\nand 99,950 more; `--json` lists all\n" in text
    assert text.count("weight decay alone moves it") == 1


# --- where it is written -----------------------------------------------------------------------------


def _drifted(path: Path) -> int:
    return len(_failures(_suite(path.read_bytes())))


def test_a_page_of_an_earlier_run_is_replaced_and_a_summary_goes_on(folder, tmp_path):
    page, summary = tmp_path / "j.xml", tmp_path / "s.md"
    page.write_bytes(b"")
    for trained, code in (("loose", 1), ("held", 0), ("loose", 1)):
        _run(folder, "verify", "out", trained, "--junit", page, "--markdown", summary, code=code)
        assert _drifted(page) == 3 * code
    headings = re.findall("^### .*", summary.read_text(), re.MULTILINE)
    assert headings == [f"### Frozen weights: {word}" for word in ("FAILED", "ok", "FAILED")]
    assert sorted(tmp_path.iterdir()) == [page, summary]


def test_the_summary_of_a_step_is_appended_to_by_any_name(folder, tmp_path):
    step = tmp_path / "step_summary_1"
    step.write_text("before")
    _run(folder, "verify", "out", "held", "--markdown", step, GITHUB_STEP_SUMMARY=str(step))
    assert step.read_text().startswith("before\n### Frozen weights: ok\n")


def test_what_is_not_ours_is_left_alone(folder, tmp_path):
    (tmp_path / "folder").mkdir()
    manifest = tmp_path / "freeze.json"
    shutil.copy(folder / "out" / "freeze.json", manifest)
    other = tmp_path / "pytest.xml"
    other.write_text('<?xml version="1.0"?><testsuites name="pytest tests"/>')
    link = tmp_path / "link.xml"
    link.symlink_to(other)
    for option, path, said in (
        ("--junit", other, "is no JUnit file of ckptsurg and is not replaced; choose another place"),
        ("--junit", link, "is no JUnit file of ckptsurg"),
        ("--junit", manifest, "is no JUnit file of ckptsurg"),
        ("--junit", tmp_path / "folder", "is no JUnit file of ckptsurg"),
        ("--markdown", manifest, "its name does not end in .md, and $GITHUB_STEP_SUMMARY is another file"),
        ("--markdown", tmp_path / "folder", "is no file; Markdown is appended to a file"),
        ("--markdown", "/dev/full", "is no file"),
    ):
        before = Path(path).read_bytes() if Path(path).is_file() else b""
        error = _run(folder, "verify", "out", "held", option, path, code=2).stderr
        assert f"{path}: " in error and said in error
        assert not before or Path(path).read_bytes() == before
    error = _run(folder, "verify", "out", "held", "--junit", "x.md", "--markdown", "./x.md", code=2).stderr
    assert "is given for both JUnit and Markdown" in error and not (folder / "x.md").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["out", "cut.safetensors"], 3, "cut.safetensors: "),
        (["nowhere", "held"], 2, "nowhere: no such file"),
        (["out", "held", "--root", f"blake3:{'0' * 64}"], 2, "root"),
        (["out", "held", "--only", "nothing.here"], 2, '"nothing.here" matches nothing'),
        (["out", "held", "--statement", "spec.yaml"], 2, "spec.yaml: exists already"),
    ],
    ids=["malformed", "no-manifest", "other-root", "nothing-selected", "place-taken"],
)
def test_what_could_not_be_verified_is_an_error_where_a_pass_stood_before(folder, tmp_path, arguments, code, said):
    (folder / "cut.safetensors").write_bytes((folder / "held" / "model.safetensors").read_bytes()[:-1])
    page, summary = tmp_path / "j.xml", tmp_path / "s.md"
    _run(folder, "verify", "out", "held", "--junit", page)
    error = _run(folder, "verify", *arguments, "--junit", page, "--markdown", summary, code=code).stderr
    suite = _suite(page.read_bytes())
    [found] = suite.findall("testcase/error")
    assert said in (found.text or "") and (found.get("message") or "") in error
    assert not _failures(suite)
    text = summary.read_text()
    assert text.startswith("### Frozen weights: not verified\n") and said in text


def test_a_run_that_is_stopped_leaves_no_pass(folder, tmp_path):
    page, waiting = tmp_path / "j.xml", tmp_path / "manifest.json"
    os.mkfifo(waiting)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        _run(folder, "verify", "out", "held", "--junit", page)
        command = [sys.executable, "-m", "ckptsurg", "verify", waiting, "held", "--junit", page]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as process:
            descriptor = os.open(waiting, os.O_WRONLY)  # returns once the manifest is being read
            assert not page.exists()
            process.send_signal(number)
            assert process.wait() == code
            os.close(descriptor)
        if number == signal.SIGKILL:
            assert not page.exists()
    [found] = _suite(page.read_bytes()).findall("testcase/error")
    assert found.text == "interrupted"


# --- specs without a checkpoint ----------------------------------------------------------------------

BAD = 'version: 1\nfreez: fc\nfreeze: ["**", "!layer["]\nreinit:\n  - {match: "re:(", init: kaming_normal}\n'


def test_the_specs_that_come_along_are_valid():
    specs = sorted((ROOT / "specs").glob("*.yaml"))
    assert _run(ROOT, "check", *specs).stdout == f"{len(specs)} specs valid\n"


def test_all_that_is_wrong_with_specs_is_told_at_once(tmp_path):
    (tmp_path / "good.yaml").write_text(SPEC)
    (tmp_path / "bad.yaml").write_text(BAD)
    (tmp_path / "worse.json").write_text('{"version": 1, "freeze": "!fc"')
    done = _run(tmp_path, "check", "good.yaml", "bad.yaml", "worse.json", "none.yaml", code=2)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith('error: bad.yaml:2: freez: unknown key "freez"; nearest: freeze')
    assert lines[1].startswith('bad.yaml:3: freeze[1]: "!layer[": "layer[": brackets hold a slice')
    assert {line.partition('"')[0] for line in lines[2:4]} == {
        "bad.yaml:5: reinit[0].match: ",
        "bad.yaml:5: reinit[0].init: unknown initializer ",
    }
    assert lines[4].startswith("worse.json:1: not JSON") and lines[5] == "none.yaml: no such file"
    document = json.loads(_run(tmp_path, "check", "good.yaml", "bad.yaml", "--json", code=2).stdout)
    assert not document["ok"]
    assert {one["spec"]: len(one["problems"]) for one in document["specs"]} == {"good.yaml": 0, "bad.yaml": 4}
    first = document["specs"][1]["problems"][0]
    assert (first["path"], first["line"]) == ("freez", 2) and first["message"].startswith('unknown key "freez"')


def test_what_a_checkpoint_is_needed_for_is_not_told(tmp_path):
    (tmp_path / "spec.yaml").write_text('version: 1\nfreeze: ["**", "!layers[5:90:2]", "!no.such", "!re:^x{2}$"]\n')
    assert _run(tmp_path, "check", "spec.yaml").stdout == "1 spec valid\n"


def test_the_hook_runs_on_specs_and_stops_a_commit(tmp_path):
    """By pre-commit itself, but for the environment that it would install ckptsurg into."""
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    subprocess.run([BIN / "pre-commit", "validate-manifest", ROOT / ".pre-commit-hooks.yaml"], check=True)
    assert hook.pop("language") == "python"
    local = {"repo": "local", "hooks": [{**hook, "language": "system"}]}
    (tmp_path / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [local]}))
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PRE_COMMIT_HOME": str(tmp_path / "home"),
        "GIT_CONFIG_GLOBAL": os.devnull,
    }

    def run() -> subprocess.CompletedProcess[str]:
        subprocess.run(["git", "add", "--all", ":!home"], cwd=tmp_path, check=True, env=environment)
        command = [BIN / "pre-commit", "run", "--all-files", "--verbose", "--color", "never"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True, env=environment)
    (tmp_path / "other.yaml").write_text("not: a spec\n")
    (tmp_path / "my specs" / "specs").mkdir(parents=True)
    for name in ("spec.yaml", "head.spec.yml", "my specs/specs/a b.yaml"):
        (tmp_path / name).write_text(SPEC)
    done = run()
    assert done.returncode == 0 and "3 specs valid" in done.stdout, done.stdout
    (tmp_path / "my specs" / "specs" / "a b.yaml").write_text(BAD)
    done = run()
    assert done.returncode == 1 and "- exit code: 2" in done.stdout
    assert 'my specs/specs/a b.yaml:2: freez: unknown key "freez"; nearest: freeze' in done.stdout


# --- the action --------------------------------------------------------------------------------------


def test_action_and_workflow_are_what_github_takes_and_zizmor_finds_nothing():
    for schema, path in (("actions", "action.yml"), ("workflows", "examples/release.yml")):
        command = [BIN / "check-jsonschema", "--builtin-schema", f"vendor.github-{schema}", ROOT / path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    paths = [ROOT / path for path in ("action.yml", ".pre-commit-hooks.yaml", "examples/release.yml")]
    done = subprocess.run([BIN / "zizmor", "--offline", "--no-config", *paths], capture_output=True, text=True)
    assert done.returncode == 0 and "No findings" in done.stdout + done.stderr, done.stdout


def test_the_check_above_can_fail(tmp_path):
    text = (ROOT / "action.yml").read_text()
    unsafe = text.replace('--root=$ROOT"', '--root=${{ inputs.root }}"')
    assert unsafe != text
    (tmp_path / "action.yml").write_text(unsafe)
    done = subprocess.run([BIN / "zizmor", "--offline", tmp_path / "action.yml"], capture_output=True, text=True)
    assert done.returncode != 0 and "template-injection" in done.stdout


def _action(place: Path, folder: Path, **inputs: str) -> tuple[Runner, Done]:
    runner = Runner(place)
    for name in ("out", "held", "loose"):
        shutil.copytree(folder / name, runner.workspace / name)
    return runner, runner.action(ROOT, {"version": "installed", "manifest": "out", **inputs})


def test_the_action_passes_what_is_held(folder, tmp_path):
    _, done = _action(tmp_path, folder, checkpoint="held")
    assert done.ok and done.ran == ["install", "verify"]
    found = {key: done.outputs[key] for key in ("ok", "verified", "drifted", "relied-on")}
    assert found == {"ok": "true", "verified": "9", "drifted": "0", "relied-on": "nothing"}
    assert re.findall("^::.*", done.log, re.MULTILINE) == [
        "::warning title=Frozen weights::nothing pins the manifest, which could be another; give root or attestation"
    ]
    assert "### Frozen weights: ok" in done.summary
    assert Report.model_validate_json(Path(done.outputs["report"]).read_text()).ok
    assert not _drifted(Path(done.outputs["junit"]))


def test_the_action_says_what_pins_the_manifest(folder, tmp_path):
    manifest = ckptsurg.load_manifest(folder / "out")
    given = {"checkpoint": "held", "root": manifest.root, "require-pinned": "true"}
    _, done = _action(tmp_path / "pinned", folder, **given)
    assert done.ok and done.outputs["relied-on"] == "pinned"
    assert "every frozen tensor has its bits: 9 verified; the manifest is pinned\n" in done.log
    assert "::" not in done.log
    statement = tmp_path / "statement.json"
    statement.write_bytes(ckptsurg.attest(folder / "out", folder / "out"))
    given = {**given, "root": "", "attestation": str(statement)}
    _, done = _action(tmp_path / "attested", folder, **given)
    assert done.ok and done.outputs["relied-on"] == "signed" and "that of the statement\n" in done.log


NO_ROOT = "the root: expected blake3: or sha256: with 64 digits from 0 to f, found nothing"


def test_the_action_does_not_pass_what_had_to_be_pinned_and_is_not(folder, tmp_path):
    _, done = _action(tmp_path, folder, checkpoint="held", root="", **{"require-pinned": "true"})
    assert (done.ok, done.code) == (False, 2)
    assert (done.outputs["ok"], done.outputs["relied-on"]) == ("false", "nothing")
    assert f"error: {NO_ROOT}" in done.log and "::error title=Frozen weights::not verified" in done.log
    assert f"    {NO_ROOT}\n" in done.summary
    [found] = _suite(Path(done.outputs["junit"]).read_bytes()).findall("testcase/error")
    assert found.get("message") == NO_ROOT


def test_the_action_fails_what_drifted_and_its_summary_says_why(folder, tmp_path):
    root = ckptsurg.load_manifest(folder / "out").frozen_root
    given = {"root": root, "baseline": "out", "args": "--prefix\nno such prefix.\n\n--exact\r\n", "junit": "a b/j.xml"}
    runner, done = _action(tmp_path, folder, checkpoint="loose", **given)
    assert (done.ok, done.code) == (False, 1)
    assert (done.outputs["ok"], done.outputs["verified"], done.outputs["drifted"]) == ("false", "6", "3")
    assert _drifted(runner.workspace / "a b" / "j.xml") == 3 and done.outputs["junit"] == "a b/j.xml"
    assert {row[0] for row in _tables(done.summary)[1]} == _moved(folder, "loose")
    assert "the manifest is pinned" in done.summary and "batchnorm_stats" in done.summary
    assert "::error title=Frozen weights::3 drifted, 6 verified" in done.log and "body.1" not in done.log


def test_the_action_fails_what_it_cannot_verify(folder, tmp_path):
    _, done = _action(tmp_path, folder, checkpoint="nowhere")
    assert (done.ok, done.code) == (False, 2)
    nothing = {"ok": "false", "verified": "0", "drifted": "0", "relied-on": "nothing", "report": "", "junit": ""}
    assert {**done.outputs, "junit": ""} == nothing
    assert "### Frozen weights: not verified" in done.summary and "nowhere: no such" in done.log
    assert len(_suite(Path(done.outputs["junit"]).read_bytes()).findall("testcase/error")) == 1


HOSTILE_INPUT = "$(touch pwned) `touch pwned` \"; touch pwned; # ' && touch pwned"


@pytest.mark.parametrize("name", sorted(set(load(ROOT / "action.yml")["inputs"]) - {"python-version"}))
def test_no_input_of_the_action_is_run(folder, tmp_path, name):
    runner, done = _action(tmp_path, folder, **{"checkpoint": "held", name: HOSTILE_INPUT})
    assert done.ok == (name == "junit" or name == "extras")  # a file may be called so, and nothing is installed
    assert not [path for path in runner.place.rglob("*") if path.name == "pwned"]


def test_no_name_of_a_tensor_is_a_command_to_the_runner(hostile, tmp_path):
    runner = Runner(tmp_path)
    shutil.copytree(hostile, runner.workspace, dirs_exist_ok=True)
    given = {"version": "installed", "manifest": "freeze.json", "checkpoint": "<b>`|.safetensors"}
    done = runner.action(ROOT, given)
    assert done.code == 1 and done.outputs["drifted"] == str(len(HOSTILE))
    assert re.findall("^::.*", done.log, re.MULTILINE) == [
        f"::error title=Frozen weights::{len(HOSTILE)} drifted, 0 verified; see the summary of this step"
    ]


# --- from spec to release ----------------------------------------------------------------------------

#: What needs the network, and is prepared here: packages, the base; and the release itself.
NETWORK = ("Install", "Fetch the base", "Upload")


def _release(folder: Path, place: Path, train: str, workflow: Any = None) -> dict[str, Done]:
    """Run the jobs of the example in their order, each on a machine of its own, as long as those before it passed."""
    (place / "repository").mkdir(parents=True)
    (place / "repository" / "spec.yaml").write_text(SPEC)
    (place / "repository" / "train.py").write_text(train)
    shutil.copytree(folder / "base", place / "repository" / "base")
    workflow = workflow or load(ROOT / "examples" / "release.yml")
    done: dict[str, Done] = {}
    for name, job in workflow["jobs"].items():
        needs = job.get("needs", [])
        needs = [needs] if isinstance(needs, str) else needs
        if not all(one in done and done[one].ok for one in needs):
            continue
        runner = Runner(
            place / name,
            artifacts=place / "artifacts",
            actions={"OWNER/ckptsurg": ROOT},
            omitted=NETWORK,
            prepared=place / "repository",
        )
        context = {
            "needs": {one: {"outputs": done[one].outputs} for one in needs},
            "inputs": {"tag": "v1"},
            "github": {"token": "", "repository": "OWNER/model"},
            "environment": {**workflow["env"], "ARTIFACTS": str(place / "artifacts")},
        }
        for step in job["steps"]:
            if step.get("uses", "").startswith("OWNER/ckptsurg@"):
                step["with"]["version"] = "installed"
        done[name] = runner.job(job, context)
    return done


def test_the_example_releases_what_was_held(folder, tmp_path):
    done = _release(folder, tmp_path, HELD)
    assert {name: one.ok for name, one in done.items()} == dict.fromkeys(("surgery", "train", "gate", "release"), True)
    assert done["surgery"].outputs["root"] == ckptsurg.load_manifest(folder / "out").root
    assert "**9 frozen tensors verified: every one has its bits; what trains has moved**" in done["gate"].summary
    assert "the manifest is pinned" in done["gate"].summary and "the manifest is pinned\n" in done["gate"].log
    statement = json.loads((tmp_path / "release" / "workspace" / "gate" / "verified.json").read_text())
    assert statement["predicate"]["ok"] and statement["predicate"]["relied_on"] == "pinned"
    assert [one["name"] for one in statement["subject"]] == ["model.safetensors"]
    assert (tmp_path / "release" / "workspace" / "trained" / "model.safetensors").is_file()


def test_the_example_does_not_release_what_nothing_pins(folder, tmp_path):
    workflow = load(ROOT / "examples" / "release.yml")
    del workflow["jobs"]["surgery"]["outputs"]["root"]
    done = _release(folder, tmp_path, HELD, workflow)
    assert {name: one.ok for name, one in done.items()} == {"surgery": True, "train": True, "gate": False}
    assert f"error: {NO_ROOT}" in done["gate"].log


def test_the_example_does_not_release_what_drifted(folder, tmp_path):
    done = _release(folder, tmp_path, LOOSE)
    assert {name: one.ok for name, one in done.items()} == {"surgery": True, "train": True, "gate": False}
    assert done["gate"].code == 1 and "### Frozen weights: FAILED" in done["gate"].summary
    # What was found is kept, if it is no release.
    assert _drifted(tmp_path / "artifacts" / "gate" / "junit.xml") == 3


def test_the_example_does_not_release_what_another_manifest_allows(folder, tmp_path):
    """Whoever trains may upload artifacts too, so here a manifest and a statement of what came out of training."""
    forge = """
import os
from ckptsurg.proofs import attest

published = Path(os.environ["ARTIFACTS"], "published")
manifest = ckptsurg.make_manifest(["**", "!fc"], trained)
ckptsurg.write_manifest(manifest, published / "out" / "freeze.json", overwrite=True)
(published / "statement.json").write_bytes(attest(manifest, trained))
"""
    done = _release(folder, tmp_path, LOOSE + forge)
    assert done["train"].ok and done["gate"].code == 2 and "release" not in done
    assert "### Frozen weights: not verified" in done["gate"].summary
