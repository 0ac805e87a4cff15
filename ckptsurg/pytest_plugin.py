"""The pytest plugin: the fixture ``frozen_weights``, its marker, and ``--freeze-manifest``.

Nothing but pytest is imported before the fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

__all__ = ["frozen_weights", "pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("ckptsurg").addoption(
        "--freeze-manifest",
        metavar="PATH",
        help="Manifest of what the fixture frozen_weights holds a model to, where a test names nothing itself.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "frozen_weights(freeze=None, *, manifest=None, names=None, expect_trained=False): "
        "what the fixture frozen_weights holds a model to, where its call names nothing.",
    )


@pytest.fixture
def frozen_weights(request: pytest.FixtureRequest) -> Callable[..., AbstractContextManager[Any]]:
    """Assert that a step of training leaves frozen weights as they are, bit by bit.

    ``with frozen_weights(model, freeze=["**", "!fc"]): step()``, or with ``manifest="out/freeze.json"``; without
    either, what the marker ``frozen_weights`` says, or ``--freeze-manifest``. The model is watched, not changed.
    """
    from .testing import frozen_weights

    def watched(model: Any, freeze: Any = None, **options: Any) -> AbstractContextManager[Any]:
        __tracebackhide__ = True
        options = {name: value for name, value in options.items() if value is not None}
        if freeze is None and "manifest" not in options:
            if (marker := request.node.get_closest_marker("frozen_weights")) is not None:
                if len(marker.args) > 1:
                    listed = f"frozen_weights({list(marker.args)!r})"
                    raise pytest.UsageError(
                        f"the marker frozen_weights takes one selector; several are a list: {listed}"
                    )
                options = {"freeze": next(iter(marker.args), None), **marker.kwargs, **options}
                freeze = options.pop("freeze")
            path = request.config.getoption("--freeze-manifest")
            if freeze is None and options.get("manifest") is None and path is not None:
                options["manifest"] = request.config.invocation_params.dir / path
        return frozen_weights(model, freeze, **options)

    return watched
