"""verify and diff: what is a difference, which one, where; and what is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

import ckptsurg


@pytest.fixture
def published(tmp_path):
    """A published output with a tied pair, an integer, half precision and a trainable head."""
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(6, 4, generator=generator)
    tensors = {
        "embed.weight": embed,
        "lm_head.weight": embed.clone(),
        "body.0.weight": torch.randn(4, 4, generator=generator),
        "body.0.bias": torch.tensor([0.0, -0.0, 1.0, float("nan")]),
        "body.1.weight": torch.randn(4, 4, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
        "fc.weight": torch.randn(3, 4, generator=generator),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    ckptsurg.rewrite({"version": 1, "freeze": ["**", "!fc"]}, tmp_path / "base.safetensors", tmp_path / "out")
    return tmp_path


def _verify(folder, change, **options):
    """Verify what the change makes of the published tensors."""
    tensors = load_file(folder / "out" / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "trained.safetensors")
    return ckptsurg.verify(folder / "out" / "freeze.json", folder / "trained.safetensors", **options)


def _verdicts(report) -> dict[str, str]:
    return {difference.name: difference.verdict for difference in report.drifted}


def test_training_what_trains_is_no_difference(published):
    def change(tensors):
        tensors["fc.weight"] += 1

    report = _verify(published, change)
    assert report.ok and report.verified == 6 and report.drifted == ()


def test_every_verdict(published):
    def change(tensors):
        del tensors["embed.weight"], tensors["lm_head.weight"]
        tensors["body.0.weight"] = tensors["body.0.weight"].half()
        tensors["body.0.bias"] = tensors["body.0.bias"].reshape(2, 2)
        tensors["body.1.weight"] = tensors["body.1.weight"].float()
        tensors["steps"] += 1

    report = _verify(published, change)
    assert not report.ok and report.verified == 0
    assert _verdicts(report) == {
        "embed.weight": "missing",
        "lm_head.weight": "missing",
        "body.0.weight": "dtype",
        "body.0.bias": "shape",
        "body.1.weight": "dtype_only",
        "steps": "changed",
    }
    causes = {difference.name: difference.cause for difference in report.drifted if difference.cause}
    assert causes == {"embed.weight": "not_saved", "lm_head.weight": "not_saved", "body.1.weight": "dtype_only"}


def test_extra_and_missing_trainable_tensors_count_only_if_exact(published):
    def change(tensors):
        tensors["adapter.weight"] = torch.zeros(2)
        del tensors["fc.weight"]

    report = _verify(published, change)
    assert report.ok and report.extra == ("adapter.weight",) and report.missing_trainable == ("fc.weight",)
    assert not _verify(published, change, exact=True).ok
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"1 tensor is not in the manifest: adapter\.weight"):
        _verify(published, change, exact=True).raise_if_changed()


# --- Baseline ---------------------------------------------------------------------------------------


def _with_baseline(published, change):
    return _verify(published, change, baseline=published / "out").drifted


def test_baseline_says_where_and_how_much(published):
    def change(tensors):
        tensors["body.0.weight"][1, 2] += 0.5
        tensors["body.0.weight"][3, 0] -= 0.25

    [difference] = _with_baseline(published, change)
    assert difference.verdict == "changed"
    assert difference.detail.elements_changed == 2 and difference.detail.first_index == (1, 2)
    assert difference.detail.max_abs_diff == pytest.approx(0.5, abs=1e-6)


def test_baseline_tells_a_sign_of_zero(published):
    [difference] = _with_baseline(published, lambda t: t["body.0.bias"][1:2].zero_() and None)
    assert difference.verdict == "sign_of_zero"
    assert difference.detail.elements_changed == 1 and difference.detail.first_index == (1,)
    assert difference.detail.max_abs_diff == 0


def test_baseline_tells_a_nan_payload(published):
    def change(tensors):
        tensors["body.0.bias"].view(torch.int32)[3] += 1

    [difference] = _with_baseline(published, change)
    assert difference.verdict == "nan_payload" and difference.detail.max_abs_diff is None


def test_baseline_of_a_scalar(published):
    [difference] = _with_baseline(published, lambda t: t["steps"].add_(3) and None)
    assert difference.detail.first_index == () and difference.detail.max_abs_diff == 3


def test_baseline_must_be_the_manifests(published):
    with pytest.raises(ckptsurg.UsageError, match="is not the baseline of this manifest"):
        _verify(published, lambda t: t["steps"].add_(3) and None, baseline=published / "trained.safetensors")


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E5M2", 8)])
def test_baseline_counts_packed_elements(tmp_path, dtype, bits):
    def write(path, content: bytes):
        entry = {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, len(content)]}
        header = json.dumps({"w": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content)

    original = np.random.default_rng(0).integers(0, 256, 4 * bits, np.uint8)
    write(tmp_path / "a.safetensors", original.tobytes())
    elements = np.unpackbits(original, bitorder="little").reshape(32, bits)
    elements[[9, 20], 0] ^= 1
    write(tmp_path / "b.safetensors", np.packbits(elements.reshape(-1), bitorder="little").tobytes())
    manifest = ckptsurg.make_manifest("**", tmp_path / "a.safetensors")
    report = ckptsurg.verify(manifest, tmp_path / "b.safetensors", baseline=tmp_path / "a.safetensors")
    [difference] = report.drifted
    assert difference.detail.elements_changed == 2 and difference.detail.first_index == (1, 1)


# --- Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "_orig_mod.{}",
        "_orig_mod.module.{}",
        "_fsdp_wrapped_module.{}",
        "_checkpoint_wrapped_module.{}",
        "base_model.model.{}",
    ],
)
def test_wrappers_names_are_stripped(published, wrapped):
    report = _verify(published, lambda t: {wrapped.format(name): tensor for name, tensor in t.items()})
    assert report.ok and report.extra == ()


def test_wrappers_inside_a_name_are_stripped(published):
    def change(tensors):
        tensors["base_model.model.body.0.base_layer.weight"] = tensors.pop("body.0.weight")
        tensors["body._fsdp_wrapped_module.1._checkpoint_wrapped_module.weight"] = tensors.pop("body.1.weight")

    assert _verify(published, change).ok


def test_the_same_name_comes_before_a_stripped_one(published):
    def change(tensors):
        tensors["module.steps"] = torch.tensor(-1)

    report = _verify(published, change)
    assert report.ok and report.extra == ("module.steps",)


def test_a_prefix_is_one_flag_away(published):
    def change(tensors):
        return {f"model.{name}": tensor for name, tensor in tensors.items()}

    report = _verify(published, change)
    assert not report.ok and set(_verdicts(report).values()) == {"missing"}
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"verify with --prefix model\."):
        report.raise_if_changed()
    assert _verify(published, change, prefix="model.").ok


def test_a_map_of_names(published):
    def change(tensors):
        tensors["trunk.first.weight"] = tensors.pop("body.0.weight")

    assert not _verify(published, change).ok
    assert _verify(published, change, names={"trunk.first.weight": "body.0.weight"}).ok
    assert _verify(published, change, names=lambda name: name.replace("trunk.first", "body.0")).ok
    with pytest.raises(ckptsurg.UsageError, match="no key of the map is a tensor here"):
        _verify(published, change, names={"trunk.second.weight": "body.0.weight"})


def test_one_tensor_proves_one_other():
    tensor = torch.ones(2)
    manifest = ckptsurg.make_manifest("**", {"module.x.w": tensor, "x.module.w": tensor.clone()})
    report = ckptsurg.verify(manifest, {"x.w": tensor})
    assert not report.ok and report.verified == 1


@pytest.mark.parametrize("wrapped", ["module.model.{}", "model._orig_mod.{}", "module.model.module.{}"])
def test_a_prefix_under_wrappers(published, wrapped):
    def change(tensors):
        del tensors["lm_head.weight"]
        return {wrapped.format(name): tensor for name, tensor in tensors.items()}

    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"verify with --prefix model\."):
        _verify(published, change).raise_if_changed()
    assert _verify(published, change, prefix="model.").ok


def test_names_that_collide_are_refused(published):
    def change(tensors):
        tensors["model.steps"] = tensors["steps"].clone()

    with pytest.raises(ckptsurg.UsageError, match=r'model\.steps.* would all be called "steps"'):
        _verify(published, change, prefix="model.")


def test_causes_are_settled_by_evidence_alone(tmp_path):
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    manifest = ckptsurg.make_manifest("**", norm)
    norm.train()(torch.randn(4, 3))
    statistics = {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    report = ckptsurg.verify(manifest, norm)
    assert {d.name: d.cause for d in report.drifted} == dict.fromkeys(statistics, "batchnorm_stats")
    norm[1].weight.data += 1
    assert {d.cause for d in ckptsurg.verify(manifest, norm).drifted} == {None}


# --- Tied tensors, wider dtypes, roots --------------------------------------------------------------


def test_one_of_a_tied_pair_may_be_missing(published):
    manifest = ckptsurg.load_manifest(published / "out" / "freeze.json")
    assert manifest.tied == (("embed.weight", "lm_head.weight"),)

    def drop(tensors):
        del tensors["lm_head.weight"]

    assert _verify(published, drop).ok

    def drop_and_change(tensors):
        del tensors["lm_head.weight"]
        tensors["embed.weight"][0, 0] += 1

    assert _verdicts(_verify(published, drop_and_change)) == {"embed.weight": "changed", "lm_head.weight": "missing"}


def test_widened_tensors_are_accepted_where_allowed(published):
    def widen(tensors):
        tensors["body.1.weight"] = tensors["body.1.weight"].double()

    assert _verdicts(_verify(published, widen)) == {"body.1.weight": "dtype_only"}
    report = _verify(published, widen, allow_widened=True)
    assert report.ok and report.verified == 6 and _verdicts(report) == {"body.1.weight": "dtype_only"}

    def widen_and_change(tensors):
        tensors["body.1.weight"] = tensors["body.1.weight"].double() + 2.0**-40

    assert _verdicts(_verify(published, widen_and_change, allow_widened=True)) == {"body.1.weight": "dtype"}


def test_roots_pin_a_manifest(published):
    manifest = ckptsurg.load_manifest(published / "out" / "freeze.json")
    for root in (manifest.root, manifest.frozen_root):
        assert _verify(published, lambda t: None, root=root).ok
    with pytest.raises(ckptsurg.UsageError, match="the pinned root is blake3:0000"):
        _verify(published, lambda t: None, root="blake3:" + "0" * 64)


def test_one_path_for_files_models_and_state_dicts(published):
    class Holder(torch.nn.Module):
        def __init__(self, tensors):
            super().__init__()
            for name, tensor in tensors.items():
                *path, leaf = name.split(".")
                place = self
                for part in path:
                    if not hasattr(place, part):
                        place.add_module(part, torch.nn.Module())
                    place = getattr(place, part)
                place.register_buffer(leaf, tensor)

    tensors = load_file(published / "out" / "model.safetensors")
    tensors["steps"] += 1
    save_file(tensors, published / "trained.safetensors")
    manifest = ckptsurg.load_manifest(published / "out" / "freeze.json")
    given = (published / "trained.safetensors", Holder(tensors), tensors)
    reports = [ckptsurg.verify(manifest, one, baseline=published / "out") for one in given]
    assert not reports[0].ok and reports[0].drifted == reports[1].drifted == reports[2].drifted


# --- Diff -------------------------------------------------------------------------------------------


def test_diff_names_every_difference(tmp_path):
    one = {"a": torch.zeros(3), "b": torch.ones(2), "c": torch.ones(2, 2), "d": torch.ones(2), "e": torch.ones(1)}
    other = {
        "a": -torch.zeros(3),
        "b": torch.ones(2).half(),
        "c": torch.ones(4),
        "e": torch.ones(1),
        "f": torch.ones(1),
    }
    save_file(one, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    report = ckptsurg.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = {difference.name: difference.verdict for difference in report.tensors}
    assert found == {"a": "sign_of_zero", "b": "dtype_only", "c": "shape", "d": "removed", "f": "added"}
    assert not report.ok
    assert ckptsurg.diff(one, tmp_path / "a.safetensors").ok


# --- Read in threads --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tensors of several buffers each, the first of an odd length; and where in the file each begins."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    tensors = {"a": rng.integers(0, 256, (5 << 20) + 1, np.uint8), "b": rng.integers(0, 256, (3 << 20) + 7, np.uint8)}
    tensors |= {f"c.{i}": rng.integers(0, 256, 100 + i, np.uint8) for i in range(50)}
    safetensors.numpy.save_file(tensors, folder / "base.safetensors")
    manifest = ckptsurg.make_manifest("**", folder / "base.safetensors")
    with ckptsurg.open_checkpoint(folder / "base.safetensors") as base:
        return folder, manifest, {name: base.extents[name] for name in base.tensors}


@pytest.mark.parametrize("jobs", [1, 3])
def test_one_flipped_bit_is_found_wherever_buffers_begin_and_end(large, tmp_path, jobs):
    folder, manifest, extents = large
    raw = bytearray((folder / "base.safetensors").read_bytes())
    places = [(name, place) for name in ("a", "b", "c.7") for place in (0, extents[name].length - 1)]
    for border in range(2 << 20, len(raw), 2 << 20):
        name = next(name for name, one in extents.items() if one.offset <= border < one.offset + one.length)
        places += [(name, border - extents[name].offset - shift) for shift in (0, 1)]
    for name, place in places:
        raw[extents[name].offset + place] ^= 4
        (tmp_path / "moved.safetensors").write_bytes(raw)
        raw[extents[name].offset + place] ^= 4
        assert _verdicts(ckptsurg.verify(manifest, tmp_path / "moved.safetensors", jobs=jobs)) == {name: "changed"}
        located = ckptsurg.verify(manifest, tmp_path / "moved.safetensors", folder / "base.safetensors", jobs=jobs)
        assert _verdicts(located) == {name: "changed"} and located.drifted[0].detail.first_index == (place,)
        found = ckptsurg.diff(folder / "base.safetensors", tmp_path / "moved.safetensors", jobs=jobs)
        assert [(one.name, one.detail.first_index) for one in found.tensors] == [(name, (place,))]


def test_of_what_was_not_asked_for_nothing_is_read(large, tmp_path):
    folder, manifest, extents = large
    raw = bytearray((folder / "base.safetensors").read_bytes())
    raw[extents["b"].offset] ^= 1
    (tmp_path / "moved.safetensors").write_bytes(raw)
    told = []
    report = ckptsurg.verify(
        manifest, tmp_path / "moved.safetensors", only=["c", "a", "!c.0"], progress=lambda *one: told.append(one)
    )
    assert report.ok and report.verified == 50 and report.note == "only c, a, !c.0 was asked for"
    size = sum(extents[name].length for name in ("a", *(f"c.{i}" for i in range(1, 50))))
    assert told[-1] == (size, size)
    assert _verdicts(ckptsurg.verify(manifest, tmp_path / "moved.safetensors", only="b")) == {"b": "changed"}
    with pytest.raises(ckptsurg.SpecError, match='"d" matches nothing; at that place there are: a, b, c'):
        ckptsurg.verify(manifest, folder / "base.safetensors", only="d")


def test_a_twin_is_looked_at_for_one_that_is_missing(published):
    def untie(tensors):
        del tensors["lm_head.weight"]
        tensors["embed.weight"] += 1

    assert _verify(published, lambda t: {n: one for n, one in t.items() if n != "lm_head.weight"}, only="lm_head").ok
    report = _verify(published, untie, only="lm_head")
    assert _verdicts(report) == {"embed.weight": "changed", "lm_head.weight": "missing"}
    with pytest.raises(ckptsurg.UsageError, match="nothing that was asked for is frozen"):
        _verify(published, lambda t: None, only="fc")


def test_who_gives_a_baseline_vouches_for_it(published):
    """Bytes are compared, nothing is hashed, and the report says so; a file does not vouch for itself."""
    report = _verify(published, lambda t: None, baseline=published / "out")
    assert report.ok and report.note == (
        f"6 tensors compared with {published / 'out'} byte by byte, so no digest was computed"
    )
    trained = published / "trained.safetensors"
    assert ckptsurg.verify(published / "out", trained, baseline=trained).note is None
    _verify(published, lambda t: t["steps"].add_(1) and None)
    (published / "vouched.safetensors").write_bytes(trained.read_bytes())
    assert ckptsurg.verify(published / "out", trained, baseline=published / "vouched.safetensors").ok
    with pytest.raises(ckptsurg.UsageError, match="is not the baseline of this manifest"):
        ckptsurg.verify(published / "out", trained, baseline=trained)
