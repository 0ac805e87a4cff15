"""The pytest plugin: the fixture ``frozen_weights``, its marker, and ``--freeze-manifest``.

Nothing but pytest is imported before the fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

__all__ = ["frozen_weights", "pytest_addoption", "pytest_collection_modifyitems", "pytest_configure"]


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A marker without its fixture would pass whatever happens."""
    for item in items:
        marked = item.get_closest_marker("frozen_weights") is not None
        if marked and "frozen_weights" not in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(
                f"{item.nodeid}: has the marker frozen_weights, and does not ask for the fixture of that name: "
                "nothing would be checked"
            )


@pytest.fixture
def frozen_weights(request: pytest.FixtureRequest) -> Iterator[Callable[..., AbstractContextManager[Any]]]:
    """Assert that a step of training leaves frozen weights as they are, bit by bit.

    ``with frozen_weights(model, freeze=["**", "!fc"]): step()``, or with ``manifest="out/freeze.json"``; without
    either, what the marker ``frozen_weights`` says, or ``--freeze-manifest``. The model is watched, not changed.
    """
    from .testing import frozen_weights

    calls, made = 0, []

    def watched(model: Any, freeze: Any = None, **options: Any) -> AbstractContextManager[Any]:
        __tracebackhide__ = True
        nonlocal calls
        calls += 1
        options = {name: value for name, value in options.items() if value is not None}
        if freeze is None and "manifest" not in options:
            if (marker := request.node.get_closest_marker("frozen_weights")) is not None:
                if len(marker.args) > 1:
                    listed = f"frozen_weights({list(marker.args)!r})"
                    raise pytest.UsageError(
                        f"the marker frozen_weights takes one selector; several are a list: {listed}"
                    )
                if marker.args and "freeze" in marker.kwargs:
                    raise pytest.UsageError("the marker frozen_weights has two selectors: leave out one")
                options = {"freeze": next(iter(marker.args), None), **marker.kwargs, **options}
                freeze = options.pop("freeze")
            path = request.config.getoption("--freeze-manifest")
            if freeze is None and options.get("manifest") is None and path is not None:
                options["manifest"] = request.config.invocation_params.dir / path
        made.append(frozen_weights(model, freeze, **options))
        return made[-1]

    yield watched
    if not calls and request.node.get_closest_marker("frozen_weights") is not None:
        pytest.fail("the fixture frozen_weights was not used: nothing was checked", pytrace=False)
    if any(not one.entered for one in made):
        pytest.fail("frozen_weights(...) was not entered: write `with frozen_weights(...):`", pytrace=False)
