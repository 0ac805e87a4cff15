"""Statements of what was published and proven: their form, and that whoever signs them is told of every change."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rfc8785
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from in_toto_attestation.v1.statement import Statement
from model_signing import signing, verifying
from safetensors.torch import load_file, save_file
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner

import ckptsurg
from ckptsurg.proofs import attest, verify_and_attest

SPEC = {
    "version": 1,
    "name": "ten-classes",
    "drop": "old",
    "freeze": "body",
    "reinit": [{"match": "head", "shape": {0: 10}, "init": {"normal": {"std": 0.02}}}],
}


@pytest.fixture
def out(tmp_path) -> Path:
    """A published folder."""
    (tmp_path / "base").mkdir()
    tensors = {"body": torch.randn(20, 30), "head": torch.randn(5, 30), "old": torch.ones(3)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    ckptsurg.rewrite(SPEC, tmp_path / "base", tmp_path / "out")
    return tmp_path / "out"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ckptsurg", *arguments], cwd=folder, capture_output=True, text=True)


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def sums(folder: Path) -> dict[str, str]:
    """As the program sha256sum has it."""
    names = sorted(path.name for path in folder.iterdir())
    lines = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    return {line[66:]: line[:64] for line in lines.splitlines()}


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [one for item in (value.values() if isinstance(value, dict) else value) for one in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


# --- What is stated ---------------------------------------------------------------------------------


def test_a_published_output(out):
    raw = attest(out, out)
    statement = json.loads(raw)
    manifest = json.loads((out / "freeze.json").read_bytes())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {one["name"]: one["digest"]["sha256"] for one in statement["subject"]} == sums(out)
    assert statement["predicate"] == {
        **{key: manifest[key] for key in ("tool", "spec", "base", "root", "frozen_root", "counts")},
        "manifest": {"sha256": hashlib.sha256((out / "freeze.json").read_bytes()).hexdigest()},
    }
    assert raw == rfc8785.dumps(statement)
    assert all(number < 2**53 for number in numbers(statement))
    assert str(out.parent).encode() not in raw
    Statement(
        subjects=[_subject(one) for one in statement["subject"]],
        predicate_type=statement["predicateType"],
        predicate=statement["predicate"],
    ).validate()


def _subject(one: dict[str, Any]) -> Any:
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

    return ResourceDescriptor(name=one["name"], digest=one["digest"]).pb


def test_the_same_output_gives_the_same_statement(out, tmp_path):
    first = attest(out, out)
    ckptsurg.rewrite(SPEC, tmp_path / "base", tmp_path / "again", jobs=1)
    assert attest(tmp_path / "again", tmp_path / "again", jobs=1) == first


@pytest.mark.parametrize("sabotage", ["frozen", "trainable", "added", "manifest"])
def test_what_is_not_the_output_is_not_attested(out, tmp_path, sabotage):
    manifest = ckptsurg.load_manifest(out / "freeze.json")
    weights = out / "model.safetensors"
    tensors = load_file(weights)
    if sabotage == "added":
        save_file(tensors | {"more": torch.ones(1)}, weights)
    elif sabotage == "manifest":
        (out / "freeze.json").write_bytes((out / "freeze.json").read_bytes().replace(b"ten-classes", b"two-classes"))
    else:
        tensors["body" if sabotage == "frozen" else "head"].view(-1)[3] += 1
        save_file(tensors, weights)
    said = {
        "frozen": r"body \(changed\) differ",
        "trainable": r"head \(changed\) differ",
        "added": "it holds more besides",
        "manifest": "its freeze.json is another one",
    }[sabotage]
    with pytest.raises(ckptsurg.UsageError, match=f"is not the output of this manifest: {said}"):
        attest(manifest, out)


def test_what_was_found_after_training(out, tmp_path):
    tensors = load_file(out / "model.safetensors")
    tensors["head"] += 1
    save_file(tensors, tmp_path / "good.safetensors")
    tensors["body"][0, 0] += 1
    save_file(tensors, tmp_path / "bad.safetensors")
    root = json.loads((out / "freeze.json").read_bytes())["root"]
    for name, ok, drifted in (("good", True, []), ("bad", False, [{"name": "body", "verdict": "changed"}])):
        report, raw = verify_and_attest(out, tmp_path / f"{name}.safetensors", root=root)
        statement = json.loads(raw)
        assert raw == rfc8785.dumps(statement)
        found = hashlib.sha256((tmp_path / f"{name}.safetensors").read_bytes()).hexdigest()
        assert statement["subject"] == [{"name": f"{name}.safetensors", "digest": {"sha256": found}}]
        predicate = statement["predicate"]
        assert (predicate["ok"], predicate["verified"], predicate["relied_on"]) == (ok, int(ok), "pinned")
        assert [{key: one[key] for key in ("name", "verdict")} for one in predicate["drifted"]] == drifted
        assert predicate["root"] == root and report.ok == ok


def test_of_what_is_in_memory_nothing_is_stated(out):
    with pytest.raises(ckptsurg.UsageError, match="is not in files, of which a statement could speak"):
        verify_and_attest(out, load_file(out / "model.safetensors"))


# --- Signed by others -------------------------------------------------------------------------------


def test_an_envelope_that_was_signed(out, tmp_path):
    """DSSE, by securesystemslib: what was tampered with does not verify, and what verifies pins the manifest."""
    signer = CryptoSigner.generate_ed25519()
    envelope = Envelope(attest(out, out), "application/vnd.in-toto+json", {})
    envelope.sign(signer)
    envelope.verify([signer.public_key], 1)
    written = tmp_path / "envelope.json"
    written.write_text(json.dumps(envelope.to_dict()))
    report = ckptsurg.verify(out, out, attestation=written)
    assert report.ok and report.relied_on == "signed"

    tampered = envelope.to_dict()
    payload = base64.b64decode(tampered["payload"]).replace(b"ten-classes", b"two-classes")
    tampered["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(VerificationError):
        Envelope.from_dict(tampered).verify([signer.public_key], 1)

    forged = ckptsurg.make_manifest(["**"], out)  # says less or more than what was published
    with pytest.raises(ckptsurg.UsageError, match="the pinned root is blake3:"):
        ckptsurg.verify(forged, out, attestation=written)


@pytest.mark.parametrize("name", ["model.safetensors", "freeze.json", "config.json"])
def test_a_folder_that_was_signed_whole(out, tmp_path, name):
    """By model_signing: weights, manifest and configuration are all covered."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public, signature = tmp_path / "key", tmp_path / "key.pub", tmp_path / "model.sig"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    signing.Config().use_elliptic_key_signer(private_key=private).sign(out, signature)
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(out, signature)
    flip(out / name)
    with pytest.raises(ValueError, match=r"(?i)mismatch|missing|extra"):
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(out, signature)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"_type": "https://in-toto.io/Statement/v1"}', '{"payloadType": "application/vnd.in-toto+json"}'],
)
def test_what_is_no_statement_pins_nothing(out, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ckptsurg.DocumentError, match=r"x\.json"):
        ckptsurg.verify(out, out, attestation=tmp_path / "x.json")


# --- At the command line ----------------------------------------------------------------------------


def test_the_commands(out, tmp_path):
    done = run(tmp_path, "attest", "out", "out", "-o", "statement.json")
    assert (done.returncode, done.stdout) == (0, "statement    statement.json\n")
    assert (tmp_path / "statement.json").read_bytes() == attest(out, out)
    done = run(tmp_path, "verify", "out", "out", "--attestation", "statement.json", "--statement", "verified.json")
    assert done.returncode == 0 and "(the manifest is that of the statement)" in done.stdout
    assert json.loads((tmp_path / "verified.json").read_bytes())["predicate"]["relied_on"] == "signed"
    assert "(nothing pins the manifest)" in run(tmp_path, "verify", "out", "out").stdout
    root = json.loads((out / "freeze.json").read_bytes())["root"]
    assert "(the manifest is pinned)" in run(tmp_path, "verify", "out", "out", "--root", root).stdout


def test_a_statement_replaces_only_a_statement_and_that_is_said_before_the_work(out, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    for command in (["attest", "out", "out", "-o"], ["verify", "out", "out", "--statement"]):
        done = run(tmp_path, *command, "mine.json", "--overwrite")
        assert done.returncode == 2 and "mine.json: is no statement of ckptsurg and is not replaced" in done.stderr
        assert run(tmp_path, *command, f"{command[0]}.json").returncode == 0
        done = run(tmp_path, *command, f"{command[0]}.json")
        assert (done.returncode, done.stdout) == (2, "") and ".json: exists already" in done.stderr
        assert run(tmp_path, *command, f"{command[0]}.json", "--overwrite").returncode == 0
    before = (tmp_path / "attest.json").read_bytes()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")  # with which no work can be begun
    assert run(tmp_path, "attest", "out", "out", "-o", "attest.json").returncode == 2
    assert run(tmp_path, "attest", "out", "out", "-o", "attest.json", "--overwrite").returncode == 3
    assert (tmp_path / "attest.json").read_bytes() == before
