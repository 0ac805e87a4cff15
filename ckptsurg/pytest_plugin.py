"""The pytest plugin: the fixture ``frozen_weights``, its marker, and ``--freeze-manifest``.

Nothing but pytest is imported before the fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest

__all__ = ["frozen_weights", "pytest_addoption", "pytest_configure", "pytest_runtest_call"]


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


@dataclass
class _Use:
    """What a test did with the fixture."""

    calls: int = 0
    made: list[Any] = field(default_factory=list)


_USE = pytest.StashKey[_Use]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that passes although what it asked for was not checked fails."""
    yield
    use = item.stash.get(_USE, None)
    if use is None:
        if any(marker.name == "frozen_weights" for marker in item.own_markers):
            pytest.fail("has the marker frozen_weights, and does not ask for the fixture of that name", pytrace=False)
    elif not use.calls and item.get_closest_marker("frozen_weights") is not None:
        pytest.fail("the fixture frozen_weights was not used: nothing was checked", pytrace=False)
    elif any(not one.entered for one in use.made):
        pytest.fail("frozen_weights(...) was not entered: write `with frozen_weights(...):`", pytrace=False)


@pytest.fixture
def frozen_weights(request: pytest.FixtureRequest) -> Callable[..., AbstractContextManager[Any]]:
    """Assert that a step of training leaves frozen weights as they are, bit by bit.

    ``with frozen_weights(model, freeze=["**", "!fc"]): step()``, or with ``manifest="out/freeze.json"``; without
    either, what the marker ``frozen_weights`` says, or ``--freeze-manifest``. The model is watched, not changed.
    """
    from .testing import frozen_weights

    use = request.node.stash[_USE] = _Use()

    def watched(model: Any, freeze: Any = None, **options: Any) -> AbstractContextManager[Any]:
        __tracebackhide__ = True
        use.calls += 1
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
        made = frozen_weights(model, freeze, **options)
        use.made.append(made)
        return made

    return watched
