"""What holds for the tests of Keras: one seed, and names of layers from the beginning."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import pytest
from keras.src.utils.naming import reset_uids

from ckptsurg.manifest import Manifest

from .models import manifest_of, small


def pytest_configure(config: pytest.Config) -> None:
    # Keras's variables are older than numpy 2, and its own code for saving makes arrays of them.
    line = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Models with random weights are the same in every run, and layers have the names of a new process."""
    reset_uids()
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_global_policy("float32")


@pytest.fixture
def model() -> keras.Model:
    return small()


@pytest.fixture
def manifest(model: keras.Model) -> Manifest:
    """All of the model is frozen but its head."""
    return manifest_of(model, "**", "!fc")
