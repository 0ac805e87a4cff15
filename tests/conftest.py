"""What holds for all tests: the threads of torch, set before it is imported, and one seed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

pytest_plugins = ["pytester"]  # the pytest plugin is tested as other projects meet it

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of torch beside them would only wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="A run in which a test was skipped has failed.")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A command that is run in this process has the library say more, and no test after it expects that."""
    yield
    logging.getLogger("ckptsurg").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Models with random weights are the same in every run."""
    import torch

    torch.manual_seed(0)
