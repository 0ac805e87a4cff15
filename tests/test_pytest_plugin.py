"""The pytest plugin and the assertions, as the test suites of other projects meet them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torch._dynamo  # with the import below: what an inner pytest imports first, it forgets at its end
from safetensors.torch import save_file
from torch import nn

import ckptsurg
import ckptsurg.integrations.pytorch
from ckptsurg.testing import assert_bit_identical, frozen_weights

#: What a project has: a model, a step of training, and one that is spoilt.
TRAINING = """\
import torch
from torch import nn


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(4, 4), "fc": nn.Linear(4, 3)})


def train(model, spoil=None, only="fc"):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(only)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model["fc"](model["body"](torch.ones(2, 4))).pow(2).sum().backward()
    optimizer.step()
    if spoil is not None:
        model.get_parameter(spoil).data.view(-1)[5 if spoil.endswith("weight") else 1] += 0.5
"""


@pytest.fixture
def project(pytester):
    """Another project, with its model, and with manifests: of all but the head, and of the head."""
    pytester.makepyfile(training=TRAINING)
    scope: dict = {}
    exec(TRAINING, scope)  # as the project has it
    model = scope["make_model"]()
    ckptsurg.write_manifest(ckptsurg.make_manifest(["**", "!fc"], model), pytester.path / "body.json")
    ckptsurg.write_manifest(ckptsurg.make_manifest("fc", model), pytester.path / "fc.json")
    return pytester


def _tests(project, source: str) -> None:
    project.makepyfile(test_it="import pytest\nfrom training import make_model, train\n\n\n" + source)


def _errors(result) -> list[str]:
    """What pytest marks as the error, test by test, without its mark."""
    return dedent("\n".join(line[1:] for line in result.outlines if line.startswith("E   "))).splitlines()


# --- The fixture ------------------------------------------------------------------------------------


def test_a_step_that_leaves_frozen_weights_alone_passes(project):
    _tests(
        project,
        """
def test_patterns(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze=["**", "!fc"]) as watch:
        train(model)
    assert watch.report.ok and watch.report.verified == 2

def test_by_position(frozen_weights):
    model = make_model()
    with frozen_weights(model, "body"):
        train(model)

def test_an_object_with_rows(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze=["body.bias", {"match": "body.weight", "rows": "[2:]"}]):
        train(model, spoil="body.weight")

@pytest.mark.parametrize("manifest", ["body.json", __import__("pathlib").Path("body.json")])
def test_manifest(frozen_weights, manifest):
    model = make_model()
    with frozen_weights(model, manifest=manifest, expect_trained=True):
        train(model)

def test_the_model_is_only_watched(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze="body"):
        assert all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(p, "_post_accumulate_grad_hooks") and p._post_accumulate_grad_hooks
                   for p in model.parameters())

def test_one_after_the_other_and_one_in_the_other(frozen_weights):
    one, other = make_model(), make_model()
    with frozen_weights(one, freeze="body"), frozen_weights(other, freeze="fc"):
        train(one)
        train(other, only="body")
    with frozen_weights(one, freeze="fc"):
        train(one, only="body")
""",
    )
    project.runpytest_inprocess("--strict-markers", "-W", "error").assert_outcomes(passed=7)


def test_the_message_is_a_table(project):
    _tests(
        project,
        """
def test_it(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze=["**", "!fc"]):
        train(model, spoil="body.weight")
""",
    )
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    assert _errors(result) == [
        "ckptsurg.errors.FrozenWeightsChanged: 1 frozen tensor changed:",
        "tensor       verdict  elements  largest  cause",
        "body.weight  changed  1         0.5      not settled",
    ]


def test_the_message_names_causes_and_remedies(project):
    _tests(
        project,
        """
def test_it(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze=["**", "!fc"]):
        train(model, only="")
""",
    )
    result = project.runpytest_inprocess()
    errors = _errors(result)
    assert errors[0] == "ckptsurg.errors.FrozenWeightsChanged: 2 frozen tensors changed:"
    assert re.fullmatch(r"body\.bias +changed +4 +\d\.\d+ +never_frozen", errors[2])
    assert re.fullmatch(r"body\.weight +changed +16 +\d\.\d+ +never_frozen", errors[3])
    assert errors[4].startswith("never_frozen: its requires_grad was on from the beginning")
    assert len(errors) == 5, "one line a cause"


def test_what_should_train_and_did_not(project):
    _tests(
        project,
        """
def test_it(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze="body", expect_trained=True):
        pass
""",
    )
    assert [line.strip() for line in _errors(project.runpytest_inprocess())] == [
        "ckptsurg.errors.FrozenWeightsChanged: 2 trainable tensors did not move:",
        "fc.bias",
        "fc.weight",
    ]


@pytest.mark.parametrize("style", ["auto", "short"])
def test_a_traceback_ends_in_the_users_line(project, style):
    _tests(
        project,
        """
from ckptsurg.testing import assert_bit_identical

def test_moved(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze="body"):
        train(model, spoil="body.weight")

def test_pattern(frozen_weights):
    with frozen_weights(make_model(), freeze=["**", "!fcc"]):
        pass

def test_nothing(frozen_weights):
    with frozen_weights(make_model()):
        pass

def test_not_this_model(frozen_weights):
    model = make_model()
    model["body"].weight.data += 1
    with frozen_weights(model, manifest="body.json"):
        pass

def test_other_bits():
    assert_bit_identical(make_model(), {})
""",
    )
    result = project.runpytest_inprocess(f"--tb={style}")
    result.assert_outcomes(failed=5)
    places = re.findall(r"^(\S+\.py):(\d+): ", result.stdout.str(), re.MULTILINE)
    assert {Path(file).name for file, _ in places} == {"test_it.py"}
    source = (project.path / "test_it.py").read_text().splitlines()
    lines = [source[int(number) - 1].strip() for _, number in places]
    assert lines == [
        'with frozen_weights(model, freeze="body"):',
        'with frozen_weights(make_model(), freeze=["**", "!fcc"]):',
        "with frozen_weights(make_model()):",
        'with frozen_weights(model, manifest="body.json"):',
        "assert_bit_identical(make_model(), {})",
    ]


def test_an_error_of_the_test_is_not_hidden(project):
    _tests(
        project,
        """
def test_it(frozen_weights):
    model = make_model()
    with frozen_weights(model, freeze="body"):
        train(model, spoil="body.weight")
        raise KeyError("mine")
""",
    )
    assert _errors(project.runpytest_inprocess()) == ["KeyError: 'mine'"]


# --- Where the frozen weights are named -------------------------------------------------------------

#: Which of the two parts may not move is told by moving each.
WHICH = """
def held(frozen_weights, *given, **options):
    found = []
    for part in ("body", "fc"):
        model = make_model()
        try:
            with frozen_weights(model, *given, **options):
                model[part].weight.data += 1
        except __import__("ckptsurg").FrozenWeightsChanged:
            found.append(part)
    return found
"""


def test_the_call_comes_before_the_marker_and_the_marker_before_the_option(project):
    _tests(
        project,
        WHICH
        + """
def test_option(frozen_weights):
    assert held(frozen_weights) == ["body"]

@pytest.mark.frozen_weights("fc")
def test_marker(frozen_weights):
    assert held(frozen_weights) == ["fc"]

@pytest.mark.frozen_weights(freeze=["**", "!body"])
def test_marker_by_keyword(frozen_weights):
    assert held(frozen_weights) == ["fc"]

@pytest.mark.frozen_weights(manifest="fc.json")
def test_marker_with_manifest(frozen_weights):
    assert held(frozen_weights) == ["fc"]

@pytest.mark.frozen_weights("fc")
def test_call_with_patterns(frozen_weights):
    assert held(frozen_weights, "body") == ["body"]
    assert held(frozen_weights, freeze="body") == ["body"]

@pytest.mark.frozen_weights(manifest="fc.json")
def test_call_with_patterns_over_a_manifest(frozen_weights):
    assert held(frozen_weights, "body") == ["body"]

@pytest.mark.frozen_weights("fc")
def test_call_with_manifest(frozen_weights):
    assert held(frozen_weights, manifest="body.json") == ["body"]

def test_call_over_the_option(frozen_weights):
    assert held(frozen_weights, "fc") == ["fc"]

@pytest.mark.frozen_weights("body")
class TestNearest:
    def test_class(self, frozen_weights):
        assert held(frozen_weights) == ["body"]

    @pytest.mark.frozen_weights("fc")
    def test_method(self, frozen_weights):
        assert held(frozen_weights) == ["fc"]

@pytest.mark.frozen_weights("fc")
def test_none_is_nothing(frozen_weights):
    assert held(frozen_weights, None, manifest=None) == ["fc"]

@pytest.mark.frozen_weights(manifest="fc.json")
def test_none_is_nothing_to_a_manifest_either(frozen_weights):
    assert held(frozen_weights, None, manifest=None) == ["fc"]
""",
    )
    result = project.runpytest_inprocess("--strict-markers", "--freeze-manifest", "body.json")
    result.assert_outcomes(passed=12)


def test_the_marker_may_say_how_and_the_option_what(project):
    _tests(
        project,
        """
@pytest.mark.frozen_weights(expect_trained=True)
def test_trains(frozen_weights):
    model = make_model()
    with frozen_weights(model):
        train(model)

@pytest.mark.frozen_weights(expect_trained=True)
def test_trains_nothing(frozen_weights):
    with frozen_weights(make_model()):
        pass

@pytest.mark.frozen_weights("body", expect_trained=True)
def test_the_call_is_asked_last(frozen_weights):
    with frozen_weights(make_model(), expect_trained=False):
        pass
""",
    )
    result = project.runpytest_inprocess("--freeze-manifest", "body.json")
    result.assert_outcomes(passed=2, failed=1)
    assert "2 trainable tensors did not move:" in _errors(result)[0]


def test_names_may_differ_from_the_manifests(project):
    _tests(
        project,
        """
@pytest.mark.frozen_weights(manifest="body.json", names=lambda name: name.removeprefix("net."))
@pytest.mark.parametrize("spoil", [None, "body.weight"])
def test_it(frozen_weights, spoil):
    model = make_model()
    with frozen_weights(__import__("torch").nn.ModuleDict({"net": model})):
        train(model, spoil)
""",
    )
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    assert "body.weight  changed  1         0.5      not settled" in _errors(result)


def test_the_option_is_a_path_from_where_pytest_was_started(project):
    _tests(
        project,
        """
def test_it(frozen_weights, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with frozen_weights(make_model()):
        pass
""",
    )
    project.runpytest_inprocess("--freeze-manifest", "body.json").assert_outcomes(passed=1)


def test_nothing_given_is_one_clear_error(project):
    _tests(
        project,
        """
def test_it(frozen_weights):
    with frozen_weights(make_model()):
        pass
""",
    )
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    [error] = _errors(result)
    assert error.startswith("ckptsurg.errors.UsageError: give either patterns of what is frozen, or a manifest")


def test_what_is_given_and_does_not_fit_is_an_error(project):
    _tests(
        project,
        """
def test_both(frozen_weights):
    with frozen_weights(make_model(), "body", manifest="body.json"):
        pass

def test_typo(frozen_weights):
    with frozen_weights(make_model(), freeze=["**", "!fcc"]):
        pass

def test_no_manifest(frozen_weights):
    with frozen_weights(make_model(), manifest="bodi.json"):
        pass

def test_no_model(frozen_weights):
    with frozen_weights(make_model().state_dict(), freeze="body"):
        pass

@pytest.mark.frozen_weights(frezee="body")
def test_a_keyword_that_is_not_known(frozen_weights):
    with frozen_weights(make_model()):
        pass

def test_used_twice(frozen_weights):
    watch = frozen_weights(make_model(), freeze="body")
    with watch:
        pass
    with watch:
        pass
""",
    )
    result = project.runpytest_inprocess("--tb=line")
    result.assert_outcomes(failed=6)
    text = result.stdout.str()
    for said in (
        "UsageError: give either patterns of what is frozen, or a manifest",
        '"!fcc" matches nothing; nearest: !fc',
        "bodi.json: no such file",
        "UsageError: expected a model of torch, found OrderedDict",
        "frezee",
        "UsageError: a watch is used once",
    ):
        assert said in text, said


def test_a_list_in_pieces_says_so(project):
    """Else `("**", "!fc")` would freeze all, head and all, and a test would fail or pass for the wrong reason."""
    _tests(
        project,
        """
@pytest.mark.frozen_weights("**", "!fc")
def test_it(frozen_weights):
    model = make_model()
    with frozen_weights(model):
        train(model)
""",
    )
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    assert "FrozenWeightsChanged" not in result.stdout.str() and "marker" in _errors(result)[0]


def test_help_and_markers_say_what_there_is(project):
    text = project.runpytest_inprocess("--help").stdout.str()
    assert "--freeze-manifest=PATH" in text
    text = project.runpytest_inprocess("--markers").stdout.str()
    assert "@pytest.mark.frozen_weights(freeze=None, *, manifest=None, names=None, expect_trained=False):" in text


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=kept)


def test_it_works_under_xdist(project):
    _tests(
        project,
        """
@pytest.mark.parametrize("spoil", [None, "body.weight", "body.bias", None])
def test_it(frozen_weights, spoil):
    model = make_model()
    with frozen_weights(model):
        train(model, spoil)

@pytest.mark.frozen_weights("fc")
def test_marker(frozen_weights):
    model = make_model()
    with frozen_weights(model):
        train(model, only="body")
""",
    )
    done = _pytest(project.path, "-n", "2", "--strict-markers", "--freeze-manifest", "body.json")
    assert "2 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "body.bias  changed  1         0.5      not settled" in done.stdout
    assert "2 workers" in done.stdout


# --- What it costs when it is not used --------------------------------------------------------------

HEAVY = {"torch", "numpy", "pydantic", "safetensors", "rich", "click", "yaml", "transformers", "lightning"}


def _imported(folder: Path, source: str) -> set[str]:
    """Top-level modules that are there at the end of a session of pytest with these tests."""
    (folder / "conftest.py").write_text(
        "import json, pathlib, sys\n\n\ndef pytest_unconfigure():\n"
        "    names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "    pathlib.Path(__file__).with_name('imported.json').write_text(json.dumps(names))\n"
    )
    (folder / "test_it.py").write_text(source)
    done = _pytest(folder, "--strict-markers")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    return set(json.loads((folder / "imported.json").read_text()))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "def test_it(frozen_weights):\n    frozen_weights(make_model(), freeze='body')",
            "was not entered: write `with",
        ),
        ("MARK\ndef test_it(frozen_weights):\n    pass", "the fixture frozen_weights was not used"),
        ("MARK\ndef test_it():\n    pass", "does not ask for the fixture of that name"),
    ],
)
def test_what_would_check_nothing_fails(project, source, said):
    _tests(project, source.replace("MARK", "@pytest.mark.frozen_weights(freeze='body')"))
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    assert said in result.stdout.str()


def test_a_mark_on_a_module_asks_nothing_of_its_other_tests(project):
    _tests(
        project,
        """
pytestmark = pytest.mark.frozen_weights(freeze="body")

def test_without():
    pass

def test_skipped(frozen_weights):
    pytest.skip("not now")

def test_with(request):
    with request.getfixturevalue("frozen_weights")(make_model()):
        pass
""",
    )
    project.runpytest_inprocess().assert_outcomes(passed=2, skipped=1)


def test_a_plugin_that_is_not_used_imports_nothing(tmp_path):
    imported = _imported(
        tmp_path,
        "import pytest\n\n\ndef test_it(request):\n    assert request.config.pluginmanager.hasplugin('ckptsurg')\n",
    )
    assert "ckptsurg" in imported and not imported & HEAVY


def test_the_check_above_can_fail(tmp_path):
    imported = _imported(tmp_path, "def test_it(frozen_weights):\n    import torch\n")
    assert {"torch", "pydantic"} <= imported & HEAVY


# --- assert_bit_identical ---------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def _state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in Small().state_dict().items()}


def _message(a: object, b: object) -> list[str]:
    with pytest.raises(AssertionError) as caught:
        assert_bit_identical(a, b)
    return str(caught.value).splitlines()


def test_what_is_the_same_is_the_same_in_every_form(tmp_path):
    save_file(_state(), tmp_path / "a.safetensors")
    forms = [Small, _state, lambda: tmp_path / "a.safetensors", lambda: str(tmp_path / "a.safetensors")]
    for one in forms:
        for other in forms:
            assert_bit_identical(one(), other())


def test_a_state_dict_that_is_the_model_shows_nothing():
    model = Small()
    with pytest.raises(
        ckptsurg.UsageError, match=r"both sides are the same memory, such as body\.weight \(hint: keep a copy"
    ):
        assert_bit_identical(model.state_dict(), model)


def test_bits_decide_and_not_values():
    nan = torch.tensor([float("nan")])
    assert_bit_identical({"x": nan}, {"x": nan.clone()})
    assert _message({"x": torch.zeros(2)}, {"x": -torch.zeros(2)})[-1].split() == (
        ["x", "sign_of_zero", "2", "0", "sign_of_zero"]
    )
    assert "x" in _message({"x": torch.ones(2)}, {"x": torch.ones(2).half()})[-1]


@pytest.mark.parametrize("form", ["state dict", "file", "model"])
def test_the_table_is_the_same_for_every_form(tmp_path, form):
    changed = _state()
    changed["body.weight"][1, 1] += 0.5
    changed["body.weight"][3, 3] -= 0.25
    changed["fc.bias"].view(torch.int32)[0] ^= 1
    model = Small()
    model.load_state_dict(changed)
    save_file(changed, tmp_path / "b.safetensors")
    other = {"state dict": changed, "file": tmp_path / "b.safetensors", "model": model}[form]
    message = _message(Small(), other)
    order = sorted(message[2:])
    assert message[:2] == ["2 tensors not bit-identical:", "tensor       verdict  elements  largest      cause"]
    assert order[0] == "body.weight  changed  2         0.5          not settled"
    assert re.fullmatch(r"fc\.bias      changed  1         \d\.\d+e-0\d  not settled", order[1])


def test_every_verdict_has_its_line():
    one = {
        "more": torch.ones(2),
        "cast": torch.ones(2),
        "gone": torch.ones(2),
        "nan": torch.tensor([float("nan")]),
        "same": torch.ones(2),
        "shape": torch.ones(2, 2),
    }
    other = {name: tensor.clone() for name, tensor in one.items() if name != "gone"}
    other["more"] += 1
    other["cast"] = other["cast"].double()
    other["nan"].view(torch.int32)[0] ^= 1
    other["shape"] = torch.ones(4)
    other["new"] = torch.ones(1)
    assert {tuple(line.split()[:2]) for line in _message(one, other)[2:]} == {
        ("more", "changed"),
        ("cast", "dtype_only"),
        ("gone", "removed"),
        ("nan", "nan_payload"),
        ("new", "added"),
        ("shape", "shape"),
    }


def test_a_long_table_is_cut_and_counted():
    one = {f"layer.{i}": torch.zeros(1) for i in range(50)}
    message = _message(one, {name: tensor + 1 for name, tensor in one.items()})
    assert message[0] == "50 tensors not bit-identical:"
    assert len(message) == 2 + 20 + 1 and message[-1] == "... and 30 more"


def test_long_names_are_whole():
    name = "base_model.model.model.language_model.layers.11.block_sparse_moe.experts.7.down_proj.lora_A.default.weight"
    [line] = _message({name: torch.zeros(1)}, {name: torch.ones(1)})[2:]
    assert line.split() == [name, "changed", "1", "1", "not", "settled"]


def test_names_cannot_draw_on_the_terminal():
    assert all("\x1b" not in line for line in _message({"a\x1b[31mb": torch.zeros(1)}, {}))


def test_a_statistic_that_moved_has_its_cause():
    norm = nn.BatchNorm1d(3)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm(torch.randn(4, 3))
    message = _message(before, norm)
    assert len(message) == 5 and all(line.endswith("batchnorm_stats") for line in message[2:])


def test_what_is_not_there_is_no_difference(tmp_path):
    with pytest.raises(ckptsurg.UsageError, match=r"gone\.safetensors"):
        assert_bit_identical(tmp_path / "gone.safetensors", _state())
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ckptsurg.CheckpointError):
        assert_bit_identical(tmp_path / "bad.safetensors", _state())


def test_frozen_weights_without_pytest():
    model = Small()
    with frozen_weights(model, ["**", "!fc"]) as watch:
        assert watch.report is None
        model.fc.weight.data += 1
    assert watch.report.ok
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, frozen_weights(model, ["**", "!fc"]):
        model(torch.ones(2, 4)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert caught.value.causes == {"body.weight": "never_frozen", "body.bias": "never_frozen"}
    assert caught.value.exit_code == 1 and "never_frozen: its requires_grad was on" in str(caught.value)
