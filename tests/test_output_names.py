"""Blocks that are renumbered and modules that are called otherwise: in plan, output and manifest, and for verify."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckptsurg
from ckptsurg.matching import Names
from ckptsurg.planning.output_names import renumbered

NAMES = (
    "wte.weight",
    *(f"h.{n}.attn.{part}_proj.weight" for n in range(4) for part in "qkv"),
    *(f"h.{n}.moe.experts.{e}.w" for n in range(4) for e in range(3)),
    "ln_f/gamma",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({name: torch.randn(3, 2) for name in NAMES}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def called(spec: dict[str, Any], base: Path) -> dict[str, str]:
    """The new name of each tensor of the base that is left."""
    return {tensor.name: tensor.output_name for tensor in ckptsurg.plan({"version": 1, **spec}, base).output}


def changed(spec: dict[str, Any], base: Path) -> dict[str, str]:
    return {name: new for name, new in called(spec, base).items() if new != name}


def refusal(spec: dict[str, Any], base: Path) -> str:
    with pytest.raises(ckptsurg.SpecError) as caught:
        ckptsurg.plan({"version": 1, **spec}, base)
    return str(caught.value)


def test_blocks_close_the_gaps(base: Path) -> None:
    found = changed({"drop": {"match": "h[1:3]", "renumber": True}}, base)
    assert found == {name: name.replace("h.3.", "h.1.") for name in NAMES if name.startswith("h.3.")}


def test_blocks_in_blocks_and_only_where_it_is_asked_for(base: Path) -> None:
    drop = [{"match": "**.experts[0]", "renumber": True}, {"match": "h[0]", "renumber": True}, "h[3]"]
    found = called({"drop": drop}, base)
    assert found["h.1.moe.experts.2.w"] == "h.0.moe.experts.1.w" and found["h.2.attn.q_proj.weight"].startswith("h.1.")
    assert not any(name.startswith("h.3") for name in found)


@given(st.sets(st.integers(0, 11)), st.integers(1, 12))
def test_what_is_left_keeps_its_order_and_counts_from_the_first(gone: set[int], count: int) -> None:
    """Against the list that Python itself makes shorter."""
    gone = {number for number in gone if number < count}
    blocks = [number for number in range(count) if number not in gone]
    left = [f"m/{number}.w" for number in blocks]
    new = renumbered(left, [f"m/{number}.w" for number in gone])
    assert [new.get(name, name) for name in left] == [f"m/{place}.w" for place in range(len(blocks))]


# --- Patterns speak of the base ------------------------------------------------------------------------


@given(st.data(), st.integers(1, 9))
def test_a_slice_counts_what_is_dropped_and_selects_what_is_left(data: st.DataObject, count: int) -> None:
    """Against Python's own slice of the base's blocks."""
    left = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    bound = st.none() | st.integers(-count, count)
    start, stop, step = data.draw(st.tuples(bound, bound, st.sampled_from([None, 1, 2, 3, -1, -2])))
    text = ":".join("" if part is None else str(part) for part in (start, stop, step))
    base = Names(f"m/{number}.w" for number in range(count))
    [(_, found)] = base.part(f"m/{number}.w" for number in sorted(left)).match(f"m[{text}]")
    assert set(found) == {f"m/{number}.w" for number in range(count)[start:stop:step] if number in left}


@pytest.mark.parametrize("renumber", [True, False])
def test_the_last_block_is_the_last_of_the_base_under_every_key(base: Path, renumber: bool) -> None:
    spec = {
        "drop": [{"match": "h[1:3]", "renumber": renumber}],
        "train": ["h[-1:].attn", "h[-3:].moe.experts[1]"],
        "reinit": [{"match": "h[-1].moe.experts[0]", "init": "ones"}],
        "cast": [{"match": "h[2:]", "dtype": "BF16"}],
        "rename": [{"match": "h[-1:].attn", "to": "h.*.self_attn"}],
    }
    new = "h.1" if renumber else "h.3"
    output = {tensor.output_name: tensor for tensor in ckptsurg.plan({"version": 1, **spec}, base).output}
    drawn = [f"{new}.moe.experts.0.w"]
    attention = [f"{new}.self_attn.{part}_proj.weight" for part in "qkv"]
    assert [name for name, one in output.items() if one.action == "reinit"] == drawn
    trained = {name for name, one in output.items() if not one.frozen}
    assert trained == {*drawn, *attention, f"{new}.moe.experts.1.w"}
    last = [*attention, *(f"{new}.moe.experts.{e}.w" for e in range(3))]
    assert {name for name, one in output.items() if one.dtype == "BF16"} == set(last)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("h[-2:-1]", '"!h[-2:-1]" matches nothing that is left: `drop` takes what it matches (6 tensors)'),
        ("h[4]", '"!h[4]": [4] is out of range: "h" has children 0..3'),
        (
            "h.1",
            '"!h.1" matches nothing that is left: `drop` takes what it matches (6 tensors); '
            "names are the base's, and what the output calls h.1 is h.3",
        ),
        ("embed", '"!embed" matches nothing; names are the base\'s, and what the output calls embed is wte'),
        ("embde", '"!embde" matches nothing; at that place there are: h, ln_f, wte'),
    ],
)
def test_what_a_pattern_says_of_blocks_that_are_gone(base: Path, pattern: str, said: str) -> None:
    drop = {"match": "h[1:3]", "renumber": True}
    spec = {"drop": drop, "freeze": ["**", f"!{pattern}"], "rename": [{"match": "wte", "to": "embed"}]}
    assert refusal(spec, base) == f"spec: freeze[1]: {said}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[-1:]", '[-1:] counts from the end, but "net" has children 0..1, 4..6, with gaps; {}: "net.6"'),
        ("[-4]", '[-4] counts from the end, but "net" has children 0..1, 4..6, with gaps; {}: "net.1"'),
        ("[-3:-1]", '[-3:-1] counts from the end, but "net" has children 0..1, 4..6, with gaps; {}: "net.{{4..5}}"'),
        ("[1:-2]", '[1:-2] counts from the end, but "net" has children 0..1, 4..6, with gaps; {}: "net.{{1,4}}"'),
        ("[::2]", '[::2] has a step, but "net" has children 0..1, 4..6, with gaps; {}: "net.{{0,4,6}}"'),
        ("[-9]", '[-9] counts from the end, but "net" has children 0..1, 4..6, with gaps; {}'),
    ],
)
def test_gaps_of_the_base_are_ambiguous_and_the_advice_is_what_was_asked(tmp_path: Path, given: str, said: str) -> None:
    save_file({f"net.{n}.w": torch.zeros(1) for n in (0, 1, 4, 5, 6)}, tmp_path / "x.safetensors")
    message = refusal({"freeze": f"net{given}"}, tmp_path / "x.safetensors")
    assert message == f'spec: freeze: "net{given}": ' + said.format("name those you mean")


def test_a_name_of_two_tensors_is_explained_for_both(base: Path) -> None:
    spec = {"version": 1, "drop": [{"match": "h[1:3]", "renumber": True}], "freeze": ["**", "!h[-1:].attn"]}
    found = ckptsurg.explain(spec, base, "h.1.attn.q_proj.weight")
    assert (found.tensor.action, [one.rule for one in found.reasons]) == ("drop", ["drop[0]"])
    assert found.also is not None and found.also.tensor.name == "h.3.attn.q_proj.weight"
    assert [(one.rule, one.decides) for one in found.also.reasons] == [("freeze[0]", False), ("freeze[1]", True)]
    alone = ckptsurg.explain(spec, base, "h.3.attn.q_proj.weight")
    assert alone.also is None and alone.to_json() == found.also.to_json()


def test_a_plan_shows_what_blocks_become_called(base: Path) -> None:
    spec = base.with_name("spec.yaml")
    spec.write_text('version: 1\ndrop: {match: "h[1:3]", renumber: true}\nfreeze: ["**", "!h.3"]\n')
    command = [sys.executable, "-m", "ckptsurg", "plan", str(spec), str(base)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    [row] = [line for line in lines if "!h.3" in line]
    assert row.split()[-3:] == ["h.3...", "->", "h.1..."]
    name = "h.1.attn.q_proj.weight"
    shown = subprocess.run([*command, "--explain", name], capture_output=True, text=True, check=True).stdout
    assert shown == (
        f"{name}  F32 [3, 2]  dropped\n"
        "  * drop  h[1:3]  takes it\n"
        f"\nwhat is called {name} in the output is another tensor:\n"
        f"h.3.attn.q_proj.weight -> {name}  F32 [3, 2]  trains\n"
        "    freeze[0]  **  takes it\n"
        "  * freeze[1]  !h.3  gives it away\n"
        "  * is what counts: in a list the last one does\n"
    )


# --- What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"drop": {"match": "h.1.attn", "renumber": True}}, "no part of a numbered block that goes as a whole"),
        ({"drop": [{"match": "wte", "renumber": True}]}, "wte.weight: no part of a numbered block"),
        ({"rename": [{"match": "h.*.attn", "to": "layers.self_attn"}]}, "has these wildcards: *; "),
        ({"rename": [{"match": "h.*.attn", "to": "layers.**.self_attn"}]}, "they stand for one another"),
        ({"rename": [{"match": "h.{0..3}", "to": "layers.{0..2}"}]}, 'has 4 alternatives, and "layers.{0..2}" has 3'),
        (
            {"rename": [{"match": "h", "to": "x"}, {"match": "h.0", "to": "y"}]},
            "rename[0] and rename[1] both claim h.0.attn.k_proj.weight",
        ),
        ({"rename": [{"match": "wte", "to": "h.0.attn.q_proj"}]}, "would all be called h.0.attn.q_proj.weight"),
        (
            {"rename": [{"match": "h.{0,1}", "to": "x"}]},
            "h.0.attn.k_proj.weight, h.1.attn.k_proj.weight would all be called x.attn.k_proj.weight",
        ),
        ({"rename": [{"match": "re:h\\.([0-9])\\..*", "to": r"x.\2"}]}, "has 1 groups"),
        ({"rename": [{"match": "wte.weight", "to": "__metadata__"}]}, "is no name for a tensor"),
        ({"rename": [{"match": "nowhere", "to": "x"}]}, '"nowhere" matches nothing'),
        (
            {
                "rename": [{"match": "wte", "to": "e"}],
                "add": [{"name": "e.weight", "shape": [1], "dtype": "F32", "init": "zeros"}],
            },
            '"e.weight" is a tensor that the base has',
        ),
    ],
)
def test_what_cannot_be_renamed_is_refused(base: Path, spec: dict[str, Any], said: str) -> None:
    assert said in refusal(spec, base)


def test_numbers_that_had_gaps_are_not_guessed(tmp_path: Path) -> None:
    save_file({f"net.{n}.w": torch.zeros(1) for n in (0, 2, 4)}, tmp_path / "x.safetensors")
    said = refusal({"drop": {"match": "net.2", "renumber": True}}, tmp_path / "x.safetensors")
    assert "the numbers of net have gaps in the base" in said


@pytest.mark.parametrize(
    ("rule", "pattern", "new"),
    [
        ({"match": "h.*.attn", "to": "layers.*.self_attn"}, r"h\.(\d)\.attn", r"layers.\1.self_attn"),
        ({"match": "h.*.attn.{q,k,v}_proj", "to": "h.*.{query,key,value}"}, None, None),
        ({"match": "**.experts.*.w", "to": "**.expert_*.weight"}, r"experts\.(\d)\.w$", r"expert_\1.weight"),
        ({"match": "**", "to": "model.**"}, r"^", "model."),
        ({"match": "h[0:2].moe", "to": "h.*.mlp"}, r"^h\.([01])\.moe", r"h.\1.mlp"),
        ({"match": "re:h\\.(.*)_proj(.*)", "to": r"blocks/\1\2"}, r"^h\.(.*)_proj(.*)$", r"blocks/\1\2"),
        ({"match": "ln_f.gamma", "to": "norm.weight"}, r"^ln_f/gamma$", "norm.weight"),
        ({"match": "?te", "to": "?_embeddings"}, r"^(w)te", r"\1_embeddings"),
    ],
)
def test_templates_against_regular_expressions_of_python(
    base: Path, rule: dict[str, str], pattern: str | None, new: str | None
) -> None:
    found = called({"rename": [rule]}, base)
    if pattern is None or new is None:
        words = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
        expected = {n: re.sub(r"attn\.(._proj)", lambda m: words[m[1]], n) for n in NAMES}
    else:
        expected = {name: re.sub(pattern, new, name) for name in NAMES}
    assert found == expected


def test_a_module_that_is_renamed_and_renumbered(base: Path) -> None:
    spec = {"drop": {"match": "h[0]", "renumber": True}, "rename": [{"match": "h.*.attn", "to": "layers.*.self_attn"}]}
    found = called(spec, base)
    assert found["h.3.attn.q_proj.weight"] == "layers.2.self_attn.q_proj.weight"
    assert found["h.3.moe.experts.0.w"] == "h.2.moe.experts.0.w"


def test_the_manifest_keeps_the_names_and_verify_goes_by_the_new_ones(base: Path, tmp_path: Path) -> None:
    spec = {
        "version": 1,
        "freeze": ["**", "!wte"],
        "drop": {"match": "h[1]", "renumber": True},
        "rename": [{"match": "wte", "to": "embed"}],
        "add": [{"name": "wte.weight", "shape": [3, 2], "dtype": "F32", "init": "zeros"}],
    }
    planned = ckptsurg.plan(spec, base)
    assert planned.counts["rename"] == 1 + 2 * 6
    manifest = ckptsurg.rewrite(spec, base, tmp_path / "out", max_shard_size=100)
    document = json.loads((tmp_path / "out" / "freeze.json").read_text())
    assert document["tensors"]["h.1.attn.q_proj.weight"]["from"] == "h.2.attn.q_proj.weight"
    assert "from" not in document["tensors"]["h.0.attn.q_proj.weight"]
    assert document["dropped"] == sorted(name for name in NAMES if name.startswith("h.1."))
    assert ckptsurg.load_manifest(tmp_path / "out") == manifest

    before = load_file(base)
    after = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    for tensor in planned.output:
        if tensor.action == "copy":
            assert after[tensor.output_name].numpy().tobytes() == before[tensor.name].numpy().tobytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys() == manifest.tensors.keys()
    # One bit of a renamed tensor; and the base, whose tensors are called otherwise, as a baseline.
    moved = dict(after)
    moved["h.1.attn.q_proj.weight"] = moved["h.1.attn.q_proj.weight"].clone()
    moved["h.1.attn.q_proj.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(moved, tmp_path / "trained.safetensors")
    report = ckptsurg.verify(manifest, tmp_path / "trained.safetensors", baseline=tmp_path / "out")
    assert [one.name for one in report.drifted] == ["h.1.attn.q_proj.weight"]


def test_the_values_that_are_drawn_go_by_the_new_name(base: Path, tmp_path: Path) -> None:
    draw = {"reinit": [{"match": "wte", "init": {"normal": {"std": 1.0}}}]}
    renamed = {"rename": [{"match": "wte", "to": "embed"}]}
    ckptsurg.rewrite({"version": 1, **draw, **renamed}, base, tmp_path / "a.safetensors")
    ckptsurg.rewrite({"version": 1, **renamed}, base, tmp_path / "b.safetensors")
    again = {"reinit": [{"match": "embed", "init": {"normal": {"std": 1.0}}}]}
    ckptsurg.rewrite({"version": 1, **again}, tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
