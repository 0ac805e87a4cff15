"""The command line as its users meet it: output, JSON, exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ckptsurg

SPEC = """\
version: 1
name: small
drop: "**.num_batches_tracked"
freeze: ["**", "!fc"]
reinit:
  - {match: fc, shape: {0: 2}, init: default}
add:
  - {name: score.weight, shape: [2, 2], dtype: BF16, init: zeros}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base of twelve blocks, a spec, an output, and what came back from training."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    tensors = {f"layers.{i}.{leaf}": torch.randn(8, 8) for i in range(12) for leaf in ("weight", "gate")}
    tensors |= {f"bn.{name}": tensor for name, tensor in torch.nn.BatchNorm1d(8).state_dict().items()}
    tensors |= {"fc.weight": torch.randn(5, 8), "fc.bias": torch.randn(5)}
    save_file(tensors, folder / "base.safetensors", {"format": "pt"})
    (folder / "spec.yaml").write_text(SPEC)
    ckptsurg.rewrite(folder / "spec.yaml", folder / "base.safetensors", folder / "out")
    trained = load_file(folder / "out" / "model.safetensors")
    trained["fc.weight"] += 1
    save_file(trained, folder / "trained.safetensors")
    trained["bn.running_mean"] += 1
    save_file(trained, folder / "moved.safetensors")
    return folder


def run(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptsurg", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


# --- For people -------------------------------------------------------------------------------------


def test_inspect_folds_numbered_blocks(folder):
    text = run(folder, "inspect", "base.safetensors").stdout
    assert "{0..11}  12 x 128 elements, 512 B" in text
    assert "weight  F32 [8, 8]  256 B" in text and text.count("gate") == 1
    assert "metadata format: pt" in text


def test_inspect_shows_what_patterns_select(folder):
    text = run(folder, "inspect", "base.safetensors", "layers[-2:]", "!**.gate").stdout
    assert "2 tensors" in text and "{10..11}" in text and "gate" not in text
    error = run(folder, "inspect", "base.safetensors", "layres", code=2).stderr
    assert error.splitlines()[0] == 'error: patterns: "layres" matches nothing; nearest: layers'


def test_plan_is_a_table_with_rules_and_counts(folder):
    text = run(folder, "plan", "spec.yaml", "base.safetensors").stdout
    rows = [line.split() for line in text.splitlines()]
    assert ["frozen", "freeze[0]", "**", "28"] in [row[:4] for row in rows]
    assert ["dropped", "drop", "**.num_batches_tracked", "1"] in [row[:4] for row in rows]
    assert ["drawn,", "trains", "reinit[0]", "fc", "2"] in [row[:5] for row in rows]
    assert ["added,", "trains", "add[0]", "score.weight", "1"] in [row[:5] for row in rows]
    assert "output: 31 tensors" in text and "28 frozen, 3 trainable" in text


def test_rewrite_says_what_it_published(folder):
    text = run(folder, "rewrite", "spec.yaml", "base.safetensors", "-o", "said.safetensors").stdout
    manifest = ckptsurg.load_manifest(folder / "said.freeze.json")
    assert "28 frozen, 3 trainable, 2 reinitialised, 1 added, 1 dropped" in text
    assert "said.freeze.json" in text and manifest.root in text and manifest.frozen_root in text


def test_verify_says_what_drifted(folder):
    assert "28 frozen tensors verified" in run(folder, "verify", "out/freeze.json", "trained.safetensors").stdout
    text = run(folder, "verify", "out/freeze.json", "moved.safetensors", "--baseline", "out", code=1).stdout
    assert "\nFAILED 1 frozen tensor drifted, 27 verified\n" in text and text.count("FAILED") == 1
    assert "bn.running_mean  changed  batchnorm_stats  8 elements, by up to 1, first at [0]" in text
    assert (
        "batchnorm_stats: running statistics are buffers" in text and "ckptsurg.freeze, which keeps the layer" in text
    )
    other = run(folder, "verify", "out/freeze.json", "base.safetensors", code=0).stdout
    assert "2 not in the manifest" not in other


def test_verify_of_a_model_that_was_not_frozen_says_so_and_what_to_do(folder):
    tensors = {name: one + 1 for name, one in load_file(folder / "out" / "model.safetensors").items()}
    save_file(tensors, folder / "loose.safetensors")
    lines = run(folder, "verify", "out", "loose.safetensors", code=1).stdout.splitlines()
    assert lines[0].split() == ["tensor", "verdict"]
    assert lines[-3:] == [
        "FAILED all 28 frozen tensors drifted: was anything frozen? was this trained from this output?",
        "hint: --baseline CKPT, the published output, shows where tensors differ and by how much",
        "hint: train with ckptsurg.freeze and its guard (in Trainer, Lightning and Keras the FreezeCallback), "
        "which stop the first wrong step; ckptsurg.watch only finds the cause",
    ]
    tensors["bn.weight"] -= 1
    save_file(tensors, folder / "loose.safetensors")
    text = run(folder, "verify", "out", "loose.safetensors", code=1).stdout
    assert "\nFAILED 27 of 28 frozen tensors drifted: was anything frozen?" in text


def test_verify_of_what_was_saved_in_another_dtype_says_what_to_do(folder):
    tensors = {name: one.bfloat16() for name, one in load_file(folder / "out" / "model.safetensors").items()}
    save_file(tensors, folder / "half.safetensors")
    text = run(folder, "verify", "out", "half.safetensors", code=1).stdout
    assert "dtype    expected F32 [8], found BF16 [8]" in text and "was anything frozen" not in text
    advice = "hint: values in another dtype went through a cast: keep the published dtype in memory and in the file;"
    assert advice in text and "ckptsurg.watch" not in text


def test_a_cause_is_not_settled_in_one_word(folder):
    tensors = load_file(folder / "moved.safetensors")
    tensors["layers.0.weight"][0, 0] += 1
    save_file(tensors, folder / "both.safetensors")
    # What moves as one tensor does settles nothing of the other.
    text = run(folder, "verify", "out", "both.safetensors", "--baseline", "out", "--markdown", "b.md", code=1).stdout
    assert "not settled" in text + (folder / "b.md").read_text() and "unknown" not in text


def test_verify_of_another_model_is_one_line(folder):
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    text = run(folder, "verify", "out/freeze.json", "other.safetensors", code=1).stdout
    assert text.splitlines()[0] == (
        "FAILED none of the manifest's 28 frozen tensors is there: is it this model's manifest?"
    )
    assert len(text.splitlines()) <= 4


def test_plan_shows_what_is_drawn(folder):
    text = run(folder, "plan", "spec.yaml", "base.safetensors").stdout
    assert "fc.weight  [5, 8] -> F32 [2, 8]  kaiming_uniform(a=2.23607, mode=fan_in" in text
    assert "score.weight  BF16 [2, 2]  zeros()" in text


def test_diff_says_what_differs(folder):
    assert run(folder, "diff", "out", "out").stdout == "identical\n"
    text = run(folder, "diff", "out", "trained.safetensors", code=1).stdout
    assert "1 tensor differs" in text and "fc.weight" in text


# --- For programs -----------------------------------------------------------------------------------


def _json(done: subprocess.CompletedProcess[str]):
    assert re.fullmatch(r"((reflinked [^\n]+, )?(copied [^\n]+, )?wrote [^\n]+\n)?", done.stderr)
    return json.loads(done.stdout)


def test_json_of_inspect(folder):
    document = _json(run(folder, "inspect", "base.safetensors", "--json"))
    assert document["version"] == 1 and document["metadata"] == {"format": "pt"}
    size = (folder / "base.safetensors").stat().st_size
    assert document["files"] == [{"file": "base.safetensors", "size": size}]
    assert document["tensors"]["fc.weight"] == {"dtype": "F32", "shape": [5, 8], "file": "base.safetensors"}


def test_json_of_plan(folder):
    document = _json(run(folder, "plan", "spec.yaml", "base.safetensors", "--json"))
    assert document["counts"] == {"copy": 28, "drop": 1, "reinit": 2, "add": 1, "frozen": 28, "trainable": 3}
    rows = {tensor["name"]: tensor for tensor in document["tensors"]}
    expected = {"name": "fc.weight", "action": "reinit", "frozen": False, "dtype": "F32", "shape": [2, 8]}
    assert expected.items() <= rows["fc.weight"].items() and rows["fc.weight"]["rule"] == "reinit[0]"
    ckptsurg.Plan.model_validate_json(json.dumps(document))


def test_json_of_manifest_and_rewrite_is_what_is_written(folder):
    document = _json(run(folder, "rewrite", "spec.yaml", "base.safetensors", "-o", "json", "--json"))
    assert document == json.loads((folder / "json" / "freeze.json").read_text())
    (folder / "freeze.yaml").write_text('version: 1\nfreeze: ["**", "!fc"]\n')
    arguments = ("manifest", "freeze.yaml", "base.safetensors", "-o", "only.json", "--digest", "sha256", "--json")
    document = _json(run(folder, *arguments))
    assert document == json.loads((folder / "only.json").read_text()) and document["root"].startswith("sha256:")
    error = run(folder, "manifest", "spec.yaml", "base.safetensors", "-o", "no.json", code=2).stderr
    assert "reinit: changes the checkpoint; a manifest alone only freezes" in error


def test_json_of_verify_and_diff(folder):
    document = _json(run(folder, "verify", "out/freeze.json", "moved.safetensors", "--json", code=1))
    drifted = [{"name": "bn.running_mean", "verdict": "changed", "cause": "batchnorm_stats", "detail": None}]
    assert document == {
        "version": 1,
        "ok": False,
        "verified": 27,
        "drifted": drifted,
        "extra": [],
        "missing_trainable": [],
    }
    document = _json(run(folder, "diff", "out", "trained.safetensors", "--json", code=1))
    assert document["ok"] is False and [t["name"] for t in document["tensors"]] == ["fc.weight"]


@pytest.mark.parametrize("document", ["spec", "plan", "manifest", "report"])
def test_schemas(folder, document):
    schema = _json(run(folder, "schema", document))
    assert schema["$schema"].startswith("https://json-schema.org/")
    for kind in [schema["$defs"][one["$ref"].split("/")[-1]] for one in schema.get("anyOf", [])] or [schema]:
        assert kind["additionalProperties"] is False and "version" in kind["required"]


def test_what_is_printed_fits_its_schema(folder):
    for document, arguments, code in (
        ("plan", ["plan", "spec.yaml", "base.safetensors"], 0),
        ("manifest", ["rewrite", "spec.yaml", "base.safetensors", "-o", "schema.safetensors"], 0),
        ("report", ["verify", "out/freeze.json", "moved.safetensors", "--baseline", "out"], 1),
        ("report", ["diff", "out", "moved.safetensors"], 1),
    ):
        schema = _json(run(folder, "schema", document))
        jsonschema.validate(_json(run(folder, *arguments, "--json", code=code)), schema)


def test_the_schema_of_a_spec_accepts_every_spec_and_refuses_slips(folder):
    schema = _json(run(folder, "schema", "spec"))
    for path in (Path(__file__).parent.parent / "specs").glob("*.yaml"):
        # Keys of a mapping are text in JSON.
        jsonschema.validate(json.loads(json.dumps(yaml.safe_load(path.read_text()))), schema)
    for slip in (
        {"version": 2},
        {"version": 1, "freez": "a"},
        {"version": 1, "reinit": [{"match": "a", "init": "zero"}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(slip, schema)


def test_names_map_and_prefix(folder):
    trained = load_file(folder / "trained.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in trained.items()}, folder / "prefixed.safetensors")
    text = run(folder, "verify", "out/freeze.json", "prefixed.safetensors", code=1).stdout
    assert "verify with --prefix model." in text
    run(folder, "verify", "out/freeze.json", "prefixed.safetensors", "--prefix", "model.")
    (folder / "names.yaml").write_text("".join(f"model.{name}: {name}\n" for name in trained))
    run(folder, "verify", "out/freeze.json", "prefixed.safetensors", "--names", "names.yaml")


def test_roots(folder):
    root = ckptsurg.load_manifest(folder / "out").frozen_root
    run(folder, "verify", "out/freeze.json", "trained.safetensors", "--root", root)
    run(folder, "verify", "out/freeze.json", "trained.safetensors", "--root", root[:-1] + "x", code=2)


# --- Exit codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, ["plan", "absent.yaml", "base.safetensors"]),
        (2, ["plan", "spec.yaml", "absent.safetensors"]),
        (2, ["plan", "spec.yaml"]),
        (2, ["plan", "spec.yaml", "base.safetensors", "--ranks", 2, "--json"]),
        (2, ["plan", "--unknown", "spec.yaml", "base.safetensors"]),
        (2, ["rewrite", "spec.yaml", "base.safetensors", "-o", "out"]),
        (2, ["rewrite", "spec.yaml", "base.safetensors", "-o", "new", "--max-shard-size", "many"]),
        (2, ["verify", "spec.yaml", "trained.safetensors"]),
        (2, ["verify", "out/freeze.json", "absent"]),
        (2, ["unknown"]),
        (3, ["inspect", "spec.yaml"]),
        (3, ["verify", "out/freeze.json", "spec.yaml"]),
        (4, ["rewrite", "spec.yaml", "base.safetensors", "-o", "/proc/nowhere/out"]),
        (0, ["--help"]),
        (0, ["--version"]),
    ],
)
def test_exit_codes(folder, code, arguments):
    done = run(folder, *arguments, code=code)
    if code:
        assert done.stdout == "" and len(done.stderr.strip().splitlines()) <= 4


EXIT_CODES = {
    "CkptsurgError": 2,
    "UsageError": 2,
    "DocumentError": 2,
    "SpecError": 2,
    "ManifestError": 2,
    "FreezeError": 2,
    "CheckpointError": 3,
    "SystemFailure": 4,
    "PeerFailed": 4,
    "FrozenWeightsChanged": 1,
}
PROBLEMS = "('spec.yaml', [errors.Problem('reinit[0]', 'it')])"
ARGUMENTS = dict.fromkeys(EXIT_CODES, "('it')") | dict.fromkeys(
    ("DocumentError", "SpecError", "ManifestError"), PROBLEMS
)
ARGUMENTS["PeerFailed"] = "(3, 'it')"

#: Whatever a command raises; the first is what libraries in Rust raise when they panic, which is no Exception.
RAISED = {
    "class Panic(BaseException): pass\nraised = Panic('a thread')": (4, "unforeseen Panic: a thread"),
    "raised = RuntimeError('two\\nlines\\x1b')": (4, "unforeseen RuntimeError: two\\nlines\\x1b"),
    "raised = RecursionError()": (4, "unforeseen RecursionError"),
    "raised = SystemError()": (4, "unforeseen SystemError"),
    "raised = MemoryError()": (4, "out of memory"),
    "raised = OSError(5, 'Input/output error', 'x')": (4, "Input/output error (x)"),
    "raised = KeyboardInterrupt()": (130, "interrupted"),
    **{f"raised = errors.{name}{ARGUMENTS[name]}": (code, "it") for name, code in EXIT_CODES.items()},
}


def test_no_error_has_the_exit_code_of_success_and_all_kinds_are_here():
    def walk(kind: type) -> list[type]:
        return [kind, *(below for child in kind.__subclasses__() for below in walk(child))]

    kinds = walk(ckptsurg.CkptsurgError)
    public = {kind.__name__: kind.exit_code for kind in kinds if kind.__module__ == "ckptsurg.errors"}
    assert public == EXIT_CODES
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4}


@pytest.mark.parametrize("raised", RAISED)
def test_whatever_a_command_raises_is_one_message_and_no_success(folder, raised):
    program = (
        f"from ckptsurg import api, cli, errors\n{raised}\ndef fail(*_): raise raised\napi.inspect = fail\ncli.main()"
    )
    command = [sys.executable, "-c", program, "inspect", "base.safetensors"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    code, message = RAISED[raised]
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) <= 2
    shown = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"CKPTSURG_TRACEBACK": "1"}
    )
    assert ("Traceback" in shown.stderr) == ("unforeseen" in message) and shown.returncode == code


#: A shell starts what it puts in the background so that it ignores SIGINT, and so do its children.
HEEDING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing(tmp_path, number, code):
    size = 3 * 10**9  # sparse: enough to be caught in the middle
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "base.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "spec.yaml").write_text("version: 1\n")
    command = [sys.executable, "-m", "ckptsurg", "rewrite", "spec.yaml", "base.safetensors", "-o", "out"]
    heeded = [sys.executable, "-c", HEEDING, *command]
    process = subprocess.Popen(heeded, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.*/output/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "spec.yaml"]


def test_a_reader_that_goes_away_is_no_difference(folder):
    command = f"set -o pipefail; {sys.executable} -m ckptsurg verify out/freeze.json out | true"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 4) and done.stderr == ""


def test_a_reader_that_goes_away_is_no_traceback(folder):
    command = f"{sys.executable} -m ckptsurg plan spec.yaml base.safetensors --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "{" and done.stderr == ""


def test_streams_that_are_closed_or_full_change_no_exit_code(folder):
    good, bad = "verify out/freeze.json trained.safetensors", "verify out/freeze.json moved.safetensors"
    for command, code in (
        (f"{good} >&-", 0),
        (f"{bad} >&-", 1),
        ("inspect base.safetensors >&- 2>&-", 0),
        ("verify absent.json out 2>/dev/full", 2),
        ("verify absent.json out 2>&-", 2),
        ("frobnicate 2>/dev/full", 2),
        ("inspect base.safetensors >/dev/full", 4),
    ):
        done = subprocess.run(
            f"{sys.executable} -m ckptsurg {command}", shell=True, cwd=folder, capture_output=True, text=True
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), command


def test_help_is_laid_out(folder):
    text = run(folder, "--help").stdout
    assert "\\b" not in text and "Exit codes: 0 done" in text
    # On a terminal of 80 columns no line goes on in the next, and no summary is cut.
    assert max(map(len, text.splitlines())) <= 79
    assert "..." not in text.partition("Commands:")[2]


# --- Slips ------------------------------------------------------------------------------------------


def test_what_was_typed_is_told_from_what_was_meant(folder, tmp_path):
    def error(*arguments: object, place: Path = folder) -> str:
        return run(place, *arguments, code=2).stderr

    said = error("rewrite", "spec.yaml", "base.safetensors", "other")
    assert said.endswith("Error: Missing option '-o' / '--output'. Write -o other\n")
    assert error("rewrite", "spec.yaml", "base.safetensors").endswith("Missing option '-o' / '--output'.\n")
    assert error("rewrite", "spec.yaml", "base.safetensors", "a", "b").endswith("Missing option '-o' / '--output'.\n")

    for first, second in (("trained.safetensors", "out"), ("base.safetensors", "out/freeze.json")):
        said = error("verify", first, second)
        assert said.endswith(f"has no manifest\nhint: the manifest comes first: ckptsurg verify {second} {first}\n")
    assert "comes first" not in error("verify", "trained.safetensors", "base.safetensors")

    # As a shell hands over what stands for an unquoted `**` in a folder of files.
    for name in ("data.csv", "notes.md", "run.sh", "train.py"):
        (tmp_path / name).touch()
    files = sorted(path.name for path in tmp_path.iterdir())
    base, out = folder / "base.safetensors", folder / "out"
    expanded = "the shell has put names of files in the place of a pattern"
    said = error("inspect", base, *files, place=tmp_path)
    assert said == f"error: {expanded}\nhint: quote the pattern, such as '**'\n"
    assert f"Error: {expanded}: quote the" in error("verify", out, base, "--only", *files, place=tmp_path)
    assert error("inspect", base, "nope", "nada", "nil", place=tmp_path).count("matches nothing") == 3
    assert "unexpected extra arguments (nope nada nil)" in error("verify", out, base, "nope", "nada", "nil")


@pytest.mark.parametrize(
    ("root", "found"),
    [("", "nothing"), ("blake3:12", '"blake3:12"'), ("0" * 64, f'"{"0" * 64}"'), ("blake3:" + "G" * 64, '"blake3:G')],
    ids=["empty", "cut-short", "no-algorithm", "other-letters"],
)
def test_a_root_that_is_none_is_told_from_that_of_another_manifest(folder, root, found):
    said = run(folder, "verify", "out", "trained.safetensors", "--root", root, code=2).stderr
    assert said.startswith(f"error: the root: expected blake3: or sha256: with 64 digits from 0 to f, found {found}")
    assert said.endswith("hint: `rewrite` prints it, and the manifest holds it\n")
    other = run(folder, "verify", "out", "trained.safetensors", "--root", f"blake3:{'0' * 64}", code=2).stderr
    assert other.endswith("hint: this is not the manifest that was pinned\n")


# --- Terminals --------------------------------------------------------------------------------------


def _on_a_terminal(folder: Path, *arguments: str) -> str:
    """What a terminal of 100 columns would be sent."""
    main, replica = pty.openpty()
    command = [sys.executable, *arguments]
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm-256color"}
    with subprocess.Popen(command, cwd=folder, stdout=replica, stderr=replica, env=environment) as process:
        os.close(replica)
        chunks = []
        while True:
            try:
                chunk = os.read(main, 4096)
            except OSError:
                break
            if not chunk:
                break
            chunks.append(chunk)
        assert process.wait() == 0
    os.close(main)
    return b"".join(chunks).decode()


def _screen(sent: str) -> list[str]:
    """The lines that stand on a terminal at the end: of what rich sends, the cursor moves up and lines are cleared."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", sent):
        if text:
            lines[row] = f"{lines[row][:column]:{column}}{text}{lines[row][column + len(text) :]}"
            column += len(text)
        elif code == "\r":
            column = 0
        elif code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code.endswith("K"):
            lines[row] = "" if code == "\x1b[2K" else lines[row][:column]
    return [line.rstrip() for line in lines if line.strip()]


WORK = """
import logging, sys
from ckptsurg.cli.rendering import progress

logging.basicConfig(format="%(message)s", level=logging.INFO)
with progress("rewrite", after=float(sys.argv[1])) as advance:
    advance = advance or (lambda done, total: None)
    advance(10_000, 50_000)
    logging.getLogger("ckptsurg").info("a note")
    advance(20_000, 50_000)
    logging.getLogger("ckptsurg").info("copied 50 kB")
print("published    out")
"""


def test_progress_is_gone_before_anything_is_said(folder):
    shown = _on_a_terminal(folder, "-c", WORK, "0")
    assert shown.count("10.0/50.0 kB") and shown.count("20.0/50.0 kB")
    assert _screen(shown) == ["a note", "copied 50 kB", "published    out"]


def test_what_is_over_soon_shows_no_progress(folder):
    assert _on_a_terminal(folder, "-c", WORK, "3600") == "a note\r\ncopied 50 kB\r\npublished    out\r\n"


def test_progress_shows_on_a_terminal_alone(folder):
    command = [sys.executable, "-c", WORK, "0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("a note\ncopied 50 kB\n", "published    out\n")


def test_names_cannot_write_to_the_terminal(tmp_path):
    name = "evil\x1b[31m\u202e\r\nname"
    save_file({name: torch.zeros(2), "ok": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({name: torch.ones(2), "ok": torch.zeros(1)}, tmp_path / "b.safetensors")
    (tmp_path / "spec.yaml").write_text('version: 1\nfreeze: "**"\n')
    run(tmp_path, "manifest", "spec.yaml", "a.safetensors", "-o", "m.json")
    for arguments, code in (
        (("inspect", "a.safetensors"), 0),
        (("plan", "spec.yaml", "a.safetensors"), 0),
        (("diff", "a.safetensors", "b.safetensors"), 1),
        (("verify", "m.json", "b.safetensors"), 1),
        (("inspect", "a.safetensors", "--json"), 0),
        (("verify", "m.json", "b.safetensors", "--json"), 1),
    ):
        text = run(tmp_path, *arguments, code=code).stdout
        assert "\x1b" not in text and "\u202e" not in text and "\r" not in text
        assert "evil" in text
