"""What holds for all tests: the threads of torch, set before it is imported, and one seed."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["pytester"]  # the pytest plugin is tested as other projects meet it

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of torch beside them would only wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Models with random weights are the same in every run."""
    import torch

    torch.manual_seed(0)
