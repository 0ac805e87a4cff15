"""What docs/integrations.md says of Keras is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import ckptsurg
from ckptsurg.integrations.keras import FreezeCallback, load_weights

from .pretrained import accustomed, images

INTEGRATIONS = (Path(__file__).parent.parent.parent / "docs" / "integrations.md").read_text()


def _block(kind: str, containing: str) -> str:
    blocks = re.findall(r"```(\w+)\n(.*?)```", INTEGRATIONS, re.DOTALL)
    [found] = [text for language, text in blocks if language == kind and containing in text]
    return found


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The document's base, where its commands are run."""
    monkeypatch.chdir(tmp_path)
    base = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg")
    accustomed(base).save("base.keras")
    for name in ("phase1.yaml", "phase2.yaml"):
        Path(name).write_text(_block("yaml", f"# {name}"))
    return base


def _with_head(base: keras.Model) -> keras.Model:
    return keras.Model(base.input, keras.layers.Dense(10, activation="softmax", name="predictions")(base.output))


def test_the_two_phases_run(base):
    model = _with_head(base)
    for line, trains in zip(_block("console", "phase1.yaml").splitlines(), ("phase1", "phase2", None), strict=True):
        command = line.removeprefix("$ ").partition("#")[0].replace("ckptsurg", f"{sys.executable} -m ckptsurg", 1)
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if trains == "phase1":
            load_weights(model, "out")
        if trains:
            manifest = "out" if trains == "phase1" else "phase2.freeze.json"
            frozen = ckptsurg.freeze(model, manifest)
            model.compile(keras.optimizers.SGD(0.01), loss="sparse_categorical_crossentropy", jit_compile=False)
            model.fit(*images(32, 8), verbose=0, callbacks=[FreezeCallback(manifest, expect_trained=True)])
            model.save(f"{trains}.keras")
            frozen.release()


def test_the_block_for_the_second_phase_runs(base):
    model = _with_head(base)
    ckptsurg.freeze(model, ckptsurg.make_manifest(["**", "!predictions"], model))
    model.save("phase1.keras")
    manifest = ckptsurg.make_manifest("phase2.yaml", "phase1.keras")
    ckptsurg.write_manifest(manifest, "phase2.freeze.json")
    x, y = images(32, 8)
    scope = {"keras": keras, "ckptsurg": ckptsurg, "FreezeCallback": FreezeCallback, "x": x, "y": y}
    exec(_block("python", "load_model"), scope)
    assert ckptsurg.verify(manifest, "phase2.keras", expect_trained=True).ok


def test_the_block_for_keras_runs(base):
    ckptsurg.rewrite("phase1.yaml", "base.keras", "out")
    scope = {
        "model": _with_head(base),
        "keras": keras,
        "ckptsurg": ckptsurg,
        **dict(zip("xy", images(32, 8), strict=True)),
    }
    exec(_block("python", "integrations.keras import"), scope)
    assert ckptsurg.verify("out", "trained.keras", expect_trained=True).ok
